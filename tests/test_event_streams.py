"""Streams of VMs' events: what a reader of JSON lines can prove, and how it goes on where it was cut off."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.host_facts import FULL
from tests.scripted_vmm import ScriptedDriver
from vmactor.actors.service import VirtualizationService
from vmactor.bus import Subscription
from vmactor.cli.output import to_json
from vmactor.config import RawConfig
from vmactor.messages import Event, Gap
from vmactor.vmm.select import Selection

pytestmark = pytest.mark.anyio


@pytest.fixture
def config(tmp_path: Path) -> Iterator[RawConfig]:
    """Something that could be run."""
    (tmp_path / "kernel").write_bytes(b"kernel")
    with (tmp_path / "kernel").open("rb") as kernel:
        yield RawConfig(name="test", kernel=kernel, platform_version="~1.0")


def lines(events: Subscription[Event]) -> list[dict[str, Any]]:
    """All that can be read now, as a reader in another process gets it."""
    found = []
    while (event := events.next_nowait()) is not None:
        found.append(json.loads(to_json(event.as_dict())))
    return found


def is_whole(rows: list[dict[str, Any]], after: int = 0) -> bool:
    """The proof: each line names the one before it."""
    return [row["previous"] for row in rows] == [after, *(row["seq"] for row in rows)][: len(rows)]


async def test_json_lines_of_any_stream_prove_that_none_is_missing(
    short_dir: Path, config: RawConfig
) -> None:
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service:
        with ExitStack() as streams:
            everything = streams.enter_context(service.subscribe())
            vms = [await service.create_vm(config) for _ in range(2)]
            of_each = [streams.enter_context(vm.events()) for vm in vms]
            for number in range(6):
                vms[number % 2].publish_message("guest_to_host", 5000, str(number))
            slow = streams.enter_context(service.bus.subscribe(topics=[vms[1].cid], after=0, capacity=1))
            for number in range(6):
                vms[number % 2].publish_message("guest_to_host", 5000, str(number))
            streams_read = [lines(events) for events in (everything, *of_each, slow)]
    assert [len(rows) for rows in streams_read] == [14, 6, 6, 6]
    for rows in streams_read:
        assert is_whole(rows)
        for missing in range(len(rows) - 1):
            assert not is_whole(rows[:missing] + rows[missing + 1 :])
    assert streams_read[3][0]["event"] == "gap"
    assert streams_read[3][0]["missed"] == 2


async def test_a_reader_that_was_cut_off_goes_on_after_the_last_number_it_saw(
    short_dir: Path, config: RawConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmactor.actors.service.HISTORY", 8)
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service:
        vm = await service.create_vm(config)
        with service.bus.subscribe(topics=[vm.cid], after=0) as events:
            rows = lines(events)
        for number in range(10):
            vm.publish_message("guest_to_host", 5000, str(number))
            if number == 4:
                with service.bus.subscribe(topics=[vm.cid], after=rows[-1]["seq"]) as events:
                    rows += lines(events)
        assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert is_whole(rows)
        with service.bus.subscribe(after=0) as events:
            first = events.next_nowait()
            assert first == Gap(seq=3, missed=3)
            assert is_whole([first.as_dict(), *lines(events)])
