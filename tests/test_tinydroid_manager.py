"""tinydroid's manager without a guest: files stand for partitions, and no payload is run."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pytest

import vmactor.guest
from tests.apks import opened
from tests.test_tinydroid import Bytes, load
from vmactor.images.idsig import create_or_update_idsig_file
from vmactor.microdroid.apexes import ApexInfo
from vmactor.microdroid.metadata import write_metadata

sys.modules["vmactor_guest"] = vmactor.guest  # its name in the guest
manager = load("manager")

CHANGED = "MICRODROID_PAYLOAD_HAS_CHANGED"


class FileDevice(Bytes):
    """A partition in a file."""

    def __init__(self, path: str, *, writable: bool = False) -> None:
        super().__init__(Path(path).read_bytes())
        self._path = Path(path)
        self._writable = writable

    def write(self, offset: int, data: bytes) -> None:
        """Write through."""
        assert self._writable
        super().write(offset, data)
        self._path.write_bytes(self.data)


class Host:
    """Takes reports, or is not there."""

    def __init__(self, reports: list[Any], *, absent: bool) -> None:
        self._reports = reports
        self._absent = absent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def notify_error(self, code: int, message: str) -> None:
        """As the guest's module."""
        if self._absent:
            raise vmactor.guest.Unreachable("nobody answers")
        self._reports.append((code, message))


class Machine:
    """A guest's disks over several boots."""

    def __init__(self, directory: Path, tinydroid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._monkeypatch = monkeypatch
        self.partitions: dict[str, Path] = {}
        self.launched: list[dict[str, str]] = []
        self.put("vm-instance", b"Android-VM-instance\1\0".ljust(16384, b"\0"))
        self.put_metadata()
        self.put_apk("microdroid-apk", "microdroid-apk-idsig", tinydroid / "example.apk")
        self.put_apk("extra-apk-0", "extra-idsig-0", tinydroid / "extra.apk")

    def put(self, label: str, data: bytes) -> None:
        """A partition with this content."""
        self.partitions[label] = self._directory / label
        self.partitions[label].write_bytes(data)

    def put_metadata(self, apexes: Sequence[ApexInfo] = (), path: str = "assets/extra.json") -> None:
        """Metadata for a configuration in the APK."""
        written = write_metadata(list(apexes), config_path=path, payload_binary_name=None, extra_apks=1)
        self.put("payload-metadata", written)

    def put_apk(self, label: str, idsig_label: str, apk: Path) -> None:
        """An APK and its idsig."""
        self.put(label, apk.read_bytes())
        self.put(idsig_label, b"")
        with opened(apk) as fd, opened(self.partitions[idsig_label], os.O_RDWR) as idsig:
            create_or_update_idsig_file(fd, idsig)

    def boot(self, *, absent: bool = False) -> tuple[list[tuple[int, str]], str]:
        """One run of the manager: errors that it reported, and its failure text."""
        reports: list[tuple[int, str]] = []
        port = self._directory / "port"
        port.write_bytes(b"")
        found = {label: str(path) for label, path in self.partitions.items()}
        with self._monkeypatch.context() as patch:
            patch.setattr(manager.vmactor_guest, "Host", lambda timeout: Host(reports, absent=absent))
            patch.setattr(manager, "find", lambda label, wait=False: found.get(label))
            patch.setattr(manager, "Device", FileDevice)
            patch.setattr(manager, "FAILURE_PORT", str(port))
            patch.setattr(manager, "APK_ROOT", str(self._directory / "mnt-apk"))
            patch.setattr(manager, "EXTRA_ROOT", str(self._directory / "mnt-extra"))
            patch.setattr(
                manager, "launch", lambda host, program, environment: self.launched.append(environment)
            )
            patch.setattr(manager, "read_metadata", self._metadata)
            assert manager.main() == 0
        return reports, port.read_text()

    def _metadata(self, device: FileDevice) -> Any:
        """The metadata with its path below our own mount point."""
        metadata = load("disks").read_metadata(device)
        path = metadata.config_path.replace("/mnt/apk/", f"{self._directory}/mnt-apk/")
        return metadata._replace(config_path=path)


@pytest.fixture
def machine(tmp_path: Path, tinydroid_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One that never booted."""
    return Machine(tmp_path, tinydroid_dir, monkeypatch)


def test_the_second_boot_of_an_instance_has_the_secret_of_the_first(machine: Machine) -> None:
    assert machine.boot() == ([], "")
    assert machine.boot() == ([], "")
    first, second = machine.launched
    assert first == second
    assert len(first["TINYDROID_INSTANCE_SECRET"]) == 64


def test_another_extra_apk_than_at_the_first_boot_is_refused(machine: Machine, tinydroid_dir: Path) -> None:
    machine.boot()
    machine.put_apk("extra-apk-0", "extra-idsig-0", tinydroid_dir / "changed.apk")
    message = "what goes with the APK is not what it was at this instance's first boot"
    assert machine.boot() == ([(2, message)], CHANGED)
    assert len(machine.launched) == 1


def test_another_list_of_apexes_than_at_the_first_boot_is_refused(machine: Machine) -> None:
    machine.boot()
    machine.put_metadata([ApexInfo(name="com.android.art", version=1, path=Path("/apex/art"))])
    reports, text = machine.boot()
    assert ([code for code, _ in reports], text) == ([2], CHANGED)


def test_what_nobody_thought_of_is_told_with_its_text_behind_a_bar(machine: Machine) -> None:
    del machine.partitions["vm-instance"]
    message = "there is no partition 'vm-instance'"
    assert machine.boot() == ([(0, message)], f"MICRODROID_UNKNOWN_RUNTIME_ERROR|{message}")


def test_without_a_manager_to_tell_the_failure_port_says_that_last(machine: Machine) -> None:
    del machine.partitions["vm-instance"]
    _, text = machine.boot(absent=True)
    assert text.endswith("MICRODROID_FAILED_TO_CONNECT_TO_VIRTUALIZATION_SERVICE")
