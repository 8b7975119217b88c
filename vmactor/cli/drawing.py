"""Tables and bars for terminals; the only module that imports rich."""

import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.ansi import AnsiDecoder
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
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


class Bar:
    """A progress bar on standard error, in a ``with`` block, after which the line is empty again.

    Args:
        text: What is being done; shown as it is.
        total: How many bytes that is.
    """

    def __init__(self, text: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr, highlight=False, markup=False, emoji=False),
            transient=True,
            auto_refresh=False,  # which would be a thread
        )
        self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int) -> None:
        """Draw how far it is."""
        self._progress.update(self._task, completed=done, refresh=True)
