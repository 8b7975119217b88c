"""``vmactor connect``: bytes both ways at once, and when it ends; against a stand-in for the vsock helper."""

import os
import pty
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import anyio
import pytest

from tests.cli_process import SECONDS, Cli, cli
from vmactor.cli.connect import join, transport_of
from vmactor.cli.stdio import Reader, Writer
from vmactor.errors import UnsupportedOperationError
from vmactor.state_dir import StateDirectory
from vmactor.vsock import HybridVsockTransport, KernelVsockTransport, VsockStream

__all__ = ["cli"]

CID, PORT = 2051, 5000
BIG = bytes(range(256)) * 32768
"""8 MiB: more than all the buffers on the way hold."""


@contextmanager
def guest(state_dir: Path, behave: Callable[[socket.socket], None], **record: object) -> Iterator[None]:
    """A VM's record, and a helper that lets one connection through to a guest that behaves so."""
    with StateDirectory(state_dir) as state, socket.socket(socket.AF_UNIX) as listener:
        directory, _ = state.make_vm_directory(CID)
        state.write_record(CID, {"cid": CID, "name": "web-3", "vsock": "hybrid"} | record)
        listener.bind(str(directory / "vsock"))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(100) == b"CONNECT %d\n" % PORT
                    connection.sendall(b"OK 1234\n")
                    behave(connection)

        thread = threading.Thread(target=serve, name="guest")
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)
            state.remove_vm_directory(CID)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def answer_line(connection: socket.socket) -> None:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(65536)
    connection.sendall(b"ok " + line)


def test_a_guest_that_closes_ends_it_with_0_while_input_is_still_open(cli: Cli) -> None:
    with (
        guest(cli.state_dir, answer_line),
        cli.spawn("connect", str(CID), str(PORT), stdin=PIPE) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(b"uname\n")
        assert process.wait(SECONDS) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b"ok uname\n"


def test_megabytes_go_both_ways_at_once_through_pipes(cli: Cli) -> None:
    def behave(connection: socket.socket) -> None:
        left = len(BIG)
        while left:
            data = connection.recv(min(65536, left))
            left -= len(data)
            connection.sendall(data)

    with guest(cli.state_dir, behave), cli.spawn("connect", str(CID), str(PORT), stdin=PIPE) as process:
        out, err = process.communicate(BIG, timeout=SECONDS)
    assert (process.returncode, out == BIG, err) == (0, True, b"")


def test_input_and_output_may_be_files(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(BIG)

    def behave(connection: socket.socket) -> None:
        left = len(BIG)
        while left:
            data = connection.recv(min(65536, left))
            left -= len(data)
            connection.sendall(data)

    with (
        guest(cli.state_dir, behave),
        (tmp_path / "in").open("rb") as given,
        (tmp_path / "out").open("wb") as out,
    ):
        code, _, err = cli.run("connect", str(CID), str(PORT), stdin=given, stdout=out)
    assert (code, err) == (0, "")
    assert (tmp_path / "out").read_bytes() == BIG


def test_after_the_end_of_input_it_waits_until_the_guest_closes(cli: Cli) -> None:
    more = threading.Event()

    def behave(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"first ")
        more.wait(SECONDS)
        connection.sendall(b"last")

    with guest(cli.state_dir, behave), cli.spawn("connect", str(CID), str(PORT), stdin=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stdout.read(6) == b"first "
        more.set()
        assert process.stdout.read() == b"last"
        assert process.wait(SECONDS) == 0


def test_quit_after_ends_it_once_input_has_ended_and_the_guest_is_silent(cli: Cli) -> None:
    with guest(cli.state_dir, echo):
        code, out, err = cli.run("connect", str(CID), str(PORT), "--quit-after", "0.5", given=b"hello")
    assert (code, out, err) == (0, "hello", "")


def test_a_connection_that_breaks_is_status_1(cli: Cli) -> None:
    def behave(connection: socket.socket) -> None:
        connection.recv(1)  # the rest stays unread, so that closing resets the connection

    with guest(cli.state_dir, behave), cli.spawn("connect", str(CID), str(PORT), stdin=PIPE) as process:
        out, err = process.communicate(b"unread", timeout=SECONDS)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"vmactor: error: the connection broke")
    assert err.count(b"\n") == 1


def test_ctrl_c_ends_it_with_130(cli: Cli) -> None:
    connected = threading.Event()

    def behave(connection: socket.socket) -> None:
        connected.set()
        connection.recv(1)

    with guest(cli.state_dir, behave), cli.spawn("connect", str(CID), str(PORT), stdin=PIPE) as process:
        assert connected.wait(SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130


def test_a_reader_that_goes_ends_it_with_141(cli: Cli) -> None:
    with (
        guest(cli.state_dir, lambda connection: connection.sendall(BIG)),
        cli.spawn("connect", str(CID), str(PORT), stdin=PIPE) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(10) == BIG[:10]
        process.stdout.close()
        assert process.wait(SECONDS) == 141
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_person_at_a_terminal_can_talk_and_end_by_ctrl_d(cli: Cli) -> None:
    ours, theirs = pty.openpty()
    try:
        with (
            guest(cli.state_dir, echo),
            cli.spawn("connect", str(CID), str(PORT), "--quit-after", "0", stdin=theirs) as process,
        ):
            os.write(ours, b"hello\n")
            assert process.stdout is not None
            assert process.stdout.read(6) == b"hello\n"
            os.write(ours, b"\x04")
            assert process.wait(SECONDS) == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_an_unknown_vm_is_status_1_and_says_where_to_look(cli: Cli) -> None:
    code, out, err = cli.run("connect", "4000", "5000")
    assert (code, out) == (1, "")
    assert err == (
        f"vmactor: error: no VM has CID 4000 in {cli.state_dir}; 'vmactor list' shows those that there are\n"
    )


def test_a_privileged_port_is_status_1(cli: Cli) -> None:
    with guest(cli.state_dir, echo):
        code, _, err = cli.run("connect", str(CID), "1023")
    assert code == 1
    assert err.startswith("vmactor: error: Can't connect to privileged port 1023")


def test_an_orphan_that_does_not_answer_is_called_one(cli: Cli) -> None:
    with StateDirectory(cli.state_dir) as state:
        state.make_vm_directory(CID)
        state.write_record(CID, {"cid": CID, "vsock": "hybrid"})
        code, _, err = cli.run("connect", str(CID), str(PORT))
        state.remove_vm_directory(CID)
    assert code == 1
    assert "the manager of this VM is gone" in err


def test_where_the_transport_can_the_end_of_input_is_passed_on() -> None:
    async def talk() -> bytes:
        ours, theirs = socket.socketpair()
        given, put = os.pipe()
        out, sink = os.pipe()
        os.write(put, b"question")
        os.close(put)

        async def answer() -> None:
            async with VsockStream(theirs, cid=CID, port=PORT, half_close=True) as guest_side:
                asked = b"".join([part async for part in guest_side])  # until the end that was passed on
                await guest_side.send(asked.upper())

        async with (
            anyio.create_task_group() as tasks,
            VsockStream(ours, cid=CID, port=PORT, half_close=True) as stream,
        ):
            tasks.start_soon(answer)
            await join(stream, Reader(given), Writer(sink), quit_after=None)
        os.close(sink)
        os.close(given)
        with os.fdopen(out, "rb") as got:
            return got.read()

    assert anyio.run(talk) == b"QUESTION"


def test_the_record_decides_the_transport() -> None:
    there = Path("/tmp/vm")
    assert isinstance(transport_of({"cid": CID, "vsock": "kernel"}, there), KernelVsockTransport)
    assert isinstance(transport_of({"cid": CID, "vsock": "hybrid"}, there), HybridVsockTransport)
    for other in ({}, {"vsock": "pigeon"}):
        with pytest.raises(UnsupportedOperationError):
            transport_of({"cid": CID} | other, there)
