"""Supervisors: who owns which tasks, how they end, and what their failure means.

A supervisor starts children in order and stops them in reverse order, each within its own deadline: first it
asks (if the child can be asked), then it cancels. Children do not see the cancellation of the code around the
supervisor; only the supervisor ends them, so that the order holds then too. A child that ends, well or by an
exception, is a decision: ignore it, or escalate, which ends the body and raises ``ChildFailedError`` from it.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Final, Protocol, Self

import anyio
from anyio.abc import TaskGroup, TaskStatus

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
    def __init__(self, name: str, ask_to_stop: Callable[[], None] | None, shutdown: float) -> None:
        self.name = name
        self.ask_to_stop = ask_to_stop
        self.shutdown = shutdown
        self.scope = anyio.CancelScope(shield=True)
        self.ended = anyio.Event()

    async def stop(self) -> None:
        if self.ask_to_stop is not None and not self.ended.is_set():
            self.ask_to_stop()
            with anyio.move_on_after(self.shutdown):
                await self.ended.wait()
        self.scope.cancel()
        await self.ended.wait()


class _Started:
    """Passes on a child's ``started()`` and remembers that it came."""

    def __init__(self, inner: TaskStatus[Any]) -> None:
        self._inner = inner
        self.called = False

    def started(self, value: Any = None) -> None:
        self.called = True
        self._inner.started(value)


class Supervisor:
    """An async context manager that owns children.

    Args:
        name: Shown in errors and reprs.
        decide: Called with each child's end; see ``Decision``.
    """

    def __init__(self, name: str, decide: Callable[[ChildExit], Decision] = escalate_failures) -> None:
        self.name = name
        self._decide = decide
        self._children: dict[str, _Child] = {}
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup
        self._body: anyio.CancelScope
        self._failure: ChildFailedError | None = None

    def __repr__(self) -> str:
        return f"<Supervisor {self.name} children=[{', '.join(self._children)}]>"

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._body = self._stack.enter_context(anyio.CancelScope())
        self._stack.push_async_callback(self.stop_all)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        swallowed = await self._stack.__aexit__(kind, value, trace)
        if self._failure is not None and (value is None or swallowed):
            raise self._failure
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

        Args:
            name: Unique among the living children.
            run: The child.
            ask_to_stop: Asks the child to end by itself; without it the child is cancelled at once.
            shutdown: Seconds that it may take after being asked.

        Returns:
            What the child gave to ``started()``.

        Raises:
            ValueError: The name is taken.
            Exception: The child failed before it served; that is the caller's affair, not a decision.
        """
        if name in self._children:
            raise ValueError(f"{self.name} has a child {name} already")
        child = _Child(name, ask_to_stop, shutdown)
        self._children[name] = child
        try:
            return await self._tasks.start(self._run, child, run, name=f"{self.name}/{name}")
        finally:
            if child.ended.is_set():
                self._children.pop(name, None)

    async def stop(self, name: str) -> None:
        """Stop one child and wait until it has ended; nothing happens if there is none of that name."""
        child = self._children.get(name)
        if child is not None:
            await child.stop()

    async def stop_all(self) -> None:
        """Stop all children, the last one first; not interrupted by cancellation."""
        with anyio.CancelScope(shield=True):
            while self._children:
                name, child = next(reversed(self._children.items()))
                await child.stop()
                self._children.pop(name, None)

    async def _run(self, child: _Child, run: ChildRun, *, task_status: TaskStatus[Any]) -> None:
        started = _Started(task_status)
        error: Exception | None = None
        try:
            with child.scope:
                await run(task_status=started)
        except Exception as caught:
            if not started.called:
                raise
            error = caught
        finally:
            child.ended.set()
            if started.called:
                self._children.pop(child.name, None)
        if child.scope.cancel_called and error is None:
            return
        if self._decide(ChildExit(child.name, error)) is Decision.ESCALATE and self._failure is None:
            self._failure = ChildFailedError(self.name, child.name)
            self._failure.__cause__ = error
            self._body.cancel()
