"""What a check reads, and what it finds."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.addresses import is_postgres, sqlite_path
from bgsupervisor.clock import Clock, SystemClock
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.system.oom import INITIAL_PID_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from bgsupervisor.config import Config

__all__ = ["Check", "Finding", "Grade", "Machine", "Result", "Site", "note", "ok", "wrong"]


class Grade(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing that breaks a promise by itself."""
    WRONG = "WRONG"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `bgsupervisor doctor`: the check, how bad it is, and a sentence with what to do."""

    check: str
    grade: Grade
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the checks find the machine; tests name folders of their own.

    Attributes:
        proc: The process table.
        cgroup_root: Where the cgroups are mounted.
        unit_folders: Folders of systemd's units: the system's, and this user's own.
        cron_files: Files, and folders of files, in cron's format with a user.
        crontab: The program that prints a user's crontab.
        initial_pid_namespace: Its inode; a process in another one is in a container.
        sqlite_version: Of the library that this Python uses.
        clock: Tells the time.
    """

    proc: Path = Path("/proc")
    cgroup_root: Path = Path("/sys/fs/cgroup")
    unit_folders: Sequence[Path] = field(
        default_factory=lambda: (Path("/etc/systemd/system"), Path("~/.config/systemd/user").expanduser())
    )
    cron_files: Sequence[Path] = (Path("/etc/crontab"), Path("/etc/cron.d"))
    crontab: str = "crontab"
    initial_pid_namespace: int = INITIAL_PID_NAMESPACE
    sqlite_version: tuple[int, ...] = sqlite3.sqlite_version_info
    clock: Clock = field(default_factory=SystemClock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One installation: its configuration, the machine under it, and what its rows record.

    The doctor needs no snapshot of tasks, as listings do; it also examines a machine without a database.

    Attributes:
        config: The configuration.
        machine: The machine.
        alive: Whether a supervisor lives.
        seen_at: When one was last seen; None if there never was one.
        moments: Times in rows, none of which can lie in the future, and what they are.
    """

    config: Config
    machine: Machine
    alive: bool = False
    seen_at: datetime | None = None
    moments: Sequence[tuple[str, datetime]] = ()

    @property
    def database(self) -> Path | None:
        """Return the database file; None where a server keeps it."""
        return None if is_postgres(self.config.database) else sqlite_path(self.config.database)

    @property
    def places(self) -> list[tuple[str, Path]]:
        """Return what of the installation lies on this machine, and where."""
        ours = [("the state directory", self.config.state_dir)]
        return ours if self.database is None else [("the database", self.database), *ours]

    @property
    def state_dir(self) -> StateDir:
        """Return the state directory."""
        return StateDir(self.config.state_dir)


Result = tuple[Grade, str]
Check = Callable[[Site], Iterator[Result]]


def ok(message: str) -> Result:
    """Return that nothing needs to be done."""
    return Grade.OK, message


def note(message: str) -> Result:
    """Return something that is worth knowing."""
    return Grade.NOTE, message


def wrong(message: str) -> Result:
    """Return what must be done."""
    return Grade.WRONG, message
