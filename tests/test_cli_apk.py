"""``create-idsig`` and ``verify-apk`` as people and programs see them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

import anyio
import pytest

from tests.apks import apk_with, apksigner, unsigned, write_key
from tests.test_apk_verify import P256
from vmactor.cli import progress


def vmactor(*args: str | Path) -> tuple[int, str, str]:
    """Run a command; its status, standard output and standard error."""
    command = [sys.executable, "-m", "vmactor", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def apk(tmp_path: Path) -> Path:
    """An APK with its signed idsig beside it."""
    path = unsigned(tmp_path / "app.apk", b"content" * 10_000)
    apksigner(path, write_key(P256, tmp_path), v2=False, v3=True, v4=True)
    return path


def test_an_idsig_is_made_then_up_to_date_and_verified_with_its_apk(apk: Path, tmp_path: Path) -> None:
    idsig = tmp_path / "mine"
    code, out, err = vmactor("create-idsig", apk, idsig)
    assert (code, err) == (0, "")
    assert out.startswith(f"{idsig}: written, root hash ")
    assert idsig.stat().st_mode & 0o111 == 0
    code, out, _ = vmactor("create-idsig", apk, idsig, "--json")
    record = json.loads(out)
    assert (code, record["written"], record["signed"]) == (0, False, False)
    code, out, err = vmactor("verify-apk", apk, idsig)
    assert (code, err) == (0, "")
    assert "app.apk: verified, signed with EcdsaWithSha256 (v3)" in out
    assert f"root hash    {record['root_hash']}" in out
    code, out, _ = vmactor("verify-apk", apk, tmp_path / "app.apk.idsig", "--json")
    verified = json.loads(out)
    assert verified["idsig"] == {key: record[key] for key in verified["idsig"]} | {"signed": True}
    code, out, _ = vmactor("verify-apk", apk, "--json")
    assert (code, json.loads(out)["idsig"]) == (0, None)


def test_an_apk_that_does_not_verify_is_an_error_that_says_what_to_do(apk: Path, tmp_path: Path) -> None:
    data = bytearray(apk.read_bytes())
    data[100] ^= 1
    apk.write_bytes(data)
    code, out, err = vmactor("verify-apk", apk)
    assert (code, out) == (1, "")
    assert err.startswith('vmactor: error: Digest mismatch: computed="')
    assert err.endswith("do not use it, and get it again\n")


def test_what_cannot_have_an_idsig_leaves_none_and_touches_none(tmp_path: Path) -> None:
    bare, idsig = unsigned(tmp_path / "bare.apk", b"content"), tmp_path / "idsig"
    code, out, err = vmactor("create-idsig", bare, idsig)
    assert (code, out) == (1, "")
    assert "failed to create idsig" in err
    assert "No APK Signing Block before ZIP Central Directory" in err
    assert not idsig.exists()
    idsig.write_bytes(b"old")
    assert vmactor("create-idsig", bare, idsig)[0] == 1
    assert idsig.read_bytes() == b"old"
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path, tmp_path / "pipe"):
        code, _, err = vmactor("create-idsig", wrong, idsig)
        assert (code, "input is not a regular file" in err) == (1, True)
    code, _, err = vmactor("create-idsig", tmp_path / "none", idsig)
    assert (code, 'none": No such file' in err) == (1, True)
    code, _, err = vmactor("create-idsig", apk_with(tmp_path / "good"), tmp_path)
    assert (code, "Is a directory" in err) == (1, True)
    assert idsig.read_bytes() == b"old"


@pytest.mark.anyio
async def test_long_work_on_a_terminal_has_a_bar_and_leaves_no_line_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = threading.Event()
    heard: list[int] = []

    class Bar:
        def __init__(self, text: str, total: int) -> None:
            assert (text, total) == ("hashing", 100)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            heard.append(-1)

        def show(self, done: int) -> None:
            heard.append(done)
            if done == 50:
                shown.set()

    def work(tell: Callable[[int], None]) -> str:
        tell(50)
        assert shown.wait(60)
        return "done"

    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(progress, "is_terminal", lambda _fd: True)
    monkeypatch.setattr("vmactor.cli.drawing.Bar", Bar)
    assert await progress.with_progress("hashing", 100, work) == "done"
    assert heard[-2:] == [50, -1]
    monkeypatch.setattr(progress, "is_terminal", lambda _fd: False)
    assert await progress.with_progress("hashing", 100, work) == "done"
    assert heard[-2:] == [50, -1]


def test_a_bar_shows_bytes_and_is_wiped_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vmactor.cli.drawing import Bar

    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take anything for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with Bar("[b]hashing", 10 * 2**20) as bar:
        bar.show(5 * 2**20)
    err = capsys.readouterr().err
    assert "[b]hashing" in err
    assert "5.0/10.0 MiB" in err
    assert err.rstrip("\n").endswith("\x1b[2K")


@pytest.mark.anyio
async def test_a_command_that_is_ended_ends_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = anyio.Event()
    cancelled = threading.Event()
    reached: list[str] = []

    def work(tell: Callable[[int], None]) -> None:
        anyio.from_thread.run_sync(begun.set)
        assert cancelled.wait(60)
        tell(1)
        reached.append("what must not be reached")

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                await begun.wait()
                scope.cancel()
                cancelled.set()

            tasks.start_soon(cancel)
            await progress.with_progress("hashing", 100, work)
    assert reached == []
