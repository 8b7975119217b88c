"""``create_or_update_idsig_file`` of the service: on each event loop, on duplicates, cancelled, bounded."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from typing import Any

import anyio
import pytest

from tests.apks import apk_with, opened
from tests.host_facts import FULL
from vmactor.actors import service as service_module
from vmactor.actors.file_workers import HASHERS
from vmactor.actors.service import VirtualizationService
from vmactor.errors import ApkError, IllegalArgumentError, IllegalStateError
from vmactor.images.idsig import create_or_update_idsig_file

pytestmark = pytest.mark.anyio


@pytest.fixture
def apk(tmp_path: Path) -> Path:
    """An APK of some stripes."""
    return apk_with(tmp_path / "app.apk", os.urandom(5_000_000))


@pytest.fixture
def pair(apk: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of an APK and of an empty idsig."""
    with opened(apk) as apk_fd, opened(apk.with_suffix(".idsig"), os.O_RDWR | os.O_CREAT) as idsig_fd:
        yield apk_fd, idsig_fd


@asynccontextmanager
async def service_in(directory: Path) -> AsyncIterator[VirtualizationService]:
    """A service that needs no VMM."""
    async with VirtualizationService(vmm="qemu", state_directory=directory / "state", facts=FULL) as service:
        yield service


async def test_an_idsig_is_made_once_and_then_up_to_date(short_dir: Path, pair: tuple[int, int]) -> None:
    async with service_in(short_dir) as service:
        assert (await service.create_or_update_idsig_file(*pair)).written
        assert not (await service.create_or_update_idsig_file(*pair)).written
    assert not create_or_update_idsig_file(*pair).written


async def test_the_callers_descriptors_may_go_meanwhile(
    short_dir: Path, apk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fds = os.open(apk, os.O_RDONLY), os.open(apk.with_suffix(".idsig"), os.O_RDWR | os.O_CREAT)

    def gone(*args: Any) -> Any:
        for fd in fds:
            os.close(fd)
        return create_or_update_idsig_file(*args)

    monkeypatch.setattr(service_module, "create_or_update_idsig_file", gone)
    async with service_in(short_dir) as service:
        assert (await service.create_or_update_idsig_file(*fds)).written


async def test_errors_are_typed_and_leave_the_output(short_dir: Path, pair: tuple[int, int]) -> None:
    os.pwrite(pair[1], b"old", 0)
    async with service_in(short_dir) as service:
        with opened(short_dir) as directory, pytest.raises(ApkError, match="input is not a regular file"):
            await service.create_or_update_idsig_file(directory, pair[1])
        with pytest.raises(IllegalArgumentError, match="idsig"):
            await service.create_or_update_idsig_file(pair[0], 9999)
    assert os.pread(pair[1], 10, 0) == b"old"
    with pytest.raises(IllegalStateError, match="closed"):
        await service.create_or_update_idsig_file(*pair)


async def test_a_cancelled_caller_ends_the_work_and_the_output_stays(
    short_dir: Path, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pwrite(pair[1], b"old", 0)
    begun, cancelled = anyio.Event(), Event()

    def work(apk: int, idsig: int, progress: Any) -> Any:
        anyio.from_thread.run_sync(begun.set)
        cancelled.wait(60)
        return create_or_update_idsig_file(apk, idsig, progress)

    monkeypatch.setattr(service_module, "create_or_update_idsig_file", work)
    async with service_in(short_dir) as service:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def cancel() -> None:
                    await begun.wait()
                    scope.cancel()
                    cancelled.set()

                tasks.start_soon(cancel)
                await service.create_or_update_idsig_file(*pair)
        assert scope.cancelled_caught
    assert os.pread(pair[1], 10, 0) == b"old"


async def test_no_more_than_the_bound_are_made_at_a_time(
    short_dir: Path, pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    most: list[int] = []
    enough, go_on = anyio.Event(), Event()

    def work(apk: int, *_: Any) -> Any:
        running.append(apk)
        most.append(len(running))
        if len(running) == HASHERS:
            anyio.from_thread.run_sync(enough.set)
        go_on.wait(60)
        running.remove(apk)

    monkeypatch.setattr(service_module, "create_or_update_idsig_file", work)
    async with service_in(short_dir) as service, anyio.create_task_group() as tasks:
        for _ in range(3 * HASHERS):
            tasks.start_soon(service.create_or_update_idsig_file, *pair)
        await enough.wait()
        go_on.set()
    assert max(most) == HASHERS
    assert len(most) == 3 * HASHERS
