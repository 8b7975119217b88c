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

from vmactor.errors import (
    DeadlineExceededError,
    IllegalStateError,
    InvalidPayloadTransitionError,
    MailboxFullError,
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
    Resume,
    Resumed,
    Start,
    Started,
    Stop,
    Suspend,
    Suspended,
    TrimMemory,
    VirtualMachineState,
    death_reason_of_text,
)
from vmactor.request import Request
from vmactor.text import escape

MAX_CONTROLS: Final = 16
"""Control requests of one VM that may wait for its VMM."""

NOT_RUNNING: Final = "VM is not running"
"""The reference's words."""


class Phase(Enum):
    """Where the VM's process is; the payload's state is another matter."""

    NOT_STARTED = "not started"
    STARTING = "starting"
    """A VMM is being spawned, or has not said yet that it runs."""
    RUNNING = "running"
    DYING = "dying"
    """The VMM is gone; what it left is being read and cleared away."""
    DEAD = "dead"


# -- Signals: what the VM's own children report; the commands are in vmactor.messages -----------------


@dataclass(frozen=True, slots=True)
class GuestReported(Request[None]):
    """The guest called its RPC server. Answered when the event is published."""

    generation: int
    report: GuestReport


@dataclass(frozen=True, slots=True)
class VmmSpawned:
    """The VMM's process exists."""

    generation: int
    pid: int


@dataclass(frozen=True, slots=True)
class VmmRunning:
    """The VMM is known to run the guest."""

    generation: int


@dataclass(frozen=True, slots=True)
class VmmGone:
    """The VMM's process has ended."""

    generation: int


@dataclass(frozen=True, slots=True)
class RunEnded:
    """Everything of a run is over and read.

    Attributes:
        generation: The run.
        reason: By the VMM's exit; the failure text and a hang-up come on top.
        exit_code: The VMM's exit status, if it exited.
        signal: The signal that ended it, if one did.
        failure: The failure port's text.
        detail: For people.
        console_tail: The end of the console.
        console_dropped: Console bytes not kept.
        survivors: The run's processes that outlived SIGKILL, for people.
        cause: The error because of which there was no VMM.
    """

    generation: int
    reason: DeathReason
    exit_code: int | None = None
    signal: int | None = None
    failure: str = ""
    detail: str = ""
    console_tail: str = ""
    console_dropped: int = 0
    survivors: str = ""
    cause: Exception | None = None


@dataclass(frozen=True, slots=True)
class HangupExpired:
    """The payload had its time to report."""

    generation: int


@dataclass(frozen=True, slots=True)
class ControlDone:
    """The VMM answered a control request, or did not."""

    generation: int
    error: VmactorError | None


Message = (
    Start
    | Stop
    | Release
    | Control
    | GuestReported
    | VmmSpawned
    | VmmRunning
    | VmmGone
    | RunEnded
    | HangupExpired
    | ControlDone
)

# -- Actions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpawnRun:
    """Begin a run: helper, VMM, drains, monitor."""

    generation: int


@dataclass(frozen=True, slots=True)
class KillRun:
    """Kill the VMM, or give up spawning it."""


@dataclass(frozen=True, slots=True)
class ArmHangup:
    """Send ``HangupExpired`` after the VM's hang-up timeout."""

    generation: int


@dataclass(frozen=True, slots=True)
class DisarmHangup:
    """The payload has reported, or there is nothing left that could."""


@dataclass(frozen=True, slots=True)
class RunControl:
    """Carry out a control request on the VMM and send ``ControlDone``."""

    generation: int
    control: Control


@dataclass(frozen=True, slots=True)
class Clear:
    """Close the RPC server and remove the VM's files; they stay as long as a process of the VM lives."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Put an event on the bus; the actor fills in its header."""

    event: Event


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a command."""

    reply: Hashable


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer a command with an error."""

    reply: Hashable
    error: VmactorError


@dataclass(frozen=True, slots=True)
class Finish:
    """The VM will never change again: give the CID back, unless a process lives on it, and end the actor."""


Action = (
    SpawnRun | KillRun | ArmHangup | DisarmHangup | RunControl | Clear | Publish | Answer | Refuse | Finish
)

# -- State -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Life:
    """A VM's whole state.

    Attributes:
        hangup_timeout: Seconds a payload has to report its start, or None where nobody watches.
        phase: Where the process is.
        payload: How far the payload has come.
        generation: Number of the current or last run.
        pid: The VMM's process, while there is one.
        suspended: Whether the virtual CPUs are paused.
        killed: Whether this run is being killed on request.
        starter: Who waits for the start.
        stoppers: Who waits for the end.
        controls: Control requests in order, with who waits; the first is being carried out.
        stale: Messages of earlier runs, ignored.
        survivors: Processes that outlived SIGKILL, for people; the VM's files and CID are theirs.
    """

    hangup_timeout: float | None = None
    phase: Phase = Phase.NOT_STARTED
    payload: PayloadState = PayloadState.STARTING
    generation: int = 0
    pid: int | None = None
    suspended: bool = False
    killed: bool = False
    starter: Hashable = None
    stoppers: tuple[Hashable, ...] = ()
    controls: tuple[tuple[Control, Hashable], ...] = ()
    stale: int = 0
    survivors: str = ""

    @property
    def public_state(self) -> VirtualMachineState:
        """The reference's mapping of VM state and payload state."""
        match self.phase:
            case Phase.NOT_STARTED:
                return VirtualMachineState.NOT_STARTED
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


def transition(life: Life, message: Message, reply: Hashable = None) -> Step:  # noqa: PLR0911 - a table
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
        case Stop():
            return _stop(life, reply)
        case Release():
            return _release(life, reply)
        case Suspend() | Resume() | TrimMemory():
            return _control(life, message, reply)
        case _ if message.generation != life.generation:
            return _stale(life, message, reply)
        case GuestReported(report=report):
            return _guest(life, report, reply)
        case VmmSpawned(pid=pid):
            return replace(life, pid=pid), [KillRun()] if life.killed else []
        case VmmRunning():
            return _running(life)
        case VmmGone():
            gone = replace(life, phase=Phase.DYING, pid=None) if life.alive else life
            return gone, [DisarmHangup()] if life.alive else []
        case RunEnded():
            return _ended(life, message)
        case HangupExpired():
            return _hangup(life)
        case ControlDone(error=error):
            return _control_done(life, error)


def _start(life: Life, reply: Hashable) -> Step:
    if life.phase is not Phase.NOT_STARTED:
        return life, [Refuse(reply, IllegalStateError("VM already started or failed"))]
    generation = life.generation + 1
    actions: list[Action] = [SpawnRun(generation)]
    if life.hangup_timeout is not None:
        actions.append(ArmHangup(generation))
    return replace(life, phase=Phase.STARTING, generation=generation, starter=reply), actions


def _stop(life: Life, reply: Hashable) -> Step:
    waiting = replace(life, stoppers=(*life.stoppers, reply))
    if life.alive:
        return replace(waiting, killed=True), [KillRun()]
    if life.phase is Phase.DYING:
        return waiting, []
    return life, [Answer(reply)]


def _release(life: Life, reply: Hashable) -> Step:
    if life.phase is Phase.NOT_STARTED:
        return replace(life, phase=Phase.DEAD), [Clear(), Publish(Removed()), Answer(reply), Finish()]
    return _stop(life, reply)


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
    return replace(running, payload=new), [*actions, Publish(event), Answer(reply)]


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
            case Resume() if suspended:
                suspended = False
                again: list[Action] = [ArmHangup(life.generation)] if watched else []
                actions += [*again, Publish(Resumed())]
            case _:
                pass
        actions.append(Answer(reply))
    if rest:
        actions.append(RunControl(life.generation, rest[0][0]))
    return replace(life, controls=rest, suspended=suspended), actions


def _ended(life: Life, run: RunEnded) -> Step:
    if life.phase in (Phase.NOT_STARTED, Phase.DEAD):
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
    )
    actions: list[Action] = [DisarmHangup(), Clear(), Publish(died)]
    if life.starter is not None:
        actions.append(Refuse(life.starter, _start_error(life, run)))
    gone = IllegalStateError(f"{NOT_RUNNING}: it died while the request waited")
    actions += [Refuse(reply, gone) for _, reply in life.controls]
    actions += [
        Refuse(reply, DeadlineExceededError(left)) if left else Answer(reply) for reply in life.stoppers
    ]
    actions.append(Finish())
    pid = life.pid if left else None
    dead = replace(life, phase=Phase.DEAD, pid=pid, starter=None, stoppers=(), controls=(), suspended=False)
    return replace(dead, survivors=run.survivors), actions


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
