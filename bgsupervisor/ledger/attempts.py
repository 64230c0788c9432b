"""Attempts: what the ledger returns about them, what a supervisor writes about them, and what came of it."""

from __future__ import annotations

import dataclasses
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple

from bgsupervisor.database.values import read_text
from bgsupervisor.ipc.messages import AttemptResult, Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from bgsupervisor.ledger.records import SupervisorRecord
    from bgsupervisor.statuses import Reason
    from bgsupervisor.system.processes import ProcessIdentity

__all__ = [
    "Attempt",
    "Batch",
    "BatchResult",
    "Claim",
    "ControlRequest",
    "DueTask",
    "IntendedEnd",
    "SlotGrant",
    "Suspension",
    "Telemetry",
]

ATTEMPT_MAX = 2**31 - 1
"""No attempt comes after this one: PostgreSQL's columns hold no larger number."""
ID_MAX = 2**63 - 1
"""The largest number that a row can have; databases take no larger one even to look for."""


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Attempt:
    """One try at a task: the fencing token that every compare-and-set names."""

    id: int
    attempt: int


@dataclasses.dataclass(frozen=True, slots=True)
class DueTask:
    """A REQUEST row that may start now; `attempt` is the one before.

    Attributes:
        flaw: What cannot be read of the row, as a sentence: it can only be interrupted. Else None.
    """

    id: int
    attempt: int
    name: str
    data: str
    key: str | None
    parent_id: int | None = None
    flaw: str | None = None

    @classmethod
    def of(cls, row: Sequence[Any]) -> DueTask:
        """Make one of what a row holds, which in SQLite can be anything."""
        id, attempt, name, data, key, parent_id = row
        is_attempt = isinstance(attempt, int) and 0 <= attempt < ATTEMPT_MAX
        sound = {
            "attempt": is_attempt,
            "name": isinstance(name, str),
            "data": isinstance(data, str),
            "key": isinstance(key, str | int | None),
            "parent_id": parent_id is None or (isinstance(parent_id, int) and 0 < parent_id <= ID_MAX),
        }
        held = dict(zip(sound, row[1:], strict=True))
        flaw = next((_flaw(column, held[column]) for column in sound if not sound[column]), None)
        key = None if key is None else read_text(key)
        return cls(id, attempt, read_text(name), read_text(data), key, parent_id, flaw)


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A due task, the child that is to run it and the slot it takes."""

    due: DueTask
    identity: ProcessIdentity
    slot: int
    started_mono: float

    @property
    def attempt(self) -> Attempt:
        """The attempt that the claim begins."""
        return Attempt(self.due.id, self.due.attempt + 1)

    def assignment(self) -> Run:
        """Return the message that assigns the task to the child."""
        due = self.due
        return Run(
            id=due.id,
            attempt=self.attempt.attempt,
            name=due.name,
            data=due.data,
            key=due.key,
            parent_id=due.parent_id,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class IntendedEnd:
    """Why an attempt is being ended, recorded before the first signal is sent."""

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True, slots=True)
class ControlRequest:
    """What people want of a running attempt."""

    attempt: Attempt
    cancelled: bool
    cancelled_by: str | None
    suspended: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Suspension:
    """How long an attempt has been suspended.

    Attributes:
        since: Since when it is; None if it is not.
        since_mono: The same, monotonic.
        total_s: How long it was before.
    """

    since: datetime | None = None
    since_mono: float | None = None
    total_s: float = 0.0

    @property
    def lasts(self) -> bool:
        """Whether it is suspended."""
        return self.since_mono is not None

    def ended(self, now_mono: float) -> Suspension:
        """Return what it comes to if it goes on now."""
        return Suspension(total_s=self.total_s + max(0.0, now_mono - (self.since_mono or now_mono)))


@dataclasses.dataclass(slots=True)
class Telemetry:
    """What is known of a running attempt at the moment; None leaves the column as it is."""

    heartbeat_at: datetime | None = None
    progress_done: float | None = None
    progress_total: float | None = None
    message: str | None = None
    cpu_s: float | None = None
    cpu_percent: float | None = None
    rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    stack: str | None = None

    def __bool__(self) -> bool:
        """Whether anything is known; called hundreds of times in every pass."""
        return self != _NOTHING_NEW

    @property
    def tells_progress(self) -> bool:
        """Whether there is something that a person may be waiting to see."""
        return (self.progress_done, self.progress_total, self.message) != (None, None, None)


_NOTHING_NEW = Telemetry()


class SlotGrant(NamedTuple):
    """A slot for an attempt that has waited; `number` is the wait after which it wants it."""

    number: int
    slot: int


@dataclasses.dataclass(slots=True)
class Batch:
    """All that one pass of the supervisor writes; applied in this order, in one transaction."""

    ends: dict[Attempt, AttemptResult] = dataclasses.field(default_factory=dict)
    unclaims: set[Attempt] = dataclasses.field(default_factory=set)
    flawed: list[DueTask] = dataclasses.field(default_factory=list)
    intended_ends: dict[Attempt, IntendedEnd] = dataclasses.field(default_factory=dict)
    suspensions: dict[Attempt, Suspension] = dataclasses.field(default_factory=dict)
    telemetry: dict[Attempt, Telemetry] = dataclasses.field(default_factory=dict)
    returns: dict[Attempt, SlotGrant] = dataclasses.field(default_factory=dict)
    claims: list[Claim] = dataclasses.field(default_factory=list)
    supervisor: SupervisorRecord | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.claims or self._others)

    @property
    def only_claims(self) -> bool:
        """Whether it can be written by one statement."""
        return bool(self.claims and not self._others)

    @property
    def _others(self) -> bool:
        rows = self.ends or self.unclaims or self.intended_ends or self.suspensions or self.telemetry or self.returns
        return bool(rows or self.flawed or self.supervisor)


@dataclasses.dataclass(slots=True)
class BatchResult:
    """What a batch changed; another process had decided what is missing here.

    `passed_over` are claims of rows that were locked; they still wait, and can be claimed later.
    """

    ended: set[Attempt] = dataclasses.field(default_factory=set)
    unclaimed: set[Attempt] = dataclasses.field(default_factory=set)
    struck: set[int] = dataclasses.field(default_factory=set)
    intended_ends: set[Attempt] = dataclasses.field(default_factory=set)
    suspensions: set[Attempt] = dataclasses.field(default_factory=set)
    claimed: list[Claim] = dataclasses.field(default_factory=list)
    passed_over: list[Claim] = dataclasses.field(default_factory=list)
    returned: set[Attempt] = dataclasses.field(default_factory=set)
    keys: list[str] = dataclasses.field(default_factory=list)


def _flaw(column: str, held: object) -> str:
    kinds = {bytes: "a BLOB", int: "a number out of range", float: "a fraction", str: "a text", NoneType: "NULL"}
    return f"column {column} holds {kinds.get(type(held), type(held).__name__)}"
