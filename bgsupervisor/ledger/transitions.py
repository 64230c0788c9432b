"""The only writer of rows: requests, transitions, progress. Knows no signals and nothing a PID means.

Every transition stands in TRANSITIONS and is one compare-and-set on (id, attempt, status). A row count of 0 means
that somebody else decided; it is reported to the caller and never overwrites. Effects outside the database (wake-ups,
signals, acknowledgements) are the caller's, after the commit.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from datetime import UTC, datetime
from types import NoneType
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import peewee

from bgsupervisor import failpoints
from bgsupervisor.database.sql import Statements
from bgsupervisor.database.store import SupervisorRecord, TaskRecord, is_passing, read_status, read_text, read_time
from bgsupervisor.errors import (
    AccessError,
    AlreadyLive,
    DatabaseError,
    NotRetryable,
    NotSuspendable,
    ServerAway,
    UnknownTask,
)
from bgsupervisor.ipc.messages import AttemptResult, Run
from bgsupervisor.ledger.waits import EVERYBODY, Dependent, Waits, task_key
from bgsupervisor.statuses import Reason, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.store import Store
    from bgsupervisor.system.processes import ProcessIdentity

__all__ = [
    "TRANSITIONS",
    "Attempt",
    "Batch",
    "Claim",
    "ControlRequest",
    "DueTask",
    "Ending",
    "Ledger",
    "Outcome",
    "Request",
    "SlotGrant",
    "Suspension",
    "Telemetry",
    "Transition",
]

log = logging.getLogger("bgsupervisor")

P = ParamSpec("P")
T = TypeVar("T")

TWIN_TRIES = 5
UNREADABLE_MAX = 100
"""So many waiting rows are passed over whose time cannot be read, in search of the next one."""
DRAWS = 100
"""A server that has crashed gives out again some numbers that others hold, one after the other."""
ROWS_AT_ONCE = 500
"""One statement writes at most so many rows: databases take no more than some 30,000 values."""
ATTEMPT_MAX = 2**31 - 1
"""No attempt comes after this one: PostgreSQL's columns hold no larger number."""
ID_MAX = 2**63 - 1
"""The largest number that a row can have; databases take no larger one even to look for."""


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

# Literals, not parameters: SQLite uses a partial index only where it can see that the query implies its condition.
_IS_REQUEST = peewee.SQL("\"status\" = 'REQUEST'")
_IS_START = peewee.SQL("\"status\" = 'START'")
_IS_LIVE = peewee.SQL("\"status\" IN ('REQUEST', 'START')")

_SPOILT = (peewee.PeeweeException, ValueError, TypeError, OverflowError)
"""What a row raises that cannot be written, or beside which something stands that nobody can read."""
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

# What an attempt leaves in its row; cleared when another attempt is to begin.
_ATTEMPT_COLUMNS = (
    "reason", "detail", "started_at", "started_mono", "ended_at", "heartbeat_at", "ending", "host", "boot_id",
    "pid_ns", "pid", "start_ticks", "slot", "progress_done", "progress_total", "message", "result", "error",
    "exit_code", "signal", "cpu_s", "cpu_percent", "rss_bytes", "peak_rss_bytes", "cancel_requested_at",
    "cancel_requested_by", "suspend_requested_at", "suspend_requested_by", "suspended_at", "suspended_mono",
    "suspended_s", "stack",
)  # fmt: skip
_HEAVY = frozenset({"data", "result", "error", "stack"})
PRIORITIES_MAX = 50
"""So many priorities are asked for one by one; the rest is sorted."""
_CLEARED: dict[str, Any] = dict.fromkeys(_ATTEMPT_COLUMNS)
_NOT_RUNNING: dict[str, Any] = dict.fromkeys(
    ("slot", "cpu_percent", "rss_bytes", "suspend_requested_at", "suspended_at", "suspended_mono")
)
_NEVER_ENDED = (*_NOT_RUNNING, "ending", "detail", "stack")
"""With what the order to end an attempt has left in its row; a body that returns all the same is DONE."""


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


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try at a task: the fencing token that every compare-and-set names."""

    id: int
    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class DueTask:
    """A REQUEST row that may start now; `attempt` is the one before.

    Attributes:
        flaw: What cannot be read of the row, as a sentence: it can only be interrupted. Else None.
    """

    id: int
    attempt: int
    name: str
    data: str
    key: str | None
    parent_id: int | None = None
    flaw: str | None = None

    @classmethod
    def of(cls, row: Sequence[Any]) -> DueTask:
        """Make one of what a row holds, which in SQLite can be anything."""
        id, attempt, name, data, key, parent_id = row
        is_attempt = isinstance(attempt, int) and 0 <= attempt < ATTEMPT_MAX
        sound = {
            "attempt": is_attempt,
            "name": isinstance(name, str),
            "data": isinstance(data, str),
            "key": isinstance(key, str | int | None),
            "parent_id": parent_id is None or (isinstance(parent_id, int) and 0 < parent_id <= ID_MAX),
        }
        held = dict(zip(sound, row[1:], strict=True))
        flaw = next((_flaw(column, held[column]) for column in sound if not sound[column]), None)
        key = None if key is None else read_text(key)
        return cls(id, attempt, read_text(name), read_text(data), key, parent_id, flaw)


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A due task, the child that is to run it and the slot it takes."""

    due: DueTask
    identity: ProcessIdentity
    slot: int
    started_mono: float

    @property
    def attempt(self) -> Attempt:
        """The attempt that the claim begins."""
        return Attempt(self.due.id, self.due.attempt + 1)

    def assignment(self) -> Run:
        """Return the order by which the child begins it."""
        due = self.due
        return Run(
            id=due.id,
            attempt=self.attempt.attempt,
            name=due.name,
            data=due.data,
            key=due.key,
            parent_id=due.parent_id,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """Why an attempt will have been ended, recorded before the first signal is sent."""

    attempt: Attempt
    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class ControlRequest:
    """What people want of a running attempt."""

    attempt: Attempt
    cancelled: bool
    cancelled_by: str | None
    suspended: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Suspension:
    """How long an attempt has been suspended.

    Attributes:
        since: Since when it is; None if it is not.
        since_mono: The same, monotonic.
        total_s: How long it was before.
    """

    since: datetime | None = None
    since_mono: float | None = None
    total_s: float = 0.0

    @property
    def lasts(self) -> bool:
        """Whether it is suspended."""
        return self.since_mono is not None

    def ended(self, now_mono: float) -> Suspension:
        """Return what it comes to if it goes on now."""
        return Suspension(total_s=self.total_s + max(0.0, now_mono - (self.since_mono or now_mono)))


@dataclasses.dataclass(slots=True)
class Telemetry:
    """What is known of a running attempt at the moment; None leaves the column as it is."""

    heartbeat_at: datetime | None = None
    progress_done: float | None = None
    progress_total: float | None = None
    message: str | None = None
    cpu_s: float | None = None
    cpu_percent: float | None = None
    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    stack: str | None = None

    def __bool__(self) -> bool:
        """Whether anything is known; asked of hundreds of notes in every pass."""
        return self != _NOTHING_NEW

    @property
    def tells_progress(self) -> bool:
        """Whether there is something that a person may be waiting to see."""
        return (self.progress_done, self.progress_total, self.message) != (None, None, None)


_NOTHING_NEW = Telemetry()


class SlotGrant(NamedTuple):
    """A slot for an attempt that has waited; `number` is the wait after which it wants it."""

    number: int
    slot: int


@dataclasses.dataclass(slots=True)
class Batch:
    """All that one pass of the supervisor writes; applied in this order, in one transaction."""

    ends: dict[Attempt, AttemptResult] = dataclasses.field(default_factory=dict)
    unclaims: set[Attempt] = dataclasses.field(default_factory=set)
    flawed: list[DueTask] = dataclasses.field(default_factory=list)
    endings: dict[Attempt, Ending] = dataclasses.field(default_factory=dict)
    suspensions: dict[Attempt, Suspension] = dataclasses.field(default_factory=dict)
    telemetry: dict[Attempt, Telemetry] = dataclasses.field(default_factory=dict)
    returns: dict[Attempt, SlotGrant] = dataclasses.field(default_factory=dict)
    claims: list[Claim] = dataclasses.field(default_factory=list)
    supervisor: SupervisorRecord | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.claims or self._others)

    @property
    def only_claims(self) -> bool:
        """Whether it can be written by one statement."""
        return bool(self.claims and not self._others)

    @property
    def _others(self) -> bool:
        rows = self.ends or self.unclaims or self.endings or self.suspensions or self.telemetry or self.returns
        return bool(rows or self.flawed or self.supervisor)


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a batch changed; whatever is missing here had been decided by somebody else.

    `passed_over` are claims of rows that somebody had locked; they wait still, and can be claimed later.
    """

    ended: set[Attempt] = dataclasses.field(default_factory=set)
    unclaimed: set[Attempt] = dataclasses.field(default_factory=set)
    struck: set[int] = dataclasses.field(default_factory=set)
    endings: set[Attempt] = dataclasses.field(default_factory=set)
    suspensions: set[Attempt] = dataclasses.field(default_factory=set)
    claimed: list[Claim] = dataclasses.field(default_factory=list)
    passed_over: list[Claim] = dataclasses.field(default_factory=list)
    returned: set[Attempt] = dataclasses.field(default_factory=set)
    keys: list[str] = dataclasses.field(default_factory=list)


def _read_again(method: Callable[Concatenate[Ledger, P], T]) -> Callable[Concatenate[Ledger, P], T]:
    """Have a method come back to a server that has hung up (`Store.persistently`)."""

    @functools.wraps(method)
    def read(self: Ledger, /, *arguments: P.args, **named: P.kwargs) -> T:
        return self.store.persistently(lambda: method(self, *arguments, **named))

    return read


def _repeated(method: Callable[Concatenate[Ledger, P], T]) -> Callable[Concatenate[Ledger, P], T]:
    """Have a method that is one transaction come back to a server that has hung up, and say if that was in vain."""

    @functools.wraps(method)
    def repeat(self: Ledger, /, *arguments: P.args, **named: P.kwargs) -> T:
        try:
            return self.store.persistently(lambda: method(self, *arguments, **named))
        except ServerAway as error:
            raise _nothing_recorded(error) from error

    return repeat


def _nothing_recorded(error: ServerAway) -> ServerAway:
    return ServerAway(f"{error}; nothing was recorded")


class Ledger:
    """The rows of one installation.

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
            store.tables.prefix, mark=store.database.param, locks_rows=store.locks_rows, cleared=_ATTEMPT_COLUMNS
        )
        self.waits = Waits(store, self.clock)

    # Requests

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
                raise _nothing_recorded(error) from error
            raise

    @_repeated
    def _add_all(self, requests: Sequence[Request]) -> list[tuple[int, bool]]:
        # Nobody else's row is touched, and a unique key is kept by its index; only who comes after others must know
        # that they do not end meanwhile.
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
            (task.name == name) & (task.unique_key == unique_key) & _IS_LIVE,
        )
        rows = list(query.tuples())
        return int(rows[0][0]) if rows else None

    # What people ask for

    @_repeated
    def cancel(self, id: int, *, by: str | None, keys: list[str] | None = None) -> TaskRecord:
        """End a waiting task at once; mark a running one, for its supervisor to end. An ended one is left alone.

        The keys to ring after the commit are added to *keys*.
        """
        with self.store.writing():
            record = self._get(id, kept=True)  # a claim needs nobody kept away, only this row to be free
            if record.status is Status.REQUEST:
                self._withdraw(Attempt(id, record.attempt), by=by, keys=[] if keys is None else keys)
            elif record.status is Status.START and record.cancel_requested_at is None:
                asked = {"cancel_requested_at": self.clock.now(), "cancel_requested_by": by}
                self._where(Attempt(id, record.attempt), (Status.START,), asked)
            return self._get(id)

    @_repeated
    def suspend(self, id: int, *, by: str | None) -> TaskRecord:
        """Mark a running task, for its supervisor to suspend; one that is marked already is left alone.

        Raises:
            UnknownTask: No such task.
            NotSuspendable: It does not run, or is to end.
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

    @_repeated
    def resume(self, id: int) -> TaskRecord:
        """Take the mark of a suspended task away, for its supervisor to let it go on; any other is left alone.

        Raises:
            UnknownTask: No such task.
        """
        with self.store.writing():
            record = self._get(id)
            self._where(Attempt(id, record.attempt), (Status.START,), {"suspend_requested_at": None})
            return self._get(id)

    @_repeated
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
                    self._move("retry", Attempt(id, record.attempt), {**_CLEARED, "run_at": self.clock.now()})
            except peewee.IntegrityError:  # a request took its unique key just now
                unique_key = record.unique_key or ""
                raise AlreadyLive(self._live_twin(record.name, unique_key) or 0, unique_key) from None
            self.waits.forget_parts(id)
            return self._get(id)

    # What a supervisor writes

    def apply(self, batch: Batch) -> Outcome:
        """Write a whole pass in one transaction; if one row spoils it, row by row, so that the others are kept.

        Raises:
            DatabaseError, AccessError: Nothing was written; the same batch can be applied later.
        """
        missed: list[Claim] = []
        try:
            # A claim touches nothing but its own row: it keeps nobody away, and waits for nobody.
            with self.store.adding() if batch.only_claims else self.store.writing():
                outcome = self._apply(batch, missed, guard=_no_guard)
        except _SPOILT as error:
            log.log(_level(error), "a batch could not be written (%s); writing it row by row", error)
            missed.clear()
            with self.store.writing():
                outcome = self._apply(batch, missed, guard=self._guarded)
        if missed:
            outcome.passed_over = self._passed_over(missed)
        return outcome

    def _apply(self, batch: Batch, missed: list[Claim], *, guard: Callable[[Callable[[], bool], str], bool]) -> Outcome:
        outcome, at_once = Outcome(), guard is _no_guard
        self._apply_ends(batch, outcome, guard=guard)
        for one in batch.flawed:
            if guard(lambda due=one: self._strike(due, outcome.keys), f"that task {one.id} cannot run"):  # type: ignore[misc]
                outcome.struck.add(one.id)
        for attempt, ending in batch.endings.items():
            values = {"ending": ending.reason, "detail": ending.detail}
            if guard(lambda a=attempt, v=values: self._where(a, (Status.START,), v), f"an ending of task {attempt.id}"):  # type: ignore[misc]
                outcome.endings.add(attempt)
        for attempt, suspension in batch.suspensions.items():
            if guard(lambda a=attempt, s=suspension: self._suspend(a, s), f"that task {attempt.id} is suspended"):  # type: ignore[misc]
                outcome.suspensions.add(attempt)
        for telemetry in _at_once_or_each([one for one in batch.telemetry.items() if one[1]], at_once=at_once):
            guard(lambda some=telemetry: self._note(some), f"a note of task {telemetry[0][0].id}")  # type: ignore[misc]
        for attempt, back in batch.returns.items():
            if guard(lambda a=attempt, b=back: self.waits.grant(a.id, a.attempt, *b), f"the slot of task {attempt.id}"):  # type: ignore[misc]
                outcome.returned.add(attempt)
        for claims in _at_once_or_each(batch.claims, at_once=at_once):
            what = f"the claim of task {claims[0].due.id}"
            guard(lambda some=claims: self._claim(some, outcome, missed), what)  # type: ignore[misc]
        if batch.supervisor is not None:
            row = dataclasses.asdict(batch.supervisor)
            insert = self._supervisor.insert(**row)
            insert.on_conflict(conflict_target=["host"], preserve=list(row.keys() - {"host"})).execute()
        return outcome

    def _apply_ends(self, batch: Batch, outcome: Outcome, *, guard: Callable[[Callable[[], bool], str], bool]) -> None:
        at_once, simple = guard is _no_guard, []
        if at_once:
            done = [(attempt, end) for attempt, end in batch.ends.items() if end.reason is None]
            for ends in _at_once_or_each(done, at_once=True):
                concerned = self.waits.concerned(self._statements, [attempt.id for attempt, _ in ends])
                free = [(attempt, end) for attempt, end in ends if attempt.id not in concerned]
                self._finish(free, outcome, holds=False)
                simple += free
        tried = dict(simple)
        for attempt, end in batch.ends.items():
            if attempt not in tried:
                guard(lambda a=attempt, e=end: self._end(a, e, outcome), f"the end of task {attempt.id}")  # type: ignore[misc]
            if attempt not in outcome.ended and not at_once:
                self._end(attempt, _unwritable(end), outcome)
            if attempt not in outcome.ended:
                outcome.keys.append(EVERYBODY)  # whoever recorded it may not have been able to ring
        for attempt in batch.unclaims:
            if self._unclaim(attempt, outcome.keys):
                outcome.unclaimed.add(attempt)

    def _guarded(self, write: Callable[[], bool], what: str) -> bool:
        try:
            with self.store.database.atomic():
                return write()
        except _SPOILT as error:
            if is_passing(error):
                raise
            log.log(_level(error, logging.ERROR), "%s cannot be written: %s", what, error)
            return False

    def _claim(self, claims: Sequence[Claim], outcome: Outcome, missed: list[Claim]) -> bool:
        """Begin attempts, all in one statement; what could not be claimed is added to *missed*."""
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
        """Write down what is known of running attempts, all in one statement."""
        values: list[object] = []
        for attempt, note in telemetry:
            values += [attempt.id, attempt.attempt, self._text(note.heartbeat_at), note.progress_done]
            values += [note.progress_total, note.message, note.cpu_s, note.cpu_percent, note.rss_bytes]
            values += [note.peak_rss_bytes, note.stack]
        return bool(self.store.rows_of(self._statements.note(len(telemetry)), values))

    def _text(self, moment: datetime | None) -> str | None:
        text: str | None = self._task.started_at.db_value(moment)
        return text

    def _passed_over(self, missed: Sequence[Claim]) -> list[Claim]:
        """Return the claims whose tasks wait still: somebody had locked their rows. Tell of the others."""
        task = self._task
        query = task.select(task.id, task.attempt).where(_IS_REQUEST & task.id.in_([claim.due.id for claim in missed]))
        try:
            with self.store.connected():
                waiting = set(query.tuples())
        except (DatabaseError, AccessError):
            return []  # all is written, and the next look shows what has become of them
        for claim in missed:
            if (claim.due.id, claim.due.attempt) not in waiting:
                _tell_too_late("claim", Attempt(claim.due.id, claim.due.attempt))
        return [claim for claim in missed if (claim.due.id, claim.due.attempt) in waiting]

    def _suspend(self, attempt: Attempt, suspension: Suspension) -> bool:
        values = {
            "suspended_at": suspension.since,
            "suspended_mono": suspension.since_mono,
            "suspended_s": round(suspension.total_s, 3),
        }
        return self._where(attempt, (Status.START,), values)

    def _unclaim(self, attempt: Attempt, keys: list[str]) -> bool:
        record = self.get(attempt.id)
        if not self._move("unclaim", attempt, _CLEARED):
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

    # What a child writes when nobody acknowledges

    def end(self, attempt: Attempt, end: AttemptResult, keys: list[str] | None = None) -> bool:
        """Record the end of an attempt; False if it had been recorded, or the attempt was superseded.

        The keys to ring after the commit are added to *keys*.
        """
        outcome = self.apply(Batch(ends={attempt: end}))
        if keys is not None:
            keys += outcome.keys
        return attempt in outcome.ended

    @_repeated
    def unclaim_not_started(self, identity: ProcessIdentity, keys: list[str]) -> int:
        """Give back what was claimed for a child that leaves without having begun anything; return how many.

        The keys to ring after the commit are added to *keys*.
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

    def _end(self, attempt: Attempt, end: AttemptResult, outcome: Outcome) -> bool:
        if end.reason is None:
            return self._finish([(attempt, end)], outcome, holds=True)
        return self._interrupt(attempt, end, outcome)

    def _finish(self, ends: Sequence[tuple[Attempt, AttemptResult]], outcome: Outcome, *, holds: bool) -> bool:
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
                self._let_go(attempt, None, outcome.keys, holds=holds)
                outcome.ended.add(attempt)
            else:
                _tell_too_late("finish", attempt)
        return bool(finished)

    def _interrupt(self, attempt: Attempt, end: AttemptResult, outcome: Outcome) -> bool:
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
        # Whoever sees the death says why; but if we had ordered it, the order recorded before the signal is the truth.
        # guard, never: the recorded reason wins over what the death looks like
        ordered = self._task.ending.in_([str(reason) for reason in Reason])
        case = peewee.Case(None, ((ordered, self._task.ending),), str(end.reason))
        detail = peewee.Case(None, ((ordered, self._task.detail),), end.detail)
        values |= {"reason": case, "detail": detail, "error": end.error, "tries": self._one_more(self._task.tries)}
        if not self._move("interrupt", attempt, values):
            return False
        self._let_go(attempt, self._remember_interruption(attempt), outcome.keys)
        outcome.ended.add(attempt)
        return True

    def _one_more(self, count: Any) -> Any:  # noqa: ANN401 - a Peewee column and expression
        return peewee.Case(None, ((count < ATTEMPT_MAX, count + 1),), count)  # PostgreSQL refuses what is larger

    def _let_go(self, attempt: Attempt, reason: Reason | None, keys: list[str], *, holds: bool = True) -> None:
        """Free what an ended attempt held, and settle what had to come after it, in the transaction of its end."""
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

    # What becomes of old rows

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

    # The compare-and-set itself

    def _move(self, event: str, attempt: Attempt, values: dict[str, Any]) -> bool:
        """Make the transition *event*; False, and a line in the log, if somebody else had decided."""
        transition = _BY_EVENT[event]
        changed = self._where(attempt, transition.sources, {**values, "status": transition.target})
        if not changed:
            _tell_too_late(event, attempt)
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

    # Reading

    @_read_again
    def status(self, id: int) -> Status | None:
        """Return a task's status, or None if there is no such row; reads nothing else of it."""
        if not 0 < id <= ID_MAX:
            return None
        with self.store.connected():
            found = self._task.select(self._task.status).where(self._task.id == id).scalar()
        return None if found is None else read_status(found) or Status.INTERRUPTED  # as `TaskRecord` has it

    @_read_again
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
                Status.REQUEST: int(count.where(_IS_REQUEST).scalar()),
                Status.START: int(count.where(_IS_START).scalar()),
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
            return int(self._task.select().where(_IS_START & self._task.slot.is_null()).count())

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

    def wishes(self) -> list[ControlRequest]:
        """Return the running attempts that somebody wants cancelled or suspended, and who asked."""
        with self.store.connected():
            rows = self.store.rows_of(self._statements.wishes)
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

        At a moment, now if none is given; *unlocked* leaves out the rows that somebody has locked.
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

        Whoever has asked for what is `due` at a moment asks for what comes after the same one, or misses what became
        due in between.
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
        is_due = _IS_REQUEST & (task.run_at <= self.clock.now())
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
        is_due = _IS_REQUEST & (task.run_at <= self.clock.now()) & ~peewee.fn.EXISTS(self._must_wait())
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
        query = task.select(*columns).where(_IS_START).order_by(task.id)
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


def _flaw(column: str, held: object) -> str:
    kinds = {bytes: "a BLOB", int: "a number out of range", float: "a fraction", str: "a text", NoneType: "NULL"}
    return f"column {column} holds {kinds.get(type(held), type(held).__name__)}"


def _no_guard(write: Callable[[], bool], what: str) -> bool:  # noqa: ARG001 - the same shape as _guarded
    return write()


def _at_once_or_each(rows: Sequence[Any], *, at_once: bool) -> list[Sequence[Any]]:
    """Return lists of rows that one statement writes: many of them, or, so that a bad one spoils no other, each."""
    size = ROWS_AT_ONCE if at_once else 1
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _tell_too_late(event: str, attempt: Attempt) -> None:
    log.info("task %d, attempt %d: %s came too late, the row says otherwise", attempt.id, attempt.attempt, event)


def _level(error: Exception, level: int = logging.WARNING) -> int:
    """Return how loud to tell of it: that a child has just taken the slot which was in mind for another is no news."""
    return logging.INFO if isinstance(error, peewee.IntegrityError) else level


def _unwritable(end: AttemptResult) -> AttemptResult:
    return AttemptResult(
        reason=Reason.RAISED,
        detail="its end could not be written to the database: the result or the error text is not storable",
        exit_code=end.exit_code,
        signal=end.signal,
    )
