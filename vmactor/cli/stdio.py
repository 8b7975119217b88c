"""Standard input and output from within an event loop, whatever they are: terminal, pipe, socket, file.

The flags of these descriptors belong to everybody who shares them (the shell, the other end of a pipe line),
so they are never made non-blocking. Instead nothing is read or written before the system says that it will
not wait, and never more than it then takes. What cannot be watched (regular files, ``/dev/null``) never
waits.
"""

import errno
import fcntl
import os
import select
import stat
from typing import Final

import anyio
import anyio.lowlevel

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2

READ_SIZE: Final = 64 * 1024


def claim_standard_descriptors() -> None:
    """Open ``/dev/null`` in the place of standard descriptors that are closed.

    Otherwise the next socket or file that is opened gets such a number, and is taken for standard input.
    """
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= STDERR:
        os.set_inheritable(fd, True)
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def is_terminal(fd: int) -> bool:
    """Whether a person looks at it."""
    return os.isatty(fd)


class Reader:
    """Reads a descriptor that is somebody else's as well.

    Args:
        fd: Open for reading.
    """

    def __init__(self, fd: int = STDIN) -> None:
        self._fd = fd
        self._watched = _can_be_watched(fd)

    async def read(self) -> bytes:
        """What is there, at least one byte; empty at the end.

        Raises:
            OSError: It cannot be read.
        """
        while True:
            if self._watched:
                await anyio.wait_readable(self._fd)
            else:
                await anyio.lowlevel.checkpoint()
            try:
                return os.read(self._fd, READ_SIZE)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno == errno.EIO:  # a terminal that is gone, or is no longer ours
                    return b""
                raise


class Writer:
    """Writes a descriptor that is somebody else's as well; one task at a time gets its text through.

    Args:
        fd: Open for writing.
    """

    def __init__(self, fd: int = STDOUT) -> None:
        self.fd = fd
        self._watched = _can_be_watched(fd)
        self._turn = anyio.Lock()

    async def write(self, data: bytes) -> None:
        """Write everything, at once: nothing is buffered here.

        Raises:
            BrokenPipeError: Nobody reads it any more.
            OSError: It cannot be written.
        """
        async with self._turn:
            while data:
                if self._watched:
                    await anyio.wait_writable(self.fd)
                try:
                    # A pipe that has room at all has room for this much.
                    written = os.write(self.fd, data[: select.PIPE_BUF] if self._watched else data)
                except BlockingIOError:
                    continue
                data = data[written:]

    async def reader_gone(self) -> None:
        """Return when nobody can read a pipe any more; never, where that cannot be told without writing."""
        mode = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        if not stat.S_ISFIFO(os.fstat(self.fd).st_mode) or mode != os.O_WRONLY:
            await anyio.sleep_forever()
        # A write end has nothing to read, ever; what wakes us is the error that the last reader leaves.
        await anyio.wait_readable(self.fd)


def _can_be_watched(fd: int) -> bool:
    with select.epoll() as epoll:
        try:
            epoll.register(fd, 0)
        except PermissionError:
            return False
    return True
