"""Descriptors beside messages: sent as copies, received close-on-exec, and never lost.

A message refers to the descriptors that travel with it by index: extension type 1, one byte.
"""

import fcntl
import os
import socket
import struct
from typing import Final

from vmactor.errors import IllegalArgumentError, IllegalStateError, ResourceExhaustedError

EXTENSION: Final = 1
"""The MessagePack extension type whose one byte is the index of a descriptor."""
MAX_FILES: Final = 253
"""Most descriptors beside one message; the kernel takes no more."""

_NUMBER: Final = struct.Struct("i")
_SPACE: Final = socket.CMSG_SPACE(MAX_FILES * _NUMBER.size)


class TruncatedError(IllegalArgumentError):
    """The kernel could not hand over all descriptors that the peer sent; what did come was closed."""


class Attached:
    """A descriptor to send within a message; borrowed until the message was handed over for sending."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd


class Room:
    """How many received descriptors may be held at a time, by all who share this.

    A peer may send them with messages that never end, or with calls that wait; one user's must not take all
    that the process may have.
    """

    __slots__ = ("_limit", "held")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def take(self, count: int) -> bool:
        """Hold so many more; whether there is room for them (they are held in any case)."""
        self.held += count
        return self.held <= self._limit

    def give_back(self) -> None:
        """One is held no more."""
        self.held -= 1


class ReceivedFile:
    """An open file that came with a message; can be given wherever an open file is wanted.

    Of a call's parameters, those that nobody took (``detach``) are closed when the call has ended. Of a
    call's result, they are the caller's to close.
    """

    __slots__ = ("_fd", "_room")

    def __init__(self, fd: int, room: Room | None = None) -> None:
        self._fd = fd
        self._room = room

    def __repr__(self) -> str:
        return f"<ReceivedFile {self._fd}>"

    def fileno(self) -> int:
        """Its descriptor.

        Raises:
            IllegalStateError: It was closed or taken.
        """
        if self._fd < 0:
            raise IllegalStateError("this received file was closed or taken already")
        return self._fd

    def detach(self) -> int:
        """Take the descriptor: from now on it is the caller's to close."""
        fd, self._fd = self.fileno(), -1
        if self._room is not None:
            self._room.give_back()
        return fd

    def take_over(self, other: "ReceivedFile") -> None:
        """Be the file that another one was until now."""
        self._fd, self._room = other._fd, other._room  # noqa: SLF001 - of the same class
        other._fd = -1  # noqa: SLF001

    def close(self) -> None:
        """Close it, unless it was taken. Idempotent."""
        if self._fd >= 0:
            os.close(self.detach())


def copy_of(fd: int) -> int:
    """A duplicate, close-on-exec and above 2: what is queued must not change when its owner closes it.

    Raises:
        OSError: It is not open, or there is no room for one more.
    """
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def close_all(files: list[ReceivedFile]) -> None:
    """Close what nobody took."""
    for file in files:
        file.close()


def receive(sock: socket.socket, buffer: bytearray, room: Room) -> tuple[int, list[ReceivedFile]]:
    """Read once from a socket that does not block: how many bytes, 0 at the end, and the descriptors.

    Raises:
        TruncatedError: There were more descriptors than could be received.
        ResourceExhaustedError: More than there is room for are held; those that came were closed.
        OSError: As for ``recv``.
    """
    size, ancillary, flags, _ = sock.recvmsg_into([buffer], _SPACE, socket.MSG_CMSG_CLOEXEC)
    if not ancillary and not flags & socket.MSG_CTRUNC:
        return size, []
    files = [
        ReceivedFile(fd, room)
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for (fd,) in _NUMBER.iter_unpack(data[: len(data) - len(data) % _NUMBER.size])
    ]
    fits = room.take(len(files))
    if flags & socket.MSG_CTRUNC:
        close_all(files)
        raise TruncatedError(
            f"not all descriptors could be received: send {MAX_FILES} at most with a message, and see that "
            "the receiver's limit of open files is high enough"
        )
    if not fits:
        close_all(files)
        raise ResourceExhaustedError(
            "too many of this user's descriptors are held for messages and calls that have not ended; wait "
            "until some have"
        )
    return size, files


def send(sock: socket.socket, data: bytes | memoryview, fds: list[int]) -> int:
    """Write once, with descriptors beside the first byte; how many bytes went. Raises OSError."""
    # The program around us may have given SIGPIPE its deadly default back.
    if not fds:
        return sock.send(data, socket.MSG_NOSIGNAL)
    rights = b"".join(map(_NUMBER.pack, fds))
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], socket.MSG_NOSIGNAL)
