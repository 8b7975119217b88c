"""Logging: quiet by default, the embedding program's own way when it has one, foreign text escaped."""

import logging

import pytest
import structlog

from vmactor.log import get_logger


@pytest.fixture
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structlog, "is_configured", lambda: False)
    # Whoever configures the standard library's logging, as import-linter does, disables what was there.
    monkeypatch.setattr(logging.getLogger("vmactor"), "disabled", False)


@pytest.mark.usefixtures("unconfigured")
def test_lines_go_to_the_standard_logger_with_their_values(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vmactor"):
        get_logger(vm="web", cid=2048).info("started", generation=1)
    (record,) = caplog.records
    assert record.getMessage() == "started vm=web cid=2048 generation=1"
    assert record.vmactor == {"vm": "web", "cid": 2048, "generation": 1}  # type: ignore[attr-defined]


@pytest.mark.usefixtures("unconfigured")
def test_text_of_guests_cannot_forge_lines(caplog: pytest.LogCaptureFixture) -> None:
    get_logger().warning("refused", reason="bad\nERROR:root:all is lost \x1b[2J")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert "\x1b" not in record.getMessage()


@pytest.mark.usefixtures("unconfigured")
def test_what_nobody_wants_to_see_is_not_even_rendered(caplog: pytest.LogCaptureFixture) -> None:
    class Explodes:
        def __str__(self) -> str:
            raise AssertionError("rendered")

    with caplog.at_level(logging.WARNING, logger="vmactor"):
        get_logger().debug("quiet", value=Explodes())
    assert caplog.records == []


def test_a_program_that_configured_structlog_gets_the_lines_itself() -> None:
    with structlog.testing.capture_logs() as lines:
        get_logger(cid=7).warning("seen", n=1)
    assert lines == [{"event": "seen", "cid": 7, "n": 1, "log_level": "warning"}]
