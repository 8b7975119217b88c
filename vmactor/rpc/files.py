"""Descriptors beside messages: sent as copies, received close-on-exec, and never lost.

A message refers to the descriptors that travel with it by index: extension type 1, one byte.
"""

import fcntl
import os
import socket
import struct
from typing import Final

from vmactor.errors import IllegalArgumentError, IllegalStateError

EXTENSION: Final = 1
"""The MessagePack extension type whose one byte is the index of a descriptor."""
MAX_FILES: Final = 253
"""Most descriptors beside one message; the kernel takes no more."""

_NUMBER: Final = struct.Struct("i")
_ROOM: Final = socket.CMSG_SPACE(MAX_FILES * _NUMBER.size)


class TruncatedError(IllegalArgumentError):
    """The kernel could not hand over all descriptors that the peer sent; what did come was closed."""


class Attached:
    """A descriptor to send within a message; borrowed until the message was handed over for sending."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd


class ReceivedFile:
    """An open file that came with a message; can be given wherever an open file is wanted.

    Of a call's parameters, those that nobody took (``detach``) are closed when the call has ended. Of a
    call's result, they are the caller's to close.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

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
        return fd

    def close(self) -> None:
        """Close it, unless it was taken. Idempotent."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


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


def receive(sock: socket.socket, buffer: bytearray) -> tuple[int, list[ReceivedFile]]:
    """Read once from a socket that does not block: how many bytes, 0 at the end, and the descriptors.

    Raises:
        TruncatedError: There were more descriptors than could be received.
        OSError: As for ``recv``.
    """
    size, ancillary, flags, _ = sock.recvmsg_into([buffer], _ROOM, socket.MSG_CMSG_CLOEXEC)
    if not ancillary and not flags & socket.MSG_CTRUNC:
        return size, []
    files = [
        ReceivedFile(fd)
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for (fd,) in _NUMBER.iter_unpack(data[: len(data) - len(data) % _NUMBER.size])
    ]
    if flags & socket.MSG_CTRUNC:
        close_all(files)
        raise TruncatedError(
            f"not all descriptors could be received: send {MAX_FILES} at most with a message, and see that "
            "the receiver's limit of open files is high enough"
        )
    return size, files


def send(sock: socket.socket, data: bytes | memoryview, fds: list[int]) -> int:
    """Write once, with descriptors beside the first byte; how many bytes went. Raises OSError."""
    if not fds:
        return sock.send(data)
    rights = b"".join(map(_NUMBER.pack, fds))
    return sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
