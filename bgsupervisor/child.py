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
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from bgsupervisor import logs, pauses, payload, processes, stacks, tasks, wire
from bgsupervisor.bodies import Progress, end_of
from bgsupervisor.clock import SystemClock, repeat_last
from bgsupervisor.coordination import AWAY_S, Coordination
from bgsupervisor.errors import BgSupervisorError, Cancelled
from bgsupervisor.ledger import Attempt, Ledger
from bgsupervisor.link import Link
from bgsupervisor.linux import set_child_subreaper
from bgsupervisor.models import Store, roll_back_abandoned
from bgsupervisor.statedir import StateDir
from bgsupervisor.wire import End, Run, Who

if sys.platform != "win32":  # a body on Windows loads this module too
    import resource

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.link import Line
    from bgsupervisor.service import Handle

__all__ = ["Birth", "Child", "main"]

log = logging.getLogger("bgsupervisor")

ACK_WAIT_S = 5.0
"""After this long without an acknowledgement the child records its end itself."""
ACK_SOON_S = 0.05
"""An acknowledgement takes some milliseconds; without one the body itself may have left the database locked."""
HELD_LOOK_S = 0.0005
HELD_WAIT_S = 5.0
"""A nursery watches a new child within a millisecond; one that has not after so long is stopped or dead."""
GIVE_BACK_S = 3600.0
"""So long an idle child that is to leave comes back to a database that is away, for the claim that may stand there."""
RECORD_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Pauses between tries to record an end; the last one repeats until it is in."""
PROGRESS_EVERY_S = 0.2
"""Progress is sent at most so often; the last word is never lost, the end carries it."""
ALIVE_EVERY_S = 1.0
"""Progress that says nothing new is sent so often: it tells that the body gets on (`stall_s`)."""
LEFTOVER_GRACE_S = 2.0
"""What a body left running gets SIGTERM, and SIGKILL after this long."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
"""For an application that configures no logging."""
KNOWN_LOOKS = 20
KNOWN_WAIT_S = 0.2
"""SIGTERM waits at most so long for the link to have read why it came."""


@dataclasses.dataclass(frozen=True, slots=True)
class Birth:
    """What a nursery hands to a child; picklable, for the spawn method.

    Attributes:
        kept_descriptors: The application's own, open since its import; all others that are not ours are closed.
        load: The application must be loaded by the child itself (spawn).
        held: Shared with the nursery, which sets it once it watches the child; before that the child does nothing.
        left_in_order: Shared with the nursery; set when the child leaves with nothing unrecorded, so that nobody
            needs to be told of its exit.
    """

    config: Config
    nursery: Who
    kept_descriptors: frozenset[int]
    load: bool
    held: Any
    left_in_order: Any


def main(birth: Birth) -> NoReturn:
    """Live as a child; never returns."""
    with contextlib.suppress(KeyboardInterrupt):
        _become_child(birth)
        if birth.load:
            # Only a spawned child loads by itself.
            from bgsupervisor.nursery import import_what_children_need, load_application  # noqa: PLC0415

            load_application(birth.config)
            import_what_children_need()
        Child(birth, SystemClock()).live()
    os._exit(0)


def _become_child(birth: Birth) -> None:
    os.setsid()
    set_child_subreaper()
    _close_foreign_descriptors(birth.kept_descriptors)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - multiprocessing's own was closed just now
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _forget_inherited_exit_callbacks()


def _forget_inherited_exit_callbacks() -> None:
    """Leave what the application registered at its import to the nursery: it may delete what all children share."""
    atexit._clear()  # noqa: SLF001 - as multiprocessing does for its own children from 3.13 on
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # type: ignore[attr-defined]  # noqa: SLF001 - ends managers and pools of the body


def _close_foreign_descriptors(kept: frozenset[int]) -> None:
    # One forgotten copy of a peer's socket keeps that peer "connected" after its death.
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - as plain as it is needed
        number = int(name)
        if number > 2 and number not in kept:  # noqa: PLR2004 - standard descriptors
            with contextlib.suppress(OSError):
                os.close(number)


class AttemptContext(tasks.Context):
    """What a body that a supervisor runs can ask and tell."""

    def __init__(self, order: Run, link: Line, coordination: Coordination, config: Config, clock: Clock) -> None:
        self.id = order.id
        self.attempt = order.attempt
        self.key = order.key
        self._link = link
        self._coordination = coordination
        self._config = config
        self._clock = clock
        self._sent_at = -PROGRESS_EVERY_S
        self.last = self._sent = Progress()

    @property
    def cancel_requested(self) -> bool:
        """Whether this attempt is to end."""
        return self._link.cancel_order is not None

    def progress(self, done: float | None = None, total: float | None = None, message: str | None = None) -> None:
        """Tell how far the body is; see `Context.progress`."""
        self.last = self.last.then(done, total, message)
        self._get_on()
        order = self._link.cancel_order
        if order is not None:
            raise Cancelled(order.reason, order.by, order.why)

    def _get_on(self) -> None:
        """Tell that the body gets on, and how far it is; if that is nothing new, now and then."""
        now, is_news = self._clock.monotonic(), self.last != self._sent
        is_time = now - self._sent_at >= (PROGRESS_EVERY_S if is_news else ALIVE_EVERY_S)
        if self.id is None or not (is_news or is_time):
            return
        done, total, message = self.last
        word = wire.Progress(id=self.id, attempt=self.attempt, done=done, total=total, message=message)
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

    def __init__(self, birth: Birth, clock: Clock) -> None:
        self._config = birth.config
        self._clock = clock
        self._held = birth.held
        self._left_in_order = birth.left_in_order
        self._pid = os.getpid()
        self._identity = processes.own_identity(processes.host_id(birth.config.host))
        self._logs = StateDir(birth.config.state_dir).logs
        self._log_path = logs.process_log(self._logs, self._identity.pid, self._identity.start_ticks)
        who = Who(self._identity.pid, self._identity.start_ticks)
        heartbeat_s = birth.config.heartbeat_s
        self._link = Link(birth.config.state_dir, who, birth.nursery, heartbeat_s=heartbeat_s, clock=clock)
        self._phase = "idle"
        self._term_came = False
        self._home = (Path.cwd(), _umask())
        self._answering = stacks.Answering()

    def live(self) -> NoReturn:
        """Take orders until told to leave; never returns."""
        # Unless it is known that we are to end the attempt, SIGTERM does what it does to any process.
        signal.signal(signal.SIGTERM, self._on_term)
        self._leave_sigterm_to_forks()
        pauses.at("child.born")
        self._await_nursery()
        with contextlib.suppress(OSError):
            self._answering.get_ready()
        self._link.questions = self._answering
        self._link.start()
        last = None
        for more in reversed(range(self._config.reuse)):
            order = self._link.orders.get()
            if order is None:
                self._give_back_unbegun()
                break
            last = order
            pauses.at("child.beginning")
            end = self._perform(order)
            pauses.at("child.over")
            self._report(order, end)
            if end.reason is not None or not more or not self._reusable():
                break  # who will not take another order must not say that it is idle
            self._link.become_idle()
        self._leave(last)

    def _await_nursery(self) -> None:
        """Be heard of by nobody before the nursery watches this process: if it cannot, it ends it."""
        deadline = self._clock.monotonic() + HELD_WAIT_S
        while not self._held.value:
            if self._clock.monotonic() >= deadline:  # it died meanwhile
                os._exit(0)
            self._clock.sleep(HELD_LOOK_S)

    # One attempt

    def _perform(self, order: Run) -> End:
        used_before = _own_usage()
        with contextlib.suppress(
            OSError
        ):  # a full log disk must not use up tasks: then it goes to the supervisor's log
            self._open_log()
        with contextlib.suppress(OSError):
            self._answering.get_ready()
        coordination = Coordination(
            order,
            self._link,
            lambda: self._ledger(patience_s=AWAY_S),
            self._config,
            self._clock,
            is_given_up=tasks.is_given_up,
            waits_alone=tasks.waits_alone,
        )
        context = AttemptContext(order, self._link, coordination, self._config, self._clock)
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

    def _guarded_body(self, order: Run, context: AttemptContext) -> End:
        definition = None
        try:
            definition = _resolve(order.name)
            data = payload.decode_data(
                order.data, definition.signature, name=order.name, secret=definition.options.secret
            )
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
        how = "the body ended after SIGTERM" if self._term_came else "the body ended when it was asked"
        return end_of(error, how=how)

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._phase in ("encoding", "ending"):
            return  # the body has ended, its end is on the way
        if self._phase == "body" and self._is_order_known():
            order = self._link.cancel_order
            self._term_came = True
            if self._link.main_inside:
                return
            if order is not None:
                raise Cancelled(order.reason, order.by, order.why)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _is_order_known(self) -> bool:
        """Give the link a moment to read why SIGTERM came; by looking, for a second SIGTERM may come in between."""
        for _ in range(KNOWN_LOOKS):
            if self._link.cancel_order is not None:
                return True
            self._clock.sleep(KNOWN_WAIT_S / KNOWN_LOOKS)
        return False

    def _leave_sigterm_to_forks(self) -> None:
        """Give what the body forks the default SIGTERM in place of ours: multiprocessing ends its processes with it.

        It is held back during the fork, for Python forgets a signal that a new process gets before it is ready.
        """
        held = threading.local()

        def hold() -> None:
            held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def let_go() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)

        def be_another() -> None:
            if signal.getsignal(signal.SIGTERM) == self._on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            let_go()

        os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=be_another)

    def _open_log(self) -> None:
        _flush_streams()
        descriptor = logs.open_for_append(self._log_path)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115

    def _default_logging(self) -> None:
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=LOG_FORMAT)

    # Reporting

    def _report(self, order: Run, end: End) -> None:
        """Return when the end is recorded: by the supervisor, or by ourselves if nobody acknowledges."""
        link = self._link
        link.report(end)
        pauses.at("child.reported")
        deadline = self._clock.monotonic() + ACK_WAIT_S
        link.push(ACK_WAIT_S)
        if not link.acknowledged.wait(ACK_SOON_S):
            roll_back_abandoned(for_good=_others_live())
        while not link.acknowledged.wait(0.05):
            if link.disconnected.is_set() or self._clock.monotonic() >= deadline:
                self._record(Attempt(order.id, order.attempt), end)
                break
        self._keep_log(order)
        self._phase = "idle"

    def _record(self, attempt: Attempt, end: End) -> None:
        pauses.at("child.recording")
        ledger = self._ledger()
        keys: list[str] = []
        told = ""
        for pause in repeat_last(RECORD_RETRY_S):
            try:
                ledger.end(attempt, end, keys)
            except (BgSupervisorError, OSError) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("the end of task %d cannot be recorded yet: %s", attempt.id, error)
                with contextlib.suppress(Exception):
                    ledger.store.close()
            else:
                pauses.at("child.recorded")
                self._link.ring(keys)
                return
            if self._link.acknowledged.wait(pause):
                return

    def _ledger(self, patience_s: float = 0.0) -> Ledger:
        config = self._config
        # A database that is away may come back, or be restored; an empty one in its place would know of no attempt.
        store = Store.open(
            config.database,
            config.table_prefix,
            busy_timeout_s=config.busy_timeout_s,
            creates=False,
            patience_s=patience_s,
        )
        store.take_turns(config.state_dir)
        return Ledger(store)

    def _keep_log(self, order: Run) -> None:
        with contextlib.suppress(OSError):
            logs.bound(self._log_path, self._config.log_max_bytes)
            if self._log_path.stat().st_size:
                self._log_path.rename(logs.task_log(self._logs, order.id, order.attempt))

    def _give_back_unbegun(self) -> None:
        """Give back what was claimed for this child and never came; a database that is away is come back to."""
        if not self._link.disconnected.is_set():
            return
        pauses.at("child.unclaiming")
        keys: list[str] = []
        ledger, until = self._ledger(), self._clock.monotonic() + GIVE_BACK_S
        for pause in repeat_last(RECORD_RETRY_S):
            try:
                ledger.unclaim_unbegun(self._identity, keys)
                break
            except (BgSupervisorError, OSError):
                with contextlib.suppress(Exception):
                    ledger.store.close()
                if ledger.store.inode() == 0 or self._clock.monotonic() >= until:  # 0: the file is gone
                    break
            self._clock.sleep(pause)
        self._link.ring(keys)

    # Leaving

    def _reusable(self) -> bool:
        """Whether nothing of the last body is left that the next one could trip over."""
        if _others_live():
            return False
        roll_back_abandoned(for_good=False)
        with contextlib.suppress(OSError):
            os.chdir(self._home[0])
            os.umask(self._home[1])
            signal.signal(signal.SIGTERM, self._on_term)
            return True
        return False

    def _leave(self, last: Run | None) -> NoReturn:
        """Run atexit callbacks for at most grace_s and leave, whatever threads the body left."""
        self._phase = "ending"
        pauses.at("child.leaving")
        self._left_in_order.value = 1
        limit = threading.Timer(self._config.grace_s, os._exit, args=(0,))
        limit.daemon = True
        limit.start()
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()  # noqa: SLF001 - os._exit skips them, and bodies rely on them
        _flush_streams()
        if last is not None:
            self._keep_log(last)  # it may have got its first line just now
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


def _resolve(name: str) -> tasks.Definition:
    definition = tasks.definition_of(name)
    if definition is None:
        raise BgSupervisorError(f"the task {name!r} is not loaded in this process")
    return definition


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


def _others_live() -> bool:
    """Whether the body has left threads."""
    return threading.active_count() > 2  # noqa: PLR2004 - the main thread and the link
