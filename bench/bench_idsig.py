"""An idsig against ``fsverity digest``, against the same hashes over memory, and what it takes of memory.

All of a round are done in turn, in an order that changes, with the APK in the page cache. The idsig is made
anew each time. ``fsverity`` computes the same tree and writes nothing. The hashes over memory are the loop
that hashes a file, without the file and the tree, on two threads of this process.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from bench.paired import median_interval
from tests.apks import KEY, signed_data, signer, with_v3
from vmactor.images.block_hash import BLOCK
from vmactor.images.idsig import create_or_update_idsig_file
from vmactor.images.signatures import load_public_key

GOAL_FSVERITY = 1.8
GOAL_MEMORY = 0.85
GOAL_MIB = 64
MIB = 1 << 20
BUFFER = 32 * MIB


def make_apk(path: Path, size: int) -> Path:
    """An APK of random bytes whose signature nobody has made: an idsig needs none."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("content", "w", force_zip64=True) as entry:
        for _ in range(size // MIB):
            entry.write(os.urandom(MIB))
    data = signed_data([(0x0201, bytes(32))])
    return with_v3(path, signer(data, [(0x0201, b"none")], public_key=KEY))


def idsig(apk: Path) -> None:
    """Make the idsig anew."""
    with apk.open("rb") as source, tempfile.TemporaryFile(dir=apk.parent) as out:
        assert create_or_update_idsig_file(source.fileno(), out.fileno()).written


def fsverity(apk: Path) -> None:
    """The same tree by Debian's program."""
    subprocess.run(["fsverity", "digest", apk], check=True, stdout=subprocess.DEVNULL)


def hash_memory(size: int) -> None:
    """Digests of so many bytes of blocks."""
    buffer = memoryview(bytearray(BUFFER))
    blocks = [buffer[start : start + BLOCK] for start in range(0, BUFFER, BLOCK)]
    sha256 = hashlib.sha256
    while size > 0:
        b"".join([sha256(block).digest() for block in blocks[: -(-size // BLOCK)]])
        size -= BUFFER


def two_threads(size: int) -> None:
    """Half of it in each of two threads."""
    threads = [threading.Thread(target=hash_memory, args=[size // 2]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def status(pid: int | str, field: str) -> float:
    """MiB, from the kernel's record of a process; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field)), 0)


def peak(apk: Path) -> dict[str, float]:
    """MiB that making an idsig takes beyond the interpreter with its modules, and that its processes take."""
    children: dict[str, float] = {}

    def look(done: int) -> None:
        if done % (16 * MIB) < MIB:
            for thread in Path("/proc/self/task").iterdir():
                for pid in (thread / "children").read_text().split():
                    children[pid] = max(children.get(pid, 0), status(pid, "VmHWM"))

    with apk.open("rb") as source, tempfile.TemporaryFile(dir=apk.parent) as out:
        load_public_key(KEY)  # a module that is loaded when first needed
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
        before = status("self", "VmRSS")
        create_or_update_idsig_file(source.fileno(), out.fileno(), look)
        after = status("self", "VmHWM")
    return {"here": after - before, "processes": sum(children.values())}


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> int:
    """Measure, and tell whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="of the APK, in MiB")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.peak)))
        return 0
    with tempfile.TemporaryDirectory(prefix="vmb") as name:
        apk = make_apk(Path(name, "apk"), args.size * MIB)
        size = apk.stat().st_size
        ways: dict[str, Callable[[], None]] = {
            "idsig": lambda: idsig(apk),
            "fsverity": lambda: fsverity(apk),
            "memory, two threads": lambda: two_threads(size),
        }
        for work in ways.values():
            work()  # once for the caches
        rounds = []
        for number in range(args.pairs):
            order = list(ways) if number % 2 else list(reversed(ways))
            rounds.append({way: timed(ways[way]) for way in order})
        memory = json.loads(
            subprocess.run(
                [sys.executable, "-m", "bench.bench_idsig", "--peak", apk], check=True, stdout=subprocess.PIPE
            ).stdout
        )
    ratios = {way: median_interval([each[way] / each["idsig"] for each in rounds]) for way in list(ways)[1:]}
    rates = {way: size / MIB / median_interval([each[way] for each in rounds]).median for way in ways}
    met = (
        ratios["fsverity"].median >= GOAL_FSVERITY
        and ratios["memory, two threads"].median >= GOAL_MEMORY
        and sum(memory.values()) < GOAL_MIB
    )
    if args.json:
        figures = {way: vars(ratio) for way, ratio in ratios.items()}
        print(json.dumps({"ratios": figures, "mib_per_second": rates, "memory_mib": memory, "met": met}))
    else:
        for way, rate in rates.items():
            print(f"{way:<22} {rate:7.0f} MiB/s")
        for way, ratio in ratios.items():
            print(f"idsig / {way:<22} {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
        print(f"memory: {memory['here']:.1f} MiB here, {memory['processes']:.1f} MiB in all processes")
        print(f"load {os.getloadavg()[0]:.1f}; goals {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
