"""Draining consoles: the writer is never held up, memory and sinks stay bounded, sinks keep their flags."""

import fcntl
import os
import pty
import socket
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

import vmactor.console
from vmactor.console import LINE_MAX, LINES_AT_ONCE, Drain, Lines
from vmactor.process import ExitStatus, Process

pytestmark = pytest.mark.anyio

MIB = 1 << 20


class Pipe:
    """A pipe whose ends can be closed once or left to the fixture."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}

    def close(self, *ends: int) -> None:
        for end in ends or tuple(self._open):
            self._open.remove(end)
            os.close(end)


@pytest.fixture
def new_pipe() -> Iterator[Callable[[], Pipe]]:
    """Makes pipes and closes them."""
    with ExitStack() as stack:

        def new() -> Pipe:
            return stack.enter_context(closing(Pipe()))

        yield new


@pytest.fixture
def source(new_pipe: Callable[[], Pipe]) -> Pipe:
    """The pipe that is drained."""
    return new_pipe()


def drain_of(source: Pipe, *, sink: int | None = None, sink_cap: int = 64 * MIB, tail: int = 1000) -> Drain:
    """A drain with everyday limits."""
    return Drain(source.read, sink=sink, sink_cap=sink_cap, tail=tail)


def read_now(fd: int) -> bytes:
    """All that can be read without waiting."""
    os.set_blocking(fd, False)
    data = b""
    try:
        while piece := os.read(fd, 65536):
            data += piece
    except BlockingIOError:
        pass
    return data


async def feed(source: Pipe, drain: Drain, text: bytes) -> None:
    """Write a piece that fits the pipe and let the drain read it."""
    goal = drain.total + len(text)
    os.write(source.write, text)
    while drain.total < goal:
        await anyio.sleep(0)


async def flood(source: Pipe, drain: Drain, size: int) -> None:
    """Have a process write that much into the source while the drain runs; both have to come to an end."""
    writer = Process.spawn(["head", "-c", str(size), "/dev/zero"], stdout=source.write)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain.run)
            assert await writer.wait() == ExitStatus(0, None)
            await writer.aclose()
            await drain.finish(timeout=0.05)
    assert drain.total == size


async def test_it_reads_to_the_end_and_keeps_the_tail(source: Pipe) -> None:
    drain = drain_of(source, tail=5)
    os.write(source.write, b"hello world")
    source.close(source.write)
    await drain.run()
    assert (drain.total, drain.tail, drain.dropped) == (11, b"world", 0)
    assert repr(drain) == "<Drain total=11 dropped=0 ended>"
    await drain.finish()


async def test_text_is_read_as_it_comes(source: Pipe, new_pipe: Callable[[], Pipe]) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        for word in (b"one ", b"two ", b"three"):
            os.write(source.write, word)
            await anyio.wait_readable(sink.read)
            assert read_now(sink.read) == word
        assert drain.tail == b"one two three"
        source.close(source.write)


async def test_no_tail_is_kept_where_none_is_wanted(source: Pipe) -> None:
    drain = drain_of(source, tail=0)
    await flood(source, drain, MIB)
    assert drain.tail == b""


async def test_a_flood_fills_neither_memory_nor_the_loop(source: Pipe) -> None:
    drain = drain_of(source, tail=1000)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await anyio.sleep(0)
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        await flood(source, drain, 20 * MIB)
        tasks.cancel_scope.cancel()
    assert turns >= 20 * MIB // 65536, "others got a turn for every piece"
    assert len(drain._tail) <= 1000 + 65536
    assert drain.tail == bytes(1000)


async def test_a_file_gets_everything_up_to_the_cap(source: Pipe, tmp_path: Path) -> None:
    with (tmp_path / "console").open("wb") as file, capture_logs() as logs:
        drain = drain_of(source, sink=file.fileno(), sink_cap=5 * MIB)
        await flood(source, drain, 8 * MIB)
    assert (tmp_path / "console").stat().st_size == 5 * MIB
    assert drain.dropped == 3 * MIB
    assert [entry["reason"] for entry in logs] == ["the cap is reached"]


async def test_a_pipe_that_is_read_late_gets_everything(source: Pipe, new_pipe: Callable[[], Pipe]) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    got = b""
    text = os.urandom(200_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        for start in range(0, len(text), 50_000):
            await feed(source, drain, text[start : start + 50_000])
        source.close(source.write)
        while len(got) < len(text):
            await anyio.wait_readable(sink.read)
            got += read_now(sink.read)
    assert got == text
    assert drain.dropped == 0


def stuck_pipe(stack: ExitStack) -> int:
    return stack.enter_context(closing(Pipe())).write


def stuck_socket(stack: ExitStack) -> int:
    one, two = socket.socketpair()
    stack.enter_context(one)
    stack.enter_context(two)
    return one.fileno()


def stuck_terminal(stack: ExitStack) -> int:
    """A terminal whose window nobody redraws."""
    master, slave = pty.openpty()
    stack.callback(os.close, master)
    stack.callback(os.close, slave)
    return slave


def stuck_terminal_master(stack: ExitStack) -> int:
    """The other end of a terminal that nobody reads."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    stack.callback(os.close, slave)
    stack.callback(os.close, master)
    return master


STUCK = [stuck_pipe, stuck_socket, stuck_terminal, stuck_terminal_master]


@pytest.mark.parametrize("reopening", [True, False])
@pytest.mark.parametrize("make", STUCK)
async def test_a_stuck_sink_holds_up_nobody_and_keeps_its_flags(
    source: Pipe, make: Callable[[ExitStack], int], reopening: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reopening:
        monkeypatch.setattr(vmactor.console, "_reopen", lambda _fd: None)
    with ExitStack() as stack, capture_logs() as logs:
        sink = make(stack)
        flags = fcntl.fcntl(sink, fcntl.F_GETFL)
        drain = drain_of(source, sink=sink)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_flags, sink, flags)
            await flood(source, drain, 3 * MIB)
            tasks.cancel_scope.cancel()
        assert fcntl.fcntl(sink, fcntl.F_GETFL) == flags
    assert 2 * MIB < drain.dropped < 3 * MIB
    assert [entry["reason"] for entry in logs] == ["the sink is too slow"]


async def watch_flags(fd: int, flags: int) -> None:
    """Fail if the open file's flags change even for a moment."""
    while True:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags
        await anyio.sleep(0)


@pytest.mark.parametrize("master", [True, False])
async def test_a_terminal_shows_the_text(source: Pipe, master: bool) -> None:
    ends = pty.openpty()
    tty.setraw(ends[1])
    sink, screen = ends if master else ends[::-1]
    try:
        drain = drain_of(source, sink=sink)
        os.write(source.write, b"login:")
        source.close(source.write)
        await drain.run()
        assert read_now(screen) == b"login:"
    finally:
        for end in ends:
            os.close(end)


async def test_a_socket_gets_the_text_whatever_default_timeout_the_program_has(source: Pipe) -> None:
    one, two = socket.socketpair()
    with one, two:
        socket.setdefaulttimeout(5)
        try:
            drain = drain_of(source, sink=one.fileno())
            os.write(source.write, b"text")
            source.close(source.write)
            await drain.run()
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(one.fileno())
        assert two.recv(100) == b"text"


async def test_a_full_disk_costs_only_the_copy(source: Pipe) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, capture_logs() as logs:
        drain = drain_of(source, sink=full.fileno(), tail=10)
        await flood(source, drain, MIB)
    assert drain.dropped == MIB
    assert drain.tail == bytes(10)
    assert [entry["reason"] for entry in logs] == ["the sink failed: No space left on device"]


async def test_a_reader_that_left_costs_only_the_copy(source: Pipe, new_pipe: Callable[[], Pipe]) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain.run)
            os.write(source.write, b"seen")
            await anyio.wait_readable(sink.read)
            sink.close(sink.read)
            await feed(source, drain, b"unseen")
            os.write(source.write, b"still drained")
            source.close(source.write)
    assert drain.tail == b"seenunseenstill drained"
    assert drain.dropped == len(b"unseenstill drained")
    assert [entry["reason"] for entry in logs] == ["the sink failed: Broken pipe"]


async def test_a_sink_that_is_not_open_costs_only_the_copy(
    source: Pipe, new_pipe: Callable[[], Pipe]
) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    sink.close()
    os.write(source.write, b"text")
    source.close(source.write)
    with capture_logs() as logs:
        await drain.run()
    assert (drain.tail, drain.dropped) == (b"text", 4)
    assert [entry["reason"] for entry in logs] == ["the sink failed: Bad file descriptor"]


async def test_the_caller_may_close_its_descriptor_of_the_sink(
    source: Pipe, new_pipe: Callable[[], Pipe]
) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        await anyio.wait_all_tasks_blocked()
        sink.close(sink.write)
        os.write(source.write, b"text")
        source.close(source.write)
    assert os.read(sink.read, 100) == b"text"
    assert os.read(sink.read, 100) == b"", "our duplicate is closed as well"


async def test_two_drains_can_share_a_sink(new_pipe: Callable[[], Pipe]) -> None:
    sink = new_pipe()
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            source = new_pipe()
            tasks.start_soon(drain_of(source, sink=sink.write).run)
            os.write(source.write, b"x" * 50_000)
            source.close(source.write)
        got = b""
        while len(got) < 100_000:
            await anyio.wait_readable(sink.read)
            got += read_now(sink.read)


async def test_finish_reads_what_the_dead_wrote_though_somebody_holds_the_pipe(source: Pipe) -> None:
    drain = drain_of(source)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        await anyio.wait_all_tasks_blocked()
        os.write(source.write, b"last words")
        await drain.finish()
    assert drain.tail == b"last words"
    await drain.finish()


async def test_finish_comes_to_an_end_though_somebody_goes_on_writing(source: Pipe) -> None:
    holder = Process.spawn(["yes"], stdout=source.write)
    drain = drain_of(source)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain.run)
            while not drain.total:
                await anyio.sleep(0)
            await drain.finish()
    assert holder.status is None
    await holder.aclose()


async def test_finish_lets_the_sink_take_what_is_pending(source: Pipe, new_pipe: Callable[[], Pipe]) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    got = b""

    async def read_late() -> None:
        nonlocal got
        await anyio.wait_all_tasks_blocked()
        while len(got) < 130_000:
            await anyio.wait_readable(sink.read)
            got += read_now(sink.read)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        for _ in range(2):
            await feed(source, drain, b"x" * 65_000)
        tasks.start_soon(read_late)
        await drain.finish(timeout=30)
    assert (len(got), drain.dropped) == (130_000, 0)


async def test_finish_works_without_run_and_after_a_cancelled_one(
    source: Pipe, new_pipe: Callable[[], Pipe], tmp_path: Path
) -> None:
    with (tmp_path / "console").open("wb") as file:
        never_run = drain_of(source, sink=file.fileno())
        os.write(source.write, b"one ")
        await never_run.finish()
        cancelled = drain_of(second := new_pipe(), sink=file.fileno())
        with anyio.CancelScope() as scope:
            scope.cancel()
            await cancelled.run()
        os.write(second.write, b"two")
        await cancelled.finish()
    assert (never_run.tail, cancelled.tail) == (b"one ", b"two")
    assert (tmp_path / "console").read_bytes() == b"one two"


async def test_cancelling_counts_what_the_sink_did_not_take(
    source: Pipe, new_pipe: Callable[[], Pipe]
) -> None:
    sink = new_pipe()
    drain = drain_of(source, sink=sink.write)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        for _ in range(2):
            await feed(source, drain, b"x" * 65_000)
        tasks.cancel_scope.cancel()
    assert drain.total == 130_000
    assert drain.dropped == 130_000 - len(read_now(sink.read))
    assert drain.dropped > 0


async def test_one_task_runs_a_drain(source: Pipe) -> None:
    drain = drain_of(source)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain.run)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await drain.run()
        tasks.cancel_scope.cancel()


# -- Lines -------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"\n", b"\r\n", b"x" * 3000]), max_size=20))
def test_lines_are_told_whole_or_cut_however_the_text_comes(pieces: list[bytes]) -> None:
    told: list[bytes] = []
    lines = Lines(told.append, MIB)
    for piece in pieces:
        lines.feed(piece)
    lines.close()
    expected = b"".join(pieces).split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert told == [line[:LINE_MAX].removesuffix(b"\r") for line in expected]


def test_a_flood_of_lines_is_cut_and_the_cut_is_told() -> None:
    told: list[bytes] = []
    lines = Lines(told.append, 5000)
    lines.feed(b"\n" * (LINES_AT_ONCE + 2) + b"rest")
    lines.feed(b"x" * 10_000)
    lines.close()
    assert len(told) == LINES_AT_ONCE + 2
    assert told[-2] == b"(2 lines left out: too many at once)"
    assert told[-1] == (b"rest" + b"x" * 5000)[:LINE_MAX]
