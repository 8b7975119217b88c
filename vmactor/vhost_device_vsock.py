"""The vsock helper: one ``vhost-device-vsock`` process per VM, for hosts whose kernel has no vhost-vsock.

It serves the VM's vsock device to the VMM over one unix socket, and the hybrid convention (see
``vmactor.vsock``) to us over another. Both sockets live in the VM's private directory. The process and the
files belong to whoever called ``spawn`` and go with ``aclose``. It outlives its VMM, so it is the owner who
ends it; if it dies first, the guest is cut off, and ``wait`` tells.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

import anyio

from vmactor.console import Drain
from vmactor.errors import DeadlineExceededError, VsockError
from vmactor.ledger import Spawner
from vmactor.process import ExitStatus, Process
from vmactor.vsock import check_socket_path

READY_SECONDS: Final = 5.0
"""How long the helper may take until it listens."""

_STDERR_TAIL: Final = 4096
_PLAIN: Final = Spawner()


class VhostDeviceVsock:
    """A running helper.

    Attributes:
        process: Its process.
        uds_path: Where host-to-guest connections begin; ``HybridVsockTransport`` takes it.
    """

    def __init__(self, process: Process, uds_path: Path, vhost_path: Path, stderr: int) -> None:
        self.process = process
        self.uds_path = uds_path
        self._vhost_path = vhost_path
        self._stderr_fd: int | None = stderr
        self._stderr = Drain(stderr, sink=None, sink_cap=0, tail=_STDERR_TAIL)

    @classmethod
    def spawn(
        cls,
        executable: Path,
        cid: int,
        directory: Path,
        spawner: Spawner = _PLAIN,
        *,
        holds: Mapping[str, int] | None = None,
    ) -> Self:
        """Start a helper; ``connect`` waits until it listens.

        Args:
            executable: The program.
            cid: The guest's context identifier.
            directory: Where the sockets ``vsock`` and ``vhost.sock`` go; private (mode 0700), since whoever
                reaches them can speak for the guest.
            spawner: Spawns the VM's processes.
            holds: Read ends of its VMM's pipes, by name, that it is to hold open: it outlives its VMM.

        Raises:
            IllegalArgumentError: The directory's path is too long for a unix socket.
            VsockError: It cannot be run.
        """
        uds_path, vhost_path = directory / "vsock", directory / "vhost.sock"
        check_socket_path(vhost_path)
        try:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            try:
                # Relative, because its user may not be able to reach the directory, only to be in it.
                sockets = ["--socket", vhost_path.name, "--uds-path", uds_path.name]
                process = spawner(
                    "vsock helper",
                    [executable.absolute(), "--guest-cid", str(cid), *sockets],
                    stderr=write_end,
                    cwd=directory,
                    readers={**(holds or {}), "stderr": read_end},
                )
            except BaseException:
                os.close(read_end)
                raise
            finally:
                os.close(write_end)
        except OSError as error:
            raise VsockError(
                f"Cannot run the vsock helper {executable}: {error.strerror}; install vhost-device-vsock, or "
                "name it in VMACTOR_VHOST_DEVICE_VSOCK"
            ) from error
        return cls(process, uds_path, vhost_path, read_end)

    @classmethod
    def adopt(cls, process: Process, directory: Path, stderr: int) -> Self:
        """Take over a helper that another manager started.

        Args:
            process: It, known beyond doubt.
            directory: Where its sockets are.
            stderr: The read end of its pipe for complaints; belongs to the result.
        """
        return cls(process, directory / "vsock", directory / "vhost.sock", stderr)

    def __repr__(self) -> str:
        return f"<VhostDeviceVsock {self.process!r}>"

    @property
    def complaints(self) -> str:
        """The end of what it wrote to its standard error; foreign text."""
        return self._stderr.tail.decode(errors="replace").strip()

    async def connect(self) -> int:
        """Return a stream socket connected to the helper, for the VMM; it belongs to the caller.

        Raises:
            VsockError: The helper ended; the message holds its last words.
            DeadlineExceededError: It does not listen after 5 seconds; it lives on.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            with anyio.move_on_after(READY_SECONDS):
                await self._connect(sock)
                sock.setblocking(True)  # the VMM decides for itself
                return sock.detach()
        finally:
            sock.close()
        raise DeadlineExceededError(
            f"The vsock helper does not listen after {READY_SECONDS:g} s; the host may be overloaded"
        )

    async def wait(self) -> ExitStatus:
        """Return how the helper ended.

        Keep one task in here while the helper is needed: it also reads what the helper complains of, which
        would be stuck in a full pipe otherwise.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._stderr.run)
            status = await self.process.wait()
            await self._stderr.finish()
        return status

    async def aclose(self) -> None:
        """End the helper, remove its sockets. Idempotent; not interrupted by cancellation."""
        await self.process.aclose()
        await self._close()
        for path in (self.uds_path, self._vhost_path):
            path.unlink(missing_ok=True)

    async def let_go(self) -> None:
        """In place of ``aclose``: leave the helper, with its sockets, to the next manager."""
        self.process.let_go()
        await self._close()

    async def _close(self) -> None:
        if self._stderr_fd is not None:
            with anyio.CancelScope(shield=True):
                await self._stderr.finish()
            os.close(self._stderr_fd)
            self._stderr_fd = None

    async def _connect(self, sock: socket.socket) -> None:
        """Connect as soon as the helper listens."""
        pause = 0.001
        while True:
            try:
                sock.connect(os.fspath(self._vhost_path))
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                pass  # it has not made its socket yet, does not listen on it yet, or has its queue full
            else:
                return
            if self.process.status is not None:
                await self._stderr.finish()
                raise VsockError(f"The vsock helper ended ({self.process.status}): {self.complaints}")
            await anyio.sleep(pause)
            pause = min(2 * pause, 0.05)
