"""Cancels, and limits of time, memory and logs: which attempts to end, in stages, and with which reason."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import signal
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor import failpoints
from bgsupervisor.errors import NoStack
from bgsupervisor.ipc import messages
from bgsupervisor.sizes import compared, number
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.children import ChildState
from bgsupervisor.system import logs, process_tree
from bgsupervisor.system.stacks import ANSWER_S, Question

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.config import Config
    from bgsupervisor.ledger.attempts import ControlRequest
    from bgsupervisor.supervisor.children import ChildHandle, Children
    from bgsupervisor.supervisor.events import EventSources
    from bgsupervisor.supervisor.forkservers import ForkServers

__all__ = ["Stage", "Termination", "Terminations"]

log = logging.getLogger("bgsupervisor")

LIMITS_EVERY_S = 0.5
"""Interval between two checks of memory and log sizes while something runs, in seconds."""
LEAVE_SLACK_S = 5.0
"""Time beyond grace_s that a child has to leave after its end is recorded, in seconds; then it is killed."""
KILL_AGAIN_S = 2.0
"""A SIGKILL that has not brought death is sent again after grace_s, at least this long: it may have been lost with the
fork server that was to send it."""
KILL_WITHOUT_RECORD_S = 1.0
"""A kill whose reason cannot be recorded goes through the fork server after this long, and comes back with the exit."""
STALL_SLACK_S = 2.0
"""Delay of a stall beyond stall_s, in seconds: progress is reported only every `ALIVE_EVERY_S`."""
STALL_RETRY_S = 1.0
"""Interval between two reads of the rows that show whether silent bodies wait for others, in seconds."""
STACK_WAIT_S = 0.5
"""A body whose time is up gets SIGTERM this much later at the earliest, so that its stack can be kept."""
ANSWER_CHECK_S = 0.05
"""Interval between two checks for the answer to a question for a stack, in seconds."""
STACK_KEPT_CHARS = 65_536
"""A longer stack (100 threads) loses its end in the row."""


class Stage(enum.IntEnum):
    """How far the ending of an attempt had to go."""

    ASKED = 1
    TERM = 2
    KILL = 3


@dataclasses.dataclass(slots=True)
class Termination:
    """The decision to end an attempt before its end, carried out in stages.

    Attributes:
        next_at: When the next stage is due, monotonic.
        unsent: The signal of this stage waits for its reason to be committed.
        due_since: Since when it waits, monotonic.
    """

    reason: Reason
    why: str
    by: str | None
    next_at: float
    stage: Stage = Stage.ASKED
    unsent: bool = False
    due_since: float = 0.0

    def detail(self) -> str:
        """Return the sentence that is recorded: why, by whom, and how far it had to go."""
        how = {
            Stage.ASKED: "the body was asked to end",
            Stage.TERM: "the body did not end when asked, SIGTERM was sent",
            Stage.KILL: "SIGKILL was sent",
        }
        return f"{self.why}; {how[self.stage]}"


class Terminations:
    """Decides which attempts to end. Signals are sent by `carry_out`, after the reason has been committed."""

    def __init__(
        self, config: Config, children: Children, fork_servers: ForkServers, sources: EventSources, clock: AttendedClock
    ) -> None:
        self.config = config
        self._children = children
        self._fork_servers = fork_servers
        self._sources = sources
        self._clock = clock
        self._limits_at = 0.0
        self._usage_at = 0.0
        self._stalls_at = 0.0

    def enforce(self) -> None:
        """Apply the limits, and the stages that are due."""
        now = self._clock.monotonic()
        running = self._endable()
        for child in running:
            self._enforce_time(child, now)
        for child in self._children:  # in most of hundreds there is nothing to see to
            if child.question is not None or child.stack is not None:
                self._keep_stack(child, now)
        if running and now >= self._limits_at:
            self._limits_at = now + LIMITS_EVERY_S
            self._enforce_sizes(running, now)
        for child in self._children:
            if child.leave_by is not None and now >= child.leave_by and child.target is not None:
                log.warning("PID %d does not leave after its task has ended; killing it", child.ref.pid)
                child.leave_by = now + LEAVE_SLACK_S
                with contextlib.suppress(OSError):
                    process_tree.signal_tree(child.target, signal.SIGKILL)

    def heed(self, control_requests: Iterable[ControlRequest]) -> None:
        """Ask the bodies to end that are requested to be cancelled."""
        known = {control.attempt: control for control in control_requests}
        for attempt, child in self._children.by_attempt().items():
            control = known.get(attempt)
            if control is not None and control.cancelled and child.termination is None and child.end is None:
                by = control.cancelled_by
                self.begin(child, Reason.CANCELLED, f"cancelled by {by}" if by else "cancelled", by=by)

    def stalled(self) -> list[ChildHandle]:
        """Return children without progress for their stall_s; the rows show which of them wait for others."""
        now = self._clock.monotonic()
        if now < self._stalls_at:
            return []
        dues = [(child, self._stall_due_at(child)) for child in self._endable()]
        return [child for child, due_at in dues if due_at is not None and now >= due_at]

    def end_stalled(self, stalled: Iterable[ChildHandle], waiting: Collection[int]) -> None:
        """Begin to end them; for a task in *waiting* (ids) the time of its stall_s begins again."""
        for child in stalled:
            if child.attempt is not None and child.attempt.id in waiting:
                child.got_on_at = self._clock.monotonic()
            else:
                stall_s = self._fork_servers.options(child.name).stall_s or 0.0
                self.begin(child, Reason.TIMED_OUT, f"made no progress for its stall_s of {number(stall_s)} s")

    def put_off_stalls(self) -> None:
        """Try later: the rows cannot be read now."""
        self._stalls_at = self._clock.monotonic() + STALL_RETRY_S

    def begin(
        self, child: ChildHandle, reason: Reason, why: str, *, by: str | None = None, stage: Stage = Stage.ASKED
    ) -> None:
        """Begin to end an attempt, or go to *stage* at once; the first reason stands.

        Nothing is begun for a process that only a row names: it may be no child of ours.
        """
        if not child.vouched:
            return
        now = self._clock.monotonic()
        if child.termination is None:
            is_late = reason is Reason.TIMED_OUT
            child.termination = Termination(
                reason, why, by, now + max(self.config.grace_s, STACK_WAIT_S if is_late else 0.0)
            )
            if is_late:
                self._ask_for_stack(child)
            log.info("task %d (%s) is to end: %s", child.attempt.id if child.attempt else 0, child.name, why)
        self.ask(child, child.termination)
        if stage > child.termination.stage:
            self._escalate(child.termination, stage, now)

    def next_due_at(self) -> float | None:
        """Return when `enforce` has something to do next, monotonic; None if nothing is running."""
        running = self._endable()
        moments = [self._limits_at] if running else []
        for child in running:
            if child.termination is None:
                stall_at = self._stall_due_at(child)
                moments += [] if stall_at is None else [max(stall_at, self._stalls_at)]
                time_at = self._time_due_at(child)
                moments += [] if time_at is None else [time_at]
            elif not _waits_for_kill(child.termination):
                moments.append(child.termination.next_at)
            if child.question is not None:
                moments.append(self._clock.monotonic() + ANSWER_CHECK_S)
        return min(moments, default=None)

    def carry_out(self, child: ChildHandle, termination: Termination) -> None:
        """Send the signal of the present stage; its reason is in the row."""
        termination.unsent = False
        if child.target is None:
            self._send_by_fork_server(
                child, termination
            )  # it cannot be held now; its fork server can, and the last stage comes again
            return
        try:
            if termination.stage is Stage.TERM:
                log.info("sending SIGTERM to PID %d: %s", child.ref.pid, termination.why)
                child.target.send_signal(signal.SIGTERM)
            else:
                self._kill(child, termination.why)
        except OSError as error:  # another user's process by now, or no descriptors left
            log.error("PID %d cannot be signalled: %s", child.ref.pid, error)  # noqa: TRY400 - the sentence says it
        failpoints.at("supervisor.struck")

    def _kill(self, child: ChildHandle, why: str) -> None:
        log.info("sending SIGKILL to PID %d and all that it started: %s", child.ref.pid, why)
        if child.target is None:
            return
        try:
            process_tree.signal_tree(child.target, signal.SIGKILL)
        except OSError as error:  # no descriptors left, or no process table; what it started falls to the fork server
            log.error("what PID %d started cannot be seen: %s; killing it alone", child.ref.pid, error)  # noqa: TRY400 - the sentence says it
            child.target.send_signal(signal.SIGKILL)

    def carry_out_unrecorded(self) -> None:
        """Let fork servers send overdue signals while the database is away; they report the reason with the exit."""
        now = self._clock.monotonic()
        for child in self._children.running():
            termination = child.termination
            if termination is None or not termination.unsent or now - termination.due_since < KILL_WITHOUT_RECORD_S:
                continue
            if self._send_by_fork_server(child, termination):
                termination.unsent = False

    def _send_by_fork_server(self, child: ChildHandle, termination: Termination) -> bool:
        """Let its fork server send the signal of the present stage; False without a connection to it."""
        fork_server = self._fork_servers.get(child.fork_server)
        if fork_server is None or fork_server.peer.channel.closed:
            return False
        number = signal.SIGTERM if termination.stage is Stage.TERM else signal.SIGKILL
        self._sources.send(fork_server.peer, messages.Kill(child.ref, number, termination.reason))
        return True

    def expect_to_leave(self, child: ChildHandle) -> None:
        """Kill a child later if it does not leave by itself."""
        child.leave_by = self._clock.monotonic() + self.config.grace_s + LEAVE_SLACK_S

    def ask(self, child: ChildHandle, termination: Termination) -> None:
        """Ask the body to end; a child without a connection is asked when it has one again."""
        if child.attempt is not None and child.peer is not None and child.connected:
            id, attempt = child.attempt.id, child.attempt.attempt
            cancel = messages.Cancel(
                id=id, attempt=attempt, reason=termination.reason, why=termination.why, by=termination.by
            )
            self._sources.send(child.peer, cancel)

    def _endable(self) -> list[ChildHandle]:
        """Return the children that limits and terminations still apply to.

        One that is dead or has reported only waits to be written. One that only a row names may be no child of ours:
        its limits would be due in each pass, and nothing would come of it.
        """
        running = self._children.running()
        return [child for child in running if child.vouched and child.state is ChildState.RUNNING]

    def _enforce_time(self, child: ChildHandle, now: float) -> None:
        due_at = self._time_due_at(child)
        if due_at is not None and child.termination is None and now >= due_at:
            timeout_s = self._fork_servers.options(child.name).timeout_s
            self.begin(child, Reason.TIMED_OUT, f"ran past its timeout_s of {number(timeout_s or 0)} s")
        if (
            child.termination is not None
            and now >= child.termination.next_at
            and not _waits_for_kill(child.termination)
        ):
            self.ask(child, child.termination)
            self._escalate(child.termination, Stage(min(child.termination.stage + 1, Stage.KILL)), now)

    def _time_due_at(self, child: ChildHandle) -> float | None:
        """Return when its timeout_s is over, monotonic; None while it has none, or while it is suspended."""
        timeout_s = self._fork_servers.options(child.name).timeout_s
        if timeout_s is None or child.suspension.lasts:
            return None
        return child.started_at + child.suspension.total_s + timeout_s

    def _stall_due_at(self, child: ChildHandle) -> float | None:
        """Return when its stall_s is over, monotonic; None while it cannot stall, or could not report progress."""
        if child.slot is None or child.termination is not None or child.suspension.lasts:
            return None
        stall_s = self._fork_servers.options(child.name).stall_s
        if stall_s is None or not child.connected:
            return None
        return child.got_on_at + stall_s + STALL_SLACK_S

    def _ask_for_stack(self, child: ChildHandle) -> None:
        """Ask for its stack before it is asked to end; the answer is read in a later pass."""
        if child.target is not None:
            child.question_by = self._clock.monotonic() + ANSWER_S
            with contextlib.suppress(NoStack):
                child.question = Question.ask(child.target)

    def _keep_stack(self, child: ChildHandle, now: float) -> None:
        """Take what was answered, when it is whole or no more can come, to the row, or to the end if that is known."""
        if child.question is not None and (child.end is not None or child.dead_since is None):
            is_over = child.end is not None or now >= child.question_by
            text = child.question.text() if is_over else child.question.answer(now)
            if text is not None:
                child.forget_question()
                rest = "\n... the rest is left out\n" if len(text) > STACK_KEPT_CHARS else ""
                child.stack = child.note.stack = text[:STACK_KEPT_CHARS] + rest or None
        if (
            child.stack is not None
            and child.end is not None
            and child.end.reason is not None
            and child.end.stack is None
        ):
            child.end = msgspec.structs.replace(child.end, stack=child.stack)  # its note may not have been written yet

    def _escalate(self, termination: Termination, stage: Stage, now: float) -> None:
        termination.stage = stage
        termination.next_at = now + (
            self.config.grace_s if stage < Stage.KILL else max(self.config.grace_s, KILL_AGAIN_S)
        )
        termination.unsent = True
        termination.due_since = now

    def _enforce_sizes(self, running: list[ChildHandle], now: float) -> None:
        busy = [child for child in running if child.slot is not None]  # hundreds may wait, and do nothing meanwhile
        for child in busy:
            with contextlib.suppress(OSError):
                logs.bound(self._children.log_of(child), self.config.log_max_bytes)
        sampled = [child for child in running if self._fork_servers.options(child.name).memory_limit_bytes is not None]
        if now >= self._usage_at:
            self._usage_at = now + self.config.heartbeat_s
            sampled += [child for child in busy if child not in sampled]
        usage: dict[int, process_tree.Usage] = {}
        with contextlib.suppress(OSError):  # no descriptors left: the next check may succeed
            usage = process_tree.tree_usage([child.ref.pid for child in sampled]) if sampled else {}
        for child in sampled:
            if child.ref.pid in usage:
                self._note_usage(child, usage[child.ref.pid], now)
                self._enforce_memory(child, usage[child.ref.pid].rss_bytes)

    def _enforce_memory(self, child: ChildHandle, rss_bytes: int) -> None:
        limit = self._fork_servers.options(child.name).memory_limit_bytes
        if limit is not None and rss_bytes > limit and child.termination is None:
            # No grace: it would use it to grow.
            used, allowed = compared(rss_bytes, limit)
            why = f"used {used} of memory, over its memory_limit_bytes of {allowed}"
            self.begin(child, Reason.OUT_OF_MEMORY, why, stage=Stage.KILL)

    def _note_usage(self, child: ChildHandle, used: process_tree.Usage, now: float) -> None:
        if child.cpu_seen is not None and now > child.cpu_seen[0]:
            child.note.cpu_percent = round(
                100 * max(0.0, used.cpu_s - child.cpu_seen[1]) / (now - child.cpu_seen[0]), 1
            )
        child.cpu_seen = (now, used.cpu_s)
        child.peak_rss_bytes = max(used.rss_bytes, child.peak_rss_bytes)
        child.note.cpu_s = round(used.cpu_s, 3)
        child.note.rss_bytes = used.rss_bytes
        child.note.peak_rss_bytes = child.peak_rss_bytes


def _waits_for_kill(termination: Termination) -> bool:
    """Whether the last stage has come and its signal waits for its reason to be committed."""
    return termination.stage is Stage.KILL and termination.unsent
