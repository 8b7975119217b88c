"""docs/cli.md says what the commands do: events, fields, options and statuses are compared with the code."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from vmactor import messages
from vmactor.cli import parser
from vmactor.cli.exit_codes import MEANINGS
from vmactor.messages import DeathReason, ErrorCode, Event

TEXT = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
HEADER = [field.name for field in dataclasses.fields(Event)]


def table(heading: str) -> list[list[str]]:
    """The cells of the table that begins with this line, without its two first lines."""
    lines = TEXT[TEXT.index(f"\n{heading}\n") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines
    ]


def commands(below: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command; that of an action of a command by both names."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in (below or parser.build())._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                actions = {f"{name} {action}": deeper for action, deeper in commands(command).items()}
                found |= actions or {name: command}
    return found


def test_every_exit_status_is_documented_in_the_same_words() -> None:
    assert table("| status | meaning |") == [[str(int(code)), meaning] for code, meaning in MEANINGS.items()]


def test_the_header_of_events_is_documented() -> None:
    assert [row[0].strip("`") for row in table("| field | type | meaning |")] == ["event", *HEADER]


def test_every_event_is_documented_with_all_its_fields() -> None:
    words = vars(messages).values()
    events = [
        word for word in words if isinstance(word, type) and issubclass(word, Event) and word is not Event
    ]
    documented = {
        row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in table("| event | more fields | when |")
    }
    assert documented == {
        event.kind: [field.name for field in dataclasses.fields(event) if field.name not in HEADER]
        for event in events
    }


@pytest.mark.parametrize("name", [*DeathReason.__members__, *ErrorCode.__members__])
def test_every_name_that_a_field_can_have_is_documented(name: str) -> None:
    assert f"`{name}`" in TEXT


@pytest.mark.parametrize("command", commands())
def test_every_option_of_a_command_is_documented_and_no_other(command: str) -> None:
    section = TEXT[TEXT.index(f"\n## `vmactor {command}") :]
    section = section[: section.index("\n## ", 1)] if "\n## " in section[1:] else section
    documented = {line.split()[1].strip("`") for line in section.splitlines() if line.startswith("| `--")}
    known = {
        option
        for action in commands()[command]._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    assert documented == known


def test_every_command_is_documented_with_its_summary() -> None:
    overview = TEXT.split("\n\n")[1]
    for line, command in zip(overview.splitlines(), commands(), strict=True):
        assert f"{line} ".startswith(f"    vmactor {command} ")
