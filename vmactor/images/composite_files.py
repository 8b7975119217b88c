"""Composite disks in files, as ``crosvm create_composite`` makes them: by paths, not by descriptors.

Four files are written: the specification, and beside it ``.header``, ``.footer`` and ``.filler``. Unlike with
crosvm's command nothing that exists is overwritten, and all paths are written as absolute ones: crosvm looks
relative ones up from the directory of the specification, though it sized the files from its own.
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from vmactor.errors import ImageError
from vmactor.images.composite import (
    GRANULE,
    Extent,
    Made,
    Part,
    Specification,
    plan,
    write_specification,
)
from vmactor.images.files import open_image
from vmactor.images.kinds import inspect
from vmactor.strict_json import about
from vmactor.text import escape


@dataclass(frozen=True, slots=True)
class PartFile:
    """A partition by the path of its file.

    Attributes:
        label: Its name.
        path: An image of any format that crosvm reads.
        writable: Whether the guest may write to it, if the disk is writable.
        guid: What tells it from all others; None for a random one.
    """

    label: str
    path: Path
    writable: bool = False
    guid: UUID | None = None


def create_composite(path: Path, files: Sequence[PartFile]) -> Specification:
    """Write the files of a composite disk; after an error there are none of them.

    Blocks as long as the file systems do.

    Returns:
        What is in the specification file.

    Raises:
        IllegalArgumentError: A label, or the number of partitions.
        ImageError: A partition cannot be read or has a wrong size; a file to be written exists, or cannot be.
    """
    laid_out = plan([Part(file.label, _size(file), file.writable, file.guid) for file in files])
    path = path.absolute()
    made = {source: path.with_name(f"{path.name}.{source.value}") for source in Made}
    extents = []
    for component in laid_out.components:
        source = component.source
        file = made[source] if isinstance(source, Made) else files[source].path.absolute()
        extents.append(Extent(str(file), component.offset, component.writable))
    specification = Specification(tuple(extents), laid_out.size)
    contents = {
        path: write_specification(specification),
        made[Made.HEADER]: laid_out.header,
        made[Made.FOOTER]: laid_out.footer,
        made[Made.FILLER]: bytes(GRANULE),
    }
    with ExitStack() as undo:
        for name, data in contents.items():
            _write_new(name, data, undo)
        undo.pop_all()
    return specification


def _size(file: PartFile) -> int:
    with about(f'Partition "{escape(file.label)}": {escape(str(file.path))}'):
        try:
            fd = open_image(file.path)
        except OSError as error:
            raise ImageError(f"cannot be opened: {error.strerror}") from error
        try:
            size = inspect(fd).virtual_size
        finally:
            os.close(fd)
        if size is None:
            raise ImageError("is compressed, and the size of the disk in it is unknown; decompress it first")
        return size


def _write_new(path: Path, data: bytes, undo: ExitStack) -> None:
    try:
        with path.open("xb") as file:
            undo.callback(path.unlink, missing_ok=True)
            file.write(data)
    except FileExistsError:
        raise ImageError(
            f'Failed to create "{escape(str(path))}": it exists; remove it, or choose another name'
        ) from None
    except OSError as error:
        raise ImageError(f'Failed to create "{escape(str(path))}": {error.strerror}') from error
