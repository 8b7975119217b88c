"""What Prometheus may know: counters of events, and the present as it is when somebody asks.

Events are counted by one subscriber of the bus. Everything else is read from what actors have published when
a scrape comes, in the event loop, and costs nothing in between. Names: one prefix, base units, ``_total`` for
counters. A label never has more values than there are states, reasons or kinds; VMs are told apart only where
the configuration says so.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

import vmactor
from vmactor.actors.service import VirtualizationService
from vmactor.errors import ResourceExhaustedError
from vmactor.log import get_logger
from vmactor.messages import (
    CreationFailed,
    DeathReason,
    Died,
    Event,
    PayloadStarted,
    Restarting,
    RestartsExhausted,
    Started,
    UsageSampled,
    VirtualMachineState,
    VmInfo,
    is_end,
)
from vmactor.waiting import readable, writable

HEAD_SIZE: Final = 8192
"""Bytes of a request that are read."""
SECONDS: Final = 5.0
"""How long a scraper may take to ask and to take the answer."""
SCRAPERS: Final = 4
"""Scrapes at a time; more wait in the socket's queue."""
LAG_SECONDS: Final = 1.0
"""How often the event loop is asked how late it is."""
PAUSE_SECONDS: Final = 0.1
"""After a scraper could not be accepted."""
EVENTS: Final = 1 << 14
"""Events that may wait to be counted; there is no more to a count than some microseconds."""
BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
RUN_BUCKETS: Final = (1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)

log = get_logger()


class Metrics:
    """The metrics of one service.

    Args:
        service: The service.
        per_vm: Whether there are some for each VM.
        connections: How many connections of clients there are.

    Attributes:
        registry: Everything, for Prometheus's own library.
    """

    def __init__(
        self,
        service: VirtualizationService,
        *,
        per_vm: bool = False,
        connections: Callable[[], int] = lambda: 0,
    ) -> None:
        self._service = service
        disable_created_metrics()  # type: ignore[no-untyped-call]  # times of birth, of no use here
        self.registry = registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        names: dict[str, Any] = {"namespace": "vmactor", "registry": registry}
        info = Gauge("info", "What serves, as labels.", ["version", "driver", "vsock"], **names)
        info.labels(vmactor.__version__, service.selection.driver.name, service.selection.vsock).set(1)
        self._events = Counter("events", "Events, by kind.", ["kind"], **names)
        self._deaths = Counter("deaths", "Ends of runs, by reason.", ["reason"], **names)
        self._refused = Counter("creation_failures", "VMs that were refused, by error.", ["error"], **names)
        self._restarts = Counter("restarts", "Runs that were started again by a policy.", **names)
        self._given_up = Counter("restarts_exhausted", "VMs that ended too often for their policy.", **names)
        self._start = Histogram(
            "start_duration_seconds",
            "From the demand for a start to the VMM running, or to its failure.",
            ["outcome"],
            buckets=BUCKETS,
            **names,
        )
        self._boot = Histogram(
            "boot_duration_seconds",
            "From the demand for a start to the guest's first report.",
            buckets=BUCKETS,
            **names,
        )
        self._stop = Histogram(
            "stop_duration_seconds",
            "From the first demand for an end to the end, by the way that it was ended.",
            ["rung"],
            buckets=BUCKETS,
            **names,
        )
        self._run = Histogram(
            "run_duration_seconds",
            "From the demand for a start to the end of the run.",
            buckets=RUN_BUCKETS,
            **names,
        )
        self._connections = connections
        self._per_vm = per_vm
        self._worst_lag = 0.0
        self._used: dict[int, UsageSampled] = {}
        registry.register(_Present(self.collect))

    # -- Counting ----------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Count events, and how late the event loop is, until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch_loop)
            if self._per_vm:
                tasks.start_soon(self._watch_usage)
            with self._service.subscribe(capacity=EVENTS) as events:
                task_status.started()
                async for event in events:
                    self.count(event)

    def count(self, event: Event) -> None:
        """Count one event."""
        self._events.labels(event.kind).inc()
        match event:
            case Started(elapsed=elapsed):
                self._start.labels("started").observe(elapsed)
            case PayloadStarted(elapsed=elapsed):
                self._boot.observe(elapsed)
            case Died():
                self._died(event)
            case CreationFailed(error=error):
                self._refused.labels(error).inc()
            case Restarting():
                self._restarts.inc()
            case RestartsExhausted():
                self._given_up.inc()
            case _:
                pass
        if is_end(event):
            self._used.pop(event.cid, None)

    def _died(self, died: Died) -> None:
        self._deaths.labels(died.reason.name).inc()
        self._run.observe(died.elapsed)
        if died.reason is DeathReason.START_FAILED:
            self._start.labels("failed").observe(died.elapsed)
        if died.stop_elapsed is not None and died.stopped_by is not None:
            self._stop.labels(died.stopped_by.name).observe(died.stop_elapsed)

    async def _watch_loop(self) -> None:
        while True:
            due = anyio.current_time() + LAG_SECONDS
            await anyio.sleep(LAG_SECONDS)
            self._worst_lag = max(self._worst_lag, anyio.current_time() - due)

    async def _watch_usage(self) -> None:
        with self._service.subscribe(kinds=[UsageSampled], capacity=EVENTS) as samples:
            async for sample in samples:
                if isinstance(sample, UsageSampled):
                    self._used[sample.cid] = sample

    # -- Telling -----------------------------------------------------------------------------------

    def collect(self) -> Iterator[Metric]:
        """The present; called for each scrape, in the event loop."""
        vms, now = self._service.list_vms(), self._service.statistics()
        states = dict.fromkeys((state.name for state in VirtualMachineState), 0)
        for vm in vms:
            states[vm.state.name] += 1
        living = GaugeMetricFamily("vmactor_vms", "VMs that live, by state.", labels=["state"])
        for state, count in states.items():
            living.add_metric([state], count)
        yield living
        lag, self._worst_lag = self._worst_lag, 0.0
        for name, text, value in (
            ("vms_kept", "VMs that outlive this daemon.", sum(vm.kept for vm in vms)),
            ("vms_suspended", "VMs whose virtual CPUs are paused.", sum(vm.suspended for vm in vms)),
            ("starts_waiting", "Starts that wait until fewer VMs boot.", now.waiting_starts),
            ("mailbox_messages", "Messages that wait in VMs' mailboxes.", now.messages),
            ("mailbox_deepest_messages", "The same in the fullest mailbox.", now.deepest_mailbox),
            ("subscribers", "Subscribers of events.", now.bus.subscribers),
            ("events_queued", "Events that wait for their subscribers.", now.bus.queued),
            ("events_deepest_queued", "The same in the fullest queue.", now.bus.deepest),
            ("connections", "Connections of clients.", self._connections()),
            ("loop_lag_seconds", "How late the event loop was at most since the last scrape.", lag),
        ):
            yield GaugeMetricFamily(f"vmactor_{name}", text, value=value)
        for name, text, value in (
            ("events_missed", "Events that subscribers were too slow for.", now.bus.missed),
            ("vmm_timeouts", "Requests that VMMs did not answer in time.", now.vmm_timeouts),
        ):
            yield CounterMetricFamily(f"vmactor_{name}", text, value=value)
        if self._per_vm:
            yield from self._each(vms)

    def _each(self, vms: list[VmInfo]) -> Iterator[Metric]:
        labels = ["cid", "name"]
        cpu = CounterMetricFamily("vmactor_vm_cpu_seconds", "Processor time of a VM.", labels=labels)
        memory = GaugeMetricFamily("vmactor_vm_memory_bytes", "Resident memory of a VM's VMM.", labels=labels)
        state = GaugeMetricFamily("vmactor_vm_state", "A VM's state, by its number.", labels=labels)
        for vm in vms:
            who = [str(vm.cid), vm.name]
            state.add_metric(who, vm.state)
            if (used := self._used.get(vm.cid)) is not None:
                cpu.add_metric(who, used.cpu_time_ms / 1000)
                memory.add_metric(who, used.rss_vmm_kib * 1024)
        yield from (state, cpu, memory)

    def page(self) -> bytes:
        """What a scraper gets, in Prometheus's text format."""
        return generate_latest(self.registry)


# -- The listener --------------------------------------------------------------------------------------


@contextmanager
def listener_for(where: str) -> Iterator[socket.socket]:
    """A socket to serve metrics on: ``HOST:PORT``, or the path of a unix socket, whose name goes at the end.

    Raises:
        ResourceExhaustedError: It cannot be had.
    """
    path = Path(where)
    host, _, port = where.rpartition(":")
    try:
        if path.is_absolute():
            listener = socket.socket(socket.AF_UNIX)
        else:
            family, *_ = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ResourceExhaustedError(f"cannot listen for metrics on {where}: {error}") from error
    with listener:
        try:
            listener.setblocking(False)
            if path.is_absolute():
                path.unlink(missing_ok=True)  # it is the configuration's to say whose it is
                listener.bind(where)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((host.strip("[]"), int(port)))
            listener.listen()
        except OSError as error:
            raise ResourceExhaustedError(f"cannot listen for metrics on {where}: {error}") from error
        try:
            yield listener
        finally:
            if path.is_absolute():
                path.unlink(missing_ok=True)


async def serve(listener: socket.socket, page: Callable[[], bytes]) -> None:
    """Answer scrapers until cancelled: HTTP/1.0, ``GET /metrics``, one request for a connection.

    Args:
        listener: Listens and does not block.
        page: What they get.
    """
    places = anyio.Semaphore(SCRAPERS)
    async with anyio.create_task_group() as scrapers:
        while True:
            await places.acquire()
            await readable(listener)
            try:
                scraper, _ = listener.accept()
            except OSError as error:
                places.release()
                if not isinstance(error, BlockingIOError):
                    log.warning("cannot accept a scraper", error=str(error))
                    await anyio.sleep(PAUSE_SECONDS)
                continue
            scrapers.start_soon(_answer, scraper, page, places)


async def _answer(scraper: socket.socket, page: Callable[[], bytes], places: anyio.Semaphore) -> None:
    try:
        scraper.setblocking(False)
        with anyio.move_on_after(SECONDS), suppress(OSError):
            request = bytearray()
            while b"\r\n\r\n" not in request and len(request) < HEAD_SIZE:
                await readable(scraper)
                if not (data := scraper.recv(HEAD_SIZE)):
                    return
                request += data
            rest = memoryview(_response(bytes(request), page))
            while rest:
                try:
                    rest = rest[scraper.send(rest, socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    await writable(scraper)
    finally:
        scraper.close()
        places.release()


def _response(request: bytes, page: Callable[[], bytes]) -> bytes:
    method, _, rest = request.partition(b" ")
    target = rest.partition(b" ")[0].partition(b"?")[0]
    if target not in (b"/metrics", b"/"):
        return _http(b"404 Not Found", b"the metrics are at /metrics\n", b"text/plain")
    if method not in (b"GET", b"HEAD"):
        return _http(b"405 Method Not Allowed", b"", b"text/plain")
    body = page()
    head = _http(b"200 OK", body, CONTENT_TYPE_PLAIN_0_0_4.encode())
    return head[: -len(body)] if method == b"HEAD" else head


def _http(status: bytes, body: bytes, kind: bytes) -> bytes:
    lines = (
        b"HTTP/1.0 " + status,
        b"Content-Type: " + kind,
        b"Content-Length: %d" % len(body),
        b"Connection: close",
    )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class _Present(Collector):
    """Asks for the present at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()
