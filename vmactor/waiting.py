"""How a task waits to be woken: the one place in the runtime that knows which event loop it runs on.

anyio's events cost several times what the loops' own means do, and a runtime under thousands of actors waits
and wakes all day. So this is the least there is: one task waits once, anybody of the same loop wakes it. On
asyncio that is a future, on trio a parked task. Cancellation, by anyio's scopes or the loop's own means, ends
a wait as it ends every other one.

A wait that need not begin, because it was woken before, does not yield: whoever loops without ever having to
wait calls ``anyio.lowlevel.checkpoint()`` now and then.
"""

import asyncio
import errno
import functools
import heapq
import itertools
import math
import select
from asyncio import Future
from collections.abc import Callable, Generator
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import anyio
import sniffio

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike, HasFileno


class Waiter(Protocol):
    """One wait of one task: made by that task, awaited by it at most once, ended by anybody.

    On asyncio this is the loop's own future: a class of ours around it would cost as much again.
    """

    def done(self) -> bool:
        """Whether the wait was ended, by whatever means."""
        ...

    def set_result(self, woken: bool, /) -> None:
        """End a wait that is not done, or let it not begin; see ``wake`` and ``expire``."""
        ...

    def __await__(self) -> Generator[Any, Any, bool]:
        """Wait until woken or expired; whether it was woken."""
        ...


def wake(waiter: Waiter) -> None:
    """End the wait, or let it not begin. Idempotent."""
    if not waiter.done():  # it is, after a deadline or a cancellation
        waiter.set_result(True)


def expire(waiter: Waiter) -> None:
    """End the wait as at a deadline: without waking it."""
    if not waiter.done():
        waiter.set_result(False)


async def within(waiter: Waiter, seconds: float) -> bool:
    """Wait until woken, or until so many seconds are over; whether it was woken.

    Infinity is allowed. At 0 or below, those who can run now may still wake it.
    """
    if isinstance(waiter, Future):
        if seconds == math.inf:  # no timer that would wake an idle loop once a day
            return await waiter  # type: ignore[no-any-return]
        timer = waiter.get_loop().call_later(seconds, expire, waiter)
        try:
            return await waiter  # type: ignore[no-any-return]
        finally:
            timer.cancel()
    with anyio.move_on_after(seconds):
        return await waiter
    return False


def _trio_waiter() -> type[Waiter]:
    """Made on first use: trio is optional."""
    from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled  # noqa: PLC0415

    class TrioWaiter:
        __slots__ = ("_result", "_task")

        def __init__(self) -> None:
            self._result: bool | None = None
            self._task: Task | None = None

        def done(self) -> bool:
            return self._result is not None

        def set_result(self, woken: bool, /) -> None:
            self._result = woken
            if self._task is not None:
                reschedule(self._task)

        def __await__(self) -> Generator[Any, Any, bool]:
            if self._result is None:
                self._task = current_task()
                yield from wait_task_rescheduled(self._abort).__await__()  # noqa: ASYNC105 - this is await
            return self._result is True

        def _abort(self, _raise_cancel: Any) -> Abort:
            self._result = False
            return Abort.SUCCEEDED

    return TrioWaiter


_types: Final[dict[str, type[Waiter]]] = {"asyncio": Future}


def waiter_type() -> type[Waiter]:
    """The kind of waiter for the loop that the caller runs in; keep it, finding out costs more than waiting.

    Raises:
        sniffio.AsyncLibraryNotFoundError: No loop runs here.
    """
    library = sniffio.current_async_library()
    found = _types.get(library)
    if found is None:
        found = _types[library] = _trio_waiter()
    return found


class Moment:
    """Something that happens once, and that any number of tasks may wait for.

    As an event, at a tenth of its memory while nobody waits.

    Attributes:
        passed: Whether it has happened.
    """

    __slots__ = ("_waiters", "passed")

    def __init__(self) -> None:
        self.passed = False
        self._waiters: list[Waiter] | None = None

    def set(self) -> None:
        """Let it happen. Idempotent."""
        self.passed = True
        waiters, self._waiters = self._waiters, None
        for waiter in waiters or ():
            wake(waiter)

    async def wait(self) -> None:
        """Wait for it; does not yield to other tasks if it has happened."""
        if self.passed:
            return
        waiter = waiter_type()()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if self._waiters is not None:
                self._waiters.remove(waiter)


class Expires(Protocol):
    """Something with a deadline."""

    def expire(self) -> None:
        """The deadline has passed."""
        ...


X = TypeVar("X", bound=Expires)


class Deadlines(Generic[X]):
    """The deadlines of all that one owner has under way, with one timer.

    Nearly all that has a deadline is done long before. To set a timer and cancel it costs about as much as
    everything else in a short wait, so the timer of the first deadline stays when that is not needed any
    more; when it fires, it looks for the next one. An owner that has nothing under way thus has its loop wake
    up once at most, and never again.

    Made in the loop that it is for.

    Attributes:
        under_way: What has a deadline, and when, on the loop's clock.
    """

    __slots__ = ("_clock", "_due", "under_way")

    def __init__(self) -> None:
        self.under_way: dict[X, float] = {}
        self._due = math.inf
        self._clock = _clock()

    def begin(self, what: X, seconds: float) -> None:
        """Call ``what.expire()`` after so many seconds, unless it has ended before."""
        when = self._clock.time() + seconds
        self.under_way[what] = when
        if when < self._due:
            self._arm(when)

    def end(self, what: X) -> None:
        """It is done, expired or given up. Idempotent."""
        self.under_way.pop(what, None)

    def _arm(self, when: float) -> None:
        self._due = when
        self._clock.call_at(when, self._fire, when)

    def _fire(self, when: float) -> None:
        if when != self._due:
            return  # an earlier deadline came after this timer was set
        self._due = math.inf
        now = max(when, self._clock.time())  # loops may fire a moment early
        for what, deadline in tuple(self.under_way.items()):
            if deadline <= now:
                del self.under_way[what]
                what.expire()
        following = min(self.under_way.values(), default=math.inf)
        if following < math.inf:
            self._arm(following)


class _TrioClock:
    """Trio has deadlines for scopes only, and to enter one costs as much as a whole ask: so one for all."""

    def __init__(self) -> None:
        import trio  # noqa: PLC0415

        self.time = trio.current_time
        self._new_scope = trio.CancelScope
        self._scope = trio.CancelScope()
        self._sleep = trio.sleep_forever
        self._timers: list[tuple[float, int, Callable[[float], object]]] = []
        self._numbers = itertools.count()
        trio.lowlevel.spawn_system_task(self._run, name="deadlines of the actor runtime")

    def call_at(self, when: float, callback: Callable[[float], object], _when: float, /) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), callback))
        self._scope.deadline = min(self._scope.deadline, when)

    async def _run(self) -> None:
        while True:
            with self._scope:
                await self._sleep()
            # A new one first: a callback may set a timer.
            self._scope = self._new_scope(deadline=math.inf)
            while self._timers and self._timers[0][0] <= self.time():
                when, _, callback = heapq.heappop(self._timers)
                callback(when)
            if self._timers:
                self._scope.deadline = self._timers[0][0]


@functools.cache
def _trio_clocks() -> Any:
    import trio  # noqa: PLC0415

    return trio.lowlevel.RunVar("clock of the actor runtime")


def _clock() -> asyncio.AbstractEventLoop | _TrioClock:
    if sniffio.current_async_library() == "asyncio":
        return asyncio.get_running_loop()
    clocks = _trio_clocks()
    clock: _TrioClock | None = clocks.get(None)
    if clock is None:
        clock = _TrioClock()
        clocks.set(clock)
    return clock


_LACKING: Final = frozenset({errno.ENOSPC, errno.ENOMEM})
"""What epoll says when it may watch no more (``fs.epoll.max_user_watches``), or has no memory for it."""
_LOOK_SECONDS: Final = 0.02


async def readable(fd: "FileDescriptorLike") -> None:
    """``anyio.wait_readable``, also where the kernel can watch no more descriptors.

    Then it looks every 20 ms: whoever waits for the end of a process, say, must not fail for that.
    """
    try:
        await anyio.wait_readable(fd)
    except OSError as error:
        await _look(fd, select.POLLIN, error)


async def writable(fd: "FileDescriptorLike") -> None:
    """``anyio.wait_writable``, in the same way."""
    try:
        await anyio.wait_writable(fd)
    except OSError as error:
        await _look(fd, select.POLLOUT, error)


async def _look(fd: "FileDescriptorLike", event: int, error: OSError) -> None:
    if error.errno not in _LACKING:
        raise error
    looking = select.poll()
    looking.register(fd, event)
    while not looking.poll(0):  # noqa: ASYNC110 - that is what there is no event for
        await anyio.sleep(_LOOK_SECONDS)


def _known_to_anyio() -> Context:
    """The context for a function that asyncio's loop itself calls, outside of all tasks.

    anyio cannot tell there which library runs, unless it has started the loop itself.
    """
    context = copy_context()
    context.run(sniffio.current_async_library_cvar.set, "asyncio")
    return context


async def each_time_readable(file: "HasFileno", callback: Callable[[], bool]) -> None:
    """Call a function whenever a descriptor is readable, until it gives False or raises.

    On asyncio it is called by the loop itself: to wake a task each time would cost more than most reads.
    """
    if sniffio.current_async_library() == "asyncio":
        loop = asyncio.get_running_loop()
        done: Future[None] = loop.create_future()

        def ready() -> None:
            if done.done():
                return
            try:
                if not callback():
                    done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        try:
            _known_to_anyio().run(loop.add_reader, file.fileno(), ready)
        except OSError as error:
            if error.errno not in _LACKING:
                raise
        else:
            try:
                await done
            finally:
                loop.remove_reader(file.fileno())
            return
    while True:
        await readable(file)
        if not callback():
            return


def soon(*, any_thread: bool = False) -> Callable[[Callable[[], object]], object]:
    """What calls a function in the running loop's next turn; keep it, finding out costs more than calling.

    Args:
        any_thread: Whether other threads call it, too; it raises RuntimeError when the loop has ended.
    """
    if sniffio.current_async_library() == "asyncio":
        loop = asyncio.get_running_loop()
        return functools.partial(
            loop.call_soon_threadsafe if any_thread else loop.call_soon, context=_known_to_anyio()
        )
    import trio  # noqa: PLC0415

    return trio.lowlevel.current_trio_token().run_sync_soon
