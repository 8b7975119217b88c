"""Streams of VMs' events: what a reader of JSON lines can prove, and how it goes on where it was cut off."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.host_facts import FULL
from tests.scripted_vmm import ScriptedDriver
from vmactor.actors.service import VirtualizationService
from vmactor.bus import Overflow, Subscription
from vmactor.cli.output import to_json
from vmactor.config import RawConfig
from vmactor.errors import SlowSubscriberError
from vmactor.messages import Created, Event, Gap, Removed, Snapshot, VsockMessage
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
                await vms[number % 2].publish_message("guest_to_host", 5000, str(number))
            slow = streams.enter_context(service.subscribe(cids=[vms[1].cid], after=0, capacity=1))
            for number in range(6):
                await vms[number % 2].publish_message("guest_to_host", 5000, str(number))
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
    monkeypatch.setattr("vmactor.actors.event_bus.HISTORY", 8)
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service:
        vm = await service.create_vm(config)
        with service.subscribe(cids=[vm.cid], after=0) as events:
            rows = lines(events)
        for number in range(10):
            await vm.publish_message("guest_to_host", 5000, str(number))
            if number == 4:
                with service.subscribe(cids=[vm.cid], after=rows[-1]["seq"]) as events:
                    rows += lines(events)
        assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert is_whole(rows)
        with service.subscribe(after=0) as events:
            first = events.next_nowait()
            assert first == Gap(seq=3, missed=3)
            assert is_whole([first.as_dict(), *lines(events)])


async def test_a_subscriber_of_the_service_chooses_by_vm_and_by_kind(
    short_dir: Path, config: RawConfig
) -> None:
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service:
        with service.subscribe(kinds=[Created, Removed]) as ends, service.subscribe(cids=[2049]) as second:
            vms = [await service.create_vm(config) for _ in range(2)]
            for vm in vms:
                await vm.publish_message("guest_to_host", 5000, "hello")
                await vm.aclose()
            assert [(row["cid"], row["event"]) for row in lines(ends)] == [
                (2048, "created"),
                (2049, "created"),
                (2048, "removed"),
                (2049, "removed"),
            ]
            assert [row["event"] for row in lines(second)] == ["created", "vsock_message", "removed"]
        with service.subscribe(late=True, kinds=[Removed]) as late:
            assert [row["cid"] for row in lines(late)] == [2048, 2049]


async def test_a_snapshot_shows_the_vms_that_live_and_the_stream_goes_on_after_it(
    short_dir: Path, config: RawConfig
) -> None:
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service:
        vms = [await service.create_vm(config) for _ in range(3)]
        await vms[0].aclose()
        infos = tuple(vm.info for vm in vms[1:])
        with service.subscribe(snapshot=True) as events, service.subscribe(snapshot=True, cids=[2050]) as one:
            await vms[1].aclose()
            present = events.next_nowait()
            assert isinstance(present, Snapshot)
            assert present.vms == infos
            rows = [present.as_dict(), *lines(events)]
            assert is_whole(rows)
            assert [(row["event"], row["seq"]) for row in rows] == [("snapshot", 4), ("removed", 5)]
            row = json.loads(to_json(rows[0]))["vms"][0]
            assert (row["cid"], row["state"], row["payload"]) == (2049, "NOT_STARTED", "STARTING")
            (alone,) = lines(one)
            assert [vm["cid"] for vm in alone["vms"]] == [2050]


async def test_only_who_sends_messages_waits_for_a_subscriber_that_asks_for_it(
    short_dir: Path, config: RawConfig
) -> None:
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service, await service.create_vm(config) as vm:
        with service.subscribe(overflow=Overflow.WAIT, capacity=2, patience=math.inf) as crowded:
            async with anyio.create_task_group() as tasks:
                for text in "123":
                    tasks.start_soon(vm.publish_message, "guest_to_host", 5000, text)
                texts = [getattr(await anext(crowded), "text", "") for _ in range(3)]
            assert sorted(texts) == ["1", "2", "3"]
            await vm.publish_message("guest_to_host", 5000, "4")
            for _ in range(2):  # VMs are made and end, whoever is slow
                await (await service.create_vm(config)).aclose()
            assert [row["event"] for row in lines(crowded)] == ["gap", "created", "removed"]


async def test_a_subscriber_of_the_service_that_is_too_slow_can_ask_to_be_cut_off(
    short_dir: Path, config: RawConfig
) -> None:
    selection = Selection(ScriptedDriver(), "hybrid", ("a test picked it",))
    service = VirtualizationService(vmm=selection, state_directory=short_dir / "state", facts=FULL)
    async with service, await service.create_vm(config) as vm:
        with service.subscribe(overflow=Overflow.DISCONNECT, capacity=1) as slow:
            for text in "12":
                await vm.publish_message("guest_to_host", 5000, text)
            assert isinstance(await anext(slow), VsockMessage)
            with pytest.raises(SlowSubscriberError) as told:
                await anext(slow)
        assert told.value.waiting == 1
