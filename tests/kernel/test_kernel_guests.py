"""Whole lives of guests under KVM whose vsock is the kernel's."""

import fcntl
import os
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from anyio import EndOfStream
from structlog.testing import capture_logs

from tests.guests import agent, booted, create, history, until
from tests.kernel.guests import ENDINGS, ended
from vmactor import DeathReason, Event, PayloadState, VirtualizationService, VirtualMachineState
from vmactor.actors.place import SET_GUEST_CID
from vmactor.actors.tombstone_receiver import PORT as TOMBSTONE_PORT
from vmactor.cid import FIRST
from vmactor.messages import Tombstone
from vmactor.tombstones import TombstoneLimits, TombstoneStore
from vmactor.vsock import VsockAttribute

pytestmark = [pytest.mark.anyio, pytest.mark.kernel, pytest.mark.timeout(300)]

MIB = 1 << 20
TOMBSTONE_SIZE = 5


@pytest.fixture
async def service(short_dir: Path) -> AsyncIterator[VirtualizationService]:
    """A service with QEMU, which everybody has."""
    kept = TombstoneStore(short_dir / "tombstones", TombstoneLimits(size=TOMBSTONE_SIZE))
    async with VirtualizationService(
        state_directory=short_dir / "state", vmm="qemu", tombstones=kept
    ) as service:
        yield service


async def test_with_kvm_and_vhost_vsock_there_auto_chooses_both(short_dir: Path) -> None:
    async with VirtualizationService(state_directory=short_dir) as service:
        assert service.selection.driver.name == ("crosvm" if "VMACTOR_CROSVM" in os.environ else "qemu")
        assert service.selection.vsock == "kernel"
        assert service._facts is not None
        assert service._facts.kvm.usable


async def test_a_guest_under_kvm_reports_from_its_own_cid_and_uses_the_processor_as_a_guest(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as vm:
        assert vm.state is VirtualMachineState.READY
        assert await agent(vm, "cid") == f"ok {vm.cid}"
        pid = vm.info.pid
        assert pid is not None
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        assert "kvm" in arguments
        assert any(word.startswith(f"vhost-vsock-pci,guest-cid={vm.cid},vhostfd=") for word in arguments)
        # Field 43: only KVM accounts for a guest's time.
        assert int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[40]) > 0
        directory = Path(vm.info.directory)
        for place in (directory, directory.parent, directory.parent.parent):
            assert place.stat().st_mode & 0o077 == 0, "others could get at its sockets"


@pytest.mark.kernel("asyncio")
@pytest.mark.parametrize(("script", "told", "reason"), ENDINGS, ids=[script for script, _, _ in ENDINGS])
async def test_how_a_guest_under_kvm_ends_is_told(
    service: VirtualizationService, guest_dir: Path, script: str, told: list[str], reason: DeathReason
) -> None:
    async with await create(service, guest_dir, script) as vm:
        events = await history(vm)
    assert [event.kind for event in events] == ["started", *told, "died"]
    assert ended(events).reason is reason


@pytest.mark.kernel("trio")
async def test_a_guest_under_kvm_that_hangs_or_is_killed_ends_with_the_right_reason(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async def hang() -> list[Event]:
        async with await create(service, guest_dir, "hang", hangup_detection=True, hangup_timeout=15) as vm:
            return await history(vm)

    events = await hang()
    assert (ended(events).reason, ended(events).signal) == (DeathReason.HANGUP, signal.SIGKILL)
    async with booted(service, guest_dir) as vm:
        assert vm.info.pid is not None
        os.kill(vm.info.pid, signal.SIGKILL)
        died = await vm.wait()
    assert died is not None
    assert (died.reason, died.signal) == (DeathReason.KILLED, signal.SIGKILL)


async def test_streams_to_a_guest_carry_megabytes_both_ways_and_close_one_way_at_a_time(
    service: VirtualizationService, guest_dir: Path
) -> None:
    data = os.urandom(2 * MIB)
    async with booted(service, guest_dir) as vm, await vm.connect_vsock(5000) as stream:
        assert stream.extra(VsockAttribute.peer_cid) == vm.cid
        await stream.send(b"stream\n")
        got = bytearray(await stream.receive())
        assert got.startswith(b"ok\n")
        del got[:3]

        async def send() -> None:
            await stream.send(data)
            await stream.send_eof()

        with anyio.fail_after(120):
            async with anyio.create_task_group() as group:
                group.start_soon(send)
                while True:
                    try:
                        got += await stream.receive()
                    except EndOfStream:
                        break
    assert bytes(got) == data


@pytest.mark.kernel("trio")
async def test_a_guest_that_dials_another_vms_server_is_refused_and_changes_nothing(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as victim, booted(service, guest_dir) as intruder:
        with victim.events() as events, capture_logs() as logged:
            # A well-formed report that would be accepted from the victim itself.
            finished = bytes([0x94, 0, 1, 0xB5]) + b"notifyPayloadFinished" + bytes([0x91, 0])
            answer = await agent(intruder, f"dial {victim.cid} {finished.hex()}")
            assert answer.startswith("error"), "the connection was answered"
            assert f"CID is {intruder.cid}, which is not expected" in str(logged)
            assert victim.info.payload is PayloadState.READY
            assert victim.state is VirtualMachineState.READY
        assert [event async for event in events] == []
        assert await agent(victim, "echo undisturbed") == "ok undisturbed"


@pytest.mark.kernel("trio")
async def test_tombstones_of_two_guests_at_one_port_are_told_apart_by_their_cids(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as one, booted(service, guest_dir) as other:
        for vm, words in ((one, "first"), (other, "other")):
            with vm.events() as events:
                await agent(vm, f"dial {TOMBSTONE_PORT} {words} and more")  # closed at the limit
                told = await until(events, "tombstone")
            assert isinstance(told, Tombstone)
            assert told.cid == vm.cid
            assert Path(told.path).read_text() == words


@pytest.mark.kernel("trio")
async def test_a_cid_that_somebody_else_has_claimed_is_passed_over(
    service: VirtualizationService, guest_dir: Path
) -> None:
    """Claimed on an open device, before any VMM exists: so it cannot come out late, as a guest that fails."""
    device = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, SET_GUEST_CID, struct.pack("=Q", FIRST))
        async with booted(service, guest_dir) as vm:
            assert vm.cid == FIRST + 1
            with pytest.raises(OSError, match="Address already in use"):
                fcntl.ioctl(device, SET_GUEST_CID, struct.pack("=Q", vm.cid))
    finally:
        os.close(device)


@pytest.mark.kernel("asyncio")
async def test_dialling_a_guest_that_boots_can_be_given_up_and_harms_nothing(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with await create(service, guest_dir, "started;ready;serve") as vm:
        with vm.events() as events:
            await vm.start()
            with anyio.move_on_after(0.3) as patience:
                await vm.connect_vsock(5000)
            assert patience.cancelled_caught
            with anyio.fail_after(60):
                async for event in events:
                    if event.kind == "payload_ready":
                        break
        assert await agent(vm, "echo well") == "ok well"
