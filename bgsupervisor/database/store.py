"""The tables and the database that holds them; knows no transition and no process.

Peewee classes are made per database and prefix (`Tables`): two Services on two databases work at once in one
process, which binding shared classes to the database of the moment would mix up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import math
import os
import sqlite3
import stat
import sys
import threading
import weakref
from collections.abc import Callable  # noqa: TC003 - a module-level annotation
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import peewee

from bgsupervisor import sanitize
from bgsupervisor.clock import ServerClock, SystemClock, repeat_last
from bgsupervisor.config import is_postgres, masked, sqlite_path
from bgsupervisor.database import postgres
from bgsupervisor.errors import AccessError, BgSupervisorError, DatabaseError, LockedByCaller, ServerAway, Undecided
from bgsupervisor.statuses import Reason, Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.callers import OpenTransaction
    from bgsupervisor.database.connection_limit import ConnectionLimit

__all__ = [
    "Store",
    "SupervisorRecord",
    "Tables",
    "TaskRecord",
    "UtcField",
    "close_owned",
    "is_locked",
    "is_passing",
    "read_pid",
    "read_reason",
    "read_status",
    "read_text",
    "read_time",
    "read_whole",
    "roll_back_abandoned",
    "translated",
]

log = sanitize.logger()

T = TypeVar("T")

SHARED_MODE = 0o660
"""Rights of a database file in a folder that a group shares, as a web user and a deploy user do."""
PRIVATE_MODE = 0o600
"""Rights of a database file in any other folder: who may write it may request tasks."""
AUTOCHECKPOINT_PAGES = 10_000
"""Others than the supervisor leave checkpoints to it (one checkpointer), unless the -wal file passes 40 MB."""
WAL_RETRY_S = 0.01
OWN_LOCK_S = 0.2
"""Wait for a locked file, in seconds, after which a call looks whether its own thread keeps it locked."""
COME_BACK_S = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Pauses between tries to reach a server that has hung up; the last one repeats."""

# SQLite's primary result codes after which the same write can succeed later.
LOCKED = 5
_PASSING_CODES = {
    LOCKED: "locked",
    6: "locked",
    8: "read-only",
    10: "failing to read or write",
    13: "full",
    14: "not to be opened",
}


_OF_ONE_ROW = (peewee.IntegrityError, peewee.DataError, peewee.InterfaceError, peewee.ProgrammingError)
"""What is wrong with a row's values, not with the database."""


_FULL = "the disk is full; free some space and try again"
FULL_BYTES = 64 * 1024
"""With less room than this no transaction fits."""

_REASONS = frozenset(str(reason) for reason in Reason)
_STATUSES = frozenset(str(status) for status in Status)
WHOLE_MAX = 2**63 - 1
"""Limit of a whole number in a row."""
PID_MAX = 2**31 - 1
"""Limit of a PID: pid_t is an int."""
_FIRST, _LAST = datetime(2, 1, 1, tzinfo=UTC), datetime(9998, 12, 31, tzinfo=UTC)


def read_text(value: object) -> str:
    """Return the text that a row holds, whatever bytes it is of; a number is its digits."""
    if isinstance(value, str):
        return value
    return _readable(bytes(value)) if isinstance(value, bytes | bytearray | memoryview) else str(value)


def read_whole(value: object) -> int | None:
    """Return the whole number that a row holds; None if it holds something else, as any column of SQLite may."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and -WHOLE_MAX - 1 <= value <= WHOLE_MAX else None


def read_pid(value: object) -> int | None:
    """Return the PID that a row holds; None if it can be none."""
    pid = read_whole(value)
    return pid if pid is not None and 0 < pid <= PID_MAX else None


def read_real(value: object) -> float | None:
    """Return the number that a row holds; None if it holds something else, NaN or infinity."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_time(value: object) -> datetime | None:
    """Return the moment that a row holds, in UTC; None if it holds none.

    Text without a zone, as hand-written SQL stores it, is UTC. The first and the last year that Python knows become
    the ones beside them, so that every zone can show it.
    """
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(moment, datetime):
            return None
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return min(max(moment, _FIRST), _LAST)


def read_status(value: object) -> Status | None:
    """Return the status that a row holds; None if it is a word of a later version, or written by hand."""
    return Status(value) if value in _STATUSES else None


def read_reason(value: object) -> Reason | None:
    """Return the reason that a row holds; None as `read_status`."""
    return Reason(value) if value in _REASONS else None


class _Text(peewee.TextField):
    def python_value(self, value: object) -> str | None:
        return None if value is None else read_text(value)

    def adapt(self, value: Any) -> Any:  # noqa: ANN401 - as a StrEnum, or what a row holds
        return str(value) if isinstance(value, str) else value


class _Whole(peewee.IntegerField):
    def python_value(self, value: object) -> int | None:
        return read_whole(value)

    def adapt(self, value: Any) -> Any:  # noqa: ANN401 - a compare-and-set names what a row holds, whatever that is
        return value


class _BigWhole(_Whole, peewee.BigIntegerField):
    pass


class _Real(peewee.DoubleField):
    def python_value(self, value: object) -> float | None:
        return read_real(value)


class UtcField(peewee.DateTimeField):
    """An aware datetime; in SQLite text that sorts: YYYY-MM-DD HH:MM:SS.ffffff+00:00."""

    def db_value(self, value: datetime | str | None) -> str | None:
        """Convert to UTC before storing; a naive datetime is an error of ours."""
        if value is None or isinstance(value, str):
            return value
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        return value.astimezone(UTC).isoformat(sep=" ", timespec="microseconds")

    def python_value(self, value: object) -> datetime | None:
        """Return an aware datetime, None for what is none."""
        return read_time(value)


class Tables:
    """The Peewee classes of one installation: one database, one prefix."""

    def __init__(self, database: peewee.Database, prefix: str) -> None:
        self.prefix = prefix

        class Base(peewee.Model):
            class Meta:
                legacy_table_names = False

        class Task(Base):
            id = peewee.AutoField()
            name = _Text()
            data = _Text()
            queue = _Text()
            priority = _Whole()
            status = _Text()
            reason = _Text(null=True)
            detail = _Text(null=True)
            key = _Text(null=True)
            unique_key = _Text(null=True)
            serial = _Text(null=True)
            run_at = UtcField()
            expires_at = UtcField(null=True)
            requested_at = UtcField()
            started_at = UtcField(null=True)
            started_mono = _Real(null=True)
            ended_at = UtcField(null=True)
            heartbeat_at = UtcField(null=True)
            attempt = _Whole()
            tries = _Whole()
            max_attempts = _Whole()
            ending = _Text(null=True)
            host = _Text(null=True)
            boot_id = _Text(null=True)
            pid_ns = _BigWhole(null=True)
            pid = _Whole(null=True)
            start_ticks = _BigWhole(null=True)
            slot = _Whole(null=True)
            progress_done = _Real(null=True)
            progress_total = _Real(null=True)
            message = _Text(null=True)
            result = _Text(null=True)
            error = _Text(null=True)
            exit_code = _Whole(null=True)
            signal = _Whole(null=True)
            cpu_s = _Real(null=True)
            cpu_percent = _Real(null=True)
            rss_bytes = _BigWhole(null=True)
            peak_rss_bytes = _BigWhole(null=True)
            cancel_requested_at = UtcField(null=True)
            cancel_requested_by = _Text(null=True)
            suspend_requested_at = UtcField(null=True)
            suspend_requested_by = _Text(null=True)
            suspended_at = UtcField(null=True)
            suspended_mono = _Real(null=True)
            suspended_s = _Real(null=True)
            stack = _Text(null=True)
            parent_id = _Whole(null=True)

        class Interruption(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            attempt = _Whole()
            reason = _Text()
            detail = _Text(null=True)
            error = _Text(null=True)
            stack = _Text(null=True)
            exit_code = _Whole(null=True)
            signal = _Whole(null=True)
            host = _Text(null=True)
            pid = _Whole(null=True)
            started_at = UtcField(null=True)
            ended_at = UtcField()

        class Supervisor(Base):
            host = _Text(primary_key=True)
            boot_id = _Text()
            pid_ns = _BigWhole()
            pid = _Whole()
            start_ticks = _BigWhole()
            started_at = UtcField()
            heartbeat_at = UtcField()
            slots = _Whole()
            version = _Text()
            catalogue = _Text()
            code_error = _Text(null=True)
            left_at = UtcField(null=True)

        class Part(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            name = _Text()
            value = _Text()
            reached_at = UtcField()

        class Hold(Base):
            id = peewee.AutoField()
            name = _Text()
            permit = _Whole()
            task_id = _Whole(null=True)
            attempt = _Whole(null=True)
            since = UtcField()
            abandoned_by = _Whole(null=True)

        class Wait(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            attempt = _Whole()
            number = _Whole(default=0)
            whole = peewee.BooleanField(default=True)
            kind = _Text()
            target_id = _Whole(null=True)
            target = _Text(null=True)
            permits = _Whole(null=True)
            since = UtcField()

        class Dependency(Base):
            id = peewee.AutoField()
            task_id = _Whole()
            on_id = _Whole()
            any_end = peewee.BooleanField()

        class Participant(Base):
            id = peewee.AutoField()
            scope = _Text()
            name = _Text()
            generation = _Whole()
            task_id = _Whole()
            attempt = _Whole()
            parties = _Whole()
            outcome = _Text(null=True)

        self.Task: Any = Task
        self.Interruption: Any = Interruption
        self.Supervisor: Any = Supervisor
        self.Part: Any = Part
        self.Hold: Any = Hold
        self.Wait: Any = Wait
        self.Dependency: Any = Dependency
        self.Participant: Any = Participant
        for model in (Task, Interruption, Supervisor, Part, Hold, Wait, Dependency, Participant):
            meta: Any = model._meta  # noqa: SLF001 - Peewee's documented place for table options
            meta.set_database(database)
            meta.set_table_name(prefix + model.__name__.lower())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TaskRecord:
    """A task as it was when it was read: every column of its row. Times are aware, in UTC."""

    id: int
    name: str
    data: str
    queue: str
    priority: int
    status: Status
    reason: Reason | None
    detail: str | None
    key: str | None
    unique_key: str | None
    serial: str | None
    run_at: datetime
    expires_at: datetime | None
    requested_at: datetime
    started_at: datetime | None
    started_mono: float | None
    ended_at: datetime | None
    heartbeat_at: datetime | None
    attempt: int
    tries: int
    max_attempts: int
    ending: Reason | None
    host: str | None
    boot_id: str | None
    pid_ns: int | None
    pid: int | None
    start_ticks: int | None
    slot: int | None
    progress_done: float | None
    progress_total: float | None
    message: str | None
    result: str | None
    error: str | None
    exit_code: int | None
    signal: int | None
    cpu_s: float | None
    cpu_percent: float | None
    rss_bytes: int | None
    peak_rss_bytes: int | None
    cancel_requested_at: datetime | None
    cancel_requested_by: str | None
    suspend_requested_at: datetime | None
    suspend_requested_by: str | None
    suspended_at: datetime | None
    suspended_mono: float | None
    suspended_s: float | None
    stack: str | None
    parent_id: int | None
    position: int | None = None
    """Place in the queue, 1 is next; known for a waiting task that `Service.get` returned."""
    no_supervisor_since: datetime | None = None
    """When a supervisor was last seen, if that is too long ago; known for a task that `Service.get` returned."""
    unreadable: tuple[str, ...] = ()
    """The columns that hold what they cannot mean, as rows written by hand may; None or a default stands for each."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TaskRecord:
        """Make a record of a row as the driver gives it (`Store.raw`); never fails, whatever it holds."""
        values, unreadable = dict[str, Any](), []
        for column, held in row.items():
            value = None if held is None else _READERS[column](held)
            if value is None and (held is not None or column in _INSTEAD):
                unreadable.append(column)
                value = _INSTEAD.get(column)
            values[column] = value
        return cls(**values, unreadable=tuple(unreadable))

    def __repr__(self) -> str:
        """Name the task, without data, result and texts of errors: they may hold what no log should."""
        key = "" if self.key is None else f", key={self.key!r}"
        reason = "" if self.reason is None else f" / {self.reason}"
        return (
            f"TaskRecord(id={self.id}, name={self.name!r}{key}, status={self.status}{reason}, attempt={self.attempt})"
        )

    @property
    def ended(self) -> bool:
        """Whether it is DONE or INTERRUPTED."""
        return self.status.ended

    @property
    def fraction(self) -> float | None:
        """How much is done, 0.0 to 1.0; None when its body has not said."""
        if self.status is Status.DONE:
            return 1.0
        if self.progress_done is None or not self.progress_total:
            return None
        return min(max(self.progress_done / self.progress_total, 0.0), 1.0)

    def public(self) -> dict[str, Any]:
        """Return what a browser may see, ready for JSON: no data, no result, no error text, no machine facts."""
        since = self.no_supervisor_since
        return {
            "id": self.id,
            "status": str(self.status),
            "reason": None if self.reason is None else str(self.reason),
            "ended": self.ended,
            "fraction": self.fraction,
            "message": None if self.status is Status.DONE else self.message,
            "requested_at": self.requested_at.isoformat(),
            "started_at": None if self.started_at is None else self.started_at.isoformat(),
            "ended_at": None if self.ended_at is None else self.ended_at.isoformat(),
            "cancel_requested": self.cancel_requested_at is not None,
            "suspended": self.suspended_at is not None,
            "position": self.position,
            "no_supervisor_since": None if since is None else since.isoformat(),
        }


_BY_TYPE: dict[str, Callable[[object], object]] = {
    "str": read_text,
    "int": read_whole,
    "float": read_real,
    "datetime": read_time,
    "Status": read_status,
    "Reason": read_reason,
}
_READERS = {
    field.name: _BY_TYPE[str(field.type).removesuffix(" | None")]
    for field in dataclasses.fields(TaskRecord)
    if field.name != "unreadable"
} | {"pid": read_pid}
_INSTEAD: dict[str, Any] = {
    "id": 0,
    "name": "?",
    "data": "",
    "queue": "",
    "priority": 0,
    "status": Status.INTERRUPTED,
    "run_at": datetime(1970, 1, 1, tzinfo=UTC),
    "requested_at": datetime(1970, 1, 1, tzinfo=UTC),
    "attempt": 0,
    "tries": 0,
    "max_attempts": 1,
}
"""What stands for each column that is never NULL, where it cannot be read."""


class _Told(msgspec.Struct):
    """What is used of a task's options in a catalogue."""

    secret: list[str] = []


class _Failed(msgspec.Struct):
    """What is used of an error in `code_error`."""

    module: str
    error: str
    kind: str = "module"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorRecord:
    """The supervisor that was last seen on a host; `catalogue` and `code_error` are JSON text.

    `left_at` is set by one that leaves in order; after a kill only the silence tells.
    """

    host: str
    boot_id: str
    pid_ns: int
    pid: int
    start_ticks: int
    started_at: datetime
    heartbeat_at: datetime
    slots: int
    version: str
    catalogue: str
    code_error: str | None
    left_at: datetime | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SupervisorRecord | None:
        """Make a record of a row as Peewee's `dicts()` gives it; None of one that names no process and no times.

        A catalogue, or errors, that are no JSON of ours are left out.
        """
        values = {**row, "pid": read_pid(row["pid"])}
        if any(
            values[one.name] is None for one in dataclasses.fields(cls) if one.name not in ("code_error", "left_at")
        ):
            return None
        if not _is_json(values["catalogue"], dict[str, _Told]):
            values["catalogue"] = "{}"
        if values["code_error"] is not None and not _is_json(values["code_error"], list[_Failed]):
            values["code_error"] = None
        return cls(**values)


def _is_json(text: str, kind: Any) -> bool:  # noqa: ANN401 - a type
    try:
        msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False
    return True


def is_passing(error: BaseException) -> bool:
    """Whether the same write may succeed later: the database is locked, full, read-only or away."""
    driver = _of_driver(_first(error))
    return _sqlite_code(driver) in _PASSING_CODES or postgres.is_passing(driver)


def is_locked(error: BaseException) -> bool:
    """Whether another writer keeps the database locked: it may be one that stands still."""
    if error.__cause__ is None:
        return False
    driver = _of_driver(_first(error.__cause__))
    return _sqlite_code(driver) == LOCKED or postgres.is_locked(driver)


def roll_back_abandoned(*, for_good: bool) -> None:
    """Roll back every transaction on SQLite of this process that a body has left open.

    One that was written in keeps all other writers out, also those of this very process. A connection that is merely
    forgotten does not end it: up to Python 3.12 only the garbage collector closes that, whenever it comes.

    Args:
        for_good: Other threads live, and one of them may be in the middle of it: have its connection do nothing any
            more, or what it still writes would be committed without what went before.
    """
    gc.collect()
    for one in gc.get_objects():
        if issubclass(type(one), sqlite3.Connection):  # not isinstance, which asks proxies, and wakes what is lazy
            with contextlib.suppress(sqlite3.Error):  # closed, or bound to another thread
                if one.in_transaction:
                    if for_good:
                        one.set_authorizer(_only_rollback)
                    one.rollback()


def _only_rollback(action: int, what: str | None, *_: object) -> int:
    is_rollback = action == sqlite3.SQLITE_TRANSACTION and what == "ROLLBACK"
    return sqlite3.SQLITE_OK if is_rollback else sqlite3.SQLITE_DENY


def _of_driver(error: BaseException) -> BaseException:
    """Return the database driver's own error behind one of Peewee's."""
    return error.__cause__ or error.__context__ or error


def _sqlite_code(driver: BaseException) -> int | None:
    """Return SQLite's primary result code of an error of the driver."""
    code: int | None = getattr(driver, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _first(error: BaseException) -> BaseException:
    """Return what went wrong, not the rollback that failed after it.

    With a full disk SQLite has rolled back itself; a connection to PostgreSQL that is lost cannot roll back.
    """
    told = ("no transaction is active", "no such savepoint", "connection is closed", "connection is lost")
    while error.__context__ is not None and any(text in str(error) for text in told):
        error = error.__context__
    return error


@contextlib.contextmanager
def translated(store: Store) -> Iterator[None]:
    """Turn Peewee's errors of a database that is away into one clear sentence; those of a single row pass.

    Raises:
        DatabaseError: Locked, full, damaged or away; says which, and what to do.
        AccessError: This user lacks a right; says which on what.
    """
    try:
        yield
    except (peewee.PeeweeException, sqlite3.Error) as error:  # Peewee wraps a query, but not the stepping of its rows
        first = _first(error)
        if isinstance(first, BgSupervisorError):
            raise first from None  # within a transaction it was explained, and then that could not be rolled back
        of_one_row = postgres.is_of_one_row(_of_driver(first))
        if isinstance(error, _OF_ONE_ROW) if of_one_row is None else of_one_row:
            raise
        raise store.explain(error) from error


def _forget_frames(error: BaseException | None) -> None:
    """Let go what the frames of an error hold: a cursor keeps a connection's files open after its close."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _StillLocked(Exception):
    """Another connection has the lock that a call waits for."""


class _ThreadConnection:
    """Closes a thread's connection when the thread ends; Python 3.13 warns of connections left open."""

    def __init__(self, database: peewee.Database) -> None:
        self.connection: Any = database.connection()
        self.pid = os.getpid()

    def __del__(self) -> None:
        if self.pid == os.getpid():
            with contextlib.suppress(Exception):
                self.connection.close()


class Store:
    """One database and its tables, opened when first used, in every thread and after every fork.

    Two kinds: `Store.open` owns its connections (one per thread, kept open); `Store.share` uses a database
    object of the application, changes no pragma of it, and joins its open transaction.

    Attributes:
        clock: The time by which rows go: of the machine with SQLite, of the server with PostgreSQL.
        locks_rows: Whether others can have locked single rows, as in PostgreSQL; else who writes is alone.
    """

    def __init__(self, database: peewee.Database, prefix: str, *, owned: bool, path: Path | None) -> None:
        self.database = database
        self.tables = Tables(database, prefix)
        self.owned = owned
        self.path = path
        self._pid = os.getpid()
        self._threads = threading.local()
        self._fork_lock = threading.Lock()
        self._schema_checked = self._durability_checked = self._follows_file = False
        self._is_sqlite = isinstance(database, peewee.SqliteDatabase)
        self.locks_rows = not self._is_sqlite
        self._lock_key = postgres.lock_key(prefix)
        self._server = database if isinstance(database, postgres.Server) else None
        # The clock does not keep the store, which closes its connections as soon as nobody has it any more.
        ask_the_time = weakref.WeakMethod(self._have_asked_the_time)
        self._server_clock = None if self._is_sqlite else ServerClock(lambda: _call(ask_the_time))
        self.clock: Clock = self._server_clock or SystemClock()
        self._connection_limit: ConnectionLimit | None = None
        self.creates = True
        self.patience_s = 0.0
        self._has_neighbours = False

    @classmethod
    def open(
        cls,
        url: str,
        prefix: str,
        *,
        busy_timeout_s: float,
        checkpointer: bool = False,
        durable: bool = True,
        creates: bool = True,
        patience_s: float = 0.0,
        looks: bool = False,
        has_neighbours: bool = False,
    ) -> Store:
        """Make a store of its own for *url*; opens nothing yet.

        Args:
            url: sqlite:////absolute/path, or postgresql://user:password@host/database.
            prefix: Of all tables and indexes.
            busy_timeout_s: How long a call may wait for another writer.
            checkpointer: True in the one process that writes SQLite's checkpoints, the supervisor.
            durable: False waits for no disk, for tests: what is committed need not survive the machine.
            creates: Whether a missing file, or missing tables, are made; else that is a DatabaseError.
            patience_s: For how long a call comes back to a server that has hung up (PostgreSQL): to learn what became
                of a commit, and to repeat what is not there (`persistently`).
            looks: Change nothing of the database, not even SQLite's journal mode; implies that nothing is created.
            has_neighbours: Other code of the calling thread, as an application's, may have a transaction open on the
                same file: a call fails at once instead of waiting for it (SQLite).

        Raises:
            ConfigError: The driver of PostgreSQL is not installed.
        """
        if is_postgres(url):
            server = postgres.open_server(url, busy_timeout_s=busy_timeout_s, durable=durable)
            store = cls(server, prefix, owned=True, path=None)
            _owned.add(store)
            store.creates, store.patience_s = creates and not looks, patience_s
            return store
        path = sqlite_path(url)
        pragmas = {
            "journal_mode": "wal",
            # guard, never: requests are on disk when they are acknowledged
            "synchronous": "full" if durable else "off",  # an acknowledged request survives a power cut
            "wal_autocheckpoint": 1000 if checkpointer else AUTOCHECKPOINT_PAGES,
        }
        database = peewee.SqliteDatabase(
            f"{path.as_uri()}?mode=rw" if looks else str(path),
            uri=looks,
            pragmas={} if looks else pragmas,
            timeout=busy_timeout_s,
            autoconnect=False,
            lock_type="IMMEDIATE",
            check_same_thread=False,
        )
        store = cls(database, prefix, owned=True, path=path)
        _owned.add(store)
        store.creates = creates and not looks
        store._has_neighbours = has_neighbours
        store._follows_file = not checkpointer  # the supervisor leaves instead, and the next one opens the new file
        return store

    @classmethod
    def share(cls, database: peewee.Database, prefix: str) -> Store:
        """Make a store on the application's own database object."""
        name = getattr(database, "database", None)
        path = Path(name) if isinstance(database, peewee.SqliteDatabase) and name else None
        return cls(database, prefix, owned=False, path=path)

    @classmethod
    def external(cls, database: peewee.Database, own: Store) -> Store:
        """Make a store on connections that the application lends; no tables are made or checked there."""
        store = cls(database, own.tables.prefix, owned=False, path=own.path)
        store._schema_checked = True
        store._server_clock, store.clock = own._server_clock, own.clock  # asked on whichever connection there is
        return store

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Have a connection in this thread; on a shared database close it again if it was closed before."""
        if self._connection_limit is None or self._server is None:
            with self._connected():
                yield
            return
        with contextlib.ExitStack() as stack:
            try:
                is_outermost = stack.enter_context(self._connection_limit.connected(self._server.timeout))
            except TimeoutError:
                raise DatabaseError(
                    f"all {self._connection_limit.places} connections of this host's children to the database "
                    f"{self.place} are in use for longer than {self._server.timeout:g} s; try again"
                ) from None
            if is_outermost:
                stack.callback(self._hang_up)
            stack.enter_context(self._connected())
            yield

    def limit_connections(self, folder: Path) -> None:
        """Have a connection to a server only during a call, and only so many processes of the host at once (`limit`).

        *folder* is the state directory.
        """
        if (
            self._server is not None and sys.platform != "win32"
        ):  # the connection limit is made of locks that Windows lacks
            from bgsupervisor.database.connection_limit import limit_of  # noqa: PLC0415 - only children have turns

            self._connection_limit = limit_of(folder)

    def _hang_up(self) -> None:
        if self._server is not None and not self._server.is_closed():
            self._server.hang_up()
        self._threads.__dict__.clear()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        self._forget_after_fork()
        self._forget_replaced_file()
        self._forget_lost_connection()
        with translated(self):
            opened_here = self.database.is_closed()
            try:
                if opened_here:
                    self._connect()
                if self._server_clock is not None and (opened_here or self._server_clock.is_old()):
                    self._server_clock.ask(self._server_time)
                if not self._schema_checked:
                    self._check_schema()
                yield
            finally:
                if opened_here and not self.owned and not self.database.is_closed():
                    self.database.close()

    @contextlib.contextmanager
    def unchecked(self) -> Iterator[None]:
        """Have a connection in this thread, whatever the tables are like."""
        self._forget_after_fork()
        with translated(self):
            if self.database.is_closed():
                self._connect()
            yield

    @contextlib.contextmanager
    def writing(self, *, alone: bool = True) -> Iterator[None]:
        """Have a connection and a transaction that may write; inside the caller's own it joins that one.

        Nobody else writes meanwhile; with *alone* false others may, on PostgreSQL, for what touches no row of theirs.
        If the connection is lost, it returns if all was committed, and raises ServerAway if nothing was.

        Raises:
            Undecided: Nobody could be asked which of the two, for `patience_s`, or the server does not know.
        """
        with self.connected(), self._decided(self.alone() if alone or self._is_sqlite else self.database.atomic()):
            yield

    @contextlib.contextmanager
    def _decided(self, transaction: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        """Have a transaction, and learn what became of it if the connection is lost in its commit."""
        if self._server is None or self.database.in_transaction():
            with transaction:
                yield
            return
        number = None
        try:
            with transaction:
                begun = postgres.transaction_of(self.database)
                yield
                number = begun
        except peewee.PeeweeException as error:
            if number is None or not postgres.is_lost(self.database) or not self._learn(number, error):
                raise

    def _learn(self, transaction: postgres.Transaction, error: peewee.PeeweeException) -> bool:
        """Ask what became of a transaction whose COMMIT was not answered: True if it was committed."""
        deadline = self.clock.monotonic() + self.patience_s
        for pause_s in repeat_last(COME_BACK_S):
            try:
                self.close()
                self._connect()
                committed = postgres.outcome_of(self.database, transaction)
            except peewee.PeeweeException as problem:
                error = problem
            except DatabaseError as unknowable:
                raise self.undecided(unknowable) from error
            else:
                if committed is not None:
                    log.info("a connection was lost in a commit, which was %s", "done" if committed else "not done")
                    return committed
            if self.clock.monotonic() + pause_s > deadline:
                raise self.undecided(self.explain(error)) from error
            self.clock.sleep(pause_s)
        raise AssertionError

    def undecided(self, error: BgSupervisorError) -> Undecided:
        """Return the error that says that nobody knows whether something was recorded, and why."""
        return Undecided(
            f"{error}; the connection was lost while it was being recorded, so it may have been recorded or not: "
            "look before it is asked for again"
        )

    def persistently(self, call: Callable[[], T]) -> T:
        """Return what *call* returns, one transaction; if the server hangs up, come back to it and repeat it.

        Only what was not recorded is repeated. Inside a transaction it is called once.

        Raises:
            LockedByCaller: A transaction that this thread has open keeps the file locked (SQLite).
            ServerAway: No server for `patience_s`.
            Undecided: As `writing`.
        """
        if self._has_neighbours and not self.database.in_transaction():
            return self._beside_neighbours(call)
        if self.patience_s == 0 or self.database.in_transaction():
            return call()
        deadline = self.clock.monotonic() + self.patience_s
        for pause_s in repeat_last(COME_BACK_S):
            try:
                return call()
            except ServerAway:
                if self.clock.monotonic() + pause_s > deadline:
                    raise
            self.clock.sleep(pause_s)
        raise AssertionError

    def _beside_neighbours(self, call: Callable[[], T]) -> T:
        """Return what *call* returns, unless a transaction of this thread keeps the file locked; see `persistently`."""
        limit_s = getattr(self.database, "timeout", 0.0)
        own: list[OpenTransaction] = []
        try:
            with contextlib.suppress(_StillLocked), self._waiting(min(OWN_LOCK_S, limit_s)):
                return call()
            own = self._transactions_of_caller()
            if own:
                with contextlib.suppress(_StillLocked), self._waiting(0.0):  # it may be free by now
                    return call()
                self._refuse_to_wait_for(own)
        finally:
            self._wait_at_most(limit_s)
        try:
            return call()
        except DatabaseError as error:
            if is_locked(error):  # the look before may have been another thread's turn
                self._refuse_to_wait_for(self._transactions_of_caller())
            raise

    @contextlib.contextmanager
    def _waiting(self, seconds: float) -> Iterator[None]:
        """Limit the wait for a lock. Raises _StillLocked if it is over."""
        try:
            if self.database.is_closed():
                with self.connected():
                    pass
            self._wait_at_most(seconds)
            yield
        except DatabaseError as error:
            if is_locked(error):
                _forget_frames(error)
                raise _StillLocked from None
            raise

    def _wait_at_most(self, seconds: float) -> None:
        """Limit the wait of this thread's connection; the `timeout` of Peewee is one for all threads."""
        if not self.database.is_closed():
            self.database.connection().execute(f"PRAGMA busy_timeout = {int(1000 * seconds)}")

    def _transactions_of_caller(self) -> list[OpenTransaction]:
        from bgsupervisor.database.callers import open_transactions  # noqa: PLC0415 - only on the way to an error

        return [] if self.path is None else open_transactions(self.path)

    def _refuse_to_wait_for(self, own: Sequence[OpenTransaction]) -> None:
        for one in own:
            if one.holds_lock(f"{self.tables.prefix}task"):
                raise LockedByCaller(
                    f"cannot write to the database {self.path}: it is kept locked by {one.owner} of this very thread; "
                    f"have the request join it, {one.hint}, or make it after the commit"
                )

    def draw_id(self) -> int | None:
        """Return the id for a new task that nobody else will get; None where the database is to choose it.

        Who has drawn it before finds by it what was recorded, though the answer was lost, and cannot record it twice.
        """
        if self._server is None or self.database.in_transaction():
            return None
        return postgres.draw(self.database, f"{self.tables.prefix}task", "id")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have a transaction on the connection that is open, during which nobody else is alone."""
        # In SQLite a deferred transaction that reads first may not write after another's commit, however long it waits.
        with self.database.atomic("IMMEDIATE" if self._is_sqlite else "READ COMMITTED"):
            if not self._is_sqlite:
                postgres.hold_off(self.database, self._lock_key)
            yield

    def write_first(self) -> None:
        """Take the write lock for a transaction that the caller has open, before anything is read in it (SQLite).

        A deferred transaction that has read cannot write after another's commit: https://sqlite.org/isolation.html
        """
        if self._is_sqlite and not self.owned and self.database.in_transaction():
            with self.connected():
                self.database.execute_sql(f'DELETE FROM "{self.tables.prefix}task" WHERE 1 = 0')  # noqa: S608 - our own prefix

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Have a connection for one statement that keeps nobody away: its own transaction, or part of the caller's."""
        with self.connected(), self.database.atomic() if self.database.in_transaction() else contextlib.nullcontext():
            yield

    def kept(self, query: Any) -> Any:  # noqa: ANN401 - a Peewee query
        """Return a query whose rows stay as they are until the transaction ends, as all rows do in SQLite."""
        return query.for_update() if self.locks_rows else query

    def rows_of(self, statement: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Run a statement that is written out, on the connection that is open, and return what it returns."""
        return list(self.database.execute_sql(statement, values).fetchall())

    def raw(self, query: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a Peewee query
        """Return the rows of a query as the driver gives them, on the connection that is open."""
        cursor = self.database.execute(query)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Have a connection and a transaction that only reads: all of it as of one moment, beside any writer."""
        with self.connected(), self.database.atomic("DEFERRED" if self._is_sqlite else "REPEATABLE READ"):
            yield

    def is_there(self) -> bool:
        """Whether there is a database of ours, without making one: a file, or our tables on a server."""
        if self.path is not None:
            return self.path.exists()
        from bgsupervisor.database import migrations  # noqa: PLC0415 - only a store's first call pays for it

        with self.unchecked():
            return bool(migrations.applied(self))

    def close(self) -> None:
        """Close this thread's connection."""
        if not self.database.is_closed():
            self.database.close()
        self._threads.__dict__.clear()

    def write_problem(self, *, wait_s: float) -> str | None:
        """Return why nobody can write now, in one sentence; None if one can. Blocks for at most *wait_s*."""
        before = getattr(self.database, "timeout", 0.0)
        try:
            with translated(self):  # a server is told of it, and may have hung up
                self._forget_lost_connection()
                self.set_busy_timeout(wait_s)
            with self.writing():  # on files that it may not write, SQLite only finds out with a statement that writes
                self.database.execute_sql(f'DELETE FROM "{self.tables.prefix}supervisor" WHERE 1 = 0')  # noqa: S608 - our own prefix
        except (AccessError, DatabaseError) as error:
            return str(error)
        finally:
            with contextlib.suppress(peewee.PeeweeException):
                self.set_busy_timeout(before)
        return f"the database {self.place} cannot be written, {_FULL}" if _is_full(self.path) else None

    def data_version(self) -> int:
        """Return a number that changes when another connection has committed; in PostgreSQL also when we have."""
        with self.connected():
            if not self._is_sqlite:
                return hash(self.database.execute_sql("SELECT pg_current_snapshot()::text").fetchone()[0])
            return int(self.database.execute_sql("PRAGMA data_version").fetchone()[0])

    def set_busy_timeout(self, seconds: float) -> None:
        """Change how long this thread's connection waits for another writer."""
        if isinstance(self.database, peewee.SqliteDatabase | postgres.Server):
            self.database.timeout = seconds

    def hurry(self) -> None:
        """Have no call wait for a server that is away or stands still, but for a second when it falls silent."""
        if self._server is not None:
            self._server.hurried = True

    def let_statements_take_long(self) -> None:
        """Lift the limit of a statement's time until the open transaction ends (PostgreSQL; SQLite has none)."""
        if not self._is_sqlite:
            self.database.execute_sql("SET LOCAL statement_timeout = 0")

    @property
    def place(self) -> str:
        """How to name the database to people: its file, or its address without the password."""
        return str(self.path or masked(getattr(self.database, "url", "") or str(self.database.database)))

    def inode(self) -> int | None:
        """Return the inode of the database file as its path has it now; None if nobody can tell.

        0 if it is gone, or empty: it has been truncated, for a database that was opened is not.
        """
        if self.path is None:
            return None
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return 0
        except OSError:
            return None
        return found.st_ino if found.st_size else 0

    def wal_path(self) -> Path | None:
        """Return the -wal file's path, where there is one."""
        return None if self.path is None else Path(f"{self.path}-wal")

    def listener(self) -> postgres.Listener:
        """Return a connection that becomes readable when others have written (PostgreSQL).

        Raises:
            OSError: The server is away, or there is none.
        """
        if self._server is None:
            raise OSError(errno.EOPNOTSUPP, "only a server tells")
        if self._server.hurried and self._server.is_closed():
            raise OSError(errno.ENOTCONN, "it is away")  # nobody waits for it
        return postgres.Listener(self._server, self.tables.prefix)

    def explain(self, error: peewee.PeeweeException | sqlite3.Error) -> DatabaseError | AccessError:
        """Say in one sentence what is wrong with the database and what to do."""
        if not self._is_sqlite:
            return postgres.explain(_of_driver(_first(error)), self.database)
        text = str(_first(error))
        access = self._missing_right()
        if access is not None:
            return access
        where = f"the database {self.path or self.database.database}"
        if "no such table" in text or "no such column" in text:
            return DatabaseError(
                f"{where} lacks tables or columns of this version ({text}); run `bgsupervisor migrate`"
            )
        if "not a database" in text or "malformed" in text:
            return DatabaseError(f"{where} is damaged ({text}); restore it from a backup")
        if ("locked" in text or "busy" in text) and self.database.in_transaction():
            # In a transaction that has read SQLite waits for nobody; after another's commit it cannot write any more.
            return DatabaseError(
                f"{where} is locked by another writer, or was written since your transaction began; roll it back and "
                "repeat it, and begin it with BEGIN IMMEDIATE, which waits"
            )
        if "locked" in text or "busy" in text:
            waited_s = getattr(self.database, "timeout", 0.0)
            return DatabaseError(f"{where} is locked by another writer for longer than {waited_s:g} s; try again")
        if "full" in text:
            return DatabaseError(f"{where} cannot be written, {_FULL}")
        return DatabaseError(f"{where} cannot be used: {text}")

    def _missing_right(self) -> AccessError | None:
        if self.path is None:
            return None
        from bgsupervisor.system.users import user_name  # noqa: PLC0415 - only on the way to an error

        user = user_name(os.geteuid()) if hasattr(os, "geteuid") else "this user"
        folder = self.path.parent
        try:
            if not folder.is_dir():
                message = f"the folder {folder} of the database does not exist; create it, or set `database` elsewhere"
                return AccessError(message, path=str(folder), user=user, right="create")
            if hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY:
                message = f"the file system of {folder} is mounted read-only; SQLite needs to write there"
                return AccessError(message, path=str(folder), user=user, right="write")
            for path, what in ((folder, "folder"), (self.path, "database file")):
                if path.exists() and not os.access(path, os.W_OK):
                    need = "SQLite needs the right to write there"
                    message = f"the {what} {path} cannot be written by user {user}; {need}"
                    return AccessError(message, path=str(path), user=user, right="write")
        except PermissionError:
            message = f"user {user} may not enter the folders that lead to {self.path}; give the right to"
            return AccessError(message, path=str(self.path), user=user, right="read")
        return None

    def _connect(self) -> None:
        if self.owned and self.path is not None:
            if self.creates:
                _create_file(self.path)
            elif self.inode() == 0:
                raise DatabaseError(f"the database {self.path} is not there, or is empty")
            self._connect_in_wal_mode()
            self._threads.inode = self.inode()
        else:
            self.database.connect(reuse_if_open=True)
        if self.owned:
            self._threads.connection = _ThreadConnection(self.database)

    def _connect_in_wal_mode(self) -> None:
        """Connect; where others turn the new file into WAL mode just now, SQLite does not wait for them by itself."""
        clock = SystemClock()
        deadline = clock.monotonic() + getattr(self.database, "timeout", 0.0)
        while True:
            try:
                self.database.connect(reuse_if_open=True)
                self.database.connection().text_factory = _readable
            except peewee.OperationalError as error:
                if _sqlite_code(_of_driver(error)) != LOCKED or clock.monotonic() >= deadline:
                    raise
            else:
                return
            clock.sleep(WAL_RETRY_S)

    def _have_asked_the_time(self) -> None:
        with self.connected():
            pass

    def _server_time(self) -> datetime:
        moment: datetime = self.database.execute_sql("SELECT clock_timestamp()").fetchone()[0]
        return moment.astimezone(UTC)

    def _check_schema(self) -> None:
        from bgsupervisor.database import migrations  # noqa: PLC0415 - only a store's first call pays for it

        if not self.owned:
            self.warn_of_weak_durability()
        migrations.ensure(self)
        # Tables that were made inside a transaction of the caller go with it if it is rolled back.
        self._schema_checked = not self.database.in_transaction()

    def warn_of_weak_durability(self) -> None:
        """Say once if what the application's connection commits may be lost at a power cut."""
        if self._durability_checked:
            return
        self._durability_checked = True
        if not self._is_sqlite:
            if self.database.execute_sql("SELECT current_setting('synchronous_commit')").fetchone()[0] == "off":
                log.warning(
                    "the application's connection has synchronous_commit=off: "
                    "a request may be lost when the server dies; synchronous_commit=on keeps it"
                )
            return
        journal = self.database.execute_sql("PRAGMA journal_mode").fetchone()[0]
        synchronous = self.database.execute_sql("PRAGMA synchronous").fetchone()[0]
        if journal in ("off", "memory") or synchronous < 2:  # noqa: PLR2004 - 2 is FULL
            log.warning(
                "the application's SQLite connection has journal_mode=%s and synchronous=%s: "
                "a request may be lost at a power cut; synchronous=FULL (2) and journal_mode=WAL keep it",
                journal,
                synchronous,
            )

    def _forget_replaced_file(self) -> None:
        """Open the new file after a restore: what is written to a deleted one is lost without a word."""
        known = getattr(self._threads, "inode", None)
        if not self._follows_file or not known or self.database.is_closed() or self.database.in_transaction():
            return
        now = self.inode()
        if now is not None and now != known:
            log.warning("the database file %s was replaced; opening the new one", self.path)
            self.close()
            self._schema_checked = False

    def _forget_lost_connection(self) -> None:
        """Connect anew after the server has hung up: nothing was under way that could have been half done."""
        if self._is_sqlite or not self.owned or self.database.is_closed() or self.database.in_transaction():
            return
        if postgres.is_lost(self.database):
            self.close()

    def _forget_after_fork(self) -> None:
        if self._pid == os.getpid():
            return
        with self._fork_lock:
            if self._pid != os.getpid():
                # A connection must not be used, nor closed, on both sides of a fork.
                self._inherited = self._threads
                self._threads = threading.local()
                if self.owned:
                    self.database.dispose()
                self._pid = os.getpid()


_owned: weakref.WeakSet[Store] = weakref.WeakSet()


def close_owned() -> None:
    """Close what this thread has opened for stores of our own; each opens anew when it is next used."""
    for store in list(_owned):
        with contextlib.suppress(peewee.PeeweeException):  # a transaction is open
            store.close()


def _call(reference: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method if its object is still there: the clock of a store that is gone goes by the machine's own."""
    method = reference()
    if method is not None:
        method()


def _is_full(path: Path | None) -> bool:
    """Whether the file system has no room for a transaction of this user."""
    try:
        found = os.statvfs(path.parent) if path is not None and hasattr(os, "statvfs") else None
    except OSError:
        return False
    if found is None:
        return False
    return found.f_frsize * (found.f_bavail if os.geteuid() else found.f_bfree) < FULL_BYTES


def _readable(text: bytes) -> str:
    """Read a text whatever bytes somebody stored in it: one bad row must not keep the others from being read."""
    return text.decode("utf-8", "replace")


def _create_file(path: Path) -> None:
    """Create an empty database file; its group may write it where the folder is shared, whatever the umask."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), PRIVATE_MODE)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, _mode_in(path.parent.stat(), os.fstat(descriptor).st_gid))
        finally:
            os.close(descriptor)


def _mode_in(folder: os.stat_result, gid: int) -> int:
    """Return the rights of a database file of group *gid* in a folder; SQLite gives -wal and -shm the same.

    A folder is shared by its group if it is setgid or that group may write it. A file of another group, such as its
    maker's first one, is for nobody else.
    """
    is_shared = folder.st_mode & (stat.S_ISGID | stat.S_IWGRP) and gid == folder.st_gid
    return SHARED_MODE if is_shared else PRIVATE_MODE
