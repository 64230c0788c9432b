"""Rows and columns as text: aligned, never wider than the terminal, with colours where rich is installed."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bgsupervisor.cli.text import cut, padded, width

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Column", "show_table", "terminal_columns"]

FALLBACK_COLUMNS = 80
EMPTY = "-"
"""What an empty cell holds in a pipe, so that programs can count fields."""
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
"""What a blank inside a cell becomes in a pipe, but in the last column."""


@dataclass(slots=True)
class Column:
    """A column and how it gives way when the terminal is narrow.

    Attributes:
        title: Its header.
        cells: One text per row.
        styles: One rich style per row, "" for none; empty for a column without any.
        right: Whether numbers stand at its right end.
        always: Whether it is shown where all its cells are empty.
        least: The widths to which it shrinks, step by step and from the right, before others are dropped.
        dropped: When it is dropped if nothing else helps, the smallest first; None is never.
        refit: Makes the cells anew for a width, where cutting them off would lose too much.
    """

    title: str
    cells: list[str]
    styles: list[str] = field(default_factory=list)
    right: bool = False
    always: bool = False
    least: tuple[int, ...] = ()
    dropped: int | None = None
    refit: Callable[[int], list[str]] | None = None

    @property
    def says_something(self) -> bool:
        """Whether it is worth its room."""
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


def show_table(columns: Sequence[Column]) -> None:
    """Print a table: for people on a terminal, for programs (one blank between columns, no empty cell) in a pipe."""
    shown = [column for column in columns if column.says_something]
    available = terminal_columns()
    if available is None:
        _print_for_programs(shown)
        return
    widths = _fitted(shown, available)
    paint = _painter()
    for line in _lines(shown, widths, available):
        paint(line)


def _print_for_programs(columns: Sequence[Column]) -> None:
    for column in columns[:-1]:
        column.cells = [cell.replace(" ", NO_BREAK_SPACE) or EMPTY for cell in column.cells]
    columns[-1].cells = [cell or EMPTY for cell in columns[-1].cells]
    for line in _lines(columns, [column.natural for column in columns], None):
        _print_plain(line)


def _fitted(columns: list[Column], available: int) -> list[int]:
    """Return the columns' widths, together with single blanks at most *available*; drops columns from the list."""
    while True:
        widths = [column.natural for column in columns]
        for step in range(max(len(column.least) for column in columns)):
            for number, column in reversed(list(enumerate(columns))):
                excess = sum(widths) + len(widths) - 1 - available
                if excess > 0 and step < len(column.least):
                    widths[number] = max(min(widths[number], column.least[step]), widths[number] - excess)
        droppable = [column for column in columns if column.dropped is not None]
        if sum(widths) + len(widths) - 1 <= available or not droppable:
            return widths
        columns.remove(min(droppable, key=lambda column: column.dropped or 0))


_Line = list[tuple[str, str]]


def _lines(columns: Sequence[Column], widths: Sequence[int], available: int | None) -> list[_Line]:
    cells = [
        column.refit(size) if column.refit and size < column.natural else column.cells
        for column, size in zip(columns, widths, strict=True)
    ]
    lines = [_line([(column.title, "bold") for column in columns], columns, widths, available)]
    for row in range(len(cells[0])):
        texts = [
            (cells[number][row], column.styles[row] if column.styles else "") for number, column in enumerate(columns)
        ]
        lines.append(_line(texts, columns, widths, available))
    return lines


def _line(
    texts: list[tuple[str, str]], columns: Sequence[Column], widths: Sequence[int], available: int | None
) -> _Line:
    line: _Line = []
    left = available
    for number, ((text, style), column, size) in enumerate(zip(texts, columns, widths, strict=True)):
        fitted = padded(cut(text, size), size, right=column.right)
        fitted = f"{' ' * (number > 0)}{fitted}"
        if left is not None:
            fitted = cut(fitted, left)
            left -= width(fitted)
        line.append((fitted, style))
    line[-1] = (line[-1][0].rstrip(), line[-1][1])
    return line


def _painter() -> Callable[[_Line], None]:
    with suppress(ImportError):
        return _rich_painter()
    return _print_plain


def _rich_painter() -> Callable[[_Line], None]:
    from rich.console import Console  # noqa: PLC0415 - an extra, and only a terminal pays for it
    from rich.text import Text  # noqa: PLC0415 - the same

    console = Console(highlight=False, markup=False, emoji=False)

    def paint(line: _Line) -> None:
        console.print(Text.assemble(*line), no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)

    return paint


def _print_plain(line: _Line) -> None:
    print("".join(text for text, _ in line))  # noqa: T201 - the command line speaks here
