"""Background tasks for a web app, a database and a machine; `Service` requests them, `Task` and `task` define them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bgsupervisor.errors import (
        AccessError,
        AlreadyLive,
        BarrierBroken,
        BgSupervisorError,
        Cancelled,
        ConfigError,
        DatabaseError,
        DataInvalid,
        DataTooLarge,
        Deadlock,
        Interrupted,
        LockedByCaller,
        LockHeld,
        NoStack,
        NotEnded,
        NotInTask,
        NotRetryable,
        NotSuspendable,
        PartNotReached,
        RequestRefused,
        SchemaError,
        ServerAway,
        TaskDefinitionError,
        TaskNotConfigured,
        Undecided,
        UnknownTask,
        UnknownTaskName,
        UnsupportedSystem,
        WaitTimeout,
    )
    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service
    from bgsupervisor.statuses import Reason, Status
    from bgsupervisor.task_context import Handle, current
    from bgsupervisor.tasks import Task, task

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "AlreadyLive",
    "BarrierBroken",
    "BgSupervisorError",
    "Cancelled",
    "ConfigError",
    "DataInvalid",
    "DataTooLarge",
    "DatabaseError",
    "Deadlock",
    "Handle",
    "Interrupted",
    "LockHeld",
    "LockedByCaller",
    "NoStack",
    "NotEnded",
    "NotInTask",
    "NotRetryable",
    "NotSuspendable",
    "PartNotReached",
    "Reason",
    "RequestRefused",
    "SchemaError",
    "ServerAway",
    "Service",
    "Status",
    "Task",
    "TaskDefinitionError",
    "TaskNotConfigured",
    "TaskRecord",
    "Undecided",
    "UnknownTask",
    "UnknownTaskName",
    "UnsupportedSystem",
    "WaitTimeout",
    "current",
    "task",
]

_ROOMS = {
    "Service": "service",
    **dict.fromkeys(("Reason", "Status"), "statuses"),
    **dict.fromkeys(("Handle", "Task", "current", "task"), "tasks"),
    "TaskRecord": "ledger.records",
}
"""Where a name lives, if not in errors."""


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: a `run` beside a living supervisor needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
