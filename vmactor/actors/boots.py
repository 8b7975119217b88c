"""Boots: how many VMs boot at the same time, and in which order the others come.

Booting is when a VM takes most of the processor. Where many do it at once all are late, and those with
deadlines fail; one after the other, each is as fast as it can be. So a start waits for its turn, first come
first served, and its own deadlines begin when the turn has come.
"""

from collections import deque

import anyio


class BootQueue:
    """Lets so many boot at a time, the others in the order in which they came.

    Args:
        slots: How many.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: deque[anyio.Event] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    def take_nowait(self) -> bool:
        """Take a turn if one is free; nobody is overtaken. Give it back with ``give_back``."""
        if self._free <= 0:
            return False
        self._free -= 1
        return True

    async def take(self) -> None:
        """Wait for a turn. Cancelled, it leaves the queue as if it had never been in it."""
        if self.take_nowait():
            return
        turn = anyio.Event()
        self._waiting.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():  # the turn came while this was being cancelled: it is the next one's
                self.give_back()
            else:
                self._waiting.remove(turn)
            raise

    def give_back(self) -> None:
        """End a turn; the first who waits has it from this moment on."""
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
