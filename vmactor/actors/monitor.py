"""One run of a VM: its helper, its VMM and its channels, from the spawn to the last byte read.

Owned by the VM's supervisor as one child. It tells the VM's actor what happens and decides nothing, except
that a VMM whose vsock helper died, or that never said it runs, is killed. However it ends, no process,
descriptor or socket of the run is left.
"""

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import anyio
from anyio.abc import TaskStatus

from vmactor import usage
from vmactor.actors.admission import NOTHING, Admission, AdmissionPolicy, Reservation
from vmactor.actors.boots import BootQueue
from vmactor.actors.keeping import Inheritance
from vmactor.actors.vocabulary import (
    NOT_RUNNING,
    BootBegins,
    BootWaits,
    Message,
    RunEnded,
    VmmGone,
    VmmRunning,
    VmmSpawned,
)
from vmactor.config import RawConfig
from vmactor.console import CONSOLE_TAIL, FAILURE_CAP, FAILURE_TAIL, STDERR_TAIL, Drain, Lines
from vmactor.drains import Drains
from vmactor.errors import (
    DeadlineExceededError,
    IllegalStateError,
    ResourceExhaustedError,
    VmactorError,
    VmmError,
    hint,
)
from vmactor.images.disks import lock_formats
from vmactor.ledger import Spawner
from vmactor.log import get_logger
from vmactor.messages import DeathReason
from vmactor.net.networks import Connection
from vmactor.process import UNKNOWN, Process
from vmactor.state_dir import sockets_of
from vmactor.text import escape_bytes
from vmactor.usage import CpuTime, Memory, Usage
from vmactor.vhost_device_vsock import VhostDeviceVsock
from vmactor.vmm.driver import (
    Channels,
    DirectVsock,
    KernelVsock,
    Launch,
    LeftVmm,
    Tap,
    VhostUserVsock,
    Vmm,
    VmmDriver,
    VmmExit,
    VsockDevice,
)

MIB: Final = 1 << 20
CONSOLE_CAP: Final = 64 * MIB
"""Bytes of console, and of log, that are copied to a caller's file."""
RAMDUMP_CAP: Final = 4096 * MIB
KILL_SECONDS: Final = 10.0
"""How long a killed process may take to end before it counts as a survivor."""
MEASURE_SECONDS: Final = 5.0
"""How long the kernel may take to tell what a VMM uses."""
END_GRACE: Final = 0.5
"""A VMM that ends within this time of its helper's end, or of a refusal to run, ended by itself."""

_LAST_WORDS: Final = ("console", "failure")

log = get_logger()


@dataclass(frozen=True, slots=True)
class Sinks:
    """Where a caller wants the guest's output, as descriptors, or None.

    Attributes:
        console: What the guest writes to its console.
        log: What it writes to its log.
        ramdump: What it writes when it crashes.
        to_log: Whether console and log go to our own log where there is no descriptor for them.
    """

    console: int | None = None
    log: int | None = None
    ramdump: int | None = None
    to_log: bool = False


def _unbounded() -> Reservation:
    return Admission(AdmissionPolicy(checked=False), lambda: ()).reserve(NOTHING)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What every run of a VM is made from.

    Attributes:
        name: The VM's name.
        cid: Its CID.
        config: What to run.
        driver: How.
        directory: Where its sockets go.
        sinks: Where its output goes.
        vhost_fd: An open vhost-vsock device with the CID claimed, where the kernel does vsock.
        helper: The vhost-device-vsock executable, where that does it; without either the VMM itself does.
        spawner: Spawns its processes.
        renew: Makes the VM's place ready for another run; may raise ``OSError``.
        boots: Where its starts wait for their turn.
        reservation: What it was promised.
        drains: Read its pipes, but those that are copied.
        keep: Whether it is to outlive its manager.
        connection: Its network, if it has one.
        workers: Threads for looking at its owner's files; None for any.
    """

    name: str
    cid: int
    config: RawConfig
    driver: VmmDriver
    directory: Path
    sinks: Sinks
    vhost_fd: int | None
    helper: Path | None
    spawner: Spawner = Spawner()  # noqa: RUF009 - immutable
    renew: Callable[[], None] = lambda: None
    boots: BootQueue = field(default_factory=lambda: BootQueue(1))
    reservation: Reservation = field(default_factory=_unbounded)
    drains: Drains = field(default_factory=Drains)
    keep: bool = False
    connection: Connection | None = None
    workers: Callable[[], anyio.CapacityLimiter | None] = lambda: None


class Run:
    """A run under way.

    Attributes:
        vmm: The VMM, once spawned.
        survivors: The processes that outlived SIGKILL, for people.
        generation: Its number.
        balloon: What the balloon was last told to take from the guest, in bytes.
    """

    def __init__(
        self,
        spec: RunSpec,
        generation: int,
        post: Callable[[Message], None],
        inheritance: Inheritance | None = None,
        *,
        suspended: bool = False,
    ) -> None:
        """Prepare a run.

        Args:
            spec: What it is made from.
            generation: Its number.
            post: Tells the VM's actor.
            inheritance: Its processes, where another manager began it; belongs to the run.
            suspended: Whether that one had paused its virtual CPUs.
        """
        self.vmm: Vmm | None = None
        self.survivors: list[str] = []
        self.generation = generation
        self._inheritance = inheritance
        self._suspended = suspended
        self._left_alive = False
        self.balloon = 0
        self._helper: VhostDeviceVsock | None = None
        self._spec = spec
        self._post = post
        self._began = anyio.current_time()
        self._killed = False
        self._startup: anyio.CancelScope | None = None
        self._failure: VmmExit | None = None
        self._cause: Exception | None = None
        self._ended: VmmExit | None = None
        self._pipes: _Pipes | None = None
        self._peak = Memory()
        self._booting = False
        self._reported = anyio.Event()

    @property
    def vsock_peer(self) -> int | None:
        """The process whose vsock connections are the guest's, while it lives; numbers are used again."""
        helper, inherited = self._helper, self._inheritance
        if inherited is not None:
            peer = inherited.helper or inherited.vmm
            return peer.pid if peer.status is None else None
        if self._spec.helper is None:  # the VMM itself, where the kernel does not vouch for the guest
            return self.vmm.pid if self.vmm is not None and self._ended is None else None
        return helper.process.pid if helper is not None and helper.process.status is None else None

    def kill(self) -> None:
        """End the run now; never blocks, any number of times."""
        self._killed = True
        if self.vmm is not None:
            self.vmm.kill()
        elif self._startup is not None:
            self._startup.cancel()

    def let_go(self) -> None:
        """Leave the processes alive when the run is stopped next; only for a VM that is kept."""
        self._left_alive = self.vmm is not None or self._inheritance is not None

    def fail(self, detail: str) -> None:
        """End the run now because of a fault of ours."""
        self._failure = self._failure or VmmExit(UNKNOWN, DeathReason.INFRASTRUCTURE_ERROR, detail)
        self.kill()

    def guest_reported(self) -> None:
        """The guest is up, so the boot is over; any number of times."""
        self._reported.set()

    async def trim(self, percent: int) -> None:
        """Have the balloon take a share of the guest's memory, if it says how much it has."""
        vmm = self.running_vmm()
        stats = await vmm.balloon_stats()
        if stats is not None and stats.total_memory is not None:
            size = stats.total_memory * percent // 100
            await vmm.set_balloon(size)
            self.balloon = size

    async def measure(self) -> Usage:
        """What the VMM uses now.

        Raises:
            IllegalStateError: There is none, or none any more.
            DeadlineExceededError: The kernel does not say within 5 s.
        """
        pid = self.running_vmm().pid
        used = None
        with anyio.move_on_after(MEASURE_SECONDS) as patience:
            used = await anyio.to_thread.run_sync(usage.measure, pid, abandon_on_cancel=True)
        if patience.cancelled_caught:
            raise DeadlineExceededError(f"the kernel does not tell what process {pid} uses; it may be stuck")
        if used is None or self._ended is not None:  # else the number may be another process's by now
            raise IllegalStateError(NOT_RUNNING)
        self._peak = self._peak.most(used.memory)
        return used

    def follow_console(self) -> int:
        """A descriptor that gets what the guest writes to its console; the caller's to close.

        Raises:
            IllegalStateError: The run has not begun to run, or has ended.
            ResourceExhaustedError: Too many follow it already, or there is no descriptor.
        """
        if self._pipes is None or self._ended is not None:
            raise IllegalStateError(NOT_RUNNING)
        return self._pipes.console.follow()

    def running_vmm(self) -> Vmm:
        """The VMM. Raises IllegalStateError if it was not spawned yet."""
        if self.vmm is None:
            raise IllegalStateError(NOT_RUNNING)
        return self.vmm

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """The supervisor's child; always reports ``RunEnded`` last."""
        task_status.started()
        try:
            pipes = self._pipes = self._make_pipes()
        except (OSError, VmactorError) as error:
            exhausted = ResourceExhaustedError(f"cannot make the VM's pipes: {error}; raise 'ulimit -n'")
            self._post(self.account(VmmExit(UNKNOWN, DeathReason.START_FAILED, str(exhausted))))
            return
        common = self._spec.drains
        try:
            async with anyio.create_task_group() as drains:
                alone = [drain for drain in pipes.drains if not common.add(drain)]
                for drain in alone:
                    drains.start_soon(drain.run)
                ended = await self._until_exit(pipes)
                for drain in pipes.drains:
                    drain.finish_soon()
                    if drain not in alone:
                        common.remove(drain)
                        await drain.run()
        finally:
            for drain in pipes.drains:
                common.remove(drain)
            pipes.close()
            if self._inheritance is not None:
                self._inheritance.close()
        self._post(self.account(ended))

    def _make_pipes(self) -> "_Pipes":
        spec = self._spec
        inherited = None if self._inheritance is None else self._inheritance.take_channels()
        return _Pipes(spec.sinks, spec.cid, inherited, keep=spec.keep)

    def account(self, otherwise: VmmExit) -> RunEnded:
        """What is known of the run, after its end.

        Args:
            otherwise: How it ended, unless its VMM is known to have ended before.
        """
        ended = self._ended or otherwise
        known = RunEnded(
            self.generation,
            ended.reason,
            exit_code=ended.status.code,
            signal=ended.status.signal,
            detail=ended.detail,
            survivors=" and ".join(self.survivors),
            cause=self._cause,
            at=anyio.current_time(),
            lasted=anyio.current_time() - self._began,
            cpu=ended.status.cpu or CpuTime(),
            peak=self._peak,
            adopted=self._inheritance is not None,
            chance=random.random(),  # noqa: S311 - it spreads restarts, it keeps no secret
        )
        if self._pipes is None:
            return known
        last_words = self._pipes.stderr.tail.decode(errors="replace").strip()
        return replace(
            known,
            failure=self._pipes.failure.tail[:FAILURE_CAP].decode(errors="replace"),
            detail="\n".join(part for part in (ended.detail, last_words) if part),
            console_tail=self._pipes.console.tail.decode(errors="replace"),
            console_dropped=self._pipes.console.dropped,
        )

    async def _until_exit(self, pipes: "_Pipes") -> VmmExit:
        try:
            async with AsyncExitStack() as stack:
                with anyio.CancelScope() as self._startup:
                    if self._killed:
                        self._startup.cancel()
                    if self._inheritance is not None:
                        self.vmm = await self._inherit(stack, self._inheritance)
                    else:
                        self.vmm = await self._start(stack, pipes)
                if self.vmm is None:
                    stopped = VmmExit(UNKNOWN, DeathReason.KILLED, "stopped before its VMM was spawned")
                    return self._failure or stopped
                pipes.close_write_ends()
                self._post(VmmSpawned(self.generation, self.vmm.pid))
                ended = await self._watch(self.vmm)
                if self._inheritance is not None and ended.reason is DeathReason.INFRASTRUCTURE_ERROR:
                    # All that is wrong is that nobody can know its status.
                    ended = replace(ended, reason=DeathReason.KILLED if self._killed else DeathReason.UNKNOWN)
                self._ended = replace(self._failure, status=ended.status) if self._failure else ended
                self._post(VmmGone(self.generation))
                return self._ended
        except (VmactorError, OSError) as error:
            if self._ended is not None:
                log.error("a run was not cleared away in full", vm=self._spec.name, error=str(error))
                return self._ended
            self._cause = error
            refused = f"the host refused: {error}{hint(error)}" if isinstance(error, OSError) else str(error)
            return VmmExit(UNKNOWN, DeathReason.START_FAILED, refused)

    async def _start(self, stack: AsyncExitStack, pipes: "_Pipes") -> Vmm:
        await self._wait_for_turn(stack)
        self._spec.reservation.check()
        if self.generation > 1:
            self._spec.renew()
        config = await self._look_at_disks()
        await self._start_helper(stack, pipes)
        return await self._spawn(stack, pipes, config)

    async def _inherit(self, stack: AsyncExitStack, inheritance: Inheritance) -> Vmm:
        """Take over helper and VMM; whatever cannot be taken over is killed."""
        spec, vmm = self._spec, inheritance.vmm
        if spec.connection is not None:
            stack.push_async_callback(self._detach, spec.connection)
        if inheritance.helper is not None:
            self._helper = VhostDeviceVsock.adopt(
                inheritance.helper, sockets_of(spec.directory), inheritance.take_complaints()
            )
            closing = self._closing("its vsock helper", self._helper.process, self._helper)
            await stack.enter_async_context(closing)
        left = LeftVmm(vmm, spec.directory, spec.config.memory_mib, helped=inheritance.helper is not None)
        try:
            taken = await spec.driver.adopt(left)
        except BaseException:
            if not self._left_alive:
                vmm.kill()
            raise
        await stack.enter_async_context(self._closing("its VMM", taken, taken))
        return taken

    async def _wait_for_turn(self, stack: AsyncExitStack) -> None:
        boots = self._spec.boots
        if not boots.take_nowait():
            self._post(BootWaits(self.generation))
            await boots.take()
            self._post(BootBegins(self.generation))
        self._booting = True
        stack.callback(self._spec.reservation.given_back)
        stack.callback(self._end_boot)

    def _end_boot(self) -> None:
        if self._booting:
            self._booting = False
            self._spec.reservation.taken()
            self._spec.boots.give_back()

    async def _look_at_disks(self) -> RawConfig:
        """Before every run: whoever could write to a disk since the last look may have changed its format."""
        config = self._spec.config
        if not config.disks:
            return config
        return await anyio.to_thread.run_sync(lock_formats, config, limiter=self._spec.workers())

    async def _start_helper(self, stack: AsyncExitStack, pipes: "_Pipes") -> None:
        spec = self._spec
        if spec.helper is not None:
            # Should the VMM of a kept VM end while there is no manager, its last words are still somewhere.
            holds = {name: pipes.channels.readers[name] for name in _LAST_WORDS} if spec.keep else {}
            self._helper = VhostDeviceVsock.spawn(
                spec.helper, spec.cid, sockets_of(spec.directory), spec.spawner, holds=holds
            )
            closing = self._closing("its vsock helper", self._helper.process, self._helper)
            await stack.enter_async_context(closing)

    async def _spawn(self, stack: AsyncExitStack, pipes: "_Pipes", config: RawConfig) -> Vmm:
        spec = self._spec
        device: VsockDevice
        lent = ExitStack()  # what only the VMM needs; it has its own by inheritance
        if self._helper is not None:
            connection = await self._helper.connect()
            stack.callback(os.close, connection)
            device = VhostUserVsock(connection)
        elif spec.vhost_fd is not None:
            device = KernelVsock(spec.vhost_fd)
        else:
            sockets = sockets_of(spec.directory)
            directory = os.open(sockets, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            lent.callback(os.close, directory)
            device = DirectVsock(directory)
        with lent:
            taps = await self._attach(stack, lent)
            launch = Launch(
                spec.name, spec.cid, config, device, pipes.channels, spec.directory, spec.spawner, taps
            )
            vmm = await spec.driver.spawn(launch)
        await stack.enter_async_context(self._closing("its VMM", vmm, vmm))
        return vmm

    async def _attach(self, stack: AsyncExitStack, lent: ExitStack) -> tuple[Tap, ...]:
        """Make the VM's taps, which live as long as its VMM."""
        connection = self._spec.connection
        if connection is None:
            return ()
        stack.push_async_callback(self._detach, connection)
        fds = await connection.attach()
        for fd in fds:
            lent.callback(os.close, fd)
        return tuple(
            Tap(fd, link.mac, link.asked.mtu) for fd, link in zip(fds, connection.links, strict=True)
        )

    async def _detach(self, connection: Connection) -> None:
        if not self._left_alive or self._ended is not None:
            await connection.detach()

    @asynccontextmanager
    async def _closing(
        self, name: str, process: Process | Vmm, owner: VhostDeviceVsock | Vmm
    ) -> AsyncIterator[None]:
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                if self._left_alive and self._ended is None:
                    await owner.let_go()
                else:
                    await self._close(name, process, owner)

    async def _close(self, name: str, process: Process | Vmm, owner: VhostDeviceVsock | Vmm) -> None:
        try:
            with suppress(PermissionError):
                process.kill()
            with anyio.move_on_after(KILL_SECONDS) as patience:
                await process.wait()
            if patience.cancelled_caught:
                self.survivors.append(f"{name} (process {process.pid})")
        finally:
            await owner.aclose()

    async def _watch(self, vmm: Vmm) -> VmmExit:
        async with anyio.create_task_group() as watchers:
            watchers.start_soon(self._confirm if self._inheritance is None else self._reconfirm, vmm)
            if self._helper is not None:
                watchers.start_soon(self._watch_helper, vmm, self._helper)
            ended = await vmm.wait()
            watchers.cancel_scope.cancel()
        return ended

    async def _confirm(self, vmm: Vmm) -> None:
        try:
            await vmm.wait_running()
        except VmmError as error:
            if not await _ends(vmm) and not self._killed:  # else its exit tells the reason
                self._failure = VmmExit(UNKNOWN, DeathReason.START_FAILED, str(error))
                vmm.kill()
        except (DeadlineExceededError, ResourceExhaustedError) as error:
            if not self._killed:
                self._failure = VmmExit(UNKNOWN, DeathReason.START_FAILED, str(error))
            vmm.kill()
        else:
            self._post(VmmRunning(self.generation))
            with anyio.move_on_after(self._spec.driver.footprint(self._spec.config).boot_seconds):
                await self._reported.wait()
            self._end_boot()

    async def _reconfirm(self, vmm: Vmm) -> None:
        """Have a VMM that was taken over be as it was known to be; its silence is no reason to end it."""
        try:
            await vmm.take_over(suspended=self._suspended)
        except (VmmError, DeadlineExceededError, ResourceExhaustedError) as error:
            who = {"vm": self._spec.name, "cid": self._spec.cid}
            log.warning("an adopted VMM does not answer", error=str(error), **who)
        else:
            self._post(VmmRunning(self.generation))

    async def _watch_helper(self, vmm: Vmm, helper: VhostDeviceVsock) -> None:
        status = await helper.wait()
        if await _ends(vmm):
            return
        said = helper.complaints or "nothing"
        detail = f"the VM's vsock helper ended ({status}), so the VM was killed; the helper said: {said}"
        log.error(
            "vsock helper ended before its VM", vm=self._spec.name, cid=self._spec.cid, status=str(status)
        )
        self._failure = VmmExit(UNKNOWN, DeathReason.INFRASTRUCTURE_ERROR, detail)
        vmm.kill()


async def _ends(vmm: Vmm) -> bool:
    with anyio.move_on_after(END_GRACE):
        await vmm.wait()
        return True
    return False


class _Pipes:
    """The pipes of one run: what the VMM writes, we drain from the first byte to the last."""

    def __init__(
        self, sinks: Sinks, cid: int, inherited: dict[str, int] | None = None, *, keep: bool = False
    ) -> None:
        """Make them, or take over those of a VMM that another manager started.

        Args:
            sinks: Where their text goes.
            cid: Whose they are.
            inherited: Read ends by name; closed by ``close``, whatever happens.
            keep: Whether the VMM outlives its manager: then it has the read ends of all of them.
        """
        self.drains: list[Drain] = []
        self._inherited = inherited
        self._reads: dict[str, int] = {}
        self._writes: list[int] = []

        def lines(what: str, sink: int | None) -> Lines | None:
            """The reference's form: ``Console(<cid>): <line>``."""
            if sink is not None or not sinks.to_log:
                return None
            return Lines(lambda line: log.info(f"{what}({cid}): {escape_bytes(line)}"), CONSOLE_CAP)

        try:
            self.console, console = self._pipe(
                "console", sinks.console, CONSOLE_CAP, CONSOLE_TAIL, lines("Console", sinks.console)
            )
            self.failure, failure = self._pipe("failure", None, 0, FAILURE_TAIL)
            self.stderr, stderr = self._pipe("stderr", None, 0, STDERR_TAIL)
            guest_log = ramdump = None
            if sinks.log is not None or sinks.to_log or self._has("log"):
                guest_log = self._pipe("log", sinks.log, CONSOLE_CAP, 0, lines("Log", sinks.log))[1]
            if sinks.ramdump is not None or self._has("ramdump"):
                ramdump = self._pipe("ramdump", sinks.ramdump, RAMDUMP_CAP, 0)[1]
        except BaseException:
            self.close()
            raise
        names = self._reads if keep else ("console", "failure", "stderr")
        readers = {name: self._reads[name] for name in names}
        self.channels = Channels(console, failure, guest_log, ramdump, stderr, readers)

    def _has(self, name: str) -> bool:
        return self._inherited is not None and name in self._inherited

    def _pipe(
        self, name: str, sink: int | None, cap: int, tail: int, lines: Lines | None = None
    ) -> tuple[Drain, int]:
        write = -1
        if self._inherited is not None and name in self._inherited:
            read = self._inherited.pop(name)
        else:
            read, write = os.pipe2(os.O_CLOEXEC)
            self._writes.append(write)
        self._reads[name] = read
        if self._inherited is not None:
            self.close_write_ends()  # of one that could not be had: it is at its end
        drain = Drain(read, sink=sink, sink_cap=cap, tail=tail, lines=lines)
        self.drains.append(drain)
        return drain, write

    def close_write_ends(self) -> None:
        while self._writes:
            os.close(self._writes.pop())

    def close(self) -> None:
        for drain in self.drains:
            drain.end_following()
        self.close_write_ends()
        for found in (self._reads, self._inherited or {}):
            while found:
                os.close(found.popitem()[1])
