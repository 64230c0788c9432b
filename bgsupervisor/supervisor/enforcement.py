"""Cancels, limits of time, memory and logs: who is to end, in stages, and with which reason; who is to stand still."""

from __future__ import annotations

import contextlib
import logging
import signal
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor import failpoints
from bgsupervisor.errors import NoStack
from bgsupervisor.ipc import messages
from bgsupervisor.ledger.transitions import Suspension
from bgsupervisor.sizes import compared, number
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.children import Order, Stage
from bgsupervisor.system import logs, processes
from bgsupervisor.system.stacks import ANSWER_S, Question

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from bgsupervisor.clock import AttendedClock
    from bgsupervisor.config import Config
    from bgsupervisor.ledger.transitions import Wish
    from bgsupervisor.supervisor.children import Ward, Wards
    from bgsupervisor.supervisor.events import Reception
    from bgsupervisor.supervisor.forkservers import ForkServers

__all__ = ["Enforcement"]

log = logging.getLogger("bgsupervisor")

LIMITS_EVERY_S = 0.5
"""Memory limits and log sizes are looked at so often while something runs."""
LEAVE_SLACK_S = 5.0
"""A child whose end is recorded is killed if it is still there grace_s and this long later."""
KILL_AGAIN_S = 2.0
"""A SIGKILL that has not brought death is sent again after grace_s, at least this long: it may have been lost with the
fork server that was to send it."""
KILL_WITHOUT_RECORD_S = 1.0
"""A kill whose reason cannot be recorded goes through the fork server after this long, and comes back with the exit."""
STALL_SLACK_S = 2.0
"""A stall is told so much later: a child tells only now and then that its body gets on (`ALIVE_EVERY_S`)."""
STALL_LOOK_S = 1.0
"""While the rows cannot tell whether a silent body waits for others, they are asked so often."""
STACK_WAIT_S = 0.5
"""A body whose time is up gets SIGTERM this much later at the earliest, so that its stack can be kept."""
QUESTION_LOOK_S = 0.05
"""While a stack was asked for, it is looked for so often."""
STACK_KEPT_CHARS = 65_536
"""A longer stack (100 threads) loses its end in the row."""


class Enforcement:
    """Decides whom to end. Signals are sent by `carry_out`, after the reason has been committed."""

    def __init__(
        self, config: Config, wards: Wards, fork_servers: ForkServers, ears: Reception, clock: AttendedClock
    ) -> None:
        self.config = config
        self._wards = wards
        self._fork_servers = fork_servers
        self._ears = ears
        self._clock = clock
        self._limits_at = 0.0
        self._usage_at = 0.0
        self._stalls_at = 0.0

    def enforce(self) -> None:
        """See whose time has come."""
        now = self._clock.monotonic()
        running = self._endable()
        for ward in running:
            self._enforce_time(ward, now)
        for ward in self._wards:  # in most of hundreds there is nothing to see to
            if ward.to_be_suspended or ward.suspension.lasts:
                self._enforce_suspension(ward, now)
            if ward.question is not None or ward.stack is not None:
                self._keep_stack(ward, now)
        if running and now >= self._limits_at:
            self._limits_at = now + LIMITS_EVERY_S
            self._enforce_sizes(running, now)
        for ward in self._wards:
            if ward.leave_by is not None and now >= ward.leave_by and ward.target is not None:
                log.warning("PID %d does not leave after its task has ended; killing it", ward.who.pid)
                ward.leave_by = now + LEAVE_SLACK_S
                with contextlib.suppress(OSError):
                    processes.signal_tree(ward.target, signal.SIGKILL)

    def heed(self, wishes: Iterable[Wish]) -> None:
        """Ask the bodies that somebody wants cancelled to end; note which ones are to be suspended, and which not."""
        known = {wish.attempt: wish for wish in wishes}
        for attempt, ward in self._wards.by_attempt().items():
            wish = known.get(attempt)
            ward.to_be_suspended = wish is not None and wish.suspended
            if wish is not None and wish.cancelled and ward.order is None and ward.end is None:
                by = wish.cancelled_by
                self.order(ward, Reason.CANCELLED, f"cancelled by {by}" if by else "cancelled", by=by)

    def stalled(self) -> list[Ward]:
        """Return those that have said for their stall_s nothing of getting on; whether they wait the rows know."""
        now = self._clock.monotonic()
        if now < self._stalls_at:
            return []
        dues = [(ward, self._stall_due_at(ward)) for ward in self._endable()]
        return [ward for ward, due_at in dues if due_at is not None and now >= due_at]

    def end_stalled(self, stalled: Iterable[Ward], waiting: Collection[int]) -> None:
        """Begin to end those; the clock of who waits for others (by id) begins anew."""
        for ward in stalled:
            if ward.attempt is not None and ward.attempt.id in waiting:
                ward.got_on_at = self._clock.monotonic()
            else:
                stall_s = self._fork_servers.options(ward.name).stall_s or 0.0
                self.order(ward, Reason.TIMED_OUT, f"made no progress for its stall_s of {number(stall_s)} s")

    def put_off_stalls(self) -> None:
        """Ask later: the rows cannot be read now."""
        self._stalls_at = self._clock.monotonic() + STALL_LOOK_S

    def order(self, ward: Ward, reason: Reason, why: str, *, by: str | None = None, stage: Stage = Stage.ASKED) -> None:
        """Begin to end an attempt, or go to *stage* at once; the first reason stands.

        Nothing is begun for a process that only a row names: it may be no child of ours.
        """
        if not ward.vouched:
            return
        now = self._clock.monotonic()
        if ward.order is None:
            is_late = reason is Reason.TIMED_OUT
            ward.order = Order(reason, why, by, now + max(self.config.grace_s, STACK_WAIT_S if is_late else 0.0))
            if is_late:
                self._ask_for_stack(ward)
            log.info("task %d (%s) is to end: %s", ward.attempt.id if ward.attempt else 0, ward.name, why)
        self.ask(ward, ward.order)
        if stage > ward.order.stage:
            self._escalate(ward.order, stage, now)

    def next_due_at(self) -> float | None:
        """Return when `enforce` has something to do next, monotonic; None if nothing is running."""
        running = self._endable()
        moments = [self._limits_at] if running else []
        for ward in running:
            if ward.order is None:
                stall_at = self._stall_due_at(ward)
                moments += [] if stall_at is None else [max(stall_at, self._stalls_at)]
                time_at = self._time_due_at(ward)
                moments += [] if time_at is None else [time_at]
            elif not _waits_for_kill(ward.order):
                moments.append(ward.order.next_at)
            if ward.question is not None:
                moments.append(self._clock.monotonic() + QUESTION_LOOK_S)
        return min(moments, default=None)

    def carry_out(self, ward: Ward, order: Order) -> None:
        """Send the signal of an order's stage; its reason is in the row."""
        order.unsent = False
        if ward.target is None:
            self._have_sent(ward, order)  # it cannot be held now; its fork server can, and the last stage comes again
            return
        try:
            if order.stage is Stage.TERM:
                log.info("sending SIGTERM to PID %d: %s", ward.who.pid, order.why)
                ward.target.send_signal(signal.SIGTERM)
            else:
                self._kill(ward, order.why)
        except OSError as error:  # another user's process by now, or no descriptors left
            log.error("PID %d cannot be signalled: %s", ward.who.pid, error)  # noqa: TRY400 - the sentence says it
        failpoints.at("supervisor.struck")

    def suspend(self, ward: Ward) -> None:
        """Have a child and all that it started stand still; that it does is in the row."""
        if ward.target is None or not ward.suspension.lasts:
            return
        log.info("stopping PID %d and all that it started, until somebody resumes it", ward.who.pid)
        try:
            processes.signal_tree(ward.target, signal.SIGSTOP)
        except OSError as error:
            log.error("PID %d cannot be stopped: %s", ward.who.pid, error)  # noqa: TRY400 - the sentence says it

    def let_the_suspended_go_on(self) -> None:
        """While the database stays locked, have those go on that stand still: one of them may keep it locked.

        Then nobody could even resume it. They are stopped anew once the database can be written.
        """
        for ward in self._wards:
            if ward.suspension.lasts and ward.target is not None:
                with contextlib.suppress(OSError):
                    if processes.is_stopped(ward.who.pid):
                        log.warning("letting PID %d go on: perhaps it is who keeps the database locked", ward.who.pid)
                    processes.signal_tree(ward.target, signal.SIGCONT)
                    ward.suspension_unsaved = True

    def _kill(self, ward: Ward, why: str) -> None:
        log.info("sending SIGKILL to PID %d and all that it started: %s", ward.who.pid, why)
        if ward.target is None:
            return
        try:
            processes.signal_tree(ward.target, signal.SIGKILL)
        except OSError as error:  # no descriptors left, or no process table; what it started falls to the fork server
            log.error("what PID %d started cannot be seen: %s; killing it alone", ward.who.pid, error)  # noqa: TRY400 - the sentence says it
            ward.target.send_signal(signal.SIGKILL)

    def carry_out_unrecorded(self) -> None:
        """While the database is away, have fork servers send what is overdue; they report the reason with the exit."""
        now = self._clock.monotonic()
        for ward in self._wards.running():
            order = ward.order
            if order is None or not order.unsent or now - order.due_since < KILL_WITHOUT_RECORD_S:
                continue
            if self._have_sent(ward, order):
                order.unsent = False

    def _have_sent(self, ward: Ward, order: Order) -> bool:
        """Have its fork server send the signal of an order's stage; False if that is away."""
        fork_server = self._fork_servers.get(ward.fork_server)
        if fork_server is None or fork_server.peer.channel.closed:
            return False
        number = signal.SIGTERM if order.stage is Stage.TERM else signal.SIGKILL
        self._ears.send(fork_server.peer, messages.KillOrder(ward.who, number, order.reason))
        return True

    def expect_to_leave(self, ward: Ward) -> None:
        """Have a child killed if it does not leave by itself."""
        ward.leave_by = self._clock.monotonic() + self.config.grace_s + LEAVE_SLACK_S

    def ask(self, ward: Ward, order: Order) -> None:
        """Tell the body that it is to end; one whose child is away is told when it comes back."""
        if ward.attempt is not None and ward.peer is not None and ward.connected:
            id, attempt = ward.attempt.id, ward.attempt.attempt
            cancel = messages.Cancel(id=id, attempt=attempt, reason=order.reason, why=order.why, by=order.by)
            self._ears.send(ward.peer, cancel)

    def _endable(self) -> list[Ward]:
        """Return the children that limits and orders still apply to.

        One that is dead or has reported only waits to be written. One that only a row names may be no child of ours:
        its limits would be due in each pass, and nothing would come of it.
        """
        running = self._wards.running()
        return [ward for ward in running if ward.vouched and ward.end is None and ward.dead_since is None]

    def _enforce_time(self, ward: Ward, now: float) -> None:
        due_at = self._time_due_at(ward)
        if due_at is not None and ward.order is None and now >= due_at:
            timeout_s = self._fork_servers.options(ward.name).timeout_s
            self.order(ward, Reason.TIMED_OUT, f"ran past its timeout_s of {number(timeout_s or 0)} s")
        if ward.order is not None and now >= ward.order.next_at and not _waits_for_kill(ward.order):
            self.ask(ward, ward.order)
            self._escalate(ward.order, Stage(min(ward.order.stage + 1, Stage.KILL)), now)

    def _time_due_at(self, ward: Ward) -> float | None:
        """Return when its timeout_s is over, monotonic; None while it has none, or while it is suspended."""
        timeout_s = self._fork_servers.options(ward.name).timeout_s
        if timeout_s is None or ward.suspension.lasts:
            return None
        return ward.started_at + ward.suspension.total_s + timeout_s

    def _stall_due_at(self, ward: Ward) -> float | None:
        """Return when its stall_s is over, monotonic; None while that cannot be, or nobody could have heard it."""
        if ward.slot is None or ward.order is not None or ward.suspension.lasts:
            return None
        stall_s = self._fork_servers.options(ward.name).stall_s
        if stall_s is None or not ward.connected:
            return None
        return ward.got_on_at + stall_s + STALL_SLACK_S

    def _enforce_suspension(self, ward: Ward, now: float) -> None:
        """Have stand still who is to, after the commit; let go on who is not, or has to see that it is to end."""
        if ward.dead_since is not None:
            return
        must_see = ward.order is not None and ward.order.stage < Stage.KILL
        wanted = ward.to_be_suspended and ward.end is None and not must_see
        if wanted and not ward.suspension.lasts and ward.order is None and ward.target is not None:
            since_mono = self._clock.machine_monotonic()
            ward.suspension = Suspension(self._clock.now(), since_mono, ward.suspension.total_s)
            ward.suspension_unsaved = True
        elif not wanted and ward.suspension.lasts and ward.target is not None:
            # The other way round: were this supervisor to die in between, the next would do the same once more.
            with contextlib.suppress(OSError):
                processes.signal_tree(ward.target, signal.SIGCONT)
                log.info("letting PID %d go on", ward.who.pid)
                ward.suspension = ward.suspension.ended(self._clock.machine_monotonic())
                ward.suspension_unsaved = ward.attempt is not None
                ward.got_on_at = now

    def _ask_for_stack(self, ward: Ward) -> None:
        """Ask what it is doing, before it is asked to end; the answer is read in a later pass."""
        if ward.target is not None:
            ward.question_by = self._clock.monotonic() + ANSWER_S
            with contextlib.suppress(NoStack):
                ward.question = Question.ask(ward.target)

    def _keep_stack(self, ward: Ward, now: float) -> None:
        """Take what was answered, when it is whole or no more can come, to the row, or to the end if that is known."""
        if ward.question is not None and (ward.end is not None or ward.dead_since is None):
            is_over = ward.end is not None or now >= ward.question_by
            text = ward.question.text() if is_over else ward.question.answer(now)
            if text is not None:
                ward.forget_question()
                rest = "\n... the rest is left out\n" if len(text) > STACK_KEPT_CHARS else ""
                ward.stack = ward.note.stack = text[:STACK_KEPT_CHARS] + rest or None
        if ward.stack is not None and ward.end is not None and ward.end.reason is not None and ward.end.stack is None:
            ward.end = msgspec.structs.replace(ward.end, stack=ward.stack)  # its note may not have been written yet

    def _escalate(self, order: Order, stage: Stage, now: float) -> None:
        order.stage = stage
        order.next_at = now + (self.config.grace_s if stage < Stage.KILL else max(self.config.grace_s, KILL_AGAIN_S))
        order.unsent = True
        order.due_since = now

    def _enforce_sizes(self, running: list[Ward], now: float) -> None:
        busy = [ward for ward in running if ward.slot is not None]  # hundreds may wait, and do nothing meanwhile
        for ward in busy:
            with contextlib.suppress(OSError):
                logs.bound(self._wards.log_of(ward), self.config.log_max_bytes)
        sampled = [ward for ward in running if self._fork_servers.options(ward.name).memory_limit_bytes is not None]
        if now >= self._usage_at:
            self._usage_at = now + self.config.heartbeat_s
            sampled += [ward for ward in busy if ward not in sampled]
        usage: dict[int, processes.Usage] = {}
        with contextlib.suppress(OSError):  # no descriptors left: the next look may see
            usage = processes.tree_usage([ward.who.pid for ward in sampled]) if sampled else {}
        for ward in sampled:
            if ward.who.pid in usage:
                self._note_usage(ward, usage[ward.who.pid], now)
                self._enforce_memory(ward, usage[ward.who.pid].rss_bytes)

    def _enforce_memory(self, ward: Ward, rss_bytes: int) -> None:
        limit = self._fork_servers.options(ward.name).memory_limit_bytes
        if limit is not None and rss_bytes > limit and ward.order is None:
            # No grace: it would use it to grow.
            used, allowed = compared(rss_bytes, limit)
            why = f"used {used} of memory, over its memory_limit_bytes of {allowed}"
            self.order(ward, Reason.OUT_OF_MEMORY, why, stage=Stage.KILL)

    def _note_usage(self, ward: Ward, used: processes.Usage, now: float) -> None:
        if ward.cpu_seen is not None and now > ward.cpu_seen[0]:
            ward.note.cpu_percent = round(100 * max(0.0, used.cpu_s - ward.cpu_seen[1]) / (now - ward.cpu_seen[0]), 1)
        ward.cpu_seen = (now, used.cpu_s)
        ward.peak_rss_bytes = max(used.rss_bytes, ward.peak_rss_bytes)
        ward.note.cpu_s = round(used.cpu_s, 3)
        ward.note.rss_bytes = used.rss_bytes
        ward.note.peak_rss_bytes = ward.peak_rss_bytes


def _waits_for_kill(order: Order) -> bool:
    """Whether the last stage has come and its signal waits for its reason to be committed."""
    return order.stage is Stage.KILL and order.unsent
