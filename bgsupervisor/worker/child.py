"""The child: one attempt (or `reuse` attempts) from birth to end, in a process of its own.

The main thread runs the body; one daemon thread, the link, talks with the supervisor. Knows no table: an end that
nobody acknowledges it records through the ledger's own function.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import dataclasses
import faulthandler
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from bgsupervisor import failpoints, payload, tasks
from bgsupervisor.clock import SystemClock, repeat_last
from bgsupervisor.database.store import Store, roll_back_abandoned
from bgsupervisor.errors import BgSupervisorError, Cancelled
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import AttemptResult, ProcessRef, Run
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.transitions import Attempt, Batch, Ledger, Telemetry
from bgsupervisor.system import descriptors, logs, processes, stacks
from bgsupervisor.system.syscalls import set_child_subreaper
from bgsupervisor.system.titles import IDLE, set_title, task_title
from bgsupervisor.worker import inherited, leftovers, reporting
from bgsupervisor.worker.application import call_by_path
from bgsupervisor.worker.connection import Link
from bgsupervisor.worker.coordination import AWAY_S, Coordination
from bgsupervisor.worker.outcome import Progress, result_of_exception

if sys.platform != "win32":  # a body on Windows loads this module too
    import resource

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.tasks import Handle
    from bgsupervisor.worker.connection import Line

__all__ = [
    "AttemptContext",
    "Child",
    "ChildSpec",
    "awaited",
    "configure_default_logging",
    "loaded_definition",
    "main",
    "run_exit_callbacks",
]

log = logging.getLogger("bgsupervisor")

ACK_WAIT_S = 5.0
"""After this long without an acknowledgement the child records its end itself."""
ACK_SOON_S = 0.05
"""An acknowledgement takes some milliseconds; without one the body itself may have left the database locked."""
HELD_LOOK_S = 0.0005
HELD_WAIT_S = 5.0
"""A fork server watches a new child within a millisecond; one that has not after so long is stopped or dead."""
GIVE_BACK_S = 3600.0
"""So long an idle child that is to leave comes back to a database that is away, for the claim that may stand there."""
RECORD_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between tries to record an end; the last one repeats until it is in."""
BEAT_WAIT_S = 0.2
"""How long a heartbeat without a supervisor waits for a locked database, in seconds."""
DELETED_S = 86_400.0
"""How long a child tries to record its end where the database file was deleted, in seconds: it may be restored.

Where the database is away the child tries for `keep_days`, after which its task would be deleted anyway.
"""
PROGRESS_EVERY_S = 0.2
"""Progress is sent at most so often; the last word is never lost, the end carries it."""
ALIVE_EVERY_S = 1.0
"""Progress that says nothing new is sent so often: it tells that the body gets on (`stall_s`)."""
STUCK_EXIT_S = 2.0
"""How long after grace_s a child ends whose exit callbacks keep the interpreter's lock, in seconds."""
LEFTOVER_GRACE_S = 2.0
"""What a body left running gets SIGTERM, and SIGKILL after this long."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""For an application that configures no logging."""
KNOWN_LOOKS = 20
KNOWN_WAIT_S = 0.2
"""SIGTERM waits at most so long for the link to have read why it came."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChildSpec:
    """What a fork server hands to a child; picklable, for the spawn method.

    Attributes:
        not_its_own: The fork server's descriptors, which a child that was forked closes.
        handlers: What the application has set for signals at its import; empty for a child that loads it itself.
        load: The application must be loaded by the child itself (spawn).
        held: Shared with the fork server, which sets it once it watches the child; before that the child does nothing.
        left_in_order: Shared with the fork server; set when the child leaves with nothing unrecorded, so that nobody
            needs to be told of its exit.
    """

    config: Config
    fork_server: ProcessRef
    not_its_own: descriptors.Own
    handlers: Mapping[int, Any]
    load: bool
    held: Any
    left_in_order: Any


def main(spec: ChildSpec) -> NoReturn:
    """Live as a child; never returns."""
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


class AttemptContext(tasks.Context):
    """What a body that a supervisor runs can ask and tell."""

    def __init__(self, assignment: Run, link: Line, coordination: Coordination, config: Config, clock: Clock) -> None:
        self.id = assignment.id
        self.attempt = assignment.attempt
        self.key = assignment.key
        self._link = link
        self._coordination = coordination
        self._config = config
        self._clock = clock
        self._sent_at = -PROGRESS_EVERY_S
        self.last = self._sent = Progress()

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt is to end."""
        return self._link.cancel_message is not None

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the body is; see `Context.progress`."""
        self.last = self.last.then(done, total, message)
        self._get_on()
        assignment = self._link.cancel_message
        if assignment is not None:
            raise Cancelled(assignment.reason, assignment.by, assignment.why)

    def _get_on(self) -> None:
        """Tell that the body gets on, and how far it is; if that is nothing new, now and then."""
        now, is_news = self._clock.monotonic(), self.last != self._sent
        is_time = now - self._sent_at >= (PROGRESS_EVERY_S if is_news else ALIVE_EVERY_S)
        if self.id is None or not (is_news or is_time):
            return
        done, total, message = self.last
        word = messages.Progress(id=self.id, attempt=self.attempt, done=done, total=total, message=message)
        self._link.last_progress = word  # the next heartbeat takes along what is not sent now
        if is_time:
            self._sent_at, self._sent, self._link.last_progress = now, self.last, None
            self._link.say_from_body(word)

    @contextlib.contextmanager
    def _getting_on_after(self) -> Iterator[None]:
        """Tell that the body gets on again, after it has waited."""
        try:
            yield
        finally:
            self._get_on()

    def reach(self, part: str, value: object = None) -> None:
        """Record a part of this task; see `Context.reach`."""
        self._coordination.reach(part, value)
        self._get_on()

    def wait_for(
        self,
        task: tasks.Awaited | Sequence[tasks.Awaited],
        part: str | None = None,
        timeout_s: float | None = None,
        *,
        return_interrupted: bool = False,
    ) -> Any:  # noqa: ANN401 - whatever the other task has given
        """Wait for a part, or the end, of others; see `Context.wait_for`."""
        several = isinstance(task, Sequence) and not isinstance(task, str | bytes)
        ids = tasks.checked_ids(task if isinstance(task, Sequence) and several else [task])
        with self._getting_on_after():
            values = self._coordination.wait_for(ids, part, timeout_s=timeout_s, return_interrupted=return_interrupted)
        return values if several else values[0]

    def barrier(self, name: str, parties: int, *, scope: str | None = None, timeout_s: float | None = None) -> None:
        """Wait until so many have arrived; see `Context.barrier`."""
        with self._getting_on_after():
            self._coordination.barrier(name, parties, scope=scope, timeout_s=timeout_s)

    def request(self, task: Any, data: Mapping[str, object] | None = None, **options: Any) -> Handle:  # noqa: ANN401 - as Context
        """Request a task whose parent is this one; see `Context.request`."""
        from bgsupervisor.service import Service  # noqa: PLC0415 - a body requests as any application does

        return Service.of_task(self._config, self.id).request(task, data, **options)

    def _acquire(self, name: str, permits: int, timeout_s: float | None) -> int | None:
        with self._getting_on_after():
            return self._coordination.acquire(name, permits, timeout_s).abandoned_by

    def _release(self, name: str) -> None:
        self._coordination.release(name)

    def _rouse(self) -> None:
        self._link.rouse()


class Child:
    """The main thread of a child: waits for an order, runs the body, reports, leaves."""

    def __init__(self, spec: ChildSpec, clock: Clock) -> None:
        self._config = spec.config
        self._clock = clock
        self._held = spec.held
        self._left_in_order = spec.left_in_order
        self._pid = os.getpid()
        self._identity = processes.own_identity(processes.host_id(spec.config.host))
        self._logs = StateDir(spec.config.state_dir).logs
        self._log_path = logs.process_log(self._logs, self._identity.pid, self._identity.start_ticks)
        ref = ProcessRef(self._identity.pid, self._identity.start_ticks)
        heartbeat_s = spec.config.heartbeat_s
        self._link = Link(spec.config.state_dir, ref, spec.fork_server, heartbeat_s=heartbeat_s, clock=clock)
        self._phase = "idle"
        self._term_came = self._is_unrecorded = False
        self._surroundings: leftovers.Surroundings | None = None
        self._variables = contextvars.copy_context()
        self._answering = stacks.Answering()
        self._ended_by: tuple[BaseException, contextvars.Context] | None = None

    def live(self) -> NoReturn:
        """Take orders until told to leave; never returns."""
        # Unless it is known that we are to end the attempt, SIGTERM does what it does to any process.
        signal.signal(signal.SIGTERM, self._on_term)
        self._leave_sigterm_to_forks()
        if self._config.reuse > 1:
            with contextlib.suppress(OSError):  # the folder of an old release is gone
                self._surroundings = leftovers.Surroundings.now()
        failpoints.at("child.born")
        self._await_fork_server()
        with contextlib.suppress(OSError):
            self._answering.get_ready()
        self._link.questions = self._answering
        self._link.beat_alone = self._beat_alone
        self._link.start()
        leftovers.write(quietly=True)  # copies the memory pages that it touches now, while there is no task to delay
        last = None
        for more in reversed(range(self._config.reuse)):
            assignment = self._link.assignments.get()
            if assignment is None:
                self._give_back_not_started()
                break
            last = assignment
            failpoints.at("child.beginning")
            set_title(task_title(assignment.id, assignment.name))
            end = self._perform(assignment)
            failpoints.at("child.over")
            self._report(assignment, end)
            if end.reason is not None or not more or not self._reusable():
                break  # who will not take another order must not say that it is idle
            set_title(IDLE)
            self._link.become_idle()
        self._variables.run(self._leave, last)

    def _await_fork_server(self) -> None:
        """Be heard of by nobody before the fork server watches this process: if it cannot, it ends it."""
        deadline = self._clock.monotonic() + HELD_WAIT_S
        while not self._held.value:
            if self._clock.monotonic() >= deadline:  # it died meanwhile
                os._exit(0)
            self._clock.sleep(HELD_LOOK_S)

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
            self._link,
            lambda: self._ledger(patience_s=AWAY_S),
            self._config,
            self._clock,
            is_given_up=tasks.is_given_up,
            waits_alone=tasks.waits_alone,
        )
        context = AttemptContext(assignment, self._link, coordination, self._config, self._clock)
        self._phase = "body"
        self._term_came = False
        try:
            self._variables = contextvars.copy_context()  # the next body should not find what this one sets
            end = self._variables.run(self._guarded_body, assignment, context)
        except BaseException as error:  # noqa: BLE001 - a signal came while another exception was on its way out
            end = self._end_of(error)
        self._phase = "ending"
        with contextlib.suppress(OSError):
            descriptors.open_standard()  # no file of ours may become what the body prints to
        self._report_error(assignment, end)
        with contextlib.suppress(Exception):
            # guard: a child ends what its body left before it reports
            processes.end_descendants(self._pid, grace_s=LEFTOVER_GRACE_S, clock=self._clock)
        _flush_streams()
        coordination.close()
        done, total, message = context.last
        cpu_s = _own_usage() - used_before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return msgspec.structs.replace(
            end,
            cpu_s=round(cpu_s, 4),
            peak_rss_bytes=peak,
            progress_done=done,
            progress_total=total,
            message=message,
        )

    def _guarded_body(self, assignment: Run, context: AttemptContext) -> AttemptResult:
        definition = None
        try:
            definition = loaded_definition(assignment.name)
            data = payload.decode_data(
                assignment.data, definition.signature, name=assignment.name, secret=definition.options.secret
            )
            with _stopping_timers():
                with leftovers.ending_copies():
                    if self._config.child_setup:
                        call_by_path(self._config.child_setup)
                configure_default_logging()
                body = definition.body()
                with tasks.entered(context), leftovers.ending_copies():
                    value = body(**data)
                    if inspect.iscoroutine(value):
                        value = asyncio.run(awaited(value))
            leftovers.write()  # as part of the body: its limits hold while a pipe is full
            self._phase = "encoding"
            return AttemptResult(result=payload.encode_result(value, limit_bytes=self._config.data_max_bytes))
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is its end
            self._phase = "encoding"
            leftovers.write(quietly=True, regular_only=True)  # a full pipe may be why it was cancelled
            return self._end_of(error)

    def _end_of(self, error: BaseException) -> AttemptResult:
        how = "the body ended after SIGTERM" if self._term_came else "the body ended when it was asked"
        self._ended_by = error, contextvars.copy_context()
        return result_of_exception(error, how=how)

    def _report_error(self, assignment: Run, end: AttemptResult) -> None:
        """Report what ended the body to the application; let go of it, for its frames keep open what the body had."""
        ended_by, self._ended_by = self._ended_by, None
        if ended_by is not None:
            error, context = ended_by  # of the body: a tracker keeps in it what the body has set for its events
            with contextlib.suppress(Exception):
                configure_default_logging()
                context.run(reporting.report, error, end, assignment)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._phase in ("encoding", "ending"):
            return  # the body has ended, its end is on the way
        assignment = self._known_order() if self._phase == "body" else None
        # guard, always: SIGTERM is a cancel only if a cancel is known
        if assignment is not None:
            self._term_came = True
            if self._link.main_inside:
                return
            raise Cancelled(assignment.reason, assignment.by, assignment.why)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _known_order(self) -> messages.Cancel | None:
        """Give the link a moment to read why SIGTERM came; by looking, for a second SIGTERM may come in between."""
        for _ in range(KNOWN_LOOKS):
            assignment = self._link.cancel_message
            if assignment is not None:
                return assignment
            self._clock.sleep(KNOWN_WAIT_S / KNOWN_LOOKS)
        return None

    def _leave_sigterm_to_forks(self) -> None:
        """Give what the body forks the default SIGTERM in place of ours: multiprocessing ends its processes with it.

        It is held back during the fork, for Python forgets a signal that a new process gets before it is ready.
        """
        held = threading.local()

        def hold() -> None:
            held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def disconnect() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)

        def be_another() -> None:
            if signal.getsignal(signal.SIGTERM) == self._on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            disconnect()

        os.register_at_fork(before=hold, after_in_parent=disconnect, after_in_child=be_another)

    def _open_log(self) -> None:
        _flush_streams()
        descriptor = logs.open_for_append(self._log_path)
        out, err = (descriptors.redirect(descriptor, number) for number in (1, 2))
        os.close(descriptor)
        leftovers.open_standard_streams(out, err)

    # Reporting

    def _report(self, assignment: Run, end: AttemptResult) -> None:
        """Return when the end is recorded: by the supervisor, or by ourselves if nobody acknowledges."""
        link = self._link
        link.report(end)
        failpoints.at("child.reported")
        deadline = self._clock.monotonic() + ACK_WAIT_S
        link.push(ACK_WAIT_S)
        # guard: a transaction left open by a body is rolled back
        if not link.acknowledged.wait(ACK_SOON_S):
            roll_back_abandoned(for_good=_others_live())
        while not link.acknowledged.wait(0.05):
            # guard: a child without a supervisor records its end itself
            if link.disconnected.is_set() or self._clock.monotonic() >= deadline:
                self._record(Attempt(assignment.id, assignment.attempt), end)
                break
        self._keep_log(assignment)
        self._phase = "idle"

    def _record(self, attempt: Attempt, end: AttemptResult) -> None:
        failpoints.at("child.recording")
        ledger = self._ledger()
        keys: list[str] = []
        told = ""
        began = there_at = self._clock.monotonic()
        for pause in repeat_last(RECORD_RETRY_S):
            now = self._clock.monotonic()
            there_at = there_at if ledger.store.inode() == 0 else now  # 0: the file is gone
            if now - there_at >= DELETED_S or 0 < self._config.keep_days * 86_400 <= now - began:
                log.error(
                    "the end of task %d (%s) was not recorded, giving up: %s", attempt.id, end.reason or "DONE", told
                )
                self._is_unrecorded = True
                return
            try:
                ledger.end(attempt, end, keys)
            except (BgSupervisorError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("the end of task %d cannot be recorded yet: %s", attempt.id, error)
                with contextlib.suppress(Exception):
                    ledger.store.close()
            else:
                failpoints.at("child.recorded")
                self._link.notify(keys)
                return
            if self._link.acknowledged.wait(pause):
                return

    def _ledger(self, patience_s: float = 0.0, busy_timeout_s: float | None = None) -> Ledger:
        config = self._config
        # A database that is away may come back, or be restored; an empty one in its place would know of no attempt.
        store = Store.open(
            config.database,
            config.table_prefix,
            busy_timeout_s=config.busy_timeout_s if busy_timeout_s is None else busy_timeout_s,
            creates=False,
            patience_s=patience_s,
        )
        store.limit_connections(config.state_dir)
        return Ledger(store)

    def _beat_alone(self, assignment: Run) -> None:
        """Write a heartbeat, from the link's thread; a database that is away or locked hears the next one."""
        with contextlib.suppress(BgSupervisorError, OSError):
            ledger = self._ledger(busy_timeout_s=BEAT_WAIT_S)
            with contextlib.suppress(BgSupervisorError, OSError):
                ledger.apply(
                    Batch(
                        telemetry={
                            Attempt(assignment.id, assignment.attempt): Telemetry(heartbeat_at=ledger.clock.now())
                        }
                    )
                )
            ledger.store.close()

    def _keep_log(self, assignment: Run) -> None:
        with contextlib.suppress(OSError):
            logs.bound(self._log_path, self._config.log_max_bytes)
            if self._log_path.stat().st_size:
                self._log_path.rename(logs.task_log(self._logs, assignment.id, assignment.attempt))

    def _give_back_not_started(self) -> None:
        """Give back what was claimed for this child and never came; a database that is away is come back to."""
        if not self._link.disconnected.is_set():
            return
        failpoints.at("child.unclaiming")
        keys: list[str] = []
        ledger, until = self._ledger(), self._clock.monotonic() + GIVE_BACK_S
        for pause in repeat_last(RECORD_RETRY_S):
            try:
                ledger.unclaim_not_started(self._identity, keys)
                break
            except (BgSupervisorError, OSError):
                with contextlib.suppress(Exception):
                    ledger.store.close()
                if ledger.store.inode() == 0 or self._clock.monotonic() >= until:  # 0: the file is gone
                    break
            self._clock.sleep(pause)
        self._link.notify(keys)

    # Leaving

    def _reusable(self) -> bool:
        """Whether nothing of the last body is left that the next one could trip over."""
        if _others_live():
            return False
        roll_back_abandoned(for_good=False)
        return self._surroundings is not None and self._surroundings.restore()

    def _leave(self, last: Run | None) -> NoReturn:
        """Run exit callbacks, for at most grace_s; leave, whatever threads the body left."""
        self._phase = "ending"
        failpoints.at("child.leaving")
        self._left_in_order.value = not self._is_unrecorded
        run_exit_callbacks(self._config.grace_s)
        if os.getpid() != self._pid:
            os._exit(0)  # a copy that an exit callback has forked
        _flush_streams()
        if last is not None:
            self._keep_log(last)  # it may have got its first line just now
        self._link.drop()
        with contextlib.suppress(OSError):
            if self._log_path.stat().st_size == 0:
                self._log_path.unlink()
        os._exit(0)


async def awaited(body: Coroutine[Any, Any, object]) -> object:
    """Await an async body; a copy ends before it closes the event loop, whose epoll instance it shares."""
    with leftovers.ending_copies():
        return await body


def configure_default_logging() -> None:
    """Have log records printed to stderr where the application configures no logging."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)


def run_exit_callbacks(limit_s: float) -> None:
    """Flush error trackers, run exit callbacks and write open files; end the process after *limit_s*.

    Trackers come first, for a callback may hang, and once more, for a callback may have reported something.
    """
    limit = threading.Timer(limit_s, os._exit, args=(0,))
    limit.daemon = True
    limit.start()
    with contextlib.suppress(OSError):  # the timer needs the interpreter's lock, which C code may never give back
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(limit_s + STUCK_EXIT_S, exit=True, file=nowhere)
    for step in (reporting.flush, atexit._run_exitfuncs, reporting.flush):  # noqa: SLF001 - os._exit skips them, and bodies rely on them
        with contextlib.suppress(BaseException):
            step()
    leftovers.write(quietly=True)


def loaded_definition(name: str) -> tasks.Definition:
    """Return the definition of a task. Raises BgSupervisorError where this process has not loaded it."""
    definition = tasks.definition_of(name)
    if definition is None:
        raise BgSupervisorError(f"the task {name!r} is not loaded in this process")
    return definition


def _own_usage() -> float:
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


@contextlib.contextmanager
def _stopping_timers() -> Iterator[None]:
    try:
        yield
    finally:
        leftovers.stop_timers()


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _others_live() -> bool:
    """Whether the body has left threads."""
    return threading.active_count() > 2  # noqa: PLR2004 - the main thread and the link
