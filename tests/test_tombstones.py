"""Guests' tombstones: kept as bounded files, told as events, and no way to harm the host or other VMs."""

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from tests.guest_rpc_peer import UnixListener
from tests.scripted_vmm import ScriptedDriver
from tests.test_service import _helper, config, left_in, service_in, started
from tests.test_vsock import FakeVsock, fake_vsock
from vmactor.actors.tombstone_receiver import PORT, WAITING, SharedPort, TombstoneReceiver
from vmactor.config import RawConfig
from vmactor.errors import IllegalArgumentError, SecurityError
from vmactor.messages import Tombstone
from vmactor.tombstones import TombstoneLimits, TombstoneStore
from vmactor.vsock import listen_on_kernel

pytestmark = pytest.mark.anyio
__all__ = ["_helper", "config", "fake_vsock"]  # fixtures

CID = 2051
TEXT = b"*** *** ***\npid: 1, tid: 1, name: payload\nsignal 11 (SIGSEGV)\n"


class Guest:
    """A VM's receiver on a unix socket, and its guest."""

    def __init__(self, directory: Path, limits: TombstoneLimits | None = None) -> None:
        self.kept = directory / "kept"
        self.store = TombstoneStore(self.kept, limits)
        self.socket = directory / "s"
        self.receiver = TombstoneReceiver(self.store, lambda: UnixListener(self.socket), "web", CID)
        self.told: list[Tombstone] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve one run."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(
                lambda task_status: self.receiver.serve(self.told.append, task_status=task_status)
            )
            yield
            tasks.cancel_scope.cancel()
        self.socket.unlink()

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.socket))
        return sock

    def send(self, data: bytes) -> None:
        """A whole tombstone, as a good guest sends it."""
        with closing(self.dial()) as sock:
            sock.sendall(data)

    async def until(self, count: int) -> None:
        """Wait until this many were told."""
        await until(lambda: len(self.told) >= count)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.kept.iterdir()}


async def until(true: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not true():
            await anyio.sleep(0.002)


async def test_a_tombstone_becomes_a_private_file_and_an_event(short_dir: Path) -> None:
    guest = Guest(short_dir)
    async with guest.running():
        guest.send(TEXT)
        guest.send(TEXT * 1000)
        await guest.until(2)
    first, second = guest.told
    assert (first.size, first.truncated) == (len(TEXT), False)
    assert (second.size, second.truncated) == (1000 * len(TEXT), False)
    assert Path(first.path).read_bytes() == TEXT
    assert sorted(guest.files()) == [Path(first.path).name, Path(second.path).name]
    assert f"-web-{CID}" in first.path
    assert Path(first.path).stat().st_mode & 0o777 == 0o600
    assert guest.kept.stat().st_mode & 0o777 == 0o700


async def test_what_never_ends_is_cut_and_what_says_nothing_is_not_kept(short_dir: Path) -> None:
    guest = Guest(short_dir, TombstoneLimits(size=100_000))
    async with guest.running():
        guest.dial().close()
        with closing(guest.dial()) as endless:
            endless.settimeout(20)

            def flood() -> None:
                while True:
                    endless.sendall(bytes(10_000))

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                await anyio.to_thread.run_sync(flood)
        await guest.until(1)
        guest.send(bytes(100_000))
        await guest.until(2)
    assert [(told.size, told.truncated) for told in guest.told] == [(100_000, True), (100_000, False)]
    assert len(guest.files()) == 2


async def test_a_slow_writer_ends_at_the_deadline_and_what_came_is_kept(short_dir: Path) -> None:
    guest = Guest(short_dir, TombstoneLimits(seconds=0.1))
    async with guest.running():
        with closing(guest.dial()) as slow:
            slow.sendall(b"half")
            await guest.until(1)
    assert [(told.size, told.truncated) for told in guest.told] == [(4, True)]


async def test_what_came_is_kept_when_the_run_ends(short_dir: Path) -> None:
    guest = Guest(short_dir)
    async with guest.running():
        crashing = guest.dial()
        crashing.sendall(TEXT)
        await until(lambda: any(name.endswith(".part") for name in guest.files()))
        await until(lambda: TEXT in guest.files().values())
    crashing.close()
    assert [(told.size, told.truncated) for told in guest.told] == [(len(TEXT), True)]
    assert list(guest.files().values()) == [TEXT]


async def test_a_vm_has_so_many_over_all_its_runs_and_the_first_are_kept(short_dir: Path) -> None:
    guest = Guest(short_dir, TombstoneLimits(per_vm=3))
    with capture_logs() as logs:
        for run in range(2):
            async with guest.running():
                for number in range(2):
                    guest.send(b"%d" % (2 * run + number))
                await guest.until(2 + run)
                with closing(guest.dial()) as more:
                    more.settimeout(20)
                    if run:
                        assert await anyio.to_thread.run_sync(more.recv, 1) == b"", "it is closed, not read"
    assert sorted(guest.files().values()) == [b"0", b"1", b"2"]
    assert [entry["event"] for entry in logs] == ["a guest sends too many tombstones"]


def test_the_directory_holds_so_many_and_the_oldest_go(short_dir: Path) -> None:
    store = TombstoneStore(short_dir / "kept", TombstoneLimits(kept=3))
    (store.directory / "notes.txt").write_text("of somebody else")
    stale = store.directory / "tombstone-20200101T000000.000000Z-old-2048.part"
    fresh = store.directory / "tombstone-20200101T000000.000001Z-other-2049.part"
    for part in stale, fresh:
        part.write_bytes(b"unfinished")
    os.utime(stale, (1, 1))
    for number in range(5):
        file = store.begin("vm", 2048 + number)
        assert file.write(b"%d" % number)
        assert file.finish()
    contents = sorted(path.read_bytes() for path in store.directory.glob("*-vm-*"))
    assert contents == [b"2", b"3", b"4"]
    assert (stale.exists(), fresh.exists()) == (False, True)
    assert (store.directory / "notes.txt").exists()


async def test_without_space_nothing_is_kept_and_later_ones_are(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    guest = Guest(short_dir)
    async with guest.running():
        with monkeypatch.context() as patched, capture_logs() as logs:
            patched.setattr("vmactor.tombstones.os.write", full)
            guest.send(TEXT)
            await until(lambda: logs)
            assert guest.files() == {}
        guest.send(TEXT)
        await guest.until(1)
    assert [entry["event"] for entry in logs] == ["cannot keep a guest's tombstone"]
    assert list(guest.files().values()) == [TEXT]


def test_a_directory_of_others_is_refused(short_dir: Path) -> None:
    (short_dir / "open").mkdir(mode=0o755)
    (short_dir / "link").symlink_to(short_dir / "elsewhere")
    (short_dir / "elsewhere").mkdir(mode=0o700)
    (short_dir / "file").touch()
    for name in "open", "link", "file":
        with pytest.raises(SecurityError):
            TombstoneStore(short_dir / name)
    with pytest.raises(IllegalArgumentError):
        TombstoneStore("no\0path")


async def test_the_kernels_one_port_serves_each_vm_by_its_cid(
    fake_vsock: type[FakeVsock], short_dir: Path
) -> None:
    fake_vsock.peers[:] = [(CID, 70), (2, 71), (CID + 1, 72), (CID, 73)]
    port = SharedPort(lambda admits: listen_on_kernel(PORT, admits))
    store = TombstoneStore(short_dir / "kept")
    told: dict[int, list[Tombstone]] = {CID: [], CID + 1: []}
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: port.run(task_status=task_status))
        for cid, events in told.items():
            receiver = TombstoneReceiver(store, lambda cid=cid: port.listen(cid), f"vm{cid}", cid)  # type: ignore[misc]
            await tasks.start(
                lambda task_status, receiver=receiver, events=events: receiver.serve(
                    events.append, task_status=task_status
                )
            )
        for number in range(4):
            with closing(socket.socket(socket.AF_UNIX)) as guest:
                guest.connect(str(short_dir / f"{socket.VMADDR_CID_ANY}_{PORT}"))
                guest.sendall(b"%d" % number)
        await until(lambda: len(told[CID]) == 2 and told[CID + 1])
        tasks.cancel_scope.cancel()
    assert [Path(event.path).read_bytes() for event in told[CID]] == [b"0", b"3"]
    assert [Path(event.path).read_bytes() for event in told[CID + 1]] == [b"2"]


async def test_a_guest_that_floods_the_kernels_port_holds_few_connections(
    fake_vsock: type[FakeVsock], short_dir: Path
) -> None:
    fake_vsock.peers[:] = [(CID, 70 + number) for number in range(WAITING + 3)]
    port = SharedPort(lambda admits: listen_on_kernel(PORT, admits))
    async with anyio.create_task_group() as tasks:
        await tasks.start(lambda task_status: port.run(task_status=task_status))
        listener = port.listen(CID)
        guests = [socket.socket(socket.AF_UNIX) for _ in range(WAITING + 3)]
        for guest in guests:
            guest.connect(str(short_dir / f"{socket.VMADDR_CID_ANY}_{PORT}"))
            guest.settimeout(20)
        for guest in guests[WAITING:]:
            assert await anyio.to_thread.run_sync(guest.recv, 1) == b""
        await listener.aclose()
        for guest in guests[:WAITING]:
            assert await anyio.to_thread.run_sync(guest.recv, 1) == b""
            guest.close()
        for guest in guests[WAITING:]:
            guest.close()
        tasks.cancel_scope.cancel()


async def test_a_port_that_another_manager_has_is_told_once_and_harms_nothing(
    fake_vsock: type[FakeVsock], short_dir: Path
) -> None:
    port = SharedPort(lambda admits: listen_on_kernel(PORT, admits))
    other = listen_on_kernel(PORT, lambda _cid: False)
    async with other, anyio.create_task_group() as tasks:
        with capture_logs() as logs:
            await tasks.start(lambda task_status: port.run(task_status=task_status))
        await port.listen(CID).aclose()
    assert [entry["event"] for entry in logs] == ["tombstones are not received"]


async def test_tombstones_are_told_before_the_vm_dies_and_stay_behind(
    short_dir: Path, config: RawConfig
) -> None:
    driver = ScriptedDriver()
    async with service_in(short_dir, driver, tombstones=short_dir / "kept") as service:
        with service.subscribe() as events:
            vm = await started(await service.create_vm(config), driver)
            with closing(socket.socket(socket.AF_UNIX)) as sock:
                sock.connect(f"{vm.info.directory}/vsock_2000")
                sock.sendall(b"signal 11")
            with anyio.fail_after(20):
                told = [await anext(events) for _ in range(3)][-1]
            await vm.stop()
            assert (await anext(events)).kind == "died"
    assert isinstance(told, Tombstone)
    assert (told.cid, told.generation, told.size, told.truncated) == (vm.cid, 1, 9, False)
    assert Path(told.path).read_bytes() == b"signal 11"
    assert left_in(short_dir) == []
