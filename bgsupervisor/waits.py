"""The rows of waiting: parts, holds, waits, dependencies, barriers. The ledger's second half; writes no status.

Every method is one transaction, or part of the ledger's: what a dead task held is freed in the very transaction that
records its end. Keys that are returned are to be rung after the commit (see `board`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.circles import Need, circle
from bgsupervisor.errors import Deadlock, LockHeld
from bgsupervisor.statuses import Reason, Status

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.models import Store

__all__ = [
    "DUE",
    "EVERYBODY",
    "Dependent",
    "Found",
    "Held",
    "Queued",
    "Waiting",
    "Waits",
    "barrier_key",
    "lock_key",
    "task_key",
]

_IS_START = peewee.SQL("\"status\" = 'START'")
PASSED = "passed"
EVERYBODY = "*"
"""The key that every waiter listens to."""
DUE = "due"
"""The key that says that tasks may start which had to come after others."""


def task_key(id: int) -> str:
    """Return the key that rings when a task reaches a part or ends."""
    return f"task:{id}"


def lock_key(name: str) -> str:
    """Return the key that rings when a permit becomes free."""
    return f"lock:{name}"


def barrier_key(scope: str, name: str) -> str:
    """Return the key that rings when a barrier is passed or broken."""
    return f"barrier:{scope}:{name}"


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
        slot: The slot that was taken back with it, if the attempt had waited.
    """

    permit: int
    abandoned_by: int | None
    slot: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Queued:
    """A permit that is waited for; `slot_given` says whether others may use the attempt's slot meanwhile."""

    slot_given: bool


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
        self._wait, self._dependency, self._party = tables.Wait, tables.Dependency, tables.Party

    # Parts and ends

    def reach(self, id: int, attempt: int, part: str, value: str) -> bool:
        """Record a part of a running attempt, durably; again overwrites its value. False if it was superseded."""
        with self._store.writing():
            if not self._is_running(id, attempt):
                return False
            mine = (self._part.task_id == id) & (self._part.name == part)
            if not self._part.update(value=value, reached_at=self._clock.now()).where(mine).execute():
                self._part.insert(task_id=id, name=part, value=value, reached_at=self._clock.now()).execute()
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
            status, reason = Status(row[1]), None if row[2] is None else Reason(row[2])
            ended_value = row[4] if status is Status.DONE else None
            found.append(Found(id, status, reason, row[3], values.get(id) if part is not None else ended_value))
        return found

    def forget_parts(self, id: int) -> None:
        """Clear the parts of a task that is to be tried again."""
        self._part.delete().where(self._part.task_id == id).execute()

    # Waiting

    def begin(self, id: int, attempt: int, waiting: Sequence[Waiting], *, max_waiting: int) -> bool:
        """Record what an attempt waits for and give its slot to others; return whether it is without one now.

        A slot is kept if *max_waiting* others wait without one.

        Raises:
            Deadlock: This wait would close a circle; nothing is recorded.
        """
        with self._store.writing():
            self._record(id, attempt, waiting)
            return self._give_slot(id, attempt, max_waiting)

    def resume(self, id: int, attempt: int, *, slots: int) -> int | None:
        """End the waiting and take a slot again; None if none is free: then it is waited for (kind "slot")."""
        with self._store.writing():
            return self._resume(id, attempt, slots)

    def grant(self, id: int, attempt: int, slot: int) -> bool:
        """Give a slot to an attempt that has waited, and end its waiting; part of the supervisor's batch.

        Many come back at once when a part is reached: one commit for all of them, instead of one by each child.
        """
        mine = _IS_START & (self._task.id == id) & (self._task.attempt == attempt) & self._task.slot.is_null()
        if not self._task.update(slot=slot).where(mine).execute():
            return False
        self._wait.delete().where(self._wait.task_id == id).execute()
        return True

    def rows(self, ids: Collection[int] | None = None) -> list[dict[str, Any]]:
        """Return the rows of `wait`, of some tasks or of all, in the order in which they are served."""
        query = self._wait.select().order_by(self._wait.id)
        if ids is not None:
            query = query.where(self._wait.task_id.in_(list(ids)))
        with self._store.connected():
            return list(query.dicts())

    # Locks

    def acquire(
        self, id: int, attempt: int, name: str, permits: int, *, slots: int, max_waiting: int, waits_already: bool
    ) -> Held | Queued:
        """Take a permit if it is this attempt's turn, else wait for it (first come, first served).

        With the permit the attempt also takes its slot back if it can; if it cannot, a wait for a slot is left.

        Raises:
            LockHeld: It holds a permit of this lock already.
            Deadlock: Waiting would close a circle.
        """
        hold, wait = self._hold, self._wait
        with self._store.writing():
            rows = list(hold.select().where(hold.name == name).dicts())
            if any(row["task_id"] == id for row in rows):
                raise LockHeld(name)
            taken = {row["permit"] for row in rows if row["task_id"] is not None}
            free = [permit for permit in range(permits) if permit not in taken]
            before = wait.select(peewee.fn.COUNT(wait.id)).where((wait.kind == "lock") & (wait.target == name))
            if waits_already:
                mine = wait.select(peewee.fn.MIN(wait.id)).where((wait.task_id == id) & (wait.target == name))
                before = before.where(wait.id < mine)
            if len(free) > before.scalar():
                held = self._take(id, attempt, name, free[0], rows)
                return dataclasses.replace(held, slot=self._resume(id, attempt, slots)) if waits_already else held
            if waits_already:
                return Queued(slot_given=False)
            self._record(id, attempt, [Waiting("lock", target=name, permits=permits)])
            return Queued(self._give_slot(id, attempt, max_waiting))

    def may_take(self, id: int, name: str, permits: int) -> bool:
        """Tell whether it is the turn of a waiting attempt; only a look, so that a crowd of waiters takes no turns."""
        hold, wait = self._hold, self._wait
        with self._store.looking():
            taken = hold.select(peewee.fn.COUNT(hold.id)).where((hold.name == name) & hold.task_id.is_null(False))
            mine = wait.select(peewee.fn.MIN(wait.id)).where((wait.task_id == id) & (wait.target == name))
            before = wait.select(peewee.fn.COUNT(wait.id)).where(
                (wait.kind == "lock") & (wait.target == name) & (wait.id < mine)
            )
            return bool(permits - taken.scalar() > before.scalar())

    def release(self, id: int, attempt: int, name: str) -> list[str]:
        """Give a permit back; return the keys to ring."""
        hold = self._hold
        with self._store.writing():
            mine = (hold.name == name) & (hold.task_id == id) & (hold.attempt == attempt)
            return [lock_key(name)] if hold.delete().where(mine).execute() else []

    # Barriers

    def arrive(self, id: int, attempt: int, scope: str, name: str, parties: int) -> tuple[int, list[str]]:
        """Arrive at a barrier; return (generation, keys to ring). The last party to arrive opens it for all."""
        party = self._party
        with self._store.writing():
            here = (party.scope == scope) & (party.name == name)
            waiting = list(party.select().where(here & party.outcome.is_null()).dicts())
            last = party.select(peewee.fn.MAX(party.generation)).where(here).scalar()
            generation = waiting[0]["generation"] if waiting else (0 if last is None else last + 1)
            if any(row["task_id"] == id for row in waiting):  # a retried party counts once
                party.update(attempt=attempt).where(here & party.outcome.is_null() & (party.task_id == id)).execute()
            else:
                row = {"scope": scope, "name": name, "generation": generation, "task_id": id, "attempt": attempt}
                party.insert(**row, parties=parties).execute()
                waiting.append(row)
            if len(waiting) < parties:
                return generation, []
            party.update(outcome=PASSED).where(here & (party.generation == generation)).execute()
            return generation, [barrier_key(scope, name)]

    def barrier_outcome(self, id: int, scope: str, name: str, generation: int) -> str | None:
        """Return None while the barrier is closed, "passed", or the sentence that says who broke it."""
        party = self._party
        mine = (party.scope == scope) & (party.name == name) & (party.generation == generation) & (party.task_id == id)
        with self._store.connected():
            rows = list(party.select(party.outcome).where(mine).tuples())
        return rows[0][0] if rows else PASSED

    def leave_barrier(self, id: int, scope: str, name: str, generation: int) -> None:
        """Take this party's row away, after it has gone through or given up."""
        party = self._party
        with self._store.writing():
            mine = (party.scope == scope) & (party.name == name) & (party.generation == generation)
            party.delete().where(mine & (party.task_id == id)).execute()

    # Dependencies

    def depend(self, id: int, on_ids: Collection[int], *, any_end: bool) -> int | None:
        """Have a new task come after others; return the first that is INTERRUPTED already, if that matters."""
        task = self._task
        rows = dict(task.select(task.id, task.status).where(task.id.in_(list(on_ids))).tuples())
        for on_id in dict.fromkeys(on_ids):
            status = Status(rows[on_id])
            if status is Status.INTERRUPTED and not any_end:
                return on_id
            if not status.ended:
                self._dependency.insert(task_id=id, on_id=on_id, any_end=any_end).execute()
        return None

    def settle(self, id: int, *, done: bool, keys: list[str]) -> list[Dependent]:
        """Let those go on that had to come after a task which has ended; return those that never can."""
        dependency, task = self._dependency, self._task
        mine = dependency.on_id == id
        stranded: list[Dependent] = []
        if not done:
            query = task.select(task.id, task.attempt).join(dependency, on=(dependency.task_id == task.id))
            query = query.where(mine & (dependency.any_end == 0))
            stranded = [Dependent(*row) for row in query.tuples()]
        if dependency.delete().where(mine).execute():
            keys.append(DUE)
        return stranded

    def forget_dependencies(self, id: int) -> None:
        """A task that will not start any more comes after nobody."""
        self._dependency.delete().where(self._dependency.task_id == id).execute()

    # Ends

    def free(self, id: int, attempt: int, *, reason: str | None) -> list[str]:
        """Free all that an attempt held, in the transaction that records its end; return the keys to ring."""
        hold, party, wait = self._hold, self._party, self._wait
        keys = [task_key(id)]
        queued = wait.select(wait.target).where((wait.task_id == id) & (wait.kind == "lock"))
        keys += [lock_key(name) for (name,) in list(queued.tuples())]  # whoever stood behind moves up
        self._wait.delete().where(self._wait.task_id == id).execute()
        mine = (hold.task_id == id) & (hold.attempt == attempt)
        names = [name for (name,) in hold.select(hold.name).where(mine).tuples()]
        if reason is None:
            hold.delete().where(mine).execute()
        else:
            hold.update(task_id=None, attempt=None, abandoned_by=id).where(mine).execute()
        keys += [lock_key(name) for name in names]
        for row in list(party.select().where(party.task_id == id).dicts()):
            same = (party.scope == row["scope"]) & (party.name == row["name"]) & (party.generation == row["generation"])
            if row["outcome"] is None and reason is not None:
                told = f"task {id} was interrupted ({reason}) while it waited there"
                party.update(outcome=told).where(same & (party.task_id != id)).execute()
                keys.append(barrier_key(row["scope"], row["name"]))
            party.delete().where(same & (party.task_id == id)).execute()
        return keys

    # Within

    def _is_running(self, id: int, attempt: int) -> bool:
        task = self._task
        return bool(task.select(task.id).where(_IS_START & (task.id == id) & (task.attempt == attempt)).exists())

    def _record(self, id: int, attempt: int, waiting: Iterable[Waiting]) -> None:
        now = self._clock.now()
        self._wait.delete().where(self._wait.task_id == id).execute()
        for one in waiting:
            self._wait.insert(task_id=id, attempt=attempt, since=now, **dataclasses.asdict(one)).execute()
        found = circle(id, self._needs_from(id))
        if found is not None:
            raise Deadlock(found)

    def _give_slot(self, id: int, attempt: int, max_waiting: int) -> bool:
        task = self._task
        mine = _IS_START & (task.id == id) & (task.attempt == attempt)
        waiting = task.select(peewee.fn.COUNT(task.id)).where(_IS_START & task.slot.is_null()).scalar()
        if waiting < max_waiting:
            return bool(task.update(slot=None).where(mine).execute())
        return bool(task.select(task.id).where(mine & task.slot.is_null()).exists())

    def _resume(self, id: int, attempt: int, slots: int) -> int | None:
        task, wait = self._task, self._wait
        mine = _IS_START & (task.id == id) & (task.attempt == attempt)
        slot = task.select(task.slot).where(mine).scalar()
        if slot is None:
            slot = self._take_slot(id, slots)
            if slot is not None and not task.update(slot=slot).where(mine).execute():
                return slot  # superseded: it has no row to write to any more
        if slot is None:
            wait.delete().where((wait.task_id == id) & (wait.kind != "slot")).execute()
            if not wait.select(wait.id).where(wait.task_id == id).exists():
                wait.insert(task_id=id, attempt=attempt, kind="slot", since=self._clock.now()).execute()
            return None
        wait.delete().where(wait.task_id == id).execute()
        return int(slot)

    def _take_slot(self, id: int, slots: int) -> int | None:
        """Return a free slot if it is this task's turn among those who come back."""
        task, wait = self._task, self._wait
        taken = {slot for (slot,) in task.select(task.slot).where(_IS_START & task.slot.is_null(False)).tuples()}
        before = wait.select(peewee.fn.COUNT(wait.id)).where((wait.kind == "slot") & (wait.task_id != id))
        own = wait.select(peewee.fn.MIN(wait.id)).where((wait.kind == "slot") & (wait.task_id == id)).scalar()
        if own is not None:
            before = before.where(wait.id < own)
        # From the top down: the supervisor fills from below, so that both rarely want the same one.
        free = [slot for slot in range(slots - 1, -1, -1) if slot not in taken]
        return free[0] if slots - len(taken) > before.scalar() and free else None

    def _take(self, id: int, attempt: int, name: str, permit: int, rows: Iterable[dict[str, Any]]) -> Held:
        hold, now = self._hold, self._clock.now()
        known = next((row for row in rows if row["permit"] == permit), None)
        if known is None:
            hold.insert(name=name, permit=permit, task_id=id, attempt=attempt, since=now).execute()
            return Held(permit, None)
        hold.update(task_id=id, attempt=attempt, since=now, abandoned_by=None).where(hold.id == known["id"]).execute()
        return Held(permit, known["abandoned_by"])

    def _needs_from(self, start: int) -> dict[int, list[Need]]:
        """Return the needs of all tasks that *start*'s waiting leads to."""
        needs: dict[int, list[Need]] = {}
        todo = {start}
        while todo:
            found = self._needs_of(todo)
            needs |= {id: found.get(id, []) for id in todo}
            todo = {source for one in found.values() for need in one for source in need.sources} - needs.keys()
        return {id: found for id, found in needs.items() if found}

    def _needs_of(self, ids: set[int]) -> dict[int, list[Need]]:
        wait, dependency = self._wait, self._dependency
        needs: dict[int, list[Need]] = {}
        for row in list(wait.select().where(wait.task_id.in_(list(ids))).dicts()):
            need = self._need(row)
            if need is not None:
                needs.setdefault(row["task_id"], []).append(need)
        query = dependency.select(dependency.task_id, dependency.on_id).where(dependency.task_id.in_(list(ids)))
        for id, on_id in query.tuples():
            needs.setdefault(id, []).append(Need(f"the end of task {on_id}", frozenset({on_id})))
        return needs

    def _need(self, row: dict[str, Any]) -> Need | None:
        if row["kind"] == "part" and self._is_reached(row["target_id"], row["target"]):
            return None  # it has only not yet woken
        if row["kind"] in ("part", "end"):
            what = f'part "{row["target"]}" of' if row["kind"] == "part" else "the end of"
            return Need(f"{what} task {row['target_id']}", frozenset({row["target_id"]}))
        if row["kind"] == "lock":
            hold = self._hold
            mine = (hold.name == row["target"]) & hold.task_id.is_null(False)
            holders = frozenset(id for (id,) in hold.select(hold.task_id).where(mine).tuples())
            if len(holders) < (row["permits"] or 1):
                return None
            return Need(f'lock "{row["target"]}", held by {_tasks(holders)}', holders)
        return None  # who else comes to a barrier is not known, and slots become free

    def _is_reached(self, id: int, name: str) -> bool:
        part = self._part
        return bool(part.select(part.id).where((part.task_id == id) & (part.name == name)).exists())


def _tasks(ids: Iterable[int]) -> str:
    return ", ".join(f"task {id}" for id in sorted(ids))
