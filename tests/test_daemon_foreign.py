"""Clients of MessagePack-RPC that nobody here wrote: pynvim's session, and Neovim's transport for Node.js."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from tests.daemon_peer import SECONDS, client, daemon

pytestmark = pytest.mark.anyio

MODULES = Path(__file__).parent.parent / "build" / "node" / "node_modules"
PYNVIM = """
import json, sys
from pynvim.msgpack_rpc import socket_session
session = socket_session(sys.argv[1])
for method, params in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        print(json.dumps(session.request(method, *json.loads(params))))
    except Exception as error:
        print(json.dumps({"error": error.args[0]}))
session.close()
"""


def pynvim(path: Path, *calls: str) -> list[Any]:
    return _run([sys.executable, "-c", PYNVIM, str(path), *calls])


def neovim(path: Path, *calls: str) -> list[Any]:
    return _run(["node", str(Path(__file__).with_name("foreign_rpc.js")), str(MODULES), str(path), *calls])


def _run(command: list[str]) -> list[Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("foreign", [pynvim, neovim])
async def test_clients_that_nobody_here_wrote_can_call(
    short_dir: Path, foreign: Callable[..., list[Any]]
) -> None:
    async with daemon(short_dir) as served, client(served.path) as call:
        made = await call.create(short_dir, "hang")
        cid = made["info"]["cid"]

        def calls(*words: str) -> list[Any]:
            return foreign(served.path, *words)

        listed, info, opened = await anyio.to_thread.run_sync(
            calls, "listVms", "[]", "info", "[]", "openVm", f"[{cid}]"
        )
        assert [row["cid"] for row in listed] == [cid]
        assert (info["driver"], info["vms"]) == ("simulated", 1)
        assert opened["info"]["state"] == "NOT_STARTED"
        (wrong,) = await anyio.to_thread.run_sync(calls, "getState", '["guessed"]')
        assert "no VM has this handle" in str(wrong["error"])  # pynvim keeps the message alone
