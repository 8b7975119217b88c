"""The handle on a VM: what a client holds, and what keeps the VM alive.

A handle only sends messages to the VM's actor and reads what the actor published. Whoever holds it may use
it. When the last reference goes, or its ``async with`` block is left, the VM is killed (as in the reference).
"""

import weakref
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Literal, Self

import anyio
import anyio.lowlevel
from anyio.lowlevel import EventLoopToken, current_token

from vmactor.actors.guest_connection import GuestRpcStatistics
from vmactor.actors.stop_ladder import StopLadder
from vmactor.actors.vm import VmActor
from vmactor.actors.vocabulary import NOT_RUNNING
from vmactor.bus import Bus, Subscription
from vmactor.errors import ActorDiedError, DeadlineExceededError, IllegalArgumentError, IllegalStateError
from vmactor.follower import ConsoleStream
from vmactor.messages import (
    Died,
    Event,
    MemoryTrimLevel,
    Resume,
    Start,
    Stop,
    StopRung,
    Suspend,
    TrimMemory,
    VirtualMachineState,
    VmInfo,
    VsockMessage,
)
from vmactor.usage import Usage
from vmactor.vsock import VsockListener, VsockStream

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0
CONTROL_SECONDS: Final = 15.0
CONNECT_SECONDS: Final = 10.0
_LADDER: Final = StopLadder()

_UP: Final = frozenset(
    {
        VirtualMachineState.STARTING,
        VirtualMachineState.STARTED,
        VirtualMachineState.READY,
        VirtualMachineState.FINISHED,
    }
)


class VirtualMachine:
    """A VM, as its creator holds it; made by ``VirtualizationService.create_vm``.

    Use it as an async context manager, or keep a reference for as long as the VM should live. A VM that is
    kept needs no handle to live: it ends by itself or by ``stop`` and ``shutdown``.
    """

    def __init__(self, actor: VmActor, bus: Bus[Event], *, holds: bool = True) -> None:
        """Make a handle.

        Args:
            actor: The VM's.
            bus: Its service's.
            holds: Whether the VM goes with the handle, unless it is kept.
        """
        self._actor = actor
        self._bus = bus
        self._holds = holds
        self._drop = weakref.finalize(self, _dropped, actor, current_token())
        self._drop.atexit = False
        if actor.keeps or not holds:
            self._drop.detach()

    def __repr__(self) -> str:
        return repr(self._actor)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def cid(self) -> int:
        """Context identifier."""
        return self._actor.info.cid

    @property
    def name(self) -> str:
        """The VM's name."""
        return self._actor.info.name

    @property
    def info(self) -> VmInfo:
        """Everything the actor last published; costs nothing and never waits."""
        return self._actor.info

    @property
    def guest_calls(self) -> GuestRpcStatistics:
        """What came in at this VM's RPC server: connections, calls, and what was refused, and why."""
        return self._actor.guest_calls

    @property
    def memory_mib(self) -> int | None:
        """The guest's memory as configured; None where that was left to others."""
        return self._actor.memory_mib

    @property
    def state(self) -> VirtualMachineState:
        """The public state; never touches the VMM."""
        return self._actor.info.state

    @property
    def gone(self) -> bool:
        """Whether the VM will never change again and nothing of it is left."""
        return self._actor.ended.is_set()

    async def start(self, *, timeout: float = START_SECONDS) -> None:
        """Boot the VM; allowed once. Returns when the VMM runs.

        Where too many VMs are booting it waits for its turn (``info.queued``), first come, first served.

        Args:
            timeout: Seconds, the wait included; the VM goes on starting if they run out.

        Raises:
            CapacityExceededError: The host has no room for it any more; the VM is as it was.
            IllegalStateError: It was started before, or stopped while starting.
            StartFailedError: The VMM did not come up; the message holds the cause, the VM is dead.
            DeadlineExceededError: Neither yet.
        """
        self._actor.check_room()
        try:
            # In the lane of stop, so that no stop that is sent later overtakes it.
            await self._actor.mailbox.ask(Start(), timeout=timeout, control=True)
        except ActorDiedError:
            raise IllegalStateError("VM already started or failed") from None

    async def stop(self, *, timeout: float = STOP_SECONDS) -> None:
        """Kill the VM and wait until nothing of it is left; legal in every state, any number of times.

        A VM that was never started stays as it is and can still be started.

        Args:
            timeout: Seconds; the kill goes on if they run out.

        Raises:
            DeadlineExceededError: The VMM is still there (stuck inside the kernel, most likely).
        """
        try:
            await self._actor.mailbox.ask(Stop(), timeout=timeout, control=True)
        except ActorDiedError:
            with anyio.move_on_after(timeout):
                await self._actor.ended.wait()

    async def shutdown(self, ladder: StopLadder = _LADDER) -> StopRung | None:
        """End the VM gently: power button, then exit request, then kill, each with its time.

        Returns when nothing of the VM is left. Legal in every state, any number of times, also beside a
        ``stop`` or another ``shutdown``: each goes its own way, and what ends the VM first ends it for all.
        A VM that was never started stays as it is; one whose VMM is not up yet, so that there is no guest to
        ask, is killed at once. A suspended VM is resumed first. Whatever happens, the VM is not started again
        by itself from now on, and cannot be suspended any more.

        Args:
            ladder: What to try, and for how long. A rung's clock starts when it is asked for; one that the
                VMM refuses gives way to the next at once. If the call is cancelled, it goes no further.

        Returns:
            The way that ended it; None if it ended by itself or there was nothing to end.

        Raises:
            NotStoppedError: The VM is still there after all of the ladder.
        """
        return await self._actor.shut_down(ladder)

    async def suspend(self, *, timeout: float = CONTROL_SECONDS) -> None:
        """Pause the virtual CPUs; nothing happens if they are paused.

        Raises:
            IllegalStateError: The VM is not running.
            VmmError: The VMM refused.
            DeadlineExceededError: The VMM did not answer; whether the VM is paused is unknown.
        """
        await self._control(Suspend(), timeout)

    async def resume(self, *, timeout: float = CONTROL_SECONDS) -> None:
        """Let the virtual CPUs run; nothing happens if they do. Raises like ``suspend``."""
        await self._control(Resume(), timeout)

    async def on_trim_memory(self, level: MemoryTrimLevel, *, timeout: float = CONTROL_SECONDS) -> None:
        """Make the balloon take 50, 30 or 10 % of the guest's memory (critical, low, moderate).

        Nothing happens, and that is a success, where there is no balloon, the guest has no driver for it or
        does not say how much memory it has (reference: memory trimming). Raises like ``suspend``.
        """
        try:
            level = MemoryTrimLevel(level)
        except ValueError:
            raise IllegalArgumentError(f"Invalid memory trim level MemoryTrimLevel({level})") from None
        await self._control(TrimMemory(level), timeout)

    async def _control(self, control: Suspend | Resume | TrimMemory, timeout: float) -> None:
        try:
            await self._actor.mailbox.ask(control, timeout=timeout)
        except ActorDiedError:
            raise IllegalStateError(NOT_RUNNING) from None

    async def usage(self) -> Usage:
        """What the VM uses of its host now: processor time and memory, as the kernel counts them for its VMM.

        Takes from tenths of a millisecond to some milliseconds, by the VMM's memory; all of it in a thread.

        Raises:
            IllegalStateError: The VM is not running.
            DeadlineExceededError: The kernel does not tell within 5 s.
        """
        return await self._actor.measure()

    async def console(self) -> ConsoleStream:
        """Follow what the guest writes to its console: the last 16 KiB of it, then all that comes.

        Returns:
            A byte stream, to be closed by the caller; it ends with this run of the VM, and holds up nobody.

        Raises:
            IllegalStateError: The VM is not running.
            ResourceExhaustedError: Sixteen follow it already, or there is no descriptor.
        """
        return ConsoleStream(self._actor.follow_console())

    async def connect_vsock(self, port: int, *, timeout: float = CONNECT_SECONDS) -> VsockStream:
        """Connect to a port on which the guest listens.

        Args:
            port: 1024 or above.
            timeout: Seconds for the whole attempt.

        Returns:
            A byte stream, to be closed by the caller; it ends with the VM.

        Raises:
            IllegalStateError: The VM is not running.
            VsockError: Privileged port, no listener, or the guest is not up yet.
            DeadlineExceededError: No answer in time.
        """
        if self.state not in _UP:
            raise IllegalStateError(NOT_RUNNING)
        return await self._actor.transport.connect(port, timeout=timeout)

    def listen_vsock(self, port: int) -> VsockListener:
        """Listen on a host port for connections of this VM only; to be closed by the caller.

        Raises:
            IllegalStateError: The VM is dead.
            IllegalArgumentError: The port is the VM's own RPC port, or no port at all.
            VsockError: The port is taken.
        """
        if self.state is VirtualMachineState.DEAD:
            raise IllegalStateError(NOT_RUNNING)
        if port == self.cid:
            raise IllegalArgumentError(f"port {port} is where this VM reports its payload's state")
        return self._actor.transport.listen(port)

    def events(self, *, capacity: int = 256) -> Subscription[Event]:
        """What happens to this VM from now on; ends after ``died`` or ``removed``.

        Subscribing to a dead VM still gives its last event, unless more than a thousand VMs ended after it.
        """
        cid, born = self.cid, self._actor.created_seq
        subscription = self._bus.subscribe(
            lambda event: event.seq >= born,  # the bus remembers earlier VMs of this CID
            topics=[cid],
            capacity=capacity,
            late=True,
            until_end=True,
        )
        if self._actor.ended.is_set():
            subscription.close()  # nothing will come; what the bus remembered can still be read
        return subscription

    async def publish_message(
        self, direction: Literal["guest_to_host", "host_to_guest"], port: int, text: str
    ) -> None:
        """Let subscribers know of a line that this program and the guest exchanged over vsock.

        The message is published; then this waits for subscribers that asked for it (``Overflow.WAIT``) and
        have no room, each within its patience.

        Raises:
            IllegalStateError: The VM is dead; nothing comes after ``died``.
        """
        if self.state is VirtualMachineState.DEAD:
            raise IllegalStateError(NOT_RUNNING)
        message = VsockMessage(direction=direction, port=port, text=text)
        await self._actor.publish_and_wait(message)

    async def wait(self) -> Died | None:
        """Wait until the VM is dead and nothing of it is left.

        Returns:
            How its last run ended; None if it was never started, or lives on because it is kept and the
            service ended.
        """
        await self._actor.ended.wait()
        return self._actor.info.died

    async def aclose(self) -> None:
        """Give the VM up: kill it if it runs, and wait until nothing of it is left, even when cancelled.

        A VM that is kept, and was started, goes on; so does one that this handle does not hold.

        Raises:
            DeadlineExceededError: It is still there after ``STOP_SECONDS``, or has survived its kill.
        """
        self._drop.detach()
        started = self._actor.info.state is not VirtualMachineState.NOT_STARTED
        if not self._holds or (self._actor.keeps and started):
            await anyio.lowlevel.checkpoint()
            return
        self._actor.release()
        with anyio.move_on_after(STOP_SECONDS, shield=True):
            await self._actor.ended.wait()
            if self._actor.survivors:
                raise DeadlineExceededError(f"{self._actor.survivors} survived SIGKILL: {self!r}")
            return
        raise DeadlineExceededError(f"{self!r} is still there {STOP_SECONDS:g} s after it was killed")


def _dropped(actor: VmActor, loop: EventLoopToken) -> None:
    """The last reference to a handle went.

    The garbage collector runs this in whatever thread it likes, in the middle of anything. So it touches no
    mailbox and waits for nothing: it leaves word with the loop, by what both kinds of loop have for that.
    """
    native: Any = loop.native_token
    schedule = getattr(native, "call_soon_threadsafe", None) or native.run_sync_soon
    with suppress(RuntimeError):  # the loop has ended, and every VM with it
        schedule(actor.release)
