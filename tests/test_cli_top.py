"""``vmactor top``: what it shows of events, and the terminal view with a real daemon."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from textual.widgets import DataTable, RichLog

from tests.daemon_peer import SECONDS, daemon
from tests.test_client import simulated
from vmactor.cli.top import EventsScreen, LogScreen, Top
from vmactor.cli.top_model import COLUMNS, Model
from vmactor.client import connect
from vmactor.messages import Created, DeathReason, Died, Gap, PayloadReady, Started, UsageSampled

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def header(seq: int, **more: Any) -> dict[str, Any]:
    head = {"seq": seq, "previous": seq - 1, "cid": 2048, "generation": 1, "name": "web", "driver": "qemu"}
    return head | {"time": NOW, "monotonic": float(seq)} | more


def shown_by(model: Model) -> dict[str, str]:
    (cells,) = model.cells(NOW).values()
    return dict(zip(COLUMNS, cells, strict=True))


def test_a_row_tells_what_the_events_of_a_vm_told() -> None:
    model = Model()
    model.feed(Created(**header(1, generation=0)))
    assert shown_by(model)["STATE"] == "NOT_STARTED"
    model.feed(Started(**header(2), pid=77))
    model.feed(PayloadReady(**header(3)))
    used = UsageSampled(**header(3), cpu_time_ms=100, rss_vm_kib=51200, rss_vmm_kib=102400, balloon_kib=10240)
    model.feed(used)
    model.feed(replace(used, monotonic=5.0, cpu_time_ms=1100))
    row = shown_by(model)
    assert (row["CID"], row["NAME"], row["STATE"]) == ("2048", "web", "READY")
    assert (row["CPU"], row["GUEST MEM"], row["VMM MEM"], row["BALLOON"]) == (
        *("50%", "50 MiB", "100 MiB", "10 MiB"),
    )
    assert row["EVENTS/S"] == "0.3"
    assert row["LAST EVENT"] == "payload_ready: the payload can serve"


def test_the_dead_stay_for_a_while_and_missed_events_are_counted() -> None:
    model = Model()
    for cid in range(100):
        model.feed(Created(**header(2 * cid + 1, cid=cid)))
        model.feed(Died(**header(2 * cid + 2, cid=cid), reason=DeathReason.KILLED, final=True))
    assert list(model.rows) == list(range(100 - Model.KEPT_DEAD, 100))
    model.feed(Gap(**header(300, cid=0), missed=7))
    assert model.missed == 7


@pytest.mark.anyio
@pytest.mark.asyncio_only
async def test_vms_are_seen_paused_and_stopped_by_keys(short_dir: Path) -> None:
    with ExitStack() as opened:
        config = simulated(short_dir, opened, "print [2Jhello", "started", "ready", "serve", name="web")
        async with daemon(short_dir) as served, connect(served.path) as service:
            vm = await service.create_vm(config)
            await vm.start()
            app = Top(connect(served.path))
            async with app.run_test(size=(140, 20)) as pilot:

                async def until(seen: Any) -> None:
                    with anyio.fail_after(SECONDS):
                        while not seen():
                            await pilot.pause(0.01)

                def cell(column: str) -> str:
                    table = app.screen_stack[0].query_one(DataTable)
                    return str(table.get_cell(str(vm.cid), column)) if table.row_count else ""

                await until(lambda: cell("STATE") == "READY")
                assert cell("NAME") == "web"
                await pilot.press("z")
                await until(lambda: cell("STATE") == "suspended")
                await pilot.press("z")
                await until(lambda: cell("STATE") == "READY")
                await pilot.press("e")
                await until(lambda: isinstance(app.screen, EventsScreen))
                await until(lambda: len(app.screen.query_one(RichLog).lines) >= 2)
                await pilot.press("escape")
                await pilot.press("c")
                await until(lambda: isinstance(app.screen, LogScreen))
                await until(lambda: len(app.screen.query_one(RichLog).lines) >= 1)
                assert "[2Jhello" in app.screen.query_one(RichLog).lines[0].text
                await pilot.press("escape")
                await pilot.press("s")
                await until(lambda: cell("STATE") == "DEAD")
                await pilot.press("q")
            assert app.failure is None
            assert (await vm.wait()) is not None


@pytest.mark.anyio
@pytest.mark.asyncio_only
async def test_without_a_daemon_the_view_ends_and_says_why(short_dir: Path) -> None:
    app = Top(connect(short_dir / "none"))
    async with app.run_test() as pilot:
        with anyio.fail_after(SECONDS):
            while app.is_running:
                await pilot.pause(0.01)
    assert "there is no daemon" in str(app.failure)
