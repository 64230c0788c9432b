"""`bgsupervisor ps --tree`: live tasks, and all they lead to, drawn under who requested them or waits for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bgsupervisor.cli.display import columns, waiting
from bgsupervisor.cli.display.rows import Ties
from bgsupervisor.cli.display.table import DROPPED, Column, terminal_columns
from bgsupervisor.cli.display.text import age, duration
from bgsupervisor.sanitize import clean
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bgsupervisor.cli.display.rows import Cause, Rows
    from bgsupervisor.ledger.records import TaskRecord

__all__ = ["NARROWING", "Tree", "columns"]

TASKS_MAX = 1000
"""Once there are so many tasks no more are looked for."""

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
"""What gives way on a narrow terminal."""


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
        """Return what the task above waits for and has not got from this one."""
        for one in self.causes.get(self.above.get(id, 0), ()):
            if id in one.leads_to:
                return one
        return None


def _above(records: Mapping[int, TaskRecord], causes: Mapping[int, Sequence[Cause]]) -> dict[int, int]:
    """Return under which task each is drawn: its parent, else who waits for it, else who comes after it."""
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


def tree_columns(tree: Tree, facts: columns.Facts, *, busy: int) -> list[Column]:
    """Return the columns of the tree: who, what it waits for or owes, since when, and how far it is."""
    lines = list(tree.lines())
    records = [record for _, record in lines]
    names = columns.short_names(records)
    keys = [f" {clean(record.key)}" if record.key else "" for record in records]
    bar_columns = columns.SMALL_BAR_COLUMNS if terminal_columns() is not None else 0
    return [
        Column(
            "TASK",
            [
                f"{branch}{record.id} {name}{key}"
                for (branch, record), name, key in zip(lines, names, keys, strict=True)
            ],
            always=True,
        ),
        Column(
            "STATUS",
            [record.status.value for record in records],
            styles=[columns.STYLES[record.status] for record in records],
            always=True,
        ),
        Column("WHY", [_why(record, tree, facts, busy) for record in records]),
        Column("TIME", [_time(record, tree, facts) for record in records], right=True),
        Column("PROGRESS", ["" if record.ended else columns.advance(record, bar_columns) for record in records]),
    ]


def _why(record: TaskRecord, tree: Tree, facts: columns.Facts, busy: int) -> str:
    needs = waiting.gathered(tree.causes.get(record.id, ()))
    if record.ended:
        return columns.ended(record, facts, with_reason=True)
    if needs and record.status is Status.START:
        return "; ".join(one.sentence() for one in needs)
    if record.status is Status.REQUEST:
        return _why_not_started(record, needs, facts, busy)
    owed, stands = tree.owed(record.id), facts.suspension(record) or facts.silence(record)
    if stands or owed is None:
        return stands
    if owed.kind == "lock":
        return f'holds lock "{clean(owed.name or "")}"'
    return f'part "{clean(owed.name or "")}" not reached' if owed.kind == "part" else ""


def _why_not_started(record: TaskRecord, needs: Sequence[waiting.WaitReason], facts: columns.Facts, busy: int) -> str:
    if facts.watch.lacks(record.name):
        return "code missing"
    words = [f"due {age(record.run_at, now=facts.now)}"] if record.run_at > facts.now else []
    words += [one.what() for one in needs]
    slots = sum(one.slots for one in facts.watch.alive)
    if not words and slots and busy >= slots:
        return f"slots full ({busy} of {slots})"
    if not words and record.id in facts.positions:
        return f"position {facts.positions[record.id]}"
    return ", ".join(words)


def _time(record: TaskRecord, tree: Tree, facts: columns.Facts) -> str:
    """Return since when it waits, or else how long it has run or ran."""
    since = [one.since for one in tree.causes.get(record.id, ()) if one.since is not None]
    if since:
        return duration((facts.now - min(since)).total_seconds())
    runtime_s = facts.runtime_s(record)
    return "" if runtime_s is None else duration(runtime_s)
