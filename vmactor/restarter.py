"""Bringing back what a failure took down: stop who is to be stopped, wait for the back-off, start in order.

A restarter works on the children that are marked as due, until none is. A supervisor that restarts each child
for itself has one for each that failed; one that restarts siblings together has one for all, so a further
failure in the course of a restart joins it instead of racing with it.
"""

import random
from collections.abc import Callable, Sequence

import anyio
from anyio.abc import TaskStatus

from vmactor.child import Child, ChildTask
from vmactor.errors import IllegalStateError
from vmactor.restarts import Backoff


class Restarter:
    """Restarts some children of a supervisor; ``run`` is its task while there is something to do.

    Args:
        members: The children that it may have to restart, in the order of their start.
        launch: Starts a child's next run.
        failed: Told of a child that failed to start; it is to count that and call ``retry`` or end all this.
        backoff: How long to wait before a restart, or None for not at all.
        chance: Gives numbers from 0 to 1 for the back-off.

    Attributes:
        task: The task of ``run``, while there is one.
    """

    __slots__ = (
        "_attempt",
        "_backoff",
        "_chance",
        "_failed",
        "_failures",
        "_launch",
        "_members",
        "_not_before",
        "_pause",
        "_up_since",
        "task",
    )

    def __init__(
        self,
        members: Callable[[], Sequence[Child]],
        launch: Callable[[Child], ChildTask],
        failed: Callable[[Child, Exception], None],
        backoff: Backoff | None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.task: ChildTask | None = None
        self._members = members
        self._launch = launch
        self._failed = failed
        self._backoff = backoff
        self._chance = chance
        self._failures = 0
        self._up_since = 0.0
        self._not_before = 0.0
        self._attempt = anyio.CancelScope()
        self._pause = anyio.CancelScope()

    def retry(self) -> None:
        """A failure has made children due: wait anew, and whatever is being started now is not the way."""
        if self._backoff is not None:
            now = anyio.current_time()
            if self.task is None and now - self._up_since >= self._backoff.stable:
                self._failures = 0
            self._failures += 1
            self._not_before = now + self._backoff.delay(self._failures, self._chance())
        self._attempt.cancel()

    def withdrawn(self) -> None:
        """A child is not due any more: nobody waits for a restart of nobody."""
        if not self.has_work:
            self._pause.cancel()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Restart what is due."""
        task_status.started()
        while True:
            await self._stop_living()
            if not self.has_work:
                self._up_since = anyio.current_time()
                return
            with anyio.CancelScope() as self._attempt:
                with anyio.CancelScope() as self._pause:
                    await anyio.sleep_until(self._not_before)
                await self._start_due()

    @property
    def has_work(self) -> bool:
        """Whether a child is due."""
        return any(child.due for child in self._members())

    async def _stop_living(self) -> None:
        while True:
            for child in reversed(self._members()):
                if child.due and child.task is not None:
                    await child.task.stop()
                    break  # meanwhile there may be others
            else:
                return

    async def _start_due(self) -> None:
        for child in self._members():
            if not child.due:
                continue
            task = self._launch(child)
            await task.settled.wait()
            if child.due and not task.serves:
                name = child.spec.name
                self._failed(child, task.error or IllegalStateError(f"child {name} ended before it served"))
                return
            if self._attempt.cancel_called:  # one that serves already has failed since
                return
