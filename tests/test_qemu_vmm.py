"""A QEMU that follows a script: its end is decided from its exit and its words, and requests keep time."""

import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.qmp_peer import GREETING, QmpPeer, connected
from vmactor.errors import DeadlineExceededError, IllegalArgumentError, VmmError
from vmactor.messages import BalloonStats, DeathReason
from vmactor.process import ExitStatus, Process
from vmactor.vmm import qemu_vmm
from vmactor.vmm.qemu_vmm import QemuVmm, Witness, death_reason

MIB = 1 << 20
UNKNOWN = ExitStatus(None, None)


def exited(code: int) -> ExitStatus:
    return ExitStatus(code, None)


def signalled(number: int) -> ExitStatus:
    return ExitStatus(None, number)


# -- The decision ------------------------------------------------------------------------------------

SAID = {
    "nothing": Witness(),
    "shutdown": Witness(shutdown="guest-shutdown"),
    "reset": Witness(shutdown="guest-reset"),
    "panic": Witness(shutdown="guest-panic", panicked=True),
    "panic event alone": Witness(panicked=True),
    "panic shutdown alone": Witness(shutdown="guest-panic"),
    "watchdog": Witness(shutdown="guest-reset", watchdog=True),
    "host signal": Witness(shutdown="host-signal"),
    "quit": Witness(shutdown="host-qmp-quit"),
    "host error": Witness(shutdown="host-error"),
}


@pytest.mark.parametrize(
    ("status", "said", "running", "reason"),
    [
        (exited(0), "shutdown", True, "SHUTDOWN"),
        (exited(0), "reset", True, "REBOOT"),
        (exited(0), "panic", True, "CRASH"),
        (exited(0), "panic event alone", True, "CRASH"),
        (exited(0), "panic shutdown alone", True, "CRASH"),
        (exited(0), "watchdog", True, "WATCHDOG_REBOOT"),
        (exited(0), "host signal", True, "KILLED"),
        (exited(0), "quit", True, "KILLED"),
        (exited(0), "host error", True, "UNKNOWN"),
        (exited(0), "nothing", True, "UNKNOWN"),
        (exited(1), "nothing", True, "UNKNOWN"),
        (exited(1), "nothing", False, "START_FAILED"),
        (exited(0), "nothing", False, "START_FAILED"),
        (exited(0), "shutdown", False, "SHUTDOWN"),
        (signalled(9), "nothing", True, "KILLED"),
        (signalled(9), "nothing", False, "KILLED"),
        (signalled(9), "shutdown", True, "KILLED"),
        (signalled(9), "watchdog", True, "KILLED"),
        (signalled(6), "nothing", True, "KILLED"),
        (UNKNOWN, "nothing", True, "INFRASTRUCTURE_ERROR"),
        (UNKNOWN, "nothing", False, "INFRASTRUCTURE_ERROR"),
        (UNKNOWN, "reset", True, "REBOOT"),
        (UNKNOWN, "panic", True, "CRASH"),
        (UNKNOWN, "host error", True, "UNKNOWN"),
    ],
)
def test_the_death_reason_by_exit_status_and_last_words(
    status: ExitStatus, said: str, running: bool, reason: str
) -> None:
    assert death_reason(status, SAID[said], running=running).name == reason


def test_the_first_shutdown_counts_and_other_events_do_not() -> None:
    witness = Witness()
    for event, data in [("STOP", {}), ("SHUTDOWN", {"reason": "guest-reset"}), ("SHUTDOWN", {"reason": "x"})]:
        witness.hear(event, data)
    assert witness == Witness(shutdown="guest-reset")


# -- A process and a peer ----------------------------------------------------------------------------


class Fake:
    """A QemuVmm, the peer that plays its control socket, and a way to end its process."""

    def __init__(self, vmm: QemuVmm, peer: QmpPeer, end: Callable[[int], None]) -> None:
        self.vmm, self.peer, self.end = vmm, peer, end

    async def start(self) -> None:
        await self.peer.greet()
        await self.peer.expect("cont")


@asynccontextmanager
async def fake(directory: Path, *, started: bool = True, freeze: bool = False) -> AsyncIterator[Fake]:
    read, write = os.pipe()
    process = Process.spawn(["/bin/sh", "-c", "read code && exit $code"], stdin=read)
    os.close(read)
    try:
        async with connected(directory) as (stream, peer):
            vmm = QemuVmm(process, stream, memory=512 * MIB, socket_path=directory / "qmp", freeze=freeze)
            it = Fake(vmm, peer, lambda code: (os.write(write, f"{code}\n".encode()), None)[1])
            try:
                if started:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(it.start)
                        await vmm.wait_running()
                yield it
            finally:
                await vmm.aclose()
    finally:
        os.close(write)
    assert not (directory / "qmp").exists()


pytestmark = pytest.mark.anyio


async def test_the_guest_is_set_going_once_however_often_one_waits_for_it(short_dir: Path) -> None:
    async with fake(short_dir, started=False) as it, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(it.vmm.wait_running)
        tasks.start_soon(it.vmm.wait)
        await it.start()
        await it.vmm.wait_running()
        assert "running" in repr(it.vmm)
        it.vmm.kill()
        await it.peer.stream.aclose()


@pytest.mark.parametrize(
    ("events", "code", "reason", "detail"),
    [
        ([("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})], 0, "SHUTDOWN", "reason guest-shutdown"),
        ([("SHUTDOWN", {"guest": True, "reason": "guest-reset"})], 0, "REBOOT", "reason guest-reset"),
        ([("GUEST_PANICKED", {"action": "poweroff"})], 0, "CRASH", "the guest panicked"),
        ([("WATCHDOG", {"action": "reset"})], 0, "WATCHDOG_REBOOT", "watchdog fired"),
        ([], 1, "UNKNOWN", "QEMU ended with exit code 1"),
    ],
)
async def test_last_words_are_heard_even_if_nobody_listened_before_the_end(
    short_dir: Path, events: list[tuple[str, dict[str, Any]]], code: int, reason: str, detail: str
) -> None:
    async with fake(short_dir) as it:
        for name, data in events:
            await it.peer.event(name, **data)
        await it.peer.stream.aclose()
        it.end(code)
        ended = await it.vmm.wait()
        assert (ended.status, ended.reason.name) == (exited(code), reason)
        assert detail in ended.detail
        assert await it.vmm.wait() is ended


async def test_events_of_a_flood_are_read_while_waiting(short_dir: Path) -> None:
    async with fake(short_dir) as it, anyio.create_task_group() as tasks:
        reasons = []

        async def watch() -> None:
            reasons.append((await it.vmm.wait()).reason)

        tasks.start_soon(watch)
        tasks.start_soon(watch)
        for _ in range(500):  # more than a socket buffer holds
            await it.peer.event("RTC_CHANGE", text="x" * 1000)
        await it.peer.event("SHUTDOWN", reason="guest-shutdown")
        it.end(0)
        await it.peer.stream.aclose()
    assert reasons == [DeathReason.SHUTDOWN] * 2


async def test_a_socket_that_outlives_the_process_does_not_hold_up_the_end(
    short_dir: Path,
) -> None:
    async with fake(short_dir) as it:
        it.end(7)
        assert (await it.vmm.wait()).status == exited(7)


async def test_a_process_that_ends_before_it_runs_the_guest_is_a_failed_start(short_dir: Path) -> None:
    async with fake(short_dir, started=False) as it:
        it.end(1)
        await it.peer.stream.aclose()
        with pytest.raises(VmmError, match="QEMU ended before it ran the guest: exit code 1"):
            await it.vmm.wait_running()
        assert (await it.vmm.wait()).reason is DeathReason.START_FAILED


async def test_a_kill_before_it_runs_is_a_kill(short_dir: Path) -> None:
    async with fake(short_dir, started=False) as it:
        it.vmm.kill()
        await it.peer.stream.aclose()
        with pytest.raises(VmmError, match="SIGKILL"):
            await it.vmm.wait_running()
        ended = await it.vmm.wait()
        assert (ended.reason, ended.status) == (DeathReason.KILLED, signalled(signal.SIGKILL))
        it.vmm.kill()


async def test_one_that_refuses_to_run_the_guest_is_killed_and_its_refusal_told(
    short_dir: Path,
) -> None:
    async with fake(short_dir, started=False) as it, anyio.create_task_group() as tasks:

        async def script() -> None:
            await it.peer.greet()
            request = await it.peer.hear()
            await it.peer.say({"error": {"class": "GenericError", "desc": "no"}, "id": request["id"]})

        tasks.start_soon(script)
        with pytest.raises(VmmError, match="refused cont: no"):
            await it.vmm.wait_running()
        ended = await it.vmm.wait()
        assert (ended.reason, ended.detail) == (DeathReason.START_FAILED, "QEMU refused cont: no")


async def test_a_silent_one_ends_in_a_deadline_and_can_be_killed(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_vmm, "START_TIMEOUT", 0.05)
    async with fake(short_dir, started=False) as it:
        with pytest.raises(DeadlineExceededError, match="did not greet"):
            await it.vmm.wait_running()
        await it.peer.say(GREETING)
        with pytest.raises(DeadlineExceededError):
            await it.vmm.wait_running()
        it.vmm.kill()
        assert (await it.vmm.wait()).status == signalled(signal.SIGKILL)


async def test_waiting_can_be_cancelled_and_taken_up_again(short_dir: Path) -> None:
    async with fake(short_dir) as it:
        with anyio.move_on_after(0.01) as scope:
            await it.vmm.wait()
        assert scope.cancelled_caught
        it.end(0)
        await it.peer.event("SHUTDOWN", reason="guest-reset")
        await it.peer.stream.aclose()
        assert (await it.vmm.wait()).reason is DeathReason.REBOOT


async def test_closing_kills_and_is_idempotent(short_dir: Path) -> None:
    async with fake(short_dir) as it:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await it.vmm.aclose()
        await it.vmm.aclose()
        assert (await it.vmm.wait()).status == signalled(signal.SIGKILL)
        with pytest.raises(VmmError, match="closed"):
            await it.vmm.suspend()


# -- Requests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "command"), [("suspend", "stop"), ("resume", "cont"), ("request_shutdown", "system_powerdown")]
)
@pytest.mark.parametrize("watched", [False, True])
async def test_requests_work_whether_or_not_somebody_waits_for_the_end(
    short_dir: Path, method: str, command: str, watched: bool
) -> None:
    async with fake(short_dir) as it, anyio.create_task_group() as tasks:
        if watched:
            tasks.start_soon(it.vmm.wait)
        tasks.start_soon(it.peer.expect, command)
        await getattr(it.vmm, method)()
        it.vmm.kill()
        await it.peer.stream.aclose()


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def test_beside_a_helper_the_whole_process_is_stopped_and_set_going_again(short_dir: Path) -> None:
    async with fake(short_dir, freeze=True) as it, anyio.create_task_group() as tasks:
        tasks.start_soon(it.peer.expect, "query-status")
        await it.vmm.suspend()
        while state_of(it.vmm.pid) != "T":
            await anyio.lowlevel.checkpoint()
        for request in (it.vmm.request_shutdown, it.vmm.balloon_stats, it.vmm.suspend):
            with pytest.raises(VmmError, match=r"the VM is suspended, .*; resume it first"):
                await request()
        tasks.start_soon(it.peer.expect, "cont")
        await it.vmm.resume()
        while state_of(it.vmm.pid) == "T":
            await anyio.lowlevel.checkpoint()
        tasks.start_soon(it.peer.expect, "query-status")
        await it.vmm.suspend()
        it.vmm.kill()
        await it.peer.stream.aclose()
        assert (await it.vmm.wait()).reason is DeathReason.KILLED


async def test_requests_to_a_stuck_one_end_in_a_deadline_and_a_kill_still_works(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_vmm, "REQUEST_TIMEOUT", 0.05)
    async with fake(short_dir) as it:
        for request in (it.vmm.suspend, it.vmm.resume, it.vmm.request_shutdown, it.vmm.balloon_stats):
            with pytest.raises(DeadlineExceededError):
                await request()
        with pytest.raises(DeadlineExceededError):
            await it.vmm.set_balloon(MIB)
        it.vmm.kill()
        await it.peer.stream.aclose()
        assert (await it.vmm.wait()).reason is DeathReason.KILLED


async def test_requests_to_a_dead_one_fail_at_once(short_dir: Path) -> None:
    async with fake(short_dir) as it:
        it.end(0)
        await it.peer.stream.aclose()
        await it.vmm.wait()
        with pytest.raises(VmmError, match="closed its control socket"):
            await it.vmm.suspend()


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (0, 512 * MIB),
        (256 * MIB, 256 * MIB),
        (500 * MIB, 16 * MIB),
        (10**15, 16 * MIB),
        (4097, 512 * MIB - 4097),
    ],
)
async def test_a_balloon_of_a_size_leaves_the_rest_to_the_guest(
    short_dir: Path, size: int, value: int
) -> None:
    async with fake(short_dir) as it, anyio.create_task_group() as tasks:
        heard: list[dict[str, Any]] = []

        async def script() -> None:
            heard.append(await it.peer.expect("balloon"))

        tasks.start_soon(script)
        await it.vmm.set_balloon(size)
    assert heard == [{"value": value}]


async def test_a_negative_balloon_is_an_illegal_argument(short_dir: Path) -> None:
    async with fake(short_dir) as it:
        with pytest.raises(IllegalArgumentError):
            await it.vmm.set_balloon(-1)


def stats(update: int, **values: int) -> dict[str, Any]:
    return {"last-update": update, "stats": {"stat-" + k.replace("_", "-"): v for k, v in values.items()}}


async def test_figures_are_asked_for_anew_and_polling_is_off_afterwards(short_dir: Path) -> None:
    async with fake(short_dir) as it, anyio.create_task_group() as tasks:
        intervals = []
        late = int(time.time()) + 100
        figures = stats(late, total_memory=100, free_memory=2**64 - 1, available_memory=-1, swap_in=5)

        async def script() -> None:
            await it.peer.expect("qom-get", stats(1))
            intervals.append((await it.peer.expect("qom-set"))["value"])
            intervals.append((await it.peer.expect("qom-set"))["value"])
            await it.peer.expect("qom-get", stats(1, total_memory=7))
            await it.peer.expect("qom-get", figures)
            await it.peer.expect("query-balloon", {"actual": 500 * MIB})
            intervals.append((await it.peer.expect("qom-set"))["value"])

        tasks.start_soon(script)
        assert await it.vmm.balloon_stats() == BalloonStats(balloon_actual=12 * MIB, total_memory=100)
    assert intervals[0] == intervals[2] == 0
    assert intervals[1] > 3600


async def test_a_guest_without_an_active_balloon_driver_has_no_figures(short_dir: Path) -> None:
    async with fake(short_dir) as it, anyio.create_task_group() as tasks:
        tasks.start_soon(it.peer.expect, "qom-get", stats(0))
        assert await it.vmm.balloon_stats() is None


@pytest.mark.parametrize("answer", [[], "x", {}, {"last-update": "now", "stats": {}}, {"last-update": 1}])
async def test_figures_of_the_wrong_shape_are_a_vmm_error(short_dir: Path, answer: Any) -> None:
    async with fake(short_dir) as it, anyio.create_task_group() as tasks:
        tasks.start_soon(it.peer.expect, "qom-get", answer)
        with pytest.raises(VmmError, match="QEMU's answer has no"):
            await it.vmm.balloon_stats()
