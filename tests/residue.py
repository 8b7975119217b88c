"""What a test may not leave behind: processes, descriptors, threads."""

import gc
import os
import threading
import time
from pathlib import Path


def children() -> dict[int, str]:
    """Every process whose parent is this one, zombies included, with its name and state."""
    found = {}
    me = os.getpid()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        if int(rest[1]) == me:
            found[int(entry.name)] = f"{name} ({rest[0]})"
    return found


def descriptors() -> dict[int, str]:
    """Every open descriptor and what it is."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208 - iterdir would hold a descriptor meanwhile
        try:
            found[int(entry)] = str(Path("/proc/self/fd", entry).readlink())
        except FileNotFoundError:
            continue
    return found


def threads() -> set[str]:
    """Names of live threads, without the loops' own cached idle workers."""
    cached = ("Trio thread", "AnyIO worker thread", "asyncio_")
    return {t.name for t in threading.enumerate() if not t.name.startswith(cached)}


class Residue:
    """A snapshot before, a comparison after."""

    def __init__(self) -> None:
        self._before = children(), descriptors(), threads()

    def report(self) -> list[str]:
        """One line for each thing that is there now and was not before."""
        lines: list[str] = []
        for attempt in range(3):  # the kernel may take a moment to close what a dead process held
            gc.collect()
            before_children, before_fds, before_threads = self._before
            lines = [f"process {p}: {n}" for p, n in children().items() if p not in before_children]
            lines += [
                f"descriptor {fd}: {target}"
                for fd, target in descriptors().items()
                if before_fds.get(fd) != target and not target.startswith("/dev/pts")
            ]
            lines += [f"thread {name}" for name in threads() - before_threads]
            if not lines:
                return []
            time.sleep(0.05 * (attempt + 1))
        return lines
