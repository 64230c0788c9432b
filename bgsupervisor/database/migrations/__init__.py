"""Changes of the tables, numbered; applied to an empty database at first use, else only by `migrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bgsupervisor.errors import DatabaseError, SchemaError

if TYPE_CHECKING:
    from bgsupervisor.database.store import Store

__all__ = ["Standing", "applied", "available", "ensure", "migrate", "standing"]

_FOLDER = Path(__file__).parent
_NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("[0-9]*.py")))
"""Known from the import on: a child that outlives a deploy must not take the folder's new contents for its own."""
_OLDEST_USABLE = 1
"""Code works on the newest schema and on the one before it; older ones need `migrate` first."""


def available() -> list[str]:
    """Return the names of all migrations of this version, oldest first."""
    return list(_NAMES)


def applied(store: Store) -> list[str]:
    """Return the names of the migrations that this database has, oldest first; empty for one without our tables."""
    history = _history(store)
    if not store.database.table_exists(history):
        return []
    rows = store.database.execute_sql(f'SELECT name FROM "{history}" ORDER BY name')  # noqa: S608 - our own prefix
    return [name for (name,) in rows.fetchall()]


class Standing(NamedTuple):
    """How the tables compare with this version: the migrations that they lack, and those of later versions."""

    missing: list[str]
    newer: list[str]


def standing(store: Store) -> Standing:
    """Return how the tables compare with this version; changes nothing."""
    have, known = applied(store), available()
    return Standing([name for name in known if name not in have], [name for name in have if name > known[-1]])


def ensure(store: Store) -> None:
    """Create the tables in a database that has none, if the store may; check the schema of one that has.

    Raises:
        DatabaseError: There are no tables, and the store creates nothing.
        SchemaError: The schema is older than the one before this version's, or newer than this version.
    """
    missing, newer = standing(store)
    if missing == available() and not newer:
        if not store.creates:
            raise DatabaseError(f"the database {store.place} has no tables (any more)")
        migrate(store)
        return
    if len(newer) > 1:
        raise SchemaError(
            f"the tables are of a newer version (migrations {', '.join(newer)}); upgrade bgsupervisor here"
        )
    if len(missing) > _OLDEST_USABLE:
        raise SchemaError(f"the tables lack the migrations {', '.join(missing)}; run `bgsupervisor migrate`")


def migrate(store: Store) -> list[str]:
    """Apply what is missing, in one transaction, and return the names of what this call has applied.

    Several processes may call it at once: the write lock is taken before the history is read. Blocks for at most the
    store's busy timeout until it has that lock, then raises peewee.OperationalError.
    """
    from playhouse.migrations import Runner  # noqa: PLC0415 - 30 ms that only a migration pays

    with store.alone():
        store.let_statements_take_long()
        runner = Runner(store.database, directory=str(_FOLDER), table_name=_history(store))
        runner.migrator.table_prefix = store.tables.prefix
        return list(runner.up())


def _history(store: Store) -> str:
    return f"{store.tables.prefix}schema_migration"
