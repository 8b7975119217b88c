"""The examples run as they are printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> str:
    """Run an example as a user would."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.guest
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_the_simple_case(guest_dir: Path, loop: str) -> None:
    output = run("examples/boot.py", str(guest_dir / "vm.json"), loop)
    assert output.split() == [
        "started",
        "payload_started",
        "payload_ready",
        "payload_finished",
        "died",
        "SHUTDOWN",
    ]


@pytest.mark.guest
def test_several_in_a_trio_program(guest_dir: Path) -> None:
    output = run("examples/in_trio.py", str(guest_dir / "vm.json"), "2")
    assert output.count("payload_ready") == 2


@pytest.mark.guest
def test_the_readmes_program_runs_as_it_is_printed(guest_dir: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    program = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "readme.py").write_text(program)
    assert run(str(tmp_path / "readme.py")).splitlines()[-1].count("SHUTDOWN") == 1
