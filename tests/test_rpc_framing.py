"""MessagePack-RPC on a stream: any split, any interleaving with descriptors, and what is refused."""

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.residue import descriptors
from vmactor.rpc.files import Attached, ReceivedFile
from vmactor.rpc.framing import READ_SIZE, BadMessageError, Decoder, Encoder, Limits

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.lists(
    st.tuples(st.just(0), st.integers(0, 2**32 - 1), st.text(max_size=10), st.lists(VALUES, max_size=3))
    | st.tuples(st.just(2), st.text(max_size=10), st.lists(VALUES, max_size=3)),
    min_size=1,
    max_size=6,
)
LOOSE = Limits(nesting=64)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in pairwise(places)]


def as_lists(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_messages_come_out_as_they_went_in_however_the_stream_is_cut(
    messages: list[tuple[Any, ...]], cuts: list[int]
) -> None:
    encoder, decoder = Encoder(), Decoder(LOOSE)
    data = b"".join(encoder.encode(message)[0] for message in messages)
    found = []
    for piece in pieces(data, cuts):
        decoder.feed(piece, [])
        found += [message for message, files in decoder.messages() if not files]
    assert found == [as_lists(message) for message in messages]


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=5), cuts=st.lists(st.integers(0, 500)))
def test_each_message_gets_its_own_descriptors_however_the_stream_is_cut(
    counts: list[int], cuts: list[int]
) -> None:
    """As the kernel does it: descriptors come with the first byte of the message that they were sent with."""
    before = len(descriptors())
    encoder, decoder = Encoder(), Decoder(LOOSE)
    files = [[os.memfd_create(f"{number}.{index}") for index in range(n)] for number, n in enumerate(counts)]
    sent = [encoder.encode((2, "files", [list(map(Attached, own))])) for own in files]
    found = []
    for data, fds in sent:
        for place, piece in enumerate(pieces(data, cuts)):
            decoder.feed(piece, [ReceivedFile(fd) for fd in fds] if place == 0 else [])
            found += list(decoder.messages())
    assert len(found) == len(counts)
    for number, (message, got) in enumerate(found):
        assert message[2][0] == got
        names = [str(Path(f"/proc/self/fd/{file.fileno()}").readlink()) for file in got]
        assert names == [f"/memfd:{number}.{index} (deleted)" for index in range(counts[number])]
        for file in got:
            file.close()
    for own in files:
        for fd in own:
            os.close(fd)
    decoder.close()
    assert len(descriptors()) == before


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


BAD: dict[str, bytes] = {
    "no array": msgpack.packb("text"),
    "an array of two": msgpack.packb([0, 1]),
    "a map": msgpack.packb({"a": 1}),
    "a code that is none": b"\xc1",
    "an array of billions": b"\xdd\xff\xff\xff\xff",
    "nested too deep": msgpack.packb([2, "x", nested(20)]),
    "nested deeper than a stack": b"\x91" * 5000,
    "too many arrays": msgpack.packb([2, "x", [[[]] * 1000] * 20]),
    "another extension": msgpack.packb([2, "x", [msgpack.ExtType(5, b"a")]]),
    "a descriptor that did not come": msgpack.packb([2, "x", [msgpack.ExtType(1, b"\0")]]),
    "a descriptor without an index": msgpack.packb([2, "x", [msgpack.ExtType(1, b"")]]),
    "a text that is no text": b"\x93\x02\xa2\xff\xfe\x90",
}


def feed(decoder: Decoder, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        decoder.feed(piece, [])
        list(decoder.messages())


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("step", [1, READ_SIZE])
def test_what_is_no_message_is_refused_at_once_and_in_little_memory(case: str, step: int) -> None:
    decoder = Decoder(Limits())
    with pytest.raises(BadMessageError):
        feed(decoder, (BAD[case][start : start + step] for start in range(0, len(BAD[case]), step)))


def test_a_message_that_is_too_long_is_refused_before_its_end() -> None:
    decoder = Decoder(Limits())
    binary_of_2_mib = b"\x93\x02\xa1x\x91\xc6\x00\x20\x00\x00"
    feed(decoder, [binary_of_2_mib, *[bytes(READ_SIZE)] * 31])
    with pytest.raises(BadMessageError, match="longer than 1048576"):
        feed(decoder, [bytes(READ_SIZE)])


def test_descriptors_that_no_message_takes_are_closed() -> None:
    fd = os.memfd_create("left")
    decoder = Decoder(Limits())
    decoder.feed(b"\x93\x02", [ReceivedFile(fd)])  # the message never ends
    decoder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
