"""The Python stacks of a running process: how it prepares to show them, and how others ask; knows no tables.

The asking process sends SIGURG. Python's faulthandler answers at once from C, whatever holds the interpreter's lock,
with the stack of the thread that got the signal: the main one. Then the asking process writes to a pipe. A thread of
the asked process wakes, takes the interpreter's lock, and answers with the stacks of all threads. Without that lock,
reading the stack of a thread that runs can crash the process. The pipe is written also if nothing answers the signal:
the body may use it for itself. The answers go into memory without a name in the file system; the asking process
reads it through the process table.

SIGURG, because what has no handler for it ignores it: no mistake can end a process, not even one that has become
another program by exec a moment ago. And no Python library is known to use it; SIGUSR1, SIGWINCH and SIGQUIT are used.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import re
import secrets
import signal
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.errors import NoStack
from bgsupervisor.system import processes
from bgsupervisor.system.users import user_name

if sys.platform != "win32":  # a body on Windows loads this module too
    import fcntl

if TYPE_CHECKING:
    from typing import NoReturn, Self

    from bgsupervisor.clock import Clock
    from bgsupervisor.system.processes import ProcessHandle

__all__ = ["ANSWER_S", "Answering", "Question", "can_answer", "stack_of"]

SIGNAL = getattr(signal, "SIGURG", 0)
MEMORY_NAME = "bgsupervisor-stack"
"""Name of the shared memory in the process table."""
BEGIN, END = b"all threads, asked by ", b"that is all for "
ANSWER_S = 5.0
"""Limit of the wait for an answer, in seconds: processes answer within milliseconds, or hang in the kernel."""
SETTLED_S = 0.02
"""The main thread's answer takes less than a millisecond; then the others are asked for."""
NO_ANSWER_S = 0.5
"""A main thread that has not answered by then may have taken the signal for itself; all are asked for all the same."""
QUIET_S = 0.1
"""Limit of the wait for all threads after the main one's answer, in seconds; another thread may keep the lock."""
ANSWER_POLL_S = 0.01
DESCRIPTORS_MAX = 4096
"""The memory is opened before the body, so it is among the first descriptors."""
MEMORY_MAX_BYTES = 4 * 1024 * 1024
"""Size of old answers from which the asking process empties the memory; one takes at most about 1 MB (100 threads)."""


class Answering:
    """The means by which a process answers questions for its stack."""

    def __init__(self) -> None:
        self._wake_ups: tuple[int, int] | None = None
        self._notify_inode = 0
        self.memory: int | None = None

    def get_ready(self) -> None:
        """Let this process answer, in its main thread. Repeat before each body: the previous one may have spoilt it.

        Raises:
            OSError: The system gives no such memory; then the process shows no stack.
        """
        if self.fileno() is None or self.memory is None or _wake_ups_of(f"/proc/self/fd/{self.memory}") is None:
            read, write = (_above_standard(end) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
            self._wake_ups, self._notify_inode = (read, write), os.fstat(read).st_ino
            self.memory = _above_standard(os.memfd_create(f"{MEMORY_NAME}.{write}.{self._notify_inode}"))
            fcntl.fcntl(self.memory, fcntl.F_SETFL, os.O_APPEND)
        faulthandler.unregister(SIGNAL)  # else it takes itself for registered, though another has set the signal since
        faulthandler.register(SIGNAL, file=self.memory, all_threads=False, chain=False)

    def fileno(self) -> int | None:
        """Return the descriptor that a question makes readable; None if the body has closed it."""
        if self._wake_ups is not None and _inode(self._wake_ups[0]) == self._notify_inode:
            return self._wake_ups[0]
        return None

    def answer(self) -> None:
        """Write the stacks of all threads if a question has come. The caller has the interpreter's lock: they stand."""
        wake_ups, memory = self.fileno(), self.memory
        with contextlib.suppress(OSError):
            if wake_ups is None or memory is None or _wake_ups_of(f"/proc/self/fd/{memory}") is None:
                return
            for ref in os.read(wake_ups, 4096).split():
                os.write(memory, BEGIN + ref + b"\n")
                faulthandler.dump_traceback(memory, all_threads=True)
                os.write(memory, END + ref + b"\n")


class Question:
    """A question that was asked; the answer is read later, also when the process has died since. To be closed."""

    def __init__(self, pid: int, memory: int) -> None:
        self._pid = pid
        self._memory = memory
        self._notified = False
        self._ref = secrets.token_hex(8).encode()
        self._start = self._size = os.fstat(memory).st_size
        self._grown_at = 0.0
        self._asked_at: float | None = None

    @classmethod
    def ask(cls, handle: ProcessHandle) -> Self:
        """Ask a process for its stack; waits for nothing.

        Raises:
            NoStack: It cannot answer; says why.
        """
        pid = handle.identity.pid
        try:
            if processes.is_stopped(pid):
                why = "is stopped by SIGSTOP or a debugger and cannot answer"
                return cls._refused(pid, f"{why}; `kill -CONT {pid}` lets it go on")
            memory = _open_memory(pid)
            if memory is None:
                why = "it has become another program (exec), its body has closed all descriptors"
                return cls._refused(pid, f"shows no stack: {why}, or an older bgsupervisor started it")
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, memory)
                question = cls(pid, memory)
                if handle.send_signal(SIGNAL):  # through the pidfd: were the PID another's by now, this one is dead
                    undo.pop_all()
                    return question
        except PermissionError as error:
            raise NoStack(_whose(pid), pid=pid) from error
        except (FileNotFoundError, ProcessLookupError):
            return cls._refused(pid, "has ended just now")
        except OSError as error:
            return cls._refused(pid, f"cannot be asked: {error}")
        return cls._refused(pid, "has ended just now")

    @staticmethod
    def _refused(pid: int, why: str) -> NoReturn:
        raise NoStack(f"PID {pid} {why}", pid=pid)

    def answer(self, now: float) -> str | None:
        """Return the stacks once they are whole, None before; *now* is monotonic."""
        size = os.fstat(self._memory).st_size
        if size != self._size:
            self._size, self._grown_at = size, now
        if self._asked_at is None:
            self._asked_at = now
        # Not sooner: two answers at once would be mixed.
        is_time = now - self._asked_at >= NO_ANSWER_S if size == self._start else now - self._grown_at >= SETTLED_S
        if not self._notified and is_time:
            self._notified, self._grown_at = True, now
            _notify(self._pid, self._memory, self._ref)
        written = self._written()
        is_silent = BEGIN + self._ref not in written and now - self._grown_at >= QUIET_S
        return (self.text() or None) if self._notified and (END + self._ref in written or is_silent) else None

    def text(self) -> str:
        """Return what has been answered so far, perhaps nothing."""
        written = self._written()
        of_all, ended, _ = written.partition(BEGIN + self._ref + b"\n")[2].partition(END + self._ref)
        if ended:
            # The thread that answers is of no interest; the main one comes last.
            blocks = reversed(of_all.strip(b"\n").split(b"\n\n"))
            text = b"\n\n".join(block for block in blocks if not block.startswith(b"Current thread")) + b"\n"
        else:
            text = written.partition(BEGIN)[0]
        return text.decode(errors="replace")

    def _written(self) -> bytes:
        size = os.fstat(self._memory).st_size
        return os.pread(self._memory, max(0, size - self._start), self._start)

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._memory)


def stack_of(handle: ProcessHandle, *, timeout_s: float, clock: Clock) -> str:
    """Return the Python stacks of all threads of a process, which continues meanwhile.

    Raises:
        NoStack: It cannot answer, or has not within *timeout_s*; says why.

    Blocks for at most *timeout_s*, usually for QUIET_S.
    """
    pid = handle.identity.pid
    question = Question.ask(handle)
    with contextlib.closing(question):
        deadline = clock.monotonic() + timeout_s
        while (now := clock.monotonic()) < deadline:
            found = question.answer(now)
            if found is not None:
                return found
            if handle.is_dead():
                raise NoStack(f"PID {pid} ended before it could answer", pid=pid)
            clock.sleep(ANSWER_POLL_S)
    raise NoStack(
        f"PID {pid} has not answered within {timeout_s:g} s: it hangs in the kernel (disk sleep), or its body has "
        "taken SIGURG for itself and lets no other thread run",
        pid=pid,
    )


def can_answer(pid: int) -> bool:
    """Return whether a process has the memory for its stack. Raises OSError if this user may not see it."""
    memory = _open_memory(pid)
    if memory is not None:
        os.close(memory)
    return memory is not None


def _open_memory(pid: int) -> int | None:
    """Open the memory of another process, None if it has none. Raises OSError if this user may not open it."""
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in itertools.islice(entries, DESCRIPTORS_MAX):
            if _wake_ups_of(entry.path) is not None:
                found = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                if _wake_ups_of(f"/proc/self/fd/{found}") is None:  # the body has closed it, and opened something else
                    os.close(found)
                    return None
                if os.fstat(found).st_size > MEMORY_MAX_BYTES:
                    os.ftruncate(found, 0)
                return found
    return None


def _notify(pid: int, memory: int, ref: bytes) -> None:
    """Write to the pipe that the memory's name gives; does nothing if something else is there by now."""
    descriptor, inode = _wake_ups_of(f"/proc/self/fd/{memory}") or (-1, 0)
    with contextlib.suppress(OSError):
        wake_ups = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # Not a file that the process itself may only read: its memory's name is its own choice.
            if _inode(wake_ups) == inode and stat.S_ISFIFO(os.fstat(wake_ups).st_mode):
                os.write(wake_ups, ref + b"\n")
        finally:
            os.close(wake_ups)


def _wake_ups_of(path: str) -> tuple[int, int] | None:
    """Return descriptor and inode of the wake-up that a memory is named after; None where *path* is no such memory."""
    try:
        found = re.fullmatch(rf"/memfd:{MEMORY_NAME}\.(\d+)\.(\d+) \(deleted\)", str(Path(path).readlink()))
    except FileNotFoundError:
        return None
    return None if found is None else (int(found[1]), int(found[2]))


def _inode(descriptor: int) -> int | None:
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return None


def _above_standard(descriptor: int) -> int:
    """Move a descriptor clear of the standard ones, which a body redirects."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def _whose(pid: int) -> str:
    owner = "another user"
    with contextlib.suppress(OSError):
        owner = f"user {user_name(processes.owner_uid(pid))}"
    return f"PID {pid} belongs to {owner}, and this is user {user_name(os.geteuid())}; ask as that user, or as root"
