"""Android sparse images, read from whoever may have written them; numbers are little endian."""

import struct
from typing import Final

from vmactor.errors import ImageError
from vmactor.images.files import read_at, size_of

MAGIC: Final = b"\x3a\xff\x26\xed"
MAX_CHUNKS: Final = 1 << 16
"""How many chunks are looked at; images of whole phones have a few thousand."""

_HEADER: Final = struct.Struct("<4sHHHHIIII")
"""Magic, major and minor version, header sizes of file and chunks, block size, blocks, chunks, checksum."""
_CHUNK: Final = struct.Struct("<HHII")
"""Kind, reserved, blocks, bytes with this header."""
_RAW, _FILL, _NOTHING, _CRC32 = 0xCAC1, 0xCAC2, 0xCAC3, 0xCAC4


def virtual_size(fd: int) -> int:
    """The size of the image when unpacked, in bytes. Reads the header of each chunk, and no more.

    Raises:
        ImageError: It is broken, or its chunks are too many or do not add up.
    """
    start = read_at(fd, 0, _HEADER.size)
    if len(start) < _HEADER.size:
        raise _broken("ends in the middle of its header")
    magic, major, _, header_size, chunk_size, *numbers = _HEADER.unpack(start)
    block, blocks, chunks, _ = map(int, numbers)
    if magic != MAGIC or major != 1 or header_size != _HEADER.size or chunk_size != _CHUNK.size:
        raise _broken("has a header of another version than 1")
    if not block or block % 4:
        raise _broken(f"has blocks of {block} bytes")
    if chunks > MAX_CHUNKS:
        raise _broken(f"has {chunks} chunks; at most {MAX_CHUNKS} are looked at")
    file_size, at, total = size_of(fd), _HEADER.size, 0
    for _ in range(chunks):
        header = read_at(fd, at, _CHUNK.size)
        if len(header) < _CHUNK.size:
            raise _broken("ends in the middle of its chunks")
        kind, _, count, length = _CHUNK.unpack(header)
        data = {_RAW: count * block, _FILL: 4, _NOTHING: 0, _CRC32: 4}.get(kind)
        if data is None or length != _CHUNK.size + data or at + length > file_size:
            raise _broken("has a chunk that is none")
        at += length
        total += 0 if kind == _CRC32 else count
    if total != blocks:
        raise _broken(f"has chunks of {total} blocks together, and says {blocks}")
    return blocks * block


def _broken(how: str) -> ImageError:
    return ImageError(f"is a broken Android sparse image: it {how}; make it again with 'img2simg'")
