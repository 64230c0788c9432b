"""What a pass has decided: written in one commit, then carried out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from typing import TYPE_CHECKING

from bgsupervisor import failpoints
from bgsupervisor.database.errors import is_locked
from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.ipc import messages
from bgsupervisor.ledger.attempts import Batch, IntendedEnd, SlotGrant, Telemetry
from bgsupervisor.ledger.waits import DUE
from bgsupervisor.sanitize import escaped, quoted

if TYPE_CHECKING:
    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.config import Config
    from bgsupervisor.errors import BgSupervisorError
    from bgsupervisor.ipc.lock import Lock
    from bgsupervisor.ipc.messages import AttemptResult
    from bgsupervisor.ledger.attempts import Attempt, BatchResult, Claim, Suspension
    from bgsupervisor.ledger.requests import Ledger
    from bgsupervisor.supervisor.backoff import Backoff
    from bgsupervisor.supervisor.children import ChildHandle, Children
    from bgsupervisor.supervisor.events import EventSources
    from bgsupervisor.supervisor.forkservers import ForkServers
    from bgsupervisor.supervisor.presence import Presence
    from bgsupervisor.supervisor.recovery import Recovery
    from bgsupervisor.supervisor.scheduling import Scheduler
    from bgsupervisor.supervisor.shutdown import Shutdown
    from bgsupervisor.supervisor.suspension import Suspensions
    from bgsupervisor.supervisor.termination import Terminations
    from bgsupervisor.supervisor.wait_manager import WaitManager

__all__ = ["Decisions"]

log = logging.getLogger("bgsupervisor")

TELEMETRY_EVERY_S = 0.25
"""Interval between two writes of progress, in seconds, unless something else is written anyway."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Decisions:
    """Collects what the other parts have decided; acknowledges, signals and wakes only after the commit."""

    config: Config
    ledger: Ledger
    lock: Lock
    children: Children
    fork_servers: ForkServers
    recovery: Recovery
    terminations: Terminations
    suspensions: Suspensions
    wait_manager: WaitManager
    scheduler: Scheduler
    shutdown: Shutdown
    presence: Presence
    backoff: Backoff
    sources: EventSources
    clock: AttendedClock
    _telemetry_at: float = dataclasses.field(default=0.0, init=False)

    def write(self, claims: list[tuple[Claim, ChildHandle]]) -> None:
        """Write all that this pass has decided, in one commit, then let it take effect."""
        now = self.clock.monotonic()
        if now < self.backoff.until:
            return
        batch = self._compose([claim for claim, _ in claims], now)
        # guard, last condition: a supervisor whose lock was replaced writes nothing
        if not batch or self.shutdown.is_replaced():
            return
        _pause_before(batch)
        try:
            outcome = self.ledger.apply(batch)
        except (DatabaseError, AccessError) as error:
            # It may be committed all the same. What can be repeated is; claims that turn out to stand are given back,
            # and before that is known there are no others.
            self.recovery.unordered.update(claim.attempt for claim in batch.claims)
            self.recovery.done_once = False
            self.recovery.repeat()
            self._put_off(error, now)
            return
        self.backoff.write_succeeded()
        self._telemetry_at = now + TELEMETRY_EVERY_S if batch.telemetry else self._telemetry_at
        if batch.supervisor is not None:
            self.presence.written(now)
        self._take_effect(batch, outcome)
        if outcome.passed_over:
            self.scheduler.pass_over_locked()
        if claims:
            failpoints.at("supervisor.claimed")
        for claim, child in claims:
            self._start(claim, child, claimed=claim in outcome.claimed)
        started = [child for claim, child in claims if claim in outcome.claimed]
        for child, counters in zip(
            started, self.children.oom.counters(child.ref.pid for child in started), strict=True
        ):
            child.oom = counters

    def _compose(self, claims: list[Claim], now: float) -> Batch:
        batch = Batch(
            claims=claims,
            ends=dict(self.recovery.ends),
            unclaims=set(self.recovery.not_started),
            flawed=self.scheduler.flawed,
        )
        for attempt, child in self.children.by_attempt().items():
            if child.end is not None:
                batch.ends[attempt] = child.end
            elif child.undelivered:
                batch.unclaims.add(attempt)
            elif child.termination is not None and child.termination.unsent:
                termination = child.termination
                # guard, -> self.terminations.carry_out(child, termination): the reason is committed before the signal
                batch.intended_ends[attempt] = IntendedEnd(termination.reason, termination.detail())
            if child.suspension_unsaved and child.end is None:
                batch.suspensions[attempt] = child.suspension
        for child, slot in zip(self.scheduler.returning(), self.scheduler.free_slots(), strict=False):
            if child.attempt is not None and child.dead_since is None and child.wants_slot is not None:
                batch.returns[child.attempt] = SlotGrant(child.wants_slot, slot)
        if self.presence.is_due(now):
            batch.supervisor = self.presence.record()  # with all heartbeats: they are compared with it
        if batch or now >= self._telemetry_at:
            noted = {attempt: child.note for attempt, child in self.children.by_attempt().items() if child.end is None}
            batch.telemetry = {attempt: note for attempt, note in noted.items() if note}
        return batch

    def _take_effect(self, batch: Batch, outcome: BatchResult) -> None:
        """Do what had to wait for the commit: acknowledge, free, send signals."""
        by_attempt = self.children.by_attempt()
        _pause_after(batch)
        if batch.ends:
            with contextlib.suppress(OSError):
                self.lock.touch()  # the next supervisor takes what ended later for unattended
        for attempt, end in batch.ends.items():
            self.recovery.ends.pop(attempt, None)
            self._conclude(by_attempt.get(attempt), attempt, end, recorded=attempt in outcome.ended)
        for attempt in batch.unclaims:
            self.recovery.not_started.discard(attempt)
            self.recovery.unordered.discard(attempt)
            if attempt in by_attempt:
                by_attempt[attempt].become_free()
            self.scheduler.queue_changed = True
        self.scheduler.flawed = []
        for due in batch.flawed:
            self.scheduler.set_aside(due, struck=due.id in outcome.struck)
        for attempt in batch.intended_ends:
            child = by_attempt[attempt]
            if child.termination is not None and attempt in outcome.intended_ends:
                self.terminations.carry_out(child, child.termination)
            elif child.termination is not None:
                child.termination.unsent = False
                self.recovery.repeat()  # the row is not running any more
        for attempt, suspension in batch.suspensions.items():
            self._suspend(by_attempt[attempt], suspension, recorded=attempt in outcome.suspensions)
        for attempt, back in batch.returns.items():
            self._give_slot(by_attempt[attempt], attempt, back, granted=attempt in outcome.returned)
        for attempt in batch.telemetry:
            by_attempt[attempt].note = Telemetry()
        self.wait_manager.notify(outcome.keys)
        self.scheduler.queue_changed = self.scheduler.queue_changed or DUE in outcome.keys

    def _suspend(self, child: ChildHandle, suspension: Suspension, *, recorded: bool) -> None:
        """Stop a child whose row says that it is suspended."""
        child.suspension_unsaved = False
        if recorded and suspension.lasts:
            failpoints.at("supervisor.suspending")
            if self.shutdown.is_replaced():
                return  # the next supervisor has read the row, and the task may have been resumed since
            self.suspensions.suspend(child)
            self.presence.renew()  # the next write shows whether it was stopped with the database locked
        elif not recorded:
            self.recovery.repeat()  # the row is not running any more

    def _give_slot(self, child: ChildHandle, attempt: Attempt, back: SlotGrant, *, granted: bool) -> None:
        """Give a slot to a body that has waited."""
        child.wants_slot = None
        child.got_on_at = self.clock.monotonic()
        if granted and child.peer is not None:
            child.slot = back.slot
            self.sources.send(child.peer, messages.SlotGranted(attempt.id, attempt.attempt, back.number))
        elif not granted:
            self.recovery.repeat()  # our picture of the slots is wrong; the child asks again

    def _conclude(self, child: ChildHandle | None, attempt: Attempt, end: AttemptResult, *, recorded: bool) -> None:
        if recorded:
            _log_end(attempt, child.name if child is not None else self.recovery.names.get(attempt, ""), end)
        if child is None:
            return
        child.become_free()
        if child.dead_since is not None:
            if child.ref not in self.fork_servers.exits:
                self.fork_servers.tell_all(messages.ExitsSeen([child.ref]))  # no report of its exit is needed any more
            self.children.keep_log(child, attempt, self.config.log_max_bytes)
            self.children.forget(child)
        elif child.peer is not None:
            self.sources.send(child.peer, messages.Ack(attempt.id, attempt.attempt))
            self.terminations.expect_to_leave(child)
            failpoints.at("supervisor.acknowledged")

    def _start(self, claim: Claim, child: ChildHandle, *, claimed: bool) -> None:
        if not claimed:
            self.scheduler.queue_changed = True
            if not self.scheduler.is_passing_over:
                self.recovery.repeat()  # our picture of the slots may be wrong
            return
        assert child.peer is not None  # noqa: S101 - an idle child has one
        self.recovery.unordered.discard(claim.attempt)
        if child.handle is not None and child.handle.is_dead():  # since the claim was composed: nothing has begun
            self.recovery.not_started.add(claim.attempt)
            return
        due, attempt = claim.due, claim.attempt
        run_place = self.sources.send(child.peer, claim.assignment())
        child.begin(claim, run_place, child.peer.channel.queued_bytes, self.clock.monotonic())
        failpoints.at("supervisor.ordered")
        log.info("task %d (%s) started, attempt %d, PID %d", attempt.id, due.name, attempt.attempt, child.ref.pid)

    def due_at(self) -> float | None:
        """Return when decisions that are not written yet can be written, monotonic."""
        if self.recovery.ends or self.recovery.not_started:
            return self.backoff.until
        moments = []
        for child in self.children.running():
            is_ordered = child.termination is not None and child.termination.unsent
            if child.end is not None or child.undelivered or is_ordered or child.suspension_unsaved:
                return self.backoff.until
            if child.note.tells_progress:  # signs of life and usage go with whatever is written next
                moments.append(max(self._telemetry_at, self.backoff.until))
        return min(moments, default=None)

    def _put_off(self, error: BgSupervisorError, now: float) -> None:
        self.scheduler.queue_changed = True
        self.backoff.write_failed(error, now)
        # guard: a suspended child that may hold the database lock is resumed
        if self.backoff.is_long and is_locked(error):
            self.suspensions.resume_for_the_database()


def _log_end(attempt: Attempt, name: str, end: AttemptResult) -> None:
    """Log an end; one line for each that is not DONE, in a form that a log shipper can read (docs/operating.md)."""
    if end.reason is None:
        log.info("task %d (%s) ended: DONE", attempt.id, name)
        return
    log.log(
        logging.INFO if end.reason.wanted else logging.ERROR,
        "task ended: id=%d name=%s attempt=%d status=INTERRUPTED reason=%s detail=%s",
        attempt.id,
        quoted(name),
        attempt.attempt,
        end.reason,
        escaped(json.dumps(end.detail or "", ensure_ascii=False)),
    )


def _pause_before(batch: Batch) -> None:
    if batch.claims:
        failpoints.at("supervisor.claiming")
    if batch.ends:
        failpoints.at("supervisor.ending")
    if batch.unclaims:
        failpoints.at("supervisor.unclaiming")
    if batch.intended_ends:
        failpoints.at("supervisor.condemning")


def _pause_after(batch: Batch) -> None:
    if batch.ends:
        failpoints.at("supervisor.ended")
    if batch.unclaims:
        failpoints.at("supervisor.unclaimed")
    if batch.intended_ends:
        failpoints.at("supervisor.condemned")
    if batch.returns:
        failpoints.at("supervisor.granted")
