"""The columns of `ps`, cell by cell."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bgsupervisor.cli.display import waiting
from bgsupervisor.cli.display.explain import hindrance, waits_to_start
from bgsupervisor.cli.display.snapshot import percent
from bgsupervisor.cli.display.table import DROPPED, Column, terminal_columns
from bgsupervisor.cli.display.text import age, short_duration, size, width
from bgsupervisor.sanitize import clean
from bgsupervisor.sizes import number
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bgsupervisor.cli.display.snapshot import Snapshot
    from bgsupervisor.ledger.records import TaskRecord

__all__ = ["NARROWING", "SMALL_BAR_COLUMNS", "STYLES", "advance", "columns", "ended", "short_names"]

BAR_COLUMNS = 10
SMALL_BAR_COLUMNS = 5
BAR_FROM_COLUMNS = 28
SMALL_BAR_FROM_COLUMNS = 14
"""Width of the cell from which a bar stands before the percentage."""

NARROWING = (
    ("PROGRESS", 36),
    ("REASON", DROPPED),  # the last column has it then
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
"""Order in which columns shrink on a narrow terminal, and to which width."""

STYLES = {
    Status.REQUEST: "yellow",
    Status.START: "green",
    Status.DONE: "dim",
    Status.INTERRUPTED: "red",
}


def columns(records: Sequence[TaskRecord], snapshot: Snapshot) -> list[Column]:
    """Return the columns of `ps`, most of which are shown only where a row fills them."""
    running = [record if record.status is Status.START else None for record in records]
    statuses = [STYLES[record.status] for record in records]
    runtimes = [snapshot.runtime_s(record) for record in records]
    bar_columns = BAR_COLUMNS if terminal_columns() is not None else 0
    return [
        Column("ID", [str(record.id) for record in records], right=True, always=True),
        Column("TASK", short_names(records), always=True),
        Column("KEY", [clean(record.key or "") for record in records]),
        Column("STATUS", [record.status.value for record in records], styles=statuses, always=True),
        Column("REASON", [record.reason or "" for record in records], styles=statuses),
        Column("PID", ["" if one is None or one.pid is None else str(one.pid) for one in running], right=True),
        Column("TIME", ["" if one is None else short_duration(one) for one in runtimes], right=True),
        Column(
            "CPU",
            ["" if one is None or one.cpu_percent is None else f"{one.cpu_percent:.0f}%" for one in running],
            right=True,
        ),
        Column(
            "MEM", ["" if one is None or one.rss_bytes is None else size(one.rss_bytes) for one in running], right=True
        ),
        Column(
            "PROGRESS",
            [_progress(record, snapshot, bar_columns) for record in records],
            styles=[_progress_style(record, snapshot) for record in records],
            refit=lambda size, titles: [
                _progress(record, snapshot, _bar_columns(size), with_reason="REASON" not in titles, size=size)
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


def _progress(
    record: TaskRecord, snapshot: Snapshot, bar_columns: int, *, with_reason: bool = False, size: int | None = None
) -> str:
    """Return the last cell: how far it is, or what it waits for, or how it ended."""
    if record.status is Status.REQUEST:
        return waits_to_start(record, snapshot) or _position(record, snapshot)
    if record.ended:
        return ended(record, snapshot, with_reason=with_reason)
    noted, causes = hindrance(record, snapshot), snapshot.causes.get(record.id)
    if causes:
        before = " ".join(filter(None, (noted, advance(record, 0))))
        left = None if size is None else size - width(before) - bool(before)
        return f"{before} {waiting.fitting(causes, left, now=snapshot.now)}".strip()
    return " ".join(filter(None, (noted, advance(record, bar_columns), clean(record.message or ""))))


def _position(record: TaskRecord, snapshot: Snapshot) -> str:
    position = snapshot.positions.get(record.id)
    return f"position over {len(snapshot.positions)}" if position is None else f"position {position}"


def ended(record: TaskRecord, snapshot: Snapshot, *, with_reason: bool) -> str:
    """Return when and how it ended; with the reason, which matters more, where there is no room for both."""
    begin = "" if record.ended_at is None else age(record.ended_at, now=snapshot.now)
    if with_reason and record.reason is not None:
        begin = str(record.reason)
    detail = clean(record.detail or "") if record.status is Status.INTERRUPTED else ""
    return ": ".join(filter(None, (begin, detail)))


def advance(record: TaskRecord, bar_columns: int) -> str:
    """Return bar and percentage, or the count alone where the total is not known."""
    if record.fraction is None:
        return "" if record.progress_done is None else number(record.progress_done)
    words = f"{percent(record.fraction):3d}%" if bar_columns else f"{percent(record.fraction)}%"
    return f"{_bar(record.fraction, bar_columns)} {words}" if bar_columns else words


def _bar(fraction: float, bar_columns: int) -> str:
    halves = int(fraction * bar_columns * 2)
    done = "━" * (halves // 2) + "╸" * (halves % 2)
    return done + "─" * (bar_columns - width(done))


def _bar_columns(available: int) -> int:
    if available >= BAR_FROM_COLUMNS:
        return BAR_COLUMNS
    return SMALL_BAR_COLUMNS if available >= SMALL_BAR_FROM_COLUMNS else 0


def _progress_style(record: TaskRecord, snapshot: Snapshot) -> str:
    if record.ended:
        return "dim" if record.status is Status.DONE else ""
    if record.status is Status.REQUEST:
        return "red" if snapshot.supervisors.lacks(record.name) else "yellow"
    if snapshot.suspension(record):
        return "yellow"
    return "red" if snapshot.silence(record) else "cyan"
