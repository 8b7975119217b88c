"""Processor time and memory of real processes, and of texts that the kernel could give."""

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmactor.usage import CpuTime, Memory, cpu_time, memory, parse_smaps, parse_stat

MIB = 1 << 20


@contextmanager
def child(code: str) -> Iterator[int]:
    """A Python process that ran ``code`` and now waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
        process.kill()


@pytest.mark.parametrize("name", ["crosvm_guest", "memory-backend-memfd"])
def test_touched_guest_memory_is_counted_apart_and_untouched_is_not(name: str) -> None:
    code = (
        "import mmap, os\n"
        f"fd = os.memfd_create({name!r}); os.ftruncate(fd, {64 * MIB}); m = mmap.mmap(fd, {64 * MIB})\n"
        f"m[:{16 * MIB}] = bytes({16 * MIB})"
    )
    with child(code) as pid:
        used = memory(pid)
    assert used is not None
    assert used.guest_kib == 16 * 1024
    assert used.total_kib > used.guest_kib + 1024  # the interpreter itself


def test_a_process_that_works_is_seen_to() -> None:
    with child("import time\nwhile time.process_time() < 0.3: pass") as pid:
        used = cpu_time(pid)
    assert used is not None
    assert used.total_ms >= 250
    assert used.guest_ms == 0


def test_what_a_zombie_used_is_still_known_but_its_memory_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    used, left = cpu_time(process.pid), memory(process.pid)
    process.wait()
    assert used is not None
    assert used.total_ms >= 150
    assert left is None
    assert cpu_time(process.pid) is None


def test_blanks_and_parentheses_in_a_process_name_shift_nothing() -> None:
    fields = [str(number) for number in range(3, 53)]
    tick = 1000 // os.sysconf("SC_CLK_TCK")
    stat = b"7 (a) 1 2 (b c) " + " ".join(fields).encode()
    assert parse_stat(stat) == CpuTime(guest_ms=43 * tick, total_ms=(14 + 15) * tick)


def test_only_the_resident_size_of_mappings_of_guest_memory_is_the_guests() -> None:
    text = b"""\
7f00-7f10 rw-s 00000000 00:01 9 /memfd:crosvm_guest (deleted)
Size: 64 kB
Rss: 8 kB
Pss: 4 kB
aa00-aa10 r--p 00000000 00:01 9 /usr/lib/libcrosvm_other.so
Rss: 3 kB
Pss: 1 kB
c000-c010 rw-s 00000000 00:01 9 /memfd:crosvm_guest (deleted)
Rss: 16 kB
VmFlags: rd wr
"""
    assert parse_smaps(text.splitlines()) == Memory(guest_kib=24, total_kib=27)


def test_pages_of_this_process_are_counted() -> None:
    before = memory(os.getpid())
    with mmap.mmap(-1, 32 * MIB) as area:
        area[:] = bytes(32 * MIB)
        during = memory(os.getpid())
    assert before is not None
    assert during is not None
    assert during.total_kib - before.total_kib > 30 * 1024
