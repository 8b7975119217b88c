"""``vmactor create-idsig``: the idsig file of an APK, made or updated."""

import argparse
import os
from functools import partial

from vmactor.cli.apk_files import idsig_record, made_or_opened, opened, shown_path
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import shown, to_json
from vmactor.cli.progress import with_progress
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.images.idsig import create_or_update_idsig_file


def run(args: argparse.Namespace) -> ExitCode:
    """Make it."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    with opened(args.apk) as apk_fd, made_or_opened(args.idsig) as idsig_fd:
        size = os.fstat(apk_fd).st_size
        result = await with_progress("hashing", size, partial(create_or_update_idsig_file, apk_fd, idsig_fd))
    if args.json:
        record = {"apk": shown_path(args.apk), "idsig": shown_path(args.idsig), "written": result.written}
        text = to_json(record | idsig_record(result.idsig))
    else:
        what = "written" if result.written else "up to date"
        text = f"{shown(str(args.idsig))}: {what}, root hash {result.idsig.root.hex()}\n"
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK
