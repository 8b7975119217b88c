"""A VMM driver without a VMM: the test decides when it runs, answers and ends. For virtual time only.

It is not the simulated VMM (a real process); it stands in where a test must own every moment.
"""

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

import anyio

from vmactor.actors.event_bus import new_bus
from vmactor.actors.monitor import RunSpec, Sinks
from vmactor.actors.vm import VmActor, VmContext
from vmactor.config import RawConfig
from vmactor.errors import VmmError
from vmactor.ledger import Spawner
from vmactor.messages import (
    BalloonStats,
    DeathReason,
    Event,
    PayloadState,
    VirtualMachineState,
    VmInfo,
)
from vmactor.process import ExitStatus
from vmactor.vmm.driver import Footprint, Launch, LeftVmm, VmmExit
from vmactor.vsock import HybridVsockTransport


class ScriptedVmm:
    """Runs, answers and ends when the test says so; a kill ends it with signal 9 unless it is stuck."""

    pid = 4242

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.channels: dict[str, int] = {}
        try:
            for name, fd in _open_channels(launch).items():
                self.channels[name] = os.dup(fd)
        except OSError:
            self._close_channels()
            raise
        self.running = anyio.Event()
        self.ended = anyio.Event()
        self.exit = VmmExit(ExitStatus(0, None), DeathReason.SHUTDOWN)
        self.run_error: VmmError | None = None
        self.refusal: VmmError | None = None
        self.answers = anyio.Event()
        self.answers.set()
        self.calls: list[str] = []
        self.stats: BalloonStats | None = None
        self.stuck = False
        self.close_seconds = 0.0
        self.close_error: OSError | None = None
        self.closed = False

    def write(self, channel: str, data: bytes) -> None:
        """What the guest writes to one of its channels."""
        os.write(self.channels[channel], data)

    def end(self, exit_: VmmExit) -> None:
        """The process is gone."""
        if not self.ended.is_set():
            self.exit = exit_
            self._close_channels()
            self.ended.set()

    def _close_channels(self) -> None:
        while self.channels:
            os.close(self.channels.popitem()[1])

    async def wait_running(self) -> None:
        if self.run_error is not None:
            raise self.run_error
        async with anyio.create_task_group() as tg:

            async def until(event: anyio.Event) -> None:
                await event.wait()
                tg.cancel_scope.cancel()

            tg.start_soon(until, self.running)
            tg.start_soon(until, self.ended)
        if not self.running.is_set():
            raise VmmError("the VMM ended")

    async def take_over(self, *, suspended: bool) -> None:
        await self._request(f"take_over {suspended}")

    async def let_go(self) -> None:
        self.calls.append("let_go")
        self._close_channels()
        self.closed = True

    async def wait(self) -> VmmExit:
        await self.ended.wait()
        return self.exit

    def kill(self) -> None:
        self.calls.append("kill")
        if not self.stuck:
            self.end(VmmExit(ExitStatus(None, 9), DeathReason.KILLED))

    async def _request(self, name: str) -> None:
        self.calls.append(name)
        await self.answers.wait()
        if self.refusal is not None:
            raise self.refusal

    async def suspend(self) -> None:
        await self._request("suspend")

    async def resume(self) -> None:
        await self._request("resume")

    async def request_shutdown(self) -> None:
        await self._request("request_shutdown")

    async def request_exit(self) -> None:
        await self._request("request_exit")

    async def balloon_stats(self) -> BalloonStats | None:
        await self._request("balloon_stats")
        return self.stats

    async def set_balloon(self, size: int) -> None:
        await self._request(f"set_balloon {size}")

    async def aclose(self) -> None:
        self.kill()
        await anyio.sleep(self.close_seconds)
        self._close_channels()
        self.closed = True
        if self.close_error is not None:
            raise self.close_error


def _open_channels(launch: Launch) -> dict[str, int]:
    channels = launch.channels
    named = {
        "console": channels.console,
        "failure": channels.failure,
        "log": channels.log,
        "ramdump": channels.ramdump,
        "stderr": channels.stderr,
    }
    return {name: fd for name, fd in named.items() if fd is not None}


class ScriptedDriver:
    """Makes ``ScriptedVmm``s and keeps them for the test."""

    name: ClassVar[str] = "scripted"
    platform_version = "1.0.0"
    emulated = False

    boot_seconds = 0.0

    def __init__(self) -> None:
        self.vmms: list[ScriptedVmm] = []
        self.spawned = anyio.Event()
        self.may_spawn = anyio.Event()
        self.may_spawn.set()
        self.spawn_error: Exception | None = None
        self.run_error: VmmError | None = None

    @property
    def vmm(self) -> ScriptedVmm:
        """The last one spawned."""
        return self.vmms[-1]

    def footprint(self, config: RawConfig) -> Footprint:
        return Footprint(1, 1, 1 << 20, 0, self.boot_seconds)

    def validate(self, config: RawConfig) -> None:
        """Accept everything."""

    def command_line(self, launch: Launch) -> list[str]:
        return ["scripted", launch.name]

    async def spawn(self, launch: Launch) -> ScriptedVmm:
        await self.may_spawn.wait()
        if self.spawn_error is not None:
            raise self.spawn_error
        self.vmms.append(ScriptedVmm(launch))
        self.vmm.run_error = self.run_error
        self.spawned.set()
        return self.vmm

    async def adopt(self, left: LeftVmm) -> ScriptedVmm:
        raise AssertionError("there is no process to adopt")


@dataclass
class Bench:
    """A VM actor with a scripted VMM on a bus, and what it told the world."""

    directory: Path
    hangup_timeout: float | None = None
    sinks: Sinks = field(default_factory=Sinks)
    helper: Path | None = None
    driver: ScriptedDriver = field(default_factory=ScriptedDriver)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus = new_bus()
        self.events = self.bus.subscribe(capacity=1000)
        self._resources = ExitStack()
        vhost = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._resources.callback(os.close, vhost)
        config = RawConfig(name="test", kernel=vhost, platform_version="~1.0")
        spec = RunSpec("test", 2048, config, self.driver, self.directory, self.sinks, vhost, self.helper)
        info = VmInfo(
            cid=2048, name="test", generation=0, state=VirtualMachineState.NOT_STARTED,
            payload=PayloadState.STARTING, driver="scripted", suspended=False, pid=None, protected=False,
            directory=str(self.directory), requester_uid=0, requester_pid=1, created=datetime.now(UTC),
        )  # fmt: skip
        transport = HybridVsockTransport(2048, self.directory / "vsock", lambda: None)
        context = VmContext(
            bus=self.bus,
            transport=transport,
            listener=transport.listen(2048),
            record=lambda info, _kept: self.log.append(f"record {info.state.name}"),
            clear=lambda: self.log.append("clear"),
            give_back=self._give_back,
            abandon=self._abandon,
        )
        self.actor = VmActor(spec, info, context, self.hangup_timeout)

    def _give_back(self) -> None:
        self.log.append("give back")
        self._resources.close()

    def _abandon(self) -> None:
        self.log.append("abandon")
        self._resources.close()

    def seen(self) -> list[Event]:
        """Every event since the last call."""
        found = []
        while (event := self.events.next_nowait()) is not None:
            found.append(event)
        return found

    def kinds(self) -> list[str]:
        """The same by kind."""
        return [event.kind for event in self.seen()]


class ScriptedHelper:
    """A vsock helper that is no process, and its own ``process``; put it in ``VhostDeviceVsock``'s place."""

    pid = os.getpid()  # what connects from this test is the guest
    complaints = "out of luck"
    stuck: ClassVar[bool] = False

    def __init__(self) -> None:
        self.status: ExitStatus | None = None
        self.ended = anyio.Event()
        self._sockets = socket.socketpair()

    @classmethod
    def spawn(
        cls, _executable: Path, _cid: int, _directory: Path, _spawner: Spawner, *, holds: object = None
    ) -> Self:
        return cls()

    @property
    def process(self) -> Self:
        return self

    async def connect(self) -> int:
        return self._sockets[0].detach()

    async def wait(self) -> ExitStatus:
        await self.ended.wait()
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        if not self.stuck:
            self.status = ExitStatus(None, 9)
            self.ended.set()

    async def aclose(self) -> None:
        self.kill()
        for sock in self._sockets:
            sock.close()
