"""``vmactor info --tree``: what the managers of this user do now, as trees of who supervises whom."""

import argparse
import math
from collections.abc import Iterator
from typing import Any, Final

from vmactor.actors.inspection import inspect
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.list_vms import duration
from vmactor.cli.output import BAD, FAINT, GOOD, ODD, PLAIN, paint, shown, to_json, wants_colour
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.errors import IllegalArgumentError
from vmactor.state_dir import default_path

_COLOURS: Final = {"running": GOOD, "starting": PLAIN, "stopping": ODD, "restarting": ODD, "stopped": FAINT}
MOST_NODES: Final = 100_000
"""What is drawn of a tree; it is another process's word."""


async def run(args: argparse.Namespace) -> ExitCode:
    """Print the trees of all managers, or that of one VM."""
    found = await inspect((args.state_dir or default_path()) / "managers")
    if args.tree:
        found = [told | {"tree": part} for told in found if (part := _only(told["tree"], args.tree))]
        if not found:
            raise IllegalArgumentError(f"no manager has a VM with CID {args.tree}: see 'vmactor list'")
    if args.json:
        text = "".join(to_json(told) for told in found)
    else:
        colour = wants_colour(STDOUT)
        lines = (line for told in found for line in drawing(told, colour=colour))
        text = "".join(f"{line}\n" for line in lines) or "no managers\n"
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK


def _only(tree: dict[str, Any], cid: int) -> dict[str, Any] | None:
    children = [child for child in _all(tree, "children") if child.get("name") == f"vm-{cid}"]
    return tree | {"children": children} if children else None


def drawing(told: dict[str, Any], *, colour: bool = False) -> Iterator[str]:
    """One manager's tree as lines; another process told it, so anything may be in it or missing."""
    yield f"manager {shown(str(told.get('pid')))}"
    drawn = 0
    # Not recursive: how deep it goes is not ours to say. Each entry: what, its lead, its children's lead.
    rest: list[tuple[dict[str, Any], str, str]] = [(told["tree"], " └─ ", "    ")]
    while rest and drawn < MOST_NODES:
        node, lead, below = rest.pop()
        drawn += 1
        yield paint(lead, FAINT, on=colour) + _line(node, colour=colour)
        parts = _all(node, "children") + _all(node, "supervisors")
        last = len(parts) - 1
        for number in range(last, -1, -1):
            corner, line = ("└", " ") if number == last else ("├", "│")
            rest.append((parts[number], f"{below} {corner}─ ", f"{below} {line}  "))


def _all(node: dict[str, Any], key: str) -> list[dict[str, Any]]:
    parts = node.get(key)
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list | tuple) else []


def _line(node: dict[str, Any], *, colour: bool) -> str:
    if "strategy" in node:
        words = [
            f"supervisor {_text(node, 'name')}",
            f"bears {_count(node.get('intensity'), 'restart')} in {_text(node, 'period')} s",
            _count(node.get("failures"), "failure"),
            *_uptime(node),
        ]
    else:
        details = node.get("details")
        told = details if isinstance(details, dict) else {}
        state = _text(node, "state")
        words = [f"{_text(node, 'name')} {paint(state, _COLOURS.get(state, PLAIN), on=colour)}"]
        words += [f'"{_text(told, "vm")}" {_text(told, "state")}'] if told.get("vm") else []
        restarts = told.get("vm_restarts", node.get("restarts"))
        words += [*_uptime(node), _count(restarts, "restart")]
        if "ordinary" in told:
            words.append(f"mailbox {_text(told, 'ordinary')}+{_text(told, 'control')}")
        if told.get("queued"):
            words.append("waits for its turn to boot")
        if told.get("restart_due"):
            words.append(f"starts again at {_text(told, 'restart_due')}")
        if told.get("last_death"):
            words.append(paint(f"last death {_text(told, 'last_death')}", BAD, on=colour))
    if node.get("last_error"):
        words.append(paint(f"last error {_text(node, 'last_error')}", BAD, on=colour))
    return ", ".join(words)


def _text(node: dict[str, Any], key: str) -> str:
    value = node.get(key)
    return shown(f"{value:g}" if isinstance(value, float) else str(value), limit=200)


def _count(number: object, what: str) -> str:
    return f"{shown(str(number), limit=20)} {what}{'' if number == 1 else 's'}"


def _uptime(node: dict[str, Any]) -> list[str]:
    seconds = node.get("uptime")
    if isinstance(seconds, int | float) and math.isfinite(seconds):
        return [f"up {duration(int(seconds))}"]
    return []
