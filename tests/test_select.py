"""Which driver and vsock transport are picked on made-up hosts, and what people are told."""

from typing import Any

import pytest

from tests.host_facts import MISSING, absent, facts, no_crosvm
from vmactor.errors import IllegalArgumentError, UnsupportedOperationError
from vmactor.vmm.qemu import QemuDriver
from vmactor.vmm.select import select


@pytest.mark.parametrize(
    ("changes", "vsock", "emulated"),
    [
        ({}, "kernel", False),
        ({"nested": True}, "kernel", True),
        ({"kvm": MISSING}, "kernel", True),
        ({"vhost_vsock": MISSING}, "hybrid", False),
        ({"af_vsock": MISSING}, "hybrid", False),
        ({"vhost_device_vsock": absent("helper")}, "kernel", False),
        ({"kvm": MISSING, "vhost_vsock": MISSING, "crosvm": no_crosvm()}, "hybrid", True),
    ],
)
@pytest.mark.parametrize("name", ["auto", "qemu"])
def test_qemu_is_picked_with_the_best_transport(
    name: str, changes: dict[str, Any], vsock: str, emulated: bool
) -> None:
    selection = select(name, facts(**changes))
    assert isinstance(selection.driver, QemuDriver)
    assert selection.vsock == vsock
    assert selection.driver.emulated is emulated
    assert any("slow" in reason for reason in selection.reasons) is ("kvm" in changes)


def test_auto_says_why_crosvm_was_not_picked() -> None:
    reasons = select("auto", facts()).reasons
    assert reasons[0] == "crosvm was not picked: it would run here, but its driver is not there yet"
    reasons = select("auto", facts(crosvm=no_crosvm(), kvm=MISSING)).reasons
    assert reasons[0] == "crosvm was not picked: this host lacks crosvm, KVM"
    assert not any("crosvm" in reason for reason in select("qemu", facts()).reasons)


@pytest.mark.parametrize("name", ["auto", "qemu"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qemu": absent("qemu")}, r"no qemu in PATH \(install qemu\)"),
        ({"arch": "aarch64"}, "x86_64 host so far, and this is aarch64"),
        (
            {"vhost_vsock": MISSING, "vhost_device_vsock": absent("helper")},
            r"none here \(get one\); or else: no helper in PATH \(install helper\)",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_way_to_get_it(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        select(name, facts(**changes))


@pytest.mark.parametrize("name", ["crosvm", "simulated"])
def test_drivers_to_come_are_refused_as_not_there_yet(name: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=f"the {name} driver is not there yet"):
        select(name, facts())


def test_an_unknown_name_is_an_illegal_argument() -> None:
    with pytest.raises(IllegalArgumentError, match="there are: auto, crosvm, qemu, simulated"):
        select("xen", facts())
