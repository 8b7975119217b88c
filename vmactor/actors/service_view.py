"""The looking half of a service: everything that reads what VMs' actors have published.

Nothing here changes a VM, asks an actor or waits for anything, so it costs the same whatever VMMs do.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import anyio

from vmactor.actors.boots import BootQueue
from vmactor.actors.event_bus import new_bus
from vmactor.actors.usage_sampler import UsageSampler
from vmactor.actors.vm import VmActor
from vmactor.bus import PATIENCE_SECONDS, BusStatistics, Overflow, Subscription
from vmactor.log import get_logger
from vmactor.messages import Event, Requester, Snapshot, UsageSampled, VirtualMachineDebugInfo, VmInfo
from vmactor.security.permissions import Method
from vmactor.security.policy import Policy
from vmactor.supervision_tree import SupervisorInfo
from vmactor.supervisor import ChildExit, Decision, Strategy, Supervisor

logger = get_logger()


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    """How a service does.

    Attributes:
        bus: Its bus.
        messages: Messages that wait in all VMs' mailboxes together.
        deepest_mailbox: In the fullest of them.
        vmm_timeouts: Requests that VMMs did not answer in time.
        waiting_starts: Starts that wait until fewer VMs boot.
    """

    bus: BusStatistics
    messages: int
    deepest_mailbox: int
    vmm_timeouts: int
    waiting_starts: int


class ServiceView:
    """What can be seen of a service; ``VirtualizationService`` is the rest of it.

    Args:
        policy: Who may see what.
        record: Gets each event before any subscriber has it.

    Attributes:
        bus: What happens to VMs.
    """

    def __init__(self, policy: Policy, record: Callable[[Event], object]) -> None:
        self.bus = new_bus(self._snapshot, record)
        self._policy = policy
        self._actors: dict[int, VmActor] = {}
        self._supervisor = Supervisor("service", self._vm_ended, strategy=Strategy.SIMPLE_ONE_FOR_ONE)
        self._sampler = UsageSampler(
            lambda: self.bus.asked_for(UsageSampled),
            lambda: [actor.sample for _, actor in sorted(self._actors.items())],
        )
        self._boots: BootQueue
        self._vmm_timeouts = 0  # of VMs that are gone

    def subscribe(
        self,
        wants: Callable[[Event], bool] | None = None,
        *,
        cids: Iterable[int] | None = None,
        kinds: Iterable[Hashable] | None = None,
        capacity: int = 1024,
        overflow: Overflow = Overflow.DROP_OLDEST,
        patience: float = PATIENCE_SECONDS,
        late: bool = False,
        snapshot: bool = False,
        after: int | None = None,
        until_end: bool = False,
    ) -> Subscription[Event]:
        """Receive what happens to VMs; use it in a ``with`` block.

        The stream begins with what comes from now on, or with one of ``late``, ``snapshot`` and ``after``.

        Args:
            wants: Called for every event that passes the other filters; must be quick and publish nothing.
            cids: Only events of these VMs.
            kinds: Only events of these classes; a ``Gap`` or ``Snapshot`` comes in any case. While
                ``UsageSampled`` is among somebody's, all VMs that run are measured, every second or as often
                as 1 % of a processor allows; nobody else gets it.
            capacity: Events that may wait.
            overflow: What happens when they are more. Only ``VirtualMachine.publish_message`` waits for a
                subscriber that asks for it; a VM's own life waits for nobody.
            patience: Seconds for which that waits.
            late: Begin with how the last VMs ended.
            snapshot: Begin with a ``Snapshot`` of the VMs that live.
            after: Begin with what came after the event of this number, as far as the last 4,096 events tell.
            until_end: End after the first event that ends a VM.

        Raises:
            ValueError: The capacity is below 1, or the stream is to begin in several ways.
            IllegalArgumentError: There was no event of the number ``after`` yet.
        """
        wanted = None if kinds is None else frozenset(kinds)
        if wanted is not None and UsageSampled in wanted:
            self._sampler.wake()
        return self.bus.subscribe(
            wants,
            topics=cids,
            kinds=wanted,
            capacity=capacity,
            overflow=overflow,
            patience=patience,
            late=late,
            snapshot=snapshot,
            after=after,
            until_end=until_end,
        )

    def _snapshot(self, seq: int, cids: frozenset[Hashable] | None) -> Snapshot:
        return Snapshot(
            seq=seq,
            time=datetime.now(UTC),
            monotonic=anyio.current_time(),
            vms=tuple(info for info in self.list_vms() if cids is None or info.cid in cids),
        )

    def list_vms(self) -> list[VmInfo]:
        """The VMs of this service that live, by CID; reads what their actors published and nothing else."""
        return [self._actors[cid].info for cid in sorted(self._actors)]

    def tree(self) -> SupervisorInfo:
        """Everything that lives under this service, and how it is; waits for nothing.

        The same is told to other processes of this user; ``vmactor info --tree`` draws it.
        """
        return self._supervisor.tree()

    def statistics(self) -> ServiceStatistics:
        """How the service does, for metrics; asks nobody and waits for nothing."""
        actors = self._actors.values()
        depths = [len(actor.mailbox) for actor in actors]
        return ServiceStatistics(
            bus=self.bus.statistics(),
            messages=sum(depths),
            deepest_mailbox=max(depths, default=0),
            vmm_timeouts=self._vmm_timeouts + sum(actor.vmm_timeouts for actor in actors),
            waiting_starts=self._boots.waiting,
        )

    def debug_list_vms(self, *, requester: Requester | None = None) -> list[VirtualMachineDebugInfo]:
        """The reference's debug records of the same VMs; SecurityError if the requester may not see them."""
        self._policy.permissions.check(requester, Method.DEBUG_LIST_VMS)
        return [
            VirtualMachineDebugInfo(info.cid, info.directory, info.requester_uid, info.requester_pid)
            for info in self.list_vms()
        ]

    def dump(self, *, requester: Requester | None = None) -> str:
        """The reference's textual dump of the same VMs (its section "dump and debugListVms").

        Raises:
            SecurityError: The requester lacks a permission.
        """
        self._policy.permissions.check(requester, Method.DUMP)
        infos = self.list_vms()
        lines = [f"Running {len(infos)} VMs:"]
        for info in infos:
            lines += [
                f"VM CID: {info.cid}",
                f"\tState: {self._actors[info.cid]!r}",
                f"\tPayload state {info.payload.name.capitalize()}",
                f"\tProtected: {str(info.protected).lower()}",
                f"\ttemporary_directory: {info.directory}",
                f"\trequester_uid: {info.requester_uid}",
                f"\trequester_debug_pid: {info.requester_pid}",
            ]
        return "\n".join(lines) + "\n"

    def _vm_ended(self, child: ChildExit) -> Decision:
        if child.error is not None:
            logger.error(
                "a child of the service failed; if it was a VM, that was ended",
                child=child.name,
                exc_info=child.error,
            )
        return Decision.IGNORE
