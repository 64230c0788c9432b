"""The right to be the one supervisor of a state directory; knows no tables and no messages."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from bgsupervisor.clock import Clock, SystemClock
from bgsupervisor.system.files import access_error, open_own

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Lock"]

LOCK_MODE = 0o640
LOCK_TRIES = 5
"""Limit of the tries of `Lock.acquire`, which starts again if the file is replaced while it is being locked."""
LOCK_READ_BYTES = 16384
TAKE_OVER_POLL_S = 0.05
LOOP_STUCK_S = 60.0
"""Age of the lock file, in seconds, from which its supervisor's loop counts as stuck."""


class Lock:
    """The right to be the one supervisor of a state directory; dies with its process.

    The kernel keeps it for an open descriptor that no started program inherits. A process that is forked meanwhile
    shares it.

    Args:
        path: The lock file, made 0640 where it is missing.
        clock: Tells the age of the file.
        program: The installation of this process, noted for others to compare.

    Attributes:
        unattended_since: When the previous holder last touched the file, as `acquire` found it; monotonic.
    """

    def __init__(self, path: Path, clock: Clock | None = None, *, program: str = "") -> None:
        self._path = path
        self._clock = clock or SystemClock()
        self._program = program
        self._fd: int | None = None
        self.unattended_since = self._clock.monotonic()

    def acquire(self) -> bool:
        """Take the lock and note this process in the file; False where another process has it. Never blocks.

        Raises:
            AccessError: The file cannot be opened or locked.
        """
        for _ in range(LOCK_TRIES):
            if self._fd is None:
                self._fd = self._open_locked()
            if self._fd is None:
                return False
            if self.is_intact():
                self.unattended_since = self._clock.monotonic() - (self.age_s() or 0.0)
                self._note_holder(self._fd)
                return True
            self.close()
        return False

    def take_over(self, *, wait_s: float) -> bool:
        """Take the lock from a living holder: replace the locked file, so that the holder leaves.

        The holder sees that its file was replaced, and leaves its tasks alone. Returns False if a third process was
        faster, and this process must leave.

        Raises:
            AccessError: The folder is not writable.

        Blocks until the holder has left, at most *wait_s*: one that hangs is not waited for.
        """
        import fcntl  # noqa: PLC0415 - absent on Windows, where this module must import

        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            old_fd = open_own(self._path, os.O_RDWR, LOCK_MODE)
            try:
                temporary.unlink(missing_ok=True)
                self._fd = open_own(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, LOCK_MODE)
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._note_holder(self._fd)
                temporary.replace(self._path)
                self._wait_for(old_fd, wait_s)
            finally:
                os.close(old_fd)
        except OSError as error:
            raise access_error(self._path, "write", error, "supervise as the folder's owner") from error
        if self.is_intact():
            return True
        self.close()
        return False

    def _wait_for(self, fd: int, wait_s: float) -> None:
        import fcntl  # noqa: PLC0415 - absent on Windows, where this module must import

        deadline = self._clock.monotonic() + wait_s
        while self._clock.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            self._clock.sleep(TAKE_OVER_POLL_S)

    def _open_locked(self) -> int | None:
        """Return a descriptor that holds the lock, None where another process has it."""
        import fcntl  # noqa: PLC0415 - absent on Windows, where this module must import

        fd = None
        try:
            fd = open_own(self._path, os.O_RDWR | os.O_CREAT, LOCK_MODE)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if fd is not None:
                os.close(fd)
            if isinstance(error, BlockingIOError):
                return None
            raise access_error(self._path, "write", error, "supervise as the folder's owner") from error
        return fd

    def _note_holder(self, fd: int) -> None:
        with suppress(OSError):  # a full disk must not keep anybody from supervising
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "program": self._program}).encode() + b"\n", 0)

    def touch(self) -> None:
        """Set the file's time to now, the sign that the holder's loop turns; nothing where the lock is not held.

        Raises:
            OSError: The file system refuses (read-only, gone).
        """
        if self._fd is not None:
            os.utime(self._fd)

    def is_intact(self) -> bool:
        """Return whether the lock is held and its path still leads to the locked file.

        A path that cannot be looked at (rights, I/O) counts as intact: nobody has seen another file there.
        """
        if self._fd is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._fd), self._path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def age_s(self) -> float | None:
        """Return how many seconds ago the file was touched, by whomever; None where there is none.

        Wall clock, as file times are: at least 0, and wrong for a while after the clock was set.
        """
        try:
            touched_at = self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        return max(0.0, self._clock.now().timestamp() - touched_at)

    def holder(self) -> int | None:
        """Return the PID that the last holder noted, None where none is readable.

        For people to read: it is the present holder's only while `acquire` returns False, and it may be reused.
        """
        pid = self._noted("pid")
        return pid if isinstance(pid, int) else None

    def is_of_another_program(self) -> bool:
        """Return whether the last holder noted another program than this process's; False where it noted none."""
        program = self._noted("program")
        return isinstance(program, str) and bool(program) and program != self._program

    def _noted(self, fact: str) -> object:
        try:
            with self._path.open("rb") as file:
                return json.loads(file.read(LOCK_READ_BYTES))[fact]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def close(self) -> None:
        """Give the lock back; the file stays. Nothing where it is not held."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
