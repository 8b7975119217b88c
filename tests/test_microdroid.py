"""APEXes, class path, metadata and payload configurations: the reference's own tables, and hostile input."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.app_files import apex_entry, apex_list, make_platform
from vmactor.errors import IllegalArgumentError, ServiceSpecificError
from vmactor.microdroid import platform as platform_module
from vmactor.microdroid.apexes import (
    ApexInfo,
    StagedApex,
    override_staged,
    parse_apex_info_list,
    select_apexes,
)
from vmactor.microdroid.classpath import apexes_in_classpath
from vmactor.microdroid.metadata import write_metadata
from vmactor.microdroid.payload_config import PayloadConfig, Task, TaskType, parse_payload_config
from vmactor.microdroid.platform import Platform


def apex(name: str, **changes: Any) -> ApexInfo:
    values: dict[str, Any] = {"name": name, "version": 1, "path": Path("/a", name)}
    return ApexInfo(**(values | changes))


# -- The class path -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (
            "\nexport FOO /apex/unterminated\nexport BAR /apex/valid.apex/something\nwrong\nexport EMPTY\n"
            "export OTHER /foo/bar:/baz:/apex/second.valid.apex/:gibberish:",
            {"valid.apex", "second.valid.apex"},
        ),
        ("export A /apex/a/x\r\nexport B /apex/b/x\r\n", {"a", "b"}),
        ("export A /apex//x", {""}),
        ("export A /apex/a/b:/apex/c/d/e", {"a", "c"}),
        ("export  A /apex/a/x", set()),
        (" export A /apex/a/x", set()),
        ("export A /apex/a/x ", set()),
        ("export\tA\t/apex/a/x", set()),
        ("export A apex/a/x:/APEX/b/x", set()),
        ("", set()),
    ],
)
def test_the_class_path_names_its_apexes(output: str, names: set[str]) -> None:
    assert apexes_in_classpath(output) == names


# -- The list of APEXes -------------------------------------------------------------------------------


def test_a_list_is_read_with_its_types_and_seconds_despite_their_name() -> None:
    data = apex_list(
        apex_entry("a", versionCode=2**64 - 1, lastUpdateMillis=12, isFactory="0", isActive="1", unknown="x"),
        "<apex-info><moduleName>b</moduleName><versionCode>2</versionCode><modulePath>/x/b</modulePath>"
        "<lastUpdateMillis>3</lastUpdateMillis><isFactory>true</isFactory><isActive>false</isActive>"
        "<provideSharedApexLibs>1</provideSharedApexLibs><more>1</more></apex-info>",
    )
    assert parse_apex_info_list(data, Platform(Path("/tree")).locate) == [
        ApexInfo(
            name="a",
            version=2**64 - 1,
            path=Path("/tree/files/a"),
            last_update_seconds=12,
            is_factory=False,
        ),
        ApexInfo(
            name="b",
            version=2,
            path=Path("/x/b"),
            last_update_seconds=3,
            is_active=False,
            provides_shared_libs=True,
        ),
    ]


BOMB = b'<!DOCTYPE l [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><l>&b;</l>'


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (apex_list(), "missing field `apex-info`"),
        (apex_list("<other/>"), "missing field `apex-info`"),
        (apex_list(apex_entry("a"), "<other/>", apex_entry("b")), "duplicate field `apex-info`"),
        (apex_list(apex_entry("a", versionCode=-1)), 'versionCode is "-1"'),
        (apex_list(apex_entry("a", versionCode=2**64)), "versionCode"),
        (apex_list(apex_entry("a", versionCode="9" * 5000)), "versionCode"),
        (apex_list(apex_entry("a", isActive="True")), 'isActive is "True"'),
        (apex_list('<apex-info moduleName="a"><moduleName>b</moduleName></apex-info>'), "duplicate field"),
        (apex_list('<apex-info moduleName="a"/>'), "missing field `versionCode`"),
        (apex_list(apex_entry("a").replace(' isActive="true"', "")), "missing field `isActive`"),
        (b"<l>", "no element found"),
        (b"\xff\xfe<", "Failed to parse"),
        (b'<?xml version="1.0" encoding="nonsense"?><l/>', "Failed to parse"),
        (BOMB, "document type"),
        (b'<!DOCTYPE l SYSTEM "file:///etc/passwd"><l/>', "document type"),
        (b"<a>" * 50_000, "Failed to parse"),
    ],
)
def test_a_broken_list_is_told_in_the_words_of_the_reference(data: bytes, text: str) -> None:
    with pytest.raises(ServiceSpecificError) as caught:
        parse_apex_info_list(data)
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet="<>/apex-info=\"'& !D", max_size=200).map(str.encode))
def test_any_list_is_read_or_refused(data: bytes) -> None:
    try:
        parse_apex_info_list(data)
    except ServiceSpecificError:
        return


# -- Selection ----------------------------------------------------------------------------------------

ENTRIES = [
    apex("com.android.adbd"),
    apex("com.android.os.statsd", is_active=False),
    apex("com.android.os.statsd"),
    apex("no_classpath"),
    apex("has_classpath", is_active=False, has_classpath=True),
    apex("has_classpath", has_classpath=True),
    apex("apex-foo", is_active=False),
    apex("apex-foo"),
    apex("sharedlibs", is_active=False, provides_shared_libs=True),
    apex("sharedlibs", provides_shared_libs=True),
]


@pytest.mark.parametrize(
    ("configured", "debuggable", "selected"),
    [
        (["apex-foo", "{CLASSPATH}"], True, {0, 2, 5, 7, 8, 9}),
        (["apex-foo", "{CLASSPATH}"], False, {2, 5, 7, 8, 9}),
        ([], False, {2, 8, 9}),
        (["absent"], True, {0, 2, 8, 9}),
        (["has_classpath"], False, {2, 5, 8, 9}),
    ],
)
def test_a_payload_gets_what_it_names_what_is_required_and_shared_libraries(
    configured: list[str], debuggable: bool, selected: set[int]
) -> None:
    entries = [replace(entry, last_update_seconds=number) for number, entry in enumerate(ENTRIES)]
    chosen = select_apexes(entries, configured, debuggable=debuggable)
    assert {entry.last_update_seconds for entry in chosen} == selected


def test_apexes_are_sorted_by_name_version_and_time_and_ties_stay_in_order() -> None:
    keys = [
        ("b", 1, 0),
        ("a", 10, 5),
        ("a", 9, 7),
        ("a", 10, 4),
        ("B", 2, 0),
        ("\U0001f600", 1, 1),
        ("é", 1, 1),
    ]
    entries = [
        apex(name, version=version, last_update_seconds=time) for name, version, time in [*keys, ("b", 1, 0)]
    ]
    entries[-1] = replace(entries[-1], path=Path("/second"))
    chosen = select_apexes(reversed(entries), {name for name, _, _ in keys}, debuggable=False)
    assert [(entry.name, entry.version, entry.last_update_seconds) for entry in chosen] == sorted(
        [*keys, ("b", 1, 0)], key=lambda key: (key[0].encode(), *key[1:])
    )
    assert [entry.path.name for entry in chosen if entry.name == "b"] == ["second", "b"]


def test_a_staged_apex_replaces_the_active_one_and_a_factory_one_stays_inactive(tmp_path: Path) -> None:
    file = tmp_path / "staged"
    file.write_bytes(b"")
    os.utime(file, (5.9, 5.9))
    staged = StagedApex("a", 2, file, has_classpath=True)
    old = apex("a", path=Path("/v1"), last_update_seconds=1)
    new = ApexInfo(
        name="a", version=2, path=file, last_update_seconds=5, is_factory=False, has_classpath=True
    )
    assert override_staged([old], [staged]) == [new, replace(old, is_active=False)]

    factory = replace(old, is_active=False)
    active = apex("a", version=2, path=Path("/v2"), is_factory=False)
    other = apex("b")
    third = replace(staged, version=3)
    assert override_staged([factory, other, active], [third]) == [factory, other, replace(new, version=3)]
    assert override_staged([other], [staged]) == [other]


def test_a_staged_apex_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServiceSpecificError, match="No such file"):
        override_staged([apex("a")], [StagedApex("a", 2, tmp_path / "none")])


# -- The platform -------------------------------------------------------------------------------------


def test_the_class_path_is_asked_for_where_a_payload_wants_it(tmp_path: Path) -> None:
    script = '#!/bin/sh\necho called >> "$0.calls"\necho "export BOOT /apex/com.android.art/x.jar" > "$1"\n'
    place = make_platform(tmp_path, derive_classpath=script)
    names = [entry.name for entry in place.select_apexes([], debuggable=False, prefer_staged=False)]
    assert names == ["com.android.os.statsd"]
    calls = tmp_path / "com.android.sdkext" / "bin" / "derive_classpath.calls"
    assert not calls.exists()
    names = [
        entry.name for entry in place.select_apexes(["{CLASSPATH}"], debuggable=True, prefer_staged=False)
    ]
    assert names == ["com.android.adbd", "com.android.art", "com.android.os.statsd"]
    assert calls.read_text() == "called\n"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("#!/bin/sh\necho no idea >&2\nexit 3\n", "derive_classpath returned 3: no idea"),
        ("#!/bin/sh\nprintf '\\377'\n", "not UTF-8"),
        ("#!/bin/sh\nexec yes\n", "more than"),
        ("#!/bin/sh\nexec sleep 100\n", "did not end"),
        ("#!/nonexistent\n", "cannot be run"),
        (None, "cannot be run"),
    ],
)
def test_a_class_path_that_cannot_be_had_says_why_and_leaves_no_process(
    script: str | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text == "did not end":
        monkeypatch.setattr(platform_module, "CLASSPATH_SECONDS", 0.3)
    place = make_platform(tmp_path, derive_classpath=script)
    with pytest.raises(ServiceSpecificError, match=text):
        place.select_apexes(["{CLASSPATH}"], debuggable=False, prefer_staged=False)


def test_the_guests_of_a_platform_are_those_with_all_their_parts(tmp_path: Path) -> None:
    assert Platform(tmp_path / "none").guests() == []
    place = make_platform(tmp_path)
    place.os_config_path("half").write_text("{}")
    assert place.guests() == ["microdroid"]


def test_staged_apexes_are_asked_of_whoever_knows_them(tmp_path: Path) -> None:
    place = make_platform(tmp_path)
    with pytest.raises(ServiceSpecificError, match="Failed to get service when prefer_staged is set"):
        place.select_apexes([], debuggable=False, prefer_staged=True)
    file = tmp_path / "new.apex"
    file.write_bytes(b"")
    hooked = replace(place, staged_apexes=lambda: [StagedApex("com.android.os.statsd", 9, file)])
    (chosen,) = hooked.select_apexes([], debuggable=False, prefer_staged=True)
    assert (chosen.version, chosen.path, chosen.is_factory) == (9, file, False)


def test_a_list_that_is_absent_or_very_large_is_told(tmp_path: Path) -> None:
    place = make_platform(tmp_path)
    file = tmp_path / "apex-info-list.xml"
    with file.open("r+b") as large:
        large.truncate(platform_module.MAX_APEX_INFO_LIST + 1)
    with pytest.raises(ServiceSpecificError, match="more than 4194304 bytes"):
        place.select_apexes([], debuggable=False, prefer_staged=False)
    file.unlink()
    with pytest.raises(ServiceSpecificError, match=r'Failed to open ".*apex-info-list.xml": No such file'):
        place.select_apexes([], debuggable=False, prefer_staged=False)


# -- Metadata -----------------------------------------------------------------------------------------

VECTOR_A = """
0801122a0a10636f6d2e616e64726f69642e6164626412116d6963726f64726f69642d617065782d30288b0d3001
122f0a15636f6d2e616e64726f69642e6f732e73746174736412116d6963726f64726f69642d617065782d3128cfc2f105
1a2b0a0361706b120e6d6963726f64726f69642d61706b1a146d6963726f64726f69642d61706b2d6964736967
2a1c0a1a4d6963726f64726f6964546573744e61746976654c69622e736f"""
VECTOR_B = """
08011a2b0a0361706b120e6d6963726f64726f69642d61706b1a146d6963726f64726f69642d61706b2d6964736967
221e2f6d6e742f61706b2f6173736574732f766d5f636f6e6669672e6a736f6e"""


def test_metadata_is_byte_for_byte_that_of_the_reference() -> None:
    apexes = [
        apex("com.android.adbd", last_update_seconds=1675),
        apex("com.android.os.statsd", last_update_seconds=12345679, is_factory=False),
    ]
    written = write_metadata(apexes, payload_binary_name="MicrodroidTestNativeLib.so")
    assert written == bytes.fromhex("000000aa" + VECTOR_A)
    assert write_metadata([], config_path="assets/vm_config.json") == bytes.fromhex("0000004f" + VECTOR_B)


def test_metadata_without_a_configuration_counts_the_extra_apks() -> None:
    assert write_metadata([], payload_binary_name="a", extra_apks=2).endswith(b"\x2a\x05\x0a\x01a\x10\x02")


# -- The payload's configuration ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("{}", PayloadConfig()),
        (
            '{"os":{"name":"microdroid"},"task":{"type":"microdroid_launcher","command":'
            '"MicrodroidTestNativeLib.so"},"export_tombstones":true}',
            PayloadConfig(
                task=Task(type=TaskType.MICRODROID_LAUNCHER, command="MicrodroidTestNativeLib.so"),
                export_tombstones=True,
            ),
        ),
        (
            '{"version":1,"task":{"type":"executable","command":"/apex/com.android.compos/bin/compsvc"},'
            '"apexes":[{"name":"com.android.art"},{"name":"{CLASSPATH}"}],"extra_apks":'
            '[{"path":"/system/etc/security/fsverity/BuildManifest.apk"}],"enable_authfs":true}',
            PayloadConfig(
                task=Task(command="/apex/com.android.compos/bin/compsvc"),
                apexes=("com.android.art", "{CLASSPATH}"),
                extra_apks=("/system/etc/security/fsverity/BuildManifest.apk",),
                enable_authfs=True,
            ),
        ),
        ('{"task": null, "export_tombstones": null}', PayloadConfig()),
        ('{"task": {"command": "x"}}', PayloadConfig(task=Task(command="x"))),
        ('{"os": {"name": "other", "x": 1}, "new": [1.5e9], "new": 2}', PayloadConfig(os="other")),
    ],
)
def test_a_payload_configuration_is_read_as_the_reference_does(text: str, config: PayloadConfig) -> None:
    assert parse_payload_config(text) == parse_payload_config(text.encode()) == config


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"os": {}}', "os: name is missing"),
        ('{"os": null}', "os"),
        ('{"os": "microdroid"}', "os"),
        ('{"task": {"type": "executable"}}', "task: command is missing"),
        ('{"task": {"type": "Executable", "command": "x"}}', "task.type"),
        ('{"task": {"command": ""}}', "task.command"),
        ('{"task": {"command": "a\\u0000b"}}', "task.command"),
        ('{"apexes": null}', "apexes"),
        ('{"apexes": ["a"]}', "apexes[0]"),
        ('{"apexes": [{"name": "a", "name": "b"}]}', "apexes[0].name: is given twice"),
        ('{"extra_apks": [{"path": 1}]}', "extra_apks[0].path"),
        ('{"extra_apks": [' + ",".join(['{"path": "/a"}'] * 61) + "]}", "at most 60"),
        ('{"prefer_staged": null}', "prefer_staged"),
        ('{"prefer_staged": 1}', "prefer_staged"),
        ('{"apexes": [{"name": "a"},]}', "not valid JSON"),
        ("{} {}", "not valid JSON"),
        ("\ufeff{}", "not valid JSON"),
        ("[]", "the file"),
        ("", "not valid JSON"),
        ('{"x": ' + "[" * 20 + "]" * 20 + "}", "nested"),
        ('{"x": ' + "[" * 100_000, "nested"),
        ('{"prefer_staged": ' + "9" * 100_000 + "}", "prefer_staged"),
        ('{"prefer_staged": 1e999999999}', "prefer_staged"),
        ('{"task": {"command": "' + "a" * 5000 + '"}}', "task.command"),
        (" " * (1 << 20) + "{}", "too large"),
        ('{"os": {"name": "\\ud800"}}', "os.name"),
    ],
)
def test_a_wrong_payload_configuration_is_refused_with_the_place(text: str, place: str) -> None:
    with pytest.raises(IllegalArgumentError) as caught:
        parse_payload_config(text)
    assert place in str(caught.value)
    assert len(str(caught.value)) < 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["os", "name", "task", "type", "command", "apexes", "extra_apks", "path", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_payload_configuration_is_read_or_refused(value: object) -> None:
    try:
        config = parse_payload_config(json.dumps(value))
    except IllegalArgumentError:
        return
    assert isinstance(value, dict)
    assert len(config.apexes) == len(value.get("apexes", []))
