"""What the runtime is measured against: other libraries doing the same, and the least that a loop can do."""

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pykka
import sniffio
import trio

from vmactor.waiting import waiter_type, wake

MESSAGES = 20_000
ASKS = 3_000
SUBSCRIBERS = 1_000
EVENTS = 30


async def tell_asyncio_queue() -> float:
    """One producer, one consumer, capacity 64, with the standard library's queue."""
    queue: asyncio.Queue[int] = asyncio.Queue(64)

    async def consume() -> None:
        for _ in range(MESSAGES):
            await queue.get()

    began = time.perf_counter()
    async with anyio.create_task_group() as tg:
        tg.start_soon(consume)
        for number in range(MESSAGES):
            await queue.put(number)
    return MESSAGES / (time.perf_counter() - began)


async def tell_anyio_stream() -> float:
    """The same with anyio's memory object stream."""
    send, receive = anyio.create_memory_object_stream[int](64)

    async def consume() -> None:
        for _ in range(MESSAGES):
            await receive.receive()

    with send, receive:
        began = time.perf_counter()
        async with anyio.create_task_group() as tg:
            tg.start_soon(consume)
            for number in range(MESSAGES):
                await send.send(number)
        took = time.perf_counter() - began
    return MESSAGES / took


async def ask_bare_asyncio() -> float:
    """The least that answers on asyncio: a deque, a future to wake, a future to reply; no deadline."""
    loop = asyncio.get_running_loop()
    queue: collections.deque[tuple[int, asyncio.Future[int]]] = collections.deque()
    wake: asyncio.Future[None] | None = None

    async def serve() -> None:
        nonlocal wake
        while True:
            while queue:
                number, reply = queue.popleft()
                reply.set_result(number)
            wake = loop.create_future()
            await wake
            wake = None

    async with anyio.create_task_group() as tg:
        tg.start_soon(serve)
        await anyio.lowlevel.checkpoint()
        began = time.perf_counter()
        for number in range(ASKS):
            reply: asyncio.Future[int] = loop.create_future()
            queue.append((number, reply))
            if wake is not None and not wake.done():
                wake.set_result(None)
            await reply
        took = time.perf_counter() - began
        tg.cancel_scope.cancel()
    return ASKS / took


async def ask_bare_trio() -> float:
    """The least that answers on trio: a deque and two tasks that park; no deadline."""
    queue: collections.deque[tuple[int, trio.lowlevel.Task]] = collections.deque()
    parked: trio.lowlevel.Task | None = None

    def abort(_raise_cancel: Any) -> trio.lowlevel.Abort:
        return trio.lowlevel.Abort.SUCCEEDED

    async def serve() -> None:
        nonlocal parked
        while True:
            while queue:
                _, asker = queue.popleft()
                trio.lowlevel.reschedule(asker)
            parked = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(abort)

    async with anyio.create_task_group() as tg:
        tg.start_soon(serve)
        await anyio.wait_all_tasks_blocked()
        me = trio.lowlevel.current_task()
        began = time.perf_counter()
        for number in range(ASKS):
            queue.append((number, me))
            if parked is not None:
                task, parked = parked, None
                trio.lowlevel.reschedule(task)
            await trio.lowlevel.wait_task_rescheduled(abort)
        took = time.perf_counter() - began
        tg.cancel_scope.cancel()
    return ASKS / took


class _Pinger(pykka.ThreadingActor):
    def on_receive(self, message: Any) -> Any:
        return message


async def ask_pykka() -> float:
    """Pykka's ask with a deadline, from one thread; the loop stands still meanwhile."""
    ref = _Pinger.start()
    began = time.perf_counter()
    for number in range(ASKS):
        ref.ask(number, timeout=10)
    took = time.perf_counter() - began
    ref.stop()
    return ASKS / took


async def all_wait() -> None:
    """Let all tasks that can run do so until they wait again; they need no more than two steps for it."""
    for _ in range(4):
        await anyio.lowlevel.checkpoint()


async def fan_out_streams() -> float:
    """Events one at a time to tasks that wait for them, by a loop over anyio's memory object streams."""
    streams = [anyio.create_memory_object_stream[int](64) for _ in range(SUBSCRIBERS)]
    seen = 0
    all_seen = anyio.Event()

    async def consume(receive: Any) -> None:
        nonlocal seen
        for _ in range(EVENTS):
            await receive.receive()
            seen += 1
            if seen % SUBSCRIBERS == 0:
                all_seen.set()

    async with anyio.create_task_group() as tg:
        for _, receive in streams:
            tg.start_soon(consume, receive)
        await anyio.wait_all_tasks_blocked()
        took = 0.0
        for number in range(EVENTS):
            all_seen = anyio.Event()
            await all_wait()
            began = time.perf_counter()
            for send, _ in streams:
                send.send_nowait(number)
            await all_seen.wait()
            took += time.perf_counter() - began
    for send, receive in streams:
        send.close()
        receive.close()
    return EVENTS * SUBSCRIBERS / took


async def fan_out_floor() -> float:
    """The same with nothing but the loop's own waits: no queue, no numbers, nothing that could be late."""
    new = waiter_type()
    waiting = [new() for _ in range(SUBSCRIBERS)]
    seen = 0
    all_seen = anyio.Event()

    async def consume(index: int) -> None:
        nonlocal seen
        for _ in range(EVENTS):
            await waiting[index]
            waiting[index] = new()
            seen += 1
            if seen % SUBSCRIBERS == 0:
                all_seen.set()

    async with anyio.create_task_group() as tg:
        for index in range(SUBSCRIBERS):
            tg.start_soon(consume, index)
        await anyio.wait_all_tasks_blocked()
        took = 0.0
        for _ in range(EVENTS):
            all_seen = anyio.Event()
            await all_wait()
            began = time.perf_counter()
            for waiter in waiting:
                wake(waiter)
            await all_seen.wait()
            took += time.perf_counter() - began
    return EVENTS * SUBSCRIBERS / took


async def idle_anyio_tasks(count: int, measured: Callable[[], Awaitable[None]]) -> None:
    """Tasks of an anyio task group that wait for nothing, once they all do."""
    new = waiter_type()

    async def idle() -> None:
        await new()

    async with anyio.create_task_group() as tg:
        for _ in range(count):
            tg.start_soon(idle)
        await measured()
        tg.cancel_scope.cancel()


async def idle_native_tasks(count: int, measured: Callable[[], Awaitable[None]]) -> None:
    """The same with the loop's own tasks, which nobody owns on asyncio."""
    new = waiter_type()

    async def idle() -> None:
        await new()

    if sniffio.current_async_library() == "trio":
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(idle)
            await measured()
            nursery.cancel_scope.cancel()
        return
    tasks = [asyncio.create_task(idle()) for _ in range(count)]
    await measured()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
