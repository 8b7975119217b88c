"""What is found out about a host: made-up roots and executables, and the host that runs the tests."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmactor.host import HostFacts, look, probe

INTEL = "processor\t: 0\nflags\t\t: fpu vmx sse\n\nprocessor\t: 1\nflags\t\t: fpu\n"
GUEST = "processor\t: 0\nflags\t\t: fpu svm hypervisor\n"
PLAIN = "processor\t: 0\nflags\t\t: fpu hypervisor\n"


class FakeHost:
    """A root directory and a PATH to fill."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.bin = directory / "opt/bin"
        self.checkout = directory / "checkout"
        self.environ = {"PATH": str(self.bin)}
        for part in (self.root / "dev", self.root / "proc", self.bin, self.checkout):
            part.mkdir(parents=True)

    def program(self, name: str, script: str, directory: Path | None = None) -> Path:
        path = (directory or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def look(self, *, timeout: float = 20.0, arch: str = "x86_64") -> HostFacts:
        return look(
            root=self.root, environ=self.environ, arch=arch, checkouts=[self.checkout], timeout=timeout
        )


@pytest.fixture
def host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's rights, under which nothing is forbidden."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_a_bare_host_lacks_everything_and_says_how_to_get_it(host: FakeHost) -> None:
    facts = host.look()
    missing = {
        "kvm": (facts.kvm, "no /dev/kvm", "kvm_intel or kvm_amd"),
        "vhost_vsock": (facts.vhost_vsock, "no /dev/vhost-vsock", "modprobe vhost_vsock"),
        "qemu": (facts.qemu, "no qemu-system-x86_64 in PATH", "apt-get install --no-install-recommends"),
        "qboot": (facts.qboot, "no qboot.rom", "qemu-system-data"),
        "helper": (facts.vhost_device_vsock, "no vhost-device-vsock", "make setup"),
        "crosvm": (facts.crosvm, "no crosvm in PATH", "build crosvm"),
    }
    for finding, found, advice in missing.values():
        assert not finding.usable
        assert found in finding.found
        assert advice in finding.advice
    assert facts.qemu.path is None
    assert facts.nested is False
    assert facts.cpus >= 1


def test_forbidden_devices_are_told_from_missing_ones(host: FakeHost, tmp_path: Path) -> None:
    for name in ("kvm", "vhost-vsock"):
        (host.root / "dev" / name).touch(mode=0o600)
    tmp_path.chmod(0o711)
    if os.geteuid() != 0:
        for name in ("kvm", "vhost-vsock"):
            (host.root / "dev" / name).chmod(0)
    with as_nobody():
        facts = host.look()
    assert "cannot be opened: Permission denied" in facts.kvm.found
    assert "group" in facts.kvm.advice
    assert "cannot be opened: Permission denied" in facts.vhost_vsock.found
    assert "read and write access" in facts.vhost_vsock.advice


def test_a_file_that_is_no_kvm_device_is_not_usable(host: FakeHost) -> None:
    (host.root / "dev/kvm").touch()
    assert "does not answer as KVM" in host.look().kvm.found


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm here")
@pytest.mark.parametrize(
    ("cpuinfo", "arch", "usable", "nested"),
    [
        (INTEL, "x86_64", True, False),
        (GUEST, "x86_64", True, True),
        (PLAIN, "x86_64", False, True),
        ("", "x86_64", False, False),
        ("", "aarch64", True, False),
    ],
)
def test_kvm_without_hardware_virtualization_is_not_used(
    host: FakeHost, cpuinfo: str, arch: str, usable: bool, nested: bool
) -> None:
    (host.root / "dev/kvm").symlink_to("/dev/kvm")
    (host.root / "proc/cpuinfo").write_text(cpuinfo)
    facts = host.look(arch=arch)
    assert (facts.kvm.usable, facts.nested) == (usable, nested)
    if not usable:
        assert "neither vmx nor svm" in facts.kvm.found
        assert "nested virtualization" in facts.kvm.advice


def test_a_device_that_opens_read_write_is_usable(host: FakeHost) -> None:
    (host.root / "dev/vhost-vsock").touch()
    assert host.look().vhost_vsock.usable


def test_executables_are_asked_for_their_version_exactly_once(host: FakeHost, tmp_path: Path) -> None:
    log = tmp_path / "asked"
    host.program(
        "qemu-system-x86_64", f'echo "qemu $@" >> {log}; echo "QEMU emulator version 7.2.22 (Debian)"'
    )
    host.program("vhost-device-vsock", f'echo "helper $@" >> {log}; echo "vhost-device-vsock 0.3.0"')
    host.program(
        "crosvm", f'echo "crosvm $@" >> {log}; echo "crosvm 0.1.0-abcdef"; echo "  --mem"; echo "  run"'
    )
    facts = host.look()
    assert [facts.qemu.version, facts.vhost_device_vsock.version, facts.crosvm.version] == [
        "7.2.22",
        "0.3.0",
        "0.1.0",
    ]
    assert facts.qemu.usable
    assert facts.vhost_device_vsock.usable
    assert facts.crosvm.usable
    assert facts.qemu.path == host.bin / "qemu-system-x86_64"
    asked = ["crosvm --help", "crosvm run --help", "crosvm version", "helper --version", "qemu --version"]
    assert sorted(log.read_text().splitlines()) == asked


def test_an_old_qemu_is_refused_with_its_version(host: FakeHost) -> None:
    host.program("qemu-system-x86_64", "echo QEMU emulator version 5.2.0")
    qemu = host.look().qemu
    assert not qemu.usable
    assert "is version 5.2.0; 6.0 is needed" in qemu.found


def test_qboot_is_found_beside_qemu_or_in_usr(host: FakeHost) -> None:
    rom = host.root / "usr/share/qemu/qboot.rom"
    rom.parent.mkdir(parents=True)
    rom.touch()
    assert host.look().qboot.usable
    assert not host.look(arch="aarch64").qboot.usable
    rom.unlink()
    host.program("qemu-system-x86_64", "echo 7.2.0")
    beside = host.bin.parent / "share/qemu/qboot.rom"
    beside.parent.mkdir(parents=True)
    beside.touch()
    assert host.look().qboot.found == str(beside)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'libc.so.6: version GLIBC_2.38 not found' >&2; exit 1", "failed (status 1): libc.so.6"),
        ("printf '\\033[31mred'; exit 3", r"failed (status 3): \x1b\[31mred"),
        ("kill -SEGV $$", f"failed (status -{int(signal.SIGSEGV)})"),
    ],
)
def test_an_executable_that_fails_is_not_usable(host: FakeHost, script: str, found: str) -> None:
    host.program("crosvm", script)
    crosvm = host.look().crosvm
    assert not crosvm.usable
    assert found in crosvm.found


def test_a_file_that_is_no_program_is_not_usable(host: FakeHost) -> None:
    host.program("crosvm", "").write_bytes(b"\0\1\2")
    assert "cannot be run: Exec format error" in host.look().crosvm.found


def test_a_program_without_a_version_is_usable(host: FakeHost) -> None:
    host.program("vhost-device-vsock", "echo helper")
    helper = host.look().vhost_device_vsock
    assert helper.usable
    assert helper.version is None
    assert "(version unknown)" in helper.found


CROSVM = """case "$*" in
version) echo crosvm 0.1.0-abcdef;;
"run --help") cat {directory}/run;;
--help) cat {directory}/top;;
*) exit 35;;
esac"""
RUN_HELP = """Usage: crosvm run <options> KERNEL

Options:
  --balloon-page-reporting
                    see --not-an-option, or
  -b, --block       parameters for setting up a block device.
      --deep        indented too far
  --mem             amount of guest memory
noise --vsock
"""
TOP_HELP = """Usage: crosvm <command>

Options:
  --help            display usage information

Commands:
  create_composite  Create a new composite disk image file
                    with words in a second line
  run               Start a new crosvm instance
"""


def test_crosvm_is_asked_for_its_options_and_commands(host: FakeHost, tmp_path: Path) -> None:
    (tmp_path / "run").write_text(RUN_HELP)
    (tmp_path / "top").write_text(TOP_HELP)
    path = host.program("crosvm", CROSVM.format(directory=tmp_path))
    crosvm = host.look().crosvm
    assert (crosvm.usable, crosvm.path, crosvm.version) == (True, path, "0.1.0")
    assert crosvm.options == {"balloon-page-reporting", "block", "mem"}
    assert crosvm.commands == {"create_composite", "run"}
    (tmp_path / "top").write_text("")
    crosvm = host.look().crosvm
    assert not crosvm.usable
    assert crosvm.found == f"{path} 0.1.0 does not list its options"


def test_a_help_without_end_is_cut_and_refused(host: FakeHost) -> None:
    host.program("crosvm", 'case "$*" in version) echo 0.1.0;; *) exec yes "  --mem";; esac')
    crosvm = host.look(timeout=5).crosvm
    assert not crosvm.usable
    assert "does not list its options" in crosvm.found


def test_crosvm_is_found_by_variable_before_path(host: FakeHost, tmp_path: Path) -> None:
    host.program("crosvm", "echo crosvm 0.1.0")
    named = host.program("mine", "echo 0.2.0", tmp_path)
    host.environ["VMACTOR_CROSVM"] = str(named)
    assert host.look().crosvm.path == named
    host.environ["VMACTOR_CROSVM"] = str(tmp_path / "absent")
    crosvm = host.look().crosvm
    assert not crosvm.usable
    assert "VMACTOR_CROSVM names" in crosvm.found


@pytest.mark.parametrize(
    "script", ["sleep 1000", "sleep 1000 & echo 1.2.3; wait", "yes 1.2.3", "sleep 1000 &"]
)
def test_an_executable_that_does_not_end_costs_a_deadline_and_leaves_nothing(
    host: FakeHost, tmp_path: Path, script: str
) -> None:
    # Whatever the script starts holds a lock, which is free again only when all of that is gone.
    lock = tmp_path / "lock"
    host.program("crosvm", f"exec 9>{lock}; flock 9; {script}")
    crosvm = host.look(timeout=0.3).crosvm
    assert not crosvm.usable
    assert "did not tell its version within 0.3 s" in crosvm.found
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_the_helper_is_found_by_variable_then_path_then_build(host: FakeHost, tmp_path: Path) -> None:
    built = host.program("vhost-device-vsock", "echo 1.0", host.checkout / "build/host/usr/bin")
    assert host.look().vhost_device_vsock.path == built
    nearer = host.program("vhost-device-vsock", "echo 1.1", host.checkout / "build/host/bin")
    assert host.look().vhost_device_vsock.path == nearer
    in_path = host.program("vhost-device-vsock", "echo 1.2")
    assert host.look().vhost_device_vsock.path == in_path
    named = host.program("mine", "echo 1.3", tmp_path)
    host.environ["VMACTOR_VHOST_DEVICE_VSOCK"] = str(named)
    assert host.look().vhost_device_vsock.path == named
    host.environ["VMACTOR_VHOST_DEVICE_VSOCK"] = str(tmp_path / "absent")
    helper = host.look().vhost_device_vsock
    assert not helper.usable
    assert "VMACTOR_VHOST_DEVICE_VSOCK names" in helper.found


def test_this_host_is_looked_at_once() -> None:
    assert probe() is probe()
    facts = probe()
    assert facts.arch == os.uname().machine
    for finding in (facts.kvm, facts.vhost_vsock, facts.af_vsock, facts.qemu, facts.crosvm):
        assert finding.found
        assert finding.usable or finding.advice
