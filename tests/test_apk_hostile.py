"""APKs and idsig files made to harm: every lie is a typed error, within bounded memory and time."""

import os
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.apks import (
    KEY,
    opened,
    signed_data,
    signer,
    sized,
    unsigned,
    v3_block,
    with_block,
    with_v3,
)
from vmactor.errors import ApkError
from vmactor.images.apk import MAX_PAIRS, MAX_V3_BLOCK, V3_BLOCK_ID, find_sections
from vmactor.images.apk_v3 import find_signer
from vmactor.images.apk_verify import verify_apk
from vmactor.images.idsig import Idsig, create_or_update_idsig_file, read_idsig

SIGNER = signer(signed_data([(0x0201, bytes(32))]), [(0x0201, b"none")], public_key=KEY)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A ZIP without a signature."""
    return unsigned(tmp_path / "apk", b"some content", b"more of it")


def why(path: Path) -> str:
    """What is wrong with an APK."""
    with opened(path) as fd, pytest.raises(ApkError) as caught:
        find_sections(fd, path.stat().st_size)
    return caught.value.text


def patch(path: Path, place: int, data: bytes) -> None:
    """Write over bytes; a place from the end if negative."""
    content = bytearray(path.read_bytes())
    start = place if place >= 0 else len(content) + place
    content[start : start + len(data)] = data
    path.write_bytes(content)


def end_record(path: Path) -> int:
    """The place of the record that ends the central directory."""
    return path.read_bytes().rindex(b"PK\5\6")


# -- The ZIP -------------------------------------------------------------------------------------------


def test_what_is_no_zip_is_refused_with_the_references_words(tmp_path: Path) -> None:
    for content, text in (
        (b"", "invalid Zip archive: Invalid zip header"),
        (bytes(21), "invalid Zip archive: Invalid zip header"),
        (bytes(22), "invalid Zip archive: Could not find central directory end"),
        (bytes(200_000), "invalid Zip archive: Could not find central directory end"),
        (b"PK\5\6" + bytes(70_000), "invalid Zip archive: Could not find central directory end"),
        (bytes(30) + b"PK\5\6" + bytes(10), "invalid Zip archive: Could not find central directory end"),
    ):
        (tmp_path / "file").write_bytes(content)
        assert why(tmp_path / "file") == text


def test_data_before_the_archive_is_refused(archive: Path) -> None:
    with_v3(archive, SIGNER)
    archive.write_bytes(bytes(77) + archive.read_bytes())
    assert why(archive) == "Invalid ZIP: offset should be 0, but 77."


def test_a_second_central_directory_is_refused(archive: Path) -> None:
    with_v3(archive, SIGNER)
    data, end = archive.read_bytes(), end_record(archive)
    size, start = struct.unpack_from("<II", data, end + 12)
    archive.write_bytes(data[:end] + data[start : start + size] + data[end:])
    assert why(archive) == f"Invalid ZIP: offset should be 0, but {size}."


@pytest.mark.parametrize("field", [12, 16])
def test_zip64_is_refused(archive: Path, field: int) -> None:
    with_v3(archive, SIGNER)
    patch(archive, end_record(archive) + field, b"\xff" * 4)
    assert why(archive) == "Unsupported ZIP: ZIP64 is not supported."


def test_a_zip64_locator_is_refused_whatever_the_record_says(archive: Path) -> None:
    with zipfile.ZipFile(archive, "a") as zipped:
        info = zipfile.ZipInfo("last")
        info.comment = b"PK\6\7" + bytes(16)  # where a locator would be
        zipped.writestr(info, b"")
    with_v3(archive, SIGNER)
    assert why(archive) == "Unsupported ZIP: ZIP64 is not supported."


def test_a_directory_that_overlaps_its_end_is_refused(archive: Path) -> None:
    with_v3(archive, SIGNER)
    end = end_record(archive)
    (size,) = struct.unpack_from("<I", archive.read_bytes(), end + 12)
    patch(archive, end + 12, struct.pack("<I", size + 1))
    assert why(archive) == "invalid Zip archive: Invalid central directory size or offset"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "Invalid ZIP: ZipArchive::new() should point EOCD after reading."),
        (1, "Invalid ZIP: ZipArchive::new() should point EOCD after reading."),
        (3, "invalid Zip archive: Invalid Central Directory header"),
        (65535, "invalid Zip archive: Invalid Central Directory header"),
    ],
)
def test_a_directory_with_another_number_of_entries_is_refused(archive: Path, count: int, text: str) -> None:
    with_v3(archive, SIGNER)
    patch(archive, end_record(archive) + 8, struct.pack("<H", count))
    assert why(archive) == text


def test_entries_that_are_none_or_lie_about_their_length_are_refused(archive: Path) -> None:
    with_v3(archive, SIGNER)
    (start,) = struct.unpack_from("<I", archive.read_bytes(), end_record(archive) + 16)
    good = archive.read_bytes()
    patch(archive, start, b"XX")
    assert why(archive) == "invalid Zip archive: Invalid Central Directory header"
    for length in (28, 30, 32):
        archive.write_bytes(good)
        patch(archive, start + length, b"\xff\xff")
        assert "Central Directory header" in why(archive)


def test_an_archive_of_several_disks_is_refused(archive: Path) -> None:
    with_v3(archive, SIGNER)
    patch(archive, end_record(archive) + 4, struct.pack("<H", 1))
    assert "multi-disk" in why(archive)


def test_a_comment_may_be_long_but_not_hide_another_end(tmp_path: Path) -> None:
    longest = unsigned(tmp_path / "long", b"content", comment=b"c" * 65535)
    with_v3(longest, SIGNER)
    with opened(longest) as fd:
        assert find_sections(fd, longest.stat().st_size).end_record.endswith(b"c" * 65535)
    unsigned(tmp_path / "real", b"content")
    with_v3(tmp_path / "real", SIGNER)
    hidden = tmp_path / "real"
    data = hidden.read_bytes()
    record = data[end_record(hidden) :]
    # The same record as the comment of the first: two programs could take either.
    hidden.write_bytes(data[:-2] + struct.pack("<H", len(record)) + record)
    assert why(hidden) == "Invalid ZIP: offset should be 0, but 22."
    hidden.write_bytes(data + b"not signed by anybody")
    assert why(hidden) == "Invalid ZIP: the comment does not end with the file."
    hidden.write_bytes(data[:-2] + struct.pack("<H", 9))
    assert why(hidden) == "Invalid ZIP: the comment does not end with the file."


# -- The signing block ---------------------------------------------------------------------------------


def test_lies_about_a_signing_blocks_size_are_refused(tmp_path: Path) -> None:
    for sizes, text in (
        ((100, 36), "APK Signing Block sizes in header and footer do not match: 100 vs 36"),
        ((2**64 - 1, 2**64 - 1), f"APK Signing Block size out of range: {2**64 - 1}"),
        ((0, 0), "APK Signing Block size out of range: 0"),
        ((23, 23), "APK Signing Block size out of range: 23"),
        ((10_000, 10_000), "APK Signing Block size out of range: 10000"),
    ):
        path = unsigned(tmp_path / "apk", b"content")
        with_block(path, (V3_BLOCK_ID, b""), sizes=sizes)
        assert why(path) == text


def test_lies_about_an_entrys_size_are_refused(archive: Path) -> None:
    with_block(archive, (1, b"value"), (V3_BLOCK_ID, v3_block(SIGNER)))
    good = archive.read_bytes()
    place = good.index(struct.pack("<QI", 9, 1))
    for length in (0, 3, 10_000, 2**63, 2**64 - 1):
        archive.write_bytes(good)
        patch(archive, place, struct.pack("<Q", length))
        assert why(archive) == f"APK Signing Block entry #1 size out of range: {length}"
    archive.write_bytes(good)
    end = len(good[place:]) - len(good[good.index(b"APK Sig Block 42") - 8 :])
    patch(archive, place, struct.pack("<Q", end - 8 - 7))
    assert why(archive) == "Insufficient data to read size of APK Signing Block entry #2"


def test_the_first_of_two_v3_blocks_counts(archive: Path) -> None:
    with_block(archive, (V3_BLOCK_ID, b"first"), (V3_BLOCK_ID, b"second"))
    with opened(archive) as fd:
        assert find_sections(fd, archive.stat().st_size).v3_block == b"first"


def test_an_endless_block_ends_soon(tmp_path: Path) -> None:
    path = unsigned(tmp_path / "many", b"")
    with_block(path, *[(7, b"")] * (MAX_PAIRS + 1))
    assert why(path) == f"the APK Signing Block has more than {MAX_PAIRS} entries"
    path = unsigned(tmp_path / "large", b"")
    with_block(path, (V3_BLOCK_ID, bytes(MAX_V3_BLOCK)))
    assert "which no signer needs" in why(path)


def test_a_file_of_all_holes_costs_neither_memory_nor_time(tmp_path: Path) -> None:
    path = with_v3(unsigned(tmp_path / "apk", b"content"), SIGNER)
    data = path.read_bytes()
    # 3 GiB before the signing block, which stays where the record says.
    hole = 3 * 2**30
    (start,) = struct.unpack_from("<I", data, end_record(path) + 16)
    block = data.index(b"APK Sig Block 42") + 16
    (size,) = struct.unpack_from("<Q", data, block - 24)
    moved = bytearray(data[block - size - 8 :])
    struct.pack_into("<I", moved, moved.rindex(b"PK\5\6") + 16, start + hole)
    with path.open("r+b") as out:
        out.seek(hole + block - size - 8)
        out.write(moved)
    tracemalloc.start()
    try:
        with opened(path) as fd:
            assert find_sections(fd, path.stat().st_size).v3_block == v3_block(SIGNER)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# -- The v3 block --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block",
    [
        sized(b"\0" * (MAX_V3_BLOCK - 8)),
        sized(b"".join(sized(b"") for _ in range(MAX_V3_BLOCK // 4 - 3))),
        v3_block(signer(sized(sized(*[b""] * 200_000)), [], public_key=b"")),
        v3_block(*[SIGNER] * 3000),
        v3_block(signer(b"", [(0x0201, b"")] * 60_000, public_key=b"")),
    ],
    ids=["empty signers", "nothing", "empty digests", "many signers", "many signatures"],
)
def test_large_blocks_of_tiny_parts_cost_little(block: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ApkError):
            assert find_signer(block).signed_data
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def _cuts() -> Iterator[bytes]:
    whole = v3_block(SIGNER)
    yield from (whole[:size] for size in range(0, len(whole), 3))


def test_every_cut_of_a_v3_block_is_a_typed_error() -> None:
    for cut in _cuts():
        with pytest.raises(ApkError):
            assert find_signer(cut).signed_data


@given(st.binary(max_size=400))
@example(b"\xff\xff\xff\xff")
@example(sized(sized(b"")))
def test_any_bytes_as_v3_block_give_a_signer_or_a_typed_error(block: bytes) -> None:
    try:
        found = find_signer(block)
        found.strongest()
        assert found.signed_data
    except ApkError:
        pass


# -- Whole files ---------------------------------------------------------------------------------------

BASE = [b""]


@pytest.fixture(scope="module", autouse=True)
def _base(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = unsigned(tmp_path_factory.mktemp("base") / "apk", b"x" * 5000, comment=b"comment")
    BASE[0] = with_v3(path, SIGNER).read_bytes()


changes = st.lists(
    st.tuples(
        st.integers(0, 6000),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from(
                [b"\xff" * 4, b"\xff" * 8, bytes(8), b"PK\5\6", b"PK\6\7", b"PK\1\2", b"APK Sig Block 42"]
            ),
        ),
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=changes, cut=st.integers(0, 6000), tail=st.binary(max_size=30))
@example(changes=[], cut=0, tail=b"")
@example(changes=[], cut=0, tail=b"PK\5\6" + bytes(18))
@example(changes=[(0, b"\xff" * 8)], cut=22, tail=b"")
def test_any_change_of_an_apk_gives_an_idsig_or_a_typed_error(
    tmp_path: Path, changes: list[tuple[int, bytes]], cut: int, tail: bytes
) -> None:
    data = bytearray(BASE[0][: len(BASE[0]) - cut] + tail)
    for place, change in changes:  # counted from the end, where everything that is read is
        start = max(0, len(data) - place)
        data[start : start + len(change)] = change
    (tmp_path / "apk").write_bytes(data)
    with opened(tmp_path / "apk") as apk, opened(tmp_path / "idsig", os.O_RDWR | os.O_CREAT) as idsig:
        with suppress(ApkError):
            create_or_update_idsig_file(apk, idsig)
            assert not create_or_update_idsig_file(apk, idsig).written
        with suppress(ApkError):
            verify_apk(apk, idsig)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(st.integers(0, 200), st.binary(max_size=8)).map(
            lambda change: bytes(
                (header := Idsig(b"r" * 32, b"d" * 32, 0x0201, 0, b"", b"c", b"", b"k", b"s").header())[
                    : change[0]
                ]
                + change[1]
                + header[change[0] + len(change[1]) :]
            )
        ),
    )
)
@example(struct.pack("<II", 2, 0) + b"\1\0\0\0\x0c" + b"\xff\xff\xff\xff")
def test_any_bytes_as_idsig_are_read_or_give_a_typed_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "idsig").write_bytes(data)
    with opened(tmp_path / "idsig") as fd, suppress(ApkError):
        read_idsig(fd)


def test_an_idsig_of_lies_costs_neither_memory_nor_time(tmp_path: Path) -> None:
    path = tmp_path / "idsig"
    path.write_bytes(struct.pack("<IIIBI", 2, 0, 1, 12, 2**32 - 1))
    os.truncate(path, 2**40)
    tracemalloc.start()
    try:
        with opened(path) as fd, pytest.raises(ApkError, match="absurdly long"):
            read_idsig(fd)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
