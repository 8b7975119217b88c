"""Threads in which users' files are read and written: so many for each user that none waits for another.

A file may be on a file system that answers late or never (FUSE, a network). Who gave such files has to wait
for them; everybody else has workers of his own.
"""

import os
from typing import Final

import anyio

from vmactor.messages import Requester

WORKERS: Final = 4
"""How many files of a user are prepared or looked at at the same time."""
HASHERS: Final = 2
"""How many idsig files of a user are made at the same time, each by a thread and perhaps processes."""


class UserWorkers:
    """What one user may keep busy.

    Attributes:
        files: For preparing and looking at files.
        hashing: For making idsig files.
    """

    def __init__(self) -> None:
        self.files = anyio.CapacityLimiter(WORKERS)
        self.hashing = anyio.CapacityLimiter(HASHERS)

    @property
    def idle(self) -> bool:
        """Whether nobody uses or waits for any."""
        limiters = self.files, self.hashing
        return not any(one.borrowed_tokens or one.statistics().tasks_waiting for one in limiters)


class FileWorkers:
    """The workers of all users; those of whom nothing is under way are forgotten."""

    def __init__(self) -> None:
        self._users: dict[int, UserWorkers] = {}

    def of(self, requester: Requester | None) -> UserWorkers:
        """The workers of a user; of this process's for None."""
        uid = os.geteuid() if requester is None else requester.uid
        if uid not in self._users:
            self._users = {known: workers for known, workers in self._users.items() if not workers.idle}
            self._users[uid] = UserWorkers()
        return self._users[uid]
