"""Configuration files: what may be in them, how errors name the place; nothing stays open or blocks."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmactor.config import RawConfig
from vmactor.config_file import DiskFile, PartitionFile, VmConfigFile, load_config, parse_config
from vmactor.errors import (
    IllegalArgumentError,
    ResourceExhaustedError,
    UnsupportedOperationError,
    VmactorError,
)
from vmactor.messages import CpuTopology
from vmactor.strict_json import MAX_BYTES

DISK = {"image": "d.img", "writable": False}


def text_of(**fields: Any) -> str:
    return json.dumps({"kernel": "vmlinux", "platform_version": "~1.0"} | fields)


# -- What is read ----------------------------------------------------------------------------------


def test_a_full_file_is_read_with_its_types() -> None:
    text = text_of(
        name="web-1",
        initrd="/abs/initrd",
        params="console=ttyS0",
        disks=[
            {"image": "a.img", "writable": True},
            {"image": None, "partitions": [{"label": "p", "path": "p.img"}], "writable": False},
            {"partitions": [{"label": "q", "path": "q.img", "writable": True}], "writable": True},
        ],
        protected=True,
        memory_mib=2**31 - 1,
        cpu_topology="match_host",
        task_profiles=["A", "b.c"],
    )
    assert (
        parse_config(text)
        == parse_config(text.encode())
        == VmConfigFile(
            name="web-1",
            kernel="vmlinux",
            initrd="/abs/initrd",
            params="console=ttyS0",
            disks=(
                DiskFile(image="a.img", writable=True),
                DiskFile(partitions=(PartitionFile(label="p", path="p.img"),), writable=False),
                DiskFile(partitions=(PartitionFile(label="q", path="q.img", writable=True),), writable=True),
            ),
            protected=True,
            memory_mib=2**31 - 1,
            platform_version="~1.0",
            cpu_topology=CpuTopology.MATCH_HOST,
            task_profiles=("A", "b.c"),
        )
    )


def test_absent_and_null_fields_have_the_defaults_of_the_reference() -> None:
    nulls = dict.fromkeys(["name", "kernel", "initrd", "params", "memory_mib"])
    expected = VmConfigFile(bootloader="fw", platform_version="^1.0")
    assert parse_config('{"bootloader": "fw", "platform_version": "1.0"}') == expected
    assert parse_config(json.dumps(nulls | {"bootloader": "fw", "platform_version": "1.0"})) == expected
    assert not expected.disks
    assert not expected.protected
    assert expected.cpu_topology is CpuTopology.ONE_CPU


def test_the_configuration_that_ships_with_microdroid_is_read() -> None:
    apex = "/apex/com.android.virt/etc/fs"
    text = f"""
    {{
      "kernel": "{apex}/microdroid_kernel",
      "disks": [
        {{
          "partitions": [
            {{"label": "vbmeta_a", "path": "{apex}/microdroid_vbmeta.img"}},
            {{"label": "super", "path": "{apex}/microdroid_super.img"}}
          ],
          "writable": false
        }}
      ],
      "memory_mib": 256,
      "platform_version": "~1.0"
    }}
    """
    assert [part.label for part in parse_config(text).disks[0].partitions] == ["vbmeta_a", "super"]


# -- What is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # required, and of the right type
        ({"platform_version": None}, "platform_version: must be text, not null"),
        ({"platform_version": ""}, "platform_version: Invalid platform version requirement : unexpected end"),
        ({"platform_version": 1}, "platform_version: must be text, not the number 1"),
        ({"name": "a b"}, 'name: "a b" is not a VM name'),
        ({"name": 5}, "name: must be text, not the number 5"),
        ({"kernel": ""}, 'kernel: must be a path of 1 to 4095 bytes without NUL, not the text ""'),
        ({"kernel": "a\0b"}, r'kernel: must be a path .*, not the text "a\\x00b"'),
        ({"kernel": "\ud800"}, r"kernel: must be a path .* in proper Unicode, not the text .*\\u\{d800\}"),
        ({"kernel": "é" * 2048}, "kernel: must be a path of 1 to 4095 bytes"),
        ({"kernel": ["x"]}, "kernel: must be a path .*, not a list"),
        ({"initrd": {"a": 1}}, "initrd: must be a path .*, not an object"),
        ({"params": "a\nb"}, "params must be one line"),
        ({"params": "x" * 2048}, "params has 2048 bytes"),
        ({"params": 1}, "params: must be text, not the number 1"),
        ({"protected": None}, "protected: must be true or false, not null"),
        ({"protected": "yes"}, 'protected: must be true or false, not the text "yes"'),
        ({"protected": 1}, "protected: must be true or false, not the number 1"),
        ({"memory_mib": 0}, "memory_mib: must be a whole number of MiB from 1, not the number 0"),
        ({"memory_mib": -1}, "memory_mib: must be a whole number of MiB from 1, not the number -1"),
        ({"memory_mib": 1.0}, r"memory_mib: must be a whole number of MiB from 1, not the number 1\.0"),
        ({"memory_mib": True}, "memory_mib: must be a whole number of MiB from 1, not true"),
        ({"memory_mib": "256"}, 'memory_mib: must be a whole number of MiB from 1, not the text "256"'),
        ({"memory_mib": 2**31}, "Invalid memory_mib"),
        ({"memory_mib": 2**64}, "Invalid memory_mib"),
        ({"cpu_topology": "two"}, 'cpu_topology: must be "one_cpu" or "match_host", not the text "two"'),
        ({"cpu_topology": None}, 'cpu_topology: must be "one_cpu" or "match_host", not null'),
        ({"cpu_topology": []}, 'cpu_topology: must be "one_cpu" or "match_host", not a list'),
        ({"task_profiles": "A"}, 'task_profiles: must be a list, not the text "A"'),
        ({"task_profiles": ["A", 1]}, r"task_profiles\[1\]: must be text, not the number 1"),
        ({"task_profiles": ["A,B"]}, r"task_profiles\[0\] must be 1 to 64"),
        ({"task_profiles": ["A"] * 33}, "task_profiles: at most 32 are possible, not 33"),
        # disks
        ({"disks": None}, "disks: must be a list, not null"),
        ({"disks": {}}, "disks: must be a list, not an object"),
        ({"disks": [DISK, 1]}, r"disks\[1\]: must be an object, not the number 1"),
        ({"disks": [DISK] * 27}, "disks: at most 26 are possible, not 27"),
        ({"disks": [DISK, {"image": "x"}]}, r"disks\[1\]: writable is missing"),
        ({"disks": [DISK, DISK | {"image": 3}]}, r"disks\[1\]\.image: must be a path .*, not the number 3"),
        (
            {"disks": [DISK | {"image": None}]},
            r"disks\[0\]: Exactly one of image and partitions .* \(Was neither",
        ),
        (
            {"disks": [DISK | {"partitions": [{"label": "p", "path": "x"}]}]},
            r"disks\[0\]: Exactly one of image and partitions must be specified\. \(Was both",
        ),
        ({"disks": [{"partitions": [{"label": "p"}]}]}, r"disks\[0\]\.partitions\[0\]: path is missing"),
        ({"disks": [{"partitions": [{"path": "p"}]}]}, r"disks\[0\]\.partitions\[0\]: label is missing"),
        (
            {"disks": [{"partitions": [{"label": ""}]}]},
            r"disks\[0\]\.partitions\[0\]\.label: '' is no partition label",
        ),
        ({"disks": [{"partitions": [{}] * 129}]}, r"disks\[0\]\.partitions: at most 128"),
        # boot
        ({"kernel": None}, r"VM must have either a bootloader or a kernel image\."),
        ({"bootloader": "fw"}, r"Can't have both bootloader and kernel/initrd image\."),
        # unknown
        ({"colour": 1}, "colour: there is no such field; there are name, kernel, "),
        ({"memory_mb": 1}, "memory_mb: there is no such field; do you mean memory_mib?"),
        ({"memoryMib": 1}, "memoryMib: there is no such field; do you mean memory_mib?"),
        ({"[red]\x1b" * 99: 1}, r"^\\\[red]\\x1b.{40,60}…: there is no such field"),
        ({"": 1}, "^: there is no such field"),
        ({"disks": [DISK | {"writeable": True}]}, r"disks\[0\]\.writeable: .* do you mean writable\?"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(IllegalArgumentError, match=message):
        parse_config(text_of(**fields))


def test_platform_version_is_required() -> None:
    with pytest.raises(IllegalArgumentError, match="the file: platform_version is missing"):
        parse_config('{"kernel": "k"}')


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("gdb_port", "debugger"),
        ("gdbPort", "debugger"),
        ("console_input_device", "consoles only go to files"),
        ("devices", "devices cannot be assigned yet"),
        ("input", "no screen, sound or input"),
        ("gpu", "no screen, sound or input"),
        ("audio", "no screen, sound or input"),
        ("display", "no screen, sound or input"),
        ("usb", "no screen, sound or input"),
        ("sharedPath", "use a disk"),
        ("shared_paths", "use a disk"),
        ("host_cpu_topology", "use cpu_topology"),
        ("cpu_options", "use cpu_topology"),
        ("networkSupported", "use network"),
        ("hugepages", "the VMM's defaults"),
        ("hugePages", "the VMM's defaults"),
        ("balloon", "the VMM's defaults"),
        ("auto_memory_balloon", "the VMM's defaults"),
        ("swiotlbMib", "the VMM's defaults"),
        ("dtbo", "devices cannot be assigned yet"),
        ("debuggable", "without it"),
        ("instance_id", "not supported yet"),
        ("apk", "not for raw configurations"),
    ],
)
def test_fields_of_later_aosp_versions_are_refused_by_name(field: str, hint: str) -> None:
    with pytest.raises(
        UnsupportedOperationError, match=f"^{field}: not supported by vmactor; remove it .*{hint}"
    ):
        parse_config(text_of(**{field: False}))


def with_guid(guid: object) -> VmConfigFile:
    disk = {"partitions": [{"label": "p", "path": "x", "guid": guid}], "writable": False}
    return parse_config(text_of(disks=[disk]))


def test_a_partition_may_have_a_guid() -> None:
    guid = "00112233-4455-6677-8899-aabbccddeeff"
    assert with_guid(guid).disks[0].partitions[0].guid == UUID(guid)
    assert with_guid(None).disks[0].partitions[0].guid is None


@pytest.mark.parametrize("guid", ["0", "", 7, "00112233-4455-6677-8899-aabbccddeefg"])
def test_what_is_no_guid_is_refused(guid: object) -> None:
    with pytest.raises(IllegalArgumentError, match=r"^disks\[0\]\.partitions\[0\]\.guid\b"):
        with_guid(guid)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "not valid JSON at line 1, column 1: Expecting value"),
        ("{", "not valid JSON at line 1, column 2"),
        ("{'a': 1}", "not valid JSON at line 1, column 2"),
        (text_of() + " x", "not valid JSON at line 1, column .*: Extra data"),
        (text_of() + text_of(), "not valid JSON at line 1, column .*: Extra data"),
        (text_of()[:-1] + ",}", "not valid JSON"),
        (
            text_of()[:-1] + ', "params": "a\nb"}',
            "not valid JSON at line 1, column .*: Invalid control character",
        ),
        ("// comment\n" + text_of(), "not valid JSON at line 1, column 1"),
        ("\ufeff" + text_of(), "not valid JSON at line 1, column 1: Unexpected UTF-8 BOM"),
        (text_of().encode("utf-16"), "not UTF-8 at byte 0"),
        (b'{"kernel": "\xe9"}', "not UTF-8 at byte 12"),
        ("[]", "the file: must be an object, not a list"),
        ("null", "the file: must be an object, not null"),
        ("NaN", "the file: must be an object, not the number NaN"),
        (text_of()[:-1] + ', "kernel": "other"}', "kernel: is given twice"),
        (text_of()[:-1] + ', "name": null, "name": null}', "name: is given twice"),
        (text_of(disks=[DISK])[:-3] + ', "image": "x"}]}', r"disks\[0\]\.image: is given twice"),
        (text_of()[:-1] + ', "memory_mib": NaN}', "memory_mib: must be .*, not the number NaN"),
        (text_of()[:-1] + ', "memory_mib": -Infinity}', "memory_mib: must be .*, not the number -Infinity"),
        (text_of()[:-1] + ', "memory_mib": 1e3}', "memory_mib: must be .*, not the number 1e3"),
        (text_of()[:-1] + ', "memory_mib": 1e99999}', "memory_mib: must be .*, not the number 1e99999"),
        (text_of()[:-1] + f', "memory_mib": {"9" * 9999}}}', "memory_mib: must be .*, not the number 9{39}…"),
        (text_of(disks=["x"])[:-3].replace('"x', "[" * 5000), "nested more than 16 deep at character"),
        ("[" * 100_000, "nested more than 16 deep at character 16"),
        ('{"a":' * 100_000, "nested more than 16 deep"),
        ('["' + '\\"' * 400_000, "not valid JSON"),
        (" " * MAX_BYTES + "{}", f"too large; a configuration file has at most {MAX_BYTES} bytes"),
        (b" " * MAX_BYTES + b"{}", f"too large; a configuration file has at most {MAX_BYTES} bytes"),
    ],
)
def test_what_is_not_strictly_json_is_refused(data: str | bytes, message: str) -> None:
    with pytest.raises(IllegalArgumentError, match=message):
        parse_config(data)


def test_brackets_within_text_are_no_nesting() -> None:
    assert parse_config(text_of(params='\\"[{' * 100)).params == '\\"[{' * 100


def check_outcome(data: str | bytes) -> None:
    """It is a configuration, or an error that can be shown; any other exception fails the test."""
    message = ""
    try:
        parse_config(data)
    except VmactorError as error:
        message = error.message
    assert len(message) < 1000
    assert message.isprintable()


@given(st.binary(max_size=200) | st.text(max_size=200))
@example(b'{"\\ud800":1}')
@example('{"disks":[{"image":1e400}]}')
def test_any_bytes_give_a_configuration_or_a_typed_short_error(data: bytes | str) -> None:
    check_outcome(data)


KNOWN = "name kernel initrd bootloader params disks protected memory_mib platform_version cpu_topology"
INNER = "task_profiles image writable partitions label path gdb_port"
FIELDS = st.sampled_from([*KNOWN.split(), *INNER.split(), "x\n", "\ud800"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(FIELDS, VALUES, max_size=8))
def test_any_json_gives_a_configuration_or_a_typed_short_error(fields: dict[str, Any]) -> None:
    check_outcome(text_of(**fields))


# -- Files -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a kernel and a disk."""
    (tmp_path / "vmlinux").write_bytes(b"kernel")
    (tmp_path / "d.img").write_bytes(b"\0" * 512)
    return tmp_path


def write(folder: Path, **fields: Any) -> Path:
    path = folder / "vm.json"
    path.write_text(text_of(**fields))
    return path


def open_descriptors() -> list[int]:
    return sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir())


def access_mode(fd: int | None) -> int:
    assert fd is not None
    fields = dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()[:3])
    return int(fields["flags"], 8)


def test_files_are_found_beside_the_configuration_and_opened_as_they_are_used(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, initrd=str(folder / "d.img"), disks=[DISK, DISK | {"writable": True}], memory_mib=64)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    before = open_descriptors()
    with load_config(path) as config:
        config.validate()
        config.check_descriptors()
        assert len(open_descriptors()) == len(before) + 4
        assert config.kernel is not None
        assert os.pread(config.kernel, 100, 0) == b"kernel"
        modes = [config.kernel, config.initrd, config.disks[0].image, config.disks[1].image]
        expected = [os.O_RDONLY, os.O_RDONLY, os.O_RDONLY, os.O_RDWR]
        assert [access_mode(fd) & os.O_ACCMODE for fd in modes] == expected
        assert all(access_mode(fd) & os.O_CLOEXEC and not access_mode(fd) & os.O_NONBLOCK for fd in modes)
        assert (config.memory_mib, config.platform_version, config.protected_vm) == (64, "~1.0", False)
    assert open_descriptors() == before


def test_a_relative_path_to_the_configuration_will_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder)
    monkeypatch.chdir(folder)
    with load_config("vm.json") as config:
        assert config.kernel is not None
    monkeypatch.chdir(folder.parent)
    with load_config(Path(folder.name) / "vm.json") as config:
        assert config.kernel is not None


def test_partitions_are_opened_each_in_its_own_mode(folder: Path) -> None:
    parts = [{"label": "a", "path": "d.img"}, {"label": "b", "path": "d.img", "writable": True}]
    with load_config(write(folder, disks=[{"partitions": parts, "writable": False}])) as config:
        config.check_descriptors()
        assert [part.label for part in config.disks[0].partitions] == ["a", "b"]
        modes = [access_mode(part.image) & os.O_ACCMODE for part in config.disks[0].partitions]
        assert modes == [os.O_RDONLY, os.O_RDWR]
        config.validate()


@pytest.mark.parametrize(
    ("in_file", "given", "name"),
    [(None, None, "VmRun"), ("web", None, "web"), ("web", "cli", "cli"), (None, "cli", "cli")],
)
def test_the_name_is_the_callers_or_the_files_or_the_default(
    folder: Path, in_file: str | None, given: str | None, name: str
) -> None:
    with load_config(write(folder, name=in_file), name=given) as config:
        assert config.name == name


def failed_load(path: Path) -> VmactorError:
    """The error of a load that must fail and leave nothing open."""
    before = open_descriptors()
    with pytest.raises(VmactorError) as caught:
        load_config(path)
    assert open_descriptors() == before
    return caught.value


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("missing.img", r'disks\[1\]\.image: Failed to open ".*/missing.img": No such file or directory'),
        ("vmlinux/x", r'disks\[1\]\.image: Failed to open ".*/vmlinux/x": Not a directory'),
        ("loop", r'disks\[1\]\.image: Failed to open ".*/loop": Too many levels of symbolic links'),
        ("\x1b[2J", r'disks\[1\]\.image: Failed to open ".*/\\x1b\\\[2J": No such file'),
        (".", r"disks\[1\]\.image: is a directory; give a regular file or a block device"),
        ("fifo", r"disks\[1\]\.image: is a pipe; give a regular file or a block device"),
        ("/dev/zero", r"disks\[1\]\.image: is a character device"),
    ],
)
@pytest.mark.parametrize("writable", [False, True])
def test_a_file_that_cannot_be_used_is_named_and_nothing_blocks_or_stays_open(
    folder: Path, image: str, message: str, writable: bool
) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    error = failed_load(write(folder, disks=[DISK, {"image": image, "writable": writable}]))
    assert isinstance(error, IllegalArgumentError)
    with pytest.raises(IllegalArgumentError, match=r'^".*/vm\.json": ' + message):
        raise error


def test_a_disk_that_may_only_be_read_is_not_opened_for_writing(folder: Path) -> None:
    running = str(Path(sys.executable).resolve())  # not even root may write to it now
    with load_config(write(folder, disks=[{"image": running, "writable": False}])):
        pass
    error = failed_load(write(folder, disks=[{"image": running, "writable": True}]))
    assert error.message.endswith(("Text file busy", "Permission denied"))


def test_the_configuration_itself_must_be_a_readable_regular_file(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    assert "configuration file: is a pipe; give a regular file" in failed_load(folder / "fifo").message
    assert "configuration file: is a directory" in failed_load(folder).message
    assert "No such file or directory" in failed_load(folder / "none.json").message
    assert "is no path" in failed_load(folder / "a\0b").message


def test_errors_within_the_file_begin_with_its_path(folder: Path) -> None:
    path = write(folder, protected=1)
    assert failed_load(path).message == f'"{path}": protected: must be true or false, not the number 1'
    path.write_bytes(b" " * (MAX_BYTES + 1))
    assert 'vm.json": too large' in failed_load(path).message


def test_running_out_of_descriptors_says_what_to_raise(folder: Path) -> None:
    path = write(folder, disks=[DISK | {"partitions": []}] * 26)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    holes = [os.dup(0) for _ in range(open_descriptors()[-1])]
    resource.setrlimit(resource.RLIMIT_NOFILE, (holes[-1] + 10, hard))
    try:
        with pytest.raises(
            ResourceExhaustedError, match=r"disks\[\d+\]\.image: no descriptor left; .*ulimit -n"
        ):
            load_config(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in holes:
            os.close(fd)


def test_a_loaded_configuration_is_an_ordinary_one(folder: Path) -> None:
    with load_config(write(folder)) as config, config.duplicate() as copy:
        assert isinstance(copy, RawConfig)
        assert not set(copy.fds()) & set(config.fds())
