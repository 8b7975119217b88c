"""``vmactor load``: many VMs on this host, and how it bore them."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from vmactor import RawConfig, VirtualizationService, load_config
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import print_error, table
from vmactor.cli.stdio import STDERR, STDOUT, Writer, is_terminal
from vmactor.errors import IllegalArgumentError
from vmactor.load.compare import compare
from vmactor.load.page import page
from vmactor.load.run import Run
from vmactor.load.scenario import Scenario, parse_toml
from vmactor.strict_json import about

LOOK_SECONDS: Final = 0.25
MAX_RESULT: Final = 64 << 20
SHOWN: Final = ("create", "start_to_ready", "stop", "report_to_subscriber")


def run(args: argparse.Namespace) -> ExitCode:
    """Run a load, or compare two."""
    if args.words and (args.words[0] != "compare" or len(args.words) != 3):
        print_error("write 'vmactor load [OPTIONS]', or 'vmactor load compare A.json B.json'")
        return ExitCode.USAGE
    return run_to_the_end(partial(_compare if args.words else _run, args), tells="ending all VMs")


async def _run(args: argparse.Namespace) -> ExitCode:
    scenario = _scenario(args)
    async with VirtualizationService(vmm=scenario.vmm, state_directory=args.state_dir) as service:
        with _template(scenario, args.guest) as template:
            load = Run(scenario, service, template)
            async with anyio.create_task_group() as showing:
                if is_terminal(STDERR):
                    showing.start_soon(_show, load)
                await load.run()
                showing.cancel_scope.cancel()
    result = load.result()
    if args.html is not None:
        await anyio.Path(args.html).write_text(page(result))
    if args.json is not None and args.json != "-":
        await anyio.Path(args.json).write_text(json.dumps(result) + "\n")
    text = json.dumps(result) + "\n" if args.json == "-" else summary(result)
    await Writer(STDOUT).write(text.encode())
    return ExitCode.ERROR if result["failed"] or result["events_lost"] else ExitCode.OK


def _scenario(args: argparse.Namespace) -> Scenario:
    """What the file says, and above it what the command line does."""
    values: dict[str, Any] = {}
    if args.scenario is not None:
        with about(f'"{args.scenario}"'):
            values = parse_toml(args.scenario.read_text())
    return Scenario.from_mapping(values | args.values)


@contextmanager
def _template(scenario: Scenario, guest: Path) -> Iterator[RawConfig]:
    """What all VMs have in common."""
    if scenario.vmm != "simulated":
        with load_config(guest / "vm.json") as config:
            yield config
        return
    kernel = os.memfd_create("kernel")
    try:
        yield RawConfig(name="load", kernel=kernel)
    finally:
        os.close(kernel)


async def _show(load: Run) -> None:
    """Keep a table of the present on a terminal."""
    from rich.console import Console  # noqa: PLC0415 - only terminals need it
    from rich.live import Live  # noqa: PLC0415

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:
        while True:
            live.update(present(load), refresh=True)
            await anyio.sleep(LOOK_SECONDS)


def present(load: Run) -> str:
    """A run as it is now, in a few lines."""
    counts = "  ".join(f"{state} {count}" for state, count in load.states.items())
    begun = sum(load.states.values())
    rate = begun / load.elapsed if load.elapsed else 0
    lines = [
        f"{load.phase} {load.elapsed:.1f} s: {begun} of {load.scenario.vms} VMs, {rate:.1f} a second",
        counts,
    ]
    for kind in SHOWN:
        values = load.latencies[kind]
        if len(values):
            figures = (values.percentile(percent) or 0 for percent in (50, 99, 100))
            lines.append(
                "{}: p50 {:.1f} ms, p99 {:.1f} ms, max {:.1f} ms".format(
                    kind.replace("_", " "), *(1000 * figure for figure in figures)
                )
            )
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """A result for people."""
    columns = ("count", "p50", "p90", "p99", "p999", "max")
    rows = [
        [
            kind.replace("_", " "),
            *(
                _cell(result["latency_seconds"][kind][column], 1 if column == "count" else 1000)
                for column in columns
            ),
        ]
        for kind in SHOWN
    ]
    facts = [
        f"{result['vms']} VMs in {result['seconds']:.1f} s, at most {result['peak_ready']} ready at a time, "
        f"{result['failed']} not as planned",
        f"{result['events_published']} events, {result['events_lost']} lost",
    ]
    if (per_vm := result["manager_rss_bytes_per_vm"]) is not None:
        facts.append(f"manager: {per_vm / 1024:.1f} KiB for each VM")
    if (idle := result["manager_cpu_fraction_idle"]) is not None:
        facts.append(f"manager while all idle: {100 * idle:.2f} % of a processor")
    return (
        table(("latency, ms", *columns), rows, STDOUT)
        + "".join(f"{fact}\n" for fact in facts)
        + "".join(f"failed: {failure}\n" for failure in result["failures"])
    )


def _cell(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.1f}" if factor != 1 else str(value)


async def _compare(args: argparse.Namespace) -> ExitCode:
    rows = compare(await _read(Path(args.words[1])), await _read(Path(args.words[2])))
    if args.json is not None:
        text = json.dumps({name: {"a": a, "b": b, "ratio": ratio} for name, a, b, ratio in rows}) + "\n"
    else:
        cells = [[name, _number(a), _number(b), _number(ratio)] for name, a, b, ratio in rows]
        text = table(("", "A", "B", "B / A"), cells, STDOUT)
    await Writer(STDOUT).write(text.encode())
    return ExitCode.OK


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


async def _read(path: Path) -> dict[str, Any]:
    with about(f'"{path}"'):
        if (await anyio.Path(path).stat()).st_size > MAX_RESULT:
            raise IllegalArgumentError("is too long for a result")
        try:
            found = json.loads(await anyio.Path(path).read_text())
        except (ValueError, RecursionError):
            raise IllegalArgumentError("is no JSON") from None
        if not isinstance(found, dict):
            raise IllegalArgumentError("is no result of 'vmactor load --json'")
        return found
