"""A command's life: it ends by itself, by a signal, or because nobody reads what it says; then it tidies up.

Every way leads through the same clean-up. A second signal changes nothing: tidying up is bounded by itself,
and cutting it short would leave a VM behind.
"""

import logging
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

import anyio

from vmactor import Event, StartFailedError, Subscription, VirtualMachine, VmactorError
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.output import EventPrinter, print_error, to_stderr
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.client.machine import VirtualMachine as RemoteVirtualMachine
from vmactor.messages import is_end

LAST_WORDS_SECONDS = 2.0
"""How long the last events of a VM may take to be written once its command is being ended."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_to_the_end(work: Callable[[], Awaitable[ExitCode]], *, tells: str) -> ExitCode:
    """Run a command in an event loop, until it or somebody ends it.

    Args:
        work: The command. It is cancelled by SIGINT, SIGTERM, SIGHUP and by the end of the last reader of
            standard output; it has to tidy up then.
        tells: What to tell a person at a signal, e.g. ``stopping the VM``.
    """
    # What happens to a VM is told by events already; the library's warnings are for people.
    logging.basicConfig(format="vmactor: %(levelname)s: %(message)s", level=logging.WARNING)
    return anyio.run(_run_to_the_end, work, tells)


async def _run_to_the_end(work: Callable[[], Awaitable[ExitCode]], tells: str) -> ExitCode:
    # A signal that is ignored (nohup, a job of a script in the background) stays ignored.
    wanted = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    ended_by: signal.Signals | None = None
    code = ExitCode.OK

    with anyio.open_signal_receiver(*wanted) as signals:
        async with anyio.create_task_group() as watchers:
            scope = anyio.CancelScope()

            def end(number: signal.Signals) -> None:
                nonlocal ended_by
                ended_by = ended_by or number
                scope.cancel()

            async def watch_signals() -> None:
                async for number in signals:
                    to_stderr(f"vmactor: {'still ' if ended_by else ''}{tells}")
                    end(number)

            async def watch_reader() -> None:
                await Writer(STDOUT).reader_gone()
                end(signal.SIGPIPE)

            watchers.start_soon(watch_signals)
            watchers.start_soon(watch_reader)
            with scope:
                try:
                    code = await work()
                except BrokenPipeError:
                    end(signal.SIGPIPE)
                except (VmactorError, OSError, ExceptionGroup) as error:
                    code = report(error)
            watchers.cancel_scope.cancel()
    return ExitCode(128 + ended_by) if ended_by else code


def report(error: Exception) -> ExitCode:
    """Tell a person of a deliberate error; any other is a fault of ours and goes on with its traceback.

    Raises:
        Exception: The error itself, if it is a fault of ours.
    """
    leaves = _leaves(error)
    if any(isinstance(leaf, BrokenPipeError) for leaf in leaves):
        return ExitCode.READER_GONE
    if not all(isinstance(leaf, VmactorError | OSError) for leaf in leaves):
        raise error
    for leaf in leaves:
        print_error(str(leaf))
    return ExitCode.ERROR


def _leaves(error: Exception) -> list[Exception]:
    if isinstance(error, ExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


async def follow(
    vm: VirtualMachine | RemoteVirtualMachine, events: Subscription[Event], printer: EventPrinter
) -> list[Event]:
    """Start a VM, show what happens until it is dead, and leave nothing of it.

    Args:
        vm: Not started yet.
        events: Those of this VM, from its creation on.
        printer: Where they are shown.

    Returns:
        All events, in order.
    """
    life = Life(vm, events, printer)
    async with life:
        await life.start()
        await life.until_end()
    return life.seen


class Life:
    """A VM's events, shown and kept; leaving its ``async with`` block ends the VM and shows the rest.

    Args:
        vm: Not started yet.
        events: Those of this VM, from its creation on.
        printer: Where they are shown.

    Attributes:
        seen: All events so far.
    """

    def __init__(
        self, vm: VirtualMachine | RemoteVirtualMachine, events: Subscription[Event], printer: EventPrinter
    ) -> None:
        self.seen: list[Event] = []
        self._vm = vm
        self._events = events
        self._printer = printer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # Shielded: whoever cancelled us wants the VM gone, and to know that it is.
        with anyio.CancelScope(shield=True):
            await self._vm.aclose()
        with anyio.move_on_after(LAST_WORDS_SECONDS, shield=True), suppress(OSError):
            await self.pending()

    async def start(self) -> None:
        """Show ``created``, and start the VM. A VMM that does not come up is told by ``died``."""
        await self.pending()
        with suppress(StartFailedError):
            await self._vm.start()

    async def pending(self) -> None:
        """Show what has happened, without waiting for more."""
        while (event := self._events.next_nowait()) is not None:
            await self._show(event)

    async def until(self, kind: type[Event]) -> bool:
        """Show events until one of this kind has come; False if the VM ended first."""
        while not any(isinstance(event, kind) for event in self.seen):
            if any(is_end(event) for event in self.seen):
                return False
            await self._show(await anext(self._events))
        return True

    async def until_end(self) -> None:
        """Show events until the VM's last one has come."""
        while not any(is_end(event) for event in self.seen):
            await self._show(await anext(self._events))

    async def _show(self, event: Event) -> None:
        self.seen.append(event)
        await self._printer.show(event)
