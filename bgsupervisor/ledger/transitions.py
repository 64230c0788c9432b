"""The table of transitions and the compare-and-set; what a supervisor writes in one pass.

Every transition stands in TRANSITIONS and is one compare-and-set on (id, attempt, status). A row count of 0 means
that another process decided; it is reported to the caller and never overwrites. Effects outside the database (wake-ups,
signals, acknowledgements) are the caller's, after the commit.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from bgsupervisor import failpoints
from bgsupervisor.database.errors import is_passing
from bgsupervisor.database.tables import IS_REQUEST
from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger.attempts import (
    ATTEMPT_MAX,
    Attempt,
    Batch,
    BatchResult,
    Claim,
    DueTask,
    IntendedEnd,
    Suspension,
    Telemetry,
)
from bgsupervisor.ledger.queries import Queries, repeated
from bgsupervisor.ledger.records import ATTEMPT_COLUMNS
from bgsupervisor.ledger.waits import EVERYBODY, Dependent, Waits, task_key
from bgsupervisor.statuses import Reason, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.store import Store
    from bgsupervisor.system.processes import ProcessIdentity

__all__ = [
    "TRANSITIONS",
    "Transition",
    "Transitions",
]

log = logging.getLogger("bgsupervisor")

T = TypeVar("T")

ROWS_AT_ONCE = 500
"""Limit of rows that one statement writes: databases take at most about 30,000 values."""


@dataclasses.dataclass(frozen=True, slots=True)
class Transition:
    """One row of the transition table: the event takes a task from one of *sources* to *target*."""

    event: str
    sources: tuple[Status, ...]
    target: Status
    by: str


TRANSITIONS = (
    Transition("request", (), Status.REQUEST, "service"),
    Transition("claim", (Status.REQUEST,), Status.START, "supervisor"),
    Transition("unclaim", (Status.START,), Status.REQUEST, "supervisor or child, which knows that it never began"),
    Transition("finish", (Status.START,), Status.DONE, "supervisor for the child, or the child"),
    Transition("interrupt", (Status.START,), Status.INTERRUPTED, "supervisor, or the child"),
    Transition(
        "withdraw", (Status.REQUEST,), Status.INTERRUPTED, "service (cancel of a waiting task), supervisor (a bad row)"
    ),
    Transition("retry", (Status.INTERRUPTED,), Status.REQUEST, "a person"),
)
_BY_EVENT = {transition.event: transition for transition in TRANSITIONS}

_SPOILT = (peewee.PeeweeException, ValueError, TypeError, OverflowError)
"""Errors of a row that cannot be written, or whose neighbours cannot be read."""

_NOT_RUNNING: dict[str, Any] = dict.fromkeys(
    ("slot", "cpu_percent", "rss_bytes", "suspend_requested_at", "suspended_at", "suspended_mono")
)
_NEVER_ENDED = (*_NOT_RUNNING, "ending", "detail", "stack")
"""These and what an intended end leaves in the row; a body that returns all the same is DONE."""


class Transitions(Queries):
    """What a supervisor or a child writes. Arguments and errors as `Queries`."""

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        super().__init__(store, clock)
        self.waits = Waits(store, self.clock)

    # What a supervisor writes

    def apply(self, batch: Batch) -> BatchResult:
        """Write a whole pass in one transaction; if one row spoils it, row by row, so that the others are kept.

        Raises:
            DatabaseError, AccessError: Nothing was written; the same batch can be applied later.
        """
        missed: list[Claim] = []
        try:
            # A claim touches only its own row: it locks out no writer, and waits for none.
            with self.store.adding() if batch.only_claims else self.store.writing():
                outcome = self._apply(batch, missed, row_by_row=False)
        except _SPOILT as error:
            log.log(_level(error), "a batch could not be written (%s); writing it row by row", error)
            missed.clear()
            with self.store.writing():
                outcome = self._apply(batch, missed, row_by_row=True)
        if missed:
            outcome.passed_over = self._passed_over(missed)
        return outcome

    def _apply(self, batch: Batch, missed: list[Claim], *, row_by_row: bool) -> BatchResult:
        outcome, write = BatchResult(), self._write_alone if row_by_row else _write
        size = 1 if row_by_row else ROWS_AT_ONCE
        self._apply_ends(batch, outcome, row_by_row=row_by_row)
        outcome.unclaimed = {attempt for attempt in batch.unclaims if self._unclaim(attempt, outcome.keys)}
        for due in batch.flawed:
            if write(f"that task {due.id} cannot run", self._strike, due, outcome.keys):
                outcome.struck.add(due.id)
        for attempt, intended in batch.intended_ends.items():
            if write(f"the intended end of task {attempt.id}", self._intend, attempt, intended):
                outcome.intended_ends.add(attempt)
        for attempt, suspension in batch.suspensions.items():
            if write(f"that task {attempt.id} is suspended", self._suspend, attempt, suspension):
                outcome.suspensions.add(attempt)
        for some in _groups([one for one in batch.telemetry.items() if one[1]], size):
            write(f"a note of task {some[0][0].id}", self._note, some)
        for attempt, grant in batch.returns.items():
            if write(f"the slot of task {attempt.id}", self.waits.grant, attempt.id, attempt.attempt, *grant):
                outcome.returned.add(attempt)
        for claims in _groups(batch.claims, size):
            write(f"the claim of task {claims[0].due.id}", self._claim, claims, outcome, missed)
        if batch.supervisor is not None:
            row = dataclasses.asdict(batch.supervisor)
            insert = self._supervisor.insert(**row)
            insert.on_conflict(conflict_target=["host"], preserve=list(row.keys() - {"host"})).execute()
        return outcome

    def _apply_ends(self, batch: Batch, outcome: BatchResult, *, row_by_row: bool) -> None:
        written = set() if row_by_row else self._finish_plain(batch.ends, outcome)
        write = self._write_alone if row_by_row else _write
        for attempt, end in batch.ends.items():
            if attempt not in written:
                ended = write(f"the end of task {attempt.id}", self._end, attempt, end, outcome)
                if not ended and row_by_row:
                    self._end(attempt, _unwritable(end), outcome)
            if attempt not in outcome.ended:
                outcome.keys.append(EVERYBODY)  # the process that recorded it may not have been able to notify

    def _finish_plain(self, ends: Mapping[Attempt, AttemptResult], outcome: BatchResult) -> set[Attempt]:
        """End as DONE all that hold nothing and that nothing waits for, many by one statement; return which."""
        found: set[Attempt] = set()
        for some in _groups([(attempt, end) for attempt, end in ends.items() if end.reason is None], ROWS_AT_ONCE):
            concerned = self.waits.concerned(self._statements, [attempt.id for attempt, _ in some])
            plain = [(attempt, end) for attempt, end in some if attempt.id not in concerned]
            self._finish(plain, outcome, holds=False)
            found.update(attempt for attempt, _ in plain)
        return found

    def _write_alone(self, what: str, method: Callable[..., bool], *arguments: Any) -> bool:  # noqa: ANN401 - the method's own
        """Write one row in a savepoint; False, and an error in the log, if it cannot be written."""
        try:
            with self.store.database.atomic():
                return method(*arguments)
        except _SPOILT as error:
            if is_passing(error):
                raise
            log.log(_level(error, logging.ERROR), "%s cannot be written: %s", what, error)
            return False

    def _claim(self, claims: Sequence[Claim], outcome: BatchResult, missed: list[Claim]) -> bool:
        """Claim tasks, all in one statement; add the claims that failed to *missed*."""
        values: list[object] = []
        for claim in claims:
            ref = claim.identity
            values += [claim.due.id, claim.due.attempt, ref.host, ref.boot_id, ref.pid_ns, ref.pid, ref.start_ticks]
            values += [claim.slot, claim.started_mono]
        now = self._text(self.clock.now())
        statement = self._statements.claim(len(claims))
        claimed = {Attempt(*row) for row in self.store.rows_of(statement, [*values, now, now])}
        outcome.claimed += [claim for claim in claims if claim.attempt in claimed]
        missed += [claim for claim in claims if claim.attempt not in claimed]
        return bool(claimed)

    def _note(self, telemetry: Sequence[tuple[Attempt, Telemetry]]) -> bool:
        """Record telemetry of running attempts, all in one statement."""
        values: list[object] = []
        for attempt, note in telemetry:
            values += [attempt.id, attempt.attempt, self._text(note.heartbeat_at), note.progress_done]
            values += [note.progress_total, note.message, note.cpu_s, note.cpu_percent, note.rss_bytes]
            values += [note.peak_rss_bytes, note.stack]
        return bool(self.store.rows_of(self._statements.note(len(telemetry)), values))

    def _passed_over(self, missed: Sequence[Claim]) -> list[Claim]:
        """Return the claims whose tasks still wait, because their rows were locked; log the others."""
        task = self._task
        query = task.select(task.id, task.attempt).where(IS_REQUEST & task.id.in_([claim.due.id for claim in missed]))
        try:
            with self.store.connected():
                waiting = set(query.tuples())
        except (DatabaseError, AccessError):
            return []  # all is written, and the next reading of the queue shows what became of them
        for claim in missed:
            if (claim.due.id, claim.due.attempt) not in waiting:
                _log_too_late("claim", Attempt(claim.due.id, claim.due.attempt))
        return [claim for claim in missed if (claim.due.id, claim.due.attempt) in waiting]

    def _intend(self, attempt: Attempt, intended: IntendedEnd) -> bool:
        return self._where(attempt, (Status.START,), {"ending": intended.reason, "detail": intended.detail})

    def _suspend(self, attempt: Attempt, suspension: Suspension) -> bool:
        values = {
            "suspended_at": suspension.since,
            "suspended_mono": suspension.since_mono,
            "suspended_s": round(suspension.total_s, 3),
        }
        return self._where(attempt, (Status.START,), values)

    def _unclaim(self, attempt: Attempt, keys: list[str]) -> bool:
        record = self.get(attempt.id)
        if not self._move("unclaim", attempt, dict.fromkeys(ATTEMPT_COLUMNS)):
            return False
        if record is not None and record.cancel_requested_at is not None:
            self._withdraw(attempt, by=record.cancel_requested_by, keys=keys)
        return True

    def _strike(self, due: DueTask, keys: list[str]) -> bool:
        """Interrupt a waiting task whose row cannot be read."""
        detail = f"its row cannot be read: {due.flaw}"
        values = {"reason": Reason.RAISED, "detail": detail, "ended_at": self.clock.now()}
        if not self._move("withdraw", Attempt(due.id, due.attempt), values):
            return False
        self._fail_dependents(self._resolve_withdrawn(due.id, keys), due.id, keys)
        return True

    def _withdraw(self, attempt: Attempt, *, by: str | None, keys: list[str]) -> bool:
        now = self.clock.now()
        detail = f"cancelled by {by} before it began" if by else "cancelled before it began"
        values = {"reason": Reason.CANCELLED, "detail": detail, "ended_at": now}
        if not self._move("withdraw", attempt, {**values, "cancel_requested_at": now, "cancel_requested_by": by}):
            return False
        self._fail_dependents(self._resolve_withdrawn(attempt.id, keys), attempt.id, keys)
        return True

    # What a child writes when no supervisor acknowledges

    def end(self, attempt: Attempt, end: AttemptResult, keys: list[str] | None = None) -> bool:
        """Record the end of an attempt; False if it had been recorded, or the attempt was superseded.

        Adds the keys to notify after the commit to *keys*.
        """
        outcome = self.apply(Batch(ends={attempt: end}))
        if keys is not None:
            keys += outcome.keys
        return attempt in outcome.ended

    @repeated
    def unclaim_not_started(self, identity: ProcessIdentity, keys: list[str]) -> int:
        """Give back the claims of a child that leaves before it began them; return how many.

        Adds the keys to notify after the commit to *keys*.
        """
        with self.store.writing():
            attempts = [
                Attempt(record.id, record.attempt)
                for record in self._starts()
                # guard, always: a child gives back only its own claims
                if (record.pid, record.start_ticks, record.boot_id)
                == (identity.pid, identity.start_ticks, identity.boot_id)
            ]
            return sum(self._unclaim(attempt, keys) for attempt in attempts)

    def _end(self, attempt: Attempt, end: AttemptResult, outcome: BatchResult) -> bool:
        if end.reason is None:
            return self._finish([(attempt, end)], outcome, holds=True)
        return self._interrupt(attempt, end, outcome)

    def _finish(self, ends: Sequence[tuple[Attempt, AttemptResult]], outcome: BatchResult, *, holds: bool) -> bool:
        """End attempts as DONE, all in one statement; free what they hold, if they can hold anything."""
        if not ends:
            return False
        values: list[object] = []
        for attempt, end in ends:
            values += [attempt.id, attempt.attempt, end.result, end.exit_code, end.signal, end.cpu_s]
            values += [end.progress_done, end.progress_total, end.message, end.peak_rss_bytes]
        statement = self._statements.finish(len(ends), _NEVER_ENDED)
        rows = self.store.rows_of(statement, [*values, self._text(self.clock.now())])
        finished = {Attempt(*row) for row in rows}
        for attempt, _ in ends:
            if attempt in finished:
                self._release(attempt, None, outcome.keys, holds=holds)
                outcome.ended.add(attempt)
            else:
                _log_too_late("finish", attempt)
        return bool(finished)

    def _interrupt(self, attempt: Attempt, end: AttemptResult, outcome: BatchResult) -> bool:
        known = {
            "exit_code": end.exit_code,
            "signal": end.signal,
            "cpu_s": end.cpu_s,
            "progress_done": end.progress_done,
            "progress_total": end.progress_total,
            "message": end.message,
            "stack": end.stack,
        }
        values: dict[str, Any] = {column: value for column, value in known.items() if value is not None}
        values |= {**_NOT_RUNNING, "ended_at": self.clock.now()}
        if end.peak_rss_bytes is not None:
            peak = self._task.peak_rss_bytes
            values["peak_rss_bytes"] = peewee.Case(None, ((peak > end.peak_rss_bytes, peak),), end.peak_rss_bytes)
        # The process that sees the death reports a reason; an intended end, recorded before the signal, overrides it.
        # guard, never: the recorded reason wins over what the death looks like
        ordered = self._task.ending.in_([str(reason) for reason in Reason])
        case = peewee.Case(None, ((ordered, self._task.ending),), str(end.reason))
        detail = peewee.Case(None, ((ordered, self._task.detail),), end.detail)
        values |= {"reason": case, "detail": detail, "error": end.error, "tries": self._one_more(self._task.tries)}
        if not self._move("interrupt", attempt, values):
            return False
        self._release(attempt, self._remember_interruption(attempt), outcome.keys)
        outcome.ended.add(attempt)
        return True

    def _one_more(self, count: Any) -> Any:  # noqa: ANN401 - a Peewee column and expression
        return peewee.Case(None, ((count < ATTEMPT_MAX, count + 1),), count)  # PostgreSQL refuses what is larger

    def _release(self, attempt: Attempt, reason: Reason | None, keys: list[str], *, holds: bool = True) -> None:
        """Release what an ended attempt held, and resolve its dependents, in the transaction of its end."""
        failpoints.at("ledger.ended")
        # guard: an end frees its locks
        keys += self.waits.free(attempt.id, attempt.attempt, reason=reason) if holds else [task_key(attempt.id)]
        failpoints.at("ledger.freed")
        if holds:
            self._fail_dependents(
                self.waits.resolve_dependents(attempt.id, done=reason is None, keys=keys), attempt.id, keys
            )

    def _fail_dependents(self, dependents: Iterable[Dependent], on_id: int, keys: list[str]) -> None:
        """Interrupt waiting tasks that had to come after one which will not be DONE, and in turn those after them."""
        todo = [(one, on_id) for one in dependents]
        for one, before_id in todo:  # grows meanwhile
            detail = f"had to come after task {before_id}, which was interrupted"
            values = {"reason": Reason.DEPENDENCY, "detail": detail, "ended_at": self.clock.now()}
            if self._move("withdraw", Attempt(one.id, one.attempt), values):
                todo += [(following, one.id) for following in self._resolve_withdrawn(one.id, keys)]

    def _resolve_withdrawn(self, id: int, keys: list[str]) -> list[Dependent]:
        keys.append(task_key(id))
        self.waits.barriers.miss(id, self._get(id).reason, keys)
        self.waits.forget_dependencies(id)
        return self.waits.resolve_dependents(id, done=False, keys=keys)

    def _remember_interruption(self, attempt: Attempt) -> Reason | None:
        record = self._get(attempt.id)
        self._interruption.insert(
            task_id=record.id,
            attempt=record.attempt,
            reason=record.reason,
            detail=record.detail,
            error=record.error,
            stack=record.stack,
            exit_code=record.exit_code,
            signal=record.signal,
            host=record.host,
            pid=record.pid,
            started_at=record.started_at,
            ended_at=record.ended_at,
        ).execute()
        return record.reason

    # The compare-and-set itself

    def _move(self, event: str, attempt: Attempt, values: dict[str, Any]) -> bool:
        """Make the transition *event*; False, and a line in the log, if another process had decided."""
        transition = _BY_EVENT[event]
        changed = self._where(attempt, transition.sources, {**values, "status": transition.target})
        if not changed:
            _log_too_late(event, attempt)
        return changed

    def _where(self, attempt: Attempt, statuses: Iterable[Status], values: dict[str, Any]) -> bool:
        if not values:
            return True
        task = self._task
        query = task.update(**values).where(
            task.id == attempt.id,
            # guard: the compare-and-set names the attempt
            task.attempt == attempt.attempt,
            # guard: the compare-and-set names the status
            task.status.in_(list(statuses)),
        )
        return int(query.execute()) == 1


def _write(what: str, method: Callable[..., bool], *arguments: Any) -> bool:  # noqa: ANN401, ARG001 - as _write_alone
    return method(*arguments)


def _groups(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Split rows into lists that one statement writes."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _log_too_late(event: str, attempt: Attempt) -> None:
    log.info("task %d, attempt %d: %s came too late, the row says otherwise", attempt.id, attempt.attempt, event)


def _level(error: Exception, level: int = logging.WARNING) -> int:
    """Return the level of a message; a slot that another child has just taken is no warning."""
    return logging.INFO if isinstance(error, peewee.IntegrityError) else level


def _unwritable(end: AttemptResult) -> AttemptResult:
    return AttemptResult(
        reason=Reason.RAISED,
        detail="its end could not be written to the database: the result or the error text is not storable",
        exit_code=end.exit_code,
        signal=end.signal,
    )
