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
from typing import Any, Final, Generic, TypeVar

import anyio.lowlevel

from vmactor.errors import (
    ActorDiedError,
    DeadlineExceededError,
    IllegalArgumentError,
    IllegalStateError,
    MailboxFullError,
)
from vmactor.request import Request
from vmactor.waiting import Deadlines, Waiter, expire, waiter_type, wake

R = TypeVar("R")
M = TypeVar("M")

CONTROL_CAPACITY: Final = 1024
"""Control messages that may wait at once; far above what children and clients of one actor send."""

BURST: Final = 64
"""Messages that a receiver takes without letting other tasks run."""


class Envelope(Generic[M]):
    """A message as its receiver gets it.

    Attributes:
        message: What was sent.
        reply: Where an answer is expected, or None for a ``tell``.
    """

    # Not a frozen dataclass: there is one for every message, and those take three times as long to make.
    __slots__ = ("message",)
    reply: "Reply | None" = None

    def __init__(self, message: M) -> None:
        self.message = message

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.message!r}>"


class Reply(Envelope[Any]):
    """Where the answer to one ``ask`` goes; the first answer counts, later ones are discarded.

    It is the request's envelope as well, which saves an object for each.

    Attributes:
        done: Whether there is an answer.
        abandoned: Whether the asker has given up.
        value: The answer, once there is one.
        error: Or the error that is the answer, or None.
    """

    __slots__ = ("abandoned", "done", "error", "value", "waiter")
    value: Any
    error: Exception | None

    def __init__(self, message: object, waiter: Waiter) -> None:
        self.message = message
        self.waiter = waiter
        self.done = False
        self.abandoned = False

    @property
    def reply(self) -> "Reply":  # type: ignore[override]
        """This."""
        return self

    def expire(self) -> None:
        """Let the asker give up."""
        expire(self.waiter)


class Mailbox(Generic[M]):
    """The two lanes of one actor.

    Attributes:
        name: Shown in errors.
        capacity: Ordinary messages that may wait at once.
        late_replies: Answers that came after their asker had given up; they were discarded.

    Raises:
        ValueError: The capacity is below 1.
    """

    # Thousands of actors may have nothing to do: what lanes and lines need is made when it is used.
    __slots__ = (
        "_asked",
        "_asleep",
        "_burst",
        "_closed",
        "_control",
        "_new_waiter",
        "_ordinary",
        "_receiving",
        "_senders",
        "capacity",
        "late_replies",
        "name",
    )

    def __init__(self, name: str, capacity: int = 64) -> None:
        if capacity < 1:
            raise ValueError("a mailbox needs room for one message at least")
        self.name = name
        self.capacity = capacity
        self.late_replies = 0
        self._control: deque[Envelope[M]] | None = None
        self._ordinary: deque[Envelope[M]] | None = None
        # Who found no room, in order of arrival, and left at once by those who are cancelled, so that a stuck
        # actor collects nothing. An asker has no waiter here: it waits for its reply.
        self._senders: OrderedDict[Envelope[M], Waiter | None] | None = None
        self._asked: Deadlines[Reply] | None = None
        self._new_waiter: type[Waiter] | None = None
        self._receiving = False
        self._asleep: Waiter | None = None
        self._burst = 0
        self._closed: str | None = None

    def __repr__(self) -> str:
        lanes = f"{len(self._control or ())} control, {len(self._ordinary or ())}/{self.capacity} ordinary"
        state = f", closed: {self._closed}" if self._closed is not None else ""
        return f"<Mailbox {self.name} {lanes}, {len(self._senders or ())} waiting to send{state}>"

    def __len__(self) -> int:
        return len(self._control or ()) + len(self._ordinary or ())

    def details(self) -> dict[str, int]:
        """What waits here, as a child tells it: ``Supervisor.start(..., details=mailbox.details)``."""
        return {
            "ordinary": len(self._ordinary or ()),
            "capacity": self.capacity,
            "control": len(self._control or ()),
            "senders": len(self._senders or ()),
            "late_replies": self.late_replies,
        }

    # -- Sending ---------------------------------------------------------------------------------

    def tell_nowait(self, message: M) -> None:
        """Leave an ordinary message.

        Raises:
            MailboxFullError: There is no room.
            ActorDiedError: The actor has ended.
        """
        if not self._accept(Envelope(message)):
            raise MailboxFullError(
                f"the mailbox of {self.name} is full ({self.capacity}); wait, or send less"
            )

    async def tell(self, message: M) -> None:
        """Leave an ordinary message, waiting for room as long as it takes.

        A cancellation takes the message back, unless room was made for it in the same moment. Does not yield
        to other tasks when there is room.

        Raises:
            ActorDiedError: The actor has ended, or ended while we waited; the message was not delivered.
        """
        envelope = Envelope(message)
        if self._accept(envelope):
            return
        room = (self._new_waiter or self._learn_loop())()
        senders = self._stand_in_line(envelope, room)
        try:
            await room
        finally:
            waits_still = envelope in senders
            if waits_still:
                del senders[envelope]
        if waits_still:
            self._check_open()

    def control(self, message: M) -> None:
        """Leave a message that overtakes all ordinary ones.

        Raises:
            MailboxFullError: More than ``CONTROL_CAPACITY`` are waiting: the actor is stuck.
            ActorDiedError: The actor has ended.
        """
        self._accept_control(Envelope(message))

    async def ask(self, message: Request[R], *, timeout: float, control: bool = False) -> R:
        """Send a request and wait for its reply.

        Args:
            message: The request.
            timeout: Seconds for everything: room in the mailbox, the work, the reply; infinity is allowed. A
                reply that is there counts, however late its asker gets to run.
            control: Use the lane that overtakes ordinary messages.

        Raises:
            DeadlineExceededError: No reply in time. A request that was accepted may still be carried out.
            MailboxFullError: The control lane is full; the request was not accepted.
            IllegalArgumentError: The timeout is not a number.
            ActorDiedError: The actor ended, or had ended, without replying.
            Exception: Whatever the actor answered as its error.
        """
        if timeout != timeout:  # noqa: PLR0124 - not a number: no deadline, and it would upset all others'
            raise IllegalArgumentError(f"{timeout} s is no time to wait: give seconds, or infinity")
        waiter = (self._new_waiter or self._learn_loop())()
        reply = Reply(message, waiter)
        if control:
            self._accept_control(reply)
        elif not self._accept(reply):
            self._stand_in_line(reply, None)
        asked = self._asked
        if asked is None:
            asked = self._asked = Deadlines()
        asked.begin(reply, timeout)
        try:
            await waiter
        finally:
            asked.end(reply)
            if not reply.done:
                reply.abandoned = True
                if self._senders:
                    self._senders.pop(reply, None)
        if reply.done:
            if reply.error is not None:
                raise reply.error
            return reply.value  # type: ignore[no-any-return]
        raise DeadlineExceededError(
            f"{self.name} gave no answer to {type(message).__name__} in {timeout:g} s; "
            "it is stuck or has much to do"
        )

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ActorDiedError(f"{self.name} {self._closed}")

    def _learn_loop(self) -> type[Waiter]:
        self._new_waiter = waiter_type()
        return self._new_waiter

    def _accept(self, envelope: Envelope[M]) -> bool:
        """Take an ordinary message if there is room."""
        if self._closed is not None:
            self._check_open()
        lane = self._ordinary
        if lane is None:
            lane = self._ordinary = deque()
        if len(lane) >= self.capacity:
            return False
        lane.append(envelope)
        if self._asleep is not None:
            self._wake_receiver()
        return True

    def _accept_control(self, envelope: Envelope[M]) -> None:
        self._check_open()
        if self._control is None:
            self._control = deque()
        if len(self._control) >= CONTROL_CAPACITY:
            raise MailboxFullError(f"{self.name} does not take its control messages; it is stuck")
        self._control.append(envelope)
        if self._asleep is not None:
            self._wake_receiver()

    def _wake_receiver(self) -> None:
        asleep = self._asleep
        if asleep is not None:
            self._asleep = None  # once is enough
            if not asleep.done():
                asleep.set_result(True)

    def _stand_in_line(
        self, envelope: Envelope[M], room: Waiter | None
    ) -> OrderedDict[Envelope[M], Waiter | None]:
        if self._senders is None:
            self._senders = OrderedDict()
        self._senders[envelope] = room
        return self._senders

    # -- Receiving -------------------------------------------------------------------------------

    async def receive(self) -> Envelope[M]:
        """The next message, control messages first; for the one task that owns the mailbox.

        A cancelled receive takes nothing. Lets other tasks run when it waits, and after ``BURST`` messages
        for which it did not have to.

        Raises:
            ActorDiedError: The mailbox is closed.
            IllegalStateError: Another task is receiving.
        """
        if self._receiving:
            raise IllegalStateError(f"a task receives from the mailbox of {self.name} already: have one")
        self._burst += 1
        if self._burst > BURST:
            self._burst = 0
            await anyio.lowlevel.checkpoint()
        while True:
            if self._control:
                return self._control.popleft()
            lane = self._ordinary
            if lane:
                envelope = lane.popleft()
                if self._senders:
                    first, room = self._senders.popitem(last=False)
                    lane.append(first)
                    if room is not None:
                        wake(room)
                return envelope
            if self._closed is not None:
                self._check_open()
            self._burst = 0
            self._control = self._ordinary = None  # an actor that idles keeps no empty lanes
            self._asleep = waiter = (self._new_waiter or self._learn_loop())()
            self._receiving = True
            try:
                await waiter
            finally:
                self._receiving = False
                self._asleep = None

    def answer(self, reply: Reply | None, value: object = None) -> None:
        """Answer an ask; None, of a tell, is allowed. Only the first answer counts."""
        if reply is not None:
            self._settle(reply, value, None)

    def refuse(self, reply: Reply | None, error: Exception) -> None:
        """Answer an ask with an error; the rest is as for ``answer``."""
        if reply is not None:
            self._settle(reply, None, error)

    def _settle(self, reply: Reply, value: object, error: Exception | None) -> None:
        if reply.done:
            return
        if reply.abandoned:
            self.late_replies += 1
        reply.done = True
        reply.value = value
        reply.error = error
        waiter = reply.waiter
        if not waiter.done():  # as wake() does, without the call
            waiter.set_result(True)

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
        left = [envelope.message for lane in (self._control, self._ordinary) for envelope in lane or ()]
        self._control = self._ordinary = None
        for room in (self._senders or {}).values():  # they find themselves in the line still
            if room is not None:
                wake(room)
        for reply in self._asked.under_way if self._asked is not None else ():
            self._settle(reply, None, ActorDiedError(f"{self.name} {why}"))
        self._wake_receiver()
        return left
