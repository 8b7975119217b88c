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
  parent-death signal is used: the kernel binds it to the spawning thread.

``Process`` belongs to no task. Any number of tasks may wait; the first of them watches the pidfd, the others
wait for it, and if it is cancelled one of the others takes over.
"""

import os
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import anyio
import anyio.lowlevel

from vmactor.errors import IllegalArgumentError
from vmactor.log import get_logger

REAP_SECONDS: Final = 10.0
"""How long ``aclose`` waits for a killed process. Only one stuck inside the kernel takes longer."""

_REAP_RETRY_SECONDS: Final = 0.01

_log = get_logger()


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How a process ended; both None if somebody else took the status.

    Attributes:
        code: The exit code, if it exited.
        signal: The signal's number, if one ended it.
    """

    code: int | None
    signal: int | None

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
        self.start_time = _start_time(pid) if pidfd is not None else None
        self._pidfd = pidfd
        self._status = UNKNOWN if pidfd is None else None
        self._watched: anyio.Event | None = None

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
    ) -> Self:
        """Start a process in a session of its own.

        Synchronous on purpose: ``vfork`` takes about a millisecond, and without an await in it a spawn cannot
        be cancelled half-way, which would leave a child that nobody knows.

        Args:
            args: The executable and its arguments; no shell.
            pass_fds: Descriptors that the child keeps, under their numbers; it gets no others above 2.
            stdin: A descriptor, or None for ``/dev/null``. It stays the caller's; so do the next two.
            stdout: The same.
            stderr: The same.
            env: The environment, or None for the caller's.
            cwd: The working directory, or None for the caller's.

        Raises:
            OSError: Not executable, no such file, or a limit (descriptors, processes). No child is left.
            IllegalArgumentError: An argument or variable that no process can get (it has a NUL byte, say).
        """
        names = tuple(os.fspath(arg) for arg in args)
        try:
            popen = subprocess.Popen(
                names,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.DEVNULL if stdout is None else stdout,
                stderr=subprocess.DEVNULL if stderr is None else stderr,
                close_fds=True,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                env=env,
                cwd=cwd,
            )
        except ValueError as error:
            raise IllegalArgumentError(f"Cannot run {names[0]!r}: {error}; correct the arguments") from error
        try:
            pidfd = os.pidfd_open(popen.pid)
        except ProcessLookupError:
            pidfd = None  # ended already, and somebody else (or an ignored SIGCHLD) reaped it
        except OSError:
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
            watched = self._watched = anyio.Event()
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
        with anyio.move_on_after(REAP_SECONDS, shield=True):
            with suppress(PermissionError):
                self.kill()
            await self.wait()
        if self._status is None:
            _log.error("process survived SIGKILL and is left behind", pid=self.pid, executable=self.args[0])
            self._status = UNKNOWN
            if self._pidfd is not None:
                anyio.notify_closing(self._pidfd)
        with anyio.CancelScope(shield=True):
            while self._watched is not None:
                await self._watched.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    async def _watch(self) -> None:
        """Return when the status is known."""
        if self._pidfd is not None:
            with suppress(anyio.ClosedResourceError):
                await anyio.wait_readable(self._pidfd)
        # While a debugger holds the process, it has ended for the pidfd but cannot be reaped yet.
        while not self._reap():  # noqa: ASYNC110 - the kernel has no event for that
            await anyio.sleep(_REAP_RETRY_SECONDS)

    def _reap(self) -> bool:
        """Take the status if there is one; True if it is known."""
        if self._status is None and self._pidfd is not None:
            try:
                # WNOHANG, because uvloop makes watched descriptors non-blocking, which waitid answers with
                # EAGAIN
                result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                self._status = UNKNOWN
            else:
                if result is not None:
                    exited = result.si_code == os.CLD_EXITED
                    self._status = ExitStatus(
                        result.si_status if exited else None, None if exited else result.si_status
                    )
        return self._status is not None


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field is the name in parentheses, which may hold spaces and parentheses itself.
    return int(stat.rpartition(b")")[2].split()[22 - 3])
