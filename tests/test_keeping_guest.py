"""A real guest that outlives its managers, killed one after the other."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.keeping_manager import READY, Start, ended, managers

pytestmark = pytest.mark.guest


@pytest.fixture
def manager(short_dir: Path) -> Iterator[Start]:
    """Start managers of one state directory, one after the other; nothing of them or their VMs is left."""
    yield from managers(short_dir)


def test_a_real_guest_outlives_three_managers(manager: Start, guest_dir: Path) -> None:
    one = manager("qemu")
    cid = one.create(READY, config=str(guest_dir / "vm.json"))
    one.expect("payload_ready", cid)
    vm = one.ask("info", cid=cid)
    one.kill()
    two = manager("qemu")
    assert two.vms == [vm]
    assert two.ask("step", cid=cid, step="cid") == f"ok {cid}"
    two.ask("trim", cid=cid)
    two.ask("suspend", cid=cid)
    two.kill()
    three = manager("qemu")
    assert (three.vms[0]["suspended"], three.vms[0]["pid"]) == (True, vm["pid"])
    three.ask("resume", cid=cid)
    three.ask("step", cid=cid, step="print still here")
    three.kill()
    four = manager("qemu")
    four.ask("step", cid=cid, step="finished 3")  # the guest dials the new manager
    assert four.expect("payload_finished", cid)["exit_code"] == 3
    assert four.ask("shutdown", cid=cid) == 0  # the power button
    died = four.expect("died", cid)
    assert (died["reason"], died["exit_code"], died["adopted"]) == ("SHUTDOWN", None, True)
    assert ended(vm["pid"])
    assert not list((four.state / "vm").iterdir())
    kinds = [event["event"] for event in four.events]
    assert [kinds.count(kind) for kind in ("created", "adopted", "died")] == [1, 3, 1]


def test_the_last_words_of_a_guest_that_ended_without_a_manager_are_told(
    manager: Start, guest_dir: Path
) -> None:
    one = manager("qemu")
    cid = one.create("started;ready;serve", config=str(guest_dir / "vm.json"))
    one.expect("payload_ready", cid)
    pid = one.ask("info", cid=cid)["pid"]
    one.process.send_signal(signal.SIGSTOP)  # it reads nothing any more
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(str(one.state / "vm" / str(cid) / "vsock"))
        agent.sendall(b"CONNECT 5000\n")
        said = agent.makefile("rb")
        assert said.readline().startswith(b"OK")
        for step in (b"print parting words\n", b"failure MICRODROID_PAYLOAD_HAS_CHANGED|late\n"):
            agent.sendall(step)
            assert said.readline() == b"ok\n"
    one.kill()
    os.kill(pid, signal.SIGKILL)
    died = manager("qemu").expect("died", cid)
    assert "parting words" in died["console_tail"]
    assert died["failure"].startswith("MICRODROID_PAYLOAD_HAS_CHANGED|late")
    assert (died["reason"], died["adopted"]) == ("MICRODROID_PAYLOAD_HAS_CHANGED", True)
