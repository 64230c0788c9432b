"""`bgsupervisor stack`: where a running task is, line by line."""

from __future__ import annotations

import click

from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.errors import UnknownTask

__all__ = ["stack"]


@click.command()
@click.argument("id", type=int)
@pass_session
def stack(session: Session, *, id: int) -> None:
    """Print the Python stacks of all threads of a running task, which goes on meanwhile."""
    service = session.existing_service()
    if service is None:
        raise UnknownTask(id)
    click.echo(service.stack(id).rstrip())
