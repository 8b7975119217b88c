"""The bus of VMs' events: what the runtime's bus, which knows nothing of VMs, is told of them."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Final

from vmactor.bus import Bus
from vmactor.messages import Event, Gap, Snapshot, is_end
from vmactor.subscription import Terms

HISTORY: Final = 4096
"""How many events are kept for subscribers that were away."""


def new_bus(
    snapshot: Callable[[int, frozenset[Hashable] | None], Snapshot] | None = None,
    record: Callable[[Event], object] | None = None,
) -> Bus[Event]:
    """Make a bus whose topics are CIDs, and whose terminal events are the ends of VMs.

    Args:
        snapshot: Makes a snapshot of the present; see ``Bus``.
        record: Gets each event before any subscriber has it.
    """
    return Bus(
        stamp=_stamp,
        gap=_gap,
        ends=_stream_ended,
        topic=_cid,
        link=_link,
        snapshot=snapshot,
        history=HISTORY,
        forgotten=_forgotten,
        record=record,
    )


def _stamp(event: Event, seq: int) -> Event:
    return replace(event, seq=seq, previous=seq - 1)  # as it is right in a stream of all events


def _link(event: Event, previous: int) -> Event:
    return event if event.previous == previous else replace(event, previous=previous)


def _cid(event: Event) -> int:
    return event.cid


def _forgotten(seq: int, missed: int) -> Gap:
    return Gap(seq=seq, missed=missed)  # of no VM: nobody knows which they were of


def _gap(last: Event, missed: int) -> Gap:
    return Gap(
        missed=missed,
        seq=last.seq,
        cid=last.cid,
        generation=last.generation,
        name=last.name,
        driver=last.driver,
        uid=last.uid,
        time=last.time,
        monotonic=last.monotonic,
    )


def _stream_ended(event: Event) -> tuple[int, int] | None:
    return (event.cid, event.generation) if is_end(event) else None


TERMS: Final[Terms[Event]] = Terms(_stamp, _gap, _stream_ended, _cid, type, _link, None, None)
"""How a queue in another process, which is filled with a bus's events, deals with them."""
