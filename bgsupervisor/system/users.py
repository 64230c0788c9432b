"""Users and groups of this machine, as messages name them."""

from __future__ import annotations

import os
import stat

__all__ = ["group_name", "own_user", "user_name"]

AS_ROOT = (
    "this is root, so every task runs as root; supervise as a user of its own that owns database and state directory: "
    "`bgsupervisor systemd --install --user NAME`, or its own crontab"
)
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
"""The rights by which users other than the owner may write."""


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
