"""The supervisor: decides when. One single-threaded loop that starts tasks, watches children and records every end.

It imports no application code, forks nothing itself, holds one database connection (on PostgreSQL another one that
only listens) and never waits for another process. All children are treated as adopted: death comes from the pidfd, the
exit from the fork server, the result from the message or the row. So it does not matter which supervisor started them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from bgsupervisor import failpoints
from bgsupervisor.addresses import masked
from bgsupervisor.clock import AttendedClock
from bgsupervisor.database.store import Store
from bgsupervisor.errors import AccessError, BgSupervisorError, ConfigError, DatabaseError
from bgsupervisor.ipc import messages
from bgsupervisor.ledger.attempts import Batch
from bgsupervisor.ledger.requests import Ledger
from bgsupervisor.supervisor import postmortem
from bgsupervisor.supervisor.backoff import PUT_OFF_S, Backoff
from bgsupervisor.supervisor.children import Children
from bgsupervisor.supervisor.decisions import Decisions
from bgsupervisor.supervisor.events import EventSources
from bgsupervisor.supervisor.forkservers import FIRST_HELLO_S, ForkServers
from bgsupervisor.supervisor.housekeeping import Housekeeping
from bgsupervisor.supervisor.inbox import Inbox
from bgsupervisor.supervisor.presence import Presence
from bgsupervisor.supervisor.recovery import Recovery
from bgsupervisor.supervisor.scheduling import Scheduler
from bgsupervisor.supervisor.shutdown import Shutdown
from bgsupervisor.supervisor.suspension import Suspensions
from bgsupervisor.supervisor.termination import Terminations
from bgsupervisor.supervisor.wait_manager import WaitManager
from bgsupervisor.system import processes, spawning
from bgsupervisor.system.syscalls import set_child_subreaper
from bgsupervisor.system.titles import set_title

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from bgsupervisor.config import Config
    from bgsupervisor.ipc.lock import Lock
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.supervisor.children import ChildHandle
    from bgsupervisor.supervisor.events import Events, Peer
    from bgsupervisor.system.sd_notify import Notifier

__all__ = ["Supervisor"]

log = logging.getLogger("bgsupervisor")

BUSY_TIMEOUT_S = 0.1
"""Limit of the wait for another writer of the database in one pass, in seconds."""
STOPPED_S = 2.0
"""Gap between two passes after which the supervisor counts as stopped meanwhile, in seconds."""
LONGEST_REST_S = 1.0
"""Longest rest without a wake-up, in seconds; then the database's version, files and clocks are checked."""
RECOVER_EVERY_S = 5.0
"""Interval between full checks of all running rows, in seconds."""
COMMIT_CHECKS_S = (0.002, 0.01, 0.05, 0.2)
"""Delays after a write to the -wal file at which its commit may be visible, in seconds."""
EXAMINE_EVERY_S = 0.02
"""Interval between two attempts to learn how a dead child ended, in seconds."""
UNATTENDED_SHOWN = 20
"""Limit of log lines about tasks that ended while no supervisor was running; the rest is a count."""
TOUCH_SLACK_S = 0.02
"""How much older the lock file's time may be than the end that it was touched after, in seconds: file times are of the
last timer tick (https://man7.org/linux/man-pages/man7/time.7.html), and a server's clock is known to milliseconds."""


class _Configured(Protocol):
    """A part that a reload gives the new configuration."""

    config: Config


class Supervisor:
    """Supervises one state directory and database.

    Args:
        config: The configuration.
        state_dir: Exists, and belongs to this user.
        lock: Acquired.
        notifier: Reports to the service manager.
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
        spawning.raise_descriptor_limit()
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
        self._terminations = Terminations(config, self._children, self._fork_servers, self._sources, clock)
        self._suspensions = Suspensions(self._children, clock)
        self._housekeeping = Housekeeping(self._ledger, state_dir, clock)
        self._wait_manager = WaitManager(state_dir, self._recovery.identity_of, self._sources, clock)
        self._presence = Presence(config, self._own, self._children, self._fork_servers, clock)
        self._backoff = Backoff(self._terminations, clock)
        self._shutdown = Shutdown(config, state_dir, lock, self._children, self._terminations)
        self._scheduler = Scheduler(
            config,
            ledger=self._ledger,
            children=self._children,
            fork_servers=self._fork_servers,
            recovery=self._recovery,
            terminations=self._terminations,
            shutdown=self._shutdown,
            backoff=self._backoff,
            sources=self._sources,
            clock=clock,
        )
        self._inbox = Inbox(
            children=self._children,
            fork_servers=self._fork_servers,
            recovery=self._recovery,
            terminations=self._terminations,
            wait_manager=self._wait_manager,
            scheduler=self._scheduler,
            presence=self._presence,
            sources=self._sources,
            clock=clock,
            reload=self._reload,
        )
        self._decisions = Decisions(
            config=config,
            ledger=self._ledger,
            lock=lock,
            children=self._children,
            fork_servers=self._fork_servers,
            recovery=self._recovery,
            terminations=self._terminations,
            suspensions=self._suspensions,
            wait_manager=self._wait_manager,
            scheduler=self._scheduler,
            shutdown=self._shutdown,
            presence=self._presence,
            backoff=self._backoff,
            sources=self._sources,
            clock=clock,
        )
        self._unattended_since: datetime | None = clock.now() - timedelta(
            seconds=clock.monotonic() - lock.unattended_since - TOUCH_SLACK_S
        )
        self._data_version = -1
        self._commit_checks_at: list[float] = []
        self._check_at = 0.0

    def run(self) -> int:
        """Supervise until there is a reason to leave; return the exit code. The caller leaves by os._exit."""
        self._sources.listen_to_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
        status = f"supervising {masked(self._config.database)} with {self._config.slots} slots, PID {os.getpid()}"
        log.info("%s", status)
        self._notifier.ready(status)
        set_title(f"supervisor {self._config.path or self._state_dir.path}")
        while self._shutdown.leaving is None:
            self.tick()
        self._leave()
        return self._shutdown.exit_code

    def tick(self) -> None:
        """One pass."""
        events = self._hear()
        self._reap(events)
        self._recover()
        self._enforce()
        claims = self._scheduler.admit()
        self._decisions.write(claims)
        self._scheduler.prepare()
        self._check_itself()

    def _hear(self) -> Events:
        """Rest until something happens or is due, and take it in; heartbeats alone are no reason for a pass."""
        until = None
        while True:
            # A database that does not answer may have made the pass long. After a stop within it, moments that it set
            # lie too late by its length, and a rest until then would itself be taken for a stop.
            if self._clock.attend(counted_s=LONGEST_REST_S):
                until, self._check_at, self._recovery.due_at = None, 0.0, 0.0
            if until is None:
                until = self._clock.monotonic() + self._rest_s()
            moment = min([until, *self._commit_checks_at[:1]])
            ready = self._sources.rest(max(0.0, moment - self._clock.monotonic()))
            if self._clock.attend(counted_s=0.0):
                self._presence.renew()  # its row says for how long it was silent
            events = self._sources.hear(ready)
            self._take_in(events)
            if events.matters or self._scheduler.queue_changed or self._clock.monotonic() >= until:
                return events

    def _take_in(self, events: Events) -> None:
        for peer, message in events.messages:
            self._inbox.take(peer, message)
        for number in events.signals:
            self._take_signal(number)
        if events.woken:
            self._scheduler.queue_changed = True
            self._wait_manager.notify(events.keys)
            self._heed_stop_mark()
        now = self._clock.monotonic()
        if events.database_touched:
            self._commit_checks_at = [now, *(now + later_s for later_s in COMMIT_CHECKS_S)]
        if self._commit_checks_at and now >= self._commit_checks_at[0]:
            del self._commit_checks_at[0]
            self._check_for_commits()

    def _take_signal(self, number: int) -> None:
        if number == signal.SIGTERM:
            self._shutdown.on_sigterm()
        elif number == signal.SIGINT:
            self._shutdown.on_interrupt()
        elif number == signal.SIGHUP:
            self._reload(False, None)

    def _heed_stop_mark(self) -> None:
        self._scheduler.queue_changed = self._shutdown.heed_stop_mark() or self._scheduler.queue_changed

    def _reload(self, force: bool, caller: Peer | None) -> None:
        """Load configuration and code anew; if that fails, the present ones stay in force."""
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
            log.warning("%s changed in the configuration; restart to apply it", ", ".join(changed))
        self._config = dataclasses.replace(fresh, **fixed)
        parts: tuple[_Configured, ...] = (
            *(self._recovery, self._terminations, self._fork_servers),
            *(self._scheduler, self._shutdown, self._presence, self._decisions),
        )
        for part in parts:
            part.config = self._config
        self._fork_servers.reload(force=force, caller=caller)

    def _check_for_commits(self) -> None:
        """Note if another connection has committed since; our own commits do not count."""
        with contextlib.suppress(BgSupervisorError):
            version = self._store.data_version()
            if version != self._data_version:
                self._data_version = version
                self._scheduler.queue_changed = True

    def _reap(self, events: Events) -> None:
        """Find out how dead children ended; ask again in the next pass for what cannot be known yet."""
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
            self._fork_servers.acknowledge([ref for ref in self._fork_servers.exits if ref not in self._children])

    def _examine(self, child: ChildHandle, now: float) -> None:
        if child.peer is not None and not child.peer.channel.closed:
            for message in self._sources.last_messages(child.peer):
                self._inbox.take(child.peer, message)
        if child.attempt is None and child.says is None:
            self._children.forget(child)
        elif child.attempt is not None and child.end is None and not self._never_began(child):
            # First: a dead fork server has written all it knows.
            is_alone = self._fork_servers.can_report_no_more(child.fork_server)
            exited = self._fork_servers.exits.get(child.ref) or self._fork_servers.written_exit(child.ref)
            if exited is not None:
                self._fork_servers.exits[child.ref] = exited  # acknowledged once its end is recorded
            wait_s = FIRST_HELLO_S if self._fork_servers.awaited() else postmortem.EXIT_WAIT_S
            wait_s = 0.0 if is_alone else wait_s
            inherited = self._fork_servers.one_died or is_alone
            exit = postmortem.exit_of(child, exited, now=now, wait_s=wait_s, inherited=inherited)
            if exit is not None:
                child.end = postmortem.result_of_exit(child, exit, exited, self._children.oom)

    def _never_began(self, child: ChildHandle) -> bool:
        """Whether it is known that its claim is to be given back, however its process has ended since."""
        return child.undelivered or child.attempt in self._recovery.not_started

    def _recover(self) -> None:
        """Compare every START row: adopt what lives, record what does not."""
        now = self._clock.monotonic()
        if now < self._recovery.due_at:
            return
        try:
            self._log_unattended_ends()
            starts = self._ledger.starts()
            if starts:
                failpoints.at("supervisor.adopting")
            self._recovery.compare(starts)
            if starts:
                failpoints.at("supervisor.adopted")
        except (DatabaseError, AccessError) as error:
            self._backoff.complain(error)
            self._recovery.due_at = now + PUT_OFF_S[0]
        else:
            self._recovery.due_at = now + RECOVER_EVERY_S
            if any(child.slot is None for child in self._children.running()):
                self._wait_manager.expect()
            self._scheduler.queue_changed = True  # what could not be read when it was asked for is asked for again

    def _log_unattended_ends(self) -> None:
        """Log once the ends that processes have recorded themselves since the last supervisor left."""
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

    def _enforce(self) -> None:
        """Apply cancels, suspensions and limits."""
        if self._scheduler.queue_changed:
            try:
                requests = list(self._ledger.control_requests())
                self._terminations.heed(requests)
                self._suspensions.heed(requests)
            except (DatabaseError, AccessError) as error:
                self._backoff.complain(error)
        stalled = self._terminations.stalled()
        if stalled:
            try:
                ids = [child.attempt.id for child in stalled if child.attempt is not None]
                waiting = {row["task_id"] for row in self._ledger.waits.rows(ids)}
                if self._backoff.failures or self._store.write_problem(wait_s=BUSY_TIMEOUT_S):
                    waiting |= set(ids)  # for the database, maybe: `reach` and locks are written there
            except (DatabaseError, AccessError) as error:
                self._backoff.complain(error)
                self._terminations.put_off_stalls()
            else:
                self._terminations.end_stalled(stalled, waiting)
        self._shutdown.end_running()
        self._terminations.enforce()
        self._suspensions.enforce()

    def _rest_s(self) -> float:
        """Return for how long nothing can become due, at most LONGEST_REST_S."""
        now = self._clock.monotonic()
        moments = [
            self._check_at,
            self._terminations.next_due_at(),
            self._fork_server_due_at(),
            self._wait_manager.due_at(),
            self._scheduler.due_at(),
            self._decisions.due_at(),
            self._examine_due_at(now),
        ]
        return min(LONGEST_REST_S, max(0.0, min(moment for moment in moments if moment is not None) - now))

    def _fork_server_due_at(self) -> float | None:
        return None if self._shutdown.draining is not None else self._fork_servers.start_due_at()

    def _examine_due_at(self, now: float) -> float | None:
        waiting = any(child.dead_since is not None and child.end is None for child in self._children)
        return now + EXAMINE_EVERY_S if waiting else None

    def _check_itself(self) -> None:
        """Start a missing fork server; once a second check that lock, sockets and database are still ours."""
        now = self._clock.monotonic()
        if self._shutdown.is_replaced():  # and starts nothing any more: the next one has its own
            return
        if self._shutdown.stays:
            self._fork_servers.start_if_missing()
        self._wait_manager.check()
        self._leave_if_done()
        if now < self._check_at:
            return
        self._check_at = now + LONGEST_REST_S
        with contextlib.suppress(AccessError):
            self._state_dir.create()  # the logs folder too: without it no child could write
        self._notifier.alive()
        self._heed_stop_mark()
        with contextlib.suppress(OSError):
            self._lock.touch()
        self._check_files()
        self._check_for_commits()
        self._fork_servers.sweep_inherited({child.ref.pid for child in self._children} | self._wait_manager.pids)
        self._scheduler.send_away_unneeded()
        self._fork_servers.give_up_on_the_silent()
        if self._recovery.done_once and not any(child.dead_since is not None for child in self._children):
            self._fork_servers.forget_the_dead()
        self._sources.tidy()
        self._housekeeping.keep(self._config.keep_days)

    def _check_files(self) -> None:
        if self._store.inode() not in (None, self._database_inode):
            self._shutdown.leaving = (
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
        if self._shutdown.leaving is not None:
            return
        running = self._children.running()
        if self._shutdown.draining is not None and all(_is_left_waiting(child) for child in running):
            waiting = f"; {len(running)} wait for tasks that the next supervisor starts" if running else ""
            self._shutdown.leaving = f"{self._shutdown.draining}, and nothing runs any more{waiting}"
        elif running:
            return
        elif self._burst and self._fork_servers.die_again_and_again():
            self._shutdown.leaving, self._shutdown.exit_code = "the fork server dies again and again", 1
        elif self._burst and self._fork_servers.ours() is not None and not self._scheduler.has_work:
            self._shutdown.leaving = "nothing is due"

    def _leave(self) -> None:
        """Leave: bodies live on, idle children and an empty fork server are sent away."""
        failpoints.at("supervisor.leaving")
        self._notifier.stopping(f"leaving: {self._shutdown.leaving}")
        log.info("leaving: %s; %d running", self._shutdown.leaving, len(self._children.running()))
        for child in self._children:
            if child.idle and child.peer is not None:
                self._sources.send(child.peer, messages.Leave())
        # guard, always: no exit is acknowledged before all rows are compared
        if self._recovery.done_once:  # else a row may depend on one of them
            self._fork_servers.acknowledge([ref for ref in self._fork_servers.exits if ref not in self._children])
        self._fork_servers.tell_all(messages.Retire())
        if not self._children.running():
            self._wait_manager.leave()
        with contextlib.suppress(BgSupervisorError, OSError):
            if self._presence.is_worth_a_row() and self._lock.is_intact():  # else the row is the next one's
                gone = dataclasses.replace(self._presence.record(), left_at=self._clock.now())
                self._ledger.apply(Batch(supervisor=gone))
            self._store.close()
        self._sources.close()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _is_left_waiting(child: ChildHandle) -> bool:
    """Whether a draining supervisor may leave a task: it waits without a slot, and no end was requested."""
    # guard, last condition: stop --kill waits for tasks without a slot
    return child.slot is None and child.end is None and child.termination is None
