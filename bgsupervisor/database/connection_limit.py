"""A limit of the connections that processes of a host have at once; knows nothing of what they do with them."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
from typing import TYPE_CHECKING

from bgsupervisor.clock import SystemClock
from bgsupervisor.system.files import open_own

if sys.platform != "win32":  # a body on Windows loads this module too
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["CONNECTIONS_MAX", "ConnectionLimit", "limit_of"]

CONNECTIONS_MAX = 8
"""So many children of a host have a connection to a database server at once."""
LOOK_S = 0.005
"""Who finds all places taken looks again after so long, and up to twice that."""
MODE = 0o600


class ConnectionLimit:
    """The places are lock files `database-0` to `database-7` in *folder*; the kernel frees those of the dead.

    A process takes at most one: its threads go in one after the other. What is taken is not inherited by a fork.
    """

    places = CONNECTIONS_MAX

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = SystemClock()
        self._begin()

    @contextlib.contextmanager
    def connected(self, wait_s: float) -> Iterator[bool]:
        """Have a place for the block; yields whether it was taken for it, not for one around it.

        Raises:
            TimeoutError: All were taken for *wait_s*, or another thread of this process had its turn for so long.
        """
        if self._pid != os.getpid():
            self._begin()
        deadline = self._clock.monotonic() + wait_s
        if not self._turn.acquire(timeout=max(0.0, wait_s)):
            raise TimeoutError
        try:
            self._depth += 1
            place = None
            try:
                if self._depth == 1:
                    place = self._take(deadline)
                yield self._depth == 1
            finally:
                self._depth -= 1
                if place is not None:
                    os.close(place)  # which gives it back
        finally:
            self._turn.release()

    def _begin(self) -> None:
        self._pid, self._turn, self._depth = os.getpid(), threading.RLock(), 0

    def _take(self, deadline: float) -> int | None:
        """Return the descriptor that holds a place; None where there can be no files: then nobody is kept out."""
        numbers = random.sample(range(CONNECTIONS_MAX), CONNECTIONS_MAX)
        while True:
            for number in numbers:
                try:
                    file = open_own(self._folder / f"database-{number}", os.O_CREAT | os.O_RDWR, MODE)
                except OSError:
                    return None
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(file)
                else:
                    return file
            if self._clock.monotonic() >= deadline:
                raise TimeoutError
            self._clock.sleep(LOOK_S * (1 + random.random()))  # noqa: S311 - so that they do not all look at once


_limits: dict[Path, ConnectionLimit] = {}


def limit_of(folder: Path) -> ConnectionLimit:
    """Return this process's connection limit of a state directory; only one, since locks are the process's."""
    return _limits.setdefault(folder, ConnectionLimit(folder))
