"""``vmactor run-microdroid``: the platform's guest with a payload that does nothing, to look around in it."""

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from vmactor.cli.app_config import app_config
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import shown, to_stderr
from vmactor.cli.run import run_vm, wants_output_twice
from vmactor.errors import IllegalArgumentError
from vmactor.text import escape

APP: Final = "EmptyPayloadApp.apk"
PAYLOAD: Final = "MicrodroidEmptyPayloadJniLib.so"


def run(args: argparse.Namespace) -> ExitCode:
    """Run it and follow its VM."""
    if wants_output_twice(args):
        return ExitCode.USAGE
    return run_to_the_end(partial(_run, args), tells="stopping the VM")


async def _run(args: argparse.Namespace) -> ExitCode:
    apk = find_app(args.platform)
    to_stderr(f"found path {shown(str(apk))}")
    with ExitStack() as files:
        if args.work_dir is None:
            work = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="vmactor-microdroid-")))
        else:
            work = args.work_dir
            work.mkdir(parents=True, exist_ok=True)
        idsig, instance = work / "apk.idsig", work / "instance.img"
        to_stderr(f"apk.idsig path: {shown(str(idsig))}\ninstance.img path: {shown(str(instance))}")
        config = await app_config(
            args, files, apk=apk, idsig=idsig, instance=instance, payload_binary_name=PAYLOAD
        )
        return await run_vm(args, config)


def find_app(platform: Path) -> Path:
    """The app whose payload does nothing.

    Raises:
        IllegalArgumentError: The platform has none, or more than one.
    """
    directory = platform / "com.android.virt" / "app"
    pattern = escape(str(directory / "**" / APP))
    match sorted(directory.rglob(APP)):
        case []:
            raise IllegalArgumentError(f"No apks match {pattern}; name the platform's tree with --platform")
        case [apk]:
            return apk
    raise IllegalArgumentError(f"Found more than one apk matching {pattern}; leave one of them there")
