"""Setting up: which helper is good enough, which archive apt uses, what is said when something is missing."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from tools import setup


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "good"),
    [
        ("echo vhost-device-vsock 0.3.0", True),
        ("echo vhost-device-vsock 0.2.0", True),
        ("echo vhost-device-vsock 1.0.0", True),
        ("echo vhost-device-vsock 0.1.9", False),
        ("echo something else", False),
        ("echo vhost-device-vsock 0.3.0; exit 1", False),
    ],
)
def test_a_helper_is_used_if_it_runs_and_is_new_enough(tmp_path: Path, says: str, good: bool) -> None:
    assert setup.usable(script(tmp_path / "helper", says), io.StringIO()) is good


def test_a_helper_that_cannot_run_here_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "helper").write_bytes(b"\x7fELF for some other machine")
    (tmp_path / "helper").chmod(0o755)
    assert not setup.usable(tmp_path / "helper", io.StringIO())


def test_the_archive_is_the_main_one_that_apt_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "stable-security main one/",
        "stable-updates main two/",
        "stable contrib three/",
        "stable main four/",
    )
    script(tmp_path / "apt-get", "\n".join(f"echo '{line}'" for line in lines))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert setup.main_archive() == "four/"
    script(tmp_path / "apt-get", "true")
    assert setup.main_archive() is None


def test_without_root_setting_up_says_what_to_install(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    (repository / "tools").mkdir(parents=True)
    (repository / "tools/setup.py").write_bytes(Path(setup.__file__).read_bytes())
    done = subprocess.run(
        [sys.executable, repository / "tools/setup.py"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    packages = " ".join(setup.PROGRAMS.values())  # every one: PATH is empty
    assert f"apt-get install --no-install-recommends {packages}" in done.stderr
    assert "build/setup.log" in done.stderr
