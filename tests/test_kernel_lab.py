"""The program that runs the kernel lab, short of the lab: what goes in, one build at a time, and its ends."""

import os
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import anyio
import pytest

import tools.kernel_lab as lab
from tools.build_guest import BuildError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the lab is built."""
    monkeypatch.setattr(lab, "LAB", tmp_path / "build" / "lab")
    return tmp_path / "build" / "lab"


class Builds:
    """In place of what takes half a minute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.failure: Exception | None = None
        self.inputs = "first"
        monkeypatch.setattr(lab, "build", self.build)
        monkeypatch.setattr(lab, "fingerprint", lambda: self.inputs)

    def build(self, target: Path, cache: Path) -> None:
        self.count += 1
        (target / "root.ext4").write_text(self.inputs)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def test_the_lab_is_built_once_and_again_when_an_input_changes(place: Path, builds: Builds) -> None:
    for inputs, count in (("first", 1), ("first", 1), ("second", 2), ("second", 2)):
        builds.inputs = inputs
        lab.ensure_built()
        assert builds.count == count
        assert (place / "root.ext4").read_text() == inputs


def test_a_build_that_fails_leaves_the_last_one_and_nothing_else(place: Path, builds: Builds) -> None:
    lab.ensure_built()
    builds.inputs, builds.failure = "second", BuildError("no network")
    with pytest.raises(BuildError, match="no network"):
        lab.ensure_built()
    assert (place / "root.ext4").read_text() == "first"
    assert {path.name for path in place.parent.iterdir()} == {"lab", ".lab.lock"}
    builds.failure = None
    lab.ensure_built()
    assert (place / "root.ext4").read_text() == "second"


def test_what_a_killed_build_left_is_removed_by_the_next(place: Path, builds: Builds) -> None:
    left = place.parent / ".lab-abc" / "root"
    left.mkdir(parents=True)
    (left / "file").write_text("half")
    lab.ensure_built()
    assert {path.name for path in place.parent.iterdir()} == {"lab", ".lab.lock"}


def test_of_two_builds_at_once_one_waits_and_takes_what_the_other_built(
    place: Path, builds: Builds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    building, go_on = threading.Event(), threading.Event()

    def build(target: Path, cache: Path) -> None:
        building.set()
        go_on.wait()
        builds.build(target, cache)

    monkeypatch.setattr(lab, "build", build)
    say = lab.say

    def said(text: str) -> None:
        say(text)
        if "waiting" in text:
            go_on.set()

    monkeypatch.setattr(lab, "say", said)
    first = threading.Thread(target=lab.ensure_built)
    first.start()
    building.wait()
    lab.ensure_built()
    first.join()
    assert builds.count == 1
    assert "waiting for another build" in capsys.readouterr().out


@pytest.mark.parametrize(
    "reason", [BuildError("apt knows no package"), OSError(28, "No space left on device")]
)
def test_a_lab_that_cannot_be_built_is_a_failure_with_its_reason(
    place: Path,
    builds: Builds,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reason: Exception,
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_lab", "--build-only"])
    builds.failure = reason
    assert lab.main() == 1
    assert str(reason) in capsys.readouterr().err


def test_without_the_programs_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"apt-get is not installed; check the network and apt's sources"):
        lab.download_with_dependencies(["no-such-package"], tmp_path)


def test_the_archive_holds_the_project_as_it_is_byte_code_of_the_labs_python_and_what_to_do(
    place: Path,
) -> None:
    with tempfile.TemporaryFile() as disk:
        lab.pack_project(disk, ["-k", "some test"], None)
        assert disk.seek(0, os.SEEK_END) % 4096 == 0
        disk.seek(0)
        with tarfile.open(fileobj=disk) as archive:
            names = set(archive.getnames())
            arguments = archive.extractfile("lab-arguments")
            assert arguments is not None
            assert arguments.read() == b"-k\nsome test\n"
            assert archive.getmember("lab-run").mode & 0o111
    assert {"vmactor/__init__.py", "tests/conftest.py", "pyproject.toml", "build/guest/vmlinux"} <= names
    if sys.version_info[:2] == (3, 11):
        assert "vmactor/__pycache__/__init__.cpython-311.pyc" in names
    assert {name for name in names if "__pycache__" in name and ".cpython-311" not in name} == set()
    assert "crosvm" not in names


def test_crosvm_brings_the_libraries_that_the_lab_lacks(tmp_path: Path) -> None:
    program = tmp_path / "crosvm"
    shutil.copy2(os.path.realpath("/bin/ls"), program)
    files = {name: file for file, name in lab.crosvm_files(tmp_path, set())}
    assert files["crosvm"] == program
    assert files["lib/libc.so.6"].exists()
    assert dict(lab.crosvm_files(program, {name.removeprefix("lib/") for name in files})) == {
        program: "crosvm"
    }
    program.write_text("#!/bin/sh\n")  # what is linked with nothing brings nothing
    assert list(lab.crosvm_files(program, set())) == [(program, "crosvm")]
    program.chmod(0o644)
    with pytest.raises(BuildError, match="VMACTOR_CROSVM has to name a crosvm"):
        list(lab.crosvm_files(program, set()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_lab_in_order_and_is_told_by_the_status(number: signal.Signals) -> None:
    cleared: list[str] = []

    async def work() -> int:
        try:
            os.kill(os.getpid(), number)
            await anyio.sleep_forever()
        finally:
            cleared.append("the VM")
        return 0

    assert anyio.run(lab.ended_by_signals, work) == 128 + number
    assert cleared == ["the VM"]


def test_the_status_and_the_errors_of_a_run_come_through() -> None:
    async def five() -> int:
        return 5

    async def fail() -> int:
        raise BuildError("the lab ended without a result")

    assert anyio.run(lab.ended_by_signals, five) == 5
    with pytest.raises(BuildError, match="without a result"):
        anyio.run(lab.ended_by_signals, fail)
