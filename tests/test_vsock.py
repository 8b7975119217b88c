"""vsock: the contract of streams and listeners, and the manners of both transports.

The hybrid transport talks to a stand-in for the helper, on real unix sockets. The kernel transport's
addresses are played by unix sockets at the socket boundary, because a host may have AF_VSOCK and no loopback;
what can be had of the real family is used too.
"""

import errno
import math
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import pytest
from anyio import BrokenResourceError, BusyResourceError, ClosedResourceError, EndOfStream
from structlog.testing import capture_logs

import vmactor.vsock
from vmactor.errors import (
    DeadlineExceededError,
    IllegalArgumentError,
    ResourceExhaustedError,
    UnsupportedOperationError,
    VsockError,
)
from vmactor.messages import Requester
from vmactor.vsock import (
    HybridVsockTransport,
    KernelVsockTransport,
    VsockAttribute,
    VsockStream,
    VsockTransport,
)

pytestmark = pytest.mark.anyio

CID = 2048


# -- Streams ----------------------------------------------------------------------------------------


@asynccontextmanager
async def stream_pair(*, half_close: bool = True) -> AsyncIterator[tuple[VsockStream, VsockStream]]:
    """Two ends of a connection."""
    one, two = socket.socketpair()
    streams = tuple(VsockStream(sock, cid=CID, port=5000, half_close=half_close) for sock in (one, two))
    try:
        yield streams[0], streams[1]
    finally:
        for stream in streams:
            await stream.aclose()


async def receive_all(stream: VsockStream) -> bytes:
    """Everything up to the end of the stream."""
    return b"".join([chunk async for chunk in stream])


async def test_bytes_go_both_ways_and_the_end_is_seen() -> None:
    async with stream_pair() as (one, two):
        await one.send(b"hello")
        assert await two.receive() == b"hello"
        await two.send(b"world")
        assert await one.receive(3) == b"wor"
        assert await one.receive() == b"ld"
        await two.aclose()
        with pytest.raises(EndOfStream):
            await one.receive()


async def test_more_than_the_kernel_buffers_arrives_whole() -> None:
    data = os.urandom(3_000_000)
    async with stream_pair() as (one, two):

        async def send() -> None:
            await one.send(data)
            await one.send_eof()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            assert await receive_all(two) == data


async def test_after_a_half_close_the_other_direction_goes_on() -> None:
    async with stream_pair() as (one, two):
        await one.send_eof()
        with pytest.raises(EndOfStream):
            await two.receive()
        await two.send(b"still here")
        assert await one.receive() == b"still here"
        with pytest.raises(BrokenResourceError):
            await one.send(b"too late")


async def test_a_hybrid_stream_refuses_a_half_close_and_lives_on() -> None:
    async with stream_pair(half_close=False) as (one, two):
        with pytest.raises(UnsupportedOperationError, match="close the stream"):
            await one.send_eof()
        await one.send(b"unharmed")
        assert await two.receive() == b"unharmed"


async def test_a_peer_that_is_gone_breaks_the_stream() -> None:
    async with stream_pair() as (one, two):
        await one.send(b"never read")
        await two.aclose()  # with unread data: the kernel resets
        with pytest.raises(BrokenResourceError):
            await one.receive()
        with pytest.raises(BrokenResourceError):
            await one.send(b"x")


async def test_one_task_at_a_time_in_each_direction() -> None:
    async with stream_pair() as (one, _two), anyio.create_task_group() as tasks:
        tasks.start_soon(one.receive)
        tasks.start_soon(one.send, bytes(10_000_000))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BusyResourceError):
            await one.receive()
        with pytest.raises(BusyResourceError):
            await one.send(b"x")
        tasks.cancel_scope.cancel()


async def expect(error: type[Exception], call: Callable[[], Awaitable[object]]) -> None:
    """Fail unless the call raises."""
    with pytest.raises(error):
        await call()


async def test_closing_is_told_to_tasks_that_wait() -> None:
    async with stream_pair() as (one, _two), anyio.create_task_group() as tasks:
        tasks.start_soon(expect, ClosedResourceError, one.receive)
        tasks.start_soon(expect, ClosedResourceError, lambda: one.send(bytes(10_000_000)))
        await anyio.wait_all_tasks_blocked()
        await one.aclose()


async def test_a_closed_stream_says_so() -> None:
    async with stream_pair() as (one, _two):
        await one.aclose()
        await one.aclose()
        await expect(ClosedResourceError, one.receive)
        await expect(ClosedResourceError, one.send_eof)
        await expect(ClosedResourceError, lambda: one.send(b""))


async def test_the_descriptor_is_not_free_for_reuse_while_a_task_is_inside() -> None:
    raw, peer = socket.socketpair()
    stream = VsockStream(raw, cid=CID, port=None, half_close=True)
    with closing(peer):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect, ClosedResourceError, stream.receive)
            await anyio.wait_all_tasks_blocked()
            stream._waitable.close()
            assert raw.fileno() != -1
        assert raw.fileno() == -1


async def test_a_cancelled_receive_loses_no_data() -> None:
    async with stream_pair() as (one, two):
        await one.send(b"kept")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await two.receive()
        assert await two.receive() == b"kept"


async def test_the_peer_is_a_typed_attribute() -> None:
    async with stream_pair() as (one, _two):
        assert one.extra(VsockAttribute.peer_cid) == CID
        assert one.extra(VsockAttribute.peer_port) == 5000
        assert repr(one) == f"<VsockStream cid={CID} port=5000>"


# -- Hybrid transport -------------------------------------------------------------------------------


def hybrid(directory: Path, helper_pid: Callable[[], int | None] = os.getpid) -> HybridVsockTransport:
    """A transport whose helper is, by default, this very process."""
    return HybridVsockTransport(CID, directory / "vsock", helper_pid)


def dial(path: Path) -> socket.socket:
    """Connect as the helper does when the guest connects to the host."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.fspath(path))
    return sock


Script = Callable[[socket.socket, bytes], Awaitable[None]]


@asynccontextmanager
async def helper(directory: Path, script: Script) -> AsyncIterator[None]:
    """A stand-in that accepts one connection, reads the request line and plays ``script``."""

    async def serve() -> None:
        await anyio.wait_readable(listener)
        sock, _ = listener.accept()
        with closing(sock):
            sock.setblocking(False)
            await anyio.wait_readable(sock)
            await script(sock, sock.recv(100))

    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(os.fspath(directory / "vsock"))
        listener.listen()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            yield
            tasks.cancel_scope.cancel()


def answering(answer: bytes) -> Script:
    """Say that, then keep the connection."""

    async def script(sock: socket.socket, _request: bytes) -> None:
        sock.send(answer)
        await anyio.sleep_forever()

    return script


async def test_the_guests_connection_is_accepted_from_the_helper(short_dir: Path) -> None:
    transport: VsockTransport = hybrid(short_dir)
    assert (transport.kind, transport.cid) == ("hybrid", CID)
    listener = transport.listen(CID)
    with closing(dial(short_dir / f"vsock_{CID}")) as guest:
        stream = await listener.accept()
        guest.send(b"from the guest")
        assert await stream.receive() == b"from the guest"
        assert stream.extra(VsockAttribute.peer_cid) == CID
        with pytest.raises(anyio.TypedAttributeLookupError):
            stream.extra(VsockAttribute.peer_port)
        await stream.aclose()
    assert (listener.port, listener.refused) == (CID, 0)
    await listener.aclose()


async def test_another_process_is_closed_counted_and_logged(short_dir: Path) -> None:
    listener = hybrid(short_dir).listen(CID)
    code = "from socket import *; import sys; s = socket(1); s.connect(sys.argv[1]); sys.exit(len(s.recv(1)))"
    command = [sys.executable, "-S", "-c", code, str(short_dir / f"vsock_{CID}")]
    with capture_logs() as logs, subprocess.Popen(command) as intruder:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.accept)
            with anyio.fail_after(20):
                while not listener.refused:
                    await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
        assert intruder.wait() == 0, "it saw the end of the stream"
    assert listener.refused == 1
    assert [(entry["event"], entry["port"]) for entry in logs] == [("vsock connection refused", CID)]
    assert str(intruder.pid) in logs[0]["reason"]
    await listener.aclose()


async def test_without_a_known_helper_everybody_is_refused_and_the_log_stays_short(short_dir: Path) -> None:
    listener = hybrid(short_dir, lambda: None).listen(CID)
    guests = [dial(short_dir / f"vsock_{CID}") for _ in range(9)]
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listener.accept)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert listener.refused == 9
    assert [entry["refused"] for entry in logs] == [1, 2, 4, 8]
    for guest in guests:
        assert guest.recv(1) == b""
        guest.close()
    await listener.aclose()
    assert repr(listener) == f"<VsockListener port={CID} refused=9>"


async def test_the_sockets_file_goes_with_the_listener(short_dir: Path) -> None:
    listener = hybrid(short_dir).listen(5000)
    path = short_dir / "vsock_5000"
    assert path.is_socket()
    with pytest.raises(VsockError, match=r"Address already in use; choose another port, or remove the file"):
        hybrid(short_dir).listen(5000)
    assert path.is_socket(), "the loser does not remove the winner's file"
    await listener.aclose()
    await listener.aclose()
    assert not path.exists()
    await hybrid(short_dir).listen(5000).aclose()


async def test_a_waiting_accept_hears_of_the_close(short_dir: Path) -> None:
    listener = hybrid(short_dir).listen(5000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect, ClosedResourceError, listener.accept)
        await anyio.wait_all_tasks_blocked()
        await expect(BusyResourceError, listener.accept)
        await listener.aclose()
    await expect(ClosedResourceError, listener.accept)


async def test_a_cancelled_accept_leaves_the_connection_queued(short_dir: Path) -> None:
    listener = hybrid(short_dir).listen(5000)
    with closing(dial(short_dir / "vsock_5000")) as guest:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        guest.send(b"patient")
        stream = await listener.accept()
        assert await stream.receive() == b"patient"
        await stream.aclose()
    await listener.aclose()


async def test_running_out_of_descriptors_is_named_and_survived(short_dir: Path) -> None:
    import resource

    listener = hybrid(short_dir).listen(5000)
    with closing(dial(short_dir / "vsock_5000")):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(ResourceExhaustedError, match=r"Too many open files; raise the limit"):
                await listener.accept()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await (await listener.accept()).aclose()
    await listener.aclose()


async def test_connect_sends_nothing_before_the_whole_answer_and_swallows_nothing_after_it(
    short_dir: Path,
) -> None:
    requests = []

    async def script(sock: socket.socket, request: bytes) -> None:
        requests.append(request)
        for part in (b"O", b"K 50", b"00"):
            sock.send(part)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(BlockingIOError):
                sock.recv(1)
        sock.send(b"\nthe stream begins\n")
        await anyio.wait_readable(sock)
        requests.append(sock.recv(100))

    async with helper(short_dir, script):
        stream = await hybrid(short_dir).connect(5000)
        await stream.send(b"payload")
        assert await receive_all(stream) == b"the stream begins\n"
        assert stream.extra(VsockAttribute.peer_port) == 5000
        await stream.aclose()
    assert requests == [b"CONNECT 5000\n", b"payload"]


@pytest.mark.parametrize(
    "answer", [b"NO\n", b"OK\n", b"OK 5000 x\n", b"OK five\n", b"\n", b"x" * 1000, b"OK " + b"9" * 99]
)
async def test_any_other_answer_is_a_vsock_error(short_dir: Path, answer: bytes) -> None:
    async with helper(short_dir, answering(answer)):
        with pytest.raises(VsockError, match="the answer was b'") as caught:
            await hybrid(short_dir).connect(5000)
    assert len(str(caught.value)) < 300


async def test_an_end_instead_of_an_answer_tells_what_is_likely(short_dir: Path) -> None:
    async def script(_sock: socket.socket, _request: bytes) -> None:
        pass

    async with helper(short_dir, script):
        with pytest.raises(VsockError, match=r"without an answer; likely nothing listens .* not up yet"):
            await hybrid(short_dir).connect(5000)


async def test_a_reset_instead_of_an_answer_is_a_vsock_error(short_dir: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(os.fspath(short_dir / "vsock"))
        listener.listen()

        async def reset() -> None:
            await anyio.wait_readable(listener)
            sock, _ = listener.accept()
            await anyio.wait_readable(sock)
            sock.close()  # with the request unread

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reset)
            with pytest.raises(VsockError, match="Connection reset by peer; likely"):
                await hybrid(short_dir).connect(5000)


async def test_no_helper_is_a_vsock_error(short_dir: Path) -> None:
    with pytest.raises(VsockError, match="No such file or directory; likely"):
        await hybrid(short_dir).connect(5000)
    with closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(os.fspath(short_dir / "vsock"))
    with pytest.raises(VsockError, match="Connection refused; likely"):
        await hybrid(short_dir).connect(5000)


async def test_a_silent_helper_is_given_up_at_the_deadline(short_dir: Path) -> None:
    async with helper(short_dir, answering(b"OK")):
        transport = hybrid(short_dir)
        with pytest.raises(DeadlineExceededError, match=r"no answer within 0.05 s"):
            await transport.connect(5000, timeout=0.05)
        transport.close()


async def test_a_cancelled_connect_leaves_nothing_once_the_transport_is_closed(short_dir: Path) -> None:
    async with helper(short_dir, answering(b"OK")), anyio.create_task_group() as tasks:
        transport = hybrid(short_dir)
        tasks.start_soon(transport.connect, 5000)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    transport.close()


async def test_an_attempt_that_is_given_up_stays_connected_until_it_is_answered(short_dir: Path) -> None:
    transport = hybrid(short_dir)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(os.fspath(short_dir / "vsock"))
        listener.listen()
        with pytest.raises(DeadlineExceededError):
            await transport.connect(5000, timeout=0.05)
        given_up, _ = listener.accept()
        with closing(given_up):
            given_up.setblocking(False)
            assert given_up.recv(100) == b"CONNECT 5000\n"
            with pytest.raises(BlockingIOError):  # end of file here would be what the helper dies of
                given_up.recv(1)
            given_up.send(b"OK 5000\n")
            with pytest.raises(DeadlineExceededError):
                await transport.connect(5000, timeout=0.05)
            with pytest.raises(BrokenPipeError):
                given_up.send(b"gone")
        transport.close()


async def test_unanswered_attempts_are_bounded(short_dir: Path) -> None:
    async with helper(short_dir, answering(b"OK")):
        transport = hybrid(short_dir)
        for _ in range(16):
            with pytest.raises(DeadlineExceededError):
                await transport.connect(5000, timeout=0.01)
        with pytest.raises(VsockError, match="16 attempts are still unanswered"):
            await transport.connect(5000)
        transport.close()


async def test_a_busy_helper_is_waited_for(short_dir: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(os.fspath(short_dir / "vsock"))
        listener.listen(0)
        first = dial(short_dir / "vsock")  # fills the queue
        with pytest.raises(DeadlineExceededError):
            await hybrid(short_dir).connect(5000, timeout=0.05)

        async def serve() -> None:
            listener.accept()[0].close()
            await anyio.wait_readable(listener)
            sock, _ = listener.accept()
            with closing(sock):
                sock.send(b"OK 5000\n")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            await (await hybrid(short_dir).connect(5000)).aclose()
        first.close()


@pytest.mark.parametrize("transport", [hybrid(Path("/nonexistent")), KernelVsockTransport(CID)])
async def test_ports_are_checked_before_any_work(
    transport: VsockTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket() -> socket.socket:
        pytest.fail("a socket was made")

    monkeypatch.setattr(vmactor.vsock, "_vsock_socket", no_socket)
    monkeypatch.setattr(vmactor.vsock, "_unix_socket", no_socket)
    for port in (-1, 2**32 - 1, 2**32):
        with pytest.raises(IllegalArgumentError, match="not a vsock port"):
            transport.listen(port)
        with pytest.raises(IllegalArgumentError, match="not a vsock port"):
            await transport.connect(port)
    for port in (0, 1023):
        with pytest.raises(VsockError, match=f"^Can't connect to privileged port {port}$"):
            await transport.connect(port)


def test_a_path_without_room_for_every_port_is_refused_at_once() -> None:
    longest = "/" + "d" * (107 - len("/" + "/vsock" + "_4294967294"))
    HybridVsockTransport(CID, Path(longest) / "vsock", os.getpid)
    with pytest.raises(
        IllegalArgumentError, match=r"108 bytes, more than the 107 .* shorter state directory"
    ):
        HybridVsockTransport(CID, Path(longest + "d") / "vsock", os.getpid)
    with pytest.raises(IllegalArgumentError, match="bytes"):  # bytes count, not characters
        HybridVsockTransport(CID, Path(longest[:-1] + "é") / "vsock", os.getpid)


async def test_every_descriptor_is_close_on_exec(short_dir: Path) -> None:
    listener = hybrid(short_dir).listen(5000)
    with closing(dial(short_dir / "vsock_5000")):
        accepted = await listener.accept()
    async with helper(short_dir, answering(b"OK 5000\n")):
        connected = await hybrid(short_dir).connect(5000)
    for thing in (listener, accepted, connected):
        assert not thing._waitable.sock.get_inheritable()
        await thing.aclose()


# -- Kernel transport -------------------------------------------------------------------------------


class FakeVsock(socket.socket):
    """A socket that looks like AF_VSOCK to its user, and is a unix socket in ``directory``."""

    directory: ClassVar[Path]
    peers: ClassVar[list[tuple[int, int]]]
    connect_error: ClassVar[int] = 0

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)

    def path(self, address: Any) -> str:
        return os.fspath(self.directory / f"{address[0]}_{address[1]}")

    def bind(self, address: Any) -> None:
        super().bind(self.path(address))

    def accept(self) -> tuple[socket.socket, Any]:
        sock, _ = super().accept()
        return sock, self.peers.pop(0)

    def connect(self, address: Any) -> None:
        super().connect(self.path(address))
        raise BlockingIOError(errno.EINPROGRESS, "in progress")

    def getsockopt(self, *args: Any) -> Any:
        return (
            self.connect_error if args == (socket.SOL_SOCKET, socket.SO_ERROR) else super().getsockopt(*args)
        )


@pytest.fixture
def fake_vsock(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeVsock]:
    """The kernel transport makes these instead of AF_VSOCK sockets."""

    class Fake(FakeVsock):
        directory = short_dir
        peers: ClassVar = []

    monkeypatch.setattr(vmactor.vsock, "_vsock_socket", Fake)
    monkeypatch.setattr(vmactor.vsock, "_set_connect_timeout", lambda _sock, _timeout: None)
    return Fake


async def test_the_kernel_listener_admits_only_the_vms_cid(
    fake_vsock: type[FakeVsock], short_dir: Path
) -> None:
    transport: VsockTransport = KernelVsockTransport(CID)
    assert (transport.kind, transport.cid) == ("kernel", CID)
    fake_vsock.peers[:] = [(CID + 1, 77), (2, 78), (CID, 79)]
    listener = transport.listen(5000)
    guests = [dial(short_dir / f"{socket.VMADDR_CID_ANY}_5000") for _ in range(3)]
    with capture_logs() as logs:
        stream = await listener.accept()
    assert stream.extra(VsockAttribute.peer_cid) == CID
    assert stream.extra(VsockAttribute.peer_port) == 79
    assert listener.refused == 2
    assert [entry["reason"] for entry in logs] == [
        f"the peer's CID is {CID + 1}, which is not expected here",
        "the peer's CID is 2, which is not expected here",
    ]
    assert [guest.recv(1) for guest in guests[:2]] == [b"", b""]
    await stream.send_eof()
    assert guests[2].recv(1) == b""
    guests[2].send(b"half open")
    assert await stream.receive() == b"half open"
    for guest in guests:
        guest.close()
    await stream.aclose()
    await listener.aclose()


async def test_the_kernel_transport_connects(fake_vsock: type[FakeVsock], short_dir: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as guest:
        guest.bind(os.fspath(short_dir / f"{CID}_5000"))
        guest.listen()
        stream = await KernelVsockTransport(CID).connect(5000)
        assert stream.extra(VsockAttribute.peer_cid) == CID
        assert stream.extra(VsockAttribute.peer_port) == 5000
        await stream.aclose()


async def test_a_failed_kernel_connection_tells_what_is_likely(
    fake_vsock: type[FakeVsock], short_dir: Path
) -> None:
    fake_vsock.connect_error = errno.ECONNRESET
    with closing(socket.socket(socket.AF_UNIX)) as guest:
        guest.bind(os.fspath(short_dir / f"{CID}_5000"))
        guest.listen()
        with pytest.raises(VsockError, match=f"port 5000 of CID {CID}: Connection reset by peer; likely"):
            await KernelVsockTransport(CID).connect(5000)


async def test_a_host_without_vsock_is_a_vsock_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported() -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(vmactor.vsock, "_vsock_socket", unsupported)
    with pytest.raises(VsockError, match="not supported by protocol; choose another port, or load"):
        KernelVsockTransport(CID).listen(5000)
    with pytest.raises(VsockError, match="not supported by protocol"):
        await KernelVsockTransport(CID).connect(5000)


async def test_a_guest_that_does_not_exist_cannot_be_reached_by_the_real_kernel() -> None:
    with pytest.raises((VsockError, DeadlineExceededError)):
        await KernelVsockTransport(0x7FFF_FFF0).connect(5000, timeout=0.1)


@pytest.fixture
def real_vsock() -> Iterator[socket.socket]:
    """A socket of the real family."""
    try:
        sock = socket.socket(socket.AF_VSOCK)
    except OSError:
        pytest.skip("this host has no AF_VSOCK")
    with closing(sock):
        yield sock


async def test_the_real_kernels_own_limit_is_behind_our_deadline(real_vsock: socket.socket) -> None:
    vmactor.vsock._set_connect_timeout(real_vsock, 30.5)
    alias = socket.socket(socket.AF_UNIX, fileno=real_vsock.fileno())
    assert struct.unpack("@ll", alias.getsockopt(socket.AF_VSOCK, 6, 16)) == (31, 0)
    alias.detach()
    vmactor.vsock._set_connect_timeout(real_vsock, math.inf)


async def test_the_real_kernel_gives_a_port_to_one_listener(real_vsock: socket.socket) -> None:
    port = 0x7000_0000 + os.getpid()
    listener = KernelVsockTransport(CID).listen(port)
    assert not listener._waitable.sock.get_inheritable()
    with pytest.raises(VsockError, match="Address already in use"):
        KernelVsockTransport(CID).listen(port)
    await listener.aclose()
    await KernelVsockTransport(CID).listen(port).aclose()


# -- Helpers of other users ----------------------------------------------------------------------------

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has VMs of others")
OTHER = Requester(4242, 4343)


def others_directory(directory: Path) -> Path:
    path = directory / "s"
    path.mkdir(mode=0o700)
    os.chown(path, OTHER.uid, OTHER.gid)
    return path


@ROOT
async def test_a_listener_for_another_users_helper_is_that_users_and_leaves_nothing(short_dir: Path) -> None:
    there = others_directory(short_dir)
    transport = HybridVsockTransport(CID, there / "vsock", os.getpid, OTHER)
    async with transport.listen(5000):
        status = (there / "vsock_5000").stat()
        assert (status.st_uid, status.st_gid) == (OTHER.uid, OTHER.gid)
        assert [path.name for path in short_dir.iterdir()] == ["s"]
    assert list(there.iterdir()) == []


@ROOT
async def test_what_another_user_puts_in_a_listeners_place_is_not_followed(short_dir: Path) -> None:
    there = others_directory(short_dir)
    (short_dir / "treasure").touch()
    (there / "vsock_5000").symlink_to(short_dir / "treasure")
    transport = HybridVsockTransport(CID, there / "vsock", os.getpid, OTHER)
    with pytest.raises(VsockError, match="File exists"):
        transport.listen(5000)
    assert (short_dir / "treasure").stat().st_uid == 0
    assert sorted(path.name for path in short_dir.iterdir()) == ["s", "treasure"]


@ROOT
async def test_nothing_is_sent_to_where_another_user_leads_us(short_dir: Path) -> None:
    there = others_directory(short_dir)
    with socket.socket(socket.AF_UNIX) as privileged:
        privileged.bind(str(short_dir / "privileged"))
        privileged.listen()
        (there / "vsock").symlink_to(short_dir / "privileged")
        transport = HybridVsockTransport(CID, there / "vsock", os.getpid, OTHER)
        with pytest.raises(VsockError, match="leads to a process of user 0"):
            await transport.connect(5000)
        reached, _ = privileged.accept()
        with reached:
            assert reached.recv(100) == b""
