"""Log files of tasks: names, limits, reading; knows no tasks, only their numbers.

A log has one writer that appends. It is bounded by giving back the blocks of its middle while the writer continues, so
that the first and the last lines remain and no position in the file ever moves.
"""

from __future__ import annotations

import codecs
import errno
import os
import select
import stat
import sys
from typing import TYPE_CHECKING

from bgsupervisor.sizes import size
from bgsupervisor.system import descriptors, syscalls
from bgsupervisor.system.files import open_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bgsupervisor.clock import Clock

__all__ = [
    "Reader",
    "bound",
    "find",
    "follow",
    "is_own",
    "leave_dead_output",
    "open_for_append",
    "process_log",
    "read",
    "tail",
    "task_log",
]

BLOCK_BYTES = 4096
READ_CHUNK_BYTES = 65536
FOLLOW_POLL_S = 0.1
LOG_MODE = 0o640
_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Windows knows no O_CLOEXEC, and would translate line ends without O_BINARY."""


def process_log(logs: Path, pid: int, start_ticks: int) -> Path:
    """Return the log of a process that has not ended a task yet."""
    return logs / f"process-{pid}-{start_ticks}.log"


def task_log(logs: Path, id: int, attempt: int) -> Path:
    """Return the log of an attempt that has ended."""
    return logs / f"task-{id}-{attempt}.log"


def find(logs: Path, *, id: int, attempt: int, pid: int | None, start_ticks: int | None) -> Path | None:
    """Return the log of an attempt, ended or running, None if there is none.

    Raises:
        PermissionError: This user may not enter the folder.
    """
    candidates = [task_log(logs, id, attempt)]
    if pid is not None and start_ticks is not None:
        candidates.append(process_log(logs, pid, start_ticks))
        candidates.append(candidates[0])  # it may have been renamed between the two searches
    return next((path for path in candidates if _is_there(path)), None)


def is_own(path: Path) -> bool:
    """Return whether *path* is a plain file of this user, as its child has made it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()


def open_for_append(path: Path) -> int:
    """Open a log for its writer, creating it readable for owner and group whatever the umask.

    Returns:
        A descriptor; closing it is the caller's.

    Raises:
        OSError: The folder is missing or not writable, the disk is full, or the file is a link or another user's.
    """
    return open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _PLAIN, LOG_MODE)


def leave_dead_output(path: Path) -> bool:
    """Send stdout and stderr to *path* if no process can read them any more; return whether that became of either.

    That is so of a terminal that was closed and of a pipe or socket without a reader: a print would raise OSError, and
    a module that prints would not load. Where *path* cannot be opened they go nowhere. A file or socket of the
    application that has taken the number of a closed stream stays what it is. Costs some microseconds.
    """
    poll = select.poll()
    for number in (1, 2):
        if not descriptors.is_taken(number):
            poll.register(number, 0)
    dead = [number for number, event in poll.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    if not dead:
        return False
    try:
        descriptor = open_for_append(path)
    except OSError:
        descriptor = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for number in dead:
        os.dup2(descriptor, number)
    os.close(descriptor)
    return True


def bound(path_or_fd: Path | int, limit_bytes: int) -> bool:
    """Cut the middle out of a log that takes more room on disk than it may; its writer continues meanwhile.

    The first quarter and the last half of the limit remain. On a file system that cannot free a middle the log is
    cut down to its first quarter instead.

    Args:
        path_or_fd: The log, or a descriptor of it that is open for writing.
        limit_bytes: Room on disk, at least 16 KiB to be of use.

    Returns:
        Whether anything was cut.

    Raises:
        OSError: The log is missing, not writable, a link, or another user's.
    """
    if isinstance(path_or_fd, int):
        return _bound(path_or_fd, limit_bytes)
    fd = open_own(path_or_fd, os.O_WRONLY | _PLAIN, LOG_MODE)
    try:
        return _bound(fd, limit_bytes)
    finally:
        os.close(fd)


def tail(path: Path, lines: int, max_bytes: int = 65536) -> list[str]:
    """Return the last lines of a log, oldest first, without their line ends.

    Args:
        path: The log.
        lines: How many at most.
        max_bytes: Limit of what is read of the file; a line that begins before that is cut.

    Raises:
        OSError: The log is missing or not readable.
    """
    fd = os.open(path, os.O_RDONLY | _PLAIN)
    try:
        kept, position = b"", 0
        for offset, piece in _pieces(fd, max(0, os.fstat(fd).st_size - max_bytes)):
            kept += b"\n" * (kept != b"" and offset > position) + piece  # a line ends where a hole begins
            position = offset + len(piece)
    finally:
        os.close(fd)
    found = kept.decode(errors="replace").split("\n")
    if not found[-1]:
        found.pop()
    return found[-lines:] if lines > 0 else []


def read(path: Path) -> Iterator[str]:
    """Yield a log in chunks, with one line in the place of what was cut out.

    Raises:
        OSError: The log is missing or not readable.
    """
    fd = os.open(path, os.O_RDONLY | _PLAIN)
    try:
        text = _Text()
        yield from text.new(fd)
        yield text.rest()
    finally:
        os.close(fd)


def follow(path_finder: Callable[[], Path | None], ended: Callable[[], bool], clock: Clock) -> Iterator[str]:
    """Yield a log as it grows, from its beginning until its writer has ended and everything was read.

    The file stays open once found, so its renaming loses nothing.

    Args:
        path_finder: Asked again until it gives a path that exists.
        ended: Returns whether nothing more will be written; called before each read of the file.
        clock: Sleeps between reads, FOLLOW_POLL_S each.

    Raises:
        OSError: The log is not readable.
    """
    reader = Reader()
    try:
        while True:
            over = ended()
            yield from reader.new(path_finder)
            if over:
                yield reader.rest()
                return
            clock.sleep(FOLLOW_POLL_S)
    finally:
        reader.close()


class Reader:
    """Read the new part of one log, call by call; the file stays open once found, so its renaming loses nothing."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._text = _Text()

    def new(self, path_finder: Callable[[], Path | None]) -> Iterator[str]:
        """Yield what was written since the last call; *path_finder* is asked until it gives a path that exists.

        Raises:
            OSError: The log is not readable.
        """
        if self._fd is None:
            self._fd = _open_if_there(path_finder())
        if self._fd is not None:
            yield from self._text.new(self._fd)

    def rest(self) -> str:
        """Return what is left of a character that never became whole."""
        return self._text.rest()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class _Text:
    """Turns what is new in a log into text; a character or a line that a cut divides does no harm."""

    def __init__(self) -> None:
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_line_start = True

    def new(self, fd: int) -> Iterator[str]:
        """Yield what the file has beyond what was given already."""
        for offset, piece in _pieces(fd, self._position):
            if offset > self._position:
                yield self._notice(offset - self._position)
            self._position = offset + len(piece)
            yield self._keep(self._decoder.decode(piece))

    def rest(self) -> str:
        """Return what is left of a character that never became whole."""
        return self._decoder.decode(b"", final=True)

    def _notice(self, left_out_bytes: int) -> str:
        begun = self._keep(self._decoder.decode(b"", final=True))
        line_end = "" if self._at_line_start else "\n"
        self._at_line_start = True
        return f"{begun}{line_end}... {size(left_out_bytes)} left out ...\n"

    def _keep(self, text: str) -> str:
        if text:
            self._at_line_start = text.endswith("\n")
        return text


def _bound(fd: int, limit_bytes: int) -> bool:
    state = os.fstat(fd)
    if getattr(state, "st_blocks", -(-state.st_size // 512)) * 512 <= limit_bytes:  # Windows counts none
        return False
    first = limit_bytes // 4 // BLOCK_BYTES * BLOCK_BYTES
    last = (state.st_size - limit_bytes // 2) // BLOCK_BYTES * BLOCK_BYTES
    if last <= first:
        return False
    if not (sys.platform.startswith("linux") and syscalls.punch_hole(fd, first, last - first)):
        os.ftruncate(fd, first)
    return True


def _pieces(fd: int, position: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of all data from a position to what is the end now, without the holes."""
    end = os.fstat(fd).st_size
    while position < end:
        position = _next_data(fd, position)
        until = min(end, _next_hole(fd, position, end)) if position < end else end
        while position < until:
            os.lseek(fd, position, os.SEEK_SET)
            piece = os.read(fd, min(READ_CHUNK_BYTES, until - position))
            if not piece:
                return  # cut short meanwhile
            yield position, piece
            position += len(piece)


def _next_hole(fd: int, position: int, end: int) -> int:
    return os.lseek(fd, position, os.SEEK_HOLE) if hasattr(os, "SEEK_HOLE") else end


def _next_data(fd: int, position: int) -> int:
    if not hasattr(os, "SEEK_DATA"):  # Windows; nothing of ours makes a hole there
        return position
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return os.fstat(fd).st_size  # nothing but a hole up to the end


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _open_if_there(path: Path | None) -> int | None:
    if path is None:
        return None
    try:
        return os.open(path, os.O_RDONLY | _PLAIN)
    except FileNotFoundError:
        return None
