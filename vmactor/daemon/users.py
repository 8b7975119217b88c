"""Who connects, what he may have, and what he has: one ``User`` for all connections of a user.

The kernel says who it is. Root and the user that the daemon runs as have no quotas: they could do without the
daemon whatever it does for them.
"""

import errno
import math
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any, Final

from vmactor.errors import ResourceExhaustedError, SecurityError
from vmactor.messages import Requester
from vmactor.rpc.files import Room

HELD_FILES: Final = 1024
"""Descriptors of a user's messages and calls that have not ended."""

_PEER: Final = struct.Struct("iII")  # struct ucred: process, user, group
_SO_PEERGROUPS: Final = 59  # asm-generic/socket.h
_GROUPS_ROOM: Final = 1024
"""Bytes; the most that ``getsockopt`` takes, and 256 groups."""


def requester_of(sock: socket.socket) -> Requester:
    """The process at the other end of a unix socket, as it was when it connected.

    Who has more than 256 groups is taken for one who has none, which gives him less.

    Raises:
        OSError: The kernel does not tell.
    """
    pid, uid, gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_ROOM)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = b""
    return Requester(uid, gid, tuple(group for (group,) in struct.iter_unpack("I", groups)), pid)


def identity(requester: Requester) -> Requester:
    """With whose rights the VMs of a client run.

    Root and the daemon's own user are the daemon, as far as rights go, whatever groups their process has.
    """
    if requester.uid not in (0, os.geteuid()):
        return requester
    return Requester(os.geteuid(), os.getegid(), tuple(os.getgroups()), requester.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """What a user may have; root and the daemon's own user are not bound by it.

    Attributes:
        connections: Connections at a time.
        vms: VMs at a time.
        memory_mib: Memory of all his VMs; None for no bound.
        subscriptions: Subscriptions at a time.
        keep: Whether he may have VMs that outlive the connection which created them.
    """

    connections: int = 64
    vms: int = 64
    memory_mib: int | None = None
    subscriptions: int = 256
    keep: bool = False

    def on_wire(self) -> dict[str, Any]:
        """As ``hello`` tells them; without those that do not bind."""
        rows = {
            "connections": self.connections,
            "vms": self.vms,
            "memoryMib": self.memory_mib,
            "subscriptions": self.subscriptions,
        }
        return {name: limit for name, limit in rows.items() if limit is not None and limit < _NO_LIMIT}


_NO_LIMIT: Final = 1 << 30
_PRIVILEGED: Final = Quotas(connections=_NO_LIMIT, vms=_NO_LIMIT, subscriptions=_NO_LIMIT, keep=True)


class User:
    """A user of the daemon, while he is connected or has VMs.

    Attributes:
        uid: Who.
        privileged: Whether he is root or the daemon's own user.
        quotas: What he may have.
        connections: How many he has.
        vms: His VMs, those included that are being created.
        memory_mib: Their memory.
        subscriptions: How many he has.
        room: For descriptors that he sent.
    """

    def __init__(self, uid: int, quotas: Quotas) -> None:
        self.uid = uid
        self.privileged = uid in (0, os.geteuid())
        self.quotas = _PRIVILEGED if self.privileged else quotas
        self.connections = 0
        self.vms = 0
        self.memory_mib = 0
        self.subscriptions = 0
        self.room = Room(_NO_LIMIT if self.privileged else HELD_FILES)

    @property
    def idle(self) -> bool:
        """Whether nothing of him is here."""
        return not (self.connections or self.vms)

    def connect(self) -> None:
        """Count one more connection. Raises ResourceExhaustedError."""
        if self.connections >= self.quotas.connections:
            raise ResourceExhaustedError(
                f"user {self.uid} has {self.connections} connections, and may have no more; close some"
            )
        self.connections += 1

    def check_keep(self) -> None:
        """Raise SecurityError if he may not have VMs that outlive their connection."""
        if not self.quotas.keep:
            raise SecurityError(
                f"user {self.uid} may not have VMs that outlive their connection: leave 'keep' out, or have "
                "it allowed in the daemon's configuration"
            )

    def add_vm(self, memory_mib: int) -> None:
        """Count one more VM, before it is created. Raises ResourceExhaustedError."""
        if self.vms >= self.quotas.vms:
            raise ResourceExhaustedError(
                f"user {self.uid} has {self.vms} VMs, and may have no more; end some"
            )
        limit = self.quotas.memory_mib
        if self.memory_mib + memory_mib > (math.inf if limit is None else limit):
            raise ResourceExhaustedError(
                f"user {self.uid} has VMs of {self.memory_mib} MiB, and may have {limit} MiB; {memory_mib} "
                "MiB more were asked for: end some, or ask for less"
            )
        self.vms += 1
        self.memory_mib += memory_mib

    def remove_vm(self, memory_mib: int) -> None:
        """One is gone, or was not to be had."""
        self.vms -= 1
        self.memory_mib -= memory_mib

    def subscribe(self) -> None:
        """Count one more subscription. Raises ResourceExhaustedError."""
        if self.subscriptions >= self.quotas.subscriptions:
            raise ResourceExhaustedError(
                f"user {self.uid} has {self.subscriptions} subscriptions, and may have no more; end some"
            )
        self.subscriptions += 1


class Users:
    """Everybody who is here.

    Args:
        quotas: For each of them.
    """

    def __init__(self, quotas: Quotas) -> None:
        self.quotas = quotas
        self._users: dict[int, User] = {}

    @property
    def connections(self) -> int:
        """How many all of them have."""
        return sum(user.connections for user in self._users.values())

    def change_quotas(self, quotas: Quotas) -> None:
        """Let each have so much from now on; what somebody has too much of stays his."""
        self.quotas = quotas
        for user in self._users.values():
            if not user.privileged:
                user.quotas = quotas

    def get(self, uid: int) -> User:
        """A user, known or new; those of whom nothing is left are forgotten."""
        user = self._users.get(uid)
        if user is None:
            self._users = {uid: user for uid, user in self._users.items() if not user.idle}
            user = self._users[uid] = User(uid, self.quotas)
        return user
