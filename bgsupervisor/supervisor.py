"""The supervisor: decides when. One single-threaded loop that starts tasks, watches children and records every end.

It imports no application code, forks nothing itself, holds one database connection (on PostgreSQL another one that
only listens) and never waits for anybody. Children are all treated as adopted: death comes from the pidfd, the exit
from the nursery, the result from the message or the row; so it does not matter which supervisor started them.
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

from bgsupervisor import deaths, pauses, processes, wire
from bgsupervisor.boards import Boards
from bgsupervisor.cleaning import escaped, quoted
from bgsupervisor.clock import AttendedClock
from bgsupervisor.config import masked
from bgsupervisor.enforcement import Enforcement
from bgsupervisor.errors import AccessError, BgSupervisorError, ConfigError, DatabaseError
from bgsupervisor.housekeeping import Housekeeping
from bgsupervisor.ledger import Attempt, Batch, Claim, Ending, Ledger, Note, Return
from bgsupervisor.linux import set_child_subreaper
from bgsupervisor.models import Store, SupervisorRecord, is_locked
from bgsupervisor.nurseries import FIRST_HELLO_S, Nurseries
from bgsupervisor.reception import Reception
from bgsupervisor.recovery import Recovery
from bgsupervisor.statedir import StopMark
from bgsupervisor.statuses import Reason
from bgsupervisor.titles import set_title
from bgsupervisor.waits import DUE
from bgsupervisor.wards import Stage, Wards
from bgsupervisor.wire import Exited, Who

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from bgsupervisor.config import Config
    from bgsupervisor.ledger import Due, Outcome, Suspension
    from bgsupervisor.notify import Notifier
    from bgsupervisor.reception import Heard, Peer
    from bgsupervisor.statedir import Lock, StateDir
    from bgsupervisor.wards import Ward
    from bgsupervisor.wire import End

__all__ = ["Supervisor"]

log = logging.getLogger("bgsupervisor")

BUSY_TIMEOUT_S = 0.1
"""How long one pass may wait for another writer of the database before it is put off."""
STOPPED_S = 2.0
"""Passes are at most a second apart; a supervisor that has not turned for so long was stopped."""
NET_S = 1.0
"""Without a bell the loop looks at least so often: at the database's version, its own files and its clocks."""
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
        self._ears = Reception(state_dir, clock)
        self._wards = Wards(self._ears, state_dir.logs, clock)
        self._nurseries = Nurseries(config, state_dir, self._own, self._ears, clock)
        self._recovery = Recovery(config, self._own, self._wards, self._ears, clock)
        self._enforcement = Enforcement(config, self._wards, self._nurseries, self._ears, clock)
        self._housekeeping = Housekeeping(self._ledger, state_dir, clock)
        self._boards = Boards(state_dir, self._recovery.identity_of, self._ears, clock)
        self._exits: dict[Who, Exited] = {}
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
        self._flawed: list[Due] = []
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
        self._ears.listen_to_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
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
        heard = self._hear()
        self._reap(heard)
        self._recover()
        self._enforce()
        claims = self._admit()
        self._write(claims)
        self._look_ahead()
        self._look_after_itself()

    # hear

    def _hear(self) -> Heard:
        """Rest until something happens or is due, and take it in; signs of life alone are no reason for a pass."""
        until = None
        while True:
            # A database that does not answer may have made the pass long. After a stop within it, moments that it set
            # lie too late by its length, and a rest until then would itself be taken for a stop.
            if self._clock.attend(counted_s=NET_S):
                until, self._net_at, self._recover_at = None, 0.0, 0.0
            if until is None:
                until = self._clock.monotonic() + self._rest_s()
            moment = min([until, *self._touched_looks_at[:1]])
            ready = self._ears.rest(max(0.0, moment - self._clock.monotonic()))
            if self._clock.attend(counted_s=0.0):
                self._beat_at = -math.inf  # its row says for how long it was silent
            heard = self._ears.hear(ready)
            self._take_in(heard)
            if heard.matters or self._look or self._clock.monotonic() >= until:
                return heard

    def _take_in(self, heard: Heard) -> None:
        for peer, message in heard.messages:
            self._take(peer, message)
        for number in heard.signals:
            self._take_signal(number)
        if heard.rung:
            self._look = True
            self._boards.ring(heard.keys)
            self._heed_stop_mark()
        now = self._clock.monotonic()
        if heard.database_touched:
            self._touched_looks_at = [now, *(now + later_s for later_s in TOUCHED_LOOKS_S)]
        if self._touched_looks_at and now >= self._touched_looks_at[0]:
            del self._touched_looks_at[0]
            self._look_if_changed()

    def _take(self, peer: Peer, message: wire.Message) -> None:
        ward = self._wards.get(peer.who)
        if isinstance(message, wire.ChildHello):
            self._take_child(peer, message)
        elif isinstance(message, wire.NurseryHello):
            self._take_nursery(peer, message)
        elif isinstance(message, Exited | wire.Spawned | wire.SpawnFailed):
            self._take_of_nursery(peer, message)
        elif isinstance(message, wire.Reload):
            self._reload(force=message.force, caller=peer)
        elif isinstance(message, wire.BoardHello | wire.BoardBeat | wire.Ring):
            self._boards.take(peer, message)
        elif ward is not None and isinstance(message, wire.Waiting | wire.Resumed | wire.WantSlot):
            self._take_waiting(ward, message)
        elif ward is not None and isinstance(message, wire.Ended):
            self._take_end(ward, message)
        elif ward is not None and isinstance(message, wire.Beat | wire.Progress):
            self._take_note(ward, message)

    def _take_of_nursery(self, peer: Peer, message: Exited | wire.Spawned | wire.SpawnFailed) -> None:
        if isinstance(message, Exited):
            self._exits[message.who] = message
            self._nurseries.met(message.who)
        elif isinstance(message, wire.Spawned):
            self._nurseries.take_spawned(peer, message)
            self._wards.vouch_for([message.who])
            if message.who in self._wards:
                self._nurseries.met(message.who)  # its own hello came first, by another socket
        else:
            self._nurseries.take_spawn_failure(peer, message)
            self._spawn_at = self._clock.monotonic() + PUT_OFF_S[-1]

    def _take_child(self, peer: Peer, hello: wire.ChildHello) -> None:
        self._nurseries.met(hello.who)
        self._wards.vouch_for([hello.who])
        ward = self._wards.meet(self._recovery.identity_of(hello.who))
        ward.connect(peer, hello)
        if hello.end is None:
            ward.leave_by = None
        ward.got_on_at = self._clock.monotonic()  # what it said before may not have been heard
        if hello.id is None:
            # It has read its last connection to the end: what was claimed for it, and is not in its hands, never began.
            ward.says = None
            if ward.end is not None:
                ward.become_free()  # it has recorded its end itself, else it would not be idle
            elif ward.attempt is not None:
                self._recovery.unbegun.add(ward.attempt)
            return
        said = Attempt(hello.id, hello.attempt)
        if ward.attempt != said:
            ward.says = said
            self._recover_at = 0.0
        elif ward.order is not None:
            self._enforcement.ask(ward, ward.order)  # it may not have heard it before it dialled
        if hello.end is not None:
            ward.end = hello.end

    def _take_nursery(self, peer: Peer, hello: wire.NurseryHello) -> None:
        self._exits.update({exited.who: exited for exited in hello.exits})
        self._wards.vouch_for(hello.children)
        if self._nurseries.take_hello(peer, hello):
            self._look = True
            self._send_away_unneeded()
        self._beat_at = -math.inf

    def _take_end(self, ward: Ward, message: wire.Ended) -> None:
        attempt = Attempt(message.id, message.attempt)
        if attempt in (ward.attempt, ward.says):
            ward.end = message.end
            if attempt != ward.attempt:
                self._recover_at = 0.0  # only the rows can tell what it is to us
        elif ward.peer is not None:
            self._ears.send(ward.peer, wire.Ack(attempt.id, attempt.attempt))  # superseded: it must not wait

    def _take_waiting(self, ward: Ward, message: wire.Waiting | wire.Resumed | wire.WantSlot) -> None:
        """Note that a body waits without a slot, goes on with one, or would go on."""
        if Attempt(message.id, message.attempt) not in (ward.attempt, ward.says):
            return
        ward.run_place = None  # it has been told: it speaks of it
        ward.wants_slot = message.number if isinstance(message, wire.WantSlot) else None
        ward.got_on_at = self._clock.monotonic()
        if isinstance(message, wire.Waiting):
            ward.slot = ward.slot if message.slot_kept else None
            self._boards.want()
        elif isinstance(message, wire.Resumed):
            ward.slot = message.slot

    def _take_note(self, ward: Ward, message: wire.Beat | wire.Progress) -> None:
        if ward.attempt != Attempt(message.id, message.attempt):
            return
        ward.run_place = None  # it has been told: it speaks of it
        ward.note.heartbeat_at = self._clock.now()
        if isinstance(message, wire.Progress):
            ward.got_on_at = self._clock.monotonic()
            ward.note.progress_done = message.done
            ward.note.progress_total = message.total
            ward.note.message = message.message

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._stop(self._config.on_term if self._draining is None else "leave", "SIGTERM came")
        elif number == signal.SIGHUP:
            self._reload(force=False, caller=None)
        elif number == signal.SIGINT:
            self._draining = self._draining or "Ctrl-C was pressed"
            self._interrupts += 1
            self._take_interrupt(self._wards.running())

    def _take_interrupt(self, running: list[Ward]) -> None:
        """Ctrl-C: once, admit nothing more and wait for what runs; twice, end it; three times, kill it."""
        if self._interrupts == 1 and running:
            names = ", ".join(f"{ward.attempt.id} ({ward.name})" for ward in running if ward.attempt is not None)
            log.warning("still running: %s; leaving when they have ended. Ctrl-C again ends them", names)
        elif self._interrupts > 1:
            stage = Stage.TERM if self._interrupts == 2 else Stage.KILL  # noqa: PLR2004 - the second Ctrl-C
            for ward in running:
                why = "the supervisor was told to stop and kill (Ctrl-C)"
                self._enforcement.order(ward, Reason.STOPPED, why, stage=stage)

    def _stop(self, mode: str, why: str) -> None:
        """Leave now and let bodies live ("leave"), or admit nothing more, and wait for them or end them."""
        if mode == "leave":
            self._leaving = why
            return
        self._draining = why
        self._killing = why if mode == "kill" else None
        running = self._wards.running()
        log.info("%s: admitting nothing more, %d running", why, len(running))
        suspended = [str(ward.attempt.id) for ward in running if ward.attempt is not None and ward.suspension.lasts]
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
                self._ears.send(caller, wire.Reloaded(False, str(error)))
            return
        fixed = {key: getattr(self._config, key) for key in ("database", "table_prefix", "state_dir", "host")}
        changed = [key for key, value in fixed.items() if getattr(fresh, key) != value]
        if changed:
            log.warning("%s changed in the configuration; that takes a new start, not a reload", ", ".join(changed))
        self._config = dataclasses.replace(fresh, **fixed)
        for part in (self._recovery, self._enforcement, self._nurseries):
            part.config = self._config
        self._nurseries.reload(force=force, caller=caller)

    def _look_if_changed(self) -> None:
        """Look at the rows if another connection has committed since; our own commits do not count."""
        with contextlib.suppress(BgSupervisorError):
            version = self._store.data_version()
            if version != self._data_version:
                self._data_version = version
                self._look = True

    # reap

    def _reap(self, heard: Heard) -> None:
        """Find out how the dead died; what cannot be known yet is asked again in the next pass."""
        now = self._clock.monotonic()
        for who in heard.deaths:
            self._nurseries.died(who)
            self._boards.died(who)
            self._nurseries.met(who)
            ward = self._wards.get(who)
            if ward is not None and ward.dead_since is None:
                ward.dead_since = now
        for ward in self._wards:
            if ward.dead_since is not None:
                self._examine(ward, now)
        if self._recovery.done_once:
            self._acknowledge([who for who in self._exits if who not in self._wards])

    def _examine(self, ward: Ward, now: float) -> None:
        if ward.peer is not None and not ward.peer.channel.closed:
            for message in self._ears.last_words(ward.peer):
                self._take(ward.peer, message)
        if ward.attempt is None and ward.says is None:
            self._wards.forget(ward)
        elif ward.attempt is not None and ward.end is None and not self._never_began(ward):
            is_alone = self._nurseries.can_report_no_more(ward.nursery)  # first: a dead one has written all it knows
            exited = self._exits.get(ward.who) or self._nurseries.written_exit(ward.who)
            if exited is not None:
                self._exits[ward.who] = exited  # its nursery is to be told that it is recorded, heard or read
            wait_s = FIRST_HELLO_S if self._nurseries.awaited() else deaths.EXIT_WAIT_S
            wait_s = 0.0 if is_alone else wait_s
            inherited = self._nurseries.one_died or is_alone
            exit = deaths.exit_of(ward, exited, now=now, wait_s=wait_s, inherited=inherited)
            if exit is not None:
                ward.end = deaths.end_of(ward, exit, exited, self._wards.oom)

    def _never_began(self, ward: Ward) -> bool:
        """Whether it is known that its claim is to be given back, however its process has ended since."""
        return ward.never_told or ward.attempt in self._recovery.unbegun

    def _acknowledge(self, whos: list[Who]) -> None:
        """Let nurseries forget exits that no task depends on: of idle children, and of ends that are recorded."""
        if whos:
            for who in whos:
                del self._exits[who]
            self._nurseries.tell_all(wire.ExitsSeen(whos))

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
                pauses.at("supervisor.adopting")
            self._recovery.compare(starts)
            if starts:
                pauses.at("supervisor.adopted")
        except (DatabaseError, AccessError) as error:
            self._complain(error)
            self._recover_at = now + PUT_OFF_S[0]
        else:
            self._recover_at = now + RECOVER_EVERY_S
            if any(ward.slot is None for ward in self._wards.running()):
                self._boards.expect()
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
                ids = [ward.attempt.id for ward in stalled if ward.attempt is not None]
                waiting = {row["task_id"] for row in self._ledger.waits.rows(ids)}
                if self._put_offs or self._store.write_problem(wait_s=BUSY_TIMEOUT_S):
                    waiting |= set(ids)  # for the database, maybe: `reach` and locks are written there
            except (DatabaseError, AccessError) as error:
                self._complain(error)
                self._enforcement.put_off_stalls()
            else:
                self._enforcement.end_stalled(stalled, waiting)
        if self._killing is not None:  # in each pass: some may have been adopted only now
            for ward in self._wards.running():
                if ward.end is None and ward.order is None:
                    why = f"the supervisor was told to stop and kill ({self._killing})"
                    self._enforcement.order(ward, Reason.STOPPED, why)
        self._enforcement.enforce()

    # admit

    def _admit(self) -> list[tuple[Claim, Ward]]:
        """Pair due tasks with idle children and free slots, and order the children that are missing."""
        now, home = self._clock.monotonic(), self._nurseries.ours()
        if home is None or not self._may_admit() or now < self._put_off_until:
            return []
        free = self._free_slots()[len(self._returning()) :]  # those who come back go before new tasks
        due: list[Due] = []
        if self._next_due_at is not None and self._clock.now() >= self._next_due_at:
            self._look = True
        if self._passing_over_until is not None and now >= self._passing_over_until:
            self._passing_over_until = None
            self._look = True
        if self._look or (self._backlog and free):
            self._looked_at = self._clock.now()
            try:
                due = self._ledger.due(
                    home.hello.catalogue,
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
        idle = [ward for ward in self._wards if ward.idle and ward.nursery == home.hello.who]
        self._missing = min(len(due), len(free)) + self._config.spares - len(idle)
        pairs = zip(due, idle, free, strict=False)
        started_mono = self._clock.machine_monotonic()
        return [(Claim(task, ward.identity, slot, started_mono), ward) for task, ward, slot in pairs]

    def _look_ahead(self) -> None:
        """Do what no start has to wait for: order missing children, and see when the next task's time comes."""
        home, missing, looked_at = self._nurseries.ours(), self._missing, self._looked_at
        self._missing, self._looked_at = 0, None
        if home is not None and missing and self._clock.monotonic() >= self._spawn_at:
            self._nurseries.spawn(missing - home.coming)
        if looked_at is not None:
            try:
                self._next_due_at = self._ledger.next_due_at(after=looked_at)
            except (DatabaseError, AccessError) as error:
                self._put_off_until = max(self._put_off_until, self._clock.monotonic() + PUT_OFF_S[0])
                self._bear(error)

    def _may_admit(self) -> bool:
        stays = self._draining is None and self._leaving is None
        return stays and self._recovery.done_once and self._nurseries.ours() is not None

    def _free_slots(self) -> list[int]:
        """Return the slots that are free once this pass has been written, at most as many as may still run."""
        taken = self._wards.taken_slots() | self._recovery.foreign_slots
        may_start = self._config.slots - len(taken)
        return [slot for slot in range(self._config.slots) if slot not in taken][: max(0, may_start)]

    def _returning(self) -> list[Ward]:
        """Return the wards that have waited and want a slot again, in the order in which they began."""
        wanting = [ward for ward in self._wards.running() if ward.wants_slot is not None and ward.end is None]
        return sorted(wanting, key=lambda ward: ward.started_at)

    # write

    def _write(self, claims: list[tuple[Claim, Ward]]) -> None:
        """Write all that this pass has decided, in one commit, then let it take effect."""
        now = self._clock.monotonic()
        if now < self._put_off_until:
            return
        batch = self._compose([claim for claim, _ in claims], now)
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
        self._notes_at = now + NOTES_EVERY_S if batch.notes else self._notes_at
        self._beat_at = now if batch.supervisor is not None else self._beat_at
        self._take_effect(batch, outcome)
        if outcome.passed_over and self._passing_over_until is None:
            self._passing_over_until = self._clock.monotonic() + PASSED_OVER_S
        if claims:
            pauses.at("supervisor.claimed")
        for claim, ward in claims:
            self._start(claim, ward, claimed=claim in outcome.claimed)
        started = [ward for claim, ward in claims if claim in outcome.claimed]
        for ward, counters in zip(started, self._wards.oom.counters(ward.who.pid for ward in started), strict=True):
            ward.oom = counters

    def _compose(self, claims: list[Claim], now: float) -> Batch:
        batch = Batch(
            claims=claims,
            ends=dict(self._recovery.ends),
            unclaims=set(self._recovery.unbegun),
            flawed=self._flawed,
        )
        for attempt, ward in self._wards.by_attempt().items():
            if ward.end is not None:
                batch.ends[attempt] = ward.end
            elif ward.never_told:
                batch.unclaims.add(attempt)
            elif ward.order is not None and ward.order.unsent:
                batch.endings[attempt] = Ending(attempt, ward.order.reason, ward.order.detail())
            if ward.suspension_unsaved and ward.end is None:
                batch.suspensions[attempt] = ward.suspension
        for ward, slot in zip(self._returning(), self._free_slots(), strict=False):
            if ward.attempt is not None and ward.dead_since is None and ward.wants_slot is not None:
                batch.returns[ward.attempt] = Return(ward.wants_slot, slot)
        if now >= self._beat_at + self._beat_every_s() and self._is_worth_a_row():
            batch.supervisor = self._own_record()  # with all heartbeats: they are compared with it
        if batch or now >= self._notes_at:
            noted = {attempt: ward.note for attempt, ward in self._wards.by_attempt().items() if ward.end is None}
            batch.notes = {attempt: note for attempt, note in noted.items() if note}
        return batch

    def _take_effect(self, batch: Batch, outcome: Outcome) -> None:
        """Do what had to wait for the commit: acknowledge, free, send signals."""
        by_attempt = self._wards.by_attempt()
        _pause_after(batch)
        if batch.ends:
            with contextlib.suppress(OSError):
                self._lock.touch()  # the next supervisor takes what ended later for unattended
        for attempt, end in batch.ends.items():
            self._recovery.ends.pop(attempt, None)
            self._conclude(by_attempt.get(attempt), attempt, end, recorded=attempt in outcome.ended)
        for attempt in batch.unclaims:
            self._recovery.unbegun.discard(attempt)
            self._recovery.unordered.discard(attempt)
            if attempt in by_attempt:
                by_attempt[attempt].become_free()
            self._look = True
        self._flawed = []
        for due in batch.flawed:
            self._set_aside(due, struck=due.id in outcome.struck)
        for attempt in batch.endings:
            ward = by_attempt[attempt]
            if ward.order is not None and attempt in outcome.endings:
                self._enforcement.carry_out(ward, ward.order)
            elif ward.order is not None:
                ward.order.unsent = False
                self._recover_at = 0.0  # the row is not running any more
        for attempt, suspension in batch.suspensions.items():
            self._take_suspension(by_attempt[attempt], suspension, recorded=attempt in outcome.suspensions)
        for attempt, back in batch.returns.items():
            self._give_slot(by_attempt[attempt], attempt, back, granted=attempt in outcome.returned)
        for attempt in batch.notes:
            by_attempt[attempt].note = Note()
        self._boards.ring(outcome.keys)
        self._look = self._look or DUE in outcome.keys

    def _set_aside(self, due: Due, *, struck: bool) -> None:
        """Log a row that cannot be read; pass it over from now on if its end could not be written."""
        log.error("task %d (%s) cannot run: its row cannot be read: %s", due.id, due.name, due.flaw)
        if not struck:
            if len(self._put_aside) >= PUT_ASIDE_MAX:
                self._put_aside.clear()
            self._put_aside.add(due.id)

    def _take_suspension(self, ward: Ward, suspension: Suspension, *, recorded: bool) -> None:
        """Have a child stand still whose row says that it does."""
        ward.suspension_unsaved = False
        if recorded and suspension.lasts:
            pauses.at("supervisor.suspending")
            if self._is_replaced():
                return  # the next one has read the row, and somebody may have resumed it since
            self._enforcement.suspend(ward)
            self._beat_at = -math.inf  # the next write tells whether it was stopped with the database locked
        elif not recorded:
            self._recover_at = 0.0  # the row is not running any more

    def _give_slot(self, ward: Ward, attempt: Attempt, back: Return, *, granted: bool) -> None:
        """Let a body go on that has waited."""
        ward.wants_slot = None
        ward.got_on_at = self._clock.monotonic()
        if granted and ward.peer is not None:
            ward.slot = back.slot
            self._ears.send(ward.peer, wire.SlotGranted(attempt.id, attempt.attempt, back.number))
        elif not granted:
            self._recover_at = 0.0  # our picture of the slots is wrong; the child asks again

    def _conclude(self, ward: Ward | None, attempt: Attempt, end: End, *, recorded: bool) -> None:
        if recorded:
            _log_end(attempt, ward.name if ward is not None else self._recovery.names.get(attempt, ""), end)
        if ward is None:
            return
        ward.become_free()
        if ward.dead_since is not None:
            if ward.who not in self._exits:
                self._nurseries.tell_all(wire.ExitsSeen([ward.who]))  # its nursery's word is needed no more
            self._wards.keep_log(ward, attempt, self._config.log_max_bytes)
            self._wards.forget(ward)
        elif ward.peer is not None:
            self._ears.send(ward.peer, wire.Ack(attempt.id, attempt.attempt))
            self._enforcement.expect_to_leave(ward)
            pauses.at("supervisor.acknowledged")

    def _start(self, claim: Claim, ward: Ward, *, claimed: bool) -> None:
        if not claimed:
            self._look = True
            if self._passing_over_until is None:
                self._recover_at = 0.0  # our picture of the slots may be wrong
            return
        assert ward.peer is not None  # noqa: S101 - an idle ward has one
        self._recovery.unordered.discard(claim.attempt)
        if ward.handle is not None and ward.handle.is_dead():  # since the claim was composed: nothing has begun
            self._recovery.unbegun.add(claim.attempt)
            return
        due, attempt = claim.due, claim.attempt
        run_place = self._ears.send(ward.peer, claim.order())
        ward.begin(claim, run_place, ward.peer.channel.queued_bytes, self._clock.monotonic())
        pauses.at("supervisor.ordered")
        log.info("task %d (%s) started, attempt %d, PID %d", attempt.id, due.name, attempt.attempt, ward.who.pid)

    def _put_off(self, error: BgSupervisorError, now: float) -> None:
        """The database is locked, full or away: nothing is lost, the next pass composes the same and more."""
        self._put_off_until = now + PUT_OFF_S[min(self._put_offs, len(PUT_OFF_S) - 1)]
        self._put_offs += 1
        self._bear(error)
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
        is_compared = any(ward.slot is not None for ward in self._wards.running())
        return min(BEAT_EVERY_S, self._config.heartbeat_s) if is_compared else BEAT_EVERY_S

    def _is_worth_a_row(self) -> bool:
        """Whether to tell that this supervisor lives: once it has tasks, or after a while even if it still loads."""
        known = self._nurseries.ours() is not None or self._catalogue is not None
        return known or self._clock.monotonic() >= self._row_at

    def _own_record(self) -> SupervisorRecord:
        home = self._nurseries.ours()
        if home is not None:
            self._catalogue = msgspec.json.encode(home.hello.catalogue).decode()
        dangers = [wire.LoadFailure("", danger) for danger in self._nurseries.dangers()]
        failures = [*dangers, *self._nurseries.failures()]
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
        moments = [self._net_at, self._enforcement.next_due_at(), self._nursery_due_at(), self._boards.due_at()]
        if self._next_due_at is not None and self._may_admit():
            next_due_at = now + (self._next_due_at - self._clock.now()).total_seconds()
            moments.append(max(next_due_at, self._put_off_until))
        if self._passing_over_until is not None and self._may_admit():
            moments.append(max(self._passing_over_until, self._put_off_until))
        moments += [self._write_due_at(), self._examine_due_at(now)]
        return min(NET_S, max(0.0, min(moment for moment in moments if moment is not None) - now))

    def _nursery_due_at(self) -> float | None:
        return None if self._draining is not None else self._nurseries.start_due_at()

    def _write_due_at(self) -> float | None:
        """Return when what is decided and not written is to be written, monotonic."""
        if self._recovery.ends or self._recovery.unbegun or (self._look and self._may_admit()):
            return self._put_off_until
        moments = []
        for ward in self._wards.running():
            is_ordered = ward.order is not None and ward.order.unsent
            if ward.end is not None or ward.never_told or is_ordered or ward.suspension_unsaved:
                return self._put_off_until
            if ward.note.tells_progress:  # signs of life and usage go with whatever is written next
                moments.append(max(self._notes_at, self._put_off_until))
        return min(moments, default=None)

    def _examine_due_at(self, now: float) -> float | None:
        waiting = any(ward.dead_since is not None and ward.end is None for ward in self._wards)
        return now + EXAMINE_EVERY_S if waiting else None

    # itself

    def _look_after_itself(self) -> None:
        """Start a missing nursery; once a second see that lock, sockets and database are still ours."""
        now = self._clock.monotonic()
        if self._is_replaced():  # and starts nothing any more: the next one has its own
            return
        if self._draining is None and self._leaving is None:
            self._nurseries.start_if_missing()
        self._boards.check()
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
        self._nurseries.sweep_inherited({ward.who.pid for ward in self._wards} | self._boards.pids)
        self._send_away_unneeded()
        self._nurseries.give_up_on_the_silent()
        if self._recovery.done_once and not any(ward.dead_since is not None for ward in self._wards):
            self._nurseries.forget_the_dead()
        self._ears.tidy()
        self._housekeeping.keep(self._config.keep_days)

    def _is_replaced(self) -> bool:
        """See whether another may supervise: one that was stopped for long must not start tasks in its slots."""
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
        elif not self._ears.sockets_stand():
            log.warning("control.sock or wake.sock is gone; binding it again")
            try:
                self._ears.bind()
            except OSError as error:
                log.error("cannot bind it: %s; trying again", error)  # noqa: TRY400 - the sentence says it
        wal = self._store.wal_path()
        if wal is not None:
            self._ears.watch_file(wal)
        else:
            self._ears.watch(self._store.listener)

    def _leave_if_done(self) -> None:
        if self._leaving is not None:
            return
        running = self._wards.running()
        if self._draining is not None and all(_is_left_waiting(ward) for ward in running):
            waiting = f"; {len(running)} wait for tasks that the next supervisor starts" if running else ""
            self._leaving = f"{self._draining}, and nothing runs any more{waiting}"
        elif running:
            return
        elif self._burst and self._nurseries.die_again_and_again():
            self._leaving, self._exit_code = "the nursery dies again and again", 1
        elif self._burst and self._nurseries.ours() is not None and not self._has_seen_work():
            self._leaving = "nothing is due"

    def _has_seen_work(self) -> bool:
        return self._look or self._backlog or self._passing_over_until is not None

    def _send_away_unneeded(self) -> None:
        """Send away idle children beyond the spares, and those of other nurseries, whose exits would not be seen."""
        idle = [ward for ward in self._wards if ward.idle]
        ours = [ward for ward in idle if ward.nursery == self._nurseries.our_who]
        kept = set(ours if self._backlog else ours[: self._config.spares])
        for ward in idle:
            if ward not in kept and ward.peer is not None:
                self._ears.send(ward.peer, wire.Leave())
                self._enforcement.expect_to_leave(ward)

    def _leave(self) -> None:
        """Go without taking anybody along: bodies live on, idle children and an empty nursery are sent away."""
        pauses.at("supervisor.leaving")
        self._notifier.stopping(f"leaving: {self._leaving}")
        log.info("leaving: %s; %d running", self._leaving, len(self._wards.running()))
        for ward in self._wards:
            if ward.idle and ward.peer is not None:
                self._ears.send(ward.peer, wire.Leave())
        if self._recovery.done_once:  # else a row may depend on one of them
            self._acknowledge([who for who in self._exits if who not in self._wards])
        self._nurseries.tell_all(wire.Retire())
        if not self._wards.running():
            self._boards.leave()
        with contextlib.suppress(BgSupervisorError, OSError):
            if self._is_worth_a_row() and self._lock.is_intact():  # else the row is the next one's
                gone = dataclasses.replace(self._own_record(), left_at=self._clock.now())
                self._ledger.apply(Batch(supervisor=gone))
            self._store.close()
        self._ears.close()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _is_left_waiting(ward: Ward) -> bool:
    """Whether a draining supervisor may leave a task: it waits without a slot, and nobody has ordered its end."""
    return ward.slot is None and ward.end is None and ward.order is None


def _log_end(attempt: Attempt, name: str, end: End) -> None:
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
        pauses.at("supervisor.claiming")
    if batch.ends:
        pauses.at("supervisor.ending")
    if batch.unclaims:
        pauses.at("supervisor.unclaiming")
    if batch.endings:
        pauses.at("supervisor.condemning")


def _pause_after(batch: Batch) -> None:
    if batch.ends:
        pauses.at("supervisor.ended")
    if batch.unclaims:
        pauses.at("supervisor.unclaimed")
    if batch.endings:
        pauses.at("supervisor.condemned")
    if batch.returns:
        pauses.at("supervisor.granted")


def _version() -> str:
    from bgsupervisor import __version__  # noqa: PLC0415 - the package names its version last

    return __version__
