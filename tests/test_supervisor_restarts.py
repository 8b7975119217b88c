"""Restarts: what Erlang/OTP documents of its ``supervisor`` (docs/otp.md), and bad moments for a restart."""

# ruff: noqa: PT012 - leaving the supervisor's block is what raises

import asyncio
import math
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus
from structlog.testing import capture_logs

from tests.kids import Kid
from vmactor.errors import IllegalArgumentError, IllegalStateError
from vmactor.supervision_tree import ChildState
from vmactor.supervisor import (
    Backoff,
    ChildExit,
    ChildFailedError,
    Decision,
    Restart,
    RestartLimit,
    RestartLimitReachedError,
    Strategy,
    Supervisor,
)

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

PATIENT = RestartLimit(1000, 1)
"""A limit that is not what the test is about."""


class House:
    """A supervisor with children that share a log."""

    def __init__(self, **supervisor: Any) -> None:
        self.log: list[str] = []
        self.supervisor = Supervisor("house", **({"limit": PATIENT} | supervisor))

    async def add(self, names: str, restart: Restart = Restart.PERMANENT, **start: Any) -> list[Kid]:
        kids = [Kid(self.log, name) for name in names]
        for kid in kids:
            await self.supervisor.start(kid.name, kid, restart=restart, **start)
        return kids

    async def logged(self) -> str:
        """What happened since the last call, when all that can happen now has."""
        await anyio.sleep(0.001)
        text = " ".join(self.log)
        self.log.clear()
        return text

    def states(self) -> dict[str, str]:
        return {child.name: str(child.state) for child in self.supervisor.tree().children}


def ignore(_ended: ChildExit) -> Decision:
    return Decision.IGNORE


# -- Restart types -----------------------------------------------------------------------------------


async def test_a_permanent_child_is_always_started_again() -> None:
    house = House()
    async with house.supervisor:
        [a] = await house.add("a")
        a.fail()
        assert await house.logged() == "a+ a- a+"
        a.finish()
        assert await house.logged() == "a- a+"
        assert house.states() == {"a": "running"}


async def test_a_transient_child_is_started_again_after_a_failure_only() -> None:
    house = House()
    async with house.supervisor:
        [a] = await house.add("a", Restart.TRANSIENT)
        a.fail()
        assert await house.logged() == "a+ a- a+"
        a.finish()
        assert await house.logged() == "a-"
        assert house.states() == {"a": "stopped"}
        assert await house.supervisor.restart("a") == 3


@pytest.mark.parametrize("failing", [True, False])
async def test_a_temporary_child_is_never_started_again_and_forgotten(failing: bool) -> None:
    house = House(decide=ignore)
    async with house.supervisor:
        [a] = await house.add("a", Restart.TEMPORARY)
        (a.fail if failing else a.finish)()
        assert await house.logged() == "a+ a-"
        assert house.states() == {}


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
async def test_a_temporary_child_that_a_siblings_failure_stops_is_not_started_again(
    strategy: Strategy,
) -> None:
    house = House(strategy=strategy)
    async with house.supervisor:
        [a] = await house.add("a")
        await house.add("b", Restart.TEMPORARY)
        await house.add("c")
        assert await house.logged() == "a+ b+ c+"
        a.fail()
        assert await house.logged() == "a- c- b- a+ c+"
        assert house.states() == {"a": "running", "c": "running"}


async def test_what_is_not_started_again_is_a_decision_and_what_is_started_again_is_none() -> None:
    ended: list[ChildExit] = []

    def decide(end: ChildExit) -> Decision:
        ended.append(end)
        return Decision.IGNORE

    house = House(decide=decide)
    async with house.supervisor:
        [a] = await house.add("a")
        [b] = await house.add("b", Restart.TRANSIENT)
        [c] = await house.add("c", Restart.TEMPORARY)
        a.fail()
        b.fail()
        await house.logged()
        assert ended == []
        a.finish()
        b.finish()
        c.finish()
        await house.logged()
        assert sorted(ended, key=lambda end: end.name) == [ChildExit("b", None), ChildExit("c", None)]


# -- Strategies --------------------------------------------------------------------------------------


async def test_one_for_one_is_the_default_and_affects_nobody_else() -> None:
    house = House()
    async with house.supervisor:
        _, b, _ = await house.add("abc")
        assert await house.logged() == "a+ b+ c+"
        b.fail()
        assert await house.logged() == "b- b+"
        assert house.supervisor.tree().strategy is Strategy.ONE_FOR_ONE
    assert await house.logged() == "c- b- a-"


async def test_one_for_all_stops_all_others_in_reverse_and_starts_all_in_order() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    async with house.supervisor:
        _, b, _ = await house.add("abc")
        assert await house.logged() == "a+ b+ c+"
        b.fail()
        assert await house.logged() == "b- c- a- a+ b+ c+"
    assert await house.logged() == "c- b- a-"


async def test_rest_for_one_stops_those_after_in_reverse_and_starts_all_of_these_in_order() -> None:
    house = House(strategy=Strategy.REST_FOR_ONE)
    async with house.supervisor:
        _, b, _, _ = await house.add("abcd")
        assert await house.logged() == "a+ b+ c+ d+"
        b.fail()
        assert await house.logged() == "b- d- c- b+ c+ d+"
    assert await house.logged() == "d- c- b- a-"


async def test_each_child_is_stopped_for_a_restart_within_its_own_deadline() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    asked: list[str] = []
    async with house.supervisor:
        for name, shutdown in (("a", 7), ("b", 3)):
            kid = Kid(house.log, name)
            await house.supervisor.start(
                name,
                kid,
                restart=Restart.PERMANENT,
                ask_to_stop=partial(asked.append, name),
                shutdown=shutdown,
            )
        [c] = await house.add("c")
        began = anyio.current_time()
        c.fail()
        await anyio.sleep(9.5)
        assert await house.logged() == "a+ b+ c+ c- b-"
        await anyio.sleep(1)
        assert await house.logged() == "a- a+ b+ c+"
        assert asked == ["b", "a"]
        tree = house.supervisor.tree()
        assert {child.uptime for child in tree.children} == {anyio.current_time() - began - 10}
        # They deserve no more time at the end.
        house.supervisor._children["a"].task.cancel_soon()  # type: ignore[union-attr]


async def test_dynamic_children_stop_all_at_once_each_within_its_own_deadline() -> None:
    house = House(strategy=Strategy.SIMPLE_ONE_FOR_ONE)
    async with house.supervisor:
        for number in range(100):
            kid = Kid(house.log, str(number), clean_up=number % 10)
            await house.supervisor.start(kid.name, kid)
        for shutdown in (20, 5):
            await house.supervisor.start(
                f"stubborn-{shutdown}",
                Kid(house.log, f"stubborn-{shutdown}", clean_up=1),
                ask_to_stop=lambda: None,
                shutdown=shutdown,
            )
        house.log.clear()
        began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(20 + 1)
    assert len(house.log) == 102
    assert house.log.index("stubborn-5-") < house.log.index("9-")  # at 6 and at 9 seconds


async def test_dynamic_children_are_restarted_one_by_one_and_nothing_is_kept_of_the_dead() -> None:
    house = House(strategy=Strategy.SIMPLE_ONE_FOR_ONE)
    async with house.supervisor as supervisor:
        a, b, _ = await house.add("abc", Restart.TRANSIENT)
        assert await house.logged() == "a+ b+ c+"
        a.fail()
        b.finish()
        await supervisor.stop("c")
        assert sorted((await house.logged()).split()) == ["a+", "a-", "b-", "c-"]
        assert house.states() == {"a": "running"}
        for name in "bc":
            with pytest.raises(IllegalStateError, match="no child"):
                await supervisor.restart(name)
            with pytest.raises(IllegalStateError, match="no child"):
                supervisor.delete(name)


# -- Intensity ---------------------------------------------------------------------------------------


async def test_one_restart_within_five_seconds_is_borne_by_default_and_the_second_is_too_many() -> None:
    house = House(limit=RestartLimit())
    with pytest.raises(RestartLimitReachedError, match="house: child a is not started again") as caught:
        async with house.supervisor:
            [a] = await house.add("a")
            a.fail()
            await anyio.sleep(5.1)
            a.fail()  # the first does not count any more
            await anyio.sleep(4.9)
            assert a.runs == 3
            a.fail()
            await anyio.sleep_forever()
    assert a.runs == 3
    assert str(caught.value.__cause__) == "a fell"
    assert [failure.child for failure in caught.value.history] == ["a", "a"]
    assert caught.value.history[-1].error is caught.value.__cause__
    assert caught.value.limit == RestartLimit(1, 5)


@pytest.mark.parametrize("intensity", [0, 1, 3])
async def test_exactly_the_intensity_is_borne_within_any_period(intensity: int) -> None:
    house = House(limit=RestartLimit(intensity, 10))
    with pytest.raises(RestartLimitReachedError):
        async with house.supervisor:
            [a] = await house.add("a")
            for _ in range(intensity):
                a.fail()
                await anyio.sleep(1)
            assert a.runs == intensity + 1
            a.fail()
            await anyio.sleep_forever()
    assert a.runs == intensity + 1


async def test_at_the_limit_all_children_are_stopped_in_reverse_order() -> None:
    house = House(limit=RestartLimit(0))
    with pytest.raises(RestartLimitReachedError):
        async with house.supervisor:
            _, b, _, _ = await house.add("abcd")
            b.fail()
            await anyio.sleep_forever()
    assert " ".join(house.log) == "a+ b+ c+ d+ b- d- c- a-"


async def test_the_failures_of_all_children_count_together() -> None:
    house = House(limit=RestartLimit(2, 60))
    with pytest.raises(RestartLimitReachedError, match=r"3 failures within 60 s \(of a, b, c\)") as caught:
        async with house.supervisor:
            for kid in await house.add("abc"):
                kid.fail()
                await anyio.sleep(1)
            await anyio.sleep_forever()
    assert caught.value.child == "c"


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
async def test_a_restart_of_many_counts_once(strategy: Strategy) -> None:
    house = House(strategy=strategy, limit=RestartLimit(1))
    async with house.supervisor:
        a, *_ = await house.add("abcdefgh")
        a.fail()
        await house.logged()
        assert set(house.states().values()) == {"running"}
        assert house.supervisor.tree().failures == 1


async def test_a_restart_that_fails_is_tried_again_and_counts() -> None:
    house = House(limit=RestartLimit(3, 5))
    with pytest.raises(RestartLimitReachedError) as caught:
        async with house.supervisor:
            kid = Kid(house.log, "a", ["serve", "fail", "return", "serve", "fail"])
            await house.supervisor.start("a", kid, restart=Restart.PERMANENT)
            kid.fail()
            assert await house.logged() == "a+ a- a! a+"
            kid.fail()
            await anyio.sleep_forever()
    assert [type(failure.error).__name__ for failure in caught.value.history] == [
        "OSError",
        "OSError",
        "IllegalStateError",
        "OSError",
    ]


async def test_a_failed_restart_of_siblings_is_tried_again_from_the_first() -> None:
    house = House(strategy=Strategy.REST_FOR_ONE)
    async with house.supervisor:
        [a] = await house.add("a")
        second = Kid(house.log, "b", ["serve", "fail"])
        await house.supervisor.start("b", second, restart=Restart.PERMANENT)
        await house.add("c")
        await house.logged()
        a.fail()
        # As in OTP, those before the one that cannot start have not failed, and are left alone.
        assert await house.logged() == "a- c- b- a+ b! b+ c+"
        assert house.supervisor.tree().failures == 2


async def test_giving_up_goes_to_the_supervisor_above_which_may_start_all_of_it_again() -> None:
    house = House(limit=RestartLimit(1, 60))
    leaf = Kid(house.log, "leaf")

    async def branch(*, task_status: TaskStatus[None]) -> None:
        async with Supervisor("branch", limit=RestartLimit(2, 60)) as supervisor:
            await supervisor.start("leaf", leaf, restart=Restart.PERMANENT)
            task_status.started()
            await anyio.sleep_forever()

    with pytest.raises(RestartLimitReachedError, match="house: child branch") as caught:
        async with house.supervisor:
            await house.supervisor.start("branch", branch, restart=Restart.TRANSIENT)
            while True:
                leaf.fail()
                await anyio.sleep(0.001)
    assert leaf.runs == (2 + 1) * (1 + 1)  # limits of levels multiply
    cause = caught.value.__cause__
    assert isinstance(cause, RestartLimitReachedError)
    assert cause.child == "leaf"


async def test_nothing_is_started_again_once_a_supervisor_escalates() -> None:
    house = House()
    with pytest.raises(ChildFailedError, match="child a failed"):
        async with house.supervisor:
            [a] = await house.add("a", Restart.TEMPORARY)
            [b] = await house.add("b")
            a.fail()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    b.fail()
                    await anyio.sleep(1)
    assert " ".join(house.log) == "a+ b+ a- b-"


async def test_nothing_is_started_again_once_the_block_is_left() -> None:
    house = House(decide=ignore)
    async with anyio.create_task_group() as tg, house.supervisor as supervisor:
        [a] = await house.add("a")
        await supervisor.start("b", Kid(house.log, "b", clean_up=10), restart=Restart.PERMANENT)

        async def fail() -> None:
            await anyio.sleep(5)
            a.fail()

        tg.start_soon(fail)
    assert " ".join(house.log) == "a+ b+ a- b-"


@pytest.mark.parametrize(("intensity", "period"), [(-1, 5), (1, 0), (1, -1), (1, math.nan)])
async def test_a_limit_that_is_none_is_refused(intensity: int, period: float) -> None:
    with pytest.raises(IllegalArgumentError, match="intensity of 0 or more and a period above 0"):
        RestartLimit(intensity, period)


# -- Adding, stopping, starting again, forgetting ----------------------------------------------------


async def test_a_child_that_cannot_start_is_not_added() -> None:
    house = House()
    async with house.supervisor as supervisor:
        for start, error in (("fail", OSError), ("return", IllegalStateError)):
            with pytest.raises(error):
                await supervisor.start("a", Kid(house.log, "a", [start]), restart=Restart.PERMANENT)
            assert house.states() == {}
        assert supervisor.tree().failures == 0
        await house.add("a")


async def test_a_start_that_is_cancelled_adds_no_permanent_child_either() -> None:
    house = House()
    async with house.supervisor as supervisor:
        with anyio.move_on_after(1):
            await supervisor.start("a", Kid(house.log, "a", ["hang"]), restart=Restart.PERMANENT)
        assert house.states() == {}

        async def late(*, task_status: TaskStatus[None]) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                task_status.started()

        with anyio.move_on_after(1):
            await supervisor.start("b", late, restart=Restart.PERMANENT)
        assert house.states() == {}


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("restart", [Restart.PERMANENT, Restart.TRANSIENT])
async def test_a_start_that_is_cancelled_as_its_child_falls_does_not_bring_it_back(
    strategy: Strategy, restart: Restart
) -> None:
    house = House(strategy=strategy)
    runs = 0

    async def child(*, task_status: TaskStatus[None]) -> None:
        nonlocal runs
        runs += 1
        scope.cancel()
        task_status.started()
        raise ValueError

    async with house.supervisor as supervisor:
        with anyio.CancelScope() as scope:
            await supervisor.start("a", child, restart=restart)
        assert house.states() == {}
        await house.logged()
        assert (house.states(), runs) == ({}, 1)
        await house.add("a")


async def test_a_name_is_taken_as_long_as_the_child_is_kept() -> None:
    house = House()
    async with house.supervisor as supervisor:
        await house.add("a")
        with pytest.raises(ValueError, match=r"a child a already \(running\)"):
            await house.add("a")
        await supervisor.stop("a")
        with pytest.raises(ValueError, match=r"a child a already \(stopped\)"):
            await house.add("a")
        supervisor.delete("a")
        await house.add("a")


async def test_a_child_that_was_stopped_is_kept_in_its_place_and_can_be_started_again() -> None:
    house = House()
    async with house.supervisor as supervisor:
        await house.add("abc")
        await supervisor.stop("b")
        assert supervisor.children == ("a", "c")
        assert house.states() == {"a": "running", "b": "stopped", "c": "running"}
        assert await supervisor.restart("b") == 2
        assert supervisor.children == ("a", "b", "c")
        assert supervisor.tree().failures == 0
        await house.logged()
    assert await house.logged() == "c- b- a-"


async def test_stopping_a_child_is_no_failure_and_nobody_else_is_affected() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL, limit=RestartLimit(0))
    async with house.supervisor as supervisor:
        await house.add("abc")
        await supervisor.stop("b")
        assert await house.logged() == "a+ b+ c+ b-"


@pytest.mark.parametrize("strategy", [Strategy.ONE_FOR_ALL, Strategy.REST_FOR_ONE])
async def test_a_child_that_was_stopped_is_started_by_a_restart_of_its_siblings(strategy: Strategy) -> None:
    house = House(strategy=strategy)
    async with house.supervisor as supervisor:
        a, _, c = await house.add("abc", Restart.TRANSIENT)
        await supervisor.stop("b")
        c.finish()
        await house.logged()
        assert house.states() == {"a": "running", "b": "stopped", "c": "stopped"}
        a.fail()
        assert await house.logged() == "a- a+ b+ c+"


async def test_what_lives_is_being_restarted_or_is_not_there_cannot_be_restarted_or_deleted() -> None:
    house = House(backoff=Backoff(10, 10, jitter=0))
    async with house.supervisor as supervisor:
        [a] = await house.add("a")
        for name, why in (("a", "is running"), ("nobody", "has no child nobody")):
            with pytest.raises(IllegalStateError, match=why):
                await supervisor.restart(name)
            with pytest.raises(IllegalStateError, match=why):
                supervisor.delete(name)
        a.fail()
        await house.logged()
        with pytest.raises(IllegalStateError, match="is restarting"):
            await supervisor.restart("a")
        with pytest.raises(IllegalStateError, match="is restarting"):
            supervisor.delete("a")


async def test_a_restart_on_demand_that_fails_says_so_and_the_child_is_still_kept() -> None:
    house = House()
    async with house.supervisor as supervisor:
        await supervisor.start("a", Kid(house.log, "a", ["serve", "fail", "hang"]), restart=Restart.PERMANENT)
        await supervisor.stop("a")
        with pytest.raises(OSError, match="cannot start"):
            await supervisor.restart("a")
        assert house.states() == {"a": "stopped"}
        with anyio.move_on_after(3):
            await supervisor.restart("a")
        assert house.states() == {"a": "stopped"}
        assert await supervisor.restart("a") == 4
        assert supervisor.tree().failures == 0


@pytest.mark.parametrize("shutdown", [-1, math.nan])
async def test_a_shutdown_time_that_is_none_is_refused(shutdown: float) -> None:
    house = House()
    async with house.supervisor:
        with pytest.raises(IllegalArgumentError, match="child a: give shutdown=0 seconds or more"):
            await house.add("a", shutdown=shutdown)
        assert house.states() == {}


async def test_a_shutdown_time_of_0_cancels_without_asking_and_infinity_waits_for_ever() -> None:
    house = House()
    asked: list[str] = []
    async with house.supervisor as supervisor:
        await house.add("a", ask_to_stop=lambda: asked.append("a"), shutdown=0)
        await supervisor.stop("a")
        assert asked == []
        [b] = await house.add("b", ask_to_stop=lambda: asked.append("b"), shutdown=math.inf)
        with anyio.move_on_after(1e6):
            await supervisor.stop("b")
        assert asked == ["b"]
        assert house.states() == {"a": "stopped", "b": "stopping"}
        b.finish()


async def test_a_childs_time_to_end_runs_on_one_clock_for_all_who_stop_it() -> None:
    house = House()
    async with house.supervisor as supervisor:
        began = anyio.current_time()
        await house.add("a", ask_to_stop=lambda: None, shutdown=10)
        for _ in range(4):
            with anyio.move_on_after(2):
                await supervisor.stop("a")
        await supervisor.stop("a")
        assert anyio.current_time() - began == pytest.approx(10)


async def test_no_deadline_of_the_one_above_cuts_a_supervisor_short() -> None:
    house = House()
    kids = [Kid(house.log, name, clean_up=20) for name in "ab"]

    async def branch(*, task_status: TaskStatus[None]) -> None:
        async with Supervisor("branch") as supervisor:
            for kid in kids:
                await supervisor.start(kid.name, kid)
            task_status.started()
            await anyio.sleep_forever()

    async with house.supervisor as supervisor:
        await supervisor.start("branch", branch, shutdown=1)
        await house.logged()
        await supervisor.stop("branch")
        assert await house.logged() == "b- a-"


async def test_a_supervisor_is_for_one_block() -> None:
    supervisor = Supervisor("house")
    async with supervisor:
        pass
    with pytest.raises(IllegalStateError, match="make a new supervisor"):
        async with supervisor:
            pass


# -- Bad moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_child_that_is_stopped_while_it_waits_to_be_restarted_is_not(strategy: Strategy) -> None:
    house = House(strategy=strategy, backoff=Backoff(100, 100, jitter=0))
    async with house.supervisor as supervisor:
        [a] = await house.add("a")
        a.fail()
        assert await house.logged() == "a+ a-"
        assert house.states() == {"a": "restarting"}
        await supervisor.stop("a")
        kept = strategy is not Strategy.SIMPLE_ONE_FOR_ONE
        assert house.states() == ({"a": "stopped"} if kept else {})
        began = anyio.current_time()
        await supervisor.start("b", Kid(house.log, "b"))  # nobody waits for a restart of nobody
        assert anyio.current_time() - began < 1
        await anyio.sleep(1000)
        assert await house.logged() == "b+"
        if kept:
            assert await supervisor.restart("a") == 2


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_a_child_that_is_stopped_while_it_is_started_again_stays_so(strategy: Strategy) -> None:
    house = House(strategy=strategy)
    async with house.supervisor as supervisor:
        kid = Kid(house.log, "a", ["serve", "hang"])
        await supervisor.start("a", kid, restart=Restart.PERMANENT)
        await house.add("b")
        kid.fail()
        await house.logged()
        assert house.states()["a"] == "starting"
        await supervisor.stop("a")
        await house.logged()
        assert supervisor.children == ("b",)
        assert house.states()["b"] == "running"
        assert supervisor.tree().failures == 1


async def test_a_sibling_stopped_for_good_while_others_are_restarted_stays_stopped() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL, backoff=Backoff(5, 5, jitter=0))
    async with house.supervisor as supervisor:
        a, *_ = await house.add("abc")
        await house.logged()
        a.fail()
        assert await house.logged() == "a- c- b-"
        await supervisor.stop("b")
        await anyio.sleep(6)
        assert await house.logged() == "a+ c+"
        assert house.states() == {"a": "running", "b": "stopped", "c": "running"}


async def test_a_sibling_that_falls_while_it_is_stopped_for_a_restart_does_not_count() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL, limit=RestartLimit(1))
    async with house.supervisor as supervisor:
        b = Kid(house.log, "b", clean_up=1, clean_up_error=OSError("b cannot clean up"))
        a, *_ = await house.add("a")
        await supervisor.start("b", b, restart=Restart.PERMANENT)
        [c] = await house.add("c")
        await house.logged()
        c.fail()
        await house.logged()
        a.fail()  # its turn to be stopped has not come
        await anyio.sleep(2)
        assert await house.logged() == "a- b- a+ b+ c+"
        assert set(house.states().values()) == {"running"}
        assert supervisor.tree().failures == 1
        b._clean_up_error = None


async def test_a_further_failure_joins_the_restart_under_way() -> None:
    house = House(strategy=Strategy.REST_FOR_ONE)
    async with house.supervisor as supervisor:
        a, b = await house.add("ab")
        c = Kid(house.log, "c", ["serve", "hang"])
        await supervisor.start("c", c, restart=Restart.PERMANENT)
        await house.add("d")
        await house.logged()
        b.fail()
        assert await house.logged() == "b- d- c- b+ c?"  # it hangs here
        a.fail()  # one before
        assert await house.logged() == "a- b- a+ b+ c+ d+"
        assert supervisor.tree().failures == 2


async def test_a_child_that_falls_while_its_siblings_are_started_again_restarts_them_too() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    async with house.supervisor as supervisor:
        [a] = await house.add("a")
        b = Kid(house.log, "b", ["serve", "hang", "hang"])
        await supervisor.start("b", b, restart=Restart.PERMANENT)
        await house.logged()
        for _ in range(2):
            a.fail()
            await anyio.sleep(1)
        assert await house.logged() == "a- b- a+ b? a- a+ b?"
        a.fail()
        assert await house.logged() == "a- a+ b+"


async def test_a_start_waits_for_a_restart_of_siblings_under_way() -> None:
    house = House(strategy=Strategy.REST_FOR_ONE, backoff=Backoff(10, 10, jitter=0))
    async with house.supervisor as supervisor:
        [a] = await house.add("a")
        await supervisor.start("b", Kid(house.log, "b"), restart=Restart.PERMANENT)
        await supervisor.stop("b")
        a.fail()
        await house.logged()
        began = anyio.current_time()
        await house.add("c")
        assert anyio.current_time() - began == pytest.approx(10, abs=0.1)
        assert await house.logged() == "a+ b+ c+"


async def test_a_restart_of_siblings_waits_for_a_start_under_way() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    serve = anyio.Event()

    async def slow(*, task_status: TaskStatus[int]) -> None:
        house.log.append("slow")
        await serve.wait()
        await Kid(house.log, "s")(task_status=task_status)

    async with house.supervisor as supervisor, anyio.create_task_group() as tg:
        [a] = await house.add("a")

        async def start() -> None:
            await supervisor.start("s", slow, restart=Restart.PERMANENT)
            await house.add("b")  # comes after the restart that has waited

        tg.start_soon(start)
        await house.logged()
        a.fail()
        assert await house.logged() == "a-"
        assert house.states() == {"a": "restarting", "s": "starting"}
        serve.set()
        assert await house.logged() == "s+ s- a+ slow s+ b+"


@pytest.mark.parametrize("ending", ["fails", "cancelled", "cancelled as it serves"])
async def test_a_start_for_which_a_restart_waits_adds_nothing_if_it_fails_or_is_cancelled(
    ending: str,
) -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    scope = anyio.CancelScope()
    go = anyio.Event()

    async def slow(*, task_status: TaskStatus[None]) -> None:
        house.log.append("slow")
        await go.wait()
        if ending == "fails":
            raise OSError("cannot start")
        scope.cancel()
        if ending == "cancelled as it serves":
            task_status.started()
        await anyio.sleep_forever()

    async with house.supervisor as supervisor, anyio.create_task_group() as tg:
        [a] = await house.add("a")

        async def start() -> None:
            with scope, pytest.raises(OSError, match="cannot start"):
                await supervisor.start("s", slow, restart=Restart.PERMANENT)

        tg.start_soon(start)
        await house.logged()
        a.fail()
        await house.logged()
        go.set()
        assert await house.logged() == "a+"
        assert house.states() == {"a": "running"}


async def test_a_child_that_begins_to_serve_as_a_sibling_falls_is_started_again_after_it() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    serve = anyio.Event()

    async def slow(*, task_status: TaskStatus[int]) -> None:
        if kid.runs > 0:
            await serve.wait()
        await kid(task_status=task_status)

    async with house.supervisor as supervisor:
        [a] = await house.add("a")
        kid = Kid(house.log, "b")
        await supervisor.start("b", slow, restart=Restart.PERMANENT)
        a.fail()
        assert await house.logged() == "a+ b+ a- b- a+"
        a.fail()
        serve.set()
        log = await house.logged()
        assert log.endswith("a+ b+")
        assert log.count("a+") == 1


@pytest.mark.parametrize("how", ["itself", "in a task of its own", "by a child of its own"])
async def test_a_child_cannot_start_others_while_it_is_itself_restarted_together_with_them(
    how: str,
) -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    refused: list[Exception] = []

    async def start_another() -> None:
        try:
            await house.supervisor.start("b", Kid(house.log, "b"))
        except IllegalStateError as error:
            refused.append(error)

    async def assistant(*, task_status: TaskStatus[None]) -> None:
        await start_another()
        task_status.started()

    async def parent(*, task_status: TaskStatus[int]) -> None:
        match how:
            case "itself":
                await start_another()
            case "in a task of its own":
                async with anyio.create_task_group() as tg:
                    tg.start_soon(start_another)
            case _:
                async with Supervisor("office") as office:
                    await office.start("assistant", assistant)
        await Kid(house.log, "p")(task_status=task_status)

    async with house.supervisor:
        await house.supervisor.start("p", parent, restart=Restart.PERMANENT)
        [a] = await house.add("a")
        await house.logged()
        a.fail()
        assert await house.logged() == "a- b- p- p+ a+"
    assert "cannot start others while it is restarted" in str(refused[0])


@pytest.mark.parametrize("strategy", list(Strategy))
@pytest.mark.parametrize("ending", ["body ends", "cancelled", "body fails"])
@pytest.mark.parametrize("moment", ["back-off", "being stopped", "being started"])
async def test_leaving_the_block_ends_a_restart_wherever_it_is(
    strategy: Strategy, ending: str, moment: str
) -> None:
    backoff = Backoff(50, 50, jitter=0) if moment == "back-off" else None
    house = House(strategy=strategy, backoff=backoff)
    with suppress(KeyError), anyio.move_on_after(5) as scope:
        async with house.supervisor as supervisor:
            kid = Kid(house.log, "a", ["serve", "hang" if moment == "being started" else "serve"])
            await supervisor.start("a", kid, restart=Restart.PERMANENT)
            slow = Kid(house.log, "b", clean_up=20 if moment == "being stopped" else 0)
            await supervisor.start("b", slow, restart=Restart.PERMANENT)
            kid.fail()
            await house.logged()
            if ending == "body fails":
                raise KeyError
            if ending == "cancelled":
                await anyio.sleep_forever()
    assert scope.cancelled_caught == (ending == "cancelled")
    assert supervisor.children == ()
    assert house.states() == {}
    house.log.clear()
    await anyio.sleep(200)
    assert house.log == []


async def test_an_escalation_ends_the_restarts_of_others() -> None:
    house = House(backoff=Backoff(10, 10, jitter=0))
    with pytest.raises(ChildFailedError, match="child b failed"):
        async with house.supervisor:
            [a] = await house.add("a")
            [b] = await house.add("b", Restart.TEMPORARY)
            a.fail()
            await house.logged()
            b.fail()
            try:
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(100)
    assert a.runs == 1


async def test_nothing_waits_to_be_restarted_once_a_supervisor_escalates() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)
    with pytest.raises(ChildFailedError, match="x"):
        async with house.supervisor as supervisor, anyio.create_task_group() as tg:
            [a] = await house.add("a")
            [x] = await house.add("x", Restart.TEMPORARY)
            with anyio.CancelScope(shield=True):
                tg.start_soon(partial(supervisor.start, "b", Kid(house.log, "b", ["hang"])))
                await house.logged()
                a.fail()  # its restart waits for the start under way
                await house.logged()
                assert house.states()["a"] == "restarting"
                x.fail()
                assert "a+" not in await house.logged()
                assert house.states() == {"a": "stopped"}


async def test_a_failure_while_it_is_stopped_for_good_is_a_decision_for_any_child() -> None:
    house = House()
    error = OSError("cannot clean up")
    with pytest.raises(ChildFailedError, match="child a failed") as caught:
        async with house.supervisor as supervisor:
            kid = Kid(house.log, "a", clean_up_error=error)
            await supervisor.start("a", kid, restart=Restart.PERMANENT)
            await supervisor.stop("a")
            await anyio.sleep_forever()
    assert caught.value.__cause__ is error
    assert kid.runs == 1


async def test_a_failure_right_after_serving_is_a_failure_and_the_start_returns() -> None:
    house = House()
    runs: list[int] = []

    async def brief(*, task_status: TaskStatus[int]) -> None:
        runs.append(1)
        task_status.started(len(runs))
        if len(runs) < 5:
            raise OSError("at once")
        await anyio.sleep_forever()

    async with house.supervisor as supervisor:
        assert await supervisor.start("a", brief, restart=Restart.PERMANENT) == 1
        await house.logged()
        assert house.states() == {"a": "running"}
        assert supervisor.tree().failures == 4


async def test_nobody_is_started_after_a_sibling_that_has_failed_meanwhile() -> None:
    house = House(strategy=Strategy.REST_FOR_ONE)
    runs: list[int] = []
    go = anyio.Event()

    async def brief(*, task_status: TaskStatus[None]) -> None:
        runs.append(1)
        task_status.started()
        if len(runs) == 1:
            await go.wait()
        if len(runs) < 4:
            raise OSError("at once")
        await anyio.sleep_forever()

    async with house.supervisor as supervisor:
        await supervisor.start("a", brief, restart=Restart.PERMANENT)
        await house.add("b")
        go.set()
        assert await house.logged() == "b+ b- b+"
        assert len(runs) == 4


async def test_a_child_that_stops_itself_is_not_started_again() -> None:
    house = House()

    async def suicidal(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await house.supervisor.stop("a")

    async with house.supervisor as supervisor:
        await supervisor.start("a", suicidal, restart=Restart.PERMANENT)
        await house.logged()
        assert house.states() == {"a": "stopped"}


def test_asyncio_timeouts_which_mind_no_shield_leave_nothing_of_a_restart_either() -> None:
    house = House(strategy=Strategy.ONE_FOR_ALL)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                async with house.supervisor as supervisor:
                    kid = Kid(house.log, "a", ["serve", "hang"])
                    await supervisor.start("a", kid, restart=Restart.PERMANENT)
                    await house.add("b")
                    kid.fail()
                    await anyio.sleep(1)
        assert house.supervisor.children == ()

    asyncio.run(main())
    assert " ".join(house.log) == "a+ b+ a- b- a?"


# -- Back-off ----------------------------------------------------------------------------------------


async def times_of_runs(backoff: Backoff, lives: list[float], **supervisor: Any) -> list[float]:
    """Seconds between the end of each run and the start of the next."""
    began: list[float] = []
    ended: list[float] = []
    remaining = iter(lives)

    async def child(*, task_status: TaskStatus[None]) -> None:
        began.append(anyio.current_time())
        task_status.started()
        await anyio.sleep(next(remaining, math.inf))
        ended.append(anyio.current_time())
        raise OSError

    async with Supervisor("house", limit=PATIENT, backoff=backoff, **supervisor) as house:
        await house.start("a", child, restart=Restart.PERMANENT)
        await anyio.sleep(10_000)
    return [round(start - end, 3) for start, end in zip(began[1:], ended, strict=True)]


@pytest.mark.parametrize("strategy", list(Strategy))
async def test_restarts_wait_longer_each_time_up_to_a_maximum_until_a_run_was_stable(
    strategy: Strategy,
) -> None:
    backoff = Backoff(initial=1, maximum=6, factor=2, jitter=0, stable=100)
    lives = [1.0, 1, 99, 1, 1, 101, 1]
    assert await times_of_runs(backoff, lives, strategy=strategy) == [1, 2, 4, 6, 6, 1, 2]


async def test_the_time_that_failing_to_start_takes_is_no_stable_run() -> None:
    house = House(backoff=Backoff(initial=10, maximum=1000, factor=2, jitter=0, stable=5))
    async with house.supervisor as supervisor:
        kid = Kid(house.log, "a", ["serve", "fail", "fail", "fail"])
        await supervisor.start("a", kid, restart=Restart.PERMANENT)
        kid.fail()
        await anyio.sleep(10 + 20 + 40 + 80 - 1)
        assert await house.logged() == "a+ a- a! a! a!"
        await anyio.sleep(2)
        assert await house.logged() == "a+"


async def test_a_share_of_each_delay_is_left_to_chance() -> None:
    numbers = iter([0, 0.5, 1, 0.25])
    backoff = Backoff(initial=8, maximum=8, factor=1, jitter=0.5)
    assert await times_of_runs(backoff, [1] * 4, chance=lambda: next(numbers)) == [8, 6, 4, 7]


async def test_others_are_served_while_one_waits_to_be_restarted() -> None:
    house = House(backoff=Backoff(100, 100, jitter=0))
    async with house.supervisor as supervisor:
        a, b = await house.add("ab")
        a.fail()
        await anyio.sleep(50)
        b.fail()
        await house.add("c")
        await anyio.sleep(60)
        assert house.states() == {"a": "running", "b": "restarting", "c": "running"}
        await anyio.sleep(50)
        assert set(supervisor.tree().counts) == {ChildState.RUNNING}


# -- What goes with it -------------------------------------------------------------------------------


async def test_each_run_begins_with_the_context_variables_of_who_added_the_child() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="nothing")
    seen: list[str] = []
    house = House()

    async def child(*, task_status: TaskStatus[None]) -> None:
        seen.append(variable.get())
        variable.set("the child's own")
        task_status.started()
        await anyio.sleep(1)
        if len(seen) < 3:
            raise OSError
        await anyio.sleep_forever()

    async with house.supervisor as supervisor:
        variable.set("the starter's")
        await supervisor.start("a", child, restart=Restart.PERMANENT)
        variable.set("another")
        await anyio.sleep(10)
    assert seen == ["the starter's"] * 3


async def test_each_failure_that_leads_to_a_restart_is_logged() -> None:
    house = House()
    with capture_logs() as lines:
        async with house.supervisor:
            [a] = await house.add("a")
            a.fail()
            await house.logged()
    [line] = lines
    assert (line["supervisor"], line["child"], line["log_level"]) == ("house", "a", "warning")
    assert str(line["exc_info"]) == "a fell"
