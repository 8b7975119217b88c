"""The guest's RPC server: takes in, on vsock port = CID, what a guest reports about its payload.

One ``serve_guest_rpc`` runs per VM, under the VM's supervisor, from before the VM starts until the VM is
gone. It owns the connections, not the listener. Everything that arrives here was written by a guest, which
may be hostile: memory, time, log lines and CPU per VM are bounded by ``GuestRpcLimits``, and nothing that a
guest sends ends the server or reaches another connection.

Three layers: ``_Server`` admits connections, ``GuestConnection`` reads and writes one of them under its
deadlines, and a speaker speaks: MessagePack-RPC, whose messages begin with an array's header, or RPC Binder,
which begins with a small version number. The first byte tells.

The protocols for writers of agents: docs/guest-rpc.md.
"""

import contextlib
from typing import Final, Protocol

import anyio
from anyio.abc import ByteStream

from vmactor.actors.guest_binder import BinderSpeaker, GuestBinder, GuestSessions
from vmactor.actors.guest_connection import (
    CloseReason,
    Ended,
    GuestConnection,
    GuestRpcLimits,
    GuestRpcStatistics,
    Report,
    Reporter,
)
from vmactor.actors.guest_messagepack import MessagePackSpeaker
from vmactor.errors import ResourceExhaustedError

BINDER_FIRST_BYTES: Final = range(0x10)
"""Low bytes of RPC Binder's versions, those to come too; in MessagePack a small number, with which no message
begins. TLS would begin with 0x16."""

_EXPECTED: Final = frozenset({CloseReason.END, CloseReason.IDLE, CloseReason.STOPPED, CloseReason.BROKEN})
"""What is counted and no warning: a VM that is killed breaks its connection."""


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
    binder: GuestBinder | None = None,
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
        binder: What a guest that speaks RPC Binder is told; the defaults if None.
    """
    statistics = GuestRpcStatistics() if statistics is None else statistics
    sessions = GuestSessions(binder or GuestBinder())
    reporter = Reporter(report, cid, limits or GuestRpcLimits(), statistics)
    await _Server(listener, reporter, sessions).run()


class _Server:
    """Admits connections."""

    def __init__(self, listener: Listener, reporter: Reporter, sessions: GuestSessions) -> None:
        self._listener = listener
        self._reporter = reporter
        self._limits = reporter.limits
        self._statistics = reporter.statistics
        self._log = reporter.log
        self._sessions = sessions
        self._connections: list[GuestConnection] = []
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

    def _admit(self, stream: ByteStream) -> GuestConnection | None:
        if len(self._connections) >= self._limits.connections:
            replaced = next((c for c in self._connections if not (c.reports or c.reporting)), None)
            if replaced is None:
                self._statistics.refused_connections += 1
                self._fruitless = True
                self._log.warning("too many connections of a guest", limit=self._limits.connections)
                return None
            self._connections.remove(replaced)
            replaced.scope.cancel()
        connection = GuestConnection(stream, self._limits)
        self._connections.append(connection)
        self._statistics.connections += 1
        self._statistics.open += 1
        return connection

    async def _serve(self, connection: GuestConnection) -> None:
        reason = CloseReason.STOPPED
        try:
            with connection.scope:
                try:
                    data = await connection.receive(partial=False)
                    await self._speaker(data, connection).run(data)
                except Ended as ended:
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
            if reason not in _EXPECTED:
                self._log.warning("closed a guest's connection", reason=reason.value)
            await _close(connection.stream)

    def _speaker(self, data: bytes, connection: GuestConnection) -> MessagePackSpeaker | BinderSpeaker:
        if data[0] in BINDER_FIRST_BYTES:
            return BinderSpeaker(connection, self._reporter, self._sessions)
        return MessagePackSpeaker(connection, self._reporter)


async def _close(stream: ByteStream) -> None:
    # Gone already is what was wanted. Not ``aclose_forcefully``: its cancellation costs more than the rest.
    with contextlib.suppress(OSError, anyio.BrokenResourceError), anyio.CancelScope(shield=True):
        await stream.aclose()
