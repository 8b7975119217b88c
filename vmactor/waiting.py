"""How a task waits to be woken: the one place in the runtime that knows which event loop it runs on.

anyio's events cost several times what the loops' own means do, and a runtime under thousands of actors waits
and wakes all day. So this is the least there is: one task waits once, anybody of the same loop wakes it. On
asyncio that is a future, on trio a parked task. Cancellation, by anyio's scopes or the loop's own means, ends
a wait as it ends every other one.

A wait that need not begin, because it was woken before, does not yield: whoever loops without ever having to
wait calls ``anyio.lowlevel.checkpoint()`` now and then.
"""

import asyncio
import math
from collections.abc import Generator
from typing import Any, Final, Protocol

import sniffio


class Waiter(Protocol):
    """One wait of one task: made by that task, awaited by it at most once, woken by anybody.

    Attributes:
        woken: Whether ``wake`` was called, be it too late.
    """

    woken: bool

    def wake(self) -> None:
        """End the wait, or let it not begin. Idempotent."""
        ...

    def __await__(self) -> Generator[Any, Any, None]:
        """Return when woken."""
        ...

    async def within(self, seconds: float) -> None:
        """Return when woken, or when so many seconds are over; ``woken`` tells which.

        Infinity is allowed. At 0 or below, those who can run now may still wake it.
        """
        ...


class _AsyncioWaiter:
    __slots__ = ("_future", "woken")

    def __init__(self) -> None:
        self.woken = False
        self._future: asyncio.Future[None] = asyncio.Future()  # of the loop that runs

    def wake(self) -> None:
        self.woken = True
        if not self._future.done():  # it is, after a timeout or a cancellation
            self._future.set_result(None)

    def __await__(self) -> Generator[Any, Any, None]:
        return self._future.__await__()  # itself, so that waking costs no step of a coroutine between

    async def within(self, seconds: float) -> None:
        if seconds == math.inf:  # no timer that would wake an idle loop once a day
            await self._future
            return
        timer = self._future.get_loop().call_later(seconds, self._expire)
        try:
            await self._future
        finally:
            timer.cancel()

    def _expire(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


def _trio_waiter() -> type[Waiter]:
    """Made on first use: trio is optional."""
    import trio  # noqa: PLC0415
    from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled  # noqa: PLC0415

    class TrioWaiter:
        __slots__ = ("_task", "woken")

        def __init__(self) -> None:
            self.woken = False
            self._task: Task | None = None

        def wake(self) -> None:
            self.woken = True
            task, self._task = self._task, None
            if task is not None:
                reschedule(task)

        def __await__(self) -> Generator[Any, Any, None]:
            if not self.woken:
                self._task = current_task()
                yield from wait_task_rescheduled(self._abort).__await__()  # noqa: ASYNC105 - this is await

        async def within(self, seconds: float) -> None:
            with trio.CancelScope(deadline=trio.current_time() + seconds):
                await self

        def _abort(self, _raise_cancel: Any) -> Abort:
            self._task = None
            return Abort.SUCCEEDED

    return TrioWaiter


_types: Final[dict[str, type[Waiter]]] = {"asyncio": _AsyncioWaiter}


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
