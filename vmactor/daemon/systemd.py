"""What a daemon and systemd tell each other: sockets that were opened for it, readiness, and signs of life.

The protocols are sd_listen_fds(3) and sd_notify(3): descriptors from 3 on and a few variables; datagrams of
``NAME=VALUE`` lines to a socket. Without systemd all of this is nothing, and does no harm.
"""

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Final, Self

import anyio
from anyio.abc import TaskStatus

from vmactor.errors import IllegalArgumentError
from vmactor.log import get_logger

FIRST: Final = 3
"""SD_LISTEN_FDS_START."""
MOST: Final = 64
"""Sockets that are believed to be meant."""

log = get_logger()


def inherited_sockets(environment: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The sockets that systemd opened for this process, close-on-exec from now on; the caller's to close.

    The variables are removed, so that no child takes them for its own.

    Raises:
        IllegalArgumentError: One of them is not a unix stream socket that listens; all are closed.
    """
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or not 0 < int(count) <= MOST:
        return []
    descriptors = range(FIRST, FIRST + int(count))
    sockets: list[socket.socket] = []
    try:
        for fd in descriptors:
            os.set_inheritable(fd, False)
            found = socket.socket(fileno=fd)
            sockets.append(found)
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if found.family != socket.AF_UNIX or found.type != socket.SOCK_STREAM or not listens:
                raise IllegalArgumentError(
                    f"descriptor {fd} of systemd is no unix stream socket that listens: its .socket unit "
                    "needs ListenStream=PATH and Accept=no"
                )
            found.setblocking(False)
    except OSError as error:
        _close(sockets)
        raise IllegalArgumentError(f"systemd's sockets cannot be used: {error.strerror}") from error
    except BaseException:
        _close(sockets)
        raise
    return sockets


def _close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


class Notifier:
    """Tells systemd how the daemon is.

    Args:
        environment: Where the socket and the watchdog's interval are; the variables are removed.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = f"\0{self._address[1:]}"
        interval, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
        ours = interval.isdecimal() and pid in ("", str(os.getpid()))
        self.watchdog_seconds = int(interval) / 1e6 if ours and int(interval) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.tell("STOPPING=1", "STATUS=ended")

    def tell(self, *lines: str) -> None:
        """Tell something; never waits, never raises: nobody depends on it but systemd."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), self._address)

    def reloading(self) -> None:
        """Tell that the configuration is being read again; ``READY=1`` ends that."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.tell("RELOADING=1", f"MONOTONIC_USEC={now}")

    async def beat(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Give signs of life from the event loop until cancelled, twice in the watchdog's interval.

        They come from a task like all others, so they stop when the loop does.
        """
        task_status.started()
        if self.watchdog_seconds is None:
            return
        while True:
            self.tell("WATCHDOG=1")
            await anyio.sleep(self.watchdog_seconds / 2)
