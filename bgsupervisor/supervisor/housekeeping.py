"""What must not grow for ever: rows and logs of ended tasks, and the supervisor's own log. Decides no task's end."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import logging
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.errors import AccessError, DatabaseError
from bgsupervisor.statuses import Status
from bgsupervisor.system import logs, processes
from bgsupervisor.system.files import open_own

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from datetime import datetime

    from bgsupervisor.clock import Clock
    from bgsupervisor.ipc.statedir import StateDir
    from bgsupervisor.ledger import Ledger

__all__ = ["LOG_ROTATED_BYTES", "Housekeeping", "prune", "rotate"]

log = logging.getLogger("bgsupervisor")

PRUNE_EVERY_S = 600.0
"""Interval between two searches for old rows, in seconds; once a second while there are some."""
PRUNE_ROWS = 200
"""Limit of rows deleted in one transaction: some milliseconds, so that no writer waits long for the lock."""
SWEEP_EVERY_S = 3600.0
"""Interval between two searches for logs without a row, in seconds; the first comes this long after the start."""
SWEEP_FILES = 500
"""Limit of logs checked in one call: some milliseconds, so that the loop goes on."""
LOG_ROTATED_BYTES = 10 * 1024 * 1024
"""A supervisor.log that is larger becomes supervisor.log.1, in the place of the one before."""


def prune(
    ledger: Ledger,
    logs_folder: Path,
    *,
    before: datetime,
    statuses: Collection[Status],
    names: Collection[str] | None = None,
) -> int:
    """Delete at most PRUNE_ROWS ended tasks that ended before a moment, in one transaction; return how many.

    Their logs go after the commit. Raises what the ledger raises.
    """
    pruned = ledger.prune(before=before, statuses=statuses, names=names, limit=PRUNE_ROWS)
    for attempt in pruned:
        for number in range(1, attempt.attempt + 1):
            with contextlib.suppress(OSError):
                logs.task_log(logs_folder, attempt.id, number).unlink()
    return len(pruned)


def rotate(path: Path) -> None:
    """Move a large log's text to PATH.1 and empty it; its writers append on. Lines of that moment may be lost."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LOG_ROTATED_BYTES:
            kept = path.with_name(f"{path.name}.1")
            with os.fdopen(open_own(path, os.O_RDWR, logs.LOG_MODE), "r+b") as file:
                kept.unlink(missing_ok=True)
                try:
                    copy = open_own(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, logs.LOG_MODE)
                    with os.fdopen(copy, "wb") as copied:
                        shutil.copyfileobj(file, copied)
                except OSError:
                    kept.unlink(missing_ok=True)  # a full disk: room for the ends of tasks is worth more than old lines
                file.truncate(0)


class Housekeeping:
    """The supervisor's share: a little at a time, once a second."""

    def __init__(self, ledger: Ledger, state_dir: StateDir, clock: Clock) -> None:
        self._ledger = ledger
        self._state_dir = state_dir
        self._clock = clock
        self._prune_at = clock.monotonic()
        self._sweep_at = clock.monotonic() + SWEEP_EVERY_S
        self._unswept: Iterator[Path] | None = None

    def keep(self, keep_days: float) -> None:
        """Do what is due: delete rows and logs older than *keep_days* (0 keeps all), rotate our own log."""
        now = self._clock.monotonic()
        rotate(self._state_dir.own_log)
        if keep_days == 0:
            return
        before = self._clock.now() - timedelta(days=keep_days)
        if now >= self._prune_at:
            self._prune_at = now + PRUNE_EVERY_S
            self._prune(before)
        if now >= self._sweep_at:
            self._sweep(before.timestamp())

    def _prune(self, before: datetime) -> None:
        ended = (Status.DONE, Status.INTERRUPTED)
        try:
            count = prune(self._ledger, self._state_dir.logs, before=before, statuses=ended)
        except (DatabaseError, AccessError) as error:
            log.warning("old tasks are not deleted yet: %s", error)
            return
        if count == PRUNE_ROWS:
            self._prune_at = 0.0  # there are more
        if count:
            log.info("deleted %d tasks that ended before %s", count, before.isoformat(timespec="seconds"))

    def _sweep(self, before: float) -> None:
        """Delete some of the logs that have not been written for as long, as of rows that others deleted."""
        if self._unswept is None:
            self._unswept = _files_in(self._state_dir.logs)
        files = list(itertools.islice(self._unswept, SWEEP_FILES))
        for path in files:
            with contextlib.suppress(OSError, DatabaseError, AccessError):
                if _is_log(path) and path.stat().st_mtime < before and not self._is_needed(path):
                    path.unlink()
        if len(files) < SWEEP_FILES:
            self._unswept = None
            self._sweep_at = self._clock.monotonic() + SWEEP_EVERY_S

    def _is_needed(self, path: Path) -> bool:
        """Whether the child that writes this log is alive, or its task's row is there, however long it was silent."""
        kind, number, rest = path.stem.split("-", 2)
        if not number.isdigit():
            return False
        if kind == "task":
            return self._ledger.get(int(number)) is not None
        return kind == "process" and str(processes.start_ticks(int(number))) == rest


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, read piece by piece as it is asked for."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            yield Path(entry.path)


def _is_log(path: Path) -> bool:
    return fnmatch.fnmatchcase(path.name, "*-*-*.log")
