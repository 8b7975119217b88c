"""The state directory: what all managers of one user share on a host.

::

    /run/vmactor            for root, else $XDG_RUNTIME_DIR/vmactor; mode 0700, or 0711 if the daemon's
                            socket is in it, which others may reach: all the rest is private by itself
      cids                  counter, rests and claims (vmactor.cid)
      managers/<pid>-<n>    one living manager's socket for inspections
      vm/<cid>/             one VM's private directory: sockets, and
      vm/<cid>/record.json  what other processes may know of it
      vm/<cid>/ledger       its processes (vmactor.ledger)
      vm/<cid>/s/           only of a VM of another user: vsock sockets, owned by that user

A directory whose CID nobody holds was left by a manager that crashed. Its CID is not handed out again before
``vmactor.leftovers`` is done with it, because a VMM may still live in it.

Nobody but the user (and root) can get in. A VM's own processes run as that user too, so a record is read with
care: not through links, nothing but a plain file, no more than ``RECORD_SIZE`` bytes.
"""

import errno
import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from vmactor import ledger
from vmactor.cid import FIRST, LAST, CidPool
from vmactor.errors import IllegalArgumentError, ResourceExhaustedError, SecurityError, hint
from vmactor.ledger import Ledger
from vmactor.log import get_logger
from vmactor.messages import Requester
from vmactor.process import is_caller

SUN_PATH: Final = 107
"""Longest path of a unix socket, in bytes (sockaddr_un, without its NUL)."""

RECORD_SIZE: Final = 64 * 1024
"""Bytes of a VM's record; longer ones are refused when written and left out when read."""

KEEPING: Final = "keeping"
"""What a record has for the next manager of a VM that is kept, and for nobody else."""

SOCKETS: Final = "s"
"""The part of a VM's directory that its processes can reach, where they are another user's."""

LONGEST_SOCKET: Final = f"vm/{LAST}/{SOCKETS}/vsock_{2**32 - 1}"
"""The longest name of a socket below the state directory: one for the highest vsock port."""

log = get_logger()


def default_path() -> Path:
    """Where the state of this user's managers is.

    Raises:
        IllegalArgumentError: Not root, and no XDG_RUNTIME_DIR.
    """
    if os.geteuid() == 0:
        return Path("/run/vmactor")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise IllegalArgumentError("XDG_RUNTIME_DIR is not set: set it, or name a state directory")
    return Path(runtime) / "vmactor"


class StateDirectory:
    """The state directory as one manager sees it. Close it when done.

    Args:
        path: The directory; made, with its parents, if missing.

    Raises:
        IllegalArgumentError: The path is so long that sockets in it could not be bound.
        SecurityError: It, or ``vm`` in it, is not a directory of ours alone; nothing was changed.
        ResourceExhaustedError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow symbolic links
        room = SUN_PATH - len(f"/{LONGEST_SOCKET}")
        if len(os.fsencode(self.path)) > room:
            raise IllegalArgumentError(f"state directory {self.path} is too long: at most {room} bytes")
        self._vms = f"{self.path}/vm/"
        try:
            _make_private(self.path, passable=True)
            _make_private(self.path / "vm")
            _make_private(self.managers)
            self.cids = CidPool(self.path / "cids", usable=self._is_free)
        except OSError as error:
            raise ResourceExhaustedError(f"cannot make the state directory {self.path}: {error}") from error
        except ValueError as error:
            raise IllegalArgumentError(f"{str(self.path)!r} is no path: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all CIDs back. Idempotent."""
        self.cids.close()

    @property
    def managers(self) -> Path:
        """Where the managers' sockets for inspections are."""
        return self.path / "managers"

    def vm_directory(self, cid: int) -> Path:
        """A VM's private directory, made or not."""
        return Path(f"{self._vms}{cid}")

    def make_vm_directory(self, cid: int, *, keep: bool = False) -> tuple[Path, Ledger]:
        """Make a VM's private directory, which must not exist, and begin its ledger.

        Args:
            cid: Whose.
            keep: Whether the VM is to outlive its manager.

        Raises:
            ResourceExhaustedError: No space, no descriptor, or no right to; nothing is left.
        """
        path = self.vm_directory(cid)
        try:
            path.mkdir(mode=0o700)
            try:
                return path, Ledger.create(path, cid, keep=keep)
            except OSError:
                self.remove_vm_directory(cid)
                raise
        except OSError as error:
            text = f"cannot make the VM's directory {path}: {error}{hint(error)}"
            raise ResourceExhaustedError(text) from error

    def make_sockets_directory(self, cid: int, requester: Requester | None) -> Path:
        """Where a VM's vsock sockets go: its directory, or a part of it that another user's processes own.

        That user cannot get there by path, only by being started in it.

        Raises:
            OSError: No space, or no right to.
        """
        directory = self.vm_directory(cid)
        if requester is None or is_caller(requester):
            return directory
        path = directory / SOCKETS
        path.mkdir(mode=0o700)
        os.chown(path, requester.uid, requester.gid)
        return path

    def remove_vm_directory(self, cid: int) -> bool:
        """Remove a VM's directory and all in it; whether it is gone. Never raises.

        The ledger goes last: whoever comes after a crash in the middle of it must still know the VM.
        """
        path = self.vm_directory(cid)
        with suppress(OSError):
            if stat.S_ISDIR(path.lstat().st_mode):
                for name in _names(path):  # none if there is no descriptor for it: then only the ledger goes
                    if name != ledger.NAME:
                        _remove(f"{path}/{name}")
                (path / ledger.NAME).unlink(missing_ok=True)
                path.rmdir()
        if not (gone := self._is_free(cid)):
            log.error("cannot remove a VM's directory; its CID is not used again", cid=cid, path=str(path))
        return gone

    def write_record(self, cid: int, record: dict[str, Any]) -> None:
        """Replace a VM's record in one step; readers see the old or the new one.

        Raises:
            OSError: No space or no descriptors; the old record stands.
            IllegalArgumentError: Longer than ``RECORD_SIZE``; the old record stands.
        """
        text = json.dumps(record)
        if len(text) > RECORD_SIZE:
            raise IllegalArgumentError(f"the record of CID {cid} is longer than {RECORD_SIZE} bytes")
        # By hand: this comes at every change of a VM's state, and pathlib takes as long again as the kernel.
        path = f"{self._vms}{cid}/record"
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.write(fd, text.encode()) < len(text):  # ASCII, so as many bytes
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
        os.rename(f"{path}.new", f"{path}.json")  # noqa: PTH104

    def records(self) -> list[dict[str, Any]]:
        """The records of all VMs, those of other managers included, by CID.

        Each has ``alive`` added: whether its manager lives. Directories without a proper record are left out,
        and so is what comes or goes while we look. Never raises, unless the state directory is closed.
        """
        found = ((cid, self.record(cid)) for cid in self.vm_cids())
        return [
            {name: value for name, value in record.items() if name != KEEPING}
            | {"cid": cid, "alive": self.cids.is_held(cid)}
            for cid, record in found
            if record is not None
        ]

    def record(self, cid: int) -> dict[str, Any] | None:
        """A VM's record; None if there is no proper one."""
        record = _read_record(self.vm_directory(cid) / "record.json")
        return record if record is not None and record.get("cid") == cid else None

    def vm_cids(self) -> list[int]:
        """The CIDs that have a directory, in ascending order. Never raises."""
        numbers = (
            int(name)
            for name in _names(self.path / "vm")
            if name.isascii() and name.isdigit() and len(name) <= len(str(LAST))
        )
        return sorted({cid for cid in numbers if FIRST <= cid <= LAST})

    def is_empty(self, cid: int) -> bool:
        """Whether a VM's directory is gone or has nothing in it."""
        with suppress(OSError), os.scandir(self.vm_directory(cid)) as entries:
            return next(entries, None) is None
        return self._is_free(cid)

    def _is_free(self, cid: int) -> bool:
        return not os.path.lexists(f"{self._vms}{cid}")


def sockets_of(directory: Path) -> Path:
    """Where the vsock sockets of the VM with this directory are."""
    path = directory / SOCKETS
    return path if path.is_dir() else directory


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)  # noqa: PTH208 - names are all that is wanted
    except OSError:  # somebody removed it: there is nothing in it
        return []


def _remove(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108 - pathlib takes as long again as the kernel
    except IsADirectoryError:
        shutil.rmtree(path, ignore_errors=True)


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb", opener=_open_plainly) as file:
            plain = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            data = file.read(RECORD_SIZE + 1) if plain else b""
        record = json.loads(data) if len(data) <= RECORD_SIZE else None
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _open_plainly(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _make_private(path: Path, *, passable: bool = False) -> None:
    with suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise SecurityError(f"{path} is not a directory: remove it, or name another state directory")
    if status.st_uid != os.geteuid():
        raise SecurityError(f"{path} belongs to user {status.st_uid}: name another state directory")
    if status.st_mode & (0o066 if passable else 0o077):
        raise SecurityError(f"{path} is open to others: run 'chmod 700 {path}'")
