"""QEMU's command line as a pure function, what the driver refuses, and how a start fails."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.host_facts import MISSING, absent, facts
from vmactor.config import DiskImage, RawConfig
from vmactor.errors import IllegalArgumentError, StartFailedError, UnsupportedOperationError, VmmError
from vmactor.host import Program
from vmactor.messages import CpuTopology, DeathReason
from vmactor.vmm.driver import Channels, KernelVsock, Launch, Tap, VhostUserVsock
from vmactor.vmm.qemu import QemuDriver, descriptors

BARE = Channels(console=None, failure=21, log=None, ramdump=None, stderr=None)
ALL = Channels(console=20, failure=21, log=22, ramdump=23, stderr=24)

HEAD = ["/usr/bin/qemu-system-x86_64", "-name", "guest=vm", "-nodefaults", "-no-user-config"]
HEAD += ["-display", "none", "-S"]
KVM = ["-accel", "kvm", "-cpu", "host"]
TCG = ["-accel", "tcg", "-cpu", "max"]
MACHINE = ["-machine", "q35,memory-backend=memory,usb=off,vmport=off,sata=off,smbus=off,dump-guest-core=off"]
PORTS = ["-serial", "chardev:ttyS0", "-serial", "chardev:ttyS1"]
PORTS += ["-device", "virtio-serial-pci,id=hvc,max_ports=3"]
PORTS += ["-device", "virtconsole,bus=hvc.0,nr=0,chardev=hvc0"]
PORTS += ["-device", "virtconsole,bus=hvc.0,nr=1,chardev=hvc1"]
PORTS += ["-device", "virtconsole,bus=hvc.0,nr=2,chardev=hvc2"]
DEVICES = ["-device", "virtio-balloon-pci,id=balloon,deflate-on-oom=on,free-page-reporting=on"]
DEVICES += ["-device", "pvpanic-pci,addr=1e.0,multifunction=on", "-device", "i6300esb,addr=1e.1"]
DEVICES += ["-action", "reboot=shutdown,shutdown=poweroff,panic=shutdown,watchdog=reset"]
DEVICES += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
MONITOR = ["-chardev", "socket,id=control,fd=9,server=on,wait=off", "-mon", "chardev=control,mode=control"]


def memory(mib: int, cpus: int) -> list[str]:
    backend = f"memory-backend-memfd,id=memory,size={mib}M,share=on"
    return ["-m", f"{mib}M", "-smp", f"{cpus}", "-object", backend]


def chardevs(**roles: str) -> list[str]:
    return [word for role, rest in roles.items() for word in ("-chardev", rest.replace("ID", f"id={role}"))]


def pipe(number: int) -> str:
    return f"file,ID,path=/dev/fdset/{number},append=on"


NULL = "null,ID"


def launch(channels: Channels = BARE, *, name: str = "vm", **config: Any) -> Launch:
    raw = RawConfig(name=name, **({"kernel": 30} | config))
    return Launch(name, 2048, raw, KernelVsock(fd=40), channels, Path("/run/vm"))


def value_of(line: list[str], option: str) -> str:
    return line[line.index(option) + 1]


def test_a_tap_goes_by_its_descriptor_as_a_function_of_a_slot_that_disks_do_not_need() -> None:
    one = replace(launch(), taps=(Tap(50, "02:00:00:00:00:01", 1400), Tap(51, "02:00:00:00:00:02", 1500)))
    line = QemuDriver(facts()).command_line(one)
    assert line[line.index("-netdev") + 1] == "tap,id=net0,fd=50"
    for number, mac, mtu in ((0, "01", 1400), (1, "02", 1500)):
        nic = f"virtio-net-pci,netdev=net{number},mac=02:00:00:00:00:{mac},host_mtu={mtu}"
        assert f"{nic},romfile=,addr=1e.{2 + number}" in line
    assert {50, 51} <= set(descriptors(one))


def test_the_least_launch_under_kvm_with_kernel_vsock() -> None:
    assert QemuDriver(facts()).command_line(launch(), 9) == [
        *(*HEAD, *KVM, *MACHINE, *memory(256, 1)),
        *("-bios", "qboot.rom", "-kernel", "/proc/self/fd/30", "-append", "panic=-1"),
        *chardevs(ttyS0=NULL, ttyS1=pipe(21), hvc0=NULL, hvc1=NULL, hvc2=NULL),
        *(*PORTS, "-device", "vhost-vsock-pci,guest-cid=2048,vhostfd=40", *DEVICES, *MONITOR),
        *("-add-fd", "fd=21,set=21"),
    ]


def test_the_fullest_launch_emulated_with_a_vhost_user_backend() -> None:
    full = replace(
        launch(
            ALL,
            initrd=31,
            params="console=hvc0 a,b=c",
            disks=[DiskImage(32), DiskImage(33, writable=True)],
            memory_mib=96,
            cpu_topology=CpuTopology.MATCH_HOST,
        ),
        vsock=VhostUserVsock(fd=41),
    )
    assert QemuDriver(facts(kvm=MISSING)).command_line(full, 9) == [
        *(*HEAD, *TCG, *MACHINE, *memory(96, 6)),
        *("-bios", "qboot.rom", "-kernel", "/proc/self/fd/30"),
        *("-append", "panic=-1 console=hvc0 a,b=c", "-initrd", "/proc/self/fd/31"),
        *chardevs(ttyS0=pipe(20), ttyS1=pipe(21), hvc0=pipe(20), hvc1=pipe(23), hvc2=pipe(22)),
        *PORTS,
        "-blockdev",
        "driver=file,node-name=file0,filename=/dev/fdset/32,read-only=on,auto-read-only=off,discard=unmap",
        "-blockdev",
        "driver=raw,node-name=disk0,file=file0,read-only=on,discard=unmap",
        *("-device", "virtio-blk-pci,drive=disk0,werror=report,rerror=report"),
        "-blockdev",
        "driver=file,node-name=file1,filename=/dev/fdset/33,read-only=off,auto-read-only=off,discard=unmap",
        "-blockdev",
        "driver=raw,node-name=disk1,file=file1,read-only=off,discard=unmap",
        *("-device", "virtio-blk-pci,drive=disk1,werror=report,rerror=report"),
        *("-chardev", "socket,id=vsock,fd=41", "-device", "vhost-user-vsock-pci,chardev=vsock"),
        *(*DEVICES, *MONITOR),
        *("-add-fd", "fd=20,set=20", "-add-fd", "fd=21,set=21", "-add-fd", "fd=23,set=23"),
        *("-add-fd", "fd=22,set=22", "-add-fd", "fd=32,set=32", "-add-fd", "fd=33,set=33"),
    ]
    assert descriptors(full, 9) == (9, 20, 21, 22, 23, 30, 31, 32, 33, 41)


def test_a_bootloader_takes_the_place_of_qboot_and_kernel() -> None:
    line = QemuDriver(facts()).command_line(launch(kernel=None, bootloader=35), 9)
    assert value_of(line, "-bios") == "/proc/self/fd/35"
    assert not {"-kernel", "-append", "-initrd"} & set(line)


def test_without_qboot_the_standard_firmware_boots_the_kernel() -> None:
    line = QemuDriver(facts(qboot=MISSING)).command_line(launch(), 9)
    assert "-bios" not in line
    assert value_of(line, "-kernel") == "/proc/self/fd/30"


def test_one_descriptor_in_two_places_is_one_set() -> None:
    line = QemuDriver(facts()).command_line(launch(disks=[DiskImage(32), DiskImage(32)]), 9)
    assert line.count("fd=32,set=32") == 1
    assert " ".join(line).count("/dev/fdset/32") == 2


def test_the_line_is_the_same_for_every_call() -> None:
    driver = QemuDriver(facts())
    assert driver.command_line(launch(ALL), 9) == driver.command_line(launch(ALL), 9)


@pytest.mark.parametrize("params", ["-kernel /etc/passwd", "a,b,,c=d", "--", "-h", "x'\"\\ y", "\u202etxt"])
def test_hostile_parameters_stay_one_argument(params: str) -> None:
    plain = QemuDriver(facts()).command_line(launch(params="x"), 9)
    hostile = QemuDriver(facts()).command_line(launch(params=params), 9)
    differences = [(a, b) for a, b in zip(plain, hostile, strict=True) if a != b]
    assert differences == [("panic=-1 x", f"panic=-1 {params}")]


def test_hostile_names_and_directories_cannot_add_options() -> None:
    line = QemuDriver(facts()).command_line(launch(name="x,process=y"), 9)
    assert value_of(line, "-name") == "guest=x,,process=y"
    elsewhere = replace(launch(), directory=Path("/run/a,server=off"))
    line = QemuDriver(facts()).command_line(elsewhere)
    assert "socket,id=control,path=/run/a,,server=off/control,server=on,wait=off" in line
    with pytest.raises(IllegalArgumentError):
        QemuDriver(facts()).command_line(launch(name="x\n-daemonize"), 9)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {"protected_vm": True}, "protected_vm: .* use crosvm"),
        ({}, {"task_profiles": ["a"]}, "task_profiles: .* remove them"),
        ({"arch": "aarch64"}, {}, "x86_64 hosts only so far, and this is aarch64"),
        ({"qemu": absent("qemu")}, {}, "no qemu in PATH: install qemu"),
    ],
)
def test_what_qemu_cannot_do_is_refused_with_what_to_do(
    changes: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        QemuDriver(facts(**changes)).validate(launch(**config).config)


def test_a_plain_configuration_is_accepted() -> None:
    QemuDriver(facts()).validate(launch(memory_mib=512, disks=[DiskImage(3, writable=True)]).config)


# -- Spawning something that is not QEMU -------------------------------------------------------------


@pytest.fixture
def real_launch(short_dir: Path) -> Iterator[Launch]:
    """A launch whose descriptors exist."""
    with ExitStack() as stack:
        null = stack.enter_context(Path(os.devnull).open("r+b", buffering=0))
        image = stack.enter_context((short_dir / "image").open("w+b"))
        vsock = stack.enter_context(socket.socket())
        config = RawConfig(name="vm", kernel=image, disks=[DiskImage(image)])
        channels = Channels(null.fileno(), null.fileno(), None, None, null.fileno())
        yield Launch("vm", 2048, config, VhostUserVsock(vsock.fileno()), channels, short_dir)


def pretender(directory: Path, script: str) -> QemuDriver:
    """A driver whose QEMU is a script."""
    path = directory / "qemu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return QemuDriver(facts(qemu=Program(True, "a script", "", path, "7.2")))


@pytest.mark.anyio
async def test_an_executable_that_is_gone_is_a_failed_start_that_leaves_nothing(real_launch: Launch) -> None:
    driver = QemuDriver(facts(qemu=Program(True, "gone", "", Path("/nowhere/qemu"), "7.2")))
    with pytest.raises(StartFailedError, match=r"cannot start QEMU: .*No such file"):
        await driver.spawn(real_launch)
    assert not (real_launch.directory / "control").exists()


@pytest.mark.anyio
async def test_a_long_path_is_refused_before_anything_is_made(real_launch: Launch) -> None:
    far = real_launch.directory / ("x" * 120)
    with pytest.raises(StartFailedError, match="use a shorter state directory"):
        await QemuDriver(facts()).spawn(replace(real_launch, directory=far))


@pytest.mark.anyio
async def test_a_control_socket_in_the_way_is_a_failed_start_and_is_left_alone(real_launch: Launch) -> None:
    (real_launch.directory / "control").mkdir()
    with pytest.raises(StartFailedError, match=r"cannot start QEMU: .*Address already in use"):
        await QemuDriver(facts()).spawn(real_launch)
    assert (real_launch.directory / "control").is_dir()


@pytest.mark.anyio
async def test_a_vmm_that_ends_at_once_is_a_failed_start(real_launch: Launch, short_dir: Path) -> None:
    vmm = await pretender(short_dir, "exit 3").spawn(real_launch)
    try:
        with pytest.raises(VmmError, match="QEMU ended before it ran the guest: exit code 3"):
            await vmm.wait_running()
        ended = await vmm.wait()
        assert ended.reason is DeathReason.START_FAILED
        assert ended.detail == "QEMU ended before it ran the guest: exit code 3"
    finally:
        await vmm.aclose()
    assert not (real_launch.directory / "control").exists()


@pytest.mark.anyio
async def test_the_child_gets_the_named_descriptors_and_no_others(
    real_launch: Launch, short_dir: Path
) -> None:
    disk = real_launch.config.disks[0].image
    script = f'echo "$*" > {short_dir}/line; ls -l /proc/self/fd > {short_dir}/fds'
    vmm = await pretender(short_dir, script).spawn(real_launch)
    try:
        await vmm.wait()
    finally:
        await vmm.aclose()
    line = (short_dir / "line").read_text()
    named = {int(number) for number in re.findall(r"(?:fd=|/proc/self/fd/)(\d+)", line)}
    links = re.findall(r" (\d+) -> (.*)", (short_dir / "fds").read_text())
    inherited = {int(number) for number, target in links if not re.fullmatch(r"/proc/\d+/fd", target)}
    assert inherited - {0, 1, 2} == named
    assert {real_launch.config.kernel, real_launch.vsock.fd, real_launch.channels.failure} <= named
    # The disk is read-only, so QEMU gets a read-only descriptor, unlike the configuration's.
    assert disk == real_launch.config.kernel
    assert f"-add-fd fd={disk}," not in line
