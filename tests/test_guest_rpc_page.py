"""docs/guest-rpc.md tells the truth: its examples are replayed, its tables compared with the code."""

import re
from pathlib import Path

import anyio
import pytest

from tests.guest_rpc_peer import Guest, Server, Vm
from vmactor.actors.guest_connection import GuestRpcLimits
from vmactor.errors import CODES
from vmactor.messagepack_rpc import MAX_ITEMS
from vmactor.messages import MAX_GUEST_TEXT

PAGE = (Path(__file__).parent.parent / "docs" / "guest-rpc.md").read_text()
EXAMPLES = [block.strip().splitlines() for block in re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL)]


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.anyio
@pytest.mark.parametrize("lines", EXAMPLES, ids=[str(i) for i in range(len(EXAMPLES))])
async def test_an_example_of_the_page_is_what_the_server_does(lines: list[str], short_dir: Path) -> None:
    async with Server(short_dir / "s").running(Vm().report) as server:
        guest = server.guest()
        for line in lines:
            side, data = line.partition("#")[0].split(maxsplit=1)
            if side == "guest":
                await guest.send_raw(bytes.fromhex(data))
            else:
                assert side == "host"
                assert await exactly(guest, len(bytes.fromhex(data))) == bytes.fromhex(data)
        assert server.statistics.open == 1


async def exactly(guest: Guest, count: int) -> bytes:
    data = b""
    with anyio.fail_after(20):
        while len(data) < count:
            data += await guest.stream.receive(count - len(data))
    return data


def row(start: str) -> list[float]:
    """The numbers in the second column of the limit table's row that starts so."""
    (text,) = re.findall(rf"^\| {re.escape(start)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d.,]*", text)]


def test_the_page_states_the_limits_that_hold() -> None:
    limits = GuestRpcLimits()
    assert row("size of a message") == [limits.message_size, MAX_ITEMS, limits.containers]
    assert row("connections at once") == [limits.connections]
    assert row("silence between messages") == [limits.idle_time]
    assert row("from a message's first byte to its last") == [limits.message_time]
    assert row("accepting an answer") == [limits.answer_time]
    assert row("refused calls on a connection") == [limits.refusals]
    assert row("unknown notifications on a connection") == [limits.refusals, limits.pause]
    assert row("dialling") == [limits.pause]
    assert f"at most {MAX_GUEST_TEXT:,} characters" in PAGE


def test_the_page_states_the_codes_that_are_sent() -> None:
    rows = re.findall(r"^\| (-\d+) \| `(\w+)` \|", PAGE, re.MULTILINE)
    codes = {kind: int(code) for code, kind in rows}
    assert codes == {kind: CODES[kind] for kind in codes}
    assert len(codes) == 4
