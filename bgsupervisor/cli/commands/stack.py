"""`bgsupervisor stack`: where a running task is, line by line."""

from __future__ import annotations

import click

from bgsupervisor.cli.display.output import say
from bgsupervisor.cli.display.traces import folded
from bgsupervisor.cli.session import Session, pass_session

__all__ = ["stack"]


@click.command()
@click.argument("id", type=int)
@click.option("--full", is_flag=True, help="Every frame, also those of libraries.")
@pass_session
def stack(session: Session, *, id: int, full: bool) -> None:
    """Print the Python stacks of all threads of a running task, which continues meanwhile."""
    service = session.service_with(id)
    text = service.stack(id).rstrip()
    say(text if full else folded(text, service.config))
