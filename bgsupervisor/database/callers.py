"""Which transaction of the calling thread keeps an SQLite file locked: to wait for it cannot help.

Frameworks are recognised by where their classes come from; none is imported. Looks at all objects of the process, so
it belongs on the way to an error only.
"""

from __future__ import annotations

import contextlib
import gc
import sqlite3
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["OpenTransaction", "open_transactions", "origins", "same_file"]

SAME_THREAD_S = 1.0
"""Limit of the wait for a thread that tries which connections it may use, in seconds."""


T = TypeVar("T")


class OpenTransaction(NamedTuple):
    """A transaction that this thread has open on an SQLite file.

    Attributes:
        raw: The driver's connection.
        owner: What the application calls it.
        hint: What to give as `connection=`.
    """

    raw: sqlite3.Connection
    owner: str
    hint: str

    def holds_lock(self, table: str) -> bool:
        """Whether it may write while another cannot, as a statement that changes nothing in *table* tries.

        One that has only read is refused like any other, and stays as it is.
        """
        cursor = sqlite3.Cursor(self.raw)
        try:
            busy_ms = int(cursor.execute("PRAGMA busy_timeout").fetchall()[0][0])
            cursor.execute("PRAGMA busy_timeout = 0").fetchall()
            try:
                cursor.execute(f'DELETE FROM "{table}" WHERE 1 = 0')  # noqa: S608 - our own table
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {busy_ms}").fetchall()
        except sqlite3.Error:
            return False
        return True


_looking = threading.Lock()


def open_transactions(path: Path) -> list[OpenTransaction]:
    """Return the transactions that this thread has open on an SQLite file; those of frameworks first.

    One thread of a process looks at a time. Another gets none meanwhile: many that wait are most likely each other's.
    """
    if not _looking.acquire(blocking=False):
        return []
    try:
        found: dict[int, OpenTransaction] = {}
        for one in _open_here():
            found.setdefault(id(one.raw), one)
        return [one for one in found.values() if _leads_to(one.raw, path)]
    finally:
        _looking.release()


def origins(thing: object) -> set[str]:
    """Return the packages in which the class of *thing*, and those that it is made of, are defined."""
    return {kind.__module__.partition(".")[0] for kind in type(thing).__mro__}


def same_file(one: str, other: Path) -> bool:
    """Whether a path leads to the same file as another; False where one of them leads nowhere."""
    try:
        return other.samefile(one)
    except OSError:
        return False


def _open_here() -> Iterator[OpenTransaction]:
    """Yield the connections to SQLite with an open transaction that this thread has made; the frameworks' first."""
    yield from _of_django()
    for database in _instances(_loaded_class("peewee", "SqliteDatabase")):
        if not database.is_closed() and database.in_transaction():
            yield OpenTransaction(database.connection(), "a transaction of a Peewee database", "connection=database")
    for session in [*_scoped(), *_in_frames()]:
        for raw in _raws(session):
            yield OpenTransaction(raw, f"a transaction of an SQLAlchemy {type(session).__name__}", "connection=session")
    mine = [one for one in _in_frames() if isinstance(one, sqlite3.Connection)]
    for raw in [*_bound(_transactions_of_process()), *mine]:
        yield OpenTransaction(raw, "a transaction of a connection of sqlite3", "connection=connection")


def _instances(kind: type[T]) -> list[T]:
    """Return the objects of a class, and of those made of it, that the process has.

    Each object refers to its class, and so the garbage collector finds them without a list of all objects, which would
    keep alive what other threads let go.
    """
    kinds: list[type] = [kind]
    for one in kinds:
        kinds += type.__subclasses__(one)
    return [one for one in gc.get_referrers(*kinds) if issubclass(type(one), kind)]  # isinstance would ask proxies


def _transactions_of_process() -> list[sqlite3.Connection]:
    found = []
    for one in _instances(sqlite3.Connection):
        with contextlib.suppress(sqlite3.Error):  # closed
            if one.in_transaction:
                found.append(one)
    return found


def _of_django() -> Iterator[OpenTransaction]:
    """Yield the open transactions of this thread's connections of Django, which may be used by any thread."""
    django_db = sys.modules.get("django.db")
    if django_db is None:
        return
    with contextlib.suppress(Exception):  # settings that are not there: no connection was ever made
        for wrapper in django_db.connections.all(initialized_only=True):
            if isinstance(wrapper.connection, sqlite3.Connection) and wrapper.connection.in_transaction:
                hint = f'connection=django.db.connections["{wrapper.alias}"]'
                yield OpenTransaction(wrapper.connection, "a transaction of Django", hint)


def _scoped() -> Iterator[Any]:
    """Yield the Sessions that scopes have for this thread, or for what the application has put in its place."""
    for scope in _instances(_loaded_class("sqlalchemy.orm", "scoped_session")):
        with contextlib.suppress(Exception):  # outside of any scope, as without an application context of Flask
            if scope.registry.has():
                yield scope.registry()


def _in_frames() -> Iterator[Any]:
    """Yield connections and Sessions that this thread is at work with: local values of its frames, and their parts."""
    kinds = (sqlite3.Connection, _loaded_class("sqlalchemy", "Connection"), _loaded_class("sqlalchemy.orm", "Session"))
    frame = sys._getframe()  # noqa: SLF001 - documented, and there is no other way
    while frame is not None:
        for value in list(frame.f_locals.values()):
            for one in (value, *_parts(value)):
                if issubclass(type(one), kinds):
                    yield one
        frame = frame.f_back  # type: ignore[assignment]


def _parts(value: object) -> list[object]:
    """Return the attributes of an object, without asking it."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return []
    return list(found.values()) if type(found) is dict and not issubclass(type(value), ModuleType) else []


def _loaded_class(module: str, name: str) -> type[Any]:
    """Return a class of a package that is loaded, or one that has no objects."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else _Nothing


class _Nothing:
    """The class of no object."""


def _raws(owner: Any) -> list[sqlite3.Connection]:  # noqa: ANN401 - SQLAlchemy may not be installed
    """Return the driver's connections in the open transaction of a Session or Connection of SQLAlchemy."""
    found = []
    with contextlib.suppress(Exception):  # closed, or another class of SQLAlchemy
        if not owner.in_transaction():
            return []
        transaction = owner.get_transaction()
        for one in [owner, *getattr(transaction, "_connections", ())]:
            raw = getattr(getattr(one, "connection", None), "driver_connection", None)
            if isinstance(raw, sqlite3.Connection) and raw.in_transaction:
                found.append(raw)
    return found


def _bound(connections: list[sqlite3.Connection]) -> list[sqlite3.Connection]:
    """Return the connections that only this thread may use (check_same_thread, the default)."""
    mine = [one for one in connections if _is_usable(one)]
    elsewhere: list[sqlite3.Connection] = []
    thread = threading.Thread(
        target=lambda: elsewhere.extend(filter(_is_usable, mine)),
        name="bgsupervisor callers",
        daemon=True,
    )
    thread.start()
    thread.join(SAME_THREAD_S)
    if thread.is_alive():
        return []
    return [one for one in mine if not any(one is other for other in elsewhere)]


def _is_usable(connection: sqlite3.Connection) -> bool:
    """Whether this thread may use a connection; runs no statement."""
    try:
        sqlite3.Cursor(connection)
    except sqlite3.Error:
        return False
    return True


def _leads_to(raw: sqlite3.Connection, path: Path) -> bool:
    try:
        found = sqlite3.Cursor(raw).execute("PRAGMA database_list").fetchall()
    except sqlite3.Error:
        return False
    return any(bool(row[2]) and same_file(_text(row[2]), path) for row in found if _text(row[1]) == "main")


def _text(value: str | bytes) -> str:
    """Return a text whatever `text_factory` the application has set."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
