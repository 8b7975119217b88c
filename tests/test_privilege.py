"""With whose rights the processes of a VM run: a real QEMU and its helper, as the kernel sees them."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.guests import agent, allowing, create, until
from tests.test_process import limits_of, status_of
from vmactor import Requester, SecurityError, VirtualizationService, VirtualMachine
from vmactor.host import Finding, probe
from vmactor.process import LIMITS

pytestmark = [pytest.mark.anyio, pytest.mark.guest]


def descriptors_of(pid: int) -> dict[int, str]:
    """What a process has open, by number."""
    return {int(entry.name): str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def processes_of(vm: VirtualMachine) -> dict[str, int]:
    """The VMM and the helper."""
    actor = vm._actor
    assert vm.info.pid is not None
    assert actor.run_under_way is not None
    helper = actor.run_under_way._helper
    return {"VMM": vm.info.pid} | ({} if helper is None else {"helper": helper.process.pid})


@asynccontextmanager
async def started(directory: Path, guest: Path, **options: Any) -> AsyncIterator[VirtualMachine]:
    # Another user may not be allowed to use KVM.
    facts = probe()
    policy = None
    if options:
        policy = allowing(options["requester"].uid)
        facts = replace(facts, kvm=Finding(False, "not for this user"))
    async with (
        VirtualizationService(state_directory=directory, facts=facts, policy=policy) as service,
        await create(service, guest, "started;ready;serve", **options) as vm,
    ):
        with vm.events() as events:
            await vm.start()
            await until(events, "payload_ready")
        yield vm


def check(pid: int, requester: Requester) -> None:
    status = status_of(pid)
    assert status["Uid"].split() == [str(requester.uid)] * 4
    assert status["Gid"].split() == [str(requester.gid)] * 4
    assert status["Groups"].split() == [str(group) for group in requester.groups]
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
    if requester.uid != 0:
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
    assert int(status["NSsid"].split()[0]) == pid, "it leads a session of its own"
    limits = limits_of(pid)
    assert limits["Max core file size"] == ("0", "0")
    assert int(limits["Max open files"][1]) <= LIMITS["nofile"]


async def test_a_vmm_and_its_helper_have_the_callers_rights_and_only_what_was_handed_over(
    short_dir: Path, guest_dir: Path
) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    ours = {f"pipe:[{os.fstat(read_end).st_ino}]"}
    try:
        async with started(short_dir, guest_dir) as vm:
            me = Requester(os.geteuid(), os.getegid(), tuple(os.getgroups()))
            for role, pid in processes_of(vm).items():
                check(pid, me)
                open_now = descriptors_of(pid)
                assert not ours & set(open_now.values())
                inherited = {name for name in open_now.values() if name.startswith("pipe:")}
                assert len(inherited) == (3 if role == "VMM" else 1), "its channels, and no other pipe"
                assert not any("/cids" in name or "ledger" in name for name in open_now.values())
                assert len(open_now) < 100
            assert status_of("self")["NoNewPrivs"] == "0"
    finally:
        os.close(read_end)
        os.close(write_end)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run VMs for others")
async def test_a_vm_for_another_user_has_that_users_rights_and_keeps_everybody_else_out(
    short_dir: Path, guest_dir: Path
) -> None:
    user = Requester(4242, 4343, (4344,))
    async with started(short_dir, guest_dir, requester=user) as vm:
        assert vm.info.requester_uid == 4242
        for pid in processes_of(vm).values():
            check(pid, user)
        directory = Path(vm.info.directory)
        assert (directory.stat().st_uid, directory.stat().st_mode & 0o777) == (0, 0o700)
        for path in directory.iterdir():
            owner = 4242 if path.name == "s" else 0
            assert path.lstat().st_uid == owner, path
        async with vm.listen_vsock(7001):
            if (directory / "s").exists():
                sockets = {path.name: path.stat().st_uid for path in (directory / "s").iterdir()}
                assert set(sockets.values()) == {4242}
                assert "vsock_7001" in sockets
                assert not (directory / "vsock_7001").exists()
            assert await agent(vm, "print hello")  # the host's connections reach the guest as well
    assert not directory.exists()


async def test_only_root_runs_vms_for_others(
    short_dir: Path, guest_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with VirtualizationService(state_directory=short_dir, policy=allowing(4243)) as service:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
        with pytest.raises(SecurityError, match="only root"):
            await create(service, guest_dir, "hang", requester=Requester(4243, 4243))
        monkeypatch.undo()
