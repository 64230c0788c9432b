"""`bgsupervisor migrate`: brings the tables to this version, or only checks whether they are."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click
import peewee

from bgsupervisor.cli.display.output import say
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.database import migrations
from bgsupervisor.database.store import Store
from bgsupervisor.errors import SchemaError

if TYPE_CHECKING:
    from bgsupervisor.config import Config

__all__ = ["migrate"]

QUEUE_S = 60.0
"""Longest wait for another `migrate`, which may change large tables, in seconds; then this one leaves with 1."""


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; print what the tables lack, and leave with 1 if anything.")
@pass_session
def migrate(session: Session, *, check: bool) -> None:
    """Create the tables, or change older ones to this version's."""
    config = session.config()
    wait_s = config.busy_timeout_s if check else max(QUEUE_S, config.busy_timeout_s)
    store = Store.open(config.database, config.table_prefix, busy_timeout_s=wait_s, looks=check)
    with contextlib.closing(store):
        if check:
            _check(store)
        else:
            _migrate(store, config)


def _migrate(store: Store, config: Config) -> None:
    with store.unchecked():
        if newer := migrations.standing(store).newer:
            raise SchemaError(_newer(newer))
        try:
            with store.alone():
                # Its turn has come. A long wait for a table would now block all that want the table after it.
                store.set_busy_timeout(config.busy_timeout_s)
                applied = migrations.migrate(store)
        except peewee.IntegrityError as error:
            raise SchemaError(f"a row does not fit the new tables, nothing was changed: {error}") from error
    say("\n".join(f"applied {name}" for name in applied) or "nothing to do: the tables are this version's")


def _check(store: Store) -> None:
    """Print what the tables lack, or that they are newer, and leave with 1 if either is true."""
    if store.inode() == 0:  # no file, and none is made
        missing, newer = migrations.Standing(missing=migrations.available(), newer=[])
    else:
        with store.unchecked():
            missing, newer = migrations.standing(store)
    for name in missing:
        say(f"missing {name}")
    if newer:
        say(_newer(newer), err=True)
    elif missing:
        say(f"the tables of {store.place} are not this version's; run `bgsupervisor migrate`", err=True)
    else:
        say("up to date: the tables are this version's")
    raise click.exceptions.Exit(bool(missing or newer))


def _newer(names: list[str]) -> str:
    return f"the tables are of a newer version ({', '.join(names)}); upgrade bgsupervisor here"
