"""QEMU's disks: every file by its descriptor, and disks of partitions as one block device.

QEMU opens descriptors by the name ``/dev/fdset/K``, where K is the number of a set. A set here has one
descriptor and its number: the descriptor in it cannot become more than what we opened.

QEMU cannot read crosvm's composite disks, and it has one driver that joins files to a disk: VMDK with flat
extents. So the pieces of a disk are listed in a VMDK description, in memory, and each extent is opened with
options of its own. Nothing in the pieces is probed, and nothing is copied.

Its extents are all writable or none, though. In a disk that is partly writable, the read-only pieces
therefore stand behind QEMU's view of a snapshot (``snapshot-access`` over ``copy-before-write``, QEMU 7.0):
that is a node which may be part of a writable disk and answers every write with an error, above a node that
is open for reading only. Nothing is ever copied, since nothing is written below.

Rejected: a server of our own for the network block device protocol. It would hold the files of clients in
the manager's threads, where one that never answers blocks more than its VM, and would have to know QCOW2.
"""

import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

from vmactor.config import DiskImage, RawConfig
from vmactor.images.composite import Composite, Piece, assemble, memory_file
from vmactor.images.gpt import SECTOR
from vmactor.messages import ImageKind
from vmactor.text import qemu_value

_DESCRIPTION: Final = """\
# Disk DescriptorFile
version=1
CID=00000001
parentCID=ffffffff
createType="twoGbMaxExtentFlat"
"""
_DESCRIPTION_SIZE: Final = 10240
"""QEMU writes a new CID into the description at the first write, and that many bytes with it."""


class FdSets:
    """The descriptor sets that a command line names."""

    def __init__(self) -> None:
        self._fds: dict[int, None] = {}

    def path(self, fd: int) -> str:
        """The name under which QEMU opens ``fd``."""
        self._fds[fd] = None
        return _path(fd)

    def arguments(self) -> list[str]:
        """What makes QEMU know the sets; must stand on the command line, anywhere."""
        return [arg for fd in self._fds for arg in ("-add-fd", f"fd={fd},set={fd}")]


def _path(fd: int) -> str:
    return f"/dev/fdset/{fd}"


@dataclass(frozen=True, slots=True)
class JoinedDisk:
    """A disk of partitions, ready for QEMU.

    Attributes:
        composite: Its pieces.
        description: A VMDK description of them; open for writing if the disk is writable.
        copies: A file for copies that are never made; None if the disk is read-only.
    """

    composite: Composite
    description: int
    copies: int | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a launch's disks beside its configuration.

    Attributes:
        joined: The disks of partitions, by their number.
        devices: Descriptors of block devices, for which QEMU has a driver of its own.
    """

    joined: Mapping[int, JoinedDisk] = field(default_factory=dict)
    devices: frozenset[int] = frozenset()

    def fds(self) -> set[int]:
        """What QEMU must inherit beside the configuration's descriptors."""
        fds: set[int] = set()
        for disk in self.joined.values():
            fds.update(disk.composite.fds(), {disk.description})
            if disk.copies is not None:
                fds.add(disk.copies)
        return fds


def prepare(config: RawConfig, opened: ExitStack) -> Prepared:
    """Put disks of partitions together, and describe them to QEMU.

    Args:
        config: Its descriptors are used as they are.
        opened: Closes what is made here; keep it until QEMU has inherited it.

    Raises:
        ImageError: As ``assemble``.
        OSError: No memory or no descriptor.
    """
    joined = {}
    for number, disk in enumerate(config.disks):
        if not disk.partitions:
            continue
        composite = assemble(disk.partitions, opened)
        description, copies = describe(composite), None
        if disk.writable:
            copies = _scratch("copies", bytes(SECTOR), opened)
            joined[number] = JoinedDisk(composite, _scratch("description", description, opened), copies)
        else:
            joined[number] = JoinedDisk(composite, memory_file("description", description, opened), None)
    images = [disk.image for disk in config.disks if disk.image is not None]
    images += [part.image for disk in config.disks for part in disk.partitions]
    return Prepared(joined, frozenset(fd for fd in images if stat.S_ISBLK(os.fstat(fd).st_mode)))


def describe(composite: Composite) -> bytes:
    """A VMDK description of a disk. Pure.

    A piece that does not end with a sector gets the whole of it: QEMU reads zeros behind the end of a file.
    """
    lines = [
        f'RW {sectors} FLAT "{_path(piece.fd)}" 0\n'
        for piece in composite.pieces
        if (sectors := _sectors(piece))
    ]
    return (_DESCRIPTION + "".join(lines)).encode().ljust(_DESCRIPTION_SIZE, b"\n")


def _sectors(piece: Piece) -> int:
    """How many sectors begin in a piece; the zeros behind a file may have none."""
    return -(-(piece.offset + piece.length) // SECTOR) - -(-piece.offset // SECTOR)


def _scratch(name: str, data: bytes, opened: ExitStack) -> int:
    fd = os.memfd_create(f"vmactor-{name}", os.MFD_CLOEXEC)
    opened.callback(os.close, fd)
    os.pwrite(fd, data, 0)
    return fd


def disk_arguments(config: RawConfig, prepared: Prepared, sets: FdSets) -> Iterable[str]:
    """The options that give QEMU its disks. Pure."""
    for number, disk in enumerate(config.disks):
        if disk.image is None:
            yield from _joined(number, disk.writable, prepared, sets)
        else:
            yield from _plain(number, disk, disk.image, prepared, sets)
        # A full host disk is the guest's I/O error, as with crosvm. QEMU's default would pause the guest, and
        # nobody would know why.
        yield from ("-device", f"virtio-blk-pci,drive=disk{number},werror=report,rerror=report")


def _plain(number: int, disk: DiskImage, image: int, prepared: Prepared, sets: FdSets) -> Iterable[str]:
    driver, mode = _driver(image, prepared), "off" if disk.writable else "on"
    yield from (
        "-blockdev",
        f"driver={driver},node-name=file{number},filename={sets.path(image)},"
        f"read-only={mode},auto-read-only=off,discard=unmap",
        "-blockdev",
        _format_node(number, disk),
    )


def _format_node(number: int, disk: DiskImage) -> str:
    """The image's format is what it was locked to; QEMU never judges it by itself."""
    if disk.format is not ImageKind.QCOW2:
        mode = "off" if disk.writable else "on"
        return f"driver=raw,node-name=disk{number},file=file{number},read-only={mode},discard=unmap"
    # In the other notation nothing says "no backing file", whatever the image's header says by now.
    node = {"driver": "qcow2", "node-name": f"disk{number}", "file": f"file{number}", "backing": None}
    return json.dumps(node | {"read-only": not disk.writable, "discard": "unmap"})


def _joined(number: int, writable: bool, prepared: Prepared, sets: FdSets) -> Iterable[str]:
    joined, mode = prepared.joined[number], "off" if writable else "on"
    if joined.copies is not None:
        yield from (
            "-blockdev",
            f"driver=file,node-name=copies{number},filename={sets.path(joined.copies)},"
            "read-only=off,auto-read-only=off",
        )
    for fd in joined.composite.fds():
        sets.path(fd)
    graph = {
        "driver": "vmdk",
        "file": _file("file", writable=writable) | {"filename": sets.path(joined.description)},
        "extents": [
            _extent(piece, _driver(piece.fd, prepared), f"copies{number}", disk_writable=writable)
            for piece in joined.composite.pieces
            if _sectors(piece)
        ],
    }
    # Not -blockdev, which knows no extents. What -drive would choose by itself comes before what stands in
    # the file's name, hence the two options in front.
    name = qemu_value(f"json:{json.dumps(graph, separators=(',', ':'))}")
    yield from ("-drive", f"if=none,id=disk{number},read-only={mode},auto-read-only=off,file={name}")


def _extent(piece: Piece, driver: str, copies: str, *, disk_writable: bool) -> dict[str, Any]:
    """Options for an extent, whose file QEMU takes from the description."""
    writable = disk_writable and piece.writable
    node = _file(driver, writable=writable)
    if piece.format is ImageKind.QCOW2:
        # The explicit null: whatever the image's header says, there is no backing file.
        node = {"driver": "qcow2", "read-only": not writable, "backing": None, "file": node}
    if disk_writable and not writable:
        node = {"driver": "copy-before-write", "target": copies, "file": node}
        node = {"driver": "snapshot-access", "file": node}
    return node


def _file(driver: str, *, writable: bool) -> dict[str, Any]:
    return {"driver": driver, "read-only": not writable, "auto-read-only": False}


def _driver(fd: int, prepared: Prepared) -> str:
    return "host_device" if fd in prepared.devices else "file"
