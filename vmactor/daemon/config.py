"""The daemon's configuration: one strict TOML file, every option of which docs/operation.md describes.

What the command line says counts more than the file. With SIGHUP the file is read again; what can be changed
in a daemon that runs is changed, and the rest is named in the log.
"""

import os
import stat
import tomllib
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from vmactor.actors.admission import AdmissionPolicy
from vmactor.config_file import open_file
from vmactor.daemon.users import Quotas
from vmactor.errors import IllegalArgumentError, SecurityError
from vmactor.strict_json import (
    MAX_BYTES,
    Reader,
    about,
    as_read,
    flag,
    number,
    object_of,
    text,
    whole_number,
    wrong,
)
from vmactor.text import escape
from vmactor.vmm.select import NAMES

LOG_FORMATS: Final = ("console", "json")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """The table ``service``.

    Attributes:
        socket: Where to listen.
        state_directory: What all managers of this user share.
        vmm: Which VMM runs the guests.
        platform: Where Microdroid is.
        tombstones: Where guests' reports of crashes are kept.
        policy: The file that says which user may do what.
        drain_seconds: How long VMs that are not kept may take to shut down when the daemon is told to end.
    """

    socket: Path | None = None
    state_directory: Path | None = None
    vmm: str = "auto"
    platform: Path | None = None
    tombstones: Path | None = None
    policy: Path | None = None
    drain_seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """The table ``log``.

    Attributes:
        format: ``console`` for people, ``json`` for programs; None for ``json`` unless it is a terminal.
        level: The least that is logged.
    """

    format: str | None = None
    level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsOptions:
    """The table ``metrics``.

    Attributes:
        listen: Where Prometheus finds them: ``HOST:PORT``, or the path of a unix socket; None for nowhere.
        per_vm: Whether there are some for each VM, by CID and name; not for hosts with very many.
    """

    listen: str | None = None
    per_vm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file; each table and each option may be left out.

    Attributes:
        service: What is served, and where.
        admission: How many VMs are accepted, and how many boot at the same time.
        users: What each user may have; root and the daemon's own user may have everything.
        log: What is logged, and how.
        metrics: Whether it can be watched by Prometheus.
    """

    service: ServiceOptions = field(default_factory=ServiceOptions)
    admission: AdmissionPolicy = field(default_factory=AdmissionPolicy)
    users: Quotas = field(default_factory=Quotas)
    log: LogOptions = field(default_factory=LogOptions)
    metrics: MetricsOptions = field(default_factory=MetricsOptions)

    def fixed(self) -> dict[str, Any]:
        """What cannot be changed in a daemon that runs, by its name in the file."""
        told = {f"service.{one.name}": getattr(self.service, one.name) for one in fields(self.service)}
        del told["service.policy"], told["service.drain_seconds"]
        for one in fields(self.metrics):
            told[f"metrics.{one.name}"] = getattr(self.metrics, one.name)
        return told | {"admission": self.admission}


def _path(value: object, path: str) -> Path:
    found = Path(text(value, path))
    if not found.is_absolute():
        raise wrong(path, "an absolute path", value)
    return found


def _one_of(*names: str) -> Reader[str]:
    def read(value: object, path: str) -> str:
        if not isinstance(value, str) or value not in names:
            raise wrong(path, " or ".join(f'"{name}"' for name in names), value)
        return value

    return read


def _listen(value: object, path: str) -> str:
    found = text(value, path)
    host, colon, port = found.rpartition(":")
    if not (Path(found).is_absolute() or (colon and host and port.isdecimal() and 0 < int(port) < 1 << 16)):
        raise wrong(path, 'an address such as "127.0.0.1:9469", or the absolute path of a socket', value)
    return found


_CONFIG: Final = object_of(
    Config,
    "",
    {},
    service=object_of(
        ServiceOptions,
        "",
        {},
        socket=_path,
        state_directory=_path,
        vmm=_one_of(*NAMES),
        platform=_path,
        tombstones=_path,
        policy=_path,
        drain_seconds=number(0, 86400),
    ),
    admission=object_of(
        AdmissionPolicy,
        "",
        {},
        checked=flag,
        memory_overcommit=number(0.01, 1000),
        concurrent_boots=whole_number(1),
    ),
    users=object_of(
        Quotas,
        "",
        {},
        connections=whole_number(0),
        vms=whole_number(0),
        memory_mib=whole_number(0),
        subscriptions=whole_number(0),
        keep=flag,
    ),
    log=object_of(LogOptions, "", {}, format=_one_of(*LOG_FORMATS), level=_one_of(*LOG_LEVELS)),
    metrics=object_of(MetricsOptions, "", {}, listen=_listen, per_vm=flag),
)


def parse_config(data: bytes) -> Config:
    """Read a configuration from the bytes of a file. Pure.

    Raises:
        IllegalArgumentError: It is not TOML, or an option is unknown or wrong; the message names it.
    """
    if len(data) > MAX_BYTES:
        raise IllegalArgumentError(f"is longer than {MAX_BYTES} bytes")
    try:
        found = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise IllegalArgumentError("is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise IllegalArgumentError(f"not valid TOML: {escape(str(error), limit=200)}") from None
    return _CONFIG(as_read(found), "")


def load_config(path: Path) -> Config:
    """Read a configuration file. Blocks as long as the file system does.

    Raises:
        IllegalArgumentError: It cannot be opened, or as ``parse_config``.
        SecurityError: Others than root and this user can write to it.
    """
    with ExitStack() as opened, about(f'configuration file "{escape(str(path))}"'):
        fd = open_file(opened, "the file", path)
        status = os.fstat(fd)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SecurityError(
                "others can write to it; let it belong to root or to the daemon's user, and 'chmod go-w' it"
            )
        with open(fd, "rb", closefd=False) as file:
            return parse_config(file.read(MAX_BYTES + 1))
