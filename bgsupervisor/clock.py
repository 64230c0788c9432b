"""The only room that reads a clock: aware UTC for rows, monotonic for durations."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """What the rest of the package asks for the time; tests hand in their own."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC; may jump when the clock is set."""
        ...

    def monotonic(self) -> float:
        """Return CLOCK_MONOTONIC in seconds: never jumps, the same for all processes of one boot."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block for *seconds*, at least 0."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return datetime.now(UTC)  # noqa: TID251 - this is the room

    def monotonic(self) -> float:
        """Return CLOCK_MONOTONIC in seconds."""
        return time.monotonic()  # noqa: TID251 - this is the room

    def sleep(self, seconds: float) -> None:
        """Block for *seconds*."""
        time.sleep(seconds)
