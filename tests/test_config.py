"""Raw configurations: their rules, what may be behind their descriptors, and who closes those."""

import fcntl
import io
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vmactor.config import MAX_DISKS, DiskImage, Partition, RawConfig
from vmactor.errors import (
    IllegalArgumentError,
    ResourceExhaustedError,
    UnsupportedOperationError,
)
from vmactor.messages import CpuTopology, ImageKind
from vmactor.platform_version import Version


def config(**changes: Any) -> RawConfig:
    values: dict[str, Any] = {"name": "vm", "kernel": 100, "platform_version": "~1.0"}
    return RawConfig(**values | changes)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[io.BufferedRandom]:
    """A raw image, open for reading and writing."""
    path = tmp_path / "image"
    path.write_bytes(b"\0" * 8192)
    with path.open("r+b") as file:
        yield file


def open_descriptors() -> list[int]:
    return sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# -- Rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"initrd": 101},
        {"kernel": None, "bootloader": 101},
        {"params": "x" * 2047},
        {"params": "console=ttyS0 ünïcode\t"},
        {"params": ""},
        {"memory_mib": 1},
        {"memory_mib": 2**31 - 1},
        {"disks": [DiskImage(101)] * MAX_DISKS},
        {"disks": [DiskImage(101, writable=True)]},
        {"cpu_topology": CpuTopology.MATCH_HOST},
        {"cpu_topology": 1},
        {"platform_version": "*"},
        {"task_profiles": ["MaxPerformance", "a.b_c-d"]},
        {"protected_vm": True},
    ],
)
def test_these_configurations_are_valid(changes: dict[str, Any]) -> None:
    config(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "is not a VM name"),
        ({"name": None}, "is not a VM name"),
        ({"kernel": None}, r"VM must have either a bootloader or a kernel image\."),
        ({"kernel": None, "initrd": 101}, r"VM must have either a bootloader or a kernel image\."),
        ({"bootloader": 101}, r"Can't have both bootloader and kernel/initrd image\."),
        ({"kernel": None, "initrd": 101, "bootloader": 102}, r"Can't have both bootloader and kernel/initrd"),
        ({"params": "x" * 2048}, "params has 2048 bytes; .* at most 2047"),
        ({"params": "é" * 1024}, "params has 2048 bytes"),
        ({"params": "a\nb"}, "params must be one line"),
        ({"params": "a\0b"}, "params must be one line"),
        ({"params": "\ud800"}, "params contains a lone surrogate"),
        ({"params": b"x"}, "params must be one line"),
        ({"memory_mib": 0}, "Invalid memory_mib"),
        ({"memory_mib": -1}, "Invalid memory_mib"),
        ({"memory_mib": 2**31}, "Invalid memory_mib"),
        ({"memory_mib": 1.5}, "Invalid memory_mib"),
        ({"memory_mib": True}, "Invalid memory_mib"),
        ({"protected_vm": 1}, "protected_vm must be True or False"),
        ({"disks": [DiskImage(101)] * (MAX_DISKS + 1)}, "disks: at most 26 are possible, not 27"),
        ({"disks": [DiskImage(101), 7]}, r"disks\[1\] must be a DiskImage"),
        ({"disks": [DiskImage(101, "no")]}, r"disks\[0\] must be a DiskImage whose writable"),  # type: ignore[arg-type]
        ({"disks": [DiskImage()]}, r"disks\[0\]: DiskImage didn't contain image or partitions\."),
        (
            {"disks": [DiskImage(101), DiskImage(101, partitions=[Partition("a", 102)])]},
            r"disks\[1\]: DiskImage contains both image and partitions\.",
        ),
        ({"platform_version": ""}, "Invalid platform version requirement : unexpected end of input"),
        (
            {"platform_version": "[v1\x1b"},
            r"Invalid platform version requirement \\\[v1\\x1b: unexpected char",
        ),
        ({"platform_version": None}, "platform_version must be text"),
        ({"task_profiles": ["a,b"]}, r"task_profiles\[0\] must be"),
        ({"task_profiles": ["a", ""]}, r"task_profiles\[1\] must be"),
        ({"task_profiles": ["a"] * 33}, "task_profiles: at most 32"),
    ],
)
def test_these_configurations_are_refused_with_the_field_and_the_rule(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(IllegalArgumentError, match=message):
        config(**changes).validate()


@pytest.mark.parametrize("kind", ["raw", "qcow2", ImageKind.QCOW2, None])
def test_a_disk_or_partition_can_say_what_its_file_is(kind: str | None) -> None:
    wanted = kind and ImageKind(kind)
    assert DiskImage(101, format=kind).format == wanted
    assert Partition("a", 101, format=kind).format == wanted


@pytest.mark.parametrize("kind", ["", "vmdk", "composite", ImageKind.ANDROID_SPARSE, 7])
def test_formats_that_no_disk_can_have_are_refused_when_they_are_given(kind: Any) -> None:
    with pytest.raises(IllegalArgumentError, match='disk format must be "raw" or "qcow2", or None'):
        DiskImage(101, format=kind)


def parts(*labels: Any) -> list[DiskImage]:
    return [DiskImage(partitions=[Partition(label, 101) for label in labels])]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b", "a"], 'duplicate GPT partition label "a"'),
        ([""], "'' is no partition label; use 1 to 36"),
        (["x" * 37], "is no partition label"),
        (["\N{GRINNING FACE}" * 19], "is no partition label"),
        (["a\0b"], "is no partition label"),
        (["\ud800"], "is no partition label"),
        ([7], "7 is no partition label"),
        ([f"p{i}" for i in range(129)], "1 to 128 partitions, not 129"),
    ],
)
def test_labels_of_partitions_are_checked(labels: list[Any], message: str) -> None:
    with pytest.raises(IllegalArgumentError, match=r"^disks\[0\]: .*" + message):
        config(disks=parts(*labels)).validate()


@pytest.mark.parametrize(
    "labels", [["x" * 36, "y"], ["\N{GRINNING FACE}" * 18], [f"p{i}" for i in range(128)]]
)
def test_labels_up_to_36_utf16_units_and_128_partitions_are_fine(labels: list[str]) -> None:
    config(disks=parts(*labels)).validate()


def test_writable_of_a_partition_is_a_truth_value() -> None:
    part = Partition("a", 101, "no")  # type: ignore[arg-type]
    with pytest.raises(IllegalArgumentError, match=r"disks\[0\]: writable of each partition"):
        config(disks=[DiskImage(partitions=[part])]).validate()


def test_an_unknown_cpu_topology_is_refused_when_it_is_given() -> None:
    with pytest.raises(IllegalArgumentError, match=r"Failed to parse CPU topology value: CpuTopology\(7\)"):
        config(cpu_topology=7)


def test_the_platform_version_must_match_that_of_the_driver() -> None:
    config(platform_version=">=0.9, <2").check_platform(Version(1, 0, 0))
    with pytest.raises(UnsupportedOperationError) as caught:
        config(platform_version="1.1").check_platform(Version(1, 0, 0))
    assert caught.value.message == (
        "Incompatible platform version. The config is compatible with platform version(s) ^1.1, "
        "but the actual platform version is 1.0.0"
    )


# -- Descriptors -----------------------------------------------------------------------------------


def test_files_are_given_as_objects_or_numbers_and_kept_as_numbers(image: io.BufferedRandom) -> None:
    fd = image.fileno()
    disks = [DiskImage(image, writable=True), DiskImage(partitions=[Partition("p", image)])]
    given = config(kernel=image, initrd=fd, disks=disks)
    assert (given.kernel, given.initrd, given.disks[0].image) == (fd, fd, fd)
    assert given.disks[1].partitions == (Partition("p", fd),)
    assert given.fds() == (fd,)
    assert config(kernel=9, initrd=7, disks=[DiskImage(8), DiskImage(7)]).fds() == (7, 8, 9)


def closed_file() -> object:
    file = io.FileIO(os.memfd_create("closed"))
    file.close()
    return file


@pytest.mark.parametrize(
    "value", ["/vmlinux", Path("/vmlinux"), b"x", -1, 2**31, 1.0, True, io.BytesIO(), closed_file()]
)
def test_what_is_no_open_file_is_refused_when_it_is_given(value: Any) -> None:
    for give in (lambda: config(kernel=value), lambda: DiskImage(value), lambda: Partition("a", value)):
        with pytest.raises(IllegalArgumentError, match=r"^(kernel|disk image|partition image) "):
            give()


def test_a_duplicate_has_descriptors_of_its_own_that_are_closed_once(image: io.BufferedRandom) -> None:
    fd = image.fileno()
    given = config(
        kernel=image, disks=[DiskImage(image), DiskImage(partitions=[Partition("p", image, True)])]
    )
    with given.duplicate() as copy:
        assert copy.kernel is not None
        assert copy == replace(given, kernel=copy.kernel, disks=copy.disks)
        assert copy.disks[1].partitions[0].writable
        assert len(copy.fds()) == 3
        assert fd not in copy.fds()
        assert all(fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for number in copy.fds())
        assert all(os.path.sameopenfile(number, fd) for number in copy.fds())
    assert not any(is_open(number) for number in copy.fds())
    reused = os.dup2(fd, copy.kernel)
    copy.close()  # the number belongs to somebody else by now
    assert is_open(reused)
    os.close(reused)


def test_a_duplicate_never_takes_the_place_of_a_standard_stream(image: io.BufferedRandom) -> None:
    kept = os.dup(0)
    os.close(0)  # the lowest free number, which a plain duplicate would get
    try:
        with config(kernel=image).duplicate() as copy:
            assert min(copy.fds()) > 2
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_configuration_never_closes_what_it_borrows(image: io.BufferedRandom) -> None:
    with config(kernel=image).duplicate() as owner:
        with replace(owner, name="other") as borrower:
            assert borrower.kernel == owner.kernel
        assert is_open(owner.fds()[0])
    with config(kernel=image):
        pass
    assert is_open(image.fileno())


def test_a_duplicate_outlives_the_file_it_was_made_from(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"contents")
    with path.open("rb") as file:
        copy = config(kernel=file).duplicate()
    with copy:
        copy.check_descriptors()
        assert os.pread(copy.fds()[0], 100, 0) == b"contents"


def test_a_descriptor_that_is_not_open_is_named_and_nothing_stays_open(image: io.BufferedRandom) -> None:
    gone = os.dup(image.fileno())
    os.close(gone)  # and the next descriptor to be made gets this number, so the kernel's duplicate would fit
    given = config(kernel=image, disks=[DiskImage(image), DiskImage(gone)])
    before = open_descriptors()
    for check in (given.duplicate, given.check_descriptors):
        with pytest.raises(IllegalArgumentError, match=rf"disks\[1\]\.image: descriptor {gone} is not open"):
            check()
    assert open_descriptors() == before


def test_running_out_of_descriptors_says_what_to_raise_and_nothing_stays_open(
    image: io.BufferedRandom,
) -> None:
    given = config(kernel=image, disks=[DiskImage(image)] * 1000)
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[-1] + 5, hard))
    try:
        with pytest.raises(
            ResourceExhaustedError, match=rf"disks\[\d+\].image: .*may have {before[-1] + 5} .*ulimit -n"
        ):
            given.duplicate()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("flags", "writable", "problem"),
    [
        (os.O_RDONLY, False, None),
        (os.O_RDWR, False, None),
        (os.O_RDWR, True, None),
        (os.O_RDONLY, True, "open it for reading and writing"),
        (os.O_WRONLY, True, "open it for reading and writing"),
        (os.O_WRONLY, False, "open for writing only"),
        (os.O_RDWR | os.O_APPEND, True, "append mode"),
        (os.O_RDWR | os.O_APPEND, False, None),
        (os.O_PATH, False, "O_PATH"),
        (os.O_PATH, True, "O_PATH"),
    ],
)
def test_a_disk_must_be_open_as_it_is_used(
    tmp_path: Path, flags: int, writable: bool, problem: str | None
) -> None:
    path = tmp_path / "disk"
    path.touch()
    fd = os.open(path, flags)
    try:
        given = config(kernel=None, disks=[DiskImage(fd, writable)])
        if problem is None:
            given.check_descriptors()
        else:
            with pytest.raises(IllegalArgumentError, match=rf"disks\[0\].image: descriptor {fd} .*{problem}"):
                given.check_descriptors()
    finally:
        os.close(fd)


@pytest.mark.parametrize("field", ["kernel", "initrd", "bootloader"])
def test_boot_files_must_be_regular_and_readable(tmp_path: Path, field: str) -> None:
    (tmp_path / "file").touch()
    readable = {"memfd": os.memfd_create("kernel"), "file": os.open(tmp_path / "file", os.O_RDONLY)}
    reader, writer = os.pipe()
    end, other = socket.socketpair()
    refused = {
        "a directory": os.open(tmp_path, os.O_RDONLY),
        "a pipe": reader,
        "a socket": end.detach(),
        "a character device": os.open("/dev/zero", os.O_RDONLY),
        "no file": os.eventfd(0),
        "open for writing only": os.open(tmp_path / "file", os.O_WRONLY),
        "O_PATH": os.open(tmp_path / "file", os.O_PATH),
    }
    try:
        for fd in readable.values():
            config(**{"kernel": None, field: fd}).check_descriptors()
        for what, fd in refused.items():
            with pytest.raises(IllegalArgumentError, match=f"{field}: .*{what}"):
                config(**{"kernel": None, field: fd}).check_descriptors()
    finally:
        other.close()
        for fd in [*readable.values(), *refused.values(), writer]:
            os.close(fd)


def test_a_disk_may_be_a_block_device_and_a_kernel_may_not() -> None:
    devices = [Path("/dev") / entry.name for entry in Path("/sys/class/block").iterdir()]
    for device in devices:
        try:
            fd = os.open(device, os.O_RDONLY)
        except OSError:
            continue
        break
    else:
        pytest.skip("no block device can be opened here")
    try:
        config(kernel=None, disks=[DiskImage(fd)]).check_descriptors()
        with pytest.raises(IllegalArgumentError, match="kernel: is a block device; give a regular file"):
            config(kernel=fd).check_descriptors()
    finally:
        os.close(fd)
