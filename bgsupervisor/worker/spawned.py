"""The child of `portable`: loads the application, waits for one order, runs the body, records its end, leaves.

Needs nothing that only Linux has. A pipe leads to its parent; rows are written through the ledger, as by any child that
no supervisor acknowledges.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import queue
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import msgspec

from bgsupervisor import payload, tasks
from bgsupervisor.clock import SystemClock, repeat_last
from bgsupervisor.database.store import Store
from bgsupervisor.errors import BgSupervisorError, Cancelled
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import AttemptResult, LoadFailure, Run, TaskOptions
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.transitions import Attempt, Ledger
from bgsupervisor.statuses import Reason
from bgsupervisor.system import logs
from bgsupervisor.worker import leftovers, reporting
from bgsupervisor.worker.application import call_by_path, import_what_children_need, load_application
from bgsupervisor.worker.child import (
    LEFTOVER_GRACE_S,
    RECORD_RETRY_S,
    AttemptContext,
    awaited,
    configure_default_logging,
    loaded_definition,
    run_exit_callbacks,
)
from bgsupervisor.worker.coordination import AWAY_S, Coordination, WakeUps
from bgsupervisor.worker.outcome import result_of_exception

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config

__all__ = ["Ready", "decode", "encode", "main"]

log = logging.getLogger("bgsupervisor")


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message of a child: what it has loaded, and what failed to load."""

    catalogue: dict[str, TaskOptions]
    failures: list[LoadFailure]


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Ready | messages.Message).decode


def main(config: Config, pipe: Connection) -> NoReturn:
    """Live as a child; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent, which holds it back here
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    quiet = logging.NullHandler()
    log.addHandler(quiet)  # the parent prints what failed to load
    line = PipeLine(pipe, config)
    line.start()  # before an import that may hang: it ends this process when the parent has gone
    reporting.prepare()
    loaded = load_application(config)
    import_what_children_need()
    log.removeHandler(quiet)
    line.say(Ready(loaded.catalogue(), loaded.failures))
    assignment = line.assignments.get()
    if assignment is not None:
        _Performance(config, line, assignment).perform()
    _leave(config)


class PipeLine(threading.Thread):
    """The connection of a child to its parent, and the thread that listens to it; see `link.Line`.

    No supervisor hands out slots and no wait manager notifies: a waiter takes its slot by the rows, and the parent
    passes on what a child notifies. A child whose parent has gone ends its body as if that had been stopped.

    Attributes:
        orders: The order to run; None means to leave.
        in_body: SIGTERM may end the body by an exception.
        inside: The main thread is writing, and must not be torn out of it by a signal.
    """

    def __init__(self, pipe: Connection, config: Config) -> None:
        super().__init__(name="bgsupervisor link", daemon=True)
        self._pipe = pipe
        self._heartbeat_s, self._grace_s = config.heartbeat_s, config.grace_s
        self._turn = threading.Lock()
        self._wakes: set[threading.Event] = set()
        self._assignment: Run | None = None
        self.assignments: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.in_body = self.connected = False
        self.cancel_message: messages.Cancel | None = None
        self.last_progress: messages.Progress | None = None
        self.slot_granted = threading.Event()
        self.disconnected = threading.Event()
        self.disconnected.set()

    def run(self) -> None:
        """Listen until the process ends."""
        while True:
            try:
                if self._pipe.poll(self._heartbeat_s):
                    self._take(decode(self._pipe.recv_bytes()))
                elif self._assignment is not None:
                    self.say(self.last_progress or messages.Beat(self._assignment.id, self._assignment.attempt))
                    self.last_progress = None
            except (EOFError, OSError):
                self._end_orphaned()

    def say(self, message: Ready | messages.Message) -> None:
        """Send what may be lost."""
        with self._turn, contextlib.suppress(OSError, ValueError):
            self._pipe.send_bytes(encode(message))

    def say_from_body(self, message: messages.Message) -> None:
        """Send what may be lost, from the thread that SIGTERM interrupts: never in the middle of a message."""
        if threading.current_thread() is not threading.main_thread():
            self.say(message)
            return
        self.connected = True
        try:
            self.say(message)
        finally:
            self.connected = False

    def notify(self, keys: Sequence[str]) -> None:
        """Ask the parent to wake the waiters of all children."""
        if keys:
            self.say_from_body(messages.Notify(list(keys)))

    def rouse(self) -> None:
        """Wake the waiters of this child."""
        for wake in list(self._wakes):
            wake.set()

    @contextlib.contextmanager
    def waking(self) -> Iterator[threading.Event]:
        """Yield what is set once there is news; at first, for what has come before counts."""
        wake = threading.Event()
        wake.set()
        self._wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)

    def quiet(self, wake: threading.Event) -> None:
        """Clear a wake, before its cause is looked for."""
        wake.clear()

    def rest(self, wake: threading.Event, timeout_s: float) -> None:
        """Wait for news, at most *timeout_s*."""
        wake.wait(timeout_s)

    def set_waiting(self, waiting: bool) -> None:
        """Do nothing: the heartbeat of a waiting body costs nothing here."""

    def want_slot(self, id: int, attempt: int, number: int) -> None:
        """Do nothing: a waiter takes its slot by the rows."""

    def want_no_slot(self) -> None:
        """Do nothing, as `want_slot`."""

    def _take(self, message: Ready | messages.Message) -> None:
        if isinstance(message, Run):
            self._assignment = message
            self.assignments.put(message)
        elif isinstance(message, messages.Cancel):
            self.cancel_message = message
            self.rouse()
        elif isinstance(message, messages.Notify):
            self.rouse()
        elif isinstance(message, messages.Leave):
            self.assignments.put(None)

    def _end_orphaned(self) -> NoReturn:
        assignment, why = self._assignment, "`bgsupervisor dev` has gone"
        if assignment is not None:
            self.cancel_message = messages.Cancel(
                id=assignment.id, attempt=assignment.attempt, reason=Reason.STOPPED, why=why
            )
        self.assignments.put(None)
        self.rouse()
        SystemClock().sleep(self._grace_s)
        os._exit(1)


class _NoWakeUps(WakeUps):
    """The wait manager that is not there: a waiter looks at the rows, when it is roused and each second."""

    def seen(self, keys: Sequence[str]) -> list[int] | None:
        """Return that nothing is known."""
        del keys
        return None


class _Performance:
    """One attempt, from its order to its recorded end."""

    def __init__(self, config: Config, line: PipeLine, assignment: Run) -> None:
        self._config = config
        self._line = line
        self._assignment = assignment
        self._clock: Clock = SystemClock()
        self._term_came = False
        self._ended_by: BaseException | None = None

    def perform(self) -> None:
        """Run the body and record how it ended."""
        assignment, line = self._assignment, self._line
        path = logs.task_log(StateDir(self._config.state_dir).logs, assignment.id, assignment.attempt)
        with contextlib.suppress(OSError):  # a full log disk must not use up tasks
            _redirect_output(logs.open_for_append(path))
        coordination = Coordination(
            assignment,
            line,
            lambda: self._ledger(patience_s=AWAY_S),
            self._config,
            self._clock,
            is_given_up=tasks.is_given_up,
            waits_alone=tasks.waits_alone,
            make_wake_ups=_NoWakeUps,
        )
        context = AttemptContext(assignment, line, coordination, self._config, self._clock)
        try:
            end = self._guarded_body(context)
        except BaseException as error:  # noqa: BLE001 - a signal came while another exception was on its way out
            end = self._end_of(error)
        if self._ended_by is not None:
            with contextlib.suppress(Exception):
                reporting.report(self._ended_by, end, assignment)
            self._ended_by = None  # its frames keep open what the body had
        _end_leftovers()
        coordination.close()
        with contextlib.suppress(OSError):
            logs.bound(path, self._config.log_max_bytes)
        done, total, message = context.last
        self._record(msgspec.structs.replace(end, progress_done=done, progress_total=total, message=message))

    def _guarded_body(self, context: AttemptContext) -> AttemptResult:
        assignment, line = self._assignment, self._line
        try:
            definition = loaded_definition(assignment.name)
            data = payload.decode_data(
                assignment.data, definition.signature, name=assignment.name, secret=definition.options.secret
            )
            with leftovers.ending_copies():
                if self._config.child_setup:
                    call_by_path(self._config.child_setup)
            configure_default_logging()
            signal.signal(signal.SIGTERM, self._on_term)
            body = definition.body()
            line.in_body = True
            with tasks.entered(context), leftovers.ending_copies():
                value = body(**data)
                if inspect.iscoroutine(value):
                    value = asyncio.run(awaited(value))
            leftovers.write()  # as part of the body: its limits hold while a pipe is full
            line.in_body = False
            return AttemptResult(result=payload.encode_result(value, limit_bytes=self._config.data_max_bytes))
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is its end
            line.in_body = False
            leftovers.write(quietly=True, regular_only=True)
            return self._end_of(error)
        finally:
            leftovers.stop_timers()

    def _end_of(self, error: BaseException) -> AttemptResult:
        how = "the body ended after SIGTERM" if self._term_came else "the body ended when it was asked"
        self._ended_by = error
        return result_of_exception(error, how=how)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del frame
        assignment = self._line.cancel_message
        if assignment is None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._term_came = True
        if assignment is not None and self._line.in_body and not self._line.connected:
            raise Cancelled(assignment.reason, assignment.by, assignment.why)

    def _record(self, end: AttemptResult) -> None:
        """Record the end; while the database is away, at most for AWAY_S, again and again."""
        ledger, attempt = self._ledger(), Attempt(self._assignment.id, self._assignment.attempt)
        deadline = self._clock.monotonic() + AWAY_S
        keys: list[str] = []
        for pause in repeat_last(RECORD_RETRY_S):
            try:
                ledger.end(attempt, end, keys)
                break
            except (BgSupervisorError, OSError) as error:
                if self._clock.monotonic() >= deadline:
                    log.warning("the end of task %d cannot be recorded: %s", attempt.id, error)
                    break
                with contextlib.suppress(Exception):
                    ledger.store.close()
            self._clock.sleep(pause)
        self._line.notify(keys)
        self._line.say(messages.ResultReport(attempt.id, attempt.attempt, AttemptResult(reason=end.reason)))

    def _ledger(self, patience_s: float = 0.0) -> Ledger:
        config = self._config
        wait_s = config.busy_timeout_s
        store = Store.open(
            config.database, config.table_prefix, busy_timeout_s=wait_s, creates=False, patience_s=patience_s
        )
        return Ledger(store)


def _redirect_output(descriptor: int) -> None:
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    leftovers.open_standard_streams()


def _end_leftovers() -> None:
    """End what the body has started and left; what has lost its parent is not found."""
    import psutil  # noqa: PLC0415 - costs 45 ms, and is loaded by now

    with contextlib.suppress(psutil.Error):
        left = psutil.Process().children(recursive=True)
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    end(process)
            _, left = psutil.wait_procs(left, LEFTOVER_GRACE_S)


def _leave(config: Config) -> NoReturn:
    """Run exit callbacks, for at most grace_s; leave, whatever threads the body left."""
    run_exit_callbacks(config.grace_s)
    os._exit(0)
