"""The daemon's server: accepts connections, knows who is at their other ends, and serves each.

It has no VMs of its own: what it creates is the service's, and ends with that.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import anyio
import msgpack
from anyio.abc import TaskGroup, TaskStatus

from vmactor.actors.handle import VirtualMachine
from vmactor.actors.service import VirtualizationService
from vmactor.daemon.methods import METHODS
from vmactor.daemon.session import Session
from vmactor.daemon.users import Quotas, User, Users, identity, requester_of
from vmactor.daemon.vms import OwnedVm, Vms
from vmactor.errors import ResourceExhaustedError, VmactorError
from vmactor.log import get_logger
from vmactor.messages import Requester
from vmactor.protocol import errors
from vmactor.rpc.connection import Connection
from vmactor.rpc.framing import RESPONSE, SERVER
from vmactor.waiting import readable

PAUSE_SECONDS: Final = 0.1
"""After a connection could not be accepted for want of descriptors."""
ACCEPTED_AT_ONCE: Final = 16

log = get_logger()


class Server:
    """Serves a service on sockets.

    Args:
        service: Open for as long as this serves; its policy says what users may do.
        quotas: What each user may have.

    Attributes:
        vms: The VMs of all users. VMs that were found, not created here, can be added.
        users: Who is here.
    """

    def __init__(self, service: VirtualizationService, quotas: Quotas | None = None) -> None:
        self.vms = Vms()
        self.users = Users(quotas or Quotas())
        self._service = service

    def adopt(self, vm: VirtualMachine) -> None:
        """Take in a VM that the service has adopted: it is its user's, and kept."""
        user = self.users.get(vm.info.requester_uid)
        self.vms.add(vm, user, kept=True, counted=self.vms.count_adopted(user, vm.memory_mib))

    async def serve(
        self,
        listeners: Sequence[socket.socket],
        *,
        task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled; then all connections are closed.

        VMs that were to end with their connections are killed, which the service waits for when it ends.

        Args:
            listeners: Unix stream sockets that listen and do not block; the caller's to close.
            task_status: Told when connections are accepted.
        """
        async with anyio.create_task_group() as tasks:
            for listener in listeners:
                tasks.start_soon(self._accept, listener, tasks)
            task_status.started()

    async def _accept(self, listener: socket.socket, tasks: TaskGroup) -> None:
        while True:
            await readable(listener)
            try:
                for _ in range(ACCEPTED_AT_ONCE):
                    self._admit(listener.accept()[0], tasks)
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                continue
            except OSError as error:
                log.warning("cannot accept a connection", error=str(error))
                await anyio.sleep(PAUSE_SECONDS)

    def _admit(self, sock: socket.socket, tasks: TaskGroup) -> None:
        sock.setblocking(False)
        try:
            requester = requester_of(sock)
        except OSError:  # it has gone already
            sock.close()
            return
        user = self.users.get(requester.uid)
        try:
            user.connect()
        except ResourceExhaustedError as refused:
            with sock, suppress(OSError):
                sock.send(msgpack.packb((RESPONSE, None, errors.to_wire(refused), None)), socket.MSG_NOSIGNAL)
            return
        tasks.start_soon(self._serve, sock, user, requester, tasks)

    async def _serve(self, sock: socket.socket, user: User, requester: Requester, tasks: TaskGroup) -> None:
        session = Session(
            self._service,
            self.vms,
            user=user,
            requester=identity(requester),
            permissions=self._service.policy.permissions,
            methods=METHODS,
        )
        session.connection = Connection(sock, session, SERVER, user.room)
        try:
            await session.connection.run()
        except Exception as error:  # a fault of ours must not end the others' connections
            log.error("a connection failed", user=user.uid, exc_info=error)
        finally:
            user.connections -= 1
            for owned in session.end():
                tasks.start_soon(self._give_up, owned)

    async def _give_up(self, owned: OwnedVm) -> None:
        try:
            await owned.vm.aclose()
        except VmactorError as error:
            log.error("a VM outlives its client's connection", cid=owned.vm.cid, error=str(error))
