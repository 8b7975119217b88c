"""The exit status of a VM's life follows from its events, by one table."""

import pytest

from vmactor.cli.exit_codes import MEANINGS, ExitCode, exit_code
from vmactor.messages import (
    Created,
    DeathReason,
    Died,
    ErrorCode,
    Event,
    Gap,
    HungUp,
    PayloadError,
    PayloadFinished,
    PayloadReady,
    PayloadStarted,
    Removed,
    Restarting,
    Started,
)

UP = [Created(), Started(pid=1)]
READY = [*UP, PayloadStarted(), PayloadReady()]
ERROR = PayloadError(error_code=ErrorCode.PAYLOAD_CHANGED, message="")


def finished(code: int) -> Event:
    return PayloadFinished(exit_code=code)


def died(reason: str) -> Event:
    return Died(reason=DeathReason[reason])


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([*READY, finished(0), died("SHUTDOWN")], 0),
        ([*UP, died("SHUTDOWN")], 0),
        ([*READY, finished(0), died("REBOOT")], 0),
        ([*READY, Gap(missed=3), finished(0), died("SHUTDOWN")], 0),
        ([*READY, finished(3), died("SHUTDOWN")], 10),
        ([*READY, finished(-1), died("SHUTDOWN")], 10),
        ([*READY, finished(3), died("CRASH")], 10),
        ([*READY, finished(3), died("KILLED")], 10),
        ([*UP, ERROR, died("MICRODROID_PAYLOAD_HAS_CHANGED")], 11),
        ([*UP, ERROR, died("SHUTDOWN")], 11),
        ([*READY, ERROR, died("CRASH")], 11),
        ([*READY, finished(0), died("CRASH")], 12),
        ([*READY, finished(0), died("KILLED")], 12),
        ([*READY, finished(0), died("INFRASTRUCTURE_ERROR")], 12),
        ([*READY, died("SHUTDOWN")], 12),
        ([*UP, PayloadStarted(), died("SHUTDOWN")], 12),
        ([*UP, died("REBOOT")], 12),
        ([*READY, died("REBOOT")], 12),
        ([*UP, died("CRASH")], 12),
        ([*UP, died("KILLED")], 12),
        ([*UP, died("WATCHDOG_REBOOT")], 12),
        ([*UP, died("UNKNOWN")], 12),
        ([Created(), died("START_FAILED")], 13),
        ([*READY, finished(0), died("START_FAILED")], 13),
        ([*UP, HungUp(timeout=30), died("HANGUP")], 14),
        ([*READY, ERROR, died("CRASH"), Restarting(), Started(), died("SHUTDOWN")], 0),
        ([*READY, finished(0), died("SHUTDOWN"), Restarting(), Started(), died("CRASH")], 12),
        ([Created(), Removed()], 1),
        ([], 1),
    ],
)
def test_each_kind_of_life_has_its_exit_status(events: list[Event], expected: int) -> None:
    assert exit_code(events) == expected


@pytest.mark.parametrize("reason", DeathReason)
def test_a_vm_that_ended_without_any_report_is_a_success_only_if_it_shut_down(reason: DeathReason) -> None:
    expected = {
        DeathReason.SHUTDOWN: ExitCode.OK,
        DeathReason.START_FAILED: ExitCode.START_FAILED,
        DeathReason.HANGUP: ExitCode.HANG_UP,
    }.get(reason, ExitCode.ABNORMAL_DEATH)
    assert exit_code([*UP, Died(reason=reason)]) is expected


def test_every_exit_status_has_a_meaning() -> None:
    assert set(MEANINGS) == set(ExitCode)
