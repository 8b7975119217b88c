"""A guest's output as a person may see it: whole lines, of bounded length, with everything odd escaped."""

from typing import Final

from vmactor.cli.output import brackets
from vmactor.text import escape_bytes

MAX_LINE: Final = 4096
_CARRIAGE_RETURN: Final = b"\r"


class Lines:
    """Makes lines of pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that are complete now, each with its end; one that is too long is cut into several."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            lines, self._rest = [*lines, self._rest], b""
        return [_shown(line) for line in lines]

    def end(self) -> list[str]:
        """What is left at the end of the text."""
        rest, self._rest = self._rest, b""
        return [_shown(rest)] if rest else []


def _shown(line: bytes) -> str:
    return f"{brackets(escape_bytes(line.rstrip(_CARRIAGE_RETURN), limit=2 * MAX_LINE))}\n"
