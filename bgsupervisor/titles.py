"""Titles of our processes in `ps` and `top`. Without the package setproctitle, the extra `titles`, nothing changes."""

from __future__ import annotations

from bgsupervisor.cleaning import clean

try:
    from setproctitle import setproctitle as _set
except ImportError:

    def _set(title: str) -> None:
        del title


__all__ = ["IDLE", "set_title", "task_title"]

IDLE = "idle child"


def set_title(title: str) -> None:
    """Give this process a title, cleaned, after "bgsupervisor: ". Its environment in the process table goes."""
    _set(f"bgsupervisor: {clean(title)}")


def task_title(id: int, name: str) -> str:
    """Return the title of a child that runs a task: its number and its class, but neither data nor key.

    Every user of the machine can read it.
    """
    return f"task {id} {name.rpartition(':')[2]}"
