"""The reader of the host's limits, against trees that look like hosts, and against this host."""

import os
import resource
from pathlib import Path

import pytest

from vmactor.limits import KEPT_DESCRIPTORS, KEPT_THREADS, HostLimits, Limit, Resource

MEMINFO = "MemTotal:       1024 kB\nMemFree:         100 kB\nMemAvailable:    512 kB\n"


def host(root: Path, files: dict[str, str]) -> HostLimits:
    """A host that has these files, and two open files."""
    (root / "proc/self/fd").mkdir(parents=True, exist_ok=True)
    for number in "01":
        (root / "proc/self/fd" / number).touch()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return HostLimits(root, root)


def of(limits: tuple[Limit, ...], resource_: Resource) -> list[tuple[int, int]]:
    return [(limit.limit, limit.used) for limit in limits if limit.resource is resource_]


def test_a_host_whose_files_are_missing_has_the_limits_that_need_none(tmp_path: Path) -> None:
    found = host(tmp_path, {}).read()
    assert {limit.resource for limit in found} <= {
        Resource.DESCRIPTORS, Resource.CIDS, Resource.SPACE, Resource.INODES,
    }  # fmt: skip


def test_processes_and_memory_of_a_host_are_read(tmp_path: Path) -> None:
    files = {
        "proc/loadavg": "0.51 2.40 5.31 1/364 6789\n",
        "proc/sys/kernel/threads-max": "5000\n",
        "proc/sys/kernel/pid_max": "32768\n",
        "proc/meminfo": MEMINFO,
    }
    found = host(tmp_path, files).read()
    assert of(found, Resource.PROCESSES)[0] == (5000, 364 + KEPT_THREADS)
    assert of(found, Resource.MEMORY) == [(1024 << 10, 512 << 10)]
    assert of(found, Resource.GUEST_MEMORY) == [(1024 << 10, 0)]


def test_files_that_hold_nonsense_are_passed_over(tmp_path: Path) -> None:
    files = {
        "proc/loadavg": "idle",
        "proc/sys/kernel/pid_max": "many",
        "proc/meminfo": "MemTotal\nMemFree: x kB\n",
        "proc/self/cgroup": "nothing\n",
    }
    found = host(tmp_path, files).read()
    assert not of(found, Resource.PROCESSES)
    assert not of(found, Resource.MEMORY)


@pytest.mark.parametrize("mount", ["sys/fs/cgroup", "sys/fs/cgroup/unified"])
def test_cgroups_of_version_2_count_with_all_around_them(tmp_path: Path, mount: str) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/user.slice/shell.scope\n",
        f"{mount}/user.slice/pids.max": "100",
        f"{mount}/user.slice/pids.current": "40",
        f"{mount}/user.slice/shell.scope/pids.max": "max",
        f"{mount}/user.slice/shell.scope/pids.current": "7",
        f"{mount}/user.slice/shell.scope/memory.max": "4096",
        f"{mount}/user.slice/shell.scope/memory.current": "3000",
        f"{mount}/user.slice/shell.scope/memory.stat": "anon 5\ninactive_file 1000\n",
    }
    found = host(tmp_path, files).read()
    assert (100, 40 + KEPT_THREADS) in of(found, Resource.PROCESSES)
    assert of(found, Resource.MEMORY)[1:] == [(4096, 2000)]
    assert of(found, Resource.GUEST_MEMORY) == [(4096, 0)]


def test_cgroups_of_version_1_count_too(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "8:pids:/a\n4:memory,hugetlb:/outside/of/what/is/seen\n0::/\n",
        "sys/fs/cgroup/pids/a/pids.max": "50\n",
        "sys/fs/cgroup/pids/a/pids.current": "3\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
    }
    found = host(tmp_path, files).read()
    assert of(found, Resource.PROCESSES)[-1] == (50, 3 + KEPT_THREADS)
    assert of(found, Resource.MEMORY) == []


def test_this_host_tells_how_many_files_are_open_and_what_to_set() -> None:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = HostLimits(Path("/"))
    before = of(reader.read(), Resource.DESCRIPTORS)
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    try:
        (after,) = (limit for limit in reader.read() if limit.resource is Resource.DESCRIPTORS)
    finally:
        for fd in opened:
            os.close(fd)
    assert before[0][0] == after.limit == soft
    assert after.used == before[0][1] + 5 > KEPT_DESCRIPTORS
    assert "ulimit" in after.advice
