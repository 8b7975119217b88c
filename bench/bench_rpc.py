"""Calls to the daemon, and events from it, against grpc.aio and against the least that a socket can do.

``getState`` of a VM, one at a time and with 64 outstanding, is asked of three servers, each a process of
its own on asyncio, on a unix socket: the daemon, an asyncio protocol that unpacks a MessagePack-RPC request
and packs an answer (bare), and grpc.aio with bytes for messages. The client of the first two is the same and
does next to nothing. In turns; what counts are ratios of two rates of the same round.

Then one event after the other is delivered to 100 connections, from the call that publishes it to each of
them having it, by the daemon and by the bare server, which writes the same bytes to all.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import msgpack

from bench.paired import median_interval
from tests.simulated_peer import script
from vmactor import RawConfig, VirtualizationService
from vmactor.daemon.listening import listening
from vmactor.daemon.server import Server

GOALS: Final = {
    ("one at a time", "grpc.aio"): 4.0,
    ("one at a time", "bare"): 0.5,
    ("64 outstanding", "grpc.aio"): 12.0,
}
WINDOWS: Final = {"one at a time": 1, "64 outstanding": 64}
SERVERS: Final = ("vmactor", "bare", "grpc.aio")
METHOD: Final = "/vmactor/getState"
SUBSCRIBERS: Final = 100
EVENTS_PER_SECOND: Final = 100

# -- Servers -----------------------------------------------------------------------------------------


class Bare(asyncio.Protocol):
    """Answers each request with the same text; ``publish`` goes to all connections."""

    everybody: Final[set[asyncio.Transport]] = set()

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self._transport = transport
        self.everybody.add(transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """Forget it."""
        self.everybody.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self._unpacker.feed(data)
        answers = []
        for _, number, method, params in self._unpacker:
            answers.append(msgpack.packb((1, number, None, "READY")))
            if method == "publishMessage":
                event = {"event": "vsock_message", "text": params[3]}
                told = msgpack.packb((2, "event", (1, event)))
                for transport in self.everybody:
                    transport.write(told)
        self._transport.write(b"".join(answers))


async def serve_bare(path: str) -> None:
    """The least."""
    loop = asyncio.get_running_loop()
    await loop.create_unix_server(Bare, path)
    await asyncio.Event().wait()


async def serve_grpc(path: str) -> None:
    """The peer."""
    import grpc  # noqa: PLC0415 - only here

    async def get_state(_request: bytes, _context: Any) -> bytes:
        return b"READY"

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(get_state)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("vmactor", {"getState": handler})])
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


async def serve_vmactor(path: str) -> None:
    """The daemon, with one simulated VM."""
    with tempfile.TemporaryDirectory(prefix="vmb") as state, listening(Path(path)) as listener:
        async with VirtualizationService(vmm="simulated", state_directory=Path(state)) as service:
            kernel = os.memfd_create("kernel")
            vm = await service.create_vm(
                RawConfig(name="x", kernel=kernel, params=script("started", "ready", "serve"))
            )
            await vm.start()
            server = Server(service)
            server.adopt(vm)
            await server.serve([listener])


SERVE: Final[dict[str, Callable[[str], Awaitable[None]]]] = {
    "vmactor": serve_vmactor,
    "bare": serve_bare,
    "grpc.aio": serve_grpc,
}

# -- Clients -----------------------------------------------------------------------------------------


class Caller(asyncio.Protocol):
    """Keeps so many requests outstanding until enough are answered; knows answers by their number only."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker()
        self._transport: Any = None
        self.heard: Callable[[Any], None] = lambda _message: None

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Hand messages over."""
        self._unpacker.feed(data)
        for message in self._unpacker:
            self.heard(message)

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def send(self, number: int, method: str, *params: Any) -> None:
        """Send a request."""
        self._transport.write(msgpack.packb((0, number, method, params)))

    async def ask(self, method: str, *params: Any) -> Any:
        """Call a method; nothing else may be under way."""
        answered = asyncio.get_running_loop().create_future()
        self.heard = answered.set_result
        self.send(0, method, *params)
        message = await answered
        assert message[2] is None, message
        return message[3]

    async def rate(self, vm: str, window: int, count: int) -> tuple[float, list[float]]:
        """Calls a second, and how long each took."""
        done = asyncio.get_running_loop().create_future()
        request = msgpack.packb((0, 0, "getState", (vm,)))
        head, tail = request[:2], request[3:]  # the number is one byte between them
        sent = [0.0] * window
        took: list[float] = []
        clock = time.perf_counter

        def again(numbers: list[int]) -> None:
            now = clock()
            for number in numbers:
                sent[number] = now
            self._transport.write(b"".join(head + bytes([number]) + tail for number in numbers))

        def data_received(data: bytes) -> None:
            self._unpacker.feed(data)
            now = clock()
            numbers = [message[1] for message in self._unpacker]
            took.extend(now - sent[number] for number in numbers)
            if len(took) >= count:
                if not done.done():
                    done.set_result(None)
            else:
                again(numbers)

        self.data_received = data_received  # type: ignore[method-assign]
        began = clock()
        again(list(range(window)))
        await done
        elapsed = clock() - began
        await asyncio.sleep(0.05)  # the last answers
        del self.data_received
        return len(took) / elapsed, took


async def connected(path: str) -> Caller:
    """A connection."""
    _, caller = await asyncio.get_running_loop().create_unix_connection(Caller, path)
    return caller


async def rate_of(server: str, path: str, window: int, count: int) -> tuple[float, list[float]]:
    """As ``Caller.rate``, of any server."""
    if server == "grpc.aio":
        return await rate_of_grpc(path, window, count)
    caller = await connected(path)
    vm = "x" * 22
    if server == "vmactor":
        (info,) = await caller.ask("listVms")
        vm = (await caller.ask("openVm", info["cid"]))["vm"]
    try:
        return await caller.rate(vm, window, count)
    finally:
        caller.close()


async def rate_of_grpc(path: str, window: int, count: int) -> tuple[float, list[float]]:
    """The same by grpc.aio's own client."""
    import grpc  # noqa: PLC0415 - only here

    took: list[float] = []
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary(METHOD)
        await call(b"x" * 22)

        async def caller(calls: int) -> None:
            for _ in range(calls):
                began = time.perf_counter()
                await call(b"x" * 22)
                took.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(caller(count // window) for _ in range(window)))
        return len(took) / (time.perf_counter() - began), took


async def delivery(server: str, path: str, seconds: float) -> tuple[list[float], int]:
    """How long each event took to each subscriber, and how many did not come."""
    took: list[float] = []

    def heard(message: Any) -> None:
        if message[0] == 2 and message[2][1].get("event") == "vsock_message":
            took.append(time.perf_counter() - float(message[2][1]["text"]))

    subscribers = [await connected(path) for _ in range(SUBSCRIBERS)]
    publisher = await connected(path)
    vm = ""
    if server == "vmactor":
        (info,) = await publisher.ask("listVms")
        vm = (await publisher.ask("openVm", info["cid"]))["vm"]
        for one in subscribers:
            await one.ask("subscribe", {"cids": [info["cid"]]})
    publisher.heard = lambda _message: None
    for one in subscribers:
        one.heard = heard
    count = int(seconds * EVENTS_PER_SECOND)
    for number in range(count):
        publisher.send(number % 128, "publishMessage", vm, "guest_to_host", 7000, repr(time.perf_counter()))
        await asyncio.sleep(1 / EVENTS_PER_SECOND)
    await asyncio.sleep(0.3)
    for one in (*subscribers, publisher):
        one.close()
    return took, count * SUBSCRIBERS - len(took)


# -- The bench ---------------------------------------------------------------------------------------


def p99(values: list[float]) -> float:
    """In milliseconds."""
    return statistics.quantiles(values, n=100)[98] * 1000


def main() -> int:
    """Measure, and tell whether the goals are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=4000, help="of each server in each round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("SERVER", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(SERVE[args.serve[0]](args.serve[1]))  # type: ignore[arg-type]
        return 0
    with tempfile.TemporaryDirectory(prefix="vmb") as directory:
        paths = {server: str(Path(directory, server)) for server in SERVERS}
        children = [
            subprocess.Popen([sys.executable, "-m", "bench.bench_rpc", "--serve", server, path])
            for server, path in paths.items()
        ]
        try:
            while not all(Path(path).exists() for path in paths.values()):
                time.sleep(0.05)
            time.sleep(0.5)
            figures = asyncio.run(measure(paths, args.rounds, args.calls))
        finally:
            for child in children:
                child.terminate()
                child.wait()
    return report(figures, as_json=args.json)


async def measure(paths: dict[str, str], rounds: int, calls: int) -> dict[str, Any]:
    """All figures."""
    rates: dict[str, dict[str, list[float]]] = {way: {server: [] for server in paths} for way in WINDOWS}
    latencies: dict[str, dict[str, list[float]]] = {way: {server: [] for server in paths} for way in WINDOWS}
    events: dict[str, list[float]] = {"vmactor": [], "bare": []}
    lost = 0
    for number in range(-1, rounds):
        order = list(paths) if number % 2 else list(reversed(paths))
        for way, window in WINDOWS.items():
            for server in order:
                # grpc.aio is slow, the others need more calls for a time that can be measured.
                count = calls if server == "grpc.aio" or window == 1 else 10 * calls
                rate, took = await rate_of(server, paths[server], window, count)
                if number >= 0:  # the first round warms up
                    rates[way][server].append(rate)
                    latencies[way][server] += took
        for server, slowest in events.items():
            took, missing = await delivery(server, paths[server], 1.0)
            if number >= 0:
                slowest.append(p99(took))
                lost += missing if server == "vmactor" else 0
    return {"rates": rates, "latencies": latencies, "events": events, "lost": lost}


def report(figures: dict[str, Any], *, as_json: bool) -> int:
    """Print it; 1 if a goal was missed."""
    rates, latencies, events = figures["rates"], figures["latencies"], figures["events"]
    met = figures["lost"] == 0
    rows: list[dict[str, Any]] = []
    for way in WINDOWS:
        for server in SERVERS:
            row = {
                "way": way,
                "server": server,
                "per_second": round(statistics.median(rates[way][server])),
                "p99_ms": round(p99(latencies[way][server]), 3),
            }
            if server != "vmactor":
                pairs = zip(rates[way]["vmactor"], rates[way][server], strict=True)
                ratio = median_interval([ours / theirs for ours, theirs in pairs])
                goal = GOALS.get((way, server))
                met &= goal is None or ratio.median >= goal
                row |= {"ratio": [ratio.median, ratio.low, ratio.high], "goal": goal}
            rows.append(row)
    delivered = {server: statistics.median(values) for server, values in events.items()}
    if as_json:
        print(json.dumps({"calls": rows, "events_p99_ms": delivered, "lost": figures["lost"], "met": met}))
        return 0 if met else 1
    print(
        "| `getState` | server | calls a second | p99, ms | vmactor / it | goal |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        ratio_text = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]) if "ratio" in row else ""
        goal_text = row.get("goal") or ""
        print(
            f"| {row['way']} | {row['server']} | {row['per_second']:,} | {row['p99_ms']} | {ratio_text} "
            f"| {goal_text} |"
        )
    print(f"\nevents to {SUBSCRIBERS} connections, p99 in ms: {delivered}; lost: {figures['lost']}")
    print(f"load {os.getloadavg()[0]:.1f}; goals {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
