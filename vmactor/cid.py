"""Context identifiers: one per VM on a host, handed out in turn, shared by all managers of a user.

One small file holds the last CID handed out and when each was given back. A claim is an open-file-description
lock on one byte of that file, so the kernel gives it back when its manager dies, costs no descriptor per VM,
and tells other processes which CIDs are held. The counter has a lock of its own, held for microseconds.

Source: the reference's allocation (range 2048..65535, next after the last one, persisted, never one that is
held); the rest before reuse is ours, for connections of a dead VM that are still on their way.
"""

import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import anyio

from vmactor.errors import DeadlineExceededError, ResourceExhaustedError

FIRST: Final = 2048
LAST: Final = 65535
REST_SECONDS: Final = 10

_COUNTER: Final = struct.Struct("<I")  # at offset 0; then one of these per CID: second of release, 0 = never
_COUNTER_LOCK: Final = 0
_CLAIM_LOCKS: Final = 1 << 20
_LOCK_PATIENCE: Final = 5.0


def _lock(fd: int, offset: int, kind: int, command: int) -> int:
    """Work on one byte's lock; returns the kind of lock found or set, or raises BlockingIOError."""
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0)
    found: int = struct.unpack("hhqqi4x", fcntl.fcntl(fd, command, request))[0]
    return found


class CidPool:
    """The CIDs of one state directory, as one manager sees them.

    Args:
        path: The file; made if missing.
        usable: Says whether a free CID may be handed out (its old directory may still be in the way).
    """

    def __init__(self, path: Path, usable: Callable[[int], bool] = lambda _cid: True) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._usable = usable
        self._held: set[int] = set()

    def __repr__(self) -> str:
        return f"<CidPool held={sorted(self._held)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._held.clear()

    async def claim(self) -> int:
        """Claim the next free CID.

        Raises:
            ResourceExhaustedError: Every CID is held, resting or unusable.
            DeadlineExceededError: Another manager kept the counter locked for 5 s; it is probably stopped.
        """
        await self._lock_counter()
        try:
            last = self._read(_COUNTER_LOCK)
            start = last + 1 if FIRST <= last < LAST else FIRST
            for cid in (*range(start, LAST + 1), *range(FIRST, start)):
                if cid not in self._held and self._rested(cid) and self._usable(cid) and self._try_lock(cid):
                    self._write(_COUNTER_LOCK, cid)
                    self._held.add(cid)
                    return cid
        finally:
            _lock(self._fd, _COUNTER_LOCK, fcntl.F_UNLCK, fcntl.F_OFD_SETLK)
        raise ResourceExhaustedError(
            "all CIDs are in use: stop some VMs, or wait until released CIDs have rested"
        )

    def release(self, cid: int) -> None:
        """Give a CID back; it rests for 10 s. Nothing happens if it is not ours."""
        if cid in self._held:
            self._held.remove(cid)
            self._write(cid, self._now())
            _lock(self._fd, _CLAIM_LOCKS + cid, fcntl.F_UNLCK, fcntl.F_OFD_SETLK)

    def is_held(self, cid: int) -> bool:
        """Whether any living manager, this one included, holds a CID."""
        if cid in self._held:
            return True
        found = _lock(self._fd, _CLAIM_LOCKS + cid, fcntl.F_WRLCK, fcntl.F_OFD_GETLK)
        return found != int(fcntl.F_UNLCK)

    async def _lock_counter(self) -> None:
        # Never a blocking lock: a manager that was stopped while holding it would stop our event loop too.
        pause = 0.0005
        with anyio.move_on_after(_LOCK_PATIENCE):
            while True:
                try:
                    _lock(self._fd, _COUNTER_LOCK, fcntl.F_WRLCK, fcntl.F_OFD_SETLK)
                except BlockingIOError:
                    await anyio.sleep(pause)
                    pause = min(pause * 2, 0.02)
                else:
                    return
        raise DeadlineExceededError(
            f"another manager kept the CID counter locked for {_LOCK_PATIENCE:g} s; look for a stopped one"
        )

    def _try_lock(self, cid: int) -> bool:
        try:
            _lock(self._fd, _CLAIM_LOCKS + cid, fcntl.F_WRLCK, fcntl.F_OFD_SETLK)
        except BlockingIOError:
            return False
        return True

    def _rested(self, cid: int) -> bool:
        released = self._read(cid)
        # A release in the future is of an earlier boot: the clock began anew.
        return released == 0 or not 0 <= self._now() - released < REST_SECONDS

    def _now(self) -> int:
        return int(time.clock_gettime(time.CLOCK_BOOTTIME)) + 1

    def _read(self, slot: int) -> int:
        data = os.pread(self._fd, _COUNTER.size, slot * _COUNTER.size)
        return int(_COUNTER.unpack(data)[0]) if len(data) == _COUNTER.size else 0

    def _write(self, slot: int, value: int) -> None:
        os.pwrite(self._fd, _COUNTER.pack(value), slot * _COUNTER.size)
