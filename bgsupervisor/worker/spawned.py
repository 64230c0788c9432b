"""The child of `portable`: loads the application, waits for one assignment, runs the body, records its end, leaves.

Needs nothing that only Linux has. A pipe leads to its parent. It writes rows through the ledger, as any child without
an acknowledgement.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import msgspec

from bgsupervisor import task_context
from bgsupervisor.clock import SystemClock, repeat_last
from bgsupervisor.errors import BgSupervisorError, Cancelled
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import AttemptResult, LoadFailure, Run, TaskOptions
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.statuses import Reason
from bgsupervisor.system import logs
from bgsupervisor.worker import leftovers, reporting
from bgsupervisor.worker.application import import_what_children_need, load_application
from bgsupervisor.worker.attempt import AWAY_S
from bgsupervisor.worker.body import Body
from bgsupervisor.worker.context import AttemptContext
from bgsupervisor.worker.coordination import Coordination
from bgsupervisor.worker.leftovers import LEFTOVER_GRACE_S
from bgsupervisor.worker.mailbox import BodyConnection
from bgsupervisor.worker.recording import RECORD_RETRY_S, open_ledger
from bgsupervisor.worker.wait_client import WakeUps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config

__all__ = ["Ready", "decode", "encode", "main"]

log = logging.getLogger("bgsupervisor")


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message of a child: the tasks that it loaded, and what failed to load."""

    catalogue: dict[str, TaskOptions]
    failures: list[LoadFailure]


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Ready | messages.Message).decode


def main(config: Config, pipe: Connection) -> NoReturn:
    """Run as a child; never return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the parent, which blocks it here
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    quiet = logging.NullHandler()
    log.addHandler(quiet)  # the parent prints what failed to load
    connection = PipeConnection(pipe, config)
    connection.start()  # before an import that may hang: it ends this process when the parent is gone
    reporting.prepare()
    loaded = load_application(config)
    import_what_children_need()
    log.removeHandler(quiet)
    connection.send(Ready(loaded.catalogue(), loaded.failures))
    assignment = connection.mailbox.assignments.get()
    if assignment is not None:
        _Performance(config, connection, assignment).perform()
    _leave(config)


class EventWakes:
    """Wakes that are events of this process; see `Wakes`."""

    def __init__(self) -> None:
        self._wakes: set[threading.Event] = set()

    @contextlib.contextmanager
    def waking(self) -> Iterator[threading.Event]:
        """Yield an event for one wait; it is set at first, so that earlier news count."""
        wake = threading.Event()
        wake.set()
        self._wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)

    def quiet(self, wake: threading.Event) -> None:
        """Clear an event, before its cause is looked for."""
        wake.clear()

    def rest(self, wake: threading.Event, timeout_s: float) -> None:
        """Wait for news, at most *timeout_s*."""
        wake.wait(timeout_s)

    def rouse(self) -> None:
        """Set all events."""
        for wake in list(self._wakes):
            wake.set()


class PipeConnection(BodyConnection):
    """The connection of a child to its parent, and the thread that listens to it; see `BodyConnection`.

    No supervisor hands out slots and no wait manager notifies: a waiter takes its slot by the rows, and the parent
    passes on what a child notifies. A child whose parent is gone ends its body as stopped.

    Attributes:
        in_body: SIGTERM may end the body by an exception.
    """

    def __init__(self, pipe: Connection, config: Config) -> None:
        super().__init__(EventWakes())
        self._pipe = pipe
        self._heartbeat_s, self._grace_s = config.heartbeat_s, config.grace_s
        self._turn = threading.Lock()
        self.mailbox.disconnected.set()
        self.in_body = False

    def run(self) -> None:
        """Listen until the process ends."""
        mailbox = self.mailbox
        while True:
            try:
                if self._pipe.poll(self._heartbeat_s):
                    self._take(decode(self._pipe.recv_bytes()))
                elif mailbox.assignment is not None:
                    self.send(mailbox.last_progress or messages.Beat(mailbox.assignment.id, mailbox.assignment.attempt))
                    mailbox.last_progress = None
            except (EOFError, OSError):
                self._end_orphaned()

    def send(self, message: Ready | messages.Message) -> None:
        """Send what may be lost."""
        with self._turn, contextlib.suppress(OSError, ValueError):
            self._pipe.send_bytes(encode(message))

    def notify(self, keys: Sequence[str]) -> None:
        """Ask the parent to wake the waiters of all children."""
        if keys:
            self.send_from_body(messages.Notify(list(keys)))

    def set_waiting(self, waiting: bool) -> None:
        """Do nothing: the heartbeat of a waiting body costs nothing here."""

    def _take(self, message: Ready | messages.Message) -> None:
        if isinstance(message, messages.Notify):
            self.mailbox.wakes.rouse()
        elif not isinstance(message, Ready):
            self.mailbox.take(message)

    def _end_orphaned(self) -> NoReturn:
        mailbox, why = self.mailbox, "`bgsupervisor dev` has gone"
        if mailbox.assignment is not None:
            mailbox.cancel_message = messages.Cancel(
                id=mailbox.assignment.id, attempt=mailbox.assignment.attempt, reason=Reason.STOPPED, why=why
            )
        mailbox.assignments.put(None)
        mailbox.wakes.rouse()
        SystemClock().sleep(self._grace_s)
        os._exit(1)


class _NoWakeUps(WakeUps):
    """The absent wait manager: a waiter polls the rows when it is roused, and each second."""

    def seen(self, keys: Sequence[str]) -> list[int] | None:
        """Return None: there are no counts."""
        del keys
        return None


class _Performance:
    """One attempt, from its assignment to its recorded end."""

    def __init__(self, config: Config, connection: PipeConnection, assignment: Run) -> None:
        self._config = config
        self._connection = connection
        self._assignment = assignment
        self._clock: Clock = SystemClock()
        self._body = Body(assignment, config)

    def perform(self) -> None:
        """Run the body and record how it ended."""
        assignment, connection = self._assignment, self._connection
        path = logs.task_log(StateDir(self._config.state_dir).logs, assignment.id, assignment.attempt)
        with contextlib.suppress(OSError):  # a full log disk must not use up tasks
            _redirect_output(logs.open_for_append(path))
        coordination = Coordination(
            assignment,
            connection,
            lambda: open_ledger(self._config, patience_s=AWAY_S, limits_connections=False),
            self._config,
            self._clock,
            is_given_up=task_context.is_given_up,
            waits_alone=task_context.waits_alone,
            make_wake_ups=_NoWakeUps,
        )
        context = AttemptContext(assignment, connection, coordination, self._config, self._clock)
        try:
            end = self._body.run(context, before=self._take_sigterm, after=self._note_body_over)
        except BaseException as error:  # noqa: BLE001 - a signal came while another exception was on its way out
            end = self._body.result_of(error)
        self._body.report_error(end)
        _end_leftovers()
        coordination.close()
        with contextlib.suppress(OSError):
            logs.bound(path, self._config.log_max_bytes)
        done, total, message = context.last
        self._record(msgspec.structs.replace(end, progress_done=done, progress_total=total, message=message))

    def _take_sigterm(self) -> None:
        signal.signal(signal.SIGTERM, self._on_term)
        self._connection.in_body = True

    def _note_body_over(self) -> None:
        self._connection.in_body = False

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del frame
        cancel = self._connection.mailbox.cancel_message
        if cancel is None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._body.was_terminated = True
        if cancel is not None and self._connection.in_body and not self._connection.is_writing:
            raise Cancelled(cancel.reason, cancel.by, cancel.why)

    def _record(self, end: AttemptResult) -> None:
        """Record the end; while the database is away, retry for at most AWAY_S."""
        ledger = open_ledger(self._config, limits_connections=False)
        attempt = Attempt(self._assignment.id, self._assignment.attempt)
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
        self._connection.notify(keys)
        self._connection.send(messages.ResultReport(attempt.id, attempt.attempt, AttemptResult(reason=end.reason)))


def _redirect_output(descriptor: int) -> None:
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    leftovers.open_standard_streams()


def _end_leftovers() -> None:
    """End the processes that the body left; those that have lost their parent are not found."""
    import psutil  # noqa: PLC0415 - costs 45 ms, and is loaded by now

    with contextlib.suppress(psutil.Error):
        left = psutil.Process().children(recursive=True)
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for process in left:
                with contextlib.suppress(psutil.Error):
                    end(process)
            _, left = psutil.wait_procs(left, LEFTOVER_GRACE_S)


def _leave(config: Config) -> NoReturn:
    """Run exit callbacks, for at most grace_s, then leave, whatever threads the body left."""
    leftovers.run_exit_callbacks(config.grace_s)
    os._exit(0)
