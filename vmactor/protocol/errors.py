"""Errors on the wire: ``[code, message, data]``, and back.

The code is the reference's for the kind. ``data`` names the class and carries its fields, so that a client in
Python raises what an embedded service would have raised.
"""

import inspect
from typing import Any, Final

from vmactor import errors
from vmactor.errors import CODES, ApkError, ServiceSpecificError, VmactorError

MAX_MESSAGE: Final = 4096
"""Characters of a message that are sent."""
METHOD_NOT_FOUND: Final = "UnsupportedOperationError"

_CLASSES: Final[dict[str, type[VmactorError]]] = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, VmactorError)
}
_BY_CODE: Final[dict[int, type[VmactorError]]] = {
    CODES["SECURITY"]: errors.SecurityError,
    CODES["BAD_PARCELABLE"]: errors.IllegalArgumentError,
    CODES["ILLEGAL_ARGUMENT"]: errors.IllegalArgumentError,
    CODES["NULL_POINTER"]: errors.IllegalArgumentError,
    CODES["ILLEGAL_STATE"]: errors.IllegalStateError,
    CODES["UNSUPPORTED_OPERATION"]: errors.UnsupportedOperationError,
    CODES["SERVICE_SPECIFIC"]: errors.ServiceSpecificError,
    CODES["TRANSACTION_FAILED"]: errors.DeadlineExceededError,
}
_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "SlowSubscriberError": ("waiting", "after"),
    "CapacityExceededError": ("resource", "limit", "used", "needed", "advice"),
}


def _name(kind: type[BaseException]) -> str:
    """The nearest class that the other side can know: subclasses of other modules are nobody's business."""
    return next(base.__name__ for base in kind.__mro__ if _CLASSES.get(base.__name__) is base)


def to_wire(error: Exception) -> list[Any]:
    """An error as an answer's ``[code, message, data]``.

    What is not one of ours is told by its class only: its text may hold what is no client's business.
    """
    if not isinstance(error, VmactorError):
        text = f"the service failed ({type(error).__name__}); its log says more"
        return [CODES["TRANSACTION_FAILED"], text, {"kind": "TRANSACTION_FAILED", "type": "VmactorError"}]
    name = _name(type(error))
    data: dict[str, Any] = {"kind": error.kind, "type": name}
    if isinstance(error, ServiceSpecificError):
        data["number"] = error.number
    for field in _FIELDS.get(name, ()):
        data[field] = getattr(error, field)
    if isinstance(error, ApkError):
        data |= {"text": error.text, "causes": list(error.causes), "advice": error.advice}
    return [error.code, error.message[:MAX_MESSAGE], data]


def from_wire(value: Any) -> VmactorError:
    """The error that came as an answer, of the same class; of its kind's, if the class is not known here."""
    match value:
        case [int(code), str(message), *rest]:
            data = rest[0] if rest and isinstance(rest[0], dict) else {}
        case _:
            return VmactorError(f"the service answered with an error of unknown form: {value!r:.200}")
    name = data.get("type")
    kind = _CLASSES.get(name) if isinstance(name, str) else None
    if kind is None or (CODES[kind.kind] != code):
        return _BY_CODE.get(code, VmactorError)(message)
    try:
        if kind is ApkError:
            return ApkError(str(data["text"]), *map(str, data["causes"]), advice=str(data["advice"]))
        return kind(message, **{field: data[field] for field in _FIELDS.get(kind.__name__, ())})
    except (KeyError, TypeError):  # of a service that is newer, and has other fields
        return _BY_CODE.get(code, VmactorError)(message)
