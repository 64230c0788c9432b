"""`bgsupervisor prune`: deletes ended tasks and their logs now."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import click

from bgsupervisor.catalogue import Catalogue, listed
from bgsupervisor.cli.display.output import say, warn
from bgsupervisor.cli.display.rows import Rows
from bgsupervisor.cli.session import Finite, Session, pass_session
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.statuses import Status
from bgsupervisor.supervisor.housekeeping import prune as prune_rows

if TYPE_CHECKING:
    from bgsupervisor.service import Service

__all__ = ["prune"]

ENDED = (Status.DONE, Status.INTERRUPTED)


@click.command()
@click.option(
    "--older-than-days",
    type=Finite(min=0, max=36500),
    help="Ended longer ago than this; by default keep_days.",
)
@click.option(
    "--status", "statuses", multiple=True, type=click.Choice(ENDED, case_sensitive=False), help="Only this status."
)
@click.option("--name", "names", multiple=True, help="Only tasks of this name; the part after the colon is enough.")
@click.option("--dry-run", is_flag=True, help="Only print how many.")
@pass_session
def prune(
    session: Session,
    *,
    older_than_days: float | None,
    statuses: tuple[Status, ...],
    names: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Delete ended tasks with their logs, in small transactions; live tasks are never touched.

    The supervisor does this by itself for tasks that ended more than keep_days ago.
    """
    service = session.existing_service()
    if service is None:
        say("there are no tasks")
        return
    wanted_names = _full_names(names, service)
    days = service.config.keep_days if older_than_days is None else older_than_days
    if older_than_days is None and days == 0:
        raise click.UsageError("keep_days is 0, which keeps all; give --older-than-days")
    before = service.ledger.clock.now() - timedelta(days=days)
    for status in statuses or ENDED:
        wanted = {"before": before, "statuses": [Status(status)], "names": wanted_names if names else None}
        count = service.ledger.count_old(**wanted)  # type: ignore[arg-type]
        if not dry_run:
            count, folder = 0, StateDir(service.config.state_dir).logs
            while pruned := prune_rows(service.ledger, folder, **wanted):  # type: ignore[arg-type]
                count += pruned
        say(f"{Status(status)}: {count} task(s) {'would be deleted' if dry_run else 'deleted'}")


def _full_names(names: tuple[str, ...], service: Service) -> list[str]:
    """Return the full names that *names* mean, by themselves or as the part after the colon.

    Raises:
        click.UsageError: One means several.
    """
    if not names:
        return []
    now = service.ledger.clock.now()
    in_rows = Rows(store=service.ledger.store, now=now).all_names()
    known = {*in_rows, *Catalogue.of(service.ledger.supervisors(), now=now).seen}
    found = []
    for name in names:
        meant = [name] if name in known else sorted(one for one in known if one.partition(":")[2] == name)
        if len(meant) > 1:
            raise click.UsageError(f"--name {name} means {len(meant)} names: {listed(meant)}; give one of them")
        if not meant:
            warn(f"no task has the name {name}" + (f"; their names are {listed(in_rows)}" if in_rows else ""))
        found += meant
    return found
