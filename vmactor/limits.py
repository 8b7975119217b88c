"""The host's limits: how much there is of what VMs take, and how much of it is taken, read at one moment.

Every reading is a handful of small files and system calls (a few tenths of a millisecond), so it is done once
in a while and not for every VM. What cannot be read is left out: then the kernel alone refuses. Several
limits can bound one resource; all of them count.
"""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from vmactor.cid import FIRST, LAST

KEPT_DESCRIPTORS: Final = 64
"""What is left for moments (a start, a request to a VMM, the end of a VM) and for the program around us."""
KEPT_THREADS: Final = 8
"""What is left for the program around us; a spawn takes a thread for a moment, too."""

_KIB: Final = 1024
_UNBOUNDED: Final = 1 << 60
"""From here on a number means that there is no limit; version 1 of cgroups has no word for it."""


class Resource(IntEnum):
    """What VMs take of a host. A number is a resource's place in a need."""

    DESCRIPTORS = 0
    PROCESSES = 1
    """Processes and threads, which the kernel counts alike."""
    MEMORY = 2
    """Bytes that are in use now."""
    GUEST_MEMORY = 3
    """Bytes that guests may use some day."""
    CIDS = 4
    SPACE = 5
    """Bytes in the state directory."""
    INODES = 6


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit, as it was read.

    Attributes:
        resource: What it bounds.
        name: What it is, for people.
        limit: How much there can be.
        used: How much of it was taken.
        advice: What to set to have more.
    """

    resource: Resource
    name: str
    limit: int
    used: int
    advice: str


class HostLimits:
    """Reads the limits of this process and its host.

    Args:
        state: The state directory.
        root: Where ``proc`` and ``sys`` are.
    """

    def __init__(self, state: Path, root: Path = Path("/")) -> None:
        self._state = state
        self._proc = root / "proc"
        self._pids, self._memory = _cgroups(root)

    def read(self) -> tuple[Limit, ...]:
        """Every limit that can be read. Never raises."""
        return (
            *self._descriptors(),
            *self._processes(),
            *self._memories(),
            Limit(
                Resource.CIDS,
                "the range of CIDs",
                LAST - FIRST + 1,
                0,
                "stop some VMs, or start others under another state directory",
            ),
            *self._files(),
        )

    def _descriptors(self) -> Iterator[Limit]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return
        more = f"ulimit -n {hard}" if soft < hard else "ulimit -Hn as root, then ulimit -n"
        yield Limit(
            Resource.DESCRIPTORS,
            "open files of this process",
            soft,
            self._open_files(soft) + KEPT_DESCRIPTORS,
            f"raise the limit: '{more}' in the shell, or LimitNOFILE= of the systemd unit",
        )

    def _open_files(self, limit: int) -> int:
        here = self._proc / "self" / "fd"
        try:
            return here.stat().st_size or sum(1 for _ in here.iterdir())  # Linux tells the number since 6.2
        except OSError:
            return limit  # no descriptor is left to look with

    def _processes(self) -> Iterator[Limit]:
        threads = self._threads()
        most = [self._number("sys/kernel/threads-max"), self._number("sys/kernel/pid_max")]
        known = [number for number in most if number is not None]
        if threads is not None and known:
            yield Limit(
                Resource.PROCESSES,
                "processes and threads of the host",
                min(known),
                threads + KEPT_THREADS,
                "raise it: sysctl kernel.threads-max and kernel.pid_max",
            )
        soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if os.getuid() != 0 and soft != resource.RLIM_INFINITY and threads is not None:
            # All threads of the host are no fewer than this user's. To count these takes a walk through
            # /proc, so it is done only where the difference can matter.
            used = threads if threads < soft // 2 else self._threads_of(os.getuid())
            yield Limit(
                Resource.PROCESSES,
                "processes and threads of this user",
                soft,
                used + KEPT_THREADS,
                "raise the limit: 'ulimit -u', nproc in limits.conf, or LimitNPROC= of the systemd unit",
            )
        for group in self._pids:
            limit, used_there = _number(group / "pids.max"), _number(group / "pids.current")
            if limit is not None and used_there is not None:
                yield Limit(
                    Resource.PROCESSES,
                    f"processes and threads of the cgroup {group}",
                    limit,
                    used_there + KEPT_THREADS,
                    "raise its pids.max, or TasksMax= of the systemd unit (--pids-limit of the container)",
                )

    def _threads(self) -> int | None:
        with suppress(OSError, ValueError, IndexError):  # "0.51 2.40 5.31 1/364 6789"
            return int((self._proc / "loadavg").read_text().split()[3].partition("/")[2])
        return None

    def _threads_of(self, uid: int) -> int:
        count = 0
        with suppress(OSError):
            for entry in os.scandir(self._proc):
                with suppress(OSError, ValueError, IndexError):
                    if entry.name.isdigit() and entry.stat().st_uid == uid:
                        stat = Path(entry.path, "stat").read_bytes()
                        count += int(stat.rpartition(b")")[2].split()[20 - 3])
        return count

    def _memories(self) -> Iterator[Limit]:
        figures = self._meminfo()
        total, available = figures.get("MemTotal"), figures.get("MemAvailable")
        smallest, name = total, "the host's memory"
        if total is not None and available is not None:
            yield Limit(
                Resource.MEMORY,
                "the host's memory in use",
                total,
                total - available,
                "stop other programs or VMs, or give VMs less memory (memory_mib)",
            )
        for group in self._memory:
            limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
            used = _number(group / "memory.current", group / "memory.usage_in_bytes")
            if limit is None or used is None:
                continue
            yield Limit(
                Resource.MEMORY,
                f"memory in use by the cgroup {group}",
                limit,
                max(used - _reclaimable(group), 0),
                "raise its memory.max, or MemoryMax= of the systemd unit (--memory of the container)",
            )
            if smallest is None or limit < smallest:
                smallest, name = limit, f"the memory of the cgroup {group}"
        if smallest is not None:
            yield Limit(
                Resource.GUEST_MEMORY,
                f"guests' memory beside {name}",
                smallest,
                0,
                "give VMs less memory (memory_mib), or promise more than there is "
                "(memory_overcommit of AdmissionPolicy)",
            )

    def _meminfo(self) -> dict[str, int]:
        with suppress(OSError, ValueError, IndexError):
            lines = (self._proc / "meminfo").read_text().splitlines()[:3]
            pairs = (line.partition(":") for line in lines)
            return {name: int(rest.split()[0]) * _KIB for name, _, rest in pairs}
        return {}

    def _files(self) -> Iterator[Limit]:
        try:
            found = os.statvfs(self._state)
        except OSError:
            return
        advice = f"make room in {self._state}, or name another state directory"
        size = found.f_frsize
        used = found.f_blocks - found.f_bavail
        yield Limit(
            Resource.SPACE, "space of the state directory", found.f_blocks * size, used * size, advice
        )
        if found.f_files:  # some file systems make inodes as they need them
            used = found.f_files - found.f_favail
            yield Limit(Resource.INODES, "inodes of the state directory", found.f_files, used, advice)

    def _number(self, name: str) -> int | None:
        return _number(self._proc / name)


def _cgroups(root: Path) -> tuple[list[Path], list[Path]]:
    """The cgroups whose limits for processes and for memory hold for us: ours and those around it."""
    pids: list[Path] = []
    memory: list[Path] = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2, alone or beside version 1
                for mount in (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"):
                    pids += _with(mount, path, "pids.max")
                    memory += _with(mount, path, "memory.max")
            elif "pids" in controllers.split(","):
                pids += _with(root / "sys/fs/cgroup/pids", path, "pids.max")
            elif "memory" in controllers.split(","):
                memory += _with(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
    return pids, memory


def _with(mount: Path, path: str, name: str) -> list[Path]:
    """Those of a cgroup and the ones around it that have such a file; in a container some cannot be seen."""
    here = mount / path.lstrip("/")
    around = [here, *here.parents]
    return [group for group in around if group.is_relative_to(mount) and (group / name).is_file()]


def _number(*paths: Path) -> int | None:
    """The number in the first of the files that there is; None if there is none, or no limit in it."""
    for path in paths:
        with suppress(OSError):
            text = path.read_text().strip()
            return int(text) if text.isdigit() and int(text) < _UNBOUNDED else None
    return None


def _reclaimable(group: Path) -> int:
    """Bytes of a cgroup that hold nothing but unused files."""
    with suppress(OSError, ValueError):
        lines = (group / "memory.stat").read_text().splitlines()
        figures = {name: int(figure) for name, figure in (line.split() for line in lines)}
        return figures.get("total_inactive_file", figures.get("inactive_file", 0))
    return 0
