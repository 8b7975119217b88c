"""MessagePack-RPC's bytes: what is a call, what is answered with an error, what ends the stream."""

import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.errors import IllegalStateError
from vmactor.messagepack_rpc import CHUNK, BadMessageError, Call, CallDecoder, encode_answer

SIZE = 4096


def decoder(message_size: int = SIZE) -> CallDecoder:
    return CallDecoder(message_size=message_size, containers=64)


def outcome(data: bytes, piece: int = CHUNK) -> list[Any]:
    """What comes out of a stream fed in pieces: calls, errors, and how many bytes are left over."""
    decode = decoder()
    out: list[Any] = []
    for start in range(0, len(data), piece):
        decode.feed(data[start : start + piece])
        while True:
            try:
                if (call := decode.next()) is None:
                    break
                out.append(call)
            except BadMessageError as error:
                out.append((error.msgid, error.fatal, error.oversize))
                if error.fatal:
                    return out
    return [*out, decode.pending]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
MESSAGES = st.tuples(
    st.sampled_from([0, 1, 2, 3, True, None]), st.integers(-1, 2**32) | st.text(), VALUES, VALUES
) | st.lists(VALUES, max_size=10)


@given(
    msgid=st.integers(0, 2**32 - 1),
    method=st.text(),
    params=st.lists(st.integers(-(2**63), 2**64 - 1), max_size=32),
)
def test_requests_and_notifications_come_through(msgid: int, method: str, params: list[int]) -> None:
    data = msgpack.packb([0, msgid, method, params]) + msgpack.packb([2, method, params])
    assert outcome(data) == [Call(msgid, method, params), Call(None, method, params), 0]


@given(messages=st.lists(MESSAGES, max_size=4), piece=st.integers(1, 40), cut=st.integers(0, 40))
def test_the_same_comes_out_however_the_stream_is_cut(messages: list[Any], piece: int, cut: int) -> None:
    data = b"".join(msgpack.packb(message) for message in messages)
    data = data[: max(0, len(data) - cut)]
    assert str(outcome(data, piece)) == str(outcome(data))  # as text, since not-a-number differs from itself


@given(data=st.binary(max_size=300), piece=st.integers(1, 40))
def test_any_bytes_are_calls_or_bad_messages_and_nothing_else(data: bytes, piece: int) -> None:
    assert str(outcome(data, piece)) == str(outcome(data))


@pytest.mark.parametrize(
    ("message", "msgid"),
    [
        ([0, 5, "m"], 5),
        ([0, 5], 5),
        ([0, 5, "m", [], None, None, None, None], 5),
    ],
)
def test_a_request_of_the_wrong_length_can_be_answered(message: list[Any], msgid: int) -> None:
    good = msgpack.packb([2, "m", []])
    assert outcome(msgpack.packb(message) + good) == [(msgid, False, False), Call(None, "m", []), 0]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xc1", id="the byte that means nothing"),
        pytest.param(b"GET / HTTP/1.1\r\n", id="another protocol"),
        pytest.param(bytes(16), id="zeros"),
        pytest.param(msgpack.packb({"a": 1}), id="a map"),
        pytest.param(msgpack.packb([]), id="an empty array"),
        pytest.param(msgpack.packb([0] * 9), id="too many elements"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="four thousand million elements"),
        pytest.param(msgpack.packb([1, 1, None, None]), id="an answer"),
        pytest.param(msgpack.packb([3, 1, "m", []]), id="an unknown kind"),
        pytest.param(msgpack.packb([False, 1, "m", []]), id="false for a kind"),
        pytest.param(msgpack.packb([0.0, 1, "m", []]), id="a float for a kind"),
        pytest.param(msgpack.packb([2, "m"]), id="a notification too short"),
        pytest.param(msgpack.packb([True + 1.0, "m", []]), id="a float for a notification"),
        pytest.param(msgpack.packb([0, -1, "m", []]), id="a negative number"),
        pytest.param(msgpack.packb([0, 2**32, "m", []]), id="a number too great"),
        pytest.param(msgpack.packb([0, True, "m", []]), id="true for a number"),
        pytest.param(msgpack.packb([0, "1", "m", []]), id="text for a number"),
    ],
)
def test_what_is_no_call_and_has_no_number_ends_the_stream(data: bytes) -> None:
    assert outcome(data + b"\x00") == [(None, True, False)]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(b"\xdd\xff\xff\xff\xff", id="an array of four thousand million"),
        pytest.param(b"\xdc\x00\x21" + b"\x00" * 33, id="an array of 33"),
        pytest.param(b"\xdf\xff\xff\xff\xff", id="a map of four thousand million"),
        pytest.param(b"\x91" * 64 + b"\x90", id="65 nested arrays"),
        pytest.param(b"\x81\x00" * 64 + b"\x80", id="65 nested maps"),
        pytest.param(b"\x91" * 3000, id="nested without end"),
        pytest.param(b"\x92" + (b"\xdc\x00\x20" + b"\x90" * 32) * 2, id="67 arrays side by side"),
        pytest.param(b"\x91\xc1", id="the byte that means nothing"),
        pytest.param(b"\x91\xc7\x05\xff\x00\x00\x00\x00\x00", id="a bad timestamp"),
    ],
)
def test_bad_parameters_are_told_to_whom_they_belong_and_end_the_stream(params: bytes) -> None:
    request = b"\x94\x00\x07\xa1m" + params
    assert outcome(request) == [(7, True, False)]
    assert outcome(request, piece=1) == [(7, True, False)]


def test_as_many_containers_as_allowed_come_through() -> None:
    nested: list[Any] = []
    for _ in range(63):
        nested = [nested]
    assert outcome(msgpack.packb([2, "m", nested])) == [Call(None, "m", nested), 0]


def test_a_map_is_never_taken_for_an_array() -> None:
    assert outcome(msgpack.packb([2, "m", {}])) == [Call(None, "m", ()), 0]


@pytest.mark.parametrize("piece", [1, 1000, CHUNK])
def test_a_message_may_be_as_long_as_the_limit_and_no_longer(piece: int) -> None:
    def message(size: int) -> bytes:
        data: bytes = msgpack.packb([0, 7, "m", ["x" * (size - 9)]])
        assert len(data) == size
        return data

    assert outcome(message(SIZE) * 3, piece)[-1] == 0
    assert outcome(message(SIZE) + message(SIZE + 1), piece)[1:] == [(7, True, True)]


def test_a_declared_length_allocates_nothing_and_ends_at_the_limit() -> None:
    data = b"\x94\x00\x07\xa1m\x91\xdb\xff\xff\xff\xff"
    assert outcome(data) == [len(data)]
    assert outcome(data + b"x" * SIZE) == [(7, True, True)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x94\x00\x07\xa1m" + b"\xdc\x00\x20" * 70_000, id="open arrays"),
        pytest.param(
            b"\x94\x00\x07\xa1m\xdc\x00\x20" + (b"\xdc\x00\x20" + b"\x90" * 32) * 2_000, id="empty arrays"
        ),
        pytest.param(b"\x94\x00\x07\xa1m\x91\xdb\xff\xff\xff\xff" + b"x" * 70_000, id="a text without end"),
        pytest.param(
            b"\x94\x00\x07\xa1m\x91\xdb\x00\x00\xff\xf0\xf0\x9f\x98\x80" + b"x" * 65516, id="wide text"
        ),
        pytest.param(msgpack.packb([2, "m", [2**63] * 32]) * 1000, id="notifications"),
    ],
)
def test_memory_stays_within_a_small_factor_of_the_message_size(data: bytes) -> None:
    limit = 64 * 1024
    pieces = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
    tracemalloc.start()
    try:
        decode = decoder(limit)
        before = tracemalloc.get_traced_memory()[0]
        try:
            for piece in pieces:
                decode.feed(piece)
                while decode.next() is not None:
                    pass
        except BadMessageError:
            pass
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 8 * limit


def test_an_answer_is_nil_or_code_text_and_kind() -> None:
    assert msgpack.unpackb(encode_answer(2**32 - 1)) == [1, 2**32 - 1, None, None]
    assert msgpack.unpackb(encode_answer(0, IllegalStateError("no"))) == [
        1,
        0,
        [-5, "no", {"kind": "ILLEGAL_STATE"}],
        None,
    ]
