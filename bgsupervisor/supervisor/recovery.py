"""What the rows say of running tasks, compared with the children that are known: adopt, or find out about."""

from __future__ import annotations

import dataclasses
import enum
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

__all__ = ["ChildVerdict", "Recovery", "RowVerdict", "judge_child", "judge_row"]

log = logging.getLogger("bgsupervisor")

PASSED_OVER_MAX = 1000
"""Limit of the rows that are named in the log because they cannot be read."""


class RowVerdict(enum.Enum):
    """What a START row without an end is."""

    LOCAL = "its process can be compared with the children"
    FOREIGN = "its process cannot be seen from here; its slot stays taken"
    NOT_STARTED = "its claim was committed, and no child was given it"


class ChildVerdict(enum.Enum):
    """What the child that a row names has to do with it."""

    STRANGER = "no child of ours"
    BUSY = "known to run it, or not done with another attempt"
    NOT_STARTED = "waits for an attempt, so it has begun none"
    RUNS = "runs it, and no attempt of it is known yet"


def judge_row(
    record: TaskRecord, own: ProcessIdentity, *, is_unordered: bool, silent_s: float, lease_s: float
) -> AttemptResult | RowVerdict:
    """Return how an attempt has ended, as far as its row alone proves that, or what the row is.

    Args:
        record: A START row.
        own: The supervisor's process.
        is_unordered: The claim may or may not have been committed, and no child was given it.
        silent_s: How long nothing was heard of the attempt; infinite if nothing ever was.
        lease_s: The limit of that for a process of another PID namespace, which cannot be seen.
    """
    if None in (record.start_ticks, record.boot_id, record.pid_ns) or not record.pid or record.pid < 0:
        return AttemptResult(reason=Reason.VANISHED, detail="the row names no process; it was written by hand")
    if record.boot_id != own.boot_id:
        detail = "the machine was started anew while the task ran (its boot id differs)"
        return AttemptResult(reason=Reason.HOST_REBOOTED, detail=detail)
    if record.pid_ns != own.pid_ns:
        # A suspended task is silent; once it is resumed or cancelled, silence counts.
        may_be_silent = record.suspend_requested_at is not None and record.cancel_requested_at is None
        if silent_s > lease_s and not may_be_silent:
            detail = f"its container (another PID namespace) was silent for over {lease_s:g} s (lease_s)"
            return AttemptResult(reason=Reason.HOST_LOST, detail=detail)
        return RowVerdict.FOREIGN
    # Whatever host name the row has: a SQLite file has only ever been used on this one.
    return RowVerdict.NOT_STARTED if is_unordered else RowVerdict.LOCAL


def judge_child(child: ChildHandle, attempt: Attempt, *, is_stranger: bool) -> ChildVerdict:
    """Return what the child that the row of *attempt* names has to do with it."""
    if is_stranger:
        return ChildVerdict.STRANGER
    if child.attempt is not None or child.says not in (None, attempt):
        return ChildVerdict.BUSY
    return ChildVerdict.NOT_STARTED if child.idle else ChildVerdict.RUNS


class Recovery:
    """Compares all START rows; its attributes hold what it decides until that is written.

    Attributes:
        ends: Attempts that no process runs any more, and how they ended.
        not_started: Attempts that were claimed for a child, and that it has not begun.
        unordered: Attempts whose claim may be committed, or may not; no child has been given them.
        foreign_slots: Slots taken by rows that this supervisor cannot judge.
        names: The name of each task that had a START row at the last comparison.
        done_once: Every row has been compared since the start; before that nothing may be admitted.
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
        """Pass over rows whose attempt cannot be read, for no end can be written to them; log each once."""
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
        verdict = judge_row(
            record,
            self._own,
            is_unordered=attempt in self.unordered,
            silent_s=self._silent_s(record),
            lease_s=self.config.lease_s,
        )
        if isinstance(verdict, AttemptResult):
            self.ends[attempt] = verdict
        elif verdict is RowVerdict.NOT_STARTED:
            self.not_started.add(attempt)
        elif verdict is RowVerdict.LOCAL:
            ref = ProcessRef(record.pid or 0, record.start_ticks or 0)
            # guard: running bodies are adopted
            self._adopt(self._children.meet(self.identity_of(ref)), record)
        elif record.slot is not None:
            self.foreign_slots.add(record.slot)

    def identity_of(self, ref: ProcessRef) -> ProcessIdentity:
        """Return the identity of a process of this host, boot and PID namespace."""
        return dataclasses.replace(self._own, pid=ref.pid, start_ticks=ref.start_ticks)

    def _adopt(self, child: ChildHandle, record: TaskRecord) -> None:
        attempt = Attempt(record.id, record.attempt)
        if child.handle is None and child.dead_since is None:
            self._children.look_again(child)
        self._children.recognise(child)
        verdict = judge_child(child, attempt, is_stranger=self._children.is_stranger(child))
        if verdict is ChildVerdict.STRANGER:
            detail = f"its row names PID {child.ref.pid}, which bgsupervisor did not start; it was written by hand"
            self.ends[attempt] = AttemptResult(reason=Reason.VANISHED, detail=detail)
            return
        if child.attempt == attempt:
            child.slot = record.slot  # it may have given it to others, or taken one again
        if verdict is ChildVerdict.BUSY:
            return  # if its last end is on the way, the next comparison sees that
        if verdict is ChildVerdict.NOT_STARTED:
            self.not_started.add(attempt)
        else:
            log.info(
                "task %d (%s), attempt %d, is run by PID %d; looking after it",
                *(attempt.id, record.name, attempt.attempt, child.ref.pid),
            )
        child.attempt, child.name, child.slot = attempt, record.name, record.slot
        child.started_at = self._clock.attended(record.started_mono or self._clock.machine_monotonic())
        child.says = child.leave_by = None
        child.to_be_suspended = record.suspend_requested_at is not None
        child.suspension = Suspension(record.suspended_at, record.suspended_mono, record.suspended_s or 0.0)
        child.suspension_unsaved = child.suspension.lasts  # the commit may have been an earlier supervisor's last act
        # guard: an ending that an earlier supervisor began continues
        if record.ending is not None and child.termination is None:
            self._resume_termination(child, record, record.ending)

    def _resume_termination(self, child: ChildHandle, record: TaskRecord, ending: Reason) -> None:
        """Continue the termination of an earlier supervisor: its reason is in the row, so it must come true."""
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
