"""A request on a connection of the application: what it is, whether a transaction is open, what follows its commit.

Frameworks are recognised by where their classes come from; none is imported. Writes no row itself: it gives the ledger
a database object that speaks through the application's connection for one call, and leaves that as it found it.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import peewee

from bgsupervisor.database.callers import origins, same_file
from bgsupervisor.database.errors import translated
from bgsupervisor.database.store import Store
from bgsupervisor.errors import DatabaseError, RequestRefused
from bgsupervisor.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bgsupervisor.clock import Clock

    AfterCommit = Callable[[Callable[[], object]], object]

__all__ = ["ExternalConnection", "ExternalConnections", "cursor_of", "is_in_transaction", "recognised"]

_KNOWN = (
    "give a Peewee database, Django's connection, an SQLAlchemy Session or Connection, or a connection of sqlite3, "
    "psycopg or psycopg2"
)
_IN_TRANSACTION, _FAILED, _UNKNOWN = 2, 3, 4
"""What libpq says of a transaction; both drivers pass it on as it is."""
_WHERE = """SELECT to_regclass(%s)::oid::bigint, current_database()::text,
    (1000 * extract(epoch FROM pg_postmaster_start_time()))::bigint"""
"""Two connections that see one table of one server get the same answer; null is no table."""


class ExternalConnection(NamedTuple):
    """A connection of the application.

    Attributes:
        raw: The driver's own connection.
        after_commit: Has something called after the commit of the transaction that is open in the framework; None if
            the framework cannot. The supervisor then hears of the commit from the database.
        doubt: Has the framework see whether the connection is alive before it is used in what follows.
    """

    raw: Any
    after_commit: AfterCommit | None = None
    doubt: Callable[[], object] | None = None


class _Recognised:
    """Stands on Peewee's stack for the transaction of the application."""


class _File(peewee.SqliteDatabase):
    """Peewee's side of an sqlite3 connection that the application has passed in this thread."""

    _state: Any  # Peewee's, per thread

    @contextlib.contextmanager
    def on(self, raw: Any) -> Iterator[None]:  # noqa: ANN401 - a subclass may be anything
        """Speak through *raw*; how it reads texts is ours meanwhile."""
        text_factory, raw.text_factory = raw.text_factory, str
        self._timeout = sqlite3.Cursor(raw).execute("PRAGMA busy_timeout").fetchall()[0][0] / 1000
        self._state.set_connection(raw)
        try:
            yield
        finally:
            self._state.reset()
            raw.text_factory = text_factory

    def cursor(self, named_cursor: None = None) -> Any:  # noqa: ANN401, ARG002 - as Peewee has it
        """Return a cursor as sqlite3 has it, whatever rows and cursors the application has made its own."""
        return sqlite3.Cursor(self._state.conn)


class _Server(peewee.PostgresqlDatabase):
    """Peewee's side of a psycopg or psycopg2 connection that the application has passed in this thread."""

    _state: Any  # Peewee's, per thread

    @contextlib.contextmanager
    def on(self, raw: Any) -> Iterator[None]:  # noqa: ANN401 - the drivers may not be installed
        """Speak through *raw*."""
        self._state.set_connection(raw)
        try:
            yield
        finally:
            self._state.reset()

    def cursor(self, named_cursor: None = None) -> Any:  # noqa: ANN401, ARG002 - as Peewee has it
        """Return a cursor as the driver has it, whatever rows and cursors the application has made its own."""
        return cursor_of(self._state.conn)


class ExternalConnections:
    """The rows of one installation, written through connections of the application.

    Args:
        own: The store of the configured database, where every passed connection must lead to.
        prefix: Of its tables.
        clock: The ledger's.
    """

    def __init__(self, own: Store, prefix: str, clock: Clock) -> None:
        self.own = own
        self._prefix = prefix
        self._database: _File | _Server
        if isinstance(own.database, peewee.SqliteDatabase):
            self._database = _File(str(own.path), autoconnect=False)
        else:
            self._database = _Server(own.place, autoconnect=False)
        self._store = Store.external(self._database, own)
        self._ledger = Ledger(self._store, clock)
        self._whereabouts: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def on(self, connection: object, then: Callable[[], object]) -> Iterator[Ledger]:
        """Have the ledger on *connection*, in its open transaction; in one of its own if the connection autocommits.

        Args:
            connection: What the application has; see `Service.request`.
            then: Called after the commit, if anybody tells of it.

        Raises:
            RequestRefused: It is no connection, or leads to another database.
            DatabaseError: It is closed, or its transaction has failed; our tables are missing.
        """
        raw, after_commit, doubt = recognised(connection)
        if isinstance(raw, sqlite3.Connection) is not isinstance(self._database, _File):
            raise self._elsewhere("SQLite" if isinstance(raw, sqlite3.Connection) else "PostgreSQL")
        was_open = is_in_transaction(raw)
        try:
            with self._database.on(raw):
                with self._joining(was_open), translated(self._store):
                    self._open(raw)
                    self._store.warn_of_weak_durability()
                joined = is_in_transaction(raw)
                with self._joining(joined):
                    yield self._ledger
        except BaseException as error:
            if not was_open and is_in_transaction(raw):  # opened by us alone, with nothing of the application in it
                raw.rollback()
            if isinstance(error, DatabaseError) and doubt is not None:
                doubt()
            if isinstance(error, peewee.IntegrityError):
                raise DatabaseError(
                    "the unique key is held by a task which this transaction does not see, for it sees nothing that "
                    "was committed since it began; use READ COMMITTED, or do this after the commit"
                ) from error
            raise
        if not joined:
            then()
        elif after_commit is not None:
            after_commit(then)

    @contextlib.contextmanager
    def _joining(self, theirs: bool) -> Iterator[None]:
        """Have Peewee know of a transaction of the application, so that ours become savepoints within it."""
        if not theirs:
            yield
            return
        push: Any = self._database.push_transaction
        pop: Any = self._database.pop_transaction
        push(_Recognised())
        try:
            yield
        finally:
            pop()

    def _open(self, raw: Any) -> None:  # noqa: ANN401 - of either driver
        """See that *raw* leads to where the supervisor looks, and have the driver open a transaction if it would."""
        if isinstance(self._database, _Server):
            self._check_server()
            return
        file = next(
            row[2] for row in sqlite3.Cursor(raw).execute("PRAGMA database_list").fetchall() if row[1] == "main"
        )
        if not file or self.own.path is None or not same_file(file, self.own.path):
            raise self._elsewhere(file or "a database in memory")
        # It changes nothing, but is the kind of statement before which sqlite3 begins a transaction; a savepoint is
        # not, and would commit at its end. And only a transaction whose first statement writes waits for others.
        execute_sql: Any = self._database.execute_sql
        execute_sql(f'DELETE FROM "{self._prefix}task" WHERE 1 = 0')  # noqa: S608 - our own prefix

    def _check_server(self) -> None:
        here = self._ask(self._database)
        if here[0] is None:
            raise DatabaseError(
                f"the connection sees no table {self._prefix}task in the database {here[1]}, and a request "
                "on it makes none; run `bgsupervisor migrate`, or correct its search_path"
            )
        if here == self._whereabouts:
            return
        with self.own.connected():  # once for all, and again after the server has started anew
            self._whereabouts = self._ask(self.own.database)
        if here != self._whereabouts:
            raise self._elsewhere(f"{here[1]} (its table {self._prefix}task is another one)")

    def _ask(self, database: peewee.Database) -> tuple[Any, ...]:
        execute_sql: Any = database.execute_sql
        return tuple(execute_sql(_WHERE, (f'"{self._prefix}task"',)).fetchone())

    def _elsewhere(self, where: str) -> RequestRefused:
        return RequestRefused(
            f"connection leads to another database, {where}; supervised is {self.own.place}. Set `database` to the "
            "application's, or request without connection after the commit"
        )


# What the application gives


def recognised(connection: Any) -> ExternalConnection:  # noqa: ANN401 - of any framework
    """Return the driver's connection behind *connection*, which can be worked with.

    Raises:
        RequestRefused: It is none that we know.
        DatabaseError: It cannot be used now.
    """
    if isinstance(connection, peewee.Proxy):
        connection = connection.obj
    packages = origins(connection)
    if isinstance(connection, peewee.Database):
        external = _of_peewee(connection)
    elif "django" in packages and hasattr(connection, "ensure_connection"):
        external = _of_django(connection)
    elif "sqlalchemy" in packages and not _is_async(connection):
        external = _of_sqlalchemy(connection)
    else:
        external = ExternalConnection(connection)
    _check_usable(external.raw)
    return external


def _of_peewee(database: peewee.Database) -> ExternalConnection:
    if database.is_closed() and not database.autoconnect:
        raise _unusable("it is closed")
    connect: Any = database.connection
    try:
        raw = connect()
    except peewee.PeeweeException as error:
        raise _unusable(error) from error

    def after_commit(then: Callable[[], object]) -> None:
        with contextlib.suppress(ValueError):  # under manual_commit() Peewee does not know
            database.after_commit(then)

    return ExternalConnection(raw, after_commit if database.in_transaction() else None)


def _of_django(connection: Any) -> ExternalConnection:  # noqa: ANN401 - Django may not be installed
    try:
        connection.validate_thread_sharing()
        if not connection.in_atomic_block:
            connection.close_if_health_check_failed()  # as before each statement of its own
        connection.ensure_connection()
    except sys.modules["django.db.utils"].Error as error:
        raise _unusable(error) from error
    if connection.in_atomic_block and connection.needs_rollback:
        raise _unusable("its transaction has failed, and is to be rolled back")
    return ExternalConnection(
        connection.connection,
        connection.on_commit if connection.in_atomic_block else None,
        functools.partial(setattr, connection, "errors_occurred", True),
    )


def _of_sqlalchemy(connection: Any) -> ExternalConnection:  # noqa: ANN401 - SQLAlchemy may not be installed
    try:
        if hasattr(connection, "get_bind"):  # a Session, or scoped_session
            connection = connection.connection()
        if not hasattr(connection, "exec_driver_sql"):
            return ExternalConnection(connection)
        raw = connection.connection.driver_connection
        if not connection.in_transaction() and not _is_async(raw):
            connection.exec_driver_sql("SELECT 1")  # it begins one, and so will commit what we write
    except sys.modules["sqlalchemy.exc"].SQLAlchemyError as error:
        raise _unusable(error) from error
    return ExternalConnection(raw)


def cursor_of(raw: Any) -> Any:  # noqa: ANN401 - of either driver
    """Return a cursor of psycopg or psycopg2 as the driver has it."""
    if "psycopg" in origins(raw):
        psycopg: Any = sys.modules["psycopg"]
        return psycopg.Cursor(raw, row_factory=psycopg.rows.tuple_row)
    return raw.cursor(cursor_factory=sys.modules["psycopg2.extensions"].cursor)


def _check_usable(raw: Any) -> None:  # noqa: ANN401 - of any driver
    kind = type(raw)
    if _is_async(raw):
        raise RequestRefused(
            f"connection is asynchronous ({kind.__module__}.{kind.__qualname__}), and a request is not; "
            "use a synchronous one in a thread, or request without connection after the commit"
        )
    if isinstance(raw, sqlite3.Connection):
        try:
            sqlite3.Cursor(raw).execute("PRAGMA database_list").close()
        except sqlite3.ProgrammingError as error:  # closed, or of another thread
            raise _unusable(error) from error
    elif origins(raw) & {"psycopg", "psycopg2"} and hasattr(raw, "autocommit"):
        state = _UNKNOWN if raw.closed else _transaction_of(raw)
        if state == _UNKNOWN:
            raise _unusable("it is closed")
        if state == _FAILED:
            raise _unusable("its transaction has failed, and is to be rolled back")
    else:
        raise RequestRefused(
            f"connection is a {kind.__module__}.{kind.__qualname__}, which cannot record a request; {_KNOWN}"
        )


def _unusable(why: object) -> DatabaseError:
    text = next(iter(str(why).strip().splitlines()), type(why).__name__)
    return DatabaseError(f"the application's connection cannot be used: {text}; nothing was recorded")


def is_in_transaction(raw: Any) -> bool:  # noqa: ANN401 - of either driver
    """Whether a transaction is open; the driver may open one before the next statement."""
    if isinstance(raw, sqlite3.Connection):
        return raw.in_transaction
    return _transaction_of(raw) in (_IN_TRANSACTION, _FAILED)


def _transaction_of(raw: Any) -> int:  # noqa: ANN401 - of either driver
    return int(raw.info.transaction_status)


def _is_async(connection: object) -> bool:
    kind = type(connection)
    return hasattr(kind, "__aenter__") or kind.__module__.startswith("sqlalchemy.ext.asyncio")
