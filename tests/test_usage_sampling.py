"""What VMs use of their host: told on request, at the end, and by one sampler while somebody wants to know.

Also the other statistics that the reference keeps: what was asked for, and what came of it.
"""

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import anyio
import pytest

from tests.simulated_peer import script
from vmactor import RawConfig, VirtualizationService
from vmactor.actors.event_bus import new_bus
from vmactor.actors.usage_sampler import OVERHEAD, UsageSampler
from vmactor.errors import IllegalArgumentError, IllegalStateError
from vmactor.messages import Created, CreationFailed, PayloadReady, Started, UsageSampled
from vmactor.supervisor import Supervisor

pytestmark = pytest.mark.anyio

COST = 0.0004


# -- The sampler, on virtual time ----------------------------------------------------------------------


async def samples_in(seconds: float, vms: int, wanted: Callable[[], bool] = lambda: True) -> list[int]:
    """Which VMs are sampled within so many seconds, in order."""
    taken: list[int] = []

    def of(number: int) -> Callable[[], Awaitable[float | None]]:
        async def sample() -> float | None:
            await anyio.sleep(COST)
            taken.append(number)
            return COST

        return sample

    sampler = UsageSampler(wanted, lambda: [of(number) for number in range(vms)])
    async with Supervisor("test") as supervisor:
        await supervisor.start("sampler", sampler.run)
        await anyio.sleep(10)
        assert taken == []
        sampler.wake()
        await anyio.sleep(seconds)
    return taken


@pytest.mark.virtual_time
@pytest.mark.parametrize("vms", [1, 3, 12])
async def test_few_vms_are_sampled_every_second(vms: int) -> None:
    taken = await samples_in(99.9, vms)
    assert [taken.count(number) for number in range(vms)] == [100] * vms


@pytest.mark.virtual_time
@pytest.mark.parametrize("vms", [50, 1000])
async def test_sampling_takes_no_more_than_its_share_of_a_processor_however_many_vms_there_are(
    vms: int,
) -> None:
    taken = await samples_in(1000, vms)
    assert len(taken) * (COST + OVERHEAD) / 1000 <= 0.0101
    assert len(taken) * (COST + OVERHEAD) / 1000 >= 0.009
    turns = [taken.count(number) for number in range(vms)]
    assert max(turns) - min(turns) <= 1


@pytest.mark.virtual_time
async def test_nobody_is_sampled_when_nobody_wants_it_any_more() -> None:
    end = anyio.current_time() + 15
    taken = await samples_in(100, 1, lambda: anyio.current_time() < end)
    assert len(taken) == 5


# -- Events that are for those only who asked by name ------------------------------------------------


async def test_an_aside_reaches_only_those_who_asked_for_its_kind_and_leaves_no_trace() -> None:
    bus = new_bus()
    with (
        bus.subscribe() as everything,
        bus.subscribe(kinds=[UsageSampled, Started]) as asked,
        bus.subscribe(topics=[7], kinds=[UsageSampled]) as other,
    ):
        bus.publish(Created(cid=5))
        assert bus.asked_for(UsageSampled)
        bus.publish_aside(UsageSampled(cid=5, cpu_time_ms=3))
        bus.publish(Started(cid=5))
        told, started = asked.next_nowait(), asked.next_nowait()
        assert isinstance(told, UsageSampled)
        assert (told.seq, told.previous, told.cpu_time_ms) == (1, 0, 3)
        assert started is not None
        assert (started.seq, started.previous) == (2, 1)
        assert other.next_nowait() is None
        assert [everything.next_nowait() for _ in range(3)] == [Created(cid=5, seq=1), started, None]
    assert not bus.asked_for(UsageSampled)
    with bus.subscribe(after=0) as replayed:
        assert [event and event.kind for event in (replayed.next_nowait(), replayed.next_nowait())] == [
            "created",
            "started",
        ]


# -- Real processes ----------------------------------------------------------------------------------


@pytest.fixture
def kernel(short_dir: Path) -> Iterator[BinaryIO]:
    """Any file will do."""
    with (short_dir / "kernel").open("w+b") as file:
        yield file


async def test_what_a_vm_uses_is_told_on_request_to_subscribers_and_at_its_end(
    short_dir: Path, kernel: BinaryIO
) -> None:
    config = RawConfig(name="sim", kernel=kernel, params=script("started", "ready", "spam"))
    async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as manager:
        with manager.subscribe(kinds=[PayloadReady]) as ready, manager.subscribe() as everything:
            vm = await manager.create_vm(config)
            with pytest.raises(IllegalStateError, match="not running"):
                await vm.usage()
            async with vm:
                await vm.start()
                with anyio.fail_after(60):
                    await anext(ready)
                    used = await vm.usage()
                    while used.cpu.total_ms == 0:
                        used = await vm.usage()
                    with manager.subscribe(kinds=[UsageSampled], cids=[vm.cid]) as samples:
                        sampled = await anext(samples)
                assert isinstance(sampled, UsageSampled)
                assert (sampled.cid, sampled.generation, sampled.name) == (vm.cid, 1, "sim")
                assert sampled.cpu_time_ms >= used.cpu.total_ms > 0
                assert sampled.rss_vmm_kib > 0
                await vm.stop()
            died = await vm.wait()
            assert died is not None
            assert died.cpu_time_ms >= sampled.cpu_time_ms
            assert died.rss_vmm_kib >= used.memory.total_kib > 0
            with pytest.raises(IllegalStateError, match="not running"):
                await vm.usage()
            kinds = []
            while (event := everything.next_nowait()) is not None:
                kinds.append(event.kind)
            assert kinds[-1] == "died"
            assert "usage" not in kinds


async def test_a_vm_that_nobody_measured_died_with_memory_unknown(short_dir: Path, kernel: BinaryIO) -> None:
    config = RawConfig(name="sim", kernel=kernel, params=script("started", "ready", "poweroff"))
    async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as manager:
        vm = await manager.create_vm(config)
        await vm.start()
        died = await vm.wait()
    assert died is not None
    assert (died.rss_vm_kib, died.rss_vmm_kib) == (0, 0)


async def test_each_creation_is_told_also_one_that_failed(short_dir: Path, kernel: BinaryIO) -> None:
    good = RawConfig(name="good", kernel=kernel, memory_mib=64)
    async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as manager:
        with manager.subscribe() as events:
            with pytest.raises(IllegalArgumentError):
                await manager.create_vm(RawConfig(name="bad", kernel=kernel, bootloader=kernel))
            async with await manager.create_vm(good):
                failed, created = await anext(events), await anext(events)
    assert isinstance(failed, CreationFailed)
    assert (failed.cid, failed.name, failed.driver) == (0, "bad", "simulated")
    assert (failed.error, failed.code) == ("ILLEGAL_ARGUMENT", -3)
    assert failed.message
    assert isinstance(created, Created)
    assert (created.memory_mib, created.cpus, created.config_type) == (64, 1, "RawConfig")
    assert not created.protected
    assert created.uid == failed.uid
