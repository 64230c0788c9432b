"""The identity of a process, whether it lives and how it ended; knows no tables and no descendants.

A PID alone is never trusted: it travels as a `ProcessIdentity`. Code that acts on one first opens a pidfd, then
compares, then acts through the pidfd, so that a reused PID is neither mistaken nor signalled.

A row of the process table costs 14 us here and 150 to 200 us with psutil, which reads more and keeps no pidfd. psutil
confirms each death before a process is called dead.
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

from bgsupervisor.errors import UnsupportedSystem
from bgsupervisor.system import syscalls

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


__all__ = [
    "Exit",
    "ProcessHandle",
    "ProcessIdentity",
    "Verdict",
    "boot_id",
    "host_id",
    "identity_of",
    "is_stopped",
    "open_process",
    "own_identity",
    "owner_uid",
    "pid_namespace",
    "start_ticks",
    "verdict",
]

PROC = Path("/proc")
MACHINE_ID = Path("/etc/machine-id")
READ_BYTES = 4096
"""Size of one read from the process table; a line of it is about 300 bytes."""


class Verdict(StrEnum):
    """Whether a process lives; UNKNOWN is never treated as DEAD."""

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
        pid: The PID.
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
        """Convert a raw status of wait(2)."""
        if os.WIFSIGNALED(status):
            return cls(None, os.WTERMSIG(status))
        return cls(os.WEXITSTATUS(status), None)

    @classmethod
    def from_waitid(cls, info: os.waitid_result) -> Self:
        """Convert a result of waitid(2)."""
        return cls(info.si_status, None) if info.si_code == os.CLD_EXITED else cls(None, info.si_status)

    @classmethod
    def from_multiprocessing(cls, exitcode: int) -> Self:
        """Convert the `exitcode` of a multiprocessing.Process: negative is a signal."""
        return cls(None, -exitcode) if exitcode < 0 else cls(exitcode, None)


# ---- identity ----


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
    """Return the start time of a process, in clock ticks since boot.

    Returns:
        None if the table has no such process; no proof of death where the table hides others' processes (hidepid).

    Raises:
        OSError: The process table is not readable.
    """
    try:
        return read_row(pid).start_ticks
    except (FileNotFoundError, ProcessLookupError):
        (PROC / "self").lstat()  # raises where there is no table at all
        return None


def own_identity(host: str) -> ProcessIdentity:
    """Return the identity of this process.

    Raises:
        UnsupportedSystem: There is no process table as on Linux.
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


# ---- life and death ----


class ProcessHandle:
    """A process with its pidfd: signals and questions reach this process or none.

    `open_process` returns one; close it, or use it as a context manager.
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
        """Return whether the process has ended, reaped or not."""
        return has_ended(self._pidfd)

    def send_signal(self, number: int) -> bool:
        """Send a signal; False if the process is gone.

        Raises:
            PermissionError: The process belongs to another user.
        """
        return send_signal(self._pidfd, number)

    def exit_status(self) -> Exit | None:
        """Return how the process ended, as far as a process other than its parent can learn it.

        Evidence, in this order: the zombie's row in the process table, then the status that Linux 6.15 and later keep
        for a pidfd after the parent has reaped the process.

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
        """Close the pidfd; a second call does nothing."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def open_process(identity: ProcessIdentity) -> tuple[Verdict, ProcessHandle | None]:
    """Return whether a process of this host lives, and a handle to it.

    The caller compares hosts: for an identity of another host the answer means nothing.

    Returns:
        ALIVE with a handle. DEAD with a handle if its exit can still be read (a zombie), else with None: no such
        process, other start ticks or another boot. UNKNOWN with None: another PID namespace, a process table that is
        not readable or hides the process, or a pidfd cannot be opened.
    """
    try:
        if identity.boot_id != boot_id():
            return Verdict.DEAD, None
        if identity.pid_ns != pid_namespace() or not _table_is_ours():
            return Verdict.UNKNOWN, None
        pidfd = open_pidfd(identity.pid)
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
    """Return whether a process of this host lives; DEAD only if psutil confirms it.

    Returns:
        As `open_process`; UNKNOWN also where psutil finds the same process alive.
    """
    found, handle = open_process(identity)
    if handle is not None:
        handle.close()
    # guard: psutil confirms a death
    if found is Verdict.DEAD and _psutil_objects(identity):
        return Verdict.UNKNOWN
    return found


def _compare(handle: ProcessHandle) -> Verdict | None:
    """Compare the process of a pidfd with the identity: None if it is the same."""
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
    import psutil  # noqa: PLC0415 - costs `ps` 45 ms that it seldom needs

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
    """Return field 52 of the zombie's row; it is 0 for a reader that may not trace the process, so check that first."""
    try:
        (PROC / str(identity.pid) / "ns/pid").readlink()
        row = read_row(identity.pid)
    except OSError:
        return None
    return row.exit_status if row.start_ticks == identity.start_ticks else None


def owner_uid(pid: int) -> int:
    """Return the user id of a process.

    Raises:
        OSError: There is no such process, or the table hides it.
    """
    return (PROC / str(pid)).stat().st_uid


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, by SIGSTOP or a debugger.

    Raises:
        OSError: There is no such process, or its row is not readable.
    """
    return read_row(pid).state in (b"T", b"t")


# ---- the process table and pidfds ----


class ProcessRow(NamedTuple):
    """One process in the table; *exit_status* counts only for a zombie that this process may trace."""

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
    """Return whether the mounted process table is of our PID namespace (a container may see its host's)."""
    return str((PROC / "self").readlink()) == str(os.getpid())


def read_row(pid: int) -> ProcessRow:
    """Read a process's line of the table, /proc/PID/stat of proc(5).

    Raises:
        FileNotFoundError, ProcessLookupError: There is no such process.
        OSError: The line is not readable.
    """
    line = read_file(f"{PROC}/{pid}/stat")
    # The name may contain blanks and parentheses, so count from the last one; fields[0] is field 3 of proc(5).
    fields = line[line.rindex(b")") + 2 :].split()
    return ProcessRow(
        pid=pid,
        state=fields[0],
        parent=int(fields[1]),
        start_ticks=int(fields[19]),
        cpu_ticks=int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14]),
        rss_pages=int(fields[21]),
        exit_status=int(fields[49]),
    )


def read_file(path: str) -> bytes:
    """Return all that a file of the process table contains."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, READ_BYTES), b""))
    finally:
        os.close(fd)


def open_pidfd(pid: int) -> int | None:
    """Return a pidfd, None if no process has this PID.

    Raises:
        OSError: No descriptor is left, or the system has no pidfds.
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


def has_ended(pidfd: int) -> bool:
    """Return whether the process of a pidfd is dead, reaped or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def send_signal(pidfd: int, number: int) -> bool:
    """Send a signal through a pidfd; False if the process is gone.

    Raises:
        PermissionError: The process belongs to another user.
    """
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    return True
