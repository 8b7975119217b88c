"""Builds the RPC Binder client that others wrote: the crate ``rsbinder``, in a small program of ours."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests/interop/rsbinder"
PROGRAM = ROOT / "build/host/bin/rsbinder-peer"


def built() -> Path:
    """The program; compiled where it is missing or old, which takes a minute of two processors.

    Skips the test where there is no cargo, or where its registry cannot be reached.
    """
    parts = [SOURCE / "Cargo.toml", SOURCE / "src/main.rs"]
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    stamp = PROGRAM.with_suffix(".stamp")
    if PROGRAM.exists() and stamp.exists() and stamp.read_text() == wanted:
        return PROGRAM
    if not shutil.which("cargo"):
        pytest.skip("no cargo here: install Rust (https://rustup.rs) to hold the server against rsbinder")
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as name:
        # A copy, because cargo writes a lock file beside the manifest, which names where crates came from.
        copy, target = Path(shutil.copytree(SOURCE, Path(name, "source"))), Path(name, "target")
        at = ["--manifest-path", str(copy / "Cargo.toml")]
        fetch = subprocess.run(
            ["cargo", "fetch", "--quiet", *at], capture_output=True, text=True, check=False
        )
        if fetch.returncode:
            pytest.skip(f"cargo cannot fetch rsbinder: {fetch.stderr.strip()[-300:]}")
        build = ["nice", "cargo", "build", "--quiet", "--offline", *at, "--target-dir", str(target)]
        done = subprocess.run(build, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        shutil.move(target / "debug/rsbinder-peer", PROGRAM)
    stamp.write_text(wanted)
    return PROGRAM
