"""The child: one attempt (or `reuse` attempts) from birth to end, in a process of its own.

The main thread runs the body; one daemon thread, the link, talks with the supervisor. Knows no table: an end that
nobody acknowledges it records through the ledger's own function.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from bgsupervisor import logs, payload, processes, tasks, wire
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import BgSupervisorError, Cancelled, DatabaseError, DataInvalid, DataTooLarge, WireError
from bgsupervisor.ledger import Attempt, Ledger
from bgsupervisor.linux import set_child_subreaper
from bgsupervisor.models import Store
from bgsupervisor.statedir import StateDir, connect, open_dir
from bgsupervisor.statuses import Reason
from bgsupervisor.wire import Channel, End, Run, Who

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.processes import ProcessIdentity

__all__ = ["Birth", "Child", "main"]

log = logging.getLogger("bgsupervisor")

REDIAL_S = 0.2
ACK_WAIT_S = 5.0
"""After this long without an acknowledgement the child records its end itself."""
RECORD_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between tries to record an end; the last one repeats until it is in."""
LONELY_S = 90.0
"""An idle child leaves when no supervisor has come for this long: cron would have started one within a minute."""
PARENT_LOOK_S = 10.0
PROGRESS_EVERY_S = 0.2
"""Progress is sent at most so often; the last word is never lost, the end carries it."""
LEFTOVER_GRACE_S = 2.0
"""What a body left running gets SIGTERM, and SIGKILL after this long."""
ERROR_CHARS = 64 * 1024
"""A longer traceback keeps its beginning and its end."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""For an application that configures no logging."""
KNOWN_WAIT_S = 0.2
"""SIGTERM waits at most so long for the link to have read why it came."""


@dataclasses.dataclass(frozen=True, slots=True)
class Birth:
    """What a nursery hands to a child; picklable, for the spawn method.

    Attributes:
        kept_descriptors: The application's own, open since its import; all others that are not ours are closed.
        load: The application must be loaded by the child itself (spawn).
    """

    config: Config
    nursery: Who
    kept_descriptors: frozenset[int]
    load: bool


def main(birth: Birth) -> NoReturn:
    """Live as a child; never returns."""
    with contextlib.suppress(KeyboardInterrupt):
        _become_child(birth)
        if birth.load:
            from bgsupervisor.nursery import load_application  # noqa: PLC0415 - only a spawned child loads by itself

            load_application(birth.config)
        Child(birth, SystemClock()).live()
    os._exit(0)


def _become_child(birth: Birth) -> None:
    os.setsid()
    set_child_subreaper()
    _close_foreign_descriptors(birth.kept_descriptors)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _close_foreign_descriptors(kept: frozenset[int]) -> None:
    # One forgotten copy of a peer's socket keeps that peer "connected" after its death.
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number not in kept:  # noqa: PLR2004 - standard descriptors
            with contextlib.suppress(OSError):
                os.close(number)


class Link(threading.Thread):
    """The child's connection to whichever supervisor there is; dials, redials, listens and beats.

    Everything the main thread hands to it is a plain state under one lock, so that a hello can always tell it anew.
    """

    def __init__(self, birth: Birth, who: Who, clock: Clock) -> None:
        super().__init__(name="bgsupervisor link", daemon=True)
        self._config = birth.config
        self._nursery = birth.nursery
        self._who = who
        self._clock = clock
        self._state_dir = StateDir(birth.config.state_dir)
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._parent = os.getppid()
        self.orders: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.run_order: Run | None = None
        self.end_report: End | None = None
        self.acknowledged = threading.Event()
        self.disconnected = threading.Event()
        self.cancel_order: wire.Cancel | None = None
        self.cancel_known = threading.Event()
        self.main_inside = False
        self._alone_since: float | None = None
        self._last_beat = 0.0
        self._last_look = clock.monotonic()
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._after_fork_in_child
        )

    # For the main thread

    def report(self, end: End) -> None:
        """Tell the end of the present attempt, now and in every later hello, until it is acknowledged."""
        with self._lock:
            self.end_report = end
            if self._channel is not None and self.run_order is not None:
                self._channel.send(wire.Ended(self.run_order.id, self.run_order.attempt, end))
        self._nudge()

    def become_idle(self) -> None:
        """Be idle again after the end has been recorded, and say so."""
        with self._lock:
            self.run_order = self.end_report = self.cancel_order = None
            self.acknowledged.clear()
            self.cancel_known.clear()
            if self._channel is not None:
                self._channel.send(self._hello())

    def say(self, message: wire.Message) -> None:
        """Send what may be lost: nothing is sent to a peer that is away or does not read."""
        # SIGTERM must not raise in the middle of a frame; whoever set the flag looks for a cancel afterwards.
        self.main_inside = threading.current_thread() is threading.main_thread()
        try:
            with self._lock:
                if self._channel is not None and self._channel.unsent_bytes < wire.UNRESPONSIVE_BYTES:
                    self._channel.send(message)
        finally:
            self.main_inside = False

    def drop(self) -> None:
        """Close the connection; the child is leaving."""
        with self._lock:
            if self._channel is not None:
                self._channel.flush()
                self._channel.close()
                self._channel = None

    # The thread

    def run(self) -> None:
        """Serve until the process ends."""
        while True:
            self._dial()
            self._serve_once()

    def _serve_once(self) -> None:
        channel = self._channel
        timeout_s = self._next_look_s() if channel is not None else REDIAL_S
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if channel is not None:
            events = select.POLLIN | (select.POLLOUT if channel.unsent_bytes else 0)
            with contextlib.suppress(OSError, ValueError):
                poll.register(channel, events)
        poll.poll(timeout_s * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        if channel is not None:
            self._exchange(channel)
        self._look()

    def _exchange(self, channel: Channel) -> None:
        with self._lock:
            channel.flush()
            try:
                messages = channel.receive()
            except WireError as error:
                log.warning("the supervisor speaks another protocol: %s", error)
                channel.close()
                messages = []
            for message in messages:
                self._take(message)
            if channel.closed:
                channel.close()
                self._channel = None
                self._alone_since = self._clock.monotonic()
                self.disconnected.set()

    def _take(self, message: wire.Message) -> None:
        present = self.run_order
        if isinstance(message, Run):
            self.run_order = message
            self.orders.put(message)
        elif isinstance(message, wire.Leave):
            self.orders.put(None)
        elif present is None or not isinstance(message, wire.Ack | wire.Cancel):
            return
        elif (message.id, message.attempt) == (present.id, present.attempt):
            if isinstance(message, wire.Ack):
                self.acknowledged.set()
            else:
                self.cancel_order = message
                self.cancel_known.set()

    def _dial(self) -> None:
        if self._channel is not None:
            return
        sock = None
        try:
            sock = connect(self._state_dir.path, "control.sock", socket.SOCK_STREAM)
        except OSError:
            return
        with self._lock:
            channel = Channel(sock)
            channel.send(self._hello())
            self._channel = channel
            self._alone_since = None
            self.disconnected.clear()

    def _hello(self) -> wire.ChildHello:
        order = self.run_order
        return wire.ChildHello(
            version=wire.PROTOCOL_VERSION,
            who=self._who,
            nursery=self._nursery,
            id=None if order is None else order.id,
            attempt=0 if order is None else order.attempt,
            end=self.end_report,
        )

    def _look(self) -> None:
        now = self._clock.monotonic()
        order = self.run_order
        if order is not None and now - self._last_beat >= self._config.heartbeat_s:
            self._last_beat = now
            self.say(wire.Beat(order.id, order.attempt))
        if order is not None:
            return
        if now - self._last_look >= PARENT_LOOK_S:
            self._last_look = now
            if os.getppid() != self._parent and self._channel is None:
                self.orders.put(None)
        if self._alone_since is not None and now - self._alone_since >= LONELY_S:
            self.orders.put(None)

    def _next_look_s(self) -> float:
        if self.run_order is None:
            return PARENT_LOOK_S
        return max(0.0, self._last_beat + self._config.heartbeat_s - self._clock.monotonic())

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"x")

    def _after_fork_in_child(self) -> None:
        # A process that the body forks is not this child: it must neither speak for it nor keep its connection open.
        if self._channel is not None:
            self._channel.forget()
            self._channel = None
        self._lock.release()


class AttemptContext(tasks.Context):
    """What a body that a supervisor runs can ask and tell."""

    def __init__(self, order: Run, link: Link, clock: Clock) -> None:
        self.id = order.id
        self.attempt = order.attempt
        self.key = order.key
        self._link = link
        self._clock = clock
        self._sent_at = -PROGRESS_EVERY_S
        self.last: tuple[float | None, float | None, str | None] = (None, None, None)

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt is to end."""
        return self._link.cancel_order is not None

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the body is; see `Context.progress`."""
        known = self.last
        self.last = (
            known[0] if done is None else float(done),
            known[1] if total is None else float(total),
            known[2] if message is None else storable(str(message))[:1000],
        )
        now = self._clock.monotonic()
        if self.last != known and now - self._sent_at >= PROGRESS_EVERY_S and self.id is not None:
            self._sent_at = now
            done, total, message = self.last
            self._link.say(wire.Progress(id=self.id, attempt=self.attempt, done=done, total=total, message=message))
        order = self._link.cancel_order
        if order is not None:
            raise Cancelled(order.reason, order.by)


class Child:
    """The main thread of a child: waits for an order, runs the body, reports, leaves."""

    def __init__(self, birth: Birth, clock: Clock) -> None:
        self._config = birth.config
        self._clock = clock
        self._pid = os.getpid()
        self._identity = processes.own_identity(processes.host_id(birth.config.host))
        self._logs = StateDir(birth.config.state_dir).logs
        self._log_path = logs.process_log(self._logs, self._identity.pid, self._identity.start_ticks)
        self._link = Link(birth, Who(self._identity.pid, self._identity.start_ticks), clock)
        self._phase = "idle"
        self._term_came = False
        self._home = (os.getcwd(), _umask())

    def live(self) -> NoReturn:
        """Take orders until told to leave; never returns."""
        # Unless it is known that we are to end the attempt, SIGTERM does what it does to any process.
        signal.signal(signal.SIGTERM, self._on_term)
        self._link.start()
        for _ in range(self._config.reuse):
            order = self._link.orders.get()
            if order is None:
                self._give_back_unbegun()
                break
            end = self._perform(order)
            self._report(order, end)
            if end.reason is not None or not self._reusable():
                break
            self._link.become_idle()
        self._leave()

    # One attempt

    def _perform(self, order: Run) -> End:
        used_before = _own_usage()
        self._open_log()
        context = AttemptContext(order, self._link, self._clock)
        self._phase = "body"
        self._term_came = False
        try:
            end = self._guarded_body(order, context)
        except Cancelled as error:  # SIGTERM came while another exception was on its way out
            end = self._end_of(error)
        self._phase = "ending"
        if os.getpid() != self._pid:
            os._exit(0)  # the body forked, and this is the copy: only the process that began may speak for the attempt
        with contextlib.suppress(Exception):
            processes.end_descendants(self._pid, grace_s=LEFTOVER_GRACE_S, clock=self._clock)
        _flush_streams()
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

    def _guarded_body(self, order: Run, context: AttemptContext) -> End:
        definition = None
        try:
            definition = _resolve(order.name)
            data = payload.decode_data(order.data, definition.signature, name=order.name, secret=definition.secret)
            if self._config.child_setup:
                call_by_path(self._config.child_setup)
            self._default_logging()
            body = definition.body()
            with tasks.entered(context):
                value = body(**data)
                if inspect.iscoroutine(value):
                    value = asyncio.run(value)
            self._phase = "encoding"
            return End(result=payload.encode_result(value, limit_bytes=self._config.data_max_bytes))
        except BaseException as error:  # noqa: BLE001 - whatever a body raises is its end
            self._phase = "encoding"
            return self._end_of(error)

    def _end_of(self, error: BaseException) -> End:
        """Say how the attempt ended by what came out of the body."""
        trace = _traceback(error)
        cancelled = _cancelled_in(error)
        if cancelled is not None:
            return End(reason=Reason(cancelled.reason), detail=self._cancel_detail(cancelled), error=trace)
        if isinstance(error, SystemExit):
            code = _exit_code(error)
            return End(
                reason=Reason.EXITED, detail=f"the body called sys.exit with code {code}", exit_code=code, error=trace
            )
        if isinstance(error, (DataInvalid, DataTooLarge)):
            return End(reason=Reason.RAISED, detail=storable(str(error))[:1000], error=trace)
        text = "".join(traceback.format_exception_only(error)).strip()
        return End(reason=Reason.RAISED, detail=storable(text)[:1000], error=trace)

    def _cancel_detail(self, cancelled: Cancelled) -> str:
        why = {"CANCELLED": "cancelled", "TIMED_OUT": "ran past its timeout_s", "STOPPED": "the supervisor was stopped"}
        by = f" by {cancelled.by}" if cancelled.by else ""
        how = "the body ended after SIGTERM" if self._term_came else "the body ended when it was asked"
        return f"{why.get(cancelled.reason, str(cancelled.reason))}{by}; {how}"

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._phase in ("encoding", "ending"):
            return  # the body has ended, its end is on the way
        if self._phase == "body" and self._link.cancel_known.wait(KNOWN_WAIT_S):
            order = self._link.cancel_order
            self._term_came = True
            if self._link.main_inside:
                return
            if order is not None:
                raise Cancelled(order.reason, order.by)
        signal.signal(number, signal.SIG_DFL)
        os.kill(self._pid, number)

    def _open_log(self) -> None:
        _flush_streams()
        descriptor = logs.open_for_append(self._log_path)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115, PTH123
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115, PTH123
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr

    def _default_logging(self) -> None:
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)

    # Reporting

    def _report(self, order: Run, end: End) -> None:
        """Return when the end is recorded: by the supervisor, or by ourselves if nobody acknowledges."""
        link = self._link
        link.report(end)
        deadline = self._clock.monotonic() + ACK_WAIT_S
        while not link.acknowledged.wait(0.05 if link.disconnected.is_set() else 0.2):
            if link.disconnected.is_set() or self._clock.monotonic() >= deadline:
                self._record(Attempt(order.id, order.attempt), end)
                break
        self._keep_log(order)

    def _record(self, attempt: Attempt, end: End) -> None:
        ledger = self._ledger()
        for pause in _repeat_last(RECORD_RETRY_S):
            try:
                ledger.end(attempt, end)
            except (BgSupervisorError, OSError) as error:
                log.warning("the end of task %d cannot be recorded yet: %s", attempt.id, error)
                with contextlib.suppress(Exception):
                    ledger.store.close()
            else:
                return
            if self._link.acknowledged.wait(pause):
                return

    def _ledger(self) -> Ledger:
        config = self._config
        store = Store.open(config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s)
        return Ledger(store, self._clock)

    def _keep_log(self, order: Run) -> None:
        with contextlib.suppress(OSError):
            if self._log_path.stat().st_size:
                self._log_path.rename(logs.task_log(self._logs, order.id, order.attempt))

    def _give_back_unbegun(self) -> None:
        if self._link.disconnected.is_set():
            with contextlib.suppress(DatabaseError):
                self._ledger().unclaim_unbegun(self._identity)

    # Leaving

    def _reusable(self) -> bool:
        """Whether nothing of the last body is left that the next one could trip over."""
        if threading.active_count() > 2 or self._config.reuse == 1:  # noqa: PLR2004 - the main thread and the link
            return False
        with contextlib.suppress(OSError):
            os.chdir(self._home[0])
            os.umask(self._home[1])
            signal.signal(signal.SIGTERM, self._on_term)
            return True
        return False

    def _leave(self) -> NoReturn:
        """Run atexit callbacks for at most grace_s and leave, whatever threads the body left."""
        limit = threading.Timer(self._config.grace_s, os._exit, args=(0,))
        limit.daemon = True
        limit.start()
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # noqa: SLF001 - os._exit skips them, and bodies rely on them
        _flush_streams()
        self._link.drop()
        with contextlib.suppress(OSError):
            if self._log_path.stat().st_size == 0:
                self._log_path.unlink()
        os._exit(0)


def call_by_path(path: str) -> object:
    """Import and call a "module:callable" of the configuration."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in (name or "setup").split("."):
        found = getattr(found, part)
    return found()


def storable(text: str) -> str:
    """Return *text* with what no database stores (lone surrogates, NUL) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _resolve(name: str) -> tasks.Definition:
    definition = tasks.definition_of(name)
    if definition is None:
        raise BgSupervisorError(f"the task {name!r} is not loaded in this process")
    return definition


def _traceback(error: BaseException) -> str:
    text = storable("".join(traceback.format_exception(error)))
    if len(text) <= ERROR_CHARS:
        return text
    half = ERROR_CHARS // 2
    return f"{text[:half]}\n... {len(text) - ERROR_CHARS} characters left out ...\n{text[-half:]}"


def _cancelled_in(error: BaseException | None) -> Cancelled | None:
    """Find the Cancelled that an exception came of: a finally block may have raised another on the way."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Cancelled):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _own_usage() -> float:
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _repeat_last(pauses: tuple[float, ...]) -> Any:
    yield from pauses
    while True:
        yield pauses[-1]
