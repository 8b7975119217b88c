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
    connect,
    load_config,
)
from vmactor.cli.exit_codes import ExitCode, exit_code
from vmactor.cli.guest_text import Lines
from vmactor.cli.lifetime import follow, run_to_the_end
from vmactor.cli.output import EventPrinter, print_error, to_json
from vmactor.cli.stdio import STDERR, STDOUT, Reader, Writer, is_terminal

RESTARTS: Final = {"on-failure": Restart.TRANSIENT, "always": Restart.PERMANENT}


def run(args: argparse.Namespace) -> ExitCode:
    """Run the VM and follow it."""
    if wants_output_twice(args) or _asks_a_daemon_for_too_much(args):
        return ExitCode.USAGE
    return run_to_the_end(
        partial(_run, args), tells="ending; the VM goes on" if args.keep else "stopping the VM"
    )


def _asks_a_daemon_for_too_much(args: argparse.Namespace) -> bool:
    """Whether options are given that a daemon has decided, or that need a daemon; then that has been said."""
    if args.detach and not args.keep:
        print_error("--detach leaves the VM with a daemon: say --keep, too")
        return True
    own = {"--vmm": args.vmm != "auto", "--tombstones": args.tombstones, "--state-dir": args.state_dir}
    wrong = [option for option, given in own.items() if given]
    if wrong and _daemon_runs_it(args):
        print_error(f"{', '.join(wrong)}: that is the daemon's to say; leave it out")
        return True
    return False


def _daemon_runs_it(args: argparse.Namespace) -> bool:
    return bool(args.keep or args.socket)


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
        if _daemon_runs_it(args):
            return await _run_at_daemon(args, config, restart=restart, **watched)
        return await run_vm(args, config, restart=restart, **watched)


async def _run_at_daemon(args: argparse.Namespace, config: RawConfig, **how: Any) -> ExitCode:
    """As ``run_vm``, but a daemon has the VM. With ``keep`` it goes on when this command ends."""
    printer = EventPrinter(json=args.json, fd=STDERR if "-" in (args.console, args.log) else STDOUT)
    async with anyio.create_task_group() as tasks:
        with ExitStack() as files:
            sinks = {path: _open_sink(path, files, tasks) for path in (args.console, args.log)}
            async with connect(args.socket) as service:
                before = service.seq
                console, log = sinks[args.console], sinks[args.log]
                binder = GuestBinder(release=args.guest_release)
                vm = await service.create_vm(
                    config, console=console, log=log, guest_binder=binder, keep=args.keep, **how
                )
                if args.detach:
                    await vm.start()
                    told = to_json({"cid": vm.cid, "name": vm.name}) if args.json else f"{vm.cid}\n"
                    await printer.write(told)
                    return ExitCode.OK
                with service.subscribe(cids=[vm.cid], after=before) as events:
                    life = await follow(vm, events, printer)
    return exit_code(life)


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
    reader, writer, lines = Reader(fd), Writer(STDOUT), Lines()
    try:
        while data := await reader.read():
            await writer.write("".join(lines.feed(data)).encode())
        await writer.write("".join(lines.end()).encode())
    finally:
        os.close(fd)
