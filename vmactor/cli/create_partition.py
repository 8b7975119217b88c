"""``vmactor create-partition``: a new file that a guest can write to."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Final

import anyio.to_thread

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.image import bytes_for_people, json_text
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import shown, to_json
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.errors import ImageError
from vmactor.images.partition import initialize_writable_partition
from vmactor.messages import PartitionType
from vmactor.text import escape

_TYPES: Final = {
    "raw": PartitionType.RAW,
    "instance": PartitionType.ANDROID_VM_INSTANCE,
    "encryptedstore": PartitionType.ENCRYPTEDSTORE,
}


def run(args: argparse.Namespace) -> ExitCode:
    """Make it."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    size = await anyio.to_thread.run_sync(create, args.path, args.size, _TYPES[args.type])
    if args.json:
        text = to_json({"path": json_text(str(args.path)), "type": args.type, "virtual_size": size})
    else:
        text = f"{shown(str(args.path))}: a partition of {bytes_for_people(size)}, type {args.type}\n"
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK


def create(path: Path, size: int, partition_type: PartitionType) -> int:
    """Make a new file, readable for its owner only; after an error there is none.

    Returns:
        The size of the guest's disk.

    Raises:
        VmactorError: As ``initialize_writable_partition``, or the file cannot be made.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ImageError(
            f'Failed to create "{escape(str(path))}": it exists; remove it, or choose another name'
        ) from None
    except OSError as error:
        raise ImageError(f'Failed to create "{escape(str(path))}": {error.strerror}') from error
    try:
        return initialize_writable_partition(fd, size, partition_type)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
