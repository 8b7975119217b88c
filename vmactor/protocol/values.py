"""Configurations, records and events on the wire: maps with names in camel case, and back.

Numbers of the reference's enums travel as their names, times as RFC 3339 text in UTC, descriptors by index.
What a class looks like is worked out from its fields, once. Unknown names are an error in what a client sends
(``strict``), so that a misspelt option is not silently left out; in what a service sends they are ignored,
since it may be newer.
"""

import dataclasses
import math
import types
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum, IntEnum
from functools import cache
from types import MappingProxyType
from typing import Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints
from uuid import UUID

from vmactor import messages
from vmactor.app_config import AppConfig
from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.errors import IllegalArgumentError
from vmactor.messages import Event, VmInfo
from vmactor.rpc.files import Attached, ReceivedFile

T = TypeVar("T")

_FILES: Final[dict[type, frozenset[str]]] = {
    RawConfig: frozenset({"kernel", "initrd", "bootloader"}),
    DiskImage: frozenset({"image"}),
    Partition: frozenset({"image"}),
    AppConfig: frozenset(
        {
            "apk",
            "idsig",
            "instance_image",
            "extra_apks",
            "extra_idsigs",
            "encrypted_storage_image",
            "custom_kernel",
        }
    ),
}
"""Fields that are descriptors, or tuples of them. Classes of this package say so themselves (``FILE``)."""
FILE: Final = MappingProxyType({"file": True})
"""Metadata of a field that is a descriptor."""
_EVENTS: Final[dict[str, type[Event]]] = {
    kind.kind: kind
    for kind in vars(messages).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
}


@cache
def camel(name: str) -> str:
    """A Python name as it is on the wire."""
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


def event_kinds() -> dict[str, type[Event]]:
    """The classes of events by their names on the wire."""
    return dict(_EVENTS)


# -- To the wire -------------------------------------------------------------------------------------


def to_wire(value: Any) -> Any:
    """A record, configuration or event as MessagePack can carry it.

    Descriptors become ``Attached``: borrowed until the message is sent. Fields that are None are left out.
    """
    kind = type(value)
    if value is None or kind in (int, str, bool, float, bytes, dict, Attached):
        return value
    if isinstance(value, Enum):
        return value.name if isinstance(value, IntEnum) else value.value
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    if isinstance(value, list | tuple):
        return [to_wire(item) for item in value]
    row = {
        wire: to_wire(item)
        for name, wire in _names(cast("Any", kind))
        if (item := getattr(value, name)) is not None
    }
    for name in _files(cast("Any", kind)):
        if (files := row.get(camel(name))) is not None:
            row[camel(name)] = [Attached(fd) for fd in files] if isinstance(files, list) else Attached(files)
    if isinstance(value, Event):
        row["event"] = value.kind
    return row


def config_to_wire(config: RawConfig | AppConfig) -> dict[str, Any]:
    """A configuration as ``createVm`` takes it: ``{"rawConfig": ...}`` or ``{"appConfig": ...}``."""
    return {"rawConfig" if isinstance(config, RawConfig) else "appConfig": to_wire(config)}


@cache
def _names(kind: Any) -> tuple[tuple[str, str], ...]:
    return tuple(
        (field.name, camel(field.name))
        for field in dataclasses.fields(kind)
        if not field.name.startswith("_")
    )


@cache
def _files(kind: Any) -> frozenset[str]:
    own = frozenset(field.name for field in dataclasses.fields(kind) if field.metadata.get("file"))
    return _FILES.get(kind, own)


# -- From the wire -----------------------------------------------------------------------------------

_Reader = Callable[[Any, str, bool], Any]


def from_wire(kind: type[T], value: Any, what: str, *, strict: bool = True) -> T:
    """A record or configuration of a class, from its map.

    Args:
        kind: A dataclass.
        value: What came.
        what: How messages name it.
        strict: Whether unknown names are an error.

    Raises:
        IllegalArgumentError: It is something else; the message begins with the place.
    """
    return cast("T", _reader(cast("Any", kind))(value, what, strict))


def config_from_wire(value: Any) -> RawConfig | AppConfig:
    """What ``createVm`` was given; borrows the received files. Raises IllegalArgumentError."""
    match value:
        case {"rawConfig": raw} if len(value) == 1:
            return from_wire(RawConfig, raw, "rawConfig")
        case {"appConfig": app} if len(value) == 1:
            return from_wire(AppConfig, app, "appConfig")
    raise IllegalArgumentError('the configuration must be a map with either "rawConfig" or "appConfig"')


def info_from_wire(value: Any) -> VmInfo:
    """A VM's record, as a client reads it. Raises IllegalArgumentError."""
    return from_wire(VmInfo, value, "info", strict=False)


def event_from_wire(value: Any) -> Event:
    """An event, as a client reads it; one of a kind that is not known here is a plain ``Event``.

    Raises:
        IllegalArgumentError: It is no event.
    """
    kind = value.get("event") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise IllegalArgumentError(f"no event: {value!r:.100}")
    return from_wire(_EVENTS.get(kind, Event), value, kind, strict=False)


@cache
def _reader(kind: Any) -> _Reader:  # noqa: PLR0911 - one way out for each form
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = [arg for arg in get_args(kind) if arg is not type(None)]
        read = _reader(inner[0])
        return lambda value, what, strict: None if value is None else read(value, what, strict)
    if origin is tuple:
        return _tuple_of(_reader(get_args(kind)[0]))
    if kind is float:
        return _float
    if kind is datetime:
        return _datetime
    if kind is UUID:
        return _uuid
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind)
    if dataclasses.is_dataclass(kind):
        return _record(cast("type", kind))
    return _exactly(kind)


def _wrong(what: str, wanted: str, value: Any) -> IllegalArgumentError:
    return IllegalArgumentError(f"{what} must be {wanted}, not {value!r:.60}")


def _exactly(kind: type) -> _Reader:
    wanted = {int: "a whole number", str: "a text", bool: "true or false"}.get(kind, kind.__name__)

    def read(value: Any, what: str, _strict: bool) -> Any:
        if type(value) is not kind:
            raise _wrong(what, wanted, value)
        return value

    return read


def _float(value: Any, what: str, _strict: bool) -> float:
    if type(value) not in (int, float) or math.isnan(value):
        raise _wrong(what, "a number", value)
    return float(value)


def _datetime(value: Any, what: str, _strict: bool) -> datetime:
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise _wrong(what, "a time as RFC 3339 text", value) from None


def _uuid(value: Any, what: str, _strict: bool) -> UUID:
    try:
        return UUID(value)
    except (AttributeError, TypeError, ValueError):
        raise _wrong(what, "a UUID as text", value) from None


def _enum(kind: type[Enum]) -> _Reader:
    number = issubclass(kind, IntEnum)
    known = {member.name if number else member.value: member for member in kind}

    def read(value: Any, what: str, _strict: bool) -> Enum:
        if isinstance(value, str) and value in known:
            return known[value]
        raise _wrong(what, f"one of {', '.join(map(str, known))}", value)

    return read


def _tuple_of(read: _Reader) -> _Reader:
    def read_all(value: Any, what: str, strict: bool) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _wrong(what, "an array", value)
        return tuple(read(item, f"{what}[{place}]", strict) for place, item in enumerate(value))

    return read_all


def _file(value: Any, what: str, _strict: bool) -> Any:
    if value is not None and not isinstance(value, ReceivedFile):
        raise _wrong(what, "a descriptor that came with the message", value)
    return value


def _record(kind: type) -> _Reader:
    hints = get_type_hints(kind)
    files = _files(cast("Any", kind))
    readers: dict[str, tuple[str, _Reader]] = {}
    for name, wire in _names(kind):
        read = _reader(hints[name]) if name not in files else _file
        if name in files and get_origin(hints[name]) is tuple:
            read = _tuple_of(_file)
        readers[wire] = name, read

    # What has no value was left out.
    absent = {
        field.name: None
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and type(None) in get_args(hints[field.name])
    }

    def read_record(value: Any, what: str, strict: bool) -> Any:
        if type(value) is not dict:
            raise _wrong(what, "a map", value)
        fields: dict[str, Any] = dict(absent)
        for key, item in value.items():
            if key in readers:
                name, read = readers[key]
                fields[name] = read(item, f"{what}.{key}", strict)
            elif strict:
                raise IllegalArgumentError(
                    f"{what}: there is no {key!r:.60}; there are: {', '.join(readers)}"
                )
        try:
            return kind(**fields)
        except TypeError as error:
            missing = str(error).partition(": ")[2] or str(error)
            raise IllegalArgumentError(f"{what} lacks {missing}") from None

    return read_record
