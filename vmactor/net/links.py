"""Taps and bridges: the kernel's part, by ioctl and netlink. Synchronous, for a worker thread.

A tap is not persistent: it lives as long as somebody has its descriptor open, so the VMM's end is its own. A
tap and a bridge are ours if their alias says so; no other is ever changed or removed.
"""

import errno
import fcntl
import ipaddress
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vmactor.errors import (
    IllegalArgumentError,
    IllegalStateError,
    ResourceExhaustedError,
    ServiceSpecificError,
    UnsupportedOperationError,
    VmactorError,
    hint,
)

TUN: Final = "/dev/net/tun"
CAP_NET_ADMIN: Final = 12
MARK: Final = "vmactor"
"""The first word of the alias of each interface of ours; the last one is whose it is."""

_TUNSETIFF: Final = 0x400454CA
_TUNSETVNETHDRSZ: Final = 0x400454D8
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000
_VNET_HEADER: Final = 12
"""Bytes of ``virtio_net_hdr_v1``, which both VMMs use."""
_EXFULL: Final = errno.EXFULL
_ROOT_QDISC: Final = 0xFFFFFFFF
_INGRESS: Final = 0xFFFF0000
_LATENCY: Final = "50ms"


def check_host() -> None:
    """Check that this process can make taps.

    Raises:
        UnsupportedOperationError: It cannot; the message says what is missing.
    """
    if not Path(TUN).exists():
        raise UnsupportedOperationError(f"network: there is no {TUN}; load the module ('modprobe tun')")
    if not has_net_admin():
        raise UnsupportedOperationError(
            "network: this process lacks the capability CAP_NET_ADMIN; run it as root, or give it that "
            "(AmbientCapabilities=CAP_NET_ADMIN for a service)"
        )
    if not os.access(TUN, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UnsupportedOperationError(f"network: this user may not open {TUN}; give it access")


def has_net_admin() -> bool:
    """Whether this thread may change interfaces."""
    status = Path("/proc/thread-self/status").read_text()
    return bool(int(status.partition("\nCapEff:")[2].split()[0], 16) >> CAP_NET_ADMIN & 1)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn what the kernel refuses into errors of ours, which begin with what was to be done."""
    try:
        yield
    except NetlinkError as error:
        raise _error(what, error.code) from error
    except OSError as error:
        raise _error(what, error.errno or 0) from error


def _error(what: str, number: int) -> VmactorError:  # noqa: PLR0911 - a table
    reason = f"{what}: {os.strerror(number)}"
    match number:
        case errno.EPERM | errno.EACCES:
            return UnsupportedOperationError(
                f"{reason}; this process needs the capability CAP_NET_ADMIN, and a writable {TUN}"
            )
        case errno.EEXIST:
            return IllegalStateError(f"{reason}; remove what is there, or use another name or address")
        case errno.ENODEV:
            return IllegalArgumentError(f"{reason}; there is no such interface: make it, or name another one")
        case errno.EOPNOTSUPP | errno.ENOENT | errno.ENXIO:
            return UnsupportedOperationError(f"{reason}; this kernel lacks the module for it")
        case number if number == _EXFULL:
            return ResourceExhaustedError(f"{reason}; a bridge has at most 1023 ports: use another one")
        case errno.EBUSY | errno.ENOBUFS | errno.ENOMEM | errno.EAGAIN | errno.ETIMEDOUT:
            return ResourceExhaustedError(f"{reason}; the kernel is busy or out of memory: try again")
        case _:
            return ServiceSpecificError(f"{reason}{hint(OSError(number, os.strerror(number)))}")


def open_tap(name: str) -> int:
    """Make a tap that nobody had; returns its descriptor, with whose last copy it goes.

    Raises:
        IllegalStateError: There is an interface of that name.
        UnsupportedOperationError: This process may not, or the host has none.
        ResourceExhaustedError: No descriptor or no memory.
    """
    what = f"cannot make the tap {name}"
    with telling(what):
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    try:
        with telling(what):
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER))
    except ResourceExhaustedError as error:
        os.close(fd)
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EBUSY:
            raise IllegalStateError(
                f"{what}: there is an interface of that name; remove it, or use another name"
            ) from error
        raise
    except BaseException:
        os.close(fd)
        raise
    return fd


class Links:
    """A conversation with the kernel about interfaces; use it in a ``with`` block.

    Its methods raise what ``telling`` makes of refusals.
    """

    def __init__(self) -> None:
        with telling("cannot speak netlink"):
            self._netlink = IPRoute()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()

    def find(self, name: str) -> dict[str, Any] | None:
        """An interface by its name, as netlink tells of it; None if there is none."""
        try:
            (found,) = self._netlink.link("get", ifname=name)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise _error(f"cannot look at the interface {name}", error.code) from error
        return {"index": found["index"], **dict(found["attrs"])}

    def index(self, name: str) -> int:
        """The number of an interface. Raises IllegalArgumentError if there is none."""
        if (found := self.find(name)) is None:
            raise IllegalArgumentError(f"there is no interface {name}; make it, or name another one")
        return int(found["index"])

    def set_up_tap(self, name: str, alias: str, mtu: int) -> int:
        """Mark a tap of ours and bring it up, silent: it has no IPv6 of its own. Returns its number."""
        with telling(f"cannot set up the tap {name}"):
            index = self.index(name)
            self._netlink.link("set", index=index, ifalias=alias, mtu=mtu)
            switch_off_ipv6(name)
            self._netlink.link("set", index=index, state="up")
        return index

    def add_port(self, name: str, index: int, bridge: str, *, isolated: bool) -> None:
        """Make an interface a port of a bridge."""
        with telling(f"cannot add {name} to the bridge {bridge}"):
            found = self.find(bridge)
            if found is None or _kind(found) != "bridge":
                raise IllegalArgumentError(f"there is no bridge {bridge}; make it, or name another one")
            self._netlink.link("set", index=index, master=found["index"])
            if isolated:
                self._netlink.brport("set", index=index, isolated=1)

    def add_address(self, index: int, address: ipaddress.IPv4Interface) -> None:
        """Give the host an address on an interface."""
        with telling(f"cannot give the host the address {address}"):
            self._netlink.addr(
                "add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen
            )

    def limit_rates(self, name: str, index: int, *, to_guest: int | None, from_guest: int | None) -> None:
        """Limit what goes through a tap, in kilobits per second each way."""
        if to_guest is not None:
            with telling(f"cannot limit the rate towards the guest on {name} (sch_tbf)"):
                self._netlink.tc(
                    "add", "tbf", index, handle=0x10000, parent=_ROOT_QDISC,
                    rate=to_guest * 125, burst=_burst(to_guest), latency=_LATENCY,
                )  # fmt: skip
        if from_guest is not None:
            with telling(f"cannot limit the rate from the guest on {name} (sch_ingress, matchall, police)"):
                self._netlink.tc("add", "ingress", index, handle=_INGRESS)
                police = {
                    "kind": "police", "rate": from_guest * 125, "burst": _burst(from_guest), "action": "drop",
                }  # fmt: skip
                self._netlink.tc("add-filter", "matchall", index, parent=_INGRESS, prio=1, action=police)

    # -- Bridges of ours -----------------------------------------------------------------------------

    def make_bridge(self, name: str, alias: str, mac: str, address: ipaddress.IPv4Interface) -> None:
        """Make our bridge, or find it as we made it; after an error it is as it was before.

        Raises:
            IllegalStateError: Something of that name is not ours.
        """
        found = self.find(name)
        if found is not None:
            if _kind(found) != "bridge" or found.get("IFLA_IFALIAS") != alias:
                raise IllegalStateError(
                    f"there is an interface {name} which this service did not make; use another name for the "
                    "service's bridge, or remove that one"
                )
            if self.has_address(found["index"], address):  # else its maker was killed in the middle
                return
            self.remove(name, alias)
        with telling(f"cannot make the bridge {name}"):
            self._netlink.link("add", ifname=name, kind="bridge", address=mac, br_forward_delay=0)
            index = self.index(name)
            try:
                self._netlink.link("set", index=index, ifalias=alias)
                switch_off_ipv6(name)
                self._netlink.link("set", index=index, state="up")
                self.add_address(index, address)
            except BaseException:
                self._netlink.link("del", index=index)
                raise

    def has_address(self, index: int, address: ipaddress.IPv4Interface) -> bool:
        """Whether the host has an address on an interface."""
        with telling("cannot look at addresses"):
            return any(
                dict(one["attrs"]).get("IFA_ADDRESS") == str(address.ip)
                for one in self._netlink.get_addr(index=index)
            )

    def ours(self, place: str) -> dict[str, str]:
        """The interfaces that carry a mark of this place, with their marks."""
        with telling("cannot look at the interfaces"):
            known = (dict(link["attrs"]) for link in self._netlink.get_links())
            return {
                one["IFLA_IFNAME"]: alias
                for one in known
                if (alias := one.get("IFLA_IFALIAS") or "").startswith(f"{MARK} ")
                and alias.endswith(f" {place}")
            }

    def is_unused(self, name: str, alias: str) -> bool:
        """Whether a bridge of ours is there and has no port."""
        found = self.find(name)
        if found is None or found.get("IFLA_IFALIAS") != alias or _kind(found) != "bridge":
            return False
        with telling(f"cannot look at the ports of {name}"):
            return not any(True for _ in self._netlink.get_links(master=found["index"]))

    def remove(self, name: str, alias: str) -> bool:
        """Remove an interface of ours; whether there was one with that mark."""
        found = self.find(name)
        if found is None or found.get("IFLA_IFALIAS") != alias:
            return False
        with telling(f"cannot remove {name}"):
            try:
                self._netlink.link("del", index=found["index"])
            except NetlinkError as error:
                if error.code != errno.ENODEV:
                    raise
        return True


def _kind(found: dict[str, Any]) -> str | None:
    info = found.get("IFLA_LINKINFO")
    return dict(info["attrs"]).get("IFLA_INFO_KIND") if info is not None else None


def _burst(kbit: int) -> int:
    """A bucket for a hundredth of a second, and for some full packets at least."""
    return max(16 * 1024, kbit * 125 // 100)


def switch_off_ipv6(name: str) -> None:
    """The host says and hears nothing by IPv6 there; only a kernel without it has no such switch."""
    with suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
