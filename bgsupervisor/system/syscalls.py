"""The system calls that Python lacks, each one thin function; knows no tasks, tables or policies.

Importable everywhere; ctypes is loaded at the first call, and a call on another system raises `UnsupportedSystem`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
import sys
from typing import TYPE_CHECKING

from bgsupervisor.errors import UnsupportedSystem

if TYPE_CHECKING:
    import ctypes
    from pathlib import Path
    from typing import Any

__all__ = ["FileWatch", "die_with_parent", "is_child_subreaper", "pidfd_exit", "punch_hole", "set_child_subreaper"]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

IN_MODIFY = 0x002
IN_ATTRIB = 0x004
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800

# struct pidfd_info in its first published size: mask and cgroupid (u64), eleven u32, exit_code (s32).
PIDFD_INFO = struct.Struct("=QQ11Ii")
PIDFD_GET_INFO = 3 << 30 | PIDFD_INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)
PIDFD_INFO_EXIT = 1 << 3


def set_child_subreaper() -> None:
    """Make this process the parent of every orphan among its descendants.

    Not inherited by children, kept over exec.

    Raises:
        UnsupportedSystem: This is not Linux.
        OSError: The kernel refuses (none since 3.4 does).
    """
    _checked(_libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def die_with_parent(number: int) -> None:
    """Make the kernel send signal *number* to this process when the thread that started it has ended; 0: none.

    Kept over exec, not inherited by children.

    Raises:
        UnsupportedSystem: This is not Linux.
    """
    _checked(_libc().prctl(PR_SET_PDEATHSIG, number, 0, 0, 0))


def is_child_subreaper() -> bool:
    """Return whether this process is a child subreaper."""
    import ctypes  # noqa: PLC0415 - costs milliseconds that `ps` need not pay

    answer = ctypes.c_int()
    _checked(_libc().prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0))
    return bool(answer.value)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the blocks of a range of a file back to the file system; its size stays.

    Args:
        fd: Open for writing.
        offset: Where the range begins, in bytes; only whole blocks are freed.
        length: Bytes, above 0.

    Returns:
        False if the file system cannot do it; the file is then unchanged.

    Raises:
        OSError: Anything else, for example a descriptor that is not writable.
    """
    import ctypes  # noqa: PLC0415 - costs milliseconds that `ps` need not pay

    libc = _libc()
    # fallocate64 takes 64-bit offsets everywhere; a C library without it has them in fallocate.
    fallocate = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    while True:
        try:
            _checked(fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)))
        except InterruptedError:
            continue  # ctypes does not repeat a call that a signal cut short
        except OSError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.ENOSYS}:
                return False
            raise
        return True


class FileWatch:
    """Becomes readable when a file was written, moved, deleted or changed in its attributes (inotify).

    Args:
        path: The file; it must exist.

    Raises:
        OSError: The file is missing, or the user's limit of inotify watches is reached.
    """

    def __init__(self, path: Path | str) -> None:
        libc = _libc()
        self._fd = _checked(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        mask = IN_MODIFY | IN_MOVE_SELF | IN_DELETE_SELF | IN_ATTRIB
        try:
            _checked(libc.inotify_add_watch(self._fd, os.fsencode(path), mask), os.fspath(path))
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to poll; -1 once closed."""
        return self._fd

    def drain(self) -> bool:
        """Read all that has come, without blocking; return whether there was anything."""
        came = False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 65536):
                came = True
        return came

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def pidfd_exit(pidfd: int) -> int | None:
    """Return the raw wait status of a process that its parent has already reaped.

    Args:
        pidfd: A pidfd that was opened before the process was reaped.

    Returns:
        The status as wait(2) encodes it, or None: not reaped yet, or a kernel before 6.15.
    """
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return None
    request = bytearray(PIDFD_INFO.pack(PIDFD_INFO_EXIT, *([0] * 13)))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, request)
    except OSError:
        return None  # an older kernel: no such ioctl, or no answer once reaped
    mask, *_, status = PIDFD_INFO.unpack(request)
    return int(status) if mask & PIDFD_INFO_EXIT else None


@functools.cache
def _libc() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise UnsupportedSystem(f"this needs system calls of Linux, and here is {sys.platform}")
    import ctypes  # noqa: PLC0415 - costs milliseconds that `ps` need not pay

    return ctypes.CDLL(None, use_errno=True)


def _checked(answer: Any, path: str | None = None) -> int:  # noqa: ANN401 - ctypes functions answer Any
    if answer >= 0:
        return int(answer)
    import ctypes  # noqa: PLC0415 - the callers have loaded it already

    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)
