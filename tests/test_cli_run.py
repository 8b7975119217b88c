"""``vmactor run`` with real guests: every exit status, Ctrl-C, a vanished reader; nothing is ever left."""

import os
import pty
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli_process import SECONDS, Cli, cli, closed_reader, rows, until, write_config
from vmactor.cli.guest_text import MAX_LINE, Lines

__all__ = ["cli"]
"""A fixture is named by its parameters only."""

HEADER = {"seq", "previous", "cid", "generation", "name", "driver", "time", "monotonic", "event"}


@pytest.mark.guest
def test_a_payload_that_fails_is_status_10_and_its_life_is_json_lines(
    cli: Cli, guest_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, guest_dir, "print to the console;log to the log;started;ready;finished 3")
    console, log = tmp_path / "console", tmp_path / "log"
    code, out, err = cli.run("run", config, "--json", "--name", "web-3", "--console", console, "--log", log)
    events = rows(out)
    assert (code, err) == (10, "")
    assert [event["event"] for event in events] == [
        "created",
        "started",
        "payload_started",
        "payload_ready",
        "payload_finished",
        "died",
    ]
    assert all(set(event) >= HEADER for event in events)
    assert [event["seq"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event["previous"] for event in events] == [0, 1, 2, 3, 4, 5]
    assert {(event["name"], event["driver"], event["cid"]) for event in events} == {("web-3", "qemu", 2048)}
    assert [event["generation"] for event in events] == [0, 1, 1, 1, 1, 1]
    assert events[4]["exit_code"] == 3
    assert events[5]["reason"] == "SHUTDOWN"
    assert "to the console" in console.read_text()
    assert log.read_text() == "to the log\n"


@pytest.mark.guest
def test_an_error_of_the_guest_is_status_11_and_people_read_lines(
    cli: Cli, guest_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, guest_dir, "error 2 not as it was")
    code, out, err = cli.run("run", config)
    assert code == 11
    assert [line.split()[1] for line in out.splitlines()] == ["created", "started", "error", "died"]
    assert "the guest says PAYLOAD_CHANGED: not as it was" in out
    assert 'VM "scripted" has CID 2048, driver qemu' in out
    assert "\x1b" not in out
    assert err == ""


@pytest.mark.guest
def test_a_crash_after_a_success_is_status_12_and_the_guests_last_words_are_shown(
    cli: Cli, guest_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, guest_dir, "started;finished 0;panic")
    code, out, err = cli.run("run", config, "--console", "-")
    assert code == 12
    assert "sysrq" in out  # standard output is the guest's; people read the events beside it
    assert "payload_finished  exit code 0" in err
    assert "CRASH after" in err
    assert "the end of the guest's console:" in err


@pytest.mark.guest
def test_a_guest_that_reports_nothing_in_time_is_status_14(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, guest_dir, "hang")
    code, out, _err = cli.run("run", config, "--json", "--hangup-timeout", "0.5")
    events = rows(out)
    assert code == 14
    assert [event["event"] for event in events] == ["created", "started", "hung_up", "died"]
    assert (events[2]["timeout"], events[3]["reason"]) == (0.5, "HANGUP")


def test_a_kernel_that_is_none_is_status_13(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(b"x")
    config = write_config(tmp_path, guest_dir, "", kernel=str(tmp_path / "kernel"), initrd=None)
    code, out, err = cli.run("run", config)
    assert code == 13, out + err
    assert [line.split()[1] for line in out.splitlines()] == ["created", "died"]
    assert "START_FAILED" in out
    assert "invalid kernel header" in err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ('{"kernel": "nowhere", "platform_version": "~1.0"}', "nowhere"),
        ('{"kernel": "vm.json", "platform_version": "~9.0"}', "Incompatible platform version"),
        ('{"kernel": "vm.json", "platform_version": "~1.0", "colour": 1}', "colour"),
    ],
)
def test_a_wrong_configuration_is_status_1_with_a_sentence(
    cli: Cli, tmp_path: Path, text: str | None, why: str
) -> None:
    if text is not None:
        (tmp_path / "vm.json").write_text(text)
    code, out, err = cli.run("run", tmp_path / "vm.json", "--json")
    assert (code, out) == (1, "")
    assert err.startswith("vmactor: error: ")
    assert err.count("\n") == 1
    assert why in err


@pytest.mark.parametrize("option", ["--console", "--log"])
def test_an_output_file_that_cannot_be_made_is_status_1(cli: Cli, tmp_path: Path, option: str) -> None:
    code, out, err = cli.run("run", tmp_path / "vm.json", option, tmp_path / "no" / "file")
    assert (code, out) == (1, "")
    assert err.startswith("vmactor: error: ")


def test_a_vm_name_that_is_none_is_status_1(cli: Cli, guest_dir: Path) -> None:
    code, out, err = cli.run("run", guest_dir / "vm.json", "--name", "a b\x1b[31m")
    assert (code, out) == (1, "")
    assert "is not a VM name" in err
    assert "\x1b" not in err


@pytest.mark.guest
@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
    ],
)
def test_a_signal_stops_the_vm_and_leaves_nothing(
    cli: Cli, guest_dir: Path, tmp_path: Path, numbers: list[signal.Signals], status: int
) -> None:
    config = write_config(tmp_path, guest_dir, "hang")
    with cli.spawn("run", config, "--json") as process:
        until(process.stdout, "started")
        process.send_signal(numbers[0])
        assert process.stderr is not None
        said = process.stderr.readline()  # the clean-up begins; nothing may cut it short
        for number in numbers[1:]:
            process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == status
    assert [(row["event"], row["reason"]) for row in rows(out.decode())] == [("died", "KILLED")]
    assert said == b"vmactor: stopping the VM\n"
    assert set(err.splitlines()) <= {b"vmactor: still stopping the VM"}


@pytest.mark.guest
def test_ctrl_c_between_created_and_started_leaves_nothing(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, guest_dir, "hang")
    with cli.spawn("run", config, "--json") as process:
        until(process.stdout, "created")
        process.send_signal(signal.SIGINT)
        out, _err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert [row["event"] for row in rows(out.decode())][-1] in ("died", "removed")


@pytest.mark.guest
def test_a_signal_that_the_starter_ignores_stays_ignored(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, guest_dir, "hang")
    with cli.spawn("run", config, "--json", ignore="HUP") as process:
        until(process.stdout, "started")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
    assert process.returncode == 143


@pytest.mark.guest
def test_when_nobody_reads_any_more_the_vm_is_stopped(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, guest_dir, "hang")
    with cli.spawn("run", config, "--json") as process:
        until(process.stdout, "started")
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(SECONDS) == 141
    assert "Traceback" not in err


def test_a_reader_that_was_never_there_gets_no_vm(cli: Cli, guest_dir: Path) -> None:
    write = closed_reader()
    try:
        code, _out, err = cli.run("run", guest_dir / "vm.json", "--json", stdout=write)
    finally:
        os.close(write)
    assert code == 141
    assert "Traceback" not in err


@pytest.mark.guest
def test_a_terminal_sees_the_guests_console_escaped(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, guest_dir, "print [\x1b[31mred\x07] x;finished 0")
    ours, theirs = pty.openpty()
    with cli.spawn("run", config, "--console", "-", stdout=theirs) as process:
        os.close(theirs)
        text = b""
        with suppress(OSError):  # how a terminal's end looks from this side
            while data := os.read(ours, 65536):
                text += data
        assert process.wait(SECONDS) == 0
    os.close(ours)
    assert rb"[\x1b[31mred\x07] x" in text
    assert b"\x1b" not in text


@pytest.mark.guest
def test_what_a_killed_manager_left_is_listed_and_the_next_one_ends_it(
    cli: Cli, guest_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, guest_dir, "hang")
    with cli.spawn("run", config, "--json") as process:
        cid = until(process.stdout, "started")["cid"]
        process.kill()
    assert sorted("qemu" in command for command in cli.processes().values()) == [False, True]
    listed = cli.run("list")[1].splitlines()[1].split()
    assert listed[:3] == [str(cid), "scripted", "orphaned"]
    with cli.spawn("run", config, "--json") as process:
        assert until(process.stdout, "started")["cid"] == cid + 1
        process.terminate()
        _, err = process.communicate(timeout=SECONDS)
    assert b"ended what a crashed manager left" in err
    assert f"cid={cid}".encode() in err
    assert cli.processes() == {}
    assert cli.run("list")[1] == "no VMs\n"


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b"plain [x]\r", b"plain [x]\n"),
        (b"\x1b[2J\xff", b"\\x1b[2J\\xff\n"),
        (b"\xe2\x80\xaeevil", b"\\u{202e}evil\n"),
    ],
)
def test_a_line_of_a_guest_is_escaped(line: bytes, seen: bytes) -> None:
    lines = Lines()
    assert lines.feed(line[:3]) == []
    assert "".join(lines.feed(line[3:] + b"\nrest")).encode() == seen
    assert lines.end() == ["rest\n"]
    assert lines.end() == []


def test_a_line_of_a_guest_that_never_ends_is_cut() -> None:
    lines = Lines()
    assert lines.feed(b"x" * MAX_LINE) == []
    assert [len(line) for line in lines.feed(b"x")] == [MAX_LINE + 2]
