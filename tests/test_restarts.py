"""The policy of supervision: limits and back-off as pure functions, against what their sentences say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.errors import IllegalArgumentError
from vmactor.restarts import Backoff, Failure, RestartHistory, RestartLimit, Strategy

TIMES = st.lists(st.floats(0, 100), max_size=30).map(sorted)


@given(st.integers(0, 5), st.floats(0.1, 50), TIMES)
def test_a_limit_is_exceeded_exactly_when_more_failures_than_its_intensity_fall_into_a_period(
    intensity: int, period: float, times: list[float]
) -> None:
    history = RestartHistory(RestartLimit(intensity, period))
    for count, now in enumerate(times, start=1):
        within = [time for time in times[:count] if time >= now - period]
        assert history.bears(Failure(now, "a", None)) == (len(within) <= intensity)
        assert [failure.time for failure in history.recent] == within
        assert history.total == count
        if len(within) > intensity:
            break


def test_a_failure_counts_up_to_and_at_the_end_of_its_period() -> None:
    def borne(later: float) -> bool:
        history = RestartHistory(RestartLimit(1, 5.0))
        assert history.bears(Failure(10.0, "a", None))
        return history.bears(Failure(10.0 + later, "a", None))

    assert not borne(5.0)
    assert borne(math.nextafter(5.0, math.inf) + 1e-9)


BACKOFFS = st.builds(
    Backoff,
    initial=st.floats(0, 10),
    maximum=st.floats(10, 1000),
    factor=st.floats(1, 100),
    jitter=st.floats(0, 1),
    stable=st.floats(0, 100),
)


@given(BACKOFFS, st.integers(1, 10_000), st.floats(0, 1))
def test_a_delay_grows_by_its_factor_up_to_the_maximum_and_chance_only_shortens_it(
    backoff: Backoff, failures: int, chance: float
) -> None:
    whole = backoff.delay(failures, 0)
    assert 0 <= whole <= backoff.maximum
    following = backoff.delay(failures + 1, 0)
    assert following == pytest.approx(min(backoff.maximum, whole * backoff.factor))
    assert backoff.delay(1, 0) == backoff.initial
    assert whole * (1 - backoff.jitter) <= backoff.delay(failures, chance) + 1e-9
    assert backoff.delay(failures, chance) <= whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial": -1},
        {"initial": 31},
        {"maximum": math.inf},
        {"initial": math.nan},
        {"factor": 0.5},
        {"factor": math.nan},
        {"jitter": 1.5},
        {"jitter": -0.1},
        {"stable": -1},
        {"stable": math.nan},
    ],
)
def test_a_back_off_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(IllegalArgumentError, match="factor >= 1"):
        Backoff(**wrong)


@pytest.mark.parametrize(
    ("strategy", "affected"),
    [
        (Strategy.ONE_FOR_ONE, "b"),
        (Strategy.ONE_FOR_ALL, "abcd"),
        (Strategy.REST_FOR_ONE, "bcd"),
        (Strategy.SIMPLE_ONE_FOR_ONE, "b"),
    ],
)
def test_a_strategy_names_whom_a_failure_concerns(strategy: Strategy, affected: str) -> None:
    assert "".join(strategy.affected(tuple("abcd"), "b")) == affected
