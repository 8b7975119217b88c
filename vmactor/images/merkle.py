"""Merkle trees as fs-verity and dm-verity have them: SHA-256 over blocks of 4,096 bytes.

Level 0 holds the digests of the input's blocks, every other level those of the level below it. Each is filled
up with zeros to whole blocks; the highest is one block, whose digest is the root. An input of one block or
less has no tree: its root is its own digest. A tree is stored with its highest level first.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

from vmactor.errors import ResourceExhaustedError
from vmactor.images.block_hash import BLOCK, DIGEST, STRIPE, BlockHasher, fill
from vmactor.images.hash_processes import Progress, hash_file

SHA256_INPUT_BLOCK: Final = 64
"""A salt is filled up with zeros to a multiple of this (reference: Merkle tree)."""


def level_sizes(size: int) -> list[int]:
    """The sizes of a tree's levels in bytes, lowest first; none for an input of one block or less."""
    sizes = []
    while size > BLOCK:
        size = -(-size // BLOCK) * DIGEST
        size += -size % BLOCK
        sizes.append(size)
    return sizes


def padded_salt(salt: bytes) -> bytes:
    """What is hashed before every block."""
    return salt + bytes(-len(salt) % SHA256_INPUT_BLOCK)


class MerkleTree:
    """A tree, kept in an unnamed temporary file: it takes a 128th of its input's size.

    Use it in a ``with`` block, which ends the file's life.

    Args:
        size: The input's, in bytes.
        prefix: Hashed before every block; see ``padded_salt``.

    Attributes:
        size: The tree's, in bytes.
        root: Its root; set by the ``hash`` methods.
    """

    def __init__(self, size: int, prefix: bytes = b"") -> None:
        self.root = b""
        self._input_size = size
        self._prefix = prefix
        self._levels = level_sizes(size)
        self.size = sum(self._levels)
        with ExitStack() as owned, _no_room():
            self._file = owned.enter_context(tempfile.TemporaryFile(buffering=0))
            os.truncate(self._file.fileno(), self.size)
            owned.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def hash_file(self, fd: int, progress: Progress) -> None:
        """Make the tree of a file's first bytes, by several processes where that is faster.

        Args:
            fd: Open for reading; read at offsets only.
            progress: Called often with the bytes hashed so far; an exception of its own ends the work.

        Raises:
            ApkError: The file is shorter than it was said to be, or cannot be read.
            ResourceExhaustedError: No room for the tree.
        """
        hash_file(fd, self._input_size, self._store, progress, prefix=self._prefix)
        self._finish()

    def hash_input(self, read: Callable[[memoryview, int], None]) -> None:
        """Make the tree of anything that can be read in pieces, in this thread.

        Args:
            read: Fills a buffer from an offset of the input, or raises; its exceptions come out.

        Raises:
            ResourceExhaustedError: No room for the tree.
        """
        hasher = BlockHasher(self._prefix)
        for offset in range(0, self._input_size, STRIPE):
            length = min(STRIPE, self._input_size - offset)
            read(hasher.buffer[:length], offset)
            self._store(offset, hasher.hash_buffer(length))
        self._finish()

    def read(self, offset: int, length: int) -> bytes:
        """A piece of the stored tree.

        Raises:
            ResourceExhaustedError: The temporary file cannot be read.
        """
        piece = bytearray(length)
        with _no_room():
            fill(self._file.fileno(), memoryview(piece), offset)
        return bytes(piece)

    def _store(self, offset: int, digests: bytes) -> None:
        if self._levels:
            self._write(self.size - self._levels[0] + offset // BLOCK * DIGEST, digests)
        else:
            self.root = digests

    def _write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[count:], offset + count

    def _finish(self) -> None:
        """Hash the levels above the lowest."""
        hasher = BlockHasher(self._prefix)
        if not self._input_size:
            hasher.buffer[:BLOCK] = bytes(BLOCK)
            self.root = hasher.hash_buffer(BLOCK)
        if not self._levels:
            return
        start = self.size - self._levels[0]
        for size, size_above in pairwise(self._levels):
            start_above = start - size_above
            for offset in range(0, size, STRIPE):
                digests = self._hash(hasher, start + offset, min(STRIPE, size - offset))
                self._write(start_above + offset // BLOCK * DIGEST, digests)
            start = start_above
        self.root = self._hash(hasher, 0, BLOCK)

    def _hash(self, hasher: BlockHasher, offset: int, length: int) -> bytes:
        with _no_room():
            return hasher.hash(self._file.fileno(), offset, length)


@contextmanager
def _no_room() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        raise ResourceExhaustedError(
            f"no temporary file for a Merkle tree: {error}; make room, or let $TMPDIR name another directory"
        ) from error
