"""The daemon as people operate it: signals, reloading, systemd, keeping, and being killed."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import msgpack
import pytest

from tests.keeping_manager import MARK, marked

ROOT = Path(__file__).parent.parent


class Daemon:
    """``vmactor serve`` as a process, with a connection to it."""

    def __init__(self, directory: Path, config: str = "") -> None:
        self.directory = directory
        self.socket = directory / "d.sock"
        self.config = directory / "vmactor.toml"
        self.write_config(config)
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes]
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(directory / "notify"))
        self.notify.settimeout(60)
        self.environment = {
            **os.environ,
            MARK: str(directory / "state"),
            "NOTIFY_SOCKET": str(directory / "notify"),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.notify.close()
        for pid in marked(self.directory / "state"):
            os.kill(pid, signal.SIGKILL)

    def write_config(self, text: str) -> None:
        self.config.write_text(text)
        self.config.chmod(0o644)

    def start(self, *arguments: str, ready: bool = True) -> None:
        options = ("--config", self.config, "--state-dir", self.directory / "state", "--vmm", "simulated")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmactor", "serve", *options, "--socket", self.socket, *arguments],
                env=self.environment,
                stderr=log,
            )
        if ready:
            self.wait_for("READY=1")

    def wait_for(self, line: str) -> list[str]:
        """Wait until systemd would be told something; all lines of that message."""
        while True:
            assert self.process.poll() is None, self.log.read_text()
            lines = self.notify.recv(4096).decode().splitlines()
            if line in lines:
                return lines

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


class Client:
    """A connection, by hand."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self.sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.sock.settimeout(60)
        self.sock.connect(str(path))
        self._unpacker = msgpack.Unpacker()
        self._number = 0
        self.notifications: list[Any] = []

    def send(self, method: str, *params: Any, files: tuple[int, ...] = ()) -> int:
        self._number += 1
        data = msgpack.packb((0, self._number, method, params))
        if files:
            socket.send_fds(self.sock, [data], list(files))
        else:
            self.sock.sendall(data)
        return self._number

    def receive(self) -> Any:
        while True:
            for message in self._unpacker:
                return message
            data = self.sock.recv(65536)
            if not data:
                raise EOFError
            self._unpacker.feed(data)

    def events_to_the_end(self) -> Iterator[Any]:
        """The events that come until the daemon hangs up."""
        with suppress(EOFError):
            while True:
                _, method, params = self.receive()
                if method == "event":
                    yield params[1]

    def call(self, method: str, *params: Any, files: tuple[int, ...] = ()) -> Any:
        number = self.send(method, *params, files=files)
        while True:
            message = self.receive()
            if message[0] == 2:
                self.notifications.append(message)
            elif message[1] == number:
                if message[2] is not None:
                    raise RefusedError(message[2])
                return message[3]

    def create(self, kernel: Path, script: str = "started;ready;serve", **options: Any) -> Any:
        """A VM that runs."""
        with kernel.open("rb") as file:
            config = {"name": "one", "kernel": msgpack.ExtType(1, b"\0")}
            config["params"] = f'vmactor.script="{script}"'
            made = self.call("createVm", {"rawConfig": config}, options, files=(file.fileno(),))
        self.call("start", made["vm"])
        return made


class RefusedError(Exception):
    """The daemon's answer."""


@pytest.fixture
def kernel(short_dir: Path) -> Path:
    path = short_dir / "kernel"
    path.touch()
    return path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_kept_vm_outlives_its_connection_and_a_daemon_that_is_killed(
    short_dir: Path, kernel: Path, stack: ExitStack
) -> None:
    daemon = stack.enter_context(Daemon(short_dir))
    daemon.start()
    client = Client(stack, daemon.socket)
    kept, other = client.create(kernel, keep=True), client.create(kernel)
    cid = kept["info"]["cid"]
    client.call("subscribe", {"cids": [cid]})
    seq = client.call("subscribe", {})  # its number; the cursor comes from the events
    assert seq == 2
    daemon.process.kill()
    daemon.process.wait()
    daemon.start()
    again = Client(stack, daemon.socket)
    (vm,) = again.call("listVms")
    assert (vm["cid"], vm["kept"], vm["pid"]) == (cid, True, kept["info"].get("pid") or vm["pid"])
    again.call("subscribe", {"after": 0})
    kinds = []
    while "reaped" not in kinds:
        message = again.receive()
        kinds.append(message[2][1]["event"])
    assert kinds.index("manager_restarted") < kinds.index("adopted")
    handle = again.call("openVm", cid)["vm"]
    again.call("suspend", handle)
    again.call("resume", handle)
    again.call("stop", handle)
    assert again.call("listVms") == []
    assert other["info"]["cid"] != cid
    daemon.process.terminate()
    assert daemon.process.wait(60) == 0


def test_the_first_signal_drains_and_kept_vms_live_on(
    short_dir: Path, kernel: Path, stack: ExitStack
) -> None:
    daemon = stack.enter_context(Daemon(short_dir))
    daemon.start()
    client = Client(stack, daemon.socket)
    kept, other = client.create(kernel, keep=True), client.create(kernel)
    client.call("subscribe", {"cids": [other["info"]["cid"]]})
    daemon.process.terminate()
    daemon.wait_for("STOPPING=1")
    assert daemon.process.wait(60) == 0
    (died,) = (event for event in client.events_to_the_end() if event["event"] == "died")
    assert (died["reason"], died["stoppedBy"]) == ("SHUTDOWN", "POWER_BUTTON")
    assert len(marked(short_dir / "state")) == 1
    daemon.start()
    assert [vm["cid"] for vm in Client(stack, daemon.socket).call("listVms")] == [kept["info"]["cid"]]


def test_while_it_drains_no_vm_is_taken_and_the_second_signal_ends_it_at_once(
    short_dir: Path, kernel: Path, stack: ExitStack
) -> None:
    daemon = stack.enter_context(Daemon(short_dir, "[service]\ndrain_seconds = 3600\n"))
    daemon.start()
    client = Client(stack, daemon.socket)
    client.create(kernel, "started;deaf;ready;control silent;serve")
    daemon.process.terminate()
    daemon.wait_for("STOPPING=1")
    with pytest.raises(RefusedError, match="takes no more VMs"):
        client.create(kernel)
    daemon.process.terminate()
    assert daemon.process.wait(60) == 0
    assert marked(short_dir / "state") == set()
    assert not daemon.socket.exists()


def test_a_signal_to_reload_changes_what_can_be_changed_and_names_the_rest(
    short_dir: Path, kernel: Path, stack: ExitStack
) -> None:
    policy = short_dir / "policy.json"
    policy.write_text("{}")
    policy.chmod(0o644)
    daemon = stack.enter_context(Daemon(short_dir, "[log]\nformat = 'json'\n"))
    daemon.start()
    daemon.write_config(
        f"[log]\nformat = 'json'\nlevel = 'debug'\n[users]\nvms = 3\n[service]\npolicy = '{policy}'\n"
        "[metrics]\nlisten = '/x'\n"
    )
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.wait_for("RELOADING=1")[1].startswith("MONOTONIC_USEC=")
    daemon.wait_for("READY=1")
    (told,) = (line for line in daemon.lines() if "started anew" in line["event"])
    assert told["options"] == "metrics.listen"
    daemon.write_config("[service]\nsocket = 1\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("RELOADING=1")
    daemon.wait_for("READY=1")
    (told,) = (line for line in daemon.lines() if "cannot be used" in line["event"])
    assert "service.socket: must be text" in told["error"]
    assert Client(stack, daemon.socket).call("listVms") == []


def test_lines_of_the_log_tell_which_vm_and_run_they_are_of(
    short_dir: Path, kernel: Path, stack: ExitStack
) -> None:
    daemon = stack.enter_context(Daemon(short_dir, "[log]\nformat = 'json'\n"))
    daemon.start()
    made = Client(stack, daemon.socket).create(kernel)
    (line,) = (line for line in daemon.lines() if line["event"] == "started")
    assert (line["vm"], line["cid"], line["generation"]) == ("one", made["info"]["cid"], 1)
    assert line["level"] == "info"
    assert line["time"].endswith("Z")


def test_the_metrics_are_served_where_the_configuration_says(
    short_dir: Path, kernel: Path, stack: ExitStack
) -> None:
    where = short_dir / "metrics.sock"
    daemon = stack.enter_context(Daemon(short_dir, f"[metrics]\nlisten = '{where}'\n"))
    daemon.start()
    Client(stack, daemon.socket).create(kernel)
    scraper = stack.enter_context(socket.socket(socket.AF_UNIX))
    scraper.settimeout(60)
    scraper.connect(str(where))
    scraper.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    page = b""
    while data := scraper.recv(65536):
        page += data
    assert b"vmactor_connections 1.0" in page
    assert b'vmactor_events_total{kind="started"} 1.0' in page


def test_it_serves_on_the_socket_that_systemd_opened(short_dir: Path, stack: ExitStack) -> None:
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(short_dir / "given.sock"))
    listener.listen()
    client = Client(stack, short_dir / "given.sock")  # before the daemon is there
    number = client.send("listVms")
    daemon = stack.enter_context(Daemon(short_dir))
    shell = 'exec 3<&$0; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    serve = [sys.executable, "-m", "vmactor", "serve", "--vmm", "simulated"]
    daemon.process = subprocess.Popen(
        ["bash", "-c", shell, str(listener.fileno()), *serve, "--state-dir", str(short_dir / "state")],
        env=daemon.environment,
        pass_fds=[listener.fileno()],
        stderr=subprocess.DEVNULL,
    )
    assert daemon.wait_for("READY=1")[1] == f"STATUS=serving on {short_dir / 'given.sock'}"
    assert client.receive() == [1, number, None, []]
    daemon.process.terminate()
    assert daemon.process.wait(60) == 0
    assert (short_dir / "given.sock").exists()  # it is systemd's


def test_a_second_daemon_is_refused_and_a_stale_socket_is_replaced(short_dir: Path, stack: ExitStack) -> None:
    daemon = stack.enter_context(Daemon(short_dir))
    daemon.start()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vmactor", "serve", "--vmm", "simulated"),
            *("--socket", daemon.socket, "--state-dir", short_dir / "other"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "a daemon listens" in done.stderr
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.socket.exists()
    daemon.start()
    assert Client(stack, daemon.socket).call("listVms") == []


@pytest.mark.parametrize("text", ["[service]\nsokcet = '/x'\n", "[metrics]\nlisten = '192.0.2.1:9'\n"])
def test_what_cannot_be_served_ends_with_an_error_that_names_it(
    short_dir: Path, stack: ExitStack, text: str
) -> None:
    daemon = stack.enter_context(Daemon(short_dir, text))
    daemon.start(ready=False)
    assert daemon.process.wait(60) == 1
    assert "sokcet" in daemon.log.read_text() or "cannot listen for metrics" in daemon.log.read_text()
