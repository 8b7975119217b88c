"""How a VM is made to end gently: one way after the other, each with its time.

A ladder is climbed by whoever asks for it, one ``Stop`` message a rung. So everybody's clock is their own,
many VMs are stopped at the same time, and between any two messages somebody else's kill gets through. The
VM's life knows only which rungs were tried.
"""

from dataclasses import dataclass
from typing import Final

from vmactor.actors.vocabulary import Message
from vmactor.errors import DeadlineExceededError, IllegalArgumentError, NotStoppedError, VmmError
from vmactor.mailbox import Mailbox
from vmactor.messages import Stop, StopRung

POWER_BUTTON_SECONDS: Final = 20.0
EXIT_SECONDS: Final = 5.0
KILL_SECONDS: Final = 15.0
"""Above the time after which a process that was killed and lives on is told of by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopLadder:
    """How long each way to end a VM is tried, in seconds; None leaves it out.

    Attributes:
        power_button: The guest is told to shut down, as by the button of a machine.
        exit_request: The VMM is told to end in order; to the guest, the power fails.
        kill: The VMM is killed. Without this rung, the VM may live on.

    Raises:
        IllegalArgumentError: A time is not above 0, or there is no rung.
    """

    power_button: float | None = POWER_BUTTON_SECONDS
    exit_request: float | None = EXIT_SECONDS
    kill: float | None = KILL_SECONDS

    def __post_init__(self) -> None:
        if not self.rungs:
            raise IllegalArgumentError("a ladder without a rung stops nothing: give one of them a time")
        if not all(seconds > 0 for _, seconds in self.rungs):
            raise IllegalArgumentError(f"a rung needs more than 0 seconds; None leaves it out: {self}")

    @property
    def rungs(self) -> tuple[tuple[StopRung, float], ...]:
        """The ways in order, each with its seconds."""
        times = zip(StopRung, (self.power_button, self.exit_request, self.kill), strict=True)
        return tuple((rung, seconds) for rung, seconds in times if seconds is not None)

    @property
    def budget(self) -> float:
        """Seconds that all of it takes at most."""
        return sum(seconds for _, seconds in self.rungs)


async def climb(ladder: StopLadder, mailbox: Mailbox[Message]) -> None:
    """Ask a VM's actor to end the VM, rung by rung; return when it is dead and cleared away.

    Each rung's clock starts when it is asked for. A rung that the VMM refuses gives way to the next at once.
    Cancelled, it goes no further; what was asked for stays asked for.

    Raises:
        NotStoppedError: The VM is still there after the last rung's time.
        ActorDiedError: It was gone before.
    """
    tried = []
    for rung, seconds in ladder.rungs:
        try:
            await mailbox.ask(Stop(rung), timeout=seconds, control=True)
        except NotStoppedError:
            raise
        except DeadlineExceededError:
            tried.append(f"{rung.name} had no effect in {seconds:g} s")
        except VmmError as refused:
            tried.append(f"{rung.name} was refused ({refused})")
        else:
            return
    if ladder.kill is None:
        advice = "stop() kills it"
    else:
        advice = "its VMM is stuck inside the kernel, most likely; the kill goes on"
    raise NotStoppedError(f"{mailbox.name} is still there: {'; '.join(tried)}; {advice}")
