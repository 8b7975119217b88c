"""A bus's streams: filters without calls, ways to overflow, snapshots, replay, and the chain of numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.bus import Bus, Overflow, Subscription
from vmactor.errors import IllegalArgumentError, IllegalStateError, SlowSubscriberError

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Happened:
    """An event: about what, its number, the number before it in the stream; ``missed`` makes it a gap."""

    topic: str = ""
    seq: int = 0
    previous: int = field(default=-1, compare=False)
    missed: int = 0
    present: object = None


@dataclass(frozen=True)
class Opened(Happened):
    """Of another kind."""


@dataclass(frozen=True)
class Ended(Happened):
    """Terminal."""


def make_bus(history: int = 0, **more: Any) -> Bus[Happened]:
    return Bus(
        stamp=lambda event, seq: replace(event, seq=seq),
        gap=lambda last, missed: Happened("gap", last.seq, missed=missed),
        ends=lambda event: event.topic if isinstance(event, Ended) else None,
        topic=lambda event: event.topic,
        link=lambda event, previous: replace(event, previous=previous),
        history=history,
        forgotten=lambda seq, missed: Happened("forgotten", seq, missed=missed),
        **more,
    )


def queued(subscription: Subscription[Happened]) -> list[Happened]:
    """Everything that can be read now."""
    found = []
    while (event := subscription.next_nowait()) is not None:
        found.append(event)
    return found


def seqs(subscription: Subscription[Happened]) -> list[tuple[int, int]]:
    """Everything that can be read now, as (seq, missed)."""
    return [(event.seq, event.missed) for event in queued(subscription)]


def links(events: Iterable[Happened]) -> list[tuple[int, int]]:
    """Of each event, the number of the one before it and its own."""
    return [(event.previous, event.seq) for event in events]


# -- Filters -----------------------------------------------------------------------------------------


async def test_a_stream_has_the_topics_and_kinds_that_were_asked_for_and_that_its_filter_wants() -> None:
    bus = make_bus()
    with (
        bus.subscribe() as all_of_it,
        bus.subscribe(topics=["a", "b"]) as topics,
        bus.subscribe(kinds=[Opened, Ended]) as kinds,
        bus.subscribe(lambda event: event.seq > 3, topics=["a"], kinds=[Opened]) as strict,
        bus.subscribe(topics=()) as none,
    ):
        for event in (Opened("a"), Happened("a"), Opened("b"), Opened("a"), Ended("c")):
            bus.publish(event)
        assert [seq for seq, _ in seqs(all_of_it)] == [1, 2, 3, 4, 5]
        assert [seq for seq, _ in seqs(topics)] == [1, 2, 3, 4]
        assert [seq for seq, _ in seqs(kinds)] == [1, 3, 4, 5]
        assert [seq for seq, _ in seqs(strict)] == [4]
        assert seqs(none) == []


async def test_publishing_does_not_call_the_filters_of_subscribers_to_other_topics_or_kinds() -> None:
    bus = make_bus()
    looked_at = []

    def wants(event: Happened) -> bool:
        looked_at.append(event.seq)
        return True

    with bus.subscribe(wants, topics=["a"]), bus.subscribe(wants, kinds=[Ended]):
        for event in (Happened("b"), Happened("a"), Ended("b")):
            bus.publish(event)
    assert looked_at == [2, 3]


async def test_a_bus_keeps_nothing_of_topics_without_subscribers() -> None:
    bus = make_bus()
    for _ in range(3):
        with bus.subscribe(topics=["a", "b"]), bus.subscribe(topics=["b"]) as other:
            other.close()
            other.close()
    assert not bus._by_topic
    assert repr(bus) == "<Bus seq=0 subscribers=0 ended=0>"


async def test_who_subscribes_in_a_filter_gets_the_event_that_is_being_published_once_at_most() -> None:
    bus = make_bus(history=4)
    made: list[Subscription[Happened]] = []

    def meddle(_event: Happened) -> bool:
        if not made:
            made.extend([bus.subscribe(), bus.subscribe(late=True), bus.subscribe(topics=["a"], after=0)])
        return True

    with bus.subscribe(meddle, topics=["a"]) as own:
        bus.publish(Ended("a"))
        assert seqs(own) == [(1, 0)]
        assert [seqs(new) for new in made] == [[], [(1, 0)], [(1, 0)]]


@pytest.mark.parametrize("unheard_of", ["topic", "kind", "ends"])
async def test_an_event_of_which_something_cannot_be_told_leaves_no_hole_in_the_numbers(
    unheard_of: str,
) -> None:
    def tell(event: Happened) -> Any:
        return [] if event.topic == "bad" else event.topic  # lists are no keys

    told: dict[str, Any] = {unheard_of: tell}
    bus = Bus[Happened](stamp=lambda event, seq: replace(event, seq=seq), gap=lambda last, _: last, **told)
    with bus.subscribe() as events, bus.subscribe(kinds=["good"]):
        bus.publish(Happened("good"))
        with pytest.raises(TypeError):
            bus.publish(Happened("bad"))
        bus.publish(Happened("good"))
        assert seqs(events) == [(1, 0), (2, 0)]


# -- Overflow: disconnect ----------------------------------------------------------------------------


async def test_a_subscriber_can_ask_to_be_disconnected_and_is_told_why_and_how_many_were_waiting() -> None:
    bus = make_bus(history=10)
    with bus.subscribe(capacity=2, overflow=Overflow.DISCONNECT) as slow, bus.subscribe() as quick:
        for _ in range(4):
            bus.publish(Happened())
        assert [(await anext(slow)).seq for _ in range(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(SlowSubscriberError, match=r"2 events waited.* room for 2") as caught:
                await anext(slow)
            assert (caught.value.waiting, caught.value.after) == (2, 2)
        with pytest.raises(SlowSubscriberError):
            slow.next_nowait()
        assert seqs(quick) == [(1, 0), (2, 0), (3, 0), (4, 0)]
        assert repr(bus).endswith("subscribers=1 ended=0>")
    with bus.subscribe(after=caught.value.after) as again:
        assert links(queued(again)) == [(2, 3), (3, 4)]


# -- Overflow: wait ----------------------------------------------------------------------------------


async def test_a_publisher_that_waits_goes_on_when_there_is_room_and_nobody_else_waits() -> None:
    bus = make_bus()
    went_on = anyio.Event()

    async def publish() -> None:
        assert (await bus.publish_and_wait(Happened("third"))).seq == 3
        went_on.set()

    async with anyio.create_task_group() as tg:
        with bus.subscribe(capacity=2, overflow=Overflow.WAIT) as slow, bus.subscribe() as quick:
            for name in ("first", "second"):
                await bus.publish_and_wait(Happened(name))
            tg.start_soon(publish)
            await anyio.wait_all_tasks_blocked()
            assert not went_on.is_set()
            assert seqs(quick) == [(1, 0), (2, 0), (3, 0)]
            assert (await anext(slow)).topic == "first"
            with anyio.fail_after(5):
                await went_on.wait()
            assert seqs(slow) == [(2, 0), (3, 0)]


async def test_whoever_cannot_wait_drops_the_oldest_even_of_a_subscriber_that_asks_to_be_waited_for() -> None:
    bus = make_bus()
    with bus.subscribe(capacity=2, overflow=Overflow.WAIT) as slow:
        for _ in range(5):
            bus.publish(Happened())
        assert seqs(slow) == [(3, 3), (4, 0), (5, 0)]


async def test_publishing_and_waiting_does_not_yield_where_nobody_has_to_be_waited_for() -> None:
    bus = make_bus()
    with bus.subscribe(capacity=1) as slow, bus.subscribe(capacity=3, overflow=Overflow.WAIT) as roomy:
        with anyio.CancelScope() as scope:
            scope.cancel()
            for _ in range(3):
                await bus.publish_and_wait(Happened())
        assert seqs(slow) == [(2, 2), (3, 0)]
        assert seqs(roomy) == [(1, 0), (2, 0), (3, 0)]


async def test_a_cancelled_publisher_does_not_take_its_event_back_and_is_waited_for_no_more() -> None:
    bus = make_bus()
    with bus.subscribe(capacity=1, overflow=Overflow.WAIT) as slow:
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(bus.publish_and_wait, Happened())
            await anyio.wait_all_tasks_blocked()
            tg.cancel_scope.cancel()
        assert not slow._publishers
        assert seqs(slow) == [(2, 2), (3, 0)]


async def test_publishers_that_are_cancelled_one_after_the_other_do_not_fill_a_queue() -> None:
    bus = make_bus()
    with (
        bus.subscribe(capacity=2, overflow=Overflow.WAIT) as stuck,
        bus.subscribe(capacity=5, overflow=Overflow.WAIT) as roomier,
    ):
        for _ in range(100):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await bus.publish_and_wait(Happened())
        assert (len(stuck._queue), len(roomier._queue)) == (2, 5)
        assert seqs(stuck) == [(98, 98), (99, 0), (100, 0)]


@pytest.mark.virtual_time
async def test_what_one_publisher_waits_for_is_not_dropped_when_another_is_cancelled() -> None:
    bus = make_bus()
    with bus.subscribe(capacity=1, overflow=Overflow.WAIT) as slow:
        async with anyio.create_task_group() as tg:
            await bus.publish_and_wait(Happened())
            with anyio.move_on_after(1):
                tg.start_soon(bus.publish_and_wait, Happened())
                await anyio.lowlevel.checkpoint()
                await bus.publish_and_wait(Happened())
            # One still waits: one more than there is room for.
            assert seqs(slow) == [(1, 1), (2, 0), (3, 0)]


@pytest.mark.parametrize("patience", [-1.0, math.nan])
async def test_a_patience_that_is_none_is_refused(patience: float) -> None:
    with pytest.raises(ValueError, match="patience"):
        make_bus().subscribe(patience=patience)


@pytest.mark.virtual_time
async def test_patience_with_a_slow_subscriber_ends_and_it_is_disconnected() -> None:
    bus = make_bus()
    with (
        bus.subscribe(capacity=1, overflow=Overflow.WAIT, patience=3) as stuck,
        bus.subscribe(capacity=1, overflow=Overflow.WAIT, patience=5) as also_stuck,
        bus.subscribe() as quick,
    ):
        await bus.publish_and_wait(Happened())
        began = anyio.current_time()
        await bus.publish_and_wait(Happened())
        # Not 8: everybody's patience begins with the event.
        assert anyio.current_time() - began == pytest.approx(5)
        await bus.publish_and_wait(Happened())
        assert anyio.current_time() - began == pytest.approx(5)
        for slow in (stuck, also_stuck):
            assert [(await anext(slow)).seq for _ in range(2)] == [1, 2]
            with pytest.raises(SlowSubscriberError):
                await anext(slow)
        assert len(seqs(quick)) == 3


@pytest.mark.parametrize("who", ["subscription", "bus"])
async def test_closing_ends_the_wait_of_publishers(who: str) -> None:
    bus = make_bus()
    with bus.subscribe(capacity=1, overflow=Overflow.WAIT) as slow:
        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(bus.publish_and_wait, Happened())
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(5):
                (slow if who == "subscription" else bus).close()
        assert len([event async for event in slow]) == 3


async def test_with_publishers_that_wait_a_slow_reader_gets_everything_and_little_is_queued() -> None:
    bus = make_bus()
    got: list[Happened] = []
    most = 0

    async def publish(topic: str) -> None:
        for _ in range(50):
            await bus.publish_and_wait(Happened(topic))

    async with anyio.create_task_group() as publishers:
        with bus.subscribe(capacity=4, overflow=Overflow.WAIT) as events:
            for topic in "abc":
                publishers.start_soon(publish, topic)
            async for event in events:
                got.append(event)
                most = max(most, len(events._queue))
                for _ in range(3):
                    await anyio.lowlevel.checkpoint()
                if len(got) == 150:
                    break
    assert [event.seq for event in got] == list(range(1, 151))
    assert most <= 4 + 3


# -- Snapshots ---------------------------------------------------------------------------------------


def with_snapshots(history: int = 0) -> tuple[Bus[Happened], list[str]]:
    """A bus of which a list is the present."""
    present: list[str] = []

    def snapshot(seq: int, topics: frozenset[object] | None) -> Happened:
        shown = [topic for topic in present if topics is None or topic in topics]
        return Happened("present", seq, present=shown)

    return make_bus(history, snapshot=snapshot), present


async def test_a_stream_can_begin_with_a_snapshot_and_has_everything_after_it() -> None:
    bus, present = with_snapshots()
    for topic in "ab":
        present.append(topic)
        bus.publish(Happened(topic))
    with bus.subscribe(snapshot=True) as everything, bus.subscribe(topics=["b"], snapshot=True) as one:
        present.append("c")
        bus.publish(Happened("c"))
        bus.publish(Happened("b"))
        first, *rest = queued(everything)
        assert first.present == ["a", "b"]
        assert links([first, *rest]) == [(0, 2), (2, 3), (3, 4)]
        first, *rest = queued(one)
        assert first.present == ["b"]
        assert links([first, *rest]) == [(0, 2), (2, 4)]


async def test_a_snapshot_is_never_among_the_events_that_a_slow_reader_misses() -> None:
    bus, _ = with_snapshots()
    with bus.subscribe(snapshot=True, capacity=1) as slow:
        for _ in range(3):
            bus.publish(Happened())
        got = queued(slow)
        assert [(event.topic, event.missed) for event in got] == [("present", 0), ("gap", 2), ("", 0)]
        assert links(got) == [(0, 0), (0, 2), (2, 3)]


async def test_a_snapshot_that_fails_or_publishes_is_an_error_and_leaves_no_subscription() -> None:
    def publishes(_seq: int, _topics: object) -> Happened:
        return bus.publish(Happened())

    bus = make_bus(snapshot=publishes)
    with pytest.raises(IllegalStateError, match="look, not publish"):
        bus.subscribe(snapshot=True)
    assert repr(bus) == "<Bus seq=0 subscribers=0 ended=0>"
    bus.publish(Happened())
    with pytest.raises(IllegalStateError, match="no snapshots"):
        make_bus().subscribe(snapshot=True)


# -- Replay ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3, 7, 8])
async def test_a_stream_can_begin_after_any_number_that_the_history_still_knows(after: int) -> None:
    bus = make_bus(history=8)
    for _ in range(8):
        bus.publish(Happened())
    with bus.subscribe(after=after, capacity=1) as events:  # what it begins with needs no room
        bus.publish(Happened())
        assert links(queued(events)) == [(seq - 1, seq) for seq in range(after + 1, 10)]


async def test_what_the_history_no_longer_knows_is_a_gap() -> None:
    bus = make_bus(history=3)
    for topic in "abcabc":
        bus.publish(Happened(topic))
    with bus.subscribe(after=1) as events, bus.subscribe(topics=["a"], after=0) as filtered:
        bus.publish(Happened("a"))
        got = queued(events)
        assert [(event.topic, event.seq, event.missed) for event in got[:2]] == [
            ("forgotten", 3, 2),
            ("a", 4, 0),
        ]
        assert links(got) == [(1, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
        assert events.missed == 2
        # Nobody knows how many of the three were about "a".
        assert links(queued(filtered)) == [(0, 3), (3, 4), (4, 7)]
        assert filtered.missed == 3


async def test_a_replay_ends_with_the_streams_end_if_that_is_wanted() -> None:
    bus = make_bus(history=10)
    for event in (Happened("a"), Ended("b"), Ended("a"), Happened("a")):
        bus.publish(event)
    with bus.subscribe(topics=["a"], after=0, until_end=True) as events:
        assert [event.seq async for event in events] == [1, 3]


async def test_a_replay_from_a_number_that_is_not_of_this_bus_is_refused() -> None:
    bus = make_bus(history=3)
    bus.publish(Happened())
    for after in (-1, 2):
        with pytest.raises(IllegalArgumentError, match="the last one of this bus is 1"):
            bus.subscribe(after=after)
    with pytest.raises(IllegalStateError, match="no history"):
        make_bus().subscribe(after=0)
    assert repr(bus) == "<Bus seq=1 subscribers=0 ended=0>"


@pytest.mark.parametrize(
    "begin", [{"late": True, "after": 0}, {"late": True, "snapshot": True}, {"snapshot": True, "after": 0}]
)
async def test_a_stream_begins_in_one_way(begin: dict[str, Any]) -> None:
    bus, _ = with_snapshots(history=3)
    with pytest.raises(ValueError, match="one way"):
        bus.subscribe(**begin)


def test_a_bus_with_a_history_must_be_able_to_tell_of_its_bounds() -> None:
    with pytest.raises(ValueError, match="forgotten"):
        Bus[int](stamp=lambda _event, seq: seq, gap=lambda last, _missed: last, history=1)


# -- The chain, against a model ----------------------------------------------------------------------


class Reader:
    """A reader that comes back after the last number that it saw; and what it must see."""

    def __init__(
        self, bus: Bus[Happened], topics: str, capacity: int, overflow: Overflow, history: int
    ) -> None:
        self.bus, self.topics, self.capacity = bus, topics, capacity
        self.overflow, self.history = overflow, history
        self.seen = 0
        self.everything: list[int] = []  # wanted numbers
        self.accounted: set[int] = set()
        self.connect()

    def connect(self) -> None:
        self.subscription = self.bus.subscribe(
            topics=self.topics, capacity=self.capacity, overflow=self.overflow, after=self.seen
        )
        known = max(0, self.bus.seq - self.history)
        self.gap = (known, known - self.seen) if known > self.seen else None
        self.queue = [seq for seq in self.everything if seq > max(known, self.seen)]
        self.limit = self.capacity + len(self.queue)
        self.cut_off = False

    def published(self, event: Happened) -> None:
        if event.topic not in self.topics:
            return
        self.everything.append(event.seq)
        if self.cut_off:
            return
        if len(self.queue) == self.limit:
            if self.overflow is Overflow.DISCONNECT:
                self.cut_off = True
                return
            self.gap = (self.queue.pop(0), (self.gap[1] if self.gap else 0) + 1)
        self.queue.append(event.seq)

    def read(self) -> bool:
        """Read one event, check it, and tell whether there was one."""
        try:
            event = self.subscription.next_nowait()
        except SlowSubscriberError as error:
            assert self.cut_off
            assert not self.queue
            assert error.after == self.seen  # noqa: PT017 - an error is one of several good answers
            self.connect()
            return True
        if event is None:
            assert (self.gap, self.queue, self.cut_off) == (None, [], False)
            return False
        assert event.previous == self.seen  # what makes a hole impossible to hide
        if self.gap:
            assert (event.seq, event.missed) == self.gap
            self.accounted.update(range(self.seen + 1, event.seq + 1))
            self.gap = None
        else:
            assert (event.seq, event.missed) == (self.queue.pop(0), 0)
            self.accounted.add(event.seq)
        self.seen = event.seq
        return True

    def leave_and_come_back(self) -> None:
        self.subscription.close()
        self.connect()


@given(
    history=st.integers(1, 8),
    readers=st.lists(
        st.tuples(
            st.sampled_from(["a", "ab", "abc"]),
            st.integers(1, 4),
            st.sampled_from([Overflow.DROP_OLDEST, Overflow.DISCONNECT, Overflow.WAIT]),
        ),
        min_size=1,
        max_size=3,
    ),
    steps=st.lists(st.tuples(st.sampled_from("ppprrl"), st.integers(0, 5)), max_size=80),
)
def test_any_order_of_publishing_reading_and_coming_back_leaves_a_chain_without_an_unannounced_hole(
    history: int, readers: list[tuple[str, int, Overflow]], steps: list[tuple[str, int]]
) -> None:
    bus = make_bus(history)
    models = [Reader(bus, topics, capacity, overflow, history) for topics, capacity, overflow in readers]
    for step, pick in steps:
        reader = models[pick % len(models)]
        if step == "p":
            event = bus.publish(Happened("abc"[pick % 3]))
            for model in models:
                model.published(event)
        elif step == "r":
            reader.read()
        else:
            reader.leave_and_come_back()
    for model in models:
        while model.read():
            pass
        assert model.accounted >= set(model.everything)
        model.subscription.close()
    assert repr(bus).endswith("subscribers=0 ended=0>")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([Happened, Opened, Ended])), max_size=30))
def test_topics_and_kinds_select_what_a_filter_would(published: list[tuple[str, type[Happened]]]) -> None:
    bus = make_bus(history=30)
    asked: list[tuple[list[str] | None, Any]] = [
        (topics, kinds)
        for topics in (None, ["a"], ["a", "c"])
        for kinds in (None, [Opened], [Ended, Happened])
    ]
    plain = [
        bus.subscribe(
            lambda e, t=topics, k=kinds: (t is None or e.topic in t) and (k is None or type(e) in k)  # type: ignore[misc]
        )
        for topics, kinds in asked
    ]
    quick = [bus.subscribe(topics=topics, kinds=kinds) for topics, kinds in asked]
    for topic, kind in published:
        bus.publish(kind(topic))
    replayed = [bus.subscribe(topics=topics, kinds=kinds, after=0) for topics, kinds in asked]
    for one, other, later in zip(plain, quick, replayed, strict=True):
        wanted = queued(one)
        assert links(wanted) == links(queued(other)) == links(queued(later))
