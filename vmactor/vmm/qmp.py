"""A QMP client: QEMU's control socket as requests with deadlines and a stream of events.

One ``QmpClient`` owns one connection. It owns no task: whoever waits for something reads, and the others wait
for the reader; when the reader has what it wanted, or is cancelled, the next one takes over. So requests work
whether or not somebody listens for events at the time, on every event loop, and nothing outlives its caller.

The peer is not trusted: lines, nesting and unanswered requests are bounded, and whatever is not QMP ends the
connection. A connection that ended stays ended; every later request says why.
"""

import itertools
import json
import re
from collections.abc import Callable
from typing import Any, Final, NoReturn

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from vmactor.errors import DeadlineExceededError, VmmError

MAX_LINE: Final = 1 << 20
"""Longest message accepted, in bytes."""
MAX_DEPTH: Final = 32
"""Deepest nesting accepted; QEMU's replies to our requests stay below ten."""
MAX_UNANSWERED: Final = 64
"""Most requests that may be without an answer at once, given-up ones included."""

_CHUNK: Final = 1 << 16
_STRING: Final = re.compile(rb'"(?:[^"\\]|\\.?)*+"?', re.DOTALL)
"""A JSON string, or the rest of the line after a quote that nothing closes: so one pass is always enough."""

Json = dict[str, Any]


class QmpError(VmmError):
    """QEMU refused a request. The connection and the VM live on.

    Attributes:
        error_class: QEMU's class of the error, e.g. ``GenericError`` or ``DeviceNotActive``.
    """

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class QmpClient:
    """QMP over a byte stream. ``negotiate`` must have returned before ``execute`` is of use.

    Attributes:
        greeting: What QEMU said of itself, once it has.
        late: Answers that came after their request had been given up.
    """

    def __init__(self, stream: ByteStream, on_event: Callable[[str, Json], None]) -> None:
        """Take over ``stream``.

        Args:
            stream: Connected to QEMU's monitor; closed by ``aclose``.
            on_event: Called with name and data of each event, in order, by whichever task reads; must not
                block.
        """
        self.greeting: Json | None = None
        self.late = 0
        self._stream = stream
        self._on_event = on_event
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Reply] = {}
        self._given_up: set[int] = set()
        self._partial = bytearray()
        self._failure: str | None = None
        self._reading = False
        self._progress = anyio.Event()
        self._sending = anyio.Lock()
        # One for all calls, so that one that was given up is picked up: asking twice would be an error.
        self._negotiation = _Reply("qmp_capabilities")

    @property
    def failure(self) -> str | None:
        """Why the connection ended; None while it stands."""
        return self._failure

    async def negotiate(self, *, timeout: float) -> None:
        """Read the greeting and leave negotiation mode. Any number of times; picks up where it was given up.

        Args:
            timeout: Seconds.

        Raises:
            VmmError: The connection ended, or QEMU refused.
            DeadlineExceededError: QEMU was silent; may be tried again.
        """
        with anyio.move_on_after(timeout):
            await self._until(lambda: self.greeting is not None)
            await self._send(self._negotiation, None, timeout)
            await self._until(lambda: self._negotiation.message is not None)
        if self._negotiation.message is not None:
            self._negotiation.result()
            return
        raise DeadlineExceededError(f"QEMU did not greet on its control socket within {timeout:g} s")

    async def execute(self, command: str, arguments: Json | None = None, *, timeout: float = 5.0) -> Any:
        """Run a command and return its result. Concurrent calls are fine.

        Args:
            command: QMP command.
            arguments: Its arguments.
            timeout: Seconds until the request is given up; an answer after that is counted and dropped.

        Raises:
            QmpError: QEMU refused the command.
            VmmError: The connection has ended, or too many requests are without an answer.
            DeadlineExceededError: No answer in time; the command may or may not have been carried out.
        """
        reply = _Reply(command)
        try:
            with anyio.move_on_after(timeout):
                await self._send(reply, arguments, timeout)
                await self._until(lambda: reply.message is not None)
        finally:
            if reply.number in self._waiting:
                del self._waiting[reply.number]
                self._given_up.add(reply.number)
        if reply.message is not None:
            return reply.result()
        raise DeadlineExceededError(
            f"QEMU did not answer {command} within {timeout:g} s; it may be stuck: try again or stop the VM"
        )

    async def read_to_end(self) -> None:
        """Read, for the sake of events, until the connection has ended. Never raises; has no deadline."""
        try:
            await self._until(lambda: False)
        except VmmError:
            await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close the connection; requests that wait fail. Idempotent."""
        if self._failure is None:
            self._failure = "the connection to QEMU's control socket is closed"
        with anyio.CancelScope(shield=True):
            await self._stream.aclose()
        self._wake()

    # -- Sending -----------------------------------------------------------------------------------

    async def _send(self, reply: "_Reply", arguments: Json | None, timeout: float) -> None:
        async with self._sending:
            if reply.number:
                return  # somebody else's call sent it
            self._check()
            if len(self._waiting) + len(self._given_up) >= MAX_UNANSWERED:
                raise VmmError(
                    f"QEMU has left {MAX_UNANSWERED} requests without an answer; it is stuck: stop the VM"
                )
            reply.number = next(self._numbers)
            request: Json = {"execute": reply.command, "id": reply.number}
            if arguments is not None:
                request["arguments"] = arguments
            line = json.dumps(request).encode() + b"\n"
            self._waiting[reply.number] = reply
            # Shielded: a request cut in the middle would spoil the connection for all others. It is bounded
            # all the same, and waits only if QEMU has left a socket buffer full of requests unread.
            with anyio.move_on_after(timeout, shield=True) as scope:
                try:
                    await self._stream.send(line)
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    self._end("QEMU closed its control socket")
            if scope.cancelled_caught:
                self._end("QEMU stopped reading its control socket; stop the VM")

    # -- Reading -----------------------------------------------------------------------------------

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._check()
            if self._reading:
                await self._progress.wait()
                continue
            self._reading = True
            try:
                self._feed(await self._stream.receive(_CHUNK))
            except anyio.EndOfStream:
                self._end("QEMU closed its control socket")
            except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                self._end(f"the connection to QEMU's control socket broke: {error.__cause__ or error!r}")
            finally:
                self._reading = False
                self._wake()

    def _wake(self) -> None:
        self._progress.set()
        self._progress = anyio.Event()

    def _check(self) -> None:
        if self._failure is not None:
            raise VmmError(self._failure)

    def _end(self, why: str) -> None:
        if self._failure is None:
            self._failure = why

    def _feed(self, data: bytes) -> None:
        for piece in data.splitlines(keepends=True):
            self._partial += piece
            if len(self._partial) > MAX_LINE:
                self._end(f"QEMU sent a line of more than {MAX_LINE} bytes on its control socket")
            elif piece.endswith(b"\n"):
                line = bytes(self._partial)
                self._partial.clear()
                if line.strip():
                    self._take(line)
            if self._failure is not None:
                return

    def _take(self, line: bytes) -> None:
        try:
            message = _parse(line)
            if self.greeting is None:
                _require(isinstance(message.get("QMP"), dict), "no greeting")
                self.greeting = message["QMP"]
            elif "event" in message:
                name, data = message["event"], message.get("data", {})
                _require(isinstance(name, str) and isinstance(data, dict), "a misshapen event")
                self._on_event(name, data)
            else:
                self._answer(message)
        except ValueError as error:
            self._end(f"QEMU does not speak QMP on its control socket: {error}")

    def _answer(self, message: Json) -> None:
        number = message.get("id")
        if type(number) is not int:
            raise ValueError("neither an event nor an answer")
        _require(("return" in message) != ("error" in message), "a misshapen answer")
        _require("return" in message or isinstance(message["error"], dict), "a misshapen error")
        if number in self._given_up:
            self._given_up.discard(number)
            self.late += 1
            return
        _require(number in self._waiting, "an answer to a request that was never made")
        self._waiting.pop(number).message = message

    def __repr__(self) -> str:
        state = self._failure or ("ready" if self._negotiation.message else "negotiating")
        waiting, given_up = len(self._waiting), len(self._given_up)
        return f"<QmpClient {state}, {waiting} waiting, {given_up} given up, {self.late} late>"


class _Reply:
    """A request's place for its answer."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.number = 0
        self.message: Json | None = None

    def result(self) -> Any:
        message = self.message or {}
        if "error" not in message:
            return message.get("return")
        error = message["error"]
        text, kind = str(error.get("desc", ""))[:1000], str(error.get("class", ""))[:100]
        raise QmpError(f"QEMU refused {self.command}: {text}", kind)


def _parse(line: bytes) -> Json:
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    try:
        message = json.loads(line, parse_constant=_no_constant)
    except ValueError:  # not JSON, not UTF-8, or a number too long to convert: the text would only be noise
        raise ValueError(f"not JSON: {line[:80]!r}") from None
    _require(isinstance(message, dict), "not an object")
    result: Json = message
    return result


def _depth(line: bytes) -> int:
    depth = deepest = 0
    for byte in _STRING.sub(b"", line):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    return deepest


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)


def _require(truth: bool, otherwise: str) -> None:
    if not truth:
        raise ValueError(otherwise)
