"""Real Linux guests under QEMU, end to end: every way in which a VM can live and die."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.guests import (
    SILENT_SCRIPT,
    agent,
    booted,
    create,
    history,
    parting,
    start_silent,
    until,
)
from vmactor import (
    DeathReason,
    Died,
    DiskImage,
    ErrorCode,
    Event,
    IllegalStateError,
    MemoryTrimLevel,
    PayloadError,
    PayloadFinished,
    RawConfig,
    StartFailedError,
    StopLadder,
    StopRung,
    Tombstone,
    TombstoneLimits,
    TombstoneStore,
    VirtualizationService,
    VirtualMachine,
    VirtualMachineState,
    VsockAttribute,
    VsockListener,
    load_config,
)
from vmactor.actors.tombstone_receiver import PORT as TOMBSTONE_PORT

pytestmark = [pytest.mark.anyio, pytest.mark.guest]

CRASH = "signal 11 (SIGSEGV), code 1"

GOOD = ["created", "started", "payload_started", "payload_ready", "payload_finished", "died"]


@pytest.fixture
async def service(short_dir: Path) -> AsyncIterator[VirtualizationService]:
    """A service with a state of its own, in which nothing may be left."""
    kept = TombstoneStore(short_dir / "tombstones", TombstoneLimits(size=len(CRASH)))
    async with VirtualizationService(state_directory=short_dir / "state", tombstones=kept) as service:
        yield service
    assert list((short_dir / "state" / "vm").iterdir()) == []


def ended(events: list[Event]) -> Died:
    """The last event, which must be the only death."""
    deaths = [event for event in events if isinstance(event, Died)]
    assert deaths == events[-1:]
    return deaths[0]


async def _answer_one(listener: VsockListener) -> None:
    async with await listener.accept() as stream:
        assert stream.extra(VsockAttribute.peer_cid) > 2
        line = await BufferedByteReceiveStream(stream).receive_until(b"\n", 100)
        await stream.send(b"heard: " + line + b"\n")


async def test_a_whole_good_life(service: VirtualizationService, guest_dir: Path) -> None:
    async with await create(service, guest_dir, SILENT_SCRIPT) as vm:
        states = [vm.state]
        kinds = ["created"]

        async def follow() -> None:
            kinds.extend([event.kind async for event in vm.events()])

        async with anyio.create_task_group() as tg:
            tg.start_soon(follow)
            await start_silent(vm)
            states.append(vm.state)
            await agent(vm, "started")
            states.append(vm.state)
            await agent(vm, "ready")
            states.append(vm.state)
            assert await agent(vm, "echo hello") == "ok hello"
            async with vm.listen_vsock(7000) as listener, anyio.create_task_group() as dial:
                dial.start_soon(_answer_one, listener)
                assert await agent(vm, "dial 7000 over here") == "ok heard: over here"
            assert (await agent(vm, "ready")).startswith("error")
            await agent(vm, "finished 0")
            states.append(vm.state)
            assert service.list_vms() == [vm.info]
            assert f"VM CID: {vm.cid}\n" in service.dump()
            await parting(vm, "poweroff")
            died = await vm.wait()
        states.append(vm.state)
    assert kinds == GOOD
    assert [state.value for state in states] == [0, 1, 2, 3, 4, 6]
    assert died is not None
    assert (died.reason, died.exit_code, died.generation) == (DeathReason.SHUTDOWN, 0, 1)


ENDINGS = [
    ("started;finished 3;poweroff", ["payload_started", "payload_finished"], DeathReason.SHUTDOWN),
    (
        "started;error 2 it has changed;failure MICRODROID_PAYLOAD_HAS_CHANGED;poweroff",
        ["payload_started", "error"],
        DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED,
    ),
    ("started;ready;panic", ["payload_started", "payload_ready"], DeathReason.CRASH),
    ("started;reboot", ["payload_started"], DeathReason.REBOOT),
    ("started;watchdog;hang", ["payload_started"], DeathReason.WATCHDOG_REBOOT),
    ("poweroff", [], DeathReason.SHUTDOWN),
]


@pytest.mark.parametrize(("script", "told", "reason"), ENDINGS, ids=[script for script, _, _ in ENDINGS])
async def test_how_a_guest_ends_is_told(
    service: VirtualizationService, guest_dir: Path, script: str, told: list[str], reason: DeathReason
) -> None:
    async with await create(service, guest_dir, script) as vm:
        events = await history(vm)
    assert [event.kind for event in events] == ["started", *told, "died"]
    assert ended(events).reason is reason
    for event in events:
        if isinstance(event, PayloadFinished):
            assert event.exit_code == 3
        if isinstance(event, PayloadError):
            assert (event.error_code, event.message) == (ErrorCode.PAYLOAD_CHANGED, "it has changed")
    if reason is DeathReason.CRASH:
        assert "panic" in ended(events).console_tail


async def test_a_payload_that_never_reports_hangs_up(service: VirtualizationService, guest_dir: Path) -> None:
    vm = await create(service, guest_dir, "hang", hangup_detection=True, hangup_timeout=5)
    async with vm:
        events = await history(vm)
    assert [event.kind for event in events] == ["started", "hung_up", "died"]
    assert (ended(events).reason, ended(events).signal) == (DeathReason.HANGUP, signal.SIGKILL)


@pytest.mark.parametrize("how", ["stop", "sigkill", "sigterm", "helper"])
async def test_a_vm_that_is_killed_says_how(
    service: VirtualizationService, guest_dir: Path, how: str
) -> None:
    async with booted(service, guest_dir) as vm:
        stream = await vm.connect_vsock(5000)
        assert vm.info.pid is not None
        match how:
            case "stop":
                await vm.stop()
            case "sigkill":
                os.kill(vm.info.pid, signal.SIGKILL)
            case "sigterm":
                os.kill(vm.info.pid, signal.SIGTERM)
            case "helper":
                os.kill(_child_named("vhost-device-v"), signal.SIGKILL)
        with anyio.fail_after(20):
            died = await vm.wait()
        async with stream:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
        with pytest.raises(IllegalStateError):
            await vm.connect_vsock(5000)
    assert died is not None
    reason = DeathReason.INFRASTRUCTURE_ERROR if how == "helper" else DeathReason.KILLED
    assert died.reason is reason
    if how == "helper":
        assert "helper" in died.detail


async def test_a_guest_is_shut_down_by_its_power_button_unless_it_is_deaf(
    service: VirtualizationService, guest_dir: Path
) -> None:
    deaf_script = "deaf;started;ready;serve"
    async with booted(service, guest_dir) as vm, booted(service, guest_dir, deaf_script) as deaf:
        await vm.suspend()
        ends = {}

        async def shut_down(vm: VirtualMachine, seconds: float) -> None:
            ends[vm.cid] = await vm.shutdown(StopLadder(power_button=seconds))

        async with anyio.create_task_group() as both:
            both.start_soon(shut_down, vm, 60)
            both.start_soon(shut_down, deaf, 2)
        assert ends == {vm.cid: StopRung.POWER_BUTTON, deaf.cid: StopRung.EXIT_REQUEST}
        told = [await vm.wait(), await deaf.wait()]
    assert [died and (died.stopped_by, died.reason, died.exit_code) for died in told] == [
        (StopRung.POWER_BUTTON, DeathReason.SHUTDOWN, 0),
        (StopRung.EXIT_REQUEST, DeathReason.KILLED, 0),
    ]


def _child_named(name: str) -> int:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        text = entry.read_text()
        if f"({name}" in text and text.rsplit(")", 1)[1].split()[1] == str(os.getpid()):
            return int(entry.parent.name)
    raise AssertionError(f"no child {name}")


async def test_four_guests_at_once_each_with_its_own_end(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async def live(vm: VirtualMachine, exit_code: int) -> None:
        async with vm:
            events = await history(vm)
            assert {event.cid for event in events} == {vm.cid}
            assert [e.exit_code for e in events if isinstance(e, PayloadFinished)] == [exit_code]
            assert ended(events).reason is DeathReason.SHUTDOWN

    with service.subscribe() as everything:
        async with anyio.create_task_group() as tg:
            for number in range(4):
                tg.start_soon(
                    live, await create(service, guest_dir, f"started;finished {number};poweroff"), number
                )
        events = []
        while (event := everything.next_nowait()) is not None:
            events.append(event)
    assert len({event.cid for event in events}) == 4
    assert [event.seq for event in events] == list(range(1, len(events) + 1))


async def test_a_vm_can_be_suspended_resumed_and_trimmed(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as vm:
        async with await vm.connect_vsock(5000) as stream:
            await vm.suspend()
            assert vm.info.suspended
            await stream.send(b"echo meanwhile\n")
            with anyio.move_on_after(1) as patience:
                await agent(vm, "echo anyone")
            assert patience.cancelled_caught
            await vm.resume()
            assert await agent(vm, "echo back") == "ok back"
            assert await stream.receive() == b"ok meanwhile\n"
        total, free = await _memory(vm)
        await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)  # takes 30 %
        with anyio.fail_after(30):
            while (await _memory(vm))[1] > free - 0.2 * total:
                await anyio.sleep(0.1)
        await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_MODERATE)  # takes 10 %, so gives back
        with anyio.fail_after(30):
            while (await _memory(vm))[1] < free - 0.15 * total:
                await anyio.sleep(0.1)


async def _memory(vm: VirtualMachine) -> tuple[int, int]:
    """The guest's MemTotal and MemFree, in KiB."""
    answer = await agent(vm, "read /proc/meminfo")
    lines = dict(part.split(":") for part in answer.removeprefix("ok ").split("|") if ":" in part)
    return int(lines["MemTotal"].split()[0]), int(lines["MemFree"].split()[0])


async def test_a_guest_that_writes_for_ever_fills_nothing_and_can_be_stopped(
    service: VirtualizationService, guest_dir: Path, tmp_path: Path
) -> None:
    with (tmp_path / "console").open("wb") as console:
        async with await create(service, guest_dir, "started;spam;serve", console=console.fileno()) as vm:
            with vm.events() as events:
                await vm.start()
                await until(events, "payload_started")
            await anyio.sleep(1)
            await vm.stop()
            died = await vm.wait()
    assert died is not None
    assert died.reason is DeathReason.KILLED
    assert 0 < len(died.console_tail) <= 16 * 1024
    assert (tmp_path / "console").stat().st_size > 16 * 1024


async def test_a_hostile_guest_disturbs_neither_itself_nor_others(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as bad, booted(service, guest_dir) as good:
        garbage = [
            "c1",
            "ff" * 64,
            "dd7fffffff",
            "9400a1",
            "c6ffffffff",
            "0000000000",
            "94000100a0",
            "81" * 200,
        ]
        for piece in garbage:
            assert (await agent(bad, f"raw {piece}")).startswith("ok")
        assert (await agent(bad, "flood 50")).startswith("ok")
        assert await agent(good, "finished 0") == "ok"
        assert good.state is VirtualMachineState.FINISHED
        assert bad.state is VirtualMachineState.READY
        assert await agent(bad, "echo alive") == "ok alive"


async def test_a_read_only_disk_stays_read_only_for_the_guest_and_a_writable_one_is_written(
    service: VirtualizationService, guest_dir: Path, tmp_path: Path
) -> None:
    for name in ("fixed", "free"):
        (tmp_path / name).write_bytes(b"original".ljust(1 << 16, b"."))
    with (
        load_config(guest_dir / "vm.json") as base,
        (tmp_path / "fixed").open("rb") as fixed,
        (tmp_path / "free").open("r+b") as free,
    ):
        config = RawConfig(
            name="disks", kernel=base.kernel, initrd=base.initrd, params=base.params, memory_mib=96,
            disks=[DiskImage(fixed), DiskImage(free, writable=True)],
        )  # fmt: skip
        async with await service.create_vm(config) as vm:
            with vm.events() as events:
                await vm.start()
                await until(events, "payload_ready")
            assert "original" in await agent(vm, "read /dev/vda")
            assert (await agent(vm, "write /dev/vda changed!")).startswith("error")
            assert (await agent(vm, "write /dev/vdb changed!")).startswith("ok")
            await agent(vm, "finished 0")
            await parting(vm, "poweroff")
            await vm.wait()
    assert (tmp_path / "fixed").read_bytes().startswith(b"original")
    assert (tmp_path / "free").read_bytes().startswith(b"changed!")


async def test_a_kernel_that_is_none_fails_the_start_with_its_cause(
    service: VirtualizationService, tmp_path: Path
) -> None:
    (tmp_path / "kernel").write_bytes(b"not a kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        async with await service.create_vm(RawConfig(name="bad", kernel=kernel)) as vm:
            with pytest.raises(StartFailedError, match=r"(?i)kernel|invalid"):
                await vm.start()
            died = await vm.wait()
    assert died is not None
    assert died.reason is DeathReason.START_FAILED


@pytest.mark.parametrize(
    ("protocol", "spoken"), [("messagepack", "MessagePack-RPC"), ("binder", "RPC Binder, version 0x0")]
)
async def test_the_stdlib_guest_file_reports_from_a_real_guest(
    service: VirtualizationService, guest_dir: Path, protocol: str, spoken: str
) -> None:
    async with await create(service, guest_dir, SILENT_SCRIPT, config="python.json") as vm:
        with vm.events() as events:
            await start_silent(vm)
            for step in ("started", "ready", "finished 4"):
                program = f"/usr/bin/python3 -S -E /vmactor_guest.py --protocol {protocol} {step}"
                answer = await agent(vm, f"exec {program}")
                assert answer == "ok 0", answer
            assert vm.guest_calls.protocols == {spoken: 3}
            await agent(
                vm, f"dial {TOMBSTONE_PORT} {CRASH} and more"
            )  # closed without an answer at its limit
            await parting(vm, "poweroff")
            seen = [event async for event in events]
    kinds = [event.kind for event in seen]
    assert kinds == ["started", "payload_started", "payload_ready", "payload_finished", "tombstone", "died"]
    (tombstone,) = (event for event in seen if isinstance(event, Tombstone))
    assert Path(tombstone.path).read_text() == CRASH


async def test_leaving_the_service_kills_every_vm(guest_dir: Path, short_dir: Path) -> None:
    async with VirtualizationService(state_directory=short_dir / "state") as service:
        vms = [await create(service, guest_dir, "serve") for _ in range(2)]
        for vm in vms:
            await vm.start()
    assert [vm.state for vm in vms] == [VirtualMachineState.DEAD] * 2
    assert [vm.info.died.reason for vm in vms if vm.info.died] == [DeathReason.KILLED] * 2
    assert list((short_dir / "state" / "vm").iterdir()) == []
