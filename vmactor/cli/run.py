"""``vmactor run``: one VM from its configuration to its death."""

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from vmactor.actors.service import VirtualizationService
from vmactor.cli.exit_codes import ExitCode, exit_code
from vmactor.cli.lifetime import follow, run_to_the_end
from vmactor.cli.output import EventPrinter, print_error
from vmactor.cli.stdio import STDERR, STDOUT
from vmactor.config import RawConfig
from vmactor.config_file import load_config
from vmactor.messages import CpuTopology


def run(args: argparse.Namespace) -> ExitCode:
    """Run the VM and follow it."""
    if args.json and "-" in (args.console, args.log):
        print_error("--json and '-' both want standard output: give the console or log a file")
        return ExitCode.USAGE
    return run_to_the_end(partial(_run, args), tells="stopping the VM")


async def _run(args: argparse.Namespace) -> ExitCode:
    with ExitStack() as stack:
        console = _open_sink(args.console, stack)
        log = _open_sink(args.log, stack)
        config = stack.enter_context(_configuration(args))
        printer = EventPrinter(json=args.json, fd=STDERR if STDOUT in (console, log) else STDOUT)
        async with VirtualizationService(vmm=args.vmm, state_directory=args.state_dir) as service:
            with service.subscribe() as events:
                vm = await service.create_vm(
                    config,
                    console=console,
                    log=log,
                    hangup_detection=args.hangup_timeout is not None,
                    hangup_timeout=args.hangup_timeout,
                )
                return exit_code(await follow(vm, events, printer))


@contextmanager
def _configuration(args: argparse.Namespace) -> Iterator[RawConfig]:
    with load_config(args.config, name=args.name) as config:
        changes: dict[str, object] = {}
        if args.memory is not None:
            changes["memory_mib"] = args.memory
        if args.cpu_topology is not None:
            changes["cpu_topology"] = CpuTopology[args.cpu_topology.upper()]
        yield replace(config, **changes)  # type: ignore[arg-type]


def _open_sink(path: str | None, stack: ExitStack) -> int | None:
    """Where the guest's output goes: a file made or emptied, standard output, or nowhere."""
    if path is None:
        return None
    if path == "-":
        return STDOUT
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, fd)
    return fd
