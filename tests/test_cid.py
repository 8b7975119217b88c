"""CIDs: handed out in turn, shared by managers that are real processes, never twice at once."""

import os
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.other_manager import OtherManager
from vmactor.cid import FIRST, LAST, REST_SECONDS, CidPool
from vmactor.errors import DeadlineExceededError, IllegalStateError, ResourceExhaustedError
from vmactor.state_dir import StateDirectory

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cids"


def set_counter(path: Path, value: int) -> None:
    """Make a CID the last one handed out."""
    path.touch()
    with path.open("r+b") as file:
        file.write(struct.pack("<I", value))


class Clock:
    """Seconds since boot, as the test wants them; set at a pool's seam."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000
        monkeypatch.setattr(CidPool, "_now", lambda _pool: self.now)


# -- In turn -----------------------------------------------------------------------------------------


async def test_cids_are_handed_out_in_turn_also_after_a_restart(path: Path) -> None:
    with CidPool(path) as pool:
        assert [await pool.claim() for _ in range(3)] == [FIRST, FIRST + 1, FIRST + 2]
    with CidPool(path) as pool:
        assert await pool.claim() == FIRST + 3


async def test_a_released_cid_is_not_the_next_one(path: Path) -> None:
    with CidPool(path) as pool:
        pool.release(await pool.claim())
        assert await pool.claim() == FIRST + 1


async def test_after_the_last_cid_comes_the_first(path: Path) -> None:
    set_counter(path, LAST - 1)
    with CidPool(path) as pool:
        assert [await pool.claim() for _ in range(2)] == [LAST, FIRST]


@pytest.mark.parametrize("counter", [0, 1, FIRST - 1, LAST, LAST + 1, 2**32 - 1])
async def test_a_counter_out_of_range_begins_anew(path: Path, counter: int) -> None:
    set_counter(path, counter)
    with CidPool(path) as pool:
        assert await pool.claim() == FIRST


async def test_a_cid_that_may_not_be_used_is_passed_over(path: Path) -> None:
    with CidPool(path, usable=lambda cid: cid % 2 == 1) as pool:
        assert [await pool.claim() for _ in range(2)] == [FIRST + 1, FIRST + 3]


async def test_when_all_are_held_that_is_said_and_one_given_back_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with CidPool(path, usable=lambda cid: cid < FIRST + 3) as pool:
        held = [await pool.claim() for _ in range(3)]
        with pytest.raises(ResourceExhaustedError, match=r"no CID of 2048\.\.65535 is free: stop some"):
            await pool.claim()
        pool.release(held[1])
        clock.now += REST_SECONDS + 1
        assert await pool.claim() == held[1]


async def test_a_released_cid_rests_for_10_seconds_at_least(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with (
        CidPool(path, usable=lambda cid: cid == FIRST) as pool,
        CidPool(path, usable=lambda cid: cid == FIRST) as other,
    ):
        pool.release(await pool.claim())
        for clock.now in (1000, 1000 + REST_SECONDS):  # whole seconds: up to one less has really passed
            with pytest.raises(ResourceExhaustedError):
                await other.claim()
        clock.now += 1
        assert await other.claim() == FIRST


async def test_cids_rest_too_when_their_pool_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    with CidPool(path, usable=lambda cid: cid == FIRST) as pool:
        await pool.claim()
    with CidPool(path, usable=lambda cid: cid == FIRST) as pool, pytest.raises(ResourceExhaustedError):
        await pool.claim()


async def test_a_release_before_a_reboot_does_not_make_a_cid_rest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with CidPool(path, usable=lambda cid: cid == FIRST) as pool:
        pool.release(await pool.claim())
        clock.now = 3
        assert await pool.claim() == FIRST


# -- Several managers --------------------------------------------------------------------------------


async def test_two_pools_of_one_process_never_have_the_same_cid(path: Path) -> None:
    with CidPool(path) as one, CidPool(path) as two:
        first = await one.claim()
        set_counter(path, 0)  # even if the counter points at it again
        second = await two.claim()
        assert first != second
        assert two.is_held(first)
        assert one.is_held(second)
        two.release(first)  # not its own: nothing happens
        assert two.is_held(first)
        one.release(first)
        assert not two.is_held(first)


async def test_tasks_of_one_manager_never_get_the_same_cid(path: Path) -> None:
    claimed = []
    with CidPool(path) as pool:

        async def claim() -> None:
            claimed.append(await pool.claim())

        async with anyio.create_task_group() as tg:
            for _ in range(50):
                tg.start_soon(claim)
    assert sorted(claimed) == list(range(FIRST, FIRST + 50))


async def test_two_manager_processes_at_once_never_have_the_same_cid(tmp_path: Path) -> None:
    with OtherManager(tmp_path) as one, OtherManager(tmp_path) as two, StateDirectory(tmp_path) as state:
        for other in (one, two):
            for _ in range(50):
                other.tell("claim")  # both work through their lines at the same time, and so do we
        ours = [await state.cids.claim() for _ in range(50)]
        theirs = [int(other._answer()) for other in (one, two) for _ in range(50)]
        assert len({*ours, *theirs}) == 150
        assert all(state.cids.is_held(cid) for cid in (*ours, *theirs))


async def test_a_killed_manager_gives_its_claims_back(tmp_path: Path) -> None:
    with OtherManager(tmp_path) as other, StateDirectory(tmp_path) as state:
        cid = other.ask("claim")
        assert state.cids.is_held(cid)
        other.kill()
        assert not state.cids.is_held(cid)
        set_counter(tmp_path / "cids", cid - 1)
        assert await state.cids.claim() == cid


async def test_a_forked_child_keeps_the_claims_of_a_killed_manager_until_it_ends(tmp_path: Path) -> None:
    with OtherManager(tmp_path) as other, StateDirectory(tmp_path) as state:
        cid = other.ask("claim")
        forked = os.pidfd_open(other.ask("fork"))
        try:
            other.kill()
            assert state.cids.is_held(cid)
            signal.pidfd_send_signal(forked, signal.SIGKILL)
            await anyio.wait_readable(forked)
            assert not state.cids.is_held(cid)
        finally:
            os.close(forked)


@pytest.mark.virtual_time
async def test_a_stopped_manager_that_has_the_counter_locked_costs_others_5_seconds_not_for_ever(
    tmp_path: Path,
) -> None:
    with OtherManager(tmp_path) as other, StateDirectory(tmp_path) as state:
        other.freeze()
        began = anyio.current_time()
        with pytest.raises(DeadlineExceededError, match="look for a stopped one"):
            await state.cids.claim()
        assert anyio.current_time() - began == pytest.approx(5)
        theirs = other.thaw()
        assert await state.cids.claim() == theirs + 1


@pytest.mark.virtual_time
async def test_a_claim_that_is_cancelled_or_loses_its_pool_while_it_waits_claims_nothing(
    tmp_path: Path,
) -> None:
    with OtherManager(tmp_path) as other:
        other.freeze()
        with StateDirectory(tmp_path) as state:
            with anyio.move_on_after(1) as scope:
                await state.cids.claim()
            assert scope.cancelled_caught

            async def close() -> None:
                await anyio.sleep(1)
                state.close()

            async with anyio.create_task_group() as tg:
                tg.start_soon(close)
                with pytest.raises(IllegalStateError, match="closed"):
                    await state.cids.claim()
        assert other.thaw() == FIRST


# -- Whatever the file contains ----------------------------------------------------------------------


@settings(deadline=None)
@given(content=st.binary(max_size=64), at=st.integers(0, 8), tail=st.binary(max_size=9000))
def test_no_content_of_the_file_makes_a_held_cid_be_handed_out_again(
    content: bytes, at: int, tail: bytes
) -> None:
    async def scenario() -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "cids"
            with CidPool(path) as one, CidPool(path) as two:
                held = {await one.claim() for _ in range(3)}
                file = os.open(path, os.O_RDWR)
                os.ftruncate(file, len(tail))
                os.pwrite(file, tail, 0)
                os.pwrite(file, content, at)
                os.close(file)
                more = {await pool.claim() for pool in (one, two, one)}
                assert len(held | more) == 6
                assert all(FIRST <= cid <= LAST for cid in more)

    anyio.run(scenario)


async def test_a_truncated_file_begins_anew_without_what_is_held(path: Path) -> None:
    with CidPool(path) as pool:
        first = await pool.claim()
        os.truncate(path, 2)
        assert await pool.claim() == first + 1


async def test_a_file_that_was_removed_under_a_pool_claims_nothing_more(path: Path) -> None:
    with CidPool(path) as pool:
        await pool.claim()
        path.unlink()
        with pytest.raises(IllegalStateError, match="was removed while in use"):
            await pool.claim()


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        CidPool(path)
    assert not (tmp_path / "elsewhere").exists()


async def test_a_closed_pool_holds_nothing_and_says_that_it_is_closed(path: Path) -> None:
    pool = CidPool(path)
    cid = await pool.claim()
    assert repr(pool) == f"<CidPool open held=[{cid}]>"
    pool.close()
    pool.close()
    pool.release(cid)
    assert repr(pool) == "<CidPool closed held=[]>"
    with pytest.raises(IllegalStateError, match="closed"):
        await pool.claim()
    with pytest.raises(IllegalStateError, match="closed"):
        pool.is_held(cid)
    with CidPool(path) as other:
        assert not other.is_held(cid)


@pytest.mark.parametrize("cid", [-1, 0, FIRST - 1, LAST + 1, 10**30])
def test_what_is_no_cid_is_not_held(path: Path, cid: int) -> None:
    with CidPool(path) as pool:
        assert not pool.is_held(cid)


NO_SPACE = """
import anyio, resource, sys
from pathlib import Path
from vmactor.cid import FIRST, CidPool
from vmactor.errors import ResourceExhaustedError

async def main():
    path = Path(sys.argv[1])
    with CidPool(path) as pool, CidPool(path) as other:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            await pool.claim()
        except ResourceExhaustedError as error:
            assert "make room" in str(error)
        else:
            raise AssertionError("claimed without storing it")
        assert not other.is_held(FIRST)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
        cid = await pool.claim()
        pool.release(cid)
        assert not other.is_held(cid)

anyio.run(main)
"""


def test_without_space_nothing_is_claimed_by_halves_and_releasing_still_works(path: Path) -> None:
    # A limit on file sizes stands in for a full disk, in a process of its own.
    subprocess.run([sys.executable, "-c", NO_SPACE, path], check=True, cwd=Path(__file__).parent.parent)


async def test_after_a_power_failure_cids_go_on_above_those_that_may_have_been_given_out(path: Path) -> None:
    with CidPool(path) as pool:
        pool.advance(2100, 1024)  # the file was never written: it is new
        assert await pool.claim() == 2100 + 1024 + 1
        pool.advance(2100, 0)  # the file knows more
        assert await pool.claim() == 2100 + 1024 + 2
        pool.advance(LAST, 10)  # round the end
        pool.advance(0, 10)  # nothing is known
        assert await pool.claim() == 2100 + 1024 + 3
    with CidPool(path) as pool:
        os.pwrite(pool._fd, (LAST - 5).to_bytes(4, "little"), 0)
        pool.advance(LAST - 2, 10)
        assert await pool.claim() == FIRST + 8


@pytest.mark.parametrize("size", range(8))
async def test_a_counter_that_was_cut_off_is_made_good_by_what_the_journal_knows(
    path: Path, size: int
) -> None:
    with CidPool(path) as pool:
        last = await pool.claim()
    os.truncate(path, min(size, path.stat().st_size))
    with CidPool(path) as pool:
        pool.advance(last, 0)
        assert await pool.claim() == last + 1
