"""`bgsupervisor log`: what a task printed."""

from __future__ import annotations

import select
import sys
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.display.output import warn
from bgsupervisor.cli.display.supervisors import Supervisors, identity_in
from bgsupervisor.cli.session import Session, pass_session, task_of
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import DatabaseError
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.sanitize import clean_line_keeping_colours
from bgsupervisor.statuses import Status
from bgsupervisor.system import logs, processes
from bgsupervisor.system.files import access_error
from bgsupervisor.system.processes import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["log", "log_path"]

ROW_EVERY_S = 0.5
"""Interval between readings of the row of a task whose log is followed, in seconds."""
ABANDONED_S = 5.0
"""Time after which an unrecorded death ends the following of a log, in seconds; a supervisor takes 2."""


@click.command()
@click.argument("id", type=int)
@click.option("-f", "--follow", is_flag=True, help="Continue until the attempt has ended; Ctrl-C leaves it running.")
@click.option("--raw", is_flag=True, help="Print it unchanged on a terminal too, with all that can control a terminal.")
@click.option("--attempt", type=click.IntRange(min=1), help="The log of an earlier attempt.")
@pass_session
def log(session: Session, *, id: int, follow: bool, raw: bool, attempt: int | None) -> None:
    """Print what a task wrote to stdout and stderr.

    On a terminal only its colours have an effect; in a pipe it is as it was written.
    """
    service = session.service_with(id)
    record = task_of(service, id)
    wanted = attempt or record.attempt + (follow and record.status is Status.REQUEST)
    if follow and record.status is Status.REQUEST and wanted > record.attempt:
        warn(f"task {id} has not started yet; waiting for it")
    path = None
    try:
        path = log_path(service, record, wanted)
        pieces = _follow(service, id, wanted) if follow else iter(()) if path is None else logs.read(path)
        if not _print(pieces if raw or not sys.stdout.isatty() else map(_for_terminal, pieces)):
            of_attempt = "" if attempt is None else f" in attempt {attempt}"
            warn(f"task {id} has printed nothing{of_attempt}{_traceback(service, id, wanted)}")
    except PermissionError as error:
        where = path or StateDir(service.config.state_dir).logs
        raise access_error(where, "read", error, "ask its owner, or read it as that user") from error


def _traceback(service: Service, id: int, attempt: int) -> str:
    """Return where the traceback of an attempt is, if its body left one."""
    past = service.ledger.interruptions(id)
    has_one = any(one["attempt"] == attempt and one["error"] for one in past)
    return f"; `bgsupervisor show {id}` prints its traceback" if has_one else ""


def log_path(service: Service, record: TaskRecord, attempt: int) -> Path | None:
    """Return the log of an attempt, None if it has none. Raises PermissionError for a user without the right."""
    is_last = attempt == record.attempt
    return logs.find(
        StateDir(service.config.state_dir).logs,
        id=record.id,
        attempt=attempt,
        pid=record.pid if is_last else None,
        start_ticks=record.start_ticks if is_last else None,
    )


class _WhileRead(SystemClock):
    """A clock whose sleep ends once stdout has no reader: a follower must not outlive its reader."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP are always reported: poll(2)

    def sleep(self, seconds: float) -> None:
        """Block for *seconds*.

        Raises:
            BrokenPipeError: The reader of stdout has gone.
        """
        if self._poll.poll(seconds * 1000):
            raise BrokenPipeError


class _Followed:
    """The row of a task whose log is followed; it is read twice a second, the log ten times."""

    def __init__(self, service: Service, id: int, attempt: int) -> None:
        self._service = service
        self._id = id
        self._attempt = attempt
        self._clock = SystemClock()
        self._database = service.ledger.store.inode()
        self._record: TaskRecord | None = None
        self._read_at = -ROW_EVERY_S
        self._dead_since: float | None = None

    def path(self) -> Path | None:
        """Return where the log is, None while there is none."""
        return None if self._record is None else log_path(self._service, self._record, self._attempt)

    def ended(self) -> bool:
        """Return whether nothing more will be written.

        Raises:
            DatabaseError: The database file was deleted or replaced.
        """
        now = self._clock.monotonic()
        if now - self._read_at < ROW_EVERY_S:
            return False
        self._read_at = now
        if self._service.ledger.store.inode() != self._database:  # reading would create an empty file in its place
            raise DatabaseError(
                f"cannot follow task {self._id} any more: the database was deleted or replaced; use the new one"
            )
        self._record = record = self._service.get(self._id)
        if record is None or record.attempt > self._attempt:
            return True
        if record.status is Status.START and record.attempt == self._attempt:
            return self._is_abandoned(record, now)
        return record.ended or record.attempt == self._attempt

    def _is_abandoned(self, record: TaskRecord, now: float) -> bool:
        """Return whether the task's process is dead, and no supervisor is there to record that."""
        identity = identity_in(record)
        if identity is None or processes.verdict(identity) is not Verdict.DEAD:
            self._dead_since = None
            return False
        if self._dead_since is None:
            self._dead_since = now
        if now - self._dead_since < ABANDONED_S or Supervisors.read(self._service).alive:
            return False
        warn(f"the process of task {self._id} has ended, and no supervisor is running to record how")
        return True


def _follow(service: Service, id: int, attempt: int) -> Iterator[str]:
    followed = _Followed(service, id, attempt)
    return logs.follow(followed.path, followed.ended, _WhileRead())


def _for_terminal(piece: str) -> str:
    """Return a piece of a log without what could control a terminal; carriage returns keep rewriting their line."""
    return "\n".join("\r".join(map(clean_line_keeping_colours, line.split("\r"))) for line in piece.split("\n"))


def _print(pieces: Iterable[str]) -> bool:
    """Print each piece at once; return whether there was any."""
    printed = False
    for piece in pieces:
        if piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
            printed = True
    return printed
