"""What a database driver's error means: the database or one row, passing or not, and what to do."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

import peewee

from bgsupervisor.database import postgres
from bgsupervisor.errors import BgSupervisorError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.database.store import Store

__all__ = ["is_locked", "is_passing", "translated"]

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


def is_passing(error: BaseException) -> bool:
    """Whether the same write may succeed later: the database is locked, full, read-only or away."""
    driver = driver_error(first_error(error))
    return sqlite_code(driver) in _PASSING_CODES or postgres.is_passing(driver)


def is_locked(error: BaseException) -> bool:
    """Whether another writer keeps the database locked; it may be stopped."""
    if error.__cause__ is None:
        return False
    driver = driver_error(first_error(error.__cause__))
    return sqlite_code(driver) == LOCKED or postgres.is_locked(driver)


def driver_error(error: BaseException) -> BaseException:
    """Return the database driver's own error behind one of Peewee's."""
    return error.__cause__ or error.__context__ or error


def sqlite_code(driver: BaseException) -> int | None:
    """Return SQLite's primary result code of an error of the driver."""
    code: int | None = getattr(driver, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def first_error(error: BaseException) -> BaseException:
    """Return what went wrong, not the rollback that failed after it.

    With a full disk SQLite has rolled back itself; a connection to PostgreSQL that is lost cannot roll back.
    """
    told = ("no transaction is active", "no such savepoint", "connection is closed", "connection is lost")
    while error.__context__ is not None and any(text in str(error) for text in told):
        error = error.__context__
    return error


@contextlib.contextmanager
def translated(store: Store) -> Iterator[None]:
    """Turn Peewee's errors of a database that is away into one clear sentence; errors of a single row pass.

    Raises:
        DatabaseError: Locked, full, damaged or away; says which, and what to do.
        AccessError: This user lacks a right; says which on what.
    """
    try:
        yield
    except (peewee.PeeweeException, sqlite3.Error) as error:  # Peewee wraps a query, but not the stepping of its rows
        first = first_error(error)
        if isinstance(first, BgSupervisorError):
            raise first from None  # within a transaction it was explained, and then that could not be rolled back
        of_one_row = postgres.is_of_one_row(driver_error(first))
        if isinstance(error, _OF_ONE_ROW) if of_one_row is None else of_one_row:
            raise
        raise store.explain(error) from error


def forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error: a cursor in one keeps a connection's files open after its close."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
