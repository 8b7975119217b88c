"""``vmactor create-composite``: a disk out of several files, for crosvm."""

import argparse
from functools import partial

import anyio.to_thread

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.image import describe, for_people
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import to_json
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.images.composite_files import PartFile, create_composite


def run(args: argparse.Namespace) -> ExitCode:
    """Make it, and show it."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    parts = [PartFile(*part) for part in args.partitions]
    await anyio.to_thread.run_sync(create_composite, args.out, parts)
    found = await anyio.to_thread.run_sync(describe, args.out)
    text = to_json(found) if args.json else for_people(found, STDOUT)
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK
