"""What a service is doing now, for other processes of its user: read-only, by a unix socket per manager.

Whoever connects gets one JSON object, the service's supervision tree, and the end of the stream. Nothing is
read from the socket, no actor is asked and nothing is waited for, so an inspection cannot disturb what it
inspects. The sockets' directory is private; who gets in is this user or root.

A socket gets its name when it listens. So one that refuses connections was left by a manager that died.
"""

import dataclasses
import json
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from vmactor.log import get_logger
from vmactor.supervision_tree import SupervisorInfo
from vmactor.waiting import readable, writable

MOST_READERS: Final = 8
"""Inspections at a time; more wait in the socket's queue."""
ANSWER_SECONDS: Final = 5.0
"""How long a reader may take to accept the answer, and an answer to come."""
PAUSE_SECONDS: Final = 0.1
ANSWER_SIZE: Final = 64 << 20
"""Bytes that a reader accepts."""

log = get_logger()


class Inspection:
    """Answers inspections of one service; a child of its supervisor.

    Args:
        directory: Where the sockets of all managers are.
        tree: Describes the service as it is now.
    """

    def __init__(self, directory: Path, tree: Callable[[], SupervisorInfo]) -> None:
        self._directory = directory
        self._tree = tree
        self._readers = anyio.Semaphore(MOST_READERS)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Serve until cancelled. A service that cannot be inspected is told of in the log, and works."""
        name = f"{os.getpid()}-{secrets.token_hex(2)}"
        unready, path = self._directory / f".{name}", self._directory / name
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.setblocking(False)
                listener.bind(os.fspath(unready))
                listener.listen()
                unready.rename(path)
            except OSError as error:
                log.warning("nobody can inspect this service", error=str(error))
                task_status.started()
                return
            try:
                task_status.started()
                await self._serve(listener)
            finally:
                path.unlink(missing_ok=True)

    async def _serve(self, listener: socket.socket) -> None:
        async with anyio.create_task_group() as readers:
            while True:
                await self._readers.acquire()
                await readable(listener)
                try:
                    reader, _ = listener.accept()
                except BlockingIOError:
                    self._readers.release()
                except OSError:  # no descriptors: whoever inspects can wait
                    self._readers.release()
                    await anyio.sleep(PAUSE_SECONDS)
                else:
                    readers.start_soon(self._answer, reader)

    async def _answer(self, reader: socket.socket) -> None:
        try:
            reader.setblocking(False)
            told = {"pid": os.getpid(), "tree": dataclasses.asdict(self._tree())}
            rest = memoryview(json.dumps(told).encode())
            with anyio.move_on_after(ANSWER_SECONDS), suppress(OSError):  # it went away
                while rest:
                    try:
                        rest = rest[reader.send(rest) :]
                    except BlockingIOError:
                        await writable(reader)
        finally:
            reader.close()
            self._readers.release()


async def inspect(directory: Path) -> list[dict[str, Any]]:
    """Ask all managers that live; sockets of dead ones are removed.

    Args:
        directory: Where their sockets are.

    Returns:
        What each told (``pid``, ``tree``), by process number; those that told nothing in time are left out.
    """
    found = []
    for path in _sockets(directory):
        with anyio.move_on_after(ANSWER_SECONDS), suppress(ValueError, RecursionError, OSError):
            if (told := await _ask(path)) is not None:
                found.append(told)
    return sorted(found, key=lambda told: str(told.get("pid")))


def _sockets(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


async def _ask(path: Path) -> dict[str, Any] | None:
    try:
        stream = await anyio.connect_unix(path)
    except ConnectionRefusedError:
        with suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - one system call on a file system in memory
        return None
    data = bytearray()
    async with stream:
        with suppress(anyio.EndOfStream):
            while len(data) <= ANSWER_SIZE:
                data += await stream.receive()
    told = json.loads(data)
    return told if isinstance(told, dict) and isinstance(told.get("tree"), dict) else None
