"""Whether a VM whose run ended is started again, when, and when to give up: values and pure functions.

The rules are the runtime's (``vmactor/restarts.py``). A run failed if ``vmactor run`` would tell so by its
exit status: docs/vm-life.md has the table.
"""

from dataclasses import dataclass, replace

from vmactor.errors import IllegalArgumentError
from vmactor.messages import DeathReason, PayloadState
from vmactor.restarts import Backoff, Restart, RestartLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How a VM is started again by itself, once it has been up.

    Attributes:
        when: ``TRANSIENT``: after a failed run; ``PERMANENT``: after every run that nobody stopped.
        limit: How many restarts are borne within a period before the VM is given up.
        backoff: How long to wait before a restart.

    Raises:
        IllegalArgumentError: ``TEMPORARY``, which is never: give no policy instead.
    """

    when: Restart = Restart.TRANSIENT
    limit: RestartLimit = RestartLimit(3, 60.0)  # noqa: RUF009 - immutable
    backoff: Backoff = Backoff(initial=1.0, maximum=30.0, stable=60.0)  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.when is Restart.TEMPORARY:
            raise IllegalArgumentError("a VM that is never to be started again needs no restart policy")


@dataclass(frozen=True, slots=True)
class Restarts:
    """A VM's restarts so far.

    Attributes:
        policy: What was asked for; None where a VM is never started again.
        total: Restarts of the VM.
        recent: When runs ended that called for a restart, on the loop's clock, within the limit's period.
        in_a_row: How many of them since the last stable run.
    """

    policy: RestartPolicy | None = None
    total: int = 0
    recent: tuple[float, ...] = ()
    in_a_row: int = 0

    def wanted(self, *, failed: bool) -> bool:
        """Whether the policy asks for a restart after such an end."""
        return self.policy is not None and self.policy.when.applies(failed=failed)

    def after(self, at: float, lasted: float, chance: float) -> tuple["Restarts", float | None]:
        """Count an end that calls for a restart.

        Args:
            at: When, on the loop's clock.
            lasted: Seconds that the run took.
            chance: A number from 0 to 1, for the back-off's jitter.

        Returns:
            The restarts with this one, and the seconds to wait; None instead if it is one too many.
        """
        policy = self.policy or RestartPolicy()
        recent = (*(time for time in self.recent if time >= at - policy.limit.period), at)
        in_a_row = 1 if lasted >= policy.backoff.stable else self.in_a_row + 1
        counted = replace(self, recent=recent, in_a_row=in_a_row)
        if len(recent) > policy.limit.intensity:
            return counted, None
        return replace(counted, total=self.total + 1), policy.backoff.delay(in_a_row, chance)


def run_failed(reason: DeathReason, payload: PayloadState, *, payload_failed: bool) -> bool:
    """Whether a run that nobody stopped failed.

    Args:
        reason: How it ended.
        payload: How far its payload had come.
        payload_failed: Whether the payload reported an error, or another exit code than 0.
    """
    match reason:
        case DeathReason.SHUTDOWN:
            in_order = payload in (PayloadState.STARTING, PayloadState.FINISHED)
        case DeathReason.REBOOT:
            in_order = payload is PayloadState.FINISHED
        case _:
            in_order = False
    return payload_failed or not in_order
