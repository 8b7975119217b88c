"""Where the daemon's socket is, unless somebody says otherwise."""

import os
from pathlib import Path
from typing import Final

from vmactor.errors import IllegalArgumentError

VARIABLE: Final = "VMACTOR_SOCKET"
"""The environment variable that names the socket for clients."""
SYSTEM: Final = Path("/run/vmactor/vmactor.sock")
"""The socket of root's daemon, which all users of the host may reach."""


def own_socket() -> Path:
    """Where this user's own daemon listens.

    Raises:
        IllegalArgumentError: Not root, and no XDG_RUNTIME_DIR.
    """
    if os.geteuid() == 0:
        return SYSTEM
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise IllegalArgumentError("XDG_RUNTIME_DIR is not set: set it, or name the socket")
    return Path(runtime) / "vmactor" / SYSTEM.name


def socket_to_use() -> Path:
    """Where a client looks for a daemon: ``$VMACTOR_SOCKET``, else this user's own, else root's."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if os.environ.get("XDG_RUNTIME_DIR") and (own := own_socket()).exists():
        return own
    return SYSTEM


def socket_to_serve() -> Path:
    """Where a daemon is to listen: as ``own_socket``, or in the directory that systemd made for it."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(given) / SYSTEM.name if given else own_socket()
