"""Raw configurations in JSON files of the reference's ``VmConfig`` shape.

``parse_config`` is pure and gives paths; ``load_config`` opens them. Every error names the field it is
about, as in ``disks[1].image``. Stricter than the reference: a field that nobody knows is an error, and
fields of later AOSP versions are refused by name where vmactor has nothing for them, since a VM without
what its file asks for is worse than none. ``cpu_topology``, ``task_profiles`` and ``format`` are our
additions.
"""

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from vmactor.config import (
    DISK_FORMATS,
    MAX_DISKS,
    DiskImage,
    Partition,
    RawConfig,
    check_kind,
    no_descriptors,
)
from vmactor.config_rules import (
    MAX_PARTITIONS,
    MAX_TASK_PROFILES,
    check_boot,
    check_label,
    check_memory,
    check_params,
    check_task_profiles,
    parse_guid,
    parse_requirement,
)
from vmactor.errors import IllegalArgumentError
from vmactor.messages import CpuTopology, ImageKind
from vmactor.network_config import (
    MAX_INTERFACES,
    NetworkInterface,
    NetworkMode,
    as_interfaces,
    check_interfaces,
)
from vmactor.strict_json import (
    MAX_BYTES,
    about,
    flag,
    list_of,
    object_of,
    or_null,
    read_json,
    text,
    whole_number,
    wrong,
)
from vmactor.text import check_vm_name, escape

DEFAULT_NAME: Final = "VmRun"
"""Name of a VM whose file has none; the reference's command line uses it always."""

_MAX_PATH: Final = 4095
_TOPOLOGIES: Final = {"one_cpu": CpuTopology.ONE_CPU, "match_host": CpuTopology.MATCH_HOST}
# Fields of later versions of the reference and of its launchers' files, in snake case, by what to do instead.
_LATER: Final = {
    name: hint
    for hint, names in {
        "consoles only go to files": "console_input_device console_in console_out connect_console",
        "start the VM without a debugger": "gdb_port",
        "write kernel parameters to params": "extra_kernel_cmdline_params",
        "give initrd and kernel themselves": "custom_kernel_image custom_config os_name",
        "devices cannot be assigned yet": "devices assignable_devices vfio_devices dtbo tee_services",
        "device trees cannot be changed": "device_tree_overlays dump_dt_fd reference_dt",
        "use network": "network_supported",
        "guests reach the host by vsock and network": "host_services",
        "shared directories are not supported yet; use a disk": "shared_path shared_paths",
        "VMs have no screen, sound or input devices": "display display_config gpu gpu_config audio "
        "audio_config input input_devices usb usb_config",
        "the VMM's defaults are used": "hugepages huge_pages balloon no_balloon "
        "auto_memory_balloon swiotlb_mib custom_memory_backing_files",
        "use cpu_topology": "cpus cpu_options host_cpu_topology cpu_affinity",
        "the VMM's threads run with the host's defaults": "boost_uclamp rt_cpus",
        "vmactor shows a guest's console without it": "debuggable debug_level host_console_name",
        "instance identities are not supported yet": "instance_id instance_id_file want_updatable",
        "snapshots are not supported yet": "snapshot start_suspended",
        "it belongs to the host's hypervisor": "enable_hypervisor_specific_auth_method enable_guest_ffa",
        "not for raw configurations": "apk idsig payload vendor_image encrypted_storage_image",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionFile:
    """A partition as a file names it."""

    label: str
    path: str
    writable: bool = False
    format: ImageKind | None = None
    guid: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFile:
    """A disk as a file names it: an image, or at least one partition."""

    image: str | None = None
    partitions: tuple[PartitionFile, ...] = ()
    writable: bool
    format: ImageKind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfigFile:
    """What a configuration file says. Paths are as written; fields are as in ``RawConfig``.

    Attributes:
        platform_version: In canonical form, so ``1.0`` is ``^1.0``.
        protected: Whether a protected VM is wanted.
    """

    name: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    bootloader: str | None = None
    params: str | None = None
    disks: tuple[DiskFile, ...] = ()
    protected: bool = False
    memory_mib: int | None = None
    platform_version: str
    cpu_topology: CpuTopology = CpuTopology.ONE_CPU
    task_profiles: tuple[str, ...] = ()
    network: tuple[NetworkInterface, ...] = ()


# -- Reading values -----------------------------------------------------------------------------------


def _file_path(value: object, path: str) -> str:
    wanted = f"a path of 1 to {_MAX_PATH} bytes without NUL"
    if not isinstance(value, str):
        raise wrong(path, wanted, value)
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise wrong(path, wanted + " and in proper Unicode", value) from None
    if not 1 <= length <= _MAX_PATH or "\0" in value:
        raise wrong(path, wanted, value)
    return value


def _label(value: object, path: str) -> str:
    with about(path):
        return check_label(value)


def _name(value: object, path: str) -> str:
    name = text(value, path)
    with about(path):
        return check_vm_name(name)


def _params(value: object, path: str) -> str:
    params = text(value, path)
    check_params(params)
    return params


def _memory(value: object, path: str) -> int:
    if type(value) is not int or value < 1:
        raise wrong(path, "a whole number of MiB from 1", value)
    check_memory(value)
    return value


def _requirement(value: object, path: str) -> str:
    requirement = text(value, path)
    with about(path):
        return str(parse_requirement(requirement))


def _topology(value: object, path: str) -> CpuTopology:
    topology = _TOPOLOGIES.get(value) if isinstance(value, str) else None
    if topology is None:
        raise wrong(path, '"one_cpu" or "match_host"', value)
    return topology


def _format(value: object, path: str) -> ImageKind:
    if not isinstance(value, str) or value not in DISK_FORMATS:
        raise wrong(path, " or ".join(f'"{kind}"' for kind in DISK_FORMATS), value)
    return ImageKind(value)


def _guid(value: object, path: str) -> UUID:
    with about(path):
        return parse_guid(text(value, path))


_PARTITION: Final = object_of(
    PartitionFile,
    "label path",
    _LATER,
    label=_label,
    path=_file_path,
    writable=flag,
    format=or_null(_format),
    guid=or_null(_guid),
)
_DISK: Final = object_of(
    DiskFile,
    "writable",
    _LATER,
    image=or_null(_file_path),
    partitions=list_of(_PARTITION, MAX_PARTITIONS),
    writable=flag,
    format=or_null(_format),
)


def _mode(value: object, path: str) -> NetworkMode:
    if not isinstance(value, str) or value not in tuple(NetworkMode):
        raise wrong(path, '"bridge" or "routed"', value)
    return NetworkMode(value)


_INTERFACE: Final = object_of(
    NetworkInterface,
    "",
    _LATER,
    mode=_mode,
    bridge=or_null(text),
    name=or_null(text),
    mac=or_null(text),
    mtu=whole_number(0),
    address=or_null(text),
    gateway=or_null(text),
    isolated=flag,
    to_guest_kbit=or_null(whole_number(0)),
    from_guest_kbit=or_null(whole_number(0)),
    configure_guest=flag,
)
_INTERFACES: Final = list_of(_INTERFACE, MAX_INTERFACES)


def _network(value: object, path: str) -> tuple[NetworkInterface, ...]:
    return as_interfaces(value) if isinstance(value, bool) else _INTERFACES(value, path)


_CONFIG: Final = object_of(
    VmConfigFile,
    "platform_version",
    _LATER,
    name=or_null(_name),
    kernel=or_null(_file_path),
    initrd=or_null(_file_path),
    bootloader=or_null(_file_path),
    params=or_null(_params),
    disks=list_of(_DISK, MAX_DISKS),
    protected=flag,
    memory_mib=or_null(_memory),
    platform_version=_requirement,
    cpu_topology=_topology,
    task_profiles=list_of(text, MAX_TASK_PROFILES),
    network=_network,
)


def parse_config(data: str | bytes) -> VmConfigFile:
    """Read a configuration from the text of a file. Pure; the paths in it are not looked at.

    Raises:
        IllegalArgumentError: It is not JSON, too large, or a field is unknown, missing, doubled or wrong.
        UnsupportedOperationError: A field of a later AOSP version, which vmactor does not support.
    """
    config = _CONFIG(read_json(data), "")
    check_boot(kernel=config.kernel, initrd=config.initrd, bootloader=config.bootloader)
    check_task_profiles(config.task_profiles)
    check_interfaces(config.network, protected_vm=config.protected)
    for i, disk in enumerate(config.disks):
        if (disk.image is None) == (not disk.partitions):
            was = "neither" if disk.image is None else "both"
            raise IllegalArgumentError(
                f"disks[{i}]: Exactly one of image and partitions must be specified. (Was {was}.)"
            )
    return config


# -- Files --------------------------------------------------------------------------------------------


def open_file(
    opened: contextlib.ExitStack, what: str, path: Path, *, writable: bool = False, disk: bool = False
) -> int:
    """Open a file after a look at what it is: to open a pipe may block, to open a device may have effects.

    Args:
        opened: Closes it.
        what: What an error begins with.
        path: A regular file.
        writable: Whether to open it for writing, too.
        disk: Whether it may also be a block device.

    Raises:
        IllegalArgumentError: It cannot be opened, or is something else.
        ResourceExhaustedError: No descriptor is left.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            check_kind(what, os.fstat(place).st_mode, disk=disk)
            mode = os.O_RDWR if writable else os.O_RDONLY
            fd = os.open(f"/proc/self/fd/{place}", mode | os.O_CLOEXEC)
        finally:
            os.close(place)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise no_descriptors(what) from error
        raise IllegalArgumentError(
            f'{what}: Failed to open "{escape(str(path))}": {error.strerror}'
        ) from error
    except ValueError:  # NUL or a lone surrogate
        raise IllegalArgumentError(f'{what}: "{escape(str(path))}" is no path') from None
    opened.callback(os.close, fd)
    return fd


def _read(fd: int) -> bytes:
    try:
        with open(fd, "rb", closefd=False) as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise IllegalArgumentError(f"cannot be read: {error.strerror}") from error


def load_config(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    locate: Callable[[Path], Path] | None = None,
) -> RawConfig:
    """Read a configuration file and open all files that it names, relative to its own directory.

    Blocks as long as the file systems do: call it in a thread.

    Args:
        path: The JSON file.
        name: The VM's name, whatever the file says; without it the file's, else ``VmRun``.
        locate: Says where a file that it names really is, if elsewhere.

    Returns:
        A configuration that owns its descriptors: use it in a ``with`` block, or ``close`` it. After an error
        nothing is left open.

    Raises:
        IllegalArgumentError: The file, a field or a file that it names is wrong; the message says which.
        UnsupportedOperationError: As ``parse_config``.
        ResourceExhaustedError: No descriptor is left.
    """
    path = Path(path)
    with contextlib.ExitStack() as opened:
        fd = open_file(opened, "configuration file", path)
        with about(f'"{escape(str(path))}"'):
            config = parse_config(_read(fd))

            def file(what: str, given: str, *, writable: bool = False, disk: bool = False) -> int:
                place = path.parent / given
                return open_file(
                    opened, what, locate(place) if locate else place, writable=writable, disk=disk
                )

            def boot_file(what: str, given: str | None) -> int | None:
                return None if given is None else file(what, given)

            disks: list[DiskImage] = []
            for i, disk in enumerate(config.disks):
                at = f"disks[{i}]"
                image = None
                if disk.image is not None:
                    image = file(f"{at}.image", disk.image, writable=disk.writable, disk=True)
                parts = []
                for j, part in enumerate(disk.partitions):
                    part_file = file(
                        f"{at}.partitions[{j}].path", part.path, writable=part.writable, disk=True
                    )
                    parts.append(Partition(part.label, part_file, part.writable, part.format, guid=part.guid))
                disks.append(DiskImage(image, disk.writable, parts, disk.format))
            # The duplicates are the result; the originals are closed in any case.
            return RawConfig(
                name=name or config.name or DEFAULT_NAME,
                kernel=boot_file("kernel", config.kernel),
                initrd=boot_file("initrd", config.initrd),
                bootloader=boot_file("bootloader", config.bootloader),
                params=config.params,
                disks=disks,
                protected_vm=config.protected,
                memory_mib=config.memory_mib,
                cpu_topology=config.cpu_topology,
                platform_version=config.platform_version,
                task_profiles=config.task_profiles,
                network=config.network,
            ).duplicate()
