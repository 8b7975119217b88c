"""What the end of a child means to its supervisor, and how its failure goes up.

An escalation is an exception that leaves the supervisor's block: the supervisor above sees it as the failure
of one of its own children.
"""

from dataclasses import dataclass
from enum import Enum

from vmactor.restarts import Failure, RestartLimit


class Decision(Enum):
    """What a child's end means for its supervisor."""

    IGNORE = "ignore"
    ESCALATE = "escalate"


class ChildFailedError(Exception):
    """A child ended in a way that its supervisor decided not to bear; the cause is chained.

    Attributes:
        child: The child's name.
    """

    def __init__(self, supervisor: str, child: str, what: str = "failed") -> None:
        super().__init__(f"{supervisor}: child {child} {what}")
        self.child = child


class RestartLimitReachedError(ChildFailedError):
    """Children failed more often than their supervisor bears: it gave up; the last failure is chained.

    Attributes:
        limit: What it bears.
        history: The failures within the limit's period, oldest first; one more than its intensity.
    """

    def __init__(self, supervisor: str, limit: RestartLimit, history: tuple[Failure, ...]) -> None:
        names = ", ".join(dict.fromkeys(failure.child for failure in history))
        super().__init__(
            supervisor,
            history[-1].child,
            f"is not started again: {len(history)} failures within {limit.period:g} s (of {names}), and "
            f"{limit.intensity} are borne; cure their cause, or give another RestartLimit",
        )
        self.limit = limit
        self.history = history


@dataclass(frozen=True, slots=True)
class ChildExit:
    """How a child ended.

    Attributes:
        name: The child.
        error: The exception that ended it, or None if it returned.
    """

    name: str
    error: Exception | None


def escalate_failures(ended: ChildExit) -> Decision:
    """A child may end; it may not fail."""
    return Decision.IGNORE if ended.error is None else Decision.ESCALATE
