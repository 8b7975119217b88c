"""Draw README's picture of ``vmactor top``: a daemon with real guests, and the view of it, for a moment.

python -m tools.picture_of_top docs/top.svg
"""

import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import anyio

from vmactor import PayloadReady, VirtualizationService, connect, load_config
from vmactor.cli.top import Top
from vmactor.client import VirtualizationService as RemoteService
from vmactor.client import VirtualMachine
from vmactor.daemon.listening import listening
from vmactor.daemon.server import Server

GUEST = Path("build/guest/vm.json")
NAMES = ("web-1", "web-2", "ci-runner", "builder")
SECONDS = 6
"""Long enough for two samples of what the VMs use."""
_FONTS = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)
"""Of textual's picture: they would be loaded from elsewhere."""


async def boot(service: RemoteService) -> list[VirtualMachine]:
    """Boot some guests, one of which is paused then."""
    ready, vms = service.subscribe(kinds=[PayloadReady]), []
    for name in NAMES:
        with load_config(GUEST) as config:
            vms.append(await service.create_vm(replace(config, name=name)))
        await vms[-1].start()
        await anext(ready)
    await vms[2].suspend()
    return vms


async def picture(directory: Path) -> str:
    """Boot, look, draw."""
    with listening(directory / "socket") as listener:
        service = VirtualizationService(state_directory=directory / "state")
        async with service, anyio.create_task_group() as tasks:
            await tasks.start(Server(service).serve, [listener])
            app = Top(connect(directory / "socket"))
            async with connect(directory / "socket") as client, app.run_test(size=(132, 12)) as pilot:
                vms = await boot(client)
                await anyio.sleep(SECONDS)
                await pilot.pause()
                drawn = app.export_screenshot()
                for vm in vms:
                    await vm.aclose()
            tasks.cancel_scope.cancel()
    return _FONTS.sub("", drawn)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vmt") as name:
        Path(sys.argv[1]).write_text(anyio.run(picture, Path(name)))
