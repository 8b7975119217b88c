"""What outlives one run of one guest: restarts, other users, managers that crash; with the kernel's vsock."""

import fcntl
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.guests import agent, allowing, booted, create, until
from vmactor import (
    Backoff,
    DeathReason,
    Died,
    Requester,
    Restart,
    RestartLimit,
    RestartPolicy,
    StartFailedError,
    VirtualizationService,
)
from vmactor.actors.place import SET_GUEST_CID
from vmactor.messages import Reaped

VMMS = [
    "qemu",
    pytest.param(
        "crosvm",
        marks=pytest.mark.skipif("VMACTOR_CROSVM" not in os.environ, reason="no VMACTOR_CROSVM was given"),
    ),
]
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.kernel("trio"),
    pytest.mark.timeout(300),
    pytest.mark.parametrize("vmm", VMMS),
]

KVM_GROUP = 104
USER = 4242


def rights(pid: int) -> dict[str, list[str]]:
    """The lines of ``/proc/PID/status`` by their names."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def alive(pid: int) -> bool:
    """Whether it runs; what is dead may wait for its new parent to notice."""
    return Path(f"/proc/{pid}").exists() and rights(pid)["State"][0] not in "ZX"


def claim(cid: int) -> None:
    """Take a CID in the kernel, and give it back."""
    with Path("/dev/vhost-vsock").open("r+b", buffering=0) as device:
        fcntl.ioctl(device, SET_GUEST_CID, struct.pack("=Q", cid))


def as_on_debian() -> None:
    """KVM is for a group; vhost-vsock is for root alone, as its user gets it open."""
    os.chown("/dev/kvm", 0, KVM_GROUP)
    Path("/dev/kvm").chmod(0o660)
    Path("/dev/vhost-vsock").chmod(0o600)


async def test_a_guest_that_died_runs_again_with_its_cid_and_reports_again(
    short_dir: Path, guest_dir: Path, vmm: str
) -> None:
    policy = RestartPolicy(
        when=Restart.PERMANENT, limit=RestartLimit(2, 600), backoff=Backoff(initial=0.1, jitter=0)
    )
    async with (
        VirtualizationService(state_directory=short_dir, vmm=vmm) as service,
        booted(service, guest_dir, restart=policy) as vm,
    ):
        with vm.events() as events:
            first, cid = vm.info.pid, vm.cid
            assert first is not None
            os.kill(first, signal.SIGKILL)
            died = await until(events, "died")
            assert isinstance(died, Died)
            assert (died.generation, died.reason, died.final) == (1, DeathReason.KILLED, False)
            ready = await until(events, "payload_ready")
        assert (ready.generation, ready.cid, vm.cid) == (2, cid, cid)
        assert vm.info.pid not in {first, None}
        assert await agent(vm, "cid") == f"ok {cid}"
        # The CID is the new run's in the kernel, too: nobody else can have it.
        with pytest.raises(OSError, match="Address already in use"):
            claim(cid)


async def test_another_users_vm_has_that_users_rights_and_reports_over_the_kernels_vsock(
    short_dir: Path, guest_dir: Path, vmm: str
) -> None:
    """Its user may open KVM by a group, and needs no right to vhost-vsock: that is handed over open."""
    as_on_debian()
    user = Requester(USER, 4343, (KVM_GROUP,))
    async with (
        VirtualizationService(state_directory=short_dir, vmm=vmm, policy=allowing(USER)) as service,
        booted(service, guest_dir, requester=user) as vm,
    ):
        assert vm.info.requester_uid == USER
        assert vm.info.pid is not None
        status = rights(vm.info.pid)
        assert (status["Uid"], status["Gid"]) == ([str(USER)] * 4, ["4343"] * 4)
        assert status["Groups"] == [str(KVM_GROUP)]
        assert {int(status[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == ["1"]
        assert await agent(vm, "cid") == f"ok {vm.cid}"


async def test_another_user_who_may_not_use_kvm_is_told(short_dir: Path, guest_dir: Path, vmm: str) -> None:
    as_on_debian()
    async with (
        VirtualizationService(state_directory=short_dir, vmm=vmm, policy=allowing(USER)) as service,
        await create(service, guest_dir, "serve", requester=Requester(USER, 4343)) as vm,
    ):
        with pytest.raises(StartFailedError, match=r"(?is)kvm.*permission denied"):
            await vm.start()


MANAGER = """
import sys
from pathlib import Path
import anyio
from tests.guests import booted
from vmactor import VirtualizationService

async def main(vmm, state, guest):
    async with VirtualizationService(state_directory=Path(state), vmm=vmm) as service:
        async with booted(service, Path(guest)) as vm:
            print(vm.cid, vm.info.pid, flush=True)
            await anyio.sleep_forever()

anyio.run(main, *sys.argv[1:])
"""


async def test_guests_of_a_manager_that_was_killed_are_ended_and_their_cids_are_free(
    short_dir: Path, guest_dir: Path, vmm: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MANAGER, vmm, str(short_dir), str(guest_dir)],
        stdout=subprocess.PIPE,
        text=True,
    ) as manager:
        assert manager.stdout is not None
        cid, pid = map(int, (await anyio.to_thread.run_sync(manager.stdout.readline)).split())
        manager.kill()
    assert alive(pid), "it outlives its manager"
    async with VirtualizationService(state_directory=short_dir, vmm=vmm) as service:
        with service.subscribe() as events:
            with anyio.fail_after(60):
                reaped = await anext(events)
        assert isinstance(reaped, Reaped)
        assert reaped.cid == cid
        assert not alive(pid)
        claim(cid)
