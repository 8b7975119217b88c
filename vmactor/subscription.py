"""One subscriber's stream of a bus's events: its queue, its gaps, and what happens when it is too slow.

The reader's side is public: iterate, ``next_nowait``, ``close``. The rest is for ``vmactor/bus.py``, which
fills the queue; the two are one thing in two files.
"""

import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Final, Generic, Self, TypeVar

import anyio
import anyio.lowlevel

from vmactor.errors import IllegalStateError, SlowSubscriberError
from vmactor.waiting import Waiter, waiter_type, wake, within

E = TypeVar("E")

BURST: Final = 32
"""Events that a reader takes without letting other tasks run."""


class Overflow(Enum):
    """What happens when an event finds a subscriber's queue full."""

    DROP_OLDEST = "drop oldest"
    """The oldest events go; a gap event in their place says how many."""

    DISCONNECT = "disconnect"
    """The subscription ends; after what is queued, its reader gets ``SlowSubscriberError``."""

    WAIT = "wait"
    """``publish_and_wait`` waits for room, up to the subscriber's patience, and then disconnects it. Of those
    who cannot wait, ``publish``, the oldest events are dropped as by default."""


@dataclass(frozen=True, slots=True)
class Terms(Generic[E]):
    """How a bus deals with events that it knows nothing about; see ``Bus``."""

    stamp: Callable[[E, int], E]
    gap: Callable[[E, int], E]
    ends: Callable[[E], Hashable | None]
    topic: Callable[[E], Hashable]
    kind: Callable[[E], Hashable]
    link: Callable[[E, int], E] | None
    snapshot: Callable[[int, frozenset[Hashable] | None], E] | None
    forgotten: Callable[[int, int], E] | None


@dataclass(frozen=True, slots=True)
class Choice(Generic[E]):
    """What a subscriber asked for; see ``Bus.subscribe``.

    Raises:
        ValueError: The capacity is below 1, or the patience is negative or not a number.
    """

    wants: Callable[[E], bool] | None
    topics: frozenset[Hashable] | None
    kinds: frozenset[Hashable] | None
    capacity: int
    overflow: Overflow
    patience: float
    until_end: bool

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError("a subscriber needs room for one event at least")
        if not self.patience >= 0:
            raise ValueError(f"a patience of {self.patience} s cannot be: give 0 or more, or infinity")


class Subscription(Generic[E]):
    """One subscriber's queue, for one reading task: an async iterator, and a context manager that closes it.

    Iteration ends when the subscription is closed and its queue is empty. A cancelled read takes nothing.

    Attributes:
        missed: Events dropped so far, or not found in the history.
        choice: What its subscriber asked for.
    """

    __slots__ = (
        "_asleep", "_awaited", "_burst", "_closed", "_error", "_forget", "_gap_last", "_gap_missed",
        "_gap_previous", "_gap_seq", "_head", "_last", "_limit", "_new_waiter", "_publishers", "_queue",
        "_reading", "_terms", "choice", "missed",
    )  # fmt: skip

    def __init__(
        self, terms: Terms[E], choice: Choice[E], forget: "Callable[[Subscription[E]], None]"
    ) -> None:
        self.missed = 0
        self.choice = choice
        self._terms = terms
        self._forget = forget
        self._limit = choice.capacity
        # Each event with the number of the one before it in this stream.
        self._queue: deque[tuple[E, int]] = deque()
        self._last = 0  # the number of the last event that was queued
        self._head: E | None = None
        # A gap that is not read yet. It comes before everything in the queue: what is dropped later joins it.
        self._gap_missed = 0
        self._gap_previous = 0
        self._gap_last: E | None = None
        self._gap_seq = 0
        self._new_waiter: type[Waiter] | None = None
        self._reading = False
        self._asleep: Waiter | None = None
        self._publishers: list[Waiter] = []
        self._awaited = 0  # how many have published more than there is room for, and wait
        self._burst = 0
        self._error: Exception | None = None
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._queue)}/{self._limit}"
        return f"<Subscription {state} missed={self.missed}>"

    @property
    def queued(self) -> int:
        """Events that wait to be read."""
        return len(self._queue)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- Reading ---------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        if self._reading:
            raise IllegalStateError("a task reads this subscription already: have one each")
        self._burst += 1
        if self._burst > BURST:  # a reader with much to read lets others run too
            self._burst = 0
            await anyio.lowlevel.checkpoint()
        while True:
            event = self.next_nowait()
            if event is not None:
                return event
            if self._closed:
                raise StopAsyncIteration
            self._burst = 0
            if self._new_waiter is None:
                self._new_waiter = waiter_type()
            self._asleep = waiter = self._new_waiter()
            self._reading = True
            try:
                await waiter
            finally:
                self._reading = False
                self._asleep = None

    def next_nowait(self) -> E | None:
        """The next event if one waits, a gap event where some were dropped, or None.

        Raises:
            SlowSubscriberError: Nothing waits, and the subscription was ended because its queue was full.
            Exception: Nothing waits, and the subscription was ended by this error of its filter.
        """
        if self._gap_missed or self._head is not None:
            event, previous = self._take_first()
        elif self._queue:
            event, previous = self._queue.popleft()
            if self._publishers and len(self._queue) <= self._limit:
                self._wake_publishers()
        elif self._error is not None:
            raise self._error
        else:
            return None
        link = self._terms.link
        return event if link is None else link(event, previous)

    def _take_first(self) -> tuple[E, int]:
        if self._head is not None:
            head, self._head = self._head, None
            return head, 0
        missed, self._gap_missed = self._gap_missed, 0
        last, self._gap_last = self._gap_last, None
        if last is None and self._terms.forgotten is not None:
            return self._terms.forgotten(self._gap_seq, missed), self._gap_previous
        return self._terms.gap(last, missed), self._gap_previous  # type: ignore[arg-type]

    def close(self) -> None:
        """Receive nothing more; what is queued can still be read. Idempotent."""
        self._closed = True
        self._forget(self)
        self._wake_reader()
        self._wake_publishers()

    @property
    def closed(self) -> bool:
        """Whether nothing more comes in; what is queued can still be read."""
        return self._closed

    # -- For the bus -----------------------------------------------------------------------------

    def begin_with(self, present: E, seq: int) -> None:
        """Begin with an event that holds the present, as of a number."""
        self._head, self._last = present, seq
        self._wake_reader()

    def begin_after(self, seq: int, missed: int) -> None:
        """Begin after a number, and with a gap if events are missed that nobody knows any more."""
        self._gap_previous = seq
        self._gap_missed = self.missed = missed
        self._gap_seq = self._last = seq + missed

    def offer_past(self, past: Iterable[tuple[int, E]]) -> None:
        """Queue what passes the filters, whatever the capacity."""
        terms, topics, kinds = self._terms, self.choice.topics, self.choice.kinds
        capacity, self._limit = self._limit, sys.maxsize
        for seq, event in past:
            if topics is not None and terms.topic(event) not in topics:
                continue
            if kinds is None or terms.kind(event) in kinds:
                self.offer(event, seq, None, last=terms.ends(event) is not None)
        self._limit = capacity + len(self._queue)

    def offer(self, event: E, seq: int, crowded: "list[Subscription[E]] | None", *, last: bool) -> None:
        """Queue an event of the right topic and kind, if it is wanted.

        Args:
            event: The event.
            seq: Its number.
            crowded: Where subscriptions put themselves that are full and want to be waited for; None if their
                publisher does not wait.
            last: Whether it ends a stream.
        """
        if self._closed:
            return
        wants = self.choice.wants
        if wants is not None:
            try:
                wanted = wants(event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # the subscriber's own affair; it is raised in its task
                if isinstance(error, Exception):
                    self.fail(error)
                else:  # a cancellation that belongs to nobody, say
                    self.fail(RuntimeError(f"the filter raised {type(error).__name__}"))
                return
            if not wanted or self._closed:  # the filter may have closed it
                return
        queue = self._queue
        if len(queue) >= self._limit and not self._make_room(crowded):
            return
        queue.append((event, self._last))
        self._last = seq
        if self._asleep is not None:
            self._wake_reader()
        if last and self.choice.until_end:
            self.close()

    async def wait_for_room(self, since: float) -> None:
        """Wait until no more is queued than there is room for; disconnect if that takes too long.

        Args:
            since: When the patience began, on the loop's clock.
        """
        while not self._closed and len(self._queue) > self._limit:
            waiter = waiter_type()()
            self._publishers.append(waiter)
            try:
                await within(waiter, since + self.choice.patience - anyio.current_time())
            finally:
                in_vain = waiter in self._publishers
                if in_vain:
                    self._publishers.remove(waiter)
            if in_vain:
                self._disconnect()

    def no_longer_awaited(self) -> None:
        """A publisher waits no more, maybe because it was cancelled: queue no more than others wait for."""
        self._awaited -= 1
        while not self._closed and len(self._queue) > self._limit + self._awaited:
            self._drop_oldest()

    def _make_room(self, crowded: "list[Subscription[E]] | None") -> bool:
        if self.choice.overflow is Overflow.DISCONNECT:
            self._disconnect()
            return False
        if self.choice.overflow is Overflow.WAIT and crowded is not None:
            crowded.append(self)  # one more than there is room for, for each who waits
            self._awaited += 1
            return True
        self._drop_oldest()
        return True

    def _drop_oldest(self) -> None:
        self._gap_last, previous = self._queue.popleft()
        if not self._gap_missed:
            self._gap_previous = previous
        self._gap_missed += 1
        self.missed += 1

    def _disconnect(self) -> None:
        waiting = len(self._queue)
        self.fail(
            SlowSubscriberError(
                f"disconnected: {waiting} events waited to be read and there is room for {self._limit}; "
                f"read faster, ask for more room, or subscribe again after number {self._last}",
                waiting=waiting,
                after=self._last,
            )
        )

    def fail(self, error: Exception) -> None:
        """Receive nothing more; after what is queued, the reader gets this error, unless there was one."""
        if self._error is None:
            self._error = error
        self.close()

    def _wake_reader(self) -> None:
        if self._asleep is not None:
            wake(self._asleep)
            self._asleep = None  # once is enough

    def _wake_publishers(self) -> None:
        for waiter in self._publishers:
            wake(waiter)
        self._publishers.clear()
