"""Real QEMU guests with disks made of partitions: what they see, and what their writes reach."""

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from tests.guests import agent, until
from vmactor import VirtualizationService, VirtualMachine
from vmactor.config import DiskImage, Partition
from vmactor.config_file import load_config

pytestmark = [pytest.mark.anyio, pytest.mark.guest]

KIB: Final = 1024
# As long as can be, and ASCII: the kernel shows no other letters as they are.
ODD_LABEL: Final = 'thirty-six units, it is a "label" %\\'
SIZES: Final = {
    "first": (64 * KIB, True),
    "read-only": (40 * KIB + 1, False),
    "middle": (4 * KIB, True),
    ODD_LABEL: (513, False),
    "almost a page": (4095, False),
    "last": (1024 * KIB, True),
}

IN_THE_GUEST: Final = """
import json, os, sys
from _sha256 import sha256

def content(path):
    with open(path, "rb") as file:
        return file.read()

def put(path, offset, data):
    fd = os.open(path, os.O_RDWR | os.O_SYNC)
    try:
        done = os.pwrite(fd, data, offset)
        os.fsync(fd)
        return done
    except OSError as error:
        return error.strerror
    finally:
        os.close(fd)

seen = {}
sectors = int(content("/sys/block/vda/size"))
for name in sorted(os.listdir("/sys/block/vda"), key=lambda name: (len(name), name)):
    if not name.startswith("vda"):
        continue
    uevent = content("/sys/block/vda/" + name + "/uevent").decode()
    label = [line[9:] for line in uevent.splitlines() if line.startswith("PARTNAME=")][0]
    data = content("/dev/" + name)
    pattern = bytes((n * 31 + len(seen)) % 251 for n in range(1536))
    seen[label] = {
        "size": len(data),
        "sha256": sha256(data).hexdigest(),
        "written": [put("/dev/" + name, 0, pattern), put("/dev/" + name, len(data) - 1536, pattern)],
    }
result = {
    "partitions": seen,
    "table": put("/dev/vda", 512, bytes(512)),
    "backup": put("/dev/vda", (sectors - 1) * 512, bytes(512)),
    "size": sectors * 512,
}
with open("/tmp/result", "w") as file:
    json.dump(result, file)
"""


def pattern(number: int) -> bytes:
    """What the guest writes to both ends of a partition."""
    return bytes((n * 31 + number) % 251 for n in range(1536))


class Files:
    """The files behind a disk, each filled with what only it has."""

    def __init__(self, folder: Path, opened: ExitStack, sizes: dict[str, tuple[int, bool]]) -> None:
        self.before = {label: random.Random(label).randbytes(size) for label, (size, _) in sizes.items()}
        self.paths = {label: folder / str(number) for number, label in enumerate(sizes)}
        self.parts = []
        for label, (_, writable) in sizes.items():
            self.paths[label].write_bytes(self.before[label])
            # Descriptors that can write, all of them: what may be written is for the configuration to say.
            file = opened.enter_context(self.paths[label].open("r+b"))
            self.parts.append(Partition(label, file, writable))

    def now(self, label: str) -> bytes:
        return self.paths[label].read_bytes()

    def seen(self, label: str) -> tuple[int, str]:
        """Size and digest of what a guest shall see."""
        data = self.before[label]
        padded = data + bytes(-len(data) % 4096)
        return len(padded), sha256(padded).hexdigest()


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


async def look(guest_dir: Path, disk: DiskImage) -> Any:
    """Have a guest look at a disk, and write to it wherever it can."""
    async with (
        VirtualizationService(vmm="qemu") as service,
        await python_guest(service, guest_dir, [disk]) as vm,
    ):
        with vm.events() as events:
            await vm.start()
            await until(events, "payload_ready")
        return await run_in(vm, IN_THE_GUEST)


async def test_a_guest_sees_every_partition_and_its_writes_reach_the_writable_files_and_nothing_else(
    short_dir: Path, guest_dir: Path, opened: ExitStack
) -> None:
    files = Files(short_dir, opened, SIZES)
    told = await look(guest_dir, DiskImage(writable=True, partitions=files.parts))
    assert list(told["partitions"]) == list(SIZES)
    for number, (label, (size, writable)) in enumerate(SIZES.items()):
        seen = told["partitions"][label]
        assert (seen["size"], seen["sha256"]) == files.seen(label)
        if writable:
            assert seen["written"] == [1536, 1536]
            assert files.now(label) == pattern(number) + files.before[label][1536:-1536] + pattern(number)
        else:
            assert seen["written"] == ["Input/output error"] * 2
            assert files.now(label) == files.before[label]
            assert len(files.now(label)) == size
    assert told["table"] == told["backup"] == "Input/output error"
