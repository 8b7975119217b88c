"""Places: what a VM needs on this host before it exists, and keeps until it is gone.

A place is a CID, a private directory, and a vsock whose RPC port is listened on. It is claimed as a whole or
not at all, and given back last, unless a process of the VM lives on in it.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from vmactor.errors import (
    ResourceExhaustedError,
    ServiceSpecificError,
    UnsupportedOperationError,
    VmactorError,
)
from vmactor.host import HostFacts
from vmactor.ledger import Spawner
from vmactor.log import get_logger
from vmactor.messages import Requester
from vmactor.state_dir import StateDirectory, sockets_of
from vmactor.vmm.select import Selection
from vmactor.vsock import HybridVsockTransport, KernelVsockTransport, VsockListener, VsockTransport

CONTEXT_ATTEMPTS: Final = 5
"""How often a CID is tried for which no RPC server can be had (reference: createVm, step 2)."""
SET_GUEST_CID: Final = 0x4008AF60
"""VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h."""

_EXHAUSTED: Final = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EDQUOT,
}
"""What another CID does not help against."""

logger = get_logger()


@dataclass(frozen=True, slots=True)
class Place:
    """One VM's place.

    Attributes:
        cid: The claimed CID.
        directory: The VM's private directory.
        spawner: Spawns the VM's processes.
        transport: The VM's vsock.
        listener: Listens on port = CID.
        vhost_fd: An open vhost-vsock device with the CID set, where the kernel does it.
        helper: The vhost-device-vsock executable, where that does it; without either the VMM itself does.
    """

    cid: int
    directory: Path
    spawner: Spawner
    transport: VsockTransport
    listener: VsockListener
    vhost_fd: int | None
    helper: Path | None


class Places:
    """Finds places for the VMs of one service.

    Args:
        state: Where CIDs and directories come from.
        selection: Which kind of vsock VMs get.
        facts: What the host has.
        vsock_peer: The process whose vsock connections are a VM's, by its CID, while there is one.
    """

    def __init__(
        self,
        state: StateDirectory,
        selection: Selection,
        facts: HostFacts,
        vsock_peer: Callable[[int], int | None],
    ) -> None:
        self._state = state
        self._selection = selection
        self._facts = facts
        self._vsock_peer = vsock_peer
        self._kept: set[int] = set()  # CIDs whose dead VMs left a living process behind

    async def find(
        self, claim: ExitStack, requester: Requester | None = None, *, keep: bool = False
    ) -> Place:
        """Claim a place.

        Args:
            claim: Gets what gives the place back: the CID and, should it still be there, the directory. The
                listener is its user's to close.
            requester: Whose VM it is; None for this process's user.
            keep: Whether it is to outlive this manager.

        Raises:
            UnsupportedOperationError: VMs need vhost-device-vsock here, and there is none.
            ResourceExhaustedError: No CID, descriptor or space.
            ServiceSpecificError: Five CIDs in a row had no RPC server to be had.
        """
        helper = self._find_helper()
        failure: Exception | None = None
        for _ in range(CONTEXT_ATTEMPTS):
            with ExitStack() as attempt:
                cid = await self._state.cids.claim()
                attempt.callback(self.release, cid)
                directory, ledger = self._state.make_vm_directory(cid, keep=keep)
                attempt.callback(self.clear, cid)
                try:
                    place = self._listen(cid, directory, Spawner(ledger, requester), helper, attempt)
                except (VmactorError, OSError) as error:
                    cause = error if isinstance(error, OSError) else error.__cause__
                    if isinstance(cause, OSError) and cause.errno in _EXHAUSTED:
                        text = f"no RPC server for a VM: {cause.strerror}; raise 'ulimit -n', or make room"
                        raise ResourceExhaustedError(text) from error
                    failure = error
                    logger.warning("no RPC server for a CID", cid=cid, error=str(error))
                    continue
                claim.push(attempt.pop_all())
                return place
        raise ServiceSpecificError(f"Too many attempts to create VM context failed: {failure}") from failure

    def take_over(self, claim: ExitStack, cid: int, vsock: str, requester: Requester | None) -> Place:
        """The place of a VM that another manager left alive, whose CID is claimed already.

        Args:
            claim: Gets what gives the place back; not the CID.
            cid: Its CID.
            vsock: Which kind of vsock it has.
            requester: Whose VM it is; None for this process's user.

        Raises:
            VsockError: Its RPC port is not to be had.
            IllegalArgumentError: No path for its sockets; the state directory was renamed to a longer one.
        """
        directory = self._state.vm_directory(cid)
        spawner = Spawner(None, requester)
        if vsock == "kernel":
            kernel = KernelVsockTransport(cid)
            return Place(cid, directory, spawner, kernel, kernel.listen(cid), None, None)
        path = sockets_of(directory) / "vsock"
        for stale in path.parent.glob(f"{path.name}_*"):  # nobody listens there: the CID's lock is ours
            stale.unlink(missing_ok=True)
        hybrid = HybridVsockTransport(cid, path, partial(self._vsock_peer, cid), requester)
        claim.callback(hybrid.close)
        return Place(cid, directory, spawner, hybrid, hybrid.listen(cid), None, None)

    def keep(self, cid: int) -> None:
        """A process of the dead VM lives on: its directory and its CID stay as they are."""
        self._kept.add(cid)

    def renew(self, place: Place) -> None:
        """Make a place ready for the next VMM in it.

        Raises:
            OSError: The vhost-vsock device cannot be had again, or somebody took the CID meanwhile.
        """
        if place.vhost_fd is not None:
            # A vhost device is its first user's for ever, and a CID is one device's; so what is behind the
            # number goes before the CID is claimed again.
            device = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
            try:
                os.dup2(device, place.vhost_fd, inheritable=False)
            finally:
                os.close(device)
            _claim_in_kernel(place.vhost_fd, place.cid)

    def clear(self, cid: int) -> None:
        """Remove a VM's directory, unless it is kept. Never raises."""
        if cid not in self._kept:
            self._state.remove_vm_directory(cid)

    def _listen(
        self, cid: int, directory: Path, spawner: Spawner, helper: Path | None, attempt: ExitStack
    ) -> Place:
        if self._selection.vsock == "kernel":
            vhost_fd = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
            attempt.callback(os.close, vhost_fd)
            _claim_in_kernel(vhost_fd, cid)
            kernel = KernelVsockTransport(cid)
            return Place(cid, directory, spawner, kernel, kernel.listen(cid), vhost_fd, None)
        hybrid = HybridVsockTransport(
            cid,
            self._state.make_sockets_directory(cid, spawner.requester) / "vsock",
            partial(self._vsock_peer, cid),
            spawner.requester,
        )
        attempt.callback(hybrid.close)
        return Place(cid, directory, spawner, hybrid, hybrid.listen(cid), None, helper)

    def _find_helper(self) -> Path | None:
        if self._selection.vsock != "hybrid":
            return None
        found = self._facts.vhost_device_vsock
        if found.path is None:
            raise UnsupportedOperationError(f"no vhost-device-vsock: {found.advice}")
        return found.path

    def release(self, cid: int) -> None:
        """Give a CID back, unless it is kept. Never raises."""
        if cid not in self._kept:
            self._state.cids.release(cid)

    def let_go(self, cid: int) -> None:
        """Leave the place of a VM that lives on to the next manager: directory there, CID unclaimed."""
        self._kept.add(cid)
        self._state.cids.let_go(cid)


def _claim_in_kernel(vhost_fd: int, cid: int) -> None:
    """The kernel refuses a CID that any other VM on the host has; ours is claimed from here on."""
    fcntl.ioctl(vhost_fd, SET_GUEST_CID, struct.pack("=Q", cid))
