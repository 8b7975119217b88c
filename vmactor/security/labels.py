"""SELinux labels: which files may be given to VMs, by the type of their label.

They keep an app from running a VM on files that it can write itself, which on Android have types of their
own. Elsewhere files have other types or no labels: where SELinux is off nothing is checked, unless the rules
say so; where it is on, the administrator may name the types that are right there.

Source: ``selinux.rs`` and ``check_label_for_partition`` of the reference.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from vmactor.config import RawConfig
from vmactor.errors import LabelError
from vmactor.text import escape

ALLOWED_TYPES: Final = frozenset({"system_file", "apk_data_file", "staging_data_file", "shell_data_file"})
"""Types of files that belong to the platform, or that only the platform or its developer can write."""
EXEMPT: Final = frozenset({"vm-instance", "encryptedstore", "microdroid-apk-idsig", "payload-metadata"})
EXEMPT_PREFIX: Final = "extra-idsig-"
"""Partitions of an app's VM that the app may write: its guest trusts nothing in them."""

_ATTRIBUTE: Final = "security.selinux"
_ENFORCE: Final = Path("/sys/fs/selinux/enforce")
_MAX_SHOWN: Final = 200


class LabelCheck(StrEnum):
    """When labels are checked."""

    AUTO = "auto"
    """Where SELinux is on."""
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class LabelRules:
    """Which labels will do.

    Attributes:
        when: When they are checked at all.
        types: Their types that are allowed.
    """

    when: LabelCheck = LabelCheck.AUTO
    types: frozenset[str] = ALLOWED_TYPES

    @property
    def active(self) -> bool:
        """Whether labels are checked on this host now."""
        return self.when is LabelCheck.ALWAYS or (self.when is LabelCheck.AUTO and selinux_is_on())

    def check(self, config: RawConfig, *, app: bool, read: "Callable[[int], str] | None" = None) -> None:
        """Check the files of a VM: partitions, and the kernel and initrd of a protected VM.

        Disks given as one image, bootloaders, and the kernels of other VMs are not: so does the reference.

        Args:
            config: Its descriptors are looked at.
            app: Whether it was made of an app configuration, some partitions of which are exempt.
            read: Where labels come from; default the files' attributes.

        Raises:
            LabelError: A label is not allowed, malformed, or cannot be read. The message names the file.
        """
        if not self.active:
            return
        read = read or read_label
        for disk in config.disks:
            for part in disk.partitions:
                exempt = app and (part.label in EXEMPT or part.label.startswith(EXEMPT_PREFIX))
                if not exempt:
                    self._check(f"Partition {escape(part.label)} invalid", read(part.image))
        if config.protected_vm:
            for name, fd in (("kernel", config.kernel), ("initrd", config.initrd)):
                if fd is not None:
                    self._check(f"{name} file invalid", read(fd))

    def _check(self, what: str, label: str) -> None:
        shown = escape(label, limit=_MAX_SHOWN)
        kind = type_of(label)
        if kind is None:
            raise LabelError(
                f"{what}\n\nCaused by:\n    Syntactically invalid label {shown}; relabel the file"
            )
        if kind not in self.types:
            raise LabelError(
                f"{what}\n\nCaused by:\n    Label {shown} is not allowed; use a file of one of the types "
                f"{', '.join(sorted(self.types))}, or have root allow {escape(kind, limit=_MAX_SHOWN)} in "
                "the service's policy file"
            )


def type_of(label: str) -> str | None:
    """The type in a label ``user:role:type:sensitivity[:categories]``; None if it is malformed. Pure."""
    fields = label.split(":")
    return fields[2] if len(fields) in (4, 5) else None


def selinux_is_on() -> bool:
    """Whether the kernel has SELinux, enforcing or not, and shows it."""
    return _ENFORCE.exists()


def read_label(fd: int) -> str:
    """The label of an open file. Raises LabelError."""
    try:
        label = os.getxattr(fd, _ATTRIBUTE)
    except OSError as error:
        raise LabelError(
            f"fgetfilecon failed\n\nCaused by:\n    {error.strerror}; use a file system with labels"
        ) from error
    try:
        return label.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        raise LabelError("Label is not valid UTF8; relabel the file") from None
