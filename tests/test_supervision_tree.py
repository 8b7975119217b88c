"""What ``Supervisor.tree`` tells: states, restarts, errors, uptimes, details, and supervisors below."""

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import asdict

import anyio
import pytest
from anyio.abc import TaskStatus

from tests.kids import Kid
from vmactor.mailbox import Mailbox
from vmactor.supervision_tree import ChildState, Detail
from vmactor.supervisor import Backoff, ChildRun, Decision, Restart, RestartLimit, Supervisor

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


def branch(name: str, *kids: Kid) -> ChildRun:
    """A child that runs a supervisor."""

    async def run(*, task_status: TaskStatus[None]) -> None:
        async with Supervisor(name) as supervisor:
            for kid in kids:
                await supervisor.start(kid.name, kid)
            task_status.started()
            await anyio.sleep_forever()

    return run


async def test_the_tree_counts_children_in_each_state() -> None:
    log: list[str] = []
    async with (
        Supervisor("house", limit=RestartLimit(5, 5), backoff=Backoff(100, 100)) as supervisor,
        anyio.create_task_group() as tg,
    ):
        kids = {name: Kid(log, name) for name in ("running", "stopping", "restarting", "stopped")}
        for name, kid in kids.items():
            await supervisor.start(
                name, kid, restart=Restart.PERMANENT, ask_to_stop=lambda: None, shutdown=10
            )
        kids["restarting"].fail()
        kids["stopped"].finish()
        await anyio.sleep(1)
        await supervisor.stop("stopped")
        tg.start_soon(supervisor.stop, "stopping")
        tg.start_soon(supervisor.start, "starting", Kid(log, "starting", ["hang"]))
        await anyio.sleep(1)
        tree = supervisor.tree()
        assert {child.name: child.state for child in tree.children} == {
            state.value: state for state in ChildState
        }
        assert dict(tree.counts) == dict.fromkeys(ChildState, 1)
        assert {child.name for child in tree.children if child.uptime is not None} == {"running", "stopping"}
        kids["stopping"].finish()
        tg.cancel_scope.cancel()


async def test_the_tree_tells_restarts_errors_and_uptimes() -> None:
    log: list[str] = []
    async with Supervisor("house", limit=RestartLimit(7, 60)) as supervisor:
        await anyio.sleep(3)
        kid = Kid(log, "a")
        await supervisor.start("a", kid, restart=Restart.TRANSIENT)
        for _ in range(2):
            await anyio.sleep(4)
            kid.fail()
        await anyio.sleep(5)
        tree = supervisor.tree()
        assert (tree.name, tree.intensity, tree.period) == ("house", 7, 60)
        assert tree.uptime == pytest.approx(16)
        assert (tree.failures, tree.last_error) == (2, "a: OSError: a fell")
        [child] = tree.children
        assert (child.name, child.restart, child.restarts) == ("a", Restart.TRANSIENT, 2)
        assert child.uptime == pytest.approx(5)
        assert child.last_error == "OSError: a fell"


async def test_an_actor_tells_of_itself_and_a_fault_in_that_harms_nobody() -> None:
    mailbox: Mailbox[int] = Mailbox("a", capacity=2)
    mailbox.tell_nowait(1)
    mailbox.control(2)
    log: list[str] = []

    def broken() -> Mapping[str, Detail]:
        raise LookupError("no idea")

    async with Supervisor("house") as supervisor, anyio.create_task_group() as tg:
        mailbox.tell_nowait(3)
        tg.start_soon(mailbox.tell, 4)
        await supervisor.start("a", Kid(log, "a"), details=mailbox.details)
        await supervisor.start("b", Kid(log, "b"), details=broken)
        odd: Mapping[str, Detail] = {"what": Kid}  # type: ignore[dict-item]
        await supervisor.start("c", Kid(log, "c"), details=lambda: odd)
        await anyio.sleep(1)
        a, b, c = supervisor.tree().children
        assert a.details == {"ordinary": 2, "capacity": 2, "control": 1, "senders": 1, "late_replies": 0}
        assert b.details == {"error": "LookupError: no idea"}
        assert c.details == {"what": repr(Kid)}
        tg.cancel_scope.cancel()


async def test_supervisors_below_announce_themselves_and_go_when_they_end() -> None:
    log: list[str] = []
    leaf = Kid(log, "leaf")

    async def two(*, task_status: TaskStatus[None]) -> None:
        async with AsyncExitStack() as stack:
            for name in ("first", "second"):
                await stack.enter_async_context(Supervisor(name))
            task_status.started()
            await anyio.sleep_forever()

    async def deep(*, task_status: TaskStatus[None]) -> None:
        await branch("deep", Kid(log, "x"))(task_status=task_status)

    async def in_a_task_of_its_own(*, task_status: TaskStatus[None]) -> None:
        async with anyio.create_task_group() as tg:
            await tg.start(deep)
            task_status.started()

    async with Supervisor("house", lambda _: Decision.IGNORE) as supervisor:
        await supervisor.start("branch", branch("inner", leaf))
        await supervisor.start("two", two)
        await supervisor.start("indirect", in_a_task_of_its_own)

        def drawn() -> list[str]:
            return ["  " * depth + node.name for depth, node in supervisor.tree().walk()]

        assert drawn() == [
            "house",
            "  branch",
            "    inner",
            "      leaf",
            "  two",
            "    first",
            "    second",
            "  indirect",
            "    deep",
            "      x",
        ]
        await supervisor.stop("two")
        leaf.fail()
        await anyio.sleep(1)
        assert drawn() == ["house", "  indirect", "    deep", "      x"]


async def test_a_supervisor_that_ended_within_a_living_child_is_not_in_the_tree() -> None:
    async def run(*, task_status: TaskStatus[None]) -> None:
        async with Supervisor("short"):
            pass
        task_status.started()
        await anyio.sleep_forever()

    async with Supervisor("house") as supervisor:
        await supervisor.start("a", run)
        assert supervisor.tree().children[0].supervisors == ()


async def test_the_tree_is_ready_for_json() -> None:
    log: list[str] = []
    async with Supervisor("house") as supervisor:
        await supervisor.start("branch", branch("inner", Kid(log, "leaf")))
        record = asdict(supervisor.tree())
    assert json.loads(json.dumps(record))["name"] == "house"
    assert record["strategy"] == "one_for_one"
    [child] = record["children"]
    assert (child["state"], child["restart"]) == ("running", "temporary")
    assert child["supervisors"][0]["children"][0]["name"] == "leaf"


async def test_a_detail_that_cannot_be_shown_leaves_the_rest_of_the_tree_to_be_seen() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    async with Supervisor("house") as supervisor:
        for name, told in [("a", {"what": Mute()}), ("b", {"depth": 3})]:
            await supervisor.start(name, Kid([], name), details=lambda told=told: told)  # type: ignore[misc]
        a, b = supervisor.tree().children
        assert a.details == {"error": "RuntimeError: no words"}
        assert b.details == {"depth": 3}


async def test_an_error_is_kept_as_short_text_and_one_that_has_none_does_no_harm() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    errors = iter([MuteError(), ValueError("long " * 1000)])

    async def child(*, task_status: TaskStatus[None]) -> None:
        task_status.started()
        await anyio.sleep(1)
        raise next(errors)

    async with Supervisor("house", limit=RestartLimit(5, 5)) as supervisor:
        await supervisor.start("a", child, restart=Restart.PERMANENT)
        await anyio.sleep(1.5)
        assert supervisor.tree().children[0].last_error == "MuteError: (it has no text)"
        await anyio.sleep(1)
        assert len(supervisor.tree().children[0].last_error or "") == 500
        await supervisor.stop("a")


async def test_a_tree_can_be_read_before_and_after() -> None:
    supervisor = Supervisor("house")
    assert supervisor.tree().uptime == 0
    async with supervisor:
        await supervisor.start("a", Kid([], "a"))
    assert supervisor.tree().children == ()
