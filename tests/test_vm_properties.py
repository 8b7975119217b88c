"""Whole VMs under any order of guest calls, client calls, subscribers and deaths keep the rules.

An example is a program: a list of steps, carried out one after the other on a virtual clock, against a real
service with scripted VMMs. What clients ask runs beside the steps that follow. Time comes from the program,
and chance plays no part (restarts have no jitter; trio schedules as hypothesis tells it), so a program always
does the same.

A failing run prints the program, made as short as possible, and a line ``@reproduce_failure(version, blob)``:
put that above the test, and it runs that program and no other.
"""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.host_facts import FULL
from tests.residue import descriptors
from tests.scripted_vmm import ScriptedDriver, ScriptedHelper
from vmactor import Backoff, Restart, RestartLimit, RestartPolicy
from vmactor.actors import monitor
from vmactor.actors.handle import VirtualMachine
from vmactor.actors.service import VirtualizationService
from vmactor.actors.vocabulary import GuestReported
from vmactor.bus import Overflow, Subscription
from vmactor.config import RawConfig
from vmactor.errors import SlowSubscriberError, VmactorError
from vmactor.messages import (
    DeathReason,
    Died,
    ErrorCode,
    Event,
    Gap,
    GuestReport,
    MemoryTrimLevel,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
    PayloadError,
    PayloadFinished,
    PayloadReady,
    PayloadStarted,
    Removed,
    Snapshot,
    Started,
    is_end,
)
from vmactor.process import ExitStatus
from vmactor.vmm.driver import VmmExit
from vmactor.vmm.select import Selection

VMS = 2
SLACK = 0.001
BACKOFF = Backoff(initial=1.0, jitter=0.0, stable=30.0)
POLICIES = [
    None,
    RestartPolicy(limit=RestartLimit(2, 20.0), backoff=BACKOFF),
    RestartPolicy(when=Restart.PERMANENT, limit=RestartLimit(1, 5.0), backoff=BACKOFF),
]
EXITS = [
    VmmExit(ExitStatus(0, None), DeathReason.SHUTDOWN),
    VmmExit(ExitStatus(1, None), DeathReason.CRASH),
    VmmExit(ExitStatus(None, 9), DeathReason.KILLED),
]
REPORTS: list[GuestReport] = [
    NotifyPayloadStarted(),
    NotifyPayloadReady(),
    NotifyPayloadFinished(0),
    NotifyPayloadFinished(1),
    NotifyError(ErrorCode.PAYLOAD_CHANGED, "changed"),
]
RANKS: dict[type[Event], int] = {PayloadStarted: 1, PayloadReady: 2, PayloadFinished: 3, PayloadError: 3}


@dataclass
class Reader:
    """A subscriber, what it read, and what it should have."""

    events: Subscription[Event]
    kinds: frozenset[Any] | None
    cid: int | None
    since: int
    seen: list[Event] = field(default_factory=list)
    ended: bool = False

    def read(self, most: int) -> None:
        """Read what is there."""
        try:
            for _ in range(most):
                if (event := self.events.next_nowait()) is None:
                    return
                self.seen.append(event)
        except (SlowSubscriberError, ZeroDivisionError, StopAsyncIteration):
            self.ended = True

    def check(self, everything: list[Event]) -> None:
        """Nothing is missing that was not announced."""
        self.read(10_000)
        for before, event in pairwise(self.seen):
            assert event.previous == before.seq, "a hole that nobody told of"
        told = [event for event in self.seen if not isinstance(event, Gap | Snapshot)]
        missed = sum(event.missed for event in self.seen if isinstance(event, Gap))
        wanted = [
            event
            for event in everything
            if event.seq > self.since
            and (self.cid is None or event.cid == self.cid)
            and (self.kinds is None or type(event) in self.kinds)
        ]
        if not self.ended:
            assert len(told) + missed == len(wanted)
        assert all(event in wanted for event in told)


class World:
    """A service, its VMs and everybody who has to do with them."""

    def __init__(self, service: VirtualizationService, config: RawConfig, tasks: TaskGroup) -> None:
        self.service = service
        self.tasks = tasks
        self.readers: list[Reader] = []
        self.vms: list[VirtualMachine] = []
        self.drivers: dict[int, list[Any]] = defaultdict(list)
        self.config = config
        self.asked = self.answered = 0

    def ask(self, call: Callable[[], Coroutine[Any, Any, object]], seconds: float) -> None:
        """Have a client ask something; it has to be answered, or fail in a typed way, by its deadline."""
        self.asked += 1
        began = anyio.current_time()

        async def client() -> None:
            with suppress(VmactorError):
                await call()
            assert anyio.current_time() - began <= seconds + SLACK, "an ask outlived its deadline"
            self.answered += 1

        self.tasks.start_soon(client)

    def subscribe(self, how: tuple[Overflow, int, str, int | None]) -> None:
        """A new subscriber, of some behaviour."""
        overflow, capacity, wants, which = how
        kinds: frozenset[Any] | None = frozenset({Started, Died, Removed}) if wants == "kinds" else None
        cid = None if which is None else self.vms[which].cid
        since = self.service.bus.seq
        events = self.service.subscribe(
            (lambda event: event.seq % 3 != 0 or 1 / 0 > 0) if wants == "raises" else None,
            kinds=kinds,
            cids=None if cid is None else [cid],
            capacity=capacity,
            overflow=overflow,
            patience=2.0,
            snapshot=wants == "snapshot",
            after=0 if wants == "replay" else None,
        )
        reader = Reader(events, kinds, cid, 0 if wants == "replay" else since)
        self.readers.append(reader)
        if wants == "cancelled":
            reader.ended = True
            self.tasks.start_soon(self._read_and_be_cancelled, events)

    async def _read_and_be_cancelled(self, events: Subscription[Event]) -> None:
        with anyio.move_on_after(3.0), events:
            async for _ in events:
                pass


VM = st.sampled_from([0, 0, 0, 1])  # much happens to one of them
REPORT = st.tuples(st.just("report"), VM, st.sampled_from(REPORTS), st.sampled_from([0, 0, 0, -1]))
STEPS: st.SearchStrategy[tuple[Any, ...]] = st.one_of(
    REPORT,
    REPORT,
    REPORT,
    st.tuples(st.sampled_from(["start", "stop", "suspend", "resume", "trim", "message"]), VM),
    st.tuples(st.just("give up"), VM),
    st.tuples(st.just("runs"), VM),
    st.tuples(st.just("ends"), VM, st.sampled_from(EXITS)),
    st.tuples(st.just("helper dies"), VM),
    st.tuples(st.just("answers"), VM, st.booleans()),
    st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.0, 0.5, 3.0, 40.0])),
    st.tuples(
        st.just("subscribe"),
        st.sampled_from(list(Overflow)),
        st.sampled_from([1, 3, 100]),
        st.sampled_from(["all", "kinds", "raises", "snapshot", "replay", "cancelled"]),
        st.none() | VM,
    ),
    st.tuples(st.just("read"), st.integers(0, 3), st.integers(1, 5)),
)
GOOD_START = [("start", 0), ("sleep", 0.0), ("runs", 0), ("sleep", 0.0)]


async def step(world: World, drivers: list[ScriptedDriver], what: tuple[Any, ...]) -> None:
    """Carry out one step of a program."""
    name, args = what[0], what[1:]
    if name == "sleep":
        await anyio.sleep(args[0])
        await settle()
        return
    if name == "subscribe":
        world.subscribe(args)
        return
    if name == "read":
        if args[0] < len(world.readers):
            world.readers[args[0]].read(args[1])
        return
    vm = world.vms[args[0]]
    vmms = [vmm for vmm in drivers[0].vmms if vmm.launch.cid == vm.cid]
    match name:
        case "start":
            world.ask(lambda: vm.start(timeout=20.0), 20.0)
        case "stop":
            world.ask(lambda: vm.stop(timeout=20.0), 20.0)
        case "suspend":
            world.ask(lambda: vm.suspend(timeout=4.0), 4.0)
        case "resume":
            world.ask(lambda: vm.resume(timeout=4.0), 4.0)
        case "trim":
            level = MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW
            world.ask(lambda: vm.on_trim_memory(level, timeout=4.0), 4.0)
        case "message":
            waiting = sum(reader.events.choice.overflow is Overflow.WAIT for reader in world.readers)
            world.ask(lambda: vm.publish_message("guest_to_host", 5000, "hello"), 2.0 * waiting)
        case "give up":
            world.ask(vm.aclose, 30.0)
        case "report":
            report = GuestReported(vm.info.generation + args[2], args[1])
            world.ask(lambda: vm._actor.mailbox.ask(report, timeout=5.0), 5.0)
        case "runs" if vmms:
            vmms[-1].running.set()
        case "ends" if vmms:
            vmms[-1].end(args[1])
        case "answers" if vmms:
            if args[1]:
                vmms[-1].answers.set()
            else:
                vmms[-1].answers = anyio.Event()
        case "helper dies":
            run = vm._actor.run_under_way
            helper: Any = None if run is None else run._helper
            if helper is not None:
                helper.kill()
    await settle()


async def settle() -> None:
    """Let everybody do what can be done now."""
    for _ in range(30):
        await anyio.lowlevel.checkpoint()


def check_events(everything: list[Event]) -> None:
    """The rules of a VM's events."""
    assert [event.seq for event in everything] == list(range(1, len(everything) + 1))
    by_vm: dict[int, list[Event]] = defaultdict(list)
    for event in everything:
        by_vm[event.cid].append(event)
    for events in by_vm.values():
        assert [is_end(event) for event in events].index(True) == len(events) - 1, "the end is once and last"
        numbers = [event.generation for event in events]
        assert numbers == sorted(numbers)
        for number in set(numbers) - {0}:
            run = [event for event in events if event.generation == number]
            deaths = [isinstance(event, Died) for event in run]
            assert deaths.index(True) == len(run) - 1, "died is once per generation, and last"
            ranks = [RANKS[type(event)] for event in run if type(event) in RANKS]
            assert ranks == sorted(set(ranks)), "a payload's state only moves forward"


async def carry_out(
    directory: Path, program: list[tuple[Any, ...]], policy: RestartPolicy | None, hangup: bool
) -> None:
    """Run one program and look at what came of it."""
    driver = ScriptedDriver()
    selection = Selection(driver, "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=directory / "state", facts=FULL)
    everything: list[Event] = []
    with (directory / "kernel").open("rb") as kernel:
        config = RawConfig(name="test", kernel=kernel, platform_version="~1.0")
        async with service, anyio.create_task_group() as tasks:
            record = service.subscribe(capacity=100_000)
            world = World(service, config, tasks)
            for number in range(VMS):
                made = await service.create_vm(
                    replace(config, name=f"vm-{number}"), hangup_detection=hangup, restart=policy
                )
                world.vms.append(made)
            for what in [*GOOD_START, *program]:
                await step(world, [driver], what)
            for vmm in driver.vmms:
                vmm.answers.set()
            for vm in world.vms:
                await vm.aclose()
        while (event := record.next_nowait()) is not None:
            everything.append(event)
        check_events(everything)
        for reader in world.readers:
            reader.check(everything)
        assert world.answered == world.asked, "an ask was never answered"
    assert all(vmm.closed for vmm in driver.vmms)
    assert [path.name for path in (directory / "state" / "vm").iterdir()] == []
    assert [path.name for path in (directory / "state" / "managers").iterdir()] == []


@pytest.fixture(autouse=True)
def _helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)


def on(loop: str) -> dict[str, Any]:
    """An event loop with a clock that jumps."""
    if loop == "asyncio":
        from tests.virtual_time import VirtualTimeLoop

        return {"backend": "asyncio", "backend_options": {"loop_factory": VirtualTimeLoop}}
    from trio.testing import MockClock

    return {"backend": "trio", "backend_options": {"clock": MockClock(autojump_threshold=0)}}


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@settings(max_examples=150, deadline=None, print_blob=True)
@given(st.lists(STEPS, max_size=40), st.sampled_from(POLICIES), st.booleans())
def test_no_order_of_calls_and_deaths_breaks_the_rules(
    loop: str, program: list[tuple[Any, ...]], policy: RestartPolicy | None, hangup: bool
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="vma", dir="/tmp"))
    try:
        (directory / "kernel").write_bytes(b"kernel")
        before = descriptors()
        anyio.run(carry_out, directory, program, policy, hangup, **on(loop))
        assert descriptors() == before, "descriptors are left"
    finally:
        shutil.rmtree(directory)
