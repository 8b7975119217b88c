"""Supervisors: who owns which tasks, how they end, and what their failure means.

A supervisor is an async context manager. Children are started in order, each serving before the next. When
the block is left they are stopped in reverse order, one after the other: a child that can be asked to end is
asked and given its own deadline; then it is cancelled. Neither the body's end, nor its exception, nor a
cancellation of the code around the supervisor reaches a child in any other way, so the order always holds.

The end of a child that nobody stopped is a decision: ignore it, or escalate, which cancels the body, stops
all children and raises ``ChildFailedError`` from the block, where the supervisor above decides in its turn.
An exception of the body comes out as itself, not in an exception group.

Cancellation is the last means: a child that shields itself from it holds up its supervisor for as long.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Final, Protocol, Self

import anyio
from anyio.abc import TaskGroup, TaskStatus

from vmactor.errors import IllegalStateError

SHUTDOWN_SECONDS: Final = 5.0
"""How long a child may take to end after it was asked to, unless it says otherwise (OTP's default)."""


class Decision(Enum):
    """What a child's end means for its supervisor."""

    IGNORE = "ignore"
    ESCALATE = "escalate"


class ChildFailedError(Exception):
    """A child ended in a way that its supervisor decided not to bear; the cause is chained.

    Attributes:
        child: The child's name.
    """

    def __init__(self, supervisor: str, child: str) -> None:
        super().__init__(f"{supervisor}: child {child} failed")
        self.child = child


@dataclass(frozen=True, slots=True)
class ChildExit:
    """How a child ended.

    Attributes:
        name: The child.
        error: The exception that ended it, or None if it returned.
    """

    name: str
    error: Exception | None


class ChildRun(Protocol):
    """A child: calls ``task_status.started()`` once it serves, then runs until it is done or cancelled."""

    def __call__(self, *, task_status: TaskStatus[Any]) -> Awaitable[None]:
        """Run."""
        ...


def escalate_failures(ended: ChildExit) -> Decision:
    """A child may end; it may not fail."""
    return Decision.IGNORE if ended.error is None else Decision.ESCALATE


class _Child:
    """What a supervisor knows of a child; also the ``task_status`` that the child is given.

    Attributes:
        settled: Set when the child serves, or has ended without.
    """

    def __init__(self, name: str, ask_to_stop: Callable[[], None] | None, shutdown: float) -> None:
        self.name = name
        # The shield keeps away every cancellation but its own.
        self.scope = anyio.CancelScope(shield=True)
        self.settled = anyio.Event()
        self.ended = anyio.Event()
        self.serves = False
        self.stopping = False
        self.value: Any = None
        self.error: Exception | None = None
        self.task: int | None = None
        self._ask_to_stop = ask_to_stop
        self._shutdown = shutdown

    def started(self, value: Any = None) -> None:
        if self.serves:
            raise RuntimeError(f"child {self.name} called started() twice")
        self.serves = True
        self.value = value
        self.settled.set()

    async def stop(self) -> None:
        if self._ask():
            with anyio.move_on_after(self._shutdown):
                await self.ended.wait()
        await self.cancel()

    async def cancel(self) -> None:
        self.stopping = True
        self.scope.cancel()
        await self.ended.wait()

    def _ask(self) -> bool:
        """Ask once, whoever and how many stop the child; False where asking is of no use."""
        asked, self.stopping = self.stopping, True
        stops_itself = self.task == anyio.get_current_task().id
        if self._ask_to_stop is None or not self.serves or stops_itself:
            return False
        if not asked:
            try:
                self._ask_to_stop()
            except Exception:  # whatever the reason, the child does not know: cancel it
                return False
        return True


class Supervisor:
    """An async context manager that owns children.

    Args:
        name: Shown in errors and reprs.
        decide: Called with the end of each child that served and was not stopped, and with the failure of any
            child that served; see ``Decision``. If it raises, that is an escalation.

    Raises:
        ChildFailedError: On leaving the block, if a child's end was escalated and the body raised nothing of
            its own.
    """

    def __init__(self, name: str, decide: Callable[[ChildExit], Decision] = escalate_failures) -> None:
        self.name = name
        self._decide = decide
        self._children: dict[str, _Child] = {}
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup
        self._body: anyio.CancelScope
        self._open = False
        self._failure: ChildFailedError | None = None

    def __repr__(self) -> str:
        return f"<Supervisor {self.name} children=[{', '.join(self._children)}]>"

    async def __aenter__(self) -> Self:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        # As a plain callback it does not learn of the body's exception, which it would wrap into a group.
        self._stack.push_async_callback(self._tasks.__aexit__, None, None, None)
        self._body = self._stack.enter_context(anyio.CancelScope())
        self._stack.push_async_callback(self._stop_all)
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._open = False
        swallowed = await self._stack.__aexit__(kind, value, trace)
        if self._failure is not None:
            if value is None or swallowed or isinstance(value, anyio.get_cancelled_exc_class()):
                raise self._failure
            value.add_note(f"{self._failure}: {self._failure.__cause__!r}")
        return swallowed

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the living children, in the order in which they were started."""
        return tuple(self._children)

    async def start(
        self,
        name: str,
        run: ChildRun,
        *,
        ask_to_stop: Callable[[], None] | None = None,
        shutdown: float = SHUTDOWN_SECONDS,
    ) -> Any:
        """Start a child and wait until it serves.

        The child runs at least to its first checkpoint, so what it is given it can release. If this call is
        cancelled, so is the child, and it has ended when the cancellation goes on.

        Args:
            name: Unique among the living children.
            run: The child.
            ask_to_stop: Asks the child to end by itself; called once at most, by whoever stops the child
                first, and only when the child serves. Without it, or if it raises, the child is cancelled at
                once.
            shutdown: Seconds that it may take after being asked.

        Returns:
            What the child gave to ``started()``.

        Raises:
            ValueError: The name is taken.
            IllegalStateError: The supervisor's block is not entered or being left; or the child ended, or was
                stopped, before it served.
            Exception: The child failed before it served; that is the caller's affair, not a decision.
        """
        if not self._open:
            raise IllegalStateError(
                f"{self.name} has no children now: start them inside its 'async with' block"
            )
        if name in self._children:
            raise ValueError(f"{self.name} has a child {name} already")
        child = self._children[name] = _Child(name, ask_to_stop, shutdown)
        # Not TaskGroup.start(): until the child serves, that cancels it as the backend likes (on asyncio past
        # our shield, on trio not at all).
        self._tasks.start_soon(self._run, child, run, name=f"{self.name}/{name}")
        try:
            await child.settled.wait()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await child.cancel()
            if child.error is not None and not child.serves:
                raise child.error  # noqa: B904 - its own cause must stay
            raise
        if child.serves:
            return child.value
        if child.error is not None:
            raise child.error
        how = "was stopped" if child.stopping else "ended"
        raise IllegalStateError(f"{self.name}: child {name} {how} before it served")

    async def stop(self, name: str) -> None:
        """Stop one child and wait until it has ended; nothing happens if there is none of that name.

        A child that is asked to end has its deadline; one that does not serve yet, or that stops itself, is
        cancelled at once. Any number of tasks may stop a child. If this call is cancelled, the child may have
        been asked and nothing more.
        """
        child = self._children.get(name)
        if child is not None:
            await child.stop()

    async def _stop_all(self) -> None:
        interruption: BaseException | None = None
        with anyio.CancelScope(shield=True):
            while self._children:
                try:
                    await next(reversed(self._children.values())).stop()
                except BaseException as caught:  # asyncio's Task.cancel() and timeout() mind no shield
                    interruption = caught
        if interruption is not None:
            raise interruption

    async def _run(self, child: _Child, run: ChildRun) -> None:
        child.task = anyio.get_current_task().id
        try:
            with child.scope:
                await run(task_status=child)
        except Exception as caught:  # it is passed on: to start(), or as a decision
            child.error = caught
        except anyio.get_cancelled_exc_class():
            if not child.stopping:  # asyncio's Task.cancel(), by somebody who knows nothing of supervisors
                child.error = RuntimeError(f"the task of child {child.name} was cancelled from outside")
        finally:
            # Together and without an await, so that the name is free for whoever waited for the end.
            del self._children[child.name]
            child.settled.set()
            child.ended.set()
        if child.serves and (child.error is not None or not child.stopping):
            self._conclude(ChildExit(child.name, child.error))

    def _conclude(self, ended: ChildExit) -> None:
        cause = ended.error
        try:
            decision = self._decide(ended)
        except Exception as fault:  # it becomes the escalation's cause
            fault.add_note(f"while deciding about {ended!r}")
            decision, cause = Decision.ESCALATE, fault
        if decision is Decision.ESCALATE and self._failure is None:
            self._failure = ChildFailedError(self.name, ended.name)
            self._failure.__cause__ = cause
            self._body.cancel()
