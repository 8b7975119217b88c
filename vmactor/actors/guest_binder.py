"""RPC Binder on a guest's connection: what an unmodified Microdroid speaks.

The interface is the reference's ``IVirtualMachineService``; its methods end where MessagePack-RPC's do. Later
releases have more methods, and newer ones yet have other codes for the same: so the table is data.
"""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from vmactor.actors.guest_connection import CloseReason, Ended, GuestConnection, Reporter
from vmactor.binder.server import (
    SERVICE_SPECIFIC,
    BinderException,
    Call,
    Interface,
    Limits,
    Method,
    Session,
    SessionEnded,
    Sessions,
)
from vmactor.binder.wire import ConnectionInit, HandshakeDecoder, Message, MessageDecoder, ProtocolError
from vmactor.errors import CODES, IllegalArgumentError, VmactorError
from vmactor.messages import MAX_GUEST_TEXT

DESCRIPTOR: Final = "android.system.virtualmachineservice.IVirtualMachineService"

_STARTED: Final = Method("notifyPayloadStarted")
_READY: Final = Method("notifyPayloadReady")
_FINISHED: Final = Method("notifyPayloadFinished", ("int",))
_ERROR: Final = Method("notifyError", ("int", "String"))

Release = Literal["android13", "explicit-codes"]

INTERFACES: Final = MappingProxyType(
    {
        # Four methods from November 2021 on; those behind them came and went until Android 16 without moving
        # them. What a host off Android cannot give is declined, whatever arguments the release has.
        "android13": Interface(
            DESCRIPTOR,
            MappingProxyType({1: _STARTED, 2: _READY, 3: _FINISHED, 4: _ERROR}),
            MappingProxyType({5: "requestAttestation", 6: "getSecretkeeper", 7: "claimSecretkeeperEntry"}),
        ),
        # Later than February 2025: numbers are written down, and everything moved by one.
        "explicit-codes": Interface(
            DESCRIPTOR,
            MappingProxyType({2: _STARTED, 3: _READY, 4: _FINISHED, 5: _ERROR}),
            MappingProxyType(
                {
                    1: "registerGuestAgent",
                    6: "requestAttestation",
                    7: "getSecretkeeper",
                    8: "claimSecretkeeperEntry",
                    9: "getHostRpcProvider",
                    10: "getEncryptedStoreKEK",
                    11: "forwardAtom",
                }
            ),
        ),
    }
)
"""The method tables, by the first release that has each."""

MAX_THREADS: Final = 4
"""A guest may have no more connections at once (``GuestRpcLimits``)."""

_MAX_MESSAGE: Final = 1000
"""Characters of an exception's message: a reply must stay far below what a client can read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestBinder:
    """What a guest that speaks RPC Binder is told.

    Attributes:
        release: Which method table it was built with: ``android13`` until Android 16, ``explicit-codes`` for
            later ones, in which every code is one more.
        version: The highest protocol version to agree to: 0, which every guest since Android 13 takes, or 1.
        max_threads: Connections on which it may call at the same time, 1 to 4; a Microdroid needs one.

    Raises:
        IllegalArgumentError: One of them is something else.
    """

    release: Release = "android13"
    version: Literal[0, 1] = 0
    max_threads: int = 1

    def __post_init__(self) -> None:
        if self.release not in INTERFACES:
            names = ", ".join(get_args(Release))
            raise IllegalArgumentError(f"no guests of release {self.release!r} are known; there are: {names}")
        if self.version not in (0, 1):
            raise IllegalArgumentError(f"RPC Binder's version is 0 or 1 here, not {self.version!r}")
        if self.max_threads not in range(1, MAX_THREADS + 1):
            raise IllegalArgumentError(
                f"a guest calls on 1 to {MAX_THREADS} connections, not {self.max_threads!r}"
            )


class GuestSessions:
    """The RPC Binder sessions of one guest, and which connections each has."""

    def __init__(self, binder: GuestBinder) -> None:
        limits = Limits(max_threads=binder.max_threads, version=binder.version)
        self.sessions = Sessions(INTERFACES[binder.release], limits)
        self._connections: dict[bytes, list[GuestConnection]] = {}

    def add(self, session: Session, connection: GuestConnection) -> None:
        """A connection belongs to a session from now on."""
        self._connections.setdefault(session.identity, []).append(connection)

    def remove(self, session: Session, connection: GuestConnection) -> None:
        """A connection ends."""
        connections = self._connections[session.identity]
        connections.remove(connection)
        if not connections:
            del self._connections[session.identity]

    def end(self, session: Session) -> None:
        """End all connections of a session."""
        for connection in self._connections.get(session.identity, ()):
            connection.scope.cancel()


class BinderSpeaker:
    """Speaks RPC Binder on one connection."""

    def __init__(self, connection: GuestConnection, reporter: Reporter, sessions: GuestSessions) -> None:
        self._connection = connection
        self._reporter = reporter
        self._sessions = sessions

    async def run(self, data: bytes) -> None:
        """Serve until the connection ends, which is told by ``Ended``."""
        try:
            await self._run(data)
        except ProtocolError as error:
            self._reporter.log.warning("a guest broke RPC Binder", error=str(error))
            raise Ended(CloseReason.OVERSIZE if error.oversize else CloseReason.GARBAGE) from error

    async def _run(self, data: bytes) -> None:
        handshake = HandshakeDecoder()
        handshake.feed(data)
        fresh = True
        while (header := handshake.next()) is None or isinstance(header, ConnectionInit):
            handshake.feed(await self._connection.receive(partial=True, fresh=fresh))
            fresh = False
        accepted = self._sessions.sessions.accept(header)
        session = accepted.session
        try:
            if accepted.answer:
                await self._connection.send(accepted.answer)
            if session is None:
                raise ProtocolError("a session that cannot be had", ends_session=False)
            self._reporter.statistics.protocols[f"RPC Binder, version {session.version:#x}"] += 1
            self._sessions.add(session, self._connection)
            try:
                while not accepted.incoming and handshake.next() is None:
                    handshake.feed(await self._connection.receive(partial=True, fresh=fresh))
                    fresh = False
                self._connection.patient = True
                await self._serve(session, handshake.rest(), calls=not accepted.incoming)
            finally:
                self._sessions.remove(session, self._connection)
        finally:
            if session is not None and not accepted.incoming:
                self._sessions.sessions.leave(session)

    async def _serve(self, session: Session, data: bytes, *, calls: bool) -> None:
        messages = MessageDecoder(session.version)
        fresh = True
        try:
            while True:
                messages.feed(data)
                while (message := messages.next()) is not None:
                    if not calls:
                        raise ProtocolError("a message on a connection that is for our calls")
                    await self._take(session, message)
                    fresh = True
                data = await self._connection.receive(partial=messages.pending > 0, fresh=fresh)
                fresh = messages.pending == 0
        except SessionEnded:
            self._sessions.end(session)
            raise Ended(CloseReason.END) from None
        except ProtocolError as error:
            if error.ends_session:
                self._sessions.end(session)
            raise

    async def _take(self, session: Session, message: Message) -> None:
        reports = self._connection.reports
        outcome = session.receive(message)
        while isinstance(outcome, Call):
            exception = await self._carry_out(outcome)
            answer = session.finish(outcome, exception)
            if answer:
                await self._connection.send(answer)
            outcome = session.next_held() if outcome.transaction.oneway else None
        if outcome:
            await self._connection.send(outcome)
        self._reporter.check(self._connection)
        if self._connection.reports == reports:
            await self._connection.fruitless()

    async def _carry_out(self, call: Call) -> BinderException | None:
        # libbinder bounds a text by its message only; a long reason is cut rather than refused.
        arguments = [word[:MAX_GUEST_TEXT] if isinstance(word, str) else word for word in call.arguments]
        try:
            await self._reporter.carry_out(self._connection, call.method.name, arguments)
        except VmactorError as error:
            self._reporter.refused(self._connection, error)
            travels = error.code if error.code != CODES["TRANSACTION_FAILED"] else SERVICE_SPECIFIC
            return BinderException(travels, error.message[:_MAX_MESSAGE], service_specific=-1)
        return None
