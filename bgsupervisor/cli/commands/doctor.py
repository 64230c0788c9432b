"""`bgsupervisor doctor`: what is wrong with the machine and the set-up, and what to do about it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.commands.check import LOAD_LIMIT_S
from bgsupervisor.cli.display.output import print_json
from bgsupervisor.cli.display.supervisors import last_line, watch
from bgsupervisor.cli.load_check import load_apart
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.config import is_postgres, shown, sqlite_path
from bgsupervisor.database.store import Store
from bgsupervisor.doctor import Finding, Grade, Machine, Scene, examine
from bgsupervisor.errors import AccessError, BgSupervisorError, ConfigError, UnsupportedSystem
from bgsupervisor.sanitize import clean
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.config import Config
    from bgsupervisor.service import Service

__all__ = ["doctor", "findings"]

NEWEST = 20
"""So many of the newest tasks are looked at for times of the future."""
_STYLES = {Grade.OK: {"fg": "green"}, Grade.NOTE: {"fg": "yellow"}, Grade.WRONG: {"fg": "red", "bold": True}}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of objects: check, grade, told.")
@pass_session
def doctor(session: Session, *, as_json: bool) -> None:
    """Look at the machine and the set-up; change nothing.

    One line for each check: ok, note (worth knowing) or WRONG, with what to do. Leaves with 1 if something is wrong.
    Run it as the user who supervises.
    """
    if not sys.platform.startswith("linux"):
        raise UnsupportedSystem(f"supervising needs Linux, and so does its doctor; this is {sys.platform}")
    found = list(findings(session))
    if as_json:
        print_json([{"check": one.check, "grade": one.grade, "told": one.told} for one in found])
    else:
        grades, checks = max(len(one.grade) for one in found), max(len(one.check) for one in found)
        for one in found:
            grade = click.style(f"{one.grade:<{grades}}", **_STYLES[one.grade])  # type: ignore[arg-type]
            click.echo(f"{grade}  {one.check:<{checks}}  {clean(one.told)}")
    raise click.exceptions.Exit(any(one.grade is Grade.WRONG for one in found))


def findings(session: Session, machine: Machine | None = None) -> Iterator[Finding]:
    """Yield what every check tells; without a configuration that alone."""
    try:
        config = session.config()
        service = session.service()
    except (ConfigError, AccessError) as error:
        yield Finding("configuration", Grade.WRONG, str(error))
        return
    yield _configuration(config)
    yield from _modules(config)
    machine = machine or Machine()
    scene = Scene(config=config, machine=machine)
    try:
        sight = _tables(config)
        if sight is None:
            sight, scene = _look(service, scene)
        yield sight
    except BgSupervisorError as error:
        yield Finding("database", Grade.WRONG, str(error))
    finally:
        service.close()
    yield from examine(scene)


def _configuration(config: Config) -> Finding:
    if config.path is None:
        told = "there is no file, all comes from the environment, which cron and systemd do not have; write one"
        return Finding("configuration", Grade.NOTE, told)
    return Finding("configuration", Grade.OK, str(config.path))


def _modules(config: Config) -> Iterator[Finding]:
    if not config.tasks:
        yield Finding("task modules", Grade.WRONG, "none are configured; name yours in `tasks`")
        return
    answer = load_apart(config, limit_s=LOAD_LIMIT_S)
    for failure in answer.failures:
        told = f"{failure.kind} {failure.module} does not load: {last_line(failure.error)}; see `bgsupervisor check`"
        yield Finding("task modules", Grade.WRONG, told)
    for danger in answer.dangers:
        yield Finding("task modules", Grade.WRONG, danger)
    for warning in answer.warnings:
        yield Finding("task modules", Grade.NOTE, warning)
    if not answer.failures and not answer.tasks:
        yield Finding("task modules", Grade.WRONG, f"no task is defined in {', '.join(config.tasks)}")
    elif not answer.failures:
        yield Finding("task modules", Grade.OK, f"{', '.join(config.tasks)}: {len(answer.tasks)} task(s)")


def _tables(config: Config) -> Finding | None:
    """Return what there is to say of a database without our tables; opening it as ours would create them."""
    if is_postgres(config.database):
        return _tables_on_server(config)
    path = sqlite_path(config.database)
    if not path.exists():
        told = f"{path} is not there yet; the first request or `bgsupervisor run` makes it"
        return Finding("database", Grade.NOTE, told)
    has_tables = True  # whatever else is wrong is told when it is opened
    with contextlib.suppress(sqlite3.Error):
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=config.busy_timeout_s)
        with contextlib.closing(connection):
            row = connection.execute(
                "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?", [f"{config.table_prefix}task"]
            ).fetchone()
            has_tables = bool(row[0])
    if has_tables:
        return None
    return Finding("database", Grade.NOTE, f"{path} has none of our tables yet; the first request makes them")


def _tables_on_server(config: Config) -> Finding | None:
    store = Store.open(config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s)
    try:
        if store.is_there():
            return None
    finally:
        store.close()
    told = f"{shown(config.database)} has none of our tables yet; the first request makes them"
    return Finding("database", Grade.NOTE, told)


def _look(service: Service, scene: Scene) -> tuple[Finding, Scene]:
    """Read what rows tell about the supervisor and the clock."""
    on_server = is_postgres(scene.config.database)
    now = service.ledger.clock.now() if on_server else scene.machine.clock.now()
    seen = watch(service, now=now)
    live = service.ledger.live_counts()
    running, supervisors = service.ledger.starts(), service.ledger.supervisors()
    moments = [(f"the request of task {one.id}", one.requested_at) for one in service.list(limit=NEWEST)]
    moments += [(f"the heartbeat of task {one.id}", one.heartbeat_at) for one in running if one.heartbeat_at]
    moments += [(f"the heartbeat of the supervisor on {one.host}", one.heartbeat_at) for one in supervisors]
    if on_server:  # by whose clock all rows go
        moments = [("the time of the database server", now)]
    told = f"{shown(scene.config.database)}: {live[Status.REQUEST]:,} wait, {live[Status.START]:,} run"
    known = Scene(
        config=scene.config, machine=scene.machine, alive=bool(seen.alive), seen_at=seen.seen_at, moments=moments
    )
    return Finding("database", Grade.OK, told), known
