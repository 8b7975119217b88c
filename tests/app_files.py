"""Files of app configurations for tests: a platform tree, APKs without signatures, images."""

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vmactor.app_config import AppConfig
from vmactor.images.partition import initialize_writable_partition
from vmactor.messages import PartitionType
from vmactor.microdroid.platform import Platform

NAMES = ("moduleName", "versionCode", "modulePath", "lastUpdateMillis", "isFactory", "isActive")
CONFIG = {"version": 1, "task": {"type": "microdroid_launcher", "command": "lib.so"}}


def apex_entry(name: str, **changes: Any) -> str:
    """An element of ``apex-info-list.xml``."""
    values = {
        "moduleName": name,
        "versionCode": 1,
        "modulePath": f"/apex/files/{name}",
        "lastUpdateMillis": 7,
        "isFactory": "true",
        "isActive": "true",
        "provideSharedApexLibs": "false",
    } | changes
    return "<apex-info " + " ".join(f'{key}="{value}"' for key, value in values.items()) + "/>"


def apex_list(*entries: str) -> bytes:
    """A whole ``apex-info-list.xml``."""
    return f'<?xml version="1.0"?>\n<apex-info-list>{"".join(entries)}</apex-info-list>'.encode()


def make_platform(
    root: Path, *apexes: str, derive_classpath: str | None = None, **os_config: Any
) -> Platform:
    """A platform tree with these APEXes."""
    etc = root / "com.android.virt" / "etc"
    (etc / "fs").mkdir(parents=True)
    (root / "files").mkdir()
    for name in ("fs/microdroid_kernel", "fs/microdroid_vbmeta.img", "fs/microdroid_super.img"):
        (etc / name).write_bytes(name.encode().ljust(4096))
    for kind in ("normal", "debuggable"):
        (etc / f"microdroid_initrd_{kind}.img").write_bytes(kind.encode())
    fs = "/apex/com.android.virt/etc/fs"
    partitions = [
        {"label": "vbmeta_a", "path": f"{fs}/microdroid_vbmeta.img"},
        {"label": "super", "path": f"{fs}/microdroid_super.img"},
    ]
    config = {
        "kernel": f"{fs}/microdroid_kernel",
        "disks": [{"partitions": partitions, "writable": False}],
        "memory_mib": 256,
        "platform_version": "~1.0",
    } | os_config
    (etc / "microdroid.json").write_text(json.dumps(config))
    entries = []
    for name in apexes or ("com.android.os.statsd", "com.android.adbd", "com.android.art"):
        (root / "files" / name).write_bytes(name.encode())
        entries.append(apex_entry(name))
    (root / "apex-info-list.xml").write_bytes(apex_list(*entries))
    if derive_classpath is not None:
        program = root / "com.android.sdkext" / "bin" / "derive_classpath"
        program.parent.mkdir(parents=True)
        program.write_text(derive_classpath)
        program.chmod(0o755)
    return Platform(root)


def make_apk(path: Path, config: object = CONFIG, *, name: str = "assets/config.json") -> Path:
    """A ZIP with a payload's configuration; text and bytes are written as they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lib/x86_64/lib.so", b"binary" * 100)
        archive.writestr(name, config if isinstance(config, str | bytes) else json.dumps(config))
    return path


@contextmanager
def app_in(directory: Path, config: object = CONFIG, **changes: Any) -> Iterator[AppConfig]:
    """An app configuration whose files are open; without a choice of its payload it has a configuration."""
    directory.mkdir(exist_ok=True)
    with ExitStack() as opened:

        def file(name: str, content: bytes = b"") -> int:
            if not (directory / name).exists():
                (directory / name).write_bytes(content)
            fd = os.open(directory / name, os.O_RDWR | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            return fd

        make_apk(directory / "app.apk", config)
        instance = file("instance.img")
        initialize_writable_partition(instance, 1 << 20, PartitionType.ANDROID_VM_INSTANCE)
        if "payload_binary_name" not in changes:
            changes.setdefault("config_path", "assets/config.json")
        changes = {
            key: file(str(value)) if isinstance(value, Path) else value for key, value in changes.items()
        }
        values: dict[str, Any] = {"name": "app", "apk": file("app.apk"), "idsig": file("app.idsig", b"idsig")}
        yield AppConfig(**(values | {"instance_image": instance} | changes))
