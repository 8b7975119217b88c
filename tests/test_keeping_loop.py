"""Managers killed one after the other at any moment, under load: nothing is lost, leaked or told twice."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.keeping_manager import KeepingManager, marked

Json = dict[str, Any]

ROUNDS = int(os.environ.get("VMACTOR_KILL_ROUNDS", "12"))
TASKS = 4
LIVING = 8
"""VMs that live at a time, about; the load stops the oldest of more."""
ENDS = {"removed", "reaped", "orphaned"}


class Book:
    """What all managers together have told."""

    def __init__(self) -> None:
        self.events: dict[int, Json] = {}
        self.lives: set[int] = set()

    def take(self, manager: KeepingManager) -> None:
        """Take in what a manager told; nothing may contradict what was told before."""
        for event in manager.events:
            told = self.events.setdefault(event["seq"], event)
            assert {**told, "previous": 0} == {**event, "previous": 0}
        for cid, note in manager.notes.items():
            (self.lives.add if note == "lives" else self.lives.discard)(cid)

    def check(self) -> None:
        """No hole, no CID twice, no end twice."""
        assert self.whole()
        created = Counter(event["cid"] for event in self.events.values() if event["event"] == "created")
        assert set(created.values()) <= {1}, "a CID was used again"
        twice = {cid for cid, times in Counter(self._ends()).items() if times > 1}
        told = [event for event in self.events.values() if event["cid"] in twice]
        assert not twice, f"an end was told twice: {told}"

    def cursor(self) -> int:
        """From where on to listen: some events come once more, and have to be the same."""
        return max(0, len(self.events) - 20)

    def whole(self) -> bool:
        """Whether all events up to the last one have come."""
        return len(self.events) == max(self.events, default=0)

    def open(self) -> set[int]:
        """VMs that were created and whose end was not told."""
        created = {event["cid"] for event in self.events.values() if event["event"] == "created"}
        return created - set(self._ends())

    def _ends(self) -> list[int]:
        return [
            event["cid"]
            for event in self.events.values()
            if event["event"] in ENDS or (event["event"] == "died" and event["final"])
        ]


@pytest.fixture
def nothing_lives_on(short_dir: Path) -> Iterator[None]:
    """Whatever a failure left."""
    yield
    for pid in marked(short_dir / "state"):
        os.kill(pid, 9)


@pytest.mark.usefixtures("nothing_lives_on")
def test_after_every_kill_each_vm_is_adopted_or_reported_and_nothing_is_lost_or_leaked(
    short_dir: Path,
) -> None:
    seed = os.environ.get("VMACTOR_KILL_SEED", str(time.time_ns()))
    chance, book, state = Random(seed), Book(), short_dir / "state"
    print(f"VMACTOR_KILL_SEED={seed}")
    for number in range(ROUNDS):
        hasty = number % 5 == 4  # killed before it is ready, or soon after
        with KeepingManager(state, wait=not hasty, after=book.cursor()) as manager:
            if hasty:
                time.sleep(0.3 + chance.random())
                manager.kill()
                manager.read_the_rest()
                book.take(manager)
                continue
            settle(manager, book)
            manager.tell("load", seed=f"{seed} {number}", tasks=TASKS, living=LIVING)
            time.sleep(chance.random() * 0.6)
            manager.kill()
            manager.read_the_rest()
            book.take(manager)
    with KeepingManager(state, after=book.cursor()) as manager:
        settle(manager, book)
        for vm in manager.vms:
            manager.ask("stop", cid=vm["cid"])
        manager.ask("ping")
        assert marked(state) == {manager.process.pid}
        manager.end()
    assert not list((state / "vm").iterdir())
    kinds = Counter(event["event"] for event in book.events.values())
    assert kinds["manager_restarted"] >= ROUNDS * 4 // 5 - 1  # the first one, and those killed early
    assert min(kinds[kind] for kind in ("adopted", "reaped", "died")) > 0, kinds


def settle(manager: KeepingManager, book: Book) -> None:
    """A new manager is ready: wait until it has told what became of every VM, and check that."""
    living = {vm["cid"]: vm["pid"] for vm in manager.vms}
    book.take(manager)
    while book.open() - set(living) or not book.whole():
        manager.read_event()
        book.take(manager)
    book.check()
    assert book.lives <= set(living), "a VM that was to be kept is not there"
    alive = marked(manager.state)
    assert alive <= {manager.process.pid, *living.values()}, "a process was leaked"
    assert {living[cid] for cid in book.lives} <= alive
