"""MessagePack-RPC as bytes: untrusted input to calls within bounds, answers to bytes.

No I/O, no clock, no VM: whoever owns the connection feeds what arrives and asks for the next call. The format
is the one of the msgpack-rpc specification: ``[0, msgid, method, params]`` asks, ``[1, msgid, error,
result]`` answers, ``[2, method, params]`` tells. It has no framing, so where a message ends is only known by
decoding it.

What one peer can make us hold is bounded by ``message_size`` times a small factor: declared lengths allocate
nothing by themselves (an array's length is checked first, text is only taken once it is there), and the
number of arrays and maps in a message is counted while it is decoded, since an empty one is a single byte on
the wire and some sixty in memory.
"""

from dataclasses import dataclass
from typing import Any, Final

import msgpack

from vmactor.errors import IllegalArgumentError, VmactorError

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2

CHUNK: Final = 16 * 1024
"""Most bytes to feed at once; part of what the decoder's buffer is sized for."""

MAX_ITEMS: Final = 32
"""Most elements of one array, or pairs of one map."""

MAX_ERROR_TEXT: Final = 1024
"""Longest error text sent in an answer, in characters; longer ones are cut."""

_ENVELOPE: Final = range(2, 9)  # lengths that we read to the end, so that a wrong one can still be answered


@dataclass(frozen=True, slots=True)
class Call:
    """A request or a notification, nothing in it checked but the envelope.

    Attributes:
        msgid: What the answer has to carry; None for a notification, which gets none.
        method: Whatever came in the method's place.
        params: Whatever came in the parameters' place.
    """

    msgid: int | None
    method: object
    params: object


class BadMessageError(IllegalArgumentError):
    """The peer sent something that is not a call.

    Attributes:
        msgid: The request to answer with this error, if it got as far as saying its number.
        fatal: Whether the stream cannot be followed any further; if not, the next message can be read.
        oversize: Whether the size was the trouble.
    """

    def __init__(self, text: str, *, msgid: int | None, fatal: bool = True, oversize: bool = False) -> None:
        super().__init__(text)
        self.msgid = msgid
        self.fatal = fatal
        self.oversize = oversize


class _ContainerCounter:
    """Counts arrays and maps as they are completed.

    Apart from the decoder, so that the unpacker does not refer back to it: a guest that opens connections by
    the hundred must not leave cycles for the garbage collector.
    """

    def __init__(self, limit: int) -> None:
        self.seen = 0
        self._limit = limit

    def array(self, items: list[Any]) -> list[Any]:
        self.seen += 1
        if self.seen > self._limit:
            raise ValueError(f"more than {self._limit} arrays and maps in a message")
        return items

    def map(self, pairs: list[Any]) -> tuple[Any, ...]:
        """Keep a map as its pairs: no method takes one, so its keys need not be hashable, nor be hashed."""
        return tuple(self.array(pairs))


class CallDecoder:
    """Turns a byte stream, cut anywhere, into calls.

    Args:
        message_size: Longest message accepted, in bytes.
        containers: Most arrays and maps in one message, nested or side by side, its parameter list included;
            so this bounds the nesting too.
    """

    def __init__(self, *, message_size: int, containers: int) -> None:
        self._size = message_size
        self._counter = _ContainerCounter(containers)
        self._fed = 0
        self._start = 0  # offset in the stream of the message that is being read
        self._left: int | None = None  # envelope elements to come; None before the envelope's header
        self._parts: list[object] = []
        self._unpacker = msgpack.Unpacker(
            read_size=1024,  # the buffer's size to begin with; it grows as needed
            max_buffer_size=message_size + CHUNK,  # bounds text and bytes too
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            unicode_errors="replace",  # a text that an agent cut in the middle of a letter is still a text
            strict_map_key=False,
            list_hook=self._counter.array,
            object_pairs_hook=self._counter.map,
        )

    @property
    def pending(self) -> int:
        """Bytes of the message that has begun and is not complete; 0 between messages."""
        return self._fed - self._start

    def feed(self, data: bytes) -> None:
        """Take in at most ``CHUNK`` bytes; call ``next`` until it gives None before feeding again."""
        self._fed += len(data)
        self._unpacker.feed(data)

    def next(self) -> Call | None:
        """The next complete call, or None if more bytes are needed.

        Raises:
            BadMessageError: What came is not a call. Unless it is fatal, go on with ``next``; after a fatal
                one the decoder is of no more use.
        """
        try:
            parts = self._envelope()
        except msgpack.OutOfData:
            if self.pending > self._size:
                raise self._oversize() from None
            return None
        except Exception as error:  # format, nesting, length: of many classes, and plain ValueError
            text = f"not MessagePack-RPC: {error or 'bad format'}"
            raise BadMessageError(text, msgid=self._msgid()) from error
        end = self._unpacker.tell()
        if end - self._start > self._size:
            raise self._oversize()
        msgid = self._msgid()
        self._start, self._left, self._parts, self._counter.seen = end, None, [], 0
        match parts:
            case [0, _, method, params] if msgid is not None:
                return Call(msgid, method, params)
            case [2, method, params] if type(parts[0]) is int:
                return Call(None, method, params)
            case _ if msgid is not None:
                raise BadMessageError("a request is [0, msgid, method, params]", msgid=msgid, fatal=False)
            case [1, *_]:
                raise BadMessageError("an answer, but nothing was asked", msgid=None)
        raise BadMessageError("neither a request nor a notification", msgid=None)

    def _envelope(self) -> list[object]:
        """Read on; the unpacker keeps its place when it runs out of bytes, so no byte is decoded twice."""
        if self._left is None:
            if (length := self._unpacker.read_array_header()) not in _ENVELOPE:
                raise ValueError(f"a message has 3 or 4 elements, not {length}")
            self._left = length
        while self._left:
            self._parts.append(self._unpacker.unpack())
            self._left -= 1
        return self._parts

    def _msgid(self) -> int | None:
        match self._parts:
            case [kind, int(msgid), *_] if type(kind) is int and kind == REQUEST and type(msgid) is int:
                return msgid if 0 <= msgid < 2**32 else None
        return None

    def _oversize(self) -> BadMessageError:
        return BadMessageError(f"message longer than {self._size} bytes", msgid=self._msgid(), oversize=True)


def encode_answer(msgid: int, error: VmactorError | None = None) -> bytes:
    """The answer to a request: ``[1, msgid, nil, nil]``, or an error as ``[code, text, {"kind": name}]``."""
    row = None if error is None else [error.code, error.message[:MAX_ERROR_TEXT], {"kind": error.kind}]
    answer: bytes = msgpack.packb([RESPONSE, msgid, row, None], unicode_errors="backslashreplace")
    return answer
