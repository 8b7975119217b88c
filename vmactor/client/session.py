"""One connection to a daemon, and what this program knows through it: the VMs, and streams of events."""

import socket
from collections import deque
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from vmactor import __version__
from vmactor.actors.event_bus import TERMS
from vmactor.client.present import Present
from vmactor.errors import IllegalArgumentError, NotConnectedError, UnsupportedOperationError, VmactorError
from vmactor.messages import Event, Gap, Snapshot, UsageSampled, is_end
from vmactor.protocol import VERSION, errors, values
from vmactor.rpc.connection import Connection
from vmactor.rpc.framing import CLIENT
from vmactor.subscription import Choice, Subscription
from vmactor.waiting import Moment

GRACE_SECONDS: Final = 5.0
"""How much longer than the daemon a client waits for an answer: the daemon's own deadline tells more."""
MEETING_SECONDS: Final = 15.0
PRESENT_EVENTS: Final = 16_384
"""Events that may wait in the daemon for what keeps the VMs' states up to date here."""
_NOT_NUMBERED: Final = (Snapshot, Gap, UsageSampled)
"""What has the number of another event, which this user may not be told of: nothing waits for that."""


class _Stream:
    """One subscription at the daemon, and the queue here that it fills.

    Attributes:
        subscription: The queue.
        begun: Whether the daemon has taken the subscription, or refused it.
        number: What the daemon calls it.
    """

    def __init__(self, subscription: Subscription[Event]) -> None:
        self.subscription = subscription
        self.begun = Moment()
        self.number: int | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, Snapshot):
            self.subscription.begin_with(event, event.seq)
            return
        if isinstance(event, Gap):
            self.subscription.missed += event.missed
        self.subscription.offer(event, event.seq, None, last=is_end(event))


class Session:
    """The connection, once ``run`` runs; a ``Peer`` of it.

    Args:
        sock: Connected to the daemon, does not block; closed when ``run`` ends.
        path: Where that is, for people.
        tasks: Where subscriptions are asked for, since whoever subscribes does not wait.

    Attributes:
        path: As given.
        present: The VMs that this user may see.
        greeting: What the daemon said of itself.
        own: Handles of VMs that end with this connection.
    """

    def __init__(self, sock: socket.socket, path: Path, tasks: TaskGroup) -> None:
        self.path = path
        self.present = Present()
        self.greeting: dict[str, Any] = {}
        self.own: set[str] = set()
        self._tasks = tasks
        self._connection = Connection(sock, self, CLIENT)
        self._streams: dict[int, _Stream] = {}
        self._beginning: set[_Stream] = set()
        self._early: list[tuple[int, str, Any]] = []  # came before we knew the stream's number
        self._held: deque[tuple[_Stream, Event]] = deque()  # what the present has not come to yet
        self._present_number: int | None = None
        self._asking_for_present = False
        self._met = Moment()
        self._leaving = False

    # -- What the connection asks of its owner -----------------------------------------------------

    def request(self, method: str, params: list[Any]) -> Any:
        """A client takes no requests."""
        raise UnsupportedOperationError(f"a client has no method {method!r:.100}")

    def describe(self, error: Exception) -> list[Any]:
        """An error's form."""
        return errors.to_wire(error)

    def revive(self, error: Any) -> Exception:
        """An error out of its form."""
        return errors.from_wire(error)

    def notification(self, method: str, params: list[Any]) -> None:
        """An event, or the end of a stream."""
        if method in {"event", "subscriptionEnd"} and len(params) == 2 and type(params[0]) is int:
            self._take(params[0], method, params[1])

    # -- Life ----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._connection.closed

    def lost(self) -> VmactorError:
        """What to raise now that the connection has ended."""
        why = self._connection.error
        if isinstance(why, VmactorError):  # the daemon's own last word
            return why
        told = "" if why is None else f" ({why})"
        return NotConnectedError(
            f"the connection to the daemon at {self.path} has ended{told}: its log says why; connect again"
        )

    async def run(self) -> None:
        """Serve the connection until it ends; then all that waits on it gets its error."""
        try:
            await self._connection.run()
        finally:
            lost = self.lost()
            for stream in {*self._streams.values(), *self._beginning}:
                stream.begun.set()
                if self._leaving:
                    stream.subscription.close()
                else:
                    stream.subscription.fail(lost)
            self._streams.clear()
            self._held.clear()
            self.present.close()
            self._met.set()

    async def meet(self) -> None:
        """Greet, and learn of the VMs that there are.

        Raises:
            VmactorError: The daemon refused that, or is of another version.
            NotConnectedError: What listens there is no daemon of ours, or has closed the connection.
        """
        hello = {"version": VERSION, "client": f"vmactor {__version__}"}
        self.greeting = await self.call("hello", hello, within=MEETING_SECONDS)
        self._ask_for_present()
        await self._met.wait()
        if self.closed:
            raise self.lost()

    async def leave(self) -> None:
        """End the VMs that end with this connection, wait until nothing of them is left, and close it."""
        self._leaving = True
        async with anyio.create_task_group() as ending:
            for handle in self.own:
                ending.start_soon(self._let_go, handle)
        self._connection.close()

    # -- Calls ---------------------------------------------------------------------------------------

    async def call(self, method: str, *params: Any, within: float) -> Any:
        """Call a method, after the subscriptions that were asked for before.

        Raises:
            VmactorError: What the daemon answered.
            DeadlineExceededError: It did not answer within that time and a little more.
            NotConnectedError: There is no connection, or it ended before the answer.
        """
        for stream in tuple(self._beginning):
            await stream.begun.wait()
        if self.closed:
            raise self.lost()
        try:
            return await self._connection.call(method, *params, timeout=within + GRACE_SECONDS)
        except NotConnectedError:
            raise self.lost() from None

    def let_go(self, handle: str) -> None:
        """Give up a handle that nobody holds any more, without waiting for what comes of it."""
        self.own.discard(handle)
        if not self.closed and not self._leaving:
            self._tasks.start_soon(self._let_go, handle)

    async def _let_go(self, handle: str) -> None:
        try:
            await self._connection.call("closeVm", handle)
        except VmactorError:
            return  # nobody is left to tell

    # -- Streams -------------------------------------------------------------------------------------

    def subscribe(self, options: dict[str, Any], choice: Choice[Event]) -> Subscription[Event]:
        """Ask for a stream; what the daemon says against it comes when it is read."""
        if self.closed:
            raise self.lost()
        subscription = Subscription(TERMS, choice, self._forget)
        if (start := options.get("after")) is not None:
            subscription.begin_after(start, missed=0)
        stream = _Stream(subscription)
        self._beginning.add(stream)
        self._tasks.start_soon(self._ask_for, stream, options)
        return subscription

    def ended(self, end: Event, choice: Choice[Event]) -> Subscription[Event]:
        """The stream of a VM that has ended: its last event."""
        subscription = Subscription(TERMS, choice, self._forget)
        subscription.offer(end, end.seq, None, last=True)
        return subscription

    async def _ask_for(self, stream: _Stream, options: dict[str, Any]) -> None:
        try:
            stream.number = await self._connection.call("subscribe", options)
        except VmactorError as error:
            stream.subscription.fail(error)
        finally:
            self._beginning.discard(stream)
            stream.begun.set()
        if stream.number is not None:
            if stream.subscription.closed:
                self._unsubscribe(stream.number)
            else:
                self._streams[stream.number] = stream
        self._take_early()

    def _ask_for_present(self) -> None:
        self._asking_for_present = True
        self._tasks.start_soon(self._renew_present)

    async def _renew_present(self) -> None:
        """Subscribe to everything, beginning with a snapshot; once more, after events were missed."""
        if (old := self._present_number) is not None:
            self._present_number = None
            self._unsubscribe(old)
        try:
            options = {"snapshot": True, "capacity": PRESENT_EVENTS}
            self._present_number = await self._connection.call("subscribe", options)
        except VmactorError as error:
            self._connection.error = self._connection.error or error
            self._connection.close()
            return
        finally:
            self._asking_for_present = False
        self._take_early()

    def _take_early(self) -> None:
        early, self._early = self._early, []
        for item in early:
            self._take(*item)

    def _forget(self, subscription: Subscription[Event]) -> None:
        for number, stream in tuple(self._streams.items()):
            if stream.subscription is subscription:
                del self._streams[number]
                self._unsubscribe(number)

    def _unsubscribe(self, number: int) -> None:
        if not self.closed and not self._leaving:
            self._tasks.start_soon(self._do_unsubscribe, number)

    async def _do_unsubscribe(self, number: int) -> None:
        try:
            await self._connection.call("unsubscribe", number)
        except VmactorError:
            return  # it has ended by itself

    def _take(self, number: int, method: str, content: Any) -> None:
        stream = self._streams.get(number)
        present = number == self._present_number
        if stream is None and not present:
            if self._beginning or self._asking_for_present:
                self._early.append((number, method, content))
            return
        try:
            event = values.event_from_wire(content) if method == "event" else None
        except IllegalArgumentError as error:
            event, content = None, errors.to_wire(error)
        if stream is not None:
            self._take_event(stream, event, content)
        elif event is None:
            self._connection.error = None if content is None else errors.from_wire(content)
            self._connection.close()
        elif isinstance(event, Gap):
            self._ask_for_present()
        else:
            self.present.feed(event)
            if isinstance(event, Snapshot):
                self._met.set()
            self._let_pass()

    def _take_event(self, stream: _Stream, event: Event | None, error: Any) -> None:
        if event is not None:
            if self._held or (event.seq > self.present.seq and not isinstance(event, _NOT_NUMBERED)):
                self._held.append((stream, event))
            else:
                stream.feed(event)
            return
        # What is held comes before the end: a state that is behind matters less then.
        held, self._held = self._held, deque(item for item in self._held if item[0] is not stream)
        for waiting, late in held:
            if waiting is stream:
                stream.feed(late)
        if stream.number is not None:
            self._streams.pop(stream.number, None)
        if error is None:
            stream.subscription.close()
        else:
            stream.subscription.fail(errors.from_wire(error))

    def _let_pass(self) -> None:
        while self._held:
            stream, event = self._held[0]
            if event.seq > self.present.seq and not isinstance(event, _NOT_NUMBERED):
                return
            self._held.popleft()
            stream.feed(event)
