"""The simulated VMM's program by itself: crosvm's command line and control socket, the script's steps."""

import re
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.simulated_peer import CID, code_of, executable, running, script
from vmactor.vmm.simulated import OPTIONS

# -- The command line ------------------------------------------------------------------------------


def test_it_knows_just_the_options_that_the_driver_believes_it_to_know() -> None:
    help_text = subprocess.run(
        [executable(), "run", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"--([a-z-]+)(?= VALUE$|$)", help_text, re.MULTILINE)) == OPTIONS


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("run --task-profiles a /dev/null", 35, "unknown option --task-profiles"),
        ("run --mem 12 --mem 13 /dev/null", 35, "--mem is given twice"),
        ("run --mem twelve /dev/null", 35, "size=twelve"),
        ("run --vsock cid=2 /dev/null", 35, "3 or more"),
        ("run --vsock cid=5,gid=5 /dev/null", 35, "key gid is unknown"),
        ("run --serial=type=teapot /dev/null", 35, "type teapot"),
        ("run --serial=type=sink,hardware=serial,num=9 /dev/null", 35, "num=9"),
        ("run --no-balloon=true /dev/null", 35, "takes no value"),
        ("run --params", 35, "needs a value"),
        ("stop somewhere", 35, "run and version"),
        ("run --mem 12", 1, "no kernel"),
        ("run /dev/null /dev/null", 1, "more than one kernel"),
        ("run /not/there", 1, "No such file"),
        ("run /proc/self/fd/99", 1, "Bad file descriptor"),
        ("run --protected-vm --protected-vm-with-firmware /dev/null /dev/null", 1, "two ways"),
        ("run --params vmactor.script=redy /dev/null", 1, "unknown step redy"),
    ],
)
def test_a_wrong_command_line_ends_it_as_it_would_end_crosvm(line: str, code: int, says: str) -> None:
    ended, complaint = code_of(*line.split())
    assert (ended, says in complaint) == (code, True), complaint


def test_without_extended_status_every_end_of_a_guest_is_0() -> None:
    for step in ("poweroff", "reboot", "crash", "panic", "watchdog"):
        assert code_of("run", "--params", f"vmactor.script={step}", "/dev/null")[0] == 0
    assert code_of("run", "--params", 'vmactor.script="exit 35"', "/dev/null")[0] == 35


# -- Steps -----------------------------------------------------------------------------------------


def test_what_a_guest_reports_comes_over_one_connection_and_is_answered_in_turn(short_dir: Path) -> None:
    steps = ("started", "ready", "error 3 no task", "finished -7", "sleep 60000")
    with running(short_dir, script(*steps)) as program, program.accept() as manager:
        assert manager.peer == program.process.pid
        assert manager.answer() == ["notifyPayloadStarted"]
        assert manager.answer(cut=2) == ["notifyPayloadReady"]
        assert manager.answer() == ["notifyError", 3, "no task"]
        assert manager.answer() == ["notifyPayloadFinished", -7]
        assert manager.call() is None  # it is kept only for as long as reports follow each other


@pytest.mark.parametrize("size", [5, 31, 32, 255, 256, 4096])
def test_a_refused_report_is_told_on_the_console_and_the_script_goes_on(short_dir: Path, size: int) -> None:
    with running(short_dir, script("ready", "started", "poweroff")) as program:
        with program.accept() as manager:
            manager.answer([-5, "x" * size, {"kind": "ILLEGAL_STATE"}], cut=7)
        with program.accept() as manager:
            assert manager.answer() == ["notifyPayloadStarted"]
        assert program.wait() == 0
        line = program.text("console")
        assert line.startswith("simulated: ready: error refused: xxxxx")
        assert len(line) > min(size, 900)


@pytest.mark.parametrize(
    "nonsense", [b"\x94\x01\x63\xc0\xc0", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 2000, b""]
)
def test_a_manager_that_talks_nonsense_harms_only_the_report(short_dir: Path, nonsense: bytes) -> None:
    with running(short_dir, script("started", "exit 32")) as program:
        with program.accept() as manager:
            manager.call()
            manager.connection.sendall(nonsense)
        assert program.wait() == 32
        assert program.text("console").startswith("simulated: started: error ")


def test_a_guest_without_a_manager_gives_its_reason_and_shuts_down(short_dir: Path) -> None:
    with running(short_dir, script("sleep 100", "started")) as program:
        (short_dir / f"vsock_{CID}").unlink()
        assert program.wait() == 0
        assert program.text("failure") == "MICRODROID_FAILED_TO_CONNECT_TO_VIRTUALIZATION_SERVICE"


def test_texts_go_where_the_steps_say(short_dir: Path) -> None:
    steps = (
        "print to  the console",
        "failure HANGUP",
        "log to the log",
        "stderr last words",
        "echo hello",
        "cid",
    )
    with running(short_dir, script(*steps)) as program:
        assert program.wait() == 0
        assert (
            program.text("console")
            == f"to  the console\nsimulated: echo: ok hello\nsimulated: cid: ok {CID}\n"
        )
        assert program.text("failure") == "HANGUP"
        assert program.text("log") == "to the log\n"
        assert program.text("stderr") == "last words\nexiting with success\n"


def test_a_console_that_nobody_reads_holds_up_its_step_and_nothing_else(short_dir: Path) -> None:
    with running(short_dir, script("spam")) as program:
        assert program.request('"ResumeVcpus"') == "Ok"
        assert len(program.reads["console"].read(1 << 20)) > 0
        assert program.request('"Exit"') == "Ok"
        assert program.wait() == 0


def test_a_signal_that_is_ignored_does_not_end_it_and_others_do(short_dir: Path) -> None:
    with running(short_dir, script("ignore 15", "print now", "hang")) as program:
        assert program.reads["console"].read(100) == b"now\n"
        program.process.send_signal(signal.SIGTERM)
        assert program.request('"ResumeVcpus"') == "Ok"
        program.process.send_signal(signal.SIGINT)
        assert program.wait() == -signal.SIGINT


@pytest.mark.parametrize("number", [6, 9, 11, 15])
def test_it_dies_by_the_signal_that_the_script_says(short_dir: Path, number: int) -> None:
    with running(short_dir, script(f"signal {number}")) as program:
        assert program.wait() == -number
    assert sorted(path.name for path in short_dir.iterdir()) == ["control", f"vsock_{CID}"]  # and no core


# -- Steps over connections ------------------------------------------------------------------------


def test_a_guest_that_serves_takes_steps_from_connections(short_dir: Path) -> None:
    with running(short_dir, script("sleep 50", "serve")) as program:
        program.request('"ResumeVcpus"')
        with program.steps() as one, program.steps() as two:
            one.sendall(b"echo a b\nnonsense\nserve\nsle")
            two.sendall(b"hang\n")
            assert one.makefile("rb").readlines(40) == [
                b"ok a b\n",
                b"error unknown step\n",
                b"error already serving\n",
            ]
            one.sendall(b"ep 10\nreboot\n")
            assert one.makefile("rb").read() == b"ok\nok\n"
        assert program.wait() == 32
        assert not (short_dir / "vsock").exists()


def test_what_is_no_connection_for_steps_is_closed(short_dir: Path) -> None:
    with running(short_dir, script("serve")) as program:
        program.request('"ResumeVcpus"')
        for greeting in (b"CONNECT 5001\n", b"HELLO\n", b"x" * 5000):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(10)
                connection.connect(str(short_dir / "vsock"))
                connection.sendall(greeting)
                with suppress(ConnectionResetError):  # it closed without having read all
                    assert connection.recv(100) == b""
        with program.steps() as connection:
            connection.sendall(b"echo still here\n")
            assert connection.recv(100) == b"ok still here\n"


# -- The control socket ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_", ['"SuspendVcpus"', ' {"SuspendVm" : null}\n', '"ResumeVm"', '"MakeRT"', '"Sleepbtn"']
)
def test_requests_are_answered_with_ok(short_dir: Path, request_: str) -> None:
    with running(short_dir, script("hang")) as program:
        assert program.request(request_) == "Ok"


@pytest.mark.parametrize(
    "request_",
    [
        '"Suspend"',
        '{"SuspendVm":{}}',
        '"Exit',
        '"Exit"x',
        b'"Exit"\0',
        "{}",
        "[1,2]",
        '{"BalloonCommand":"Statistics"}',
        '{"BalloonCommand":{"Stats":{}}}',
        '{"BalloonCommand":{"Adjust":{"num_bytes":4096}}}',
        '{"BalloonCommand":{"Adjust":{"num_bytes":-1,"wait_for_success":false}}}',
        '{"BalloonCommand":{"Adjust":{"num_bytes":4096,"wait_for_success":false}}',
        "{" * 3000,
    ],
)
def test_a_request_that_crosvm_would_not_understand_is_never_answered(
    short_dir: Path, request_: str | bytes
) -> None:
    with running(short_dir, script("hang")) as program, program.control() as connection:
        connection.send(request_ if isinstance(request_, bytes) else request_.encode())
        connection.send(b'"VcpuPidTid"')  # the first reply is the second request's, and the only one
        assert connection.recv(100).startswith(b'{"VcpuPidTidResponse":')
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(100)


def test_the_balloon_takes_what_it_is_told_to_and_tells_it(short_dir: Path) -> None:
    with running(short_dir, script("hang")) as program:
        adjust = (
            '{"BalloonCommand":{"Adjust":{"future":[1,{"a":"}"}],"num_bytes":%d,"wait_for_success":false}}}'
        )
        assert program.request(adjust % ((16 << 20) + 5)) == "Ok"
        stats = program.request('{"BalloonCommand":"Stats"}')["BalloonStats"]
        assert stats["balloon_actual"] == 16 << 20
        assert stats["stats"]["total_memory"] == 64 << 20
        assert len(stats["stats"]) == 12


@pytest.mark.parametrize(
    ("more", "step", "error"), [("--no-balloon", "hang", 95), ("--no-usb", "balloon inactive;hang", 107)]
)
def test_without_a_balloon_or_its_driver_requests_are_refused(
    short_dir: Path, more: str, step: str, error: int
) -> None:
    with running(short_dir, script(step), more) as program:
        assert program.request('{"BalloonCommand":"Stats"}') == {"Err": error}


def test_a_suspended_guest_does_nothing_until_it_is_resumed(short_dir: Path) -> None:
    with running(short_dir, script("ready"), "--suspended") as program:
        assert program.request('"SuspendVm"') == "Ok"
        program.listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            program.accept()
        program.listener.settimeout(10)
        assert program.request('"ResumeVm"') == "Ok"
        with program.accept() as manager:
            assert manager.answer() == ["notifyPayloadReady"]
        assert program.wait() == 0


def test_the_power_button_shuts_a_guest_down_unless_it_is_deaf(short_dir: Path) -> None:
    with running(short_dir, script("deaf", "serve")) as program:
        assert program.request('"Powerbtn"') == "Ok"
        assert program.request('"Exit"') == "Ok"
        assert program.wait() == 0
    (short_dir / "b").mkdir()
    with running(short_dir / "b", script("hang")) as program:
        assert program.request('"Powerbtn"') == "Ok"
        assert program.wait() == 0


def test_the_script_makes_the_control_socket_silent_slow_refusing_garbled_or_closed(short_dir: Path) -> None:
    with running(short_dir, script("control refuse 5", "serve")) as program:
        assert program.request('"SuspendVm"') == {"Err": 5}
        with program.steps() as steps:

            def now(mood: str) -> None:
                steps.sendall(f"control {mood}\n".encode())
                assert steps.recv(100) == b"ok\n"

            now("garble")
            with pytest.raises(ValueError, match="delimiter"):
                program.request('"SuspendVm"')
            now("close")
            assert program.request('"SuspendVm"') is None
            now("answer")
            with program.control() as connection:
                connection.send(b'"MakeRT"')  # answered, so the connection is known to be accepted
                assert connection.recv(100) == b'"Ok"'
                now("silent")
                connection.send(b'"Exit"')
                now("slow 20")
                connection.send(b'"MakeRT"')
                assert connection.recv(100) == b'"Ok"'
                now("slow 60000")
                connection.send(b'"MakeRT"')
                now("answer")
                now("answer")  # the request was there before these two, and is still not answered
                connection.setblocking(False)
                with pytest.raises(BlockingIOError):
                    connection.recv(100)
            assert program.request('"ResumeVm"') == "Ok"
            steps.sendall(b"control moody\n")
            assert steps.recv(200).startswith(b"error control takes")


def test_any_number_of_connections_to_the_control_socket_is_served_in_turn(short_dir: Path) -> None:
    with running(short_dir, script("hang")) as program, ExitStack() as stack:
        held = [stack.enter_context(program.control()) for _ in range(12)]
        for connection in held[:8]:
            connection.send(b'"MakeRT"')
            assert connection.recv(100) == b'"Ok"'
            connection.close()
        for connection in held[8:]:
            connection.send(b'"MakeRT"')
            assert connection.recv(100) == b'"Ok"'
            connection.close()
        assert program.request('"Exit"') == "Ok"


def test_it_costs_little_memory_of_its_own(short_dir: Path) -> None:
    with running(short_dir, script("print here", "serve")) as program:
        assert program.reads["console"].read(100) == b"here\n"
        assert program.request('"ResumeVcpus"') == "Ok"
        rollup = Path(f"/proc/{program.process.pid}/smaps_rollup").read_text()
        anonymous = int(re.search(r"^Anonymous: *(\d+) kB", rollup, re.MULTILINE)[1])  # type: ignore[index]
        assert anonymous < 256  # KiB; what it has of its file is shared with all its like
