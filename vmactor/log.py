"""Logging as a library should: through the standard library's logger ``vmactor``, until told otherwise.

Lines are events with bound values (vm, cid, generation). An embedding program that has configured
structlog gets them through its own processors. Any other gets standard log records whose text is ``event
key=value`` and whose attribute ``vmactor`` holds the values. Nothing is configured at import; without any
configuration only warnings and errors are seen, on standard error.
"""

import logging
from contextlib import suppress
from typing import Any, Final

import structlog

from vmactor.text import escape

_standard: Final = logging.getLogger("vmactor")


class Logger:
    """A logger with values bound to it; decides at each line where that goes.

    Not structlog's: each VM has one, and a line that nobody wants to see should cost next to nothing.
    """

    __slots__ = ("_bound",)

    def __init__(self, bound: dict[str, Any]) -> None:
        self._bound = bound

    def debug(self, event: str, **values: Any) -> None:
        """Log for those who look for faults."""
        self._line("debug", logging.DEBUG, event, values)

    def info(self, event: str, **values: Any) -> None:
        """Log what happens in the course of things."""
        self._line("info", logging.INFO, event, values)

    def warning(self, event: str, **values: Any) -> None:
        """Log what somebody should know."""
        self._line("warning", logging.WARNING, event, values)

    def error(self, event: str, **values: Any) -> None:
        """Log what somebody has to do something about."""
        self._line("error", logging.ERROR, event, values)

    def _line(self, level: str, number: int, event: str, values: dict[str, Any]) -> None:
        if structlog.is_configured():
            with suppress(OSError):  # the disk of the log is full, say: what is logged goes on all the same
                getattr(structlog.get_logger("vmactor"), level)(event, **self._bound, **values)
        elif _standard.isEnabledFor(number):
            error = values.pop("exc_info", None)
            values = self._bound | values
            text = " ".join([event, *(f"{key}={_shown(value)}" for key, value in values.items())])
            _standard.log(number, "%s", text, exc_info=error, extra={"vmactor": values})


def get_logger(**bound: Any) -> Logger:
    """A logger with values bound to it."""
    return Logger(bound)


def _shown(value: object) -> str:
    text = escape(str(value), limit=1000)
    return f'"{text}"' if " " in text else text
