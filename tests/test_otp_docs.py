"""The table of OTP's behaviours: every row names a test, and every named test exists where the page says."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_documented_behaviour_of_otp_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "otp.md").read_text()
    modules = set(re.findall(r"`tests/(test_\w+\.py)`", page))
    sources = "".join((ROOT / "tests" / module).read_text() for module in modules)
    existing = set(re.findall(r"def (test_\w+)\(", sources))
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| OTP ")]
    assert len(rows) > 50
    for row in rows:
        behaviour, ours, tests = (cell.strip() for cell in row.strip("|").split(" | "))
        assert behaviour
        assert ours
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"no test: {row}"
    named_anywhere = set(re.findall(r"`(test_\w+)`", page))
    assert named_anywhere <= existing, f"no such tests: {sorted(named_anywhere - existing)}"
