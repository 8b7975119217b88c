"""Long work in a thread, with a bar on a terminal once it has taken a second."""

from collections.abc import Callable
from typing import Final, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from vmactor.cli.output import FRAME_SECONDS
from vmactor.cli.stdio import STDERR, is_terminal

PATIENCE_SECONDS: Final = 1.0
"""What takes less shows no bar."""

Result = TypeVar("Result")


async def with_progress(text: str, total: int, work: Callable[[Callable[[int], None]], Result]) -> Result:
    """Do work in a thread, and show on a terminal how far it is.

    Args:
        text: What is being done.
        total: Units of work, bytes for example.
        work: Gets a function to call with the units done, often: when the command is ended, that raises what
            ends the work, too.

    Raises:
        Exception: What the work raises.
    """
    done = 0

    def progress(now: int) -> None:
        nonlocal done
        done = now
        anyio.from_thread.check_cancelled()

    async def show() -> None:
        await anyio.sleep(PATIENCE_SECONDS)
        # Takes as long as hashing some hundred MiB, so nobody pays for it who sees no bar.
        from vmactor.cli.drawing import Bar  # noqa: PLC0415

        with Bar(text, total) as bar:
            while True:
                bar.show(done)
                await anyio.sleep(FRAME_SECONDS)

    async with anyio.create_task_group() as tasks:
        if is_terminal(STDERR):
            tasks.start_soon(show)
        result = await anyio.to_thread.run_sync(work, progress)
        tasks.cancel_scope.cancel()
    return result
