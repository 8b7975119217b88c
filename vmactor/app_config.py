"""What to run: the configuration of a VM that runs an app's payload in Microdroid, from an APK.

As ``config`` does for raw configurations, this borrows the descriptors of its caller and never looks into a
file. ``microdroid.translate`` makes a raw configuration of it (docs/apps.md).

Source: ``VirtualMachineAppConfig`` of the reference. ``extra_apks``, ``os_name``, ``custom_kernel`` and
``extra_params`` are of its later versions.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final, Self

from vmactor.config import (
    Descriptor,
    FileUse,
    check_file,
    close_files,
    descriptor_number,
    duplicate_files,
)
from vmactor.config_rules import check_memory, check_params, check_task_profiles
from vmactor.errors import IllegalArgumentError
from vmactor.messages import CpuTopology, DebugLevel
from vmactor.network_config import as_interfaces, check_interfaces
from vmactor.text import check_vm_name, escape

MICRODROID: Final = "microdroid"
"""The guest that apps run in, unless they ask for another."""
MAX_EXTRA_APKS: Final = 60
"""Each has two partitions on a disk of 128, which also holds the APK and the APEXes."""
MAX_NAME: Final = 255
"""Longest name of a payload's binary in bytes: that of a file."""
MAX_CONFIG_PATH: Final = 4000
"""Longest path of a payload's configuration in bytes; the guest puts its mount point before it."""

_OS_NAME: Final = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, init=False)
class AppConfig:
    """A payload from an APK, and the VM around it. Give files as open files or as descriptors.

    ``dataclasses.replace`` gives a changed copy that borrows. ``close``, and leaving a ``with`` block, only
    closes what ``duplicate`` made.

    Attributes:
        name: As in ``RawConfig``.
        apk: Descriptor of the APK, open for reading.
        idsig: Descriptor of its idsig file.
        instance_image: Descriptor of the instance image: a QCOW2 image that
            ``initialize_writable_partition`` made, open for reading and writing. The guest keeps in it what
            it saw at its first boot.
        config_path: Path of the payload's configuration inside the APK; either this or the next is given.
        payload_binary_name: Name of the payload's binary inside the APK, without a directory.
        extra_apks: Descriptors of more APKs for the payload, in the order of ``extra_apks`` in the payload's
            configuration. The service opens no path that stands in an APK: the client does, for example with
            ``microdroid.open_extra_apks``.
        extra_idsigs: Descriptors of their idsig files, in the same order.
        encrypted_storage_image: Descriptor of the encrypted store, made like the instance image.
        debug_level: How much of the VM can be looked into.
        protected_vm: As in ``RawConfig``.
        memory_mib: As in ``RawConfig``; None for what the guest's own configuration says.
        cpu_topology: As in ``RawConfig``.
        task_profiles: As in ``RawConfig``.
        os_name: Which guest of the platform to run.
        custom_kernel: Descriptor of a kernel to run in place of the guest's own.
        extra_params: Put behind the guest's own kernel command line.
        network: Whether it has a network interface, with all defaults (docs/networking.md).
    """

    name: str
    apk: int
    idsig: int
    instance_image: int
    config_path: str | None
    payload_binary_name: str | None
    extra_apks: tuple[int, ...]
    extra_idsigs: tuple[int, ...]
    encrypted_storage_image: int | None
    debug_level: DebugLevel
    protected_vm: bool
    memory_mib: int | None
    cpu_topology: CpuTopology
    task_profiles: tuple[str, ...]
    os_name: str
    custom_kernel: int | None
    extra_params: str | None
    network: bool
    _owned: list[int] = field(init=False, repr=False, compare=False)

    def __init__(
        self,
        *,
        name: str,
        apk: Descriptor,
        idsig: Descriptor,
        instance_image: Descriptor,
        config_path: str | None = None,
        payload_binary_name: str | None = None,
        extra_apks: Iterable[Descriptor] = (),
        extra_idsigs: Iterable[Descriptor] = (),
        encrypted_storage_image: Descriptor | None = None,
        debug_level: DebugLevel = DebugLevel.NONE,
        protected_vm: bool = False,
        memory_mib: int | None = None,
        cpu_topology: CpuTopology = CpuTopology.ONE_CPU,
        task_profiles: Iterable[str] = (),
        os_name: str = MICRODROID,
        custom_kernel: Descriptor | None = None,
        extra_params: str | None = None,
        network: bool = False,
    ) -> None:
        try:
            debug_level = DebugLevel(debug_level)
        except ValueError:
            raise IllegalArgumentError(
                f"unsupported debug level: DebugLevel({debug_level!s:.40}); use NONE or FULL"
            ) from None
        try:
            cpu_topology = CpuTopology(cpu_topology)
        except ValueError:
            raise IllegalArgumentError(
                f"Failed to parse CPU topology value: CpuTopology({cpu_topology!s:.40}); use ONE_CPU or "
                "MATCH_HOST"
            ) from None
        values: dict[str, object] = {
            "name": name,
            "apk": _required("apk", apk),
            "idsig": _required("idsig", idsig),
            "instance_image": _required("instance_image", instance_image),
            "config_path": config_path,
            "payload_binary_name": payload_binary_name,
            "extra_apks": tuple(_required(f"extra_apks[{i}]", file) for i, file in enumerate(extra_apks)),
            "extra_idsigs": tuple(
                _required(f"extra_idsigs[{i}]", file) for i, file in enumerate(extra_idsigs)
            ),
            "encrypted_storage_image": descriptor_number("encrypted_storage_image", encrypted_storage_image),
            "debug_level": debug_level,
            "protected_vm": protected_vm,
            "memory_mib": memory_mib,
            "cpu_topology": cpu_topology,
            "task_profiles": tuple(task_profiles),
            "os_name": os_name,
            "custom_kernel": descriptor_number("custom_kernel", custom_kernel),
            "extra_params": extra_params,
            "network": network,
            "_owned": [],
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @property
    def debuggable(self) -> bool:
        """Whether the guest shows what it does."""
        return self.debug_level is not DebugLevel.NONE

    # -- Rules -------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check everything that can be judged without looking at the files.

        Raises:
            IllegalArgumentError: A value that can never be right; the message names the field.
            UnsupportedOperationError: A protected VM with a network.
        """
        check_vm_name(self.name)
        if self.config_path is not None and self.payload_binary_name is not None:
            raise IllegalArgumentError("Only one of config_path and payload_binary_name can be defined")
        if self.config_path is not None:
            _check_config_path(self.config_path)
        elif self.payload_binary_name is not None:
            _check_binary_name(self.payload_binary_name)
        else:
            raise IllegalArgumentError("Either config_path or payload_binary_name must be defined")
        if max(len(self.extra_apks), len(self.extra_idsigs)) > MAX_EXTRA_APKS:
            raise IllegalArgumentError(f"extra_apks: at most {MAX_EXTRA_APKS} are possible")
        if type(self.protected_vm) is not bool:
            raise IllegalArgumentError("protected_vm must be True or False")
        if type(self.network) is not bool:
            raise IllegalArgumentError("network must be True or False; only raw configurations have more")
        check_interfaces(as_interfaces(self.network), protected_vm=self.protected_vm)
        check_memory(self.memory_mib)
        check_task_profiles(self.task_profiles)
        if not isinstance(self.os_name, str) or not _OS_NAME.fullmatch(self.os_name):
            raise IllegalArgumentError(
                f'Unknown OS "{escape(str(self.os_name), limit=100)}"; the name of a guest has 1 to 64 of '
                "A-Z, a-z, 0-9, '.', '_' and '-'"
            )
        if self.extra_params is not None:
            check_params(self.extra_params)

    def check_descriptors(self) -> None:
        """As ``RawConfig.check_descriptors``; no file may be a device, unless it is an image.

        Raises:
            IllegalArgumentError: One is not open, in a wrong mode, or no file; the message names the field.
        """
        for file in self._files():
            check_file(file)

    # -- Descriptors -------------------------------------------------------------------------------

    def _files(self) -> Iterator[FileUse]:
        yield FileUse("apk", self.apk, writable=False, disk=False)
        yield FileUse("idsig", self.idsig, writable=False, disk=False)
        yield FileUse("instance_image", self.instance_image, writable=True, disk=True)
        for name in ("extra_apks", "extra_idsigs"):
            for i, fd in enumerate(getattr(self, name)):
                yield FileUse(f"{name}[{i}]", fd, writable=False, disk=False)
        if self.encrypted_storage_image is not None:
            yield FileUse("encrypted_storage_image", self.encrypted_storage_image, writable=True, disk=True)
        if self.custom_kernel is not None:
            yield FileUse("custom_kernel", self.custom_kernel, writable=False, disk=False)

    def fds(self) -> tuple[int, ...]:
        """Every descriptor, each once, in ascending order."""
        return tuple(sorted({file.fd for file in self._files()}))

    def duplicate(self) -> Self:
        """Return a copy that owns duplicates of the descriptors, as ``RawConfig.duplicate`` does.

        Raises:
            IllegalArgumentError: A descriptor is not open; the message names the field.
            ResourceExhaustedError: This process may not have that many descriptors.
        """
        copies = duplicate_files(list(self._files()))
        left = iter(copies)
        owner = replace(
            self,
            apk=next(left),
            idsig=next(left),
            instance_image=next(left),
            extra_apks=tuple(next(left) for _ in self.extra_apks),
            extra_idsigs=tuple(next(left) for _ in self.extra_idsigs),
            encrypted_storage_image=None if self.encrypted_storage_image is None else next(left),
            custom_kernel=None if self.custom_kernel is None else next(left),
        )
        object.__setattr__(owner, "_owned", copies)
        return owner

    def close(self) -> None:
        """Close the descriptors that this configuration owns; nothing if it borrows or was closed before."""
        close_files(self._owned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _required(what: str, value: Descriptor) -> int:
    number = descriptor_number(what, value)
    if number is None:
        raise IllegalArgumentError(f"{what} must be an open file or a descriptor, not None")
    return number


def _check_binary_name(name: object) -> None:
    if isinstance(name, str) and "/" in name:
        raise IllegalArgumentError(
            f"Payload binary name must not specify a path: {escape(name, limit=100)}; give the name alone"
        )
    if name in (".", "..") or not _is_file_name(name, MAX_NAME):
        raise IllegalArgumentError(
            f"payload_binary_name must be the name of a file, of 1 to {MAX_NAME} bytes without NUL"
        )


def _check_config_path(path: object) -> None:
    if not isinstance(path, str) or not _is_file_name(path, MAX_CONFIG_PATH):
        raise IllegalArgumentError(
            f"config_path must be a path in the APK, of 1 to {MAX_CONFIG_PATH} bytes without NUL"
        )
    if not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise IllegalArgumentError(
            f'config_path "{escape(path, limit=200)}" must name a file in the APK from its root, without '
            "'.', '..' and doubled slashes"
        )


def _is_file_name(text: object, most: int) -> bool:
    try:
        return isinstance(text, str) and 1 <= len(text.encode()) <= most and "\0" not in text
    except UnicodeEncodeError:
        return False
