"""The daemon's methods over its socket: whole lives of VMs, subscriptions, what ends with a connection."""

import os
import socket
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.daemon_peer import SECONDS, Client, client, daemon
from vmactor import (
    DeadlineExceededError,
    IllegalArgumentError,
    IllegalStateError,
    UnsupportedOperationError,
)
from vmactor.daemon.methods import METHODS
from vmactor.rpc.files import Attached, ReceivedFile

pytestmark = pytest.mark.anyio


async def until_gone(service: Any) -> None:
    with anyio.fail_after(SECONDS):
        while service.list_vms():
            await anyio.sleep(0.01)


async def test_a_vm_lives_and_dies_over_the_socket(short_dir: Path) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        made = await call.create(short_dir, "started", "ready", "serve")
        vm, cid = made["vm"], made["info"]["cid"]
        assert made["info"]["state"] == await call("getState", vm) == "NOT_STARTED"
        assert made["info"]["requesterPid"] == os.getpid()
        number = await call("subscribe", {"cids": [cid]})
        await call("start", vm, {"timeout": 20})
        event = await call.event("payload_ready")
        assert (event["cid"], event["uid"], event["driver"]) == (cid, os.getuid(), "simulated")
        assert await call("getState", vm) == "READY"
        assert [row["cid"] for row in await call("listVms")] == [cid]
        assert (await call("debugListVms"))[0]["cid"] == cid
        assert f"VM CID: {cid}" in await call("dump")
        assert (await call("usage", vm))["memory"]["totalKib"] > 0
        assert (await call("guestCalls", vm))["calls"] == 2
        await call("suspend", vm)
        assert (await call("getInfo", vm))["suspended"] is True
        await call("resume", vm)
        await call("onTrimMemory", vm, "TRIM_MEMORY_RUNNING_LOW")
        await call("publishMessage", vm, "guest_to_host", 7000, "hello")
        assert (await call.event("vsock_message"))["text"] == "hello"
        await call("stop", vm)
        died = await call.event("died")
        assert (died["reason"], died["final"]) == ("KILLED", True)
        assert (await call("wait", vm))["seq"] == died["seq"]
        assert await call("listVms") == []
        assert await call("getState", vm) == "DEAD"
        with pytest.raises(IllegalStateError):
            await call("start", vm)
        await call("closeVm", vm)
        with pytest.raises(IllegalArgumentError, match="no VM has this handle"):
            await call("getState", vm)
        await call("unsubscribe", number)


async def test_connect_vsock_answers_a_descriptor_of_the_stream(short_dir: Path) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        made = await call.create(short_dir, "started", "ready", "serve")
        await call("subscribe")
        await call("start", made["vm"])
        await call.event("payload_ready")
        file = await call("connectVsock", made["vm"], 5000)
        assert isinstance(file, ReceivedFile)
        assert not os.get_inheritable(file.fileno())
        with socket.socket(fileno=file.detach()) as stream:
            stream.setblocking(True)
            stream.settimeout(SECONDS)
            stream.sendall(b"echo over the socket\n")
            assert await anyio.to_thread.run_sync(stream.recv, 100) == b"ok over the socket\n"


@pytest.mark.parametrize("leave", ["close the connection", "close the handle"])
async def test_a_vm_dies_with_the_connection_or_handle_of_its_creator(short_dir: Path, leave: str) -> None:
    async with daemon(short_dir) as served, client(served.path) as other:
        await other("subscribe")
        async with client(served.path) as call:
            vm = (await call.create(short_dir, "started", "ready", "serve"))["vm"]
            await call("start", vm)
            if leave == "close the handle":
                await call("closeVm", vm)
                assert served.service.list_vms() == []
        assert (await other.event("died"))["reason"] == "KILLED"
        await until_gone(served.service)


async def test_a_kept_vm_outlives_its_connection_and_can_be_opened_from_another(short_dir: Path) -> None:
    async with daemon(short_dir) as served:
        async with client(served.path) as call:
            made = await call.create(short_dir, "started", "ready", "serve", keep=True)
            await call("start", made["vm"])
        async with client(served.path) as call:
            assert [row["state"] for row in await call("listVms")] != []
            with pytest.raises(IllegalArgumentError, match="no VM has this handle"):
                await call("getState", made["vm"])  # a handle is of one connection
            opened = await call("openVm", made["info"]["cid"])
            assert opened["info"]["cid"] == made["info"]["cid"]
            await call("closeVm", opened["vm"])
            assert len(await call("listVms")) == 1
            assert await call("shutdownVms", {"kill": 10}) == {str(made["info"]["cid"]): {"rung": "KILL"}}
            with pytest.raises(IllegalArgumentError, match="no VM with CID"):
                await call("openVm", made["info"]["cid"])


async def test_calls_are_answered_in_any_order_and_a_late_one_is_given_up_by_its_deadline(
    short_dir: Path,
) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        vm = (await call.create(short_dir, "started", "ready", "serve"))["vm"]
        await call("start", vm)
        ended: list[str] = []

        async def wait() -> None:
            await call("wait", vm)
            ended.append("wait")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            assert (await call("hello"))["version"] == 1
            ended.append("hello")
            with pytest.raises(DeadlineExceededError):
                await call.connection.call("wait", vm, timeout=0.01)
            await call("stop", vm)
        assert ended == ["hello", "wait"]


async def test_a_subscription_begins_as_asked_and_ends_with_the_vm(short_dir: Path) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        made = await call.create(short_dir, "started", "ready", "serve", keep=True)
        await call("start", made["vm"])
        await call("subscribe", {"snapshot": True, "untilEnd": True})
        assert [row["cid"] for row in (await call.event("snapshot"))["vms"]] == [made["info"]["cid"]]
        await call("stop", made["vm"])
        died = await call.event("died")
        assert await call.told.receive() == ("subscriptionEnd", [1, None])
        assert await call("subscribe", {"after": died["seq"] - 1}) == 2
        assert await call.event("died") == died | {"previous": died["seq"] - 1}
        assert await call("subscribe", {"late": True, "kinds": ["died"]}) == 3
        assert (await call.event("died"))["seq"] == died["seq"]


WRONG: dict[str, tuple[str, list[Any]]] = {
    "no such method": ("fly", []),
    "too few parameters": ("getState", []),
    "too many": ("listVms", [1]),
    "an unknown option": ("start", ["x", {"patience": 1}]),
    "no handle": ("getState", [7]),
    "a list for a handle": ("getState", [[]]),
    "no configuration": ("createVm", [{}]),
    "a text for a descriptor": ("createVm", [{"rawConfig": {"name": "x", "kernel": "/etc/passwd"}}]),
    "a number for a descriptor": ("createVm", [{"rawConfig": {"name": "x", "kernel": 0}}]),
    "a version that is not spoken": ("hello", [{"version": 2}]),
    "a kind that is not known": ("subscribe", [{"kinds": ["birthday"]}]),
    "a stream that begins twice": ("subscribe", [{"late": True, "snapshot": True}]),
    "a number of the future": ("subscribe", [{"after": 10**9}]),
    "a subscription that is not there": ("unsubscribe", [1]),
    "no image": ("initializeWritablePartition", ["/etc/passwd", 4096, "RAW"]),
    "a truth for a number": ("openVm", [True]),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_can_never_be_right_is_refused_and_the_connection_goes_on(
    short_dir: Path, case: str
) -> None:
    method, params = WRONG[case]
    async with daemon(short_dir) as served, client(served.path) as call:
        with pytest.raises((IllegalArgumentError, UnsupportedOperationError)):
            await call(method, *params)
        assert await call("listVms") == []


async def test_partitions_and_idsigs_are_made_in_the_descriptors_that_are_sent(short_dir: Path) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        with (short_dir / "partition").open("w+b") as file:
            size = await call("initializeWritablePartition", Attached(file.fileno()), 5000, "RAW")
            assert size == 8192
            assert file.read(4) == b"QFI\xfb"
            with pytest.raises(Exception, match=r"regular file|APK|ZIP|Zip|small"):
                await call("createOrUpdateIdsigFile", Attached(file.fileno()), Attached(file.fileno()))


async def test_a_handler_does_not_need_to_know_its_loop(short_dir: Path) -> None:
    """What is answered in the loop's own callback runs in no task."""
    async with daemon(short_dir) as served, client(served.path) as call:
        made = await call.create(short_dir, "hang")
        for method in ("hello", "info", "listVms", "debugListVms", "dump", "tree"):
            assert await call(method) is not None
        for method in ("getState", "getInfo", "guestCalls"):
            assert await call(method, made["vm"]) is not None


async def many(call: Client, count: int) -> list[Any]:
    answers: list[Any] = []

    async def one() -> None:
        answers.append(await call("listVms"))

    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(one)
    return answers


async def test_thousands_of_calls_at_once_are_all_answered(short_dir: Path) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        assert await many(call, 3000) == [[]] * 3000


def test_every_method_is_in_the_page_and_the_other_way_round() -> None:
    page = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
    table = page.partition("| method | params | result |")[2].partition("\n\n")[0]
    documented = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert documented == set(METHODS)
