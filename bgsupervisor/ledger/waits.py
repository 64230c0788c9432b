"""All that tasks wait for, and what an end frees. The ledger's second half; writes no status.

Every method is one transaction, or part of the ledger's: the locks of a dead task are released in the
transaction that records its end. Keys that are returned are to be notified after the commit (see `wait_manager`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from bgsupervisor.database.values import read_status
from bgsupervisor.ledger.barriers import Barriers
from bgsupervisor.ledger.locks import Locks
from bgsupervisor.ledger.parts import Parts
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.sql import Statements
    from bgsupervisor.database.store import Store

__all__ = [
    "DUE",
    "EVERYBODY",
    "Dependent",
    "Waits",
    "task_key",
]

EVERYBODY = "*"
"""The key that every waiter listens to."""
DUE = "due"
"""The key that notifies when dependent tasks may start."""


def task_key(id: int) -> str:
    """Return the key that notifies when a task reaches a part or ends."""
    return f"task:{id}"


@dataclasses.dataclass(frozen=True, slots=True)
class Dependent:
    """A task that had to come after another which was interrupted."""

    id: int
    attempt: int


class Waits(Parts, Locks):
    """What tasks wait for. Made by the ledger, which shares its store and clock."""

    def __init__(self, store: Store, clock: Clock) -> None:
        super().__init__(store, clock)
        self._dependency = store.tables.Dependency
        self.barriers = Barriers(store, self.edges)

    def forget_tasks(self, ids: Collection[int]) -> None:
        """Clear what old tasks have left: their parts, and the marks on permits that they died with."""
        hold = self._hold
        self._part.delete().where(self._part.task_id.in_(list(ids))).execute()
        hold.delete().where(hold.task_id.is_null() & hold.abandoned_by.in_(list(ids))).execute()

    def depend(self, id: int, on_ids: Collection[int], *, any_end: bool) -> int | None:
        """Record that a new task comes after others; return the first that is INTERRUPTED already, if that matters."""
        task = self._task
        rows = dict(task.select(task.id, task.status).where(task.id.in_(list(on_ids))).tuples())
        for on_id in dict.fromkeys(on_ids):
            status = read_status(rows[on_id]) or Status.INTERRUPTED
            if status is Status.INTERRUPTED and not any_end:
                return on_id
            if not status.ended:
                self._dependency.insert(task_id=id, on_id=on_id, any_end=any_end).execute()
        return None

    def resolve_dependents(self, id: int, *, done: bool, keys: list[str]) -> list[Dependent]:
        """Release the tasks that had to come after one which has ended; return those that can never start."""
        dependency, task = self._dependency, self._task
        mine = dependency.on_id == id
        failed: list[Dependent] = []
        if not done:
            query = task.select(task.id, task.attempt).join(dependency, on=(dependency.task_id == task.id))
            query = query.where(mine & (dependency.any_end == 0))
            failed = [Dependent(*row) for row in query.tuples()]
        if dependency.delete().where(mine).execute():
            keys.append(DUE)
        return failed

    def forget_dependencies(self, id: int) -> None:
        """Delete the dependencies of a task that will not start any more."""
        self._dependency.delete().where(self._dependency.task_id == id).execute()

    def concerned(self, statements: Statements, ids: Sequence[int]) -> Collection[int]:
        """Return which of these tasks hold or wait for something, or are waited for; the rest hold nothing."""
        if not ids:
            return ()
        found = {id for (id,) in self._store.rows_of(statements.concerned(len(ids)), [*ids, *ids, *ids])}
        return ids if 0 in found else found

    def free(self, id: int, attempt: int, *, reason: str | None) -> list[str]:
        """Release all that an attempt held, in the transaction that records its end; return the keys to notify."""
        hold, wait = self._hold, self._wait
        queued = wait.select(wait.target).where((wait.task_id == id) & (wait.kind == "lock"))
        mine = (hold.task_id == id) & (hold.attempt == attempt)
        names = [name for (name,) in list(hold.select(hold.name).where(mine).tuples())]
        # guard: a queue moves up when a waiter dies
        names += [name for (name,) in list(queued.tuples())]
        wait.delete().where(wait.task_id == id).execute()
        if reason is None:
            hold.delete().where(mine).execute()
        else:
            hold.update(task_id=None, attempt=None, abandoned_by=id).where(mine).execute()
        keys = [task_key(id)]
        for name in dict.fromkeys(names):
            keys += self._hand_over(name, None)
        self.barriers.miss(id, reason, keys)
        return keys
