"""Who waits for whom, as the rows have it: what `cycles` is asked about. Reads only, in a transaction of others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.database.tables import IS_LIVE, IS_REQUEST, IS_START
from bgsupervisor.ledger.cycles import WaitEdge, cycle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bgsupervisor.database.store import Store

__all__ = ["WaitGraph", "parent_of", "parent_scope"]

IDS_AT_ONCE = 500
COMING_MAX = 10_000
"""More parties than this are not told apart from so many: a row may name any number."""


_PARENT = re.compile(r"parent (\d{1,18})", re.ASCII)


class WaitGraph:
    """Finds the cycle that a wait would close. Made by `Waits`, which shares its store."""

    def __init__(self, store: Store) -> None:
        tables = store.tables
        self._task, self._part, self._hold = tables.Task, tables.Part, tables.Hold
        self._wait, self._dependency, self._participant = tables.Wait, tables.Dependency, tables.Participant

    def cycle(self, id: int, slot_holders: Sequence[int] = ()) -> list[tuple[int, str]] | None:
        """Return the cycle that keeps a task from going on; *slot_holders* have all the slots, if those are taken."""
        edges: dict[int, list[WaitEdge]] = {}
        todo = {id}
        while todo:
            found = self._edges_of(todo, slot_holders)
            edges |= {one: found.pop(one, []) for one in todo} | found
            sources = {source for found in edges.values() for edge in found for source in edge.sources}
            todo = sources - edges.keys()
        return cycle(id, {id: found for id, found in edges.items() if found})

    def who_has_slots(self, slots: int) -> list[int]:
        """Return who has the slots if all are taken, else nobody: then one is free."""
        task = self._task
        holders = [id for (id,) in task.select(task.id).where(IS_START & task.slot.is_null(False)).tuples()]
        return holders if len(holders) >= slots else []

    def coming(self, row: dict[str, Any]) -> WaitEdge:
        """Return who can still come to a barrier of siblings: those of them that live, and whoever requests more."""
        task, participant = self._task, self._participant
        here = (participant.scope == row["scope"]) & (participant.name == row["name"]) & participant.outcome.is_null()
        arrived = {id for (id,) in participant.select(participant.task_id).where(here).tuples()}
        parent_id = parent_of(row["scope"])
        live = task.select(task.id).where(IS_LIVE & ((task.parent_id == parent_id) | (task.id == parent_id)))
        missing = min(max(row["parties"] - len(arrived), 0), COMING_MAX)
        sources = [id for (id,) in live.tuples() if id not in arrived and id != parent_id]
        if live.where(task.id == parent_id).exists():
            sources += [parent_id or 0] * missing  # it may request as many as are missing
        return WaitEdge(f'barrier "{row["name"]}", where {missing} more must come', sources, missing)

    # Within

    def _edges_of(self, ids: set[int], slot_holders: Sequence[int]) -> dict[int, list[WaitEdge]]:
        """Return what tasks need; of the others in the queues that they stand in as well."""
        dependency, edges = self._dependency, dict[int, list[WaitEdge]]()
        for row in [row for some in _chunks(ids) for row in self._waits_of(some)]:
            if row["kind"] == "lock":
                for id, found in self._queue(row["target"]).items():
                    edges[id] = found
            else:
                edges.setdefault(row["task_id"], []).extend(self._edges_by(row, slot_holders))
        for some in _chunks(ids):
            query = dependency.select(dependency.task_id, dependency.on_id).where(dependency.task_id.in_(some))
            for id, on_id in query.tuples():
                if id is not None and on_id is not None:  # else the row was written by hand, and means nothing
                    edges.setdefault(id, []).append(WaitEdge(f"the end of task {on_id}", (on_id,)))
            planned = self._task.select(self._task.id).where(IS_REQUEST & self._task.id.in_(some))
            for (id,) in planned.tuples() if slot_holders else ():
                edges.setdefault(id, []).append(_slot_edge(slot_holders))
        return edges

    def _waits_of(self, ids: list[int]) -> list[dict[str, Any]]:
        """Return the rows of bodies that wait as a whole, but for parts that are there: their waiter only sleeps."""
        wait, part = self._wait, self._part
        reached = part.select(part.id).where((part.task_id == wait.target_id) & (part.name == wait.target))
        still = (wait.kind != "part") | ~peewee.fn.EXISTS(reached)
        rows = wait.select().where(wait.task_id.in_(ids) & wait.whole & still).dicts()
        return [row for row in rows if row["kind"] not in ("part", "end") or row["target_id"] is not None]

    def _edges_by(self, row: dict[str, Any], slot_holders: Sequence[int]) -> list[WaitEdge]:
        if row["kind"] == "end":
            return [WaitEdge(f"the end of task {row['target_id']}", (row["target_id"],))]
        if row["kind"] == "part":
            return [WaitEdge(f'part "{row["target"]}" of task {row["target_id"]}', (row["target_id"],))]
        if row["kind"] == "slot" and slot_holders:
            return [_slot_edge(slot_holders)]
        if row["kind"] == "barrier":
            return self._edges_at_barrier(row)
        return []  # it comes by itself

    def _edges_at_barrier(self, row: dict[str, Any]) -> list[WaitEdge]:
        participant = self._participant
        mine = (
            (participant.task_id == row["task_id"])
            & (participant.name == row["target"])
            & participant.outcome.is_null()
        )
        places = [row for row in participant.select().where(mine).dicts() if row["parties"] is not None]
        if not places or parent_of(places[0]["scope"]) is None:
            return []  # it has opened, or who may come to it is not known
        return [self.coming(places[0])]

    def _queue(self, name: str) -> dict[int, list[WaitEdge]]:
        """Return what those need who wait for a lock: enough of its holders, and whoever stands before them."""
        hold, wait = self._hold, self._wait
        taken = hold.select(hold.task_id).where((hold.name == name) & hold.task_id.is_null(False))
        holders = sorted(id for (id,) in taken.tuples() if id is not None)
        queue = wait.select(wait.task_id, wait.permits, wait.whole).where((wait.kind == "lock") & (wait.target == name))
        edges: dict[int, list[WaitEdge]] = {}
        before: int | None = None
        for id, permits, whole in list(queue.order_by(wait.id).tuples()):
            if id is None:
                continue
            found = edges[id] = []
            missing = len(holders) - (permits or 1) + 1
            if whole and missing > 0:
                found.append(WaitEdge(f'lock "{name}", held by {_tasks(holders)}', holders, missing))
            if whole and before is not None:
                found.append(WaitEdge(f'lock "{name}", behind task {before}', (before,)))
            before = id
        return edges


def parent_scope(id: int) -> str:
    """Return the scope of the barriers of those that a task has requested."""
    return f"parent {id}"


def parent_of(scope: str) -> int | None:
    """Return the task whose children's barriers have this scope; None for a scope that the body has named."""
    found = _PARENT.fullmatch(scope)
    return int(found[1]) if found else None


def _slot_edge(slot_holders: Sequence[int]) -> WaitEdge:
    return WaitEdge("a slot, all of which are held by tasks that wait", slot_holders)


def _tasks(ids: Iterable[int]) -> str:
    return ", ".join(f"task {id}" for id in sorted(ids))


def _chunks(ids: Iterable[int]) -> Iterator[list[int]]:
    """Split ids for databases that take so many parameters at once."""
    rest = sorted(ids)
    for first in range(0, len(rest), IDS_AT_ONCE):
        yield rest[first : first + IDS_AT_ONCE]
