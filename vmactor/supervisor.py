"""Supervisors: who owns which tasks, how they end, who is started again, and what their failure means.

A supervisor is an async context manager. Children are started in order, each serving before the next. When
the block is left they are stopped in reverse order, one after the other: a child that can be asked to end is
asked and given its own deadline; then it is cancelled. Neither the body's end, nor its exception, nor a
cancellation of the code around the supervisor reaches a child in any other way, so the order always holds.

A child that ends although nobody stopped it is started again if its restart type says so, with those of its
siblings that the strategy names, until there are more restarts than the limit bears. Any other such end is a
decision: ignore it, or escalate, which cancels the body, stops all children and raises ``ChildFailedError``
from the block, where the supervisor above decides or restarts in its turn. An exception of the body comes out
as itself, not in an exception group.

The semantics are those of Erlang/OTP's ``supervisor``; docs/otp.md has them one by one, and where we differ.

Cancellation is the last means: a child that shields itself from it holds up its supervisor for as long.
"""

import random
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

import anyio
from anyio.abc import TaskGroup

from vmactor.child import (
    SHUTDOWN_SECONDS,
    Child,
    ChildRun,
    ChildSpec,
    ChildTask,
    error_text,
    host,
    hosts,
    stop_together,
)
from vmactor.errors import IllegalStateError
from vmactor.escalation import (
    ChildExit,
    ChildFailedError,
    Decision,
    RestartLimitReachedError,
    escalate_failures,
)
from vmactor.log import get_logger
from vmactor.restarter import Restarter
from vmactor.restarts import Backoff, Failure, Restart, RestartHistory, RestartLimit, Strategy
from vmactor.supervision_tree import Detail, SupervisorInfo

__all__ = [
    "SHUTDOWN_SECONDS",
    "Backoff",
    "ChildExit",
    "ChildFailedError",
    "ChildRun",
    "Decision",
    "Restart",
    "RestartLimit",
    "RestartLimitReachedError",
    "Strategy",
    "Supervisor",
    "escalate_failures",
]

OTP_LIMIT: Final = RestartLimit()
"""One restart in 5 seconds: safe in deep trees."""


class Supervisor:
    """An async context manager that owns children; for one ``async with``.

    Args:
        name: Shown in errors, logs and reprs.
        decide: Called with the end of each child that served, was not stopped and is not started again; and
            with the failure of any that failed while it was stopped for good. See ``Decision``. If it raises,
            that is an escalation.
        strategy: Who is restarted with a child that is to be restarted.
        limit: How many restarts are borne before this supervisor escalates.
        backoff: How long to wait before a restart; not at all if not given.
        chance: Gives numbers from 0 to 1 for the back-off's jitter.

    Raises:
        ChildFailedError: On leaving the block, if a child's end was escalated and the body raised nothing of
            its own.
        RestartLimitReachedError: The same, where there were too many restarts.
    """

    def __init__(
        self,
        name: str,
        decide: Callable[[ChildExit], Decision] = escalate_failures,
        *,
        strategy: Strategy = Strategy.ONE_FOR_ONE,
        limit: RestartLimit = OTP_LIMIT,
        backoff: Backoff | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.name = name
        self._decide = decide
        self._strategy = strategy
        self._history = RestartHistory(limit)
        self._backoff = backoff
        self._chance = chance
        self._children: dict[str, Child] = {}
        self._restarters: dict[str | None, Restarter] = {}  # by child; or one for all, under None
        self._starts = 0  # under way, asked for from outside; who is restarted together waits for them
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup
        self._body: anyio.CancelScope
        self._host: ChildTask | None = None
        self._entered_at: float | None = None
        self._open = False
        self._failure: ChildFailedError | None = None
        self._last_error: str | None = None

    def __repr__(self) -> str:
        return f"<Supervisor {self.name} children=[{', '.join(self.children)}]>"

    async def __aenter__(self) -> Self:
        if self._entered_at is not None:
            raise IllegalStateError(f"{self.name} was entered before: make a new supervisor for each block")
        self._entered_at = anyio.current_time()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        # As a plain callback it does not learn of the body's exception, which it would wrap into a group.
        self._stack.push_async_callback(self._tasks.__aexit__, None, None, None)
        self._body = self._stack.enter_context(anyio.CancelScope())
        self._stack.push_async_callback(self._stop_all)
        self._host = host()
        if self._host is not None:
            self._host.supervisors.append(self)
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._open = False
        try:
            swallowed = await self._stack.__aexit__(kind, value, trace)
        finally:
            if self._host is not None:
                self._host.supervisors.remove(self)
        if self._failure is not None:
            if value is None or swallowed or isinstance(value, anyio.get_cancelled_exc_class()):
                raise self._failure
            cause = self._failure.__cause__
            value.add_note(f"{self._failure}: {'it returned' if cause is None else error_text(cause)}")
        return swallowed

    # -- Looking ---------------------------------------------------------------------------------

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the living children, in the order in which they were started."""
        return tuple(name for name, child in self._children.items() if child.task is not None)

    def tree(self) -> SupervisorInfo:
        """Describe this supervisor and everything under it, as it is now; asks nobody and waits for nothing.

        A supervisor that is entered in a child's task, or in a task that this one started, is found under
        that child.
        """
        now = anyio.current_time()
        return SupervisorInfo(
            name=self.name,
            strategy=self._strategy,
            intensity=self._history.limit.intensity,
            period=self._history.limit.period,
            failures=self._history.total,
            uptime=now - self._entered_at if self._entered_at is not None else 0.0,
            last_error=self._last_error,
            children=tuple(child.describe(now) for child in self._children.values()),
        )

    # -- Starting and stopping -------------------------------------------------------------------

    async def start(
        self,
        name: str,
        run: ChildRun,
        *,
        restart: Restart = Restart.TEMPORARY,
        ask_to_stop: Callable[[], None] | None = None,
        shutdown: float = SHUTDOWN_SECONDS,
        details: Callable[[], Mapping[str, Detail]] | None = None,
    ) -> Any:
        """Add a child, start it and wait until it serves.

        The child runs at least to its first checkpoint, so what it is given it can release. If this call is
        cancelled, so is the child, and it has ended when the cancellation goes on. Where siblings are
        restarted together, it waits for a restart that is under way; and a restart waits for it.

        Args:
            name: Unique among the children, those included that are stopped and kept.
            run: The child; called again for each restart.
            restart: Whether it is started again when it ends. Unless this is ``TEMPORARY``, the child is kept
                when it is stopped or returns, for ``restart`` and ``delete``.
            ask_to_stop: Asks the child to end by itself; called once a run at most, by whoever stops the
                child first, and only when the child serves. Without it, or if it raises, the child is
                cancelled at once.
            shutdown: Seconds that it may take after being asked, on one clock for all who stop it; 0 cancels
                it without asking, infinity waits as long as it takes.
            details: Called by ``tree``: what the child tells of itself. It must not wait.

        Returns:
            What the child gave to ``started()``.

        Raises:
            ValueError: The name is taken.
            IllegalArgumentError: The shutdown time is none.
            IllegalStateError: The supervisor's block is not entered or being left; or the child ended, or was
                stopped, before it served; or a child that a restart stops or starts right now calls this.
            Exception: The child failed before it served; that is the caller's affair, not a decision.
        """
        spec = ChildSpec(name, run, restart, ask_to_stop, shutdown, details)
        await self._ready_to_start()
        if name in self._children:
            raise ValueError(f"{self.name} has a child {name} already ({self._children[name].state})")
        child = self._children[name] = Child(spec)
        return await self._start(child, new=True)

    async def stop(self, name: str) -> None:
        """Stop one child and wait until it has ended; nothing happens if there is none of that name.

        A child that is asked to end has its deadline; one that does not serve yet, or that stops itself, is
        cancelled at once; one that waits to be restarted is not restarted. Any number of tasks may stop a
        child. If this call is cancelled, the child may have been asked and nothing more.

        A temporary child is then forgotten, any other is kept. A later restart of siblings starts it too.
        """
        child = self._children.get(name)
        if child is None:
            return
        if child.due:
            child.due = False
            self._restarter(child).withdrawn()
        if child.task is not None:
            await child.task.stop()
        elif not self._keeps(child):
            self._forget(child)

    async def restart(self, name: str) -> Any:
        """Start a child again that has ended and is kept; the rest is as for ``start``.

        Raises:
            IllegalStateError: There is no such child, or it lives, or is being restarted; and as for
                ``start``. A child that fails to start is still kept.
            Exception: The child failed before it served.
        """
        await self._ready_to_start()
        return await self._start(self._ended_child(name))

    def delete(self, name: str) -> None:
        """Forget a child that has ended and is kept; the name is free then.

        Raises:
            IllegalStateError: There is no such child, or it lives, or is being restarted: stop it first.
        """
        self._forget(self._ended_child(name))

    def _ended_child(self, name: str) -> Child:
        child = self._children.get(name)
        if child is None:
            raise IllegalStateError(f"{self.name} has no child {name}")
        if child.task is not None or child.due:
            raise IllegalStateError(f"{self.name}: child {name} is {child.state}, not stopped: stop it first")
        return child

    async def _ready_to_start(self) -> None:
        self._check_open()
        while (together := self._restarters.get(None)) is not None and together.task is not None:
            callers = tuple(hosts())
            for child in self._children.values():
                if child.due and child.task in callers:  # they would wait for each other
                    raise IllegalStateError(
                        f"{self.name}: child {child.spec.name} cannot start others while it is restarted; "
                        "let it serve first"
                    )
            await together.task.ended.wait()
            self._check_open()

    def _check_open(self) -> None:
        if not self._open:
            raise IllegalStateError(
                f"{self.name} has no children now: start them inside its 'async with' block"
            )

    async def _start(self, child: Child, *, new: bool = False) -> Any:
        self._starts += 1
        task = self._launch(child)
        try:
            await task.settled.wait()
        except BaseException:
            with anyio.CancelScope(shield=True):
                child.withdrawn = new
                await task.cancel()
                if self._children.get(child.spec.name) is child:  # it fell meanwhile, and is to come back
                    await self.stop(child.spec.name)
            if task.error is not None and not task.serves:
                raise task.error  # noqa: B904 - its own cause must stay
            raise
        finally:
            self._starts -= 1
            if None in self._restarters:
                self._begin(self._restarters[None])
        if task.serves:
            return task.value
        if task.error is not None:
            raise task.error
        how = "was stopped" if task.stopping else "ended"
        raise IllegalStateError(f"{self.name}: child {child.spec.name} {how} before it served")

    def _launch(self, child: Child) -> ChildTask:
        task = child.new_run()
        # Not TaskGroup.start(): until the child serves, that cancels it as the backend likes (on asyncio past
        # our shield, on trio not at all). Each run begins with the context variables of who added the child.
        name = f"{self.name}/{child.spec.name}"
        child.context.run(lambda: self._tasks.start_soon(self._run, child, task, name=name))
        return task

    async def _run(self, child: Child, task: ChildTask) -> None:
        try:
            await task.run()
        finally:
            child.task = None
            comes_back = self._comes_back(child, task)
            if not comes_back and not self._keeps(child):
                self._forget(child)
            # All this without an await, so that the name is free for whoever waited for the end.
            task.settled.set()
            task.ended.set()
        if task.error is not None:
            child.last_error = error_text(task.error)
            self._last_error = f"{child.spec.name}: {child.last_error}"
        if not comes_back:
            if task.serves and (task.error is not None or not task.stopping):
                self._conclude(ChildExit(child.spec.name, task.error))
        elif not child.due:
            self._failed(child, task.error)

    async def _stop_all(self) -> None:
        interruption: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while True:
                try:
                    await self._stop_living()
                    break
                except BaseException as caught:  # asyncio's Task.cancel() and timeout() mind no shield
                    interruption = caught
        self._children.clear()
        if interruption is not None:
            raise interruption

    async def _stop_living(self) -> None:
        self._end_restarts()
        for restarter in tuple(self._restarters.values()):
            if restarter.task is not None:
                await restarter.task.ended.wait()
        if self._strategy is Strategy.SIMPLE_ONE_FOR_ONE:
            await stop_together([child.task for child in self._children.values() if child.task is not None])
        while True:
            living = (child.task for child in reversed(self._children.values()) if child.task is not None)
            last = next(living, None)
            if last is None:
                return
            await last.stop()

    # -- What an end means -----------------------------------------------------------------------

    def _comes_back(self, child: Child, task: ChildTask) -> bool:
        """Whether the end of a child's run calls for another run."""
        restart = child.spec.restart
        if child.due:  # it was stopped, or fell, in the course of a restart
            return restart is not Restart.TEMPORARY and child.served and not child.withdrawn
        if not task.serves or task.stopping or not self._open or self._failure is not None:
            return False
        return restart.applies(failed=task.error is not None)

    def _keeps(self, child: Child) -> bool:
        """Whether a child that is not started again can be, by whoever wants it."""
        passing = child.spec.restart is Restart.TEMPORARY or self._strategy is Strategy.SIMPLE_ONE_FOR_ONE
        return child.served and not child.withdrawn and not passing

    def _forget(self, child: Child) -> None:
        del self._children[child.spec.name]
        self._restarters.pop(child.spec.name, None)

    def _failed(self, child: Child, error: Exception | None) -> None:
        """A child failed that is to be started again."""
        failure = Failure(anyio.current_time(), child.spec.name, error)
        if not self._history.bears(failure):
            limit, history = self._history.limit, self._history.recent
            self._escalate(RestartLimitReachedError(self.name, limit, history), error)
            return
        get_logger(supervisor=self.name).warning(
            "a child ended and is started again", child=child.spec.name, exc_info=error
        )
        for name in self._strategy.affected(tuple(self._children), child.spec.name):
            self._children[name].call_for_restart()
        restarter = self._restarter(child)
        restarter.retry()
        self._begin(restarter)

    def _restarter(self, child: Child) -> Restarter:
        key = child.spec.name if self._strategy.alone else None
        restarter = self._restarters.get(key)
        if restarter is None:
            members = (lambda: (child,)) if self._strategy.alone else lambda: tuple(self._children.values())
            restarter = Restarter(members, self._launch, self._failed, self._backoff, self._chance)
            self._restarters[key] = restarter
        return restarter

    def _begin(self, restarter: Restarter) -> None:
        """Restart what is due, unless that is under way or has to wait for a start."""
        if (
            restarter.task is not None
            or not restarter.has_work
            or (self._starts and not self._strategy.alone)
        ):
            return
        restarter.task = ChildTask(ChildSpec("restarts", restarter.run))
        self._tasks.start_soon(self._run_restarter, restarter, restarter.task, name=f"{self.name}: restarts")

    async def _run_restarter(self, restarter: Restarter, task: ChildTask) -> None:
        try:
            await task.run()
        finally:
            restarter.task = None
            task.ended.set()
        if task.error is not None:
            self._escalate(ChildFailedError(self.name, "restarts"), task.error)

    def _end_restarts(self) -> None:
        for child in self._children.values():
            child.due = False
        for restarter in self._restarters.values():
            if restarter.task is not None:
                restarter.task.cancel_soon()

    def _conclude(self, ended: ChildExit) -> None:
        cause = ended.error
        try:
            decision = self._decide(ended)
        except Exception as fault:  # it becomes the escalation's cause
            how = "returned" if cause is None else f"failed with {error_text(cause)}"
            fault.add_note(f"while deciding about child {ended.name}, which {how}")
            decision, cause = Decision.ESCALATE, fault
        if decision is Decision.ESCALATE:
            self._escalate(ChildFailedError(self.name, ended.name), cause)

    def _escalate(self, failure: ChildFailedError, cause: Exception | None) -> None:
        if self._failure is None:
            self._failure = failure
            self._failure.__cause__ = cause
            self._end_restarts()
            self._body.cancel()
