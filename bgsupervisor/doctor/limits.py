"""Checks of the kernel's limits on the supervisor with its tasks: memory and processes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from bgsupervisor.doctor.findings import note, ok, wrong
from bgsupervisor.doctor.managers import PROCESSES_PER_SLOT, lock_holder
from bgsupervisor.sizes import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.doctor.findings import Machine, Result, Site

__all__ = ["memory", "processes"]

UNLIMITED_BYTES = 1 << 60
"""The first version of cgroups writes its largest page count where there is no limit."""


def memory(site: Site) -> Iterator[Result]:
    """Report the limit beyond which the kernel kills."""
    limit, whose = _limit(site, "memory", "memory.limit_in_bytes", "memory.max")
    if limit is None or limit >= UNLIMITED_BYTES:
        yield ok(f"{whose} cgroup has no limit of memory")
        return
    share = limit // site.config.slots
    yield note(
        f"{whose} cgroup may use {size(limit)}, {size(share)} for each of {site.config.slots} "
        "slots; beyond it the kernel kills a process"
    )


def processes(site: Site) -> Iterator[Result]:
    """Check that as many processes may run as all slots need."""
    limit, whose = _limit(site, "pids", "pids.max", "pids.max")
    needed = site.config.slots * PROCESSES_PER_SLOT
    if limit is None:
        yield ok(f"{whose} cgroup has no limit of processes")
    elif limit < needed:
        yield wrong(
            f"{whose} cgroup may have {limit} processes and threads, and {site.config.slots} slots need {needed}; "
            "raise TasksMax of the unit (or --pids-limit), or lower `slots`"
        )
    else:
        yield ok(f"{whose} cgroup may have {limit:,} processes and threads")


def _limit(site: Site, controller: str, old_name: str, new_name: str) -> tuple[int | None, str]:
    """Return the lowest limit on the way up from the supervisor's cgroup, else this process's, and whose it is."""
    machine = site.machine
    holder = lock_holder(site)
    whose = "this process's" if holder is None else "the supervisor's"
    found = [
        limit
        for file in _files(machine, str(holder or "self"), controller, old_name, new_name)
        if (limit := _read(file)) is not None
    ]
    return min(found, default=None), whose


def _files(machine: Machine, pid: str, controller: str, old_name: str, new_name: str) -> Iterator[Path]:
    lines = (machine.proc / pid / "cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        folder = Path(path.strip("/"))
        if controller in controllers.split(","):
            root, name = machine.cgroup_root / controller, old_name
        elif not controllers:
            root, name = machine.cgroup_root, new_name
        else:
            continue
        # A container often sees its own cgroup at the root, whatever its path is outside.
        yield from (root / one / name for one in (folder, *folder.parents))


def _read(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text(encoding="ascii"))  # "max" is no limit
    return None
