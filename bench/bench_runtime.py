"""The actor runtime against its peers and floors: tell, ask, fan-out, creation and memory, in one run.

Every figure is a median of interleaved rounds. What counts are the ratios of two of the same round: their
median, and the interval that holds it with a confidence of 95 % at least. Peers and floors are in
``runtime_peers.py``: ``asyncio.Queue``, a bare deque-and-future (a deque and parked tasks on trio), anyio's
memory object streams, Pykka (threads; the same on every loop), and idle tasks without a mailbox.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio.abc import TaskGroup, TaskStatus

from bench import runtime_peers as peers
from bench.paired import median_interval
from bench.runtime_peers import ASKS, EVENTS, MESSAGES, SUBSCRIBERS
from vmactor.bus import Bus
from vmactor.mailbox import Mailbox
from vmactor.request import Request

Round = Callable[[], Awaitable[float]]
"""Does a thing many times; returns how many times a second."""

ACTORS = 2_000


class Ping(Request[int]):
    """Asks for its number."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


async def tell() -> float:
    """One producer, one consumer, capacity 64."""
    mailbox: Mailbox[int] = Mailbox("bench", 64)

    async def consume() -> None:
        for _ in range(MESSAGES):
            await mailbox.receive()

    began = time.perf_counter()
    async with anyio.create_task_group() as tg:
        tg.start_soon(consume)
        for number in range(MESSAGES):
            await mailbox.tell(number)
    return MESSAGES / (time.perf_counter() - began)


async def serve(mailbox: Mailbox[Ping]) -> None:
    """An actor that answers."""
    while True:
        envelope = await mailbox.receive()
        mailbox.answer(envelope.reply, envelope.message.number)


async def ask() -> float:
    """One asker, one actor, one at a time, each with a deadline."""
    mailbox: Mailbox[Ping] = Mailbox("bench")
    async with anyio.create_task_group() as tg:
        tg.start_soon(serve, mailbox)
        await anyio.wait_all_tasks_blocked()
        began = time.perf_counter()
        for number in range(ASKS):
            await mailbox.ask(Ping(number), timeout=10)
        took = time.perf_counter() - began
        tg.cancel_scope.cancel()
    return ASKS / took


async def fan_out() -> float:
    """Events published one at a time to waiting subscribers; each event is waited for by all."""
    bus: Bus[int] = Bus(stamp=lambda _event, seq: seq, gap=lambda _last, missed: -missed)
    seen = 0
    all_seen = anyio.Event()

    async def subscribe(*, task_status: TaskStatus[None]) -> None:
        nonlocal seen
        with bus.subscribe() as subscription:
            task_status.started()
            for _ in range(EVENTS):
                await subscription.__anext__()
                seen += 1
                if seen % SUBSCRIBERS == 0:
                    all_seen.set()

    async with anyio.create_task_group() as tg:
        for _ in range(SUBSCRIBERS):
            await tg.start(subscribe)
        await anyio.wait_all_tasks_blocked()
        took = 0.0
        for number in range(EVENTS):
            all_seen = anyio.Event()
            await peers.all_wait()
            began = time.perf_counter()
            bus.publish(number)
            await all_seen.wait()
            took += time.perf_counter() - began
    return EVENTS * SUBSCRIBERS / took


async def create() -> float:
    """Idle actors: a task that receives from its mailbox."""
    began = time.perf_counter()
    async with anyio.create_task_group() as tg:
        start_actors(tg, ACTORS)
        await anyio.wait_all_tasks_blocked()
        took = time.perf_counter() - began
        tg.cancel_scope.cancel()
    return ACTORS / took


def start_actors(tg: TaskGroup, count: int) -> list[Mailbox[Ping]]:
    """Actors that answer, each of which waits for its first message."""
    mailboxes = [Mailbox[Ping]("bench") for _ in range(count)]
    for mailbox in mailboxes:
        tg.start_soon(serve, mailbox)
    return mailboxes


async def idle_actors(count: int, measured: Callable[[], Awaitable[None]]) -> None:
    """Actors that have done nothing yet."""
    async with anyio.create_task_group() as tg:
        start_actors(tg, count)
        await measured()
        tg.cancel_scope.cancel()


async def used_actors(count: int, measured: Callable[[], Awaitable[None]]) -> None:
    """Actors that have answered somebody, and were told something on both lanes, and now wait for more."""
    async with anyio.create_task_group() as tg:
        for mailbox in start_actors(tg, count):
            await mailbox.ask(Ping(1), timeout=10)
            await mailbox.ask(Ping(1), timeout=10, control=True)
        await measured()
        tg.cancel_scope.cancel()


async def bytes_each(run: Callable[[int, Callable[[], Awaitable[None]]], Awaitable[None]]) -> float:
    """Bytes that Python holds for each of what ``run`` makes, when all of them wait."""
    size = 0.0

    async def measured() -> None:
        nonlocal size
        await anyio.wait_all_tasks_blocked()
        gc.collect()
        size = (tracemalloc.get_traced_memory()[0] - before) / ACTORS

    await run(10, anyio.wait_all_tasks_blocked)  # what is made once
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        await run(ACTORS, measured)
    finally:
        tracemalloc.stop()
    return size


RATIOS = {
    "tell / asyncio.Queue": ("tell", "tell_asyncio_queue"),
    "tell / anyio stream": ("tell", "tell_anyio_stream"),
    "ask / bare": ("ask", "ask_bare"),
    "ask / Pykka": ("ask", "ask_pykka"),
    "fan-out / loop over anyio streams": ("fan_out", "fan_out_streams"),
    "fan-out / floor": ("fan_out", "fan_out_floor"),
}


async def measure(loop: str, count: int) -> dict[str, Any]:
    """All figures of one loop; each ratio is of two that were measured in the same round."""
    rounds: dict[str, Round] = {
        "tell": tell,
        "tell_anyio_stream": peers.tell_anyio_stream,
        "ask": ask,
        "ask_bare": peers.ask_bare_trio if loop == "trio" else peers.ask_bare_asyncio,
        "ask_pykka": peers.ask_pykka,
        "fan_out": fan_out,
        "fan_out_streams": peers.fan_out_streams,
        "fan_out_floor": peers.fan_out_floor,
        "create": create,
    }
    if loop != "trio":
        rounds = {"tell_asyncio_queue": peers.tell_asyncio_queue} | rounds
    figures: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(count):
        for name, run in rounds.items():
            gc.collect()
            figures[name].append(await run())
    ratios = {}
    for name, (ours, theirs) in RATIOS.items():
        if theirs in figures:
            paired = [a / b for a, b in zip(figures[ours], figures[theirs], strict=True)]
            interval = median_interval(paired)
            ratios[name] = [round(value, 2) for value in (interval.median, interval.low, interval.high)]
    sizes = {
        "idle actor": await bytes_each(idle_actors),
        "actor that was used": await bytes_each(used_actors),
        "anyio task": await bytes_each(peers.idle_anyio_tasks),
        "native task": await bytes_each(peers.idle_native_tasks),
    }
    return {
        "loop": loop,
        "ratios": ratios,
        "per_second": {name: round(statistics.median(values)) for name, values in figures.items()},
        "bytes_each": {name: round(value) for name, value in sizes.items()},
    }


def main() -> None:
    """Measure on each loop and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), action="append")
    options = parser.parse_args()
    for loop in options.loop or ("asyncio", "uvloop", "trio"):
        print(f"{loop} ...", file=sys.stderr)
        result = anyio.run(
            measure,
            loop,
            options.rounds,
            backend="trio" if loop == "trio" else "asyncio",
            backend_options={"use_uvloop": True} if loop == "uvloop" else {},
        )
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
