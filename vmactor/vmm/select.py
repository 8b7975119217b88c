"""Which VMM runs the guests of this host, and how their vsock gets through."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from vmactor.errors import IllegalArgumentError, UnsupportedOperationError
from vmactor.host import Finding, HostFacts
from vmactor.vmm.driver import VmmDriver
from vmactor.vmm.qemu import QemuDriver

NAMES: Final = ("auto", "crosvm", "qemu", "simulated")
"""What ``select`` takes."""

VsockKind = Literal["kernel", "hybrid"]


@dataclass(frozen=True, slots=True)
class Selection:
    """A driver, and why it was picked.

    Attributes:
        driver: Starts the VMMs.
        vsock: ``kernel`` for the host's vhost-vsock, ``hybrid`` for a vhost-device-vsock helper.
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
        selection = _qemu(facts)
        return Selection(selection.driver, selection.vsock, (_why_not_crosvm(facts), *selection.reasons))
    return _EXPLICIT[name](facts)


def _why_not_crosvm(facts: HostFacts) -> str:
    needs = {"crosvm": facts.crosvm, "KVM": facts.kvm, "vhost-vsock": facts.vhost_vsock}
    missing = [what for what, finding in needs.items() if not finding.usable]
    if missing:
        return f"crosvm was not picked: this host lacks {', '.join(missing)}"
    return "crosvm was not picked: it would run here, but its driver is not there yet"


def _crosvm(_facts: HostFacts) -> Selection:
    raise UnsupportedOperationError("the crosvm driver is not there yet; use 'qemu' or 'auto'")


def _simulated(_facts: HostFacts) -> Selection:
    raise UnsupportedOperationError("the simulated driver is not there yet; use 'qemu' or 'auto'")


def _qemu(facts: HostFacts) -> Selection:
    if facts.arch != "x86_64":
        raise UnsupportedOperationError(
            f"QEMU guests need an x86_64 host so far, and this is {facts.arch}; there is no other driver yet"
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
    if facts.vhost_vsock.usable and facts.af_vsock.usable:
        return Selection(
            QemuDriver(facts), "kernel", (*reasons, "vsock goes through the kernel's vhost-vsock")
        )
    missing = facts.vhost_vsock if not facts.vhost_vsock.usable else facts.af_vsock
    if facts.vhost_device_vsock.usable:
        reasons.append(f"vsock goes through {facts.vhost_device_vsock.found}: {missing.found}")
        return Selection(QemuDriver(facts), "hybrid", tuple(reasons))
    raise UnsupportedOperationError(
        f"no vsock for guests: {_says(missing)}; or else: {_says(facts.vhost_device_vsock)}"
    )


def _says(finding: Finding) -> str:
    return f"{finding.found} ({finding.advice})" if finding.advice else finding.found


_EXPLICIT: Final[dict[str, Callable[[HostFacts], Selection]]] = {
    "crosvm": _crosvm,
    "qemu": _qemu,
    "simulated": _simulated,
}
