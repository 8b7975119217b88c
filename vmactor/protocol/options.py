"""The maps of options that methods take, as both sides of the socket see them (docs/protocol.md)."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from vmactor.errors import IllegalArgumentError
from vmactor.protocol import VERSION
from vmactor.protocol.values import FILE
from vmactor.restarts import Restart

MAX_SECONDS: Final = 3600.0
"""Longest time for which a call waits."""
MAX_CAPACITY: Final = 16_384
"""Most events that may wait in a subscription."""


def check_seconds(seconds: float | None, what: str) -> float | None:
    """A time as it came, if it can be one. Raises IllegalArgumentError."""
    if seconds is not None and not 0 <= seconds <= MAX_SECONDS:
        raise IllegalArgumentError(f"{what} must be 0 to {MAX_SECONDS:g} seconds, not {seconds:g}")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class HelloOptions:
    """Of ``hello``: which version of the protocol the client speaks, and what it is, for people."""

    version: int = VERSION
    client: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitOptions:
    """How many restarts are borne within how many seconds."""

    count: int = 3
    seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackoffOptions:
    """How long to wait before a restart."""

    initial: float = 1.0
    maximum: float = 30.0
    stable: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartOptions:
    """Whether a VM is started again by itself."""

    when: Restart = Restart.TRANSIENT
    limit: LimitOptions = LimitOptions()
    backoff: BackoffOptions = BackoffOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestBinderOptions:
    """What a guest that speaks RPC Binder is told."""

    release: str = "android13"
    version: int = 0
    max_threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOptions:
    """Of ``createVm``."""

    keep: bool = False
    console: Any = field(default=None, metadata=FILE)
    log: Any = field(default=None, metadata=FILE)
    ramdump: Any = field(default=None, metadata=FILE)
    hangup_detection: bool | None = None
    hangup_timeout: float | None = None
    restart: RestartOptions | None = None
    guest_binder: GuestBinderOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitOptions:
    """Of methods that wait for something: how long."""

    timeout: float | None = None

    def __post_init__(self) -> None:
        check_seconds(self.timeout, "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderOptions:
    """Of ``shutdown`` and ``shutdownVms``: seconds for each rung; without them it is not tried."""

    power_button: float | None = None
    exit_request: float | None = None
    kill: float | None = None

    def __post_init__(self) -> None:
        for seconds in (self.power_button, self.exit_request, self.kill):
            check_seconds(seconds, "a rung's time")


class OverflowWord(Enum):
    """What happens to a subscription whose reader is too slow."""

    DROP_OLDEST = "dropOldest"
    DISCONNECT = "disconnect"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscribeOptions:
    """Of ``subscribe``."""

    cids: tuple[int, ...] | None = None
    kinds: tuple[str, ...] | None = None
    capacity: int = 1024
    overflow: OverflowWord = OverflowWord.DROP_OLDEST
    patience: float = 10.0
    late: bool = False
    snapshot: bool = False
    after: int | None = None
    until_end: bool = False

    def __post_init__(self) -> None:
        check_seconds(self.patience, "patience")
        if not 1 <= self.capacity <= MAX_CAPACITY:
            raise IllegalArgumentError(f"capacity must be 1 to {MAX_CAPACITY}, not {self.capacity}")
        if self.late + self.snapshot + (self.after is not None) > 1:
            raise IllegalArgumentError("a stream begins in one way: give 'late', 'snapshot' or 'after'")
