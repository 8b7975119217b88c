"""Rules on single values of a configuration, the same for ``RawConfig`` and for JSON files. Pure."""

import re
from collections.abc import Iterable, Sequence
from typing import Final, cast
from uuid import UUID

from vmactor.errors import IllegalArgumentError
from vmactor.platform_version import VersionRequirement
from vmactor.text import escape

MAX_PARAMS: Final = 2047
"""Longest guest command line in bytes: the kernel's limit on x86-64 and aarch64, less the NUL."""
MAX_MEMORY_MIB: Final = 2**31 - 1
MAX_TASK_PROFILES: Final = 32
MAX_PARTITIONS: Final = 128
"""As many as a partition table of the usual size has room for."""
MAX_LABEL: Final = 36
"""Longest label of a partition, in UTF-16 units: a letter beyond the basic plane has two."""

_TASK_PROFILE: Final = re.compile("[A-Za-z0-9_.-]{1,64}")


def check_params(params: str) -> None:
    """Check a guest command line. Raises IllegalArgumentError."""
    if not isinstance(params, str) or re.search("[\0\n\r]", params):
        raise IllegalArgumentError("params must be one line of text without NUL")
    try:
        length = len(params.encode())
    except UnicodeEncodeError:
        raise IllegalArgumentError("params contains a lone surrogate; remove it") from None
    if length > MAX_PARAMS:
        raise IllegalArgumentError(
            f"params has {length} bytes; a guest command line has at most {MAX_PARAMS}"
        )


def check_memory(memory_mib: int | None) -> None:
    """Check an amount of memory. Raises IllegalArgumentError."""
    if memory_mib is not None and (type(memory_mib) is not int or not 1 <= memory_mib <= MAX_MEMORY_MIB):
        raise IllegalArgumentError(
            f"Invalid memory_mib; give 1 to {MAX_MEMORY_MIB}, or nothing for the VMM's default"
        )


def check_task_profiles(profiles: Iterable[object]) -> None:
    """Check Android task profiles; a VMM gets them joined by commas. Raises IllegalArgumentError."""
    for i, profile in enumerate(profiles):
        if i == MAX_TASK_PROFILES:
            raise IllegalArgumentError(f"task_profiles: at most {MAX_TASK_PROFILES} are possible")
        if not isinstance(profile, str) or not _TASK_PROFILE.fullmatch(profile):
            raise IllegalArgumentError(
                f"task_profiles[{i}] must be 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', and one profile only"
            )


def check_label(label: object) -> str:
    """Return the label if a partition can have it. Raises IllegalArgumentError.

    Stricter than the reference, which cuts what is too long and takes the empty label, too.
    """
    if not isinstance(label, str) or not label.isprintable() or not 1 <= _utf16_units(label) <= MAX_LABEL:
        raise IllegalArgumentError(
            f"{escape(repr(label), limit=100)} is no partition label; use 1 to {MAX_LABEL} printable "
            "characters, where those beyond the basic plane (emoji) count twice"
        )
    return label


def parse_guid(value: object) -> UUID:
    """The GUID of a partition, from one or from its text. Raises IllegalArgumentError."""
    if isinstance(value, UUID):
        return value
    try:
        return UUID(cast("str", value))
    except (AttributeError, TypeError, ValueError):
        raise IllegalArgumentError(
            f"{escape(repr(value), limit=100)} is no GUID; write it like 01234567-89ab-cdef-0123-456789abcdef"
        ) from None


def check_guids(guids: Iterable[UUID | None]) -> None:
    """Check that no two partitions of a disk have the same GUID. Raises IllegalArgumentError."""
    seen: set[UUID] = set()
    for guid in guids:
        if guid in seen:
            raise IllegalArgumentError(f"duplicate partition GUID {guid}; leave one of them out")
        if guid is not None:
            seen.add(guid)


def _utf16_units(text: str) -> int:
    return len(text) + sum(char > "\uffff" for char in text)


def check_labels(labels: Sequence[object]) -> None:
    """Check the labels of a disk's partitions, and how many there are. Raises IllegalArgumentError."""
    if not 1 <= len(labels) <= MAX_PARTITIONS:
        raise IllegalArgumentError(
            f"a disk has 1 to {MAX_PARTITIONS} partitions, not {len(labels)}; use more disks"
        )
    seen: set[str] = set()
    for value in labels:
        label = check_label(value)
        if label in seen:
            raise IllegalArgumentError(f'duplicate GPT partition label "{escape(label)}"; rename one of them')
        seen.add(label)


def check_boot(*, kernel: object, initrd: object, bootloader: object) -> None:
    """Check that there is something to boot, and one way of booting. Raises IllegalArgumentError."""
    if bootloader is None and kernel is None:
        raise IllegalArgumentError("VM must have either a bootloader or a kernel image.")
    if bootloader is not None and (kernel is not None or initrd is not None):
        raise IllegalArgumentError("Can't have both bootloader and kernel/initrd image.")


def parse_requirement(text: str) -> VersionRequirement:
    """Read a ``platform_version``. Raises IllegalArgumentError."""
    if not isinstance(text, str):
        raise IllegalArgumentError("platform_version must be text, such as '~1.0'")
    try:
        return VersionRequirement.parse(text)
    except IllegalArgumentError as error:
        raise IllegalArgumentError(
            f"Invalid platform version requirement {escape(text, limit=100)}: {error}"
        ) from None
