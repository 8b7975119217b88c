"""A running crosvm: its process and its control socket.

``CrosvmVmm`` owns both, but no task: whoever calls ``wait``, ``wait_running`` or a request does the work.
They may be called in any order and at the same time. Signals go through the process's pidfd and never wait
for crosvm.

How it ended is told by its exit status alone: with ``--extended-status`` each way has a number of its own.
"""

import errno
from pathlib import Path
from typing import Any, Final

import anyio

from vmactor.errors import IllegalArgumentError, VmmError
from vmactor.messages import BalloonStats, DeathReason
from vmactor.process import ExitStatus, Process
from vmactor.vmm.crosvm_control import CrosvmControl, CrosvmError, Json
from vmactor.vmm.driver import VmmExit
from vmactor.vmm.handover import remove_socket

START_TIMEOUT: Final = 30.0
"""How long crosvm may take until it runs the guest, in seconds."""
LAST_WORDS_TIMEOUT: Final = 1.0
"""How long a crosvm that hung up may take to die, in seconds; it waits that long for its own children."""
GUEST_MINIMUM: Final = 16 << 20
"""The least memory that a balloon leaves to the guest, in bytes; no Linux runs in less."""

EXIT_REASONS: Final = {
    0: (DeathReason.SHUTDOWN, ""),
    1: (DeathReason.START_FAILED, "an error out of crosvm; its own words follow"),
    32: (DeathReason.REBOOT, "the guest wanted to reboot"),
    33: (DeathReason.CRASH, "a virtual CPU or a device failed"),
    34: (DeathReason.CRASH, "the guest panicked"),
    35: (
        DeathReason.START_FAILED,
        "crosvm did not understand its arguments; its build may be of another age",
    ),
    36: (DeathReason.WATCHDOG_REBOOT, "the guest's watchdog fired"),
}
"""What crosvm's exit codes mean; any other is UNKNOWN. The reference leaves 34 and 35 unknown, too."""

_INACTIVE: Final = frozenset({errno.ENOTSUP, errno.ENOTCONN, errno.EAGAIN})
"""No balloon; no driver for it in the guest (since 2026-06-24); the same in 2023, after 100 ms."""


def death_reason(status: ExitStatus) -> DeathReason:
    """Decide why a crosvm ended. Pure."""
    if status.signal is not None:
        return DeathReason.KILLED
    if status.code is None:
        return DeathReason.INFRASTRUCTURE_ERROR
    return EXIT_REASONS.get(status.code, (DeathReason.UNKNOWN, ""))[0]


class CrosvmVmm:
    """A crosvm process; made by ``CrosvmDriver.spawn``, released by ``aclose``. A ``Vmm``."""

    def __init__(self, process: Process, *, memory: int, socket_path: Path, old_names: bool = False) -> None:
        """Take over a process and its control socket.

        Args:
            process: crosvm.
            memory: The guest's memory in bytes.
            socket_path: Where its control socket is; removed in the end.
            old_names: Whether suspending and resuming are spelled as until 2023-06-14.
        """
        self._process = process
        self._control = CrosvmControl(socket_path)
        self._memory = memory
        self._socket_path = socket_path
        self._suspend, self._resume = ("Suspend", "Resume") if old_names else ("SuspendVcpus", "ResumeVcpus")
        self._running = False
        self._refusal: str | None = None
        self._told_to_end = False
        self._starting = anyio.Lock()

    def __repr__(self) -> str:
        state = "running" if self._running else "starting"
        return f"<CrosvmVmm pid={self.pid} {state if self._process.status is None else self._process.status}>"

    @property
    def pid(self) -> int:
        """Process number, for people only."""
        return self._process.pid

    # -- Life --------------------------------------------------------------------------------------

    async def wait_running(self) -> None:
        """Return when crosvm has answered a request, which it does only when the virtual CPUs exist.

        The request is to let them run, which they do anyway. Any number of times.

        Raises:
            VmmError: crosvm ended first, or refused; one that refused is killed. ``wait`` tells the rest.
            DeadlineExceededError: It did neither within 30 s; it may be tried again.
        """
        async with self._starting:
            if self._running:
                return
            try:
                await self._control.command(self._resume, timeout=START_TIMEOUT)
            except VmmError as error:
                if not isinstance(error, CrosvmError):
                    with anyio.move_on_after(LAST_WORDS_TIMEOUT):
                        await self._process.wait()
                status = self._process.status
                if status is None:
                    self._refusal = str(error)
                    self._process.kill()
                    raise
                raise VmmError(f"crosvm ended before it ran the guest: {status}") from error
            self._running = True

    async def take_over(self, *, suspended: bool) -> None:
        """See ``Vmm``; up to 30 s. Both requests may be made of a crosvm that is so already."""
        self._running = True
        await self._control.command(self._suspend if suspended else self._resume, timeout=START_TIMEOUT)

    async def wait(self) -> VmmExit:
        """Return how crosvm ended; any number of times, also after the end."""
        status = await self._process.wait()
        if self._refusal is not None:
            return VmmExit(status, DeathReason.START_FAILED, self._refusal)
        if self._told_to_end and status.code == 0:  # the guest had no say in it
            return VmmExit(status, DeathReason.KILLED, f"the VMM ended with {status}, as it was told to")
        said = [f"the VMM ended with {status}"]
        if status.code in EXIT_REASONS and (meaning := EXIT_REASONS[status.code][1]):
            said.append(meaning)
        return VmmExit(status, death_reason(status), "; ".join(said))

    def kill(self) -> None:
        """SIGKILL through the pidfd; never blocks, does nothing to a dead crosvm."""
        self._process.kill()

    async def aclose(self) -> None:
        """Kill if alive, reap, close every descriptor, remove the socket. Idempotent; not interrupted."""
        with anyio.CancelScope(shield=True):
            await self._process.aclose()
        self._control.close()
        remove_socket(self._socket_path)

    async def let_go(self) -> None:
        """Close every descriptor, and leave crosvm to the next manager."""
        self._process.let_go()
        self._control.close()

    # -- Requests ----------------------------------------------------------------------------------

    async def suspend(self) -> None:
        """Pause the virtual CPUs; devices go on. Raises VmmError or DeadlineExceededError (5 s)."""
        await self._control.command(self._suspend)

    async def resume(self) -> None:
        """Let the virtual CPUs run again. Raises VmmError or DeadlineExceededError (5 s)."""
        await self._control.command(self._resume)

    async def request_shutdown(self) -> None:
        """Press the power button, which x86_64 guests have; whether the guest heeds it is its own affair.

        Raises VmmError or DeadlineExceededError (5 s).
        """
        await self._control.command("Powerbtn")

    async def request_exit(self) -> None:
        """Have crosvm end in order: it answers, stops the virtual CPUs, closes its devices and exits with 0.

        The guest is not asked; to it, the power fails. Raises VmmError or DeadlineExceededError (5 s).
        """
        self._told_to_end = True
        try:
            await self._control.command("Exit")
        except CrosvmError:
            self._told_to_end = False
            raise

    async def set_balloon(self, size: int) -> None:
        """Ask for a balloon of ``size`` bytes; the guest follows in its own time, as far as it can.

        At least 16 MiB are left to the guest.

        Raises:
            IllegalArgumentError: The size is negative.
            VmmError: crosvm refused; there may be no balloon, or no driver for it.
            DeadlineExceededError: No answer within 5 s.
        """
        if size < 0:
            raise IllegalArgumentError("the size of a balloon cannot be negative")
        most = self._memory - min(GUEST_MINIMUM, self._memory)
        # Builds since 2023-07-28 want both members, older ones pass over the second. Not to wait is safer: a
        # guest that stops short would leave us without an answer.
        await self._control.command(
            _balloon({"Adjust": {"num_bytes": min(size, most), "wait_for_success": False}})
        )

    async def balloon_stats(self) -> BalloonStats | None:
        """Ask the guest for its memory figures.

        Returns:
            None if there is no balloon, or no driver for it in the guest.

        Raises:
            VmmError: crosvm refused.
            DeadlineExceededError: crosvm, or a guest whose driver is active, did not answer within 5 s.
        """
        try:
            answer = await self._control.ask(_balloon("Stats"), "BalloonStats")
        except CrosvmError as error:
            if error.errno in _INACTIVE:
                return None
            raise
        stats, actual = answer.get("stats"), _figure(answer.get("balloon_actual"))
        if not isinstance(stats, dict) or actual is None:
            raise VmmError("crosvm's memory figures have no size of the balloon; its build may be unknown")
        return BalloonStats(
            balloon_actual=actual,
            total_memory=_figure(stats.get("total_memory")),
            free_memory=_figure(stats.get("free_memory")),
            available_memory=_figure(stats.get("available_memory")),
        )


def _balloon(command: str | Json) -> Json:
    return {"BalloonCommand": command}


def _figure(value: Any) -> int | None:
    """A figure in bytes; None where the guest reported none, or none that can be right."""
    return value if type(value) is int and 0 <= value < 1 << 62 else None
