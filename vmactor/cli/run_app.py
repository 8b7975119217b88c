"""``vmactor run-app``: a payload from an APK, in a guest that verifies it."""

import argparse
from contextlib import ExitStack
from functools import partial

from vmactor.cli.app_config import app_config
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import print_error
from vmactor.cli.run import run_vm, wants_output_twice


def run(args: argparse.Namespace) -> ExitCode:
    """Run the payload and follow its VM."""
    if args.config_path is not None and args.payload_binary_name is not None:
        print_error("Only one of --config-path or --payload-binary-name can be defined")
        return ExitCode.USAGE
    if args.config_path is None and args.payload_binary_name is None:
        print_error("Either --config-path or --payload-binary-name must be defined")
        return ExitCode.USAGE
    if wants_output_twice(args):
        return ExitCode.USAGE
    return run_to_the_end(partial(_run, args), tells="stopping the VM")


async def _run(args: argparse.Namespace) -> ExitCode:
    with ExitStack() as files:
        config = await app_config(
            args,
            files,
            apk=args.apk,
            idsig=args.idsig,
            instance=args.instance,
            config_path=args.config_path,
            payload_binary_name=args.payload_binary_name,
            extra_idsigs=args.extra_idsig,
        )
        return await run_vm(args, config)
