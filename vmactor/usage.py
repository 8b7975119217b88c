"""What a VM uses of its host: processor time and memory, as the kernel counts them for its VMM.

Source: the reference's status monitor, which reads field 43 of ``/proc/PID/stat`` and sums ``Rss`` over
``/proc/PID/smaps``. It does so every second for every VM; reading ``smaps`` costs some tenths of a
millisecond, so here it is read when somebody asks.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

GUEST_MEMORY: Final = (b"crosvm_guest", b"memory-backend-memfd")
"""Names of the memory files that hold a guest's memory: crosvm's, and QEMU's."""

_SMAPS_LIMIT: Final = 4 << 20
"""Bytes of ``smaps`` that are read at most; a VMM has about a hundred mappings, a tenth of this."""
_TICK_MS: Final = 1000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Processor time since the start of a VMM, in milliseconds.

    Attributes:
        guest_ms: Spent running the guest; 0 where the guest is emulated, since the kernel cannot tell then.
        total_ms: All of it, the guest's included.
    """

    guest_ms: int = 0
    total_ms: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a VMM now, in KiB.

    Attributes:
        guest_kib: What the guest's memory takes.
        total_kib: All of it, the guest's included.
    """

    guest_kib: int = 0
    total_kib: int = 0

    def most(self, other: "Memory") -> "Memory":
        """The greater of both, each figure by itself."""
        return Memory(max(self.guest_kib, other.guest_kib), max(self.total_kib, other.total_kib))


@dataclass(frozen=True, slots=True)
class Usage:
    """What a VM uses of its host.

    Attributes:
        cpu: Processor time since its VMM was started.
        memory: Resident memory now.
        seconds: Processor time that it took to find out.
    """

    cpu: CpuTime
    memory: Memory
    seconds: float = field(default=0.0, compare=False)


def measure(pid: int) -> Usage | None:
    """Both at once; None if there is no such process, or it is not ours to look at.

    Takes from tenths of a millisecond to some milliseconds, by the memory of the process.
    May block for as long as the process's memory map is being changed, so not for the event loop's thread.
    """
    began = time.thread_time()
    cpu, resident = cpu_time(pid), memory(pid)
    if cpu is None or resident is None:
        return None
    return Usage(cpu, resident, time.thread_time() - began)


def cpu_time(pid: int) -> CpuTime | None:
    """Processor time of a process, alive or not yet reaped; None if there is no such process."""
    try:
        # Not by pathlib: this is done at the end of every process, and takes less than half the time so.
        stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return parse_stat(os.read(stat, 4096))
        finally:
            os.close(stat)
    except (OSError, ValueError, IndexError):
        return None


def memory(pid: int) -> Memory | None:
    """Resident memory of a living process; None if there is none, or it is not ours to look at."""
    try:
        with Path(f"/proc/{pid}/smaps").open("rb") as smaps:
            text = smaps.read(_SMAPS_LIMIT)
    except OSError:
        return None
    return parse_smaps(text.rpartition(b"\n")[0].splitlines()) if text else None  # whole lines only


def parse_stat(stat: bytes) -> CpuTime:
    """Read ``/proc/PID/stat``.

    Raises:
        ValueError: It is none.
        IndexError: It has too few fields.
    """
    # The second field is the name in parentheses, which may hold blanks; splitting at these, as the
    # reference does, would shift the fields behind it.
    after_name = stat.rpartition(b")")[2].split()
    user, system, guest = (int(after_name[number - 3]) for number in (14, 15, 43))
    return CpuTime(guest_ms=guest * _TICK_MS, total_ms=(user + system) * _TICK_MS)


def parse_smaps(lines: Iterable[bytes]) -> Memory:
    """Sum ``Rss`` in the lines of ``/proc/PID/smaps``; the guest's share is in mappings named so."""
    guest = total = 0
    of_guest = False
    for line in lines:
        if line.startswith(b"Rss:"):
            resident = int(line.split()[1])
            total += resident
            guest += resident if of_guest else 0
        elif line[:1].isdigit() or b"a" <= line[:1] <= b"f":  # a mapping's first line begins with its address
            of_guest = any(name in line for name in GUEST_MEMORY)
    return Memory(guest_kib=guest, total_kib=total)
