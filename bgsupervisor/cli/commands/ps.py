"""`bgsupervisor ps`: what runs, what waits and what ended last."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from bgsupervisor.cli.display import columns, tree
from bgsupervisor.cli.display.output import print_json, to_json, warn
from bgsupervisor.cli.display.rows import HEAVY, Rows, Ties, columns_of
from bgsupervisor.cli.display.supervisors import stale_code
from bgsupervisor.cli.display.table import show_table
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from datetime import datetime

    from bgsupervisor.cli.display.supervisors import Watch
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["ps"]

ENDED_SHOWN = 10
"""So many ended tasks are shown, unless their status, a limit or all were asked for."""
LIMIT = 100
LIMIT_ALL = 1000
LIMIT_MAX = 1_000_000
WRITE_WAIT_S = 1.0
"""Who has the database for longer is told of."""


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
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), help=f"At most so many rows; {LIMIT}, with --all {LIMIT_ALL}."
)
@click.option("--tree", "as_tree", is_flag=True, help="Live tasks under who requested them or waits for them.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects; times are in UTC.")
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
        warn(f"no tasks yet: {session.nothing_yet()}; `bgsupervisor run` or the first request makes what is missing")
        if as_json:
            print_json([])
        return
    clock = service.ledger.clock
    wanted = frozenset(Status(status) for status in statuses) or frozenset(Status)
    rows = Rows(store=service.ledger.store, now=clock.now(), statuses=wanted, name=name, key=key)
    with rows.store.looking():  # as of one moment: a task that was claimed meanwhile has no place in the queue
        records = rows.newest(limit or LIMIT_ALL) if everything else rows.live(limit or LIMIT)
        if not (everything or as_tree):
            records += rows.ended((limit or LIMIT) - len(records) if limit or statuses else ENDED_SHOWN)
        grown = tree.Tree.grow(rows, records) if as_tree else None
        causes = grown.causes if grown else Ties(rows.store).causes(records)
        positions, busy = rows.positions(), rows.busy()
        counts = _Counts.of(service, since=rows.now - timedelta(days=1))
    facts = columns.Facts.gather(service, positions=positions, clock=clock, causes=causes)
    for sentence in facts.watch.warnings(now=facts.now):
        warn(sentence)
    stale = stale_code(service) if facts.watch.alive else None
    if stale is not None:
        warn(stale)
    problem = service.ledger.store.write_problem(wait_s=WRITE_WAIT_S)
    if problem is not None:
        warn(f"{problem}. Bodies go on, their ends are recorded later")
    if as_json:
        print_json([_object(record, facts, service) for record in records])
        return
    _summarize(counts, facts.watch, records)
    if grown and records:
        show_table(tree.tree_columns(grown, facts, busy=busy), narrowing=tree.NARROWING, for_programs=False)
    elif records:
        show_table(columns.columns(records, facts), narrowing=columns.NARROWING)


class _Counts(NamedTuple):
    """How many tasks there are; counting all rows ever would take a second per million, these have small indexes."""

    live: dict[Status, int]
    waiting: int
    ended: dict[Status, int]

    @classmethod
    def of(cls, service: Service, *, since: datetime) -> _Counts:
        ledger = service.ledger
        return cls(ledger.live_counts(), ledger.waiting_count(), ledger.ended_counts(since))


def _summarize(counts: _Counts, seen: Watch, records: list[TaskRecord]) -> None:
    """Say how many tasks there are; on stderr, so that what a program reads has rows only."""
    live, waiting, ended = counts
    slots = sum(one.slots for one in seen.alive)
    words = [f"{status} {count:,}" for status, count in live.items()]
    if slots:
        words[-1] = f"{Status.START} {live[Status.START] - waiting:,} of {slots} slots"
        words[-1] += f" and {waiting:,} waiting" if waiting else ""
    warn(" · ".join(words) + "; in 24 h " + " · ".join(f"{status} {count:,}" for status, count in ended.items()))
    shown = sum(not record.ended for record in records)
    if shown == LIMIT and sum(live.values()) > shown:
        warn(f"only {shown} of them are shown; --limit shows more")
    elif not records and (any(live.values()) or any(ended.values())):
        warn("no task matches")


def _object(record: TaskRecord, facts: columns.Facts, service: Service) -> dict[str, Any]:
    shown = {name: to_json(value) for name, value in columns_of(record, service).items() if name not in HEAVY}
    return {**shown, **facts.derived(record)}
