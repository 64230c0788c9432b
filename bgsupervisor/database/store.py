"""A database and its connections: opened when first used, in every thread and after every fork.

Peewee classes are made per database and prefix (`Tables`): two Services on two databases work at once in one
process, which binding shared classes to the database of the moment would mix up.
"""

from __future__ import annotations

import contextlib
import errno
import gc
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

import peewee

from bgsupervisor import sanitize
from bgsupervisor.addresses import is_postgres, masked, sqlite_path
from bgsupervisor.clock import ServerClock, SystemClock, repeat_last
from bgsupervisor.database import postgres
from bgsupervisor.database.errors import (
    LOCKED,
    driver_error,
    first_error,
    forget_frames,
    is_locked,
    sqlite_code,
    translated,
)
from bgsupervisor.database.tables import Tables
from bgsupervisor.database.values import readable
from bgsupervisor.errors import AccessError, BgSupervisorError, DatabaseError, LockedByCaller, ServerAway, Undecided

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bgsupervisor.clock import Clock
    from bgsupervisor.database.callers import OpenTransaction
    from bgsupervisor.database.connection_limit import ConnectionLimit

__all__ = [
    "Store",
    "close_owned",
    "roll_back_abandoned",
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


_FULL = "the disk is full; free some space and try again"
FULL_BYTES = 64 * 1024
"""With less room than this no transaction fits."""


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
                forget_frames(error)
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
            return postgres.explain(driver_error(first_error(error)), self.database)
        text = str(first_error(error))
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
                self.database.connection().text_factory = readable
            except peewee.OperationalError as error:
                if sqlite_code(driver_error(error)) != LOCKED or clock.monotonic() >= deadline:
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
