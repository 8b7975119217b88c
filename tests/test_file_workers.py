"""A user's files are waited for by that user alone."""

import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.daemon_peer import SECONDS
from vmactor import PartitionType, Requester, VirtualizationService
from vmactor.actors import service as service_module
from vmactor.actors.file_workers import WORKERS, FileWorkers
from vmactor.images.partition import initialize_writable_partition

pytestmark = pytest.mark.anyio


async def test_files_that_never_answer_hold_up_nobody_but_their_user(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that does not answer, as a program sees it: the call in the thread does not return."""
    answered = threading.Event()

    def hangs(fd: int, size: int, kind: PartitionType) -> Any:
        if size == 1:
            assert answered.wait(SECONDS)
        return initialize_writable_partition(fd, size, kind)

    monkeypatch.setattr(service_module, "initialize_writable_partition", hangs)
    sizes: list[int] = []
    async with VirtualizationService(vmm="simulated", state_directory=short_dir / "state") as service:

        async def make(name: str, size: int, requester: Requester | None) -> None:
            fd = os.open(short_dir / name, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                sizes.append(await service.initialize_writable_partition(fd, size, requester=requester))
            finally:
                os.close(fd)

        mine = Requester(os.geteuid(), os.getegid())
        async with anyio.create_task_group() as tasks:
            for number in range(3 * WORKERS):
                tasks.start_soon(make, f"hangs{number}", 1, mine)
            with anyio.fail_after(SECONDS):
                while service._workers.of(mine).files.borrowed_tokens < WORKERS:
                    await anyio.sleep(0.001)
                # Another user, whatever the policy would say of him.
                monkeypatch.setattr(type(service._policy.permissions), "check", lambda *_: None)
                await make("other", 4096, Requester(54_321, 54_321))
            assert sizes == [4096]
            answered.set()
    assert len(sizes) == 3 * WORKERS + 1


async def test_workers_of_users_of_whom_nothing_is_under_way_are_forgotten() -> None:
    workers = FileWorkers()
    first = workers.of(Requester(1, 1))
    assert workers.of(Requester(1, 1)) is first
    await first.files.acquire()
    busy = first
    for uid in range(2, 100):
        workers.of(Requester(uid, uid))
    assert workers.of(Requester(1, 1)) is busy
    assert len(workers._users) == 2
    first.files.release()
