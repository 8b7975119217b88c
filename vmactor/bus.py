"""A bus: what happened, told to everyone who asked, in order and without anyone holding up anyone.

``publish`` is synchronous and never waits. Each subscriber has a bounded queue of its own, and names what
happens when that overflows: the oldest events go, and a gap event in their place says how many were missed;
or the subscriber is disconnected with an error; or whoever publishes with ``publish_and_wait`` waits for it.
The bus numbers its events from 1, without holes. It keeps the last terminal events, so that latecomers still
learn of an end, and a bounded history, out of which a reader that was away can catch up.

A stream is what one subscription gets. The bus can put into each event of a stream the number of the one
before it (``link``), so that whoever reads a copy of the stream, in another process or years later, can prove
that nothing is missing. In the first event it is 0, or the number that was asked for with ``after``; in all
others the number of the event or gap before. It is fixed when an event enters the queue, not when it leaves,
so the proof covers the queue.

The bus is generic: it is told how to number an event, how to make a gap, which events end a stream, and more.
It belongs to one event loop, and like a mailbox it is not for finalizers.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final, Generic, TypeVar

import anyio

from vmactor.errors import IllegalArgumentError, IllegalStateError
from vmactor.subscription import Choice, Overflow, Subscription, Terms

__all__ = ["PATIENCE_SECONDS", "Bus", "Overflow", "Subscription"]

E = TypeVar("E")

PATIENCE_SECONDS: Final = 10.0
"""How long a publisher that waits for a subscriber does so, unless the subscriber says otherwise."""


@dataclass(frozen=True, slots=True)
class BusStatistics:
    """How a bus does.

    Attributes:
        subscribers: How many there are.
        queued: Events that wait, in all queues together.
        deepest: In the fullest queue.
        missed: Events that subscribers missed, those included that are gone.
    """

    subscribers: int
    queued: int
    deepest: int
    missed: int


class Bus(Generic[E]):
    """Numbers events and hands them to subscribers.

    Args:
        stamp: Gives the event with its sequence number in it.
        gap: Makes the event that stands for missed ones, from the last one missed and their number.
        ends: The key of the stream that an event ends, or None; the last ``kept_ends`` such events are kept,
            one per key.
        kept_ends: How many.
        topic: What an event is about; subscriptions to other topics cost its publisher nothing.
        kind: Which kind of event it is; by default, its class.
        link: Gives the event with the number of the one before it in the stream in it. Called when the event
            is read, by its reader, so give it back as it is where nothing is to be changed.
        snapshot: Makes an event that holds the present: all that a newcomer has to know of what was before.
            It gets the number of the last event published, and the topics that the subscriber asked for,
            None for all.
        history: How many events are kept for subscribers that were away.
        forgotten: Makes the event that stands for those that the history no longer holds, from the number of
            the last one and how many numbers they are.
        record: Gets each event with its number before any subscriber has it; must not raise.

    Attributes:
        seq: The number of the last event published; 0 if there was none.

    Raises:
        ValueError: There is a history, and no ``forgotten`` to tell of its bounds.
    """

    def __init__(
        self,
        *,
        stamp: Callable[[E, int], E],
        gap: Callable[[E, int], E],
        ends: Callable[[E], Hashable | None] = lambda _event: None,
        kept_ends: int = 1024,
        topic: Callable[[E], Hashable] = lambda _event: None,
        kind: Callable[[E], Hashable] = type,
        link: Callable[[E, int], E] | None = None,
        snapshot: Callable[[int, frozenset[Hashable] | None], E] | None = None,
        history: int = 0,
        forgotten: Callable[[int, int], E] | None = None,
        record: Callable[[E], object] | None = None,
    ) -> None:
        if history and forgotten is None:
            raise ValueError("a history ends somewhere: say with 'forgotten' what is told of that")
        self._terms = Terms(stamp, gap, ends, topic, kind, link, snapshot, forgotten)
        self._kept_ends = kept_ends
        self._ended: OrderedDict[Hashable, tuple[int, E]] = OrderedDict()
        self._history: deque[E] = deque(maxlen=history)
        self._subscriptions: dict[Subscription[E], None] = {}
        # The same again, by what they are about.
        self._by_topic: dict[Hashable, dict[Subscription[E], None]] = {}
        self._about_all: dict[Subscription[E], None] = {}
        self._offering = False
        self._closed = False
        self._record = record
        self._missed = 0  # by those that are gone
        self.seq = 0

    def __repr__(self) -> str:
        return f"<Bus seq={self.seq} subscribers={len(self._subscriptions)} ended={len(self._ended)}>"

    def go_on(self, seq: int, past: Iterable[E]) -> None:
        """Go on where another bus ended; call it before anything is published or subscribed to.

        Args:
            seq: The number of the last event.
            past: The last events, without a hole, up to that one; none if they are not known.
        """
        known = tuple(past)
        self.seq = seq
        for number, event in enumerate(known, seq - len(known) + 1):
            self._history.append(event)
            self._keep_end(self._terms.ends(event), number, event)

    def statistics(self) -> BusStatistics:
        """How it does now; takes time by the number of subscribers."""
        depths = [subscription.queued for subscription in self._subscriptions]
        missed = self._missed + sum(subscription.missed for subscription in self._subscriptions)
        return BusStatistics(len(depths), sum(depths), max(depths, default=0), missed)

    # -- Publishing ------------------------------------------------------------------------------

    def publish(self, event: E) -> E:
        """Number an event, hand it to every subscriber that wants it, and return it as numbered.

        Raises:
            IllegalStateError: Called from a subscriber's filter, which may only look; nothing was published.
            Exception: What ``stamp``, ``ends``, ``topic`` or ``kind`` raised; nothing was published.
        """
        return self._publish(event, None)

    def publish_aside(self, event: E) -> None:
        """Tell an event to those only who asked for its kind by name; nothing is left of it.

        It has no number of its own, but that of the last event published, and is in no history. A queue that
        is full drops it as it would drop any other.

        Raises:
            IllegalStateError: Called from a subscriber's filter.
        """
        if self._offering:
            raise IllegalStateError("a subscriber's filter may look, not publish: others would see disorder")
        terms = self._terms
        event = terms.stamp(event, self.seq)
        kind = terms.kind(event)
        subscriptions = (*self._by_topic.get(terms.topic(event), ()), *self._about_all)
        with self._no_publishing():
            for subscription in subscriptions:
                if subscription.choice.kinds is not None and kind in subscription.choice.kinds:
                    subscription.offer(event, self.seq, None, last=False)

    def asked_for(self, kind: Hashable) -> bool:
        """Whether anybody asked for a kind by name."""
        return any(kind in (subscription.choice.kinds or ()) for subscription in self._subscriptions)

    async def publish_and_wait(self, event: E) -> E:
        """Publish an event, then wait until all subscribers that asked for it (``Overflow.WAIT``) have room.

        The event is published, and everybody else has it, before the wait; a cancellation does not take it
        back, but ends the wait: where more is queued than others still wait for, the oldest events go. A
        subscriber that has no room within its patience is disconnected. Does not yield if nobody has to be
        waited for.

        Raises:
            Exception: As for ``publish``.
        """
        crowded: list[Subscription[E]] = []
        event = self._publish(event, crowded)
        if crowded:
            now = anyio.current_time()
            try:
                for subscription in crowded:
                    await subscription.wait_for_room(now)
            finally:
                for subscription in crowded:
                    subscription.no_longer_awaited()
        return event

    def _publish(self, event: E, crowded: list[Subscription[E]] | None) -> E:
        if self._offering:
            raise IllegalStateError("a subscriber's filter may look, not publish: others would see disorder")
        terms, seq = self._terms, self.seq + 1
        event = terms.stamp(event, seq)
        key = terms.ends(event)
        kind = terms.kind(event)
        hash((key, kind))  # now, not when the event has its number
        # Copied, because filters may subscribe and close; those who come now are not meant any more.
        subscriptions = (*self._by_topic.get(terms.topic(event), ()), *self._about_all)
        self.seq = seq
        if self._record is not None:
            self._record(event)
        self._history.append(event)
        self._keep_end(key, seq, event)
        self._offering = True
        try:
            for subscription in subscriptions:
                kinds = subscription.choice.kinds
                if kinds is None or kind in kinds:
                    subscription.offer(event, seq, crowded, last=key is not None)
        finally:
            self._offering = False
        return event

    def _keep_end(self, key: Hashable | None, seq: int, event: E) -> None:
        if key is not None:
            self._ended[key] = seq, event
            self._ended.move_to_end(key)
            if len(self._ended) > self._kept_ends:
                self._ended.popitem(last=False)

    # -- Subscribing -----------------------------------------------------------------------------

    def subscribe(
        self,
        wants: Callable[[E], bool] | None = None,
        *,
        topics: Iterable[Hashable] | None = None,
        kinds: Iterable[Hashable] | None = None,
        capacity: int = 256,
        overflow: Overflow = Overflow.DROP_OLDEST,
        patience: float = PATIENCE_SECONDS,
        late: bool = False,
        snapshot: bool = False,
        after: int | None = None,
        until_end: bool = False,
    ) -> Subscription[E]:
        """Receive from now on the events that pass all filters given.

        The bus keeps a subscription, read or not, until it is closed: use it in a ``with`` block. A stream
        begins with the present, or with one of ``late``, ``snapshot`` and ``after``; what those begin it with
        needs no room.

        Args:
            wants: Called for every event that passes the other filters, by its publisher; must be quick. If
                it raises, the subscription ends: what is queued can still be read, then its reader gets that
                error. Nobody else notices.
            topics: Only events about these.
            kinds: Only events of these kinds.
            capacity: Events that may wait before ``overflow`` says what happens.
            overflow: What happens to a slow reader.
            patience: Seconds for which a publisher waits for this subscriber, with ``Overflow.WAIT``.
            late: Begin with the kept terminal events that pass the filters, in order of their numbers.
            snapshot: Begin with an event that holds the present, for the topics asked for.
            after: Begin with what came after the event of this number; with a gap, if that is no longer known
                in full. Nobody knows then how much of it would have passed the filters: all of it counts.
            until_end: Close after the first wanted terminal event, which is then the last one and not
                dropped.

        Raises:
            ValueError: The capacity is below 1, the patience is below 0 or not a number, or the stream is to
                begin in several ways.
            IllegalStateError: This bus keeps no history, or makes no snapshots.
            IllegalArgumentError: No event of this bus has the number ``after`` yet.
            Exception: What the bus's ``snapshot`` raised.
        """
        if late + snapshot + (after is not None) > 1:
            raise ValueError("a stream begins in one way: 'late', 'snapshot' or 'after'")
        choice = Choice(
            wants,
            None if topics is None else frozenset(topics),
            None if kinds is None else frozenset(kinds),
            capacity,
            overflow,
            patience,
            until_end,
        )
        subscription = Subscription(self._terms, choice, self._forget)
        with self._no_publishing():
            past: Iterable[tuple[int, E]] = ()
            if late:
                past = tuple(self._ended.values())
            elif snapshot:
                subscription.begin_with(self._present(choice.topics), self.seq)
            elif after is not None:
                past = self._replay(subscription, after)
            self._remember(subscription)
            subscription.offer_past(past)
        if self._closed:
            subscription.close()
        return subscription

    def close(self) -> None:
        """Close all subscriptions, those that are still to come included. Idempotent.

        Events are numbered and kept as before, for those who subscribe late.
        """
        self._closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()

    @contextmanager
    def _no_publishing(self) -> Iterator[None]:
        outer, self._offering = self._offering, True  # a filter may subscribe, with a filter of its own
        try:
            yield
        finally:
            self._offering = outer

    def _present(self, topics: frozenset[Hashable] | None) -> E:
        if self._terms.snapshot is None:
            raise IllegalStateError("this bus makes no snapshots: give it a 'snapshot'")
        return self._terms.snapshot(self.seq, topics)

    def _replay(self, subscription: Subscription[E], after: int) -> Iterable[tuple[int, E]]:
        if not self._history.maxlen:
            raise IllegalStateError("this bus keeps no history: give it a 'history' and 'forgotten'")
        if not 0 <= after <= self.seq:
            raise IllegalArgumentError(
                f"no event {after}: the last one of this bus is {self.seq}; begin with a snapshot, or with 0"
            )
        known = self.seq - len(self._history)  # every number above is in the history
        subscription.begin_after(after, missed=max(0, known - after))
        start = max(after, known)
        return tuple(enumerate(islice(self._history, start - known, None), start + 1))

    def _remember(self, subscription: Subscription[E]) -> None:
        self._subscriptions[subscription] = None
        if subscription.choice.topics is None:
            self._about_all[subscription] = None
        else:
            for topic in subscription.choice.topics:
                self._by_topic.setdefault(topic, {})[subscription] = None

    def _forget(self, subscription: Subscription[E]) -> None:
        if subscription not in self._subscriptions:
            return
        del self._subscriptions[subscription]
        self._missed += subscription.missed
        self._about_all.pop(subscription, None)
        for topic in subscription.choice.topics or ():
            subscriptions = self._by_topic[topic]
            del subscriptions[subscription]
            if not subscriptions:
                del self._by_topic[topic]
