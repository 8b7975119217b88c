"""Where a daemon's socket is, unless somebody says otherwise."""

import os
from pathlib import Path
from typing import Final

VARIABLE: Final = "VMACTOR_SOCKET"
SYSTEM: Final = Path("/run/vmactor.sock")
"""The socket of root's daemon; not in root's state directory, which nobody else may enter."""
_NAME: Final = "vmactor.sock"


def own_socket() -> Path | None:
    """Where a daemon of this user listens; None if there is no such place, without ``XDG_RUNTIME_DIR``."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if os.geteuid() == 0:
        return SYSTEM
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / _NAME if runtime else None


def default_socket() -> Path:
    """Where a client looks for a daemon: ``$VMACTOR_SOCKET``, else this user's own, else root's."""
    own = own_socket()
    if own is not None and (VARIABLE in os.environ or own.exists()):
        return own
    return SYSTEM
