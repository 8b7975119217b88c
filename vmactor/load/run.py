"""A scenario's run on one service: leads every VM through its life and keeps what it sees.

What is due at a time counts from that time, however late this program comes to do it: a manager that is
slow cannot make fewer or shorter latencies by keeping its load waiting (coordinated omission). With a closed
loop nothing is due before a client is free; that is what a closed loop is.
"""

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import anyio

from vmactor import (
    DeathReason,
    Died,
    Event,
    Gap,
    PayloadError,
    PayloadFinished,
    PayloadReady,
    RawConfig,
    Subscription,
    VirtualizationService,
    VirtualMachine,
    VmactorError,
)
from vmactor.load.latencies import Latencies
from vmactor.load.measure import Measure, memory_of_this_process
from vmactor.load.scenario import Arrivals, Fate, Life, Lifetimes, Scenario, plan

GUEST_PORT: Final = 5000
"""Where the test guest and the simulated VMM take steps."""
KINDS: Final = ("create", "start_to_ready", "stop", "report_to_subscriber", "lateness")
STATES: Final = ("creating", "starting", "ready", "ending", "ended", "failed")
CAPACITY: Final = 1 << 16
"""Events that may wait for us; what does not fit is counted as lost."""
KEPT_FAILURES: Final = 20
SETTLE_SECONDS: Final = 1.0
"""Of a hold, before "idle" begins: the last VMs have just come up."""
ENDS: Final = {
    Fate.WELL: DeathReason.KILLED,
    Fate.CRASH: DeathReason.CRASH,
    Fate.HANG: DeathReason.HANGUP,
    Fate.ERROR: DeathReason.SHUTDOWN,
    Fate.KILLED: DeathReason.KILLED,
}
"""How a life of each fate has to end."""


class _FailedError(Exception):
    """A life did not go as planned."""


class _Watch:
    """What the subscriber has seen of one VM, and when."""

    __slots__ = ("_news", "died", "error", "finished_at", "ready_at")

    def __init__(self) -> None:
        self.ready_at: float | None = None
        self.finished_at: float | None = None
        self.error = False
        self.died: Died | None = None
        self._news: anyio.Event | None = None

    def see(self, event: Event, now: float) -> None:
        match event:
            case PayloadReady():
                self.ready_at = now
            case PayloadFinished():
                self.finished_at = now
            case PayloadError():
                self.error = True
            case Died():
                self.died = event
            case _:
                return
        if self._news is not None:
            self._news.set()

    async def news(self) -> None:
        """Wait for more."""
        self._news = anyio.Event()
        await self._news.wait()
        self._news = None


class _Up:
    """A VM that is ready."""

    __slots__ = ("life", "vm", "watch")

    def __init__(self, life: Life, vm: VirtualMachine, watch: _Watch) -> None:
        self.life, self.vm, self.watch = life, vm, watch


class Run:
    """One run; ``run`` does it, everything else may be read meanwhile.

    Args:
        scenario: What to do.
        service: Open, and without VMs.
        template: What all VMs have in common; their scripts are added to its kernel parameters.

    Attributes:
        states: How many lives are in each of ``STATES`` now.
        peak_ready: The most that were ready at the same time.
        latencies: By ``KINDS``.
        events_lost: As the subscriber was told.
        reasons: Deaths by reason.
        fates: Lives that went as planned, by fate.
        failures: The first lives that did not, for people.
        measure: What this process and the VMMs used.
    """

    def __init__(self, scenario: Scenario, service: VirtualizationService, template: RawConfig) -> None:
        self.scenario = scenario
        self.states = dict.fromkeys(STATES, 0)
        self.peak_ready = 0
        self.latencies = {kind: Latencies() for kind in KINDS}
        self.events_lost = 0
        self.events_published = 0
        self.reasons: Counter[str] = Counter()
        self.fates: Counter[str] = Counter()
        self.failures: list[str] = []
        self.seconds = 0.0
        self.phase = "arriving"
        self.idle_cpu: float | None = None
        self.bytes_per_vm: float | None = None
        self.measure = Measure(service, self.states)
        self._service = service
        self._template = template
        self._watches: dict[int, _Watch] = {}
        self._up: deque[_Up] = deque()
        self._baseline = 0
        self._first_seq = 0
        self._began = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the first VM was due."""
        return self.seconds or (time.monotonic() - self._began if self._began else 0.0)

    async def run(self) -> None:
        """Lead all lives to their ends.

        Lives that fail are counted and do not end the run. Cancelled, it leaves its VMs to the service.
        """
        async with anyio.create_task_group() as helpers:
            with self._service.bus.subscribe(capacity=CAPACITY) as events:
                helpers.start_soon(self._collect, events)
                await self._warm_up()
                self._first_seq = self._service.bus.seq
                self._baseline = await anyio.to_thread.run_sync(memory_of_this_process)
                self._began = time.monotonic()
                helpers.start_soon(self.measure.run)
                await self._arrive(plan(self.scenario))
                if self.scenario.lifetime is Lifetimes.HOLD:
                    await self._hold()
                self.phase = "ending"
                await self._end_held()
                self.seconds = time.monotonic() - self._began
                self.events_published = self._service.bus.seq - self._first_seq
                self.phase = "done"
                await self.measure.take()
                helpers.cancel_scope.cancel()

    # -- Phases ------------------------------------------------------------------------------------

    async def _warm_up(self) -> None:
        """What the first VM alone loads is no other's memory or time. Real guests take too long for that."""
        if self.scenario.vmm == "simulated":
            other = Run(self.scenario, self._service, self._template)
            other._watches = self._watches
            life = Life(0, None, 0.0, Fate.WELL)
            await other._lead(life, time.monotonic())
            if other.failures:  # the same error for each VM is no result
                raise VmactorError(f"not even one VM of this load lives: {other.failures[0]}")

    async def _arrive(self, lives: Iterator[Life]) -> None:
        async with anyio.create_task_group() as tasks:
            if self.scenario.arrivals is Arrivals.CLOSED:
                for number in range(min(self.scenario.clients, self.scenario.vms)):
                    tasks.start_soon(self._client, number, lives)
                return
            for life in lives:
                due = self._began + (life.arrival or 0.0)
                await anyio.sleep(max(due - time.monotonic(), 0))
                tasks.start_soon(self._lead, life, due)

    async def _client(self, number: int, lives: Iterator[Life]) -> None:
        await anyio.sleep(self.scenario.ramp * number / self.scenario.clients)
        for life in lives:
            await self._lead(life, time.monotonic())

    async def _hold(self) -> None:
        self.phase = "holding"
        hold = self.scenario.hold
        settle = min(SETTLE_SECONDS, hold / 2)
        await anyio.sleep(settle)
        memory = await anyio.to_thread.run_sync(memory_of_this_process)
        if self._up:
            self.bytes_per_vm = (memory - self._baseline) / len(self._up)
        used, own, began = time.process_time(), self.measure.own_seconds, time.monotonic()
        self.measure.quiet = True
        await anyio.sleep(hold - settle)
        self.measure.quiet = False
        if (seconds := time.monotonic() - began) > 0:
            used = time.process_time() - used - (self.measure.own_seconds - own)
            self.idle_cpu = max(used, 0) / seconds

    async def _end_held(self) -> None:
        """With a closed loop so many at a time as there are clients, else all at once."""
        closed = self.scenario.arrivals is Arrivals.CLOSED
        due = time.monotonic()

        async def client() -> None:
            while self._up:
                up = self._up.popleft()
                await self._follow(up, time.monotonic() if closed else due)

        async with anyio.create_task_group() as tasks:
            for _ in range(self.scenario.clients if closed else len(self._up)):
                tasks.start_soon(client)

    # -- One life ----------------------------------------------------------------------------------

    async def _lead(self, life: Life, due: float) -> None:
        """Bring a VM up; lead it to its end, too, unless it is to stay until the hold is over."""
        self._move(None, "creating")
        state, vm = "creating", None
        try:
            vm = await self._create(life, due)
            self._move("creating", "starting")
            state = "starting"
            watch = self._watches[vm.cid] = _Watch()
            await self._start(life, vm, watch)
        except (VmactorError, _FailedError, OSError) as error:
            self._fail(life, state, error)
            if vm is not None:
                await self._give_up(vm)
            return
        if watch.ready_at is None:  # a fate without that
            self._move("starting", "ending")
            await self._end(_Up(life, vm, watch), None)
            return
        self._move("starting", "ready")
        self.peak_ready = max(self.peak_ready, self.states["ready"])
        up = _Up(life, vm, watch)
        if life.lifetime is None and life.fate is Fate.WELL:
            self._up.append(up)
            return
        end = watch.ready_at + (life.lifetime or 0.0)
        if life.fate is not Fate.CRASH:
            await anyio.sleep(max(end - time.monotonic(), 0))
            self.latencies["lateness"].record(time.monotonic() - end)
        await self._follow(up, end)

    async def _follow(self, up: _Up, due: float) -> None:
        if up.life.fate is Fate.CRASH:
            with anyio.move_on_after((up.life.lifetime or 0.0) + self.scenario.ready_timeout):
                while up.watch.died is None:
                    await up.watch.news()
        self._move("ready", "ending")
        await self._end(up, due)

    async def _create(self, life: Life, due: float) -> VirtualMachine:
        params = f'vmactor.script="{life.script()}"'
        if self._template.params:
            params = f"{self._template.params} {params}"
        hangs = life.fate is Fate.HANG
        vm = await self._service.create_vm(
            replace(self._template, name=f"load-{life.number}", params=params),
            hangup_detection=hangs,
            hangup_timeout=self.scenario.hangup_timeout if hangs else None,
        )
        self.latencies["create"].record(time.monotonic() - due)
        return vm

    async def _start(self, life: Life, vm: VirtualMachine, watch: _Watch) -> None:
        began = time.monotonic()
        await vm.start(timeout=self.scenario.ready_timeout)
        if life.fate in {Fate.HANG, Fate.ERROR}:
            return
        with anyio.move_on_after(max(began + self.scenario.ready_timeout - time.monotonic(), 0)):
            while watch.ready_at is None and watch.died is None:
                await watch.news()
        if watch.ready_at is None:
            ended = watch.died and f"it ended with {watch.died.reason.name} {watch.died.detail}"
            raise _FailedError(ended or f"it was not ready after {self.scenario.ready_timeout:g} s")
        self.latencies["start_to_ready"].record(watch.ready_at - began)

    async def _end(self, up: _Up, due: float | None) -> None:
        life, vm, watch = up.life, up.vm, up.watch
        try:
            if life.fate is Fate.WELL:
                await self._finish(vm, watch)
                due = watch.finished_at
            elif life.fate is Fate.KILLED:
                _kill(vm)
            patience = self.scenario.ready_timeout
            if life.fate is Fate.HANG:
                patience += self.scenario.hangup_timeout
            with anyio.move_on_after(patience):
                if life.fate is Fate.WELL:
                    await vm.stop(timeout=patience)
                while watch.died is None:
                    await watch.news()
            if watch.died is None:
                raise _FailedError(f"it has not ended after {patience:g} s")
            if life.fate is Fate.WELL and due is not None:
                self.latencies["stop"].record(time.monotonic() - due)
            self._check_end(life, watch)
        except (VmactorError, _FailedError, OSError) as error:
            self._fail(life, "ending", error)
        else:
            self._move("ending", "ended")
            self.fates[life.fate] += 1
        await self._give_up(vm)

    async def _finish(self, vm: VirtualMachine, watch: _Watch) -> None:
        """Tell the guest that its payload is over, and wait until the subscriber hears that from it."""
        async with await vm.connect_vsock(GUEST_PORT, timeout=self.scenario.ready_timeout) as stream:
            told = time.monotonic()
            await stream.send(b"finished 0\n")
            with anyio.move_on_after(self.scenario.ready_timeout):
                while watch.finished_at is None and watch.died is None:
                    await watch.news()
        if watch.finished_at is None:
            raise _FailedError("nobody heard that its payload had finished")
        self.latencies["report_to_subscriber"].record(watch.finished_at - told)

    def _check_end(self, life: Life, watch: _Watch) -> None:
        if watch.died is None or watch.died.reason is not ENDS[life.fate]:
            reason = "nothing" if watch.died is None else watch.died.reason.name
            raise _FailedError(f"it ended with {reason} instead of {ENDS[life.fate].name}")
        if life.fate is Fate.ERROR and not watch.error:
            raise _FailedError("nobody heard the error that the guest reported")

    async def _give_up(self, vm: VirtualMachine) -> None:
        self._watches.pop(vm.cid, None)
        try:
            await vm.aclose()
        except VmactorError as error:
            self._note(f"{vm.name}: {error}")

    # -- Books -------------------------------------------------------------------------------------

    async def _collect(self, events: Subscription[Event]) -> None:
        async for event in events:
            now = time.monotonic()
            if isinstance(event, Gap):
                self.events_lost += event.missed
            elif (watch := self._watches.get(event.cid)) is not None:
                watch.see(event, now)
                if isinstance(event, Died):
                    self.reasons[event.reason.name] += 1

    def _move(self, old: str | None, new: str) -> None:
        if old is not None:
            self.states[old] -= 1
        self.states[new] += 1

    def _fail(self, life: Life, state: str, error: Exception) -> None:
        self._move(state, "failed")
        self._note(f"load-{life.number} ({life.fate}): {error}")

    def _note(self, text: str) -> None:
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append(text)

    def result(self) -> dict[str, Any]:
        """What it came to, JSON-ready; docs/load.md explains every field."""
        return {
            "format": 1,
            "scenario": self.scenario.as_dict(),
            "seconds": self.seconds,
            "vms": self.scenario.vms,
            "peak_ready": self.peak_ready,
            "failed": self.states["failed"],
            "failures": self.failures,
            "events_published": self.events_published,
            "events_lost": self.events_lost,
            "manager_rss_bytes_per_vm": None if self.bytes_per_vm is None else round(self.bytes_per_vm),
            "manager_cpu_fraction_idle": self.idle_cpu,
            "manager_descriptors_peak": max(
                (row["descriptors"] for row in self.measure.rows if row["descriptors"]), default=None
            ),
            "latency_seconds": {kind: values.summary() for kind, values in self.latencies.items()},
            "deaths": dict(sorted(self.reasons.items())),
            "went_as_planned": dict(sorted(self.fates.items())),
            "curves": {kind: values.curve() for kind, values in self.latencies.items()},
            "samples": self.measure.rows,
        }


def _kill(vm: VirtualMachine) -> None:
    """Kill a VMM as somebody outside would. Only we reap it, so its number is no other's meanwhile."""
    if (pid := vm.info.pid) is None:
        raise _FailedError("it has no VMM to be killed")
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
