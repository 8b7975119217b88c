"""``vmactor events``: what happened to a daemon's VMs, and what happens."""

import argparse
from functools import partial
from typing import Any

from vmactor.cli.daemon import cid_of
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import EventPrinter
from vmactor.client import connect


def run(args: argparse.Namespace) -> ExitCode:
    """Print events."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    printer = EventPrinter(json=args.json)
    async with connect(args.socket) as service:
        cids = None if args.vm is None else [cid_of(service, args.vm)]
        last = service.seq
        if args.since is None and args.follow:
            begin: dict[str, Any] = {"snapshot": True}
        else:
            begin = {"after": args.since or 0}
        if not args.follow and begin["after"] >= last:
            return ExitCode.OK
        # All that this user may see, so that the last event is seen even if it is another VM's.
        with service.subscribe(**begin) as events:
            async for event in events:
                if cids is None or event.cid in {0, *cids}:
                    await printer.show(event)
                if not args.follow and event.seq >= last:
                    break
    return ExitCode.OK
