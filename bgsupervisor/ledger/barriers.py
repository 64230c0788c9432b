"""Barriers: their participants, and what becomes of a barrier when one will not come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.database.tables import IS_START
from bgsupervisor.errors import NotInTask
from bgsupervisor.ledger.waitgraph import parent_of, parent_scope

if TYPE_CHECKING:
    from bgsupervisor.database.store import Store
    from bgsupervisor.ledger.waitgraph import WaitGraph

__all__ = ["PASSED", "Barriers", "barrier_key"]

PASSED = "passed"


def barrier_key(scope: str, name: str) -> str:
    """Return the key that notifies when a barrier is passed or broken."""
    return f"barrier:{scope}:{name}"


class Barriers:
    """The barriers of one installation. Made by `Waits`, which shares its store."""

    def __init__(self, store: Store, edges: WaitGraph) -> None:
        self._store = store
        self.edges = edges
        self._task, self._participant = store.tables.Task, store.tables.Participant

    def arrive(self, id: int, attempt: int, scope: str, name: str, parties: int) -> tuple[int, list[str]]:
        """Arrive at a barrier; return (generation, keys to notify). The last participant to arrive opens it for all.

        Raises:
            ValueError: The others named another number of parties, or this attempt is there already.
            NotInTask: The attempt has ended.
        """
        participant, task = self._participant, self._task
        with self._store.writing():
            running = task.select(task.id).where(IS_START & (task.id == id) & (task.attempt == attempt))
            if not running.exists():
                raise NotInTask(f"attempt {attempt} of task {id} has ended; it cannot come to a barrier any more")
            here = (participant.scope == scope) & (participant.name == name)
            waiting = _sound(participant.select().where(here & participant.outcome.is_null()))
            _check_company(waiting, id, attempt, name, parties)
            participant.delete().where(
                here & participant.outcome.is_null() & (participant.task_id == id)
            ).execute()  # counts once
            last = participant.select(peewee.fn.MAX(participant.generation)).where(here).scalar()
            generation = waiting[0]["generation"] if waiting else (0 if last is None else last + 1)
            row = {"scope": scope, "name": name, "generation": generation, "task_id": id, "attempt": attempt}
            row["parties"] = parties
            participant.insert(**row).execute()
            arrived = participant.select().where(here & participant.outcome.is_null()).count()
            keys: list[str] = []
            if arrived >= parties:
                participant.update(outcome=PASSED).where(here & (participant.generation == generation)).execute()
                keys.append(barrier_key(scope, name))
            elif self._is_hopeless(row):
                self._break(row, f"of its {parties} parties only {arrived} can come", keys)
            return generation, keys

    def outcome(self, id: int, scope: str, name: str, generation: int) -> str | None:
        """Return None while the barrier is closed, "passed", or the sentence that names the task that broke it."""
        with self._store.connected():
            return self._outcome(self._place(id, scope, name, generation))

    def leave(self, id: int, scope: str, name: str, generation: int) -> str | None:
        """Delete this participant's row after it went through or gave up; return what became of the barrier."""
        with self._store.writing():
            place = self._place(id, scope, name, generation)
            outcome = self._outcome(place)
            self._participant.delete().where(place).execute()
            return outcome

    def miss(self, id: int, reason: str | None, keys: list[str]) -> None:
        """Break the barriers at which an ended task will be missed; part of the transaction of its end."""
        participant, task = self._participant, self._task
        if (
            not participant.select(participant.id)
            .where(participant.outcome.is_null() | (participant.task_id == id))
            .exists()
        ):
            return
        self._break_where_it_waited(id, reason, keys)
        parent_id = task.select(task.parent_id).where(task.id == id).scalar()
        scopes = [parent_scope(one) for one in (parent_id, id) if one is not None]
        there: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in _sound(participant.select().where(participant.scope.in_(scopes) & participant.outcome.is_null())):
            there.setdefault((row["scope"], row["name"]), []).append(row)
        how = "ended without coming" if reason is None else f"was interrupted ({reason}) before it came"
        for rows in there.values():
            if self._is_hopeless(rows[0]) or any(self.edges.cycle(row["task_id"]) for row in rows):
                self._break(rows[0], f"task {id} {how}, and not enough others can come", keys)

    # Within

    def _place(self, id: int, scope: str, name: str, generation: int) -> Any:  # noqa: ANN401 - a Peewee condition
        participant = self._participant
        mine = (participant.scope == scope) & (participant.name == name) & (participant.generation == generation)
        return mine & (participant.task_id == id)

    def _outcome(self, place: Any) -> str | None:  # noqa: ANN401 - a Peewee condition
        rows = list(self._participant.select(self._participant.outcome).where(place).tuples())
        return rows[0][0] if rows else "this attempt has left it"

    def _break_where_it_waited(self, id: int, reason: str | None, keys: list[str]) -> None:
        participant = self._participant
        rows = list(participant.select().where((participant.task_id == id) & participant.outcome.is_null()).dicts())
        participant.delete().where(participant.task_id == id).execute()
        for row in rows if reason is not None else []:
            self._break(row, f"task {id} was interrupted ({reason}) while it waited there", keys)

    def _break(self, row: dict[str, Any], told: str, keys: list[str]) -> None:
        """Break the barrier at which *row* stands, for all that wait there."""
        participant = self._participant
        same = (participant.scope == row["scope"]) & (participant.name == row["name"]) & participant.outcome.is_null()
        participant.update(outcome=told).where(same).execute()
        keys.append(barrier_key(row["scope"], row["name"]))

    def _is_hopeless(self, row: dict[str, Any]) -> bool:
        """Whether not enough can come any more; of a barrier with a scope of its own that is not known."""
        return parent_of(row["scope"]) is not None and not self.edges.coming(row).can_come(())


def _sound(query: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a Peewee query
    """Return the rows of parties whose numbers can be read; one written by hand comes to no barrier."""
    numbers = ("generation", "task_id", "attempt", "parties")
    return [row for row in query.dicts() if all(row[number] is not None for number in numbers)]


def _check_company(waiting: list[dict[str, Any]], id: int, attempt: int, name: str, parties: int) -> None:
    for row in waiting:
        if (row["task_id"], row["attempt"]) == (id, attempt):
            raise ValueError(f'this task waits at the barrier "{name}" already')
        if row["parties"] != parties:
            others = f"task {row['task_id']} waits there for {row['parties']}"
            raise ValueError(
                f'parties of the barrier "{name}" is {parties}, but {others}; all must name the same number'
            )
