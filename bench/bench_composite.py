"""Disks of partitions: making one, against ``sgdisk``; and QEMU's speed on one, against a raw file.

``python -m bench.bench_composite [PAIRS]``. Everything is paired, in turn, in one run. QEMU's part runs in
``qemu-img bench``, on the very block graph that a VM gets, without a guest, which would be the bottleneck.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from bench.bench_images import compare
from bench.paired import median_interval
from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.images.composite import assemble, crosvm_image
from vmactor.vmm.qemu_disks import FdSets, disk_arguments, prepare

PAIRS: Final = 20
PARTS: Final = 16
PART_SIZE: Final = 16 << 20


def making(directory: Path, pairs: int) -> None:
    """A disk of 16 partitions, in this process and as a whole process."""
    files = part_files(directory)
    target, disk = directory / "made", directory / "disk"

    def sgdisk() -> None:
        with disk.open("wb") as file:
            file.truncate((PARTS + 1) * PART_SIZE)
        table = [word for number in range(PARTS) for word in ("-n", f"0:0:+{PART_SIZE >> 10}K")]
        names = [word for number in range(PARTS) for word in ("-c", f"{number + 1}:part-{number}")]
        subprocess.run(["sgdisk", *table, *names, disk], check=True, stdout=subprocess.DEVNULL)

    def process() -> None:
        for path in directory.glob("made*"):
            path.unlink()
        parts = [f"part-{number}:{path}:writable" for number, path in enumerate(files)]
        command = [sys.executable, "-m", "vmactor", "create-composite", str(target), *parts]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    with ExitStack() as opened:
        parts = [
            Partition(f"part-{number}", opened.enter_context(path.open("r+b")), writable=True)
            for number, path in enumerate(files)
        ]

        def in_process() -> None:
            with ExitStack() as made:
                crosvm_image(assemble(parts, made), made)

        compare("16 partitions, whole process, vs sgdisk", process, sgdisk, pairs)
        compare("16 partitions, in-process, vs sgdisk", in_process, sgdisk, pairs)


def part_files(directory: Path) -> list[Path]:
    """The files of a disk, full of something."""
    files = [directory / f"part{number}" for number in range(PARTS)]
    for number, path in enumerate(files):
        path.write_bytes(bytes([number + 1]) * PART_SIZE)
    return files


def throughput(directory: Path, pairs: int) -> None:
    """The block device of 16 partitions, against one raw file as large."""
    files = part_files(directory)
    raw = directory / "raw"
    with raw.open("wb") as file:
        for path in files:
            file.write(path.read_bytes())
        file.truncate((PARTS + 1) * PART_SIZE)
    for writable in (False, True):
        with ExitStack() as opened:
            graph = block_graph(files, directory, opened, writable=writable)
            for size, depth, count in ((4096, 1, 10000), (4096, 32, 10000), (1 << 20, 8, 200)):
                options = ["-s", str(size), "-d", str(depth), "-c", str(count), "-o", "20480"]
                options += ["-w"] if writable else []
                plain = f"json:{raw_graph(raw)}"
                times = []
                for number in range(pairs):  # in changing order
                    first, second = (graph, plain) if number % 2 else (plain, graph)
                    pair = {first: seconds(options, first), second: seconds(options, second)}
                    times.append((size * count / pair[graph], size * count / pair[plain]))
                ours, theirs, ratio = (
                    median_interval(values)
                    for values in (
                        [own for own, _ in times],
                        [other for _, other in times],
                        [own / other for own, other in times],
                    )
                )
                print(
                    f"{'write' if writable else 'read'} {size >> 10} KiB, depth {depth}: ours "
                    f"{ours.median / 1e6:.0f} MB/s, a raw file {theirs.median / 1e6:.0f} MB/s, "
                    f"ratio {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), {pairs} pairs"
                )


def seconds(options: list[str], image: str) -> float:
    """What ``qemu-img bench`` takes, without its start."""
    command = ["qemu-img", "bench", *options, image]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"completed in ([0-9.]+) seconds", said)
    assert found is not None, said
    return float(found[1])


def raw_graph(raw: Path) -> str:
    """A raw file as ``qemu-img`` takes it."""
    return json.dumps({"driver": "raw", "file": {"driver": "file", "filename": str(raw)}})


def block_graph(files: list[Path], directory: Path, opened: ExitStack, *, writable: bool) -> str:
    """The disk as a VM gets it, with paths for its descriptors: ``qemu-img`` knows no descriptor sets."""
    parts = [
        Partition(f"part-{number}", opened.enter_context(path.open("r+b" if writable else "rb")), writable)
        for number, path in enumerate(files)
    ]
    config = RawConfig(name="bench", disks=[DiskImage(writable=writable, partitions=parts)])
    prepared = prepare(config, opened)
    disk = prepared.joined[0]
    made = [fd for fd in (*disk.composite.fds(), disk.copies) if fd is not None]
    names = {f"/dev/fdset/{fd}": str(Path(f"/proc/self/fd/{fd}").readlink()) for fd in made}
    for name, target in names.items():
        if target.startswith("/memfd:"):
            path = directory / f"memory{Path(name).name}"
            path.write_bytes(Path(f"/proc/self/fd/{Path(name).name}").read_bytes())
            names[name] = str(path)
    description = Path(f"/proc/self/fd/{disk.description}").read_text()
    for name, target in names.items():
        description = description.replace(f'"{name}"', f'"{target}"')
    (directory / "description").write_text(description)
    argument = next(word for word in disk_arguments(config, prepared, FdSets()) if "file=json:" in word)
    graph: dict[str, Any] = json.loads(argument.partition("file=json:")[2].replace(",,", ","))
    graph["file"]["filename"] = str(directory / "description")
    graph["read-only"] = not writable
    text = json.dumps(graph)
    if disk.copies is not None:  # qemu-img has no options for nodes of their own
        copies = {"driver": "file", "filename": names[f"/dev/fdset/{disk.copies}"], "locking": "off"}
        text = text.replace('"copies0"', json.dumps(copies))
    return f"json:{text}"


def main() -> None:
    """Run all comparisons."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    benches: list[Callable[[Path, int], None]] = [making, throughput]
    for bench in benches:
        with tempfile.TemporaryDirectory() as name:
            bench(Path(name), pairs)


if __name__ == "__main__":
    main()
