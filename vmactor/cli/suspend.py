"""``vmactor suspend`` and ``vmactor resume``: pause a daemon's VM, and let it go on."""

import argparse
from functools import partial

from vmactor.cli.daemon import NOT_UNDONE, chosen
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.client import connect


def run(args: argparse.Namespace) -> ExitCode:
    """Do one of the two."""
    return run_to_the_end(partial(_run, args), tells=NOT_UNDONE)


async def _run(args: argparse.Namespace) -> ExitCode:
    async with connect(args.socket) as service:
        vm = await chosen(service, args.vm)
        await (vm.suspend() if args.command == "suspend" else vm.resume())
    return ExitCode.OK
