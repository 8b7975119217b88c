"""Whole lives over the simulated VMM: real processes, the real guest RPC, every way to end."""

import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import anyio
import pytest

from tests.host_facts import absent, facts
from tests.simulated_peer import script
from vmactor import RawConfig, StopLadder, StopRung, VirtualizationService
from vmactor.actors.handle import VirtualMachine
from vmactor.bus import Subscription
from vmactor.errors import (
    StartFailedError,
    UnsupportedOperationError,
    VmactorError,
    VmmError,
)
from vmactor.host import SIMULATED_SOURCE, probe
from vmactor.messages import DeathReason, Died, Event, PayloadError, PayloadReady, VirtualMachineState
from vmactor.process import UNKNOWN, ExitStatus
from vmactor.vmm import crosvm_vmm, qemu_vmm
from vmactor.vmm.qemu_vmm import Witness
from vmactor.vmm.select import select
from vmactor.vmm.simulated import SimulatedDriver

pytestmark = pytest.mark.anyio


@pytest.fixture
def kernel(short_dir: Path) -> Iterator[BinaryIO]:
    """Any file will do."""
    with (short_dir / "kernel").open("w+b") as file:
        yield file


def service(short_dir: Path) -> VirtualizationService:
    return VirtualizationService(vmm="simulated", state_directory=short_dir / "state")


async def life(short_dir: Path, kernel: BinaryIO, *steps: str, hangup: float | None = None) -> list[Event]:
    """The events of one VM that is left alone."""
    async with service(short_dir) as manager:
        with manager.subscribe() as events:
            vm = await manager.create_vm(
                RawConfig(name="sim", kernel=kernel, params=script(*steps)),
                hangup_detection=hangup is not None,
                hangup_timeout=hangup,
            )
            async with vm:
                try:
                    await vm.start()
                except VmactorError:  # it was over before it was known to run
                    assert not {"started", "ready"} & set(steps)
                return await to_the_end(events)


async def to_the_end(events: Subscription[Event]) -> list[Event]:
    seen: list[Event] = []
    with anyio.fail_after(30):
        async for event in events:
            seen.append(event)
            if isinstance(event, Died):
                break
    return seen


# -- Choosing it -----------------------------------------------------------------------------------


def test_it_is_never_chosen_unless_asked_for() -> None:
    nothing = facts(qemu=absent("qemu"), crosvm=replace(facts().crosvm, usable=False))
    with pytest.raises(UnsupportedOperationError, match="QEMU cannot be used"):
        select("auto", nothing)
    selection = select("simulated", nothing)
    assert (selection.driver.name, selection.vsock) == ("simulated", "direct")
    assert any("load and fault tests only" in reason for reason in selection.reasons)


def test_where_it_is_not_built_the_error_says_what_to_install() -> None:
    with pytest.raises(UnsupportedOperationError, match="install simulated"):
        select("simulated", facts(simulated=absent("simulated")))
    assert SIMULATED_SOURCE.is_file()  # the advice names it, also where vmactor was installed by pip


def test_what_crosvm_refuses_everywhere_is_refused_here(kernel: BinaryIO) -> None:
    driver = SimulatedDriver(probe())
    for config in (
        RawConfig(name="a", kernel=kernel, task_profiles=["high"]),
        RawConfig(name="a", kernel=kernel, params="ä"),
    ):
        with pytest.raises(UnsupportedOperationError):
            driver.validate(config)


# -- Why a VM died ---------------------------------------------------------------------------------

ROWS = {
    "poweroff": (DeathReason.SHUTDOWN, 0, None),
    "exit 0": (DeathReason.SHUTDOWN, 0, None),
    "reboot": (DeathReason.REBOOT, 32, None),
    "crash": (DeathReason.CRASH, 33, None),
    "panic": (DeathReason.CRASH, 34, None),
    "exit 35": (DeathReason.START_FAILED, 35, None),
    "watchdog": (DeathReason.WATCHDOG_REBOOT, 36, None),
    "exit 1": (DeathReason.START_FAILED, 1, None),
    "exit 77": (DeathReason.UNKNOWN, 77, None),
    "signal 9": (DeathReason.KILLED, None, 9),
    "signal 15": (DeathReason.KILLED, None, 15),
    "signal 6": (DeathReason.KILLED, None, 6),
    "failure HANGUP;panic": (DeathReason.HANGUP, 34, None),
    "failure MICRODROID_PAYLOAD_HAS_CHANGED|why;poweroff": (
        DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED,
        0,
        None,
    ),
    "failure BOOTLOADER_PUBLIC_KEY_MISMATCH;signal 9": (DeathReason.BOOTLOADER_PUBLIC_KEY_MISMATCH, None, 9),
    "failure no such reason;reboot": (DeathReason.REBOOT, 32, None),
}
"""The table of all VMMs by crosvm's statuses: what the VMM did, the reason, its exit code and signal."""


@pytest.mark.parametrize("steps", ROWS)
@pytest.mark.parametrize("when", ["at once", "when ready"])
async def test_why_a_vm_died_is_told_by_the_same_table(
    short_dir: Path, kernel: BinaryIO, steps: str, when: str
) -> None:
    before = () if when == "at once" else ("started", "ready")
    events = await life(short_dir, kernel, *before, *steps.split(";"))
    died = events[-1]
    assert isinstance(died, Died)
    assert (died.reason, died.exit_code, died.signal) == ROWS[steps]
    assert {event.driver for event in events} == {"simulated"}
    if before:
        assert any(isinstance(event, PayloadReady) for event in events)


async def test_a_vm_that_never_reports_hangs_up(short_dir: Path, kernel: BinaryIO) -> None:
    died = (await life(short_dir, kernel, "ignore 15", "hang", hangup=0.2))[-1]
    assert isinstance(died, Died)
    assert (died.reason, died.signal) == (DeathReason.HANGUP, signal.SIGKILL)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        *((code, reason) for reason, code, _ in ROWS.values() if code is not None),
        (2, DeathReason.UNKNOWN),
    ],
)
def test_the_crosvm_column_of_the_table(code: int, reason: DeathReason) -> None:
    if reason not in {DeathReason.HANGUP, DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED}:
        assert crosvm_vmm.death_reason(ExitStatus(code, None)) is reason


@pytest.mark.parametrize(
    ("witness", "status", "running", "reason"),
    [
        (Witness("guest-shutdown"), ExitStatus(0, None), True, DeathReason.SHUTDOWN),
        (Witness("guest-reset"), ExitStatus(0, None), True, DeathReason.REBOOT),
        (Witness("guest-panic"), ExitStatus(0, None), True, DeathReason.CRASH),
        (Witness("guest-shutdown", panicked=True), ExitStatus(0, None), True, DeathReason.CRASH),
        (Witness("guest-reset", watchdog=True), ExitStatus(0, None), True, DeathReason.WATCHDOG_REBOOT),
        (Witness(), ExitStatus(1, None), False, DeathReason.START_FAILED),
        (Witness(), ExitStatus(1, None), True, DeathReason.UNKNOWN),
        (Witness("guest-shutdown"), ExitStatus(None, 9), True, DeathReason.KILLED),
        (Witness(), UNKNOWN, True, DeathReason.INFRASTRUCTURE_ERROR),
    ],
)
def test_the_qemu_column_of_the_table(
    witness: Witness, status: ExitStatus, running: bool, reason: DeathReason
) -> None:
    assert qemu_vmm.death_reason(status, witness, running=running) is reason


# -- Lives -----------------------------------------------------------------------------------------


async def test_a_life_from_ready_to_stopped_leaves_nothing(short_dir: Path, kernel: BinaryIO) -> None:
    async with service(short_dir) as manager:
        vm = await manager.create_vm(RawConfig(name="sim", kernel=kernel))
        with manager.subscribe() as events:
            async with vm:
                await vm.start()
                with anyio.fail_after(10):
                    async for event in events:
                        if isinstance(event, PayloadReady):
                            break
                assert vm.info.driver == "simulated"
                assert vm.state is VirtualMachineState.READY
                stream = await vm.connect_vsock(5000)
                async with stream:
                    await stream.send(b"echo hello\n")
                    assert await stream.receive() == b"ok hello\n"
                await vm.suspend()
                await vm.resume()
                await vm.stop()
            assert not Path(vm.info.directory).exists()


async def test_a_guests_error_is_told(short_dir: Path, kernel: BinaryIO) -> None:
    events = await life(short_dir, kernel, "started", "error 3 no such task", "poweroff")
    (error,) = [event for event in events if isinstance(event, PayloadError)]
    assert (int(error.error_code), error.message) == (3, "no such task")


async def test_only_the_vmm_itself_is_taken_for_its_guest(short_dir: Path, kernel: BinaryIO) -> None:
    async with service(short_dir) as manager:
        vm = await manager.create_vm(RawConfig(name="sim", kernel=kernel, params=script("hang")))
        async with vm:
            await vm.start()
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(f"{vm.info.directory}/vsock_{vm.cid}")
                await anyio.wait_readable(stranger)
                assert stranger.recv(100) == b""
            await vm.stop()


@pytest.mark.parametrize(
    ("mood", "error", "says"),
    [
        ("refuse 5", VmmError, "Input/output error"),
        ("garble", VmmError, "answer"),
        ("close", VmmError, "closed"),
    ],
)
async def test_a_control_socket_that_misbehaves_from_the_beginning_fails_the_start(
    short_dir: Path, kernel: BinaryIO, mood: str, error: type[VmactorError], says: str
) -> None:
    async with service(short_dir) as manager:
        vm = await manager.create_vm(
            RawConfig(name="sim", kernel=kernel, params=script(f"control {mood}", "hang"))
        )
        async with vm:
            with pytest.raises(StartFailedError, match=says):
                await vm.start()


async def test_a_slow_control_socket_is_waited_for(short_dir: Path, kernel: BinaryIO) -> None:
    async with service(short_dir) as manager:
        config = RawConfig(name="sim", kernel=kernel, params=script("control slow 100", "hang"))
        async with await manager.create_vm(config) as vm:
            await vm.start()
            await vm.suspend()
            await vm.resume()
            await vm.stop()


async def test_hundreds_live_at_once_and_leave_nothing(short_dir: Path, kernel: BinaryIO) -> None:
    endings = ["poweroff", "panic", "signal 9", "error 1 failed;exit 33", "hang"]
    count = 200
    async with service(short_dir) as manager, AsyncExitStack() as stack:
        ready = anyio.Event()
        died: dict[int, Died] = {}
        with manager.subscribe(capacity=count * 8) as events:
            vms: list[VirtualMachine] = []
            async with anyio.create_task_group() as tasks:
                for index in range(count):
                    ending = endings[index % len(endings)]
                    params = script("started", "ready", "sleep 300", ending)
                    config = RawConfig(name=f"sim-{index}", kernel=kernel, params=params)
                    vm = await stack.enter_async_context(await manager.create_vm(config))
                    vms.append(vm)
                    tasks.start_soon(vm.start)
            with anyio.fail_after(60):
                hanging = {vm.cid for vm in vms[4::5]}
                async for event in events:
                    if isinstance(event, Died):
                        died[event.cid] = event
                    if len(died) == count - len(hanging) and not ready.is_set():
                        ready.set()
                        async with anyio.create_task_group() as tasks:
                            for vm in vms[4::5]:
                                tasks.start_soon(vm.stop)
                    if len(died) == count:
                        break
        reasons = [died[vm.cid].reason for vm in vms[:5]]
        assert reasons == [
            DeathReason.SHUTDOWN,
            DeathReason.CRASH,
            DeathReason.KILLED,
            DeathReason.CRASH,
            DeathReason.KILLED,
        ]
        assert manager.list_vms() == []


# -- Stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "rung", "reason", "code"),
    [
        (["started", "ready", "serve"], StopRung.POWER_BUTTON, DeathReason.SHUTDOWN, 0),
        (["deaf", "started", "ready", "serve"], StopRung.EXIT_REQUEST, DeathReason.KILLED, 0),
        (["started", "ready", "control silent", "hang"], StopRung.KILL, DeathReason.KILLED, None),
        (["started", "ready", "control refuse 95", "hang"], StopRung.KILL, DeathReason.KILLED, None),
    ],
)
async def test_many_vms_are_shut_down_at_once_each_by_what_works(
    short_dir: Path,
    kernel: BinaryIO,
    steps: list[str],
    rung: StopRung,
    reason: DeathReason,
    code: int | None,
) -> None:
    async with service(short_dir) as manager:
        vms = []
        with manager.subscribe(kinds=[PayloadReady]) as ready, anyio.fail_after(60):
            for _ in range(3):
                vm = await manager.create_vm(RawConfig(name="sim", kernel=kernel, params=script(*steps)))
                await vm.start()
                await anext(ready)
                if steps[2].startswith("control"):
                    await moody(vm)
                vms.append(vm)
        ends = await manager.shutdown_vms(StopLadder(power_button=0.5, exit_request=0.5))
        assert ends == {vm.cid: rung for vm in vms}
        for vm in vms:
            died = await vm.wait()
            assert died is not None
            assert (died.reason, died.stopped_by, died.exit_code) == (reason, rung, code)


async def moody(vm: VirtualMachine) -> None:
    """Return when the control socket misbehaves, which is the step after the report."""
    with anyio.fail_after(30), anyio.CancelScope() as soon:
        while True:
            try:
                await vm.resume(timeout=0.1)
            except VmactorError:
                soon.cancel()
