"""What people ask for: requests, cancels, suspensions, retries, and the deletion of old rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import peewee

from bgsupervisor.database.tables import IS_LIVE
from bgsupervisor.errors import AlreadyLive, DatabaseError, NotRetryable, NotSuspendable, ServerAway
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.ledger.queries import nothing_recorded, repeated
from bgsupervisor.ledger.records import ATTEMPT_COLUMNS, TaskRecord
from bgsupervisor.ledger.transitions import Transitions
from bgsupervisor.ledger.waits import Dependent
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

__all__ = ["Ledger", "Request"]

TWIN_TRIES = 5
DRAWS = 100
"""Limit of ids drawn for one request: a server that has crashed gives out some numbers twice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A task to record; `data` is checked JSON text, `unique_key` is held by one live task per name."""

    name: str
    data: str
    run_at: datetime | None = None
    priority: int = 0
    key: str | None = None
    unique_key: str | None = None
    parent_id: int | None = None
    after: tuple[int, ...] = ()
    after_any_end: bool = False


class Ledger(Transitions):
    """The rows of one installation: what is read, what supervisors write, what people ask for."""

    def request(self, request: Request) -> tuple[int, bool]:
        """Record a request; return (id, True), or the live twin's id and False if its unique key is held."""
        return self.request_many([request])[0]

    def request_many(self, requests: Sequence[Request]) -> list[tuple[int, bool]]:
        """Record requests in one transaction, all or none; return (id, created) for each, in order."""
        if len(requests) == 1 and requests[0].unique_key is None and not requests[0].after:
            return [(self._add(requests[0]), True)]
        return self._add_all(requests)

    def _add(self, request: Request) -> int:
        """Record a plain request by one statement, which can be repeated: by an id that was drawn for it before."""
        drawn, requested_at, tries = None, None, 0

        def add() -> int:
            nonlocal drawn, requested_at, tries
            with self.store.adding():
                for draws_left in range(DRAWS, 0, -1):
                    if drawn is None:
                        drawn, requested_at, tries = self.store.draw_id(), self.clock.now(), 0
                    tries += 1
                    try:
                        return self._insert(request, id=drawn, now=requested_at)[0]
                    except peewee.IntegrityError:
                        found = [] if drawn is None else self._records(self._task.id == drawn, limit=1)
                        if not found or draws_left == 1:
                            raise
                        written = (request.name, request.data, requested_at)
                        if tries > 1 and (found[0].name, found[0].data, found[0].requested_at) == written:
                            return found[0].id  # what was lost was only the answer
                        drawn = None  # another's: a server that has crashed gives out numbers twice
            raise AssertionError

        try:
            return self.store.persistently(add)
        except DatabaseError as error:
            if drawn is not None and (tries > 1 or isinstance(error, ServerAway)):
                raise self.store.undecided(error) from error
            if isinstance(error, ServerAway):
                raise nothing_recorded(error) from error
            raise

    @repeated
    def _add_all(self, requests: Sequence[Request]) -> list[tuple[int, bool]]:
        # No other row is touched, and an index keeps unique keys. Only a task that comes after others must know that
        # they do not end meanwhile.
        with self.store.writing(alone=any(request.after for request in requests)):
            return [self._insert(request) for request in requests]

    def _insert(self, request: Request, *, id: int | None = None, now: datetime | None = None) -> tuple[int, bool]:
        now = now or self.clock.now()
        row = (
            *(request.name, request.data, request.priority, request.key, request.unique_key),
            *(self._text(request.run_at or now), self._text(now), request.parent_id),
        )
        for on_id in request.after:
            self._get(on_id)
        if request.unique_key is None:
            id = self._put(row, id=id)
        else:
            id, created = self._insert_unique(request.name, request.unique_key, row)
            if not created:
                return id, False
        if request.after:
            broken = self.waits.depend(id, request.after, any_end=request.after_any_end)
            if broken is not None:
                self._fail_dependents([Dependent(id, 0)], broken, [])
        return id, True

    def _put(self, row: Sequence[object], *, id: int | None = None) -> int:
        texts = self._statements
        found = (
            self.store.rows_of(texts.request, row) if id is None else self.store.rows_of(texts.request_as, (id, *row))
        )
        return int(found[0][0])

    def _insert_unique(self, name: str, unique_key: str, row: Sequence[object]) -> tuple[int, bool]:
        """Insert a task, unless a live one holds its unique key; others may take it, or give it back, meanwhile."""
        for tries_left in range(TWIN_TRIES, 0, -1):
            twin = self._live_twin(name, unique_key)
            if twin is not None:
                return twin, False
            try:
                with self.store.database.atomic():
                    return self._put(row), True
            except peewee.IntegrityError:
                if tries_left == 1:
                    raise
        raise AssertionError

    def _live_twin(self, name: str, unique_key: str) -> int | None:
        task = self._task
        query = task.select(task.id).where(
            (task.name == name) & (task.unique_key == unique_key) & IS_LIVE,
        )
        rows = list(query.tuples())
        return int(rows[0][0]) if rows else None

    @repeated
    def cancel(self, id: int, *, by: str | None, keys: list[str] | None = None) -> TaskRecord:
        """End a waiting task at once; mark a running one, for its supervisor to end. An ended one is left alone.

        Adds the keys to notify after the commit to *keys*.
        """
        with self.store.writing():
            record = self._get(id, kept=True)  # a claim locks out no writer, only this row must be free
            if record.status is Status.REQUEST:
                self._withdraw(Attempt(id, record.attempt), by=by, keys=[] if keys is None else keys)
            elif record.status is Status.START and record.cancel_requested_at is None:
                asked = {"cancel_requested_at": self.clock.now(), "cancel_requested_by": by}
                self._where(Attempt(id, record.attempt), (Status.START,), asked)
            return self._get(id)

    @repeated
    def suspend(self, id: int, *, by: str | None) -> TaskRecord:
        """Mark a running task, for its supervisor to suspend; one that is marked already is left alone.

        Raises:
            UnknownTask: No such task.
            NotSuspendable: It does not run, or is being ended.
        """
        with self.store.writing():
            record = self._get(id)
            if record.status is not Status.START:
                raise NotSuspendable(id, record.status, f"it is {record.status}, only a running task can be")
            if record.cancel_requested_at is not None or record.ending is not None:
                raise NotSuspendable(id, record.status, "it is being ended")
            if record.suspend_requested_at is None:
                asked = {"suspend_requested_at": self.clock.now(), "suspend_requested_by": by}
                self._where(Attempt(id, record.attempt), (Status.START,), asked)
            return self._get(id)

    @repeated
    def resume(self, id: int) -> TaskRecord:
        """Remove the mark of a suspended task, for its supervisor to resume it; any other is left alone.

        Raises:
            UnknownTask: No such task.
        """
        with self.store.writing():
            record = self._get(id)
            self._where(Attempt(id, record.attempt), (Status.START,), {"suspend_requested_at": None})
            return self._get(id)

    @repeated
    def retry(self, id: int) -> TaskRecord:
        """Plan an interrupted task again, as it was requested; what its attempt left stays in `interruption`.

        Raises:
            UnknownTask: No such task.
            NotRetryable: It is not INTERRUPTED.
            AlreadyLive: A live task holds its unique key.
        """
        with self.store.writing():
            record = self._get(id)
            if record.status is not Status.INTERRUPTED:
                raise NotRetryable(id, record.status)
            if record.unique_key is not None:
                twin = self._live_twin(record.name, record.unique_key)
                if twin is not None:
                    raise AlreadyLive(twin, record.unique_key)
            try:
                with self.store.database.atomic():
                    self._move(
                        "retry",
                        Attempt(id, record.attempt),
                        {**dict.fromkeys(ATTEMPT_COLUMNS), "run_at": self.clock.now()},
                    )
            except peewee.IntegrityError:  # a request took its unique key just now
                unique_key = record.unique_key or ""
                raise AlreadyLive(self._live_twin(record.name, unique_key) or 0, unique_key) from None
            self.waits.forget_parts(id)
            return self._get(id)

    def prune(
        self, *, before: datetime, statuses: Collection[Status], names: Collection[str] | None, limit: int
    ) -> list[Attempt]:
        """Delete at most *limit* ended tasks that ended before a moment, the oldest first; return them.

        A task that is live, or whose parent's row is gone, is no obstacle and is never touched itself.
        """
        with self.store.writing():
            query = self._old(before=before, statuses=statuses, names=names).order_by(self._task.ended_at).limit(limit)
            found = [Attempt(id, attempt) for id, attempt in list(query.tuples())]
            ids = [attempt.id for attempt in found]
            self._interruption.delete().where(self._interruption.task_id.in_(ids)).execute()
            self.waits.forget_tasks(ids)
            self._task.delete().where(self._task.id.in_(ids)).execute()
            return found

    def count_old(self, *, before: datetime, statuses: Collection[Status], names: Collection[str] | None) -> int:
        """Return how many tasks `prune` would delete in all."""
        with self.store.connected():
            return int(self._old(before=before, statuses=statuses, names=names).count())

    def _old(self, *, before: datetime, statuses: Collection[Status], names: Collection[str] | None) -> Any:  # noqa: ANN401 - a Peewee query
        task = self._task
        ended = [str(status) for status in statuses if status.ended]
        query = task.select(task.id, task.attempt)
        query = query.where(task.ended_at.is_null(False) & (task.ended_at < before) & task.status.in_(ended))
        return query if names is None else query.where(task.name.in_([str(name) for name in names]))
