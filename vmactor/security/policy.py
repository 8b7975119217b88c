"""The policy: what a service allows to whom. By default only what is safe; a small strict file says more.

::

    {
      "permissions": {
        "MANAGE_VIRTUAL_MACHINE": {"users": ["alice", 1001], "groups": ["vm"]},
        "DEBUG_VIRTUAL_MACHINE": {"groups": ["adm"]}
      },
      "labels": {"check": "auto", "types": ["system_file", "virt_image_t"]}
    }
"""

import grp
import os
import pwd
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vmactor.config_file import open_file
from vmactor.errors import IllegalArgumentError, SecurityError
from vmactor.security.labels import ALLOWED_TYPES, LabelCheck, LabelRules
from vmactor.security.permissions import Grant, Permission, Permissions
from vmactor.strict_json import MAX_BYTES, Reader, about, list_of, object_of, read_json, text, wrong
from vmactor.text import escape

MAX_NAMES: Final = 1024
"""Users, groups or types in one list."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a service allows.

    Attributes:
        permissions: Who may call what.
        labels: Which files VMs may have.
    """

    permissions: Permissions = field(default_factory=Permissions)
    labels: LabelRules = field(default_factory=LabelRules)


def _identity(kind: str, look_up: Callable[[str], int]) -> Reader[int]:
    def read(value: object, path: str) -> int:
        if type(value) is int:
            if not 0 <= value < 2**32 - 1:
                raise wrong(path, f"the number of a {kind}", value)
            return value
        name = text(value, path)
        try:
            return look_up(name)
        except (KeyError, ValueError, OSError):
            raise IllegalArgumentError(f'{path}: there is no {kind} "{escape(name, limit=100)}"') from None

    return read


def _label_check(value: object, path: str) -> LabelCheck:
    if not isinstance(value, str) or value not in list(LabelCheck):
        raise wrong(path, " or ".join(f'"{check}"' for check in LabelCheck), value)
    return LabelCheck(value)


def _grant(users: tuple[int, ...] = (), groups: tuple[int, ...] = ()) -> Grant:
    return Grant(frozenset(users), frozenset(groups))


def _rules(check: LabelCheck = LabelCheck.AUTO, types: tuple[str, ...] | None = None) -> LabelRules:
    return LabelRules(check, ALLOWED_TYPES if types is None else frozenset(types))


_GRANT: Final = object_of(
    _grant,
    "",
    {},
    users=list_of(_identity("user", lambda name: pwd.getpwnam(name).pw_uid), MAX_NAMES),
    groups=list_of(_identity("group", lambda name: grp.getgrnam(name).gr_gid), MAX_NAMES),
)
_POLICY: Final = object_of(
    Policy,
    "",
    {},
    permissions=object_of(
        lambda **grants: Permissions({Permission[name]: grant for name, grant in grants.items()}),
        "",
        {},
        **{permission.name: _GRANT for permission in Permission},
    ),
    labels=object_of(_rules, "", {}, check=_label_check, types=list_of(text, MAX_NAMES)),
)


def parse_policy(data: bytes | str) -> Policy:
    """Read a policy from the text of a file. Looks users and groups up, which may block.

    Raises:
        IllegalArgumentError: It is not JSON, or a field is unknown, doubled or wrong, or a user or group is
            not known here.
    """
    return _POLICY(read_json(data), "")


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read a policy file. Blocks as long as the file system and the user database do.

    Raises:
        IllegalArgumentError: It cannot be opened, or as ``parse_policy``.
        SecurityError: Others than root and this user can write to it, so it is nobody's policy.
    """
    path = Path(path)
    with ExitStack() as opened, about(f'policy file "{escape(str(path))}"'):
        fd = open_file(opened, "the file", path)
        status = os.fstat(fd)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SecurityError(
                "others can write to it; let it belong to root or to the service's user, and 'chmod go-w' it"
            )
        with open(fd, "rb", closefd=False) as file:
            return parse_policy(file.read(MAX_BYTES + 1))
