"""Real QEMU guests with disks made of partitions: what they see, and what their writes reach."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from tests.guests import agent, until
from tests.test_qemu_guest import configuration, guest
from vmactor import VirtualizationService, VirtualMachine
from vmactor.config import DiskImage, Partition
from vmactor.config_file import load_config
from vmactor.messages import ImageKind

pytestmark = [pytest.mark.anyio, pytest.mark.guest]

KIB: Final = 1024
# As long as can be, and ASCII: the kernel shows no other letters as they are.
ODD_LABEL: Final = 'thirty-six units, it is a "label" %\\'
RAW, QCOW2 = ImageKind.RAW, ImageKind.QCOW2
DISKS: Final[dict[str, dict[str, tuple[int, bool, ImageKind]]]] = {
    # A disk that is writable here and read-only there, of all formats, with sizes beside all bounds.
    "vda": {
        "first": (64 * KIB, True, RAW),
        "read-only": (40 * KIB + 1, False, RAW),
        "instance": (256 * KIB, True, QCOW2),
        "middle": (4 * KIB, True, RAW),
        ODD_LABEL: (513, False, RAW),
        "base": (128 * KIB, False, QCOW2),
        "almost a page": (4095, False, RAW),
        "last": (1024 * KIB, True, RAW),
    },
    # A read-only one, with a partition that could be written elsewhere.
    "vdb": {"a": (4097, False, RAW), "b": (8192, True, RAW), "c": (64 * KIB, False, QCOW2)},
}


IN_THE_GUEST: Final = """
import json, os, sys
from _sha256 import sha256

def content(path):
    with open(path, "rb") as file:
        return file.read()

def put(path, offset, data):
    try:
        fd = os.open(path, os.O_RDWR | os.O_SYNC)
    except OSError as error:
        return error.strerror
    try:
        done = os.pwrite(fd, data, offset)
        os.fsync(fd)
        return done
    except OSError as error:
        return error.strerror
    finally:
        os.close(fd)

result = {}
for disk in "vda", "vdb":
    seen = {}
    sectors = int(content("/sys/block/" + disk + "/size"))
    for name in sorted(os.listdir("/sys/block/" + disk), key=lambda name: (len(name), name)):
        if not name.startswith(disk):
            continue
        uevent = content("/sys/block/" + disk + "/" + name + "/uevent").decode()
        label = [line[9:] for line in uevent.splitlines() if line.startswith("PARTNAME=")][0]
        data = content("/dev/" + name)
        pattern = bytes((n * 31 + len(seen)) % 251 for n in range(1536))
        seen[label] = {
            "size": len(data),
            "sha256": sha256(data).hexdigest(),
            "written": [put("/dev/" + name, 0, pattern), put("/dev/" + name, len(data) - 1536, pattern)],
        }
    result[disk] = {
        "partitions": seen,
        "table": put("/dev/" + disk, 512, bytes(512)),
        "backup": put("/dev/" + disk, (sectors - 1) * 512, bytes(512)),
    }
with open("/tmp/result", "w") as file:
    json.dump(result, file)
"""


def pattern(number: int) -> bytes:
    """What the guest writes to both ends of a partition."""
    return bytes((n * 31 + number) % 251 for n in range(1536))


class Files:
    """The files behind a disk, each filled with what only it has."""

    def __init__(
        self, folder: Path, opened: ExitStack, sizes: dict[str, tuple[int, bool, ImageKind]]
    ) -> None:
        folder.mkdir()
        self._rows = sizes
        self.before = {label: random.Random(label).randbytes(size) for label, (size, *_) in sizes.items()}
        self._paths = {label: folder / str(number) for number, label in enumerate(sizes)}
        self.parts = []
        for label, (_, writable, kind) in sizes.items():
            path = self._paths[label]
            path.write_bytes(self.before[label])
            if kind is QCOW2:
                convert(path, RAW, QCOW2)
            # Descriptors that can write, all of them: what may be written is for the configuration to say.
            file = opened.enter_context(path.open("r+b"))
            self.parts.append(Partition(label, file, writable, kind if writable else None))
        self.files = {label: path.read_bytes() for label, path in self._paths.items()}

    def now(self, label: str) -> bytes:
        """What is on the disk in the file of a partition."""
        if self._rows[label][2] is QCOW2:
            convert(self._paths[label], QCOW2, RAW)
        return self._paths[label].read_bytes()

    def untouched(self, label: str) -> bool:
        return self._paths[label].read_bytes() == self.files[label]

    def seen(self, label: str) -> tuple[int, str]:
        """Size and digest of what a guest shall see."""
        data = self.before[label]
        padded = data + bytes(-len(data) % 4096)
        return len(padded), sha256(padded).hexdigest()


def convert(path: Path, old: ImageKind, new: ImageKind) -> None:
    other = path.with_suffix(".new")
    subprocess.run(["qemu-img", "convert", "-f", old, "-O", new, path, other], check=True)
    path.write_bytes(other.read_bytes())


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


async def python_guest(
    service: VirtualizationService, guest_dir: Path, disks: list[DiskImage]
) -> VirtualMachine:
    with load_config(guest_dir / "python.json", name="test") as loaded:
        params = f'{loaded.params} vmactor.script="started;ready;serve"'
        return await service.create_vm(replace(loaded, params=params, disks=tuple(disks)))


async def run_in(vm: VirtualMachine, program: str) -> Any:
    """Run a Python program in a guest; returns what it left in ``/tmp/result``, as JSON."""
    assert await agent(vm, f"write /tmp/program exec(bytes.fromhex('{program.encode().hex()}'))") == "ok"
    assert await agent(vm, "exec python3 /tmp/program") == "ok 0"
    return json.loads((await agent(vm, "read /tmp/result")).removeprefix("ok "))


async def look(guest_dir: Path, *disks: DiskImage) -> Any:
    """Have a guest look at its disks, and write to them wherever it can."""
    async with (
        VirtualizationService(vmm="qemu") as service,
        await python_guest(service, guest_dir, list(disks)) as vm,
    ):
        with vm.events() as events:
            await vm.start()
            await until(events, "payload_ready")
        return await run_in(vm, IN_THE_GUEST)


async def test_a_guest_sees_every_partition_and_its_writes_reach_the_writable_files_and_nothing_else(
    short_dir: Path, guest_dir: Path, opened: ExitStack
) -> None:
    files = {name: Files(short_dir / name, opened, rows) for name, rows in DISKS.items()}
    told = await look(
        guest_dir,
        DiskImage(writable=True, partitions=files["vda"].parts),
        DiskImage(partitions=files["vdb"].parts),
    )
    opened.close()  # with the locks of a QEMU that was killed, which belong to the open files
    for name, refusal in (("vda", "Input/output error"), ("vdb", "Operation not permitted")):
        assert list(told[name]["partitions"]) == list(DISKS[name])
        assert told[name]["table"] == told[name]["backup"] == refusal
        for number, (label, (_, writable, _)) in enumerate(DISKS[name].items()):
            seen, disk = told[name]["partitions"][label], files[name]
            assert (seen["size"], seen["sha256"]) == disk.seen(label)
            if writable and name == "vda":
                assert seen["written"] == [1536, 1536]
                between = disk.before[label][1536:-1536]
                assert disk.now(label) == pattern(number) + between + pattern(number)
            else:
                assert seen["written"] == [refusal] * 2
                assert disk.untouched(label)


async def test_128_partitions_are_one_disk_and_no_descriptor_of_a_read_only_one_can_write(
    short_dir: Path, guest_dir: Path, opened: ExitStack
) -> None:
    parts = []
    for number in range(128):
        path = short_dir / str(number)
        path.write_bytes(bytes([number]) * 4000)
        # Lent for reading and writing, as by a client that does not care.
        parts.append(Partition(f"p{number}", opened.enter_context(path.open("r+b"))))
    last = short_dir / "127"
    last.write_bytes(bytes([127]) * 4096)
    parts[-1] = replace(parts[-1], writable=True)
    disk = DiskImage(writable=True, partitions=parts)
    with configuration(guest_dir, "hang", disks=[disk]) as config:
        async with guest(short_dir, config) as it:
            await it.vmm.wait_running()

            (block,) = await it.vmm._qmp.execute("query-block")
            assert block["inserted"]["image"]["virtual-size"] == 20480 + 128 * 4096 + 20480
            for number in range(128):
                for step in ("write", "write -z", "discard"):
                    line = f'qemu-io disk0 "{step} {20480 + number * 4096} 4096"'
                    await it.vmm._qmp.execute("human-monitor-command", {"command-line": line})
            modes: dict[str, set[int]] = {}
            for info in Path(f"/proc/{it.vmm.pid}/fdinfo").iterdir():
                target = Path(f"/proc/{it.vmm.pid}/fd/{info.name}").readlink()
                if target.parent == short_dir:
                    flags = int(info.read_text().split()[3], 8)
                    modes.setdefault(target.name, set()).add(flags & os.O_ACCMODE)
    assert modes.pop("127") == {os.O_RDWR}
    assert modes == {str(number): {os.O_RDONLY} for number in range(127)}
    for number in range(127):
        assert (short_dir / str(number)).read_bytes() == bytes([number]) * 4000
    assert last.read_bytes() != bytes([127]) * 4096


@pytest.fixture
def block_device(short_dir: Path) -> Iterator[Path]:
    """A loop device of 1 MiB."""
    image = short_dir / "image"
    image.write_bytes(b"d" * (1 << 20))
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", image], capture_output=True, text=True, check=False
        )
    except OSError as error:
        pytest.skip(f"no losetup: {error}")
    if done.returncode:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("begin", [None, 20480])
async def test_block_devices_can_be_disks_and_partitions(
    short_dir: Path, guest_dir: Path, block_device: Path, begin: int | None
) -> None:
    with block_device.open("r+b", buffering=0) as device:
        part = Partition("a", device, writable=True)
        disk = (
            DiskImage(device, writable=True) if begin is None else DiskImage(writable=True, partitions=[part])
        )
        config = configuration(guest_dir, "hang", disks=[disk])
    with config:
        async with guest(short_dir, config) as it:
            await it.vmm.wait_running()
            if begin is not None:  # the monitor may not write to the other disk beside the guest
                line = f'qemu-io disk0 "write -P 1 {begin} 4096"'
                await it.vmm._qmp.execute("human-monitor-command", {"command-line": line})
            (block,) = await it.vmm._qmp.execute("query-block")
    assert block["inserted"]["image"]["virtual-size"] == (1 << 20) + (2 * begin if begin else 0)
    if begin is not None:
        assert block_device.read_bytes()[:8192] == b"\1" * 4096 + b"d" * 4096
