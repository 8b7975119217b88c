"""APKs that nobody has vouched for yet: blocks checked against an idsig, the v3 signature, the ZIP inside.

Everything is read through ``VerifiedFile``, so no byte is used before its block has been checked. All sizes
that a file declares are compared with the file's own before they are believed.
"""

import struct
import zlib
from _sha256 import sha256  # hashlib would bring OpenSSL along
from _sha512 import sha512
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from failures import NotVerified

BLOCK: Final = 4096
DIGEST: Final = 32
CHUNK: Final = 1 << 20
MAX_TREE: Final = 16 << 20
MAX_FIELD: Final = 4096
MAX_EXTRACTED: Final = 48 << 20
"""All files of an APK together: they are unpacked into memory."""
MAX_ENTRIES: Final = 4096
SDK: Final = 31
"""Signers for other Android versions are passed over, as in the reference."""

Hash = Callable[[bytes], Any]
Read = Callable[[int, int], bytes]
"""Offset and size to exactly that many bytes."""


# -- idsig --------------------------------------------------------------------------------------------


class Idsig(NamedTuple):
    """What an idsig says of its APK."""

    root: bytes
    apk_digest: bytes
    algorithm: int
    tree: bytes


def read_idsig(read: Read) -> Idsig:
    """Read an idsig.

    Raises:
        NotVerified: It is none, or made in a way that is not known here.
    """
    at = 0

    def number(form: str = "<I") -> int:
        nonlocal at
        size = struct.calcsize(form)
        at += size
        value: int = struct.unpack(form, read(at - size, size))[0]
        return value

    def field(limit: int = MAX_FIELD) -> bytes:
        nonlocal at
        if (size := number()) > limit:
            raise NotVerified(f"a field of the idsig has {size} bytes")
        at += size
        return read(at - size, size)

    if (version := number()) != 2:
        raise NotVerified(f"the idsig has version {version}, not 2")
    number()  # the size of what follows; each field has its own
    algorithm, log_block, salt, root = number(), number("<B"), field(), field()
    if (algorithm, log_block, salt, len(root)) != (1, 12, b"", DIGEST):
        raise NotVerified("the idsig is not of SHA-256 over blocks of 4096 bytes without salt")
    number()
    apk_digest, *_ = (field() for _ in range(4))
    signature_algorithm = number()
    field()
    return Idsig(root, apk_digest, signature_algorithm, field(MAX_TREE))


class VerifiedFile:
    """A file whose blocks are checked when they are read.

    Args:
        read: Reads the file, which has a whole number of blocks, the last one filled up with zeros.
        size: Of the file.
        idsig: Names the root hash and brings the tree, which is checked here, from the root down.

    Raises:
        NotVerified: The tree has not the size that goes with the file, or does not go with the root hash.
    """

    def __init__(self, read: Read, size: int, idsig: Idsig) -> None:
        self.size = size
        self._read = read
        levels = []  # lowest first
        count = size // BLOCK
        while count > 1:
            count = -(-count * DIGEST // BLOCK)
            levels.append(count * BLOCK)
        if sum(levels) != len(idsig.tree):
            raise NotVerified(f"the idsig's tree has {len(idsig.tree)} bytes, not {sum(levels)}")
        self._hashes = idsig.root
        at = 0
        for length in reversed(levels):
            level = idsig.tree[at : at + length]
            for number in range(length // BLOCK):
                self._check(number, level[number * BLOCK :][:BLOCK], "the idsig's tree")
            self._hashes = level
            at += length

    def _check(self, number: int, block: bytes, what: str) -> None:
        if sha256(block).digest() != self._hashes[number * DIGEST :][:DIGEST]:
            raise NotVerified(f"block {number} of {what} has a wrong hash")

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of checked blocks.

        Raises:
            NotVerified: A block is not what the tree says, or the bytes are not all inside the file.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise NotVerified("something in the APK points outside it")
        first, last = offset // BLOCK, -(-(offset + size) // BLOCK)
        data = self._read(first * BLOCK, (last - first) * BLOCK)
        for number in range(first, last):
            self._check(number, data[(number - first) * BLOCK :][:BLOCK], "the APK")
        return data[offset - first * BLOCK :][:size]


# -- ZIP ----------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One file in an archive."""

    name: str
    method: int
    checksum: int
    packed: int
    size: int
    offset: int


class Apk:
    """A verified APK.

    Attributes:
        entries: Its files by name.
    """

    def __init__(self, file: VerifiedFile) -> None:
        """Read the list of files.

        Raises:
            NotVerified: The APK is no such archive, or too large for this guest.
        """
        self._file = file
        start = max(0, file.size - BLOCK - 22 - 0xFFFF)
        tail = file.read(start, file.size - start).rstrip(b"\0")
        at = tail.rfind(b"PK\5\6")
        if at < 0:
            raise NotVerified("the APK is not a ZIP archive")
        self.end = start + at
        record = file.read(self.end, 22)
        count, size, self.directory, comment = struct.unpack("<HIIH", record[10:])
        self.end_record = file.read(self.end, 22 + comment)
        if self.directory + size != self.end or count > MAX_ENTRIES:
            raise NotVerified("the APK's list of files is not where it should be, or too long")
        self.entries: dict[str, Entry] = {}
        data = file.read(self.directory, size)
        for entry in self._entries(data, count):
            if entry.name in self.entries:
                raise NotVerified(f"the APK has two files {entry.name!r}")
            self.entries[entry.name] = entry
        if sum(entry.size for entry in self.entries.values()) > MAX_EXTRACTED:
            raise NotVerified(f"the APK's files have more than {MAX_EXTRACTED >> 20} MiB")

    def _entries(self, data: bytes, count: int) -> Iterator[Entry]:
        at = 0
        for _ in range(count):
            if data[at : at + 4] != b"PK\1\2" or at + 46 > len(data):
                raise NotVerified("the APK's list of files is damaged")
            flags, method = struct.unpack_from("<HH", data, at + 8)
            checksum, packed, size, name, extra, comment = struct.unpack_from("<IIIHHH", data, at + 16)
            (offset,) = struct.unpack_from("<I", data, at + 42)
            if flags & 1:
                raise NotVerified("the APK has an encrypted file")
            text = data[at + 46 : at + 46 + name].decode("utf-8", "replace")
            parts = text.rstrip("/").split("/")
            if not text or "\0" in text or any(part in {"", ".", ".."} for part in parts):
                raise NotVerified(f"the APK has a file of the name {text!r}")
            yield Entry(text, method, checksum, packed, size, offset)
            at += 46 + name + extra + comment

    def content(self, entry: Entry) -> bytes:
        """A file's bytes.

        Raises:
            NotVerified: A block has been changed, or the file is damaged or packed in an unknown way.
        """
        header = self._file.read(entry.offset, 30)
        name, extra = struct.unpack("<HH", header[26:])
        data = self._file.read(entry.offset + 30 + name + extra, entry.packed)
        if entry.method == 8:
            inflate = zlib.decompressobj(-15)
            try:
                data = inflate.decompress(data, entry.size + 1)
            except zlib.error as error:
                raise NotVerified(f"{entry.name!r} in the APK is damaged: {error}") from error
        elif entry.method:
            raise NotVerified(f"{entry.name!r} in the APK is packed in an unknown way ({entry.method})")
        if len(data) != entry.size or zlib.crc32(data) != entry.checksum:
            raise NotVerified(f"{entry.name!r} in the APK is damaged")
        return data

    # -- The v3 signature -----------------------------------------------------------------------------

    def verify_signature(self, idsig: Idsig) -> None:
        """Check the v3 signature and the APK's content digest, and that the idsig was made for them.

        Raises:
            NotVerified: One of them is wrong; or it is none of RSA (PKCS #1 v1.5) over chunks, the only kind
                that is known here.
        """
        start, block = self._v3_block()
        signers = [signer for signer in _items(_sized(block)[0]) if _for_this_sdk(signer)]
        if len(signers) != 1:
            raise NotVerified(f"the APK has {len(signers)} signers, not 1")
        signed, rest = _sized(signers[0])
        signatures, rest = _sized(rest[8:])
        key, _ = _sized(rest)
        known = [
            (number, value) for number, value in map(_tagged, _items(signatures)) if number in _ALGORITHMS
        ]
        if not known:
            raise NotVerified("the APK's signature is none of RSA (PKCS #1 v1.5)")
        algorithm, signature = max(known)
        hashed, prefix = _ALGORITHMS[algorithm]
        if not _rsa_verifies(key, signature, prefix + hashed(signed).digest()):
            raise NotVerified("Signature is invalid.")
        digests = dict(map(_tagged, _items(_sized(signed)[0])))
        if digests.get(algorithm) != self._content_digest(start, hashed):
            raise NotVerified("the APK's content is not what was signed")
        if (idsig.algorithm, idsig.apk_digest) != (algorithm, digests[algorithm]):
            raise NotVerified("the idsig was made for another APK")

    def _v3_block(self) -> tuple[int, bytes]:
        footer = self._file.read(self.directory - 24, 24)
        (size,) = struct.unpack("<Q", footer[:8])
        start = self.directory - size - 8
        if footer[8:] != b"APK Sig Block 42" or start < 0:
            raise NotVerified("No APK Signing Block before ZIP Central Directory")
        data = self._file.read(start + 8, size - 24)
        while data:
            length, number = struct.unpack_from("<QI", data.ljust(12, b"\0"))
            if not 4 <= length <= len(data) - 8:
                raise NotVerified("the APK's signing block is damaged")
            if number == 0xF05368C0:
                return start, data[12 : 8 + length]
            data = data[8 + length :]
        raise NotVerified("the APK has no v3 signature")

    def _content_digest(self, block_start: int, hashed: Hash) -> bytes:
        record = bytearray(self.end_record)
        struct.pack_into("<I", record, 16, block_start)
        digests = []

        def add(chunk: bytes) -> None:
            digests.append(hashed(b"\xa5" + struct.pack("<I", len(chunk)) + chunk).digest())

        for first, last in (0, block_start), (self.directory, self.end):
            for at in range(first, last, CHUNK):
                add(self._file.read(at, min(CHUNK, last - at)))
        add(bytes(record))
        joined = b"\x5a" + struct.pack("<I", len(digests)) + b"".join(digests)
        digest: bytes = hashed(joined).digest()
        return digest


def _sized(data: bytes) -> tuple[bytes, bytes]:
    """What stands behind its length, and what follows it."""
    (size,) = struct.unpack("<I", data[:4].ljust(4, b"\xff"))
    if size > len(data) - 4:
        raise NotVerified("the APK's signing block is damaged")
    return data[4 : 4 + size], data[4 + size :]


def _items(data: bytes) -> Iterator[bytes]:
    while data:
        item, data = _sized(data)
        yield item


def _tagged(item: bytes) -> tuple[int, bytes]:
    (number,) = struct.unpack("<I", item[:4].ljust(4, b"\0"))
    return number, _sized(item[4:])[0]


def _for_this_sdk(signer: bytes) -> bool:
    lowest, highest = struct.unpack("<II", _sized(signer)[1][:8].ljust(8, b"\0"))
    return bool(lowest <= SDK < highest)


_ALGORITHMS: Final[dict[int, tuple[Hash, bytes]]] = {
    0x0103: (sha256, bytes.fromhex("3031300d060960864801650304020105000420")),
    0x0104: (sha512, bytes.fromhex("3051300d060960864801650304020305000440")),
}
"""The hash, and what stands before it in a PKCS #1 v1.5 signature."""


def _rsa_verifies(key: bytes, signature: bytes, tail: bytes) -> bool:
    body = _der(_der(key)[1])  # SubjectPublicKeyInfo: the algorithm, and the key in a bit string
    modulus_der, rest = _integer(_der(_der(body[2])[1][1:])[1])
    exponent, _ = _integer(rest)
    size = (modulus_der.bit_length() + 7) // 8
    if size < 256 or len(signature) != size:
        return False
    number = pow(int.from_bytes(signature, "big"), exponent, modulus_der)
    padding = b"\xff" * (size - 3 - len(tail))
    return number.to_bytes(size, "big") == b"\0\1" + padding + b"\0" + tail


def _der(data: bytes) -> tuple[int, bytes, bytes]:
    """One DER value: tag, content, and what follows it."""
    if len(data) < 2:
        raise NotVerified("the signer's key is damaged")
    length, at = data[1], 2
    if length & 0x80:
        at += length & 0x7F
        length = int.from_bytes(data[2:at], "big")
    if at > 6 or at + length > len(data):
        raise NotVerified("the signer's key is damaged")
    return data[0], data[at : at + length], data[at + length :]


def _integer(data: bytes) -> tuple[int, bytes]:
    tag, content, rest = _der(data)
    if tag != 2:
        raise NotVerified("the signer's key is not of RSA")
    return int.from_bytes(content, "big"), rest
