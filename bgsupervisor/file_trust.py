"""Whether another user may have written a file, or may put code beside it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bgsupervisor.system.users import own_user, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Danger", "dangers", "distrust"]


def distrust(file: Path, *, any_owner: bool = False) -> str | None:
    """Return why a configuration that was found is refused, None if it is trusted; see `dangers`.

    Args:
        file: The configuration, or a file that it names.
        any_owner: Whether another user's file is trusted, unless every user may have put it there.
    """
    if any_owner and hasattr(os, "geteuid"):
        with suppress(OSError):
            if {file.lstat().st_uid, file.stat().st_uid} <= {0, os.geteuid()}:
                return None
    return next((danger.detail for danger in dangers(file) if danger.is_of_all or not any_owner), None)


class Danger(NamedTuple):
    """A way for another user to have written a file: every user may, or a folder or link belongs to one."""

    is_of_all: bool
    detail: str


def dangers(file: Path) -> Iterator[Danger]:
    """Yield the ways in which a user other than this one and root may have written *file*, or put code beside it.

    Examines the file, all folders above it, and the targets of links among them; a missing file is judged by its
    folders. A group's right to write counts as the owner's, because the owner chose the group. In a sticky folder,
    such as /tmp, other users cannot replace a file, but they can put code beside it.
    """
    if not hasattr(os, "geteuid"):
        return  # Windows has neither users by number nor modes
    mine = {0, os.geteuid()}
    ways = (file, Path(os.path.realpath(file)), Path(os.path.realpath(file.parent)) / file.name)
    beside = {ways[0].parent, ways[2].parent}
    for path in dict.fromkeys(one for way in ways for one in (way, *way.parents)):
        try:
            link, found = path.lstat(), path.stat()
        except OSError:
            continue  # reading it reports that it is missing or closed
        for uid in {link.st_uid, found.st_uid} - mine:
            yield Danger(False, f"{path} belongs to user {user_name(uid)}, and this is user {own_user()}")
        is_kept = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and path not in beside
        if found.st_mode & stat.S_IWOTH and not is_kept:
            yield Danger(True, f"every user may write {path}")
