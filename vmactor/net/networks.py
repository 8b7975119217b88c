"""A service's networks: gives a VM's run its taps, takes them away, and keeps the bridge in between.

netlink is spoken in a worker thread, one at a time: the same way on all event loops, since pyroute2's
asynchronous half knows asyncio only, and the kernel does one change of interfaces at a time anyhow. This is
the only place where that is so. Managers with the same state directory take turns by a lock file in it.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, TypeVar

import anyio
import anyio.to_thread

from vmactor.errors import ResourceExhaustedError, VmactorError, hint
from vmactor.ledger import Ledger
from vmactor.log import get_logger
from vmactor.net import nat
from vmactor.net.plan import Link, NetworkPolicy, alias_of, derived_mac, plan
from vmactor.network_config import NetworkInterface

if TYPE_CHECKING:
    from vmactor.net.links import Links

LOCK: Final = "networks"
"""The lock file in the state directory; it is there once a VM had a network."""
TURN_SECONDS: Final = 20.0
"""How long other managers' work on networks is waited for."""

T = TypeVar("T")

_log = get_logger()


@dataclass(frozen=True, slots=True)
class Connection:
    """A VM's place in its service's networks, the same for all its runs.

    Attributes:
        networks: Whose it is part of.
        cid: The VM's.
        names: Of its taps.
        links: What they shall be; none for a VM that was taken over, whose taps are there.
        ledger: The VM's.
    """

    networks: "Networks"
    cid: int
    names: tuple[str, ...]
    links: tuple[Link, ...] = ()
    ledger: Ledger | None = None

    async def attach(self) -> list[int]:
        """Make a run's taps, all or none; returns their descriptors, with whose last copies they go.

        Not interrupted by cancellation. The ledger knows each tap before it exists.

        Raises:
            VmactorError: The host refuses; the message names what is missing, and nothing is left.
        """
        return await self.networks.attach(self.links, self.cid, self.ledger)

    async def detach(self) -> None:
        """Take a run's taps away after its end, and the bridge with its last port. Never raises."""
        with anyio.CancelScope(shield=True):
            try:
                await self.networks.clear(self.names)
            except VmactorError as error:
                _log.error("cannot clear away a VM's network", cid=self.cid, error=str(error))


class Networks:
    """The networks of one service.

    Args:
        policy: How VMs are connected.
        state_path: The state directory, whose path tells whose a tap is.
    """

    def __init__(self, policy: NetworkPolicy, state_path: Path) -> None:
        self.policy = policy
        self._place = str(state_path)
        self._lock = state_path / LOCK
        self._host_id = host_id()
        self._one_at_a_time = anyio.CapacityLimiter(1)

    def plan(self, interfaces: Iterable[NetworkInterface], cid: int) -> tuple[Link, ...]:
        """What a VM's interfaces become on this host. Raises IllegalArgumentError; see ``plan.plan``."""
        return plan(interfaces, cid, self.policy, place=self._place, host_id=self._host_id)

    @property
    def were_used(self) -> bool:
        """Whether a VM of this state directory ever had a network, so that something may be left of it."""
        return self._lock.exists()

    async def check(self) -> None:
        """Check before a VM is accepted that it could have taps.

        Raises:
            UnsupportedOperationError: It could not; the message names what is missing.
        """
        await anyio.to_thread.run_sync(lambda: _kernel().check_host())

    async def attach(self, links: tuple[Link, ...], cid: int, ledger: Ledger | None) -> list[int]:
        """See ``Connection.attach``."""
        return await self._in_thread(partial(self._attach, links, cid, ledger))

    async def clear(self, names: Iterable[str] = ()) -> None:
        """Remove taps of ours, if they are there, and the bridge if it has no port any more.

        Raises:
            VmactorError: The host refuses.
        """
        await self._in_thread(partial(self._clear, list(names)))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def locked() -> T:
            with self._turn():
                return work()

        return await anyio.to_thread.run_sync(locked, limiter=self._one_at_a_time)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ResourceExhaustedError(f"cannot open {self._lock}: {error}{hint(error)}") from error
        try:
            deadline = time.monotonic() + TURN_SECONDS
            while not _locked(lock):
                if time.monotonic() > deadline:
                    raise ResourceExhaustedError(
                        f"another manager has held {self._lock} for {TURN_SECONDS:g} s; see to it"
                    )
                time.sleep(0.005)
            yield
        finally:
            os.close(lock)

    # -- In the thread -------------------------------------------------------------------------------

    def _attach(self, links: tuple[Link, ...], cid: int, ledger: Ledger | None) -> list[int]:
        kernel_side = _kernel()
        kernel_side.check_host()
        fds: list[int] = []
        try:
            with kernel_side.Links() as kernel:
                for link in links:
                    if ledger is not None:
                        ledger.note_link(link.name)
                    fds.append(kernel_side.open_tap(link.name))
                    self._connect(kernel, link, cid)
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            with suppress(VmactorError):  # what was refused is the error to tell
                self._clear([])
            if isinstance(error, OSError):
                text = f"cannot note a tap in its VM's ledger: {error}{hint(error)}"
                raise ResourceExhaustedError(text) from error
            raise
        return fds

    def _connect(self, kernel: "Links", link: Link, cid: int) -> None:
        asked = link.asked
        index = kernel.set_up_tap(link.name, alias_of(self._place, f"CID {cid}"), asked.mtu)
        if link.bridge is not None:
            if link.own_bridge:
                self._make_bridge(kernel)
            kernel.add_port(link.name, index, link.bridge, isolated=asked.isolated)
        if link.host is not None:
            kernel.add_address(index, link.host)
            if self.policy.nat:
                self._switch_nat_on()
        kernel.limit_rates(link.name, index, to_guest=asked.to_guest_kbit, from_guest=asked.from_guest_kbit)

    def _make_bridge(self, kernel: "Links") -> None:
        policy = self.policy
        mac = derived_mac(self._host_id, 0, 0)
        kernel.make_bridge(policy.bridge, self._bridge_alias, mac, policy.host)
        if policy.nat:
            self._switch_nat_on()

    def _switch_nat_on(self) -> None:
        nat.switch_on(self.policy.bridge, (self.policy.network, self.policy.routed_network))

    @property
    def _bridge_alias(self) -> str:
        return alias_of(self._place, "bridge")

    def _clear(self, names: list[str]) -> None:
        with _kernel().Links() as kernel:
            ours = kernel.ours(self._place)
            for name in names:
                if name in ours and name != self.policy.bridge:
                    kernel.remove(name, ours[name])
            self._sweep(kernel)

    def _sweep(self, kernel: "Links") -> None:
        """Remove our bridge, unless it has a port; and NAT, unless there is an interface of ours."""
        if kernel.is_unused(self.policy.bridge, self._bridge_alias):
            kernel.remove(self.policy.bridge, self._bridge_alias)
        if self.policy.nat and not kernel.ours(self._place):
            nat.switch_off(self.policy.bridge)


def _kernel() -> ModuleType:
    """What speaks with the kernel; loading it takes long, and most VMs have no network."""
    from vmactor.net import links  # noqa: PLC0415

    return links


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def host_id() -> str:
    """What tells this host from others, if anything does."""
    with suppress(OSError):
        return Path("/etc/machine-id").read_text().strip()
    return ""
