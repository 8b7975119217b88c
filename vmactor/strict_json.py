"""JSON read strictly, for files that people write: what Python's reader would pass over is an error.

Duplicate fields, unknown fields, NaN, numbers that are no moderate integers, deep nesting and large files
are refused, and every error names the field it is about. A reader is a function of (value, path) that
returns the typed value or raises; readers are put together to one for a whole file. Memory and time are
bounded by ``MAX_BYTES``.
"""

import contextlib
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from vmactor.errors import IllegalArgumentError, UnsupportedOperationError, VmactorError
from vmactor.text import escape

MAX_BYTES: Final = 1 << 20
"""Largest file read, in bytes (for text already decoded: characters)."""

_MAX_DEPTH: Final = 16
# A string or a bracket. A string without an end reaches to the end of the text: no place is scanned twice.
_STRUCTURE: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)

T = TypeVar("T")
Reader = Callable[[object, str], T]


class _Pairs(list[tuple[str, object]]):
    """An object's members as written, duplicates included."""


@dataclass(frozen=True)
class _OddNumber:
    """A number that is no integer of moderate size; kept as text, since none of them is ever right."""

    text: str


def _integer(text: str) -> object:
    return int(text) if len(text) <= 20 else _OddNumber(text)


def read_json(data: str | bytes) -> object:
    """Turn text into values for a reader.

    Raises:
        IllegalArgumentError: Too large, not UTF-8, nested too deep or not JSON; the message says where.
    """
    if len(data) > MAX_BYTES:
        raise IllegalArgumentError(f"too large; a configuration file has at most {MAX_BYTES} bytes")
    try:
        decoded = data.decode() if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise IllegalArgumentError(
            f"not UTF-8 at byte {error.start}; a configuration is JSON in UTF-8"
        ) from None
    depth = 0
    for token in _STRUCTURE.finditer(decoded):
        char = decoded[token.start()]
        depth += (char in "[{") - (char in "]}")
        if depth > _MAX_DEPTH:  # before the JSON reader, which recurses
            raise IllegalArgumentError(f"nested more than {_MAX_DEPTH} deep at character {token.start()}")
    try:
        return json.loads(
            decoded,
            object_pairs_hook=_Pairs,
            parse_int=_integer,
            parse_float=_OddNumber,
            parse_constant=_OddNumber,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise IllegalArgumentError(f"not valid JSON at {place}: {escape(error.msg)}") from None


def as_read(value: object) -> object:
    """What another format's reader gave, such as ``tomllib``, in the form that the readers here take."""
    match value:
        case dict():
            return _Pairs((key, as_read(item)) for key, item in value.items())
        case list():
            return [as_read(item) for item in value]
        case str() | int() | float():
            return value
    return str(value)  # a date, say


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Say at the beginning of an error what it is about."""
    try:
        yield
    except VmactorError as error:
        raise error.about(what) from error.__cause__


def _shown(value: object) -> str:
    match value:
        case None | bool():
            return json.dumps(value)
        case int() | float():
            return f"the number {value}"
        case _OddNumber(text):
            return f"the number {escape(text, limit=40)}"
        case str():
            return f'the text "{escape(value, limit=40)}"'
        case _Pairs():
            return "an object"
        case _:
            return "a list"


def wrong(path: str, wanted: str, value: object) -> IllegalArgumentError:
    """The error for a value of the wrong kind."""
    return IllegalArgumentError(f"{path}: must be {wanted}, not {_shown(value)}")


def text(value: object, path: str) -> str:
    """Read a string."""
    if not isinstance(value, str):
        raise wrong(path, "text", value)
    return value


def flag(value: object, path: str) -> bool:
    """Read a boolean."""
    if not isinstance(value, bool):
        raise wrong(path, "true or false", value)
    return value


def number(least: float, most: float = math.inf) -> Reader[float]:
    """A reader of numbers within bounds, whole ones or not."""

    def read_number(value: object, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise wrong(path, "a number", value)
        if not least <= value <= most:
            bounds = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
            raise wrong(path, bounds, value)
        return value

    return read_number


def whole_number(least: int, most: float = math.inf) -> Reader[int]:
    """The same for whole ones."""
    read_number = number(least, most)

    def read_whole(value: object, path: str) -> int:
        if type(value) is not int:
            raise wrong(path, "a whole number", value)
        read_number(value, path)
        return value

    return read_whole


def or_null(read: Reader[T]) -> Reader[T | None]:
    """A reader that takes null too."""
    return lambda value, path: None if value is None else read(value, path)


def list_of(read: Reader[T], most: int) -> Reader[tuple[T, ...]]:
    """A reader of lists of at most so many items."""

    def read_list(value: object, path: str) -> tuple[T, ...]:
        if not isinstance(value, list) or isinstance(value, _Pairs):
            raise wrong(path, "a list", value)
        if len(value) > most:
            raise IllegalArgumentError(f"{path}: at most {most} are possible, not {len(value)}")
        return tuple(read(item, f"{path}[{i}]") for i, item in enumerate(value))

    return read_list


def object_of(
    make: Callable[..., T], required: str, later: Mapping[str, str] | None, **fields: Reader[object]
) -> Reader[T]:
    """A reader of objects.

    Args:
        make: Called with the fields that were given.
        required: Names of fields that must be there, separated by blanks.
        later: Fields that are refused by name, in snake case, and what to do instead. None where fields
            that nobody knows are passed over.
        fields: The reader of each field; unless others are passed over, there are no others.
    """

    def read(value: object, path: str) -> T:
        here = path or "the file"
        if not isinstance(value, _Pairs):
            raise wrong(here, "an object", value)
        given: dict[str, object] = {}
        for name, item in value:
            at = f"{path}.{name}" if path else name
            if name not in fields:
                if later is None:
                    continue
                raise _unknown(path, name, list(fields), later)
            if name in given:
                raise IllegalArgumentError(f"{at}: is given twice; leave one")
            given[name] = fields[name](item, at)
        for name in required.split():
            if name not in given:
                raise IllegalArgumentError(f"{here}: {name} is missing")
        return make(**given)

    return read


def _unknown(path: str, name: str, known: list[str], later: Mapping[str, str]) -> VmactorError:
    shown = escape(name, limit=64)
    at = f"{path}.{shown}" if path else shown
    snake = re.sub("(?<=[a-z])(?=[A-Z])", "_", name[:64]).lower()
    if hint := later.get(snake):
        return UnsupportedOperationError(f"{at}: not supported by vmactor; remove it ({hint})")
    if near := difflib.get_close_matches(snake, known, 1):
        return IllegalArgumentError(f"{at}: there is no such field; do you mean {near[0]}?")
    return IllegalArgumentError(f"{at}: there is no such field; there are {', '.join(known)}")
