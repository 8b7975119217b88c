"""VMs that are started again by themselves, through the service, on virtual time, with scripted VMMs."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.host_facts import FULL
from tests.scripted_vmm import ScriptedDriver, ScriptedHelper, ScriptedVmm
from vmactor import Backoff, Restart, RestartLimit, RestartPolicy
from vmactor.actors import monitor
from vmactor.actors.service import VirtualizationService
from vmactor.bus import Subscription
from vmactor.config import RawConfig
from vmactor.errors import StartFailedError, VmmError
from vmactor.messages import (
    DeathReason,
    Died,
    Event,
    PayloadState,
    Restarting,
    RestartsExhausted,
    VirtualMachineState,
)
from vmactor.process import ExitStatus
from vmactor.vmm.driver import Launch, VmmExit
from vmactor.vmm.select import Selection

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

POLICY = RestartPolicy(limit=RestartLimit(2, 60.0), backoff=Backoff(initial=5.0, jitter=0.0, stable=100.0))
CRASH = VmmExit(ExitStatus(1, None), DeathReason.CRASH)
SHUTDOWN = VmmExit(ExitStatus(0, None), DeathReason.SHUTDOWN)


@pytest.fixture(autouse=True)
def _helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RawConfig]:
    """Something that could be run."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        yield RawConfig(name="test", kernel=kernel, platform_version="~1.0")


class RunningDriver(ScriptedDriver):
    """Its VMMs run at once."""

    async def spawn(self, launch: Launch) -> ScriptedVmm:
        vmm = await super().spawn(launch)
        vmm.running.set()
        return vmm


def service_in(directory: Path, driver: ScriptedDriver, **options: Any) -> VirtualizationService:
    """A service whose VMMs are scripted."""
    selection = Selection(driver, "hybrid", ("a test picked it",))
    return VirtualizationService(vmm=selection, state_directory=directory / "state", facts=FULL, **options)


async def until(events: Subscription[Event], kind: str) -> Event:
    """Read up to an event of this kind."""
    async for event in events:
        if event.kind == kind:
            return event
    raise AssertionError(f"no {kind}")


async def test_a_vm_whose_run_failed_runs_again_with_its_handle_cid_and_directory(
    short_dir: Path, config: RawConfig
) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        with vm.events() as events:
            await vm.start()
            before = vm.info
            listener = short_dir / "state" / "vm" / "2048" / "vsock_2048"
            inode = listener.stat().st_ino
            driver.vmm.end(CRASH)
            died = await until(events, "died")
            assert isinstance(died, Died)
            assert (died.generation, died.final) == (1, False)
            restarting = await until(events, "restarting")
            assert isinstance(restarting, Restarting)
            assert (restarting.generation, restarting.delay, restarting.restarts) == (2, 5.0, 1)
            waiting = vm.info
            assert (waiting.state, waiting.generation, waiting.pid) == (VirtualMachineState.STARTING, 2, None)
            assert waiting.restart_due is not None
            began = anyio.current_time()
            started = await until(events, "started")
            assert anyio.current_time() - began == pytest.approx(5.0)
            assert started.generation == 2
            assert (vm.info.restarts, vm.info.restart_due) == (1, None)
            assert (vm.cid, vm.info.directory) == (before.cid, before.directory)
            assert listener.stat().st_ino == inode
            await vm.stop()
            last = await until(events, "died")
            assert isinstance(last, Died)
            assert (last.generation, last.final, last.reason) == (2, True, DeathReason.KILLED)
            with pytest.raises(StopAsyncIteration):
                await anext(events)
        assert len(driver.vmms) == 2
        assert not listener.parent.exists()


async def test_a_vm_that_fails_too_often_is_given_up_and_latecomers_learn_of_its_end(
    short_dir: Path, config: RawConfig
) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        with vm.events() as events:
            await vm.start()
            for _ in range(2):
                driver.vmm.end(CRASH)
                with vm.events() as meanwhile:  # the death of a run is not the VM's end
                    await until(meanwhile, "started")
            driver.vmm.end(CRASH)
            seen = [event async for event in events]
        assert [event.kind for event in seen] == [
            *["started", "died", "restarting"] * 2, "started", "gave_up", "died",
        ]  # fmt: skip
        gave_up = seen[-2]
        assert isinstance(gave_up, RestartsExhausted)
        assert (gave_up.generation, gave_up.failures, gave_up.period) == (3, 3, 60.0)
        assert await vm.wait() == seen[-1]
        with vm.events() as late:
            assert [event async for event in late] == [seen[-1]]
        with service.subscribe(late=True) as ends:
            assert ends.next_nowait() == seen[-1]
            assert ends.next_nowait() is None


async def test_a_stop_during_the_wait_ends_the_vm_at_once(short_dir: Path, config: RawConfig) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        with vm.events() as events:
            await vm.start()
            driver.vmm.end(CRASH)
            await until(events, "restarting")
            began = anyio.current_time()
            await vm.stop()
            assert anyio.current_time() == began
            last = await until(events, "died")
            assert isinstance(last, Died)
            assert (last.generation, last.final, last.elapsed) == (2, True, 0.0)
            assert await vm.wait() == last
        assert service.list_vms() == []
        await anyio.sleep(100)
        assert len(driver.vmms) == 1


async def test_leaving_the_service_during_the_wait_leaves_nothing(short_dir: Path, config: RawConfig) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        await vm.start()
        driver.vmm.end(CRASH)
        with vm.events() as events:
            await until(events, "restarting")
    assert await vm.wait() is not None
    assert not (short_dir / "state" / "vm" / "2048").exists()


async def test_an_end_in_order_is_followed_by_another_run_only_where_that_is_asked_for(
    short_dir: Path, config: RawConfig
) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        await vm.start()
        driver.vmm.end(SHUTDOWN)
        died = await vm.wait()
        assert died is not None
        assert died.final
        policy = RestartPolicy(when=Restart.PERMANENT, backoff=POLICY.backoff)
        vm = await service.create_vm(config, restart=policy)
        await vm.start()
        driver.vmm.end(SHUTDOWN)
        with vm.events() as events:
            await until(events, "started")


async def test_a_first_start_that_fails_is_the_callers_affair(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()
    driver.run_error = VmmError("no such kernel")
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        with pytest.raises(StartFailedError):
            await vm.start()
        await vm.wait()
    assert len(driver.vmms) == 1


async def test_a_start_of_a_restart_that_fails_is_tried_again(short_dir: Path, config: RawConfig) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        with vm.events() as events:
            await vm.start()
            driver.spawn_error = VmmError("not now")
            driver.vmm.end(CRASH)
            await until(events, "restarting")
            again = await until(events, "restarting")
            assert isinstance(again, Restarting)
            assert (again.restarts, again.delay) == (2, 10.0)
            driver.spawn_error = None
            await until(events, "started")
            await vm.stop()


async def test_connections_that_the_old_run_left_are_closed_and_never_reach_the_next_one(
    short_dir: Path, config: RawConfig
) -> None:
    driver = RunningDriver()
    path = short_dir / "state" / "vm" / "2048" / "vsock_2048"

    def dial() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        connection.connect(str(path))
        return connection

    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        with vm.events() as events:
            await vm.start()
            dial().close()  # of no use, so that the server pauses after the next
            while not vm.guest_calls.closed.total():
                await anyio.lowlevel.checkpoint()
            with dial() as served:
                while not vm.guest_calls.open:
                    await anyio.lowlevel.checkpoint()
                with dial() as waiting:
                    waiting.send(b"\x94\x00\x01\xb4notifyPayloadStarted\x90")
                    driver.vmm.end(CRASH)
                    await until(events, "restarting")
                    assert vm.guest_calls.connections == 2
                    assert [_read(served), _read(waiting)] == [b"", b""]
            assert (await until(events, "started")).generation == 2
            await anyio.sleep(10)
            assert vm.info.payload is PayloadState.STARTING
            await vm.stop()


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return b""
