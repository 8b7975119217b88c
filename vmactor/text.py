r"""Foreign text: how it is shown to a person, and how it enters a VMM's arguments.

Text from guests, clients and files can hold anything. ``escape`` is the one function through which it passes
before a person sees it. What it makes is one line in which

* every character is printable and stands where it is read: control characters (ANSI sequences begin with
  one), bidirectional and zero-width controls, other characters that show nothing, lone surrogates, private
  and unassigned ones are written as ``\n \t \r \xNN \u{NNNN}``;
* a backslash is always doubled, so an escape cannot be forged and the original can be read back;
* ``[`` is written ``\[``. vmactor's own renderer prints ``rich.text.Text`` objects, which know no markup, so
  there this is not needed. But a string that passes through somebody's ``print`` of rich must not open a tag
  either, and rich reads ``\[`` as a plain bracket and an even number of backslashes as no escape of what
  follows.

Letters that run from right to left are shown as they are. ``isprintable`` decides by the interpreter's
Unicode tables; what is newer than those is escaped.
"""

import re
import unicodedata
from typing import Final, NoReturn

from vmactor.errors import IllegalArgumentError

DEFAULT_LIMIT: Final = 1024
"""Longest result of ``escape`` unless told otherwise, in characters."""

_ELLIPSIS: Final = "…"
_NAMED: Final = {"\\": r"\\", "[": r"\[", "\n": r"\n", "\r": r"\r", "\t": r"\t"}
# Printable by category, yet they show nothing (Unicode's Default_Ignorable_Code_Point, less what is not
# printable anyway): fillers of Hangul and Khmer, variation selectors, the grapheme joiner; and the blank
# Braille pattern.
_INVISIBLE: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_MAX_MARKS: Final = 4
"""Combining marks shown on one character; scripts need three or so, more only paint over other lines."""

_VM_NAME: Final = re.compile("[A-Za-z0-9._-]{1,64}")


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, in Python's spelling ("surrogateescape")
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{{{code:x}}}"


def escape(text: str, *, limit: int = DEFAULT_LIMIT) -> str:
    r"""Make foreign text safe to show.

    Args:
        text: Anything, lone surrogates too; those of ``os.fsdecode`` appear as the bytes they stand for.
        limit: Longest result, in characters, at least 1. Where it is reached, the result ends in ``…``; no
            escape is cut in two. The work done is bounded by it too, whatever the length of the text.

    Returns:
        One line: printable characters only, ``\`` and ``[`` always escaped.
    """
    pieces: list[str] = []
    length = ends = 0  # ends: how many pieces fit when the ellipsis follows
    marks = _MAX_MARKS  # none may be put on what stands before our text
    for char in text:
        if (piece := _NAMED.get(char, char)) is not char or not char.isprintable() or _INVISIBLE.match(char):
            piece, marks = (piece if piece is not char else _escaped(char)), _MAX_MARKS
        elif unicodedata.category(char)[0] != "M":
            marks = 0
        else:
            marks += 1
            piece = char if marks <= _MAX_MARKS else _escaped(char)
        length += len(piece)
        if length > limit:
            return "".join(pieces[:ends]) + _ELLIPSIS
        pieces.append(piece)
        if length < limit:
            ends = len(pieces)
    return "".join(pieces)


def escape_bytes(data: bytes, *, limit: int = DEFAULT_LIMIT) -> str:
    r"""Make console output or other bytes safe to show: ``escape``, with bytes outside UTF-8 as ``\xNN``.

    Args:
        data: Anything. Split it at line ends first where lines shall stay lines.
        limit: As in ``escape``.
    """
    # A character has at most four bytes, so this leaves more than the limit takes.
    return escape(data[: 4 * limit + 4].decode(errors="surrogateescape"), limit=limit)


def _refuse(text: str, why: str) -> NoReturn:
    raise IllegalArgumentError(f'"{escape(text, limit=200)}" {why}')


def _check_argument(text: str) -> None:
    if found := re.search("[\0\n\r]", text):
        what = "a NUL character" if found.group() == "\0" else "a line break"
        _refuse(text, f"contains {what} and cannot be passed to a VMM; remove it")
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        _refuse(text, "contains a lone surrogate and cannot be passed to a VMM; remove it")


def qemu_value(text: str) -> str:
    """Quote a value for the right side of ``key=value`` in a QEMU argument.

    QEMU splits such arguments at single commas and knows no other special character there; a comma is
    doubled. Always write the key: a first value without one is also searched for ``=``.

    Raises:
        IllegalArgumentError: The text holds NUL, a line break or a lone surrogate.
    """
    _check_argument(text)
    return text.replace(",", ",,")


def crosvm_value(text: str) -> str:
    r"""Quote a value for the right side of ``key=value`` in one of crosvm's key=value lists.

    For the options that crosvm reads as such lists (``--block``, ``--serial``, ``--vsock``, ...), not for
    ``--shared-dir`` and its colons. Text with a comma, bracket, quote or backslash, and the empty text, is
    put in double quotes, within which ``"`` and a backslash are escaped.

    Raises:
        IllegalArgumentError: The text holds NUL, a line break or a lone surrogate.
    """
    _check_argument(text)
    if text and not re.search(r"""[],["'\\]""", text):
        return text
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def crosvm_argument(text: str) -> str:
    """Check an option's value or a positional argument that stands alone on crosvm's command line.

    crosvm rewrites its arguments before it knows which of them are values: one that begins with a dash is
    split at its first ``=``, and ``-h`` becomes ``--help``. A lone dash, and text without a leading dash,
    stay as they are.

    Returns:
        The text, unchanged.

    Raises:
        IllegalArgumentError: crosvm would not take the text as it is.
    """
    _check_argument(text)
    if text == "-h" or (text.startswith("-") and "=" in text):
        _refuse(text, "begins with a dash and would be misread by crosvm; put another word first")
    return text


def check_vm_name(name: str) -> str:
    """Return the name if it is one that a VM can have: 1 to 64 ASCII letters, digits, ``.``, ``_`` and ``-``.

    Raises:
        IllegalArgumentError: It is not.
    """
    if not isinstance(name, str) or not _VM_NAME.fullmatch(name):
        _refuse(str(name), "is not a VM name; use 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'")
    return name
