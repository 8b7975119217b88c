"""The handle on a VM of a daemon: the interface of ``actors.handle.VirtualMachine``, over a socket.

What it promises is the same. A handle that ``create_vm`` gave keeps its VM alive: when the last reference
goes, or its ``async with`` block is left, or the connection ends, the VM is killed, unless it was created
with ``keep``.
"""

import socket
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self

import anyio

from vmactor.actors.stop_ladder import StopLadder
from vmactor.bus import PATIENCE_SECONDS, Overflow, Subscription
from vmactor.client.present import Known
from vmactor.client.session import Session
from vmactor.errors import IllegalArgumentError, IllegalStateError, NotConnectedError
from vmactor.follower import ConsoleStream
from vmactor.messages import Died, Event, Gap, MemoryTrimLevel, StopRung, VirtualMachineState, VmInfo
from vmactor.protocol import values
from vmactor.subscription import Choice
from vmactor.usage import Usage
from vmactor.vsock import VsockStream
from vmactor.waiting import soon

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0
CONTROL_SECONDS: Final = 15.0
CONNECT_SECONDS: Final = 10.0
USAGE_SECONDS: Final = 10.0
MAX_SECONDS: Final = 3600.0
"""The longest that the daemon waits for anything; it says so in its answer then."""
_LADDER: Final = StopLadder()


class VirtualMachine:
    """A VM of a daemon; made by ``create_vm`` or ``open_vm`` of a service that ``connect`` gave.

    Use it as an async context manager, or keep a reference for as long as the VM should live.
    """

    def __init__(self, session: Session, handle: str, known: Known) -> None:
        self._session = session
        self._handle = handle
        self._known = known
        self._drop = weakref.finalize(self, _dropped, session, handle, soon(any_thread=True))
        self._drop.atexit = False

    def __repr__(self) -> str:
        info = self.info
        return f'<VirtualMachine {info.cid} "{info.name}" {info.state.name} of {self._session.path}>'

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def cid(self) -> int:
        """Context identifier."""
        return self._known.info.cid

    @property
    def name(self) -> str:
        """The VM's name."""
        return self._known.info.name

    @property
    def info(self) -> VmInfo:
        """What the daemon last told of the VM; costs nothing and never waits."""
        return self._known.info

    @property
    def state(self) -> VirtualMachineState:
        """The public state, as the daemon last told it."""
        return self._known.info.state

    async def start(self, *, timeout: float = START_SECONDS) -> None:
        """Boot the VM; see ``actors.handle.VirtualMachine.start``, also for what is raised."""
        await self._within("start", timeout)

    async def stop(self, *, timeout: float = STOP_SECONDS) -> None:
        """Kill the VM and wait until nothing of it is left; legal in every state, any number of times."""
        if not self._gone:
            await self._within("stop", timeout)

    async def shutdown(self, ladder: StopLadder = _LADDER) -> StopRung | None:
        """End the VM gently; see ``actors.handle.VirtualMachine.shutdown``, also for what is raised."""
        if self._gone:
            return None
        ended_by = await self._call("shutdown", ladder_to_wire(ladder), within=ladder.budget + STOP_SECONDS)
        return None if ended_by is None else StopRung[ended_by]

    async def suspend(self, *, timeout: float = CONTROL_SECONDS) -> None:
        """Pause the virtual CPUs; raises as embedded."""
        await self._within("suspend", timeout)

    async def resume(self, *, timeout: float = CONTROL_SECONDS) -> None:
        """Let the virtual CPUs run; raises as embedded."""
        await self._within("resume", timeout)

    async def on_trim_memory(self, level: MemoryTrimLevel, *, timeout: float = CONTROL_SECONDS) -> None:
        """Make the balloon take a part of the guest's memory; raises as embedded."""
        try:
            name = MemoryTrimLevel(level).name
        except ValueError:
            raise IllegalArgumentError(f"Invalid memory trim level MemoryTrimLevel({level})") from None
        await self._within("onTrimMemory", timeout, name)

    async def usage(self) -> Usage:
        """What the VM uses of its host now; raises as embedded."""
        told = await self._call("usage", within=USAGE_SECONDS)
        return values.from_wire(Usage, told, "usage", strict=False)

    async def guest_calls(self) -> dict[str, Any]:
        """What came in at this VM's RPC server, counted; embedded, an attribute says that."""
        return dict(await self._call("guestCalls", within=USAGE_SECONDS))

    async def connect_vsock(self, port: int, *, timeout: float = CONNECT_SECONDS) -> VsockStream:
        """Connect to a port on which the guest listens. The stream is the guest's: the daemon is not in it.

        Raises as embedded.
        """
        file = await self._within("connectVsock", timeout, port)
        sock = socket.socket(fileno=file.detach())
        sock.setblocking(False)
        return VsockStream(sock, cid=self.cid, port=port, half_close=sock.family == socket.AF_VSOCK)

    async def console(self) -> ConsoleStream:
        """Follow the guest's console; raises as embedded."""
        file = await self._call("console", within=CONTROL_SECONDS)
        return ConsoleStream(file.detach())

    def events(self, *, capacity: int = 256) -> Subscription[Event]:
        """What happens to this VM from now on; ends after ``died`` or ``removed``."""
        known = self._known
        choice: Choice[Event] = Choice(
            lambda event: event.seq >= known.since or isinstance(event, Gap),  # not what was of another VM
            frozenset({self.cid}),
            None,
            capacity,
            Overflow.DROP_OLDEST,
            PATIENCE_SECONDS,
            until_end=True,
        )
        if known.end is not None:
            return self._session.ended(known.end, choice)
        return self._session.subscribe({"cids": [self.cid], "capacity": capacity, "late": True}, choice)

    async def publish_message(
        self, direction: Literal["guest_to_host", "host_to_guest"], port: int, text: str
    ) -> None:
        """Let subscribers know of a line that this program and the guest exchanged over vsock.

        Raises as embedded.
        """
        await self._call("publishMessage", direction, port, text, within=MAX_SECONDS)

    async def wait(self) -> Died | None:
        """Wait until the VM is dead and nothing of it is left; None if it was never started.

        Raises:
            NotConnectedError: The connection ended before.
        """
        await self._known.over.wait()
        if self._known.end is not None:
            return self._known.info.died
        # It was among events that were missed, or the connection is gone.
        told = await self._call("wait", within=MAX_SECONDS)
        died = None if told is None else values.event_from_wire(told)
        return died if isinstance(died, Died) else None

    async def aclose(self) -> None:
        """Give the VM up: kill it if it runs, and wait until nothing of it is left, even when cancelled.

        A VM that is kept, or another's, is only let go of. If the connection has ended, so has the VM.

        Raises:
            DeadlineExceededError: It is still there after ``STOP_SECONDS``, or has survived its kill.
        """
        if self._drop.detach() is None:
            return
        self._session.own.discard(self._handle)
        with anyio.CancelScope(shield=True), suppress(NotConnectedError):
            await self._session.call("closeVm", self._handle, within=STOP_SECONDS)

    @property
    def _gone(self) -> bool:
        """Whether the VM has ended and the handle was given up: then there is nothing left to end."""
        return not self._drop.alive and self._known.end is not None

    async def _within(self, method: str, timeout: float, *params: Any) -> Any:
        seconds = min(timeout, MAX_SECONDS)
        return await self._call(method, *params, {"timeout": seconds}, within=seconds)

    async def _call(self, method: str, *params: Any, within: float) -> Any:
        if not self._drop.alive:
            raise IllegalStateError("this handle was closed; open the VM again, by its CID")
        return await self._session.call(method, self._handle, *params, within=within)


def ladder_to_wire(ladder: StopLadder) -> dict[str, float]:
    """A ladder as the daemon takes it."""
    rungs = {"powerButton": ladder.power_button, "exitRequest": ladder.exit_request, "kill": ladder.kill}
    return {name: seconds for name, seconds in rungs.items() if seconds is not None}


def _dropped(session: Session, handle: str, soon: Callable[[Callable[[], object]], object]) -> None:
    """The last reference to a handle went; as embedded, this runs anywhere and leaves word with the loop."""
    with suppress(RuntimeError):  # the loop has ended, and the connection with it
        soon(partial(session.let_go, handle))
