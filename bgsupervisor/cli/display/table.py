"""Rows and columns as text: aligned, never wider than the terminal, in colour where rich is installed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bgsupervisor.cli.display.text import cut, padded, width

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = ["DROPPED", "Column", "show_table", "terminal_columns"]

FALLBACK_COLUMNS = 80
EMPTY = "-"
"""An empty cell in a pipe, so that programs can count fields."""
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
"""A blank inside a cell in a pipe, except in the last column."""
DROPPED = 0
"""The width of a column that is left out."""


@dataclass(slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its header, no other column's.
        cells: One text per row.
        styles: One rich style per row, "" for none; empty for a column without any.
        right: Whether numbers stand at its right end.
        always: Whether it is shown where all its cells are empty.
        refit: Renders the cells again for a width and the titles of all shown columns, where cutting them off would
            lose too much.
    """

    title: str
    cells: list[str]
    styles: list[str] = field(default_factory=list)
    right: bool = False
    always: bool = False
    refit: Callable[[int, Collection[str]], list[str]] | None = None

    @property
    def is_needed(self) -> bool:
        """Whether it is shown."""
        return self.always or any(self.cells)

    @property
    def natural(self) -> int:
        """Return the width at which nothing is cut."""
        return max(width(text) for text in (self.title, *self.cells))


def terminal_columns() -> int | None:
    """Return the width of the terminal on stdout, None where it is none."""
    if not sys.stdout.isatty():
        return None
    return max(1, shutil.get_terminal_size((FALLBACK_COLUMNS, 24)).columns)


def show_table(columns: Sequence[Column], *, narrowing: Sequence[tuple[str, int]], for_programs: bool = True) -> None:
    """Print a table: for people on a terminal, for programs (one blank between columns, no empty cell) in a pipe.

    Args:
        columns: Those without a text in any cell are left out.
        narrowing: Steps for a terminal that is too narrow, taken in turn until the table fits: the title of a
            column, and the width to which it may shrink (DROPPED leaves it out).
        for_programs: Whether a pipe gets one field per column; else it gets what a terminal without end would.
    """
    shown = [column for column in columns if column.is_needed]
    available = terminal_columns()
    if available is None:
        _print_whole(shown, for_programs=for_programs)
        return
    widths = _fitted(shown, narrowing, available)
    paint = _painter()
    for line in _lines([column for column in shown if widths[column.title] != DROPPED], widths, available):
        paint(line)


def _print_whole(columns: Sequence[Column], *, for_programs: bool) -> None:
    if for_programs:
        for column in columns[:-1]:
            column.cells = [cell.replace(" ", NO_BREAK_SPACE) or EMPTY for cell in column.cells]
        columns[-1].cells = [cell or EMPTY for cell in columns[-1].cells]
    for line in _lines(columns, {column.title: column.natural for column in columns}, None):
        _print_plain(line)


def _fitted(columns: Sequence[Column], narrowing: Sequence[tuple[str, int]], available: int) -> dict[str, int]:
    """Return the columns' widths, which fit with single blanks between them, if the narrowing suffices."""
    natural = {column.title: column.natural for column in columns}
    widths = dict(natural)
    for title, least in narrowing:
        excess = _excess(widths, available)
        if excess <= 0:
            break
        if title in widths and least < widths[title]:
            widths[title] = max(least, widths[title] - excess) if least != DROPPED else DROPPED
    for title in reversed([title for title, size in widths.items() if DROPPED != size < natural[title]]):
        spare = -_excess(widths, available)
        widths[title] += max(0, min(spare, natural[title] - widths[title]))
    return widths


def _excess(widths: dict[str, int], available: int) -> int:
    shown = [size for size in widths.values() if size != DROPPED]
    return sum(shown) + len(shown) - 1 - available


_Line = list[tuple[str, str]]


def _lines(columns: Sequence[Column], widths: dict[str, int], available: int | None) -> list[_Line]:
    titles = [column.title for column in columns]
    cells = [
        column.refit(widths[column.title], titles) if column.refit and available is not None else column.cells
        for column in columns
    ]
    lines = [_line([(title, "bold") for title in titles], columns, widths, available)]
    for row in range(len(cells[0])):
        texts = [
            (cells[number][row], column.styles[row] if column.styles else "") for number, column in enumerate(columns)
        ]
        lines.append(_line(texts, columns, widths, available))
    return lines


def _line(
    texts: list[tuple[str, str]], columns: Sequence[Column], widths: dict[str, int], available: int | None
) -> _Line:
    line: _Line = []
    left = available
    for number, ((text, style), column) in enumerate(zip(texts, columns, strict=True)):
        size = widths[column.title]
        fitted = f"{' ' * (number > 0)}{padded(cut(text, size), size, right=column.right)}"
        if left is not None:
            fitted = cut(fitted, left)
            left -= width(fitted)
        line.append((fitted, style))
    while len(line) > 1 and not line[-1][0].strip():
        line.pop()
    line[-1] = (line[-1][0].rstrip(), line[-1][1])
    return line


def _painter() -> Callable[[_Line], None]:
    try:
        from rich.console import Console  # noqa: PLC0415 - an extra, and only a terminal pays for it
        from rich.text import Text  # noqa: PLC0415 - the same
    except ImportError:
        return _print_plain
    console = Console(highlight=False, markup=False, emoji=False)

    def paint(line: _Line) -> None:
        console.print(Text.assemble(*line), no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)

    return paint


def _print_plain(line: _Line) -> None:
    print("".join(text for text, _ in line))  # noqa: T201 - the output of a command
