"""Images: what vmactor makes, against the foreign program that makes the same. Paired, in turn, in one run.

``python -m bench.bench_images [PAIRS]``
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.paired import median_interval

PAIRS: Final = 30
SIZE: Final = 10 << 20


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> None:
    """Do both in turn, in changing order, and print the ratio of times: above 1 where we are faster."""
    ours(), theirs()  # whatever has to be read from a disk
    times: list[tuple[float, float]] = []
    for number in range(pairs):
        if number % 2:
            other = timed(theirs)
            times.append((timed(ours), other))
        else:
            own = timed(ours)
            times.append((own, timed(theirs)))
    own_ms, other_ms, ratio = (
        median_interval(values)
        for values in (
            [own * 1e3 for own, _ in times],
            [other * 1e3 for _, other in times],
            [other / own for own, other in times],
        )
    )
    print(
        f"{title}: ours {own_ms.median:.2f} ms, theirs {other_ms.median:.2f} ms, "
        f"ratio {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), {pairs} pairs"
    )


def partitions(directory: Path, pairs: int) -> None:
    """A partition of 10 MiB, against ``qemu-img create`` of the same size."""
    from vmactor.images.partition import initialize_writable_partition  # noqa: PLC0415
    from vmactor.messages import PartitionType  # noqa: PLC0415

    path = directory / "partition"

    def qemu_img() -> None:
        path.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)

    def process() -> None:
        path.unlink(missing_ok=True)
        subprocess.run(
            [sys.executable, "-m", "vmactor", "create-partition", path, str(SIZE)],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def in_process(kind: PartitionType) -> None:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            initialize_writable_partition(fd, SIZE, kind)
        finally:
            os.close(fd)

    compare("partition, whole process, vs qemu-img create", process, qemu_img, pairs)
    compare(
        "partition, in-process, vs qemu-img create", lambda: in_process(PartitionType.RAW), qemu_img, pairs
    )
    compare(
        "instance image, in-process, vs qemu-img create",
        lambda: in_process(PartitionType.ANDROID_VM_INSTANCE),
        qemu_img,
        pairs,
    )


def main() -> None:
    """Run all comparisons."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    with tempfile.TemporaryDirectory() as name:
        partitions(Path(name), pairs)


if __name__ == "__main__":
    main()
