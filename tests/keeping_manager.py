"""A manager that keeps VMs, as a process of its own that can be killed at any moment.

The process takes commands as JSON lines (``{"do": "create", "id": N, ...}``). Its answers are JSON lines, too
(``{"id": N, ...}``), and so are all events, from the first of the journal on. It ends in order at the end of
its input. ``KeepingManager`` is the other end of it, for tests.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Self

import anyio
import structlog

from tests.guests import allowing
from vmactor import MemoryTrimLevel, RawConfig, StopLadder, VirtualizationService, load_config
from vmactor.actors.handle import VirtualMachine
from vmactor.errors import VmactorError
from vmactor.messages import Requester
from vmactor.process import has_ended

Json = dict[str, Any]

READY = "started;ready;serve"
OTHER = 12345
"""A user who has nothing."""
MARK = "VMACTOR_TEST_STATE"
"""The variable by which all processes of a test are known."""


class KeepingManager:
    """Its process.

    Attributes:
        events: All events that it told so far, those of earlier managers included.
        vms: What ``list_vms`` gave when it was ready.
        notes: What its load said of VMs, by CID.
    """

    vms: list[Json]

    def __init__(
        self,
        state: Path,
        vmm: str = "simulated",
        backend: str = "asyncio",
        *,
        wait: bool = True,
        after: int = 0,
    ) -> None:
        self.state = state
        self.kernel = state.parent / "kernel"
        self.kernel.touch()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Json] = {}
        self.events: list[Json] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.keeping_manager", state, vmm, str(after), backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, MARK: str(state)},  # its VMs' processes inherit it
        )
        self.notes: dict[int, str] = {}
        if wait:
            self.wait_until_open()

    def wait_until_open(self) -> None:
        """Return when it is ready."""
        self.vms = self._read_until(lambda message: "open" in message)["open"]

    def read_the_rest(self) -> None:
        """Take in what a killed one had told."""
        with contextlib.suppress(EOFError):
            self._read_until(lambda _message: False)

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
        command = {"do": do, "id": number, "kernel": str(self.kernel), "params": ""} | arguments
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

    def read_event(self) -> Json:
        """The next event."""
        return self._read_until(lambda message: "event" in message)

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
        while (line := self.process.stdout.readline()).endswith(b"\n"):  # else it was killed meanwhile
            message: Json = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "note" in message:
                self.notes[message["cid"]] = message["note"]
            elif "id" in message and not wanted(message):
                self._answers[message["id"]] = message
            if wanted(message):
                return message
        raise EOFError


Start = Callable[..., KeepingManager]


def managers(directory: Path) -> Iterator[Start]:
    """For a fixture: managers of one state directory, one after the other; nothing of them stays."""
    started: list[KeepingManager] = []

    def start(*arguments: str) -> KeepingManager:
        if started:
            started[-1].__exit__()
        started.append(KeepingManager(directory / "state", *arguments))
        return started[-1]

    yield start
    for one in started:
        one.__exit__()
    for pid in bearers(directory):
        os.kill(pid, signal.SIGKILL)


def bearers(directory: Path) -> list[int]:
    """The processes of VMs whose directories are in there."""
    tokens = []
    for ledger in directory.glob("state/vm/*/ledger"):
        head = entry_of(ledger.read_text().splitlines()[0])
        tokens.append(f"VMACTOR_VM={head['token']}".encode())
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if any(token in environ.read_bytes() for token in tokens):
                found.append(int(environ.parent.name))
        except OSError:
            continue
    return found


def marked(state: Path) -> set[int]:
    """The living processes of a state directory's managers and VMs."""
    mark, found = f"{MARK}={state}".encode(), set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                found.add(int(environ.parent.name))
    return found


def ended(pid: int) -> bool:
    """Whether a process that this one need not be the parent of has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return has_ended(pidfd)
    finally:
        os.close(pidfd)


def entry_of(line: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(line.partition(" ")[2])
    return entry


# -- The process ---------------------------------------------------------------------------------------


def say(message: Json) -> None:
    os.write(1, json.dumps(message, default=str).encode() + b"\n")


async def main(state: Path, vmm: str, after: int) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    handles: dict[int, VirtualMachine] = {}
    policy = allowing(OTHER)
    async with VirtualizationService(vmm=vmm, state_directory=state, policy=policy, keeps=True) as service:
        with service.subscribe(after=after, capacity=1 << 16) as events:
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
        if "config" in command:
            guest = stack.enter_context(load_config(Path(command["config"]), name="guest"))
            scripted = replace(guest, params=f"{guest.params} {command['params']}")
            return await service.create_vm(scripted, keep=True)
        config = RawConfig(
            name="kept",
            kernel=stack.enter_context(Path(command["kernel"]).open("rb")),
            params=command["params"],
        )
        user = command.get("user")
        requester = None if user is None else Requester(user, user)
        return await service.create_vm(config, keep=command.get("keep", True), requester=requester)


async def carry_out(service: VirtualizationService, handles: dict[int, VirtualMachine], command: Json) -> Any:
    if command["do"] == "ping":
        return None
    if command["do"] == "load":
        async with anyio.create_task_group() as tasks:
            for number in range(command["tasks"]):
                tasks.start_soon(load, service, command, Random(f"{command['seed']} {number}"))
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
        case "trim":
            return await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)
        case "shutdown":
            return await vm.shutdown(StopLadder(exit_request=None, kill=None))
        case "info":
            return vm.info.as_dict()
    raise AssertionError(command)


async def load(service: VirtualizationService, command: Json, chance: Random) -> None:
    """Create VMs and end them for ever, in as many ways as there are."""
    while True:
        keep, lasting = chance.random() < 0.6, chance.random() < 0.6
        end = chance.choice(["poweroff", "panic", "failure X;crash"])
        script = READY if lasting else f"started;ready;sleep {chance.randrange(300)};{end}"
        with contextlib.suppress(VmactorError):
            vm = await create(service, command | {"keep": keep, "params": f'vmactor.script="{script}"'})
            await vm.start()
            if keep and lasting:
                say({"note": "lives", "cid": vm.cid})
            await anyio.sleep(chance.random() * 0.1)
            for one in service.list_vms()[: -command["living"]]:
                say({"note": "ends", "cid": one.cid})
                await service.open_vm(one.cid).stop()
            if chance.random() < 0.2:
                await vm.suspend()
            if not keep and chance.random() < 0.5:
                await vm.aclose()
            else:
                HELD.append(vm)


HELD: list[VirtualMachine] = []
"""Whatever goes, the handles of these stay."""


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), backend=sys.argv[4])
