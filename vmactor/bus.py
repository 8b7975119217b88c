"""A bus: what happened, told to everyone who asked, in order and without anyone holding up anyone.

Publishing is synchronous and never waits. Each subscriber has a bounded queue of its own; when that overflows
the oldest events go, and the subscriber finds a gap event in their place that says how many were missed. The
bus numbers its events from 1, without holes. It keeps the last terminal events, so that latecomers still
learn of an end.

The bus is generic: it is told how to number an event, how to make a gap and which events end a stream. It
belongs to one event loop, and like a mailbox it is not for finalizers.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

import anyio
import anyio.lowlevel

from vmactor.errors import IllegalStateError

E = TypeVar("E")


class Bus(Generic[E]):
    """Numbers events and hands them to subscribers.

    Args:
        stamp: Gives the event with its sequence number in it.
        gap: Makes the event that stands for missed ones, from the last one missed and their number.
        ends: The key of the stream that an event ends, or None; the last ``kept_ends`` such events are kept,
            one per key.
        kept_ends: How many.

    Attributes:
        seq: The number of the last event published; 0 if there was none.
    """

    def __init__(
        self,
        *,
        stamp: Callable[[E, int], E],
        gap: Callable[[E, int], E],
        ends: Callable[[E], Hashable | None] = lambda _event: None,
        kept_ends: int = 1024,
    ) -> None:
        self._stamp = stamp
        self._gap = gap
        self._ends = ends
        self._kept_ends = kept_ends
        self._ended: OrderedDict[Hashable, E] = OrderedDict()
        self._subscriptions: dict[Subscription[E], None] = {}
        self._offering = False
        self._closed = False
        self.seq = 0

    def __repr__(self) -> str:
        return f"<Bus seq={self.seq} subscribers={len(self._subscriptions)} ended={len(self._ended)}>"

    def publish(self, event: E) -> E:
        """Number an event, hand it to every subscriber that wants it, and return it as numbered.

        Raises:
            IllegalStateError: Called from a subscriber's filter, which may only look; nothing was published.
            Exception: What ``stamp`` or ``ends`` raised; nothing was published.
        """
        if self._offering:
            raise IllegalStateError("a subscriber's filter may look, not publish: others would see disorder")
        event = self._stamp(event, self.seq + 1)
        key = self._ends(event)
        self.seq += 1
        if key is not None:
            self._ended[key] = event
            self._ended.move_to_end(key)
            if len(self._ended) > self._kept_ends:
                self._ended.popitem(last=False)
        for subscription in tuple(self._subscriptions):
            self._offer(subscription, (event,))
        return event

    def subscribe(
        self,
        wants: Callable[[E], bool] = lambda _event: True,
        *,
        capacity: int = 256,
        late: bool = False,
        until_end: bool = False,
    ) -> "Subscription[E]":
        """Receive from now on what ``wants`` says yes to.

        The bus keeps a subscription, read or not, until it is closed: use it in a ``with`` block.

        Args:
            wants: Called for every event by the publisher; must be quick. If it raises, the subscription
                ends: what is queued can still be read, then its reader gets that error. Nobody else notices.
            capacity: Events that may wait before the oldest are dropped.
            late: Begin with the kept terminal events that ``wants`` says yes to, in order of their numbers.
            until_end: Close after the first wanted terminal event, which is then the last one and not
                dropped.

        Raises:
            ValueError: The capacity is below 1.
        """
        subscription = Subscription(self, wants, capacity, until_end=until_end)
        self._subscriptions[subscription] = None
        if late:
            self._offer(subscription, tuple(self._ended.values()))
        if self._closed:
            subscription.close()
        return subscription

    def close(self) -> None:
        """Close all subscriptions, those that are still to come included. Idempotent.

        Events are numbered and terminal events kept as before, for those who subscribe late.
        """
        self._closed = True
        for subscription in tuple(self._subscriptions):
            subscription.close()

    def _offer(self, subscription: "Subscription[E]", events: Iterable[E]) -> None:
        outer, self._offering = self._offering, True  # a filter may subscribe, with a filter of its own
        try:
            for event in events:
                subscription._offer(event)  # noqa: SLF001 - the two classes are one thing
        finally:
            self._offering = outer

    def _forget(self, subscription: "Subscription[E]") -> None:
        self._subscriptions.pop(subscription, None)


class Subscription(Generic[E]):
    """One subscriber's queue, for one reading task: an async iterator, and a context manager that closes it.

    Iteration ends when the subscription is closed and its queue is empty. A cancelled read takes nothing.

    Attributes:
        missed: Events dropped so far.
    """

    def __init__(self, bus: Bus[E], wants: Callable[[E], bool], capacity: int, *, until_end: bool) -> None:
        if capacity < 1:
            raise ValueError("a subscriber needs room for one event at least")
        self._bus = bus
        self._wants = wants
        self._capacity = capacity
        self._until_end = until_end
        self._queue: deque[E] = deque()
        self._lost: tuple[E, int] | None = None
        self._arrival: anyio.Event | None = None
        self._error: Exception | None = None
        self._closed = False
        self.missed = 0

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._queue)}/{self._capacity}"
        return f"<Subscription {state} missed={self.missed}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        if self._arrival is not None:
            raise IllegalStateError("a task reads this subscription already: have one each")
        if self._queue or self._closed:
            await anyio.lowlevel.checkpoint()  # a reader with much to read lets others run too
        while True:
            event = self.next_nowait()
            if event is not None:
                return event
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._arrival = anyio.Event()
            try:
                await self._arrival.wait()
            finally:
                self._arrival = None

    def next_nowait(self) -> E | None:
        """The next event if one waits, a gap event where some were dropped, or None."""
        if self._lost is not None:
            (last, count), self._lost = self._lost, None
            return self._bus._gap(last, count)  # noqa: SLF001
        return self._queue.popleft() if self._queue else None

    def close(self) -> None:
        """Receive nothing more; what is queued can still be read. Idempotent."""
        self._closed = True
        self._bus._forget(self)  # noqa: SLF001
        if self._arrival is not None:
            self._arrival.set()

    def _offer(self, event: E) -> None:
        try:
            wanted = not self._closed and self._wants(event)
        except Exception as error:  # the subscriber's own affair; it is raised in its task
            self._error = error
            self.close()
            return
        if not wanted or self._closed:  # the filter may have closed it
            return
        if len(self._queue) == self._capacity:
            # What waits is always in one piece, so the dropped ones join those of a gap that is not read yet.
            dropped = self._queue.popleft()
            self.missed += 1
            self._lost = (dropped, self._lost[1] + 1 if self._lost else 1)
        self._queue.append(event)
        if self._arrival is not None:
            self._arrival.set()
        if self._until_end and self._bus._ends(event) is not None:  # noqa: SLF001
            self.close()
