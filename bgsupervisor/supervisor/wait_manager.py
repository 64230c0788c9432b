"""The wait manager as its supervisor sees it: started when a task first waits, replaced when it dies or hangs."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from typing import TYPE_CHECKING

from bgsupervisor.ipc import messages
from bgsupervisor.ipc.messages import ProcessRef
from bgsupervisor.ledger.waits import EVERYBODY
from bgsupervisor.system import processes, spawning
from bgsupervisor.system.processes import Verdict
from bgsupervisor.worker import wait_manager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.context import SpawnProcess

    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.supervisor.events import EventSources, Peer
    from bgsupervisor.system.processes import ProcessHandle, ProcessIdentity

__all__ = ["WaitManager"]

log = logging.getLogger("bgsupervisor")

SILENT_S = 0.7
"""Silence after which a wait manager counts as hung and is killed, in seconds; its waiters notice that at once."""
RETRY_S = 1.0
"""Pause before a wait manager is started again, and time that one of an earlier supervisor has to connect."""
RESTART_S = (0.0, 1.0, 5.0, 15.0)
"""Pauses before a wait manager that died is started again; the last one repeats until one has said hello."""
FIRST_HELLO_S = 10.0
"""Limit of the start of a wait manager on a busy machine, in seconds."""


class WaitManager:
    """At most one wait manager; notifies are sent to it and never waited for."""

    def __init__(
        self,
        state_dir: StateDir,
        identity_of: Callable[[ProcessRef], ProcessIdentity],
        sources: EventSources,
        clock: Clock,
    ) -> None:
        self._folder = state_dir.path
        self._identity_of = identity_of
        self._sources = sources
        self._clock = clock
        self._process: SpawnProcess | None = None
        self._ref: ProcessRef | None = None
        self._handle: ProcessHandle | None = None
        self._peer: Peer | None = None
        self._deadline = 0.0
        self._deaths = 0
        self._wanted = False

    @property
    def pids(self) -> set[int]:
        """The wait manager's PID, as one of this process's children."""
        return set() if self._ref is None else {self._ref.pid}

    def want(self) -> None:
        """Start a wait manager at the next `check`: a task waits."""
        if self._ref is None and not self._wanted:
            self._wanted, self._deadline = True, self._clock.monotonic()

    def expect(self) -> None:
        """Expect a wait manager: tasks waited before this supervisor came, and an earlier one may connect first."""
        if not self._wanted:
            self._wanted, self._deadline = True, self._clock.monotonic() + RETRY_S

    def notify(self, keys: Sequence[str]) -> None:
        """Wake the tasks that wait for these keys; they read the rows."""
        if keys and self._peer is not None and not self._peer.channel.closed:
            self._sources.send(self._peer, messages.Notify(list(keys)))

    def take(self, peer: Peer, message: messages.WaitManagerHello | messages.WaitManagerBeat | messages.Notify) -> None:
        """Take in what a wait manager says, or pass on what a child notifies."""
        if isinstance(message, messages.WaitManagerHello):
            self.take_hello(peer, message)
        elif isinstance(message, messages.Notify):
            self.notify(message.keys)
        elif peer is self._peer:
            self.take_beat()

    def take_hello(self, peer: Peer, hello: messages.WaitManagerHello) -> None:
        """Get to know a wait manager: the one that was started, or one that an earlier supervisor has left."""
        if self._ref not in (None, hello.ref):
            self._sources.send(peer, messages.Leave())
            return
        if self._ref is None:
            verdict, self._handle = processes.open_process(self._identity_of(hello.ref))
            if verdict is not Verdict.ALIVE or self._handle is None:
                return
            self._ref = hello.ref
            self._sources.watch_process(hello.ref, self._handle)
        self._peer = peer
        self._deaths = 0
        self._wanted = True
        self.take_beat()
        self.notify([EVERYBODY])

    def take_beat(self) -> None:
        """Note that the wait manager lives."""
        self._deadline = self._clock.monotonic() + SILENT_S

    def died(self, ref: ProcessRef) -> None:
        """Note a death; another is started if tasks still wait."""
        if ref != self._ref:
            return
        if self._process is not None:
            self._process.join(0.5)
            with contextlib.suppress(ValueError):
                self._process.close()
        if self._handle is not None:
            self._handle.close()
        self._process = self._ref = self._handle = self._peer = None
        log.warning("the wait manager died; waiters look by themselves until the next one is there")
        self._deadline = self._clock.monotonic() + RESTART_S[min(self._deaths, len(RESTART_S) - 1)]
        self._deaths += 1

    def due_at(self) -> float | None:
        """Return when `check` has something to do, monotonic."""
        return self._deadline if self._wanted else None

    def check(self) -> None:
        """Kill a wait manager that does not beat; start one that is missing."""
        if not self._wanted or self._clock.monotonic() < self._deadline:
            return
        if self._ref is None:
            self._start()
            return
        if self._handle is None:
            self._deadline = self._clock.monotonic() + FIRST_HELLO_S
            return
        log.warning("the wait manager, PID %d, does not answer; replacing it", self._ref.pid)
        self._handle.send_signal(signal.SIGKILL)
        self._deadline = self._clock.monotonic() + FIRST_HELLO_S

    def leave(self) -> None:
        """Send the wait manager away: no task waits any more."""
        if self._peer is not None and not self._peer.channel.closed:
            self._sources.send(self._peer, messages.Leave())
        elif self._handle is not None:  # it has not said hello yet, and would wait LONELY_S for the next supervisor
            with contextlib.suppress(OSError):
                self._handle.send_signal(signal.SIGKILL)

    def _start(self) -> None:
        self._process = multiprocessing.get_context("spawn").Process(
            target=wait_manager.main, args=(self._folder,), daemon=False, name="bgsupervisor wait manager"
        )
        try:
            with spawning.in_root_folder():
                self._process.start()
        except OSError as error:  # no descriptors, no processes: waiters poll until it succeeds
            log.error("cannot start the wait manager: %s; trying again", error)  # noqa: TRY400 - the sentence says it
            self._process, self._deadline = None, self._clock.monotonic() + RETRY_S
            return
        pid = self._process.pid or 0
        spawning.restore_descriptor_limit(pid)
        self._ref = ProcessRef(pid, processes.start_ticks(pid) or -1)
        self._deadline = self._clock.monotonic() + FIRST_HELLO_S
        _, self._handle = processes.open_process(self._identity_of(self._ref))
        if self._handle is not None:
            self._sources.watch_process(self._ref, self._handle)
