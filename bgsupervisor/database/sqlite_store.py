"""SQLite: one file, and one writer at a time."""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
import stat
from collections.abc import Callable  # noqa: TC003 - a module-level annotation
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import peewee

from bgsupervisor import sanitize
from bgsupervisor.clock import SystemClock
from bgsupervisor.database.errors import (
    LOCKED,
    driver_error,
    first_error,
    forget_frames,
    is_locked,
    sqlite_code,
)
from bgsupervisor.database.store import FULL, Store
from bgsupervisor.database.values import readable
from bgsupervisor.errors import AccessError, DatabaseError, LockedByCaller

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bgsupervisor.database.callers import OpenTransaction

__all__ = ["OWN_LOCK_S", "SqliteStore", "roll_back_abandoned"]

log = sanitize.logger()

T = TypeVar("T")

SHARED_MODE = 0o660
"""Rights of a database file in a folder that a group shares, as a web user and a deploy user do."""
PRIVATE_MODE = 0o600
"""Rights of a database file in any other folder: who may write it may request tasks."""
AUTOCHECKPOINT_PAGES = 10_000
"""Size of the -wal file at which other processes than the supervisor checkpoint, in pages: 40 MB."""
WAL_RETRY_S = 0.01
OWN_LOCK_S = 0.2
"""Wait for a locked file, in seconds, after which a call checks whether its own thread keeps it locked."""


def roll_back_abandoned(*, for_good: bool) -> None:
    """Roll back every transaction on SQLite of this process that a body has left open.

    One that was written in keeps all other writers out, also those of this very process. A connection that is merely
    forgotten does not end it: up to Python 3.12 only the garbage collector closes that, whenever it comes.

    Args:
        for_good: Other threads live, and one of them may be in the middle of it: forbid its connection any statement,
            or what it still writes would be committed without what went before.
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


class SqliteStore(Store):
    """A database of SQLite."""

    locks_rows = False
    # A deferred transaction that reads first may not write after another's commit, however long it waits.
    _writing_level, _reading_level = "IMMEDIATE", "DEFERRED"

    def __init__(self, database: peewee.Database, prefix: str, *, owned: bool, path: Path | None) -> None:
        super().__init__(database, prefix, owned=owned, path=path)
        self._has_neighbours = self._follows_file = False

    @classmethod
    def of_file(
        cls,
        path: Path,
        prefix: str,
        *,
        busy_timeout_s: float,
        checkpointer: bool,
        durable: bool,
        looks: bool,
        has_neighbours: bool,
    ) -> SqliteStore:
        """Make a store of its own; arguments as `Store.open`."""
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
        store._has_neighbours = has_neighbours
        store._follows_file = not checkpointer  # the supervisor leaves instead, and the next one opens the new file
        return store

    def is_there(self) -> bool:
        """As `Store.is_there`."""
        return self.path is not None and self.path.exists()

    def data_version(self) -> int:
        """As `Store.data_version`."""
        with self.connected():
            return int(self.database.execute_sql("PRAGMA data_version").fetchone()[0])

    @property
    def place(self) -> str:
        """As `Store.place`."""
        return str(self.path or self.database.database)

    def persistently(self, call: Callable[[], T]) -> T:
        """As `Store.persistently`."""
        if self._has_neighbours and not self.database.in_transaction():
            return self._beside_neighbours(call)
        return call()

    def explain(self, error: peewee.PeeweeException | sqlite3.Error) -> DatabaseError | AccessError:
        """As `Store.explain`."""
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
            return DatabaseError(f"{where} cannot be written, {FULL}")
        return DatabaseError(f"{where} cannot be used: {text}")

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

    def write_first(self) -> None:
        """As `Store.write_first`."""
        if not self.owned and self.database.in_transaction():
            with self.connected():
                self.database.execute_sql(f'DELETE FROM "{self.tables.prefix}task" WHERE 1 = 0')  # noqa: S608 - our own prefix

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

    def _forget_unusable(self) -> None:
        """Open the new file after a restore: what is written to a deleted one is lost silently."""
        known = getattr(self._threads, "inode", None)
        if not self._follows_file or not known or self.database.is_closed() or self.database.in_transaction():
            return
        now = self.inode()
        if now is not None and now != known:
            log.warning("the database file %s was replaced; opening the new one", self.path)
            self.close()
            self._schema_checked = False

    def inode(self) -> int | None:
        """As `Store.inode`."""
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
        """As `Store.wal_path`."""
        return None if self.path is None else Path(f"{self.path}-wal")

    def _lock_out_writers(self) -> None:
        """IMMEDIATE does."""

    def _open_connection(self) -> None:
        if not self.owned or self.path is None:
            super()._open_connection()
            return
        if self.creates:
            _create_file(self.path)
        elif self.inode() == 0:
            raise DatabaseError(f"the database {self.path} is not there, or is empty")
        self._connect_in_wal_mode()
        self._threads.inode = self.inode()

    def _check_durability(self) -> None:
        journal = self.database.execute_sql("PRAGMA journal_mode").fetchone()[0]
        synchronous = self.database.execute_sql("PRAGMA synchronous").fetchone()[0]
        if journal in ("off", "memory") or synchronous < 2:  # noqa: PLR2004 - 2 is FULL
            log.warning(
                "the application's SQLite connection has journal_mode=%s and synchronous=%s: "
                "a request may be lost at a power cut; synchronous=FULL (2) and journal_mode=WAL keep it",
                journal,
                synchronous,
            )


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
