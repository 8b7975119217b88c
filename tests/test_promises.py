"""Every promise names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_that_exists() -> None:
    functions = {
        node.name
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    rows = [line for line in (ROOT / "PROMISES.md").read_text().splitlines() if line.startswith("| ")]
    promises = [line for line in rows if not re.match(r"\| (promise|---)", line)]
    assert len(promises) > 25
    for line in promises:
        named = re.findall(r"`([a-z_0-9/.]+)`", line.rsplit(" | ", 1)[1])
        assert named, f"no test: {line}"
        for name in named:
            assert name in functions or (ROOT / name).is_file(), f"no such test: {name}"
