"""APEXes: the list of those that the platform has, and which of them a payload gets.

Source: ``payload.rs`` of the reference, where this selects and sorts as it does.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmactor.errors import ServiceSpecificError
from vmactor.text import escape

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

CLASSPATH: Final = "{CLASSPATH}"
"""What a payload's configuration says for all APEXes that add to the class path."""
REQUIRED: Final = "com.android.os.statsd"
"""Every payload gets it, where it is active."""
REQUIRED_FOR_DEBUGGING: Final = "com.android.adbd"
"""Every debuggable VM gets it, where it is active."""

_LIST: Final = "apex-info-list.xml"
_ENTRY: Final = "apex-info"
_FIELDS: Final = (
    "moduleName",
    "versionCode",
    "modulePath",
    "lastUpdateMillis",
    "isFactory",
    "isActive",
    "provideSharedApexLibs",
)
_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}
_MAX_U64: Final = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ApexInfo:
    """An APEX.

    Attributes:
        name: Its module's name.
        version: Its version code.
        path: Its file.
        last_update_seconds: When it was installed, in seconds since 1970.
        is_factory: Whether it came with the platform.
        is_active: Whether it is the one in use of its name.
        provides_shared_libs: Whether others take libraries from it.
        has_classpath: Whether it adds to the class path.
    """

    name: str
    version: int
    path: Path
    last_update_seconds: int = 0
    is_factory: bool = True
    is_active: bool = True
    provides_shared_libs: bool = False
    has_classpath: bool = False

    def with_classpath(self, has_classpath: bool) -> "ApexInfo":
        """The same, adding to the class path or not."""
        return replace(self, has_classpath=has_classpath)


@dataclass(frozen=True, slots=True)
class StagedApex:
    """An APEX that will be active after the next reboot.

    Attributes:
        name: Its module's name.
        version: Its version code.
        path: Its file.
        has_classpath: Whether it adds to the class path.
    """

    name: str
    version: int
    path: Path
    has_classpath: bool = False


# -- Selecting ----------------------------------------------------------------------------------------


def select_apexes(
    apexes: Iterable[ApexInfo], configured: Collection[str], *, debuggable: bool
) -> list[ApexInfo]:
    """The APEXes that a payload gets, sorted by name, version and time of the last update. Pure.

    Args:
        apexes: Those that there are.
        configured: Names in the payload's configuration; one that is not there is passed over.
        debuggable: Whether the VM is debuggable.
    """
    wanted = {*configured, REQUIRED} | ({REQUIRED_FOR_DEBUGGING} if debuggable else set())
    selected = (
        apex
        for apex in apexes
        if apex.provides_shared_libs
        or (apex.is_active and (apex.name in wanted or (apex.has_classpath and CLASSPATH in wanted)))
    )
    return sorted(selected, key=lambda apex: (apex.name, apex.version, apex.last_update_seconds))


def override_staged(apexes: Sequence[ApexInfo], staged: Iterable[StagedApex]) -> list[ApexInfo]:
    """Put staged APEXes in the place of the active ones of the same name.

    A factory APEX that is replaced stays in the list as an inactive one, since it is still installed.

    Raises:
        ServiceSpecificError: The file of a staged APEX is not there.
    """
    result = list(apexes)
    for new in staged:
        for i, old in enumerate(list(result)):
            if old.name != new.name or not old.is_active:
                continue
            if old.is_factory:
                result.append(replace(old, is_active=False))
            result[i] = replace(
                old,
                is_factory=False,
                version=new.version,
                path=new.path,
                has_classpath=new.has_classpath,
                last_update_seconds=_modified(new.path),
            )
    return result


def _modified(path: Path) -> int:
    try:
        return int(os.stat(path).st_mtime)  # noqa: PTH116 - as short, and of either kind of path
    except OSError as error:
        raise ServiceSpecificError(
            f"cannot look at the staged APEX {escape(str(path))}: {error.strerror}; stage it again"
        ) from error


# -- The list -----------------------------------------------------------------------------------------


def parse_apex_info_list(data: bytes, locate: Callable[[Path], Path] = Path) -> list[ApexInfo]:
    """Read ``apex-info-list.xml``. Document types and entities in it are refused.

    Args:
        data: The file, of a size that its reader has bounded.
        locate: Where a file is that the list names.

    Raises:
        ServiceSpecificError: It is broken; the message says how, with the reference's words where it has any.
    """
    from xml.etree.ElementTree import ParseError  # noqa: PLC0415 - takes long, and few need it

    from defusedxml import DefusedXmlException  # noqa: PLC0415
    from defusedxml.ElementTree import fromstring  # noqa: PLC0415

    try:
        root = fromstring(data, forbid_dtd=True)
    except ParseError as error:
        raise _broken(escape(str(error), limit=200)) from None
    except DefusedXmlException:
        raise _broken("it has a document type or entities") from None
    except (ValueError, LookupError):  # an encoding that nobody knows
        raise _broken("its encoding is unknown") from None
    runs = [list(run) for tag, run in groupby(root, key=lambda element: element.tag) if tag == _ENTRY]
    if not runs:
        raise _broken(f"missing field `{_ENTRY}`")
    if len(runs) > 1:
        raise _broken(f"duplicate field `{_ENTRY}`")
    return [_read_entry(element, locate) for element in runs[0]]


def _read_entry(element: "Element", locate: Callable[[Path], Path]) -> ApexInfo:
    fields: dict[str, str] = {}
    children = ((child.tag, (child.text or "").strip()) for child in element)
    for name, value in (*element.attrib.items(), *children):
        if name in fields:
            raise _broken(f"duplicate field `{name}`")
        if name in _FIELDS:
            fields[name] = value
    for name in _FIELDS:
        if name not in fields:
            raise _broken(f"missing field `{name}`")
    return ApexInfo(
        name=fields["moduleName"],
        version=_number(fields, "versionCode"),
        path=locate(Path(fields["modulePath"])),
        last_update_seconds=_number(fields, "lastUpdateMillis"),  # seconds, despite its name
        is_factory=_flag(fields, "isFactory"),
        is_active=_flag(fields, "isActive"),
        provides_shared_libs=_flag(fields, "provideSharedApexLibs"),
    )


def _number(fields: dict[str, str], name: str) -> int:
    text = fields[name]
    if not re.fullmatch("[+]?[0-9]{1,20}", text) or int(text) > _MAX_U64:
        raise _broken(f'{name} is "{escape(text, limit=40)}", and must be a number from 0 to {_MAX_U64}')
    return int(text)


def _flag(fields: dict[str, str], name: str) -> bool:
    text = fields[name]
    if text not in _FLAGS:
        raise _broken(f'{name} is "{escape(text, limit=40)}", and must be one of {", ".join(_FLAGS)}')
    return _FLAGS[text]


def _broken(how: str) -> ServiceSpecificError:
    return ServiceSpecificError(f"Failed to parse {_LIST}: {how}; correct the platform's list of APEXes")
