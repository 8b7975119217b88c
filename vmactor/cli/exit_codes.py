"""What an exit status of ``vmactor`` says; the one place where that is decided.

Statuses are part of the interface, documented in docs/cli.md. Those of a VM's life follow from its events
alone; the rules are those of ``exit_code``, the first that fits counts:

==  ===================  ===============================================================================
11  GUEST_ERROR          the guest reported an error instead of running its payload
10  PAYLOAD_FAILED       the payload finished with another code than 0
14  HANG_UP              the VM was killed because its payload did not report its start in time
13  START_FAILED         the VMM did not come up
0   OK                   the payload finished with 0 and the guest shut down or rebooted
0   OK                   the guest shut down and never reported anything of a payload
12  ABNORMAL_DEATH       every other end
==  ===================  ===============================================================================

Why so: what the guest said of its payload is more exact than any death reason, so a failure that it reported
is never hidden by how the VM ended afterwards. A reported success is only one if the VM ended in order, too:
a crash right after "finished with 0" may have cost the data that the payload wrote. A reboot ends a run in
order as well (guests without a power-off end that way), but only after the payload has finished. A payload
that started and was never heard of again has no result, however politely its guest shut down.

Signals and a reader that went away come on top: whoever ended the VM from outside knows best why.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Final

import vmactor  # its words come on use, so that ``--version`` does not wait for them


class ExitCode(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    PAYLOAD_FAILED = 10
    GUEST_ERROR = 11
    ABNORMAL_DEATH = 12
    START_FAILED = 13
    HANG_UP = 14
    HUNG_UP_ON = 129
    INTERRUPTED = 130
    READER_GONE = 141
    TERMINATED = 143


MEANINGS: Final = {
    ExitCode.OK: "the payload finished with 0, or the guest shut down and never reported a payload",
    ExitCode.ERROR: "wrong configuration, unknown VM, or an internal error",
    ExitCode.USAGE: "the command line cannot be understood",
    ExitCode.PAYLOAD_FAILED: "the payload finished with another exit code than 0",
    ExitCode.GUEST_ERROR: "the guest reported an error",
    ExitCode.ABNORMAL_DEATH: "the VM crashed, rebooted, was killed, or ended before its payload had",
    ExitCode.START_FAILED: "the VMM did not come up",
    ExitCode.HANG_UP: "the payload did not report its start in time",
    ExitCode.HUNG_UP_ON: "SIGHUP, the terminal went away; the VM was stopped",
    ExitCode.INTERRUPTED: "SIGINT, Ctrl-C; the VM was stopped",
    ExitCode.READER_GONE: "nobody reads standard output any more; the VM was stopped",
    ExitCode.TERMINATED: "SIGTERM; the VM was stopped",
}
"""A sentence for each, as ``vmactor --help`` and docs/cli.md have it."""


def exit_code(events: "Iterable[vmactor.Event]") -> ExitCode:
    """The exit status that one VM's life deserves.

    Args:
        events: Its events in order; a life without ``died`` is a fault of ours. Of a VM that was started
            again, the last run counts.
    """
    reported = False
    finished: int | None = None
    error = False
    reason: vmactor.DeathReason | None = None
    for event in events:
        match event:
            case vmactor.Restarting():
                reported, finished, error, reason = False, None, False, None
            case vmactor.PayloadStarted() | vmactor.PayloadReady():
                reported = True
            case vmactor.PayloadFinished(exit_code=code):
                reported, finished = True, code
            case vmactor.PayloadError():
                reported = error = True
            case vmactor.Died():
                reason = event.reason
    return _verdict(reported, finished, error, reason)


def _verdict(  # noqa: PLR0911 - a table
    reported: bool, finished: int | None, error: bool, reason: "vmactor.DeathReason | None"
) -> ExitCode:
    if error:
        return ExitCode.GUEST_ERROR
    if finished:
        return ExitCode.PAYLOAD_FAILED
    match reason:
        case None:
            return ExitCode.ERROR
        case vmactor.DeathReason.HANGUP:
            return ExitCode.HANG_UP
        case vmactor.DeathReason.START_FAILED:
            return ExitCode.START_FAILED
        case vmactor.DeathReason.SHUTDOWN if finished == 0 or not reported:
            return ExitCode.OK
        case vmactor.DeathReason.REBOOT if finished == 0:
            return ExitCode.OK
    return ExitCode.ABNORMAL_DEATH
