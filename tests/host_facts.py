"""Made-up hosts for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from vmactor.host import Crosvm, Finding, HostFacts, Program

MISSING = Finding(False, "none here", "get one")
THERE = Finding(True, "there it is")


def program(name: str, version: str) -> Program:
    path = Path("/usr/bin") / name
    return Program(True, f"{path} {version}", "", path, version)


_EVERY_BUILD = {
    *("bios", "cid", "block", "cpus", "disable-sandbox", "disk", "initrd", "mem", "no-balloon", "no-usb"),
    *("balloon-page-reporting", "params", "protected-vm", "rwdisk", "serial", "socket", "vhost-vsock-fd"),
}
OPTIONS_2023_02 = frozenset(_EVERY_BUILD | {"swiotlb", "vhost-user-vsock", "vhost-user-gpu", "cfg"})
"""Of crosvm in February 2023, what matters to us."""
HEAD_OPTIONS = frozenset(_EVERY_BUILD | {"vsock", "vhost-user", "name", "suspended"})
"""The same in August 2026, on x86_64."""
ARM_OPTIONS = HEAD_OPTIONS | {"swiotlb"}
"""The same on aarch64."""


def crosvm(options: frozenset[str], *commands: str) -> Crosvm:
    path = Path("/usr/bin/crosvm")
    return Crosvm(True, f"{path} 0.1.0", "", path, "0.1.0", options, frozenset(commands))


def no_crosvm() -> Crosvm:
    return Crosvm(False, "no crosvm in PATH", "build crosvm")


FULL = HostFacts(
    arch="x86_64",
    cpus=6,
    kvm=THERE,
    nested=False,
    vhost_vsock=THERE,
    af_vsock=THERE,
    qemu=program("qemu-system-x86_64", "7.2.22"),
    qboot=THERE,
    vhost_device_vsock=program("vhost-device-vsock", "0.3.0"),
    crosvm=crosvm(HEAD_OPTIONS),
    simulated=Program(True, "/usr/bin/vmactor-simulated-vmm", "", Path("/usr/bin/vmactor-simulated-vmm")),
)
"""A host that has all there is."""


def facts(**changes: Any) -> HostFacts:
    """``FULL`` with changes."""
    return replace(FULL, **changes)


def absent(name: str) -> Program:
    return Program(False, f"no {name} in PATH", f"install {name}")
