"""The payload metadata: what the guest finds on the first partition of its payload disk. Pure.

Source: ``microdroid/payload/metadata.proto`` of the reference; ``extra_apk_count`` is of later versions.
"""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from vmactor.microdroid.apexes import ApexInfo
from vmactor.protobuf import message_classes

VERSION: Final = 1
APK_MOUNT: Final = "/mnt/apk/"
"""Where the guest has the APK."""
PARTITION: Final = "payload-metadata"
APK_PARTITION: Final = "microdroid-apk"
IDSIG_PARTITION: Final = "microdroid-apk-idsig"


def apex_partition(number: int) -> str:
    """The label of an APEX's partition, by its place in the order."""
    return f"microdroid-apex-{number}"


@cache
def _messages() -> dict[str, Any]:
    return message_classes(
        "android.microdroid",
        {
            "ApexPayload": {
                "name": (1, "string"),
                "partition_name": (2, "string"),
                "public_key": (3, "bytes"),
                "root_digest": (4, "bytes"),
                "last_update_seconds": (5, "uint64"),
                "is_factory": (6, "bool"),
            },
            "ApkPayload": {
                "name": (1, "string"),
                "payload_partition_name": (2, "string"),
                "idsig_partition_name": (3, "string"),
            },
            "PayloadConfig": {"payload_binary_name": (1, "string"), "extra_apk_count": (2, "uint32")},
            "Metadata": {
                "version": (1, "uint32"),
                "apexes": (2, "repeated ApexPayload"),
                "apk": (3, "ApkPayload"),
                # One of the two; only the generated classes would know.
                "config_path": (4, "string"),
                "config": (5, "PayloadConfig"),
            },
        },
    )


def write_metadata(
    apexes: Sequence[ApexInfo],
    *,
    config_path: str | None = None,
    payload_binary_name: str | None = None,
    extra_apks: int = 0,
) -> bytes:
    """The contents of the metadata partition: the message's length in 32 bits, big endian, and the message.

    Args:
        apexes: In the order of their partitions.
        config_path: Path of the payload's configuration inside the APK; either this or the next is given.
        payload_binary_name: Name of the payload's binary.
        extra_apks: How many extra APKs a payload has that has no configuration to say so.
    """
    message = _messages()["Metadata"](version=VERSION)
    for number, apex in enumerate(apexes):
        message.apexes.add(
            name=apex.name,
            partition_name=apex_partition(number),
            last_update_seconds=apex.last_update_seconds,
            is_factory=apex.is_factory,
        )
    message.apk.name = "apk"
    message.apk.payload_partition_name = APK_PARTITION
    message.apk.idsig_partition_name = IDSIG_PARTITION
    if config_path is not None:
        message.config_path = APK_MOUNT + config_path
    else:
        message.config.payload_binary_name = payload_binary_name
        message.config.extra_apk_count = extra_apks
    body = bytes(message.SerializeToString(deterministic=True))
    return struct.pack(">I", len(body)) + body
