"""What a row holds, read so that nothing in it can fail: SQLite keeps any value in any column."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from bgsupervisor.statuses import Reason, Status

__all__ = ["read_pid", "read_real", "read_reason", "read_status", "read_text", "read_time", "read_whole", "readable"]

_FIRST, _LAST = datetime(2, 1, 1, tzinfo=UTC), datetime(9998, 12, 31, tzinfo=UTC)
_REASONS = frozenset(str(reason) for reason in Reason)
_STATUSES = frozenset(str(status) for status in Status)
WHOLE_MAX = 2**63 - 1
"""Limit of a whole number in a row."""
PID_MAX = 2**31 - 1
"""Limit of a PID: pid_t is an int."""


def read_text(value: object) -> str:
    """Return the text that a row holds, whatever bytes it is of; a number is its digits."""
    if isinstance(value, str):
        return value
    return readable(bytes(value)) if isinstance(value, bytes | bytearray | memoryview) else str(value)


def read_whole(value: object) -> int | None:
    """Return the whole number that a row holds; None if it holds something else, as any column of SQLite may."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and -WHOLE_MAX - 1 <= value <= WHOLE_MAX else None


def read_pid(value: object) -> int | None:
    """Return the PID that a row holds; None if it can be none."""
    pid = read_whole(value)
    return pid if pid is not None and 0 < pid <= PID_MAX else None


def read_real(value: object) -> float | None:
    """Return the number that a row holds; None if it holds something else, NaN or infinity."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_time(value: object) -> datetime | None:
    """Return the moment that a row holds, in UTC; None if it holds none.

    Text without a zone, as hand-written SQL stores it, is UTC. The first and the last year that Python knows become
    the ones beside them, so that every zone can show it.
    """
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
        if not isinstance(moment, datetime):
            return None
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return min(max(moment, _FIRST), _LAST)


def read_status(value: object) -> Status | None:
    """Return the status that a row holds; None if it is one of a later version, or was written by hand."""
    return Status(value) if value in _STATUSES else None


def read_reason(value: object) -> Reason | None:
    """Return the reason that a row holds; None as `read_status`."""
    return Reason(value) if value in _REASONS else None


def readable(text: bytes) -> str:
    """Read a text whatever bytes are stored in it: one bad row must not keep the others from being read."""
    return text.decode("utf-8", "replace")
