"""Titles of our processes in `ps` and `top`. Without the package setproctitle, the extra `titles`, nothing changes."""

from __future__ import annotations

import contextlib

from bgsupervisor.environment import variable
from bgsupervisor.sanitize import clean

try:
    from setproctitle import setproctitle as _set
except ImportError:

    def _set(title: str) -> None:
        del title


__all__ = ["IDLE", "set_title", "task_title"]

IDLE = "idle child"


_is_set_up = False


def set_title(title: str) -> None:
    """Give this process a title, cleaned, after "bgsupervisor: "; it takes the place of the command line.

    The environment stays in the process table: programs find processes by it. setproctitle asks for SPT_NOENV at its
    first call: https://pypi.org/project/setproctitle/
    """
    global _is_set_up  # noqa: PLW0603 - a process is set up once, and its forks with it
    with contextlib.nullcontext() if _is_set_up else variable("SPT_NOENV", "1"):
        _set(f"bgsupervisor: {clean(title)}")
    _is_set_up = True


def task_title(id: int, name: str) -> str:
    """Return the title of a child that runs a task: its number and its class, but neither data nor key.

    Every user of the machine can read it.
    """
    return f"task {id} {name.rpartition(':')[2]}"
