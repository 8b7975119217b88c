"""The network interfaces of a VM, as its configuration asks for them. Pure data and rules.

``network: true`` of the reference's later versions (``networkSupported``) is one interface with all defaults.
What it becomes on a host is the business of ``vmactor.net``; ``docs/networking.md`` is the page for users.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmactor.errors import IllegalArgumentError, UnsupportedOperationError
from vmactor.text import escape

MAX_INTERFACES: Final = 6
"""As many as QEMU has functions left for them on the bus beside the largest number of disks."""
MAX_NAME: Final = 15
"""Longest name of an interface in bytes (``IFNAMSIZ`` less the NUL)."""
MIN_MTU: Final = 576
MAX_MTU: Final = 65521
MAX_KBIT: Final = 34_000_000
"""What the kernel's token bucket can be told without its newer 64-bit form."""

_MAC: Final = re.compile("[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")
# No '%': the kernel would put a number in its place. No ':' and '/': they have meanings of their own.
_NAME: Final = re.compile("[A-Za-z0-9_.-]+")


class NetworkMode(StrEnum):
    """How an interface reaches the host: as a port of a bridge, or alone, by a route."""

    BRIDGE = "bridge"
    ROUTED = "routed"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkInterface:
    """A network interface that a VM shall have.

    Attributes:
        mode: ``bridge`` or ``routed``; a routed one shares its two-address network with the host only.
        bridge: A bridge of the host that is there already; without one it is vmactor's own.
        name: The tap's name on the host, of 1 to 15 bytes; made up of the CID without one.
        mac: The guest's, as ``02:00:00:00:00:01``; derived from host, CID and place without one.
        mtu: Bytes of a packet, 576 to 65521.
        address: The guest's IPv4 address with its prefix length, as ``10.88.0.7/16``. Without one it follows
            from the CID, except on a bridge that is not vmactor's: there the guest finds its own.
        gateway: The guest's default gateway; the host's own address without one, where it has one.
        isolated: Whether the guest reaches the host, but no other isolated guest of the same bridge.
        to_guest_kbit: Most kilobits per second towards the guest; unlimited without one.
        from_guest_kbit: The same from the guest.
        configure_guest: Whether the address is put into the guest's kernel parameters as ``ip=``.
    """

    mode: NetworkMode = NetworkMode.BRIDGE
    bridge: str | None = None
    name: str | None = None
    mac: str | None = None
    mtu: int = 1500
    address: str | None = None
    gateway: str | None = None
    isolated: bool = False
    to_guest_kbit: int | None = None
    from_guest_kbit: int | None = None
    configure_guest: bool = True

    def check(self) -> None:
        """Check all that can be judged without looking at the host.

        Raises:
            IllegalArgumentError: A value that can never be right; the message names the field.
        """
        if self.mode not in tuple(NetworkMode):
            raise IllegalArgumentError('mode: must be "bridge" or "routed"')
        for what, name in (("bridge", self.bridge), ("name", self.name)):
            if name is not None:
                check_interface_name(what, name)
        if self.mac is not None:
            check_mac(self.mac)
        _check_number("mtu", self.mtu, MIN_MTU, MAX_MTU)
        for what, rate in (("to_guest_kbit", self.to_guest_kbit), ("from_guest_kbit", self.from_guest_kbit)):
            if rate is not None:
                _check_number(what, rate, 8, MAX_KBIT)
        if type(self.isolated) is not bool or type(self.configure_guest) is not bool:
            raise IllegalArgumentError("isolated and configure_guest must be True or False")
        network = None if self.address is None else check_address(self.address)
        if self.gateway is not None:
            _check_gateway(self.gateway, network)
        if self.mode is NetworkMode.ROUTED:
            self._check_routed(network)

    def _check_routed(self, network: ipaddress.IPv4Interface | None) -> None:
        for what in ("bridge", "gateway"):
            if getattr(self, what) is not None:
                raise IllegalArgumentError(f"{what}: a routed interface has none; leave it out")
        if self.isolated:
            raise IllegalArgumentError("isolated: a routed interface is alone with the host; leave it out")
        if network is not None and network.network.prefixlen != 31:
            raise IllegalArgumentError(
                f"address: {network} must have the prefix length 31: one address for the guest, the "
                "other one for the host"
            )


def as_interfaces(network: bool | Iterable[NetworkInterface]) -> tuple[NetworkInterface, ...]:
    """What a caller may give as ``network``: whether there is one, or which there are.

    Raises:
        IllegalArgumentError: It is neither.
    """
    if isinstance(network, bool):
        return (NetworkInterface(),) if network else ()
    try:
        interfaces = tuple(network)
    except TypeError:
        interfaces = (None,)  # type: ignore[assignment]
    if not all(isinstance(interface, NetworkInterface) for interface in interfaces):
        raise IllegalArgumentError("network must be True, False or a list of NetworkInterface")
    return interfaces


def check_interfaces(interfaces: tuple[NetworkInterface, ...], *, protected_vm: bool) -> None:
    """Check a VM's interfaces, each and together.

    Raises:
        IllegalArgumentError: As ``NetworkInterface.check``; too many; two of the same name, MAC or address,
            or two whose address would follow from the CID.
        UnsupportedOperationError: A protected VM has no network, as in the reference.
    """
    if interfaces and protected_vm:
        raise UnsupportedOperationError(
            "network: not supported for protected VMs; leave it out, or set protected_vm to false"
        )
    if len(interfaces) > MAX_INTERFACES:
        raise IllegalArgumentError(f"network: at most {MAX_INTERFACES} are possible, not {len(interfaces)}")
    seen: set[tuple[str, object]] = set()
    for i, interface in enumerate(interfaces):
        try:
            interface.check()
        except IllegalArgumentError as error:
            raise IllegalArgumentError(f"network[{i}].{error}") from None
        keys: list[tuple[str, object]] = []
        if interface.name is not None:
            keys.append(("name", interface.name))
        if interface.mac is not None:
            keys.append(("mac", interface.mac.lower()))
        if interface.address is not None:
            keys.append(("address", ipaddress.IPv4Interface(interface.address).ip))
        elif interface.bridge is None:
            keys.append(("address (without one it follows from the CID, once for each mode)", interface.mode))
        for what, value in keys:
            if (what, value) in seen:
                raise IllegalArgumentError(f"network[{i}]: has the same {what} as another one; change it")
            seen.add((what, value))


def check_interface_name(what: str, name: object) -> None:
    """Check the name of an interface of the host. Raises IllegalArgumentError, which begins with ``what``."""
    if isinstance(name, str) and len(name.encode(errors="replace")) > MAX_NAME:
        raise IllegalArgumentError(
            f"{what}: {escape(name, limit=100)!r} has more than {MAX_NAME} bytes; use a shorter name"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in {".", ".."}:
        raise IllegalArgumentError(
            f"{what}: {escape(str(name), limit=100)!r} is no name of an interface; use 1 to {MAX_NAME} of "
            "A-Z, a-z, 0-9, '_', '.' and '-'"
        )


def check_mac(mac: object) -> None:
    """Check a guest's MAC. Raises IllegalArgumentError."""
    if not isinstance(mac, str) or not _MAC.fullmatch(mac):
        raise IllegalArgumentError(
            f"mac: {escape(str(mac), limit=100)!r} is none; write six bytes as 02:00:00:00:00:01"
        )
    if int(mac[:2], 16) & 1 or int(mac.replace(":", ""), 16) == 0:
        raise IllegalArgumentError(
            f"mac: {mac} is no address of one interface; its first byte must be even, and not all be zero"
        )


def check_address(address: object) -> ipaddress.IPv4Interface:
    """Read a guest's address. Raises IllegalArgumentError."""
    try:
        if not isinstance(address, str) or "/" not in address:
            raise ValueError
        interface = ipaddress.IPv4Interface(address)
    except ValueError:
        raise IllegalArgumentError(
            f"address: {escape(str(address), limit=100)!r} is no IPv4 address with a prefix length, such as "
            "10.88.0.7/16"
        ) from None
    ip, network = interface.ip, interface.network
    ends = {network.network_address, network.broadcast_address} if network.prefixlen < 31 else set()
    if ip in ends or ip.is_multicast or ip.is_loopback or ip.is_unspecified:
        raise IllegalArgumentError(f"address: {interface} is none that a guest can have; use another one")
    return interface


def _check_gateway(gateway: object, network: ipaddress.IPv4Interface | None) -> None:
    try:
        address = ipaddress.IPv4Address(gateway) if isinstance(gateway, str) else None
    except ValueError:
        address = None
    if address is None:
        raise IllegalArgumentError(f"gateway: {escape(str(gateway), limit=100)!r} is no IPv4 address")
    if network is None or address not in network.network or address == network.ip:
        raise IllegalArgumentError(
            f"gateway: {address} must be another address of the guest's network; give the address, too"
        )


def _check_number(what: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise IllegalArgumentError(f"{what}: must be a whole number of {least} to {most}, not {value!r:.40}")
