"""What interfaces become on a host: names, MACs, addresses and kernel parameters. Pure.

A CID is one VM's on the host, so all that has to be unique follows from it. The first 256 addresses of a
bridge's network are left to those who choose addresses themselves; the first of them is the host's.
"""

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vmactor.cid import FIRST
from vmactor.errors import IllegalArgumentError
from vmactor.messages import NetworkLink
from vmactor.network_config import MAX_NAME, NetworkInterface, NetworkMode, check_interface_name

CHOSEN: Final = 256
"""Addresses at the beginning of a bridge's network that follow from no CID."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkPolicy:
    """How a service's VMs are connected to its host.

    Attributes:
        bridge: Name of the service's own bridge, made when the first VM needs it, gone with the last one.
        subnet: Its network, of 16 bits or less for the prefix; the host has its first address.
        routed: Where the two-address networks of routed interfaces are from, of 15 bits or less.
        nat: Whether guests reach what the host reaches, under the host's addresses. It takes ``nft``, and
            forwarding switched on.
    """

    bridge: str = "vmactor0"
    subnet: str = "10.88.0.0/16"
    routed: str = "10.90.0.0/15"
    nat: bool = False

    def __post_init__(self) -> None:
        check_interface_name("bridge", self.bridge)
        for what, most in (("subnet", 16), ("routed", 15)):
            try:
                network = ipaddress.IPv4Network(getattr(self, what))
            except (ValueError, TypeError):
                raise IllegalArgumentError(
                    f"{what}: {getattr(self, what)!r:.100} is no IPv4 network, such as 10.88.0.0/16"
                ) from None
            if network.prefixlen > most:
                raise IllegalArgumentError(
                    f"{what}: {network} has too few addresses for all CIDs; use a prefix of {most} or less"
                )
        if self.network.overlaps(self.routed_network):
            raise IllegalArgumentError("subnet and routed overlap; use networks that do not")

    @property
    def network(self) -> ipaddress.IPv4Network:
        """The bridge's network."""
        return ipaddress.IPv4Network(self.subnet)

    @property
    def routed_network(self) -> ipaddress.IPv4Network:
        """Where routed interfaces' networks are from."""
        return ipaddress.IPv4Network(self.routed)

    @property
    def host(self) -> ipaddress.IPv4Interface:
        """The host's address on the bridge."""
        return ipaddress.IPv4Interface((self.network[1], self.network.prefixlen))


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An interface as it shall be on this host.

    Attributes:
        name: The tap's name.
        bridge: Whose port it is; None for a routed one.
        own_bridge: Whether that bridge is vmactor's.
        mac: The guest's.
        address: The guest's, if it is known.
        host: The host's on the tap itself, of a routed one.
        gateway: The guest's default gateway, if it is known.
        asked: What else was asked for.
    """

    name: str
    bridge: str | None
    own_bridge: bool
    mac: str
    address: ipaddress.IPv4Interface | None
    host: ipaddress.IPv4Interface | None
    gateway: ipaddress.IPv4Address | None
    asked: NetworkInterface

    @property
    def told(self) -> NetworkLink:
        """What people and programs are told of it."""
        address = None if self.address is None else str(self.address)
        return NetworkLink(name=self.name, mac=self.mac, bridge=self.bridge, address=address)


def plan(
    interfaces: Iterable[NetworkInterface], cid: int, policy: NetworkPolicy, *, place: str, host_id: str
) -> tuple[Link, ...]:
    """What a VM's interfaces become.

    Args:
        interfaces: As they are asked for; checked already.
        cid: The VM's.
        policy: The service's.
        place: Tells this service's taps from those of services with another state directory.
        host_id: Tells this host's MACs from other hosts'.

    Raises:
        IllegalArgumentError: An address that does not fit the bridge's network.
    """
    return tuple(_link(interface, i, cid, policy, place, host_id) for i, interface in enumerate(interfaces))


def _link(  # noqa: PLR0917 - the same as plan's
    asked: NetworkInterface, number: int, cid: int, policy: NetworkPolicy, place: str, host_id: str
) -> Link:
    address = None if asked.address is None else ipaddress.IPv4Interface(asked.address)
    gateway = None if asked.gateway is None else ipaddress.IPv4Address(asked.gateway)
    bridge, host = asked.bridge, None
    own = asked.mode is NetworkMode.BRIDGE and bridge in (None, policy.bridge)
    if own:
        bridge = policy.bridge
        address = _own_address(address, number, policy) if address else _address_of(cid, policy)
        gateway = gateway or policy.host.ip
    elif asked.mode is NetworkMode.ROUTED:
        if address is None:
            address = ipaddress.IPv4Interface((policy.routed_network[2 * (cid - FIRST) + 1], 31))
        gateway = next(one for one in address.network if one != address.ip)
        host = ipaddress.IPv4Interface((gateway, 31))
    return Link(
        name=asked.name or tap_name(place, cid, number),
        bridge=bridge,
        own_bridge=own,
        mac=asked.mac or derived_mac(host_id, cid, number),
        address=address,
        host=host,
        gateway=gateway,
        asked=asked,
    )


def _address_of(cid: int, policy: NetworkPolicy) -> ipaddress.IPv4Interface:
    return ipaddress.IPv4Interface((policy.network[CHOSEN + cid - FIRST], policy.network.prefixlen))


def _own_address(
    address: ipaddress.IPv4Interface, number: int, policy: NetworkPolicy
) -> ipaddress.IPv4Interface:
    network = policy.network
    if address.network != network or not 2 <= int(address.ip) - int(network[0]) < CHOSEN:
        raise IllegalArgumentError(
            f"network[{number}].address: {address} is not to be chosen on {policy.bridge}; use one of "
            f"{network[2]} to {network[CHOSEN - 1]} with the prefix length {network.prefixlen}, or none"
        )
    return address


def tap_name(place: str, cid: int, number: int) -> str:
    """Name of a tap: at most 15 bytes, and no other service's on this host."""
    name = f"v{hashlib.blake2b(place.encode(), digest_size=3).hexdigest()}-{cid}.{number}"
    assert len(name) <= MAX_NAME, name  # noqa: S101 - CIDs have at most five digits
    return name


def derived_mac(host_id: str, cid: int, number: int) -> str:
    """A locally administered MAC: the same in every run of a VM, another for every other VM."""
    digest = hashlib.blake2b(f"{host_id} {cid} {number}".encode(), digest_size=5).digest()
    return f"02:{digest.hex(':')}"


def kernel_parameters(links: Iterable[Link]) -> str:
    """What tells a guest its addresses: ``ip=`` as the kernel's own autoconfiguration reads it."""
    words = []
    for i, link in enumerate(links):
        if link.address is not None and link.asked.configure_guest:
            gateway = "" if i or link.gateway is None else link.gateway  # one default route is enough
            words.append(f"ip={link.address.ip}::{gateway}:{link.address.netmask}::eth{i}:off")
    return " ".join(words)


def alias_of(place: str, what: str) -> str:
    """The mark on an interface of ours: what for, and whose it is."""
    return f"vmactor {what} {place}"
