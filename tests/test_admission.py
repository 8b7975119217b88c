"""Admission: the decision alone, the books of one service, and a service that refuses and takes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.host_facts import FULL
from tests.residue import descriptors
from tests.scripted_vmm import ScriptedDriver, ScriptedHelper
from tests.test_service import left_in, service_in, started
from vmactor.actors import monitor
from vmactor.actors.admission import (
    NOTHING,
    READING_SECONDS,
    VM_INODES,
    VM_SPACE,
    Admission,
    AdmissionPolicy,
    Need,
    Reservation,
    need_of,
    room,
    shortage,
)
from vmactor.config import RawConfig
from vmactor.errors import CapacityExceededError, IllegalArgumentError, ResourceExhaustedError
from vmactor.limits import Limit, Resource
from vmactor.messages import VirtualMachineState
from vmactor.vmm.qemu import QemuDriver
from vmactor.vmm.simulated import SimulatedDriver

MIB = 1 << 20


def needing(**amounts: int) -> Need:
    """A need by the names of what is needed."""
    return tuple(amounts.get(resource.name.lower(), 0) for resource in Resource)


def limit(of: Resource, most: int, used: int = 0) -> Limit:
    return Limit(of, of.name.lower(), most, used, f"set {of.name}")


FILES = limit(Resource.DESCRIPTORS, 100, 40)
CIDS = limit(Resource.CIDS, 3)


# -- The decision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promised", "need", "short"),
    [
        (0, 60, False),
        (0, 61, True),
        (20, 40, False),
        (20, 41, True),
        (60, 0, False),
        (61, 0, True),
    ],
)
def test_what_is_used_promised_and_needed_must_not_exceed_the_limit(
    promised: int, need: int, short: bool
) -> None:
    found = shortage([FILES, CIDS], needing(descriptors=promised), needing(descriptors=need))
    assert (found is not None) is short


def test_a_limit_that_others_exceeded_does_not_matter_to_who_needs_nothing_of_it() -> None:
    full = limit(Resource.INODES, 10, 11)
    assert shortage([full], NOTHING, needing(descriptors=1)) is None
    assert shortage([full], NOTHING, needing(inodes=1)) is not None


def test_of_several_limits_of_one_resource_each_counts() -> None:
    limits = [limit(Resource.PROCESSES, 1000), limit(Resource.PROCESSES, 10, 9)]
    assert shortage(limits, NOTHING, needing(processes=1)) is None
    found = shortage(limits, NOTHING, needing(processes=2))
    assert found is not None
    assert found.limit is limits[1]


def test_a_refusal_names_the_limit_and_what_to_set() -> None:
    found = shortage([FILES], needing(descriptors=50), needing(descriptors=11))
    assert found is not None
    error = found.error()
    assert isinstance(error, ResourceExhaustedError)
    assert (error.resource, error.limit, error.used, error.needed) == ("DESCRIPTORS", 100, 90, 11)
    assert error.advice == "set DESCRIPTORS"
    assert str(error) == (
        "no room for this VM: descriptors: 90 of 100 are taken or promised and 11 more are needed; "
        "set DESCRIPTORS"
    )


@given(st.integers(0, 100), st.integers(0, 200), st.integers(1, 50))
def test_there_is_room_for_as_many_as_are_accepted_one_by_one(used: int, promised: int, each: int) -> None:
    limits = [limit(Resource.MEMORY, 150, used), limit(Resource.CIDS, 7)]
    need, books = needing(memory=each, cids=1), needing(memory=promised)
    count, first = room(limits, books, need)
    accepted = 0
    while shortage(limits, books, need) is None:
        books = tuple(map(sum, zip(books, need, strict=True)))
        accepted += 1
    assert accepted == count
    assert first is not None


# -- What a VM needs -------------------------------------------------------------------------------


def test_a_guests_memory_is_promised_whole_and_only_its_boot_needs_it_now() -> None:
    config = RawConfig(name="a", kernel=0, memory_mib=1024)
    need = need_of(config, QemuDriver(FULL), "hybrid", 0)
    assert need[Resource.GUEST_MEMORY] >= 1024 * MIB
    assert need[Resource.MEMORY] < 200 * MIB
    assert need_of(config, SimulatedDriver(FULL), "direct", 0)[Resource.GUEST_MEMORY] <= MIB


def test_files_sinks_and_helpers_cost_descriptors() -> None:
    config, more = RawConfig(name="a", kernel=0), RawConfig(name="a", kernel=0, initrd=1)
    driver = QemuDriver(FULL)
    base = need_of(config, driver, "kernel", 0)[Resource.DESCRIPTORS]
    for other in (
        need_of(more, driver, "kernel", 0),
        need_of(config, driver, "kernel", 1),
        need_of(config, driver, "hybrid", 0),
    ):
        assert other[Resource.DESCRIPTORS] > base


@pytest.mark.parametrize(
    "wrong", [{"memory_overcommit": 0.0}, {"memory_overcommit": -1}, {"concurrent_boots": 0}]
)
def test_a_policy_that_accepts_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(IllegalArgumentError):
        AdmissionPolicy(**wrong)


def test_emulated_guests_boot_fewer_at_a_time() -> None:
    policy = AdmissionPolicy()
    assert policy.boots(2, emulated=True) < policy.boots(2, emulated=False)
    assert policy.boots(1, emulated=True) == 2
    assert AdmissionPolicy(concurrent_boots=5).boots(64, emulated=True) == 5


def test_a_need_is_written_in_the_order_of_the_resources() -> None:
    assert list(Resource) == list(range(len(Resource)))
    need = need_of(RawConfig(name="a", kernel=0), SimulatedDriver(FULL), "direct", 0)
    assert (need[Resource.CIDS], need[Resource.PROCESSES]) == (1, 1)
    assert (need[Resource.SPACE], need[Resource.INODES]) == (VM_SPACE, VM_INODES)


# -- The books -------------------------------------------------------------------------------------


class Host:
    """A host that the test fills."""

    def __init__(self, **policy: Any) -> None:
        self.now = 0.0
        self.used = 0
        self.memory = 100
        self.readings = 0
        self.admission = Admission(AdmissionPolicy(**policy), self.read, lambda: self.now)

    def read(self) -> tuple[Limit, ...]:
        self.readings += 1
        return limit(Resource.DESCRIPTORS, 100, self.used), limit(Resource.GUEST_MEMORY, self.memory)

    def later(self) -> None:
        self.now += READING_SECONDS


TEN = needing(descriptors=10)


def test_acceptances_cost_one_reading_a_second_and_a_refusal_is_always_fresh() -> None:
    host = Host()
    for _ in range(5):
        host.admission.reserve(TEN)
    assert host.readings == 1
    host.used = 45
    host.later()
    host.admission.reserve(needing(descriptors=5))
    assert host.readings == 2
    with pytest.raises(CapacityExceededError):
        host.admission.reserve(needing(descriptors=1))
    host.used = 0
    host.admission.reserve(TEN)  # the old reading would refuse it
    assert host.readings == 4


def test_what_a_run_took_is_counted_once_whenever_it_is_seen() -> None:
    host = Host()
    one = host.admission.reserve(TEN)
    one.taken()
    assert host.admission.room(TEN)[0] == 10  # this reading is assumed to see it, and it does not
    host.used = 10
    host.later()
    assert host.admission.room(TEN)[0] == 9
    host.used = 0
    one.given_back()
    assert host.admission.room(TEN)[0] == 9
    one.release()
    assert host.admission.room(TEN)[0] == 10


def test_memory_that_a_guest_may_touch_stays_promised_while_its_vm_lives() -> None:
    host = Host(memory_overcommit=1.5)
    big = needing(guest_memory=70)
    one, two = host.admission.reserve(big), host.admission.reserve(big)
    for reservation in (one, two):
        reservation.taken()
    host.later()
    with pytest.raises(CapacityExceededError) as caught:
        host.admission.reserve(big)
    assert (caught.value.limit, caught.value.used) == (150, 140)
    one.release()
    host.admission.reserve(big)


def test_a_promise_that_cannot_be_kept_any_more_is_told_before_the_start() -> None:
    host = Host()
    reservation = host.admission.reserve(TEN)
    reservation.check()
    host.used = 95
    host.later()
    with pytest.raises(CapacityExceededError):
        reservation.check()
    host.used = 0
    reservation.check()


def test_unchecked_nothing_is_read_and_nothing_refused() -> None:
    host = Host(checked=False)
    for _ in range(20):
        host.admission.reserve(TEN).check()
    assert host.readings == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["taken", "given_back", "release", "read"]), st.integers(0, 3)), max_size=40
    )
)
def test_in_any_order_of_calls_nothing_stays_promised_in_the_end(steps: list[tuple[str, int]]) -> None:
    host = Host()
    need = needing(descriptors=10, guest_memory=3, cids=1)
    made: list[Reservation] = [host.admission.reserve(need) for _ in range(4)]
    for what, which in steps:
        if what == "read":
            host.admission.room(need)
        else:
            getattr(made[which], what)()
        assert all(0 <= left <= 4 * each for left, each in zip(host.admission.promised, need, strict=True))
    for reservation in made:
        reservation.release()
    host.admission.room(need)
    assert host.admission.promised == NOTHING


# -- A service -------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RawConfig]:
    """Something that could be run."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        yield RawConfig(name="test", kernel=kernel, platform_version="~1.0")


@pytest.fixture
def host_of(monkeypatch: pytest.MonkeyPatch) -> Host:
    """The host that services are told they run on."""
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)
    host = Host()
    host.memory = 1 << 30
    monkeypatch.setattr("vmactor.actors.service.HostLimits", lambda _path: host)
    return host


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_vm_without_room_is_refused_before_anything_is_begun(
    short_dir: Path, config: RawConfig, host_of: Host
) -> None:
    driver = ScriptedDriver()
    need = need_of(config, driver, "hybrid", 0)[Resource.DESCRIPTORS]
    host_of.used = 100 - 2 * need
    async with service_in(short_dir, driver) as service:
        first = await service.create_vm(config)
        second = await service.create_vm(config)
        before = descriptors()
        with pytest.raises(CapacityExceededError) as caught:
            await service.create_vm(config)
        assert caught.value.resource == "DESCRIPTORS"
        assert descriptors() == before
        assert len(service.list_vms()) == 2
        await started(first, driver)
        await first.stop()
        third = await service.create_vm(config)
        await second.aclose()
        await third.aclose()
        assert left_in(short_dir) == []
        assert service._admission.promised == NOTHING


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_start_that_is_refused_leaves_the_vm_as_it_was(
    short_dir: Path, config: RawConfig, host_of: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmactor.actors.admission.READING_SECONDS", 0.0)
    driver = ScriptedDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config)
        host_of.used = 99
        with pytest.raises(CapacityExceededError):
            await vm.start()
        assert vm.state is VirtualMachineState.NOT_STARTED
        host_of.used = 0
        await started(vm, driver)
        assert vm.state is VirtualMachineState.STARTING
