"""The transition table, without any I/O: every message in every phase, and properties over random lives."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmactor.actors.lifecycle import MAX_CONTROLS, Life, Phase, transition
from vmactor.actors.restart_policy import RestartPolicy, Restarts
from vmactor.actors.vocabulary import (
    Action,
    Answer,
    ArmHangup,
    AskToStop,
    BootBegins,
    BootWaits,
    Clear,
    ControlDone,
    Detach,
    DropControl,
    Finish,
    GuestReported,
    HangupExpired,
    KillRun,
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
from vmactor.cli.exit_codes import exit_code
from vmactor.errors import (
    IllegalArgumentError,
    IllegalStateError,
    InvalidPayloadTransitionError,
    MailboxFullError,
    NotStoppedError,
    StartFailedError,
    VmmError,
)
from vmactor.messages import (
    DeathReason,
    Died,
    ErrorCode,
    HungUp,
    MemoryTrimLevel,
    NotifyError,
    NotifyPayloadFinished,
    NotifyPayloadReady,
    NotifyPayloadStarted,
    PayloadState,
    Release,
    Removed,
    Restarting,
    RestartsExhausted,
    Resume,
    Start,
    Started,
    Stop,
    StopRung,
    Suspend,
    TrimMemory,
    VirtualMachineState,
    is_end,
)
from vmactor.request import Request
from vmactor.restarts import Backoff, Restart, RestartLimit

STARTED = GuestReported(1, NotifyPayloadStarted())
READY = GuestReported(1, NotifyPayloadReady())
FINISHED = GuestReported(1, NotifyPayloadFinished(3))
FAILED = GuestReported(1, NotifyError(ErrorCode.PAYLOAD_CHANGED, "changed"))
ENDED = RunEnded(1, DeathReason.SHUTDOWN, exit_code=0)
CRASHED = RunEnded(1, DeathReason.CRASH, exit_code=1)
KILLED = RunEnded(1, DeathReason.KILLED, signal=9)
PRESS = Stop(StopRung.POWER_BUTTON)
EXIT = Stop(StopRung.EXIT_REQUEST)

FRESH = Life(hangup_timeout=30.0)
STARTING = replace(FRESH, phase=Phase.STARTING, generation=1, starter="start")
RUNNING = replace(FRESH, phase=Phase.RUNNING, generation=1, pid=7)
DYING = replace(FRESH, phase=Phase.DYING, generation=1)
DEAD = replace(FRESH, phase=Phase.DEAD, generation=1)
POLICY = RestartPolicy(limit=RestartLimit(2, 60.0), backoff=Backoff(initial=1.0, jitter=0.0, stable=10.0))
RESTARTABLE = replace(RUNNING, restarts=Restarts(POLICY))
WAITING = replace(FRESH, phase=Phase.WAITING, generation=1, restart_delay=1.0, restarts=Restarts(POLICY, 1))
PHASES = {
    "not started": FRESH, "starting": STARTING, "running": RUNNING, "dying": DYING, "dead": DEAD,
    "restartable": RESTARTABLE, "waiting": WAITING,
}  # fmt: skip


def kinds(actions: list[Action]) -> list[str]:
    """Actions by name; events by their kind, refusals by their error."""
    names = []
    for action in actions:
        match action:
            case Publish(event):
                names.append(event.kind)
            case Refuse(_, error):
                names.append(type(error).__name__)
            case _:
                names.append(type(action).__name__)
    return names


TABLE: dict[tuple[str, str], list[str]] = {
    ("not started", "Start"): ["SpawnRun", "ArmHangup"],
    ("starting", "Start"): ["IllegalStateError"],
    ("running", "Start"): ["IllegalStateError"],
    ("dying", "Start"): ["IllegalStateError"],
    ("dead", "Start"): ["IllegalStateError"],
    ("not started", "Stop"): ["Answer"],
    ("starting", "Stop"): ["KillRun"],
    ("running", "Stop"): ["KillRun"],
    ("dying", "Stop"): [],
    ("dead", "Stop"): ["Answer"],
    ("not started", "Release"): ["Clear", "removed", "Answer", "Finish"],
    ("starting", "Release"): ["KillRun"],
    ("running", "Release"): ["KillRun"],
    ("dying", "Release"): [],
    ("dead", "Release"): ["Answer"],
    ("not started", "Suspend"): ["IllegalStateError"],
    ("starting", "Suspend"): ["IllegalStateError"],
    ("running", "Suspend"): ["RunControl"],
    ("dying", "Suspend"): ["IllegalStateError"],
    ("dead", "Suspend"): ["IllegalStateError"],
    ("not started", "Resume"): ["IllegalStateError"],
    ("starting", "Resume"): ["IllegalStateError"],
    ("running", "Resume"): ["RunControl"],
    ("dying", "Resume"): ["IllegalStateError"],
    ("dead", "Resume"): ["IllegalStateError"],
    ("not started", "GuestReported"): ["IllegalStateError"],
    ("starting", "GuestReported"): ["started", "Answer", "DisarmHangup", "payload_started", "Answer"],
    ("running", "GuestReported"): ["DisarmHangup", "payload_started", "Answer"],
    ("dying", "GuestReported"): ["IllegalStateError"],
    ("dead", "GuestReported"): ["IllegalStateError"],
    ("not started", "VmmRunning"): [],
    ("starting", "VmmRunning"): ["started", "Answer"],
    ("running", "VmmRunning"): [],
    ("dying", "VmmRunning"): [],
    ("dead", "VmmRunning"): [],
    ("not started", "VmmGone"): [],
    ("starting", "VmmGone"): ["DisarmHangup"],
    ("running", "VmmGone"): ["DisarmHangup"],
    ("dying", "VmmGone"): [],
    ("dead", "VmmGone"): [],
    ("not started", "RunEnded"): [],
    ("starting", "RunEnded"): ["DisarmHangup", "Clear", "died", "StartFailedError", "Finish"],
    ("running", "RunEnded"): ["DisarmHangup", "Clear", "died", "Finish"],
    ("dying", "RunEnded"): ["DisarmHangup", "Clear", "died", "Finish"],
    ("dead", "RunEnded"): [],
    ("not started", "HangupExpired"): [],
    ("starting", "HangupExpired"): ["hung_up", "KillRun"],
    ("running", "HangupExpired"): ["hung_up", "KillRun"],
    ("dying", "HangupExpired"): [],
    ("dead", "HangupExpired"): [],
    ("restartable", "Start"): ["IllegalStateError"],
    ("restartable", "Stop"): ["KillRun"],
    ("restartable", "Release"): ["KillRun"],
    ("restartable", "Suspend"): ["RunControl"],
    ("restartable", "Resume"): ["RunControl"],
    ("restartable", "GuestReported"): ["DisarmHangup", "payload_started", "Answer"],
    ("restartable", "VmmRunning"): [],
    ("restartable", "VmmGone"): ["DisarmHangup"],
    ("restartable", "RunEnded"): ["DisarmHangup", "Clear", "died", "Finish"],
    ("restartable", "RunFailed"): ["DisarmHangup", "EndRun", "died", "restarting", "ArmRestart"],
    ("restartable", "HangupExpired"): ["hung_up", "KillRun"],
    ("restartable", "RestartDue"): [],
    ("waiting", "Start"): ["IllegalStateError"],
    ("waiting", "Stop"): ["Clear", "died", "Answer", "Finish"],
    ("waiting", "Release"): ["Clear", "died", "Answer", "Finish"],
    ("waiting", "Suspend"): ["IllegalStateError"],
    ("waiting", "Resume"): ["IllegalStateError"],
    ("waiting", "GuestReported"): ["IllegalStateError"],
    ("waiting", "VmmRunning"): [],
    ("waiting", "VmmGone"): [],
    ("waiting", "RunEnded"): [],
    ("waiting", "RunFailed"): [],
    ("waiting", "HangupExpired"): [],
    ("waiting", "RestartDue"): ["SpawnRun", "ArmHangup"],
    ("not started", "RunFailed"): [],
    ("starting", "RunFailed"): ["DisarmHangup", "Clear", "died", "StartFailedError", "Finish"],
    ("running", "RunFailed"): ["DisarmHangup", "Clear", "died", "Finish"],
    ("dying", "RunFailed"): ["DisarmHangup", "Clear", "died", "Finish"],
    ("dead", "RunFailed"): [],
    ("not started", "RestartDue"): [],
    ("starting", "RestartDue"): [],
    ("running", "RestartDue"): [],
    ("dying", "RestartDue"): [],
    ("dead", "RestartDue"): [],
    ("not started", "PressPower"): ["Answer"],
    ("starting", "PressPower"): ["KillRun"],
    ("running", "PressPower"): ["AskToStop"],
    ("dying", "PressPower"): [],
    ("dead", "PressPower"): ["Answer"],
    ("restartable", "PressPower"): ["AskToStop"],
    ("waiting", "PressPower"): ["Clear", "died", "Answer", "Finish"],
    ("not started", "RequestExit"): ["Answer"],
    ("starting", "RequestExit"): ["KillRun"],
    ("running", "RequestExit"): ["AskToStop"],
    ("dying", "RequestExit"): [],
    ("dead", "RequestExit"): ["Answer"],
    ("restartable", "RequestExit"): ["AskToStop"],
    ("waiting", "RequestExit"): ["Clear", "died", "Answer", "Finish"],
    ("not started", "StopRefused"): [],
    ("starting", "StopRefused"): [],
    ("running", "StopRefused"): [],
    ("dying", "StopRefused"): [],
    ("dead", "StopRefused"): [],
    ("restartable", "StopRefused"): [],
    ("waiting", "StopRefused"): [],
    ("not started", "Unpaused"): [],
    ("starting", "Unpaused"): [],
    ("running", "Unpaused"): [],
    ("dying", "Unpaused"): [],
    ("dead", "Unpaused"): [],
    ("restartable", "Unpaused"): [],
    ("waiting", "Unpaused"): [],
    ("not started", "Detach"): ["Clear", "removed", "Answer", "Finish"],
    ("starting", "Detach"): ["KillRun"],  # there is no VMM yet
    ("running", "Detach"): ["DisarmHangup", "LetGo", "Answer"],
    ("dying", "Detach"): [],
    ("dead", "Detach"): ["Answer"],
    ("restartable", "Detach"): ["DisarmHangup", "LetGo", "Answer"],
    ("waiting", "Detach"): ["Clear", "died", "Answer", "Finish"],
}
MESSAGES: dict[str, Message] = {
    "Start": Start(),
    "Stop": Stop(),
    "PressPower": PRESS,
    "RequestExit": EXIT,
    "StopRefused": StopRefused(1, StopRung.POWER_BUTTON, VmmError("no button")),
    "Unpaused": Unpaused(1),
    "Release": Release(),
    "Suspend": Suspend(),
    "Resume": Resume(),
    "GuestReported": STARTED,
    "VmmRunning": VmmRunning(1),
    "VmmGone": VmmGone(1),
    "RunEnded": ENDED,
    "RunFailed": CRASHED,
    "HangupExpired": HangupExpired(1),
    "RestartDue": RestartDue(1),
    "Detach": Detach(),
}


def test_the_table_is_complete() -> None:
    assert set(TABLE) == {(phase, message) for phase in PHASES for message in MESSAGES}


@pytest.mark.parametrize(("phase", "message"), TABLE, ids=lambda value: value)
def test_what_a_message_does_in_a_phase(phase: str, message: str) -> None:
    before = PHASES[phase]
    after, actions = transition(before, MESSAGES[message], "reply")
    assert kinds(actions) == TABLE[phase, message]
    if not actions and message not in ("Stop", "Release", "Detach", "PressPower", "RequestExit"):
        assert replace(after, stale=0) == before


def play(*steps: Message | tuple[Message, str], life: Life = FRESH) -> tuple[Life, list[Action]]:
    """Feed messages one after the other; returns the last state and all actions."""
    done: list[Action] = []
    for step in steps:
        message, reply = step if isinstance(step, tuple) else (step, None)
        life, actions = transition(life, message, reply)
        done += actions
    return life, done


def test_a_manager_that_ends_refuses_what_a_kept_vm_was_asked_for_and_lets_nobody_wait() -> None:
    busy = replace(STARTING, pid=7)
    _, actions = play((Suspend(), "s"), (Detach(), "d"), life=replace(RUNNING, starter=None))
    assert kinds(actions) == ["RunControl", "DisarmHangup", "LetGo", "IllegalStateError", "Answer"]
    _, actions = play((Detach(), "d"), life=busy)
    assert kinds(actions) == ["DisarmHangup", "LetGo", "IllegalStateError", "Answer"]


@pytest.mark.parametrize("ending", [replace(RUNNING, stopping=True), replace(RUNNING, killed=True)])
def test_a_vm_that_is_to_end_is_not_left_to_the_next_manager(ending: Life) -> None:
    assert "LetGo" not in kinds(transition(ending, Detach(), "d")[1])


def test_a_whole_good_life_in_its_order() -> None:
    life, actions = play(
        (Start(), "s"),
        VmmSpawned(1, 7),
        VmmRunning(1),
        (STARTED, "a"),
        (READY, "b"),
        (FINISHED, "c"),
        VmmGone(1),
        ENDED,
    )
    assert kinds(actions) == [
        "SpawnRun", "ArmHangup", "started", "Answer", "DisarmHangup", "payload_started", "Answer",
        "payload_ready", "Answer", "payload_finished", "Answer", "DisarmHangup", "DisarmHangup", "Clear",
        "died", "Finish",
    ]  # fmt: skip
    assert life.phase is Phase.DEAD
    assert life.public_state is VirtualMachineState.DEAD


@pytest.mark.parametrize(
    ("payload", "public"),
    [
        (PayloadState.STARTING, 1),
        (PayloadState.STARTED, 2),
        (PayloadState.READY, 3),
        (PayloadState.FINISHED, 4),
        (PayloadState.HANGUP, 6),
    ],
)
def test_the_public_state_of_a_running_vm_is_that_of_its_payload(payload: PayloadState, public: int) -> None:
    assert replace(RUNNING, payload=payload).public_state == public


@pytest.mark.parametrize("payload", list(PayloadState))
@pytest.mark.parametrize(("phase", "public"), [(FRESH, 0), (DYING, 6), (DEAD, 6)])
def test_the_public_state_of_any_other_vm_is_not_its_payloads(
    payload: PayloadState, phase: Life, public: int
) -> None:
    assert replace(phase, payload=payload).public_state == public


REPORTS = {PayloadState.STARTED: STARTED, PayloadState.READY: READY, PayloadState.FINISHED: FINISHED}


@pytest.mark.parametrize("old", list(PayloadState))
@pytest.mark.parametrize("new", list(REPORTS))
def test_payload_states_only_move_forward_and_may_be_skipped(old: PayloadState, new: PayloadState) -> None:
    life, actions = transition(replace(RUNNING, payload=old), REPORTS[new], "r")
    if new > old:
        assert life.payload is new
        assert actions[-1] == Answer("r")
    else:
        assert life.payload is old
        (refusal,) = actions
        assert isinstance(refusal, Refuse)
        assert isinstance(refusal.error, InvalidPayloadTransitionError)
        assert str(refusal.error) == (
            f"Invalid payload state transition from {old.name.capitalize()} to {new.name.capitalize()}"
        )


def test_an_error_report_finishes_the_payload_so_a_later_finish_is_refused() -> None:
    life, actions = play(FAILED, (FINISHED, "late"), life=RUNNING)
    assert life.public_state is VirtualMachineState.FINISHED
    assert kinds(actions) == ["DisarmHangup", "error", "Answer", "InvalidPayloadTransitionError"]


def test_a_report_is_answered_only_after_its_event() -> None:
    _, actions = transition(RUNNING, READY, "r")
    assert kinds(actions) == ["DisarmHangup", "payload_ready", "Answer"]


FAILURES = [reason.name for reason in DeathReason if 7 <= reason <= 16]


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_text_names_the_reason_whatever_the_exit_status(name: str) -> None:
    _, actions = transition(DYING, replace(ENDED, failure=f"{name}|because of that"))
    assert _died(actions).reason is DeathReason[name]
    assert _died(actions).failure == f"{name}|because of that"


@pytest.mark.parametrize(
    "text", ["HANGUP\n", " HANGUP", "hangup", "KILLED", "SHUTDOWN", "WATCHDOG_REBOOT", "x|HANGUP", ""]
)
def test_a_text_that_is_not_exactly_a_failure_name_leaves_the_exit_status_in_charge(text: str) -> None:
    _, actions = transition(DYING, replace(ENDED, failure=text))
    assert _died(actions).reason is DeathReason.SHUTDOWN


def test_a_hung_up_vm_died_of_that_unless_the_guest_had_written_anything() -> None:
    hung = replace(DYING, payload=PayloadState.HANGUP)
    killed = RunEnded(1, DeathReason.KILLED, signal=9)
    assert _died(transition(hung, killed)[1]).reason is DeathReason.HANGUP
    assert _died(transition(hung, replace(killed, failure="oh"))[1]).reason is DeathReason.KILLED
    assert (
        _died(transition(hung, replace(killed, failure="MICRODROID_PAYLOAD_HAS_CHANGED"))[1]).reason
        is DeathReason.MICRODROID_PAYLOAD_HAS_CHANGED
    )


def _died(actions: list[Action]) -> Died:
    (died,) = [a.event for a in actions if isinstance(a, Publish) and isinstance(a.event, Died)]
    return died


def test_hang_up_detection_is_only_armed_where_it_is_on() -> None:
    assert kinds(transition(Life(), Start())[1]) == ["SpawnRun"]
    assert transition(FRESH, Start())[1] == [SpawnRun(1), ArmHangup(1)]


def test_a_payload_that_reported_does_not_hang_up() -> None:
    life, actions = transition(replace(RUNNING, payload=PayloadState.STARTED), HangupExpired(1))
    assert life.payload is PayloadState.STARTED
    assert actions == []


def test_a_suspended_vm_gets_its_whole_time_again() -> None:
    life, actions = transition(replace(RUNNING, suspended=True), HangupExpired(1))
    assert actions == []
    assert life.payload is PayloadState.STARTING


def test_the_hang_up_is_told_with_its_timeout_and_the_vm_is_killed() -> None:
    life, actions = transition(RUNNING, HangupExpired(1))
    assert actions == [Publish(HungUp(timeout=30.0)), KillRun()]
    assert life.public_state is VirtualMachineState.DEAD


def test_a_stop_while_starting_refuses_the_start_and_answers_the_stop_when_all_is_over() -> None:
    life, first = play((Start(), "start"), (Stop(), "stop"), VmmSpawned(1, 7))
    assert kinds(first) == ["SpawnRun", "ArmHangup", "KillRun", "KillRun"]
    assert life.public_state is VirtualMachineState.STARTING
    _, rest = play(VmmGone(1), RunEnded(1, DeathReason.KILLED, signal=9), life=life)
    assert kinds(rest) == [
        "DisarmHangup",
        "DisarmHangup",
        "Clear",
        "died",
        "IllegalStateError",
        "Answer",
        "Finish",
    ]
    assert Answer("stop") in rest


def test_every_stopper_is_answered_after_died() -> None:
    _, actions = play((Stop(), "a"), (Stop(), "b"), VmmGone(1), (Stop(), "c"), ENDED, life=RUNNING)
    died = next(i for i, a in enumerate(actions) if isinstance(a, Publish) and isinstance(a.event, Died))
    assert actions[died + 1 :] == [Answer("a"), Answer("b"), Answer("c"), Finish()]


def test_a_failed_start_tells_its_cause() -> None:
    _, actions = transition(
        STARTING, RunEnded(1, DeathReason.START_FAILED, exit_code=1, detail="no such kernel")
    )
    (refusal,) = [a for a in actions if isinstance(a, Refuse)]
    assert isinstance(refusal.error, StartFailedError)
    assert str(refusal.error) == "no such kernel"


def test_giving_back_a_vm_that_never_ran_removes_it_without_a_death() -> None:
    _, actions = transition(FRESH, Release(), "r")
    assert actions == [Clear(), Publish(Removed()), Answer("r"), Finish()]


def test_control_requests_are_carried_out_one_at_a_time_in_order() -> None:
    trim = TrimMemory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)
    life, actions = play((Suspend(), "a"), (trim, "b"), (Resume(), "c"), life=RUNNING)
    assert actions == [RunControl(1, Suspend())]
    life, actions = play(ControlDone(1, None), life=life)
    assert kinds(actions) == ["DisarmHangup", "suspended", "Answer", "RunControl"]
    assert life.suspended
    refused = VmmError("no")
    life, actions = play(ControlDone(1, refused), life=life)
    assert actions == [Refuse("b", refused), RunControl(1, Resume())]
    life, actions = play(ControlDone(1, None), life=life)
    assert kinds(actions) == ["ArmHangup", "resumed", "Answer"]
    assert not life.suspended


def test_suspending_twice_is_one_event() -> None:
    _, actions = play(
        (Suspend(), "a"), ControlDone(1, None), (Suspend(), "b"), ControlDone(1, None), life=RUNNING
    )
    assert kinds(actions).count("suspended") == 1
    assert Answer("b") in actions


def test_a_suspended_guest_is_not_asked_for_memory() -> None:
    trim = TrimMemory(MemoryTrimLevel.TRIM_MEMORY_RUNNING_LOW)
    assert kinds(transition(replace(RUNNING, suspended=True), trim, "r")[1]) == ["IllegalStateError"]


def test_waiting_control_requests_are_bounded() -> None:
    life = RUNNING
    for number in range(MAX_CONTROLS):
        life, _ = transition(life, Suspend(), number)
    _, (refusal,) = transition(life, Suspend(), "one too many")
    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, MailboxFullError)


def test_a_death_refuses_the_control_requests_that_wait() -> None:
    _, actions = play(
        (Suspend(), "a"), (Resume(), "b"), VmmGone(1), ENDED, ControlDone(1, None), life=RUNNING
    )
    refused = {a.reply for a in actions if isinstance(a, Refuse) and isinstance(a.error, IllegalStateError)}
    assert refused == {"a", "b"}


# -- Stopping gently -----------------------------------------------------------------------------------

POWER_BUTTON, EXIT_REQUEST, KILL = StopRung


@pytest.mark.parametrize(
    ("asked", "ended", "rung"),
    [
        ([], KILLED, None),  # from outside
        ([], ENDED, None),
        ([PRESS], ENDED, POWER_BUTTON),
        ([PRESS, EXIT], ENDED, EXIT_REQUEST),
        ([EXIT, PRESS], ENDED, EXIT_REQUEST),
        ([PRESS, EXIT, Stop()], KILLED, KILL),
        ([PRESS, EXIT, Stop()], ENDED, EXIT_REQUEST),  # before the kill came
        ([Stop()], ENDED, None),
        ([Stop()], KILLED, KILL),
        ([Release()], KILLED, KILL),
        ([Stop(), PRESS], KILLED, KILL),
        ([PRESS, StopRefused(1, POWER_BUTTON, VmmError("no"))], ENDED, None),
        ([PRESS, HangupExpired(1)], KILLED, None),
    ],
)
def test_a_death_tells_the_furthest_way_in_which_the_vm_was_stopped(
    asked: list[Message], ended: RunEnded, rung: StopRung | None
) -> None:
    assert _died(play(*asked, ended, life=RUNNING)[1]).stopped_by is rung


def test_only_those_who_asked_for_what_is_refused_are_told() -> None:
    no = VmmError("no button")
    life, actions = play(
        (PRESS, "a"), (EXIT, "b"), (PRESS, "c"), StopRefused(1, POWER_BUTTON, no), life=RUNNING
    )
    assert actions[-2:] == [Refuse("a", no), Refuse("c", no)]
    assert play(ENDED, life=life)[1][-2:] == [Answer("b"), Finish()]


def test_a_suspended_guest_is_resumed_before_its_power_button_is_pressed() -> None:
    life, actions = play((PRESS, "a"), life=replace(RUNNING, suspended=True))
    assert actions == [AskToStop(1, POWER_BUTTON, unpause=True)]
    life, actions = play(Unpaused(1), life=life)
    assert kinds(actions) == ["ArmHangup", "resumed"]
    assert not life.suspended


def test_a_suspension_under_way_is_given_up_for_the_power_button() -> None:
    life, actions = play((Suspend(), "a"), (Resume(), "b"), (PRESS, "c"), life=RUNNING)
    assert kinds(actions[1:3]) == ["IllegalStateError", "IllegalStateError"]
    assert actions[3:] == [DropControl(), AskToStop(1, POWER_BUTTON, unpause=True)]
    assert play(ControlDone(1, None), Unpaused(1), life=life)[1] == []


@pytest.mark.parametrize("asked", [PRESS, EXIT, Stop()])
def test_a_vm_that_is_being_stopped_cannot_be_suspended(asked: Message) -> None:
    assert kinds(play((asked, "a"), (Suspend(), "b"), life=RUNNING)[1])[1:] == ["IllegalStateError"]


def test_whoever_stops_a_vm_whose_process_survives_its_kill_is_told() -> None:
    _, actions = play((Stop(), "a"), replace(KILLED, survivors="its VMM (process 7)"), life=RUNNING)
    (refusal,) = [action for action in actions if isinstance(action, Refuse)]
    assert isinstance(refusal.error, NotStoppedError)


# -- Restarts ------------------------------------------------------------------------------------------


def crash(life: Life, at: float, lasted: float = 0.0) -> tuple[Life, list[Action]]:
    """A run that is up fails."""
    up = replace(life, phase=Phase.RUNNING)
    return transition(up, replace(CRASHED, generation=life.generation, at=at, lasted=lasted))


def test_a_failed_run_is_followed_by_the_next_generation_after_a_delay() -> None:
    life, actions = crash(RESTARTABLE, at=100.0)
    died, restarting = [action.event for action in actions if isinstance(action, Publish)]
    assert isinstance(died, Died)
    assert (died.generation, died.final) == (1, False)
    assert restarting == Restarting(delay=1.0, restarts=1)
    assert (life.phase, life.generation, life.payload) == (Phase.WAITING, 2, PayloadState.STARTING)
    assert life.public_state is VirtualMachineState.STARTING
    life, actions = transition(life, RestartDue(2))
    assert actions == [SpawnRun(2), ArmHangup(2)]
    assert life.restart_delay is None


def test_delays_grow_until_a_run_was_stable() -> None:
    life, delays = RESTARTABLE, []
    for at, lasted in (0.0, 1.0), (100.0, 1.0), (200.0, 1.0), (300.0, 10.0), (400.0, 9.9):
        life, _ = crash(life, at, lasted)
        delays.append(life.restart_delay)
    assert delays == [1.0, 2.0, 4.0, 1.0, 2.0]
    assert life.restarts.total == 5


def test_giving_up_is_told_before_the_last_death_of_the_same_generation() -> None:
    life, _ = crash(RESTARTABLE, at=0.0)
    life, _ = crash(life, at=30.0)
    assert life.phase is Phase.WAITING
    within, actions = crash(life, at=60.0)
    assert kinds(actions) == ["DisarmHangup", "Clear", "gave_up", "died", "Finish"]
    assert within.phase is Phase.DEAD
    assert Publish(RestartsExhausted(restarts=2, failures=3, period=60.0)) in actions
    assert _died(actions).final
    later, _ = crash(life, at=60.1)
    assert later.phase is Phase.WAITING


@pytest.mark.parametrize("asked", [Stop(), PRESS, EXIT, Release()])
@pytest.mark.parametrize("gone", [False, True])
def test_a_vm_that_somebody_stops_is_not_started_again(asked: Message, gone: bool) -> None:
    always = replace(RESTARTABLE, restarts=Restarts(RestartPolicy(when=Restart.PERMANENT)))
    steps: list[Any] = [VmmGone(1), (asked, "who")] if gone else [(asked, "who"), VmmGone(1)]
    life, actions = play(*steps, CRASHED, life=always)
    assert life.phase is Phase.DEAD
    assert kinds(actions)[-4:] == ["Clear", "died", "Answer", "Finish"]


def test_a_stop_while_a_restart_is_waited_for_ends_the_generation_that_waits() -> None:
    life, _ = crash(RESTARTABLE, at=0.0)
    dead, actions = transition(life, Stop(), "who")
    assert (dead.phase, dead.generation, dead.restart_delay) == (Phase.DEAD, 2, None)
    assert _died(actions).reason is DeathReason.KILLED
    assert _died(actions).final
    assert actions[-2:] == [Answer("who"), Finish()]


@pytest.mark.parametrize("when", [Restart.TRANSIENT, Restart.PERMANENT])
@pytest.mark.parametrize("payload", [None, "started", "ready", "finished", "failed", "error"])
@pytest.mark.parametrize("reason", [DeathReason.SHUTDOWN, DeathReason.REBOOT, DeathReason.KILLED])
def test_a_run_failed_where_the_command_line_would_say_so(
    when: Restart, payload: str | None, reason: DeathReason
) -> None:
    reports: dict[str | None, list[Message]] = {
        None: [], "started": [STARTED], "ready": [STARTED, READY], "failed": [FINISHED], "error": [FAILED],
        "finished": [GuestReported(1, NotifyPayloadFinished(0))],
    }  # fmt: skip
    up = replace(RUNNING, restarts=Restarts(RestartPolicy(when=when)))
    life, actions = play(*reports[payload], RunEnded(1, reason), life=up)
    events = [action.event for action in actions if isinstance(action, Publish)]
    failed = exit_code(event for event in events if not isinstance(event, Restarting)) != 0
    assert (life.phase is Phase.WAITING) == (failed or when is Restart.PERMANENT)


def test_what_never_came_up_is_not_started_again() -> None:
    life, actions = transition(replace(STARTING, restarts=Restarts(POLICY)), CRASHED)
    assert life.phase is Phase.DEAD
    assert "StartFailedError" in kinds(actions)


def test_a_restart_that_does_not_come_up_counts_as_a_failure() -> None:
    life, _ = crash(RESTARTABLE, at=0.0)
    life, _ = transition(life, RestartDue(2))
    life, _ = transition(life, RunEnded(2, DeathReason.START_FAILED, at=1.0))
    assert (life.phase, life.generation, life.restart_delay) == (Phase.WAITING, 3, 2.0)


def test_a_vm_of_which_a_process_lives_on_is_not_started_again() -> None:
    life, actions = transition(RESTARTABLE, replace(CRASHED, survivors="its VMM (process 7)"))
    assert life.phase is Phase.DEAD
    assert kinds(actions) == ["DisarmHangup", "Clear", "died", "Finish"]


def test_a_policy_that_never_restarts_is_refused() -> None:
    with pytest.raises(IllegalArgumentError):
        RestartPolicy(when=Restart.TEMPORARY)


@pytest.mark.parametrize("phase", PHASES)
def test_a_payloads_time_to_report_begins_when_its_turn_to_boot_has_come(phase: str) -> None:
    life = PHASES[phase]
    waits, first = transition(life, BootWaits(life.generation))
    begins, then = transition(waits, BootBegins(life.generation))
    assert begins == life
    if phase == "starting":
        assert waits == replace(life, queued=True)
        assert (kinds(first), kinds(then)) == (["DisarmHangup"], ["ArmHangup"])
        unwatched = transition(replace(life, hangup_timeout=None), BootWaits(1))
        assert unwatched == (replace(life, hangup_timeout=None, queued=True), [])
        ended, _ = transition(waits, ENDED)
        assert not ended.queued
    else:
        assert (waits, first, then) == (life, [], [])


STALE: list[Message] = [
    BootWaits(1),
    BootBegins(1),
    GuestReported(1, NotifyPayloadStarted()),
    VmmSpawned(1, 5),
    VmmRunning(1),
    VmmGone(1),
    RunEnded(1, DeathReason.CRASH),
    HangupExpired(1),
    ControlDone(1, None),
    RestartDue(1),
    StopRefused(1, StopRung.POWER_BUTTON, VmmError("no")),
    Unpaused(1),
]


@pytest.mark.parametrize("message", STALE, ids=lambda m: type(m).__name__)
def test_what_an_earlier_run_sends_is_ignored_and_counted(message: Message) -> None:
    second = replace(RUNNING, generation=2)
    life, actions = transition(second, message, "r")
    assert life == replace(second, stale=1)
    assert kinds(actions) == (["IllegalStateError"] if isinstance(message, GuestReported) else [])


def test_a_report_of_a_guest_proves_that_its_vmm_runs() -> None:
    life, actions = transition(replace(STARTING, pid=7), STARTED, "r")
    assert actions[:2] == [Publish(Started(pid=7)), Answer("start")]
    assert life.phase is Phase.RUNNING


GENERATIONS = st.sampled_from([0, 1, 1, 1, 2, 2, 3])
ANYTHING: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([Start(), Stop(), PRESS, EXIT, Release(), Suspend(), Resume()]),
    st.builds(StopRefused, GENERATIONS, st.sampled_from(StopRung), st.just(VmmError("no"))),
    st.builds(Unpaused, GENERATIONS),
    st.builds(BootWaits, GENERATIONS),
    st.builds(BootBegins, GENERATIONS),
    st.builds(VmmSpawned, GENERATIONS, st.just(7)),
    st.builds(VmmRunning, GENERATIONS),
    st.builds(VmmGone, GENERATIONS),
    st.builds(
        RunEnded,
        GENERATIONS,
        st.sampled_from(list(DeathReason)),
        failure=st.sampled_from(["", "HANGUP", "x"]),
    ),
    st.builds(HangupExpired, GENERATIONS),
    st.builds(RestartDue, GENERATIONS),
    st.builds(ControlDone, GENERATIONS, st.none() | st.just(VmmError("no"))),
    st.builds(
        GuestReported,
        GENERATIONS,
        st.sampled_from(
            [NotifyPayloadStarted(), NotifyPayloadReady(), NotifyPayloadFinished(0), FAILED.report]
        ),
    ),
)


@given(
    st.lists(ANYTHING, max_size=40),
    st.none() | st.just(30.0),
    st.sampled_from([None, POLICY, RestartPolicy(when=Restart.PERMANENT)]),
)
def test_no_order_of_messages_breaks_the_rules(
    messages: list[Message], hangup: float | None, policy: RestartPolicy | None
) -> None:
    life = Life(hangup, restarts=Restarts(policy))
    history: list[Action] = []
    generations: list[int] = []
    open_asks: set[int] = set()
    for number, message in enumerate(messages):
        before = life
        if isinstance(message, Request):
            open_asks.add(number)
        life, actions = transition(life, message, number)
        assert life.generation - before.generation in (0, 1)
        assert life.payload >= before.payload or life.generation > before.generation
        for action in actions:
            if isinstance(action, Answer | Refuse) and action.reply is not None:
                assert action.reply in open_asks, "answered twice, or never asked"
                open_asks.remove(action.reply)
            if isinstance(action, Publish):
                generations.append(action.event.generation or life.generation)
        history += actions
    names = kinds(history)
    events = [a.event for a in history if isinstance(a, Publish)]
    assert generations == sorted(generations)
    for generation in set(generations):
        of_it = [e for e, g in zip(events, generations, strict=True) if g == generation]
        assert not any(isinstance(event, Died | Removed) for event in of_it[:-1]), "died once, and last"
        assert generation == life.generation or isinstance(of_it[-1], Died)
        told = [event.kind for event in of_it if event.kind.startswith("payload")]
        order = ["payload_started", "payload_ready", "payload_finished"]
        assert told == sorted(set(told), key=order.index)
    assert names.count("Finish") == sum(map(is_end, events)) <= 1
    if any(map(is_end, events)):
        assert is_end(events[-1]), "the end is last"
        assert not open_asks, "whoever asked was answered before the end"
        assert life.phase is Phase.DEAD
    if "payload_started" in names:
        assert names.index("started") < names.index("payload_started")
