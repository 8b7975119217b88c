"""The digests of all blocks of an APK, by as many processes as there are processors.

Each process holds a few tickets and gets the next for every answer, so one on a busy processor simply does
less. What no process has answered, because none could be started or one ended early, is done here: the
result is the same, only later. Nothing a process says is believed beyond its digests' place and length.

Runs in a thread of the caller's, which only waits while processes hash: an event loop beside it is not
disturbed. All processes are gone when the function returns, however it does.
"""

import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Final

from vmactor.images import block_hash
from vmactor.images.apk import reading
from vmactor.images.block_hash import BLOCK, DIGEST, STRIPE, TICKET, BlockHasher
from vmactor.process import Process

PARALLEL_SIZE: Final = 48 * 1024 * 1024
"""From here on processes are worth their start, which takes about as long as hashing 16 MiB."""
MAX_PROCESSES: Final = 8
TICKETS: Final = 3
"""Held by each process at a time, so that none ever waits for the next."""
LOOK_MILLISECONDS: Final = 200
"""How often ``progress`` is called when nothing happens, for it may want to end this."""
_READ_SIZE: Final = 64 * 1024

Store = Callable[[int, bytes], None]
"""Receives a stripe's offset and the digests of its blocks, in any order of stripes."""
Progress = Callable[[int], None]
"""Called often with the bytes done so far; an exception that it raises ends the work and comes out of it."""


def hash_file(fd: int, size: int, store: Store, progress: Progress, *, prefix: bytes = b"") -> None:
    """Hash every block of an APK's first ``size`` bytes; the last block is filled up with zeros.

    Args:
        fd: Open for reading; read at offsets only.
        size: In bytes.
        store: Gets the digests.
        progress: Hears how far that is.
        prefix: Hashed before every block.

    Raises:
        ApkError: The file is shorter, or cannot be read.
        Exception: What ``store`` or ``progress`` raise.
    """
    done = 0
    stripes: Iterator[int] = iter(range(0, size, STRIPE))
    if size >= PARALLEL_SIZE and (count := _processors()) > 1:
        farm = _Farm(fd, size, stripes, prefix)
        with ExitStack() as owned:
            for _ in range(count):
                farm.start_process(owned)
            for answer in farm.answers():
                if answer is not None:
                    store(*answer)
                    done += min(STRIPE, size - answer[0])
                progress(done)
        stripes = chain(farm.given_back, stripes)
    hasher = BlockHasher(prefix)
    for offset in stripes:
        length = min(STRIPE, size - offset)
        with reading():
            digests = hasher.hash(fd, offset, length)
        store(offset, digests)
        done += length
        progress(done)


def _processors() -> int:
    # In a program that embeds or freezes the interpreter this is the program, not to be run a second time.
    if not Path(sys.executable or "").name.startswith("python"):
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


class _Helper:
    """A process, the tickets it holds in order, and what it has said beyond its last whole answer."""

    def __init__(self, tickets: int) -> None:
        self.tickets = tickets
        self.held: deque[int] = deque()
        self.said = bytearray()
        self.sane = True


class _Farm:
    """Hands out stripes to processes and collects their answers.

    Attributes:
        given_back: Stripes that were given to processes which ended without an answer.
    """

    def __init__(self, fd: int, size: int, stripes: Iterator[int], prefix: bytes) -> None:
        self.given_back: deque[int] = deque()
        self._fd = fd
        self._size = size
        self._stripes = stripes
        self._arguments = (str(fd), str(size), prefix.hex())
        self._helpers: dict[int, _Helper] = {}
        self._poll = select.poll()

    def start_process(self, owned: ExitStack) -> None:
        """Start one and give it its first tickets; nothing, if the system has no more to give."""
        try:
            with ExitStack() as theirs, ExitStack() as ours:
                tickets_in, tickets_out = os.pipe2(os.O_CLOEXEC)
                theirs.callback(os.close, tickets_in)
                ours.callback(os.close, tickets_out)
                answers_in, answers_out = os.pipe2(os.O_CLOEXEC)
                ours.callback(os.close, answers_in)
                theirs.callback(os.close, answers_out)
                process = Process.spawn(
                    [sys.executable, "-I", "-S", block_hash.__file__, *self._arguments],
                    pass_fds=[self._fd],
                    stdin=tickets_in,
                    stdout=answers_out,
                )
                ours.callback(process.close)
                owned.push(ours.pop_all())
        except OSError:
            return
        helper = self._helpers[answers_in] = _Helper(tickets_out)
        self._poll.register(answers_in, select.POLLIN)
        for _ in range(TICKETS):
            self._give(helper)

    def answers(self) -> Iterator[tuple[int, bytes] | None]:
        """Yield offsets and digests of stripes until no process holds a ticket; None now and then between."""
        while any(helper.held for helper in self._helpers.values()):
            ready = self._poll.poll(LOOK_MILLISECONDS)
            if not ready:
                yield None
            for answers, _ in ready:
                helper = self._helpers[answers]
                said = os.read(answers, _READ_SIZE)
                helper.said += said
                while (answer := self._take_answer(helper)) is not None:
                    yield answer
                if not said or not helper.sane:
                    self._poll.unregister(answers)
                    self.given_back += self._helpers.pop(answers).held

    def _take_answer(self, helper: _Helper) -> tuple[int, bytes] | None:
        if not helper.held or len(helper.said) < TICKET.size:
            helper.sane = not helper.said or bool(helper.held)
            return None
        offset = helper.held[0]
        helper.sane = TICKET.unpack_from(helper.said) == (offset,)
        end = TICKET.size + -(-min(STRIPE, self._size - offset) // BLOCK) * DIGEST
        if not helper.sane or len(helper.said) < end:
            return None
        digests = bytes(helper.said[TICKET.size : end])
        del helper.said[:end]
        helper.held.popleft()
        self._give(helper)
        return offset, digests

    def _give(self, helper: _Helper) -> None:
        offset = next(self._stripes, None)
        if offset is not None:
            helper.held.append(offset)
            with suppress(BrokenPipeError):  # then it has ended, which its answers' end tells
                os.write(helper.tickets, TICKET.pack(offset))
