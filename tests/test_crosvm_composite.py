"""What crosvm inherits for a disk of partitions, looked at in the process of the stand-in."""

import os
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.host_facts import HEAD_OPTIONS, crosvm, facts
from tests.test_crosvm_vmm import Place, standin
from vmactor.config import DiskImage, Partition
from vmactor.errors import ImageError, UnsupportedOperationError
from vmactor.images import gpt
from vmactor.images.composite import read_specification
from vmactor.vmm.crosvm import CrosvmDriver

pytestmark = pytest.mark.anyio


async def test_crosvm_inherits_a_specification_and_every_piece_that_it_names_with_no_more_rights_than_due(
    short_dir: Path,
) -> None:
    contents = {"a": b"A" * 5000, "b": b"B" * 8192, "c": b"C" * 4096}
    with ExitStack() as stack:
        parts = []
        for label, data in contents.items():
            (short_dir / label).write_bytes(data)
            # All of them can be written; which may be is for the configuration to say.
            file = stack.enter_context((short_dir / label).open("r+b"))
            parts.append(Partition(label, file, writable=label == "b"))
        place = Place(short_dir, stack)
        build = replace(standin(short_dir), commands=frozenset({"create_composite"}))
        disk = DiskImage(writable=True, partitions=parts)
        vmm = await CrosvmDriver(facts(crosvm=build)).spawn(place.launch({}, disks=[disk]))
        try:
            await vmm.wait_running()
            process = Path(f"/proc/{vmm.pid}")
            found = re.search(rb"path=/proc/self/fd/(\d+),ro=false", (process / "cmdline").read_bytes())
            assert found is not None
            specification = read_specification((process / "fd" / found[1].decode()).read_bytes())
            seen, writable = b"", []
            for extent, length in zip(specification.extents, specification.lengths(), strict=True):
                number = Path(extent.path).name
                assert extent.path == f"/proc/self/fd/{number}"
                flags = int((process / "fdinfo" / number).read_text().split()[3], 8)
                assert (flags & os.O_ACCMODE == os.O_RDWR) is extent.writable
                assert not flags & os.O_CLOEXEC
                piece = (process / "fd" / number).read_bytes()[:length]
                assert len(piece) == length
                seen += piece
                writable += [piece] if extent.writable else []
        finally:
            await vmm.aclose()
    assert writable == [contents["b"]]
    assert len(seen) == specification.size
    table = gpt.read(lambda offset, size: seen[offset : offset + size])
    assert table is not None
    for entry in table.entries:
        data = seen[entry.offset : entry.offset + entry.size]
        assert data == contents[entry.label].ljust(len(data), b"\0")


async def test_a_disk_that_cannot_be_put_together_is_refused_before_anything_is_spawned(
    short_dir: Path,
) -> None:
    (short_dir / "odd").write_bytes(bytes(100))
    with ExitStack() as stack:
        file = stack.enter_context((short_dir / "odd").open("r+b"))
        place = Place(short_dir, stack)
        launch = place.launch({}, disks=[DiskImage(partitions=[Partition("a", file, writable=True)])])
        with pytest.raises(UnsupportedOperationError, match="composite-disk"):
            await CrosvmDriver(facts(crosvm=crosvm(HEAD_OPTIONS))).spawn(launch)
        build = replace(standin(short_dir), commands=frozenset({"create_composite"}))
        with pytest.raises(ImageError, match='Read-write partition "a" size is not a multiple of 4096'):
            await CrosvmDriver(facts(crosvm=build)).spawn(launch)
        assert not (short_dir / "control").exists()
