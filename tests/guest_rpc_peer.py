"""A guest RPC server on a unix socket, a VM that only knows payload states, and a guest to talk to it."""

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import msgpack
from anyio.abc import ByteStream

from vmactor.actors.guest_binder import GuestBinder
from vmactor.actors.guest_connection import GuestRpcLimits, GuestRpcStatistics, Report
from vmactor.actors.guest_rpc import serve_guest_rpc
from vmactor.errors import InvalidPayloadTransitionError
from vmactor.messages import (
    GuestReport,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
    PayloadState,
)

CID = 2051


class UnixStream(ByteStream):
    """A raw non-blocking socket: what was sent is with the kernel when ``send`` returns."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        while True:
            try:
                data = self.sock.recv(max_bytes)
            except BlockingIOError:
                await anyio.wait_readable(self.sock)
            except ConnectionError as error:
                raise anyio.BrokenResourceError from error
            else:
                if not data:
                    raise anyio.EndOfStream
                return data

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        while item:
            try:
                item = item[self.sock.send(item) :]
            except BlockingIOError:
                await anyio.wait_writable(self.sock)
            except ConnectionError as error:
                raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        self.sock.close()
        await anyio.lowlevel.checkpoint()


class UnixListener:
    """Accepts ``UnixStream`` objects."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.setblocking(False)
        self._sock.bind(str(path))
        self._sock.listen(4096)  # a guest that dials faster than it is admitted must not block the test

    async def accept(self) -> UnixStream:
        await anyio.lowlevel.checkpoint()
        while True:
            if self._sock.fileno() < 0:
                raise anyio.ClosedResourceError
            try:
                return UnixStream(self._sock.accept()[0])
            except BlockingIOError:
                await anyio.wait_readable(self._sock)

    async def aclose(self) -> None:
        anyio.notify_closing(self._sock)
        self._sock.close()


@dataclass
class Vm:
    """Remembers reports and lets the payload state only move forward."""

    state: PayloadState = PayloadState.STARTING
    reports: list[GuestReport] = field(default_factory=list)

    async def report(self, report: GuestReport) -> None:
        match report:
            case NotifyPayloadStarted():
                new = PayloadState.STARTED
            case NotifyPayloadReady():
                new = PayloadState.READY
            case NotifyPayloadFinished() | NotifyError():
                new = PayloadState.FINISHED
        await anyio.lowlevel.checkpoint()
        if new <= self.state:
            old = self.state.name.capitalize()
            raise InvalidPayloadTransitionError(
                f"Invalid payload state transition from {old} to {new.name.capitalize()}"
            )
        self.state = new
        self.reports.append(report)


class Guest:
    """The guest's end of a connection."""

    def __init__(self, path: Path) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        self.stream = UnixStream(sock)
        self._unpacker = msgpack.Unpacker(read_size=4096)
        self._msgid = 0

    async def send(self, *messages: Any) -> None:
        await self.send_raw(b"".join(msgpack.packb(message) for message in messages))

    async def send_raw(self, data: bytes) -> None:
        await self.stream.send(data)

    async def answer(self, within: float = 20) -> Any:
        """The next answer; fails the test if none comes."""
        with anyio.fail_after(within):
            while True:
                with contextlib.suppress(msgpack.OutOfData):
                    return self._unpacker.unpack()
                self._unpacker.feed(await self.stream.receive())

    async def call(self, method: str | bytes, *params: Any) -> Any:
        """Ask and return the error of the answer: None, or ``[code, message, data]``."""
        self._msgid += 1
        await self.send([0, self._msgid, method, list(params)])
        kind, msgid, error, result = await self.answer()
        assert (kind, msgid, result) == (1, self._msgid, None)
        return error

    async def closed(self, within: float = 20) -> bytes:
        """Wait for the server to close, and return what else it said."""
        rest = b""
        with anyio.fail_after(within), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                rest += await self.stream.receive()
        return rest


class Server:
    """A running server and a way to dial it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = UnixListener(path)
        self.statistics = GuestRpcStatistics()
        self._guests = contextlib.ExitStack()

    def guest(self) -> Guest:
        """A new connection, closed at the end of the test."""
        guest = Guest(self.path)
        self._guests.callback(guest.stream.sock.close)
        return guest

    async def until_open(self, count: int) -> None:
        """Wait until the server has this many connections."""
        with anyio.fail_after(20):
            while self.statistics.open != count:
                await anyio.sleep(0.001)

    @contextlib.asynccontextmanager
    async def running(
        self, report: Report, limits: GuestRpcLimits | None = None, binder: GuestBinder | None = None
    ) -> AsyncIterator["Server"]:
        async def run() -> None:
            await serve_guest_rpc(
                self.listener, report, cid=CID, limits=limits, statistics=self.statistics, binder=binder
            )
            raise AssertionError("the server ended by itself")

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                yield self
                tasks.cancel_scope.cancel()
        finally:
            self._guests.close()
            with anyio.CancelScope(shield=True):
                await self.listener.aclose()
