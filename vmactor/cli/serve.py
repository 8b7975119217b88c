"""``vmactor serve``: the service for other processes, by a unix socket."""

import argparse
from dataclasses import replace

import anyio

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import report
from vmactor.cli.output import shown, to_stderr
from vmactor.daemon.config import Config, load_config
from vmactor.daemon.run import Daemon
from vmactor.errors import VmactorError


def run(args: argparse.Namespace) -> ExitCode:
    """Serve until a signal."""
    daemon = Daemon(lambda: _config(args), lambda where: to_stderr(f"vmactor: listening on {shown(where)}"))
    try:
        anyio.run(daemon.run)
    except (VmactorError, OSError, ExceptionGroup) as error:
        return report(error)
    return ExitCode.OK


def _config(args: argparse.Namespace) -> Config:
    """What the file says, and above it what the command line does."""
    config = load_config(args.config) if args.config else Config()
    given = {
        "socket": args.socket,
        "state_directory": args.state_dir,
        "platform": args.platform,
        "tombstones": args.tombstones,
        "policy": args.policy,
        "vmm": args.vmm,
    }
    options = {name: value for name, value in given.items() if value is not None}
    return replace(config, service=replace(config.service, **options))
