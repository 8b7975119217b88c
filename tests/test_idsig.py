"""idsig files: known answers, when one is written and when not, what errors leave, pairs that do not fit."""

import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.apks import DIGEST, KNOWN, apk_with, expected, opened, unsigned
from vmactor.errors import ApkError, ResourceExhaustedError
from vmactor.images.idsig import Idsig, check_idsig_file, create_or_update_idsig_file, read_idsig


@pytest.fixture
def apk(tmp_path: Path) -> Path:
    """An APK of some stripes."""
    return apk_with(tmp_path / "app.apk", os.urandom(3_000_000))


@pytest.fixture
def idsig(apk: Path) -> Path:
    """The APK's idsig, made already."""
    path = apk.with_suffix(".idsig")
    assert create(apk, path)
    return path


def create(apk: Path, idsig: Path, flags: int = os.O_RDWR | os.O_CREAT) -> bool:
    """Make or update an idsig; whether it was written."""
    with opened(apk) as apk_fd, opened(idsig, flags) as idsig_fd:
        return create_or_update_idsig_file(apk_fd, idsig_fd).written


def check(apk: Path, idsig: Path) -> Idsig:
    """Check a pair."""
    with opened(apk) as apk_fd, opened(idsig) as idsig_fd:
        return check_idsig_file(apk_fd, idsig_fd)


@pytest.mark.parametrize("row", expected("idsig_create"))
def test_the_idsig_of_each_known_apk_is_the_known_one(row: dict[str, Any], tmp_path: Path) -> None:
    idsig = tmp_path / "idsig"
    idsig.write_bytes(b"what was there")
    if row["create"] != "ok":
        with pytest.raises(ApkError) as caught:
            create(KNOWN / row["file"], idsig)
        top, *causes = row["error"].splitlines()
        if causes:  # one level deeper, as the cause of "failed to create idsig"
            assert caught.value.causes == (top, *(line.partition(": ")[2] for line in causes[2:]))
        else:
            assert caught.value.reason == f"failed to create idsig\n\nCaused by:\n    {top}"
        assert idsig.read_bytes() == b"what was there"
        return
    assert create(KNOWN / row["file"], idsig)
    data = idsig.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (row["idsig_size"], row["idsig_sha256"])
    found = check(KNOWN / row["file"], idsig)
    assert found.root.hex() == row["root_hash"]
    assert found.apk_digest.hex() == row["apk_digest"]
    assert f"{found.algorithm:#06x}" == row["signature_algorithm_id"]
    assert found.tree_size == row["merkle_tree_size"]


def test_an_idsig_that_is_up_to_date_is_not_written_again(apk: Path, idsig: Path) -> None:
    os.utime(idsig, ns=(1, 1))
    assert not create(apk, idsig)
    assert idsig.stat().st_mtime_ns == 1


def flip(path: Path, place: int) -> None:
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: flip(path, 0),
        lambda path: flip(path, 4),
        lambda path: flip(path, 30),
        lambda path: flip(path, 64),
        lambda path: flip(path, 117),
        lambda path: flip(path, -1),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, path.stat().st_size + 1),
        lambda path: os.truncate(path, 50),
        lambda path: os.truncate(path, 0),
    ],
    ids=["version", "size", "root", "digest", "tree", "end", "shorter", "longer", "header", "empty"],
)
def test_an_idsig_that_is_wrong_anywhere_is_written_anew(
    apk: Path, idsig: Path, spoil: Callable[[Path], None]
) -> None:
    right = idsig.read_bytes()
    spoil(idsig)
    assert create(apk, idsig)
    assert idsig.read_bytes() == right


def test_an_apk_that_changed_behind_an_unchanged_v3_block_gets_a_new_idsig(apk: Path, idsig: Path) -> None:
    before = idsig.read_bytes()
    flip(apk, 1_000_000)
    assert create(apk, idsig)
    assert idsig.read_bytes() != before
    assert check(apk, idsig).apk_digest == DIGEST


def test_a_signed_idsig_with_the_right_digests_keeps_its_signature(apk: Path, idsig: Path) -> None:
    plain, place = _read(idsig)
    signed = Idsig(
        plain.root, DIGEST, 0x0103, plain.tree_size, b"", b"certificate", b"", b"key", b"signature"
    )
    data = signed.header() + idsig.read_bytes()[place:]
    idsig.write_bytes(data)
    assert not create(apk, idsig)
    assert idsig.read_bytes() == data
    flip(apk, 1_000_000)
    assert create(apk, idsig)
    assert not check(apk, idsig).signed


def test_an_idsig_that_cannot_be_read_is_written(apk: Path, idsig: Path) -> None:
    right = idsig.read_bytes()
    assert create(apk, idsig, os.O_WRONLY)
    assert idsig.read_bytes() == right


def test_offsets_of_descriptors_are_neither_used_nor_moved(apk: Path, idsig: Path) -> None:
    right = idsig.read_bytes()
    idsig.write_bytes(b"old" * 1000)
    with opened(apk) as apk_fd, opened(idsig, os.O_RDWR) as idsig_fd:
        os.lseek(apk_fd, 77, os.SEEK_SET)
        os.lseek(idsig_fd, 99, os.SEEK_SET)
        create_or_update_idsig_file(apk_fd, idsig_fd)
        assert os.lseek(apk_fd, 0, os.SEEK_CUR) == 77
        assert os.lseek(idsig_fd, 0, os.SEEK_CUR) == 99
    assert idsig.read_bytes() == right


def test_a_longer_old_idsig_is_cut(apk: Path, idsig: Path) -> None:
    right = idsig.read_bytes()
    idsig.write_bytes(bytes(1_000_000))
    assert create(apk, idsig)
    assert idsig.read_bytes() == right


# -- What is refused -----------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An idsig that must stay as it is."""
    path = tmp_path / "old"
    path.write_bytes(b"old")
    return path


def refusal(apk_fd: int, old: Path) -> str:
    """Why no idsig is made; nothing may have been written."""
    with opened(old, os.O_RDWR) as idsig_fd, pytest.raises(ApkError) as caught:
        create_or_update_idsig_file(apk_fd, idsig_fd)
    assert old.read_bytes() == b"old"
    assert caught.value.kind == "SERVICE_SPECIFIC"
    return caught.value.reason


def test_what_is_not_a_regular_file_is_refused_before_it_is_read(tmp_path: Path, old: Path) -> None:
    ends = os.pipe()
    try:
        assert refusal(ends[0], old) == "input is not a regular file"
    finally:
        for end in ends:
            os.close(end)
    with opened(tmp_path) as directory:
        assert refusal(directory, old) == "input is not a regular file"
    with opened(Path("/dev/zero")) as zero:
        assert refusal(zero, old) == "input is not a regular file"
    for no_descriptor in (-1, 9999, 2**40):
        assert refusal(no_descriptor, old) == "failed to get input metadata"


def test_an_empty_file_and_one_that_cannot_be_read_are_refused(tmp_path: Path, apk: Path, old: Path) -> None:
    (tmp_path / "empty").touch()
    with opened(tmp_path / "empty") as empty:
        assert refusal(empty, old).endswith("invalid Zip archive: Invalid zip header")
    with opened(apk, os.O_WRONLY) as unreadable:
        assert refusal(unreadable, old).endswith("the APK cannot be read: Bad file descriptor")


def test_a_zip_without_signing_block_is_refused(tmp_path: Path, old: Path) -> None:
    with opened(unsigned(tmp_path / "zip", b"content")) as fd:
        assert refusal(fd, old).endswith("No APK Signing Block before ZIP Central Directory")


def test_a_key_that_is_none_is_refused(tmp_path: Path, old: Path) -> None:
    with opened(apk_with(tmp_path / "apk", b"content", key=b"no key")) as fd:
        assert refusal(fd, old).endswith("the signer's public key cannot be read")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (os.O_RDONLY, "not open for writing"),
        (os.O_PATH, "not open for writing"),
        (os.O_RDWR | os.O_APPEND, "open for appending only"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_at_once(
    apk: Path, old: Path, flags: int, why: str
) -> None:
    with opened(apk) as apk_fd, opened(old, flags) as idsig_fd, pytest.raises(ApkError, match=why) as caught:
        create_or_update_idsig_file(apk_fd, idsig_fd)
    assert caught.value.text == "failed to set_len on the idsig output"
    assert old.read_bytes() == b"old"


def test_an_output_that_is_a_pipe_or_closed_is_refused(apk: Path) -> None:
    ends = os.pipe()
    with opened(apk) as apk_fd:
        with pytest.raises(ApkError, match="not a regular file"):
            create_or_update_idsig_file(apk_fd, ends[1])
        for end in ends:
            os.close(end)
        with pytest.raises(ApkError, match="not open"):
            create_or_update_idsig_file(apk_fd, ends[1])


def test_an_apk_is_never_overwritten_by_its_idsig(apk: Path) -> None:
    before = apk.read_bytes()
    with opened(apk, os.O_RDWR) as fd, pytest.raises(ApkError, match="this is the APK itself"):
        create_or_update_idsig_file(fd, fd)
    assert apk.read_bytes() == before


def test_an_apk_that_changes_meanwhile_is_refused(apk: Path, old: Path) -> None:
    with opened(apk) as apk_fd, opened(old, os.O_RDWR) as idsig_fd:
        with pytest.raises(ApkError, match="the APK changed while it was read"):
            create_or_update_idsig_file(apk_fd, idsig_fd, lambda _done: os.utime(apk, ns=(5, 5)))
        with pytest.raises(ApkError, match="failed to fill whole buffer"):
            create_or_update_idsig_file(apk_fd, idsig_fd, lambda _done: os.truncate(apk, 1000))
    assert old.read_bytes() == b"old"


@pytest.mark.parametrize("before", [b"", b"old" * 10])
def test_without_room_the_file_is_as_it_was(apk: Path, tmp_path: Path, before: bytes) -> None:
    idsig = tmp_path / "small"
    idsig.write_bytes(before)
    with opened(apk) as apk_fd, opened(idsig, os.O_RDWR) as idsig_fd:
        tree_is_done = apk.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(done: int) -> None:
            # From the last stripe on nothing may get longer than the temporary file is already.
            if done == tree_is_done:
                resource.setrlimit(resource.RLIMIT_FSIZE, (24 * 1024, limits[1]))

        try:
            with pytest.raises(ResourceExhaustedError, match="failed to write idsig"):
                create_or_update_idsig_file(apk_fd, idsig_fd, limit)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert idsig.read_bytes() == before


# -- Pairs ---------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Idsig, int]:
    with opened(path) as fd:
        return read_idsig(fd)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (0, "3 is an unsupported version"),
        (8, "Unsupported hash algorithm: 0"),
        (12, r"blocks of 2\^13 bytes are not supported"),
        (30, "Root hash mismatch"),
        (64, "Digest mismatch"),
        (105, "Unsupported signature algorithm: 0x0200"),
        (113, "merkle tree is 28673 bytes, but 28672 bytes are there"),
        (117, "Merkle tree is not the APK's"),
        (-1, "Merkle tree is not the APK's"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_and_told_why(
    apk: Path, idsig: Path, place: int, text: str
) -> None:
    check(apk, idsig)
    flip(idsig, place)
    with pytest.raises(ApkError, match=text):
        check(apk, idsig)


def test_what_a_file_puts_into_an_error_is_cut(apk: Path, tmp_path: Path) -> None:
    idsig = tmp_path / "long"
    idsig.write_bytes(Idsig(bytes(32), b"d" * 100_000, 0x0201, 0).header())
    with pytest.raises(ApkError, match=r"Digest mismatch: the idsig has (64){64}\.\.\., ") as caught:
        check(apk, idsig)
    assert len(str(caught.value)) < 1000


def test_every_cut_of_a_header_is_refused(apk: Path, idsig: Path) -> None:
    data = idsig.read_bytes()
    for size in range(118):
        idsig.write_bytes(data[:size])
        with pytest.raises(ApkError):
            check(apk, idsig)


def test_signed_files_keep_every_field(tmp_path: Path) -> None:
    whole = Idsig(b"root", b"digest", 0x0301, 5, b"salt", b"certificate", b"data", b"key", b"signature")
    (tmp_path / "idsig").write_bytes(whole.header() + b"-tree")
    assert _read(tmp_path / "idsig") == (whole, len(whole.header()))


def test_all_rows_of_the_known_answers_were_looked_at() -> None:
    if not (KNOWN / "expected.json").exists():
        pytest.skip("no known answers in ../shared/testdata/apkverify")
    rows = json.loads((KNOWN / "expected.json").read_text())
    assert {path.name for path in KNOWN.glob("*.ap[ke]*") if path.suffix in {".apk", ".apex"}} == {
        row["file"] for row in rows["idsig_create"]
    }
