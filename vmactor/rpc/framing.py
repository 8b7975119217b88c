"""Bytes to messages and back, within bounds. No I/O.

MessagePack-RPC has no framing: where a message ends is known by decoding it. The decoder keeps its place, so
that a message in many pieces is not read twice. What one message can make us hold is bounded by its size and
by the number of its arrays and maps, since an empty one is one byte on the wire and some sixty in memory.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgpack

from vmactor.errors import IllegalArgumentError
from vmactor.rpc.files import EXTENSION, MAX_FILES, Attached, ReceivedFile, close_all, copy_of

REQUEST: Final = 0
RESPONSE: Final = 1
NOTIFICATION: Final = 2
READ_SIZE: Final = 32 * 1024
"""Most bytes that are fed at once."""

SMALL: Final = 64 * 1024
"""Bytes of a message that an encoder keeps room for."""


class BadMessageError(IllegalArgumentError):
    """The peer sent what is no MessagePack-RPC, or more than is allowed; the stream cannot be followed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take.

    Attributes:
        message_bytes: Longest message.
        containers: Most arrays and maps in one message.
        elements: Longest array or map. Room for an array is made when its head is read, and arrays can be
            nested a thousand times before their ends are missed: so this bounds what a few bytes can take.
        nesting: Deepest nesting of arrays and maps, the message itself included.
        outstanding: Calls being worked on at the same time; one more is answered with an error.
        unsent_bytes: Answers that may wait for a peer who does not read, before nothing is read from him.
    """

    message_bytes: int = 1 << 20
    containers: int = 16_384
    elements: int = 1024
    nesting: int = 16
    outstanding: int = 256
    unsent_bytes: int = 1 << 20


SERVER: Final = Limits()
CLIENT: Final = Limits(
    message_bytes=64 << 20, containers=1 << 20, elements=1 << 20, outstanding=65_536, unsent_bytes=64 << 20
)
"""For who trusts his peer more than that trusts him."""


class _Counters:
    """What is in the message that is being decoded; apart from the decoder, which it must not refer to."""

    __slots__ = ("containers", "files", "limit")

    def __init__(self, limit: int) -> None:
        self.containers = 0
        self.limit = limit
        self.files: list[_Place] = []

    def container(self, value: Any) -> Any:
        self.containers += 1
        if self.containers > self.limit:
            raise ValueError(f"more than {self.limit} arrays and maps in a message")
        return value

    def extension(self, code: int, data: bytes) -> Any:
        if code != EXTENSION or len(data) != 1 or data[0] >= MAX_FILES:
            raise ValueError(f"extension type {code}, {len(data)} bytes; a descriptor is type 1, one byte")
        place = _Place(data[0])
        self.files.append(place)
        return place


class _Place(ReceivedFile):
    """Where a message refers to a descriptor, until that is put in."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        super().__init__(-1)
        self.index = index


class _Came(NamedTuple):
    """The descriptors of one read, and from where to where in the stream that went."""

    start: int
    end: int
    files: list[ReceivedFile]


class Decoder:
    """Turns a byte stream, cut anywhere, into messages, each with its descriptors.

    Whoever takes a message owns its files. Descriptors belong to the message that begins last in the read
    that brought them: they were sent with its first byte, and a read ends with the piece that has some.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._counters = _Counters(limits.containers)
        self._fed = 0
        self._end = 0  # offset of the end of the last message
        self._waiting: deque[_Came] = deque()
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=limits.message_bytes + READ_SIZE,
            max_array_len=limits.elements,
            max_map_len=limits.elements,
            list_hook=self._counters.container,
            object_hook=self._counters.container,
            ext_hook=self._counters.extension,
        )

    def feed(self, data: bytes | memoryview, files: list[ReceivedFile]) -> None:
        """Take in one read of at most ``READ_SIZE`` bytes; take all messages before feeding again."""
        start = self._fed
        self._fed += len(data)
        if files:
            self._waiting.append(_Came(start, self._fed, files))
        self._unpacker.feed(data)

    def messages(self) -> Iterator[tuple[list[Any], list[ReceivedFile]]]:
        """The complete messages of what was fed, each an array of 3 or 4 elements, and its files.

        Whoever stops in the middle gets the others by asking again.

        Raises:
            BadMessageError: What came is no message, or breaks a limit.
        """
        counters, limits = self._counters, self._limits
        while True:
            try:
                message = self._unpacker.unpack()
            except msgpack.OutOfData:
                break
            except Exception as error:  # format, nesting, length, text: of many classes
                raise BadMessageError(f"not MessagePack-RPC: {error or type(error).__name__}") from error
            end = self._unpacker.tell()
            if end - self._end > limits.message_bytes:
                raise self._too_long()
            begin, self._end = self._end, end
            came = self._of(begin, end) if self._waiting else []
            try:
                self._check(message)
                if counters.files:
                    self._fill(came)
            except BadMessageError:
                close_all(came)
                raise
            yield message, came
        if self._fed - self._end > limits.message_bytes:
            raise self._too_long()

    def _check(self, message: Any) -> None:
        counters, limits = self._counters, self._limits
        if type(message) is not list or len(message) not in (3, 4):
            raise BadMessageError("a message is an array of 3 or 4 elements")
        if counters.containers > limits.nesting and _deeper_than(limits.nesting, message):
            raise BadMessageError(f"arrays and maps nested deeper than {limits.nesting}")
        counters.containers = 0

    def close(self) -> None:
        """Close the descriptors that no message took."""
        for came in self._waiting:
            close_all(came.files)
        self._waiting.clear()

    def _of(self, begin: int, end: int) -> list[ReceivedFile]:
        """The descriptors of a message; those that belong to none are closed."""
        waiting = self._waiting
        while waiting and waiting[0].start < end:
            if (
                waiting[0].end > end
            ):  # they are of a message that begins later, or of this one: that ends later
                break
            came = waiting.popleft()
            if came.start <= begin < came.end:
                return came.files
            close_all(came.files)  # sent in the middle of a message
        return []

    def _fill(self, came: list[ReceivedFile]) -> None:
        """Put the descriptors where the message names them; those that it does not name are closed."""
        places, self._counters.files = self._counters.files, []
        count = len(places)
        if sorted(place.index for place in places) != list(range(count)):
            raise BadMessageError("a message names each of its descriptors once, by index from 0")
        if len(came) < count:
            raise BadMessageError(
                f"the message names {count} descriptors, {len(came)} came: send them with its first byte"
            )
        for place in places:
            place.take_over(came[place.index])
        close_all(came)
        came[:] = places

    def _too_long(self) -> BadMessageError:
        return BadMessageError(f"message longer than {self._limits.message_bytes} bytes")


def _deeper_than(limit: int, value: Any) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (list, dict)
        ]
        if not level:
            return False
    return True


class Encoder:
    """Turns messages into bytes, and copies of their descriptors."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._packer = self._new_packer()

    def _new_packer(self) -> msgpack.Packer:
        return msgpack.Packer(default=self._attach, unicode_errors="backslashreplace", buf_size=SMALL)

    def _attach(self, value: object) -> msgpack.ExtType:
        if not isinstance(value, Attached):
            raise TypeError(f"{type(value).__name__} has no form in MessagePack")
        if len(self._fds) == MAX_FILES:
            raise IllegalArgumentError(f"a message takes {MAX_FILES} descriptors at most")
        self._fds.append(copy_of(value.fd))
        return msgpack.ExtType(EXTENSION, bytes([len(self._fds) - 1]))

    def encode(self, message: tuple[Any, ...]) -> tuple[bytes, list[int]]:
        """The bytes, and the descriptors to send with the first and to close then.

        Raises:
            TypeError: Something in it has no form in MessagePack.
            OSError: A descriptor is not open.
        """
        try:
            data: bytes = self._packer.pack(message)
        except BaseException:
            self._packer.reset()
            for fd in self._fds:
                os.close(fd)
            self._fds = []
            raise
        if len(data) > SMALL:
            self._packer = self._new_packer()  # it would keep that much for ever
        fds, self._fds = self._fds, []
        return data, fds
