"""One file out of an APK that anybody may have written: exact, within bounds, without harm."""

import os
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmactor.errors import ApkError
from vmactor.images.apk_entry import MAX_DIRECTORY, read_entry

LIMIT = 10_000


def archive(path: Path, *entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def read(path: Path, name: str = "a", limit: int = LIMIT) -> bytes:
    with path.open("rb") as file:
        return read_entry(file.fileno(), name, limit)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@settings(max_examples=30, deadline=None)
@given(contents=st.lists(st.binary(max_size=500), min_size=1, max_size=4))
@example(contents=[b"", b"x" * LIMIT])
def test_a_file_is_read_as_another_program_wrote_it(
    method: int, contents: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("zip") / "a.apk"
    archive(path, *((f"dir/{number}é", data) for number, data in enumerate(contents)), method=method)
    with path.open("rb") as file:
        file.seek(3)
        for number, data in enumerate(contents):
            assert read_entry(file.fileno(), f"dir/{number}é", LIMIT) == data
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 3


def patched(change: Callable[[bytearray, int, int], None]) -> Callable[[Path], Path]:
    """An archive with a change; that gets the bytes, and where the directory and the local header begin."""

    def make(path: Path) -> Path:
        archive(path, ("a", b"content" * 50))
        data = bytearray(path.read_bytes())
        change(data, data.index(b"PK\1\2"), 0)
        path.write_bytes(data)
        return path

    return make


def put(offset: int, form: str, value: int, *, local: bool = False) -> Callable[[Path], Path]:
    return patched(
        lambda data, directory, start: struct.pack_into(
            form, data, offset + (start if local else directory), value
        )
    )


def bomb(path: Path) -> Path:
    """9 MiB of zeros in 9 KiB that say they are 100 bytes."""
    packer = zlib.compressobj(9, wbits=-15)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(9)) + packer.flush()
    path = archive(path, ("a", packed), method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2")
    struct.pack_into("<H", data, place + 10, 8)
    struct.pack_into("<I", data, place + 24, 100)
    path.write_bytes(data)
    return path


def twice(path: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return archive(path, ("a", b"1"), ("a", b"2"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: archive(path, ("b", b"")), "specified file not found in archive"),
        (twice, "is there twice"),
        (lambda path: archive(path, ("a", b"x" * (LIMIT + 1))), "at most 10000 are possible"),
        (bomb, "more than the 10000 bytes|is compressed wrongly"),
        (lambda path: archive(path, ("a", b"x"), method=zipfile.ZIP_LZMA), "compressed by method 14"),
        (lambda path: archive(path, ("a", b"x"), method=zipfile.ZIP_BZIP2), "compressed by method 12"),
        (put(8, "<H", 1), "is encrypted"),
        (put(16, "<I", 1), "CRC or size"),
        (put(24, "<I", 349), "CRC or size"),
        (put(24, "<I", 2**32 - 1), "has 4294967295 bytes"),
        (put(20, "<I", 5), "is compressed wrongly"),
        (put(20, "<I", 5000), "is not where the APK says"),
        (put(42, "<I", 2**32 - 1), "is not in the APK"),
        (put(42, "<I", 4), "is not where the APK says"),
        (put(28, "<H", 65535, local=True), "is not where the APK says"),
        (put(30, "<H", 65535), "Invalid Central Directory header"),
        (put(0, "<I", 7), "Invalid Central Directory header"),
        (put(10, "<H", 0), "CRC or size"),
        (put(32, "<B", 0xFF, local=True), "is compressed wrongly|CRC or size"),
        (lambda path: path.touch() or path, "invalid Zip archive"),
    ],
)
def test_a_hostile_apk_is_refused_with_a_reason(
    make: Callable[[Path], Path], text: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "a.apk")
    with pytest.raises(ApkError, match=text) as caught:
        read(path)
    assert len(str(caught.value)) < 500


def test_memory_is_bounded_by_the_limit_not_by_the_apk(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.apk")
    tracemalloc.start()
    try:
        with pytest.raises(ApkError):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.apk"
    size = MAX_DIRECTORY + 1
    with path.open("wb") as file:
        file.seek(size)  # a hole
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size, 0, 0))
    with pytest.raises(ApkError, match="the central directory has 16777217 bytes"):
        read(path)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 600), value=st.binary(min_size=1, max_size=8))
def test_no_change_of_an_apk_does_harm(
    place: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = archive(tmp_path_factory.mktemp("zip") / "a", ("other", b"1" * 100), ("a", b"content" * 30))
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place : place + len(value)] = value
    path.write_bytes(data)
    try:
        content = read(path)
    except ApkError:
        return
    assert content == b"content" * 30
