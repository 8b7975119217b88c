"""One task waits, anybody wakes it; with deadlines, every kind of cancellation, and no lost wake-up."""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import pytest
import trio
import trio.testing
import uvloop
from outcome import Outcome

from vmactor.waiting import Deadlines, Moment, Waiter, expire, waiter_type, wake, within

pytestmark = pytest.mark.anyio


async def test_a_wait_ends_when_it_is_woken_and_not_before() -> None:
    waiter = waiter_type()()
    order: list[str] = []

    async def wait() -> None:
        assert await waiter
        order.append("woken")

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert not waiter.done()
        order.append("wake")
        wake(waiter)
    assert order == ["wake", "woken"]
    assert waiter.done()


async def test_a_wake_before_the_wait_is_not_lost() -> None:
    for seconds in (None, 5, math.inf):
        waiter = waiter_type()()
        wake(waiter)
        wake(waiter)
        with anyio.fail_after(5):
            await (waiter if seconds is None else within(waiter, seconds))


@pytest.mark.virtual_time
@pytest.mark.parametrize("seconds", [30, 0, -1])
async def test_a_deadline_ends_the_wait_without_waking_it(seconds: int) -> None:
    waiter = waiter_type()()
    before = anyio.current_time()
    assert not await within(waiter, seconds)
    assert anyio.current_time() - before == pytest.approx(max(seconds, 0))
    wake(waiter)


async def test_a_wait_that_expires_ends_without_having_been_woken() -> None:
    for early in (True, False):
        waiter = waiter_type()()
        async with anyio.create_task_group() as tg:
            if early:
                expire(waiter)
            else:
                tg.start_soon(call_when_all_wait, expire, waiter)
            assert not await waiter
        expire(waiter)
        wake(waiter)


async def call_when_all_wait(act: Callable[[Waiter], None], waiter: Waiter) -> None:
    await anyio.wait_all_tasks_blocked()
    act(waiter)


@pytest.mark.virtual_time
@pytest.mark.parametrize("seconds", [30, math.inf])
async def test_a_wake_in_time_leaves_no_timer_behind(seconds: float) -> None:
    waiter = waiter_type()()
    before = anyio.current_time()

    async def wake_later() -> None:
        await anyio.sleep(1)
        wake(waiter)

    async with anyio.create_task_group() as tg:
        tg.start_soon(wake_later)
        assert await within(waiter, seconds)
    assert anyio.current_time() - before == pytest.approx(1)


@pytest.mark.parametrize("seconds", [None, 60])
async def test_a_wait_can_be_cancelled_and_a_wake_afterwards_does_nothing(seconds: int | None) -> None:
    waiter = waiter_type()()
    ended = []

    async def wait() -> None:
        try:
            await (waiter if seconds is None else within(waiter, seconds))
        except anyio.get_cancelled_exc_class():
            ended.append("cancelled")
            raise

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        tg.cancel_scope.cancel()
    assert ended == ["cancelled"]
    wake(waiter)
    await anyio.lowlevel.checkpoint()


async def test_a_wait_within_a_cancelled_scope_ends() -> None:
    waiter = waiter_type()()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await within(waiter, 1000)
    assert scope.cancelled_caught


async def test_a_cancellation_does_not_reach_a_shielded_wait() -> None:
    waiter = waiter_type()()
    passed = False

    async def wait() -> None:
        nonlocal passed
        with anyio.CancelScope(shield=True):
            passed = await within(waiter, 60)

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        tg.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.wait_all_tasks_blocked()
        wake(waiter)
    assert passed


@pytest.mark.virtual_time
async def test_a_deadline_of_a_scope_around_it_counts_as_well() -> None:
    waiter = waiter_type()()
    with anyio.move_on_after(5) as scope:
        await within(waiter, 30)
    assert scope.cancelled_caught


@pytest.mark.parametrize("wake_first", [False, True])
async def test_a_wake_and_a_cancellation_in_the_same_moment_end_the_wait_once(wake_first: bool) -> None:
    waiter = waiter_type()()
    scope = anyio.CancelScope()
    ends = []

    async def wait() -> None:
        with scope:
            await waiter
            ends.append("woken")
        ends.append("left")

    async with anyio.create_task_group() as tg:
        tg.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        for act in (partial(wake, waiter), scope.cancel)[:: 1 if wake_first else -1]:
            act()
    # What comes second finds the wait ended; only asyncio lets a wake overtake a cancellation under way.
    assert ends in (["woken", "left"], ["left"])
    assert not wake_first or "woken" in ends
    assert waiter.done()


@pytest.mark.parametrize("woken", [False, True])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_asyncios_own_cancellation_ends_a_wait_woken_or_not(run: Callable[..., None], woken: bool) -> None:
    async def main() -> None:
        waiter = waiter_type()()

        async def wait() -> None:
            await within(waiter, 60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        if woken:
            wake(waiter)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert waiter.done()
        wake(waiter)

    run(main())


async def test_thousands_who_wait_are_all_woken() -> None:
    new = waiter_type()
    waiters: list[Waiter] = []
    woken: list[int] = []

    async def wait(number: int) -> None:
        waiters.append(waiter := new())
        await waiter
        woken.append(number)

    async with anyio.create_task_group() as tg:
        for number in range(2000):
            tg.start_soon(wait, number)
        await anyio.wait_all_tasks_blocked()
        for waiter in waiters:
            wake(waiter)
    assert sorted(woken) == list(range(2000))


async def test_a_moment_wakes_all_who_wait_for_it_and_later_nobody_waits() -> None:
    moment = Moment()
    woken: list[int] = []

    async def wait(number: int, scope: anyio.CancelScope) -> None:
        with scope:
            await moment.wait()
            woken.append(number)

    async with anyio.create_task_group() as tg:
        scopes = [anyio.CancelScope() for _ in range(4)]
        for number, scope in enumerate(scopes):
            tg.start_soon(wait, number, scope)
        await anyio.wait_all_tasks_blocked()
        scopes[1].cancel()
        await anyio.wait_all_tasks_blocked()
        assert not moment.passed
        moment.set()
        moment.set()
    assert sorted(woken) == [0, 2, 3]
    assert moment.passed
    await moment.wait()


class Alarm:
    """Notes when it went off."""

    def __init__(self) -> None:
        self.began = anyio.current_time()
        self.after: float | None = None

    def expire(self) -> None:
        assert self.after is None
        self.after = round(anyio.current_time() - self.began, 3)


@pytest.mark.virtual_time
async def test_deadlines_expire_in_time_whatever_their_order_and_never_after_their_end() -> None:
    deadlines: Deadlines[Alarm] = Deadlines()
    others: Deadlines[Alarm] = Deadlines()
    alarms = {seconds: Alarm() for seconds in (40, 20, 30, 10, 50, -1, math.inf)}
    for seconds, alarm in alarms.items():
        (others if seconds == 50 else deadlines).begin(alarm, seconds)
    deadlines.end(alarms[20])
    deadlines.end(alarms[20])
    await anyio.sleep(35)
    again = Alarm()
    deadlines.begin(again, 1)
    await anyio.sleep(1000)
    assert {seconds: alarm.after for seconds, alarm in alarms.items()} == {
        40: 40, 20: None, 30: 30, 10: 10, 50: 50, -1: 0, math.inf: None,
    }  # fmt: skip
    assert again.after == 1
    assert list(deadlines.under_way) == [alarms[math.inf]]
    assert not others.under_way


async def test_a_deadline_that_is_still_to_come_keeps_no_loop_from_ending() -> None:
    deadlines: Deadlines[Alarm] = Deadlines()
    deadlines.begin(Alarm(), 3600)


def test_a_loop_that_runs_as_the_guest_of_another_has_its_own_kind() -> None:
    """A trio program inside an asyncio program: both loops run in one thread, in turns."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome[Any]] = loop.create_future()
        host_woken = waiter_type()()

        async def guest() -> type[Waiter]:
            waiter = waiter_type()()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(call_when_all_wait, wake, waiter)
                assert await within(waiter, 60)
            wake(host_woken)
            return type(waiter)

        trio.lowlevel.start_guest_run(
            guest, run_sync_soon_threadsafe=loop.call_soon_threadsafe, done_callback=ended.set_result
        )
        assert await within(host_woken, 60)
        assert (await ended).unwrap() is not type(host_woken) is waiter_type()

    asyncio.run(main())
