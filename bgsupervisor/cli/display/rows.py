"""Which tasks a listing shows, in which order, and what ties them; rows without what may be large.

What may be large are data, results, tracebacks and stacks. Only reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from bgsupervisor.database.tables import IS_REQUEST, IS_START
from bgsupervisor.ledger.records import TaskRecord
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from datetime import datetime

    from bgsupervisor.database.store import Store
    from bgsupervisor.service import Service

__all__ = ["HEAVY", "Cause", "Rows", "Ties", "columns_of"]

HEAVY = ("data", "result", "error", "stack")
"""The columns that listings leave out."""
POSITIONS_MAX = 1000
"""Waiting tasks further back are shown without their position."""
PRIORITIES_MAX = 1000
"""So many different priorities of waiting tasks are gone through."""
NAMES_MAX = 1000
"""So many different names are looked through for a short one."""
IDS_AT_ONCE = 1000
"""SQLite takes a limited number of parameters."""


def columns_of(record: TaskRecord, service: Service) -> dict[str, Any]:
    """Return a task's columns, in the order of the table."""
    meta = service.ledger.store.tables.Task._meta  # noqa: SLF001 - Peewee's documented place for fields
    return {name: getattr(record, name) for name in meta.sorted_field_names}


@dataclass(frozen=True, slots=True)
class Cause:
    """One thing that keeps a task from going on, or from starting.

    Attributes:
        kind: What a running body waits for: "part", "end", "lock", "barrier" or "slot"; "after" is a task that must
            end before a waiting one starts.
        task_id: Whose part or end it is.
        name: Of the part, the lock or the barrier.
        since: When the waiting began; None for "after".
        held_by: The tasks that hold the lock, in order of id.
    """

    kind: str
    task_id: int | None = None
    name: str | None = None
    since: datetime | None = None
    held_by: tuple[int, ...] = ()

    @property
    def leads_to(self) -> tuple[int, ...]:
        """The tasks that can bring it about."""
        return self.held_by if self.task_id is None else (self.task_id,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The tasks of a store that match all that is given, read when a method is called.

    The records have empty `data`, and neither `result`, `error` nor `stack`. Every method raises DatabaseError or
    AccessError if the database cannot be used.
    """

    store: Store
    now: datetime
    statuses: frozenset[Status] = frozenset(Status)
    name: str | None = None
    key: str | None = None

    def live(self, limit: int) -> list[TaskRecord]:
        """Return what runs, in order of id, then what waits, in the order in which it will start."""
        found: list[TaskRecord] = []
        if Status.START in self.statuses:
            found += self._select(IS_START, order=[self._task.id], limit=limit)
        if Status.REQUEST in self.statuses:
            found += self._due(limit - len(found))
            found += self._later(limit - len(found))
        return found

    def ended(self, limit: int) -> list[TaskRecord]:
        """Return what ended last, the latest first."""
        if not self.statuses & {Status.DONE, Status.INTERRUPTED}:
            return []
        task = self._task
        statuses = task.status.in_([status.value for status in self.statuses])
        return self._select(task.ended_at.is_null(False), statuses, order=[task.ended_at.desc()], limit=limit)

    def newest(self, limit: int) -> list[TaskRecord]:
        """Return all, the newest first."""
        task = self._task
        wanted = [] if len(self.statuses) == len(Status) else [task.status.in_([one.value for one in self.statuses])]
        return self._select(*wanted, order=[task.id.desc()], limit=limit)

    def of(self, ids: Iterable[int]) -> list[TaskRecord]:
        """Return the tasks with these ids that there are, in order of id."""
        wanted = sorted(set(ids))
        return [
            record
            for some in _chunks(wanted)
            for record in self._select(self._task.id.in_(some), order=[self._task.id], limit=IDS_AT_ONCE)
        ]

    def live_children(self, ids: Iterable[int], *, limit: int) -> list[TaskRecord]:
        """Return the running and waiting tasks that one of these requested, at most *limit*."""
        task, found = self._task, list[TaskRecord]()
        for some in _chunks(sorted(set(ids))):
            for status in (IS_START, IS_REQUEST):
                mine = task.parent_id.in_(some)
                found += self._select(status, mine, order=[task.id], limit=limit - len(found))
        return found

    def children(self, id: int, *, limit: int) -> list[TaskRecord]:
        """Return the tasks that this one requested, whatever became of them; at most *limit*, the oldest first."""
        task = self._task
        return self._select(task.id > id, task.parent_id == id, order=[task.id], limit=limit)  # no index has parents

    def busy(self) -> int:
        """Return how many slots are taken."""
        task = self._task
        with self.store.connected():
            return int(task.select(peewee.fn.COUNT(task.id)).where(IS_START & task.slot.is_null(False)).scalar())

    def positions(self) -> dict[int, int]:
        """Return the place of the tasks that may start, 1 is next; of all, whatever these rows are limited to.

        Tasks that must come after others have no place yet.
        """
        task, dependency = self._task, self.store.tables.Dependency
        after = dependency.select(dependency.id).where(dependency.task_id == task.id)
        found: list[int] = []
        with self.store.connected():
            for priority in self._priorities():
                query = task.select(task.id).where(
                    IS_REQUEST & (task.priority == priority) & (task.run_at <= self.now) & ~peewee.fn.EXISTS(after)
                )
                query = query.order_by(task.run_at, task.id).limit(POSITIONS_MAX - len(found))
                found += [id for (id,) in query.tuples()]
                if len(found) >= POSITIONS_MAX:
                    break
        return {id: place for place, id in enumerate(found, start=1)}

    @property
    def _task(self) -> Any:  # noqa: ANN401 - a Peewee class, made at run time
        return self.store.tables.Task

    def _due(self, limit: int) -> list[TaskRecord]:
        task = self._task
        found: list[TaskRecord] = []
        with self.store.connected():
            for priority in self._priorities():
                if len(found) >= limit:
                    break
                is_due = IS_REQUEST & (task.priority == priority) & (task.run_at <= self.now)
                found += self._select(is_due, order=[task.run_at, task.id], limit=limit - len(found))
        return found

    def _later(self, limit: int) -> list[TaskRecord]:
        task = self._task
        order = [task.run_at, task.priority.desc(), task.id]
        return self._select(IS_REQUEST & (task.run_at > self.now), order=order, limit=limit)

    def _priorities(self) -> Iterator[object]:
        """Yield the priorities of what waits as rows hold them, the highest first: each is a range of an index."""
        task = self._task
        highest = task.select(peewee.fn.MAX(task.priority).coerce(False)).where(IS_REQUEST)
        query = highest
        for _ in range(PRIORITIES_MAX):  # after what is no valid text nothing can be said to come
            if (priority := query.scalar()) is None:
                return
            yield priority
            query = highest.where(task.priority < priority)

    def _select(self, *conditions: Any, order: Sequence[Any], limit: int) -> list[TaskRecord]:  # noqa: ANN401 - Peewee's
        if limit <= 0:
            return []
        task = self._task
        light = [column for column in task._meta.sorted_fields if column.name not in HEAVY]  # noqa: SLF001 - documented
        with self.store.connected():
            query = task.select(*light)
            for condition in (*conditions, *self._filters()):
                query = query.where(condition)
            rows = self.store.raw(query.order_by(*order).limit(limit))
        return [TaskRecord.from_row({**row, **dict.fromkeys(HEAVY), "data": ""}) for row in rows]

    def _filters(self) -> list[Any]:
        task = self._task
        filters = []
        if self.name is not None:
            filters.append(task.name.in_([self.name, *self.full_names(self.name)]))
        if self.key is not None:
            filters.append(task.key == self.key)
        return filters

    def full_names(self, short: str) -> list[str]:
        """Return the names of the tasks in the rows whose part after the colon is *short*, in their order."""
        return [name for name in self.all_names() if name.partition(":")[2] == short]

    def all_names(self) -> list[str]:
        """Return the names that tasks in the rows have, in their order, at most NAMES_MAX."""
        task, found = self._task, list[str]()
        with self.store.connected():
            name = task.select(peewee.fn.MIN(task.name)).scalar()
            while name is not None and len(found) < NAMES_MAX:
                if found and name <= found[-1]:  # it is no valid text, so that nothing can be said to come after it
                    names = task.select(task.name).distinct().limit(NAMES_MAX)
                    return sorted({name for (name,) in names.tuples() if name is not None})
                found.append(name)
                name = task.select(peewee.fn.MIN(task.name)).where(task.name > name).scalar()
        return found


class Ties:
    """What ties the tasks of a store to each other. Errors as `Rows`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def causes(self, records: Iterable[TaskRecord]) -> dict[int, list[Cause]]:
        """Return what the live ones of these tasks wait for, by id; a few queries, however many tasks they are."""
        found: dict[int, list[Cause]] = {}
        live = [(record.id, record.status) for record in records if not record.ended]
        rows = self._waits([id for id, status in live if status is Status.START])
        holders = self._holders({row["target"] for row in rows if row["kind"] == "lock" and row["target"] is not None})
        there = self._there(rows)
        for row in rows:
            one = Cause(row["kind"], row["target_id"], row["target"], row["since"], holders.get(row["target"], ()))
            if row["kind"] != "lock":
                one = Cause(one.kind, one.task_id, one.name, one.since)
            if (one.kind, one.task_id, one.name) not in there:
                found.setdefault(row["task_id"], []).append(one)
        for id, on_id in self._dependencies([id for id, status in live if status is Status.REQUEST]):
            found.setdefault(id, []).append(Cause("after", on_id))
        return found

    def parts(self, id: int) -> list[dict[str, Any]]:
        """Return the parts that a task has reached, in that order: name, value (JSON text), reached_at."""
        part = self._store.tables.Part
        query = part.select(part.name, part.value, part.reached_at).where(part.task_id == id)
        return [one for one in self._dicts(query.order_by(part.reached_at, part.id)) if one["reached_at"] is not None]

    def holds(self, id: int) -> list[dict[str, Any]]:
        """Return the permits that a task holds, the oldest first: name, permit, since."""
        hold = self._store.tables.Hold
        query = hold.select(hold.name, hold.permit, hold.since).where(hold.task_id == id)
        return [one for one in self._dicts(query.order_by(hold.since, hold.id)) if one["since"] is not None]

    def dependencies(self, id: int) -> list[dict[str, Any]]:
        """Return what a task must still come after: on_id, and any_end where the other may also be interrupted."""
        dependency = self._store.tables.Dependency
        query = dependency.select(dependency.on_id, dependency.any_end).where(dependency.task_id == id)
        return [one for one in self._dicts(query.order_by(dependency.id)) if one["on_id"] is not None]

    def arrived(self, id: int, name: str) -> tuple[int, int] | None:
        """Return how many are at the barrier at which a task waits, and how many must be; None if it is open."""
        participant = self._store.tables.Participant
        own = self._dicts(
            participant.select().where(
                (participant.task_id == id) & (participant.name == name) & participant.outcome.is_null()
            )
        )
        if not own or own[-1]["generation"] is None or own[-1]["parties"] is None:
            return None
        same = (
            (participant.scope == own[-1]["scope"])
            & (participant.name == name)
            & (participant.generation == own[-1]["generation"])
        )
        with self._store.connected():
            return int(participant.select().where(same).count()), int(own[-1]["parties"])

    def _waits(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        wait = self._store.tables.Wait
        return [
            row
            for some in _chunks(ids)
            for row in self._dicts(wait.select().where(wait.task_id.in_(some)).order_by(wait.id))
            if row["kind"] in ("lock", "barrier", "slot")
            or (row["kind"] in ("part", "end") and row["target_id"] is not None)
        ]

    def _holders(self, names: Collection[str]) -> dict[str, tuple[int, ...]]:
        hold, found = self._store.tables.Hold, dict[str, tuple[int, ...]]()
        for some in _chunks(sorted(names)):
            query = hold.select(hold.name, hold.task_id).where(hold.name.in_(some) & hold.task_id.is_null(False))
            for row in self._dicts(query.order_by(hold.task_id)):
                if row["task_id"] is None:
                    continue
                found[row["name"]] = (*found.get(row["name"], ()), row["task_id"])
        return found

    def _there(self, rows: Sequence[dict[str, Any]]) -> set[tuple[str, int, str | None]]:
        """Return what has come about of all that is waited for: a task that waits for seven may lack one only."""
        part, task = self._store.tables.Part, self._store.tables.Task
        there: set[tuple[str, int, str | None]] = set()
        for some in _chunks(sorted({row["target_id"] for row in rows if row["kind"] == "part"})):
            query = part.select(part.task_id, part.name).where(part.task_id.in_(some))
            there |= {("part", row["task_id"], row["name"]) for row in self._dicts(query)}
        for some in _chunks(sorted({row["target_id"] for row in rows if row["kind"] == "end"})):
            query = task.select(task.id).where(task.id.in_(some) & task.ended_at.is_null(False))
            there |= {("end", row["id"], None) for row in self._dicts(query)}
        return there

    def _dependencies(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        dependency = self._store.tables.Dependency
        for some in _chunks(ids):
            query = dependency.select(dependency.task_id, dependency.on_id).where(dependency.task_id.in_(some))
            for row in self._dicts(query.order_by(dependency.id)):
                if row["on_id"] is not None:
                    yield row["task_id"], row["on_id"]

    def _dicts(self, query: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a Peewee query
        with self._store.connected():
            return list(query.dicts())


T = TypeVar("T")


def _chunks(values: Sequence[T]) -> Iterator[list[T]]:
    for start in range(0, len(values), IDS_AT_ONCE):
        yield list(values[start : start + IDS_AT_ONCE])
