"""`bgsupervisor doctor`: what is wrong with the machine and the set-up, and what to do about it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from bgsupervisor.addresses import is_postgres, shown, sqlite_path
from bgsupervisor.cli.commands.check import LOAD_LIMIT_S
from bgsupervisor.cli.display.output import print_json
from bgsupervisor.cli.display.supervisors import Supervisors, last_line
from bgsupervisor.cli.load_check import load_apart
from bgsupervisor.cli.session import Session, json_option, pass_session
from bgsupervisor.database.store import Store
from bgsupervisor.doctor import Finding, Grade, Machine, Site, examine
from bgsupervisor.doctor.findings import note, ok, wrong
from bgsupervisor.errors import AccessError, BgSupervisorError, ConfigError, UnsupportedSystem
from bgsupervisor.sanitize import clean
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bgsupervisor.config import Config
    from bgsupervisor.doctor.findings import Result
    from bgsupervisor.service import Service

__all__ = ["doctor", "findings"]

NEWEST = 20
"""The newest tasks whose times are checked."""
_STYLES = {Grade.OK: {"fg": "green"}, Grade.NOTE: {"fg": "yellow"}, Grade.WRONG: {"fg": "red", "bold": True}}


@click.command()
@json_option("A list of objects: check, grade, told.")
@pass_session
def doctor(session: Session, *, as_json: bool) -> None:
    """Check the machine and the set-up; change nothing.

    One line for each check: ok, note (worth knowing) or WRONG, with what to do. Leaves with 1 if something is wrong.
    Run it as the user that supervises.
    """
    if not sys.platform.startswith("linux"):
        raise UnsupportedSystem(f"supervising needs Linux, and so does its doctor; this is {sys.platform}")
    found = list(findings(session))
    if as_json:
        print_json([{"check": one.check, "grade": one.grade, "told": one.message} for one in found])
    else:
        grades, checks = max(len(one.grade) for one in found), max(len(one.check) for one in found)
        for one in found:
            grade = click.style(f"{one.grade:<{grades}}", **_STYLES[one.grade])  # type: ignore[arg-type]
            click.echo(f"{grade}  {one.check:<{checks}}  {clean(one.message)}")
    raise click.exceptions.Exit(any(one.grade is Grade.WRONG for one in found))


def findings(session: Session, machine: Machine | None = None) -> Iterator[Finding]:
    """Yield what every check finds; without a configuration that alone."""
    try:
        config = session.config()
        service = session.service()
    except (ConfigError, AccessError) as error:
        yield Finding("configuration", Grade.WRONG, str(error))
        return
    yield _configuration(config)
    yield from (Finding("task modules", grade, message) for grade, message in _modules(config))
    site = Site(config=config, machine=machine or Machine())
    try:
        missing = _missing(config)
        if missing is None:
            site, message = _read(service, site)
            yield Finding("database", Grade.OK, message)
        else:
            yield Finding("database", Grade.NOTE, missing)
    except BgSupervisorError as error:
        yield Finding("database", Grade.WRONG, str(error))
    finally:
        service.close()
    yield from examine(site)


def _configuration(config: Config) -> Finding:
    if config.path is None:
        message = "there is no file, all comes from the environment, which cron and systemd do not have; write one"
        return Finding("configuration", Grade.NOTE, message)
    return Finding("configuration", Grade.OK, str(config.path))


def _modules(config: Config) -> Iterator[Result]:
    if not config.tasks:
        yield wrong("none are configured; name yours in `tasks`")
        return
    answer = load_apart(config, limit_s=LOAD_LIMIT_S)
    for failure in answer.failures:
        line = last_line(failure.error)
        yield wrong(f"{failure.kind} {failure.module} does not load: {line}; see `bgsupervisor check`")
    yield from map(wrong, answer.dangers)
    yield from map(note, answer.warnings)
    modules = ", ".join(config.tasks)
    if not answer.failures and not answer.tasks:
        yield wrong(f"no task is defined in {modules}")
    elif not answer.failures:
        yield ok(f"{modules}: {len(answer.tasks)} task(s)")


def _missing(config: Config) -> str | None:
    """Return what is missing of a database without our tables; opening it as ours would create them."""
    if is_postgres(config.database):
        store = Store.open(config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s)
        with contextlib.closing(store):
            has_tables = store.is_there()
    else:
        path = sqlite_path(config.database)
        if not path.exists():
            return f"{path} is not there yet; the first request or `bgsupervisor run` creates it"
        has_tables = _has_tables(path, config)
    place = shown(config.database) if is_postgres(config.database) else path
    return None if has_tables else f"{place} has none of our tables yet; the first request creates them"


def _has_tables(path: Path, config: Config) -> bool:
    with contextlib.suppress(sqlite3.Error):  # opening it as ours reports what is wrong
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=config.busy_timeout_s)
        with contextlib.closing(connection):
            query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
            return bool(connection.execute(query, [f"{config.table_prefix}task"]).fetchone()[0])
    return True


def _read(service: Service, site: Site) -> tuple[Site, str]:
    """Read what rows record of supervisors and of times; return them with a sentence about the tasks."""
    on_server = is_postgres(site.config.database)
    now = service.ledger.clock.now() if on_server else site.machine.clock.now()
    supervisors, live = Supervisors.read(service, now=now), service.ledger.live_counts()
    moments = [("the time of the database server", now)]
    if not on_server:  # which goes by its own clock in all rows
        moments = [(f"the request of task {one.id}", one.requested_at) for one in service.list(limit=NEWEST)]
        running, rows = service.ledger.starts(), service.ledger.supervisors()
        moments += [(f"the heartbeat of task {one.id}", one.heartbeat_at) for one in running if one.heartbeat_at]
        moments += [(f"the heartbeat of the supervisor on {one.host}", one.heartbeat_at) for one in rows]
    message = f"{shown(site.config.database)}: {live[Status.REQUEST]:,} wait, {live[Status.START]:,} run"
    return replace(site, alive=bool(supervisors.alive), seen_at=supervisors.seen_at, moments=moments), message
