"""Checks of the machine itself: its SQLite, its clock, its kernel and its first process."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from bgsupervisor.doctor.findings import note, ok, wrong
from bgsupervisor.errors import UnsupportedSystem
from bgsupervisor.system import syscalls
from bgsupervisor.system.users import AS_ROOT, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.doctor.findings import Result, Site

__all__ = ["clock", "first_process", "kernel", "sqlite", "user"]

WAL_SINCE = (3, 7, 0)
WAL_RESET_FIXED = (3, 51, 3)
WAL_RESET_FIXED_EARLIER = {(3, 44): 6, (3, 50): 7}
"""Older lines that got the fix: the first patch of each that has it."""
CLOCK_MIN = datetime(2024, 1, 1, tzinfo=UTC)
AHEAD_MAX = timedelta(seconds=60)
INITS = {
    *("systemd", "init", "openrc-init", "runit", "runit-init", "s6-svscan", "launchd", "upstart", "busybox"),
    *("tini", "docker-init", "podman-init", "catatonit", "dumb-init", "runsvdir", "my_init", "pid1"),
}
"""Programs that reap orphans."""


def sqlite(site: Site) -> Iterator[Result]:
    """Report the version, and whether it has the bug by which two checkpointers can damage a database.

    See https://www.sqlite.org/wal.html.
    """
    if site.database is None:
        return
    version = site.machine.sqlite_version
    name = ".".join(map(str, version))
    earlier = WAL_RESET_FIXED_EARLIER.get((version[0], version[1]))
    if version < WAL_SINCE:
        yield wrong(f"SQLite {name} has no WAL; use a newer one")
    elif version >= WAL_RESET_FIXED or (earlier is not None and version[2] >= earlier):
        yield ok(name)
    else:
        yield note(
            f"SQLite {name} can, very rarely, damage a database that two connections checkpoint at once (fixed in "
            "3.51.3, 3.50.7, 3.44.6); the supervisor is the only regular checkpointer, which all but rules it out"
        )


def clock(site: Site) -> Iterator[Result]:
    """Check that the clock is plausible, and that no row is from the future."""
    now = site.machine.clock.now()
    if now < CLOCK_MIN:
        yield wrong(f"the system clock says {now:%Y-%m-%d}; set it, or tasks start and are pruned at wrong times")
        return
    what, latest = max(site.moments, key=lambda one: one[1], default=("nothing", now))
    if latest - now > AHEAD_MAX:
        ahead = round((latest - now).total_seconds())
        yield wrong(
            f"{what} lies {ahead} s in the future: the clock was set back, or another machine's differs; "
            "synchronize it (NTP)"
        )
    else:
        yield ok(f"{now.isoformat(timespec='seconds')}, and no row is from the future")


def user(site: Site) -> Iterator[Result]:  # noqa: ARG001 - the shape of a check
    """Report which user supervises, and that it is root."""
    if os.geteuid() == 0:
        yield note(AS_ROOT)
    else:
        yield ok(f"tasks run as user {user_name(os.geteuid())}")


def kernel(site: Site) -> Iterator[Result]:  # noqa: ARG001 - the shape of a check
    """Check that there are pidfds and child subreapers, which supervising needs."""
    try:
        os.close(os.pidfd_open(os.getpid()))
        syscalls.is_child_subreaper()
    except (AttributeError, OSError, UnsupportedSystem) as error:
        yield wrong(f"pidfds or child subreapers are missing: {error}; use Linux 5.3, and allow them in seccomp")
    else:
        yield ok("it has pidfds and child subreapers")


def first_process(site: Site) -> Iterator[Result]:
    """Check that a container's PID 1 reaps orphans."""
    proc = site.machine.proc
    name = (proc / "1" / "comm").read_text(encoding="utf-8", errors="replace").strip()
    in_container = (proc / "self" / "ns" / "pid").stat().st_ino != site.machine.initial_pid_namespace
    if in_container and name not in INITS:
        yield note(
            f"PID 1 of this container is {name}, which may not reap orphaned processes; "
            "start the container with an init (`docker run --init`, `init: true`), and tasks die with PID 1"
        )
    else:
        yield ok(name)
