"""``vmactor serve``: the service for other processes, by a unix socket."""

import argparse
import logging
import signal

import anyio
from anyio.abc import TaskStatus

from vmactor import Platform, VirtualizationService, load_policy
from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import report
from vmactor.cli.output import shown, to_stderr
from vmactor.daemon.listening import listening
from vmactor.daemon.server import Server
from vmactor.errors import VmactorError
from vmactor.protocol.address import socket_to_serve

STOPPING = (signal.SIGINT, signal.SIGTERM)


def run(args: argparse.Namespace) -> ExitCode:
    """Serve until a signal."""
    logging.basicConfig(format="vmactor: %(levelname)s: %(message)s", level=logging.WARNING)
    try:
        anyio.run(_run, args)
    except (VmactorError, OSError, ExceptionGroup) as error:
        return report(error)
    return ExitCode.OK


async def _run(args: argparse.Namespace) -> None:
    path = args.socket or socket_to_serve()
    service = VirtualizationService(
        vmm=args.vmm,
        state_directory=args.state_dir,
        platform=Platform(args.platform),
        tombstones=args.tombstones,
        policy=load_policy(args.policy) if args.policy else None,
    )
    async with anyio.create_task_group() as tasks:
        await tasks.start(_end_on_signal, tasks.cancel_scope)
        with listening(path) as listener:
            async with service, anyio.create_task_group() as serving:
                await serving.start(Server(service).serve, [listener])
                to_stderr(f"vmactor: listening on {shown(str(path))}")


async def _end_on_signal(
    scope: anyio.CancelScope, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.open_signal_receiver(*STOPPING) as signals:
        task_status.started()
        async for _ in signals:
            to_stderr("vmactor: ending all VMs")
            scope.cancel()
