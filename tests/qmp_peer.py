"""A scripted QEMU for tests: the other end of a control socket, one message at a time."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import ByteStream

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": ["oob"]}}


class QmpPeer:
    """Says and hears whole QMP messages; ``stream`` is there for saying anything else."""

    def __init__(self, stream: ByteStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def say(self, *messages: Any) -> None:
        await self.stream.send(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    async def event(self, name: str, **data: Any) -> None:
        await self.say({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._buffer += await self.stream.receive()
        line, _, self._buffer = self._buffer.partition(b"\n")
        request: dict[str, Any] = json.loads(line)
        return request

    async def expect(self, command: str, answer: Any = None) -> dict[str, Any]:
        """Hear one request, which must be ``command``, and answer it; returns its arguments."""
        request = await self.hear()
        assert request["execute"] == command
        await self.say({"return": {} if answer is None else answer, "id": request["id"]})
        arguments: dict[str, Any] = request.get("arguments", {})
        return arguments

    async def greet(self) -> None:
        await self.say(GREETING)
        await self.expect("qmp_capabilities")


@asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[tuple[ByteStream, QmpPeer]]:
    """A client's stream and the peer at its other end."""
    listener = await anyio.create_unix_listener(directory / "qmp")
    async with listener:
        client = await anyio.connect_unix(directory / "qmp")
        async with client, await listener.accept() as server:
            yield client, QmpPeer(server)
