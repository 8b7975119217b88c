"""``vmactor run``: one VM from its configuration to its death."""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from vmactor import (
    AppConfig,
    CpuTopology,
    GuestBinder,
    Platform,
    RawConfig,
    Restart,
    RestartPolicy,
    VirtualizationService,
    load_config,
)
from vmactor.cli.exit_codes import ExitCode, exit_code
from vmactor.cli.lifetime import follow, run_to_the_end
from vmactor.cli.output import EventPrinter, brackets, print_error
from vmactor.cli.stdio import STDERR, STDOUT, Reader, Writer, is_terminal
from vmactor.text import escape_bytes

MAX_LINE: Final = 4096
RESTARTS: Final = {"on-failure": Restart.TRANSIENT, "always": Restart.PERMANENT}


def run(args: argparse.Namespace) -> ExitCode:
    """Run the VM and follow it."""
    if wants_output_twice(args):
        return ExitCode.USAGE
    return run_to_the_end(partial(_run, args), tells="stopping the VM")


def wants_output_twice(args: argparse.Namespace) -> bool:
    """Whether standard output is to be two things; then that has been said."""
    twice = args.json and "-" in (args.console, args.log)
    if twice:
        print_error("--json and '-' both want standard output: give the console or log a file")
    return twice


async def _run(args: argparse.Namespace) -> ExitCode:
    restart = RestartPolicy(when=RESTARTS[args.restart]) if args.restart else None
    watched = {"hangup_detection": args.hangup_timeout is not None, "hangup_timeout": args.hangup_timeout}
    with _configuration(args) as config:
        return await run_vm(args, config, restart=restart, **watched)


async def run_vm(args: argparse.Namespace, config: RawConfig | AppConfig, **how: Any) -> ExitCode:
    """Create a VM, and show what happens to it until it is dead.

    Args:
        args: The options that say where it runs and where its output goes.
        config: What to run.
        how: For ``create_vm``.
    """
    platform = Platform(args.platform) if isinstance(config, AppConfig) else None
    printer = EventPrinter(json=args.json, fd=STDERR if "-" in (args.console, args.log) else STDOUT)
    async with anyio.create_task_group() as tasks:
        with ExitStack() as files:
            sinks = {path: _open_sink(path, files, tasks) for path in (args.console, args.log)}
            service = VirtualizationService(
                vmm=args.vmm,
                state_directory=args.state_dir,
                platform=platform,
                tombstones=args.tombstones,
            )
            async with service:
                with service.subscribe() as events:
                    console, log = sinks[args.console], sinks[args.log]
                    binder = GuestBinder(release=args.guest_release)
                    vm = await service.create_vm(config, console=console, log=log, guest_binder=binder, **how)
                    life = await follow(vm, events, printer)
    return exit_code(life)


@contextmanager
def _configuration(args: argparse.Namespace) -> Iterator[RawConfig]:
    with load_config(args.config, name=args.name) as config:
        changes: dict[str, object] = {}
        if args.memory is not None:
            changes["memory_mib"] = args.memory
        if args.cpu_topology is not None:
            changes["cpu_topology"] = CpuTopology[args.cpu_topology.upper()]
        yield replace(config, **changes)  # type: ignore[arg-type]


def _open_sink(path: str | None, files: ExitStack, tasks: TaskGroup) -> int | None:
    """Where the guest's output goes: a file made or emptied, standard output, or nowhere.

    A terminal would do what a guest tells it, so there the output goes through us, line by line.
    """
    if path is None:
        return None
    if path != "-":
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    elif is_terminal(STDOUT):
        read, fd = os.pipe2(os.O_CLOEXEC)
        tasks.start_soon(_show_lines, read)
    else:
        return STDOUT
    files.callback(os.close, fd)
    return fd


async def _show_lines(fd: int) -> None:
    """Write what comes out of a pipe to standard output, escaped; closes the pipe at its end."""
    reader, writer, rest = Reader(fd), Writer(STDOUT), b""
    try:
        while data := await reader.read():
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            await writer.write(b"".join(shown_line(line) for line in lines))
        if rest:
            await writer.write(shown_line(rest))
    finally:
        os.close(fd)


def shown_line(line: bytes) -> bytes:
    """A line of a guest's output as a person may see it."""
    return f"{brackets(escape_bytes(line.rstrip(bytes([13])), limit=2 * MAX_LINE))}\n".encode()
