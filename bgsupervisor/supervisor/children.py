"""The children of a supervisor, also those that an earlier one started; decides nothing, writes no rows."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import os
from typing import TYPE_CHECKING

from bgsupervisor.ipc.messages import ProcessRef
from bgsupervisor.ledger.attempts import Attempt, Suspension, Telemetry
from bgsupervisor.system import logs, processes, stacks
from bgsupervisor.system.oom import OomWatch
from bgsupervisor.system.processes import ProcessIdentity, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.messages import AttemptResult, ChildHello
    from bgsupervisor.ledger.attempts import Claim
    from bgsupervisor.supervisor.events import EventSources, Peer
    from bgsupervisor.supervisor.termination import Termination
    from bgsupervisor.system.oom import Counters
    from bgsupervisor.system.processes import ProcessHandle
    from bgsupervisor.system.stacks import Question

__all__ = ["ChildHandle", "ChildState", "Children"]


STRANGER_S = 10.0
"""How long a process that only a row names has to prove that it is a child of ours, in seconds."""


class ChildState(enum.Enum):
    """What a child does, as far as is known."""

    STARTING = "has not reported yet that it waits for an attempt"
    IDLE = "waits for an attempt"
    RUNNING = "runs an attempt"
    ENDED = "its attempt has ended, and that is not recorded yet"
    LEAVING = "should leave, and is killed if it does not"
    DEAD = "its process has ended"


@dataclasses.dataclass(eq=False, slots=True)
class ChildHandle:
    """A child as the supervisor sees it.

    Attributes:
        handle: Its pidfd; None where there is none (UNKNOWN), then only its row and its messages are known.
        vouched: It is known to be a child of ours, and not only from a row, which anybody may have written.
        met_at: Since when it is known.
        attempt: What it runs, as rows have it.
        says: What it reports that it runs, until the rows are compared.
        ready: It has reported that it waits for an attempt, and has been given none since.
        run_place: Where its assignment begins in what its channel has written; None once the child reports on it.
        run_end: Where its assignment ends.
        end: How its attempt ended, until that is recorded.
        dead_since: When its death was seen.
        note: What is known and not yet written.
        leave_by: When it is killed if it has not left by itself.
        wants_slot: The number of the wait after which it wants a slot again.
        started_at: When its attempt was claimed; attended, as all moments here.
        got_on_at: When the body last reported progress, or may have.
        to_be_suspended: Its suspension is requested.
        suspension: Whether it is suspended, and how long it has been.
        suspension_unsaved: The row does not have that yet; the child is stopped after the commit.
        question: Its stack was asked for, because its time is up.
        question_by: Until when its answer is awaited.
        stack: What it answered.
    """

    identity: ProcessIdentity
    handle: ProcessHandle | None
    vouched: bool = False
    met_at: float = 0.0
    fork_server: ProcessRef | None = None
    peer: Peer | None = None
    attempt: Attempt | None = None
    name: str = ""
    slot: int | None = None
    started_at: float = 0.0
    says: Attempt | None = None
    ready: bool = False
    run_place: int | None = None
    run_end: int = 0
    end: AttemptResult | None = None
    dead_since: float | None = None
    termination: Termination | None = None
    note: Telemetry = dataclasses.field(default_factory=Telemetry)
    oom: Counters | None = None
    cpu_seen: tuple[float, float] | None = None
    peak_rss_bytes: int = 0
    leave_by: float | None = None
    wants_slot: int | None = None
    got_on_at: float = 0.0
    to_be_suspended: bool = False
    suspension: Suspension = dataclasses.field(default_factory=Suspension)
    suspension_unsaved: bool = False
    question: Question | None = None
    question_by: float = 0.0
    stack: str | None = None

    @property
    def ref(self) -> ProcessRef:
        """Its PID and start ticks."""
        return ProcessRef(self.identity.pid, self.identity.start_ticks)

    @property
    def state(self) -> ChildState:
        """What it does; derived from the attributes."""
        if self.dead_since is not None:
            return ChildState.DEAD
        if self.end is not None:
            return ChildState.ENDED
        if self.attempt is not None or self.says is not None:
            return ChildState.RUNNING
        if self.leave_by is not None:
            return ChildState.LEAVING
        return ChildState.IDLE if self.ready else ChildState.STARTING

    @property
    def target(self) -> ProcessHandle | None:
        """Where signals for it go; None if it cannot be held, or is perhaps no child of ours."""
        return self.handle if self.vouched else None

    @property
    def connected(self) -> bool:
        """Whether messages can be sent to it."""
        return self.peer is not None and not (self.peer.channel.closed or self.peer.channel.broken)

    @property
    def idle(self) -> bool:
        """Whether it can be given an attempt."""
        return self.state is ChildState.IDLE and self.connected

    @property
    def undelivered(self) -> bool:
        """Whether it surely did not read its assignment whole, and never will."""
        if self.run_place is None or self.peer is None or self.connected:
            return False
        channel = self.peer.channel
        # guard, always: only an order that was surely not read is given back
        has_not_left = channel.written_bytes <= self.run_place
        # Something was unread when the child closed the connection, and the order was the last that was sent.
        return has_not_left or (channel.reset and channel.queued_bytes == self.run_end)

    def connect(self, peer: Peer, hello: ChildHello) -> None:
        """Take up a connection; what was sent by an earlier one is not measured by what this one has written."""
        self.peer, self.fork_server, self.ready = peer, hello.fork_server, hello.id is None
        self.run_place = None if hello.id is not None else self.run_place

    def begin(self, claim: Claim, run_place: int, run_end: int, now: float) -> None:
        """Take up an attempt that was claimed for it; *now* is attended."""
        self.ready = False
        self.attempt, self.name, self.slot = claim.attempt, claim.due.name, claim.slot
        self.started_at = self.got_on_at = now
        self.run_place, self.run_end, self.suspension = run_place, run_end, Suspension()

    def become_free(self) -> None:
        """Forget the attempt; `Suspensions` resumes a child that is still suspended for it."""
        self.attempt = self.says = self.end = self.termination = self.slot = self.run_place = self.cpu_seen = None
        self.note = Telemetry()
        self.wants_slot = None
        self.to_be_suspended = self.suspension_unsaved = False
        self.peak_rss_bytes = 0
        self.stack = None
        self.forget_question()

    def forget_question(self) -> None:
        """Wait no more for its stack."""
        if self.question is not None:
            self.question.close()
            self.question = None


class Children:
    """All children that are known, by PID and start ticks."""

    def __init__(self, sources: EventSources, logs_folder: Path, clock: Clock) -> None:
        self._sources = sources
        self._logs = logs_folder
        self._clock = clock
        self._all: dict[ProcessRef, ChildHandle] = {}
        self._named: set[ProcessRef] = set()
        self.oom = OomWatch()

    def __iter__(self) -> Iterator[ChildHandle]:
        return iter(list(self._all.values()))

    def __contains__(self, ref: ProcessRef) -> bool:
        return ref in self._all

    def get(self, ref: ProcessRef | None) -> ChildHandle | None:
        """Return one child, or None."""
        return None if ref is None else self._all.get(ref)

    def running(self) -> list[ChildHandle]:
        """Return those that have an attempt, ended but unrecorded ones included."""
        return [child for child in self._all.values() if child.attempt is not None]

    def by_attempt(self) -> dict[Attempt, ChildHandle]:
        """Return those that have an attempt, by it."""
        return {child.attempt: child for child in self._all.values() if child.attempt is not None}

    def taken_slots(self) -> set[int]:
        """Return the slots that stay taken when the ends that are known are recorded."""
        return {child.slot for child in self.running() if child.slot is not None and child.end is None}

    def meet(self, identity: ProcessIdentity) -> ChildHandle:
        """Adopt a process; one that cannot be found counts as dead since now."""
        ref = ProcessRef(identity.pid, identity.start_ticks)
        known = self._all.get(ref)
        if known is not None:
            return known
        child = ChildHandle(identity, None, vouched=ref in self._named, met_at=self._clock.monotonic())
        self._all[ref] = child
        self.look_again(child)
        return child

    def vouch_for(self, refs: Iterable[ProcessRef]) -> None:
        """Note that processes are children of ours: they dialled, or a fork server of ours names them."""
        for ref in refs:
            self._named.add(ref)
            if ref in self._all:
                self._all[ref].vouched = True

    def recognise(self, child: ChildHandle) -> None:
        """Vouch for a process that a row names if a fork server named it, it dialled, or its log is among ours."""
        child.vouched = child.vouched or child.ref in self._named or logs.is_own(self.log_of(child))

    def is_stranger(self, child: ChildHandle) -> bool:
        """Whether a living process that a row names is surely no child of ours.

        A child dials a new supervisor within a second, unless it is stopped or its link hangs; then it still has the
        memory in which it shows its stack. *Attended* seconds count, for the children may have been stopped as well.
        """
        if child.vouched or child.handle is None or child.dead_since is not None:
            return False
        pid = child.ref.pid
        if pid == os.getpid():
            return True
        if self._clock.monotonic() - child.met_at < STRANGER_S:
            return False
        try:
            if processes.owner_uid(pid) != os.geteuid():  # it may hide its state, and hold a slot with that
                return True
            return not processes.is_stopped(pid) and not stacks.can_answer(pid)
        except OSError:
            return False  # not to be seen: nothing is known of it

    def look_again(self, child: ChildHandle) -> None:
        """Judge a child that cannot be held; DEAD is dead, UNKNOWN stays as it is."""
        verdict, child.handle = processes.open_process(child.identity)
        # guard, is Verdict.DEAD -> is not Verdict.ALIVE: UNKNOWN is not DEAD
        if verdict is Verdict.DEAD:
            child.dead_since = self._clock.monotonic()
        elif child.handle is not None:
            self._sources.watch_process(child.ref, child.handle)
            child.oom = self.oom.counters_of(child.identity.pid)

    def forget(self, child: ChildHandle) -> None:
        """Forget a dead child, and remove its log if that is empty."""
        child.forget_question()
        self._named.discard(child.ref)
        self._sources.unwatch_process(child.ref)
        if child.handle is not None:
            child.handle.close()
        if child.peer is not None:
            self._sources.disconnect(child.peer)
        self._all.pop(child.ref, None)
        with contextlib.suppress(OSError):
            if self.log_of(child).stat().st_size == 0:
                self.log_of(child).unlink()

    def log_of(self, child: ChildHandle) -> Path:
        """Return the log that a child writes while it runs."""
        return logs.process_log(self._logs, child.ref.pid, child.ref.start_ticks)

    def keep_log(self, child: ChildHandle, attempt: Attempt, limit_bytes: int) -> None:
        """Name the log of a dead child after its task; a living child does so itself."""
        with contextlib.suppress(OSError):
            path = self.log_of(child)
            logs.bound(path, limit_bytes)
            if path.stat().st_size:
                path.rename(logs.task_log(self._logs, attempt.id, attempt.attempt))
