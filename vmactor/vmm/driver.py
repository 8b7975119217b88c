"""What a VMM driver is: a small protocol, one file per VMM.

A driver is stateless. Its ``command_line`` is a pure function of the launch and of the host facts that
the driver was made with, so it can be tested against the references' tables. ``spawn`` gives a ``Vmm``:
one running process and its control socket. Nothing here knows of actors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Protocol

from vmactor.config import RawConfig
from vmactor.ledger import Spawner
from vmactor.messages import BalloonStats, DeathReason
from vmactor.process import ExitStatus, Process

BOOT_SECONDS: Final = 1.0
EMULATED_BOOT_SECONDS: Final = 5.0
"""How long a guest takes to boot, about; where it is emulated or nested."""


@dataclass(frozen=True, slots=True)
class KernelVsock:
    """A vhost-vsock device of the host's kernel.

    Attributes:
        fd: ``/dev/vhost-vsock``, opened read-write, with the guest's CID already claimed on it.
    """

    fd: int


@dataclass(frozen=True, slots=True)
class VhostUserVsock:
    """A vhost-user backend.

    Attributes:
        fd: A stream socket connected to the backend.
    """

    fd: int


@dataclass(frozen=True, slots=True)
class DirectVsock:
    """Unix sockets that the VMM itself connects to and listens on; only a VMM without a guest can.

    Attributes:
        fd: The directory of the sockets, opened for reading.
    """

    fd: int


@dataclass(frozen=True, slots=True)
class Tap:
    """A network interface of the guest.

    Attributes:
        fd: The host's tap, with virtio-net headers of 12 bytes.
        mac: The guest's.
        mtu: What the guest is told, where the VMM can tell it.
    """

    fd: int
    mac: str
    mtu: int


VsockDevice = KernelVsock | VhostUserVsock | DirectVsock


@dataclass(frozen=True, slots=True)
class Channels:
    """Write ends of the pipes that the VMM gets; the manager drains the other ends.

    Attributes:
        console: Early and kernel console (ttyS0 and hvc0).
        failure: Reason of a failure as the guest gives it (ttyS1).
        log: The guest's log (hvc2).
        ramdump: Crash dump of the guest (hvc1).
        stderr: The VMM's own complaints.
        readers: The other ends of console, failure and stderr, by these names. The VMM holds them open, so
            that a crash of its manager neither stops it nor loses what it says.

    None means that the output is discarded by the VMM (or, for stderr, goes to ``/dev/null``).
    """

    console: int | None
    failure: int
    log: int | None
    ramdump: int | None
    stderr: int | None
    readers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Launch:
    """All that a driver needs to start a VM; descriptors stay the caller's.

    Attributes:
        name: The VM's name (already validated).
        cid: Its vsock context identifier.
        config: What to run; every file in it is an open descriptor.
        vsock: How the guest's vsock device is backed.
        channels: Where serial output goes.
        directory: The VM's private directory (mode 0700), for a control socket. The VMM itself may not be
            able to reach it: it can be another user's.
        spawner: Spawns the VM's processes.
        taps: Its network interfaces, in the order in which the guest sees them.
    """

    name: str
    cid: int
    config: RawConfig
    vsock: VsockDevice
    channels: Channels
    directory: Path
    spawner: Spawner = Spawner()  # noqa: RUF009 - immutable
    taps: tuple[Tap, ...] = ()

    def spawn(self, args: Sequence[str], pass_fds: Collection[int]) -> Process:
        """Spawn the VMM, with its requester's rights, noted in the VM's ledger, holding its channels.

        Args:
            args: Its command line.
            pass_fds: The descriptors that are named there.

        Raises:
            OSError: It cannot be spawned, or not be noted.
            IllegalArgumentError: An argument that no process can get.
        """
        channels = self.channels
        return self.spawner(
            "VMM", args, pass_fds=tuple(pass_fds), stderr=channels.stderr, readers=channels.readers
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a running VMM takes of its host at most, beside its files: what its manager reckons with.

    Attributes:
        threads: Its processes and threads.
        descriptors: Those of the manager that it lasts, for its control connection, say.
        overhead: Bytes of memory of its own.
        guest_memory: Bytes that its guest may touch some day.
        boot_seconds: How long its guest still counts as booting when the VMM runs, unless it reports before.
    """

    threads: int
    descriptors: int
    overhead: int
    guest_memory: int
    boot_seconds: float


@dataclass(frozen=True, slots=True)
class VmmExit:
    """How a VMM ended.

    Attributes:
        status: Exit code or signal.
        reason: The death reason by the VMM's status and its own word; failure texts and hang-ups come on top.
        detail: Anything else worth telling a person.
    """

    status: ExitStatus
    reason: DeathReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LeftVmm:
    """A VMM that another manager of this user started, and that lives on.

    Attributes:
        process: It, known beyond doubt.
        directory: The VM's private directory.
        memory_mib: The guest's memory; None for the driver's default.
        helped: Whether a vsock helper serves it.
    """

    process: Process
    directory: Path
    memory_mib: int | None
    helped: bool


class Vmm(Protocol):
    """A spawned VMM."""

    @property
    def pid(self) -> int:
        """Process number, for people only; signals go through the pidfd."""
        ...

    async def wait_running(self) -> None:
        """Return when the VMM is known to run the guest.

        Raises:
            VmmError: It ended first, or refused; the message holds its last words. ``wait`` tells the rest.
        """
        ...

    async def take_over(self, *, suspended: bool) -> None:
        """In place of ``wait_running``, where another manager had it run: make it be as that one said last.

        Args:
            suspended: Whether its virtual CPUs are to be paused.

        Raises:
            VmmError: It ended, or refused; it is left as it is.
            DeadlineExceededError: It does not answer; the same.
        """
        ...

    async def wait(self) -> VmmExit:
        """Return how the VMM ended; any number of times, also after the end."""
        ...

    def kill(self) -> None:
        """SIGKILL through the pidfd; never blocks, does nothing to a dead VMM."""
        ...

    async def suspend(self) -> None:
        """Pause the virtual CPUs. Raises VmmError or DeadlineExceededError."""
        ...

    async def resume(self) -> None:
        """Let the virtual CPUs run again. Raises VmmError or DeadlineExceededError."""
        ...

    async def request_shutdown(self) -> None:
        """Press the power button. Raises VmmError or DeadlineExceededError."""
        ...

    async def request_exit(self) -> None:
        """Have the VMM end in order; to the guest, the power fails. Raises as ``request_shutdown``."""
        ...

    async def balloon_stats(self) -> BalloonStats | None:
        """The guest's memory figures; None if there is no balloon or its driver is not active."""
        ...

    async def set_balloon(self, size: int) -> None:
        """Ask for a balloon of ``size`` bytes (memory taken from the guest)."""
        ...

    async def aclose(self) -> None:
        """Kill if alive, reap, close every descriptor. Idempotent; not interrupted by cancellation."""
        ...

    async def let_go(self) -> None:
        """In place of ``aclose``: close every descriptor and leave the VMM to the next manager."""
        ...


class VmmDriver(Protocol):
    """How to start one kind of VMM."""

    name: ClassVar[str]

    @property
    def platform_version(self) -> str:
        """What a configuration's ``platform_version`` is checked against, e.g. ``1.0.0``."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether guests run without hardware virtualization, or nested: timeouts are longer then."""
        ...

    def validate(self, config: RawConfig) -> None:
        """Refuse what this VMM cannot do.

        Raises:
            UnsupportedOperationError: Names the field and what to do.
        """
        ...

    def footprint(self, config: RawConfig) -> Footprint:
        """What running it will take. Pure."""
        ...

    def command_line(self, launch: Launch) -> list[str]:
        """The VMM's arguments, the executable first. Pure."""
        ...

    async def spawn(self, launch: Launch) -> Vmm:
        """Start the VMM; returns as soon as the process exists.

        Raises:
            StartFailedError: The process could not be made.
        """
        ...

    async def adopt(self, left: LeftVmm) -> Vmm:
        """Take over a VMM that this driver spawned in another manager, with its control socket.

        Raises:
            VmmError: Its control socket is not to be had; the process is as it was.
        """
        ...
