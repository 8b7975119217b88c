"""Reading files of others: at offsets, in bounded pieces, without moving their offset or mapping them."""

import fcntl
import mmap
import os
import stat
import struct
from pathlib import Path
from typing import Final

from vmactor.errors import ImageError

_BLKGETSIZE64: Final = 0x80081272
_ALIGNMENT: Final = 4096


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read up to ``size`` bytes at an offset; fewer only where the file ends. Blocks as long as it does.

    Works on descriptors with ``O_DIRECT``, too. Takes about twice ``size`` of memory.

    Raises:
        ImageError: The file cannot be read, or not at such an offset.
    """
    start = offset - offset % _ALIGNMENT
    span = offset + size - start
    span += -span % _ALIGNMENT
    try:
        with mmap.mmap(-1, span) as buffer:  # anonymous memory, for its alignment
            have = 0
            while have < span:
                with memoryview(buffer) as view, view[have:] as rest:
                    count = os.preadv(fd, [rest], start + have)
                have += count
                if not count or have % _ALIGNMENT:  # only the end of a file is not aligned
                    break
            return buffer[offset - start : min(have, offset - start + size)]
    except (OSError, OverflowError) as error:
        why = error.strerror if isinstance(error, OSError) else "no file is that long"
        raise ImageError(f"cannot be read: {why}") from error


def size_of(fd: int) -> int:
    """The size of a regular file or a block device, in bytes.

    Raises:
        ImageError: It is neither, or does not tell.
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        if stat.S_ISBLK(status.st_mode):
            (size,) = struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))
            return int(size)
    except OSError as error:
        raise ImageError(f"its size is unknown: {error.strerror}") from error
    raise ImageError("is neither a regular file nor a block device")


def open_image(path: Path) -> int:
    """Open an image for reading, after a look at what it is: opening a pipe may block, and a device may act.

    Raises:
        ImageError: It is neither a regular file nor a block device.
        OSError: It cannot be opened.
    """
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(place).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise ImageError("is neither a regular file nor a block device")
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(place)
