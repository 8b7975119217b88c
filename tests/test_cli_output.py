"""What commands print: golden lines for people, JSON lines for programs, nothing a terminal obeys."""

import dataclasses
import json
import os
import pty
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from vmactor import messages
from vmactor.cli import output
from vmactor.cli.output import EventPrinter, explanation, line_for_people, shown, table, to_json, wants_colour
from vmactor.messages import (
    Adopted,
    Created,
    CreationFailed,
    DeathReason,
    Died,
    ErrorCode,
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
    StopRung,
    Suspended,
    Tombstone,
    UsageSampled,
    VirtualMachineState,
    VsockMessage,
)

EVENTS: list[Event] = [
    Created(monotonic=100.0),
    Started(monotonic=100.25, pid=4242),
    PayloadStarted(monotonic=101.5, elapsed=1.5),
    PayloadReady(monotonic=101.75),
    VsockMessage(monotonic=102.0, direction="host_to_guest", port=5000, text="uname"),
    VsockMessage(monotonic=102.0, direction="guest_to_host", port=70000, text="hello"),
    Suspended(monotonic=103.0),
    Resumed(monotonic=104.0),
    PayloadFinished(monotonic=105.0, exit_code=0),
    PayloadFinished(monotonic=105.0, exit_code=3),
    PayloadError(monotonic=105.5, error_code=ErrorCode.PAYLOAD_CHANGED, message="not as it was"),
    HungUp(monotonic=130.0, timeout=30.0),
    Tombstone(monotonic=130.5, path="/kept/tombstone-1", size=70000, truncated=True),
    Gap(monotonic=131.0, missed=7),
    Snapshot(monotonic=132.0),
    Died(monotonic=1234.5, reason=DeathReason.SHUTDOWN, elapsed=1134.5),
    Died(monotonic=1234.5, reason=DeathReason.CRASH, elapsed=1134.5),
    Restarting(monotonic=1250.0, delay=1.5, restarts=2),
    RestartsExhausted(monotonic=1260.0, restarts=3, failures=4, period=60.0),
    Removed(monotonic=1300.0),
    Died(monotonic=1300.0, reason=DeathReason.KILLED, elapsed=9.0, stopped_by=StopRung.EXIT_REQUEST),
    Reaped(monotonic=1400.0, ended=("its VMM (process 7)",)),
    Reaped(monotonic=1400.0),
    Orphaned(monotonic=1400.0, detail="process 7 is unknown"),
    Adopted(monotonic=1450.0, pid=4242, state=VirtualMachineState.READY),
    ManagerRestarted(monotonic=1450.0, clean=True),
    ManagerRestarted(monotonic=1450.0, lost=True),
    CreationFailed(monotonic=1500.0, error="SERVICE_SPECIFIC", code=-8, message="no CID left"),
    UsageSampled(monotonic=1500.0, guest_time_ms=250, cpu_time_ms=300, rss_vm_kib=65536, rss_vmm_kib=98304),
]

GOLDEN = """\
    0.000  created           VM "web-3" has CID 2051, driver qemu
    0.250  started           the VMM runs (process 4242)
    1.500  payload_started   the payload starts, 1.50 s after the VM
    1.750  payload_ready     the payload can serve
    2.000  vsock_message     host -> guest, port 5000: uname
    2.000  vsock_message     guest -> host, port 70000: hello
    3.000  suspended         the virtual CPUs are paused
    4.000  resumed           the virtual CPUs run again
    5.000  payload_finished  exit code 0
    5.000  payload_finished  exit code 3
    5.500  error             the guest says PAYLOAD_CHANGED: not as it was
   30.000  hung_up           no payload started within 30 s; the VM is being killed
   30.500  tombstone         a crash report of 70000 bytes, cut off: /kept/tombstone-1
   31.000  gap               7 events were missed here: their reader was too slow
   32.000  snapshot          0 VMs live
 1134.500  died              SHUTDOWN after 1134.50 s
 1134.500  died              CRASH after 1134.50 s
 1150.000  restarting        it will be started again in 1.50 s (restart 2)
 1160.000  gave_up           4 ends within 60 s are too many: it is given up
 1200.000  removed           given back; it was never started
 1200.000  died              KILLED after 9.00 s, stopped by EXIT_REQUEST
 1300.000  reaped            left by a crashed manager, now cleared away: its VMM (process 7)
 1300.000  reaped            left by a crashed manager, now cleared away: nothing of it was running
 1300.000  orphaned          left by a crashed manager, and kept: process 7 is unknown
 1350.000  adopted           kept by the manager before, goes on as READY (process 4242)
 1350.000  manager_restarted  the manager before ended
 1350.000  manager_restarted  the manager before was killed, or the host went down; events are missing here
 1400.000  creation_failed   no VM "web-3": no CID left
 1400.000  usage             processor 300 ms, guest's 250 ms; memory 98304 KiB, guest's 65536 KiB
"""

HOSTILE = "\x1b[31mred\x1b]0;title\x07\u202eevil\n[bold]x[/bold]"


def headed(event: Event) -> Event:
    time = datetime(2026, 3, 4, 5, 6, 7, 890, tzinfo=UTC)
    return dataclasses.replace(event, seq=1, cid=2051, generation=1, name="web-3", driver="qemu", time=time)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_lines_for_people_are_as_documented() -> None:
    assert "".join(line_for_people(headed(event), 100.0) for event in EVENTS) == GOLDEN


def test_every_event_there_is_has_a_line() -> None:
    words = vars(messages).values()
    known = {
        word for word in words if isinstance(word, type) and issubclass(word, Event) and word is not Event
    }
    assert {type(event) for event in EVENTS} == known


def test_colours_frame_the_event_and_nothing_else_changes() -> None:
    plain = line_for_people(headed(EVENTS[3]), 100.0)
    coloured = line_for_people(headed(EVENTS[3]), 100.0, colour=True)
    assert coloured == "\x1b[2m    1.750\x1b[0m  \x1b[32mpayload_ready   \x1b[0m  the payload can serve\n"
    assert coloured.replace("\x1b[2m", "").replace("\x1b[32m", "").replace("\x1b[0m", "") == plain


@pytest.mark.parametrize(
    "event",
    [
        VsockMessage(direction="guest_to_host", port=1, text=HOSTILE),
        PayloadError(error_code=ErrorCode.UNKNOWN, message=HOSTILE),
        Created(),
    ],
    ids=lambda event: event.kind,
)
def test_foreign_text_cannot_speak_to_the_terminal(event: Event) -> None:
    line = line_for_people(dataclasses.replace(event, name=HOSTILE, driver=HOSTILE), 0.0)
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert r"\x1b[31mred" in line


def test_shown_text_keeps_its_brackets_and_can_be_read_back() -> None:
    assert shown(r"[a] \[b] \\[c]") == r"[a] \\[b] \\\\[c]"


def test_a_death_out_of_order_is_explained_with_the_guests_last_lines() -> None:
    console = "".join(f"line {number}\r\n\r\n" for number in range(40)) + HOSTILE
    died = Died(reason=DeathReason.CRASH, detail="a\nb\x1b", failure="why\x07", console_tail=console)
    lines = explanation(died)
    assert lines[:4] == [
        "  a",
        r"  b\x1b",
        r"  the guest's failure text: why\x07",
        "  the end of the guest's console:",
    ]
    assert len(lines) == 4 + output.CONSOLE_LINES
    assert lines[-3] == "  | line 39"
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("reason", [DeathReason.SHUTDOWN, DeathReason.KILLED])
def test_an_end_that_was_asked_for_needs_no_explanation(reason: DeathReason) -> None:
    assert explanation(Died(reason=reason, detail="x", console_tail="y")) == []


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_json_is_one_ascii_line_with_the_header_and_the_events_fields(event: Event) -> None:
    line = to_json(headed(event).as_dict())
    assert line.isascii()
    assert line.count("\n") == 1
    row = json.loads(line)
    assert (
        row.items()
        >= {
            "event": event.kind,
            "seq": 1,
            "cid": 2051,
            "generation": 1,
            "name": "web-3",
            "driver": "qemu",
            "time": "2026-03-04T05:06:07.000890Z",
        }.items()
    )
    assert set(row) == {"event", *(field.name for field in dataclasses.fields(event))}


def test_json_survives_text_that_is_not_unicode() -> None:
    event = VsockMessage(direction="guest_to_host", port=1, text="\udcff\u2028\x1b")
    assert json.loads(to_json(event.as_dict()))["text"] == "\udcff\u2028\x1b"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_is_coloured_unless_its_owner_objects(
    terminal: tuple[int, int], environ: dict[str, str], expected: bool
) -> None:
    assert wants_colour(terminal[1], environ) is expected


def test_what_is_no_terminal_is_never_coloured(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert not wants_colour(file.fileno(), {})


@pytest.mark.parametrize("as_json", [False, True])
def test_the_printer_writes_each_event_at_once(
    tmp_path: Path, as_json: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out"

    async def show() -> None:
        with path.open("wb", buffering=0) as file:
            printer = EventPrinter(json=as_json, fd=file.fileno())
            for count, event in enumerate(EVENTS, start=1):
                await printer.show(headed(event))
                assert len(path.read_text().splitlines()) == count

    anyio.run(show)
    if as_json:
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [
            e.kind for e in EVENTS
        ]
    else:
        assert path.read_text() == GOLDEN
    assert capfd.readouterr() == ("", "")


def test_a_table_that_nobody_looks_at_is_aligned_text(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        text = table(("CID", "NAME"), [("2048", "a"), ("2", "longer")], file.fileno())
    assert text == "CID   NAME\n2048  a\n2     longer\n"


def test_a_table_on_a_terminal_is_drawn_and_knows_no_markup(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [("2048", "[bold]x[/bold]"), ("2049", ":smile:")]
    text = table(("CID", "NAME"), rows, terminal[1], {"2048": output.GOOD})
    assert "[bold]x[/bold]" in text
    assert ":smile:" in text
    assert "─" in text
    assert "\x1b[32m2048" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in table(("CID", "NAME"), rows, terminal[1], {"2048": output.GOOD})
