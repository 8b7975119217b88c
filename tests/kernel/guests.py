"""What the lab's tests of guests share."""

from tests.guests import agent
from vmactor import DeathReason, Died, Event, VirtualMachine

ENDINGS = [
    (
        "started;error 2 it has changed;failure MICRODROID_PAYLOAD_HAS_CHANGED;poweroff",
        ["payload_started", "error"],
        DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED,
    ),
    ("started;ready;panic", ["payload_started", "payload_ready"], DeathReason.CRASH),
    ("started;reboot", ["payload_started"], DeathReason.REBOOT),
]
"""What a guest does, what is told of it besides its start and its end, and why it ended."""


def ended(events: list[Event]) -> Died:
    """The last event, which must be the only death."""
    deaths = [event for event in events if isinstance(event, Died)]
    assert deaths == events[-1:]
    return deaths[0]


async def memory(vm: VirtualMachine) -> tuple[int, int]:
    """The guest's MemTotal and MemFree, in KiB."""
    answer = await agent(vm, "read /proc/meminfo")
    lines = dict(part.split(":") for part in answer.removeprefix("ok ").split("|") if ":" in part)
    return int(lines["MemTotal"].split()[0]), int(lines["MemFree"].split()[0])
