"""A daemon's life: configuration, sockets, service, server, metrics, signals, and an end in order.

The first SIGTERM or SIGINT has it drain: no more VMs, those that are not kept are shut down, each gently,
within ``drain_seconds``. The second ends it at once: they are killed. VMs that are kept live on either way.
SIGHUP has it read its configuration again.
"""

import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

import anyio
from anyio.abc import TaskGroup, TaskStatus

from vmactor.actors.service import VirtualizationService
from vmactor.actors.stop_ladder import StopLadder
from vmactor.daemon import logs
from vmactor.daemon.config import Config
from vmactor.daemon.listening import listening
from vmactor.daemon.server import Server
from vmactor.daemon.systemd import Notifier, inherited_sockets
from vmactor.errors import UnsupportedOperationError, VmactorError
from vmactor.log import get_logger
from vmactor.microdroid.platform import Platform
from vmactor.protocol.address import socket_to_serve
from vmactor.security.policy import Policy, load_policy

LAST_RUNGS: Final = 5.0
"""Seconds of the drain's time that are left for the VMs that do not heed their power button."""

log = get_logger()


class Daemon:
    """One daemon.

    Args:
        load: Reads the configuration; called at the beginning and at each SIGHUP, in a thread.
        ready: Told where it serves, when it does.
    """

    def __init__(
        self, load: Callable[[], Config], ready: Callable[[str], None] = lambda _where: None
    ) -> None:
        self._load = load
        self._ready = ready
        self._config = Config()
        self._notifier = Notifier()
        self._told_to_end: anyio.Event
        self._at_once: anyio.CancelScope
        self._service: VirtualizationService
        self._server: Server | None = None

    async def run(self) -> None:
        """Serve until told to end.

        Raises:
            VmactorError: The configuration is wrong, or what it asks for is not to be had here.
        """
        config, policy = await anyio.to_thread.run_sync(self._read)
        self._config = config
        self._told_to_end, self._at_once = anyio.Event(), anyio.CancelScope()
        logs.configure(config.log)
        with ExitStack() as opened, self._notifier:
            listeners, where = self._listen(opened)
            async with anyio.create_task_group() as watching:
                await watching.start(self._watch_signals)
                with self._at_once:
                    async with self._open(config, policy) as self._service:
                        await self._serve(listeners, where)
                watching.cancel_scope.cancel()

    def _read(self) -> tuple[Config, Policy]:
        config = self._load()
        return config, load_policy(config.service.policy) if config.service.policy else Policy()

    def _listen(self, opened: ExitStack) -> tuple[Sequence[socket.socket], str]:
        """The sockets that systemd opened, or one of our own; and where that is, for people."""
        if inherited := inherited_sockets():
            for one in inherited:
                opened.enter_context(one)
            return inherited, ", ".join(str(one.getsockname()) for one in inherited)
        path = self._config.service.socket or socket_to_serve()
        return [opened.enter_context(listening(path))], str(path)

    def _open(self, config: Config, policy: Policy) -> VirtualizationService:
        options = config.service
        return VirtualizationService(
            vmm=options.vmm,
            state_directory=options.state_directory,
            platform=Platform(options.platform) if options.platform else None,
            tombstones=options.tombstones,
            policy=policy,
            admission=config.admission,
            keeps=True,
        )

    async def _serve(self, listeners: Sequence[socket.socket], where: str) -> None:
        server = Server(self._service, self._config.users)
        for vm in self._service.list_vms():
            server.adopt(self._service.open_vm(vm.cid))
        with ExitStack() as opened:
            async with anyio.create_task_group() as serving:
                await serving.start(self._notifier.beat)
                await self._begin_metrics(serving, opened, server)
                await serving.start(server.serve, listeners)
                self._server = server
                self._tell_state(f"serving on {where}")
                self._ready(where)
                await self._told_to_end.wait()
                await self._drain()
                serving.cancel_scope.cancel()

    async def _begin_metrics(self, serving: TaskGroup, opened: ExitStack, server: Server) -> None:
        options = self._config.metrics
        if options.listen is None:
            return
        try:
            from vmactor.daemon import metrics  # noqa: PLC0415 - an extra
        except ImportError:
            raise UnsupportedOperationError(
                "metrics.listen: prometheus-client is not installed; pip install 'vmactor[metrics]'"
            ) from None
        listener = opened.enter_context(metrics.listener_for(options.listen))
        counters = metrics.Metrics(
            self._service, per_vm=options.per_vm, connections=lambda: server.users.connections
        )
        await serving.start(counters.run)
        serving.start_soon(metrics.serve, listener, counters.page)

    async def _drain(self) -> None:
        seconds = self._config.service.drain_seconds
        log.info("ending: VMs that are not kept are shut down", seconds=seconds)
        self._notifier.tell("STOPPING=1", "STATUS=shutting down VMs")
        last = min(LAST_RUNGS, seconds / 2)
        ladder = StopLadder(power_button=seconds - last, exit_request=last) if seconds else None
        with anyio.move_on_after(seconds):
            await self._service.drain(ladder)

    # -- Signals -----------------------------------------------------------------------------------

    async def _watch_signals(self, *, task_status: TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    await self._reload()
                elif self._told_to_end.is_set():
                    log.warning("ending at once: VMs that are not kept are killed", signal=number.name)
                    self._at_once.cancel()
                else:
                    self._told_to_end.set()

    async def _reload(self) -> None:
        if self._server is None:
            log.warning("the configuration is not read again while the daemon begins")
            return
        self._notifier.reloading()
        try:
            config, policy = await anyio.to_thread.run_sync(self._read)
        except VmactorError as error:
            log.error("the configuration cannot be used; all stays as it was", error=error.message)
            self._tell_state("serving; the configuration cannot be used")
            return
        before, after = self._config.fixed(), config.fixed()
        if left := [name for name, value in after.items() if value != before[name]]:
            log.warning("some options take effect when the daemon is started anew", options=", ".join(left))
        self._config = replace(
            config,
            service=replace(
                self._config.service,
                policy=config.service.policy,
                drain_seconds=config.service.drain_seconds,
            ),
            admission=self._config.admission,
            metrics=self._config.metrics,
        )
        logs.configure(config.log)
        self._service.change_policy(policy)
        self._server.users.change_quotas(config.users)
        log.info("the configuration was read again")
        self._tell_state("serving")

    def _tell_state(self, status: str) -> None:
        self._notifier.tell("READY=1", f"STATUS={status}")
