"""VMs that outlive their manager: killed and ended managers, and what the next one makes of their VMs."""

import json
import os
import select
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import anyio
import pytest

from tests.keeping_manager import OTHER, Start, ended, entry_of, managers
from vmactor import RawConfig, VirtualizationService
from vmactor.errors import IllegalStateError
from vmactor.state_dir import StateDirectory


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Start]:
    """Start managers of one state directory, one after the other; nothing of them or their VMs is left."""
    yield from managers(short_dir)


def channel_of(directory: Path, pid: int, name: str) -> BinaryIO:
    """The read end of a VMM's channel."""
    lines = (directory / "ledger").read_text().splitlines()
    (channels,) = (entry["channels"] for entry in map(entry_of, lines) if entry.get("role") == "VMM")
    pipe = f"pipe:[{channels[name]}]"
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link) == pipe:  # noqa: PTH115
            return link.open("rb", 0)
    raise AssertionError(f"process {pid} has no {name}")


def forge(ledger: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Write a ledger anew, with checksums that are right."""
    entries = [entry_of(line) for line in ledger.read_text().splitlines()]
    change(entries)
    texts = [json.dumps(entry).encode() for entry in entries]
    ledger.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts))


# -- Adoption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_kept_vm_goes_on_under_the_next_manager(manager: Start, backend: str) -> None:
    one = manager("simulated", backend)
    cid = one.create()
    one.expect("payload_ready", cid)
    before = one.ask("info", cid=cid)
    one.kill()
    two = manager("simulated", backend)
    (vm,) = two.vms
    assert vm == before
    assert vm["kept"] is True
    with StateDirectory(one.state) as state:
        (record,) = state.records()
    assert (record["kept"], record["alive"], "keeping" in record) == (True, True, False)
    adopted = two.expect("adopted", cid)
    assert (adopted["pid"], adopted["state"], adopted["generation"]) == (before["pid"], "READY", 1)
    assert two.ask("step", cid=cid, step="cid") == f"ok {cid}"  # its vsock
    two.ask("suspend", cid=cid)  # its control socket
    two.ask("resume", cid=cid)
    two.ask("step", cid=cid, step="print after")  # its console
    two.ask("stop", cid=cid)
    died = two.expect("died", cid)
    assert (died["adopted"], died["exit_code"], died["signal"]) == (True, None, None)
    assert (died["reason"], died["stopped_by"], died["final"]) == ("KILLED", "KILL", True)
    assert died["console_tail"] == "after\n"
    assert ended(before["pid"])
    assert not list((two.state / "vm").iterdir())


def test_what_the_guest_writes_without_a_manager_is_read_by_the_next(manager: Start) -> None:
    one = manager()
    cid = one.create("started;ready;sleep 500;print meanwhile;failure PANIC|why;serve")
    one.expect("payload_ready", cid)
    pid = one.ask("info", cid=cid)["pid"]
    one.kill()
    for channel in ("console", "failure"):
        with channel_of(one.state / "vm" / str(cid), pid, channel) as pipe:
            assert select.select([pipe], [], [], 30)[0], "the guest has written it"
    two = manager()
    two.tell("step", cid=cid, step="poweroff")
    died = two.expect("died", cid)
    assert (died["console_tail"], died["failure"]) == ("meanwhile\n", "PANIC|why")
    assert (died["reason"], died["exit_code"], died["adopted"]) == ("UNKNOWN", None, True)


def test_a_failure_text_tells_the_reason_of_an_adopted_vm(manager: Start) -> None:
    one = manager()
    cid = one.create()
    one.kill()
    two = manager()
    two.ask("step", cid=cid, step="failure MICRODROID_PAYLOAD_HAS_CHANGED")
    two.tell("step", cid=cid, step="poweroff")
    assert two.expect("died", cid)["reason"] == "MICRODROID_PAYLOAD_HAS_CHANGED"


def test_an_adopted_guest_reports_to_the_next_manager(manager: Start) -> None:
    one = manager()
    cid = one.create("started;sleep 1500;ready;finished 7;serve")
    one.expect("payload_started", cid)
    one.kill()
    two = manager()
    assert two.vms[0]["state"] == "STARTED"
    two.expect("payload_ready", cid)
    assert two.expect("payload_finished", cid)["exit_code"] == 7


def test_a_suspended_vm_is_still_suspended_under_the_next_manager(manager: Start) -> None:
    one = manager()
    cid = one.create("started;ready;sleep 300;finished 1;serve")
    one.expect("payload_ready", cid)
    one.ask("suspend", cid=cid)
    one.kill()
    two = manager()
    assert (two.vms[0]["suspended"], two.vms[0]["state"]) == (True, "READY")
    two.ask("resume", cid=cid)
    two.expect("payload_finished", cid)


def test_a_vm_is_adopted_again_and_again(manager: Start) -> None:
    one = manager()
    cid = one.create()
    for number in range(3):
        one.kill()
        one = manager()
        assert [vm["cid"] for vm in one.vms] == [cid], number
    assert one.ask("step", cid=cid, step="echo still") == "ok still"


def test_a_manager_that_ends_in_order_leaves_kept_vms_alive_and_no_others(manager: Start) -> None:
    one = manager()
    kept, other, unstarted = one.create(), one.create(keep=False), one.create(start=False)
    pids = {vm: one.ask("info", cid=vm)["pid"] for vm in (kept, other)}
    one.end()
    assert not ended(pids[kept])
    assert ended(pids[other])
    two = manager()
    assert [vm["cid"] for vm in two.vms] == [kept]
    assert two.expect("manager_restarted")["clean"] is True
    ends = {event["cid"] for event in two.events if event["event"] in ("died", "removed")}
    assert ends == {other, unstarted}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run VMs for others")
def test_a_vm_of_another_user_is_adopted_with_its_rights(manager: Start, short_dir: Path) -> None:
    short_dir.chmod(0o711)
    one = manager()
    cid = one.create("started;sleep 1000;ready;serve", user=OTHER)
    pid = one.ask("info", cid=cid)["pid"]
    one.kill()
    two = manager()
    (vm,) = two.vms
    assert (vm["requester_uid"], vm["pid"]) == (OTHER, pid)
    two.expect("payload_ready", cid)  # its socket is made for that user again
    assert two.ask("step", cid=cid, step="cid") == f"ok {cid}"
    two.ask("stop", cid=cid)
    assert not list((two.state / "vm").iterdir())


# -- What is not adopted -------------------------------------------------------------------------------


def test_vms_that_were_not_to_be_kept_are_reaped(manager: Start) -> None:
    one = manager()
    kept, other = one.create(), one.create(keep=False)
    pid = one.ask("info", cid=other)["pid"]
    one.kill()
    two = manager()
    assert two.expect("reaped", other)["ended"] == [f"VMM (process {pid})"]
    assert [vm["cid"] for vm in two.vms] == [kept]
    assert ended(pid)


def test_the_end_of_a_kept_vm_that_no_manager_saw_is_told_by_the_next(manager: Start) -> None:
    one = manager()
    cid = one.create()
    pid = one.ask("info", cid=cid)["pid"]
    one.kill()
    os.kill(pid, signal.SIGKILL)
    died = manager().expect("died", cid)
    assert (died["adopted"], died["exit_code"], died["signal"], died["final"]) == (True, None, None, True)
    assert "no manager was there" in died["detail"]


def test_a_kept_vm_that_was_never_started_ends_with_its_manager(manager: Start) -> None:
    one = manager()
    cid = one.create(start=False)
    one.kill()
    two = manager()
    two.expect("reaped", cid)
    assert two.vms == []


def test_a_process_that_cannot_be_identified_is_not_touched(manager: Start) -> None:
    one = manager()
    cid = one.create()
    pid = one.ask("info", cid=cid)["pid"]
    one.kill()

    def another_start(entries: list[dict[str, Any]]) -> None:
        entries[-1]["start"] += 1

    forge(one.state / "vm" / str(cid) / "ledger", another_start)
    two = manager()
    assert "did not begin when its ledger says" in two.expect("orphaned", cid)["detail"]
    assert two.vms == []
    assert not ended(pid)


def test_a_service_that_keeps_nothing_leaves_kept_vms_alone(manager: Start, short_dir: Path) -> None:
    one = manager()
    cid = one.create()
    pid = one.ask("info", cid=cid)["pid"]
    one.kill()

    async def other() -> None:
        async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as service:
            with (short_dir / "kernel").open("rb") as kernel:
                config = RawConfig(name="another", kernel=kernel)
                with pytest.raises(IllegalStateError, match="keeps=True"):
                    await service.create_vm(config, keep=True)
                async with await service.create_vm(config) as vm:
                    assert vm.cid > cid

    anyio.run(other)
    assert not ended(pid)
    assert [vm["cid"] for vm in manager().vms] == [cid]


def test_only_one_service_keeps_vms_in_a_state_directory(manager: Start, short_dir: Path) -> None:
    manager()

    async def second() -> None:
        with pytest.raises(IllegalStateError, match="another service keeps VMs"):
            async with VirtualizationService(
                vmm="simulated", state_directory=short_dir / "state", keeps=True
            ):
                raise AssertionError

    anyio.run(second)


# -- The stream of events ------------------------------------------------------------------------------


def test_the_stream_of_events_goes_on_with_the_break_marked(manager: Start) -> None:
    one = manager()
    cid = one.create()
    one.expect("payload_ready", cid)
    one.kill()
    first = list(one.events)
    two = manager()
    two.expect("adopted", cid)
    assert two.events[: len(first)] == first
    numbers = [event["seq"] for event in two.events]
    assert numbers == list(range(1, len(numbers) + 1))
    kinds = [event["event"] for event in two.events]
    assert kinds == ["created", "started", "payload_started", "payload_ready", "manager_restarted", "adopted"]
    mark = two.expect("manager_restarted")
    assert (mark["clean"], mark["lost"], mark["pid"]) == (False, False, two.process.pid)


def test_the_end_of_a_vm_of_which_nothing_is_left_is_told_all_the_same(manager: Start) -> None:
    one = manager()
    cid = one.create(keep=False)
    pid = one.ask("info", cid=cid)["pid"]
    one.kill()
    os.kill(pid, signal.SIGKILL)
    shutil.rmtree(one.state / "vm" / str(cid))  # as if it had been killed while it cleared away
    two = manager()
    reaped = two.expect("reaped", cid)
    assert (reaped["name"], reaped["driver"], reaped["generation"]) == ("kept", "simulated", 1)
    assert "nothing of it is left" in reaped["detail"]
    two.kill()
    three = manager()
    while [event["event"] for event in three.events].count("manager_restarted") < 2:
        three.read_event()
    assert [event["event"] for event in three.events].count("reaped") == 1
