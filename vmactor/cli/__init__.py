"""The ``vmactor`` command.

``parser`` knows the grammar; every command is a module with a function ``run``, imported only when it is
asked for. Exit statuses are decided in ``exit_codes``, the looks of events in ``output``.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from vmactor.cli import parser
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.stdio import claim_standard_descriptors

_MODULES: Final = {"list": "list_vms", "resume": "suspend"}
"""Commands whose module has another name."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; the process's own by default.

    Returns:
        The exit status; docs/cli.md lists them.

    Raises:
        SystemExit: The arguments cannot be understood (2), or asked for nothing but help or the version (0).
    """
    claim_standard_descriptors()
    wanted = parser.parse(sys.argv[1:] if args is None else args)
    name = _MODULES.get(wanted.command, wanted.command.replace("-", "_"))
    module = importlib.import_module(f"vmactor.cli.{name}")
    try:
        return int(module.run(wanted))
    except KeyboardInterrupt:  # before a command began to watch for signals, or after
        return ExitCode.INTERRUPTED
