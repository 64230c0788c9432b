"""The four statuses, and the closed list of reasons why a task was interrupted."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Reason", "Status"]


class Status(StrEnum):
    """Where a task stands; stored as these words."""

    REQUEST = "REQUEST"
    """Planned: waits for its time, for a slot or for its code."""
    START = "START"
    """Running in a child process of its own."""
    DONE = "DONE"
    """Its body returned; final."""
    INTERRUPTED = "INTERRUPTED"
    """Cut off before its end; `Reason` says why. Only `retry` leads out of it."""

    @property
    def ended(self) -> bool:
        """Whether the task has ended: DONE or INTERRUPTED."""
        return self in (Status.DONE, Status.INTERRUPTED)


class Reason(StrEnum):
    """Why a task is INTERRUPTED; stored as these words, beside a sentence and the facts."""

    RAISED = "RAISED"
    """The body raised; the traceback is kept."""
    EXITED = "EXITED"
    """The process ended by itself before it reported: sys.exit, os._exit, exec; also with code 0."""
    SIGNALLED = "SIGNALLED"
    """Killed by a signal that was not ours; number and name are kept."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """Killed by the kernel's OOM killer (the detail names the evidence) or past its own memory limit."""
    TIMED_OUT = "TIMED_OUT"
    """Ran past its timeout_s."""
    CANCELLED = "CANCELLED"
    """A person or program asked; the row names it, and the means that it took."""
    STOPPED = "STOPPED"
    """The supervisor was ordered to stop and kill."""
    DEADLOCKED = "DEADLOCKED"
    """Its wait would have closed a cycle, which is named."""
    HOST_REBOOTED = "HOST_REBOOTED"
    """The machine started anew while it ran."""
    HOST_LOST = "HOST_LOST"
    """Its container (another PID namespace) has been silent past lease_s."""
    VANISHED = "VANISHED"
    """Its process is gone without evidence how."""
    DEPENDENCY = "DEPENDENCY"
    """A task it had to come after was interrupted."""
    EXPIRED = "EXPIRED"
    """Not started before its expires_at."""

    @property
    def wanted(self) -> bool:
        """Whether a person or program asked for it: CANCELLED or STOPPED; all others are errors to a log."""
        return self in (Reason.CANCELLED, Reason.STOPPED)
