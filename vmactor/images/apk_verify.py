"""Verifying an APK's signature (scheme v3, as the reference does in the guest) and its idsig's (scheme v4).

The order of the checks is the reference's, and so is what each of them says. What comes out is who signed:
whether that is the right one is for the caller to know.
"""

import hashlib
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from vmactor.errors import ApkError
from vmactor.images.apk import TAMPERED, ApkSections, apk_size, find_sections, reading, short_hex
from vmactor.images.apk_v3 import ALGORITHMS, Algorithm, ContentDigest, SignedData, find_signer
from vmactor.images.block_hash import BLOCK, fill
from vmactor.images.hash_processes import Progress
from vmactor.images.idsig import Idsig, check_idsig_file, read_idsig
from vmactor.images.merkle import MerkleTree
from vmactor.images.signatures import certificate_key, check_signature, load_public_key, public_key_der

CHUNK: Final = 1024 * 1024
"""Of the chunked content digest (reference: content digest)."""
MAX_THREADS: Final = 8
_VERITY_SALT: Final = bytes(8)
"""The content digest of kind verity is hashed with it, and without filling it up to a block."""
_END_RECORD_OFFSET: Final = 16
"""Where the record at a ZIP's end names the central directory's offset."""


@dataclass(frozen=True, slots=True)
class VerifiedApk:
    """What was verified.

    Attributes:
        algorithm: The algorithm of the signature that counts.
        digest: The content digest that it covers.
        public_key: The signer's, DER.
        certificate: The signer's first, DER.
        idsig: What the idsig says, if one was given.
    """

    algorithm: Algorithm
    digest: bytes
    public_key: bytes
    certificate: bytes
    idsig: Idsig | None


def verify_apk(
    apk_fd: int, idsig_fd: int | None = None, progress: Progress = lambda _done: None
) -> VerifiedApk:
    """Verify an APK's v3 signature, and that its idsig is right and, if it is signed, signed by the same.

    Blocks until done; call it in a worker thread. Offsets of the descriptors are neither used nor moved.

    Args:
        apk_fd: The APK, open for reading.
        idsig_fd: Its idsig, open for reading. One without a signature, as the service makes it, is right if
            its digests and its tree are.
        progress: Called often with the bytes read so far, of the APK, or of twice the APK with an idsig. An
            exception that it raises ends the work and comes out.

    Raises:
        ApkError: Something is not right; says which check failed.
        ResourceExhaustedError: No room for a Merkle tree.
    """
    size = apk_size(apk_fd)
    sections = find_sections(apk_fd, size)
    signer = find_signer(sections.v3_block)
    key = load_public_key(signer.public_key)
    algorithm, signature = signer.strongest()
    check_signature(key, algorithm, signature, signer.signed_bytes)
    signed = signer.signed_data
    if signer.sdks != signed.sdks:
        raise ApkError("SDK versions mismatch between signed and unsigned data", advice=TAMPERED)
    if [digest.identifier for digest in signed.digests] != [item.identifier for item in signer.signatures]:
        raise ApkError(
            "Signature algorithms don't match between digests and signatures records", advice=TAMPERED
        )
    digest = signed.digest_for(algorithm)
    if idsig_fd is not None:
        read_idsig(idsig_fd)  # what is none is told before the long part
    computed = content_digest(apk_fd, sections, algorithm.digest, progress)
    if computed != digest:
        raise ApkError(
            f'Digest mismatch: computed="{computed.hex()}" vs expected="{short_hex(digest)}"', advice=TAMPERED
        )
    public_key = public_key_der(key)
    certificate = _certificate(signed)
    if certificate_key(certificate) != public_key:
        raise ApkError("Public key mismatch between certificate and signature record", advice=TAMPERED)
    idsig = None
    if idsig_fd is not None:
        idsig = check_idsig_file(apk_fd, idsig_fd, lambda done: progress(size + done))
        if idsig.signed:
            _verify_v4(idsig, size, certificate)
    return VerifiedApk(algorithm, digest, public_key, certificate, idsig)


def content_digest(
    fd: int, sections: ApkSections, kind: ContentDigest, progress: Progress = lambda _done: None
) -> bytes:
    """The digest of an APK's content: all of it but the signing block, as if that had never been there.

    Args:
        fd: The APK, open for reading.
        sections: Its parts.
        kind: Which digest.
        progress: As for ``verify_apk``.

    Raises:
        ApkError: The APK cannot be read, or cannot have such a digest.
        ResourceExhaustedError: No room for a Merkle tree.
    """
    record = bytearray(sections.end_record)
    # Without the signing block the central directory would begin where that does.
    struct.pack_into("<I", record, _END_RECORD_OFFSET, sections.signing_block)
    if kind is ContentDigest.VERITY_SHA256:
        return _verity_digest(fd, sections, bytes(record), progress)
    return _chunked_digest(fd, sections, bytes(record), kind, progress)


def _certificate(signed: SignedData) -> bytes:
    if not signed.certificates:
        raise ApkError("No certificates listed", advice=TAMPERED)
    return signed.certificates[0]


def _verify_v4(idsig: Idsig, apk_size: int, certificate: bytes) -> None:
    """The signature of an idsig whose digests are right."""
    if idsig.certificate != certificate:
        raise ApkError("the idsig is signed with another certificate than the APK", advice=TAMPERED)
    algorithm = ALGORITHMS[idsig.algorithm]
    if not algorithm.supported:
        raise ApkError(f"{algorithm.name} is not supported", advice="sign it with another algorithm")
    key = load_public_key(idsig.public_key)
    if public_key_der(key) != certificate_key(certificate):
        raise ApkError("Public key mismatch between certificate and idsig", advice=TAMPERED)
    check_signature(key, algorithm, idsig.signature, idsig.signed_bytes(apk_size))


def _chunked_digest(
    fd: int, sections: ApkSections, record: bytes, kind: ContentDigest, progress: Progress
) -> bytes:
    name = "sha512" if kind is ContentDigest.CHUNKED_SHA512 else "sha256"

    def of_chunk(data: bytes | memoryview) -> bytes:
        digest = hashlib.new(name, b"\xa5" + struct.pack("<I", len(data)))
        digest.update(data)
        return digest.digest()

    def of_piece(offset: int, length: int) -> bytes:
        data = memoryview(bytearray(length))
        with reading():
            fill(fd, data, offset)
        return of_chunk(data)

    pieces = [
        (offset, min(CHUNK, end - offset))
        for start, end in ((0, sections.signing_block), (sections.central_directory, sections.end))
        for offset in range(start, end, CHUNK)
    ]
    chunks = [record[start : start + CHUNK] for start in range(0, len(record), CHUNK)]
    whole = hashlib.new(name, b"\x5a" + struct.pack("<I", len(pieces) + len(chunks)))
    done = 0
    for digest, (_offset, length) in zip(_in_threads(of_piece, pieces), pieces, strict=True):
        whole.update(digest)
        done += length
        progress(done)
    for chunk in chunks:
        whole.update(of_chunk(chunk))
    return whole.digest()


def _in_threads(work: Callable[[int, int], bytes], pieces: list[tuple[int, int]]) -> Iterator[bytes]:
    """Results in order; a hash of a whole chunk gives the interpreter's lock away long enough to pay."""
    count = min(len(os.sched_getaffinity(0)), MAX_THREADS, len(pieces))
    if count < 2:
        for piece in pieces:
            yield work(*piece)
        return
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(count, "vmactor-digest") as pool:
        try:
            for piece in pieces:
                waiting.append(pool.submit(work, *piece))
                if len(waiting) > 2 * count:  # bounds what is in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _verity_digest(fd: int, sections: ApkSections, record: bytes, progress: Progress) -> bytes:
    """The root of the content's Merkle tree, and the content's length."""
    if sections.signing_block % BLOCK:
        raise ApkError(
            f"the content before the signing block is not a multiple of {BLOCK} bytes", advice=TAMPERED
        )
    directory = sections.signing_block + sections.end - sections.central_directory
    size = directory + len(record)
    gap = sections.central_directory - sections.signing_block

    def read(view: memoryview, offset: int) -> None:
        while len(view):
            if offset < directory:
                in_file = offset < sections.signing_block
                end = sections.signing_block if in_file else directory
                piece = view[: end - offset]
                with reading():
                    fill(fd, piece, offset if in_file else offset + gap)
            else:
                piece = view
                piece[:] = record[offset - directory : offset - directory + len(view)]
            view, offset = view[len(piece) :], offset + len(piece)
        progress(offset)

    with MerkleTree(size, _VERITY_SALT) as tree:
        tree.hash_input(read)
        return tree.root + struct.pack("<Q", size)
