"""What other processes are told of a service's VMs: the records in the state directory.

A new VM's record is there before its creator has the VM. Changes follow within ``DELAY`` seconds, and only
the last of them: a VM passes through several states in that time when it starts, and nobody reads as fast.
Nothing happens while nothing changes.
"""

from collections.abc import Mapping
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio.abc import TaskStatus

from vmactor.actors.keeping import KeptVm
from vmactor.errors import VmactorError
from vmactor.log import get_logger
from vmactor.messages import VmInfo
from vmactor.protocol.values import to_wire
from vmactor.state_dir import KEEPING, StateDirectory
from vmactor.waiting import Waiter, waiter_type, wake

DELAY: Final = 0.05
"""Seconds."""

_log = get_logger()


class Records:
    """The records of one service's VMs.

    Args:
        state: Where they are.
        common: What every record has besides its VM's ``VmInfo``.
    """

    def __init__(self, state: StateDirectory, common: Mapping[str, Any]) -> None:
        self._state = state
        self._common = common
        self._changed: dict[int, VmInfo] = {}
        self._known: set[int] = set()
        self._idle: Waiter | None = None

    def tell(self, info: VmInfo, kept: KeptVm | None = None) -> None:
        """Tell of a new VM now, of a known one soon. Never waits, never raises.

        Args:
            info: What others may know of it.
            kept: What the next manager has to know of it, where it is to be kept. That is written at once:
                before anybody is answered or told of the change, so that what was told is true afterwards.
        """
        if kept is not None or info.cid not in self._known:
            self._known.add(info.cid)
            self._write(info, kept)
            return
        self._changed[info.cid] = info
        if self._idle is not None:
            wake(self._idle)

    def forget(self, cid: int) -> None:
        """Write nothing of a VM any more: its directory goes, or is nobody's. Idempotent."""
        self._known.discard(cid)
        self._changed.pop(cid, None)

    def flush(self, cid: int) -> None:
        """Write now what is still to be told of a VM."""
        if (info := self._changed.pop(cid, None)) is not None:
            self._write(info)

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """The service's child that writes the changes."""
        task_status.started()
        while True:
            if not self._changed:
                self._idle = waiter_type()()
                try:
                    await self._idle
                finally:
                    self._idle = None
            await anyio.sleep(DELAY)
            for cid in tuple(self._changed):
                self.flush(cid)
                await anyio.lowlevel.checkpoint()

    def _write(self, info: VmInfo, kept: KeptVm | None = None) -> None:
        record = {**info.as_dict(), **self._common}
        if kept is not None:
            record[KEEPING] = to_wire(kept)
        try:
            self._state.write_record(info.cid, record)
        except (OSError, VmactorError) as error:
            # The VM lives on; other processes see it as it was.
            _log.error("cannot write a VM's record", cid=info.cid, error=str(error))
