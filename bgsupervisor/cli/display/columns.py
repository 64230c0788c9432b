"""What each cell of `ps` says about a task."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bgsupervisor.cli.display import waiting
from bgsupervisor.cli.display.supervisors import Watch, watch
from bgsupervisor.cli.display.table import DROPPED, Column, terminal_columns
from bgsupervisor.cli.display.text import age, duration, short_duration, size, width
from bgsupervisor.sanitize import clean
from bgsupervisor.sizes import number
from bgsupervisor.statuses import Status
from bgsupervisor.system import processes
from bgsupervisor.system.processes import ProcessIdentity, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from bgsupervisor.cli.display.rows import Cause
    from bgsupervisor.clock import Clock
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["NARROWING", "SMALL_BAR_COLUMNS", "STYLES", "Facts", "advance", "columns", "ended", "percent", "short_names"]

SILENT_BEATS = 3
"""A child that misses so many heartbeats is unresponsive."""
BAR_COLUMNS = 10
SMALL_BAR_COLUMNS = 5
BAR_FROM_COLUMNS = 28
SMALL_BAR_FROM_COLUMNS = 14
"""In less room the percentage stands alone."""

NARROWING = (
    ("PROGRESS", 36),
    ("REASON", DROPPED),  # the last column tells it then
    ("PROGRESS", 24),
    ("TASK", 14),
    ("KEY", 10),
    ("PROGRESS", 18),
    ("TASK", 10),
    ("KEY", 7),
    ("CPU", DROPPED),
    ("MEM", DROPPED),
    ("PID", DROPPED),
    ("PROGRESS", 12),
    ("KEY", DROPPED),
    ("TIME", DROPPED),
    ("TASK", 6),
    ("PROGRESS", DROPPED),
)
"""What gives way on a narrow terminal."""

STYLES = {
    Status.REQUEST: "yellow",
    Status.START: "green",
    Status.DONE: "dim",
    Status.INTERRUPTED: "red",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be known beside the rows to tell about them.

    Attributes:
        now: The moment of the listing.
        monotonic: The same on the monotonic clock, of the boot *boot_id*.
        boot_id: This boot; None where the system does not tell.
        watch: The supervisors.
        silent_s: A child that has not been heard for so long is unresponsive.
        positions: Places of the tasks that may start, by id.
        causes: What the live tasks wait for, by id.
    """

    now: datetime
    monotonic: float
    boot_id: str | None
    watch: Watch
    silent_s: float
    positions: Mapping[int, int]
    causes: Mapping[int, Sequence[Cause]] = field(default_factory=dict)

    @classmethod
    def gather(
        cls,
        service: Service,
        *,
        positions: Mapping[int, int],
        clock: Clock,
        causes: Mapping[int, Sequence[Cause]] | None = None,
    ) -> Facts:
        """Look at clocks and supervisors."""
        now = clock.now()
        boot_id = None
        with contextlib.suppress(OSError):
            boot_id = processes.boot_id()
        return cls(
            now=now,
            monotonic=clock.monotonic(),
            boot_id=boot_id,
            watch=watch(service, now=now),
            silent_s=SILENT_BEATS * service.config.heartbeat_s,
            positions=positions,
            causes=causes or {},
        )

    def is_unresponsive(self, record: TaskRecord) -> bool:
        """Whether a supervisor listens, can write, and has not heard a running child for too long."""
        return bool(self.watch.alive) and self._silence(record) is not None

    def derived(self, record: TaskRecord) -> dict[str, Any]:
        """Return what JSON tells beside the columns."""
        return {
            "waiting_for": waiting.as_json(self.causes.get(record.id, ())),
            "unresponsive": self.is_unresponsive(record),
            "unreadable": list(record.unreadable),
        }

    def silence(self, record: TaskRecord) -> str:
        """Return a word about a running child that was not heard for too long, "" if it was heard."""
        silent_for = self._silence(record)
        if silent_for is None:
            return ""
        words = duration(silent_for.total_seconds())
        if self.watch.alive:
            return f"unresponsive {words}"
        return "its process is gone" if _is_gone(record) else f"last heard {words} ago"

    def _silence(self, record: TaskRecord) -> timedelta | None:
        if record.status is not Status.START or record.heartbeat_at is None or record.slot is None:
            return None  # a body that waits has little to say
        if record.suspended_at is not None:
            return None  # and one that stands still nothing
        limit = timedelta(seconds=self.silent_s)
        written_at = self.watch.written_at(record.host)
        # guard: silence counts only while heartbeats can be written
        if written_at is not None and written_at - record.heartbeat_at <= limit:
            return None  # no child's later heartbeat could be written: the database is locked or away
        silent_for = self.now - record.heartbeat_at
        return silent_for if silent_for > limit else None

    def suspension(self, record: TaskRecord) -> str:
        """Return a word about a running task that is suspended, or is to be; "" about any other."""
        if record.status is not Status.START or (record.suspended_at is None and record.suspend_requested_at is None):
            return ""
        by = f" by {clean(record.suspend_requested_by)}" if record.suspend_requested_by else ""
        suspended_for_s = self.suspended_for_s(record)
        return f"to be suspended{by}" if suspended_for_s is None else f"suspended{by} for {duration(suspended_for_s)}"

    def suspended_for_s(self, record: TaskRecord) -> float | None:
        """Return how long a task has stood still, None if it does not."""
        if record.suspended_at is None:
            return None
        if record.suspended_mono is not None and record.boot_id == self.boot_id:
            return self.monotonic - record.suspended_mono  # right also after the clock was set
        return (self.now - record.suspended_at).total_seconds()

    def runtime_s(self, record: TaskRecord) -> float | None:
        """Return how long the attempt has run or ran, None if it has not begun."""
        if record.started_at is None:
            return None
        if record.started_mono is not None and not record.ended and record.boot_id == self.boot_id:
            return self.monotonic - record.started_mono  # right also after the clock was set
        return ((record.ended_at or self.now) - record.started_at).total_seconds()


def _is_gone(record: TaskRecord) -> bool:
    if None in (record.host, record.boot_id, record.pid_ns, record.pid, record.start_ticks):
        return False
    identity = ProcessIdentity(record.host, record.boot_id, record.pid_ns, record.pid, record.start_ticks)  # type: ignore[arg-type]
    found, handle = processes.look(identity)
    if handle is not None:
        handle.close()
    return found is Verdict.DEAD


def columns(records: Sequence[TaskRecord], facts: Facts) -> list[Column]:
    """Return the columns of `ps`, most of which are shown only where they say something."""
    running = [record.status is Status.START for record in records]
    statuses = [STYLES[record.status] for record in records]
    runtimes = [facts.runtime_s(record) for record in records]
    on_terminal = terminal_columns() is not None
    full = BAR_COLUMNS if on_terminal else 0
    return [
        Column("ID", [str(record.id) for record in records], right=True, always=True),
        Column("TASK", short_names(records), always=True),
        Column("KEY", [clean(record.key or "") for record in records]),
        Column("STATUS", [record.status.value for record in records], styles=statuses, always=True),
        Column("REASON", [record.reason or "" for record in records], styles=statuses),
        Column("PID", _where(running, [record.pid for record in records]), right=True),
        Column("TIME", ["" if one is None else short_duration(one) for one in runtimes], right=True),
        Column("CPU", [_cpu(record) for record in records], right=True),
        Column("MEM", [_memory(record) for record in records], right=True),
        Column(
            "PROGRESS",
            [_progress(record, facts, full) for record in records],
            styles=[_progress_style(record, facts) for record in records],
            refit=lambda size, titles: [
                _progress(record, facts, _bar_columns(size), with_reason="REASON" not in titles, size=size)
                for record in records
            ],
        ),
    ]


def short_names(records: Sequence[TaskRecord]) -> list[str]:
    """Return the part after the colon where it names only one task among these."""
    counts = Counter(name.rpartition(":")[2] for name in {record.name for record in records})
    names = []
    for record in records:
        short = record.name.rpartition(":")[2]
        names.append(clean(short if short and counts[short] == 1 else record.name))
    return names


def _where(wanted: Sequence[bool], values: Sequence[object]) -> list[str]:
    return [
        str(value) if is_wanted and value is not None else "" for is_wanted, value in zip(wanted, values, strict=True)
    ]


def _cpu(record: TaskRecord) -> str:
    if record.status is not Status.START or record.cpu_percent is None:
        return ""
    return f"{record.cpu_percent:.0f}%"


def _memory(record: TaskRecord) -> str:
    if record.status is not Status.START or record.rss_bytes is None:
        return ""
    return size(record.rss_bytes)


def _progress(
    record: TaskRecord, facts: Facts, bar_columns: int, *, with_reason: bool = False, size: int | None = None
) -> str:
    """Return the last cell: how far it is, or what it waits for, or how it ended."""
    if record.status is Status.REQUEST:
        return _not_started(record, facts)
    if record.ended:
        return ended(record, facts, with_reason=with_reason)
    notes = [facts.silence(record)]
    if record.ending is None and record.cancel_requested_at is None:
        notes.append(facts.suspension(record))
    if record.ending is not None:
        notes.append(f"ending: {record.ending}")
    elif record.cancel_requested_at is not None:
        notes.append("cancel requested")
    noted = ", ".join(note for note in notes if note)
    causes = facts.causes.get(record.id)
    if causes:
        before = " ".join(part for part in (noted, advance(record, 0)) if part)
        left = None if size is None else size - width(before) - bool(before)
        return f"{before} {waiting.fitting(causes, left, now=facts.now)}".strip()
    return " ".join(part for part in (noted, advance(record, bar_columns), clean(record.message or "")) if part)


def ended(record: TaskRecord, facts: Facts, *, with_reason: bool) -> str:
    """Return when and how it ended; the reason is worth more than the time where there is no room for both."""
    told = "" if record.ended_at is None else age(record.ended_at, now=facts.now)
    if with_reason and record.reason is not None:
        told = str(record.reason)
    words = clean(record.detail or "") if record.status is Status.INTERRUPTED else ""
    return ": ".join(part for part in (told, words) if part)


def _not_started(record: TaskRecord, facts: Facts) -> str:
    if facts.watch.lacks(record.name):
        return "code missing"
    words = [f"due {age(record.run_at, now=facts.now)}"] if record.run_at > facts.now else []
    words += [one.what() for one in waiting.gathered(facts.causes.get(record.id, ()))]
    if words:
        return ", ".join(words)
    position = facts.positions.get(record.id)
    return f"position over {len(facts.positions)}" if position is None else f"position {position}"


def advance(record: TaskRecord, bar_columns: int) -> str:
    """Return bar and percentage, or the count alone where the total is not known."""
    if record.fraction is None:
        return "" if record.progress_done is None else number(record.progress_done)
    words = f"{percent(record.fraction):3d}%" if bar_columns else f"{percent(record.fraction)}%"
    return f"{_bar(record.fraction, bar_columns)} {words}" if bar_columns else words


def percent(fraction: float) -> int:
    """Return whole percents; 100 only for what is complete."""
    return int(fraction * 100)


def _bar(fraction: float, bar_columns: int) -> str:
    halves = int(fraction * bar_columns * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return done + "─" * (bar_columns - width(done))


def _bar_columns(available: int) -> int:
    if available >= BAR_FROM_COLUMNS:
        return BAR_COLUMNS
    return SMALL_BAR_COLUMNS if available >= SMALL_BAR_FROM_COLUMNS else 0


def _progress_style(record: TaskRecord, facts: Facts) -> str:
    if record.status is Status.DONE:
        return "dim"
    if record.status is Status.INTERRUPTED:
        return ""
    if record.status is Status.REQUEST:
        return "red" if facts.watch.lacks(record.name) else "yellow"
    if facts.suspension(record):
        return "yellow"
    return "red" if facts.silence(record) else "cyan"
