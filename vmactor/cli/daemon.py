"""Which of a daemon's VMs a command line means."""

from typing import Final

from vmactor.cli.output import shown
from vmactor.client import VirtualizationService, VirtualMachine
from vmactor.errors import IllegalArgumentError

NOT_UNDONE: Final = "no longer waiting; what was asked for stays so"
"""What to tell a person who interrupts a request to a daemon."""


def cid_of(service: VirtualizationService, vm: str) -> int:
    """The CID of a VM that lives, by its CID or its name.

    Raises:
        IllegalArgumentError: There is none, or several have that name.
    """
    infos = service.list_vms()
    if vm.isascii() and vm.isdigit() and any(str(info.cid) == vm for info in infos):
        return int(vm)
    found = [info.cid for info in infos if info.name == vm]
    if len(found) == 1:
        return found[0]
    if found:
        cids = ", ".join(map(str, found))
        raise IllegalArgumentError(f'several VMs are named "{shown(vm)}": name one by its CID ({cids})')
    raise IllegalArgumentError(
        f"the daemon at {service.path} has no VM \"{shown(vm)}\"; 'vmactor list --socket {service.path}' "
        "shows those it has"
    )


async def chosen(service: VirtualizationService, vm: str) -> VirtualMachine:
    """A handle on a VM by its CID or its name; letting go of it ends nothing. Raises as ``cid_of``."""
    return await service.open_vm(cid_of(service, vm))
