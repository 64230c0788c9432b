"""Locks: their permits, and the queues before them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from bgsupervisor.errors import LockHeld
from bgsupervisor.ledger.slots import Slots, Waiter, Waiting, waiter_of

if TYPE_CHECKING:
    from collections.abc import Collection


__all__ = ["Held", "Locks", "Queued", "turn_key"]

HANDED_PERMITS = 4
"""Waiters read at once from a queue; most often one permit has become free."""


def turn_key(id: int) -> str:
    """Return the key that notifies when a task has been given a permit that it waited for."""
    return f"turn:{id}"


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """A permit that was taken.

    Attributes:
        permit: Its number, from 0.
        abandoned_by: The task that died with it before, if one did.
        slot: The slot that the attempt has now; None if it has waited and must still take one.
    """

    permit: int
    abandoned_by: int | None
    slot: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Queued:
    """A permit that is waited for; `slot_given` says whether others may use the attempt's slot meanwhile."""

    slot_given: bool


class Locks(Slots):
    """The locks of one installation."""

    def acquire(
        self, waiter: Waiter, name: str, permits: int, *, slots: int, max_waiting: int, wait: bool = True
    ) -> Held | Queued | None:
        """Take a permit if one is free and no other attempt waits for it, else wait (first come, first served).

        A lock is free for a request with *permits* while fewer permits are taken, whatever the others asked for.
        None, and nothing recorded, if it is not free and *wait* is false.

        Raises:
            LockHeld: It holds a permit of this lock already, or waits for one.
            Deadlock: Waiting would close a cycle.
            NotInTask: The attempt has ended.
        """
        hold, queue = self._hold, self._queue(name)
        with self._store.writing():
            self._must_run(waiter.id, waiter.attempt)
            rows = list(hold.select().where(hold.name == name).dicts())
            asks = queue.where(self._wait.task_id == waiter.id)
            if any(row["task_id"] == waiter.id for row in rows) or asks.exists():
                raise LockHeld(name)
            permit = _free_permit(rows, permits)
            # guard, last condition: permits are given in the order of asking
            if permit is not None and not queue.exists():
                return self._take(waiter.id, waiter.attempt, name, permit, rows)
            if not wait:
                return None
            waiting = [Waiting("lock", target=name, permits=permits)]
            return Queued(self._begin(waiter, waiting, slots, max_waiting))

    def held(self, id: int, attempt: int, name: str) -> Held | None:
        """Return the permit that a waiting attempt has been given meanwhile, with its slot; None if none yet."""
        hold, task = self._hold, self._task
        with self._store.looking():
            query = hold.select(hold.permit, hold.abandoned_by).where(self._held_by(id, attempt, name))
            rows = list(query.tuples())
            if not rows:
                return None
            return Held(*rows[0], task.select(task.slot).where(task.id == id).scalar())  # type: ignore[call-arg]

    def release(self, id: int, attempt: int, name: str, *, slots: int) -> list[str]:
        """Pass a permit to the longest waiter, with a slot if one is free; return the keys to notify."""
        with self._store.writing():
            if not self._hold.delete().where(self._held_by(id, attempt, name)).execute():
                return []
            return self._hand_over(name, slots)

    def give_up(self, waiter: Waiter, lock: str | None, *, slots: int | None) -> tuple[int | None, list[str]]:
        """End a wait in vain, for a lock if one is named; return (slot or None, keys to notify).

        A slot is taken if one of *slots* is free; None: not yet, for the body still waits for something else. A permit
        that has come just now goes on to the next.
        """
        with self._store.writing():
            slot = None
            if slots is not None:
                slot = self._resume(waiter, slots)
            else:
                self._wait.delete().where(self._rows_of(waiter)).execute()
            if lock is None:
                return slot, []
            self._hold.delete().where(self._held_by(waiter.id, waiter.attempt, lock)).execute()
            return slot, self._hand_over(lock, slots)

    def _queue(self, name: str) -> Any:  # noqa: ANN401 - a Peewee query
        wait = self._wait
        return wait.select().where((wait.kind == "lock") & (wait.target == name)).order_by(wait.id)

    def _held_by(self, id: int, attempt: int, name: str) -> Any:  # noqa: ANN401 - a Peewee condition
        hold = self._hold
        return (hold.name == name) & (hold.task_id == id) & (hold.attempt == attempt)

    def _take(self, id: int, attempt: int, name: str, permit: int, rows: Collection[dict[str, Any]]) -> Held:
        hold, now = self._hold, self._clock.now()
        known = next((row for row in rows if row["permit"] == permit), None)
        if known is None:
            hold.insert(name=name, permit=permit, task_id=id, attempt=attempt, since=now).execute()
            return Held(permit, None)
        hold.update(task_id=id, attempt=attempt, since=now).where(hold.id == known["id"]).execute()
        return Held(permit, known["abandoned_by"])

    def _hand_over(self, name: str, slots: int | None) -> list[str]:
        """Give the free permits of a lock to the longest waiters; return the keys to notify."""
        keys: list[str] = []
        while True:
            some = list(self._queue(name).limit(HANDED_PERMITS).dicts())
            # A waiter behind one that must wait waits for that one too.
            handed = list(itertools.takewhile(lambda row: self._hand_permit(row, slots), some))
            keys += [turn_key(row["task_id"]) for row in handed]
            if len(handed) < HANDED_PERMITS:
                return keys

    def _hand_permit(self, row: dict[str, Any], slots: int | None) -> bool:
        """Give a permit to the first of a queue, if one is free for it."""
        hold, waiter, name = self._hold, waiter_of(row), row["target"]
        if not self._is_running(waiter.id, waiter.attempt):  # the row was written by hand
            self._wait.delete().where(self._wait.id == row["id"]).execute()
            return True
        rows = list(hold.select().where(hold.name == name).dicts())
        permit = _free_permit(rows, max(row["permits"] or 1, 1))
        if permit is None:
            return False
        self._take(waiter.id, waiter.attempt, name, permit, rows)
        if waiter.whole:
            self._resume(waiter, slots)
        else:  # it may still wait for something else: only its child knows
            self._wait.delete().where(self._rows_of(waiter)).execute()
        return True


def _free_permit(rows: Collection[dict[str, Any]], permits: int) -> int | None:
    """Return a free permit if fewer than *permits* are taken: an abandoned one first, for that is news."""
    # guard, never: a permit has one holder
    taken = {row["permit"] for row in rows if row["task_id"] is not None}
    abandoned = {row["permit"] for row in rows if row["permit"] is not None} - taken
    if len(taken) >= permits:
        return None
    return min(abandoned, default=next(permit for permit in range(permits) if permit not in taken))
