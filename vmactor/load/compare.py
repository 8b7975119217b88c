"""Two results of loads side by side."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from vmactor.errors import IllegalArgumentError

FIGURES: Final = (
    *("vms", "peak_ready", "failed", "events_published", "events_lost", "seconds"),
    *("manager_rss_bytes_per_vm", "manager_cpu_fraction_idle"),
)
PERCENTILES: Final = ("p50", "p99", "max")


def compare(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any, float | None]]:
    """Rows: what, both values, and the second over the first where that says anything.

    Raises:
        IllegalArgumentError: One of them is no result of a load.
    """
    try:
        pairs = zip(_figures(one), _figures(other), strict=True)
        return [(name, mine, theirs, _ratio(mine, theirs)) for (name, mine), (_, theirs) in pairs]
    except (KeyError, TypeError, AttributeError) as error:
        raise IllegalArgumentError(f"no result of 'vmactor load --json': {error!r:.100}") from None


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in FIGURES:
        yield name, result[name]
    for kind in ("create", "start_to_ready", "stop", "report_to_subscriber"):
        for percentile in PERCENTILES:
            yield f"{kind} {percentile}, ms", _milliseconds(result["latency_seconds"][kind][percentile])


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _ratio(one: Any, other: Any) -> float | None:
    return other / one if one and other is not None else None
