"""Clients that mean harm, on the daemon's real socket: each is refused, and nobody else notices."""

import array
import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import msgpack
import pytest

from tests.daemon_peer import SECONDS, Client, RawClient, client, daemon
from tests.residue import descriptors
from vmactor import IllegalArgumentError, VmactorError
from vmactor.daemon.users import Quotas
from vmactor.rpc.files import Attached
from vmactor.rpc.framing import SERVER

pytestmark = pytest.mark.anyio


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def until_closed(raw: RawClient) -> list[object]:
    """All that comes until the daemon closes."""
    said = []
    with contextlib.suppress(ConnectionError):
        while (message := raw.receive()) is not None:
            said.append(message)
    return said


def files_that_no_message_names(raw: RawClient) -> None:
    for number in range(20):
        with Path("/dev/null").open() as null:
            send_fds(raw.sock, msgpack.packb([0, number, "listVms", []]), [null.fileno()] * 100)
        assert raw.receive()[2] is None


def files_in_the_middle_of_a_message(raw: RawClient) -> None:
    data = msgpack.packb([0, 1, "listVms", []])
    raw.sock.sendall(data[:3])
    time.sleep(0.01)
    with Path("/dev/null").open() as null:
        send_fds(raw.sock, data[3:], [null.fileno()] * 10)
    assert raw.receive()[2] is None


def files_with_a_message_that_never_ends(raw: RawClient) -> None:
    with Path("/dev/null").open() as null:
        send_fds(raw.sock, b"\x94\x00\x01\xa7list", [null.fileno()] * 50)


def half_a_message(raw: RawClient) -> None:
    raw.sock.sendall(msgpack.packb([0, 1, "listVms", []])[:-1])


def garbage(raw: RawClient) -> None:
    raw.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    (answer,) = until_closed(raw)
    assert answer[:2] == [1, None]  # type: ignore[index]


def an_endless_message(raw: RawClient) -> None:
    raw.sock.sendall(b"\x94\x00\x01\xa7listVms\x91\xc6\x10\x00\x00\x00")
    with contextlib.suppress(OSError):  # it closes in the middle
        for _ in range(300):
            raw.sock.sendall(bytes(1 << 16))
        raise AssertionError("nobody refused 19 MiB in one message")


def a_flood_whose_answers_nobody_reads(raw: RawClient) -> None:
    raw.sock.settimeout(0.5)
    request = msgpack.packb([0, 1, "fly" * 20, []]) * 1000
    with contextlib.suppress(TimeoutError):  # the daemon reads no more: that is what saves its memory
        for _ in range(1000):
            raw.sock.sendall(request)
        raise AssertionError("the daemon took in a million calls without an answer being read")


def more_calls_at_once_than_are_allowed(raw: RawClient) -> None:
    raw.send(0, 0, "listVms", [])
    raw.send(0, 1, "openVm", [raw.receive()[3][0]["cid"]])
    vm = raw.receive()[3]["vm"]
    raw.sock.sendall(b"".join(msgpack.packb([0, number, "wait", [vm]]) for number in range(300)))
    refused = [raw.receive() for _ in range(300 - SERVER.outstanding)]
    assert [answer[1] for answer in refused] == [*range(SERVER.outstanding, 300)]
    assert all("256 calls are under way" in answer[2][1] for answer in refused)


def answers_to_questions_that_nobody_asked(raw: RawClient) -> None:
    for number in range(100):
        raw.send(1, number, None, "yes")
    raw.send(0, 1, "listVms", [])
    assert raw.receive()[:3] == [1, 1, None]


def notifications_that_nobody_knows(raw: RawClient) -> None:
    for number in range(100):
        raw.send(2, f"x{number}", [number])
    raw.send(2, b"binary", [])
    raw.send(0, 1, b"listVms", [])
    assert raw.receive()[:3] == [1, 1, None]


HOSTILE: list[Callable[[RawClient], None]] = [
    files_that_no_message_names,
    files_in_the_middle_of_a_message,
    files_with_a_message_that_never_ends,
    half_a_message,
    garbage,
    an_endless_message,
    a_flood_whose_answers_nobody_reads,
    more_calls_at_once_than_are_allowed,
    answers_to_questions_that_nobody_asked,
    notifications_that_nobody_knows,
]


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
async def test_a_hostile_client_is_refused_and_another_works_alongside(
    short_dir: Path, attack: Callable[[RawClient], None]
) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        made = await call.create(short_dir, "started", "ready", "serve")
        await call("start", made["vm"])
        await call("listVms")
        before = len(descriptors())
        over = anyio.Event()

        def strike() -> None:
            with RawClient(served.path) as raw:
                attack(raw)

        async def work() -> None:
            while not over.is_set():
                assert await call("getState", made["vm"]) in {"STARTED", "READY"}
                await anyio.sleep(0.001)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            await anyio.to_thread.run_sync(strike)
            over.set()
        with anyio.fail_after(SECONDS):
            while len(descriptors()) > before:
                await anyio.sleep(0.01)
        assert served.service.list_vms()


def fifo(directory: Path) -> int:
    os.mkfifo(directory / "fifo")
    return os.open(directory / "fifo", os.O_RDWR)


UNFIT: dict[str, Callable[[Path], int]] = {
    "a path only": lambda directory: os.open(directory, os.O_PATH),
    "a file of which only the place is open": lambda _: os.open("/etc/passwd", os.O_PATH),
    "a directory": lambda directory: os.open(directory, os.O_RDONLY),
    "a pipe": fifo,
    "a file that cannot be read": lambda directory: os.open(directory / "w", os.O_WRONLY | os.O_CREAT, 0o600),
    "a device": lambda _: os.open("/dev/zero", os.O_RDWR),
    "a socket": lambda _: socket.socket(socket.AF_UNIX).detach(),
}


@pytest.mark.parametrize("kind", UNFIT)
async def test_descriptors_that_will_not_do_are_refused_when_they_come(short_dir: Path, kind: str) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        fd = UNFIT[kind](short_dir)
        try:
            with anyio.fail_after(SECONDS):
                with pytest.raises(VmactorError):
                    await call("createVm", {"rawConfig": {"name": "x", "kernel": Attached(fd)}})
                with pytest.raises(VmactorError):
                    await call("initializeWritablePartition", Attached(fd), 4096, "RAW")
        finally:
            os.close(fd)
        assert await call("listVms") == []


async def test_a_user_has_no_more_than_his_quota(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmactor.daemon import users

    quotas = Quotas(connections=2, vms=1, subscriptions=1)
    monkeypatch.setattr(users, "_PRIVILEGED", quotas)  # what others have
    async with daemon(short_dir, quotas=quotas) as served, client(served.path) as call:
        await call.create(short_dir, "hang")
        with pytest.raises(VmactorError, match="has 1 VMs, and may have no more"):
            await call.create(short_dir, "hang")
        await call("subscribe")
        with pytest.raises(VmactorError, match="has 1 subscriptions"):
            await call("subscribe")
        with pytest.raises(VmactorError, match="may not have VMs that outlive"):
            await call.create(short_dir, "hang", keep=True)
        async with client(served.path) as second:
            assert len(await second("listVms")) == 1

            def third() -> list[object]:
                with RawClient(served.path) as raw:
                    return until_closed(raw)

            (refusal,) = await anyio.to_thread.run_sync(third)
            assert "has 2 connections, and may have no more" in str(refusal)
        await _again(served.path)


async def _again(path: Path) -> None:
    """A connection that has ended makes room, a little later."""

    def connects() -> bool:
        with RawClient(path) as raw, contextlib.suppress(ConnectionError):
            raw.send(0, 1, "listVms", [])
            answer = raw.receive()
            return answer is not None and answer[2] is None
        return False

    with anyio.fail_after(SECONDS):
        while not await anyio.to_thread.run_sync(connects):
            await anyio.sleep(0.01)


async def test_a_handle_of_one_connection_is_worth_nothing_on_another(short_dir: Path) -> None:
    async with daemon(short_dir) as served, client(served.path) as one, client(served.path) as two:
        handles = {(await call_open(one, short_dir)) for _ in range(20)}
        assert len(handles) == 20
        assert min(map(len, handles)) >= 22, "128 bits"
        for handle in handles:
            with pytest.raises(IllegalArgumentError, match="no VM has this handle"):
                await two("stop", handle)


async def call_open(call: Client, directory: Path) -> str:
    return str((await call.create(directory, "hang"))["vm"])
