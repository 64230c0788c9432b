"""`bgsupervisor why`: why a task does not run, or does not go on."""

from __future__ import annotations

import click

from bgsupervisor.cli.display.explain import explain
from bgsupervisor.cli.display.output import print_json, say
from bgsupervisor.cli.display.snapshot import Snapshot
from bgsupervisor.cli.session import Session, json_option, pass_session, task_of

__all__ = ["why"]


@click.command()
@click.argument("id", type=int)
@json_option()
@pass_session
def why(session: Session, *, id: int, as_json: bool) -> None:
    """Say why a task is not running, or not going on."""
    service = session.service_with(id)
    with service.ledger.store.looking():  # the task, its place and what it waits for, as of one moment
        record = task_of(service, id)
        reasons = explain(record, Snapshot.around(record, service))
    if as_json:
        because = [{"kind": one.kind, "sentence": one.sentence, **one.facts} for one in reasons]
        print_json({"id": id, "status": record.status, "because": because})
        return
    for number, one in enumerate(reasons):
        say(f"{'also' if number else f'task {id} is {record.status}'}: {one.sentence}")
