"""``vmactor create-composite``, and the partitions that ``vmactor image info`` draws."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli_process import Cli, cli
from tests.images import qemu_img
from vmactor.cli.image import describe, draw_bar, draw_partitions
from vmactor.images import gpt
from vmactor.images.composite import Extent, Specification, read_specification, write_specification

__all__ = ["cli"]

GUID = "00112233-4455-6677-8899-aabbccddeeff"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images of three formats' worth of trouble."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").write_bytes(b"o" * 5000)
    (tmp_path / "even").write_bytes(b"e" * 65536)
    qemu_img("create", "-q", "-f", "qcow2", tmp_path / "store", "1M")
    return tmp_path


def test_a_composite_disk_is_made_of_paths_as_crosvms_own_command_makes_it(cli: Cli, folder: Path) -> None:
    status, out, err = cli.run(
        "create-composite",
        "disk",
        "boot:odd",
        "data:even:writable",
        f"s:store:writable:{GUID}",
        "again:odd::",
    )
    assert (status, err) == (0, "")
    assert sorted(path.name for path in folder.glob("disk*")) == [
        "disk",
        "disk.filler",
        "disk.footer",
        "disk.header",
    ]
    assert (folder / "disk.filler").read_bytes() == bytes(4096)
    specification = read_specification((folder / "disk").read_bytes())
    assert specification.extents == (
        Extent(f"{folder}/disk.header", 0),
        Extent(f"{folder}/odd", 20480),
        Extent(f"{folder}/disk.filler", 25480),
        Extent(f"{folder}/even", 28672, writable=True),
        Extent(f"{folder}/store", 94208, writable=True),
        Extent(f"{folder}/odd", 1142784),
        Extent(f"{folder}/disk.filler", 1147784),
        Extent(f"{folder}/disk.footer", 1150976),
    )
    assert specification.size == 1150976 + (folder / "disk.footer").stat().st_size
    header = (folder / "disk.header").read_bytes()
    table = gpt.read(lambda offset, size: header[offset : offset + size])
    assert table is not None
    assert [entry.label for entry in table.entries] == ["boot", "data", "s", "again"]
    assert table.entries[2].guid == UUID(GUID)
    assert "data   28672    64 KiB (65536 bytes)   yes" in out


def test_nothing_that_exists_is_overwritten_and_a_failure_leaves_nothing(cli: Cli, folder: Path) -> None:
    (folder / "disk.footer").write_text("mine")
    before = sorted(folder.iterdir())
    for arguments, message in (
        (["a:even"], 'disk.footer": it exists; remove it'),
        (["a:odd:writable"], 'Read-write partition "a" size is not a multiple of 4096'),
        (["a:even", "a:odd"], 'duplicate GPT partition label "a"'),
        (["a:none"], 'Partition "a": none: cannot be opened: No such file'),
        (["a:."], "is neither a regular file nor a block device"),
        (["x" * 37 + ":even"], "is no partition label"),
        ([f"p{n}:odd" for n in range(129)], "1 to 128 partitions, not 129"),
    ):
        status, out, err = cli.run("create-composite", "disk", *arguments)
        assert (status, out) == (1, "")
        assert message in err
        assert sorted(folder.iterdir()) == before
    assert (folder / "disk.footer").read_text() == "mine"


@pytest.mark.parametrize(
    "part", ["", "a", ":even", "a:", "a:even:ro", "a:even:writable:x", "a:b::" + GUID + ":c"]
)
def test_a_partition_that_cannot_be_understood_is_a_usage_error(cli: Cli, folder: Path, part: str) -> None:
    status, out, err = cli.run("create-composite", folder / "disk", part)
    assert (status, out) == (2, "")
    assert "LABEL:PATH[:writable][:GUID]" in err


def test_image_info_tells_the_partitions_of_a_composite_disk(cli: Cli, folder: Path) -> None:
    assert cli.run("create-composite", "disk", "boot:odd", "data:even:writable", "--json")[0] == 0
    status, out, _ = cli.run("image", "info", "--json", folder / "disk")
    assert status == 0
    assert json.loads(out)["partitions"] == [
        {"label": "boot", "offset": 20480, "size": 8192, "writable": False, "file": f"{folder}/odd"},
        {"label": "data", "offset": 28672, "size": 65536, "writable": True, "file": f"{folder}/even"},
    ]


def test_image_info_tells_the_partitions_of_a_disk_that_sgdisk_made(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    os.truncate(path, 8 << 20)
    subprocess.run(
        ["sgdisk", "-n", "2:4096:8191", "-c", "2:späť", "-n", "1:2048:4095", "-c", "1:boot", path],
        check=True,
        capture_output=True,
    )
    status, out, _ = cli.run("image", "info", "--json", path)
    assert status == 0
    rows = [(part["label"], part["offset"], part["size"]) for part in json.loads(out)["partitions"]]
    assert rows == [("boot", 1 << 20, 1 << 20), ("späť", 2 << 20, 2 << 20)]
    _, out, _ = cli.run("image", "info", path)
    bar = out.splitlines()[-1]
    assert (bar.count("1"), bar.count("2"), bar.count("-")) == (10, 19, 48)


def test_a_table_that_is_broken_is_an_error_and_a_disk_without_one_is_none(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(bytes(512) + b"EFI PART" + bytes(4000))
    status, _, err = cli.run("image", "info", tmp_path / "broken")
    assert status == 1
    assert "has a broken partition table" in err
    (tmp_path / "empty").write_bytes(bytes(65536))
    assert "partitions" not in describe(tmp_path / "empty")


@pytest.mark.parametrize(
    "first", ["/proc/self/fd/0", "/dev/zero", "none", "../" * 40 + "proc/self/mem", "fifo", "\0"]
)
def test_a_composite_disk_that_names_odd_files_is_told_without_labels(tmp_path: Path, first: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    specification = Specification((Extent(first, 0), Extent("\x1b[2Jb", 4096, writable=True)), 8192)
    (tmp_path / "disk").write_bytes(write_specification(specification))
    found = describe(tmp_path / "disk")["partitions"]
    assert [(part["label"], part["file"]) for part in found] == [(None, first), (None, "\x1b[2Jb")]
    with Path(os.devnull).open("wb") as null:
        assert "\x1b" not in draw_partitions(found, 8192, null.fileno())


def spans_of(draw: Any) -> list[tuple[int, int]]:
    spans, at = [], 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 40)), min_size=1)
    ):
        spans.append((at + gap, length))
        at += gap + length
    return spans


@given(st.data(), st.integers(1, 200), st.integers(0, 1 << 40))
def test_a_bar_shows_every_partition_in_its_order_in_lines_that_fit(
    data: st.DataObject, width: int, rest: int
) -> None:
    spans = spans_of(data.draw)
    size = spans[-1][0] + spans[-1][1] + rest
    signs = [chr(0x4E00 + number) for number in range(len(spans))]
    bar = draw_bar(spans, signs, size, width)
    assert all(len(line) <= width for line in bar.splitlines())
    seen = [sign for sign in bar if sign not in "-\n"]
    assert list(dict.fromkeys(seen)) == signs
    assert seen == sorted(seen)
