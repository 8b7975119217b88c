"""RPC Binder's bytes, both ways, against dumps that were captured from libbinder itself.

The dumps are of protocol versions 0 and 1, with a session identity of 00..1f. They are written here as
libbinder sent them, word by word; only the interface's name, which is in nearly all of them, stands once.
"""

import itertools
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmactor.actors.guest_binder import DESCRIPTOR, INTERFACES
from vmactor.binder.parcel import Parcel, ParcelError, ParcelReader
from vmactor.binder.server import BinderException, Call, Limits, Session
from vmactor.binder.wire import (
    CONNECTION_INIT,
    EXPERIMENTAL_VERSION,
    MAX_BODY,
    NEW_SESSION_RESPONSE,
    NO_ADDRESS,
    ROOT,
    Address,
    ConnectionHeader,
    ConnectionInit,
    DecStrong,
    HandshakeDecoder,
    Message,
    MessageDecoder,
    ProtocolError,
    Reply,
    Status,
    Transaction,
    negotiate,
)

IDENTITY = bytes(range(32))


def dump(text: str) -> bytes:
    """Bytes of a dump; comments behind ``#``, the interface's name as ``TOKEN``."""
    plain = " ".join(line.split("#")[0] for line in text.splitlines())
    return bytes.fromhex(plain.replace("TOKEN", TOKEN))


TOKEN = """3b000000
61006e00640072006f00690064002e00 730079007300740065006d002e007600
690072007400750061006c006d006100 6300680069006e006500730065007200
76006900630065002e00490056006900 72007400750061006c004d0061006300
680069006e0065005300650072007600 690063006500 0000"""

HEADER_V0 = dump("00000000 00 00 0000000000000000 0000")
HEADER_V1 = dump("01000000 00 00 0000000000000000 0000")
HEADER_EXPERIMENTAL = dump("000000f0 00 00 0000000000000000 0000")
INIT = dump("63636900 00000000")


def special(code: str) -> bytes:
    """A special transaction's dump."""
    return dump(f"00000000 28000000 0000000000000000 0000000000000000 {code}000000" + "00" * 28)


def call(code: str, size: int, arguments: str = "") -> bytes:
    """A call of the root with the interface's name and more arguments."""
    body = (40 + size).to_bytes(4, "little").hex()
    return dump(
        f"00000000 {body} 0000000000000000 0300000000000000 {code} 00000000 0000000000000000"
        f"{size.to_bytes(4, 'little').hex()} 000000000000000000000000"
        + (f"TOKEN {arguments}" if size else "")
    )


DESCRIPTOR_QUERY = call("46544e5f", 0)
STARTED = call("01000000", 124)
READY = call("02000000", 124)
FINISHED_7 = call("03000000", 128, "07000000")
ERROR_X = call("04000000", 136, "02000000 01000000 78000000")
DEC_STRONG = dump("02000000 10000000 0000000000000000 0300000000000000 01000000 00000000")

MAX_THREADS_V0 = dump("01000000 08000000 0000000000000000 00000000 01000000")
MAX_THREADS_V1 = dump("01000000 18000000 0000000000000000 00000000 04000000" + "00" * 12 + "01000000")
SESSION_ID_V0 = dump("01000000 28000000 0000000000000000 00000000 20000000" + IDENTITY.hex())
SESSION_ID_V1 = dump(
    "01000000 38000000 0000000000000000 00000000 24000000" + "00" * 12 + "20000000" + IDENTITY.hex()
)
ROOT_V0 = dump("01000000 14000000 0000000000000000 00000000 01000000 0300000000000000 0c000000")
ROOT_V1 = dump(
    "01000000 24000000 0000000000000000 00000000 10000000" + "00" * 12 + "01000000 0300000000000000 0c000000"
)
DESCRIPTOR_V0 = dump("01000000 80000000 0000000000000000 00000000 TOKEN")
DESCRIPTOR_V1 = dump("01000000 90000000 0000000000000000 00000000 7c000000" + "00" * 12 + "TOKEN")
OK_V0 = dump("01000000 08000000 0000000000000000 00000000 00000000")
OK_V1 = dump("01000000 18000000 0000000000000000 00000000 04000000" + "00" * 12 + "00000000")

REFUSAL_TEXT = """3a000000
49006e00760061006c00690064002000 7000610079006c006f00610064002000
73007400610074006500200074007200 61006e0073006900740069006f006e00
2000660072006f006d00200046006900 6e006900730068006500640020007400
6f002000460069006e00690073006800 65006400 00000000"""
REFUSED_V0 = dump(
    "01000000 88000000 0000000000000000 00000000 fbffffff " + REFUSAL_TEXT.replace("\n", " ") + "00000000"
)
REFUSED_V1 = dump(
    "01000000 98000000 0000000000000000 00000000 84000000"
    + "00" * 12
    + "fbffffff "
    + REFUSAL_TEXT.replace("\n", " ")
    + "00000000"
)
UNKNOWN_V0 = dump("01000000 04000000 0000000000000000 b6ffffff")
UNKNOWN_V1 = dump("01000000 14000000 0000000000000000 b6ffffff 00000000" + "00" * 12)
WRONG_TOKEN_V1 = dump("01000000 14000000 0000000000000000 01000080 00000000" + "00" * 12)
PING_V1 = dump("01000000 14000000 0000000000000000 00000000 00000000" + "00" * 12)
NO_VM_V1 = dump(
    "01000000 60000000 0000000000000000 00000000 4c000000"
    + "00" * 12
    + """f8ffffff 1c000000
    630061006e006e006f00740020006600 69006e00640020006100200056004d00
    20007700690074006800200043004900 44002000310030000000 0000 00000000 ffffffff"""
)


def messages(data: bytes, version: int = 1) -> list[Message]:
    """All messages in some bytes."""
    decoder = MessageDecoder(version)
    decoder.feed(data)
    found: list[Message] = []
    while (message := decoder.next()) is not None:
        found.append(message)
    assert decoder.pending == 0
    return found


def agreed(version: int, **limits: int) -> Session:
    """A session of the guests' interface."""
    return Session(IDENTITY, version, INTERFACES["android13"], Limits(**limits))


REFUSAL = BinderException(-5, "Invalid payload state transition from Finished to Finished")

CONVERSATION = [
    (special("01"), MAX_THREADS_V0, MAX_THREADS_V1),
    (special("02"), SESSION_ID_V0, SESSION_ID_V1),
    (special("00"), ROOT_V0, ROOT_V1),
    (DESCRIPTOR_QUERY, DEC_STRONG + DESCRIPTOR_V0, DEC_STRONG + DESCRIPTOR_V1),
    (STARTED, DEC_STRONG + OK_V0, DEC_STRONG + OK_V1),
    (READY, DEC_STRONG + OK_V0, DEC_STRONG + OK_V1),
    (FINISHED_7, DEC_STRONG + OK_V0, DEC_STRONG + OK_V1),
    (ERROR_X, DEC_STRONG + REFUSED_V0, DEC_STRONG + REFUSED_V1),
]


@pytest.mark.parametrize("version", [0, 1])
def test_a_whole_session_is_answered_as_libbinder_answers_it(version: int) -> None:
    session = agreed(version)
    called = []
    for question, *answers in CONVERSATION:
        (message,) = messages(question, version)
        outcome = session.receive(message)
        if isinstance(outcome, Call):
            called.append((outcome.method.name, outcome.arguments))
            outcome = session.finish(outcome, REFUSAL if outcome.method.name == "notifyError" else None)
        assert outcome == answers[version]
    assert called == [
        ("notifyPayloadStarted", ()),
        ("notifyPayloadReady", ()),
        ("notifyPayloadFinished", (7,)),
        ("notifyError", (2, "x")),
    ]


@pytest.mark.parametrize(
    ("header", "version"), [(HEADER_V0, 0), (HEADER_V1, 1), (HEADER_EXPERIMENTAL, EXPERIMENTAL_VERSION)]
)
def test_a_connections_beginning_is_understood_and_made(header: bytes, version: int) -> None:
    decoder = HandshakeDecoder()
    decoder.feed(header + INIT + STARTED)
    assert decoder.next() == ConnectionHeader(version, incoming=False, fd_mode=0, session_id=None)
    assert decoder.next() == ConnectionInit()
    assert decoder.rest() == STARTED
    assert ConnectionHeader(version, incoming=False, fd_mode=0, session_id=None).encode() == header
    assert CONNECTION_INIT == INIT


def test_connections_that_join_a_session_are_understood_and_made() -> None:
    outgoing = dump("01000000 00 00 0000000000000000 2000" + IDENTITY.hex())
    incoming = dump("01000000 01 00 0000000000000000 2000" + IDENTITY.hex())
    for data, calls_us in (outgoing, False), (incoming, True):
        decoder = HandshakeDecoder()
        decoder.feed(data)
        header = ConnectionHeader(1, incoming=calls_us, fd_mode=0, session_id=IDENTITY)
        assert decoder.next() == header
        assert header.encode() == data


def test_a_clients_messages_are_made_as_libbinder_makes_them() -> None:
    token = Parcel().string(DESCRIPTOR).to_bytes()
    assert Transaction(NO_ADDRESS, 1).encode() == special("01")
    assert Transaction(ROOT, 0x5F4E5446).encode() == DESCRIPTOR_QUERY
    assert Transaction(ROOT, 1, parcel=token).encode() == STARTED
    finished = token + Parcel().int32(7).to_bytes()
    assert Transaction(ROOT, 3, parcel=finished).encode() == FINISHED_7
    error = token + Parcel().int32(2).string("x").to_bytes()
    assert Transaction(ROOT, 4, parcel=error).encode() == ERROR_X
    assert DecStrong(ROOT, 1).encode() == DEC_STRONG
    assert NEW_SESSION_RESPONSE.pack(1) == dump("01000000 00000000")


@pytest.mark.parametrize(
    ("reply", "version", "expected"),
    [
        (Reply(Status.UNKNOWN_TRANSACTION), 0, UNKNOWN_V0),
        (Reply(Status.UNKNOWN_TRANSACTION), 1, UNKNOWN_V1),
        (Reply(Status.BAD_TYPE), 1, WRONG_TOKEN_V1),
        (Reply(Status.OK), 1, PING_V1),
        (Reply(Status.OK, BinderException(-8, "cannot find a VM with CID 10", -1).encode()), 1, NO_VM_V1),
    ],
)
def test_replies_are_made_and_understood(reply: Reply, version: int, expected: bytes) -> None:
    assert reply.encode(version) == expected
    assert messages(expected, version) == [reply]


def test_encodings_that_upstream_keeps_frozen() -> None:
    assert Parcel().string("tok").to_bytes() == dump("03000000 74006f006b000000")
    assert BinderException(-8, ":/", 8).encode() == dump(
        "f8ffffff 02000000 3a002f00 00000000 00000000 08000000"
    )
    assert BinderException(7, ":D").encode() == dump("07000000 02000000 3a004400 00000000 00000000")


def test_version_0_looks_at_no_parcel_size_and_version_1_at_nothing_else() -> None:
    garbled = bytearray(STARTED)
    garbled[0x28:0x2C] = b"\xff\xff\xff\xff"
    (message,) = messages(bytes(garbled), version=0)
    assert isinstance(message, Transaction)
    assert len(message.parcel) == 124
    with pytest.raises(ProtocolError):
        messages(bytes(garbled), version=1)


def test_the_version_is_the_smaller_one_but_experimental_clients_get_0() -> None:
    offers = [0, 1, 2, 7, EXPERIMENTAL_VERSION, 0xFFFFFFFF]
    assert [negotiate(offer, 0) for offer in offers] == [0, 0, 0, 0, 0, 0]
    assert [negotiate(offer, 1) for offer in offers] == [0, 1, 1, 1, 0, 1]


# -- Properties ------------------------------------------------------------------------------------


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The data, cut at some places."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    for start, end in itertools.pairwise(places):
        yield data[start:end]


addresses = st.builds(Address, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
any_message = st.one_of(
    st.builds(
        Transaction,
        addresses,
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**64 - 1),
        st.binary(max_size=300),
        st.just(b""),
    ),
    st.builds(Reply, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=300)),
    st.builds(DecStrong, addresses, st.integers(0, 2**32 - 1)),
)


def encoded(message: Message, version: int) -> bytes:
    """A message's bytes in a version."""
    return message.encode(version) if isinstance(message, Reply) else message.encode()


@given(st.lists(any_message, max_size=6), st.lists(st.integers(0, 5000)), st.sampled_from([0, 1]))
def test_messages_survive_any_split_of_the_stream(sent: list[Message], cuts: list[int], version: int) -> None:
    decoder = MessageDecoder(version)
    received: list[Message] = []
    for piece in pieces(b"".join(encoded(message, version) for message in sent), cuts):
        decoder.feed(piece)
        while (message := decoder.next()) is not None:
            received.append(message)
    assert received == sent
    assert decoder.pending == 0


@given(
    st.lists(st.integers(0, 100)), st.sampled_from([None, IDENTITY]), st.integers(0, 2**32 - 1), st.booleans()
)
def test_a_beginning_survives_any_split(
    cuts: list[int], identity: bytes | None, version: int, incoming: bool
) -> None:
    header = ConnectionHeader(version, incoming, 0, identity)
    decoder = HandshakeDecoder()
    got = []
    for piece in pieces(header.encode() + INIT, cuts):
        decoder.feed(piece)
        while (item := decoder.next()) is not None:
            got.append(item)
            if len(got) == 2:
                break
    assert got == [header, ConnectionInit()]


values = st.one_of(
    st.integers(-(2**31), 2**31 - 1).map(lambda value: ("int32", value)),
    st.integers(-(2**63), 2**63 - 1).map(lambda value: ("int64", value)),
    st.booleans().map(lambda value: ("boolean", value)),
    st.text().map(lambda value: ("string", value)),
    st.none().map(lambda value: ("byte_array", value)),
    st.binary().map(lambda value: ("byte_array", value)),
)


@given(st.lists(values))
@example([("string", "\U0001f600 beyond the basic plane")])
@example([("string", "a\0b")])
def test_what_a_parcel_takes_it_gives_back(items: list[tuple[str, object]]) -> None:
    parcel = Parcel()
    for kind, value in items:
        getattr(parcel, kind)(value)
        assert len(parcel.to_bytes()) % 4 == 0
    reader = ParcelReader(parcel.to_bytes())
    assert [(kind, getattr(reader, kind)()) for kind, _ in items] == items
    assert reader.left == 0


@given(
    st.binary(max_size=200), st.lists(st.sampled_from(["int32", "int64", "string", "byte_array", "binder"]))
)
def test_a_parcel_of_any_bytes_gives_values_or_a_parcel_error(data: bytes, kinds: list[str]) -> None:
    reader = ParcelReader(data)
    with suppress(ParcelError):
        for kind in kinds:
            getattr(reader, kind)()
    assert 0 <= reader.left <= len(data)


@given(st.binary(max_size=300), st.sampled_from([0, 1]))
@example(dump("00000000 a1860100 0000000000000000"), 0)
@example(dump("02000000 08000000 0000000000000000 0000000000000000"), 1)
def test_any_bytes_are_messages_or_break_the_protocol(data: bytes, version: int) -> None:
    decoder = MessageDecoder(version)
    decoder.feed(data)
    try:
        while decoder.next() is not None:
            pass
    except ProtocolError:
        return
    assert decoder.pending <= MAX_BODY + 16


def test_a_length_over_the_limit_is_refused_before_the_body_comes() -> None:
    decoder = MessageDecoder(0)
    decoder.feed(dump("00000000 a1860100 0000000000000000"))
    with pytest.raises(ProtocolError) as caught:
        decoder.next()
    assert caught.value.oversize
    largest = MessageDecoder(0)
    largest.feed(dump("00000000 a0860100 0000000000000000") + bytes(MAX_BODY))
    assert isinstance(largest.next(), Transaction)
