"""What is wrong with the machine and the set-up, one sentence per check; changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bgsupervisor.doctor import files, limits, managers, system
from bgsupervisor.doctor.findings import Finding, Grade, Machine, Scene, wrong

if TYPE_CHECKING:
    from bgsupervisor.doctor.findings import Check

__all__ = ["CHECKS", "Finding", "Grade", "Machine", "Scene", "examine"]

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
"""In the order in which they are told."""


def examine(scene: Scene) -> list[Finding]:
    """Make every check; one that meets a file it may not read tells that, and the others go on.

    Blocks for some small files and, where there is one, the crontab program.
    """
    found = []
    for name, check in CHECKS.items():
        try:
            found += [Finding(name, grade, told) for grade, told in check(scene)]
        except OSError as error:
            found.append(Finding(name, *wrong(f"it cannot be looked at: {error}")))
    return found
