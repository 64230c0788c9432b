"""A process with its descendants: what they use, how to signal all of them and how to end them.

The process table is read here, because one pass costs 2/3 of psutil's and the kernel's own lists of children cost
1/100 of it. Each process is signalled through a pidfd that was compared with the table: see `processes`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bgsupervisor.errors import Unkillable
from bgsupervisor.system import processes
from bgsupervisor.system.processes import has_ended, open_pidfd, read_file, read_row, send_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from types import TracebackType
    from typing import Self

    from bgsupervisor.clock import Clock
    from bgsupervisor.system.processes import ProcessHandle, ProcessRow

__all__ = ["Usage", "children", "descendants", "end_descendants", "kill_child", "signal_tree", "tree_usage"]

KILL_WAIT_S = 5.0
"""Limit of the wait for processes to die of SIGKILL, in seconds."""
KILL_ROUNDS = 16
"""Limit of the passes over a tree that grows: a fork bomb ends in Unkillable, not in an endless loop."""
STOP_WAIT_MS = 50
"""Limit of the wait for a process to stop: SIGSTOP takes effect at the end of the present system call."""
WAIT_ALL = 0x40000000
"""__WALL of waitid(2): also children that were cloned without SIGCHLD."""


@dataclass(frozen=True, slots=True)
class Usage:
    """The CPU time and memory of a process and its descendants.

    Attributes:
        cpu_s: CPU seconds, user and system, with those of descendants that ended and were reaped.
        rss_bytes: Resident memory, the sum; shared pages are counted for each process.
    """

    cpu_s: float
    rss_bytes: int


def tree_usage(roots: Collection[int]) -> dict[int, Usage]:
    """Sum the usage of processes and their descendants, by one pass over the process table.

    Costs about 2 ms per 100 processes of the machine, whatever the number of roots.

    Returns:
        By root; a root that is gone is absent, a zombie counts without memory.
    """
    table = _read_table()
    children_of = _children_in(table)
    return {root: _sum_up(root, table, children_of) for root in roots if root in table}


def children(pid: int) -> list[int]:
    """Return the PIDs of a process's own children, zombies included.

    Raises:
        OSError: The process table is not readable.
    """
    return [row.pid for row in _child_lookup()(pid)]


def descendants(pid: int) -> list[int]:
    """Return the PIDs of all descendants of a process, parents before children, zombies included.

    A process whose parent ended belongs to the next subreaper above it, and is found only under that one.
    """
    children_of = _child_lookup()
    found = [pid]
    for parent in found:
        found += [row.pid for row in children_of(parent)]
    return found[1:]


def signal_tree(handle: ProcessHandle, number: int) -> int:
    """Send a signal to a process and all its descendants, each through a pidfd.

    SIGSTOP is repeated until no new descendant appears. Before SIGKILL the tree is stopped: a stopped process can
    neither fork nor lose its place in the tree.

    Returns:
        How many were signalled; 0 if the process is dead (its descendants then belong to another).
    """
    if handle.is_dead():
        return 0
    with _Tree(handle.identity.pid, os.dup(handle.fileno())) as tree:
        tree.grow()
        if number == signal.SIGKILL:
            return tree.kill()
        return tree.stop() if number == signal.SIGSTOP else tree.send(number, tree.pids)


def kill_child(pid: int) -> None:
    """Kill a child of the calling process, and reap it if it is dead.

    Does nothing if the PID is no child of this process any more. A child lives on if it cannot be examined, for want
    of a descriptor or of rights.
    """
    with contextlib.suppress(OSError):
        pidfd = open_pidfd(pid)
        if pidfd is None:
            return
        try:
            if read_row(pid).parent == os.getpid():
                send_signal(pidfd, signal.SIGKILL)
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        finally:
            os.close(pidfd)


def end_descendants(pid: int, *, grace_s: float, clock: Clock) -> int:
    """End all descendants of a process, politely first; the process itself lives on.

    Sends SIGTERM to all descendants, waits up to *grace_s*, then sends SIGKILL until none is left. Children of the
    calling process are reaped. Orphans are found only if the process is a child subreaper.

    Args:
        pid: The process; for the calling one the answer "none" costs 2 us.
        grace_s: Seconds between SIGTERM and SIGKILL, 0 kills at once; on the monotonic clock.
        clock: Measures the grace.

    Returns:
        How many there were.

    Raises:
        Unkillable: Some are still there KILL_WAIT_S after SIGKILL.

    Blocks for at most grace_s + KILL_WAIT_S seconds.
    """
    if pid == os.getpid() and not _has_children():
        return 0
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return 0
    with _Tree(pid, pidfd, spare_root=True) as tree:
        deadline = clock.monotonic() + grace_s
        while (new := tree.grow()) and clock.monotonic() < deadline:
            tree.send(signal.SIGTERM, new)
            tree.await_end(deadline, clock)
        _kill_all(tree, clock)
        return tree.met


def _kill_all(tree: _Tree, clock: Clock) -> None:
    deadline = clock.monotonic() + KILL_WAIT_S
    for _ in range(KILL_ROUNDS):
        tree.grow()
        if not tree.pids:
            return
        tree.kill()
        tree.await_end(deadline, clock)
        if clock.monotonic() >= deadline:
            break
    if tree.pids:
        left = tuple(sorted(tree.pids))
        raise Unkillable(
            f"still there {KILL_WAIT_S:g} s after SIGKILL: {', '.join(map(str, left))}; usually a process in "
            "uninterruptible disk sleep or one of another user; look at it with ps",
            pids=left,
        )


class _Tree:
    """A process and its descendants, each with a pidfd of its own; only these can be signalled or awaited.

    Owns the pidfd of the root, and with *spare_root* leaves the root itself alone.
    """

    def __init__(self, root: int, pidfd: int, *, spare_root: bool = False) -> None:
        self._pidfds = {root: pidfd}
        self._spared = {root} if spare_root else set()
        self._reaps = spare_root and root == os.getpid()
        self.met = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()

    @property
    def pids(self) -> list[int]:
        """The members that were not seen dead."""
        return [pid for pid in self._pidfds if pid not in self._spared]

    def grow(self) -> list[int]:
        """Add descendants that are new and drop the dead; return the new PIDs."""
        children_of = _child_lookup()
        self._drop_dead()  # after the table was read: a member that lives now is the process that the table named
        new: list[int] = []
        parents = list(self._pidfds)
        for parent in parents:
            for row in children_of(parent):
                parent_lives = not has_ended(self._pidfds[parent])  # else these may be another process's children
                if parent_lives and row.pid not in self._pidfds and self._add(row):
                    new.append(row.pid)
                    parents.append(row.pid)
        self.met += len(new)
        return new

    def send(self, number: int, pids: Iterable[int]) -> int:
        """Signal these members; return how many existed."""
        sent = 0
        for pid in pids:
            with contextlib.suppress(PermissionError):  # another user's process: awaited, and named if it stays
                sent += send_signal(self._pidfds[pid], number)
        return sent

    def kill(self) -> int:
        """Stop the tree, then kill it; return how many got SIGKILL."""
        self.stop()
        return self.send(signal.SIGKILL, self.pids)

    def stop(self) -> int:
        """Stop the tree until it no longer grows; return how many were stopped."""
        stopped, new = 0, self.pids
        for _ in range(KILL_ROUNDS):
            stopped += self.send(signal.SIGSTOP, new)
            _await_stop(new)
            new = self.grow()
            if not new:
                break
        return stopped

    def await_end(self, deadline: float, clock: Clock) -> None:
        """Wait until all members are dead, or for the deadline, and drop the dead."""
        while True:
            self._drop_dead()
            remaining_s = deadline - clock.monotonic()
            if not self.pids or remaining_s <= 0:
                return
            poll = select.poll()
            for pid in self.pids:
                poll.register(self._pidfds[pid], select.POLLIN)
            if not poll.poll(remaining_s * 1000):
                self._drop_dead()
                return

    def _add(self, row: ProcessRow) -> bool:
        """Open the pidfd first, then check that the PID still means the process of the table."""
        pidfd = open_pidfd(row.pid)
        if pidfd is None:
            return False
        with contextlib.suppress(OSError):  # not readable any more: the pidfd may be another process's
            if read_row(row.pid).start_ticks == row.start_ticks and not self._is_dead(pidfd):
                self._pidfds[row.pid] = pidfd
                return True
        os.close(pidfd)
        return False

    def _drop_dead(self) -> None:
        for pid, pidfd in list(self._pidfds.items()):
            if self._is_dead(pidfd):
                os.close(self._pidfds.pop(pid))

    def _is_dead(self, pidfd: int) -> bool:
        """Return whether a process is dead; reap it if it may be a child of ours."""
        if not has_ended(pidfd):
            return False
        if self._reaps:
            with contextlib.suppress(ChildProcessError):  # a grandchild: its parent or the next subreaper reaps it
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        return True


def _await_stop(pids: Iterable[int]) -> None:
    """Wait until these are stopped, at most STOP_WAIT_MS: a fork that SIGSTOP interrupted is finished first."""
    moving = list(pids)
    for _ in range(STOP_WAIT_MS):
        moving = [pid for pid in moving if _moves(pid)]
        if not moving:
            return
        select.poll().poll(1)


def _moves(pid: int) -> bool:
    """Return whether a process that got SIGSTOP still runs; one in vfork (D) waits for a child that is stopped."""
    try:
        return read_row(pid).state in b"RS"
    except OSError:
        return False


# ---- the process table ----


def _read_table() -> dict[int, ProcessRow]:
    table = {}
    with os.scandir(processes.PROC) as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdecimal()]
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or hidden
            table[pid] = read_row(pid)
    return table


def _children_in(table: dict[int, ProcessRow]) -> dict[int, list[ProcessRow]]:
    found: dict[int, list[ProcessRow]] = {}
    for row in table.values():
        found.setdefault(row.parent, []).append(row)
    return found


def _sum_up(root: int, table: dict[int, ProcessRow], children_of: dict[int, list[ProcessRow]]) -> Usage:
    rows = [table[root]]
    for row in rows:
        rows += children_of.get(row.pid, ())
    return Usage(
        cpu_s=sum(row.cpu_ticks for row in rows) / os.sysconf("SC_CLK_TCK"),
        rss_bytes=sum(row.rss_pages for row in rows) * os.sysconf("SC_PAGE_SIZE"),
    )


def _child_lookup() -> Callable[[int], Collection[ProcessRow]]:
    """Return the lookup of a process's children: by the kernel's own lists, else by one pass over the table."""
    if _kernel_lists_children():
        return _listed_children
    found = _children_in(_read_table())
    return lambda pid: found.get(pid, ())


def _kernel_lists_children() -> bool:
    return (processes.PROC / "thread-self/children").exists()


def _listed_children(pid: int) -> list[ProcessRow]:
    pids: list[bytes] = []
    with (
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
        os.scandir(processes.PROC / f"{pid}/task") as threads,
    ):
        for thread in threads:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids += read_file(f"{thread.path}/children").split()
    rows = []
    for child in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            row = read_row(int(child))
            if row.parent == pid:
                rows.append(row)
    return rows


def _has_children() -> bool:
    """Return whether this process has any child, dead or alive; an orphan of a subreaper is one."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | WAIT_ALL)
    except ChildProcessError:
        return False
    return True
