"""QCOW2 headers: written in the one form that every VMM takes, read from whoever may have written them.

Numbers are big endian. Only the header, its extensions and the places of the tables are looked at. The
tables themselves are the VMM's business: whatever stands in them, they lead nowhere but into the same file.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmactor.errors import ImageError
from vmactor.images.files import read_at, size_of

MAGIC: Final = b"QFI\xfb"
MAX_SIZE: Final = 1 << 44
"""Largest virtual size: 16 TiB, the limit of crosvm."""
CLUSTER: Final = 1 << 16
"""Bytes in a cluster of the images that we write."""

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
"""Magic, version, backing file's offset and length, cluster bits, virtual size, encryption, entries of L1,
offset of L1, offset and clusters of the refcount table, number and offset of snapshots."""
_VERSION_3: Final = struct.Struct(">QQQII")
"""Incompatible, compatible and autoclear features, refcount order, header length; version 3 only."""
_EXTENSION: Final = struct.Struct(">II")
_DATA_FILE_BIT: Final = 1 << 2
_DATA_FILE: Final = 0x44415441
_BACKING_FORMATS: Final = (0xE2792ACA, 0xE279268F)
"""The extension that names the backing file's format, as QEMU and as crosvm numbers it."""
_MAX_EXTENSIONS: Final = 64
_MAX_NAME: Final = 1023
_MAX_L1_BYTES: Final = 32 << 20
_MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
_COPIED: Final = 1 << 63
"""In an entry of L1 or L2: the cluster has no other user and may be written in place."""


@dataclass(frozen=True, slots=True)
class Qcow2:
    """What a QCOW2 file says of itself. Names are foreign text.

    Attributes:
        version: 2 or 3.
        cluster_size: Bytes in a cluster.
        virtual_size: The guest's disk, in bytes.
        backing_file: The name of a file that is read where this one has nothing.
        backing_format: Its format, if that is told.
        data_file: The name of a file that holds the data; empty if there is one without a name.
        encrypted: Whether the data is.
        snapshots: Number of internal snapshots.
        incompatible_features: Bits that a reader must know.
        refcount_bits: Bits in a reference count.
    """

    version: int
    cluster_size: int
    virtual_size: int
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    encrypted: bool
    snapshots: int
    incompatible_features: int
    refcount_bits: int


# -- Reading ------------------------------------------------------------------------------------------


def read(fd: int) -> Qcow2:
    """Read the header of a QCOW2 file. At most two pieces of 2 MiB are read, whatever the file says.

    Raises:
        ImageError: It is broken; the message says how, without the file's name.
    """
    start = read_at(fd, 0, _HEADER.size + _VERSION_3.size)
    if len(start) < _HEADER.size:
        raise _broken("ends in the middle of its header")
    fields = _HEADER.unpack_from(start)
    magic, version, backing_offset, backing_length, cluster_bits, virtual_size, encryption = fields[:7]
    l1_entries, l1_offset, refcounts_offset, refcounts_clusters, snapshots, snapshots_offset = fields[7:]
    if magic != MAGIC:
        raise _broken("has no QCOW2 magic")
    if not 9 <= cluster_bits <= 21:
        raise _broken(f"has clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible")
    if virtual_size >= 1 << 63:
        raise _broken("has a virtual size that no file can have")
    cluster = 1 << cluster_bits
    incompatible, refcount_order, header_length = _of_version(version, start[_HEADER.size :], cluster)
    entries = -(-virtual_size // (cluster * (cluster // 8)))
    if not refcounts_clusters:
        raise _broken("has no refcount table")
    if l1_entries < entries:
        raise _broken(f"has {l1_entries} entries in its L1 table and needs {entries}")
    _check_tables(
        size_of(fd),
        cluster,
        [
            ("L1 table", l1_offset, l1_entries * 8, _MAX_L1_BYTES),
            ("refcount table", refcounts_offset, refcounts_clusters * cluster, _MAX_REFCOUNT_TABLE_BYTES),
            ("snapshot table", snapshots_offset if snapshots else 0, snapshots * 40, 1 << 26),
        ],
    )
    first = read_at(fd, 0, cluster)
    backing_file = _backing_file(first, header_length, backing_offset, backing_length)
    extensions = dict(_extensions(first, header_length, backing_offset or cluster))
    backing_format = next((extensions[number] for number in _BACKING_FORMATS if number in extensions), None)
    data_file = extensions.get(_DATA_FILE, b"" if incompatible & _DATA_FILE_BIT else None)
    return Qcow2(
        version=version,
        cluster_size=cluster,
        virtual_size=virtual_size,
        backing_file=_text(backing_file),
        backing_format=_text(backing_format),
        data_file=_text(data_file),
        encrypted=encryption != 0,
        snapshots=snapshots,
        incompatible_features=incompatible,
        refcount_bits=1 << refcount_order,
    )


def _of_version(version: int, rest: bytes, cluster: int) -> tuple[int, int, int]:
    """Incompatible features, refcount order and header length."""
    if version == 2:
        return 0, 4, _HEADER.size
    if version != 3:
        raise _broken(f"has version {version}, and 2 and 3 are known")
    if len(rest) < _VERSION_3.size:
        raise _broken("ends in the middle of its header")
    incompatible, _, _, refcount_order, header_length = _VERSION_3.unpack(rest)
    if refcount_order > 6:
        raise _broken(f"has reference counts of 2^{refcount_order} bits; at most 64 bits are possible")
    if not _HEADER.size + _VERSION_3.size <= header_length <= cluster:
        raise _broken(f"has a header of {header_length} bytes")
    return incompatible, refcount_order, header_length


def _backing_file(first: bytes, header_length: int, offset: int, length: int) -> bytes | None:
    if not offset and not length:
        return None
    if not header_length <= offset <= offset + length <= len(first):
        raise _broken("has the name of its backing file outside its first cluster")
    if length > _MAX_NAME:
        raise _broken(f"has a backing file with a name of {length} bytes")
    return first[offset : offset + length]


def _check_tables(file_size: int, cluster: int, tables: list[tuple[str, int, int, int]]) -> None:
    """Each table lies in the file and over no other, and begins at a cluster; the first is the header's."""
    taken, owner = cluster, "header"
    for name, offset, length, limit in sorted(tables, key=lambda table: table[1]):
        if not length:
            continue
        if length > limit:
            raise _broken(f"has a {name} of {length} bytes; {limit} are possible")
        if offset % cluster:
            raise _broken(f"has its {name} in the middle of a cluster")
        if offset + length > file_size:
            raise _broken(f"has its {name} beyond the end of the file")
        if offset < taken:
            raise _broken(f"has its {name} over its {owner}")
        taken, owner = offset + length, name


def _extensions(first: bytes, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    for left in range(_MAX_EXTENSIONS, -1, -1):
        if offset + _EXTENSION.size > min(end, len(first)):
            return
        number, length = _EXTENSION.unpack_from(first, offset)
        if number == 0:
            return
        if not left:
            raise _broken(f"has more than {_MAX_EXTENSIONS} header extensions")
        offset += _EXTENSION.size
        if offset + length > min(end, len(first)):
            raise _broken("has a header extension that does not end in its first cluster")
        yield number, first[offset : offset + length]
        offset += length + -length % 8


def _text(data: bytes | None) -> str | None:
    return None if data is None else data[:_MAX_NAME].decode(errors="surrogateescape")


def _broken(how: str) -> ImageError:
    return ImageError(f"is a broken QCOW2 image: it {how}; 'qemu-img check' may tell more")


# -- Writing ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image to be written into an empty file.

    Attributes:
        length: Of the file, in bytes. All that no piece covers is zeros.
        pieces: What to write where. The header comes last: before it is there, the file is no QCOW2 image.
    """

    length: int
    pieces: tuple[tuple[int, bytes], ...]


def new_image(virtual_size: int, contents: bytes = b"") -> NewImage:
    """Lay out an image: version 3, clusters of 64 KiB, refcounts of 16 bits, no other features. Pure.

    Tables are as large as they can ever become, for readers that cannot move them (crosvm). In clusters:
    header, L1 table, refcount table, its first block; with contents an L2 table and one cluster of data.

    Args:
        virtual_size: 0 to ``MAX_SIZE`` bytes.
        contents: What the disk begins with, at most a cluster and at most the disk.
    """
    data_clusters = -(-virtual_size // CLUSTER)
    l1_entries = max(1, -(-data_clusters // (CLUSTER // 8)))
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    # A refcount takes 2 bytes: blocks for everything else, then blocks for those blocks (crosvm's sizing).
    blocks = -(-2 * (data_clusters + l1_clusters + l1_entries + 1) // CLUSTER)
    blocks += -(-2 * blocks // CLUSTER)
    refcounts_clusters = -(-8 * blocks // CLUSTER)

    l1 = 1
    refcounts = l1 + l1_clusters
    block = refcounts + refcounts_clusters
    clusters = block + 1
    pieces = [(refcounts * CLUSTER, struct.pack(">Q", block * CLUSTER))]
    if contents:
        l2, data = clusters, clusters + 1
        clusters += 2
        pieces += [
            (l1 * CLUSTER, struct.pack(">Q", l2 * CLUSTER | _COPIED)),
            (l2 * CLUSTER, struct.pack(">Q", data * CLUSTER | _COPIED)),
            (data * CLUSTER, contents),
        ]
    pieces.append((block * CLUSTER, b"\0\1" * clusters))
    header = _HEADER.pack(
        *(MAGIC, 3, 0, 0, CLUSTER.bit_length() - 1, virtual_size, 0),
        *(l1_entries, l1 * CLUSTER, refcounts * CLUSTER, refcounts_clusters, 0, 0),
    )
    header += _VERSION_3.pack(0, 0, 0, 4, _HEADER.size + _VERSION_3.size)
    pieces.append((0, header + _EXTENSION.pack(0, 0)))
    return NewImage(clusters * CLUSTER, tuple(pieces))
