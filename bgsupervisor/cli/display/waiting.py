"""What waits for what, in words; reads no rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bgsupervisor.cli.display.output import to_json
from bgsupervisor.cli.display.text import duration, width
from bgsupervisor.sanitize import clean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from bgsupervisor.cli.display.rows import Cause

__all__ = ["WaitReason", "as_json", "fitting", "gathered", "tasks"]

NAMED = 3
"""The most tasks that are named one by one; more are counted."""


@dataclass(frozen=True, slots=True)
class WaitReason:
    """Causes of one kind and name: a wait for a part of seven tasks is one sentence."""

    kind: str
    name: str
    ids: tuple[int, ...]
    held_by: tuple[int, ...]
    since: datetime | None

    def what(self) -> str:
        """Return what it is: 'part "loaded" of task 5'."""
        if self.kind == "part":
            return f'part "{self.name}" of {tasks(self.ids)}'
        if self.kind == "end":
            return f"the end of {tasks(self.ids)}"
        if self.kind == "lock":
            return f'lock "{self.name}"' + (f", held by {tasks(self.held_by)}" if self.held_by else "")
        if self.kind == "barrier":
            return f'barrier "{self.name}"'
        if self.kind == "slot":
            return "a slot"
        more = f" and {len(self.ids) - 1} more" if len(self.ids) > 1 else ""
        return f"after task {self.ids[0]}{more}"

    def sentence(self) -> str:
        """Return what its task does: 'waits for part "loaded" of task 5'."""
        if self.kind == "after":
            return self.what()
        return f"waits {'at' if self.kind == 'barrier' else 'for'} {self.what()}"

    def age(self, *, now: datetime) -> str:
        """Return for how long, "" if that is not known."""
        return "" if self.since is None else duration((now - self.since).total_seconds())


def gathered(causes: Sequence[Cause]) -> list[WaitReason]:
    """Join causes of one kind and name, in their order."""
    found: dict[tuple[str, str], WaitReason] = {}
    for one in causes:
        key = one.kind, clean(one.name or "")
        ids = () if one.task_id is None else (one.task_id,)
        known = found.get(key)
        found[key] = WaitReason(*key, (known.ids if known else ()) + ids, one.held_by, one.since)
    return list(found.values())


def fitting(causes: Sequence[Cause], size: int | None, *, now: datetime) -> str:
    """Return what is waited for and since when; where *size* columns hold less, the least important is left out."""
    waits = gathered(causes)
    full = "; ".join(", ".join(filter(None, (wait.sentence(), wait.age(now=now)))) for wait in waits)
    shorter = "; ".join(wait.sentence() for wait in waits)
    for words in (full, shorter):
        if size is None or width(words) <= size:
            return words
    return "; ".join(wait.what() for wait in waits)


def tasks(ids: Sequence[int]) -> str:
    """Return tasks in words: task 5; tasks 5, 7; 12 tasks."""
    if len(ids) > NAMED:
        return f"{len(ids)} tasks"
    return f"task{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}"


def as_json(causes: Sequence[Cause]) -> list[dict[str, Any]] | None:
    """Return the causes as JSON has them, None if there are none."""
    return [
        {
            "kind": one.kind,
            "task_id": one.task_id,
            "name": one.name,
            "since": to_json(one.since),
            "held_by": list(one.held_by) if one.kind == "lock" else None,
        }
        for one in causes
    ] or None
