"""What became of a transaction of the application in which a test has requested tasks, savepoints included.

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

from bgsupervisor.borrowed import cursor_of, is_in_transaction, origins

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Mark", "Outcome", "mark"]

ATTACHED = "bgsupervisor_marks"
"""The name under which an SQLite connection of the application has the file of marks."""
TABLE = "bgsupervisor_mark"
"""A table of the file of marks; on PostgreSQL a temporary table."""
CONNECT_TIMEOUT_S = 5
"""How long a question to the server waits for a connection."""


class Outcome(enum.Enum):
    """What became of a transaction."""

    OPEN = "open"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"


class Mark(Protocol):
    """A trace in one transaction or savepoint of the application."""

    def outcome(self) -> Outcome:
        """Return what became of it."""


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
        self._value = os.urandom(16).hex()
        cursor = sqlite3.Cursor(raw)
        attached = {row[1]: row[2] for row in cursor.execute("PRAGMA database_list").fetchall()}
        if ATTACHED not in attached:
            attached[ATTACHED] = self._make(folder)
            cursor.execute(f"ATTACH ? AS {ATTACHED}", (attached[ATTACHED],))
        self._file = attached[ATTACHED]
        cursor.execute(f"INSERT INTO {ATTACHED}.{TABLE} VALUES (?)", (self._value,))  # noqa: S608 - constants

    @staticmethod
    def _make(folder: Path) -> str:
        file = str(folder / f"marks-{os.urandom(8).hex()}.db")
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # it can be read beside the application's transaction
            connection.execute(f"CREATE TABLE {TABLE} (value TEXT PRIMARY KEY) WITHOUT ROWID")
        return file

    def outcome(self) -> Outcome:
        """Return what became of it."""
        with contextlib.closing(sqlite3.connect(self._file, timeout=0, isolation_level=None)) as outside:
            if self._is_in(sqlite3.Cursor(outside), TABLE):
                return Outcome.COMMITTED
            try:
                seen = self._is_in(sqlite3.Cursor(self._raw), f"{ATTACHED}.{TABLE}")
            except sqlite3.Error:  # closed, or of another thread
                return self._without_its_connection(outside)
            return Outcome.OPEN if seen else Outcome.ROLLED_BACK

    def _without_its_connection(self, outside: sqlite3.Connection) -> Outcome:
        try:
            outside.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:  # somebody else may write: the transaction that made the mark
            return Outcome.OPEN
        committed = self._is_in(sqlite3.Cursor(outside), TABLE)  # perhaps a moment ago
        return Outcome.COMMITTED if committed else Outcome.ROLLED_BACK

    def _is_in(self, cursor: sqlite3.Cursor, table: str) -> bool:
        found = cursor.execute(f"SELECT 1 FROM {table} WHERE value = ?", (self._value,))  # noqa: S608 - constants
        return bool(found.fetchall())


class _ServerMark:
    """The number of the transaction or savepoint, which it has once it has written a row, here of a temporary table.

    The server knows of each number whether it was committed, also of a savepoint's:
    https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT
    """

    def __init__(self, raw: Any) -> None:  # noqa: ANN401 - the drivers may not be installed
        self._driver: Any = sys.modules["psycopg" if "psycopg" in origins(raw) else "psycopg2"]
        info = raw.info
        self._place = {
            "host": info.host,
            "port": info.port,
            "dbname": info.dbname,
            "user": info.user,
            "password": info.password,
            "connect_timeout": CONNECT_TIMEOUT_S,
        }
        cursor = cursor_of(raw)
        cursor.execute(f"SELECT to_regclass('pg_temp.{TABLE}') IS NULL")
        if cursor.fetchone()[0]:
            cursor.execute(f"CREATE TEMPORARY TABLE {TABLE} (value integer) ON COMMIT DROP")
        cursor.execute(
            f"INSERT INTO pg_temp.{TABLE} VALUES (0) "  # noqa: S608 - a constant
            "RETURNING (((pg_current_xact_id()::text::bigint >> 32) << 32) + xmin::text::bigint)::text"
        )
        self._number = cursor.fetchone()[0]

    def outcome(self) -> Outcome:
        """Return what became of it; OPEN where the server cannot be asked."""
        try:
            with contextlib.closing(self._driver.connect(**self._place)) as outside:
                cursor = outside.cursor()
                cursor.execute("SELECT pg_xact_status(%s::xid8)", (self._number,))
                state = cursor.fetchone()[0]
        except self._driver.Error:
            return Outcome.OPEN
        known = {"committed": Outcome.COMMITTED, "aborted": Outcome.ROLLED_BACK}
        return known.get(state, Outcome.OPEN)
