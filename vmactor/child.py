"""A child of a supervisor: what is asked of it, and one run of it as a task that can be stopped in order.

The supervisor decides; this knows how a child begins to serve, how it is asked to end and then cancelled, and
that nothing else reaches it: no cancellation of the code around its supervisor, and no second request.
"""

import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Final, Protocol

import anyio
from anyio.abc import TaskStatus

from vmactor.errors import IllegalArgumentError
from vmactor.restarts import Restart
from vmactor.supervision_tree import ChildInfo, ChildState, Detail, SupervisorInfo
from vmactor.waiting import Moment

SHUTDOWN_SECONDS: Final = 5.0
"""How long a child may take to end after it was asked to, unless it says otherwise (OTP's default)."""


class ChildRun(Protocol):
    """A child: calls ``task_status.started()`` once it serves, then runs until it is done or cancelled.

    To restart a child is to call this again.
    """

    def __call__(self, *, task_status: TaskStatus[Any]) -> Awaitable[None]:
        """Run."""
        ...


class HasTree(Protocol):
    """A supervisor, seen from the child that runs it."""

    def tree(self) -> SupervisorInfo:
        """Describe it."""
        ...


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a supervisor was told of a child; the words are those of ``Supervisor.start``.

    Raises:
        IllegalArgumentError: A deadline that is none.
    """

    name: str
    run: ChildRun
    restart: Restart = Restart.TEMPORARY
    ask_to_stop: Callable[[], None] | None = None
    shutdown: float = SHUTDOWN_SECONDS
    details: Callable[[], Mapping[str, Detail]] | None = None

    def __post_init__(self) -> None:
        if not self.shutdown >= 0:
            raise IllegalArgumentError(f"child {self.name}: give shutdown=0 seconds or more, or infinity")


_host: Final[ContextVar["ChildTask"]] = ContextVar("_host")


def host() -> "ChildTask | None":
    """The child within whose task, or a task that this one started, the caller runs."""
    return _host.get(None)


def hosts() -> "Iterator[ChildTask]":
    """That child, the one within whose task its supervisor is, and so on upwards."""
    task = host()
    while task is not None:
        yield task
        task = task.above


class ChildTask:
    """One run of a child; also the ``task_status`` that the child is given.

    Attributes:
        settled: Set when the child serves, or has ended without.
        ended: Set when it has ended.
        stopping: Whether somebody stops it.
        stale: Whether a sibling's failure calls for another run in its place.
        since: When it began to serve; None before.
        value: What it gave to ``started()``.
        error: The exception that ended it.
        supervisors: Those that it runs.
        above: The child within whose task its supervisor is, if any.
    """

    __slots__ = (
        "_deadline",
        "_on_serving",
        "_scope",
        "_task",
        "above",
        "ended",
        "error",
        "settled",
        "since",
        "spec",
        "stale",
        "stopping",
        "supervisors",
        "value",
    )

    def __init__(self, spec: ChildSpec, on_serving: Callable[[], None] = lambda: None) -> None:
        self.spec = spec
        self.settled = Moment()
        self.ended = Moment()
        self.stopping = False
        self.stale = False
        self.since: float | None = None
        self.value: Any = None
        self.error: Exception | None = None
        self.supervisors: list[HasTree] = []
        self.above: ChildTask | None = None
        self._on_serving = on_serving
        # The shield keeps away every cancellation but its own.
        self._scope = anyio.CancelScope(shield=True)
        self._task: int | None = None
        self._deadline = -math.inf

    @property
    def serves(self) -> bool:
        """Whether the child has called ``started()``, be it that it has ended since."""
        return self.since is not None

    @property
    def is_current(self) -> bool:
        """Whether the caller is this child."""
        return self._task == anyio.get_current_task().id

    def started(self, value: Any = None) -> None:
        """Serve from now on; called by the child."""
        if self.serves:
            raise RuntimeError(f"child {self.spec.name} called started() twice")
        self.since = anyio.current_time()
        self.value = value
        self._on_serving()
        self.settled.set()

    async def run(self) -> None:
        """The task: run the child and keep what ended it. Whoever started the task sets the events."""
        self._task = anyio.get_current_task().id
        self.above = host()
        _host.set(self)
        try:
            with self._scope:
                await self.spec.run(task_status=self)
        except Exception as caught:  # it is passed on: to who started the child, or as a decision
            self.error = caught
        except anyio.get_cancelled_exc_class():
            if not self.stopping:  # asyncio's Task.cancel(), by somebody who knows nothing of supervisors
                self.error = RuntimeError(f"the task of child {self.spec.name} was cancelled from outside")

    def begin_to_stop(self) -> None:
        """Ask the child to end, once, whoever and how many stop it; where asking is of no use, cancel it."""
        asked, self.stopping = self.stopping, True
        ask = self.spec.ask_to_stop
        if self.is_current:  # it would wait for itself
            self._scope.cancel()
        elif not asked and ask is not None and self.serves and self.spec.shutdown > 0:
            self._deadline = anyio.current_time() + self.spec.shutdown
            try:
                ask()
            except Exception:  # whatever the reason, the child does not know: cancel it
                self._scope.cancel()
        elif not asked:
            self._scope.cancel()

    async def wait_then_cancel(self) -> None:
        """Give a child that was asked the rest of its time, then cancel it."""
        if not self._scope.cancel_called:
            with anyio.CancelScope(deadline=self._deadline):
                await self.ended.wait()
            self._scope.cancel()

    async def stop(self) -> None:
        """End the child: ask, wait, cancel, and wait until it has ended."""
        self.begin_to_stop()
        await self.wait_then_cancel()
        await self.ended.wait()

    def cancel_soon(self) -> None:
        """Cancel it without asking."""
        self.stopping = True
        self._scope.cancel()

    async def cancel(self) -> None:
        """The same, and wait until it has ended."""
        self.cancel_soon()
        await self.ended.wait()


async def stop_together(tasks: Sequence[ChildTask]) -> None:
    """Stop children at the same time, each within its own deadline."""
    for task in tasks:
        task.begin_to_stop()
    for task in sorted(tasks, key=lambda task: task._deadline):  # noqa: SLF001 - the same module's
        await task.wait_then_cancel()
    for task in tasks:
        await task.ended.wait()


class Child:
    """What a supervisor knows of a child over all its runs.

    Attributes:
        spec: What was told of it.
        task: The run under way, if any.
        runs: How often it was started.
        served: Whether it has ever served.
        withdrawn: Whether it is forgotten when it ends, because nobody wants it any more.
        due: Whether a restart under way stops it, if it still runs, and starts it again.
        context: The context variables that each run begins with.
        last_error: What it failed with last, as text.
    """

    __slots__ = ("context", "due", "last_error", "runs", "served", "spec", "task", "withdrawn")

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.task: ChildTask | None = None
        self.runs = 0
        self.served = False
        self.withdrawn = False
        self.due = False
        self.context = copy_context()
        self.last_error: str | None = None

    def new_run(self) -> ChildTask:
        """The task of the next run; whoever starts it gives it to an event loop."""
        self.runs += 1
        self.task = ChildTask(self.spec, self._serves)
        return self.task

    def call_for_restart(self) -> None:
        """Make it due: no run that has begun by now will do."""
        self.due = True
        if self.task is not None:
            self.task.stale = True

    def _serves(self) -> None:
        self.served = True
        if self.task is not None and not self.task.stale:
            self.due = False

    @property
    def state(self) -> ChildState:
        """Where it is in its life."""
        task = self.task
        if task is None:
            return ChildState.RESTARTING if self.due else ChildState.STOPPED
        if task.stopping:
            return ChildState.STOPPING
        return ChildState.RUNNING if task.serves else ChildState.STARTING

    def describe(self, now: float) -> ChildInfo:
        """What the tree tells of it."""
        since = self.task.since if self.task is not None else None
        return ChildInfo(
            name=self.spec.name,
            state=self.state,
            restart=self.spec.restart,
            restarts=max(0, self.runs - 1),
            uptime=None if since is None else now - since,
            last_error=self.last_error,
            details=self._details(),
            supervisors=tuple(each.tree() for each in self.task.supervisors) if self.task is not None else (),
        )

    def _details(self) -> Mapping[str, Detail]:
        if self.spec.details is None:
            return {}
        try:
            return {
                str(name): value if isinstance(value, str | int | float | None) else repr(value)
                for name, value in self.spec.details().items()
            }
        except Exception as error:  # one actor's fault leaves the rest of the tree to be seen
            return {"error": error_text(error)}


def error_text(error: BaseException) -> str:
    """An error as short text, which keeps nothing of what the error holds; it may be foreign."""
    try:
        text = str(error)
    except Exception:  # a fault in somebody's error must not become one of who reports it
        text = "(it has no text)"
    return f"{type(error).__name__}: {text}"[:500]
