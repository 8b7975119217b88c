"""tinydroid's manager, the parts that need no guest: foreign APKs, idsig files, metadata, instance images."""

import contextlib
import importlib
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.apks import opened
from vmactor.images.idsig import create_or_update_idsig_file
from vmactor.images.partition import initialize_writable_partition
from vmactor.messages import PartitionType
from vmactor.microdroid.metadata import write_metadata

pytest.importorskip(
    "_sha256", reason="the guest's Python is 3.11; later ones have this module under another name"
)

SOURCE = Path(__file__).parent.parent / "guest" / "tinydroid"
INSTANCE_PARTITION = bytes.fromhex("cf9afe9a066211eca329c32663a09d75")
"""Microdroid's own."""


def load(name: str) -> ModuleType:
    """A module as the guest has it, beside its neighbours."""
    sys.path.insert(0, str(SOURCE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SOURCE))


apks, disks, failures = load("apk"), load("disks"), load("failures")


class Bytes:
    """What a partition holds: a file filled up with zeros; also stands for a verified file."""

    def __init__(self, data: bytes, block: int = 4096) -> None:
        self.data = bytearray(data + bytes(-len(data) % block))
        self.size = len(self.data)

    def read(self, offset: int, size: int) -> bytes:
        """As ``VerifiedFile.read``, without the checks of blocks."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise failures.NotVerified("outside")
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """As ``Device.write``."""
        self.data[offset : offset + len(data)] = data


@pytest.fixture(scope="session")
def example(tinydroid_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """An APK that apksigner has signed, and the idsig that vmactor makes of it."""
    path = tmp_path_factory.mktemp("idsig") / "idsig"
    with opened(tinydroid_dir / "example.apk") as apk, opened(path, os.O_RDWR | os.O_CREAT) as idsig:
        create_or_update_idsig_file(apk, idsig)
    return (tinydroid_dir / "example.apk").read_bytes(), path.read_bytes()


def verified(apk: bytes, idsig: bytes) -> tuple[Any, Any]:
    """The APK through the checks of blocks, and its idsig."""
    partition = Bytes(apk)
    signed = apks.read_idsig(Bytes(idsig).read)
    return apks.Apk(apks.VerifiedFile(partition.read, partition.size, signed)), signed


def verify_wholly(data: bytes, idsig: bytes) -> None:
    """Blocks, signature, and whether the idsig was made for it."""
    apk, signed = verified(data, idsig)
    apk.verify_signature(signed)


def test_a_good_apk_is_verified_and_unpacked(example: tuple[bytes, bytes], tinydroid_dir: Path) -> None:
    apk, idsig = verified(*example)
    apk.verify_signature(idsig)
    with zipfile.ZipFile(tinydroid_dir / "example.apk") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert {name: apk.content(entry) for name, entry in apk.entries.items()} == contents


def test_every_changed_bit_of_an_apk_is_found_when_it_is_read(example: tuple[bytes, bytes]) -> None:
    data, idsig = example
    signed = apks.read_idsig(Bytes(idsig).read)
    for bit in random.Random(1).sample(range(len(data) * 8), 100):
        partition = Bytes(data)
        partition.data[bit // 8] ^= 1 << bit % 8
        file = apks.VerifiedFile(partition.read, partition.size, signed)
        with pytest.raises(failures.NotVerified, match=f"block {bit // 8 // 4096} of the APK"):
            file.read(bit // 8, 1)


def test_every_changed_byte_of_an_idsig_is_found_or_means_nothing(example: tuple[bytes, bytes]) -> None:
    data, idsig = example
    for at in range(len(idsig)):
        bad = bytearray(idsig)
        bad[at] ^= 0x40
        if 4 <= at < 8 or 53 <= at < 57:  # sizes of parts that are read field by field
            continue
        with pytest.raises(failures.Failure):
            verify_wholly(data, bytes(bad))


def test_an_apk_that_was_changed_after_signing_is_found_with_a_new_idsig(
    example: tuple[bytes, bytes], tmp_path: Path
) -> None:
    data = bytearray(example[0])
    data[data.index(b"hello from the example payload")] ^= 1
    (tmp_path / "apk").write_bytes(data)
    with opened(tmp_path / "apk") as fd, opened(tmp_path / "idsig", os.O_RDWR | os.O_CREAT) as idsig:
        create_or_update_idsig_file(fd, idsig)
    apk, signed = verified(bytes(data), (tmp_path / "idsig").read_bytes())
    with pytest.raises(failures.NotVerified, match="not what was signed"):
        apk.verify_signature(signed)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../b", "a//b", ".", "a\0b"])
def test_a_name_that_leaves_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "apk", "w") as archive:
        archive.writestr("x" * len(name), b"content")
    data = (tmp_path / "apk").read_bytes().replace(b"x" * len(name), name.encode())
    with pytest.raises(failures.NotVerified, match="a file of the name"):
        apks.Apk(Bytes(data))


def test_a_file_that_unpacks_to_more_than_it_says_costs_no_more_than_it_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "apk", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(30 << 20))
    data = (tmp_path / "apk").read_bytes()
    small = data.replace(struct.pack("<I", 30 << 20), struct.pack("<I", 10))
    apk = apks.Apk(Bytes(small))
    tracemalloc.start()
    try:
        with pytest.raises(failures.NotVerified, match="damaged"):
            apk.content(apk.entries["bomb"])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    large = data.replace(struct.pack("<I", 30 << 20), struct.pack("<I", 3 << 30))
    with pytest.raises(failures.NotVerified, match="more than 48 MiB"):
        apks.Apk(Bytes(large))


def test_metadata_is_read_as_it_is_written() -> None:
    written = write_metadata([], config_path=None, payload_binary_name="hello.so", extra_apks=2)
    metadata = disks.read_metadata(Bytes(written))
    assert metadata == ([], ("microdroid-apk", "microdroid-apk-idsig"), None, "hello.so", 2)
    written = write_metadata([], config_path="assets/c.json", payload_binary_name=None, extra_apks=1)
    metadata = disks.read_metadata(Bytes(written))
    assert (metadata.config_path, metadata.binary_name) == ("/mnt/apk/assets/c.json", None)


@given(st.binary(max_size=60))
def test_metadata_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    framed = Bytes(struct.pack(">I", len(data)) + data)
    with contextlib.suppress(failures.BadConfig):
        disks.read_metadata(framed)


def instance_image(*partitions: tuple[bytes, bytes]) -> Bytes:
    """An instance image with partitions of others."""
    data = b"Android-VM-instance\1\0".ljust(512, b"\0")
    for uuid, content in partitions:
        data += (uuid + struct.pack("<Q", len(content))).ljust(512, b"\0")
        data += content + bytes(-len(content) % 512)
    return Bytes(data + bytes(8192))


RECORD = {"identity": {"apk": {}}, "secret": "00" * 32}


def test_a_record_is_found_again_behind_those_of_others() -> None:
    image = instance_image((INSTANCE_PARTITION, b"sealed" * 100))
    before = image.read(0, 512 * 4)
    assert disks.Instance(image).load() is None
    disks.Instance(image).store(RECORD)
    assert disks.Instance(image).load() == RECORD
    assert image.read(0, 512 * 3) == before[: 512 * 3]


def test_a_new_instance_image_has_the_mark_that_the_guest_looks_for(tmp_path: Path) -> None:
    with opened(tmp_path / "qcow2", os.O_RDWR | os.O_CREAT) as fd:
        initialize_writable_partition(fd, 1 << 20, PartitionType.ANDROID_VM_INSTANCE)
    subprocess.run(["qemu-img", "convert", "-O", "raw", "qcow2", "raw"], check=True, cwd=tmp_path)
    assert disks.Instance(Bytes((tmp_path / "raw").read_bytes())).load() is None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="zeros"),
        pytest.param(b"Android-VM-instance\2\0", id="version-2"),
        pytest.param(
            b"Android-VM-instance\1\0".ljust(512, b"\0") + INSTANCE_PARTITION + b"\xff" * 8, id="no-end"
        ),
    ],
)
def test_what_is_no_instance_image_is_an_error(data: bytes) -> None:
    with pytest.raises(failures.Failure):
        disks.Instance(Bytes(data)).load()


@given(st.binary(max_size=200))
def test_a_damaged_record_is_an_error(data: bytes) -> None:
    header = disks.OWN_PARTITION + struct.pack("<Q", len(data))
    image = Bytes(b"Android-VM-instance\1\0".ljust(512, b"\0") + header.ljust(512, b"\0") + data)
    with pytest.raises(failures.Failure, match="damaged"):
        disks.Instance(image).load()
