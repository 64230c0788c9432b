"""What is known of tasks and supervisors at one moment, beside the rows that a command shows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bgsupervisor.cli.display import waiting
from bgsupervisor.cli.display.output import by
from bgsupervisor.cli.display.rows import Rows, Ties
from bgsupervisor.cli.display.supervisors import Supervisors, identity_in, verdict_of
from bgsupervisor.cli.display.text import duration
from bgsupervisor.statuses import Status
from bgsupervisor.system import processes
from bgsupervisor.system.processes import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from bgsupervisor.cli.display.rows import Cause
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["Counts", "Snapshot"]

SILENT_BEATS = 3
"""Heartbeats that a child may miss before it counts as unresponsive."""
DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is known at one moment, beside the rows of the tasks.

    Attributes:
        now: The moment.
        monotonic: The same on the monotonic clock, of the boot *boot_id*.
        boot_id: This boot; None where the system does not report it.
        supervisors: The supervisors.
        silent_s: Silence from which a child is unresponsive, in seconds.
        positions: Places of the tasks that may start, by id.
        causes: What the live tasks wait for, by id.
        busy: How many slots are taken.
        others: The tasks that the explained one waits for, by id.
        arrived: How many are at the barrier at which the explained task waits, and how many must be, by its name.
    """

    now: datetime
    monotonic: float
    boot_id: str | None
    supervisors: Supervisors
    silent_s: float
    positions: Mapping[int, int] = field(default_factory=dict)
    causes: Mapping[int, Sequence[Cause]] = field(default_factory=dict)
    busy: int = 0
    others: Mapping[int, TaskRecord] = field(default_factory=dict)
    arrived: Mapping[str, tuple[int, int] | None] = field(default_factory=dict)

    @classmethod
    def take(cls, service: Service, **read: Any) -> Snapshot:  # noqa: ANN401 - fields of several kinds
        """Read the clocks and the supervisors; *read* holds the fields that came from the tasks' transaction."""
        clock, boot_id = service.ledger.clock, None
        with contextlib.suppress(OSError):
            boot_id = processes.boot_id()
        supervisors = Supervisors.read(service)
        return cls(
            now=supervisors.now,
            monotonic=clock.monotonic(),
            boot_id=boot_id,
            supervisors=supervisors,
            silent_s=SILENT_BEATS * service.config.heartbeat_s,
            **read,
        )

    @classmethod
    def around(cls, record: TaskRecord, service: Service) -> Snapshot:
        """Read also all that explains why one task waits."""
        rows, ties = Rows(store=service.ledger.store, now=service.ledger.clock.now()), Ties(service.ledger.store)
        causes = ties.causes([record])
        waits = waiting.gathered(causes.get(record.id, ()))
        others = rows.of({id for wait in waits for id in (*wait.ids, *wait.held_by)})
        return cls.take(
            service,
            positions=rows.positions(),
            causes=causes,
            busy=rows.busy(),
            others={other.id: other for other in others},
            arrived={wait.name: ties.arrived(record.id, wait.name) for wait in waits if wait.kind == "barrier"},
        )

    def waits(self, record: TaskRecord) -> list[waiting.WaitReason]:
        """Return what a task waits for, or must come after."""
        return waiting.gathered(self.causes.get(record.id, ()))

    def derived(self, record: TaskRecord) -> dict[str, Any]:
        """Return the keys of JSON that are no columns."""
        return {
            "waiting_for": waiting.as_json(self.causes.get(record.id, ())),
            "unresponsive": self.is_unresponsive(record),
            "unreadable": list(record.unreadable),
        }

    def is_unresponsive(self, record: TaskRecord) -> bool:
        """Whether a supervisor listens, can write, and has not heard a running child for too long."""
        return bool(self.supervisors.alive) and self._silence(record) is not None

    def silence(self, record: TaskRecord) -> str:
        """Describe a running child that was not heard for too long; "" if it was heard."""
        silent_for = self._silence(record)
        if silent_for is None:
            return ""
        words = duration(silent_for.total_seconds())
        if self.supervisors.alive:
            return f"unresponsive {words}"
        return "its process is gone" if verdict_of(identity_in(record)) is Verdict.DEAD else f"last heard {words} ago"

    def _silence(self, record: TaskRecord) -> timedelta | None:
        if record.status is not Status.START or record.heartbeat_at is None or record.slot is None:
            return None  # a body that waits reports little
        if record.suspended_at is not None:
            return None  # and a suspended one nothing
        limit = timedelta(seconds=self.silent_s)
        written_at = self.supervisors.written_at(record.host)
        # guard: silence counts only while heartbeats can be written
        if written_at is not None and written_at - record.heartbeat_at <= limit:
            return None  # no child's later heartbeat could be written: the database is locked or away
        silent_for = self.now - record.heartbeat_at
        return silent_for if silent_for > limit else None

    def suspension(self, record: TaskRecord) -> str:
        """Describe the suspension of a running task, or the request for one; "" about any other."""
        if record.status is not Status.START or (record.suspended_at is None and record.suspend_requested_at is None):
            return ""
        asked = by(record.suspend_requested_by)
        suspended_for_s = self.suspended_for_s(record)
        if suspended_for_s is None:
            return f"suspend requested{asked}"
        return f"suspended{asked} for {duration(suspended_for_s)}"

    def suspended_for_s(self, record: TaskRecord) -> float | None:
        """Return how long a task has been suspended, None if it is not."""
        return self._since_s(record, record.suspended_at, record.suspended_mono)

    def runtime_s(self, record: TaskRecord) -> float | None:
        """Return how long the attempt has run or ran, None if it has not started."""
        monotonic = None if record.ended or record.boot_id != self.boot_id else record.started_mono
        if record.started_at is not None and record.ended_at is not None and monotonic is None:
            return (record.ended_at - record.started_at).total_seconds()
        return self._since_s(record, record.started_at, monotonic)

    def _since_s(self, record: TaskRecord, moment: datetime | None, monotonic: float | None) -> float | None:
        if moment is not None and monotonic is not None and record.boot_id == self.boot_id:
            return self.monotonic - monotonic  # right also after the clock was set
        return None if moment is None else (self.now - moment).total_seconds()

    def state(self, id: int) -> str:
        """Describe another task: its status, its progress, and how long it has run."""
        other = self.others.get(id)
        if other is None:
            return "gone"
        words = [str(other.status) + (f" / {other.reason}" if other.reason is not None else "")]
        if other.status is Status.START:
            words[0] += "" if other.fraction is None else f" {percent(other.fraction)}%"
            runtime_s = self.runtime_s(other)
            words += [] if runtime_s is None else [f"running for {duration(runtime_s)}"]
            words += [suspension] if (suspension := self.suspension(other)) else []
        return ", ".join(words)


def percent(fraction: float) -> int:
    """Return whole percents; 100 only for what is complete."""
    return int(fraction * 100)


@dataclass(frozen=True, slots=True)
class Counts:
    """How many tasks there are; small indexes answer, while all rows would take a second per million.

    Attributes:
        live: By status, REQUEST and START.
        waiting: How many of those that run wait for others, without a slot.
        ended: Those that ended within a day, by status.
    """

    live: dict[Status, int]
    waiting: int
    ended: dict[Status, int]

    @classmethod
    def read(cls, service: Service, *, now: datetime) -> Counts:
        """Count them."""
        ledger = service.ledger
        return cls(ledger.live_counts(), ledger.waiting_count(), ledger.ended_counts(now - DAY))
