"""``vmactor image info``: what an image is, and how large the disk in it.

What is known goes into one JSON-ready dictionary, foreign text as it is; ``for_people`` draws that. A kind
with more to show adds its part to both.
"""

import argparse
import os
import shutil
import string
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio.to_thread

from vmactor.cli.exit_codes import ExitCode
from vmactor.cli.lifetime import run_to_the_end
from vmactor.cli.output import shown, table, to_json
from vmactor.cli.stdio import STDOUT, Writer
from vmactor.errors import ImageError
from vmactor.images.composite import Specification
from vmactor.images.files import open_image
from vmactor.images.kinds import ImageInfo, inspect
from vmactor.images.partitions import FoundPartition, in_composite, in_image
from vmactor.images.qcow2 import Qcow2
from vmactor.messages import ImageKind
from vmactor.text import escape

_NAMES: Final = {
    "raw": "raw image",
    "qcow2": "QCOW2 image",
    "composite": "composite disk",
    "android-sparse": "Android sparse image",
    "zstd": "compressed with zstd",
}

_SIGNS: Final = string.digits[1:] + string.ascii_letters


def run(args: argparse.Namespace) -> ExitCode:
    """Print what is known."""
    return run_to_the_end(partial(_run, args), tells="ending")


async def _run(args: argparse.Namespace) -> ExitCode:
    found = await anyio.to_thread.run_sync(describe, args.file)
    text = to_json(found) if args.json else for_people(found, STDOUT)
    await Writer(STDOUT).write(text.encode(errors="backslashreplace"))
    return ExitCode.OK


def describe(path: Path) -> dict[str, Any]:
    """All that is known of an image file, JSON-ready.

    Raises:
        ImageError: It cannot be opened, is no file, or broken; the message names it.
    """
    try:
        fd = open_image(path)
        try:
            info = inspect(fd)
            partitions = _partitions(fd, path, info)
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f'Failed to open "{escape(str(path))}": {error.strerror}') from error
    except ImageError as error:
        raise ImageError(f"{escape(str(path))}: {error}") from error
    found: dict[str, Any] = {
        "file": json_text(str(path)),
        "kind": str(info.kind),
        "virtual_size": info.virtual_size,
        "file_size": info.file_size,
        "allocated_size": info.allocated_size,
    }
    if isinstance(info.details, Qcow2):
        found["qcow2"] = _qcow2(info.details)
    if partitions is not None:
        found["partitions"] = [
            {
                "label": json_text(part.label),
                "offset": part.offset,
                "size": part.size,
                "writable": part.writable,
                "file": json_text(part.file),
            }
            for part in partitions
        ]
    return found


def _partitions(fd: int, path: Path, info: ImageInfo) -> Sequence[FoundPartition] | None:
    if isinstance(info.details, Specification):
        return in_composite(info.details, path.absolute().parent)
    return in_image(fd) if info.kind is ImageKind.RAW else None


def _qcow2(header: Qcow2) -> dict[str, Any]:
    return {
        "version": header.version,
        "cluster_size": header.cluster_size,
        "backing_file": json_text(header.backing_file),
        "backing_format": json_text(header.backing_format),
        "data_file": json_text(header.data_file),
        "encrypted": header.encrypted,
        "snapshots": header.snapshots,
        "incompatible_features": header.incompatible_features,
        "refcount_bits": header.refcount_bits,
    }


def json_text(text: str | None) -> str | None:
    """Text as JSON can hold it: a byte that is not UTF-8 is written out."""
    return None if text is None else text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def for_people(found: dict[str, Any], fd: int) -> str:
    """The same as a table; foreign text is escaped here.

    Args:
        found: What ``describe`` found.
        fd: Where it will be written.
    """
    virtual, allocated = found["virtual_size"], found["allocated_size"]
    rows = [
        ("file", shown(found["file"])),
        ("kind", _NAMES[found["kind"]]),
        ("virtual size", "unknown" if virtual is None else bytes_for_people(virtual)),
        ("file size", bytes_for_people(found["file_size"])),
        ("allocated", "a block device" if allocated is None else bytes_for_people(allocated)),
    ]
    if header := found.get("qcow2"):
        rows.append(("format version", str(header["version"])))
        rows.append(("cluster size", bytes_for_people(header["cluster_size"])))
        rows += [
            (key.replace("_", " "), shown(header[key]) or "without a name")
            for key in ("backing_file", "backing_format", "data_file")
            if header[key] is not None
        ]
        if header["encrypted"]:
            rows.append(("encrypted", "yes"))
        if header["snapshots"]:
            rows.append(("snapshots", str(header["snapshots"])))
        if header["incompatible_features"]:
            rows.append(("incompatible features", f"{header['incompatible_features']:#x}"))
    text = table(("", "IMAGE"), rows, fd)
    if "partitions" in found:
        text += draw_partitions(found["partitions"], virtual, fd)
    return text


def draw_partitions(partitions: Sequence[Mapping[str, Any]], size: int, fd: int) -> str:
    """A table of a disk's partitions, and a bar in which each is as long as its share of the disk.

    Args:
        partitions: As in ``describe``, by offset.
        size: Of the disk, in bytes.
        fd: Where it will be written.
    """
    if not partitions:
        return "\nno partitions\n"
    signs = [_SIGNS[number % len(_SIGNS)] for number in range(len(partitions))]
    words = {True: "yes", False: "no", None: "-"}
    rows = [
        (
            sign,
            "-" if part["label"] is None else shown(part["label"]),
            str(part["offset"]),
            bytes_for_people(part["size"]),
            words[part["writable"]],
            "-" if part["file"] is None else shown(part["file"]),
        )
        for sign, part in zip(signs, partitions, strict=True)
    ]
    bar = draw_bar([(part["offset"], part["size"]) for part in partitions], signs, size, _width())
    return f"\n{table(('', 'LABEL', 'OFFSET', 'SIZE', 'WRITABLE', 'FILE'), rows, fd)}\n{bar}"


def draw_bar(spans: Sequence[tuple[int, int]], signs: Sequence[str], size: int, width: int) -> str:
    """A disk as a bar: each span in its own sign, and what belongs to none as dashes.

    Every span has at least one sign; where a line has no room for that, there are more lines. Pure.

    Args:
        spans: Offset and size, in bytes; by offset, none over another.
        signs: One for each span.
        size: Of the disk, in bytes.
        width: Of a line.
    """
    pieces, at = [], 0
    for (offset, length), sign in zip(spans, signs, strict=True):
        pieces += [("-", offset - at), (sign, length)]
        at = offset + length
    pieces = [(sign, length) for sign, length in [*pieces, ("-", size - at)] if length > 0]
    cells = width * -(-len(pieces) // width)
    bar = "".join(sign * (1 + length * (cells - len(pieces)) // size) for sign, length in pieces)
    return "".join(f"{bar[at : at + width]}\n" for at in range(0, len(bar), width))


def _width() -> int:
    return max(8, shutil.get_terminal_size().columns - 1)


def bytes_for_people(size: int) -> str:
    """A size in the largest unit that it is a whole number of, with one decimal place else."""
    if size < 1 << 10:
        return f"{size} bytes"
    power = min((size.bit_length() - 1) // 10, 6)
    unit = 1 << 10 * power
    number = str(size // unit) if size % unit == 0 else f"{size / unit:.1f}"
    return f"{number} {' KMGTPE'[power]}iB ({size} bytes)"
