"""The runtime's page and example: the example runs as shown, and every test named on the page exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_example_of_the_runtime_runs_on_both_loops(backend: str) -> None:
    example = ROOT / "examples" / "runtime.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", example, backend],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    # Replies and events are two streams; each has its order.
    assert [line for line in lines if not line.startswith("event")] == [
        "reply: 40",
        "reply: 42",
        "refused: deposit more than 0",
        "too late: account has ended",
    ]
    assert [line for line in lines if line.startswith("event")] == [
        "event 1: balance 40",
        "event 2: balance 42",
    ]


def test_every_promise_of_the_page_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "runtime.md").read_text()
    promises = 0
    for section in page.split("\n## ")[1:]:
        modules = re.findall(r"tests/(test_\w+\.py)", section)
        assert modules, section.splitlines()[0]
        sources = "".join((ROOT / "tests" / module).read_text() for module in modules)
        existing = set(re.findall(r"def (test_\w+)", sources))
        named = set(re.findall(r"`(test_\w+)`", section))
        assert named <= existing, f"{modules} have no {sorted(named - existing)}"
        promises += len(named)
    assert promises > 30
