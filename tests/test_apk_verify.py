"""Verifying APKs: known answers, APKs that apksigner signed a moment ago, and what is done to them."""

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from tests.apks import (
    KNOWN,
    Key,
    apksigner,
    expected,
    make_certificate,
    opened,
    signed_data,
    signer,
    unsigned,
    v3_block,
    with_v3,
    write_key,
)
from vmactor.errors import ApkError
from vmactor.images.apk import V3_BLOCK_ID, find_sections
from vmactor.images.apk_v3 import ALGORITHMS, find_signer
from vmactor.images.apk_verify import VerifiedApk, content_digest, verify_apk
from vmactor.images.idsig import Idsig, create_or_update_idsig_file, read_idsig


def verify(apk: Path, idsig: Path | None = None) -> VerifiedApk:
    """Verify files."""
    with opened(apk) as apk_fd:
        if idsig is None:
            return verify_apk(apk_fd)
        with opened(idsig) as idsig_fd:
            return verify_apk(apk_fd, idsig_fd)


@pytest.mark.parametrize("row", expected("idsig_create"))
def test_the_known_apks_verify_or_fail_as_is_known(row: dict[str, Any]) -> None:
    apk = KNOWN / row["file"]
    if row["verify_v3"] != "ok":
        with pytest.raises(ApkError) as caught:
            verify(apk)
        assert caught.value.text == row["verify_v3"]
        return
    verified = verify(apk)
    assert verified.public_key == (KNOWN / f"{row['file']}.der").read_bytes()
    assert len(verified.public_key) == row["public_key_der_size"]
    assert verified.digest == (KNOWN / f"{row['file']}.apk_digest").read_bytes()
    assert f"{verified.algorithm.identifier:#06x}" == row["signature_algorithm_id"]


# -- apksigner -----------------------------------------------------------------------------------------

KEYS: dict[str, Callable[[], Key]] = {
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "rsa-4096": lambda: rsa.generate_private_key(65537, 4096),
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
}


@pytest.fixture(scope="module")
def content() -> tuple[bytes, ...]:
    """Entries of several chunks of the content digest."""
    return b"small", os.urandom(2_500_000), bytes(300_000)


@pytest.mark.parametrize(
    ("kind", "verity", "algorithm"),
    [
        ("rsa", False, "RsaPkcs1V15WithSha256"),
        ("rsa-4096", False, "RsaPkcs1V15WithSha512"),
        ("p256", False, "EcdsaWithSha256"),
        ("p384", False, "EcdsaWithSha512"),
        ("p256", True, "VerityEcdsaWithSha256"),
        ("rsa", True, "VerityRsaPkcs1V15WithSha256"),
    ],
)
def test_what_apksigner_signs_verifies_with_its_idsig_and_ours(
    tmp_path: Path, content: tuple[bytes, ...], kind: str, verity: bool, algorithm: str
) -> None:
    apk, theirs, ours = unsigned(tmp_path / "apk", *content), tmp_path / "apk.idsig", tmp_path / "ours"
    key = KEYS[kind]()
    apksigner(apk, write_key(key, tmp_path), v2=True, v3=True, v4=True, verity=verity)

    verified = verify(apk, theirs)
    assert verified.algorithm.name == algorithm
    assert verified.public_key == key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert verified.idsig is not None
    assert verified.idsig.signed

    with opened(apk) as apk_fd, opened(ours, os.O_RDWR | os.O_CREAT) as idsig_fd:
        create_or_update_idsig_file(apk_fd, idsig_fd)
        mine, my_tree = read_idsig(idsig_fd)
        with opened(theirs, os.O_RDWR) as theirs_fd:
            assert not create_or_update_idsig_file(apk_fd, theirs_fd).written
            signed, their_tree = read_idsig(theirs_fd)
    assert (mine.root, mine.apk_digest, mine.tree_size) == (signed.root, signed.apk_digest, signed.tree_size)
    assert ours.read_bytes()[my_tree:] == theirs.read_bytes()[their_tree:]
    assert not mine.signed
    assert signed.header() == theirs.read_bytes()[:their_tree]
    verified = verify(apk, ours)
    assert verified.idsig == mine

    _hurt_the_idsig(apk, theirs, signed, my_tree)


def _hurt_the_idsig(apk: Path, theirs: Path, signed: Idsig, tree_begin: int) -> None:
    tree, last = theirs.read_bytes()[len(signed.header()) :], signed.signature[-1]
    for change, text in (
        (replace(signed, signature=signed.signature[:-1] + bytes([last ^ 1])), "Signature is invalid"),
        (replace(signed, additional_data=b"more"), "Signature is invalid."),
        (replace(signed, signature=b""), "Signature is invalid."),
        (replace(signed, certificate=b"another"), "another certificate than the APK"),
        (replace(signed, certificate=b""), "another certificate than the APK"),
        (replace(signed, public_key=b"none"), "public key cannot be read"),
        (replace(signed, algorithm=0x0301), "DsaWithSha256 is not supported"),
        (replace(signed, algorithm=0x0101 if "Ec" in ALGORITHMS[signed.algorithm].name else 0x0201), "key"),
        (replace(signed, apk_digest=bytes(32)), "Digest mismatch"),
        (replace(signed, salt=b"salt"), "Root hash mismatch"),
        (replace(signed, root=bytes(32)), "Root hash mismatch"),
    ):
        theirs.write_bytes(change.header() + tree)
        with pytest.raises(ApkError, match=text):
            verify(apk, theirs)
    assert tree_begin < len(signed.header())


def test_an_apk_signed_with_v2_only_is_refused(tmp_path: Path) -> None:
    apk = unsigned(tmp_path / "apk", b"content")
    apksigner(apk, write_key(KEYS["p256"](), tmp_path), v2=True, v3=False, v4=False)
    with pytest.raises(ApkError, match="Fallback to v2 when v3 block not found"):
        verify(apk)


def test_any_change_of_a_signed_apk_is_found(tmp_path: Path) -> None:
    apk = unsigned(tmp_path / "apk", os.urandom(1_500_000), comment=b"a comment is signed, too")
    apksigner(apk, write_key(KEYS["p256"](), tmp_path), v2=False, v3=True, v4=False)
    verify(apk)
    data = apk.read_bytes()
    with opened(apk) as fd:
        sections = find_sections(fd, len(data))
    places = [0, 700_000, sections.signing_block - 1, sections.central_directory + 30, len(data) - 1]
    places.append(data.index(struct.pack("<I", V3_BLOCK_ID)) + 60)
    for place in places:
        apk.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ApkError):
            verify(apk)
    for cut in (1, 10, 1000):
        apk.write_bytes(data[:-cut])
        with pytest.raises(ApkError):
            verify(apk)
    apk.write_bytes(data + b"x")
    with pytest.raises(ApkError, match="the comment does not end with the file"):
        verify(apk)


# -- Signed here ---------------------------------------------------------------------------------------


def sign_here(
    path: Path,
    key: Key,
    identifier: int,
    sign: Callable[[bytes], bytes],
    *,
    sdks: tuple[int, int] = (28, 99),
    more: tuple[tuple[int, bytes], ...] = (),
    more_signatures: tuple[tuple[int, bytes], ...] = (),
) -> Path:
    """Sign with an algorithm that apksigner does not use, or differently from how it does."""
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def block(digest: bytes) -> bytes:
        data = signed_data([(identifier, digest), *more], certificates=[make_certificate(key)], sdks=(28, 99))
        signatures = [(identifier, sign(data)), *more_signatures]
        return signer(data, signatures, public_key=public, sdks=sdks)

    zipped = path.with_suffix(".zip")
    unsigned(zipped, b"content" * 100_000)
    path.write_bytes(zipped.read_bytes())
    with_v3(path, block(bytes(64)))
    with opened(path) as fd:  # the content does not depend on what the block says
        digest = content_digest(fd, find_sections(fd, path.stat().st_size), ALGORITHMS[identifier].digest)
    path.write_bytes(zipped.read_bytes())
    return with_v3(path, block(digest))


@pytest.mark.parametrize(("identifier", "digest"), [(0x0101, hashes.SHA256()), (0x0102, hashes.SHA512())])
def test_rsa_pss_is_verified_with_a_salt_as_long_as_the_digest(
    tmp_path: Path, identifier: int, digest: hashes.SHA256 | hashes.SHA512
) -> None:
    key = rsa.generate_private_key(65537, 2048)

    def sign(salt: int) -> Callable[[bytes], bytes]:
        return lambda data: key.sign(data, padding.PSS(padding.MGF1(digest), salt), digest)

    verified = verify(sign_here(tmp_path / "apk", key, identifier, sign(digest.digest_size)))
    assert verified.algorithm.identifier == identifier
    with pytest.raises(ApkError, match="Signature is invalid"):
        verify(sign_here(tmp_path / "apk", key, identifier, sign(20)))


P256 = ec.generate_private_key(ec.SECP256R1())


def by_p256(data: bytes) -> bytes:
    """A signature."""
    return P256.sign(data, ec.ECDSA(hashes.SHA256()))


def test_lists_and_platform_versions_must_agree_inside_and_outside(tmp_path: Path) -> None:
    verify(sign_here(tmp_path / "apk", P256, 0x0201, by_p256))
    with pytest.raises(ApkError, match="SDK versions mismatch"):
        verify(sign_here(tmp_path / "apk", P256, 0x0201, by_p256, sdks=(28, 98)))
    for more, more_signatures in (((0x9999, b"digest"),), ()), ((), ((0x9999, b"signature"),)):
        with pytest.raises(ApkError, match="Signature algorithms don't match between digests and signatures"):
            verify(
                sign_here(tmp_path / "apk", P256, 0x0201, by_p256, more=more, more_signatures=more_signatures)
            )


def test_a_key_of_another_kind_than_the_algorithm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ApkError, match="the key cannot be one for RsaPkcs1V15WithSha256"):
        verify(sign_here(tmp_path / "apk", P256, 0x0103, by_p256))


def key_of(identifiers: list[int], *, sdks: tuple[int, int] = (28, 99)) -> bytes:
    """A signer with these signatures, and digests that tell them apart."""
    items = [(number, bytes([place])) for place, number in enumerate(identifiers)]
    return signer(signed_data(items), items, public_key=b"", sdks=sdks)


@pytest.mark.parametrize(
    ("identifiers", "chosen"),
    [
        ([0x0103, 0x0421, 0x0104], 2),
        ([0x0104, 0x0421, 0x0103], 0),
        ([0x0103, 0x0101, 0x0201], 2),
        ([0x0421, 0x0423, 0x0103], 1),
        ([0x0301, 0x0425, 0x9999, 0x0201], 3),
        ([0x0202, 0x0301], 0),
    ],
)
def test_the_strongest_signature_counts_and_the_last_of_equals(identifiers: list[int], chosen: int) -> None:
    found = find_signer(v3_block(key_of(identifiers)))
    algorithm, signature = found.strongest()
    assert (algorithm.identifier, signature) == (identifiers[chosen], bytes([chosen]))
    first = identifiers.index(algorithm.identifier)
    assert found.signed_data.digest_for(algorithm) == bytes([first])


@pytest.mark.parametrize(
    ("sdks", "found"),
    [([(28, 32)], 1), ([(31, 32)], 1), ([(32, 99)], 0), ([(28, 31)], 0), ([(24, 30), (31, 99)], 1),
     ([(24, 99), (31, 99)], 2), ([], 0)],
)  # fmt: skip
def test_exactly_one_signer_must_be_for_sdk_31(sdks: list[tuple[int, int]], found: int) -> None:
    block = v3_block(*(key_of([0x0201], sdks=each) for each in sdks))
    if found == 1:
        find_signer(block)
        return
    text = f"APK Signature Scheme V3 only supports one signer: {found} signers found."
    with pytest.raises(ApkError, match=text):
        find_signer(block)


@pytest.mark.parametrize("cores", [1, 3])
def test_the_number_of_processors_changes_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    apk = unsigned(tmp_path / "apk", os.urandom(9_000_000))
    apksigner(apk, write_key(P256, tmp_path), v2=False, v3=True, v4=True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)))
    heard: list[int] = []
    with opened(apk) as fd, opened(tmp_path / "apk.idsig") as idsig_fd:
        verify_apk(fd, idsig_fd, heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 2 * apk.stat().st_size


def test_what_is_no_idsig_is_told_before_anything_is_hashed(tmp_path: Path) -> None:
    heard: list[int] = []
    with (
        opened(sign_here(tmp_path / "apk", P256, 0x0201, by_p256)) as fd,
        opened(tmp_path) as directory,
        pytest.raises(ApkError, match="the idsig is not a regular file"),
    ):
        verify_apk(fd, directory, heard.append)
    assert heard == []


def test_an_exception_of_progress_ends_the_verification(tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    def enough(_done: int) -> None:
        raise EnoughError

    with opened(sign_here(tmp_path / "apk", P256, 0x0201, by_p256)) as fd, pytest.raises(EnoughError):
        verify_apk(fd, None, enough)
