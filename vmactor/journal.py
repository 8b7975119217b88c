"""The journal: the event stream of a service that keeps VMs, in files, so that it goes on after a crash.

Two files in the state directory, the older one only for those who look back. Each line is one event with its
checksum in front, or the head of a file. An event is in the file before any subscriber has it, so a manager
that is killed has told nobody of anything that the next one does not know. A crash can tear only the last
line, which then counts as not written; whatever follows a line that is damaged is given up too.

Lines are flushed to the disk within ``FLUSH_SECONDS``, not at once: a power failure may take the last of
them, but no VM outlives it either. Numbers then go on far above those that can have been given out.

The head of a file says which VMs lived when it began. So what became of each VM can be told whatever happens:
one of which neither an end nor a trace is left ended in the moments around a crash.
"""

import errno
import fcntl
import json
import os
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from vmactor.errors import IllegalArgumentError, IllegalStateError, ResourceExhaustedError
from vmactor.ledger import boot_identity
from vmactor.log import get_logger
from vmactor.messages import Created, Died, Event, Orphaned, Reaped, Removed
from vmactor.protocol.values import event_from_wire, to_wire

NAME: Final = "journal"
OLDER: Final = "journal.1"
VERSION: Final = 1
SIZE: Final = 8 << 20
"""Bytes after which a new file is begun; so there are twice as many at most."""
LINE: Final = 1 << 20
"""Bytes of a line that can be ours."""
FLUSH_SECONDS: Final = 1.0
TEXT: Final = 4096
"""Characters of a console's end that are written down; the rest of it was for those who were there."""
LEAP: Final = 1 << 16
"""How far numbers go up where some that were given out may be forgotten."""

_ENDS: Final = frozenset({Removed.kind, Reaped.kind, Orphaned.kind})

log = get_logger()


@dataclass(frozen=True, slots=True)
class OpenVm:
    """A VM that lived when the journal ended.

    Attributes:
        cid: Its CID.
        name: Its name.
        driver: Its VMM's driver.
        generation: Its last run that is known of.
        uid: The user that asked for it.
    """

    cid: int
    name: str
    driver: str
    generation: int
    uid: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """What an entry says of its VM; whatever it does not say is empty."""
        name, driver = entry.get("name"), entry.get("driver")
        return cls(
            _number(entry, "cid"),
            name if isinstance(name, str) else "",
            driver if isinstance(driver, str) else "",
            _number(entry, "generation"),
            _number(entry, "uid"),
        )


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal tells of earlier managers.

    Attributes:
        seq: The number of the last event.
        events: The last ones, without a hole, up to that number; none if some may be missing.
        open: The VMs that lived.
        clean: Whether the last manager ended in order; true as well if there was none.
        lost: Whether events may be missing at the end.
        last_cid: The CID of the last VM created, or 0.
    """

    seq: int = 0
    events: tuple[Event, ...] = ()
    open: tuple[OpenVm, ...] = ()
    clean: bool = True
    lost: bool = False
    last_cid: int = 0


class Journal:
    """The journal of one state directory, held by one service. Close it when done.

    Args:
        directory: The state directory.
        keep: How many events ``past`` has at most.

    Raises:
        IllegalStateError: Another service has it.
        ResourceExhaustedError: It cannot be made or read.

    Attributes:
        past: What was before.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self._directory = directory
        self._path = directory / NAME
        self._lock_fd = -1
        self._fd = -1
        self._dirty = False
        self._failed = False
        self._size = 0
        self._seq = 0
        self._last_cid = 0
        self._open: dict[int, OpenVm] = {}
        try:
            self._lock_fd = _lock(directory / f"{NAME}.lock")
            self.past = self._read(keep)
            if self.past.lost or not self._size:
                self._begin_file()
            else:
                self._go_on()
        except OSError as error:
            self.close()
            raise ResourceExhaustedError(
                f"cannot use the journal {self._path}: {error}; make room, or name another state directory"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, event: Event) -> None:
        """Write an event down. Never raises: without space, what happens is told all the same."""
        if self._fd < 0:
            return
        self._seq = event.seq
        vm = OpenVm(event.cid, event.name, event.driver, event.generation, event.uid)
        self._note(vm, event.kind, final=getattr(event, "final", True))
        if isinstance(event, Died | Reaped) and len(event.console_tail) > TEXT:
            event = replace(event, console_tail=event.console_tail[-TEXT:])
        try:
            self._append(to_wire(event))
            if self._failed:
                self._failed = False
                log.warning("the journal can be written again", path=str(self._path))
            if self._size > SIZE:
                self._begin_file()
        except OSError as error:
            if not self._failed:
                self._failed = True
                log.error("cannot write the journal; make room", path=str(self._path), error=str(error))

    @property
    def open_vms(self) -> tuple[OpenVm, ...]:
        """The VMs of which no end was written down."""
        return tuple(self._open.values())

    @property
    def dirty(self) -> bool:
        """Whether there is something to flush."""
        return self._dirty

    def flush(self) -> None:
        """Have the disk keep what was written. Blocks; never raises."""
        if self._dirty and self._fd >= 0:
            self._dirty = False
            with suppress(OSError):
                os.fdatasync(self._fd)

    def close(self, *, clean: bool = False) -> None:
        """Let another service have it. Idempotent.

        Args:
            clean: Whether this one ended in order.
        """
        if self._fd >= 0:
            if clean:
                with suppress(OSError):
                    self._append({"end": True})
                self.flush()
            os.close(self._fd)
            self._fd = -1
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # -- Writing -----------------------------------------------------------------------------------

    def _head(self) -> dict[str, Any]:
        return {
            "vmactor": VERSION,
            "boot": boot_identity(),
            "seq": self._seq,
            "lastCid": self._last_cid,
            "open": [to_wire(vm) for vm in self._open.values()],
        }

    def _go_on(self) -> None:
        """Go on in the present file, behind the last line that is whole."""
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.ftruncate(self._fd, self._size)
        self._append(self._head())

    def _begin_file(self) -> None:
        """Begin a new file; the present one becomes the older one."""
        unready = self._directory / f".{NAME}"
        fd = os.open(unready, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            line = _line(self._head())
            if os.write(fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(unready))
            os.fdatasync(fd)
            with suppress(FileNotFoundError):
                os.replace(self._path, self._directory / OLDER)  # noqa: PTH105
            os.replace(unready, self._path)  # noqa: PTH105
            _sync_directory(self._directory)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, len(line)

    def _append(self, entry: dict[str, Any]) -> None:
        line = _line(entry)
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, self._size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._size += len(line)
        self._dirty = True

    def _note(self, vm: OpenVm, kind: str, *, final: bool) -> None:
        """Keep in mind which VMs live."""
        if kind == Created.kind:
            self._last_cid = vm.cid
        if kind in _ENDS or (kind == Died.kind and final):
            self._open.pop(vm.cid, None)
        elif kind == Created.kind or vm.cid in self._open:
            self._open[vm.cid] = vm

    # -- Reading -----------------------------------------------------------------------------------

    def _read(self, keep: int) -> Past:
        entries: deque[dict[str, Any]] = deque(maxlen=keep)
        seq, clean, lost, found, boot = 0, True, False, False, boot_identity()
        for path in (self._directory / OLDER, self._path):
            lines, size, damaged = _entries(path)
            lost = damaged  # of the older file that is no harm, if the newer one is there
            for entry in lines:
                found, clean = True, entry.get("end") is True
                if "vmactor" in entry:
                    boot = str(entry.get("boot"))
                    self._last_cid = _number(entry, "lastCid")
                    self._open = _open_vms(entry.get("open"))
                    if _number(entry, "seq") != seq:
                        entries.clear()
                        seq = _number(entry, "seq")
                elif "event" in entry:
                    if _number(entry, "seq") != seq + 1:
                        entries.clear()
                    seq = _number(entry, "seq")
                    entries.append(entry)
                    self._note(OpenVm.of(entry), str(entry["event"]), final=entry.get("final") is not False)
        self._size = size
        lost = lost or (found and not clean and boot != boot_identity())
        events = () if lost else _events(entries)
        seq += LEAP if lost else 0
        self._seq = seq
        return Past(seq, events, tuple(self._open.values()), clean and not lost, lost, self._last_cid)


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _entries(path: Path) -> tuple[list[dict[str, Any]], int, bool]:
    """The entries of a file up to the first that is damaged.

    Returns:
        The entries; the bytes that they take; and whether something is damaged, other than a torn last line.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return [], 0, False
    with os.fdopen(fd, "rb") as file:
        data = file.read(SIZE + 2 * LINE)
    *lines, torn = data.split(b"\n")
    entries: list[dict[str, Any]] = []
    size = 0
    for line in lines:
        checksum, _, text = line.partition(b" ")
        try:
            entry = json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            log.error("the journal is damaged; what follows is given up", path=str(path))
            return entries, size, True
        entries.append(entry)
        size += len(line) + 1
    if torn:
        log.warning("the last line of the journal was torn by a crash", path=str(path))
    return entries, size, not entries  # a file without its head says nothing of what was before


def _events(entries: Iterable[dict[str, Any]]) -> tuple[Event, ...]:
    """The events, without those before one that nobody can read."""
    events: list[Event] = []
    for entry in entries:
        try:
            events.append(event_from_wire(entry))
        except IllegalArgumentError:  # of another version, most likely
            events.clear()
    return tuple(events)


def _open_vms(found: object) -> dict[int, OpenVm]:
    entries = found if isinstance(found, list) else ()
    vms = (OpenVm.of(entry) for entry in entries if isinstance(entry, dict))
    return {vm.cid: vm for vm in vms}


def _number(entry: Mapping[str, Any], name: str) -> int:
    value = entry.get(name)
    return value if type(value) is int and value >= 0 else 0


def _lock(path: Path) -> int:
    """Hold a lock for as long as the descriptor is open; the kernel gives it back to whoever comes next."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise IllegalStateError(
            f"another service keeps VMs in {path.parent}: end it, or name another state directory"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
