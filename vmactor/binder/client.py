"""A blocking RPC Binder client: for programs in guests, and for tests. Runs on Python 3.8.

One session, one connection, as a Microdroid guest has it.
"""

from __future__ import annotations

import socket

from .parcel import Parcel, ParcelReader
from .wire import (
    CONNECTION_INIT,
    NEW_SESSION_RESPONSE,
    NO_ADDRESS,
    ConnectionHeader,
    DecStrong,
    MessageDecoder,
    ProtocolError,
    Reply,
    Special,
    Status,
    Transaction,
)

__all__ = ["Client", "Parcel", "ProtocolError", "RemoteError", "TransactionError"]

INTERFACE_TRANSACTION = int.from_bytes(b"_NTF", "big")
PING_TRANSACTION = int.from_bytes(b"_PNG", "big")
SERVICE_SPECIFIC = -8
_CHUNK = 65536


class TransactionError(Exception):
    """A call failed before its method could say anything.

    Attributes:
        status: libbinder's ``status_t``.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class RemoteError(Exception):
    """The method raised an exception.

    Attributes:
        code: AIDL's number of the kind, e.g. -5 for an illegal state.
        message: In words.
        service_specific: The number that belongs to code -8.
    """

    def __init__(self, code: int, message: str, service_specific: int = 0) -> None:
        super().__init__(f"exception {code}: {message}")
        self.code = code
        self.message = message
        self.service_specific = service_specific


class Client:
    """A session with a server, over a connected stream socket; the socket stays the caller's.

    Args:
        sock: The socket; its timeout is the deadline of every read and write.
        descriptor: The interface that the server's root must have.
        version: The highest protocol version to offer.

    Raises:
        ProtocolError: The server answered nonsense, or has another interface.
        OSError: From the socket; a timeout among others.
    """

    def __init__(self, sock: socket.socket, descriptor: str, version: int = 0) -> None:
        self._sock = sock
        self._descriptor = descriptor
        sock.sendall(ConnectionHeader(version, False, 0, None).encode() + CONNECTION_INIT)
        (self.version,) = NEW_SESSION_RESPONSE.unpack(self._exactly(NEW_SESSION_RESPONSE.size))
        self._decoder = MessageDecoder(self.version)
        self.max_threads = self._special(Special.GET_MAX_THREADS).int32()
        self.session_id = self._special(Special.GET_SESSION_ID).byte_array()
        root = self._special(Special.GET_ROOT).binder()
        if root is None:
            raise ProtocolError("the server has no root object")
        self.root, self.stability = root
        served = self.transact(INTERFACE_TRANSACTION).string()
        if served != descriptor:
            raise ProtocolError(f"the server's interface is {served!r}, not {descriptor!r}")

    def ping(self) -> None:
        """Return when the server has answered."""
        self.transact(PING_TRANSACTION)

    def call(self, code: int, arguments: Parcel | None = None) -> ParcelReader:
        """Call a method; returns its results.

        Raises:
            RemoteError: The method raised an exception.
            TransactionError: The server could not call it.
            ProtocolError: The server answered nonsense.
            OSError: From the socket.
        """
        parcel = Parcel().string(self._descriptor).to_bytes()
        reader = self.transact(code, parcel + (arguments.to_bytes() if arguments else b""))
        exception = reader.int32()
        if not exception:
            return reader
        message = reader.string()
        reader.int32()
        number = reader.int32() if exception == SERVICE_SPECIFIC else 0
        raise RemoteError(exception, message, number)

    def transact(self, code: int, parcel: bytes = b"") -> ParcelReader:
        """Send a transaction to the root and wait for its reply; errors as ``call``."""
        return self._exchange(Transaction(self.root, code, parcel=parcel))

    def _special(self, code: int) -> ParcelReader:
        return self._exchange(Transaction(NO_ADDRESS, code))

    def _exchange(self, transaction: Transaction) -> ParcelReader:
        self._sock.sendall(transaction.encode())
        while True:
            message = self._decoder.next()
            if message is None:
                data = self._sock.recv(_CHUNK)
                if not data:
                    raise ProtocolError("the server closed the connection")
                self._decoder.feed(data)
            elif isinstance(message, Reply):
                if message.status != Status.OK:
                    raise TransactionError(message.status)
                return ParcelReader(message.parcel)
            elif not isinstance(message, DecStrong):
                raise ProtocolError("the server called a client that has no objects")

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise ProtocolError("the server closed the connection")
            data += more
        return data
