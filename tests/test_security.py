"""Who may do what, and which files: every method times every caller, the reference's labels, policy files."""

import grp
import inspect
import json
import os
import pwd
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.app_files import app_in, make_platform
from tests.host_facts import FULL
from tests.residue import descriptors
from tests.scripted_vmm import ScriptedDriver
from vmactor.actors.handle import VirtualMachine
from vmactor.actors.place import Places
from vmactor.actors.service import VirtualizationService
from vmactor.app_config import AppConfig
from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.errors import IllegalArgumentError, LabelError, SecurityError, VmactorError
from vmactor.messages import Requester
from vmactor.security import labels as labels_module
from vmactor.security.labels import ALLOWED_TYPES, LabelCheck, LabelRules, read_label, type_of
from vmactor.security.permissions import Grant, Method, Permission, Permissions, is_custom
from vmactor.security.policy import Policy, load_policy, parse_policy
from vmactor.vmm.select import Selection

MANAGE, CUSTOM, DEBUG, DUMP, INTERNET = Permission
OTHER: Final = Requester(54321, 54322, (54323,))

# -- Permissions --------------------------------------------------------------------------------------

CALLERS: Final = {
    "this process": None,
    "root": Requester(0, 0),
    "the service's user": Requester(os.geteuid(), 60000),
    "a user with MANAGE": Requester(50001, 60000),
    "a user with MANAGE and USE_CUSTOM": Requester(50002, 60000),
    "a member of a group with MANAGE": Requester(50003, 60000, (60001, 60002)),
    "a user whose own group has MANAGE": Requester(50004, 60002),
    "a user with USE_CUSTOM only": Requester(50005, 60000),
    "a user with MANAGE and INTERNET": Requester(50009, 60000),
    "a user with DEBUG": Requester(50006, 60000),
    "a user with DUMP": Requester(50007, 60000),
    "anybody else": Requester(50008, 60000, (60001,)),
}
POLICY: Final = Permissions(
    {
        MANAGE: Grant(frozenset({50001, 50002, 50009}), frozenset({60002})),
        CUSTOM: Grant(frozenset({50002, 50005})),
        DEBUG: Grant(frozenset({50006})),
        DUMP: Grant(frozenset({50007})),
        INTERNET: Grant(frozenset({50009})),
    }
)
ALWAYS: Final = {"this process", "root", "the service's user"}
MANAGERS: Final = {
    *("a user with MANAGE", "a user with MANAGE and USE_CUSTOM", "a member of a group with MANAGE"),
    "a user whose own group has MANAGE",
    "a user with MANAGE and INTERNET",
}
ALLOWED: Final = {
    "create_vm(raw)": {"a user with MANAGE and USE_CUSTOM"},
    "create_vm(app)": MANAGERS,
    "create_vm(app with network)": {"a user with MANAGE and INTERNET"},
    "create_vm(app with config_path)": {"a user with MANAGE and USE_CUSTOM"},
    "initialize_writable_partition": MANAGERS,
    "create_or_update_idsig_file": MANAGERS,
    "debug_list_vms": {"a user with DEBUG"},
    "dump": {"a user with DUMP"},
}
Call = Callable[[VirtualizationService, Requester | None, AppConfig], Awaitable[object]]


async def _create_raw(service: VirtualizationService, who: Requester | None, app: AppConfig) -> None:
    await service.create_vm(RawConfig(name="raw", kernel=app.idsig), requester=who)


async def _create_app(service: VirtualizationService, who: Requester | None, app: AppConfig) -> None:
    await service.create_vm(replace(app, config_path=None, payload_binary_name="x"), requester=who)


async def _create_networked(service: VirtualizationService, who: Requester | None, app: AppConfig) -> None:
    networked = replace(app, config_path=None, payload_binary_name="x", network=True)
    await service.create_vm(networked, requester=who)


async def _create_configured(service: VirtualizationService, who: Requester | None, app: AppConfig) -> None:
    await service.create_vm(app, requester=who)


async def _partition(service: VirtualizationService, who: Requester | None, app: AppConfig) -> None:
    await service.initialize_writable_partition(app.instance_image, 4096, requester=who)


async def _idsig(service: VirtualizationService, who: Requester | None, app: AppConfig) -> None:
    await service.create_or_update_idsig_file(app.apk, app.idsig, requester=who)


async def _list(service: VirtualizationService, who: Requester | None, _app: AppConfig) -> None:
    service.debug_list_vms(requester=who)


async def _dump(service: VirtualizationService, who: Requester | None, _app: AppConfig) -> None:
    service.dump(requester=who)


CALLS: Final[dict[str, Call]] = dict(
    zip(
        ALLOWED,
        (_create_raw, _create_app, _create_networked, _create_configured, _partition, _idsig, _list, _dump),
        strict=True,
    )
)


def service_in(directory: Path, policy: Policy | None = None) -> VirtualizationService:
    return VirtualizationService(
        vmm=Selection(ScriptedDriver(), "hybrid", ("a test picked it",)),
        state_directory=directory / "state",
        facts=FULL,
        platform=make_platform(directory / "apex"),
        policy=policy,
    )


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_every_method_asks_for_its_permission_of_every_kind_of_caller(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []

    async def no_place(*_: object, **_options: object) -> None:
        places.append(1)
        raise VmactorError("a place was looked for")

    monkeypatch.setattr(Places, "find", no_place)
    async with service_in(short_dir, Policy(POLICY)) as service:
        with app_in(short_dir / "app") as app:
            for method, call in CALLS.items():
                for name, caller in CALLERS.items():
                    before = descriptors()
                    text = "came through"
                    try:
                        await call(service, caller, app)
                    except VmactorError as error:  # else of what comes later: no place, no real APK
                        if isinstance(error, SecurityError) and not str(error).startswith("only root can"):
                            text = str(error)
                    if name in ALWAYS | ALLOWED[method]:
                        assert text == "came through", (method, name)
                    else:
                        assert text.startswith("does not have the android.permission."), (method, name)
                        assert descriptors() == before
    creations = sum(len(ALWAYS) + len(ALLOWED[method]) for method in CALLS if "create_vm" in method)
    assert os.geteuid() != 0 or len(places) == creations, "a refused call takes no CID"


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_by_default_only_root_and_the_services_own_user_may_anything(short_dir: Path) -> None:
    async with service_in(short_dir) as service:
        with app_in(short_dir / "app") as app:
            for call in CALLS.values():
                with pytest.raises(
                    SecurityError, match=r"does not have the android\.permission\.[A-Z_]+ permission"
                ):
                    await call(service, OTHER, app)
            assert service.debug_list_vms() == []
            assert service.dump(requester=Requester(os.geteuid(), 1)) == "Running 0 VMs:\n"


@pytest.mark.parametrize(
    ("changes", "custom"),
    [
        ({}, False),
        ({"task_profiles": ["A"]}, True),
        ({"extra_apks": [0]}, True),
        ({"os_name": "other"}, True),
        ({"custom_kernel": 0}, True),
        ({"extra_params": "x"}, True),
        ({"payload_binary_name": None, "config_path": "x"}, True),
        ({"protected_vm": True, "memory_mib": 9, "debug_level": 1, "extra_idsigs": [0]}, False),
    ],
)
def test_what_makes_a_configuration_custom(changes: dict[str, Any], custom: bool) -> None:
    values: dict[str, Any] = {
        "name": "x",
        "apk": 0,
        "idsig": 0,
        "instance_image": 0,
        "payload_binary_name": "x",
    }
    assert is_custom(AppConfig(**(values | changes))) is custom
    assert is_custom(RawConfig(name="x", kernel=0))


def test_methods_that_ask_have_a_requester_and_handles_have_none() -> None:
    assert {str(method) for method in Method} == {name.partition("(")[0] for name in ALLOWED}

    def asking(owner: type) -> set[str]:
        methods = inspect.getmembers(owner, inspect.isfunction)
        return {
            name
            for name, method in methods
            if not name.startswith("_") and "requester" in inspect.signature(method).parameters
        }

    assert asking(VirtualizationService) == set(Method)
    assert asking(VirtualMachine) == set()


# -- Policy files -------------------------------------------------------------------------------------


def test_a_policy_names_users_and_groups_by_name_or_number(tmp_path: Path) -> None:
    user, group = pwd.getpwnam("nobody"), grp.getgrnam("daemon")
    text = {
        "permissions": {
            "MANAGE_VIRTUAL_MACHINE": {"users": ["nobody", 7], "groups": ["daemon", 8]},
            "DUMP": {},
        },
        "labels": {"check": "never", "types": ["virt_image_t"]},
    }
    expected = Policy(
        Permissions(
            {MANAGE: Grant(frozenset({user.pw_uid, 7}), frozenset({group.gr_gid, 8})), DUMP: Grant()}
        ),
        LabelRules(LabelCheck.NEVER, frozenset({"virt_image_t"})),
    )
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(text))
    assert load_policy(file) == parse_policy(json.dumps(text)) == expected
    assert parse_policy("{}") == parse_policy('{"labels": {}, "permissions": {}}') == Policy()
    assert Policy().labels == LabelRules(LabelCheck.AUTO, ALLOWED_TYPES)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"permission": {}}', "do you mean permissions?"),
        ('{"permissions": {"MANAGE": {}}}', "permissions.MANAGE: there is no such field"),
        ('{"permissions": {"DUMP": {"users": ["no-such-user"]}}}', 'there is no user "no-such-user"'),
        ('{"permissions": {"DUMP": {"groups": ["a\\u0000b"]}}}', "there is no group"),
        ('{"permissions": {"DUMP": {"users": [true]}}}', "users[0]"),
        ('{"permissions": {"DUMP": {"users": [-1]}}}', "users[0]"),
        ('{"permissions": {"DUMP": {"users": [4294967295]}}}', "users[0]"),
        ('{"permissions": {"DUMP": {"users": "root"}}}', "users: must be a list"),
        ('{"permissions": {"DUMP": {}, "DUMP": {}}}', "is given twice"),
        ('{"permissions": []}', "permissions: must be an object"),
        ('{"labels": {"check": "sometimes"}}', "labels.check"),
        ("[]", "the file: must be an object"),
    ],
)
def test_a_policy_that_is_not_exactly_right_is_refused(text: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text(text)
    with pytest.raises(IllegalArgumentError) as caught:
        load_policy(file)
    assert place in str(caught.value)


def test_a_policy_that_others_can_write_is_nobodys_policy(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text("{}")
    for mode in (0o620, 0o602):
        file.chmod(mode)
        with pytest.raises(SecurityError, match="others can write to it"):
            load_policy(file)
    with pytest.raises(IllegalArgumentError, match="Failed to open"):
        load_policy(tmp_path / "none")


# -- Labels -------------------------------------------------------------------------------------------

TABLE: Final = {
    "u:object_r:system_file:s0": None,
    "u:object_r:apk_data_file:s0": None,
    "u:object_r:staging_data_file:s0": None,
    "u:object_r:shell_data_file:s0": None,
    "u:object_r:app_data_file:s0": "Label u:object_r:app_data_file:s0 is not allowed",
    "u:object_r:app_data_file:s0:c512,c768": "Label u:object_r:app_data_file:s0:c512,c768 is not allowed",
    "u:object_r:privapp_data_file:s0:c512,c768": "is not allowed",
    "invalid": "Syntactically invalid label invalid",
    "user:role:apk_data_file:severity:categories": None,
    "user:role:apk_data_file:severity:categories:extraneous": "Syntactically invalid label",
    "u:object_r:system_file": "Syntactically invalid label",
    "": "Syntactically invalid label",
}
ON: Final = LabelRules(LabelCheck.ALWAYS)


def disk_of(*names: str, **more: Any) -> RawConfig:
    return RawConfig(
        name="x",
        kernel=1000,
        initrd=1001,
        disks=[DiskImage(partitions=[Partition(n, 0) for n in names])],
        **more,
    )


@pytest.mark.parametrize(("label", "text"), TABLE.items(), ids=list(TABLE))
def test_the_labels_of_partitions_are_judged_as_in_the_reference(label: str, text: str | None) -> None:
    if text is None:
        ON.check(disk_of("foo"), app=False, read=lambda _fd: label)
        return
    with pytest.raises(LabelError) as caught:
        ON.check(disk_of("foo"), app=False, read=lambda _fd: label)
    first, cause = str(caught.value).split("\n\nCaused by:\n    ")
    assert first == "Partition foo invalid"
    assert text in cause
    assert caught.value.kind == "SERVICE_SPECIFIC"


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        *(
            (name, True)
            for name in ("vm-instance", "encryptedstore", "microdroid-apk-idsig", "payload-metadata")
        ),
        ("extra-idsig-0", True),
        ("extra-idsig-", True),
        *(
            (name, False)
            for name in ("extra-apk-0", "microdroid-apk", "vm-instance2", "Vm-instance", "super")
        ),
    ],
)
def test_partitions_that_an_app_may_write_are_exempt_for_app_configurations_only(
    name: str, exempt: bool
) -> None:
    def bad(_fd: int) -> str:
        return "u:object_r:app_data_file:s0"

    if exempt:
        ON.check(disk_of(name), app=True, read=bad)
    else:
        with pytest.raises(LabelError):
            ON.check(disk_of(name), app=True, read=bad)
    with pytest.raises(LabelError):
        ON.check(disk_of(name), app=False, read=bad)


def test_kernel_and_initrd_are_looked_at_for_protected_vms_only() -> None:
    def bad(which: int) -> Callable[[int], str]:
        return lambda fd: "invalid" if fd == which else "u:object_r:system_file:s0"

    for which, text in ((1000, "kernel file invalid"), (1001, "initrd file invalid")):
        ON.check(disk_of("a"), app=False, read=bad(which))
        with pytest.raises(LabelError, match=text):
            ON.check(disk_of("a", protected_vm=True), app=True, read=bad(which))
    images = RawConfig(name="x", bootloader=0, protected_vm=True, disks=[DiskImage(0)])
    ON.check(images, app=False, read=bad(0))  # neither a bootloader nor a disk's image is


def test_rules_are_enforced_where_selinux_is_on_or_as_the_policy_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enforce = tmp_path / "enforce"
    monkeypatch.setattr(labels_module, "_ENFORCE", enforce)
    table = {when: LabelRules(when).active for when in LabelCheck}
    assert table == {LabelCheck.AUTO: False, LabelCheck.ALWAYS: True, LabelCheck.NEVER: False}
    enforce.write_text("0")  # permissive is on, too
    table = {when: LabelRules(when).active for when in LabelCheck}
    assert table == {LabelCheck.AUTO: True, LabelCheck.ALWAYS: True, LabelCheck.NEVER: False}
    LabelRules(LabelCheck.ALWAYS, frozenset({"virt_image_t"})).check(
        disk_of("a"), app=False, read=lambda _fd: "system_u:object_r:virt_image_t:s0"
    )


def test_labels_are_those_of_open_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    with file.open("rb") as opened:
        fd = opened.fileno()
        with pytest.raises(LabelError, match=r"fgetfilecon failed\n\nCaused by:\n    "):
            ON.check(disk_of("a"), app=False, read=lambda _fd: read_label(fd))
        try:
            os.setxattr(file, "security.selinux", b"u:object_r:system_file:s0\0")
        except OSError as error:
            pytest.skip(f"only root can label files, and not everywhere: {error}")
        assert read_label(fd) == "u:object_r:system_file:s0"
        os.setxattr(file, "security.selinux", b"\xff\0")
        with pytest.raises(LabelError, match="Label is not valid UTF8"):
            read_label(fd)


def test_what_a_label_says_is_escaped() -> None:
    with pytest.raises(LabelError) as caught:
        ON.check(disk_of("a"), app=False, read=lambda _fd: "u:o:\x1b[31m" + "x" * 9999 + ":s0")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert type_of("a:b:c:d") == "c"


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_a_file_with_a_wrong_label_is_in_no_vm(short_dir: Path) -> None:
    policy = Policy(labels=LabelRules(LabelCheck.ALWAYS))
    async with service_in(short_dir, policy) as service:
        before = descriptors()
        with app_in(short_dir / "app") as app:
            with pytest.raises(LabelError, match=r"fgetfilecon failed|is not allowed"):
                await service.create_vm(app)
            with pytest.raises(LabelError, match=r"fgetfilecon failed|is not allowed"):
                await service.create_vm(RawConfig(name="x", kernel=app.apk, protected_vm=True))
            await (await service.create_vm(RawConfig(name="x", kernel=app.apk))).aclose()
        assert service.list_vms() == []
        assert descriptors() == before
