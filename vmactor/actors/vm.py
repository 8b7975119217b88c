"""The VM actor: owns one VM's state, feeds messages to ``lifecycle.transition`` and performs what it answers.

One task runs ``VmActor.run``. Under the VM's own supervisor live the guest's RPC server, the run (helper,
VMM, channels), the hang-up watch, the wait for a restart and the control request under way. All of them only
send messages here.
"""

from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import anyio
from anyio.abc import TaskStatus

from vmactor.actors.guest_binder import GuestBinder
from vmactor.actors.guest_connection import GuestRpcStatistics
from vmactor.actors.guest_rpc import serve_guest_rpc
from vmactor.actors.keeping import Inheritance, KeptVm
from vmactor.actors.lifecycle import Life, Phase, transition
from vmactor.actors.monitor import END_GRACE, Run, RunSpec
from vmactor.actors.restart_policy import RestartPolicy, Restarts
from vmactor.actors.stop_ladder import StopLadder, climb
from vmactor.actors.tombstone_receiver import TombstoneReceiver
from vmactor.actors.vocabulary import (
    NOT_RUNNING,
    Action,
    Answer,
    ArmHangup,
    ArmRestart,
    AskToStop,
    Clear,
    ControlDone,
    Detach,
    DisarmHangup,
    DropControl,
    EndRun,
    Finish,
    GuestReported,
    HangupExpired,
    KillRun,
    LetGo,
    Message,
    Publish,
    Refuse,
    RestartDue,
    RunControl,
    SpawnRun,
    StopRefused,
    Unpaused,
)
from vmactor.bus import Bus
from vmactor.errors import (
    ActorDiedError,
    DeadlineExceededError,
    IllegalStateError,
    MailboxFullError,
    NotStoppedError,
    VmactorError,
    VmmError,
)
from vmactor.log import get_logger
from vmactor.mailbox import Mailbox, Reply
from vmactor.messages import (
    Adopted,
    Control,
    Created,
    DeathReason,
    Died,
    Event,
    GuestReport,
    MemoryTrimLevel,
    PayloadReady,
    PayloadStarted,
    PayloadState,
    Release,
    Resume,
    Started,
    StopRung,
    Suspend,
    TrimMemory,
    UsageSampled,
    VirtualMachineState,
    VmInfo,
)
from vmactor.process import UNKNOWN
from vmactor.supervision_tree import Detail
from vmactor.supervisor import ChildExit, Decision, Supervisor
from vmactor.usage import Usage
from vmactor.vmm.driver import VmmExit
from vmactor.vsock import VsockListener, VsockTransport

TRIM_PERCENT: Final = {
    MemoryTrimLevel.TRIM_MEMORY_RUNNING_CRITICAL: 50,
    MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW: 30,
    MemoryTrimLevel.TRIM_MEMORY_RUNNING_MODERATE: 10,
}
"""Share of the guest's memory that the balloon takes, per level (reference: memory trimming)."""

MANY_STOPPERS: Final = 64
"""From so many on, those who no longer wait for the end of a VM that does not die are forgotten."""

REPORT_SECONDS: Final = 10.0
"""How long a guest's call may wait for its VM's actor."""


@dataclass(frozen=True, slots=True)
class VmContext:
    """What the service lends a VM for its lifetime.

    Attributes:
        bus: Where events go.
        transport: The VM's vsock.
        listener: Listens on port = CID, from before the VM exists.
        record: Makes the VM's state visible to other processes.
        clear: Removes the VM's files.
        give_back: Releases the CID and every descriptor that the VM owned.
        abandon: In its place where a process of the VM lives on: releases the descriptors only.
        let_go: In its place where all of the VM lives on, for the next manager.
        binder: What a guest that speaks RPC Binder is told; the defaults if None.
        tombstones: Takes in what the guest tells of crashes inside it; nothing does if None.
    """

    bus: Bus[Event]
    transport: VsockTransport
    listener: VsockListener
    record: Callable[[VmInfo, KeptVm | None], None]
    clear: Callable[[], None]
    give_back: Callable[[], None]
    abandon: Callable[[], None]
    let_go: Callable[[], None] = lambda: None
    binder: GuestBinder | None = None
    tombstones: TombstoneReceiver | None = None


class VmActor:
    """One VM.

    Attributes:
        info: The state as last published; read by anyone, without asking.
        mailbox: How to speak to it.
        run_under_way: The current run, while there is one.
        ended: Set when the VM will never change again and nothing of it is left.
        guest_calls: What came in at the guest's RPC server, refused connections and calls included.
        created_seq: The bus's number of this VM's ``created`` event.
        vmm_timeouts: How often its VMM did not answer in time.
    """

    def __init__(
        self,
        spec: RunSpec,
        info: VmInfo,
        context: VmContext,
        hangup_timeout: float | None,
        restart: RestartPolicy | None = None,
        *,
        created: Created = Created(),  # noqa: B008 - immutable
        kept: KeptVm | None = None,
        inheritance: Inheritance | None = None,
    ) -> None:
        self.info = info
        self.mailbox: Mailbox[Message] = Mailbox(f"VM {spec.name} (CID {spec.cid})")
        self.run_under_way: Run | None = None
        self.ended = anyio.Event()
        self.created_seq = 0
        self.vmm_timeouts = 0
        self._spec = spec
        self._context = context
        self._created = created
        self.guest_calls = GuestRpcStatistics()
        self._kept = kept
        self._inheritance = inheritance
        self._life = Life(hangup_timeout, restarts=Restarts(restart))
        if inheritance is not None:
            self._life = _life_of(inheritance)
            self.created_seq = inheritance.vm.created_seq
        self._due: deque[Action] = deque()
        self._stop_asked: float | None = None
        self._supervisor = Supervisor(f"vm-{spec.cid}", self._child_ended)
        self._started_at: dict[int, float] = {}  # of the run under way, by its generation
        self._log = get_logger(vm=spec.name, cid=spec.cid)

    def __repr__(self) -> str:
        life, pid = self._life, f" pid={self._life.pid}" if self._life.pid else ""
        return (
            f"<VM {self._spec.name} cid={self._spec.cid} gen={life.generation} "
            f"{life.public_state.name}{' suspended' if life.suspended else ''}{pid}>"
        )

    @property
    def transport(self) -> VsockTransport:
        """The VM's vsock."""
        return self._context.transport

    @property
    def memory_mib(self) -> int | None:
        """The guest's memory as configured."""
        return self._spec.config.memory_mib

    @property
    def survivors(self) -> str:
        """Processes of the dead VM that outlived SIGKILL, for people; empty if all is well."""
        return self._life.survivors

    @property
    def vsock_peer(self) -> int | None:
        """The process whose vsock connections are the guest's, while there is one."""
        return self.run_under_way.vsock_peer if self.run_under_way is not None else None

    def details(self) -> dict[str, Detail]:
        """What the VM tells of itself in its service's supervision tree."""
        info, died = self.info, self.info.died
        return {
            "vm": info.name,
            "state": info.state.name,
            "generation": info.generation,
            "vm_restarts": info.restarts,
            "restart_due": info.restart_due.isoformat() if info.restart_due else None,
            "queued": info.queued,
            "pid": info.pid,
            "last_death": None if died is None else f"{died.reason.name}: {died.detail}"[:500].rstrip(": "),
            **self.mailbox.details(),
        }

    async def measure(self) -> Usage:
        """What the VM uses; see ``VirtualMachine.usage``."""
        if self.run_under_way is None:
            raise IllegalStateError(NOT_RUNNING)
        return await self.run_under_way.measure()

    def follow_console(self) -> int:
        """A descriptor that gets the guest's console; see ``VirtualMachine.console``."""
        if self.run_under_way is None:
            raise IllegalStateError(NOT_RUNNING)
        return self.run_under_way.follow_console()

    async def sample(self) -> float | None:
        """Measure what the VM uses and tell those who asked for it; see ``UsageSampler``."""
        try:
            used = await self.measure()
        except VmactorError:  # it does not run, or the kernel does not say
            return None
        sampled = UsageSampled(
            guest_time_ms=used.cpu.guest_ms,
            cpu_time_ms=used.cpu.total_ms,
            rss_vm_kib=used.memory.guest_kib,
            rss_vmm_kib=used.memory.total_kib,
            balloon_kib=self.run_under_way.balloon // 1024 if self.run_under_way is not None else 0,
        )
        if self._life.alive:  # nothing comes after died
            self._context.bus.publish_aside(self._headed(sampled))
        return used.seconds

    def check_room(self) -> None:
        """Before a start. Raises CapacityExceededError if there is not what was promised any more."""
        if self.info.state is VirtualMachineState.NOT_STARTED:
            self._spec.reservation.check()

    @property
    def keeps(self) -> bool:
        """Whether the VM outlives its handles and its manager."""
        return self._kept is not None

    def detach(self) -> None:
        """The manager ends: leave a kept VM alive, release any other; never waits, any number of times."""
        with suppress(ActorDiedError, MailboxFullError):
            self.mailbox.control(Detach() if self.keeps else Release())

    def release(self) -> None:
        """Nobody needs the VM any more; never waits, any number of times."""
        with suppress(ActorDiedError, MailboxFullError):  # full only while it clears away: it is about to end
            self.mailbox.control(Release())

    async def shut_down(self, ladder: StopLadder) -> StopRung | None:
        """Stop the VM by a ladder; see ``VirtualMachine.shutdown``."""
        try:
            await climb(ladder, self.mailbox)
        except ActorDiedError:
            with anyio.move_on_after(ladder.budget) as patience:
                await self.ended.wait()
            if patience.cancelled_caught:
                raise NotStoppedError(f"{self!r} is still being cleared away; wait longer") from None
        return self.info.died.stopped_by if self.info.died is not None else None

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """The actor's task: from ``created`` to the last trace of the VM."""
        try:
            async with self._supervisor:
                if self._inheritance is None:
                    self.created_seq = self.publish(self._created).seq
                    self._record()
                else:
                    await self._take_over(self._inheritance)
                task_status.started()
                while not self.ended.is_set():
                    envelope = await self.mailbox.receive()
                    self._take(envelope.message, envelope.reply)
                    while self._due:
                        await self._perform(self._due.popleft())
        finally:
            # Reached early only if the actor was cancelled or is itself at fault: the VM dies all the same.
            try:
                if not self.ended.is_set():
                    await self._end_at_once()
            finally:
                self.mailbox.close()

    def _take(self, message: Message, reply: Hashable = None) -> None:
        before = self._life.phase
        self._life, actions = transition(self._life, message, reply)
        self._due.extend(actions)
        if self._life.stopping and self._stop_asked is None:
            self._stop_asked = anyio.current_time()
        if len(self._life.stoppers) > MANY_STOPPERS:
            waiting = [
                (rung, who)
                for rung, who in self._life.stoppers
                if isinstance(who, Reply) and not who.abandoned
            ]
            self._life = replace(self._life, stoppers=tuple(waiting))
        self._refresh(before)

    async def _end_at_once(self) -> None:
        """Go on where the actor was interrupted, maybe in the middle of the exit, and end in order."""
        self._take(Release())
        if self.run_under_way is not None:
            given_up = VmmExit(UNKNOWN, DeathReason.KILLED, "the manager gave the VM up")
            self._take(self.run_under_way.account(given_up))
        self._due.appendleft(Clear())  # it may be the one that was interrupted
        with anyio.CancelScope(shield=True):
            while self._due:
                action = self._due.popleft()
                try:
                    if not isinstance(action, SpawnRun | ArmHangup | ArmRestart | RunControl | AskToStop):
                        await self._perform(action)
                except Exception as fault:
                    self._log.error("a fault at a VM's end", action=type(action).__name__, exc_info=fault)

    # -- Performing actions -----------------------------------------------------------------------

    async def _perform(self, action: Action) -> None:  # noqa: PLR0912 - a table
        match action:
            case SpawnRun(generation):
                await self._spawn(generation)
            case KillRun():
                if self.run_under_way is not None:
                    self.run_under_way.kill()
            case AskToStop(generation, rung, unpause):
                await self._supervisor.stop(rung.name)  # one request at a time; this one counts for both
                await self._supervisor.start(rung.name, _StopRequest(self, generation, rung, unpause))
            case DropControl():
                await self._supervisor.stop("control")
            case ArmHangup(generation):
                await self._supervisor.stop("hangup")
                await self._supervisor.start(
                    "hangup", _Timer(self._life.hangup_timeout, self._post, HangupExpired(generation))
                )
            case DisarmHangup():
                await self._supervisor.stop("hangup")
            case ArmRestart(generation, seconds):
                await self._supervisor.stop("restart")  # it has just sent its RestartDue, if any
                await self._supervisor.start("restart", _Timer(seconds, self._post, RestartDue(generation)))
            case RunControl(generation, control):
                await self._supervisor.stop("control")  # it has just sent its ControlDone
                await self._supervisor.start("control", _ControlRequest(self, generation, control))
            case EndRun():
                await self._end_run()
            case Clear():
                await self._clear()
            case LetGo():
                await self._let_go()
            case Publish(event):
                self.publish(event)
                if isinstance(event, PayloadStarted | PayloadReady) and self.run_under_way is not None:
                    self.run_under_way.guest_reported()
            case Answer(reply):
                self.mailbox.answer(reply)  # type: ignore[arg-type]
            case Refuse(reply, error):
                self.mailbox.refuse(reply, error)  # type: ignore[arg-type]
            case Finish():
                try:
                    (self._context.abandon if self._life.survivors else self._context.give_back)()
                finally:
                    self.ended.set()

    async def _take_over(self, inheritance: Inheritance) -> None:
        life, began = self._life, inheritance.vm.info.started or datetime.now(UTC)
        age = (datetime.now(UTC) - began).total_seconds()
        self._started_at = {life.generation: anyio.current_time() - age}
        told = Adopted(
            pid=life.pid or 0, state=life.public_state, payload=life.payload, suspended=life.suspended
        )
        self.publish(told)
        self._refresh(life.phase)
        await self._begin(Run(self._spec, life.generation, self._post, inheritance, suspended=life.suspended))
        if life.payload is PayloadState.STARTING and not life.suspended and life.hangup_timeout is not None:
            await self._perform(ArmHangup(life.generation))

    async def _spawn(self, generation: int) -> None:
        self._started_at = {generation: anyio.current_time()}
        await self._begin(Run(self._spec, generation, self._post))

    async def _begin(self, run: Run) -> None:
        generation, self.run_under_way = run.generation, run
        await self._supervisor.start("guest-rpc", _GuestRpc(self, generation))
        if self._context.tombstones is not None:
            await self._supervisor.start("tombstones", partial(self._context.tombstones.serve, self.publish))
        await self._supervisor.start("run", self.run_under_way.run)

    async def _end_run(self) -> None:
        for child in ("control", *_STOP_REQUESTS, "guest-rpc", "tombstones", "run"):
            await self._supervisor.stop(child)
        self.run_under_way = None
        self._context.transport.close()
        self._context.listener.refuse_waiting()  # else the next run would be told what this one's guest said

    async def _let_go(self) -> None:
        if self.run_under_way is not None:
            self.run_under_way.let_go()
        await self._supervisor.stop("restart")
        await self._end_run()
        try:
            await self._context.listener.aclose()
        finally:
            try:
                self._context.let_go()
            finally:
                self.ended.set()

    async def _clear(self) -> None:
        await self._supervisor.stop("restart")
        await self._end_run()
        try:
            await self._context.listener.aclose()
        finally:
            if not self._life.survivors:
                self._context.clear()

    def _post(self, message: Message) -> None:
        try:
            self.mailbox.control(message)
        except ActorDiedError:
            self._log.debug("message for a dead VM", message=type(message).__name__)

    def _child_ended(self, child: ChildExit) -> Decision:
        if child.error is not None:
            # A fault of ours, not of the VM; the VM is ended in order rather than left without an owner.
            self._log.error("a VM's child failed", child=child.name, exc_info=child.error)
            detail = f"internal error in {child.name}: {child.error!r}"
            run = self.run_under_way
            if run is not None and child.name == "run":
                self._post(run.account(VmmExit(UNKNOWN, DeathReason.INFRASTRUCTURE_ERROR, detail)))
            elif run is not None:
                run.fail(detail)
        return Decision.IGNORE

    # -- Telling the world ------------------------------------------------------------------------

    def publish(self, event: Event) -> Event:
        """Put an event of this VM on the bus, with who and when filled in; returns it as published."""
        stamped = self._context.bus.publish(self._headed(event))
        if isinstance(stamped, Died):
            self.info = replace(self.info, died=stamped)
        self._log.info(event.kind, generation=stamped.generation, seq=stamped.seq)
        return stamped

    async def publish_and_wait(self, event: Event) -> None:
        """The same for a client, which may be held up by subscribers that ask for it; the VM never is."""
        await self._context.bus.publish_and_wait(self._headed(event))

    def _headed(self, event: Event) -> Event:
        now = anyio.current_time()
        header: dict[str, Any] = {
            "cid": self._spec.cid,
            "generation": event.generation or self._life.generation,
            "name": self._spec.name,
            "driver": self._spec.driver.name,
            "uid": self.info.requester_uid,
            "time": datetime.now(UTC),
            "monotonic": now,
        }
        if isinstance(event, Started | PayloadStarted | Died):
            header["elapsed"] = now - self._started_at.get(header["generation"], now)
        if isinstance(event, Died) and self._stop_asked is not None:
            header["stop_elapsed"] = now - self._stop_asked
        return replace(event, **header)

    def _refresh(self, before: Phase) -> None:
        life = self._life
        started, due = self.info.started, None
        if life.phase is Phase.STARTING and before is not Phase.STARTING:
            started = datetime.now(UTC)
        if life.restart_delay is not None:
            due = self.info.restart_due or datetime.now(UTC) + timedelta(seconds=life.restart_delay)
        known: dict[str, Any] = {
            "generation": life.generation,
            "state": life.public_state,
            "payload": life.payload,
            "suspended": life.suspended,
            "pid": life.pid,
            "started": started,
            "restarts": life.restarts.total,
            "restart_due": due,
            "queued": life.queued,
        }
        changed = any(getattr(self.info, name) != value for name, value in known.items())
        if changed:
            self.info = replace(self.info, **known)
        if (changed or self._kept_changed()) and (life.phase is not Phase.DEAD or life.survivors):
            self._record()

    def _kept_changed(self) -> bool:
        life, kept = self._life, self._kept
        return kept is not None and (kept.running, kept.payload_failed) != (
            life.phase is Phase.RUNNING,
            life.payload_failed,
        )

    def _record(self) -> None:
        if self._kept is not None:
            self._kept = replace(
                self._kept,
                info=replace(self.info, died=None),
                running=self._life.phase is Phase.RUNNING,
                payload_failed=self._life.payload_failed,
                created_seq=self.created_seq,
            )
        self._context.record(self.info, self._kept)


def _life_of(inheritance: Inheritance) -> Life:
    """The life of a VM as its manager wrote it down last."""
    vm, info = inheritance.vm, inheritance.vm.info
    return Life(
        vm.hangup_timeout,
        phase=Phase.RUNNING if vm.running else Phase.STARTING,
        payload=info.payload,
        generation=info.generation,
        restarts=Restarts(None, total=info.restarts),
        pid=inheritance.vmm.pid,
        suspended=info.suspended,
        payload_failed=vm.payload_failed,
    )


_STOP_REQUESTS: Final = (StopRung.POWER_BUTTON.name, StopRung.EXIT_REQUEST.name)


class _Timer:
    """Sends one message later."""

    def __init__(self, seconds: float | None, post: Callable[[Message], None], message: Message) -> None:
        self._seconds = seconds
        self._post = post
        self._message = message

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        if self._seconds is not None:
            await anyio.sleep(self._seconds)
            self._post(self._message)


class _GuestRpc:
    """Serves the guest's calls for one run."""

    def __init__(self, actor: VmActor, generation: int) -> None:
        self._actor = actor
        self._generation = generation

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        actor = self._actor
        await serve_guest_rpc(
            actor._context.listener,  # noqa: SLF001 - part of the actor
            self._report,
            cid=actor.info.cid,
            statistics=actor.guest_calls,
            binder=actor._context.binder,  # noqa: SLF001
        )

    async def _report(self, report: GuestReport) -> None:
        await self._actor.mailbox.ask(GuestReported(self._generation, report), timeout=REPORT_SECONDS)


class _StopRequest:
    """Has the VMM stop in a gentler way than by a kill; its silence counts for nothing."""

    def __init__(self, actor: VmActor, generation: int, rung: StopRung, unpause: bool) -> None:
        self._actor = actor
        self._generation = generation
        self._rung = rung
        self._unpause = unpause

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        actor, run = self._actor, self._actor.run_under_way
        if run is None:
            return
        vmm = run.running_vmm()
        try:
            if self._unpause:
                await vmm.resume()
                actor._post(Unpaused(self._generation))  # noqa: SLF001 - part of the actor
            if self._rung is StopRung.POWER_BUTTON:
                await vmm.request_shutdown()
            else:
                await vmm.request_exit()
        except DeadlineExceededError:
            actor.vmm_timeouts += 1  # it may do it yet; how long that is waited for is told by the ladder
        except VmmError as refused:
            with anyio.move_on_after(END_GRACE):
                await vmm.wait()
                return  # it has ended, and refused only because of that
            actor._post(StopRefused(self._generation, self._rung, refused))  # noqa: SLF001


class _ControlRequest:
    """Carries out one control request; the VMM may be slow or silent, the actor is not."""

    def __init__(self, actor: VmActor, generation: int, control: Control) -> None:
        self._actor = actor
        self._generation = generation
        self._control = control

    async def __call__(self, *, task_status: TaskStatus[None]) -> None:
        task_status.started()
        error: VmactorError | None = None
        try:
            await self._carry_out()
        except VmactorError as refused:
            error = refused
            self._actor.vmm_timeouts += isinstance(refused, DeadlineExceededError)
        self._actor._post(ControlDone(self._generation, error))  # noqa: SLF001 - part of the actor

    async def _carry_out(self) -> None:
        run = self._actor.run_under_way
        if run is None:
            raise IllegalStateError(NOT_RUNNING)
        match self._control:
            case Suspend():
                await run.running_vmm().suspend()
            case Resume():
                await run.running_vmm().resume()
            case TrimMemory(level):
                await run.trim(TRIM_PERCENT[level])
