"""Following a text as it comes: each follower has a socket that gets copies, and holds up nobody.

What a follower has no room for is left out, and it is told how much, in the text itself: there is no other
way.
"""

import select
import socket
from typing import Final

import anyio
import anyio.lowlevel
from anyio.abc import ByteReceiveStream

from vmactor.errors import ResourceExhaustedError
from vmactor.waiting import readable

MAX_FOLLOWERS: Final = 16


class Followers:
    """Those who follow one text. Close it at the end of the text, which is then the end for them, too."""

    def __init__(self) -> None:
        self._missed: dict[socket.socket, int] = {}

    def __len__(self) -> int:
        """How many there are, or were when they were last told something."""
        return len(self._missed)

    def add(self, begin: bytes) -> int:
        """One more, who gets some text to begin with.

        Returns:
            A descriptor to read the text from; the caller's to close.

        Raises:
            ResourceExhaustedError: There are as many as there can be, or no descriptor is left.
        """
        self._drop_the_gone()
        if len(self._missed) >= MAX_FOLLOWERS:
            raise ResourceExhaustedError(f"{MAX_FOLLOWERS} follow already: close one of them")
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise ResourceExhaustedError(
                f"no descriptor for a follower: {error}; raise 'ulimit -n'"
            ) from error
        ours.shutdown(socket.SHUT_RD)
        self._missed[ours] = 0
        self._tell(ours, begin)
        return theirs.detach()

    def tell(self, data: bytes) -> None:
        """Copy a piece of the text to all; never waits."""
        for sock in tuple(self._missed):
            self._tell(sock, data)

    def close(self) -> None:
        """There will be no more text. Idempotent."""
        for sock in self._missed:
            sock.close()
        self._missed.clear()

    def _tell(self, sock: socket.socket, data: bytes) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            if missed := self._missed[sock]:
                note = b"\r\n[%d bytes left out: too slow a reader]\r\n" % missed
                if sock.send(note, flags) < len(note):  # never seen: so little goes at once or not at all
                    raise BlockingIOError
                self._missed[sock] = 0
            self._missed[sock] += len(data) - sock.send(data, flags) if data else 0
        except BlockingIOError:
            self._missed[sock] += len(data)
        except OSError:
            self._drop(sock)

    def _drop_the_gone(self) -> None:
        if not self._missed:
            return
        gone = select.poll()
        for sock in self._missed:
            gone.register(sock, 0)
        at = {sock.fileno(): sock for sock in self._missed}
        for fd, _ in gone.poll(0):
            self._drop(at[fd])

    def _drop(self, sock: socket.socket) -> None:
        del self._missed[sock]
        sock.close()


class ConsoleStream(ByteReceiveStream):
    """What a guest writes to its console: the last of it from before, and all from now on; an anyio stream.

    It ends with the run of the VM. A reader that is too slow for the guest finds in the text how much was
    left out. The bytes are the guest's: see to it that no terminal gets them unescaped.

    Args:
        fd: What ``Followers.add`` gave, here or in another process; closed with the stream.
    """

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return at least one byte. No data is lost if this is cancelled.

        Raises:
            EndOfStream: The run of the VM has ended.
            ClosedResourceError: This stream has been closed here.
        """
        await anyio.lowlevel.checkpoint()
        while True:
            if self._sock.fileno() < 0:
                raise anyio.ClosedResourceError
            try:
                data = self._sock.recv(max_bytes)
            except BlockingIOError:
                await readable(self._sock)
            except OSError as error:
                raise anyio.BrokenResourceError from error
            else:
                if not data:
                    raise anyio.EndOfStream
                return data

    def detach(self) -> int:
        """Take the descriptor: it is the caller's to close, and this stream is closed."""
        return self._sock.detach()

    async def aclose(self) -> None:
        """Close at once; a task inside ``receive`` gets ``ClosedResourceError``. Idempotent."""
        if self._sock.fileno() >= 0:
            anyio.notify_closing(self._sock)
            self._sock.close()
        await anyio.lowlevel.checkpoint()
