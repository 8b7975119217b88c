"""Context identifiers: one per VM on a host, handed out in turn, shared by all managers of a user.

One small file holds the last CID handed out and when each was given back. A claim is an open-file-description
lock on one byte of that file, so the kernel gives it back when its manager dies, costs no descriptor per VM,
and tells other processes which CIDs are held. The counter has a lock of its own, held for a few system calls
and never across an await. Whatever the file contains, no CID that is held is handed out.

A lock belongs to the open file: a child that was forked and has not executed another program shares it, and
keeps the CIDs claimed until it ends too.

Source: the reference's allocation (range 2048..65535, next after the last one, persisted, never one that is
held); the rest before reuse is ours, for connections of a dead VM that are still on their way.
"""

import fcntl
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Final, Self

import anyio

from vmactor.errors import DeadlineExceededError, IllegalStateError, ResourceExhaustedError

FIRST: Final = 2048
LAST: Final = 65535
REST_SECONDS: Final = 10

_SLOT: Final = struct.Struct("<I")
_COUNTER: Final = 0
"""The slot of the last CID handed out; slot N says when CID N was released (seconds since boot, or 0)."""
_CLAIM_LOCKS: Final = 1 << 20
"""Offset of the bytes that are locked for claims, far beyond the slots; nothing is ever stored there."""
_LOCK_PATIENCE: Final = 5.0
_FLOCK: Final = struct.Struct("hhqqi4x")
"""The 64-bit ``struct flock``: type, whence, start, length, pid (0 for these locks)."""


class CidPool:
    """The CIDs of one state directory, as one manager sees them.

    Args:
        path: The file; made if missing.
        usable: Says whether a free CID may be handed out (its old directory may still be in the way).

    Raises:
        OSError: The file cannot be made or opened, or is a symbolic link.
    """

    def __init__(self, path: Path, usable: Callable[[int], bool] = lambda _cid: True) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._usable = usable
        self._held: set[int] = set()

    def __repr__(self) -> str:
        return f"<CidPool {'open' if self._fd >= 0 else 'closed'} held={sorted(self._held)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back. Idempotent."""
        for cid in tuple(self._held):
            self.release(cid)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def claim(self) -> int:
        """Claim the next free CID.

        Raises:
            ResourceExhaustedError: Every CID is held, resting or unusable, or the file cannot be used.
            DeadlineExceededError: Another manager kept the counter locked for 5 s; it is probably stopped.
            IllegalStateError: The pool is closed, or its file was removed under it.
        """
        await self._lock_counter()
        try:
            if os.fstat(self._fd).st_nlink == 0:
                raise IllegalStateError(
                    f"{self._path} was removed while in use: end all managers, start anew"
                )
            return self._claim_next()
        except OSError as error:
            raise self._unusable(error) from error
        finally:
            self._lock(_COUNTER, fcntl.F_UNLCK)

    def advance(self, last: int, leap: int) -> None:
        """Hand out none that may have been handed out before the host went down, with this file not written.

        Nothing happens if the file says more than the caller knows.

        Args:
            last: A CID that was handed out; 0 for none.
            leap: How many more may have been since.
        """
        count, counter = LAST - FIRST + 1, self._read(_COUNTER)
        wanted = FIRST + (last + leap - FIRST) % count if FIRST <= last <= LAST else counter
        ahead = (wanted - counter) % count if FIRST <= counter <= LAST else 1
        if 0 < ahead < count // 2:
            with suppress(OSError):
                self._write(_COUNTER, wanted)

    def take(self, cid: int) -> bool:
        """Claim a CID that a crashed manager had, to clear away what is left; False if somebody holds it.

        Raises:
            IllegalStateError: The pool is closed.
        """
        self._check_open()
        if cid in self._held:
            return False
        try:
            self._lock(_CLAIM_LOCKS + cid, fcntl.F_WRLCK)
        except OSError:
            return False
        self._held.add(cid)
        return True

    def release(self, cid: int) -> None:
        """Give a CID back; it rests for 10 s at least. Nothing happens if it is not ours. Never raises."""
        if cid in self._held:
            self._held.remove(cid)
            with suppress(OSError):  # no space: then only a wrap-around within 10 s could find it early
                self._write(cid, self._now())
            self._lock(_CLAIM_LOCKS + cid, fcntl.F_UNLCK)

    def let_go(self, cid: int) -> None:
        """Claim a CID no more, for the next manager to ``take``: its VM lives on. Never raises."""
        if cid in self._held:
            self._held.remove(cid)
            self._lock(_CLAIM_LOCKS + cid, fcntl.F_UNLCK)

    def is_held(self, cid: int) -> bool:
        """Whether any living manager, this one included, holds a CID.

        Raises:
            IllegalStateError: The pool is closed.
        """
        self._check_open()
        if cid in self._held or not FIRST <= cid <= LAST:
            return cid in self._held
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _CLAIM_LOCKS + cid, 1, 0)
        found: bytes = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, request)
        return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)

    def _claim_next(self) -> int:
        last, now = self._read(_COUNTER), self._now()
        start = last + 1 if FIRST <= last < LAST else FIRST
        for cid in chain(range(start, LAST + 1), range(FIRST, start)):
            released = self._read(cid)
            # A release in the future is of an earlier boot: the clock began anew.
            resting = released and 0 <= now - released <= REST_SECONDS
            if resting or cid in self._held or not self._usable(cid):
                continue
            try:
                self._lock(_CLAIM_LOCKS + cid, fcntl.F_WRLCK)
            except BlockingIOError:
                continue
            try:
                self._write(_COUNTER, cid)
            except OSError:
                self._lock(_CLAIM_LOCKS + cid, fcntl.F_UNLCK)
                raise
            self._held.add(cid)
            return cid
        raise ResourceExhaustedError(
            f"no CID of {FIRST}..{LAST} is free: stop some VMs, wait until released CIDs have rested, or "
            "remove what crashed managers left in the state directory"
        )

    async def _lock_counter(self) -> None:
        # Never a blocking lock: a manager that was stopped while holding it would stop our event loop too.
        if self._locked_counter():
            return
        pause = 0.0005
        with anyio.move_on_after(_LOCK_PATIENCE):
            while True:
                await anyio.sleep(pause)
                if self._locked_counter():
                    return
                pause = min(pause * 2, 0.02)
        raise DeadlineExceededError(
            f"another manager kept the CID counter locked for {_LOCK_PATIENCE:g} s; look for a stopped one"
        )

    def _locked_counter(self) -> bool:
        """Lock the counter, or say that somebody else has it."""
        self._check_open()
        try:
            self._lock(_COUNTER, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._unusable(error) from error
        return True

    def _check_open(self) -> None:
        if self._fd < 0:
            raise IllegalStateError(f"{self._path} was closed by its manager")

    def _unusable(self, error: OSError) -> ResourceExhaustedError:
        text = f"cannot claim a CID in {self._path}: {error}; make room, or name another directory"
        return ResourceExhaustedError(text)

    def _lock(self, offset: int, kind: int) -> None:
        """Lock or unlock one byte; raises BlockingIOError at once if somebody else has it."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))

    def _now(self) -> int:
        return int(time.clock_gettime(time.CLOCK_BOOTTIME)) + 1

    def _read(self, slot: int) -> int:
        data = os.pread(self._fd, _SLOT.size, slot * _SLOT.size)
        return int(_SLOT.unpack(data)[0]) if len(data) == _SLOT.size else 0

    def _write(self, slot: int, value: int) -> None:
        os.pwrite(self._fd, _SLOT.pack(value), slot * _SLOT.size)
