#!/usr/bin/env python3
"""Build tinydroid, the guest that plays Microdroid, and the example APKs: ``build/tinydroid/``.

``apex/`` is a platform tree as ``vmactor run-app --platform`` takes it; ``example.apk``, ``changed.apk`` and
``extra.apk`` are signed with a key that is made here and thrown away. Kernel, Python and agent are those of
``tools/build_guest.py``. Does nothing when no input has changed.
"""

import argparse
import datetime
import fcntl
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a script

from tools import build_guest
from tools.build_guest import PARAMS, ROOT, Archive, BuildError, run, say

SOURCE: Final = ROOT / "guest" / "tinydroid"
MANAGER: Final = ("apk.py", "disks.py", "failures.py", "manager.py")
PROGRAMS: Final = ("empty", "hello", "mount")
MODULES: Final = ("dm-mod", "dm-crypt", "ecb", "xts")
STORE_PACKAGES: Final = ("e2fsprogs", "libext2fs2", "libcom-err2", "libblkid1", "libuuid1", "libc6")
"""For ``mke2fs``."""
START: Final = "run /usr/bin/python3 -S -E -B /tinydroid/manager.py"
VIRT: Final = Path("com.android.virt")
APEX_LIST: Final = """<?xml version="1.0" encoding="utf-8"?>
<apex-info-list>
    <apex-info moduleName="com.android.virt" modulePath="/nowhere/com.android.virt.apex" versionCode="1"
        isFactory="true" isActive="true" lastUpdateMillis="0" provideSharedApexLibs="false"/>
</apex-info-list>
"""
CLASSPATH: Final = '#!/bin/sh\n# No APEX of this platform is on a class path.\n: > "$1"\n'
SIGN_HINT: Final = "run `make setup` or `apt-get install apksigner`"


def compiled(work: Path) -> dict[str, bytes]:
    """Our C programs."""
    flags = ("-static", "-Os", "-s", "-std=gnu17", "-Wall", "-Wextra", "-Werror")
    hint = "run `make setup` or `apt-get install gcc libc6-dev`"
    for name in PROGRAMS:
        run(os.environ.get("CC", "gcc"), *flags, "-o", work / name, SOURCE / f"{name}.c", hint=hint)
    return {name: (work / name).read_bytes() for name in PROGRAMS}


# -- Initial RAM disks -----------------------------------------------------------------------------


def initrd(guest: Path, cache: Path, work: Path, mount: bytes, *, debuggable: bool) -> bytes:
    """The Python guest's archive and ours behind it: what comes later replaces what is there."""
    base = (guest / "python.cpio").read_bytes()
    archive = Archive()
    loading = []
    for path in build_guest.module_order(work / "kernel/lib/modules", (*build_guest.MODULES, *MODULES)):
        loading.append(f"/lib/modules/{path.name}\n")
        if f"lib/modules/{path.name}\0".encode() not in base:
            run("strip", "--strip-debug", path, hint="run `make setup` or `apt-get install binutils`")
            archive.file(f"lib/modules/{path.name}", path.read_bytes())
    archive.file("modules", "".join(loading).encode())
    for name in MANAGER:
        archive.file(f"tinydroid/{name}", (SOURCE / name).read_bytes())
        build_guest.add_compiled(archive, f"tinydroid/{name}", SOURCE / name)
    archive.file("tinydroid/vmactor_guest.py", build_guest.PYTHON_GUEST.read_bytes())
    build_guest.add_compiled(archive, "tinydroid/vmactor_guest.py", build_guest.PYTHON_GUEST)
    archive.file("bin/mount", mount, 0o755)
    mke2fs = work / "store/sbin/mke2fs"
    archive.file("bin/mke2fs", mke2fs.read_bytes(), 0o755)
    for name, file in build_guest.needed_libraries(mke2fs, work / "store"):
        if f"{name}\0".encode() not in base:
            archive.file(name, file.read_bytes(), 0o755)
    archive.file("etc/mke2fs.conf", (work / "store/etc/mke2fs.conf").read_bytes())
    archive.file("etc/mtab", b"")
    if debuggable:
        archive.file("debuggable", b"")
    return base + archive.to_bytes()


# -- APKs ------------------------------------------------------------------------------------------


def write_key(work: Path) -> tuple[Path, Path]:
    """A new RSA key and a certificate for it, as apksigner takes them."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmactor example, thrown away")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.DER
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (work / "key.pk8").write_bytes(secret)
    (work / "key.der").write_bytes(certificate.public_bytes(encoding))
    return work / "key.pk8", work / "key.der"


def write_apk(path: Path, files: Mapping[str, bytes]) -> None:
    """An APK that is not signed yet; programs are packed, so that unpacking is tried, too."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            kind = zipfile.ZIP_DEFLATED if name.startswith("lib/") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), data, kind)


def sign(apks: list[Path], key: tuple[Path, Path]) -> None:
    """Sign APKs in their places, with scheme v3 only."""
    for apk in apks:
        switches = [f"--v{n}-signing-enabled={str(n == 3).lower()}" for n in (1, 2, 3, 4)]
        certificate = ("--key", key[0], "--cert", key[1], "--min-sdk-version", "28")
        run("apksigner", "sign", *certificate, *switches, apk, hint=SIGN_HINT)


def vm_config(**words: object) -> bytes:
    """A payload's configuration, as it lies in an APK."""
    return json.dumps({"os": {"name": "microdroid"}, **words}, indent=2).encode()


def write_apks(target: Path, work: Path, programs: Mapping[str, bytes]) -> None:
    """All APKs: an example, the same one in a later version, one that goes with them, and the empty one."""
    task = {"type": "microdroid_launcher", "command": "hello.so"}
    example = {
        "AndroidManifest.xml": b"none is needed here",
        "assets/vm_config.json": vm_config(task=task),
        "assets/extra.json": vm_config(task=task, extra_apks=[{"path": str(target / "extra.apk")}]),
        "assets/no_task.json": vm_config(),
        "assets/greeting.txt": b"hello from the example payload\n",
        "lib/x86_64/hello.so": programs["hello"],
    }
    changed = example | {"assets/greeting.txt": b"hello from a later version\n"}
    extra = {"AndroidManifest.xml": b"", "assets/greeting.txt": b"hello from an extra APK\n"}
    empty = {"AndroidManifest.xml": b"", "lib/x86_64/MicrodroidEmptyPayloadJniLib.so": programs["empty"]}
    app = work / "EmptyPayloadApp.apk"
    apks = {
        work / "example.apk": example,
        work / "changed.apk": changed,
        work / "extra.apk": extra,
        app: empty,
    }
    for path, files in apks.items():
        write_apk(path, files)
    sign(list(apks), write_key(work))


# -- All together ----------------------------------------------------------------------------------


def fingerprint(guest: Path) -> str:
    """A hash of all that decides the result."""
    digest = sha256((guest / "stamp").read_bytes())
    for path in (Path(__file__), *sorted(SOURCE.iterdir())):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def build(guest: Path, cache: Path, new: Path, final: Path) -> None:
    """Build everything into an empty directory, which will be renamed."""
    with tempfile.TemporaryDirectory(dir=new.parent) as name:
        work = Path(name)
        build_guest.unpack(build_guest.kernel_package(), cache, work / "kernel")
        for package in STORE_PACKAGES:
            build_guest.unpack(package, cache, work / "store")
        say("tinydroid: the initial RAM disks")
        binaries = compiled(work)
        etc = new / "apex" / VIRT / "etc"
        (etc / "fs").mkdir(parents=True)
        try:
            os.link(guest / "vmlinux", etc / "fs" / "microdroid_kernel")
        except OSError:  # another file system, or one without links
            shutil.copyfile(guest / "vmlinux", etc / "fs" / "microdroid_kernel")
        for level, debuggable in ("normal", False), ("debuggable", True):
            data = initrd(guest, cache, work, binaries["mount"], debuggable=debuggable)
            (etc / f"microdroid_initrd_{level}.img").write_bytes(data)
        words = {
            "kernel": "fs/microdroid_kernel",
            "params": f'{PARAMS} loglevel=0 vmactor.script="{START}"',
            "disks": [],
            "memory_mib": 256,
            "platform_version": "~1.0",
        }
        (etc / "microdroid.json").write_text(json.dumps(words, indent=2) + "\n")
        (new / "apex" / "apex-info-list.xml").write_text(APEX_LIST)
        classpath = new / "apex" / "com.android.sdkext" / "bin" / "derive_classpath"
        classpath.parent.mkdir(parents=True)
        classpath.write_text(CLASSPATH)
        classpath.chmod(0o755)
        say("tinydroid: the APKs")
        write_apks(final, work, binaries)
        for apk in ("example.apk", "changed.apk", "extra.apk"):
            (work / apk).rename(new / apk)
        app = new / "apex" / VIRT / "app" / "EmptyPayloadApp"
        app.mkdir(parents=True)
        (work / "EmptyPayloadApp.apk").rename(app / "EmptyPayloadApp.apk")


def main() -> int:
    """Build tinydroid where an input has changed."""
    parser = argparse.ArgumentParser(description="Build the guest that plays Microdroid, and example APKs.")
    build_directory = ROOT / "build"
    parser.add_argument(
        "--guest", type=Path, default=build_directory / "guest", help="what build_guest.py made"
    )
    parser.add_argument("--out", type=Path, default=build_directory / "tinydroid", help="where to")
    args = parser.parse_args()
    out: Path = args.out.absolute()
    if not (args.guest / "stamp").exists():
        print(f"guest: there is no guest in {args.guest}: run 'make guest'", file=sys.stderr)
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, now = out / "stamp", fingerprint(args.guest)
        if stamp.exists() and stamp.read_text() == now:
            say("tinydroid: up to date")
            return 0
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
            new = Path(name) / "new"
            new.mkdir()
            try:
                build(args.guest, out.parent / "packages", new, out)
            except BuildError as error:
                print(f"guest: {error}", file=sys.stderr)
                return 1
            (new / "stamp").write_text(now)
            if out.exists():
                out.rename(Path(name) / "old")
            new.rename(out)
    say(f"{os.path.relpath(out)}: built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
