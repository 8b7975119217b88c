"""A bare user of the simulated VMM's executable: its command line, its sockets and pipes, by hand."""

import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import msgpack
import pytest

from vmactor.host import probe

CID = 77
LIMIT = 10.0


def executable() -> Path:
    """The built program."""
    found = probe().simulated.path
    if found is None:
        pytest.fail("the simulated VMM is not built: run 'make setup'")
    return found


def script(*steps: str) -> str:
    """The kernel parameter with a script."""
    return f'quiet vmactor.script="{";".join(steps)}" panic=-1'


class Program:
    """One process, with all that crosvm would get."""

    def __init__(self, stack: ExitStack, directory: Path, params: str, *more: str) -> None:
        self.directory = directory
        self.listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.listener.settimeout(LIMIT)
        self.listener.bind(str(directory / f"vsock_{CID}"))
        self.listener.listen(8)
        directory_fd = os.open(directory, os.O_RDONLY)
        pipes = {name: os.pipe() for name in ("console", "failure", "log", "stderr")}
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.bind(str(directory / "control"))
        control.listen(128)
        self.reads = {name: stack.enter_context(os.fdopen(ends[0], "rb", 0)) for name, ends in pipes.items()}
        writes = {name: ends[1] for name, ends in pipes.items()}
        given = [directory_fd, control.fileno(), *writes.values()]
        serial = "--serial=type=file,path=/proc/self/fd/{},hardware={},num={}"
        self.process = subprocess.Popen(
            [
                *(executable(), "--extended-status", "--log-level", "info", "run", "--disable-sandbox"),
                *("--vsock", f"cid={CID},device=/proc/self/fd/{directory_fd}", "--mem", "64"),
                serial.format(writes["console"], "virtio-console", 1),
                serial.format(writes["failure"], "serial", 2),
                serial.format(writes["log"], "virtio-console", 3),
                *("--params", params, "--socket", f"/proc/self/fd/{control.fileno()}", *more, "/dev/null"),
            ],
            pass_fds=given,
            stderr=writes["stderr"],
            stdin=subprocess.DEVNULL,
        )
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        control.close()
        os.close(directory_fd)
        for fd in writes.values():
            os.close(fd)

    def accept(self) -> "Manager":
        """The next connection of the guest."""
        connection, _ = self.listener.accept()
        connection.settimeout(LIMIT)
        return Manager(connection)

    def request(self, text: str | bytes, *, timeout: float = LIMIT) -> Any:
        """One request on a connection of its own; the reply, or None if the connection was closed."""
        with self.control() as connection:
            connection.settimeout(timeout)
            connection.send(text if isinstance(text, bytes) else text.encode())
            reply = connection.recv(65536)
        return json.loads(reply) if reply else None

    def control(self) -> socket.socket:
        """A connection to the control socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(LIMIT)
        connection.connect(str(self.directory / "control"))
        return connection

    def steps(self) -> socket.socket:
        """A connection to the guest's port of steps."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(LIMIT)
        connection.connect(str(self.directory / "vsock"))
        connection.sendall(b"CONNECT 5000\n")
        assert connection.recv(100).startswith(b"OK ")
        return connection

    def wait(self) -> int:
        """The exit code, or minus the signal."""
        return self.process.wait(LIMIT)

    def text(self, name: str) -> str:
        """All that came out of one of the pipes."""
        return self.reads[name].read().decode()


class Manager:
    """The manager's end of a connection of the guest."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._unpacker = msgpack.Unpacker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def call(self) -> list[Any] | None:
        """The next request; None at the end of the stream."""
        while True:
            for message in self._unpacker:
                assert isinstance(message, list)
                return message
            data = self.connection.recv(65536)
            if not data:
                return None
            self._unpacker.feed(data)

    def answer(self, error: Any = None, *, cut: int | None = None) -> list[Any]:
        """Answer the next request and return its method and parameters."""
        request = self.call()
        assert request is not None
        data = msgpack.packb([1, request[1], error, None])
        for piece in (data[:cut], data[cut:]) if cut else (data,):
            self.connection.sendall(piece)
        return [request[2], *request[3]]

    @property
    def peer(self) -> int:
        """The process at the other end."""
        size = struct.calcsize("3i")
        pid: int = struct.unpack(
            "3i", self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )[0]
        return pid


@contextmanager
def running(directory: Path, params: str, *more: str) -> Iterator[Program]:
    """Start the program; end it at the end of the block."""
    with ExitStack() as stack:
        yield Program(stack, directory, params, *more)


def code_of(*args: str) -> tuple[int, str]:
    """Run it to its end; its exit code and what it complained."""
    done = subprocess.run([executable(), *args], capture_output=True, text=True, timeout=LIMIT, check=False)
    return done.returncode, done.stderr
