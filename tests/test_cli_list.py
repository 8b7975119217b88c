"""``vmactor list`` and ``vmactor info``: what there is, in words and as JSON."""

import json
import os
import pty
import stat
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.cli_process import Cli, cli, rows
from vmactor.cli import info
from vmactor.cli.list_vms import COLUMNS, age, row
from vmactor.cli.records import find
from vmactor.host import Crosvm, Finding, HostFacts, Program
from vmactor.state_dir import StateDirectory

__all__ = ["cli"]

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)
RECORD: dict[str, Any] = {
    "cid": 2051,
    "name": "web-3",
    "generation": 1,
    "state": "READY",
    "payload": "READY",
    "driver": "qemu",
    "suspended": False,
    "pid": 4194305,
    "protected": False,
    "directory": "/run/vmactor/vm/2051",
    "requester_uid": 0,
    "requester_pid": 99,
    "created": (NOW - timedelta(seconds=75)).isoformat(),
    "started": None,
    "vsock": "hybrid",
    "alive": True,
    "cpu_time_ms": 3210,
    "rss_vmm_kib": 90000,
}


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, ["2051", "web-3", "READY", "READY", "qemu", "3.2s", "88 MiB", "4194305", "99", "1m15s"]),
        (
            {"suspended": True},
            ["2051", "web-3", "suspended", "READY", "qemu", "3.2s", "88 MiB", "4194305", "99", "1m15s"],
        ),
        (
            {"alive": False},
            ["2051", "web-3", "orphaned", "READY", "qemu", "3.2s", "88 MiB", "4194305", "99", "1m15s"],
        ),
        ({"pid": None}, ["2051", "web-3", "READY", "READY", "qemu", "3.2s", "88 MiB", "-", "99", "1m15s"]),
        (
            {"name": "a\x1b[m", "created": 7},
            ["2051", r"a\x1b[m", "READY", "READY", "qemu", "3.2s", "88 MiB", "4194305", "99", "-"],
        ),
    ],
)
def test_a_record_becomes_a_row_whatever_is_in_it(changes: dict[str, Any], cells: list[str]) -> None:
    assert row(RECORD | changes, NOW) == cells


def test_a_record_with_hardly_anything_in_it_is_a_row_too() -> None:
    assert row({"cid": 5}, NOW) == ["5", "-", "orphaned", *7 * ["-"]]
    assert len(row({}, NOW)) == len(COLUMNS)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-5, "0s"), (0, "0s"), (59, "59s"), (60, "1m0s"), (3599, "59m59s"), (3600, "1h0m"), (90000, "1d1h")],
)
def test_an_age_has_two_units_at_most(seconds: int, expected: str) -> None:
    assert age((NOW - timedelta(seconds=seconds)).isoformat(), NOW) == expected


@pytest.mark.parametrize("since", [None, "", "yesterday", 7, "2026-03-04T12:00:00"])
def test_an_age_that_cannot_be_told_is_a_dash(since: object) -> None:
    assert age(since, NOW) == "-"


def write_two_records(state: StateDirectory) -> tuple[int, int]:
    """One VM whose manager is this process, one that nobody manages."""
    held = anyio.run(state.cids.claim)
    for cid in (held, held + 1):
        state.make_vm_directory(cid)
        state.write_record(cid, RECORD | {"cid": cid, "name": f"vm-{cid}", "created": None})
    (state.make_vm_directory(held + 2)[0] / "record.json").write_text("damaged")
    return held, held + 1


def remove(state: StateDirectory, *cids: int) -> None:
    for cid in cids:
        state.remove_vm_directory(cid)


def test_all_vms_of_the_user_are_listed_and_those_without_manager_are_orphaned(cli: Cli) -> None:
    with StateDirectory(cli.state_dir) as state:
        held, orphan = write_two_records(state)
        code, out, err = cli.run("list")
        as_json = cli.run("list", "--json")
        remove(state, held, orphan, held + 2)
    assert (code, err) == (0, "")
    assert out == (
        "CID   NAME     STATE     PAYLOAD  DRIVER  CPU   MEMORY  VMM      MANAGER  AGE\n"
        "2048  vm-2048  READY     READY    qemu    3.2s  88 MiB  4194305  99       -\n"
        "2049  vm-2049  orphaned  READY    qemu    3.2s  88 MiB  4194305  99       -\n"
    )
    assert [(one["cid"], one["alive"]) for one in rows(as_json[1])] == [(held, True), (orphan, False)]
    assert rows(as_json[1])[0] == RECORD | {"cid": held, "name": f"vm-{held}", "created": None}


def test_on_a_terminal_the_list_is_drawn(cli: Cli) -> None:
    ours, theirs = pty.openpty()
    with StateDirectory(cli.state_dir) as state:
        cids = write_two_records(state)
        environ = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        code, _, _ = cli.run("list", stdout=theirs, env=environ | {"TERM": "xterm", "COLUMNS": "100"})
        remove(state, *cids, cids[1] + 1)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert code == 0
    assert "\x1b[31morphaned\x1b[0m" in text
    assert "─" in text


def test_where_there_are_no_vms_nothing_is_made(cli: Cli) -> None:
    nowhere = cli.state_dir / "nowhere"
    cli.state_dir = nowhere
    assert cli.run("list") == (0, "no VMs\n", "")
    assert cli.run("list", "--json") == (0, "", "")
    assert not nowhere.exists()
    assert find(nowhere) == (nowhere, [])


def test_a_state_directory_that_others_can_reach_is_refused(cli: Cli) -> None:
    cli.state_dir.chmod(0o755)
    code, out, err = cli.run("list")
    assert (code, out) == (1, "")
    assert err == f"vmactor: error: {cli.state_dir} is open to others: run 'chmod 700 {cli.state_dir}'\n"
    assert stat.S_IMODE(cli.state_dir.stat().st_mode) == 0o755


# -- info ------------------------------------------------------------------------------------------------

FACTS = HostFacts(
    arch="x86_64",
    cpus=2,
    kvm=Finding(False, "no /dev/kvm", "load kvm_intel"),
    nested=True,
    vhost_vsock=Finding(False, "no /dev/vhost-vsock", "run 'modprobe vhost_vsock' as root"),
    af_vsock=Finding(True, "AF_VSOCK sockets can be made"),
    qemu=Program(True, r"/usr/bin/qemu\[1] 7.2.22", "", Path("/usr/bin/qemu[1]"), "7.2.22"),
    qboot=Finding(True, "/usr/share/qemu/qboot.rom"),
    vhost_device_vsock=Program(True, "/usr/bin/vhost-device-vsock 0.3.0", "", Path("/usr/bin/v"), "0.3.0"),
    crosvm=Crosvm(False, "no crosvm in PATH", "build it"),
    simulated=Program(True, "/usr/bin/simulated", "", Path("/usr/bin/simulated")),
)

GOLDEN = """\
vmactor 0.1.0 on x86_64, 2 CPUs, itself a VM

kvm                 no   no /dev/kvm
                         to have it: load kvm_intel
vhost-vsock         no   no /dev/vhost-vsock
                         to have it: run 'modprobe vhost_vsock' as root
af-vsock            yes  AF_VSOCK sockets can be made
qemu                yes  /usr/bin/qemu[1] 7.2.22
qboot               yes  /usr/share/qemu/qboot.rom
vhost-device-vsock  yes  /usr/bin/vhost-device-vsock 0.3.0
crosvm              no   no crosvm in PATH
                         to have it: build it
simulated           yes  /usr/bin/simulated
platform            no   no guest for apps in /apex
                         to have it: give its directory with --platform

--vmm auto picks qemu (emulated; platform version 1.0.0) with hybrid vsock:
  - a
  - b [c]
There is room for 7 more VMs of 256 MiB in one program; the next limit is open [files]:
  to have more: raise it
"""


def test_what_was_found_reads_as_documented() -> None:
    found = info.describe(FACTS, "auto")
    assert found["selected"]["reasons"]
    found["selected"]["reasons"] = ["a", r"b \[c]"]
    assert found["room"]["vms"] >= 0
    assert found["room"]["limit"]
    found["room"] |= {"vms": 7, "limit": r"open \[files]", "advice": "raise it"}
    assert info.for_people(found) == GOLDEN


def test_a_vmm_that_cannot_be_had_is_told_with_what_to_do() -> None:
    found = info.describe(FACTS, "crosvm")
    assert found["selected"] is None
    text = info.for_people(found)
    assert "No VM can run with --vmm crosvm." in text
    assert found["error"] in text


def test_what_a_build_of_crosvm_can_do_is_a_list_for_programs() -> None:
    build = Crosvm(True, "crosvm", options=frozenset({"vsock", "block"}), commands=frozenset({"run"}))
    found = info.describe(replace(FACTS, crosvm=build), "auto")
    assert found["findings"]["crosvm"]["options"] == ["block", "vsock"]
    assert json.loads(json.dumps(found))["findings"]["crosvm"]["commands"] == ["run"]


def test_what_was_found_can_be_json(cli: Cli) -> None:
    code, out, err = cli.run("info", "--json")
    assert (code, err) == (0, "")
    (found,) = rows(out)
    assert set(found) == {
        "version",
        "arch",
        "cpus",
        "nested",
        "findings",
        "platform",
        "wanted",
        "selected",
        "room",
        "error",
    }
    assert set(found["findings"]) >= {"kvm", "vhost_vsock", "qemu", "crosvm", "vhost_device_vsock"}
    assert json.loads(json.dumps(info.describe(FACTS, "auto"))) == info.describe(FACTS, "auto")


def test_the_guests_for_apps_of_a_platform_elsewhere_are_told(cli: Cli, tmp_path: Path) -> None:
    code, out, _err = cli.run("info", "--platform", tmp_path)
    assert code == 0
    assert f"no guest for apps in {tmp_path}" in out
    parts = tmp_path / "com.android.virt" / "etc"
    parts.mkdir(parents=True)
    for name in ("microdroid.json", "microdroid_initrd_normal.img", "microdroid_initrd_debuggable.img"):
        (parts / name).touch()
    _code, out, _err = cli.run("info", "--platform", tmp_path, "--json")
    (found,) = rows(out)
    assert found["platform"] == {"root": str(tmp_path), "guests": ["microdroid"]}
    _code, out, _err = cli.run("info", "--platform", tmp_path)
    assert f"microdroid in {tmp_path}" in out


def test_what_was_found_is_readable_through_a_pipe(cli: Cli) -> None:
    code, out, err = cli.run("info")
    assert (code, err) == (0, "")
    assert out.startswith("vmactor 0.1.0 on ")
    assert "\x1b" not in out
