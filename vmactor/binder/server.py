"""A server's side of RPC Binder, without I/O: sessions, reference counts, the order of one-way calls.

Whoever has the connections feeds what comes and sends what goes. One object is served, the root; it has no
callbacks and hands out no other object. Behaviour is that of libbinder's ``RpcServer`` and ``RpcState``;
where libbinder waits for ever or holds thousands, ``Limits`` are stricter.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from vmactor.binder.parcel import Parcel, ParcelError, ParcelReader, Value
from vmactor.binder.wire import (
    CONNECTION_INIT,
    NEW_SESSION_RESPONSE,
    NO_ADDRESS,
    ROOT,
    SESSION_ID_SIZE,
    ConnectionHeader,
    DecStrong,
    Message,
    ProtocolError,
    Reply,
    Special,
    Status,
    Transaction,
    negotiate,
)

STABILITY_SYSTEM: Final = 12
"""Without it, clients of the system partition (Microdroid's are) take the root for null or unusable."""
FIRST_CALL: Final = 1
LAST_CALL: Final = 0x00FFFFFF
"""Codes of an interface's methods; the others are built in."""


def _letters(name: str) -> int:
    return int.from_bytes(b"_" + name.encode(), "big")


class BuiltIn(IntEnum):
    """Codes that every binder answers."""

    INTERFACE = _letters("NTF")
    PING = _letters("PNG")
    DUMP = _letters("DMP")
    SHELL_COMMAND = _letters("CMD")
    EXTENSION = _letters("EXT")
    SYSTEM_PROPERTIES = _letters("SPR")
    SET_RPC_CLIENT = _letters("RPC")
    START_RECORDING = _letters("SRD")
    STOP_RECORDING = _letters("ERD")


_READERS: Final[Mapping[str, Callable[[ParcelReader], Value]]] = {
    "int": ParcelReader.int32,
    "long": ParcelReader.int64,
    "boolean": ParcelReader.boolean,
    "String": ParcelReader.string,
    "byte[]": ParcelReader.byte_array,
}


@dataclass(frozen=True, slots=True)
class Method:
    """One method of an interface.

    Attributes:
        name: Its name.
        parameters: AIDL types: ``int``, ``long``, ``boolean``, ``String``, ``byte[]``.
    """

    name: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Interface:
    """What the root can do.

    Attributes:
        descriptor: Its name; every call must carry it.
        methods: By code.
        declined: Names of methods, by code, that are known and answered with "unsupported operation".
    """

    descriptor: str
    methods: Mapping[int, Method]
    declined: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BinderException:
    """An exception of a method, as AIDL knows them.

    Attributes:
        code: Negative, e.g. -5 for an illegal state.
        message: For people.
        service_specific: The number that belongs to code -8.
    """

    code: int
    message: str
    service_specific: int = 0

    def encode(self) -> bytes:
        """The parcel of a reply."""
        parcel = Parcel().int32(self.code).string(self.message).int32(0)
        if self.code == SERVICE_SPECIFIC:
            parcel.int32(self.service_specific)
        return parcel.to_bytes()


BAD_PARCELABLE: Final = -2
UNSUPPORTED_OPERATION: Final = -7
SERVICE_SPECIFIC: Final = -8
_NO_EXCEPTION: Final = Parcel().int32(0).to_bytes()


@dataclass(frozen=True, slots=True)
class Call:
    """A method that is to be carried out; its outcome is given to ``Session.finish``.

    Attributes:
        method: Which.
        arguments: Its arguments, as many and of the types that the method declares.
        transaction: What asked for it.
    """

    method: Method
    arguments: tuple[Value, ...]
    transaction: Transaction


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may cost.

    Attributes:
        max_threads: Connections of a session on which the client may call.
        held_calls: One-way calls that came before their turn.
        held_bytes: Bytes of these.
        version: The highest protocol version to agree to: 1, or 0, which all clients since Android 13 speak.
    """

    max_threads: int = 1
    held_calls: int = 64
    held_bytes: int = 200_000
    version: int = 0


class SessionEnded(Exception):  # noqa: N818 - not an error: the client gave its last reference back
    """The client has nothing left to call."""


@dataclass(slots=True)
class _Root:
    """The root's references in one session.

    Attributes:
        sent: How often it was handed out and not given back.
        received: References that came with calls and were not given back by us.
        known: Whether it was ever handed out.
    """

    sent: int = 0
    received: int = 0
    known: bool = False


@dataclass(slots=True)
class Session:
    """What one client and its server agreed on, over all their connections.

    Attributes:
        identity: Whoever knows it may join.
        version: The protocol's.
        calling: Connections on which the client calls.
        closing: Whether a calling connection has ended, after which none may join.
    """

    identity: bytes
    version: int
    interface: Interface
    limits: Limits
    calling: int = 1
    closing: bool = False
    _root: _Root = field(default_factory=_Root)
    _turn: int = 0
    _held: dict[int, Transaction] = field(default_factory=dict)
    _held_bytes: int = 0
    _running: bool = False

    def receive(self, message: Message) -> bytes | Call | None:
        """Take in what came on a connection on which the client calls.

        Returns:
            Bytes to send; a call to carry out first; or None.

        Raises:
            ProtocolError: The client broke the protocol.
            SessionEnded: It is done.
        """
        match message:
            case Transaction():
                return self._transaction(message)
            case DecStrong():
                self._dec_strong(message)
                return None
            case Reply():
                raise ProtocolError("a reply, although nothing was asked")

    def finish(self, call: Call, exception: BinderException | None) -> bytes:
        """The bytes to send when a method has been carried out.

        For a one-way call, see ``next_held`` afterwards.
        """
        parcel = _NO_EXCEPTION if exception is None else exception.encode()
        return self._done(call.transaction, Reply(Status.OK, parcel))

    def next_held(self) -> bytes | Call | None:
        """After each one-way call: the next, if it came already; as ``receive``."""
        while (held := self._held.pop(self._turn, None)) is not None:
            self._held_bytes -= _size(held)
            if (result := self._carry_out(held)) is not None:
                return result
        return None

    def _transaction(self, transaction: Transaction) -> bytes | Call | None:
        if transaction.address == NO_ADDRESS:
            if transaction.objects:
                return self._refusal(transaction, Status.BAD_VALUE)
            return self._special(transaction)
        if not transaction.address.valid:
            return self._refusal(transaction, Status.BAD_VALUE)
        if transaction.address != ROOT or not self._root.known:
            raise ProtocolError("a call to an object that was not handed out")
        self._root.received += 1
        if transaction.oneway:
            return self._oneway(transaction)
        return self._carry_out(transaction)

    def _oneway(self, transaction: Transaction) -> bytes | Call | None:
        """One-way calls to an object are carried out in the order of their numbers, whatever came first."""
        number = transaction.async_number
        if number != self._turn or self._running:
            self._held_bytes += _size(transaction)
            too_many = len(self._held) >= self.limits.held_calls or self._held_bytes > self.limits.held_bytes
            if number < self._turn or number in self._held or too_many:
                raise ProtocolError("one-way calls out of order")
            self._held[number] = transaction
            return None
        return self._carry_out(transaction) or self.next_held()

    def _carry_out(self, transaction: Transaction) -> bytes | Call | None:
        if transaction.oneway:
            self._running = True
        if transaction.objects:  # of descriptors, and none can come
            return self._done(transaction, Reply(Status.BAD_VALUE)) or None
        if FIRST_CALL <= transaction.code <= LAST_CALL:
            outcome = self._method(transaction)
            if isinstance(outcome, Call):
                return outcome
        else:
            outcome = _built_in(transaction.code, self.interface)
        return self._done(transaction, outcome) or None

    def _method(self, transaction: Transaction) -> Call | Reply:
        reader = ParcelReader(transaction.parcel)
        try:
            token = reader.string()
        except ParcelError:
            token = ""
        if token != self.interface.descriptor:
            return Reply(Status.BAD_TYPE)
        if (declined := self.interface.declined.get(transaction.code)) is not None:
            text = f"this host has no {declined}"
            return Reply(Status.OK, BinderException(UNSUPPORTED_OPERATION, text).encode())
        method = self.interface.methods.get(transaction.code)
        if method is None:
            return Reply(Status.UNKNOWN_TRANSACTION)
        try:
            arguments = tuple(_READERS[kind](reader) for kind in method.parameters)
        except ParcelError as error:
            return Reply(error.status)
        if reader.left:
            # A client of another release may mean another method by this code; then there is more.
            surplus = f"{method.name} has {len(method.parameters)} arguments, and there is more"
            return Reply(Status.OK, BinderException(BAD_PARCELABLE, surplus).encode())
        return Call(method, arguments, transaction)

    def _done(self, transaction: Transaction, reply: Reply) -> bytes:
        """Give references back, and reply where one is wanted."""
        returned = b""
        if transaction.oneway:
            self._running = False
            self._turn += 1
            if self._turn not in self._held:
                returned = self._give_back()
        elif reply.status == Status.OK:
            returned = self._give_back()
        return returned if transaction.oneway else returned + reply.encode(self.version)

    def _give_back(self) -> bytes:
        amount, self._root.received = self._root.received, 0
        return DecStrong(ROOT, amount).encode() if amount else b""

    def _refusal(self, transaction: Transaction, status: int) -> bytes | None:
        return None if transaction.oneway else Reply(status).encode(self.version)

    def _special(self, transaction: Transaction) -> bytes | None:
        parcel = Parcel()
        match transaction.code:
            case Special.GET_ROOT:
                if not transaction.oneway:
                    self._root.sent += 1
                    self._root.known = True
                parcel.binder(ROOT, STABILITY_SYSTEM)
            case Special.GET_MAX_THREADS:
                parcel.int32(self.limits.max_threads)
            case Special.GET_SESSION_ID:
                parcel.byte_array(self.identity)
            case _:
                return self._refusal(transaction, Status.UNKNOWN_TRANSACTION)
        return None if transaction.oneway else Reply(Status.OK, parcel.to_bytes()).encode(self.version)

    def _dec_strong(self, message: DecStrong) -> None:
        root = self._root
        if message.address != ROOT or not root.known or not 0 < message.amount <= root.sent:
            return  # nonsense harms nobody
        root.sent -= message.amount
        if not root.sent and not root.received:
            raise SessionEnded


def _size(transaction: Transaction) -> int:
    return len(transaction.parcel) + len(transaction.objects)


def _built_in(code: int, interface: Interface) -> Reply:
    match code:
        case BuiltIn.INTERFACE:
            return Reply(Status.OK, Parcel().string(interface.descriptor).to_bytes())
        case BuiltIn.PING | BuiltIn.DUMP | BuiltIn.SHELL_COMMAND:
            return Reply(Status.OK)
        case BuiltIn.EXTENSION:
            return Reply(Status.OK, Parcel().binder(None).to_bytes())
        case (
            BuiltIn.SYSTEM_PROPERTIES
            | BuiltIn.SET_RPC_CLIENT
            | BuiltIn.START_RECORDING
            | BuiltIn.STOP_RECORDING
        ):
            return Reply(Status.INVALID_OPERATION)
    # Among them the host's process number, which libbinder tells.
    return Reply(Status.UNKNOWN_TRANSACTION)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a server says to a connection's header.

    Attributes:
        answer: Bytes to send, also to a client that is refused then.
        session: The session, or None for a client that is refused.
        incoming: Whether the server may call on this connection; the client confirms the others.
    """

    answer: bytes
    session: Session | None
    incoming: bool = False


class Sessions:
    """The sessions of one server.

    Args:
        interface: What their roots can do.
        limits: What each client may cost.
    """

    def __init__(self, interface: Interface, limits: Limits | None = None) -> None:
        self._interface = interface
        self._limits = limits or Limits()
        self._sessions: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def accept(self, header: ConnectionHeader) -> Accepted:
        """Begin a session, or join a connection to one.

        A session that was begun lasts until ``leave`` was called for each of its calling connections.
        """
        if header.session_id is not None:
            return self._join(header, header.session_id)
        version = negotiate(header.version, self._limits.version)
        answer = NEW_SESSION_RESPONSE.pack(version)
        if header.incoming or header.fd_mode:
            return Accepted(answer, None)
        identity = secrets.token_bytes(SESSION_ID_SIZE)
        session = self._sessions[identity] = Session(identity, version, self._interface, self._limits)
        return Accepted(answer, session)

    def leave(self, session: Session) -> None:
        """A calling connection of a session has ended."""
        session.closing = True
        session.calling -= 1
        if not session.calling:
            self._sessions.pop(session.identity, None)

    def _join(self, header: ConnectionHeader, identity: bytes) -> Accepted:
        session = self._sessions.get(identity)
        if session is None:
            return Accepted(b"", None)
        if header.incoming:
            return Accepted(CONNECTION_INIT, session, incoming=True)
        if session.closing or session.calling >= self._limits.max_threads:
            return Accepted(b"", None)
        session.calling += 1
        return Accepted(b"", session)
