"""The state directory: private, shared by managers that are real processes, and read with care."""

import json
import os
import select
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from tests.other_manager import OtherManager
from vmactor.cid import FIRST, LAST
from vmactor.errors import IllegalArgumentError, ResourceExhaustedError, SecurityError
from vmactor.state_dir import LONGEST_SOCKET, RECORD_SIZE, SUN_PATH, StateDirectory, default_path

pytestmark = pytest.mark.anyio


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


# -- The directory -----------------------------------------------------------------------------------


def test_root_has_its_state_in_run_and_others_in_their_runtime_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_path() == Path("/run/vmactor")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_path() == Path("/run/user/1000/vmactor")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(IllegalArgumentError, match="name a state directory"):
        default_path()


def test_it_is_made_for_its_user_alone(short_dir: Path) -> None:
    path = short_dir / "parent" / "state"
    umask = os.umask(0)
    try:
        with StateDirectory(path) as state:
            directory, _ = state.make_vm_directory(FIRST)
    finally:
        os.umask(umask)
    assert [mode(made) for made in (path, path / "vm", directory)] == [0o700] * 3
    assert mode(path / "cids") == 0o600
    with StateDirectory(path):  # a second manager finds it as it is
        pass


def link(path: Path) -> None:
    path.with_name("target").mkdir(mode=0o700)
    path.symlink_to(path.with_name("target"))


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a symbolic link": (link, "is not a directory: remove it"),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "is not a directory"),
    "a file": (lambda path: path.touch(), "is not a directory"),
    "open to a group": (lambda path: path.mkdir(mode=0o750), "chmod 700"),
    "open to all": (open_to_all, "chmod 700"),
}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_what_others_could_have_a_hand_in_is_refused(tmp_path: Path, bad: str, inner: bool) -> None:
    path = tmp_path / "state"
    if inner:
        path.mkdir(mode=0o700)
    make, message = BAD[bad]
    make(path / "vm" if inner else path)
    with pytest.raises(SecurityError, match=message):
        StateDirectory(path)
    assert not (tmp_path / "nowhere").exists()


def test_others_may_pass_through_it_to_the_daemons_socket_and_into_nothing_in_it(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.mkdir(mode=0o711)
    with StateDirectory(path):
        assert {entry.stat().st_mode & 0o077 for entry in path.iterdir()} == {0}
    (path / "vm").chmod(0o711)
    with pytest.raises(SecurityError, match="chmod 700"):
        StateDirectory(path)


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StateDirectory(tmp_path / "state"):
        pass
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(SecurityError, match=f"belongs to user {me}"):
        StateDirectory(tmp_path / "state")


def test_a_path_that_cannot_be_made_is_an_error_that_names_it(short_dir: Path) -> None:
    (short_dir / "file").touch()
    with pytest.raises(ResourceExhaustedError, match="file/state"):
        StateDirectory(short_dir / "file" / "state")
    with pytest.raises(IllegalArgumentError, match="no path"):
        StateDirectory(short_dir / "nul\0")


def test_the_longest_path_allowed_has_room_for_every_socket_and_a_longer_one_is_refused(
    short_dir: Path,
) -> None:
    room = SUN_PATH - len(f"/{LONGEST_SOCKET}")
    path = short_dir / ("x" * (room - len(str(short_dir)) - 1))
    with StateDirectory(path) as state, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(state.make_vm_directory(LAST)[0] / f"vsock_{2**32 - 1}"))
    with pytest.raises(IllegalArgumentError, match=f"too long: at most {room} bytes"):
        StateDirectory(path.with_name(path.name + "x"))
    assert [made.name for made in short_dir.iterdir()] == [path.name]


# -- VM directories ----------------------------------------------------------------------------------


def test_a_vm_directory_is_never_taken_over(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as state:
        state.make_vm_directory(FIRST)
        with pytest.raises(ResourceExhaustedError, match=f"vm/{FIRST}"):
            state.make_vm_directory(FIRST)


def test_removing_a_vm_directory_removes_all_in_it_and_follows_no_link(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").touch()
    with StateDirectory(tmp_path / "state") as state:
        directory, _ = state.make_vm_directory(FIRST)
        (directory / "link").symlink_to(treasure)
        (directory / "deep" / "er").mkdir(parents=True)
        state.remove_vm_directory(FIRST)
        assert not directory.exists()
        state.remove_vm_directory(FIRST)
    assert (treasure / "gold").exists()


async def test_a_vm_directory_that_cannot_be_removed_is_logged_and_its_cid_stays_unused(
    tmp_path: Path,
) -> None:
    with StateDirectory(tmp_path) as state:
        state.vm_directory(FIRST).symlink_to("nowhere")  # rmtree touches no link
        with structlog.testing.capture_logs() as logs:
            state.remove_vm_directory(FIRST)
        assert [entry["cid"] for entry in logs] == [FIRST]
        assert await state.cids.claim() == FIRST + 1


# -- Records -----------------------------------------------------------------------------------------


async def test_managers_see_each_others_vms_and_which_of_them_live(tmp_path: Path) -> None:
    with OtherManager(tmp_path) as other, StateDirectory(tmp_path) as state:
        theirs = other.ask("vm")
        ours = await state.cids.claim()
        state.make_vm_directory(ours)
        state.write_record(ours, {"cid": ours, "name": "web-3"})
        assert state.records() == [
            {"cid": theirs, "pid": other.process.pid, "alive": True},
            {"cid": ours, "name": "web-3", "alive": True},
        ]


async def test_what_a_killed_manager_left_is_shown_and_its_cid_not_reused(tmp_path: Path) -> None:
    with OtherManager(tmp_path) as other, StateDirectory(tmp_path) as state:
        theirs = other.ask("vm")
        other.kill()
        assert [(record["cid"], record["alive"]) for record in state.records()] == [(theirs, False)]
        (tmp_path / "cids").write_bytes(b"")  # so that it would be the next one
        assert await state.cids.claim() == theirs + 1
        assert state.vm_directory(theirs).exists()


def test_many_managers_that_begin_at_once_agree_on_one_directory(tmp_path: Path) -> None:
    with (
        OtherManager(tmp_path / "s") as a,
        OtherManager(tmp_path / "s") as b,
        OtherManager(tmp_path / "s") as c,
    ):
        for other in (a, b, c):
            other.tell("vm")
        assert sorted(int(other._answer()) for other in (a, b, c)) == [FIRST, FIRST + 1, FIRST + 2]


def test_a_reader_sees_the_old_record_or_the_new_one_never_half_of_it(tmp_path: Path) -> None:
    with OtherManager(tmp_path) as other, StateDirectory(tmp_path) as state:
        cid = other.ask("vm")
        other.tell(f"record {cid} 500")
        output = other.process.stdout
        assert output is not None
        done = False
        while not done:
            done = bool(select.select([output], [], [], 0)[0])
            (record,) = state.records()
            assert len(record.get("text", "x")) in (1, 20_000)
        assert other._answer() == "500"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half written": lambda path: path.write_text('{"cid": 2048, "na'),
    "empty": lambda path: path.touch(),
    "not an object": lambda path: path.write_text("[2048]"),
    "of another CID": lambda path: path.write_text('{"cid": 2049}'),
    "without CID": lambda path: path.write_text("{}"),
    "not UTF-8": lambda path: path.write_bytes(b'{"cid": 2048, "name": "\xff"}'),
    "nested without end": lambda path: path.write_text("[" * RECORD_SIZE),
    "too long": lambda path: path.write_text('{"cid": 2048}' + " " * RECORD_SIZE),
    "a pipe that nobody writes": os.mkfifo,
    "a directory": lambda path: path.mkdir(),
    "a link to a good one": lambda path: path.symlink_to(path.parents[1] / str(FIRST + 1) / "record.json"),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_left_out_and_hides_no_other(tmp_path: Path, damage: str) -> None:
    with StateDirectory(tmp_path) as state:
        state.make_vm_directory(FIRST + 1)
        state.write_record(FIRST + 1, {"cid": FIRST + 1})
        DAMAGE[damage](state.make_vm_directory(FIRST)[0] / "record.json")
        assert [record["cid"] for record in state.records()] == [FIRST + 1]


@pytest.mark.parametrize(
    "name", ["x", "-1", "02048", "2_048", " 2048", "²", "٢٠٤٨", "2047", "65536", "9" * 100, "1e4"]
)
def test_a_directory_that_is_not_named_by_a_cid_is_no_vm(tmp_path: Path, name: str) -> None:
    with StateDirectory(tmp_path) as state:
        directory = tmp_path / "vm" / name
        directory.mkdir()
        (directory / "record.json").write_text(json.dumps({"cid": FIRST}))
        assert state.records() == []


def test_a_record_longer_than_readers_take_is_refused_and_the_old_one_stands(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as state:
        state.make_vm_directory(FIRST)
        state.write_record(FIRST, {"cid": FIRST})
        with pytest.raises(IllegalArgumentError, match=f"CID {FIRST}"):
            state.write_record(FIRST, {"cid": FIRST, "name": "x" * RECORD_SIZE})
        assert state.records() == [{"cid": FIRST, "alive": False}]


def test_a_record_without_its_directory_is_an_os_error(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as state, pytest.raises(FileNotFoundError):
        state.write_record(FIRST, {"cid": FIRST})


def test_a_state_directory_that_vanishes_has_no_vms(tmp_path: Path) -> None:
    with StateDirectory(tmp_path / "state") as state:
        state.make_vm_directory(FIRST)
        shutil.rmtree(state.path)
        assert state.records() == []
        with pytest.raises(ResourceExhaustedError):
            state.make_vm_directory(FIRST)


def test_vms_that_come_and_go_while_we_list_harm_nobody(tmp_path: Path) -> None:
    with StateDirectory(tmp_path) as state:
        for cid in range(FIRST, FIRST + 3):
            state.make_vm_directory(cid)
            state.write_record(cid, {"cid": cid})
        is_held = state.cids.is_held

        def remove_the_others(cid: int) -> bool:
            for other in range(FIRST, FIRST + 3):
                if other != cid:
                    state.remove_vm_directory(other)
            return is_held(cid)

        state.cids.is_held = remove_the_others  # type: ignore[method-assign]
        assert len(state.records()) == 1
