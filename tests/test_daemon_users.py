"""Two users of one daemon that runs as root: who sees and may do what, and as whom VMs run.

The kernel tells the daemon who connected; here, the test becomes another user for the moment of connecting.
"""

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest

from tests.daemon_peer import SECONDS, Client, client, daemon
from vmactor import IllegalArgumentError, Policy, SecurityError, VmactorError
from vmactor.daemon.users import Quotas
from vmactor.security.permissions import Grant, Permission, Permissions

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become other users"),
]

ALICE, BOB, EVE, INSPECTOR = 50_001, 50_002, 50_003, 50_004
MANAGERS = Grant(frozenset({ALICE, BOB}))
POLICY = Policy(
    Permissions(
        {
            Permission.MANAGE_VIRTUAL_MACHINE: MANAGERS,
            Permission.USE_CUSTOM_VIRTUAL_MACHINE: MANAGERS,
            Permission.DEBUG_VIRTUAL_MACHINE: Grant(frozenset({INSPECTOR})),
        }
    )
)


@contextmanager
def as_user(uid: int) -> Iterator[None]:
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@asynccontextmanager
async def of(uid: int, path: Path) -> AsyncIterator[Client]:
    """A connection of a user; connecting does not wait, so nothing else runs as him."""
    with ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(socket.socket, "connect", connect_as(uid))
        connecting = client(path)
        call = await connecting.__aenter__()
    try:
        yield call
    finally:
        await connecting.__aexit__(None, None, None)


def connect_as(uid: int) -> object:
    connect = socket.socket.connect

    def connected(self: socket.socket, address: str) -> None:
        with as_user(uid):
            connect(self, address)

    return connected


@asynccontextmanager
async def two_users(directory: Path) -> AsyncIterator[tuple[Client, Client, Path]]:
    directory.chmod(0o711)
    async with (
        daemon(directory, policy=POLICY, quotas=Quotas(vms=2, keep=False)) as served,
        of(ALICE, served.path) as alice,
        of(BOB, served.path) as bob,
    ):
        yield alice, bob, served.path


async def test_a_user_sees_and_controls_his_own_vms_only(short_dir: Path) -> None:
    async with two_users(short_dir) as (alice, bob, path):
        assert (await alice("hello"))["uid"] == ALICE
        made = await alice.create(short_dir, "started", "ready", "serve")
        cid = made["info"]["cid"]
        await bob("subscribe")
        await alice("subscribe")
        await alice("start", made["vm"])
        await alice.event("payload_ready")
        assert [row["cid"] for row in await alice("listVms")] == [cid]
        assert await bob("listVms") == []
        assert (await bob("info"))["vms"] == 0
        with pytest.raises(IllegalArgumentError, match=f"you have no VM with CID {cid}"):
            await bob("openVm", cid)
        for method in ("getState", "start", "stop", "suspend", "connectVsock", "console", "wait", "closeVm"):
            with pytest.raises(IllegalArgumentError):
                await bob(method, made["vm"], *([5000] if method == "connectVsock" else []))
        assert await bob("shutdownVms", {"kill": 1}) == {}
        other = await bob.create(short_dir, "hang")
        own = (await bob.event("created"))["cid"]
        assert own == other["info"]["cid"] != cid, "events of others are not seen"
        async with of(0, path) as root:
            assert {row["cid"] for row in await root("listVms")} == {cid, own}
            opened = await root("openVm", cid)
            await root("stop", opened["vm"])
        assert (await alice.event("died"))["cid"] == cid


@pytest.mark.parametrize(
    ("uid", "may"),
    [
        (0, {"createVm", "listVms", "debugListVms", "dump", "tree"}),
        (ALICE, {"createVm", "listVms"}),
        (EVE, {"listVms"}),
        (INSPECTOR, {"listVms", "debugListVms"}),
    ],
)
async def test_each_user_may_do_what_the_policy_says(short_dir: Path, uid: int, may: set[str]) -> None:
    short_dir.chmod(0o711)
    async with daemon(short_dir, policy=POLICY) as served, of(uid, served.path) as call:
        allowed = set()
        for method in ("createVm", "listVms", "debugListVms", "dump", "tree"):
            try:
                await (call.create(short_dir, "hang") if method == "createVm" else call(method))
            except SecurityError:
                continue
            allowed.add(method)
        assert allowed == may


async def test_an_inspector_sees_the_vms_of_others_and_cannot_touch_them(short_dir: Path) -> None:
    async with two_users(short_dir) as (alice, _bob, path), of(INSPECTOR, path) as inspector:
        cid = (await alice.create(short_dir, "hang"))["info"]["cid"]
        assert [row["cid"] for row in await inspector("listVms")] == [cid]
        assert [row["requesterUid"] for row in await inspector("debugListVms")] == [ALICE]
        with pytest.raises(IllegalArgumentError, match="you have no VM"):
            await inspector("openVm", cid)


async def test_a_vm_runs_as_the_user_who_asked_for_it(short_dir: Path) -> None:
    async with two_users(short_dir) as (alice, _bob, _path):
        made = await alice.create(short_dir, "started", "ready", "serve")
        await alice("subscribe")
        await alice("start", made["vm"])
        await alice.event("payload_ready")
        pid = (await alice("getInfo", made["vm"]))["pid"]
        status = Path(f"/proc/{pid}/status").read_text()
        ids = {line.split(":")[0]: line.split()[1:] for line in status.splitlines()}
        assert ids["Uid"] == [str(ALICE)] * 4
        assert ids["Gid"] == [str(ALICE)] * 4
        assert ids["NoNewPrivs"] == ["1"]
        assert int(ids["CapEff"][0], 16) == 0


async def test_a_users_quota_is_his_own(short_dir: Path) -> None:
    async with two_users(short_dir) as (alice, bob, _path):
        for _ in range(2):
            await alice.create(short_dir, "hang")
        with pytest.raises(VmactorError, match=f"user {ALICE} has 2 VMs, and may have no more"):
            await alice.create(short_dir, "hang")
        with pytest.raises(SecurityError, match="may not have VMs that outlive"):
            await bob.create(short_dir, "hang", keep=True)
        made = await bob.create(short_dir, "hang")
        assert made["info"]["requesterUid"] == BOB


async def test_a_users_vms_end_with_his_connection_and_nobody_elses(short_dir: Path) -> None:
    short_dir.chmod(0o711)
    async with daemon(short_dir, policy=POLICY) as served, of(BOB, served.path) as bob:
        stays = (await bob.create(short_dir, "hang"))["info"]["cid"]
        async with of(ALICE, served.path) as alice:
            await alice.create(short_dir, "hang")
        with anyio.fail_after(SECONDS):
            while len(served.service.list_vms()) > 1:
                await anyio.sleep(0.01)
        assert [row["cid"] for row in await bob("listVms")] == [stays]
