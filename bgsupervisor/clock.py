"""The only room that reads a clock: aware UTC for rows, monotonic for durations."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["AttendedClock", "Clock", "Rate", "ServerClock", "SystemClock", "read_time_zone", "repeat_last"]

ASK_EVERY_S = 60.0
"""Age at which a server's clock is read again, in seconds: quartz drifts by milliseconds meanwhile."""
PROMPT_S = 0.002
ASKS = 3
"""Limit of the tries where an answer takes longer than PROMPT_S; the quickest one counts."""
STEP_S = 0.5
"""If this machine's own clock was set by more than this, the server's is asked anew: it may run here."""


class Clock(Protocol):
    """The source of time for the rest of the package; tests pass their own."""

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


class AttendedClock:
    """The time that a loop has attended to; it judges others by no other.

    A loop that was stopped (SIGSTOP, a frozen container, a suspended machine) received nothing meanwhile. The
    others may have been stopped too, and resume a moment later. So `monotonic` leaves that time out.

    Args:
        machine: What the clock is made of.
        longest_s: The longest gap between two calls of `attend` that is no sign of a stop, in seconds.
    """

    def __init__(self, machine: Clock, *, longest_s: float) -> None:
        self._machine = machine
        self._longest_s = longest_s
        self._left_out_s = 0.0
        self._attended_at = machine.monotonic()

    def attend(self, *, counted_s: float) -> bool:
        """Note that the loop turns; return whether it may have been stopped since the last call.

        Args:
            counted_s: What counts of a gap that is too long, in seconds: 0 where nothing but a stop can have made it,
                more where a slow call may have, so that time passes for a loop of slow passes.
        """
        now = self._machine.monotonic()
        gap_s, self._attended_at = now - self._attended_at, now
        if gap_s <= self._longest_s:
            return False
        self._left_out_s += gap_s - counted_s
        return True

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return self._machine.now()

    def monotonic(self) -> float:
        """Return attended seconds: for this loop's own deadlines only."""
        return self.attended(self.machine_monotonic())

    def machine_monotonic(self) -> float:
        """Return CLOCK_MONOTONIC in seconds: for rows and other processes."""
        return self._machine.monotonic()

    def attended(self, machine_monotonic: float) -> float:
        """Convert a moment of CLOCK_MONOTONIC to attended seconds, by what was left out so far."""
        return machine_monotonic - self._left_out_s

    def sleep(self, seconds: float) -> None:
        """Block for *seconds*."""
        self._machine.sleep(seconds)


def read_time_zone() -> None:
    """Take the local time zone from the environment again."""
    time.tzset()


class _Told(NamedTuple):
    """A reading of a server's clock, its monotonic moment, and how far the machine's own clock was ahead then."""

    moment: datetime
    at: float
    ahead_s: float


class ServerClock(SystemClock):
    """A database server's clock, by its last reading and the age of that; durations are the machine's own.

    The machine's own wall clock may be wrong, and may be set, without any effect.

    Args:
        have_asked: Called once, if `now` is wanted before the server was asked; it should lead to a call of `ask`.
    """

    def __init__(self, have_asked: Callable[[], None]) -> None:
        self._have_asked = have_asked
        self._reading: _Told | None = None

    def now(self) -> datetime:
        """Return the server's time, aware, in UTC; the first time it may block, and raise what connecting raises."""
        if self._reading is None:
            self._have_asked()
        reading = self._reading
        return super().now() if reading is None else reading.moment + timedelta(seconds=_since_boot_s() - reading.at)

    def is_old(self) -> bool:
        """Return whether the server should be asked again."""
        reading = self._reading
        if reading is None:
            return True
        since_boot_s = _since_boot_s()
        set_by_s = time.time() - since_boot_s - reading.ahead_s  # noqa: TID251 - this is the room
        return since_boot_s - reading.at > ASK_EVERY_S or abs(set_by_s) > STEP_S

    def ask(self, server: Callable[[], datetime]) -> None:
        """Take over the present time of *server*; half of the time that it took to answer is how wrong that can be."""
        best_s = float("inf")
        for _ in range(ASKS):
            before = _since_boot_s()
            moment = server()
            took_s = _since_boot_s() - before
            if took_s < best_s:
                best_s, at = took_s, before + took_s / 2
                self._reading = _Told(moment, at, time.time() - before)  # noqa: TID251 - this is the room
            if took_s < PROMPT_S:
                return


class Rate:
    """A limit of a rate: *at_once* times, then *per_s* times a second; what was saved up counts.

    Args:
        at_once: How often it may happen without a pause.
        per_s: How often from then on.
        now: Monotonic.
    """

    __slots__ = ("_at", "_at_once", "_left", "_per_s")

    def __init__(self, at_once: int, per_s: float, now: float) -> None:
        self._at_once, self._per_s, self._left, self._at = at_once, per_s, float(at_once), now

    def allows(self, now: float) -> bool:
        """Return whether it may happen now, and count it if so."""
        self._left = min(self._at_once, self._left + self._per_s * (now - self._at))
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def repeat_last(pauses_s: Sequence[float]) -> Iterator[float]:
    """Yield pauses between tries, and the last one for ever."""
    yield from pauses_s
    while True:
        yield pauses_s[-1]


def _since_boot_s() -> float:
    """Return seconds that never jump, and that count while the machine sleeps."""
    clock: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)
