"""``vmactor connect``: standard input and output joined to a vsock port of a running VM.

The VM may be another process's, of the same user: its record in the state directory says how its vsock is
reached. Bytes pass as they are, both ways at once.
"""

import argparse
from functools import partial
from pathlib import Path

import anyio

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import to_stderr
from vmactor.cli.records import Record, find
from vmactor.cli.stdio import STDERR, STDIN, STDOUT, Reader, Writer, is_terminal
from vmactor.errors import IllegalArgumentError, IllegalStateError, UnsupportedOperationError, VmactorError
from vmactor.state_dir import sockets_of
from vmactor.vsock import HybridVsockTransport, KernelVsockTransport, VsockStream, VsockTransport


def run(args: argparse.Namespace) -> ExitCode:
    """Join the two until the guest closes."""
    return run_to_the_end(partial(_run, args), tells="closing the connection")


async def _run(args: argparse.Namespace) -> ExitCode:
    directory, records = find(args.state_dir)
    record = next((record for record in records if record["cid"] == args.cid), None)
    if record is None:
        raise IllegalArgumentError(
            f"no VM has CID {args.cid} in {directory}; 'vmactor list' shows those that there are"
        )
    try:
        stream = await transport_of(record, directory).connect(args.port)
    except VmactorError as error:
        if record["alive"]:
            raise
        raise IllegalStateError(
            f"{error}; the manager of this VM is gone, and its VMM perhaps too"
        ) from error
    async with stream:
        await join(stream, Reader(STDIN), Writer(STDOUT), quit_after=args.quit_after)
    return ExitCode.OK


def transport_of(record: Record, directory: Path) -> VsockTransport:
    """The way to a VM that another process manages.

    Raises:
        UnsupportedOperationError: It was recorded by a version that knows other ways.
    """
    cid = int(record["cid"])
    match record.get("vsock"):
        case "kernel":
            return KernelVsockTransport(cid)
        case "hybrid" | "direct":
            # We only connect; who may connect to us is nobody's question here.
            return HybridVsockTransport(cid, sockets_of(directory / "vm" / str(cid)) / "vsock", lambda: None)
    raise UnsupportedOperationError(
        f"the record of CID {cid} does not say how its vsock is reached; use the version that started it"
    )


async def join(stream: VsockStream, source: Reader, sink: Writer, *, quit_after: float | None) -> None:
    """Copy both ways until the guest has closed and everything that it sent is written.

    The end of ``source`` is passed on where the transport can do that (kernel vsock). Elsewhere the guest
    cannot learn of it; reading goes on until it closes, or until it was silent for ``quit_after`` seconds.

    Raises:
        BrokenPipeError: Nobody reads ``sink`` any more.
        IllegalStateError: The connection broke: the guest or the VM ended in the middle of it.
    """
    waiting = anyio.CancelScope()
    ended = False

    def limit_silence() -> None:
        if ended and quit_after is not None:
            waiting.deadline = anyio.current_time() + quit_after

    async def send() -> None:
        nonlocal ended
        try:
            while data := await source.read():
                await stream.send(data)
            await _pass_on_the_end(stream, quit_after)
        except anyio.BrokenResourceError:
            return  # the guest takes no more; what it still sends is read, and the reader learns the rest
        ended = True
        limit_silence()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        while True:
            with anyio.CancelScope() as waiting:
                limit_silence()
                try:
                    data = await stream.receive()
                except anyio.EndOfStream:
                    break
                except anyio.BrokenResourceError as error:
                    raise IllegalStateError(
                        "the connection broke: the guest closed it before it had read everything, or the VM "
                        "ended"
                    ) from error
            if waiting.cancelled_caught:
                break
            await sink.write(data)
        tasks.cancel_scope.cancel()


async def _pass_on_the_end(stream: VsockStream, quit_after: float | None) -> None:
    try:
        await stream.send_eof()
    except UnsupportedOperationError:
        if quit_after is None and is_terminal(STDERR):
            to_stderr(
                "vmactor: the guest cannot be told that standard input has ended (hybrid vsock); waiting "
                "until it closes (--quit-after S stops sooner, Ctrl-C now)"
            )
