"""One connection of a guest: reads and writes under deadlines, and what a guest may cost.

What the guest RPC server and the protocols that are spoken on its connections share.
"""

import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

import anyio
from anyio.abc import ByteStream

from vmactor.errors import VmactorError
from vmactor.log import get_logger
from vmactor.messagepack_rpc import CHUNK
from vmactor.messages import GuestReport, decode_guest_report

Report = Callable[[GuestReport], Awaitable[None]]
"""Carries a report out; returns once the state has changed and the event is published, raises to refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRpcLimits:
    """What one guest may cost.

    Attributes:
        message_size: Longest message, in bytes.
        containers: Most arrays and maps in one message, nested or not; bounds the nesting too.
        connections: Most connections at once.
        idle_time: Seconds that a connection may be silent between messages; RPC Binder's may for ever once
            its session is agreed, since its client dials once in a VM's life.
        message_time: Seconds from a message's first byte to its last.
        answer_time: Seconds that the guest may take to accept an answer.
        refusals: Refused calls on a connection before it is closed; as many calls that report nothing
            (unknown notifications, pings) are taken without delay, the next ones cost ``pause`` each.
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
    """No protocol that we speak, or one that was broken."""
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
        protocols: What was spoken on the connections, e.g. ``RPC Binder, version 0``.
    """

    connections: int = 0
    refused_connections: int = 0
    open: int = 0
    calls: int = 0
    refused_calls: int = 0
    ignored: int = 0
    suppressed_log_lines: int = 0
    closed: Counter[CloseReason] = field(default_factory=Counter)
    protocols: Counter[str] = field(default_factory=Counter)


class GuestLog:
    """A logger that a guest cannot make verbose."""

    def __init__(self, cid: int, limits: GuestRpcLimits, statistics: GuestRpcStatistics) -> None:
        self._logger = get_logger(cid=cid)
        self._limits = limits
        self._statistics = statistics
        self._left = 0
        self._period_end = float("-inf")
        self._suppressed = 0

    def warning(self, event: str, **fields: object) -> None:
        """Log a line, or count it where there were too many lately."""
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


class Ended(Exception):  # noqa: N818 - not an error
    """The one way in which a connection's task ends by itself."""

    def __init__(self, reason: CloseReason) -> None:
        super().__init__(reason)
        self.reason = reason


class GuestConnection:
    """One connection: reads and writes under deadlines, and what its server needs to know of it.

    Attributes:
        stream: The connection.
        scope: Cancelled to take the connection's place away.
        reports: Reports of it that were carried out.
        reporting: Whether one is being carried out.
        patient: Whether it may be silent for ever between messages.
        refused: Calls of it that were refused.
    """

    def __init__(self, stream: ByteStream, limits: GuestRpcLimits) -> None:
        self.stream = stream
        self.scope = anyio.CancelScope()
        self.reports = 0
        self.reporting = False
        self.patient = False
        self.refused = 0
        self._fruitless = 0
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
            silence = math.inf if self.patient else self._limits.idle_time
            deadline, late = now + silence, CloseReason.IDLE
        try:
            with anyio.CancelScope(deadline=deadline):
                return await self.stream.receive(CHUNK)
        except anyio.EndOfStream:
            raise Ended(CloseReason.BROKEN if partial else CloseReason.END) from None
        except (anyio.BrokenResourceError, OSError):
            raise Ended(CloseReason.BROKEN) from None
        raise Ended(late)

    async def send(self, data: bytes) -> None:
        """Send an answer; a guest that does not take it in time loses its connection."""
        try:
            with anyio.CancelScope(deadline=anyio.current_time() + self._limits.answer_time):
                await self.stream.send(data)
                return
        except (anyio.BrokenResourceError, OSError):
            raise Ended(CloseReason.BROKEN) from None
        raise Ended(CloseReason.UNREAD)

    async def fruitless(self) -> None:
        """A call reported nothing; from some number on, that takes its time."""
        self._fruitless += 1
        if self._fruitless > self._limits.refusals:
            await anyio.sleep(self._limits.pause)


class Reporter:
    """Carries out what the guest reports on any of its connections, and keeps count.

    Attributes:
        limits: What the guest may cost.
        statistics: The counters.
        log: What may be said of it.
    """

    def __init__(
        self, report: Report, cid: int, limits: GuestRpcLimits, statistics: GuestRpcStatistics
    ) -> None:
        self.limits = limits
        self.statistics = statistics
        self.log = GuestLog(cid, limits, statistics)
        self._report = report

    async def carry_out(self, connection: GuestConnection, method: object, params: object) -> None:
        """Carry out a report.

        Args:
            connection: Where it came from.
            method: Its name, as it came.
            params: Its parameters, as they came.

        Raises:
            VmactorError: It is none, or is refused.
        """
        try:
            report = decode_guest_report(method, params)
            connection.reporting = True
            await self._report(report)
        finally:
            connection.reporting = False
        self.statistics.calls += 1
        connection.reports += 1

    def refused(self, connection: GuestConnection, error: VmactorError) -> None:
        """Count and log a call that was refused."""
        self.statistics.refused_calls += 1
        connection.refused += 1
        self.log.warning("refused a guest's call", kind=error.kind, error=error.message)

    def check(self, connection: GuestConnection) -> None:
        """End a connection with too many refused calls; called when the last one was answered."""
        if connection.refused >= self.limits.refusals:
            raise Ended(CloseReason.REFUSALS)
