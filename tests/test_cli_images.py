"""``vmactor create-partition`` and ``vmactor image info``."""

import json
import os
import pty
import stat
from pathlib import Path

import pytest

from tests.cli_process import Cli, cli
from tests.images import extension, qcow2_header, qemu_img, qemu_info
from vmactor.cli import parser
from vmactor.cli.image import bytes_for_people, describe, for_people
from vmactor.errors import ImageError

__all__ = ["cli"]


def test_a_partition_is_made_and_described(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "store"
    status, out, err = cli.run("create-partition", path, "10M", "--type", "encryptedstore")
    assert (status, out, err) == (
        0,
        f"{path}: a partition of 10 MiB (10485760 bytes), type encryptedstore\n",
        "",
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "No errors" in qemu_img("check", "-f", "qcow2", path)
    assert qemu_info(path)["virtual-size"] == 10 << 20
    status, out, err = cli.run("image", "info", path)
    assert (status, err) == (0, "")
    assert [line.split(maxsplit=1) for line in out.splitlines()[1:3]] == [
        ["file", str(path)],
        ["kind", "QCOW2 image"],
    ]
    status, out, err = cli.run("image", "info", "--json", path)
    assert (status, err) == (0, "")
    assert json.loads(out) | {"qcow2": None} == {
        "file": str(path),
        "kind": "qcow2",
        "virtual_size": 10 << 20,
        "file_size": 6 << 16,
        "allocated_size": path.stat().st_blocks * 512,
        "qcow2": None,
    }


def test_the_command_line_has_json_for_programs(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"p\xff")
    status, out, _ = cli.run("create-partition", path, "1", "--json")
    assert status == 0
    assert json.loads(out) == {"path": f"{tmp_path}/p\\xff", "type": "raw", "virtual_size": 4096}


def test_a_file_that_exists_is_kept_and_a_failure_leaves_none(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    status, out, err = cli.run("create-partition", path, "10M")
    assert (status, out) == (1, "")
    assert err == f'vmactor: error: Failed to create "{path}": it exists; remove it, or choose another name\n'
    assert path.read_text() == "mine"
    status, _, err = cli.run("create-partition", tmp_path / "new", "0", "--type", "instance")
    assert status == 1
    assert "PartitionType(1): size 0 has no room" in err
    status, _, err = cli.run("create-partition", tmp_path / "none" / "new", "1M")
    assert status == 1
    assert "No such file or directory" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("1k", 1024), ("10M", 10 << 20), ("3G", 3 << 30), ("16T", 16 << 40)],
)
def test_sizes_are_bytes_or_have_a_unit(text: str, size: int) -> None:
    assert parser.build().parse_args(["create-partition", "path", text]).size == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5M", "10MB", "0x10", "1 M", "१", "1P", "9" * 5000])
def test_what_is_no_size_is_told(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.build().parse_args(["create-partition", "path", text])
    error = capsys.readouterr().err
    assert "write 10485760 or 10M" in error or "expected" in error or "required" in error


def test_foreign_names_are_escaped_for_people_and_whole_for_programs(tmp_path: Path) -> None:
    path = tmp_path / "evil"
    header = bytearray(qcow2_header(extension(0x44415441, b"[d]\x07"), backing_offset=200, backing_length=9))
    header[200:209] = b"a\x1b[2J\n\xff.b"
    path.write_bytes(header)
    found = describe(path)
    assert found["qcow2"]["backing_file"] == "a\x1b[2J\n\\xff.b"
    assert found["qcow2"]["data_file"] == "[d]\x07"
    text = for_people(found, -1)
    assert "backing file    a\\x1b[2J\\n\\\\xff.b\n" in text
    assert "data file       [d]\\x07\n" in text
    master, terminal = pty.openpty()
    try:
        assert "\x1b[2J" not in for_people(found, terminal)
    finally:
        os.close(master)
        os.close(terminal)


def test_other_kinds_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(5000))
    (tmp_path / "zstd").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    assert "raw image" in for_people(describe(tmp_path / "raw"), -1)
    assert "4.9 KiB (5000 bytes)" in for_people(describe(tmp_path / "raw"), -1)
    zstd = describe(tmp_path / "zstd")
    assert (zstd["kind"], zstd["virtual_size"]) == ("zstd", None)
    assert "unknown" in for_people(zstd, -1)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "broken").write_bytes(b"QFI\xfb")
    for name, message in (
        ("none", r'Failed to open ".*/none": No such file'),
        ("fifo", "/fifo: is neither a regular file nor a block device"),
        (".", ": is neither a regular file nor a block device"),
        ("broken", "/broken: is a broken QCOW2 image"),
    ):
        with pytest.raises(ImageError, match=message):
            describe(tmp_path / name)


def test_sizes_are_said_in_the_unit_that_fits() -> None:
    assert bytes_for_people(0) == "0 bytes"
    assert bytes_for_people(1023) == "1023 bytes"
    assert bytes_for_people(1024) == "1 KiB (1024 bytes)"
    assert bytes_for_people(1536) == "1.5 KiB (1536 bytes)"
    assert bytes_for_people((1 << 63) - 1) == "8.0 EiB (9223372036854775807 bytes)"
