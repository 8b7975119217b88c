"""One connection, the same on both sides: calls either way, answered in any order, and notifications.

Reading, decoding, answering and writing happen in the event loop's callback where nothing has to be waited
for: a method that returns a value costs no task. One that returns an awaitable gets a task. What is written
within one turn of the loop goes out together.
"""

import inspect
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from vmactor.errors import DeadlineExceededError, NotConnectedError, ResourceExhaustedError
from vmactor.rpc import files
from vmactor.rpc.files import MAX_FILES, ReceivedFile, Room, close_all
from vmactor.rpc.framing import (
    NOTIFICATION,
    READ_SIZE,
    REQUEST,
    RESPONSE,
    BadMessageError,
    Decoder,
    Encoder,
    Limits,
)
from vmactor.waiting import Moment, Waiter, each_time_readable, soon, waiter_type, wake, within, writable

CLOSED: Final = "the connection is closed; connect again"
TURN: Final = 256
"""Messages that are taken before others of the loop have their turn."""
FILE_COST: Final = 4096
"""What a descriptor that waits to be sent counts, in bytes: it is an open file, or a guest's connection."""


class Peer(Protocol):
    """What a connection's owner does with what comes in, and how errors look on the wire."""

    def request(self, method: str, params: list[Any]) -> Any:
        """Do what is asked: return the result, or an awaitable of it; raise the error to answer with."""
        ...

    def notification(self, method: str, params: list[Any]) -> None:
        """Take note; unknown ones are to be ignored."""
        ...

    def describe(self, error: Exception) -> list[Any]:
        """An error as ``[code, message, data]``."""
        ...

    def revive(self, error: Any) -> Exception:
        """The error that came as an answer."""
        ...


class _Call:
    __slots__ = ("answered", "error", "files", "result", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self.answered = False
        self.result: Any = None
        self.error: Any = None
        self.files: list[ReceivedFile] = []


class Connection:
    """Speaks MessagePack-RPC on a connected unix stream socket; run ``run`` in a task for as long.

    Args:
        sock: Connected, does not block; closed when ``run`` ends.
        peer: What to do with what comes in.
        limits: What the other side may take.
        room: How many received descriptors may be held, perhaps shared with other connections.
    """

    def __init__(self, sock: socket.socket, peer: Peer, limits: Limits, room: Room | None = None) -> None:
        self._sock = sock
        self._peer = peer
        self._limits = limits
        self._files = room or Room(limits.outstanding * MAX_FILES)
        self._decoder = Decoder(limits)
        self._encoder = Encoder()
        self._buffer = bytearray(READ_SIZE)
        self._view = memoryview(self._buffer)
        self._calls: dict[int, _Call] = {}
        self._next = 0
        self._more = False  # messages that came are not taken yet
        self._out: deque[tuple[bytes | memoryview, list[int]]] = deque()
        self._unsent = 0
        self._flushing = False  # a flush is under way, or is to come in this turn of the loop
        self._room: Moment | None = None
        self._working = 0
        self._tasks: TaskGroup | None = None
        self._waiter = waiter_type()
        self._soon = soon()
        self._closing = Moment()
        self.closed = False
        self.error: Exception | None = None
        """Why the connection ended, if not in order."""

    # -- Life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until either side ends the connection; then all calls that wait fail.

        Cancelled, or at its end, it cancels the calls that it works on.
        """
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                tasks.start_soon(self._read)
                await self._closing.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._end()

    async def _read(self) -> None:
        while not self.closed:
            if self._more:
                await anyio.lowlevel.checkpoint()
                self._take_messages()
            else:
                await each_time_readable(self._sock, self._on_readable)
            if self._unsent > self._limits.unsent_bytes:
                await self.drained()

    def start_soon(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Do something as long as the connection lasts; only while it runs."""
        assert self._tasks is not None  # noqa: S101
        self._tasks.start_soon(work, *args)

    def close(self) -> None:
        """End the connection: what is queued is tried once, the rest is dropped. Idempotent."""
        if not self.closed:
            self._write_out()
            self.closed = True
            self._closing.set()

    def _fail(self, error: Exception | None) -> None:
        if not self.closed:
            self.error = error
            self.closed = True
            self._closing.set()

    def _end(self) -> None:
        self.closed = True
        self._closing.set()
        self._decoder.close()
        for _, fds in self._out:
            _close(fds)
        self._out.clear()
        self._sock.close()
        if self._room is not None:
            self._room.set()
        for call in self._calls.values():
            wake(call.waiter)
        # Those that wait find no result, and that the connection is closed.

    # -- Reading -----------------------------------------------------------------------------------

    def _on_readable(self) -> bool:
        """Read once and do what came; whether to go on so."""
        if self.closed:
            return False
        try:
            size, received = files.receive(self._sock, self._buffer, self._files)
        except (BlockingIOError, InterruptedError):
            return True
        except (files.TruncatedError, ResourceExhaustedError) as error:
            self._refuse(error)
            return False
        except OSError as error:
            self._fail(error)
            return False
        if not size:
            self._fail(None)
            return False
        self._decoder.feed(self._view[:size], received)
        self._take_messages()
        return not self.closed and not self._more and self._unsent <= self._limits.unsent_bytes

    def _take_messages(self) -> None:
        """Take what came, until there is too much to answer or others should have their turn.

        What is answered at once is written at once, too.
        """
        wrote, self._flushing = self._flushing, True
        turn = TURN
        try:
            for message, attached in self._decoder.messages():
                self._take(message, attached)
                turn -= 1
                self._more = not turn or self._unsent > self._limits.unsent_bytes
                if self._more or self.closed:
                    break
            else:
                self._more = False
        except BadMessageError as error:
            self._refuse(error)
        finally:
            self._flushing = wrote
        if self._out and not wrote:
            self._flush()

    def _refuse(self, error: Exception) -> None:
        """End the connection, and say why."""
        self._send((RESPONSE, None, self._peer.describe(error), None))
        self._write_out()
        self._fail(error)

    def _take(self, message: list[Any], attached: list[ReceivedFile]) -> None:
        kind = message[0]
        if kind == REQUEST and len(message) == 4:
            self._answer(message[1], message[2], message[3], attached)
        elif kind == RESPONSE and len(message) == 4:
            call = self._calls.get(message[1]) if type(message[1]) is int else None
            if call is None:  # given up meanwhile
                close_all(attached)
                if message[1] is None:
                    self._fail(self._peer.revive(message[2]))
                return
            call.answered, call.files = True, attached
            call.error, call.result = message[2], message[3]
            del self._calls[message[1]]
            wake(call.waiter)
        elif kind == NOTIFICATION and len(message) == 3:
            method = _name(message[1])
            if method is not None and type(message[2]) is list:
                self._peer.notification(method, message[2])
            close_all(attached)
        else:
            close_all(attached)
            raise BadMessageError("neither a request nor an answer nor a notification")

    def _answer(self, msgid: Any, name: Any, params: Any, attached: list[ReceivedFile]) -> None:
        if type(msgid) is not int or not 0 <= msgid < 2**32:
            close_all(attached)
            raise BadMessageError("the number of a request is 0 to 4294967295")
        method = _name(name)
        if method is None or type(params) is not list:
            close_all(attached)
            raise BadMessageError("a request is [0, msgid, method, params]: method a text, params an array")
        try:
            result = self._peer.request(method, params)
            if inspect.isawaitable(result):
                if self._working >= self._limits.outstanding:
                    if inspect.iscoroutine(result):
                        result.close()
                    raise ResourceExhaustedError(
                        f"{self._working} calls are under way; wait until some of them are answered"
                    )
                assert self._tasks is not None  # noqa: S101
                self._working += 1
                self._tasks.start_soon(self._work, msgid, result, attached)
                return
        except Exception as error:
            self._send((RESPONSE, msgid, self._peer.describe(error), None))
        else:
            self._reply(msgid, result)
        if attached:
            close_all(attached)

    async def _work(self, msgid: int, result: Awaitable[Any], attached: list[ReceivedFile]) -> None:
        try:
            value = await result
        except Exception as error:
            self._send((RESPONSE, msgid, self._peer.describe(error), None))
        else:
            self._reply(msgid, value)
        finally:
            self._working -= 1
            close_all(attached)

    def _reply(self, msgid: int, result: Any) -> None:
        attached: list[files.Attached] = []
        if type(result) is Reply:
            result, attached = result.value, result.attached
        try:
            self._send((RESPONSE, msgid, None, result))
        except (TypeError, ValueError, OverflowError, OSError) as error:
            self._send((RESPONSE, msgid, self._peer.describe(error), None))
        finally:
            for file in attached:
                os.close(file.fd)

    # -- Writing -----------------------------------------------------------------------------------

    async def call(self, method: str, *params: Any, timeout: float | None = None) -> Any:
        """Ask the other side. Received files in the result are the caller's.

        Args:
            method: What to do.
            params: Whatever MessagePack can carry, and ``Attached``.
            timeout: Seconds; None for no bound.

        Raises:
            VmactorError: What the other side answered.
            DeadlineExceededError: No answer in time; a late one is thrown away.
            NotConnectedError: The connection is closed, or was before the answer came.
        """
        if self.closed:
            raise self._lost()
        msgid = self._next
        while msgid in self._calls:
            msgid = (msgid + 1) & 0xFFFFFFFF
        self._next = (msgid + 1) & 0xFFFFFFFF
        call = self._calls[msgid] = _Call(self._waiter())
        try:
            self._send((REQUEST, msgid, method, params))
            woken = await call.waiter if timeout is None else await within(call.waiter, timeout)
        except BaseException:
            close_all(call.files)
            raise
        finally:
            self._calls.pop(msgid, None)
        if not woken:
            raise DeadlineExceededError(f"no answer to {method} within {timeout:g} s")
        if call.error is not None:
            close_all(call.files)
            raise self._peer.revive(call.error)
        if not call.answered:
            raise self._lost()
        return call.result

    def notify(self, method: str, *params: Any) -> None:
        """Tell the other side. Nobody learns whether it came; after a flood, wait for ``drained``."""
        self._send((NOTIFICATION, method, params))

    async def drained(self) -> None:
        """Wait until at most half of ``unsent_bytes`` waits to be sent, or the connection is closed."""
        while not self.closed and self._unsent > self._limits.unsent_bytes // 2:
            if self._room is None:
                self._room = Moment()
            await self._room.wait()

    def _lost(self) -> Exception:
        return NotConnectedError(CLOSED if self.error is None else f"{CLOSED}: {self.error}")

    def _send(self, message: tuple[Any, ...]) -> None:
        if self.closed:
            return
        data, fds = self._encoder.encode(message)
        self._out.append((data, fds))
        self._unsent += len(data) + FILE_COST * len(fds)
        if not self._flushing:
            self._flushing = True
            self._soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if not self.closed and not self._write_out():
            self._flushing = True
            assert self._tasks is not None  # noqa: S101
            self._tasks.start_soon(self._write_later)

    async def _write_later(self) -> None:
        try:
            while not self.closed and not self._write_out():
                await writable(self._sock)
        finally:
            self._flushing = False

    def _write_out(self) -> bool:
        """Write what the kernel takes; whether that was all."""
        out = self._out
        try:
            while out:
                data, fds = out[0]
                if not fds and len(out) > 1:
                    data = self._joined()
                sent = files.send(self._sock, data, fds)
                self._unsent -= sent + FILE_COST * len(fds)
                _close(fds)
                if sent < len(data):
                    out[0] = memoryview(data)[sent:], []
                else:
                    out.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._fail(error)
        if self._room is not None and self._unsent <= self._limits.unsent_bytes // 2:
            self._room.set()
            self._room = None
        return not out

    def _joined(self) -> bytes | memoryview:
        """Put all that comes before the next descriptors in one piece."""
        out = self._out
        parts: list[bytes | memoryview] = []
        size = 0
        while out and not out[0][1] and size < READ_SIZE:
            parts.append(out.popleft()[0])
            size += len(parts[-1])
        data = b"".join(parts) if len(parts) > 1 else parts[0]
        out.appendleft((data, []))
        return data


class Reply:
    """A result whose attached descriptors are given away: closed when the answer is queued."""

    __slots__ = ("attached", "value")

    def __init__(self, value: Any, attached: list[files.Attached]) -> None:
        self.value = value
        self.attached = attached


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _name(method: Any) -> str | None:
    if type(method) is str:
        return method
    if type(method) is bytes:
        return method.decode("ascii", "replace")
    return None
