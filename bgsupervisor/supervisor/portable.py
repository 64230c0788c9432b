"""Runs tasks where Linux's means are missing, for development: by multiprocessing's spawn and psutil alone.

One loop in one process, as the supervisor's, with its transitions and its reasons; fewer promises (PROMISES). Each
attempt has a process of its own, started ahead of need, which has loaded the application; so changed code needs no more
than new spares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
from multiprocessing import connection, resource_tracker
from typing import TYPE_CHECKING

import msgspec
import psutil

from bgsupervisor.clock import SystemClock
from bgsupervisor.database.store import Store
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import AttemptResult, LoadFailure, TaskOptions
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger import Ledger
from bgsupervisor.ledger.attempts import Attempt, Batch, Claim, IntendedEnd, Telemetry
from bgsupervisor.ledger.records import SupervisorRecord
from bgsupervisor.sizes import compared, number
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor.termination import Stage, Termination
from bgsupervisor.system import logs, processes
from bgsupervisor.system.processes import ProcessIdentity
from bgsupervisor.worker import spawned
from bgsupervisor.worker.spawned import Ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.context import SpawnProcess

    from bgsupervisor.config import Config

__all__ = ["PROMISES", "Runner", "other_runner"]

log = logging.getLogger("bgsupervisor")

PROMISES = (
    "a task does not outlive this program: when it ends, or dies, so do all tasks",
    "what a task starts, and does not wait for, may live on when its process dies (no child subreapers)",
    "`stop`, `reload`, `suspend`, `resume` and `stack` do not reach it; Ctrl-C and a saved file do",
    "a kill for lack of memory is SIGNALLED, and CPU time and share are not shown",
    "an ended process is recognised by its PID and its start time, not by a handle of the kernel",
)
"""What `bgsupervisor run` on Linux keeps and this does not, each as part of a sentence."""
BOOT_ID = "portable"
"""Stands in for the boot id: a PID with the moment of its process's start is enough to tell it from a later one."""
LOOK_S = 0.1
"""Interval between two looks at the rows, in seconds."""
RECOVER_EVERY_S = 5.0
"""Interval between full checks of all running rows, in seconds."""
NOTES_EVERY_S = 0.25
"""Interval between two writes of progress, in seconds."""
USAGE_EVERY_S = 0.5
"""Interval between two looks at memory and log sizes, in seconds."""
BEAT_EVERY_S = 15.0
"""Longest interval between two renewals of this program's row, in seconds; `heartbeat_s` while something runs."""
RESPAWN_S = 1.0
"""Pause after a child that died before it had loaded the application, in seconds."""
LEAVE_S = 5.0
"""How long children have to leave at the end, in seconds, before they are killed."""


@dataclasses.dataclass(eq=False, slots=True)
class _Child:
    """A spawned process as this one sees it.

    Attributes:
        code: Which version of the code it loads, counted from 0.
        over: It has recorded its end, and leaves.
        got_on_at: When the body last reported progress, monotonic.
        waits: The body waits for others.
    """

    process: SpawnProcess
    pipe: connection.Connection
    identity: ProcessIdentity
    code: int
    ready: Ready | None = None
    attempt: Attempt | None = None
    name: str = ""
    started_mono: float = 0.0
    got_on_at: float = 0.0
    waits: bool = False
    over: bool = False
    dismissed: bool = False
    termination: Termination | None = None
    note: Telemetry = dataclasses.field(default_factory=Telemetry)
    peak_rss_bytes: int = 0

    @property
    def idle(self) -> bool:
        """Whether it waits for an order."""
        return self.ready is not None and self.attempt is None and not self.dismissed

    @property
    def runs(self) -> bool:
        """Whether its attempt has not ended, as far as is known."""
        return self.attempt is not None and not self.over

    def say(self, message: messages.Message) -> bool:
        """Send a message; False if it has gone."""
        try:
            self.pipe.send_bytes(spawned.encode(message))
        except (OSError, ValueError):
            return False
        return True


class Runner:
    """Runs the tasks of one installation, in the foreground.

    Args:
        config: The configuration.
        loaded: Called with what the first child of each version of the code has loaded.

    Raises:
        DatabaseError, AccessError, SchemaError: The database cannot be opened.
    """

    def __init__(self, config: Config, loaded: Callable[[Ready], None]) -> None:
        self._config = config
        self._loaded = loaded
        self._own = _identity_of(os.getpid(), processes.host_id(config.host))
        store = Store.open(config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s)
        self._ledger = Ledger(store)
        self._clock = SystemClock()
        self._logs = StateDir(config.state_dir).logs
        self._context = multiprocessing.get_context("spawn")
        if hasattr(resource_tracker, "ensure_running"):
            resource_tracker.ensure_running()  # its start, by that of the first child, would let Ctrl-C through
        self._children: list[_Child] = []
        self._code, self._known, self._lost = 0, -1, -1
        self._catalogue: dict[str, TaskOptions] = {}
        self._failures: list[LoadFailure] = []
        self._started_at = self._ledger.clock.now()
        self._is_ending = False
        self._recover_at = self._notes_at = self._usage_at = self._spawn_at = 0.0
        self._beat_at = -BEAT_EVERY_S

    # What the caller asks

    def tick(self) -> None:
        """One pass; rests at most LOOK_S.

        Raises:
            DatabaseError, AccessError: The rows cannot be read or written; the next pass does what this one missed.
        """
        self._hear()
        self._bury()
        self._recover()
        self._enforce()
        self._spawn(self._admit())
        self._write()

    def reload(self) -> None:
        """Load the code on disk in new children; running tasks finish on the old code."""
        self._code += 1
        self._spawn_at = 0.0
        for child in self._children:
            if child.attempt is None:
                self._dismiss(child)

    def end(self, *, kill: bool = False) -> None:
        """Begin no more tasks, and end the running ones (STOPPED); with *kill* at once."""
        self._is_ending = True
        for child in self._children:
            if child.runs:
                self._termination(child, Reason.STOPPED, "`bgsupervisor dev` was ended", kill=kill)
            elif child.attempt is None:
                self._dismiss(child)

    def is_over(self) -> bool:
        """Whether no task runs any more."""
        return not any(child.runs for child in self._children)

    def close(self) -> None:
        """End all children that are left, and record that this program has left."""
        for child in self._children:
            child.say(messages.Leave())
        deadline = self._clock.monotonic() + LEAVE_S
        for child in self._children:
            child.process.join(max(0.0, deadline - self._clock.monotonic()))
            if child.process.is_alive():
                _kill_tree(child)
                child.process.join(LEAVE_S)
        with contextlib.suppress(Exception):  # the database may be what has ended us
            self._bury()
            self._ledger.apply(Batch(supervisor=dataclasses.replace(self._row(), left_at=self._ledger.clock.now())))
        self._ledger.store.close()

    # hear, bury

    def _hear(self) -> None:
        """Wait until a child sends something or dies, at most LOOK_S; take in all messages."""
        ends = [child.process.sentinel for child in self._children]
        connection.wait([*(child.pipe for child in self._children), *ends], LOOK_S)
        for child in self._children:
            self._hear_of(child)

    def _hear_of(self, child: _Child) -> None:
        with contextlib.suppress(EOFError, OSError):
            while child.pipe.poll():
                self._take(child, spawned.decode(child.pipe.recv_bytes()))

    def _take(self, child: _Child, message: Ready | messages.Message) -> None:
        if isinstance(message, Ready):
            child.ready = message
            if child.code == self._code != self._known:
                self._known, self._catalogue = self._code, message.catalogue
                self._note_loaded(message)
        elif isinstance(message, messages.Notify):
            self._notify(message.keys)
        elif isinstance(message, messages.ResultReport):
            child.over = True
        elif isinstance(message, messages.Waiting):
            child.waits = True
        elif isinstance(message, messages.Resumed | messages.Progress | messages.Beat):
            child.note.heartbeat_at = self._ledger.clock.now()
            if not isinstance(message, messages.Beat):
                child.waits, child.got_on_at = False, self._clock.monotonic()
            if isinstance(message, messages.Progress):
                child.note.progress_done, child.note.progress_total = message.done, message.total
                child.note.message = message.message

    def _notify(self, keys: Iterable[str]) -> None:
        """Wake all bodies that wait, whatever their keys: there are few of them here."""
        some = list(keys)
        for child in self._children if some else ():
            if child.runs:
                child.say(messages.Notify(some))

    def _bury(self) -> None:
        """Take leave of dead children, and record how they ended if they have not done it themselves."""
        for child in [child for child in self._children if not child.process.is_alive()]:
            self._hear_of(child)
            if child.attempt is not None:
                self._record_death(child, child.attempt)
            elif child.ready is None and not child.dismissed:
                self._note_lost(child)
            self._children.remove(child)
            child.pipe.close()
            child.process.close()

    def _record_death(self, child: _Child, attempt: Attempt) -> None:
        record = self._ledger.get(attempt.id)
        if record is not None and (record.status, record.attempt) == ("START", attempt.attempt):
            keys: list[str] = []
            self._ledger.end(attempt, _end_of_dead(child), keys)
            self._notify(keys)
        path = logs.task_log(self._logs, attempt.id, attempt.attempt)
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()

    def _note_lost(self, child: _Child) -> None:
        """Report, once for each version of the code, that a child died while it loaded; the next one may not."""
        self._spawn_at = self._clock.monotonic() + RESPAWN_S
        if child.code == self._code and self._code not in (self._known, self._lost):
            self._lost = self._code
            why = f"the process that loads it ended with exit code {child.process.exitcode} before it had loaded it"
            self._note_loaded(Ready({}, [LoadFailure(", ".join(self._config.tasks), why)]))

    def _note_loaded(self, ready: Ready) -> None:
        self._failures, self._beat_at = ready.failures, -BEAT_EVERY_S
        self._loaded(ready)

    # recover

    def _recover(self) -> None:
        """Record what an earlier run of this program has left in the rows, once its processes are gone."""
        now = self._clock.monotonic()
        if now < self._recover_at:
            return
        self._recover_at = now + RECOVER_EVERY_S
        own = {child.attempt for child in self._children}
        for record in self._ledger.starts():
            attempt = Attempt(record.id, record.attempt)
            if attempt not in own and record.boot_id == BOOT_ID and not _lives(record.pid, record.start_ticks):
                detail = "its process is gone and nobody could see how it ended"
                keys: list[str] = []
                self._ledger.end(attempt, AttemptResult(reason=Reason.VANISHED, detail=detail), keys)
                self._notify(keys)

    # enforce

    def _enforce(self) -> None:
        """See to cancels and limits: decide, commit the reason, then send the signal."""
        for control in self._ledger.control_requests():
            child = self._running(control.attempt)
            if child is not None and control.cancelled:
                by = control.cancelled_by
                self._termination(child, Reason.CANCELLED, f"cancelled by {by}" if by else "cancelled", by=by)
        now = self._clock.monotonic()
        looks = now >= self._usage_at
        self._usage_at = now + USAGE_EVERY_S if looks else self._usage_at
        for child in self._children:
            if child.runs:
                self._enforce_limits(child, now, looks=looks)
        due = {
            child.attempt: child
            for child in self._children
            if child.runs and child.termination and child.termination.unsent
        }
        if not due:
            return
        intended_ends = {
            attempt: IntendedEnd(child.termination.reason, child.termination.detail())
            for attempt, child in due.items()
            if attempt is not None and child.termination is not None
        }
        self._ledger.apply(Batch(intended_ends=intended_ends))
        for child in due.values():
            self._carry_out(child)

    def _enforce_limits(self, child: _Child, now: float, *, looks: bool) -> None:
        options, termination = self._catalogue.get(child.name, TaskOptions()), child.termination
        if looks:
            self._look_at_usage(child, options.memory_limit_bytes)
        if termination is not None:
            if now >= termination.next_at and termination.stage is not Stage.KILL:
                termination.stage, termination.next_at = Stage(termination.stage + 1), now + self._config.grace_s
                termination.unsent = True
        elif options.timeout_s is not None and now >= child.started_mono + options.timeout_s:
            self._termination(child, Reason.TIMED_OUT, f"ran past its timeout_s of {number(options.timeout_s)} s")
        elif options.stall_s is not None and not child.waits and now >= child.got_on_at + options.stall_s:
            self._termination(
                child, Reason.TIMED_OUT, f"made no progress for its stall_s of {number(options.stall_s)} s"
            )

    def _look_at_usage(self, child: _Child, limit_bytes: int | None) -> None:
        rss_bytes = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(child.identity.pid)
            rss_bytes = sum(_rss_bytes(one) for one in (root, *root.children(recursive=True)))
        child.peak_rss_bytes = max(child.peak_rss_bytes, rss_bytes)
        child.note.rss_bytes, child.note.peak_rss_bytes = rss_bytes, child.peak_rss_bytes
        if limit_bytes is not None and rss_bytes > limit_bytes:
            used, allowed = compared(rss_bytes, limit_bytes)
            why = f"used {used} of memory, over its memory_limit_bytes of {allowed}"
            self._termination(child, Reason.OUT_OF_MEMORY, why, kill=True)
        if child.attempt is not None:
            path = logs.task_log(self._logs, child.attempt.id, child.attempt.attempt)
            with contextlib.suppress(OSError):
                logs.bound(path, self._config.log_max_bytes)

    def _termination(
        self, child: _Child, reason: Reason, why: str, *, by: str | None = None, kill: bool = False
    ) -> None:
        """Begin to end an attempt; the first reason stands."""
        if child.attempt is None:
            return
        if child.termination is None:
            child.termination = Termination(reason, why, by, self._clock.monotonic() + self._config.grace_s)
            id, attempt = child.attempt.id, child.attempt.attempt
            child.say(messages.Cancel(id=id, attempt=attempt, reason=reason, why=why, by=by))
        if kill and child.termination.stage is not Stage.KILL:
            child.termination.stage, child.termination.unsent = Stage.KILL, True

    def _carry_out(self, child: _Child) -> None:
        """Send the signal whose reason is committed; Windows knows no other end than the last."""
        assert child.termination is not None  # noqa: S101 - it was just recorded
        child.termination.unsent = False
        if child.termination.stage is Stage.KILL or sys.platform == "win32":
            _kill_tree(child)
        else:
            child.process.terminate()

    def _running(self, attempt: Attempt) -> _Child | None:
        return next((child for child in self._children if child.attempt == attempt and child.runs), None)

    # admit

    def _admit(self) -> int:
        """Pair due tasks with idle children and free slots; return how many children are missing."""
        if self._is_ending:
            return 0
        current = [child for child in self._children if child.code == self._code and child.attempt is None]
        idle = [child for child in current if child.idle]
        free = self._free_slots()
        due = self._ledger.due(self._catalogue, limit=len(free) + 1) if self._known == self._code else []
        flawed = [one for one in due if one.flaw]
        if flawed:
            self._ledger.apply(Batch(flawed=flawed))
            due = [one for one in due if not one.flaw]
        now = self._clock.monotonic()
        pairs = list(zip(due, idle, free, strict=False))
        claims = {task.id: (Claim(task, child.identity, slot, now), child) for task, child, slot in pairs}
        if claims:
            outcome = self._ledger.apply(Batch(claims=[claim for claim, _ in claims.values()]))
            for claim in outcome.claimed:
                self._start(claim, claims[claim.due.id][1])
        return min(len(due), len(free)) + max(1, self._config.spares) - len(current)

    def _free_slots(self) -> list[int]:
        """Return the slots for new tasks: those that are free, without as many as bodies that have waited want back."""
        taken = {record.slot for record in self._ledger.starts() if record.slot is not None}
        returning = sum(row["kind"] == "slot" for row in self._ledger.waits.rows())
        return [slot for slot in range(self._config.slots) if slot not in taken][returning:]

    def _start(self, claim: Claim, child: _Child) -> None:
        if not child.say(claim.assignment()):
            self._ledger.apply(Batch(unclaims={claim.attempt}))  # it has died, and never began
            return
        child.attempt, child.name, child.started_mono = claim.attempt, claim.due.name, claim.started_mono
        child.got_on_at = claim.started_mono

    def _spawn(self, count: int) -> None:
        if self._clock.monotonic() < self._spawn_at:
            return
        for _ in range(count):
            try:
                self._spawn_one()
            except OSError as error:  # no process, memory or descriptor left
                self._spawn_at = self._clock.monotonic() + RESPAWN_S
                log.error("cannot start a child: %s; trying again in %g s", error, RESPAWN_S)  # noqa: TRY400 - the sentence says it
                return

    def _spawn_one(self) -> None:
        ours, theirs = self._context.Pipe()
        with theirs, contextlib.ExitStack() as undo:
            undo.enter_context(ours)
            process = self._context.Process(
                target=spawned.main, args=(self._config, theirs), name="bgsupervisor child", daemon=False
            )
            with _ctrl_c_held():
                process.start()
            undo.pop_all()
        identity = _identity_of(process.pid or 0, self._own.host)
        self._children.append(_Child(process, ours, identity, self._code))

    def _dismiss(self, child: _Child) -> None:
        child.dismissed = True
        child.say(messages.Leave())

    # write

    def _write(self) -> None:
        """Write what is known of running attempts, and that this program lives."""
        now = self._clock.monotonic()
        batch = Batch()
        if now >= self._notes_at:
            self._notes_at = now + NOTES_EVERY_S
            noted = [child for child in self._children if child.runs and child.note]
            batch.telemetry = {child.attempt: child.note for child in noted if child.attempt is not None}
            for child in noted:
                child.note = Telemetry()
        runs = any(child.runs for child in self._children)
        beat_every_s = min(BEAT_EVERY_S, self._config.heartbeat_s) if runs else BEAT_EVERY_S
        if now >= self._beat_at + beat_every_s and max(self._known, self._lost) >= 0:
            self._beat_at = now
            batch.supervisor = self._row()
        if batch:
            self._ledger.apply(batch)

    def _row(self) -> SupervisorRecord:
        from bgsupervisor import __version__  # noqa: PLC0415 - the package names its version last

        return SupervisorRecord(
            **dataclasses.asdict(self._own),
            started_at=self._started_at,
            heartbeat_at=self._ledger.clock.now(),
            slots=self._config.slots,
            version=__version__,
            catalogue=msgspec.json.encode(self._catalogue).decode(),
            code_error=msgspec.json.encode(self._failures).decode() if self._failures else None,
        )


@contextlib.contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """Hold Ctrl-C back, for the process that is started within too: it lets it go once it ignores it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def other_runner(rows: Sequence[SupervisorRecord]) -> int | None:
    """Return the PID of another program of this kind that runs tasks on the same rows; None if there is none."""
    present = [row.pid for row in rows if row.boot_id == BOOT_ID and row.left_at is None and _is_there(row)]
    return next((pid for pid in present if pid != os.getpid()), None)


def _identity_of(pid: int, host: str) -> ProcessIdentity:
    """Return the stand-in identity of a living process: no PID namespace, its start in milliseconds for the ticks."""
    return ProcessIdentity(host, BOOT_ID, 0, pid, _started_ms(pid) or 0)


def _started_ms(pid: int) -> int | None:
    try:
        return round(psutil.Process(pid).create_time() * 1000)
    except psutil.NoSuchProcess:
        return None


def _lives(pid: int | None, started_ms: int | None) -> bool:
    """Whether a process lives; one that cannot be looked at counts as living."""
    if pid is None or pid <= 0:
        return False
    try:
        return _started_ms(pid) == started_ms and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _is_there(row: SupervisorRecord) -> bool:
    return _lives(row.pid, row.start_ticks)


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _kill_tree(child: _Child) -> None:
    """Kill a child, which is not reaped yet and so has its PID, and all that can be seen below it."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(child.identity.pid).children(recursive=True)
    child.process.kill()
    for process in below:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _end_of_dead(child: _Child) -> AttemptResult:
    """Return what is recorded of a child that died before it recorded its end; the row's own `ending` comes first."""
    exitcode = child.process.exitcode or 0
    if child.termination is not None and child.termination.stage >= Stage.TERM:
        return AttemptResult(
            reason=child.termination.reason,
            detail=child.termination.detail(),
            signal=-exitcode if exitcode < 0 else None,
        )
    if exitcode < 0:
        name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else "a signal"
        detail = f"killed by {name} ({-exitcode}), which bgsupervisor did not send"
        return AttemptResult(reason=Reason.SIGNALLED, detail=detail, signal=-exitcode)
    detail = f"the process exited with code {exitcode} before it reported an end"
    return AttemptResult(reason=Reason.EXITED, detail=detail, exit_code=exitcode)
