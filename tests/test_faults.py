"""The fault matrix: docs/faults.md says what comes of each fault in each state, and here it is done.

All cells of a row run at once in one service, with a VM beside them that must come to no harm.
"""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from tests.guests import agent, create
from tests.residue import children
from tests.simulated_peer import script
from vmactor import (
    Died,
    RawConfig,
    StopLadder,
    VirtualizationService,
    VirtualMachineState,
    VmactorError,
)
from vmactor.actors.handle import VirtualMachine

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
PATIENCE = 90.0
TEXT = "MICRODROID_PAYLOAD_HAS_CHANGED"
LADDER = StopLadder(power_button=1.0, exit_request=2.0, kill=30.0)
LONG_LADDER = StopLadder(power_button=60.0, exit_request=60.0, kill=30.0)


def table(heading: str) -> dict[str, dict[str, str]]:
    """A table of the page: fault -> state -> outcome; cells that cannot be are left out."""
    section = PAGE.read_text().split(f"## {heading}")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in row] for row in rows]
    return {
        row[0]: {state: cell for state, cell in zip(head[1:], row[1:], strict=True) if cell != "-"}
        for row in body
    }


SIMULATED = table("The VMM, in every state of a VM (simulated VMs)")
REAL = table("The VMM and its helper (real guests under QEMU)")

STATES = {
    "starting": ("control silent", VirtualMachineState.STARTING),
    "running": ("", VirtualMachineState.STARTING),
    "started": ("started", VirtualMachineState.STARTED),
    "ready": ("started;ready", VirtualMachineState.READY),
    "finished": ("started;ready;finished 0", VirtualMachineState.FINISHED),
    "suspended": ("started;ready", VirtualMachineState.READY),
}
"""The steps that lead to each state, and what is seen of it."""


@dataclass(frozen=True)
class Fault:
    """How a fault is brought about.

    Attributes:
        before: Steps of the guest before it comes to the state.
        after: Steps afterwards.
        mood: A step that a simulated VMM takes when it has come to the state.
        act: What is done to the VM in its state.
        hangup: Seconds that a payload has to report.
    """

    before: str = ""
    after: str = ""
    mood: str = ""
    act: Callable[[VirtualMachine], Awaitable[None]] | None = None
    hangup: float | None = None


def pid_of(vm: VirtualMachine) -> int:
    """The VMM's process."""
    pid = vm.info.pid
    assert pid is not None
    return pid


async def kill(vm: VirtualMachine) -> None:
    os.kill(pid_of(vm), signal.SIGKILL)


async def freeze_and_stop(vm: VirtualMachine) -> None:
    os.kill(pid_of(vm), signal.SIGSTOP)
    await vm.stop()


async def freeze_and_shut_down(vm: VirtualMachine) -> None:
    os.kill(pid_of(vm), signal.SIGSTOP)
    await vm.shutdown(LADDER)


async def shut_down(vm: VirtualMachine) -> None:
    await vm.shutdown(LADDER)


async def kill_during_shutdown(vm: VirtualMachine) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(vm.shutdown, LONG_LADDER)
        await anyio.sleep(0.3)  # the button is pressed by then; nothing depends on it, but the cell's purpose
        os.kill(pid_of(vm), signal.SIGKILL)


async def kill_helper(vm: VirtualMachine) -> None:
    helper = vm._actor.vsock_peer
    assert helper is not None
    assert helper in children()
    os.kill(helper, signal.SIGKILL)


FAULTS = {
    "VMM killed": Fault(act=kill),
    "VMM killed after a failure text": Fault(before=f"failure {TEXT}|because", act=kill),
    "VMM stopped by SIGSTOP, then `stop`": Fault(act=freeze_and_stop),
    "VMM stopped by SIGSTOP, then `shutdown`": Fault(act=freeze_and_shut_down),
    "control socket silent, then `shutdown`": Fault(mood="control silent", act=shut_down),
    "control socket slow, then `shutdown`": Fault(mood="control slow 300", act=shut_down),
    "control socket garbled, then `shutdown`": Fault(mood="control garble", act=shut_down),
    "guest deaf to its power button, then `shutdown`": Fault(before="deaf", act=shut_down),
    "VMM killed while `shutdown` waits": Fault(before="deaf", act=kill_during_shutdown),
    "VMM exits with 0": Fault(after="sleep 300;exit 0"),
    "VMM exits with 1": Fault(after="sleep 300;exit 1"),
    "VMM exits with 33": Fault(after="sleep 300;exit 33"),
    "payload reports no start in time": Fault(hangup=0.5),
    "vsock helper killed": Fault(act=kill_helper),
}


@asynccontextmanager
async def witness(vm: VirtualMachine) -> AsyncIterator[None]:
    """A VM beside the faults, ready before and after them, that nothing happened to."""
    async with vm:
        with vm.events() as events:
            await vm.start()
            await reach(vm, VirtualMachineState.READY)
            yield
            assert vm.state is VirtualMachineState.READY
            assert vm.info.generation == 1
        kinds = [event.kind async for event in events]
        assert "died" not in kinds
        assert "gap" not in kinds


async def reach(vm: VirtualMachine, state: VirtualMachineState) -> None:
    """Wait until a VM has a process and a state."""
    with anyio.fail_after(PATIENCE):
        while vm.info.pid is None or vm.state is not state:
            await anyio.sleep(0.005)


async def outcome(vm: VirtualMachine, fault: Fault, state: str) -> str:
    """Bring a VM to a state, let the fault happen, and say what came of it."""

    running = anyio.Event()

    async def start() -> None:
        with suppress(VmactorError):  # some faults come before it is known to run
            await vm.start()
            running.set()

    async with vm, anyio.create_task_group() as group:
        with vm.events() as events:
            group.start_soon(start)
            if fault.act is not None:
                await reach(vm, STATES[state][1])
                if state != "starting":
                    await running.wait()
                    if fault.mood:
                        assert await agent(vm, fault.mood) == "ok"
                if state == "suspended":
                    await vm.suspend()
                await fault.act(vm)
            with anyio.fail_after(PATIENCE):
                told = [event async for event in events]
    deaths = [event for event in told if isinstance(event, Died)]
    assert len(deaths) == 1
    assert told[-1] is deaths[0]
    assert vm.state is VirtualMachineState.DEAD
    assert not Path(vm.info.directory).exists()
    died = deaths[0]
    asked = fault.act not in {None, kill, freeze_and_stop, kill_helper}
    rung = f" {died.stopped_by.name}" if asked and died.stopped_by is not None else ""
    return f"{died.reason.name}{rung}"


Cells = dict[tuple[str, str], str]
"""Outcomes by fault and state."""


async def run_cells(expected: Cells, make: Callable[[str, Fault], Awaitable[VirtualMachine]]) -> None:
    """Try some cells of a table at once."""
    found: Cells = {}

    async def cell(name: str, state: str) -> None:
        fault = FAULTS[name]
        found[name, state] = await outcome(await make(state, fault), fault, state)

    async with witness(await make("ready", Fault())), anyio.create_task_group() as cells:
        for name, state in expected:
            cells.start_soon(cell, name, state)
    assert found == expected


def steps(state: str, fault: Fault, last: str) -> list[str]:
    """A guest's script for a cell."""
    return [word for word in (fault.before, STATES[state][0], fault.after, last) if word]


def test_the_tables_have_every_fault_once() -> None:
    assert SIMULATED.keys() | REAL.keys() == FAULTS.keys()
    assert all(cells.keys() <= STATES.keys() for cells in (*SIMULATED.values(), *REAL.values()))


@pytest.mark.parametrize("name", SIMULATED)
async def test_what_comes_of_a_fault_of_a_simulated_vmm(short_dir: Path, name: str) -> None:
    (short_dir / "kernel").touch()
    with (short_dir / "kernel").open("rb") as kernel:
        async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as service:

            async def make(state: str, fault: Fault) -> VirtualMachine:
                params = script(*steps(state, fault, "serve;hang"))
                config = RawConfig(name=state, kernel=kernel, params=params)
                watched = fault.hangup is not None
                return await service.create_vm(config, hangup_detection=watched, hangup_timeout=fault.hangup)

            await run_cells({(name, state): cell for state, cell in SIMULATED[name].items()}, make)
        assert list((short_dir / "state" / "vm").iterdir()) == []


@pytest.mark.guest
async def test_what_comes_of_faults_under_real_guests(short_dir: Path, guest_dir: Path) -> None:
    async with VirtualizationService(vmm="qemu", state_directory=short_dir / "state") as service:

        async def make(state: str, fault: Fault) -> VirtualMachine:
            return await create(service, guest_dir, ";".join(steps(state, fault, "hang")))

        await run_cells(
            {(name, state): cell for name, cells in REAL.items() for state, cell in cells.items()}, make
        )
    assert list((short_dir / "state" / "vm").iterdir()) == []
