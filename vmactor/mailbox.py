"""Mailboxes: how an actor is spoken to.

A mailbox has two bounded lanes. Ordinary messages wait for room and are taken in the order in which they were
accepted; control messages (kill, stop, and what an actor's own children report) overtake them and never wait.
One task receives, and closes the mailbox when it ends. Any task of the same event loop may send, but not a
finalizer: the garbage collector runs that in the middle of anything. Let it schedule a callback on the loop.

Promises: a message is delivered at most once; messages that one task sends on one lane arrive in its order;
nobody overtakes a sender that waits for room; ``ask`` always ends: with the reply, the actor's error,
``MailboxFullError``, ``ActorDiedError`` or ``DeadlineExceededError``.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import anyio
import anyio.lowlevel

from vmactor.errors import ActorDiedError, DeadlineExceededError, IllegalStateError, MailboxFullError

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
M = TypeVar("M")

CONTROL_CAPACITY: Final = 1024
"""Control messages that may wait at once; far above what children and clients of one actor send."""

BURST: Final = 64
"""Messages that a receiver takes without letting other tasks run."""


class Request(Generic[R_co]):
    """Base of messages that have a reply of type ``R_co``."""

    __slots__ = ()


class Reply:
    """Where the answer to one ``ask`` goes; the first answer counts, later ones are discarded.

    Attributes:
        done: Set when there is an answer.
        abandoned: Whether the asker has given up.
    """

    __slots__ = ("_error", "_value", "abandoned", "done")

    def __init__(self) -> None:
        self.done = anyio.Event()
        self.abandoned = False
        self._value: object = None
        self._error: Exception | None = None

    def answer(self, value: object = None) -> None:
        """Hand over the result."""
        if not self.done.is_set():
            self._value = value
            self.done.set()

    def fail(self, error: Exception) -> None:
        """Hand over an error; it is raised in the asker's task, so it should be one of its own."""
        if not self.done.is_set():
            self._error = error
            self.done.set()

    def result(self) -> object:
        """Return or raise what was handed over."""
        if self._error is not None:
            raise self._error
        return self._value


@dataclass(frozen=True, slots=True, eq=False)
class Envelope(Generic[M]):
    """A message as its receiver gets it.

    Attributes:
        message: What was sent.
        reply: Where an answer is expected, or None for a ``tell``.
    """

    message: M
    reply: Reply | None = None


class _WaitingSender(Generic[M]):
    """A sender that found the mailbox full, and what became of its message."""

    __slots__ = ("accepted", "envelope", "woken")

    def __init__(self, envelope: Envelope[M]) -> None:
        self.envelope = envelope
        self.accepted = False
        self.woken = anyio.Event()


class Mailbox(Generic[M]):
    """The two lanes of one actor.

    Attributes:
        name: Shown in errors.
        capacity: Ordinary messages that may wait at once.
        late_replies: Answers that came after their asker had given up; they were discarded.

    Raises:
        ValueError: The capacity is below 1.
    """

    def __init__(self, name: str, capacity: int = 64) -> None:
        if capacity < 1:
            raise ValueError("a mailbox needs room for one message at least")
        self.name = name
        self.capacity = capacity
        self.late_replies = 0
        self._control: deque[Envelope[M]] = deque()
        self._ordinary: deque[Envelope[M]] = deque()
        # In order of arrival, and left at once by a cancelled sender: a stuck actor collects nothing.
        self._senders: OrderedDict[_WaitingSender[M], None] = OrderedDict()
        self._open_replies: set[Reply] = set()
        self._arrival: anyio.Event | None = None
        self._burst = 0
        self._closed: str | None = None

    def __repr__(self) -> str:
        lanes = f"{len(self._control)} control, {len(self._ordinary)}/{self.capacity} ordinary"
        state = f", closed: {self._closed}" if self._closed is not None else ""
        return f"<Mailbox {self.name} {lanes}, {len(self._senders)} waiting to send{state}>"

    def __len__(self) -> int:
        return len(self._control) + len(self._ordinary)

    # -- Sending ---------------------------------------------------------------------------------

    def tell_nowait(self, message: M) -> None:
        """Leave an ordinary message.

        Raises:
            MailboxFullError: There is no room.
            ActorDiedError: The actor has ended.
        """
        self._check_open()
        if len(self._ordinary) >= self.capacity:
            raise MailboxFullError(
                f"the mailbox of {self.name} is full ({self.capacity}); wait, or send less"
            )
        self._accept(self._ordinary, Envelope(message))

    async def tell(self, message: M) -> None:
        """Leave an ordinary message, waiting for room as long as it takes.

        A cancellation takes the message back, unless room was made for it in the same moment. Does not yield
        to other tasks when there is room.

        Raises:
            ActorDiedError: The actor has ended, or ended while we waited; the message was not delivered.
        """
        await self._send(Envelope(message))

    def control(self, message: M) -> None:
        """Leave a message that overtakes all ordinary ones.

        Raises:
            MailboxFullError: More than ``CONTROL_CAPACITY`` are waiting: the actor is stuck.
            ActorDiedError: The actor has ended.
        """
        self._send_control(Envelope(message))

    async def ask(self, message: Request[R], *, timeout: float, control: bool = False) -> R:
        """Send a request and wait for its reply.

        Args:
            message: The request.
            timeout: Seconds for everything: room in the mailbox, the work, the reply. A reply that is there
                counts, however late its asker gets to run.
            control: Use the lane that overtakes ordinary messages.

        Raises:
            DeadlineExceededError: No reply in time. A request that was accepted may still be carried out.
            MailboxFullError: The control lane is full; the request was not accepted.
            ActorDiedError: The actor ended, or had ended, without replying.
            Exception: Whatever the actor answered as its error.
        """
        reply = Reply()
        envelope = Envelope(message, reply)
        self._open_replies.add(reply)
        try:
            with anyio.fail_after(timeout):
                if control:
                    self._send_control(envelope)  # type: ignore[arg-type]
                else:
                    await self._send(envelope)  # type: ignore[arg-type]
                await reply.done.wait()
        except TimeoutError:
            if not reply.done.is_set():
                raise DeadlineExceededError(
                    f"{self.name} gave no answer to {type(message).__name__} in {timeout:g} s; "
                    "it is stuck or has much to do"
                ) from None
        finally:
            self._open_replies.discard(reply)
            reply.abandoned = not reply.done.is_set()
        return reply.result()  # type: ignore[return-value]

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ActorDiedError(f"{self.name} {self._closed}")

    def _accept(self, lane: deque[Envelope[M]], envelope: Envelope[M]) -> None:
        lane.append(envelope)
        if self._arrival is not None:
            self._arrival.set()

    def _send_control(self, envelope: Envelope[M]) -> None:
        self._check_open()
        if len(self._control) >= CONTROL_CAPACITY:
            raise MailboxFullError(f"{self.name} does not take its control messages; it is stuck")
        self._accept(self._control, envelope)

    async def _send(self, envelope: Envelope[M]) -> None:
        self._check_open()
        if len(self._ordinary) < self.capacity:
            self._accept(self._ordinary, envelope)
            return
        sender = _WaitingSender(envelope)
        self._senders[sender] = None
        try:
            await sender.woken.wait()
        finally:
            self._senders.pop(sender, None)
        if not sender.accepted:
            self._check_open()

    # -- Receiving -------------------------------------------------------------------------------

    async def receive(self) -> Envelope[M]:
        """The next message, control messages first; for the one task that owns the mailbox.

        A cancelled receive takes nothing. Lets other tasks run when it waits, and after ``BURST`` messages
        for which it did not have to.

        Raises:
            ActorDiedError: The mailbox is closed.
            IllegalStateError: Another task is receiving.
        """
        if self._arrival is not None:
            raise IllegalStateError(f"a task receives from the mailbox of {self.name} already: have one")
        self._burst += 1
        if self._burst > BURST:
            self._burst = 0
            await anyio.lowlevel.checkpoint()
        while True:
            if self._control:
                return self._control.popleft()
            if self._ordinary:
                envelope = self._ordinary.popleft()
                if self._senders:
                    sender, _ = self._senders.popitem(last=False)
                    self._ordinary.append(sender.envelope)
                    sender.accepted = True
                    sender.woken.set()
                return envelope
            self._check_open()
            self._burst = 0
            self._arrival = anyio.Event()
            try:
                await self._arrival.wait()
            finally:
                self._arrival = None

    def answer(self, reply: Reply | None, value: object = None) -> None:
        """Answer an ask; None, of a tell, is allowed. Only the first answer counts."""
        if reply is not None:
            self._count_late(reply)
            reply.answer(value)

    def refuse(self, reply: Reply | None, error: Exception) -> None:
        """Answer an ask with an error; the rest is as for ``answer``."""
        if reply is not None:
            self._count_late(reply)
            reply.fail(error)

    def _count_late(self, reply: Reply) -> None:
        if reply.abandoned and not reply.done.is_set():
            self.late_replies += 1

    def close(self, why: str = "has ended") -> list[M]:
        """Accept nothing more; every waiting asker, sender and receiver gets ``ActorDiedError``. Idempotent.

        Args:
            why: Completes the sentence that begins with the actor's name.

        Returns:
            The messages that were accepted and never received, control messages first.
        """
        if self._closed is not None:
            return []
        self._closed = why
        left = [envelope.message for envelope in self._drain()]
        for reply in self._open_replies:
            reply.fail(ActorDiedError(f"{self.name} {why}"))
        if self._arrival is not None:
            self._arrival.set()
        return left

    def _drain(self) -> Iterator[Envelope[M]]:
        for lane in (self._control, self._ordinary):
            while lane:
                yield lane.popleft()
        while self._senders:
            self._senders.popitem(last=False)[0].woken.set()
