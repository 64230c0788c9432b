"""`bgsupervisor health`: one line for a monitoring system, or metrics for Prometheus."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.display.snapshot import Counts, Snapshot
from bgsupervisor.cli.display.text import duration
from bgsupervisor.cli.session import Finite, Session, pass_session
from bgsupervisor.errors import BgSupervisorError
from bgsupervisor.sanitize import clean
from bgsupervisor.sizes import size
from bgsupervisor.statuses import Status
from bgsupervisor.system import processes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from bgsupervisor.cli.display.supervisors import Supervisors
    from bgsupervisor.service import Service

__all__ = ["Measured", "health"]

MAX_WAIT_S = 300.0
CRITICAL_FACTOR = 10
"""How many times the limit of the warning a wait is critical."""
WAL_WARN_BYTES = 100 * 1024 * 1024
"""Size of a -wal file that a reader or a hanging supervisor pins; checkpoints keep it near 4 MB."""

_Value = float | dict[str, int] | None
"""Of a metric: one number, one for each status, or nothing that is known."""
_Metric = tuple[str, str, _Value]
"""Its name, its help and its value."""


class State(IntEnum):
    """The states of a monitoring system, by exit code."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


class _WrongUsage(click.UsageError):
    exit_code = State.UNKNOWN


class _Plugin(click.Command):
    """A command whose wrong usage is UNKNOWN; 2, as of other commands, would mean CRITICAL."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _WrongUsage(error.format_message(), ctx) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """An installation in numbers, at one moment.

    Attributes:
        supervisors: The supervisors.
        counts: How many tasks there are.
        oldest_wait_s: Longest wait of a due task whose code is loaded; 0 if none waits or no supervisor lives.
        heartbeat_age_s: Seconds since a supervisor was last heard; None if there never was one.
        unresponsive: Running tasks that were not heard for three heartbeats.
        wal_bytes: The size of the -wal file.
        write_problem: Why the database cannot be written; None if it can.
    """

    supervisors: Supervisors
    counts: Counts
    oldest_wait_s: float
    heartbeat_age_s: float | None
    unresponsive: tuple[int, ...]
    wal_bytes: int
    write_problem: str | None

    @classmethod
    def measure(cls, service: Service) -> Measured:
        """Measure, by queries that small indexes answer.

        Raises:
            DatabaseError, AccessError, SchemaError: The database cannot be read.
        """
        ledger, snapshot = service.ledger, Snapshot.take(service)
        supervisors, now, seen_at = snapshot.supervisors, snapshot.now, snapshot.supervisors.seen_at
        oldest = ledger.oldest_due_at(supervisors.catalogue) if supervisors.alive else None
        wal, wal_bytes = ledger.store.wal_path(), 0
        with contextlib.suppress(OSError):
            wal_bytes = wal.stat().st_size if wal is not None else 0
        return cls(
            supervisors=supervisors,
            counts=Counts.read(service, now=now),
            oldest_wait_s=0.0 if oldest is None else max(0.0, (now - oldest).total_seconds()),
            heartbeat_age_s=None if seen_at is None else max(0.0, (now - seen_at).total_seconds()),
            unresponsive=tuple(record.id for record in ledger.starts() if snapshot.is_unresponsive(record)),
            wal_bytes=wal_bytes,
            write_problem=ledger.store.write_problem(wait_s=service.config.busy_timeout_s),
        )

    @property
    def busy(self) -> int:
        """How many slots are taken."""
        return self.counts.live[Status.START] - self.counts.waiting

    def judge(self, *, max_wait_s: float, max_interrupted: int | None) -> list[tuple[State, str]]:
        """Return all that is not as it should be, the worst first."""
        seen = self.supervisors
        found = list[tuple[State, str]]()
        if seen.stop is not None:
            found.append((State.WARNING, f"{'stopping: ' if seen.alive else ''}{seen.absence()}"))
        elif not seen.alive:
            found.append((State.CRITICAL, seen.absence()))
        if self.write_problem is not None:
            found.append((State.CRITICAL, self.write_problem))
        found += [(State.WARNING, sentence) for sentence in seen.silence()]
        if self.oldest_wait_s > max_wait_s:
            state = State.CRITICAL if self.oldest_wait_s > CRITICAL_FACTOR * max_wait_s else State.WARNING
            why = f", all {seen.slots} slots are busy" if self.busy >= seen.slots else ""
            found.append((state, f"a due task has waited {duration(self.oldest_wait_s)}{why}"))
        warnings, interrupted = list[str](), self.counts.ended[Status.INTERRUPTED]
        if max_interrupted is not None and interrupted > max_interrupted:
            warnings.append(f"{interrupted} tasks were interrupted within a day")
        warnings += [*seen.dangers, *map(str, seen.failures)]
        if self.unresponsive:
            warnings.append(f"running but unresponsive: {', '.join(map(str, self.unresponsive))}")
        if self.wal_bytes > WAL_WARN_BYTES:
            warnings.append(f"the -wal file has {size(self.wal_bytes)}, a reader or a hanging supervisor keeps it")
        found += [(State.WARNING, warning) for warning in warnings]
        return sorted(found, key=lambda one: -one[0])

    def perfdata(self, *, max_wait_s: float, max_interrupted: int | None) -> str:
        """Return the numbers as monitoring systems read them: label=value;warning;critical;minimum;maximum."""
        live, ended = self.counts.live, self.counts.ended
        limit = "" if max_interrupted is None else max_interrupted
        values = [
            f"supervisors={len(self.supervisors.alive)}",
            f"waiting={live[Status.REQUEST]};;;0",
            f"running={live[Status.START]};;;0;{self.supervisors.slots}",
            f"oldest_wait={self.oldest_wait_s:.1f}s;{max_wait_s:g};{CRITICAL_FACTOR * max_wait_s:g};0",
            f"done_24h={ended[Status.DONE]};;;0",
            f"interrupted_24h={ended[Status.INTERRUPTED]};{limit};;0",
            f"unresponsive={len(self.unresponsive)};0;;0",
            f"wal={self.wal_bytes}B;{WAL_WARN_BYTES};;0",
        ]
        if self.heartbeat_age_s is not None:
            values.append(f"heartbeat_age={self.heartbeat_age_s:.1f}s;;;0")
        return " ".join(values)

    def summary(self) -> str:
        """Return the sentence for when all is well."""
        pids = ", ".join(str(one.pid) for one in self.supervisors.alive)
        running, waiting = self.counts.live[Status.START], self.counts.live[Status.REQUEST]
        return f"supervisor {pids} is alive, {running} of {self.supervisors.slots} slots busy, {waiting} waiting"

    def metrics(self) -> Iterator[_Metric]:
        """Yield the metrics of Prometheus."""
        seen = self.supervisors
        live = {str(status): count for status, count in self.counts.live.items()}
        ended = {str(status): count for status, count in self.counts.ended.items()}
        yield "database_writable", "Whether the database could be written.", self.write_problem is None
        yield "supervisor_up", "Whether a supervisor is alive.", bool(seen.alive)
        yield "supervisor_stopped", "Whether it was stopped on purpose.", seen.stop is not None
        heard = "Since a supervisor was last heard in the database."
        yield "supervisor_heartbeat_age_seconds", heard, self.heartbeat_age_s
        yield "slots", "How many bodies the living supervisors run at once.", seen.slots
        yield "live_tasks", "Tasks that wait or run.", live
        yield "ended_tasks_24h", "Tasks that ended within 24 hours.", ended
        yield "oldest_wait_seconds", "How long a due task has waited whose code is loaded.", self.oldest_wait_s
        yield "unresponsive_tasks", "Running tasks without a heartbeat.", len(self.unresponsive)
        yield "code_failures", "Task modules that failed to load.", len(seen.failures)
        yield "wal_bytes", "Size of the database's -wal file.", self.wal_bytes


@click.command(cls=_Plugin)
@click.option(
    "--max-wait-s",
    type=Finite(min=0, min_open=True),
    default=MAX_WAIT_S,
    show_default=True,
    help=f"WARNING if a due task whose code is loaded has waited longer; CRITICAL from {CRITICAL_FACTOR} times that.",
)
@click.option(
    "--max-interrupted", type=click.IntRange(min=0), help="WARNING if more tasks were interrupted within 24 hours."
)
@click.option("--prometheus", is_flag=True, help="Print metrics for a textfile collector instead.")
@pass_session
def health(session: Session, *, max_wait_s: float, max_interrupted: int | None, prometheus: bool) -> None:
    """Report in one line whether all is well.

    The exit code is 0 OK, 1 WARNING, 2 CRITICAL or 3 UNKNOWN, as Nagios and its heirs have it; numbers follow a bar.
    """
    try:
        service = session.service()
        labels = {"prefix": session.config().table_prefix, "host": processes.host_id(session.config().host)}
    except BgSupervisorError as error:
        if prometheus:
            raise
        _leave(State.UNKNOWN, str(error))
    measured: Measured | None = None
    problem = State.UNKNOWN, session.nothing_yet()
    try:
        if service.ledger.store.is_there():
            measured = Measured.measure(service)
    except BgSupervisorError as error:
        problem = State.CRITICAL, str(error)
    service.close()
    if prometheus:
        readable = "database_readable", "Whether the database could be read.", measured is not None
        for metric in (readable, *(measured.metrics() if measured else ())):
            _print_metric(metric, labels)
        return
    if measured is None:
        _leave(*problem)
    found = measured.judge(max_wait_s=max_wait_s, max_interrupted=max_interrupted)
    sentence = "; ".join(sentence for _, sentence in found) or measured.summary()
    perfdata = measured.perfdata(max_wait_s=max_wait_s, max_interrupted=max_interrupted)
    _leave(found[0][0] if found else State.OK, sentence, perfdata)


def _leave(state: State, sentence: str, perfdata: str = "") -> NoReturn:
    text = clean(sentence).replace("|", "/")  # numbers follow a bar
    click.echo(f"{state.name} - {text}" + (f" | {perfdata}" if perfdata else ""))
    raise click.exceptions.Exit(state)


def _print_metric(metric: _Metric, labels: dict[str, str]) -> None:
    """Print a metric in Prometheus's text format; one without a value is left out."""
    name, help, value = metric
    if value is None:
        return
    click.echo(f"# HELP bgsupervisor_{name} {help}\n# TYPE bgsupervisor_{name} gauge")
    for status, number in value.items() if isinstance(value, dict) else [(None, value)]:
        known = labels if status is None else {**labels, "status": status}
        text = ",".join(f'{key}="{_escaped(label)}"' for key, label in known.items())
        click.echo(f"bgsupervisor_{name}{{{text}}} {number:.15g}")


def _escaped(text: str) -> str:
    return clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
