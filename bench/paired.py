"""Paired measurements: two ways of doing the same, in turn, so that a shared machine disturbs both alike."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A median and an interval that holds the true one with at least the given confidence."""

    median: float
    low: float
    high: float
    confidence: float


def median_interval(values: Sequence[float], wanted: float = 0.95) -> Interval:
    """The distribution-free interval of a median, by order statistics (the sign test turned round).

    Raises:
        ValueError: Fewer than six values: no interval of 95 % exists.
    """
    ordered, count = sorted(values), len(values)
    tail, rank = 0.0, -1
    for candidate in range(count // 2):
        more = tail + math.comb(count, candidate) / 2**count
        if 1 - 2 * more < wanted:
            break
        tail, rank = more, candidate
    if rank < 0:
        raise ValueError(f"{count} values are too few for a {wanted:.0%} interval")
    return Interval(statistics.median(ordered), ordered[rank], ordered[count - 1 - rank], 1 - 2 * tail)
