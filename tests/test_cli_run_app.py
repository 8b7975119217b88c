"""``vmactor run-app`` and ``run-microdroid``, up to the moment where a VM would start."""

from pathlib import Path

import pytest

from tests.cli_process import Cli, cli
from vmactor.cli.run_microdroid import find_app
from vmactor.errors import IllegalArgumentError

__all__ = ["cli"]

IMPOSSIBLE = [
    pytest.param(
        ["--config-path", "assets/vm_config.json", "--payload-binary-name", "hello.so"],
        2,
        "Only one of --config-path or --payload-binary-name can be defined\n",
        id="two-payloads",
    ),
    pytest.param([], 2, "Either --config-path or --payload-binary-name must be defined\n", id="no-payload"),
    pytest.param(
        ["--config-path", "assets/extra.json"],
        1,
        "Found 1 extra apks, but there are 0 extra idsigs; give --extra-idsig once for each\n",
        id="too-few-idsigs",
    ),
    pytest.param(
        ["--payload-binary-name", "hello.so", "--extra-idsig", "x.idsig"],
        1,
        "Found 0 extra apks, but there are 1 extra idsigs; give --extra-idsig once for each\n",
        id="too-many-idsigs",
    ),
]


@pytest.mark.parametrize(("options", "status", "message"), IMPOSSIBLE)
def test_options_that_cannot_be_make_no_file(
    cli: Cli, tinydroid_dir: Path, tmp_path: Path, options: list[str], status: int, message: str
) -> None:
    files = [tmp_path / "app.idsig", tmp_path / "instance.img"]
    code, out, err = cli.run("run-app", tinydroid_dir / "example.apk", *files, *options, cwd=tmp_path)
    assert (code, out, err) == (status, "", f"vmactor: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_platform_says_what_to_name_and_the_files_are_made(
    cli: Cli, tinydroid_dir: Path, tmp_path: Path
) -> None:
    files = [tmp_path / name for name in ("app.idsig", "instance.img", "store.img")]
    options = ("--payload-binary-name", "hello.so", "--storage", files[2], "--storage-size", "1M")
    absent = tmp_path / "absent"
    code, out, err = cli.run(
        "run-app", tinydroid_dir / "example.apk", *files[:2], *options, "--platform", absent
    )
    assert (code, out) == (1, "")
    assert f"{absent}/com.android.virt/etc/microdroid.json" in err
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(path.read_bytes()[:4] == b"QFI\xfb" for path in files[1:])


def test_the_empty_app_is_found_only_where_there_is_one(tinydroid_dir: Path, tmp_path: Path) -> None:
    assert find_app(tinydroid_dir / "apex").is_file()
    with pytest.raises(IllegalArgumentError, match="No apks match"):
        find_app(tmp_path)
    for name in "ab":
        place = tmp_path / "com.android.virt" / "app" / name / "EmptyPayloadApp.apk"
        place.parent.mkdir(parents=True)
        place.touch()
    with pytest.raises(IllegalArgumentError, match="more than one"):
        find_app(tmp_path)
