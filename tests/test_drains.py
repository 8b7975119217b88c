"""One reader for the pipes of many: what it takes, what it leaves, and that nobody waits for another."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress

import anyio
import pytest

from vmactor.console import Drain, Lines
from vmactor.drains import AT_ONCE, Drains
from vmactor.supervisor import Supervisor

pytestmark = pytest.mark.anyio


@pytest.fixture
def pipes() -> Iterator[list[tuple[Drain, int]]]:
    """More drains than are read in one turn, each with the end to write to."""
    made = [os.pipe() for _ in range(AT_ONCE + 8)]
    yield [(Drain(read, sink=None, sink_cap=0, tail=100), write) for read, write in made]
    for read, write in made:
        os.close(read)
        with suppress(OSError):  # a test has closed it
            os.close(write)


async def test_the_pipes_of_many_are_read_and_forgotten_at_their_ends(pipes: list[tuple[Drain, int]]) -> None:
    drains = Drains()
    async with Supervisor("test") as supervisor:
        await supervisor.start("drains", drains.run)
        assert all(drains.add(drain) for drain, _ in pipes)
        for number, (_, write) in enumerate(pipes):
            os.write(write, b"%d" % number)
        while any(not drain.total for drain, _ in pipes):
            await anyio.lowlevel.checkpoint()
        assert [drain.tail for drain, _ in pipes] == [b"%d" % number for number in range(len(pipes))]
        for _, write in pipes[1:]:
            os.close(write)
        while len(drains) > 1:
            await anyio.lowlevel.checkpoint()


async def test_one_that_always_has_more_holds_up_nobody(pipes: list[tuple[Drain, int]]) -> None:
    drains = Drains()
    (loud, flood), (quiet, word), *_ = pipes
    async with Supervisor("test") as supervisor, anyio.create_task_group() as tasks:
        await supervisor.start("drains", drains.run)
        assert drains.add(loud)
        assert drains.add(quiet)
        os.set_blocking(flood, False)

        async def write_for_ever() -> None:
            while True:
                with suppress(BlockingIOError):
                    os.write(flood, bytes(65536))
                await anyio.lowlevel.checkpoint()

        tasks.start_soon(write_for_ever)
        while loud.total < 1 << 20:
            await anyio.lowlevel.checkpoint()
        os.write(word, b"word")
        while not quiet.total:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


async def test_a_removed_drain_reads_what_is_left_itself(pipes: list[tuple[Drain, int]]) -> None:
    drains = Drains()
    drain, write = pipes[0]
    async with Supervisor("test") as supervisor:
        await supervisor.start("drains", drains.run)
        assert drains.add(drain)
        drains.remove(drain)
        drains.remove(drain)
        os.write(write, b"last words")
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert drain.total == 0
        await drain.finish()
        assert drain.tail == b"last words"


async def test_drains_that_copy_or_have_lines_and_all_without_a_reader_need_a_task(
    pipes: list[tuple[Drain, int]],
) -> None:
    drains = Drains()
    assert not drains.add(pipes[0][0])
    async with Supervisor("test") as supervisor:
        await supervisor.start("drains", drains.run)
        read, write = os.pipe()
        try:
            assert not drains.add(Drain(read, sink=write, sink_cap=1, tail=0))
            assert not drains.add(Drain(read, sink=None, sink_cap=0, tail=0, lines=Lines(print, 1)))
        finally:
            os.close(read)
            os.close(write)
    assert not drains.add(pipes[0][0])


async def test_without_descriptors_there_is_no_common_reader_and_nothing_fails() -> None:
    drains = Drains()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with Supervisor("test") as supervisor:
        highest = os.open(os.devnull, os.O_RDONLY)
        os.close(highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        try:
            await supervisor.start("drains", drains.run)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        read, write = os.pipe()
        try:
            assert not drains.add(Drain(read, sink=None, sink_cap=0, tail=0))
        finally:
            os.close(read)
            os.close(write)
