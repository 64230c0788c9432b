"""What is done to the processes and files of the application, at random, all from one seed; each deed is noted first.

Whom it hits it knows by PID and start ticks, from rows, from the state directory or from the wait manager's socket.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from typing import TYPE_CHECKING

from bgsupervisor import BgSupervisorError
from torture.oracle import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torture.arena import Arena, ProcessRef

__all__ = ["Chaos"]


class Chaos:
    """Does one deed after the other until it is told to stop.

    Args:
        rate: Deeds a second.
    """

    def __init__(self, arena: Arena, seed: str, *, rate: float) -> None:
        self._arena = arena
        self._random = random.Random(f"{seed}/chaos")
        self._rate = rate
        self._still: dict[ProcessRef, threading.Timer] = {}
        self._threads: list[threading.Thread] = []
        self.deeds: dict[Callable[[], None], float] = {
            self.kill_child: 10,
            self.kill_spare: 1,
            self.kill_supervisor: 2.5,
            self.kill_fork_server: 0.5,
            self.kill_wait_manager: 0.8,
            self.kill_supervisor_and_fork_server: 0.3,
            self.kill_all: 0.15,
            self.stop_child: 2,
            self.stop_supervisor: 0.7,
            self.stop_fork_server: 0.5,
            self.stop_wait_manager: 0.4,
            self.cancel: 3,
            self.retry: 2,
            self.reload: 0.8,
            self.lock_database: 0.6,
            self.delete_lock: 0.3,
        }
        if not arena.database.is_sqlite:
            self.deeds[self.hang_up] = 0.6

    def run(self, until: Callable[[], bool]) -> None:
        """Go on until *until* says so; then wait until all go on that stand still."""
        due_at = time.monotonic()
        while not until():
            due_at += self._random.expovariate(self._rate)
            while (now := time.monotonic()) < due_at and not until():
                time.sleep(min(0.05, due_at - now))
            deed = self._random.choices(list(self.deeds), list(self.deeds.values()))[0]
            with contextlib.suppress(self._arena.database.error, OSError):
                deed()
            due_at = max(due_at, time.monotonic() - 0.5)
        for thread in [*self._threads, *self._still.values()]:
            thread.join(10)

    # Kills

    def kill_child(self) -> None:
        """Kill one that runs a task."""
        running = self._arena.running()
        if running:
            id, ref = self._random.choice(running)
            self._kill("child", ref, task=id)

    def kill_spare(self) -> None:
        """Kill one that runs nothing."""
        self._kill_one_of("spare", self._arena.spares())

    def kill_supervisor(self) -> None:
        """Kill a supervisor, at whatever age; also one that is about to leave."""
        self._kill_one_of("supervisor", [life.ref for life in self._arena.living()])

    def kill_fork_server(self) -> None:
        """Kill a fork server."""
        self._kill_one_of("fork_server", self._arena.fork_servers())

    def kill_wait_manager(self) -> None:
        """Kill the wait manager."""
        self._kill_one_of("wait_manager", filter(None, [self._arena.wait_manager()]))

    def kill_supervisor_and_fork_server(self) -> None:
        """Kill both: nobody is left who sees how children end."""
        victims = [("supervisor", life.ref) for life in self._arena.living()]
        victims += [("fork_server", ref) for ref in self._arena.fork_servers()]
        self._random.shuffle(victims)
        for kind, ref in victims:
            self._kill(kind, ref)

    def kill_all(self) -> None:
        """Kill everything at once."""
        children = self._arena.running()
        self.kill_supervisor_and_fork_server()
        for id, ref in children:
            self._kill("child", ref, task=id)
        self.kill_wait_manager()

    def _kill_one_of(self, kind: str, victims: Iterable[ProcessRef]) -> None:
        known = list(victims)
        if known:
            self._kill(kind, self._random.choice(known))

    def _kill(self, kind: str, ref: ProcessRef, task: int = 0) -> None:
        at = time.monotonic()
        if self._arena.send(ref, signal.SIGKILL):
            self._arena.oracle.note(Entry("kill", kind, at, time.monotonic(), ref.pid, ref.ticks, task))

    # Standing still

    def stop_child(self) -> None:
        """Have one stand still for a while."""
        self._stop_one_of("child", [ref for _, ref in self._arena.running()], self._random.uniform(0.2, 3))

    def stop_supervisor(self) -> None:
        """Have a supervisor stand still."""
        self._stop_one_of("supervisor", [life.ref for life in self._arena.living()], self._random.uniform(0.2, 3))

    def stop_fork_server(self) -> None:
        """Have a fork server stand still."""
        self._stop_one_of("fork_server", self._arena.fork_servers(), self._random.uniform(0.2, 2))

    def stop_wait_manager(self) -> None:
        """Have the wait manager stand still."""
        self._stop_one_of("wait_manager", filter(None, [self._arena.wait_manager()]), self._random.uniform(0.2, 3))

    def _stop_one_of(self, kind: str, victims: Iterable[ProcessRef], seconds: float) -> None:
        known = list(victims)
        if not known:
            return
        ref, at = self._random.choice(known), time.monotonic()
        if ref in self._still and self._still[ref].is_alive():
            return
        if self._arena.send(ref, signal.SIGSTOP):
            # In a thread of its own: a stopped process may hold the database, for which chaos would wait.
            self._still[ref] = threading.Timer(seconds, self._let_go_on, (kind, ref, at))
            self._still[ref].start()

    def _let_go_on(self, kind: str, ref: ProcessRef, at: float) -> None:
        self._arena.send(ref, signal.SIGCONT)
        self._arena.oracle.note(Entry("stop", kind, at, time.monotonic(), ref.pid, ref.ticks))

    # What people do

    def cancel(self) -> None:
        """Cancel a task that waits or runs."""
        found = self._any_task(f"status = '{self._random.choice(('REQUEST', 'START', 'START'))}'")
        if found is not None:
            at = time.monotonic()
            with contextlib.suppress(BgSupervisorError):
                self._arena.service.cancel(found, by="chaos")
            self._arena.oracle.note(Entry("cancel", "task", at, time.monotonic(), task=found))

    def retry(self) -> None:
        """Plan an interrupted task again."""
        found = self._any_task("status = 'INTERRUPTED'")
        if found is not None:
            at = time.monotonic()
            with contextlib.suppress(BgSupervisorError):
                self._arena.service.retry(found)
                self._arena.oracle.note(Entry("retry", "task", at, time.monotonic(), task=found))

    def _any_task(self, condition: str) -> int | None:
        rows = self._arena.database.rows(
            f"SELECT id FROM bgsupervisor_task WHERE {condition} ORDER BY id DESC LIMIT 50"
        )
        return self._random.choice(rows)[0] if rows else None

    def reload(self) -> None:
        """Have the supervisor whose row says that it has loaded the tasks load them anew."""
        query = "SELECT pid, start_ticks FROM bgsupervisor_supervisor WHERE left_at IS NULL"
        pairs = self._arena.database.rows(query)
        ref = next((life.ref for life in self._arena.living() if (life.ref.pid, life.ref.ticks) in pairs), None)
        if ref is not None:
            at = time.monotonic()
            if self._arena.send(ref, signal.SIGHUP):
                self._arena.oracle.note(Entry("reload", "supervisor", at, time.monotonic(), ref.pid, ref.ticks))

    # Database and files

    def lock_database(self) -> None:
        """Hold the database's write lock for a while."""
        seconds = self._random.choice((0.3, 1, 2, 3))
        self._threads.append(threading.Thread(target=self._lock_database, args=(seconds,), daemon=True))
        self._threads[-1].start()

    def _lock_database(self, seconds: float) -> None:
        with contextlib.suppress(self._arena.database.error), self._arena.database.locked():
            at = time.monotonic()
            time.sleep(seconds)
            self._arena.oracle.note(Entry("lock", "database", at, time.monotonic()))

    def hang_up(self) -> None:
        """End all connections to the server that the application has."""
        at = time.monotonic()
        self._arena.database.hang_up()
        self._arena.oracle.note(Entry("hang up", "database", at, time.monotonic()))

    def delete_lock(self) -> None:
        """Delete the lock file: the next `run` becomes a second supervisor, until the first one sees it."""
        at = time.monotonic()
        self._arena.state.lock.unlink(missing_ok=True)
        self._arena.oracle.note(Entry("delete", "lock file", at, time.monotonic()))
