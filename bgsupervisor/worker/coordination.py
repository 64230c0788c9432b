"""Parts, waits, locks and barriers, as a body calls them: rows hold the truth, wake-ups spare the polling.

Called in the child, in the body's thread. While a body waits its slot is given to others; it takes one again before it
goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import secrets
import threading
from multiprocessing import AuthenticationError
from multiprocessing import connection as connections
from typing import TYPE_CHECKING, Any, TypeVar

from bgsupervisor import failpoints, payload
from bgsupervisor.errors import (
    BarrierBroken,
    Cancelled,
    DatabaseError,
    NotInTask,
    PartNotReached,
    Undecided,
    UnknownTask,
    WaitTimeout,
)
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.sockets import abandon_wait
from bgsupervisor.ledger.barriers import PASSED, barrier_key
from bgsupervisor.ledger.transitions import ID_MAX
from bgsupervisor.ledger.waitgraph import parent_scope
from bgsupervisor.ledger.waits import EVERYBODY, Held, Queued, Waiter, Waiting, task_key, turn_key
from bgsupervisor.system.files import open_own_dir
from bgsupervisor.worker.wait_manager import CALL_S, NotifyManager, read_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import Run
    from bgsupervisor.ledger.transitions import Ledger
    from bgsupervisor.ledger.waits import Found, Waits
    from bgsupervisor.worker.connection import Line

__all__ = ["Coordination", "WakeUps"]

log = logging.getLogger("bgsupervisor")

T = TypeVar("T")

LOOK_S = 1.0
"""Without a wait manager, or without a supervisor that notifies it, the rows are looked at so often."""
LOOK_SHARE = 20
"""But not before so many times as long as a look took: hundreds may look, and each has to connect to a server."""
FIRST_LOOKS_S = (0.1, 0.2, 0.4)
"""Pauses between the first looks without a wait manager: the first waiter has it started."""
LONG_S = 30.0
"""With both the wake-up wakes a waiter; this is the net below it."""
SLOT_LOOK_S = 0.2
"""Without a supervisor a returning waiter tries so often to take a slot itself."""
GRANT_S = (1.0, 1.0, 2.0, 5.0)
"""A supervisor that has not answered for so long may be stopped: the waiter looks for a free slot itself, and again."""
NAME_CHARS = 200
AWAITED_MAX = 10_000
PARTIES_MAX = 1_000_000
AWAY_S = 600.0
"""For so long a body waits for a database that is locked, full or away before its call fails."""


class WakeUps:
    """A client of the wait manager that never hangs longer than CALL_S. For one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._directory: int | None = None
        self._proxy: Any = None
        self._name = secrets.token_hex(8)
        self._calls = itertools.count()
        self.pid = os.getpid()

    def seen(self, keys: Sequence[str]) -> list[int] | None:
        """Return the counts of *keys*; None if there is no wait manager that answers."""
        try:
            if self._proxy is None:
                self._connect()
            return list(self._proxy.seen(list(keys)))
        except (OSError, EOFError, AuthenticationError):
            self.drop()
            return None

    def wait_beyond(self, keys: Sequence[str], seen: list[int], timeout_s: float, wake_fd: int) -> list[int] | None:
        """Wait for a wake-up, for *wake_fd* to become readable, or *timeout_s*; return the counts, None if unknown."""
        wait = f"{self._name}.{next(self._calls)}"
        try:
            wire_end = self._proxy._tls.connection  # noqa: SLF001 - a proxy's own call could not be woken
            wire_end.send((self._proxy._id, "wait_beyond", (wait, list(keys), seen, timeout_s), {}))  # noqa: SLF001
            ready = connections.wait([wire_end, wake_fd], timeout_s + CALL_S)
            if wire_end not in ready and abandon_wait(self._folder, wait):  # else its thread there would wait on
                ready = connections.wait([wire_end], CALL_S)
            if wire_end in ready:
                kind, counts = wire_end.recv()
                if kind == "#RETURN":
                    return list(counts)
        except (OSError, EOFError, AttributeError, ValueError):
            pass
        self.drop()  # an answer that comes later would be taken for another call's
        return None

    def drop(self) -> None:
        """Close the connection; the next call makes another."""
        if self._proxy is not None:
            with contextlib.suppress(OSError, AttributeError):
                self._proxy._tls.connection.close()  # noqa: SLF001 - as above
                del self._proxy._tls.connection  # noqa: SLF001
        self._proxy = None
        if self._directory is not None:
            with contextlib.suppress(OSError):
                os.close(self._directory)
            self._directory = None

    def _connect(self) -> None:
        self._directory = open_own_dir(self._folder)
        address = f"/proc/self/fd/{self._directory}/manager.sock"
        manager = NotifyManager(address=address, authkey=read_key(self._directory), serializer="bounded")
        manager.connect()
        proxy: Any = manager.counts()  # type: ignore[attr-defined]
        proxy._close.cancel()  # noqa: SLF001 - the wake-ups live as long as the wait manager: nothing to give back, nor to wait for
        self._proxy = proxy


class _GivenUp(BaseException):
    """The event loop has cancelled the coroutine that waits; seen by nobody but the thread that waited for it."""


class Coordination:
    """What one attempt may do with others. Closed when the attempt has ended.

    An async body may wait for several things at once, each in a thread of its own: it has no slot from the first of
    these waits to the end of the last.
    """

    def __init__(
        self,
        assignment: Run,
        link: Line,
        ledger: Callable[[], Ledger],
        config: Config,
        clock: Clock,
        *,
        is_given_up: Callable[[], bool] = lambda: False,
        waits_alone: Callable[[], bool] = lambda: True,
        make_wake_ups: Callable[[Path], WakeUps] = WakeUps,
    ) -> None:
        self._id, self._attempt, self._parent_id = assignment.id, assignment.attempt, assignment.parent_id
        self._link = link
        self._make_ledger = ledger
        self._made: Ledger | None = None
        self._config = config
        self._clock = clock
        self._is_given_up = is_given_up
        self._waits_alone = waits_alone
        self._make_wake_ups = make_wake_ups
        self._numbers = itertools.count()
        self._wake_ups: WakeUps | None = None
        self._slot_turn = threading.Lock()
        self._has_slot = True
        self._pending = 0
        self._closed = False

    # What a body calls

    def reach(self, part: str, value: object) -> None:
        """Record a part, then ring."""
        text = payload.encode_result(value, limit_bytes=self._config.data_max_bytes)
        self._check_cancel()
        name, slots = _checked(part, "part"), self._config.slots
        if self._patiently(lambda: self._waits.reach(self._id, self._attempt, name, text, slots=slots)):
            self._link.notify([task_key(self._id)])

    def wait_for(
        self, ids: Sequence[int], part: str | None, *, timeout_s: float | None, return_interrupted: bool
    ) -> list[Any]:
        """Wait for a part, or the end, of all of *ids*; return the values in order."""
        timeout_s = _checked_timeout(timeout_s)
        if part is not None:
            _checked(part, "part")
        if len(ids) > AWAITED_MAX:
            raise ValueError(f"{len(ids)} tasks are too many to wait for at once; at most {AWAITED_MAX}")
        unknown = next((id for id in ids if not 0 < id <= ID_MAX), None)
        if unknown is not None:
            raise UnknownTask(unknown)

        def look() -> list[Any] | None:
            found = self._patiently(lambda: self._waits.find(ids, part))
            return _values(ids, found, part, return_interrupted=return_interrupted)

        ready = look()
        if ready is not None:
            self._check_cancel()
            return ready
        what = f'part "{part}"' if part is not None else "the end"
        sentence = f"{what} of task {', '.join(map(str, ids))}"
        if timeout_s == 0:
            raise _waited_in_vain(sentence, timeout_s)
        waiting = [Waiting("end" if part is None else "part", target_id=id, target=part) for id in dict.fromkeys(ids)]
        with self._slot_given(waiting) as begin_again:

            def look_again() -> list[Any] | None:
                values = look()
                if values is None:
                    begin_again()  # a slot came with a part, and a retry has cleared the part before we saw it
                return values

            return self._until(look_again, [task_key(id) for id in ids], timeout_s, sentence)

    def acquire(self, name: str, permits: int, timeout_s: float | None) -> Held:
        """Take a permit of a lock, waiting for it if all are taken."""
        timeout_s = _checked_timeout(timeout_s)
        _checked(name, "lock")
        self._check_cancel()
        waiter, sentence = self._new_waiter(), f'lock "{name}"'
        limits = {"slots": self._config.slots, "max_waiting": self._config.max_waiting}
        with self._slot_turn:
            found = self._patiently(lambda: self._waits.acquire(waiter, name, permits, **limits, wait=timeout_s != 0))
            if isinstance(found, Queued):
                self._note_begun(slot_given=found.slot_given)
        if isinstance(found, Held):
            failpoints.at("child.locked")
            return found
        if found is None:
            raise _waited_in_vain(sentence, 0)

        def look() -> Held | None:
            return self._patiently(lambda: self._waits.held(self._id, self._attempt, name))

        try:
            held = self._until(look, [turn_key(self._id)], timeout_s, sentence)
        except BaseException as error:
            self._give_up(waiter, name, want_slot=not isinstance(error, Cancelled))
            raise
        try:
            self._regain_slot(waiter, held.slot)
        except BaseException:
            self.release(name)
            raise
        return held

    def release(self, name: str) -> None:
        """Give a permit to whoever has waited longest, then ring."""
        slots = self._config.slots
        keys = self._patiently(
            lambda: self._waits.release(self._id, self._attempt, name, slots=slots), though_cancelled=True
        )
        failpoints.at("child.unlocked")
        self._link.notify(keys)

    def barrier(self, name: str, parties: int, *, scope: str | None, timeout_s: float | None) -> None:
        """Wait until *parties* have arrived."""
        timeout_s = _checked_timeout(timeout_s)
        _checked(name, "barrier")
        if isinstance(parties, bool) or not isinstance(parties, int) or not 0 < parties <= PARTIES_MAX:
            raise ValueError(f"parties is {parties!r}; it must be a whole number from 1 to {PARTIES_MAX}")
        if scope is None and self._parent_id is None:
            raise ValueError(f'the barrier "{name}" has no scope: no task requested this one; give scope="..."')
        area = f"scope {_checked(scope, 'scope')}" if scope is not None else parent_scope(self._parent_id or 0)
        self._check_cancel()
        barriers = self._waits.barriers
        generation, keys = self._patiently(lambda: barriers.arrive(self._id, self._attempt, area, name, parties))
        self._link.notify(keys)
        place = (self._id, area, name, generation)
        outcome = self._await_barrier(place, timeout_s)
        self._patiently(lambda: barriers.leave(*place), though_cancelled=True)
        if outcome != PASSED:
            raise BarrierBroken(name, outcome)

    def _await_barrier(self, place: tuple[int, str, str, int], timeout_s: float | None) -> str:
        """Return what becomes of a barrier; who goes before that leaves it at once, and counts no more."""
        _, area, name, _ = place
        barriers = self._waits.barriers

        def look() -> str | None:
            return self._patiently(lambda: barriers.outcome(*place))

        def left() -> str | None:
            return self._patiently(lambda: barriers.leave(*place), though_cancelled=True)

        outcome = look()
        if outcome is not None:
            return outcome
        try:
            with self._slot_given([Waiting("barrier", target=name)]):
                try:
                    return self._until(look, [barrier_key(area, name)], timeout_s, f'barrier "{name}"')
                except WaitTimeout:
                    if (outcome := left()) is None:
                        raise
                    return outcome  # it opened just now
        except Cancelled:
            raise  # its row stays: with the end of this attempt it breaks the barrier for the others
        except BaseException:
            left()
            raise

    def close(self) -> None:
        """Close what was opened for waiting."""
        self._closed = True
        if self._wake_ups is not None:
            self._wake_ups.drop()
        if self._made is not None:
            with contextlib.suppress(Exception):
                self._made.store.close()
            self._made = None

    # Within

    @property
    def _waits(self) -> Waits:
        if self._closed:
            raise NotInTask("the body has ended; what is left of it can neither wait nor reach anything")
        if self._made is None:
            self._made = self._make_ledger()
        return self._made.waits

    def _patiently(self, call: Callable[[], T], *, though_cancelled: bool = False) -> T:
        """Do what needs the database; while that is away the body waits, at most AWAY_S."""
        deadline = self._clock.monotonic() + AWAY_S
        while True:
            try:
                return call()
            except Undecided:
                raise  # to do it once more could do it twice
            except DatabaseError as error:
                if self._clock.monotonic() >= deadline:
                    raise
                log.warning("%s; trying again", error)
            if not though_cancelled:
                self._check_cancel()
            self._clock.sleep(LOOK_S)

    def _new_waiter(self) -> Waiter:
        return Waiter(self._id, self._attempt, next(self._numbers), self._waits_alone())

    @contextlib.contextmanager
    def _slot_given(self, waiting: Sequence[Waiting]) -> Iterator[Callable[[], None]]:
        """Give the slot to others while the block waits; yields what has the wait begin again if its rows are gone."""
        waiter, limits = self._new_waiter(), {"slots": self._config.slots, "max_waiting": self._config.max_waiting}

        def begin() -> bool:
            return self._patiently(lambda: self._waits.begin(waiter, waiting, **limits))

        def begin_again() -> None:
            if not self._patiently(lambda: self._waits.is_waiting(waiter)):
                with self._slot_turn:
                    begin()

        with self._slot_turn:
            self._note_begun(slot_given=begin())
        try:
            yield begin_again
        except BaseException as error:
            self._give_up(waiter, None, want_slot=not isinstance(error, Cancelled))
            raise
        self._regain_slot(waiter, None)

    def _note_begun(self, *, slot_given: bool) -> None:
        self._pending += 1
        if slot_given:
            failpoints.at("child.slot_given")
            self._has_slot = False
            self._link.set_waiting(True)
        self._link.say_from_body(messages.Waiting(self._id, self._attempt, not slot_given))

    def _note_slot(self, slot: int | None) -> None:
        """Go on in a slot that was taken without the supervisor."""
        if slot is not None and not self._has_slot:
            self._has_slot = True
            self._link.set_waiting(False)
            self._link.say_from_body(messages.Resumed(self._id, self._attempt, slot))

    def _give_up(self, waiter: Waiter, lock: str | None, *, want_slot: bool) -> None:
        """End a wait in vain. Its rows go before all else: who does not wait must not seem to, nor stand in a queue."""
        slots, keys = self._config.slots, list[str]()

        def leave() -> int | None:
            alone = self._pending == 1
            slot, notified = self._waits.give_up(waiter, lock, slots=slots if alone else None)
            keys.extend(notified)
            return slot

        with self._slot_turn:
            self._note_slot(self._patiently(leave, though_cancelled=True))
            self._pending -= not want_slot
        self._link.notify(keys)
        if want_slot:
            self._regain_slot(waiter, None)

    def _until(self, look: Callable[[], T | None], keys: list[str], timeout_s: float | None, what: str) -> T:
        """Look until there is something: after each wake-up, and now and then without one."""
        lasting = threading.current_thread() is threading.main_thread()
        wake_ups = (
            self._wake_ups if lasting and self._wake_ups is not None and self._wake_ups.pid == os.getpid() else None
        )
        wake_ups = wake_ups or self._make_wake_ups(self._config.state_dir)
        try:
            with self._link.waking() as wake:
                deadline = None if timeout_s is None else self._clock.monotonic() + timeout_s
                found = self._until_notified(wake_ups, wake, look, [*dict.fromkeys(keys), EVERYBODY], deadline)
        finally:
            if lasting:
                self._wake_ups = wake_ups
            else:
                wake_ups.drop()
        if found is None:
            raise _waited_in_vain(what, timeout_s)
        return found

    def _until_notified(
        self, wake_ups: WakeUps, wake: int, look: Callable[[], T | None], keys: list[str], deadline: float | None
    ) -> T | None:
        """Return what *look* finds in the end, None if that is not before *deadline*."""
        seen: list[int] | None = None
        rests_s = itertools.chain(FIRST_LOOKS_S, itertools.repeat(LOOK_S))
        while True:
            self._link.quiet(wake)
            self._check_cancel()
            if self._is_given_up():
                raise _GivenUp
            if seen is None:
                seen = wake_ups.seen(keys)
            began = self._clock.monotonic()
            found = look()
            if found is not None:
                return found
            rested_s = LOOK_SHARE * (self._clock.monotonic() - began)
            left = LONG_S if deadline is None else deadline - self._clock.monotonic()
            if left <= 0:
                return None
            if seen is None:
                self._link.rest(wake, min(left, max(next(rests_s), min(rested_s, LONG_S))))
            else:
                notified_by_nobody = self._link.disconnected.is_set()
                pause_s = max(LOOK_S, min(rested_s, LONG_S)) if notified_by_nobody else LONG_S
                seen = wake_ups.wait_beyond(keys, seen, min(left, pause_s), wake)

    def _regain_slot(self, waiter: Waiter, slot: int | None) -> None:
        """End a wait, with a slot again unless the body still waits for something else.

        The slot may have come with what was waited for; else it is the next that the supervisor hands out, or, if that
        is away, a free one.
        """
        limits_s = itertools.chain(GRANT_S, itertools.repeat(GRANT_S[-1]))
        with self._slot_turn:
            self._pending -= 1
            if self._has_slot or self._pending:
                self._patiently(lambda: self._waits.forget(waiter), though_cancelled=True)
                return
            if slot is None:
                slot = self._patiently(lambda: self._waits.slot(self._id, self._attempt))
            self._note_slot(slot)
            silent = self._link.disconnected.is_set()
            while not self._has_slot:
                if (not silent or self._resume(waiter) is None) and self._is_granted(waiter, next(limits_s)):
                    self._has_slot = True
                    self._link.set_waiting(False)
                silent = True

    def _resume(self, waiter: Waiter) -> int | None:
        slot = self._patiently(lambda: self._waits.resume(waiter, slots=self._config.slots))
        self._note_slot(slot)
        return slot

    def _is_granted(self, waiter: Waiter, limit_s: float) -> bool:
        """Ask the supervisor for a slot, and wait for it; False if the supervisor is away, or silent for *limit_s*."""
        self._link.want_slot(self._id, self._attempt, waiter.number)
        try:
            with self._link.waking() as wake:
                return self._wait_for_grant(wake, self._clock.monotonic() + limit_s)
        finally:
            self._link.want_no_slot()

    def _wait_for_grant(self, wake: int, deadline: float) -> bool:
        while (left_s := deadline - self._clock.monotonic()) > 0:
            self._link.quiet(wake)
            self._check_cancel()
            if self._link.slot_granted.is_set():
                return True
            away = self._link.disconnected.is_set()
            self._link.rest(wake, min(left_s, SLOT_LOOK_S if away else LOOK_S))
            if away:
                return False
        return False

    def _check_cancel(self) -> None:
        assignment = self._link.cancel_message
        if assignment is not None:
            raise Cancelled(assignment.reason, assignment.by, assignment.why)


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


def _waited_in_vain(what: str, timeout_s: float | None) -> WaitTimeout:
    return WaitTimeout(f"{what} was waited for in vain for {timeout_s:g} s")


def _checked(name: object, what: str) -> str:
    told = f"the name of a {what} is {str(name)[:50]!r}; it must be"
    if not isinstance(name, str) or not name or len(name) > NAME_CHARS:
        raise ValueError(f"{told} a text of 1 to {NAME_CHARS} characters")
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"{told} text that can be stored; half a surrogate pair cannot")
    return name


def _checked_timeout(timeout_s: object) -> float | None:
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or math.isnan(timeout_s):
        raise ValueError(f"timeout_s is {timeout_s!r}; it must be a number of seconds, or None for no limit")
    return None if timeout_s == math.inf else max(0.0, float(timeout_s))
