"""Start to payload ready: a real guest under vmactor against the bare command line of QEMU and its helper.

Both boot the same kernel, initrd and devices. The floor starts the helper, waits for its socket, starts QEMU
and answers the guest's two reports with the least code that can; vmactor does all that it does. Pairs are
interleaved and change places each time.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import anyio
import msgpack

from bench.paired import Interval, median_interval
from vmactor import RawConfig, VirtualizationService, load_config
from vmactor.host import HostFacts, probe
from vmactor.vmm.driver import Channels, Launch, VhostUserVsock
from vmactor.vmm.qemu import QemuDriver, descriptors

SCRIPT = "started;ready;serve"
CID = 60000
GOAL_SECONDS = 0.050


def scripted(config: RawConfig) -> RawConfig:
    """The configuration with the agent's script in it."""
    return replace(config, params=f'{config.params} vmactor.script="{SCRIPT}"')


def bare(config: RawConfig, facts: HostFacts) -> float:
    """Seconds from nothing to the guest's second report, without vmactor."""
    helper_path = facts.vhost_device_vsock.path
    assert helper_path is not None, facts.vhost_device_vsock.advice
    with (
        tempfile.TemporaryDirectory(prefix="vmb", dir="/tmp") as name,
        socket.socket(socket.AF_UNIX) as server,
    ):
        directory = Path(name)
        null = os.open("/dev/null", os.O_WRONLY)
        began = time.monotonic()
        server.bind(f"{name}/vsock_{CID}")
        server.listen()
        sockets = ["--socket", f"{name}/vhost.sock", "--uds-path", f"{name}/vsock"]
        helper = subprocess.Popen(
            [helper_path, "--guest-cid", str(CID), *sockets],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with socket.socket(socket.AF_UNIX) as device:
            while True:
                try:
                    device.connect(f"{name}/vhost.sock")
                    break
                except OSError:
                    time.sleep(0.001)
            channels = Channels(null, null, None, None, None)
            launch = Launch("bare", CID, config, VhostUserVsock(device.fileno()), channels, directory)
            arguments = QemuDriver(facts).command_line(launch)
            arguments.remove("-S")  # nobody has to be told that the guest may go on
            vmm = subprocess.Popen(
                arguments, pass_fds=descriptors(launch), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        try:
            for _ in range(2):
                answer_one(server)
            return time.monotonic() - began
        finally:
            for process in (vmm, helper):
                process.kill()
                process.wait()
            os.close(null)


def answer_one(server: socket.socket) -> None:
    """Take one report and say that all is well."""
    connection, _ = server.accept()
    with connection:
        unpacker = msgpack.Unpacker()
        for request in unpacker_of(connection, unpacker):
            connection.sendall(msgpack.packb([1, request[1], None, None]))
            return


def unpacker_of(connection: socket.socket, unpacker: msgpack.Unpacker):  # type: ignore[no-untyped-def]
    """Messages as they come."""
    while data := connection.recv(4096):
        unpacker.feed(data)
        yield from unpacker


async def managed(config: RawConfig, service: VirtualizationService) -> tuple[float, float]:
    """Seconds from ``start`` to the event ``payload_ready``, and this process's CPU seconds in between."""
    async with await service.create_vm(config) as vm:
        with vm.events() as events:
            cpu, began = time.process_time(), time.monotonic()
            await vm.start()
            async for event in events:
                if event.kind == "payload_ready":
                    return time.monotonic() - began, time.process_time() - cpu
    raise RuntimeError("the guest never became ready")


async def measure(guest: Path, pairs: int) -> dict[str, list[float]]:
    """Run the pairs, after one of each that does not count."""
    facts = probe()
    figures: dict[str, list[float]] = {"bare": [], "vmactor": [], "cpu": []}
    with (
        load_config(guest / "vm.json", name="bench") as loaded,
        tempfile.TemporaryDirectory(dir="/tmp") as state,
    ):
        config = scripted(loaded)
        async with VirtualizationService(vmm="qemu", state_directory=state) as service:
            for number in range(-1, pairs):
                pair: dict[str, float] = {}
                for way in ("bare", "vmactor") if number % 2 else ("vmactor", "bare"):
                    if way == "bare":
                        pair["bare"] = bare(config, facts)
                    else:
                        pair["vmactor"], pair["cpu"] = await managed(config, service)
                if number >= 0:
                    for key, value in pair.items():
                        figures[key].append(value)
                    difference = pair["vmactor"] - pair["bare"]
                    print(
                        f"pair {number + 1}/{pairs}: bare {pair['bare']:.3f} s, "
                        f"vmactor {pair['vmactor']:.3f} s, difference {difference * 1e3:+.1f} ms",
                        file=sys.stderr,
                    )
    return figures


def summary(figures: dict[str, list[float]]) -> dict[str, object]:
    """What to report."""
    differences = [a - b for a, b in zip(figures["vmactor"], figures["bare"], strict=True)]
    difference, ratio = (
        median_interval(differences),
        median_interval([a / b for a, b in zip(figures["vmactor"], figures["bare"], strict=True)]),
    )
    cpu, floor = median_interval(figures["cpu"]), median_interval(figures["bare"])

    def row(interval: Interval, scale: float) -> dict[str, float]:
        return {
            "median": round(interval.median * scale, 3),
            "low": round(interval.low * scale, 3),
            "high": round(interval.high * scale, 3),
        }

    return {
        "pairs": len(differences),
        "confidence": round(difference.confidence, 4),
        "bare_seconds": row(floor, 1),
        "difference_ms": row(difference, 1000),
        "ratio": row(ratio, 1),
        "manager_cpu_ms_per_start": row(cpu, 1000),
        "goal_upper_bound_ms": GOAL_SECONDS * 1000,
        "goal_met": difference.high <= GOAL_SECONDS,
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--guest", type=Path, default=Path("build/guest"))
    parser.add_argument("--loop", choices=("asyncio", "uvloop", "trio"), default="asyncio")
    options = parser.parse_args()
    backend = "trio" if options.loop == "trio" else "asyncio"
    backend_options = {"use_uvloop": True} if options.loop == "uvloop" else {}
    figures = anyio.run(
        measure, options.guest, options.pairs, backend=backend, backend_options=backend_options
    )
    print(json.dumps({"loop": options.loop, **summary(figures)}, indent=2))


if __name__ == "__main__":
    main()
