"""The supervisor: decides when. One single-threaded loop that starts tasks, watches children and records every end.

It imports no application code, forks nothing itself, holds one database connection and never waits for anybody.
Children are all treated as adopted: death comes from the pidfd, the exit from the nursery, the result from the message
or the row; so it does not matter which supervisor started them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from bgsupervisor import logs, nursery, processes, wire
from bgsupervisor.errors import AccessError, BgSupervisorError, DatabaseError
from bgsupervisor.ledger import Attempt, Batch, Claim, Ending, Ledger, Note
from bgsupervisor.linux import set_child_subreaper
from bgsupervisor.models import Store, SupervisorRecord
from bgsupervisor.oom import OomWatch
from bgsupervisor.processes import Exit, ProcessIdentity, Verdict
from bgsupervisor.reception import Heard, Peer, Reception
from bgsupervisor.statuses import Reason
from bgsupervisor.wire import End, Exited, TaskOptions, Who

if TYPE_CHECKING:
    from datetime import datetime

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ledger import Due, Outcome
    from bgsupervisor.models import TaskRecord
    from bgsupervisor.oom import Counters
    from bgsupervisor.processes import ProcessHandle
    from bgsupervisor.statedir import Lock, StateDir

__all__ = ["Supervisor"]

log = logging.getLogger("bgsupervisor")

BUSY_TIMEOUT_S = 0.1
"""How long one pass may wait for another writer of the database before it is put off."""
NET_S = 1.0
"""Without a bell the loop looks at least so often: at the database's version, its own files and its clocks."""
RECOVER_EVERY_S = 5.0
"""Every START row is looked at so often, whatever was heard of it."""
NURSERY_WAIT_S = 1.2
"""After a start no dead child is called VANISHED before the living nurseries have said hello, or this long."""
EXIT_WAIT_S = 0.5
"""How long the nursery's word on a dead child is waited for before other evidence is taken."""
NOTES_EVERY_S = 0.25
"""Progress and heartbeats reach the rows at most so often, unless something else is written anyway."""
LIMITS_EVERY_S = 1.0
"""Memory limits and log sizes are looked at so often while something runs."""
SUPERVISOR_BEAT_S = 15.0
"""The supervisor's own row is renewed so often."""
PUT_OFF_S = (0.1, 0.2, 0.5, 1.0)
"""Pauses between tries to write while the database is locked, full or away; the last one repeats."""
KILL_WITHOUT_RECORD_S = 1.0
"""A kill whose reason cannot be recorded goes through the nursery after this long, and comes back with the exit."""
NURSERY_RESTART_S = (0.1, 1.0, 5.0, 15.0)
"""Pauses before a nursery that died is started again; the last one repeats."""
LEAVE_SLACK_S = 5.0
"""A child that was acknowledged is killed when it is still there grace_s and this long later."""


class Stage(enum.IntEnum):
    """How far the ending of an attempt had to go."""

    ASKED = 1
    TERM = 2
    KILL = 3


@dataclasses.dataclass(slots=True)
class Order:
    """The decision to end an attempt before its end, carried out in stages."""

    reason: Reason
    why: str
    by: str | None
    stage: Stage
    next_at: float
    unsent: bool = False
    due_since: float = 0.0

    def detail(self) -> str:
        """The sentence that is recorded: why, by whom, and how far it had to go."""
        how = {
            Stage.ASKED: "it was asked",
            Stage.TERM: "the body did not end when asked, SIGTERM was sent",
            Stage.KILL: "SIGKILL was sent",
        }
        return f"{self.why}; {how[self.stage]}"


@dataclasses.dataclass(eq=False, slots=True)
class Ward:
    """A child as the supervisor sees it, whoever started it."""

    identity: ProcessIdentity
    handle: ProcessHandle | None
    nursery: Who | None = None
    peer: Peer | None = None
    attempt: Attempt | None = None
    name: str = ""
    slot: int | None = None
    started_mono: float = 0.0
    says: Attempt | None = None
    run_place: int | None = None
    end: End | None = None
    dead_since: float | None = None
    order: Order | None = None
    note: Note = dataclasses.field(default_factory=Note)
    oom: Counters | None = None
    cpu_seen: tuple[float, float] | None = None
    leave_by: float | None = None

    @property
    def who(self) -> Who:
        """Its PID and start ticks."""
        return Who(self.identity.pid, self.identity.start_ticks)

    @property
    def idle(self) -> bool:
        """Whether it waits for an order."""
        free = self.attempt is None and self.says is None and self.end is None and self.leave_by is None
        return free and self.dead_since is None and self.peer is not None and not self.peer.channel.closed


@dataclasses.dataclass(eq=False, slots=True)
class Home:
    """A nursery as the supervisor sees it; `ours` is the one that this supervisor started."""

    hello: wire.NurseryHello
    peer: Peer
    ours: bool
    ordered: int = 0


class Supervisor:
    """Supervises one state directory and database; construct it with the lock held, then call `run`."""

    def __init__(self, config: Config, *, state_dir: StateDir, lock: Lock, clock: Clock, burst: bool = False) -> None:
        self._config = config
        self._clock = clock
        self._lock = lock
        self._burst = burst
        self._identity = processes.own_identity(processes.host_id(config.host))
        self._state_dir = state_dir
        self._logs = state_dir.logs
        store = Store.open(
            config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s, checkpointer=True
        )
        self._ledger = Ledger(store, clock)
        self._store = store
        self._wards: dict[Who, Ward] = {}
        self._homes: dict[Who, Home] = {}
        self._exits: dict[Who, Exited] = {}
        self._spoken: list[Who] = []
        self._seen: list[Who] = []
        self._foreign_slots: set[int] = set()
        self._nursery: Any = None
        self._nursery_who: Who | None = None
        self._nursery_handle: ProcessHandle | None = None
        self._nursery_deaths = 0
        self._nursery_at = 0.0
        self._inherited = False
        self._oom = OomWatch()
        self._look = True
        self._backlog = False
        self._next_due_at: datetime | None = None
        self._recover_at = 0.0
        self._recovered = False
        self._limits_at = 0.0
        self._usage_at = 0.0
        self._notes_at = 0.0
        self._net_at = 0.0
        self._beat_at = 0.0
        self._put_off_until = 0.0
        self._put_offs = 0
        self._draining = False
        self._interrupts = 0
        self._leaving: str | None = None
        self._exit_code = 0
        self._started_at = clock.now()
        self._started_mono = clock.monotonic()
        self._data_version = -1
        self._database_inode: int | None = None
        self._reception: Reception | None = None
        self._nurseries_awaited: set[Who] = set()
        self._row_ends: dict[Attempt, End] = {}
        self._unbegun: set[Attempt] = set()
        self._last_complaint = ""

    # The loop

    def run(self) -> int:
        """Supervise until told to leave; return the exit code. The caller leaves by os._exit."""
        self._open()
        log.info("supervising %s with %d slots, PID %d", self._config.database, self._config.slots, os.getpid())
        while self._leaving is None:
            self.tick()
        self._leave()
        return self._exit_code

    def tick(self) -> None:
        """One pass."""
        heard = self._hear(self._rest_s())
        self._reap(heard)
        self._recover()
        self._enforce()
        claims = self._admit()
        self._write(claims)
        self._look_after_itself()

    def _open(self) -> None:
        set_child_subreaper()
        with self._store.connected():
            self._store.database.timeout = BUSY_TIMEOUT_S
        self._reception = Reception(self._state_dir)
        self._reception.listen_to_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
        if self._store.path is not None:
            self._database_inode = self._store.path.stat().st_ino
            wal = self._store.wal_path()
            if wal is not None:
                self._reception.watch_file(wal)
        self._nurseries_awaited = self._living_nurseries()
        self._start_nursery()

    @property
    def _ears(self) -> Reception:
        assert self._reception is not None  # noqa: S101 - set by _open, before the loop
        return self._reception

    # hear

    def _hear(self, timeout_s: float) -> list[Who]:
        """Rest until something happens, and take it in; return who died."""
        heard = self._ears.hear(self._ears.rest(timeout_s))
        for peer, message in heard.messages:
            self._take(peer, message)
        self._hear_signals(heard)
        if heard.rung:
            self._look = True
        if heard.database_touched:
            self._look_if_changed()
        return heard.deaths

    def _take(self, peer: Peer, message: wire.Message) -> None:
        if isinstance(message, wire.ChildHello):
            self._take_child(peer, message)
        elif isinstance(message, wire.NurseryHello):
            self._take_nursery(peer, message)
        elif isinstance(message, Exited):
            self._exits[message.who] = message
        elif isinstance(message, wire.SpawnFailed):
            self._take_spawn_failure(peer, message)
        else:
            ward = self._wards.get(peer.who) if peer.who is not None else None
            if ward is not None:
                self._take_of_ward(ward, message)

    def _take_child(self, peer: Peer, hello: wire.ChildHello) -> None:
        who = hello.who
        ward = self._wards.get(who)
        if ward is None:
            ward = self._meet(self._identity_of(who))
        ward.peer = peer
        ward.nursery = hello.nursery
        home = self._homes.get(hello.nursery)
        if home is not None and hello.id is None:
            home.ordered = max(0, home.ordered - 1)
        if hello.id is None:
            # It has read its last connection to the end: what was claimed for it and is not in its hands never began.
            ward.says = None
            ward.leave_by = None
            return
        said = Attempt(hello.id, hello.attempt)
        if ward.attempt != said:
            ward.says = said
            self._recover_at = 0.0
        if hello.end is not None:
            ward.end = hello.end

    def _take_nursery(self, peer: Peer, hello: wire.NurseryHello) -> None:
        ours = hello.who == self._nursery_who
        self._homes[hello.who] = Home(hello, peer, ours)
        self._nurseries_awaited.discard(hello.who)
        for exited in hello.exits:
            self._exits[exited.who] = exited
        for warning in hello.warnings:
            log.warning("%s", warning)
        if ours:
            self._nursery_deaths = 0
            self._look = True
            self._beat_at = 0.0
            log.info("loaded %d tasks%s", len(hello.catalogue), _count_failures(hello))
        else:
            self._ears.send(peer, wire.Retire())

    def _take_of_ward(self, ward: Ward, message: wire.Message) -> None:
        if isinstance(message, wire.Ended):
            if ward.attempt == Attempt(message.id, message.attempt):
                ward.end = message.end
            elif ward.peer is not None and ward.says is None:
                self._ears.send(ward.peer, wire.Ack(message.id, message.attempt))  # superseded: it must not wait
        elif isinstance(message, wire.Beat | wire.Progress) and ward.attempt == Attempt(message.id, message.attempt):
            ward.note.heartbeat_at = self._clock.now()
            if isinstance(message, wire.Progress):
                ward.note.progress_done = message.done
                ward.note.progress_total = message.total
                ward.note.message = message.message

    def _take_spawn_failure(self, peer: Peer, message: wire.SpawnFailed) -> None:
        home = self._homes.get(peer.who) if peer.who is not None else None
        if home is not None:
            home.ordered = max(0, home.ordered - message.count)
            self._put_off_until = self._clock.monotonic() + PUT_OFF_S[-1]
        log.error("the nursery cannot fork children (%s); trying again", message.error)

    def _hear_signals(self, heard: Heard) -> None:
        for number in heard.signals:
            if number == signal.SIGINT:
                self._interrupts += 1
                self._hear_interrupt()
            elif number in (signal.SIGTERM, signal.SIGHUP):
                self._leaving = f"{signal.Signals(number).name} came"

    def _hear_interrupt(self) -> None:
        """Ctrl-C: once, admit nothing more and wait for what runs; twice, end it; three times, kill it."""
        running = self._running()
        self._draining = True
        if not running or self._interrupts == 1:
            names = ", ".join(f"{ward.attempt.id} ({ward.name})" for ward in running if ward.attempt is not None)
            if running:
                log.warning("still running: %s; leaving when they have ended. Ctrl-C again kills them", names)
            return
        stage = Stage.TERM if self._interrupts == 2 else Stage.KILL  # noqa: PLR2004 - the second Ctrl-C
        for ward in running:
            self._order(ward, Reason.STOPPED, "the supervisor was told to stop and kill (Ctrl-C)", stage=stage)

    def _look_if_changed(self) -> None:
        with contextlib.suppress(BgSupervisorError):
            version = self._store.data_version()
            if version != self._data_version:
                self._data_version = version
                self._look = True

    # reap

    def _reap(self, deaths: list[Who]) -> None:
        """Find out how the dead died; what cannot be known yet is asked again in the next pass."""
        now = self._clock.monotonic()
        for who in deaths:
            if who == self._nursery_who:
                self._nursery_died()
            ward = self._wards.get(who)
            if ward is not None and ward.dead_since is None:
                ward.dead_since = now
        for ward in [ward for ward in self._wards.values() if ward.dead_since is not None]:
            self._examine(ward, now)
        self._acknowledge_strangers()

    def _examine(self, ward: Ward, now: float) -> None:
        if ward.peer is not None:
            for message in self._ears.last_words(ward.peer):
                self._take_of_ward(ward, message)
        if ward.attempt is None and ward.says is None:
            self._forget(ward)
            return
        if ward.end is not None or ward.attempt is None:
            return
        if ward.run_place is not None and ward.peer is not None and ward.peer.channel.written_bytes <= ward.run_place:
            return  # not a byte of Run has left: _write gives the row back
        exit = self._exit_of(ward, now)
        if exit is not None:
            ward.end = self._end_of_death(ward, exit)

    def _exit_of(self, ward: Ward, now: float) -> Exit | None:
        """Return how a dead child ended, by the best evidence there is; None while better may still come."""
        exited = self._exits.get(ward.who)
        if exited is not None:
            return Exit(exited.exit_code, exited.signal)
        if self._inherited and ward.handle is not None:
            inherited = _reap_inherited(ward.handle)
            if inherited is not None:
                return inherited
        assert ward.dead_since is not None  # noqa: S101 - only the dead are examined
        waited = now - ward.dead_since
        if waited < (NURSERY_WAIT_S if self._nurseries_awaited else EXIT_WAIT_S):
            return None
        seen = None if ward.handle is None else ward.handle.exit_status()
        if seen is not None:
            return seen
        if processes.verdict(ward.identity) is not Verdict.DEAD:  # the second look; psutil's word counts
            ward.dead_since = now
            return None
        return Exit(None, None)

    def _end_of_death(self, ward: Ward, exit: Exit) -> End:
        exited = self._exits.get(ward.who)
        ordered = exited.ordered if exited is not None else None
        order = ward.order
        if ordered is None and order is not None and order.stage >= Stage.TERM and not order.unsent:
            ordered = order.reason
        facts: dict[str, Any] = {"exit_code": exit.exit_code, "signal": exit.signal}
        if ordered is not None:
            detail = order.detail() if order is not None else "ended by its supervisor"
            return End(reason=ordered, detail=detail, **facts)
        if exit.signal is not None:
            name = signal.Signals(exit.signal).name if exit.signal in set(signal.Signals) else f"signal {exit.signal}"
            evidence = None
            if exit.signal == signal.SIGKILL and ward.oom is not None:
                evidence = self._oom.evidence(ward.identity.pid, ward.oom)
            if evidence is not None:
                return End(reason=Reason.OUT_OF_MEMORY, detail=evidence, **facts)
            return End(
                reason=Reason.SIGNALLED, detail=f"killed by {name} ({exit.signal}), not sent by bgsupervisor", **facts
            )
        if exit.exit_code is not None:
            detail = f"the process exited with code {exit.exit_code} before it reported an end"
            return End(reason=Reason.EXITED, detail=detail, **facts)
        return End(reason=Reason.VANISHED, detail="its process is gone and nobody could see how it ended")

    def _acknowledge_strangers(self) -> None:
        """Let nurseries forget exits that no task depends on: idle children, and ends that are recorded."""
        if self._recovered:
            self._seen += [who for who in self._exits if who not in self._wards]
        for who in self._seen:
            self._exits.pop(who, None)
        if self._seen:
            for home in self._homes.values():
                if not home.peer.channel.closed:
                    self._ears.send(home.peer, wire.ExitsSeen(self._seen))
            self._seen = []

    # recover

    def _recover(self) -> None:
        """Look at every START row: adopt what lives, find out about what does not."""
        now = self._clock.monotonic()
        if now < self._recover_at:
            return
        try:
            records = self._ledger.starts()
        except (DatabaseError, AccessError) as error:
            self._complain(error)
            return
        self._recover_at = now + RECOVER_EVERY_S
        self._foreign_slots = set()
        running = set()
        for record in records:
            running.add(Attempt(record.id, record.attempt))
            self._recover_row(record)
        for ward in list(self._wards.values()):
            self._recover_ward(ward, running)
        self._recovered = True

    def _recover_row(self, record: TaskRecord) -> None:
        attempt = Attempt(record.id, record.attempt)
        if record.pid is None or record.start_ticks is None or record.boot_id is None or record.pid_ns is None:
            self._bury_row(
                record, End(reason=Reason.VANISHED, detail="the row names no process; it was written by hand")
            )
            return
        identity = ProcessIdentity(self._identity.host, record.boot_id, record.pid_ns, record.pid, record.start_ticks)
        if record.boot_id != self._identity.boot_id:
            detail = "the machine was started anew while the task ran (its boot id differs)"
            self._bury_row(record, End(reason=Reason.HOST_REBOOTED, detail=detail))
            return
        if record.pid_ns != self._identity.pid_ns:
            self._judge_by_lease(record)
            return
        ward = self._wards.get(Who(record.pid, record.start_ticks)) or self._meet(identity)
        if ward.attempt == attempt:
            return
        if ward.attempt is not None or ward.end is not None and ward.says != attempt:
            return  # its last end is on the way; the next look will tell
        ward.attempt = attempt
        ward.name = record.name
        ward.slot = record.slot
        ward.started_mono = record.started_mono or self._clock.monotonic()
        if ward.says is None and ward.peer is not None and ward.dead_since is None:
            self._unbegun.add(attempt)
        ward.says = None

    def _recover_ward(self, ward: Ward, running: set[Attempt]) -> None:
        if ward.attempt is not None and ward.attempt not in running and ward.end is None:
            ward.attempt = None  # the child has recorded its end itself
            ward.slot = None
        if ward.says is not None and ward.says not in running:
            if ward.end is None:
                log.warning(
                    "PID %d runs task %d, attempt %d, whose row says otherwise", ward.who.pid, *_pair(ward.says)
                )
            elif ward.peer is not None:
                self._ears.send(ward.peer, wire.Ack(ward.says.id, ward.says.attempt))
                ward.end = None
                ward.says = None

    def _judge_by_lease(self, record: TaskRecord) -> None:
        """A row of another PID namespace (a container that was restarted) cannot be judged by its PID, only by silence."""
        if record.slot is not None:
            self._foreign_slots.add(record.slot)
        seen = record.heartbeat_at or record.started_at
        silent_s = (self._clock.now() - seen).total_seconds() if seen is not None else self._config.lease_s + 1
        if silent_s > self._config.lease_s:
            detail = f"its container (another PID namespace) has been silent for {silent_s:.0f} s, past lease_s"
            self._bury_row(record, End(reason=Reason.HOST_LOST, detail=detail))

    def _bury_row(self, record: TaskRecord, end: End) -> None:
        self._row_ends[Attempt(record.id, record.attempt)] = end

    def _identity_of(self, who: Who) -> ProcessIdentity:
        own = self._identity
        return ProcessIdentity(own.host, own.boot_id, own.pid_ns, who.pid, who.start_ticks)

    def _meet(self, identity: ProcessIdentity) -> Ward:
        """Take charge of a process that has not been met before."""
        verdict, handle = processes.look(identity)
        ward = Ward(identity, handle)
        if verdict is Verdict.DEAD:
            ward.dead_since = self._clock.monotonic()
        elif handle is not None:
            self._ears.watch_process(ward.who, handle)
            ward.oom = self._oom.counters_of(identity.pid)
        self._wards[ward.who] = ward
        return ward

    # enforce

    def _enforce(self) -> None:
        """Carry out cancels, time limits and memory limits, each in stages."""
        now = self._clock.monotonic()
        if self._look:
            self._take_cancels()
        running = self._running()
        for ward in running:
            timeout_s = self._options(ward.name).timeout_s
            if timeout_s is not None and ward.order is None and now - ward.started_mono >= timeout_s:
                self._order(ward, Reason.TIMED_OUT, f"ran past its timeout_s of {timeout_s:g} s")
            if ward.order is not None and now >= ward.order.next_at and ward.order.stage < Stage.KILL:
                self._escalate(ward.order, Stage(ward.order.stage + 1), now)
        if running and now >= self._limits_at:
            self._limits_at = now + LIMITS_EVERY_S
            self._enforce_limits(running, now)
        for ward in self._wards.values():
            if ward.leave_by is not None and now >= ward.leave_by and ward.handle is not None:
                log.warning("PID %d does not leave after its task has ended; killing it", ward.who.pid)
                processes.signal_tree(ward.handle, signal.SIGKILL)
                ward.leave_by = now + LEAVE_SLACK_S

    def _take_cancels(self) -> None:
        try:
            requests = self._ledger.cancel_requests()
        except (DatabaseError, AccessError) as error:
            self._complain(error)
            return
        by_attempt = {ward.attempt: ward for ward in self._running()}
        for attempt, by in requests:
            ward = by_attempt.get(attempt)
            if ward is not None and ward.order is None:
                self._order(ward, Reason.CANCELLED, f"cancelled by {by}" if by else "cancelled", by=by)

    def _order(
        self, ward: Ward, reason: Reason, why: str, *, by: str | None = None, stage: Stage = Stage.ASKED
    ) -> None:
        now = self._clock.monotonic()
        if ward.order is None:
            ward.order = Order(reason, why, by, Stage.ASKED, now + self._config.grace_s)
        if ward.attempt is not None and ward.peer is not None:
            attempt = ward.attempt
            self._ears.send(
                ward.peer,
                wire.Cancel(id=attempt.id, attempt=attempt.attempt, reason=ward.order.reason, by=ward.order.by),
            )
        if stage > ward.order.stage:
            self._escalate(ward.order, stage, now)

    def _escalate(self, order: Order, stage: Stage, now: float) -> None:
        """Go one stage further; the signal is sent by _write, after the reason is committed."""
        order.stage = stage
        order.next_at = now + self._config.grace_s
        order.unsent = True
        order.due_since = now

    def _enforce_limits(self, running: list[Ward], now: float) -> None:
        for ward in running:
            with contextlib.suppress(OSError):
                logs.bound(self._log_of(ward), self._config.log_max_bytes)
        limited = [ward for ward in running if self._options(ward.name).memory_limit_bytes is not None]
        sampled = running if now >= self._usage_at else limited
        if now >= self._usage_at:
            self._usage_at = now + self._config.heartbeat_s
        usage = processes.tree_usage([ward.who.pid for ward in sampled]) if sampled else {}
        for ward in sampled:
            used = usage.get(ward.who.pid)
            if used is not None:
                self._note_usage(ward, used, now)
                limit = self._options(ward.name).memory_limit_bytes
                if limit is not None and used.rss_bytes > limit:
                    why = f"used {used.rss_bytes} bytes of memory, past its memory_limit_bytes of {limit}"
                    self._order(ward, Reason.OUT_OF_MEMORY, why, stage=Stage.KILL)

    def _note_usage(self, ward: Ward, used: processes.Usage, now: float) -> None:
        if ward.cpu_seen is not None and now > ward.cpu_seen[0]:
            ward.note.cpu_percent = round(100 * max(0.0, used.cpu_s - ward.cpu_seen[1]) / (now - ward.cpu_seen[0]), 1)
        ward.cpu_seen = (now, used.cpu_s)
        ward.note.cpu_s = round(used.cpu_s, 3)
        ward.note.rss_bytes = used.rss_bytes
        ward.note.peak_rss_bytes = max(used.rss_bytes, ward.note.peak_rss_bytes or 0)

    def _options(self, name: str) -> TaskOptions:
        for home in sorted(self._homes.values(), key=lambda home: not home.ours):
            if name in home.hello.catalogue:
                return home.hello.catalogue[name]
        return TaskOptions()

    # admit

    def _admit(self) -> list[tuple[Claim, Ward]]:
        """Pair due tasks with idle children and free slots, and order the children that are missing."""
        now = self._clock.monotonic()
        home = self._home()
        if home is None or self._draining or not self._recovered or now < self._put_off_until:
            return []
        if self._next_due_at is not None and self._clock.now() >= self._next_due_at:
            self._look = True
        free = self._free_slots()
        idle = [ward for ward in self._wards.values() if ward.idle and ward.nursery == home.hello.who]
        due: list[Due] = []
        if self._look or (self._backlog and free):
            try:
                due = self._ledger.due(home.hello.catalogue, limit=len(free) + 1)
                self._next_due_at = self._ledger.next_due_at()
            except (DatabaseError, AccessError) as error:
                self._complain(error)
                return []
            self._look = False
            self._backlog = bool(due)
        wanted = min(len(due), len(free))
        missing = wanted + self._config.spares - len(idle) - home.ordered
        if missing > 0:
            home.ordered += missing
            self._ears.send(home.peer, wire.Spawn(missing))
        pairs = zip(due, idle, free, strict=False)
        return [(Claim(task, ward.identity, slot, now), ward) for task, ward, slot in pairs]

    def _home(self) -> Home | None:
        home = self._homes.get(self._nursery_who) if self._nursery_who is not None else None
        return home if home is not None and not home.peer.channel.closed else None

    def _free_slots(self) -> list[int]:
        taken = {ward.slot for ward in self._running() if ward.end is None} | self._foreign_slots
        count = self._config.slots - len(taken)
        return [slot for slot in range(self._config.slots) if slot not in taken][: max(0, count)]

    def _running(self) -> list[Ward]:
        return [ward for ward in self._wards.values() if ward.attempt is not None]

    # write

    def _write(self, claims: list[tuple[Claim, Ward]]) -> None:
        """Write all that this pass has decided, in one commit, then let it take effect."""
        now = self._clock.monotonic()
        batch = self._compose(claims, now)
        if not batch or now < self._put_off_until:
            return
        try:
            outcome = self._ledger.apply(batch)
        except (DatabaseError, AccessError) as error:
            self._put_off(error, now)
            return
        self._put_offs = 0
        if batch.notes:
            self._notes_at = now + NOTES_EVERY_S
        if batch.supervisor is not None:
            self._beat_at = now + SUPERVISOR_BEAT_S
        self._take_effect(batch, outcome, claims)

    def _compose(self, claims: list[tuple[Claim, Ward]], now: float) -> Batch:
        batch = Batch(claims=[claim for claim, _ in claims])
        batch.ends.update(self._row_ends)
        batch.unclaims |= self._unbegun
        for ward in self._running():
            assert ward.attempt is not None  # noqa: S101 - that is what running means
            if ward.end is not None:
                batch.ends[ward.attempt] = ward.end
            elif self._never_left(ward):
                batch.unclaims.add(ward.attempt)
            elif ward.order is not None and ward.order.unsent:
                batch.endings[ward.attempt] = Ending(ward.attempt, ward.order.reason, ward.order.detail())
        if batch or now >= self._notes_at:
            batch.notes = {
                ward.attempt: ward.note
                for ward in self._running()
                if ward.attempt is not None and ward.end is None and ward.note.values()
            }
        if now >= self._beat_at and self._home() is not None:
            batch.supervisor = self._own_record()
        return batch

    def _never_left(self, ward: Ward) -> bool:
        """Whether not a byte of the order to run has left, and none will."""
        peer, place = ward.peer, ward.run_place
        return place is not None and peer is not None and peer.channel.closed and peer.channel.written_bytes <= place

    def _take_effect(self, batch: Batch, outcome: Outcome, claims: list[tuple[Claim, Ward]]) -> None:
        by_attempt = {ward.attempt: ward for ward in self._running()}
        for attempt in batch.ends:
            self._row_ends.pop(attempt, None)
            ward = by_attempt.get(attempt)
            if ward is not None:
                self._effect_of_end(ward, attempt, batch.ends[attempt], recorded=attempt in outcome.ended)
        for attempt in batch.unclaims:
            self._unbegun.discard(attempt)
            ward = by_attempt.get(attempt)
            if ward is not None:
                self._become_free(ward)
            self._look = True
        for attempt in batch.endings:
            ward = by_attempt.get(attempt)
            if ward is not None and ward.order is not None:
                self._effect_of_ending(ward, ward.order, recorded=attempt in outcome.endings)
        for attempt in batch.notes:
            ward = by_attempt.get(attempt)
            if ward is not None:
                ward.note = Note(peak_rss_bytes=None)
        for claim, ward in claims:
            self._effect_of_claim(claim, ward, claimed=claim in outcome.claimed)

    def _effect_of_end(self, ward: Ward, attempt: Attempt, end: End, *, recorded: bool) -> None:
        if recorded:
            how = "DONE" if end.reason is None else f"INTERRUPTED, {end.reason}: {end.detail}"
            log.info("task %d (%s) ended: %s", attempt.id, ward.name, how)
        if ward.dead_since is not None:
            self._keep_log(ward, attempt)
        elif ward.peer is not None:
            self._ears.send(ward.peer, wire.Ack(attempt.id, attempt.attempt))
            ward.leave_by = self._clock.monotonic() + self._config.grace_s + LEAVE_SLACK_S
        self._become_free(ward)
        if ward.dead_since is not None:
            self._forget(ward)

    def _effect_of_ending(self, ward: Ward, order: Order, *, recorded: bool) -> None:
        order.unsent = False
        if not recorded or ward.handle is None:
            return
        if order.stage is Stage.TERM:
            log.info("sending SIGTERM to PID %d: %s", ward.who.pid, order.why)
            ward.handle.send_signal(signal.SIGTERM)
        else:
            log.info("sending SIGKILL to PID %d and all that it started: %s", ward.who.pid, order.why)
            processes.signal_tree(ward.handle, signal.SIGKILL)

    def _effect_of_claim(self, claim: Claim, ward: Ward, *, claimed: bool) -> None:
        if not claimed:
            self._look = True
            self._recover_at = 0.0  # our picture of the slots may be wrong
            return
        due, attempt = claim.due, claim.attempt
        ward.attempt, ward.name, ward.slot = attempt, due.name, claim.slot
        ward.started_mono = claim.started_mono
        ward.order = None
        ward.note = Note()
        ward.cpu_seen = None
        ward.oom = self._oom.counters_of(ward.who.pid)
        assert ward.peer is not None  # noqa: S101 - an idle ward has one
        ward.run_place = self._ears.send(
            ward.peer, wire.Run(id=attempt.id, attempt=attempt.attempt, name=due.name, data=due.data, key=due.key)
        )
        log.info("task %d (%s) started, attempt %d, PID %d", attempt.id, due.name, attempt.attempt, ward.who.pid)

    def _become_free(self, ward: Ward) -> None:
        ward.attempt = ward.end = ward.order = ward.run_place = ward.slot = None
        ward.says = None
        ward.note = Note()

    def _forget(self, ward: Ward) -> None:
        self._ears.unwatch_process(ward.who)
        if ward.handle is not None:
            ward.handle.close()
        if ward.peer is not None:
            self._ears.let_go(ward.peer)
        del self._wards[ward.who]
        if ward.who in self._exits:
            self._seen.append(ward.who)
        with contextlib.suppress(OSError):
            path = self._log_of(ward)
            if path.stat().st_size == 0:
                path.unlink()

    def _log_of(self, ward: Ward) -> Any:
        return logs.process_log(self._logs, ward.who.pid, ward.who.start_ticks)

    def _keep_log(self, ward: Ward, attempt: Attempt) -> None:
        """Name the log of a dead child after its task; a living child does so itself."""
        with contextlib.suppress(OSError):
            path = self._log_of(ward)
            logs.bound(path, self._config.log_max_bytes)
            if path.stat().st_size:
                path.rename(logs.task_log(self._logs, attempt.id, attempt.attempt))

    def _put_off(self, error: BgSupervisorError, now: float) -> None:
        pause = PUT_OFF_S[min(self._put_offs, len(PUT_OFF_S) - 1)]
        self._put_off_until = now + pause
        self._put_offs += 1
        self._look = True
        self._complain(error)
        for ward in self._running():
            order = ward.order
            if order is not None and order.unsent and now - order.due_since >= KILL_WITHOUT_RECORD_S:
                self._order_through_nursery(ward, order)

    def _order_through_nursery(self, ward: Ward, order: Order) -> None:
        home = self._homes.get(ward.nursery) if ward.nursery is not None else None
        if home is None or home.peer.channel.closed:
            return
        number = signal.SIGTERM if order.stage is Stage.TERM else signal.SIGKILL
        self._ears.send(home.peer, wire.KillOrder(ward.who, number, order.reason))
        order.unsent = False

    def _complain(self, error: BgSupervisorError) -> None:
        text = str(error)
        if text != self._last_complaint:
            self._last_complaint = text
            log.error("%s; bodies go on, trying again", text)

    def _own_record(self) -> SupervisorRecord:
        home = self._home()
        catalogue = {} if home is None else home.hello.catalogue
        failures = [] if home is None else home.hello.failures
        own = self._identity
        return SupervisorRecord(
            host=own.host,
            boot_id=own.boot_id,
            pid_ns=own.pid_ns,
            pid=own.pid,
            start_ticks=own.start_ticks,
            started_at=self._started_at,
            heartbeat_at=self._clock.now(),
            slots=self._config.slots,
            version=_version(),
            catalogue=msgspec.json.encode(catalogue).decode(),
            code_error=msgspec.json.encode(failures).decode() if failures else None,
        )

    # rest

    def _rest_s(self) -> float:
        """Return how long nothing can become due, at most NET_S."""
        now = self._clock.monotonic()
        moments = [self._net_at]
        for ward in self._running():
            if ward.order is not None and ward.order.stage < Stage.KILL:
                moments.append(ward.order.next_at)
            timeout_s = self._options(ward.name).timeout_s
            if timeout_s is not None and ward.order is None:
                moments.append(ward.started_mono + timeout_s)
            if ward.dead_since is not None and ward.end is None:
                moments.append(now + 0.02)
            if ward.note.values():
                moments.append(self._notes_at)
            if ward.end is not None or (ward.order is not None and ward.order.unsent):
                moments.append(self._put_off_until)
        if self._running():
            moments.append(self._limits_at)
        if self._row_ends or self._unbegun:
            moments.append(self._put_off_until)
        if self._nursery is None:
            moments.append(self._nursery_at)
        if self._next_due_at is not None:
            moments.append(now + (self._next_due_at - self._clock.now()).total_seconds())
        if self._look and self._home() is not None and self._recovered and not self._draining:
            moments.append(self._put_off_until)
        return max(0.0, min(moments) - now)

    # itself

    def _look_after_itself(self) -> None:
        """Once a second: show that the loop turns, see that lock, sockets and database are still ours."""
        now = self._clock.monotonic()
        if self._nursery is None and now >= self._nursery_at and not self._draining:
            self._start_nursery()
        if now - self._started_mono >= NURSERY_WAIT_S:
            self._nurseries_awaited = set()
        if self._inherited:
            self._sweep_inherited()
        self._finish_if_done()
        if now < self._net_at:
            return
        self._net_at = now + NET_S
        with contextlib.suppress(OSError):
            self._lock.touch()
        if not self._lock.is_intact():
            self._leaving = "the lock file was replaced; whoever holds the new one supervises"
        elif not self._database_stands():
            self._leaving = "the database file was replaced; the next supervisor opens the new one"
        elif not self._ears.sockets_stand():
            log.warning("control.sock or wake.sock is gone; binding it again")
            self._ears.bind()
        self._look_if_changed()
        self._retire_lonely()

    def _finish_if_done(self) -> None:
        if self._running() or self._leaving is not None:
            return
        if self._draining:
            self._leaving = "nothing runs any more"
        elif self._burst and self._home() is not None and self._recovered and not self._look and not self._backlog:
            self._leaving = "nothing is due"

    def _database_stands(self) -> bool:
        if self._store.path is None or self._database_inode is None:
            return True
        try:
            return self._store.path.stat().st_ino == self._database_inode
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _retire_lonely(self) -> None:
        """Send idle children away whose nursery is not ours or is dead: their exits would not be seen."""
        for ward in self._wards.values():
            if ward.idle and ward.nursery != self._nursery_who and ward.peer is not None:
                self._ears.send(ward.peer, wire.Leave())
                ward.leave_by = self._clock.monotonic() + self._config.grace_s + LEAVE_SLACK_S

    def _leave(self) -> None:
        """Go without taking anybody along: bodies live on, idle children and an empty nursery are sent away."""
        log.info("leaving: %s; %d running", self._leaving, len(self._running()))
        for ward in self._wards.values():
            if ward.idle and ward.peer is not None:
                self._ears.send(ward.peer, wire.Leave())
        for home in self._homes.values():
            if not home.peer.channel.closed:
                self._ears.send(home.peer, wire.Retire())
        self._ears.close()
        with contextlib.suppress(BgSupervisorError, OSError):
            self._store.close()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()

    # The nursery

    def _start_nursery(self) -> None:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=nursery.main, args=(self._config,), daemon=False, name="bgsupervisor nursery")
        process.start()
        self._nursery = process
        identity = processes.identity_of(process.pid or 0, self._identity.host)
        if identity is None:
            self._nursery_died()
            return
        self._nursery_who = Who(identity.pid, identity.start_ticks)
        _, handle = processes.look(identity)
        if handle is not None:
            self._nursery_handle = handle
            self._ears.watch_process(self._nursery_who, handle)

    def _nursery_died(self) -> None:
        """Start another after a pause; children of the dead one are now ours to reap."""
        self._nursery.join(0.5)
        log.error("the nursery died with exit code %s; its running bodies go on", self._nursery.exitcode)
        with contextlib.suppress(ValueError):
            self._nursery.close()
        if self._nursery_who is not None:
            self._homes.pop(self._nursery_who, None)
        if self._nursery_handle is not None:
            self._nursery_handle.close()
        self._nursery = self._nursery_who = self._nursery_handle = None
        pause = NURSERY_RESTART_S[min(self._nursery_deaths, len(NURSERY_RESTART_S) - 1)]
        self._nursery_deaths += 1
        self._nursery_at = self._clock.monotonic() + pause
        self._inherited = True
        if self._burst and self._nursery_deaths > len(NURSERY_RESTART_S):
            self._leaving, self._exit_code = "the nursery dies again and again", 1

    def _sweep_inherited(self) -> None:
        """Kill what a dead task left when its nursery was dead too: it was reparented to us."""
        known = {who.pid for who in self._wards} | ({self._nursery.pid} if self._nursery is not None else set())
        for pid in nursery.strays_of_this_process(known):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _living_nurseries(self) -> set[Who]:
        found = set()
        for path in self._state_dir.path.glob("nursery-*-*"):
            _, pid, ticks = path.name.split("-", 2)
            if not (pid.isdigit() and ticks.isdigit()):
                continue
            who = Who(int(pid), int(ticks))
            if processes.verdict(self._identity_of(who)) is Verdict.DEAD:
                with contextlib.suppress(OSError):
                    path.unlink()
            else:
                found.add(who)
        return found


def _reap_inherited(handle: ProcessHandle) -> Exit | None:
    """Reap a dead child that became ours when its nursery died."""
    try:
        info = os.waitid(os.P_PIDFD, handle.fileno(), os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if info is None:
        return None
    if info.si_code == os.CLD_EXITED:
        return Exit(info.si_status, None)
    return Exit(None, info.si_status)


def _count_failures(hello: wire.NurseryHello) -> str:
    return f"; {len(hello.failures)} module(s) failed to load, see `bgsupervisor check`" if hello.failures else ""


def _pair(attempt: Attempt) -> tuple[int, int]:
    return attempt.id, attempt.attempt


def _version() -> str:
    from bgsupervisor import __version__  # noqa: PLC0415 - the package imports us lazily

    return __version__
