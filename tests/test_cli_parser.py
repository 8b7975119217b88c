"""The grammar of the command line: what is refused with status 2, and that the version is cheap."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vmactor
from vmactor import __version__
from vmactor.cli import main, parser
from vmactor.cli.exit_codes import MEANINGS


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("run", "required: CONFIG.json"),
        ("run a.json b.json", "unrecognized arguments: b.json"),
        ("run a.json --vmm bhyve", "invalid choice: 'bhyve'"),
        ("run a.json --cpu-topology two", "invalid choice: 'two'"),
        ("run a.json --memory 0", "'0' is not a whole number of 1 or more"),
        ("run a.json --memory 1.5", "'1.5' is not a whole number of 1 or more"),
        ("run a.json --hangup-timeout 0", "more than 0 seconds"),
        ("run a.json --hangup-timeout nan", "'nan' is not a number of seconds"),
        ("run a.json --hangup-timeout inf", "'inf' is not a number of seconds"),
        ("run a.json --hangup-timeout soon", "'soon' is not a number of seconds"),
        ("run a.json --cons x", "unrecognized arguments: --cons x"),
        ("run a.json --json --console -", "give the console or log a file"),
        ("run a.json --json --log -", "give the console or log a file"),
        ("connect 2048", "required: PORT"),
        ("connect x 5000", "'x' is not a whole number of 1 or more"),
        ("connect 2048 -5", "'-5' is not a vsock port"),
        ("connect 2048 4294967295", "'4294967295' is not a vsock port"),
        ("connect 2048 5000 --quit-after -1", "'-1' is not a number of seconds"),
        ("list 2048", "unrecognized arguments: 2048"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_status_2(
    line: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(line.split())
    except SystemExit as exit_:
        code = exit_.code
    said = capfd.readouterr()
    assert (code, said.out) == (2, "")
    assert why in said.err
    assert "Traceback" not in said.err


def test_options_arrive_as_they_were_meant() -> None:
    line = (
        "run a.json --name x --vmm qemu --cpu-topology match_host --memory 64 --console - --log l "
        "--hangup-timeout 2.5 --restart always --tombstones /t --guest-release explicit-codes --state-dir /s "
        "--keep --detach --socket /d"
    )
    args = parser.build().parse_args(line.split())
    assert vars(args) == {
        "command": "run",
        "config": Path("a.json"),
        "name": "x",
        "vmm": "qemu",
        "cpu_topology": "match_host",
        "memory": 64,
        "console": "-",
        "log": "l",
        "hangup_timeout": 2.5,
        "restart": "always",
        "tombstones": Path("/t"),
        "guest_release": "explicit-codes",
        "keep": True,
        "detach": True,
        "socket": Path("/d"),
        "state_dir": Path("/s"),
        "json": False,
    }


@pytest.mark.parametrize(
    ("line", "value"), [("", None), ("--restart", "on-failure"), ("--restart=always", "always")]
)
def test_a_restart_is_on_failure_unless_it_is_said_otherwise(line: str, value: str | None) -> None:
    assert parser.build().parse_args(["run", "a.json", *line.split()]).restart == value


@pytest.mark.parametrize("start", [["-m", "vmactor"], ["-c", "from vmactor.cli import main; main()"]])
def test_the_version_comes_from_a_child_process_too(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"vmactor {__version__}\n", "")


def test_help_lists_every_command_and_every_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{command} " in text for command in ("run", "connect", "list", "info", "demo"))
    assert all(f"{code} {meaning}" in text for code, meaning in MEANINGS.items())


def test_grammar_and_version_need_no_heavy_modules() -> None:
    code = (
        "import sys; from vmactor.cli import parser; parser.build(); "
        "print(*(name for name in sys.modules if name.startswith('vmactor.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"vmactor.cli.exit_codes", "vmactor.cli.parser", "vmactor.cli.stdio"}


def test_the_version_is_told_without_the_modules_that_take_time_to_load() -> None:
    code = "import sys; from vmactor.cli import main\ntry: main(['--version'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, *modules = done.stdout.split("\n", 1)[0], *done.stdout.split("\n", 1)[1].split()
    assert version == f"vmactor {vmactor.__version__}"
    assert "vmactor.cli.parser" in modules
    ours = {name for name in modules if name.startswith("vmactor.") and not name.startswith("vmactor.cli")}
    assert not ours
    assert not {"cryptography", "json", "msgpack", "rich", "ssl", "structlog", "trio"} & {*modules}


def test_every_public_name_comes_from_where_type_checkers_think_it_does() -> None:
    tree = ast.parse(Path(vmactor.__file__).read_text())
    (told,) = (each for each in tree.body if isinstance(each, ast.If))
    imports = [each for each in told.body if isinstance(each, ast.ImportFrom)]
    homes = {alias.name: each.module or "" for each in imports for alias in each.names}
    assert sorted(homes) == sorted(vmactor.__all__)
    for name, home in homes.items():
        assert getattr(vmactor, name) is getattr(importlib.import_module(home), name)
        assert name in dir(vmactor)
    with pytest.raises(AttributeError, match="no attribute 'Virtual'"):
        vmactor.Virtual  # noqa: B018 - it raises


def test_lists_load_what_draws_only_for_a_terminal() -> None:
    code = "import sys; import vmactor.cli.list_vms; print('vmactor.cli.drawing' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("words", "restart"),
    [
        (["--restart", "vm.json"], "on-failure"),
        (["vm.json", "--restart"], "on-failure"),
        (["--restart", "always", "vm.json"], "always"),
        (["--restart=always", "vm.json"], "always"),
        (["--restart", "--json", "vm.json"], "on-failure"),
        (["--", "vm.json"], None),
    ],
)
def test_a_configuration_after_restart_is_not_taken_for_its_value(
    words: list[str], restart: str | None
) -> None:
    wanted = parser.parse(["run", *words])
    assert (wanted.restart, wanted.config) == (restart, Path("vm.json"))
