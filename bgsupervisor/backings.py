"""What a Service works with: configuration, ledger and clock; in tests, those that the tests give it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

import peewee

from bgsupervisor.addresses import is_postgres
from bgsupervisor.config import load
from bgsupervisor.database.store import Store
from bgsupervisor.environment import tests_of
from bgsupervisor.errors import (
    ConfigError,
)
from bgsupervisor.ledger.requests import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config


__all__ = ["Backing", "Origin", "isolated", "redirect", "url_of"]


@dataclasses.dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Origin:
    """The arguments that a Service was made with."""

    database: str | peewee.Database | None
    config: str | Path | None
    clock: Clock | None


@dataclasses.dataclass(frozen=True, slots=True)
class Backing:
    """Configuration, ledger and clock of a Service; it wakes the supervisor of the configuration's state directory."""

    config: Config
    ledger: Ledger
    clock: Clock
    external: Callable[[object], Ledger] | None = None
    """In tests: returns the ledger for requests on a connection of the application."""

    @classmethod
    def of(cls, origin: Origin) -> Backing:
        """Load the configuration and choose the database; opens nothing yet."""
        database = origin.database
        if isinstance(database, peewee.Database):
            config = load(origin.config, database=url_of(database), any_owner=True)
            store = Store.share(database, config.table_prefix)
        else:
            config = load(origin.config, database=database, any_owner=True)
            wait_s = config.busy_timeout_s
            store = Store.open(
                config.database, config.table_prefix, busy_timeout_s=wait_s, patience_s=wait_s, has_neighbours=True
            )
        ledger = Ledger(store, origin.clock)
        return cls(config, ledger, ledger.clock)


redirect: Callable[[Origin], Backing | None] | None = None
"""The seam for tests: while it is set, it gives every Service its backing, also one made before.

Such a Service touches neither database nor supervisor of its own; if None is returned, it has its own. Only
`bgsupervisor.testing` sets this."""


def isolated(origin: Origin) -> Backing | None:
    """Return the backing of a Service while tests run; None outside tests, and where isolation is off.

    Django's test environment counts as tests, whatever has set it up: from then on mails stay in the process too. So
    does a process that multiprocessing has spawned from an isolated one.
    """
    if redirect is None:
        # https://github.com/django/django/blob/5.2/django/test/utils.py: what setup_test_environment leaves
        state = getattr(sys.modules.get("django.test.utils"), "_TestState", None)
        folder = _folder_of_tests()
        if folder is not None:
            from bgsupervisor.testing.isolation import isolate_worker  # noqa: PLC0415 - only in tests

            isolate_worker(folder)
        elif hasattr(state, "saved_data"):
            from bgsupervisor.testing import isolate  # noqa: PLC0415 - the same

            isolate()
    return redirect(origin) if redirect is not None else None


def _folder_of_tests() -> Path | None:
    """Return the folder of the tests whose process has spawned this one by multiprocessing, None if none has."""
    process = sys.modules.get("multiprocessing.process")
    parent = None if process is None else process.parent_process()
    return None if parent is None or parent.pid is None else tests_of(parent.pid)


def url_of(database: peewee.Database) -> str:
    """Return the address of an application's Peewee database, as a configuration would have it.

    Raises:
        ConfigError: Of another kind, or not initialised yet.
    """
    if not isinstance(database, peewee.SqliteDatabase | peewee.PostgresqlDatabase):
        kind = type(database).__name__
        raise ConfigError(f"the database is a {kind}; only peewee.SqliteDatabase and PostgresqlDatabase are supported")
    if database.deferred:
        raise ConfigError(
            "the Peewee database names no file or database yet; call its init() first, then make the Service"
        )
    name = str(database.database)
    if isinstance(database, peewee.PostgresqlDatabase):
        if is_postgres(name):
            return name
        given = {key: value for key, value in database.connect_params.items() if isinstance(value, str | int)}
        return f"postgresql:///{quote(name, safe='')}?{urlencode(given)}"
    return f"sqlite:///{name if ':memory:' in name else Path(name).absolute()}"
