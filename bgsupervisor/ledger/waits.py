"""The rows of waiting: parts, holds, waits, dependencies. The ledger's second half; writes no status.

Every method is one transaction, or part of the ledger's: what a dead task held is freed in the very transaction that
records its end. Keys that are returned are to be notified after the commit (see `wait_manager`).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.database.store import read_reason, read_status
from bgsupervisor.errors import Deadlock, LockHeld, NotInTask
from bgsupervisor.ledger.barriers import Barriers
from bgsupervisor.ledger.waitgraph import WaitGraph
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.sql import Statements
    from bgsupervisor.database.store import Store
    from bgsupervisor.statuses import Reason

__all__ = [
    "DUE",
    "EVERYBODY",
    "Dependent",
    "Found",
    "Held",
    "Queued",
    "Waiter",
    "Waiting",
    "Waits",
    "task_key",
    "turn_key",
]

_IS_START = peewee.SQL("\"status\" = 'START'")
EVERYBODY = "*"
"""The key that every waiter listens to."""
DUE = "due"
"""The key that says that tasks may start which had to come after others."""
ROWS_AT_ONCE = 1000
HANDED_PERMITS = 4
"""So many who stand in a queue are looked at at once; most often one permit has become free."""
HANDED_SLOTS = 2
"""Who reaches a part gives so many waiters their slots back with it; more are left to the supervisor's one commit."""


def task_key(id: int) -> str:
    """Return the key that notifies when a task reaches a part or ends."""
    return f"task:{id}"


def turn_key(id: int) -> str:
    """Return the key that notifies when a task has been given a permit that it waited for."""
    return f"turn:{id}"


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What is known of one awaited task; `value` is the JSON text of its part, or of its result if none was named."""

    id: int
    status: Status
    reason: Reason | None
    detail: str | None
    value: str | None


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


@dataclasses.dataclass(frozen=True, slots=True)
class Dependent:
    """A task that had to come after another which was interrupted."""

    id: int
    attempt: int


class Waits:
    """What tasks wait for. Made by the ledger, which shares its store and clock."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        tables = store.tables
        self._task, self._part, self._hold = tables.Task, tables.Part, tables.Hold
        self._wait, self._dependency = tables.Wait, tables.Dependency
        self.edges = WaitGraph(store)
        self.barriers = Barriers(store, self.edges)

    # Parts and ends

    def reach(self, id: int, attempt: int, part: str, value: str, *, slots: int) -> bool:
        """Record a part of a running attempt, durably; again overwrites its value. False if it was superseded.

        A few who wait for nothing else get a slot with it, if one is free.
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
        """Clear the parts of a task that is to be tried again."""
        self._part.delete().where(self._part.task_id == id).execute()

    def forget_tasks(self, ids: Collection[int]) -> None:
        """Clear what old tasks have left: their parts, and the marks on permits that they died with."""
        hold = self._hold
        self._part.delete().where(self._part.task_id.in_(list(ids))).execute()
        hold.delete().where(hold.task_id.is_null() & hold.abandoned_by.in_(list(ids))).execute()

    # Waiting

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
            found = task.select(task.slot).where(_IS_START & (task.id == id) & (task.attempt == attempt)).scalar()
        return None if found is None else int(found)

    def resume(self, waiter: Waiter, *, slots: int) -> int | None:
        """End a wait and take a slot again; None if none is free: then it is waited for (kind "slot")."""
        with self._store.writing():
            return self._resume(waiter, slots)

    def give_up(self, waiter: Waiter, lock: str | None, *, slots: int | None) -> tuple[int | None, list[str]]:
        """End a wait in vain, for a lock if one is named; return (slot or None, keys to ring).

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

    def grant(self, id: int, attempt: int, number: int, slot: int) -> bool:
        """Give a slot to an attempt, and end the wait after which it wants it; part of the supervisor's batch.

        Many come back at once when a part is reached: one commit for all of them, instead of one by each child.
        """
        rows = self._rows_of(Waiter(id, attempt, number))
        # guard, last condition: a slot is granted to waiting attempts only
        mine = _IS_START & (self._task.id == id) & (self._task.attempt == attempt) & self._task.slot.is_null()
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

    # Locks

    def acquire(
        self, waiter: Waiter, name: str, permits: int, *, slots: int, max_waiting: int, wait: bool = True
    ) -> Held | Queued | None:
        """Take a permit if one is free and nobody waits for it, else wait (first come, first served).

        A lock is free for who asks with *permits* while fewer than those are taken, whatever the others asked with.
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
        """Give a permit to who has waited longest, with a slot if one is free; return the keys to ring."""
        with self._store.writing():
            if not self._hold.delete().where(self._held_by(id, attempt, name)).execute():
                return []
            return self._hand_over(name, slots)

    # Dependencies

    def depend(self, id: int, on_ids: Collection[int], *, any_end: bool) -> int | None:
        """Have a new task come after others; return the first that is INTERRUPTED already, if that matters."""
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
        """Let those go on that had to come after a task which has ended; return those that never can."""
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
        """A task that will not start any more comes after nobody."""
        self._dependency.delete().where(self._dependency.task_id == id).execute()

    # Ends

    def concerned(self, statements: Statements, ids: Sequence[int]) -> Collection[int]:
        """Return which of these tasks hold or wait for something, or are waited for; others have nothing to free."""
        if not ids:
            return ()
        found = {id for (id,) in self._store.rows_of(statements.concerned(len(ids)), [*ids, *ids, *ids])}
        return ids if 0 in found else found

    def free(self, id: int, attempt: int, *, reason: str | None) -> list[str]:
        """Free all that an attempt held, in the transaction that records its end; return the keys to ring."""
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

    # Within

    def _is_running(self, id: int, attempt: int) -> bool:
        task = self._task
        return bool(task.select(task.id).where(_IS_START & (task.id == id) & (task.attempt == attempt)).exists())

    def _must_run(self, id: int, attempt: int) -> None:
        """See that rows are made for running attempts only: nobody would ever take those of another away."""
        if not self._is_running(id, attempt):
            raise NotInTask(f"attempt {attempt} of task {id} has ended; what is left of its body cannot wait any more")

    def _rows_of(self, waiter: Waiter) -> Any:  # noqa: ANN401 - a Peewee condition
        wait = self._wait
        return (wait.task_id == waiter.id) & (wait.attempt == waiter.attempt) & (wait.number == waiter.number)

    def _queue(self, name: str) -> Any:  # noqa: ANN401 - a Peewee query
        wait = self._wait
        return wait.select().where((wait.kind == "lock") & (wait.target == name)).order_by(wait.id)

    def _held_by(self, id: int, attempt: int, name: str) -> Any:  # noqa: ANN401 - a Peewee condition
        hold = self._hold
        return (hold.name == name) & (hold.task_id == id) & (hold.attempt == attempt)

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
        mine = _IS_START & (task.id == id) & (task.attempt == attempt)
        waiting = task.select(peewee.fn.COUNT(task.id)).where(_IS_START & task.slot.is_null()).scalar()
        if waiting < max_waiting:
            return bool(task.update(slot=None).where(mine).execute())
        return bool(task.select(task.id).where(mine & task.slot.is_null()).exists())

    def _resume(self, waiter: Waiter, slots: int | None) -> int | None:
        """End a wait; take a slot if there is a free one among *slots* (None: leave that to the waiter)."""
        task, wait, rows = self._task, self._wait, self._rows_of(waiter)
        mine = _IS_START & (task.id == waiter.id) & (task.attempt == waiter.attempt)
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
        """Take a slot, unless a claim takes it just now: claims keep nobody away on PostgreSQL."""
        try:
            with self._store.database.atomic():
                update.execute()
        except peewee.IntegrityError:
            return False
        return True

    def _take_slot(self, id: int, slots: int) -> int | None:
        """Return a free slot if it is this task's turn among those who come back."""
        task, wait = self._task, self._wait
        taken = {slot for (slot,) in task.select(task.slot).where(_IS_START & task.slot.is_null(False)).tuples()}
        asking = wait.select(wait.task_id).where(wait.kind == "slot").order_by(wait.id).limit(slots)
        ids = [one for (one,) in asking.tuples()]
        before = ids.index(id) if id in ids else len(ids)
        # From the top down: the supervisor fills from below, so that both rarely want the same one.
        free = [slot for slot in range(slots - 1, -1, -1) if slot not in taken]
        return free[0] if slots - len(taken) > before and free else None

    def _hand_slots(self, id: int, part: str, slots: int) -> None:
        """Give slots to the few who wait for this part alone: they need not ask for one."""
        wait, other = self._wait, self._wait.alias()
        others = other.select(other.id).where((other.task_id == wait.task_id) & (other.id != wait.id))
        query = wait.select(wait, peewee.fn.EXISTS(others).alias("waits_for_more"))
        query = query.where((wait.kind == "part") & (wait.target == part) & (wait.target_id == id) & wait.whole)
        rows = list(query.limit(HANDED_SLOTS + 1).dicts())
        for row in rows if len(rows) <= HANDED_SLOTS else []:
            if not row["waits_for_more"] and self._is_running(row["task_id"], row["attempt"]):
                self._resume(_waiter(row), slots)

    def _take(self, id: int, attempt: int, name: str, permit: int, rows: Collection[dict[str, Any]]) -> Held:
        hold, now = self._hold, self._clock.now()
        known = next((row for row in rows if row["permit"] == permit), None)
        if known is None:
            hold.insert(name=name, permit=permit, task_id=id, attempt=attempt, since=now).execute()
            return Held(permit, None)
        hold.update(task_id=id, attempt=attempt, since=now).where(hold.id == known["id"]).execute()
        return Held(permit, known["abandoned_by"])

    def _hand_over(self, name: str, slots: int | None) -> list[str]:
        """Give the free permits of a lock to those who have waited longest; return the keys to ring."""
        keys: list[str] = []
        while True:
            some = list(self._queue(name).limit(HANDED_PERMITS).dicts())
            # Whoever comes after one who must wait waits for that one too.
            handed = list(itertools.takewhile(lambda row: self._hand_permit(row, slots), some))
            keys += [turn_key(row["task_id"]) for row in handed]
            if len(handed) < HANDED_PERMITS:
                return keys

    def _hand_permit(self, row: dict[str, Any], slots: int | None) -> bool:
        """Give a permit to who stands first in a queue, if one is free for it."""
        hold, waiter, name = self._hold, _waiter(row), row["target"]
        if not self._is_running(waiter.id, waiter.attempt):  # the row was written by hand, and waits for nobody
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


def _waiter(row: dict[str, Any]) -> Waiter:
    return Waiter(row["task_id"], row["attempt"], row["number"], row["whole"])


def _free_permit(rows: Collection[dict[str, Any]], permits: int) -> int | None:
    """Return a permit that nobody holds if fewer than *permits* are held: an abandoned one first, for that is news."""
    # guard, never: a permit has one holder
    taken = {row["permit"] for row in rows if row["task_id"] is not None}
    abandoned = {row["permit"] for row in rows if row["permit"] is not None} - taken
    if len(taken) >= permits:
        return None
    return min(abandoned, default=next(permit for permit in range(permits) if permit not in taken))
