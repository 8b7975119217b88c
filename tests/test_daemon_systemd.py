"""What the daemon and systemd tell each other: sockets, readiness, signs of life."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from vmactor.daemon.systemd import Notifier

pytestmark = pytest.mark.anyio

CHILD = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid()) if sys.argv[1] == "mine" else "1"
os.environ["LISTEN_FDNAMES"] = "a:b"
from vmactor.daemon.systemd import inherited_sockets
from vmactor.errors import IllegalArgumentError
try:
    found = inherited_sockets()
except IllegalArgumentError as error:
    print(error)
else:
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
    assert not any(one.get_inheritable() or one.getblocking() for one in found)
    print(*(one.getsockname() for one in found))
"""


def child(whose: str, *sockets: socket.socket) -> str:
    """What a process makes of sockets that it gets from 3 on."""
    copies = [os.dup(one.fileno()) for one in sockets]
    moved = "".join(f"exec {3 + place}<&{fd}; " for place, fd in enumerate(copies))
    try:
        done = subprocess.run(
            ["bash", "-c", f'{moved} exec "$0" -c "$1" {whose}', sys.executable, CHILD],
            env={**os.environ, "LISTEN_FDS": str(len(copies))},
            pass_fds=copies,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        for fd in copies:
            os.close(fd)
    return done.stdout.strip()


@pytest.fixture
def unix(short_dir: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(short_dir / "one"))
        yield sock


def test_sockets_that_systemd_opened_are_used_and_no_child_gets_them(
    unix: socket.socket, short_dir: Path
) -> None:
    unix.listen()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short_dir / "two"))
        other.listen()
        assert child("mine", unix, other) == f"{short_dir / 'one'} {short_dir / 'two'}"


def test_sockets_of_another_process_are_left_alone(unix: socket.socket) -> None:
    unix.listen()
    assert child("other", unix) == ""


def test_a_socket_that_is_none_to_serve_on_is_refused_with_what_to_do(unix: socket.socket) -> None:
    assert "needs ListenStream" in child("mine", unix)  # it does not listen
    with socket.socket(socket.AF_INET) as inet:
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        assert "needs ListenStream" in child("mine", inet)
    with Path("/dev/null").open() as file:
        assert "cannot be used" in child("mine", file)  # type: ignore[arg-type]


class Systemd:
    """Listens where a daemon tells how it is."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.settimeout(30)

    def told(self) -> list[str]:
        return self.sock.recv(4096).decode().splitlines()


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_by_datagrams(short_dir: Path, abstract: bool) -> None:
    name = f"@vmactor-{os.getpid()}-{time.monotonic_ns()}" if abstract else str(short_dir / "notify")
    systemd = Systemd(name.replace("@", "\0"))
    environment = {"NOTIFY_SOCKET": name}
    with systemd.sock:
        with Notifier(environment) as notifier:
            assert environment == {}  # no child is to speak for the daemon
            notifier.tell("READY=1", "STATUS=serving")
            assert systemd.told() == ["READY=1", "STATUS=serving"]
            before = time.monotonic_ns() // 1000
            notifier.reloading()
            reloading, when = systemd.told()
            assert reloading == "RELOADING=1"
            assert before <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
        assert systemd.told()[0] == "STOPPING=1"


def test_without_systemd_nothing_is_told_and_nothing_fails(short_dir: Path) -> None:
    for environment in ({}, {"NOTIFY_SOCKET": str(short_dir / "nobody")}):
        with Notifier(environment) as notifier:
            notifier.tell("READY=1")
            assert notifier.watchdog_seconds is None


async def test_signs_of_life_come_from_the_event_loop(short_dir: Path) -> None:
    systemd = Systemd(str(short_dir / "notify"))
    environment = {
        "NOTIFY_SOCKET": str(short_dir / "notify"),
        "WATCHDOG_USEC": "20000",
        "WATCHDOG_PID": str(os.getpid()),
    }
    with systemd.sock:
        notifier = Notifier(environment)
        assert notifier.watchdog_seconds == 0.02
        async with anyio.create_task_group() as tasks:
            await tasks.start(notifier.beat)
            for _ in range(3):
                assert await anyio.to_thread.run_sync(systemd.told) == ["WATCHDOG=1"]
            tasks.cancel_scope.cancel()
        systemd.sock.setblocking(False)
        while True:
            try:
                systemd.told()
            except BlockingIOError:
                break
        time.sleep(0.05)  # the loop stands still, and so do the signs
        with pytest.raises(BlockingIOError):
            systemd.told()


@pytest.mark.parametrize("pid", ["1", "none"])
async def test_a_watchdog_that_is_another_process_is_not_beaten_for_it(short_dir: Path, pid: str) -> None:
    environment = {"NOTIFY_SOCKET": str(short_dir / "n"), "WATCHDOG_USEC": "20000", "WATCHDOG_PID": pid}
    notifier = Notifier(environment)
    assert notifier.watchdog_seconds is None
    await notifier.beat()


UNITS = Path(__file__).parent.parent / "systemd"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in (UNITS / "vmactor.service", UNITS / "vmactor.socket"):
        text = unit.read_text().replace("/usr/bin/env vmactor", "/usr/bin/env sh")
        (tmp_path / unit.name).write_text(text)
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", *sorted(str(path) for path in tmp_path.iterdir())],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no systemd-analyze here")
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_the_service_is_killed_in_a_way_that_kept_vms_survive() -> None:
    lines = (UNITS / "vmactor.service").read_text().splitlines()
    assert not [line for line in lines if line.startswith(("Device", "PrivateDevices", "ProtectClock"))]
    assert {"KillMode=process", "RuntimeDirectoryPreserve=yes", "Type=notify"} <= set(lines)
