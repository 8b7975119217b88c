"""What a client knows of VMs from their events alone, compared with what their actors publish."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest

from tests.simulated_peer import script
from vmactor import Backoff, RawConfig, Restart, RestartLimit, RestartPolicy, VirtualizationService
from vmactor.client.present import after, newborn
from vmactor.errors import VmactorError
from vmactor.messages import Created, Restarting, Suspended, VirtualMachineState, VmInfo, is_end

pytestmark = pytest.mark.anyio

NOT_TOLD = {"directory", "requester_pid", "created", "started", "restart_due", "queued", "died"}
"""What no event tells exactly, or what compares by identity of an event."""


@pytest.fixture
def kernel(short_dir: Path) -> Iterator[BinaryIO]:
    """Any file will do."""
    with (short_dir / "kernel").open("w+b") as file:
        yield file


def told(info: VmInfo) -> dict[str, Any]:
    return {spec.name: getattr(info, spec.name) for spec in fields(info) if spec.name not in NOT_TOLD}


@pytest.mark.parametrize(
    "steps",
    [
        ("started", "ready", "finished 0", "poweroff"),
        ("started", "finished 3", "poweroff"),
        ("started", "error 1 no", "poweroff"),
        ("started", "ready", "crash"),
        ("exit 1",),
    ],
    ids=",".join,
)
async def test_after_its_last_event_a_vm_is_known_as_its_actor_published_it(
    short_dir: Path, kernel: BinaryIO, steps: tuple[str, ...]
) -> None:
    service = VirtualizationService(vmm="simulated", state_directory=short_dir / "state")
    policy = RestartPolicy(
        when=Restart.PERMANENT, limit=RestartLimit(1, 60.0), backoff=Backoff(initial=0.01, jitter=0.0)
    )
    async with service:
        with service.subscribe() as events, anyio.fail_after(60):
            vm = await service.create_vm(
                RawConfig(name="sim", kernel=kernel, params=script(*steps)), restart=policy
            )
            try:
                await vm.start()
            except VmactorError:
                assert steps[0].startswith("exit")
            known = None
            async for event in events:
                if isinstance(event, Created):
                    known = newborn(event)
                assert known is not None
                known = after(known, event)
                if isinstance(event, Restarting):
                    assert known.state is VirtualMachineState.STARTING
                    assert known.restart_due is not None
                if is_end(event):
                    break
            await vm.wait()
            assert known is not None
            assert told(known) == told(vm.info)
            assert known.died == vm.info.died


async def test_events_of_an_earlier_run_change_nothing(short_dir: Path, kernel: BinaryIO) -> None:
    service = VirtualizationService(vmm="simulated", state_directory=short_dir / "state")
    async with service:
        vm = await service.create_vm(RawConfig(name="sim", kernel=kernel))
        later = after(vm.info, Restarting(cid=vm.cid, generation=2, restarts=1))
        assert after(later, Suspended(cid=vm.cid, generation=1)) is later
        assert after(later, Suspended(cid=vm.cid, generation=2)).suspended
