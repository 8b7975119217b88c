"""What a load is: a scenario as people write it, and the lives that follow from it, without any I/O.

``plan`` is pure: the same scenario, seed included, gives the same lives in the same order.
"""

import math
import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Final, Self

from vmactor.errors import IllegalArgumentError

MAX_VMS: Final = 1_000_000
MAX_SECONDS: Final = 7 * 86_400.0
"""Longer than any time in a scenario may be; a week."""


class Arrivals(StrEnum):
    """When VMs come."""

    CLOSED = "closed"
    """So many clients; each begins its next VM when it is done with the one before."""
    FIXED = "fixed"
    """At equal distances."""
    POISSON = "poisson"
    """Independently of each other: distances are distributed exponentially."""


class Lifetimes(StrEnum):
    """How long VMs stay ready."""

    HOLD = "hold"
    """Until the hold is over."""
    CONSTANT = "constant"
    UNIFORM = "uniform"
    """From nothing to twice the mean."""
    EXPONENTIAL = "exponential"


class Fate(StrEnum):
    """How a life goes."""

    WELL = "well"
    """Ready; then its payload finishes when it is told to, and the VM is stopped."""
    CRASH = "crash"
    """Ready; then the guest's kernel panics."""
    HANG = "hang"
    """Its payload never reports its start, so it is killed."""
    ERROR = "error"
    """The guest reports an error instead of being ready, and shuts down."""
    KILLED = "killed"
    """Ready; then somebody kills the VMM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A load, complete. Times are in seconds, rates in VMs a second, shares from 0 to 1.

    Attributes:
        vms: How many lives in all.
        vmm: The VMM driver's name.
        arrivals: When VMs come.
        clients: With ``closed``: how many VMs are on their way up, or down, at a time; with other lifetimes
            than ``hold`` how many live at a time.
        rate: With ``fixed`` and ``poisson``: how many come in a second.
        ramp: For how long the rate grows evenly from nothing; with ``closed``, over how long the clients
            begin.
        lifetime: How VMs' times are distributed.
        mean_lifetime: The mean of these times; of no use with ``hold``.
        hold: How long nothing is done once all have come.
        crash: The share of VMs with this fate, as with the following.
        hang: The same.
        error: The same.
        killed: The same.
        hangup_timeout: After how long a payload that has not started counts as hung.
        ready_timeout: After how long a VM that is not ready, or not at its end, counts as failed.
        seed: Of all that is random.

    Raises:
        IllegalArgumentError: A value is out of range, or of no use beside the others.
    """

    vms: int = 100
    vmm: str = "simulated"
    arrivals: Arrivals = Arrivals.CLOSED
    clients: int = 16
    rate: float = 20.0
    ramp: float = 0.0
    lifetime: Lifetimes = Lifetimes.HOLD
    mean_lifetime: float = 1.0
    hold: float = 5.0
    crash: float = 0.0
    hang: float = 0.0
    error: float = 0.0
    killed: float = 0.0
    hangup_timeout: float = 30.0
    ready_timeout: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_whole("vms", self.vms, 1, MAX_VMS)
        _check_whole("clients", self.clients, 1, MAX_VMS)
        _check_whole("seed", self.seed, 0, 2**63 - 1)
        for name in ("ramp", "hold"):
            _check_number(name, getattr(self, name), 0, MAX_SECONDS)
        for name in ("mean_lifetime", "hangup_timeout", "ready_timeout"):
            _check_number(name, getattr(self, name), 0.001, MAX_SECONDS)
        _check_number("rate", self.rate, 0.001, 100_000)
        for fate in _FAILURES:
            _check_number(fate, getattr(self, fate), 0, 1)
        if sum(getattr(self, fate) for fate in _FAILURES) > 1 + 1e-9:
            raise IllegalArgumentError(
                f"the shares {', '.join(_FAILURES)} are more than 1 together; make them smaller"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Make a scenario of values by name, as a file or a command line has them.

        Raises:
            IllegalArgumentError: A name is unknown, or a value is wrong; the message says which.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise IllegalArgumentError(
                f"a scenario has no {unknown[0]!r:.80}; there are: {', '.join(sorted(known))}"
            )
        enums: dict[str, type[StrEnum]] = {"arrivals": Arrivals, "lifetime": Lifetimes}
        made = dict(values)
        for name, kind in enums.items():
            if name in made:
                try:
                    made[name] = kind(made[name])
                except ValueError:
                    raise IllegalArgumentError(
                        f"{name} is {made[name]!r:.80}; it can be {', '.join(kind)}"
                    ) from None
        if type(made.get("vmm", "")) is not str:
            raise IllegalArgumentError(f"vmm is {made['vmm']!r:.80}; it has to be a driver's name")
        return cls(**made)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


_FAILURES: Final = tuple(fate for fate in Fate if fate is not Fate.WELL)


def parse_toml(text: str) -> dict[str, Any]:
    """The values of a scenario's TOML file.

    Raises:
        IllegalArgumentError: It is no TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise IllegalArgumentError(f"the scenario is no TOML: {error}") from None
    except RecursionError:
        raise IllegalArgumentError("the scenario is nested too deeply; it is a flat list of values") from None


@dataclass(frozen=True, slots=True)
class Life:
    """One VM's life as planned.

    Attributes:
        number: Counts from 0.
        arrival: Seconds after the beginning when it is due; None if it comes when a client is free.
        lifetime: Seconds for which it stays ready; None for until the end of the hold.
        fate: How it goes.
    """

    number: int
    arrival: float | None
    lifetime: float | None
    fate: Fate

    def script(self) -> str:
        """What its guest does, in the language of the test guest and of the simulated VMM."""
        milliseconds = round(1000 * (self.lifetime or 0))
        match self.fate:
            case Fate.HANG:
                return "hang"
            case Fate.ERROR:
                return "started;error 3 load;poweroff"
            case Fate.CRASH:
                return f"started;ready;sleep {milliseconds};panic"
        return "started;ready;serve"


def plan(scenario: Scenario) -> Iterator[Life]:
    """The lives of a scenario, one after the other; the same for the same scenario.

    Every life takes its own numbers from the seed, so that a change of one share or mean leaves what has
    nothing to do with it as it was.
    """
    arrival = _arrivals(scenario)
    for number in range(scenario.vms):
        chance = random.Random(f"{scenario.seed}/{number}")  # noqa: S311 - nothing here is a secret
        fate, lifetime = chance.random(), chance.random()
        yield Life(number, next(arrival), _lifetime(scenario, lifetime), _fate(scenario, fate))


def _arrivals(scenario: Scenario) -> Iterator[float | None]:
    """When each is due. Work arrives evenly in "load time"; the ramp stretches its beginning."""
    if scenario.arrivals is Arrivals.CLOSED:
        while True:
            yield None
    chance = random.Random(f"{scenario.seed}/arrivals")  # noqa: S311
    work = 0.0  # VMs that are due, which the integral of the rate has to reach
    while True:
        yield _when(scenario, work)
        work += 1.0 if scenario.arrivals is Arrivals.FIXED else chance.expovariate(1.0)


def _when(scenario: Scenario, work: float) -> float:
    rate, ramp = scenario.rate, scenario.ramp
    if work >= rate * ramp / 2:
        return work / rate + ramp / 2
    return math.sqrt(2 * work * ramp / rate)


def _lifetime(scenario: Scenario, chance: float) -> float | None:
    mean = scenario.mean_lifetime
    match scenario.lifetime:
        case Lifetimes.HOLD:
            return None
        case Lifetimes.CONSTANT:
            return mean
        case Lifetimes.UNIFORM:
            return 2 * mean * chance
        case Lifetimes.EXPONENTIAL:
            return min(-mean * math.log(1 - chance), MAX_SECONDS)


def _fate(scenario: Scenario, chance: float) -> Fate:
    for fate in _FAILURES:
        chance -= getattr(scenario, fate)
        if chance < 0:
            return fate
    return Fate.WELL


def _check_whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise IllegalArgumentError(
            f"{name} is {value!r:.80}; it has to be a whole number from {low} to {high}"
        )


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if type(value) not in {int, float} or not low <= value <= high:  # type: ignore[operator]
        raise IllegalArgumentError(f"{name} is {value!r:.80}; it has to be a number from {low:g} to {high:g}")
