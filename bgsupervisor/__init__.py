"""Background tasks for a web app, a database and a machine; `Service` requests them, `Task` and `task` define them."""

from bgsupervisor.errors import (
    AccessError,
    AlreadyLive,
    BgSupervisorError,
    Cancelled,
    ConfigError,
    DatabaseError,
    DataInvalid,
    DataTooLarge,
    Interrupted,
    NotEnded,
    NotInTask,
    NotRetryable,
    RequestRefused,
    SchemaError,
    TaskDefinitionError,
    TaskNotConfigured,
    UnknownTask,
    UnsupportedSystem,
    WaitTimeout,
)
from bgsupervisor.models import TaskRecord
from bgsupervisor.service import Handle, Service
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.tasks import Task, current, task

__version__ = "0.1.0"

__all__ = [
    "AccessError",
    "AlreadyLive",
    "BgSupervisorError",
    "Cancelled",
    "ConfigError",
    "DataInvalid",
    "DataTooLarge",
    "DatabaseError",
    "Handle",
    "Interrupted",
    "NotEnded",
    "NotInTask",
    "NotRetryable",
    "Reason",
    "RequestRefused",
    "SchemaError",
    "Service",
    "Status",
    "Task",
    "TaskDefinitionError",
    "TaskNotConfigured",
    "TaskRecord",
    "UnknownTask",
    "UnsupportedSystem",
    "WaitTimeout",
    "current",
    "task",
]
