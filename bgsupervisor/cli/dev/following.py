"""What `bgsupervisor dev` prints of tasks: each line of their output as it comes, and each end."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from bgsupervisor.addresses import shown
from bgsupervisor.cli.commands.log import log_path
from bgsupervisor.cli.display.text import short_duration
from bgsupervisor.cli.display.traces import folded
from bgsupervisor.environment import wants_no_colour
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.sanitize import clean, clean_line_keeping_colours
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.system.logs import Reader
from bgsupervisor.worker.reporting import headline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import LoadFailure
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["Following", "Lines", "echo", "echo_failures", "echo_start"]

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "bright_cyan", "bright_yellow", "bright_magenta")
OVERLAP_S = 2.0
"""How far before the last known end rows are read again: a row's time is taken before its commit is visible."""
ENDS_MAX = 5000
"""The most ends that are read at once."""
WITH_TRACEBACK = frozenset({Reason.RAISED, Reason.EXITED, Reason.DEADLOCKED, Reason.TIMED_OUT})
"""The reasons whose traceback shows what to fix; that of a cancelled body shows only where it was."""


def echo(line: str) -> None:
    """Print one line at once, cleaned; in colour on a terminal only."""
    click.echo(clean_line_keeping_colours(line), color=False if wants_no_colour() else None)


def echo_start(config: Config) -> None:
    """Print what is developed, and how to end it."""
    modules = ", ".join(config.tasks) or "no modules (name them in `tasks`)"
    place = f"{shown(config.database)}, {config.slots} slots"
    echo(f"developing {modules} on {place}; Ctrl-C ends it, with the running tasks")


def echo_failures(failures: Iterable[LoadFailure], config: Config) -> None:
    """Print what failed to load, each with its traceback, in which frames of libraries are folded."""
    for failure in failures:
        echo(f"{clean(failure.module)} {click.style('failed to load', fg='red', bold=True)}")
        for line in folded(failure.error, config).rstrip().split("\n"):
            echo(f"{clean(failure.module)} {click.style('|', dim=True)} {line}")


class Lines:
    """Cuts pieces of text into lines; what a carriage return has overwritten is left out."""

    def __init__(self) -> None:
        self._unfinished = ""

    def of(self, piece: str) -> list[str]:
        """Return the lines that are complete now."""
        *whole, self._unfinished = (self._unfinished + piece).split("\n")
        return [_last_written(line) for line in whole]

    def rest(self) -> list[str]:
        """Return the last line, if it never ended."""
        unfinished, self._unfinished = self._unfinished, ""
        return [_last_written(unfinished)] if unfinished else []


def _last_written(line: str) -> str:
    return line.rstrip("\r").rpartition("\r")[2]


@dataclasses.dataclass(slots=True)
class _Followed:
    """A running attempt: its row as last read, its log so far, and whether that has the traceback."""

    record: TaskRecord
    reader: Reader = dataclasses.field(default_factory=Reader)
    lines: Lines = dataclasses.field(default_factory=Lines)
    reported: bool = False


class Following:
    """Prints what the tasks of one installation do from now on.

    Args:
        service: Reads the rows.
        echo: Prints one line.
    """

    def __init__(self, service: Service, echo: Callable[[str], None]) -> None:
        self._service = service
        self._ledger = service.ledger
        self._echo = echo
        self._running: dict[Attempt, _Followed] = {}
        self._printed: dict[tuple[int, int, datetime], datetime] = {}
        self._since = self._from = self._ledger.clock.now()

    def print_new(self) -> None:
        """Print what is new.

        Raises:
            DatabaseError, AccessError: The rows cannot be read; the next call prints what this one missed.
        """
        starts = {Attempt(record.id, record.attempt): record for record in self._ledger.starts()}
        ends = self._ledger.ended_since(self._since - timedelta(seconds=OVERLAP_S), limit=ENDS_MAX)
        for attempt, record in starts.items():
            if attempt not in self._running:
                self._begin(record)
        for followed in list(self._running.values()):
            self._print_output(followed)
        for record in ends:
            self._take_end(record)
        for attempt in self._running.keys() - starts.keys():
            if self._ledger.status(attempt.id) is not Status.START:
                self._forget(attempt)  # given back, retried or pruned between two calls
        oldest = self._since - timedelta(seconds=2 * OVERLAP_S)
        self._printed = {key: ended_at for key, ended_at in self._printed.items() if ended_at >= oldest}

    def running(self) -> list[TaskRecord]:
        """Return the rows of the tasks that ran at the last call of `print_new`."""
        return [followed.record for followed in self._running.values()]

    def close(self) -> None:
        """Close the logs."""
        for attempt in list(self._running):
            self._forget(attempt)

    def _begin(self, record: TaskRecord) -> _Followed:
        followed = self._running[Attempt(record.id, record.attempt)] = _Followed(record)
        again = f", attempt {record.attempt}" if record.attempt > 1 else ""
        self._echo(f"{_label(record)} {click.style('started', bold=True)}{again}")
        return followed

    def _take_end(self, record: TaskRecord) -> None:
        assert record.ended_at is not None  # noqa: S101 - the query asked for it
        key = (record.id, record.attempt, record.ended_at)
        if key in self._printed or record.ended_at < self._from:
            return
        self._printed[key] = record.ended_at
        self._since = max(self._since, record.ended_at)
        is_reported = False
        if record.started_at is not None:
            attempt = Attempt(record.id, record.attempt)
            followed = self._running.get(attempt) or self._begin(record)
            followed.record = record
            self._print_output(followed)
            self._print(followed, [*followed.lines.of(followed.reader.rest()), *followed.lines.rest()])
            is_reported = followed.reported
            self._forget(attempt)
        self._echo(f"{_label(record)} {_outcome(record)}")
        if record.error and record.reason in WITH_TRACEBACK and not is_reported:
            self._print(_Followed(record), folded(record.error, self._service.config).rstrip().split("\n"))

    def _print_output(self, followed: _Followed) -> None:
        record = followed.record
        for piece in followed.reader.new(lambda: log_path(self._service, record, record.attempt)):
            self._print(followed, followed.lines.of(piece))

    def _print(self, followed: _Followed, lines: Iterable[str]) -> None:
        record = followed.record
        report = headline(record.id, record.name, record.attempt)
        for line in lines:
            followed.reported = followed.reported or report in line
            self._echo(f"{_label(record)} {click.style('|', dim=True)} {line}")

    def _forget(self, attempt: Attempt) -> None:
        self._running.pop(attempt).reader.close()


def _label(record: TaskRecord) -> str:
    name = clean(record.name.rpartition(":")[2] or record.name)
    return click.style(f"{record.id} {name}", fg=COLOURS[record.id % len(COLOURS)])


def _outcome(record: TaskRecord) -> str:
    took = ""
    if record.started_at is not None and record.ended_at is not None:
        took = short_duration((record.ended_at - record.started_at).total_seconds())
    if record.status is Status.DONE:
        return f"{click.style('DONE', fg='green', bold=True)} in {took}"
    after = f" after {took}" if took else ""
    why = f"{record.reason}: {clean(record.detail or '')}"
    return f"{click.style('INTERRUPTED', fg='red', bold=True)}{after}: {why}"
