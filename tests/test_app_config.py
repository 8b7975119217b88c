"""App configurations: their rules, and what raw configuration each becomes."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.app_files import app_in, make_apk, make_platform
from tests.residue import descriptors
from vmactor.app_config import AppConfig
from vmactor.config import RawConfig
from vmactor.errors import (
    ApkError,
    IllegalArgumentError,
    ServiceSpecificError,
    UnsupportedOperationError,
    VmactorError,
)
from vmactor.messages import CpuTopology, DebugLevel, ImageKind
from vmactor.microdroid.apexes import StagedApex
from vmactor.microdroid.extra_apks import open_extra_apks
from vmactor.microdroid.payload_config import apexes_for_record
from vmactor.microdroid.platform import Platform
from vmactor.microdroid.translate import to_raw_config


def contents(fd: int | None) -> bytes:
    assert fd is not None
    return os.pread(fd, 10_000, 0)


def labels(raw: RawConfig) -> list[list[str]]:
    return [[part.label for part in disk.partitions] for disk in raw.disks]


# -- Rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"payload_binary_name": "lib.so"}, "Only one of config_path and payload_binary_name"),
        ({"config_path": None}, "Either config_path or payload_binary_name must be defined"),
        *(
            (
                {"config_path": None, "payload_binary_name": name},
                "Payload binary name must not specify a path"
                if "/" in name
                else "payload_binary_name must be",
            )
            for name in ("./x.so", "/x", "a/b", "", ".", "..", "a\0b", "x" * 256, "\ud800")
        ),
        *(
            ({"config_path": path}, "config_path")
            for path in ("", "/abs", "a//b", "../x", "a/../b", "a/.", "a/", "a\0b", "x" * 4001, "\ud800", 7)
        ),
        ({"name": "a b"}, "is not a VM name"),
        ({"protected_vm": 1}, "protected_vm"),
        ({"memory_mib": 0}, "Invalid memory_mib"),
        ({"task_profiles": ["a,b"]}, "task_profiles"),
        ({"os_name": "../x"}, "Unknown OS"),
        ({"os_name": "a/b"}, "Unknown OS"),
        ({"os_name": ".x"}, "Unknown OS"),
        ({"extra_params": "a\nb"}, "params"),
        ({"extra_apks": [0] * 61}, "at most 60"),
    ],
)
def test_what_can_never_be_right_is_refused_before_any_file_is_read(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with app_in(tmp_path) as app, pytest.raises(IllegalArgumentError, match=text):
        replace(app, **changes).validate()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"debug_level": 7}, r"unsupported debug level: DebugLevel\(7\)"),
        ({"cpu_topology": 7}, r"Failed to parse CPU topology value: CpuTopology\(7\)"),
        ({"apk": None}, "apk must be"),
        ({"extra_idsigs": [None]}, r"extra_idsigs\[0\]"),
        ({"instance_image": "path"}, "instance_image must be an open file"),
    ],
)
def test_values_of_a_wrong_kind_are_refused_at_once(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with app_in(tmp_path) as app, pytest.raises(IllegalArgumentError, match=text):
        replace(app, **changes)


def test_descriptors_are_checked_and_duplicated_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        (tmp_path / "file").open("rb") as readable,
        app_in(tmp_path / "app", extra_apks=[readable], extra_idsigs=[readable]) as app,
    ):
        app.check_descriptors()
        before = descriptors()
        with app.duplicate() as copy:
            assert copy != app
            assert contents(copy.apk) == contents(app.apk)
            assert len(copy.fds()) == 5
            assert set(copy.fds()).isdisjoint(before)
        assert descriptors() == before
        with pytest.raises(IllegalArgumentError, match=r"encrypted_storage_image: descriptor .* is not open"):
            replace(app, encrypted_storage_image=999).duplicate()
        assert descriptors() == before
        with pytest.raises(IllegalArgumentError, match=r"instance_image: .* open it for reading and writing"):
            replace(app, instance_image=readable.fileno()).check_descriptors()


# -- Translation --------------------------------------------------------------------------------------


def test_an_app_becomes_three_disks_in_the_order_of_the_reference(tmp_path: Path) -> None:
    place = make_platform(tmp_path / "apex")
    with (
        app_in(
            tmp_path / "app",
            {"apexes": [{"name": "com.android.art"}], "extra_apks": [{"path": "/a"}, {"path": "/b"}]},
            name="vm",
            debug_level=DebugLevel.FULL,
            encrypted_storage_image=Path("store"),
            extra_apks=[0, 0],
            extra_idsigs=[0, 0],
            memory_mib=300,
            cpu_topology=CpuTopology.MATCH_HOST,
            task_profiles=["A"],
        ) as app,
        to_raw_config(replace(app, extra_apks=(app.apk,) * 2, extra_idsigs=(app.idsig,) * 2), place) as raw,
    ):
        raw.validate()
        assert labels(raw) == [
            ["vbmeta_a", "super"],
            ["vm-instance", "encryptedstore"],
            [
                *("payload-metadata", "microdroid-apex-0", "microdroid-apex-1", "microdroid-apex-2"),
                *("microdroid-apk", "microdroid-apk-idsig"),
                *("extra-apk-0", "extra-idsig-0", "extra-apk-1", "extra-idsig-1"),
            ],
        ]
        system, writable, payload = raw.disks
        assert [disk.writable for disk in raw.disks] == [False, True, False]
        assert all(part.writable and part.format is ImageKind.QCOW2 for part in writable.partitions)
        assert not any(part.writable for part in (*system.partitions, *payload.partitions))
        assert contents(system.partitions[0].image).startswith(b"fs/microdroid_vbmeta")
        assert [contents(part.image) for part in payload.partitions[1:4]] == [
            *(b"com.android.adbd", b"com.android.art", b"com.android.os.statsd")
        ]
        assert contents(payload.partitions[0].image)[4:6] == b"\x08\x01"
        assert b"/mnt/apk/assets/config.json" in contents(payload.partitions[0].image)
        assert contents(payload.partitions[4].image) == contents(app.apk)
        assert contents(payload.partitions[5].image) == b"idsig"
        assert contents(raw.kernel).startswith(b"fs/microdroid_kernel")
        assert contents(raw.initrd) == b"debuggable"
        assert (raw.name, raw.memory_mib, raw.cpu_topology) == ("vm", 300, CpuTopology.MATCH_HOST)
        assert (raw.task_profiles, raw.platform_version, raw.params) == (("A",), "~1.0", None)


def test_a_binary_name_alone_gives_the_smallest_vm(tmp_path: Path) -> None:
    place = make_platform(tmp_path / "apex", params="quiet")
    with (
        app_in(tmp_path / "app", payload_binary_name="lib.so", extra_params="a=b") as app,
        to_raw_config(app, place) as raw,
    ):
        assert labels(raw)[1:] == [
            ["vm-instance"],
            ["payload-metadata", "microdroid-apex-0", "microdroid-apk", "microdroid-apk-idsig"],
        ]
        assert contents(raw.initrd) == b"normal"
        assert (raw.memory_mib, raw.protected_vm, raw.params) == (256, False, "quiet a=b")


def test_another_guest_and_kernel_can_be_chosen(tmp_path: Path) -> None:
    place = make_platform(tmp_path / "apex")
    etc = tmp_path / "apex" / "com.android.virt" / "etc"
    for old in list(etc.glob("microdroid*")):
        old.rename(etc / old.name.replace("microdroid", "tiny"))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"own kernel")
    with (
        kernel.open("rb") as file,
        app_in(tmp_path / "app", payload_binary_name="x", os_name="tiny", custom_kernel=file) as app,
        to_raw_config(app, place) as raw,
    ):
        assert contents(raw.kernel) == b"own kernel"
        assert contents(raw.initrd) == b"normal"


def _without(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
    ("config", "changes", "error", "text"),
    [
        ({"os": {"name": "other"}}, {}, UnsupportedOperationError, 'Unknown OS "other"'),
        (
            {"extra_apks": [{"path": "/a"}]},
            {},
            IllegalArgumentError,
            "payload config has 1 apks, but app config has 0 idsigs",
        ),
        ({}, {"extra_idsigs": [0]}, IllegalArgumentError, "config has 0 apks, but app config has 1 idsigs"),
        (
            {"extra_apks": [{"path": "/a"}]},
            {"extra_idsigs": [0]},
            IllegalArgumentError,
            "a path that stands in an APK is opened by its client",
        ),
        ({}, {"config_path": "assets/none"}, ApkError, "specified file not found in archive"),
        ("{", {}, IllegalArgumentError, "Couldn't read config from assets/config.json: not valid JSON"),
        ({"prefer_staged": True}, {}, ServiceSpecificError, "Failed to get service when prefer_staged"),
        ({"apexes": [{"name": f"a{n}"} for n in range(129)]}, {}, IllegalArgumentError, "at most 128"),
    ],
)
def test_a_payload_that_does_not_fit_is_told_and_nothing_stays_open(
    config: object, changes: dict[str, Any], error: type[VmactorError], text: str, tmp_path: Path
) -> None:
    place = make_platform(tmp_path / "apex")
    with app_in(tmp_path / "app", config, **changes) as app:
        before = descriptors()
        with pytest.raises(error, match="Failed to load app config") as caught:
            to_raw_config(app, place)
        assert text in str(caught.value)
        assert descriptors() == before


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_without("com.android.virt/etc/microdroid.json"), "microdroid.json"),
        (_without("com.android.virt/etc/microdroid_initrd_normal.img"), "initrd: Failed to open"),
        (_without("com.android.virt/etc/fs/microdroid_kernel"), "kernel: Failed to open"),
        (_without("files/com.android.os.statsd"), "APEX com.android.os.statsd: Failed to open"),
        (_without("apex-info-list.xml"), "apex-info-list.xml"),
        (
            lambda root: (root / "com.android.virt/etc/microdroid.json").write_text("{}"),
            "platform_version is missing",
        ),
    ],
)
def test_what_the_platform_lacks_is_not_the_callers_fault(
    spoil: Callable[[Path], object], text: str, tmp_path: Path
) -> None:
    place = make_platform(tmp_path / "apex")
    spoil(tmp_path / "apex")
    with app_in(tmp_path / "app", payload_binary_name="x") as app:
        before = descriptors()
        with pytest.raises(ServiceSpecificError, match="Failed to load app config") as caught:
            to_raw_config(app, place)
        assert text in str(caught.value)
        assert descriptors() == before


def test_staged_apexes_come_in_place_of_active_ones(tmp_path: Path) -> None:
    make_platform(tmp_path / "apex")
    new = tmp_path / "new"
    new.write_bytes(b"staged")
    place = Platform(tmp_path / "apex", lambda: [StagedApex("com.android.os.statsd", 2, new)])
    with app_in(tmp_path / "app", {"prefer_staged": True}) as app, to_raw_config(app, place) as raw:
        assert contents(raw.disks[2].partitions[1].image) == b"staged"


def test_more_partitions_than_a_disk_has_are_refused(tmp_path: Path) -> None:
    names = [f"apex-{number}" for number in range(126)]
    place = make_platform(tmp_path / "apex", *names)
    config = {"apexes": [{"name": name} for name in names]}
    with (
        app_in(tmp_path / "app", config) as app,
        to_raw_config(app, place) as raw,
        pytest.raises(IllegalArgumentError, match="128 partitions"),
    ):
        raw.validate()


# -- Extra APKs ---------------------------------------------------------------------------------------


def test_a_client_opens_the_extra_apks_itself(tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        file.write_text(file.name)
    apk = make_apk(tmp_path / "a.apk", {"extra_apks": [{"path": str(file)} for file in files]})
    with apk.open("rb") as opened_apk, ExitStack() as opened:
        fds = open_extra_apks(opened_apk.fileno(), "assets/config.json", opened)
        assert [contents(fd) for fd in fds] == [b"one", b"two"]


@pytest.mark.parametrize("path", ["relative", "../x", "/nonexistent/x", "/dev/zero", "/tmp", "pipe"])
def test_extra_apks_that_are_no_files_are_refused_without_waiting(path: str, tmp_path: Path) -> None:
    if path == "pipe":
        path = str(tmp_path / "pipe")
        os.mkfifo(path)
    apk = make_apk(tmp_path / "a.apk", {"extra_apks": [{"path": str(tmp_path / "a.apk")}, {"path": path}]})
    with apk.open("rb") as opened_apk:
        before = descriptors()
        with (
            ExitStack() as opened,
            pytest.raises(IllegalArgumentError, match="Failed to open the extra apk #1"),
        ):
            open_extra_apks(opened_apk.fileno(), "assets/config.json", opened)
        assert descriptors() == before


# -- The creation record ------------------------------------------------------------------------------


def test_the_creation_record_names_the_apexes_of_the_payloads_configuration(tmp_path: Path) -> None:
    with app_in(tmp_path / "a", {"apexes": [{"name": "b"}, {"name": "a"}]}) as app:
        assert apexes_for_record(app) == "b:a"
        assert apexes_for_record(replace(app, config_path="none")) == "INFO: Can't get VmPayloadConfig"
        assert apexes_for_record(replace(app, config_path=None, payload_binary_name="x")) == ""
        assert apexes_for_record(RawConfig(name="x", kernel=app.apk)) == ""


def test_an_app_configuration_says_whether_its_vm_can_be_looked_into(tmp_path: Path) -> None:
    with app_in(tmp_path) as app:
        assert not app.debuggable
        assert replace(app, debug_level=DebugLevel.FULL).debuggable
        assert isinstance(app, AppConfig)
