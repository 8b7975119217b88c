"""Latencies: every one is kept, so percentiles are exact.

A run knows how many there will be (one of a kind for each VM), and eight bytes for each are less than a
histogram that is as exact over microseconds to hours. What a percentile is, is the rule of HdrHistogram: the
smallest recorded value that at least that share of all values does not exceed.

Coordinated omission is the business of whoever records: a value counts from when something was *due*.
"""

import math
from array import array
from typing import Final

PERCENTILES: Final = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9}
CURVE_POINTS: Final = 60
"""Of a distribution's curve, at most; half of them beyond its nine tenths."""


class Latencies:
    """Values of one kind, in seconds."""

    def __init__(self) -> None:
        self._values = array("d")
        self._sorted = True

    def __len__(self) -> int:
        return len(self._values)

    def record(self, seconds: float) -> None:
        """Take a value in."""
        self._values.append(max(seconds, 0.0))
        self._sorted = False

    def percentile(self, percent: float) -> float | None:
        """The exact percentile; None of nothing."""
        self._sort()
        if not self._values:
            return None
        rank = math.ceil(round(percent / 100 * len(self._values), 9))
        return self._values[max(rank, 1) - 1]

    def summary(self) -> dict[str, float | int | None]:
        """JSON-ready: p50, p90, p99, p999, max, mean, and the count."""
        figures: dict[str, float | int | None] = {
            name: self.percentile(percent) for name, percent in PERCENTILES.items()
        }
        figures["max"] = self.percentile(100)
        figures["mean"] = math.fsum(self._values) / len(self._values) if self._values else None
        figures["count"] = len(self._values)
        return figures

    def curve(self) -> list[list[float]]:
        """Points [seconds, share of values that are not greater], denser towards the end."""
        half = CURVE_POINTS // 2
        tail = [1 - 0.1 * 10 ** (-3 * step / half) for step in range(half)]
        shares = [*(0.9 * step / half for step in range(half)), *tail, 1.0]
        points = [(self.percentile(100 * share), share) for share in shares]
        return [[seconds, share] for seconds, share in points if seconds is not None]

    def _sort(self) -> None:
        if not self._sorted:
            self._values = array("d", sorted(self._values))
            self._sorted = True
