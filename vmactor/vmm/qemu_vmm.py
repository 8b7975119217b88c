"""A running QEMU: its process and its control socket, and what they say together.

``QemuVmm`` owns both, but no task: whoever calls ``wait``, ``wait_running`` or a request does the work.
They may be called in any order and at the same time. Signals go through the process's pidfd and never wait
for QEMU.

How it ended is decided by two witnesses: the exit status, which is always true but says little (0 after a
shutdown, a reboot and a panic), and QEMU's last events, which say which of these it was.
"""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
from anyio.abc import ByteStream

from vmactor.errors import DeadlineExceededError, IllegalArgumentError, VmmError
from vmactor.messages import BalloonStats, DeathReason
from vmactor.process import ExitStatus, Process
from vmactor.vmm.driver import VmmExit
from vmactor.vmm.handover import remove_socket
from vmactor.vmm.qmp import Json, QmpClient

START_TIMEOUT: Final = 30.0
"""How long QEMU may take until it runs the guest, in seconds."""
REQUEST_TIMEOUT: Final = 5.0
"""How long QEMU may take to answer a request, in seconds."""
LAST_WORDS_TIMEOUT: Final = 1.0
"""How long a dead QEMU's last bytes are read, and how long one that hung up may take to die, in seconds."""
GUEST_MINIMUM: Final = 16 << 20
"""The least memory that a balloon leaves to the guest, in bytes; no Linux runs in less."""

_BALLOON: Final = "/machine/peripheral/balloon"
_POLL_SECONDS: Final = 0.01
_DAY: Final = 24 * 60 * 60

SHUTDOWN_REASONS: Final = {
    "guest-shutdown": DeathReason.SHUTDOWN,
    "guest-reset": DeathReason.REBOOT,
    "guest-panic": DeathReason.CRASH,
    "host-signal": DeathReason.KILLED,
    "host-qmp-quit": DeathReason.KILLED,
}
"""What the reason in QEMU's SHUTDOWN event means; any other is UNKNOWN."""


T = TypeVar("T")


@dataclass(slots=True)
class Witness:
    """What QEMU has said of the guest's end so far; of constant size, whatever QEMU says.

    Attributes:
        shutdown: Reason of the first SHUTDOWN event.
        panicked: Whether the guest reported a panic.
        watchdog: Whether the guest's watchdog fired.
    """

    shutdown: str | None = None
    panicked: bool = False
    watchdog: bool = False

    def hear(self, event: str, data: Json) -> None:
        """Take note of a QMP event."""
        if event == "SHUTDOWN" and self.shutdown is None:
            self.shutdown = str(data.get("reason"))[:64]
        elif event == "GUEST_PANICKED":
            self.panicked = True
        elif event == "WATCHDOG":
            self.watchdog = True


def death_reason(status: ExitStatus, witness: Witness, *, running: bool) -> DeathReason:
    """Decide why a QEMU ended. Pure.

    Args:
        status: Its exit status.
        witness: What it said before.
        running: Whether it ever ran the guest.
    """
    if status.signal is not None:
        return DeathReason.KILLED
    if witness.watchdog:
        return DeathReason.WATCHDOG_REBOOT
    if witness.panicked:
        return DeathReason.CRASH
    if witness.shutdown is not None:
        return SHUTDOWN_REASONS.get(witness.shutdown, DeathReason.UNKNOWN)
    if status.code is None:
        return DeathReason.INFRASTRUCTURE_ERROR
    return DeathReason.UNKNOWN if running else DeathReason.START_FAILED


class QemuVmm:
    """A QEMU process; made by ``QemuDriver.spawn``, released by ``aclose``. A ``Vmm``."""

    def __init__(
        self, process: Process, stream: ByteStream, *, memory: int, socket_path: Path, freeze: bool = False
    ) -> None:
        """Take over a process and the connection to its control socket.

        Args:
            process: QEMU, started with stopped CPUs.
            stream: Connected to its QMP socket.
            memory: The guest's memory in bytes.
            socket_path: Where the socket is; removed in the end.
            freeze: Whether to suspend by stopping the whole process; see ``suspend``.
        """
        self._process = process
        self._witness = Witness()
        self._qmp = QmpClient(stream, self._witness.hear)
        self._memory = memory
        self._socket_path = socket_path
        self._freeze = freeze
        self._frozen = False
        self._running = False
        self._refusal: str | None = None
        self._starting = anyio.Lock()
        self._measuring = anyio.Lock()
        self._exit: VmmExit | None = None

    def __repr__(self) -> str:
        state = "running" if self._running else "starting"
        return f"<QemuVmm pid={self.pid} {self._exit.reason.name if self._exit else state}>"

    @property
    def pid(self) -> int:
        """Process number, for people only."""
        return self._process.pid

    # -- Life --------------------------------------------------------------------------------------

    async def wait_running(self) -> None:
        """Set the virtual CPUs going; return when they run. Any number of times.

        Raises:
            VmmError: QEMU ended first, or refused; one that refused is killed. ``wait`` tells the rest.
            DeadlineExceededError: It did neither within 30 s; it may be tried again.
        """
        async with self._starting:
            if self._running:
                return
            try:
                end = anyio.current_time() + START_TIMEOUT
                await self._qmp.negotiate(timeout=START_TIMEOUT)
                await self._qmp.execute("cont", timeout=max(end - anyio.current_time(), 0))
            except VmmError as error:
                if self._qmp.failure is not None:
                    with anyio.move_on_after(LAST_WORDS_TIMEOUT):
                        await self._process.wait()
                status = self._process.status
                if status is None:
                    self._refusal = str(error)
                    self._process.kill()
                    raise
                raise VmmError(f"QEMU ended before it ran the guest: {status}") from error
            self._running = True

    async def take_over(self, *, suspended: bool) -> None:
        """See ``Vmm``; up to 30 s.

        A QEMU whose process is stopped cannot speak: its control socket is negotiated when it is resumed.
        """
        self._running = True
        if self._freeze and suspended:
            self._process.send_signal(signal.SIGSTOP)
            self._frozen = True
            return
        if self._freeze:
            self._process.send_signal(signal.SIGCONT)  # its manager may have died with a request under way
        end = anyio.current_time() + START_TIMEOUT
        await self._qmp.negotiate(timeout=START_TIMEOUT)
        timeout = max(end - anyio.current_time(), 0)
        await self._qmp.execute("stop" if suspended else "cont", timeout=timeout)

    async def wait(self) -> VmmExit:
        """Return how QEMU ended; any number of times, also after the end. Reads QEMU's events meanwhile."""
        if self._exit is None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._qmp.read_to_end)
                status = await self._process.wait()
                with anyio.move_on_after(LAST_WORDS_TIMEOUT):
                    await self._qmp.read_to_end()
                tasks.cancel_scope.cancel()
            self._exit = self._decide(status)
        return self._exit

    def _decide(self, status: ExitStatus) -> VmmExit:
        if self._refusal is not None:
            return VmmExit(status, DeathReason.START_FAILED, self._refusal)
        reason = death_reason(status, self._witness, running=self._running)
        said = [
            f"QEMU ended with {status}" if self._running else f"QEMU ended before it ran the guest: {status}"
        ]
        if self._witness.panicked:
            said.append("the guest panicked")
        if self._witness.watchdog:
            said.append("the guest's watchdog fired")
        if self._witness.shutdown is not None:
            said.append(f"it gave the reason {self._witness.shutdown}")
        return VmmExit(status, reason, "; ".join(said))

    def kill(self) -> None:
        """SIGKILL through the pidfd; never blocks, does nothing to a dead QEMU."""
        self._process.kill()

    async def aclose(self) -> None:
        """Kill if alive, reap, close every descriptor, remove the socket. Idempotent; not interrupted."""
        with anyio.CancelScope(shield=True):
            await self._process.aclose()
            await self._qmp.aclose()
        remove_socket(self._socket_path)

    async def let_go(self) -> None:
        """Close every descriptor, and leave QEMU to the next manager."""
        self._process.let_go()
        await self._qmp.aclose()

    # -- Requests ----------------------------------------------------------------------------------

    async def suspend(self) -> None:
        """Pause the virtual CPUs.

        Beside a vhost-user vsock helper it is QEMU's process that is stopped. A paused QEMU would stop the
        device's rings, and vhost-device-vsock (0.3.0) does not survive it if the host sends or closes
        anything then: its worker thread ends, and no vsock works after ``resume``. In a stopped process the
        rings stay. The price: other requests are refused until ``resume``, and the guest's clock goes on.

        Raises:
            VmmError: QEMU refused, or has ended.
            DeadlineExceededError: No answer within 5 s.
        """
        if not self._freeze:
            await self._request("stop")
            return
        # An answer first, so that requests under way are served, and a dead QEMU is no success.
        await self._request("query-status")
        self._process.send_signal(signal.SIGSTOP)
        self._frozen = True

    async def resume(self) -> None:
        """Let the virtual CPUs run again. Raises VmmError or DeadlineExceededError (5 s)."""
        if self._frozen:
            self._process.send_signal(signal.SIGCONT)
            self._frozen = False
            await self._qmp.negotiate(timeout=REQUEST_TIMEOUT)  # unless it was, before it was stopped
        await self._request("cont")

    async def request_shutdown(self) -> None:
        """Press the power button; whether the guest heeds it is its own affair.

        Raises VmmError or DeadlineExceededError (5 s).
        """
        await self._request("system_powerdown")

    async def request_exit(self) -> None:
        """Have QEMU end in order; the guest is not asked. Raises VmmError or DeadlineExceededError (5 s)."""
        await self._request("quit")

    async def set_balloon(self, size: int) -> None:
        """Ask for a balloon of ``size`` bytes; the guest follows in its own time, as far as it can.

        At least 16 MiB are left to the guest.

        Raises:
            IllegalArgumentError: The size is negative.
            VmmError: QEMU refused.
            DeadlineExceededError: No answer within 5 s.
        """
        if size < 0:
            raise IllegalArgumentError("the size of a balloon cannot be negative")
        left = max(self._memory - size, min(GUEST_MINIMUM, self._memory))
        await self._request("balloon", {"value": left})

    async def balloon_stats(self) -> BalloonStats | None:
        """Ask the guest for its memory figures; they are at most a second old.

        Returns:
            None if the guest's balloon driver is not active.

        Raises:
            VmmError: QEMU refused.
            DeadlineExceededError: QEMU, or a guest whose driver is active, did not answer within 5 s.
        """
        timeout = REQUEST_TIMEOUT
        with anyio.move_on_after(timeout):
            async with self._measuring:
                return await self._measure()
        raise DeadlineExceededError(
            f"no memory figures from the guest within {timeout:g} s; it may be stuck: try again later"
        )

    async def _measure(self) -> BalloonStats | None:
        # A driver sends figures when it starts, unasked; so if there are none, there is no driver.
        if not (await self._guest_stats())[0]:
            return None
        asked = int(time.time())  # what QEMU goes by, too
        try:
            # Off first: only the change to another interval asks the guest at once. And an interval of a day,
            # so that no harm is done should we be unable to switch it off.
            await self._set_polling(0)
            await self._set_polling(_DAY)
            while True:
                updated, stats = await self._guest_stats()
                if updated >= asked:
                    break
                await anyio.sleep(_POLL_SECONDS)
            actual = _member(await self._request("query-balloon"), "actual", int)
        finally:
            with (
                anyio.move_on_after(LAST_WORDS_TIMEOUT, shield=True),
                suppress(VmmError, DeadlineExceededError),
            ):
                await self._set_polling(0)
        return BalloonStats(
            balloon_actual=self._memory - actual,
            total_memory=_reported(stats, "stat-total-memory"),
            free_memory=_reported(stats, "stat-free-memory"),
            available_memory=_reported(stats, "stat-available-memory"),
        )

    async def _guest_stats(self) -> tuple[int, Json]:
        """When the guest last sent figures, in seconds since 1970 (0 for never), and the figures."""
        report = await self._request("qom-get", {"path": _BALLOON, "property": "guest-stats"})
        return _member(report, "last-update", int), _member(report, "stats", dict)

    async def _set_polling(self, seconds: int) -> None:
        arguments = {"path": _BALLOON, "property": "guest-stats-polling-interval", "value": seconds}
        await self._request("qom-set", arguments)

    async def _request(self, command: str, arguments: Json | None = None) -> Any:
        if self._frozen:
            raise VmmError(f"the VM is suspended, and QEMU cannot do {command} meanwhile; resume it first")
        return await self._qmp.execute(command, arguments, timeout=REQUEST_TIMEOUT)


def _member(answer: Any, name: str, kind: type[T]) -> T:
    """A member of an answer, which should have it."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise VmmError(f"QEMU's answer has no {name}; it may be of an unknown version")
    return value


def _reported(stats: Json, name: str) -> int | None:
    """A figure in bytes; None if the guest left it out, for which QEMU gives -1, also as a huge number."""
    value = stats.get(name)
    return value if type(value) is int and 0 <= value < 1 << 62 else None
