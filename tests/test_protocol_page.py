"""docs/protocol.md says what is so: its examples are sent to a daemon as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.daemon_peer import RawClient, daemon

pytestmark = pytest.mark.anyio

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
EXAMPLES = re.findall(r"```\n((?:-->|<--).*?)```", PAGE.partition("## Examples")[2], re.DOTALL)
ANY = "..."


def parse(text: str) -> Any:
    """An example as JSON; ``...`` in it becomes a text, or a field of that name."""
    text = re.sub(r"(?<![\"\w])\.\.\.(?=\s*[,\]])", f'"{ANY}"', text)
    text = re.sub(r"\{\s*\.\.\.\s*\}", f'{{"{ANY}": 0}}', text)
    return json.loads(re.sub(r",\s*\.\.\.\s*\}", f', "{ANY}": 0}}', text))


def fits(pattern: Any, value: Any) -> bool:
    """Whether a value is what an example says."""
    match pattern, value:
        case str(), str() if ANY in pattern:
            return re.fullmatch(".*".join(map(re.escape, pattern.split(ANY))), value, re.DOTALL) is not None
        case "...", _:
            return True
        case list(), list():
            return len(pattern) == len(value) and all(map(fits, pattern, value))
        case dict(), dict():
            known = {key: inner for key, inner in pattern.items() if key != ANY}
            exact = ANY in pattern or pattern.keys() == value.keys()
            return exact and all(key in value and fits(inner, value[key]) for key, inner in known.items())
    return type(pattern) is type(value) and bool(pattern == value)


def play(path: Path, example: str) -> None:
    with RawClient(path) as raw:
        for line in example.strip().splitlines():
            wanted = parse(line[4:])
            if line.startswith("-->"):
                raw.sock.sendall(packed(wanted))
            else:
                assert fits(wanted, got := raw.receive()), f"{line}\nbut it was {got}"
        if "null, [-" in example:
            assert raw.receive() is None, "the service closes"


def packed(message: Any) -> bytes:
    import msgpack

    data: bytes = msgpack.packb(message)
    return data


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
async def test_the_examples_are_true(short_dir: Path, number: int) -> None:
    async with daemon(short_dir) as served:
        await anyio.to_thread.run_sync(play, served.path, EXAMPLES[number])


def test_there_are_examples_and_they_can_fail() -> None:
    assert len(EXAMPLES) >= 7
    assert not fits([1, 7, None, {"version": 1, ANY: 0}], [1, 7, None, {"version": 2}])
    assert not fits({"a": 1}, {"a": 1, "b": 2})
    assert not fits("there is no 'colour'...", "there is no 'color'")
