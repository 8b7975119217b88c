"""The statistics of the benches."""

import random

import pytest

from bench.paired import median_interval


def test_the_interval_of_twenty_values_is_the_sixth_to_the_fifteenth() -> None:
    interval = median_interval([float(n) for n in range(1, 21)])
    assert (interval.low, interval.median, interval.high) == (6, 10.5, 15)
    assert interval.confidence == pytest.approx(0.9586, abs=1e-4)


def test_too_few_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="too few"):
        median_interval([1.0] * 5)
    assert median_interval([float(n) for n in range(6)]).high == 5


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    rng = random.Random(7)
    held = 0
    for _ in range(2000):
        interval = median_interval([rng.expovariate(1.0) for _ in range(24)])
        held += interval.low <= 0.6931 <= interval.high
    assert held / 2000 >= 0.95 - 0.02
