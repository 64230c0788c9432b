"""What the rows say of running tasks, compared with the children that are known: adopt, or find out about."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import AttemptResult, ProcessRef
from bgsupervisor.ledger.attempts import Attempt, Suspension
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.termination import Termination

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.config import Config
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.supervisor.children import ChildHandle, Children
    from bgsupervisor.supervisor.events import EventSources
    from bgsupervisor.system.processes import ProcessIdentity

__all__ = ["Recovery"]

log = logging.getLogger("bgsupervisor")

PASSED_OVER_MAX = 1000
"""Limit of the rows that are named in the log because they cannot be read."""


class Recovery:
    """Goes through all START rows; what it decides stands in its attributes until it is written.

    Attributes:
        ends: Attempts that nobody runs any more, and how they ended.
        not started: Attempts that were claimed for a child which says that it began nothing.
        unordered: Attempts whose claim may be committed, or may not; no child has been given the order.
        foreign_slots: Slots held by rows that this supervisor cannot judge.
        names: The name of each task that had a START row at the last look.
        done_once: Every row has been looked at since the start; before that nothing may be admitted.
        due_at: When all rows are compared again, monotonic.
    """

    def __init__(
        self, config: Config, own: ProcessIdentity, children: Children, sources: EventSources, clock: AttendedClock
    ) -> None:
        self.config = config
        self._own = own
        self._children = children
        self._sources = sources
        self._clock = clock
        self.ends: dict[Attempt, AttemptResult] = {}
        self.not_started: set[Attempt] = set()
        self.unordered: set[Attempt] = set()
        self.foreign_slots: set[int] = set()
        self.names: dict[Attempt, str] = {}
        self.done_once = False
        self.due_at = 0.0
        self._passed_over: set[int] = set()

    def repeat(self) -> None:
        """Compare all rows again in the next pass."""
        self.due_at = 0.0

    def compare(self, records: Iterable[TaskRecord]) -> None:
        """Take in all START rows as they are now."""
        self.foreign_slots = set()
        records = list(records)
        self._pass_over(record for record in records if "attempt" in record.unreadable)
        rows = {Attempt(one.id, one.attempt): one for one in records if "attempt" not in one.unreadable}
        self.names = {attempt: record.name for attempt, record in rows.items()}
        for child in self._children:
            self._drop_ended(child, rows.keys())  # first: a reused child may be at its next attempt already
        for record in rows.values():
            self._compare_row(record)
        for child in self._children:
            self._compare_child(child, rows.keys())
        self.done_once = True

    def _pass_over(self, records: Iterable[TaskRecord]) -> None:
        """Leave alone the rows that no end can be written to, because their attempt cannot be named; say so once."""
        for record in records:
            if record.slot is not None:
                self.foreign_slots.add(record.slot)
            if record.id not in self._passed_over and len(self._passed_over) < PASSED_OVER_MAX:
                self._passed_over.add(record.id)
                log.error(
                    "task %d (%s) is passed over: its row cannot be read: attempt is no number", record.id, record.name
                )

    def _compare_row(self, record: TaskRecord) -> None:
        attempt = Attempt(record.id, record.attempt)
        if None in (record.start_ticks, record.boot_id, record.pid_ns) or not record.pid or record.pid < 0:
            self.ends[attempt] = AttemptResult(
                reason=Reason.VANISHED, detail="the row names no process; it was written by hand"
            )
        elif record.boot_id != self._own.boot_id:
            detail = "the machine was started anew while the task ran (its boot id differs)"
            self.ends[attempt] = AttemptResult(reason=Reason.HOST_REBOOTED, detail=detail)
        elif record.pid_ns != self._own.pid_ns:
            self._judge_by_lease(record)
        elif attempt in self.unordered:
            self.not_started.add(attempt)
        else:
            # Whatever host name the row has: a SQLite file has only ever been used on this one.
            ref = ProcessRef(record.pid, record.start_ticks or 0)
            # guard: running bodies are adopted
            self._adopt(self._children.meet(self.identity_of(ref)), record)

    def identity_of(self, ref: ProcessRef) -> ProcessIdentity:
        """Return who a process of this host, boot and PID namespace is."""
        return dataclasses.replace(self._own, pid=ref.pid, start_ticks=ref.start_ticks)

    def _adopt(self, child: ChildHandle, record: TaskRecord) -> None:
        attempt = Attempt(record.id, record.attempt)
        if child.handle is None and child.dead_since is None:
            self._children.look_again(child)
        self._children.recognise(child)
        if self._children.is_stranger(child):
            detail = f"its row names PID {child.ref.pid}, which bgsupervisor did not start; it was written by hand"
            self.ends[attempt] = AttemptResult(reason=Reason.VANISHED, detail=detail)
            return
        if child.attempt == attempt:
            child.slot = record.slot  # it may have given it to others, or taken one again
        if child.attempt is not None or (child.says is not None and child.says != attempt):
            return  # known, or its last end is on the way: the next look will tell
        if child.says is None and child.idle:
            self.not_started.add(attempt)
        if child.says is not None or not child.idle:
            log.info(
                "task %d (%s), attempt %d, is run by PID %d; looking after it",
                *attempt_of(attempt, record),
                child.ref.pid,
            )
        child.attempt, child.name, child.slot = attempt, record.name, record.slot
        child.started_at = self._clock.attended(record.started_mono or self._clock.machine_monotonic())
        child.says = child.leave_by = None
        child.to_be_suspended = record.suspend_requested_at is not None
        child.suspension = Suspension(record.suspended_at, record.suspended_mono, record.suspended_s or 0.0)
        child.suspension_unsaved = child.suspension.lasts  # the commit may have been an earlier supervisor's last act
        # guard: an ending that an earlier supervisor began continues
        if record.ending is not None and child.termination is None:
            self._resume_order(child, record, record.ending)

    def _resume_order(self, child: ChildHandle, record: TaskRecord, ending: Reason) -> None:
        """Go on ending what an earlier supervisor was ending: its reason stands in the row, so it must come true."""
        why = (record.detail or str(ending)).partition("; ")[0]
        # The signal that was recorded may not have been sent: after another grace it is, and only then a stronger one.
        next_at = self._clock.monotonic() + self.config.grace_s
        child.termination = Termination(ending, why, record.cancel_requested_by, next_at)

    def _drop_ended(self, child: ChildHandle, running: Collection[Attempt]) -> None:
        if child.attempt is not None and child.attempt not in running and child.end is None:
            says = child.says
            child.become_free()  # the child has recorded its end itself
            child.says = says

    def _compare_child(self, child: ChildHandle, running: Collection[Attempt]) -> None:
        if child.says is None or child.says in running:
            return
        if child.end is not None and child.peer is not None:
            self._sources.send(child.peer, messages.Ack(child.says.id, child.says.attempt))  # recorded or superseded
        if child.end is not None or child.dead_since is not None:
            child.become_free()
        else:
            log.warning(
                "PID %d runs task %d, attempt %d, but the row says otherwise",
                child.ref.pid,
                child.says.id,
                child.says.attempt,
            )

    def _judge_by_lease(self, record: TaskRecord) -> None:
        """A row of another PID namespace (a container that was restarted) is judged by its silence, not by its PID.

        The silence of one that is suspended says nothing; once somebody has resumed or cancelled it, it does.
        """
        may_be_silent = record.suspend_requested_at is not None and record.cancel_requested_at is None
        if self._silent_s(record) > self.config.lease_s and not may_be_silent:
            detail = f"its container (another PID namespace) was silent for over {self.config.lease_s:g} s (lease_s)"
            self.ends[Attempt(record.id, record.attempt)] = AttemptResult(reason=Reason.HOST_LOST, detail=detail)
        elif record.slot is not None:
            self.foreign_slots.add(record.slot)

    def _silent_s(self, record: TaskRecord) -> float:
        """Return for how long a task has not been heard of, infinite if never.

        The wall clock alone would take a step of it, or the sleep of a suspended machine, for silence. Of the same boot
        is the monotonic time of the claim; so a silence counts that both clocks have seen.
        """
        seen = record.heartbeat_at or record.started_at
        if seen is None:
            return math.inf
        silent_s = (self._clock.now() - seen).total_seconds()
        if record.started_mono is None or record.started_at is None:
            return silent_s
        age_s = self._clock.machine_monotonic() - record.started_mono
        return min(silent_s, age_s - (seen - record.started_at).total_seconds())


def attempt_of(attempt: Attempt, record: TaskRecord) -> tuple[int, str, int]:
    """Return what a line of the log names a running task by."""
    return attempt.id, record.name, attempt.attempt
