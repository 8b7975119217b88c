"""Following a guest's console: what followers get, and that nobody waits for them."""

from pathlib import Path

import anyio
import pytest

from tests.simulated_peer import script
from vmactor import IllegalStateError, PayloadStarted, RawConfig, VirtualizationService
from vmactor.errors import ResourceExhaustedError
from vmactor.follower import MAX_FOLLOWERS, ConsoleStream, Followers

pytestmark = pytest.mark.anyio


async def all_of(stream: ConsoleStream) -> bytes:
    return b"".join([piece async for piece in stream])


async def test_a_follower_gets_what_was_before_and_what_comes_and_the_end() -> None:
    followers = Followers()
    async with ConsoleStream(followers.add(b"before ")) as first:
        followers.tell(b"both ")
        async with ConsoleStream(followers.add(b"")) as second:
            followers.tell(b"end")
            followers.close()
            assert await all_of(first) == b"before both end"
            assert await all_of(second) == b"end"


async def test_a_slow_follower_is_told_in_the_text_how_much_it_missed_and_nobody_waits() -> None:
    followers = Followers()
    piece = b"x" * 65536
    with anyio.fail_after(60):
        async with ConsoleStream(followers.add(b"")) as slow:
            for _ in range(64):
                followers.tell(piece)
            got = 0
            while got < 65536:
                got += len(await slow.receive())
            followers.tell(b"later")
            followers.close()
            rest = await all_of(slow)
    taken, note = rest.removesuffix(b"later").split(b"\r\n[")
    missed = int(note.split()[0])
    assert note.endswith(b" bytes left out: too slow a reader]\r\n")
    assert got + len(taken) + missed == 64 * 65536
    assert rest.endswith(b"later")


async def test_followers_that_are_gone_make_room_for_others() -> None:
    followers = Followers()
    streams = [ConsoleStream(followers.add(b"")) for _ in range(MAX_FOLLOWERS)]
    with pytest.raises(ResourceExhaustedError, match="follow already"):
        followers.add(b"")
    for stream in streams[1:]:
        await stream.aclose()
    followers.tell(b"x")
    assert len(followers) == 1
    await streams[0].aclose()
    streams = [ConsoleStream(followers.add(b"")) for _ in range(MAX_FOLLOWERS)]
    for stream in streams:
        await stream.aclose()
    followers.close()


async def test_closing_a_stream_ends_a_read_under_way() -> None:
    followers = Followers()
    stream = ConsoleStream(followers.add(b""))

    async def read() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        await stream.aclose()
    followers.close()


async def test_the_console_of_a_vm_can_be_followed_while_it_runs(short_dir: Path) -> None:
    async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as service:
        with (short_dir / "kernel").open("w+b") as kernel:
            steps = script("print hello", "serve", "started", "hang")
            vm = await service.create_vm(RawConfig(name="sim", kernel=kernel, params=steps))
        with pytest.raises(IllegalStateError):
            await vm.console()
        with vm.events() as events, anyio.fail_after(60):
            await vm.start()
            while not isinstance(await anext(events), PayloadStarted):
                pass
            async with await vm.console() as console, await vm.connect_vsock(5000) as steps_to_come:
                await steps_to_come.send(b"print there\n")
                assert await steps_to_come.receive() == b"ok\n"
                await vm.stop()
                text = await all_of(console)
        assert text.count(b"hello") == text.count(b"there") == 1
        with pytest.raises(IllegalStateError):
            await vm.console()
