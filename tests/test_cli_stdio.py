"""Standard input and output of every kind: used without blocking the loop or touching flags."""

import fcntl
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from vmactor.cli.stdio import READ_SIZE, Reader, Writer

BIG = bytes(range(256)) * 8192


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """A read end and a write end of the kind asked for, both blocking."""
    if request.param == "pipe":
        read, write = os.pipe()
    else:
        a, b = socket.socketpair()
        read, write = a.detach(), b.detach()
    yield read, write
    for fd in read, write:
        with suppress(OSError):  # a test may have closed it: that was its point
            os.close(fd)


BOTH = pytest.mark.parametrize("ends", ["pipe", "socket"], indirect=True)


@BOTH
def test_more_than_fits_goes_through_while_both_sides_take_turns(ends: tuple[int, int]) -> None:
    read, write = ends
    got = bytearray()

    async def copy() -> None:
        async with anyio.create_task_group() as tasks:

            async def send() -> None:
                await Writer(write).write(BIG)
                os.close(write)

            tasks.start_soon(send)
            reader = Reader(read)
            while data := await reader.read():
                assert len(data) <= READ_SIZE
                got.extend(data)

    anyio.run(copy)
    assert got == BIG
    assert not fcntl.fcntl(read, fcntl.F_GETFL) & os.O_NONBLOCK


@BOTH
def test_a_reader_that_stands_still_holds_up_nobody_else(ends: tuple[int, int]) -> None:
    async def stand_still() -> bool:
        with anyio.move_on_after(0.05) as patience:
            await Writer(ends[1]).write(BIG)
        return patience.cancelled_caught

    assert anyio.run(stand_still)
    assert not fcntl.fcntl(ends[1], fcntl.F_GETFL) & os.O_NONBLOCK


@pytest.mark.parametrize("ends", ["pipe"], indirect=True)
def test_a_pipe_without_reader_is_noticed_before_anything_is_written(ends: tuple[int, int]) -> None:
    async def wait() -> None:
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                await Writer(ends[1]).reader_gone()

            tasks.start_soon(watch)
            await anyio.wait_all_tasks_blocked()
            os.close(ends[0])
        with pytest.raises(BrokenPipeError):
            await Writer(ends[1]).write(b"x")

    anyio.run(wait)


@pytest.mark.parametrize("ends", ["socket"], indirect=True)
def test_of_other_outputs_the_end_is_not_guessed(ends: tuple[int, int], tmp_path: Path) -> None:
    async def wait(fd: int) -> bool:
        os.write(ends[0], b"input that is there must not be taken for the reader's end")
        with anyio.move_on_after(0.02) as patience:
            await Writer(fd).reader_gone()
        return patience.cancelled_caught

    assert anyio.run(wait, ends[1])
    with (tmp_path / "file").open("wb") as file:
        assert anyio.run(wait, file.fileno())


def test_files_and_devices_that_cannot_be_watched_work_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BIG)

    async def copy() -> bytes:
        with (
            path.open("rb") as source,
            (tmp_path / "copy").open("wb") as target,
            Path(os.devnull).open("r+b") as null,
        ):
            reader, writer = Reader(source.fileno()), Writer(target.fileno())
            while data := await reader.read():
                await writer.write(data)
                await Writer(null.fileno()).write(data)
            return await Reader(null.fileno()).read()

    assert anyio.run(copy) == b""
    assert (tmp_path / "copy").read_bytes() == BIG


def test_a_terminal_that_hangs_up_is_the_end_of_input() -> None:
    ours, theirs = pty.openpty()

    async def read() -> list[bytes]:
        reader = Reader(theirs)
        os.write(ours, b"line\n")
        first = await reader.read()
        os.close(ours)
        return [first, await reader.read()]

    try:
        assert anyio.run(read) == [b"line\n", b""]
    finally:
        os.close(theirs)


def test_closed_standard_descriptors_are_filled_with_dev_null() -> None:
    code = (
        "import os; from vmactor.cli.stdio import claim_standard_descriptors as claim; "
        "os.closerange(0, 3); claim(); after = [os.readlink(f'/proc/self/fd/{fd}') for fd in range(3)]; "
        "fd = os.open('/', os.O_RDONLY); os._exit(0 if after == ['/dev/null'] * 3 and fd > 2 else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
