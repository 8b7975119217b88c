"""Any history of failures, ends, stops and starts, against a model that only knows the rules.

The model is the specification in OTP's words, without tasks, time to wait or order of events: who must live,
how often each was started, how many failures count, and whether the supervisor must have given up. A history
is a list of steps with pauses; all that a step sets off is over before the next.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kids import Kid
from tests.virtual_time import VirtualTimeLoop
from vmactor.errors import IllegalStateError
from vmactor.supervision_tree import ChildState
from vmactor.supervisor import (
    Backoff,
    Decision,
    Restart,
    RestartLimit,
    RestartLimitReachedError,
    Strategy,
    Supervisor,
)

NAMES = "abcd"
TICK = 0.001
"""Longer than anything takes that needs no time, shorter than all that does."""


@dataclass
class Member:
    """A child as the rules see it."""

    restart: Restart
    alive: bool = True
    runs: int = 1
    bad_starts: int = 0  # how many of its next runs fail to start


@dataclass
class Model:
    """Who must live."""

    strategy: Strategy
    limit: RestartLimit
    members: dict[str, Member] = field(default_factory=dict)
    failures: list[float] = field(default_factory=list)
    gave_up: bool = False

    def alive(self) -> set[str]:
        return {name for name, member in self.members.items() if member.alive}

    def ends(self, name: str, now: float, *, failed: bool) -> None:
        """A living child ends by itself."""
        member = self.members[name]
        member.alive = False
        if member.restart is Restart.PERMANENT or (member.restart is Restart.TRANSIENT and failed):
            self._restart(name, now)
        else:
            self._let_go(name)

    def stops(self, name: str) -> None:
        if name in self.members:
            self.members[name].alive = False
            self._let_go(name)

    def _let_go(self, name: str) -> None:
        passing = self.members[name].restart is Restart.TEMPORARY
        if passing or self.strategy is Strategy.SIMPLE_ONE_FOR_ONE:
            del self.members[name]

    def _restart(self, name: str, now: float) -> None:
        due: set[str] = set()
        while True:
            self.failures.append(now)
            recent = [time for time in self.failures if time >= now - self.limit.period]
            if len(recent) > self.limit.intensity:
                self.gave_up = True
                return
            due |= set(self._affected(name))
            self._stop(due)
            failing = self._start(due)
            if failing is None:
                return
            name = failing

    def _affected(self, name: str) -> list[str]:
        names = list(self.members)
        match self.strategy:
            case Strategy.ONE_FOR_ALL:
                return names
            case Strategy.REST_FOR_ONE:
                return names[names.index(name) :]
            case _:
                return [name]

    def _stop(self, due: set[str]) -> None:
        for name in due & set(self.members):
            self.members[name].alive = False
            if self.members[name].restart is Restart.TEMPORARY:
                del self.members[name]

    def _start(self, due: set[str]) -> str | None:
        """Start who is due, in order; the one that could not start, if any."""
        for name, member in self.members.items():
            if name in due:
                member.runs += 1
                if member.bad_starts:
                    member.bad_starts -= 1
                    return name
                member.alive = True
                due.discard(name)
        return None


STEPS = st.one_of(
    st.tuples(st.just("start"), st.sampled_from(NAMES), st.sampled_from(list(Restart))),
    st.tuples(st.sampled_from(["fail", "fail", "finish"]), st.sampled_from(NAMES), st.integers(0, 2)),
    st.tuples(st.sampled_from(["stop", "restart", "delete"]), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("pause"), st.floats(0.1, 4), st.none()),
)


async def follow(strategy: Strategy, limit: RestartLimit, steps: list[tuple[str, Any, Any]]) -> None:
    model = Model(strategy, limit)
    kids: dict[str, Kid] = {}
    log: list[str] = []
    supervisor = Supervisor("house", lambda _: Decision.IGNORE, strategy=strategy, limit=limit)
    surrender: RestartLimitReachedError | None = None
    try:
        async with supervisor:
            for verb, what, extra in steps:
                await step(supervisor, model, kids, log, verb, what, extra)
                await anyio.sleep(TICK)
                assert not model.gave_up, "the model gave up, the supervisor did not"
                agree(supervisor, model, kids)
    except RestartLimitReachedError as error:
        surrender = error
    assert (surrender is not None) == model.gave_up
    if surrender is not None:
        assert len(surrender.history) == limit.intensity + 1
        assert surrender.history[-1].time - surrender.history[0].time <= limit.period
    await nothing_is_left(supervisor, log)


async def nothing_is_left(supervisor: Supervisor, log: list[str]) -> None:
    """Whatever served has ended, and no more begins."""
    assert supervisor.children == ()
    await anyio.sleep(1000)
    for name in NAMES:
        assert log.count(f"{name}+") == log.count(f"{name}-")


async def step(
    supervisor: Supervisor,
    model: Model,
    kids: dict[str, Kid],
    log: list[str],
    verb: str,
    what: Any,
    extra: Any,
) -> None:
    if verb == "pause":
        await anyio.sleep(what)
        return
    member = model.members.get(what)
    match verb:
        case "start" if member is None:
            kids[what] = Kid(log, what)
            model.members[what] = Member(extra)
            await supervisor.start(what, kids[what], restart=extra)
        case "start":
            with pytest.raises(ValueError, match="already"):
                await supervisor.start(what, Kid(log, what))
        case "fail" | "finish" if member is not None and member.alive:
            kids[what].let_starts_fail(extra)
            member.bad_starts = extra
            getattr(kids[what], verb)()
            model.ends(what, anyio.current_time(), failed=verb == "fail")
            await anyio.sleep(TICK)
        case "stop":
            model.stops(what)
            await supervisor.stop(what)
        case "restart" if member is not None and not member.alive:
            member.runs += 1
            if member.bad_starts:
                member.bad_starts -= 1
                with pytest.raises(OSError, match="cannot start"):
                    await supervisor.restart(what)
            else:
                member.alive = True
                await supervisor.restart(what)
        case "delete" if member is not None and not member.alive:
            del model.members[what]
            supervisor.delete(what)
        case "restart":
            with pytest.raises(IllegalStateError):
                await supervisor.restart(what)
        case "delete":
            with pytest.raises(IllegalStateError):
                supervisor.delete(what)


def agree(supervisor: Supervisor, model: Model, kids: dict[str, Kid]) -> None:
    tree = supervisor.tree()
    assert set(supervisor.children) == model.alive()
    assert [child.name for child in tree.children] == list(model.members)
    assert tree.failures == len(model.failures)
    for child in tree.children:
        member = model.members[child.name]
        assert child.state is (ChildState.RUNNING if member.alive else ChildState.STOPPED)
        assert child.restarts == member.runs - 1 == kids[child.name].runs - 1


def run_on(backend: str, follow: Callable[..., Awaitable[None]], *args: Any) -> None:
    if backend == "trio":
        from trio.testing import MockClock

        anyio.run(follow, *args, backend="trio", backend_options={"clock": MockClock(autojump_threshold=0)})
    else:
        anyio.run(follow, *args, backend="asyncio", backend_options={"loop_factory": VirtualTimeLoop})


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(
    strategy=st.sampled_from(list(Strategy)),
    limit=st.builds(RestartLimit, st.integers(0, 6), st.floats(0.5, 8)),
    steps=st.lists(STEPS, max_size=30),
)
@settings(max_examples=100, deadline=None)
def test_any_history_of_failures_stops_and_starts_agrees_with_a_model_that_only_knows_the_rules(
    backend: str, strategy: Strategy, limit: RestartLimit, steps: list[tuple[str, Any, Any]]
) -> None:
    run_on(backend, follow, strategy, limit, steps)


# -- All at once -------------------------------------------------------------------------------------

HURRIED = st.one_of(
    st.tuples(st.just("start"), st.sampled_from(NAMES), st.sampled_from(list(Restart))),
    st.tuples(st.just("fail"), st.sampled_from(NAMES), st.integers(0, 1)),
    st.tuples(st.sampled_from(["stop", "restart"]), st.sampled_from(NAMES), st.none()),
    st.tuples(st.just("pause"), st.sampled_from([0, TICK, 0.3, 1, 2]), st.none()),
)


async def hurry(
    strategy: Strategy, backoff: Backoff | None, steps: list[tuple[str, Any, Any]], leave_at_once: bool
) -> None:
    """Do not wait for what a step sets off before the next one."""
    kids: dict[str, Kid] = {}
    log: list[str] = []
    stops: set[tuple[float, str]] = set()
    falls: list[tuple[float, Kid]] = []
    limit = RestartLimit(1000, 1)
    supervisor = Supervisor(
        "house", lambda _: Decision.IGNORE, strategy=strategy, limit=limit, backoff=backoff
    )

    async def start(name: str, restart: Restart) -> None:
        kid = Kid(log, name, clean_up=0.5)
        with suppress(ValueError, IllegalStateError):
            await supervisor.start(name, kid, restart=restart)
            kids[name] = kid

    async def again(name: str) -> None:
        with suppress(IllegalStateError, OSError):
            await supervisor.restart(name)

    async with anyio.create_task_group() as tg, supervisor:
        for verb, what, extra in steps:
            match verb:
                case "pause":
                    await anyio.sleep(what)
                case "start":
                    tg.start_soon(start, what, extra)
                case "stop":
                    stops.add((anyio.current_time(), what))
                    tg.start_soon(supervisor.stop, what)
                case "restart":
                    tg.start_soon(again, what)
                case "fail":
                    child = {each.name: each for each in supervisor.tree().children}.get(what)
                    if child is not None and child.state is ChildState.RUNNING and what in kids:
                        kids[what].let_starts_fail(extra)
                        kids[what].fail()
                        if child.restart is not Restart.TEMPORARY:
                            falls.append((anyio.current_time(), kids[what]))
        if not leave_at_once:
            await anyio.sleep(1000)
            settled(supervisor, kids, stops, falls)
    await nothing_is_left(supervisor, log)


def settled(
    supervisor: Supervisor,
    kids: dict[str, Kid],
    stops: set[tuple[float, str]],
    falls: list[tuple[float, Kid]],
) -> None:
    tree = supervisor.tree()
    now = anyio.current_time()
    assert set(tree.counts) <= {ChildState.RUNNING, ChildState.STOPPED}
    names = [child.name for child in tree.children]
    stopped = {name for _, name in stops}
    for place, child in enumerate(tree.children):
        if child.restart is not Restart.TEMPORARY and child.name not in stopped:
            assert child.state is ChildState.RUNNING, f"{child.name} was given up"
        if child.uptime is None:
            continue
        for time, kid in falls:
            if kids.get(kid.name) is not kid or kid.name not in names:
                continue
            if (time, kid.name) in stops:
                continue  # whichever of the two came first
            together = tree.strategy is Strategy.ONE_FOR_ALL or (
                tree.strategy is Strategy.REST_FOR_ONE and names.index(kid.name) <= place
            )
            began = now - child.uptime + TICK / 10  # for rounding
            assert not together or began >= time, f"{child.name} is older than {kid.name}'s fall"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@given(
    strategy=st.sampled_from(list(Strategy)),
    backoff=st.sampled_from([None, Backoff(0.7, 3, jitter=0, stable=2)]),
    steps=st.lists(HURRIED, max_size=25),
    leave_at_once=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_crowd_of_failures_stops_and_starts_ends_with_all_alive_who_must_be_and_nothing_left(
    backend: str,
    strategy: Strategy,
    backoff: Backoff | None,
    steps: list[tuple[str, Any, Any]],
    leave_at_once: bool,
) -> None:
    run_on(backend, hurry, strategy, backoff, steps, leave_at_once)
