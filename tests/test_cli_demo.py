"""``vmactor demo`` and the commands beside it, with a real guest."""

import os
import pty
import signal
import socket
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest

from tests.cli_process import SECONDS, Cli, cli, rows, until, write_config
from vmactor.cli import demo
from vmactor.cli.demo import GUEST_PORT, summary
from vmactor.errors import IllegalStateError
from vmactor.messages import Created, DeathReason, Died, PayloadFinished, PayloadStarted, Started
from vmactor.vsock import VsockStream

__all__ = ["cli"]

LIFE = [
    "created",
    "started",
    "payload_started",
    "payload_ready",
    "vsock_message",
    "vsock_message",
    "payload_finished",
    "died",
]


@pytest.mark.guest
def test_the_demo_shows_a_whole_life_as_event_lines(cli: Cli, guest_dir: Path) -> None:
    code, out, err = cli.run("demo", "--json", "--guest", guest_dir)
    events = rows(out)
    assert (code, err) == (0, "")
    assert [event["event"] for event in events] == LIFE
    assert [event["seq"] for event in events] == list(range(1, 9))
    assert [event["direction"] for event in events[4:6]] == ["host_to_guest", "guest_to_host"]
    assert events[4]["text"].startswith("uname (answer: Linux ")
    assert events[5]["text"] == "hello from the guest (answer: hello from the host)"
    assert {(event["cid"], event["name"], event["driver"]) for event in events} == {(2048, "demo", "qemu")}
    assert (events[6]["exit_code"], events[7]["reason"]) == (0, "SHUTDOWN")


@pytest.mark.guest
def test_a_person_at_a_terminal_sees_a_story(cli: Cli, guest_dir: Path) -> None:
    ours, theirs = pty.openpty()
    environ = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environ |= {"TERM": "xterm", "COLUMNS": "100", "VMACTOR_GUEST": str(guest_dir)}
    with cli.spawn("demo", stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        text = ""
        try:
            while data := os.read(ours, 65536):
                text += data.decode()
        except OSError:  # how a terminal's end looks from this side
            pass
        assert process.wait(SECONDS) == 0
    os.close(ours)
    assert "the guest boots" in text  # progress
    places = [text.index(f"{kind:<16}") for kind in LIFE]
    assert places == sorted(places)
    assert "\x1b[32m" in text
    assert "why the VM died" in text


def test_a_missing_guest_says_how_to_get_it(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli.run("demo", "--guest", tmp_path)
    assert (code, out) == (1, "")
    assert err == (
        f"vmactor: error: there is no guest in {tmp_path}: run 'make guest' in the source checkout, or name "
        "the directory with --guest\n"
    )


@pytest.mark.guest
def test_a_vm_of_another_process_is_listed_and_reached(cli: Cli, guest_dir: Path, tmp_path: Path) -> None:
    with cli.spawn("run", guest_dir / "vm.json", "--json") as process:
        cid = str(until(process.stdout, "payload_ready")["cid"])

        (listed,) = rows(cli.run("list", "--json")[1])
        assert (str(listed["cid"]), listed["state"], listed["alive"]) == (cid, "READY", True)
        assert listed["requester_pid"] == process.pid

        with cli.spawn("connect", cid, str(GUEST_PORT), "--quit-after", "0", stdin=PIPE) as talk:
            assert talk.stdin is not None
            assert talk.stdout is not None
            talk.stdin.write(b"uname\ncid\n")
            assert talk.stdout.readline().startswith(b"ok Linux ")
            assert talk.stdout.readline() == f"ok {cid}\n".encode()
            talk.stdin.close()
            assert talk.wait(SECONDS) == 0

        code, _, err = cli.run("connect", cid, "5999")
        assert code == 1
        assert "likely nothing listens on that port" in err

        # No more than the helper has room for: its flow control can stall when both directions are full.
        (tmp_path / "given").write_bytes(b"stream\n" + (sent := os.urandom(48 << 10)))
        with (
            (tmp_path / "given").open("rb") as given,
            cli.spawn("connect", cid, str(GUEST_PORT), stdin=given, bufsize=-1) as stream,
        ):
            assert stream.stdout is not None
            assert stream.stdout.read(len(sent) + 3) == b"ok\n" + sent
            stream.send_signal(signal.SIGINT)  # the guest cannot know that nothing more will come
            assert stream.wait(SECONDS) == 130

        code, out, err = cli.run("connect", cid, str(GUEST_PORT), given=b"finished 0\npoweroff\n")
        assert out == "ok\nok\n"
        rest, err_bytes = process.communicate(timeout=SECONDS)
    assert (process.returncode, err_bytes) == (0, b"")
    assert [row["event"] for row in rows(rest.decode())] == ["payload_finished", "died"]


@pytest.mark.guest
def test_a_guest_that_ends_in_the_middle_of_the_story_ends_the_story(
    cli: Cli, guest_dir: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, guest_dir, "started;ready;sleep 200")
    code, out, err = cli.run("demo", "--json", "--guest", tmp_path)
    assert (code, rows(out)[-1]["event"], err) == (12, "died", "")


def converse(say: bytes) -> str:
    """The answer to a step from a guest that says this."""

    async def receive() -> str:
        ours, theirs = socket.socketpair()
        theirs.sendall(say)
        theirs.close()
        async with VsockStream(ours, cid=2048, port=5000, half_close=False) as stream:
            return demo._answer(await demo._Lines(stream).receive())

    return anyio.run(receive)


def test_an_answer_is_what_stands_behind_ok() -> None:
    assert converse(b"ok Linux 6.1\nmore") == "Linux 6.1"
    assert converse(b"ok\n") == ""


@pytest.mark.parametrize(
    ("say", "error"),
    [
        (b"error unknown step\n", "the guest refused a step: error unknown step"),
        (b"ok" * 5000, "the guest sent a line of more than 4096 bytes"),
    ],
)
def test_an_answer_that_is_none_is_an_error(say: bytes, error: str) -> None:
    with pytest.raises(IllegalStateError, match=error):
        converse(say)


def test_the_summary_tells_only_what_happened() -> None:
    assert summary([Created(monotonic=1.0)]) == []
    whole = [
        Created(monotonic=1.0),
        Started(monotonic=1.5),
        PayloadStarted(monotonic=3.0),
        PayloadFinished(exit_code=3),
        Died(monotonic=5.0, reason=DeathReason.CRASH),
    ]
    assert summary(whole) == [
        ("created until the VMM ran", "0.500 s"),
        ("the VMM ran until the payload started", "1.500 s"),
        ("exit code of the payload", "3"),
        ("why the VM died", "CRASH"),
        ("created until nothing was left", "4.000 s"),
    ]
