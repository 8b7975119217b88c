"""Help for tests of the daemon: one in this process, and clients of it."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import anyio
import msgpack

from tests.simulated_peer import script
from vmactor import Policy, StopLadder, VirtualizationService
from vmactor.daemon.listening import listening
from vmactor.daemon.server import Server
from vmactor.daemon.users import Quotas
from vmactor.protocol import errors
from vmactor.rpc.connection import Connection
from vmactor.rpc.files import Attached
from vmactor.rpc.framing import CLIENT

SECONDS = 30
"""Far more than anything takes; a test that reaches it has failed."""


@dataclass
class Daemon:
    """A server that runs in the test's loop."""

    path: Path
    server: Server
    service: VirtualizationService


@asynccontextmanager
async def daemon(
    directory: Path, *, quotas: Quotas | None = None, policy: Policy | None = None, vmm: str = "simulated"
) -> AsyncIterator[Daemon]:
    """Serve below a directory; at the end all VMs are gone."""
    service = VirtualizationService(vmm=vmm, state_directory=directory / "state", policy=policy, keeps=True)
    with listening(directory / "socket") as listener:
        async with service:
            server = Server(service, quotas)
            async with anyio.create_task_group() as tasks:
                await tasks.start(server.serve, [listener])
                yield Daemon(directory / "socket", server, service)
                tasks.cancel_scope.cancel()
            await service.shutdown_vms(StopLadder(power_button=None, exit_request=None))  # kept ones, too


class Client:
    """A client by our own connection, in the test's loop.

    Attributes:
        told: What was notified, as method and parameters.
    """

    def __init__(self, connection: Connection, told: Any) -> None:
        self.connection = connection
        self.told = told

    async def __call__(self, method: str, *params: Any) -> Any:
        """Call a method; raises what was answered."""
        with anyio.fail_after(SECONDS):
            return await self.connection.call(method, *params)

    async def event(self, kind: str) -> dict[str, Any]:
        """The next event of a kind."""
        with anyio.fail_after(SECONDS):
            while True:
                method, params = await self.told.receive()
                if method == "event" and params[1]["event"] == kind:
                    return params[1]  # type: ignore[no-any-return]

    async def create(self, directory: Path, *steps: str, **options: Any) -> dict[str, Any]:
        """Create a simulated VM that plays a script."""
        with (directory / "kernel").open("w+b") as kernel:
            config = {"name": "sim", "kernel": Attached(kernel.fileno()), "params": script(*steps)}
            return await self("createVm", {"rawConfig": config}, options)  # type: ignore[no-any-return]


class _Peer:
    def __init__(self, tell: Any) -> None:
        self._tell = tell

    def request(self, method: str, params: list[Any]) -> Any:
        raise AssertionError(f"the service asked for {method}")

    def notification(self, method: str, params: list[Any]) -> None:
        self._tell.send_nowait((method, params))

    def describe(self, error: Exception) -> list[Any]:
        return errors.to_wire(error)

    def revive(self, error: Any) -> Exception:
        return errors.from_wire(error)


@asynccontextmanager
async def client(path: Path) -> AsyncIterator[Client]:
    """Connect; at the end the connection is closed."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.setblocking(False)
    tell, told = anyio.create_memory_object_stream[Any](10_000)
    connection = Connection(sock, _Peer(tell), CLIENT)
    with tell, told:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.run)
            try:
                yield Client(connection, told)
            finally:
                connection.close()


class RawClient:
    """A client by nothing but a socket; to be used in a thread of its own, or with ``ask``."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(path))
        self._unpacker = msgpack.Unpacker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, *message: Any) -> None:
        """Send a message."""
        self.sock.sendall(msgpack.packb(message))

    def receive(self) -> Any:
        """The next message; None at the end of the stream."""
        while True:
            for message in self._unpacker:
                return message
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:  # something that we sent was not read any more
                return None
            if not data:
                return None
            self._unpacker.feed(data)

    def ask(self, *message: Any) -> Any:
        """Send a message, and give the next that comes."""
        self.send(*message)
        return self.receive()
