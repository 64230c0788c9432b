"""The state directory: its files, rights, sockets and the supervisor's lock; knows no tables and no messages.

Sockets are addressed relative to an open directory descriptor, because an address holds 107 bytes only and state
directories lie deeper. The module can be imported on every system; what only Linux has is looked for when used.

Every file here is made and opened by `open_own` and `replace_own`, and every socket by `bind` and `connect`: they set
modes whatever the umask, follow no link, and refuse what belongs to another user.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bgsupervisor.clock import Clock, SystemClock
from bgsupervisor.errors import AccessError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "Lock",
    "NotOwnFile",
    "StateDir",
    "StopMark",
    "access_error",
    "bind",
    "check_peer",
    "connect",
    "group_name",
    "inode_of",
    "is_another",
    "open_dir",
    "open_own",
    "open_own_dir",
    "own_user",
    "read_own",
    "replace_own",
    "send_datagram",
    "user_name",
]

DIRECTORY_MODE = 0o750
LOCK_MODE = 0o640
MARK_MODE = 0o640
AS_ROOT = (
    "this is root, so every task runs as root; supervise as a user of its own that owns database and state directory: "
    "`bgsupervisor systemd --install --user NAME`, or its own crontab"
)
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
"""The rights by which users other than the owner may write."""
_CREDENTIALS = struct.Struct("3i")
"""PID, user and group of a peer."""
LOCK_TRIES = 5
"""How often `Lock.acquire` starts again because the file was replaced while it was being locked."""
LOCK_READ_BYTES = 16384
TAKE_OVER_LOOK_S = 0.05
LISTEN_BACKLOG = 1024
BELL_SOCKET = "bell.sock"
BELLS_AT_ONCE = 50
"""So many keys are sent in one datagram; they stay far below what a socket takes."""
"""More than all children of the largest configuration, so that none is refused when all dial at once."""
SHORT_ADDRESS_BYTES = 100
"""Longer addresses go through the directory descriptor; systems allow 104 to 108 bytes."""


class NotOwnFile(PermissionError):
    """A file of the state directory is a link, no plain file, or another user's."""

    def __init__(self, why: str, path: Path | str) -> None:
        super().__init__(errno.EPERM, why, str(path))


@dataclass(frozen=True, slots=True)
class StateDir:
    """The folder where a supervisor and its children meet, and the names of what is in it."""

    path: Path

    @property
    def lock(self) -> Path:
        """Return the file that the supervisor locks."""
        return self.path / "supervisor.lock"

    @property
    def control(self) -> Path:
        """Return the socket that children, nursery and command line dial."""
        return self.path / "control.sock"

    @property
    def wake(self) -> Path:
        """Return the datagram socket that is rung after a commit."""
        return self.path / "wake.sock"

    @property
    def logs(self) -> Path:
        """Return the folder of the logs."""
        return self.path / "logs"

    @property
    def own_log(self) -> Path:
        """Return the log of the supervisor and its nurseries."""
        return self.logs / "supervisor.log"

    @property
    def stop_mark(self) -> Path:
        """Return the file that says that nobody is to supervise; see `StopMark`."""
        return self.path / "stopped"

    @property
    def stamp(self) -> Path:
        """Return the file with the stamp of the code that was last loaded."""
        return self.path / "code.stamp"

    def nursery_path(self, pid: int, ticks: int) -> Path:
        """Return the file by which a new supervisor learns of a living nursery."""
        return self.path / f"nursery-{pid}-{ticks}"

    def create(self) -> None:
        """Make the folder and its logs where they are missing, 0750 whatever the umask; a setgid bit is kept.

        Raises:
            AccessError: A folder cannot be made; its parent must exist.
        """
        for folder in (self.path, self.logs):
            try:
                folder.mkdir(DIRECTORY_MODE)
                _set_mode(folder)
            except FileExistsError as error:
                if not folder.is_dir():
                    raise access_error(folder, "create", error, "move the file of that name away") from error
            except OSError as error:
                hint = f"the folder {folder.parent}, where database and state are to be, must exist and be writable"
                raise access_error(folder, "create", error, hint) from error

    def check_owner(self, act: str = "supervise") -> None:
        """Refuse every user but the folder's owner, root too: files of two owners would lock both out.

        *act* is the verb for what was refused.

        Raises:
            AccessError: Another user owns the folder, or it is not there.
        """
        if not hasattr(os, "geteuid"):
            return  # Windows, which has no numbers of users
        try:
            owner_uid = self.path.stat().st_uid
        except OSError as error:
            raise access_error(self.path, "read", error, "create it, or correct state_dir") from error
        if owner_uid != os.geteuid():
            user, owner = user_name(os.geteuid()), user_name(owner_uid)
            raise AccessError(
                f"{self.path} belongs to user {owner}, but this is user {user}; {act} as {owner}, "
                f"or name another state_dir",
                path=str(self.path),
                user=user,
                right="write",
            )

    def check_private(self) -> None:
        """Refuse a folder in which another user could plant files; call `check_owner` first.

        Raises:
            AccessError: The folder, or that of the logs, is another user's, or others may write there.
        """
        for danger in self.dangers():
            raise AccessError(f"cannot supervise: {danger}", path=str(self.path), user=own_user(), right="write")

    def dangers(self) -> Iterator[str]:
        """Yield a sentence for each way by which another user could plant files here, with what to do about it.

        Raises:
            OSError: A folder cannot be looked at.
        """
        if not hasattr(os, "geteuid"):
            return  # Windows has neither users by number nor modes
        user = user_name(os.geteuid())
        for folder in (self.path, self.logs):
            if not folder.exists():
                continue
            link, found = folder.lstat(), folder.stat()
            if stat.S_ISLNK(link.st_mode) and link.st_uid not in {0, os.geteuid()}:
                yield f"{folder} is a link that user {user_name(link.st_uid)} has made; remove it"
            elif found.st_uid != os.geteuid():
                owner = user_name(found.st_uid)
                yield f"{folder} belongs to user {owner} and not to user {user}; give it to {user}, or move it away"
            elif found.st_mode & OTHERS_WRITE:
                others = "every user" if found.st_mode & stat.S_IWOTH else f"group {group_name(found.st_gid)}"
                mode = stat.S_IMODE(found.st_mode)
                yield (
                    f"{others} may write {folder} (mode {mode:04o}), and so could have code run as user {user}; "
                    f"chmod {mode & ~OTHERS_WRITE:04o} {folder}"
                )


@dataclass(frozen=True, slots=True)
class StopMark:
    """Somebody wants no supervisor here: while it stands, a living one goes and `run` leaves at once.

    Attributes:
        mode: What becomes of running tasks: "leave" them running, "drain" (wait for them) or "kill".
        by: Who asked.
        at: When, as ISO text in UTC.
    """

    mode: str
    by: str
    at: str

    @classmethod
    def read(cls, path: Path) -> StopMark | None:
        """Return the mark that stands, None where there is none; an unreadable one counts as "leave".

        Whoever may not enter the folder, and so may not supervise either, sees none.
        """
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                return cls(mode="leave", by="somebody", at="an unknown time")
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(mode=str(found["mode"]), by=str(found["by"]), at=str(found["at"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError):
            if not os.access(path.parent, os.X_OK):
                return None
            return cls(mode="leave", by="somebody", at="an unknown time")

    def write(self, path: Path) -> None:
        """Set the mark, in one step.

        Raises:
            AccessError: The folder cannot be written.
        """
        text = json.dumps({"mode": self.mode, "by": self.by, "at": self.at}) + "\n"
        try:
            replace_own(path, text.encode(), MARK_MODE)
        except OSError as error:
            raise access_error(path, "write", error, "stop as the folder's owner") from error


STUCK_S = 60.0
"""A supervisor whose lock file was not touched for so long does not turn its loop any more."""


class Lock:
    """The right to be the one supervisor of a state directory; dies with its process.

    The kernel holds it for an open descriptor that no started program inherits. A process that is forked while it
    is held shares it.

    Args:
        path: The lock file, made 0640 where it is missing.
        clock: Tells the age of the file.
        program: Which installation this process is of, noted for others to compare.

    Attributes:
        unattended_since: When the holder before had touched it last, as `acquire` found it; monotonic.
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
        """Take the lock from a living holder: put another file in the place of the locked one, and have it leave.

        The holder sees that its file was replaced, and leaves its tasks alone. Returns False where a third one was
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
            self._clock.sleep(TAKE_OVER_LOOK_S)

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
        """Tell whether the lock is held and its path still leads to the locked file.

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
        """Whether the last holder noted another program than this process's; False where it noted none."""
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


def open_dir(path: Path) -> int:
    """Return a descriptor of a folder, which the caller closes; no started program inherits it.

    Raises:
        OSError: The folder is missing, not a folder or not readable.
    """
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _set_mode(folder: Path) -> None:
    """Give a new folder its mode; one that was replaced by a link meanwhile is refused."""
    if not hasattr(os, "geteuid"):
        return  # Windows has no modes
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, DIRECTORY_MODE | (os.fstat(fd).st_mode & stat.S_ISGID))
    finally:
        os.close(fd)


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


def bind(dir_fd: int, name: str, kind: socket.SocketKind, mode: int) -> socket.socket:
    """Return a non-blocking Unix socket that answers as *name* in the folder *dir_fd*; streams listen.

    It is made under a temporary name and then renamed, so that nobody meets it half made, and a socket of that
    name that was left behind is replaced in one step. *mode* are its rights whatever the umask. Linux only.

    Raises:
        OSError: The folder is not writable, is gone, or /proc is not mounted.
    """
    temporary = f".{name}.{os.getpid()}"
    with suppress(FileNotFoundError):
        os.unlink(temporary, dir_fd=dir_fd)
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        bound.settimeout(0)
        bound.bind(_address(dir_fd, temporary))
        os.chmod(temporary, mode, dir_fd=dir_fd)
        if kind == socket.SOCK_STREAM:
            bound.listen(LISTEN_BACKLOG)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        bound.close()
        with suppress(OSError):
            os.unlink(temporary, dir_fd=dir_fd)
        raise
    return bound


def connect(folder: int | Path, name: str, kind: socket.SocketKind) -> socket.socket:
    """Return a non-blocking Unix socket connected to *name* in *folder*, a path or a descriptor. Never blocks.

    Raises:
        FileNotFoundError: There is no such socket.
        ConnectionRefusedError: Nobody listens there any more.
        BlockingIOError: Its queue is full; try again later.
        PermissionError: Another user's process listens there.
        OSError: Anything else, such as a folder that this user may not enter.
    """
    dialled = socket.socket(socket.AF_UNIX, kind)
    try:
        dialled.settimeout(0)
        with _reachable(folder, name) as address:
            dialled.connect(address)
        if kind == socket.SOCK_STREAM:
            check_peer(dialled)
    except BaseException:
        dialled.close()
        raise
    return dialled


def check_peer(connection: socket.socket) -> None:
    """Refuse a Unix stream whose other end is another user's; nothing where the system knows no credentials.

    Of a listening socket the credentials are those of the process that called listen() (SO_PEERCRED, unix(7)).

    Raises:
        PermissionError: The other end is another user's process.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    answer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(answer)
    if uid != os.geteuid():
        raise PermissionError(errno.EPERM, "the process at the other end is another user's")


def is_another(path: Path, inode: int | None) -> bool:
    """Tell whether another file than the one with *inode* stands under *path*; False where none can be seen."""
    found = inode_of(path)
    return found is not None and found != inode


def inode_of(path: Path) -> int | None:
    """Return the number of the file under *path*, or None where none can be seen."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def send_datagram(path: Path, payload: bytes = b"") -> bool:
    """Send *payload* to the datagram socket *path*; True where somebody listens. Never blocks, never raises.

    False also where the listener's queue is full (it has been rung already), where this user may not ring, and on
    systems without Unix sockets: a bell may get lost, so nobody may rely on it alone.
    """
    if not hasattr(socket, "AF_UNIX"):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell, _reachable(path.parent, path.name) as address:
            bell.settimeout(0)
            bell.sendto(payload, address)
    except OSError:
        return False
    return True


def ring_board(folder: Path, keys: Sequence[str]) -> bool:
    """Ring bells at the board of a state directory; False where none listens. Never blocks, never raises."""
    some = [keys[first : first + BELLS_AT_ONCE] for first in range(0, len(keys), BELLS_AT_ONCE)]
    return all(send_datagram(folder / BELL_SOCKET, json.dumps(list(these)).encode()) for these in some)


def leave_board(folder: Path, wait: str) -> bool:
    """Have a wait at the board end that nobody waits for any more; as `ring_board`."""
    return send_datagram(folder / BELL_SOCKET, json.dumps(wait).encode())


def _address(dir_fd: int, name: str) -> str:
    return f"/proc/self/fd/{dir_fd}/{name}"


@contextmanager
def _reachable(folder: int | Path, name: str) -> Iterator[str]:
    """Yield an address of *name* in *folder* that is short enough for a socket."""
    if isinstance(folder, int):
        yield _address(folder, name)
    elif len(os.fsencode(folder / name)) <= SHORT_ADDRESS_BYTES:
        yield str(folder / name)
    else:
        dir_fd = open_dir(folder)
        try:
            yield _address(dir_fd, name)
        finally:
            os.close(dir_fd)


def user_name(uid: int) -> str:
    """Return the name of a user, the number as text where there is no name."""
    import pwd  # noqa: PLC0415 - absent on Windows, where this module must import

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Return the name of a group, the number as text where there is no name."""
    import grp  # noqa: PLC0415 - absent on Windows, where this module must import

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def own_user() -> str:
    """Return the name of this process's user."""
    if hasattr(os, "geteuid"):
        return user_name(os.geteuid())
    try:
        return os.getlogin()
    except OSError:  # a service has no login
        return "unknown"


_NO_LOCKS = "the file system there has no locks; name a state_dir on a local one"
_HINTS: Mapping[int | None, str] = {
    errno.ENOSPC: "free some space there",
    errno.ENOLCK: _NO_LOCKS,
    errno.EOPNOTSUPP: _NO_LOCKS,
}
"""What to do about an error, whatever was tried; flock(2) lists ENOLCK, and file systems without locks EOPNOTSUPP."""


def access_error(path: Path, right: str, error: OSError, hint: str) -> AccessError:
    """Return the error of this process's user failing to *right* ("read", "write", "create") *path*.

    *hint* says what to do about it, where the error alone does not.
    """
    user = own_user()
    if isinstance(error, NotOwnFile):
        hint = f"remove it, or give it to user {user}"
    message = f"user {user} cannot {right} {path}: {error.strerror}; {_HINTS.get(error.errno, hint)}"
    return AccessError(message, path=str(path), user=user, right=right)
