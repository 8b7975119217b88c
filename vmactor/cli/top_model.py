"""What ``vmactor top`` shows, without the terminal: fed with events, read as rows."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from vmactor.cli.list_vms import age, mebibytes
from vmactor.cli.output import describe, shown
from vmactor.client.present import after, newborn
from vmactor.messages import Created, Event, Gap, Snapshot, UsageSampled, VmInfo, is_end

COLUMNS: Final = (
    "CID",
    "NAME",
    "STATE",
    "UPTIME",
    "CPU",
    "GUEST MEM",
    "VMM MEM",
    "BALLOON",
    "EVENTS/S",
    "LAST EVENT",
)
PERIOD: Final = 10.0
"""Seconds over which events are counted."""
KEPT_EVENTS: Final = 1000
"""Of each VM, for who follows its events; also the most that are counted in a period."""


@dataclass(slots=True)
class Row:
    """One VM.

    Attributes:
        info: What is known of it.
        events: Its last events.
        usage: The last sample of what it uses.
        cpu: Processors that it used between the last two samples; None before there were two.
    """

    info: VmInfo
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    usage: UsageSampled | None = None
    cpu: float | None = None

    def feed(self, event: Event) -> None:
        """Take one of its events in."""
        if isinstance(event, UsageSampled):
            before, self.usage = self.usage, event
            if before is None or before.generation != event.generation:
                self.cpu = None
            elif (seconds := event.monotonic - before.monotonic) > 0:
                self.cpu = max(0, event.cpu_time_ms - before.cpu_time_ms) / 1000 / seconds
            return
        self.info = after(self.info, event)
        self.events.append(event)
        if self.info.pid is None:
            self.usage = self.cpu = None

    def rate(self, now: float) -> float:
        """Events per second over the last ``PERIOD``, on the service's clock."""
        return sum(now - event.monotonic <= PERIOD for event in self.events) / PERIOD


class Model:
    """All VMs, by CID; a VM that is gone stays for as long as it is among the last ``KEPT_DEAD``.

    Attributes:
        rows: The VMs.
        missed: Events that were missed, by the gaps that told so.
    """

    KEPT_DEAD: Final = 20

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.missed = 0
        self._clock = 0.0
        self._dead: deque[int] = deque()

    def feed(self, event: Event) -> None:
        """Take an event in."""
        self._clock = max(self._clock, event.monotonic)
        match event:
            case Snapshot():
                self.rows = {info.cid: Row(info) for info in event.vms}
                self._dead.clear()
                return
            case Gap():
                self.missed += event.missed
            case Created():
                if event.cid in self._dead:
                    self._dead.remove(event.cid)
                self.rows[event.cid] = Row(newborn(event))
        if (row := self.rows.get(event.cid)) is None:
            return
        row.feed(event)
        if is_end(event) and event.cid not in self._dead:
            self._dead.append(event.cid)
            if len(self._dead) > self.KEPT_DEAD:
                del self.rows[self._dead.popleft()]

    def cells(self, now: datetime) -> dict[int, Sequence[str]]:
        """The rows as text that is safe to show, by CID."""
        return {cid: self._cells(self.rows[cid], now) for cid in sorted(self.rows)}

    def _cells(self, row: Row, now: datetime) -> Sequence[str]:
        info, usage = row.info, row.usage
        last = row.events[-1] if row.events else None
        return (
            str(info.cid),
            shown(info.name, limit=64),
            "suspended" if info.suspended else "queued" if info.queued else info.state.name,
            age(info.started, now) if info.pid is not None else "-",
            "-" if row.cpu is None else f"{row.cpu * 100:.0f}%",
            *(("-",) * 3 if usage is None else _memory(usage)),
            f"{row.rate(self._clock):.1f}",
            "-" if last is None else f"{last.kind}: {describe(last)[0]}",
        )


def _memory(usage: UsageSampled) -> Sequence[str]:
    return [mebibytes(kib) for kib in (usage.rss_vm_kib, usage.rss_vmm_kib, usage.balloon_kib)]
