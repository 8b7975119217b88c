"""App configurations through the whole service: a life with the simulated VMM, and creations that fail."""

import ctypes
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from tests.app_files import app_in, make_platform
from tests.host_facts import FULL
from tests.residue import descriptors
from tests.scripted_vmm import ScriptedDriver
from tests.simulated_peer import script
from vmactor.actors.service import VirtualizationService
from vmactor.app_config import AppConfig
from vmactor.errors import (
    ApkError,
    IllegalArgumentError,
    ServiceSpecificError,
    StartFailedError,
    UnsupportedOperationError,
    VmactorError,
)
from vmactor.messages import DeathReason, DebugLevel, Died, Requester
from vmactor.microdroid.extra_apks import open_extra_apks
from vmactor.security.permissions import Grant, Permission, Permissions
from vmactor.security.policy import Policy
from vmactor.state_dir import StateDirectory
from vmactor.vmm.select import Selection

pytestmark = pytest.mark.anyio


def left_in(directory: Path) -> list[str]:
    """What is left of VMs: CIDs and files."""
    with StateDirectory(directory / "state") as state:
        held = [f"CID {cid}" for cid in range(2048, 2100) if state.cids.is_held(cid)]
        return held + [str(path) for path in (directory / "state" / "vm").rglob("*")]


async def test_an_app_lives_and_ends_as_any_vm_does(short_dir: Path) -> None:
    steps = script("started", "ready", "finished 0", "exit 0")
    platform = make_platform(short_dir / "apex", params=steps)
    async with VirtualizationService(
        vmm="simulated", state_directory=short_dir / "state", platform=platform
    ) as service:
        with app_in(short_dir / "app", payload_binary_name="x") as app, service.subscribe() as events:
            vm = await service.create_vm(app)
            async with vm:
                await vm.start()
                kinds = []
                with anyio.fail_after(30):
                    async for event in events:
                        kinds.append(event.kind)
                        if isinstance(event, Died):
                            assert event.reason is DeathReason.SHUTDOWN
                            break
    assert [kind for kind in kinds if kind.startswith("payload")] == [
        *("payload_started", "payload_ready", "payload_finished")
    ]
    assert left_in(short_dir) == []


async def test_what_a_debuggable_guest_says_goes_to_the_log_line_by_line(
    short_dir: Path,
) -> None:
    steps = script("print hello", "log good", "finished 0", "exit 0")
    platform = make_platform(short_dir / "apex", params=steps)
    said = []
    for level in DebugLevel:
        with capture_logs() as logs:
            async with VirtualizationService(
                vmm="simulated", state_directory=short_dir / "state", platform=platform
            ) as service:
                with app_in(short_dir / "app", payload_binary_name="x", debug_level=level) as app:
                    async with await service.create_vm(app) as vm:
                        await vm.start()
                        with anyio.fail_after(30):
                            await vm.wait()
                        cid = vm.cid
        said.append([line["event"] for line in logs if f"({cid}): " in line["event"]])
    assert said[0] == []
    assert f"Console({cid}): hello" in said[1]
    assert f"Log({cid}): good" in said[1]


async def test_an_app_that_does_not_report_is_a_hang_up_without_being_asked(short_dir: Path) -> None:
    async with VirtualizationService(
        vmm="simulated",
        state_directory=short_dir / "state",
        platform=make_platform(short_dir / "apex", params=script("sleep 60000")),
    ) as service:
        with app_in(short_dir / "app", payload_binary_name="x") as app:
            with pytest.raises(IllegalArgumentError, match="of no use"):
                await service.create_vm(app, hangup_detection=False, hangup_timeout=5)
            async with await service.create_vm(app, hangup_timeout=1) as vm:
                with anyio.fail_after(30):
                    with suppress(StartFailedError):  # on a very busy machine it hangs up even before
                        await vm.start()
                    died = await vm.wait()
            assert died is not None
            assert died.reason is DeathReason.HANGUP


def _nothing(_place: Path, app: AppConfig) -> AppConfig:
    return app


def _garbage(place: Path, app: AppConfig) -> AppConfig:
    (place / "app.apk").write_bytes(b"PK\5\6" * 1000)
    return app


def _half(place: Path, app: AppConfig) -> AppConfig:
    apk = (place / "app.apk").read_bytes()
    (place / "app.apk").write_bytes(apk[: len(apk) // 2])
    return app


def _raw_instance(_place: Path, app: AppConfig) -> AppConfig:
    os.pwrite(app.instance_image, b"Android-VM-instance", 0)
    return app


def _backed_instance(_place: Path, app: AppConfig) -> AppConfig:
    os.pwrite(app.instance_image, b"\0\0\0\0\0\0\1\0\0\0\0\4", 8)
    os.pwrite(app.instance_image, b"/etc", 256)
    return app


@pytest.mark.virtual_time
@pytest.mark.parametrize(
    ("config", "spoil", "error"),
    [
        ({}, _garbage, ApkError),
        ({}, _half, ApkError),
        ("[" * 5000, _nothing, IllegalArgumentError),
        ({"extra_apks": [{"path": "/etc/shadow"}]}, _nothing, IllegalArgumentError),
        ({"os": {"name": "../../etc"}}, _nothing, UnsupportedOperationError),
        ({"prefer_staged": True}, _nothing, ServiceSpecificError),
        ({}, _raw_instance, VmactorError),
        ({}, _backed_instance, VmactorError),
    ],
)
async def test_a_creation_that_fails_leaves_nothing(
    config: object, spoil: Callable[[Path, AppConfig], AppConfig], error: type[VmactorError], short_dir: Path
) -> None:
    async with VirtualizationService(
        vmm=Selection(ScriptedDriver(), "hybrid", ("a test picked it",)),
        state_directory=short_dir / "state",
        facts=FULL,
        platform=make_platform(short_dir / "apex"),
    ) as service:
        with app_in(short_dir / "app", config) as app:
            spoiled = spoil(short_dir / "app", app)
            before, files = descriptors(), sorted(short_dir.rglob("*"))
            with pytest.raises(error) as caught:
                await service.create_vm(spoiled)
            assert len(str(caught.value)) < 1000
            assert descriptors() == before
            assert sorted(short_dir.rglob("*")) == files
        assert service.list_vms() == []
        assert left_in(short_dir) == []


# -- Whose rights -------------------------------------------------------------------------------------

OTHER = Requester(65534, 65534)


@pytest.mark.virtual_time
async def test_no_path_of_an_apk_is_opened_by_the_service_with_its_own_rights(short_dir: Path) -> None:
    """A file that only root can read, root as the service, and somebody else who names it in his APK."""
    secret = short_dir / "secret"
    os.mkfifo(secret, 0o600)  # whoever opened it would be seen: it would have a reader
    grant = Grant(frozenset({OTHER.uid}))
    policy = Policy(Permissions(dict.fromkeys(Permission, grant)))
    async with VirtualizationService(
        vmm=Selection(ScriptedDriver(), "hybrid", ("a test picked it",)),
        state_directory=short_dir / "state",
        facts=FULL,
        platform=make_platform(short_dir / "apex"),
        policy=policy,
    ) as service:
        config = {"extra_apks": [{"path": str(secret)}]}
        with app_in(short_dir / "app", config) as app:
            asking: dict[str, Any] = {"requester": OTHER} if os.geteuid() == 0 else {}
            with pytest.raises(IllegalArgumentError, match="opened by its client"):
                await service.create_vm(replace(app, extra_idsigs=(app.idsig,)), **asking)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_a_client_opens_extra_apks_with_its_own_rights_only(short_dir: Path) -> None:
    secret = short_dir / "secret"
    secret.write_bytes(b"root's")
    secret.chmod(0o600)
    short_dir.chmod(0o755)
    libc = ctypes.CDLL(None)
    with app_in(short_dir / "app", {"extra_apks": [{"path": str(secret)}]}) as app, ExitStack() as opened:
        libc.setfsuid(OTHER.uid)  # of this thread only
        try:
            with pytest.raises(IllegalArgumentError, match="Permission denied"):
                open_extra_apks(app.apk, "assets/config.json", opened)
        finally:
            libc.setfsuid(0)
        (fd,) = open_extra_apks(app.apk, "assets/config.json", opened)
        assert stat.S_ISREG(os.fstat(fd).st_mode)
