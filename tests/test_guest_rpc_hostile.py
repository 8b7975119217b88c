"""The guest's RPC server with hostile guests: bounded in time, memory, calls, connections and log."""

import contextlib
import gc
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import msgpack
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest_rpc_peer import Guest, Server, Vm
from vmactor.actors.guest_connection import CloseReason, GuestRpcLimits
from vmactor.messages import GuestReport, NotifyPayloadStarted

pytestmark = pytest.mark.anyio

REQUEST = msgpack.packb([0, 1, "notifyPayloadStarted", []])


@pytest.fixture
async def server(short_dir: Path) -> AsyncIterator[Server]:
    async with Server(short_dir / "s").running(Vm().report) as server:
        yield server


async def test_garbage_closes_its_connection_and_disturbs_no_other(server: Server) -> None:
    good = server.guest()
    assert await good.call("notifyPayloadStarted") is None
    bad = server.guest()
    await bad.send_raw(b"GET / HTTP/1.1\r\n\r\n")
    assert await bad.closed() == b""
    assert await good.call("notifyPayloadReady") is None
    assert server.statistics.closed == {CloseReason.GARBAGE: 1}


async def test_garbage_inside_a_request_is_answered_before_the_close(server: Server) -> None:
    guest = server.guest()
    await guest.send_raw(b"\x94\x00\x2a\xa1m\xdd\xff\xff\xff\xff")
    _, msgid, error, _ = await guest.answer()
    assert (msgid, error[0]) == (42, -3)
    assert "exceeds max_array_len" in error[1]
    assert await guest.closed() == b""


async def test_calls_before_garbage_are_carried_out(server: Server) -> None:
    guest = server.guest()
    await guest.send_raw(REQUEST + b"\xc1")
    assert await guest.answer() == [1, 1, None, None]
    assert await guest.closed() == b""
    assert server.statistics.calls == 1


async def test_an_oversize_request_is_answered_and_its_connection_closed(server: Server) -> None:
    guest = server.guest()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send_quietly, guest, msgpack.packb([0, 6, "notifyError", [0, "x" * 70_000]]))
        _, msgid, error, _ = await guest.answer()
    assert (msgid, error[:2]) == (6, [-3, "message longer than 65536 bytes"])
    assert await guest.closed() == b""
    assert server.statistics.closed == {CloseReason.OVERSIZE: 1}


async def send_quietly(guest: Guest, data: bytes) -> None:
    with contextlib.suppress(anyio.BrokenResourceError):
        await guest.send_raw(data)


async def test_the_sixteenth_refused_call_is_answered_and_then_it_is_enough(server: Server) -> None:
    guest = server.guest()
    await guest.send(*[[0, i, "reboot", []] for i in range(40)])
    assert [(await guest.answer())[1] for _ in range(16)] == list(range(16))
    assert await guest.closed() == b""
    assert server.statistics.refused_calls == 16
    assert server.statistics.closed == {CloseReason.REFUSALS: 1}


async def test_an_answer_is_no_longer_than_a_small_bound(server: Server) -> None:
    guest = server.guest()
    await guest.send([0, 1, "\U000e0001" * 16_000, []])
    assert len(msgpack.packb(await guest.answer())) < 1500


async def test_closing_in_the_middle_of_a_message_is_told_from_closing_after_one(server: Server) -> None:
    for data in (REQUEST[:5], REQUEST):
        guest = server.guest()
        await guest.send_raw(data)
        if data == REQUEST:
            await guest.answer()
        await server.until_open(1)
        guest.stream.sock.shutdown(1)
        await server.until_open(0)
    assert server.statistics.closed == {CloseReason.BROKEN: 1, CloseReason.END: 1}


@pytest.mark.virtual_time
async def test_a_message_that_trickles_in_is_cut_off_in_time(short_dir: Path) -> None:
    async with Server(short_dir / "s").running(Vm().report) as server:
        good, slow = server.guest(), server.guest()
        assert await good.call("notifyPayloadStarted") is None
        start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(trickle, slow)
            assert await slow.closed(within=60) == b""
            tasks.cancel_scope.cancel()
        assert anyio.current_time() - start == pytest.approx(10, abs=1.5)
        assert await good.call("notifyPayloadReady") is None
        assert server.statistics.closed == {CloseReason.INCOMPLETE: 1}


async def trickle(guest: Guest) -> None:
    for byte in b"\x94\x00\x01\xa9" + b"x" * 100:
        await send_quietly(guest, bytes([byte]))
        await anyio.sleep(1)


@pytest.mark.virtual_time
async def test_a_guest_that_never_reads_is_cut_off_in_time(short_dir: Path) -> None:
    async with Server(short_dir / "s").running(Vm().report, GuestRpcLimits(refusals=10**9)) as server:
        good, deaf = server.guest(), server.guest()
        start = anyio.current_time()
        flood = msgpack.packb([0, 1, "reboot", []]) * 100
        with anyio.fail_after(60), contextlib.suppress(anyio.BrokenResourceError):
            while True:
                await deaf.send_raw(flood)
        assert anyio.current_time() - start == pytest.approx(10, abs=1)
        assert server.statistics.closed == {CloseReason.UNREAD: 1}
        assert await good.call("notifyPayloadStarted") is None


@pytest.mark.virtual_time
async def test_a_flood_of_unknown_notifications_is_slowed_down(short_dir: Path) -> None:
    async with Server(short_dir / "s").running(Vm().report) as server:
        guest = server.guest()
        start = anyio.current_time()
        await guest.send(*[[2, "x", []]] * 116, [0, 1, "notifyPayloadStarted", []])
        assert await guest.answer() == [1, 1, None, None]
        assert anyio.current_time() - start == pytest.approx(10, abs=0.5)


async def test_a_connection_that_has_reported_keeps_its_place_in_a_flood(server: Server) -> None:
    good = server.guest()
    assert await good.call("notifyPayloadStarted") is None
    flood = [server.guest() for _ in range(12)]
    for guest in flood[:-3]:
        assert await guest.closed() == b""
    assert server.statistics.open == 4
    assert await good.call("notifyPayloadReady") is None
    assert server.statistics.closed == {CloseReason.REPLACED: 9}


async def test_a_new_connection_gets_a_place_among_silent_noisy_and_slow_ones(server: Server) -> None:
    silent, noisy, slow, wrong = (server.guest() for _ in range(4))
    await noisy.send(*[[2, "x", []]] * 1000)
    await slow.send_raw(REQUEST[:5])
    assert (await wrong.call("reboot"))[0] == -3
    await server.until_open(4)
    assert await server.guest().call("notifyPayloadStarted") is None
    assert await silent.closed() == b""


async def test_with_every_place_in_use_a_new_connection_is_refused(short_dir: Path) -> None:
    async def report(report: GuestReport) -> None:
        if report != NotifyPayloadStarted():
            await anyio.sleep_forever()

    async with Server(short_dir / "s").running(report) as server:
        useful, *stuck = [server.guest() for _ in range(4)]
        assert await useful.call("notifyPayloadStarted") is None
        for guest in stuck:
            await guest.send([0, 1, "notifyPayloadReady", []])
        await server.until_open(4)
        await anyio.wait_all_tasks_blocked()
        assert await server.guest().closed() == b""
        assert server.statistics.refused_connections == 1
        assert await useful.call("notifyPayloadStarted") is None


@pytest.mark.virtual_time
@pytest.mark.parametrize("data", [b"", b"\xc1", REQUEST[:5], msgpack.packb([0, 1, "x", []]) * 16])
async def test_connections_that_bring_nothing_are_admitted_at_a_bounded_rate(
    short_dir: Path, data: bytes
) -> None:
    async with Server(short_dir / "s").running(Vm().report) as server:
        start = anyio.current_time()
        while anyio.current_time() < start + 10:
            guest = server.guest()
            await send_quietly(guest, data)
            guest.stream.sock.close()
            await anyio.sleep(0.01)
        assert 50 < server.statistics.connections < 110


@pytest.mark.virtual_time
async def test_connections_that_report_are_not_made_to_wait(short_dir: Path) -> None:
    async def accept_all(report: GuestReport) -> None:
        pass

    async with Server(short_dir / "s").running(accept_all) as server:
        start = anyio.current_time()
        for _ in range(50):
            guest = server.guest()
            assert await guest.call("notifyPayloadStarted") is None
            guest.stream.sock.close()
            await server.until_open(0)
        assert anyio.current_time() - start < 1


@pytest.mark.virtual_time
async def test_a_hostile_guest_cannot_fill_the_log(short_dir: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        async with Server(short_dir / "s").running(Vm().report) as server:
            for _ in range(30):
                guest = server.guest()
                await guest.send(*[[0, i, "x\n" * 1000, []] for i in range(16)])
                await guest.closed()
            assert len(logs) == 20
            assert server.statistics.suppressed_log_lines == 30 * 17 - 20
            assert all(len(str(line)) < 500 and "\n" not in str(line) for line in logs)
            await anyio.sleep(60)
            assert (await server.guest().call("x"))[0] == -3
            assert logs[20]["suppressed_before"] == 30 * 17 - 20


async def test_what_a_hostile_guest_can_make_us_hold_is_bounded(server: Server) -> None:
    """Four connections, each with the costliest unfinished message, flooded and replaced again and again."""
    open_arrays = b"\x94\x00\x01\xa1m" + b"\xdc\x00\x20" * 1000
    long_text = b"\x94\x00\x01\xa1m\x91\xdb\x00\x00\xff\xf0" + b"x" * 65_000
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(6):
            for data in (open_arrays, long_text):
                guest = server.guest()
                await send_quietly(guest, data)
                await anyio.wait_all_tasks_blocked()
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


@pytest.mark.parametrize("backend", [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})])
def test_random_bytes_never_disturb_a_guest_that_behaves(backend: tuple[str, dict[str, bool]]) -> None:

    @settings(max_examples=40, deadline=None)
    @given(
        noise=st.lists(
            st.binary(min_size=1, max_size=200)
            | st.tuples(st.binary(max_size=20), st.integers(0, 40)).map(
                lambda x: REQUEST[: x[1]] + x[0] + REQUEST
            ),
            max_size=6,
        )
    )
    def check(noise: list[bytes]) -> None:
        anyio.run(behave_beside, noise, backend=backend[0], backend_options=backend[1])

    check()


async def behave_beside(noise: list[bytes]) -> None:
    path = Path(f"/tmp/vma-{os.getpid()}.s")

    async def accept_all(report: GuestReport) -> None:
        pass

    try:
        async with Server(path).running(accept_all, GuestRpcLimits(pause=0.001)) as server:
            good = server.guest()
            for data in noise:
                assert await good.call("notifyPayloadReady") is None
                bad = server.guest()
                await send_quietly(bad, data)
            assert await good.call("notifyPayloadFinished", 0) is None
            assert server.statistics.closed[CloseReason.INTERNAL] == 0
    finally:
        path.unlink()
