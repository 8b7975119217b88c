"""What the manager pays for many VMs at the same time, all of them simulated.

Two tables:

- So many VMs become ready, stay so for a while in which nothing happens, and are stopped: what each costs of
  this process, and how that grows with their number. An exponent of 0 says that a VM costs the same however
  many there are.
- So many VMs report at a fixed rate in all, each twice; from the moment at which a guest sends its second
  report to the moment at which a subscriber has it. In turn, the same programs report to the least server of
  asyncio that can answer them. A guest does not wait for others, so slow answers are not left out.
"""

import argparse
import asyncio
import gc
import math
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import anyio
import msgpack

from bench.bench_lifecycle import OK, memory_directory, spawn
from vmactor import AdmissionPolicy, RawConfig, VirtualizationService
from vmactor.host import probe
from vmactor.messages import Gap, PayloadFinished, PayloadReady, PayloadStarted

AT_ONCE: Final = 50
"""Starts under way at the same time."""
SETTLE_SECONDS: Final = 12.0
"""By then the deadlines of what was asked for at the start have passed."""
IDLE_SECONDS: Final = 20.0
LEAD_SECONDS: Final = 0.02
"""Of each VM, from the first start to the first report."""
CLOCK_TURN: Final = 1 << 31
"""Microseconds after which the clock that guests report begins again."""


@asynccontextmanager
async def service_with_kernel() -> AsyncIterator[tuple[VirtualizationService, Any, Path]]:
    """A service, a kernel for its VMs, and a directory."""
    with tempfile.TemporaryDirectory(prefix="vma", dir=memory_directory()) as name:
        directory = Path(name)
        with (directory / "kernel").open("w+b") as kernel:
            policy = AdmissionPolicy(checked=False)  # a bench may fill the host
            async with VirtualizationService(
                vmm="simulated", state_directory=directory / "s", admission=policy
            ) as service:
                yield service, kernel, directory


# -- Many at the same time -------------------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """What so many VMs cost this process."""

    count: int
    life: float
    """Seconds of processor for the life of each."""
    descriptors: float
    memory: float
    """Bytes of each."""
    idle: float
    """Share of a processor, of all."""
    wake_ups: float
    """A second, of all."""

    def row(self) -> str:
        """A row of the table."""
        return (
            f"| {self.count} | {self.life * 1e3:.1f} | {self.descriptors:.2f} | {self.memory / 1024:.0f} "
            f"| {self.idle:.2%} | {self.wake_ups:.1f} |"
        )


async def crowd(count: int) -> Crowd:
    """So many VMs become ready, are idle, and are stopped."""
    async with service_with_kernel() as (service, kernel, _):
        turns = anyio.CapacityLimiter(AT_ONCE)
        vms = []

        async def ready(number: int) -> None:
            config = RawConfig(
                name=f"sim-{number}", kernel=kernel, params='vmactor.script="started;ready;hang"'
            )
            async with turns:
                vms.append(vm := await service.create_vm(config))
                with vm.events() as events:
                    await vm.start()
                    while not isinstance(await anext(events), PayloadReady):
                        pass

        await ready(-1)  # what the first one alone loads is no other's cost
        memory, descriptors, used = resident(), open_descriptors(), time.process_time()
        async with anyio.create_task_group() as starts:
            for number in range(count):
                starts.start_soon(ready, number)
        life = time.process_time() - used
        await anyio.sleep(SETTLE_SECONDS)
        memory, descriptors = resident() - memory, open_descriptors() - descriptors
        used, woken = time.process_time(), wake_ups()
        await anyio.sleep(IDLE_SECONDS)
        idle, woken = time.process_time() - used, wake_ups() - woken

        async def stop(number: int) -> None:
            async with turns:
                await vms[number].stop()

        used = time.process_time()
        async with anyio.create_task_group() as stops:
            for number in range(count):
                stops.start_soon(stop, number)
        life += time.process_time() - used
    return Crowd(
        count, life / count, descriptors / count, memory / count, idle / IDLE_SECONDS, woken / IDLE_SECONDS
    )


def resident() -> int:
    """Bytes of memory that this process alone has."""
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))


def open_descriptors() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def wake_ups() -> int:
    """How often this process has waited."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through the logarithms: by which power y grows with x."""
    slope, _ = statistics.linear_regression(
        [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    )
    return slope


# -- Reports ---------------------------------------------------------------------------------------


class Plan:
    """When which VM reports: all once, then all once more, at equal distances."""

    def __init__(self, count: int, rate: float) -> None:
        self._start = time.monotonic() + 1 + count * LEAD_SECONDS
        self._between = count / rate
        self._count = count

    def script(self, number: int) -> str:
        """The steps of a VM that is started now."""
        first = self._start + self._between * number / self._count
        wait = first - time.monotonic()
        if wait < 0:
            sys.exit("bench_crowd: this machine is too slow to start so many in time: lower --reports-vms")
        between = int(self._between * 1000)
        return f"started;sleep {int(wait * 1000)};ready;sleep {between};finished clock;hang"


def latency(sent: int) -> float:
    """Seconds since a guest's clock said that."""
    return (time.monotonic_ns() // 1000 - sent) % CLOCK_TURN / 1e6


@dataclass(frozen=True)
class Reports:
    """How long reports took, and how many came."""

    latencies: list[float]
    came: int
    lost: int
    used: float
    """Seconds of processor of this process, for each report."""

    def row(self, name: str) -> str:
        """A row of the table."""
        p50, p99 = (percentile(self.latencies, share) * 1e3 for share in (0.5, 0.99))
        return f"| {name} | {self.came} | {self.lost} | {p50:.2f} | {p99:.2f} | {self.used * 1e3:.2f} |"


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


async def reports_to_vmactor(count: int, rate: float) -> Reports:
    """VMs report; one subscriber gets what all of them say."""
    latencies: list[float] = []
    came = lost = 0
    used = 0.0
    async with service_with_kernel() as (service, kernel, _):
        plan = Plan(count, rate)
        turns = anyio.CapacityLimiter(AT_ONCE)
        vms = []
        kinds = (PayloadStarted, PayloadReady, PayloadFinished)
        with service.subscribe(kinds=kinds, capacity=4096) as events:

            async def start(number: int) -> None:
                async with turns:
                    config = RawConfig(
                        name=f"sim-{number}", kernel=kernel, params=f'vmactor.script="{plan.script(number)}"'
                    )
                    vms.append(vm := await service.create_vm(config))
                    await vm.start()

            async with anyio.create_task_group() as starts:
                for number in range(count):
                    starts.start_soon(start, number)
                started = 0
                while started < count:
                    started += isinstance(await anext(events), PayloadStarted)
            before = time.process_time()
            with anyio.move_on_after(30 + count * LEAD_SECONDS):
                while len(latencies) < count:
                    event = await anext(events)
                    if isinstance(event, PayloadFinished):
                        latencies.append(latency(event.exit_code))
                    if isinstance(event, Gap):
                        lost += event.missed
                    came += 1
            used = time.process_time() - before
    return Reports(latencies, came, lost + 2 * count - came, used / (2 * count))


async def reports_to_asyncio(count: int, rate: float) -> Reports:
    """The same programs report to servers that answer, and put what they were told into a queue."""
    program = probe().simulated.path
    if program is None:
        sys.exit("bench_crowd: the simulated VMM is not built: run 'make setup'")
    told: asyncio.Queue[tuple[str, list[int]]] = asyncio.Queue()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        messages = msgpack.Unpacker()
        while data := await reader.read(4096):
            messages.feed(data)
            for _, number, method, params in messages:
                told.put_nowait((method, params))
                writer.write(OK % number)
        writer.close()

    with tempfile.TemporaryDirectory(prefix="vma", dir=memory_directory()) as name:
        plan = Plan(count, rate)
        directory_fd = os.open(name, os.O_RDONLY)
        servers, processes = [], []
        for number in range(count):
            cid = number + 3
            servers.append(await asyncio.start_unix_server(answer, f"{name}/vsock_{cid}"))
            vsock = f"cid={cid},device=/proc/self/fd/{directory_fd}"
            script = f'vmactor.script="{plan.script(number)}"'
            processes.append(spawn(program, "--vsock", vsock, "--params", script, pass_fds=(directory_fd,)))
            await asyncio.sleep(0)
        for _ in range(count):
            await told.get()
        latencies: list[float] = []
        came = 0
        before = time.process_time()
        with anyio.move_on_after(30 + count * LEAD_SECONDS):
            while len(latencies) < count:
                method, params = await told.get()
                if method == "notifyPayloadFinished":
                    latencies.append(latency(params[0]))
                came += 1
        used = time.process_time() - before
        for pidfd in processes:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await anyio.wait_readable(pidfd)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - WNOHANG
            os.close(pidfd)
        for server in servers:
            server.close()
        os.close(directory_fd)
    return Reports(latencies, came, 2 * count - came, used / (2 * count))


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=(100, 500, 1000, 2000))
    parser.add_argument("--reports-vms", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=2000, help="reports a second in all")
    parser.add_argument("--rounds", type=int, default=3, help="of reports")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if args.counts:
        print("| VMs | ms of processor a life | descriptors each | KiB each | idle | wake-ups a second |")
        print("|---|---|---|---|---|---|")
        crowds = []
        for count in args.counts:
            # A process of its own for each: a heap that has been used takes VMs in without growing.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                row = process.submit(measure_crowd, count).result()
            crowds.append(row)
            print(row.row(), flush=True)
        if len(crowds) > 1:
            life = exponent([(each.count, each.life) for each in crowds])
            memory = exponent([(each.count, each.memory) for each in crowds])
            print(
                f"\nCost of one VM grows with their number to the power of {life:.2f} in processor time, "
                f"{memory:.2f} in memory."
            )
    if args.reports_vms:
        print("\n| reports to | came | lost | p50, ms | p99, ms | ms of processor a report |")
        print("|---|---|---|---|---|---|")
        for _ in range(args.rounds):
            bare = asyncio.run(reports_to_asyncio(args.reports_vms, args.rate))
            print(bare.row("bare asyncio"), flush=True)
            ours = anyio.run(reports_to_vmactor, args.reports_vms, args.rate)
            print(ours.row("vmactor"), flush=True)


def measure_crowd(count: int) -> Crowd:
    """For another process."""
    return anyio.run(crowd, count)


if __name__ == "__main__":
    main()
