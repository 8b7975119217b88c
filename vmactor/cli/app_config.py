"""From the options of ``run-app`` and ``run-microdroid`` to an app configuration; missing files are made."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

from vmactor import AppConfig, CpuTopology, DebugLevel, PartitionType, open_extra_apks
from vmactor.cli.apk_files import made_or_opened, opened
from vmactor.cli.create_partition import create
from vmactor.cli.progress import with_progress
from vmactor.errors import IllegalArgumentError
from vmactor.images.idsig import create_or_update_idsig_file

INSTANCE_SIZE: Final = 10 << 20


async def app_config(
    args: argparse.Namespace,
    files: ExitStack,
    *,
    apk: Path,
    idsig: Path,
    instance: Path,
    config_path: str | None = None,
    payload_binary_name: str | None = None,
    extra_idsigs: Sequence[Path] = (),
) -> AppConfig:
    """Open an app's files, after making those that are missing: idsig files, instance image, encrypted store.

    Args:
        args: The options that both commands have.
        files: Closes what is opened here.
        apk: The APK.
        idsig: Made, or updated where it is not the APK's.
        instance: Made if it is not there.
        config_path: As in ``AppConfig``.
        payload_binary_name: As in ``AppConfig``.
        extra_idsigs: One for each extra APK that the payload's configuration names; as ``idsig``.

    Raises:
        VmactorError: Of one of the files, which is named. What was made before it stays.
    """
    apk_fd = files.enter_context(opened(apk))
    extra_fds = open_extra_apks(apk_fd, config_path, files) if config_path is not None else []
    if len(extra_fds) != len(extra_idsigs):
        raise IllegalArgumentError(
            f"Found {len(extra_fds)} extra apks, but there are {len(extra_idsigs)} extra idsigs; give "
            "--extra-idsig once for each"
        )
    idsig_fds = [
        await _idsig(fd, path, files)
        for fd, path in zip((*extra_fds, apk_fd), (*extra_idsigs, idsig), strict=True)
    ]
    return AppConfig(
        name=args.name,
        apk=apk_fd,
        idsig=idsig_fds[-1],
        instance_image=_image(instance, INSTANCE_SIZE, PartitionType.ANDROID_VM_INSTANCE, files),
        config_path=config_path,
        payload_binary_name=payload_binary_name,
        extra_apks=extra_fds,
        extra_idsigs=idsig_fds[:-1],
        encrypted_storage_image=None
        if args.storage is None
        else _image(args.storage, args.storage_size, PartitionType.ENCRYPTEDSTORE, files),
        debug_level=DebugLevel[args.debug.upper()],
        protected_vm=args.protected,
        memory_mib=args.mem,
        cpu_topology=CpuTopology[args.cpu_topology.upper()],
        task_profiles=args.task_profiles,
    )


async def _idsig(apk: int, path: Path, files: ExitStack) -> int:
    with made_or_opened(path) as fd:
        size = os.fstat(apk).st_size
        await with_progress("hashing", size, partial(create_or_update_idsig_file, apk, fd))
    return files.enter_context(opened(path))  # the guest is not to write to it, nor is its VMM


def _image(path: Path, size: int, kind: PartitionType, files: ExitStack) -> int:
    if not path.exists():
        create(path, size, kind)
    return files.enter_context(opened(path, os.O_RDWR))
