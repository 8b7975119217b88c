#!/usr/bin/env python3
"""The kernel lab: run the tests marked ``kernel`` where KVM, vhost-vsock and AF_VSOCK are real.

Machines that build vmactor need have none of the three. A guest can have them all: QEMU emulates a processor
with hardware virtualization, and Debian's cloud kernel brings the modules. This program builds such a guest
(once; again when an input changes), boots it with vmactor itself, puts the project into it, runs one pytest
process there, shows its output as it comes and ends with its exit status.

Debian's packages are downloaded from where apt gets its own and unpacked, never installed; no root is needed.
``docs/testing.md`` says what the lab is for.
"""

import argparse
import compileall
import fcntl
import hashlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Final

import anyio

import tools.build_guest as guest
from vmactor import (
    Died,
    DiskImage,
    PayloadError,
    PayloadFinished,
    RawConfig,
    VirtualizationService,
    VmactorError,
    load_config,
)

ROOT: Final = guest.ROOT
LAB: Final = ROOT / "build" / "lab"
PACKAGES: Final = (
    "python3.11-minimal",
    "libpython3.11-stdlib",
    "qemu-system-x86",
    "busybox-static",
    "util-linux",  # setpriv, for VMs of other users
)
MODULES: Final = ("kvm_amd", "kvm_intel", "vhost_vsock", "vsock_loopback")
"""Beside those of every guest. Which of the two KVM modules loads is for the processor to say."""
APPLETS: Final = ("cat", "sh", "stty")
TESTING: Final = ("pytest", "pytest-timeout")
"""What of the development tools the tests in the lab need."""
UNUSED: Final = (
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/iso-codes",
    "usr/share/alsa",
)
PROJECT: Final = ("vmactor", "tests", "tools", "guest", "pyproject.toml", "Makefile", "PROMISES.md")
GUEST_FILES: Final = ("vmlinux", "initrd.cpio", "vm.json")
MEMORY_MIB: Final = 3072
"""On one processor: with two, each on a thread of its own, a guest in the guest was seen to lock one up."""
BOOT_SECONDS: Final = 120.0
CROSVM: Final = "VMACTOR_CROSVM"

INIT: Final = """\
#!/busybox sh
# Runs in the initial RAM disk, started by the agent: sets the lab's root up and runs the tests in it.
b=/busybox
for module in $($b cat /lab-modules); do $b insmod $module 2>/dev/null; done
$b mkdir -p /root
$b mount -t ext4 -o ro /dev/vda /root || exit 1
$b mount -t proc proc /root/proc
$b mount -t sysfs sys /root/sys
$b mount -t devtmpfs dev /root/dev
$b mkdir -p /root/dev/pts /root/dev/shm
$b mount -t devpts pts /root/dev/pts
for place in dev/shm project run tmp; do $b mount -t tmpfs -o mode=1777 tmpfs /root/$place; done
$b chmod 755 /root/project /root/run
$b tar -C /root/project -xf /dev/vdb || exit 1
$b ip link set lo up
. /root/project/lab-terminal
exec $b chroot /root /project/lab-run
"""
RUN: Final = """\
#!/bin/sh
# Runs pytest with the words in lab-arguments; what it writes goes out by the log's port.
cd /project
export HOME=/tmp PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
export PYTHONPATH=/project:/opt/python PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 VMACTOR_KERNEL_LAB=1
[ ! -e crosvm ] || export VMACTOR_CROSVM=/project/crosvm LD_LIBRARY_PATH=/project/lib
exec 3<> /dev/hvc2  # whose settings last as long as somebody has it open
stty raw -echo <&3
if [ "$COLUMNS" ]; then  # there is a terminal
    pytest='python3.11 -m pytest @lab-arguments > /dev/hvc2 2>&1'
else
    pytest='set -o pipefail; python3.11 -m pytest @lab-arguments 2>&1 | cat > /dev/hvc2'
fi
exec python3.11 vmactor/guest.py run -- sh -c "$pytest"
"""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"lab: {text}", flush=True)


# -- Building --------------------------------------------------------------------------------------


def fingerprint() -> str:
    """A hash of all that decides the image, short of new versions in Debian's archive."""
    digest = hashlib.sha256()
    for path in (Path(__file__), ROOT / "tools/build_guest.py", guest.AGENT, ROOT / "constraints.txt"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update("\0".join(requirements()).encode())
    return digest.hexdigest()


def requirements() -> list[str]:
    """What pip installs in the lab: the package's own requirements and what its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return sorted({*project["dependencies"], *extras["trio"], *extras["uvloop"], *TESTING})


def download_with_dependencies(packages: Sequence[str], cache: Path) -> list[Path]:
    """Return the files of packages and of all that they depend on, downloading those that are missing."""
    (cache / "archives/partial").mkdir(parents=True, exist_ok=True)
    nothing = cache / "status"
    nothing.write_text("")  # for apt, nothing is installed: so it downloads everything
    options = (
        *("-o", f"Dir::State::status={nothing}", "-o", f"Dir::Cache={cache}"),
        *("-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=true"),
    )
    install = ("apt-get", "-qq", "-y", *options, "install", "--no-install-recommends", *packages)
    try:
        guest.run(*install, "--download-only", hint=guest.APT_HINT)
    except guest.BuildError:  # lists that are older than the archive name files that are gone
        if os.geteuid() != 0:
            raise
        guest.run("apt-get", "-qq", "update", hint=guest.APT_HINT)
        guest.run(*install, "--download-only", hint=guest.APT_HINT)
    names = guest.run(*install, "--print-uris", hint=guest.APT_HINT).splitlines()
    assert not names, "apt would still download something"
    guest.run("apt-get", "-qq", *options, "autoclean", hint=guest.APT_HINT)  # versions of earlier builds
    return sorted((cache / "archives").glob("*.deb"))


def unpack_merged(package: Path, root: Path) -> None:
    """Unpack a package where ``/bin`` and the like are symbolic links, which ``dpkg -x`` would replace."""
    unpack = 'dpkg-deb --fsys-tarfile "$0" | tar -x --keep-directory-symlink --no-same-owner -C "$1"'
    hint = "is there room, and is this a Debian system? `make clean` forgets damaged downloads"
    guest.run("bash", "-o", "pipefail", "-c", unpack, package, root, hint=hint)


def build_root(root: Path, packages: Sequence[Path]) -> None:
    """Unpack Debian's packages into a root file system, and pip's beside them."""
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        unpack_merged(package, root)
    for name in UNUSED:
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("dev", "proc", "sys", "tmp", "run", "project", "etc", "opt/python"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for applet in APPLETS:
        if not (place := root / "usr/bin" / applet).exists():
            place.symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/tmp:/bin/sh\nnobody:x:65534:65534::/tmp:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n")
    guest.run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--target", root / "opt/python", "-c", ROOT / "constraints.txt"),
        *requirements(),
        hint="check the network and pip's settings, then try again",
    )


def build_initrd(initrd: bytes, busybox: bytes, modules: Sequence[Path]) -> bytes:
    """The test guest's initial RAM disk with the lab's start in a second archive behind it."""
    archive = guest.Archive()
    archive.file("busybox", busybox, 0o755)
    archive.file("lab-init", INIT.encode(), 0o755)
    for path in modules:
        archive.file(f"lib/modules/{path.name}", path.read_bytes())
    archive.file("lab-modules", "".join(f"/lib/modules/{path.name}\n" for path in modules).encode())
    return initrd + bytes(-len(initrd) % 4) + archive.to_bytes()


def build(target: Path, cache: Path) -> None:
    """Build the lab's image and initial RAM disk into an empty directory."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        say("Debian packages")
        packages = download_with_dependencies(PACKAGES, cache / "lab")
        say(f"root file system of {len(packages)} Debian packages, and Python's")
        build_root(work / "root", packages)
        guest.unpack(guest.kernel_package(), cache, work / "kernel")
        have = {path.name for path in guest.module_order(work / "kernel/lib/modules", guest.MODULES)}
        ordered = guest.module_order(work / "kernel/lib/modules", MODULES)
        modules = [path for path in ordered if path.name not in have]
        for path in modules:
            guest.run("strip", "--strip-debug", path, hint="run `make setup`")
        busybox = (work / "root/usr/bin/busybox").read_bytes()
        initrd = (ROOT / "build/guest/initrd.cpio").read_bytes()
        (target / "lab.cpio").write_bytes(build_initrd(initrd, busybox, modules))
        libraries = sorted(path.name for path in (work / "root/usr/lib/x86_64-linux-gnu").iterdir())
        (target / "libraries").write_text("\n".join(libraries))
        say("file system image")
        used = int(guest.run("du", "-sm", work / "root", hint="is coreutils installed?").split()[0])
        image, size = target / "root.ext4", f"{used + used // 4 + 64}M"
        options = ("-q", "-t", "ext4", "-O", "^has_journal", "-m", "0")
        hint = "install e2fsprogs, or make room"
        guest.run("mke2fs", *options, "-d", work / "root", image, size, hint=hint)


def ensure_built() -> None:
    """Build what is missing or old.

    Raises:
        guest.BuildError: With the reason and what to do.
    """
    LAB.parent.mkdir(exist_ok=True)
    with (LAB.parent / ".lab.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another build of it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, wanted = LAB / "stamp", fingerprint()
        if stamp.exists() and stamp.read_text() == wanted:
            return
        for killed in LAB.parent.glob(".lab-*"):
            shutil.rmtree(killed)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=LAB.parent, prefix=".lab-") as name:
            new = Path(name) / "new"
            new.mkdir()
            build(new, LAB.parent / "packages")
            (new / "stamp").write_text(wanted)
            shutil.rmtree(LAB, ignore_errors=True)
            new.rename(LAB)
        say(f"built in {time.monotonic() - began:.0f} s")


# -- Running ---------------------------------------------------------------------------------------


def project_files() -> Iterator[tuple[Path, str]]:
    """Yield (file, name in the lab) of what the tests need, besides the packages.

    Byte code goes along, where it is of the lab's Python: compiling takes that twenty times as long as us.
    """
    compileall.compile_dir(ROOT / "vmactor", quiet=2)
    for name in PROJECT:
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and (file.parent.name != "__pycache__" or ".cpython-311" in file.name):
                yield file, str(file.relative_to(ROOT))
    for name in GUEST_FILES:
        yield ROOT / "build/guest" / name, f"build/guest/{name}"


def crosvm_files(named: Path, libraries: Collection[str]) -> Iterator[tuple[Path, str]]:
    """Yield (file, name in the lab) of crosvm and of the shared libraries that the lab lacks.

    Args:
        named: The executable, or a folder in which it is.
        libraries: Names of those that the lab has.

    Raises:
        guest.BuildError: It cannot be run here, either.
    """
    program = named / "crosvm" if named.is_dir() else named
    hint = f"{CROSVM} has to name a crosvm for this machine, or a folder with it"
    if not os.access(program, os.X_OK):
        raise guest.BuildError(f"{program} cannot be run; {hint}")
    yield program, "crosvm"
    # It fails for what is linked with nothing.
    found = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    for line in found.stdout.splitlines():
        name, arrow, place = line.strip().partition(" => ")
        if not arrow or name in libraries:
            continue
        if place == "not found":
            raise guest.BuildError(f"{program} needs {name}, which is not installed here")
        yield Path(place.rpartition(" (")[0]), f"lib/{name}"


def pack_project(disk: IO[bytes], arguments: Sequence[str], crosvm: Path | None) -> None:
    """Write the archive that the lab unpacks: the project as it is now, and what to do."""
    files = list(project_files())
    if crosvm is not None:
        files += crosvm_files(crosvm, frozenset((LAB / "libraries").read_text().splitlines()))
    with tarfile.open(fileobj=disk, mode="w") as archive:
        for file, name in files:
            archive.add(os.path.realpath(file), name)
        size = shutil.get_terminal_size()
        term = shlex.quote(os.environ.get("TERM", ""))
        shown = f"export COLUMNS={size.columns} LINES={size.lines} TERM={term}\n"
        own = {
            "lab-arguments": "".join(f"{word}\n" for word in arguments),
            "lab-terminal": shown if sys.stdout.isatty() else "",
            "lab-run": RUN,
        }
        for name, text in own.items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = 0o755, len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    disk.truncate(-(-disk.tell() // 4096) * 4096)  # whole sectors
    disk.flush()


async def run_lab(arguments: Sequence[str], crosvm: Path | None, timeout: float) -> int:
    """Boot the lab and run the tests; returns pytest's exit status, or 128 + N after signal N.

    Raises:
        VmactorError: The lab could not be booted.
        guest.BuildError: It ended without a word from pytest, or not in time.
    """
    with (
        load_config(ROOT / "build/guest/vm.json", name="kernel-lab") as loaded,
        (LAB / "lab.cpio").open("rb") as initrd,
        (LAB / "root.ext4").open("rb") as root,
        tempfile.TemporaryFile() as project,  # it has no name, so nothing is left of it whatever happens
        (LAB / "console.log").open("wb") as console,
    ):
        pack_project(project, arguments, crosvm)
        script = "exec /busybox sh /lab-init;poweroff"
        config = replace(
            loaded,
            initrd=initrd.fileno(),
            params=f'{loaded.params} vmactor.script="{script}"',
            disks=(DiskImage(root.fileno(), writable=False), DiskImage(project.fileno(), writable=False)),
            memory_mib=MEMORY_MIB,
        )
        return await ended_by_signals(partial(follow, config, console.fileno(), timeout))


async def ended_by_signals(work: Callable[[], Awaitable[int]]) -> int:
    """Do it, and clear up when a signal asks for the end."""
    status: int | None = None
    failure: guest.BuildError | VmactorError | None = None
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                nonlocal status
                async for number in signals:
                    say(f"ended by {number.name}")
                    status = 128 + number
                    group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                status = await work()
            except (guest.BuildError, VmactorError) as error:
                failure = error
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    assert status is not None
    return status


async def follow(config: RawConfig, console: int, timeout: float) -> int:
    """Run the lab's VM to its end."""
    status: int | None = None
    async with (
        VirtualizationService(vmm="qemu") as service,
        await service.create_vm(config, console=console, log=sys.stdout.fileno()) as vm,
    ):
        say(f"booting ({service.selection.driver.name}, {service.selection.vsock} vsock)")
        with vm.events() as events, anyio.move_on_after(timeout) as deadline:
            await vm.start()
            async for event in events:
                match event:
                    case PayloadFinished(exit_code=code):
                        status = code
                    case PayloadError(message=text):
                        raise guest.BuildError(f"the lab could not run the tests: {text}")
                    case Died() if status is None:
                        tail = "\n".join(event.console_tail.splitlines()[-20:])
                        raise guest.BuildError(
                            f"the lab ended without a result ({event.reason.name}):\n{tail}\n"
                            f"the whole console is {LAB.relative_to(ROOT) / 'console.log'}"
                        )
                    case _:
                        pass
        if deadline.cancelled_caught:
            raise guest.BuildError(f"the tests did not end in {timeout:.0f} s; --timeout gives them more")
    assert status is not None
    return status


def main() -> int:
    """Build the lab where needed and run tests in it."""
    parser = argparse.ArgumentParser(
        description="Run the tests marked 'kernel' in a guest with KVM, vhost-vsock and AF_VSOCK.",
        epilog="Other arguments go to pytest, e.g.: -k kill -x",
    )
    parser.add_argument("--build-only", action="store_true", help="build the lab, run nothing")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for all tests (1200)")
    options, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a build clears up
    crosvm = Path(os.environ[CROSVM]).absolute() if os.environ.get(CROSVM) else None
    try:
        ensure_built()
        if options.build_only:
            return 0
        began = time.monotonic()
        selected = (
            arguments
            if any(word.startswith("tests/") for word in arguments)
            else ["tests/kernel", *arguments]
        )
        colour = "yes" if sys.stdout.isatty() else "no"
        words = ["-m", "kernel", "-p", "no:cacheprovider", f"--color={colour}", *selected]
        status = anyio.run(run_lab, words, crosvm, options.timeout)
    except (guest.BuildError, VmactorError, OSError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    say(f"pytest ended with status {status} after {time.monotonic() - began:.0f} s, boot included")
    return status


if __name__ == "__main__":
    sys.exit(main())
