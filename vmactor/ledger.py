"""A VM's ledger: which processes it has, noted so that whoever comes after a crash can tell.

A file in the VM's directory that only grows. Its first line names the VM and where its process numbers mean
anything: boot and pid namespace. Before a process is spawned a line tells what is about to be; after it, a
second line tells which process it became. Between the two a manager can be killed: then the child is known by
the VM's token, an unguessable word in its environment (``VMACTOR_VM``). What is not in the ledger was never
spawned.

It has to outlive its manager, not its host: no process outlives that, and the boot's identity tells, where
the machine's name says that it is the same host. A line goes to the kernel with one write and is never
flushed to a disk. Each begins with its checksum. One that was torn by the crash counts as not written; any
other fault makes the whole ledger untrusted.
"""

import errno
import functools
import json
import os
import secrets
import stat
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from vmactor.log import get_logger
from vmactor.messages import Requester
from vmactor.process import Process

NAME: Final = "ledger"
TOKEN_VARIABLE: Final = "VMACTOR_VM"  # noqa: S105 - a variable's name
SIZE: Final = 64 * 1024
"""Bytes of a ledger that are read; a VM writes about a thousand."""
VERSION: Final = 1

_NOT_A_FILE: Final = {errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EACCES}

_log = get_logger()


class LedgerError(ValueError):
    """A ledger that cannot be trusted; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """What the ledger knows of one process.

    Attributes:
        role: What it was for: ``VMM`` or ``vsock helper``.
        uid: The user that it was spawned for.
        channels: The inodes of the pipes that it writes and holds open, by name.
        pid: Its number, or None if the manager was killed before it knew it.
        start_time: See ``Process``; None as well if the process was gone before it could be read.
        executable: Device and inode of what it ran.
    """

    role: str
    uid: int
    channels: Mapping[str, int]
    pid: int | None = None
    start_time: int | None = None
    executable: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """A ledger as it was read.

    Attributes:
        cid: Whose it is.
        boot: Where its process numbers mean anything, as ``boot_identity`` gives it.
        token: The word in the environment of the VM's processes.
        processes: In the order of their spawning.
        keep: Whether the VM is to outlive its manager.
        machine: Of which host it is, as ``machine_identity`` gives it; empty if nobody knows.
        links: The network interfaces that were made for it, or were about to be.
    """

    cid: int
    boot: str
    token: str
    processes: tuple[Spawned, ...]
    keep: bool = False
    machine: str = ""
    links: tuple[str, ...] = ()

    @property
    def outlived(self) -> bool:
        """Whether this host was started anew since, so that no process in it can live."""
        booted = self.boot.partition(" ")[0] != boot_identity().partition(" ")[0]
        return booted and self.machine != "" and self.machine == machine_identity()


@functools.cache
def boot_identity() -> str:
    """Names this boot of this host and this process's pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116


@functools.cache
def machine_identity() -> str:
    """Names this installation of a system over all its boots; empty where it has no name."""
    with suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return ""


class Ledger:
    """A VM's ledger, for its manager; costs no descriptor.

    Attributes:
        token: The word in the environment of the VM's processes.
    """

    def __init__(self, path: Path, token: str) -> None:
        self.token = token
        self._path = path
        self._count = 0

    @classmethod
    def create(cls, directory: Path, cid: int, *, keep: bool = False) -> Self:
        """Begin the ledger of a VM whose directory was just made.

        Args:
            directory: The VM's.
            cid: Its CID.
            keep: Whether it is to outlive its manager.

        Raises:
            OSError: No space, no descriptor, or there is one already.
        """
        ledger = cls(directory / NAME, secrets.token_hex(16))
        os.close(os.open(ledger._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        header = {"vmactor": VERSION, "cid": cid, "boot": boot_identity(), "token": ledger.token}
        where = {"machine": machine_identity(), "manager": os.getpid()}
        ledger._append(header | where | {"keep": keep})
        return ledger

    def intend(self, role: str, uid: int, channels: Mapping[str, int]) -> int:
        """Note that a process is about to be spawned; returns its place in the ledger.

        Raises:
            OSError: It cannot be noted, so it must not be spawned.
        """
        number = self._count
        self._append({"intent": number, "role": role, "uid": uid, "channels": dict(channels)})
        self._count += 1
        return number

    def complete(self, number: int, process: Process) -> None:
        """Note which process it became. Never raises: without the note, the token still tells."""
        try:
            executable = executable_of(process.pid)
            self._append({"done": number, "pid": process.pid, "start": process.start_time, "exe": executable})
        except OSError as error:
            _log.warning("cannot note a process in its VM's ledger", pid=process.pid, error=str(error))

    def note_link(self, name: str) -> None:
        """Note that a network interface is about to be made; none that is not noted is ever removed.

        Raises:
            OSError: It cannot be noted, so it must not be made.
        """
        self._append({"link": name})

    def _append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            before = os.fstat(fd).st_size
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Spawner:
    """Spawns the processes of one VM: with its requester's rights, and noted in its ledger.

    Attributes:
        ledger: The VM's; None where nothing is noted (tests of drivers, say).
        requester: Whose rights they have; None for the caller's.
    """

    ledger: Ledger | None = None
    requester: Requester | None = None

    def __call__(
        self,
        role: str,
        args: Sequence[str | os.PathLike[str]],
        *,
        pass_fds: Sequence[int] = (),
        stderr: int | None = None,
        cwd: Path | None = None,
        readers: Mapping[str, int] | None = None,
    ) -> Process:
        """Spawn a process.

        Args:
            role: What it is for.
            args: See ``Process.spawn``, as for the next three.
            pass_fds: Descriptors that it keeps.
            stderr: Where its complaints go.
            cwd: Its working directory.
            readers: Read ends of the pipes that it writes, by name. It holds them open and does not use them.
                Thus writing goes on, for a pipe's length, when the manager is gone, and the next manager can
                read what is in the pipes as long as the process lives.

        Raises:
            OSError: It cannot be spawned, or not be noted.
            IllegalArgumentError: An argument that no process can get.
        """
        readers = readers or {}
        options: dict[str, Any] = {
            "pass_fds": {*pass_fds, *readers.values()},
            "stderr": stderr,
            "cwd": cwd,
            "requester": self.requester,
        }
        if self.ledger is None:
            return Process.spawn(args, **options)
        uid = os.geteuid() if self.requester is None else self.requester.uid
        number = self.ledger.intend(role, uid, {name: os.fstat(fd).st_ino for name, fd in readers.items()})
        process = Process.spawn(args, env={TOKEN_VARIABLE: self.ledger.token}, **options)
        self.ledger.complete(number, process)
        return process


def executable_of(pid: int) -> tuple[int, int] | None:
    """Device and inode of what a process runs; None if that cannot be told."""
    try:
        status = os.stat(f"/proc/{pid}/exe")  # noqa: PTH116
    except OSError:
        return None
    return status.st_dev, status.st_ino


def read_ledger(directory: Path, cid: int) -> LedgerRecord:
    """Read the ledger of a VM whose manager is gone.

    Raises:
        LedgerError: There is none, or it is not one that our managers wrote.
        OSError: No descriptor.
    """
    lines = _read(directory / NAME).split(b"\n")
    lines.pop()  # empty, or what the crash left of a line
    entries = [_parse(line) for line in lines]
    if not entries:
        raise LedgerError("its ledger is empty")
    header, spawned = entries[0], _Spawns()
    if header.get("vmactor") != VERSION or header.get("cid") != cid:
        raise LedgerError("its ledger is of another VM or version")
    for entry in entries[1:]:
        spawned.add(entry)
    return LedgerRecord(
        cid,
        _typed(header, "boot", str),
        _typed(header, "token", str),
        tuple(spawned.processes),
        header.get("keep") is True,
        str(header.get("machine", "")),
        tuple(spawned.links),
    )


@dataclass(slots=True)
class _Spawns:
    processes: list[Spawned] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def add(self, entry: dict[str, Any]) -> None:
        if "link" in entry:
            self.links.append(_typed(entry, "link", str))
            return
        if "intent" in entry:
            channels = _typed(entry, "channels", dict)
            if not all(type(inode) is int for inode in channels.values()):
                raise LedgerError("its ledger names a pipe that is none")
            self._expect(entry, "intent", len(self.processes))
            self.processes.append(Spawned(_typed(entry, "role", str), _typed(entry, "uid", int), channels))
            return
        self._expect(entry, "done", len(self.processes) - 1)
        last = self.processes.pop()
        if last.pid is not None:
            raise LedgerError("its ledger is out of order")
        start, exe = entry.get("start"), entry.get("exe")
        executable = None
        if isinstance(exe, list) and len(exe) == 2 and all(type(number) is int for number in exe):
            executable = (exe[0], exe[1])
        pid = _typed(entry, "pid", int)
        if not 0 < pid < 1 << 22:
            raise LedgerError("its ledger names a process that cannot be")
        start_time = start if type(start) is int else None
        self.processes.append(Spawned(last.role, last.uid, last.channels, pid, start_time, executable))

    def _expect(self, entry: dict[str, Any], kind: str, number: int) -> None:
        if entry.get(kind) != number or (kind == "done" and number < 0):
            raise LedgerError("its ledger is out of order")


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LedgerError("it has no ledger") from None
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise LedgerError(f"its ledger is no file: {error.strerror}") from error
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise LedgerError("its ledger is no file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise LedgerError("its ledger could have been written by others")
        data = os.read(fd, SIZE + 1)
    finally:
        os.close(fd)
    if len(data) > SIZE:
        raise LedgerError(f"its ledger is longer than {SIZE} bytes")
    return data


def _parse(line: bytes) -> dict[str, Any]:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise LedgerError("its ledger is damaged")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise LedgerError("its ledger is not one of ours")
    return entry


def _typed(entry: dict[str, Any], name: str, kind: type) -> Any:
    if type(entry.get(name)) is not kind:
        raise LedgerError(f"its ledger has no proper {name!r}")
    return entry[name]
