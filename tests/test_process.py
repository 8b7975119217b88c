"""Child processes: what an exit is, who may take it, and that nothing is left."""

import _thread
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

import vmactor.process
from vmactor.errors import IllegalArgumentError
from vmactor.messages import Requester
from vmactor.process import LIMITS, UNKNOWN, ExitStatus, Process

pytestmark = pytest.mark.anyio

SLEEP = ["sleep", "600"]

TRACER = """
import ctypes, os, sys
seized = ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0  # PTRACE_SEIZE
os.write(1, b"y" if seized else b"n")
os.read(0, 1)
"""


def python(code: str) -> list[str]:
    """A command line that runs ``code``."""
    return [sys.executable, "-S", "-c", code]


async def output_of(args: list[str], **options: Any) -> str:
    """What a process prints before it ends with 0."""
    read_end, write_end = os.pipe()
    try:
        process = Process.spawn(args, stdout=write_end, **options)
        assert await process.wait() == ExitStatus(0, None)
        await process.aclose()
        return os.read(read_end, 65536).decode()
    finally:
        os.close(read_end)
        os.close(write_end)


@contextmanager
def traced(process: Process) -> Iterator[None]:
    """Have a debugger hold the process, which keeps its parent from reaping it."""
    with subprocess.Popen(
        [sys.executable, "-c", TRACER, str(process.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.read(1) != b"y":
            pytest.skip("this host does not let one process debug another")
        yield


async def test_an_exit_code_is_reported() -> None:
    process = Process.spawn(["sh", "-c", "exit 7"])
    assert await process.wait() == ExitStatus(7, None)
    assert str(process.status) == "exit code 7"
    assert await process.wait() == ExitStatus(7, None), "asking again gives the same answer"
    await process.aclose()


async def test_a_signal_is_reported() -> None:
    process = Process.spawn(SLEEP)
    assert process.status is None
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == ExitStatus(None, signal.SIGTERM)
    assert str(process.status) == "signal 15 (SIGTERM)"
    await process.aclose()


def test_signals_without_a_name_are_shown_by_number() -> None:
    assert str(ExitStatus(None, signal.SIGRTMIN + 3)) == f"signal {signal.SIGRTMIN + 3}"


async def test_the_status_is_known_without_anybody_waiting() -> None:
    process = Process.spawn(["true"])
    with anyio.fail_after(10):
        while process.status is None:
            await anyio.sleep(0.001)
    assert process.status == ExitStatus(0, None)
    await process.aclose()


async def test_the_representation_tells_program_pid_and_state() -> None:
    process = Process.spawn(SLEEP)
    assert repr(process) == f"<Process sleep pid={process.pid} running>"
    await process.aclose()
    assert repr(process) == f"<Process sleep pid={process.pid} signal 9 (SIGKILL)>"


async def test_every_waiter_gets_the_status() -> None:
    process = Process.spawn(SLEEP)
    got = []

    async def wait() -> None:
        got.append(await process.wait())

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        process.kill()
    assert got == [ExitStatus(None, signal.SIGKILL)] * 5
    await process.aclose()


async def test_a_cancelled_first_waiter_hands_over() -> None:
    process = Process.spawn(SLEEP)
    got = []
    first = anyio.CancelScope()

    async def wait_cancelled() -> None:
        with first:
            await process.wait()

    async def wait() -> None:
        got.append(await process.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_cancelled)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        first.cancel()
        await anyio.wait_all_tasks_blocked()
        assert first.cancelled_caught
        process.kill()
    assert got == [ExitStatus(None, signal.SIGKILL)] * 2
    await process.aclose()


async def test_the_end_is_the_process_and_not_its_output() -> None:
    read_end, write_end = os.pipe()
    process = Process.spawn(["sh", "-c", "sleep 600 & exit 3"], stdout=write_end)
    os.close(write_end)
    os.set_blocking(read_end, False)
    try:
        with anyio.fail_after(10):
            assert await process.wait() == ExitStatus(3, None)
        with pytest.raises(BlockingIOError):  # not EOF: the grandchild holds the pipe
            os.read(read_end, 1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        os.close(read_end)
        await process.aclose()


async def test_a_child_has_its_own_session_and_null_for_input() -> None:
    out = await output_of(
        python("import os; print(os.getsid(0) == os.getpid(), os.readlink('/proc/self/fd/0'))")
    )
    assert out == "True /dev/null\n"


async def test_a_child_gets_only_the_descriptors_it_was_given() -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    shown = "import os; print(*(os.path.exists(f'/proc/self/fd/{n}') for n in (%d, %d)))"
    try:
        assert await output_of(python(shown % (read_end, write_end)), pass_fds=(read_end,)) == "True False\n"
    finally:
        os.close(read_end)
        os.close(write_end)


# -- Rights ------------------------------------------------------------------------------------------


def status_of(pid: int | str) -> dict[str, str]:
    """What the kernel says of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limits_of(pid: int) -> dict[str, tuple[str, str]]:
    """Soft and hard limits of a process."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): (line[26:47].strip(), line[47:68].strip()) for line in lines}


async def test_a_child_can_gain_no_rights_and_its_parent_keeps_its_own() -> None:
    before = status_of("thread-self")
    process = Process.spawn(SLEEP)
    status = status_of(process.pid)
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapAmb"], 16) == int(status["CapInh"], 16) == 0
    limits = limits_of(process.pid)
    assert limits["Max core file size"] == ("0", "0")
    assert limits["Max realtime priority"] == ("0", "0")
    soft, hard = limits["Max open files"]
    assert soft == hard
    assert int(hard) <= 4096
    after = status_of("thread-self")
    same = ("NoNewPrivs", "CapInh", "CapAmb", "CapPrm", "CapEff", "Uid", "Gid", "Groups")
    assert [after[name] for name in same] == [before[name] for name in same]
    await process.aclose()


AMBIENT = """
import ctypes, os, subprocess, sys
libc = ctypes.CDLL(None)
CHOWN = 0
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
sets[2] |= 1 << CHOWN
assert libc.capset(header, sets) == 0
assert libc.prctl(47, 2, CHOWN, 0, 0) == 0  # PR_CAP_AMBIENT_RAISE
print(open("/proc/thread-self/status").read().split("CapAmb:")[1].split()[0])
from vmactor.process import Process
process = Process.spawn(["grep", "-E", "Cap(Amb|Inh)", "/proc/self/status"], stdout=1)
os.waitpid(process.pid, 0)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to hand on")
async def test_capabilities_that_a_program_hands_to_its_children_are_not_handed_to_ours() -> None:
    out = await output_of([sys.executable, "-c", AMBIENT], cwd=Path(__file__).parent.parent)
    assert [int(word, 16) for word in out.split() if not word.endswith(":")] == [1, 0, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run processes for others")
async def test_a_child_for_another_user_has_that_users_rights_and_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    inner = tmp_path / "inner"
    inner.mkdir()
    inner.chmod(0o755)  # in a directory that the user cannot reach
    read_end, write_end = os.pipe()
    process = Process.spawn(
        ["sh", "-c", "pwd; env; touch x; echo done; exec sleep 600"],
        stdout=write_end,
        stderr=write_end,
        cwd=inner,
        env={"VMACTOR_VM": "t"},
        requester=Requester(4242, 4343, (4344, 4345)),
    )
    os.close(write_end)
    text = b""
    while b"done" not in text:
        text += os.read(read_end, 4096)
    status = status_of(process.pid)
    assert (status["Uid"], status["Gid"]) == ("\t".join(["4242"] * 4), "\t".join(["4343"] * 4))
    assert status["Groups"] == "4344 4345"
    assert status["NoNewPrivs"] == "1"
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}
    assert limits_of(process.pid)["Max core file size"] == ("0", "0")
    assert limits_of(process.pid)["Max open files"][1] == str(LIMITS["nofile"])
    assert os.getsid(process.pid) == process.pid
    assert b"s3cret" not in text
    assert b"VMACTOR_VM=t" in text
    assert not (inner / "x").exists(), "it may not write where its user may not"
    await process.aclose()
    os.close(read_end)


async def test_naming_oneself_as_the_requester_changes_nothing() -> None:
    me = Requester(os.geteuid(), os.getegid(), tuple(os.getgroups()))
    process = Process.spawn(SLEEP, requester=me)
    assert status_of(process.pid)["Name"] == "sleep", "it was executed at once"
    await process.aclose()


async def test_a_missing_program_is_told_at_once_for_another_user_too() -> None:
    with pytest.raises(FileNotFoundError, match="/nonexistent/vmm"):
        Process.spawn(["/nonexistent/vmm"], requester=Requester(4242, 4242))


@pytest.mark.parametrize("number", [-1, 2**32 - 1, True, "0"])
def test_what_cannot_be_a_user_is_refused(number: Any) -> None:
    with pytest.raises(IllegalArgumentError, match="a user or group is a number"):
        Requester(number, 0)


async def test_without_a_thread_to_spare_nothing_is_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(_thread, "start_new_thread", no_thread)
        with pytest.raises(BlockingIOError):
            Process.spawn(SLEEP)


async def test_a_child_whose_limits_cannot_be_set_does_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []

    def refuse(pid: int, *_: object) -> None:
        pids.append(pid)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(resource, "prlimit", refuse)
    with pytest.raises(PermissionError):
        Process.spawn(SLEEP)
    assert not Path(f"/proc/{pids[0]}").exists()


async def test_children_cost_no_thread() -> None:
    before = threading.active_count()
    processes = [Process.spawn(SLEEP) for _ in range(20)]
    async with anyio.create_task_group() as tasks:
        for process in processes:
            tasks.start_soon(process.wait)
        await anyio.wait_all_tasks_blocked()
        assert threading.active_count() == before
        for process in processes:
            tasks.start_soon(process.aclose)


async def test_a_status_that_somebody_else_took_is_unknown() -> None:
    process = Process.spawn(["true"])
    os.waitpid(process.pid, 0)
    with anyio.fail_after(10):
        assert await process.wait() == UNKNOWN
    assert str(process.status) == "unknown exit status (somebody else reaped the process)"
    await process.aclose()


async def test_a_program_that_ignores_sigchld_gets_an_unknown_status() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = Process.spawn(SLEEP)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(process.wait)
            await anyio.wait_all_tasks_blocked()
            process.kill()
        assert process.status == UNKNOWN
        await process.aclose()
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_a_child_gone_before_it_could_be_watched_has_an_unknown_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reap_first(pid: int) -> int:
        os.waitpid(pid, 0)
        return os_pidfd_open(pid)

    os_pidfd_open = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", reap_first)
    process = Process.spawn(["true"])
    assert await process.wait() == UNKNOWN
    assert process.start_time is None
    process.kill()
    await process.aclose()


async def test_without_a_pidfd_the_child_is_killed_and_the_error_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pids = []

    def out_of_descriptors(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", out_of_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        Process.spawn(SLEEP)
    assert not Path(f"/proc/{pids[0]}").exists()


async def test_a_signal_to_a_dead_process_does_nothing() -> None:
    process = Process.spawn(["true"])
    await process.wait()
    process.kill()
    assert process.status == ExitStatus(0, None)
    await process.aclose()
    process.send_signal(signal.SIGTERM)
    assert process.status == ExitStatus(0, None)


async def test_a_signal_to_a_dead_unreaped_process_does_nothing() -> None:
    process = Process.spawn(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.kill()
    assert await process.wait() == ExitStatus(0, None)
    await process.aclose()


async def test_pid_and_start_time_name_the_process() -> None:
    process = Process.spawn(["sh", "-c", "exec -a 'odd) name' sleep 600"])
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
    assert process.start_time == int(fields[19])
    await process.aclose()


async def test_what_cannot_run_is_an_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        Process.spawn(["/nonexistent/vmm"])
    with pytest.raises(PermissionError):
        Process.spawn(["/etc/passwd"])


async def test_an_argument_with_a_nul_byte_is_refused() -> None:
    with pytest.raises(IllegalArgumentError, match="correct the arguments"):
        Process.spawn(["true", "a\0b"])


async def test_aclose_kills_and_reaps_even_when_cancelled() -> None:
    process = Process.spawn(SLEEP)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await process.aclose()
    assert process.status == ExitStatus(None, signal.SIGKILL)
    assert not Path(f"/proc/{process.pid}").exists()
    await process.aclose()


async def test_aclose_gives_the_status_to_those_who_wait() -> None:
    process = Process.spawn(SLEEP)
    got = []

    async def wait() -> None:
        got.append(await process.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(process.aclose)
        tasks.start_soon(process.aclose)
    assert got == [ExitStatus(None, signal.SIGKILL)] * 2


async def test_subprocess_never_learns_of_the_child() -> None:
    process = Process.spawn(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    subprocess.run(["true"], check=True)  # reaps whatever subprocess itself has lost sight of
    assert await process.wait() == ExitStatus(0, None)
    await process.aclose()


async def test_a_process_held_by_a_debugger_is_reaped_once_it_is_let_go() -> None:
    process = Process.spawn(SLEEP)
    got = []

    async def wait() -> None:
        got.append(await process.wait())

    async with anyio.create_task_group() as tasks:
        with traced(process):
            process.kill()
            tasks.start_soon(wait)
            with anyio.move_on_after(0.05):
                await anyio.sleep_forever()
            assert not got
    assert got == [ExitStatus(None, signal.SIGKILL)]
    await process.aclose()


async def test_a_process_that_cannot_be_reaped_is_given_up_and_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vmactor.process, "REAP_SECONDS", 0.05)
    process = Process.spawn(SLEEP)
    got = []

    async def wait() -> None:
        got.append(await process.wait())

    with traced(process), capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await process.aclose()
    assert got == [UNKNOWN]
    assert [(entry["log_level"], entry["pid"]) for entry in logs] == [("error", process.pid)]
    os.waitpid(process.pid, 0)


async def test_what_an_ended_process_used_of_processors_is_known() -> None:
    process = Process.spawn([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"])
    status = await process.wait()
    await process.aclose()
    assert status == ExitStatus(0, None)
    assert status.cpu is not None
    assert status.cpu.total_ms >= 150
