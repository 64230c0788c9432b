"""The Python stacks of a running process: how it gets ready to show them, and how others ask; knows no tables.

Who asks sends SIGURG. Python's faulthandler answers from C, whatever holds the interpreter's lock, with the stacks of
all threads, into a piece of memory without a name in the file system; who asked reads it through the process table.
SIGURG, because what has no handler for it ignores it: no mistake can end a process, not even one that has become
another program by exec a moment ago. And no Python library is known to use it; SIGUSR1, SIGWINCH and SIGQUIT are used.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import itertools
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor import processes
from bgsupervisor.errors import NoStack
from bgsupervisor.statedir import user_name

if TYPE_CHECKING:
    from typing import NoReturn, Self

    from bgsupervisor.clock import Clock
    from bgsupervisor.processes import ProcessHandle

__all__ = ["ANSWER_S", "Question", "get_ready", "stack_of"]

SIGNAL = signal.SIGURG
NAME = "bgsupervisor-stack"
"""What the memory is called in the process table."""
ANSWER_S = 5.0
"""A process answers within milliseconds; one that has not after so long hangs in the kernel, or cannot."""
QUIET_S = 0.1
"""An answer has no end mark; it is whole when it has not grown for so long."""
LOOK_S = 0.01
DESCRIPTORS_MAX = 4096
"""The memory is opened before the body, so it is among the first descriptors."""
MEMORY_MAX_BYTES = 4 * 1024 * 1024
"""Who asks empties the memory when old answers take more; a single one takes about 1 MB at most (100 threads)."""


def get_ready(memory: int | None) -> int:
    """Have this process answer questions for its stack; return the descriptor of its memory.

    Called again, with that descriptor, before each body: the one before may have taken signal or descriptor away.

    Raises:
        OSError: The system gives no such memory; then the process shows no stack.
    """
    if memory is None or not _is_memory(f"/proc/self/fd/{memory}"):
        made = os.memfd_create(NAME)
        try:
            memory = fcntl.fcntl(made, fcntl.F_DUPFD_CLOEXEC, 3)  # clear of the standard ones, which a body redirects
        finally:
            os.close(made)
        fcntl.fcntl(memory, fcntl.F_SETFL, os.O_APPEND)
    faulthandler.unregister(SIGNAL)  # else it takes itself for registered, though another has set the signal since
    faulthandler.register(SIGNAL, file=memory, all_threads=True, chain=False)
    return memory


class Question:
    """A question that was asked; the answer is read later, also when the process has died since. To be closed."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._start = self._size = os.fstat(memory).st_size
        self._grown_at = 0.0

    @classmethod
    def ask(cls, handle: ProcessHandle) -> Self:
        """Ask a process for its stack; waits for nothing.

        Raises:
            NoStack: It cannot answer; says why.
        """
        pid = handle.identity.pid
        try:
            if processes.is_stopped(pid):
                why = "stands still, stopped by SIGSTOP or a debugger, and cannot answer"
                return cls._refused(pid, f"{why}; `kill -CONT {pid}` lets it go on")
            memory = _open_memory(pid)
            if memory is None:
                why = "it has become another program (exec), its body has closed all descriptors"
                return cls._refused(pid, f"shows no stack: {why}, or an older bgsupervisor started it")
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, memory)
                question = cls(memory)
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
        return self.text() if size > self._start and now - self._grown_at >= QUIET_S else None

    def text(self) -> str:
        """Return what has been answered so far, perhaps nothing."""
        size = os.fstat(self._memory).st_size
        return os.pread(self._memory, max(0, size - self._start), self._start).decode(errors="replace")

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._memory)


def stack_of(handle: ProcessHandle, *, timeout_s: float, clock: Clock) -> str:
    """Return the Python stacks of all threads of a process, which goes on meanwhile.

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
            clock.sleep(LOOK_S)
    raise NoStack(
        f"PID {pid} has not answered within {timeout_s:g} s: it hangs in the kernel (disk sleep), or its body has "
        "taken SIGURG for itself",
        pid=pid,
    )


def _open_memory(pid: int) -> int | None:
    """Open the memory of another process, None if it has none. Raises OSError if this user may not look."""
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in itertools.islice(entries, DESCRIPTORS_MAX):
            if _is_memory(entry.path):
                found = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                if not _is_memory(f"/proc/self/fd/{found}"):  # the body has closed it, and opened something else
                    os.close(found)
                    return None
                if os.fstat(found).st_size > MEMORY_MAX_BYTES:
                    os.ftruncate(found, 0)
                return found
    return None


def _is_memory(path: str) -> bool:
    try:
        return str(Path(path).readlink()) == f"/memfd:{NAME} (deleted)"
    except FileNotFoundError:
        return False


def _whose(pid: int) -> str:
    owner = "another user"
    with contextlib.suppress(OSError):
        owner = f"user {user_name(Path(f'/proc/{pid}').stat().st_uid)}"
    return f"PID {pid} belongs to {owner}, and this is user {user_name(os.geteuid())}; ask as that user, or as root"
