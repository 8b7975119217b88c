"""Who may do what: the one place that decides.

``check`` is asked by each method of the service, for its requester. Handles ask nothing, as in the reference:
whoever holds one may use it, since its owner may have passed it on. Root may do everything, and so may the
user that this process runs as: it could do the same without being asked.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vmactor.app_config import MICRODROID, AppConfig
from vmactor.config import RawConfig
from vmactor.errors import SecurityError
from vmactor.messages import Requester


class Permission(StrEnum):
    """The reference's permissions."""

    MANAGE_VIRTUAL_MACHINE = "android.permission.MANAGE_VIRTUAL_MACHINE"
    USE_CUSTOM_VIRTUAL_MACHINE = "android.permission.USE_CUSTOM_VIRTUAL_MACHINE"
    DEBUG_VIRTUAL_MACHINE = "android.permission.DEBUG_VIRTUAL_MACHINE"
    DUMP = "android.permission.DUMP"
    INTERNET = "android.permission.INTERNET"


class Method(StrEnum):
    """The service's methods that need a permission; all others need none."""

    CREATE_VM = "create_vm"
    INITIALIZE_WRITABLE_PARTITION = "initialize_writable_partition"
    CREATE_OR_UPDATE_IDSIG_FILE = "create_or_update_idsig_file"
    DEBUG_LIST_VMS = "debug_list_vms"
    DUMP = "dump"


NEEDED: Final = {
    Method.CREATE_VM: Permission.MANAGE_VIRTUAL_MACHINE,
    Method.INITIALIZE_WRITABLE_PARTITION: Permission.MANAGE_VIRTUAL_MACHINE,
    Method.CREATE_OR_UPDATE_IDSIG_FILE: Permission.MANAGE_VIRTUAL_MACHINE,
    Method.DEBUG_LIST_VMS: Permission.DEBUG_VIRTUAL_MACHINE,
    Method.DUMP: Permission.DUMP,
}
"""What each method needs (reference: permissions). A custom configuration needs one more."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Who has a permission, besides root and the service's own user.

    Attributes:
        users: Numbers of users.
        groups: Numbers of groups, primary or other ones.
    """

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()

    def covers(self, requester: Requester) -> bool:
        """Whether it is somebody's."""
        return requester.uid in self.users or not self.groups.isdisjoint((requester.gid, *requester.groups))


@dataclass(frozen=True, slots=True)
class Permissions:
    """Which user has which permission; by default nobody but root and the service's own user.

    Attributes:
        grants: Who else has a permission.
    """

    grants: Mapping[Permission, Grant] = field(default_factory=dict)

    def check(
        self, requester: Requester | None, method: Method, config: RawConfig | AppConfig | None = None
    ) -> None:
        """Check that somebody may call a method.

        Args:
            requester: Who; None for this process itself.
            method: What is called.
            config: What ``create_vm`` is called with.

        Raises:
            SecurityError: He may not; in the reference's words.
        """
        if requester is None or requester.uid in (0, os.geteuid()):
            return
        needed = [NEEDED[method]]
        if config is not None and is_custom(config):
            needed.append(Permission.USE_CUSTOM_VIRTUAL_MACHINE)
        if config is not None and config.network:
            needed.append(Permission.INTERNET)
        for permission in needed:
            grant = self.grants.get(permission)
            if grant is None or not grant.covers(requester):
                raise SecurityError(
                    f"does not have the {permission} permission; user {requester.uid} gets it from root, in "
                    "the service's policy file"
                )

    def allow(self, requester: Requester, method: Method) -> bool:
        """Whether somebody may call a method that has no configuration."""
        try:
            self.check(requester, method)
        except SecurityError:
            return False
        return True


def is_custom(config: RawConfig | AppConfig) -> bool:
    """Whether a configuration asks for more than to run an APK's payload in the guest meant for it.

    A configuration inside the APK can ask for APEXes and extra APKs, so it counts as custom, too.
    """
    return isinstance(config, RawConfig) or bool(
        config.config_path is not None
        or config.extra_apks
        or config.task_profiles
        or config.os_name != MICRODROID
        or config.custom_kernel is not None
        or config.extra_params
    )
