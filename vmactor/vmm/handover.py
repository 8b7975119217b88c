"""What all drivers do to hand files to a VMM and to have a control socket with it."""

import fcntl
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmactor.config import RawConfig
from vmactor.errors import StartFailedError

SOCKET_PATH_LIMIT: Final = 107
"""Longest path of a unix socket, in bytes."""


def proc_path(fd: int) -> str:
    """The name by which a process can refer to a descriptor that it inherits."""
    return f"/proc/self/fd/{fd}"


def reopen(fd: int, stack: ExitStack) -> int:
    """A read-only descriptor of the same file with an offset of its own; closed by ``stack``.

    Raises:
        OSError: We may not read the file, or have no descriptor left.
    """
    fd = os.open(proc_path(fd), os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def read_only(config: RawConfig, stack: ExitStack) -> RawConfig:
    """Give each read-only disk and partition a descriptor that is read-only, too.

    Raises:
        OSError: As ``reopen``.
    """

    def fitting(fd: int, *, writable: bool) -> int:
        if writable or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return fd
        return reopen(fd, stack)

    disks = []
    for disk in config.disks:
        image = None if disk.image is None else fitting(disk.image, writable=disk.writable)
        parts = tuple(
            replace(part, image=fitting(part.image, writable=disk.writable and part.writable))
            for part in disk.partitions
        )
        disks.append(replace(disk, image=image, partitions=parts))
    return replace(config, disks=tuple(disks))


def check_socket_path(path: Path) -> None:
    """Raises StartFailedError if no unix socket can be there for the length of its path."""
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise StartFailedError(
            f"the path of the control socket is longer than {SOCKET_PATH_LIMIT} bytes; use a shorter "
            f"state directory than {path.parent.parent}"
        )


def remove_socket(path: Path) -> None:
    """Remove a control socket; the VMM may have done so itself."""
    with suppress(FileNotFoundError):
        path.unlink()
