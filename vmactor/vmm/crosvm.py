"""The crosvm driver: what a build of crosvm can run, its command line, and its start.

The command line is the reference's, in the order of its table, in the spelling of the build at hand: options
came and went over the years, and crosvm ends at an option that it does not know. So nothing is passed that
the build's own help does not list, and what cannot be said to a build is refused before anything is started
(``docs/crosvm.md`` has the table).

How files get in. crosvm takes every file, pipe and socket as ``/proc/self/fd/N`` and uses a duplicate of the
very descriptor, with the rights that we opened it with; it opens no path of ours. Kernel, initrd and firmware
are opened anew first: older builds seek in them, and several VMs may have been given the same open file.
"""

from collections.abc import Iterable
from typing import Final

from vmactor.config import DiskImage, RawConfig
from vmactor.errors import UnsupportedOperationError
from vmactor.host import Crosvm
from vmactor.messages import CpuTopology
from vmactor.text import crosvm_argument
from vmactor.vmm.driver import KernelVsock, Launch
from vmactor.vmm.handover import proc_path

PLATFORM_VERSION: Final = "1.0.0"
DEFAULT_MEMORY_MIB: Final = 256
"""Memory of a guest whose configuration names none; crosvm's default, and the reference's."""
VSOCK_QUEUE_SIZE: Final = 256
"""Entries of each queue of a vhost-user vsock, as in the kernel's own. crosvm would offer 32768, which the
guest takes and vhost-device-vsock refuses: it has 1024 at most."""

_CRASH_KERNEL: Final = "crashkernel=17M"
_NO_PARTITIONS: Final = (
    "disks: crosvm is given raw images only so far, not partitions; give one raw image instead"
)


def descriptors(launch: Launch, control: int) -> tuple[int, ...]:
    """Every descriptor that crosvm must inherit, each once, in ascending order. Pure."""
    channels = launch.channels
    pipes = (channels.console, channels.failure, channels.log, channels.ramdump)
    given = {fd for fd in (*pipes, control, launch.vsock.fd) if fd is not None}
    return tuple(sorted(given.union(launch.config.fds())))


def command_line(build: Crosvm, arch: str, cpus: int, launch: Launch, control: int) -> list[str]:
    """The arguments of a build of crosvm, the executable first. Pure.

    Args:
        build: What its help says; only options in there are used.
        arch: Machine name of the host.
        cpus: Configured processors of the host.
        launch: What to run.
        control: Descriptor of a listening ``SOCK_SEQPACKET`` socket.

    Raises:
        UnsupportedOperationError: The build has no way to do it; the message names what it lacks.
    """
    config, channels = launch.config, launch.channels
    arguments = [
        str(build.path or "crosvm"),
        # --no-syslog is ours: what a guest makes crosvm say is for our drain, not for the host's log.
        *("--extended-status", "--log-level", "info,disk=warn", "--no-syslog", "run", "--disable-sandbox"),
        *_vsock(build, launch),
        *_balloon(build, config),
        *_protection(build, arch, config),
        *("--mem", str(config.memory_mib or DEFAULT_MEMORY_MIB)),
        *("--cpus", str(cpus if config.cpu_topology is CpuTopology.MATCH_HOST else 1)),
    ]
    if "no-usb" in build.options:
        arguments.append("--no-usb")
    roles = (
        (channels.console, "hardware=serial,num=1"),  # ttyS0
        (channels.failure, "hardware=serial,num=2"),  # ttyS1
        (channels.console, "hardware=virtio-console,num=1"),  # hvc0
        (channels.ramdump, "hardware=virtio-console,num=2"),  # hvc1
        (channels.log, "hardware=virtio-console,num=3"),  # hvc2
    )
    for fd, device in roles:
        kind = "type=sink" if fd is None else f"type=file,path={proc_path(fd)}"
        arguments.append(f"--serial={kind},{device}")
    if config.bootloader is not None:
        arguments += ("--bios", proc_path(config.bootloader))
    if config.initrd is not None:
        arguments += ("--initrd", proc_path(config.initrd))
    if config.params:
        arguments += ("--params", _params(config.params))
    for disk in config.disks:
        arguments += _disk(build, disk)
    if config.kernel is not None:
        arguments.append(proc_path(config.kernel))
    arguments += ("--socket", proc_path(control))
    if channels.ramdump is not None:
        arguments += ("--params", _CRASH_KERNEL)
    return arguments


def _vsock(build: Crosvm, launch: Launch) -> tuple[str, ...]:
    device = proc_path(launch.vsock.fd)
    if isinstance(launch.vsock, KernelVsock):
        if "vsock" in build.options:
            return ("--vsock", f"cid={launch.cid},device={device}")
        if {"cid", "vhost-vsock-fd"} <= build.options:
            return ("--cid", str(launch.cid), "--vhost-vsock-fd", str(launch.vsock.fd))
        raise _lacking(build, "take an open /dev/vhost-vsock (--vsock, or --cid with --vhost-vsock-fd)")
    if not takes_vhost_user(build):
        raise _lacking(build, "take a connected vhost-user vsock (--vhost-user with a descriptor)")
    return ("--vhost-user", f"type=vsock,socket={device},max-queue-size={VSOCK_QUEUE_SIZE}")


def takes_vhost_user(build: Crosvm) -> bool:
    """Whether a build takes a connected vhost-user socket.

    It learned that on 2025-02-26, which its help does not tell; but on 2025-04-02 the per-type options went.
    """
    return "vhost-user" in build.options and "vhost-user-gpu" not in build.options


def takes_vhost_vsock(build: Crosvm) -> bool:
    """Whether a build takes an open ``/dev/vhost-vsock``."""
    return "vsock" in build.options or {"cid", "vhost-vsock-fd"} <= build.options


def _balloon(build: Crosvm, config: RawConfig) -> Iterable[str]:
    # The reference goes by an Android property that tells whether a protected guest's memory can be taken
    # back at all; where there is none, it cannot. A build without the option has no balloon either.
    if config.protected_vm:
        if "no-balloon" in build.options:
            yield "--no-balloon"
    elif "balloon-page-reporting" in build.options:
        yield "--balloon-page-reporting"


def _protection(build: Crosvm, arch: str, config: RawConfig) -> Iterable[str]:
    if not config.protected_vm:
        return
    if "protected-vm" not in build.options:
        raise _lacking(build, "run protected VMs (--protected-vm)")
    yield "--protected-vm"
    # An aarch64 guest under protection exchanges everything through this buffer. Newer builds for other
    # architectures have no such option, and older ones ignored it there.
    if arch == "aarch64" and "swiotlb" in build.options:
        yield from ("--swiotlb", str(2 * (4 + len(config.disks))))


def _disk(build: Crosvm, disk: DiskImage) -> tuple[str, str]:
    if disk.image is None:
        raise UnsupportedOperationError(_NO_PARTITIONS)
    path = proc_path(disk.image)
    if "block" not in build.options:
        return ("--rwdisk" if disk.writable else "--disk", path)
    # The lock belongs to the open file, which is the caller's too: it would outlive crosvm. As in the
    # reference there is none, in builds that can leave it (since 2024-09-10; their help shows --name only).
    lock = ",lock=false" if "name" in build.options else ""
    return ("--block", f"path={path},ro={'false' if disk.writable else 'true'}{lock}")


def _params(params: str) -> str:
    # A leading blank keeps crosvm from reading a first word with a dash as an option of its own; the guest's
    # kernel passes over it.
    return crosvm_argument(f" {params}" if params.startswith("-") else params)


def _lacking(build: Crosvm, what: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{build.path or 'crosvm'} {build.version or ''} cannot {what}; use a newer build, or --vmm qemu"
    )
