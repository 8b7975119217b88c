"""Writable partitions: a QCOW2 image whose disk is empty, or begins with what its guest looks for.

Source: ``initializeWritablePartition`` of the reference; docs/differences.md says where we differ.
"""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from typing import Final

from vmactor.errors import IllegalArgumentError, ImageError, ResourceExhaustedError
from vmactor.images.qcow2 import MAX_SIZE, NewImage, new_image
from vmactor.messages import PartitionType

GRANULE: Final = 4096
"""Sizes are rounded up to a multiple of this."""
CONTENTS: Final = {
    PartitionType.RAW: b"",
    PartitionType.ANDROID_VM_INSTANCE: b"Android-VM-instance\x01\x00",
    PartitionType.ENCRYPTEDSTORE: b"UNFORMATTED-STORAGE",
}
"""What the disk begins with. The instance's magic is followed by its version in 16 bits, little endian."""

_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT}


def initialize_writable_partition(
    fd: int, size: int, partition_type: PartitionType | int = PartitionType.RAW
) -> int:
    """Turn a file into an empty partition for a guest to write to. Blocks as long as the file system does.

    What was in the file is lost. After an error the file is as it was, or empty. The descriptor's offset
    stays where it is. Nothing is synchronised to the disk.

    Args:
        fd: A regular file, open for reading and writing, not in append mode.
        size: Of the guest's disk in bytes, up to 16 TiB; rounded up to a multiple of 4,096. The file itself
            is a fraction of that until the guest writes. 0 is possible for ``RAW`` only.
        partition_type: What the disk begins with.

    Returns:
        The size of the guest's disk.

    Raises:
        IllegalArgumentError: The size is negative or no whole number, or the descriptor is not open.
        ImageError: The type is unknown, the size does not fit it or is too large, the file is not of the
            right kind or cannot be written.
        ResourceExhaustedError: No space.
    """
    disk_size, contents = _plan(size, partition_type)
    _check_file(fd)
    try:
        os.ftruncate(fd, 0)
    except OSError as error:
        raise ImageError(f"Failed to reset a file: {error.strerror}") from error
    try:
        _write(fd, new_image(disk_size, contents))
    except BaseException as error:
        with suppress(OSError):
            os.ftruncate(fd, 0)
        if not isinstance(error, OSError):
            raise
        text = f"Failed to create QCOW2 image: {error.strerror}; the file is empty now"
        if error.errno in _NO_SPACE:
            raise ResourceExhaustedError(f"{text}; make room, or use another file system") from error
        raise ImageError(text) from error
    return disk_size


def _plan(size: int, partition_type: PartitionType | int) -> tuple[int, bytes]:
    if type(size) is not int or size < 0:
        raise IllegalArgumentError(f"Invalid size {size!r:.100}; give a number of bytes from 0")
    failed = f"Failed to initialize partition as PartitionType({partition_type!s:.40})"
    try:
        contents = CONTENTS[PartitionType(partition_type)]
    except ValueError:
        raise ImageError(
            f"{failed}: there is no such type; use RAW, ANDROID_VM_INSTANCE or ENCRYPTEDSTORE"
        ) from None
    if size > MAX_SIZE:
        raise ImageError(f"Failed to create QCOW2 image: {size} bytes are more than the {MAX_SIZE} possible")
    if contents and not size:
        raise ImageError(f"{failed}: size 0 has no room for its first bytes; give a size from 1")
    return size + -size % GRANULE, contents


def _check_file(fd: int) -> None:
    try:
        mode, flags = os.fstat(fd).st_mode, fcntl.fcntl(fd, fcntl.F_GETFL)
    except (OSError, ValueError, OverflowError) as error:
        raise IllegalArgumentError("the partition's descriptor is not open; open a file for it") from error
    if stat.S_ISDIR(mode):
        problem = "is a directory"
    elif not stat.S_ISREG(mode):
        problem = "is a device, pipe or socket"
    elif flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDWR:
        problem = "is not open for reading and writing"
    elif flags & os.O_APPEND:
        problem = "is in append mode, where all writes go to the end"
    else:
        return
    raise ImageError(
        f"Failed to reset a file: the descriptor {problem}; open a regular file for reading and writing"
    )


def _write(fd: int, image: NewImage) -> None:
    os.ftruncate(fd, image.length)
    for offset, data in image.pieces:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
