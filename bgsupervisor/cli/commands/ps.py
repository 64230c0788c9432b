"""`bgsupervisor ps`: what runs, what waits and what ended last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bgsupervisor.cli.display import columns, tree
from bgsupervisor.cli.display.output import jsonable, print_json, warn
from bgsupervisor.cli.display.rows import HEAVY, Rows, Ties, columns_of
from bgsupervisor.cli.display.snapshot import Counts, Snapshot
from bgsupervisor.cli.display.supervisors import stale_code
from bgsupervisor.cli.display.table import show_table
from bgsupervisor.cli.display.tree import Tree, tree_columns
from bgsupervisor.cli.session import Session, json_option, pass_session
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["ps"]

ENDED_SHOWN = 10
"""Ended tasks that are shown, unless their status, a limit or all were asked for."""
LIMIT = 100
LIMIT_ALL = 1000
LIMIT_MAX = 1_000_000
WRITE_WAIT_S = 1.0
"""Time for which another writer may lock the database before `ps` reports it, in seconds."""


@click.command()
@click.option("--all", "everything", is_flag=True, help=f"All tasks, the newest first, at most {LIMIT_ALL}.")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([status.value for status in Status], case_sensitive=False),
    help="Only tasks of this status; may be repeated.",
)
@click.option("--name", help="Only tasks of this name; the part after the colon is enough.")
@click.option("--key", help="Only tasks with this key.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), help=f"The most rows; {LIMIT}, with --all {LIMIT_ALL}.")
@click.option("--tree", "as_tree", is_flag=True, help="Live tasks, each under the task that requested or awaits it.")
@json_option("A list of objects; times are in UTC.")
@pass_session
def ps(
    session: Session,
    *,
    everything: bool,
    statuses: tuple[str, ...],
    name: str | None,
    key: str | None,
    limit: int | None,
    as_tree: bool,
    as_json: bool,
) -> None:
    """Show what runs, what waits, and what ended last."""
    if as_tree and (everything or as_json):
        raise click.UsageError("--tree draws live tasks for people; give neither --all nor --json with it")
    service = session.existing_service()
    if service is None:
        warn(f"no tasks yet: {session.nothing_yet()}; `bgsupervisor run` or the first request creates what is missing")
        if as_json:
            print_json([])
        return
    wanted = frozenset(Status(status) for status in statuses) or frozenset(Status)
    rows = Rows(store=service.ledger.store, now=service.ledger.clock.now(), statuses=wanted, name=name, key=key)
    with rows.store.looking():  # as of one moment: a task that was claimed meanwhile has no place in the queue
        records = rows.newest(limit or LIMIT_ALL) if everything else rows.live(limit or LIMIT)
        if not (everything or as_tree):
            records += rows.ended((limit or LIMIT) - len(records) if limit or statuses else ENDED_SHOWN)
        grown = Tree.grow(rows, records) if as_tree else None
        causes = grown.causes if grown else Ties(rows.store).causes(records)
        positions, busy = rows.positions(), rows.busy()
        counts = Counts.read(service, now=rows.now)
    snapshot = Snapshot.take(service, positions=positions, causes=causes, busy=busy)
    _warn(service, snapshot)
    if as_json:
        print_json([_object(record, snapshot, service) for record in records])
        return
    _summarize(counts, snapshot.supervisors.slots, records)
    if grown and records:
        show_table(tree_columns(grown, snapshot), narrowing=tree.NARROWING, for_programs=False)
    elif records:
        show_table(columns.columns(records, snapshot), narrowing=columns.NARROWING)


def _warn(service: Service, snapshot: Snapshot) -> None:
    stale = stale_code(service) if snapshot.supervisors.alive else None
    problem = service.ledger.store.write_problem(wait_s=WRITE_WAIT_S)
    if problem is not None:
        problem += ". Bodies continue, their ends are recorded later"
    for sentence in filter(None, (*snapshot.supervisors.warnings(), stale, problem)):
        warn(sentence)


def _summarize(counts: Counts, slots: int, records: list[TaskRecord]) -> None:
    """Print how many tasks there are; on stderr, so that a program reads rows only."""
    words = [f"{status} {count:,}" for status, count in counts.live.items()]
    if slots:
        words[-1] = f"{Status.START} {counts.live[Status.START] - counts.waiting:,} of {slots} slots"
        words[-1] += f" and {counts.waiting:,} waiting" if counts.waiting else ""
    ended = " · ".join(f"{status} {count:,}" for status, count in counts.ended.items())
    warn(f"{' · '.join(words)}; in 24 h {ended}")
    shown = sum(not record.ended for record in records)
    if shown == LIMIT and sum(counts.live.values()) > shown:
        warn(f"only {shown} of them are shown; --limit shows more")
    elif not records and (any(counts.live.values()) or any(counts.ended.values())):
        warn("no task matches")


def _object(record: TaskRecord, snapshot: Snapshot, service: Service) -> dict[str, Any]:
    light = {name: value for name, value in columns_of(record, service).items() if name not in HEAVY}
    return jsonable(light) | snapshot.derived(record)
