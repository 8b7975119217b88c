"""Help for tests of the command line: real child processes, and proof that nothing of them is left."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

SECONDS = 90
"""Far more than anything takes; a test that reaches it has failed."""


class Cli:
    """Runs ``vmactor`` with a state directory of its own.

    Attributes:
        state_dir: The directory.
        socket: A daemon's; if set, every command but ``serve`` uses that instead.
    """

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.socket: Path | None = None
        self._mark = f"VMACTOR_TEST_MARK={secrets.token_hex(8)}"

    def spawn(
        self, command: str, *args: str | Path, ignore: str | None = None, **options: Any
    ) -> "subprocess.Popen[bytes]":
        """Start a command; with the state directory where it takes one, and a signal ignored if asked for."""
        stateless = {"info", "create-partition", "create-composite", "image"}
        own = [] if command in stateless else ["--state-dir", str(self.state_dir)]
        if self.socket is not None and command != "serve":
            own = ["--socket", str(self.socket)]
        # A test run in the background may have inherited ignored signals.
        signals = ["--default-signal=INT,TERM,HUP"] if ignore is None else [f"--ignore-signal={ignore}"]
        start = ["env", *signals, self._mark, sys.executable, "-m", "vmactor", command]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        options = {"stdin": subprocess.DEVNULL, "bufsize": 0} | pipes | options
        process: Any = subprocess.Popen([*start, *map(str, args), *own], **options)
        return process  # type: ignore[no-any-return]

    def run(
        self, command: str, *args: str | Path, given: bytes | None = None, **options: Any
    ) -> tuple[int, str, str]:
        """Run a command to its end; status, standard output and standard error."""
        if given is not None:
            options["stdin"] = subprocess.PIPE
        with self.spawn(command, *args, **options) as process:
            out, err = process.communicate(given, timeout=SECONDS)
        return process.returncode, (out or b"").decode(), (err or b"").decode()

    def processes(self) -> dict[int, str]:
        """Everything that was started from here, directly or not, and lives."""
        mark, found = self._mark.encode(), {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        return found

    def left(self) -> list[str]:
        """Processes and files that should be gone."""
        return [*(str(path) for path in self.state_dir.glob("vm/*")), *self.processes().values()]


@pytest.fixture
def cli(short_dir: Path) -> Iterator[Cli]:
    """The command line; afterwards no process and no directory of a VM may be left."""
    cli = Cli(short_dir)
    yield cli
    assert cli.left() == []


def rows(text: str) -> list[dict[str, Any]]:
    """JSON lines; fails if anything else is among them."""
    return [json.loads(line) for line in text.splitlines()]


def until(stream: IO[bytes] | None, kind: str) -> dict[str, Any]:
    """Read events until one of a kind comes, and return it."""
    assert stream is not None
    for line in stream:
        row: dict[str, Any] = json.loads(line)
        if row["event"] == kind:
            return row
    raise AssertionError(f"the output ended without {kind}")


def write_config(directory: Path, guest: Path, script: str, **changes: Any) -> Path:
    """A configuration whose guest takes the steps of a script."""
    config = json.loads((guest / "vm.json").read_text())
    config |= {"kernel": str(guest / "vmlinux"), "initrd": str(guest / "initrd.cpio"), "name": "scripted"}
    config["params"] += f' vmactor.script="{script}"'
    path = directory / "vm.json"
    path.write_text(json.dumps(config | changes))
    return path


def closed_reader() -> int:
    """The write end of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write
