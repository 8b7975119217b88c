"""What the managers of this user wrote down about their VMs, for commands that look at VMs of others."""

from pathlib import Path
from typing import Any

from vmactor.state_dir import StateDirectory, default_path

Record = dict[str, Any]


def find(state_dir: Path | None) -> tuple[Path, list[Record]]:
    """The state directory, and the records of all VMs in it, by CID.

    Args:
        state_dir: The directory; this user's usual one if None. It is not made if it is missing.

    Raises:
        SecurityError: The directory is not this user's alone.
        IllegalArgumentError: There is no usual one.
    """
    path = state_dir if state_dir is not None else default_path()
    if not path.exists():
        return path, []
    with StateDirectory(path) as state:
        return state.path, state.records()
