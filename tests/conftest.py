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
KERNEL = ["asyncio", "trio"]
"""What runs in the kernel lab is emulated twice over: on two loops only, or on those that its mark names."""

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks; keep log lines out of captured output unless a test asks for them."""
    config.addinivalue_line("markers", "virtual_time: runs on asyncio and trio with a clock that jumps")
    config.addinivalue_line("markers", "asyncio_only: uses a library that knows no other loop")
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[lambda _l, _m, e: str(e)])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the loops: real ones, or those with a virtual clock for tests marked so."""
    if "anyio_backend" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker
        kernel, netns = marked("kernel"), marked("netns")
        some = ["asyncio"] if marked("asyncio_only") else netns.args if netns else ()
        loops = some or ((kernel.args or KERNEL) if kernel else VIRTUAL if marked("virtual_time") else REAL)
        metafunc.parametrize("anyio_backend", loops, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the kernel lab, and those that change interfaces, run nowhere else (``docs/testing.md``)."""
    for marker, variable in (("kernel", "VMACTOR_KERNEL_LAB"), ("netns", "VMACTOR_NETNS")):
        if variable not in os.environ:
            elsewhere = [item for item in items if item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=elsewhere)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]


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


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Instead of pytest's: those hold the user's and the test's name, too much for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="vmt", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def guest_dir() -> Path:
    """The built guest; ``make test`` builds it first."""
    path = Path(os.environ.get("VMACTOR_GUEST", ROOT / "build" / "guest"))
    if not (path / "vm.json").exists():
        pytest.fail(f"no guest in {path}: run 'make guest'")
    return path


@pytest.fixture(scope="session")
def tinydroid_dir() -> Path:
    """The built guest that plays Microdroid; ``make test`` builds it first."""
    path = Path(os.environ.get("VMACTOR_TINYDROID", ROOT / "build" / "tinydroid"))
    if not (path / "stamp").exists():
        pytest.fail(f"no tinydroid in {path}: run 'make guest'")
    return path
