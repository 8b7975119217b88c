"""What crashed managers left: found, judged, ended or kept. Managers and processes are real."""

import json
import os
import re
import shutil
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from tests.other_manager import OtherManager
from vmactor import leftovers
from vmactor.ledger import SIZE, TOKEN_VARIABLE
from vmactor.leftovers import find, reap
from vmactor.messages import Event, Orphaned, Reaped
from vmactor.state_dir import StateDirectory

pytestmark = pytest.mark.anyio

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run processes for others")


class Crash:
    """A manager that was killed, and the processes that it left."""

    def __init__(self, path: Path, what: str) -> None:
        with OtherManager(path) as other:
            self.cid = other.ask(f"leave {what}")
            other.kill()
        self.directory = path / "vm" / str(self.cid)
        self.token = self.ledger()[0]["token"] if (self.directory / "ledger").exists() else "none"
        self.left = bearers(self.token)

    def ledger(self) -> list[dict[str, Any]]:
        """What it noted."""
        lines = (self.directory / "ledger").read_text().splitlines()
        return [json.loads(line.partition(" ")[2]) for line in lines]

    def forge(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Write the ledger anew, with checksums that are right."""
        entries = self.ledger()
        change(entries)
        texts = [json.dumps(entry).encode() for entry in entries]
        lines = [b"%08x %s\n" % (zlib.crc32(text), text) for text in texts]
        (self.directory / "ledger").write_bytes(b"".join(lines))

    def alive(self) -> set[int]:
        """Which of the processes live."""
        return {pid for pid in self.left if pid in bearers(self.token)}


def bearers(token: str) -> set[int]:
    """The living processes with a token; the dead have no environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and f"{TOKEN_VARIABLE}={token}".encode() in (entry / "environ").read_bytes()
            ):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def crash(short_dir: Path) -> Iterator[Callable[[str], Crash]]:
    """Make managers crash; whatever they left is ended afterwards."""
    crashes = []

    def make(what: str) -> Crash:
        crashes.append(Crash(short_dir, what))
        return crashes[-1]

    yield make
    for one in crashes:
        for pid in one.alive():
            os.kill(pid, signal.SIGKILL)


async def next_manager(path: Path) -> list[Event]:
    """What the next manager tells of all that it finds."""
    events: list[Event] = []
    with StateDirectory(path) as state:
        await reap(state, find(state), events.append)
    return events


# -- At which moment the manager was killed ------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the next manager ends and reports.

    Attributes:
        ended: The roles of the processes that it ends.
        failure: The failure text that it saves.
        console: The end of the console that it saves.
        detail: What its report says beside that.
    """

    ended: tuple[str, ...] = ()
    failure: str = ""
    console: str = ""
    detail: str = ""


SAID = {"failure": "PANIC|why", "console": "last line"}

MOMENTS = {
    "created": Outcome(),
    "intended": Outcome(("vsock helper",)),
    "spawning": Outcome(("vsock helper", "process"), **SAID, detail="odd option"),
    "running": Outcome(("vsock helper", "VMM"), **SAID, detail="odd option"),
    "stopped": Outcome(("VMM",), **SAID, detail="odd option"),
    "dying": Outcome(("vsock helper",), detail="VMM (process N) had ended"),
    "cleared": Outcome(detail="VMM (process N) had ended"),
    "wrapped": Outcome(("VMM",)),
    "with_children": Outcome(("VMM", "process")),
    "foreign": Outcome(("VMM",)),
}
"""For each moment at which a manager can be killed: what the next one does with its VM."""


@pytest.mark.parametrize(
    "moment", [pytest.param(one, marks=ROOT if one == "foreign" else ()) for one in MOMENTS]
)
async def test_what_a_killed_manager_left_is_ended_and_reported(
    crash: Callable[[str], Crash], short_dir: Path, moment: str
) -> None:
    left = crash(moment)
    expected = MOMENTS[moment]
    assert len(left.left) == len(expected.ended), "the processes outlived their manager"
    with capture_logs() as logs:
        (event,) = await next_manager(short_dir)
    assert isinstance(event, Reaped)
    assert tuple(words.partition(" (process")[0] for words in event.ended) == expected.ended
    assert event.cid == left.cid
    assert event.name == ("" if moment == "cleared" else f"vm-{left.cid}")
    assert (event.failure, event.console_tail) == (expected.failure, expected.console)
    assert re.sub("[0-9]+", "N", event.detail) == expected.detail
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert left.alive() == set()
    assert not left.directory.exists()
    assert await next_manager(short_dir) == []


async def test_a_directory_with_nothing_in_it_goes_without_a_word(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("empty")
    assert await next_manager(short_dir) == []
    assert not left.directory.exists()


async def test_the_cid_of_what_was_ended_rests_and_is_used_again(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("running")
    await next_manager(short_dir)
    (short_dir / "cids").write_bytes(b"")
    with StateDirectory(short_dir) as state:
        assert await state.cids.claim() == left.cid


async def test_who_writes_goes_on_writing_when_the_manager_is_gone(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("running")
    (left.directory / "go").write_text("\n")
    with anyio.fail_after(30):
        while not (left.directory / "went").exists():
            await anyio.sleep(0.01)
    (event,) = await next_manager(short_dir)
    assert isinstance(event, Reaped)
    assert event.console_tail == "last line and more"


@pytest.mark.parametrize("torn", [1, 20])
async def test_what_the_crash_tore_counts_as_not_written(
    crash: Callable[[str], Crash], short_dir: Path, torn: int
) -> None:
    left = crash("running")
    ledger = left.directory / "ledger"
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[: len(whole) - torn])
    (event,) = await next_manager(short_dir)
    assert isinstance(event, Reaped)
    assert sorted(words.partition(" (")[0] for words in event.ended) == ["process", "vsock helper"]
    assert event.failure == "PANIC|why"
    assert left.alive() == set()


# -- What cannot be told -------------------------------------------------------------------------------


def last(**changes: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda entries: entries[-1].update(changes)


def without_token(entries: list[dict[str, Any]]) -> None:
    entries[0]["token"] = "f" * 32


def other_program(entries: list[dict[str, Any]]) -> None:
    without_token(entries)
    entries[-1]["exe"] = [1, 2]


def another_boot(machine: str) -> Callable[[list[dict[str, Any]]], object]:
    return lambda entries: entries[0].update(boot="b 1", machine=machine)


UNTOLD: dict[str, tuple[Callable[[list[dict[str, Any]]], object], str]] = {
    "another host": (another_boot("another"), "of another boot or pid namespace"),
    "a host without a name": (another_boot(""), "of another boot or pid namespace"),
    "another namespace": (
        lambda entries: entries[0].update(boot=entries[0]["boot"].partition(" ")[0] + " 1"),
        "of another boot or pid namespace",
    ),
    "another start": (last(start=1), "did not begin when its ledger says"),
    "another program": (other_program, "runs another program than its ledger says"),
    "another cid": (lambda entries: entries[0].update(cid=3000), "of another VM or version"),
    "another version": (lambda entries: entries[0].update(vmactor=2), "of another VM or version"),
    "no token": (lambda entries: entries[0].pop("token"), "no proper 'token'"),
    "out of order": (lambda entries: entries.append(entries[-1]), "out of order"),
    "the end alone": (lambda entries: entries.pop(1), "out of order"),
    "process 0": (last(pid=0), "a process that cannot be"),
    "process -1": (last(pid=-1), "a process that cannot be"),
    "a number too many": (last(pid=1 << 40), "a process that cannot be"),
    "text for a number": (last(pid="1"), "no proper 'pid'"),
    "a pipe without number": (lambda entries: entries[1].update(channels={"a": "b"}), "a pipe that is none"),
}
"""Ledgers whose VM is kept, and why."""


@pytest.mark.parametrize("case", UNTOLD)
def test_what_cannot_be_told_is_kept_reported_and_not_touched(
    crash: Callable[[str], Crash], short_dir: Path, case: str
) -> None:
    left = crash("running")
    change, why = UNTOLD[case]
    left.forge(change)
    with capture_logs() as logs:
        (event,) = anyio.run(next_manager, short_dir)
    assert isinstance(event, Orphaned)
    assert (event.cid, event.name, event.directory) == (left.cid, f"vm-{left.cid}", str(left.directory))
    assert why in event.detail
    assert len(left.alive()) == 2
    assert (left.directory / "record.json").exists()
    assert [(entry["log_level"], entry["cid"]) for entry in logs] == [("warning", left.cid)]
    with StateDirectory(short_dir) as state:
        assert [(record["cid"], record["alive"]) for record in state.records()] == [(left.cid, False)]
        (short_dir / "cids").write_bytes(b"")
        assert anyio.run(state.cids.claim) != left.cid, "the CID is not used again"


@ROOT
async def test_a_process_of_another_user_than_was_noted_is_not_touched(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("foreign")
    left.forge(lambda entries: entries[1].update(uid=4243))
    (event,) = await next_manager(short_dir)
    assert isinstance(event, Orphaned)
    assert "belongs to user 4242, not 4243" in event.detail
    assert len(left.alive()) == 1


async def test_a_number_that_another_process_has_by_now_leads_to_nobody(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("stopped")

    def reused(entries: list[dict[str, Any]]) -> None:
        without_token(entries)
        entries[-1]["start"] -= 1

    left.forge(reused)
    (event,) = await next_manager(short_dir)
    assert isinstance(event, Reaped)
    assert event.ended == ()
    assert "another process has its number now" in event.detail
    assert len(left.alive()) == 1
    assert not left.directory.exists()


async def test_the_number_of_a_thread_is_no_process(crash: Callable[[str], Crash], short_dir: Path) -> None:
    left = crash("dying")
    hold, up = threading.Event(), threading.Event()
    numbers = []

    def run() -> None:
        numbers.append(threading.get_native_id())
        up.set()
        hold.wait()

    thread = threading.Thread(target=run)
    thread.start()
    up.wait()
    left.forge(last(pid=numbers[0]))
    try:
        (event,) = await next_manager(short_dir)
    finally:
        hold.set()
        thread.join()
    assert isinstance(event, Reaped)
    assert "had ended" in event.detail


def written(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def in_place_of_it(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.rename(path.with_name("aside"))
        make(path)

    return change


def nested(path: Path) -> None:
    text = b"[" * 60_000
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "has no ledger"),
    "empty": (written(b""), "is empty"),
    "one torn line": (written(b"12345678 {}"), "is empty"),
    "garbage": (written(b"\0\xff\n" * 10), "is damaged"),
    "a damaged line": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"start", b"stars")),
        "damaged",
    ),
    "a number for a line": (written(b"%08x 7\n" % zlib.crc32(b"7")), "is not one of ours"),
    "nested without end": (nested, "is not one of ours"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"x" * SIZE), "is longer than"),
    "open to all": (lambda path: path.chmod(0o666), "could have been written by others"),
    "a link": (in_place_of_it(lambda path: path.symlink_to("aside")), "is no file"),
    "a pipe": (in_place_of_it(os.mkfifo), "is no file"),
    "a directory": (in_place_of_it(Path.mkdir), "is no file"),
}
"""Files that are no ledger, and what is said of them."""


@pytest.mark.parametrize("case", HOSTILE)
def test_a_ledger_that_is_none_is_not_believed(
    crash: Callable[[str], Crash], short_dir: Path, case: str
) -> None:
    left = crash("running")
    change, why = HOSTILE[case]
    change(left.directory / "ledger")
    (event,) = anyio.run(next_manager, short_dir)
    assert isinstance(event, Orphaned)
    assert why in event.detail
    assert len(left.alive()) == 2
    assert (left.directory / "record.json").exists()


@ROOT
async def test_a_ledger_of_another_user_is_not_believed(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("running")
    os.chown(left.directory / "ledger", 4242, 4242)
    (event,) = await next_manager(short_dir)
    assert isinstance(event, Orphaned)
    assert len(left.alive()) == 2


# -- Several managers ----------------------------------------------------------------------------------


async def test_of_several_managers_that_begin_at_once_one_ends_it(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("running")
    with OtherManager(short_dir) as a, OtherManager(short_dir) as b, OtherManager(short_dir) as c:
        for other in (a, b, c):
            other.tell("reap")
        assert sum(int(other._answer()) for other in (a, b, c)) == 1
    assert left.alive() == set()


async def test_the_vms_of_a_living_manager_are_not_even_looked_at(short_dir: Path) -> None:
    with OtherManager(short_dir) as other:
        cid = other.ask("leave running")
        (short_dir / "vm" / str(cid) / "ledger").chmod(0o666)  # whoever reads it would complain
        assert await next_manager(short_dir) == []
    (short_dir / "vm" / str(cid) / "ledger").chmod(0o600)
    assert [event.kind for event in await next_manager(short_dir)] == ["reaped"]


async def test_a_next_manager_that_is_cancelled_leaves_the_rest_to_the_one_after_it(
    crash: Callable[[str], Crash], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = crash("running")
    monkeypatch.setattr(leftovers, "_kill", lambda judged: None)
    with anyio.move_on_after(0.2) as scope:
        await next_manager(short_dir)
    assert scope.cancelled_caught
    assert len(left.alive()) == 2
    monkeypatch.undo()
    assert [event.kind for event in await next_manager(short_dir)] == ["reaped"]


async def test_the_directory_of_a_process_that_survives_its_kill_is_kept(
    crash: Callable[[str], Crash], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = crash("stopped")
    monkeypatch.setattr(leftovers, "_kill", lambda judged: None)
    monkeypatch.setattr(leftovers, "KILL_SECONDS", 0.05)
    (event,) = await next_manager(short_dir)
    assert isinstance(event, Orphaned)
    assert "survived its kill" in event.detail
    assert left.directory.exists()


async def test_many_are_ended_with_few_descriptors_at_a_time(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "AT_ONCE", 2)
    with OtherManager(short_dir) as other:
        cids = [other.ask("leave stopped") for _ in range(5)]
    events = await next_manager(short_dir)
    assert sorted(event.cid for event in events) == cids
    assert {event.kind for event in events} == {"reaped"}
    assert list((short_dir / "vm").iterdir()) == []


async def test_what_vanishes_while_we_look_is_nobodys(crash: Callable[[str], Crash], short_dir: Path) -> None:
    left = crash("created")
    events: list[Event] = []
    with StateDirectory(short_dir) as state:
        cids = find(state)
        shutil.rmtree(left.directory)
        await reap(state, cids, events.append)
    assert (cids, events) == ([left.cid], [])


async def test_what_was_left_before_the_host_was_started_anew_is_cleared_away(
    crash: Callable[[str], Crash], short_dir: Path
) -> None:
    left = crash("running")
    left.forge(lambda entries: entries[0].update(boot="b 1"))
    (told,) = await next_manager(short_dir)
    assert isinstance(told, Reaped)
    assert (told.ended, told.detail) == ((), "it ended with the host, which has been started anew since")
    assert left.alive() == left.left  # these numbers are of other processes by now: no one was touched
    assert not left.directory.exists()
