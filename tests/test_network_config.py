"""Networks in configurations, and what becomes of them on a host; no kernel is asked."""

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor import (
    IllegalArgumentError,
    NetworkInterface,
    NetworkMode,
    NetworkPolicy,
    RawConfig,
    UnsupportedOperationError,
)
from vmactor.cid import FIRST, LAST
from vmactor.config_file import parse_config
from vmactor.net.nat import ruleset
from vmactor.net.plan import kernel_parameters, plan
from vmactor.network_config import MAX_INTERFACES

POLICY = NetworkPolicy()


def config(*interfaces: NetworkInterface, **more: Any) -> RawConfig:
    return RawConfig(name="x", kernel=0, network=interfaces, **more)


def planned(*interfaces: NetworkInterface, cid: int = FIRST, place: str = "/run/vmactor") -> Any:
    return plan(interfaces, cid, POLICY, place=place, host_id="host")


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("name", "sixteen-bytes-xx", "more than 15 bytes"),
        ("name", "ééééééé1", "no name of an interface"),
        ("name", "", "no name"),
        ("name", "..", "no name"),
        ("name", "tap%d", "no name"),
        ("name", "a/b", "no name"),
        ("bridge", "br 0", "no name"),
        ("mac", "02:00:00:00:00", "six bytes"),
        ("mac", "03:00:00:00:00:01", "must be even"),
        ("mac", "00:00:00:00:00:00", "all be zero"),
        ("mac", "02:00:00:00:00:01,x=y", "six bytes"),
        ("mtu", 575, "576 to 65521"),
        ("mtu", 65522, "576 to 65521"),
        ("mtu", True, "whole number"),
        ("address", "10.88.0.7", "prefix length"),
        ("address", "10.88.0.7/33", "prefix length"),
        ("address", "10.88.0.0/16", "none that a guest can have"),
        ("address", "224.0.0.1/16", "none that a guest can have"),
        ("address", "fe80::1/64", "IPv4"),
        ("gateway", "10.88.0.1", "another address of the guest's network"),
        ("gateway", "x", "no IPv4 address"),
        ("isolated", 1, "True or False"),
        ("to_guest_kbit", 0, "whole number"),
        ("from_guest_kbit", 10**9, "whole number"),
    ],
)
def test_a_value_that_no_interface_can_have_is_refused_by_name(field: str, value: Any, hint: str) -> None:
    interface = NetworkInterface(**{field: value})
    with pytest.raises(IllegalArgumentError, match=rf"^network\[1\]\.{field}.*{hint}"):
        config(NetworkInterface(), interface).validate()


def test_interfaces_that_cannot_be_together_are_refused() -> None:
    twice = [
        (NetworkInterface(name="a", address="10.88.0.2/16"), NetworkInterface(name="a", bridge="b")),
        (NetworkInterface(mac="02:00:00:00:00:aa"), NetworkInterface(mac="02:00:00:00:00:AA", bridge="b")),
        (NetworkInterface(address="10.88.0.2/16"), NetworkInterface(address="10.88.0.2/16")),
        (NetworkInterface(), NetworkInterface()),
    ]
    for pair in twice:
        with pytest.raises(IllegalArgumentError, match="has the same"):
            config(*pair).validate()
    many = [NetworkInterface(bridge=f"b{number}") for number in range(MAX_INTERFACES + 1)]
    with pytest.raises(IllegalArgumentError, match="at most 6"):
        config(*many).validate()
    config(*many[:-1]).validate()


def test_a_protected_vm_has_no_network() -> None:
    with pytest.raises(UnsupportedOperationError, match="network: not supported for protected VMs"):
        config(NetworkInterface(), protected_vm=True).validate()


def test_what_a_routed_interface_cannot_have_is_refused() -> None:
    for wrong in ({"bridge": "b"}, {"isolated": True}, {"address": "10.1.2.3/24"}):
        with pytest.raises(IllegalArgumentError, match=r"routed|prefix length 31"):
            config(NetworkInterface(mode=NetworkMode.ROUTED, **wrong)).validate()


def test_a_file_says_true_or_which_interfaces() -> None:
    def read(network: object) -> tuple[NetworkInterface, ...]:
        file = {"kernel": "k", "platform_version": "1", "network": network}
        return parse_config(json.dumps(file)).network

    assert read(True) == (NetworkInterface(),)
    assert read(False) == ()
    routed = NetworkInterface(mode=NetworkMode.ROUTED, mtu=9000, to_guest_kbit=100)
    assert read([{"mode": "routed", "mtu": 9000, "to_guest_kbit": 100}]) == (routed,)
    for wrong in (1, {"mode": "bridge"}, [{"mode": "x"}], [{"nmae": "x"}], [{"name": "sixteen-bytes-xx"}]):
        with pytest.raises(IllegalArgumentError, match="network"):
            read(wrong)


def test_a_network_must_be_a_flag_or_interfaces() -> None:
    for wrong in (1, ["eth0"], None):
        with pytest.raises(IllegalArgumentError, match="network must be"):
            RawConfig(name="x", kernel=0, network=wrong)  # type: ignore[arg-type]
    assert RawConfig(name="x", kernel=0, network=True).network == (NetworkInterface(),)


# -- The plan --------------------------------------------------------------------------------------


@given(st.integers(FIRST, LAST), st.integers(FIRST, LAST))
def test_every_cid_has_names_macs_and_addresses_of_its_own(one: int, other: int) -> None:
    both = NetworkInterface(), NetworkInterface(mode=NetworkMode.ROUTED)
    links = [*planned(*both, cid=one), *([] if one == other else planned(*both, cid=other))]
    for link in links:
        assert len(link.name.encode()) <= 15
        first = int(link.mac[:2], 16)
        assert first & 3 == 2  # locally administered, of one interface
        assert link.address.ip not in {POLICY.host.ip, link.gateway}
        assert link.gateway in link.address.network
    for what in ("name", "mac", "address"):
        assert len({getattr(link, what) for link in links}) == len(links)
    assert planned(*both, cid=one) == planned(*both, cid=one)


def test_services_with_other_state_directories_have_other_taps_and_hosts_have_other_macs() -> None:
    (here,), (there,) = planned(NetworkInterface()), planned(NetworkInterface(), place="/run/other")
    assert here.name != there.name
    (elsewhere,) = plan((NetworkInterface(),), FIRST, POLICY, place="/run/vmactor", host_id="other")
    assert here.mac != elsewhere.mac


def test_an_address_on_our_bridge_is_chosen_where_no_cid_leads() -> None:
    (link,) = planned(NetworkInterface(address="10.88.0.255/16"))
    assert link.address == ipaddress.IPv4Interface("10.88.0.255/16")
    for wrong in ("10.88.0.1/16", "10.88.1.0/16", "10.88.0.5/24", "10.99.0.5/16"):
        with pytest.raises(IllegalArgumentError, match="is not to be chosen"):
            planned(NetworkInterface(address=wrong))


def test_the_guest_is_told_by_a_parameter_as_kernels_read_it() -> None:
    links = planned(
        NetworkInterface(), NetworkInterface(mode=NetworkMode.ROUTED), NetworkInterface(bridge="b")
    )
    assert kernel_parameters(links) == (
        "ip=10.88.1.0::10.88.0.1:255.255.0.0::eth0:off ip=10.90.0.1:::255.255.255.254::eth1:off"
    )
    assert kernel_parameters(planned(NetworkInterface(configure_guest=False))) == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"subnet": "10.88.0.0/17"},
        {"subnet": "10.88.0.1/16"},
        {"subnet": "x"},
        {"routed": "10.0.0.0/16"},
        {"subnet": "10.0.0.0/8"},
        {"bridge": "a/b"},
    ],
)
def test_a_policy_without_room_or_sense_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(IllegalArgumentError):
        NetworkPolicy(**wrong)  # type: ignore[arg-type]


def test_the_rules_for_nat_name_both_networks() -> None:
    rules = ruleset("my-br.0", (POLICY.network, POLICY.routed_network))
    inside = "{ 10.88.0.0/16, 10.90.0.0/15 }"
    assert f"ip saddr {inside} ip daddr != {inside} masquerade" in rules
    assert "table ip vmactor_my_br_0 {" in rules
