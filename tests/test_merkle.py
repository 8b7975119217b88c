"""Merkle trees: known answers, fsverity as the judge, and the processes that make them."""

import hashlib
import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.apks import KNOWN, expected, opened
from vmactor.errors import ApkError, ResourceExhaustedError
from vmactor.images import block_hash, hash_processes
from vmactor.images.merkle import MerkleTree, padded_salt

MIB = 1024 * 1024


def tree_of(path: Path, salt: bytes = b"") -> tuple[str, bytes]:
    """A file's root and tree."""
    with opened(path) as fd, MerkleTree(os.fstat(fd).st_size, padded_salt(salt)) as tree:
        tree.hash_file(fd, lambda _done: None)
        return tree.root.hex(), tree.read(0, tree.size)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Several stripes, the last of them not whole, none like another."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(hashlib.shake_256(bytes([n])).digest(MIB) for n in range(5)) + b"the end")
    return path


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes even for small files, and two of them on any machine."""
    monkeypatch.setattr(hash_processes, "PARALLEL_SIZE", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})


@pytest.mark.parametrize("row", expected("merkle"))
def test_trees_of_the_known_files_are_the_known_ones(row: dict[str, Any]) -> None:
    root, tree = tree_of(KNOWN / row["input"], bytes.fromhex(row["salt"]))
    assert (root, len(tree)) == (row["root_hash"], row["tree_size"])
    assert tree == (KNOWN / f"{row['input']}.hash").read_bytes()


@pytest.mark.parametrize(
    ("content", "size", "root"),
    [
        (b"", 0, "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7"),
        (b"a" * 4096, 0, "c93eee2d0db02f10acc7460d9576e122dcf8cd53c4bf8dfcae1b3e74ebcfff5a"),
        (b"a" * 4097, 4096, "fbefecdaeada2570cb6d79dc81e17b3b8557d952a26d1a0a075551295f48c89c"),
        (b"a" * 524288, 4096, "91e381d0ef54a80282219d61ad16dcbb6511146de08b878cbea67b21185b586b"),
        (b"a" * 524289, 12288, "06c5c055a1641a22ffe97d32c3289ecde4fc264b09c016efb0b6400286283b96"),
    ],
)
def test_sizes_around_a_block_and_a_level_have_the_references_roots(
    tmp_path: Path, content: bytes, size: int, root: str
) -> None:
    (tmp_path / "file").write_bytes(content)
    found, tree = tree_of(tmp_path / "file")
    assert (found, len(tree)) == (root, size)


def fsverity(path: Path, salt: bytes) -> tuple[str, bytes]:
    """The file's digest and tree, by Debian's program."""
    salted = [f"--salt={salt.hex()}"] if salt else []
    tree = path.with_suffix(".tree")
    done = subprocess.run(
        ["fsverity", "digest", "--compact", f"--out-merkle-tree={tree}", *salted, path],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip(), tree.read_bytes()


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize(
    ("size", "salt"),
    [
        (1, b""),
        (4096, b"salt"),
        (4097, bytes(range(32))),
        (128 * 4096 + 1, b"salt"),
        (3 * MIB - 1, b""),
        (70 * MIB + 1, b""),  # three levels
    ],
)
def test_fsverity_makes_the_same_tree_and_root(tmp_path: Path, size: int, salt: bytes) -> None:
    path = tmp_path / "file"
    with path.open("wb") as out:  # mostly a hole, which reads as zeros
        for place in range(0, size, 333_333):
            out.seek(place)
            out.write(struct.pack("<I", place)[: size - place])
        out.truncate(size)
    root, tree = tree_of(path, salt)
    descriptor = struct.pack("<BBBBIQ64s32s144x", 1, 1, 12, len(salt), 0, size, bytes.fromhex(root), salt)
    assert (hashlib.sha256(descriptor).hexdigest(), tree) == fsverity(path, salt)


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit",
        "import os; os.read(0, 8)",
        "import os; t = os.read(0, 8); os.write(1, t + bytes(31))",
        "import os; os.read(0, 8); os.write(1, bytes([9]) * 9000); os.read(0, 99); os.read(0, 99)",
        "import os; os.write(1, bytes([9]) * 200_000)",
    ],
    ids=["ends", "takes one and ends", "ends within an answer", "answers nonsense", "talks too much"],
)
def test_whatever_processes_do_not_answer_is_hashed_here(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    alone = tree_of(file)
    (tmp_path / "worker.py").write_text(program)
    monkeypatch.setattr(block_hash, "__file__", str(tmp_path / "worker.py"))
    assert tree_of(file) == alone


@pytest.mark.usefixtures("parallel")
def test_where_no_process_can_be_started_everything_is_hashed_here(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tree_of(file)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python3")
    assert tree_of(file) == alone
    monkeypatch.setattr(sys, "executable", "/bin/false")  # a program that embeds the interpreter, say
    assert tree_of(file) == alone


@pytest.mark.usefixtures("parallel")
def test_processes_do_all_the_work_and_progress_only_grows(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("hashed here")

    monkeypatch.setattr(block_hash.BlockHasher, "hash", refuse)
    stripes: dict[int, bytes] = {}
    heard: list[int] = []
    size = file.stat().st_size
    with opened(file) as fd:
        hash_processes.hash_file(fd, size, stripes.__setitem__, heard.append)
    assert sorted(stripes) == list(range(0, size, block_hash.STRIPE))
    assert heard[-1] == size
    assert all(a <= b for a, b in itertools.pairwise(heard))


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("when", [1, 3 * MIB])
def test_an_exception_of_progress_ends_the_work_and_leaves_nothing(file: Path, when: int) -> None:
    class EnoughError(Exception):
        pass

    def enough(done: int) -> None:
        if done >= when:
            raise EnoughError

    with opened(file) as fd, MerkleTree(file.stat().st_size) as tree, pytest.raises(EnoughError):
        tree.hash_file(fd, enough)


@pytest.mark.usefixtures("parallel")
def test_a_file_that_is_shorter_than_it_was_is_an_error(file: Path) -> None:
    with (
        opened(file) as fd,
        MerkleTree(file.stat().st_size + MIB) as tree,
        pytest.raises(ApkError, match="failed to fill whole buffer"),
    ):
        tree.hash_file(fd, lambda _done: None)


def test_without_room_for_a_tree_the_error_names_the_place_to_change() -> None:
    with pytest.raises(ResourceExhaustedError, match="TMPDIR"), MerkleTree(2**62):
        pass


def test_any_way_of_reading_gives_the_same_tree(file: Path) -> None:
    data = file.read_bytes()

    def read(view: memoryview, offset: int) -> None:
        view[:] = data[offset : offset + len(view)]

    for size in (len(data), 4096, 100):
        with MerkleTree(size) as tree:
            tree.hash_input(read)
            found = tree.root.hex(), tree.read(0, tree.size)
        (file.parent / "cut").write_bytes(data[:size])
        assert found == tree_of(file.parent / "cut")
