"""Admission: whether the host has room for one more VM, decided before it is accepted and before it starts.

``shortage`` is the decision, a pure function of the limits as they were read, what is promised to the VMs
that were accepted, and what the new one needs. ``Admission`` keeps the promises of one service.

A reading cannot tell which part of the host's use is that of our VMs. So a promise counts from the acceptance
of a VM until its run has taken what it needs and a reading has seen it; from then on it is part of what is
used. When the run is over it is a promise again. What lasts as long as the VM does (its CID, and the memory
that its guest may touch some day) is counted here alone.

A refusal always rests on a fresh reading, an acceptance on one that may be a second old.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from operator import add, mul, sub
from typing import Final

from vmactor.config import RawConfig
from vmactor.errors import CapacityExceededError, IllegalArgumentError
from vmactor.limits import Limit, Resource
from vmactor.vmm.driver import VmmDriver
from vmactor.vmm.select import VsockKind

READING_SECONDS: Final = 1.0
"""How old a reading may be that a VM is accepted by."""

VM_DESCRIPTORS: Final = 6
"""Of ours for a running VM: its listener, three pipes' read ends, its pidfd, a connection of its guest."""
SINK_DESCRIPTORS: Final = 5
"""For each place that output is copied to: our duplicate, its second opening, an epoll, a pipe's ends."""
HELPER_DESCRIPTORS: Final = 3
"""For a vsock helper: its pidfd, its complaints, and the connection that the VMM gets."""
HELPER_THREADS: Final = 4
HELPER_MEMORY: Final = 8 << 20
VM_SPACE: Final = 32 << 10
"""A VM's directory, its ledger, and its record twice, in blocks of 4 KiB, with room to spare."""
VM_INODES: Final = 10
"""The same and its sockets."""
BOOT_MEMORY: Final = 64 << 20
"""What a guest touches of its memory until it is up, at most; a small Linux takes 40 to 80 MiB."""

_PASSING: Final = tuple(resource not in {Resource.GUEST_MEMORY, Resource.CIDS} for resource in Resource)
"""What a reading shows."""
_BYTES: Final = frozenset({Resource.MEMORY, Resource.GUEST_MEMORY, Resource.SPACE})

Need = tuple[int, ...]
"""How much of each ``Resource``, by its number."""
NOTHING: Final[Need] = (0,) * len(Resource)


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """What a service accepts.

    Attributes:
        checked: Whether VMs are checked against the host's limits at all. If not, the kernel alone refuses,
            in the middle of a creation or a start.
        memory_overcommit: How much memory may be promised to all guests together, as a share of the host's
            (or of the cgroup's, if that is less). Guests take memory when they first touch it: a Linux that
            idles has touched about a third of 256 MiB. So 1.5 is safe as long as guests use two thirds of
            what they may; 1.0 is safe in any case. Whatever it is, no VM starts while the memory that is
            left does not suffice for its boot.
        concurrent_boots: How many VMs may boot at the same time; the others wait in the order in which their
            starts were asked for. None for four per CPU, or one (two at least) where guests are emulated.
    """

    checked: bool = True
    memory_overcommit: float = 1.5
    concurrent_boots: int | None = None

    def __post_init__(self) -> None:
        if not self.memory_overcommit > 0:
            raise IllegalArgumentError("memory_overcommit must be more than 0; 1.0 promises what there is")
        if self.concurrent_boots is not None and self.concurrent_boots < 1:
            raise IllegalArgumentError("concurrent_boots must be at least 1")

    def boots(self, cpus: int, *, emulated: bool) -> int:
        """How many VMs may boot at the same time on a host of so many CPUs."""
        return self.concurrent_boots or (max(cpus, 2) if emulated else 4 * cpus)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Of what there is too little.

    Attributes:
        limit: The limit that is in the way.
        used: What is taken or promised of it.
        needed: What was asked for.
    """

    limit: Limit
    used: int
    needed: int

    def error(self) -> CapacityExceededError:
        """The refusal."""
        limit, amount = self.limit, _amount(self.limit.resource)
        return CapacityExceededError(
            f"no room for this VM: {limit.name}: {amount(self.used)} of {amount(limit.limit)} are taken or "
            f"promised and {amount(self.needed)} more are needed; {limit.advice}",
            resource=limit.resource.name,
            limit=limit.limit,
            used=self.used,
            needed=self.needed,
            advice=limit.advice,
        )


def _amount(resource: Resource) -> Callable[[int], str]:
    """How to write an amount of a resource for people."""
    return (lambda count: f"{count / (1 << 20):.1f} MiB") if resource in _BYTES else str


def need_of(config: RawConfig, driver: VmmDriver, vsock: VsockKind, sinks: int) -> Need:
    """What a VM will need at most, beside what it needs for a moment. Pure.

    Args:
        config: What it runs.
        driver: How.
        vsock: By which kind of vsock.
        sinks: How many places its output is copied to.
    """
    footprint = driver.footprint(config)
    helped = vsock == "hybrid"
    own = {"hybrid": HELPER_DESCRIPTORS, "kernel": 1, "direct": 0}[vsock]
    return (  # in the order of Resource
        VM_DESCRIPTORS + footprint.descriptors + len(config.fds()) + SINK_DESCRIPTORS * sinks + own,
        footprint.threads + (HELPER_THREADS if helped else 0),
        footprint.overhead + min(footprint.guest_memory, BOOT_MEMORY) + (HELPER_MEMORY if helped else 0),
        footprint.guest_memory + footprint.overhead,
        1,
        VM_SPACE,
        VM_INODES,
    )


def shortage(limits: Sequence[Limit], promised: Need, need: Need) -> Shortage | None:
    """The first limit that is in the way of a need; None if there is room. Pure."""
    for limit in limits:
        needed = need[limit.resource]
        used = limit.used + promised[limit.resource]
        if used + needed > limit.limit and (needed or promised[limit.resource]):
            return Shortage(limit, used, needed)
    return None


def room(limits: Sequence[Limit], promised: Need, need: Need) -> tuple[int, Limit | None]:
    """For how many such VMs there is room, and which limit comes first. Pure."""
    found: tuple[int, Limit | None] = (0, None)
    for limit in limits:
        if needed := need[limit.resource]:
            count = max(limit.limit - limit.used - promised[limit.resource], 0) // needed
            if found[1] is None or count < found[0]:
                found = count, limit
    return found


class Admission:
    """What one service has promised to its VMs.

    Args:
        policy: What it may promise.
        read: Reads the host's limits; must not raise.
        clock: Tells when; of the host and not of the event loop, because it is the host that changes.
    """

    def __init__(
        self,
        policy: AdmissionPolicy,
        read: Callable[[], tuple[Limit, ...]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.promised = NOTHING
        self.reading = 0
        self.settling = NOTHING
        self._policy = policy
        self._read = read
        self._clock = clock
        self._limits: tuple[Limit, ...] = ()
        self._read_at = float("-inf")

    def reserve(self, need: Need) -> "Reservation":
        """Promise a VM what it needs.

        Raises:
            CapacityExceededError: There is not so much left; nothing is promised.
        """
        self.check(need)
        self.promised = tuple(map(add, self.promised, need))
        return Reservation(self, need)

    def adopt(self, need: Need) -> "Reservation":
        """Take note of a VM that is there already, whether there is room for it or not."""
        self.promised = tuple(map(add, self.promised, need))
        reservation = Reservation(self, need)
        reservation.taken()
        return reservation

    def check(self, need: Need = NOTHING) -> None:
        """Whether there is room for all that is promised, and for ``need``.

        Raises:
            CapacityExceededError: There is not.
        """
        if not self._policy.checked:
            return
        now = self._clock()
        if now - self._read_at < READING_SECONDS and not shortage(self._limits, self.promised, need):
            return
        self._look()
        self._read_at = now
        if found := shortage(self._limits, self.promised, need):
            raise found.error()

    def room(self, need: Need) -> tuple[int, Limit | None]:
        """For how many such VMs there is room now, and which limit comes first."""
        self._look()
        return room(self._limits, self.promised, need)

    def _look(self) -> None:
        factor = self._policy.memory_overcommit
        self._limits = tuple(
            replace(limit, limit=int(limit.limit * factor))
            if limit.resource is Resource.GUEST_MEMORY
            else limit
            for limit in self._read()
        )
        self.promised = tuple(map(sub, self.promised, self.settling))
        self.settling = NOTHING
        self.reading += 1


class _State(Enum):
    PROMISED = 1
    TAKEN = 2
    RELEASED = 3


class Reservation:
    """What one VM was promised; made by ``Admission.reserve``. Every method is idempotent."""

    def __init__(self, admission: Admission, need: Need) -> None:
        self._admission = admission
        self._need = need
        self._passing = tuple(map(mul, need, _PASSING))
        self._state = _State.PROMISED
        self._taken_at = 0

    def check(self) -> None:
        """Whether there is still what was promised; call it before a start.

        Raises:
            CapacityExceededError: Others took it, or a limit was lowered. The promise stands.
        """
        self._admission.check()

    def taken(self) -> None:
        """The VM runs and has what it needs: the next reading shows it."""
        if self._state is _State.PROMISED:
            admission = self._admission
            admission.settling = tuple(map(add, admission.settling, self._passing))
            self._taken_at = admission.reading
            self._state = _State.TAKEN

    def given_back(self) -> None:
        """The VM's run is over; it may run again."""
        if self._state is _State.TAKEN:
            admission = self._admission
            if self._taken_at == admission.reading:
                admission.settling = tuple(map(sub, admission.settling, self._passing))
            else:
                admission.promised = tuple(map(add, admission.promised, self._passing))
            self._state = _State.PROMISED

    def release(self) -> None:
        """The VM is gone."""
        if self._state is not _State.RELEASED:
            self.given_back()
            self._admission.promised = tuple(map(sub, self._admission.promised, self._need))
            self._state = _State.RELEASED
