"""The state directory: names and rights of its files, and the mark of a stop; knows no tables and no messages.

Every file here is made and opened by `open_own` and `replace_own`, and every socket by `bind` and `connect`: they set
modes whatever the umask, follow no link, and refuse what belongs to another user.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bgsupervisor.errors import AccessError
from bgsupervisor.system.files import access_error, replace_own
from bgsupervisor.system.users import OTHERS_WRITE, group_name, own_user, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "StateDir",
    "StopMark",
]

DIRECTORY_MODE = 0o750
MARK_MODE = 0o640


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
        """Return the socket that children, fork server and command line dial."""
        return self.path / "control.sock"

    @property
    def wake(self) -> Path:
        """Return the datagram socket that is notified after a commit."""
        return self.path / "wake.sock"

    @property
    def logs(self) -> Path:
        """Return the folder of the logs."""
        return self.path / "logs"

    @property
    def own_log(self) -> Path:
        """Return the log of the supervisor and its fork servers."""
        return self.logs / "supervisor.log"

    @property
    def stop_mark(self) -> Path:
        """Return the mark that forbids supervising; see `StopMark`."""
        return self.path / "stopped"

    @property
    def fingerprint(self) -> Path:
        """Return the file with the fingerprint of the code that was last loaded."""
        return self.path / "code.fingerprint"

    def fork_server_path(self, pid: int, ticks: int) -> Path:
        """Return the file by which a new supervisor learns of a living fork server."""
        return self.path / f"forkserver-{pid}-{ticks}"

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
            OSError: A folder cannot be examined.
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
        mode: What happens to running tasks: "leave" them running, "drain" (wait for them) or "kill".
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


def _set_mode(folder: Path) -> None:
    """Give a new folder its mode; one that was replaced by a link meanwhile is refused."""
    if not hasattr(os, "geteuid"):
        return  # Windows has no modes
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, DIRECTORY_MODE | (os.fstat(fd).st_mode & stat.S_ISGID))
    finally:
        os.close(fd)
