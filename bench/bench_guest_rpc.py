"""Calls of guests a second: RPC Binder against MessagePack-RPC, at the same server with the same report.

A guest calls ``notifyPayloadReady`` one at a time over a unix socket; both ways in turns, on each loop. The
guest is in the same process and as small as can be: it sends the same bytes and waits for so many bytes.
"""

import argparse
import socket
import time
from collections.abc import Mapping
from typing import Any, Final

import anyio
from anyio.abc import ByteStream

from bench.paired import median_interval
from vmactor.actors.guest_binder import DESCRIPTOR
from vmactor.actors.guest_rpc import serve_guest_rpc
from vmactor.binder.parcel import Parcel
from vmactor.binder.wire import CONNECTION_INIT, NO_ADDRESS, ROOT, ConnectionHeader, Transaction
from vmactor.guest import pack
from vmactor.messages import GuestReport
from vmactor.vsock import VsockStream

LOOPS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


class Listener:
    """Hands out one end of each new pair of sockets."""

    def __init__(self) -> None:
        self._send, self._receive = anyio.create_memory_object_stream[ByteStream](8)

    async def accept(self) -> ByteStream:
        """The next connection."""
        return await self._receive.receive()

    def dial(self) -> ByteStream:
        """A connection."""
        ours, theirs = (
            VsockStream(sock, cid=2048, port=None, half_close=False) for sock in socket.socketpair()
        )
        self._send.send_nowait(ours)
        return theirs


async def exactly(stream: ByteStream, size: int) -> None:
    """Receive so many bytes."""
    while size:
        size -= len(await stream.receive(size))


async def calls(stream: ByteStream, request: bytes, answer: int, count: int) -> tuple[float, float]:
    """Calls a second, and seconds of this process's processor time for each."""
    began, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        await stream.send(request)
        await exactly(stream, answer)
    return count / (time.perf_counter() - began), (time.process_time() - used) / count


async def measure(rounds: int, count: int) -> dict[str, list[tuple[float, float]]]:
    """Figures of both ways, a pair for each round."""

    async def report(_report: GuestReport) -> None:
        pass

    listener = Listener()
    figures: dict[str, list[tuple[float, float]]] = {"binder": [], "messagepack": []}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: serve_guest_rpc(listener, report, cid=2048))
        binder, messagepack = listener.dial(), listener.dial()
        async with binder, messagepack:
            header = ConnectionHeader(0, incoming=False, fd_mode=0, session_id=None).encode()
            await binder.send(header + CONNECTION_INIT + Transaction(NO_ADDRESS, 0).encode())
            await exactly(binder, 8 + 36)
            call = Transaction(ROOT, 2, parcel=Parcel().string(DESCRIPTOR).to_bytes()).encode()
            ways = {
                "binder": (binder, call, 32 + 24),
                "messagepack": (messagepack, pack([0, 1, "notifyPayloadReady", []]), 5),
            }
            for _ in range(rounds):
                for name, (stream, request, answer) in ways.items():
                    figures[name].append(await calls(stream, request, answer, count))
        tasks.cancel_scope.cancel()
    return figures


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()
    print("| loop | binder / messagepack | by processor time | calls a second: binder | messagepack |")
    print("|---|---|---|---|---|")
    for loop, (backend, options) in LOOPS.items():
        figures = anyio.run(measure, args.rounds, args.calls, backend=backend, backend_options=options)
        pairs = list(zip(figures["binder"], figures["messagepack"], strict=True))
        rates = median_interval([ours[0] / theirs[0] for ours, theirs in pairs])
        costs = median_interval([theirs[1] / ours[1] for ours, theirs in pairs])
        binder, messagepack = (
            median_interval([rate for rate, _ in figures[name]]).median for name in figures
        )
        print(
            f"| {loop} | {rates.median:.2f} ({rates.low:.2f} to {rates.high:.2f}) "
            f"| {costs.median:.2f} ({costs.low:.2f} to {costs.high:.2f}) "
            f"| {binder:,.0f} | {messagepack:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
