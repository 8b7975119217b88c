"""What managers that crashed left behind: found, judged, and ended by whoever comes next.

A manager holds the lock on its VMs' CIDs as long as it lives (``vmactor.cid``). So a VM's directory whose CID
nobody holds was left behind, and whoever takes its CID is the only one to deal with it, however many managers
begin at once; if that one crashes too, the next goes on where it stopped. Three steps:

1. **find** the directories whose CIDs can be taken;
2. **judge** each by its ledger: which processes are the VM's, which are gone, which cannot be told. A process
   is the VM's if number, start time and boot agree, it belongs to the user that it was spawned for, and it
   runs the executable that was noted or has the VM's token in its environment. It is looked at through a
   pidfd that was opened before, so no other can slip into its place;
3. **end** it: kill, wait, read what the channels still hold, remove the directory, give the CID back. Of a VM
   with anything that cannot be told nothing is touched: it is kept and reported.

No directory is removed while a process of its VM lives.

A VM that was to be kept is not ended but left alone, for a service that keeps VMs: that one judges it in the
same way, and adopts it if everything of it is known (``vmactor.actors.keeping``).
"""

import errno
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final

import anyio

from vmactor.console import CONSOLE_TAIL, FAILURE_CAP, FAILURE_TAIL, STDERR_TAIL, Drain
from vmactor.errors import VmactorError
from vmactor.ledger import (
    TOKEN_VARIABLE,
    LedgerError,
    LedgerRecord,
    Spawned,
    boot_identity,
    executable_of,
    read_ledger,
)
from vmactor.log import get_logger
from vmactor.messages import DeathReason, Died, Event, Orphaned, Reaped, death_reason_of_text
from vmactor.process import has_ended, start_time_of
from vmactor.state_dir import StateDirectory
from vmactor.waiting import readable

KILL_SECONDS: Final = 10.0
"""How long a killed process may take to end before it counts as a survivor."""
AT_ONCE: Final = 32
"""How many VMs are dealt with at the same time; each takes up to six descriptors meanwhile."""

_TAILS: Final = {"console": CONSOLE_TAIL, "failure": FAILURE_TAIL, "stderr": STDERR_TAIL}
_ENVIRONMENT: Final = 1 << 20
"""Bytes of a process's environment that are looked through for a token."""

_log = get_logger()


class Standing(Enum):
    """What a noted process is now."""

    OURS = auto()
    GONE = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class Judged:
    """A process of a VM that was left behind.

    Attributes:
        role: What it was for.
        standing: What it is now.
        pid: Its number, if it was known.
        pidfd: Refers to it, if it is ours; belongs to the ``Leftover``.
        channels: As in the ledger.
        why: What is known, for people.
    """

    role: str
    standing: Standing
    pid: int | None = None
    pidfd: int | None = None
    channels: Mapping[str, int] = field(default_factory=dict)
    why: str = ""


class Leftover:
    """A VM that was left behind, with its CID claimed. Close it when done.

    Attributes:
        cid: Its CID.
        processes: What became of its processes.
        trouble: Why it must be left as it is; empty if it can be ended.
        keep: Whether it was to outlive its manager.
        links: The network interfaces that were made for it.
    """

    def __init__(
        self,
        cid: int,
        processes: Iterable[Judged],
        trouble: str = "",
        *,
        keep: bool = False,
        links: tuple[str, ...] = (),
    ) -> None:
        self.links = links
        self.cid = cid
        self.keep = keep
        self.processes = tuple(processes)
        unknown = (judged.why for judged in self.processes if judged.standing is Standing.UNKNOWN)
        self.trouble = "; ".join(filter(None, (trouble, *unknown)))

    @property
    def living(self) -> tuple[Judged, ...]:
        """Its processes that live and are known."""
        return tuple(judged for judged in self.processes if judged.standing is Standing.OURS)

    def close(self) -> None:
        """Close the descriptors."""
        for judged in self.processes:
            if judged.pidfd is not None:
                os.close(judged.pidfd)
        self.processes = ()


def find(state: StateDirectory) -> list[int]:
    """The CIDs of VMs that were left behind; some may be another manager's by the time they are taken."""
    return [cid for cid in state.vm_cids() if not state.cids.is_held(cid)]


def kept(state: StateDirectory, cids: Iterable[int]) -> list[int]:
    """Those of them that were to outlive their managers. Blocks."""
    found = []
    for cid in cids:
        with suppress(LedgerError, OSError):
            if read_ledger(state.vm_directory(cid), cid).keep:
                found.append(cid)
    return found


async def reap(
    state: StateDirectory,
    cids: list[int],
    tell: Callable[[Event], object],
    *,
    keeper: bool = False,
    disconnect: Callable[[tuple[str, ...]], Awaitable[None]] | None = None,
) -> None:
    """End VMs that were left behind, or leave them as they are.

    Cancelled, it leaves the rest to the next manager. So does a lack of descriptors.

    Args:
        state: Where they are.
        cids: What ``find`` found.
        tell: Gets a ``Reaped`` or ``Orphaned`` for each that was not dealt with by another manager; or a
            ``Died``, for one that was to be kept and whose VMM has ended.
        keeper: Whether those that were to be kept are this manager's affair. If not, nobody is told of them.
        disconnect: Removes network interfaces that a ledger names; may raise ``VmactorError``.
    """
    for first in range(0, len(cids), AT_ONCE):
        taken = [cid for cid in cids[first : first + AT_ONCE] if state.cids.take(cid)]
        leftovers: list[Leftover] = []
        try:
            with anyio.CancelScope(shield=True):  # for some milliseconds: the descriptors must get an owner
                leftovers += await anyio.to_thread.run_sync(judge, state, taken)
            async with anyio.create_task_group() as ending:
                for leftover in leftovers:
                    if leftover.keep and not keeper:
                        continue
                    ending.start_soon(_deal_with, state, leftover, tell, disconnect)
        finally:
            for leftover in leftovers:
                leftover.close()
            for cid in taken:
                state.cids.release(cid)


async def _deal_with(
    state: StateDirectory,
    leftover: Leftover,
    tell: Callable[[Event], object],
    disconnect: Callable[[tuple[str, ...]], Awaitable[None]] | None,
) -> None:
    cid, header = leftover.cid, _header(state, leftover.cid)
    names = [f"{judged.role} (process {judged.pid})" for judged in leftover.living]
    said: dict[str, str] = {}
    trouble = leftover.trouble
    if not trouble:
        trouble, said = await _end(leftover)
    if not trouble and leftover.links and disconnect is not None:
        try:
            await disconnect(leftover.links)
        except VmactorError as error:
            trouble = f"its network cannot be cleared away: {error}"
    if not trouble and not state.remove_vm_directory(cid):
        trouble = "its directory cannot be removed"
    directory = str(state.vm_directory(cid))
    if trouble:
        _log.warning(
            "kept what a crashed manager left: see to its processes, then remove its directory",
            cid=cid, vm=header["name"], why=trouble, directory=directory,
        )  # fmt: skip
        tell(Orphaned(cid=cid, detail=trouble, directory=directory, **header))
        return
    _log.warning("ended what a crashed manager left", cid=cid, vm=header["name"], ended=", ".join(names))
    gone = [judged.why for judged in leftover.processes if judged.standing is Standing.GONE]
    details = [*gone, said.get("stderr", "").strip()]
    if leftover.keep and header["generation"] and not any(one.role == "VMM" for one in leftover.living):
        details.insert(0, "the VM ended while no manager was there to see it")
        died = Died(
            cid=cid,
            reason=death_reason_of_text(said.get("failure", "")) or DeathReason.UNKNOWN,
            adopted=True,
            failure=said.get("failure", ""),
            console_tail=said.get("console", ""),
            detail="\n".join(filter(None, details)),
            **header,
        )
        tell(died)
        return
    reaped = Reaped(
        cid=cid,
        ended=tuple(names),
        failure=said.get("failure", ""),
        console_tail=said.get("console", ""),
        detail="\n".join(filter(None, details)),
        **header,
    )
    tell(reaped)


async def _end(leftover: Leftover) -> tuple[str, dict[str, str]]:
    """Kill the processes and read their channels; returns what stands in the way, and the channels' texts."""
    with ExitStack() as stack:
        channels: dict[str, Drain] = {}
        for judged in sorted(leftover.living, key=lambda one: one.role != "VMM"):  # its words come first
            for name, fd in open_channels(judged).items():
                stack.callback(os.close, fd)
                channels.setdefault(name, Drain(fd, sink=None, sink_cap=0, tail=_TAILS.get(name, 0)))
        try:
            for judged in leftover.living:
                _kill(judged)
        except PermissionError:
            return f"{judged.role} (process {judged.pid}) is not ours to end", {}
        with anyio.move_on_after(KILL_SECONDS):
            for judged in leftover.living:
                assert judged.pidfd is not None  # noqa: S101 - it is ours
                await readable(judged.pidfd)
        if survivors := [judged for judged in leftover.living if not _ended(judged.pidfd)]:
            return f"{survivors[0].role} (process {survivors[0].pid}) survived its kill", {}
        for drain in channels.values():
            await drain.finish()
        texts = {name: drain.tail for name, drain in channels.items()}
    texts["failure"] = texts.get("failure", b"")[:FAILURE_CAP]
    return "", {name: text.decode(errors="replace") for name, text in texts.items()}


def _kill(judged: Judged) -> None:
    assert judged.pidfd is not None  # noqa: S101 - it is ours
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(judged.pidfd, signal.SIGKILL)


# -- Judging ---------------------------------------------------------------------------------------


def judge(state: StateDirectory, cids: Iterable[int]) -> list[Leftover]:
    """Look at VMs whose CIDs were taken; those whose directories are gone by now are left out. Blocks."""
    records: dict[int, LedgerRecord] = {}
    found: list[Leftover] = []
    for cid in cids:
        directory = state.vm_directory(cid)
        if state.is_empty(cid):  # its manager got no further than that, or another one is done with it
            with suppress(OSError):
                directory.rmdir()
            continue
        try:
            record = read_ledger(directory, cid)
            if record.outlived:
                found.append(Leftover(cid, _outlived(record), keep=record.keep, links=record.links))
                continue
            if record.boot != boot_identity():
                raise LedgerError("it is of another boot or pid namespace, so its processes cannot be told")
            records[cid] = record
        except LedgerError as error:
            found.append(Leftover(cid, (), str(error)))
        except OSError as error:
            found.append(Leftover(cid, (), f"its ledger cannot be read: {error}"))
    bearers = _bearers({record.token for record in records.values()})
    judged = [_judge(record, bearers.get(record.token, ())) for record in records.values()]
    return found + judged


def _outlived(record: LedgerRecord) -> list[Judged]:
    if not record.processes:
        return []
    return [Judged("VM", Standing.GONE, why="it ended with the host, which has been started anew since")]


def _judge(record: LedgerRecord, bearers: Iterable[int]) -> Leftover:
    """Judge the noted processes, and whatever else has the VM's token."""
    judged = [_identify(spawned, record.token) for spawned in record.processes]
    uids = {spawned.uid for spawned in record.processes}
    for pid in set(bearers) - {one.pid for one in judged}:
        channels = next((spawned.channels for spawned in record.processes if spawned.pid is None), {})
        # Spawned when the crash came, or by one of the VM's processes.
        other = _bearer(pid, uids, record.token, channels)
        if other is not None:
            judged.append(other)
    return Leftover(record.cid, judged, keep=record.keep, links=record.links)


def _identify(spawned: Spawned, token: str) -> Judged:
    pid, role = spawned.pid, spawned.role
    if pid is None:
        return Judged(role, Standing.GONE)  # if it came to be and lives, its token tells
    name = f"{role} (process {pid})"
    try:
        pidfd = _open(pid)
    except OSError as error:
        return Judged(role, Standing.UNKNOWN, pid, why=f"{name} cannot be looked at: {error.strerror}")
    if pidfd is None:
        return Judged(role, Standing.GONE, pid, why=f"{name} had ended")
    start, uid = start_time_of(pid), _uid(pid)
    bears, executable = _bears(pid, token), executable_of(pid)
    standing, why = Standing.OURS, ""
    if _ended(pidfd):
        standing, why = Standing.GONE, f"{name} had ended"
    elif start is None or uid is None:
        standing, why = Standing.UNKNOWN, f"{name} cannot be looked at"
    elif start != spawned.start_time and bears:
        standing, why = Standing.UNKNOWN, f"{name} did not begin when its ledger says"
    elif start != spawned.start_time:
        standing, why = Standing.GONE, f"{name} had ended; another process has its number now"
    elif uid not in {spawned.uid, os.geteuid()}:
        standing, why = Standing.UNKNOWN, f"{name} belongs to user {uid}, not {spawned.uid}"
    elif not bears and (executable is None or executable != spawned.executable):
        standing, why = Standing.UNKNOWN, f"{name} runs another program than its ledger says"
    if standing is Standing.OURS:
        return Judged(role, standing, pid, pidfd, spawned.channels)
    os.close(pidfd)
    return Judged(role, standing, pid, why=why)


def _bearer(pid: int, uids: set[int], token: str, channels: Mapping[str, int]) -> Judged | None:
    """A process that has a VM's token, looked at again through its pidfd; None if it is gone."""
    try:
        pidfd = _open(pid)
    except OSError as error:
        why = f"process {pid} has the VM's token and cannot be looked at: {error.strerror}"
        return Judged("process", Standing.UNKNOWN, pid, why=why)
    if pidfd is None:
        return None
    uid, bears = _uid(pid), _bears(pid, token)
    if _ended(pidfd) or not bears:
        os.close(pidfd)
        return None
    if uid not in {*uids, os.geteuid()}:
        os.close(pidfd)
        why = f"process {pid} has the VM's token and belongs to user {uid}"
        return Judged("process", Standing.UNKNOWN, pid, why=why)
    return Judged("process", Standing.OURS, pid, pidfd, channels)


def _open(pid: int) -> int | None:
    """A pidfd; None if there is no such process."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in {errno.ESRCH, errno.EINVAL, errno.ENOENT}:  # the latter two: a thread's number now
            return None
        raise


def _ended(pidfd: int | None) -> bool:
    return pidfd is None or has_ended(pidfd)


def _uid(pid: int) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/status").read_bytes()
        return int(status.partition(b"\nUid:")[2].split()[0])
    return None


def _bears(pid: int, token: str) -> bool:
    return token in _tokens(pid)


def _bearers(tokens: set[str]) -> dict[str, list[int]]:
    """Which processes of this host have one of these tokens."""
    found: dict[str, list[int]] = {}
    if tokens:
        for name in os.listdir("/proc"):  # noqa: PTH208 - numbers are wanted, not paths
            if name.isdigit():
                for token in tokens.intersection(_tokens(int(name))):
                    found.setdefault(token, []).append(int(name))
    return found


def _tokens(pid: int) -> set[str]:
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as file:
            environment = file.read(_ENVIRONMENT)
    except OSError:
        return set()
    prefix = f"{TOKEN_VARIABLE}=".encode()
    variables = environment.split(b"\0")
    return {one[len(prefix) :].decode("ascii", "replace") for one in variables if one.startswith(prefix)}


# -- Reading ---------------------------------------------------------------------------------------


def open_channels(judged: Judged, names: Collection[str] | None = None) -> dict[str, int]:
    """Read ends of the channels that a living process holds open, by name; for the caller to close.

    What cannot be had is left out.

    Args:
        judged: The process.
        names: Which of them; all if None.
    """
    channels = judged.channels.items()
    wanted = {f"pipe:[{inode}]": name for name, inode in channels if names is None or name in names}
    found: dict[str, int] = {}
    with suppress(OSError):
        for number in os.listdir(f"/proc/{judged.pid}/fd"):  # noqa: PTH208
            path = f"/proc/{judged.pid}/fd/{number}"
            with suppress(OSError):
                name = wanted.get(os.readlink(path))  # noqa: PTH115
                if name is not None and name not in found:
                    found[name] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return found


def _header(state: StateDirectory, cid: int) -> dict[str, Any]:
    """Who the VM was, by its record; that is another process's word."""
    record = state.record(cid) or {}
    name, driver, generation, uid = (
        record.get(key) for key in ("name", "driver", "generation", "requester_uid")
    )
    return {
        "name": name[:64] if isinstance(name, str) else "",
        "driver": driver[:64] if isinstance(driver, str) else "",
        "generation": generation if type(generation) is int else 0,
        "uid": uid if type(uid) is int else 0,
        "time": datetime.now(UTC),
        "monotonic": anyio.current_time(),
    }
