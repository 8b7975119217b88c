"""What is known of VMs from their events alone.

A client reads ``vm.state`` and ``service.list_vms()`` without asking anybody, as in the service's own
process. It holds what the service told when they met, and applies each event to it in the order in which the
service published them. ``after`` is a pure function from one moment to the next; its rules are those of
``actors.lifecycle``: the public state follows from the payload's state while a VM lives.
"""

from dataclasses import replace
from datetime import timedelta

from vmactor.messages import (
    Created,
    Died,
    Event,
    HungUp,
    PayloadError,
    PayloadFinished,
    PayloadReady,
    PayloadStarted,
    PayloadState,
    Restarting,
    Resumed,
    Snapshot,
    Started,
    Suspended,
    VirtualMachineState,
    VmInfo,
    is_end,
)
from vmactor.waiting import Moment


class Known:
    """What is known of a VM; its handles and the list of VMs share it.

    Attributes:
        info: The VM at its last event that came.
        since: No event of the VM has a number below this; those that have are of an earlier one of its CID.
        end: Its last event, if that has come.
        over: Set when no more events will come: at its end, or because the connection is gone.
    """

    __slots__ = ("end", "info", "over", "since")

    def __init__(self, info: VmInfo, since: int) -> None:
        self.info = info
        self.since = since
        self.end: Event | None = None
        self.over = Moment()


class Present:
    """The VMs as their events tell of them, up to a number.

    Attributes:
        vms: By CID, those that live.
        seq: The number of the last event that was applied.
    """

    def __init__(self) -> None:
        self.vms: dict[int, Known] = {}
        self.seq = 0

    def feed(self, event: Event) -> None:
        """Apply an event; a snapshot replaces what was known."""
        self.seq = max(self.seq, event.seq)
        if isinstance(event, Snapshot):
            before, self.vms = self.vms, {}
            for info in event.vms:
                kept = before.pop(info.cid, None) or Known(info, event.seq)
                kept.info = info
                self.vms[info.cid] = kept
            for lost in before.values():
                lost.over.set()  # its end was missed
        elif isinstance(event, Created):
            self.vms[event.cid] = Known(newborn(event), event.seq)
        elif (known := self.vms.get(event.cid)) is not None:
            known.info = after(known.info, event)
            if is_end(event):
                del self.vms[event.cid]
                known.end = event
                known.over.set()

    def know(self, info: VmInfo) -> Known:
        """What is known of a VM that the service told of just now, which is as of its last event or later."""
        known = self.vms.get(info.cid)
        if known is None:
            known = self.vms[info.cid] = Known(info, self.seq + 1)
        known.info = info
        return known

    def close(self) -> None:
        """No more events come."""
        for known in self.vms.values():
            known.over.set()


def newborn(event: Created) -> VmInfo:
    """A VM of which no more is known than that it was created."""
    return VmInfo(
        cid=event.cid,
        name=event.name,
        generation=0,
        state=VirtualMachineState.NOT_STARTED,
        payload=PayloadState.STARTING,
        driver=event.driver,
        suspended=False,
        pid=None,
        protected=event.protected,
        directory="",
        requester_uid=event.uid,
        requester_pid=0,
        created=event.time,
    )


def after(info: VmInfo, event: Event) -> VmInfo:  # noqa: PLR0911 - a table
    """A VM as it is after one of its events.

    Args:
        info: As it was. If it is from a later generation already, the event is old and changes nothing.
        event: What happened to it.
    """
    if event.generation < info.generation:
        return info
    match event:
        case Started():
            return replace(
                info,
                generation=event.generation,
                state=max(info.state, VirtualMachineState.STARTING),
                pid=event.pid,
                started=info.started or event.time,
                queued=False,
                restart_due=None,
            )
        case PayloadStarted():
            return _moved(info, PayloadState.STARTED)
        case PayloadReady():
            return _moved(info, PayloadState.READY)
        case PayloadFinished() | PayloadError():
            return _moved(info, PayloadState.FINISHED)
        case HungUp():
            return replace(info, payload=PayloadState.HANGUP, state=VirtualMachineState.DEAD)
        case Suspended():
            return replace(info, suspended=True)
        case Resumed():
            return replace(info, suspended=False)
        case Died():
            return replace(
                info,
                generation=event.generation,
                state=VirtualMachineState.DEAD,
                pid=None,
                suspended=False,
                queued=False,
                died=event,
            )
        case Restarting():
            return replace(
                info,
                generation=event.generation,
                state=VirtualMachineState.STARTING,
                payload=PayloadState.STARTING,
                restarts=event.restarts,
                restart_due=event.time + timedelta(seconds=event.delay),
            )
    return info


def _moved(info: VmInfo, payload: PayloadState) -> VmInfo:
    """Its payload has come further; it never goes back, and a dead VM stays dead."""
    if payload <= info.payload or info.state is VirtualMachineState.DEAD:
        return info
    return replace(info, payload=payload, state=_STATES[payload])


_STATES = {
    PayloadState.STARTED: VirtualMachineState.STARTED,
    PayloadState.READY: VirtualMachineState.READY,
    PayloadState.FINISHED: VirtualMachineState.FINISHED,
}
