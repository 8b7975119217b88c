"""The payload's configuration: the JSON file inside an APK, or what stands for it where there is none.

Source: ``microdroid/payload/config`` of the reference. Fields that nobody knows are passed over, as there,
since APKs are older or newer than the host. All else that is wrong is an error that names the field.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmactor.app_config import MAX_EXTRA_APKS, MICRODROID, AppConfig
from vmactor.config import RawConfig
from vmactor.errors import VmactorError
from vmactor.images.apk_entry import read_entry
from vmactor.strict_json import MAX_BYTES, about, flag, list_of, object_of, or_null, read_json, text, wrong
from vmactor.text import escape

MAX_APEXES: Final = 128
"""As many as a disk has partitions."""
MAX_TEXT: Final = 4095
"""Longest name, path or command in bytes."""


class TaskType(StrEnum):
    """How the guest runs a payload."""

    EXECUTABLE = "executable"
    MICRODROID_LAUNCHER = "microdroid_launcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the guest runs: a command, or a library through the launcher."""

    type: TaskType = TaskType.EXECUTABLE
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadConfig:
    """What a payload needs. All of it is foreign text if it comes from an APK.

    Attributes:
        os: The guest it is made for.
        task: What to run; the guest insists on one, the host does not.
        apexes: Names of APEXes.
        extra_apks: Paths of more APKs; nothing of vmactor opens one but ``open_extra_apks``.
        prefer_staged: Whether staged APEXes come in place of active ones.
        export_tombstones: Whether crashes are told to the host; None if that depends on the debug level.
        enable_authfs: Whether the guest needs authfs.
    """

    os: str = MICRODROID
    task: Task | None = None
    apexes: tuple[str, ...] = ()
    extra_apks: tuple[str, ...] = ()
    prefer_staged: bool = False
    export_tombstones: bool | None = None
    enable_authfs: bool = False


def _text(value: object, path: str) -> str:
    given = text(value, path)
    try:
        length = len(given.encode())
    except UnicodeEncodeError:
        length = 0
    if not 1 <= length <= MAX_TEXT or "\0" in given:
        raise wrong(path, f"1 to {MAX_TEXT} bytes of text without NUL", value)
    return given


def _task_type(value: object, path: str) -> TaskType:
    if not isinstance(value, str) or value not in list(TaskType):
        raise wrong(path, " or ".join(f'"{kind}"' for kind in TaskType), value)
    return TaskType(value)


_TASK: Final = object_of(Task, "command", None, type=_task_type, command=_text)
_CONFIG: Final = object_of(
    PayloadConfig,
    "",
    None,
    os=object_of(lambda name: name, "name", None, name=_text),
    task=or_null(_TASK),
    apexes=list_of(object_of(lambda name: name, "name", None, name=_text), MAX_APEXES),
    extra_apks=list_of(object_of(lambda path: path, "path", None, path=_text), MAX_EXTRA_APKS),
    prefer_staged=flag,
    export_tombstones=or_null(flag),
    enable_authfs=flag,
)


def parse_payload_config(data: bytes | str) -> PayloadConfig:
    """Read a payload's configuration. Pure.

    Raises:
        IllegalArgumentError: It is not JSON, too large or too deep, or a field is doubled, missing or wrong.
    """
    return _CONFIG(read_json(data), "")


def read_payload_config(apk: int, path: str) -> PayloadConfig:
    """Read a payload's configuration out of an APK, at offsets.

    Args:
        apk: The APK, open for reading.
        path: The configuration's path inside it.

    Raises:
        ApkError: There is no such file in the APK, or the APK is broken.
        IllegalArgumentError: As ``parse_payload_config``.
    """
    with about(f"Couldn't read config from {escape(path, limit=200)}"):
        return parse_payload_config(read_entry(apk, path, MAX_BYTES))


def payload_config_of(app: AppConfig) -> PayloadConfig:
    """A payload's configuration: from its APK, or made from the name of its binary. Raises as the above."""
    if app.config_path is not None:
        return read_payload_config(app.apk, app.config_path)
    assert app.payload_binary_name is not None  # noqa: S101 - validate
    task = Task(type=TaskType.MICRODROID_LAUNCHER, command=app.payload_binary_name)
    return PayloadConfig(os=app.os_name, task=task)


def apexes_for_record(config: RawConfig | AppConfig) -> str:
    """What a VM's creation record says of APEXes: the names in its payload's configuration, joined by colons.

    Reads the APK, so call it in a thread. Never raises: the record is made whatever became of the creation.
    The names are foreign text.
    """
    if isinstance(config, RawConfig) or config.config_path is None:
        return ""
    try:
        return ":".join(read_payload_config(config.apk, config.config_path).apexes)
    except (VmactorError, ValueError):
        return "INFO: Can't get VmPayloadConfig"
