"""The simulated VMM's driver: real processes that run no guest, for load and fault tests of the manager.

``simulated.c`` takes crosvm's command line and answers crosvm's control socket, so all that is between
the manager and a VMM is the crosvm driver's. What its guest would do, and how the VMM misbehaves, is a script
in the kernel parameters (``docs/simulated.md``). It is never chosen by itself, and named in every event and
listing.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from vmactor.config import RawConfig
from vmactor.errors import UnsupportedOperationError
from vmactor.host import Crosvm, HostFacts
from vmactor.vmm import crosvm
from vmactor.vmm.crosvm_vmm import CrosvmVmm
from vmactor.vmm.driver import DirectVsock, Footprint, KernelVsock, Launch, LeftVmm

PLATFORM_VERSION: Final = "1.0.0"
OPTIONS: Final = frozenset(
    {
        *("balloon-page-reporting", "bios", "block", "cid", "cpus", "disable-sandbox", "disk", "hugepages"),
        *("host-cpu-topology", "initrd", "mem", "name", "no-balloon", "no-rng", "no-usb", "params", "rwdisk"),
        *("protected-vm", "protected-vm-with-firmware", "serial", "socket", "suspended", "swiotlb"),
        *("unmap-guest-memory-on-fork", "vsock"),
    }
)
"""The options of crosvm's head that ``simulated.c`` knows, without their dashes."""
COMMANDS: Final = frozenset({"create_composite", "create_qcow2"})
"""What a crosvm that reads all kinds of disks has; nothing reads a disk here, so all are as good."""


@dataclass(frozen=True, slots=True)
class SimulatedDriver:
    """Runs scripts instead of guests.

    Attributes:
        facts: What the host has.
    """

    name: ClassVar[str] = "simulated"
    facts: HostFacts

    @property
    def platform_version(self) -> str:
        """The reference's platform version."""
        return PLATFORM_VERSION

    @property
    def emulated(self) -> bool:
        """No guest is slow where there is none."""
        return False

    def footprint(self, config: RawConfig) -> Footprint:
        """One thread, and no guest that could touch memory or boot."""
        return Footprint(threads=1, descriptors=0, overhead=1 << 20, guest_memory=0, boot_seconds=0.0)

    def validate(self, config: RawConfig) -> None:
        """Refuse what crosvm could not do on any host, so that what runs here is what would run there.

        Raises:
            UnsupportedOperationError: Names the field and what to do.
        """
        if not self.facts.simulated.usable:
            raise UnsupportedOperationError(
                f"VMs cannot be simulated: {self.facts.simulated.found}: {self.facts.simulated.advice}"
            )
        crosvm.validate(self._build, config)

    def command_line(self, launch: Launch, control: int | None = None) -> list[str]:
        """Crosvm's arguments, with the program exchanged. Pure."""
        return crosvm.command_line(
            self._build, self.facts.arch, self.facts.cpus, _as_kernel_vsock(launch), control
        )

    async def spawn(self, launch: Launch) -> CrosvmVmm:
        """Start the process; returns as soon as it exists, without a moment in which others could run.

        Raises:
            StartFailedError: The process could not be made; nothing is left of it.
            UnsupportedOperationError: As ``validate``.
        """
        self.validate(launch.config)
        return crosvm.start(self._build, self.facts.arch, self.facts.cpus, _as_kernel_vsock(launch))

    async def adopt(self, left: LeftVmm) -> CrosvmVmm:
        """Take over a process of another manager; never raises."""
        return crosvm.adopt(self._build, left)

    @property
    def _build(self) -> Crosvm:
        program = self.facts.simulated
        return Crosvm(program.usable, program.found, program.advice, program.path, None, OPTIONS, COMMANDS)


def _as_kernel_vsock(launch: Launch) -> Launch:
    """The directory of the VM's sockets stands where the kernel's device would."""
    device = launch.vsock
    return replace(launch, vsock=KernelVsock(device.fd)) if isinstance(device, DirectVsock) else launch
