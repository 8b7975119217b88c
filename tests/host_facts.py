"""Made-up hosts for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from vmactor.host import Finding, HostFacts, Program

MISSING = Finding(False, "none here", "get one")
THERE = Finding(True, "there it is")


def program(name: str, version: str) -> Program:
    path = Path("/usr/bin") / name
    return Program(True, f"{path} {version}", "", path, version)


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
    crosvm=program("crosvm", "0.1.0"),
)
"""A host that has all there is."""


def facts(**changes: Any) -> HostFacts:
    """``FULL`` with changes."""
    return replace(FULL, **changes)


def absent(name: str) -> Program:
    return Program(False, f"no {name} in PATH", f"install {name}")
