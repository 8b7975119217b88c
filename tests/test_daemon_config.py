"""The daemon's configuration: strict, and as its page and its example say."""

import dataclasses
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vmactor.actors.admission import AdmissionPolicy
from vmactor.daemon.config import Config, load_config, parse_config
from vmactor.daemon.users import Quotas
from vmactor.errors import IllegalArgumentError, SecurityError

ROOT = Path(__file__).parent.parent

FULL = b"""
[service]
socket = "/run/x.sock"
state_directory = "/run/x"
vmm = "qemu"
platform = "/p"
tombstones = "/t"
policy = "/etc/policy.json"
drain_seconds = 1.5
[admission]
checked = false
memory_overcommit = 2
concurrent_boots = 3
[users]
connections = 1
vms = 2
memory_mib = 3
subscriptions = 4
keep = true
[log]
format = "json"
level = "debug"
[metrics]
listen = "[::1]:9469"
per_vm = true
"""


def options(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every option by its name in the file."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= options(value, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = value
    return found


def test_every_option_can_be_given() -> None:
    config = parse_config(FULL)
    given = options(config)
    assert all(given[name] != default for name, default in options(Config()).items())
    assert config.users == Quotas(connections=1, vms=2, memory_mib=3, subscriptions=4, keep=True)
    assert config.admission == AdmissionPolicy(checked=False, memory_overcommit=2, concurrent_boots=3)
    assert config.service.socket == Path("/run/x.sock")


def test_nothing_has_to_be_given() -> None:
    assert parse_config(b"") == Config()
    assert parse_config(b"[service]\n[users]\n") == Config()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[service]\nsokcet = '/x'", "service.sokcet: there is no such field; do you mean socket?"),
        ("[servise]", "servise: there is no such field; do you mean service?"),
        ("service = 1", "service: must be an object, not the number 1"),
        ("[service]\nsocket = 1", "service.socket: must be text, not the number 1"),
        ("[service]\nsocket = 'x'", 'service.socket: must be an absolute path, not the text "x"'),
        ("[service]\nvmm = 'xen'", 'must be "auto" or "crosvm" or "qemu" or "simulated", not the text "xen"'),
        ("[service]\ndrain_seconds = -1", "service.drain_seconds: must be 0 to 86400, not the number -1"),
        ("[service]\ndrain_seconds = nan", "service.drain_seconds: must be a number, not the number nan"),
        ("[service]\ndrain_seconds = true", "service.drain_seconds: must be a number, not true"),
        ("[admission]\nmemory_overcommit = 0", "admission.memory_overcommit: must be 0.01 to 1000"),
        ("[admission]\nconcurrent_boots = 1.5", "admission.concurrent_boots: must be a whole number"),
        ("[users]\nvms = -1", "users.vms: must be at least 0, not the number -1"),
        ("[users]\nkeep = 1", "users.keep: must be true or false, not the number 1"),
        ("[log]\nlevel = 'loud'", "log.level: must be"),
        ("[metrics]\nlisten = 'localhost'", "metrics.listen: must be an address such as"),
        ("[metrics]\nlisten = 'localhost:0'", "metrics.listen: must be an address such as"),
        ("[metrics]\nlisten = 1979-05-27", 'metrics.listen: must be text|the text "1979-05-27"'),
        ("[service]\nsocket = '/a'\nsocket = '/b'", "not valid TOML: Cannot overwrite a value"),
        ("[service", "not valid TOML"),
        ("\x00", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, error: str) -> None:
    with pytest.raises(IllegalArgumentError) as raised:
        parse_config(text.encode())
    assert re.search(error.replace("?", r"\?").replace("[", r"\["), str(raised.value)), str(raised.value)


def test_other_bytes_than_text_and_too_many_are_refused() -> None:
    with pytest.raises(IllegalArgumentError, match="not UTF-8"):
        parse_config(b"\xff")
    with pytest.raises(IllegalArgumentError, match="longer than"):
        parse_config(b"#" * (1 << 20) + b"\n")
    with pytest.raises(IllegalArgumentError, match="not valid TOML"):
        parse_config(b"a = " + b"[" * 100_000)


def test_a_file_that_others_can_write_to_is_nobodys_configuration(tmp_path: Path) -> None:
    path = tmp_path / "vmactor.toml"
    path.write_bytes(FULL)
    path.chmod(0o644)
    assert load_config(path) == parse_config(FULL)
    path.chmod(0o664)
    with pytest.raises(SecurityError, match="others can write to it"):
        load_config(path)
    if os.geteuid() == 0:
        path.chmod(0o644)
        os.chown(path, 12345, 0)
        with pytest.raises(SecurityError, match="others can write to it"):
            load_config(path)
    with pytest.raises(IllegalArgumentError, match="Failed to open"):
        load_config(tmp_path / "none")


def test_the_page_describes_every_option_with_its_default() -> None:
    page = (ROOT / "docs" / "operation.md").read_text()
    rows = re.findall(r"^\| `(\w+\.\w+)` \| (.*?) \| .*? \| (yes|no) \|$", page, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(options(Config()))
    for name, default, _ in rows:
        if (value := options(Config())[name]) is not None:
            assert default == f"`{json.dumps(value).removesuffix('.0')}`", name
    fixed = {name for name in options(Config()) if name in Config().fixed() or name.startswith("admission.")}
    assert {name for name, _, reloaded in rows if reloaded == "no"} == fixed


def test_the_example_has_every_option_with_a_value_that_is_right() -> None:
    text = (ROOT / "systemd" / "vmactor.toml").read_text()
    assert parse_config(text.encode()) == Config()  # as it is, it says nothing
    shown = re.sub(r"^# (?=\w+ = )", "", text, flags=re.MULTILINE)
    found = tomllib.loads(shown)
    assert [f"{table}.{name}" for table in found for name in found[table]] == list(options(Config()))
    given = options(parse_config(shown.encode()))
    for name, default in options(Config()).items():
        assert default is None or given[name] == default, name
