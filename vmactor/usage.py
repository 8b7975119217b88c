"""What a VM uses of its host: processor time and memory, as the kernel counts them for its VMM.

Source: the reference's status monitor, which reads field 43 of ``/proc/PID/stat`` and sums ``Rss`` over
``/proc/PID/smaps``. It does so every second for every VM; reading ``smaps`` costs some tenths of a
millisecond, so here it is read when somebody asks.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
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

    guest_ms: int
    total_ms: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a VMM now, in KiB.

    Attributes:
        guest_kib: What the guest's memory takes.
        total_kib: All of it, the guest's included.
    """

    guest_kib: int
    total_kib: int


def cpu_time(pid: int) -> CpuTime | None:
    """Processor time of a process, alive or not yet reaped; None if there is no such process."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
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
