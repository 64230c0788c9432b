"""`bgsupervisor ps --tree`: live tasks, and all they lead to, each under the task that requested or awaits it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bgsupervisor.cli.display import columns
from bgsupervisor.cli.display.explain import hindrance, waits_to_start
from bgsupervisor.cli.display.rows import Ties
from bgsupervisor.cli.display.table import DROPPED, Column, terminal_columns
from bgsupervisor.cli.display.text import duration
from bgsupervisor.sanitize import clean
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bgsupervisor.cli.display.rows import Cause, Rows
    from bgsupervisor.cli.display.snapshot import Snapshot
    from bgsupervisor.ledger.records import TaskRecord

__all__ = ["NARROWING", "Tree", "tree_columns"]

TASKS_MAX = 1000
"""The most tasks that are drawn."""

NARROWING = (
    ("PROGRESS", 10),
    ("WHY", 30),
    ("TASK", 24),
    ("PROGRESS", DROPPED),
    ("WHY", 20),
    ("TIME", DROPPED),
    ("TASK", 12),
    ("WHY", DROPPED),
)
"""Order in which columns shrink on a narrow terminal, and to which width."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Tasks, and under which of them each is drawn.

    Attributes:
        records: All that are drawn, by id, in the order in which neighbours stand.
        causes: What they wait for, by id.
        above: The task under which each is drawn; those at the left edge are missing here.
    """

    records: Mapping[int, TaskRecord]
    causes: Mapping[int, Sequence[Cause]]
    above: Mapping[int, int]

    @classmethod
    def grow(cls, rows: Rows, live: Sequence[TaskRecord]) -> Tree:
        """Add to live tasks their parents, live children and whatever they wait for, and to those in turn."""
        everything = dataclasses.replace(rows, name=None, key=None, statuses=frozenset(Status))
        records = {record.id: record for record in live}
        causes: dict[int, Sequence[Cause]] = {}
        fresh = list(records.values())
        while fresh:
            found = Ties(rows.store).causes(fresh)
            causes |= found
            wanted = {record.parent_id for record in fresh if record.parent_id is not None}
            wanted |= {id for some in found.values() for one in some for id in one.leads_to}
            left = max(0, TASKS_MAX - len(records))
            more = everything.of(sorted(wanted - records.keys())[:left])
            more += everything.live_children([record.id for record in fresh], limit=left)
            fresh = [record for record in {one.id: one for one in more}.values() if record.id not in records]
            records |= {record.id: record for record in fresh}
        return cls(records, causes, _above(records, causes))

    def lines(self) -> Iterator[tuple[str, TaskRecord]]:
        """Yield the tasks from top to bottom, each with what is drawn before its number."""
        below: dict[int, list[int]] = {}
        for id in self.records:
            if id in self.above:
                below.setdefault(self.above[id], []).append(id)
        # What is still to be drawn: a task, its own branch, and what stands before those below it.
        todo = [(id, "", "") for id in reversed(list(self.records)) if id not in self.above]
        while todo:
            id, branch, indent = todo.pop()
            yield branch, self.records[id]
            ids = below.get(id, [])
            for one in reversed(ids):
                is_last = one == ids[-1]
                todo.append((one, indent + ("└─ " if is_last else "├─ "), indent + ("   " if is_last else "│  ")))

    def owed(self, id: int) -> Cause | None:
        """Return what the task above still waits for from this one."""
        for one in self.causes.get(self.above.get(id, 0), ()):
            if id in one.leads_to:
                return one
        return None


def _above(records: Mapping[int, TaskRecord], causes: Mapping[int, Sequence[Cause]]) -> dict[int, int]:
    """Return under which task each is drawn: its parent, else one that waits for it, else one that comes after it."""
    above: dict[int, int] = {}

    def put(id: int, under: int) -> None:
        if id in above or id not in records or under not in records:
            return
        one: int | None = under
        while one is not None:
            if one == id:
                return  # a child may wait for its parent
            one = above.get(one)
        above[id] = under

    for record in records.values():
        if record.parent_id is not None:
            put(record.id, record.parent_id)
    for wanted in (False, True):
        for id in sorted(causes):
            for one in causes[id]:
                if (one.kind == "after") is wanted:
                    for source in one.leads_to:
                        put(source, id)
    return above


def tree_columns(tree: Tree, snapshot: Snapshot) -> list[Column]:
    """Return the columns of the tree: the task, what it waits for or owes, since when, and how far it is."""
    lines = list(tree.lines())
    records = [record for _, record in lines]
    names = columns.short_names(records)
    keys = [f" {clean(record.key)}" if record.key else "" for record in records]
    drawn = [f"{branch}{one.id} {name}{key}" for (branch, one), name, key in zip(lines, names, keys, strict=True)]
    styles = [columns.STYLES[record.status] for record in records]
    bar_columns = columns.SMALL_BAR_COLUMNS if terminal_columns() is not None else 0
    return [
        Column("TASK", drawn, always=True),
        Column("STATUS", [record.status.value for record in records], styles=styles, always=True),
        Column("WHY", [_why(record, tree, snapshot) for record in records]),
        Column("TIME", [_time(record, snapshot) for record in records], right=True),
        Column("PROGRESS", ["" if record.ended else columns.advance(record, bar_columns) for record in records]),
    ]


def _why(record: TaskRecord, tree: Tree, snapshot: Snapshot) -> str:
    if record.ended:
        return columns.ended(record, snapshot, with_reason=True)
    if record.status is Status.REQUEST:
        return waits_to_start(record, snapshot) or _place(record, snapshot)
    waits = snapshot.waits(record)
    if waits:
        return "; ".join(wait.sentence() for wait in waits)
    owed, noted = tree.owed(record.id), hindrance(record, snapshot)
    if noted or owed is None:
        return noted
    name = clean(owed.name or "")
    return {"lock": f'holds lock "{name}"', "part": f'part "{name}" not reached'}.get(owed.kind, "")


def _place(record: TaskRecord, snapshot: Snapshot) -> str:
    slots = snapshot.supervisors.slots
    if slots and snapshot.busy >= slots:
        return f"slots full ({snapshot.busy} of {slots})"
    return f"position {snapshot.positions[record.id]}" if record.id in snapshot.positions else ""


def _time(record: TaskRecord, snapshot: Snapshot) -> str:
    """Return since when it waits, or else how long it has run or ran."""
    since = [wait.since for wait in snapshot.causes.get(record.id, ()) if wait.since is not None]
    runtime_s = (snapshot.now - min(since)).total_seconds() if since else snapshot.runtime_s(record)
    return "" if runtime_s is None else duration(runtime_s)
