"""The QMP client against a peer that follows a script, good or bad; real sockets, every event loop."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.qmp_peer import GREETING, QmpPeer, connected
from vmactor.errors import DeadlineExceededError, VmmError
from vmactor.vmm import qmp
from vmactor.vmm.qmp import QmpClient, QmpError

pytestmark = pytest.mark.anyio

LONG = 60.0
"""A deadline that no passing test reaches."""
SHORT = 0.05
"""A deadline that is waited for in full."""

Events = list[tuple[str, dict[str, Any]]]


@asynccontextmanager
async def negotiated(directory: Path) -> AsyncIterator[tuple[QmpClient, QmpPeer, Events]]:
    """A client that has been greeted, its peer, and the events so far."""
    events: Events = []
    async with connected(directory) as (stream, peer), anyio.create_task_group() as tasks:
        client = QmpClient(stream, lambda name, data: events.append((name, data)))
        tasks.start_soon(peer.greet)
        await client.negotiate(timeout=LONG)
        yield client, peer, events
        await client.aclose()


async def test_greets_and_answers_a_command_with_arguments(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:
        heard = []

        async def script() -> None:
            heard.append(await peer.expect("balloon", {"fine": True}))

        tasks.start_soon(script)
        assert await client.execute("balloon", {"value": 5}, timeout=LONG) == {"fine": True}
    assert heard == [{"value": 5}]
    assert client.greeting == GREETING["QMP"]


async def test_concurrent_requests_get_their_own_answers_in_any_order(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:
        got = {}

        async def ask(command: str) -> None:
            got[command] = await client.execute(command, timeout=LONG)

        names = [f"query-{n}" for n in range(20)]
        for name in names:
            tasks.start_soon(ask, name)
        requests = [await peer.hear() for _ in names]
        for request in reversed(requests):
            await peer.say({"return": request["execute"].upper(), "id": request["id"]})
    assert got == {name: name.upper() for name in names}


async def test_a_cancelled_reader_hands_over_to_the_next_waiter(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:
        first = anyio.CancelScope()

        async def reader() -> None:
            with first:
                await client.execute("query-first", timeout=LONG)

        answers = []

        async def follower() -> None:
            answers.append(await client.execute("query-second", timeout=LONG))

        tasks.start_soon(reader)
        one = await peer.hear()
        tasks.start_soon(follower)
        two = await peer.hear()
        first.cancel()
        await anyio.wait_all_tasks_blocked()
        await peer.say({"return": 1, "id": one["id"]}, {"return": 2, "id": two["id"]})
    assert answers == [2]
    assert client.late == 1


async def test_events_arrive_in_order_between_answers(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, events), anyio.create_task_group() as tasks:

        async def script() -> None:
            await peer.event("STOP")
            await peer.expect("stop")
            await peer.event("SHUTDOWN", guest=True, reason="guest-shutdown")
            await peer.stream.aclose()

        tasks.start_soon(script)
        await client.execute("stop", timeout=LONG)
        await client.read_to_end()
        assert events == [("STOP", {}), ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]


async def test_a_refusal_is_typed_and_leaves_the_connection_usable(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:

        async def script() -> None:
            number = (await peer.hear())["id"]
            await peer.say({"error": {"class": "DeviceNotActive", "desc": "No balloon"}, "id": number})
            await peer.expect("cont")

        tasks.start_soon(script)
        with pytest.raises(QmpError, match="refused balloon: No balloon") as caught:
            await client.execute("balloon", timeout=LONG)
        assert caught.value.error_class == "DeviceNotActive"
        assert await client.execute("cont", timeout=LONG) == {}


async def test_a_silent_peer_ends_in_a_deadline_and_its_late_answer_is_counted(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:
        with pytest.raises(DeadlineExceededError, match=r"did not answer stop within 0\.05 s"):
            await client.execute("stop", timeout=SHORT)

        async def script() -> None:
            number = (await peer.hear())["id"]
            await peer.say({"return": {}, "id": number})
            await peer.expect("cont", "second")

        tasks.start_soon(script)
        assert await client.execute("cont", timeout=LONG) == "second"
        assert client.late == 1


async def test_unanswered_requests_are_bounded(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _):
        async with anyio.create_task_group() as tasks:
            for _ in range(qmp.MAX_UNANSWERED):
                tasks.start_soon(client.execute, "stop")
            for _ in range(qmp.MAX_UNANSWERED):
                await peer.hear()
            tasks.cancel_scope.cancel()
        with pytest.raises(VmmError, match="64 requests without an answer"):
            await client.execute("stop", timeout=LONG)


async def test_a_peer_that_never_greets_ends_in_a_deadline_that_can_be_tried_again(short_dir: Path) -> None:
    async with connected(short_dir) as (stream, peer), anyio.create_task_group() as tasks:
        client = QmpClient(stream, lambda _name, _data: None)
        with pytest.raises(DeadlineExceededError, match="did not greet"):
            await client.negotiate(timeout=SHORT)
        await peer.say(GREETING)
        with pytest.raises(DeadlineExceededError):
            await client.negotiate(timeout=SHORT)
        tasks.start_soon(peer.expect, "qmp_capabilities")
        await client.negotiate(timeout=LONG)
        await client.negotiate(timeout=LONG)  # and is then a no-op
        await client.aclose()


async def test_a_closing_peer_fails_the_request_and_all_later_ones(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:

        async def script() -> None:
            await peer.hear()
            await peer.stream.aclose()

        tasks.start_soon(script)
        for _ in range(2):
            with pytest.raises(VmmError, match="closed its control socket"):
                await client.execute("stop", timeout=LONG)
        await client.read_to_end()


NONSENSE = {
    "text": b"hello\n",
    "not utf-8": b'{"event": "\xff"}\n',
    "a list": b"[]\n",
    "no kind": b"{}\n",
    "an answer nobody asked for": b'{"return": {}, "id": 999}\n',
    "an answer to true": b'{"return": {}, "id": true}\n',
    "both kinds of answer": b'{"return": {}, "error": {}, "id": 2}\n',
    "an error that is none": b'{"error": "no", "id": 2}\n',
    "an error without id": b'{"error": {"class": "GenericError", "desc": "Invalid JSON"}}\n',
    "event name": b'{"event": 1}\n',
    "event data": b'{"event": "STOP", "data": []}\n',
    "nesting": b'{"event": "X", "data": ' + b'{"a":' * 40 + b"1" + b"}" * 41 + b"\n",
    "deep nesting": b'{"event": "X", "data": ' + b"[" * 300_000 + b"\n",
    "quotes without end": b'{"event": "' + b'\\"' * 300_000 + b"[" * 100 + b"\\\n",
    "a number without end": b'{"event": "X", "data": {"a": ' + b"9" * 10_000 + b"}}\n",
    "not a number": b'{"event": "X", "data": {"a": NaN}}\n',
    "a long line": b" " * (qmp.MAX_LINE + 1) + b"\n",
    "a line without end": b"x" * (qmp.MAX_LINE + 70_000),
}


@pytest.mark.parametrize("noise", NONSENSE.values(), ids=NONSENSE.keys())
async def test_nonsense_ends_the_connection_with_an_error(short_dir: Path, noise: bytes) -> None:
    async with negotiated(short_dir) as (client, peer, events), anyio.create_task_group() as tasks:

        async def script() -> None:
            await peer.hear()
            with suppress(anyio.BrokenResourceError):  # the client may have heard enough before the end
                await peer.stream.send(noise)

        tasks.start_soon(script)
        with pytest.raises(VmmError, match=r"does not speak QMP|a line of more than") as caught:
            await client.execute("stop", timeout=LONG)
        assert len(str(caught.value)) < 300
        assert not events
        await client.aclose()


async def test_brackets_inside_strings_are_no_nesting(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, events), anyio.create_task_group() as tasks:
        text = '[{"\\' * 100

        async def script() -> None:
            await peer.event("X", text=text)
            await peer.expect("stop")

        tasks.start_soon(script)
        await client.execute("stop", timeout=LONG)
        assert events == [("X", {"text": text})]


async def test_messages_may_be_split_and_joined_anywhere(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, events), anyio.create_task_group() as tasks:

        async def script() -> None:
            number = (await peer.hear())["id"]
            text = b'\r\n{"event": "A"}\r\n{"event": "B", "data": {"x": 1}}\n'
            text += json.dumps({"return": 7, "id": number}).encode() + b'\n{"event": "C"}\n'
            for at in range(len(text)):
                await peer.stream.send(text[at : at + 1])

        tasks.start_soon(script)
        assert await client.execute("stop", timeout=LONG) == 7
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(client.read_to_end)
        await anyio.wait_all_tasks_blocked()
        await client.aclose()
        assert [name for name, _ in events] == ["A", "B", "C"]


async def test_a_peer_that_reads_nothing_cannot_hang_a_request(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, _, _):
        big = {"text": "x" * (1 << 20)}
        with pytest.raises((VmmError, DeadlineExceededError)):
            await client.execute("human-monitor-command", big, timeout=SHORT)
        with pytest.raises(VmmError, match="stopped reading"):
            await client.execute("stop", timeout=LONG)


async def test_a_cancelled_request_does_not_spoil_the_connection(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await client.execute("stop", timeout=LONG)
        tasks.start_soon(peer.expect, "cont")
        assert await client.execute("cont", timeout=LONG) == {}
        assert "ready, 0 waiting" in repr(client)


async def test_closing_fails_whoever_waits(short_dir: Path) -> None:
    async with negotiated(short_dir) as (client, peer, _), anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(VmmError, match="closed"):
                await client.execute("stop", timeout=LONG)

        tasks.start_soon(ask)
        await peer.hear()
        await client.aclose()
