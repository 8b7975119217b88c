"""A callback or subscriber that raises, blocks or is cancelled harms only itself, in a whole service."""

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from tests.scripted_vmm import ScriptedHelper
from tests.test_restart import RunningDriver, service_in
from vmactor.actors import monitor
from vmactor.actors.handle import VirtualMachine
from vmactor.actors.service import VirtualizationService
from vmactor.bus import Overflow, Subscription
from vmactor.config import RawConfig
from vmactor.errors import SlowSubscriberError
from vmactor.messages import Event

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

LIFE = ["created", "started", "died"]


@pytest.fixture(autouse=True)
def _helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RawConfig]:
    """Something that could be run."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        yield RawConfig(name="test", kernel=kernel, platform_version="~1.0")


@dataclass
class Others:
    """A service with a bystander, and a VM beside the one that somebody misbehaves about."""

    service: VirtualizationService
    config: RawConfig
    bystander: Subscription[Event]

    async def live(self) -> VirtualMachine:
        """A whole life of a VM, which takes no time."""
        began = anyio.current_time()
        async with await self.service.create_vm(self.config) as vm:
            await vm.start()
        assert anyio.current_time() == began
        return vm

    def is_unharmed(self, lives: int) -> None:
        """The bystander got everything."""
        kinds = []
        while (event := self.bystander.next_nowait()) is not None:
            kinds.append(event.kind)
        assert kinds == LIFE * lives
        assert self.service.list_vms() == []


@asynccontextmanager
async def others(directory: Path, config: RawConfig) -> AsyncIterator[Others]:
    """The service and those who are not to be harmed."""
    async with service_in(directory, RunningDriver()) as service:
        with service.subscribe() as bystander:
            yield Others(service, config, bystander)


async def test_a_filter_that_raises_harms_only_its_own_subscription(
    short_dir: Path, config: RawConfig
) -> None:
    def wants(event: Event) -> bool:
        return event.kind == "created" or 1 // 0 > 0

    async with others(short_dir, config) as rest:
        with rest.service.subscribe(wants) as events:
            await rest.live()
            await rest.live()
            assert (await anext(events)).kind == "created"
            with pytest.raises(ZeroDivisionError):
                await anext(events)
        rest.is_unharmed(lives=2)


async def test_a_subscriber_that_blocks_harms_nobody_whatever_its_policy(
    short_dir: Path, config: RawConfig
) -> None:
    async with others(short_dir, config) as rest:
        for overflow in Overflow:
            with rest.service.subscribe(overflow=overflow, capacity=1, patience=math.inf):
                await rest.live()
                await rest.live()
        rest.is_unharmed(lives=6)


async def test_a_subscriber_that_blocks_costs_its_publishers_its_patience_once(
    short_dir: Path, config: RawConfig
) -> None:
    async with others(short_dir, config) as rest:
        vm = await rest.service.create_vm(config)
        with rest.service.subscribe(overflow=Overflow.WAIT, capacity=1, patience=3.0) as blocked:
            began = anyio.current_time()
            await vm.publish_message("guest_to_host", 5000, "1")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vm.publish_message, "guest_to_host", 5000, "2")
                await rest.live()  # meanwhile
            assert anyio.current_time() - began == pytest.approx(3.0)
            await vm.publish_message("guest_to_host", 5000, "3")
            assert anyio.current_time() - began == pytest.approx(3.0)
            with pytest.raises(SlowSubscriberError):
                async for _ in blocked:
                    pass
        await vm.aclose()


async def test_a_subscriber_task_that_raises_or_is_cancelled_harms_only_itself(
    short_dir: Path, config: RawConfig
) -> None:
    seen: list[str] = []
    seen_by_the_failing: list[str] = []

    async def reads(events: Subscription[Event]) -> None:
        with events:
            async for event in events:
                seen.append(event.kind)  # noqa: PERF401 - it is cancelled in the middle

    async def fails(events: Subscription[Event]) -> None:
        with suppress(ZeroDivisionError), events:
            async for event in events:
                seen_by_the_failing.append(event.kind)
                raise ZeroDivisionError

    async with others(short_dir, config) as rest:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fails, rest.service.subscribe())
            async with anyio.create_task_group() as doomed:
                doomed.start_soon(reads, rest.service.subscribe())
                await anyio.sleep(1.0)
                await rest.live()
                await anyio.sleep(1.0)
                doomed.cancel_scope.cancel()
            await rest.live()
        assert seen == LIFE
        assert seen_by_the_failing == ["created"]
        rest.is_unharmed(lives=2)
