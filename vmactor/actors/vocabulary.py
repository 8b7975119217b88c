"""What is said inside a VM's actor: signals that its children send in, and actions that it is to perform.

Pure data. The commands of clients are in ``vmactor.messages``; what each does, and when, is decided in
``vmactor.actors.lifecycle``.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from vmactor.errors import VmactorError
from vmactor.messages import Control, DeathReason, Event, GuestReport, Release, Start, Stop, StopRung
from vmactor.request import Request
from vmactor.usage import CpuTime, Memory

NOT_RUNNING: Final = "VM is not running"
"""The reference's words."""

# -- Signals: what the VM's own children report; the commands are in vmactor.messages -----------------


@dataclass(frozen=True, slots=True)
class GuestReported(Request[None]):
    """The guest called its RPC server. Answered when the event is published."""

    generation: int
    report: GuestReport


@dataclass(frozen=True, slots=True)
class BootWaits:
    """Too many VMs are booting; this one waits for its turn."""

    generation: int


@dataclass(frozen=True, slots=True)
class BootBegins:
    """Its turn has come."""

    generation: int


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
class StopRefused:
    """The VMM refused to be stopped this way."""

    generation: int
    rung: StopRung
    error: VmactorError


@dataclass(frozen=True, slots=True)
class Unpaused:
    """The virtual CPUs run again, so that the guest can see its power button."""

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
        at: When it ended, on the loop's clock.
        lasted: Seconds that it took.
        cpu: Processor time that it took.
        peak: The most memory that was seen.
        adopted: Whether another manager had begun it.
        chance: A number from 0 to 1: chance enters with the message, as time does.
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
    at: float = 0.0
    lasted: float = 0.0
    cpu: CpuTime = CpuTime()  # noqa: RUF009 - immutable
    peak: Memory = Memory()  # noqa: RUF009 - immutable
    adopted: bool = False
    chance: float = 0.0


@dataclass(frozen=True, slots=True)
class HangupExpired:
    """The payload had its time to report."""

    generation: int


@dataclass(frozen=True, slots=True)
class Detach(Request[None]):
    """The manager ends, and the VM is to outlive it; it is killed where that cannot be."""


@dataclass(frozen=True, slots=True)
class RestartDue:
    """The back-off before a run is over."""

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
    | BootWaits
    | BootBegins
    | VmmSpawned
    | VmmRunning
    | VmmGone
    | StopRefused
    | Unpaused
    | RunEnded
    | HangupExpired
    | RestartDue
    | ControlDone
    | Detach
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
class AskToStop:
    """Have the VMM stop in a gentler way; send ``StopRefused`` if it refuses.

    Attributes:
        generation: The run.
        rung: How.
        unpause: Let the virtual CPUs run first, and send ``Unpaused``.
    """

    generation: int
    rung: StopRung
    unpause: bool = False


@dataclass(frozen=True, slots=True)
class DropControl:
    """Give up the control request under way; the VMM may carry it out or not."""


@dataclass(frozen=True, slots=True)
class ArmHangup:
    """Send ``HangupExpired`` after the VM's hang-up timeout."""

    generation: int


@dataclass(frozen=True, slots=True)
class DisarmHangup:
    """The payload has reported, or there is nothing left that could."""


@dataclass(frozen=True, slots=True)
class ArmRestart:
    """Send ``RestartDue`` after so many seconds."""

    generation: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RunControl:
    """Carry out a control request on the VMM and send ``ControlDone``."""

    generation: int
    control: Control


@dataclass(frozen=True, slots=True)
class EndRun:
    """Stop what belongs to the run that is over; RPC server, files and CID stay for the next one."""


@dataclass(frozen=True, slots=True)
class Clear:
    """Close the RPC server and remove the VM's files; they stay as long as a process of the VM lives."""


@dataclass(frozen=True, slots=True)
class LetGo:
    """Leave the run's processes alive, with all that they need, and end the actor."""


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
    SpawnRun
    | KillRun
    | AskToStop
    | DropControl
    | ArmHangup
    | DisarmHangup
    | ArmRestart
    | RunControl
    | EndRun
    | Clear
    | LetGo
    | Publish
    | Answer
    | Refuse
    | Finish
)
