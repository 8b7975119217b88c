"""The daemon's log: lines for people or JSON for programs, on standard error, through structlog.

Every line of a VM has ``vm``, ``cid`` and, where it is of a run, ``generation`` bound by whoever logs. What
other libraries log by the standard library comes out in the same form.
"""

import logging
import sys
from typing import Any, Final

import structlog

from vmactor.daemon.config import LogOptions
from vmactor.text import escape

_SHARED: Final[list[Any]] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
]
_OURS: Final = frozenset({"event", "level", "time", "exception"})


def configure(options: LogOptions) -> None:
    """Set the log up, or anew; for programs, not for libraries."""
    terminal = sys.stderr.isatty()
    people = options.format == "console" or (options.format is None and terminal)
    level = getattr(logging, options.level.upper())
    if people:
        ending: list[Any] = [_escaped, structlog.dev.ConsoleRenderer(colors=terminal)]
    else:
        ending = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=[*_SHARED, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    plain = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    formatter = structlog.stdlib.ProcessorFormatter(foreign_pre_chain=_SHARED, processors=[plain, *ending])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


def _escaped(_logger: object, _method: str, line: Any) -> Any:
    """Foreign text must not be able to do anything on a terminal; the event itself is our own text."""
    return {
        name: escape(value) if isinstance(value, str) and name not in _OURS else value
        for name, value in line.items()
    }
