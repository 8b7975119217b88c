"""NAT for a bridge of ours, by ``nft``: one table, made and removed in one transaction each.

The program and not the library: one call with a text that a person can read and try, atomic as a whole, and
nothing to keep in step with the kernel's encoding.
"""

import ipaddress
import os
import subprocess
from pathlib import Path
from typing import Final

from vmactor.errors import ServiceSpecificError, UnsupportedOperationError

FORWARDING: Final = Path("/proc/sys/net/ipv4/ip_forward")
SECONDS: Final = 10.0


def ruleset(bridge: str, networks: tuple[ipaddress.IPv4Network, ...]) -> str:
    """What nftables is told: what guests send elsewhere leaves under the host's address. Pure."""
    inside = ", ".join(map(str, networks))
    return f"""\
table ip {table(bridge)}
delete table ip {table(bridge)}
table ip {table(bridge)} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {{ {inside} }} ip daddr != {{ {inside} }} masquerade
  }}
}}
"""


def table(bridge: str) -> str:
    """The name of the table; nftables knows fewer letters than interfaces."""
    return "vmactor_" + "".join(letter if letter.isalnum() else "_" for letter in bridge)


def switch_on(bridge: str, networks: tuple[ipaddress.IPv4Network, ...]) -> None:
    """Make the table, or make it anew.

    Raises:
        UnsupportedOperationError: There is no ``nft``, the kernel lacks NAT, or the host forwards nothing.
        ServiceSpecificError: ``nft`` refused.
    """
    if FORWARDING.read_text().strip() != "1":
        raise UnsupportedOperationError(
            "NAT for guests needs a host that forwards: 'sysctl net.ipv4.ip_forward=1', or switch NAT off"
        )
    _nft(ruleset(bridge, networks))


def switch_off(bridge: str) -> None:
    """Remove the table, if there is one. Raises as ``switch_on``, for want of ``nft`` never."""
    try:
        _nft(f"table ip {table(bridge)}\ndelete table ip {table(bridge)}\n")
    except UnsupportedOperationError:
        return


def _nft(text: str) -> None:
    try:
        done = subprocess.run(
            ["nft", "-f", "-"],  # noqa: S607 - wherever the distribution put it
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            env={"PATH": f"/usr/sbin:/sbin:{os.environ.get('PATH', '/usr/bin:/bin')}"},
        )
    except FileNotFoundError:
        raise UnsupportedOperationError(
            "NAT for guests needs the program nft: install the package nftables, or switch NAT off"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceSpecificError(f"nft cannot be run: {error}") from error
    if done.returncode:
        said = done.stderr.strip()[:500]
        raise ServiceSpecificError(f"nftables refused NAT for guests, maybe for want of a module: {said}")
