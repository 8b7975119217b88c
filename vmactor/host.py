"""What this host can do for VMs: found once, quickly, and explained.

``probe`` looks at devices, CPU flags and executables. It changes nothing, asks each executable its version
(and crosvm for its help) with a deadline, and never raises: what is missing becomes a ``Finding`` that says
so and how to get it. It blocks for some tens of milliseconds: call it from a worker thread if that matters.
"""

import errno
import fcntl
import functools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vmactor.text import escape

VERSION_TIMEOUT: Final = 5.0
"""How long an executable may take to tell its version, in seconds."""
SIMULATED_NAME: Final = "vmactor-simulated-vmm"
SIMULATED_SOURCE: Final = Path(__file__).resolve().parent / "vmm" / "simulated.c"
QEMU_MINIMUM: Final = (6, 0)
"""The first QEMU with ``-action``; 7.2 is the one that is tested."""

_KVM_GET_API_VERSION: Final = 0xAE00
_KVM_API_VERSION: Final = 12
_OUTPUT_LIMIT: Final = 4096
_HELP_LIMIT: Final = 1 << 18
_CPUINFO_LIMIT: Final = 1 << 16
_CHECKOUT: Final = Path(__file__).resolve().parent.parent
_HELPER_PLACES: Final = ("build/host/bin/vhost-device-vsock", "build/host/usr/bin/vhost-device-vsock")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        usable: Whether VMs can use it.
        found: What was found, for people.
        advice: How to get it, or more of it; empty if there is nothing to do.
    """

    usable: bool
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Program(Finding):
    """An executable that was looked for.

    Attributes:
        path: Where it is; None if it was not found.
        version: What it calls itself, e.g. ``7.2.22``; None if it did not say.
    """

    path: Path | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Crosvm(Program):
    """crosvm, and what its build can do by its own help; an option that is compiled out is not in there.

    Attributes:
        options: Long options of ``crosvm run``, without their dashes.
        commands: Subcommands, e.g. ``create_composite``.
    """

    options: frozenset[str] = frozenset()
    commands: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What the host can do.

    Attributes:
        arch: Machine name as the kernel gives it, e.g. ``x86_64``.
        cpus: Configured processors (not only those online), as in the reference.
        kvm: Whether stock kernels run under the host's KVM.
        nested: Whether the host is itself a VM.
        vhost_vsock: The kernel's vsock device for guests.
        af_vsock: vsock sockets on the host.
        qemu: The system emulator of the host's own architecture.
        qboot: QEMU's quick firmware for direct kernel boot.
        vhost_device_vsock: The helper that carries vsock where the kernel's device is missing.
        crosvm: The other VMM, and what its build can do.
        simulated: The VMM without a guest, for load and fault tests.
    """

    arch: str
    cpus: int
    kvm: Finding
    nested: bool
    vhost_vsock: Finding
    af_vsock: Finding
    qemu: Program
    qboot: Finding
    vhost_device_vsock: Program
    crosvm: Crosvm
    simulated: Program


_once = threading.Lock()


def probe() -> HostFacts:
    """Return this host's facts; looked up at the first call of the process and remembered."""
    with _once:
        return _remembered()


@functools.cache
def _remembered() -> HostFacts:
    return look()


def look(
    *,
    root: Path = Path("/"),
    environ: Mapping[str, str] = os.environ,
    arch: str | None = None,
    checkouts: Iterable[Path] | None = None,
    timeout: float = VERSION_TIMEOUT,
) -> HostFacts:
    """Look the facts up anew.

    Args:
        root: Where ``dev``, ``proc`` and ``usr`` are.
        environ: Holds ``PATH`` and, if set, ``VMACTOR_VHOST_DEVICE_VSOCK``, ``VMACTOR_CROSVM`` and
            ``VMACTOR_SIMULATED_VMM``.
        arch: Machine name; the kernel's if not given.
        checkouts: Directories that may hold a ``build`` directory; the current one and the source checkout if
            not given.
        timeout: Seconds that each executable has for telling its version.
    """
    arch = arch or os.uname().machine
    flags = _cpu_flags(root)
    path = environ.get("PATH", os.defpath)
    checkouts = tuple(checkouts or (Path.cwd(), _CHECKOUT))
    qemu = _qemu(arch, path, timeout)
    return HostFacts(
        arch=arch,
        cpus=max(os.sysconf("SC_NPROCESSORS_CONF"), 1),
        kvm=_kvm(root, arch, flags),
        nested="hypervisor" in flags,
        vhost_vsock=_vhost_vsock(root),
        af_vsock=_af_vsock(),
        qemu=qemu,
        qboot=_qboot(root, arch, qemu),
        vhost_device_vsock=_helper(environ, path, checkouts, timeout),
        crosvm=_crosvm(environ, path, timeout),
        simulated=_simulated(environ, path, checkouts),
    )


# -- Devices ---------------------------------------------------------------------------------------


def _cpu_flags(root: Path) -> frozenset[str]:
    """Flags of the first processor; none on other architectures than x86."""
    try:
        with (root / "proc/cpuinfo").open("rb") as file:
            text = file.read(_CPUINFO_LIMIT).decode(errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def _kvm(root: Path, arch: str, flags: frozenset[str]) -> Finding:
    opened = _open(root / "dev/kvm")
    if isinstance(opened, OSError):
        return Finding(
            False,
            _unopened("/dev/kvm", opened),
            "add your user to the group that owns /dev/kvm ('kvm' on Debian) and log in again"
            if isinstance(opened, PermissionError)
            else "switch virtualization on in the firmware (in a VM: nested virtualization in the hypervisor "
            "around it) and load kvm_intel or kvm_amd",
        )
    try:
        version = fcntl.ioctl(opened, _KVM_GET_API_VERSION)
    except OSError as error:
        return Finding(
            False, f"/dev/kvm does not answer as KVM: {error.strerror}", "load the host's KVM module"
        )
    finally:
        os.close(opened)
    if version != _KVM_API_VERSION:
        return Finding(
            False,
            f"/dev/kvm speaks API version {version}, not {_KVM_API_VERSION}",
            "use the kernel's own KVM",
        )
    if arch == "x86_64" and not flags & {"vmx", "svm"}:
        return Finding(
            False,
            "/dev/kvm answers, but the CPU shows neither vmx nor svm: KVM without hardware virtualization "
            "(kvm_pvm, say), under which stock guest kernels hang",
            "switch nested virtualization on in the hypervisor around this host, or use one with vmx or svm",
        )
    return Finding(True, "/dev/kvm can be used")


def _vhost_vsock(root: Path) -> Finding:
    opened = _open(root / "dev/vhost-vsock")
    if not isinstance(opened, OSError):
        os.close(opened)
        return Finding(True, "/dev/vhost-vsock can be used")
    return Finding(
        False,
        _unopened("/dev/vhost-vsock", opened),
        "give your user read and write access to /dev/vhost-vsock (group 'kvm' on Debian)"
        if isinstance(opened, PermissionError)
        else "run 'modprobe vhost_vsock' as root",
    )


def _af_vsock() -> Finding:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        return Finding(False, f"no AF_VSOCK sockets: {error.strerror}", "run 'modprobe vsock' as root")
    return Finding(True, "AF_VSOCK sockets can be made")


def _open(path: Path) -> int | OSError:
    try:
        # Non-blocking, in case somebody put a pipe there.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        return error


def _unopened(name: str, error: OSError) -> str:
    return f"no {name}" if error.errno == errno.ENOENT else f"{name} cannot be opened: {error.strerror}"


# -- Executables -----------------------------------------------------------------------------------


def _qemu(arch: str, path: str, timeout: float) -> Program:
    name = f"qemu-system-{arch}"
    package = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}.get(arch, "qemu-system-misc")
    advice = f"run 'apt-get install --no-install-recommends {package}' as root"
    found = shutil.which(name, path=path)
    if found is None:
        return Program(False, f"no {name} in PATH", advice)
    program = _ask(Path(found), "--version", timeout, advice)
    if program.usable and _numbers(program.version) < QEMU_MINIMUM:
        wanted = ".".join(map(str, QEMU_MINIMUM))
        return Program(
            False,
            f"{found} is version {program.version}; {wanted} is needed",
            f"install QEMU {wanted} or later; Debian 12's will do",
            program.path,
            program.version,
        )
    return program


def _qboot(root: Path, arch: str, qemu: Program) -> Finding:
    if arch != "x86_64":
        return Finding(False, "qboot.rom is for x86_64 only")
    prefixes = [root / "usr", root / "usr/local"]
    if qemu.path is not None:
        prefixes.insert(0, qemu.path.resolve().parent.parent)
    for prefix in prefixes:
        if (rom := prefix / "share/qemu/qboot.rom").is_file():
            return Finding(True, f"{escape(str(rom))}")
    return Finding(
        False, "no qboot.rom; guests boot half a second later", "install QEMU's data files (qemu-system-data)"
    )


def _helper(environ: Mapping[str, str], path: str, checkouts: Iterable[Path], timeout: float) -> Program:
    advice = (
        "run 'make setup' in the source checkout, put vhost-device-vsock (Debian sid or cargo) in PATH, or "
        "name it in VMACTOR_VHOST_DEVICE_VSOCK; hosts with /dev/vhost-vsock do not need it"
    )
    if named := environ.get("VMACTOR_VHOST_DEVICE_VSOCK"):
        if shutil.which(named, path="") is None:
            return Program(
                False, f"VMACTOR_VHOST_DEVICE_VSOCK names {escape(named)}, which cannot be run", advice
            )
        return _ask(Path(named).absolute(), "--version", timeout, advice)
    if (found := shutil.which("vhost-device-vsock", path=path)) is None:
        built = (shutil.which(checkout / place) for checkout in checkouts for place in _HELPER_PLACES)
        found = next((str(candidate) for candidate in built if candidate), None)
    if found is None:
        return Program(False, "no vhost-device-vsock in PATH or build/host", advice)
    return _ask(Path(found).absolute(), "--version", timeout, advice)


def _crosvm(environ: Mapping[str, str], path: str, timeout: float) -> Crosvm:
    advice = (
        "build crosvm from its source and put it in PATH, or name it in VMACTOR_CROSVM; no distribution has "
        "a package"
    )
    named = environ.get("VMACTOR_CROSVM")
    found = shutil.which(named, path="") if named else shutil.which("crosvm", path=path)
    if found is None:
        what = f"VMACTOR_CROSVM names {escape(named)}, which cannot be run" if named else "no crosvm in PATH"
        return Crosvm(False, what, advice)
    program = _ask(Path(found).absolute(), "version", timeout, advice)
    known = Crosvm(program.usable, program.found, program.advice, program.path, program.version)
    if not known.usable:
        return known
    options = _listed(Path(found), ["run", "--help"], _OPTION, timeout)
    commands = _listed(Path(found), ["--help"], _COMMAND, timeout)
    if not options or not commands:
        return replace(known, usable=False, found=f"{known.found} does not list its options", advice=advice)
    return replace(known, options=options, commands=commands)


# How argh, crosvm's command line reader, prints help: each entry at two columns, its text further right.
_OPTION: Final = re.compile(r"^  (?:-\w, )?--([a-z0-9][a-z0-9-]*)(?= |$)", re.MULTILINE)
_COMMAND: Final = re.compile(r"^  ([a-z][a-z0-9_]*)(?= |$)", re.MULTILINE)


def _listed(path: Path, arguments: list[str], entry: re.Pattern[str], timeout: float) -> frozenset[str]:
    """The names in a help text; none if it does not come, in time and with status 0."""
    try:
        code, data = output_of([os.fspath(path), *arguments], timeout, _HELP_LIMIT)
    except OSError:
        return frozenset()
    return frozenset(entry.findall(data.decode(errors="replace"))) if code == 0 else frozenset()


def _simulated(environ: Mapping[str, str], path: str, checkouts: Iterable[Path]) -> Program:
    # Not asked for its version: it is built from the source beside this file, and few hosts ever run it.
    named = environ.get("VMACTOR_SIMULATED_VMM")
    advice = (
        f"run 'make setup' in the source checkout; or, with a C compiler (Debian: gcc and libc6-dev), "
        f"'cc -O2 -static -o {SIMULATED_NAME} {escape(str(SIMULATED_SOURCE))}', and put it in PATH or name "
        "it in VMACTOR_SIMULATED_VMM"
    )
    if named:
        found = shutil.which(named, path="")
        what = f"VMACTOR_SIMULATED_VMM names {escape(named)}, which cannot be run"
    else:
        built = (shutil.which(checkout / "build/host/bin" / SIMULATED_NAME) for checkout in checkouts)
        found = shutil.which(SIMULATED_NAME, path=path) or next(filter(None, built), None)
        what = f"no {SIMULATED_NAME} in PATH or build/host"
    if found is None:
        return Program(False, what, advice)
    absolute = Path(found).absolute()
    return Program(True, escape(str(absolute)), "", absolute)


def _numbers(version: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (version or "0").split("."))


def _ask(path: Path, argument: str, timeout: float, advice: str) -> Program:
    """Run ``path argument`` and read a version off what it prints."""
    shown = escape(str(path))
    try:
        code, data = output_of([os.fspath(path), argument], timeout)
    except OSError as error:
        return Program(False, f"{shown} cannot be run: {error.strerror}", advice, path)
    output = data.decode(errors="replace")
    if code is None:
        return Program(False, f"{shown} did not tell its version within {timeout:g} s", advice, path)
    if code != 0:
        said = escape(output.strip(), limit=200)
        return Program(False, f"{shown} {argument} failed (status {code}): {said}", advice, path)
    found = re.search(r"\d{1,6}\.\d{1,6}(\.\d{1,6})?", output)
    version = found.group() if found else None
    return Program(True, f"{shown} {version or '(version unknown)'}", "", path, version)


def output_of(args: list[str], timeout: float, limit: int = _OUTPUT_LIMIT) -> tuple[int | None, bytes]:
    """Run a command for its first words; status None if it was not done in time. Leaves nothing running.

    Not ``subprocess.run``: that waits without a deadline for what a killed wrapper script started, and keeps
    all that is printed.
    """
    end = time.monotonic() + timeout
    child = subprocess.Popen(
        args,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    data, code, ended = b"", None, False
    assert child.stdout is not None  # noqa: S101 - asked for above
    with child.stdout as pipe:
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        while not ended and len(data) < limit and poller.poll(max(end - time.monotonic(), 0) * 1000):
            chunk = os.read(pipe.fileno(), limit)
            data += chunk
            ended = not chunk
    if ended:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(max(end - time.monotonic(), 0))
    if code is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        with suppress(subprocess.TimeoutExpired):
            child.wait(1)
    return code, data
