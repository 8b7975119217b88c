"""Stopping VMs gently, on virtual time: rungs, their clocks, who joins whom, and what is left at the end."""

from pathlib import Path

import anyio
import pytest

from tests.scripted_vmm import Bench, ScriptedVmm
from tests.test_vm_actor import living, report, run
from vmactor.actors.stop_ladder import StopLadder
from vmactor.errors import IllegalArgumentError, IllegalStateError, NotStoppedError, VmmError
from vmactor.messages import DeathReason, Died, NotifyPayloadStarted, Resumed, StopRung, VirtualMachineState
from vmactor.process import ExitStatus
from vmactor.vmm.driver import VmmExit

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

POWERED_OFF = VmmExit(ExitStatus(0, None), DeathReason.SHUTDOWN)
LADDER = StopLadder(power_button=20, exit_request=5, kill=15)


async def ends_when_asked(vmm: ScriptedVmm, request: str, after: float = 0.0) -> None:
    """A guest that heeds its power button, or a VMM that ends when it is told to."""
    while request not in vmm.calls:
        await anyio.sleep(0.1)
    await anyio.sleep(after)
    vmm.end(POWERED_OFF)


@pytest.mark.parametrize(
    ("request_", "rung", "calls"),
    [
        ("request_shutdown", StopRung.POWER_BUTTON, ["request_shutdown"]),
        ("request_exit", StopRung.EXIT_REQUEST, ["request_shutdown", "request_exit"]),
        ("never", StopRung.KILL, ["request_shutdown", "request_exit", "kill"]),
    ],
)
async def test_a_vm_is_stopped_by_the_gentlest_way_that_works(
    short_dir: Path, request_: str, rung: StopRung, calls: list[str]
) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as guest:
        await run(bench, vm)
        guest.start_soon(ends_when_asked, bench.driver.vmm, request_)
        assert await vm.shutdown(LADDER) is rung
        assert bench.driver.vmm.calls[: len(calls)] == calls
        assert vm.state is VirtualMachineState.DEAD
        guest.cancel_scope.cancel()
    (died,) = [event for event in bench.seen() if isinstance(event, Died)]
    assert died.stopped_by is rung
    assert died.as_dict()["stopped_by"] == rung.name


async def test_each_rung_has_its_time_from_when_it_is_asked_for(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        began = anyio.current_time()
        assert await vm.shutdown(LADDER) is StopRung.KILL
        assert anyio.current_time() - began == pytest.approx(25)


async def test_a_refused_rung_gives_way_at_once(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.refusal = VmmError("there is no button")
        began = anyio.current_time()
        assert await vm.shutdown(LADDER) is StopRung.KILL
        assert anyio.current_time() - began < 2


async def test_a_silent_vmm_has_the_time_of_each_rung_and_is_killed(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.answers = anyio.Event()
        began = anyio.current_time()
        assert await vm.shutdown(LADDER) is StopRung.KILL
        assert anyio.current_time() - began == pytest.approx(25)


async def test_running_out_of_the_whole_budget_is_an_error_of_its_own(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        began = anyio.current_time()
        with pytest.raises(NotStoppedError, match=r"POWER_BUTTON had no effect in 20 s.*stop\(\) kills it"):
            await vm.shutdown(StopLadder(kill=None))
        assert anyio.current_time() - began == pytest.approx(25)
        assert vm.state is VirtualMachineState.STARTING
        bench.driver.vmm.stuck = True
        with pytest.raises(NotStoppedError, match="the kill goes on"):
            await vm.shutdown(StopLadder(power_button=1, exit_request=None, kill=5))
        bench.driver.vmm.end(VmmExit(ExitStatus(None, 9), DeathReason.KILLED))
        await vm.stop()
    assert "died" in bench.kinds()


async def test_a_kill_gets_through_while_a_ladder_is_climbed(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as others:
        await run(bench, vm)
        began = anyio.current_time()

        async def climb() -> None:
            assert await vm.shutdown(LADDER) is StopRung.KILL

        others.start_soon(climb)
        await anyio.sleep(3)
        await vm.stop()
        assert anyio.current_time() - began < 4


async def test_of_two_ladders_each_keeps_its_own_clock(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as others:
        await run(bench, vm)
        began = anyio.current_time()
        others.start_soon(vm.shutdown, StopLadder(power_button=1000))
        await anyio.sleep(3)
        assert await vm.shutdown(StopLadder(power_button=2, exit_request=None)) is StopRung.KILL
        assert anyio.current_time() - began < 6


async def test_a_suspended_guest_is_resumed_and_told(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as guest:
        await run(bench, vm)
        await vm.suspend()
        guest.start_soon(ends_when_asked, bench.driver.vmm, "request_shutdown")
        assert await vm.shutdown(LADDER) is StopRung.POWER_BUTTON
    assert bench.driver.vmm.calls[:3] == ["suspend", "resume", "request_shutdown"]
    assert any(isinstance(event, Resumed) for event in bench.seen())


async def test_a_suspension_that_never_comes_to_its_end_does_not_delay_a_shutdown(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as others:
        await run(bench, vm)
        bench.driver.vmm.answers = anyio.Event()

        async def suspend() -> None:
            with pytest.raises(IllegalStateError, match="being stopped"):
                await vm.suspend()

        others.start_soon(suspend)
        await anyio.sleep(1)
        began = anyio.current_time()
        assert await vm.shutdown(LADDER) is StopRung.KILL
        assert anyio.current_time() - began == pytest.approx(25)


async def test_a_vm_that_never_ran_is_left_as_it_is(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        assert await vm.shutdown() is None
        await run(bench, vm)
        bench.driver.vmm.end(POWERED_OFF)
        await vm.wait()
        assert await vm.shutdown() is None


async def test_before_its_vmm_is_up_a_vm_is_killed_at_once(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as others:

        async def start() -> None:
            with pytest.raises(IllegalStateError, match="was stopped before"):
                await vm.start()

        others.start_soon(start)
        await bench.driver.spawned.wait()
        began = anyio.current_time()
        assert await vm.shutdown(StopLadder(kill=None)) is StopRung.KILL
        assert anyio.current_time() == pytest.approx(began)


async def test_a_cancelled_shutdown_goes_no_further(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        with anyio.move_on_after(1):
            await vm.shutdown(LADDER)
        await anyio.sleep(100)
        assert bench.driver.vmm.calls == ["request_shutdown"]
        assert vm.state is VirtualMachineState.STARTING


async def test_a_guest_can_report_while_it_is_shut_down(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as others:
        await run(bench, vm)
        others.start_soon(vm.shutdown, LADDER)
        await anyio.sleep(1)
        await report(bench, NotifyPayloadStarted())
        assert vm.state is VirtualMachineState.STARTED


@pytest.mark.parametrize(
    "times", [{"kill": 0}, {"kill": -1}, {"power_button": None, "exit_request": None, "kill": None}]
)
def test_a_ladder_that_can_never_stop_anything_is_refused(times: dict[str, float | None]) -> None:
    with pytest.raises(IllegalArgumentError):
        StopLadder(**times)
