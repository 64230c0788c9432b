"""`bgsupervisor run`: become the supervisor, or leave at once if there is one."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import UnsupportedSystem
from bgsupervisor.statedir import Lock, StateDir

if TYPE_CHECKING:
    from bgsupervisor.config import Config

__all__ = ["supervise"]

STUCK_S = 60.0
"""A supervisor whose lock file was not touched for so long does not turn its loop any more."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def supervise(config: Config, *, burst: bool) -> int:
    """Supervise until told to leave; return the exit code. The caller must leave by os._exit."""
    if not sys.platform.startswith("linux"):
        raise UnsupportedSystem(
            f"supervising needs Linux (pidfd, the process table, child subreapers); this is {sys.platform}. "
            "Importing tasks, requesting them and calling bodies directly work here"
        )
    clock = SystemClock()
    state_dir = StateDir(config.state_dir)
    state_dir.create()
    state_dir.check_owner()
    lock = Lock(state_dir.lock, clock)
    if not lock.acquire():
        return _tell_of_the_other(lock)
    lock.touch()
    from bgsupervisor.supervisor import Supervisor  # noqa: PLC0415 - only the one that supervises pays for it

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, stream=sys.stderr)
    return Supervisor(config, state_dir=state_dir, lock=lock, clock=clock, burst=burst).run()


def _tell_of_the_other(lock: Lock) -> int:
    age_s = lock.age_s()
    holder = lock.holder()
    if age_s is not None and age_s > STUCK_S:
        print(  # noqa: T201 - the command line speaks here
            f"the supervisor with PID {holder} holds the lock but has shown no sign of life for {age_s:.0f} s; "
            "look at it, and end it if it hangs",
            file=sys.stderr,
        )
        return 1
    if sys.stderr.isatty():
        print(f"a supervisor is already running, PID {holder}", file=sys.stderr)  # noqa: T201
    return 0
