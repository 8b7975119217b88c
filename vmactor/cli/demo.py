"""``vmactor demo``: the whole life of a VM as a short story, told with a real guest.

The guest is the one of ``make guest``; guest/README.md describes the steps that it takes from us.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from vmactor import (
    Created,
    DeadlineExceededError,
    Died,
    Event,
    IllegalArgumentError,
    IllegalStateError,
    PayloadFinished,
    PayloadReady,
    PayloadStarted,
    Started,
    VirtualizationService,
    VirtualMachine,
    VmactorError,
    VsockError,
    VsockListener,
    VsockMessage,
    VsockStream,
    load_config,
)
from vmactor.cli import demo_app
from vmactor.cli.exit_codes import ExitCode, exit_code
from vmactor.cli.lifetime import Life, run_to_the_end
from vmactor.cli.output import EventPrinter, show_progress, shown

GUEST_PORT: Final = 5000
"""Where the guest takes steps."""
HOST_PORTS: Final = range(70_000, 70_100)
"""Where the guest calls us; above all CIDs, since on port = CID every VM reports its payload's state."""
ANSWER_SECONDS: Final = 15.0
GRACE_SECONDS: Final = 3.0
"""How long a conversation that broke off may have been cut short by the VM's end."""
MAX_LINE: Final = 4096
QUESTION: Final = "uname"
GREETING: Final = "hello from the guest"
REPLY: Final = "hello from the host"


def run(args: argparse.Namespace) -> ExitCode:
    """Tell the story."""
    if args.app:
        return run_to_the_end(partial(demo_app.tell, args), tells="stopping the VM")
    return run_to_the_end(partial(_run, args), tells="stopping the VM")


def guest_configuration(guest: Path | None) -> Path:
    """Where the guest's configuration is.

    Raises:
        IllegalArgumentError: It has not been built.
    """
    directory = guest or Path(os.environ.get("VMACTOR_GUEST") or "build/guest")
    if not (directory / "vm.json").is_file():
        raise IllegalArgumentError(
            f"there is no guest in {directory}: run 'make guest' in the source checkout, or name the "
            "directory with --guest"
        )
    return directory / "vm.json"


async def _run(args: argparse.Namespace) -> ExitCode:
    path = guest_configuration(args.guest)
    printer = EventPrinter(json=args.json)
    async with VirtualizationService(vmm=args.vmm, state_directory=args.state_dir) as service:
        await printer.say(printer.bold("The life of a VM, with a real Linux guest"))
        await printer.say()
        driver = service.selection.driver
        pace = "emulated, so booting takes seconds" if driver.emulated else "with hardware virtualization"
        await printer.say(
            f"VMM: {driver.name}, {pace}. vsock: {service.selection.vsock}. Guest: {shown(str(path))}."
        )
        await printer.say("'vmactor info' says why.")
        await printer.say()
        await printer.say("  seconds  event")
        with service.subscribe() as events, load_config(path) as config:
            vm = await service.create_vm(config, hangup_detection=True)
            life = Life(vm, events, printer)
            async with life:
                await _tell(vm, life, printer)
        await printer.say()
        for what, value in summary(life.seen):
            await printer.say(f"{what:<40} {printer.bold(value)}")
        return exit_code(life.seen)


async def _tell(vm: VirtualMachine, life: Life, printer: EventPrinter) -> None:
    async with anyio.create_task_group() as waiting:
        if not printer.json:
            waiting.start_soon(show_progress, "the guest boots")
        await life.start()
        ready = await life.until(PayloadReady)
        waiting.cancel_scope.cancel()
    failure: Exception | None = None
    patience = ANSWER_SECONDS
    if ready:
        try:
            await _talk(vm, life)
        except (anyio.EndOfStream, anyio.BrokenResourceError, VmactorError) as error:
            failure, patience = error, GRACE_SECONDS  # perhaps the VM has ended, and its end tells more
    with anyio.move_on_after(patience):
        await life.until(Died)
        return
    if isinstance(failure, VmactorError):
        raise failure
    raise DeadlineExceededError(
        f"the guest did not end within {patience:g} s of its last step; look at its console with "
        "'vmactor run --console FILE'"
    ) from failure


async def _talk(vm: VirtualMachine, life: Life) -> None:
    """One message each way, then the end of the payload and of the guest.

    Raises:
        DeadlineExceededError: The guest was silent.
        IllegalStateError: It refused a step, or the VM ended.
        EndOfStream, BrokenResourceError: The connection ended.
    """
    listener = _listen(vm)
    async with aclosing(listener), await vm.connect_vsock(GUEST_PORT) as stream:
        steps = _Lines(stream)
        await steps.send(QUESTION)
        answer = _answer(await steps.receive())
        await vm.publish_message("host_to_guest", GUEST_PORT, f"{QUESTION} (answer: {answer})")
        await life.pending()

        await steps.send(f"dial {listener.port} {GREETING}")
        async with await _accept(listener) as call:
            caller = _Lines(call)
            text = await caller.receive()
            await caller.send(REPLY)
            answer = _answer(await steps.receive())
        await vm.publish_message("guest_to_host", listener.port, f"{text} (answer: {answer})")
        await life.pending()

        for last in "finished 0", "poweroff":
            await steps.send(last)
            _answer(await steps.receive())
            await life.pending()


def _listen(vm: VirtualMachine) -> VsockListener:
    """Listen on the first port that nobody has; kernel vsock ports are the whole host's."""
    failure: VsockError | None = None
    for port in HOST_PORTS:
        try:
            return vm.listen_vsock(port)
        except VsockError as error:
            failure = error
    raise VsockError(f"no vsock port in {HOST_PORTS} is free: {failure}") from failure


async def _accept(listener: VsockListener) -> VsockStream:
    with anyio.move_on_after(ANSWER_SECONDS):
        return await listener.accept()
    raise DeadlineExceededError(f"the guest did not call within {ANSWER_SECONDS:g} s")


def _answer(line: str) -> str:
    verdict, _, answer = line.partition(" ")
    if verdict != "ok":
        raise IllegalStateError(f"the guest refused a step: {line}; rebuild it with 'make guest'")
    return answer


class _Lines:
    """Lines of text over a stream, each with a bound and a deadline."""

    def __init__(self, stream: VsockStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def send(self, line: str) -> None:
        await self._stream.send(f"{line}\n".encode())

    async def receive(self) -> str:
        with anyio.move_on_after(ANSWER_SECONDS):
            while b"\n" not in self._buffer:
                if len(self._buffer) > MAX_LINE:
                    raise IllegalStateError(f"the guest sent a line of more than {MAX_LINE} bytes")
                self._buffer += await self._stream.receive(MAX_LINE)
            line, _, self._buffer = self._buffer.partition(b"\n")
            return line.decode(errors="replace")
        raise DeadlineExceededError(f"the guest did not answer within {ANSWER_SECONDS:g} s")


def summary(events: Sequence[Event]) -> list[tuple[str, str]]:
    """What the life came to, as rows of a table; what did not happen is left out."""
    first: dict[type[Event], Event] = {}
    for event in events:
        first.setdefault(type(event), event)
    rows: list[tuple[str, str]] = []

    def span(what: str, start: type[Event], end: type[Event]) -> None:
        if start in first and end in first:
            rows.append((what, f"{first[end].monotonic - first[start].monotonic:.3f} s"))

    span("created until the VMM ran", Created, Started)
    span("the VMM ran until the payload started", Started, PayloadStarted)
    span("the payload started until it was ready", PayloadStarted, PayloadReady)
    if messages := sum(isinstance(event, VsockMessage) for event in events):
        rows.append(("vsock messages", str(messages)))
    if isinstance(finished := first.get(PayloadFinished), PayloadFinished):
        rows.append(("exit code of the payload", str(finished.exit_code)))
    if isinstance(died := first.get(Died), Died):
        rows.append(("why the VM died", died.reason.name))
        span("created until nothing was left", Created, Died)
    return rows
