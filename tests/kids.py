"""Children whose life a test directs, and a log of what they did in which order."""

from collections.abc import Iterable

import anyio
from anyio.abc import TaskStatus


class Kid:
    """A child that serves until it is told to end, or stopped.

    Args:
        log: Where its starts (``a+``), ends (``a-``) and failed starts (``a!``) go.
        name: Used in the log.
        starts: What its first runs do: ``serve``, ``fail``, ``hang`` or ``return``; all further ones serve.
        clean_up: Seconds that it takes to end when it is cancelled.
        clean_up_error: What it then fails with.
    """

    def __init__(
        self,
        log: list[str],
        name: str,
        starts: Iterable[str] = (),
        *,
        clean_up: float = 0,
        clean_up_error: Exception | None = None,
    ) -> None:
        self.log = log
        self.name = name
        self.runs = 0
        self._starts = iter(starts)
        self._clean_up = clean_up
        self._clean_up_error = clean_up_error
        self._go = anyio.Event()
        self._error: Exception | None = None

    def let_starts_fail(self, count: int) -> None:
        """Let so many of the next runs fail to start."""
        self._starts = iter(["fail"] * count)

    def fail(self) -> None:
        """Let the present run fail."""
        self._error = OSError(f"{self.name} fell")
        self._go.set()

    def finish(self) -> None:
        """Let the present run return."""
        self._error = None
        self._go.set()

    async def __call__(self, *, task_status: TaskStatus[int]) -> None:
        self.runs += 1
        match next(self._starts, "serve"):
            case "fail":
                self.log.append(f"{self.name}!")
                raise OSError(f"{self.name} cannot start")
            case "hang":
                self.log.append(f"{self.name}?")
                await anyio.sleep_forever()
            case "return":
                return
        self._go = anyio.Event()
        self.log.append(f"{self.name}+")
        task_status.started(self.runs)
        try:
            await self._go.wait()
        finally:
            with anyio.CancelScope(shield=True):
                if not self._go.is_set():
                    await anyio.sleep(self._clean_up)
            self.log.append(f"{self.name}-")
            if not self._go.is_set() and self._clean_up_error is not None:
                raise self._clean_up_error
        if self._error is not None:
            raise self._error
