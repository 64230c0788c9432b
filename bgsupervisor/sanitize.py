"""Text of others, as it goes to logs, terminals and other programs; knows no task and no terminal.

Nothing of it may steer a terminal, begin a line of its own, or show in another order than it has: control characters
(C0, DEL, C1), separators of lines, bidirectional controls (https://www.unicode.org/reports/tr9/), invisible characters
and lone surrogates. `str.isprintable` is false for all of these.
"""

from __future__ import annotations

import logging
import re
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LineFormatter", "clean", "clean_line_keeping_colours", "escaped", "quoted", "trace_lines"]

INDENT = "    "
"""Stands before each further line of a log record: a record itself begins with its time."""
_COLOUR = re.compile(r"(\x1b\[[0-9;:]{0,40}m)")
"""ECMA-48's SGR, which changes how characters look and nothing else."""
_RESET = "\x1b[0m"
_WORD = re.compile(r"[\w.:<>/@+-]*", re.ASCII)


def clean(text: str) -> str:
    """Return *text* as one line without anything that could steer a terminal."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one.isprintable() else _harmless(one) for one in text)


def clean_line_keeping_colours(line: str) -> str:
    """Return one line for a terminal: `clean`, but with its tabs and its colours, which end with it."""
    if line.isascii() and line.isprintable():
        return line
    pieces = _COLOUR.split(line)
    shown = "".join(
        piece if number % 2 else "\t".join(map(clean, piece.split("\t"))) for number, piece in enumerate(pieces)
    )
    return shown + _RESET if len(pieces) > 1 else shown


def escaped(json: str) -> str:
    r"""Return JSON text with the characters that `clean` replaces as \uXXXX; it means the same to a program.

    The line feeds between its values stay: a text within JSON holds none.
    """
    if json.isascii() and all(line.isprintable() for line in json.split("\n")):
        return json
    return "".join(one if one.isprintable() or one == "\n" else _escape(one) for one in json)


def quoted(text: str) -> str:
    """Return *text* as the value of a key in a line of the log: as it is if it is one word, else as JSON has it."""
    if _WORD.fullmatch(text):
        return text
    from json import dumps  # noqa: PLC0415 - most values are words

    return escaped(dumps(text, ensure_ascii=False))


def trace_lines(error: BaseException) -> list[str]:
    """Return the lines of a traceback, indented, so that none of them can be taken for a record of a log."""
    return _indented("".join(traceback.format_exception(error)).rstrip("\n").split("\n"))


class _Arguments(logging.Filter):
    """Cleans what stands in the messages of our logger, whichever handler an application gives them to."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean the arguments of a record; it passes."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                one if one is None or isinstance(one, int | float) else clean(str(one)) for one in record.args
            )
        return True


logging.getLogger("bgsupervisor").addFilter(_Arguments())


def logger() -> logging.Logger:
    """Return the logger of this package, whose messages are clean."""
    return logging.getLogger("bgsupervisor")


class LineFormatter(logging.Formatter):
    """Formats a record as one clean line; lines of a traceback follow, each clean and indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in logging
        """Return the line of a record."""
        return clean(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802 - as above
        """Return the lines of a traceback."""
        return "\n".join(_indented(super().formatException(ei).split("\n")))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - as above
        """Return the lines of a stack."""
        return "\n".join(_indented(stack_info.split("\n")))


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"{INDENT}{clean(line)}".rstrip() for line in lines]


def _harmless(character: str) -> str:
    return " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"


def _escape(character: str) -> str:
    code = ord(character)
    if code > 0xFFFF:  # noqa: PLR2004 - JSON writes what lies above as a surrogate pair
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
    return f"\\u{code:04x}"
