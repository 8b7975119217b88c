"""The journal: what is read again after a crash, a torn write, damage or a power failure."""

import os
import resource
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest

from vmactor import journal as module
from vmactor.errors import IllegalStateError
from vmactor.journal import LEAP, NAME, OLDER, Journal
from vmactor.messages import Created, DeathReason, Died, Event, PayloadReady, Reaped, Started

KEEP = 100


def event(kind: type[Event], seq: int, cid: int = 2048, **more: object) -> Event:
    made = kind(cid=cid, name="vm", driver="qemu", time=datetime.now(UTC), monotonic=1.5, **more)  # type: ignore[arg-type]
    object.__setattr__(made, "seq", seq)
    object.__setattr__(made, "previous", seq - 1)
    return made


def died(seq: int, cid: int = 2048, *, final: bool = True) -> Event:
    return event(Died, seq, cid, reason=DeathReason.CRASH, final=final)


@pytest.fixture
def written(tmp_path: Path) -> list[Event]:
    """What a manager wrote that was killed: one VM lives, one is dead."""
    events = [
        event(Created, 1),
        event(Created, 2, 2049),
        event(Started, 3, generation=1),
        event(Started, 4, 2049, generation=1),
        died(5, 2049),
        event(PayloadReady, 6, generation=1),
    ]
    write(tmp_path, events)
    return events


def write(directory: Path, events: list[Event], *, clean: bool = False) -> None:
    journal = Journal(directory, KEEP)
    for one in events:
        journal.write(one)
    journal.close(clean=clean)


def test_a_first_journal_has_no_past(tmp_path: Path) -> None:
    with Journal(tmp_path, KEEP) as journal:
        assert (journal.past.seq, journal.past.events, journal.past.open) == (0, (), ())
        assert journal.past.clean


def test_what_was_written_is_there_again(tmp_path: Path, written: list[Event]) -> None:
    with Journal(tmp_path, KEEP) as journal:
        past = journal.past
        assert past.events == tuple(written)
        assert (past.seq, past.clean, past.lost, past.last_cid) == (6, False, False, 2049)
        assert [vm.cid for vm in past.open] == [2048]
        assert past.open[0].generation == 1


def test_an_end_in_order_is_told_from_a_crash(tmp_path: Path, written: list[Event]) -> None:
    write(tmp_path, [event(Reaped, 7)], clean=True)
    with Journal(tmp_path, KEEP) as journal:
        assert (journal.past.clean, journal.past.seq, journal.past.open) == (True, 7, ())


def test_a_run_that_is_not_the_last_leaves_its_vm_open(tmp_path: Path) -> None:
    write(tmp_path, [event(Created, 1), died(2, final=False)])
    with Journal(tmp_path, KEEP) as journal:
        assert [vm.cid for vm in journal.past.open] == [2048]


def test_wherever_the_last_write_is_torn_all_whole_lines_before_are_believed(
    tmp_path: Path, written: list[Event]
) -> None:
    data = (tmp_path / NAME).read_bytes()
    begins = [0, *(at + 1 for at, byte in enumerate(data) if byte == ord("\n"))]
    for size in range(len(data)):
        (tmp_path / NAME).write_bytes(data[:size])
        whole = sum(begin <= size for begin in begins) - 1
        with Journal(tmp_path, KEEP) as journal:
            past = journal.past
            if whole == 0:  # not even the head is there
                assert past.lost
            else:
                assert past.events == tuple(written[: whole - 1]), size
                assert (past.seq, past.lost, past.clean) == (whole - 1, False, False)
                journal.write(event(PayloadReady, past.seq + 1))
        if whole:
            with Journal(tmp_path, KEEP) as journal:  # what was torn is not in the way of what came next
                assert journal.past.seq == whole
        for name in (NAME, OLDER):
            (tmp_path / name).unlink(missing_ok=True)


def test_a_bit_that_fell_over_is_found_wherever_it_is(tmp_path: Path, written: list[Event]) -> None:
    data = (tmp_path / NAME).read_bytes()
    for at in range(0, len(data), 7):
        (tmp_path / NAME).write_bytes(data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :])
        (tmp_path / OLDER).unlink(missing_ok=True)
        with Journal(tmp_path, KEEP) as journal:
            past = journal.past
            last = data.rfind(b"\n", 0, -1) < at
            assert past.lost or last, at  # of the last line it may pass for a torn write
            assert not past.lost or (past.seq >= LEAP and past.events == ())


def test_after_a_power_failure_numbers_go_on_far_above(
    tmp_path: Path, written: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "boot_identity", lambda: "another boot")
    with Journal(tmp_path, KEEP) as journal:
        assert (journal.past.lost, journal.past.seq, journal.past.events) == (True, 6 + LEAP, ())
        assert [vm.cid for vm in journal.past.open] == [2048]
        journal.write(event(PayloadReady, 6 + LEAP + 1))
    with Journal(tmp_path, KEEP) as journal:
        assert journal.past.seq == 6 + LEAP + 1


def test_a_host_that_was_shut_down_in_order_has_lost_nothing(
    tmp_path: Path, written: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [], clean=True)
    monkeypatch.setattr(module, "boot_identity", lambda: "another boot")
    with Journal(tmp_path, KEEP) as journal:
        assert (journal.past.lost, journal.past.seq) == (False, 6)
        assert journal.past.events == tuple(written)


def test_it_never_grows_beyond_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 4096)
    with Journal(tmp_path, KEEP) as journal:
        journal.write(event(Created, 1))
        for seq in range(2, 200):
            journal.write(event(PayloadReady, seq))
        assert {path.name for path in tmp_path.iterdir()} == {NAME, OLDER, f"{NAME}.lock"}
        assert all((tmp_path / name).stat().st_size < 8192 for name in (NAME, OLDER))
    with Journal(tmp_path, KEEP) as journal:
        past = journal.past
        assert past.seq == 199
        assert [one.seq for one in past.events] == list(range(200 - len(past.events), 200))
        assert [vm.cid for vm in past.open] == [2048]  # its beginning is forgotten, it is not


def test_a_crash_between_two_files_loses_nothing(tmp_path: Path, written: list[Event]) -> None:
    os.replace(tmp_path / NAME, tmp_path / OLDER)  # noqa: PTH105
    with Journal(tmp_path, KEEP) as journal:
        assert (journal.past.seq, journal.past.lost) == (6, False)
        assert [vm.cid for vm in journal.past.open] == [2048]


def test_only_one_has_it(tmp_path: Path) -> None:
    with Journal(tmp_path, KEEP), pytest.raises(IllegalStateError, match="another service keeps VMs"):
        Journal(tmp_path, KEEP)
    Journal(tmp_path, KEEP).close()


def test_without_space_the_service_goes_on_and_the_file_stays_whole(tmp_path: Path) -> None:
    with Journal(tmp_path, KEEP) as journal:
        journal.write(event(Created, 1))
        size = (tmp_path / NAME).stat().st_size
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, old[1]))
        try:
            journal.write(event(PayloadReady, 2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, ignored)
        assert (tmp_path / NAME).stat().st_size == size
        journal.write(event(PayloadReady, 3))
    with Journal(tmp_path, KEEP) as journal:
        assert [one.seq for one in journal.past.events] == [3]  # there is a hole before it
        assert journal.past.seq == 3
