"""Which driver and vsock transport are picked on made-up hosts, and what people are told."""

import re
from typing import Any

import pytest

from tests.host_facts import HEAD_OPTIONS, MISSING, OPTIONS_2023_02, absent, crosvm, facts, no_crosvm
from vmactor.errors import IllegalArgumentError, UnsupportedOperationError
from vmactor.vmm.crosvm import CrosvmDriver
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
    selection = select(name, facts(**{"crosvm": no_crosvm()} | changes))
    assert isinstance(selection.driver, QemuDriver)
    assert selection.vsock == vsock
    assert selection.driver.emulated is emulated
    assert any("slow" in reason for reason in selection.reasons) is ("kvm" in changes)


@pytest.mark.parametrize("name", ["auto", "crosvm"])
@pytest.mark.parametrize(
    ("changes", "vsock"),
    [
        ({}, "kernel"),
        ({"nested": True}, "kernel"),
        ({"arch": "aarch64", "qemu": absent("qemu")}, "kernel"),
        ({"vhost_device_vsock": absent("helper")}, "kernel"),
        ({"crosvm": crosvm(OPTIONS_2023_02)}, "kernel"),
        ({"vhost_vsock": MISSING}, "hybrid"),
        ({"af_vsock": MISSING}, "hybrid"),
        ({"crosvm": crosvm(HEAD_OPTIONS - {"vsock", "cid"})}, "hybrid"),
    ],
)
def test_crosvm_is_picked_first_where_it_can_run_guests(
    name: str, changes: dict[str, Any], vsock: str
) -> None:
    selection = select(name, facts(**changes))
    assert isinstance(selection.driver, CrosvmDriver)
    assert selection.vsock == vsock
    assert selection.driver.emulated is ("nested" in changes)
    assert selection.reasons[0].startswith("crosvm was picked, the VMM of the platform: /usr/bin/crosvm")
    assert selection.driver.platform_version == "1.0.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crosvm": no_crosvm()}, r"crosvm cannot be used: no crosvm in PATH \(build crosvm\)"),
        ({"kvm": MISSING}, r"crosvm needs KVM: none here \(get one\)"),
        (
            {"vhost_vsock": MISSING, "vhost_device_vsock": absent("helper")},
            r"no vsock for crosvm's guests: none here; or else: no helper in PATH \(install helper\)",
        ),
        (
            {"vhost_vsock": MISSING, "crosvm": crosvm(OPTIONS_2023_02)},
            "no vsock for crosvm.s guests: none here; or else: this build takes no connected vhost-user",
        ),
        (
            {"crosvm": crosvm(OPTIONS_2023_02 - {"cid"})},
            "guests: this build takes no open /dev/vhost-vsock; or else: this build takes no connected",
        ),
    ],
)
def test_where_crosvm_cannot_run_guests_the_reason_is_named_and_auto_goes_on_to_qemu(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        select("crosvm", facts(**changes))
    if "vhost_device_vsock" not in changes:  # which QEMU needs too
        selection = select("auto", facts(**changes))
        assert isinstance(selection.driver, QemuDriver)
        assert re.search(f"crosvm was not picked: .*{message}", selection.reasons[0])
        assert not any("crosvm" in reason for reason in selection.reasons[1:])


def test_a_build_without_balloon_is_picked_and_said_so() -> None:
    build = crosvm(HEAD_OPTIONS - {"no-balloon", "balloon-page-reporting"})
    reasons = select("auto", facts(crosvm=build)).reasons
    assert "trimming memory has no effect: crosvm was built without its feature 'balloon'" in reasons


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
        select(name, facts(**{"crosvm": no_crosvm()} | changes))


def test_an_unknown_name_is_an_illegal_argument() -> None:
    with pytest.raises(IllegalArgumentError, match="there are: auto, crosvm, qemu, simulated"):
        select("xen", facts())
