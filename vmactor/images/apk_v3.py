"""The APK Signature Scheme v3 block as data: its signer, and which of the signatures and digests counts.

Nothing is verified here. Numbers are little-endian, every length is believed only as far as its bytes are
there. The block has at most 1 MiB (``apk.MAX_V3_BLOCK``), which bounds memory and time.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from vmactor.errors import ApkError
from vmactor.images.apk import BROKEN, UNSIGNED

SDK: Final = 31
"""The platform version for which a signer is looked for (a constant of the reference)."""


class ContentDigest(Enum):
    """How an APK's content is digested; the order is that of preference (reference: v3 block)."""

    CHUNKED_SHA256 = 1
    VERITY_SHA256 = 2
    CHUNKED_SHA512 = 3


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A signature algorithm of schemes v2 to v4.

    Attributes:
        identifier: Its number in files.
        name: The reference's name.
        digest: Which digest of the content it goes with.
        supported: Not so for DSA.
    """

    identifier: int
    name: str
    digest: ContentDigest
    supported: bool = True


ALGORITHMS: Final = {
    algorithm.identifier: algorithm
    for algorithm in (
        Algorithm(0x0101, "RsaPssWithSha256", ContentDigest.CHUNKED_SHA256),
        Algorithm(0x0102, "RsaPssWithSha512", ContentDigest.CHUNKED_SHA512),
        Algorithm(0x0103, "RsaPkcs1V15WithSha256", ContentDigest.CHUNKED_SHA256),
        Algorithm(0x0104, "RsaPkcs1V15WithSha512", ContentDigest.CHUNKED_SHA512),
        Algorithm(0x0201, "EcdsaWithSha256", ContentDigest.CHUNKED_SHA256),
        Algorithm(0x0202, "EcdsaWithSha512", ContentDigest.CHUNKED_SHA512),
        Algorithm(0x0301, "DsaWithSha256", ContentDigest.CHUNKED_SHA256, supported=False),
        Algorithm(0x0421, "VerityRsaPkcs1V15WithSha256", ContentDigest.VERITY_SHA256),
        Algorithm(0x0423, "VerityEcdsaWithSha256", ContentDigest.VERITY_SHA256),
        Algorithm(0x0425, "VerityDsaWithSha256", ContentDigest.VERITY_SHA256, supported=False),
    )
}
"""By identifier."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A signature or a digest, with the identifier of its algorithm, which may be unknown."""

    identifier: int
    value: bytes


@dataclass(frozen=True, slots=True)
class SignedData:
    """What a signer signed."""

    digests: tuple[Tagged, ...]
    certificates: tuple[bytes, ...]
    sdks: tuple[int, int]

    def digest_for(self, algorithm: Algorithm) -> bytes:
        """The first digest of that algorithm.

        Raises:
            ApkError: There is none.
        """
        for digest in self.digests:
            if digest.identifier == algorithm.identifier:
                return digest.value
        raise ApkError(f"Digest not found for algorithm: {algorithm.name}", advice=BROKEN)


@dataclass(frozen=True, slots=True)
class Signer:
    """A signer of the v3 block; ``signed_bytes`` are those that ``signed_data`` was read from."""

    signed_bytes: bytes
    sdks: tuple[int, int]
    signatures: tuple[Tagged, ...]
    public_key: bytes

    @property
    def signed_data(self) -> SignedData:
        """What was signed.

        Raises:
            ApkError: It has another form.
        """
        fields = _Fields(self.signed_bytes)
        digests = tuple(fields.tagged())
        certificates = tuple(fields.items())
        sdks = fields.number(), fields.number()
        for _attribute in fields.items():
            pass  # the form must be right; none of them has a meaning for the reference
        return SignedData(digests, certificates, sdks)

    def strongest(self) -> tuple[Algorithm, bytes]:
        """The algorithm and signature that count: those with the best digest, the last of equals.

        Raises:
            ApkError: None is supported.
        """
        best: tuple[Algorithm, bytes] | None = None
        for signature in self.signatures:
            algorithm = ALGORITHMS.get(signature.identifier)
            if algorithm is None or not algorithm.supported:
                continue
            if best is None or algorithm.digest.value >= best[0].digest.value:
                best = algorithm, signature.value
        if best is None:
            raise ApkError("No supported APK signatures found; DSA is not supported", advice=UNSIGNED)
        return best


def find_signer(block: bytes) -> Signer:
    """The one signer for our platform version (from its first one, up to but without its last).

    Raises:
        ApkError: The block has another form, or not one such signer.
    """
    signers = [_signer(_Fields(item)) for item in _Fields(block).items()]
    signers = [signer for signer in signers if signer.sdks[0] <= SDK < signer.sdks[1]]
    if len(signers) != 1:
        raise ApkError(
            f"APK Signature Scheme V3 only supports one signer: {len(signers)} signers found.",
            advice=f"sign it for SDK {SDK} with one key",
        )
    return signers[0]


def _signer(fields: "_Fields") -> Signer:
    return Signer(fields.sized(), (fields.number(), fields.number()), tuple(fields.tagged()), fields.sized())


class _Fields:
    """Reads one field after the other; what is left over at the end is ignored, as in the reference."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def number(self) -> int:
        """A number of 32 bits."""
        (value,) = struct.unpack("<I", self._take(4))
        return int(value)

    def sized(self) -> bytes:
        """Bytes after their length."""
        return self._take(self.number())

    def items(self) -> Iterator[bytes]:
        """Each of a sequence's items; the sequence and they follow their lengths."""
        sequence = _Fields(self.sized())
        while sequence._place < len(sequence._data):
            yield sequence.sized()

    def tagged(self) -> Iterator[Tagged]:
        """A sequence of signatures or digests."""
        for item in self.items():
            fields = _Fields(item)
            yield Tagged(fields.number(), fields.sized())

    def _take(self, size: int) -> bytes:
        start, self._place = self._place, self._place + size
        if self._place > len(self._data):
            raise ApkError("the v3 block ends within a field", advice=BROKEN)
        return self._data[start : self._place]
