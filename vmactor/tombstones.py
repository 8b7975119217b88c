"""Where guests' tombstones are kept: the files, how many, and how large they may be.

A tombstone is what a guest's crash handler has to say of a crashed process, as text or as a protocol buffer.
It was written by the guest: here it is bytes, which nobody looks into.
"""

import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vmactor.errors import IllegalArgumentError, ResourceExhaustedError, SecurityError

STALE_SECONDS: Final = 3600.0
"""So old, an unfinished file is one of a manager that crashed."""
_NAME: Final = re.compile(r"tombstone-\d{8}T\d{6}\.\d{6}Z-[A-Za-z0-9._-]{1,64}-\d{1,10}(?P<part>\.part)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TombstoneLimits:
    """What guests' tombstones may cost.

    Attributes:
        size: Bytes of one; what is more is cut off.
        per_vm: How many are taken of one VM in its life; the first tell most.
        kept: How many files are kept in the directory; the oldest of them go.
        seconds: From a connection's beginning to its end; then what has come is kept.
    """

    size: int = 2 << 20
    per_vm: int = 8
    kept: int = 64
    seconds: float = 30.0


class TombstoneStore:
    """A private directory with tombstones; it outlives VMs and managers, and several managers may share it.

    Args:
        directory: Made if missing, with its parents.
        limits: The defaults if None.

    Raises:
        SecurityError: It is not a directory of this user alone; nothing was changed.
        ResourceExhaustedError: It cannot be made.
        IllegalArgumentError: It is no path.
    """

    def __init__(self, directory: str | os.PathLike[str], limits: TombstoneLimits | None = None) -> None:
        self.limits = limits or TombstoneLimits()
        self.directory = Path(os.path.abspath(directory))  # noqa: PTH100 - resolve() would follow links
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.lstat()
        except FileExistsError:
            raise SecurityError(f"{self.directory} is not a directory; name another for tombstones") from None
        except OSError as error:
            text = f"cannot make the directory for tombstones {self.directory}: {error.strerror}"
            raise ResourceExhaustedError(text) from error
        except ValueError as error:
            raise IllegalArgumentError(f"{str(directory)!r} is no path: {error}") from error
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise SecurityError(
                f"{self.directory} must be a directory of this user that nobody else can enter (mode 0700): "
                "guests' memory may be in it"
            )

    def begin(self, vm_name: str, cid: int) -> "TombstoneFile":
        """Begin a file.

        Raises:
            OSError: No space, no descriptor, or somebody removed the directory.
        """
        self._make_room()
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        return TombstoneFile(self.directory / f"tombstone-{now}-{vm_name}-{cid}", self.limits.size)

    def _make_room(self) -> None:
        """Remove the oldest files, so that one more may come, and what was left unfinished long ago."""
        finished = []
        for name in sorted(os.listdir(self.directory)):  # noqa: PTH208 - by name, and names begin with the time
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            path = self.directory / name
            if not match["part"]:
                finished.append(path)
            else:
                with suppress(FileNotFoundError):
                    if time.time() - path.lstat().st_mtime > STALE_SECONDS:
                        path.unlink()
        for path in finished[: max(0, len(finished) + 1 - self.limits.kept)]:
            path.unlink(missing_ok=True)


class TombstoneFile:
    """A tombstone that is being written; under another name until it is all there."""

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        self.size = 0
        self._most = most
        self._part = path.with_name(f"{path.name}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(self._part, flags, 0o600)

    def write(self, data: bytes) -> bool:
        """Add bytes; False if they are more than there may be, and the rest is left out. Raises OSError."""
        complete = len(data) <= self._most - self.size
        fits = memoryview(data)[: self._most - self.size]
        while fits:
            written = os.write(self._fd, fits)
            self.size += written
            fits = fits[written:]
        return complete

    def finish(self) -> bool:
        """Keep what was written; False if there is nothing. Raises OSError, and nothing is kept."""
        if self._fd < 0 or not self.size:
            self.discard()
            return False
        try:
            self._part.rename(self.path)
        finally:
            self.discard()
        return True

    def discard(self) -> None:
        """Keep nothing, unless it is finished. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with suppress(OSError):
                self._part.unlink()
