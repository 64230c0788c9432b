"""Parts, waits, locks and barriers, as a body calls them: rows hold the truth, wake-ups spare the polling.

Runs in the child, in the thread of the body. While a body waits, another task has its slot; the body takes one again
before it continues.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from bgsupervisor import failpoints, payload
from bgsupervisor.errors import BarrierBroken, Cancelled, PartNotReached, UnknownTask, WaitTimeout
from bgsupervisor.ledger.attempts import ID_MAX
from bgsupervisor.ledger.barriers import PASSED, barrier_key
from bgsupervisor.ledger.locks import Held, Queued, turn_key
from bgsupervisor.ledger.slots import Waiter, Waiting
from bgsupervisor.ledger.waitgraph import parent_scope
from bgsupervisor.ledger.waits import task_key
from bgsupervisor.worker.attempt import RunningAttempt
from bgsupervisor.worker.slot import Slot
from bgsupervisor.worker.wait_client import WakeUps
from bgsupervisor.worker.waiting import ThreadWakeUps, Wait, timed_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import Run
    from bgsupervisor.ledger.parts import Found
    from bgsupervisor.ledger.requests import Ledger
    from bgsupervisor.worker.mailbox import BodyConnection

__all__ = ["Coordination"]

NAME_CHARS = 200
AWAITED_MAX = 10_000
PARTIES_MAX = 1_000_000


class Coordination:
    """Calls by which one attempt waits for others and wakes them. Closed when the attempt has ended."""

    def __init__(
        self,
        assignment: Run,
        connection: BodyConnection,
        open_ledger: Callable[[], Ledger],
        config: Config,
        clock: Clock,
        *,
        is_given_up: Callable[[], bool] = lambda: False,
        waits_alone: Callable[[], bool] = lambda: True,
        make_wake_ups: Callable[[Path], WakeUps] = WakeUps,
    ) -> None:
        self._attempt = RunningAttempt(assignment, connection, open_ledger, config, clock)
        self._slot = Slot(self._attempt)
        self._wake_ups = ThreadWakeUps(config.state_dir, make_wake_ups)
        self._is_given_up = is_given_up
        self._waits_alone = waits_alone
        self._numbers = itertools.count()

    def reach(self, part: str, value: object) -> None:
        """Record a part, then notify its waiters."""
        attempt, config = self._attempt, self._attempt.config
        text = payload.encode_result(value, limit_bytes=config.data_max_bytes)
        attempt.check_cancel()
        name = _checked(part, "part")
        if attempt.patiently(lambda: attempt.waits.reach(attempt.id, attempt.number, name, text, slots=config.slots)):
            attempt.connection.notify([task_key(attempt.id)])

    def wait_for(
        self, ids: Sequence[int], part: str | None, *, timeout_s: float | None, return_interrupted: bool
    ) -> list[Any]:
        """Wait for a part, or the end, of all of *ids*; return the values in order."""
        attempt, timeout_s = self._attempt, _checked_timeout(timeout_s)
        _check_awaited(ids, part)

        def find() -> list[Any] | None:
            found = attempt.patiently(lambda: attempt.waits.find(ids, part))
            return _values(ids, found, part, return_interrupted=return_interrupted)

        ready = find()
        if ready is not None:
            attempt.check_cancel()
            return ready
        what = f'part "{part}"' if part is not None else "the end"
        sentence = f"{what} of task {', '.join(map(str, ids))}"
        if timeout_s == 0:
            raise timed_out(sentence, timeout_s)
        waiting = [Waiting("end" if part is None else "part", target_id=id, target=part) for id in dict.fromkeys(ids)]

        def find_again() -> list[Any] | None:
            values = find()
            if values is None:
                wait.begin_again(waiting)  # a slot came with a part, and a retry has cleared the part before we saw it
            return values

        with self._new_wait().begin(waiting) as wait:
            return wait.poll(find_again, [task_key(id) for id in ids], timeout_s, sentence)

    def acquire(self, name: str, permits: int, timeout_s: float | None) -> Held:
        """Take a permit of a lock; wait for it if all are taken."""
        attempt, config, timeout_s = self._attempt, self._attempt.config, _checked_timeout(timeout_s)
        _checked(name, "lock")
        attempt.check_cancel()
        waiter, sentence = self._new_waiter(), f'lock "{name}"'
        limits = {"slots": config.slots, "max_waiting": config.max_waiting}
        with self._slot.turn:
            found = attempt.patiently(
                lambda: attempt.waits.acquire(waiter, name, permits, **limits, wait=timeout_s != 0)
            )
            if isinstance(found, Queued):
                self._slot.note_wait(slot_given=found.slot_given)
        if isinstance(found, Held):
            failpoints.at("child.locked")
            return found
        if found is None:
            raise timed_out(sentence, 0)
        return self._acquire_queued(waiter, name, timeout_s, sentence)

    def _acquire_queued(self, waiter: Waiter, name: str, timeout_s: float | None, sentence: str) -> Held:
        attempt, held = self._attempt, None

        def find() -> Held | None:
            return attempt.patiently(lambda: attempt.waits.held(attempt.id, attempt.number, name))

        try:
            with self._new_wait(waiter, lock=name) as wait:
                held = wait.poll(find, [turn_key(attempt.id)], timeout_s, sentence)
                wait.slot_number = held.slot
        except BaseException:
            if held is not None:  # it has the permit, and no slot
                self.release(name)
            raise
        return held

    def release(self, name: str) -> None:
        """Give a permit to the task that has waited longest, then notify it."""
        attempt = self._attempt
        keys = attempt.patiently(
            lambda: attempt.waits.release(attempt.id, attempt.number, name, slots=attempt.config.slots),
            though_cancelled=True,
        )
        failpoints.at("child.unlocked")
        attempt.connection.notify(keys)

    def barrier(self, name: str, parties: int, *, scope: str | None, timeout_s: float | None) -> None:
        """Wait until *parties* have arrived."""
        attempt, timeout_s = self._attempt, _checked_timeout(timeout_s)
        _checked(name, "barrier")
        if isinstance(parties, bool) or not isinstance(parties, int) or not 0 < parties <= PARTIES_MAX:
            raise ValueError(f"parties is {parties!r}; it must be a whole number from 1 to {PARTIES_MAX}")
        if scope is None and attempt.parent_id is None:
            raise ValueError(f'the barrier "{name}" has no scope: no task requested this one; give scope="..."')
        area = f"scope {_checked(scope, 'scope')}" if scope is not None else parent_scope(attempt.parent_id or 0)
        attempt.check_cancel()
        barriers = attempt.waits.barriers
        generation, keys = attempt.patiently(lambda: barriers.arrive(attempt.id, attempt.number, area, name, parties))
        attempt.connection.notify(keys)
        place = (attempt.id, area, name, generation)
        outcome = self._await_barrier(place, timeout_s)
        attempt.patiently(lambda: barriers.leave(*place), though_cancelled=True)
        if outcome != PASSED:
            raise BarrierBroken(name, outcome)

    def _await_barrier(self, place: tuple[int, str, str, int], timeout_s: float | None) -> str:
        """Return the outcome of a barrier; a body that stops waiting leaves it at once, and no longer counts."""
        _, area, name, _ = place
        attempt, barriers = self._attempt, self._attempt.waits.barriers

        def find() -> str | None:
            return attempt.patiently(lambda: barriers.outcome(*place))

        def leave() -> str | None:
            return attempt.patiently(lambda: barriers.leave(*place), though_cancelled=True)

        outcome = find()
        if outcome is not None:
            return outcome
        try:
            with self._new_wait().begin([Waiting("barrier", target=name)]) as wait:
                try:
                    return wait.poll(find, [barrier_key(area, name)], timeout_s, f'barrier "{name}"')
                except WaitTimeout:
                    if (outcome := leave()) is None:
                        raise
                    return outcome  # it opened just now
        except Cancelled:
            raise  # its row stays: with the end of this attempt it breaks the barrier for the others
        except BaseException:
            leave()
            raise

    def close(self) -> None:
        """Close what was opened for waiting."""
        self._wake_ups.close()
        self._attempt.close()

    def _new_waiter(self) -> Waiter:
        return Waiter(self._attempt.id, self._attempt.number, next(self._numbers), self._waits_alone())

    def _new_wait(self, waiter: Waiter | None = None, *, lock: str | None = None) -> Wait:
        waiter = waiter or self._new_waiter()
        return Wait(self._attempt, self._slot, self._wake_ups, waiter, lock=lock, is_given_up=self._is_given_up)


def _check_awaited(ids: Sequence[int], part: str | None) -> None:
    if part is not None:
        _checked(part, "part")
    if len(ids) > AWAITED_MAX:
        raise ValueError(f"{len(ids)} tasks are too many to wait for at once; at most {AWAITED_MAX}")
    unknown = next((id for id in ids if not 0 < id <= ID_MAX), None)
    if unknown is not None:
        raise UnknownTask(unknown)


def _values(
    ids: Sequence[int], found: Sequence[Found | None], part: str | None, *, return_interrupted: bool
) -> list[Any] | None:
    values: list[Any] = []
    missing = False
    for id, one in zip(ids, found, strict=True):
        if one is None:
            raise UnknownTask(id)
        if one.value is not None:
            values.append(payload.decode_value(one.value))
        elif one.status.ended:
            error = PartNotReached(one.id, part, one.status, one.reason, one.detail)
            if not return_interrupted:
                raise error
            values.append(error)
        else:
            missing = True
    return None if missing else values


def _checked(name: object, what: str) -> str:
    message = f"the name of a {what} is {str(name)[:50]!r}; it must be"
    if not isinstance(name, str) or not name or len(name) > NAME_CHARS:
        raise ValueError(f"{message} a text of 1 to {NAME_CHARS} characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{message} text that can be stored; half a surrogate pair cannot")
    return name


def _checked_timeout(timeout_s: object) -> float | None:
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or math.isnan(timeout_s):
        raise ValueError(f"timeout_s is {timeout_s!r}; it must be a number of seconds, or None for no limit")
    return None if timeout_s == math.inf else max(0.0, float(timeout_s))
