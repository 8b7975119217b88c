"""The records of VMs: at once for a new VM, soon and once for many changes, never for one that is gone."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from vmactor.actors.records import DELAY, Records
from vmactor.messages import PayloadState, VirtualMachineState, VmInfo
from vmactor.state_dir import StateDirectory
from vmactor.supervisor import Supervisor

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

CID = 2048
INFO = VmInfo(
    cid=CID,
    name="web",
    generation=0,
    state=VirtualMachineState.NOT_STARTED,
    payload=PayloadState.STARTING,
    driver="scripted",
    suspended=False,
    pid=None,
    protected=False,
    directory="/nowhere",
    requester_uid=0,
    requester_pid=1,
    created=datetime.now(UTC),
)


class Counted(StateDirectory):
    """Counts what is written."""

    written = 0

    def write_record(self, cid: int, record: dict[str, Any]) -> None:
        self.written += 1
        super().write_record(cid, record)


@asynccontextmanager
async def records_in(directory: Path) -> AsyncIterator[tuple[Counted, Records]]:
    with Counted(directory / "state") as state:
        state.make_vm_directory(CID)
        records = Records(state, {"vsock": "hybrid"})
        async with Supervisor("test") as supervisor:
            await supervisor.start("records", records.run)
            yield state, records


def generation(state: StateDirectory) -> int | None:
    record = state.record(CID)
    return None if record is None else record["generation"]


async def test_a_new_vm_is_told_of_at_once_with_what_all_records_have(short_dir: Path) -> None:
    async with records_in(short_dir) as (state, records):
        records.tell(INFO)
        assert state.record(CID) == INFO.as_dict() | {"vsock": "hybrid"}


async def test_many_changes_are_one_record_that_holds_the_last(short_dir: Path) -> None:
    async with records_in(short_dir) as (state, records):
        records.tell(INFO)
        for number in range(1, 10):
            records.tell(replace(INFO, generation=number))
        assert (generation(state), state.written) == (0, 1)
        await anyio.sleep(2 * DELAY)
        assert (generation(state), state.written) == (9, 2)
        records.tell(replace(INFO, generation=10))
        await anyio.sleep(2 * DELAY)
        assert (generation(state), state.written) == (10, 3)
        await anyio.sleep(3600)
        assert state.written == 3, "nothing happens while nothing changes"


async def test_nothing_is_written_of_a_vm_that_is_forgotten(short_dir: Path) -> None:
    async with records_in(short_dir) as (state, records):
        records.tell(INFO)
        records.tell(replace(INFO, generation=1))
        records.forget(CID)
        records.flush(CID)
        await anyio.sleep(2 * DELAY)
        assert (generation(state), state.written) == (0, 1)


async def test_what_waits_can_be_written_now_and_is_not_written_again(short_dir: Path) -> None:
    async with records_in(short_dir) as (state, records):
        records.tell(INFO)
        records.tell(replace(INFO, generation=1))
        records.flush(CID)
        assert generation(state) == 1
        await anyio.sleep(2 * DELAY)
        assert state.written == 2


async def test_a_record_that_cannot_be_written_is_logged_and_keeps_no_other_from_being_written(
    short_dir: Path,
) -> None:
    async with records_in(short_dir) as (state, records):
        records.tell(INFO)
        with capture_logs() as lines:
            records.tell(replace(INFO, cid=CID + 1))  # has no directory
            records.tell(replace(INFO, generation=1))
            await anyio.sleep(2 * DELAY)
        assert [line["cid"] for line in lines] == [CID + 1]
        assert generation(state) == 1
