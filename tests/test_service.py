"""The service on virtual time, with VMMs that the test owns: what it creates, tells and leaves."""

import itertools
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.guest_rpc_peer import UnixStream
from tests.host_facts import FULL, absent, facts
from tests.residue import descriptors
from tests.scripted_vmm import ScriptedDriver, ScriptedHelper
from tests.test_guest_binder import TOKEN, BinderGuest
from vmactor.actors import monitor
from vmactor.actors.admission import AdmissionPolicy
from vmactor.actors.guest_binder import GuestBinder
from vmactor.actors.handle import VirtualMachine
from vmactor.actors.records import DELAY
from vmactor.actors.service import VirtualizationService
from vmactor.binder.parcel import Parcel
from vmactor.binder.wire import ROOT, Reply, Status, Transaction
from vmactor.config import DiskImage, RawConfig
from vmactor.errors import (
    DeadlineExceededError,
    IllegalArgumentError,
    IllegalStateError,
    ResourceExhaustedError,
    ServiceSpecificError,
    StartFailedError,
    UnsupportedOperationError,
    VmactorError,
    VsockError,
)
from vmactor.messages import (
    DeathReason,
    Died,
    PayloadState,
    VirtualMachineDebugInfo,
    VirtualMachineState,
)
from vmactor.process import ExitStatus
from vmactor.state_dir import StateDirectory
from vmactor.vmm.driver import VmmExit
from vmactor.vmm.select import Selection
from vmactor.vsock import HybridVsockTransport, VsockListener

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


@pytest.fixture(autouse=True)
def _helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RawConfig]:
    """Something that could be run."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        yield RawConfig(name="test", kernel=kernel, platform_version="~1.0")


def service_in(
    directory: Path, driver: ScriptedDriver | None = None, **options: Any
) -> VirtualizationService:
    """A service whose VMMs are scripted."""
    options.setdefault("facts", FULL)
    selection = Selection(driver or ScriptedDriver(), "hybrid", ("a test picked it",))
    return VirtualizationService(vmm=selection, state_directory=directory / "state", **options)


async def started(vm: VirtualMachine, driver: ScriptedDriver) -> VirtualMachine:
    """Start a VM and let its VMM run."""
    driver.spawned = anyio.Event()
    async with anyio.create_task_group() as tg:
        tg.start_soon(vm.start)
        await driver.spawned.wait()
        driver.vmm.running.set()
    return vm


def left_in(directory: Path) -> list[str]:
    """What is left of VMs in a state directory, claims included."""
    with StateDirectory(directory / "state") as state:
        held = [f"CID {cid}" for cid in range(2048, 2148) if state.cids.is_held(cid)]
        return held + [path.name for path in (directory / "state" / "vm").iterdir()]


# -- Creating and looking ------------------------------------------------------------------------------


async def test_a_service_cancelled_while_it_opens_leaves_nothing(tmp_path: Path) -> None:
    before = descriptors()
    for checkpoints in range(8):
        service = service_in(tmp_path)
        with anyio.CancelScope() as opening:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel_after, checkpoints, opening)
                async with service:
                    await anyio.sleep_forever()
        assert opening.cancelled_caught
        assert list((tmp_path / "state").glob("managers/*")) == []
        assert descriptors() == before


async def cancel_after(checkpoints: int, scope: anyio.CancelScope) -> None:
    """Cancel as soon as others had their turn so many times."""
    for _ in range(checkpoints):
        await anyio.lowlevel.checkpoint()
    scope.cancel()


async def test_a_vm_is_created_started_and_ends_without_a_trace(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config)
        assert (vm.cid, vm.name, vm.state) == (2048, "test", VirtualMachineState.NOT_STARTED)
        await started(vm, driver)
        await vm.stop()
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.KILLED
        assert service.list_vms() == []
        assert left_in(short_dir) == []


async def test_living_vms_are_listed_by_cid_in_three_forms(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        assert service.dump() == "Running 0 VMs:\n"
        first = await service.create_vm(config)
        second = await started(await service.create_vm(replace(config, name="other")), driver)
        assert service.list_vms() == [first.info, second.info]
        directory = short_dir / "state" / "vm"
        assert service.debug_list_vms() == [
            VirtualMachineDebugInfo(cid, str(directory / str(cid)), os.getuid(), os.getpid())
            for cid in (first.cid, second.cid)
        ]
        assert service.dump() == (
            "Running 2 VMs:\n"
            f"VM CID: {first.cid}\n"
            f"\tState: <VM test cid={first.cid} gen=0 NOT_STARTED>\n"
            "\tPayload state Starting\n"
            "\tProtected: false\n"
            f"\ttemporary_directory: {directory / str(first.cid)}\n"
            f"\trequester_uid: {os.getuid()}\n"
            f"\trequester_debug_pid: {os.getpid()}\n"
            f"VM CID: {second.cid}\n"
            f"\tState: <VM other cid={second.cid} gen=1 STARTING pid=4242>\n"
            "\tPayload state Starting\n"
            "\tProtected: false\n"
            f"\ttemporary_directory: {directory / str(second.cid)}\n"
            f"\trequester_uid: {os.getuid()}\n"
            f"\trequester_debug_pid: {os.getpid()}\n"
        )
        await first.aclose()
        assert service.list_vms() == [second.info]


async def test_a_vms_guest_is_answered_by_the_method_table_of_its_release(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, guest_binder=GuestBinder(release="explicit-codes", version=1))
        await started(vm, driver)
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.connect(f"{vm.info.directory}/vsock_{vm.cid}")
            guest = BinderGuest(UnixStream(sock), version=1)
            await guest.begin()
            reply = await guest.ask(Transaction(ROOT, 2, parcel=TOKEN))
        assert reply == Reply(Status.OK, Parcel().int32(0).to_bytes())
        assert vm.info.payload is PayloadState.STARTED, "which is what 2 means there"
        await vm.stop()
    for wrong in {"release": "android12"}, {"version": 2}, {"max_threads": 0}, {"max_threads": 5}:
        with pytest.raises(IllegalArgumentError):
            GuestBinder(**wrong)


async def test_without_a_directory_nobody_listens_for_tombstones(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vm = await started(await service.create_vm(config), driver)
        assert not Path(vm.info.directory, "vsock_2000").exists()
        await vm.stop()


async def test_the_descriptors_of_the_caller_stay_the_callers(short_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"kernel")
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        with (tmp_path / "kernel").open("rb") as kernel, (tmp_path / "console").open("wb") as console:
            config = RawConfig(name="test", kernel=kernel)
            vm = await service.create_vm(config, console=console.fileno())
        await started(vm, driver)
        driver.vmm.write("console", b"still here\n")
        await vm.stop()
    assert (tmp_path / "console").read_bytes() == b"still here\n"


async def test_everything_happens_in_one_order_on_the_bus(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        with service.subscribe() as events:
            async with await service.create_vm(config) as vm:
                await started(vm, driver)
            async with await service.create_vm(config):
                pass
            seen = [events.next_nowait() for _ in range(5)]
    assert [event.seq for event in seen if event] == [1, 2, 3, 4, 5]
    assert [event.cid for event in seen if event] == [2048, 2048, 2048, 2049, 2049]
    assert [event.kind for event in seen if event] == ["created", "started", "died", "created", "removed"]


# -- Refusing ------------------------------------------------------------------------------------------


def _unwritable(tmp_path: Path) -> int:
    return os.open(tmp_path, os.O_RDONLY)


@pytest.mark.parametrize(
    ("changes", "options", "error"),
    [
        ({"name": "no spaces"}, {}, IllegalArgumentError),
        ({"kernel": None}, {}, IllegalArgumentError),
        ({"kernel": 987}, {}, IllegalArgumentError),
        ({"platform_version": "~2.0"}, {}, UnsupportedOperationError),
        ({}, {"hangup_detection": True, "hangup_timeout": 0}, IllegalArgumentError),
        ({}, {"hangup_detection": True, "hangup_timeout": float("nan")}, IllegalArgumentError),
        ({}, {"hangup_timeout": 30}, IllegalArgumentError),
        ({}, {"console": 987}, IllegalArgumentError),
        ({}, {"log": -1}, IllegalArgumentError),
        ({}, {"ramdump": _unwritable}, IllegalArgumentError),
    ],
)
async def test_what_can_never_run_is_refused_and_costs_no_cid(
    short_dir: Path,
    tmp_path: Path,
    config: RawConfig,
    changes: dict[str, Any],
    options: dict[str, Any],
    error: type[VmactorError],
) -> None:
    opened = {key: make(tmp_path) for key, make in options.items() if callable(make)}
    try:
        async with service_in(short_dir) as service:
            with pytest.raises(error):
                await service.create_vm(replace(config, **changes), **(options | opened))
            assert service.list_vms() == []
            assert left_in(short_dir) == []
            assert (await service.create_vm(config)).cid == 2048
    finally:
        for fd in opened.values():
            os.close(fd)


async def test_what_the_driver_cannot_do_is_refused_and_costs_no_cid(
    short_dir: Path, config: RawConfig
) -> None:
    class Choosy(ScriptedDriver):
        def validate(self, config: RawConfig) -> None:
            if config.protected_vm:
                raise UnsupportedOperationError("protected_vm: not here")

    async with service_in(short_dir, Choosy()) as service:
        with pytest.raises(UnsupportedOperationError, match="not here"):
            await service.create_vm(replace(config, protected_vm=True))
        assert (await service.create_vm(config)).cid == 2048


async def test_without_the_helper_a_vm_is_refused_and_costs_no_cid(
    short_dir: Path, config: RawConfig
) -> None:
    nowhere = facts(vhost_device_vsock=absent("vhost-device-vsock"))
    async with service_in(short_dir, facts=nowhere) as service:
        with pytest.raises(UnsupportedOperationError, match="install vhost-device-vsock"):
            await service.create_vm(config)
        assert left_in(short_dir) == []
        with StateDirectory(short_dir / "state") as state:
            assert await state.cids.claim() == 2048


async def test_a_closed_service_creates_nothing(short_dir: Path, config: RawConfig) -> None:
    service = service_in(short_dir)
    with pytest.raises(IllegalStateError, match="async with"):
        await service.create_vm(config)
    async with service:
        pass
    with pytest.raises(IllegalStateError, match="async with"):
        await service.create_vm(config)
    assert service.list_vms() == service.debug_list_vms() == []


# -- A CID and its RPC server --------------------------------------------------------------------------


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception], None]:
    """Makes the next so many attempts to listen fail."""

    def make(times: int, error: Exception) -> None:
        listen, left = HybridVsockTransport.listen, iter(range(times))

        def refuse(self: HybridVsockTransport, port: int) -> VsockListener:
            if next(left, None) is not None:
                raise error
            return listen(self, port)

        monkeypatch.setattr(HybridVsockTransport, "listen", refuse)

    return make


async def test_the_fifth_attempt_at_a_cid_and_its_rpc_server_counts(
    short_dir: Path, config: RawConfig, deaf: Callable[[int, Exception], None]
) -> None:
    deaf(4, VsockError("taken"))
    async with service_in(short_dir) as service:
        vm = await service.create_vm(config)
        assert vm.cid == 2052
        assert sorted(left_in(short_dir)) == ["2052", "CID 2052"]


async def test_there_is_no_sixth_attempt(
    short_dir: Path, config: RawConfig, deaf: Callable[[int, Exception], None]
) -> None:
    deaf(5, VsockError("taken"))
    async with service_in(short_dir) as service:
        with pytest.raises(ServiceSpecificError, match=r"Too many attempts .* failed: taken"):
            await service.create_vm(config)
        assert left_in(short_dir) == []
        assert (await service.create_vm(config)).cid == 2053


# -- Several services ----------------------------------------------------------------------------------


async def test_two_services_share_a_state_directory_and_nothing_else(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as one, service_in(short_dir) as other:
        mine = await started(await one.create_vm(config), driver)
        theirs = [await other.create_vm(config) for _ in range(2)]
        assert [mine.cid, *(vm.cid for vm in theirs)] == [2048, 2049, 2050]
        assert [info.cid for info in one.list_vms()] == [2048]
        assert [info.cid for info in other.list_vms()] == [2049, 2050]
        await anyio.sleep(2 * DELAY)  # other processes are told a moment later
        with StateDirectory(short_dir / "state") as state:
            records = state.records()
        assert [(r["cid"], r["state"], r["pid"], r["vsock"], r["alive"]) for r in records] == [
            (2048, "STARTING", 4242, "hybrid", True),
            (2049, "NOT_STARTED", None, "hybrid", True),
            (2050, "NOT_STARTED", None, "hybrid", True),
        ]
    assert left_in(short_dir) == []


async def test_several_tasks_may_use_one_service(short_dir: Path, config: RawConfig) -> None:
    async with service_in(short_dir) as service:
        vms: list[VirtualMachine] = []

        async def create() -> None:
            vms.append(await service.create_vm(config))

        async with anyio.create_task_group() as tg:
            for _ in range(20):
                tg.start_soon(create)
        assert sorted(vm.cid for vm in vms) == list(range(2048, 2068))


async def test_a_state_directory_of_another_user_is_refused(short_dir: Path) -> None:
    (short_dir / "state").mkdir(mode=0o755)
    with pytest.raises(VmactorError, match="chmod 700"):
        async with service_in(short_dir):
            pytest.fail("it must not open")


# -- Leaving -------------------------------------------------------------------------------------------


async def test_leaving_kills_every_vm_and_returns_when_nothing_is_left(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vms = [await started(await service.create_vm(config), driver) for _ in range(3)]
        idle = await service.create_vm(config)
    assert left_in(short_dir) == []
    assert [vmm.closed for vmm in driver.vmms] == [True] * 3
    assert [vm.info.died.reason for vm in vms if vm.info.died] == [DeathReason.KILLED] * 3
    assert idle.info.died is None
    assert await idle.wait() is None


async def test_leaving_waits_for_all_that_are_stuck_at_the_same_time(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vms = [await started(await service.create_vm(config), driver) for _ in range(5)]
        for vmm in driver.vmms:
            vmm.stuck = True
        began = anyio.current_time()
    assert anyio.current_time() - began < 60
    assert all(vm.info.died for vm in vms)
    assert sorted(left_in(short_dir)) == [str(vm.cid) for vm in vms]


async def test_who_reads_events_learns_that_the_service_has_ended(short_dir: Path, config: RawConfig) -> None:
    async with anyio.create_task_group() as tg:
        kinds = []
        service = service_in(short_dir)

        async def read(until_all_is_over: anyio.Event) -> None:
            with service.subscribe() as events:
                until_all_is_over.set()
                kinds.extend([event.kind async for event in events])

        reading = anyio.Event()
        tg.start_soon(read, reading)
        await reading.wait()
        async with service:
            vm = await service.create_vm(config)
    assert kinds == ["created", "removed"]
    assert [event.kind async for event in vm.events()] == ["removed"]


async def test_the_bodys_exception_comes_out_as_itself(short_dir: Path, config: RawConfig) -> None:
    driver = ScriptedDriver()

    async def use() -> None:
        async with service_in(short_dir, driver) as service:
            await started(await service.create_vm(config), driver)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await use()
    assert driver.vmm.closed
    assert left_in(short_dir) == []


async def test_leaving_because_of_a_cancellation_leaves_nothing_either(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    with anyio.CancelScope() as scope:
        async with service_in(short_dir, driver) as service:
            vm = await started(await service.create_vm(config), driver)
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert isinstance(vm.info.died, Died)
    assert left_in(short_dir) == []


# -- Failing half-way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(12))
async def test_a_creation_that_is_cancelled_anywhere_leaves_nothing(
    short_dir: Path, config: RawConfig, tmp_path: Path, steps: int
) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    with (tmp_path / "disk").open("rb") as disk:
        with_disk = replace(config, disks=(DiskImage(disk),))
        async with service_in(short_dir) as service:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tg:

                    async def cancel() -> None:
                        for _ in range(steps):
                            await anyio.lowlevel.checkpoint()
                        scope.cancel()

                    tg.start_soon(cancel)
                    await service.create_vm(with_disk)
            await anyio.wait_all_tasks_blocked()
            assert service.list_vms() == []
            assert left_in(short_dir) == []


async def test_a_creation_that_the_services_end_overtakes_leaves_nothing(
    short_dir: Path, config: RawConfig
) -> None:
    with StateDirectory(short_dir / "state") as state:
        await state.cids._lock_counter()  # so that the creation has to wait
        async with anyio.create_task_group() as tg, service_in(short_dir) as service:

            async def refused() -> None:
                with pytest.raises(IllegalStateError, match="closed"):
                    await service.create_vm(config)

            tg.start_soon(refused)
            await anyio.wait_all_tasks_blocked()
    assert service.list_vms() == []
    assert left_in(short_dir) == []


async def test_a_creation_that_is_done_when_the_service_is_ending_leaves_nothing(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    service = service_in(short_dir, driver)
    async with anyio.create_task_group() as tg, service:
        vm = await started(await service.create_vm(config), driver)
        driver.vmm.stuck = True  # so that leaving takes its time

        async def late() -> None:
            with StateDirectory(short_dir / "state") as state:
                await state.cids._lock_counter()
                tg.start_soon(refused)
                await anyio.sleep(1)
            await anyio.sleep(1)  # the creation goes on while the service waits for its VM
            driver.vmm.stuck = False
            await vm.stop()

        async def refused() -> None:
            with pytest.raises(IllegalStateError, match="closed"):
                await service.create_vm(config)

        tg.start_soon(late)
        await anyio.wait_all_tasks_blocked()
    assert service.list_vms() == []
    assert left_in(short_dir) == []


async def test_a_helper_that_survives_its_kill_keeps_directory_and_cid_as_long_as_it_must(
    short_dir: Path, config: RawConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vm = await started(await service.create_vm(config), driver)
        monkeypatch.setattr(ScriptedHelper, "stuck", True)
        with pytest.raises(DeadlineExceededError, match="vsock helper"):
            await vm.stop(timeout=1000)
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.KILLED
        assert "vsock helper" in died.detail
        assert service.list_vms() == []
        assert sorted(left_in(short_dir)) == ["2048", "CID 2048"]
        assert (await service.create_vm(config)).cid == 2049
    assert left_in(short_dir) == ["2048"]
    with StateDirectory(short_dir / "state") as state:
        assert [(record["cid"], record["alive"]) for record in state.records()] == [(2048, False)]


# -- Out of something ----------------------------------------------------------------------------------

UNCHECKED = AdmissionPolicy(checked=False)
"""So that what the kernel refuses is met where it is refused."""


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may open so many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = descriptors()
    free = (number for number in itertools.count() if number not in taken)
    limit = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("count", range(8))
async def test_a_creation_that_runs_out_of_descriptors_says_so_and_leaves_nothing(
    short_dir: Path, config: RawConfig, tmp_path: Path, count: int
) -> None:
    with (tmp_path / "console").open("wb") as console:
        async with service_in(short_dir, admission=UNCHECKED) as service:
            vm = failure = None
            with descriptors_left(count):
                try:
                    vm = await service.create_vm(config, console=console.fileno())
                except ResourceExhaustedError as error:
                    failure = error
            if vm is None:
                assert count < 3
                assert "ulimit -n" in str(failure)
                assert service.list_vms() == []
                assert left_in(short_dir) == []
                assert (await service.create_vm(config)).cid <= 2049
            else:
                assert count > 2
                await vm.aclose()
                assert left_in(short_dir) == []


@pytest.mark.parametrize("count", range(0, 28, 2))
async def test_a_start_that_runs_out_of_descriptors_says_so_and_leaves_nothing(
    short_dir: Path, config: RawConfig, count: int
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver, admission=UNCHECKED) as service:
        with service.subscribe() as events:
            vm = await service.create_vm(config)
            failure = None
            with descriptors_left(count):
                async with anyio.create_task_group() as tg:

                    async def run() -> None:
                        await driver.spawned.wait()
                        driver.vmm.running.set()

                    tg.start_soon(run)
                    try:
                        await vm.start()
                    except StartFailedError as error:
                        failure = error
                    else:
                        await vm.stop()
                    tg.cancel_scope.cancel()
                assert isinstance(vm.info.died, Died)
                assert service.list_vms() == []
            kinds = [event.kind for event in iter(events.next_nowait, None)]
            assert kinds == (["created", "died"] if failure else ["created", "started", "died"])
            assert "Too many open files" in str(failure) if count < 6 else count < 20 or failure is None
            assert left_in(short_dir) == []


@pytest.mark.parametrize("when", ["before the creation", "before the start", "before the end"])
async def test_a_full_disk_is_told_and_what_runs_goes_on(
    short_dir: Path, config: RawConfig, when: str
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        with nothing_can_be_written(when == "before the creation"):
            if when == "before the creation":
                with pytest.raises(ResourceExhaustedError, match="make room"):
                    await service.create_vm(config)
                return
        vm = await service.create_vm(config)
        with nothing_can_be_written(when == "before the start"):
            await started(vm, driver)
        with nothing_can_be_written():
            driver.vmm.end(VmmExit(ExitStatus(0, None), DeathReason.SHUTDOWN))
            died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.SHUTDOWN
        assert left_in(short_dir) == []


@contextmanager
def nothing_can_be_written(really: bool = True) -> Iterator[None]:
    """As on a full disk, but for the error's number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0 if really else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_state_directory_that_is_removed_under_us_stops_creations_and_nothing_else(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config)
        shutil.rmtree(short_dir / "state")
        with pytest.raises(IllegalStateError, match="removed while in use"):
            await service.create_vm(config)
        await started(vm, driver)
        await vm.stop()
        died = await vm.wait()
        assert died is not None
        assert died.reason is DeathReason.KILLED
        assert service.list_vms() == []
