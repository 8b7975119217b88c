"""MessagePack-RPC on a guest's connection; docs/guest-rpc.md describes it for writers of agents."""

from vmactor.actors.guest_connection import CloseReason, Ended, GuestConnection, Reporter
from vmactor.errors import VmactorError
from vmactor.messagepack_rpc import BadMessageError, Call, CallDecoder, encode_answer
from vmactor.messages import UnknownMethodError


class MessagePackSpeaker:
    """Speaks MessagePack-RPC on one connection."""

    def __init__(self, connection: GuestConnection, reporter: Reporter) -> None:
        self._connection = connection
        self._reporter = reporter

    async def run(self, data: bytes) -> None:
        """Serve until the connection ends, which is told by ``Ended``."""
        limits = self._reporter.limits
        self._reporter.statistics.protocols["MessagePack-RPC"] += 1
        decoder = CallDecoder(message_size=limits.message_size, containers=limits.containers)
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
                        raise Ended(
                            CloseReason.OVERSIZE if error.oversize else CloseReason.GARBAGE
                        ) from error
                fresh = True
            data = await self._connection.receive(partial=decoder.pending > 0, fresh=fresh)
            fresh = decoder.pending == 0

    async def _carry_out(self, call: Call) -> None:
        try:
            await self._reporter.carry_out(self._connection, call.method, call.params)
        except UnknownMethodError as error:
            if call.msgid is not None:
                await self._refuse(call.msgid, error)
                return
            # A newer agent may tell things that we do not know: that must not cost it the connection.
            self._reporter.statistics.ignored += 1
            await self._connection.fruitless()
        except VmactorError as error:
            await self._refuse(call.msgid, error)
        else:
            if call.msgid is not None:
                await self._connection.send(encode_answer(call.msgid))

    async def _refuse(self, msgid: int | None, error: VmactorError) -> None:
        self._reporter.refused(self._connection, error)
        if msgid is not None:
            await self._connection.send(encode_answer(msgid, error))
        self._reporter.check(self._connection)
