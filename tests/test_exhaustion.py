"""Every system call that creates, starts or ends a VM fails in turn, for want of what it takes.

The calls are counted by a library of ours in front of the C library, in a process of its own; there is no
other way to have each of them fail once, exactly there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.exhaustion_child import FAULTS
from tests.simulated_peer import executable

ROOT = Path(__file__).parent.parent
SECONDS = 300
LEAST = {
    "open": 8,
    "write": 2,
    "pipe": 3,
    "socket": 3,
    "fork": 1,
    "thread": 1,
    "pidfd": 1,
    "bind": 2,
    "mkdir": 1,
}
"""How many calls of a kind a life has at least, else the sweep does not see them."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail."""
    built = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-o", built, ROOT / "tests/faults.c", "-ldl"],
        check=True,
    )
    return built


# Not under uvloop: what it does where epoll fails is to end the process.
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_whatever_runs_out_at_any_step_is_a_typed_error_that_leaves_nothing_and_disturbs_nobody(
    short_dir: Path, library: Path, backend: str
) -> None:
    executable()
    done = subprocess.run(
        [sys.executable, "-m", "tests.exhaustion_child", short_dir, backend],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-4000:]
    assert rows.pop() == {"done": True}
    assert [row for row in rows if row["wrong"]] == []
    seen = {kind: sum(1 for row in rows if row["kind"] == kind) for kind in FAULTS}
    assert {kind: count for kind, count in seen.items() if count < LEAST.get(kind, 0)} == {}
    refused = [row for row in rows if not row["outcome"].startswith("lived")]
    assert len(refused) > 20
