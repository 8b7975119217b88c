"""The bus: numbers without holes, gaps that add up, and subscribers that harm only themselves."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.bus import Bus, Subscription
from vmactor.errors import IllegalStateError

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Happened:
    """An event: of which stream, and whether it is the stream's last; ``missed`` makes it a gap."""

    stream: str = ""
    last: bool = False
    seq: int = 0
    missed: int = 0


def stamp(event: Happened, seq: int) -> Happened:
    if event.stream == "cannot be stamped":
        raise OverflowError
    return replace(event, seq=seq)


def gap(last: Happened, missed: int) -> Happened:
    return Happened("gap", seq=last.seq, missed=missed)


def ends(event: Happened) -> str | None:
    if event.stream == "cannot be looked at":
        raise LookupError
    return event.stream if event.last else None


def make_bus(kept_ends: int = 1024) -> Bus[Happened]:
    return Bus(stamp=stamp, gap=gap, ends=ends, kept_ends=kept_ends)


def queued(subscription: Subscription[Happened]) -> list[tuple[int, int]]:
    """Everything that can be read now, as (seq, missed)."""
    found = []
    while (event := subscription.next_nowait()) is not None:
        found.append((event.seq, event.missed))
    return found


async def seqs(subscription: Subscription[Happened], count: int) -> list[int]:
    return [(await anext(subscription)).seq for _ in range(count)]


# -- Publishing --------------------------------------------------------------------------------------


async def test_every_subscriber_gets_the_events_in_order_numbered_from_1() -> None:
    bus = make_bus()
    with bus.subscribe() as one, bus.subscribe() as two:
        published = [bus.publish(Happened(name)) for name in "abc"]
        assert [event.seq for event in published] == [1, 2, 3]
        assert [await anext(one) for _ in range(3)] == published
        assert [await anext(two) for _ in range(3)] == published
    assert bus.seq == 3


async def test_many_waiting_readers_all_wake_up() -> None:
    bus = make_bus()
    got = []

    async def read() -> None:
        with bus.subscribe() as events:
            got.append((await anext(events)).seq)

    async with anyio.create_task_group() as tg:
        for _ in range(200):
            tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        bus.publish(Happened())
    assert got == [1] * 200
    assert repr(bus) == "<Bus seq=1 subscribers=0 ended=0>"


async def test_a_subscriber_gets_only_what_its_filter_wants_and_what_comes_after_it() -> None:
    bus = make_bus()
    bus.publish(Happened("a"))
    with bus.subscribe(lambda event: event.stream == "a") as events:
        for name in "abab":
            bus.publish(Happened(name))
        assert queued(events) == [(2, 0), (4, 0)]


@pytest.mark.parametrize("bad", ["cannot be stamped", "cannot be looked at"])
async def test_an_event_that_cannot_be_published_leaves_no_hole_in_the_numbers(bad: str) -> None:
    bus = make_bus()
    with bus.subscribe() as events:
        bus.publish(Happened("good"))
        with pytest.raises((OverflowError, LookupError)):
            bus.publish(Happened(bad))
        bus.publish(Happened("good"))
        assert queued(events) == [(1, 0), (2, 0)]


# -- Slow subscribers --------------------------------------------------------------------------------


async def test_a_slow_subscriber_finds_a_gap_where_events_are_missing_and_nobody_else_notices() -> None:
    bus = make_bus()
    with bus.subscribe(capacity=2) as slow, bus.subscribe() as quick:
        for _ in range(5):
            bus.publish(Happened())
        assert queued(slow) == [(3, 3), (4, 0), (5, 0)]
        assert queued(quick) == [(seq, 0) for seq in range(1, 6)]
        for _ in range(3):
            bus.publish(Happened())
        assert queued(slow) == [(6, 1), (7, 0), (8, 0)]
        assert slow.missed == 4
        assert quick.missed == 0


@dataclass
class Model:
    """A subscriber's queue as a list, and the numbers dropped since the last gap that was read."""

    capacity: int
    wanted: int
    queue: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def publish(self, stream: int, seq: int) -> None:
        if self.wanted & (1 << stream):
            self.queue.append(seq)
            if len(self.queue) > self.capacity:
                self.dropped.append(self.queue.pop(0))

    def read(self) -> tuple[int, int] | None:
        if self.dropped:
            read = self.dropped[-1], len(self.dropped)
            self.dropped = []
            return read
        return (self.queue.pop(0), 0) if self.queue else None


def of_streams(wanted: int) -> Callable[[Happened], bool]:
    return lambda event: bool(wanted & (1 << int(event.stream)))


@given(
    readers=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60),
)
def test_any_order_of_publishing_and_reading_gives_the_events_and_gaps_of_a_model(
    readers: list[tuple[int, int]], steps: list[tuple[bool, int]]
) -> None:
    bus = make_bus()
    models = [Model(capacity, wanted) for capacity, wanted in readers]
    subscriptions = [bus.subscribe(of_streams(wanted), capacity=capacity) for capacity, wanted in readers]
    covered = [0] * len(readers)

    def read(index: int) -> bool:
        event = subscriptions[index].next_nowait()
        found = None if event is None else (event.seq, event.missed)
        assert found == models[index].read()
        if found is not None:
            covered[index] += found[1] or 1
        return found is not None

    published = []
    for publish, pick in steps:
        if publish:
            event = bus.publish(Happened(str(pick % 3)))
            published.append(event)
            for model in models:
                model.publish(pick % 3, event.seq)
        else:
            read(pick % len(readers))
    for index, (_, wanted) in enumerate(readers):
        while read(index):
            pass
        assert covered[index] == len(
            list(filter(of_streams(wanted), published))
        )  # nothing is unaccounted for


def test_a_subscriber_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="one event"):
        make_bus().subscribe(capacity=0)


# -- Filters -----------------------------------------------------------------------------------------


async def test_a_filter_that_raises_ends_its_own_subscription_after_what_is_queued() -> None:
    bus = make_bus()

    def broken(event: Happened) -> bool:
        return 1 // (2 - event.seq) == 1

    with bus.subscribe(broken) as own, bus.subscribe() as other:
        for _ in range(3):
            bus.publish(Happened())
        assert queued(other) == [(1, 0), (2, 0), (3, 0)]
        assert await seqs(own, 1) == [1]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await anext(own)


async def test_a_filter_that_raises_a_cancellation_cancels_neither_its_publisher_nor_its_reader() -> None:
    bus = make_bus()

    def broken(_event: Happened) -> bool:
        raise asyncio.CancelledError  # as the result of a cancelled future does

    with bus.subscribe(broken) as own, bus.subscribe() as other:
        bus.publish(Happened())
        assert queued(other) == [(1, 0)]
        with pytest.raises(RuntimeError, match="the filter raised CancelledError"):
            await anext(own)


async def test_a_filter_that_raises_wakes_its_waiting_reader() -> None:
    bus = make_bus()

    def broken(_event: Happened) -> bool:
        raise LookupError("broken filter")

    async def read() -> None:
        with bus.subscribe(broken) as events, pytest.raises(LookupError, match="broken filter"):
            await anext(events)

    async with anyio.create_task_group() as tg:
        tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        bus.publish(Happened())


@pytest.mark.parametrize("late", [False, True])
async def test_a_filter_that_publishes_is_refused_and_nobody_sees_disorder(late: bool) -> None:
    bus = make_bus()

    def echo(event: Happened) -> bool:
        bus.publish(event)
        return True

    with bus.subscribe() as before:
        if late:
            bus.publish(Happened("a", last=True))
        with bus.subscribe(echo, late=late) as own, bus.subscribe() as after:
            if not late:
                bus.publish(Happened())
            bus.publish(Happened())
            with pytest.raises(IllegalStateError, match="filter"):
                await anext(own)
            assert queued(before) == [(1, 0), (2, 0)]
            assert queued(after) == [(2, 0)] if late else [(1, 0), (2, 0)]
    bus.publish(Happened())  # the bus is as usable as before
    assert bus.seq == 3


async def test_a_filter_that_closes_its_own_subscription_gets_nothing_more() -> None:
    bus = make_bus()

    def close(_event: Happened) -> bool:
        events.close()
        return True

    events = bus.subscribe(close)
    bus.publish(Happened())
    assert [event async for event in events] == []


async def test_a_filter_may_close_other_subscriptions_and_make_new_ones() -> None:
    bus = make_bus()
    made: list[Subscription[Happened]] = []

    def meddle(_event: Happened) -> bool:
        if not made:
            other.close()
            made.append(bus.subscribe())
            made.append(bus.subscribe(late=True))
        return True

    with bus.subscribe(meddle) as own, bus.subscribe() as other:
        bus.publish(Happened("a", last=True))
        bus.publish(Happened("b"))
        assert queued(own) == [(1, 0), (2, 0)]
        assert queued(other) == []
        assert [queued(new) for new in made] == [[(2, 0)], [(1, 0), (2, 0)]]


# -- Closing -----------------------------------------------------------------------------------------


async def test_closing_while_iterating_gives_what_is_queued_and_ends() -> None:
    bus = make_bus()
    got = []
    with bus.subscribe() as events:
        for _ in range(3):
            bus.publish(Happened())
        async for event in events:
            got.append(event.seq)
            events.close()
            bus.publish(Happened())
    assert got == [1, 2, 3]


async def test_closing_ends_a_reader_that_waits() -> None:
    bus = make_bus()

    async def close(events: Subscription[Happened]) -> None:
        await anyio.wait_all_tasks_blocked()
        events.close()
        events.close()

    async with anyio.create_task_group() as tg:
        events = bus.subscribe()
        tg.start_soon(close, events)
        assert [event async for event in events] == []
    assert repr(events) == "<Subscription closed missed=0>"


async def test_closing_the_bus_ends_all_streams_also_those_still_to_come() -> None:
    bus = make_bus()
    bus.publish(Happened("a", last=True))

    async def close() -> None:
        await anyio.wait_all_tasks_blocked()
        bus.close()
        bus.close()

    async with anyio.create_task_group() as tg:
        tg.start_soon(close)
        with bus.subscribe() as waiting:
            assert [event async for event in waiting] == []
    bus.publish(Happened("b", last=True))
    with bus.subscribe(late=True) as late:
        assert [event.seq async for event in late] == [1, 2]


# -- Terminal events ---------------------------------------------------------------------------------


async def test_a_late_subscriber_still_gets_terminal_events_before_the_present() -> None:
    bus = make_bus()
    bus.publish(Happened("a"))
    bus.publish(Happened("a", last=True))
    bus.publish(Happened("b", last=True))
    with bus.subscribe(lambda event: event.stream != "b", late=True) as events:
        bus.publish(Happened("c"))
        assert queued(events) == [(2, 0), (4, 0)]


async def test_the_last_terminal_events_are_kept_one_per_stream_in_order_of_their_numbers() -> None:
    bus = make_bus(kept_ends=2)
    for name in "abcb":
        bus.publish(Happened(name, last=True))
    with bus.subscribe(late=True) as events:
        assert queued(events) == [(3, 0), (4, 0)]


async def test_late_events_need_no_room() -> None:
    bus = make_bus()
    for name in "abc":
        bus.publish(Happened(name, last=True))
    with bus.subscribe(late=True, capacity=1) as events:
        bus.publish(Happened("d"))
        assert queued(events) == [(1, 0), (2, 0), (3, 0), (4, 0)]


@pytest.mark.parametrize("dead_before", [False, True])
async def test_a_stream_until_its_end_closes_after_the_terminal_event_early_or_late(
    dead_before: bool,
) -> None:
    bus = make_bus()
    end = Happened("a", last=True)
    if dead_before:
        bus.publish(end)
    with bus.subscribe(lambda event: event.stream == "a", late=True, until_end=True) as events:
        if not dead_before:
            bus.publish(end)
        bus.publish(Happened("a"))
        assert [event.last async for event in events] == [True]
    assert "subscribers=0" in repr(bus)


async def test_a_terminal_event_is_never_among_those_that_a_slow_reader_of_its_stream_misses() -> None:
    bus = make_bus()
    with bus.subscribe(until_end=True, capacity=1) as events:
        for _ in range(5):
            bus.publish(Happened("a"))
        bus.publish(Happened("a", last=True))
        for _ in range(5):
            bus.publish(Happened("b"))
        assert [(event.seq, event.missed) async for event in events] == [(5, 5), (6, 0)]


# -- Reading -----------------------------------------------------------------------------------------


async def test_a_read_cancelled_in_the_moment_of_an_event_takes_nothing() -> None:
    bus = make_bus()
    got: list[int] = []
    events = bus.subscribe()

    async def read(scope: anyio.CancelScope) -> None:
        with scope:
            got.append((await anext(events)).seq)

    for cancel_first in (False, True):
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as tg:
            tg.start_soon(read, scope)
            await anyio.wait_all_tasks_blocked()
            if cancel_first:
                scope.cancel()
            bus.publish(Happened())
            scope.cancel()
    events.close()
    assert got == [1]
    assert queued(events) == [(2, 0)]


async def test_a_second_reader_is_refused_instead_of_stealing_a_wake_up() -> None:
    bus = make_bus()
    got = []
    events = bus.subscribe()

    async def read() -> None:
        got.append((await anext(events)).seq)

    async with anyio.create_task_group() as tg:
        tg.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(IllegalStateError, match="one each"):
            await anext(events)
        bus.publish(Happened())
    events.close()
    assert got == [1]


async def test_a_reader_that_publishes_for_each_event_lets_others_run_and_can_be_cancelled() -> None:
    bus = make_bus()
    scope = anyio.CancelScope()

    async def cancel() -> None:
        scope.cancel()

    async with anyio.create_task_group() as tg:
        tg.start_soon(cancel)
        with scope, bus.subscribe() as events:
            bus.publish(Happened())
            async for event in events:
                assert event.seq < 100
                bus.publish(Happened())
    assert scope.cancelled_caught
