"""The file that is copied into guests: a real child process, alone in a directory, with the real server."""

import ast
import contextlib
import os
import shutil
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmactor.guest
from tests.guest_rpc_peer import CID, Server, UnixListener, UnixStream, Vm
from vmactor.actors.guest_connection import CloseReason, GuestRpcLimits
from vmactor.actors.guest_rpc import serve_guest_rpc
from vmactor.guest import Host, Incomplete, Refused, Unpacker, Unreachable, pack
from vmactor.messages import (
    ErrorCode,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
)
from vmactor.process import Process
from vmactor.vsock import HybridVsockTransport

SOURCE = Path(vmactor.guest.__file__)


@pytest.fixture
def vm() -> Vm:
    return Vm()


@pytest.fixture
async def server(vm: Vm, short_dir: Path) -> AsyncIterator[Server]:
    async with Server(short_dir / "s").running(vm.report) as server:
        yield server


class Agent:
    """Runs a copy of the file with a bare interpreter: no site packages, no environment, no project."""

    def __init__(self, directory: Path, address: Path) -> None:
        self.file = Path(shutil.copy(SOURCE, directory))
        shutil.copytree(
            SOURCE.parent / "binder", directory / "binder", ignore=shutil.ignore_patterns("__pycache__")
        )
        self.stderr = directory / "stderr"
        self._env = {"VMACTOR_GUEST_RPC": str(address), "PATH": os.environ["PATH"]}

    def spawn(self, *arguments: str) -> Process:
        command = [sys.executable, "-S", "-E", "-W", "error", str(self.file), *arguments]
        with self.stderr.open("wb") as stderr:
            return Process.spawn(command, env=self._env, cwd=self.file.parent, stderr=stderr.fileno())

    async def run(self, *arguments: str) -> int | None:
        """The exit code."""
        process = self.spawn(*arguments)
        try:
            with anyio.fail_after(30):
                return (await process.wait()).code
        finally:
            await process.aclose()


@pytest.fixture
def agent(tmp_path: Path, short_dir: Path) -> Agent:
    return Agent(tmp_path, short_dir / "s")


@pytest.mark.anyio
async def test_a_command_is_run_between_started_and_finished(server: Server, vm: Vm, agent: Agent) -> None:
    assert await agent.run("run", "--", "sh", "-c", "exit 3") == 3
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadFinished(3)]


@pytest.mark.anyio
async def test_a_command_is_run_and_reported_by_rpc_binder(server: Server, vm: Vm, agent: Agent) -> None:
    assert await agent.run("--protocol", "binder", "run", "--", "sh", "-c", "exit 3") == 3
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadFinished(3)]
    assert server.statistics.protocols == {"RPC Binder, version 0x0": 1}
    assert await agent.run("--protocol", "binder", "error", "1", "too late") == 70
    assert "Invalid payload state transition" in agent.stderr.read_text()


@pytest.mark.anyio
async def test_the_payload_itself_says_that_it_is_ready(server: Server, vm: Vm, agent: Agent) -> None:
    assert await agent.run("run", "--", sys.executable, str(agent.file), "ready") == 0
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(0)]


@pytest.mark.anyio
async def test_a_command_killed_by_a_signal_is_an_error(server: Server, vm: Vm, agent: Agent) -> None:
    assert await agent.run("run", "--", "sh", "-c", "kill -9 $$") == 128 + 9
    assert vm.reports == [NotifyPayloadStarted(), NotifyError(ErrorCode.UNKNOWN, "Failed to run payload")]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("command", "code", "text"), [("/no/such", 127, "No such file"), ("/", 126, "Permission denied")]
)
async def test_a_command_that_cannot_be_started_is_an_error(
    server: Server, vm: Vm, agent: Agent, command: str, code: int, text: str
) -> None:
    assert await agent.run("run", "--", command) == code
    assert vm.reports[0] == NotifyPayloadStarted()
    assert isinstance(vm.reports[1], NotifyError)
    assert vm.reports[1].message.startswith("Failed to run payload")
    assert text in vm.reports[1].message


@pytest.mark.anyio
async def test_the_command_gets_a_broken_pipe_s_signal_back(server: Server, vm: Vm, agent: Agent) -> None:
    assert await agent.run("run", "--", "sh", "-c", "kill -PIPE $$; exit 5") == 128 + 13


@pytest.mark.anyio
async def test_a_command_is_not_run_when_the_host_refuses_its_start(
    server: Server, vm: Vm, agent: Agent, tmp_path: Path
) -> None:
    await vm.report(NotifyPayloadReady())
    assert await agent.run("run", "--", "touch", str(tmp_path / "ran")) == 70
    assert not (tmp_path / "ran").exists()


@pytest.mark.anyio
async def test_each_report_can_be_made_by_a_subcommand(server: Server, vm: Vm, agent: Agent) -> None:
    for arguments in (["started"], ["ready"], ["finished", "-5"]):
        assert await agent.run(*arguments) == 0
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(-5)]
    assert await agent.run("ready") == 70
    assert "(-5): Invalid payload state transition from Finished to Ready" in agent.stderr.read_text()


@pytest.mark.anyio
async def test_an_error_can_be_reported_by_a_subcommand(server: Server, vm: Vm, agent: Agent) -> None:
    assert await agent.run("--address", str(server.path), "error", "3", "No täsk" + "k" * 5000) == 0
    assert vm.reports == [NotifyError(ErrorCode.PAYLOAD_CONFIG_INVALID, ("No täsk" + "k" * 5000)[:4096])]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reboot"],
        ["started", "x"],
        ["finished"],
        ["finished", "x"],
        ["finished", "1", "2"],
        ["error", "1"],
        ["run"],
        ["run", "--"],
        ["run", "true"],
        ["--timeout"],
        ["--timeout", "x", "started"],
        ["--address", "p"],
    ],
)
async def test_wrong_usage_is_told(anyio_backend: object, agent: Agent, arguments: list[str]) -> None:
    assert await agent.run(*arguments) == 2
    assert "python3 guest.py run -- COMMAND" in agent.stderr.read_text()


@pytest.mark.anyio
async def test_an_absent_host_is_told_at_the_deadline(agent: Agent) -> None:
    assert await agent.run("--timeout", "0.2", "started") == 69
    assert "notifyPayloadStarted: no answer in 0.2 s" in agent.stderr.read_text()


@pytest.mark.anyio
async def test_a_host_that_is_not_there_yet_is_waited_for(agent: Agent, short_dir: Path) -> None:
    process, vm = agent.spawn("started"), Vm()
    try:
        await anyio.sleep(0.1)  # not for order: so that it usually has to try more than once
        async with Server(short_dir / "s").running(vm.report):
            with anyio.fail_after(30):
                assert (await process.wait()).code == 0
    finally:
        await process.aclose()
    assert vm.reports == [NotifyPayloadStarted()]


@pytest.mark.anyio
async def test_it_works_through_the_hybrid_transport(tmp_path: Path, short_dir: Path) -> None:
    short_dir.chmod(0o700)
    pids: list[int] = []
    transport = HybridVsockTransport(CID, short_dir / "v", lambda: pids[0] if pids else None)
    vm, agent = Vm(), Agent(tmp_path, short_dir / f"v_{CID}")
    listener = transport.listen(CID)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: serve_guest_rpc(listener, vm.report, cid=CID))
            process = agent.spawn("run", "--", "true")
            pids.append(process.pid)  # the peer has to be the helper; here that is the agent itself
            try:
                with anyio.fail_after(30):
                    assert (await process.wait()).code == 0
            finally:
                await process.aclose()
            tasks.cancel_scope.cancel()
    finally:
        await listener.aclose()
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadFinished(0)]


@pytest.mark.anyio
async def test_a_connection_that_the_host_closed_is_made_anew(vm: Vm, short_dir: Path) -> None:
    async with Server(short_dir / "s").running(vm.report, GuestRpcLimits(idle_time=0.01)) as server:
        with Host(str(server.path)) as host:
            for report in (host.notify_payload_started, host.notify_payload_ready):
                await anyio.to_thread.run_sync(report)
                await server.until_open(0)
        assert server.statistics.closed == {CloseReason.IDLE: 2}
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady()]


@pytest.mark.anyio
async def test_a_refusal_has_its_code_and_text_and_the_next_report_may_be_made(
    server: Server, vm: Vm
) -> None:
    def use() -> Refused:
        with Host(str(server.path)) as host:
            host.notify_payload_ready()
            with pytest.raises(Refused) as refused:
                host.notify_payload_started()
            host.notify_payload_finished(0)
            return refused.value

    error = await anyio.to_thread.run_sync(use)
    assert (error.code, error.message) == (-5, "Invalid payload state transition from Ready to Started")
    assert vm.reports == [NotifyPayloadReady(), NotifyPayloadFinished(0)]
    assert server.statistics.connections == 1


class ScriptedHost:
    """A host that gives each connection's first request an answer of its list, then closes; None: none."""

    def __init__(self, path: Path, *answers: bytes | None) -> None:
        self._listener = UnixListener(path)
        self._answers = answers
        self.requests: list[Any] = []

    async def use(self, call: Callable[[], object]) -> object:
        """Run a blocking function against this host."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._serve)
                result = await anyio.to_thread.run_sync(call)
                tasks.cancel_scope.cancel()
        finally:
            await self._listener.aclose()
        return result

    async def _serve(self) -> None:
        held: list[UnixStream] = []
        try:
            for answer in self._answers:
                held.append(stream := await self._listener.accept())
                self.requests.append(msgpack.unpackb(await stream.receive()))
                if answer is not None:
                    with contextlib.suppress(anyio.BrokenResourceError):  # it need not hear all of it
                        await stream.send(answer)
                    await stream.aclose()
            await anyio.sleep_forever()
        finally:
            for stream in held:
                stream.sock.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "final",
    [[1, 1, None, None], [1, 1, [-5, "Invalid payload state transition from Started to Started"], None]],
)
async def test_a_report_whose_answer_was_lost_is_made_again(short_dir: Path, final: list[object]) -> None:
    host = ScriptedHost(short_dir / "s", b"", msgpack.packb(final))

    def use() -> None:
        with Host(str(short_dir / "s")) as guest:
            guest.notify_payload_started()

    await host.use(use)
    assert host.requests == [[0, 1, "notifyPayloadStarted", []]] * 2


@pytest.mark.anyio
async def test_a_lost_answer_hides_no_other_refusal(short_dir: Path) -> None:
    def use() -> None:
        with Host(str(short_dir / "s")) as host, pytest.raises(Refused, match="no such VM"):
            host.notify_payload_started()

    await ScriptedHost(short_dir / "s", b"", msgpack.packb([1, 1, [-8, "no such VM", {}], None])).use(use)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="none"),
        pytest.param(b"\xc1", id="not MessagePack"),
        pytest.param(msgpack.packb([1, 2, None, None]), id="somebody else's"),
        pytest.param(msgpack.packb([0, 1, "reboot", []]), id="a request"),
        pytest.param(msgpack.packb("yes"), id="no array"),
        pytest.param(b"\xdb\xff\xff\xff\xff" + b"x" * 100_000, id="without end"),
        pytest.param(b"\x91" * 30_000, id="nested without end"),
    ],
)
async def test_a_useless_answer_is_no_answer(short_dir: Path, answer: bytes | None) -> None:
    def use() -> None:
        with Host(str(short_dir / "s"), timeout=0.1) as host, pytest.raises(Unreachable):
            host.notify_payload_started()

    await ScriptedHost(short_dir / "s", *[answer] * 20).use(use)


@pytest.mark.anyio
async def test_after_a_deadline_the_next_report_is_made_on_a_new_connection(short_dir: Path) -> None:
    def use() -> None:
        with Host(str(short_dir / "s"), timeout=0.1) as host:
            with pytest.raises(Unreachable):
                host.notify_payload_started()
            host.timeout = 30
            host.notify_payload_ready()

    host = ScriptedHost(short_dir / "s", None, msgpack.packb([1, 2, None, None]))
    await host.use(use)
    assert host.requests == [[0, 1, "notifyPayloadStarted", []], [0, 2, "notifyPayloadReady", []]]


PACKABLE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=20),
    max_leaves=40,
)
UNPACKABLE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=20) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=20)
    ),
    max_leaves=10,
)


def nesting(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(nesting, value), default=0) if isinstance(value, list) else 0


@given(value=PACKABLE)
def test_its_encoder_gives_the_bytes_that_msgpack_gives(value: object) -> None:
    assert pack(value) == msgpack.packb(value)


@pytest.mark.parametrize("size", [15, 16, 31, 32, 255, 256, 65535, 65536])
def test_its_encoder_agrees_at_every_change_of_form(size: int) -> None:
    for value in ("x" * size, b"x" * size, [None] * size, size, -size):
        assert pack(value) == msgpack.packb(value)
        assert Unpacker(pack(value)).value() == value


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, 1.5, {}, object()])
def test_its_encoder_refuses_what_it_cannot_say(value: object) -> None:
    with pytest.raises((OverflowError, TypeError)):
        pack(value)


@given(value=UNPACKABLE.filter(lambda value: nesting(value) <= 16))
def test_its_decoder_reads_what_msgpack_writes_and_waits_for_the_rest(value: object) -> None:
    data = msgpack.packb(value)
    unpacker = Unpacker(data)
    assert repr(unpacker.value()) == repr(value)
    assert unpacker.offset == len(data)
    for end in {0, len(data) // 2, len(data) - 1}:
        with pytest.raises(Incomplete):
            Unpacker(data[:end]).value()


@given(data=st.binary(max_size=200))
def test_its_decoder_takes_any_bytes(data: bytes) -> None:
    with contextlib.suppress(Incomplete, ValueError):
        Unpacker(data).value()


def test_it_imports_only_the_standard_library_and_little_of_it() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    names = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    beside = {"binder", "vmactor.binder"}  # for RPC Binder only, when it is asked for
    assert names == {"__future__", "fcntl", "os", "signal", "socket", "struct", "sys", "time"} | beside


def test_its_binder_client_runs_on_python_3_8_and_imports_only_the_standard_library() -> None:
    names = set()
    for name in "__init__", "parcel", "wire", "client":
        tree = ast.parse((SOURCE.parent / "binder" / f"{name}.py").read_text(), feature_version=(3, 8))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names.add("." * node.level + (node.module or ""))
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
    assert names == {"__future__", "enum", "socket", "struct", "typing", ".parcel", ".wire"}


def test_the_guest_s_cid_is_asked_of_its_vsock_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's side exists only in a guest; what is checked is the request and how its answer is read."""
    import fcntl

    asked = []

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        asked.append((str(Path(f"/proc/self/fd/{fd}").readlink()), request, len(argument)))
        return struct.pack("=I", answers.pop())

    answers = [0xFFFFFFFF, 2051]
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real_open({"/dev/vsock": "/dev/null"}[path], flags))
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert vmactor.guest.own_cid() == 2051
    with pytest.raises(OSError, match="no CID yet"):
        vmactor.guest.own_cid()
    assert asked == [("/dev/null", 0x7B9, 4)] * 2
    assert (vmactor.guest.VMADDR_CID_HOST, socket.VMADDR_CID_HOST) == (2, 2)
