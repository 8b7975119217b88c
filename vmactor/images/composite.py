"""Composite disks: partitions in files of their own, with a partition table around them, as one disk.

``plan`` is the pure heart: it lays the partitions out and writes the table. ``assemble`` puts what it says
into memory files, so that every piece of the disk is a descriptor. What lists these pieces for a VMM is
another matter: crosvm's specification file, here, or whatever a driver has for it.

Source: crosvm's ``disk/src/composite.rs``, byte for byte but for the GUIDs, which are random.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, StrEnum
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl
from functools import cache
from itertools import pairwise
from typing import Any, Final
from uuid import UUID, uuid4

from vmactor.config import Partition
from vmactor.config_rules import check_guids, check_labels
from vmactor.errors import ImageError
from vmactor.images import qcow2
from vmactor.images.files import size_of
from vmactor.images.gpt import (
    BACKUP,
    BEGINNING,
    SECTOR,
    Entry,
    Table,
    protective_mbr,
    write_entries,
    write_header,
)
from vmactor.messages import ImageKind
from vmactor.protobuf import message_classes
from vmactor.strict_json import about
from vmactor.text import escape

MAGIC: Final = b"composite_disk\x1d"
GRANULE: Final = 4096
"""Partitions begin at multiples of this, and have such sizes in the guest; also the zero filler's size."""
VERSION: Final = 2
"""Of specification files: 2, since when relative paths begin at the file's own directory."""
MAX_SPECIFICATION: Final = 1 << 20
"""Bytes of a specification file that are read."""
MAX_COMPONENTS: Final = 1024

_FOOTER_PADDING: Final = BEGINNING - BACKUP
_OLD_GRANULE: Final = 1 << 16


class Layout(StrEnum):
    """Where a composite disk has its padding; every crosvm reads both."""

    PADDING_FIRST = "2024-11"
    """Before the backup of the partition table, which so ends with the disk. crosvm since 2024-11-19."""
    PADDING_LAST = "2023"
    """After it, up to a multiple of 64 KiB; Linux warns that the backup is not at the end. Until then."""


@dataclass(frozen=True, slots=True)
class Part:
    """A partition to be laid out.

    Attributes:
        label: Its name.
        size: In bytes; of a writable part a multiple of 4,096.
        writable: Whether the guest may write to it, if the disk is writable.
        guid: What tells it from all others; None for a random one.
    """

    label: str
    size: int
    writable: bool = False
    guid: UUID | None = None


class Made(Enum):
    """Pieces of a disk that are no partition of somebody's."""

    HEADER = "header"
    FILLER = "filler"
    FOOTER = "footer"


@dataclass(frozen=True, slots=True)
class Component:
    """A piece of a disk.

    Attributes:
        source: What is there: the number of a partition, or something that we made.
        offset: Where it begins, in bytes.
        length: How long it is, in bytes.
        writable: Whether the guest may write to it, if the disk is writable.
    """

    source: int | Made
    offset: int
    length: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A disk, laid out.

    Attributes:
        table: Its partition table.
        header: What it begins with.
        footer: What it ends with.
        components: All of it, in order and without a gap.
        size: In bytes.
    """

    table: Table
    header: bytes
    footer: bytes
    components: tuple[Component, ...]
    size: int


def plan(
    parts: Sequence[Part], *, layout: Layout = Layout.PADDING_FIRST, guids: Callable[[], UUID] = uuid4
) -> Plan:
    """Lay partitions out on a disk. Pure, but for the GUIDs.

    Args:
        parts: 1 to 128 partitions.
        layout: Where the padding goes.
        guids: Called for each partition without a GUID, in order, then for the disk's own.

    Raises:
        IllegalArgumentError: A label is empty or too long, a label or GUID is there twice, or the number of
            partitions is wrong.
        ImageError: A size will not do: none at all, not a multiple of 4,096 and writable, or too much.
    """
    check_labels([part.label for part in parts])
    check_guids(part.guid for part in parts)
    entries, components = [], [Component(Made.HEADER, 0, BEGINNING)]
    offset = BEGINNING
    for number, part in enumerate(parts):
        if part.size < 1:
            raise ImageError(f'Partition "{escape(part.label)}" is empty; give it contents or leave it out')
        padding = -part.size % GRANULE
        if padding and part.writable:
            raise ImageError(
                f'Read-write partition "{escape(part.label)}" size is not a multiple of {GRANULE}. (It is '
                f"{part.size}; lengthen the file with 'truncate -s %{GRANULE}', or make it read-only.)"
            )
        components.append(Component(number, offset, part.size, part.writable))
        if padding:
            components.append(Component(Made.FILLER, offset + part.size, padding))
        end = offset + part.size + padding
        entries.append(Entry(part.label, offset // SECTOR, end // SECTOR - 1, part.guid or guids()))
        offset = end

    if layout is Layout.PADDING_FIRST:
        before, after = _FOOTER_PADDING, 0
    else:
        before, after = 0, -(offset + BACKUP) % _OLD_GRANULE
    backup = offset + before
    table = Table(
        guids(), (backup + BACKUP) // SECTOR - 1, BEGINNING // SECTOR, backup // SECTOR - 1, tuple(entries)
    )
    size = backup + BACKUP + after
    mbr, rows = protective_mbr(size), write_entries(entries)
    header = (mbr + write_header(table, rows, backup=False) + rows).ljust(BEGINNING, b"\0")
    footer = bytes(before) + rows + write_header(table, rows, backup=True) + bytes(after)
    components.append(Component(Made.FOOTER, offset, len(footer)))
    return Plan(table, header, footer, tuple(components), size)


# -- Specification files ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of a disk as a specification file names it.

    Attributes:
        path: Of the file that holds it; foreign text if it was read.
        offset: Where it begins on the disk, in bytes.
        writable: Whether the guest may write to it, if the disk is writable.
        file_offset: Where it begins in the file; crosvm since 2026-03-19.
    """

    path: str
    offset: int
    writable: bool = False
    file_offset: int = 0


@dataclass(frozen=True, slots=True)
class Specification:
    """What a specification file says.

    Attributes:
        extents: In ascending order; each ends where the next one begins.
        size: Of the disk, in bytes.
    """

    extents: tuple[Extent, ...]
    size: int

    def lengths(self) -> Iterator[int]:
        """How long each extent is, in bytes."""
        offsets = [*(extent.offset for extent in self.extents), self.size]
        return (end - begin for begin, end in pairwise(offsets))


@cache
def _messages() -> dict[str, Any]:
    return message_classes(
        "vmactor.cdisk_spec",
        {
            "ComponentDisk": {
                "file_path": (1, "string"),
                "offset": (2, "uint64"),
                "read_write_capability": (3, "int32"),
                "file_offset": (4, "uint64"),
            },
            "CompositeDisk": {
                "version": (1, "uint64"),
                "component_disks": (2, "repeated ComponentDisk"),
                "length": (3, "uint64"),
            },
        },
    )


def write_specification(specification: Specification) -> bytes:
    """A specification file for crosvm. Pure.

    Raises:
        ImageError: A path is not Unicode, and crosvm takes no other.
    """
    message = _messages()["CompositeDisk"](version=VERSION, length=specification.size)
    try:
        for extent in specification.extents:
            message.component_disks.add(
                file_path=extent.path,
                offset=extent.offset,
                read_write_capability=int(extent.writable),
                file_offset=extent.file_offset,
            )
    except ValueError:  # UnicodeEncodeError is one
        raise ImageError(
            f'crosvm takes paths in UTF-8 only, and "{escape(extent.path)}" is not; rename the file'
        ) from None
    return MAGIC + bytes(message.SerializeToString(deterministic=True))


def read_specification(data: bytes) -> Specification:
    """Read a specification file, by crosvm's rules. Pure; the paths in it are not looked at.

    Args:
        data: The file, or its first ``MAX_SPECIFICATION`` bytes and one more.

    Raises:
        ImageError: It is broken; the message says how, without the file's name.
    """
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - as late as _messages

    if not data.startswith(MAGIC):
        raise _broken("does not begin with its magic")
    if len(data) > MAX_SPECIFICATION:
        raise _broken(f"has more than {MAX_SPECIFICATION} bytes")
    message = _messages()["CompositeDisk"]()
    try:
        message.ParseFromString(data[len(MAGIC) :])
    except DecodeError:
        raise _broken("is no protocol buffer") from None
    if message.version > VERSION:
        raise _broken(f"has version {message.version}, and {VERSION} is the newest known")
    if not 1 <= len(message.component_disks) <= MAX_COMPONENTS:
        raise _broken(f"has {len(message.component_disks)} components; 1 to {MAX_COMPONENTS} are possible")
    extents = [
        Extent(disk.file_path, disk.offset, disk.read_write_capability == 1, disk.file_offset)
        for disk in message.component_disks
    ]
    extents.sort(key=lambda extent: extent.offset)
    if extents[0].offset:
        raise _broken("has nothing at its beginning")
    for extent, following in pairwise(extents):
        if extent.offset == following.offset:
            raise _broken(f"has two components at offset {extent.offset}")
    if not extents[-1].offset < message.length < 1 << 63:
        raise _broken(f"has a length of {message.length} bytes, which does not fit its components")
    return Specification(tuple(extents), message.length)


def _broken(how: str) -> ImageError:
    return ImageError(f"is a broken composite disk: it {how}; make it anew")


# -- Descriptors --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an assembled disk.

    Attributes:
        fd: What holds it, from its beginning.
        offset: Where it begins on the disk, in bytes.
        length: How long it is, in bytes.
        writable: Whether the guest may write to it, if the disk is writable.
        format: What the file is; the piece is the disk in it.
    """

    fd: int
    offset: int
    length: int
    writable: bool
    format: ImageKind = ImageKind.RAW


@dataclass(frozen=True, slots=True)
class Composite:
    """A disk whose pieces are open.

    Attributes:
        pieces: All of it, in order and without a gap.
        size: In bytes.
    """

    pieces: tuple[Piece, ...]
    size: int

    def fds(self) -> tuple[int, ...]:
        """Every descriptor of a piece, each once, in ascending order: what the VMM must inherit."""
        return tuple(sorted({piece.fd for piece in self.pieces}))


def assemble(
    partitions: Sequence[Partition],
    opened: ExitStack,
    *,
    layout: Layout = Layout.PADDING_FIRST,
    guids: Callable[[], UUID] = uuid4,
) -> Composite:
    """Put a disk together.

    Args:
        partitions: Their descriptors are used as they are, and stay the caller's. Those without a format are
            raw images. The files of those without a size are looked at, which blocks as long as they do.
        opened: Closes what is opened here: sealed memory files with header, footer and zeros. Keep them
            until the VMM has inherited them.
        layout: Where the padding goes.
        guids: Where GUIDs come from.

    Raises:
        IllegalArgumentError: As ``plan``.
        ImageError: As ``plan``.
        OSError: No memory or no descriptor.
    """
    parts = []
    for part in partitions:
        with about(f'Partition "{escape(part.label)}"'):
            size = disk_size(part.image, part.format) if part.size is None else part.size
        parts.append(Part(part.label, size, part.writable, part.guid))
    laid_out = plan(parts, layout=layout, guids=guids)
    contents = {Made.HEADER: laid_out.header, Made.FOOTER: laid_out.footer, Made.FILLER: bytes(GRANULE)}
    made = {
        source: memory_file(source.value, data, opened)
        for source, data in contents.items()
        if any(component.source is source for component in laid_out.components)
    }
    pieces = []
    for component in laid_out.components:
        place = (component.offset, component.length, component.writable)
        if isinstance(component.source, Made):
            pieces.append(Piece(made[component.source], *place))
        else:
            partition = partitions[component.source]
            pieces.append(Piece(partition.image, *place, partition.format or ImageKind.RAW))
    return Composite(tuple(pieces), laid_out.size)


def disk_size(fd: int, kind: ImageKind | None) -> int:
    """The size of the disk in a raw or QCOW2 image, in bytes. Raises ImageError."""
    return qcow2.read(fd).virtual_size if kind is ImageKind.QCOW2 else size_of(fd)


def crosvm_image(composite: Composite, opened: ExitStack) -> int:
    """A specification file in memory for a crosvm that inherits the pieces under the same numbers.

    Args:
        composite: The disk.
        opened: Closes the file; keep it until crosvm has inherited it, with ``composite.fds()``.

    Returns:
        Its descriptor, for reading only. Give it to crosvm as the disk's path ``/proc/self/fd/N``.
    """
    extents = tuple(
        Extent(f"/proc/self/fd/{piece.fd}", piece.offset, piece.writable) for piece in composite.pieces
    )
    return memory_file("composite", write_specification(Specification(extents, composite.size)), opened)


def memory_file(name: str, data: bytes, opened: ExitStack) -> int:
    """A file in memory that nobody can change, not even root; returns a descriptor for reading only.

    Args:
        name: What ``/proc/PID/fd`` shows.
        data: What is in it.
        opened: Closes it.

    Raises:
        OSError: No memory or no descriptor.
    """
    fd = os.memfd_create(f"vmactor-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", buffering=0, closefd=False) as file:
            if file.write(data) != len(data):
                raise ImageError(f"no memory for the {name} of a composite disk; free some")
        fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
        # QEMU's descriptor sets go by the mode of a descriptor, whatever the seals say.
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
    opened.callback(os.close, readable)
    return readable
