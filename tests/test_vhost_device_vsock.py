"""The vsock helper: the real program where there is one, small scripts for when things go wrong."""

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

import vmactor.vhost_device_vsock
from tests.conftest import ROOT
from vmactor.errors import DeadlineExceededError, IllegalArgumentError, VsockError
from vmactor.process import ExitStatus
from vmactor.vhost_device_vsock import VhostDeviceVsock
from vmactor.vsock import HybridVsockTransport

pytestmark = pytest.mark.anyio

CID = 2048


@pytest.fixture
def real_helper() -> Path:
    """The real program."""
    path = f"{os.environ.get('PATH', '')}:{ROOT / 'build/host/bin'}"
    found = os.environ.get("VMACTOR_VHOST_DEVICE_VSOCK") or shutil.which("vhost-device-vsock", path=path)
    if found is None:
        pytest.skip("no vhost-device-vsock here: 'make setup' brings it")
    return Path(found)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an executable that plays the helper."""

    def make(body: str) -> Path:
        path = tmp_path / "helper"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o700)
        return path

    return make


async def test_the_real_helper_takes_a_vmm_and_a_guests_connection_is_not_there_yet(
    real_helper: Path, short_dir: Path
) -> None:
    helper = VhostDeviceVsock.spawn(real_helper, CID, short_dir)
    vmm = socket.socket(fileno=await helper.connect())
    with vmm:
        assert vmm.getpeername() == "vhost.sock", f"in {short_dir}"
        assert not vmm.get_inheritable()
        assert vmm.getblocking()
        credentials = vmm.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert int.from_bytes(credentials[:4], "little") == helper.process.pid
        transport = HybridVsockTransport(CID, helper.uds_path, lambda: helper.process.pid)
        with pytest.raises((VsockError, DeadlineExceededError)):  # no VMM has set the device up
            await transport.connect(5000, timeout=0.2)
        assert helper.process.status is None
    await helper.aclose()
    assert list(short_dir.iterdir()) == []
    await helper.aclose()


async def test_the_real_helpers_death_is_seen(real_helper: Path, short_dir: Path) -> None:
    helper = VhostDeviceVsock.spawn(real_helper, CID, short_dir)
    os.close(await helper.connect())
    got = []

    async def wait() -> None:
        got.append(await helper.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        helper.process.kill()
    assert got == [ExitStatus(None, signal.SIGKILL)]
    assert repr(helper).endswith("signal 9 (SIGKILL)>>")
    await helper.aclose()
    assert list(short_dir.iterdir()) == []


async def test_the_real_helpers_complaint_is_in_the_error(real_helper: Path, short_dir: Path) -> None:
    helper = VhostDeviceVsock.spawn(real_helper, 2**80, short_dir)
    with pytest.raises(VsockError, match=r"The vsock helper ended \(exit code \d+\): .*--guest-cid"):
        await helper.connect()
    await helper.aclose()


async def test_the_helper_gets_its_cid_and_its_sockets(
    script: Callable[[str], Path], short_dir: Path
) -> None:
    helper = VhostDeviceVsock.spawn(script('echo "$@, in $PWD" >&2'), CID, short_dir)
    assert await helper.wait() == ExitStatus(0, None)
    assert helper.complaints == (f"--guest-cid {CID} --socket vhost.sock --uds-path vsock, in {short_dir}")
    await helper.aclose()


async def test_a_helper_that_never_listens_is_given_up(
    script: Callable[[str], Path], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmactor.vhost_device_vsock, "READY_SECONDS", 0.05)
    helper = VhostDeviceVsock.spawn(script("exec sleep 600"), CID, short_dir)
    with pytest.raises(DeadlineExceededError, match="does not listen"):
        await helper.connect()
    assert helper.process.status is None
    await helper.aclose()
    assert helper.process.status == ExitStatus(None, signal.SIGKILL)


async def test_a_chatty_helper_is_not_held_up(script: Callable[[str], Path], short_dir: Path) -> None:
    body = "head -c 1000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 3"
    helper = VhostDeviceVsock.spawn(script(body), CID, short_dir)
    with anyio.fail_after(30):
        assert await helper.wait() == ExitStatus(3, None)
    assert helper.complaints.endswith("xthe end")
    assert len(helper.complaints) <= 4096
    await helper.aclose()


async def test_a_cancelled_connect_leaves_nothing(script: Callable[[str], Path], short_dir: Path) -> None:
    helper = VhostDeviceVsock.spawn(script("exec sleep 600"), CID, short_dir)
    with anyio.move_on_after(0.02):
        await helper.connect()
    await helper.aclose()


async def test_what_cannot_be_run_is_named(tmp_path: Path, short_dir: Path) -> None:
    with pytest.raises(VsockError, match=r"no-helper: No such file.*VMACTOR_VHOST_DEVICE_VSOCK"):
        VhostDeviceVsock.spawn(tmp_path / "no-helper", CID, short_dir)


def test_a_directory_whose_path_is_too_long_is_refused_before_any_work() -> None:
    with pytest.raises(IllegalArgumentError, match="shorter state directory"):
        VhostDeviceVsock.spawn(Path("/nonexistent"), CID, Path("/" + "d" * 100))
