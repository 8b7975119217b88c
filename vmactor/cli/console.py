"""``vmactor console``: what the guest of a daemon's VM writes."""

import argparse
from functools import partial

from vmactor.cli.daemon import chosen
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.guest_text import Lines
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.client import connect


def run(args: argparse.Namespace) -> ExitCode:
    """Follow it until the run of the VM ends."""
    return run_to_the_end(partial(_run, args), tells="ending; the VM goes on")


async def _run(args: argparse.Namespace) -> ExitCode:
    writer, lines = Writer(STDOUT), Lines()
    async with connect(args.socket) as service:
        vm = await chosen(service, args.vm)
        async with await vm.console() as stream:
            async for data in stream:
                await writer.write(data if args.raw else "".join(lines.feed(data)).encode())
        await writer.write("".join(lines.end()).encode())
    return ExitCode.OK
