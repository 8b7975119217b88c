"""One reader for the pipes of many: drains that only keep need no task of their own.

A task with its scopes and its watch costs several times what the reading of a quiet pipe does, and a VM has
three such pipes. So one task watches one epoll instance, and that watches all of them. Nobody can take more
of it than one bounded read at a time.
"""

import os
import select
from typing import Final

import anyio.lowlevel
from anyio.abc import TaskStatus

from vmactor.console import Drain
from vmactor.log import get_logger
from vmactor.waiting import readable

AT_ONCE: Final = 64
"""Pipes that are read before everybody else has a turn."""

_log = get_logger()


class Drains:
    """Reads the pipes of drains while ``run`` runs; without it, and where the kernel watches no more, none.

    A drain belongs to it from ``add`` to ``remove``. Whoever removes it comes to its end with ``finish``.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._drains: dict[int, Drain] = {}

    def __len__(self) -> int:
        """How many it reads; those that came to the end of their pipes are not among them."""
        return len(self._drains)

    def add(self, drain: Drain) -> bool:
        """Read this one from now on; false where that cannot be, and it needs a task that calls ``run``."""
        if self._epoll is None or drain.copies:
            return False
        try:
            self._epoll.register(drain.read_fd, select.EPOLLIN)
        except OSError:  # the kernel watches no more for this user
            return False
        self._drains[drain.read_fd] = drain
        return True

    def remove(self, drain: Drain) -> None:
        """Read it no more; call it before its descriptor is closed. Idempotent."""
        # By hand, since closing is not enough: the VMM has the same pipe, and may outlive us.
        if self._drains.pop(drain.read_fd, None) is not None and self._epoll is not None:
            self._epoll.unregister(drain.read_fd)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Read until cancelled."""
        try:
            self._epoll = epoll = select.epoll()
        except OSError as error:
            _log.warning("pipes are read by a task each", reason=os.strerror(error.errno or 0))
            task_status.started()
            return
        try:
            task_status.started()
            while True:
                await readable(epoll.fileno())
                for fd, _ in epoll.poll(0, AT_ONCE):
                    if self._drains[fd].read_once():
                        self.remove(self._drains[fd])
                await anyio.lowlevel.checkpoint()
        finally:
            self._epoll = None
            self._drains.clear()
            epoll.close()
