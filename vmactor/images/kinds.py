"""What an image file is, and how large the disk in it. For files that anybody may have written.

The kind is judged by the first bytes, in crosvm's order. Nothing that a file names is ever opened.
"""

import os
from dataclasses import dataclass
from typing import Final

from vmactor.errors import ImageError
from vmactor.images import android_sparse, composite, qcow2
from vmactor.images.composite import Specification
from vmactor.images.files import read_at, size_of
from vmactor.images.qcow2 import Qcow2
from vmactor.messages import ImageKind

_BLOCK: Final = 512  # the unit of st_blocks, whatever the file system's own is


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What is known of an image.

    Attributes:
        kind: By its first bytes.
        virtual_size: Of the guest's disk, in bytes; None where that is not known (zstd).
        file_size: Of the file or block device, in bytes.
        allocated_size: What the file takes on its disk, in bytes; None for a block device.
        details: What else its header says, for QCOW2 images and composite disks.
    """

    kind: ImageKind
    virtual_size: int | None
    file_size: int
    allocated_size: int | None
    details: Qcow2 | Specification | None = None


def kind_of(start: bytes) -> ImageKind:
    """The kind of a file that begins like this; 15 bytes are enough. Pure."""
    if start.startswith(composite.MAGIC):
        return ImageKind.COMPOSITE
    if start.startswith(qcow2.MAGIC):
        return ImageKind.QCOW2
    if start.startswith(android_sparse.MAGIC):
        return ImageKind.ANDROID_SPARSE
    # A frame, or one of the skippable frames that may come before it.
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F):
        return ImageKind.ZSTD
    return ImageKind.RAW


def detect(fd: int) -> ImageKind:
    """The kind of an open file. Raises ImageError if it cannot be read."""
    return kind_of(read_at(fd, 0, len(composite.MAGIC)))


def inspect(fd: int) -> ImageInfo:
    """All that is known of an image. Bounded in memory and time, whatever is in the file.

    Blocks as long as the storage does: call it in a thread.

    Args:
        fd: A regular file or a block device, open for reading. Its offset stays where it is.

    Raises:
        ImageError: It cannot be read, or is broken; the message says how, without the file's name.
    """
    file_size, kind = size_of(fd), detect(fd)
    status = os.fstat(fd)
    allocated = status.st_blocks * _BLOCK if status.st_size or not file_size else None
    details: Qcow2 | Specification | None = None
    virtual_size: int | None = None
    match kind:
        case ImageKind.RAW:
            virtual_size = file_size
        case ImageKind.QCOW2:
            details = qcow2.read(fd)
            virtual_size = details.virtual_size
        case ImageKind.COMPOSITE:
            details = composite.read_specification(read_at(fd, 0, composite.MAX_SPECIFICATION + 1))
            virtual_size = details.size
        case ImageKind.ANDROID_SPARSE:
            virtual_size = android_sparse.virtual_size(fd)
    if virtual_size is not None and virtual_size >= 1 << 63:
        raise ImageError(f"has a disk of {virtual_size} bytes; no VMM takes that")
    return ImageInfo(kind, virtual_size, file_size, allocated, details)
