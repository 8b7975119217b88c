"""When a child is started again, and when to give up: the policy of supervision as values and pure functions.

Nothing here waits, reads a clock or knows a task; time and chance come in as arguments. So an actor that
restarts something itself, say a machine of its own, uses the same rules as a supervisor.

Restart types, strategies and the limit are those of Erlang/OTP's ``supervisor`` (docs/otp.md); the back-off
is ours.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vmactor.errors import IllegalArgumentError


class Restart(StrEnum):
    """Whether a child is started again after an end that nobody asked for."""

    PERMANENT = "permanent"
    """Always."""

    TRANSIENT = "transient"
    """After a failure; not after it returned."""

    TEMPORARY = "temporary"
    """Never, not even when a sibling's failure stopped it."""

    def applies(self, *, failed: bool) -> bool:
        """Whether a child of this type is started again after such an end."""
        return self is Restart.PERMANENT or (self is Restart.TRANSIENT and failed)


class Strategy(StrEnum):
    """Who is stopped and started again with a child that is to be restarted."""

    ONE_FOR_ONE = "one_for_one"
    """Nobody else."""

    ONE_FOR_ALL = "one_for_all"
    """All its siblings."""

    REST_FOR_ONE = "rest_for_one"
    """Those that were started after it: they may depend on it."""

    SIMPLE_ONE_FOR_ONE = "simple_one_for_one"
    """Nobody else. Children are many, and come and go: they stop all at once; nothing is kept of the dead."""

    @property
    def alone(self) -> bool:
        """Whether each child is restarted for itself."""
        return self in {Strategy.ONE_FOR_ONE, Strategy.SIMPLE_ONE_FOR_ONE}

    def affected(self, names: Sequence[str], failed: str) -> Sequence[str]:
        """Those of a supervisor's children, given in the order of their start, whom a failure concerns."""
        match self:
            case Strategy.ONE_FOR_ALL:
                return names
            case Strategy.REST_FOR_ONE:
                return names[names.index(failed) :]
            case _:
                return [failed]


@dataclass(frozen=True, slots=True)
class Failure:
    """One end of a child that called for a restart.

    Attributes:
        time: When, on the event loop's clock.
        child: Who.
        error: Why; None if the child returned although it is permanent.
    """

    time: float
    child: str
    error: Exception | None


@dataclass(frozen=True, slots=True)
class RestartLimit:
    """How many restarts are borne: ``intensity`` within any ``period``; one more is too many.

    The intensity is how big a burst may be, intensity / period the rate that may go on for ever. Limits of
    several levels multiply: give the levels different ones. The defaults are OTP's.

    Attributes:
        intensity: Restarts; 0 bears none.
        period: Seconds.

    Raises:
        IllegalArgumentError: A negative intensity, or a period that is not above 0.
    """

    intensity: int = 1
    period: float = 5.0

    def __post_init__(self) -> None:
        if self.intensity < 0 or not self.period > 0:
            raise IllegalArgumentError(
                f"at most {self.intensity} restarts in {self.period} s is no limit: "
                "give an intensity of 0 or more and a period above 0"
            )


class RestartHistory:
    """The failures that count now, at most one more than the limit allows.

    Attributes:
        limit: What is borne.
        total: Failures so far, those that do not count any more included.
    """

    __slots__ = ("_recent", "limit", "total")

    def __init__(self, limit: RestartLimit) -> None:
        self.limit = limit
        self.total = 0
        self._recent: deque[Failure] = deque()

    @property
    def recent(self) -> tuple[Failure, ...]:
        """The failures of the last period, as it was at the latest of them, oldest first."""
        return tuple(self._recent)

    def bears(self, failure: Failure) -> bool:
        """Count a failure; whether a restart is still within the limit.

        Once it said no, it is of no further use.
        """
        self.total += 1
        while self._recent and self._recent[0].time < failure.time - self.limit.period:
            self._recent.popleft()
        self._recent.append(failure)
        return len(self._recent) <= self.limit.intensity


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before a restart: longer each time, until a run was stable.

    Attributes:
        initial: Seconds before the first restart.
        maximum: Seconds that are never exceeded.
        factor: By which each delay is longer than the one before.
        jitter: The share of a delay that is left to chance, 0 to 1, so that many who failed together do not
            return together. The delay is shortened by up to that share, never lengthened.
        stable: Seconds after which a run counts as stable: the next failure is the first again.

    Raises:
        IllegalArgumentError: A value that makes no sense.
    """

    initial: float = 0.1
    maximum: float = 30.0
    factor: float = 2.0
    jitter: float = 0.5
    stable: float = 60.0

    def __post_init__(self) -> None:
        sound = 0 <= self.initial <= self.maximum < math.inf and 1 <= self.factor < math.inf
        if not (sound and 0 <= self.jitter <= 1 and self.stable >= 0):
            raise IllegalArgumentError(
                f"{self} cannot be: have 0 <= initial <= maximum, factor >= 1, 0 <= jitter <= 1, stable >= 0"
            )

    def delay(self, failures: int, chance: float) -> float:
        """Seconds to wait.

        Args:
            failures: In a row, this one included: 1 or more.
            chance: A number from 0 to 1, such as ``random.random()``.
        """
        try:
            whole = min(self.maximum, self.initial * self.factor ** (failures - 1))
        except OverflowError:
            whole = self.maximum
        return whole * (1 - self.jitter * chance)
