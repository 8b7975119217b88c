"""The socket that a daemon listens on: its directory, its name, and who else might have it.

A lock file beside the socket says whose name it is; the kernel gives the lock back when the daemon dies,
however it dies. So only the lock's owner removes a socket that somebody left.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from vmactor.errors import IllegalArgumentError, IllegalStateError, ResourceExhaustedError
from vmactor.protocol import address
from vmactor.state_dir import SUN_PATH

BACKLOG: Final = 128
NEW: Final = ".new"
"""Ends the name of a socket that does not listen yet: one that has its right name can be used."""


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a unix socket; at the end its name is gone.

    Root's daemon can be reached by every user; what he may do is another matter. Any other only by its own
    user and root, since it cannot run VMs for others.

    Raises:
        IllegalArgumentError: The path is too long for a socket.
        IllegalStateError: Another daemon listens there.
        ResourceExhaustedError: The directory, the lock or the socket cannot be made.
    """
    if len(os.fsencode(path)) > SUN_PATH - len(NEW):
        raise IllegalArgumentError(f"{path} is too long for a socket: {SUN_PATH - len(NEW)} bytes at most")
    with ExitStack() as stack:
        try:
            listener = _listen(path, stack)
        except OSError as error:
            raise ResourceExhaustedError(f"cannot listen on {path}: {error}") from error
        yield listener


def _listen(path: Path, stack: ExitStack) -> socket.socket:
    shared = os.geteuid() == 0
    path.parent.mkdir(mode=0o711 if shared else 0o700, parents=True, exist_ok=True)
    if path == address.SYSTEM and shared:
        # It may be there already, as the state directory. That shows nothing to who passes through.
        path.parent.chmod(0o711)
    stack.enter_context(_locked(path))
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.setblocking(False)
    unready = path.with_name(f"{path.name}{NEW}")
    unready.unlink(missing_ok=True)
    listener.bind(os.fspath(unready))
    unready.chmod(0o666 if shared else 0o600)
    listener.listen(BACKLOG)
    unready.rename(path)
    stack.callback(path.unlink, missing_ok=True)
    return listener


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise IllegalStateError(
                f"a daemon listens on {path} already: use it, or name another socket with --socket"
            ) from None
        yield
    finally:
        os.close(lock)
