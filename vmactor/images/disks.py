"""Which files may be a VM's disks: looked at before every start, since a guest may have changed them.

crosvm judges an image by its first bytes, and a guest writes the first bytes of its raw disk. So it could
write a header that names any file of the host as what to read where the disk is empty, and read that file
after the next start. Therefore a file is only given to a VMM as what its configuration says it is, and if
it names no other file.
"""

from dataclasses import replace
from typing import Final

from vmactor.config import RawConfig
from vmactor.errors import ImageError, UnsafeImageError, UnsupportedOperationError
from vmactor.images import qcow2
from vmactor.images.composite import disk_size
from vmactor.images.kinds import detect
from vmactor.messages import ImageKind
from vmactor.strict_json import about
from vmactor.text import escape

_NAMES: Final = {
    ImageKind.RAW: "a raw image",
    ImageKind.QCOW2: "a QCOW2 image",
    ImageKind.COMPOSITE: "a composite disk",
    ImageKind.ANDROID_SPARSE: "an Android sparse image",
    ImageKind.ZSTD: "compressed with zstd",
}
_REMEDIES: Final = {
    ImageKind.QCOW2: 'if a guest wrote that, do not use it; if you did, say format="qcow2" for the disk',
    ImageKind.COMPOSITE: "give the files that it describes as partitions of the disk",
    ImageKind.ANDROID_SPARSE: "convert it with 'simg2img'",
    ImageKind.ZSTD: "decompress it with 'zstd -d'",
}


def lock_formats(config: RawConfig) -> RawConfig:
    """Look at the file of every disk and partition, and say of each what it is.

    A file without a declared format is a raw image if it is writable, else a raw or QCOW2 image as it is.
    Blocks as long as the storage does: call it in a thread.

    Returns:
        The configuration with the format of every disk and partition set, and the size of each partition.
        Given again before a later start, it also refuses what has changed its format since.

    Raises:
        UnsafeImageError: A writable raw image begins like another format, so a guest may have written that;
            or a QCOW2 image has a backing file or an external data file.
        UnsupportedOperationError: A format, or a feature of QCOW2, that VMMs do not take or not alike.
        ImageError: A file cannot be read, is broken, or is not what it was declared as.
    """
    disks = []
    for i, disk in enumerate(config.disks):
        image = disk.image
        kind = disk.format
        if image is not None:
            kind = _lock(f"disks[{i}].image", image, disk.writable, disk.format)
        partitions = []
        for j, part in enumerate(disk.partitions):
            at = f"disks[{i}].partitions[{j}].image"
            found = _lock(at, part.image, part.writable, part.format)
            with about(at):
                partitions.append(replace(part, format=found, size=disk_size(part.image, found)))
        disks.append(replace(disk, format=kind, partitions=tuple(partitions)))
    return replace(config, disks=tuple(disks))


def _lock(field: str, fd: int, writable: bool, declared: ImageKind | None) -> ImageKind:
    try:
        kind = detect(fd)
        wanted = declared or (ImageKind.RAW if writable else kind)
        if kind in _REMEDIES and writable and wanted is ImageKind.RAW:
            raise UnsafeImageError(
                f"{field}: is a writable raw image, and begins like {_NAMES[kind]}; {_REMEDIES[kind]}"
            )
        if kind not in (ImageKind.RAW, ImageKind.QCOW2):
            raise UnsupportedOperationError(
                f"{field}: is {_NAMES[kind]}, and only raw and QCOW2 images can be disks; {_REMEDIES[kind]}"
            )
        if kind is not wanted:
            raise ImageError(f"is {_NAMES[kind]}, and its format is said to be {wanted}; correct the format")
        if kind is ImageKind.QCOW2:
            _check_qcow2(field, qcow2.read(fd))
    except ImageError as error:
        raise ImageError(f"{field}: {error}") from error
    return kind


def _check_qcow2(field: str, header: qcow2.Qcow2) -> None:
    """Take only what every VMM reads alike: crosvm ignores the features that it does not know."""
    for what, name in (("backing file", header.backing_file), ("external data file", header.data_file)):
        if name is not None:
            raise UnsafeImageError(
                f'{field}: is a QCOW2 image with the {what} "{escape(name, limit=200)}"; images that name '
                "other files are not used, make it one with 'qemu-img convert -O qcow2'"
            )
    problem = None
    if header.version != 3 or header.refcount_bits != 16:
        problem = f"version {header.version} with reference counts of {header.refcount_bits} bits"
    elif header.encrypted:
        problem = "encryption"
    elif header.snapshots:
        problem = "internal snapshots"
    elif header.incompatible_features:
        problem = f"incompatible features {header.incompatible_features:#x}"
    elif header.virtual_size > qcow2.MAX_SIZE:
        problem = f"a size of {header.virtual_size} bytes"
    if problem is not None:
        raise UnsupportedOperationError(
            f"{field}: is a QCOW2 image with {problem}, which not all VMMs read alike; convert it with "
            "'qemu-img convert -O qcow2'"
        )
