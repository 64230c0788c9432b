"""The supervisor: decides when. One single-threaded loop that starts tasks, watches children and records every end.

It imports no application code, forks nothing itself, holds one database connection (on PostgreSQL another one that
only listens) and never waits for anybody. Children are all treated as adopted: death comes from the pidfd, the exit
from the fork server, the result from the message or the row; so it does not matter which supervisor started them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from bgsupervisor import failpoints
from bgsupervisor.clock import AttendedClock
from bgsupervisor.config import masked
from bgsupervisor.database.store import Store, SupervisorRecord, is_locked
from bgsupervisor.errors import AccessError, BgSupervisorError, ConfigError, DatabaseError
from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import Exited, ProcessRef
from bgsupervisor.ipc.statedir import StopMark
from bgsupervisor.ledger.transitions import Attempt, Batch, Claim, Ending, Ledger, SlotGrant, Telemetry
from bgsupervisor.ledger.waits import DUE
from bgsupervisor.sanitize import escaped, quoted
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor import postmortem
from bgsupervisor.supervisor.children import Children, Stage
from bgsupervisor.supervisor.enforcement import Enforcement
from bgsupervisor.supervisor.events import EventSources
from bgsupervisor.supervisor.forkservers import FIRST_HELLO_S, ForkServers
from bgsupervisor.supervisor.housekeeping import Housekeeping
from bgsupervisor.supervisor.recovery import Recovery
from bgsupervisor.supervisor.wait_manager import WaitManager
from bgsupervisor.system import processes
from bgsupervisor.system.syscalls import set_child_subreaper
from bgsupervisor.system.titles import set_title

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from bgsupervisor.config import Config
    from bgsupervisor.ipc.lock import Lock
    from bgsupervisor.ipc.messages import AttemptResult
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.ledger.transitions import DueTask, Outcome, Suspension
    from bgsupervisor.supervisor.children import ChildHandle
    from bgsupervisor.supervisor.events import Events, Peer
    from bgsupervisor.system.sd_notify import Notifier

__all__ = ["Supervisor"]

log = logging.getLogger("bgsupervisor")

BUSY_TIMEOUT_S = 0.1
"""How long one pass may wait for another writer of the database before it is put off."""
STOPPED_S = 2.0
"""Passes are at most a second apart; a supervisor that has not turned for so long was stopped."""
NET_S = 1.0
"""Without a wake-up the loop looks at least so often: at the database's version, its own files and its clocks."""
TOUCHED_LOOKS_S = (0.002, 0.01, 0.05, 0.2)
"""After a write to the -wal file its commit becomes visible so much later, when the disk has it."""
RECOVER_EVERY_S = 5.0
"""Every START row is looked at so often, whatever was heard of it."""
EXAMINE_EVERY_S = 0.02
"""While it is not known how a dead child ended, it is asked again so often."""
NOTES_EVERY_S = 0.25
"""Progress reaches the rows at most so often, unless something else is written anyway."""
BEAT_EVERY_S = 15.0
"""The longest time between two renewals of the supervisor's own row, in seconds.

While something runs it is renewed with each round of heartbeats (`heartbeat_s`): a body that is silent is told by it
from one whose heartbeats could not be written.
"""
COMPLAIN_EVERY_S = 60.0
"""What is wrong with the database is told again so often, as long as it is: a line may have met a full disk."""
PASSED_OVER_S = 0.1
"""Waiting tasks whose rows somebody had locked are looked at again so much later; the others are claimed meanwhile."""
PUT_ASIDE_MAX = 1000
"""So many waiting tasks whose rows cannot be read are remembered."""
UNATTENDED_SHOWN = 20
"""Log lines at most about tasks that ended while no supervisor was running; the rest is a count."""
TOUCH_SLACK_S = 0.02
"""How much older the lock file's time may be than the end that it was touched after, in seconds: file times are of the
last timer tick (https://man7.org/linux/man-pages/man7/time.7.html), and a server's clock is known to milliseconds."""
PUT_OFF_S = (0.1, 0.2, 0.5, 1.0)
"""Pauses between tries to write while the database is locked, full or away; the last one repeats."""


class Supervisor:
    """Supervises one state directory and database.

    Args:
        config: The configuration.
        state_dir: Exists, and belongs to this user.
        lock: Held.
        notifier: Tells the service manager.
        burst: Leave when nothing is due and nothing runs.
        reread: Loads the configuration anew, for a reload.

    Raises:
        DatabaseError, AccessError, SchemaError: The database cannot be opened.
    """

    def __init__(
        self,
        config: Config,
        *,
        state_dir: StateDir,
        lock: Lock,
        notifier: Notifier,
        reread: Callable[[], Config],
        burst: bool = False,
    ) -> None:
        set_child_subreaper()
        processes.raise_descriptor_limit()
        self._config = config
        self._lock = lock
        self._notifier = notifier
        self._reread = reread
        self._burst = burst
        self._state_dir = state_dir
        self._own = processes.own_identity(processes.host_id(config.host))
        self._store = Store.open(
            config.database, config.table_prefix, busy_timeout_s=config.busy_timeout_s, checkpointer=True
        )
        with self._store.connected():
            self._store.set_busy_timeout(BUSY_TIMEOUT_S)
        self._store.hurry()
        self._database_inode = self._store.inode()
        self._ledger = Ledger(self._store)
        self._clock = clock = AttendedClock(self._store.clock, longest_s=STOPPED_S)
        self._sources = EventSources(state_dir, clock)
        self._children = Children(self._sources, state_dir.logs, clock)
        self._fork_servers = ForkServers(config, state_dir, self._own, self._sources, clock)
        self._recovery = Recovery(config, self._own, self._children, self._sources, clock)
        self._enforcement = Enforcement(config, self._children, self._fork_servers, self._sources, clock)
        self._housekeeping = Housekeeping(self._ledger, state_dir, clock)
        self._wait_manager = WaitManager(state_dir, self._recovery.identity_of, self._sources, clock)
        self._exits: dict[ProcessRef, Exited] = {}
        self._started_at = clock.now()
        self._unattended_since: datetime | None = self._started_at - timedelta(
            seconds=clock.monotonic() - lock.unattended_since - TOUCH_SLACK_S
        )
        self._row_at = clock.monotonic() + BEAT_EVERY_S
        self._data_version = -1
        self._touched_looks_at: list[float] = []
        self._last_complaint = ""
        self._complain_at = 0.0
        self._look, self._backlog = True, False
        self._missing = 0
        self._looked_at: datetime | None = None
        self._passing_over_until: float | None = None
        self._next_due_at: datetime | None = None
        self._flawed: list[DueTask] = []
        self._put_aside: set[int] = set()
        self._recover_at = self._notes_at = self._net_at = self._put_off_until = 0.0
        self._beat_at = -math.inf
        self._spawn_at = 0.0
        self._catalogue: str | None = None
        self._put_offs = 0
        self._interrupts = 0
        self._draining: str | None = None
        self._killing: str | None = None
        self._stop_mode = ""
        self._leaving: str | None = None
        self._exit_code = 0

    # The loop

    def run(self) -> int:
        """Supervise until told to leave; return the exit code. The caller leaves by os._exit."""
        self._sources.listen_to_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
        status = f"supervising {masked(self._config.database)} with {self._config.slots} slots, PID {os.getpid()}"
        log.info("%s", status)
        self._notifier.ready(status)
        set_title(f"supervisor {self._config.path or self._state_dir.path}")
        while self._leaving is None:
            self.tick()
        self._leave()
        return self._exit_code

    def tick(self) -> None:
        """One pass."""
        events = self._hear()
        self._reap(events)
        self._recover()
        self._enforce()
        claims = self._admit()
        self._write(claims)
        self._look_ahead()
        self._look_after_itself()

    # hear

    def _hear(self) -> Events:
        """Rest until something happens or is due, and take it in; signs of life alone are no reason for a pass."""
        until = self._clock.monotonic() + self._rest_s()
        while True:
            moment = min([until, *self._touched_looks_at[:1]])
            self._clock.attend(counted_s=NET_S)  # a database that does not answer may have made the pass long
            ready = self._sources.rest(max(0.0, moment - self._clock.monotonic()))
            if self._clock.attend(counted_s=0.0):
                self._beat_at = -math.inf  # its row says for how long it was silent
            events = self._sources.hear(ready)
            self._take_in(events)
            if events.matters or self._look or self._clock.monotonic() >= until:
                return events

    def _take_in(self, events: Events) -> None:
        for peer, message in events.messages:
            self._take(peer, message)
        for number in events.signals:
            self._take_signal(number)
        if events.woken:
            self._look = True
            self._wait_manager.notify(events.keys)
            self._heed_stop_mark()
        now = self._clock.monotonic()
        if events.database_touched:
            self._touched_looks_at = [now, *(now + later_s for later_s in TOUCHED_LOOKS_S)]
        if self._touched_looks_at and now >= self._touched_looks_at[0]:
            del self._touched_looks_at[0]
            self._look_if_changed()

    def _take(self, peer: Peer, message: messages.Message) -> None:
        child = self._children.get(peer.ref)
        if isinstance(message, messages.ChildHello):
            self._take_child(peer, message)
        elif isinstance(message, messages.ForkServerHello):
            self._take_fork_server(peer, message)
        elif isinstance(message, Exited | messages.Spawned | messages.SpawnFailed):
            self._take_of_fork_server(peer, message)
        elif isinstance(message, messages.Reload):
            self._reload(force=message.force, caller=peer)
        elif isinstance(message, messages.WaitManagerHello | messages.WaitManagerBeat | messages.Notify):
            self._wait_manager.take(peer, message)
        elif child is not None and isinstance(message, messages.Waiting | messages.Resumed | messages.WantSlot):
            self._take_waiting(child, message)
        elif child is not None and isinstance(message, messages.ResultReport):
            self._take_end(child, message)
        elif child is not None and isinstance(message, messages.Beat | messages.Progress):
            self._take_note(child, message)

    def _take_of_fork_server(self, peer: Peer, message: Exited | messages.Spawned | messages.SpawnFailed) -> None:
        if isinstance(message, Exited):
            self._exits[message.ref] = message
            self._fork_servers.met(message.ref)
        elif isinstance(message, messages.Spawned):
            self._fork_servers.take_spawned(peer, message)
            self._children.vouch_for([message.ref])
            if message.ref in self._children:
                self._fork_servers.met(message.ref)  # its own hello came first, by another socket
        else:
            self._fork_servers.take_spawn_failure(peer, message)
            self._spawn_at = self._clock.monotonic() + PUT_OFF_S[-1]

    def _take_child(self, peer: Peer, hello: messages.ChildHello) -> None:
        self._fork_servers.met(hello.ref)
        self._children.vouch_for([hello.ref])
        child = self._children.meet(self._recovery.identity_of(hello.ref))
        child.connect(peer, hello)
        if hello.end is None:
            child.leave_by = None
        child.got_on_at = self._clock.monotonic()  # what it said before may not have been heard
        if hello.id is None:
            # It has read its last connection to the end: what was claimed for it, and is not in its hands, never began.
            child.says = None
            if child.end is not None:
                child.become_free()  # it has recorded its end itself, else it would not be idle
            elif child.attempt is not None:
                self._recovery.not_started.add(child.attempt)
            return
        said = Attempt(hello.id, hello.attempt)
        if child.attempt != said:
            child.says = said
            self._recover_at = 0.0
        elif child.termination is not None:
            self._enforcement.ask(child, child.termination)  # it may not have heard it before it dialled
        if hello.end is not None:
            child.end = hello.end

    def _take_fork_server(self, peer: Peer, hello: messages.ForkServerHello) -> None:
        self._exits.update({exited.ref: exited for exited in hello.exits})
        self._children.vouch_for(hello.children)
        if self._fork_servers.take_hello(peer, hello):
            self._look = True
            self._send_away_unneeded()
        self._beat_at = -math.inf

    def _take_end(self, child: ChildHandle, message: messages.ResultReport) -> None:
        attempt = Attempt(message.id, message.attempt)
        if attempt in (child.attempt, child.says):
            child.end = message.end
            if attempt != child.attempt:
                self._recover_at = 0.0  # only the rows can tell what it is to us
            # guard: the acknowledgement follows the commit
            return
        # guard: a superseded end is acknowledged
        if child.peer is not None:
            self._sources.send(child.peer, messages.Ack(attempt.id, attempt.attempt))

    def _take_waiting(
        self, child: ChildHandle, message: messages.Waiting | messages.Resumed | messages.WantSlot
    ) -> None:
        """Note that a body waits without a slot, goes on with one, or would go on."""
        if Attempt(message.id, message.attempt) not in (child.attempt, child.says):
            return
        child.run_place = None  # it has been told: it speaks of it
        child.wants_slot = message.number if isinstance(message, messages.WantSlot) else None
        child.got_on_at = self._clock.monotonic()
        if isinstance(message, messages.Waiting):
            child.slot = child.slot if message.slot_kept else None
            self._wait_manager.want()
        elif isinstance(message, messages.Resumed):
            child.slot = message.slot

    def _take_note(self, child: ChildHandle, message: messages.Beat | messages.Progress) -> None:
        if child.attempt != Attempt(message.id, message.attempt):
            return
        child.run_place = None  # it has been told: it speaks of it
        child.note.heartbeat_at = self._clock.now()
        if isinstance(message, messages.Progress):
            child.got_on_at = self._clock.monotonic()
            child.note.progress_done = message.done
            child.note.progress_total = message.total
            child.note.message = message.message

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._stop(self._config.on_term if self._draining is None else "leave", "SIGTERM came")
        elif number == signal.SIGHUP:
            self._reload(force=False, caller=None)
        elif number == signal.SIGINT:
            self._draining = self._draining or "Ctrl-C was pressed"
            self._interrupts += 1
            self._take_interrupt(self._children.running())

    def _take_interrupt(self, running: list[ChildHandle]) -> None:
        """Ctrl-C: once, admit nothing more and wait for what runs; twice, end it; three times, kill it."""
        if self._interrupts == 1 and running:
            names = ", ".join(f"{child.attempt.id} ({child.name})" for child in running if child.attempt is not None)
            log.warning("still running: %s; leaving when they have ended. Ctrl-C again ends them", names)
        elif self._interrupts > 1:
            stage = Stage.TERM if self._interrupts == 2 else Stage.KILL  # noqa: PLR2004 - the second Ctrl-C
            for child in running:
                why = "the supervisor was told to stop and kill (Ctrl-C)"
                self._enforcement.termination(child, Reason.STOPPED, why, stage=stage)

    def _stop(self, mode: str, why: str) -> None:
        """Leave now and let bodies live ("leave"), or admit nothing more, and wait for them or end them."""
        if mode == "leave":
            self._leaving = why
            return
        self._draining = why
        self._killing = why if mode == "kill" else None
        running = self._children.running()
        log.info("%s: admitting nothing more, %d running", why, len(running))
        suspended = [str(child.attempt.id) for child in running if child.attempt is not None and child.suspension.lasts]
        if suspended and mode == "drain":
            log.warning("waiting for suspended tasks until they are resumed or cancelled: %s", ", ".join(suspended))

    def _heed_stop_mark(self) -> None:
        """Do what `bgsupervisor stop` asks for, and take it back when `bgsupervisor start` has lifted the mark."""
        mark = StopMark.read(self._state_dir.stop_mark)
        if mark is None and self._stop_mode:
            self._stop_mode, self._draining, self._killing, self._look = "", None, None, True
            log.info("the stop was lifted, going on")
        elif mark is not None and mark.mode != self._stop_mode:
            self._stop_mode = mark.mode
            self._stop(mark.mode, f"stopped by {mark.by}")

    def _reload(self, *, force: bool, caller: Peer | None) -> None:
        """Load configuration and code anew; whatever fails, what works stays in force."""
        log.info("reloading configuration and code")
        try:
            fresh = self._reread()
        except (ConfigError, AccessError) as error:
            log.error("not reloaded: %s", error)  # noqa: TRY400 - the sentence says it
            if caller is not None:
                self._sources.send(caller, messages.Reloaded(False, str(error)))
            return
        fixed = {key: getattr(self._config, key) for key in ("database", "table_prefix", "state_dir", "host")}
        changed = [key for key, value in fixed.items() if getattr(fresh, key) != value]
        if changed:
            log.warning("%s changed in the configuration; that takes a new start, not a reload", ", ".join(changed))
        self._config = dataclasses.replace(fresh, **fixed)
        for part in (self._recovery, self._enforcement, self._fork_servers):
            part.config = self._config
        self._fork_servers.reload(force=force, caller=caller)

    def _look_if_changed(self) -> None:
        """Look at the rows if another connection has committed since; our own commits do not count."""
        with contextlib.suppress(BgSupervisorError):
            version = self._store.data_version()
            if version != self._data_version:
                self._data_version = version
                self._look = True

    # reap

    def _reap(self, events: Events) -> None:
        """Find out how the dead died; what cannot be known yet is asked again in the next pass."""
        now = self._clock.monotonic()
        for ref in events.deaths:
            self._fork_servers.died(ref)
            self._wait_manager.died(ref)
            self._fork_servers.met(ref)
            child = self._children.get(ref)
            if child is not None and child.dead_since is None:
                child.dead_since = now
        for child in self._children:
            if child.dead_since is not None:
                self._examine(child, now)
        if self._recovery.done_once:
            self._acknowledge([ref for ref in self._exits if ref not in self._children])

    def _examine(self, child: ChildHandle, now: float) -> None:
        if child.peer is not None and not child.peer.channel.closed:
            for message in self._sources.last_words(child.peer):
                self._take(child.peer, message)
        if child.attempt is None and child.says is None:
            self._children.forget(child)
        elif child.attempt is not None and child.end is None and not self._never_began(child):
            is_alone = self._fork_servers.can_report_no_more(
                child.fork_server
            )  # first: a dead one has written all it knows
            exited = self._exits.get(child.ref) or self._fork_servers.written_exit(child.ref)
            if exited is not None:
                self._exits[child.ref] = exited  # its fork server is to be told that it is recorded, heard or read
            wait_s = FIRST_HELLO_S if self._fork_servers.awaited() else postmortem.EXIT_WAIT_S
            wait_s = 0.0 if is_alone else wait_s
            inherited = self._fork_servers.one_died or is_alone
            exit = postmortem.exit_of(child, exited, now=now, wait_s=wait_s, inherited=inherited)
            if exit is not None:
                child.end = postmortem.result_of_exception(child, exit, exited, self._children.oom)

    def _never_began(self, child: ChildHandle) -> bool:
        """Whether it is known that its claim is to be given back, however its process has ended since."""
        return child.undelivered or child.attempt in self._recovery.not_started

    def _acknowledge(self, refs: list[ProcessRef]) -> None:
        """Let fork servers forget exits that no task depends on: of idle children, and of ends that are recorded."""
        if refs:
            for ref in refs:
                del self._exits[ref]
            self._fork_servers.tell_all(messages.ExitsSeen(refs))

    # recover

    def _recover(self) -> None:
        """Look at every START row: adopt what lives, find out about what does not."""
        now = self._clock.monotonic()
        if now < self._recover_at:
            return
        try:
            self._tell_of_unattended_ends()
            starts = self._ledger.starts()
            if starts:
                failpoints.at("supervisor.adopting")
            self._recovery.compare(starts)
            if starts:
                failpoints.at("supervisor.adopted")
        except (DatabaseError, AccessError) as error:
            self._complain(error)
            self._recover_at = now + PUT_OFF_S[0]
        else:
            self._recover_at = now + RECOVER_EVERY_S
            if any(child.slot is None for child in self._children.running()):
                self._wait_manager.expect()
            self._look = True  # what could not be read when it was asked for is asked for again

    def _tell_of_unattended_ends(self) -> None:
        """Log once what processes have recorded themselves since the last supervisor was there."""
        since, self._unattended_since = self._unattended_since, None
        if since is None:
            return
        try:
            ended, count = self._ledger.ended_on(self._own.host, since, limit=UNATTENDED_SHOWN)
        except (DatabaseError, AccessError):
            self._unattended_since = since
            raise
        for one in ended:
            how = one.status if one.reason is None else f"{one.status}, {one.reason}: {one.detail}"
            log.info("task %d (%s) ended %s while no supervisor was running", one.id, one.name, how)
        if count > len(ended):
            log.info("so did %d others; `bgsupervisor ps --all` lists them", count - len(ended))

    # enforce

    def _enforce(self) -> None:
        """See to cancels, suspensions and limits."""
        if self._look:
            try:
                self._enforcement.heed(self._ledger.wishes())
            except (DatabaseError, AccessError) as error:
                self._complain(error)
        stalled = self._enforcement.stalled()
        if stalled:
            try:
                ids = [child.attempt.id for child in stalled if child.attempt is not None]
                waiting = {row["task_id"] for row in self._ledger.waits.rows(ids)}
                if self._put_offs or self._store.write_problem(wait_s=BUSY_TIMEOUT_S):
                    waiting |= set(ids)  # for the database, maybe: `reach` and locks are written there
            except (DatabaseError, AccessError) as error:
                self._complain(error)
                self._enforcement.put_off_stalls()
            else:
                self._enforcement.end_stalled(stalled, waiting)
        if self._killing is not None:  # in each pass: some may have been adopted only now
            for child in self._children.running():
                if child.end is None and child.termination is None:
                    why = f"the supervisor was told to stop and kill ({self._killing})"
                    self._enforcement.termination(child, Reason.STOPPED, why)
        self._enforcement.enforce()

    # admit

    def _admit(self) -> list[tuple[Claim, ChildHandle]]:
        """Pair due tasks with idle children and free slots, and order the children that are missing."""
        now, fork_server = self._clock.monotonic(), self._fork_servers.ours()
        if fork_server is None or not self._may_admit() or now < self._put_off_until:
            return []
        free = self._free_slots()[len(self._returning()) :]  # those who come back go before new tasks
        due: list[DueTask] = []
        if self._next_due_at is not None and self._clock.now() >= self._next_due_at:
            self._look = True
        if self._passing_over_until is not None and now >= self._passing_over_until:
            self._passing_over_until = None
            self._look = True
        if self._look or (self._backlog and free):
            self._looked_at = self._clock.now()
            try:
                due = self._ledger.due(
                    fork_server.hello.catalogue,
                    limit=len(free) + 1 + len(self._put_aside),
                    unlocked=self._passing_over_until is not None,
                    at=self._looked_at,
                )
            except (DatabaseError, AccessError) as error:
                self._looked_at = None
                self._put_off_until = now + PUT_OFF_S[0]
                self._bear(error)
                return []
            self._flawed = [one for one in due if one.flaw and one.id not in self._put_aside]
            due = [one for one in due if not one.flaw]
            self._look, self._backlog = bool(self._flawed), bool(due)  # what they stand before is looked for next
        idle = [child for child in self._children if child.idle and child.fork_server == fork_server.hello.ref]
        self._missing = min(len(due), len(free)) + self._config.spares - len(idle)
        pairs = zip(due, idle, free, strict=False)
        started_mono = self._clock.machine_monotonic()
        return [(Claim(task, child.identity, slot, started_mono), child) for task, child, slot in pairs]

    def _look_ahead(self) -> None:
        """Do what no start has to wait for: order missing children, and see when the next task's time comes."""
        fork_server, missing, looked_at = self._fork_servers.ours(), self._missing, self._looked_at
        self._missing, self._looked_at = 0, None
        if fork_server is not None and missing and self._clock.monotonic() >= self._spawn_at:
            self._fork_servers.spawn(missing - fork_server.coming)
        if looked_at is not None:
            try:
                self._next_due_at = self._ledger.next_due_at(after=looked_at)
            except (DatabaseError, AccessError) as error:
                self._put_off_until = max(self._put_off_until, self._clock.monotonic() + PUT_OFF_S[0])
                self._bear(error)

    def _may_admit(self) -> bool:
        stays = self._draining is None and self._leaving is None
        # guard, last condition: nothing is admitted before all rows are compared
        return stays and self._fork_servers.ours() is not None and self._recovery.done_once

    def _free_slots(self) -> list[int]:
        """Return the slots that are free once this pass has been written, at most as many as may still run."""
        taken = self._children.taken_slots() | self._recovery.foreign_slots
        may_start = self._config.slots - len(taken)
        return [slot for slot in range(self._config.slots) if slot not in taken][: max(0, may_start)]

    def _returning(self) -> list[ChildHandle]:
        """Return the children that have waited and want a slot again, in the order in which they began."""
        wanting = [child for child in self._children.running() if child.wants_slot is not None and child.end is None]
        return sorted(wanting, key=lambda child: child.started_at)

    # write

    def _write(self, claims: list[tuple[Claim, ChildHandle]]) -> None:
        """Write all that this pass has decided, in one commit, then let it take effect."""
        now = self._clock.monotonic()
        if now < self._put_off_until:
            return
        batch = self._compose([claim for claim, _ in claims], now)
        # guard, last condition: a supervisor whose lock was replaced writes nothing
        if not batch or self._is_replaced():
            return
        _pause_before(batch)
        try:
            outcome = self._ledger.apply(batch)
        except (DatabaseError, AccessError) as error:
            # It may be committed all the same. What can be repeated is; claims that turn out to stand are given back,
            # and before that is known there are no others.
            self._recovery.unordered.update(claim.attempt for claim in batch.claims)
            self._recovery.done_once, self._recover_at = False, 0.0
            self._put_off(error, now)
            return
        self._put_offs = 0
        if self._last_complaint:
            self._last_complaint = ""
            log.info("the database can be written again")
        self._notes_at = now + NOTES_EVERY_S if batch.telemetry else self._notes_at
        self._beat_at = now if batch.supervisor is not None else self._beat_at
        self._take_effect(batch, outcome)
        if outcome.passed_over and self._passing_over_until is None:
            self._passing_over_until = self._clock.monotonic() + PASSED_OVER_S
        if claims:
            failpoints.at("supervisor.claimed")
        for claim, child in claims:
            self._start(claim, child, claimed=claim in outcome.claimed)
        started = [child for claim, child in claims if claim in outcome.claimed]
        for child, counters in zip(
            started, self._children.oom.counters(child.ref.pid for child in started), strict=True
        ):
            child.oom = counters

    def _compose(self, claims: list[Claim], now: float) -> Batch:
        batch = Batch(
            claims=claims,
            ends=dict(self._recovery.ends),
            unclaims=set(self._recovery.not_started),
            flawed=self._flawed,
        )
        for attempt, child in self._children.by_attempt().items():
            if child.end is not None:
                batch.ends[attempt] = child.end
            elif child.undelivered:
                batch.unclaims.add(attempt)
            elif child.termination is not None and child.termination.unsent:
                # guard, -> self._enforcement.carry_out(child, child.termination): the reason precedes the signal
                batch.endings[attempt] = Ending(attempt, child.termination.reason, child.termination.detail())
            if child.suspension_unsaved and child.end is None:
                batch.suspensions[attempt] = child.suspension
        for child, slot in zip(self._returning(), self._free_slots(), strict=False):
            if child.attempt is not None and child.dead_since is None and child.wants_slot is not None:
                batch.returns[child.attempt] = SlotGrant(child.wants_slot, slot)
        if now >= self._beat_at + self._beat_every_s() and self._is_worth_a_row():
            batch.supervisor = self._own_record()  # with all heartbeats: they are compared with it
        if batch or now >= self._notes_at:
            noted = {attempt: child.note for attempt, child in self._children.by_attempt().items() if child.end is None}
            batch.telemetry = {attempt: note for attempt, note in noted.items() if note}
        return batch

    def _take_effect(self, batch: Batch, outcome: Outcome) -> None:
        """Do what had to wait for the commit: acknowledge, free, send signals."""
        by_attempt = self._children.by_attempt()
        _pause_after(batch)
        if batch.ends:
            with contextlib.suppress(OSError):
                self._lock.touch()  # the next supervisor takes what ended later for unattended
        for attempt, end in batch.ends.items():
            self._recovery.ends.pop(attempt, None)
            self._conclude(by_attempt.get(attempt), attempt, end, recorded=attempt in outcome.ended)
        for attempt in batch.unclaims:
            self._recovery.not_started.discard(attempt)
            self._recovery.unordered.discard(attempt)
            if attempt in by_attempt:
                by_attempt[attempt].become_free()
            self._look = True
        self._flawed = []
        for due in batch.flawed:
            self._set_aside(due, struck=due.id in outcome.struck)
        for attempt in batch.endings:
            child = by_attempt[attempt]
            if child.termination is not None and attempt in outcome.endings:
                self._enforcement.carry_out(child, child.termination)
            elif child.termination is not None:
                child.termination.unsent = False
                self._recover_at = 0.0  # the row is not running any more
        for attempt, suspension in batch.suspensions.items():
            self._take_suspension(by_attempt[attempt], suspension, recorded=attempt in outcome.suspensions)
        for attempt, back in batch.returns.items():
            self._give_slot(by_attempt[attempt], attempt, back, granted=attempt in outcome.returned)
        for attempt in batch.telemetry:
            by_attempt[attempt].note = Telemetry()
        self._wait_manager.notify(outcome.keys)
        self._look = self._look or DUE in outcome.keys

    def _set_aside(self, due: DueTask, *, struck: bool) -> None:
        """Log a row that cannot be read; pass it over from now on if its end could not be written."""
        log.error("task %d (%s) cannot run: its row cannot be read: %s", due.id, due.name, due.flaw)
        if not struck:
            if len(self._put_aside) >= PUT_ASIDE_MAX:
                self._put_aside.clear()
            self._put_aside.add(due.id)

    def _take_suspension(self, child: ChildHandle, suspension: Suspension, *, recorded: bool) -> None:
        """Have a child stand still whose row says that it does."""
        child.suspension_unsaved = False
        if recorded and suspension.lasts:
            failpoints.at("supervisor.suspending")
            if self._is_replaced():
                return  # the next one has read the row, and somebody may have resumed it since
            self._enforcement.suspend(child)
            self._beat_at = -math.inf  # the next write tells whether it was stopped with the database locked
        elif not recorded:
            self._recover_at = 0.0  # the row is not running any more

    def _give_slot(self, child: ChildHandle, attempt: Attempt, back: SlotGrant, *, granted: bool) -> None:
        """Let a body go on that has waited."""
        child.wants_slot = None
        child.got_on_at = self._clock.monotonic()
        if granted and child.peer is not None:
            child.slot = back.slot
            self._sources.send(child.peer, messages.SlotGranted(attempt.id, attempt.attempt, back.number))
        elif not granted:
            self._recover_at = 0.0  # our picture of the slots is wrong; the child asks again

    def _conclude(self, child: ChildHandle | None, attempt: Attempt, end: AttemptResult, *, recorded: bool) -> None:
        if recorded:
            _log_end(attempt, child.name if child is not None else self._recovery.names.get(attempt, ""), end)
        if child is None:
            return
        child.become_free()
        if child.dead_since is not None:
            if child.ref not in self._exits:
                self._fork_servers.tell_all(messages.ExitsSeen([child.ref]))  # its fork server's word is needed no more
            self._children.keep_log(child, attempt, self._config.log_max_bytes)
            self._children.forget(child)
        elif child.peer is not None:
            self._sources.send(child.peer, messages.Ack(attempt.id, attempt.attempt))
            self._enforcement.expect_to_leave(child)
            failpoints.at("supervisor.acknowledged")

    def _start(self, claim: Claim, child: ChildHandle, *, claimed: bool) -> None:
        if not claimed:
            self._look = True
            if self._passing_over_until is None:
                self._recover_at = 0.0  # our picture of the slots may be wrong
            return
        assert child.peer is not None  # noqa: S101 - an idle child has one
        self._recovery.unordered.discard(claim.attempt)
        if child.handle is not None and child.handle.is_dead():  # since the claim was composed: nothing has begun
            self._recovery.not_started.add(claim.attempt)
            return
        due, attempt = claim.due, claim.attempt
        run_place = self._sources.send(child.peer, claim.assignment())
        child.begin(claim, run_place, child.peer.channel.queued_bytes, self._clock.monotonic())
        failpoints.at("supervisor.ordered")
        log.info("task %d (%s) started, attempt %d, PID %d", attempt.id, due.name, attempt.attempt, child.ref.pid)

    def _put_off(self, error: BgSupervisorError, now: float) -> None:
        """The database is locked, full or away: nothing is lost, the next pass composes the same and more."""
        self._put_off_until = now + PUT_OFF_S[min(self._put_offs, len(PUT_OFF_S) - 1)]
        self._put_offs += 1
        self._bear(error)
        # guard: a suspended child that may hold the database lock is resumed
        if self._put_offs > len(PUT_OFF_S) and is_locked(error):  # for two seconds
            self._enforcement.let_the_suspended_go_on()

    def _bear(self, error: BgSupervisorError) -> None:
        """Do without the rows: say so, look again later, and carry out what cannot wait for them."""
        self._look = True
        self._complain(error)
        self._enforcement.carry_out_unrecorded()

    def _complain(self, error: BgSupervisorError) -> None:
        now = self._clock.monotonic()
        if str(error) != self._last_complaint or now >= self._complain_at:
            self._last_complaint, self._complain_at = str(error), now + COMPLAIN_EVERY_S
            log.error("%s; bodies go on, trying again", error)

    def _beat_every_s(self) -> float:
        is_compared = any(child.slot is not None for child in self._children.running())
        return min(BEAT_EVERY_S, self._config.heartbeat_s) if is_compared else BEAT_EVERY_S

    def _is_worth_a_row(self) -> bool:
        """Whether to tell that this supervisor lives: once it has tasks, or after a while even if it still loads."""
        known = self._fork_servers.ours() is not None or self._catalogue is not None
        return known or self._clock.monotonic() >= self._row_at

    def _own_record(self) -> SupervisorRecord:
        fork_server = self._fork_servers.ours()
        if fork_server is not None:
            self._catalogue = msgspec.json.encode(fork_server.hello.catalogue).decode()
        dangers = [messages.LoadFailure("", danger) for danger in self._fork_servers.dangers()]
        failures = [*dangers, *self._fork_servers.failures()]
        return SupervisorRecord(
            host=self._own.host,
            boot_id=self._own.boot_id,
            pid_ns=self._own.pid_ns,
            pid=self._own.pid,
            start_ticks=self._own.start_ticks,
            started_at=self._started_at,
            heartbeat_at=self._clock.now(),
            slots=self._config.slots,
            version=_version(),
            catalogue="{}" if self._catalogue is None else self._catalogue,
            code_error=msgspec.json.encode(failures).decode() if failures else None,
        )

    # rest

    def _rest_s(self) -> float:
        """Return for how long nothing can become due, at most NET_S."""
        now = self._clock.monotonic()
        moments = [
            self._net_at,
            self._enforcement.next_due_at(),
            self._fork_server_due_at(),
            self._wait_manager.due_at(),
        ]
        if self._next_due_at is not None and self._may_admit():
            next_due_at = now + (self._next_due_at - self._clock.now()).total_seconds()
            moments.append(max(next_due_at, self._put_off_until))
        if self._passing_over_until is not None and self._may_admit():
            moments.append(max(self._passing_over_until, self._put_off_until))
        moments += [self._write_due_at(), self._examine_due_at(now)]
        return max(0.0, min(moment for moment in moments if moment is not None) - now)

    def _fork_server_due_at(self) -> float | None:
        return None if self._draining is not None else self._fork_servers.start_due_at()

    def _write_due_at(self) -> float | None:
        """Return when what is decided and not written is to be written, monotonic."""
        if self._recovery.ends or self._recovery.not_started or (self._look and self._may_admit()):
            return self._put_off_until
        moments = []
        for child in self._children.running():
            is_ordered = child.termination is not None and child.termination.unsent
            if child.end is not None or child.undelivered or is_ordered or child.suspension_unsaved:
                return self._put_off_until
            if child.note.tells_progress:  # signs of life and usage go with whatever is written next
                moments.append(max(self._notes_at, self._put_off_until))
        return min(moments, default=None)

    def _examine_due_at(self, now: float) -> float | None:
        waiting = any(child.dead_since is not None and child.end is None for child in self._children)
        return now + EXAMINE_EVERY_S if waiting else None

    # itself

    def _look_after_itself(self) -> None:
        """Start a missing fork server; once a second see that lock, sockets and database are still ours."""
        now = self._clock.monotonic()
        if self._is_replaced():  # and starts nothing any more: the next one has its own
            return
        if self._draining is None and self._leaving is None:
            self._fork_servers.start_if_missing()
        self._wait_manager.check()
        self._leave_if_done()
        if now < self._net_at:
            return
        self._net_at = now + NET_S
        with contextlib.suppress(AccessError):
            self._state_dir.create()  # the logs folder too: without it no child could write
        self._notifier.alive()
        self._heed_stop_mark()
        with contextlib.suppress(OSError):
            self._lock.touch()
        self._check_files()
        self._look_if_changed()
        self._fork_servers.sweep_inherited({child.ref.pid for child in self._children} | self._wait_manager.pids)
        self._send_away_unneeded()
        self._fork_servers.give_up_on_the_silent()
        if self._recovery.done_once and not any(child.dead_since is not None for child in self._children):
            self._fork_servers.forget_the_dead()
        self._sources.tidy()
        self._housekeeping.keep(self._config.keep_days)

    def _is_replaced(self) -> bool:
        """See whether another may supervise: one that was stopped for long must not start tasks in its slots."""
        # guard: a supervisor whose lock was replaced leaves
        if not self._lock.is_intact():
            self._leaving = "the lock file was replaced; whoever holds the new one supervises"
            return True
        return False

    def _check_files(self) -> None:
        if self._store.inode() not in (None, self._database_inode):
            self._leaving = (
                "the database file was replaced under a living supervisor; the next one opens the new file. "
                "Stop before a restore, and remove the old -wal and -shm files"
            )
        elif not self._sources.sockets_stand():
            log.warning("control.sock or wake.sock is gone; binding it again")
            try:
                self._sources.bind()
            except OSError as error:
                log.error("cannot bind it: %s; trying again", error)  # noqa: TRY400 - the sentence says it
        wal = self._store.wal_path()
        if wal is not None:
            self._sources.watch_file(wal)
        else:
            self._sources.watch(self._store.listener)

    def _leave_if_done(self) -> None:
        if self._leaving is not None:
            return
        running = self._children.running()
        if self._draining is not None and all(_is_left_waiting(child) for child in running):
            waiting = f"; {len(running)} wait for tasks that the next supervisor starts" if running else ""
            self._leaving = f"{self._draining}, and nothing runs any more{waiting}"
        elif running:
            return
        elif self._burst and self._fork_servers.die_again_and_again():
            self._leaving, self._exit_code = "the fork server dies again and again", 1
        elif self._burst and self._fork_servers.ours() is not None and not self._has_seen_work():
            self._leaving = "nothing is due"

    def _has_seen_work(self) -> bool:
        return self._look or self._backlog or self._passing_over_until is not None

    def _send_away_unneeded(self) -> None:
        """Send away idle children beyond the spares, and those of other fork servers, whose exits would not be seen."""
        idle = [child for child in self._children if child.idle]
        ours = [child for child in idle if child.fork_server == self._fork_servers.our_ref]
        kept = set(ours if self._backlog else ours[: self._config.spares])
        for child in idle:
            if child not in kept and child.peer is not None:
                self._sources.send(child.peer, messages.Leave())
                self._enforcement.expect_to_leave(child)

    def _leave(self) -> None:
        """Go without taking anybody along: bodies live on, idle children and an empty fork server are sent away."""
        failpoints.at("supervisor.leaving")
        self._notifier.stopping(f"leaving: {self._leaving}")
        log.info("leaving: %s; %d running", self._leaving, len(self._children.running()))
        for child in self._children:
            if child.idle and child.peer is not None:
                self._sources.send(child.peer, messages.Leave())
        # guard, always: no exit is acknowledged before all rows are compared
        if self._recovery.done_once:  # else a row may depend on one of them
            self._acknowledge([ref for ref in self._exits if ref not in self._children])
        self._fork_servers.tell_all(messages.Retire())
        if not self._children.running():
            self._wait_manager.leave()
        with contextlib.suppress(BgSupervisorError, OSError):
            if self._is_worth_a_row() and self._lock.is_intact():  # else the row is the next one's
                gone = dataclasses.replace(self._own_record(), left_at=self._clock.now())
                self._ledger.apply(Batch(supervisor=gone))
            self._store.close()
        self._sources.close()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _is_left_waiting(child: ChildHandle) -> bool:
    """Whether a draining supervisor may leave a task: it waits without a slot, and nobody has ordered its end."""
    # guard, last condition: stop --kill waits for tasks without a slot
    return child.slot is None and child.end is None and child.termination is None


def _log_end(attempt: Attempt, name: str, end: AttemptResult) -> None:
    """Log an end; one line for each that is not DONE, in a form that a log shipper can read (docs/operating.md)."""
    if end.reason is None:
        log.info("task %d (%s) ended: DONE", attempt.id, name)
        return
    log.log(
        logging.INFO if end.reason.wanted else logging.ERROR,
        "task ended: id=%d name=%s attempt=%d status=INTERRUPTED reason=%s detail=%s",
        attempt.id,
        quoted(name),
        attempt.attempt,
        end.reason,
        escaped(json.dumps(end.detail or "", ensure_ascii=False)),
    )


def _pause_before(batch: Batch) -> None:
    if batch.claims:
        failpoints.at("supervisor.claiming")
    if batch.ends:
        failpoints.at("supervisor.ending")
    if batch.unclaims:
        failpoints.at("supervisor.unclaiming")
    if batch.endings:
        failpoints.at("supervisor.condemning")


def _pause_after(batch: Batch) -> None:
    if batch.ends:
        failpoints.at("supervisor.ended")
    if batch.unclaims:
        failpoints.at("supervisor.unclaimed")
    if batch.endings:
        failpoints.at("supervisor.condemned")
    if batch.returns:
        failpoints.at("supervisor.granted")


def _version() -> str:
    from bgsupervisor import __version__  # noqa: PLC0415 - the package names its version last

    return __version__
