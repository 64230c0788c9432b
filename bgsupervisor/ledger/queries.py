"""What the ledger reads: tasks, the queue, supervisors. Writes no row."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import peewee

from bgsupervisor.database.sql import Statements
from bgsupervisor.database.tables import IS_REQUEST, IS_START
from bgsupervisor.database.values import read_status, read_text, read_time
from bgsupervisor.errors import ServerAway, UnknownTask
from bgsupervisor.ledger.attempts import ID_MAX, Attempt, ControlRequest, DueTask
from bgsupervisor.ledger.records import ATTEMPT_COLUMNS, SupervisorRecord, TaskRecord
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.store import Store

__all__ = ["Queries", "nothing_recorded", "repeated", "repeated_read"]

UNREADABLE_MAX = 100
"""Limit of waiting rows with an unreadable time that are passed over in search of the next one."""
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
_HEAVY = frozenset({"data", "result", "error", "stack"})
PRIORITIES_MAX = 50
"""Limit of priorities that are asked for one by one; the rest is sorted."""

P = ParamSpec("P")
T = TypeVar("T")
Q = TypeVar("Q", bound="Queries")


def repeated_read(method: Callable[Concatenate[Q, P], T]) -> Callable[Concatenate[Q, P], T]:
    """Repeat a method when the server has hung up (`Store.persistently`)."""

    @functools.wraps(method)
    def read(self: Q, /, *arguments: P.args, **named: P.kwargs) -> T:
        return self.store.persistently(lambda: method(self, *arguments, **named))

    return read


def repeated(method: Callable[Concatenate[Q, P], T]) -> Callable[Concatenate[Q, P], T]:
    """Repeat a method that is one transaction when the server has hung up; if that fails, report what was recorded."""

    @functools.wraps(method)
    def repeat(self: Q, /, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return self.store.persistently(lambda: method(self, *arguments, **named))
        except ServerAway as error:
            raise nothing_recorded(error) from error

    return repeat


def nothing_recorded(error: ServerAway) -> ServerAway:
    """Return the error of a call that has recorded nothing."""
    return ServerAway(f"{error}; nothing was recorded")


class Queries:
    """The rows of one installation, to be read.

    Every method blocks for at most the store's busy timeout; on PostgreSQL, where the server is slow or away, also for
    its `statement_timeout` and the store's `patience_s`.

    Args:
        store: Where they are.
        clock: The time that is written and compared; None takes the store's, which is the same on all machines.

    Raises (from every method):
        DatabaseError, AccessError: The database is away, locked, full or not writable.
    """

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self.store = store
        self.clock = clock or store.clock
        self._task = store.tables.Task
        self._interruption = store.tables.Interruption
        self._supervisor = store.tables.Supervisor
        self._statements = Statements(
            store.tables.prefix, mark=store.database.param, locks_rows=store.locks_rows, cleared=ATTEMPT_COLUMNS
        )

    @repeated_read
    def status(self, id: int) -> Status | None:
        """Return a task's status, or None if there is no such row; reads nothing else of it."""
        if not 0 < id <= ID_MAX:
            return None
        with self.store.connected():
            found = self._task.select(self._task.status).where(self._task.id == id).scalar()
        return None if found is None else read_status(found) or Status.INTERRUPTED  # as `TaskRecord` has it

    @repeated_read
    def get(self, id: int) -> TaskRecord | None:
        """Return a task, or None if there is no such row."""
        if not 0 < id <= ID_MAX:
            return None
        records = self._records(self._task.id == id, limit=1)
        return records[0] if records else None

    def newest(self, name: str, *, key: str | None = None) -> TaskRecord | None:
        """Return the newest task of a name (and key), or None."""
        records = self.find(names=[name], key=key, limit=1)
        return records[0] if records else None

    def find(
        self,
        *,
        names: Collection[str] | None = None,
        key: str | None = None,
        statuses: Collection[Status] | None = None,
        limit: int | None = None,
    ) -> list[TaskRecord]:
        """Return tasks that match all that is given, newest first."""
        task = self._task
        conditions = []
        if names is not None:
            conditions.append(task.name.in_([str(name) for name in names]))
        if key is not None:
            conditions.append(task.key == key)
        if statuses is not None:
            conditions.append(task.status.in_([str(status) for status in statuses]))
        return self._records(*conditions, limit=limit)

    def interruptions(self, id: int) -> list[dict[str, Any]]:
        """Return the interrupted attempts of a task, oldest first."""
        row = self._interruption
        query = row.select().where(row.task_id == id).order_by(row.attempt, row.id)
        with self.store.connected():
            rows = list(query.dicts())
        instead = {"attempt": 0, "reason": "?", "ended_at": _NEVER}
        return [{**row, **{name: value for name, value in instead.items() if row[name] is None}} for row in rows]

    def counts(self, name: str | None = None) -> dict[Status, int]:
        """Return how many tasks (of a name) have each status, zeros included."""
        task = self._task
        query = task.select(task.status, peewee.fn.COUNT(task.id)).group_by(task.status)
        if name is not None:
            query = query.where(task.name == name)
        with self.store.connected():
            found = dict(query.tuples())
        return {status: int(found.get(status.value, 0)) for status in Status}

    def live_counts(self) -> dict[Status, int]:
        """Return how many tasks wait and run; from partial indexes, whatever has ended."""
        count = self._task.select(peewee.fn.COUNT(self._task.id))
        with self.store.connected():
            return {
                Status.REQUEST: int(count.where(IS_REQUEST).scalar()),
                Status.START: int(count.where(IS_START).scalar()),
            }

    def ended_since(self, since: datetime, *, limit: int) -> list[TaskRecord]:
        """Return tasks that have ended since a moment, in the order of their ends; without data, result and stack."""
        task = self._task
        light = {"data": "", "result": None, "stack": None}
        columns = [field for field in task._meta.sorted_fields if field.name not in light]  # noqa: SLF001 - documented
        query = task.select(*columns).where(task.ended_at.is_null(False) & (task.ended_at >= since))
        query = query.order_by(task.ended_at, task.id).limit(limit)
        with self.store.connected():
            found = [TaskRecord.from_row({**row, **light}) for row in self.store.raw(query)]
        return [record for record in found if record.ended_at is not None]

    def waiting_count(self) -> int:
        """Return how many of the running tasks wait for others, without a slot."""
        with self.store.connected():
            return int(self._task.select().where(IS_START & self._task.slot.is_null()).count())

    def ended_on(self, host: str, since: datetime, *, limit: int) -> tuple[list[TaskRecord], int]:
        """Return what has run on a host and ended since a moment, the first *limit* in that order; and how many."""
        task = self._task
        condition = task.ended_at.is_null(False) & (task.ended_at >= since) & (task.host == host)
        with self.store.connected():
            count = int(task.select().where(condition).count())
            query = task.select().where(condition).order_by(task.ended_at, task.id).limit(limit)
            return [TaskRecord.from_row(row) for row in self.store.raw(query)] if count else [], count

    def ended_counts(self, since: datetime) -> dict[Status, int]:
        """Return how many tasks have ended since a moment, DONE and INTERRUPTED, zeros included."""
        task = self._task
        query = task.select(task.status, peewee.fn.COUNT(task.id)).group_by(task.status)
        query = query.where(task.ended_at.is_null(False) & (task.ended_at >= since))
        with self.store.connected():
            found = dict(query.tuples())
        return {status: int(found.get(status.value, 0)) for status in (Status.DONE, Status.INTERRUPTED)}

    def starts(self) -> list[TaskRecord]:
        """Return all running tasks, in order of their ids; without data, result, error and stack."""
        with self.store.connected():
            return self._starts()

    def control_requests(self) -> list[ControlRequest]:
        """Return the running attempts that people want cancelled or suspended, and by whom."""
        with self.store.connected():
            rows = self.store.rows_of(self._statements.control_requests)
        return [
            ControlRequest(
                Attempt(id, attempt), bool(cancelled), None if by is None else read_text(by), bool(suspended)
            )
            for id, attempt, cancelled, by, suspended in rows
        ]

    def due(
        self, names: Collection[str], *, limit: int, unlocked: bool = False, at: datetime | None = None
    ) -> list[DueTask]:
        """Return waiting tasks of *names* whose time has come: by priority, then the earlier, then the lower id.

        At a moment, now if none is given; *unlocked* leaves out the rows that are locked.
        Walks the priorities one by one, each a range of the partial index, so that neither finished rows nor millions
        of rows planned for later cost anything.
        """
        now, names, texts = self._text(at or self.clock.now()), [str(name) for name in names], self._statements
        found: list[DueTask] = []
        with self.store.connected():
            if not names or not self.store.rows_of(texts.any_due, [now]):
                return []
            for number, priority in enumerate(self._priorities()):
                # With very many priorities it is cheaper to sort what is due than to ask for each.
                last = number == PRIORITIES_MAX
                statement = texts.due(len(names), "<=" if last else "=", unlocked=unlocked)
                values = [now, *names, priority, limit - len(found)]
                found += [DueTask.of(row) for row in self.store.rows_of(statement, values)]
                if last or len(found) >= limit:
                    break
        return found

    def next_due_at(self, *, after: datetime | None = None) -> datetime | None:
        """Return the first moment after another, now if none is given, at which a task becomes due; or None.

        A caller of `due` passes the same moment here, or misses what became due in between.
        """
        held: object = self._text(after or self.clock.now())
        with self.store.connected():
            for _ in range(UNREADABLE_MAX):
                rows = self.store.rows_of(self._statements.next_due_at, [held])
                if not rows:
                    return None
                held = rows[0][0]
                moment = read_time(held)
                if moment is not None:
                    return moment
        return None

    def oldest_due_at(self, names: Collection[str] | None = None) -> datetime | None:
        """Return since when the task (of *names*) that has waited longest could have started; None if none waits."""
        task = self._task
        is_due = IS_REQUEST & (task.run_at <= self.clock.now())
        if names is not None:
            is_due &= task.name.in_(list(names))
        query = task.select(task.run_at).where(is_due).order_by(task.run_at).limit(1)
        with self.store.connected():
            return next((moment for (moment,) in query.tuples()), None)

    def position(self, record: TaskRecord) -> int:
        """Return a waiting task's place in the queue: 1 plus the due tasks that go before it."""
        task = self._task
        sooner = (task.priority > record.priority) | (
            (task.priority == record.priority)
            & ((task.run_at < record.run_at) | ((task.run_at == record.run_at) & (task.id < record.id)))
        )
        is_due = IS_REQUEST & (task.run_at <= self.clock.now()) & ~peewee.fn.EXISTS(self._must_wait())
        query = task.select(peewee.fn.COUNT(task.id)).where(is_due & sooner)
        with self.store.connected():
            return 1 + int(query.scalar())

    def supervisors(self) -> list[SupervisorRecord]:
        """Return the supervisor last seen on each host."""
        with self.store.connected():
            rows = list(self._supervisor.select().dicts())
        return [one for one in map(SupervisorRecord.from_row, rows) if one is not None]

    def _must_wait(self) -> Any:  # noqa: ANN401 - a Peewee query
        """Return the query for what a task must still come after."""
        dependency = self.store.tables.Dependency
        return dependency.select(dependency.id).where(dependency.task_id == self._task.id)

    def _priorities(self) -> Iterable[object]:
        rows = self.store.rows_of(self._statements.priority)
        while (priority := rows[0][0]) is not None:
            yield priority  # as it is: in SQLite what is no number sorts above all numbers
            rows = self.store.rows_of(self._statements.priority_below, [priority])

    def _starts(self) -> list[TaskRecord]:
        """Return the running tasks without data, result, error and stack, which may be megabytes."""
        task = self._task
        columns = [field for field in task._meta.sorted_fields if field.name not in _HEAVY]  # noqa: SLF001 - documented
        query = task.select(*columns).where(IS_START).order_by(task.id)
        light = {"data": "", "result": None, "error": None, "stack": None}
        return [TaskRecord.from_row({**row, **light}) for row in self.store.raw(query)]

    def _get(self, id: int, *, kept: bool = False) -> TaskRecord:
        found = self._records(self._task.id == id, limit=1, kept=kept) if 0 < id <= ID_MAX else []
        if not found:
            raise UnknownTask(id)
        return found[0]

    def _records(self, *conditions: peewee.Node, limit: int | None, kept: bool = False) -> list[TaskRecord]:
        query = self._task.select().order_by(self._task.id.desc())
        if conditions:
            query = query.where(*conditions)
        if limit is not None:
            query = query.limit(limit)
        if kept:
            query = self.store.kept(query)
        with self.store.connected():
            return [TaskRecord.from_row(row) for row in self.store.raw(query)]

    def _text(self, moment: datetime | None) -> str | None:
        text: str | None = self._task.started_at.db_value(moment)
        return text
