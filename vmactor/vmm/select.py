"""Which VMM runs the guests of this host, and how their vsock gets through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from vmactor.errors import IllegalArgumentError, UnsupportedOperationError
from vmactor.host import Finding, HostFacts
from vmactor.vmm.crosvm import CrosvmDriver, takes_vhost_user, takes_vhost_vsock
from vmactor.vmm.driver import VmmDriver
from vmactor.vmm.qemu import QemuDriver
from vmactor.vmm.simulated import SimulatedDriver

NAMES: Final = ("auto", "crosvm", "qemu", "simulated")
"""What ``select`` takes."""

VsockKind = Literal["kernel", "hybrid", "direct"]


@dataclass(frozen=True, slots=True)
class Selection:
    """A driver, and why it was picked.

    Attributes:
        driver: Starts the VMMs.
        vsock: ``kernel`` for the host's vhost-vsock, ``hybrid`` for a vhost-device-vsock helper, ``direct``
            for the same unix sockets with the VMM itself at their other end.
        reasons: Sentences for people, in the order of the decisions.
    """

    driver: VmmDriver
    vsock: VsockKind
    reasons: tuple[str, ...]


def select(name: str, facts: HostFacts) -> Selection:
    """Pick a driver by name, or the best one for ``auto``.

    Raises:
        IllegalArgumentError: No driver has that name.
        UnsupportedOperationError: It cannot be used here; the message says what is missing and how to get it.
    """
    if name not in NAMES:
        raise IllegalArgumentError(f"no VMM driver is called {name!r}; there are: {', '.join(NAMES)}")
    if name == "auto":
        return _auto(facts)
    return _EXPLICIT[name](facts)


def _auto(facts: HostFacts) -> Selection:
    try:
        return _crosvm(facts)
    except UnsupportedOperationError as error:
        refusal = str(error)
    selection = _qemu(facts)
    return Selection(
        selection.driver, selection.vsock, (f"crosvm was not picked: {refusal}", *selection.reasons)
    )


def _crosvm(facts: HostFacts) -> Selection:
    for what, finding in (("crosvm cannot be used", facts.crosvm), ("crosvm needs KVM", facts.kvm)):
        if not finding.usable:
            raise UnsupportedOperationError(f"{what}: {_says(finding)}")
    reasons = [f"crosvm was picked, the VMM of the platform: {facts.crosvm.found}"]
    reasons.append("guests run under KVM" + (", nested, so timeouts are longer" if facts.nested else ""))
    if "no-balloon" not in facts.crosvm.options:
        reasons.append("trimming memory has no effect: crosvm was built without its feature 'balloon'")
    driver = CrosvmDriver(facts)
    no_kernel, no_helper = _missing_kernel_vsock(facts), facts.vhost_device_vsock
    if no_kernel is None and takes_vhost_vsock(facts.crosvm):
        return Selection(driver, "kernel", (*reasons, "vsock goes through the kernel's vhost-vsock"))
    why = "this build takes no open /dev/vhost-vsock" if no_kernel is None else no_kernel.found
    if no_helper.usable and takes_vhost_user(facts.crosvm):
        return Selection(driver, "hybrid", (*reasons, f"vsock goes through {no_helper.found}: {why}"))
    if no_helper.usable:
        helped = "this build takes no connected vhost-user socket (it is older than April 2025)"
    else:
        helped = _says(no_helper)
    raise UnsupportedOperationError(f"no vsock for crosvm's guests: {why}; or else: {helped}")


def _missing_kernel_vsock(facts: HostFacts) -> Finding | None:
    return next((finding for finding in (facts.vhost_vsock, facts.af_vsock) if not finding.usable), None)


def _simulated(facts: HostFacts) -> Selection:
    if not facts.simulated.usable:
        raise UnsupportedOperationError(f"VMs cannot be simulated: {_says(facts.simulated)}")
    reasons = (
        f"the simulated VMM was asked for: {facts.simulated.found}",
        "there is no guest: it plays the script in the kernel parameters, for load and fault tests only",
    )
    return Selection(SimulatedDriver(facts), "direct", reasons)


def _qemu(facts: HostFacts) -> Selection:
    if facts.arch != "x86_64":
        raise UnsupportedOperationError(
            f"QEMU guests need an x86_64 host so far, and this is {facts.arch}; use crosvm there"
        )
    if not facts.qemu.usable:
        raise UnsupportedOperationError(f"QEMU cannot be used: {_says(facts.qemu)}")
    reasons = [f"QEMU was picked: {facts.qemu.found}"]
    if facts.kvm.usable:
        reasons.append("guests run under KVM" + (", nested, so timeouts are longer" if facts.nested else ""))
    else:
        reasons.append("guests are emulated for want of KVM, which is slow, so timeouts are longer")
    if not facts.qboot.usable:
        reasons.append("guests boot by QEMU's standard firmware, half a second slower, for want of qboot")
    missing = _missing_kernel_vsock(facts)
    if missing is None:
        return Selection(
            QemuDriver(facts), "kernel", (*reasons, "vsock goes through the kernel's vhost-vsock")
        )
    if facts.vhost_device_vsock.usable:
        reasons.append(f"vsock goes through {facts.vhost_device_vsock.found}: {missing.found}")
        return Selection(QemuDriver(facts), "hybrid", tuple(reasons))
    raise UnsupportedOperationError(
        f"no vsock for guests: {_says(missing)}; or else: {_says(facts.vhost_device_vsock)}"
    )


def _says(finding: Finding) -> str:
    return f"{finding.found} ({finding.advice})" if finding.advice else finding.found


def driver_named(name: str, facts: HostFacts) -> VmmDriver | None:
    """The driver of a VMM that runs already, whatever new ones would get; None if there is no such driver."""
    match name:
        case "crosvm":
            return CrosvmDriver(facts)
        case "qemu":
            return QemuDriver(facts)
        case "simulated":
            return SimulatedDriver(facts)
    return None


_EXPLICIT: Final[dict[str, Callable[[HostFacts], Selection]]] = {
    "crosvm": _crosvm,
    "qemu": _qemu,
    "simulated": _simulated,
}
