"""The VM actor on virtual time, with a VMM that the test owns: order, deadlines, failures, residue."""

import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.scripted_vmm import Bench, ScriptedHelper
from vmactor.actors import monitor
from vmactor.actors.handle import VirtualMachine
from vmactor.actors.monitor import Sinks
from vmactor.actors.vocabulary import GuestReported
from vmactor.errors import (
    DeadlineExceededError,
    IllegalArgumentError,
    IllegalStateError,
    InvalidPayloadTransitionError,
    ResourceExhaustedError,
    StartFailedError,
    VmmError,
)
from vmactor.messages import (
    BalloonStats,
    DeathReason,
    Died,
    GuestReport,
    MemoryTrimLevel,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
    PayloadStarted,
    VirtualMachineState,
)
from vmactor.process import ExitStatus
from vmactor.supervisor import Decision, Supervisor
from vmactor.vmm.driver import VmmExit
from vmactor.vsock import VsockStream

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

SHUTDOWN = VmmExit(ExitStatus(0, None), DeathReason.SHUTDOWN)


@asynccontextmanager
async def living(bench: Bench) -> AsyncIterator[VirtualMachine]:
    """The bench's actor under a supervisor, and a handle on it."""
    async with Supervisor("test") as supervisor:
        await supervisor.start("vm", bench.actor.run, ask_to_stop=bench.actor.release)
        yield VirtualMachine(bench.actor, bench.bus)


async def run(bench: Bench, vm: VirtualMachine) -> None:
    """Start the VM and let its VMM run."""
    async with anyio.create_task_group() as tg:
        tg.start_soon(vm.start)
        await bench.driver.spawned.wait()
        bench.driver.vmm.running.set()


async def report(bench: Bench, report: GuestReport, generation: int = 1) -> None:
    """What the guest's RPC server does with a call."""
    await bench.actor.mailbox.ask(GuestReported(generation, report), timeout=5)


async def test_a_whole_life_in_its_order(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        assert vm.state is VirtualMachineState.NOT_STARTED
        await run(bench, vm)
        assert vm.state is VirtualMachineState.STARTING
        await report(bench, NotifyPayloadStarted())
        assert vm.state is VirtualMachineState.STARTED
        await report(bench, NotifyPayloadReady())
        assert vm.state is VirtualMachineState.READY
        await report(bench, NotifyPayloadFinished(0))
        assert vm.state is VirtualMachineState.FINISHED
        bench.driver.vmm.end(SHUTDOWN)
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.SHUTDOWN
        assert vm.state is VirtualMachineState.DEAD
    events = bench.seen()
    assert [e.kind for e in events] == [
        "created", "started", "payload_started", "payload_ready", "payload_finished", "died",
    ]  # fmt: skip
    assert [e.seq for e in events] == [1, 2, 3, 4, 5, 6]
    assert [e.generation for e in events] == [0, 1, 1, 1, 1, 1]
    assert {(e.cid, e.name, e.driver) for e in events} == {(2048, "test", "scripted")}


async def test_files_are_gone_before_died_and_the_cid_is_given_back_last(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.end(SHUTDOWN)
        async for event in vm.events():
            if isinstance(event, Died):
                assert "clear" in bench.log
                assert not (short_dir / "vsock_2048").exists()
        await vm.wait()
    assert bench.log[-2:] == ["clear", "give back"]
    assert bench.driver.vmm.closed


async def test_elapsed_is_measured_from_the_start(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await anyio.sleep(100)
        await run(bench, vm)
        await anyio.sleep(7)
        await report(bench, NotifyPayloadStarted())
        await anyio.sleep(5)
        bench.driver.vmm.end(SHUTDOWN)
        died = await vm.wait()
    assert died is not None
    assert died.elapsed == pytest.approx(12)
    (started,) = [e for e in bench.seen() if isinstance(e, PayloadStarted)]
    assert started.elapsed == pytest.approx(7)


async def test_a_start_that_fails_to_spawn_tells_why_and_the_vm_is_dead(short_dir: Path) -> None:
    bench = Bench(short_dir)
    bench.driver.spawn_error = ResourceExhaustedError("no processes left: raise 'ulimit -u'")
    async with living(bench) as vm:
        with pytest.raises(StartFailedError, match="ulimit -u"):
            await vm.start()
        assert vm.state is VirtualMachineState.DEAD
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.START_FAILED
        with pytest.raises(IllegalStateError, match="already started or failed"):
            await vm.start()
    assert bench.kinds() == ["created", "died"]


async def test_a_vmm_that_ends_before_it_runs_is_a_failed_start_with_its_last_words(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as tg:

        async def refused() -> None:
            with pytest.raises(StartFailedError, match="no such machine"):
                await vm.start()

        tg.start_soon(refused)
        await bench.driver.spawned.wait()
        bench.driver.vmm.write("stderr", b"vmm: no such machine\n")
        bench.driver.vmm.end(VmmExit(ExitStatus(1, None), DeathReason.START_FAILED))
        died = await vm.wait()
        assert died is not None
        assert (died.reason, died.exit_code) == (DeathReason.START_FAILED, 1)


async def test_a_start_may_give_up_waiting_and_the_vm_goes_on_starting(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        with pytest.raises(DeadlineExceededError, match="Start"):
            await vm.start(timeout=60)
        bench.driver.vmm.running.set()
        await anyio.wait_all_tasks_blocked()
        assert vm.info.pid == bench.driver.vmm.pid
        await vm.stop()
    assert bench.kinds() == ["created", "started", "died"]


async def test_stop_before_the_start_changes_nothing(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await vm.stop()
        assert vm.state is VirtualMachineState.NOT_STARTED
        await run(bench, vm)
        await vm.stop()
        await vm.stop()
        assert vm.state is VirtualMachineState.DEAD
    assert bench.kinds() == ["created", "started", "died"]


async def test_stop_while_the_vmm_is_being_spawned_gives_the_spawn_up(short_dir: Path) -> None:
    bench = Bench(short_dir)
    bench.driver.may_spawn = anyio.Event()
    async with living(bench) as vm, anyio.create_task_group() as tg:

        async def refused() -> None:
            with pytest.raises(IllegalStateError, match="stopped before"):
                await vm.start()

        tg.start_soon(refused)
        await anyio.wait_all_tasks_blocked()
        await vm.stop()
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.KILLED
    assert bench.driver.vmms == []


async def test_a_stop_is_never_taken_before_the_start_that_came_first(short_dir: Path) -> None:
    bench = Bench(short_dir)
    vm = VirtualMachine(bench.actor, bench.bus)
    async with Supervisor("test") as supervisor, anyio.create_task_group() as tg:

        async def refused() -> None:
            with pytest.raises(IllegalStateError, match="stopped before"):
                await vm.start()

        tg.start_soon(refused)  # both have to wait: the actor has not begun
        await anyio.wait_all_tasks_blocked()
        tg.start_soon(vm.stop)
        await anyio.wait_all_tasks_blocked()
        await supervisor.start("vm", bench.actor.run, ask_to_stop=bench.actor.release)
    assert bench.kinds() == ["created", "died"]


async def test_concurrent_stops_all_return_after_died(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)

        async def stop() -> None:
            await vm.stop()
            assert bench.actor.info.died is not None

        async with anyio.create_task_group() as tg:
            for _ in range(10):
                tg.start_soon(stop)
    assert bench.kinds().count("died") == 1


async def test_a_vmm_that_will_not_die_costs_the_stopper_its_deadline_only(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.stuck = True
        with pytest.raises(DeadlineExceededError):
            await vm.stop(timeout=3)
        assert vm.state is VirtualMachineState.STARTING
        bench.driver.vmm.stuck = False
        await vm.stop()


async def test_stop_does_not_wait_behind_a_hung_vmm(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as tg:
        await run(bench, vm)
        bench.driver.vmm.answers = anyio.Event()  # from now on it never answers

        async def refused() -> None:
            with pytest.raises(IllegalStateError):
                await vm.suspend(timeout=1000)

        for _ in range(5):
            tg.start_soon(refused)
        await anyio.wait_all_tasks_blocked()
        before = anyio.current_time()
        await vm.stop()
        assert anyio.current_time() - before < 1


async def test_state_and_info_never_wait(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as tg:
        await run(bench, vm)
        bench.driver.vmm.answers = anyio.Event()
        tg.start_soon(_ignoring(VmmError, IllegalStateError), vm.suspend)
        await anyio.wait_all_tasks_blocked()
        assert vm.state is VirtualMachineState.STARTING
        assert vm.info.pid == bench.driver.vmm.pid
        await vm.stop()


def _ignoring(*errors: type[BaseException]) -> Any:
    async def call(what: Any) -> None:
        with suppress(*errors):
            await what()

    return call


@pytest.mark.parametrize("timeout", [30.0, 300.0])
async def test_a_payload_that_never_reports_hangs_up_on_time(short_dir: Path, timeout: float) -> None:
    bench = Bench(short_dir, hangup_timeout=timeout)
    async with living(bench) as vm:
        before = anyio.current_time()
        await run(bench, vm)
        died = await vm.wait()
        assert anyio.current_time() - before == pytest.approx(timeout)
        assert died is not None
        assert (died.reason, died.signal) == (DeathReason.HANGUP, 9)
    assert bench.kinds() == ["created", "started", "hung_up", "died"]


async def test_a_payload_that_reported_in_time_lives_on(short_dir: Path) -> None:
    bench = Bench(short_dir, hangup_timeout=30)
    async with living(bench) as vm:
        await run(bench, vm)
        await anyio.sleep(29)
        await report(bench, NotifyPayloadStarted())
        await anyio.sleep(1000)
        assert vm.state is VirtualMachineState.STARTED
        await vm.stop()


async def test_a_vm_without_hang_up_detection_waits_for_ever(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        await anyio.sleep(100_000)
        assert vm.state is VirtualMachineState.STARTING
        await vm.stop()


async def test_a_suspended_vm_does_not_hang_up_until_it_had_its_time(short_dir: Path) -> None:
    bench = Bench(short_dir, hangup_timeout=30)
    async with living(bench) as vm:
        await run(bench, vm)
        await vm.suspend()
        await anyio.sleep(200)
        assert vm.state is VirtualMachineState.STARTING
        assert vm.info.suspended
        await vm.resume()
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.HANGUP


async def test_a_vm_that_is_resumed_has_its_whole_time_to_report(short_dir: Path) -> None:
    bench = Bench(short_dir, hangup_timeout=30)
    async with living(bench) as vm:
        await run(bench, vm)
        await anyio.sleep(10)
        await vm.suspend()
        await anyio.sleep(49)
        await vm.resume()
        await anyio.sleep(29)
        assert vm.state is VirtualMachineState.STARTING
        await report(bench, NotifyPayloadStarted())
        await vm.suspend()
        await vm.resume()
        await anyio.sleep(100)
        assert vm.state is VirtualMachineState.STARTED
        await vm.stop()


async def test_the_failure_text_decides_the_reason(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.write("failure", b"MICRODROID_PAYLOAD_HAS_CHANGED|apk")
        bench.driver.vmm.end(SHUTDOWN)
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED
        assert died.failure == "MICRODROID_PAYLOAD_HAS_CHANGED|apk"
        assert died.exit_code == 0


async def test_the_failure_text_is_cut_at_its_end_since_its_beginning_names_the_reason(
    short_dir: Path,
) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.write("failure", b"MICRODROID_PAYLOAD_HAS_CHANGED|" + b"x" * 10000)
        bench.driver.vmm.end(SHUTDOWN)
        died = await vm.wait()
    assert died is not None
    assert died.reason is DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED
    assert len(died.failure) == 4096


async def test_a_vm_that_cannot_be_cleared_away_still_says_how_it_ended(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.close_error = NotADirectoryError("somebody replaced the directory")
        bench.driver.vmm.end(SHUTDOWN)
        died = await vm.wait()
    assert died is not None
    assert (died.reason, died.exit_code) == (DeathReason.SHUTDOWN, 0)


async def test_a_helper_that_was_reaped_has_no_number_any_more(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers: list[ScriptedHelper] = []

    class Helper(ScriptedHelper):
        def __init__(self) -> None:
            super().__init__()
            helpers.append(self)

        async def wait(self) -> ExitStatus:
            await anyio.sleep_forever()
            raise AssertionError

    monkeypatch.setattr(monitor, "VhostDeviceVsock", Helper)
    bench = Bench(short_dir, helper=Path("helper"))
    async with living(bench) as vm:
        await run(bench, vm)
        assert bench.actor.vsock_peer == helpers[0].pid
        helpers[0].status = ExitStatus(1, None)
        assert bench.actor.vsock_peer is None
        helpers[0].ended.set()
        monkeypatch.setattr(Helper, "wait", ScriptedHelper.wait)
        await vm.stop()


async def test_the_console_reaches_the_callers_file_and_the_death_notice(short_dir: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as console:
        bench = Bench(short_dir, sinks=Sinks(console=write))
        async with living(bench) as vm:
            await run(bench, vm)
            bench.driver.vmm.write("console", b"Kernel panic - not syncing\n")
            bench.driver.vmm.end(VmmExit(ExitStatus(34, None), DeathReason.CRASH))
            died = await vm.wait()
            assert died is not None
            assert died.console_tail == "Kernel panic - not syncing\n"
        os.close(write)
        assert console.read() == b"Kernel panic - not syncing\n"


async def test_a_channel_that_somebody_keeps_open_does_not_delay_the_death_notice(
    short_dir: Path,
) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        kept = os.dup(bench.driver.vmm.channels["console"])
        before = anyio.current_time()
        bench.driver.vmm.end(SHUTDOWN)
        assert await vm.wait() is not None
        assert anyio.current_time() - before < 1
        os.close(kept)


async def test_reports_go_forward_only_and_a_refusal_publishes_nothing(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        await report(bench, NotifyPayloadReady())
        with pytest.raises(InvalidPayloadTransitionError, match="from Ready to Started"):
            await report(bench, NotifyPayloadStarted())
        with pytest.raises(IllegalStateError, match="over"):
            await report(bench, NotifyPayloadFinished(0), generation=0)
        await vm.stop()
    assert bench.kinds() == ["created", "started", "payload_ready", "died"]


async def test_suspend_and_resume_are_told_once(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        for change in (vm.suspend, vm.suspend, vm.resume, vm.resume):
            await change()
        await vm.stop()
        with pytest.raises(IllegalStateError, match="not running"):
            await vm.suspend()
    assert bench.kinds() == ["created", "started", "suspended", "resumed", "died"]


async def test_a_vmm_that_refuses_is_heard_and_the_vm_lives_on(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.refusal = VmmError("not now")
        with pytest.raises(VmmError, match="not now"):
            await vm.suspend()
        assert not vm.info.suspended
        assert vm.state is VirtualMachineState.STARTING
        await vm.stop()


TRIMS = [
    (MemoryTrimLevel.TRIM_MEMORY_RUNNING_CRITICAL, 1000, ["balloon_stats", "set_balloon 500"]),
    (MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW, 1001, ["balloon_stats", "set_balloon 300"]),
    (MemoryTrimLevel.TRIM_MEMORY_RUNNING_MODERATE, 999, ["balloon_stats", "set_balloon 99"]),
    (MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW, None, ["balloon_stats"]),
]


@pytest.mark.parametrize(("level", "total", "calls"), TRIMS)
async def test_trimming_takes_the_references_share(
    short_dir: Path, level: MemoryTrimLevel, total: int | None, calls: list[str]
) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.stats = BalloonStats(balloon_actual=0, total_memory=total)
        await vm.on_trim_memory(level)
        assert bench.driver.vmm.calls == calls
        await vm.stop()


async def test_trimming_without_a_balloon_is_a_success_and_a_bad_level_is_not(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)
        with pytest.raises(IllegalArgumentError, match=r"MemoryTrimLevel\(3\)"):
            await vm.on_trim_memory(3)  # type: ignore[arg-type]
        await vm.stop()


async def test_dropping_the_last_reference_kills_the_vm(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        del vm
        gc.collect()
        # The context manager's own frame still holds one; the real drop is below.
        await bench.actor.mailbox.ask(GuestReported(1, NotifyPayloadStarted()), timeout=5)
        handle = VirtualMachine(bench.actor, bench.bus)
        del handle
        gc.collect()
        await bench.actor.ended.wait()
    assert bench.kinds()[-1] == "died"


async def test_dropping_the_last_reference_in_another_thread_kills_the_vm(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        holder = [VirtualMachine(bench.actor, bench.bus)]
        await anyio.to_thread.run_sync(holder.clear)
        await bench.actor.ended.wait()


async def test_a_finalizer_touches_no_mailbox_and_waits_for_nothing(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        holder = [VirtualMachine(bench.actor, bench.bus)]
        holder.clear()  # as the garbage collector may, in the middle of anything
        assert len(bench.actor.mailbox) == 0
        holder.append(VirtualMachine(bench.actor, bench.bus))
        thread = threading.Thread(target=holder.clear)
        thread.start()
        thread.join(10)  # the loop is not there for the thread meanwhile
        assert not thread.is_alive()
        await bench.actor.ended.wait()


async def test_leaving_the_block_kills_the_vm_even_when_cancelled(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        with anyio.CancelScope() as scope:
            async with vm:
                scope.cancel()
        assert vm.state is VirtualMachineState.DEAD
        assert bench.log[-1] == "give back"


async def test_giving_back_a_vm_that_never_ran_is_told_as_removed(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await vm.aclose()
        assert await vm.wait() is None
    assert bench.kinds() == ["created", "removed"]


async def test_a_late_subscriber_to_a_dead_vm_still_learns_of_its_death(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        await vm.stop()
        late = [event.kind async for event in vm.events()]
    assert late == ["died"]


async def test_an_actor_that_is_cancelled_takes_its_vmm_with_it(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with Supervisor("test") as supervisor:
        await supervisor.start("vm", bench.actor.run)  # cannot be asked to stop: it is cancelled
        await run(bench, VirtualMachine(bench.actor, bench.bus))
    assert bench.driver.vmm.closed
    assert bench.kinds() == ["created", "started", "died"]
    assert bench.log[-2:] == ["clear", "give back"]
    assert bench.actor.info.state is VirtualMachineState.DEAD


@pytest.mark.parametrize("fault", [None, OSError("not a directory")])
async def test_an_actor_that_is_stopped_while_it_clears_away_finishes_that(
    short_dir: Path, fault: OSError | None
) -> None:
    bench = Bench(short_dir)
    listener, clearing = bench.actor._context.listener, anyio.Event()
    close = listener.aclose

    async def slowly() -> None:
        await close()
        clearing.set()
        if fault is not None:
            raise fault
        await anyio.sleep(60)

    listener.aclose = slowly  # type: ignore[method-assign]
    async with Supervisor("test", lambda _: Decision.IGNORE) as supervisor:
        await supervisor.start("vm", bench.actor.run)  # cannot be asked to stop: it is cancelled
        vm = VirtualMachine(bench.actor, bench.bus)
        await run(bench, vm)
        bench.driver.vmm.end(SHUTDOWN)
        await clearing.wait()
    with anyio.fail_after(1):
        died = await vm.wait()
    assert died is not None
    assert died.reason is DeathReason.SHUTDOWN
    assert bench.kinds() == ["created", "started", "died"]
    assert bench.log[-2:] == ["clear", "give back"]


async def test_a_vmm_that_survives_its_kill_keeps_its_directory_and_cid(short_dir: Path) -> None:
    bench = Bench(short_dir)
    refused: list[Exception] = []
    async with anyio.create_task_group() as tg:

        async def stop(vm: VirtualMachine) -> None:
            with pytest.raises(DeadlineExceededError, match="process 4242") as caught:
                await vm.stop(timeout=1000)
            refused.append(caught.value)

        async with Supervisor("test") as supervisor:
            await supervisor.start("vm", bench.actor.run)  # cannot be asked to stop: it is cancelled
            vm = VirtualMachine(bench.actor, bench.bus)
            await run(bench, vm)
            bench.driver.vmm.stuck = True
            tg.start_soon(stop, vm)
            await anyio.wait_all_tasks_blocked()
    assert len(refused) == 1
    died = await vm.wait()
    assert died is not None
    assert died.reason is DeathReason.KILLED
    assert "process 4242" in died.detail
    assert "directory" in died.detail
    assert "clear" not in bench.log
    assert bench.log[-2:] == ["record DEAD", "abandon"]
    assert vm.info.pid == 4242
    assert bench.driver.vmm.closed
    with pytest.raises(DeadlineExceededError, match="process 4242"):
        await vm.aclose()


async def test_how_a_vmm_ended_is_not_forgotten_when_the_manager_gives_up_meanwhile(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with Supervisor("test") as supervisor:
        await supervisor.start("vm", bench.actor.run)  # cannot be asked to stop: it is cancelled
        vm = VirtualMachine(bench.actor, bench.bus)
        await run(bench, vm)
        bench.driver.vmm.close_seconds = 100
        bench.driver.vmm.write("console", b"good bye")
        bench.driver.vmm.end(SHUTDOWN)
        await anyio.sleep(1)
        assert vm.state is VirtualMachineState.DEAD
    died = vm.info.died
    assert died is not None
    assert (died.reason, died.exit_code, died.console_tail) == (DeathReason.SHUTDOWN, 0, "good bye")


async def test_a_fault_of_ours_in_a_run_ends_the_vm_and_says_so(short_dir: Path) -> None:
    bench = Bench(short_dir)
    bench.driver.spawn_error = ZeroDivisionError("a bug")
    async with living(bench) as vm:
        with pytest.raises(StartFailedError, match="a bug"):
            await vm.start()
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.INFRASTRUCTURE_ERROR


async def test_a_fault_of_ours_in_another_child_is_not_laid_at_the_vms_door(short_dir: Path) -> None:
    bench = Bench(short_dir)

    async def accept() -> VsockStream:
        await bench.driver.spawned.wait()
        raise ZeroDivisionError("a bug")

    bench.actor._context.listener.accept = accept  # type: ignore[method-assign]
    async with living(bench) as vm:
        with pytest.raises(StartFailedError, match="a bug"):
            await vm.start()
        died = await vm.wait()
    assert died is not None
    assert died.reason is DeathReason.INFRASTRUCTURE_ERROR
    assert "guest-rpc" in died.detail


async def test_a_vmm_that_refuses_to_run_and_lives_on_is_killed(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as tg:

        async def refused() -> None:
            with pytest.raises(StartFailedError, match="not today"):
                await vm.start()

        bench.driver.run_error = VmmError("not today")
        tg.start_soon(refused)
        died = await vm.wait()
    assert died is not None
    assert (died.reason, died.signal) == (DeathReason.START_FAILED, 9)


async def test_the_words_of_a_vmm_are_escaped_in_the_error_and_kept_in_the_event(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm, anyio.create_task_group() as tg:

        async def refused() -> None:
            with pytest.raises(StartFailedError) as caught:
                await vm.start()
            assert str(caught.value) == "\\x1b\\[2Jgone\nsecond line"

        tg.start_soon(refused)
        await bench.driver.spawned.wait()
        bench.driver.vmm.write("stderr", b"\x1b[2Jgone\nsecond line\n")
        bench.driver.vmm.end(VmmExit(ExitStatus(1, None), DeathReason.START_FAILED))
        died = await vm.wait()
    assert died is not None
    assert died.detail == "\x1b[2Jgone\nsecond line"


async def test_those_who_gave_up_stopping_are_forgotten(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        bench.driver.vmm.stuck = True
        for _ in range(500):
            with pytest.raises(DeadlineExceededError):
                await vm.stop(timeout=1)
        assert len(bench.actor._life.stoppers) < 100
        bench.driver.vmm.stuck = False
        await vm.stop()


async def test_the_events_of_a_vm_that_nobody_remembers_end_at_once(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await run(bench, vm)
        await vm.stop()
        bench.bus._ended.clear()  # as after a thousand other deaths
        with anyio.fail_after(1):
            assert [event async for event in vm.events()] == []


async def test_messages_over_vsock_can_be_told_while_the_vm_lives(short_dir: Path) -> None:
    bench = Bench(short_dir)
    async with living(bench) as vm:
        await vm.publish_message("host_to_guest", 1000, "hello")
        await vm.aclose()
        with pytest.raises(IllegalStateError):
            await vm.publish_message("host_to_guest", 1000, "hello?")
    assert bench.kinds() == ["created", "vsock_message", "removed"]
