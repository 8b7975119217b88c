"""VMs that outlive their manager: what is written down of each, and how the next manager takes it over.

A kept VM's processes, directory and pipes live on when its manager is killed: nothing that they need is the
manager's. What the manager alone knows stands in the VM's record, under ``keeping``, rewritten at every
change before anybody hears of it. The next manager that keeps VMs claims the CID, judges the processes as
``vmactor.leftovers`` does, and takes the VM over only if every one of them is known beyond doubt: VMM, and
vsock helper where there is one. Anything less is ended or left as it is, with a report.

Console, failure text and complaints are pipes whose read ends the VMM holds too, so they bear the time
without a manager, up to a pipe's length; then the writer waits. The next manager opens them through the VMM.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace

from vmactor.errors import IllegalArgumentError
from vmactor.leftovers import Judged, Leftover, Standing, open_channels
from vmactor.log import get_logger
from vmactor.messages import PayloadState, Requester, VmInfo
from vmactor.process import Process
from vmactor.protocol.values import from_wire
from vmactor.state_dir import KEEPING, StateDirectory

log = get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptVm:
    """What the next manager has to know of a kept VM.

    Attributes:
        info: As its actor published it last, without ``died``.
        running: Whether its VMM was known to run the guest; ``started`` was published then.
        payload_failed: Whether the payload reported a failure.
        created_seq: The number of its ``created`` event.
        memory_mib: The guest's memory as configured.
        vsock: Which kind of vsock it has.
        need: What it was promised of the host.
        to_log: Whether console and log go to the manager's log.
        hangup_timeout: Seconds that its payload has to report its start.
        requester: Whose rights its processes have; None for the manager's.
    """

    info: VmInfo
    running: bool = False
    payload_failed: bool = False
    created_seq: int = 0
    memory_mib: int | None = None
    vsock: str = "hybrid"
    need: tuple[int, ...] = ()
    to_log: bool = False
    hangup_timeout: float | None = None
    requester: Requester | None = None


@dataclass(slots=True)
class Inheritance:
    """A kept VM whose processes are known, ready to be taken over. Close what nobody takes.

    Attributes:
        vm: What its manager wrote down.
        vmm: Its VMM.
        helper: Its vsock helper, where it has one.
        channels: Read ends of the VMM's pipes, by name.
        complaints: The same of the helper's pipe.
    """

    vm: KeptVm
    vmm: Process
    helper: Process | None
    channels: dict[str, int]
    complaints: int | None

    def close(self) -> None:
        """Close every descriptor; the processes are left as they are. Idempotent."""
        self.vmm.let_go()
        if self.helper is not None:
            self.helper.let_go()
        while self.channels:
            os.close(self.channels.popitem()[1])
        if self.complaints is not None:
            os.close(self.complaints)
            self.complaints = None

    def take_channels(self) -> dict[str, int]:
        """The read ends, from now on the caller's to close."""
        taken, self.channels = self.channels, {}
        return taken

    def take_complaints(self) -> int:
        """The same for the helper's."""
        taken, self.complaints = self.complaints, None
        return _empty_pipe() if taken is None else taken


def inherit(state: StateDirectory, leftover: Leftover) -> Inheritance | None:
    """Make ready to take over a VM that was left behind; None if that cannot be, which the log tells. Blocks.

    Args:
        state: Where it is.
        leftover: As it was judged; stays the caller's.
    """
    why, vm, vmm, helper = leftover.trouble, None, None, None
    try:
        vm = _read(state, leftover.cid)
    except IllegalArgumentError as error:
        why = why or error.message
    if vm is not None and not why:
        vmm = _only(leftover, "VMM")
        helper = _only(leftover, "vsock helper")
        if vmm is None or vm.info.pid not in (None, vmm.pid):
            why = "its VMM does not live"
        elif helper is None and vm.vsock == "hybrid":
            why = "its vsock helper does not live"
        elif vm.info.payload is PayloadState.HANGUP:
            why = "it was being killed because it hung up"
    if vm is None or vmm is None or why:
        log.warning("cannot take over a VM that was to be kept", cid=leftover.cid, why=why)
        return None
    with ExitStack() as undo:
        try:
            inheritance = Inheritance(vm, _adopt(vmm), None, {}, None)
            undo.callback(inheritance.close)
            inheritance.channels.update(open_channels(vmm))
            if helper is not None:
                inheritance.helper = _adopt(helper)
                inheritance.complaints = open_channels(helper, {"stderr"}).get("stderr")
        except OSError as error:
            log.warning("cannot take over a VM that was to be kept", cid=leftover.cid, why=str(error))
            return None
        undo.pop_all()
    return inheritance


def _read(state: StateDirectory, cid: int) -> KeptVm:
    record = state.record(cid) or {}
    vm = from_wire(KeptVm, record.get(KEEPING), f"the record of CID {cid}: {KEEPING}", strict=False)
    if vm.info.cid != cid:
        raise IllegalArgumentError(f"the record of CID {cid} is of another VM")
    # Where it is, is not the record's to say: it is written to, and removed in the end.
    return replace(vm, info=replace(vm.info, directory=str(state.vm_directory(cid)), kept=True))


def _only(leftover: Leftover, role: str) -> Judged | None:
    """The living process of a role; None if there is none, or several."""
    found = [judged for judged in leftover.living if judged.role == role]
    return found[0] if len(found) == 1 and found[0].standing is Standing.OURS else None


def _adopt(judged: Judged) -> Process:
    assert judged.pid is not None, "it lives"  # noqa: S101
    assert judged.pidfd is not None, "it lives"  # noqa: S101
    return Process.adopt(judged.pid, os.dup(judged.pidfd), [judged.role])


def _empty_pipe() -> int:
    read, write = os.pipe2(os.O_CLOEXEC)
    os.close(write)
    return read
