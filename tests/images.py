"""Help for tests of images: foreign tools, and headers put together by hand."""

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAGICS = {
    "a QCOW2 image": [b"QFI\xfb\0\0\0\3" + b"\0" * 100, b"QFI\xfb"],
    "a composite disk": [b"composite_disk\x1d\x08\x02"],
    "an Android sparse image": [b"\x3a\xff\x26\xed\1\0\0\0"],
    "compressed with zstd": [
        b"\x28\xb5\x2f\xfd\0",
        *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)),
    ],
}
"""Beginnings of files that crosvm's prober knows, by what they are called."""
NOT_MAGICS = [
    b"",
    b"Q",
    b"QFI",
    b"QFI\xfa",
    b"composite_disk\x1c",
    b"composite_disk",
    b"\xed\x26\xff\x3a",
    b"\x60\x2a\x4d\x18",
    b"\x4f\x2a\x4d\x18",
    b"\x28\xb5\x2f",
    b"\0" * 512 + b"QFI\xfb",
    b"\xeb\x63\x90" + b"\0" * 507 + b"\x55\xaa",
]
"""Beginnings that it takes for a raw image."""


def qemu_img(*arguments: str | Path) -> str:
    """Run ``qemu-img``; its output."""
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def qemu_info(path: Path) -> dict[str, Any]:
    """What ``qemu-img info`` says of a QCOW2 file, its other files unopened."""
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", path))
    return found


@contextmanager
def memory_file(contents: bytes) -> Iterator[int]:
    """An anonymous file; the descriptor's offset is where the contents end."""
    fd = os.memfd_create("image")
    try:
        view = memoryview(contents)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)


def qcow2_header(extensions: bytes = b"", /, **changes: int) -> bytes:
    """A whole QCOW2 file of 256 KiB without data for a disk of 10 MiB, with fields changed by name."""
    values = {
        "magic": 0x514649FB,
        "version": 3,
        "backing_offset": 0,
        "backing_length": 0,
        "cluster_bits": 16,
        "size": 10 << 20,
        "encryption": 0,
        "l1_size": 1,
        "l1_offset": 1 << 16,
        "refcounts_offset": 2 << 16,
        "refcounts_clusters": 1,
        "snapshots": 0,
        "snapshots_offset": 0,
        "incompatible": 0,
        "compatible": 0,
        "autoclear": 0,
        "refcount_order": 4,
        "header_length": 104,
    } | changes
    image = bytearray(4 << 16)
    header = struct.pack(">IIQIIQIIQQIIQQQQII", *values.values()) + extensions
    image[: len(header)] = header
    image[2 << 16 : (2 << 16) + 8] = struct.pack(">Q", 3 << 16)
    image[3 << 16 : (3 << 16) + 8] = b"\0\1" * 4
    return bytes(image)


def extension(number: int, data: bytes) -> bytes:
    """A header extension of a QCOW2 file."""
    return struct.pack(">II", number, len(data)) + data + bytes(-len(data) % 8)
