"""``vmactor stop``: end a daemon's VM, gently if there is time."""

import argparse
from functools import partial

from vmactor import StopLadder, StopRung
from vmactor.cli.daemon import NOT_UNDONE, chosen
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import to_json
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.client import connect

_WORDS = {
    None: "it had ended, or had never run",
    StopRung.POWER_BUTTON: "the guest shut down",
    StopRung.EXIT_REQUEST: "its VMM was told to end",
    StopRung.KILL: "it was killed",
}


def run(args: argparse.Namespace) -> ExitCode:
    """Stop it, and say what ended it."""
    return run_to_the_end(partial(_run, args), tells=NOT_UNDONE)


async def _run(args: argparse.Namespace) -> ExitCode:
    async with connect(args.socket) as service:
        vm = await chosen(service, args.vm)
        # Killing is the ladder's last rung, so both ways end alike.
        gentle = {} if args.graceful else {"exit_request": None}
        rung = await vm.shutdown(StopLadder(power_button=args.graceful, **gentle))
        if args.json:
            text = to_json({"cid": vm.cid, "stopped_by": None if rung is None else rung.name})
        else:
            text = f"CID {vm.cid}: {_WORDS[rung]}\n"
        await Writer(STDOUT).write(text.encode())
    return ExitCode.OK
