"""What RPC Binder puts on a stream: a connection's header and then messages, all little endian, unpadded.

Versions 0 (Android 13), 1 (Android 14 and 15) and the experimental one that builds of early 2023 speak, whose
layout is version 1's. A connection begins with a header of its client's; each message has a header with its
command and its length; there are no numbers of messages, since a reply belongs to the innermost open call.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple, Union

EXPERIMENTAL_VERSION = 0xF0000000
KNOWN_VERSIONS = (0, 1, EXPERIMENTAL_VERSION)

CONNECTION_HEADER = struct.Struct("<IBB8xH")
NEW_SESSION_RESPONSE = struct.Struct("<I4x")
CONNECTION_INIT = b"cci\0" + bytes(4)
MESSAGE_HEADER = struct.Struct("<II8x")
ADDRESS = struct.Struct("<II")
TRANSACTION = struct.Struct("<IIIIQI12x")
REPLY_V0 = struct.Struct("<i")
REPLY_V1 = struct.Struct("<iI12x")
DEC_STRONG = struct.Struct("<IIII")

MAX_BODY = 100_000
"""Bytes of a message behind its header; libbinder drops a connection that announces more."""
SESSION_ID_SIZE = 32

OPTION_INCOMING = 0x01
"""In a connection's header: on this connection the server will call."""
FLAG_ONEWAY = 0x01
ADDRESS_CREATED = 0x01
ADDRESS_FOR_SERVER = 0x02


class Command(IntEnum):
    """What a message is."""

    TRANSACT = 0
    REPLY = 1
    DEC_STRONG = 2


class Special(IntEnum):
    """Codes of transactions to no object."""

    GET_ROOT = 0
    GET_MAX_THREADS = 1
    GET_SESSION_ID = 2


class Status(IntEnum):
    """libbinder's ``status_t``: how a transaction ended; an exception of the method is not one of these."""

    OK = 0
    BAD_TYPE = -2147483647
    UNEXPECTED_NULL = -2147483640
    UNKNOWN_TRANSACTION = -74
    NOT_ENOUGH_DATA = -61
    INVALID_OPERATION = -38
    DEAD_OBJECT = -32
    BAD_VALUE = -22


class ProtocolError(Exception):
    """The peer broke the protocol.

    Attributes:
        ends_session: Whether that ends all connections of the session, or this one only.
        oversize: Whether it announced more than there may be.
    """

    def __init__(self, text: str, *, ends_session: bool = True, oversize: bool = False) -> None:
        super().__init__(text)
        self.ends_session = ends_session
        self.oversize = oversize


class Address(NamedTuple):
    """Names an object within a session."""

    options: int
    number: int

    @property
    def valid(self) -> bool:
        """Whether its options are known ones."""
        return not self.options & ~(ADDRESS_CREATED | ADDRESS_FOR_SERVER)


NO_ADDRESS = Address(0, 0)
ROOT = Address(ADDRESS_CREATED | ADDRESS_FOR_SERVER, 0)
"""The first object that a server hands out."""


class ConnectionHeader(NamedTuple):
    """The first message of every connection.

    Attributes:
        version: The highest that the client speaks.
        incoming: Whether the server will call on this connection.
        fd_mode: How descriptors would travel; 0 for not at all.
        session_id: The session to join, or None for a new one.
    """

    version: int
    incoming: bool
    fd_mode: int
    session_id: bytes | None

    def encode(self) -> bytes:
        """Its bytes, the session's identity included."""
        identity = self.session_id or b""
        options = OPTION_INCOMING if self.incoming else 0
        return CONNECTION_HEADER.pack(self.version, options, self.fd_mode, len(identity)) + identity


class ConnectionInit(NamedTuple):
    """What confirms a connection, from the side that will call on it."""


class Transaction(NamedTuple):
    """A call.

    Attributes:
        address: The object; ``NO_ADDRESS`` for a special transaction.
        code: The method.
        flags: ``FLAG_ONEWAY``, and hints.
        async_number: Counts one-way calls to one object, from 0.
        parcel: The arguments.
        objects: Bytes of the table of objects behind the parcel.
    """

    address: Address
    code: int
    flags: int = 0
    async_number: int = 0
    parcel: bytes = b""
    objects: bytes = b""

    @property
    def oneway(self) -> bool:
        """Whether no reply is wanted."""
        return bool(self.flags & FLAG_ONEWAY)

    def encode(self) -> bytes:
        """Its message; the same in all versions, since version 0 does not look at the parcel's size."""
        body = TRANSACTION.pack(
            self.address.options,
            self.address.number,
            self.code,
            self.flags,
            self.async_number,
            len(self.parcel),
        )
        return _message(Command.TRANSACT, body + self.parcel + self.objects)


class Reply(NamedTuple):
    """The answer to a call.

    Attributes:
        status: ``Status.OK`` or why the call failed; the parcel means nothing then.
        parcel: The results.
    """

    status: int
    parcel: bytes = b""

    def encode(self, version: int) -> bytes:
        """Its message in a version's layout."""
        if version == 0:
            return _message(Command.REPLY, REPLY_V0.pack(self.status) + self.parcel)
        return _message(Command.REPLY, REPLY_V1.pack(self.status, len(self.parcel)) + self.parcel)


class DecStrong(NamedTuple):
    """Gives references to an object back.

    Attributes:
        address: The object.
        amount: How many.
    """

    address: Address
    amount: int

    def encode(self) -> bytes:
        """Its message."""
        return _message(Command.DEC_STRONG, DEC_STRONG.pack(*self.address, self.amount, 0))


Message = Union[Transaction, Reply, DecStrong]  # noqa: UP007 - evaluated, and guests may have Python 3.8


def _message(command: int, body: bytes) -> bytes:
    return MESSAGE_HEADER.pack(command, len(body)) + body


def negotiate(offered: int, highest: int) -> int:
    """The version of a session.

    The smaller of both, but never 1 for the experimental version, whose clients of early 2023 refuse that.

    Args:
        offered: The highest that the client speaks.
        highest: The highest that we want to speak: 0 or 1.
    """
    return 0 if offered == EXPERIMENTAL_VERSION else min(offered, highest)


class _Buffer:
    """Bytes that came and were not read yet."""

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def pending(self) -> int:
        """How many bytes wait for more."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """Take in bytes as they come, split anyhow."""
        self._data += data

    def _take(self, size: int) -> bytes:
        data = bytes(self._data[:size])
        del self._data[:size]
        return data


class HandshakeDecoder(_Buffer):
    """Reads what a client sends to begin a connection; what it sends behind that stays in the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.header: ConnectionHeader | None = None

    def next(self) -> ConnectionHeader | ConnectionInit | None:
        """The header; then, unless it says incoming, the init; None while bytes are missing.

        Raises:
            ProtocolError: It is neither.
        """
        if self.header is None:
            return self._header()
        if self.pending < len(CONNECTION_INIT):
            return None
        if self._take(len(CONNECTION_INIT))[:4] != CONNECTION_INIT[:4]:
            raise ProtocolError("the connection's confirmation is none", ends_session=False)
        return ConnectionInit()

    def rest(self) -> bytes:
        """What came behind the handshake; it is no longer in the buffer then."""
        return self._take(self.pending)

    def _header(self) -> ConnectionHeader | None:
        if self.pending < CONNECTION_HEADER.size:
            return None
        version, options, fd_mode, size = CONNECTION_HEADER.unpack_from(self._data)
        if size not in (0, SESSION_ID_SIZE):
            raise ProtocolError(f"a session's identity of {size} bytes", ends_session=False)
        if self.pending < CONNECTION_HEADER.size + size:
            return None
        identity = self._take(CONNECTION_HEADER.size + size)[CONNECTION_HEADER.size :]
        incoming = bool(options & OPTION_INCOMING)
        self.header = ConnectionHeader(version, incoming, fd_mode, identity or None)
        return self.header


class MessageDecoder(_Buffer):
    """Reads the messages of a connection.

    Holds ``MAX_BODY`` bytes and what was fed last at most.
    """

    def __init__(self, version: int) -> None:
        super().__init__()
        self._version = version

    def next(self) -> Message | None:
        """The next message, or None while bytes of it are missing.

        Raises:
            ProtocolError: It is none; nothing can be read any more.
        """
        if self.pending < MESSAGE_HEADER.size:
            return None
        command, size = MESSAGE_HEADER.unpack_from(self._data)
        if command not in (Command.TRANSACT, Command.REPLY, Command.DEC_STRONG):
            raise ProtocolError(f"an unknown command {command}")
        if size > MAX_BODY:
            raise ProtocolError(f"a message of {size} bytes", ends_session=False, oversize=True)
        if self.pending < MESSAGE_HEADER.size + size:
            return None
        body = self._take(MESSAGE_HEADER.size + size)[MESSAGE_HEADER.size :]
        if command == Command.TRANSACT:
            return self._transaction(body)
        if command == Command.REPLY:
            return self._reply(body)
        if size != DEC_STRONG.size:
            raise ProtocolError(f"a DEC_STRONG of {size} bytes")
        options, number, amount, _ = DEC_STRONG.unpack(body)
        return DecStrong(Address(options, number), amount)

    def _transaction(self, body: bytes) -> Transaction:
        if len(body) < TRANSACTION.size:
            raise ProtocolError(f"a call of {len(body)} bytes")
        options, number, code, flags, async_number, size = TRANSACTION.unpack_from(body)
        parcel, objects = self._split(body[TRANSACTION.size :], size)
        return Transaction(Address(options, number), code, flags, async_number, parcel, objects)

    def _reply(self, body: bytes) -> Reply:
        layout = REPLY_V0 if self._version == 0 else REPLY_V1
        if len(body) < layout.size:
            raise ProtocolError(f"a reply of {len(body)} bytes")
        words = layout.unpack_from(body)
        parcel, _ = self._split(body[layout.size :], words[-1])
        return Reply(words[0], parcel)

    def _split(self, data: bytes, size: int) -> tuple[bytes, bytes]:
        """Part the parcel from the table of objects; version 0 knows no table and no size."""
        if self._version == 0:
            return data, b""
        if size > len(data):
            raise ProtocolError(f"a parcel of {size} bytes in {len(data)}")
        if (len(data) - size) % 4:
            raise ProtocolError("a table of objects that is none", ends_session=False)
        return data[:size], data[size:]
