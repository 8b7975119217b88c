"""Mailboxes: order, room, deadlines, death, and every place at which a cancellation can strike."""

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from bench.bench_runtime import bytes_each, idle_actors, used_actors
from bench.runtime_peers import idle_anyio_tasks
from tests.virtual_time import VirtualTimeLoop
from vmactor.errors import (
    ActorDiedError,
    DeadlineExceededError,
    IllegalArgumentError,
    IllegalStateError,
    MailboxFullError,
)
from vmactor.mailbox import BURST, CONTROL_CAPACITY, Mailbox
from vmactor.request import Request

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Double(Request[int]):
    """Asks for twice a number."""

    number: int


def waiting(mailbox: Mailbox[Any]) -> int:
    """How many senders wait for room, as a person would see it."""
    return int(repr(mailbox).partition(" waiting to send")[0].rpartition(" ")[2])


async def received(mailbox: Mailbox[Any], count: int) -> list[Any]:
    return [(await mailbox.receive()).message for _ in range(count)]


# -- Order and room ----------------------------------------------------------------------------------


async def test_messages_arrive_in_the_order_in_which_they_were_told() -> None:
    mailbox: Mailbox[int] = Mailbox("actor")
    for number in range(10):
        await mailbox.tell(number)
    assert await received(mailbox, 10) == list(range(10))


async def test_control_messages_overtake_ordinary_ones_and_keep_their_own_order() -> None:
    mailbox: Mailbox[str] = Mailbox("actor")
    mailbox.tell_nowait("work")
    mailbox.control("stop")
    mailbox.control("kill")
    assert await received(mailbox, 3) == ["stop", "kill", "work"]


async def test_a_control_message_needs_no_room_among_ordinary_ones() -> None:
    mailbox: Mailbox[str] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait("work")
    mailbox.control("kill")
    assert (await mailbox.receive()).message == "kill"


async def test_the_control_lane_is_bounded_and_says_that_the_actor_is_stuck() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor")
    for number in range(CONTROL_CAPACITY):
        mailbox.control(number)
    with pytest.raises(MailboxFullError, match=r"actor .*stuck"):
        mailbox.control("one more")
    with pytest.raises(MailboxFullError):
        await mailbox.ask(Double(1), timeout=1, control=True)
    assert len(mailbox) == CONTROL_CAPACITY


async def test_telling_without_waiting_raises_when_there_is_no_room() -> None:
    mailbox: Mailbox[int] = Mailbox("actor", capacity=2)
    mailbox.tell_nowait(1)
    mailbox.tell_nowait(2)
    with pytest.raises(MailboxFullError, match=r"actor is full \(2\)"):
        mailbox.tell_nowait(3)
    assert await received(mailbox, 2) == [1, 2]


async def test_telling_waits_for_room_and_goes_on_when_there_is_some() -> None:
    mailbox: Mailbox[int] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait(1)
    told = anyio.Event()

    async def tell() -> None:
        await mailbox.tell(2)
        told.set()

    async with anyio.create_task_group() as tg:
        tg.start_soon(tell)
        await anyio.wait_all_tasks_blocked()
        assert not told.is_set()
        assert await received(mailbox, 1) == [1]
        await told.wait()
        assert await received(mailbox, 1) == [2]


async def test_nobody_overtakes_a_sender_that_waits_for_room() -> None:
    mailbox: Mailbox[str] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait("first")
    async with anyio.create_task_group() as tg:
        tg.start_soon(mailbox.tell, "waited")
        await anyio.wait_all_tasks_blocked()
        assert await received(mailbox, 1) == ["first"]
        with pytest.raises(
            MailboxFullError
        ):  # the room was given to the one that waited, before it even runs
            mailbox.tell_nowait("pushy")
        tg.start_soon(mailbox.tell, "later")
        await anyio.wait_all_tasks_blocked()
        assert await received(mailbox, 2) == ["waited", "later"]


async def test_a_sender_cancelled_while_it_waits_takes_its_message_back() -> None:
    mailbox: Mailbox[str] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait("first")
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope:
            tg.start_soon(mailbox.tell, "before")
            await anyio.wait_all_tasks_blocked()
            tg.start_soon(cancel_soon, scope)
            await mailbox.tell("cancelled")
        assert scope.cancelled_caught
        assert waiting(mailbox) == 1
        tg.start_soon(mailbox.tell, "after")
        await anyio.wait_all_tasks_blocked()
        assert await received(mailbox, 3) == ["first", "before", "after"]
        assert len(mailbox) == 0


async def cancel_soon(scope: anyio.CancelScope) -> None:
    await anyio.wait_all_tasks_blocked()
    scope.cancel()


async def test_room_made_in_the_moment_of_a_cancellation_is_not_lost() -> None:
    mailbox: Mailbox[str] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait("first")
    scope = anyio.CancelScope()
    told = False

    async def tell() -> None:
        nonlocal told
        with scope:
            await mailbox.tell("second")
            told = True

    async with anyio.create_task_group() as tg:
        tg.start_soon(tell)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()  # the sender has not run since
        assert await received(mailbox, 1) == ["first"]
        tg.start_soon(mailbox.tell, "third")
        await anyio.wait_all_tasks_blocked()
        assert not told
        # The message went in before its sender heard of the cancellation: the room is not lost.
        assert await received(mailbox, 2) == ["second", "third"]


async def test_many_cancelled_senders_leave_nothing_with_a_stuck_actor() -> None:
    mailbox: Mailbox[int] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait(0)
    async with anyio.create_task_group() as tg:
        for number in range(2000):
            tg.start_soon(mailbox.tell, number)
        await anyio.wait_all_tasks_blocked()
        assert waiting(mailbox) == 2000
        tg.cancel_scope.cancel()
    assert waiting(mailbox) == 0
    assert len(mailbox) == 1


def test_a_mailbox_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="one message"):
        Mailbox("actor", capacity=0)


async def test_what_is_going_on_can_be_read_from_the_representation() -> None:
    mailbox: Mailbox[int] = Mailbox("VM web-3", capacity=8)
    mailbox.tell_nowait(1)
    mailbox.control(2)
    assert repr(mailbox) == "<Mailbox VM web-3 1 control, 1/8 ordinary, 0 waiting to send>"
    mailbox.close("has given up")
    assert repr(mailbox).endswith("0 waiting to send, closed: has given up>")


# -- Asking ------------------------------------------------------------------------------------------


async def double(mailbox: Mailbox[Any], count: int = 1) -> None:
    """An actor that answers so many requests."""
    for _ in range(count):
        envelope = await mailbox.receive()
        mailbox.answer(envelope.reply, envelope.message.number * 2)


async def test_an_ask_returns_the_reply() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor")
    async with anyio.create_task_group() as tg:
        tg.start_soon(double, mailbox, 2)
        assert await mailbox.ask(Double(21), timeout=5) == 42
        assert await mailbox.ask(Double(4), timeout=5, control=True) == 8


async def test_an_ask_raises_what_the_actor_answered_as_its_error() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor")
    error = TimeoutError("the actor's own, not ours")

    async def refuse() -> None:
        mailbox.refuse((await mailbox.receive()).reply, error)

    async with anyio.create_task_group() as tg:
        tg.start_soon(refuse)
        with pytest.raises(TimeoutError) as caught:
            await mailbox.ask(Double(1), timeout=5)
    assert caught.value is error


async def test_only_the_first_answer_counts() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor")

    async def answer_thrice() -> None:
        reply = (await mailbox.receive()).reply
        mailbox.answer(reply, 1)
        mailbox.answer(reply, 2)
        mailbox.refuse(reply, RuntimeError("too late"))

    async with anyio.create_task_group() as tg:
        tg.start_soon(answer_thrice)
        assert await mailbox.ask(Double(1), timeout=5) == 1
    assert mailbox.late_replies == 0


async def test_a_message_that_was_told_expects_no_answer() -> None:
    mailbox: Mailbox[int] = Mailbox("actor")
    mailbox.tell_nowait(1)
    envelope = await mailbox.receive()
    assert envelope.reply is None
    mailbox.answer(envelope.reply, 2)
    mailbox.refuse(envelope.reply, RuntimeError())


@pytest.mark.virtual_time
async def test_an_ask_without_a_reply_ends_at_its_deadline_and_the_late_reply_is_counted_once() -> None:
    mailbox: Mailbox[Any] = Mailbox("web-3")
    start = anyio.current_time()
    with pytest.raises(DeadlineExceededError, match="web-3 gave no answer to Double in 7 s"):
        await mailbox.ask(Double(1), timeout=7)
    assert anyio.current_time() - start == pytest.approx(7)
    envelope = await mailbox.receive()  # the request was accepted, so it is still there
    assert envelope.message == Double(1)
    mailbox.answer(envelope.reply, 2)
    mailbox.answer(envelope.reply, 2)
    assert mailbox.late_replies == 1


@pytest.mark.virtual_time
async def test_the_deadline_of_an_ask_covers_the_wait_for_room_and_takes_the_request_back() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor", capacity=1)
    mailbox.tell_nowait("work")
    with pytest.raises(DeadlineExceededError):
        await mailbox.ask(Double(1), timeout=7)
    assert waiting(mailbox) == 0
    assert await received(mailbox, 1) == ["work"]
    assert len(mailbox) == 0


@pytest.mark.virtual_time
async def test_an_answer_at_the_deadline_is_the_reply_or_counts_as_late_but_never_vanishes() -> None:
    for _ in range(40):  # which of the two it is, is up to the loop
        mailbox: Mailbox[Any] = Mailbox("actor")
        replies: list[int] = []

        async def answer_at_ten(mailbox: Mailbox[Any] = mailbox) -> None:
            await anyio.sleep(10)
            mailbox.answer((await mailbox.receive()).reply, 1)

        async def ask(mailbox: Mailbox[Any] = mailbox, replies: list[int] = replies) -> None:
            with suppress(DeadlineExceededError):
                replies.append(await mailbox.ask(Double(1), timeout=10))

        async with anyio.create_task_group() as tg:
            tg.start_soon(answer_at_ten)
            tg.start_soon(ask)
        assert len(replies) + mailbox.late_replies == 1


async def test_a_cancelled_ask_is_abandoned_and_disturbs_nobody() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor")
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope:
            tg.start_soon(cancel_soon, scope)
            await mailbox.ask(Double(1), timeout=60)
        assert scope.cancelled_caught
        tg.start_soon(double, mailbox, 2)
        assert await mailbox.ask(Double(2), timeout=60) == 4
    assert mailbox.late_replies == 1


# -- Receiving ---------------------------------------------------------------------------------------


async def test_a_message_that_comes_in_the_moment_of_a_cancellation_waits_for_the_next_receive() -> None:
    mailbox: Mailbox[str] = Mailbox("actor")
    scope = anyio.CancelScope()
    taken = []

    async def receive() -> None:
        with scope:
            taken.append((await mailbox.receive()).message)

    for cancel_first in (True, False):
        scope = anyio.CancelScope()
        async with anyio.create_task_group() as tg:
            tg.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            if cancel_first:
                scope.cancel()
            mailbox.tell_nowait("precious")
            scope.cancel()
        if not taken:
            await receive_into(mailbox, taken)
        assert taken == ["precious"]
        taken.clear()


async def receive_into(mailbox: Mailbox[str], taken: list[str]) -> None:
    with anyio.fail_after(5):
        taken.append((await mailbox.receive()).message)


async def test_a_second_receiver_is_refused_instead_of_stealing_a_wake_up() -> None:
    mailbox: Mailbox[int] = Mailbox("actor")
    taken: list[Any] = []

    async def receive() -> None:
        taken.append((await mailbox.receive()).message)

    async with anyio.create_task_group() as tg:
        tg.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(IllegalStateError, match="actor"):
            await mailbox.receive()
        mailbox.tell_nowait(1)
    assert taken == [1]


async def test_an_actor_that_always_has_a_message_lets_others_run_and_can_be_cancelled() -> None:
    mailbox: Mailbox[str] = Mailbox("busy")
    taken = 0
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                scope.cancel()

            tg.start_soon(cancel)
            mailbox.control("again")
            while taken < 100 * BURST:
                await mailbox.receive()
                mailbox.control("again")
                taken += 1
    assert scope.cancelled_caught
    assert taken <= 3 * BURST


# -- Death -------------------------------------------------------------------------------------------


async def test_a_closed_mailbox_takes_nothing() -> None:
    mailbox: Mailbox[Any] = Mailbox("web-3")
    mailbox.close()
    with pytest.raises(ActorDiedError, match="web-3 has ended"):
        await mailbox.tell(1)
    with pytest.raises(ActorDiedError):
        mailbox.tell_nowait(1)
    with pytest.raises(ActorDiedError):
        mailbox.control(1)
    with pytest.raises(ActorDiedError):
        await mailbox.ask(Double(1), timeout=1)
    with pytest.raises(ActorDiedError):
        await mailbox.receive()


@pytest.mark.virtual_time
async def test_closing_ends_every_waiting_asker_sender_and_receiver() -> None:
    mailbox: Mailbox[Any] = Mailbox("web-3", capacity=1)
    died = []

    async def expect(name: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ActorDiedError, match="web-3 was removed"):
            await call()
        died.append(name)

    async with anyio.create_task_group() as tg:
        tg.start_soon(expect, "being worked on", lambda: mailbox.ask(Double(1), timeout=60))
        await anyio.wait_all_tasks_blocked()
        await mailbox.receive()
        tg.start_soon(expect, "accepted", lambda: mailbox.ask(Double(2), timeout=60))
        await anyio.wait_all_tasks_blocked()
        tg.start_soon(expect, "ask without room", lambda: mailbox.ask(Double(3), timeout=60))
        tg.start_soon(expect, "tell without room", lambda: mailbox.tell("more"))
        await anyio.wait_all_tasks_blocked()
        mailbox.control("stop")
        assert mailbox.close("was removed") == ["stop", Double(2)]
        assert mailbox.close("was removed again") == []
    assert set(died) == {"being worked on", "accepted", "ask without room", "tell without room"}
    assert len(mailbox) == 0


async def test_a_receiver_does_not_wait_on_a_mailbox_that_somebody_else_closes() -> None:
    mailbox: Mailbox[int] = Mailbox("actor")

    async def close() -> None:
        await anyio.wait_all_tasks_blocked()
        mailbox.close()

    async with anyio.create_task_group() as tg:
        tg.start_soon(close)
        with pytest.raises(ActorDiedError):
            await mailbox.receive()


async def test_an_answer_after_the_death_changes_nothing() -> None:
    mailbox: Mailbox[Any] = Mailbox("actor")

    async def die_then_answer() -> None:
        envelope = await mailbox.receive()
        mailbox.close()
        mailbox.answer(envelope.reply, 1)

    async with anyio.create_task_group() as tg:
        tg.start_soon(die_then_answer)
        with pytest.raises(ActorDiedError):
            await mailbox.ask(Double(1), timeout=5)


# -- Idle actors -------------------------------------------------------------------------------------


async def seconds_to_next_wake_up(backend: str) -> float:
    """When the loop will wake up by itself, infinity if nothing is planned."""
    await anyio.wait_all_tasks_blocked()
    if backend == "trio":
        return trio.lowlevel.current_statistics().seconds_to_next_deadline
    timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return min((timer.when() for timer in timers if not timer.cancelled()), default=math.inf)


@pytest.mark.virtual_time
async def test_an_idle_actor_never_wakes_up(anyio_backend_name: str) -> None:
    async with anyio.create_task_group() as tg:
        for _ in range(10):
            tg.start_soon(double, Mailbox[Any]("actor"))
        assert await seconds_to_next_wake_up(anyio_backend_name) == math.inf
        tg.cancel_scope.cancel()


@pytest.mark.virtual_time
async def test_an_actor_that_was_used_wakes_up_once_at_most_and_never_again(anyio_backend_name: str) -> None:
    mailbox: Mailbox[Any] = Mailbox("actor", capacity=1)
    async with anyio.create_task_group() as tg:
        tg.start_soon(double, mailbox, 200)
        for number in range(100):
            assert await mailbox.ask(Double(number), timeout=60, control=bool(number % 2)) == number * 2
        if anyio_backend_name == "asyncio":
            assert len(asyncio.get_running_loop()._scheduled) == 1  # type: ignore[attr-defined]
        await anyio.sleep(60)
        assert await seconds_to_next_wake_up(anyio_backend_name) == math.inf
        assert await mailbox.ask(Double(1), timeout=60) == 2
        tg.cancel_scope.cancel()


async def test_a_deadline_that_is_no_number_is_refused_and_upsets_no_other() -> None:
    mailbox: Mailbox[Double] = Mailbox("actor")
    with pytest.raises(IllegalArgumentError, match="infinity"):
        await mailbox.ask(Double(1), timeout=math.nan)
    assert len(mailbox) == 0


@pytest.mark.virtual_time
async def test_askers_with_different_deadlines_all_end_at_their_own() -> None:
    mailbox: Mailbox[Any] = Mailbox("stuck", capacity=2)
    ended: list[tuple[float, float]] = []
    began = anyio.current_time()

    async def ask(timeout: float) -> None:
        with pytest.raises(DeadlineExceededError):
            await mailbox.ask(Double(1), timeout=timeout)
        ended.append((timeout, round(anyio.current_time() - began, 3)))

    async with anyio.create_task_group() as tg:
        for timeout in (60, 5, 30, 5, 0.5, 0, 7200):
            tg.start_soon(ask, timeout)
        await anyio.wait_all_tasks_blocked()
        assert len(mailbox) == 2
    assert sorted(ended) == [(timeout, timeout) for timeout in (0, 0.5, 5, 5, 30, 60, 7200)]
    assert waiting(mailbox) == 0


async def test_an_actor_costs_little_and_keeps_little_of_what_it_did() -> None:
    """The aim is 4 KiB with everything; what comes on top of anyio's task is what we answer for."""
    task = await bytes_each(idle_anyio_tasks)
    assert await bytes_each(idle_actors) - task < 1024
    assert await bytes_each(used_actors) - task < 2560


# -- Against a model ---------------------------------------------------------------------------------

Operation = tuple[str, int]
operations = st.lists(
    st.tuples(
        st.sampled_from(["tell", "tell", "nowait", "control", "receive", "receive", "cancel"]),
        st.integers(0, 5),
    ),
    max_size=40,
)
LOOPS = [
    ("asyncio", lambda: {"loop_factory": VirtualTimeLoop}),
    ("trio", lambda: {"clock": MockClock(autojump_threshold=0)}),
]


class Model:
    """Two queues and a line of waiting senders, as plainly as they can be written."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.control: deque[int] = deque()
        self.ordinary: deque[int] = deque()
        self.line: list[int] = []

    def receive(self) -> int:
        if self.control:
            return self.control.popleft()
        message = self.ordinary.popleft()
        if self.line:
            self.ordinary.append(self.line.pop(0))
        return message


@pytest.mark.parametrize(("backend", "options"), LOOPS, ids=["asyncio", "trio"])
@settings(deadline=None, max_examples=60)
@given(capacity=st.integers(1, 3), steps=operations)
def test_any_order_of_sending_receiving_and_cancelling_agrees_with_a_model(
    backend: str, options: Callable[[], dict[str, Any]], capacity: int, steps: list[Operation]
) -> None:
    anyio.run(check_against_model, capacity, steps, backend=backend, backend_options=options())


async def check_against_model(capacity: int, steps: list[Operation]) -> None:
    mailbox: Mailbox[int] = Mailbox("actor", capacity)
    model = Model(capacity)
    scopes: dict[int, anyio.CancelScope] = {}
    refused: list[int] = []

    async def tell(message: int) -> None:
        try:
            with scopes[message]:
                await mailbox.tell(message)
        except ActorDiedError:
            refused.append(message)

    async with anyio.create_task_group() as tg:
        for message, (kind, pick) in enumerate(steps):
            match kind:
                case "tell":
                    scopes[message] = anyio.CancelScope()
                    tg.start_soon(tell, message)
                    full = len(model.ordinary) == capacity
                    (model.line if full else model.ordinary).append(message)
                case "nowait" if len(model.ordinary) < capacity:
                    mailbox.tell_nowait(message)
                    model.ordinary.append(message)
                case "nowait":
                    with pytest.raises(MailboxFullError):
                        mailbox.tell_nowait(message)
                case "control":
                    mailbox.control(message)
                    model.control.append(message)
                case "receive" if model.control or model.ordinary:
                    assert (await mailbox.receive()).message == model.receive()
                case "cancel" if model.line:
                    scopes[model.line.pop(pick % len(model.line))].cancel()
            await anyio.wait_all_tasks_blocked()
            assert waiting(mailbox) == len(model.line)
            assert len(mailbox) == len(model.control) + len(model.ordinary)
        assert mailbox.close() == [*model.control, *model.ordinary]
    assert sorted(refused) == model.line
