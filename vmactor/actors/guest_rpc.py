"""The guest's RPC server: takes in, on vsock port = CID, what a guest reports about its payload.

One ``serve_guest_rpc`` runs per VM, under the VM's supervisor, from before the VM starts until the VM is
gone. It owns the connections, not the listener. Everything that arrives here was written by a guest, which
may be hostile: memory, time, log lines and CPU per VM are bounded by ``GuestRpcLimits``, and nothing that a
guest sends ends the server or reaches another connection.

Three layers, so that a second protocol can stand beside the first: ``_Server`` admits connections,
``_Connection`` reads and writes one of them under its deadlines, and ``_MessagePackRpc`` speaks. A speaker is
handed the first bytes that came, which is where one would be chosen (MessagePack-RPC begins with an array's
header, RPC Binder with its version number).

The protocol for writers of agents: docs/guest-rpc.md.
"""

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import anyio
from anyio.abc import ByteStream

from vmactor.errors import ResourceExhaustedError, VmactorError
from vmactor.log import get_logger
from vmactor.messagepack_rpc import CHUNK, BadMessageError, Call, CallDecoder, encode_answer
from vmactor.messages import GuestReport, UnknownMethodError, decode_guest_report

Report = Callable[[GuestReport], Awaitable[None]]
"""Carries a report out; returns once the state has changed and the event is published, raises to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRpcLimits:
    """What one guest may cost.

    Attributes:
        message_size: Longest message, in bytes.
        containers: Most arrays and maps in one message, nested or not; bounds the nesting too.
        connections: Most connections at once.
        idle_time: Seconds that a connection may be silent between messages.
        message_time: Seconds from a message's first byte to its last.
        answer_time: Seconds that the guest may take to accept an answer.
        refusals: Refused calls on a connection before it is closed; as many unknown notifications are ignored
            without delay, the next ones cost ``pause`` each.
        pause: Seconds without a new connection after one that was refused or brought no report; what bounds
            the CPU that a guest can burn by dialling.
        log_lines: Most log lines in ``log_period``; more are counted only.
        log_period: Seconds.
    """

    message_size: int = 64 * 1024
    containers: int = 64
    connections: int = 4
    idle_time: float = 300.0
    message_time: float = 10.0
    answer_time: float = 10.0
    refusals: int = 16
    pause: float = 0.1
    log_lines: int = 20
    log_period: float = 60.0


class CloseReason(StrEnum):
    """Why a connection ended."""

    END = "end"
    """The guest closed it."""
    BROKEN = "broken"
    """It was reset, or the guest closed it in the middle of a message."""
    IDLE = "idle"
    """Silent for ``idle_time``."""
    INCOMPLETE = "incomplete"
    """A message was not complete within ``message_time``."""
    OVERSIZE = "oversize"
    """A message was longer than ``message_size``."""
    GARBAGE = "garbage"
    """Not MessagePack-RPC."""
    REFUSALS = "refusals"
    """Too many refused calls."""
    UNREAD = "unread"
    """The guest did not accept an answer within ``answer_time``."""
    REPLACED = "replaced"
    """It had brought no report, and a new one needed its place."""
    INTERNAL = "internal"
    """An error of ours; it is in the log."""
    STOPPED = "stopped"
    """The server ended."""


@dataclass(slots=True)
class GuestRpcStatistics:
    """Counters of one server; the server writes, others read.

    Attributes:
        connections: Connections admitted.
        refused_connections: Connections closed at once because there were too many.
        open: Connections now.
        calls: Reports carried out.
        refused_calls: Calls that were refused, by us or by the VM.
        ignored: Unknown notifications.
        suppressed_log_lines: Lines kept out of the log.
        closed: Ended connections by reason.
    """

    connections: int = 0
    refused_connections: int = 0
    open: int = 0
    calls: int = 0
    refused_calls: int = 0
    ignored: int = 0
    suppressed_log_lines: int = 0
    closed: Counter[CloseReason] = field(default_factory=Counter)


class Listener(Protocol):
    """What is needed of a listener: ``VsockListener`` is one."""

    async def accept(self) -> ByteStream:
        """The next connection; raises ``anyio.ClosedResourceError`` once the listener is closed."""
        ...


async def serve_guest_rpc(
    listener: Listener,
    report: Report,
    *,
    cid: int,
    limits: GuestRpcLimits | None = None,
    statistics: GuestRpcStatistics | None = None,
) -> None:
    """Serve one guest until cancelled, or until the listener is closed.

    Either way the connections are closed; the listener stays the caller's. A request is answered after
    ``report`` returned. Requests of one connection are carried out one after the other, in order. There is no
    deadline on ``report``: it is expected to have one of its own.

    When all places are taken, a new connection gets the place of the oldest that has not brought a report; if
    every one has, or is about to, the new one is closed. So a connection that has proved useful is never
    disturbed by others, and as a payload's state moves forward at most three times, silence, noise and slow
    messages cannot hold all four places against an agent that dials and speaks.

    Args:
        listener: Where the guest connects; only connections of the right CID come out of it.
        report: Carries a report out.
        cid: The VM's CID, for the log.
        limits: What the guest may cost; the defaults if None.
        statistics: Counters to write, for the caller to read.
    """
    statistics = GuestRpcStatistics() if statistics is None else statistics
    await _Server(listener, report, cid, limits or GuestRpcLimits(), statistics).run()


class _Log:
    """A logger that a guest cannot make verbose."""

    def __init__(self, cid: int, limits: GuestRpcLimits, statistics: GuestRpcStatistics) -> None:
        self._logger = get_logger(cid=cid)
        self._limits = limits
        self._statistics = statistics
        self._left = 0
        self._period_end = float("-inf")
        self._suppressed = 0

    def warning(self, event: str, **fields: object) -> None:
        now = anyio.current_time()
        if now >= self._period_end:
            self._period_end = now + self._limits.log_period
            self._left = self._limits.log_lines
            if self._suppressed:
                fields["suppressed_before"] = self._suppressed
            self._suppressed = 0
        if self._left:
            self._left -= 1
            self._logger.warning(event, **fields)
        else:
            self._suppressed += 1
            self._statistics.suppressed_log_lines += 1


class _Server:
    """Admits connections."""

    def __init__(
        self,
        listener: Listener,
        report: Report,
        cid: int,
        limits: GuestRpcLimits,
        statistics: GuestRpcStatistics,
    ) -> None:
        self._listener = listener
        self._report = report
        self._limits = limits
        self._statistics = statistics
        self._log = _Log(cid, limits, statistics)
        self._connections: list[_Connection] = []
        self._fruitless = False

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            while True:
                try:
                    stream = await self._listener.accept()
                except anyio.ClosedResourceError:
                    break
                except ResourceExhaustedError as error:  # ours to survive: it may pass, the guest waits
                    self._log.warning("cannot accept a guest's connection", error=error.message)
                    self._fruitless = True
                else:
                    if (connection := self._admit(stream)) is not None:
                        tasks.start_soon(self._serve, connection)
                    else:
                        await _close(stream)
                if self._fruitless:
                    self._fruitless = False
                    await anyio.sleep(self._limits.pause)
            tasks.cancel_scope.cancel()

    def _admit(self, stream: ByteStream) -> "_Connection | None":
        if len(self._connections) >= self._limits.connections:
            replaced = next((c for c in self._connections if not (c.reports or c.reporting)), None)
            if replaced is None:
                self._statistics.refused_connections += 1
                self._fruitless = True
                self._log.warning("too many connections of a guest", limit=self._limits.connections)
                return None
            self._connections.remove(replaced)
            replaced.scope.cancel()
        connection = _Connection(stream, self._limits)
        self._connections.append(connection)
        self._statistics.connections += 1
        self._statistics.open += 1
        return connection

    async def _serve(self, connection: "_Connection") -> None:
        reason = CloseReason.STOPPED
        try:
            with connection.scope:
                speaker = _MessagePackRpc(connection, self._report, self._limits, self._statistics, self._log)
                try:
                    await speaker.run(await connection.receive(partial=False))
                except _Ended as ended:
                    reason = ended.reason
                except Exception:
                    reason = CloseReason.INTERNAL
                    self._log.warning("error while serving a guest", exc_info=True)
            if connection.scope.cancelled_caught:
                reason = CloseReason.REPLACED
        finally:
            if connection in self._connections:
                self._connections.remove(connection)
            self._fruitless |= not connection.reports
            self._statistics.open -= 1
            self._statistics.closed[reason] += 1
            if reason not in (CloseReason.END, CloseReason.IDLE, CloseReason.STOPPED):
                self._log.warning("closed a guest's connection", reason=reason.value)
            await _close(connection.stream)


async def _close(stream: ByteStream) -> None:
    with contextlib.suppress(OSError, anyio.BrokenResourceError):  # gone already: that is what was wanted
        await anyio.aclose_forcefully(stream)


class _Ended(Exception):  # noqa: N818 - not an error: the one way in which a connection's task ends
    def __init__(self, reason: CloseReason) -> None:
        super().__init__(reason)
        self.reason = reason


class _Connection:
    """One connection: reads and writes under deadlines, and what its server needs to know of it.

    Attributes:
        stream: The connection.
        scope: Cancelled to take the connection's place away.
        reports: Reports of it that were carried out.
        reporting: Whether one is being carried out.
    """

    def __init__(self, stream: ByteStream, limits: GuestRpcLimits) -> None:
        self.stream = stream
        self.scope = anyio.CancelScope()
        self.reports = 0
        self.reporting = False
        self._limits = limits
        self._message_since = 0.0

    async def receive(self, *, partial: bool, fresh: bool = True) -> bytes:
        """The next bytes.

        Args:
            partial: Whether a message has begun and is not complete.
            fresh: Whether that message is another one than at the last call. A message's time begins when we
                begin to wait for the rest of it, so that our own slowness is not held against the guest, and
                no trickle of bytes extends it.
        """
        now = anyio.current_time()
        if partial:
            if fresh:
                self._message_since = now
            deadline, late = self._message_since + self._limits.message_time, CloseReason.INCOMPLETE
        else:
            deadline, late = now + self._limits.idle_time, CloseReason.IDLE
        try:
            with anyio.CancelScope(deadline=deadline):
                return await self.stream.receive(CHUNK)
        except anyio.EndOfStream:
            raise _Ended(CloseReason.BROKEN if partial else CloseReason.END) from None
        except (anyio.BrokenResourceError, OSError):
            raise _Ended(CloseReason.BROKEN) from None
        raise _Ended(late)

    async def send(self, data: bytes) -> None:
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + self._limits.answer_time):
                await self.stream.send(data)
                return
        except (anyio.BrokenResourceError, OSError):
            raise _Ended(CloseReason.BROKEN) from None
        raise _Ended(CloseReason.UNREAD)


class _MessagePackRpc:
    """Speaks MessagePack-RPC on one connection."""

    def __init__(
        self,
        connection: _Connection,
        report: Report,
        limits: GuestRpcLimits,
        statistics: GuestRpcStatistics,
        log: _Log,
    ) -> None:
        self._connection = connection
        self._report = report
        self._limits = limits
        self._statistics = statistics
        self._log = log
        self._refused = 0
        self._ignored = 0

    async def run(self, data: bytes) -> None:
        """Serve until the connection ends, which is told by ``_Ended``."""
        decoder = CallDecoder(message_size=self._limits.message_size, containers=self._limits.containers)
        fresh = True  # whether the message begun last began with the bytes at hand
        while True:
            decoder.feed(data)
            while True:
                try:
                    if (call := decoder.next()) is None:
                        break
                    await self._carry_out(call)
                except BadMessageError as error:
                    await self._refuse(error.msgid, error)
                    if error.fatal:
                        raise _Ended(
                            CloseReason.OVERSIZE if error.oversize else CloseReason.GARBAGE
                        ) from error
                fresh = True
            data = await self._connection.receive(partial=decoder.pending > 0, fresh=fresh)
            fresh = decoder.pending == 0

    async def _carry_out(self, call: Call) -> None:
        try:
            report = decode_guest_report(call.method, call.params)
            self._connection.reporting = True
            await self._report(report)
        except UnknownMethodError as error:
            if call.msgid is not None:
                await self._refuse(call.msgid, error)
                return
            # A newer agent may tell things that we do not know: that must not cost it the connection.
            self._statistics.ignored += 1
            self._ignored += 1
            if self._ignored > self._limits.refusals:
                await anyio.sleep(self._limits.pause)
        except VmactorError as error:
            await self._refuse(call.msgid, error)
        else:
            self._statistics.calls += 1
            self._connection.reports += 1
            if call.msgid is not None:
                await self._connection.send(encode_answer(call.msgid))
        finally:
            self._connection.reporting = False

    async def _refuse(self, msgid: int | None, error: VmactorError) -> None:
        self._statistics.refused_calls += 1
        self._refused += 1
        self._log.warning("refused a guest's call", kind=error.kind, error=error.message)
        if msgid is not None:
            await self._connection.send(encode_answer(msgid, error))
        if self._refused >= self._limits.refusals:
            raise _Ended(CloseReason.REFUSALS)
