"""The QEMU driver: what QEMU can run, its command line, and its start.

How files get in. Disks and pipes go by ``-add-fd`` and ``/dev/fdset/K``: QEMU can only use the descriptor
as we opened it, so a read-only one stays read-only even if QEMU runs as root. Kernel, initrd and firmware
are read by parts of QEMU that know no descriptor sets; they get ``/proc/self/fd/N``. That is no path of
ours that somebody could exchange: it names the very file that our descriptor is open on, and QEMU opens it
for reading only. It asks for one thing more than a descriptor does: QEMU's user must be allowed to read the
file.

QEMU starts with its virtual CPUs stopped. ``QemuVmm.wait_running`` sets them going when it has the control
socket, so no end of a guest, however quick, goes unheard.
"""

import os
import socket
from collections.abc import Iterable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Final

import anyio

from vmactor.config import RawConfig
from vmactor.errors import StartFailedError, UnsupportedOperationError, VmmError, hint
from vmactor.host import HostFacts
from vmactor.messages import CpuTopology
from vmactor.text import qemu_value
from vmactor.vmm.driver import (
    BOOT_SECONDS,
    EMULATED_BOOT_SECONDS,
    Footprint,
    KernelVsock,
    Launch,
    LeftVmm,
    VhostUserVsock,
)
from vmactor.vmm.handover import check_socket_path, proc_path, read_only, remove_socket
from vmactor.vmm.qemu_disks import FdSets, Prepared, disk_arguments, prepare
from vmactor.vmm.qemu_vmm import QemuVmm

PLATFORM_VERSION: Final = "1.0.0"
DEFAULT_MEMORY_MIB: Final = 256
"""Memory of a guest whose configuration names none; crosvm's default."""

CONNECT_SECONDS: Final = 5.0
"""How long a QEMU that is taken over may have its control socket's queue full."""

NO_DISKS: Final = Prepared()
"""Nothing to know about disks: there are none, or all are regular files."""

_MIB: Final = 1 << 20


def descriptors(launch: Launch, control: int | None = None, disks: Prepared = NO_DISKS) -> tuple[int, ...]:
    """Every descriptor that QEMU must inherit, each once, in ascending order. Pure."""
    channels = launch.channels
    pipes = (channels.console, channels.failure, channels.log, channels.ramdump)
    given = {fd for fd in (*pipes, control, launch.vsock.fd) if fd is not None}
    given.update(tap.fd for tap in launch.taps)
    return tuple(sorted(given.union(launch.config.fds(), disks.fds())))


@dataclass(frozen=True, slots=True)
class QemuDriver:
    """Runs guests under QEMU: KVM where it is usable, else emulation.

    Attributes:
        facts: What the host can do.
    """

    name: ClassVar[str] = "qemu"
    facts: HostFacts

    @property
    def platform_version(self) -> str:
        """The reference's platform version."""
        return PLATFORM_VERSION

    @property
    def emulated(self) -> bool:
        """Whether guests run slowly: without hardware virtualization, or nested."""
        return not self.facts.kvm.usable or self.facts.nested

    def footprint(self, config: RawConfig) -> Footprint:
        """Three threads, more while disks are busy; 55 MB beside the guest's memory, most of it shared."""
        cpus = self.facts.cpus if config.cpu_topology is CpuTopology.MATCH_HOST else 1
        return Footprint(
            threads=4 + cpus + 4 * len(config.disks),
            descriptors=2,
            overhead=64 * _MIB,
            guest_memory=(config.memory_mib or DEFAULT_MEMORY_MIB) * _MIB,
            boot_seconds=EMULATED_BOOT_SECONDS if self.emulated else BOOT_SECONDS,
        )

    def validate(self, config: RawConfig) -> None:
        """Refuse what QEMU, or this driver, cannot do.

        Raises:
            UnsupportedOperationError: Names the field and what to do.
        """
        if self.facts.arch != "x86_64":
            raise UnsupportedOperationError(
                f"the QEMU driver knows x86_64 hosts only so far, and this is {self.facts.arch}"
            )
        if not self.facts.qemu.usable:
            raise UnsupportedOperationError(f"{self.facts.qemu.found}: {self.facts.qemu.advice}")
        if config.protected_vm:
            raise UnsupportedOperationError(
                "protected_vm: QEMU cannot keep the host out of a guest's memory; set it to false, or use "
                "crosvm on a host with protected KVM"
            )
        if config.task_profiles:
            raise UnsupportedOperationError(
                "task_profiles: they exist on Android only, where crosvm applies them; remove them"
            )

    def command_line(
        self, launch: Launch, control: int | None = None, disks: Prepared = NO_DISKS
    ) -> list[str]:
        """QEMU's arguments, the executable first. Pure.

        Args:
            launch: What to run.
            control: Descriptor of a listening socket for QMP; without one QEMU makes the socket itself, at
                the same place. Either way the guest waits for ``cont``.
            disks: What ``prepare`` made of the disks.
        """
        config, sets = launch.config, FdSets()
        memory = config.memory_mib or DEFAULT_MEMORY_MIB
        cpus = self.facts.cpus if config.cpu_topology is CpuTopology.MATCH_HOST else 1
        accelerated = self.facts.kvm.usable
        arguments = [
            *(str(self.facts.qemu.path or "qemu-system-x86_64"), "-name", f"guest={qemu_value(launch.name)}"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-S"),
            *("-accel", "kvm" if accelerated else "tcg", "-cpu", "host" if accelerated else "max"),
            # Controllers that no guest of ours has a use for take their time to be found. Guest memory is a
            # shared memfd because a vhost-user backend maps it, and is kept out of core dumps.
            *(
                "-machine",
                "q35,memory-backend=memory,usb=off,vmport=off,sata=off,smbus=off,dump-guest-core=off",
            ),
            *("-m", f"{memory}M", "-smp", str(cpus)),
            *("-object", f"memory-backend-memfd,id=memory,size={memory}M,share=on"),
            *self._boot(config),
            *_serial(launch, sets),
            *disk_arguments(config, disks, sets),
            *_vsock(launch),
            *_network(launch),
            *("-device", "virtio-balloon-pci,id=balloon,deflate-on-oom=on,free-page-reporting=on"),
            # Two functions of the last free slot: that leaves room for as many disks as there are letters.
            *("-device", "pvpanic-pci,addr=1e.0,multifunction=on", "-device", "i6300esb,addr=1e.1"),
            *("-action", "reboot=shutdown,shutdown=poweroff,panic=shutdown,watchdog=reset"),
            *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
            *("-chardev", _control(launch.directory, control), "-mon", "chardev=control,mode=control"),
        ]
        return arguments + sets.arguments()

    def _boot(self, config: RawConfig) -> Iterable[str]:
        if config.bootloader is not None:
            yield from ("-bios", proc_path(config.bootloader))
        elif config.kernel is not None and self.facts.qboot.usable:
            # qboot can do nothing but start the kernel it is given, and does that at once.
            yield from ("-bios", "qboot.rom")
        if config.kernel is not None:
            yield from ("-kernel", proc_path(config.kernel))
            # As crosvm does: a guest that panics without a pvpanic driver reboots, which ends the VM. Without
            # this it would stand still for ever. Later parameters win.
            yield from ("-append", f"panic=-1 {config.params}" if config.params else "panic=-1")
        if config.initrd is not None:
            yield from ("-initrd", proc_path(config.initrd))

    async def spawn(self, launch: Launch) -> QemuVmm:
        """Start QEMU, with the virtual CPUs stopped; returns as soon as the process exists.

        Raises:
            StartFailedError: The process could not be made; nothing is left of it.
            UnsupportedOperationError: As ``validate``.
        """
        self.validate(launch.config)
        path = launch.directory / "control"
        check_socket_path(path)
        async with AsyncExitStack() as undo:
            with ExitStack() as stack:
                try:
                    config = read_only(launch.config, stack)
                    listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                    listener.bind(os.fspath(path))
                    undo.callback(remove_socket, path)
                    listener.listen(1)
                    # Ours is the first connection, made before anybody else can know of the socket; QEMU
                    # serves one at a time. Our copy of the listener goes, so a dead QEMU is noticed at once.
                    stream = await undo.enter_async_context(await anyio.connect_unix(path))
                    launch = replace(launch, config=config)
                    disks = prepare(config, stack)
                    process = launch.spawn(
                        self.command_line(launch, listener.fileno(), disks),
                        descriptors(launch, listener.fileno(), disks),
                    )
                except OSError as error:
                    raise StartFailedError(f"cannot start QEMU: {error}{hint(error)}") from error
            undo.pop_all()
        memory = (config.memory_mib or DEFAULT_MEMORY_MIB) * _MIB
        freeze = isinstance(launch.vsock, VhostUserVsock)
        return QemuVmm(process, stream, memory=memory, socket_path=path, freeze=freeze)

    async def adopt(self, left: LeftVmm) -> QemuVmm:
        """Take over a QEMU of another manager; it serves us when it sees that the other one has hung up.

        Raises:
            VmmError: Its control socket is not to be had; the process is as it was.
        """
        path = left.directory / "control"
        stream = None
        try:
            with anyio.move_on_after(CONNECT_SECONDS):
                stream = await anyio.connect_unix(path)
        except OSError as error:
            raise VmmError(f"no connection to QEMU's control socket: {error.strerror or error}") from error
        if stream is None:
            raise VmmError("QEMU's control socket takes no connection; somebody else may be connected")
        memory = (left.memory_mib or DEFAULT_MEMORY_MIB) * _MIB
        return QemuVmm(left.process, stream, memory=memory, socket_path=path, freeze=left.helped)


def _control(directory: Path, control: int | None) -> str:
    where = f"fd={control}" if control is not None else f"path={qemu_value(str(directory / 'control'))}"
    return f"socket,id=control,{where},server=on,wait=off"


def _serial(launch: Launch, sets: FdSets) -> Iterable[str]:
    """The reference's five serial roles; those without a pipe are null, so that no number ever shifts."""
    channels = launch.channels
    roles = {
        "ttyS0": channels.console,
        "ttyS1": channels.failure,
        "hvc0": channels.console,
        "hvc1": channels.ramdump,
        "hvc2": channels.log,
    }
    for role, fd in roles.items():
        yield from (
            "-chardev",
            f"null,id={role}" if fd is None else f"file,id={role},path={sets.path(fd)},append=on",
        )
    yield from ("-serial", "chardev:ttyS0", "-serial", "chardev:ttyS1")
    yield from ("-device", "virtio-serial-pci,id=hvc,max_ports=3")
    for number in range(3):
        yield from ("-device", f"virtconsole,bus=hvc.0,nr={number},chardev=hvc{number}")


def _network(launch: Launch) -> Iterable[str]:
    """One virtio-net each, as functions of the slot that pvpanic and watchdog begin."""
    for i, tap in enumerate(launch.taps):
        yield from ("-netdev", f"tap,id=net{i},fd={tap.fd}")
        device = f"virtio-net-pci,netdev=net{i},mac={tap.mac},host_mtu={tap.mtu},romfile=,addr=1e.{2 + i}"
        yield from ("-device", device)


def _vsock(launch: Launch) -> tuple[str, ...]:
    if isinstance(launch.vsock, KernelVsock):
        return ("-device", f"vhost-vsock-pci,guest-cid={launch.cid},vhostfd={launch.vsock.fd}")
    backend = f"socket,id=vsock,fd={launch.vsock.fd}"
    return ("-chardev", backend, "-device", "vhost-user-vsock-pci,chardev=vsock")
