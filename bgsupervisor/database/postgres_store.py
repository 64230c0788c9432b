"""A database of PostgreSQL: connections that may be lost, a clock of its own, and who may have one."""

from __future__ import annotations

import contextlib
import errno
import sys
import weakref
from collections.abc import Callable  # noqa: TC003 - a module-level annotation
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import peewee

from bgsupervisor import sanitize
from bgsupervisor.addresses import masked
from bgsupervisor.clock import ServerClock, repeat_last
from bgsupervisor.database import postgres
from bgsupervisor.database.errors import (
    driver_error,
    first_error,
)
from bgsupervisor.database.store import Store
from bgsupervisor.errors import AccessError, DatabaseError, ServerAway

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from pathlib import Path

    from bgsupervisor.database.connection_limit import ConnectionLimit

__all__ = ["PostgresStore"]

log = sanitize.logger()

T = TypeVar("T")

COME_BACK_S = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Pauses between tries to reach a server that has hung up; the last one repeats."""


class PostgresStore(Store):
    """A database of PostgreSQL."""

    locks_rows = True
    _writing_level, _reading_level = "READ COMMITTED", "REPEATABLE READ"

    def __init__(self, database: peewee.Database, prefix: str, *, owned: bool, path: Path | None) -> None:
        super().__init__(database, prefix, owned=owned, path=path)
        self._lock_key = postgres.lock_key(prefix)
        self._server = database if isinstance(database, postgres.Server) else None
        # The clock does not keep the store, which closes its connections as soon as nobody has it any more.
        ask_the_time = weakref.WeakMethod(self._have_asked_the_time)
        self.clock = self.server_clock = ServerClock(lambda: _call(ask_the_time))
        self._connection_limit: ConnectionLimit | None = None
        self.patience_s = 0.0

    @classmethod
    def of_url(cls, url: str, prefix: str, *, busy_timeout_s: float, durable: bool, patience_s: float) -> PostgresStore:
        """Make a store of its own; arguments as `Store.open`."""
        server = postgres.open_server(url, busy_timeout_s=busy_timeout_s, durable=durable)
        store = cls(server, prefix, owned=True, path=None)
        store.patience_s = patience_s
        return store

    def follow(self, own: Store) -> None:
        """As `Store.follow`; the server is asked on whichever connection there is."""
        super().follow(own)
        if isinstance(own, PostgresStore):
            self.server_clock = own.server_clock

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """As `Store.connected`; waits for a place among those of the host where connections are limited."""
        if self._connection_limit is None or self._server is None:
            with super().connected():
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
            stack.enter_context(super().connected())
            yield

    def is_there(self) -> bool:
        """As `Store.is_there`."""
        from bgsupervisor.database import migrations  # noqa: PLC0415 - only a store's first call pays for it

        with self.unchecked():
            return bool(migrations.applied(self))

    def data_version(self) -> int:
        """As `Store.data_version`."""
        with self.connected():
            return hash(self.database.execute_sql("SELECT pg_current_snapshot()::text").fetchone()[0])

    @property
    def place(self) -> str:
        """As `Store.place`."""
        return masked(getattr(self.database, "url", "") or str(self.database.database))

    def let_statements_take_long(self) -> None:
        """As `Store.let_statements_take_long`."""
        self.database.execute_sql("SET LOCAL statement_timeout = 0")

    def persistently(self, call: Callable[[], T]) -> T:
        """As `Store.persistently`."""
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

    def draw_id(self) -> int | None:
        """As `Store.draw_id`."""
        if self._server is None or self.database.in_transaction():
            return None
        return postgres.draw(self.database, f"{self.tables.prefix}task", "id")

    def explain(self, error: peewee.PeeweeException | sqlite3.Error) -> DatabaseError | AccessError:
        """As `Store.explain`."""
        return postgres.explain(driver_error(first_error(error)), self.database)

    def _transaction(self, *, alone: bool) -> contextlib.AbstractContextManager[None]:
        return self._decided(self.alone() if alone else self.database.atomic())

    def _lock_out_writers(self) -> None:
        postgres.lock_out_writers(self.database, self._lock_key)

    def _ask_the_time(self, *, is_new: bool) -> None:
        if is_new or self.server_clock.is_old():
            self.server_clock.ask(self._server_time)

    def _check_durability(self) -> None:
        if self.database.execute_sql("SELECT current_setting('synchronous_commit')").fetchone()[0] == "off":
            log.warning(
                "the application's connection has synchronous_commit=off: "
                "a request may be lost when the server dies; synchronous_commit=on keeps it"
            )

    def limit_connections(self, folder: Path) -> None:
        """As `Store.limit_connections`."""
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

    def hurry(self) -> None:
        """As `Store.hurry`."""
        if self._server is not None:
            self._server.hurried = True

    def listener(self) -> postgres.Listener:
        """As `Store.listener`."""
        if self._server is None:
            return super().listener()
        if self._server.hurried and self._server.is_closed():
            raise OSError(errno.ENOTCONN, "it is away")  # nobody waits for it
        return postgres.Listener(self._server, self.tables.prefix)

    def _have_asked_the_time(self) -> None:
        with self.connected():
            pass

    def _server_time(self) -> datetime:
        moment: datetime = self.database.execute_sql("SELECT clock_timestamp()").fetchone()[0]
        return moment.astimezone(UTC)

    def _forget_unusable(self) -> None:
        """Connect anew after the server has hung up: nothing was under way that could have been half done."""
        if not self.owned or self.database.is_closed() or self.database.in_transaction():
            return
        if postgres.is_lost(self.database):
            self.close()


def _call(reference: weakref.WeakMethod[Callable[[], None]]) -> None:
    """Call a method if its object is still there: the clock of a store that is gone goes by the machine's own."""
    method = reference()
    if method is not None:
        method()
