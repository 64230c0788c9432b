"""The nurseries that a supervisor knows: it starts one, replaces it when it dies, and retires those it found."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING

from bgsupervisor import nursery, processes, wire
from bgsupervisor.processes import ProcessIdentity, Verdict
from bgsupervisor.wire import TaskOptions, Who

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.context import SpawnProcess

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.processes import ProcessHandle
    from bgsupervisor.reception import Peer, Reception
    from bgsupervisor.statedir import StateDir

__all__ = ["FIRST_HELLO_S", "Home", "Nurseries"]

log = logging.getLogger("bgsupervisor")

FIRST_HELLO_S = 1.2
"""After a start no dead child is called VANISHED before the living nurseries have said hello, or this long."""
RESTART_S = (0.1, 1.0, 5.0, 15.0)
"""Pauses before a nursery that died is started again; the last one repeats until one has loaded the application."""


@dataclasses.dataclass(eq=False, slots=True)
class Home:
    """A nursery that has said hello.

    Attributes:
        ordered: Children that it was told to fork and has not forked yet.
        expected: Children that it has forked and that have not said hello yet.
    """

    hello: wire.NurseryHello
    peer: Peer
    ordered: int = 0
    expected: set[Who] = dataclasses.field(default_factory=set)

    @property
    def coming(self) -> int:
        """How many children are on the way."""
        return self.ordered + len(self.expected)


class Nurseries:
    """All nurseries of one state directory; one of them is `ours`, started by this supervisor."""

    def __init__(
        self, config: Config, state_dir: StateDir, own: ProcessIdentity, ears: Reception, clock: Clock
    ) -> None:
        self._config = config
        self._own = own
        self._ears = ears
        self._clock = clock
        self._homes: dict[Who, Home] = {}
        self._process: SpawnProcess | None = None
        self._handle: ProcessHandle | None = None
        self._deaths = 0
        self._start_at = 0.0
        self.our_who: Who | None = None
        self.one_died = False
        self._awaited = self._find_living(state_dir)
        self._awaited_until = clock.monotonic() + FIRST_HELLO_S

    # What the supervisor asks

    def ours(self) -> Home | None:
        """Return the nursery that starts new children; None while there is none that can be spoken to."""
        home = self._homes.get(self.our_who) if self.our_who is not None else None
        return home if home is not None and not home.peer.channel.closed else None

    def get(self, who: Who | None) -> Home | None:
        """Return one nursery that has said hello, or None."""
        return None if who is None else self._homes.get(who)

    def options(self, name: str) -> TaskOptions:
        """Return the options of a task's class as our nursery, or else an older one, has loaded it."""
        homes = sorted(self._homes.values(), key=lambda home: home.hello.who != self.our_who)
        return next((home.hello.catalogue[name] for home in homes if name in home.hello.catalogue), TaskOptions())

    def awaited(self) -> bool:
        """Whether a living nursery may still tell of deaths that nobody else has seen."""
        return bool(self._awaited) and self._clock.monotonic() < self._awaited_until

    def dies_again_and_again(self) -> bool:
        """Whether no nursery has come up in a row of tries."""
        return self._deaths > len(RESTART_S)

    # What is heard of them

    def take_hello(self, peer: Peer, hello: wire.NurseryHello) -> bool:
        """Get to know a nursery; return whether it is ours. Others are retired."""
        self._homes[hello.who] = Home(hello, peer)
        self._awaited.discard(hello.who)
        for warning in hello.warnings:
            log.warning("%s", warning)
        if hello.who != self.our_who:
            self._ears.send(peer, wire.Retire())
            return False
        self._deaths = 0
        failed = f"; failed to load: {', '.join(one.module for one in hello.failures)}" if hello.failures else ""
        log.info("loaded %d tasks%s", len(hello.catalogue), failed)
        return True

    def take_spawned(self, peer: Peer, message: wire.Spawned) -> None:
        """Note that an ordered child is there."""
        home = self.get(peer.who)
        if home is not None:
            home.ordered = max(0, home.ordered - 1)
            home.expected.add(message.who)

    def take_spawn_failure(self, peer: Peer, message: wire.SpawnFailed) -> None:
        """Note that ordered children will not come."""
        home = self.get(peer.who)
        if home is not None:
            home.ordered = max(0, home.ordered - message.count)
        log.error("the nursery cannot fork children (%s); trying again", message.error)

    def met(self, child: Who) -> None:
        """Note that a child said hello, or died before it could."""
        for home in self._homes.values():
            home.expected.discard(child)

    def died(self, who: Who) -> bool:
        """Note a death; if it was our nursery, another is started after a pause, and its children are ours to reap."""
        if who != self.our_who or self._process is None:
            return False
        self._process.join(0.5)
        log.error("the nursery died with exit code %s; its running bodies go on", self._process.exitcode)
        with contextlib.suppress(ValueError):
            self._process.close()
        if self._handle is not None:
            self._handle.close()
        self._homes.pop(who, None)
        self._process = self._handle = self.our_who = None
        self._start_at = self._clock.monotonic() + RESTART_S[min(self._deaths, len(RESTART_S) - 1)]
        self._deaths += 1
        self.one_died = True
        return True

    # What is done with them

    def start_if_missing(self) -> None:
        """Start a nursery if there is none and its time has come."""
        if self._process is not None or self._clock.monotonic() < self._start_at:
            return
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(
            target=nursery.main, args=(self._config,), daemon=False, name="bgsupervisor nursery"
        )
        self._process.start()
        pid = self._process.pid or 0
        self.our_who = Who(pid, processes.start_ticks(pid) or -1)
        identity = self._identity_of(self.our_who)
        _, self._handle = processes.look(identity)
        if self._handle is not None:
            self._ears.watch_process(self.our_who, self._handle)

    def start_due_at(self) -> float | None:
        """Return when a missing nursery is to be started, monotonic."""
        return self._start_at if self._process is None else None

    def spawn(self, count: int) -> None:
        """Order children of our nursery."""
        home = self.ours()
        if home is not None and count > 0:
            home.ordered += count
            self._ears.send(home.peer, wire.Spawn(count))

    def tell_all(self, message: wire.Message) -> None:
        """Send something to every nursery that can be spoken to."""
        for home in self._homes.values():
            if not home.peer.channel.closed:
                self._ears.send(home.peer, message)

    def sweep_inherited(self, known: Iterable[int]) -> None:
        """Kill what a dead task left when its nursery was dead too: it was reparented to this process."""
        if not self.one_died:
            return
        ours = {self._process.pid or 0} if self._process is not None else set()
        for pid in nursery.strays_of_this_process({*known, *ours}):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # our own unreaped child: its PID is not reused
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _find_living(self, state_dir: StateDir) -> set[Who]:
        found = set()
        for path in state_dir.path.glob("nursery-*-*"):
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

    def _identity_of(self, who: Who) -> ProcessIdentity:
        return dataclasses.replace(self._own, pid=who.pid, start_ticks=who.start_ticks)
