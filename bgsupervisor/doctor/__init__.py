"""Checks of the machine and the set-up, one sentence each; changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgsupervisor.doctor import files, limits, managers, system
from bgsupervisor.doctor.findings import Finding, Grade, Machine, Site, wrong

if TYPE_CHECKING:
    from bgsupervisor.doctor.findings import Check

__all__ = ["CHECKS", "Finding", "Grade", "Machine", "Site", "examine"]

CHECKS: dict[str, Check] = {
    "rights": files.rights,
    "state directory": files.state_directory,
    "user": system.user,
    "code": files.code,
    "deploy folder": files.deploy_folder,
    "file system": files.file_system,
    "free space": files.free_space,
    "SQLite": system.sqlite,
    "lock": managers.lock,
    "loaded code": managers.loaded_code,
    "stop mark": managers.stop_mark,
    "entry": managers.entry,
    "unit": managers.unit,
    "clock": system.clock,
    "kernel": system.kernel,
    "memory": limits.memory,
    "processes": limits.processes,
    "PID 1": system.first_process,
}
"""In the order in which they are reported."""


def examine(site: Site) -> list[Finding]:
    """Make every check; one that may not read a file reports that, and the others follow.

    Blocks for some small files and, where there is one, the crontab program.
    """
    found = []
    for name, check in CHECKS.items():
        try:
            found += [Finding(name, grade, message) for grade, message in check(site)]
        except OSError as error:
            found.append(Finding(name, *wrong(f"it cannot be checked: {error}")))
    return found
