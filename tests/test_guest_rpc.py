"""The guest's RPC server with guests that keep to the protocol, and a VM that refuses, fails or is slow."""

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import msgpack
import pytest
import structlog

from tests.guest_rpc_peer import CID, Server, Vm
from vmactor.actors.guest_connection import CloseReason
from vmactor.actors.guest_rpc import serve_guest_rpc
from vmactor.errors import DeadlineExceededError, VmactorError, VmmError
from vmactor.messages import (
    ErrorCode,
    GuestReport,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
    PayloadState,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def vm() -> Vm:
    return Vm()


@pytest.fixture
async def server(vm: Vm, short_dir: Path) -> AsyncIterator[Server]:
    async with Server(short_dir / "s").running(vm.report) as server:
        yield server


async def test_a_good_run_is_reported_in_order(server: Server, vm: Vm) -> None:
    guest = server.guest()
    assert await guest.call("notifyPayloadStarted") is None
    assert await guest.call("notifyPayloadReady") is None
    assert await guest.call("notifyPayloadFinished", 3) is None
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(3)]
    assert (server.statistics.calls, server.statistics.refused_calls) == (3, 0)


async def test_an_error_is_reported_with_its_code_and_text(server: Server, vm: Vm) -> None:
    assert await server.guest().call("notifyError", 3, "No task in VM config") is None
    assert vm.reports == [NotifyError(ErrorCode.PAYLOAD_CONFIG_INVALID, "No task in VM config")]


async def test_a_text_cut_in_the_middle_of_a_letter_is_still_a_text(server: Server, vm: Vm) -> None:
    guest = server.guest()
    await guest.send_raw(b"\x94\x00\x01\xabnotifyError\x92\x00\xa3ab\xc3")
    assert await guest.answer() == [1, 1, None, None]
    assert vm.reports == [NotifyError(ErrorCode.UNKNOWN, "ab\N{REPLACEMENT CHARACTER}")]


async def test_a_method_name_may_be_bytes(server: Server, vm: Vm) -> None:
    assert await server.guest().call(b"notifyPayloadReady") is None
    assert vm.reports == [NotifyPayloadReady()]


@pytest.mark.parametrize(
    ("first", "then", "text"),
    [
        ("notifyPayloadStarted", "notifyPayloadStarted", "from Started to Started"),
        ("notifyPayloadReady", "notifyPayloadStarted", "from Ready to Started"),
        ("notifyPayloadFinished", "notifyPayloadReady", "from Finished to Ready"),
        ("notifyError", "notifyPayloadFinished", "from Finished to Finished"),
        ("notifyPayloadFinished", "notifyError", "from Finished to Finished"),
    ],
)
async def test_a_step_sideways_or_back_is_refused_and_the_connection_lives(
    server: Server, vm: Vm, first: str, then: str, text: str
) -> None:
    params: dict[str, list[object]] = {"notifyPayloadFinished": [0], "notifyError": [0, "x"]}
    guest = server.guest()
    assert await guest.call(first, *params.get(first, [])) is None
    for _ in range(2):
        error = await guest.call(then, *params.get(then, []))
        assert error == [-5, f"Invalid payload state transition {text}", {"kind": "ILLEGAL_STATE"}]
    assert len(vm.reports) == 1


async def test_steps_may_be_skipped(server: Server, vm: Vm) -> None:
    assert await server.guest().call("notifyPayloadFinished", -1) is None
    assert vm.state is PayloadState.FINISHED


@pytest.mark.parametrize(
    ("method", "params", "text"),
    [
        ("reboot", [], "unknown method 'reboot'"),
        ("notifyPayloadStarted\n", [], r"unknown method 'notifyPayloadStarted\n'"),
        (b"\xff", [], "not UTF-8"),
        (7, [], "must be text"),
        ("notifyPayloadStarted", [1], "takes 0 parameters, not 1"),
        ("notifyPayloadStarted", {}, "must be an array"),
        ("notifyPayloadStarted", None, "must be an array"),
        ("notifyPayloadFinished", [], "takes 1 parameters, not 0"),
        ("notifyPayloadFinished", ["0"], "32-bit"),
        ("notifyPayloadFinished", [True], "32-bit"),
        ("notifyPayloadFinished", [0.0], "32-bit"),
        ("notifyPayloadFinished", [2**31], "32-bit"),
        ("notifyPayloadFinished", [[[]]], "32-bit"),
        ("notifyError", [0], "takes 2 parameters, not 1"),
        ("notifyError", [0, None], "message must be text"),
        ("notifyError", [0, "x" * 4097], "message must be text"),
    ],
)
async def test_a_wrong_call_is_answered_with_illegal_argument(
    server: Server, vm: Vm, method: object, params: object, text: str
) -> None:
    guest = server.guest()
    await guest.send([0, 9, method, params])
    kind, msgid, error, result = await guest.answer()
    assert (kind, msgid, result) == (1, 9, None)
    assert error[0] == -3
    assert text in error[1]
    assert error[2] == {"kind": "ILLEGAL_ARGUMENT"}
    assert vm.reports == []
    assert await guest.call("notifyPayloadStarted") is None


@pytest.mark.parametrize(
    "message", [[0, 5], [0, 5, "notifyPayloadReady"], [0, 5, "notifyPayloadReady", [], 1]]
)
async def test_a_request_of_the_wrong_length_is_answered_and_the_connection_lives(
    server: Server, message: list[object]
) -> None:
    guest = server.guest()
    await guest.send(message)
    assert (await guest.answer())[1:3] == [
        5,
        [-3, "a request is [0, msgid, method, params]", {"kind": "ILLEGAL_ARGUMENT"}],
    ]
    assert await guest.call("notifyPayloadStarted") is None


async def test_a_notification_is_carried_out_without_an_answer(server: Server, vm: Vm) -> None:
    guest = server.guest()
    await guest.send([2, "notifyPayloadStarted", []], [2, "notifyPayloadStarted", []])
    assert await guest.call("notifyPayloadReady") is None  # the first answer is the request's
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady()]
    assert server.statistics.refused_calls == 1


async def test_unknown_notifications_are_ignored_and_counted(server: Server) -> None:
    guest = server.guest()
    hello = [2, b"nvim_set_client_info", ["agent", {"major": 1, "deep": [{}]}, {1: 2}]]
    await guest.send(*[hello] * 16)
    assert await guest.call("notifyPayloadStarted") is None
    assert server.statistics.ignored == 16
    assert server.statistics.refused_calls == 0


async def test_pipelined_requests_are_carried_out_and_answered_in_order(server: Server, vm: Vm) -> None:
    guest = server.guest()
    await guest.send(
        [0, 2**32 - 1, "notifyPayloadStarted", []],
        [0, 0, "notifyPayloadReady", []],
        [2, "hello", []],
        [0, 7, "notifyPayloadReady", []],
        [0, 7, "notifyPayloadFinished", [-(2**31)]],
    )
    answers = [await guest.answer() for _ in range(4)]
    assert [answer[1] for answer in answers] == [2**32 - 1, 0, 7, 7]
    assert [answer[2] is None for answer in answers] == [True, True, False, True]
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(-(2**31))]


async def test_requests_may_be_cut_at_every_byte(server: Server, vm: Vm) -> None:
    data = msgpack.packb([0, 1, "notifyPayloadStarted", []]) + msgpack.packb([0, 2, "notifyError", [2, "é"]])
    guest = server.guest()
    for i in range(len(data)):
        await guest.send_raw(data[i : i + 1])
        await anyio.sleep(0.0005)  # lets the server see the piece; its answer is the same if it does not
    assert await guest.answer() == [1, 1, None, None]
    assert await guest.answer() == [1, 2, None, None]
    assert vm.reports == [NotifyPayloadStarted(), NotifyError(ErrorCode.PAYLOAD_CHANGED, "é")]


async def test_an_answer_comes_only_after_the_report_is_carried_out(short_dir: Path) -> None:
    begun, go = anyio.Event(), anyio.Event()

    async def slow(report: GuestReport) -> None:
        begun.set()
        await go.wait()

    async with Server(short_dir / "s").running(slow) as server:
        guest = server.guest()
        await guest.send([0, 1, "notifyPayloadStarted", []])
        await begun.wait()
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            guest.stream.sock.recv(1)
        go.set()
        assert await guest.answer() == [1, 1, None, None]


async def test_a_report_that_blocks_holds_up_its_own_connection_only(short_dir: Path) -> None:
    vm, begun = Vm(), anyio.Event()

    async def report(report: GuestReport) -> None:
        if report == NotifyPayloadFinished(99):
            begun.set()
            await anyio.sleep_forever()
        await vm.report(report)

    async with Server(short_dir / "s").running(report) as server:
        stuck, other = server.guest(), server.guest()
        await stuck.send([0, 1, "notifyPayloadFinished", [99]])
        await begun.wait()
        assert await other.call("notifyPayloadStarted") is None


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (VmmError("cannot find a VM with CID 2051"), -8, "SERVICE_SPECIFIC"),
        (DeadlineExceededError("the VM's actor did not answer in 5 s"), -129, "TRANSACTION_FAILED"),
    ],
)
async def test_what_the_vm_refuses_with_reaches_the_guest(
    short_dir: Path, error: VmactorError, code: int, kind: str
) -> None:
    async def report(report: GuestReport) -> None:
        raise error

    async with Server(short_dir / "s").running(report) as server:
        assert await server.guest().call("notifyPayloadReady") == [code, str(error), {"kind": kind}]
        assert server.statistics.calls == 0


async def test_text_that_cannot_be_encoded_and_long_text_are_made_to_fit(short_dir: Path) -> None:
    async def report(report: GuestReport) -> None:
        raise VmmError("\udcff" + "x" * 100_000)

    async with Server(short_dir / "s").running(report) as server:
        error = await server.guest().call("notifyPayloadReady")
    assert error[1].startswith(r"\udcffxxx")
    assert len(error[1]) < 2000


async def test_an_unexpected_error_closes_its_connection_only_and_is_logged(short_dir: Path) -> None:
    vm = Vm()

    async def report(report: GuestReport) -> None:
        if report == NotifyPayloadFinished(99):
            raise ExceptionGroup("ours", [KeyError("ours")])
        await vm.report(report)

    with structlog.testing.capture_logs() as logs:
        async with Server(short_dir / "s").running(report) as server:
            broken, other = server.guest(), server.guest()
            await server.until_open(2)
            await broken.send([0, 1, "notifyPayloadFinished", [99]])
            assert await broken.closed() == b""
            assert await other.call("notifyPayloadStarted") is None
            assert server.statistics.closed == {CloseReason.INTERNAL: 1}
    assert {
        "cid": CID,
        "event": "error while serving a guest",
        "exc_info": True,
        "log_level": "warning",
    } in logs


async def test_closing_the_listener_ends_the_server_and_its_connections(short_dir: Path) -> None:
    server, vm = Server(short_dir / "s"), Vm()
    async with anyio.create_task_group() as tasks:

        async def close() -> None:
            await server.until_open(1)
            await server.listener.aclose()

        guest = server.guest()
        tasks.start_soon(close)
        with anyio.fail_after(20):
            await serve_guest_rpc(server.listener, vm.report, cid=CID, statistics=server.statistics)
    assert await guest.closed() == b""
    assert server.statistics.closed == {CloseReason.STOPPED: 1}
    assert server.statistics.open == 0
    guest.stream.sock.close()


@pytest.mark.virtual_time
async def test_an_idle_connection_is_closed_and_another_may_be_made(short_dir: Path) -> None:
    async with Server(short_dir / "s").running(Vm().report) as server:
        guest = server.guest()
        start = anyio.current_time()
        assert await guest.call("notifyPayloadStarted") is None
        assert await guest.closed(within=301) == b""
        assert anyio.current_time() - start == pytest.approx(300, abs=1)
        assert await server.guest().call("notifyPayloadReady") is None
        assert server.statistics.closed == {CloseReason.IDLE: 1}


@pytest.mark.virtual_time
async def test_a_call_begins_the_idle_time_anew(short_dir: Path) -> None:
    async with Server(short_dir / "s").running(Vm().report) as server:
        guest = server.guest()
        for method in ("notifyPayloadStarted", "notifyPayloadReady"):
            await anyio.sleep(299)
            assert await guest.call(method) is None


@pytest.mark.virtual_time
async def test_our_own_slowness_is_not_held_against_the_guest(short_dir: Path) -> None:
    async def slow(report: GuestReport) -> None:
        await anyio.sleep(3600)

    async with Server(short_dir / "s").running(slow) as server:
        guest = server.guest()
        second = msgpack.packb([0, 2, "notifyPayloadReady", []])
        await guest.send_raw(msgpack.packb([0, 1, "notifyPayloadStarted", []]) + second[:5])
        assert (await guest.answer(within=3601))[1] == 1
        await anyio.sleep(9)
        await guest.send_raw(second[5:])
        assert (await guest.answer(within=3601))[1] == 2
