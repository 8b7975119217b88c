"""vsock: byte streams between host and guest, by the kernel's AF_VSOCK or the hybrid unix-socket convention.

The kernel transport is the real thing: the listener is a host socket, and the kernel vouches for the peer's
CID. The hybrid convention (Firecracker, Cloud Hypervisor, vhost-device-vsock) moves the streams over unix
sockets of a helper process. Whoever reaches such a socket is the guest, as far as the other side can tell,
hence two rules: the sockets live in a directory of mode 0700, and an accepted peer has to be the helper that
we started, by the credentials that the kernel gives. It is also weaker than the kernel's in ways that are not
hidden here: a half-close loses data, so ``send_eof`` is refused; a port without listener looks like an early
end of stream.

Streams and listeners belong to whoever made or accepted them. Every descriptor is close-on-exec, and none is
lost when a call is cancelled.
"""

import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Protocol, Self

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from vmactor.errors import (
    DeadlineExceededError,
    IllegalArgumentError,
    ResourceExhaustedError,
    UnsupportedOperationError,
    VsockError,
)
from vmactor.log import get_logger
from vmactor.messages import Requester
from vmactor.process import is_caller
from vmactor.waiting import readable, writable

FIRST_UNPRIVILEGED_PORT: Final = 1024
MAX_PORT: Final = 2**32 - 2
"""One less than VMADDR_PORT_ANY, which is a wildcard and no port."""
SUN_PATH_MAX: Final = 107
"""Bytes in the path of a unix socket, without the final NUL."""

_BACKLOG: Final = 64
_UNANSWERED_MAX: Final = 16
_SO_VM_SOCKETS_CONNECT_TIMEOUT: Final = 6  # linux/vm_sockets.h; a struct timeval
_HYBRID_ANSWER_MAX: Final = len("OK 4294967295\n")
_HYBRID_ANSWER = re.compile(rb"OK \d+\n")
_LONGEST_SUFFIX: Final = f"_{MAX_PORT}"

_log = get_logger()


class VsockAttribute(anyio.TypedAttributeSet):
    """What a stream knows of its peer, for ``VsockStream.extra``."""

    peer_cid: int = anyio.typed_attribute()
    """The guest's context identifier."""
    peer_port: int = anyio.typed_attribute()
    """The guest's port; absent for accepted hybrid connections, which do not tell it."""


class _Waitable:
    """A non-blocking socket, closed only when no task is inside a call on it.

    anyio's waits go by the descriptor's number on asyncio. If the number were free for reuse while a task has
    been woken but not yet run, that task's clean-up would take away somebody else's wait.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._users = 0
        self._closed = False

    @contextmanager
    def use(self, guard: anyio.ResourceGuard) -> Iterator[socket.socket]:
        self._check()
        with guard:
            self._users += 1
            try:
                yield self.sock
            finally:
                self._users -= 1
                if self._closed and not self._users:
                    self.sock.close()

    async def checkpoint(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()

    async def readable(self) -> None:
        await readable(self.sock)
        self._check()

    async def writable(self) -> None:
        await writable(self.sock)
        self._check()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            anyio.notify_closing(self.sock)
            if not self._users:
                self.sock.close()

    def detach(self) -> int:
        self._check()
        if self._users:
            raise anyio.BusyResourceError("using")
        self._closed = True
        return self.sock.detach()

    def _check(self) -> None:
        if self._closed:
            raise anyio.ClosedResourceError


class VsockStream(ByteStream):
    """A connection between host and guest; an anyio byte stream with anyio's errors.

    One task may receive and one may send at a time (``BusyResourceError`` otherwise). After
    ``BrokenResourceError`` or a cancelled ``send`` the stream is only good for closing: part of the data may
    have gone out.
    """

    def __init__(self, sock: socket.socket, *, cid: int, port: int | None, half_close: bool) -> None:
        self._waitable = _Waitable(sock)
        self._cid = cid
        self._port = port
        self._half_close = half_close
        self._receiving = anyio.ResourceGuard("reading from")
        self._sending = anyio.ResourceGuard("writing to")

    def __repr__(self) -> str:
        return f"<VsockStream cid={self._cid} port={'?' if self._port is None else self._port}>"

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """See ``VsockAttribute``."""
        known: dict[Any, Callable[[], Any]] = {VsockAttribute.peer_cid: lambda: self._cid}
        if self._port is not None:
            known[VsockAttribute.peer_port] = lambda: self._port
        return known

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Return at least one byte. No data is lost if this is cancelled.

        Raises:
            EndOfStream: The peer has closed.
            BrokenResourceError: The connection broke.
            ClosedResourceError: This stream has been closed here.
            BusyResourceError: Another task is receiving.
        """
        with self._waitable.use(self._receiving) as sock:
            await self._waitable.checkpoint()
            while True:
                try:
                    data = sock.recv(max_bytes)
                except BlockingIOError:
                    await self._waitable.readable()
                except OSError as error:
                    raise anyio.BrokenResourceError from error
                else:
                    if not data:
                        raise anyio.EndOfStream
                    return data

    async def send(self, item: bytes) -> None:
        """Send all of ``item``; waits while the peer does not read.

        Raises:
            BrokenResourceError: The connection broke, or this side has sent its end of stream.
            ClosedResourceError: This stream has been closed here.
            BusyResourceError: Another task is sending.
        """
        with self._waitable.use(self._sending) as sock, memoryview(item) as view:
            await self._waitable.checkpoint()
            sent = 0
            while sent < len(view):
                try:
                    # The program around us may have given SIGPIPE its deadly default back.
                    sent += sock.send(view[sent:], socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await self._waitable.writable()
                except OSError as error:
                    raise anyio.BrokenResourceError from error

    async def send_eof(self) -> None:
        """Tell the peer that nothing more will be sent; receiving goes on.

        Raises:
            UnsupportedOperationError: This is a hybrid connection. There a half-close counts as a close, and
                data under way in the other direction would be lost. The stream is unchanged.
            BrokenResourceError: The connection broke.
        """
        if not self._half_close:
            raise UnsupportedOperationError(
                "Hybrid vsock cannot close one direction without losing data of the other; mark the end in "
                "the protocol (a length or a delimiter), or close the stream"
            )
        with self._waitable.use(self._sending) as sock:
            await self._waitable.checkpoint()
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise anyio.BrokenResourceError from error

    def detach(self) -> int:
        """Give the connection away: its descriptor, which does not block, is the caller's to close.

        No task may be inside another call; the stream counts as closed from now on.
        """
        return self._waitable.detach()

    async def aclose(self) -> None:
        """Close at once; tasks inside other calls get ``ClosedResourceError``. Idempotent."""
        self._waitable.close()
        await anyio.lowlevel.checkpoint()


_Admit = Callable[[socket.socket, Any], VsockStream | str]
"""Makes a stream of an accepted socket and its peer's address, or says why the peer is refused."""


class VsockListener:
    """Accepts connections of one guest on one port; made by a transport's ``listen``.

    Attributes:
        port: The port.
        refused: How many connections of others have been closed.
    """

    def __init__(self, sock: socket.socket, port: int, admit: _Admit, path: Path | None = None) -> None:
        self.port = port
        self.refused = 0
        self._waitable = _Waitable(sock)
        self._admit = admit
        self._path = path
        self._accepting = anyio.ResourceGuard("accepting connections from")

    def __repr__(self) -> str:
        return f"<VsockListener port={self.port} refused={self.refused}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def accept(self) -> VsockStream:
        """Wait for the guest's next connection. Connections of others are closed, counted and logged.

        Raises:
            ResourceExhaustedError: Out of descriptors or memory. The connection stays queued and the listener
                good; wait before trying again.
            ClosedResourceError: The listener has been closed here.
            BusyResourceError: Another task is accepting.
        """
        with self._waitable.use(self._accepting) as listener:
            while True:
                await self._waitable.checkpoint()
                try:
                    sock, address = listener.accept()
                except BlockingIOError:
                    await self._waitable.readable()
                    continue
                except ConnectionAbortedError:
                    continue
                except OSError as error:
                    raise ResourceExhaustedError(
                        f"Cannot accept a connection on vsock port {self.port}: {error.strerror}; raise the "
                        "limit on open files (ulimit -n) or close some VMs"
                    ) from error
                try:
                    admitted = self._admit(sock, address)
                except BaseException:
                    sock.close()
                    raise
                if isinstance(admitted, VsockStream):
                    return admitted
                sock.close()
                self._count_refused(admitted)

    async def aclose(self) -> None:
        """Stop listening; a unix socket's file is removed. A waiting ``accept`` is told. Idempotent."""
        self._waitable.close()
        path, self._path = self._path, None
        if path is not None:
            path.unlink(missing_ok=True)
        await anyio.lowlevel.checkpoint()

    def refuse_waiting(self) -> None:
        """Close all connections that nobody has accepted yet; does not wait. Nothing happens when closed."""
        with suppress(OSError):  # at the end of the queue
            while True:
                self._waitable.sock.accept()[0].close()

    def _count_refused(self, reason: str) -> None:
        self.refused += 1
        # Only powers of two are logged: whoever keeps knocking must not fill the disk with our log.
        if self.refused & (self.refused - 1) == 0:
            _log.warning("vsock connection refused", port=self.port, reason=reason, refused=self.refused)


class VsockTransport(Protocol):
    """How streams get to one VM and from it."""

    @property
    def kind(self) -> Literal["kernel", "hybrid"]:
        """Which of the two transports this is."""
        ...

    @property
    def cid(self) -> int:
        """The guest's context identifier."""
        ...

    def listen(self, port: int) -> VsockListener:
        """Listen on the host for this guest only.

        Raises:
            IllegalArgumentError: Not a port number.
            VsockError: The port is taken, or the host cannot do it.
        """
        ...

    async def connect(self, port: int, *, timeout: float = 10.0) -> VsockStream:
        """Connect to a port of the guest.

        Raises:
            IllegalArgumentError: Not a port number.
            VsockError: Privileged port, or no connection; the message says what is likely.
            DeadlineExceededError: No answer within ``timeout`` seconds.
        """
        ...

    def close(self) -> None:
        """Release what attempts to connect have left; call it when the VM is dead. Idempotent."""
        ...


class KernelVsockTransport:
    """vsock by the host's kernel (vhost-vsock).

    Attributes:
        cid: The guest's context identifier.
    """

    kind: Final = "kernel"

    def __init__(self, cid: int) -> None:
        self.cid = cid

    def __repr__(self) -> str:
        return f"<KernelVsockTransport cid={self.cid}>"

    def listen(self, port: int) -> VsockListener:
        """See ``VsockTransport``. Listens for every CID, as the kernel has no other way, and admits one."""
        return listen_on_kernel(port, self.cid.__eq__)

    async def connect(self, port: int, *, timeout: float = 10.0) -> VsockStream:
        """See ``VsockTransport``."""
        _check_unprivileged(port)

        async def dial(sock: socket.socket) -> None:
            _set_connect_timeout(sock, timeout)
            try:
                sock.connect((self.cid, port))
            except BlockingIOError:
                await writable(sock)
                if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(number, os.strerror(number)) from None

        sock = await _open(_vsock_socket, dial, self.cid, port, timeout)
        return VsockStream(sock, cid=self.cid, port=port, half_close=True)

    def close(self) -> None:
        """See ``VsockTransport``; the kernel keeps nothing."""


def listen_on_kernel(port: int, admits: Callable[[int], bool]) -> VsockListener:
    """Listen on a port of the host's kernel, which is one for all guests.

    Args:
        port: The port.
        admits: Whose connections are accepted, by CID.

    Raises:
        IllegalArgumentError: Not a port number.
        VsockError: The port is taken, or the host cannot do it.
    """
    _check_port(port)
    try:
        sock = _vsock_socket()
        _bind(sock, (socket.VMADDR_CID_ANY, port))
    except OSError as error:
        raise VsockError(
            f"Cannot listen on vsock port {port}: {error.strerror}; choose another port, or load the "
            "kernel's vsock modules (modprobe vhost_vsock)"
        ) from error

    def admit(sock: socket.socket, address: tuple[int, int]) -> VsockStream | str:
        cid, peer_port = address
        if not admits(cid):
            return f"the peer's CID is {cid}, which is not expected here"
        return VsockStream(sock, cid=cid, port=peer_port, half_close=True)

    return VsockListener(sock, port, admit)


class HybridVsockTransport:
    """vsock over the unix sockets of a helper process.

    The guest's connections to host port N arrive at ``<path>_N``; the host's begin with ``CONNECT N`` on
    ``path``.

    Args:
        cid: The guest's context identifier.
        path: The helper's socket for host-to-guest connections, in a directory of mode 0700.
        helper_pid: Gives the helper's pid while it lives and has not been reaped (its number cannot be
            somebody else's until then), else None: then every connection is refused.
        owner: Whose the helper and the directory are, if they are another user's. What that user put there is
            not trusted, and nothing is made there that could be diverted: a socket is made in the directory
            around it, which is ours alone, and moved; a peer is believed by its credentials only.

    Raises:
        IllegalArgumentError: ``path`` is too long for a unix socket with any port's number behind it.
    """

    kind: Final = "hybrid"

    def __init__(
        self, cid: int, path: Path, helper_pid: Callable[[], int | None], owner: Requester | None = None
    ) -> None:
        check_socket_path(Path(f"{path}{_LONGEST_SUFFIX}"))
        self.cid = cid
        self._path = path
        self._helper_pid = helper_pid
        self._owner = owner if owner is not None and not is_caller(owner) else None
        self._unanswered: list[socket.socket] = []

    def __repr__(self) -> str:
        return f"<HybridVsockTransport cid={self.cid}>"

    def listen(self, port: int) -> VsockListener:
        """See ``VsockTransport``. Refused as well if the socket's file exists, even a stale one."""
        _check_port(port)
        path = Path(f"{self._path}_{port}")
        try:
            sock = _unix_socket()
            if self._owner is None:
                _bind(sock, os.fspath(path))
            else:
                _bind_for(sock, path, self._owner)
        except OSError as error:
            raise VsockError(
                f"Cannot listen on vsock port {port} of CID {self.cid} at {path}: {error.strerror}; choose "
                "another port, or remove the file if nobody listens there any more"
            ) from error
        return VsockListener(sock, port, self._admit, path)

    async def connect(self, port: int, *, timeout: float = 10.0) -> VsockStream:
        """See ``VsockTransport``. Nothing but the request is sent before the helper's answer is complete.

        An attempt that is given up keeps its socket open until it is answered after all: vhost-device-vsock
        0.3.0 loses the thread that serves the guest, for good, if a connection goes before the guest has
        answered it. A guest that answers nothing has 16 of them at most.
        """
        _check_unprivileged(port)
        self._close_answered()
        if len(self._unanswered) >= _UNANSWERED_MAX:
            raise VsockError(_failed(self.cid, port, f"{_UNANSWERED_MAX} attempts are still unanswered"))

        async def dial(sock: socket.socket) -> None:
            await _connect_unix(sock, self._path)
            if self._owner is not None and (who := _peer(sock)[1]) != self._owner.uid:
                raise VsockError(_failed(self.cid, port, f"its socket leads to a process of user {who}"))
            sock.send(b"CONNECT %d\n" % port, socket.MSG_NOSIGNAL)  # always fits a fresh socket's buffer
            try:
                answer = await _receive_line(sock)
            except OSError:
                raise
            except BaseException:  # cancelled, by the deadline or from outside
                with suppress(OSError):  # no descriptor is left: then it cannot be helped
                    self._unanswered.append(sock.dup())
                raise
            if not answer:
                raise VsockError(_failed(self.cid, port, "the connection was closed without an answer"))
            if not _HYBRID_ANSWER.fullmatch(answer):
                raise VsockError(_failed(self.cid, port, f"the answer was {answer!r}"))

        sock = await _open(_unix_socket, dial, self.cid, port, timeout)
        return VsockStream(sock, cid=self.cid, port=port, half_close=False)

    def close(self) -> None:
        """See ``VsockTransport``."""
        while self._unanswered:
            self._unanswered.pop().close()

    def _close_answered(self) -> None:
        for sock in tuple(self._unanswered):
            try:
                sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                pass
            sock.close()
            self._unanswered.remove(sock)

    def _admit(self, sock: socket.socket, _address: object) -> VsockStream | str:
        pid, uid = _peer(sock)
        helper = self._helper_pid()
        if helper is None or pid != helper:
            return f"the peer is process {pid} of user {uid}, not the helper ({helper or 'not running'})"
        return VsockStream(sock, cid=self.cid, port=None, half_close=False)


def check_socket_path(path: Path) -> None:
    """Refuse a path that is too long for a unix socket.

    Raises:
        IllegalArgumentError: It has more than 107 bytes.
    """
    length = len(os.fsencode(path))
    if length > SUN_PATH_MAX:
        raise IllegalArgumentError(
            f"{path} has {length} bytes, more than the {SUN_PATH_MAX} of a unix socket; choose a shorter "
            "state directory"
        )


def _check_port(port: int) -> None:
    if not 0 <= port <= MAX_PORT:
        raise IllegalArgumentError(f"{port} is not a vsock port; it has to be in 0..{MAX_PORT}")


def _check_unprivileged(port: int) -> None:
    _check_port(port)
    if port < FIRST_UNPRIVILEGED_PORT:
        raise VsockError(f"Can't connect to privileged port {port}")  # reference: connectVsock


def _vsock_socket() -> socket.socket:
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


def _unix_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _set_connect_timeout(sock: socket.socket, timeout: float) -> None:
    """Keep the kernel, which gives up after 2 s by itself, from coming before our deadline."""
    value = struct.pack("@ll", int(min(timeout, 86400)) + 1, 0)
    # Python's setsockopt takes nothing but 64-bit numbers for a socket that it believes to be AF_VSOCK.
    alias = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.fileno())
    try:
        alias.setsockopt(socket.AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, value)
    finally:
        alias.detach()


def _bind(sock: socket.socket, address: Any) -> None:
    """Bind and listen; the socket is closed if that fails."""
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except BaseException:
        sock.close()
        raise


def _bind_for(sock: socket.socket, path: Path, owner: Requester) -> None:
    """The same for a socket in a directory of another user, who may use it."""
    made = path.parent.parent / path.name
    _bind(sock, os.fspath(made))
    try:
        os.chown(made, owner.uid, owner.gid, follow_symlinks=False)
        os.link(made, path, follow_symlinks=False)
    except BaseException:
        sock.close()
        raise
    finally:
        made.unlink()


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Process and user of a unix socket's peer, as the kernel says."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _gid = struct.unpack("3i", credentials)
    return pid, uid


async def _open(
    make: Callable[[], socket.socket],
    dial: Callable[[socket.socket], Awaitable[None]],
    cid: int,
    port: int,
    timeout: float,
) -> socket.socket:
    """Return a connected non-blocking socket, or close it and raise what ``VsockTransport.connect`` says."""
    try:
        sock = make()
    except OSError as error:
        raise VsockError(_failed(cid, port, str(error.strerror))) from error
    try:
        sock.setblocking(False)
        with anyio.move_on_after(timeout) as scope:
            await anyio.lowlevel.checkpoint()
            await dial(sock)
        if scope.cancelled_caught:
            raise DeadlineExceededError(_failed(cid, port, f"no answer within {timeout:g} s"))
    except OSError as error:
        sock.close()
        raise VsockError(_failed(cid, port, str(error.strerror))) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _failed(cid: int, port: int, what: str) -> str:
    return (
        f"Failed to connect to vsock port {port} of CID {cid}: {what}; likely nothing listens on that port "
        "in the guest, or the guest's vsock driver is not up yet, or the VM has ended"
    )


async def _connect_unix(sock: socket.socket, path: Path) -> None:
    """Connect, trying again while the listener's queue is full; that cannot be waited for."""
    pause = 0.001
    while True:
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:
            await anyio.sleep(pause)
            pause = min(2 * pause, 0.05)
        else:
            return


async def _receive_line(sock: socket.socket) -> bytes:
    """Return one short line, or what came before the end of the stream or the limit.

    Byte by byte: what follows the line belongs to the stream.
    """
    line = bytearray()
    while len(line) < _HYBRID_ANSWER_MAX and not line.endswith(b"\n"):
        try:
            byte = sock.recv(1)
        except BlockingIOError:
            await readable(sock)
        else:
            if not byte:
                break
            line += byte
    return bytes(line)
