"""Many lives in one manager, one batch after the other: what it has after each must not grow.

    python -m tools.soak [LIVES]

A fifth of the VMs crash, hang, report errors or are killed. After each batch everything is counted that could
be left behind; a line through the second half of the counts tells how much each life leaves. The first half
fills what is kept on purpose: the last events, and how the last 1,024 VMs ended.
"""

import asyncio
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio

from vmactor import RawConfig, VirtualizationService
from vmactor.load.measure import memory_of_this_process
from vmactor.load.run import Run
from vmactor.load.scenario import Lifetimes, Scenario

LIVES: Final = 20_000
BATCHES: Final = 20
BYTES_PER_LIFE: Final = 256
"""Less than any object that a VM has; the allocator's own ups and downs are of this order."""


class Count(NamedTuple):
    """What there is after a batch."""

    lives: int
    failed: int
    descriptors: int
    threads: int
    tasks: int
    files: int
    bytes: int


async def soak(lives: int, batches: int = BATCHES) -> list[Count]:
    """Lead so many VMs through their lives; gives what there was after each batch."""
    counts: list[Count] = []
    with tempfile.TemporaryDirectory(prefix="vms") as name, tempfile.TemporaryFile() as kernel:
        async with VirtualizationService(vmm="simulated", state_directory=Path(name)) as service:
            template = RawConfig(name="soak", kernel=kernel)
            for batch in range(batches):
                scenario = Scenario(
                    vms=lives // batches,
                    lifetime=Lifetimes.CONSTANT,
                    mean_lifetime=0.01,
                    hold=0,
                    crash=0.05,
                    hang=0.05,
                    error=0.05,
                    killed=0.05,
                    hangup_timeout=0.2,
                    seed=batch,
                )
                run = Run(scenario, service, template)
                await run.run()
                failed = run.states["failed"] + run.events_lost
                counts.append(await _count(Path(name), (batch + 1) * scenario.vms, failed))
    return counts


async def _count(directory: Path, lives: int, failed: int) -> Count:
    memory = await anyio.to_thread.run_sync(memory_of_this_process)
    return Count(
        lives,
        failed,
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),  # noqa: ASYNC240 - in memory
        threads=threading.active_count(),
        tasks=len(asyncio.all_tasks()),
        files=sum(1 for _ in directory.rglob("*")),  # noqa: ASYNC240
        bytes=memory,
    )


def growth(counts: list[Count], what: str) -> float:
    """How much of something each life leaves, by the second half of the counts."""
    half = counts[len(counts) // 2 :]
    lives, values = [count.lives for count in half], [getattr(count, what) for count in half]
    return statistics.linear_regression(lives, values).slope


def report(counts: list[Count]) -> bool:
    """Print it; whether nothing grew."""
    flat = not any(count.failed for count in counts)
    print(("{:>12}" * len(Count._fields)).format(*Count._fields))
    for count in counts:
        print(("{:>12,}" * len(count)).format(*count))
    for what in Count._fields[2:]:
        slope: Any = growth(counts, what)
        limit = BYTES_PER_LIFE if what == "bytes" else 0.001
        flat &= slope <= limit
        print(f"{what} for each life: {slope:+.4f} (at most {limit})")
    return flat


if __name__ == "__main__":
    sys.exit(0 if report(asyncio.run(soak(int(sys.argv[1]) if len(sys.argv) > 1 else LIVES))) else 1)
