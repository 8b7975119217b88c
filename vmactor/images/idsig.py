"""idsig files (APK Signature Scheme v4): the Merkle tree of an APK, with what ties it to the APK's signature.

What "up to date" means here: the idsig holds the root and the whole tree that the APK has now, and the digest
that its v3 block names now. There is no cheaper honest answer. Comparing the v3 digest alone, as later
versions of the reference do, calls an idsig current whose tree is broken, or whose APK was changed after it
was signed; so the APK is always hashed, and the comparison saves the write. An idsig that somebody signed is
current by the same digests: writing it anew would only lose a signature that cannot be made here.

Nothing is verified against a certificate; ``apk_verify`` does that.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from vmactor.errors import ApkError, ResourceExhaustedError
from vmactor.images.apk import apk_size, find_sections, short_hex
from vmactor.images.apk_v3 import ALGORITHMS, find_signer
from vmactor.images.block_hash import STRIPE, fill
from vmactor.images.hash_processes import Progress
from vmactor.images.merkle import MerkleTree, padded_salt
from vmactor.images.signatures import load_public_key

VERSION: Final = 2
HASH_SHA256: Final = 1
LOG2_BLOCK: Final = 12
MAX_HEADER: Final = 1024 * 1024
"""Bytes before the tree that are looked at; certificates and keys have a few thousand."""

_ANEW: Final = "make it anew with 'vmactor create-idsig'"


@dataclass(frozen=True, slots=True)
class Idsig:
    """What an idsig file says before its tree.

    Attributes:
        root: Root of the Merkle tree.
        apk_digest: Digest of the content, as the APK's v3 block has it.
        algorithm: Identifier of the algorithm whose digest that is, and of ``signature``.
        tree_size: Bytes of the tree.
        salt: Of the Merkle tree.
        certificate: Of the signer, DER; empty if nobody signed.
        additional_data: Signed, without a meaning.
        public_key: Of the signer, DER.
        signature: Over ``signed_bytes``; empty if nobody signed.
    """

    root: bytes
    apk_digest: bytes
    algorithm: int
    tree_size: int
    salt: bytes = b""
    certificate: bytes = b""
    additional_data: bytes = b""
    public_key: bytes = b""
    signature: bytes = b""

    @property
    def signed(self) -> bool:
        """Whether there is any part of a signature."""
        return bool(self.certificate or self.public_key or self.signature)

    def header(self) -> bytes:
        """The file's bytes before the tree."""
        hashing = struct.pack("<IB", HASH_SHA256, LOG2_BLOCK) + _sized(self.salt, self.root)
        signing = (
            _sized(self.apk_digest, self.certificate, self.additional_data, self.public_key)
            + struct.pack("<I", self.algorithm)
            + _sized(self.signature)
        )
        return struct.pack("<I", VERSION) + _sized(hashing, signing) + struct.pack("<I", self.tree_size)

    def signed_bytes(self, apk_size: int) -> bytes:
        """What the signature is over: all digests, with the size of the APK."""
        signed = struct.pack("<QIB", apk_size, HASH_SHA256, LOG2_BLOCK) + _sized(
            self.salt, self.root, self.apk_digest, self.certificate, self.additional_data
        )
        return struct.pack("<I", len(signed) + 4) + signed


@dataclass(frozen=True, slots=True)
class IdsigResult:
    """What ``create_or_update_idsig_file`` did.

    Attributes:
        written: Not so if the file was up to date.
        idsig: What the file says now.
    """

    written: bool
    idsig: Idsig


def create_or_update_idsig_file(
    apk_fd: int, idsig_fd: int, progress: Progress = lambda _done: None
) -> IdsigResult:
    """Make the idsig of an APK, or leave the one that is there if it is up to date.

    Blocks until done, for about half a second for each GiB; call it in a worker thread. Offsets of the
    descriptors are neither used nor moved. Memory does not grow with the APK; the tree is put together in a
    temporary file (``$TMPDIR``) of a 128th of its size.

    Args:
        apk_fd: A signed APK, open for reading.
        idsig_fd: A regular file, open for writing; what it holds is compared if it can be read, too.
        progress: Called often with the bytes of the APK done so far. An exception that it raises ends the
            work and comes out.

    Raises:
        ApkError: The APK cannot have an idsig, or the file cannot take it (texts are the reference's). The
            file is as it was, but for an I/O error while it is written, which leaves it empty.
        ResourceExhaustedError: No room for the tree or the idsig. The file is as it was, or empty.
    """
    size = apk_size(apk_fd)
    _check_output(apk_fd, idsig_fd)
    with ExitStack() as owned:
        with _failing_to("failed to create idsig"):
            before = os.fstat(apk_fd)
            apk_digest, algorithm = _apk_digest(apk_fd, size)
            tree = owned.enter_context(MerkleTree(size))
            tree.hash_file(apk_fd, progress)
            after = os.fstat(apk_fd)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise ApkError("the APK changed while it was read", advice="try again when nobody writes it")
        idsig = Idsig(tree.root, apk_digest, algorithm, tree.size)
        found = _up_to_date(idsig_fd, idsig, tree)
        if found is None:
            _write(idsig_fd, idsig.header(), tree)
        return IdsigResult(found is None, found or idsig)


def check_idsig_file(apk_fd: int, idsig_fd: int, progress: Progress = lambda _done: None) -> Idsig:
    """Check that an idsig belongs to an APK: its root, every byte of its tree, and the digest it names.

    Blocks as ``create_or_update_idsig_file`` does, and uses the descriptors as that.

    Args:
        apk_fd: The APK, open for reading.
        idsig_fd: Its idsig, open for reading.
        progress: As there.

    Returns:
        What the idsig says. Whether a signature in it is right is for ``apk_verify`` to tell.

    Raises:
        ApkError: It does not belong to the APK, or one of them cannot be read; it says which.
        ResourceExhaustedError: No room for a tree to compare with.
    """
    size = apk_size(apk_fd)
    idsig, place = read_idsig(idsig_fd)
    apk_digest, _algorithm = _apk_digest(apk_fd, size)
    if idsig.apk_digest != apk_digest:
        raise ApkError(
            f"Digest mismatch: the idsig has {short_hex(idsig.apk_digest)}, "
            f"the APK's v3 block {short_hex(apk_digest)}",
            advice=_ANEW,
        )
    with MerkleTree(size, padded_salt(idsig.salt)) as tree:
        if idsig.tree_size != tree.size:
            raise ApkError(
                f"the idsig's Merkle tree has {idsig.tree_size} bytes, the APK's {tree.size}", advice=_ANEW
            )
        tree.hash_file(apk_fd, progress)
        if idsig.root != tree.root:
            raise ApkError(
                f"Root hash mismatch: the idsig has {short_hex(idsig.root)}, the APK {tree.root.hex()}",
                advice=_ANEW,
            )
        if not _same_tree(idsig_fd, place, tree):
            raise ApkError("the idsig's Merkle tree is not the APK's", advice=_ANEW)
    return idsig


def read_idsig(fd: int) -> tuple[Idsig, int]:
    """What an idsig file says, and where its tree begins; the tree itself is not looked at.

    Args:
        fd: Open for reading; its offset is neither used nor moved.

    Raises:
        ApkError: It is not an idsig, of a kind that is not known, or too long or short.
    """
    try:
        status = os.fstat(fd)
    except (OSError, OverflowError, ValueError) as error:
        raise ApkError("the idsig cannot be read: it is not open", advice="open it for reading") from error
    if not stat.S_ISREG(status.st_mode):
        raise ApkError("the idsig is not a regular file", advice="give it as an open file")
    fields = _Header(_read(fd, 0, min(status.st_size, MAX_HEADER)))
    version = fields.number()
    if version != VERSION:
        raise ApkError(f"{version} is an unsupported version", advice=_ANEW)
    fields.number()  # sizes of parts are not believed, as in the reference; their fields have their own
    hashing = fields.number()
    if hashing != HASH_SHA256:
        raise ApkError(f"Unsupported hash algorithm: {hashing}", advice=_ANEW)
    log2_block = fields.take(1)[0]
    if log2_block != LOG2_BLOCK:
        raise ApkError(f"blocks of 2^{log2_block} bytes are not supported, only 2^{LOG2_BLOCK}", advice=_ANEW)
    salt, root = fields.sized(), fields.sized()
    fields.number()
    apk_digest, certificate, additional_data, public_key = (fields.sized() for _ in range(4))
    algorithm = fields.number()
    if algorithm not in ALGORITHMS:
        raise ApkError(f"Unsupported signature algorithm: {algorithm:#06x}", advice=_ANEW)
    signature = fields.sized()
    tree_size = fields.number()
    if fields.place + tree_size != status.st_size:
        raise ApkError(
            f"merkle tree is {tree_size} bytes, but {status.st_size - fields.place} bytes are there",
            advice=_ANEW,
        )
    idsig = Idsig(
        root, apk_digest, algorithm, tree_size, salt, certificate, additional_data, public_key, signature
    )
    return idsig, fields.place


class _Header:
    """Reads one field after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def sized(self) -> bytes:
        return self.take(self.number())

    def take(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > len(self._data):
            raise ApkError("the idsig ends within its header, or its header is absurdly long", advice=_ANEW)
        return self._data[start : self.place]


def _sized(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@contextmanager
def _failing_to(what: str) -> Iterator[None]:
    """Put what was being done in front of an error, which becomes its cause."""
    try:
        yield
    except ApkError as error:
        raise ApkError(what, error.text, *error.causes, advice=error.advice) from error


def _apk_digest(fd: int, size: int) -> tuple[bytes, int]:
    """The digest that the v3 block names for the strongest signature; nothing is verified."""
    signer = find_signer(find_sections(fd, size).v3_block)
    load_public_key(signer.public_key)  # the reference reads it, too, and refuses what is none
    algorithm, _signature = signer.strongest()
    return signer.signed_data.digest_for(algorithm), algorithm.identifier


def _check_output(apk_fd: int, idsig_fd: int) -> None:
    """Refuse what could not be written, before any work, and what would destroy the APK."""
    try:
        flags = fcntl.fcntl(idsig_fd, fcntl.F_GETFL)
        status = os.fstat(idsig_fd)
    except (OSError, OverflowError, ValueError) as error:
        raise _unfit("the descriptor is not open") from error
    if not stat.S_ISREG(status.st_mode):
        raise _unfit("not a regular file")
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_RDONLY:
        raise _unfit("not open for writing")
    if flags & os.O_APPEND:
        raise _unfit("open for appending only")
    if os.path.samestat(status, os.fstat(apk_fd)):
        raise _unfit("this is the APK itself")


def _unfit(why: str) -> ApkError:
    return ApkError(
        "failed to set_len on the idsig output", why, advice="give a file of its own, open for writing"
    )


def _up_to_date(fd: int, wanted: Idsig, tree: MerkleTree) -> Idsig | None:
    """What the file says, if that is right for the APK; None if the file has to be written."""
    try:
        found, place = read_idsig(fd)
        digests = found.salt, found.root, found.apk_digest, found.tree_size
        if (
            digests == (wanted.salt, wanted.root, wanted.apk_digest, wanted.tree_size)
            and (found.signed or found == wanted)
            and _read(fd, 0, place) == found.header()  # sizes that nobody believes are to be right, too
            and _same_tree(fd, place, tree)
        ):
            return found
    except ApkError:  # it is none, or can only be written
        pass
    return None


def _read(fd: int, offset: int, size: int) -> bytes:
    data = bytearray(size)
    try:
        fill(fd, memoryview(data), offset)
    except (OSError, EOFError) as error:
        raise ApkError(f"the idsig cannot be read: {error}", advice="open it for reading") from error
    return bytes(data)


def _same_tree(fd: int, place: int, tree: MerkleTree) -> bool:
    for offset in range(0, tree.size, STRIPE):
        piece = tree.read(offset, min(STRIPE, tree.size - offset))
        if _read(fd, place + offset, len(piece)) != piece:
            return False
    return True


def _write(fd: int, header: bytes, tree: MerkleTree) -> None:
    total = len(header) + tree.size
    old = os.fstat(fd).st_size
    try:
        if total > old:  # what does not fit is found out before anything is overwritten
            os.posix_fallocate(fd, old, total - old)
    except OSError as error:
        _cut(fd, old)
        raise _write_error(error, "the file is as it was") from error
    try:
        _write_at(fd, header, 0)
        for offset in range(0, tree.size, STRIPE):
            _write_at(fd, tree.read(offset, min(STRIPE, tree.size - offset)), len(header) + offset)
        os.ftruncate(fd, total)
    except BaseException as error:
        _cut(fd, 0)
        if isinstance(error, OSError):
            raise _write_error(error, "the file is empty now") from error
        raise


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _cut(fd: int, size: int) -> None:
    with suppress(OSError):
        os.ftruncate(fd, size)


def _write_error(error: OSError, left: str) -> ApkError | ResourceExhaustedError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return ResourceExhaustedError(
            f"failed to write idsig: {error.strerror}; {left}; make room on its file system"
        )
    return ApkError("failed to write idsig", f"{error.strerror}; {left}", advice="look at its file system")
