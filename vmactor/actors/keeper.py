"""What a service does that keeps VMs: its journal, taking over VMs, accounting for those that were lost.

There is one such service for a state directory at a time; the journal's lock sees to that.
"""

import dataclasses
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

import anyio
from anyio.abc import TaskStatus

from vmactor import leftovers
from vmactor.actors.admission import Admission
from vmactor.actors.boots import BootQueue
from vmactor.actors.event_bus import HISTORY
from vmactor.actors.keeping import Inheritance, inherit
from vmactor.actors.monitor import RunSpec, Sinks
from vmactor.actors.place import Place, Places
from vmactor.bus import Bus
from vmactor.config import RawConfig
from vmactor.drains import Drains
from vmactor.errors import VmactorError
from vmactor.host import HostFacts
from vmactor.journal import FLUSH_SECONDS, Journal
from vmactor.log import get_logger
from vmactor.messages import Event, ManagerRestarted, Reaped
from vmactor.state_dir import StateDirectory
from vmactor.vmm.select import driver_named
from vmactor.waiting import Waiter, waiter_type, wake

AT_ONCE: Final = 128
"""How many kept VMs are judged at the same time; each takes a descriptor for each of its processes."""
CIDS_UNKNOWN: Final = 1024
"""More CIDs than are handed out in the time that the journal may be behind."""

log = get_logger()


class Start(Protocol):
    """Starts the actor of a VM that is taken over; owns ``owned`` from then on."""

    def __call__(
        self, spec: RunSpec, place: Place, owned: ExitStack, inheritance: Inheritance
    ) -> Awaitable[object]:
        """Return when it runs."""
        ...


class Keeper:
    """The keeping part of one service; made by ``open``.

    Args:
        state: The state directory.
        bus: The service's.
        journal: Its journal.
    """

    def __init__(self, state: StateDirectory, bus: Bus[Event], journal: Journal) -> None:
        self._state = state
        self._bus = bus
        self._journal = journal
        self._idle: Waiter | None = None

    @classmethod
    async def open(cls, state: StateDirectory, bus: Bus[Event], entered: AsyncExitStack) -> "Keeper":
        """Take the journal, and let the stream of events go on where the manager before ended.

        Args:
            state: The state directory.
            bus: The service's, new.
            entered: Gets what gives the journal back.

        Raises:
            IllegalStateError: Another service keeps VMs in this directory.
            ResourceExhaustedError: The journal cannot be made or read.
        """
        with anyio.CancelScope(shield=True):  # it must get an owner
            journal = await anyio.to_thread.run_sync(Journal, state.path, HISTORY)
        entered.callback(journal.close, clean=True)
        past = journal.past
        bus.go_on(past.seq, past.events)
        keeper = cls(state, bus, journal)
        if past.seq:
            state.cids.advance(past.last_cid, CIDS_UNKNOWN if past.lost else 0)
        return keeper

    def begin(self) -> None:
        """Mark the break in the stream of events, unless it begins here."""
        past = self._journal.past
        if past.seq:
            told = ManagerRestarted(pid=os.getpid(), clean=past.clean, lost=past.lost, **_now())
            self._bus.publish(told)

    def write(self, event: Event) -> None:
        """Write an event down; see ``Journal.write``."""
        self._journal.write(event)
        if self._idle is not None:
            wake(self._idle)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """The service's child that has the disk keep the journal; does nothing while nothing happens."""
        task_status.started()
        while True:
            if not self._journal.dirty:
                self._idle = waiter_type()()
                try:
                    await self._idle
                finally:
                    self._idle = None
            await anyio.sleep(FLUSH_SECONDS)
            await anyio.to_thread.run_sync(self._journal.flush)

    async def adopt(self, cids: list[int], adopt_one: Callable[[Inheritance], Awaitable[bool]]) -> None:
        """Take over the VMs that were to be kept; those that cannot be are left to the reaper.

        Not to be cancelled, and brief: whatever is taken needs an owner.

        Args:
            cids: VMs that were left behind.
            adopt_one: Takes one over; whether it has the VM, and with it the CID, from then on.
        """
        kept = await anyio.to_thread.run_sync(leftovers.kept, self._state, cids)
        for first in range(0, len(kept), AT_ONCE):
            taken = {cid for cid in kept[first : first + AT_ONCE] if self._state.cids.take(cid)}
            with ExitStack() as stack, anyio.CancelScope(shield=True):
                try:
                    found = await anyio.to_thread.run_sync(leftovers.judge, self._state, sorted(taken))
                    for leftover in found:
                        stack.callback(leftover.close)
                    for leftover in found:
                        inherited = inherit(self._state, leftover)
                        if inherited is not None and await adopt_one(inherited):
                            taken.discard(leftover.cid)
                finally:
                    for cid in taken:
                        self._state.cids.let_go(cid)

    def account_for_lost(self, living: Callable[[int], bool]) -> None:
        """Tell the end of VMs that ended, untold, in the moments around the end of their manager.

        Call it when all others that were left behind have been dealt with.

        Args:
            living: Whether this service has a VM with that CID.
        """
        past = {vm.cid for vm in self._journal.past.open}
        for vm in self._journal.open_vms:
            if vm.cid in past and not living(vm.cid):
                detail = "it ended around the time when its manager did; nothing of it is left"
                self._bus.publish(Reaped(detail=detail, **dataclasses.asdict(vm), **_now()))


@dataclass(frozen=True, slots=True)
class Adoption:
    """Takes VMs over for a service.

    Attributes:
        places: The service's, as what follows.
        admission: See there.
        boots: See there.
        drains: See there.
        facts: What the host has.
        start: Starts a VM's actor.
    """

    places: Places
    admission: Admission
    boots: BootQueue
    drains: Drains
    facts: HostFacts
    start: Start

    async def __call__(self, inherited: Inheritance) -> bool:
        """Take one VM over, whose CID is claimed. It is as it was, and so is the claim, if this says no."""
        vm, cid = inherited.vm, inherited.vm.info.cid
        with ExitStack() as owned:
            owned.callback(inherited.close)
            driver = driver_named(vm.info.driver, self.facts)
            if driver is None:
                log.error("cannot take over a VM that was to be kept", cid=cid, why="no such driver")
                return False
            try:
                place = self.places.take_over(owned, cid, vm.vsock, vm.requester)
            except (VmactorError, OSError) as error:
                log.error("cannot take over a VM that was to be kept", cid=cid, why=str(error))
                return False
            owned.callback(self.places.release, cid)
            reservation = self.admission.adopt(vm.need)
            owned.callback(reservation.release)
            spec = RunSpec(
                vm.info.name,
                cid,
                RawConfig(name=vm.info.name, memory_mib=vm.memory_mib),
                driver,
                place.directory,
                Sinks(to_log=vm.to_log),
                place.vhost_fd,
                place.helper,
                place.spawner,
                boots=self.boots,
                reservation=reservation,
                drains=self.drains,
                keep=True,
            )
            try:
                await self.start(spec, place, owned, inherited)
            except (VmactorError, OSError) as error:  # then it has given back and ended what it had
                log.error("a VM that was to be kept failed as it was taken over", cid=cid, error=str(error))
        return True


def _now() -> dict[str, Any]:
    return {"time": datetime.now(UTC), "monotonic": anyio.current_time()}
