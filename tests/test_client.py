"""``vmactor.client``: the same program with an embedded service and with a daemon's; what a socket adds."""

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.daemon_peer import SECONDS, daemon
from tests.simulated_peer import script
from vmactor import (
    Backoff,
    Died,
    DiskImage,
    IllegalArgumentError,
    IllegalStateError,
    MemoryTrimLevel,
    NetworkInterface,
    NetworkMode,
    NotConnectedError,
    Overflow,
    Partition,
    PartitionType,
    PayloadReady,
    RawConfig,
    RestartLimit,
    RestartPolicy,
    SlowSubscriberError,
    Snapshot,
    StopLadder,
    StopRung,
    UnsupportedOperationError,
    VirtualizationService,
    VirtualMachineState,
    connect,
)
from vmactor.protocol.values import config_from_wire, config_to_wire
from vmactor.rpc.files import ReceivedFile, close_all
from vmactor.rpc.framing import SERVER, Decoder, Encoder

pytestmark = pytest.mark.anyio


def simulated(directory: Path, opened: ExitStack, *steps: str, name: str = "sim") -> RawConfig:
    """The configuration of a simulated VM that plays a script."""
    kernel = opened.enter_context((directory / "kernel").open("w+b"))
    return RawConfig(name=name, kernel=kernel, params=script(*steps))


@asynccontextmanager
async def embedded(directory: Path) -> AsyncIterator[Any]:
    async with VirtualizationService(vmm="simulated", state_directory=directory / "state") as service:
        yield service


@asynccontextmanager
async def over_a_socket(directory: Path) -> AsyncIterator[Any]:
    async with daemon(directory) as served, connect(served.path) as service:
        yield service


WAYS = pytest.mark.parametrize("way", [embedded, over_a_socket])


@WAYS
async def test_the_same_program_runs_with_an_embedded_service_and_with_a_daemons(
    short_dir: Path, way: Any
) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "serve")
        async with way(short_dir) as service:
            vm = await service.create_vm(config)
            assert (vm.name, vm.state) == ("sim", VirtualMachineState.NOT_STARTED)
            events = vm.events()
            everything = service.subscribe(kinds=[PayloadReady, Died])
            await vm.start()
            seen = []
            with anyio.fail_after(SECONDS):
                async for event in events:
                    seen.append(event.kind)
                    if event.kind == "payload_ready":
                        break
            assert seen == ["started", "payload_started", "payload_ready"]
            assert vm.state is VirtualMachineState.READY
            assert [info.cid for info in service.list_vms()] == [vm.cid]
            async with await vm.connect_vsock(5000) as stream:
                await stream.send(b"echo hello\n")
                assert await stream.receive() == b"ok hello\n"
            assert (await vm.usage()).memory.total_kib > 0
            await vm.suspend()
            assert vm.info.suspended
            await vm.resume()
            assert not vm.info.suspended
            await vm.on_trim_memory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)
            with pytest.raises(IllegalArgumentError, match="Invalid memory trim level"):
                await vm.on_trim_memory(99)
            with pytest.raises(IllegalStateError):
                await vm.start()
            assert [row.cid for row in await _debug(service)] == [vm.cid]
            assert await vm.shutdown(StopLadder(power_button=None, exit_request=None)) is StopRung.KILL
            died = await vm.wait()
            assert died is not None
            assert died.final
            assert vm.state is VirtualMachineState.DEAD
            with anyio.fail_after(SECONDS):
                assert [type(event) async for event in events][-1] is Died
                assert type(await anext(everything)) is PayloadReady
                assert (await anext(everything)).seq == died.seq
            assert service.list_vms() == []
            await vm.aclose()


async def _debug(service: Any) -> Any:
    rows = service.debug_list_vms()
    return rows if isinstance(rows, list) else await rows


@WAYS
async def test_leaving_the_block_of_a_vm_ends_it_and_so_does_dropping_it(short_dir: Path, way: Any) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "serve")
        async with way(short_dir) as service:
            ends = service.subscribe(kinds=[Died])
            async with await service.create_vm(config) as vm:
                await vm.start()
            assert vm.state is VirtualMachineState.DEAD
            vm = await service.create_vm(config)
            await vm.start()
            cid = vm.cid
            del vm
            gc.collect()
            with anyio.fail_after(SECONDS):
                assert (await anext(ends)).cid != cid
                assert (await anext(ends)).cid == cid


@WAYS
async def test_a_stream_that_is_not_read_is_ended_by_its_policy(short_dir: Path, way: Any) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "serve")
        async with way(short_dir) as service, await service.create_vm(config) as vm:
            await vm.start()
            slow = service.subscribe(capacity=2, overflow=Overflow.DISCONNECT, snapshot=True)
            for number in range(2000):
                await vm.publish_message("guest_to_host", 7000, str(number))
            with anyio.fail_after(SECONDS):
                assert isinstance(await anext(slow), Snapshot)
                with pytest.raises(SlowSubscriberError):
                    async for _ in slow:
                        pass


@WAYS
async def test_the_console_of_a_vm_can_be_followed(short_dir: Path, way: Any) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "print hello", "started", "ready", "serve")
        async with way(short_dir) as service, await service.create_vm(config) as vm:
            with pytest.raises(IllegalStateError):
                await vm.console()
            await vm.start()
            text = b""
            with anyio.fail_after(SECONDS):
                async with await vm.console() as stream:
                    while b"hello" not in text:
                        text += await stream.receive()


@WAYS
async def test_files_are_prepared(short_dir: Path, way: Any) -> None:
    async with way(short_dir) as service:
        with (short_dir / "disk").open("w+b") as disk:
            assert await service.initialize_writable_partition(disk, 1 << 20, PartitionType.RAW) == 1 << 20
            assert os.pread(disk.fileno(), 4, 0) == b"QFI\xfb"
        with pytest.raises(IllegalArgumentError):
            await service.initialize_writable_partition(-1, 1 << 20)


@WAYS
async def test_errors_are_of_the_same_classes(short_dir: Path, way: Any) -> None:
    with ExitStack() as opened:
        file = opened.enter_context((short_dir / "file").open("w+b"))
        async with way(short_dir) as service:
            with pytest.raises(IllegalArgumentError, match="bootloader or a kernel"):
                await service.create_vm(RawConfig(name="nothing"))
            with pytest.raises(UnsupportedOperationError):
                await service.create_vm(RawConfig(name="p", kernel=file, task_profiles=["high"]))
            with pytest.raises(IllegalArgumentError):
                await service.create_vm(RawConfig(name="c", kernel=file), console=10**6)
            assert service.list_vms() == []


@WAYS
async def test_a_vm_is_started_again_where_that_was_asked_for(short_dir: Path, way: Any) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "crash")
        policy = RestartPolicy(limit=RestartLimit(1, 60.0), backoff=Backoff(initial=0.001, maximum=0.001))
        async with way(short_dir) as service:
            vm = await service.create_vm(config, restart=policy)
            events = vm.events()
            await vm.start()
            with anyio.fail_after(SECONDS):
                kinds = [event.kind async for event in events]
            run = ["started", "payload_started", "payload_ready", "died"]
            assert [kind for kind in kinds if kind in {*run, "restarting", "gave_up"}] == [
                *run,
                "restarting",
                *run[:-1],
                "gave_up",
                "died",
            ]


def test_a_configuration_crosses_the_socket_unchanged() -> None:
    with ExitStack() as opened:
        kernel = os.memfd_create("kernel")
        opened.callback(os.close, kernel)
        disk = DiskImage(partitions=[Partition("p", kernel, guid="00112233-4455-6677-8899-aabbccddeeff")])
        network = [NetworkInterface(isolated=True), NetworkInterface(mode=NetworkMode.ROUTED, mtu=1400)]
        config = RawConfig(name="x", kernel=kernel, disks=[disk], memory_mib=64, network=network)
        encoder, decoder = Encoder(), Decoder(SERVER)
        data, files = encoder.encode((0, 1, "createVm", [config_to_wire(config)]))
        decoder.feed(data, [ReceivedFile(fd) for fd in files])
        ((message, received),) = decoder.messages()
        opened.callback(close_all, received)
        came = config_from_wire(message[3][0])
        assert isinstance(came, RawConfig)
        assert came.network == config.network
        assert came.disks[0].partitions[0].guid == disk.partitions[0].guid
        assert (came.name, came.memory_mib) == ("x", 64)
        assert os.fstat(came.disks[0].partitions[0].image).st_ino == os.fstat(kernel).st_ino


def test_a_program_that_anyio_did_not_start_can_use_both_ends(short_dir: Path) -> None:
    """The loop's own callbacks run in no task, where anyio cannot tell by itself which library runs."""

    async def program() -> None:
        with ExitStack() as opened:
            config = simulated(short_dir, opened, "started", "ready", "serve")
            async with over_a_socket(short_dir) as service:
                ends = service.subscribe(kinds=[Died])
                vm = await service.create_vm(config)
                await vm.start()
                del vm
                gc.collect()
                with anyio.fail_after(SECONDS):
                    assert isinstance(await anext(ends), Died)

    asyncio.run(program())


# -- What a socket adds -------------------------------------------------------------------------------


async def test_without_a_daemon_the_error_says_what_to_start(short_dir: Path) -> None:
    with pytest.raises(NotConnectedError, match="start 'vmactor serve'"):
        async with connect(short_dir / "none"):
            pass


async def test_a_listener_that_is_no_daemon_is_an_error(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "socket"))
        listener.listen()
        listener.setblocking(False)

        async def hang_up() -> None:
            await anyio.wait_readable(listener)
            listener.accept()[0].close()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hang_up)
            with pytest.raises(NotConnectedError):
                async with connect(short_dir / "socket"):
                    pass


async def test_a_lost_connection_fails_all_that_waits_and_ends_the_clients_vms(short_dir: Path) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "serve")
        async with daemon(short_dir) as served, connect(served.path) as service:
            vm = await service.create_vm(config)
            await vm.start()
            stream = service.subscribe(kinds=[Died])
            failed = []

            async def wait_for_its_end() -> None:
                try:
                    await vm.wait()
                except NotConnectedError as error:
                    failed.append(error)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait_for_its_end)
                await anyio.wait_all_tasks_blocked()
                service._open._connection.close()
            assert len(failed) == 1
            with pytest.raises(NotConnectedError):
                async for _ in stream:
                    pass
            with pytest.raises(NotConnectedError):
                await vm.stop()
            with anyio.fail_after(SECONDS):
                while served.service.list_vms():
                    await anyio.sleep(0.01)


async def test_a_kept_vm_outlives_its_client_and_is_found_by_the_next(short_dir: Path) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "serve")
        async with daemon(short_dir) as served:
            async with connect(served.path) as service:
                vm = await service.create_vm(config, keep=True)
                ready = service.subscribe(kinds=[PayloadReady])
                await vm.start()
                with anyio.fail_after(SECONDS):
                    await anext(ready)
                cid = vm.cid
            async with connect(served.path) as service:
                assert [info.cid for info in service.list_vms()] == [cid]
                found = await service.open_vm(cid)
                assert found.state is VirtualMachineState.READY
                await found.stop()
                assert service.list_vms() == []


async def test_a_stream_goes_on_after_a_cursor(short_dir: Path) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "started", "ready", "serve")
        async with daemon(short_dir) as served:
            async with connect(served.path) as service:
                async with await service.create_vm(config) as vm:
                    cursor = service.seq
                    await vm.start()
                end = service.seq
            async with connect(served.path) as service:
                again = service.subscribe(after=cursor)
                with anyio.fail_after(SECONDS):
                    kinds = []
                    async for event in again:
                        kinds.append(event.kind)
                        if event.seq >= end:
                            break
                assert kinds[0] == "started"
                assert kinds[-1] == "died"
