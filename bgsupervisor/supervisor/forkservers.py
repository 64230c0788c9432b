"""The fork servers that a supervisor knows: it starts them, puts new code in the place of old, and retires the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
from typing import TYPE_CHECKING

from bgsupervisor import failpoints
from bgsupervisor.ipc import exit_journal, messages
from bgsupervisor.ipc.messages import ProcessRef, TaskOptions
from bgsupervisor.system import process_tree, processes, spawning
from bgsupervisor.system.fingerprint import code_fingerprint, write_fingerprint
from bgsupervisor.system.processes import ProcessIdentity, Verdict
from bgsupervisor.worker import forkserver

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from bgsupervisor.clock import Clock
    from bgsupervisor.config import Config
    from bgsupervisor.ipc.messages import Exited
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.supervisor.events import EventSources, Peer
    from bgsupervisor.system.fingerprint import Fingerprint
    from bgsupervisor.system.processes import ProcessHandle

__all__ = ["FIRST_HELLO_S", "ForkServerHandle", "ForkServers"]

log = logging.getLogger("bgsupervisor")

FIRST_HELLO_S = 1.2
"""After a start no dead child is called VANISHED before the living fork servers have said hello, or this long."""
SWEEP_S = 600.0
"""Time after a fork server's death in which its children may leave processes to the supervisor, in seconds."""
CHILD_HELLO_S = 60.0
"""A forked child says hello within milliseconds, a spawned one when it has loaded the application."""
FORK_S = 60.0
"""Time without a fork after which a fork server with ordered children counts as hung, in seconds."""
RESTART_S = (0.1, 1.0, 5.0, 15.0)
"""Pauses before a fork server that died is started again; the last one repeats until one has loaded the application."""


@dataclasses.dataclass(eq=False, slots=True)
class ForkServerHandle:
    """A fork server that has said hello.

    Attributes:
        ordered: Children that it should fork and has not forked yet.
        ordered_at: When it last answered an order, or was given one; monotonic.
        expected: Children that it has forked and that have not said hello yet, and since when.
    """

    hello: messages.ForkServerHello
    peer: Peer
    ordered: int = 0
    ordered_at: float = 0.0
    expected: dict[ProcessRef, float] = dataclasses.field(default_factory=dict)

    @property
    def coming(self) -> int:
        """How many children are on the way."""
        return self.ordered + len(self.expected)


_NO_OPTIONS = TaskOptions()


@dataclasses.dataclass(eq=False, slots=True)
class _Started:
    """A fork server of ours; *callers* wait for its result, *fingerprint* is that of the code it loads."""

    process: SpawnProcess
    ref: ProcessRef
    handle: ProcessHandle | None
    force: bool
    callers: list[Peer]
    fingerprint: Fingerprint
    fingerprinted_at_ns: int


class ForkServers:
    """All fork servers of one state directory.

    One of them is `ours`: it starts new children. A candidate is loading, and takes its place if it loads what the
    present one has loaded.

    Attributes:
        our_ref: The one that starts new children.
        one_died: A fork server of ours died and may have left its children to this process.
        exits: Reported exits of children, until they are acknowledged.
        rejected: What failed to load in the last candidate that was not let in.
    """

    def __init__(
        self, config: Config, state_dir: StateDir, own: ProcessIdentity, sources: EventSources, clock: Clock
    ) -> None:
        self.config = config
        self._state_dir = state_dir
        self._own = own
        self._sources = sources
        self._clock = clock
        self._handles: dict[ProcessRef, ForkServerHandle] = {}
        self._started: dict[ProcessRef, _Started] = {}
        self._candidate: _Started | None = None
        self._deaths = 0
        self._start_at = 0.0
        self.our_ref: ProcessRef | None = None
        self.one_died = False
        self.exits: dict[ProcessRef, Exited] = {}
        self.rejected: list[messages.LoadFailure] = []
        self._sweep_until = 0.0
        # Such as the other half of `gunicorn & exec bgsupervisor run`.
        self._not_ours = forkserver.strays_of_this_process(set())
        self._awaited = {ref for ref in self._records() if not self._is_dead(ref)}
        for ref in self._awaited:
            self._wake(ref)
        self._awaited_until = clock.monotonic() + FIRST_HELLO_S

    # What the supervisor asks

    def ours(self) -> ForkServerHandle | None:
        """Return the fork server that starts new children; None while there is none that can be spoken to."""
        fork_server = self._handles.get(self.our_ref) if self.our_ref is not None else None
        return fork_server if fork_server is not None and not fork_server.peer.channel.closed else None

    def get(self, ref: ProcessRef | None) -> ForkServerHandle | None:
        """Return one fork server that has said hello, or None."""
        return None if ref is None else self._handles.get(ref)

    def options(self, name: str) -> TaskOptions:
        """Return the options of a task's class as our fork server, or else an older one, has loaded it."""
        ours = None if self.our_ref is None else self._handles.get(self.our_ref)
        if ours is not None and name in ours.hello.catalogue:
            return ours.hello.catalogue[name]
        older = (fork_server.hello.catalogue for fork_server in self._handles.values())
        return next((catalogue[name] for catalogue in older if name in catalogue), _NO_OPTIONS)

    def failures(self) -> list[messages.LoadFailure]:
        """Return what failed to load, in our fork server and in the last that was not let in."""
        fork_server = self.ours()
        return [*([] if fork_server is None else fork_server.hello.failures), *self.rejected]

    def dangers(self) -> list[str]:
        """Return what in the import of our fork server may cost data."""
        fork_server = self.ours()
        return [] if fork_server is None else fork_server.hello.dangers

    def awaited(self) -> bool:
        """Whether a living fork server may still report deaths that only it has seen."""
        if self._clock.monotonic() >= self._awaited_until:
            return False
        # One that has died since, unknown to this supervisor, reports nothing more.
        dead = {ref for ref in self._awaited if self._is_dead(ref)}
        # guard: a dead fork server is not awaited
        self._awaited -= dead
        return bool(self._awaited)

    def can_report_no_more(self, parent: ProcessRef | None) -> bool:
        """Whether the fork server of a dead child is dead as well; *parent* is None where the child never named it.

        A child that no supervisor has heard may be of any fork server that an earlier supervisor has started.
        """
        if parent is not None:
            return self._is_dead(parent)
        earlier = {ref for ref in (*self._records(), *self._handles) if ref not in self._started}
        return bool(earlier) and all(self._is_dead(ref) for ref in earlier)

    def die_again_and_again(self) -> bool:
        """Whether no fork server has come up in a row of tries."""
        return self._deaths > len(RESTART_S)

    def written_exit(self, child: ProcessRef) -> Exited | None:
        """Return what a fork server has written down of a child's exit, None without; it may be dead by now."""
        for record in self._records().values():
            exited = exit_journal.read(record).get(child)
            if exited is not None:
                return exited
        return None

    # What is heard of them

    def take_hello(self, peer: Peer, hello: messages.ForkServerHello) -> bool:
        """Get to know a fork server; return whether it is ours from now on. All others are retired."""
        self._handles[hello.ref] = ForkServerHandle(hello, peer, ordered_at=self._clock.monotonic())
        self._awaited.discard(hello.ref)
        for warning in hello.warnings:
            log.warning("%s", warning)
        for danger in hello.dangers:
            log.error("%s", danger)
        if hello.ref == self.our_ref:
            return True
        candidate = self._candidate
        if candidate is None or candidate.ref != hello.ref:
            self._sources.send(peer, messages.Retire())
            return False
        self._candidate = None
        self._note_code(candidate, hello)
        missing = self._missing(hello)
        if missing and not candidate.force:
            self._turn_down(candidate, peer, hello, missing)
            return False
        self._let_in(candidate, hello)
        return True

    def take_spawned(self, peer: Peer, message: messages.Spawned) -> None:
        """Note that an ordered child is there."""
        fork_server = self.get(peer.ref)
        if fork_server is not None:
            fork_server.ordered = max(0, fork_server.ordered - 1)
            fork_server.ordered_at = fork_server.expected[message.ref] = self._clock.monotonic()

    def take_spawn_failure(self, peer: Peer, message: messages.SpawnFailed) -> None:
        """Note that ordered children will not come."""
        fork_server = self.get(peer.ref)
        if fork_server is not None:
            fork_server.ordered = max(0, fork_server.ordered - message.count)
        log.error("the fork server cannot fork children (%s); trying again", message.error)

    def met(self, child: ProcessRef) -> None:
        """Note that a child said hello, or died before it could."""
        for fork_server in self._handles.values():
            fork_server.expected.pop(child, None)

    def died(self, ref: ProcessRef) -> None:
        """Note a death. If it was our fork server, another starts after a pause, and its children are ours to reap."""
        started = self._started.pop(ref, None)
        if started is None:
            return
        started.process.join(0.5)
        exit_code = started.process.exitcode
        with contextlib.suppress(ValueError):
            started.process.close()
        if started.handle is not None:
            started.handle.close()
        self._handles.pop(ref, None)
        if exit_code != 0:
            self.one_died = True
            self._sweep_until = self._clock.monotonic() + SWEEP_S
        if started is self._candidate:
            self._candidate = None
            self._answer(
                started, done=False, detail=f"the new fork server died with exit code {exit_code} while loading"
            )
        if ref == self.our_ref or self.our_ref is None:
            log.error("the fork server died with exit code %s; running bodies go on", exit_code)
            self.our_ref = None
            self._start_at = self._clock.monotonic() + RESTART_S[min(self._deaths, len(RESTART_S) - 1)]
            self._deaths += 1

    # What is done with them

    def start_if_missing(self) -> None:
        """Start a fork server if there is none and its time has come."""
        if self.our_ref is None and self._candidate is None and self._clock.monotonic() >= self._start_at:
            self._start(force=True, callers=[])

    def start_due_at(self) -> float | None:
        """Return when a missing fork server is to be started, monotonic."""
        return self._start_at if self.our_ref is None and self._candidate is None else None

    def reload(self, *, force: bool, caller: Peer | None) -> None:
        """Start a fork server with the present code; it takes over when it has loaded. The callers are answered."""
        callers = [] if caller is None else [caller]
        if self._candidate is not None:  # it may have read half of the new code
            callers += self._candidate.callers
        self._start(force=force or self.our_ref is None, callers=callers)
        failpoints.at("supervisor.reloading")

    def spawn(self, count: int) -> None:
        """Order children of our fork server."""
        fork_server = self.ours()
        if fork_server is not None and count > 0:
            fork_server.ordered_at = fork_server.ordered_at if fork_server.ordered else self._clock.monotonic()
            fork_server.ordered += count
            self._sources.send(fork_server.peer, messages.Spawn(count))

    def give_up_on_the_silent(self) -> None:
        """Once a second: kill children that hang before their hello, replace a fork server that does not fork any more.

        Such a child has inherited a lock that a thread of the application held at the fork, and will never begin.
        """
        now, fork_server = self._clock.monotonic(), self.ours()
        if fork_server is None:
            return
        for ref in [ref for ref, since in fork_server.expected.items() if now - since > CHILD_HELLO_S]:
            log.error("PID %d was forked %.0f s ago and does not begin; killing it", ref.pid, CHILD_HELLO_S)
            fork_server.expected.pop(ref)
            _, handle = processes.open_process(self._identity_of(ref))
            if handle is not None:
                with handle, contextlib.suppress(OSError):
                    process_tree.signal_tree(handle, signal.SIGKILL)
        if fork_server.ordered and now - fork_server.ordered_at > FORK_S:
            log.error("the fork server, PID %d, does not fork any more; starting another", fork_server.hello.ref.pid)
            fork_server.ordered_at = now
            self.reload(force=True, caller=None)

    def forget_the_dead(self) -> None:
        """Remove the records of dead fork servers; no task must depend on what is written there."""
        for ref, record in self._records().items():
            fork_server = self._handles.get(ref)
            if (fork_server is None or fork_server.peer.channel.closed) and self._is_dead(ref):
                with contextlib.suppress(OSError):
                    record.unlink()

    def tell_all(self, message: messages.Message) -> None:
        """Send something to every fork server that can be spoken to."""
        for fork_server in self._handles.values():
            if not fork_server.peer.channel.closed:
                self._sources.send(fork_server.peer, message)

    def acknowledge(self, refs: Sequence[ProcessRef]) -> None:
        """Let fork servers forget exits that no task depends on: of idle children, and of ends that are recorded."""
        if refs:
            for ref in refs:
                del self.exits[ref]
            self.tell_all(messages.ExitsSeen(list(refs)))

    def sweep_inherited(self, known: Iterable[int]) -> None:
        """Kill what a dead task left when its fork server was dead too: it was reparented to this process."""
        if self._clock.monotonic() > self._sweep_until or os.getpid() == 1:
            return  # to PID 1 all orphans of the container come, and not only what tasks have left
        known = {*known, *self._not_ours, *(ref.pid for ref in self._started)}
        for pid in forkserver.strays_of_this_process(known):
            log.info("killing PID %d, which a dead task has left", pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # our own unreaped child: its PID is not reused
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    # Within

    def _start(self, *, force: bool, callers: list[Peer]) -> None:
        fingerprint, fingerprinted_at_ns = code_fingerprint(self.config), 0  # before it loads: a later change shows
        with contextlib.suppress(OSError):
            fingerprinted_at_ns = write_fingerprint(self._state_dir.fingerprint, fingerprint)
        process = multiprocessing.get_context("spawn").Process(
            target=forkserver.main, args=(self.config,), daemon=False, name="bgsupervisor fork server"
        )
        try:
            with spawning.in_root_folder():
                process.start()
        except OSError as error:  # no processes or no memory left
            log.error("cannot start a fork server: %s", error)  # noqa: TRY400 - the sentence says it
            self._start_at = self._clock.monotonic() + RESTART_S[-1]
            for caller in callers:
                self._sources.send(caller, messages.Reloaded(False, f"cannot start a fork server: {error}"))
            return
        pid = process.pid or 0
        spawning.restore_descriptor_limit(pid)  # bodies keep the limit that the supervisor was started with
        ref = ProcessRef(pid, processes.start_ticks(pid) or -1)
        _, handle = processes.open_process(self._identity_of(ref))
        if handle is not None:
            self._sources.watch_process(ref, handle)
        self._candidate = self._started[ref] = _Started(
            process, ref, handle, force, callers, fingerprint, fingerprinted_at_ns
        )

    def _note_code(self, candidate: _Started, hello: messages.ForkServerHello) -> None:
        """Add to the fingerprint what the application itself has imported from elsewhere."""
        if not candidate.fingerprinted_at_ns:
            return
        with contextlib.suppress(OSError):
            fingerprint = candidate.fingerprint.extended(hello.places, since_ns=candidate.fingerprinted_at_ns)
            write_fingerprint(self._state_dir.fingerprint, fingerprint)

    def _missing(self, hello: messages.ForkServerHello) -> list[messages.LoadFailure]:
        """Return what the present fork server has loaded and this one could not."""
        fork_server = self.ours()
        if fork_server is None:
            return []
        known = {failure.module for failure in fork_server.hello.failures}
        return [failure for failure in hello.failures if failure.module not in known]

    def _let_in(self, candidate: _Started, hello: messages.ForkServerHello) -> None:
        old = self.ours()
        self.our_ref = hello.ref
        if old is not None:
            failpoints.at("supervisor.reloaded")
            self._sources.send(old.peer, messages.Retire())
        self._deaths = 0
        self.rejected = []
        failed = f"; failed to load: {', '.join(one.module for one in hello.failures)}" if hello.failures else ""
        count = len(hello.catalogue)
        detail = f"loaded {count} task{'' if count == 1 else 's'}{failed}"
        log.info("%s", detail)
        self._answer(candidate, done=True, detail=detail, failures=hello.failures)

    def _turn_down(
        self, candidate: _Started, peer: Peer, hello: messages.ForkServerHello, missing: list[messages.LoadFailure]
    ) -> None:
        self.rejected = missing
        names = ", ".join(failure.module for failure in missing)
        last = missing[0].error.strip().splitlines()[-1:]
        detail = f"{names} failed to load ({''.join(last)}); the code that works stays in force"
        log.error("%s", detail)
        self._sources.send(peer, messages.Leave())
        del self._handles[hello.ref]
        self._answer(candidate, done=False, detail=detail, failures=missing)

    def _answer(
        self, started: _Started, *, done: bool, detail: str, failures: Sequence[messages.LoadFailure] = ()
    ) -> None:
        for caller in started.callers:
            if not caller.channel.closed:
                self._sources.send(caller, messages.Reloaded(done, detail, list(failures)))

    def _records(self) -> dict[ProcessRef, Path]:
        found = {}
        for path in self._state_dir.path.glob("forkserver-*-*"):
            _, pid, ticks = path.name.split("-", 2)
            if pid.isascii() and pid.isdecimal() and ticks.isascii() and ticks.isdecimal():
                found[ProcessRef(int(pid), int(ticks))] = path
        return found

    def _is_dead(self, ref: ProcessRef) -> bool:
        return processes.verdict(self._identity_of(ref)) is Verdict.DEAD

    def _wake(self, ref: ProcessRef) -> None:
        """Let a fork server check its connection: a stopped supervisor would never close it."""
        _, handle = processes.open_process(self._identity_of(ref))
        if handle is not None:
            with handle, contextlib.suppress(OSError):
                handle.send_signal(signal.SIGCHLD)  # which ends its rest, and does nothing where it is not awaited

    def _identity_of(self, ref: ProcessRef) -> ProcessIdentity:
        return dataclasses.replace(self._own, pid=ref.pid, start_ticks=ref.start_ticks)
