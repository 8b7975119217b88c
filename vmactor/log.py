"""Logging as a library should: through the standard library's logger ``vmactor``, until told otherwise.

Lines are events with bound values (vm, cid, generation). An embedding program that has configured
structlog gets them through its own processors. Any other gets standard log records whose text is ``event
key=value`` and whose attribute ``vmactor`` holds the values. Nothing is configured at import; without any
configuration only warnings and errors are seen, on standard error.
"""

import logging
from collections.abc import MutableMapping
from typing import Any

import structlog
from structlog.typing import FilteringBoundLogger

from vmactor.text import escape


def get_logger(**bound: Any) -> FilteringBoundLogger:
    """A logger with values bound to it; decides where its lines go at each line."""
    logger: FilteringBoundLogger = structlog.wrap_logger(_Relay(), processors=[_relay], **bound)
    return logger


class _Relay:
    """Hands a line to the program's structlog, or to the standard library."""

    def line(self, level: str, event: str, values: dict[str, Any]) -> None:
        if structlog.is_configured():
            getattr(structlog.get_logger("vmactor"), level)(event, **values)
            return
        number = logging.getLevelNamesMapping()[level.upper()]
        logger = logging.getLogger("vmactor")
        if logger.isEnabledFor(number):
            error = values.pop("exc_info", None)
            text = " ".join([event, *(f"{key}={_shown(value)}" for key, value in values.items())])
            logger.log(number, "%s", text, exc_info=error, extra={"vmactor": values})

    def __getattr__(self, level: str) -> Any:
        return lambda event, **values: self.line(level, event, values)


def _shown(value: object) -> str:
    text = escape(str(value), limit=1000)
    return f'"{text}"' if " " in text else text


def _relay(_logger: Any, _method: str, values: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return values
