"""Files of this user that no other user can plant or redirect; knows no task.

Modes are set whatever the umask, no link is followed, and what belongs to another user is refused. The module can be
imported on every system; what only Linux has is loaded when used.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from bgsupervisor.errors import AccessError
from bgsupervisor.system.users import OTHERS_WRITE, own_user, user_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "NotOwnFile",
    "access_error",
    "inode_of",
    "is_another",
    "open_dir",
    "open_own",
    "open_own_dir",
    "read_own",
    "replace_own",
]


class NotOwnFile(PermissionError):
    """A file of the state directory is a link, no plain file, or another user's."""

    def __init__(self, why: str, path: Path | str) -> None:
        super().__init__(errno.EPERM, why, str(path))


def open_dir(path: Path) -> int:
    """Return a descriptor of a folder, which the caller closes; no started program inherits it.

    Raises:
        OSError: The folder is missing, not a folder or not readable.
    """
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def open_own_dir(path: Path) -> int:
    """Return a descriptor of a folder of this user that no other user may write; as `open_dir`.

    Raises:
        OSError: It is another user's, or others may write there; and as `open_dir`.
    """
    fd = open_dir(path)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
        os.close(fd)
        raise PermissionError(errno.EPERM, "another user owns it or may write there", str(path))
    return fd


def open_own(path: Path | str, flags: int, mode: int, *, dir_fd: int | None = None) -> int:
    """Open a plain file of this user and give it *mode*, whatever the umask; return the descriptor.

    With O_CREAT in *flags* it is made where it is missing. A link is not followed and a pipe not waited for, and no
    started program inherits the descriptor. A relative *path* starts from the folder *dir_fd*.

    Raises:
        NotOwnFile: It is a link, no plain file, or another user's.
        OSError: It cannot be opened.
    """
    guards = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"))
    try:
        fd = os.open(path, flags | guards, mode, dir_fd=dir_fd)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotOwnFile("it is a link", path) from error
        raise
    try:
        _make_own(fd, path, mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make_own(fd: int, path: Path | str, mode: int) -> None:
    """Give an open file its mode; refuse one that another user may have made."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise NotOwnFile("it is no plain file", path)
    if not hasattr(os, "geteuid"):
        return  # Windows has neither users by number nor modes
    if found.st_uid != os.geteuid():
        raise NotOwnFile(f"it belongs to user {user_name(found.st_uid)}", path)
    os.set_blocking(fd, True)
    if stat.S_IMODE(found.st_mode) != mode:
        os.fchmod(fd, mode)


def read_own(path: Path | str, mode: int, *, dir_fd: int | None = None) -> bytes:
    """Return what is in a file that only this user has written; it gets *mode*, as by `open_own`.

    Raises:
        OSError: As `open_own`.
    """
    with os.fdopen(open_own(path, os.O_RDONLY, mode, dir_fd=dir_fd), "rb") as file:
        return file.read()


def replace_own(path: Path, content: bytes, mode: int) -> None:
    """Write a file in one step, with *mode* whatever the umask, in the place of what stands under its name.

    Raises:
        OSError: The folder is not writable, or the disk is full; what stood there is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    binary = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
    try:
        fd = open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | binary, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def is_another(path: Path, inode: int | None) -> bool:
    """Return whether another file than the one with *inode* stands under *path*; False where none can be seen."""
    found = inode_of(path)
    return found is not None and found != inode


def inode_of(path: Path) -> int | None:
    """Return the number of the file under *path*, or None where none can be seen."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


_NO_LOCKS = "the file system there has no locks; name a state_dir on a local one"
_HINTS: Mapping[int | None, str] = {
    errno.ENOSPC: "free some space there",
    errno.ENOLCK: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
}
"""The remedy of an error, whatever was tried; flock(2) lists ENOLCK, and file systems without locks EOPNOTSUPP."""


def access_error(path: Path, right: str, error: OSError, hint: str) -> AccessError:
    """Return the error of this process's user failing to *right* ("read", "write", "create") *path*.

    *hint* is the remedy, where the error alone does not name one.
    """
    user = own_user()
    if isinstance(error, NotOwnFile):
        hint = f"remove it, or give it to user {user}"
    message = f"user {user} cannot {right} {path}: {error.strerror}; {_HINTS.get(error.errno, hint)}"
    return AccessError(message, path=str(path), user=user, right=right)
