"""The folder of all that tests keep on disk while they run; nothing of it stays, also of processes that were killed."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

__all__ = ["made", "remove", "run_folder", "share"]

PREFIX = "bgsupervisor-tests-"
IN_USE = "in-use"
"""A file that is locked (flock) as long as the maker of the folder lives, or one of its forks."""

_lock = threading.Lock()
_made: list[Path] = []


def run_folder() -> Path:
    """Return the folder of this process and its forks; the process that has made it removes it when it ends."""
    with _lock:
        if not _made:
            _remove_abandoned()
            _made.append(_make())
            atexit.register(remove, _made[0], os.getpid())
            multiprocessing: Any = sys.modules.get("multiprocessing.util")
            if multiprocessing is not None:  # its children run no exit handlers but these
                multiprocessing.Finalize(None, remove, (_made[0], os.getpid()), exitpriority=0)
        return _made[0]


def made() -> Path | None:
    """Return the folder if there is one already; takes no lock, which a thread may hold while the process forks."""
    return _made[0] if _made else None


def share(folder: Path) -> None:
    """Use the folder of the process that has spawned this one; that process removes it."""
    with _lock:
        if not _made and folder.is_dir():
            _made.append(folder)


def remove(folder: Path, maker: int) -> None:
    """Remove a folder, but in no other process than the one with the PID *maker*."""
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def _make() -> Path:
    new = Path(tempfile.mkdtemp(prefix="bgsupervisor-new-"))
    _is_free(os.open(new / IN_USE, os.O_RDWR | os.O_CREAT, 0o600))  # takes it, and never closes it
    return new.rename(new.with_name(new.name.replace("-new-", "-tests-")))  # only now may others ask for its lock


def _remove_abandoned() -> None:
    """Remove the folders of processes that could not do so themselves: killed, or terminated by a pool."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # of another user, or removed meanwhile
            descriptor = os.open(folder / IN_USE, os.O_RDWR)
            try:
                if _is_free(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    """Take the lock if it is free; False also where there are no such locks (Windows)."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
