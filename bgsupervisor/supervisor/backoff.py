"""Pauses while the database is locked, full or away, and what the log says about it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bgsupervisor.clock import Clock
    from bgsupervisor.errors import BgSupervisorError
    from bgsupervisor.supervisor.termination import Terminations

__all__ = ["PUT_OFF_S", "Backoff"]

log = logging.getLogger("bgsupervisor")

COMPLAIN_EVERY_S = 60.0
"""Interval between two log lines of the same error, in seconds: a line may have met a full disk."""
PUT_OFF_S = (0.1, 0.2, 0.5, 1.0)
"""Pauses between tries to write while the database is locked, full or away, in seconds; the last one repeats."""


class Backoff:
    """Nothing is lost meanwhile: the next pass decides the same and more.

    Attributes:
        until: No write is tried before this moment, monotonic.
        failures: Writes that failed since the last one that succeeded.
    """

    def __init__(self, terminations: Terminations, clock: Clock) -> None:
        self._terminations = terminations
        self._clock = clock
        self.until = 0.0
        self.failures = 0
        self._last_complaint = ""
        self._complain_at = 0.0

    @property
    def is_long(self) -> bool:
        """Whether every pause has been tried, which takes two seconds."""
        return self.failures > len(PUT_OFF_S)

    def write_failed(self, error: BgSupervisorError, now: float) -> None:
        """Put the next write off; *now* is monotonic."""
        self.until = now + PUT_OFF_S[min(self.failures, len(PUT_OFF_S) - 1)]
        self.failures += 1
        self._bear(error)

    def read_failed(self, error: BgSupervisorError) -> None:
        """Put the next pass off a little."""
        self.until = max(self.until, self._clock.monotonic() + PUT_OFF_S[0])
        self._bear(error)

    def write_succeeded(self) -> None:
        """Pause no more."""
        self.failures = 0
        if self._last_complaint:
            self._last_complaint = ""
            log.info("the database can be written again")

    def complain(self, error: BgSupervisorError) -> None:
        """Log an error of the database, at most once in COMPLAIN_EVERY_S."""
        now = self._clock.monotonic()
        if str(error) != self._last_complaint or now >= self._complain_at:
            self._last_complaint, self._complain_at = str(error), now + COMPLAIN_EVERY_S
            log.error("%s; bodies go on, trying again", error)

    def _bear(self, error: BgSupervisorError) -> None:
        """Carry out what cannot wait for the rows."""
        self.complain(error)
        self._terminations.carry_out_unrecorded()
