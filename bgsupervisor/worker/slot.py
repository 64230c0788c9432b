"""The slot of a body that waits: given to other tasks meanwhile, and taken again before the body continues."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

from bgsupervisor import failpoints
from bgsupervisor.ipc import messages

if TYPE_CHECKING:
    from typing import Any

    from bgsupervisor.ledger.slots import Waiter
    from bgsupervisor.worker.attempt import RunningAttempt

__all__ = ["Slot"]

POLL_S = 1.0
"""Interval of checks while the supervisor should grant a slot, in seconds."""
ALONE_POLL_S = 0.2
"""Interval of tries to take a free slot without a supervisor, in seconds."""
GRANT_S = (1.0, 1.0, 2.0, 5.0)
"""Limits of the waits for a grant, in seconds; after each the body looks for a free slot itself. The last one repeats.

A supervisor that does not answer may be stopped.
"""


class Slot:
    """The slot of one attempt.

    An async body may wait for several things at once, each in a thread of its own: it has no slot from the first of
    these waits to the end of the last.

    Attributes:
        turn: Lock of the rows of waits and of the slot; a thread acquires it before it begins or ends a wait.
    """

    def __init__(self, attempt: RunningAttempt) -> None:
        self._attempt = attempt
        self._connection = attempt.connection
        self.turn = threading.Lock()
        self._is_taken = True
        self._pending = 0

    def note_wait(self, *, slot_given: bool) -> None:
        """Note that a wait has begun, and report it; the caller has the turn."""
        self._pending += 1
        if slot_given:
            failpoints.at("child.slot_given")
            self._is_taken = False
            self._connection.set_waiting(True)
        self._connection.send_from_body(messages.Waiting(self._attempt.id, self._attempt.number, not slot_given))

    def give_up(self, waiter: Waiter, lock: str | None, *, want_slot: bool) -> None:
        """End a wait in vain.

        Its rows go first: a body that does not wait must not seem to, nor stand in a queue.
        """
        attempt, keys = self._attempt, list[str]()

        def leave() -> int | None:
            slots = attempt.config.slots if self._pending == 1 else None
            slot, notified = attempt.waits.give_up(waiter, lock, slots=slots)
            keys.extend(notified)
            return slot

        with self.turn:
            self._note_slot(attempt.patiently(leave, though_cancelled=True))
            self._pending -= not want_slot
        self._connection.notify(keys)
        if want_slot:
            self.regain(waiter, None)

    def regain(self, waiter: Waiter, number: int | None) -> None:
        """End a wait, with a slot again unless the body still waits for something else.

        The slot may have come with the wait's result (*number*). Otherwise the supervisor grants the next one; without
        a supervisor the body takes a free one.
        """
        attempt, limits_s = self._attempt, itertools.chain(GRANT_S, itertools.repeat(GRANT_S[-1]))
        with self.turn:
            self._pending -= 1
            if self._is_taken or self._pending:
                attempt.patiently(lambda: attempt.waits.forget(waiter), though_cancelled=True)
                return
            if number is None:
                number = attempt.patiently(lambda: attempt.waits.slot(attempt.id, attempt.number))
            self._note_slot(number)
            silent = self._connection.mailbox.disconnected.is_set()
            while not self._is_taken:
                if (not silent or self._resume(waiter) is None) and self._is_granted(waiter, next(limits_s)):
                    self._is_taken = True
                    self._connection.set_waiting(False)
                silent = True

    def _note_slot(self, number: int | None) -> None:
        """Continue in a slot that was taken without the supervisor, and report it."""
        if number is not None and not self._is_taken:
            self._is_taken = True
            self._connection.set_waiting(False)
            self._connection.send_from_body(messages.Resumed(self._attempt.id, self._attempt.number, number))

    def _resume(self, waiter: Waiter) -> int | None:
        attempt = self._attempt
        number = attempt.patiently(lambda: attempt.waits.resume(waiter, slots=attempt.config.slots))
        self._note_slot(number)
        return number

    def _is_granted(self, waiter: Waiter, limit_s: float) -> bool:
        """Ask the supervisor for a slot and wait for it; False if the supervisor is away, or silent for *limit_s*."""
        mailbox = self._connection.mailbox
        mailbox.slot_granted.clear()
        mailbox.wanted = messages.WantSlot(self._attempt.id, self._attempt.number, waiter.number)
        self._connection.send_from_body(mailbox.wanted)
        try:
            with self._connection.mailbox.wakes.waking() as wake:
                return self._wait_for_grant(wake, self._attempt.clock.monotonic() + limit_s)
        finally:
            mailbox.wanted = None

    def _wait_for_grant(self, wake: Any, deadline: float) -> bool:  # noqa: ANN401 - see `Wakes`
        while (left_s := deadline - self._attempt.clock.monotonic()) > 0:
            self._connection.mailbox.wakes.quiet(wake)
            self._attempt.check_cancel()
            if self._connection.mailbox.slot_granted.is_set():
                return True
            away = self._connection.mailbox.disconnected.is_set()
            self._connection.mailbox.wakes.rest(wake, min(left_s, ALONE_POLL_S if away else POLL_S))
            if away:
                return False
        return False
