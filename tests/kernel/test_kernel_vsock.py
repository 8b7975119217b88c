"""The kernel's own vsock: what the transport promises, over the loopback (CID 1) of a real AF_VSOCK."""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
from anyio import EndOfStream
from structlog.testing import capture_logs

from vmactor.errors import DeadlineExceededError, VsockError
from vmactor.vsock import KernelVsockTransport, VsockAttribute, VsockListener, VsockStream

pytestmark = [pytest.mark.anyio, pytest.mark.kernel]

LOOPBACK = 1
MIB = 1 << 20


@pytest.fixture
def transport() -> KernelVsockTransport:
    """Both sides at once: what connects to CID 1 comes from CID 1."""
    return KernelVsockTransport(LOOPBACK)


@asynccontextmanager
async def connected(
    transport: KernelVsockTransport, port: int
) -> AsyncIterator[tuple[VsockStream, VsockStream]]:
    """The dialling and the accepted end of a connection."""
    async with (
        transport.listen(port) as listener,
        await transport.connect(port) as dialled,
        await listener.accept() as accepted,
    ):
        yield dialled, accepted


async def received(stream: VsockStream) -> bytes:
    """All that comes until the end of the stream."""
    data = bytearray()
    while True:
        try:
            data += await stream.receive()
        except EndOfStream:
            return bytes(data)


async def test_the_accepted_end_knows_the_peers_cid_and_port(transport: KernelVsockTransport) -> None:
    async with connected(transport, 6000) as (dialled, accepted):
        assert accepted.extra(VsockAttribute.peer_cid) == LOOPBACK
        assert dialled.extra(VsockAttribute.peer_port) == 6000
        assert accepted.extra(VsockAttribute.peer_port) > 0


async def test_a_half_close_leaves_the_other_direction_open(transport: KernelVsockTransport) -> None:
    async with connected(transport, 6001) as (dialled, accepted):
        await dialled.send(b"question")
        await dialled.send_eof()
        assert await received(accepted) == b"question"
        await accepted.send(b"answer after the end of the question")
        await accepted.aclose()
        assert await received(dialled) == b"answer after the end of the question"


async def test_megabytes_both_ways_at_once_arrive_whole(transport: KernelVsockTransport) -> None:
    there, back = os.urandom(8 * MIB), os.urandom(8 * MIB)
    got: dict[str, bytes] = {}

    async def talk(name: str, stream: VsockStream, data: bytes) -> None:
        async def collect() -> None:
            got[name] = await received(stream)

        async with anyio.create_task_group() as both:
            both.start_soon(collect)
            await stream.send(data)
            await stream.send_eof()

    async with connected(transport, 6002) as (dialled, accepted), anyio.create_task_group() as sides:
        sides.start_soon(talk, "dialled", dialled, there)
        sides.start_soon(talk, "accepted", accepted, back)
    assert got == {"dialled": back, "accepted": there}


async def test_a_peer_that_is_gone_is_the_end_of_the_stream_or_a_broken_one(
    transport: KernelVsockTransport,
) -> None:
    async with connected(transport, 6003) as (dialled, accepted):
        await dialled.aclose()
        assert await received(accepted) == b""
        with pytest.raises(anyio.BrokenResourceError):  # noqa: PT012 - how much fits is the kernel's affair
            while True:
                await accepted.send(bytes(65536))


async def test_a_port_in_use_is_an_error_that_names_it_and_is_free_again_afterwards(
    transport: KernelVsockTransport,
) -> None:
    async with transport.listen(6004):
        with pytest.raises(VsockError, match="6004"):
            transport.listen(6004)
    async with transport.listen(6004):
        pass


async def test_a_port_without_listener_is_refused_at_once(transport: KernelVsockTransport) -> None:
    with pytest.raises(VsockError, match="6005"):
        await transport.connect(6005)


async def test_a_cid_that_no_vm_has_is_an_error_of_the_transport() -> None:
    with pytest.raises((VsockError, DeadlineExceededError)):
        await KernelVsockTransport(40404).connect(6006, timeout=5)


async def test_a_listener_for_a_guest_refuses_every_other_cid() -> None:
    """It has to listen for any CID, as the kernel has no other way, so it is ours to look who calls."""
    guest = KernelVsockTransport(4242)
    async with guest.listen(6007) as listener, anyio.create_task_group() as group:
        with capture_logs() as logged:
            group.start_soon(listener.accept)
            async with await KernelVsockTransport(LOOPBACK).connect(6007) as intruder:
                with pytest.raises((EndOfStream, anyio.BrokenResourceError)):
                    await intruder.receive()
        assert listener.refused == 1
        assert "CID is 1, which is not expected" in str(logged)
        group.cancel_scope.cancel()


async def test_many_connections_at_once_all_answer(transport: KernelVsockTransport) -> None:
    count = 50

    async def serve(listener: VsockListener, streams: AsyncExitStack) -> None:
        for _ in range(count):
            stream = await streams.enter_async_context(await listener.accept())
            await stream.send(await stream.receive())

    async def ask(number: int) -> None:
        async with await transport.connect(6008, timeout=60) as stream:
            await stream.send(b"%d" % number)
            assert await stream.receive() == b"%d" % number

    async with (
        transport.listen(6008) as listener,
        AsyncExitStack() as streams,
        anyio.create_task_group() as group,
    ):
        group.start_soon(serve, listener, streams)
        async with anyio.create_task_group() as asking:
            for number in range(count):
                asking.start_soon(ask, number)


async def test_whoever_comes_when_the_queue_is_full_is_refused_at_once(
    transport: KernelVsockTransport,
) -> None:
    """Unlike a unix socket's, so a guest that floods a port waits for nobody and is told."""
    async with transport.listen(6009), AsyncExitStack() as streams:
        with pytest.raises(VsockError, match="reset by peer"):  # noqa: PT012 - how many fit is the kernel's affair
            while True:
                await streams.enter_async_context(await transport.connect(6009, timeout=30))


async def test_descriptors_are_not_inherited(transport: KernelVsockTransport) -> None:
    async with connected(transport, 6010) as (dialled, accepted):
        for stream in (dialled, accepted):
            assert not os.get_inheritable(stream._waitable.sock.fileno())
            assert stream._waitable.sock.family == socket.AF_VSOCK
