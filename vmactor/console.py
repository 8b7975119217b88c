"""Serial output of guests and complaints of helpers: always read, always bounded.

A guest that writes for ever must fill neither memory nor disk, and its virtual CPU must never stand still
because nobody reads. So a ``Drain`` reads its pipe from the start, keeps the end of the text in memory, and
copies the text to a descriptor of the caller up to a cap. That descriptor (the sink) may be slow, stuck, full
or gone: then bytes are dropped and counted, and the drain goes on.

A sink is the caller's, and so are its flags: they belong to the open file, which the caller shares with
others (think of the terminal of a shell). It is never made non-blocking, yet no write to it may block the
event loop. See ``_Sink`` for how. The event loop is kept away from it as well, because uvloop makes what it
watches non-blocking: the loop watches an epoll instance of our own, and that watches the sink.
"""

import fcntl
import math
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import anyio
import anyio.lowlevel

from vmactor.follower import Followers
from vmactor.log import get_logger
from vmactor.waiting import Moment, readable

CONSOLE_TAIL: Final = 16 * 1024
"""Bytes of a console's end that are kept for people."""
FAILURE_CAP: Final = 4 * 1024
"""Bytes of the failure text that are kept, from its beginning: that is where the reason stands."""
FAILURE_TAIL: Final = 64 * 1024
STDERR_TAIL: Final = 4 * 1024

LINE_MAX: Final = 1024
"""Bytes of a line that are forwarded; the rest of a longer one is not."""
LINES_AT_ONCE: Final = 256
"""Lines of one piece of text that are forwarded, so that a flood of them does not hold up the event loop."""

_READ_SIZE: Final = 65536
_PENDING_MAX: Final = 4 * _READ_SIZE

_log = get_logger()


class Lines:
    """Cuts text into lines, of which it never keeps more than a bound.

    Args:
        tell: Called with each line, without its end and cut to ``LINE_MAX``.
        cap: How many bytes are looked at; what comes later is passed over.
    """

    def __init__(self, tell: Callable[[bytes], None], cap: int) -> None:
        self._tell = tell
        self._left = cap
        self._begun = bytearray()

    def feed(self, data: bytes) -> None:
        """Tell the lines that end in this piece."""
        data = data[: self._left]
        self._left -= len(data)
        first, *rest = data.split(b"\n")
        self._keep(first)
        for piece in rest[:LINES_AT_ONCE]:
            self._end()
            self._keep(piece)
        if len(rest) > LINES_AT_ONCE:
            self._begun.clear()
            self._tell(b"(%d lines left out: too many at once)" % (len(rest) - LINES_AT_ONCE))
            self._keep(rest[-1])

    def close(self) -> None:
        """Tell the last line, if it did not end."""
        if self._begun:
            self._end()

    def _keep(self, piece: bytes) -> None:
        self._begun += piece[: LINE_MAX - len(self._begun)]

    def _end(self) -> None:
        self._tell(bytes(self._begun.removesuffix(b"\r")))
        self._begun.clear()


class Drain:
    """Reads a pipe to its end without ever holding up who writes.

    One task calls ``run``, which owns whatever the copying needs; ``finish`` bounds its end. Many that copy
    nothing can be read by one task (``drains.py``), which calls ``read_once``.

    Args:
        read_fd: The read end of a pipe. It stays the caller's, who closes it after ``run`` has returned; it
            is made non-blocking.
        sink: Where to copy the text: a file, pipe, terminal or socket of the caller, or None. ``run`` works
            on a duplicate and leaves its flags alone.
        sink_cap: How many bytes the sink gets at most.
        tail: How many bytes to keep in memory.
        lines: Gets the text, too.

    Attributes:
        read_fd: The same.
        total: Bytes read so far.
    """

    def __init__(
        self, read_fd: int, *, sink: int | None, sink_cap: int, tail: int, lines: Lines | None = None
    ) -> None:
        os.set_blocking(read_fd, False)
        self.total = 0
        self.read_fd = read_fd
        self._tail = bytearray()
        self._tail_size = tail
        self._lines = lines
        self._sink = _Sink(sink, sink_cap)
        self._ended = False
        self._followers: Followers | None = None
        self._stopped: Moment | None = None
        self._finishing = False
        self._deadline = math.inf
        self._reading: anyio.CancelScope | None = None
        self._flushing: anyio.CancelScope | None = None

    def __repr__(self) -> str:
        return f"<Drain total={self.total} dropped={self.dropped}{' ended' if self._ended else ''}>"

    @property
    def tail(self) -> bytes:
        """The last bytes read, at most as many as were asked for."""
        return bytes(self._tail[max(0, len(self._tail) - self._tail_size) :])

    @property
    def dropped(self) -> int:
        """How many bytes the sink should have got and did not: beyond the cap, too slow, or given up."""
        return self._sink.dropped

    @property
    def copies(self) -> bool:
        """Whether what is read goes anywhere, to a sink or as lines; else nothing ever holds it up."""
        return self._sink.source is not None or self._lines is not None

    def follow(self) -> int:
        """A descriptor that gets the tail, and all that is read from now on; the caller's to close.

        Raises:
            ResourceExhaustedError: Too many follow already, or there is no descriptor.
        """
        if self._followers is None:
            self._followers = Followers()
        return self._followers.add(self.tail)

    def end_following(self) -> None:
        """Let followers know that this was all. Idempotent."""
        if self._followers is not None:
            self._followers.close()

    def read_once(self) -> bool:
        """Read once, without waiting; whether the end was reached. Not for one that ``copies``."""
        self._read()
        return self._ended

    async def run(self) -> None:
        """Read until all writers are gone or ``finish`` is called, then let the sink take what it still can.

        The sink never holds up the reading, but after the end it may take its time; ``finish`` bounds that.
        If this is cancelled, what the sink has not taken is dropped and counted.

        Raises:
            BusyResourceError: Another task is in ``run``.
        """
        if self._stopped is not None:
            raise anyio.BusyResourceError("draining")
        stopped = self._stopped = Moment()
        try:
            self._sink.open(self.read_fd)
            if not self._ended and not self._finishing:
                with anyio.CancelScope() as self._reading:
                    while not self._ended and not self._finishing:
                        await self._step()
            if not self._ended:
                await self._read_what_is_left()
            if self._sink.pending:
                with anyio.CancelScope(deadline=self._deadline) as self._flushing:
                    while self._sink.pending:
                        await self._step()
        finally:
            self._sink.close()
            if self._lines is not None:
                self._lines.close()
            self._reading = self._flushing = self._stopped = None
            stopped.set()

    def finish_soon(self, timeout: float = 1.0) -> None:
        """Bring ``run`` to its end, also one that has not begun; call it when the writer is known to be dead.

        Does not wait for an end of file, since somebody else may hold the write end: what the dead wrote is
        in the pipe already, so no more is read than a pipe holds. Then the sink has until ``timeout`` seconds
        from now to take what it has not taken yet.
        """
        self._finishing = True
        self._deadline = anyio.current_time() + timeout
        if self._reading is not None:
            self._reading.cancel()
        if self._flushing is not None:
            self._flushing.deadline = self._deadline

    async def finish(self, timeout: float = 1.0) -> None:
        """The same, and return when ``run`` has.

        Works as well where ``run`` was never called, or was cancelled.
        """
        self.finish_soon(timeout)
        if self._stopped is not None:
            await self._stopped.wait()
        elif not self._ended:
            await self.run()

    async def _step(self) -> None:
        """Wait for work and do a bounded piece of it; the wait gives everybody else a turn."""
        if not self._sink.pending:
            await readable(self.read_fd)
            self._read()
            return
        for fd in await self._sink.wait():
            if fd != self.read_fd:
                self._sink.write()
            elif not self._ended:
                self._read()

    async def _read_what_is_left(self) -> None:
        left = fcntl.fcntl(self.read_fd, fcntl.F_GETPIPE_SZ)
        while left > 0 and (count := self._read()):
            left -= count
            await anyio.lowlevel.checkpoint()
        self._end()

    def _read(self) -> int:
        """Read once; the number of bytes, 0 if there are none now or any more."""
        try:
            data = os.read(self.read_fd, _READ_SIZE)
        except BlockingIOError:
            return 0
        if not data:
            self._end()
            return 0
        self.total += len(data)
        self._tail += data
        if len(self._tail) > self._tail_size + _READ_SIZE:
            del self._tail[: len(self._tail) - self._tail_size]
        self._sink.offer(data)
        if self._lines is not None:
            self._lines.feed(data)
        if self._followers is not None:
            self._followers.tell(data)
        return len(data)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._sink.forget(self.read_fd)


class _Sink:
    """Copies bytes to a descriptor of somebody else, up to a cap, without ever waiting inside a system call.

    - What epoll cannot watch (regular files, ``/dev/null``) does not make its writers wait: written at once.
    - A socket can be asked for one call that does not wait.
    - Pipes and terminals are opened a second time, which gives flags of our own. Where that is not allowed (a
      terminal of another user, say), they are written only when they have room, and only so little at a time
      that the room suffices: ``PIPE_BUF`` bytes for a pipe, for a terminal a single one.

    Attributes:
        source: The descriptor of somebody else, or None.
        pending: What waits for room; bounded.
        dropped: Bytes that the sink should have got.
    """

    def __init__(self, source: int | None, cap: int) -> None:
        self.pending = bytearray()
        self.dropped = 0
        self.source = source
        self._left = cap
        self._warned = False
        self._fd: int | None = None
        self._socket: socket.socket | None = None
        self._epoll: select.epoll | None = None
        self._chunk = _READ_SIZE

    def open(self, read_fd: int) -> None:
        """Get ready to write; ``read_fd`` is watched along with the sink. A failure gives the sink up."""
        if self.source is None or self._fd is not None:
            return
        try:
            self._open(self.source)
            if not self._watch(read_fd):
                self._chunk = _READ_SIZE
        except OSError as error:
            self._give_up(error)

    def offer(self, data: bytes) -> None:
        """Take what may be taken; the rest is dropped and counted."""
        if self.source is None:
            return
        room = 0 if self._fd is None else max(0, min(self._left, _PENDING_MAX - len(self.pending)))
        if room < len(data):
            self.dropped += len(data) - room
            self._warn_once("the cap is reached" if room == self._left else "the sink is too slow")
        self._left -= len(data[:room])
        self.pending += data[:room]
        while self._epoll is None and self.pending:
            self.write()

    async def wait(self) -> list[int]:
        """Wait until the sink has room or the pipe has text; which of the descriptors it is."""
        if self._epoll is None:
            raise AssertionError("only a sink that can be watched has anything pending")
        await readable(self._epoll.fileno())
        return [fd for fd, _events in self._epoll.poll(0)]

    def write(self) -> None:
        """Write once, without waiting; called when there is room or an error to be seen."""
        if self._fd is None or not self.pending:
            return
        piece = bytes(self.pending[: self._chunk])
        try:
            if self._socket is not None:
                count = self._socket.send(piece, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                count = os.write(self._fd, piece)
        except OSError as error:
            if not isinstance(error, BlockingIOError) or self._epoll is None:
                self._give_up(error)
            return
        del self.pending[:count]

    def forget(self, read_fd: int) -> None:
        """Watch the sink alone from now on."""
        if self._epoll is not None:
            self._epoll.unregister(read_fd)

    def close(self) -> None:
        """Release everything; what is pending is dropped and counted. Idempotent."""
        self.dropped += len(self.pending)
        self.pending.clear()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self, source: int) -> None:
        mode = os.fstat(source).st_mode
        terminal = os.isatty(source)
        if stat.S_ISFIFO(mode) or terminal:
            self._fd = _reopen(source)
        if self._fd is None:
            self._fd = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 3)
            if not stat.S_ISSOCK(mode):
                self._chunk = 1 if terminal else select.PIPE_BUF
        if stat.S_ISSOCK(mode):
            self._socket = _socket_of(self._fd)

    def _watch(self, read_fd: int) -> bool:
        """Whether there is such a thing as waiting for room in this sink."""
        if self._fd is None:
            return False
        epoll = select.epoll()
        try:
            epoll.register(self._fd, select.EPOLLOUT)
            epoll.register(read_fd, select.EPOLLIN)
        except PermissionError:
            epoll.close()
            return False
        self._epoll = epoll
        return True

    def _give_up(self, error: OSError) -> None:
        self._warn_once(f"the sink failed: {error.strerror}")
        self.close()

    def _warn_once(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("console output is dropped", reason=reason)


def _reopen(fd: int) -> int | None:
    """Open the same pipe or terminal again, non-blocking; None if that cannot be done."""
    info = os.fstat(fd)
    if info.st_rdev == os.makedev(5, 2):  # ptmx, whose every opening makes a new terminal
        return None
    with suppress(OSError):
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return None


def _socket_of(fd: int) -> socket.socket:
    """Wrap a socket without touching its flags, whatever default timeout the program has set."""
    default = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        return socket.socket(fileno=fd)
    finally:
        socket.setdefaulttimeout(default)
