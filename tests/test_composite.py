"""Composite disks: layout, specification file and table, against crosvm's bytes and foreign tools."""

import itertools
import json
import os
import subprocess
import zlib
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.config import Partition
from vmactor.errors import IllegalArgumentError, ImageError
from vmactor.images import gpt
from vmactor.images.composite import (
    MAX_COMPONENTS,
    MAX_SPECIFICATION,
    Extent,
    Layout,
    Made,
    Part,
    Plan,
    Specification,
    assemble,
    crosvm_image,
    plan,
    read_specification,
    write_specification,
)

LAYOUTS = list(Layout)
PROTO = """syntax = "proto3";
enum ReadWriteCapability { READ_ONLY = 0; READ_WRITE = 1; }
message ComponentDisk {
  string file_path = 1; uint64 offset = 2; ReadWriteCapability read_write_capability = 3;
  uint64 file_offset = 4;
}
message CompositeDisk { uint64 version = 1; repeated ComponentDisk component_disks = 2; uint64 length = 3; }
"""


def counted() -> Callable[[], UUID]:
    numbers = itertools.count(1)
    return lambda: UUID(int=next(numbers) << 64 | 1 << 127)


def whole(planned: Plan, contents: dict[int, bytes]) -> bytes:
    """The disk as a guest sees it."""
    made = {Made.HEADER: planned.header, Made.FOOTER: planned.footer, Made.FILLER: bytes(4096)}
    disk = b""
    for component in planned.components:
        assert component.offset == len(disk)
        source = component.source
        data = made[source] if isinstance(source, Made) else contents[source]
        disk += data[: component.length]
        assert len(disk) == component.offset + component.length
    assert len(disk) == planned.size
    return disk


def reader(disk: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: disk[offset : offset + size]


# -- Layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "size", "last_usable", "backup", "footer"),
    [(Layout.PADDING_FIRST, 49152, 62, 95, 20480), (Layout.PADDING_LAST, 65536, 55, 88, 36864)],
)
def test_one_partition_of_8192_bytes_is_laid_out_as_in_crosvms_two_versions(
    layout: Layout, size: int, last_usable: int, backup: int, footer: int
) -> None:
    planned = plan([Part("a", 8192)], layout=layout)
    (entry,) = planned.table.entries
    assert (entry.first, entry.last) == (40, 55)
    assert (planned.table.first_usable, planned.table.last_usable, planned.table.backup) == (
        40,
        last_usable,
        backup,
    )
    assert (planned.size, len(planned.header), len(planned.footer)) == (size, 20480, footer)


def test_header_and_footer_are_the_bytes_of_the_format() -> None:
    planned = plan([Part("boot", 4096, guid=UUID("00112233-4455-6677-8899-aabbccddeeff"))], guids=counted())
    # 4096 bytes at sector 40; the backup begins 3584 bytes behind their end; 45056 bytes, 88 sectors.
    entry = bytes.fromhex(
        "af3dc60f 8384 7247 8e79 3d69d8477de4 33221100 5544 7766 8899 aabbccddeeff"
        "2800000000000000 2f00000000000000 0000000000000000 62006f006f007400".replace(" ", "")
    ).ljust(128, b"\0")
    entries = entry.ljust(16384, b"\0")

    def header(own: int, other: int) -> bytes:
        before = b"EFI PART" + bytes.fromhex("00000100 5c000000")
        after = bytes(4) + own.to_bytes(8, "little") + other.to_bytes(8, "little")
        after += (40).to_bytes(8, "little") + (54).to_bytes(8, "little")
        after += UUID(int=1 << 64 | 1 << 127).bytes_le + (2).to_bytes(8, "little")
        after += (128).to_bytes(4, "little") * 2 + zlib.crc32(entries).to_bytes(4, "little")
        return (before + zlib.crc32(before + bytes(4) + after).to_bytes(4, "little") + after).ljust(
            512, b"\0"
        )

    mbr = bytes(446) + bytes.fromhex("00000000 ee000000 01000000 58000000") + bytes(48) + b"\x55\xaa"
    assert planned.header == mbr + header(1, 87) + entries + bytes(3072)
    assert planned.footer == bytes(3584) + entries + header(87, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20000), st.booleans()), min_size=1, max_size=128),
)
def test_any_partitions_are_found_again_where_they_were_put(
    layout: Layout, sizes: list[tuple[int, bool]]
) -> None:
    parts = [
        Part(f"part-{number}", size * 4096 if writable else size, writable)
        for number, (size, writable) in enumerate(sizes)
    ]
    planned = plan(parts, layout=layout)
    assert planned.components[0].source is Made.HEADER
    assert planned.components[-1].source is Made.FOOTER
    end = 0
    for component in planned.components:
        assert component.offset == end
        assert component.length > 0
        end += component.length
    assert end == planned.size
    assert planned.size % (4096 if layout is Layout.PADDING_FIRST else 65536) == 0
    found = gpt.read(reader(planned.header))
    assert found == planned.table
    starts = {component.source: component.offset for component in planned.components}
    for number, (part, entry) in enumerate(zip(parts, found.entries, strict=True)):
        assert (entry.label, entry.offset, entry.offset % 4096) == (part.label, starts[number], 0)
        assert part.size <= entry.size < part.size + 4096
    assert len({entry.guid for entry in found.entries} | {found.guid}) == len(parts) + 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Part("a", 4097, writable=True)], 'Read-write partition "a" size is not a multiple of 4096'),
        ([Part("a", 0)], 'Partition "a" is empty'),
        ([Part("a", 1 << 41)], "less than 2 TiB"),
    ],
)
def test_sizes_that_cannot_be_are_refused(parts: list[Part], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        plan(parts)


@pytest.mark.parametrize("labels", [[], ["a", "a"], [""], ["x" * 37], [f"{n}" for n in range(129)]])
def test_labels_that_cannot_be_are_refused(labels: list[str]) -> None:
    with pytest.raises(IllegalArgumentError):
        plan([Part(label, 4096) for label in labels])


# -- Foreign tools ------------------------------------------------------------------------------------


def disk_file(folder: Path, layout: Layout) -> tuple[Path, list[Part], Plan]:
    parts = [
        Part("boot", 12345),
        Part("Grüße, \N{GRINNING FACE}", 65536, writable=True),
        Part("x" * 36, 4096, guid=UUID("00112233-4455-6677-8899-aabbccddeeff")),
    ]
    planned = plan(parts, layout=layout)
    path = folder / "disk"
    path.write_bytes(whole(planned, {n: b"\xa5" * part.size for n, part in enumerate(parts)}))
    return path, parts, planned


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sfdisk_reads_every_partition_from_the_table(tmp_path: Path, layout: Layout) -> None:
    path, parts, planned = disk_file(tmp_path, layout)
    done = subprocess.run(["sfdisk", "--json", path], capture_output=True, text=True, check=True)
    table = json.loads(done.stdout)["partitiontable"]
    assert (table["label"], table["id"]) == ("gpt", str(planned.table.guid).upper())
    assert (table["firstlba"], table["lastlba"]) == (40, planned.table.last_usable)
    for part, entry, row in zip(parts, planned.table.entries, table["partitions"], strict=True):
        assert (row["name"], row["start"] * 512, row["size"] * 512) == (part.label, entry.offset, entry.size)
        assert row["type"] == "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
        assert row["uuid"] == str(entry.guid).upper()


def test_sgdisk_finds_no_problem_in_a_disk(tmp_path: Path) -> None:
    path, _, _ = disk_file(tmp_path, Layout.PADDING_FIRST)
    done = subprocess.run(["sgdisk", "--verify", path], capture_output=True, text=True, check=True)
    assert "No problems found" in done.stdout, done.stdout
    assert not done.stderr


def test_protoc_reads_the_specification_file(tmp_path: Path) -> None:
    extents = (
        Extent("/proc/self/fd/7", 0),
        Extent("/srv/a b,c:d/\N{GRINNING FACE}", 20480, writable=True),
        Extent("relative", 1 << 40, file_offset=512),
    )
    (tmp_path / "cdisk_spec.proto").write_text(PROTO)
    done = subprocess.run(
        ["protoc", f"-I{tmp_path}", "--decode=CompositeDisk", "cdisk_spec.proto"],
        input=write_specification(Specification(extents, 1 << 41))[15:],
        capture_output=True,
        check=True,
    )
    assert (
        done.stdout.decode().split()
        == (
            "version: 2 "
            'component_disks { file_path: "/proc/self/fd/7" } '
            'component_disks { file_path: "/srv/a b,c:d/\\360\\237\\230\\200" offset: 20480 '
            "read_write_capability: READ_WRITE } "
            f'component_disks {{ file_path: "relative" offset: {1 << 40} file_offset: 512 }} '
            f"length: {1 << 41}"
        ).split()
    )


def test_what_protoc_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "cdisk_spec.proto").write_text(PROTO)
    text = 'length: 99 component_disks { offset: 9 file_path: "b" read_write_capability: READ_WRITE }'
    done = subprocess.run(
        ["protoc", f"-I{tmp_path}", "--encode=CompositeDisk", "cdisk_spec.proto"],
        input=(text + ' component_disks { file_path: "a" } version: 1').encode(),
        capture_output=True,
        check=True,
    )
    read = read_specification(b"composite_disk\x1d" + done.stdout)
    assert read == Specification((Extent("a", 0), Extent("b", 9, writable=True)), 99)
    assert list(read.lengths()) == [9, 90]


# -- Specification files ------------------------------------------------------------------------------

EXAMPLE = bytes.fromhex(
    "636f6d706f736974655f6469736b1d0802 12060a042f742f68 120c0a042f742f701080a0011801"
    "120a0a042f742f661080e001 18808003"
)
"""Three components, as the description of crosvm's format has them."""


def test_a_specification_file_has_the_bytes_of_crosvms() -> None:
    specification = Specification(
        (Extent("/t/h", 0), Extent("/t/p", 20480, writable=True), Extent("/t/f", 28672)), 49152
    )
    assert write_specification(specification) == EXAMPLE
    assert read_specification(EXAMPLE) == specification


def test_a_path_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(ImageError, match=r'UTF-8 only, and "/a\\xff" is not'):
        write_specification(Specification((Extent(os.fsdecode(b"/a\xff"), 0),), 1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"composite_disk\x1c", "magic"),
        (b"composite_disk\x1d", "0 components"),
        (b"composite_disk\x1d\x08\x03", "version 3"),
        (b"composite_disk\x1d\xff", "no protocol buffer"),
        (EXAMPLE[:-1], "no protocol buffer"),
        (EXAMPLE[:-4], "length of 0"),
        (EXAMPLE + b"\x18\x01", "length of 1 "),
        (EXAMPLE + b"\x18" + b"\xff" * 9 + b"\x01", "length of 18446744073709551615"),
        (EXAMPLE + b"\x12\x02\x10\x00", "two components at offset 0"),
        (EXAMPLE[:15] + EXAMPLE[25:], "nothing at its beginning"),
        (EXAMPLE + b"\x12\x02\x10\x01" * MAX_COMPONENTS, "1027 components"),
        (EXAMPLE + bytes(MAX_SPECIFICATION), "more than 1048576 bytes"),
        (EXAMPLE[:15] + b"\x12\x03\x0a\x01\xff", "no protocol buffer"),
    ],
)
def test_a_broken_specification_file_is_a_typed_error(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read_specification(data)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=40).map(lambda tail: EXAMPLE + tail)))
def test_any_bytes_are_a_specification_or_a_typed_error(data: bytes) -> None:
    with suppress(ImageError):
        read = read_specification(data if data.startswith(EXAMPLE) else EXAMPLE[:15] + data)
        assert all(length > 0 for length in read.lengths())


# -- Tables -------------------------------------------------------------------------------------------


def test_a_disk_without_a_table_has_none() -> None:
    for disk in (b"", bytes(511), bytes(4096)):
        assert gpt.read(reader(disk)) is None


@given(st.data())
def test_any_change_of_a_table_is_another_table_or_a_typed_error(data: st.DataObject) -> None:
    header = bytearray(plan([Part("a", 4096), Part("b", 8192)], guids=counted()).header)
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(512, 1300))] = data.draw(st.integers(0, 255))
    repair = data.draw(st.booleans())
    if repair:  # a hostile writer knows how to make checksums
        size = int.from_bytes(header[524:528], "little")
        header[600:604] = zlib.crc32(header[1024:17408]).to_bytes(4, "little")
        header[528:532] = bytes(4)
        header[528:532] = zlib.crc32(header[512 : 512 + min(size, 512)]).to_bytes(4, "little")
    with suppress(ImageError):
        table = gpt.read(reader(bytes(header)))
        assert table is None or all(entry.size > 0 for entry in table.entries)


def forged(change: Callable[[bytearray], None]) -> bytes:
    """A table with something changed and checksums that fit."""
    header = bytearray(plan([Part("a", 4096), Part("b", 8192)], guids=counted()).header)
    change(header)
    header[600:604] = zlib.crc32(header[1024:17408]).to_bytes(4, "little")
    header[528:532] = bytes(4)
    header[528:532] = zlib.crc32(header[512:604]).to_bytes(4, "little")
    return bytes(header)


def put(offset: int, value: int, size: int = 8) -> Callable[[bytearray], None]:
    def change(header: bytearray) -> None:
        header[offset : offset + size] = value.to_bytes(size, "little")

    return change


@pytest.mark.parametrize(
    ("disk", "message"),
    [
        (forged(put(512 + 24, 2)), "belongs somewhere else"),
        (forged(put(512 + 72, 1)), "belongs somewhere else"),
        (forged(put(512 + 72, 1 << 60)), "belongs somewhere else"),
        (forged(put(512 + 72, 1 << 50)), "middle of its entries"),
        (forged(put(512 + 80, 1 << 31, 4)), "2147483648 entries of 128 bytes"),
        (forged(put(512 + 84, 0, 4)), "128 entries of 0 bytes"),
        (forged(put(512 + 84, 127, 4)), "128 entries of 127 bytes"),
        (forged(put(1024 + 32, 39)), "sectors 39 to 47"),
        (forged(put(1024 + 40, 1 << 60)), "sectors 40 to 1152921504606846976"),
        (forged(put(1024 + 40, 39)), "sectors 40 to 39"),
        (forged(put(1024 + 40, 48)), '"a" and "b" in one place'),
        (forged(put(512 + 12, 1, 4))[:1024], "header has 1 bytes"),
        (forged(lambda _: None)[:600], "middle of its header"),
        (forged(lambda _: None)[:2000], "middle of its entries"),
    ],
)
def test_a_broken_table_is_a_typed_error(disk: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        gpt.read(reader(disk))


# -- Descriptors --------------------------------------------------------------------------------------


def test_an_assembled_disk_has_the_guids_of_its_partitions(tmp_path: Path) -> None:
    guid = UUID("00112233-4455-6677-8899-aabbccddeeff")
    (tmp_path / "p").write_bytes(b"A" * 4096)
    with ExitStack() as opened:
        file = opened.enter_context((tmp_path / "p").open("rb"))
        parts = [Partition("a", file, guid=str(guid)), Partition("b", file)]
        composite = assemble(parts, opened, guids=counted())
        planned = plan([Part("a", 4096, guid=guid), Part("b", 4096)], guids=counted())
        header = composite.pieces[0]
        assert os.pread(header.fd, header.length, 0) == planned.header
        assert guid.bytes_le in planned.header


def test_a_guid_is_on_a_disk_once() -> None:
    twice = [Part(label, 4096, guid=UUID(int=7)) for label in "ab"]
    with pytest.raises(IllegalArgumentError, match="duplicate partition GUID"):
        plan(twice, guids=counted())


def test_an_assembled_disk_is_the_one_that_was_planned_and_crosvm_finds_every_piece_of_it(
    tmp_path: Path,
) -> None:
    contents = [b"A" * 100, b"B" * 8192]
    with ExitStack() as opened:
        parts = []
        for number, data in enumerate(contents):
            path = tmp_path / str(number)
            path.write_bytes(data)
            parts.append(Partition(f"p{number}", opened.enter_context(path.open("r+b")), bool(number)))
        composite = assemble(parts, opened, guids=counted())
        planned = plan([Part("p0", 100), Part("p1", 8192, writable=True)], guids=counted())
        expected = whole(planned, dict(enumerate(contents)))
        assert composite.size == len(expected)

        image = crosvm_image(composite, opened)
        specification = read_specification(os.pread(image, 4096, 0))
        assert specification.size == len(expected)
        seen = b""
        for extent, length in zip(specification.extents, specification.lengths(), strict=True):
            fd = int(extent.path.removeprefix("/proc/self/fd/"))
            assert fd in composite.fds()
            assert extent.writable == (fd == parts[1].image)
            seen += os.pread(fd, length, 0)
        assert seen == expected


def test_what_is_made_for_a_disk_cannot_be_changed_by_anybody(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(bytes(100))
    with ExitStack() as opened:
        part = opened.enter_context((tmp_path / "part").open("rb"))
        composite = assemble([Partition("a", part)], opened)
        made = {*composite.fds(), crosvm_image(composite, opened)} - {part.fileno()}
        assert len(made) == 4  # header, zeros, footer, specification
        for fd in made:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError), Path(f"/proc/self/fd/{fd}").open("r+b", buffering=0) as file:
                file.write(b"x")
            with pytest.raises(PermissionError):
                os.truncate(f"/proc/self/fd/{fd}", 0)
