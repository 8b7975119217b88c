"""GUID partition tables: written as crosvm writes them, read from whoever may have written them.

A table is a header of one sector and 128 entries, at the beginning of a disk and once more at its end.
Sectors have 512 bytes, as for the guest's virtio disk.

Source of what is written: crosvm's ``disk/src/gpt.rs``. It differs from the UEFI specification in one point,
which Linux does not mind: the backup header says that its entries begin at sector 2, where the others are.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from vmactor.errors import ImageError
from vmactor.text import escape

SECTOR: Final = 512
MAX_ENTRIES: Final = 128
LINUX_FILESYSTEM: Final = UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4")
"""The only partition type that is written, whatever is in a partition."""
ENTRIES_SIZE: Final = MAX_ENTRIES * 128
BEGINNING: Final = 40 * SECTOR
"""Bytes before the first partition: MBR, header, entries, zeros."""
BACKUP: Final = ENTRIES_SIZE + SECTOR
"""Bytes of the backup: entries, header."""

_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
"""Signature, revision, size, checksum, zero, own sector, the other header's, first and last usable sector,
disk GUID, first sector of the entries, their number, their size, their checksum."""
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
"""Type, GUID, first and last sector, attributes, label in UTF-16."""
_MBR: Final = struct.Struct("<446xB3sB3sII48x2s")
"""One entry of four: status, first place, type, last place, first sector, sectors; then the signature."""
_SIGNATURE: Final = b"EFI PART"
_REVISION: Final = 0x10000
_CHECKSUM: Final = slice(16, 20)
_MAX_TABLE: Final = 1 << 20
"""Bytes of entries that are read; 8,192 of them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A partition in a table.

    Attributes:
        label: Its name; foreign text if it was read.
        first: Its first sector.
        last: Its last sector, which belongs to it.
        guid: What tells it from all others.
        type_guid: What it is for.
        attributes: Bits that are 0 as a rule.
    """

    label: str
    first: int
    last: int
    guid: UUID
    type_guid: UUID = LINUX_FILESYSTEM
    attributes: int = 0

    @property
    def offset(self) -> int:
        """Where it begins, in bytes."""
        return self.first * SECTOR

    @property
    def size(self) -> int:
        """How long it is, in bytes."""
        return (self.last - self.first + 1) * SECTOR


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table.

    Attributes:
        guid: The disk's.
        backup: Sector of the backup header.
        first_usable: The first sector that a partition may have.
        last_usable: The last one.
        entries: The partitions, in the order of the table.
    """

    guid: UUID
    backup: int
    first_usable: int
    last_usable: int
    entries: tuple[Entry, ...]


# -- Writing ------------------------------------------------------------------------------------------


def protective_mbr(size: int) -> bytes:
    """The first sector of a disk of ``size`` bytes: it says that all is taken. Pure.

    Raises:
        ImageError: The disk has 2 TiB or more, which the reference cannot write either.
    """
    if size // SECTOR >= 1 << 32:
        raise ImageError(f"a disk of {size} bytes has no room in its MBR; put less than 2 TiB on one disk")
    return _MBR.pack(0, bytes(3), 0xEE, bytes(3), 1, size // SECTOR, b"\x55\xaa")


def write_entries(entries: Sequence[Entry]) -> bytes:
    """The 128 entries as they stand on the disk. Pure; a label is cut at 36 units, as by the reference."""
    table = b"".join(
        _ENTRY.pack(
            *(entry.type_guid.bytes_le, entry.guid.bytes_le, entry.first, entry.last, entry.attributes),
            entry.label.encode("utf-16-le"),
        )
        for entry in entries
    )
    return table.ljust(ENTRIES_SIZE, b"\0")


def write_header(table: Table, entries: bytes, *, backup: bool) -> bytes:
    """One of the two headers, a sector long. Pure."""
    places = (table.backup, 1) if backup else (1, table.backup)
    header = _HEADER.pack(
        *(_SIGNATURE, _REVISION, _HEADER.size, 0, 0, *places, table.first_usable, table.last_usable),
        *(table.guid.bytes_le, 2, MAX_ENTRIES, _ENTRY.size, zlib.crc32(entries)),
    )
    checked = bytearray(header.ljust(SECTOR, b"\0"))
    checked[_CHECKSUM] = struct.pack("<I", zlib.crc32(header))
    return bytes(checked)


# -- Reading ------------------------------------------------------------------------------------------


def read(read_at: Callable[[int, int], bytes]) -> Table | None:
    """Read the table at the beginning of a disk; at most 1 MiB of entries, whatever the header says.

    Args:
        read_at: Reads at an offset as many bytes as asked for, fewer only where the disk ends.

    Returns:
        None if the disk has no partition table.

    Raises:
        ImageError: It has one, and it is broken; the message says how, without the disk's name.
    """
    sector = read_at(SECTOR, SECTOR)
    if not sector.startswith(_SIGNATURE):
        return None
    if len(sector) < SECTOR:
        raise _broken("ends in the middle of its header")
    fields = _HEADER.unpack_from(sector)
    _, _, size, checksum, _, own, backup, first_usable, last_usable, guid, start, number, entry_size, sums = (
        fields
    )
    if not _HEADER.size <= size <= SECTOR:
        raise _broken(f"says that its header has {size} bytes; {_HEADER.size} to {SECTOR} are possible")
    header = bytearray(sector[:size])
    header[_CHECKSUM] = bytes(4)
    if zlib.crc32(header) != checksum:
        raise _broken("has a header with a wrong checksum")
    if own != 1 or start < 2 or start >= 1 << 54:
        raise _broken("has a header that belongs somewhere else")
    if entry_size < _ENTRY.size or entry_size % 8 or number * entry_size > _MAX_TABLE:
        raise _broken(f"says it has {number} entries of {entry_size} bytes")
    entries = read_at(start * SECTOR, number * entry_size)
    if len(entries) < number * entry_size:
        raise _broken("ends in the middle of its entries")
    if zlib.crc32(entries) != sums:
        raise _broken("has entries with a wrong checksum")
    found = tuple(_read_entries(entries, entry_size, first_usable, last_usable))
    _check_overlaps(found)
    return Table(UUID(bytes_le=guid), backup, first_usable, last_usable, found)


def _read_entries(data: bytes, entry_size: int, first_usable: int, last_usable: int) -> Iterable[Entry]:
    for at in range(0, len(data), entry_size):
        type_guid, guid, first, last, attributes, name = _ENTRY.unpack_from(data, at)
        if type_guid == bytes(16):
            continue
        label = name.decode("utf-16-le", errors="surrogatepass").partition("\0")[0]
        if not first_usable <= first <= last <= last_usable:
            raise _broken(
                f'has partition "{escape(label)}" at sectors {first} to {last}, and may have them at '
                f"{first_usable} to {last_usable}"
            )
        yield Entry(label, first, last, UUID(bytes_le=guid), UUID(bytes_le=type_guid), attributes)


def _check_overlaps(entries: Iterable[Entry]) -> None:
    before: Entry | None = None
    for entry in sorted(entries, key=lambda entry: entry.first):
        if before is not None and entry.first <= before.last:
            raise _broken(f'has partitions "{escape(before.label)}" and "{escape(entry.label)}" in one place')
        before = entry


def _broken(how: str) -> ImageError:
    return ImageError(f"has a broken partition table: it {how}; 'sgdisk --verify' may tell more")
