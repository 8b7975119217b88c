"""Kinds and sizes of images, also of hostile ones; known answers from qemu-img and by hand."""

import os
import struct
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.images import MAGICS, NOT_MAGICS, extension, memory_file, qcow2_header, qemu_img, qemu_info
from vmactor.errors import ImageError
from vmactor.images import android_sparse, composite
from vmactor.images.composite import Extent, Specification
from vmactor.images.files import read_at, size_of
from vmactor.images.kinds import ImageInfo, detect, inspect, kind_of
from vmactor.images.qcow2 import Qcow2
from vmactor.messages import ImageKind

KINDS = {
    "a QCOW2 image": ImageKind.QCOW2,
    "a composite disk": ImageKind.COMPOSITE,
    "an Android sparse image": ImageKind.ANDROID_SPARSE,
    "compressed with zstd": ImageKind.ZSTD,
}
ALL_MAGICS = [(KINDS[what], start) for what in MAGICS for start in MAGICS[what]]
EXAMPLE = bytes.fromhex(
    "0802 1206 0a042f742f68 120c 0a042f742f70 1080a001 1801 120a 0a042f742f66 1080e001 18808003"
)
"""The known composite disk: a read-only header, a writable partition, a read-only footer."""


def inspected(contents: bytes) -> ImageInfo:
    with memory_file(contents) as fd:
        info = inspect(fd)
        assert os.lseek(fd, 0, os.SEEK_CUR) == len(contents)  # the owner's offset is left alone
        return info


def qcow2_of(contents: bytes) -> Qcow2:
    details = inspected(contents).details
    assert isinstance(details, Qcow2)
    return details


# -- Kinds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "start"), ALL_MAGICS)
def test_a_magic_at_the_beginning_decides_the_kind(kind: ImageKind, start: bytes) -> None:
    assert kind_of(start) is kind
    assert kind_of(start + b"more") is kind
    with memory_file(start) as fd:
        assert detect(fd) is kind


@pytest.mark.parametrize("start", NOT_MAGICS)
def test_anything_else_is_raw_and_as_large_as_the_file(start: bytes) -> None:
    info = inspected(start)
    assert (info.kind, info.virtual_size, info.file_size) == (ImageKind.RAW, len(start), len(start))


def test_holes_are_not_allocated(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(1 << 40)
        info = inspect(file.fileno())
    assert (info.virtual_size, info.file_size) == (1 << 40, 1 << 40)
    assert info.allocated_size == 0


def test_a_block_device_is_as_large_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(3 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "disk"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip("this user may not make loop devices")
    try:
        fd = os.open(made.stdout.strip(), os.O_RDONLY)
        try:
            info = inspect(fd)
        finally:
            os.close(fd)
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
    assert info == ImageInfo(ImageKind.RAW, 3 << 20, 3 << 20, None)


def test_what_has_no_contents_is_refused(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    read_end, write_end = os.pipe()
    try:
        for fd in (directory, read_end):
            with pytest.raises(ImageError, match="neither a regular file nor a block device"):
                inspect(fd)
        for fd in (directory, read_end, write_end):
            with pytest.raises(ImageError, match="cannot be read"):
                detect(fd)
    finally:
        for fd in (directory, read_end, write_end):
            os.close(fd)


@given(
    contents=st.binary(max_size=200).map(lambda data: data * 61),
    offset=st.integers(0, 20_000),
    size=st.integers(1, 20_000),
)
@settings(deadline=None)
def test_reading_gives_what_is_there_and_no_more(contents: bytes, offset: int, size: int) -> None:
    with memory_file(contents) as fd:
        assert read_at(fd, offset, size) == contents[offset : offset + size]
        assert size_of(fd) == len(contents)


def test_a_descriptor_for_direct_access_can_be_read_at_any_offset(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(range(256)) * 40)
    try:
        fd = os.open(tmp_path / "disk", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no direct access")
    try:
        assert read_at(fd, 4097, 6000) == (bytes(range(256)) * 40)[4097:10097]
        assert detect(fd) is ImageKind.RAW
    finally:
        os.close(fd)


def test_an_offset_that_no_file_has_is_a_typed_error() -> None:
    with memory_file(b"x") as fd:
        for offset in ((1 << 63) - 4096, 1 << 64):
            with pytest.raises(ImageError, match="cannot be read"):
                read_at(fd, offset, 10)


# -- QCOW2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("size", [0, 512, 10 << 20, 1 << 32])
def test_images_of_qemu_img_are_read_as_it_reads_them(cluster: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "image"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(size))
    info = inspected(path.read_bytes())
    found = qemu_info(path)
    assert isinstance(info.details, Qcow2)
    assert info.kind is ImageKind.QCOW2
    assert info.virtual_size == found["virtual-size"] == size
    assert info.details.cluster_size == found["cluster-size"] == cluster
    assert (info.details.backing_file, info.details.data_file) == (None, None)
    assert (info.details.version, info.details.refcount_bits, info.details.incompatible_features) == (
        3,
        16,
        0,
    )


def test_names_of_other_files_are_found(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", tmp_path / "base", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", tmp_path / "base", "-F", "raw", tmp_path / "overlay")
    overlay = qcow2_of((tmp_path / "overlay").read_bytes())
    assert (overlay.backing_file, overlay.backing_format) == (str(tmp_path / "base"), "raw")
    options = f"data_file={tmp_path / 'data'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, tmp_path / "external", "1M")
    external = qcow2_of((tmp_path / "external").read_bytes())
    assert external.data_file == str(tmp_path / "data")
    assert external.incompatible_features == 4


def test_features_are_found(tmp_path: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", tmp_path / "old", "1M")
    assert qcow2_of((tmp_path / "old").read_bytes()).version == 2
    qemu_img("create", "-q", "-f", "qcow2", "-o", "refcount_bits=1", tmp_path / "bits", "1M")
    assert qcow2_of((tmp_path / "bits").read_bytes()).refcount_bits == 1
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "snapshots", "1M")
    qemu_img("snapshot", "-c", "one", tmp_path / "snapshots")
    assert qcow2_of((tmp_path / "snapshots").read_bytes()).snapshots == 1
    qemu_img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on", tmp_path / "extended", "1M")
    assert qcow2_of((tmp_path / "extended").read_bytes()).incompatible_features == 16


def test_a_backing_file_without_a_name_and_a_data_file_without_one_are_found() -> None:
    assert qcow2_of(qcow2_header(backing_offset=200)).backing_file == ""
    assert qcow2_of(qcow2_header(incompatible=4)).data_file == ""
    named = extension(0x44415441, b"/etc/shadow")
    assert qcow2_of(qcow2_header(named)).data_file == "/etc/shadow"
    crosvms = extension(0xE279268F, b"raw")
    assert qcow2_of(qcow2_header(crosvms)).backing_format == "raw"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 0}, "has version 0"),
        ({"version": 1}, "has version 1"),
        ({"version": 4}, "has version 4"),
        ({"cluster_bits": 8}, r"clusters of 2\^8"),
        ({"cluster_bits": 22}, r"clusters of 2\^22"),
        ({"cluster_bits": 2**32 - 1}, r"clusters of 2\^4294967295"),
        ({"size": 2**63}, "virtual size that no file"),
        ({"size": 2**63 - 1}, "1 entries in its L1 table and needs 17179869184"),
        ({"size": (512 << 20) + 1}, "1 entries in its L1 table and needs 2"),
        ({"l1_size": 0}, "0 entries in its L1 table and needs 1"),
        ({"l1_size": 2**32 - 1}, "L1 table of 34359738360 bytes"),
        ({"l1_size": 1 << 14}, "has its refcount table over its L1 table"),
        ({"l1_size": 1 << 16}, "has its L1 table beyond the end"),
        ({"l1_offset": 0}, "has its L1 table over its header"),
        ({"l1_offset": 1}, "has its L1 table in the middle of a cluster"),
        ({"l1_offset": 4 << 16}, "has its L1 table beyond the end of the file"),
        ({"l1_offset": 2**64 - 65536}, "has its L1 table beyond the end of the file"),
        ({"l1_offset": 2 << 16}, "has its refcount table over its L1 table"),
        ({"refcounts_offset": 0}, "has its refcount table over its header"),
        ({"refcounts_offset": 1 << 16}, "has its refcount table over its L1 table"),
        ({"refcounts_offset": 2**63}, "has its refcount table beyond the end"),
        ({"refcounts_clusters": 2**32 - 1}, "has a refcount table of 281474976645120 bytes"),
        ({"refcounts_clusters": 3}, "has its refcount table beyond the end"),
        ({"refcounts_clusters": 0}, "has no refcount table"),
        ({"snapshots": 1, "snapshots_offset": 1 << 16}, "over its"),
        ({"snapshots": 2**32 - 1, "snapshots_offset": 3 << 16}, "snapshot table of 171798691800 bytes"),
        ({"refcount_order": 7}, r"reference counts of 2\^7 bits"),
        ({"refcount_order": 2**32 - 1}, "reference counts"),
        ({"header_length": 103}, "header of 103 bytes"),
        ({"header_length": 0}, "header of 0 bytes"),
        ({"header_length": 65537}, "header of 65537 bytes"),
        ({"backing_offset": 103, "backing_length": 4}, "outside its first cluster"),
        ({"backing_offset": 0, "backing_length": 4}, "outside its first cluster"),
        ({"backing_offset": 65536, "backing_length": 4}, "outside its first cluster"),
        ({"backing_offset": 65534, "backing_length": 4}, "outside its first cluster"),
        ({"backing_offset": 2**64 - 1, "backing_length": 2**32 - 1}, "outside its first cluster"),
        ({"backing_offset": 200, "backing_length": 1024}, "a name of 1024 bytes"),
    ],
)
def test_headers_that_cannot_be_are_refused_with_the_reason(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ImageError, match=f"is a broken QCOW2 image: it .*{message}.*'qemu-img check'"):
        inspected(qcow2_header(**changes))


@pytest.mark.parametrize("length", [4, 8, 71, 72, 103])
def test_headers_that_end_early_are_refused(length: int) -> None:
    with pytest.raises(ImageError, match="ends in the middle of its header"):
        inspected(qcow2_header()[:length])


def test_header_extensions_are_bounded() -> None:
    with pytest.raises(ImageError, match="more than 64 header extensions"):
        inspected(qcow2_header(extension(7, b"") * 65))
    with pytest.raises(ImageError, match="extension that does not end"):
        inspected(qcow2_header(struct.pack(">II", 7, 2**32 - 1)))
    assert qcow2_of(qcow2_header(extension(7, b"x") * 64)).version == 3


# -- Composite disks -------------------------------------------------------------------------------


def test_a_composite_disk_is_as_large_as_it_says() -> None:
    info = inspected(composite.MAGIC + EXAMPLE)
    assert info.details == Specification(
        (Extent("/t/h", 0), Extent("/t/p", 20480, writable=True), Extent("/t/f", 28672)), 49152
    )
    assert (info.kind, info.virtual_size) == (ImageKind.COMPOSITE, 49152)


@pytest.mark.parametrize("message", [b"", EXAMPLE[:-1], EXAMPLE[:20], b"\x0b", bytes(2 << 20)])
def test_a_broken_composite_disk_is_refused(message: bytes) -> None:
    with pytest.raises(ImageError, match="is a broken composite disk: it"):
        inspected(composite.MAGIC + message)


# -- Android sparse images -------------------------------------------------------------------------


def sparse(
    *chunks: tuple[int, int, bytes], blocks: int = 4, count: int | None = None, **header: int
) -> bytes:
    """A sparse image of chunks (kind, blocks, data)."""
    values = {"magic": 0xED26FF3A, "major": 1, "minor": 0, "header": 28, "chunk": 12, "block": 4096} | header
    body = b"".join(
        struct.pack("<HHII", kind, 0, length, 12 + len(data)) + data for kind, length, data in chunks
    )
    return (
        struct.pack("<IHHHHI", *values.values())
        + struct.pack("<III", blocks, len(chunks) if count is None else count, 0)
        + body
    )


RAW, FILL, NOTHING, CRC = 0xCAC1, 0xCAC2, 0xCAC3, 0xCAC4


def test_a_sparse_image_is_as_large_as_its_blocks() -> None:
    image = sparse((RAW, 1, bytes(4096)), (FILL, 2, b"abcd"), (NOTHING, 1, b""), (CRC, 0, b"1234"))
    info = inspected(image)
    assert (info.kind, info.virtual_size, info.file_size) == (ImageKind.ANDROID_SPARSE, 16384, len(image))


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (sparse()[:27], "ends in the middle of its header"),
        (sparse(major=2), "another version than 1"),
        (sparse(header=32), "another version than 1"),
        (sparse(chunk=16), "another version than 1"),
        (sparse(block=0), "blocks of 0 bytes"),
        (sparse(block=6), "blocks of 6 bytes"),
        (sparse(), "chunks of 0 blocks together, and says 4"),
        (sparse((NOTHING, 5, b"")), "chunks of 5 blocks together, and says 4"),
        (sparse((NOTHING, 4, b""), count=2), "ends in the middle of its chunks"),
        (sparse((NOTHING, 4, b""), count=2**32 - 1), "4294967295 chunks; at most 65536 are looked at"),
        (sparse((0xCAC5, 4, b"")), "a chunk that is none"),
        (sparse((RAW, 4, b"x")), "a chunk that is none"),
        (sparse((RAW, 4, bytes(4 * 4096)))[:-1], "a chunk that is none"),
        (sparse((RAW, 2**32 - 1, b"")), "a chunk that is none"),
        (sparse((NOTHING, 4, b"x")), "a chunk that is none"),
    ],
)
def test_sparse_images_that_cannot_be_are_refused_with_the_reason(image: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=f"is a broken Android sparse image: it .*{why}"):
        inspected(image)


def test_the_largest_numbers_of_a_sparse_image_do_not_make_it_larger_than_any_file() -> None:
    huge = sparse((NOTHING, 2**32 - 1, b""), blocks=2**32 - 1, block=2**32 - 4)
    with pytest.raises(ImageError, match=r"has a disk of \d+ bytes"):
        inspected(huge)


def test_chunks_are_looked_at_up_to_their_limit() -> None:
    many = android_sparse.MAX_CHUNKS
    image = sparse(*[(NOTHING, 1, b"")] * many, blocks=many)
    assert inspected(image).virtual_size == many * 4096


# -- Anything --------------------------------------------------------------------------------------

SEEDS = [
    qcow2_header(),
    qcow2_header(extension(0x44415441, b"d"), backing_offset=200, backing_length=9),
    composite.MAGIC + EXAMPLE,
    sparse((RAW, 1, bytes(4096)), (FILL, 2, b"abcd"), (NOTHING, 1, b""), (CRC, 0, b"1234")),
    b"\x28\xb5\x2f\xfd",
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """An image with some of its first bytes changed, cut off somewhere."""
    image = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, min(len(image), 160)))
        change = draw(
            st.one_of(st.binary(max_size=12), st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f\xff"]))
        )
        image[at : at + len(change)] = change
    return bytes(image[: draw(st.one_of(st.just(len(image)), st.integers(0, len(image))))])


@given(contents=st.one_of(damaged(), st.binary(max_size=400)))
@example(contents=b"")
@settings(max_examples=300, deadline=None)
def test_any_file_gives_a_kind_and_a_size_or_a_typed_short_error(contents: bytes) -> None:
    try:
        info = inspected(contents)
    except ImageError as error:
        assert len(str(error)) < 300  # noqa: PT017
    else:
        assert info.kind is kind_of(contents)
        assert info.virtual_size is None or 0 <= info.virtual_size < 1 << 63


@pytest.mark.parametrize(
    "start",
    [
        qcow2_header(cluster_bits=21, l1_offset=1 << 21, refcounts_offset=2 << 21)[:1000],
        sparse(count=1 << 16),
        b"raw",
    ],
)
def test_a_file_of_any_size_costs_little_memory(start: bytes, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("w+b") as file:
        file.write(start)
        file.truncate(1 << 42)
        tracemalloc.start()
        try:
            inspect(file.fileno())
        except ImageError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < 10 << 20
