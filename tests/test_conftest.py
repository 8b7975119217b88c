"""The harness itself: the virtual clocks jump, and residue is found."""

import os
import socket
import subprocess
import threading
import time

import anyio
import pytest

from tests.residue import Residue

pytestmark = pytest.mark.anyio


@pytest.mark.virtual_time
async def test_an_hour_of_sleep_takes_no_time() -> None:
    wall, start = time.monotonic(), anyio.current_time()
    with anyio.move_on_after(3600) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert anyio.current_time() - start == pytest.approx(3600)
    assert time.monotonic() - wall < 60


@pytest.mark.virtual_time
async def test_tasks_wake_in_the_order_of_their_deadlines() -> None:
    order = []

    async def sleeper(seconds: float) -> None:
        await anyio.sleep(seconds)
        order.append(seconds)

    async with anyio.create_task_group() as tg:
        for seconds in (30, 10, 20):
            tg.start_soon(sleeper, seconds)
    assert order == [10, 20, 30]


def test_a_leaked_descriptor_is_found() -> None:
    residue = Residue()
    left = socket.socket()
    try:
        assert [line for line in residue.report() if line.startswith(f"descriptor {left.fileno()}")]
    finally:
        left.close()
    assert residue.report() == []


def test_a_leaked_process_is_found_also_as_a_zombie() -> None:
    residue = Residue()
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert any(f"process {child.pid}" in line and "(Z)" in line for line in residue.report())
    child.wait()
    assert residue.report() == []


def test_a_leaked_thread_is_found() -> None:
    residue = Residue()
    go = threading.Event()
    thread = threading.Thread(target=go.wait, name="leak")
    thread.start()
    assert "thread leak" in residue.report()
    go.set()
    thread.join()
    assert residue.report() == []
