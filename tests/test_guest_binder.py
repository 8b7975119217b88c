"""Guests that speak RPC Binder: what they can do, what libbinder would answer, and hostile ones.

The table of hostile input is libbinder's own behaviour; where our server is stricter (whatever would make it
wait for ever, or hold much), the row says so.
"""

import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest_rpc_peer import Server, UnixStream, Vm
from vmactor.actors.guest_binder import DESCRIPTOR, GuestBinder
from vmactor.actors.guest_connection import CloseReason, GuestRpcLimits
from vmactor.binder.client import Client, RemoteError, TransactionError
from vmactor.binder.parcel import Parcel, ParcelReader
from vmactor.binder.wire import (
    CONNECTION_INIT,
    EXPERIMENTAL_VERSION,
    FLAG_ONEWAY,
    NEW_SESSION_RESPONSE,
    NO_ADDRESS,
    ROOT,
    Address,
    ConnectionHeader,
    DecStrong,
    Message,
    MessageDecoder,
    Reply,
    Status,
    Transaction,
)
from vmactor.errors import ServiceSpecificError
from vmactor.messages import (
    MAX_GUEST_TEXT,
    ErrorCode,
    GuestReport,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
)

pytestmark = pytest.mark.anyio

TOKEN = Parcel().string(DESCRIPTOR).to_bytes()
FIRST = ConnectionHeader(0, incoming=False, fd_mode=0, session_id=None).encode()
PING = int.from_bytes(b"_PNG", "big")


@pytest.fixture
def vm() -> Vm:
    return Vm()


@pytest.fixture
async def server(short_dir: Path, vm: Vm) -> AsyncIterator[Server]:
    async with Server(short_dir / "s").running(vm.report) as server:
        yield server


class BinderGuest:
    """A guest's end of a connection, byte by byte."""

    def __init__(self, stream: UnixStream, version: int = 0) -> None:
        self.stream = stream
        self.decoder = MessageDecoder(version)
        self.version = version

    async def begin(self) -> None:
        """Agree a session and get the root."""
        header = ConnectionHeader(self.version, incoming=False, fd_mode=0, session_id=None)
        await self.stream.send(header.encode() + CONNECTION_INIT)
        assert await self.exactly(8) == NEW_SESSION_RESPONSE.pack(self.version)
        assert (await self.ask(Transaction(NO_ADDRESS, 0))).status == Status.OK

    async def exactly(self, size: int) -> bytes:
        """Some bytes, as they come."""
        data = b""
        with anyio.fail_after(20):
            while len(data) < size:
                data += await self.stream.receive(size - len(data))
        return data

    async def message(self) -> Message:
        """The next message."""
        with anyio.fail_after(20):
            while (message := self.decoder.next()) is None:
                self.decoder.feed(await self.stream.receive())
        return message

    async def ask(self, transaction: Transaction) -> Reply:
        """Send a call and return its reply."""
        await self.stream.send(transaction.encode())
        return await self.reply()

    async def reply(self) -> Reply:
        """The next reply; references that are given back are passed over."""
        while True:
            message = await self.message()
            if isinstance(message, Reply):
                return message
            assert isinstance(message, DecStrong)

    async def closed(self) -> bytes:
        """Wait for the server to close; returns what else it said."""
        rest = b""
        with anyio.fail_after(20), contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                rest += await self.stream.receive()
        return rest


def dial(server: Server, version: int = 0) -> BinderGuest:
    """A connection, closed at the end of the test."""
    return BinderGuest(server.guest().stream, version)


async def with_client(server: Server, act: Callable[[Client], Any], version: int = 0) -> Any:
    """Run ``act`` with a client in a thread."""

    def run() -> Any:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(server.path))
            return act(Client(sock, DESCRIPTOR, version))

    return await anyio.to_thread.run_sync(run)


# -- What a good guest can do ----------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1, EXPERIMENTAL_VERSION])
async def test_a_payloads_life_by_rpc_binder(server: Server, vm: Vm, version: int) -> None:
    def life(client: Client) -> tuple[int, int, int]:
        client.call(1)
        client.call(2)
        client.ping()
        client.call(3, Parcel().int32(-7))
        return client.version, client.max_threads, client.stability

    assert await with_client(server, life, version) == (0, 1, 12)
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(-7)]
    assert server.statistics.calls == 3
    assert server.statistics.protocols == {"RPC Binder, version 0x0": 1}


async def test_version_1_is_a_choice(short_dir: Path, vm: Vm) -> None:
    async with Server(short_dir / "s").running(vm.report, binder=GuestBinder(version=1)) as server:
        assert await with_client(server, lambda client: client.version, 1) == 1
        assert await with_client(server, lambda client: client.version, EXPERIMENTAL_VERSION) == 0
        await with_client(server, lambda client: client.call(1), 1)
    assert vm.reports == [NotifyPayloadStarted()]


async def test_an_error_with_any_text_is_told_and_a_long_one_is_cut(server: Server, vm: Vm) -> None:
    text = "déjà \U0001f600 " + "x" * 2 * MAX_GUEST_TEXT
    await with_client(server, lambda client: client.call(4, Parcel().int32(2).string(text)))
    (report,) = vm.reports
    assert report == NotifyError(ErrorCode.PAYLOAD_CHANGED, text[:MAX_GUEST_TEXT])


async def test_a_refused_report_is_an_exception_and_the_session_goes_on(server: Server, vm: Vm) -> None:
    def refused(client: Client) -> RemoteError:
        client.call(2)
        with pytest.raises(RemoteError) as caught:
            client.call(1)
        client.call(3, Parcel().int32(0))
        return caught.value

    error = await with_client(server, refused)
    assert (error.code, error.message) == (-5, "Invalid payload state transition from Ready to Started")
    assert vm.reports == [NotifyPayloadReady(), NotifyPayloadFinished(0)]
    assert server.statistics.refused_calls == 1


async def test_a_fault_of_the_host_is_a_service_specific_exception(short_dir: Path) -> None:
    async def fail(_report: GuestReport) -> None:
        raise ServiceSpecificError("no VM")

    def refused(client: Client) -> tuple[int, str, int]:
        with pytest.raises(RemoteError) as caught:
            client.call(1)
        return caught.value.code, caught.value.message, caught.value.service_specific

    async with Server(short_dir / "s").running(fail) as server:
        assert await with_client(server, refused) == (-8, "no VM", -1)


async def test_methods_of_later_releases_are_declined_and_unknown_ones_are_unknown(server: Server) -> None:
    def later(client: Client) -> None:
        for code, name in (5, "requestAttestation"), (6, "getSecretkeeper"), (7, "claimSecretkeeperEntry"):
            with pytest.raises(RemoteError, match=name) as caught:
                client.call(code, Parcel().byte_array(b"csr").boolean(True))
            assert caught.value.code == -7
        for code in 8, 0x00FFFFFF, 0x01000000, 0:
            with pytest.raises(TransactionError) as unknown:
                client.call(code)
            assert unknown.value.status == Status.UNKNOWN_TRANSACTION
        client.call(1)

    await with_client(server, later)


async def test_the_table_with_explicit_codes_is_another_choice(short_dir: Path, vm: Vm) -> None:
    def life(client: Client) -> None:
        with pytest.raises(RemoteError, match="registerGuestAgent"):
            client.call(1, Parcel().binder(None))
        client.call(2)
        client.call(4, Parcel().int32(3))

    binder = GuestBinder(release="explicit-codes")
    async with Server(short_dir / "s").running(vm.report, binder=binder) as server:
        await with_client(server, life)
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadFinished(3)]


async def test_arguments_of_another_release_are_refused_and_not_taken_for_a_report(
    server: Server, vm: Vm
) -> None:
    """What a guest with explicit codes means by 1 and 3 must not be taken for Started and Finished."""

    def mistaken(client: Client) -> None:
        with pytest.raises(RemoteError, match="there is more") as surplus:
            client.call(1, Parcel().binder(ROOT, 12))
        assert surplus.value.code == -2
        with pytest.raises(TransactionError) as short:
            client.call(3)
        assert short.value.status == Status.NOT_ENOUGH_DATA
        with pytest.raises(TransactionError) as missing:
            client.call(4, Parcel().int32(1))
        assert missing.value.status == Status.UNEXPECTED_NULL

    await with_client(server, mistaken)
    assert vm.reports == []


@pytest.mark.virtual_time
async def test_a_session_may_be_silent_for_days_between_two_reports(short_dir: Path) -> None:
    """A Microdroid dials once in its life."""
    vm = Vm()
    async with Server(short_dir / "s").running(vm.report) as server:
        guest = dial(server)
        with anyio.CancelScope(shield=True):
            await guest.begin()
            await guest.ask(Transaction(ROOT, 1, parcel=TOKEN))
        await anyio.sleep(7 * 86400)
        await guest.ask(Transaction(ROOT, 2, parcel=TOKEN))
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady()]


# -- Sessions, references, order -------------------------------------------------------------------


async def test_references_come_back_with_each_good_reply_and_add_up_over_bad_ones(server: Server) -> None:
    guest = dial(server)
    await guest.begin()
    await guest.stream.send(Transaction(ROOT, 99, parcel=TOKEN).encode())
    assert await guest.message() == Reply(Status.UNKNOWN_TRANSACTION)
    await guest.stream.send(Transaction(ROOT, PING).encode())
    assert await guest.message() == DecStrong(ROOT, 2)
    assert await guest.message() == Reply(Status.OK)


async def test_giving_the_root_back_ends_the_session_and_nonsense_does_not(server: Server) -> None:
    guest = dial(server)
    await guest.begin()
    for nonsense in DecStrong(ROOT, 2), DecStrong(ROOT, 0), DecStrong(Address(3, 7), 1):
        await guest.stream.send(nonsense.encode())
    assert (await guest.ask(Transaction(ROOT, PING))).status == Status.OK
    await guest.stream.send(DecStrong(ROOT, 1).encode())
    assert await guest.closed() == b""
    await server.until_open(0)
    assert server.statistics.closed == {CloseReason.END: 1}


async def test_one_way_calls_are_carried_out_in_the_order_of_their_numbers(server: Server, vm: Vm) -> None:
    guest = dial(server)
    await guest.begin()

    def oneway(code: int, number: int, parcel: bytes = TOKEN) -> bytes:
        return Transaction(ROOT, code, FLAG_ONEWAY, number, parcel).encode()

    finished = TOKEN + Parcel().int32(0).to_bytes()
    await guest.stream.send(oneway(3, 2, finished) + oneway(2, 1))
    assert (await guest.ask(Transaction(ROOT, PING))).status == Status.OK
    assert vm.reports == []
    await guest.stream.send(oneway(1, 0))
    assert await guest.message() == DecStrong(ROOT, 1)
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(0)]


async def test_a_session_may_have_more_connections_and_one_way_calls_keep_their_order_over_them(
    short_dir: Path, vm: Vm
) -> None:
    async with Server(short_dir / "s").running(vm.report, binder=GuestBinder(max_threads=2)) as server:
        first, second, third, incoming = (dial(server) for _ in range(4))
        await first.begin()
        identity = ParcelReader((await first.ask(Transaction(NO_ADDRESS, 2))).parcel).byte_array()
        join = ConnectionHeader(0, incoming=False, fd_mode=0, session_id=identity).encode() + CONNECTION_INIT
        await second.stream.send(join)
        assert (await second.ask(Transaction(ROOT, PING))).status == Status.OK
        await third.stream.send(join)
        assert await third.closed() == b"", "there are two places"
        await incoming.stream.send(
            ConnectionHeader(0, incoming=True, fd_mode=0, session_id=identity).encode()
        )
        assert await incoming.exactly(8) == CONNECTION_INIT

        await second.stream.send(Transaction(ROOT, 2, FLAG_ONEWAY, 1, TOKEN).encode())
        assert (await second.ask(Transaction(ROOT, PING))).status == Status.OK
        assert vm.reports == []
        await first.stream.send(Transaction(ROOT, 1, FLAG_ONEWAY, 0, TOKEN).encode())
        assert (await first.ask(Transaction(ROOT, PING))).status == Status.OK
        assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady()]

        # What breaks the protocol ends the whole session, on all its connections.
        await first.stream.send(b"\x07" + bytes(15))
        for guest in first, second, incoming:
            await guest.closed()


async def test_an_identity_of_a_session_that_ended_is_unknown(short_dir: Path, vm: Vm) -> None:
    async with Server(short_dir / "s").running(vm.report, binder=GuestBinder(max_threads=2)) as server:
        guest = dial(server)
        await guest.begin()
        identity = ParcelReader((await guest.ask(Transaction(NO_ADDRESS, 2))).parcel).byte_array()
        await guest.stream.aclose()
        await server.until_open(0)
        late = dial(server)
        await late.stream.send(ConnectionHeader(0, incoming=False, fd_mode=0, session_id=identity).encode())
        assert await late.closed() == b""


# -- Hostile guests --------------------------------------------------------------------------------

ANSWER = NEW_SESSION_RESPONSE.pack(0)
BEGINNINGS = {
    "session identity of another size": (FIRST[:14] + b"\x10\x00" + bytes(16), b""),
    "unknown session": (ConnectionHeader(0, incoming=False, fd_mode=0, session_id=bytes(32)).encode(), b""),
    "new session for our calls": (
        ConnectionHeader(0, incoming=True, fd_mode=0, session_id=None).encode(),
        ANSWER,
    ),
    "descriptors by unix socket": (
        ConnectionHeader(0, incoming=False, fd_mode=1, session_id=None).encode(),
        ANSWER,
    ),
    "wrong confirmation": (FIRST + b"ccix" + bytes(4), ANSWER),
}


@pytest.mark.parametrize("name", BEGINNINGS)
async def test_a_beginning_that_is_none_is_closed(server: Server, name: str) -> None:
    sent, said = BEGINNINGS[name]
    guest = dial(server)
    await guest.stream.send(sent)
    assert await guest.closed() == said
    assert server.statistics.closed == {CloseReason.GARBAGE: 1}


@pytest.mark.parametrize("version", [1, 2, 3, 7, 15, 0x93000000, 0xFFFFFF00])
async def test_any_version_is_answered_with_one_that_we_speak(server: Server, version: int) -> None:
    guest = dial(server)
    header = ConnectionHeader(version, incoming=False, fd_mode=0, session_id=None)
    await guest.stream.send(header.encode() + CONNECTION_INIT)
    assert await guest.exactly(8) == ANSWER


def raw(command: int, size: int, body: bytes = b"") -> bytes:
    """A message whose header says anything."""
    return command.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(8) + body


BREAKS = {
    "reply to a server": raw(1, 4, bytes(4)),
    "unknown command": raw(3, 0),
    "huge command": raw(0xFFFFFFFF, 0),
    "body over the limit": raw(0, 100_001),
    "largest body": raw(0, 0xFFFFFFFF),
    "call shorter than a call": raw(0, 39, bytes(39)),
    "DEC_STRONG of another size": raw(2, 12, bytes(12)),
    "object that was not handed out": Transaction(Address(3, 1), 1, parcel=TOKEN).encode(),
    "object of the client": Transaction(Address(1, 0), 1, parcel=TOKEN).encode(),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_what_breaks_the_protocol_ends_the_session_and_disturbs_no_other(
    server: Server, vm: Vm, name: str
) -> None:
    other, guest = dial(server), dial(server)
    await other.begin()
    await guest.begin()
    await guest.stream.send(BREAKS[name])
    assert await guest.closed() == b""
    assert (await other.ask(Transaction(ROOT, 1, parcel=TOKEN))).status == Status.OK
    assert vm.reports == [NotifyPayloadStarted()]
    expected = CloseReason.OVERSIZE if "body" in name else CloseReason.GARBAGE
    assert server.statistics.closed == {expected: 1}


async def test_the_root_must_be_handed_out_before_it_can_be_called(server: Server) -> None:
    guest = dial(server)
    await guest.stream.send(FIRST + CONNECTION_INIT)
    await guest.exactly(8)
    await guest.stream.send(Transaction(ROOT, 1, parcel=TOKEN).encode())
    assert await guest.closed() == b""


MALFORMED = {
    "unknown option of an address": (Transaction(Address(7, 0), 1, parcel=TOKEN), Status.BAD_VALUE),
    "special transaction that is none": (Transaction(NO_ADDRESS, 3), Status.UNKNOWN_TRANSACTION),
    "no interface token": (Transaction(ROOT, 1), Status.BAD_TYPE),
    "another interface": (Transaction(ROOT, 1, parcel=Parcel().string("a.b.C").to_bytes()), Status.BAD_TYPE),
    "token longer than its parcel": (
        Transaction(ROOT, 1, parcel=Parcel().int32(2**31 - 1).to_bytes()),
        Status.BAD_TYPE,
    ),
    "token without end": (Transaction(ROOT, 1, parcel=TOKEN[:-2] + b"xx"), Status.BAD_TYPE),
    "missing number": (Transaction(ROOT, 3, parcel=TOKEN), Status.NOT_ENOUGH_DATA),
    "null message": (
        Transaction(ROOT, 4, parcel=TOKEN + Parcel().int32(0).string(None).to_bytes()),
        Status.UNEXPECTED_NULL,
    ),
    "message of negative length": (
        Transaction(ROOT, 4, parcel=TOKEN + Parcel().int32(0).int32(-2).to_bytes()),
        Status.UNEXPECTED_NULL,
    ),
    "message longer than its parcel": (
        Transaction(ROOT, 4, parcel=TOKEN + Parcel().int32(0).int32(1000).to_bytes()),
        Status.UNEXPECTED_NULL,
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_call_is_answered_and_the_session_goes_on(
    server: Server, vm: Vm, name: str
) -> None:
    transaction, status = MALFORMED[name]
    guest = dial(server)
    await guest.begin()
    assert (await guest.ask(transaction)).status == status
    assert vm.reports == []
    assert (await guest.ask(Transaction(ROOT, 1, parcel=TOKEN))).status == Status.OK
    assert vm.reports == [NotifyPayloadStarted()]


async def test_a_table_of_objects_is_refused_since_no_descriptors_can_come(short_dir: Path, vm: Vm) -> None:
    async with Server(short_dir / "s").running(vm.report, binder=GuestBinder(version=1)) as server:
        guest = dial(server, version=1)
        await guest.begin()
        for address, code in (ROOT, 1), (ROOT, PING), (NO_ADDRESS, 1):
            reply = await guest.ask(Transaction(address, code, parcel=TOKEN, objects=bytes(4)))
            assert reply.status == Status.BAD_VALUE
        await guest.stream.send(Transaction(ROOT, PING).encode())
        assert await guest.message() == DecStrong(ROOT, 3), "refused calls brought references, too"
        assert await guest.reply() == Reply(Status.OK)
        await guest.stream.send(Transaction(ROOT, 1, parcel=TOKEN, objects=bytes(3)).encode())
        assert await guest.closed() == b""
    assert vm.reports == []


async def test_tables_of_held_one_way_calls_are_bounded_too(short_dir: Path, vm: Vm) -> None:
    async with Server(short_dir / "s").running(vm.report, binder=GuestBinder(version=1)) as server:
        guest = dial(server, version=1)
        await guest.begin()
        large = bytes(90_000)
        with contextlib.suppress(anyio.BrokenResourceError):
            for number in range(1, 4):
                await guest.stream.send(
                    Transaction(ROOT, 1, FLAG_ONEWAY, number, TOKEN, objects=large).encode()
                )
        assert await guest.closed() == b""
        assert server.statistics.closed == {CloseReason.GARBAGE: 1}


async def test_what_every_binder_answers_is_answered_as_libbinder_does(server: Server) -> None:
    answers = {
        b"_PNG": Reply(Status.OK),
        b"_DMP": Reply(Status.OK),
        b"_CMD": Reply(Status.OK),
        b"_EXT": Reply(Status.OK, bytes(8)),
        b"_NTF": Reply(Status.OK, TOKEN),
        b"_SPR": Reply(Status.INVALID_OPERATION),
        b"_RPC": Reply(Status.INVALID_OPERATION),
        b"_SRD": Reply(Status.INVALID_OPERATION),
        b"_ERD": Reply(Status.INVALID_OPERATION),
        b"_TWT": Reply(Status.UNKNOWN_TRANSACTION),
        b"_LIK": Reply(Status.UNKNOWN_TRANSACTION),
        b"_PID": Reply(Status.UNKNOWN_TRANSACTION),  # libbinder tells its process number
    }
    guest = dial(server)
    await guest.begin()
    for name, answer in answers.items():
        assert await guest.ask(Transaction(ROOT, int.from_bytes(name, "big"))) == answer, name


async def test_held_one_way_calls_are_bounded(server: Server) -> None:
    """libbinder holds 10,000 of them."""
    guest = dial(server)
    await guest.begin()
    calls = b"".join(Transaction(ROOT, 1, FLAG_ONEWAY, n, TOKEN).encode() for n in range(1, 200))
    with contextlib.suppress(anyio.BrokenResourceError):
        await guest.stream.send(calls)
    assert await guest.closed() == b""
    assert server.statistics.closed == {CloseReason.GARBAGE: 1}


async def test_a_session_that_is_half_begun_or_half_said_ends_at_its_deadline(
    short_dir: Path, vm: Vm
) -> None:
    """libbinder waits for ever, and holds a thread."""
    limits = GuestRpcLimits(message_time=0.2)
    async with Server(short_dir / "s").running(vm.report, limits) as server:
        half_header, no_init, half_call = (dial(server) for _ in range(3))
        await half_header.stream.send(FIRST[:7])
        await no_init.stream.send(FIRST)
        await half_call.begin()
        await half_call.stream.send(Transaction(ROOT, 1, parcel=TOKEN).encode()[:-1])
        for guest in half_header, no_init, half_call:
            await guest.closed()
    assert server.statistics.closed == {CloseReason.INCOMPLETE: 3}


@pytest.mark.virtual_time
async def test_calls_that_report_nothing_cost_time(short_dir: Path) -> None:
    """A guest that pings for ever must not burn a processor of the host."""
    async with Server(short_dir / "s").running(Vm().report) as server:
        guest = dial(server)
        await guest.begin()
        before = anyio.current_time()
        for _ in range(100):
            await guest.ask(Transaction(ROOT, PING))
        assert anyio.current_time() - before > 8


async def test_new_sessions_do_not_drive_out_one_that_has_reported(server: Server, vm: Vm) -> None:
    good = dial(server)
    await good.begin()
    await good.ask(Transaction(ROOT, 1, parcel=TOKEN))
    for _ in range(20):
        flood = dial(server)
        await flood.stream.send(FIRST + CONNECTION_INIT)
    assert (await good.ask(Transaction(ROOT, 2, parcel=TOKEN))).status == Status.OK
    assert server.statistics.open <= GuestRpcLimits().connections
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady()]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_noise_behind_a_good_beginning_harms_nobody(data: st.DataObject) -> None:
    """Any bytes, on asyncio and with a good guest beside."""
    noise = data.draw(st.binary(max_size=400))

    async def run() -> None:
        import tempfile

        vm = Vm()
        with tempfile.TemporaryDirectory() as name:
            limits = GuestRpcLimits(message_time=0.05)
            async with Server(Path(name) / "s").running(vm.report, limits) as server:
                bad, good = dial(server), dial(server)
                await bad.begin()
                await bad.stream.send(noise)
                await good.begin()
                assert (await good.ask(Transaction(ROOT, PING))).status == Status.OK

    anyio.run(run)
