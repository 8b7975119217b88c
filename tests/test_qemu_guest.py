"""Real QEMU, driven by the driver alone: how guests end, and that the host keeps the upper hand."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import anyio
import pytest

from vmactor.config import DiskImage, RawConfig
from vmactor.config_file import load_config
from vmactor.console import Drain
from vmactor.errors import DeadlineExceededError, VmmError
from vmactor.host import probe
from vmactor.messages import DeathReason
from vmactor.vhost_device_vsock import VhostDeviceVsock
from vmactor.vmm import qemu_vmm
from vmactor.vmm.driver import Channels, Launch, VhostUserVsock, VmmExit
from vmactor.vmm.qemu import QemuDriver
from vmactor.vmm.qemu_vmm import QemuVmm
from vmactor.vmm.qmp import QmpError
from vmactor.vsock import HybridVsockTransport, VsockStream

pytestmark = [pytest.mark.anyio, pytest.mark.guest]

MIB: Final = 1 << 20
STEP_PORT: Final = 5000
PATIENCE: Final = 120.0
"""Seconds that a real guest gets for anything, on a busy machine without KVM."""


class Guest:
    """A VMM, what its serial ports said, and a way to talk to the guest."""

    def __init__(self, vmm: QemuVmm, drains: dict[str, Drain], transport: HybridVsockTransport) -> None:
        self.vmm, self.transport = vmm, transport
        self._drains = drains

    def said(self, role: str) -> str:
        return self._drains[role].tail.decode(errors="replace")

    async def ended(self) -> VmmExit:
        with anyio.fail_after(PATIENCE):
            return await self.vmm.wait()

    async def step(self, text: str) -> str:
        """Have a serving guest do a step; returns its answer."""
        async with await self.transport.connect(STEP_PORT, timeout=PATIENCE) as stream:
            await stream.send(f"{text}\n".encode())
            return await line(stream)


async def line(stream: VsockStream) -> str:
    text = b""
    while not text.endswith(b"\n"):
        text += await stream.receive()
    return text.decode().strip()


@asynccontextmanager
async def guest(directory: Path, config: RawConfig, cid: int = 3000) -> AsyncIterator[Guest]:
    """A spawned QEMU whose guest does not run yet."""
    helper_path = probe().vhost_device_vsock.path
    assert helper_path is not None, probe().vhost_device_vsock
    directory = directory / str(cid)
    directory.mkdir(mode=0o700)
    async with AsyncExitStack() as stack:
        helper = VhostDeviceVsock.spawn(helper_path, cid, directory)
        stack.push_async_callback(helper.aclose)
        with ExitStack() as ends:
            drains: dict[str, Drain] = {}
            pipes: dict[str, Any] = {}
            for role in ("console", "failure", "log", "ramdump", "stderr"):
                read, write = os.pipe()
                stack.callback(os.close, read)
                ends.callback(os.close, write)
                drains[role], pipes[role] = Drain(read, sink=None, sink_cap=0, tail=65536), write
            connection = await helper.connect()
            ends.callback(os.close, connection)
            launch = Launch("guest", cid, config, VhostUserVsock(connection), Channels(**pipes), directory)
            vmm = await QemuDriver(probe()).spawn(launch)
        stack.push_async_callback(vmm.aclose)
        transport = HybridVsockTransport(cid, directory / "vsock", lambda: helper.process.pid)
        async with anyio.create_task_group() as tasks:
            for drain in drains.values():
                tasks.start_soon(drain.run)
            yield Guest(vmm, drains, transport)
            await vmm.aclose()  # so that the drains come to their end


def configuration(guest_dir: Path, script: str, **changes: Any) -> RawConfig:
    """The built guest with a script; owns its descriptors."""
    with load_config(guest_dir / "vm.json") as config:
        fields = {
            "name": "guest",
            "kernel": config.kernel,
            "initrd": config.initrd,
            "params": f'{config.params} vmactor.script="{script}"',
            "memory_mib": config.memory_mib,
        }
        return RawConfig(**(fields | changes)).duplicate()


async def test_a_guest_ends_for_the_reason_that_it_had(short_dir: Path, guest_dir: Path) -> None:
    ends = {
        "print hello;log logged;failure broken;poweroff": DeathReason.SHUTDOWN,
        "reboot": DeathReason.REBOOT,
        "panic": DeathReason.CRASH,
        "watchdog;hang": DeathReason.WATCHDOG_REBOOT,
    }
    reasons = {}
    async with anyio.create_task_group() as tasks:

        async def run(number: int, script: str) -> None:
            with configuration(guest_dir, script) as config:
                async with guest(short_dir, config, 3000 + number) as it:
                    await it.vmm.wait_running()
                    ended = await it.ended()
                    reasons[script] = ended.reason
                    assert ended.status.code == 0, ended
                if "print" in script:
                    assert "hello" in it.said("console")
                    assert it.said("log").strip() == "logged"
                    assert it.said("failure") == "broken"
                    assert it.said("ramdump") == ""
                assert it.said("stderr") == ""

        for number, script in enumerate(ends):
            tasks.start_soon(run, number, script)
    assert reasons == ends


async def test_a_serving_guest_has_its_disks_balloon_pause_and_power_button(
    short_dir: Path, guest_dir: Path
) -> None:
    images = [short_dir / "read-only", short_dir / "writable"]
    for image in images:
        image.write_bytes(b"before\n" + bytes(65529))
    with images[0].open("r+b") as first, images[1].open("r+b") as second:
        disks = [DiskImage(first), DiskImage(second, writable=True)]
        config = configuration(guest_dir, "serve;dial 4000 up", disks=disks)
    with config:
        async with guest(short_dir, config) as it:
            listener = it.transport.listen(4000)
            await it.vmm.wait_running()
            assert await it.vmm.balloon_stats() is None  # nobody has loaded its driver yet
            with anyio.fail_after(PATIENCE):
                async with await listener.accept() as stream:
                    assert await line(stream) == "up"
                    await stream.send(b"good\n")
                await listener.aclose()

                assert (await it.step("read /dev/vda")).startswith("ok before")
                assert (await it.step("write /dev/vda after")).startswith("error")
                assert (await it.step("write /dev/vdb after")).startswith("ok")

                stats = await it.vmm.balloon_stats()
                assert stats is not None
                assert stats.total_memory is not None
                assert 0 < stats.total_memory <= 96 * MIB
                assert stats.balloon_actual == 0
                await it.vmm.set_balloon(8 * MIB)
                while stats.balloon_actual != 8 * MIB:  # the guest takes its time
                    stats = await it.vmm.balloon_stats()
                    assert stats is not None

                await it.vmm.suspend()
                answered = []

                async def ask() -> None:
                    answered.append(await it.step("echo awake"))

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask)
                    with anyio.move_on_after(0.3):
                        while True:
                            await anyio.sleep(0.05)
                            assert not answered
                    await it.vmm.resume()
                assert answered == ["ok awake"]
                await it.vmm.request_shutdown()  # the guest listens to its power button
            assert (await it.ended()).reason is DeathReason.SHUTDOWN
    assert images[0].read_bytes().startswith(b"before\n")
    assert images[1].read_bytes().startswith(b"after")


async def test_a_read_only_descriptor_stays_read_only_even_for_root(short_dir: Path, guest_dir: Path) -> None:
    images = [short_dir / "read-only", short_dir / "writable"]
    for image in images:
        image.write_bytes(bytes(65536))
    # Both of the caller's descriptors can write; the configuration alone says who may.
    with images[0].open("r+b") as first, images[1].open("r+b") as second:
        disks = [DiskImage(first), DiskImage(second, writable=True)]
        config = configuration(guest_dir, "hang", disks=disks)
    with config:
        async with guest(short_dir, config) as it:
            await it.vmm.wait_running()
            qmp = it.vmm._qmp

            async def write(node: str) -> None:
                command = {"command-line": f'qemu-io {node} "write -P 1 0 512"'}
                await qmp.execute("human-monitor-command", command)

            first_file, second_file = (
                {"driver": "file", "filename": block["inserted"]["file"], "auto-read-only": False}
                for block in await qmp.execute("query-block")
            )
            await qmp.execute("blockdev-add", second_file | {"node-name": "able", "read-only": False})
            await write("able")
            with pytest.raises(QmpError, match="Permission denied"):
                await qmp.execute("blockdev-add", first_file | {"node-name": "able2", "read-only": False})
            await qmp.execute("blockdev-add", first_file | {"node-name": "unable", "read-only": True})
            above = {"driver": "raw", "node-name": "above", "file": "unable", "read-only": False}
            await qmp.execute("blockdev-add", above)
            for node in ("unable", "above", "file0", "disk0"):
                await write(node)
            options = [first_file | {"node-name": "file0", "read-only": False}]
            with pytest.raises(QmpError, match="Permission denied"):
                await qmp.execute("blockdev-reopen", {"options": options})
    assert images[0].read_bytes() == bytes(65536)
    assert images[1].read_bytes() == b"\1" * 512 + bytes(65536 - 512)


async def test_a_stopped_qemu_costs_a_deadline_and_dies_at_once(
    short_dir: Path, guest_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_vmm, "REQUEST_TIMEOUT", 0.2)
    with configuration(guest_dir, "hang") as config:
        async with guest(short_dir, config) as it, anyio.create_task_group() as tasks:
            await it.vmm.wait_running()
            ended = []

            async def watch() -> None:
                ended.append(await it.ended())

            tasks.start_soon(watch)
            os.kill(it.vmm.pid, signal.SIGSTOP)
            for request in (it.vmm.suspend, it.vmm.request_shutdown, it.vmm.balloon_stats):
                with pytest.raises(DeadlineExceededError):
                    await request()
            it.vmm.kill()
            assert (await it.ended()).reason is DeathReason.KILLED
    assert [end.status.signal for end in ended] == [signal.SIGKILL]


async def test_a_bad_kernel_is_a_failed_start_with_a_cause(short_dir: Path, guest_dir: Path) -> None:
    with Path(os.devnull).open("rb") as null, configuration(guest_dir, "hang", kernel=null) as config:
        async with guest(short_dir, config) as it:
            with pytest.raises(VmmError, match="QEMU ended before it ran the guest: exit code 1"):
                await it.vmm.wait_running()
            ended = await it.ended()
        assert (ended.reason, ended.status.code) == (DeathReason.START_FAILED, 1)
        assert "/proc/self/fd" in it.said("stderr")


async def test_there_is_room_for_as_many_disks_as_a_configuration_may_have(
    short_dir: Path, guest_dir: Path
) -> None:
    image = short_dir / "image"
    image.write_bytes(bytes(65536))
    with image.open("rb") as file, configuration(guest_dir, "hang", disks=[DiskImage(file)] * 26) as config:
        config.validate()
        async with guest(short_dir, config) as it:
            await it.vmm.wait_running()
            assert len(await it.vmm._qmp.execute("query-block")) == 26
