"""The crosvm driver: what a build of crosvm can run, its command line, and its start.

The command line is the reference's, in the order of its table, in the spelling of the build at hand: options
came and went over the years, and crosvm ends at an option that it does not know. So nothing is passed that
the build's own help does not list, and what cannot be said to a build is refused before anything is started
(``docs/crosvm.md`` has the table).

How files get in. crosvm takes every file, pipe and socket as ``/proc/self/fd/N`` and uses a duplicate of the
very descriptor, with the rights that we opened it with; it opens no path of ours. Kernel, initrd and firmware
are opened anew first: older builds seek in them, and several VMs may have been given the same open file.
"""

import os
import re
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from vmactor.config import DiskImage, RawConfig
from vmactor.config_rules import MAX_PARAMS
from vmactor.errors import StartFailedError, UnsupportedOperationError, hint
from vmactor.host import Crosvm, HostFacts
from vmactor.images.composite import assemble, crosvm_image
from vmactor.messages import CpuTopology, ImageKind
from vmactor.text import crosvm_argument
from vmactor.vmm.crosvm_vmm import CrosvmVmm
from vmactor.vmm.driver import BOOT_SECONDS, EMULATED_BOOT_SECONDS, Footprint, KernelVsock, Launch, LeftVmm
from vmactor.vmm.handover import check_socket_path, proc_path, read_only, remove_socket, reopen

PLATFORM_VERSION: Final = "1.0.0"
DEFAULT_MEMORY_MIB: Final = 256
"""Memory of a guest whose configuration names none; crosvm's default, and the reference's."""
VSOCK_QUEUE_SIZE: Final = 256
"""Entries of each queue of a vhost-user vsock, as in the kernel's own. crosvm would offer 32768, which the
guest takes and vhost-device-vsock refuses: it has 1024 at most."""

_CRASH_KERNEL: Final = "crashkernel=17M"
_ADDED_PARAMS: Final = len(f"panic=-1   {_CRASH_KERNEL}")
"""What crosvm and this driver may put around ``params`` on the guest's command line, in bytes."""
_BACKLOG: Final = 128
"""How many requests may wait for crosvm, as with a socket that it makes itself."""
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class CrosvmDriver:
    """Runs guests under crosvm, which needs KVM.

    Attributes:
        facts: What the host can do, and the build of crosvm.
    """

    name: ClassVar[str] = "crosvm"
    facts: HostFacts

    @property
    def platform_version(self) -> str:
        """The reference's platform version."""
        return PLATFORM_VERSION

    @property
    def emulated(self) -> bool:
        """Whether guests run slowly, that is, nested."""
        return self.facts.nested

    def footprint(self, config: RawConfig) -> Footprint:
        """Its devices are threads of one process, because it has no sandbox here."""
        cpus = self.facts.cpus if config.cpu_topology is CpuTopology.MATCH_HOST else 1
        return Footprint(
            threads=12 + cpus + 2 * len(config.disks),
            descriptors=0,
            overhead=32 * _MIB,
            guest_memory=(config.memory_mib or DEFAULT_MEMORY_MIB) * _MIB,
            boot_seconds=EMULATED_BOOT_SECONDS if self.emulated else BOOT_SECONDS,
        )

    def validate(self, config: RawConfig) -> None:
        """Refuse what crosvm, this build of it, or this host cannot do.

        Raises:
            UnsupportedOperationError: Names the field and what to do.
        """
        for finding in (self.facts.crosvm, self.facts.kvm):
            if not finding.usable:
                raise UnsupportedOperationError(
                    f"crosvm cannot run guests: {finding.found}: {finding.advice}"
                )
        if config.protected_vm and self.facts.arch != "aarch64":
            raise UnsupportedOperationError(
                f"protected_vm: only aarch64 hosts can keep out of a guest's memory, and this is "
                f"{self.facts.arch}; set it to false"
            )
        validate(self.facts.crosvm, config)

    def command_line(self, launch: Launch, control: int | None = None) -> list[str]:
        """Crosvm's arguments, the executable first. Pure; see the function of this name."""
        return command_line(self.facts.crosvm, self.facts.arch, self.facts.cpus, launch, control)

    async def spawn(self, launch: Launch) -> CrosvmVmm:
        """Start crosvm; returns as soon as the process exists.

        Raises:
            StartFailedError: The process could not be made; nothing is left of it.
            UnsupportedOperationError: As ``validate`` and ``command_line``.
        """
        self.validate(launch.config)
        return start(self.facts.crosvm, self.facts.arch, self.facts.cpus, launch)

    async def adopt(self, left: LeftVmm) -> CrosvmVmm:
        """Take over a crosvm of another manager; never raises, as each request is a connection of its own."""
        return adopt(self.facts.crosvm, left)


def validate(build: Crosvm, config: RawConfig) -> None:
    """Refuse what a build of crosvm cannot do on any host. Pure.

    Raises:
        UnsupportedOperationError: Names the field and what to do.
    """
    if config.protected_vm and "protected-vm" not in build.options:
        raise _lacking(build, "run protected VMs (--protected-vm)")
    if config.network and "net" not in build.options:
        raise _lacking(build, "take an open tap (--net)")
    if config.task_profiles:
        raise UnsupportedOperationError(
            "task_profiles: they exist on Android only; remove them, and use cgroups for what they were to do"
        )
    if any(disk.partitions for disk in config.disks) and "create_composite" not in build.commands:
        # Such a build would show its guest the specification file as a small raw disk, without complaint.
        raise _lacking(build, "read disks of partitions (it was built without the feature composite-disk)")
    formats = {disk.format for disk in config.disks}
    formats |= {part.format for disk in config.disks for part in disk.partitions}
    if ImageKind.QCOW2 in formats and "create_qcow2" not in build.commands:
        raise _lacking(build, "read QCOW2 images (it was built without the feature qcow)")
    if config.params and re.search("[^ -~]", config.params):
        raise UnsupportedOperationError(
            "params: crosvm takes printable ASCII only on a guest's command line; remove the rest"
        )
    if config.params and len(config.params) + _ADDED_PARAMS > MAX_PARAMS:
        raise UnsupportedOperationError(
            f"params: crosvm adds to them, so at most {MAX_PARAMS - _ADDED_PARAMS} bytes are left, and they "
            f"have {len(config.params)}; use fewer"
        )


def start(build: Crosvm, arch: str, cpus: int, launch: Launch) -> CrosvmVmm:
    """Start a program that takes crosvm's command line.

    The listening socket for control is made and bound here, so it can be connected to from the beginning. Our
    copy goes as soon as crosvm has its own: as long as ours is open, connecting to a dead crosvm succeeds.

    Raises:
        StartFailedError: The process could not be made; nothing is left of it.
        UnsupportedOperationError: The build has no way to do it.
    """
    path = launch.directory / "control"
    check_socket_path(path)
    memory = (launch.config.memory_mib or DEFAULT_MEMORY_MIB) * _MIB
    with ExitStack() as undo, ExitStack() as stack:
        try:
            config = _own_offsets(read_only(launch.config, stack), stack)
            config, pieces = _joined(config, stack)
            launch = replace(launch, config=config)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            line = command_line(build, arch, cpus, launch, listener.fileno())
            listener.bind(os.fspath(path))
            undo.callback(remove_socket, path)
            listener.listen(_BACKLOG)
            inherited = pieces.union(descriptors(launch, listener.fileno()))
            process = launch.spawn(line, tuple(sorted(inherited)))
        except OSError as error:
            raise StartFailedError(f"cannot start crosvm: {error}{hint(error)}") from error
        undo.pop_all()
    return CrosvmVmm(process, memory=memory, socket_path=path, old_names=_old_names(build))


def adopt(build: Crosvm, left: LeftVmm) -> CrosvmVmm:
    """A crosvm of another manager, spoken to in the spelling of the build at hand."""
    memory = (left.memory_mib or DEFAULT_MEMORY_MIB) * _MIB
    return CrosvmVmm(
        left.process, memory=memory, socket_path=left.directory / "control", old_names=_old_names(build)
    )


def _old_names(build: Crosvm) -> bool:
    return "suspended" not in build.options  # an option that came two weeks after the new names


def _own_offsets(config: RawConfig, stack: ExitStack) -> RawConfig:
    def own(fd: int | None) -> int | None:
        if fd is None:
            return None
        try:
            return reopen(fd, stack)
        except PermissionError:
            return fd  # a file that was only lent to us; builds of today read it by position

    return replace(
        config, kernel=own(config.kernel), initrd=own(config.initrd), bootloader=own(config.bootloader)
    )


def _joined(config: RawConfig, stack: ExitStack) -> tuple[RawConfig, set[int]]:
    """Give each disk of partitions its specification file as image; also returns all that this names."""
    disks, pieces = [], set[int]()
    for disk in config.disks:
        if disk.partitions:
            composite = assemble(disk.partitions, stack)
            pieces.update(composite.fds())
            disks.append(replace(disk, image=crosvm_image(composite, stack), partitions=()))
        else:
            disks.append(disk)
    return replace(config, disks=tuple(disks)), pieces


def descriptors(launch: Launch, control: int | None = None) -> tuple[int, ...]:
    """Every descriptor that crosvm must inherit, each once, in ascending order. Pure."""
    channels = launch.channels
    pipes = (channels.console, channels.failure, channels.log, channels.ramdump)
    given = {fd for fd in (*pipes, control, launch.vsock.fd) if fd is not None}
    given.update(tap.fd for tap in launch.taps)
    return tuple(sorted(given.union(launch.config.fds())))


def command_line(
    build: Crosvm, arch: str, cpus: int, launch: Launch, control: int | None = None
) -> list[str]:
    """The arguments of a build of crosvm, the executable first. Pure.

    Args:
        build: What its help says; only options in there are used.
        arch: Machine name of the host.
        cpus: Configured processors of the host.
        launch: What to run.
        control: Descriptor of a listening ``SOCK_SEQPACKET`` socket; without one crosvm makes it, at the
            same place.

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
    path = str(launch.directory / "control") if control is None else proc_path(control)
    arguments += ("--socket", crosvm_argument(path))
    for tap in launch.taps:
        arguments += ("--net", f"tap-fd={tap.fd},mac={tap.mac}")
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
    assert disk.image is not None, "disks of partitions have been put together"  # noqa: S101
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
