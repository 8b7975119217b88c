"""The partitions of a disk image, for people to look at: of a composite disk, or of a disk in one file."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vmactor.errors import ImageError
from vmactor.images import gpt
from vmactor.images.composite import Extent, Specification
from vmactor.images.files import open_image, read_at


@dataclass(frozen=True, slots=True)
class FoundPartition:
    """A partition of an image.

    Attributes:
        label: Its name; foreign text. None where nothing tells it.
        offset: Where it begins on the disk, in bytes.
        size: In bytes.
        writable: Whether a composite disk lets the guest write to it; None for another image.
        file: Its file in a composite disk, as written there; foreign text. None for another image.
    """

    label: str | None
    offset: int
    size: int
    writable: bool | None = None
    file: str | None = None


def in_image(fd: int) -> tuple[FoundPartition, ...] | None:
    """The partitions of a raw image, by offset; None if it has no GUID partition table.

    Raises:
        ImageError: It has one, and it is broken.
    """
    table = gpt.read(partial(read_at, fd))
    if table is None:
        return None
    return tuple(
        FoundPartition(entry.label, entry.offset, entry.size)
        for entry in sorted(table.entries, key=lambda entry: entry.first)
    )


def in_composite(specification: Specification, directory: Path) -> tuple[FoundPartition, ...]:
    """The partitions of a composite disk, by offset.

    Of all files that it names only the first one is read, which should begin with the partition table. If it
    does not, or cannot be read, each component that can be a partition is given without a label.

    Args:
        specification: What is in its file.
        directory: Where that file is.
    """
    pieces = {
        extent.offset: (extent, length)
        for extent, length in zip(specification.extents, specification.lengths(), strict=True)
    }
    with suppress(ImageError, OSError, ValueError):  # a path with a NUL is a ValueError
        fd = open_image(_place(specification.extents[0], directory))
        try:
            table = gpt.read(_first_piece(fd, *pieces[0]))
        finally:
            os.close(fd)
        if table is not None:
            return tuple(
                FoundPartition(entry.label, entry.offset, entry.size, *_backing(entry.offset, pieces))
                for entry in sorted(table.entries, key=lambda entry: entry.first)
            )
    return tuple(
        FoundPartition(None, offset, length, extent.writable, extent.path)
        for offset, (extent, length) in pieces.items()
    )


def _backing(offset: int, pieces: dict[int, tuple[Extent, int]]) -> tuple[bool, str] | tuple[None, None]:
    found = pieces.get(offset)
    return (None, None) if found is None else (found[0].writable, found[0].path)


def _place(extent: Extent, directory: Path) -> Path:
    place = Path(os.path.normpath(directory / extent.path))
    if place.is_relative_to("/proc"):
        # A descriptor of the VMM that the disk was made for; with us it would be another file.
        raise ImageError("is no file")
    return place


def _first_piece(fd: int, extent: Extent, length: int) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        return read_at(fd, extent.file_offset + offset, max(0, min(size, length - offset)))

    return read
