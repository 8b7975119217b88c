"""The crosvm driver against a stand-in that is spawned in crosvm's place (``crosvm_standin.py``)."""

import json
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.host_facts import HEAD_OPTIONS, MISSING, OPTIONS_2023_02, crosvm, facts
from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.errors import (
    DeadlineExceededError,
    IllegalArgumentError,
    ResourceExhaustedError,
    StartFailedError,
    UnsupportedOperationError,
    VmmError,
)
from vmactor.host import Crosvm, look, probe
from vmactor.messages import BalloonStats, DeathReason, Died
from vmactor.process import UNKNOWN, ExitStatus
from vmactor.vmm import crosvm_vmm
from vmactor.vmm.crosvm import CrosvmDriver
from vmactor.vmm.crosvm_control import MAX_REPLY, CrosvmControl, CrosvmError
from vmactor.vmm.crosvm_vmm import CrosvmVmm, death_reason
from vmactor.vmm.driver import Channels, Launch, VhostUserVsock
from vmactor.vmm.select import select

MIB = 1 << 20
STANDIN = Path(__file__).with_name("crosvm_standin.py")
OPTIONS = {2023: OPTIONS_2023_02, 2026: HEAD_OPTIONS}


def standin(directory: Path, age: int = 2026) -> Crosvm:
    """The stand-in as an executable, and what its help says."""
    path = directory / f"crosvm-{age}"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I {STANDIN} {age} "$@"\n')
    path.chmod(0o755)
    return Crosvm(True, "a stand-in", "", path, "0.1.0", OPTIONS[age])


@pytest.mark.parametrize("age", [2023, 2026])
def test_the_stand_in_lists_the_options_that_builds_of_its_age_have(short_dir: Path, age: int) -> None:
    build = standin(short_dir, age)
    found = look(environ={"PATH": os.environ["PATH"], "VMACTOR_CROSVM": str(build.path)}, timeout=30).crosvm
    assert found.usable
    assert found.version == "0.1.0"
    assert found.options >= OPTIONS[age]
    assert found.options - OPTIONS[age] <= {"no-rng", "vhost-vsock-device"}
    assert "create_composite" not in found.commands


# -- How it ended ------------------------------------------------------------------------------------

REASONS = {
    0: "SHUTDOWN",
    1: "START_FAILED",
    32: "REBOOT",
    33: "CRASH",
    34: "CRASH",
    35: "START_FAILED",
    36: "WATCHDOG_REBOOT",
}


def test_the_death_reason_by_exit_code() -> None:
    for code in range(256):
        assert death_reason(ExitStatus(code, None)).name == REASONS.get(code, "UNKNOWN")


def test_any_signal_is_a_kill_and_an_unknown_status_our_infrastructure_s_error() -> None:
    for number in (1, 2, 6, 9, 11, 15, 34, 64):
        assert death_reason(ExitStatus(None, number)) is DeathReason.KILLED
    assert death_reason(UNKNOWN) is DeathReason.INFRASTRUCTURE_ERROR


# -- What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"crosvm": Crosvm(False, "no crosvm", "build it")}, {}, "cannot run guests: no crosvm: build it"),
        ({"kvm": MISSING}, {}, "crosvm cannot run guests: none here: get one"),
        ({}, {"protected_vm": True}, "protected_vm: only aarch64 hosts .* this is x86_64; set it to false"),
        ({}, {"task_profiles": ["a"]}, "task_profiles: they exist on Android only; remove them"),
        ({}, {"disks": [DiskImage(partitions=[Partition("a", 1)])]}, "without the feature composite-disk"),
        ({}, {"disks": [DiskImage(1, format="qcow2")]}, r"cannot read QCOW2 images \(it was built without"),
        (
            {"crosvm": crosvm(HEAD_OPTIONS, "create_composite")},
            {"disks": [DiskImage(partitions=[Partition("a", 1, format="qcow2")])]},
            "without the feature qcow",
        ),
        ({}, {"params": "a=\u00e9"}, "params: crosvm takes printable ASCII only"),
        ({}, {"params": "a\tb"}, "params: crosvm takes printable ASCII only"),
        ({}, {"params": "x" * 2022}, "at most 2021 bytes are left, and they have 2022"),
    ],
)
def test_what_crosvm_cannot_do_is_refused_with_what_to_do(
    changes: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        CrosvmDriver(facts(**changes)).validate(RawConfig(name="vm", kernel=3, **config))


def test_a_plain_configuration_and_a_protected_one_on_aarch64_are_accepted() -> None:
    plain = RawConfig(name="vm", kernel=3, params="x" * 2021, disks=[DiskImage(3, writable=True)])
    CrosvmDriver(facts()).validate(plain)
    partitioned = [DiskImage(partitions=[Partition("a", 1, format="qcow2")])]
    able = crosvm(HEAD_OPTIONS, "create_composite", "create_qcow2")
    CrosvmDriver(facts(crosvm=able)).validate(replace(plain, disks=tuple(partitioned)))
    CrosvmDriver(facts(arch="aarch64")).validate(replace(plain, protected_vm=True))


# -- A process ---------------------------------------------------------------------------------------


def open_now(process: int | str = "self") -> set[int]:
    return {int(entry.name) for entry in Path(f"/proc/{process}/fd").iterdir()}


class Place:
    """Everything that a launch needs, and a stand-in to launch."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory, self._stack = directory, stack
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        pair = socket.socketpair()
        self.vsock, self.backend = (stack.enter_context(end) for end in pair)
        self.failure, write = os.pipe()
        stack.callback(os.close, self.failure)
        stack.callback(os.close, write)
        self.channels = Channels(null, write, None, None, null)
        self.record = directory / "record"

    def driver(self, age: int = 2026) -> CrosvmDriver:
        return CrosvmDriver(facts(crosvm=standin(self.directory, age)))

    def launch(self, plan: dict[str, Any], **config: Any) -> Launch:
        path = self.directory / "kernel"
        path.write_text(json.dumps({"record": str(self.record)} | plan))
        kernel = self._stack.enter_context(path.open("r+b"))
        raw = RawConfig(name="vm", kernel=kernel, **config)
        return Launch("vm", 2048, raw, VhostUserVsock(self.vsock.fileno()), self.channels, self.directory)

    def requests(self) -> list[str]:
        """Every packet that the stand-in got."""
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def place(short_dir: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(short_dir, stack)


@asynccontextmanager
async def spawned(place: Place, started: bool = True, **plan: Any) -> AsyncIterator[CrosvmVmm]:
    """A stand-in that runs; nothing of it may be left afterwards."""
    vmm = await place.driver().spawn(place.launch(plan))
    try:
        if started:
            await vmm.wait_running()
        yield vmm
    finally:
        await vmm.aclose()
    assert not (place.directory / "control").exists()


pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("code", [0, 1, 32, 33, 34, 35, 36, 99])
async def test_how_it_ended_is_its_exit_code(place: Place, code: int) -> None:
    async with spawned(place, started=False, exit=code) as vmm:
        ended = await vmm.wait()
        with pytest.raises(VmmError, match=f"crosvm ended before it ran the guest: exit code {code}"):
            await vmm.wait_running()
    assert ended.status == ExitStatus(code, None)
    assert ended.reason.name == REASONS.get(code, "UNKNOWN")
    assert ended.detail.startswith(f"the VMM ended with exit code {code}")
    assert ("; " in ended.detail) is (code not in {0, 99})


@pytest.mark.parametrize("number", [6, 9, 11, 15])
async def test_a_signal_is_a_kill(place: Place, number: int) -> None:
    async with spawned(place, started=False, signal=number) as vmm:
        ended = await vmm.wait()
    assert ended.status == ExitStatus(None, number)
    assert ended.reason is DeathReason.KILLED


async def test_it_runs_when_it_has_answered_and_is_asked_only_once(place: Place) -> None:
    async with spawned(place, started=False, before=0.05) as vmm:
        assert "starting" in repr(vmm)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(vmm.wait_running)
        await vmm.wait_running()
        assert "running" in repr(vmm)
        vmm.kill()
        assert (await vmm.wait()).reason is DeathReason.KILLED
        assert (await vmm.wait()).detail == "the VMM ended with signal 9 (SIGKILL)"
    assert place.requests() == ['"ResumeVcpus"']


async def test_one_that_refuses_to_run_is_killed_and_a_failed_start(place: Place) -> None:
    async with spawned(place, started=False, replies={"ResumeVcpus": '{"Err":22}'}) as vmm:
        with pytest.raises(CrosvmError, match="crosvm refused ResumeVcpus: Invalid argument"):
            await vmm.wait_running()
        ended = await vmm.wait()
        assert ended.reason is DeathReason.START_FAILED
        assert ended.detail == "crosvm refused ResumeVcpus: Invalid argument"


async def test_one_that_hangs_up_and_lives_on_is_killed_and_a_failed_start(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crosvm_vmm, "LAST_WORDS_TIMEOUT", 0.05)
    async with spawned(place, started=False, close=["ResumeVcpus"]) as vmm:
        with pytest.raises(VmmError, match="closed its control socket"):
            await vmm.wait_running()
        assert (await vmm.wait()).reason is DeathReason.START_FAILED


async def test_one_that_never_answers_is_given_up_after_its_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crosvm_vmm, "START_TIMEOUT", 0.05)
    async with spawned(place, started=False, before="never") as vmm:
        with pytest.raises(DeadlineExceededError, match="did not answer ResumeVcpus within"):
            await vmm.wait_running()


async def test_every_request_is_made_in_crosvm_s_words(place: Place) -> None:
    async with spawned(place) as vmm:
        await vmm.suspend()
        await vmm.resume()
        await vmm.request_shutdown()
        await vmm.set_balloon(64 * MIB + 1)
        stats = await vmm.balloon_stats()
        await vmm.set_balloon(1 << 40)
        await vmm.request_exit()
        assert (await vmm.wait()).reason is DeathReason.KILLED
    adjust = '{"BalloonCommand":{"Adjust":{"num_bytes":%d,"wait_for_success":false}}}'
    assert place.requests() == [
        '"ResumeVcpus"',
        '"SuspendVcpus"',
        '"ResumeVcpus"',
        '"Powerbtn"',
        adjust % (64 * MIB + 1),
        '{"BalloonCommand":"Stats"}',
        adjust % (240 * MIB),
        '"Exit"',
    ]
    assert stats == BalloonStats(64 * MIB, 240 * MIB, 100 * MIB, 150 * MIB)


async def test_a_build_of_2023_is_asked_in_the_words_of_its_day(place: Place) -> None:
    # It can have no helper's vsock, so its command line is given without.
    launch = place.launch({})
    build = standin(place.directory, 2023)
    with pytest.raises(UnsupportedOperationError, match="cannot take a connected vhost-user vsock"):
        await CrosvmDriver(facts(crosvm=build)).spawn(launch)
    assert not (place.directory / "control").exists()
    async with spawned_old(place) as vmm:
        await vmm.wait_running()
        await vmm.suspend()
        await vmm.resume()
        await vmm.set_balloon(MIB)
        assert (await vmm.balloon_stats()) == BalloonStats(MIB, 240 * MIB, 100 * MIB, 150 * MIB)
    assert place.requests()[:3] == ['"Resume"', '"Suspend"', '"Resume"']


@asynccontextmanager
async def spawned_old(place: Place) -> AsyncIterator[CrosvmVmm]:
    from vmactor.vmm.driver import KernelVsock

    launch = replace(place.launch({}), vsock=KernelVsock(place.vsock.fileno()))
    vmm = await place.driver(2023).spawn(launch)
    try:
        yield vmm
    finally:
        await vmm.aclose()


@pytest.mark.parametrize("number", [95, 107, 11])
async def test_no_balloon_and_no_driver_for_it_are_no_figures(place: Place, number: int) -> None:
    async with spawned(place, replies={"Stats": json.dumps({"Err": number})}) as vmm:
        assert await vmm.balloon_stats() is None


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ('{"Err":5}', "crosvm refused BalloonCommand: Input/output error"),
        ('{"ErrString":"\\u001b[31m no"}', r"crosvm refused BalloonCommand: \\x1b\\\[31m no"),
        ('"Ok"', "is none that is known"),
        ('{"BalloonStats":[]}', "is none that is known"),
        ('{"BalloonStats":{"stats":{}}}', "have no size of the balloon"),
        ('{"BalloonStats":{"stats":1,"balloon_actual":1}}', "have no size of the balloon"),
        ("not JSON", "is none that is known"),
        ('"Ok"\0', "is none that is known"),
        ("\u00ff", "is none that is known"),
        ("9" * 5000, "is none that is known"),
        ("[" * 60000, "is none that is known"),
        ("x" * (MAX_REPLY + 1), f"with more than {MAX_REPLY} bytes"),
    ],
)
async def test_a_reply_that_is_none_is_an_error_and_the_vm_lives_on(
    place: Place, reply: str, message: str
) -> None:
    async with spawned(place, replies={"Stats": reply, "Powerbtn": reply.replace('"Ok"', '"Known"')}) as vmm:
        with pytest.raises(VmmError, match=message):
            await vmm.balloon_stats()
        if "size of the balloon" not in message:
            with pytest.raises(VmmError, match=message.replace("BalloonCommand", "Powerbtn")):
                await vmm.request_shutdown()
        await vmm.suspend()


async def test_figures_that_cannot_be_right_are_left_out(place: Place) -> None:
    figures = {"total_memory": -1, "free_memory": True, "available_memory": None}
    reply = json.dumps({"BalloonStats": {"stats": figures, "balloon_actual": 0}})
    async with spawned(place, replies={"Stats": reply}) as vmm:
        assert await vmm.balloon_stats() == BalloonStats(0)


async def test_a_negative_balloon_is_the_caller_s_mistake(place: Place) -> None:
    async with spawned(place) as vmm:
        with pytest.raises(IllegalArgumentError):
            await vmm.set_balloon(-1)


async def test_a_silent_guest_has_one_request_at_most_and_delays_no_other(place: Place) -> None:
    async with spawned(place, replies={"Stats": None, "SuspendVcpus": None}) as vmm:
        control = vmm._control
        for _ in range(3):
            with pytest.raises(DeadlineExceededError, match="did not answer BalloonCommand within"):
                await control.ask({"BalloonCommand": "Stats"}, "BalloonStats", timeout=0.05)
            await vmm.resume()
        with pytest.raises(DeadlineExceededError, match="did not answer SuspendVcpus within"):
            await control.command("SuspendVcpus", timeout=0.05)
        await vmm.request_exit()
    assert place.requests().count('{"BalloonCommand":"Stats"}') == 1


async def test_a_dead_crosvm_refuses_requests_at_once(place: Place) -> None:
    async with spawned(place) as vmm:
        vmm.kill()
        await vmm.wait()
        with pytest.raises(VmmError, match="no connection to crosvm's control socket: Connection refused"):
            await vmm.suspend()
    with pytest.raises(VmmError, match="no connection to crosvm's control socket: No such file"):
        await vmm.suspend()


async def test_one_killed_with_a_request_waiting_fails_it(place: Place) -> None:
    async with spawned(place, replies={"Stats": None}) as vmm, anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(VmmError, match="closed its control socket"):
                await vmm.balloon_stats()

        tasks.start_soon(ask)
        while '{"BalloonCommand":"Stats"}' not in place.requests():
            await anyio.sleep(0.001)
        vmm.kill()


# -- The control socket's client alone -----------------------------------------------------------------


@asynccontextmanager
async def server(directory: Path, backlog: int = 8) -> AsyncIterator[tuple[CrosvmControl, socket.socket]]:
    """A client and the listener that it connects to, which the test serves."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.setblocking(False)
        listener.bind(str(directory / "c"))
        listener.listen(backlog)
        control = CrosvmControl(directory / "c")
        yield control, listener
        control.close()
        control.close()


async def test_a_late_answer_is_dropped_and_the_next_is_asked_for_anew(short_dir: Path) -> None:
    async with server(short_dir) as (control, listener):
        with pytest.raises(DeadlineExceededError):
            await control.ask({"A": 1}, "B", timeout=0.02)
        await anyio.wait_readable(listener)
        first = listener.accept()[0]
        with first:
            first.send(b'{"B":{"late":1}}')
            assert first.recv(100) == b'{"A":1}'
        async with anyio.create_task_group() as tasks:

            async def answer() -> None:
                await anyio.wait_readable(listener)
                with listener.accept()[0] as second:
                    assert second.recv(100) == b'{"A":1}'
                    second.send(b'{"B":{"fresh":1}}')

            tasks.start_soon(answer)
            assert await control.ask({"A": 1}, "B") == {"fresh": 1}


async def test_a_queue_full_of_connections_is_told_as_a_stuck_crosvm(short_dir: Path) -> None:
    async with server(short_dir, backlog=0) as (control, _):
        with pytest.raises(DeadlineExceededError):
            await control.command("A", timeout=0.02)
        with pytest.raises(VmmError, match="queue full of connections; it is stuck: stop the VM"):
            await control.command("A", timeout=0.02)


async def test_no_descriptor_left_for_a_connection_is_told_as_such(short_dir: Path) -> None:
    async with server(short_dir) as (control, _):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        try:
            with pytest.raises(ResourceExhaustedError, match="Too many open files; raise 'ulimit -n'"):
                await control.command("A")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_closing_ends_what_waits(short_dir: Path) -> None:
    async with server(short_dir) as (control, listener), anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(VmmError, match="the connection to crosvm's control socket is closed"):
                await control.ask({"A": 1}, "B")

        tasks.start_soon(ask)
        await anyio.wait_readable(listener)
        await anyio.wait_all_tasks_blocked()
        control.close()


async def test_descriptors_that_come_with_an_answer_are_not_kept(short_dir: Path) -> None:
    async with server(short_dir) as (control, listener), anyio.create_task_group() as tasks:

        async def answer() -> None:
            await anyio.wait_readable(listener)
            with listener.accept()[0] as connection, Path(os.devnull).open() as null:
                assert connection.recv(100) == b'"A"'
                socket.send_fds(connection, [b'"Ok"'], [null.fileno()] * 100)

        tasks.start_soon(answer)
        before = open_now()
        await control.command("A")
        assert len(open_now() - before) <= 1  # the listing's own


# -- Starting ------------------------------------------------------------------------------------------


async def test_it_has_a_session_of_its_own_and_the_named_descriptors_only(place: Place) -> None:
    launch = place.launch({}, initrd=place.channels.failure)
    launch = replace(launch, config=replace(launch.config, initrd=None))
    assert launch.config.kernel is not None
    os.lseek(launch.config.kernel, 5, os.SEEK_SET)
    vmm = await place.driver().spawn(launch)
    try:
        await vmm.wait_running()
        assert os.getsid(vmm.pid) == os.getpgid(vmm.pid) == vmm.pid
        proc = Path(f"/proc/{vmm.pid}")
        words = (proc / "cmdline").read_bytes().decode().split("\0")
        named = {int(word.rpartition("/")[2]) for word in words if word.startswith("/proc/self/fd/")}
        assert len(named) == 2  # kernel and control socket
        kernel = next(word for word in words if word.startswith("/proc/self/fd/"))
        info = (proc / "fdinfo" / kernel.rpartition("/")[2]).read_text()
        assert info.startswith("pos:\t0\n")  # an offset of its own
        assert int(info.split()[3], 8) & os.O_ACCMODE == os.O_RDONLY
        assert os.lseek(launch.config.kernel, 0, os.SEEK_CUR) == 5
        inherited = open_now(vmm.pid) - {0, 1, 2}
        other = {launch.vsock.fd, launch.channels.console, launch.channels.failure}
        assert named | other <= inherited
        assert len(inherited - named - other) <= 2  # the stand-in's own connections
    finally:
        await vmm.aclose()


async def test_a_read_only_disk_gets_a_read_only_descriptor(place: Place, short_dir: Path) -> None:
    (short_dir / "disk").write_bytes(b"\0" * 512)
    with (short_dir / "disk").open("r+b") as disk:
        launch = place.launch({}, disks=[DiskImage(disk), DiskImage(disk, writable=True)])
        vmm = await place.driver().spawn(launch)
        try:
            await vmm.wait_running()
            proc = Path(f"/proc/{vmm.pid}")
            words = (proc / "cmdline").read_bytes().decode().split("\0")
            modes = {}
            for word in words:
                if word.startswith("path=/proc/self/fd/"):
                    fd = word.split(",")[0].rpartition("/")[2]
                    flags = int((proc / "fdinfo" / fd).read_text().split()[3], 8)
                    modes["ro=true" in word] = flags & os.O_ACCMODE
            assert modes == {True: os.O_RDONLY, False: os.O_RDWR}
        finally:
            await vmm.aclose()


async def test_an_executable_that_is_gone_is_a_failed_start_that_leaves_nothing(place: Place) -> None:
    gone = Crosvm(True, "gone", "", Path("/nowhere/crosvm"), "0.1.0", HEAD_OPTIONS)
    with pytest.raises(StartFailedError, match=r"cannot start crosvm: .*No such file"):
        await CrosvmDriver(facts(crosvm=gone)).spawn(place.launch({}))
    assert not (place.directory / "control").exists()


async def test_a_long_path_is_refused_before_anything_is_made(place: Place) -> None:
    far = replace(place.launch({}), directory=place.directory / ("x" * 120))
    with pytest.raises(StartFailedError, match="use a shorter state directory"):
        await place.driver().spawn(far)


async def test_a_control_socket_in_the_way_is_a_failed_start_and_is_left_alone(place: Place) -> None:
    (place.directory / "control").mkdir()
    with pytest.raises(StartFailedError, match=r"cannot start crosvm: .*Address already in use"):
        await place.driver().spawn(place.launch({}))
    assert (place.directory / "control").is_dir()


# -- The whole service ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ({"exit": 32}, DeathReason.REBOOT),
        ({"exit": 33, "write": {"serial-2": "HANGUP|late"}}, DeathReason.HANGUP),
        (
            {"exit": 0, "write": {"serial-2": "MICRODROID_PAYLOAD_HAS_CHANGED"}},
            DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED,
        ),
        ({"exit": 34, "write": {"serial-2": "no reason", "virtio-console-1": "bye"}}, DeathReason.CRASH),
    ],
)
async def test_a_vm_under_the_stand_in_lives_and_dies_as_told(
    short_dir: Path, plan: dict[str, Any], reason: DeathReason
) -> None:
    from vmactor import VirtualizationService

    here = replace(probe(), crosvm=standin(short_dir), kvm=facts().kvm)
    kernel = short_dir / "kernel"
    kernel.write_text(json.dumps(plan))
    with kernel.open("rb") as file:
        async with VirtualizationService(
            vmm=select("crosvm", here), state_directory=short_dir / "state", facts=here
        ) as service:
            vm = await service.create_vm(RawConfig(name="vm", kernel=file))
            async with vm:
                assert vm.info.driver == "crosvm"
                with vm.events() as events:
                    with anyio.fail_after(60), pytest.raises(StartFailedError):
                        await vm.start()  # it ended before it ran
                    died = [event async for event in events][-1]
    assert isinstance(died, Died)
    assert died.reason is reason
    assert died.exit_code == plan["exit"]
    assert died.failure == plan.get("write", {}).get("serial-2", "")
    assert died.console_tail == plan.get("write", {}).get("virtio-console-1", "")


async def test_a_vm_under_the_stand_in_runs_is_suspended_trimmed_and_stopped(short_dir: Path) -> None:
    from vmactor import MemoryTrimLevel, VirtualizationService

    here = replace(probe(), crosvm=standin(short_dir), kvm=facts().kvm)
    kernel = short_dir / "kernel"
    kernel.write_text(json.dumps({"record": str(short_dir / "record")}))
    with kernel.open("rb") as file:
        async with (
            VirtualizationService(
                vmm=select("crosvm", here), state_directory=short_dir / "state", facts=here
            ) as service,
            await service.create_vm(RawConfig(name="vm", kernel=file)) as vm,
        ):
            await vm.start()
            await vm.suspend()
            await vm.resume()
            await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_CRITICAL)
            await vm.stop()
            died = await vm.wait()
    assert died is not None
    assert (died.reason, died.signal) == (DeathReason.KILLED, 9)
    assert '"num_bytes":125829120' in (short_dir / "record").read_text()  # half of what the guest has
