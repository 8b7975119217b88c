"""Child processes, watched and signalled through pidfds.

The library's only place that spawns. It exists because the ready-made layers are not enough inside other
people's programs: ``anyio.open_process`` keeps one thread per living child on asyncio with Python 3.11, and
neither it nor ``subprocess`` separates "the process ended" from "its output ended".

What it promises:

- An exit is the pidfd turning readable and ``waitid`` on that pidfd. It is never an end-of-file (somebody
  else may hold the other end of a pipe), and no other child of the program is ever reaped.
- A signal goes through the pidfd, so it cannot hit a process that got the same number later.
- When somebody else took the exit status (a global reaper, or ``SIGCHLD`` ignored by the embedding program),
  the status is unknown. Nothing hangs.
- A child has a session of its own: crosvm may kill its whole process group, which must not contain us. No
  parent-death signal is used: the kernel binds it to the spawning thread. So a child that is let go, or whose
  parent was killed, lives on; ``adopt`` takes it over, with an exit status that nobody here will ever know.
- A child has its user's rights and can never gain others: ``no_new_privs`` is set, the ambient and the
  inheritable capabilities are empty, and ``LIMITS`` hold (``_call_restricted`` says how).

``Process`` belongs to no task. Any number of tasks may wait; the first of them watches the pidfd, the others
wait for it, and if it is cancelled one of the others takes over.
"""

import _thread
import ctypes
import errno
import functools
import os
import resource
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import anyio
import anyio.lowlevel

from vmactor.errors import IllegalArgumentError
from vmactor.log import get_logger
from vmactor.messages import Requester
from vmactor.usage import CpuTime, cpu_time
from vmactor.waiting import Moment, readable

REAP_SECONDS: Final = 10.0
"""How long ``aclose`` waits for a killed process. Only one stuck inside the kernel takes longer."""

LIMITS: Final = {"core": 0, "nofile": 4096, "rtprio": 0}
"""What a child may have of what it could take from others, soft and hard, and never more than we have.

No core dump, because a guest's memory would be in it. 4,096 descriptors: a QEMU has less than a hundred, but
the vsock helper needs one for each connection that its guest opens. No real-time priority: a virtual CPU that
has it can stall a CPU of the host. Memory and processes are not limited here, since the kernel's limits for
these do not count what matters (a VMM's address space is far larger than what it uses, and processes are
counted by user).
"""

_REAP_RETRY_SECONDS: Final = 0.01

_log = get_logger()


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended; both None if somebody else took the status.

    Attributes:
        code: The exit code, if it exited.
        signal: The signal's number, if one ended it.
        cpu: What it used of processors, unless somebody else took the status.
    """

    code: int | None
    signal: int | None
    cpu: CpuTime | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.code is not None:
            return f"exit code {self.code}"
        if self.signal is None:
            return "unknown exit status (somebody else reaped the process)"
        try:
            return f"signal {self.signal} ({signal.Signals(self.signal).name})"
        except ValueError:  # a real-time signal has a number only
            return f"signal {self.signal}"


UNKNOWN: Final = ExitStatus(None, None)


class Process:
    """A child process; made by ``spawn``, released by ``aclose``.

    Attributes:
        pid: The process number. For people and records; never signal by it.
        args: What was run.
        start_time: Field 22 of ``/proc/PID/stat`` (clock ticks since boot), which together with the pid and
            the boot id names the process for good; None if it was gone before it could be read.
    """

    def __init__(self, pid: int, pidfd: int | None, args: tuple[str, ...]) -> None:
        self.pid = pid
        self.args = args
        self.start_time = start_time_of(pid) if pidfd is not None else None
        self._pidfd = pidfd
        self._status = UNKNOWN if pidfd is None else None
        self._watched: Moment | None = None
        self._adopted = False

    @classmethod
    def adopt(cls, pid: int, pidfd: int, args: Sequence[str]) -> Self:
        """Take over a process that is most likely nobody's child here: its exit status is unknown then.

        Args:
            pid: Its number.
            pidfd: Refers to it, opened before it was made sure which process this is; belongs to the result.
            args: What it runs, for people.
        """
        process = cls(pid, pidfd, tuple(args))
        process._adopted = True
        return process

    @classmethod
    def spawn(
        cls,
        args: Sequence[str | os.PathLike[str]],
        *,
        pass_fds: Collection[int] = (),
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        requester: Requester | None = None,
    ) -> Self:
        """Start a process in a session of its own, with restricted rights.

        Synchronous on purpose: it takes about a millisecond, and without an await in it a spawn cannot be
        cancelled half-way, which would leave a child that nobody knows.

        Args:
            args: The executable and its arguments; no shell.
            pass_fds: Descriptors that the child keeps, under their numbers; it gets no others above 2.
            stdin: A descriptor, or None for ``/dev/null``. It stays the caller's; so do the next two.
            stdout: The same.
            stderr: The same.
            env: Variables that the child gets on top of its environment.
            cwd: The working directory, or None for the caller's. It need not be reachable for ``requester``.
            requester: Whose rights the child has; None, and the caller itself, for the caller's. For another
                user, which takes root, the child begins as util-linux's ``setpriv``, the environment is not
                passed on, and what keeps the program from being executed is told by the exit status only.

        Raises:
            OSError: Not executable, no such file, or a limit (descriptors, processes). No child is left.
            IllegalArgumentError: An argument or variable that no process can get (it has a NUL byte, say).
        """
        names = tuple(os.fspath(arg) for arg in args)
        other = requester is not None and not is_caller(requester)
        command = _as_other(requester, names) if requester is not None and other else names

        def start() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.DEVNULL if stdout is None else stdout,
                stderr=subprocess.DEVNULL if stderr is None else stderr,
                close_fds=True,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                env={**(_OTHERS_ENVIRONMENT if other else os.environ), **(env or {})}
                if other or env
                else None,
                cwd=cwd,
            )

        try:
            popen = start() if other else _call_restricted(start)
        except ValueError as error:
            raise IllegalArgumentError(f"Cannot run {names[0]!r}: {error}; correct the arguments") from error
        try:
            pidfd = None
            with suppress(ProcessLookupError):  # ended already, and somebody else reaped it
                pidfd = os.pidfd_open(popen.pid)
                if not other:
                    _limit(popen.pid)
        except OSError:
            if pidfd is not None:
                os.close(pidfd)
            popen.kill()  # by number, which is safe as long as we have not reaped it
            popen.wait()
            raise
        # From here on the pidfd is the only owner. A Popen without return code would warn when it is
        # collected, and queue the pid for reaping by whoever uses subprocess next.
        popen.returncode = 0
        return cls(popen.pid, pidfd, names)

    def __repr__(self) -> str:
        state = "running" if self.status is None else str(self.status)
        return f"<Process {Path(self.args[0]).name} pid={self.pid} {state}>"

    @property
    def status(self) -> ExitStatus | None:
        """How it ended; None while it runs. Asks the kernel, so it is right even if nobody waits."""
        self._reap()
        return self._status

    async def wait(self) -> ExitStatus:
        """Return how the process ended; any number of tasks may wait, also after the end. Cancellable."""
        await anyio.lowlevel.checkpoint()
        while self._status is None:
            # Two tasks cannot wait for one descriptor, hence the turn-taking. The turn ends in the watching
            # task itself, because anyio's clean-up on asyncio goes by the descriptor's number.
            if self._watched is not None:
                await self._watched.wait()
                continue
            watched = self._watched = Moment()
            try:
                await self._watch()
            finally:
                self._watched = None
                watched.set()
        return self._status

    def send_signal(self, number: int) -> None:
        """Send a signal; does nothing if the process has ended. Never blocks.

        Raises:
            PermissionError: The process changed its user and is not ours to signal any more.
        """
        if self._status is None and self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Send SIGKILL; the same rules as ``send_signal``."""
        self.send_signal(signal.SIGKILL)

    async def aclose(self) -> None:
        """Kill if alive, reap, close the pidfd. Idempotent; not interrupted by cancellation.

        Takes 10 seconds at most: a process that survives SIGKILL for so long (stuck in the kernel, or not
        ours to signal) is logged and left, and its status counts as unknown from then on.
        """
        if not self._reap():
            with anyio.move_on_after(REAP_SECONDS, shield=True):
                with suppress(PermissionError):
                    self.kill()
                await self.wait()
        if self._status is None:
            _log.error("process survived SIGKILL and is left behind", pid=self.pid, executable=self.args[0])
            self._status = UNKNOWN
            if self._pidfd is not None:
                anyio.notify_closing(self._pidfd)
        if self._watched is not None:
            with anyio.CancelScope(shield=True):
                while self._watched is not None:
                    await self._watched.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def close(self) -> None:
        """``aclose`` for a thread that may block and a process that no task waits for."""
        with suppress(PermissionError):
            self.kill()
        if self._pidfd is None:
            return
        ended = select.poll()
        ended.register(self._pidfd, select.POLLIN)
        if not ended.poll(REAP_SECONDS * 1000) or not self._reap():
            _log.error("process survived SIGKILL and is left behind", pid=self.pid, executable=self.args[0])
            self._status = UNKNOWN
        os.close(self._pidfd)
        self._pidfd = None

    def let_go(self) -> None:
        """Leave the process alone from now on, alive or not; no task may wait for it. Idempotent."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self._status = self._status or UNKNOWN

    async def _watch(self) -> None:
        """Return when the status is known."""
        if self._pidfd is not None:
            with suppress(anyio.ClosedResourceError):
                await readable(self._pidfd)
        # While a debugger holds the process, it has ended for the pidfd but cannot be reaped yet.
        while not self._reap():  # noqa: ASYNC110 - the kernel has no event for that
            await anyio.sleep(_REAP_RETRY_SECONDS)

    def _reap(self) -> bool:
        """Take the status if there is one; True if it is known."""
        if self._status is None and self._pidfd is not None:
            if self._adopted and not has_ended(self._pidfd):
                return False  # of what is no child, waitid says at once that there is none
            try:
                # WNOHANG, because uvloop makes watched descriptors non-blocking, which waitid answers with
                # EAGAIN
                result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._status = UNKNOWN
            else:
                if result is not None:
                    exited = result.si_code == os.CLD_EXITED
                    self._status = ExitStatus(
                        result.si_status if exited else None,
                        None if exited else result.si_status,
                        cpu_time(self.pid),  # its number is its own until it is reaped
                    )
                    with suppress(ChildProcessError):
                        os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        return self._status is not None


def has_ended(pidfd: int) -> bool:
    """Whether the process that a pidfd refers to has ended; reaps nothing."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))


def start_time_of(pid: int) -> int | None:
    """When a process began, as ``Process.start_time``; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # noqa: PTH123 - pathlib's takes twice as long
            stat = file.read()
    except OSError:
        return None
    # The second field is the name in parentheses, which may hold spaces and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[22 - 3])


# -- Rights ----------------------------------------------------------------------------------------

_OTHERS_ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C.UTF-8"}
"""What the process of another user gets of the environment: nothing of ours, which may hold secrets."""
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522
_INHERITABLE: Final = (2, 5)
"""Where the inheritable sets stand in the six words of the kernel's ``struct __user_cap_data_struct[2]``."""


def is_caller(requester: Requester) -> bool:
    """Whether these are the rights that this process has anyhow."""
    groups, ours = {*requester.groups, requester.gid}, {*os.getgroups(), os.getegid()}
    return (requester.uid, requester.gid, groups) == (os.geteuid(), os.getegid(), ours)


def _call_restricted(start: "Callable[[], subprocess.Popen[bytes]]") -> "subprocess.Popen[bytes]":
    """Call ``start`` in a thread of its own, whose rights, and so its child's, are restricted for good.

    Credentials and ``no_new_privs`` belong to a thread and are inherited from the one that forks. Nothing of
    the embedding program changes, and ``vfork`` can be used. Errors come out as they are.
    """
    started: list[subprocess.Popen[bytes]] = []
    failed: list[BaseException] = []
    done = _thread.allocate_lock()
    done.acquire()

    def run() -> None:
        try:
            _restrict_thread()
            started.append(start())
        except BaseException as error:  # handed to the caller
            failed.append(error)
        finally:
            done.release()

    # Not a threading.Thread: to start and to join one are two more switches between threads. And not one that
    # is kept: a child inherits what belongs to a thread (its network, say, or processors), so the caller's.
    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:  # what Python makes of EAGAIN
        raise BlockingIOError(errno.EAGAIN, "no thread can be made") from error
    done.acquire()
    if failed:
        raise failed[0]
    return started[0]


def _restrict_thread() -> None:
    """Give up, for this thread, every way to gain rights by executing a program."""
    libc = _libc()
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check(libc.capget(header, sets))
    for place in _INHERITABLE:
        sets[place] = 0  # an ambient capability has to be inheritable, so the ambient ones go as well
    _check(libc.capset(header, sets))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _limit(pid: int) -> None:
    """Set the limits of a child that has just begun; a VMM's guest does not run yet."""
    for name, wanted in LIMITS.items():
        which = getattr(resource, f"RLIMIT_{name.upper()}")
        bound = _bound(which, wanted)
        resource.prlimit(pid, which, (bound, bound))


def _as_other(requester: Requester, names: tuple[str, ...]) -> tuple[str, ...]:
    """The command line that runs ``names`` with the rights of another user.

    Not ``Popen(user=...)``: that copies our page tables (6 ms or more for 200 MB of memory), where this costs
    two small executions. And the limits of another user's process are not ours to set from outside.
    """
    if (found := shutil.which(names[0])) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), names[0])
    limits = (
        f"--{name}={_bound(getattr(resource, f'RLIMIT_{name.upper()}'), wanted)}"
        for name, wanted in LIMITS.items()
    )
    groups = ",".join(map(str, requester.groups))
    return (
        *("setpriv", f"--reuid={requester.uid}", f"--regid={requester.gid}"),
        f"--groups={groups}" if groups else "--clear-groups",
        *("--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--"),
        *("prlimit", *limits, "--", os.path.abspath(found), *names[1:]),  # noqa: PTH100 - the child may be elsewhere
    )


def _bound(which: int, wanted: int) -> int:
    hard = resource.getrlimit(which)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
