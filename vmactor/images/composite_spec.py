"""The specification file of a composite disk, read from whoever may have written it.

A magic, then one message in protobuf's wire format. Only that file is read, never what it names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmactor.errors import ImageError
from vmactor.images.files import read_at

MAGIC: Final = b"composite_disk\x1d"
VERSION: Final = 2
"""The newest version that there is."""
MAX_BYTES: Final = 2 << 20
"""Longest file: more than any disk of 128 partitions with the longest of paths needs."""
MAX_COMPONENTS: Final = 1024

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MASK64: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Component:
    """A piece of a composite disk.

    Attributes:
        path: Its file, as written; foreign text.
        offset: Where in the guest's disk it begins, in bytes.
        length: Up to the next piece, or the end of the disk. Nobody promises that the file is that long.
        writable: Whether the guest may write to it, if the disk is writable too.
        file_offset: Where in its file it begins, in bytes.
    """

    path: str
    offset: int
    length: int
    writable: bool
    file_offset: int = 0


@dataclass(frozen=True, slots=True)
class CompositeSpec:
    """What the file says.

    Attributes:
        version: Of the format.
        length: Of the guest's disk, in bytes.
        components: By offset.
    """

    version: int
    length: int
    components: tuple[Component, ...]


def read(fd: int) -> CompositeSpec:
    """Read a specification file; at most ``MAX_BYTES`` of it. The rules are those of crosvm's reader.

    Raises:
        ImageError: It is broken, or longer than any such file is; the message says how.
    """
    data = read_at(fd, 0, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _broken(f"is longer than {MAX_BYTES} bytes")
    if not data.startswith(MAGIC):
        raise _broken("has no magic of a composite disk")
    return parse(data[len(MAGIC) :])


def parse(message: bytes) -> CompositeSpec:
    """Read the message behind the magic. Pure. Raises ImageError as ``read``."""
    version = length = 0
    found: list[tuple[int, str, bool, int]] = []
    for number, value in _fields(message):
        if number == 1 and isinstance(value, int):
            version = value
        elif number == 3 and isinstance(value, int):
            length = value
        elif number == 2 and isinstance(value, bytes):
            if len(found) == MAX_COMPONENTS:
                raise _broken(f"has more than {MAX_COMPONENTS} components")
            found.append(_component(value))
        elif number in (1, 2, 3):
            raise _broken(f"has field {number} in another type than it is")
    if version > VERSION:
        raise _broken(f"has version {version}, and {VERSION} is the newest known")
    if not found:
        raise _broken("has no components")
    found.sort(key=lambda component: component[0])
    ends = [offset for offset, *_ in found[1:]] + [length]
    for (offset, *_), end in zip(found, ends, strict=True):
        if end <= offset:
            raise _broken(f"has a component at {offset} that ends at {end}")
    return CompositeSpec(
        version,
        length,
        tuple(
            Component(path, offset, end - offset, writable, file_offset)
            for (offset, path, writable, file_offset), end in zip(found, ends, strict=True)
        ),
    )


def _component(message: bytes) -> tuple[int, str, bool, int]:
    path, numbers = b"", {2: 0, 3: 0, 4: 0}
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            path = value
        elif number in numbers and isinstance(value, int):
            numbers[number] = value
        elif number == 1 or number in numbers:
            raise _broken(f"has a component with field {number} in another type than it is")
    if numbers[3] not in (0, 1):
        raise _broken(f"has a component with mode {numbers[3]}; 0 and 1 are known")
    try:
        return numbers[2], path.decode(), numbers[3] == 1, numbers[4]
    except UnicodeDecodeError:
        raise _broken("has a path that is not UTF-8") from None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order; unknown ones too. Fixed-width values come as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise _broken("is no protobuf message")
        if at + length > len(message):
            raise _broken("ends in the middle of a field")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at == len(message):
            raise _broken("ends in the middle of a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK64, at
    raise _broken("has a number of more than 10 bytes")


def _broken(how: str) -> ImageError:
    return ImageError(f"is a broken composite disk: it {how}; make it again")
