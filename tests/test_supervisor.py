"""Supervisors: order, deadlines, decisions, and every end that can come at a bad moment."""

# ruff: noqa: PT012 - leaving the supervisor's block is what raises

import asyncio
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus

from vmactor.errors import IllegalStateError
from vmactor.supervisor import (
    SHUTDOWN_SECONDS,
    ChildExit,
    ChildFailedError,
    ChildRun,
    Decision,
    Supervisor,
)

pytestmark = pytest.mark.anyio

Log = list[str]


def worker(log: Log, name: str, *, clean_up: float = 0, error: Exception | None = None) -> ChildRun:
    """A child that serves until it is cancelled, then takes its time, and may fail at it."""

    async def run(*, task_status: TaskStatus[str]) -> None:
        log.append(f"{name} starts")
        try:
            task_status.started(f"{name}'s value")
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(clean_up)
            log.append(f"{name} ends")
            if error is not None:
                raise error

    return run


class Polite:
    """A child that ends by itself some time after it was asked."""

    def __init__(self, log: Log, name: str, takes: float = 0) -> None:
        self.log, self.name, self.takes = log, name, takes
        self.asked = 0
        self._go = anyio.Event()

    def ask(self) -> None:
        self.asked += 1
        self._go.set()

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        try:
            await self._go.wait()
            self.log.append(f"{self.name} asked")
            await anyio.sleep(self.takes)
            self.log.append(f"{self.name} done")
        except anyio.get_cancelled_exc_class():
            self.log.append(f"{self.name} cancelled")
            raise


class Failing:
    """A child that serves, and fails when told to."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.go = anyio.Event()

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await self.go.wait()
        raise self.error


async def never_serves(*, task_status: TaskStatus[None]) -> None:
    await anyio.sleep_forever()


def noting(ends: list[ChildExit], decision: Decision) -> Callable[[ChildExit], Decision]:
    """A decision that is always the same, and a list of what was decided about."""

    def decide(end: ChildExit) -> Decision:
        ends.append(end)
        return decision

    return decide


# -- Order -------------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_children_start_in_order_and_stop_in_reverse_one_after_the_other() -> None:
    log: Log = []
    async with Supervisor("app") as supervisor:
        for name in "abc":
            assert await supervisor.start(name, worker(log, name, clean_up=1)) == f"{name}'s value"
        assert supervisor.children == ("a", "b", "c")
        assert repr(supervisor) == "<Supervisor app children=[a, b, c]>"
        began = anyio.current_time()
    assert log == ["a starts", "b starts", "c starts", "c ends", "b ends", "a ends"]
    assert anyio.current_time() - began == pytest.approx(3)
    assert supervisor.children == ()


@pytest.mark.virtual_time
async def test_starting_waits_until_the_child_serves() -> None:
    async def slow(*, task_status: TaskStatus[int]) -> None:
        await anyio.sleep(40)
        task_status.started(7)
        await anyio.sleep_forever()

    async with Supervisor("app") as supervisor:
        began = anyio.current_time()
        assert await supervisor.start("slow", slow) == 7
        assert anyio.current_time() - began == pytest.approx(40)


@pytest.mark.virtual_time
async def test_a_name_is_taken_while_its_child_lives_and_free_when_stopping_returns() -> None:
    log: Log = []
    async with Supervisor("app") as supervisor:
        await supervisor.start("a", worker(log, "a", clean_up=3))
        with pytest.raises(ValueError, match="app has a child a"):
            await supervisor.start("a", worker(log, "another"))
        await supervisor.stop("a")
        await supervisor.start("a", worker(log, "next"))
    assert log == ["a starts", "a ends", "next starts", "next ends"]


async def test_a_name_that_is_reused_in_the_moment_of_an_end_does_not_lose_the_new_child() -> None:
    log: Log = []
    ended = anyio.Event()

    async def short(*, task_status: TaskStatus[None]) -> None:
        task_status.started()

    def decide(_ended: ChildExit) -> Decision:
        ended.set()
        return Decision.IGNORE

    async with Supervisor("app", decide) as supervisor, anyio.create_task_group() as tg:

        async def restart() -> None:
            await ended.wait()
            await supervisor.start("a", worker(log, "new"))

        tg.start_soon(restart)
        await anyio.wait_all_tasks_blocked()
        await supervisor.start("a", short)
        await anyio.wait_all_tasks_blocked()
        assert supervisor.children == ("a",)
    assert log == ["new starts", "new ends"]


async def test_stopping_a_child_that_is_not_there_does_nothing() -> None:
    async with Supervisor("app") as supervisor:
        await supervisor.stop("nobody")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_outside_its_block_a_supervisor_starts_nothing(when: str) -> None:
    supervisor = Supervisor("app")
    if when == "after":
        async with supervisor:
            pass
    with pytest.raises(IllegalStateError, match=r"app .*'async with'"):
        await supervisor.start("a", never_serves)


async def test_a_child_that_is_being_stopped_cannot_start_another_one() -> None:
    refused = []
    supervisor = Supervisor("app")

    async def stubborn(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await supervisor.start("successor", never_serves)
                except IllegalStateError as error:
                    refused.append(error)

    async with supervisor:
        await supervisor.start("stubborn", stubborn)
    assert len(refused) == 1


# -- Asking, deadlines, cancellation -----------------------------------------------------------------


@pytest.mark.virtual_time
async def test_a_child_that_can_be_asked_ends_by_itself_and_is_no_decision() -> None:
    log: Log = []
    polite = Polite(log, "a", takes=4)
    decisions: list[ChildExit] = []
    async with Supervisor("app", noting(decisions, Decision.ESCALATE)) as supervisor:
        await supervisor.start("a", polite, ask_to_stop=polite.ask)
    assert log == ["a asked", "a done"]
    assert decisions == []


@pytest.mark.virtual_time
async def test_each_child_is_cancelled_after_its_own_deadline() -> None:
    log: Log = []
    first, last = Polite(log, "first", takes=1000), Polite(log, "last", takes=1000)
    async with Supervisor("app") as supervisor:
        await supervisor.start("first", first, ask_to_stop=first.ask)
        await supervisor.start("last", last, ask_to_stop=last.ask, shutdown=30)
        began = anyio.current_time()
    assert log == ["last asked", "last cancelled", "first asked", "first cancelled"]
    assert anyio.current_time() - began == pytest.approx(30 + SHUTDOWN_SECONDS)


@pytest.mark.virtual_time
async def test_several_who_stop_a_child_at_once_ask_it_once_and_all_wait_for_its_end() -> None:
    log: Log = []
    polite = Polite(log, "a", takes=3)
    async with Supervisor("app") as supervisor:
        await supervisor.start("a", polite, ask_to_stop=polite.ask)

        async def stop() -> None:
            await supervisor.stop("a")
            log.append("stopped")

        async with anyio.create_task_group() as tg:
            for _ in range(3):
                tg.start_soon(stop)
    assert log == ["a asked", "a done", "stopped", "stopped", "stopped"]
    assert polite.asked == 1


@pytest.mark.virtual_time
async def test_a_cancelled_stop_leaves_a_child_that_another_stop_still_ends() -> None:
    log: Log = []
    polite = Polite(log, "a", takes=1000)
    async with Supervisor("app") as supervisor:
        await supervisor.start("a", polite, ask_to_stop=polite.ask, shutdown=60)
        with anyio.move_on_after(1):
            await supervisor.stop("a")
        assert supervisor.children == ("a",)
        await supervisor.stop("a")
        assert supervisor.children == ()
    assert log == ["a asked", "a cancelled"]
    assert polite.asked == 1


async def test_a_child_that_cannot_be_asked_after_all_is_cancelled_at_once() -> None:
    log: Log = []

    def broken() -> None:
        raise RuntimeError("no way to ask")

    async with Supervisor("app") as supervisor:
        await supervisor.start("before", worker(log, "before"))
        await supervisor.start("a", worker(log, "a"), ask_to_stop=broken, shutdown=1000)
        began = anyio.current_time()
    assert log[-2:] == ["a ends", "before ends"]
    assert anyio.current_time() - began < 1


@pytest.mark.parametrize("asked", [True, False])
async def test_a_child_that_stops_itself_is_cancelled_and_nobody_hangs(asked: bool) -> None:
    after: list[str] = []

    async with Supervisor("app") as supervisor:

        async def suicidal(*, task_status: TaskStatus[None]) -> None:
            task_status.started()
            await supervisor.stop("suicidal")
            after.append("went on")

        began = anyio.current_time()
        asks = (lambda: after.append("asked")) if asked else None
        await supervisor.start("suicidal", suicidal, ask_to_stop=asks, shutdown=1000)
        await anyio.wait_all_tasks_blocked()
        assert supervisor.children == ()
    assert after == []
    assert anyio.current_time() - began < 1


# -- The body ----------------------------------------------------------------------------------------


@pytest.mark.virtual_time
async def test_an_exception_of_the_body_comes_out_as_itself_after_the_children_stopped() -> None:
    log: Log = []
    error = KeyError("the body's")
    with pytest.raises(KeyError) as caught:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a", clean_up=1))
            await supervisor.start("b", worker(log, "b", clean_up=1))
            raise error
    assert caught.value is error
    assert log[-2:] == ["b ends", "a ends"]


@pytest.mark.virtual_time
async def test_a_cancellation_around_the_supervisor_reaches_the_children_in_reverse_order_only() -> None:
    log: Log = []
    polite = Polite(log, "b", takes=4)
    with anyio.move_on_after(10) as scope:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a", clean_up=2))
            await supervisor.start("b", polite, ask_to_stop=polite.ask)
            await supervisor.start("c", worker(log, "c", clean_up=3))
            began = anyio.current_time()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert log == ["a starts", "c starts", "c ends", "b asked", "b done", "a ends"]
    assert anyio.current_time() - began == pytest.approx(10 + 3 + 4 + 2)


@pytest.mark.virtual_time
async def test_a_cancellation_while_children_are_being_stopped_does_not_cut_that_short() -> None:
    log: Log = []
    with anyio.move_on_after(2):
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a", clean_up=3))
            await supervisor.start("b", worker(log, "b", clean_up=3))
    assert log[-2:] == ["b ends", "a ends"]


def test_asyncio_timeouts_which_mind_no_shield_do_not_leave_children_running() -> None:
    log: Log = []

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                async with Supervisor("app") as supervisor:
                    await supervisor.start("a", worker(log, "a"))
                    polite = Polite(log, "b", takes=0.2)
                    await supervisor.start("b", polite, ask_to_stop=polite.ask)

    asyncio.run(main())
    assert log == ["a starts", "b asked", "b done", "a ends"]


# -- A start that fails or is given up ---------------------------------------------------------------


async def test_a_failure_before_the_child_serves_is_the_callers_affair_and_no_decision() -> None:
    error = OSError("no such device")

    async def broken(*, task_status: TaskStatus[None]) -> None:
        raise error

    decisions: list[ChildExit] = []
    async with Supervisor("app", noting(decisions, Decision.ESCALATE)) as supervisor:
        with pytest.raises(OSError, match="no such device") as caught:
            await supervisor.start("a", broken)
        assert supervisor.children == ()
    assert caught.value is error
    assert decisions == []


async def test_a_child_that_ends_before_it_serves_is_an_error_of_the_start() -> None:
    async def nothing(*, task_status: TaskStatus[None]) -> None:
        pass

    async with Supervisor("app") as supervisor:
        with pytest.raises(IllegalStateError, match="child a ended before it served"):
            await supervisor.start("a", nothing)


async def test_a_child_that_is_stopped_before_it_serves_is_cancelled_and_its_start_says_so() -> None:
    asked: list[None] = []
    async with Supervisor("app") as supervisor, anyio.create_task_group() as tg:

        async def stop() -> None:
            await anyio.wait_all_tasks_blocked()
            await supervisor.stop("a")

        tg.start_soon(stop)
        began = anyio.current_time()
        with pytest.raises(IllegalStateError, match="child a was stopped before it served"):
            await supervisor.start("a", never_serves, ask_to_stop=lambda: asked.append(None))
        assert anyio.current_time() - began < 1
    assert asked == []


@pytest.mark.virtual_time
async def test_a_start_that_is_cancelled_takes_its_child_with_it() -> None:
    log: Log = []

    async def slow(*, task_status: TaskStatus[None]) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(2)
            log.append("cleaned up")

    async with Supervisor("app") as supervisor:
        began = anyio.current_time()
        with anyio.move_on_after(5) as scope:
            await supervisor.start("a", slow)
        assert scope.cancelled_caught
        assert anyio.current_time() - began == pytest.approx(7)
        assert log == ["cleaned up"]
        assert supervisor.children == ()
        await supervisor.start("a", worker(log, "a"))


@pytest.mark.virtual_time
async def test_a_start_that_is_cancelled_as_the_child_begins_to_serve_takes_it_with_it_too() -> None:
    log: Log = []
    scope = anyio.CancelScope()

    async def serves(*, task_status: TaskStatus[None]) -> None:
        await anyio.sleep(1)
        scope.cancel()
        task_status.started()
        try:
            await anyio.sleep_forever()
        finally:
            log.append("ended")

    async with Supervisor("app") as supervisor:
        with scope:
            await supervisor.start("a", serves)
            log.append("started")
        assert log == ["ended"]
        assert supervisor.children == ()


@pytest.mark.virtual_time
async def test_what_a_child_fails_with_while_its_start_is_cancelled_is_not_lost() -> None:
    async def clumsy(*, task_status: TaskStatus[None]) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise OSError("cannot clean up") from KeyError("its own cause")

    async with Supervisor("app") as supervisor:
        with pytest.raises(OSError, match="cannot clean up") as caught, anyio.move_on_after(5):
            await supervisor.start("a", clumsy)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.virtual_time
async def test_a_child_begins_to_run_even_if_its_start_is_cancelled_already() -> None:
    log: Log = []

    async def owner(*, task_status: TaskStatus[None]) -> None:
        try:
            log.append("owns something")
            await anyio.sleep(1)
        finally:
            log.append("gave it back")

    async with Supervisor("app") as supervisor:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await supervisor.start("a", owner)
    assert log == ["owns something", "gave it back"]


async def test_serving_twice_is_a_failure_of_the_child() -> None:
    async def twice(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        task_status.started()

    with pytest.raises(ChildFailedError) as caught:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", twice)
            await anyio.sleep_forever()
    assert "twice" in str(caught.value.__cause__)


# -- Decisions and escalation ------------------------------------------------------------------------


async def test_a_failure_ends_the_body_stops_all_in_reverse_and_comes_out_with_its_cause() -> None:
    log: Log = []
    failing = Failing(OSError("it broke"))
    with pytest.raises(ChildFailedError, match="app: child b failed") as caught:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a"))
            await supervisor.start("b", failing)
            await supervisor.start("c", worker(log, "c"))
            failing.go.set()
            await anyio.sleep_forever()
    assert caught.value.child == "b"
    assert caught.value.__cause__ is failing.error
    assert log == ["a starts", "c starts", "c ends", "a ends"]


@pytest.mark.virtual_time
async def test_a_failure_that_is_ignored_disturbs_nobody() -> None:
    log: Log = []
    ended: list[ChildExit] = []
    failing = Failing(OSError("it broke"))
    async with Supervisor("app", noting(ended, Decision.IGNORE)) as supervisor:
        await supervisor.start("a", worker(log, "a"))
        await supervisor.start("b", failing)
        failing.go.set()
        await anyio.sleep(1)
        assert supervisor.children == ("a",)
        assert log == ["a starts"]
    assert ended == [ChildExit("b", failing.error)]


@pytest.mark.virtual_time
async def test_a_child_may_end_and_that_is_a_decision_too() -> None:
    ended: list[ChildExit] = []

    async def short(*, task_status: TaskStatus[None]) -> None:
        task_status.started()

    async with Supervisor("app") as supervisor:  # by default an end without failure is ignored
        await supervisor.start("a", short)
        await anyio.sleep(1)
        assert supervisor.children == ()

    with pytest.raises(ChildFailedError) as caught:
        async with Supervisor("app", noting(ended, Decision.ESCALATE)) as supervisor:
            await supervisor.start("a", short)
            await anyio.sleep_forever()
    assert ended == [ChildExit("a", None)]
    assert caught.value.__cause__ is None


async def test_a_failure_right_after_serving_is_a_decision_and_the_start_returns() -> None:
    async def brief(*, task_status: TaskStatus[int]) -> None:
        task_status.started(1)
        raise OSError("at once")

    ended: list[ChildExit] = []
    async with Supervisor("app", noting(ended, Decision.IGNORE)) as supervisor:
        assert await supervisor.start("a", brief) == 1
    assert [end.name for end in ended] == ["a"]


async def test_a_child_that_fails_while_it_is_stopped_does_not_spare_the_others() -> None:
    log: Log = []
    error = OSError("cannot clean up")
    with pytest.raises(ChildFailedError, match="child b") as caught:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a"))
            await supervisor.start("b", worker(log, "b", error=error))
            await supervisor.start("c", worker(log, "c"))
    assert caught.value.__cause__ is error
    assert log[3:] == ["c ends", "b ends", "a ends"]


async def test_the_first_of_several_failures_is_the_one_that_comes_out() -> None:
    log: Log = []
    first = OSError("first")
    with pytest.raises(ChildFailedError, match="child b") as caught:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a", error=OSError("second")))
            await supervisor.start("b", worker(log, "b", error=first))
    assert caught.value.__cause__ is first


async def test_an_exception_of_the_body_wins_over_an_escalation_and_notes_it() -> None:
    failing = Failing(OSError("it broke"))
    with pytest.raises(KeyError) as caught:
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", failing)
            failing.go.set()
            try:
                await anyio.sleep_forever()
            finally:
                raise KeyError("in the body's own clean-up")
    assert caught.value.__notes__ == ["app: child a failed: OSError: it broke"]


@pytest.mark.virtual_time
async def test_an_escalation_wins_over_a_cancellation_from_outside() -> None:
    log: Log = []
    with pytest.raises(ChildFailedError), anyio.move_on_after(5):
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", worker(log, "a", error=OSError("cannot clean up")))
            await anyio.sleep_forever()


async def test_a_decision_that_raises_is_an_escalation() -> None:
    error = OSError("it broke")
    failing = Failing(error)

    def broken(_ended: ChildExit) -> Decision:
        raise LookupError("undecided")

    with pytest.raises(ChildFailedError) as caught:
        async with Supervisor("app", broken) as supervisor:
            await supervisor.start("a", failing)
            failing.go.set()
            await anyio.sleep_forever()
    cause = caught.value.__cause__
    assert isinstance(cause, LookupError)
    assert "it broke" in cause.__notes__[0]


async def test_an_escalation_goes_up_level_by_level() -> None:
    failing = Failing(OSError("it broke"))
    log: Log = []

    async def inner(*, task_status: TaskStatus[None]) -> None:
        async with Supervisor("inner") as supervisor:
            await supervisor.start("leaf", failing)
            await supervisor.start("sibling", worker(log, "sibling"))
            task_status.started()
            await anyio.sleep_forever()

    with pytest.raises(ChildFailedError, match="outer: child inner failed") as caught:
        async with Supervisor("outer") as supervisor:
            await supervisor.start("inner", inner)
            failing.go.set()
            await anyio.sleep_forever()
    cause = caught.value.__cause__
    assert isinstance(cause, ChildFailedError)
    assert cause.child == "leaf"
    assert cause.__cause__ is failing.error
    assert log == ["sibling starts", "sibling ends"]


async def test_an_escalation_reaches_a_body_that_is_starting_a_child() -> None:
    failing = Failing(OSError("it broke"))
    with pytest.raises(ChildFailedError, match="child a"):
        async with Supervisor("app") as supervisor:
            await supervisor.start("a", failing)
            failing.go.set()
            await supervisor.start("b", never_serves)


def test_a_child_cancelled_by_somebody_elses_asyncio_code_is_a_failure_not_a_disappearance() -> None:
    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []

        async def child(*, task_status: TaskStatus[None]) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.append(task)
            task_status.started()
            await anyio.sleep_forever()

        with pytest.raises(ChildFailedError) as caught:
            async with Supervisor("app") as supervisor:
                await supervisor.start("a", child)
                tasks[0].cancel()
                await anyio.sleep_forever()
        assert "cancelled from outside" in str(caught.value.__cause__)

    asyncio.run(main())


@pytest.mark.virtual_time
async def test_the_program_goes_on_as_usual_after_a_supervisor() -> None:
    """No cancellation, shield or deadline of the supervisor is left in its task."""
    failing = Failing(OSError())
    for _ in range(3):
        with pytest.raises(ChildFailedError):
            async with Supervisor("app") as supervisor:
                failing.go = anyio.Event()
                await supervisor.start("a", failing)
                failing.go.set()
                await anyio.sleep_forever()
        with anyio.move_on_after(1) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught


class MuteError(Exception):
    """An error of somebody who made a mistake in it."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")

    __str__ = __repr__


async def test_an_error_that_cannot_be_shown_takes_no_other_errors_place() -> None:
    async def child(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await anyio.lowlevel.checkpoint()
        raise MuteError

    def decide(_ended: ChildExit) -> Decision:
        raise LookupError("undecided")

    with pytest.raises(ChildFailedError) as caught:
        async with Supervisor("app", decide) as supervisor:
            await supervisor.start("child", child)
            await anyio.sleep_forever()
    assert isinstance(caught.value.__cause__, LookupError)
    with pytest.raises(OSError, match="of the body") as body:
        async with Supervisor("app") as supervisor:
            await supervisor.start("child", child)
            try:
                await anyio.sleep_forever()
            finally:
                raise OSError("of the body")
    assert body.value.__notes__ == ["app: child child failed: MuteError: (it has no text)"]
