"""Tracebacks and stacks as people read them: with the frames of the application, and the innermost one."""

from __future__ import annotations

import itertools
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.cli.display.text import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bgsupervisor.config import Config

__all__ = ["FULL_HINT", "folded"]

FULL_HINT = "frames of libraries are folded, --full shows them"
NAMED = 3
"""The most libraries that are named in place of their frames; more are counted."""

_FRAME = re.compile(r'(?P<margin>[ |]*)File "(?P<path>[^"]+)", line (?:\d+|\?\?\?)(?P<comma>,?) in ')
"""Of a traceback, also within an exception group, or of faulthandler, which writes no comma."""
_REPEATED = re.compile(r"[ |]*\[Previous line repeated (\d+) more times?\]")
"""Python 3.11 writes it without the margin of its exception group."""
_PACKAGE = re.compile(r"/(?:site|dist)-packages/([^/]+?)(?:\.py)?(?:/|$)")
_STANDARD = re.compile(r"/lib(?:64)?/python3(?:\.\d+)?/")
_COMMAND = '  File "<string>", line 1 in <module>'
"""The frame in which faulthandler shows `python -c`, by which multiprocessing starts a process."""
_ENTRY = "__init__"
"""The file in a frame of faulthandler in Python 3.13 where the interpreter calls a class's constructor."""
_OURS = f"{Path(__file__).parents[2]}/"


@dataclass(frozen=True, slots=True)
class _Frame:
    """One frame with its lines; *library* names its owner, None is the application."""

    lines: list[str]
    margin: str
    library: str | None
    newest_first: bool

    def takes(self, line: str) -> bool:
        """Whether a line belongs to this frame: its source, the marks below it, or how often it was repeated."""
        return line.startswith(f"{self.margin}  ") or _REPEATED.fullmatch(line) is not None

    @property
    def is_frozen(self) -> bool:
        """Whether it is of a module that the interpreter has built in, such as the machinery of imports."""
        return '"<frozen ' in self.lines[0]

    @property
    def count(self) -> int:
        """How many frames it stands for, as recursion does."""
        again = _REPEATED.fullmatch(self.lines[-1])
        return 1 + (int(again[1]) if again else 0)


def folded(text: str, config: Config) -> str:
    """Return *text* with each run of library frames as one line; everything else stays as it is.

    A frame is the application's if its file lies below the configuration's folder or `python_path`, or anywhere else,
    but not in Python's library, in site-packages or in this package. A package in site-packages that holds one of
    the `tasks` is the application too. The innermost frame of each stack stays if it has a file.
    """
    shown: list[str] = []
    stack: list[_Frame] = []
    for line in text.splitlines():
        found = _FRAME.match(line)
        if found is not None:
            library = "Python's library" if line == _COMMAND else _library_of(found["path"], config)
            stack.append(_Frame([line], found["margin"], library, newest_first=not found["comma"]))
        elif stack and stack[-1].takes(line):
            stack[-1].lines.append(line)
        else:
            shown += [*_folded_stack(stack), line]
            stack = []
    return "\n".join([*shown, *_folded_stack(stack)])


def _folded_stack(stack: Sequence[_Frame]) -> Iterator[str]:
    if not stack:
        return
    innermost: _Frame | None = stack[0] if stack[0].newest_first else stack[-1]
    if innermost is not None and innermost.is_frozen:
        innermost = None  # of the import itself, without a line of source: it shows nothing
    for is_folded, some in itertools.groupby(stack, lambda one: one.library is not None and one is not innermost):
        frames = list(some)
        if not is_folded:
            yield from itertools.chain.from_iterable(one.lines for one in frames)
            continue
        count = sum(one.count for one in frames)
        names = listed(list(dict.fromkeys(one.library or "" for one in frames)), most=NAMED)
        yield f"{frames[0].margin}... {count} frame{'s' * (count > 1)} in {names} ..."


def _library_of(path: str, config: Config) -> str | None:
    if path.startswith("<frozen ") or path == _ENTRY:
        return "Python's library"
    if path.startswith(_OURS):
        return "bgsupervisor"
    for root in (*config.python_path, str(config.base_dir)):
        if path.startswith(f"{root}/"):
            path = path.removeprefix(root)
            break
    package = _PACKAGE.search(path)
    if package is not None:
        is_own = package[1] in {module.partition(".")[0] for module in config.tasks}
        return None if is_own else f"site-packages/{package[1]}"
    is_standard = _STANDARD.search(path) or path.startswith(f"{sysconfig.get_path('stdlib')}/")
    return "Python's library" if is_standard else None
