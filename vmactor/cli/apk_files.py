"""Opening the files of ``create-idsig`` and ``verify-apk``, and what is told of an idsig."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmactor.errors import IllegalArgumentError
from vmactor.images.apk_v3 import ALGORITHMS
from vmactor.images.idsig import Idsig
from vmactor.text import escape


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of a file that somebody named; what kind of file it is, is looked at by those who use it.

    Raises:
        IllegalArgumentError: It cannot be opened.
    """
    try:
        fd = _open(path, flags)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no file can have that name"
        may = "read" if flags == os.O_RDONLY else "read and write"
        raise IllegalArgumentError(
            f'Failed to open "{escape(str(path))}": {why}; name a file that you may {may}'
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def made_or_opened(path: Path) -> Iterator[int]:
    """A file for reading and writing; one that was not there before is not there after an error either.

    Raises:
        IllegalArgumentError: It can neither be made nor opened.
    """
    try:
        fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except (OSError, ValueError):  # it exists, or the other way tells what is wrong
        with opened(path, os.O_RDWR | os.O_CREAT) as old:
            yield old
        return
    try:
        yield fd
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def _open(path: Path, flags: int) -> int:
    # Opening a pipe would wait for its other end.
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def shown_path(path: Path) -> str:
    """A path in JSON, whatever its bytes are."""
    return os.fsencode(path).decode(errors="backslashreplace")


def idsig_record(idsig: Idsig) -> dict[str, Any]:
    """What an idsig says, as JSON has it."""
    return {
        "root_hash": idsig.root.hex(),
        "apk_digest": idsig.apk_digest.hex(),
        "algorithm": ALGORITHMS[idsig.algorithm].name,
        "merkle_tree_size": idsig.tree_size,
        "signed": idsig.signed,
    }
