"""Which files may be disks: formats are locked, and nothing that a guest could have planted is followed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images import MAGICS, NOT_MAGICS, memory_file, qcow2_header, qemu_img
from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.errors import (
    ImageError,
    SecurityError,
    UnsafeImageError,
    UnsupportedOperationError,
    VmactorError,
)
from vmactor.images.disks import lock_formats
from vmactor.images.partition import initialize_writable_partition
from vmactor.messages import ImageKind

ALL_MAGICS = [(what, start) for what in MAGICS for start in MAGICS[what]]


def config(*disks: DiskImage) -> RawConfig:
    return RawConfig(name="vm", kernel=100, disks=disks)


def locked(*disks: DiskImage) -> list[ImageKind | None]:
    return [disk.format for disk in lock_formats(config(*disks)).disks]


@pytest.fixture
def raw() -> Iterator[int]:
    with memory_file(bytes(8192)) as fd:
        yield fd


@pytest.fixture
def image() -> Iterator[int]:
    """A QCOW2 image of ours."""
    with memory_file(b"") as fd:
        initialize_writable_partition(fd, 1 << 20)
        yield fd


# -- What is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", NOT_MAGICS)
def test_an_image_without_a_magic_is_raw(start: bytes) -> None:
    with memory_file(start) as fd:
        for kind in (None, "raw"):
            for writable in (False, True):
                assert locked(DiskImage(fd, writable, format=kind)) == [ImageKind.RAW]


def test_a_writable_qcow2_image_has_to_be_declared(image: int) -> None:
    assert locked(DiskImage(image, writable=True, format="qcow2")) == [ImageKind.QCOW2]
    with pytest.raises(UnsafeImageError, match=r'disks\[0\]\.image: is a writable raw image.*format="qcow2"'):
        locked(DiskImage(image, writable=True))


def test_a_read_only_qcow2_image_is_taken_as_what_it_is(image: int) -> None:
    assert locked(DiskImage(image)) == [ImageKind.QCOW2]
    assert locked(DiskImage(image, format="qcow2")) == [ImageKind.QCOW2]


def test_an_image_is_not_taken_as_what_it_is_not(raw: int, image: int) -> None:
    for writable in (False, True):
        with pytest.raises(ImageError, match="is a raw image, and its format is said to be qcow2"):
            locked(DiskImage(raw, writable, format="qcow2"))
    with pytest.raises(ImageError, match="is a QCOW2 image, and its format is said to be raw"):
        locked(DiskImage(image, format="raw"))


def test_images_of_qemu_img_can_be_disks(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "image", "1G")
    with (tmp_path / "image").open("r+b") as file:
        assert locked(DiskImage(file, writable=True, format="qcow2")) == [ImageKind.QCOW2]


def test_a_locked_configuration_refuses_what_changed_since(raw: int, image: int) -> None:
    first = lock_formats(config(DiskImage(raw), DiskImage(image)))
    assert lock_formats(first) == first
    os.pwrite(raw, qcow2_header(), 0)
    with pytest.raises(ImageError, match=r"disks\[0\]\.image: is a QCOW2 image, and its .* to be raw"):
        lock_formats(first)
    os.pwrite(raw, bytes(8), 0)
    os.pwrite(image, bytes(8), 0)
    with pytest.raises(ImageError, match=r"disks\[1\]\.image: is a raw image, and its .* to be qcow2"):
        lock_formats(first)


# -- What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "start"), ALL_MAGICS)
@pytest.mark.parametrize("kind", [None, "raw"])
def test_a_writable_raw_part_with_a_magic_is_refused(
    what: str, start: bytes, kind: str | None, raw: int
) -> None:
    with memory_file(start) as fd:
        with pytest.raises(
            UnsafeImageError, match=rf"disks\[1\]\.image: .* begins like {what}; \w+"
        ) as caught:
            lock_formats(config(DiskImage(raw), DiskImage(fd, writable=True, format=kind)))
        assert isinstance(caught.value, SecurityError)
        parts = [Partition("a", raw), Partition("b", fd, writable=True, format=kind)]
        with pytest.raises(UnsafeImageError, match=r"disks\[0\]\.partitions\[1\]\.image: .* begins like"):
            lock_formats(config(DiskImage(writable=True, partitions=parts)))


@pytest.mark.parametrize(("what", "start"), [row for row in ALL_MAGICS if row[0] != "a QCOW2 image"])
def test_containers_that_not_every_vmm_reads_are_refused_with_a_way_out(what: str, start: bytes) -> None:
    with memory_file(start) as fd:
        for disk in (DiskImage(fd), DiskImage(fd, writable=True, format="qcow2")):
            with pytest.raises(
                UnsupportedOperationError, match=f"is {what}, and only raw and QCOW2 .*; .*with|as"
            ):
                locked(disk)
        with pytest.raises(UnsupportedOperationError, match=r"disks\[0\]\.partitions\[0\]\.image: is "):
            lock_formats(config(DiskImage(partitions=[Partition("a", fd)])))


OTHER_FILES = [
    (qcow2_header(backing_offset=200, backing_length=4), "backing file"),
    (qcow2_header(backing_offset=200), "backing file"),
    (qcow2_header(version=2, header_length=0, backing_offset=80, backing_length=1), "backing file"),
    (qcow2_header(incompatible=4), "external data file"),
    (qcow2_header(b"\x44\x41\x54\x41\0\0\0\1x"), "external data file"),
]


@pytest.mark.parametrize(("header", "what"), OTHER_FILES)
def test_images_that_name_other_files_are_refused_wherever_they_come_from(header: bytes, what: str) -> None:
    with memory_file(header) as fd:
        for disk in (
            DiskImage(fd),
            DiskImage(fd, format="qcow2"),
            DiskImage(fd, writable=True, format="qcow2"),
            DiskImage(partitions=[Partition("a", fd)]),
            DiskImage(partitions=[Partition("a", fd, format="qcow2")]),
            DiskImage(writable=True, partitions=[Partition("a", fd, writable=True, format="qcow2")]),
        ):
            with pytest.raises(UnsafeImageError, match=f"is a QCOW2 image with the {what} "):
                lock_formats(config(disk))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"version": 2}, "version 2 with reference counts of 16 bits"),
        ({"refcount_order": 3}, "counts of 8 bits"),
        ({"encryption": 1}, "encryption"),
        ({"snapshots": 1, "snapshots_offset": 3 << 16}, "internal snapshots"),
        ({"incompatible": 1}, "incompatible features 0x1"),
        ({"incompatible": 1 << 63}, "incompatible features 0x8000000000000000"),
        ({"size": (1 << 44) + 1, "l1_size": 32769, "l1_offset": 4 << 16}, "a size of 17592186044417 bytes"),
    ],
)
def test_what_vmms_would_not_read_alike_is_refused(changes: dict[str, int], what: str) -> None:
    header = qcow2_header(**changes).ljust(16 << 16, b"\0")
    with (
        memory_file(header) as fd,
        pytest.raises(UnsupportedOperationError, match=f"{what}, which not all VMMs"),
    ):
        locked(DiskImage(fd))


def test_names_of_files_are_escaped() -> None:
    header = bytearray(qcow2_header(backing_offset=200, backing_length=9))
    header[200:209] = b"a\x1b[2J\n\xff.b"
    with (
        memory_file(bytes(header)) as fd,
        pytest.raises(UnsafeImageError, match=r'"a\\x1b\\\[2J\\n\\xff\.b"'),
    ):
        locked(DiskImage(fd))


def test_a_broken_image_is_named() -> None:
    with (
        memory_file(qcow2_header()[:50]) as fd,
        pytest.raises(ImageError, match=r"disks\[0\]\.image: is a broken QCOW2 image"),
    ):
        locked(DiskImage(fd))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(VmactorError, match=r"disks\[0\]\.image: cannot be read: Is a directory"):
            locked(DiskImage(fd))
    finally:
        os.close(fd)
