"""Which platform versions a configuration works with: Cargo-style semantic version requirements.

The rules, the canonical form and the error texts are those of the Rust crate ``semver`` 1.x, which the
reference uses for a configuration's ``platform_version``: ``^`` where no operator is given, parts may be
missing, ``*``, ``x`` and ``X`` are wildcards, comparators are joined by commas, and a pre-release only
satisfies a requirement that names a pre-release of the same version. Pure text in, pure values out.
"""

import string
from dataclasses import dataclass
from typing import Final, NoReturn

from vmactor.errors import IllegalArgumentError

MAX_COMPARATORS: Final = 32
"""As in the crate."""
MAX_LENGTH: Final = 4096
"""Longest text accepted, in characters: 32 comparators of the largest numbers fit. The crate has no limit."""

_MAX_NUMBER: Final = 2**64 - 1
_MAX_DIGITS: Final = 20
_MAJOR: Final = "major version number"
_MINOR: Final = "minor version number"
_PATCH: Final = "patch version number"
_PRE: Final = "pre-release identifier"
_BUILD: Final = "build metadata"
_OPERATORS: Final = (">=", "<=", "=", ">", "<", "~", "^")  # the longer of two that begin alike comes first
_WILDCARDS: Final = ("*", "x", "X")
_IDENTIFIER_CHARS: Final = string.digits + string.ascii_letters + "-."

# Numeric identifiers sort before others, so they begin with 0. Then comes the length, so that numbers of any
# size compare as text, without conversion.
_Identifier = tuple[int, int, str]


def _precedence(pre: str) -> tuple[bool, list[_Identifier]]:
    """A sort key for pre-releases; none at all is later than any."""
    parts = pre.split(".") if pre else []
    return not pre, [(0, len(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _fail(why: str) -> NoReturn:
    raise IllegalArgumentError(why)


def _quoted(char: str) -> str:
    """A character as Rust's debug form shows it, near enough: printable in quotes, else as an escape."""
    named = {"\0": r"\0", "\t": r"\t", "\n": r"\n", "\r": r"\r", "'": r"\'", "\\": r"\\"}
    shown = named.get(char) or (char if char.isprintable() else rf"\u{{{ord(char):x}}}")
    return f"'{shown}'"


class _Scanner:
    """A text and a place in it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        if len(text) > MAX_LENGTH:
            _fail(f"longer than {MAX_LENGTH} characters")

    def peek(self) -> str:
        """The next character; empty at the end."""
        return self._text[self._at : self._at + 1]

    def skip_spaces(self) -> None:
        while self.peek() == " ":
            self._at += 1

    def take(self, *choices: str) -> str:
        """The first of the choices that comes next, or nothing."""
        for choice in choices:
            if self._text.startswith(choice, self._at):
                self._at += len(choice)
                return choice
        return ""

    def _run_of(self, chars: str) -> str:
        start = self._at
        while self.peek() and self.peek() in chars:
            self._at += 1
        return self._text[start : self._at]

    def number(self, what: str) -> int:
        digits = self._run_of(string.digits)
        if not digits:
            self.unexpected("unexpected character {} while parsing {}", what)
        if digits[0] == "0" and len(digits) > 1:
            _fail(f"invalid leading zero in {what}")
        if len(digits) > _MAX_DIGITS or int(digits) > _MAX_NUMBER:
            _fail(f"value of {what} exceeds u64::MAX")
        return int(digits)

    def identifiers(self, what: str) -> str:
        """Dot-separated identifiers, at least one."""
        text = self._run_of(_IDENTIFIER_CHARS)
        for part in text.split("."):
            if not part:
                _fail(f"empty identifier segment in {what}")
            if what == _PRE and part.isdecimal() and part[0] == "0" and len(part) > 1:
                _fail(f"invalid leading zero in {what}")
        return text

    def unexpected(self, why: str, what: str) -> NoReturn:
        """Say what stands here although something else should."""
        char = self.peek()
        _fail(why.format(_quoted(char), what) if char else f"unexpected end of input while parsing {what}")


@dataclass(frozen=True, slots=True)
class Version:
    """A semantic version, ``major.minor.patch[-pre][+build]``.

    Two versions are equal if all parts are, the build included. There is no ``<``, because pre-releases make
    order alone a poor guide: ask ``VersionRequirement.matches``.

    Attributes:
        major: 0 to 2**64 - 1, like the next two.
        minor: Second number.
        patch: Third number.
        pre: Pre-release identifiers, or empty.
        build: Build metadata, or empty; never compared by a requirement.
    """

    major: int
    minor: int
    patch: int
    pre: str = ""
    build: str = ""

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Read a complete version; all three numbers are needed, blanks are not allowed.

        Raises:
            IllegalArgumentError: The text is not a version; the message says where it goes wrong.
        """
        if not text:
            _fail("empty string, expected a semver version")
        scan = _Scanner(text)
        numbers, last = [scan.number(_MAJOR)], _MAJOR
        for what in (_MINOR, _PATCH):
            if not scan.take("."):
                scan.unexpected("unexpected character {} after {}", last)
            numbers.append(scan.number(what))
            last = what
        pre = build = ""
        if scan.take("-"):
            pre, last = scan.identifiers(_PRE), _PRE
        if scan.take("+"):
            build, last = scan.identifiers(_BUILD), _BUILD
        if scan.peek():
            scan.unexpected("unexpected character {} after {}", last)
        major, minor, patch = numbers
        return cls(major, minor, patch, pre, build)

    def __str__(self) -> str:
        text = f"{self.major}.{self.minor}.{self.patch}"
        return text + (f"-{self.pre}" if self.pre else "") + (f"+{self.build}" if self.build else "")


@dataclass(frozen=True, slots=True)
class Comparator:
    """One condition of a requirement.

    Attributes:
        op: ``=``, ``>``, ``>=``, ``<``, ``<=``, ``~``, ``^``, or ``*`` for a wildcard without an operator.
        numbers: The one to three numbers that were given.
        pre: Pre-release identifiers; only after three numbers.
    """

    op: str
    numbers: tuple[int, ...]
    pre: str = ""

    def matches(self, version: Version) -> bool:
        """Whether the version satisfies this condition, leaving aside the rule on pre-releases."""
        actual = (version.major, version.minor, version.patch)[: len(self.numbers)]
        precise = (actual, _precedence(version.pre))
        wanted = (self.numbers, _precedence(self.pre))
        # A missing number stands for all of its values: 1.2 satisfies `>=1` and `<=1`, but not `>1`.
        partial = len(self.numbers) < 3
        match self.op:
            case ">" | ">=":
                above = actual > self.numbers if partial else precise > wanted
                return above or (self.op == ">=" and precise == wanted)
            case "<" | "<=":
                below = actual < self.numbers if partial else precise < wanted
                return below or (self.op == "<=" and precise == wanted)
            case "~":
                return actual[:2] == self.numbers[:2] and precise >= wanted
            case "^":
                # Kept: all numbers up to and including the first that is not zero. A partial caret, unlike
                # a partial tilde, looks at no pre-release.
                kept = next((i + 1 for i, number in enumerate(self.numbers) if number), len(self.numbers))
                enough = actual >= self.numbers if partial else precise >= wanted
                return actual[:kept] == self.numbers[:kept] and enough
        return precise == wanted

    def admits_prereleases_of(self, version: Version) -> bool:
        """Whether this condition names a pre-release of the same version."""
        return bool(self.pre) and self.numbers == (version.major, version.minor, version.patch)

    def __str__(self) -> str:
        numbers = ".".join(map(str, self.numbers))
        if self.op == "*":
            return f"{numbers}.*"
        return f"{self.op}{numbers}" + (f"-{self.pre}" if self.pre else "")


def _comparator(scan: _Scanner) -> tuple[Comparator, str]:
    """One comparator, and the name of its last part for error texts."""
    op = scan.take(*_OPERATORS)
    scan.skip_spaces()
    numbers, last = [scan.number(_MAJOR)], _MAJOR
    wildcard = False
    for what in (_MINOR, _PATCH):
        if not scan.take("."):
            break
        last = what
        if scan.take(*_WILDCARDS):
            wildcard = True
        elif wildcard:
            _fail("unexpected character after wildcard in version req")
        else:
            numbers.append(scan.number(what))
    pre = ""
    if len(numbers) == 3:
        if scan.take("-"):
            pre, last = scan.identifiers(_PRE), _PRE
        if scan.take("+"):
            scan.identifiers(_BUILD)  # checked, and without meaning in a requirement
            last = _BUILD
    scan.skip_spaces()
    return Comparator(op or ("*" if wildcard else "^"), tuple(numbers), pre), last


@dataclass(frozen=True, slots=True)
class VersionRequirement:
    """A set of conditions that must all hold; without any, every release (but no pre-release) matches."""

    comparators: tuple[Comparator, ...]

    @classmethod
    def parse(cls, text: str) -> "VersionRequirement":
        """Read a requirement such as ``~1.0``, ``>=1.0, <2.0`` or ``*``.

        Raises:
            IllegalArgumentError: The text is not a requirement; the message is that of the reference.
        """
        scan = _Scanner(text)
        scan.skip_spaces()
        comparators: list[Comparator] = []
        while True:
            if wildcard := scan.take(*_WILDCARDS):
                scan.skip_spaces()
                if scan.peek() == "," or (comparators and not scan.peek()):
                    _fail(f"wildcard req ({wildcard}) must be the only comparator in the version req")
                if comparators:
                    _fail(f"unexpected character '{wildcard}' while parsing {_MAJOR}")
                if scan.peek():
                    _fail("unexpected character after wildcard in version req")
                return cls(())
            comparator, last = _comparator(scan)
            comparators.append(comparator)
            if not scan.peek():
                return cls(tuple(comparators))
            if not scan.take(","):
                _fail(f"expected comma after {last}, found {_quoted(scan.peek())}")
            if len(comparators) == MAX_COMPARATORS:
                _fail("excessive number of version comparators")
            scan.skip_spaces()

    def matches(self, version: Version) -> bool:
        """Whether a platform of this version will do."""
        return all(comparator.matches(version) for comparator in self.comparators) and (
            not version.pre
            or any(comparator.admits_prereleases_of(version) for comparator in self.comparators)
        )

    def __str__(self) -> str:
        """The canonical form: ``1.0`` is ``^1.0``, ``>=1.0,<2`` is ``>=1.0, <2``, ``x`` is ``*``."""
        return ", ".join(map(str, self.comparators)) or "*"
