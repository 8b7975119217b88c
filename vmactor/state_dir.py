"""The state directory: what all managers of one user share on a host.

::

    /run/vmactor            for root, else $XDG_RUNTIME_DIR/vmactor; mode 0700
      cids                  counter, rests and claims (vmactor.cid)
      vm/<cid>/             one VM's private directory: sockets, and
      vm/<cid>/record.json  what other processes may know of it

A directory whose CID nobody holds was left by a manager that crashed. It is never removed here, and its CID
is not handed out again, because a VMM may still live in it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final, Self

from vmactor.cid import LAST, CidPool
from vmactor.errors import IllegalArgumentError, ResourceExhaustedError, SecurityError

SUN_PATH: Final = 107
"""Longest path of a unix socket, in bytes (sockaddr_un, without its NUL)."""


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
        SecurityError: The directory is not ours alone.
        ResourceExhaustedError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow symbolic links
        longest = self.vm_directory(LAST) / f"vsock_{LAST}"
        if len(os.fsencode(longest)) > SUN_PATH:
            room = SUN_PATH - len(os.fsencode(longest)) + len(os.fsencode(self.path))
            raise IllegalArgumentError(f"state directory {self.path} is too long: at most {room} bytes")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(self.path)
            (self.path / "vm").mkdir(mode=0o700, exist_ok=True)
            _check_private(self.path / "vm")
            self.cids = CidPool(self.path / "cids", usable=lambda cid: not self.vm_directory(cid).exists())
        except OSError as error:
            raise ResourceExhaustedError(f"cannot make the state directory {self.path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all CIDs back. Idempotent."""
        self.cids.close()

    def vm_directory(self, cid: int) -> Path:
        """A VM's private directory, made or not."""
        return self.path / "vm" / str(cid)

    def make_vm_directory(self, cid: int) -> Path:
        """Make a VM's private directory; it must not exist.

        Raises:
            ResourceExhaustedError: No space, or no right to.
        """
        path = self.vm_directory(cid)
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise ResourceExhaustedError(f"cannot make the VM's directory {path}: {error}") from error
        return path

    def remove_vm_directory(self, cid: int) -> None:
        """Remove a VM's directory and all that is in it."""
        shutil.rmtree(self.vm_directory(cid), ignore_errors=True)

    def write_record(self, cid: int, record: dict[str, Any]) -> None:
        """Replace a VM's record in one step; readers see the old or the new one.

        Raises:
            OSError: No space or no descriptors; the old record stands.
        """
        path = self.vm_directory(cid) / "record.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps(record))
        new.replace(path)

    def records(self) -> list[dict[str, Any]]:
        """The records of all VMs, those of other managers included, by CID.

        Each has ``alive`` added: whether its manager lives. Damaged records are left out.
        """
        found = []
        for entry in (self.path / "vm").iterdir():
            try:
                record = json.loads((entry / "record.json").read_text())
                cid = int(entry.name)
            except (OSError, ValueError):
                continue
            if isinstance(record, dict) and record.get("cid") == cid:
                found.append(record | {"alive": self.cids.is_held(cid)})
        return sorted(found, key=lambda record: int(record["cid"]))


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not path.is_dir() or path.is_symlink():
        raise SecurityError(f"{path} is not a directory: remove it, or name another state directory")
    if status.st_uid != os.geteuid():
        raise SecurityError(f"{path} belongs to user {status.st_uid}: name another state directory")
    if status.st_mode & 0o077:
        raise SecurityError(f"{path} is open to others: run 'chmod 700 {path}'")
