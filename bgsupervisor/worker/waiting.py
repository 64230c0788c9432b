"""One wait of a body: begun in rows, polled after each wake-up, ended with a slot again."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from typing import TYPE_CHECKING, Any, Self, TypeVar

from bgsupervisor.errors import Cancelled, WaitTimeout
from bgsupervisor.ledger.waits import EVERYBODY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from bgsupervisor.ledger.slots import Waiter, Waiting
    from bgsupervisor.worker.attempt import RunningAttempt
    from bgsupervisor.worker.slot import Slot
    from bgsupervisor.worker.wait_client import WakeUps

__all__ = ["ThreadWakeUps", "Wait", "timed_out"]

T = TypeVar("T")

POLL_S = 1.0
"""Interval of polls without a wait manager, or without a supervisor that notifies it, in seconds."""
POLL_SHARE = 20
"""Least pause between polls, in durations of a poll: hundreds may poll, and each has to connect to a server."""
FIRST_POLLS_S = (0.1, 0.2, 0.4)
"""Pauses before the first polls without a wait manager, in seconds: the first wait makes the supervisor start one."""
LONG_S = 30.0
"""Interval of polls where wake-ups arrive, in seconds: a net below them."""


class _GivenUp(BaseException):
    """The event loop has cancelled the coroutine that waits; only the thread that waits for it sees this."""


class ThreadWakeUps:
    """The wake-ups of the threads that wait: those of the main thread stay connected from one wait to the next."""

    def __init__(self, folder: Path, make: Callable[[Path], WakeUps]) -> None:
        self._folder = folder
        self._make = make
        self._kept: WakeUps | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[WakeUps]:
        """Yield wake-ups for one wait of this thread."""
        is_main = threading.current_thread() is threading.main_thread()
        kept = self._kept if is_main else None
        wake_ups = kept if kept is not None and kept.pid == os.getpid() else self._make(self._folder)
        try:
            yield wake_ups
        finally:
            if is_main:
                self._kept = wake_ups
            else:
                wake_ups.drop()

    def close(self) -> None:
        """Close the connection that was kept."""
        if self._kept is not None:
            self._kept.drop()


class Wait:
    """One wait: `begin` writes its rows, `poll` returns what it waits for, and leaving the block ends it.

    A block that raises gives the wait up; only a cancelled body continues without a slot, towards its end.

    Attributes:
        slot_number: The slot that came with the result, for `end`; None without one.
    """

    def __init__(
        self,
        attempt: RunningAttempt,
        slot: Slot,
        wake_ups: ThreadWakeUps,
        waiter: Waiter,
        *,
        lock: str | None = None,
        is_given_up: Callable[[], bool],
    ) -> None:
        self._attempt = attempt
        self._slot = slot
        self._wake_ups = wake_ups
        self._waiter = waiter
        self._lock = lock
        self._is_given_up = is_given_up
        self.slot_number: int | None = None

    def __enter__(self) -> Self:
        """Return the wait, which has begun."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the wait, or give it up."""
        if error is None:
            self._slot.regain(self._waiter, self.slot_number)
        else:
            self._slot.give_up(self._waiter, self._lock, want_slot=not isinstance(error, Cancelled))

    def begin(self, waiting: Sequence[Waiting]) -> Wait:
        """Write the rows of the wait, and give the slot to another task."""
        with self._slot.turn:
            self._slot.note_wait(slot_given=self._begin(waiting))
        return self

    def begin_again(self, waiting: Sequence[Waiting]) -> None:
        """Write the rows once more if they are gone."""
        attempt = self._attempt
        if not attempt.patiently(lambda: attempt.waits.is_waiting(self._waiter)):
            with self._slot.turn:
                self._begin(waiting)

    def poll(self, find: Callable[[], T | None], keys: Sequence[str], timeout_s: float | None, what: str) -> T:
        """Return what *find* finds; call it after each wake-up of *keys*, and now and then without one.

        Raises:
            WaitTimeout: It found nothing within *timeout_s*.
        """
        clock, keys = self._attempt.clock, [*dict.fromkeys(keys), EVERYBODY]
        with self._wake_ups.opened() as wake_ups, self._attempt.connection.mailbox.wakes.waking() as wake:
            deadline = None if timeout_s is None else clock.monotonic() + timeout_s
            seen: list[int] | None = None
            rests_s = itertools.chain(FIRST_POLLS_S, itertools.repeat(POLL_S))
            while True:
                self._check_goes_on(wake)
                if seen is None:
                    seen = wake_ups.seen(keys)
                began = clock.monotonic()
                found = find()
                if found is not None:
                    return found
                least_s = min(POLL_SHARE * (clock.monotonic() - began), LONG_S)
                left_s = LONG_S if deadline is None else deadline - clock.monotonic()
                if left_s <= 0:
                    raise timed_out(what, timeout_s)
                if seen is None:
                    self._attempt.connection.mailbox.wakes.rest(wake, min(left_s, max(next(rests_s), least_s)))
                else:
                    is_alone = self._attempt.connection.mailbox.disconnected.is_set()
                    seen = wake_ups.wait_beyond(
                        keys, seen, min(left_s, max(POLL_S, least_s) if is_alone else LONG_S), wake
                    )

    def _begin(self, waiting: Sequence[Waiting]) -> bool:
        attempt, config = self._attempt, self._attempt.config
        return attempt.patiently(
            lambda: attempt.waits.begin(self._waiter, waiting, slots=config.slots, max_waiting=config.max_waiting)
        )

    def _check_goes_on(self, wake: Any) -> None:  # noqa: ANN401 - see `Wakes`
        self._attempt.connection.mailbox.wakes.quiet(wake)
        self._attempt.check_cancel()
        if self._is_given_up():
            raise _GivenUp


def timed_out(what: str, timeout_s: float | None) -> WaitTimeout:
    """Return the error of a wait for *what* that lasted its whole *timeout_s*."""
    return WaitTimeout(f"timed out after {timeout_s:g} s waiting for {what}")
