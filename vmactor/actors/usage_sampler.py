"""What VMs use of their host, sampled for those who want to know, within a budget for all VMs together.

The reference reads every VM's figures every second, which costs about 0.3 ms of a processor each time,
wanted or not. Here nothing is read unless somebody subscribed to ``UsageSampled``, and the time between two
VMs is as long as the budget asks for: few VMs are sampled every second each, thousands less often.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import anyio
from anyio.abc import TaskStatus

INTERVAL: Final = 1.0
"""Seconds from one sample of a VM to the next at least, as in the reference."""
SHARE: Final = 0.01
"""Share of one processor that all sampling may take."""
OVERHEAD: Final = 0.0003
"""Seconds of processor time that a sample takes beside the reading: a thread's turn, and telling of it."""

Sample = Callable[[], Awaitable[float | None]]
"""Takes a sample of a VM and tells it. Gives the seconds that reading it took; None if there was nothing."""


class UsageSampler:
    """One for all VMs of a service.

    Args:
        wanted: Whether anybody wants samples now.
        running: How to take a sample of each VM that may run.
        share: Share of one processor to take at most.
        interval: Seconds from one round to the next at least.
    """

    def __init__(
        self,
        wanted: Callable[[], bool],
        running: Callable[[], Sequence[Sample]],
        *,
        share: float = SHARE,
        interval: float = INTERVAL,
    ) -> None:
        self._wanted = wanted
        self._running = running
        self._share = share
        self._interval = interval
        self._wake = anyio.Event()

    def wake(self) -> None:
        """Somebody may want samples from now on."""
        self._wake.set()

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """A supervisor's child: samples while somebody wants it, and sleeps without a timer else."""
        task_status.started()
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._wanted():
                began = anyio.current_time()
                for sample in self._running():
                    await self._sample(sample)
                    if not self._wanted():
                        break
                await anyio.sleep(max(began + self._interval - anyio.current_time(), 0))

    async def _sample(self, sample: Sample) -> None:
        spent = await sample()
        if spent is not None:
            await anyio.sleep((spent + OVERHEAD) / self._share)
