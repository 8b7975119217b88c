"""Real guests and their disks: a planted header is not followed, and QCOW2 images are read and written."""

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guests import SILENT_SCRIPT, agent, history, parting, start_silent
from tests.images import qcow2_header, qemu_img
from vmactor import (
    DeathReason,
    DiskImage,
    PartitionType,
    Restart,
    RestartLimit,
    RestartPolicy,
    StartFailedError,
    UnsafeImageError,
    VirtualizationService,
    load_config,
)

pytestmark = [pytest.mark.anyio, pytest.mark.guest]

SECRET = b"what only the host may know"


@pytest.fixture
async def service(short_dir: Path) -> AsyncIterator[VirtualizationService]:
    async with VirtualizationService(state_directory=short_dir / "state") as service:
        yield service


async def test_a_header_that_a_guest_writes_to_its_raw_disk_is_refused_at_the_next_start(
    service: VirtualizationService, guest_dir: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET.ljust(1 << 20, b"\n"))
    (tmp_path / "raw").write_bytes(bytes(1 << 20))
    name = os.fsencode(secret)
    header = qcow2_header(size=1 << 20, backing_offset=512, backing_length=len(name))
    planted = header[:512] + name

    with (tmp_path / "raw").open("r+b") as raw, load_config(guest_dir / "python.json", name="plant") as base:
        config = replace(
            base,
            params=f'{base.params} vmactor.script="{SILENT_SCRIPT}"',
            disks=(DiskImage(raw, writable=True),),
        )
        created_before = await service.create_vm(config)
        again = RestartPolicy(when=Restart.PERMANENT, limit=RestartLimit(1, 600.0))
        async with await service.create_vm(config, restart=again) as vm:
            await start_silent(vm)
            program = (
                f"d=open('/dev/vda','r+b',0);d.write(bytes.fromhex('{planted.hex()}'));d.seek({1 << 16});"
                f"d.write(bytes.fromhex('{header[1 << 16 : (1 << 16) + 8].hex()}'));d.seek({2 << 16});"
                f"d.write(bytes.fromhex('{header[2 << 16 : (2 << 16) + 8].hex()}'));d.seek({3 << 16});"
                f"d.write(bytes.fromhex('{header[3 << 16 : (3 << 16) + 8].hex()}'));__import__('os').fsync(d)"
            )
            assert await agent(vm, f"exec /usr/bin/python3 -S -E -c {program}") == "ok 0"
            await parting(vm, "poweroff")
            second = await vm.wait()
        assert second is not None
        assert (second.generation, second.reason) == (2, DeathReason.START_FAILED)
        assert "begins like a QCOW2 image; if a guest wrote that" in second.detail

        # The danger is real: whoever probes this file reads the secret.
        qemu_img("convert", "-O", "raw", tmp_path / "raw", tmp_path / "leak")
        assert (tmp_path / "leak").read_bytes().startswith(SECRET)

        async with created_before:
            with pytest.raises(
                StartFailedError, match="begins like a QCOW2 image; if a guest wrote"
            ) as caught:
                await created_before.start()
            assert isinstance(caught.value.__cause__, UnsafeImageError)
            died = await created_before.wait()
        assert died is not None
        assert died.reason is DeathReason.START_FAILED
        with pytest.raises(UnsafeImageError, match=r"disks\[0\]\.image: is a writable raw image, and begins"):
            await service.create_vm(config)
        # Declared as what it pretends to be, or read-only, it is refused for the file that it names.
        for disk in (DiskImage(raw, writable=True, format="qcow2"), DiskImage(raw)):
            with pytest.raises(UnsafeImageError, match="with the backing file"):
                await service.create_vm(replace(config, disks=(disk,)))


async def test_a_guest_reads_and_writes_a_partition_of_ours_and_it_stays_clean(
    service: VirtualizationService, guest_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "store"
    with path.open("w+b") as image, load_config(guest_dir / "vm.json", name="store") as base:
        await service.initialize_writable_partition(image, 8 << 20, PartitionType.ENCRYPTEDSTORE)

        async def boot(script: str, *, writable: bool) -> str:
            disk = DiskImage(image, writable, format="qcow2" if writable else None)
            params = f'{base.params} vmactor.script="{script};poweroff"'
            async with await service.create_vm(replace(base, params=params, disks=(disk,))) as vm:
                events = await history(vm)
            return getattr(events[-1], "console_tail", "")

        assert "UNFORMATTED-STORAGE" in await boot(
            "read /dev/vda;read /sys/block/vda/size;write /dev/vda kept-by-the-guest", writable=True
        )
        assert "No errors were found" in qemu_img("check", "-f", "qcow2", path)
        console = await boot("read /dev/vda;write /dev/vda no", writable=False)
    assert "kept-by-the-guest" in console
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "disk")
    disk = (tmp_path / "disk").read_bytes()
    assert disk == b"kept-by-the-guest" + b"UNFORMATTED-STORAGE"[17:] + bytes((8 << 20) - 19)
