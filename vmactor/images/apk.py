"""Finding the APK Signature Scheme v3 block of an APK; the ZIP around it is checked as the reference does.

An APK is its client's file and may be hostile. It is read at offsets and in bounded pieces: the end of the
file, one fixed header for each entry of the central directory and of the signing block, and the v3 block up
to a limit. What may follow from a lie is a typed error with the reference's text.
"""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

from vmactor.errors import ApkError
from vmactor.images.block_hash import fill

V3_BLOCK_ID: Final = 0xF05368C0
MAX_V3_BLOCK: Final = 1024 * 1024
"""Far more than any signer needs; the reference has no limit."""
MAX_PAIRS: Final = 4096
"""Entries of a signing block that are looked at; the reference has no limit."""

_EOCD: Final = struct.Struct("<4s4H2IH")
_EOCD_SIGNATURE: Final = b"PK\5\6"
_ZIP64_LOCATOR_SIGNATURE: Final = b"PK\6\7"
_ZIP64_LOCATOR_SIZE: Final = 20
_ZIP64_MARK: Final = 0xFFFFFFFF
_ENTRY: Final = struct.Struct("<4s24x3H12x")
_ENTRY_SIGNATURE: Final = b"PK\1\2"
_MAX_COMMENT: Final = 0xFFFF

_BLOCK_MAGIC: Final = b"APK Sig Block 42"
_BLOCK_FOOTER: Final = struct.Struct("<Q16s")
_MIN_APK: Final = 32
_PAIR: Final = struct.Struct("<QI")

BROKEN: Final = "this is no whole APK; get it again"
UNSIGNED: Final = "sign it with scheme v3, for example with apksigner"
TAMPERED: Final = "it is not as its signer made it; do not use it, and get it again"


@dataclass(frozen=True, slots=True)
class ApkSections:
    """Where the parts of an APK are.

    Attributes:
        signing_block: Offset of the APK Signing Block.
        central_directory: Offset of the ZIP's central directory.
        end: Offset of the record that ends the central directory.
        end_record: That record with its comment, which is the end of the file.
        v3_block: The value of the signing block's entry for scheme v3.
    """

    signing_block: int
    central_directory: int
    end: int
    end_record: bytes
    v3_block: bytes


def apk_size(fd: int) -> int:
    """The size of an APK in bytes.

    Raises:
        ApkError: It is not a regular file, or not open.
    """
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError, ValueError) as error:
        raise ApkError("failed to get input metadata", advice="the descriptor has to be open") from error
    if not stat.S_ISREG(status.st_mode):
        raise ApkError("input is not a regular file", advice="give the APK as an open file")
    return status.st_size


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Read exactly so many bytes of an APK.

    Raises:
        ApkError: It ends before, or cannot be read.
    """
    data = bytearray(size)
    with reading():
        fill(fd, memoryview(data), offset)
    return bytes(data)


@contextmanager
def reading() -> Iterator[None]:
    """Within it, whatever goes wrong with reading an APK becomes an ``ApkError``."""
    try:
        yield
    except EOFError as error:
        raise ApkError(str(error), advice="it became shorter; leave it alone until this is done") from error
    except OSError as error:
        why = f"the APK cannot be read: {error.strerror}"
        raise ApkError(why, advice="open it for reading, and look at its disk") from error


def find_sections(fd: int, size: int) -> ApkSections:
    """Find the parts of an APK; see the module's docstring for what is checked.

    Args:
        fd: Open for reading.
        size: See ``apk_size``.

    Raises:
        ApkError: It is not a ZIP, or not one that an APK can be, or has no v3 block.
    """
    end, record = _find_end(fd, size)
    start = _central_directory(fd, end, record)
    _check_entries(fd, start, end, record)
    block = _find_signing_block(fd, start)
    return ApkSections(block, start, end, record, _find_v3_block(fd, block, start))


def find_directory(fd: int, size: int) -> tuple[int, int]:
    """Where a ZIP's central directory begins and ends; its entries are not looked at.

    Raises:
        ApkError: It is not a ZIP, or not one that an APK can be.
    """
    end, record = _find_end(fd, size)
    return _central_directory(fd, end, record), end


def short_hex(value: bytes) -> str:
    """A digest of a file in hexadecimal; what is longer than any digest is cut."""
    return value[:64].hex() + ("..." if len(value) > 64 else "")


def _invalid(text: str) -> NoReturn:
    raise ApkError(f"invalid Zip archive: {text}", advice=BROKEN)


def _find_end(fd: int, size: int) -> tuple[int, bytes]:
    if size < _EOCD.size:
        _invalid("Invalid zip header")
    start = max(0, size - _EOCD.size - _MAX_COMMENT)
    tail = read_at(fd, start, size - start)
    found = tail.rfind(_EOCD_SIGNATURE, 0, len(tail) - _EOCD.size + len(_EOCD_SIGNATURE))
    if found < 0:
        _invalid("Could not find central directory end")
    record = tail[found:]
    # What follows the comment would be signed by nobody. The reference takes the same record, the last one,
    # but lets the comment end early.
    if _EOCD.unpack_from(record)[-1] != len(record) - _EOCD.size:
        raise ApkError("Invalid ZIP: the comment does not end with the file.", advice=BROKEN)
    return start + found, record


def _central_directory(fd: int, end: int, record: bytes) -> int:
    _signature, disk, directory_disk, _here, _entries, length, start, _comment = _EOCD.unpack_from(record)
    locator = end - _ZIP64_LOCATOR_SIZE
    if _ZIP64_MARK in (length, start) or (
        locator >= 0 and read_at(fd, locator, len(_ZIP64_LOCATOR_SIGNATURE)) == _ZIP64_LOCATOR_SIGNATURE
    ):
        raise ApkError("Unsupported ZIP: ZIP64 is not supported.", advice="an APK must be smaller than 4 GiB")
    if disk != directory_disk:
        raise ApkError(
            "unsupported Zip archive: Support for multi-disk files is not implemented", advice=BROKEN
        )
    if start + length > end:
        _invalid("Invalid central directory size or offset")
    if offset := end - start - length:
        raise ApkError(f"Invalid ZIP: offset should be 0, but {offset}.", advice=BROKEN)
    return int(start)


def _check_entries(fd: int, start: int, end: int, record: bytes) -> None:
    """The directory must consist of as many entries as its end says, and nothing else."""
    place = start
    for _ in range(_EOCD.unpack_from(record)[3]):
        if place + _ENTRY.size > end:
            _invalid("Invalid Central Directory header")
        signature, name, extra, comment = _ENTRY.unpack(read_at(fd, place, _ENTRY.size))
        if signature != _ENTRY_SIGNATURE:
            _invalid("Invalid Central Directory header")
        place += _ENTRY.size + name + extra + comment
    if place != end:
        raise ApkError("Invalid ZIP: ZipArchive::new() should point EOCD after reading.", advice=BROKEN)


def _find_signing_block(fd: int, directory: int) -> int:
    if directory < _MIN_APK:
        raise ApkError(
            f"APK too small for APK Signing Block. ZIP Central Directory offset: {directory}", advice=UNSIGNED
        )
    footer = read_at(fd, directory - _BLOCK_FOOTER.size, _BLOCK_FOOTER.size)
    size, magic = _BLOCK_FOOTER.unpack(footer)
    if magic != _BLOCK_MAGIC:
        raise ApkError("No APK Signing Block before ZIP Central Directory", advice=UNSIGNED)
    start = directory - size - 8
    if start < 0 or size < _BLOCK_FOOTER.size:
        raise ApkError(f"APK Signing Block size out of range: {size}", advice=BROKEN)
    (header,) = struct.unpack("<Q", read_at(fd, start, 8))
    if header != size:
        raise ApkError(
            f"APK Signing Block sizes in header and footer do not match: {header} vs {size}", advice=BROKEN
        )
    return int(start)


def _find_v3_block(fd: int, block: int, directory: int) -> bytes:
    """The first entry with the identifier of scheme v3 counts."""
    place, end = block + 8, directory - _BLOCK_FOOTER.size
    for number in range(1, MAX_PAIRS + 1):
        if place == end:
            raise ApkError(
                "Fallback to v2 when v3 block not found is not yet implemented.",
                f"No APK Signature Scheme block in APK Signing Block with ID: {V3_BLOCK_ID}",
                "entity not found",
                advice=UNSIGNED,
            )
        if end - place < 8:
            raise ApkError(
                f"Insufficient data to read size of APK Signing Block entry #{number}", advice=BROKEN
            )
        # An entry without room for its identifier is refused below, whatever was read for it.
        length, identifier = _PAIR.unpack(read_at(fd, place, _PAIR.size))
        if length < 4 or length > end - place - 8:
            raise ApkError(f"APK Signing Block entry #{number} size out of range: {length}", advice=BROKEN)
        if identifier == V3_BLOCK_ID:
            if length > MAX_V3_BLOCK:
                raise ApkError(f"the v3 block has {length} bytes, which no signer needs", advice=BROKEN)
            return read_at(fd, place + _PAIR.size, length - 4)
        place += 8 + length
    raise ApkError(f"the APK Signing Block has more than {MAX_PAIRS} entries", advice=BROKEN)
