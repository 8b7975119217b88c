"""Hashing a file's blocks one by one: the inner loop of every Merkle tree, in this process or in a helper.

The interpreter's lock bounds how much of this threads can do together: a hash of 4,096 bytes takes hardly
longer than handing the lock over, so two threads hash no more than one. Two processes hash twice as much. So
this module is also a program, run by ``hash_processes`` on a descriptor that it inherits; to start within
milliseconds it needs a few modules of the standard library and nothing of vmactor.

As a program it reads tickets from standard input, each the offset of a stripe, and answers each on standard
output with the offset and the stripe's digests. It ends with its input, or at the first thing that goes
wrong: whoever gave out the tickets does their work then, and sees for itself what is wrong.
"""

import os
import struct
import sys
from hashlib import sha256

BLOCK = 4096
DIGEST = 32
STRIPE = 512 * BLOCK
"""What is read and hashed at once: large enough that a read costs nothing, small enough for the cache."""
TICKET = struct.Struct("<Q")


def fill(fd: int, view: memoryview, offset: int) -> None:
    """Fill a buffer from a place in a file, wherever the file's own offset is.

    Raises:
        EOFError: The file ends before (the text is the reference's).
        OSError: It cannot be read.
    """
    while len(view):
        count = os.preadv(fd, [view], offset)
        if not count:
            raise EOFError("failed to fill whole buffer")
        view, offset = view[count:], offset + count


class BlockHasher:
    """Hashes stripes of a file; its buffer is used again for each, so it is one thread's.

    Args:
        prefix: Hashed before every block (a salt).
    """

    def __init__(self, prefix: bytes = b"") -> None:
        self._seed = sha256(prefix) if prefix else None
        self._buffer = memoryview(bytearray(STRIPE))
        self._blocks = [self._buffer[start : start + BLOCK] for start in range(0, STRIPE, BLOCK)]

    def hash(self, fd: int, offset: int, length: int) -> bytes:
        """The digests of a stripe's blocks; the last block is filled up with zeros.

        Args:
            fd: A file, open for reading.
            offset: Where the stripe begins.
            length: Its bytes, at most ``STRIPE``.

        Raises:
            EOFError: The file ends before.
            OSError: It cannot be read.
        """
        fill(fd, self._buffer[:length], offset)
        return self.hash_buffer(length)

    @property
    def buffer(self) -> memoryview:
        """Where ``hash_buffer`` expects a stripe."""
        return self._buffer

    def hash_buffer(self, length: int) -> bytes:
        """The digests of what is in ``buffer``, as ``hash`` makes them."""
        count = -(-length // BLOCK)
        self._buffer[length : count * BLOCK] = bytes(count * BLOCK - length)
        if self._seed is None:
            return b"".join([sha256(block).digest() for block in self._blocks[:count]])
        digests = []
        for block in self._blocks[:count]:
            state = self._seed.copy()
            state.update(block)
            digests.append(state.digest())
        return b"".join(digests)


def _serve(fd: int, size: int, prefix: bytes) -> None:
    hasher = BlockHasher(prefix)
    while len(ticket := os.read(0, TICKET.size)) == TICKET.size:
        (offset,) = TICKET.unpack(ticket)
        answer = memoryview(ticket + hasher.hash(fd, offset, min(STRIPE, size - offset)))
        while answer:
            answer = answer[os.write(1, answer) :]


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3]))
