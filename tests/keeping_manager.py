"""A manager that keeps VMs, as a process of its own that can be killed at any moment.

The process takes commands as JSON lines (``{"do": "create", "id": N, ...}``). Its answers are JSON lines, too
(``{"id": N, ...}``), and so are all events, from the first of the journal on. It ends in order at the end of
its input. ``KeepingManager`` is the other end of it, for tests.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Self

import anyio
import structlog

from vmactor import RawConfig, VirtualizationService
from vmactor.actors.handle import VirtualMachine
from vmactor.errors import VmactorError

Json = dict[str, Any]

READY = "started;ready;serve"


class KeepingManager:
    """Its process.

    Attributes:
        events: All events that it told so far, those of earlier managers included.
        vms: What ``list_vms`` gave when it was ready.
    """

    def __init__(self, state: Path, vmm: str = "simulated", backend: str = "asyncio") -> None:
        self.state = state
        self.kernel = state.parent / "kernel"
        self.kernel.touch()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Json] = {}
        self.events: list[Json] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.keeping_manager", state, vmm, backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parent.parent,
        )
        self.vms: list[Json] = self._read_until(lambda message: "open" in message)["open"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def tell(self, do: str, **arguments: Any) -> int:
        """Begin something; returns its number."""
        assert self.process.stdin is not None
        number = next(self._numbers)
        command = {"do": do, "id": number, "kernel": str(self.kernel)} | arguments
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return number

    def ask(self, do: str, **arguments: Any) -> Any:
        """Do something and return its result."""
        number = self.tell(do, **arguments)
        answer = self._answers.pop(number, None) or self._read_until(lambda got: got.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def create(self, script: str = READY, **more: Any) -> int:
        """A VM that runs; its CID."""
        cid: int = self.ask("create", params=f'vmactor.script="{script}"', **more)
        return cid

    def expect(self, kind: str, cid: int = 0) -> Json:
        """The last event of a kind and VM, or the next if there was none."""
        for event in reversed(self.events):
            if (event["event"], event["cid"]) == (kind, cid):
                return event
        return self._read_until(lambda got: (got.get("event"), got.get("cid")) == (kind, cid))

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()

    def end(self) -> list[Json]:
        """Have it end in order; returns all events."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(EOFError):
            self._read_until(lambda _message: False)
        assert self.process.wait() == 0
        return self.events

    def _read_until(self, wanted: Callable[[Json], bool]) -> Json:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            message: Json = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "id" in message and not wanted(message):
                self._answers[message["id"]] = message
            if wanted(message):
                return message
        raise EOFError


# -- The process ---------------------------------------------------------------------------------------


def say(message: Json) -> None:
    os.write(1, json.dumps(message, default=str).encode() + b"\n")


async def main(state: Path, vmm: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    handles: dict[int, VirtualMachine] = {}
    async with VirtualizationService(vmm=vmm, state_directory=state, keeps=True) as service:
        with service.subscribe(after=0, capacity=1 << 16) as events:
            async with anyio.create_task_group() as tasks:

                async def tell() -> None:
                    async for event in events:
                        say(event.as_dict())

                async def perform(command: Json) -> None:
                    try:
                        say({"id": command["id"], "result": await carry_out(service, handles, command)})
                    except VmactorError as error:
                        say({"id": command["id"], "error": repr(error)})

                tasks.start_soon(tell)
                say({"open": [vm.as_dict() for vm in service.list_vms()]})
                async for line in lines():
                    tasks.start_soon(perform, json.loads(line))
                tasks.cancel_scope.cancel()


async def lines() -> AsyncIterator[str]:
    async with anyio.wrap_file(sys.stdin) as file:
        async for line in file:
            yield line


async def create(service: VirtualizationService, command: Json) -> VirtualMachine:
    with contextlib.ExitStack() as stack:

        def opened(name: str) -> Any:
            return stack.enter_context(Path(command[name]).open("rb")) if name in command else None

        config = RawConfig(
            name=command.get("name", "kept"),
            kernel=opened("kernel"),
            initrd=opened("initrd"),
            params=command.get("params", ""),
            memory_mib=command.get("memory_mib"),
        )
        return await service.create_vm(config, keep=command.get("keep", True))


async def carry_out(service: VirtualizationService, handles: dict[int, VirtualMachine], command: Json) -> Any:
    if command["do"] == "create":
        vm = await create(service, command)
        handles[vm.cid] = vm
        if command.get("start", True):
            await vm.start()
        return vm.cid
    vm = service.open_vm(command["cid"])
    match command["do"]:
        case "stop":
            return await vm.stop()
        case "suspend":
            return await vm.suspend()
        case "resume":
            return await vm.resume()
        case "step":
            async with await vm.connect_vsock(5000) as stream:
                await stream.send(command["step"].encode() + b"\n")
                return (await stream.receive()).decode().strip()
        case "info":
            return vm.info.as_dict()
    raise AssertionError(command)


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]), sys.argv[2], backend=sys.argv[3])
