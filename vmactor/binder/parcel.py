"""Parcels: the arguments and results of binder calls.

Every item begins at a multiple of 4 from the parcel's start and is little endian; what is written to pad is
zero, what is read as padding is not looked at. Strings are UTF-16 with a length in units and a final zero,
whatever type the sender's language gives them.
"""

from __future__ import annotations

import struct
from typing import NoReturn, Union

from .wire import ADDRESS, Address, Status

_INT32 = struct.Struct("<i")
_INT64 = struct.Struct("<q")

BINDER_OBJECT = 1
"""The type of a binder among the objects in a parcel; 0 is none, 2 a descriptor, which cannot travel here."""

Value = Union[int, bool, str, bytes, None]  # noqa: UP007 - evaluated, and guests may have Python 3.8


class ParcelError(Exception):
    """A parcel does not hold what was to be read from it.

    Attributes:
        status: What libbinder calls it.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Parcel:
    """A parcel that is written from its start."""

    def __init__(self) -> None:
        self._data = bytearray()

    def to_bytes(self) -> bytes:
        """What has been written."""
        return bytes(self._data)

    def int32(self, value: int) -> Parcel:
        """A signed number of 32 bits; also enumerations."""
        self._data += _INT32.pack(value)
        return self

    def int64(self, value: int) -> Parcel:
        """A signed number of 64 bits; not aligned to 8."""
        self._data += _INT64.pack(value)
        return self

    def boolean(self, value: bool) -> Parcel:
        """0 or 1 in 32 bits."""
        return self.int32(1 if value else 0)

    def string(self, value: str | None) -> Parcel:
        """Text; characters outside the basic plane are two units. Lone surrogates are written as they are."""
        if value is None:
            return self.int32(-1)
        data = value.encode("utf-16-le", "surrogatepass")
        self.int32(len(data) // 2)
        return self._padded(data + b"\0\0")

    def byte_array(self, value: bytes | None) -> Parcel:
        """Bytes with their number."""
        if value is None:
            return self.int32(-1)
        self.int32(len(value))
        return self._padded(value)

    def binder(self, address: Address | None, stability: int = 0) -> Parcel:
        """An object, or none.

        Args:
            address: The object's.
            stability: Who may use it; 0 with none.
        """
        if address is None:
            return self.int32(0).int32(0)
        self.int32(BINDER_OBJECT)
        self._data += ADDRESS.pack(address.options, address.number)
        return self.int32(stability)

    def _padded(self, data: bytes) -> Parcel:
        self._data += data + bytes(-len(data) % 4)
        return self


class ParcelReader:
    """Reads a parcel that somebody else wrote; never beyond its end, never more memory than it has."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def int32(self) -> int:
        """Read what ``Parcel.int32`` writes. Raises ParcelError, as all the following."""
        (value,) = _INT32.unpack(self._take(4))
        return int(value)

    def int64(self) -> int:
        """Read what ``Parcel.int64`` writes."""
        (value,) = _INT64.unpack(self._take(8))
        return int(value)

    def boolean(self) -> bool:
        """Everything but 0 is true."""
        return self.int32() != 0

    def string(self) -> str:
        """Text that must be there; lone surrogates become U+FFFD, so that it can be written out anywhere."""
        if self.left < 4:
            self._no_string("is missing")
        units = self.int32()
        if units < 0:
            self._no_string("is null")
        size = 2 * units + 2
        if size > self.left:
            self._no_string("is longer than its parcel")
        data = self._take(size)
        if data[-2:] != b"\0\0":
            self._no_string("has no end")
        self._skip_padding(size)
        return data[:-2].decode("utf-16-le", "replace")

    def byte_array(self) -> bytes | None:
        """Bytes, or None."""
        size = self.int32()
        if size == -1:
            return None
        if size < 0 or size > self.left:
            raise ParcelError(Status.NOT_ENOUGH_DATA, "an array is longer than its parcel")
        data = self._take(size)
        self._skip_padding(size)
        return data

    def binder(self) -> tuple[Address, int] | None:
        """An object's address and stability, or None."""
        kind = self.int32()
        if kind == 0:
            if self.int32() != 0:
                raise ParcelError(Status.BAD_TYPE, "a null binder with a stability")
            return None
        if kind != BINDER_OBJECT:
            raise ParcelError(Status.BAD_TYPE, "an object that is no binder")
        options, number = ADDRESS.unpack(self._take(8))
        return Address(options, number), self.int32()

    def _take(self, size: int) -> bytes:
        if size > self.left:
            raise ParcelError(Status.NOT_ENOUGH_DATA, "the parcel ends too early")
        self._at += size
        return self._data[self._at - size : self._at]

    def _skip_padding(self, size: int) -> None:
        self._at = min(self._at + -size % 4, len(self._data))

    def _no_string(self, what: str) -> NoReturn:
        raise ParcelError(Status.UNEXPECTED_NULL, "a string " + what)
