"""crosvm's command line as a pure function, for builds of two ages and both kinds of vsock."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.host_facts import ARM_OPTIONS, HEAD_OPTIONS, OPTIONS_2023_02, crosvm
from vmactor.config import DiskImage, RawConfig
from vmactor.errors import UnsupportedOperationError
from vmactor.messages import CpuTopology
from vmactor.network_config import NetworkInterface
from vmactor.vmm.crosvm import command_line, descriptors, validate
from vmactor.vmm.driver import Channels, KernelVsock, Launch, Tap, VhostUserVsock

BARE = Channels(console=None, failure=21, log=None, ramdump=None, stderr=None)
ALL = Channels(console=20, failure=21, log=22, ramdump=23, stderr=24)
HEAD, ARM, OLD = crosvm(HEAD_OPTIONS), crosvm(ARM_OPTIONS), crosvm(OPTIONS_2023_02)

START = ["/usr/bin/crosvm", "--extended-status", "--log-level", "info,disk=warn", "--no-syslog", "run"]
START += ["--disable-sandbox"]
SERIAL = [
    "--serial=type=sink,hardware=serial,num=1",
    "--serial=type=file,path=/proc/self/fd/21,hardware=serial,num=2",
    "--serial=type=sink,hardware=virtio-console,num=1",
    "--serial=type=sink,hardware=virtio-console,num=2",
    "--serial=type=sink,hardware=virtio-console,num=3",
]


def launch(channels: Channels = BARE, **config: Any) -> Launch:
    raw = RawConfig(name="vm", **({"kernel": 30} | config))
    return Launch("vm", 2048, raw, KernelVsock(fd=40), channels, Path("/run/vm"))


def value_of(line: list[str], option: str) -> str:
    return line[line.index(option) + 1]


def test_a_tap_goes_by_its_descriptor_or_is_refused() -> None:
    one = replace(launch(), taps=(Tap(50, "02:00:00:00:00:01", 1400),))
    build = replace(HEAD, options=HEAD.options | {"net"})
    line = command_line(build, "x86_64", 2, one)
    assert line[line.index("--net") + 1] == "tap-fd=50,mac=02:00:00:00:00:01"
    assert 50 in descriptors(one)
    networked = replace(one.config, network=(NetworkInterface(),))
    validate(build, networked)
    with pytest.raises(UnsupportedOperationError, match="cannot take an open tap"):
        validate(replace(HEAD, options=HEAD.options - {"net"}), networked)


def test_the_least_launch_of_a_build_of_2026() -> None:
    assert command_line(HEAD, "x86_64", 6, launch(), 9) == [
        *(*START, "--vsock", "cid=2048,device=/proc/self/fd/40", "--balloon-page-reporting"),
        *("--mem", "256", "--cpus", "1", "--no-usb", *SERIAL),
        *("/proc/self/fd/30", "--socket", "/proc/self/fd/9"),
    ]


def test_the_fullest_launch_of_a_build_of_2026() -> None:
    full = launch(
        ALL,
        initrd=31,
        params="console=hvc0 a,b=c",
        disks=[DiskImage(32), DiskImage(33, writable=True)],
        memory_mib=96,
        cpu_topology=CpuTopology.MATCH_HOST,
    )
    assert command_line(HEAD, "x86_64", 6, full, 9) == [
        *(*START, "--vsock", "cid=2048,device=/proc/self/fd/40", "--balloon-page-reporting"),
        *("--mem", "96", "--cpus", "6", "--no-usb"),
        "--serial=type=file,path=/proc/self/fd/20,hardware=serial,num=1",
        "--serial=type=file,path=/proc/self/fd/21,hardware=serial,num=2",
        "--serial=type=file,path=/proc/self/fd/20,hardware=virtio-console,num=1",
        "--serial=type=file,path=/proc/self/fd/23,hardware=virtio-console,num=2",
        "--serial=type=file,path=/proc/self/fd/22,hardware=virtio-console,num=3",
        *("--initrd", "/proc/self/fd/31", "--params", "console=hvc0 a,b=c"),
        *("--block", "path=/proc/self/fd/32,ro=true,lock=false"),
        *("--block", "path=/proc/self/fd/33,ro=false,lock=false"),
        *("/proc/self/fd/30", "--socket", "/proc/self/fd/9", "--params", "crashkernel=17M"),
    ]
    assert descriptors(full, 9) == (9, 20, 21, 22, 23, 30, 31, 32, 33, 40)


def test_a_build_of_2023_gets_the_spelling_of_its_day() -> None:
    disks = [DiskImage(32), DiskImage(33, writable=True)]
    assert command_line(OLD, "x86_64", 6, launch(disks=disks), 9) == [
        *(*START, "--cid", "2048", "--vhost-vsock-fd", "40", "--balloon-page-reporting"),
        *("--mem", "256", "--cpus", "1", "--no-usb", *SERIAL),
        *("--block", "path=/proc/self/fd/32,ro=true", "--block", "path=/proc/self/fd/33,ro=false"),
        *("/proc/self/fd/30", "--socket", "/proc/self/fd/9"),
    ]


def test_a_build_without_the_block_option_gets_the_reference_s_disks() -> None:
    disks = [DiskImage(32), DiskImage(33, writable=True)]
    line = command_line(crosvm(OPTIONS_2023_02 - {"block"}), "x86_64", 6, launch(disks=disks), 9)
    assert line[line.index("--disk") :][:4] == ["--disk", "/proc/self/fd/32", "--rwdisk", "/proc/self/fd/33"]


def test_a_protected_vm_on_aarch64_has_a_buffer_that_grows_with_its_disks_and_no_balloon() -> None:
    protected = launch(protected_vm=True, disks=[DiskImage(32), DiskImage(33)])
    line = command_line(ARM, "aarch64", 6, protected, 9)
    start = line.index("--no-balloon")
    assert line[start : start + 6] == ["--no-balloon", "--protected-vm", "--swiotlb", "12", "--mem", "256"]
    assert "--balloon-page-reporting" not in line


@pytest.mark.parametrize(("build", "arch"), [(HEAD, "x86_64"), (OLD, "x86_64"), (HEAD, "aarch64")])
def test_no_buffer_is_named_on_other_architectures_and_to_builds_without_the_option(
    build: Any, arch: str
) -> None:
    line = command_line(build, arch, 6, launch(protected_vm=True), 9)
    assert "--protected-vm" in line
    assert "--swiotlb" not in line


def test_an_unprotected_vm_has_no_buffer() -> None:
    assert "--swiotlb" not in command_line(ARM, "aarch64", 6, launch(), 9)


def test_a_build_without_balloon_is_told_nothing_of_it() -> None:
    build = crosvm(HEAD_OPTIONS - {"no-balloon", "balloon-page-reporting"})
    for protected in (False, True):
        line = command_line(build, "x86_64", 6, launch(protected_vm=protected), 9)
        assert not [word for word in line if "balloon" in word]


def test_a_helper_s_vsock_is_a_connected_descriptor_with_queues_that_it_can_take() -> None:
    line = command_line(HEAD, "x86_64", 6, replace(launch(), vsock=VhostUserVsock(41)), 9)
    assert value_of(line, "--vhost-user") == "type=vsock,socket=/proc/self/fd/41,max-queue-size=256"
    assert "--vsock" not in line


def test_a_bootloader_takes_the_place_of_kernel_and_initrd() -> None:
    line = command_line(HEAD, "x86_64", 6, launch(kernel=None, bootloader=35), 9)
    assert value_of(line, "--bios") == "/proc/self/fd/35"
    assert line[-2:] == ["--socket", "/proc/self/fd/9"]
    assert "/proc/self/fd/30" not in line


@pytest.mark.parametrize(
    ("missing", "changes", "message"),
    [
        ({"vsock", "cid"}, {}, "cannot take an open /dev/vhost-vsock"),
        ({"vsock", "vhost-vsock-fd"}, {}, "cannot take an open /dev/vhost-vsock"),
        ({"vhost-user"}, {"vsock": VhostUserVsock(41)}, "cannot take a connected vhost-user vsock"),
        ({"protected-vm"}, {"config": launch(protected_vm=True).config}, "cannot run protected VMs"),
    ],
)
def test_what_a_build_lacks_is_named_and_nothing_else_is_passed_instead(
    missing: set[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        command_line(crosvm(HEAD_OPTIONS - missing), "x86_64", 6, replace(launch(), **changes), 9)


def test_a_build_that_cannot_take_a_connected_socket_is_refused_beside_a_helper() -> None:
    between = crosvm(HEAD_OPTIONS | {"vhost-user-gpu"})
    for build in (OLD, between):
        with pytest.raises(UnsupportedOperationError, match="cannot take a connected vhost-user vsock"):
            command_line(build, "x86_64", 6, replace(launch(), vsock=VhostUserVsock(41)), 9)


@pytest.mark.parametrize(
    "params", ["-kernel /etc/passwd", "-x=1", "--", "-h", "--socket=/x", "a --b=c 'd\" \\"]
)
def test_hostile_parameters_stay_one_argument_that_crosvm_does_not_rewrite(params: str) -> None:
    plain = command_line(HEAD, "x86_64", 6, launch(params="x"), 9)
    hostile = command_line(HEAD, "x86_64", 6, launch(params=params), 9)
    differences = [(a, b) for a, b in zip(plain, hostile, strict=True) if a != b]
    assert differences == [("x", f" {params}" if params.startswith("-") else params)]


def test_every_option_passed_is_one_that_the_build_lists() -> None:
    full = launch(ALL, initrd=31, params="x", disks=[DiskImage(32, writable=True)], protected_vm=True)
    for build, arch in ((HEAD, "x86_64"), (ARM, "aarch64"), (OLD, "aarch64")):
        line = command_line(build, arch, 6, full, 9)
        passed = {word[2:].partition("=")[0] for word in line[line.index("run") :] if word.startswith("--")}
        assert passed <= build.options
