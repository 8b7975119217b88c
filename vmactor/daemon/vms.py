"""The VMs of the daemon: whose each is, and what keeps it alive.

A handle of the service is what keeps a VM alive. The daemon has them all, since a connection may end, and its
VM be kept, or be opened from another connection.
"""

from dataclasses import dataclass
from typing import Final

from vmactor.actors.handle import VirtualMachine
from vmactor.daemon.users import User

DEFAULT_MEMORY_MIB: Final = 256
"""What a VM counts whose configuration names no memory."""


@dataclass(eq=False, slots=True)
class OwnedVm:
    """A VM and its owner.

    Attributes:
        vm: The service's handle, which keeps it alive.
        user: Whose it is.
        kept: Whether it outlives the connection that created it.
        memory_mib: What it counts.
    """

    vm: VirtualMachine
    user: User
    kept: bool
    memory_mib: int


class Vms:
    """All VMs of the daemon, by CID; those that are gone are forgotten sooner or later."""

    def __init__(self) -> None:
        self._vms: dict[int, OwnedVm] = {}

    def reserve(self, user: User, memory_mib: int | None) -> int:
        """Count a VM that is to be created; give it to ``add``, or back.

        Returns:
            What it counts in MiB.

        Raises:
            ResourceExhaustedError: The user has as many as he may.
        """
        self.forget_gone()
        counted = memory_mib or DEFAULT_MEMORY_MIB
        user.add_vm(counted)
        return counted

    def count_adopted(self, user: User, memory_mib: int | None) -> int:
        """Count a VM that is there already, whether its user may have it or not; as ``reserve`` else."""
        counted = memory_mib or DEFAULT_MEMORY_MIB
        user.vms += 1
        user.memory_mib += counted
        return counted

    def add(self, vm: VirtualMachine, user: User, *, kept: bool, counted: int) -> OwnedVm:
        """A VM was created, or found: it lives until it is given up."""
        if (gone := self._vms.pop(vm.cid, None)) is not None:
            gone.user.remove_vm(gone.memory_mib)
        owned = self._vms[vm.cid] = OwnedVm(vm, user, kept, counted)
        return owned

    def find(self, cid: int, user: User) -> OwnedVm | None:
        """A VM that lives and that a user controls."""
        owned = self._vms.get(cid)
        if owned is None or owned.vm.gone or not (user.privileged or owned.user is user):
            return None
        return owned

    def of(self, user: User) -> list[OwnedVm]:
        """All VMs that live and that a user controls, by CID."""
        self.forget_gone()
        return [owned for _, owned in sorted(self._vms.items()) if user.privileged or owned.user is user]

    def forget_gone(self) -> None:
        """Count no more what is gone."""
        for cid, owned in list(self._vms.items()):
            if owned.vm.gone:
                del self._vms[cid]
                owned.user.remove_vm(owned.memory_mib)
