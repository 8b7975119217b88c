"""What a run's process and its VMMs use, sampled at intervals that cost next to nothing."""

import gc
import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread

from vmactor import VirtualizationService
from vmactor.usage import cpu_time

INTERVAL_SECONDS: Final = 0.5
SAMPLES: Final = 600
"""Rows that are kept; with more, every second one goes and the interval doubles."""
SHARE: Final = 50
"""Looking at the VMMs takes no more than one in so many seconds."""

_PAGE: Final = resource.getpagesize()


class Measure:
    """Samples of one run.

    Args:
        service: Whose VMMs are looked at.
        states: How many lives are in which state; read at each sample.

    Attributes:
        rows: The samples, JSON-ready.
        own_seconds: Processor time that sampling and showing took, which is not the manager's.
        quiet: Leave the VMMs alone: the manager's idling is being measured.
    """

    def __init__(self, service: VirtualizationService, states: Mapping[str, int]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.own_seconds = 0.0
        self.quiet = False
        self._service = service
        self._states = states
        self._interval = INTERVAL_SECONDS
        self._began = time.monotonic()
        self._last = (self._began, time.process_time())
        self._vmms: tuple[float, int] = (0.0, 0)
        self._look_again = 0.0

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await self.take()
            await anyio.sleep(self._interval)

    async def take(self) -> None:
        """Take a sample now."""
        began = time.thread_time()
        now, used = time.monotonic(), time.process_time()
        then, used_then = self._last
        self._last = now, used
        row: dict[str, Any] = {"seconds": now - self._began, **self._states}
        row["manager_cpu"] = (used - used_then) / (now - then) if now > then else 0.0
        row["manager_rss"] = resident(os.getpid())
        row["descriptors"] = descriptors()
        pids = [] if self.quiet or now < self._look_again else self._pids()
        self.own_seconds += time.thread_time() - began
        if pids:
            took, seconds, memory = await anyio.to_thread.run_sync(_look, pids)
            self.own_seconds += took
            self._vmms = seconds, memory
            self._look_again = now + SHARE * took
        began = time.thread_time()
        row["vmm_cpu_seconds"], row["vmm_rss"] = self._vmms
        self.rows.append(row)
        if len(self.rows) > SAMPLES:
            self.rows = self.rows[::2]
            self._interval *= 2
        self.own_seconds += time.thread_time() - began

    def _pids(self) -> list[int]:
        return [info.pid for info in self._service.list_vms() if info.pid is not None]


def _look(pids: list[int]) -> tuple[float, float, int]:
    """Processor time that this took, processor seconds of all children, resident bytes of the living."""
    began = time.thread_time()
    seconds, memory = 0.0, 0
    for pid in pids:
        if (used := cpu_time(pid)) is not None:
            seconds += used.total_ms / 1000
            memory += resident(pid)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.thread_time() - began, seconds + ended.ru_utime + ended.ru_stime, memory


def resident(pid: int) -> int:
    """Resident bytes of a process, shared pages included; 0 if it is gone."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * _PAGE
    return 0


def memory_of_this_process() -> int:
    """Bytes that this process alone has, garbage collected before. Takes milliseconds."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def descriptors() -> int | None:
    """How many descriptors this process has; None where the system does not say it at once."""
    with suppress(OSError):
        return Path("/proc/self/fd").stat().st_size or None  # since Linux 6.2
    return None
