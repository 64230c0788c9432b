"""Who a process is, whether it lives, what it uses, and how to end it with all it started; knows no tables.

A PID alone is never trusted: it travels as a `ProcessIdentity`, and whatever acts on it first opens a pidfd, then
compares, then acts through the pidfd, so that a reused PID is never mistaken and never signalled. The process table
is read here because one pass over it costs a third of psutil's; psutil is asked before anybody is called dead.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import socket
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bgsupervisor.errors import Unkillable, UnsupportedSystem
from bgsupervisor.system import syscalls

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from bgsupervisor.clock import Clock

__all__ = [
    "Exit",
    "ProcessHandle",
    "ProcessIdentity",
    "Usage",
    "Verdict",
    "boot_id",
    "children",
    "descendants",
    "end_descendants",
    "host_id",
    "identity_of",
    "is_stopped",
    "kill_child",
    "look",
    "own_identity",
    "owner_uid",
    "pid_namespace",
    "raise_descriptor_limit",
    "restore_descriptor_limit",
    "signal_tree",
    "start_ticks",
    "tree_usage",
    "verdict",
]

PROC = Path("/proc")
MACHINE_ID = Path("/etc/machine-id")
KILL_WAIT_S = 5.0
KILL_ROUNDS = 16  # a fork bomb that outruns this many looks ends in Unkillable, not in an endless loop
STAND_LOOKS = 50  # ms; who has SIGSTOP stands still at the end of its present system call
STAT_MAX_BYTES = 4096  # a line of the process table is about 300 bytes
WAIT_ALL = 0x40000000  # __WALL: also children that were cloned without SIGCHLD


class Verdict(StrEnum):
    """What can be said about a process; UNKNOWN is never treated as DEAD."""

    ALIVE = "ALIVE"
    DEAD = "DEAD"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be confused with a later one of the same PID.

    Attributes:
        host: The machine, as `host_id` names it.
        boot_id: The boot of that machine.
        pid_ns: Inode of the PID namespace in which *pid* counts.
        pid: The number.
        start_ticks: Clock ticks from boot to its start (field 22 of its stat file).
    """

    host: str
    boot_id: str
    pid_ns: int
    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: by itself with a code, or by a signal; one of the two is None."""

    exit_code: int | None
    signal: int | None

    @classmethod
    def from_wait_status(cls, status: int) -> Self:
        """Read a raw status as wait(2) gives it."""
        if os.WIFSIGNALED(status):
            return cls(None, os.WTERMSIG(status))
        return cls(os.WEXITSTATUS(status), None)

    @classmethod
    def from_waitid(cls, info: os.waitid_result) -> Self:
        """Read what waitid(2) gives."""
        return cls(info.si_status, None) if info.si_code == os.CLD_EXITED else cls(None, info.si_status)

    @classmethod
    def from_multiprocessing(cls, exitcode: int) -> Self:
        """Read the `exitcode` of a multiprocessing.Process: negative is a signal."""
        return cls(None, -exitcode) if exitcode < 0 else cls(exitcode, None)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants use.

    Attributes:
        cpu_s: CPU seconds, user and system, with those of descendants that ended and were reaped.
        rss_bytes: Resident memory, the sum; pages that they share are counted for each.
    """

    cpu_s: float
    rss_bytes: int


# ---- who a process is ----


def host_id(configured: str | None) -> str:
    """Return the name of this machine in rows: the configured one, else the machine id, else the host name."""
    if configured:
        return configured
    with contextlib.suppress(OSError):
        found = MACHINE_ID.read_text(encoding="ascii").strip()
        if found and found != "uninitialized":
            return found
    return socket.gethostname()


def boot_id() -> str:
    """Return the id of this boot, the same in all containers of the machine.

    Raises:
        OSError: The process table is not readable.
    """
    return _boot_id(PROC)


def pid_namespace() -> int:
    """Return the inode of this process's PID namespace.

    Raises:
        OSError: The process table is not readable.
    """
    return (PROC / "self/ns/pid").stat().st_ino


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot.

    Returns:
        None if the table has no such process; where the table hides others' processes (hidepid) that is no proof.

    Raises:
        OSError: The process table is not readable.
    """
    try:
        return _read_row(pid).start_ticks
    except (FileNotFoundError, ProcessLookupError):
        (PROC / "self").lstat()  # no table at all is another matter than a process missing in it
        return None


def own_identity(host: str) -> ProcessIdentity:
    """Return the identity of this process.

    Raises:
        UnsupportedSystem: There is no process table as Linux has it.
    """
    try:
        identity = identity_of(os.getpid(), host)
    except OSError as error:
        raise UnsupportedSystem(f"supervising needs Linux with a readable {PROC}: {error}") from error
    if identity is None:
        raise UnsupportedSystem(f"{PROC} does not show this process; is it of another PID namespace?")
    return identity


def identity_of(pid: int, host: str) -> ProcessIdentity | None:
    """Return the identity of a process of this machine, None if there is no such process.

    Raises:
        OSError: The process table is not readable.
    """
    ticks = start_ticks(pid)
    return None if ticks is None else ProcessIdentity(host, boot_id(), pid_namespace(), pid, ticks)


# ---- whether it lives ----


class ProcessHandle:
    """A process held by a pidfd, so that whatever is done through it meets this process or none.

    Comes from `look`; close it, or use it as a context manager.
    """

    __slots__ = ("_pidfd", "identity")

    def __init__(self, identity: ProcessIdentity, pidfd: int) -> None:
        self.identity = identity
        self._pidfd = pidfd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the pidfd: readable once the process is dead; -1 once closed."""
        return self._pidfd

    def is_dead(self) -> bool:
        """Tell whether the process has ended, reaped or not."""
        return _is_over(self._pidfd)

    def send_signal(self, number: int) -> bool:
        """Send a signal; False if the process is gone.

        Raises:
            PermissionError: The process belongs to another user.
        """
        return _send(self._pidfd, number)

    def exit_status(self) -> Exit | None:
        """Return how the process ended, as far as anybody but its parent can learn it.

        Evidence, in this order: the zombie's row in the process table, then what the kernel keeps for a pidfd
        (6.15 and later) once the parent has reaped it.

        Returns:
            None if it lives, or if the evidence is gone.
        """
        if not self.is_dead():
            return None
        status = _status_of_zombie(self.identity)
        if status is None:
            status = syscalls.pidfd_exit(self._pidfd)
        return None if status is None else Exit.from_wait_status(status)

    def close(self) -> None:
        """Give the pidfd back; a second call does nothing."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def look(identity: ProcessIdentity) -> tuple[Verdict, ProcessHandle | None]:
    """Judge a process of this host and hold it.

    The caller compares hosts: for an identity of another one the answer means nothing.

    Returns:
        ALIVE with a handle. DEAD with a handle if it can still be asked for its exit (a zombie), else with None: no
        such process, other start ticks or another boot. UNKNOWN with None: another PID namespace, a process table
        that is not readable or hides the process, or no pidfd to be had.
    """
    try:
        if identity.boot_id != boot_id():
            return Verdict.DEAD, None
        if identity.pid_ns != pid_namespace() or not _table_is_ours():
            return Verdict.UNKNOWN, None
        pidfd = _open_pidfd(identity.pid)
    except OSError:
        return Verdict.UNKNOWN, None
    if pidfd is None:
        return Verdict.DEAD, None
    handle = ProcessHandle(identity, pidfd)
    found = _compare(handle)
    if found is None:
        # guard, never: a zombie is dead
        return (Verdict.DEAD if handle.is_dead() else Verdict.ALIVE), handle
    handle.close()
    return found, None


def verdict(identity: ProcessIdentity) -> Verdict:
    """Judge a process of this host, and have psutil confirm before it is called dead.

    Returns:
        As `look`; UNKNOWN also where psutil sees the very process alive that the kernel reports as gone.
    """
    found, handle = look(identity)
    if handle is not None:
        handle.close()
    # guard: psutil confirms a death
    if found is Verdict.DEAD and _psutil_objects(identity):
        return Verdict.UNKNOWN
    return found


def _compare(handle: ProcessHandle) -> Verdict | None:
    """Compare the process behind a pidfd with whom it should be: None if it is the one."""
    try:
        ticks = start_ticks(handle.identity.pid)
    except OSError:
        return Verdict.UNKNOWN
    # guard, always: the start ticks are compared, not the PID alone
    if ticks == handle.identity.start_ticks:
        return None
    if ticks is None and not handle.is_dead():
        return Verdict.UNKNOWN  # it lives, and the table hides it
    return Verdict.DEAD


def _psutil_objects(identity: ProcessIdentity) -> bool:
    import psutil  # noqa: PLC0415 - costs 45 ms that `ps` need not pay

    try:
        if identity.boot_id != boot_id() or not psutil.pid_exists(identity.pid):
            return False
        if start_ticks(identity.pid) != identity.start_ticks:
            return False
        return psutil.Process(identity.pid).status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except (psutil.Error, OSError):
        return True


def _status_of_zombie(identity: ProcessIdentity) -> int | None:
    """Return field 52 of the zombie's row; the kernel shows 0 to those who may not trace it, so ask that first."""
    try:
        (PROC / str(identity.pid) / "ns/pid").readlink()
        row = _read_row(identity.pid)
    except OSError:
        return None
    return row.exit_status if row.start_ticks == identity.start_ticks else None


# ---- what it uses ----


def tree_usage(roots: Collection[int]) -> dict[int, Usage]:
    """Sum what processes and their descendants use, by one pass over the process table.

    Costs about 2 ms per 100 processes of the machine, whatever the number of roots.

    Returns:
        By root; a root that is gone is absent, a zombie is there without memory.
    """
    table = _read_table()
    children = _children_in(table)
    return {root: _sum_up(root, table, children) for root in roots if root in table}


def children(pid: int) -> list[int]:
    """Return the PIDs of a process's own children, zombies included.

    Raises:
        OSError: The process table is not readable.
    """
    return [row.pid for row in _child_lookup()(pid)]


def descendants(pid: int) -> list[int]:
    """Return the PIDs of all descendants of a process, parents before children, zombies included.

    A process whose parent ended belongs to the next subreaper above it, so it is found only under that one.
    """
    children_of = _child_lookup()
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = [row.pid for row in children_of(waiting.pop(0))]
        found += below
        waiting += below
    return found


def _sum_up(root: int, table: dict[int, _Row], children: dict[int, list[_Row]]) -> Usage:
    rows = [table[root]]
    for row in rows:
        rows += children.get(row.pid, ())
    return Usage(
        cpu_s=sum(row.cpu_ticks for row in rows) / os.sysconf("SC_CLK_TCK"),
        rss_bytes=sum(row.rss_pages for row in rows) * os.sysconf("SC_PAGE_SIZE"),
    )


# ---- how to end it, or to hold it up ----


def owner_uid(pid: int) -> int:
    """Return the user id of a process.

    Raises:
        OSError: There is no such process, or the table hides it.
    """
    return (PROC / str(pid)).stat().st_uid


def is_stopped(pid: int) -> bool:
    """Tell whether a process stands still, by SIGSTOP or a debugger.

    Raises:
        OSError: There is no such process, or its row is not readable.
    """
    return _read_row(pid).state in (b"T", b"t")


def signal_tree(handle: ProcessHandle, number: int) -> int:
    """Send a signal to a process and all its descendants, each through a pidfd.

    SIGSTOP is sent look after look until nobody new appears. For SIGKILL the tree is stopped first: what stands still
    can neither fork nor lose its place in the tree.

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
    """Kill a child of the calling process, and reap it if it is dead; nobody if this PID is no child of it any more.

    One that cannot be looked at, for want of a descriptor or of rights, lives on.
    """
    with contextlib.suppress(OSError):
        pidfd = _open_pidfd(pid)
        if pidfd is None:
            return
        try:
            if _read_row(pid).parent == os.getpid():
                _send(pidfd, signal.SIGKILL)
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        finally:
            os.close(pidfd)


def end_descendants(pid: int, *, grace_s: float, clock: Clock) -> int:
    """End all that a process started and left behind, politely first; the process itself lives on.

    Sends SIGTERM to all descendants, waits up to *grace_s*, then sends SIGKILL until none is left. Children of the
    calling process are reaped. It sees whom it can: a process that leaves orphans must be a child subreaper.

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
    pidfd = _open_pidfd(pid)
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
    """A process and its descendants, each held by a pidfd; only these can be signalled or waited for.

    Owns the pidfd of the root, and with *spare_root* leaves the root itself alone.
    """

    def __init__(self, root: int, pidfd: int, *, spare_root: bool = False) -> None:
        self._held = {root: pidfd}
        self._spared = {root} if spare_root else set()
        self._reaps = spare_root and root == os.getpid()
        self.met = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pidfd in self._held.values():
            os.close(pidfd)
        self._held.clear()

    @property
    def pids(self) -> list[int]:
        """Who is held and was not seen dead."""
        return [pid for pid in self._held if pid not in self._spared]

    def grow(self) -> list[int]:
        """Hold descendants that are new, and return their PIDs; let go of the dead."""
        children_of = _child_lookup()
        self._drop_dead()  # after the look: who lives now was meant by its PID then
        new: list[int] = []
        parents = list(self._held)
        for parent in parents:
            for row in children_of(parent):
                parent_lives = not _is_over(self._held[parent])  # else these may be another's children
                if parent_lives and row.pid not in self._held and self._hold(row):
                    new.append(row.pid)
                    parents.append(row.pid)
        self.met += len(new)
        return new

    def send(self, number: int, pids: Iterable[int]) -> int:
        """Signal these; return how many were there to get it."""
        sent = 0
        for pid in pids:
            with contextlib.suppress(PermissionError):  # another user's: it is waited for, and named if it stays
                sent += _send(self._held[pid], number)
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
            self._await_standing(new)
            new = self.grow()
            if not new:
                break
        return stopped

    def _await_standing(self, pids: Iterable[int]) -> None:
        """Wait until these stand still, at most STAND_LOOKS ms: a fork that SIGSTOP came into is finished first."""
        moving = list(pids)
        for _ in range(STAND_LOOKS):
            moving = [pid for pid in moving if _moves(pid)]
            if not moving:
                return
            select.poll().poll(1)

    def await_end(self, deadline: float, clock: Clock) -> None:
        """Wait until all who are held are dead, or for the deadline, and let go of the dead."""
        while True:
            self._drop_dead()
            remaining_s = deadline - clock.monotonic()
            if not self.pids or remaining_s <= 0:
                return
            poll = select.poll()
            for pid in self.pids:
                poll.register(self._held[pid], select.POLLIN)
            if not poll.poll(remaining_s * 1000):
                self._drop_dead()
                return

    def _hold(self, row: _Row) -> bool:
        """Open the pidfd first, then see that the PID is still whom the table meant."""
        pidfd = _open_pidfd(row.pid)
        if pidfd is None:
            return False
        with contextlib.suppress(OSError):  # not readable any more, so nobody knows whom the pidfd holds
            if _read_row(row.pid).start_ticks == row.start_ticks and not self._let_go(pidfd):
                self._held[row.pid] = pidfd
                return True
        os.close(pidfd)
        return False

    def _drop_dead(self) -> None:
        for pid, pidfd in list(self._held.items()):
            if self._let_go(pidfd):
                os.close(self._held.pop(pid))

    def _let_go(self, pidfd: int) -> bool:
        """Tell whether a process is dead; reap it if that is ours to do."""
        if not _is_over(pidfd):
            return False
        if self._reaps:
            with contextlib.suppress(ChildProcessError):  # a grandchild: its parent or the next subreaper reaps
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        return True


# ---- how many files it may open ----

_soft_limit: int | None = None
"""The soft limit of open files that this process was started with, once it has raised its own."""


@contextlib.contextmanager
def in_root_folder() -> Iterator[None]:
    """Work in the root folder for the block, in which a Python is started: it imports from its working folder first.

    Goes back also to a folder that was deleted meanwhile, but stays where this user may not enter the working folder.
    """
    with contextlib.ExitStack() as way_back:
        with contextlib.suppress(OSError):
            here = os.open(".", os.O_PATH | os.O_CLOEXEC)
            way_back.callback(os.close, here)
            way_back.callback(os.fchdir, here)
        os.chdir("/")
        yield


def raise_descriptor_limit() -> None:
    """Let this process open as many files as its hard limit allows: each child costs it three descriptors.

    Its children inherit that: see `restore_descriptor_limit`.
    """
    import resource  # noqa: PLC0415 - absent on Windows, where this module must import

    global _soft_limit  # noqa: PLW0603 - of the process, as the limit is
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _soft_limit = soft


def restore_descriptor_limit(pid: int) -> None:
    """Give a child that was just started the limit that this process was started with; nothing if it raised none.

    Programs that use select(2), or that close all descriptors there may be, count on the low one.
    """
    if _soft_limit is not None and sys.platform == "linux":
        import resource  # noqa: PLC0415 - absent on Windows, where this module must import

        with contextlib.suppress(OSError, ValueError):  # gone already
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (_soft_limit, hard))


# ---- the process table and pidfds ----


class _Row(NamedTuple):
    """One process in the table; *exit_status* is meaningful for a zombie that we may trace."""

    pid: int
    state: bytes
    parent: int
    start_ticks: int
    cpu_ticks: int
    rss_pages: int
    exit_status: int


@functools.cache
def _boot_id(proc: Path) -> str:
    return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _table_is_ours() -> bool:
    """Tell whether the mounted process table counts PIDs as we do (a container may see its host's)."""
    return str((PROC / "self").readlink()) == str(os.getpid())


def _read_row(pid: int) -> _Row:
    fd = os.open(f"{PROC}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        line = os.read(fd, STAT_MAX_BYTES)
    finally:
        os.close(fd)
    # The name may contain blanks and parentheses, so count from the last one; fields[0] is field 3 of proc(5).
    fields = line[line.rindex(b")") + 2 :].split()
    return _Row(
        pid=pid,
        state=fields[0],
        parent=int(fields[1]),
        start_ticks=int(fields[19]),
        cpu_ticks=int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14]),
        rss_pages=int(fields[21]),
        exit_status=int(fields[49]),
    )


def _read_table() -> dict[int, _Row]:
    table = {}
    with os.scandir(PROC) as entries:
        pids = [int(entry.name) for entry in entries if entry.name.isdecimal()]
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or hidden
            table[pid] = _read_row(pid)
    return table


def _children_in(table: dict[int, _Row]) -> dict[int, list[_Row]]:
    children: dict[int, list[_Row]] = {}
    for row in table.values():
        children.setdefault(row.parent, []).append(row)
    return children


def _child_lookup() -> Callable[[int], Collection[_Row]]:
    """Return what tells a process's children: the kernel's own lists if it has them, else one pass over the table."""
    if _kernel_lists_children():
        return _listed_children
    children = _children_in(_read_table())
    return lambda pid: children.get(pid, ())


def _kernel_lists_children() -> bool:
    return (PROC / "thread-self/children").exists()


def _listed_children(pid: int) -> list[_Row]:
    children: list[bytes] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), os.scandir(f"{PROC}/{pid}/task") as threads:
        for thread in threads:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children += _read_all(f"{thread.path}/children").split()
    rows = []
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            row = _read_row(int(child))
            if row.parent == pid:
                rows.append(row)
    return rows


def _read_all(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, STAT_MAX_BYTES), b""))
    finally:
        os.close(fd)


def _has_children() -> bool:
    """Tell whether this process has any child, dead or alive; an orphan of a subreaper is one."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | WAIT_ALL)
    except ChildProcessError:
        return False
    return True


def _open_pidfd(pid: int) -> int | None:
    """Return a pidfd, None if no process has this PID.

    Raises:
        OSError: No pidfd can be had: no descriptor left, or a system without them.
    """
    if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
        raise OSError("this system or this Python has no pidfd_open")
    try:
        return os.pidfd_open(pid)
    except (ProcessLookupError, OverflowError):  # no PID is so large
        return None
    except OSError as error:
        if pid > 0 and error.errno in {errno.EINVAL, errno.ENOENT}:
            return None  # the number is a thread's now
        raise


def _is_over(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _moves(pid: int) -> bool:
    """Whether a process that was stopped still runs; one in vfork (D) waits for a child that is stopped."""
    try:
        return _read_row(pid).state in b"RS"
    except OSError:
        return False


def _send(pidfd: int, number: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True
