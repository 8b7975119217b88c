"""Extra APKs: opening the paths that stand in an APK, which is the client's business and nobody else's.

The reference opens them with its own rights. A service that did so for another user would lend its rights to
whoever wrote the APK, so ``create_vm`` takes descriptors only, and whoever runs a payload opens them.
"""

from contextlib import ExitStack
from pathlib import Path

from vmactor.config_file import open_file
from vmactor.errors import IllegalArgumentError
from vmactor.microdroid.payload_config import read_payload_config
from vmactor.strict_json import about
from vmactor.text import escape


def open_extra_apks(apk: int, config_path: str, opened: ExitStack) -> list[int]:
    """Open the extra APKs that a payload's configuration names, with the rights of this process.

    Never call it for somebody else: a process with more rights than the APK's owner would read for him.

    Args:
        apk: The APK, open for reading.
        config_path: Path of the payload's configuration inside it.
        opened: Closes what is opened here.

    Returns:
        Descriptors for ``AppConfig.extra_apks``, in order.

    Raises:
        ApkError: The configuration cannot be read.
        IllegalArgumentError: It is wrong, or a file is not there, not readable, or no regular file.
        ResourceExhaustedError: No descriptor is left.
    """
    files = []
    for i, path in enumerate(read_payload_config(apk, config_path).extra_apks):
        with about(f"Failed to open the extra apk #{i} {escape(path, limit=200)}"):
            if not Path(path).is_absolute():
                raise IllegalArgumentError("is no absolute path; correct the payload's configuration")
            files.append(open_file(opened, "extra apk", Path(path)))
    return files
