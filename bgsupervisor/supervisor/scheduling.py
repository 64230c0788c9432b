"""Which due tasks start now, in which children and slots; writes no rows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.ipc import messages
from bgsupervisor.ledger.attempts import Claim
from bgsupervisor.supervisor.backoff import PUT_OFF_S

if TYPE_CHECKING:
    from datetime import datetime

    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.config import Config
    from bgsupervisor.ledger.attempts import DueTask
    from bgsupervisor.ledger.requests import Ledger
    from bgsupervisor.supervisor.backoff import Backoff
    from bgsupervisor.supervisor.children import ChildHandle, Children
    from bgsupervisor.supervisor.events import EventSources
    from bgsupervisor.supervisor.forkservers import ForkServers
    from bgsupervisor.supervisor.recovery import Recovery
    from bgsupervisor.supervisor.shutdown import Shutdown
    from bgsupervisor.supervisor.termination import Terminations

__all__ = ["Scheduler"]

log = logging.getLogger("bgsupervisor")

PASSED_OVER_S = 0.1
"""Pause before due rows that others had locked are read again, in seconds; unlocked rows are claimed meanwhile."""
UNREADABLE_MAX = 1000
"""Limit of the unreadable waiting tasks that are remembered."""


class Scheduler:
    """Pairs due tasks with idle children and free slots, and keeps spare children.

    Attributes:
        queue_changed: The rows may have changed since they were last read.
        flawed: Due tasks whose rows cannot be read; their end is written next.
    """

    def __init__(
        self,
        config: Config,
        *,
        ledger: Ledger,
        children: Children,
        fork_servers: ForkServers,
        recovery: Recovery,
        terminations: Terminations,
        shutdown: Shutdown,
        backoff: Backoff,
        sources: EventSources,
        clock: AttendedClock,
    ) -> None:
        self.config = config
        self._ledger = ledger
        self._children = children
        self._fork_servers = fork_servers
        self._recovery = recovery
        self._terminations = terminations
        self._shutdown = shutdown
        self._backoff = backoff
        self._sources = sources
        self._clock = clock
        self.queue_changed = True
        self.flawed: list[DueTask] = []
        self._backlog = False
        self._missing = 0
        self._read_at: datetime | None = None
        self._passing_over_until: float | None = None
        self._next_due_at: datetime | None = None
        self._unreadable: set[int] = set()
        self._spawn_at = 0.0

    @property
    def has_work(self) -> bool:
        """Whether tasks are due, or may be."""
        return self.queue_changed or self._backlog or self.is_passing_over

    @property
    def is_passing_over(self) -> bool:
        """Whether only unlocked rows are claimed."""
        return self._passing_over_until is not None

    def due_at(self) -> float | None:
        """Return when `admit` has something to do next, monotonic; None if only a change of the rows can bring it."""
        if not self.may_admit():
            return None
        moments = [] if self._passing_over_until is None else [self._passing_over_until]
        if self._next_due_at is not None:
            moments.append(self._clock.monotonic() + (self._next_due_at - self._clock.now()).total_seconds())
        if self.queue_changed:
            moments.append(0.0)
        return max(min(moments), self._backoff.until) if moments else None

    def pass_over_locked(self) -> None:
        """Leave rows alone for a moment that others have locked."""
        if self._passing_over_until is None:
            self._passing_over_until = self._clock.monotonic() + PASSED_OVER_S

    def pause_spawning(self) -> None:
        """Order no children for a second: a fork server could not fork."""
        self._spawn_at = self._clock.monotonic() + PUT_OFF_S[-1]

    def admit(self) -> list[tuple[Claim, ChildHandle]]:
        """Pair due tasks with idle children and free slots, and order the children that are missing."""
        now, fork_server = self._clock.monotonic(), self._fork_servers.ours()
        if fork_server is None or not self.may_admit() or now < self._backoff.until:
            return []
        free = self.free_slots()[len(self.returning()) :]  # tasks that waited go before new ones
        due: list[DueTask] = []
        if self._next_due_at is not None and self._clock.now() >= self._next_due_at:
            self.queue_changed = True
        if self._passing_over_until is not None and now >= self._passing_over_until:
            self._passing_over_until = None
            self.queue_changed = True
        if self.queue_changed or (self._backlog and free):
            self._read_at = self._clock.now()
            try:
                due = self._ledger.due(
                    fork_server.hello.catalogue,
                    limit=len(free) + 1 + len(self._unreadable),
                    unlocked=self._passing_over_until is not None,
                    at=self._read_at,
                )
            except (DatabaseError, AccessError) as error:
                self._read_at = None
                self.queue_changed = True
                self._backoff.read_failed(error)
                return []
            self.flawed = [one for one in due if one.flaw and one.id not in self._unreadable]
            due = [one for one in due if not one.flaw]
            self.queue_changed, self._backlog = bool(self.flawed), bool(due)  # the rows behind them are read next
        idle = [child for child in self._children if child.idle and child.fork_server == fork_server.hello.ref]
        self._missing = min(len(due), len(free)) + self.config.spares - len(idle)
        pairs = zip(due, idle, free, strict=False)
        started_mono = self._clock.machine_monotonic()
        return [(Claim(task, child.identity, slot, started_mono), child) for task, child, slot in pairs]

    def prepare(self) -> None:
        """Do what no start waits for: order missing children, and read when the next task is due."""
        fork_server, missing, read_at = self._fork_servers.ours(), self._missing, self._read_at
        self._missing, self._read_at = 0, None
        if fork_server is not None and missing and self._clock.monotonic() >= self._spawn_at:
            self._fork_servers.spawn(missing - fork_server.coming)
        if read_at is not None:
            try:
                self._next_due_at = self._ledger.next_due_at(after=read_at)
            except (DatabaseError, AccessError) as error:
                self.queue_changed = True
                self._backoff.read_failed(error)

    def may_admit(self) -> bool:
        """Whether tasks may be started now."""
        # guard, last condition: nothing is admitted before all rows are compared
        return self._shutdown.stays and self._fork_servers.ours() is not None and self._recovery.done_once

    def free_slots(self) -> list[int]:
        """Return the slots that are free once this pass has been written, at most as many as may still run."""
        taken = self._children.taken_slots() | self._recovery.foreign_slots
        may_start = self.config.slots - len(taken)
        return [slot for slot in range(self.config.slots) if slot not in taken][: max(0, may_start)]

    def returning(self) -> list[ChildHandle]:
        """Return the children that have waited and want a slot again, in the order in which they began."""
        wanting = [child for child in self._children.running() if child.wants_slot is not None and child.end is None]
        return sorted(wanting, key=lambda child: child.started_at)

    def set_aside(self, due: DueTask, *, struck: bool) -> None:
        """Log an unreadable row; pass it over from now on if its end could not be written."""
        log.error("task %d (%s) cannot run: its row cannot be read: %s", due.id, due.name, due.flaw)
        if not struck:
            if len(self._unreadable) >= UNREADABLE_MAX:
                self._unreadable.clear()
            self._unreadable.add(due.id)

    def send_away_unneeded(self) -> None:
        """Send away idle children beyond the spares, and those of fork servers whose exits would not be seen."""
        idle = [child for child in self._children if child.idle]
        ours = [child for child in idle if child.fork_server == self._fork_servers.our_ref]
        kept = set(ours if self._backlog else ours[: self.config.spares])
        for child in idle:
            if child not in kept and child.peer is not None:
                self._sources.send(child.peer, messages.Leave())
                self._terminations.expect_to_leave(child)
