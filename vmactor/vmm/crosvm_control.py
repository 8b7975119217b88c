"""A client of crosvm's control socket: one JSON request in a packet, one JSON reply in another.

Each request has a connection of its own, as crosvm's own client does it: replies carry no number, so on a
shared connection a late one could be taken for another's. A request that crosvm does not understand is never
answered, and one sent before its virtual CPUs exist waits until they do; so everything has a deadline.

The peer is not trusted: replies are bounded, and whatever is no reply is an error. Owns no task.

Source: crosvm's ``vm_control``, as of 2023-02 and 2026-08.
"""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import anyio

from vmactor.errors import DeadlineExceededError, ResourceExhaustedError, VmmError
from vmactor.text import escape
from vmactor.waiting import readable

REQUEST_TIMEOUT: Final = 5.0
"""How long crosvm may take to answer a request, in seconds."""
MAX_REPLY: Final = 1 << 16
"""Longest reply accepted, in bytes; those to our requests stay below 2000."""

Json = dict[str, Any]


class CrosvmError(VmmError):
    """crosvm refused a request. The VM lives on.

    Attributes:
        errno: crosvm's error number; 0 where it gave a text instead.
    """

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class CrosvmControl:
    """crosvm's control socket, for any number of requests at the same time; released by ``close``."""

    def __init__(self, path: Path) -> None:
        """Take note of the socket; nothing is connected before the first request.

        Args:
            path: The socket; whose it is, is the caller's affair.
        """
        self._path = os.fspath(path)
        self._asking = anyio.Lock()
        self._unanswered: socket.socket | None = None

    def close(self) -> None:
        """Give up what is still unanswered. Idempotent."""
        if (connection := self._unanswered) is not None:
            self._unanswered = None
            anyio.notify_closing(connection)
            connection.close()

    async def command(self, request: str | Json, *, timeout: float = REQUEST_TIMEOUT) -> None:
        """Make a request whose answer is plain success.

        Args:
            request: The request, as crosvm spells it.
            timeout: Seconds.

        Raises:
            CrosvmError: crosvm refused.
            VmmError: It has closed its socket, left too many connections waiting, or answered nonsense.
            ResourceExhaustedError: We have no descriptor left for a connection.
            DeadlineExceededError: No answer in time; the command may or may not be carried out later.
        """
        with anyio.move_on_after(timeout):
            with self._connect() as connection:
                _send(connection, request)
                await _readable(connection)
                reply = _read(connection, _name(request))
            if reply != "Ok":
                raise _nonsense(_name(request))
            return
        raise _late(_name(request), timeout)

    async def ask(self, request: Json, answer: str, *, timeout: float = REQUEST_TIMEOUT) -> Json:
        """Make a request that the guest has a share in answering; one at a time.

        A guest may leave it unanswered for ever, and some builds of crosvm come to a standstill when many
        such requests wait. So one that was given up keeps its connection, and the next waits for its answer
        first and drops it, which is of no use any more.

        Args:
            request: The request, as crosvm spells it.
            answer: The name of the expected reply.
            timeout: Seconds.

        Raises:
            CrosvmError: crosvm refused.
            VmmError: As ``command``.
            DeadlineExceededError: No answer in time.
        """
        with anyio.move_on_after(timeout):
            async with self._asking:
                if self._unanswered is not None:
                    await _readable(self._unanswered)
                    with suppress(OSError):  # read, so that crosvm does not see its answer refused
                        self._unanswered.recv(MAX_REPLY)
                    self.close()
                self._unanswered = connection = self._connect()
                _send(connection, request)
                await _readable(connection)
                self._unanswered = None
                with connection:
                    reply = _read(connection, _name(request))
            if isinstance(reply, dict) and isinstance(found := reply.get(answer), dict):
                return found
            raise _nonsense(_name(request))
        raise _late(_name(request), timeout)

    def _connect(self) -> socket.socket:
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ResourceExhaustedError(
                f"no connection to crosvm's control socket: {error.strerror}; raise 'ulimit -n'"
            ) from error
        try:
            connection.setblocking(False)
            connection.connect(self._path)
        except BlockingIOError:
            connection.close()
            raise VmmError(
                "crosvm has left its control socket's queue full of connections; it is stuck: stop the VM"
            ) from None
        except OSError as error:
            connection.close()
            raise VmmError(f"no connection to crosvm's control socket: {error.strerror}") from error
        return connection


def _name(request: str | Json) -> str:
    return request if isinstance(request, str) else next(iter(request))


def _send(connection: socket.socket, request: str | Json) -> None:
    try:
        # A fresh connection has room for it, so this does not block.
        connection.send(json.dumps(request, separators=(",", ":")).encode())
    except OSError as error:
        raise VmmError(f"crosvm closed its control socket: {error.strerror}") from error


async def _readable(connection: socket.socket) -> None:
    try:
        await readable(connection)
    except anyio.ClosedResourceError:
        raise VmmError("the connection to crosvm's control socket is closed") from None


def _read(connection: socket.socket, name: str) -> Any:
    """The reply in a readable connection. Descriptors that come with it are closed by the kernel."""
    try:
        data, _, flags, _ = connection.recvmsg(MAX_REPLY)
    except OSError as error:
        raise VmmError(f"crosvm closed its control socket: {error.strerror}") from error
    if not data:
        raise VmmError("crosvm closed its control socket; it has ended, or is about to")
    if flags & socket.MSG_TRUNC:
        raise VmmError(f"crosvm answered {name} with more than {MAX_REPLY} bytes")
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        raise _nonsense(name) from None
    if isinstance(reply, dict):
        number, text = reply.get("Err"), reply.get("ErrString")
        if type(number) is int and 0 < number < 1 << 16:
            raise CrosvmError(f"crosvm refused {name}: {os.strerror(number)}", number)
        if isinstance(text, str):
            raise CrosvmError(f"crosvm refused {name}: {escape(text)}", 0)
    return reply


def _nonsense(name: str) -> VmmError:
    return VmmError(f"crosvm's answer to {name} is none that is known; its build may be too old or too new")


def _late(name: str, timeout: float) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"crosvm did not answer {name} within {timeout:g} s; it may be stuck: try again or stop the VM"
    )
