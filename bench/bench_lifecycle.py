"""What the manager adds to the whole life of a VM: simulated VMs against bare processes of the same program.

A life: create, start, payload ready, stop, died. In turns, in one process, at the same concurrency:

- ``vmactor``: the life, with all that a VM has (directory, record, sockets, pipes, drains, events).
- ``bare``: spawn the same program with the same script, serve its two reports on a socket, kill it when it is
  ready, wait for its end. No checks, no deadlines, nothing kept.
- ``spawn``: spawn the program with a script that ends at once, and wait: the least that any manager can do.

What counts are the ratios of lives per second within a round. The processor time is this process's own, per
life; it changes less than the rates when others use the machine.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio

from bench.paired import median_interval
from vmactor import RawConfig, VirtualizationService
from vmactor.host import probe
from vmactor.messages import Died, PayloadReady

OK: Final = b"\x94\x01%c\xc0\xc0"
"""The answer to a request, by its number."""
WAYS: Final = ("vmactor", "bare", "spawn")
CONCURRENCY: Final = (1, 100, 1000)


@dataclass(frozen=True)
class Figures:
    """What a round of one way came to."""

    rate: float
    cpu: float
    """Seconds of this process per life."""


async def at_once(lives: int, concurrency: int, live: Callable[[int], Awaitable[None]]) -> Figures:
    """Lead so many lives, with so many under way at any time."""
    numbers = iter(range(lives))

    async def worker() -> None:
        for number in numbers:
            await live(number)

    began, used = time.perf_counter(), time.process_time()
    async with anyio.create_task_group() as tasks:
        for _ in range(concurrency):
            tasks.start_soon(worker)
    return Figures(lives / (time.perf_counter() - began), (time.process_time() - used) / lives)


# -- Bare processes --------------------------------------------------------------------------------


def spawn(program: Path, *arguments: str, pass_fds: tuple[int, ...] = ()) -> int:
    """Start the program; its pidfd."""
    child = subprocess.Popen(
        [program, "--extended-status", "run", *arguments, "/dev/null"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=pass_fds,
    )
    pidfd = os.pidfd_open(child.pid)
    child.returncode = 0  # the pidfd owns it
    return pidfd


async def reap(pidfd: int) -> None:
    """Wait for the end of a process."""
    await anyio.wait_readable(pidfd)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - WNOHANG
    anyio.notify_closing(pidfd)
    os.close(pidfd)


async def spawn_and_wait(program: Path) -> None:
    """A process that ends at once."""
    await reap(spawn(program, "--params", "vmactor.script=poweroff"))


async def bare_life(program: Path, directory: Path, directory_fd: int, number: int) -> None:
    """A process that reports twice, is killed, and ends."""
    path = directory / f"vsock_{number + 3}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(os.fspath(path))
        listener.listen(1)
        vsock = f"cid={number + 3},device=/proc/self/fd/{directory_fd}"
        script = "vmactor.script=started;ready;hang"
        pidfd = spawn(program, "--vsock", vsock, "--params", script, pass_fds=(directory_fd,))
        await anyio.wait_readable(listener)
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)
            for message in (1, 2):
                await anyio.wait_readable(connection)
                connection.recv(1000)
                connection.send(OK % message)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await reap(pidfd)
        path.unlink()


# -- vmactor ---------------------------------------------------------------------------------------


async def life(service: VirtualizationService, kernel: Any, number: int) -> None:
    """The whole life of a VM."""
    config = RawConfig(name=f"sim-{number}", kernel=kernel, params='vmactor.script="started;ready;hang"')
    async with await service.create_vm(config) as vm:
        with vm.events() as events:
            await vm.start()
            async for event in events:
                if isinstance(event, PayloadReady):
                    await vm.stop()
                elif isinstance(event, Died):
                    return


def memory_directory() -> str | None:
    """Where files live in memory, as state directories should: /run is such a place on any real system."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# -- All of it -------------------------------------------------------------------------------------


async def measure(concurrency: int, lives: int, rounds: int) -> dict[str, list[Figures]]:
    """The figures, by way and round."""
    program = probe().simulated.path
    if program is None:
        sys.exit("bench_lifecycle: the simulated VMM is not built: run 'make setup'")
    found: dict[str, list[Figures]] = {"spawn": [], "bare": [], "vmactor": []}
    with tempfile.TemporaryDirectory(prefix="vma", dir=memory_directory()) as name:
        directory = Path(name)
        directory_fd = os.open(directory, os.O_RDONLY)
        with (directory / "kernel").open("w+b") as kernel:
            async with VirtualizationService(vmm="simulated", state_directory=directory / "s") as service:
                for turn in range(rounds + 1):
                    got = {
                        "spawn": await at_once(lives, concurrency, lambda _: spawn_and_wait(program)),
                        "vmactor": await at_once(lives, concurrency, lambda n: life(service, kernel, n)),
                        "bare": await at_once(
                            lives, concurrency, lambda n: bare_life(program, directory, directory_fd, n)
                        ),
                    }
                    for way, figures in got.items():
                        if turn:  # the first round warms up
                            found[way].append(figures)
        os.close(directory_fd)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lives", type=int, default=300, help="lives per round and way, at least")
    parser.add_argument("--concurrency", type=int, nargs="*", default=CONCURRENCY)
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--trio", action="store_true")
    args = parser.parse_args()
    backend = "trio" if args.trio else "asyncio"
    options = {} if args.trio else {"use_uvloop": args.uvloop}
    print(
        "| at a time | vmactor / bare | vmactor / spawn | lives a second: vmactor | bare | spawn "
        "| ms of processor a life: vmactor | bare | spawn |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for concurrency in args.concurrency:
        lives = max(args.lives if concurrency > 1 else args.lives // 3, concurrency)
        found = anyio.run(measure, concurrency, lives, args.rounds, backend=backend, backend_options=options)
        row = [str(concurrency)]
        for other in ("bare", "spawn"):
            pairs = zip(found["vmactor"], found[other], strict=True)
            ratios = [ours.rate / theirs.rate for ours, theirs in pairs]
            interval = None
            with suppress(ValueError):
                interval = median_interval(ratios)
            spread = f" ({interval.low:.2f} to {interval.high:.2f})" if interval else ""
            row.append(f"{statistics.median(ratios):.2f}{spread}")
        row += [f"{statistics.median(f.rate for f in found[way]):.0f}" for way in WAYS]
        row += [f"{statistics.median(f.cpu for f in found[way]) * 1e3:.1f}" for way in WAYS]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
