#!/usr/bin/env python3
"""Set up what building, testing and running vmactor needs: packages of Debian, Python and Node, helpers.

Only what is missing is installed, so a second run takes a moment. Needs nothing but Python 3.11 and, for
Debian's packages, root; without root it says what to install. All output goes to ``build/setup.log``.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Final

if sys.version_info < (3, 11):  # noqa: UP036  (whoever runs this with an older one should be told)
    sys.exit("setup: Python 3.11 or newer is needed; try `make PYTHON=python3.11 setup`")

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD: Final = ROOT / "build"
LOG: Final = BUILD / "setup.log"
VENV: Final = ROOT / ".venv"
HELPER: Final = "vhost-device-vsock"
HELPER_MINIMUM: Final = (0, 2)
HELPER_VARIABLE: Final = "VMACTOR_VHOST_DEVICE_VSOCK"
SIMULATED: Final = "vmactor-simulated-vmm"
SIMULATED_SOURCE: Final = ROOT / "vmactor/vmm/simulated.c"
SIMULATED_FLAGS: Final = ("-std=c17", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
"""Static: it starts faster, and shares all but some ten pages with its like."""
BUILD_BACKEND: Final = ("hatchling", "editables")
NODE_PACKAGES: Final = ("@msgpack/msgpack@3.1.3", "neovim@5.5.0")
"""What the example in JavaScript needs, and a client of MessagePack-RPC that others wrote, for the tests."""

PROGRAMS: Final = {
    "gcc": "gcc",
    "strip": "binutils",
    "lz4": "lz4",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "fsverity": "fsverity",
    "apksigner": "apksigner",
    "protoc": "protobuf-compiler",
    "sfdisk": "fdisk",
    "sgdisk": "gdisk",
    "mke2fs": "e2fsprogs",
    "node": "nodejs",
    "npm": "npm",
    "ip": "iproute2",
    "nft": "nftables",
    "perl": "perl",
}
FILES: Final = {
    "libc6-dev": ("/usr/lib/x86_64-linux-gnu/libc.a", "/usr/lib64/libc.a", "/usr/lib/libc.a"),
    "libdata-messagepack-perl": tuple(
        f"{place}/Data/MessagePack.pm"
        for place in ("/usr/share/perl5", *map(str, Path("/usr/lib/x86_64-linux-gnu/perl5").glob("*")))
    ),
    "libdata-messagepack-stream-perl": tuple(
        map(str, Path("/usr/lib").glob("*-linux-gnu/perl5/*/Data/MessagePack/Stream.pm"))
    ),
    "qemu-system-data": ("/usr/share/qemu/qboot.rom", "/usr/share/qemu-kvm/qboot.rom"),
}


class SetupError(Exception):
    """Something could not be set up; the message says what to do."""


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"setup: {text}", flush=True)


def run(log: IO[str], *args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> bool:
    """Run a program with its output in the log; tell whether it succeeded."""
    print(f"$ {' '.join(map(str, args))}", file=log, flush=True)
    environment = {**os.environ, **(env or {})}
    try:
        done = subprocess.run(
            args, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    except OSError as error:
        print(error, file=log, flush=True)
        return False
    return done.returncode == 0


# -- Debian packages -------------------------------------------------------------------------------


def missing_packages() -> list[str]:
    """Debian's names of what is not there, judged by the files: other distributions may have them too."""
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    missing += [
        package for package, places in FILES.items() if not any(Path(place).exists() for place in places)
    ]
    if not (VENV / "bin/python").exists():
        probe = subprocess.run(
            [sys.executable, "-c", "import ensurepip, venv"], capture_output=True, check=False
        )
        if probe.returncode:
            missing.append("python3-venv")
    return missing


def install_packages(log: IO[str]) -> None:
    """Install the Debian packages that are missing."""
    packages = missing_packages()
    if not packages:
        return
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SetupError(
            f"these Debian packages are missing; run this as root, or install them yourself:\n  {command}"
        )
    say(f"Debian packages: {' '.join(packages)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ("apt-get", "-qq", "-y", "install", "--no-install-recommends", *packages)
    if run(log, *install, env=quiet):
        return
    # The lists are missing or older than the archive.
    if not run(log, "apt-get", "-qq", "update", env=quiet) or not run(log, *install, env=quiet):
        raise SetupError(
            f"apt could not install them; check the network and apt's sources, then run:\n  {command}"
        )


# -- Python packages -------------------------------------------------------------------------------


def install_python(log: IO[str]) -> None:
    """Make ``.venv`` with vmactor (editable) and the development tools, at constraints.txt's versions."""
    python, stamp = VENV / "bin/python", VENV / "vmactor-stamp"
    inputs = (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    wanted = hashlib.sha256(inputs + str(ROOT).encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    say("Python packages into .venv")
    hint = "check the network and pip's settings, or remove .venv, then try again"
    if not python.exists() and not run(log, sys.executable, "-m", "venv", VENV):
        raise SetupError(f"could not create .venv; {hint}")
    install = (
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
    )
    # The build backend is installed first and used from here: an isolated build would take unpinned versions.
    if not run(log, *install, *BUILD_BACKEND) or not run(
        log, *install, "--no-build-isolation", "--editable", f"{ROOT}[dev]", cwd=ROOT
    ):
        raise SetupError(f"pip could not install the Python packages; {hint}")
    stamp.write_text(wanted)


# -- Node packages -----------------------------------------------------------------------------------


def install_node(log: IO[str]) -> None:
    """Install into ``build/node`` what clients in JavaScript need, for the example and the tests."""
    target = BUILD / "node"
    stamp = target / "vmactor-stamp"
    wanted = " ".join(NODE_PACKAGES)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("Node packages into build/node")
    target.mkdir(exist_ok=True)
    quiet = ("--silent", "--no-fund", "--no-audit", "--no-package-lock", "--ignore-scripts")
    if not run(log, "npm", "install", *quiet, "--prefix", target, *NODE_PACKAGES):
        raise SetupError("npm could not install the Node packages; check the network and npm's settings")
    stamp.write_text(wanted)


# -- vhost-device-vsock ----------------------------------------------------------------------------


def usable(path: Path, log: IO[str]) -> bool:
    """Whether this is a helper that runs here and is new enough."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{path}: {error}", file=log, flush=True)
        return False
    print(f"{path} --version: {done.stdout}{done.stderr}", file=log, flush=True)
    found = re.search(r"(\d+)\.(\d+)", done.stdout)
    return done.returncode == 0 and found is not None and (int(found[1]), int(found[2])) >= HELPER_MINIMUM


def main_archive() -> str | None:
    """The address of the Debian archive that this machine's apt uses; security and updates have others."""
    command = [
        "apt-get",
        "indextargets",
        "--format",
        "$(RELEASE) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError:
        return None
    for line in lines:
        release, component, address = line.split(" ", 2)
        if component == "main" and "-" not in release:
            return address
    return None


def helper_from_sid(target: Path, log: IO[str]) -> bool:
    """Unpack Debian sid's package, without installing it: the machine's own apt state is not touched."""
    address = main_archive()
    if address is None and os.geteuid() == 0:
        run(log, "apt-get", "-qq", "update")
        address = main_archive()
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if address is None or not keyring.exists():
        print("no Debian archive in apt's sources", file=log, flush=True)
        return False
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        state = Path(name)
        for directory in ("lists/partial", "cache/archives/partial", "files", "parts"):
            (state / directory).mkdir(parents=True)
        (state / "sources.list").write_text(f"deb [signed-by={keyring}] {address} sid main\n")
        options = (
            *(
                "-o",
                f"Dir::Etc::SourceList={state}/sources.list",
                "-o",
                f"Dir::Etc::SourceParts={state}/parts",
            ),
            *("-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache"),
            *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"),
            *("-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"),
        )
        if not run(log, "apt-get", "-q", *options, "update"):
            return False
        if not run(log, "apt-get", "-q", *options, "download", HELPER, cwd=state):
            return False
        for package in state.glob("*.deb"):
            if not run(log, "dpkg", "-x", package, state / "files"):
                return False
        unpacked = state / "files/usr/bin" / HELPER
        if not usable(unpacked, log):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.replace(target)
    return True


def helper_from_crates(target: Path, log: IO[str]) -> bool:
    """Compile the crate."""
    if not shutil.which("cargo"):
        print("cargo is not installed", file=log, flush=True)
        return False
    say(f"{HELPER} from the crates registry (takes some minutes)")
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        if not run(log, "cargo", "install", "--quiet", "--locked", "--root", name, HELPER):
            return False
        built = Path(name) / "bin" / HELPER
        if not usable(built, log):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(built, target)
    return True


def install_helper(log: IO[str]) -> None:
    """Get vhost-device-vsock, which QEMU needs for vsock where the kernel's vhost-vsock cannot be used."""
    if os.access("/dev/vhost-vsock", os.R_OK | os.W_OK):
        return
    target = BUILD / "host/bin" / HELPER
    candidates = (os.environ.get(HELPER_VARIABLE), shutil.which(HELPER), target)
    if any(usable(Path(path), log) for path in candidates if path and Path(path).exists()):
        return
    say(f"{HELPER} into build/host")
    if helper_from_sid(target, log) or helper_from_crates(target, log):
        return
    minimum = ".".join(map(str, HELPER_MINIMUM))
    raise SetupError(
        f"could not get {HELPER}, and /dev/vhost-vsock is not usable here. Do one of these, then try again:\n"
        "  - load the kernel's module (`modprobe vhost_vsock`) and let this user read and write that device\n"
        f"  - install {HELPER} {minimum} or newer (Debian's package, or `cargo install {HELPER}`) onto PATH\n"
        f"  - set {HELPER_VARIABLE} to the path of its executable"
    )


# -- The simulated VMM -----------------------------------------------------------------------------


def build_simulated(log: IO[str]) -> None:
    """Compile the VMM without a guest, if its source or the way to compile it has changed."""
    target = BUILD / "host/bin" / SIMULATED
    stamp = target.with_suffix(".stamp")
    compiler = os.environ.get("CC", "gcc")
    command = (compiler, *SIMULATED_FLAGS)
    wanted = hashlib.sha256(SIMULATED_SOURCE.read_bytes() + repr(command).encode()).hexdigest()
    if target.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")  # renamed at the end: the old one may be running
    if not run(log, *command, "-o", fresh, SIMULATED_SOURCE):
        raise SetupError(f"could not compile {SIMULATED}; try `apt-get install gcc libc6-dev` as root")
    fresh.replace(target)
    stamp.write_text(wanted)


def main() -> int:
    """Set up what is missing."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / ".setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with LOG.open("w", encoding="utf-8") as log:
            try:
                install_packages(log)
                install_python(log)
                install_node(log)
                install_helper(log)
                build_simulated(log)
            except SetupError as error:
                log.flush()
                tail = LOG.read_text(errors="replace").splitlines()[-25:]
                for line in tail:
                    print(f"  | {line}", file=sys.stderr)
                print(f"setup: {error}\nsetup: the whole log is {LOG.relative_to(ROOT)}", file=sys.stderr)
                return 1
    say("ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
