"""Which tasks a listing shows, in which order; rows without their data, results and tracebacks, which may be large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.models import TaskRecord
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from bgsupervisor.models import Store
    from bgsupervisor.service import Service

__all__ = ["HEAVY", "Rows", "columns_of"]

HEAVY = ("data", "result", "error")
"""The columns that listings leave out."""
POSITIONS_MAX = 1000
"""Waiting tasks further back are shown without their position."""
NAMES_MAX = 1000
"""So many different names are looked through for a short one."""

# Literals: SQLite uses a partial index only where it can see that the query implies the index's condition.
_IS_START = peewee.SQL("\"status\" = 'START'")
_IS_REQUEST = peewee.SQL("\"status\" = 'REQUEST'")


def columns_of(record: TaskRecord, service: Service) -> dict[str, Any]:
    """Return a task's columns, in the order of the table."""
    meta = service.ledger.store.tables.Task._meta  # noqa: SLF001 - Peewee's documented place for fields
    return {name: getattr(record, name) for name in meta.sorted_field_names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The tasks of a store that match all that is given, read when a method is called.

    The records have empty `data`, and neither `result` nor `error`. Every method raises DatabaseError or
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
            found += self._select(_IS_START, order=[self._task.id], limit=limit)
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

    def positions(self) -> dict[int, int]:
        """Return the place of the tasks that are due, 1 is next; of all tasks, whatever these rows are limited to."""
        task = self._task
        found: list[int] = []
        with self.store.connected():
            for priority in self._priorities():
                query = task.select(task.id).where(
                    _IS_REQUEST & (task.priority == priority) & (task.run_at <= self.now)
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
                is_due = _IS_REQUEST & (task.priority == priority) & (task.run_at <= self.now)
                found += self._select(is_due, order=[task.run_at, task.id], limit=limit - len(found))
        return found

    def _later(self, limit: int) -> list[TaskRecord]:
        task = self._task
        order = [task.run_at, task.priority.desc(), task.id]
        return self._select(_IS_REQUEST & (task.run_at > self.now), order=order, limit=limit)

    def _priorities(self) -> Iterator[int]:
        """Yield the priorities of what waits, the highest first: each is a range of an index."""
        task = self._task
        query = task.select(peewee.fn.MAX(task.priority)).where(_IS_REQUEST)
        while (priority := query.scalar()) is not None:
            yield int(priority)
            query = task.select(peewee.fn.MAX(task.priority)).where(_IS_REQUEST & (task.priority < priority))

    def _select(self, *conditions: Any, order: Sequence[Any], limit: int) -> list[TaskRecord]:  # noqa: ANN401 - Peewee's
        if limit <= 0:
            return []
        task = self._task
        light = [column for column in task._meta.sorted_fields if column.name not in HEAVY]  # noqa: SLF001 - documented
        with self.store.connected():
            query = task.select(*light)
            for condition in (*conditions, *self._filters()):
                query = query.where(condition)
            rows = list(query.order_by(*order).limit(limit).dicts())
        return [TaskRecord.from_row({**row, "data": "", "result": None, "error": None}) for row in rows]

    def _filters(self) -> list[Any]:
        task = self._task
        filters = []
        if self.name is not None:
            filters.append(task.name.in_(self._names(self.name)))
        if self.key is not None:
            filters.append(task.key == self.key)
        return filters

    def _names(self, wanted: str) -> list[str]:
        """Return the full names that *wanted* means: itself, and those whose part after the colon it is."""
        task, found = self._task, [wanted]
        name = task.select(peewee.fn.MIN(task.name)).scalar()
        for _ in range(NAMES_MAX):
            if name is None:
                break
            if name.partition(":")[2] == wanted:
                found.append(name)
            name = task.select(peewee.fn.MIN(task.name)).where(task.name > name).scalar()
        return found
