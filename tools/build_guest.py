#!/usr/bin/env python3
"""Build the small Linux guests that the demo and the tests boot: ``build/guest/``.

Makes ``vmlinux`` (the ELF kernel inside Debian's cloud kernel: entered directly, nothing to unpack at boot),
``initrd.cpio`` with the C agent as first process and ``python.cpio`` with Python beside it, and a
configuration for each: ``vm.json`` and ``python.json``. Debian's packages are unpacked, never installed.
Needs no root. Does nothing when no input has changed; ``make clean`` also forgets the downloaded packages.
"""

import argparse
import bz2
import fcntl
import gzip
import hashlib
import json
import lzma
import os
import platform
import py_compile
import re
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
AGENT: Final = ROOT / "guest" / "agent.c"
PYTHON_GUEST: Final = ROOT / "vmactor" / "guest.py"
BINDER_CLIENT: Final = tuple(
    ROOT / "vmactor" / "binder" / f"{name}.py" for name in ("__init__", "parcel", "wire", "client")
)

KERNEL: Final = "linux-image-cloud-amd64"
MODULES: Final = (
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "virtio_console",
    "virtio_balloon",
    "virtio_blk",
    "pvpanic-pci",
    "pvpanic-mmio",
    "button",
    "evdev",
)
NETWORK_MODULES: Final = ("virtio_net",)
"""Loaded by the agent where the kernel parameters have ``ip=``."""
PYTHON_PACKAGES: Final = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libexpat1",
    "zlib1g",
)
PYTHON_MODULES: Final = (
    "argparse",
    "encodings.utf_16_le",
    "enum",
    "json",
    "signal",
    "socket",
    "struct",
    "subprocess",
    "threading",
    "traceback",
    "typing",
)
"""What a program in a guest may want, also when only a branch of it that we do not see imports it."""

PARAMS: Final = (
    "console=ttyS0 quiet panic=-1 cryptomgr.notests mitigations=off audit=0 apparmor=0 lsm= init_on_alloc=0 "
    "rcupdate.rcu_expedited=1 noreplace-smp nokaslr"
)
"""For quick boots of a throw-away guest; guest/README.md says what each gives up."""


class BuildError(Exception):
    """The guest could not be built; the message says what to do."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"guest: {text}", flush=True)


def run(*args: str | Path, cwd: Path | None = None, hint: str) -> str:
    """Run a program and return its output.

    Raises:
        BuildError: It is missing or failed; the message ends with its last words and the hint.
    """
    try:
        done = subprocess.run(
            args, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise BuildError(f"{args[0]} is not installed; {hint}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, args))} failed; {hint}\n{done.stderr.strip()[-2000:]}")
    return done.stdout


# -- Debian packages -------------------------------------------------------------------------------

APT_HINT: Final = "check the network and apt's sources, or run `apt-get update` as root, then try again"


def kernel_package() -> str:
    """The package that the cloud kernel's meta package stands for, with its version in its name."""
    for attempt in range(2):
        done = subprocess.run(["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=False)
        if found := re.search(r"Depends: (linux-image-\S+)", done.stdout):
            return found[1]
        if attempt == 0 and os.geteuid() == 0:
            run("apt-get", "-qq", "update", hint=APT_HINT)
    raise BuildError(f"apt knows no package {KERNEL}; {APT_HINT}")


def download(package: str, cache: Path) -> Path:
    """Return the package's file in the cache, downloading it where it is not there yet."""
    cache.mkdir(parents=True, exist_ok=True)
    if found := sorted(cache.glob(f"{package}_*.deb")):
        return found[-1]
    with tempfile.TemporaryDirectory(dir=cache) as name:
        partial = Path(name)
        partial.chmod(0o755)
        command = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package)
        try:
            run(*command, cwd=partial, hint=APT_HINT)
        except BuildError:  # lists that are older than the archive name files that are gone
            if os.geteuid() != 0:
                raise
            run("apt-get", "-qq", "update", hint=APT_HINT)
            run(*command, cwd=partial, hint=APT_HINT)
        (file,) = partial.glob("*.deb")
        return file.rename(cache / file.name)


def unpack(package: str, cache: Path, target: Path) -> None:
    """Unpack a package's files below a directory."""
    run("dpkg", "-x", download(package, cache), target, hint="this script needs a Debian system")


# -- Kernel ----------------------------------------------------------------------------------------


def elf_kernel(image: bytes) -> bytes:
    """Take the ELF kernel out of a bzImage.

    Offsets are those of the x86 boot protocol's setup header. All compressors but gzip get the unpacked size
    appended by the kernel's build; their tools must not see it.

    Raises:
        BuildError: Not a bzImage, or compressed in an unknown way.
    """
    if image[0x202:0x206] != b"HdrS":
        raise BuildError("the kernel is not an x86 bzImage; report this as a bug")
    setup = (image[0x1F1] or 4) + 1
    offset, length = struct.unpack_from("<II", image, 0x248)
    payload = image[setup * 512 + offset : setup * 512 + offset + length]
    if payload.startswith(b"\x1f\x8b"):
        kernel = gzip.decompress(payload)
    elif payload.startswith(b"\xfd7zXZ\0"):
        kernel = lzma.decompress(payload[:-4])
    elif payload.startswith(b"BZh"):
        kernel = bz2.decompress(payload[:-4])
    elif payload.startswith((b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd")):
        tool = "lz4" if payload[0] == 0x02 else "zstd"
        try:
            kernel = subprocess.run([tool, "-dc"], input=payload[:-4], capture_output=True, check=True).stdout
        except FileNotFoundError:
            raise BuildError(
                f"{tool} is not installed; run `make setup` or `apt-get install {tool}`"
            ) from None
    else:
        raise BuildError(f"unknown compression of the kernel ({payload[:6].hex()}); report this as a bug")
    if not kernel.startswith(b"\x7fELF"):
        raise BuildError("the unpacked kernel is not an ELF file; report this as a bug")
    return kernel


def module_order(directory: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the module files in an order in which they can be loaded, with all that they depend on.

    The dependencies stand in the modules themselves (``modules.dep`` is made when a kernel is installed).

    Raises:
        BuildError: The kernel has no such module.
    """
    files = {path.stem.replace("-", "_"): path for path in directory.rglob("*.ko")}
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None:
            raise BuildError(f"the kernel package has no module {name}; report this as a bug")
        if path in ordered:
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in found[1].decode().split(",") if found and found[1] else ():
            add(needed)
        ordered.append(path)

    for name in wanted:
        add(name)
    return ordered


# -- Initial RAM disk ------------------------------------------------------------------------------


class Archive:
    """A cpio archive in the ``newc`` form, with device nodes and without needing root.

    Every number that could differ between two builds (inode, owner, time) is fixed.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        path = name.encode() + b"\0"
        number = len(self._names) + 1
        numbers = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in numbers) + path
        self._parts += [header, bytes(-len(header) % 4), data, bytes(-len(data) % 4)]
        self._names.add(name)

    def directory(self, name: str) -> None:
        """Add a directory and those above it, where they are not there yet."""
        parent, _, _ = name.rpartition("/")
        if parent:
            self.directory(parent)
        if name not in self._names:
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a file, unless one of this name is there."""
        parent, _, _ = name.rpartition("/")
        if parent:
            self.directory(parent)
        if name not in self._names:
            self._entry(name, stat.S_IFREG | mode, data)

    def console(self) -> None:
        """Add ``/dev/console``: the kernel opens it before the first process can mount anything."""
        self.directory("dev")
        self._entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))

    def to_bytes(self) -> bytes:
        """The finished archive; no entry can be added afterwards."""
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)


def add_base(
    archive: Archive,
    agent: bytes,
    modules: Iterable[tuple[str, bytes]],
    network: Iterable[tuple[str, bytes]] = (),
) -> None:
    """Add what both guests have: the agent and the modules in loading order, those for networks apart."""
    for name in ("proc", "sys", "tmp"):
        archive.directory(name)
    archive.console()
    archive.file("init", agent, 0o755)
    for listed, files in (("modules", modules), ("network-modules", network)):
        loading = []
        for name, data in files:
            archive.file(f"lib/modules/{name}", data)
            loading.append(f"/lib/modules/{name}\n")
        archive.file(listed, "".join(loading).encode())


# -- Python ----------------------------------------------------------------------------------------


def needed_libraries(binary: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name in the guest, file) for a program's shared libraries, and theirs, from an unpacked root."""
    places = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
    queue, seen = [binary], {"ld-linux-x86-64.so.2"}
    while queue:
        headers = run("objdump", "-p", queue.pop(), hint="run `make setup` or `apt-get install binutils`")
        for name in re.findall(r"NEEDED\s+(\S+)", headers):
            if name in seen:
                continue
            seen.add(name)
            candidates = [root / place / name for place in places]
            file = next((path for path in candidates if path.exists()), None)
            if file is None:
                raise BuildError(
                    f"{binary.name} needs {name}, which is in none of {', '.join(PYTHON_PACKAGES)}"
                )
            yield f"lib/x86_64-linux-gnu/{name}", file
            queue.append(file)
    yield "lib64/ld-linux-x86-64.so.2", root / places[0] / "ld-linux-x86-64.so.2"


def needed_modules(interpreter: Path, programs: Iterable[Path]) -> list[Path]:
    """Return the library's files that Python's own start and the programs' imports load.

    Asked of the unpacked interpreter: reading the sources instead would find half of the standard library.
    """
    names = [*PYTHON_MODULES, *(program.stem for program in programs)]
    script = "import sys\n" + "".join(f"sys.path.append({str(path.parent)!r})\n" for path in programs)
    script += f"import {', '.join(names)}\n"
    script += (
        "print(*(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)), sep='\\n')"
    )
    listed = run(interpreter, "-S", "-E", "-c", script, hint="see the error above")
    return sorted(path for path in map(Path, listed.splitlines()) if path not in programs)


def add_compiled(archive: Archive, name: str, source: Path) -> None:
    """Add a module's byte code, or else the guest compiles it at every start."""
    if sys.version_info[:2] != (3, 11):  # only this very version can make what Debian's Python reads
        return
    with tempfile.TemporaryDirectory() as directory:
        compiled = Path(directory, "compiled.pyc")
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(compiled), f"/{name}", doraise=True, invalidation_mode=unchecked)
        parent, _, stem = name.removesuffix(".py").rpartition("/")
        archive.file(f"{parent}/__pycache__/{stem}.cpython-311.pyc", compiled.read_bytes())


def add_python(archive: Archive, root: Path) -> None:
    """Add Debian's Python, the needed part of its library, and vmactor's guest module."""
    interpreter = root / "usr/bin/python3.11"
    programs = [PYTHON_GUEST] if PYTHON_GUEST.exists() else []
    archive.file("usr/bin/python3", interpreter.read_bytes(), 0o755)
    binaries = [interpreter]
    for path in needed_modules(interpreter, programs):
        name = str(path.relative_to(root))
        archive.file(name, path.read_bytes())
        if path.suffix == ".so":
            binaries.append(path)
        else:
            add_compiled(archive, name, path)
    for binary in binaries:
        for name, file in needed_libraries(binary, root):
            archive.file(name, file.read_bytes(), 0o755)
    for program in programs:
        archive.file("vmactor_guest.py", program.read_bytes())
    for path in BINDER_CLIENT:
        archive.file(f"binder/{path.name}", path.read_bytes())


# -- All together ----------------------------------------------------------------------------------


def fingerprint() -> str:
    """A hash of all that decides the result, short of new versions in Debian's archive."""
    digest = hashlib.sha256()
    for path in (Path(__file__), AGENT, PYTHON_GUEST, *BINDER_CLIENT):
        data = path.read_bytes() if path.exists() else b""
        digest.update(struct.pack("<Q", len(data)) + data)
    return digest.hexdigest()


def configuration(name: str, initrd: str, memory_mib: int) -> str:
    """A configuration in the reference's VmConfig form; paths are relative to its file."""
    words = {
        "name": name,
        "kernel": "vmlinux",
        "initrd": initrd,
        "params": PARAMS,
        "memory_mib": memory_mib,
        "platform_version": "~1.0",
    }
    return json.dumps(words, indent=2) + "\n"


def build(target: Path, cache: Path) -> None:
    """Build everything into an empty directory."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        package = kernel_package()
        say(f"kernel {package.removeprefix('linux-image-')}")
        unpack(package, cache, work / "kernel")
        (image,) = (work / "kernel/boot").glob("vmlinuz-*")
        (target / "vmlinux").write_bytes(elf_kernel(image.read_bytes()))

        always = module_order(work / "kernel/lib/modules", MODULES)
        ordered = module_order(work / "kernel/lib/modules", (*MODULES, *NETWORK_MODULES))
        modules: list[tuple[str, bytes]] = []
        network: list[tuple[str, bytes]] = []
        for path in ordered:
            run("strip", "--strip-debug", path, hint="run `make setup` or `apt-get install binutils`")
            (modules if path in always else network).append((path.name, path.read_bytes()))
        say(f"{len(ordered)} modules and the agent")
        flags = ("-static", "-Os", "-s", "-std=gnu17", "-Wall", "-Wextra", "-Werror")
        hint = "run `make setup` or `apt-get install gcc libc6-dev`"
        run(os.environ.get("CC", "gcc"), *flags, "-o", work / "agent", AGENT, hint=hint)
        agent = (work / "agent").read_bytes()

        archive = Archive()
        add_base(archive, agent, modules, network)
        (target / "initrd.cpio").write_bytes(archive.to_bytes())
        (target / "vm.json").write_text(configuration("demo", "initrd.cpio", 96))

        say("Python for the second guest")
        for package in PYTHON_PACKAGES:
            unpack(package, cache, work / "python")
        archive = Archive()
        add_base(archive, agent, modules, network)
        add_python(archive, work / "python")
        (target / "python.cpio").write_bytes(archive.to_bytes())
        (target / "python.json").write_text(configuration("python", "python.cpio", 192))


def main() -> int:
    """Build the guests where an input has changed."""
    parser = argparse.ArgumentParser(description="Build the guests that the demo and the tests boot.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "guest", help="where to (default: build/guest)"
    )
    out: Path = parser.parse_args().out.absolute()
    if platform.machine() != "x86_64":
        print(
            "guest: only x86-64 guests can be built so far; bring your own kernel and initrd", file=sys.stderr
        )
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = out / "stamp"
        if stamp.exists() and stamp.read_text() == fingerprint():
            say("up to date")
            return 0
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
            new = Path(name) / "new"
            new.mkdir()
            before = fingerprint()
            try:
                build(new, out.parent / "packages")
            except BuildError as error:
                print(f"guest: {error}", file=sys.stderr)
                return 1
            (new / "stamp").write_text(before)
            if out.exists():
                out.rename(Path(name) / "old")
            new.rename(out)
    sizes = ", ".join(
        f"{path.name} {path.stat().st_size / 1e6:.1f} MB"
        for path in sorted(out.iterdir())
        if path.stat().st_size > 99999
    )
    say(f"{os.path.relpath(out)}: {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
