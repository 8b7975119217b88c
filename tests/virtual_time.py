"""An asyncio loop whose clock jumps when nothing can run, as trio's autojumping MockClock does."""

import asyncio
import selectors
from typing import Any


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timeout, adds it to ``now``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:  # nothing is scheduled: only real input can go on from here
            ready = super().select(None)
        else:
            self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop in which an hour of sleep takes no time."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        super().__init__(selector)
        self._jumping = selector

    def time(self) -> float:
        """Seconds on the virtual clock."""
        return self._jumping.now
