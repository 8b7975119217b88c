"""Takes in guests' tombstones on vsock port 2000, as the reference does, but within bounds.

A guest sends each on a connection of its own, until the end of the stream. One at a time is taken of a VM, by
a child of the VM's supervisor; so a guest that floods, trickles or never ends holds up itself only. Over the
hybrid transport each VM has a listener of its own. The kernel has one port 2000 for all VMs and managers of a
host: there the service listens once, and passes connections on by their CID, which the kernel vouches for.
"""

from collections.abc import Callable
from typing import Final, Protocol

import anyio
import anyio.to_thread
from anyio.abc import ByteStream, TaskStatus
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from vmactor.actors.guest_rpc import Listener
from vmactor.errors import ResourceExhaustedError, VsockError
from vmactor.log import get_logger
from vmactor.messages import Tombstone
from vmactor.tombstones import TombstoneFile, TombstoneStore
from vmactor.vsock import VsockAttribute, VsockListener

PORT: Final = 2000
"""``VM_TOMBSTONES_SERVICE_PORT`` of the reference's guest interface; below all CIDs, so no RPC port."""
PAUSE_SECONDS: Final = 0.1
"""What each connection costs that brought no tombstone, and each accept that failed."""
WAITING: Final = 4
"""How many connections of a VM may wait, where the service accepts them; more are closed."""
CHUNK: Final = 64 * 1024

log = get_logger()


class ClosableListener(Listener, Protocol):
    """A listener that its user closes."""

    async def aclose(self) -> None:
        """Stop listening. Idempotent."""
        ...


class SharedPort:
    """The kernel's port 2000, for all VMs of a service.

    Args:
        listen: Listens for the CIDs that it is given a test for.
    """

    def __init__(self, listen: Callable[[Callable[[int], bool]], VsockListener]) -> None:
        self._listen = listen
        self._waiting: dict[int, MemoryObjectSendStream[ByteStream]] = {}

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Pass connections on until cancelled; returns at once if the port cannot be had."""
        try:
            listener = self._listen(self._waiting.__contains__)
        except VsockError as error:  # another manager has it, most likely; the reference goes on without, too
            log.warning("tombstones are not received", error=error.message)
            task_status.started()
            return
        async with listener:
            task_status.started()
            while True:
                try:
                    stream = await listener.accept()
                except ResourceExhaustedError as error:
                    log.warning("cannot accept a tombstone's connection", error=error.message)
                    await anyio.sleep(PAUSE_SECONDS)
                    continue
                cid = stream.extra(VsockAttribute.peer_cid)  # noqa: S610 - no Django
                try:
                    self._waiting[cid].send_nowait(stream)
                except (KeyError, anyio.WouldBlock, anyio.BrokenResourceError):
                    await anyio.aclose_forcefully(stream)

    def listen(self, cid: int) -> ClosableListener:
        """What comes from one guest."""
        self._waiting[cid], receive = anyio.create_memory_object_stream[ByteStream](WAITING)
        return _Share(receive, lambda: self._waiting.pop(cid).close())


class _Share:
    def __init__(self, receive: MemoryObjectReceiveStream[ByteStream], forget: Callable[[], None]) -> None:
        self._receive = receive
        self._forget: Callable[[], None] | None = forget

    async def accept(self) -> ByteStream:
        return await self._receive.receive()

    async def aclose(self) -> None:
        if self._forget is None:
            return
        self._forget()
        self._forget = None
        while True:
            try:
                await anyio.aclose_forcefully(self._receive.receive_nowait())
            except (anyio.WouldBlock, anyio.EndOfStream):
                break
        self._receive.close()


class TombstoneReceiver:
    """Takes in the tombstones of one VM, over all its runs.

    Args:
        store: Where they are kept.
        listen: Listens on the port, for this VM.
        name: The VM's name.
        cid: Its CID.
    """

    def __init__(
        self, store: TombstoneStore, listen: Callable[[], ClosableListener], name: str, cid: int
    ) -> None:
        self._store = store
        self._listen = listen
        self._name = name
        self._cid = cid
        self._taken = 0
        self._log = get_logger(vm=name, cid=cid)
        self._said: set[str] = set()

    async def serve(self, publish: Callable[[Tombstone], object], *, task_status: TaskStatus[None]) -> None:
        """Serve one run, until cancelled; what has come of a tombstone until then is kept.

        Args:
            publish: Tells of one that is kept.
            task_status: Told when the guest may connect.
        """
        try:
            listener = self._listen()
        except VsockError as error:
            self._warn("tombstones of a guest are not received", error.message)
            task_status.started()
            return
        try:
            task_status.started()
            while True:
                try:
                    stream = await listener.accept()
                except ResourceExhaustedError as error:
                    self._warn("cannot accept a tombstone's connection", error.message)
                    await anyio.sleep(PAUSE_SECONDS)
                    continue
                try:
                    kept = await self._take(stream, publish)
                finally:
                    await anyio.aclose_forcefully(stream)
                if not kept:
                    await anyio.sleep(PAUSE_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):
                await listener.aclose()

    async def _take(self, stream: ByteStream, publish: Callable[[Tombstone], object]) -> bool:
        """Take one in; whether there was one."""
        if self._taken >= self._store.limits.per_vm:
            self._warn("a guest sends too many tombstones", f"the first {self._taken} are kept")
            return False
        file, truncated = None, True
        try:
            file = self._store.begin(self._name, self._cid)
            truncated = await self._copy(stream, file)
        except OSError as error:
            self._cannot_keep(error)
            if file is not None:
                file.discard()
        finally:
            # Also when the run ends, which is when a guest goes that crashed.
            kept = file is not None and self._keep(file, truncated, publish)
        return kept

    def _keep(self, file: TombstoneFile, truncated: bool, publish: Callable[[Tombstone], object]) -> bool:
        try:
            if not file.finish():
                return False
        except OSError as error:
            self._cannot_keep(error)
            return False
        self._taken += 1
        publish(Tombstone(path=str(file.path), size=file.size, truncated=truncated))
        return True

    def _cannot_keep(self, error: OSError) -> None:
        self._warn("cannot keep a guest's tombstone", str(error))

    async def _copy(self, stream: ByteStream, file: TombstoneFile) -> bool:
        """Copy until the end of the stream; whether something is missing."""
        with anyio.move_on_after(self._store.limits.seconds):
            while True:
                try:
                    data = await stream.receive(CHUNK)
                except anyio.EndOfStream:
                    return False
                except anyio.BrokenResourceError:
                    return True
                if not await anyio.to_thread.run_sync(file.write, data):
                    return True
        return True

    def _warn(self, event: str, error: str) -> None:
        """Each kind of trouble is told once in a VM's life: a guest must not fill the log."""
        if event not in self._said:
            self._said.add(event)
            self._log.warning(event, error=error)
