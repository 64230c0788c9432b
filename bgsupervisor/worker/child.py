"""The child: one attempt (or `reuse` attempts) from birth to end, in a process of its own.

The main thread runs the body; one daemon thread, the connection, exchanges messages with the supervisor. Knows no
table: without an acknowledgement it records its end through the ledger.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from bgsupervisor import failpoints, task_context
from bgsupervisor.clock import SystemClock
from bgsupervisor.database.sqlite_store import roll_back_abandoned
from bgsupervisor.errors import Cancelled
from bgsupervisor.ipc.messages import AttemptResult, ProcessRef, Run
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.system import descriptors, logs, process_tree, processes, stacks
from bgsupervisor.system.syscalls import set_child_subreaper
from bgsupervisor.system.titles import IDLE, set_title, task_title
from bgsupervisor.worker import inherited, leftovers, reporting
from bgsupervisor.worker.attempt import AWAY_S
from bgsupervisor.worker.body import Body
from bgsupervisor.worker.connection import Connection
from bgsupervisor.worker.context import AttemptContext
from bgsupervisor.worker.coordination import Coordination
from bgsupervisor.worker.leftovers import LEFTOVER_GRACE_S
from bgsupervisor.worker.recording import Recorder, open_ledger

if sys.platform != "win32":  # a body on Windows loads this module too
    import resource

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc import messages

__all__ = ["Child", "ChildSpec", "main"]

log = logging.getLogger("bgsupervisor")

ACK_WAIT_S = 5.0
"""Limit of the wait for an acknowledgement, in seconds; then the child records its end itself."""
ACK_SOON_S = 0.05
"""Usual limit of an acknowledgement, in seconds; beyond it the body itself may have left the database locked."""
WATCHED_POLL_S = 0.0005
WATCHED_WAIT_S = 5.0
"""Limit of the wait until the fork server watches a new child, in seconds: usually a millisecond.

A fork server that takes longer is stopped or dead.
"""
KNOWN_POLLS = 20
KNOWN_WAIT_S = 0.2
"""Limit of the wait of a SIGTERM until the connection has read its reason, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a fork server hands to a child; picklable, for the spawn method.

    Attributes:
        not_its_own: The fork server's descriptors; a forked child closes them.
        handlers: Signal handlers that the import of the application set; empty for a spawned child.
        load: The child loads the application itself (spawn).
        watched: Shared with the fork server, which sets it once it watches the child. Before, the child does nothing.
        left_in_order: Shared with the fork server; set when the child leaves with nothing unrecorded, so that its
            exit need not be reported.
    """

    config: Config
    fork_server: ProcessRef
    not_its_own: descriptors.Own
    handlers: Mapping[int, Any]
    load: bool
    watched: Any
    left_in_order: Any


def main(spec: ChildSpec) -> NoReturn:
    """Run as a child; never return."""
    with contextlib.suppress(KeyboardInterrupt):
        _become_child(spec)
        set_title(IDLE)
        logs.leave_dead_output(StateDir(spec.config.state_dir).own_log)  # the fork server's terminal may be closed
        if spec.load:
            # Only a spawned child loads by itself.
            from bgsupervisor.worker.application import import_what_children_need, load_application  # noqa: PLC0415

            leftovers.open_standard_streams()
            reporting.prepare()
            load_application(spec.config)
            import_what_children_need()
            leftovers.note_inherited()
        inherited.reseed()
        Child(spec, SystemClock()).live()
    os._exit(0)


def _become_child(spec: ChildSpec) -> None:
    os.setsid()
    set_child_subreaper()
    signal.set_wakeup_fd(-1)  # before the descriptor that it names is closed
    spec.not_its_own.close()  # one forgotten copy of a peer's socket keeps that peer connected after its death
    descriptors.open_standard()
    null = os.open(os.devnull, os.O_RDONLY)
    number = descriptors.redirect(null, 0)
    os.close(null)
    sys.stdin = open(number, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
    inherited.set_signals(spec.handlers)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    inherited.forget_exit_callbacks()


class Child:
    """The main thread of a child: waits for an assignment, runs the body, reports, leaves."""

    def __init__(self, spec: ChildSpec, clock: Clock) -> None:
        self._config = spec.config
        self._clock = clock
        self._watched = spec.watched
        self._left_in_order = spec.left_in_order
        self._pid = os.getpid()
        self._identity = processes.own_identity(processes.host_id(spec.config.host))
        self._logs = StateDir(spec.config.state_dir).logs
        self._log_path = logs.process_log(self._logs, self._identity.pid, self._identity.start_ticks)
        ref = ProcessRef(self._identity.pid, self._identity.start_ticks)
        heartbeat_s = spec.config.heartbeat_s
        self._connection = Connection(
            spec.config.state_dir, ref, spec.fork_server, heartbeat_s=heartbeat_s, clock=clock
        )
        self._phase = "idle"
        self._body: Body | None = None
        self._recorder = Recorder(spec.config, self._identity, self._connection, clock)
        self._surroundings: leftovers.Surroundings | None = None
        self._variables = contextvars.copy_context()
        self._answering = stacks.Answering()

    def live(self) -> NoReturn:
        """Run assignments until a message to leave; never return."""
        # Unless a cancel of this attempt is known, SIGTERM has its default effect.
        signal.signal(signal.SIGTERM, self._on_term)
        self._leave_sigterm_to_forks()
        if self._config.reuse > 1:
            with contextlib.suppress(OSError):  # the folder of an old release is gone
                self._surroundings = leftovers.Surroundings.now()
        failpoints.at("child.born")
        self._await_fork_server()
        with contextlib.suppress(OSError):
            self._answering.get_ready()
        self._connection.questions = self._answering
        self._connection.beat_alone = self._recorder.beat
        self._connection.start()
        leftovers.write(quietly=True)  # copies the memory pages that it touches now, while there is no task to delay
        last = None
        for more in reversed(range(self._config.reuse)):
            assignment = self._connection.mailbox.assignments.get()
            if assignment is None:
                self._recorder.give_back_not_started()
                break
            last = assignment
            failpoints.at("child.beginning")
            set_title(task_title(assignment.id, assignment.name))
            end = self._perform(assignment)
            failpoints.at("child.over")
            self._report(assignment, end)
            if end.reason is not None or not more or not self._reusable():
                break  # a child that takes no other assignment must not report that it is idle
            set_title(IDLE)
            self._connection.become_idle()
        self._variables.run(self._leave, last)

    def _await_fork_server(self) -> None:
        """Stay unknown until the fork server watches this process; one that cannot watch it ends it."""
        deadline = self._clock.monotonic() + WATCHED_WAIT_S
        while not self._watched.value:
            if self._clock.monotonic() >= deadline:  # it died meanwhile
                os._exit(0)
            self._clock.sleep(WATCHED_POLL_S)

    # One attempt

    def _perform(self, assignment: Run) -> AttemptResult:
        used_before = _own_usage()
        descriptors.open_standard()  # the last body may have closed them
        with contextlib.suppress(OSError):
            self._open_log()  # a full log disk must not use up tasks: then it goes to the supervisor's log
        with contextlib.suppress(OSError):
            self._answering.get_ready()
        coordination = Coordination(
            assignment,
            self._connection,
            lambda: open_ledger(self._config, patience_s=AWAY_S),
            self._config,
            self._clock,
            is_given_up=task_context.is_given_up,
            waits_alone=task_context.waits_alone,
        )
        context = AttemptContext(assignment, self._connection, coordination, self._config, self._clock)
        body = self._body = Body(assignment, self._config)
        self._phase = "body"
        try:
            self._variables = contextvars.copy_context()  # the next body should not find what this one sets
            end = self._variables.run(body.run, context, after=self._note_body_over)
        except BaseException as error:  # noqa: BLE001 - a signal came while another exception was on its way out
            end = body.result_of(error)
        self._note_body_over()
        self._clean_up(body, end)
        coordination.close()
        done, total, message = context.last
        return msgspec.structs.replace(
            end,
            cpu_s=round(_own_usage() - used_before, 4),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            progress_done=done,
            progress_total=total,
            message=message,
        )

    def _note_body_over(self) -> None:
        self._phase = "ending"

    def _clean_up(self, body: Body, end: AttemptResult) -> None:
        """Report the error of the body, and end the processes that it left."""
        with contextlib.suppress(OSError):
            descriptors.open_standard()  # no file of ours may become what the body prints to
        body.report_error(end)
        with contextlib.suppress(Exception):
            # guard: a child ends what its body left before it reports
            process_tree.end_descendants(self._pid, grace_s=LEFTOVER_GRACE_S, clock=self._clock)
        _flush_streams()

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._phase == "ending":
            return  # the body has ended, its result is on the way
        cancel = self._known_cancel() if self._phase == "body" else None
        # guard, always: SIGTERM is a cancel only if a cancel is known
        if cancel is not None:
            if self._body is not None:
                self._body.was_terminated = True
            if self._connection.is_writing:
                return
            raise Cancelled(cancel.reason, cancel.by, cancel.why)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _known_cancel(self) -> messages.Cancel | None:
        """Return why SIGTERM came, once the connection has read it; polls, for a second SIGTERM may come in between."""
        for _ in range(KNOWN_POLLS):
            cancel = self._connection.mailbox.cancel_message
            if cancel is not None:
                return cancel
            self._clock.sleep(KNOWN_WAIT_S / KNOWN_POLLS)
        return None

    def _leave_sigterm_to_forks(self) -> None:
        """Restore the default SIGTERM in forks of the body: multiprocessing ends its processes with it.

        SIGTERM is blocked during the fork: Python forgets a signal that a new process gets before it is ready.
        """
        blocked = threading.local()

        def block() -> None:
            blocked.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def unblock() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked.mask)

        def restore_default() -> None:
            if signal.getsignal(signal.SIGTERM) == self._on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            unblock()

        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=restore_default)

    def _open_log(self) -> None:
        _flush_streams()
        descriptor = logs.open_for_append(self._log_path)
        out, err = (descriptors.redirect(descriptor, number) for number in (1, 2))
        os.close(descriptor)
        leftovers.open_standard_streams(out, err)

    # Reporting

    def _report(self, assignment: Run, end: AttemptResult) -> None:
        """Return when the end is recorded: by the supervisor, or by this child if no acknowledgement comes."""
        connection = self._connection
        connection.report(end)
        failpoints.at("child.reported")
        deadline = self._clock.monotonic() + ACK_WAIT_S
        connection.push(ACK_WAIT_S)
        # guard: a transaction left open by a body is rolled back
        if not connection.mailbox.acknowledged.wait(ACK_SOON_S):
            roll_back_abandoned(for_good=_others_live())
        while not connection.mailbox.acknowledged.wait(0.05):
            # guard: a child without a supervisor records its end itself
            if connection.mailbox.disconnected.is_set() or self._clock.monotonic() >= deadline:
                self._recorder.record(Attempt(assignment.id, assignment.attempt), end)
                break
        self._keep_log(assignment)
        self._phase = "idle"

    def _keep_log(self, assignment: Run) -> None:
        with contextlib.suppress(OSError):
            logs.bound(self._log_path, self._config.log_max_bytes)
            if self._log_path.stat().st_size:
                self._log_path.rename(logs.task_log(self._logs, assignment.id, assignment.attempt))

    # Leaving

    def _reusable(self) -> bool:
        """Whether the last body left nothing that could disturb the next one."""
        if _others_live():
            return False
        roll_back_abandoned(for_good=False)
        return self._surroundings is not None and self._surroundings.restore()

    def _leave(self, last: Run | None) -> NoReturn:
        """Run exit callbacks, for at most grace_s, then leave, whatever threads the body left."""
        self._phase = "ending"
        failpoints.at("child.leaving")
        self._left_in_order.value = not self._recorder.is_unrecorded
        leftovers.run_exit_callbacks(self._config.grace_s)
        if os.getpid() != self._pid:
            os._exit(0)  # a copy that an exit callback has forked
        _flush_streams()
        if last is not None:
            self._keep_log(last)  # it may have got its first line just now
        self._connection.drop()
        with contextlib.suppress(OSError):
            if self._log_path.stat().st_size == 0:
                self._log_path.unlink()
        os._exit(0)


def _own_usage() -> float:
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _others_live() -> bool:
    """Whether the body has left threads."""
    return threading.active_count() > 2  # noqa: PLR2004 - the main thread and the connection
