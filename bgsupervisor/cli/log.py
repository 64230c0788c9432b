"""`bgsupervisor log`: what a task printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from bgsupervisor import logs
from bgsupervisor.cli.output import warn
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import UnknownTask
from bgsupervisor.statedir import StateDir, access_error
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bgsupervisor.models import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["log", "log_path"]


@click.command()
@click.argument("id", type=int)
@click.option("-f", "--follow", is_flag=True, help="Go on until the attempt has ended; Ctrl-C leaves it running.")
@click.option("--attempt", type=click.IntRange(min=1), help="Of an earlier attempt than the last.")
@pass_session
def log(session: Session, *, id: int, follow: bool, attempt: int | None) -> None:
    """Print what a task wrote to stdout and stderr."""
    service = session.existing_service()
    record = None if service is None else service.get(id)
    if service is None or record is None:
        raise UnknownTask(id)
    wanted = attempt or _last_attempt(record, follow=follow)
    if follow and record.status is Status.REQUEST and wanted > record.attempt:
        warn(f"task {id} has not begun yet; waiting for it")
    path = None
    try:
        path = log_path(service, record, wanted)
        pieces = _followed(service, id, wanted) if follow else iter(()) if path is None else logs.read(path)
        if not _print(pieces):
            of_attempt = "" if attempt is None else f" in attempt {attempt}"
            warn(f"task {id} has printed nothing{of_attempt}{_traceback(service, id, wanted)}")
    except PermissionError as error:
        where = path or StateDir(service.config.state_dir).logs
        raise access_error(where, "read", error, "ask its owner, or read it as that user") from error


def _traceback(service: Service, id: int, attempt: int) -> str:
    """Return where the traceback of an attempt is, if its body left one."""
    record = service.get(id)
    if record is None:
        return ""
    past = service.ledger.interruptions(id)
    has_one = any(one["attempt"] == attempt and one["error"] for one in past)
    return f"; `bgsupervisor show {id}` prints its traceback" if has_one else ""


def _last_attempt(record: TaskRecord, *, follow: bool) -> int:
    return record.attempt + (follow and record.status is Status.REQUEST)


def log_path(service: Service, record: TaskRecord, attempt: int) -> Path | None:
    """Return the log of an attempt, None if it has none. Raises PermissionError where this user may not look."""
    is_last = attempt == record.attempt
    return logs.find(
        StateDir(service.config.state_dir).logs,
        id=record.id,
        attempt=attempt,
        pid=record.pid if is_last else None,
        start_ticks=record.start_ticks if is_last else None,
    )


def _followed(service: Service, id: int, attempt: int) -> Iterator[str]:
    def path() -> Path | None:
        record = service.get(id)
        return None if record is None else log_path(service, record, attempt)

    def ended() -> bool:
        record = service.get(id)
        if record is None or record.attempt > attempt:
            return True
        if record.attempt < attempt:
            return record.ended
        return record.status is not Status.START

    return logs.follow(path, ended, SystemClock())


def _print(pieces: Iterator[str]) -> bool:
    """Print what comes, at once; tell whether anything came."""
    printed = False
    for piece in pieces:
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
            printed = True
    return printed
