"""`bgsupervisor health`: one line for a monitoring system, or metrics for Prometheus."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING

import click

from bgsupervisor.cli.display.columns import Facts
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

    from bgsupervisor.cli.display.supervisors import Watch
    from bgsupervisor.clock import Clock
    from bgsupervisor.service import Service

__all__ = ["Sight", "health"]

MAX_WAIT_S = 300.0
CRITICAL_FACTOR = 10
"""A wait is critical from so many times the limit of the warning."""
WAL_WARN_BYTES = 100 * 1024 * 1024
"""Checkpoints keep the -wal file near 4 MB; one this large is pinned by a reader, or by a hanging supervisor."""
DAY = timedelta(days=1)


class State(IntEnum):
    """What a monitoring system understands, by exit code."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


class _WrongUsage(click.UsageError):
    exit_code = State.UNKNOWN


class _Plugin(click.Command):
    """A command whose wrong usage is UNKNOWN; 2, as elsewhere, would be taken for CRITICAL."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _WrongUsage(error.format_message(), ctx) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What there is to see of an installation, in numbers.

    Attributes:
        watch: The supervisors.
        absence: The sentence about a supervisor that is not alive.
        silence: Sentences about those that live and do not write.
        live: Tasks by status, REQUEST and START.
        waiting: How many of those that run wait for others, without a slot.
        ended: Tasks that ended within a day by status, DONE and INTERRUPTED.
        slots: Of all living supervisors.
        oldest_wait_s: For how long a due task has waited whose code is loaded; 0 if none waits or nobody supervises.
        silence_s: Seconds since a supervisor was last heard; None if there never was one.
        unresponsive: Running tasks that were not heard for three heartbeats.
        wal_bytes: The size of the -wal file.
        write_problem: Why the database cannot be written; None if it can.
    """

    watch: Watch
    absence: str
    silence: list[str]
    live: dict[Status, int]
    waiting: int
    ended: dict[Status, int]
    slots: int
    oldest_wait_s: float
    silence_s: float | None
    unresponsive: tuple[int, ...]
    wal_bytes: int
    write_problem: str | None

    @classmethod
    def take(cls, service: Service, clock: Clock) -> Sight:
        """Look, by queries that small indexes answer.

        Raises:
            DatabaseError, AccessError, SchemaError: The database cannot be read.
        """
        ledger = service.ledger
        facts = Facts.gather(service, positions={}, clock=clock)
        seen, now = facts.watch, facts.now
        oldest = ledger.oldest_due_at(seen.catalogue) if seen.alive else None
        wal = ledger.store.wal_path()
        wal_bytes = 0
        with contextlib.suppress(OSError):
            wal_bytes = wal.stat().st_size if wal is not None else 0
        return cls(
            watch=seen,
            absence=seen.absence(now=now),
            silence=seen.silence(now=now),
            live=ledger.live_counts(),
            waiting=ledger.waiting_count(),
            ended=ledger.ended_counts(now - DAY),
            slots=sum(one.slots for one in seen.alive),
            oldest_wait_s=0.0 if oldest is None else max(0.0, (now - oldest).total_seconds()),
            silence_s=None if seen.seen_at is None else max(0.0, (now - seen.seen_at).total_seconds()),
            unresponsive=tuple(record.id for record in ledger.starts() if facts.is_unresponsive(record)),
            wal_bytes=wal_bytes,
            write_problem=ledger.store.write_problem(wait_s=service.config.busy_timeout_s),
        )

    def judge(self, *, max_wait_s: float, max_interrupted: int | None) -> list[tuple[State, str]]:
        """Return all that is not as it should be, each with how bad it is."""
        found = []
        if self.watch.stopped is not None:
            found.append((State.WARNING, self.absence if not self.watch.alive else f"stopping: {self.absence}"))
        elif not self.watch.alive:
            found.append((State.CRITICAL, self.absence))
        if self.write_problem is not None:
            found.append((State.CRITICAL, self.write_problem))
        found += [(State.WARNING, told) for told in self.silence]
        if self.oldest_wait_s > max_wait_s:
            state = State.CRITICAL if self.oldest_wait_s > CRITICAL_FACTOR * max_wait_s else State.WARNING
            why = f", all {self.slots} slots are busy" if self.live[Status.START] - self.waiting >= self.slots else ""
            found.append((state, f"a due task has waited {duration(self.oldest_wait_s)}{why}"))
        interrupted = self.ended[Status.INTERRUPTED]
        if max_interrupted is not None and interrupted > max_interrupted:
            found.append((State.WARNING, f"{interrupted} tasks were interrupted within a day"))
        found += [(State.WARNING, danger) for danger in self.watch.dangers]
        found += [(State.WARNING, str(failure)) for failure in self.watch.failures]
        if self.unresponsive:
            ids = ", ".join(map(str, self.unresponsive))
            found.append((State.WARNING, f"running but unresponsive: {ids}"))
        if self.wal_bytes > WAL_WARN_BYTES:
            told = f"the -wal file has {size(self.wal_bytes)}, a reader or a hanging supervisor keeps it"
            found.append((State.WARNING, told))
        return found

    def perfdata(self, *, max_wait_s: float, max_interrupted: int | None) -> str:
        """Return the numbers as monitoring systems read them: label=value;warning;critical;minimum;maximum."""
        limit = "" if max_interrupted is None else max_interrupted
        values = [
            f"supervisors={len(self.watch.alive)}",
            f"waiting={self.live[Status.REQUEST]};;;0",
            f"running={self.live[Status.START]};;;0;{self.slots}",
            f"oldest_wait={self.oldest_wait_s:.1f}s;{max_wait_s:g};{CRITICAL_FACTOR * max_wait_s:g};0",
            f"done_24h={self.ended[Status.DONE]};;;0",
            f"interrupted_24h={self.ended[Status.INTERRUPTED]};{limit};;0",
            f"unresponsive={len(self.unresponsive)};0;;0",
            f"wal={self.wal_bytes}B;{WAL_WARN_BYTES};;0",
        ]
        if self.silence_s is not None:
            values.append(f"heartbeat_age={self.silence_s:.1f}s;;;0")
        return " ".join(values)

    def summary(self) -> str:
        """Return the sentence for when all is well."""
        pids = ", ".join(str(one.pid) for one in self.watch.alive)
        running, waiting = self.live[Status.START], self.live[Status.REQUEST]
        return f"supervisor {pids} is alive, {running} of {self.slots} slots busy, {waiting} waiting"


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
    """Tell in one line whether all is well.

    The exit code is 0 OK, 1 WARNING, 2 CRITICAL or 3 UNKNOWN, as Nagios and its heirs have it; numbers follow a bar.
    """
    try:
        service = session.service()
        host = processes.host_id(session.config().host)
        prefix = session.config().table_prefix
    except BgSupervisorError as error:
        if prometheus:
            raise
        _leave(State.UNKNOWN, str(error))
    sight: Sight | None = None
    problem = State.UNKNOWN, session.nothing_yet()
    try:
        if service.ledger.store.is_there():
            sight = Sight.take(service, service.ledger.clock)
    except BgSupervisorError as error:
        problem = State.CRITICAL, str(error)
    service.close()
    if prometheus:
        click.echo("\n".join(_metrics(sight, prefix=prefix, host=host)))
        return
    if sight is None:
        _leave(*problem)
    found = sight.judge(max_wait_s=max_wait_s, max_interrupted=max_interrupted)
    found.sort(key=lambda one: -one[0])
    state = found[0][0] if found else State.OK
    told = "; ".join(sentence for _, sentence in found) or sight.summary()
    _leave(state, told, sight.perfdata(max_wait_s=max_wait_s, max_interrupted=max_interrupted))


def _leave(state: State, told: str, perfdata: str = "") -> NoReturn:
    text = clean(told).replace("|", "/")  # what follows a bar is numbers
    click.echo(f"{state.name} - {text}" + (f" | {perfdata}" if perfdata else ""))
    raise click.exceptions.Exit(state)


def _metrics(sight: Sight | None, *, prefix: str, host: str) -> Iterator[str]:
    """Yield the lines of Prometheus's text format."""
    labels = {"prefix": prefix, "host": host}

    def metric(name: str, help: str, *values: tuple[float | None, dict[str, str]]) -> Iterator[str]:
        known = [(value, more) for value, more in values if value is not None]
        if known:
            yield f"# HELP bgsupervisor_{name} {help}"
            yield f"# TYPE bgsupervisor_{name} gauge"
        for value, more in known:
            told = ",".join(f'{key}="{_escaped(text)}"' for key, text in {**labels, **more}.items())
            yield f"bgsupervisor_{name}{{{told}}} {value:.15g}"

    yield from metric("database_readable", "Whether the database could be read.", (sight is not None, {}))
    if sight is None:
        return
    writable = sight.write_problem is None
    yield from metric("database_writable", "Whether the database could be written.", (writable, {}))
    stopped = sight.watch.stopped is not None
    yield from metric("supervisor_up", "Whether a supervisor is alive.", (bool(sight.watch.alive), {}))
    yield from metric("supervisor_stopped", "Whether somebody has stopped it on purpose.", (stopped, {}))
    yield from metric(
        "supervisor_heartbeat_age_seconds", "Since a supervisor was last heard in the database.", (sight.silence_s, {})
    )
    yield from metric("slots", "How many bodies the living supervisors run at once.", (sight.slots, {}))
    yield from metric(
        "live_tasks", "Tasks that wait or run.", *((n, {"status": str(status)}) for status, n in sight.live.items())
    )
    yield from metric(
        "ended_tasks_24h",
        "Tasks that ended within 24 hours.",
        *((n, {"status": str(status)}) for status, n in sight.ended.items()),
    )
    yield from metric(
        "oldest_wait_seconds", "How long a due task has waited whose code is loaded.", (sight.oldest_wait_s, {})
    )
    yield from metric("unresponsive_tasks", "Running tasks without a heartbeat.", (len(sight.unresponsive), {}))
    yield from metric("code_failures", "Task modules that failed to load.", (len(sight.watch.failures), {}))
    yield from metric("wal_bytes", "Size of the database's -wal file.", (sight.wal_bytes, {}))


def _escaped(text: str) -> str:
    return clean(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
