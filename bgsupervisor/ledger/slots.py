"""Waiting, and the slots that are given away meanwhile."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.database.tables import IS_START
from bgsupervisor.errors import Deadlock, NotInTask
from bgsupervisor.ledger.waitgraph import WaitGraph

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.store import Store

__all__ = ["Slots", "Waiter", "Waiting", "waiter_of"]

ROWS_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Waiter:
    """One wait of an attempt; an async body can have several at once.

    Attributes:
        number: Which wait of this attempt it is; its rows have it.
        whole: Nothing of the body goes on beside it. Only then can the body be part of a cycle.
    """

    id: int
    attempt: int
    number: int = 0
    whole: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """One thing that a task waits for, as a row of `wait`."""

    kind: str
    target_id: int | None = None
    target: str | None = None
    permits: int | None = None


class Slots:
    """What attempts wait for, and their slots."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        tables = store.tables
        self._task, self._part, self._hold, self._wait = tables.Task, tables.Part, tables.Hold, tables.Wait
        self.edges = WaitGraph(store)

    def begin(self, waiter: Waiter, waiting: Sequence[Waiting], *, slots: int, max_waiting: int) -> bool:
        """Record what an attempt waits for and give its slot to others; return whether it is without one now.

        A slot is kept if *max_waiting* others wait without one.

        Raises:
            Deadlock: This wait would close a cycle; nothing is recorded.
            NotInTask: The attempt has ended.
        """
        with self._store.writing():
            return self._begin(waiter, waiting, slots, max_waiting)

    def slot(self, id: int, attempt: int) -> int | None:
        """Return the slot of a running attempt; None while it waits."""
        task = self._task
        with self._store.connected():
            found = task.select(task.slot).where(IS_START & (task.id == id) & (task.attempt == attempt)).scalar()
        return None if found is None else int(found)

    def resume(self, waiter: Waiter, *, slots: int) -> int | None:
        """End a wait and take a slot again; None if none is free: then it is waited for (kind "slot")."""
        with self._store.writing():
            return self._resume(waiter, slots)

    def grant(self, id: int, attempt: int, number: int, slot: int) -> bool:
        """Give a slot to an attempt, and end the wait after which it wants it; part of the supervisor's batch.

        Many come back at once when a part is reached: one commit for all of them, instead of one by each child.
        """
        rows = self._rows_of(Waiter(id, attempt, number))
        # guard, last condition: a slot is granted to waiting attempts only
        mine = IS_START & (self._task.id == id) & (self._task.attempt == attempt) & self._task.slot.is_null()
        if not self._wait.select(self._wait.id).where(rows).exists():
            return False  # it has taken a slot itself, and may wait for something else by now
        if not self._task.update(slot=slot).where(mine).execute():
            return False
        self._wait.delete().where(rows).execute()
        return True

    def is_waiting(self, waiter: Waiter) -> bool:
        """Whether a wait stands in the rows; it does not once a slot was given for what was waited for."""
        with self._store.connected():
            return bool(self._wait.select(self._wait.id).where(self._rows_of(waiter)).exists())

    def forget(self, waiter: Waiter) -> None:
        """End a wait of a body that needs no slot for it: it has one, or still waits for something else."""
        with self._store.writing():
            self._wait.delete().where(self._rows_of(waiter)).execute()

    def rows(self, ids: Collection[int] | None = None) -> list[dict[str, Any]]:
        """Return the rows of `wait`, of some tasks or of all, in the order in which they are served."""
        query = self._wait.select().order_by(self._wait.id)
        if ids is not None:
            query = query.where(self._wait.task_id.in_(list(ids)))
        with self._store.connected():
            return list(query.dicts())

    def _is_running(self, id: int, attempt: int) -> bool:
        task = self._task
        return bool(task.select(task.id).where(IS_START & (task.id == id) & (task.attempt == attempt)).exists())

    def _must_run(self, id: int, attempt: int) -> None:
        """Refuse rows for an attempt that has ended: nothing would ever delete them."""
        if not self._is_running(id, attempt):
            raise NotInTask(f"attempt {attempt} of task {id} has ended; what is left of its body cannot wait any more")

    def _rows_of(self, waiter: Waiter) -> Any:  # noqa: ANN401 - a Peewee condition
        wait = self._wait
        return (wait.task_id == waiter.id) & (wait.attempt == waiter.attempt) & (wait.number == waiter.number)

    def _begin(self, waiter: Waiter, waiting: Sequence[Waiting], slots: int, max_waiting: int) -> bool:
        self._must_run(waiter.id, waiter.attempt)
        rows = [self._row(waiter, one) for one in waiting]
        for first in range(0, len(rows), ROWS_AT_ONCE):
            self._wait.insert_many(rows[first : first + ROWS_AT_ONCE]).execute()
        given = self._give_slot(waiter.id, waiter.attempt, max_waiting)
        if waiter.whole:
            found = self.edges.cycle(waiter.id, () if given else self.edges.who_has_slots(slots))
            if found is not None:
                raise Deadlock(found)
        return given

    def _row(self, waiter: Waiter, waiting: Waiting) -> dict[str, Any]:
        ref = {"task_id": waiter.id, "attempt": waiter.attempt, "number": waiter.number, "whole": waiter.whole}
        return {**ref, "since": self._clock.now(), **dataclasses.asdict(waiting)}

    def _give_slot(self, id: int, attempt: int, max_waiting: int) -> bool:
        task = self._task
        mine = IS_START & (task.id == id) & (task.attempt == attempt)
        waiting = task.select(peewee.fn.COUNT(task.id)).where(IS_START & task.slot.is_null()).scalar()
        if waiting < max_waiting:
            return bool(task.update(slot=None).where(mine).execute())
        return bool(task.select(task.id).where(mine & task.slot.is_null()).exists())

    def _resume(self, waiter: Waiter, slots: int | None) -> int | None:
        """End a wait; take a slot if there is a free one among *slots* (None: leave that to the waiter)."""
        task, wait, rows = self._task, self._wait, self._rows_of(waiter)
        mine = IS_START & (task.id == waiter.id) & (task.attempt == waiter.attempt)
        found = list(task.select(task.slot).where(mine).tuples())
        if not found:
            raise NotInTask(f"attempt {waiter.attempt} of task {waiter.id} has ended")
        slot = found[0][0]
        if slot is None and slots is not None:
            slot = self._take_slot(waiter.id, slots)
            if slot is not None and not self._puts_into(task.update(slot=slot).where(mine)):
                slot = None
        if slot is not None:
            wait.delete().where(rows).execute()
            return int(slot)
        # guard, last condition: a repeated request for a slot keeps its place
        wait.delete().where(rows & (wait.kind != "slot")).execute()
        if not wait.select(wait.id).where(rows).exists():
            wait.insert(**self._row(waiter, Waiting("slot"))).execute()
        return None

    def _puts_into(self, update: Any) -> bool:  # noqa: ANN401 - a Peewee query
        """Take a slot, unless a claim takes it just now: on PostgreSQL claims lock out no writer."""
        try:
            with self._store.database.atomic():
                update.execute()
        except peewee.IntegrityError:
            return False
        return True

    def _take_slot(self, id: int, slots: int) -> int | None:
        """Return a free slot if it is this task's turn among those who come back."""
        task, wait = self._task, self._wait
        taken = {slot for (slot,) in task.select(task.slot).where(IS_START & task.slot.is_null(False)).tuples()}
        asking = wait.select(wait.task_id).where(wait.kind == "slot").order_by(wait.id).limit(slots)
        ids = [one for (one,) in asking.tuples()]
        before = ids.index(id) if id in ids else len(ids)
        # From the top down: the supervisor fills from below, so that both rarely want the same one.
        free = [slot for slot in range(slots - 1, -1, -1) if slot not in taken]
        return free[0] if slots - len(taken) > before and free else None


def waiter_of(row: dict[str, Any]) -> Waiter:
    """Return the waiter that a row of `wait` belongs to."""
    return Waiter(row["task_id"], row["attempt"], row["number"], row["whole"])
