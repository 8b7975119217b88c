"""Protocol buffers: message classes made at run time, from a table that reads like the ``.proto`` file.

No generated code is kept: it would have to be made anew for every major version of the library, and its
classes are no more typed than these. Those who use a message turn it into a dataclass at once.

The library takes some 20 ms to import, so this module does it only when the first class is wanted.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto

Fields = Mapping[str, tuple[int, str]]
"""Number and type of each field by its name. A type is a scalar's name or that of a message of the same
table, either with ``repeated `` before it. An enum is an ``int32``, which is the same on the wire."""

_SCALARS: Final = ("bool", "bytes", "int32", "int64", "string", "uint32", "uint64")


def message_classes(package: str, messages: Mapping[str, Fields]) -> dict[str, Any]:
    """Make the classes of a proto3 file.

    Args:
        package: The file's package; each may be defined once in a program.
        messages: Fields of each message, by its name.

    Returns:
        The classes by the messages' names; calling one makes a message.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415

    file = descriptor_pb2.FileDescriptorProto(
        name=f"vmactor/{package}.proto", package=package, syntax="proto3"
    )
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _describe(message.field.add(name=field, number=number), package, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in messages
    }


def _describe(field: "FieldDescriptorProto", package: str, kind: str) -> None:
    single = kind.removeprefix("repeated ")
    field.label = field.LABEL_OPTIONAL if single == kind else field.LABEL_REPEATED
    if single in _SCALARS:
        field.type = getattr(field, f"TYPE_{single.upper()}")
    else:
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{package}.{single}"
