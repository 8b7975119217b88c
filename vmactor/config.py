"""What to run: the raw configuration of a VM, with its files as open descriptors, and the rules it must keep.

Owns nothing by itself: a configuration borrows the descriptors of its caller, who keeps the files open until
``create_vm`` has returned. ``duplicate`` makes a copy that owns descriptors of its own; a VM lives on that.
JSON files are the business of ``config_file``, what is in a disk's file that of ``images.disks``. All is
synchronous, and no file is read.

Source: ``VirtualMachineRawConfig`` and the checks of ``createVm``; in the reference's words where it has any.
"""

import errno
import fcntl
import os
import resource
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple, Protocol, Self
from uuid import UUID

from vmactor.config_rules import (
    check_boot,
    check_guids,
    check_labels,
    check_memory,
    check_params,
    check_task_profiles,
    parse_guid,
    parse_requirement,
)
from vmactor.errors import IllegalArgumentError, ResourceExhaustedError, UnsupportedOperationError
from vmactor.messages import CpuTopology, ImageKind
from vmactor.network_config import NetworkInterface, as_interfaces, check_interfaces
from vmactor.platform_version import Version
from vmactor.strict_json import about
from vmactor.text import check_vm_name

MAX_DISKS: Final = 26
"""As many as there are letters in ``/dev/vda`` to ``/dev/vdz``; a VMM driver may take fewer."""
DISK_FORMATS: Final = (ImageKind.RAW, ImageKind.QCOW2)
"""What the file of a disk or partition can be."""

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class HasFileno(Protocol):
    """An open file, socket or the like."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


Descriptor = int | HasFileno
"""How callers name an open file."""


def descriptor_number(what: str, value: Descriptor | None) -> int | None:
    """The number of what a caller gave as a file; raises IllegalArgumentError, which begins with ``what``."""
    if value is None:
        return None
    try:
        number = value if isinstance(value, int) else value.fileno()
    except AttributeError:
        raise IllegalArgumentError(
            f"{what} must be an open file or a descriptor, not {type(value).__name__}; open a path first"
        ) from None
    except (ValueError, OSError) as error:  # closed, or a file in memory only
        raise IllegalArgumentError(f"{what} has no descriptor ({error}); give a file that is open") from None
    if type(number) is not int or not 0 <= number < 2**31:
        raise IllegalArgumentError(f"{what} must be an open file or a descriptor, not {number!r}")
    return number


def _format(what: str, value: str | None) -> ImageKind | None:
    if value is None or value in DISK_FORMATS:
        return None if value is None else ImageKind(value)
    formats = " or ".join(f'"{kind}"' for kind in DISK_FORMATS)
    raise IllegalArgumentError(f"{what} must be {formats}, or None, not {value!r:.100}")


@dataclass(frozen=True, slots=True, init=False)
class Partition:
    """A part of a composite disk.

    Attributes:
        label: Name of the partition, of 1 to 36 UTF-16 units; no two of a disk have the same.
        image: Descriptor of its contents. A writable part's size is a multiple of 4,096.
        writable: Whether the guest may write to it, if the disk is writable too.
        format: As in ``DiskImage``.
        size: Of the disk in the file, in bytes; found when a VM is made of it, and before each start.
        guid: What tells it from all others, as a UUID or its text; None for a random one at each start.
    """

    label: str
    image: int
    writable: bool = False
    format: ImageKind | None = None
    size: int | None = None
    guid: UUID | None = None

    def __init__(
        self,
        label: str,
        image: Descriptor,
        writable: bool = False,
        format: str | None = None,  # noqa: A002
        size: int | None = None,
        *,
        guid: UUID | str | None = None,
    ) -> None:
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "image", descriptor_number("partition image", image))
        object.__setattr__(self, "writable", writable)
        object.__setattr__(self, "format", _format("partition format", format))
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "guid", None if guid is None else parse_guid(guid))


@dataclass(frozen=True, slots=True, init=False)
class DiskImage:
    """A disk: an image, or partitions.

    Attributes:
        image: Descriptor of a raw or QCOW2 image: a regular file or a block device.
        writable: Whether the guest may write; the descriptor must then be open for reading and writing.
        partitions: What to put the disk together from, if there is no image.
        format: ``raw`` or ``qcow2``. Without one, a writable image is raw, and any other is what it begins
            like; so a writable QCOW2 image has to be declared. A guest could have written its header.
    """

    image: int | None
    writable: bool
    partitions: tuple[Partition, ...]
    format: ImageKind | None

    def __init__(
        self,
        image: Descriptor | None = None,
        writable: bool = False,
        partitions: Iterable[Partition] = (),
        format: str | None = None,  # noqa: A002 - the field's word
    ) -> None:
        object.__setattr__(self, "image", descriptor_number("disk image", image))
        object.__setattr__(self, "writable", writable)
        object.__setattr__(self, "partitions", tuple(partitions))
        object.__setattr__(self, "format", _format("disk format", format))


class FileUse(NamedTuple):
    """A file of a configuration, and what it is for."""

    field: str
    fd: int
    writable: bool
    disk: bool


@dataclass(frozen=True, slots=True, init=False)
class RawConfig:
    """All that makes up a VM. Give files as open files or as descriptors; the numbers are what is kept.

    ``dataclasses.replace`` gives a changed copy that borrows. ``close``, and leaving a ``with`` block, only
    closes what ``duplicate`` or ``load_config`` opened, and does it once.

    Attributes:
        name: 1 to 64 of ``A-Z``, ``a-z``, ``0-9``, ``.``, ``_``, ``-``.
        kernel: Descriptor of the kernel; exactly one of kernel and bootloader is needed.
        initrd: Descriptor of the initial RAM disk, only beside a kernel.
        bootloader: Descriptor of the firmware.
        params: Kernel command line, at most 2047 bytes.
        disks: In the order in which the guest sees them.
        protected_vm: Whether the host shall be kept out of the guest's memory.
        memory_mib: 1 to 2147483647 MiB; None for the VMM's default.
        cpu_topology: How many virtual CPUs.
        platform_version: Which platform versions will do, as a semantic version requirement.
        task_profiles: Android task profiles for the VMM.
        network: Its network interfaces; True stands for one with all defaults (docs/networking.md).
    """

    name: str
    kernel: int | None
    initrd: int | None
    bootloader: int | None
    params: str | None
    disks: tuple[DiskImage, ...]
    protected_vm: bool
    memory_mib: int | None
    cpu_topology: CpuTopology
    platform_version: str
    task_profiles: tuple[str, ...]
    network: tuple[NetworkInterface, ...]
    _owned: list[int] = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        *,
        name: str,
        kernel: Descriptor | None = None,
        initrd: Descriptor | None = None,
        bootloader: Descriptor | None = None,
        params: str | None = None,
        disks: Iterable[DiskImage] = (),
        protected_vm: bool = False,
        memory_mib: int | None = None,
        cpu_topology: CpuTopology = CpuTopology.ONE_CPU,
        platform_version: str = "*",
        task_profiles: Iterable[str] = (),
        network: bool | Iterable[NetworkInterface] = (),
    ) -> None:
        try:
            cpu_topology = CpuTopology(cpu_topology)
        except ValueError:
            raise IllegalArgumentError(
                f"Failed to parse CPU topology value: CpuTopology({cpu_topology}); use ONE_CPU or MATCH_HOST"
            ) from None
        values: dict[str, object] = {
            "name": name,
            "kernel": descriptor_number("kernel", kernel),
            "initrd": descriptor_number("initrd", initrd),
            "bootloader": descriptor_number("bootloader", bootloader),
            "params": params,
            "disks": tuple(disks),
            "protected_vm": protected_vm,
            "memory_mib": memory_mib,
            "cpu_topology": cpu_topology,
            "platform_version": platform_version,
            "task_profiles": tuple(task_profiles),
            "network": as_interfaces(network),
            "_owned": [],
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    # -- Rules -------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check everything that can be judged without looking at the files.

        Raises:
            IllegalArgumentError: A value that can never be right; the message names the field.
            UnsupportedOperationError: A protected VM with a network.
        """
        check_vm_name(self.name)
        if self.params is not None:
            check_params(self.params)
        if type(self.protected_vm) is not bool:
            raise IllegalArgumentError("protected_vm must be True or False")
        if len(self.disks) > MAX_DISKS:
            raise IllegalArgumentError(f"disks: at most {MAX_DISKS} are possible, not {len(self.disks)}")
        for i, disk in enumerate(self.disks):
            _check_disk(f"disks[{i}]", disk)
        check_memory(self.memory_mib)
        parse_requirement(self.platform_version)
        check_task_profiles(self.task_profiles)
        check_interfaces(self.network, protected_vm=self.protected_vm)
        check_boot(kernel=self.kernel, initrd=self.initrd, bootloader=self.bootloader)

    def check_platform(self, actual: Version) -> None:
        """Check that a VMM driver's platform version will do.

        Raises:
            UnsupportedOperationError: It will not.
            IllegalArgumentError: ``platform_version`` is not a requirement.
        """
        requirement = parse_requirement(self.platform_version)
        if not requirement.matches(actual):
            raise UnsupportedOperationError(
                "Incompatible platform version. The config is compatible with platform version(s) "
                f"{requirement}, but the actual platform version is {actual}"
            )

    def check_descriptors(self) -> None:
        """Check that every file is open, in a mode that fits its use, and a file at all. Does not block.

        A read-only descriptor under a writable disk is refused here, since a VMM would notice it only late.
        To be sure of what is checked, check a duplicate: nobody else can close it.

        Raises:
            IllegalArgumentError: One of them is not; the message names the field.
        """
        for file in self._files():
            check_file(file)

    # -- Descriptors -------------------------------------------------------------------------------

    def _files(self) -> Iterator[FileUse]:
        for name in ("kernel", "initrd", "bootloader"):
            if (fd := getattr(self, name)) is not None:
                yield FileUse(name, fd, writable=False, disk=False)
        for i, disk in enumerate(self.disks):
            if disk.image is not None:
                yield FileUse(f"disks[{i}].image", disk.image, disk.writable, disk=True)
            for j, part in enumerate(disk.partitions):
                yield FileUse(f"disks[{i}].partitions[{j}].image", part.image, part.writable, disk=True)

    def fds(self) -> tuple[int, ...]:
        """Every descriptor, each once, in ascending order."""
        return tuple(sorted({file.fd for file in self._files()}))

    def duplicate(self) -> Self:
        """Return a copy that owns duplicates of the descriptors, close-on-exec and above 2.

        All or nothing: after an error no descriptor is left.

        Raises:
            IllegalArgumentError: A descriptor is not open; the message names the field.
            ResourceExhaustedError: This process may not have that many descriptors.
        """
        copies = duplicate_files(list(self._files()))
        left = iter(copies)
        kernel, initrd, bootloader = (
            None if fd is None else next(left) for fd in (self.kernel, self.initrd, self.bootloader)
        )
        disks = tuple(
            DiskImage(
                None if disk.image is None else next(left),
                disk.writable,
                [replace(part, image=next(left)) for part in disk.partitions],
                disk.format,
            )
            for disk in self.disks
        )
        owner = replace(self, kernel=kernel, initrd=initrd, bootloader=bootloader, disks=disks)
        object.__setattr__(owner, "_owned", copies)
        return owner

    def close(self) -> None:
        """Close the descriptors that this configuration owns; nothing if it borrows or was closed before."""
        close_files(self._owned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_kind(field_path: str, mode: int, *, disk: bool) -> None:
    """Check by its ``st_mode`` that a file can be what it is meant for. Raises IllegalArgumentError."""
    if not stat.S_ISREG(mode) and not (disk and stat.S_ISBLK(mode)):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        wanted = "a regular file or a block device" if disk else "a regular file"
        raise IllegalArgumentError(f"{field_path}: is {kind}; give {wanted}")


def _check_disk(path: str, disk: DiskImage) -> None:
    if not isinstance(disk, DiskImage) or type(disk.writable) is not bool:
        raise IllegalArgumentError(f"{path} must be a DiskImage whose writable is True or False")
    if disk.image is not None and disk.partitions:
        raise IllegalArgumentError(f"{path}: DiskImage contains both image and partitions.")
    if disk.image is None and not disk.partitions:
        raise IllegalArgumentError(f"{path}: DiskImage didn't contain image or partitions.")
    if disk.partitions and disk.format is not None:
        raise IllegalArgumentError(f"{path}: a disk of partitions has no format; give it to the partitions")
    if disk.partitions:
        with about(path):
            check_labels([part.label for part in disk.partitions])
            check_guids(part.guid for part in disk.partitions)
        if not all(type(part.writable) is bool for part in disk.partitions):
            raise IllegalArgumentError(f"{path}: writable of each partition must be True or False")


# -- Descriptors -------------------------------------------------------------------------------------


def check_file(file: FileUse) -> None:
    """Check that a descriptor is open, in a mode that fits its use. Raises IllegalArgumentError."""
    flags = _check_open(file)
    check_kind(file.field, os.fstat(file.fd).st_mode, disk=file.disk)
    if flags & os.O_PATH:
        problem = "was opened with O_PATH and cannot be read; open it for reading"
    elif file.writable and flags & os.O_ACCMODE != os.O_RDWR:
        problem = "belongs to a writable disk; open it for reading and writing"
    elif file.writable and flags & os.O_APPEND:
        problem = "is in append mode, where all writes go to the end; open it without O_APPEND"
    elif flags & os.O_ACCMODE not in {os.O_RDONLY, os.O_RDWR}:
        problem = "is open for writing only; open it for reading"
    else:
        return
    raise IllegalArgumentError(f"{file.field}: descriptor {file.fd} {problem}")


def duplicate_files(files: Sequence[FileUse]) -> list[int]:
    """Duplicate all descriptors or none, close-on-exec and above 2.

    Raises:
        IllegalArgumentError: A descriptor is not open; the message names the field.
        ResourceExhaustedError: This process may not have that many descriptors.
    """
    for file in files:
        _check_open(file)  # all of them first, since a duplicate may take the number of one that is not
    copies: list[int] = []
    try:
        for file in files:
            copies.append(_duplicate(file))  # noqa: PERF401 - what was made before an error must be known
    except BaseException:
        close_files(copies)
        raise
    return copies


def no_descriptors(what: str) -> ResourceExhaustedError:
    """The error for a file that could not be opened because of a limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ResourceExhaustedError(
        f"{what}: no descriptor left; this process may have {limit} (raise it with 'ulimit -n' or, for a "
        "service, LimitNOFILE=), and the host as many as the sysctl fs.file-max"
    )


def _check_open(file: FileUse) -> int:
    """The descriptor's status flags, if it is open."""
    try:
        return fcntl.fcntl(file.fd, fcntl.F_GETFL)
    except OSError:
        raise IllegalArgumentError(
            f"{file.field}: descriptor {file.fd} is not open; keep it so until create_vm has returned"
        ) from None


def _duplicate(file: FileUse) -> int:
    try:
        return fcntl.fcntl(file.fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as error:
        if error.errno == errno.EBADF:  # closed by another thread since it was checked
            _check_open(file)
        raise no_descriptors(file.field) from error


@contextmanager
def duplicated(what: str, file: Descriptor) -> Iterator[int]:
    """Lend a duplicate of a descriptor, close-on-exec and above 2, and close it afterwards.

    Raises:
        IllegalArgumentError: It is no descriptor, or not open; the message begins with ``what``.
        ResourceExhaustedError: This process may not have more descriptors.
    """
    fd = descriptor_number(what, file)
    if fd is None:
        raise IllegalArgumentError(f"{what} must be an open file or a descriptor, not None")
    copy = _duplicate(FileUse(what, fd, writable=False, disk=False))
    try:
        yield copy
    finally:
        os.close(copy)


def close_files(fds: list[int]) -> None:
    """Close descriptors and forget them."""
    while fds:
        os.close(fds.pop())
