"""The platform: the tree with the guest's kernel, its images and the APEXes; ``/apex`` on Android.

It is the administrator's and trusted, so mistakes in it are service-specific errors. The paths in its files
begin with ``/apex``, wherever the tree really is. It is read anew for every VM: it is small, and may change.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmactor.config import RawConfig
from vmactor.config_file import load_config, open_file
from vmactor.errors import IllegalArgumentError, ServiceSpecificError
from vmactor.host import output_of
from vmactor.messages import DebugLevel
from vmactor.microdroid.apexes import (
    CLASSPATH,
    ApexInfo,
    StagedApex,
    override_staged,
    parse_apex_info_list,
    select_apexes,
)
from vmactor.microdroid.classpath import apexes_in_classpath
from vmactor.text import escape, escape_bytes

DEFAULT_ROOT: Final = Path("/apex")
MAX_APEX_INFO_LIST: Final = 4 << 20
"""Bytes of ``apex-info-list.xml`` that are read."""
MAX_CLASSPATH: Final = 1 << 20
"""Bytes of ``derive_classpath``'s output that are read."""
CLASSPATH_SECONDS: Final = 10.0

_INITRDS: Final = {DebugLevel.NONE: "normal", DebugLevel.FULL: "debuggable"}


@dataclass(frozen=True, slots=True)
class Platform:
    """Where the parts of Microdroid are.

    Attributes:
        root: The tree; what its files call ``/apex`` is this.
        staged_apexes: Called where a payload's configuration says ``prefer_staged``, in a thread: gives the
            APEXes that will be active after the next reboot. Whoever knows them (on Android the package
            manager) has to say; without it such payloads are refused. It may raise ``ServiceSpecificError``.
    """

    root: Path = DEFAULT_ROOT
    staged_apexes: Callable[[], Sequence[StagedApex]] | None = None

    def locate(self, path: Path) -> Path:
        """Where a file really is that the platform's files name so."""
        return self.root / path.relative_to(DEFAULT_ROOT) if path.is_relative_to(DEFAULT_ROOT) else path

    def os_config_path(self, os_name: str) -> Path:
        """The raw configuration that a guest begins as."""
        return self.root / "com.android.virt" / "etc" / f"{os_name}.json"

    def guests(self) -> list[str]:
        """The names of the guests that are there: those with a configuration and an initrd for each level."""
        found = sorted(path.stem for path in self.os_config_path("*").parent.glob("*.json"))
        return [
            name for name in found if all(self._initrd_path(name, level).exists() for level in DebugLevel)
        ]

    def _initrd_path(self, os_name: str, debug_level: DebugLevel) -> Path:
        return self.os_config_path(os_name).with_name(f"{os_name}_initrd_{_INITRDS[debug_level]}.img")

    def load_os(self, os_name: str) -> RawConfig:
        """Open a guest's own configuration and the files that it names; the caller closes it.

        Raises:
            ServiceSpecificError: There is no such guest here, or its configuration is wrong.
            ResourceExhaustedError: No descriptor is left.
        """
        with _of_the_platform("give the platform's directory, or install this guest there"):
            return load_config(self.os_config_path(os_name), locate=self.locate)

    def open_initrd(self, os_name: str, debug_level: DebugLevel, opened: contextlib.ExitStack) -> int:
        """Open the initial RAM disk for a debug level; ``opened`` closes it. Raises as ``load_os``."""
        path = self._initrd_path(os_name, debug_level)
        with _of_the_platform("the platform has to have one for each debug level"):
            return open_file(opened, "initrd", path)

    def select_apexes(
        self, configured: Collection[str], *, debuggable: bool, prefer_staged: bool
    ) -> list[ApexInfo]:
        """The APEXes that a payload gets, in the order of their partitions.

        Args:
            configured: What the payload's configuration names.
            debuggable: Whether the VM is debuggable.
            prefer_staged: Whether staged APEXes come in place of the active ones.

        Raises:
            ServiceSpecificError: The list of APEXes, the class path or the staged APEXes cannot be had.
        """
        apexes = parse_apex_info_list(self._read_apex_info_list(), self.locate)
        names = self._classpath() if CLASSPATH in configured else frozenset()
        apexes = [apex.with_classpath(apex.name in names) for apex in apexes]
        if prefer_staged:
            apexes = override_staged(apexes, self._staged())
        return select_apexes(apexes, configured, debuggable=debuggable)

    def _read_apex_info_list(self) -> bytes:
        path = self.root / "apex-info-list.xml"
        with contextlib.ExitStack() as opened, _of_the_platform("the platform has to list its APEXes there"):
            fd = open_file(opened, "the list of APEXes", path)
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_APEX_INFO_LIST + 1)
        if len(data) > MAX_APEX_INFO_LIST:
            raise ServiceSpecificError(
                f"Failed to parse {escape(str(path))}: more than {MAX_APEX_INFO_LIST} bytes; shorten it"
            )
        return data

    def _classpath(self) -> frozenset[str]:
        program = self.root / "com.android.sdkext" / "bin" / "derive_classpath"
        shown = escape(str(program))
        try:
            status, output = output_of(
                [os.fspath(program), "/proc/self/fd/1"], CLASSPATH_SECONDS, MAX_CLASSPATH + 1
            )
        except OSError as error:
            raise ServiceSpecificError(
                f"{shown} cannot be run: {error.strerror}; a payload with {CLASSPATH} needs it"
            ) from error
        if len(output) > MAX_CLASSPATH:
            raise ServiceSpecificError(f"{shown} wrote more than {MAX_CLASSPATH} bytes; correct it")
        if status is None:
            raise ServiceSpecificError(f"{shown} did not end within {CLASSPATH_SECONDS:g} s; correct it")
        if status != 0:
            said = escape_bytes(output.strip(), limit=200)
            raise ServiceSpecificError(f"derive_classpath returned {status}: {said}; see {shown}")
        try:
            return apexes_in_classpath(output.decode())
        except UnicodeDecodeError as error:
            raise ServiceSpecificError(f"{shown} wrote what is not UTF-8; correct it") from error

    def _staged(self) -> Sequence[StagedApex]:
        if self.staged_apexes is None:
            raise ServiceSpecificError(
                "Failed to get service when prefer_staged is set. Nobody tells the staged APEXes of this "
                "platform; give Platform(staged_apexes=...)"
            )
        return self.staged_apexes()


@contextlib.contextmanager
def _of_the_platform(advice: str) -> Iterator[None]:
    """What is wrong with the platform is not the caller's fault."""
    try:
        yield
    except (IllegalArgumentError, OSError) as error:
        raise ServiceSpecificError(f"{error}; {advice}") from error
