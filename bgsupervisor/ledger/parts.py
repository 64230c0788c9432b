"""Parts that tasks have reached, and what is known of awaited tasks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import peewee

from bgsupervisor.database.values import read_reason, read_status
from bgsupervisor.ledger.slots import Slots, waiter_of
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bgsupervisor.statuses import Reason

__all__ = ["Found", "Parts"]

HANDED_SLOTS = 2
"""Waiters that get their slots back with a part; more are left to the supervisor's one commit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What is known of one awaited task; `value` is the JSON text of its part, or of its result if none was named."""

    id: int
    status: Status
    reason: Reason | None
    detail: str | None
    value: str | None


class Parts(Slots):
    """The parts of one installation's tasks."""

    def reach(self, id: int, attempt: int, part: str, value: str, *, slots: int) -> bool:
        """Record a part of a running attempt, durably; again overwrites its value. False if it was superseded.

        A few waiters that wait for nothing else get a slot with it, if one is free.
        """
        with self._store.writing():
            if not self._is_running(id, attempt):
                return False
            row = {"value": value, "reached_at": self._clock.now()}
            reached = self._part.insert(task_id=id, name=part, **row)
            reached.on_conflict(conflict_target=(self._part.task_id, self._part.name), update=row).execute()
            self._hand_slots(id, part, slots)
            return True

    def find(self, ids: Sequence[int], part: str | None) -> list[Found | None]:
        """Return what is known of each awaited task now, in order; None for one that does not exist."""
        task = self._task
        columns = (task.id, task.status, task.reason, task.detail, task.result)
        with self._store.looking():
            rows = {row[0]: row for row in task.select(*columns).where(task.id.in_(list(ids))).tuples()}
            values: dict[int, str] = {}
            if part is not None:
                query = self._part.select(self._part.task_id, self._part.value)
                values = dict(query.where(self._part.task_id.in_(list(ids)) & (self._part.name == part)).tuples())
        found: list[Found | None] = []
        for id in ids:
            row = rows.get(id)
            if row is None:
                found.append(None)
                continue
            status, reason = read_status(row[1]) or Status.INTERRUPTED, read_reason(row[2])
            ended_value = row[4] if status is Status.DONE else None
            found.append(Found(id, status, reason, row[3], values.get(id) if part is not None else ended_value))
        return found

    def forget_parts(self, id: int) -> None:
        """Delete the parts of a task that will be tried again."""
        self._part.delete().where(self._part.task_id == id).execute()

    def _hand_slots(self, id: int, part: str, slots: int) -> None:
        """Give slots to the few attempts that wait for this part alone: they need not ask for one."""
        wait, other = self._wait, self._wait.alias()
        others = other.select(other.id).where((other.task_id == wait.task_id) & (other.id != wait.id))
        query = wait.select(wait, peewee.fn.EXISTS(others).alias("waits_for_more"))
        query = query.where((wait.kind == "part") & (wait.target == part) & (wait.target_id == id) & wait.whole)
        rows = list(query.limit(HANDED_SLOTS + 1).dicts())
        for row in rows if len(rows) <= HANDED_SLOTS else []:
            if not row["waits_for_more"] and self._is_running(row["task_id"], row["attempt"]):
                self._resume(waiter_of(row), slots)
