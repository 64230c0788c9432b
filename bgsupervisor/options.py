"""An option of the configuration: its kind of value, its limits and how it is written."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Option", "option", "variable_of"]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
_T = TypeVar("_T")


def _text(pattern: str) -> Callable[[object], str]:
    """Return a check that lets through only text that matches *pattern* as a whole."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return check


def _texts(pattern: str) -> Callable[[object], tuple[str, ...]]:
    """Return a check that lets through only lists of text that matches *pattern*."""
    check = _text(pattern)

    def check_all(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(check(item) for item in value)

    return check_all


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _size(value: object) -> int:
    if not isinstance(value, str):
        return _count(value)
    match = re.fullmatch(r"([0-9]{1,15}) ?(KiB|MiB|GiB)?", value.strip())
    if not match:
        raise ValueError
    return int(match[1]) * {None: 1, "KiB": KIB, "MiB": MIB, "GiB": GIB}[match[2]]


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _path(value: object) -> Path:
    return Path(_text(_NOT_EMPTY)(os.fspath(value) if isinstance(value, os.PathLike) else value))


def _split(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


class _Kind(NamedTuple):
    """A kind of value: how to name it in a sentence, how to check it, how to read it from text."""

    expected: str
    check: Callable[[object], object]
    parse: Callable[[str], object] = str


_SWITCHES = {"true": True, "on": True, "1": True, "yes": True, "false": False, "off": False, "0": False, "no": False}
_NOT_EMPTY = r"[^\0]+"
MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
KINDS = {
    "text": _Kind("text that is not empty", _text(_NOT_EMPTY)),
    "url": _Kind("an address such as sqlite:///bgsupervisor.db", _text(_NOT_EMPTY)),
    "prefix": _Kind(
        "at most 32 letters, digits and underscores, no digit first", _text(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
    ),
    "callable": _Kind('a function as "package.module:name"', _text(f"{MODULE}:{MODULE}")),
    "method": _Kind('"fork" or "spawn"', _text("fork|spawn")),
    "modules": _Kind('a list of modules such as "myapp.tasks"', _texts(MODULE), _split),
    "path": _Kind("a path", _path),
    "paths": _Kind("a list of paths", _texts(_NOT_EMPTY), _split),
    "count": _Kind("a whole number", _count, int),
    "seconds": _Kind("a number of seconds", _number, float),
    "ending": _Kind('"leave", "drain" or "kill"', _text("leave|drain|kill")),
    "answer": _Kind('"warn", "refuse" or "accept"', _text("warn|refuse|accept")),
    "switch": _Kind("true or false", _switch, _SWITCHES.__getitem__),
    "days": _Kind("a number of days", _number, float),
    "bytes": _Kind('a size such as 1048576 or "1 MiB"', _size),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One key of the configuration.

    Attributes:
        name: The key; a name that ends in _s is in seconds, in _bytes in bytes.
        type: The kind of its value, a word such as "count", "seconds" or "path".
        default: As written in a file; paths are not absolute yet.
        help: One sentence.
        minimum: The least that is allowed, None where there is no order.
        maximum: The most that is allowed.
        example: The value in the template where there is no default.
    """

    name: str
    type: str
    default: object
    help: str
    minimum: float | None = None
    maximum: float | None = None
    example: object = None

    @property
    def unit(self) -> str:
        """Return "seconds", "days", "bytes" or "" where the value has no unit."""
        return self.type if self.type in {"seconds", "days", "bytes"} else ""

    @property
    def variable(self) -> str:
        """Return the name of the environment variable."""
        return variable_of(self.name)

    @property
    def expected(self) -> str:
        """Return the allowed values as words, such as "a whole number from 1 to 1000"."""
        expected = KINDS[self.type].expected
        if self.minimum is None or self.maximum is None:
            return expected
        return f"{expected} from {self._written(self.minimum)} to {self._written(self.maximum)}"

    @property
    def default_text(self) -> str:
        """Return the default as a file would have it, "" where there is none."""
        return "" if self.default is None else self._literal(self.default)

    @property
    def example_text(self) -> str:
        """Return what the template shows, as a file would have it."""
        return self._literal(self.default if self.example is None else self.example)

    def _literal(self, value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return "[" + ", ".join(f'"{item}"' for item in value) + "]"
        written = self._written(value)
        return written if re.fullmatch(r"[0-9.]+", written) else f'"{written}"'

    def _written(self, value: object) -> str:
        """Return *value* as people write it: 10, 0.5, 1 MiB."""
        if not isinstance(value, int | float):
            return str(value)
        if self.type == "bytes":
            for size_bytes, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
                if value >= size_bytes and value % size_bytes == 0:
                    return f"{value // size_bytes} {unit}"
        return str(value).removesuffix(".0")


def option(
    type: str,
    default: _T,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    example: object = None,
) -> _T:
    """Return a dataclass field that is a row of OPTIONS as well."""
    facts = {"type": type, "help": help, "minimum": minimum, "maximum": maximum, "example": example}
    return field(default=default, metadata=facts)


def variable_of(key: str) -> str:
    """Return the environment variable of a key."""
    return f"BGSUPERVISOR_{key.upper()}"
