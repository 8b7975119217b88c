"""Runs test_networks.py in a network namespace of its own, so that no interface of this host is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_networks_keep_their_promises_in_a_namespace_of_their_own() -> None:
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        pytest.skip("network namespaces with taps take root and /dev/net/tun")
    pytest_in = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_networks.py"]
    done = subprocess.run(
        ["unshare", "--net", *pytest_in],
        cwd=ROOT,
        env={**os.environ, "VMACTOR_NETNS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
