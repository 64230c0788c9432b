"""Tasks and supervisors as they were when their rows were read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable  # noqa: TC003 - a module-level annotation
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from bgsupervisor.database.values import read_pid, read_real, read_reason, read_status, read_text, read_time, read_whole
from bgsupervisor.statuses import Reason, Status

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SupervisorRecord", "TaskRecord"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TaskRecord:
    """A task as it was when it was read: every column of its row. Times are aware, in UTC."""

    id: int
    name: str
    data: str
    queue: str
    priority: int
    status: Status
    reason: Reason | None
    detail: str | None
    key: str | None
    unique_key: str | None
    serial: str | None
    run_at: datetime
    expires_at: datetime | None
    requested_at: datetime
    started_at: datetime | None
    started_mono: float | None
    ended_at: datetime | None
    heartbeat_at: datetime | None
    attempt: int
    tries: int
    max_attempts: int
    ending: Reason | None
    host: str | None
    boot_id: str | None
    pid_ns: int | None
    pid: int | None
    start_ticks: int | None
    slot: int | None
    progress_done: float | None
    progress_total: float | None
    message: str | None
    result: str | None
    error: str | None
    exit_code: int | None
    signal: int | None
    cpu_s: float | None
    cpu_percent: float | None
    rss_bytes: int | None
    peak_rss_bytes: int | None
    cancel_requested_at: datetime | None
    cancel_requested_by: str | None
    suspend_requested_at: datetime | None
    suspend_requested_by: str | None
    suspended_at: datetime | None
    suspended_mono: float | None
    suspended_s: float | None
    stack: str | None
    parent_id: int | None
    position: int | None = None
    """Place in the queue, 1 is next; known for a waiting task that `Service.get` returned."""
    no_supervisor_since: datetime | None = None
    """When a supervisor was last seen, if that is too long ago; known for a task that `Service.get` returned."""
    unreadable: tuple[str, ...] = ()
    """The columns that hold what they cannot mean, as rows written by hand may; None or a default stands for each."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TaskRecord:
        """Make a record of a row as the driver gives it (`Store.raw`); never fails, whatever it holds."""
        values, unreadable = dict[str, Any](), []
        for column, held in row.items():
            value = None if held is None else _READERS[column](held)
            if value is None and (held is not None or column in _INSTEAD):
                unreadable.append(column)
                value = _INSTEAD.get(column)
            values[column] = value
        return cls(**values, unreadable=tuple(unreadable))

    def __repr__(self) -> str:
        """Name the task, without data, result and texts of errors: they may hold what no log should."""
        key = "" if self.key is None else f", key={self.key!r}"
        reason = "" if self.reason is None else f" / {self.reason}"
        return (
            f"TaskRecord(id={self.id}, name={self.name!r}{key}, status={self.status}{reason}, attempt={self.attempt})"
        )

    @property
    def ended(self) -> bool:
        """Whether it is DONE or INTERRUPTED."""
        return self.status.ended

    @property
    def fraction(self) -> float | None:
        """How much is done, 0.0 to 1.0; None when its body has not said."""
        if self.status is Status.DONE:
            return 1.0
        if self.progress_done is None or not self.progress_total:
            return None
        return min(max(self.progress_done / self.progress_total, 0.0), 1.0)

    def public(self) -> dict[str, Any]:
        """Return what a browser may see, ready for JSON: no data, no result, no error text, no machine facts."""
        since = self.no_supervisor_since
        return {
            "id": self.id,
            "status": str(self.status),
            "reason": None if self.reason is None else str(self.reason),
            "ended": self.ended,
            "fraction": self.fraction,
            "message": None if self.status is Status.DONE else self.message,
            "requested_at": self.requested_at.isoformat(),
            "started_at": None if self.started_at is None else self.started_at.isoformat(),
            "ended_at": None if self.ended_at is None else self.ended_at.isoformat(),
            "cancel_requested": self.cancel_requested_at is not None,
            "suspended": self.suspended_at is not None,
            "position": self.position,
            "no_supervisor_since": None if since is None else since.isoformat(),
        }


_OF_REQUEST = frozenset({
    "id", "name", "data", "queue", "priority", "status", "key", "unique_key", "serial", "run_at", "expires_at",
    "requested_at", "attempt", "tries", "max_attempts", "parent_id",
})  # fmt: skip
"""The columns that a task keeps from one attempt to the next."""
COLUMNS = tuple(field.name for field in dataclasses.fields(TaskRecord) if field.default is dataclasses.MISSING)
ATTEMPT_COLUMNS = tuple(column for column in COLUMNS if column not in _OF_REQUEST)
"""The columns that an attempt leaves in its row; each claim and each retry clears them."""
_BY_TYPE: dict[str, Callable[[object], object]] = {
    "str": read_text,
    "int": read_whole,
    "float": read_real,
    "datetime": read_time,
    "Status": read_status,
    "Reason": read_reason,
}
_READERS = {
    field.name: _BY_TYPE[str(field.type).removesuffix(" | None")]
    for field in dataclasses.fields(TaskRecord)
    if field.name in COLUMNS
} | {"pid": read_pid}
_INSTEAD: dict[str, Any] = {
    "id": 0,
    "name": "?",
    "data": "",
    "queue": "",
    "priority": 0,
    "status": Status.INTERRUPTED,
    "run_at": datetime(1970, 1, 1, tzinfo=UTC),
    "requested_at": datetime(1970, 1, 1, tzinfo=UTC),
    "attempt": 0,
    "tries": 0,
    "max_attempts": 1,
}
"""What stands for each column that is never NULL, where it cannot be read."""


class _Told(msgspec.Struct):
    """What is used of a task's options in a catalogue."""

    secret: list[str] = []


class _Failed(msgspec.Struct):
    """What is used of an error in `code_error`."""

    module: str
    error: str
    kind: str = "module"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorRecord:
    """The supervisor that was last seen on a host; `catalogue` and `code_error` are JSON text.

    `left_at` is set by one that leaves in order; after a kill only the silence tells.
    """

    host: str
    boot_id: str
    pid_ns: int
    pid: int
    start_ticks: int
    started_at: datetime
    heartbeat_at: datetime
    slots: int
    version: str
    catalogue: str
    code_error: str | None
    left_at: datetime | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SupervisorRecord | None:
        """Make a record of a row as Peewee's `dicts()` gives it; None of one that names no process and no times.

        A catalogue, or errors, that are no JSON of ours are left out.
        """
        values = {**row, "pid": read_pid(row["pid"])}
        if any(
            values[one.name] is None for one in dataclasses.fields(cls) if one.name not in ("code_error", "left_at")
        ):
            return None
        if not _is_json(values["catalogue"], dict[str, _Told]):
            values["catalogue"] = "{}"
        if values["code_error"] is not None and not _is_json(values["code_error"], list[_Failed]):
            values["code_error"] = None
        return cls(**values)


def _is_json(text: str, kind: Any) -> bool:  # noqa: ANN401 - a type
    try:
        msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False
    return True
