"""Every error that bgsupervisor raises; knows no database, process or file.

    BgSupervisorError
    ├── ConfigError            the configuration is missing or wrong          (exit 3)
    ├── SchemaError            tables of another version, or none             (exit 3)
    ├── AccessError            a file or folder that this user may not use    (exit 1)
    ├── DatabaseError          the database cannot be read or written now     (exit 1)
    │   ├── LockedByCaller     a transaction of the calling thread keeps it locked (SQLite)
    │   ├── ServerAway         its server does not answer (PostgreSQL)
    │   └── Undecided          nor does it say whether it had recorded
    ├── UnsupportedSystem      this operating system cannot supervise         (exit 1)
    ├── TaskDefinitionError    a task class or function that cannot work
    ├── RequestRefused         an argument that cannot be; nothing was recorded (a ValueError too)
    │   ├── DataInvalid        data does not fit the body's signature, or is not JSON
    │   ├── DataTooLarge       data exceeds data_max_bytes
    │   ├── TaskNotConfigured  no supervisor could load this class
    │   └── UnknownTaskName    no known task has this name, or several have (exit 2)
    ├── UnknownTask            no task has this id
    ├── NotEnded               the task has no result yet
    ├── Interrupted            the task ended INTERRUPTED, so it has no result
    ├── NotRetryable           only an INTERRUPTED task can be retried
    ├── AlreadyLive            a live task holds the same unique key
    ├── NotSuspendable         only a task that runs and is not to end can be suspended
    ├── NoStack                the stack of a task cannot be shown now
    ├── WaitTimeout            a wait reached its limit
    │   (a wait inside a body raises it too)
    ├── PartNotReached         the awaited task ended without reaching the part, or without DONE
    ├── Deadlock               the wait would have closed a cycle
    ├── LockHeld               this attempt holds the lock already
    ├── BarrierBroken          another participant died at the barrier
    ├── NotInTask              the call makes sense only inside a running body
    ├── WireError              a peer sent bytes that are not our protocol
    └── Unkillable             a process is still there after SIGKILL

    Cancelled                  raised inside a body; a BaseException, so that
                               `except Exception` does not swallow it

Each message says what happened, what is known and what to do; the facts are attributes as well.
"""

from __future__ import annotations

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
    "Interrupted",
    "LockHeld",
    "LockedByCaller",
    "NoStack",
    "NotEnded",
    "NotInTask",
    "NotRetryable",
    "NotSuspendable",
    "PartNotReached",
    "RequestRefused",
    "SchemaError",
    "ServerAway",
    "TaskDefinitionError",
    "TaskNotConfigured",
    "Undecided",
    "Unkillable",
    "UnknownTask",
    "UnknownTaskName",
    "UnsupportedSystem",
    "WaitTimeout",
    "WireError",
]


class BgSupervisorError(Exception):
    """The base of all errors of this package; `exit_code` is what the command line leaves with."""

    exit_code = 1


class ConfigError(BgSupervisorError):
    """The configuration is missing, names an unknown key or holds a wrong value."""

    exit_code = 3


class SchemaError(BgSupervisorError):
    """The tables are absent, too old or too new for this version."""

    exit_code = 3


class AccessError(BgSupervisorError):
    """A file or folder that this user may not use as needed.

    Attributes:
        path: The file or folder.
        user: The name of the user who tried.
        right: What was needed: "read", "write" or "create".
    """

    def __init__(self, message: str, *, path: str, user: str, right: str) -> None:
        super().__init__(message)
        self.path = path
        self.user = user
        self.right = right


class DatabaseError(BgSupervisorError):
    """The database cannot be read or written at the moment (locked, full, away, damaged)."""


class LockedByCaller(DatabaseError):
    """An open transaction of the calling thread keeps the SQLite file locked, so to wait cannot help."""


class ServerAway(DatabaseError):
    """The server cannot be reached, has hung up or does not answer; nothing was recorded (PostgreSQL)."""


class Undecided(DatabaseError):
    """The connection was lost in the commit, and no server has answered since: it may have been recorded, or not."""


class UnsupportedSystem(BgSupervisorError):
    """The operating system lacks what supervising needs (Linux with pidfd)."""


class TaskDefinitionError(BgSupervisorError, TypeError):
    """A task class or function that cannot work, reported where it is defined or first used."""


class RequestRefused(BgSupervisorError, ValueError):
    """An argument that cannot be; nothing was recorded."""


class DataInvalid(RequestRefused):
    """The data does not fit the body's signature, or is not JSON.

    Attributes:
        field: Path of the field, as "$.ids[0]"; "$" for the data as a whole.
    """

    def __init__(self, message: str, *, field: str = "$") -> None:
        super().__init__(message)
        self.field = field


class DataTooLarge(RequestRefused):
    """The encoded data exceeds data_max_bytes.

    Attributes:
        size_bytes: The size of the encoded data.
        limit_bytes: What is allowed.
    """

    def __init__(self, message: str, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class TaskNotConfigured(RequestRefused):
    """No configured module loads this class, so no supervisor could ever run it."""


class UnknownTaskName(RequestRefused):
    """No known task has this name, or the short name means several.

    Attributes:
        name: The name asked for.
        candidates: What it may mean; empty where nothing is like it.
    """

    exit_code = 2

    def __init__(self, message: str, *, name: str, candidates: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.candidates = candidates


class UnknownTask(BgSupervisorError, LookupError):
    """No task has this id: it never existed, or was pruned.

    Attributes:
        id: The id asked for.
    """

    def __init__(self, id: int) -> None:
        super().__init__(f"no task has the id {id}; it never existed, or was pruned")
        self.id = id


class NotEnded(BgSupervisorError):
    """The task has not ended, so it has no result yet; `wait` waits for it.

    Attributes:
        id: The task.
        status: Its status now, REQUEST or START.
    """

    def __init__(self, id: int, status: str) -> None:
        super().__init__(f"task {id} has not ended, its status is {status}; use wait() to wait for its end")
        self.id = id
        self.status = status


class Interrupted(BgSupervisorError):
    """The task ended INTERRUPTED, so it has no result.

    Attributes:
        id: The task.
        reason: Why, a `Reason`.
        detail: The sentence recorded with it.
    """

    def __init__(self, id: int, reason: str, detail: str) -> None:
        super().__init__(f"task {id} was interrupted: {reason}: {detail}")
        self.id = id
        self.reason = reason
        self.detail = detail


class NotRetryable(BgSupervisorError):
    """Only a task that ended INTERRUPTED can be retried.

    Attributes:
        id: The task.
        status: Its status now.
    """

    def __init__(self, id: int, status: str) -> None:
        super().__init__(f"task {id} cannot be retried: its status is {status}, only an INTERRUPTED task can be")
        self.id = id
        self.status = status


class AlreadyLive(BgSupervisorError):
    """A live task holds the same unique key.

    Attributes:
        id: The live one.
    """

    def __init__(self, id: int, unique_key: str) -> None:
        super().__init__(f"task {id} is live and holds the same unique key {unique_key!r}")
        self.id = id
        self.unique_key = unique_key


class NotSuspendable(BgSupervisorError):
    """Only a task that runs, and is not to end, can be suspended.

    Attributes:
        id: The task.
        status: Its status now.
    """

    def __init__(self, id: int, status: str, why: str) -> None:
        super().__init__(f"task {id} cannot be suspended: {why}")
        self.id = id
        self.status = status


class NoStack(BgSupervisorError):
    """The stack of a task cannot be shown now; says why.

    Attributes:
        pid: The process that was to show it; None where there is none.
    """

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class WaitTimeout(BgSupervisorError, TimeoutError):
    """A wait reached its limit; the awaited thing goes on."""


class PartNotReached(BgSupervisorError):
    """The awaited task has ended and never reached the part; or was interrupted, where its end was awaited.

    Attributes:
        id: The awaited task.
        part: The part, None where the end was awaited.
        status: How it ended, DONE or INTERRUPTED.
        reason: Why it was interrupted, a `Reason`, or None.
    """

    def __init__(self, id: int, part: str | None, status: str, reason: str | None, detail: str | None) -> None:
        how = f"{status}, {reason}: {detail}" if reason else status
        what = "did not end DONE" if part is None else f'ended without reaching the part "{part}"'
        super().__init__(f"task {id} {what}: {how}")
        self.id = id
        self.part = part
        self.status = status
        self.reason = reason


class Deadlock(BgSupervisorError):
    """The wait would have closed a cycle of tasks that wait for each other; it was not begun.

    Attributes:
        circle: (task, what it waits for), each waiting for the next and the last for the first.
    """

    def __init__(self, circle: list[tuple[int, str]]) -> None:
        super().__init__("deadlock: " + "; ".join(f"task {id} waits for {what}" for id, what in circle))
        self.circle = circle


class LockHeld(BgSupervisorError):
    """This attempt holds the lock already, or another of its coroutines waits for it.

    Attributes:
        name: The lock.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f'this task holds the lock "{name}" already, or waits for it')
        self.name = name


class BarrierBroken(BgSupervisorError):
    """Another participant died while it waited at the barrier, so it will never open.

    Attributes:
        name: The barrier.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f'the barrier "{name}" is broken: {why}')
        self.name = name


class NotInTask(BgSupervisorError, RuntimeError):
    """The call makes sense only inside a body that a supervisor runs."""


class WireError(BgSupervisorError):
    """A peer sent bytes that are not our protocol; its connection is closed."""


class Unkillable(BgSupervisorError):
    """A process is still there after SIGKILL, usually in uninterruptible disk sleep.

    Attributes:
        pids: The processes that are left.
    """

    def __init__(self, message: str, *, pids: tuple[int, ...]) -> None:
        super().__init__(message)
        self.pids = pids


class Cancelled(BaseException):
    """Raised inside a body that should end: at its next progress, track or wait, or by SIGTERM after the grace.

    Attributes:
        reason: The `Reason` that will be recorded: CANCELLED, TIMED_OUT, STOPPED ...
        by: The person or program that asked, if one did.
        why: The sentence that is recorded.
    """

    def __init__(self, reason: str = "CANCELLED", by: str | None = None, why: str | None = None) -> None:
        super().__init__(why or (f"{reason} by {by}" if by else reason))
        self.reason = reason
        self.by = by
        self.why = why
