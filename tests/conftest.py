"""Every test runs on each event loop and may leave nothing behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.residue import Residue

REAL = ["asyncio", "asyncio+uvloop", "trio"]
VIRTUAL = ["asyncio-virtual", "trio-virtual"]

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks; keep log lines out of captured output unless a test asks for them."""
    config.addinivalue_line("markers", "virtual_time: runs on asyncio and trio with a clock that jumps")
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[lambda _l, _m, e: str(e)])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the loops: real ones, or those with a virtual clock for tests marked so."""
    if "anyio_backend" in metafunc.fixturenames:
        loops = VIRTUAL if metafunc.definition.get_closest_marker("virtual_time") else REAL
        metafunc.parametrize("anyio_backend", loops, indirect=True)


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """The event loop of a test; a fresh virtual clock each time."""
    match request.param:
        case "asyncio":
            return "asyncio", {"debug": False}
        case "asyncio+uvloop":
            return "asyncio", {"use_uvloop": True}
        case "trio":
            return "trio", {}
        case "asyncio-virtual":
            from tests.virtual_time import VirtualTimeLoop

            return "asyncio", {"loop_factory": VirtualTimeLoop}
        case _:
            from trio.testing import MockClock

            return "trio", {"clock": MockClock(autojump_threshold=0)}


@pytest.fixture(scope="session", autouse=True)
def _uvloop_has_run_once() -> None:
    """The first uvloop of a process opens a pipe that it never closes; that is not the first test's doing."""
    import uvloop

    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test after which processes, descriptors or threads are left."""
    residue = Residue()
    yield
    left = residue.report()
    assert not left, "left behind:\n" + "\n".join(left)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A private directory whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="vma", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def guest_dir() -> Path:
    """The built guest; ``make test`` builds it first."""
    path = Path(os.environ.get("VMACTOR_GUEST", ROOT / "build" / "guest"))
    if not (path / "vm.json").exists():
        pytest.fail(f"no guest in {path}: run 'make guest'")
    return path
