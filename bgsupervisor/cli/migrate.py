"""`bgsupervisor migrate`: bring the tables to this version."""

from __future__ import annotations

import click
import peewee

from bgsupervisor import migrations
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.errors import SchemaError
from bgsupervisor.models import Store, translated

__all__ = ["migrate"]


@click.command()
@pass_session
def migrate(session: Session) -> None:
    """Create the tables, or change older ones to this version's."""
    config = session.config()
    store = Store.open(config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s)
    if not store.is_there():
        with store.connected():  # creates the tables, and a file with the rights it needs
            _tell(migrations.applied(store))
    else:
        _tell(_migrated(store))
    store.close()


def _migrated(store: Store) -> list[str]:
    with translated(store):
        try:
            store.database.connect(reuse_if_open=True)  # `connected` would refuse tables that are too old
            newer = [name for name in migrations.applied(store) if name > migrations.available()[-1]]
            if newer:
                raise SchemaError(f"the tables are of a newer version ({', '.join(newer)}); upgrade bgsupervisor here")
            return migrations.migrate(store)
        except peewee.IntegrityError as error:
            raise SchemaError(f"a row does not fit the new tables, nothing was changed: {error}") from error


def _tell(names: list[str]) -> None:
    click.echo("\n".join(f"applied {name}" for name in names) or "nothing to do: the tables are this version's")
