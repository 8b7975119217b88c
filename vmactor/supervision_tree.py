"""What ``Supervisor.tree()`` tells: a supervisor and everything under it, as plain data of one moment.

All of it is JSON-ready: ``dataclasses.asdict`` gives nothing but dicts, lists, text, numbers and None.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from vmactor.restarts import Restart, Strategy

Detail = str | int | float | bool | None
"""What an actor may tell of itself under a name of its own choice."""


class ChildState(StrEnum):
    """Where a child is in its life."""

    STARTING = "starting"
    """It runs, and does not serve yet."""

    RUNNING = "running"
    """It serves."""

    STOPPING = "stopping"
    """It was asked to end, or cancelled, and has not ended."""

    RESTARTING = "restarting"
    """It has ended and waits to be started again: for the back-off, or for its siblings."""

    STOPPED = "stopped"
    """It has ended; it can be started again."""


@dataclass(frozen=True, slots=True)
class ChildInfo:
    """A child.

    Attributes:
        name: Unique among its siblings.
        state: Where it is in its life.
        restart: Its restart type.
        restarts: How often its supervisor has started it again.
        uptime: Seconds since it began to serve; None while it does not.
        last_error: What it failed with last, as at most 500 characters; None if it never did. It may quote
            guests or clients: escape it before a person sees it.
        details: What the actor tells of itself, such as the depth of its mailbox.
        supervisors: Those that it runs, with all that is under them.
    """

    name: str
    state: ChildState
    restart: Restart
    restarts: int
    uptime: float | None
    last_error: str | None
    details: Mapping[str, Detail]
    supervisors: tuple["SupervisorInfo", ...]


@dataclass(frozen=True, slots=True)
class SupervisorInfo:
    """A supervisor and everything under it.

    Attributes:
        name: As it was given.
        strategy: Who is restarted with whom.
        intensity: Restarts that it bears within ``period``.
        period: Seconds.
        failures: Ends of children that called for a restart, so far; failed attempts to restart included.
        uptime: Seconds since it was entered.
        last_error: The failure of a child that came last, with the child's name; text of the same kind.
        children: In the order of their start.
    """

    name: str
    strategy: Strategy
    intensity: int
    period: float
    failures: int
    uptime: float
    last_error: str | None
    children: tuple[ChildInfo, ...]

    @property
    def counts(self) -> Mapping[ChildState, int]:
        """How many of its children are in each state; those of other supervisors are not counted."""
        return Counter(child.state for child in self.children)

    def walk(self) -> Iterator[tuple[int, "SupervisorInfo | ChildInfo"]]:
        """Everything in the order in which one would draw it, each with its depth; this is at depth 0."""
        yield 0, self
        for child in self.children:
            yield 1, child
            for supervisor in child.supervisors:
                for depth, node in supervisor.walk():
                    yield depth + 2, node
