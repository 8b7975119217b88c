"""The metrics: what is counted, how it is served, and that the dashboard shows what there is."""

import json
import re
import socket
from pathlib import Path

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

import vmactor
from tests.simulated_peer import script
from vmactor import RawConfig, VirtualizationService
from vmactor.daemon.metrics import HEAD_SIZE, Metrics, listener_for, serve
from vmactor.errors import IllegalStateError, ResourceExhaustedError, VmactorError

pytestmark = pytest.mark.anyio

DASHBOARD = Path(__file__).parent.parent / "grafana" / "vmactor.json"


@pytest.fixture
def kernel(short_dir: Path) -> Path:
    path = short_dir / "kernel"
    path.touch()
    return path


def service(short_dir: Path) -> VirtualizationService:
    return VirtualizationService(vmm="simulated", state_directory=short_dir / "state")


def samples(page: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """Each sample by its name and the values of its labels."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


async def test_lives_and_deaths_are_counted(short_dir: Path, kernel: Path) -> None:
    async with service(short_dir) as manager, anyio.create_task_group() as tasks:
        metrics = Metrics(manager, connections=lambda: 3)
        await tasks.start(metrics.run)
        with kernel.open("rb") as file, manager.subscribe() as events:
            steady = await manager.create_vm(RawConfig(name="a", kernel=file))
            crashing = RawConfig(name="b", kernel=file, params=script("started", "panic"))
            with pytest.raises(VmactorError):
                await manager.create_vm(RawConfig(name="c"))
            await steady.start()
            second = await manager.create_vm(crashing)
            await second.start()
            seen = set[str]()
            while not {"died", "payload_ready"} <= seen:
                seen.add((await events.__anext__()).kind)
            await anyio.wait_all_tasks_blocked()
            now = samples(metrics.page())
            assert now["vmactor_vms", ("READY",)] == 1
            assert now["vmactor_vms", ("DEAD",)] == 0
            assert now["vmactor_deaths_total", ("CRASH",)] == 1
            assert now["vmactor_events_total", ("created",)] == 2
            assert now["vmactor_creation_failures_total", ("ILLEGAL_ARGUMENT",)] == 1
            assert now["vmactor_start_duration_seconds_count", ("started",)] == 2
            assert now["vmactor_boot_duration_seconds_count", ()] == 2
            assert now["vmactor_run_duration_seconds_count", ()] == 1
            assert now["vmactor_connections", ()] == 3
            assert now["vmactor_subscribers", ()] == 2
            assert now["vmactor_events_missed_total", ()] == 0
            assert now["vmactor_info", ("simulated", vmactor.__version__, "direct")] == 1
            assert now["process_open_fds", ()] > 0
            await steady.stop()
            await anyio.wait_all_tasks_blocked()
            now = samples(metrics.page())
            assert now["vmactor_stop_duration_seconds_count", ("KILL",)] == 1
            assert sum(value for (name, _), value in now.items() if name == "vmactor_vms") == 0
        tasks.cancel_scope.cancel()


async def test_vms_are_told_apart_only_on_request(short_dir: Path, kernel: Path) -> None:
    async with service(short_dir) as manager:
        with kernel.open("rb") as file:
            vm = await manager.create_vm(RawConfig(name="one", kernel=file))
        await vm.start()
        few, many = Metrics(manager), Metrics(manager, per_vm=True)
        assert not [name for name, _ in samples(few.page()) if name.startswith("vmactor_vm_")]
        async with anyio.create_task_group() as tasks:
            await tasks.start(many.run)
            with anyio.fail_after(30):
                while ("vmactor_vm_memory_bytes", (str(vm.cid), "one")) not in samples(many.page()):
                    await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        assert samples(many.page())["vmactor_vm_state", (str(vm.cid), "one")] == vm.state


async def test_requests_that_a_vmm_does_not_answer_are_counted(
    short_dir: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmactor.vmm.crosvm_control.REQUEST_TIMEOUT", 0.1)
    async with service(short_dir) as manager:
        with kernel.open("rb") as file:
            config = RawConfig(name="deaf", kernel=file, params=script("started", "control silent", "serve"))
            vm = await manager.create_vm(config)
        with vm.events() as events:
            try:
                await vm.start(timeout=30)
            except IllegalStateError:
                pytest.fail("it had answered once")
            while (await events.__anext__()).kind != "payload_started":
                pass
        with anyio.fail_after(30):
            while manager.statistics().vmm_timeouts == 0:
                try:
                    await vm.suspend()
                except VmactorError:
                    break
        assert manager.statistics().vmm_timeouts == 1
        await vm.stop()
        assert manager.statistics().vmm_timeouts == 1


# -- Serving -------------------------------------------------------------------------------------------


async def ask(address: object, request: bytes) -> bytes:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET

    def talk() -> bytes:
        with socket.socket(family) as sock:
            sock.settimeout(30)
            sock.connect(address)  # type: ignore[arg-type]
            sock.sendall(request)
            answer = b""
            while data := sock.recv(65536):
                answer += data
            return answer

    return await anyio.to_thread.run_sync(talk)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_scraper_gets_the_page_over_http(short_dir: Path, kind: str) -> None:
    where = str(short_dir / "metrics.sock")
    if kind == "tcp":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            where = f"127.0.0.1:{free.getsockname()[1]}"
    with listener_for(where) as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, listener, lambda: b"page\n")
            address = listener.getsockname()
            answer = await ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            head, _, body = answer.partition(b"\r\n\r\n")
            assert body == b"page\n"
            assert head.startswith(b"HTTP/1.0 200 OK")
            assert b"Content-Length: 5" in head
            assert b"version=0.0.4" in head
            assert (await ask(address, b"HEAD /metrics HTTP/1.1\r\n\r\n")).endswith(b"\r\n\r\n")
            assert b" 404 " in await ask(address, b"GET /other HTTP/1.1\r\n\r\n")
            assert b" 405 " in await ask(address, b"POST /metrics HTTP/1.1\r\n\r\n")
            assert b" 404 " in await ask(address, b"x" * HEAD_SIZE)
            tasks.cancel_scope.cancel()
    assert not (short_dir / "metrics.sock").exists()


async def test_scrapers_that_say_nothing_hold_up_the_others_for_a_while_only(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmactor.daemon.metrics.SECONDS", 0.2)
    where = str(short_dir / "m")
    with listener_for(where) as listener:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, listener, lambda: b"page\n")
            silent = [socket.socket(socket.AF_UNIX) for _ in range(8)]
            for one in silent:
                one.connect(where)
            assert (await ask(where, b"GET /metrics HTTP/1.1\r\n\r\n")).endswith(b"page\n")
            for one in silent:
                one.close()
            tasks.cancel_scope.cancel()


def test_an_address_that_cannot_be_had_is_an_error(short_dir: Path) -> None:
    for where in (str(short_dir / "none" / "m"), "192.0.2.1:9"):
        with pytest.raises(ResourceExhaustedError, match="cannot listen for metrics"), listener_for(where):
            raise AssertionError


# -- Names ---------------------------------------------------------------------------------------------


def exported(short_dir: Path) -> dict[str, str]:
    """Every name on the page, and which kind it has."""

    async def page() -> bytes:
        async with service(short_dir) as manager:
            return Metrics(manager, per_vm=True).page()

    families = text_string_to_metric_families(anyio.run(page).decode())
    kinds = {family.name: family.type for family in families}
    return {
        name: kind
        for base, kind in kinds.items()
        for name in {
            "counter": [f"{base}_total"],
            "histogram": [f"{base}_bucket", f"{base}_count", f"{base}_sum"],
        }.get(kind, [base])
    }


def test_every_name_in_the_dashboard_is_exported(short_dir: Path) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"\b(?:vmactor|process)_\w+", query)}
    known = exported(short_dir)
    assert used <= set(known)
    parts = ("_sum", "_count")
    ours = {name for name in known if name.startswith("vmactor_") and not name.endswith(parts)}
    assert ours <= used, "it shows all that is exported"


def test_names_follow_prometheus_conventions(short_dir: Path) -> None:
    for name, kind in exported(short_dir).items():
        assert name.startswith(("vmactor_", "process_"))
        assert (kind == "counter") == name.endswith("_total")
        assert not re.search(r"_(ms|millis|kib|mib|minutes)\b", name)
