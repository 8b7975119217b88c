"""APKs for tests: known answers beside the repository, what apksigner signs, what is put together here."""

import datetime
import json
import os
import struct
import subprocess
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from vmactor.images.apk import V3_BLOCK_ID

KNOWN = Path(__file__).parent.parent.parent / "shared" / "testdata" / "apkverify"
Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

KEY = bytes.fromhex(  # a public key of P-256
    "3059301306072a8648ce3d020106082a8648ce3d030107034200046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a1"
    "3945d898c2964fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)
DIGEST = bytes(range(32))


def expected(kind: str) -> list[Any]:
    """Rows of the known answers; skips the module's tests where they are absent."""
    file = KNOWN / "expected.json"
    if not file.exists():
        reason = "no known answers in ../shared/testdata/apkverify"
        return [pytest.param(None, id="absent", marks=pytest.mark.skip(reason=reason))]
    return [
        pytest.param(row, id=row.get("file") or row["input"]) for row in json.loads(file.read_text())[kind]
    ]


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def unsigned(path: Path, *entries: bytes, comment: bytes = b"") -> Path:
    """A ZIP with these contents."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, entry in enumerate(entries):
            archive.writestr(f"entry{number}", entry)
        archive.comment = comment
    return path


def make_certificate(key: Key) -> bytes:
    """A certificate in which a key signs itself, DER."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vmactor test")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2050, 1, 1, tzinfo=datetime.UTC))
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def write_key(key: Key, directory: Path) -> tuple[Path, Path]:
    """A key's file and that of a certificate for it, as apksigner wants them."""
    private = key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "key.pk8").write_bytes(private)
    (directory / "key.der").write_bytes(make_certificate(key))
    return directory / "key.pk8", directory / "key.der"


def apksigner(
    apk: Path, key: tuple[Path, Path], *, v2: bool, v3: bool, v4: bool, verity: bool = False
) -> None:
    """Sign an APK in its place; with v4 there is an idsig beside it afterwards."""
    switches = {"v1-signing": False, "v2-signing": v2, "v3-signing": v3, "v4-signing": v4, "verity": verity}
    subprocess.run(
        [
            *("apksigner", "sign", "--key", key[0], "--cert", key[1], "--min-sdk-version", "28"),
            *(word for name, on in switches.items() for word in (f"--{name}-enabled", str(on).lower())),
            apk,
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1"},
    )


# -- Signing blocks put together here ------------------------------------------------------------------


def sized(*parts: bytes) -> bytes:
    """Each after its length."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def tagged(*items: tuple[int, bytes]) -> bytes:
    """A sequence of signatures or digests."""
    return sized(sized(*(struct.pack("<I", number) + sized(value) for number, value in items)))


def signed_data(
    digests: Sequence[tuple[int, bytes]],
    *,
    certificates: Sequence[bytes] = (),
    sdks: tuple[int, int] = (28, 2**31 - 1),
) -> bytes:
    """What a signer signs."""
    return tagged(*digests) + sized(sized(*certificates)) + struct.pack("<II", *sdks) + sized(b"")


def signer(
    data: bytes,
    signatures: Sequence[tuple[int, bytes]],
    *,
    public_key: bytes,
    sdks: tuple[int, int] = (28, 2**31 - 1),
) -> bytes:
    """A signer of a v3 block."""
    return sized(data) + struct.pack("<II", *sdks) + tagged(*signatures) + sized(public_key)


def v3_block(*signers: bytes) -> bytes:
    """The value of a v3 block."""
    return sized(sized(*signers))


def with_block(path: Path, *pairs: tuple[int, bytes], sizes: tuple[int, int] | None = None) -> Path:
    """Put an APK Signing Block into a ZIP; sizes of one's own in its header and footer, for lies."""
    entries = b"".join(struct.pack("<QI", len(value) + 4, number) + value for number, value in pairs)
    header, footer = sizes or (len(entries) + 24,) * 2
    block = struct.pack("<Q", header) + entries + struct.pack("<Q", footer) + b"APK Sig Block 42"
    with path.open("r+b") as file:
        file.seek(max(0, path.stat().st_size - 70_000))
        end_record = file.read()
        end_record = end_record[end_record.rindex(b"PK\5\6") :]
        (directory,) = struct.unpack_from("<I", end_record, 16)
        file.seek(directory)
        tail = bytearray(file.read())
        struct.pack_into("<I", tail, len(tail) - len(end_record) + 16, directory + len(block))
        file.seek(directory)
        file.write(block + tail)
    return path


def with_v3(path: Path, *signers: bytes) -> Path:
    """Put a v3 block into a ZIP."""
    return with_block(path, (V3_BLOCK_ID, v3_block(*signers)))


def apk_with(
    path: Path, *contents: bytes, algorithm: int = 0x0201, digest: bytes = DIGEST, key: bytes = KEY
) -> Path:
    """An APK whose signature nobody has made: idsig files need none."""
    data = signed_data([(algorithm, digest)])
    return with_v3(unsigned(path, *contents), signer(data, [(algorithm, b"none")], public_key=key))
