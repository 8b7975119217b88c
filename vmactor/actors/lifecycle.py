"""A VM's life as a pure function: (life, message) -> (next life, actions).

Nothing here waits, reads a clock or touches the system. The VM actor feeds messages in and performs the
actions in order; so there is no await between reading the state and writing it.

Sources: the reference's state machine, hang-up detection, exit sequence, death reasons and guest calls; where
vmactor differs, docs/differences.md says why.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from vmactor.actors.restart_policy import RestartPolicy, Restarts, run_failed
from vmactor.actors.vocabulary import (
    NOT_RUNNING,
    Action,
    Answer,
    ArmHangup,
    ArmRestart,
    AskToStop,
    BootBegins,
    BootWaits,
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
    RunEnded,
    SpawnRun,
    StopRefused,
    Unpaused,
    VmmGone,
    VmmRunning,
    VmmSpawned,
)
from vmactor.errors import (
    IllegalStateError,
    InvalidPayloadTransitionError,
    MailboxFullError,
    NotStoppedError,
    StartFailedError,
    VmactorError,
)
from vmactor.messages import (
    Control,
    DeathReason,
    Died,
    Event,
    GuestReport,
    HungUp,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
    PayloadError,
    PayloadFinished,
    PayloadReady,
    PayloadStarted,
    PayloadState,
    Release,
    Removed,
    Restarting,
    RestartsExhausted,
    Resume,
    Resumed,
    Start,
    Started,
    Stop,
    StopRung,
    Suspend,
    Suspended,
    TrimMemory,
    VirtualMachineState,
    death_reason_of_text,
)
from vmactor.text import escape

MAX_CONTROLS: Final = 16
"""Control requests of one VM that may wait for its VMM."""

BEING_STOPPED: Final = "VM is being stopped"


class Phase(Enum):
    """Where the VM's process is; the payload's state is another matter."""

    NOT_STARTED = "not started"
    STARTING = "starting"
    """A VMM is being spawned, or has not said yet that it runs."""
    RUNNING = "running"
    WAITING = "waiting"
    """Between two runs: the next one's generation has begun, its VMM is not spawned yet."""
    DYING = "dying"
    """The VMM is gone; what it left is being read and cleared away."""
    DEAD = "dead"


# -- State -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Life:
    """A VM's whole state.

    Attributes:
        hangup_timeout: Seconds a payload has to report its start, or None where nobody watches.
        phase: Where the process is.
        payload: How far the payload has come.
        generation: Number of the current or last run, or of the one that is waited for.
        restarts: Whether it is started again, and how often it was.
        restart_delay: Seconds that the next run is waited for, while it is.
        queued: Whether the run waits until fewer VMs are booting.
        pid: The VMM's process, while there is one.
        suspended: Whether the virtual CPUs are paused.
        killed: Whether this run is being killed, on request or for a hang-up.
        stopping: Whether somebody asked for the VM's end; then no run follows.
        rungs: How this run was asked to end so far; what its VMM refused is not among them.
        payload_failed: Whether the payload reported an error, or another exit code than 0.
        starter: Who waits for the start.
        stoppers: Who waits for the end, each with the way that it asked for.
        controls: Control requests in order, with who waits; the first is being carried out.
        stale: Messages of earlier runs, ignored.
        survivors: Processes that outlived SIGKILL, for people; the VM's files and CID are theirs.
    """

    hangup_timeout: float | None = None
    phase: Phase = Phase.NOT_STARTED
    payload: PayloadState = PayloadState.STARTING
    generation: int = 0
    restarts: Restarts = Restarts()  # noqa: RUF009 - immutable
    restart_delay: float | None = None
    queued: bool = False
    pid: int | None = None
    suspended: bool = False
    killed: bool = False
    stopping: bool = False
    rungs: frozenset[StopRung] = frozenset()
    payload_failed: bool = False
    starter: Hashable = None
    stoppers: tuple[tuple[StopRung, Hashable], ...] = ()
    controls: tuple[tuple[Control, Hashable], ...] = ()
    stale: int = 0
    survivors: str = ""

    @property
    def public_state(self) -> VirtualMachineState:
        """The reference's mapping of VM state and payload state."""
        match self.phase:
            case Phase.NOT_STARTED:
                return VirtualMachineState.NOT_STARTED
            case Phase.WAITING:
                return VirtualMachineState.STARTING
            case Phase.DYING | Phase.DEAD:
                return VirtualMachineState.DEAD
        return {
            PayloadState.STARTING: VirtualMachineState.STARTING,
            PayloadState.STARTED: VirtualMachineState.STARTED,
            PayloadState.READY: VirtualMachineState.READY,
            PayloadState.FINISHED: VirtualMachineState.FINISHED,
            PayloadState.HANGUP: VirtualMachineState.DEAD,
        }[self.payload]

    @property
    def alive(self) -> bool:
        """Whether a run is under way."""
        return self.phase in (Phase.STARTING, Phase.RUNNING)


Step = tuple[Life, list[Action]]


def transition(life: Life, message: Message, reply: Hashable = None) -> Step:  # noqa: PLR0911, PLR0912 - a table
    """What a message does to a VM.

    Args:
        life: The state now.
        message: What came in.
        reply: Where the sender of a command waits; comes back in ``Answer`` and ``Refuse``.

    Returns:
        The state afterwards, and the actions to perform, in order.
    """
    match message:
        case Start():
            return _start(life, reply)
        case Stop(rung=rung):
            return _stop(life, rung, reply)
        case Release():
            return _release(life, reply)
        case Detach():
            return _detach(life, reply)
        case Suspend() | Resume() | TrimMemory():
            return _control(life, message, reply)
        case _ if message.generation != life.generation:
            return _stale(life, message, reply)
        case GuestReported(report=report):
            return _guest(life, report, reply)
        case BootWaits() | BootBegins():
            return _queue(life, waits=isinstance(message, BootWaits))
        case VmmSpawned(pid=pid):
            return replace(life, pid=pid), [KillRun()] if life.killed else []
        case VmmRunning():
            return _running(life)
        case VmmGone():
            gone = replace(life, phase=Phase.DYING, pid=None) if life.alive else life
            return gone, [DisarmHangup()] if life.alive else []
        case StopRefused(rung=rung, error=error):
            return _stop_refused(life, rung, error)
        case Unpaused():
            return _resumed(life)
        case RunEnded():
            return _ended(life, message)
        case HangupExpired():
            return _hangup(life)
        case RestartDue():
            return _restart(life)
        case ControlDone(error=error):
            return _control_done(life, error)


def _start(life: Life, reply: Hashable) -> Step:
    if life.phase is not Phase.NOT_STARTED:
        return life, [Refuse(reply, IllegalStateError("VM already started or failed"))]
    return _spawn(replace(life, generation=life.generation + 1, starter=reply))


def _restart(life: Life) -> Step:
    return _spawn(replace(life, restart_delay=None)) if life.phase is Phase.WAITING else (life, [])


def _spawn(life: Life) -> Step:
    actions: list[Action] = [SpawnRun(life.generation)]
    if life.hangup_timeout is not None:
        actions.append(ArmHangup(life.generation))
    return replace(life, phase=Phase.STARTING), actions


def _queue(life: Life, *, waits: bool) -> Step:
    """A payload's time to report begins with its boot."""
    if life.phase is not Phase.STARTING or life.queued is waits:
        return life, []
    watched = life.hangup_timeout is not None
    timer: list[Action] = [DisarmHangup() if waits else ArmHangup(life.generation)] if watched else []
    return replace(life, queued=waits), timer


def _stop(life: Life, rung: StopRung, reply: Hashable) -> Step:
    waiting = replace(life, stoppers=(*life.stoppers, (rung, reply)), stopping=True)
    if life.phase is Phase.WAITING:
        died = Died(reason=DeathReason.KILLED, detail="stopped while it waited to be started again")
        dead = replace(life, phase=Phase.DEAD, restart_delay=None, stopping=True)
        return dead, [Clear(), Publish(died), Answer(reply), Finish()]
    if life.phase is Phase.DYING:
        return waiting, []
    if not life.alive:
        return life, [Answer(reply)]
    return _ask_to_stop(waiting, rung)


def _ask_to_stop(life: Life, rung: StopRung) -> Step:
    if life.phase is Phase.STARTING:
        rung = StopRung.KILL  # there is no guest to ask yet, nor a VMM that could be told
    asked = replace(life, rungs=life.rungs | {rung})
    if rung is StopRung.KILL:
        return replace(asked, killed=True), [KillRun()]
    if life.killed:
        return life, []
    if rung is StopRung.EXIT_REQUEST:
        return asked, [AskToStop(life.generation, rung)]
    # A paused guest would never see its power button; nor may one be paused from now on. Of a request that is
    # given up, nobody knows whether it has paused the guest.
    dropped: list[Action] = [Refuse(who, IllegalStateError(BEING_STOPPED)) for _, who in life.controls]
    unpause = life.suspended or bool(life.controls)
    if dropped:
        dropped.append(DropControl())
    return replace(asked, controls=()), [*dropped, AskToStop(life.generation, rung, unpause)]


def _stop_refused(life: Life, rung: StopRung, error: VmactorError) -> Step:
    """Tell those who asked for it; the run goes on until somebody tries harder."""
    if not life.alive:
        return life, []  # it ended all the same, which tells them more
    refused: list[Action] = [Refuse(reply, error) for asked, reply in life.stoppers if asked is rung]
    rest = tuple(stopper for stopper in life.stoppers if stopper[0] is not rung)
    return replace(life, stoppers=rest, rungs=life.rungs - {rung}), refused


def _stopped_by(life: Life, run: RunEnded) -> StopRung | None:
    if life.payload is PayloadState.HANGUP:
        return None
    late = {StopRung.KILL} if run.exit_code is not None else set()  # it ended by itself before the kill
    return max(life.rungs - late, default=None)


def _release(life: Life, reply: Hashable) -> Step:
    if life.phase is Phase.NOT_STARTED:
        return replace(life, phase=Phase.DEAD), [Clear(), Publish(Removed()), Answer(reply), Finish()]
    return _stop(life, StopRung.KILL, reply)


def _detach(life: Life, reply: Hashable) -> Step:
    """Leave a VM that is up to the next manager; whatever is not, or is to end, ends as ever."""
    if not life.alive or life.pid is None or life.stopping or life.killed:
        return _release(life, reply)
    error = IllegalStateError("the manager ends; the VM is kept, so ask the next one")
    waiting = [who for who in (life.starter, *(who for _, who in life.controls)) if who is not None]
    actions: list[Action] = [DisarmHangup(), LetGo(), *(Refuse(who, error) for who in waiting)]
    return replace(life, starter=None, controls=()), [*actions, Answer(reply)]


def _running(life: Life) -> Step:
    if life.phase is not Phase.STARTING:
        return life, []
    actions: list[Action] = [Publish(Started(pid=life.pid or 0))]
    if life.starter is not None:
        actions.append(Answer(life.starter))
    return replace(life, phase=Phase.RUNNING, starter=None), actions


def _guest(life: Life, report: GuestReport, reply: Hashable) -> Step:
    if not life.alive:
        return life, [Refuse(reply, IllegalStateError(NOT_RUNNING))]
    new, event = _effect(report)
    if new <= life.payload:
        text = f"Invalid payload state transition from {_title(life.payload)} to {_title(new)}"
        return life, [Refuse(reply, InvalidPayloadTransitionError(text))]
    # A guest that reports proves that its VMM runs, even if the VMM has not said so yet.
    running, actions = _running(life)
    if life.payload is PayloadState.STARTING:
        actions.append(DisarmHangup())
    failed = isinstance(event, PayloadError) or (isinstance(event, PayloadFinished) and event.exit_code != 0)
    told = replace(running, payload=new, payload_failed=life.payload_failed or failed)
    return told, [*actions, Publish(event), Answer(reply)]


def _effect(report: GuestReport) -> tuple[PayloadState, Event]:
    match report:
        case NotifyPayloadStarted():
            return PayloadState.STARTED, PayloadStarted()
        case NotifyPayloadReady():
            return PayloadState.READY, PayloadReady()
        case NotifyPayloadFinished(exit_code=code):
            return PayloadState.FINISHED, PayloadFinished(exit_code=code)
        case NotifyError(error_code=number, message=text):
            return PayloadState.FINISHED, PayloadError(error_code=number, message=text)


def _title(state: PayloadState) -> str:
    return state.name.capitalize()


def _hangup(life: Life) -> Step:
    if not life.alive or life.payload is not PayloadState.STARTING or life.hangup_timeout is None:
        return life, []
    if life.suspended:
        return life, []
    event = HungUp(timeout=life.hangup_timeout)
    return replace(life, payload=PayloadState.HANGUP, killed=True), [Publish(event), KillRun()]


def _control(life: Life, control: Control, reply: Hashable) -> Step:
    if life.phase is not Phase.RUNNING:
        return life, [Refuse(reply, IllegalStateError(NOT_RUNNING))]
    if life.rungs and isinstance(control, Suspend):
        return life, [Refuse(reply, IllegalStateError(BEING_STOPPED))]
    if life.suspended and isinstance(control, TrimMemory):
        return life, [Refuse(reply, IllegalStateError("VM is suspended and cannot give memory; resume it"))]
    if len(life.controls) >= MAX_CONTROLS:
        text = f"{MAX_CONTROLS} requests wait for this VM's VMM already; try again later"
        return life, [Refuse(reply, MailboxFullError(text))]
    queued = replace(life, controls=(*life.controls, (control, reply)))
    return queued, [] if life.controls else [RunControl(life.generation, control)]


def _control_done(life: Life, error: VmactorError | None) -> Step:
    if not life.controls:
        return life, []
    (control, reply), rest = life.controls[0], life.controls[1:]
    actions: list[Action] = []
    suspended = life.suspended
    watched = life.alive and life.payload is PayloadState.STARTING and life.hangup_timeout is not None
    if error is not None:
        actions.append(Refuse(reply, error))
    else:
        match control:
            case Suspend() if not suspended:
                suspended = True
                # A paused guest cannot report; it gets its whole time again when it is resumed.
                actions += [DisarmHangup(), Publish(Suspended())] if watched else [Publish(Suspended())]
            case Resume():
                suspended, told = False, _resumed(life)[1]
                actions += told
            case _:
                pass
        actions.append(Answer(reply))
    if rest:
        actions.append(RunControl(life.generation, rest[0][0]))
    return replace(life, controls=rest, suspended=suspended), actions


def _resumed(life: Life) -> Step:
    if not life.suspended:
        return life, []
    watched = life.alive and life.payload is PayloadState.STARTING and life.hangup_timeout is not None
    again: list[Action] = [ArmHangup(life.generation)] if watched else []
    return replace(life, suspended=False), [*again, Publish(Resumed())]


def _ended(life: Life, run: RunEnded) -> Step:
    if life.phase in (Phase.NOT_STARTED, Phase.WAITING, Phase.DEAD):
        return life, []
    left = f"{run.survivors} survived SIGKILL, so its directory and CID are kept" if run.survivors else ""
    reason = death_reason_of_text(run.failure)
    if reason is None:
        hung = life.payload is PayloadState.HANGUP and not run.failure
        reason = DeathReason.HANGUP if hung else run.reason
    died = Died(
        reason=reason,
        exit_code=run.exit_code,
        signal=run.signal,
        failure=run.failure,
        detail="\n".join(text for text in (run.detail, left) if text),
        console_tail=run.console_tail,
        console_dropped=run.console_dropped,
        guest_time_ms=run.cpu.guest_ms,
        cpu_time_ms=run.cpu.total_ms,
        rss_vm_kib=run.peak.guest_kib,
        rss_vmm_kib=run.peak.total_kib,
        stopped_by=_stopped_by(life, run),
        adopted=run.adopted,
    )
    gone = IllegalStateError(f"{NOT_RUNNING}: it died while the request waited")
    refused: list[Action] = [Refuse(reply, gone) for _, reply in life.controls]
    over = replace(life, pid=None, controls=(), suspended=False, queued=False)
    exhausted: list[Action] = []
    if _comes_back(life, run, reason):
        restarts, delay = life.restarts.after(run.at, run.lasted, run.chance)
        if delay is not None:
            return _wait_for_restart(replace(over, restarts=restarts), died, delay, refused)
        exhausted = [Publish(_exhausted(restarts))]
        why = (died.detail, "it ended too often to be started again")
        died = replace(died, detail="\n".join(filter(None, why)))
    actions: list[Action] = [DisarmHangup(), Clear(), *exhausted, Publish(died)]
    if life.starter is not None:
        actions.append(Refuse(life.starter, _start_error(life, run)))
    actions += refused
    actions += [Refuse(reply, NotStoppedError(left)) if left else Answer(reply) for _, reply in life.stoppers]
    actions.append(Finish())
    dead = replace(over, phase=Phase.DEAD, pid=life.pid if left else None, starter=None, stoppers=())
    return replace(dead, survivors=run.survivors), actions


def _comes_back(life: Life, run: RunEnded, reason: DeathReason) -> bool:
    """Whether the end of a run calls for another run.

    Not if somebody wants the VM's end; nor if something of it lives on, in the next one's place. A VM that
    never came up is its creator's affair: ``start`` tells why.
    """
    if life.stopping or run.survivors or life.starter is not None:
        return False
    return life.restarts.wanted(failed=run_failed(reason, life.payload, payload_failed=life.payload_failed))


def _wait_for_restart(life: Life, died: Died, delay: float, refused: list[Action]) -> Step:
    """End a run and begin the next generation, with the wait for its VMM."""
    following = replace(
        life,
        phase=Phase.WAITING,
        generation=life.generation + 1,
        payload=PayloadState.STARTING,
        payload_failed=False,
        killed=False,
        queued=False,
        restart_delay=delay,
    )
    told = Restarting(delay=delay, restarts=life.restarts.total)
    # The last word on the old generation comes before the first on the new one: the actor stamps events with
    # the state's generation, so the old one names its own.
    last = Publish(replace(died, generation=life.generation, final=False))
    arm = ArmRestart(following.generation, delay)
    return following, [DisarmHangup(), EndRun(), last, *refused, Publish(told), arm]


def _exhausted(restarts: Restarts) -> RestartsExhausted:
    limit = (restarts.policy or RestartPolicy()).limit
    return RestartsExhausted(restarts=restarts.total, failures=len(restarts.recent), period=limit.period)


def _start_error(life: Life, run: RunEnded) -> VmactorError:
    cause = "\n".join(escape(line) for line in run.detail.splitlines())
    if life.payload is PayloadState.HANGUP:
        return StartFailedError(f"the VM hung up before its VMM ran: {cause}")
    if life.killed:
        return IllegalStateError("the VM was stopped before its VMM ran")
    error = StartFailedError(cause or "the VMM ended before it ran")
    error.__cause__ = run.cause
    return error


def _stale(life: Life, message: Message, reply: Hashable) -> Step:
    counted = replace(life, stale=life.stale + 1)
    if isinstance(message, GuestReported):
        return counted, [Refuse(reply, IllegalStateError("this run of the VM is over"))]
    return counted, []
