"""The rows as others see them, without the product: read, written by hand, held, cut off. SQLite and PostgreSQL alike.

Statements are written as SQLite has them, with a question mark for a value; moments come as text.
"""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
from datetime import datetime
from typing import TYPE_CHECKING, Any

from bgsupervisor.database.postgres import lock_key

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Connection", "Database"]


class Connection:
    """One connection; each statement is a transaction by itself, unless within `at_once` or `alone`."""

    def __init__(self, driver: Any, *, prefix: str) -> None:
        self._driver = driver
        self._is_sqlite = isinstance(driver, sqlite3.Connection)
        self._prefix = prefix

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement and return its rows; none if it has none to return."""
        cursor = self._execute(statement, *values)
        return [tuple(_as_text(value) for value in row) for row in cursor.fetchall()] if cursor.description else []

    def dicts(self, statement: str, *values: object) -> list[dict[str, Any]]:
        """Run a query and return its rows by the names of their columns."""
        cursor = self._execute(statement, *values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, map(_as_text, row), strict=True)) for row in cursor.fetchall()]

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Have one transaction."""
        self._execute("BEGIN")
        yield
        self._execute("COMMIT")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off all who write more than a single request, as the product does."""
        self._execute("BEGIN IMMEDIATE" if self._is_sqlite else "BEGIN")
        try:
            if not self._is_sqlite:
                self._execute("SELECT pg_advisory_xact_lock(?)", lock_key(self._prefix))
            yield
        finally:
            self._execute("ROLLBACK")

    def _execute(self, statement: str, *values: object) -> Any:
        if not self._is_sqlite:
            statement = statement.replace("%", "%%").replace("?", "%s")
        return self._driver.execute(statement, values)


class Database:
    """A database by its address.

    Attributes:
        error: What its driver raises.
    """

    def __init__(self, url: str, *, prefix: str = "bgsupervisor_") -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite:///")
        self._prefix = prefix
        driver: Any = sqlite3 if self.is_sqlite else importlib.import_module("psycopg")
        self._connect = driver.connect
        self.error: type[Exception] = driver.Error

    @contextlib.contextmanager
    def connection(self, timeout_s: float = 10.0) -> Iterator[Connection]:
        """Connect for a moment; whatever is locked is waited for so long."""
        if self.is_sqlite:
            path = self.url.removeprefix("sqlite:///")
            driver = self._connect(path, timeout=timeout_s, isolation_level=None)
        else:
            driver = self._connect(self.url, autocommit=True, options=f"-c lock_timeout={timeout_s * 1000:.0f}")
        with contextlib.closing(driver):
            yield Connection(driver, prefix=self._prefix)

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        with self.connection() as connection:
            return connection.rows(statement, *values)

    def dicts(self, statement: str, *values: object) -> list[dict[str, Any]]:
        """Run one query and return its rows by the names of their columns."""
        with self.connection() as connection:
            return connection.dicts(statement, *values)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold off all others who write, for a while."""
        with self.connection() as connection, connection.alone():
            yield

    def hang_up(self) -> int:
        """End all connections of the product to a server, as its operator may; return how many there were."""
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        return len(self.rows(f"{end} WHERE datname = current_database() AND application_name = 'bgsupervisor'"))


def _as_text(value: object) -> object:
    return value.isoformat(sep=" ") if isinstance(value, datetime) else value
