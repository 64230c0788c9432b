"""What the demo has to do: which packages make one task, and how long all of them will take."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING

from tasks import NOT_PARSABLE, is_indexed, parse, python_files

if TYPE_CHECKING:
    from pathlib import Path

GROUPS = 32
"""A package of more than one part in so many of all bytes is a task of its own."""
FILES_MAX = 50_000
WATCH_S = 20.0
"""Intended duration of all tasks together, in seconds, so that they can be watched."""
PASSES_MAX = 50
SAMPLE_S = 0.5
CROWDED = 1.4
"""16 processes on few cores take so much longer for the same work (caches, task switches); measured on 2 cores."""
NAME_CHARS = 20


class NothingToIndex(Exception):
    """A folder with no Python file, or with too many; the message says so."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Top-level packages and modules that one task indexes."""

    name: str
    names: list[str]
    files: int
    size_bytes: int


def groups_of(root: Path, *, leave_out: frozenset[str] = frozenset()) -> list[Group]:
    """Return about two dozen groups, the largest first: big packages alone, small ones and modules together."""
    entries = []
    total_files = 0
    for path in sorted(root.iterdir()):
        hidden = path.name in leave_out or not is_indexed(path)
        sizes = [] if hidden else [file.stat().st_size for file in python_files(path)]
        if sizes:
            entries.append(Group(path.name.removesuffix(".py")[:NAME_CHARS], [path.name], len(sizes), sum(sizes)))
        total_files += len(sizes)
        if total_files > FILES_MAX:
            raise NothingToIndex(f"{root} holds more than {FILES_MAX:,} Python files; choose a smaller folder")
    if not entries:
        raise NothingToIndex(f"{root} holds no Python file; choose another folder")
    limit_bytes = sum(entry.size_bytes for entry in entries) / GROUPS
    groups = [entry for entry in entries if entry.size_bytes >= limit_bytes]
    gathered: list[Group] = []
    for entry in entries:
        if entry.size_bytes < limit_bytes:
            gathered.append(entry)
        if gathered and (entry is entries[-1] or sum(one.size_bytes for one in gathered) >= limit_bytes):
            groups.append(_together(gathered))
            gathered = []
    return sorted(groups, key=lambda group: -group.size_bytes)


def _together(entries: list[Group]) -> Group:
    first, last = entries[0].name, entries[-1].name
    return Group(
        name=first if len(entries) == 1 else f"{first}..{last}",
        names=[name for entry in entries for name in entry.names],
        files=sum(entry.files for entry in entries),
        size_bytes=sum(entry.size_bytes for entry in entries),
    )


def plan(root: Path, groups: list[Group]) -> tuple[int, float]:
    """Return how often each file is parsed, and about how many seconds all tasks take together with that."""
    files = [file for group in groups for name in group.names for file in python_files(root / name)]
    spent_s = parsed_bytes = 0.0
    for file in files[:: max(1, len(files) // 100)]:
        content = file.read_bytes()
        with contextlib.suppress(*NOT_PARSABLE):
            spent_s += parse(content, file.name)[1]
            parsed_bytes += len(content)
        if spent_s > SAMPLE_S:
            break
    one_byte_s = spent_s / max(parsed_bytes, 1)
    all_bytes = sum(group.size_bytes for group in groups)
    one_pass_s = CROWDED * one_byte_s * max(groups[0].size_bytes, all_bytes / len(os.sched_getaffinity(0)))
    passes = round(WATCH_S / one_pass_s) if one_pass_s else PASSES_MAX
    passes = min(max(passes, 1), PASSES_MAX)
    return passes, passes * one_pass_s
