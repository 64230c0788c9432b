"""The clock of Services under test."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from bgsupervisor.clock import SystemClock

if TYPE_CHECKING:
    from datetime import datetime


__all__ = ["FakeClock"]


class FakeClock:
    """The time of Services under test: the machine's, plus all that the test has advanced it by.

    Only bgsupervisor uses it. It advances by itself, so that a `run_at` of now is due now.
    """

    def __init__(self) -> None:
        self._system = SystemClock()
        self._ahead_s = 0.0

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return self._system.now() + timedelta(seconds=self._ahead_s)

    def monotonic(self) -> float:
        """Return seconds that only grow."""
        return self._system.monotonic() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let *seconds*, at least 0, pass at once; tasks that become due wait for `run_pending`.

        Raises:
            ValueError: Time goes forward only.
        """
        if not seconds >= 0:
            raise ValueError(f"the clock cannot be advanced by {seconds!r} seconds; give 0 or more")
        self._ahead_s += seconds

    def sleep(self, seconds: float) -> None:
        """Advance by *seconds* instead of blocking: `Service.wait` gives up at once when nothing is to come."""
        self.advance(seconds)
