"""A daemon's service: the interface of ``actors.service.VirtualizationService``, over a socket."""

import os
import socket
from collections.abc import Callable, Hashable, Iterable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import anyio

from vmactor.actors.guest_binder import GuestBinder
from vmactor.actors.restart_policy import RestartPolicy
from vmactor.actors.stop_ladder import StopLadder
from vmactor.app_config import AppConfig
from vmactor.bus import PATIENCE_SECONDS, Overflow
from vmactor.client.machine import STOP_SECONDS, VirtualMachine, ladder_to_wire
from vmactor.client.session import Session
from vmactor.config import Descriptor, RawConfig, duplicated
from vmactor.errors import (
    IllegalArgumentError,
    IllegalStateError,
    NotConnectedError,
    NotStoppedError,
    SecurityError,
)
from vmactor.images.idsig import IdsigResult
from vmactor.messages import Event, Gap, PartitionType, Snapshot, StopRung, VirtualMachineDebugInfo, VmInfo
from vmactor.protocol import errors, values
from vmactor.protocol.address import VARIABLE, socket_to_use
from vmactor.rpc.files import Attached
from vmactor.subscription import Choice, Subscription

CONNECT_SECONDS: Final = 10.0
CALL_SECONDS: Final = 60.0
"""How long the daemon may take for what needs no time of its own."""
IDSIG_SECONDS: Final = 600.0
_BUSY_SECONDS: Final = 0.02


def connect(path: str | os.PathLike[str] | None = None) -> "VirtualizationService":
    """The service of a daemon, to be used in place of an embedded ``VirtualizationService``.

    Args:
        path: The daemon's socket; ``$VMACTOR_SOCKET`` if None, else that of this user's daemon or of root's.
    """
    return VirtualizationService(Path(path) if path is not None else socket_to_use())


class VirtualizationService:
    """A daemon's service, used like an embedded one: in its ``async with`` block. Made by ``connect``.

    Leaving the block ends all VMs that were created through it, but those that are to be kept, and waits
    until nothing of them is left. If this process dies, or the connection breaks, the daemon does that by
    itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entered: AsyncExitStack
        self._session: Session | None = None

    def __repr__(self) -> str:
        open_ = self._session is not None and not self._session.closed
        return f"<VirtualizationService {self.path} {'open' if open_ else 'closed'}>"

    async def __aenter__(self) -> Self:
        sock = await _connected(self.path)
        async with AsyncExitStack() as entered:
            entered.callback(sock.close)
            tasks = await anyio.create_task_group().__aenter__()
            # What the block raises is its own affair, and no part of a group.
            entered.push_async_callback(tasks.__aexit__, None, None, None)
            entered.callback(tasks.cancel_scope.cancel)
            session = Session(sock, self.path, tasks)
            tasks.start_soon(session.run)
            await session.meet()
            self._session = session
            self._entered = entered.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        session, self._session = self._session, None
        if session is not None:
            with anyio.move_on_after(STOP_SECONDS, shield=True):
                await session.leave()
        return await self._entered.__aexit__(kind, value, trace)

    @property
    def _open(self) -> Session:
        if self._session is None:
            raise IllegalStateError("the service is closed: use it inside its 'async with' block")
        return self._session

    async def _call(self, method: str, *params: Any, within: float = CALL_SECONDS) -> Any:
        return await self._open.call(method, *params, within=within)

    # -- Creating --------------------------------------------------------------------------------------

    async def create_vm(
        self,
        config: RawConfig | AppConfig,
        *,
        console: int | None = None,
        log: int | None = None,
        ramdump: int | None = None,
        hangup_detection: bool | None = None,
        hangup_timeout: float | None = None,
        restart: RestartPolicy | None = None,
        guest_binder: GuestBinder | None = None,
        keep: bool = False,
    ) -> VirtualMachine:
        """Create a VM; see ``actors.service.VirtualizationService.create_vm``, also for what is raised.

        The requester is this process's user, as the kernel tells the daemon.

        Args:
            config: What to run. Its descriptors are sent to the daemon; they stay the caller's.
            console: Descriptor that the guest's console is copied to.
            log: The same for the guest's log.
            ramdump: The same for a crash dump.
            hangup_detection: As embedded.
            hangup_timeout: As embedded.
            restart: As embedded.
            guest_binder: As embedded.
            keep: Let the VM live on when this handle goes or the connection ends, whatever the reason.

        Raises:
            SecurityError: Also if this user's VMs may not be kept.
        """
        with ExitStack() as owned:
            own = config.duplicate()  # says what is not open, as embedded
            owned.callback(own.close)
            options = {
                "console": _attached(console, "console", owned),
                "log": _attached(log, "log", owned),
                "ramdump": _attached(ramdump, "ramdump", owned),
                "hangupDetection": hangup_detection,
                "hangupTimeout": hangup_timeout,
                "restart": None if restart is None else _restart_to_wire(restart),
                "guestBinder": None if guest_binder is None else values.to_wire(guest_binder),
                "keep": keep or None,
            }
            given = {name: value for name, value in options.items() if value is not None}
            made = await self._call("createVm", values.config_to_wire(own), given)
        if not keep:
            self._open.own.add(made["vm"])
        return self._handle(made)

    async def open_vm(self, cid: int) -> VirtualMachine:
        """A handle on a VM that another process created, or that was kept; letting go of it ends nothing.

        Raises:
            IllegalArgumentError: No such VM lives, or it is none of this user's.
        """
        return self._handle(await self._call("openVm", cid))

    def _handle(self, made: dict[str, Any]) -> VirtualMachine:
        session = self._open
        return VirtualMachine(session, made["vm"], session.present.know(values.info_from_wire(made["info"])))

    # -- Looking ---------------------------------------------------------------------------------------

    @property
    def seq(self) -> int:
        """The number of the last event that came; a cursor for ``subscribe(after=...)``."""
        return self._open.present.seq

    def list_vms(self) -> list[VmInfo]:
        """The VMs that live and that this user may see, by CID, as the daemon's events tell of them."""
        vms = self._session.present.vms if self._session is not None else {}
        return [vms[cid].info for cid in sorted(vms)]

    def subscribe(
        self,
        wants: Callable[[Event], bool] | None = None,
        *,
        cids: Iterable[int] | None = None,
        kinds: Iterable[Hashable] | None = None,
        capacity: int = 1024,
        overflow: Overflow = Overflow.DROP_OLDEST,
        patience: float = PATIENCE_SECONDS,
        late: bool = False,
        snapshot: bool = False,
        after: int | None = None,
    ) -> Subscription[Event]:
        """Receive what happens to VMs; see ``actors.service.VirtualizationService.subscribe``.

        It is in force before anything that is called later. What the daemon refuses is raised when it is
        read. ``wants`` is called here; all else filters at the daemon, where ``capacity`` events may wait,
        too. ``Overflow.WAIT`` makes publishers wait for the connection, not for the reader behind it.
        """
        if late + snapshot + (after is not None) > 1:
            raise ValueError("a stream begins in one way: 'late', 'snapshot' or 'after'")
        topics = None if cids is None else frozenset(cids)
        wanted = None if kinds is None else frozenset(kinds)
        options: dict[str, Any] = {
            "cids": None if topics is None else sorted(topics),
            "kinds": None if wanted is None else sorted(kind.kind for kind in wanted),  # type: ignore[attr-defined]
            "capacity": capacity,
            "overflow": values.camel(overflow.value.replace(" ", "_")),
            "patience": patience,
            "late": late or None,
            "snapshot": snapshot or None,
            "after": after,
        }
        given = {name: value for name, value in options.items() if value is not None}
        own = None if wants is None else _spare_marks(wants)
        choice = Choice(own, topics, wanted, capacity, overflow, patience, until_end=False)
        return self._open.subscribe(given, choice)

    async def info(self) -> dict[str, Any]:
        """What the daemon says of itself: its version, its VMM, its host."""
        return dict(await self._call("info"))

    async def debug_list_vms(self) -> list[VirtualMachineDebugInfo]:
        """The reference's debug records. Raises SecurityError if this user may not see them."""
        rows = await self._call("debugListVms")
        return [values.from_wire(VirtualMachineDebugInfo, row, "debug info", strict=False) for row in rows]

    async def dump(self) -> str:
        """The reference's textual dump. Raises SecurityError if this user may not have it."""
        return str(await self._call("dump"))

    # -- Doing -----------------------------------------------------------------------------------------

    async def shutdown_vms(
        self, ladder: StopLadder | None = None
    ) -> dict[int, StopRung | NotStoppedError | None]:
        """Shut down all VMs that this user controls, at once; by CID, what ended each, or the error."""
        chosen = ladder or StopLadder()
        told = await self._call("shutdownVms", ladder_to_wire(chosen), within=chosen.budget + STOP_SECONDS)
        ends: dict[int, StopRung | NotStoppedError | None] = {}
        for cid, end in told.items():
            if (error := end.get("error")) is not None:
                revived = errors.from_wire(error)
                ends[int(cid)] = (
                    revived if isinstance(revived, NotStoppedError) else NotStoppedError(str(revived))
                )
            else:
                ends[int(cid)] = None if end.get("rung") is None else StopRung[end["rung"]]
        return ends

    async def initialize_writable_partition(
        self, image: Descriptor, size: int, partition_type: PartitionType | int = PartitionType.RAW
    ) -> int:
        """Turn a file into an empty QCOW2 image for a guest to write to; raises as embedded.

        Returns:
            The size of the guest's disk.
        """
        try:
            kind = PartitionType(partition_type).name
        except ValueError:
            raise IllegalArgumentError(f"there is no partition type {partition_type!r:.60}") from None
        with duplicated("partition image", image) as fd:
            return int(await self._call("initializeWritablePartition", Attached(fd), size, kind))

    async def create_or_update_idsig_file(self, apk: Descriptor, idsig: Descriptor) -> IdsigResult:
        """Make the idsig file of an APK, unless it is up to date; raises as embedded."""
        with duplicated("APK", apk) as apk_fd, duplicated("idsig", idsig) as idsig_fd:
            files = Attached(apk_fd), Attached(idsig_fd)
            told = await self._call("createOrUpdateIdsigFile", *files, within=IDSIG_SECONDS)
        return values.from_wire(IdsigResult, told, "result", strict=False)


def _attached(fd: int | None, what: str, owned: ExitStack) -> Attached | None:
    return None if fd is None else Attached(owned.enter_context(duplicated(what, fd)))


def _restart_to_wire(policy: RestartPolicy) -> dict[str, Any]:
    limit, backoff = policy.limit, policy.backoff
    return {
        "when": policy.when.value,
        "limit": {"count": limit.intensity, "seconds": limit.period},
        "backoff": {"initial": backoff.initial, "maximum": backoff.maximum, "stable": backoff.stable},
    }


def _spare_marks(wants: Callable[[Event], bool]) -> Callable[[Event], bool]:
    """Filters are asked about what happened, not about what was missed."""
    return lambda event: isinstance(event, Gap | Snapshot) or wants(event)


async def _connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        with anyio.move_on_after(CONNECT_SECONDS):
            while True:
                try:
                    sock.connect(os.fspath(path))
                except BlockingIOError:  # its queue of new connections is full
                    await anyio.sleep(_BUSY_SECONDS)
                else:
                    return sock
        raise NotConnectedError(f"the daemon at {path} takes no connections: it is stuck, or too busy")
    except PermissionError as error:
        sock.close()
        raise SecurityError(f"this user may not connect to {path}: ask for access to the socket") from error
    except OSError as error:
        sock.close()
        raise NotConnectedError(
            f"there is no daemon at {path} ({error.strerror or error}): start 'vmactor serve', or name its "
            f"socket with --socket or ${VARIABLE}"
        ) from error
    except BaseException:
        sock.close()
        raise
