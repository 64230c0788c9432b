"""Parts, waiting, locks and barriers, as a body calls them: rows tell the truth, the board's bell spares the polling.

Called in the child, in the body's thread. While a body waits its slot is given to others; it takes one again before it
goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import threading
from multiprocessing import AuthenticationError
from multiprocessing import connection as connections
from typing import TYPE_CHECKING, Any, TypeVar

from bgsupervisor import pauses, payload, wire
from bgsupervisor.board import CALL_S, BoardManager, read_key
from bgsupervisor.errors import BarrierBroken, Cancelled, PartNotReached, UnknownTask, WaitTimeout
from bgsupervisor.ledger import ID_MAX
from bgsupervisor.statedir import open_dir
from bgsupervisor.waits import EVERYBODY, PASSED, Held, Queued, Waiting, barrier_key, lock_key, task_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ledger import Ledger
    from bgsupervisor.link import Link
    from bgsupervisor.waits import Found
    from bgsupervisor.wire import Run

__all__ = ["Bell", "Coordination"]

log = logging.getLogger("bgsupervisor")

T = TypeVar("T")

LOOK_S = 1.0
"""Without a board, or without a supervisor that rings it, the rows are looked at so often."""
FIRST_LOOKS_S = (0.1, 0.2, 0.4)
"""Pauses between the first looks without a board: the first waiter has it started."""
LONG_S = 30.0
"""With both the bell wakes a waiter; this is the net below it."""
SLOT_LOOK_S = 0.2
"""Without a supervisor a returning waiter tries so often to take a slot itself."""
GRANT_S = 5.0
"""A supervisor that has not answered for so long may be stopped: the waiter looks for a free slot itself."""
NAME_CHARS = 200


class Bell:
    """A client of the board that never hangs longer than CALL_S, whatever the board does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._directory: int | None = None
        self._proxy: Any = None

    def seen(self, keys: Sequence[str]) -> list[int] | None:
        """Return the counts of *keys*; None if there is no board that answers."""
        try:
            if self._proxy is None:
                self._connect()
            return list(self._proxy.seen(list(keys)))
        except (OSError, EOFError, AuthenticationError):
            self.drop()
            return None

    def wait_beyond(self, keys: Sequence[str], seen: list[int], timeout_s: float, wake_fd: int) -> list[int] | None:
        """Wait for a ring, for *wake_fd* to become readable, or *timeout_s*; return the counts, None if unknown."""
        try:
            wire_end = self._proxy._tls.connection  # noqa: SLF001 - a proxy's own call could not be woken
            wire_end.send((self._proxy._id, "wait_beyond", (list(keys), seen, timeout_s), {}))  # noqa: SLF001
            ready = connections.wait([wire_end, wake_fd], timeout_s + CALL_S)
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
        self._directory = open_dir(self._folder)
        address = f"/proc/self/fd/{self._directory}/board.sock"
        manager = BoardManager(address=address, authkey=read_key(self._folder), serializer="bounded")
        manager.connect()
        proxy: Any = manager.bells()  # type: ignore[attr-defined]
        proxy._close.cancel()  # noqa: SLF001 - the bells live as long as the board: nothing to give back, nor to wait for
        self._proxy = proxy


class _GivenUp(BaseException):
    """The event loop has cancelled the coroutine that waits; seen by nobody but the thread that waited for it."""


class Coordination:
    """What one attempt may do with others. Closed when the attempt has ended.

    An async body may wait for several things at once, each in a thread of its own: it has no slot while it waits for
    any of them and nothing has come, and whatever comes first takes the slot again for all.
    """

    def __init__(
        self,
        order: Run,
        link: Link,
        ledger: Callable[[], Ledger],
        config: Config,
        clock: Clock,
        *,
        is_given_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._id, self._attempt, self._parent_id = order.id, order.attempt, order.parent_id
        self._link = link
        self._make_ledger = ledger
        self._made: Ledger | None = None
        self._config = config
        self._clock = clock
        self._is_given_up = is_given_up
        self._bells: dict[int, Bell] = {}
        self._slot_turn = threading.Lock()
        self._has_slot = True

    # What a body calls

    def reach(self, part: str, value: object) -> None:
        """Record a part, then ring."""
        text = payload.encode_result(value, limit_bytes=self._config.data_max_bytes)
        self._check_cancel()
        if self._ledger.waits.reach(self._id, self._attempt, _checked(part, "part"), text):
            self._link.say_from_body(wire.Ring([task_key(self._id)]))

    def wait_for(
        self, ids: Sequence[int], part: str | None, *, timeout_s: float | None, return_interrupted: bool
    ) -> list[Any]:
        """Wait for a part, or the end, of all of *ids*; return the values in order."""
        if part is not None:
            _checked(part, "part")
        unknown = next((id for id in ids if not 0 < id <= ID_MAX), None)
        if unknown is not None:
            raise UnknownTask(unknown)

        def look() -> list[Any] | None:
            found = self._ledger.waits.find(ids, part)
            return _values(ids, found, part, return_interrupted=return_interrupted)

        ready = look()
        if ready is not None:
            self._check_cancel()
            return ready
        waiting = [Waiting("end" if part is None else "part", target_id=id, target=part) for id in ids]
        what = f'part "{part}"' if part is not None else "the end"
        sentence = f"{what} of task {', '.join(map(str, ids))}"
        with self._slot_given(waiting):
            return self._until(look, [task_key(id) for id in ids], timeout_s, sentence)

    def acquire(self, name: str, permits: int, timeout_s: float | None) -> Held:
        """Take a permit of a lock, waiting for it if all are taken."""
        _checked(name, "lock")
        queued: Queued | None = None

        def take() -> Held | None:
            nonlocal queued
            if queued is not None and not self._ledger.waits.may_take(self._id, name, permits):
                return None
            with self._slot_turn:
                found = self._ledger.waits.acquire(
                    self._id,
                    self._attempt,
                    name,
                    permits,
                    slots=self._config.slots,
                    max_waiting=self._config.max_waiting,
                    waits_already=queued is not None,
                )
                if isinstance(found, Held):
                    pauses.at("child.locked")
                    if found.slot is not None:
                        self._note_slot(found.slot)
                    return found
                if queued is None:
                    queued = found
                    self._note_begun(slot_given=queued.slot_given)
            return None

        self._check_cancel()
        held = take()
        if held is not None:
            return held
        try:
            held = self._until(take, [lock_key(name)], timeout_s, f'lock "{name}"')
        except BaseException as error:
            self._give_up([lock_key(name)], patiently=not isinstance(error, Cancelled))
            raise
        try:
            if held.slot is None:
                self._regain_slot()
        except BaseException:
            self.release(name)
            raise
        return held

    def release(self, name: str) -> None:
        """Give a permit back, then ring."""
        keys = self._ledger.waits.release(self._id, self._attempt, name)
        pauses.at("child.unlocked")
        if keys:
            self._link.say_from_body(wire.Ring(keys))

    def barrier(self, name: str, parties: int, *, scope: str | None, timeout_s: float | None) -> None:
        """Wait until *parties* have arrived."""
        _checked(name, "barrier")
        if isinstance(parties, bool) or not isinstance(parties, int) or parties < 1:
            raise ValueError(f"parties is {parties!r}; it must be a whole number above 0")
        if scope is None and self._parent_id is None:
            raise ValueError(f'the barrier "{name}" has no scope: no task requested this one; give scope="..."')
        area = scope if scope is not None else f"parent {self._parent_id}"
        self._check_cancel()
        waits = self._ledger.waits
        generation, keys = waits.arrive(self._id, self._attempt, area, name, parties)
        if keys:
            self._link.say_from_body(wire.Ring(keys))

        def look() -> str | None:
            return waits.barrier_outcome(self._id, area, name, generation)

        try:
            outcome = look()
            if outcome is None:
                with self._slot_given([Waiting("barrier", target=name)]):
                    outcome = self._until(look, [barrier_key(area, name)], timeout_s, f'barrier "{name}"')
        except Cancelled:
            raise  # its row stays: with the end of this attempt it breaks the barrier for the others
        except BaseException:
            waits.leave_barrier(self._id, area, name, generation)
            raise
        waits.leave_barrier(self._id, area, name, generation)
        if outcome != PASSED:
            raise BarrierBroken(name, outcome)

    def close(self) -> None:
        """Close what was opened for waiting."""
        for bell in self._bells.values():
            bell.drop()
        if self._made is not None:
            with contextlib.suppress(Exception):
                self._made.store.close()
            self._made = None

    # Within

    @property
    def _ledger(self) -> Ledger:
        if self._made is None:
            self._made = self._make_ledger()
        return self._made

    @property
    def _has_slot(self) -> bool:
        return not self._link.waiting

    @_has_slot.setter
    def _has_slot(self, has: bool) -> None:
        self._link.waiting = not has  # who waits has little to say, and beats slower

    @property
    def _bell(self) -> Bell:
        return self._bells.setdefault(threading.get_ident(), Bell(self._config.state_dir))

    @contextlib.contextmanager
    def _slot_given(self, waiting: Sequence[Waiting]) -> Iterator[None]:
        with self._slot_turn:
            given = self._ledger.waits.begin(self._id, self._attempt, waiting, max_waiting=self._config.max_waiting)
            self._note_begun(slot_given=given)
        try:
            yield
        except BaseException as error:
            self._give_up([], patiently=not isinstance(error, Cancelled))
            raise
        self._regain_slot()

    def _note_begun(self, *, slot_given: bool) -> None:
        if slot_given:
            pauses.at("child.slot_given")
            self._has_slot = False
            self._link.say_from_body(wire.Waiting(self._id, self._attempt))

    def _note_slot(self, slot: int) -> None:
        if not self._has_slot:
            self._has_slot = True
            self._link.say_from_body(wire.Resumed(self._id, self._attempt, slot))

    def _give_up(self, keys: list[str], *, patiently: bool) -> None:
        """Take the wait's rows away before all else: who waits in vain must not seem to wait, nor stand in a queue."""
        with self._slot_turn:
            slot = self._resume()
        if keys:
            self._link.say_from_body(wire.Ring(keys))  # whoever stood behind moves up
        if slot is None and patiently:
            self._regain_slot()

    def _resume(self) -> int | None:
        slot = self._ledger.waits.resume(self._id, self._attempt, slots=self._config.slots)
        if slot is not None:
            self._note_slot(slot)
        return slot

    def _until(self, look: Callable[[], T | None], keys: list[str], timeout_s: float | None, what: str) -> T:
        """Look until there is something: after each ring, and now and then without one."""
        deadline = None if timeout_s is None else self._clock.monotonic() + timeout_s
        seen: list[int] | None = None
        watched = [*keys, EVERYBODY]
        pauses = itertools.chain(FIRST_LOOKS_S, itertools.repeat(LOOK_S))
        while True:
            self._check_cancel()
            if self._is_given_up():
                raise _GivenUp
            if seen is None:
                seen = self._bell.seen(watched)
            found = look()
            if found is not None:
                return found
            left = LONG_S if deadline is None else deadline - self._clock.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{what} was waited for in vain for {timeout_s:g} s")
            wake = self._link.wake_descriptor()
            if seen is None:
                _poll(wake, min(left, next(pauses)))
            else:
                rung_by_nobody = self._link.disconnected.is_set()
                limit = min(left, LOOK_S if rung_by_nobody else LONG_S)
                seen = self._bell.wait_beyond(watched, seen, limit, wake)
            self._link.quiet()

    def _regain_slot(self) -> None:
        """Take a slot again: the next that the supervisor hands out, or a free one if it is away; end the waiting."""
        with self._slot_turn:
            if self._has_slot:  # it was kept, or another wait of this body has taken it again
                self._resume()
            while not self._has_slot:
                granted = not self._link.disconnected.is_set() and self._is_granted()
                if granted or (self._resume() is None and self._is_granted()):
                    self._has_slot = True

    def _is_granted(self) -> bool:
        """Ask the supervisor for a slot, and wait for it; False if the supervisor is away."""
        self._link.want_slot(self._id, self._attempt)
        try:
            return self._wait_for_grant()
        finally:
            self._link.want_no_slot()

    def _wait_for_grant(self) -> bool:
        """Wait for the supervisor's word; False if it is away or silent, and the slot must be looked for again."""
        deadline = self._clock.monotonic() + GRANT_S
        while self._clock.monotonic() < deadline:
            self._check_cancel()
            if self._link.slot_granted.is_set():
                return True
            away = self._link.disconnected.is_set()
            _poll(self._link.wake_descriptor(), SLOT_LOOK_S if away else LOOK_S)
            self._link.quiet()
            if away:
                return False
        return False

    def _check_cancel(self) -> None:
        order = self._link.cancel_order
        if order is not None:
            raise Cancelled(order.reason, order.by, order.why)


def _poll(descriptor: int, timeout_s: float) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(timeout_s * 1000)


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


def _checked(name: str, what: str) -> str:
    if not isinstance(name, str) or not name or len(name) > NAME_CHARS:
        raise ValueError(f"the name of a {what} is {name!r}; it must be a text of 1 to {NAME_CHARS} characters")
    return name
