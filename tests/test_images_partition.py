"""Writable partitions: their bytes as foreign tools read them, and what is left of a file after an error."""

import errno
import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.images import qemu_img, qemu_info
from vmactor import VirtualizationService
from vmactor.errors import (
    IllegalArgumentError,
    IllegalStateError,
    ImageError,
    ResourceExhaustedError,
    VmactorError,
)
from vmactor.images import qcow2
from vmactor.images.partition import initialize_writable_partition
from vmactor.messages import PartitionType

MIB = 1 << 20
TIB = 1 << 40
MARKERS = {
    PartitionType.RAW: b"",
    PartitionType.ANDROID_VM_INSTANCE: bytes.fromhex(
        "41 6e 64 72 6f 69 64 2d 56 4d 2d 69 6e 73 74 61 6e 63 65 01 00"
    ),
    PartitionType.ENCRYPTEDSTORE: bytes.fromhex("55 4e 46 4f 52 4d 41 54 54 45 44 2d 53 54 4f 52 41 47 45"),
}
# The sizes at which a table grows by an entry or a cluster, and one more and less than those.
EDGES = [
    *(1, 4095, 4096, 4097, 10 * MIB, (512 * MIB) - 4096, 512 * MIB, (512 * MIB) + 1),
    *(4 * TIB - 4096, 4 * TIB, 4 * TIB + 1, 8 * TIB + 1, 16 * TIB - 4096, 16 * TIB),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with something in it."""
    path = tmp_path / "partition"
    path.write_bytes(b"what was there before" * 100_000)
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def rounded(size: int) -> int:
    return -(-size // 4096) * 4096


def read_with_qemu(path: Path, size: int, tmp_path: Path) -> bytes:
    """The first bytes of the disk in a QCOW2 file."""
    out = tmp_path / "read.raw"
    qemu_img("dd", "-f", "qcow2", "-O", "raw", f"if={path}", f"of={out}", "bs=4096", f"count={size // 4096}")
    return out.read_bytes()


# -- What is made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(PartitionType))
@pytest.mark.parametrize("size", EDGES)
def test_qemu_finds_a_partition_of_any_size_clean(
    kind: PartitionType, size: int, path: Path, fd: int
) -> None:
    assert initialize_writable_partition(fd, size, kind) == rounded(size)
    assert "No errors were found on the image." in qemu_img("check", "-f", "qcow2", path)
    found = qemu_info(path)
    assert found["virtual-size"] == rounded(size)
    assert found["cluster-size"] == 65536
    assert not {"backing-filename", "encrypted", "snapshots"} & found.keys()
    assert path.stat().st_blocks * 512 < MIB
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0


@pytest.mark.parametrize("kind", list(PartitionType))
def test_the_disk_begins_with_its_marker_and_is_zeros_else(
    kind: PartitionType, path: Path, fd: int, tmp_path: Path
) -> None:
    initialize_writable_partition(fd, 3 * MIB + 1, kind)
    disk = read_with_qemu(path, rounded(3 * MIB + 1), tmp_path)
    assert disk == MARKERS[kind].ljust(rounded(3 * MIB + 1), b"\0")


def test_a_raw_partition_of_no_size_is_an_image_without_a_disk(path: Path, fd: int) -> None:
    assert initialize_writable_partition(fd, 0, PartitionType.RAW) == 0
    assert "No errors" in qemu_img("check", "-f", "qcow2", path)
    assert qemu_info(path)["virtual-size"] == 0


@pytest.mark.parametrize("size", [10 * MIB, 5 * TIB, 16 * TIB])
def test_qemu_writes_to_both_ends_of_a_partition_and_it_stays_clean(size: int, path: Path, fd: int) -> None:
    initialize_writable_partition(fd, size, PartitionType.ANDROID_VM_INSTANCE)
    commands = [f"write -P 0x5a {at} 4096" for at in (4096, size // 2, size - 4096)]
    commands += [f"read -P 0x5a {at} 4096" for at in (4096, size // 2, size - 4096)]
    commands.append("read -P 0 8192 4096")
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout
    assert "No errors" in qemu_img("check", "-f", "qcow2", path)
    assert os.pread(fd, 4, 0) == b"QFI\xfb"


def demands_of_crosvm(image: bytes) -> None:
    """The checks of crosvm's reader, written down anew from its rules."""
    fields = struct.unpack_from(">IIQIIQIIQQIIQQQQII", image)
    magic, version, backing, _, bits, size, _, l1_size, l1, table, table_clusters, _, snapshots = fields[:13]
    order, header_length = fields[16:]
    cluster = 1 << bits
    assert (magic, version, backing, order) == (0x514649FB, 3, 0, 4)
    assert 9 <= bits <= 21
    assert size <= 1 << 44
    needed = -(-size // (cluster * cluster // 8))
    assert needed <= l1_size <= 35_000_000
    assert l1 + 8 * needed <= len(image)
    assert l1 % cluster == table % cluster == snapshots % cluster == 0
    assert table <= max(len(image), size)
    data = -(-size // cluster)
    others = -(-l1_size * 8 // cluster) + l1_size + 1
    blocks = -(-2 * (data + others) // cluster)
    blocks += -(-2 * blocks // cluster)
    assert 1 <= table_clusters <= 2 * blocks
    # It cannot move the table, so there must be room for every block that may ever be needed.
    assert table_clusters * cluster // 8 >= blocks
    # Neither a missing block nor an unused first cluster, else it would rebuild all counts.
    (block,) = struct.unpack_from(">Q", image, table)
    assert block % cluster == 0
    assert block + cluster <= len(image)
    assert image[block : block + 2] == b"\0\1"
    for (l2,) in struct.iter_unpack(">Q", image[l1 : l1 + 8 * l1_size]):
        assert (l2 & 0x00FFFFFFFFFFFE00) + cluster <= len(image)
    assert header_length == 104
    assert image[104:112] == bytes(8)


def file_of(image: qcow2.NewImage) -> bytes:
    contents = bytearray(image.length)
    for offset, data in image.pieces:
        assert not any(contents[offset : offset + len(data)]), "pieces overlap"
        contents[offset : offset + len(data)] = data
    return bytes(contents)


@given(size=st.integers(0, 16 * TIB), marker=st.sampled_from([b"", b"x", b"y" * 512]))
@example(size=0, marker=b"")
@example(size=4 * TIB + 4096, marker=b"x")
@example(size=16 * TIB, marker=b"x")
@settings(max_examples=200, deadline=None)
def test_an_image_of_any_size_meets_the_demands_of_crosvm(size: int, marker: bytes) -> None:
    demands_of_crosvm(file_of(qcow2.new_image(size, marker)))


@given(size=st.integers(1, 16 * TIB), kind=st.sampled_from(PartitionType))
@settings(max_examples=100, deadline=None)
def test_our_reader_reads_what_our_writer_writes(size: int, kind: PartitionType) -> None:
    fd = os.memfd_create("partition")
    try:
        assert initialize_writable_partition(fd, size, kind) == rounded(size)
        header = qcow2.read(fd)
        assert (header.virtual_size, header.backing_file, header.data_file) == (rounded(size), None, None)
    finally:
        os.close(fd)


# -- Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kind", "error", "message"),
    [
        (-1, 0, IllegalArgumentError, "Invalid size -1"),
        (-(2**63), 1, IllegalArgumentError, "Invalid size -"),
        (True, 0, IllegalArgumentError, "Invalid size True"),
        (4096.0, 0, IllegalArgumentError, "Invalid size 4096.0"),
        ("4096", 0, IllegalArgumentError, "Invalid size '4096'"),
        (0, 1, ImageError, r"PartitionType\(1\): size 0 has no room"),
        (0, 2, ImageError, r"PartitionType\(2\): size 0 has no room"),
        (16 * TIB + 1, 0, ImageError, "17592186044417 bytes are more than the 17592186044416 possible"),
        (2**63 - 1, 0, ImageError, "more than the"),
        (2**70, 0, ImageError, "more than the"),
        (4096, 3, ImageError, r"PartitionType\(3\): there is no such type"),
        (4096, -1, ImageError, r"PartitionType\(-1\): there is no such type"),
        (4096, "raw", ImageError, r"PartitionType\(raw\): there is no such type"),
    ],
)
def test_a_size_or_type_that_cannot_be_leaves_the_file_as_it_was(
    size: Any, kind: Any, error: type[VmactorError], message: str, path: Path, fd: int
) -> None:
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        initialize_writable_partition(fd, size, kind)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (os.O_RDONLY, "is not open for reading and writing"),
        (os.O_WRONLY, "is not open for reading and writing"),
        (os.O_RDWR | os.O_APPEND, "is in append mode"),
        (os.O_PATH, "is not open for reading and writing"),
    ],
)
def test_a_descriptor_of_another_mode_leaves_the_file_as_it_was(flags: int, message: str, path: Path) -> None:
    before = path.read_bytes()
    fd = os.open(path, flags)
    try:
        with pytest.raises(ImageError, match=f"Failed to reset a file: the descriptor {message}.*; open a"):
            initialize_writable_partition(fd, 4096)
    finally:
        os.close(fd)
    assert path.read_bytes() == before


def _directory(tmp_path: Path) -> int:
    return os.open(tmp_path, os.O_RDONLY)


def _fifo(tmp_path: Path) -> int:
    os.mkfifo(tmp_path / "fifo")
    return os.open(tmp_path / "fifo", os.O_RDWR)


def _null(_: Path) -> int:
    return os.open("/dev/null", os.O_RDWR)


@pytest.mark.parametrize(
    ("open_it", "what"), [(_directory, "a directory"), (_fifo, "a device, pipe"), (_null, "a device, pipe")]
)
def test_what_is_no_regular_file_is_refused_at_once(
    open_it: Callable[[Path], int], what: str, tmp_path: Path
) -> None:
    fd = open_it(tmp_path)
    try:
        with pytest.raises(ImageError, match=f"the descriptor is {what}"):
            initialize_writable_partition(fd, 4096)
    finally:
        os.close(fd)


@pytest.mark.parametrize("fd", [-1, 10**6, 2**40])
def test_a_descriptor_that_is_not_open_is_an_illegal_argument(fd: int) -> None:
    with pytest.raises(IllegalArgumentError, match="not open"):
        initialize_writable_partition(fd, 4096)


@pytest.mark.parametrize("limit", [0, 1, 1 << 16, 5 << 16, (6 << 16) - 1])
def test_a_file_that_may_not_grow_is_empty_afterwards(limit: int, path: Path, fd: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            ImageError, match="Failed to create QCOW2 image: File too large; the file is empty"
        ):
            initialize_writable_partition(fd, 10 * MIB, PartitionType.ENCRYPTEDSTORE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("seal", "left"), [(fcntl.F_SEAL_WRITE, b"old"), (fcntl.F_SEAL_SHRINK, b"old"), (fcntl.F_SEAL_GROW, b"")]
)
def test_a_sealed_file_is_as_it_was_or_empty(seal: int, left: bytes) -> None:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, b"old")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal | (fcntl.F_SEAL_SHRINK if seal == fcntl.F_SEAL_WRITE else 0))
        with pytest.raises(ImageError, match="Operation not permitted"):
            initialize_writable_partition(fd, 4096)
        assert os.pread(fd, 100, 0) == left
    finally:
        os.close(fd)


# Tries with every amount of space left on a small file system of its own, where this user may mount one.
_FULL = """
import ctypes, os, sys
from vmactor.errors import ResourceExhaustedError
from vmactor.images.partition import initialize_writable_partition
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000):
    sys.exit(77)
libc.mount(b"none", b"/", None, 1 << 18 | 1 << 14, None)
if libc.mount(b"none", sys.argv[1].encode(), b"tmpfs", 0, b"size=64k,nr_inodes=16"):
    sys.exit(77)
path = sys.argv[1] + "/p"
outcomes = []
for filled in range(17):
    with open(sys.argv[1] + "/fill", "wb") as fill:
        fill.write(bytes(4096 * filled))
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        initialize_writable_partition(fd, 1 << 40, 2)
        outcomes.append("made" if os.pread(fd, 4, 0) == b"QFI\\xfb" else "wrong")
    except ResourceExhaustedError as error:
        assert "No space left" in str(error) and "make room" in str(error), error
        outcomes.append("empty" if os.fstat(fd).st_size == 0 else "half")
    os.close(fd)
    os.unlink(path)
print(" ".join(outcomes))
"""


def test_with_any_amount_of_space_too_little_the_file_is_empty_afterwards(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert set(outcomes) == {"made", "empty"}
    assert outcomes == sorted(outcomes, reverse=True)


def test_an_error_at_any_write_leaves_an_empty_file(
    path: Path, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, pieces = os.pwrite, len(qcow2.new_image(MIB, b"x").pieces)
    for fails_at in range(pieces):
        count = 0

        def failing(fd: int, data: bytes, offset: int) -> int:
            nonlocal count
            count += 1
            if count > fails_at:  # noqa: B023
                assert os.pread(fd, 4, 0) != b"QFI\xfb", "an image before it is whole"
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return pwrite(fd, data[: len(data) // 2 or 1], offset)

        monkeypatch.setattr(os, "pwrite", failing)
        path.write_bytes(b"before")
        with pytest.raises(ImageError, match="Input/output error; the file is empty now"):
            initialize_writable_partition(fd, MIB, 1)
        assert path.read_bytes() == b""


# -- Through the service ---------------------------------------------------------------------------


@pytest.mark.anyio
async def test_the_service_makes_partitions_and_keeps_nothing_open(
    path: Path, fd: int, short_dir: Path, tmp_path: Path
) -> None:
    async with VirtualizationService(state_directory=short_dir / "state") as service:
        assert await service.initialize_writable_partition(fd, 1, PartitionType.ENCRYPTEDSTORE) == 4096
        assert read_with_qemu(path, 4096, tmp_path).startswith(b"UNFORMATTED-STORAGE\0")
        with path.open("r+b") as file:
            assert await service.initialize_writable_partition(file, 10 * MIB) == 10 * MIB
        directory = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(ImageError, match="is a directory"):
                await service.initialize_writable_partition(directory, 4096)
        finally:
            os.close(directory)
        with pytest.raises(IllegalArgumentError, match="partition image: descriptor 1000000 is not open"):
            await service.initialize_writable_partition(10**6, 4096)
        with pytest.raises(IllegalArgumentError, match="partition image must be an open file"):
            await service.initialize_writable_partition("path", 4096)  # type: ignore[arg-type]
    with pytest.raises(IllegalStateError, match="the service is closed"):
        await service.initialize_writable_partition(fd, 4096)


@pytest.mark.anyio
async def test_the_service_tells_that_no_descriptor_is_left(fd: int, short_dir: Path) -> None:
    async with VirtualizationService(state_directory=short_dir / "state") as service:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(ResourceExhaustedError, match="ulimit -n"):
                await service.initialize_writable_partition(fd, 4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
