"""The server of guests against an RPC Binder client that nobody here wrote: the Rust crate ``rsbinder``.

It is weaker than a real guest in some points (it believes the interface's name, and does not look at the
stability), so the dumps of ``test_binder_wire.py`` stay the first oracle.
"""

from pathlib import Path

import anyio
import pytest

from tests.guest_rpc_peer import Server, Vm
from tests.rsbinder_peer import built
from vmactor.actors.guest_binder import GuestBinder
from vmactor.binder.wire import EXPERIMENTAL_VERSION
from vmactor.messages import (
    ErrorCode,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
)

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]  # the first test compiles


@pytest.fixture(scope="module")
def peer() -> Path:
    return built()


async def speak(peer: Path, server: Server, version: int, *steps: str) -> list[str]:
    """Run the client and return what it printed."""
    with anyio.fail_after(60):
        done = await anyio.run_process([peer, server.path, str(version), *steps], check=False)
    assert not done.stderr
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize("highest", [0, 1])
@pytest.mark.parametrize("offered", [0, 1, 2, EXPERIMENTAL_VERSION])
async def test_rsbinder_leads_a_payloads_life(
    peer: Path, short_dir: Path, offered: int, highest: int
) -> None:
    vm = Vm()
    binder = GuestBinder(version=1 if highest else 0)
    async with Server(short_dir / "s").running(vm.report, binder=binder) as server:
        lines = await speak(peer, server, offered, "ping", "started", "ready", "finished:-7", "ready", "ping")
    spoken = 0 if offered == EXPERIMENTAL_VERSION else min(offered, highest)
    assert lines == [
        f"session version {spoken} threads 1 identity 32",
        "ping: ok",
        "started: ok",
        "ready: ok",
        "finished:-7: ok",
        "ready: exception -5 0 Invalid payload state transition from Finished to Ready",
        "ping: ok",
    ]
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(-7)]
    assert server.statistics.protocols == {f"RPC Binder, version {spoken:#x}": 1}


async def test_rsbinder_tells_an_error_and_is_told_what_is_wrong_with_its_calls(
    peer: Path, short_dir: Path
) -> None:
    vm = Vm()
    async with Server(short_dir / "s").running(vm.report) as server:
        steps = [
            "code:99",
            "code:6",
            "stranger",
            "code:3",
            "code:4",
            "error:2:d\u00e9j\u00e0 \U0001f600",
            "ping",
        ]
        lines = await speak(peer, server, 0, *steps)
    assert lines[1:] == [
        "code:99: status -74",
        "code:6: exception -7 0 this host has no getSecretkeeper",
        "stranger: status -2147483647",
        "code:3: status -61",
        "code:4: status -61",
        "error:2:d\u00e9j\u00e0 \U0001f600: ok",
        "ping: ok",
    ]
    assert vm.reports == [NotifyError(ErrorCode.PAYLOAD_CHANGED, "d\u00e9j\u00e0 \U0001f600")]


async def test_one_way_calls_of_rsbinder_are_carried_out_in_their_order(peer: Path, short_dir: Path) -> None:
    vm = Vm()
    async with Server(short_dir / "s").running(vm.report) as server:
        lines = await speak(peer, server, 0, "oneway:1", "oneway:2", "ping", "started")
    assert lines[1:] == [
        "oneway:1: sent",
        "oneway:2: sent",
        "ping: ok",
        "started: exception -5 0 Invalid payload state transition from Ready to Started",
    ]
    assert vm.reports == [NotifyPayloadStarted(), NotifyPayloadReady()]
