"""From an app configuration to the raw configuration that runs it: the whole of it, in one sitting.

The guest gets three disks: the system's, a writable one (instance image, encrypted store), and the payload's,
whose first partition tells what the others are.

Source: ``load_app_config`` of the reference.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from vmactor.app_config import MICRODROID, AppConfig
from vmactor.config import DiskImage, Partition, RawConfig
from vmactor.config_file import open_file
from vmactor.errors import IllegalArgumentError, ServiceSpecificError, UnsupportedOperationError
from vmactor.images.composite import memory_file
from vmactor.messages import ImageKind
from vmactor.microdroid.apexes import ApexInfo
from vmactor.microdroid.metadata import (
    APK_PARTITION,
    IDSIG_PARTITION,
    PARTITION,
    apex_partition,
    write_metadata,
)
from vmactor.microdroid.payload_config import PayloadConfig, payload_config_of
from vmactor.microdroid.platform import Platform
from vmactor.network_config import as_interfaces
from vmactor.strict_json import about
from vmactor.text import escape

INSTANCE_PARTITION: Final = "vm-instance"
STORAGE_PARTITION: Final = "encryptedstore"
EXTRA_APK: Final = "extra-apk-"
EXTRA_IDSIG: Final = "extra-idsig-"


def to_raw_config(app: AppConfig, platform: Platform) -> RawConfig:
    """Make the raw configuration of an app's VM. Blocks as long as the files do: call it in a thread.

    No path of the app's is opened. Nothing is written but a sealed file in memory.

    Args:
        app: What to run; ``validate`` has passed.
        platform: Where the guest is.

    Returns:
        A configuration that owns its descriptors: close it. After an error nothing is left open.

    Raises:
        IllegalArgumentError: The payload's configuration does not fit the app's, or is wrong.
        ApkError: The payload's configuration cannot be read out of the APK.
        ServiceSpecificError: The platform lacks something, or is broken.
        ResourceExhaustedError: No memory or no descriptor.
    """
    with ExitStack() as opened, about("Failed to load app config"):
        payload = payload_config_of(app)
        _check_payload(app, payload)
        system = opened.enter_context(platform.load_os(app.os_name))
        apexes = platform.select_apexes(
            payload.apexes, debuggable=app.debuggable, prefer_staged=payload.prefer_staged
        )
        params = " ".join(filter(None, (system.params, app.extra_params)))
        return replace(
            system,
            name=app.name,
            kernel=system.kernel if app.custom_kernel is None else app.custom_kernel,
            initrd=platform.open_initrd(app.os_name, app.debug_level, opened),
            params=params or None,
            disks=(*system.disks, _writable_disk(app), _payload_disk(app, payload, apexes, opened)),
            protected_vm=app.protected_vm,
            memory_mib=system.memory_mib if app.memory_mib is None else app.memory_mib,
            cpu_topology=app.cpu_topology,
            task_profiles=app.task_profiles,
            network=as_interfaces(app.network),
        ).duplicate()  # which is the result; all that was opened here is closed in any case


def _check_payload(app: AppConfig, payload: PayloadConfig) -> None:
    if payload.os not in (MICRODROID, app.os_name):
        raise UnsupportedOperationError(
            f'Unknown OS "{escape(payload.os, limit=100)}"; the VM runs {app.os_name}, see os_name'
        )
    # A payload without a configuration has as many extra APKs as it is given.
    named = len(payload.extra_apks) if app.config_path is not None else len(app.extra_apks)
    if named != len(app.extra_idsigs):
        raise IllegalArgumentError(
            f"payload config has {named} apks, but app config has {len(app.extra_idsigs)} idsigs"
        )
    if named != len(app.extra_apks):
        raise IllegalArgumentError(
            f"payload config has {named} apks, but app config has {len(app.extra_apks)} extra apks open; a "
            "path that stands in an APK is opened by its client: see open_extra_apks"
        )


def _writable_disk(app: AppConfig) -> DiskImage:
    """What the guest keeps; declared as QCOW2, since a guest could have written any header."""
    files = {INSTANCE_PARTITION: app.instance_image, STORAGE_PARTITION: app.encrypted_storage_image}
    return DiskImage(
        writable=True,
        partitions=[
            Partition(label, fd, writable=True, format=ImageKind.QCOW2)
            for label, fd in files.items()
            if fd is not None
        ],
    )


def _payload_disk(
    app: AppConfig, payload: PayloadConfig, apexes: list[ApexInfo], opened: ExitStack
) -> DiskImage:
    """The metadata, the APEXes, the APK with its idsig, and the extra APKs with theirs, in this order."""
    metadata = write_metadata(
        apexes,
        config_path=app.config_path,
        payload_binary_name=app.payload_binary_name,
        extra_apks=len(app.extra_apks),
    )
    partitions = [Partition(PARTITION, memory_file("payload-metadata", metadata, opened))]
    for number, apex in enumerate(apexes):
        try:
            fd = open_file(opened, f"APEX {escape(apex.name, limit=100)}", apex.path)
        except IllegalArgumentError as error:
            raise ServiceSpecificError(f"{error}; the platform lists it, so it has to be there") from error
        partitions.append(Partition(apex_partition(number), fd))
    partitions += [Partition(APK_PARTITION, app.apk), Partition(IDSIG_PARTITION, app.idsig)]
    for number, (apk, idsig) in enumerate(zip(app.extra_apks, app.extra_idsigs, strict=True)):
        partitions += [Partition(f"{EXTRA_APK}{number}", apk), Partition(f"{EXTRA_IDSIG}{number}", idsig)]
    return DiskImage(partitions=[replace(part, format=ImageKind.RAW) for part in partitions])
