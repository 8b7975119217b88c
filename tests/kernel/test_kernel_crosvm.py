"""crosvm itself, with guests that run: only where somebody brings one (``VMACTOR_CROSVM=... make lab``)."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.guests import agent, booted, create, history, parting, until
from tests.kernel.guests import ENDINGS, ended, memory
from vmactor import (
    DeathReason,
    DiskImage,
    IllegalStateError,
    MemoryTrimLevel,
    StartFailedError,
    VirtualizationService,
    VirtualMachine,
    VirtualMachineState,
    load_config,
)
from vmactor.config import Partition, RawConfig
from vmactor.host import look
from vmactor.images.partition import initialize_writable_partition
from vmactor.vmm.crosvm_control import CrosvmControl
from vmactor.vsock import VsockAttribute

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.kernel("asyncio"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "VMACTOR_CROSVM" not in os.environ,
        reason="crosvm is not packaged for Debian; VMACTOR_CROSVM=/path/to/crosvm puts one into the lab",
    ),
]

MIB = 1 << 20


@pytest.fixture
async def service(short_dir: Path) -> AsyncIterator[VirtualizationService]:
    """A service that chooses by itself."""
    async with VirtualizationService(state_directory=short_dir / "state") as service:
        assert (service.selection.driver.name, service.selection.vsock) == ("crosvm", "kernel")
        yield service
    assert list((short_dir / "state" / "vm").iterdir()) == []


def control(vm: VirtualMachine) -> CrosvmControl:
    """Another client of the VM's control socket."""
    return CrosvmControl(Path(vm.info.directory) / "control")


@pytest.mark.kernel("asyncio", "trio")
async def test_a_whole_life_under_crosvm(service: VirtualizationService, guest_dir: Path) -> None:
    async with await create(service, guest_dir, "print hello;started;ready;serve") as vm:
        with vm.events() as events:
            await vm.start()
            kinds = ["started", (await until(events, "payload_started")).kind]
            kinds += [(await until(events, "payload_ready")).kind]
            assert vm.state is VirtualMachineState.READY
            assert await agent(vm, "cid") == f"ok {vm.cid}"
            async with vm.listen_vsock(7000) as listener, anyio.create_task_group() as group:

                async def answer() -> None:
                    async with await listener.accept() as stream:
                        assert stream.extra(VsockAttribute.peer_cid) == vm.cid
                        await stream.send(await stream.receive())

                group.start_soon(answer)
                assert await agent(vm, "dial 7000 there and back") == "ok there and back"
            assert await agent(vm, "finished 0") == "ok"
            await parting(vm, "poweroff")
            kinds += [event.kind async for event in events]
        with pytest.raises(IllegalStateError):
            await vm.connect_vsock(5000)
    assert kinds == ["started", "payload_started", "payload_ready", "payload_finished", "died"]
    died = await vm.wait()
    assert died is not None
    assert (died.reason, died.exit_code) == (DeathReason.SHUTDOWN, 0)
    assert "hello" in died.console_tail


CODES = {DeathReason.SHUTDOWN: 0, DeathReason.REBOOT: 32, DeathReason.CRASH: 34}


@pytest.mark.parametrize(("script", "told", "reason"), ENDINGS, ids=[script for script, _, _ in ENDINGS])
async def test_how_a_guest_under_crosvm_ends_is_told(
    service: VirtualizationService, guest_dir: Path, script: str, told: list[str], reason: DeathReason
) -> None:
    async with await create(service, guest_dir, script) as vm:
        events = await history(vm)
    assert [event.kind for event in events] == ["started", *told, "died"]
    died = ended(events)
    assert died.reason is reason
    assert died.exit_code == CODES.get(reason, 0)
    if reason is DeathReason.CRASH:
        assert "panic" in died.console_tail


async def test_a_crosvm_that_is_killed_or_whose_guest_hangs_says_how(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as vm:
        stream = await vm.connect_vsock(5000)
        assert vm.info.pid is not None
        os.kill(vm.info.pid, signal.SIGTERM)  # crosvm has no handler for it
        died = await vm.wait()
        async with stream:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()
    assert died is not None
    assert (died.reason, died.signal) == (DeathReason.KILLED, signal.SIGTERM)
    async with await create(service, guest_dir, "hang", hangup_detection=True, hangup_timeout=15) as vm:
        events = await history(vm)
    assert [event.kind for event in events] == ["started", "hung_up", "died"]
    assert (ended(events).reason, ended(events).signal) == (DeathReason.HANGUP, signal.SIGKILL)


async def test_a_kernel_that_is_none_fails_the_start_with_crosvms_words(
    service: VirtualizationService, tmp_path: Path
) -> None:
    (tmp_path / "kernel").write_bytes(b"not a kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        async with await service.create_vm(RawConfig(name="bad", kernel=kernel)) as vm:
            with pytest.raises(StartFailedError, match=r"(?i)kernel"):
                await vm.start()
            died = await vm.wait()
    assert died is not None
    assert (died.reason, died.exit_code) == (DeathReason.START_FAILED, 1)


async def test_an_argument_that_crosvm_does_not_know_fails_the_start(
    short_dir: Path, guest_dir: Path
) -> None:
    wrapper = short_dir / "crosvm"
    wrapper.write_text(
        f'#!/bin/sh\n[ $# -lt 3 ] || set -- "$@" --no-such-option\nexec {os.environ["VMACTOR_CROSVM"]} "$@"\n'
    )
    wrapper.chmod(0o755)
    facts = look(environ={**os.environ, "VMACTOR_CROSVM": str(wrapper)}, timeout=30)
    async with (
        VirtualizationService(state_directory=short_dir / "state", facts=facts, vmm="crosvm") as service,
        await create(service, guest_dir, "serve") as vm,
    ):
        with pytest.raises(StartFailedError, match="no-such-option"):
            await vm.start()
        died = await vm.wait()
    assert died is not None
    assert (died.reason, died.exit_code) == (DeathReason.START_FAILED, 35)


async def test_a_vm_under_crosvm_can_be_suspended_resumed_trimmed_and_asked_to_shut_down(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with booted(service, guest_dir) as vm:
        async with await vm.connect_vsock(5000) as stream:
            await vm.suspend()
            assert vm.info.suspended
            await stream.send(b"echo meanwhile\n")
            with anyio.move_on_after(1) as patience:
                await stream.receive()
            assert patience.cancelled_caught
            await vm.resume()
            assert await stream.receive() == b"ok meanwhile\n"
        total, free = await memory(vm)
        await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)  # takes 30 %
        with anyio.fail_after(60):
            while (await memory(vm))[1] > free - 0.2 * total:
                await anyio.sleep(0.1)
        stats = await control(vm).ask({"BalloonCommand": "Stats"}, "BalloonStats")
        assert stats["balloon_actual"] > 0.2 * total * 1024
        await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_MODERATE)  # takes 10 %, so gives back
        with anyio.fail_after(60):
            while (await memory(vm))[1] < free - 0.15 * total:
                await anyio.sleep(0.1)
        await control(vm).command("Powerbtn")
        died = await vm.wait()
    assert died is not None
    assert (died.reason, died.exit_code) == (DeathReason.SHUTDOWN, 0)


async def test_crosvm_ends_in_order_when_it_is_asked_to(
    service: VirtualizationService, guest_dir: Path
) -> None:
    async with await create(service, guest_dir, "hang") as vm:
        await vm.start()
        await control(vm).command("Exit")
        died = await vm.wait()
    assert died is not None
    assert (died.reason, died.exit_code) == (DeathReason.SHUTDOWN, 0)


async def test_consoles_log_and_ramdump_of_a_guest_reach_their_files(
    service: VirtualizationService, guest_dir: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((tmp_path / name).open("wb")) for name in ("console", "log", "ramdump")
        }
        sinks: dict[str, Any] = {name: file.fileno() for name, file in files.items()}
        # crosvm sets 17 MiB aside for the kernel that would write the dump.
        with load_config(guest_dir / "vm.json") as loaded:
            params = f'{loaded.params} vmactor.script="started;ready;serve"'
            config = replace(loaded, memory_mib=160, params=params)
            vm = await service.create_vm(config, **sinks)
        async with vm:
            with vm.events() as events:
                await vm.start()
                await until(events, "payload_ready")
            for device, text in {
                "ttyS0": "serial",
                "hvc0": "virtio",
                "hvc1": "dump",
                "hvc2": "logged",
            }.items():
                assert (await agent(vm, f"write /dev/{device} {text}")).startswith("ok")
            assert "crashkernel=17M" in await agent(vm, "read /proc/cmdline")
            await parting(vm, "poweroff")
            await vm.wait()
    assert (tmp_path / "log").read_text() == "logged"
    assert (tmp_path / "ramdump").read_text() == "dump"
    console = (tmp_path / "console").read_text()
    assert "serial" in console
    assert "virtio" in console


async def test_crosvm_reads_and_writes_disks_of_ours_with_no_more_rights_than_due(
    short_dir: Path, guest_dir: Path
) -> None:
    with ExitStack() as stack:

        def image(name: str, size: int = MIB) -> int:
            file = stack.enter_context((short_dir / name).open("w+b", buffering=0))
            file.write(name.encode().ljust(4096, b"."))
            file.truncate(size)
            return file.fileno()

        qcow2, part = image("qcow2", 0), image("part", 0)
        for fd in (qcow2, part):
            os.ftruncate(fd, 0)
            initialize_writable_partition(fd, 8 * MIB)
        parts = [
            Partition("fixed", image("fixed")),
            Partition("free", image("free"), True),
            Partition("inner", part, True, format="qcow2"),
        ]
        disks = [
            DiskImage(image("read-only")),
            DiskImage(image("writable"), True),
            DiskImage(qcow2, True, format="qcow2"),
            DiskImage(writable=True, partitions=parts),
        ]
        written = {"vdb": "raw", "vdc": "image", "vdd2": "part", "vdd3": "image in a part"}
        with load_config(guest_dir / "vm.json") as loaded:
            params = f'{loaded.params} vmactor.script="started;ready;serve"'
            config = replace(loaded, params=params, disks=tuple(disks), memory_mib=128).duplicate()
        stack.callback(config.close)
        for vmm in ("crosvm", "qemu"):
            async with (
                VirtualizationService(state_directory=short_dir / vmm, vmm=vmm) as service,
                await service.create_vm(config) as vm,
            ):
                with vm.events() as events:
                    await vm.start()
                    await until(events, "payload_ready")
                assert "read-only" in await agent(vm, "read /dev/vda")
                assert "fixed" in await agent(vm, "read /dev/vdd1")
                if vmm == "crosvm":
                    for disk in ("vda", "vdd1"):
                        assert (await agent(vm, f"write /dev/{disk} no")).startswith("error")
                    for disk, text in written.items():
                        assert (await agent(vm, f"write /dev/{disk} {text}")).startswith("ok")
                    check_descriptors(vm, short_dir)
                else:  # another VMM finds what crosvm wrote
                    for disk, text in written.items():
                        assert (await agent(vm, f"read /dev/{disk}")).startswith(f"ok {text}")
                await parting(vm, "poweroff")
                died = await vm.wait()
                assert died is not None
                assert died.reason is DeathReason.SHUTDOWN
    for name in ("read-only", "fixed"):
        assert (short_dir / name).read_bytes().startswith(name.encode() + b"...")


def check_descriptors(vm: VirtualMachine, directory: Path) -> None:
    """Read-only files are open for reading only, and nothing of ours but this VM's came along."""
    pid, own = vm.info.pid, Path(vm.info.directory)
    assert pid is not None
    ours = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    modes: dict[str, set[int]] = {}
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        target = str(Path(f"/proc/{pid}/fd/{info.name}").readlink())
        if Path(target).parent == directory:
            modes.setdefault(Path(target).name, set()).add(int(info.read_text().split()[3], 8) & os.O_ACCMODE)
        assert not target.startswith(str(own)), "the VM's own directory is the manager's"
        assert target not in ours or not target.startswith("socket:"), "a socket of ours"
    assert modes["read-only"] == modes["fixed"] == {os.O_RDONLY}
    assert modes["writable"] == modes["free"] == modes["qcow2"] == modes["part"] == {os.O_RDWR}
