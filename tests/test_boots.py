"""How many boot at a time, and in which order: the queue alone, and VMs that wait in it."""

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from tests.scripted_vmm import ScriptedDriver, ScriptedHelper
from tests.test_service import left_in, service_in
from vmactor.actors import monitor
from vmactor.actors.admission import AdmissionPolicy
from vmactor.actors.boots import BootQueue
from vmactor.actors.handle import VirtualMachine
from vmactor.config import RawConfig
from vmactor.errors import DeadlineExceededError, IllegalStateError, StartFailedError, VmmError
from vmactor.messages import DeathReason, VirtualMachineState
from vmactor.process import ExitStatus
from vmactor.vmm.driver import VmmExit

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


# -- The queue -------------------------------------------------------------------------------------


async def test_turns_come_in_the_order_of_asking_and_nobody_is_overtaken() -> None:
    queue, order = BootQueue(2), list[int]()

    async def boot(number: int) -> None:
        await queue.take()
        order.append(number)

    assert queue.take_nowait()
    assert queue.take_nowait()
    async with anyio.create_task_group() as tg:
        for number in range(5):
            tg.start_soon(boot, number)
            await checkpoint()
            while queue.waiting <= number:
                await checkpoint()
        for number in range(5):
            queue.give_back()
            assert not queue.take_nowait()  # it is the first one's already
            while len(order) <= number:
                await checkpoint()
    assert order == [0, 1, 2, 3, 4]


async def test_who_stops_waiting_leaves_no_gap_in_the_queue() -> None:
    queue, had = BootQueue(1), list[str]()

    async def boot(name: str, scope: anyio.CancelScope) -> None:
        with scope:
            await queue.take()
            had.append(name)

    scopes = {name: anyio.CancelScope() for name in "abc"}
    assert queue.take_nowait()
    async with anyio.create_task_group() as tg:
        for name, scope in scopes.items():
            tg.start_soon(boot, name, scope)
            await anyio.wait_all_tasks_blocked()
        scopes["b"].cancel()
        await anyio.wait_all_tasks_blocked()
        assert queue.waiting == 2
        queue.give_back()
        scopes["a"].cancel()  # its turn has come in the same moment
        await anyio.wait_all_tasks_blocked()
        if "a" in had:
            queue.give_back()
        await anyio.wait_all_tasks_blocked()
    assert had[-1] == "c"
    queue.give_back()
    assert queue.take_nowait()
    assert not queue.take_nowait()


# -- VMs -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RawConfig]:
    """Something that could be run."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        yield RawConfig(name="test", kernel=kernel, platform_version="~1.0")


ONE = AdmissionPolicy(checked=False, concurrent_boots=1)


async def test_starts_wait_their_turn_visibly_and_their_clocks_begin_with_it(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver, admission=ONE) as service:
        vms = [await service.create_vm(config, hangup_detection=True, hangup_timeout=5.0) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            for vm in vms:
                tg.start_soon(vm.start)
                await anyio.wait_all_tasks_blocked()
            assert len(driver.vmms) == 1
            assert [vm.info.queued for vm in vms] == [False, True, True]
            assert {vm.state for vm in vms} == {VirtualMachineState.STARTING}
            queued = [
                child.details["queued"] for child in service.tree().children if "queued" in child.details
            ]
            assert queued == [False, True, True]
            await anyio.sleep(4.0)
            assert not vms[1].info.died
            for number in range(3):
                assert len(driver.vmms) == number + 1
                driver.vmm.running.set()
                await anyio.wait_all_tasks_blocked()
        await anyio.sleep(2.0)  # 6 s after its start was asked for, 2 s after its boot began
        assert vms[0].info.died is not None
        assert vms[0].info.died.reason is DeathReason.HANGUP
        assert [vm.state for vm in vms[1:]] == [VirtualMachineState.STARTING] * 2
        await anyio.sleep(3.5)
        assert [vm.info.died and vm.info.died.reason for vm in vms] == [DeathReason.HANGUP] * 3
    assert left_in(short_dir) == []


async def test_a_stop_reaches_a_vm_that_waits_for_its_turn_at_once(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver, admission=ONE) as service:
        first, second, third = [await service.create_vm(config) for _ in range(3)]
        async with anyio.create_task_group() as tg:
            tg.start_soon(first.start)
            await anyio.wait_all_tasks_blocked()
            refused = anyio.Event()

            async def start(vm: VirtualMachine) -> None:
                with pytest.raises(IllegalStateError, match="stopped before"):
                    await vm.start()
                refused.set()

            tg.start_soon(start, second)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(DeadlineExceededError):
                await third.start(timeout=1.0)
            assert third.info.queued
            before = anyio.current_time()
            await second.stop()
            await refused.wait()
            assert anyio.current_time() == before
            assert second.info.died is not None
            assert second.info.died.reason is DeathReason.KILLED
            driver.vmm.running.set()
        await anyio.wait_all_tasks_blocked()
        assert len(driver.vmms) == 2  # the third is next, and nobody's turn is lost
        assert not third.info.queued


@pytest.mark.parametrize("how", ["refused", "dead", "cannot be spawned"])
async def test_a_start_that_fails_gives_its_turn_back(short_dir: Path, config: RawConfig, how: str) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver, admission=ONE) as service:
        first, second = [await service.create_vm(config) for _ in range(2)]
        if how == "refused":
            driver.run_error = VmmError("no")
        elif how == "cannot be spawned":
            driver.spawn_error = StartFailedError("no")
        async with anyio.create_task_group() as tg:

            async def end() -> None:
                await driver.spawned.wait()
                driver.vmm.end(VmmExit(ExitStatus(1, None), DeathReason.START_FAILED))

            if how == "dead":
                tg.start_soon(end)
            with pytest.raises(StartFailedError):
                await first.start()
        driver.run_error = driver.spawn_error = None
        driver.spawned = anyio.Event()
        async with anyio.create_task_group() as tg:
            tg.start_soon(second.start)
            await driver.spawned.wait()
            driver.vmm.running.set()
        assert not second.info.queued


async def test_a_guest_boots_until_it_reports_or_its_time_is_over(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()
    driver.boot_seconds = 3.0
    async with service_in(short_dir, driver, admission=ONE) as service:
        first, second = [await service.create_vm(config) for _ in range(2)]
        async with anyio.create_task_group() as tg:
            tg.start_soon(first.start)
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(second.start)
            driver.vmm.running.set()
            await anyio.sleep(2.5)
            assert second.info.queued
            await anyio.sleep(1.0)
            assert not second.info.queued
            driver.vmm.running.set()
            await anyio.wait_all_tasks_blocked()
        third = await service.create_vm(config)
        async with anyio.create_task_group() as tg:
            tg.start_soon(third.start)
            await anyio.wait_all_tasks_blocked()
            assert third.info.queued
            second_run = service._actors[second.cid].run_under_way
            assert second_run is not None
            second_run.guest_reported()
            await anyio.wait_all_tasks_blocked()
            assert not third.info.queued
            driver.vmm.running.set()
