"""Reading one small file out of an APK, which may be hostile.

Memory is bounded by the limits here whatever the APK says of itself, and only what is asked for is inflated.
The APK's signature is not looked at: its guest does that.
"""

import struct
import zlib
from typing import Final

from vmactor.errors import ApkError
from vmactor.images.apk import BROKEN, apk_size, find_directory, read_at
from vmactor.text import escape

MAX_DIRECTORY: Final = 16 << 20
"""Bytes of a central directory; ZIPs without ZIP64 have 65,535 entries at most."""

_ENTRY: Final = struct.Struct("<4s4xHH4xIIIHHH8xI")
_ENTRY_SIGNATURE: Final = b"PK\1\2"
_LOCAL: Final = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE: Final = b"PK\3\4"
_ENCRYPTED: Final = 0x2041  # also strong encryption and a masked header
_STORED: Final = 0
_DEFLATED: Final = 8


def read_entry(fd: int, name: str, limit: int) -> bytes:
    """Read a file in an APK, at offsets; the descriptor's own offset stays where it is.

    Args:
        fd: The APK, a regular file open for reading.
        name: The entry's name, exactly.
        limit: Largest contents in bytes.

    Raises:
        ApkError: There is no such entry or there are two, it is larger, or the APK is broken.
    """
    size = apk_size(fd)
    start, end = find_directory(fd, size)
    if end - start > MAX_DIRECTORY:
        raise ApkError(
            f"the central directory has {end - start} bytes, and at most {MAX_DIRECTORY} are read",
            advice=BROKEN,
        )
    flags, method, crc, packed, unpacked, offset = _find(read_at(fd, start, end - start), name.encode())
    if flags & _ENCRYPTED:
        raise _unusable(name, "is encrypted")
    if method not in (_STORED, _DEFLATED):
        raise _unusable(name, f"is compressed by method {method}")
    if unpacked > limit or packed > limit + 1024:
        raise _unusable(name, f"has {unpacked} bytes, and at most {limit} are possible")
    if offset + _LOCAL.size > start:
        raise _unusable(name, "is not in the APK")
    signature, name_length, extra_length = _LOCAL.unpack(read_at(fd, offset, _LOCAL.size))
    begin = offset + _LOCAL.size + name_length + extra_length
    if signature != _LOCAL_SIGNATURE or begin + packed > start:
        raise _unusable(name, "is not where the APK says")
    data = read_at(fd, begin, packed)
    if method == _DEFLATED:
        data = _inflate(data, limit, name)
    if len(data) != unpacked or zlib.crc32(data) != crc:
        raise _unusable(name, "is not what the APK says (CRC or size)")
    return data


def _find(directory: bytes, name: bytes) -> tuple[int, int, int, int, int, int]:
    found = None
    place = 0
    while place < len(directory):
        if place + _ENTRY.size > len(directory):
            raise ApkError("invalid Zip archive: Invalid Central Directory header", advice=BROKEN)
        (signature, flags, method, crc, packed, unpacked, name_length, extra, comment, offset) = (
            _ENTRY.unpack_from(directory, place)
        )
        if signature != _ENTRY_SIGNATURE:
            raise ApkError("invalid Zip archive: Invalid Central Directory header", advice=BROKEN)
        place += _ENTRY.size
        if directory[place : place + name_length] == name:
            if found is not None:
                raise _unusable(name.decode(), "is there twice")
            found = flags, method, crc, packed, unpacked, offset
        place += name_length + extra + comment
    if place != len(directory):
        raise ApkError("invalid Zip archive: Invalid Central Directory header", advice=BROKEN)
    if found is None:
        raise _unusable(name.decode(), "specified file not found in archive")
    return found


def _inflate(data: bytes, limit: int, name: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        plain = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise _unusable(name, "is compressed wrongly") from error
    if len(plain) > limit:
        raise _unusable(name, f"has more than the {limit} bytes that are possible")
    if not inflater.eof or inflater.unused_data:
        raise _unusable(name, "is compressed wrongly")
    return plain


def _unusable(name: str, why: str) -> ApkError:
    return ApkError(f"{escape(name, limit=200)} {why}", advice="look at it with 'unzip -lv'")
