"""A running service's supervision tree: in its process, in another one, and as ARCHITECTURE.md has it."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from tests.scripted_vmm import ScriptedHelper
from tests.test_restart import CRASH, POLICY, RunningDriver, config, service_in, until  # noqa: F401
from vmactor.actors import monitor
from vmactor.actors.inspection import inspect
from vmactor.cli.tree import drawing
from vmactor.config import RawConfig
from vmactor.supervision_tree import ChildInfo, SupervisorInfo

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "VhostDeviceVsock", ScriptedHelper)


def names(tree: SupervisorInfo) -> set[str]:
    """Everything in a tree, VMs by what they have in common."""
    return {re.sub(r"vm-\d+", "vm-<cid>", node.name) for _, node in tree.walk()}


def documented() -> set[str]:
    """The names that ARCHITECTURE.md draws."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    drawing = text[text.index("## A VM's tree") :].split("```")[1]
    return set(re.findall(r"^[ │]*[├└]─ ([a-z<>-]+)", drawing, re.MULTILINE)) - {"supervisor"} | {"service"}


async def info(*args: str) -> str:
    """What ``vmactor info`` prints in another process."""
    command = [sys.executable, "-m", "vmactor", "info", *args]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(process.pid)
        try:
            await anyio.wait_readable(pidfd)  # this loop answers it meanwhile
        finally:
            os.close(pidfd)
        return process.stdout.read()


async def test_the_tree_is_the_one_that_is_drawn_in_the_architecture(
    short_dir: Path,
    config: RawConfig,  # noqa: F811
) -> None:
    driver = RunningDriver()
    async with service_in(short_dir, driver, tombstones=short_dir / "tombstones") as service:
        vm = await service.create_vm(config, restart=POLICY, hangup_detection=True)
        await vm.start()
        driver.vmm.answers = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.suspend)
            while "suspend" not in driver.vmm.calls:
                await anyio.lowlevel.checkpoint()
            seen = names(service.tree())
            driver.vmm.answers.set()
        with vm.events() as events:
            driver.vmm.end(CRASH)
            await until(events, "restarting")
            while "restart" not in names(service.tree()):
                await anyio.lowlevel.checkpoint()
            waiting = names(service.tree())
        assert waiting == {"service", "sampler", "inspection", "records", "drains", "vm-<cid>", "restart"}
        assert seen | waiting == documented()


async def test_a_vm_tells_of_itself_in_the_tree(short_dir: Path, config: RawConfig) -> None:  # noqa: F811
    driver = RunningDriver()
    async with service_in(short_dir, driver) as service:
        vm = await service.create_vm(config, restart=POLICY)
        await vm.start()
        with vm.events() as events:
            driver.vmm.end(CRASH)
            await until(events, "restarting")
        (child,) = [node for _, node in service.tree().walk() if node.name == "vm-2048"][:1]
        assert isinstance(child, ChildInfo)
        told = child.details
        assert (told["vm"], told["state"], told["generation"], told["vm_restarts"]) == (
            "test",
            "STARTING",
            2,
            1,
        )
        assert (told["ordinary"], told["last_death"], told["pid"]) == (0, "CRASH", None)


async def test_other_processes_are_told_and_what_dead_managers_left_is_removed(
    short_dir: Path,
    config: RawConfig,  # noqa: F811
) -> None:
    managers = short_dir / "state" / "managers"
    async with service_in(short_dir, RunningDriver()) as service:
        vm = await service.create_vm(config)
        await vm.start()
        dead = managers / "1-dead"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(dead))
        (told,) = await inspect(managers)
        assert not dead.exists()
        assert told["pid"] == os.getpid()
        assert [child["name"] for child in told["tree"]["children"]] == [
            "sampler",
            "inspection",
            "records",
            "drains",
            "vm-2048",
        ]
        lines = "\n".join(drawing(told))
        assert 'vm-2048 running, "test" STARTING, up 0s, 0 restarts, mailbox 0+0' in lines
        assert "└─ supervisor vm-2048" in lines
        told = json.loads(await info("--tree", "2048", "--json", "--state-dir", str(short_dir / "state")))
        assert told["tree"]["children"][0]["details"]["vm"] == "test"
    assert list(managers.iterdir()) == []
    assert await inspect(managers) == []


async def test_readers_that_do_not_read_hold_up_nobody(short_dir: Path, config: RawConfig) -> None:  # noqa: F811
    async with service_in(short_dir, RunningDriver()) as service:
        (path,) = (short_dir / "state" / "managers").iterdir()
        idle = [await anyio.connect_unix(path) for _ in range(4)]
        vm = await service.create_vm(config)
        await vm.start()
        assert len(await inspect(path.parent)) == 1
        await vm.aclose()
        for stream in idle:
            await stream.aclose()


@pytest.mark.parametrize(
    "tree", [{}, {"children": 3}, {"children": [{"details": 7, "uptime": "x"}, 4]}, {"name": "\x1b[31m"}]
)
def test_whatever_another_process_tells_is_drawn_and_escaped(tree: dict[str, Any]) -> None:
    lines = list(drawing({"pid": "\x1b]0;x\x07", "tree": tree}))
    assert not any("\x1b" in line or "\x07" in line for line in lines)


def test_a_tree_without_an_end_is_cut() -> None:
    node: dict[str, Any] = {"name": "deep"}
    for _ in range(5000):
        node = {"name": "deep", "children": [node]}
    assert len(list(drawing({"pid": 1, "tree": node}))) == 5002
