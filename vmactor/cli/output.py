"""How events and errors look: one line each, for people or as JSON.

Standard output is data, standard error is for people. With ``--json`` there is nothing but JSON lines on
standard output. What a guest, a file or a VMM said passes through ``shown`` on its way to a person.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import anyio

from vmactor.cli.stdio import STDERR, STDOUT, Writer, is_terminal
from vmactor.messages import (
    Adopted,
    Created,
    CreationFailed,
    DeathReason,
    Died,
    Event,
    Gap,
    HungUp,
    ManagerRestarted,
    Orphaned,
    PayloadError,
    PayloadFinished,
    PayloadReady,
    PayloadStarted,
    Reaped,
    Removed,
    Restarting,
    RestartsExhausted,
    Resumed,
    Snapshot,
    Started,
    Suspended,
    Tombstone,
    UsageSampled,
    VsockMessage,
)
from vmactor.text import escape

GOOD: Final = "32"
BAD: Final = "31"
ODD: Final = "33"
PLAIN: Final = "36"
FAINT: Final = "2"
CLEAR_LINE: Final = "\r\x1b[K"
CONSOLE_LINES: Final = 12
"""How many of a dead guest's last lines are shown."""
_NO_COLOURS: Final[Mapping[str, str]] = {}
FRAMES: Final = "|/-\\"
FRAME_SECONDS: Final = 0.1


def shown(text: str, *, limit: int = 1024) -> str:
    """Foreign text as one safe line."""
    return brackets(escape(text, limit=limit))


def brackets(escaped: str) -> str:
    r"""Give text that is escaped already its plain brackets back; nothing here prints markup.

    Unambiguous, since every backslash of the text itself is doubled.
    """
    return escaped.replace(r"\[", "[")


def wants_colour(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written there may be coloured (no-color.org)."""
    return is_terminal(fd) and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def paint(text: str, colour: str, *, on: bool) -> str:
    """Colour a piece of a line."""
    return f"\x1b[{colour}m{text}\x1b[0m" if on else text


def to_stderr(text: str) -> None:
    """Say something to a person; it does not matter whether anybody listens."""
    _write_stderr(f"{text}\n")


def _write_stderr(text: str) -> None:
    with suppress(OSError):
        os.write(STDERR, text.encode(errors="backslashreplace"))


def print_error(message: str) -> None:
    """The one form of an error: what went wrong and what to do.

    Messages have escaped what they quote already; escaping them once more must not double their backslashes.
    """
    lines = [brackets(shown(line, limit=4096).replace(2 * "\\", "\\")) for line in message.splitlines()] or [
        ""
    ]
    to_stderr("\n  ".join(["vmactor: error: " + lines[0], *lines[1:]]))


def to_json(row: Mapping[str, Any]) -> str:
    """One JSON object as one line; ASCII only, so it is safe to look at, too."""
    return json.dumps(row, separators=(", ", ": ")) + "\n"


# -- Events as lines for people -----------------------------------------------------------------------


def describe(event: Event) -> tuple[str, str]:  # noqa: PLR0911, PLR0912 - a table
    """An event as a sentence, with the colour of its first word. Everything foreign in it is escaped."""
    match event:
        case Created():
            return f'VM "{shown(event.name)}" has CID {event.cid}, driver {shown(event.driver)}', PLAIN
        case CreationFailed():
            return f'no VM "{shown(event.name)}": {shown(event.message)}', BAD
        case Started():
            return f"the VMM runs (process {event.pid})", PLAIN
        case PayloadStarted():
            return f"the payload starts, {event.elapsed:.2f} s after the VM", PLAIN
        case PayloadReady():
            return "the payload can serve", GOOD
        case PayloadFinished():
            return f"exit code {event.exit_code}", GOOD if event.exit_code == 0 else BAD
        case PayloadError():
            return f"the guest says {event.error_code.name}: {shown(event.message)}", BAD
        case HungUp():
            return f"no payload started within {event.timeout:g} s; the VM is being killed", BAD
        case Suspended():
            return "the virtual CPUs are paused", ODD
        case Resumed():
            return "the virtual CPUs run again", PLAIN
        case VsockMessage():
            arrow = "guest -> host" if event.direction == "guest_to_host" else "host -> guest"
            return f"{arrow}, port {event.port}: {shown(event.text)}", PLAIN
        case Tombstone():
            cut = ", cut off" if event.truncated else ""
            return f"a crash report of {event.size} bytes{cut}: {shown(event.path)}", ODD
        case Died():
            by = "" if event.stopped_by is None else f", stopped by {event.stopped_by.name}"
            return f"{event.reason.name} after {event.elapsed:.2f} s{by}", GOOD if _in_order(event) else BAD
        case Restarting():
            return f"it will be started again in {event.delay:.2f} s (restart {event.restarts})", ODD
        case RestartsExhausted():
            return f"{event.failures} ends within {event.period:g} s are too many: it is given up", BAD
        case Removed():
            return "given back; it was never started", ODD
        case Reaped():
            what = ", ".join(event.ended) or "nothing of it was running"
            return f"left by a crashed manager, now cleared away: {shown(what)}", ODD
        case Orphaned():
            return f"left by a crashed manager, and kept: {shown(event.detail)}", BAD
        case Adopted():
            return f"kept by the manager before, goes on as {event.state.name} (process {event.pid})", GOOD
        case ManagerRestarted():
            how = "ended" if event.clean else "was killed, or the host went down"
            return f"the manager before {how}{'; events are missing here' if event.lost else ''}", ODD
        case UsageSampled():
            cpu = f"processor {event.cpu_time_ms} ms, guest's {event.guest_time_ms} ms"
            return f"{cpu}; memory {event.rss_vmm_kib} KiB, guest's {event.rss_vm_kib} KiB", PLAIN
        case Snapshot():
            return f"{len(event.vms)} VMs live", PLAIN
        case Gap():
            return f"{event.missed} events were missed here: their reader was too slow", ODD
    return "", PLAIN


def _in_order(died: Died) -> bool:
    return died.reason is DeathReason.SHUTDOWN


def line_for_people(event: Event, began: float, *, colour: bool = False) -> str:
    """One line: seconds since the beginning, the event's name, a sentence.

    Args:
        event: What happened.
        began: The event loop's clock when the first event happened.
        colour: Whether to use the terminal's colours.
    """
    sentence, painted = describe(event)
    time = paint(f"{event.monotonic - began:9.3f}", FAINT, on=colour)
    return f"{time}  {paint(f'{event.kind:<16}', painted, on=colour)}  {sentence}\n"


def explanation(died: Died) -> list[str]:
    """What else is known of a death that was not in order, as lines for a person."""
    if _in_order(died) or died.reason is DeathReason.KILLED:
        return []
    lines = [f"  {shown(line)}" for line in died.detail.splitlines()]
    if died.failure:
        lines.append(f"  the guest's failure text: {shown(died.failure)}")
    console = [line for line in died.console_tail.splitlines() if line.strip()]
    if console:
        lines.append("  the end of the guest's console:")
        lines += [f"  | {shown(line, limit=200)}" for line in console[-CONSOLE_LINES:]]
    return lines


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], fd: int, colours: Mapping[str, str] = _NO_COLOURS
) -> str:
    """Rows of safe text: drawn for a terminal, aligned with spaces elsewhere.

    Args:
        columns: Headings.
        rows: Cells, as many in each row as there are headings.
        fd: Where it will be written.
        colours: Cells that are coloured, by their whole text.
    """
    if is_terminal(fd):
        # Costs as much time as everything else that is imported for a list, and only terminals show it.
        from vmactor.cli.drawing import draw  # noqa: PLC0415

        return draw(columns, rows, colours if wants_colour(fd) else _NO_COLOURS)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in (columns, *rows)
    )
    return "".join(f"{line}\n" for line in lines)


class EventPrinter:
    """Writes events as they come, each at once.

    Args:
        json: JSON lines rather than lines for people.
        fd: Where to; standard output unless that is somebody else's.

    Attributes:
        json: As given.
    """

    def __init__(self, *, json: bool, fd: int = STDOUT) -> None:
        self._writer = Writer(fd)
        self.json = json
        self._terminal = is_terminal(fd)
        self._colour = wants_colour(fd)
        self._began: float | None = None

    async def show(self, event: Event) -> None:
        """Write one event; an end that was not in order is explained on standard error.

        Raises:
            OSError: It cannot be written; ``BrokenPipeError`` if nobody reads any more.
        """
        if self.json:
            await self.write(to_json(event.as_dict()))
            return
        if self._began is None:
            self._began = event.monotonic
        await self.write(line_for_people(event, self._began, colour=self._colour))
        if isinstance(event, Died):
            for line in explanation(event):
                to_stderr(line)

    async def say(self, text: str = "") -> None:
        """A line of a story; nothing with JSON."""
        if not self.json:
            await self.write(f"{text}\n")

    def bold(self, text: str) -> str:
        """A heading."""
        return paint(text, "1", on=self._colour)

    async def write(self, text: str) -> None:
        """Write lines as they are; a line of progress makes room."""
        clear = CLEAR_LINE if self._terminal and is_terminal(STDERR) and not self.json else ""
        await self._writer.write(f"{clear}{text}".encode(errors="backslashreplace"))


async def show_progress(text: str, clock: Callable[[], float] = anyio.current_time) -> None:
    """Say on a terminal what is being waited for, until cancelled; nothing elsewhere."""
    if not is_terminal(STDERR):
        await anyio.sleep_forever()
    began, frame = clock(), 0
    try:
        while True:
            _write_stderr(f"{CLEAR_LINE}{FRAMES[frame % len(FRAMES)]} {text} {clock() - began:.1f} s")
            frame += 1
            await anyio.sleep(FRAME_SECONDS)
    finally:
        _write_stderr(CLEAR_LINE)
