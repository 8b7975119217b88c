"""The class path: which APEXes add to it, read off what ``derive_classpath`` prints. Pure."""

import re
from typing import Final

from vmactor.log import get_logger
from vmactor.text import escape

_LINE: Final = re.compile("export [^ ]+ ([^ ]+)")
_APEX: Final = re.compile("/apex/([^/]*)/.*", re.DOTALL)

logger = get_logger()


def apexes_in_classpath(output: str) -> frozenset[str]:
    """The names of the APEXes that are on a class path.

    Lines that do not have the form ``export NAME VALUE`` are passed over, and counted in the log.
    """
    lines = [line.removesuffix("\r") for line in output.split("\n")]
    matches = [(line, _LINE.fullmatch(line)) for line in lines]
    malformed = [line for line, match in matches if match is None and line]
    if malformed:
        logger.warning(
            "malformed lines from derive_classpath", number=len(malformed), first=escape(malformed[0])
        )
    items = (item for _, match in matches if match for item in match[1].split(":"))
    return frozenset(match[1] for match in map(_APEX.fullmatch, items) if match)
