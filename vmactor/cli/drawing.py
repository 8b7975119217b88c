"""Tables for terminals; the only module that imports rich."""

import io
import shutil
from collections.abc import Mapping, Sequence

from rich.ansi import AnsiDecoder
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def draw(columns: Sequence[str], rows: Sequence[Sequence[str]], colours: Mapping[str, str]) -> str:
    """A table as wide as the terminal at most; text is shown as it is, never as markup.

    Args:
        columns: Headings.
        rows: Cells.
        colours: Numbers of terminal colours, by a cell's whole text.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(cell, colours.get(cell)) for cell in row))
    page = io.StringIO()
    Console(
        file=page,
        force_terminal=bool(colours),
        color_system="standard" if colours else None,
        width=shutil.get_terminal_size().columns,
        highlight=False,
        markup=False,
        emoji=False,
    ).print(table)
    return page.getvalue()


def _cell(text: str, colour: str | None) -> Text:
    return Text(text) if colour is None else AnsiDecoder().decode_line(f"\x1b[{colour}m{text}\x1b[0m")
