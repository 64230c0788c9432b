"""The outcome of an application's transaction in which a test has requested tasks, savepoints included.

The request writes a mark beside the application's own rows. It is read again from outside, since by then the
connection may be closed, belong to another thread, or have an error in its transaction.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sqlite3
import sys
from typing import TYPE_CHECKING, Any, Protocol

from bgsupervisor.database.callers import origins
from bgsupervisor.ledger.external import cursor_of, is_in_transaction

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Mark", "Outcome", "mark", "outcomes"]

ATTACHED = "bgsupervisor_marks"
"""The name under which an SQLite connection of the application has the file of marks."""
TABLE = "bgsupervisor_mark"
"""A table of the file of marks; on PostgreSQL a temporary table."""
CONNECT_TIMEOUT_S = 5
"""How long a question to the server waits for a connection."""


class Outcome(enum.Enum):
    """The outcome of a transaction."""

    OPEN = "open"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"


class Mark(Protocol):
    """A trace in one transaction or savepoint of the application."""

    @property
    def place(self) -> object:
        """Return where it is; marks of one place are asked for together."""

    def ask(self, values: set[str]) -> dict[str, Outcome]:
        """Return the outcome of each mark of this place that *values* name."""

    value: str


def outcomes(marks: Iterable[Mark]) -> dict[Mark, Outcome]:
    """Return what became of the transaction of each mark."""
    places: dict[object, list[Mark]] = {}
    for one in marks:
        places.setdefault(one.place, []).append(one)
    found: dict[Mark, Outcome] = {}
    for these in places.values():
        known = these[0].ask({one.value for one in these})
        found |= {one: known[one.value] for one in these}
    return found


def mark(raw: Any, folder: Path) -> Mark | None:  # noqa: ANN401 - a connection of either driver
    """Leave a trace in the transaction of *raw*, which the driver opens if it would for an INSERT.

    Args:
        raw: The driver's own connection.
        folder: For files of marks; it stays as long as the application's connections.

    Returns:
        None where each statement is committed by itself.
    """
    if isinstance(raw, sqlite3.Connection):
        return _FileMark(raw, folder)
    if raw.autocommit and not is_in_transaction(raw):
        return None
    return _ServerMark(raw)


class _FileMark:
    """A row in a file of its own, attached to the application's connection: committed and rolled back with it.

    SQLite attaches within a transaction too, since 3.21 (https://www.sqlite.org/releaselog/3_21_0.html), and keeps the
    savepoints of all attached files together. The file stays attached: an outer transaction may outlive the test.
    """

    def __init__(self, raw: sqlite3.Connection, folder: Path) -> None:
        self._raw = raw
        self.value = os.urandom(16).hex()
        cursor = sqlite3.Cursor(raw)
        attached = {row[1]: row[2] for row in cursor.execute("PRAGMA database_list").fetchall()}
        if ATTACHED not in attached:
            attached[ATTACHED] = self._make(folder)
            cursor.execute(f"ATTACH ? AS {ATTACHED}", (attached[ATTACHED],))
        self.place = attached[ATTACHED]
        cursor.execute(f"INSERT INTO {ATTACHED}.{TABLE} VALUES (?)", (self.value,))  # noqa: S608 - constants

    @staticmethod
    def _make(folder: Path) -> str:
        file = str(folder / f"marks-{os.urandom(8).hex()}.db")
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # it can be read beside the application's transaction
            connection.execute(f"CREATE TABLE {TABLE} (value TEXT PRIMARY KEY) WITHOUT ROWID")
        return file

    def ask(self, values: set[str]) -> dict[str, Outcome]:
        """Return the outcome of each mark of this connection that *values* name."""
        with contextlib.closing(sqlite3.connect(self.place, timeout=0, isolation_level=None)) as outside:
            committed = self._marks(outside, TABLE)
            try:
                others = self._marks(self._raw, f"{ATTACHED}.{TABLE}")  # what a savepoint has lost is not among them
            except sqlite3.Error:  # closed, or of another thread
                try:
                    outside.execute("BEGIN IMMEDIATE")
                    others = set()
                except sqlite3.OperationalError:  # another connection may write: the transaction that made the marks
                    others = values
                committed = self._marks(outside, TABLE)  # perhaps a moment ago
        return {
            one: Outcome.COMMITTED if one in committed else Outcome.OPEN if one in others else Outcome.ROLLED_BACK
            for one in values
        }

    @staticmethod
    def _marks(connection: sqlite3.Connection, table: str) -> set[str]:
        found = sqlite3.Cursor(connection).execute(f"SELECT value FROM {table}")  # noqa: S608 - constants
        return {row[0] for row in found.fetchall()}


class _ServerMark:
    """The number of the transaction or savepoint, which it has once it has written a row, here of a temporary table.

    The server knows of each number whether it was committed, also of a savepoint's:
    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
    """

    def __init__(self, raw: Any) -> None:  # noqa: ANN401 - the drivers may not be installed
        self._driver: Any = sys.modules["psycopg" if "psycopg" in origins(raw) else "psycopg2"]
        info = raw.info
        self._where = {
            "host": info.host,
            "port": info.port,
            "dbname": info.dbname,
            "user": info.user,
            "password": info.password,
            "connect_timeout": CONNECT_TIMEOUT_S,
        }
        self.place = tuple(self._where.values())
        cursor = cursor_of(raw)
        cursor.execute(f"SELECT to_regclass('pg_temp.{TABLE}') IS NULL")
        if cursor.fetchone()[0]:
            cursor.execute(f"CREATE TEMPORARY TABLE {TABLE} (value integer) ON COMMIT DROP")
        cursor.execute(
            f"INSERT INTO pg_temp.{TABLE} VALUES (0) "  # noqa: S608 - a constant
            "RETURNING (((pg_current_xact_id()::text::bigint >> 32) << 32) + xmin::text::bigint)::text"
        )
        self.value = cursor.fetchone()[0]

    def ask(self, values: set[str]) -> dict[str, Outcome]:
        """Return the outcome of each transaction that *values* number; OPEN where the server cannot be asked."""
        known = {"committed": Outcome.COMMITTED, "aborted": Outcome.ROLLED_BACK}
        try:
            with contextlib.closing(self._driver.connect(**self._where)) as outside:
                cursor = outside.cursor()
                query = "SELECT number, pg_xact_status(number::xid8) FROM unnest(%s::text[]) AS number"
                cursor.execute(query, (list(values),))
                return {number: known.get(state, Outcome.OPEN) for number, state in cursor.fetchall()}
        except self._driver.Error:
            return dict.fromkeys(values, Outcome.OPEN)
