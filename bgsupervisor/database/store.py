"""A database and its connections: opened when first used, in every thread and after every fork.

Peewee classes are made per database and prefix (`Tables`): two Services on two databases work at once in one
process, which binding shared classes to the database of the moment would mix up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Callable  # noqa: TC003 - a module-level annotation
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from bgsupervisor import sanitize
from bgsupervisor.addresses import is_postgres, sqlite_path
from bgsupervisor.clock import SystemClock
from bgsupervisor.database import postgres
from bgsupervisor.database.errors import (
    translated,
)
from bgsupervisor.database.tables import Tables
from bgsupervisor.errors import AccessError, BgSupervisorError, DatabaseError, Undecided

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

    from bgsupervisor.clock import Clock

__all__ = [
    "Store",
    "close_owned",
]

log = sanitize.logger()

T = TypeVar("T")


FULL = "the disk is full; free some space and try again"
FULL_BYTES = 64 * 1024
"""Free space below which no transaction fits, in bytes."""


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
        self.creates = True
        self.clock: Clock = SystemClock()
        self._pid = os.getpid()
        self._threads = threading.local()
        self._fork_lock = threading.Lock()
        self._schema_checked = self._durability_checked = False

    @staticmethod
    def open(
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
        store: Store
        if is_postgres(url):
            from bgsupervisor.database.postgres_store import PostgresStore  # noqa: PLC0415 - it imports this module

            store = PostgresStore.of_url(
                url, prefix, busy_timeout_s=busy_timeout_s, durable=durable, patience_s=patience_s
            )
        else:
            from bgsupervisor.database.sqlite_store import SqliteStore  # noqa: PLC0415 - as above

            store = SqliteStore.of_file(
                sqlite_path(url),
                prefix,
                busy_timeout_s=busy_timeout_s,
                checkpointer=checkpointer,
                durable=durable,
                looks=looks,
                has_neighbours=has_neighbours,
            )
        store.creates = creates and not looks
        _owned.add(store)
        return store

    @staticmethod
    def share(database: peewee.Database, prefix: str) -> Store:
        """Make a store on the application's own database object."""
        if not isinstance(database, peewee.SqliteDatabase):
            from bgsupervisor.database.postgres_store import PostgresStore  # noqa: PLC0415 - as above

            return PostgresStore(database, prefix, owned=False, path=None)
        from bgsupervisor.database.sqlite_store import SqliteStore  # noqa: PLC0415 - as above

        path = Path(database.database) if database.database else None
        return SqliteStore(database, prefix, owned=False, path=path)

    @staticmethod
    def external(database: peewee.Database, own: Store) -> Store:
        """Make a store on connections that the application lends; no tables are made or checked there."""
        store = type(own)(database, own.tables.prefix, owned=False, path=own.path)
        store.follow(own)
        return store

    def follow(self, own: Store) -> None:
        """Take the time, and the state of the tables, from another store of the same database."""
        self._schema_checked = True
        self.clock = own.clock

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Open a connection in this thread; on a shared database close it again if it was closed before."""
        self._forget_after_fork()
        self._forget_unusable()
        with translated(self):
            opened_here = self.database.is_closed()
            try:
                if opened_here:
                    self._connect()
                self._ask_the_time(is_new=opened_here)
                if not self._schema_checked:
                    self._check_schema()
                yield
            finally:
                if opened_here and not self.owned and not self.database.is_closed():
                    self.database.close()

    @contextlib.contextmanager
    def unchecked(self) -> Iterator[None]:
        """Open a connection in this thread, whatever the tables are like."""
        self._forget_after_fork()
        with translated(self):
            if self.database.is_closed():
                self._connect()
            yield

    def undecided(self, error: BgSupervisorError) -> Undecided:
        """Return the error of a commit whose result is unknown, and why."""
        return Undecided(
            f"{error}; the connection was lost while it was being recorded, so it may have been recorded or not: "
            "look before it is asked for again"
        )

    @contextlib.contextmanager
    def writing(self, *, alone: bool = True) -> Iterator[None]:
        """Open a transaction that may write; inside the caller's own it joins that one.

        No other process writes meanwhile. With *alone* false others may, on PostgreSQL, if no row of theirs is touched.
        If the connection is lost, it returns if all was committed, and raises ServerAway if nothing was.

        Raises:
            Undecided: No server could report which of the two for `patience_s`, or it does not know.
        """
        with self.connected(), self._transaction(alone=alone):
            yield

    def _transaction(self, *, alone: bool) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002 - for servers
        return self.alone()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Open a transaction on the open connection, during which no other one is alone."""
        with self.database.atomic(self._writing_level):
            self._lock_out_writers()
            yield

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Open a transaction that only reads: all of it as of one moment, beside any writer."""
        with self.connected(), self.database.atomic(self._reading_level):
            yield

    def persistently(self, call: Callable[[], T]) -> T:
        """Return what *call* returns, one transaction; if the server hangs up, come back to it and repeat it.

        Only what was not recorded is repeated. Inside a transaction it is called once.

        Raises:
            LockedByCaller: A transaction that this thread has open keeps the file locked (SQLite).
            ServerAway: No server for `patience_s`.
            Undecided: As `writing`.
        """
        return call()

    def draw_id(self) -> int | None:
        """Return an id for a new task that no other request gets; None where the database chooses it.

        By this id a caller finds what was recorded although the answer was lost, and cannot record it twice.
        """
        return None

    def write_first(self) -> None:
        """Take the write lock for a transaction that the caller has open, before anything is read in it (SQLite).

        A deferred transaction that has read cannot write after another's commit: https://sqlite.org/isolation.html
        """

    def limit_connections(self, folder: Path) -> None:
        """Keep a connection to a server only during a call, and limit how many processes of the host have one.

        *folder* is the state directory.
        """

    def hurry(self) -> None:
        """Let no call wait for a server that is away, and at most a second for one that is silent."""

    def let_statements_take_long(self) -> None:
        """Lift the limit of a statement's time until the open transaction ends (PostgreSQL; SQLite has none)."""

    def inode(self) -> int | None:
        """Return the inode of the database file as its path has it now; None if it cannot be read.

        0 if it is gone, or empty: it has been truncated, for a database that was opened is not.
        """
        return None

    def wal_path(self) -> Path | None:
        """Return the -wal file's path, where there is one."""
        return None

    def listener(self) -> postgres.Listener:
        """Return a connection that becomes readable when others have written (PostgreSQL).

        Raises:
            OSError: The server is away, or there is none.
        """
        raise OSError(errno.EOPNOTSUPP, "only a server notifies")

    def set_busy_timeout(self, seconds: float) -> None:
        """Change how long this thread's connection waits for another writer."""
        if isinstance(self.database, peewee.SqliteDatabase | postgres.Server):
            self.database.timeout = seconds

    def warn_of_weak_durability(self) -> None:
        """Warn once if what the application's connection commits may be lost at a power cut."""
        if not self._durability_checked:
            self._durability_checked = True
            self._check_durability()

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Open a connection for one statement that locks out no writer: its own transaction, or the caller's."""
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

    def close(self) -> None:
        """Close this thread's connection."""
        if not self.database.is_closed():
            self.database.close()
        self._threads.__dict__.clear()

    def write_problem(self, *, wait_s: float) -> str | None:
        """Return why no process can write now, in one sentence; None if one can. Blocks for at most *wait_s*."""
        before = getattr(self.database, "timeout", 0.0)
        try:
            with translated(self):  # this is a statement on a server, which may have hung up
                self._forget_unusable()
                self.set_busy_timeout(wait_s)
            with self.writing():  # on files that it may not write, SQLite only finds out with a statement that writes
                self.database.execute_sql(f'DELETE FROM "{self.tables.prefix}supervisor" WHERE 1 = 0')  # noqa: S608 - our own prefix
        except (AccessError, DatabaseError) as error:
            return str(error)
        finally:
            with contextlib.suppress(peewee.PeeweeException):
                self.set_busy_timeout(before)
        return f"the database {self.place} cannot be written, {FULL}" if _is_full(self.path) else None

    # What the two kinds of databases do each in their way

    locks_rows: bool
    _writing_level: str
    _reading_level: str

    def is_there(self) -> bool:
        """Whether there is a database of ours, without making one: a file, or our tables on a server."""
        raise NotImplementedError

    def data_version(self) -> int:
        """Return a number that changes when another connection has committed; in PostgreSQL also when we have."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """The name of the database for people: its file, or its address without the password."""
        raise NotImplementedError

    def explain(self, error: peewee.PeeweeException | sqlite3.Error) -> DatabaseError | AccessError:
        """Return one sentence: what is wrong with the database and what to do."""
        raise NotImplementedError

    def _lock_out_writers(self) -> None:
        raise NotImplementedError

    def _check_durability(self) -> None:
        raise NotImplementedError

    def _forget_unusable(self) -> None:
        """Close a connection that leads nowhere any more; the next use opens another one."""

    def _ask_the_time(self, *, is_new: bool) -> None:
        """Compare the clocks, where the database has one."""

    def _open_connection(self) -> None:
        self.database.connect(reuse_if_open=True)

    def _connect(self) -> None:
        self._open_connection()
        if self.owned:
            self._threads.connection = _ThreadConnection(self.database)

    def _check_schema(self) -> None:
        from bgsupervisor.database import migrations  # noqa: PLC0415 - only a store's first call pays for it

        if not self.owned:
            self.warn_of_weak_durability()
        migrations.ensure(self)
        # Tables that were made inside a transaction of the caller go with it if it is rolled back.
        self._schema_checked = not self.database.in_transaction()

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


def _is_full(path: Path | None) -> bool:
    """Whether the file system has no room for a transaction of this user."""
    try:
        found = os.statvfs(path.parent) if path is not None and hasattr(os, "statvfs") else None
    except OSError:
        return False
    if found is None:
        return False
    return found.f_frsize * (found.f_bavail if os.geteuid() else found.f_bfree) < FULL_BYTES
