"""The messages between processes, encoded by msgpack; knows no tables and no sockets.

The process that connects sends its hello first, with PROTOCOL_VERSION. Nothing here is ever unpickled.
"""

from __future__ import annotations

import msgspec

from bgsupervisor.statuses import Reason  # noqa: TC001 - msgspec reads the annotations

__all__ = [
    "PROTOCOL_VERSION",
    "Ack",
    "AttemptResult",
    "Beat",
    "CallerHello",
    "Cancel",
    "ChildHello",
    "Exited",
    "ExitsSeen",
    "ForkServerHello",
    "Kill",
    "Leave",
    "LoadFailure",
    "Message",
    "Notify",
    "ProcessRef",
    "Progress",
    "Reload",
    "Reloaded",
    "ResultReport",
    "Resumed",
    "Retire",
    "Run",
    "SlotGranted",
    "Spawn",
    "SpawnFailed",
    "Spawned",
    "TaskOptions",
    "WaitManagerBeat",
    "WaitManagerHello",
    "Waiting",
    "WantSlot",
    "decode",
    "encode",
]

PROTOCOL_VERSION = 1


class ProcessRef(msgspec.Struct, frozen=True, array_like=True):
    """A process as messages name it: the PID never travels without its start ticks."""

    pid: int
    start_ticks: int


class AttemptResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The result of an attempt, whichever process reports it: DONE when *reason* is None, else INTERRUPTED.

    The last progress travels with it, so that the last word is never lost to a throttle.
    """

    reason: Reason | None = None
    detail: str | None = None
    result: str | None = None
    error: str | None = None
    stack: str | None = None
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    progress_done: float | None = None
    progress_total: float | None = None
    message: str | None = None


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The options of a task class that a supervisor uses; it never imports the class."""

    timeout_s: float | None = None
    stall_s: float | None = None
    memory_limit_bytes: int | None = None
    secret: tuple[str, ...] = ()


class LoadFailure(msgspec.Struct, frozen=True):
    """A module that failed to load, and the cause.

    Attributes:
        module: The name of the module, of the `setup` callable, or of the task whose signature cannot be used.
        error: The traceback.
        kind: "module", "setup" or "task"; a fork server of an older version reports none.
    """

    module: str
    error: str
    kind: str = "module"


class ChildHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A child's first message on a connection: its identity and its present state.

    `id` is None for an idle child, which has read its last connection to the end and so knows that it began
    nothing it was told there. `end` is set when the attempt has ended and is not acknowledged yet.
    """

    version: int
    ref: ProcessRef
    fork_server: ProcessRef
    id: int | None = None
    attempt: int = 0
    end: AttemptResult | None = None


class ForkServerHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A fork server's first message: its catalogue, its living children and the exits not yet acknowledged.

    Attributes:
        dangers: Warnings about data that may be lost.
        places: The files and folders of the code that the application has imported.
    """

    version: int
    ref: ProcessRef
    catalogue: dict[str, TaskOptions]
    failures: list[LoadFailure]
    warnings: list[str]
    children: list[ProcessRef]
    exits: list[Exited]
    dangers: list[str] = []
    places: list[str] = []


class Exited(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A fork server saw its child die. `ordered` is the reason of a kill that went through the fork server."""

    ref: ProcessRef
    exit_code: int | None
    signal: int | None
    ordered: Reason | None = None


class ExitsSeen(msgspec.Struct, frozen=True, tag=True):
    """The supervisor has committed what these exits mean; the fork server may forget them."""

    refs: list[ProcessRef]


class Spawn(msgspec.Struct, frozen=True, tag=True):
    """Fork so many children."""

    count: int


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """A child that was ordered is there; its own hello follows."""

    ref: ProcessRef


class SpawnFailed(msgspec.Struct, frozen=True, tag=True):
    """So many ordered children could not be forked, and why (usually a process limit)."""

    count: int
    error: str


class Retire(msgspec.Struct, frozen=True, tag=True):
    """Another fork server has taken over: leave with the last child."""


class Kill(msgspec.Struct, frozen=True, tag=True):
    """Signal a child, and remember the reason for its exit report; used when the database is away."""

    ref: ProcessRef
    signal: int
    reason: Reason


class Run(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The order to run one attempt; `data` is the JSON text of the row."""

    id: int
    attempt: int
    name: str
    data: str
    key: str | None = None
    parent_id: int | None = None

    def __repr__(self) -> str:
        """Return it without its data, which may be secret: an error tracker shows the local variables of a stack."""
        return f"Run(id={self.id}, attempt={self.attempt}, name={self.name!r})"


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The progress that a body has reported."""

    id: int
    attempt: int
    done: float | None
    total: float | None
    message: str | None


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A child's sign of life."""

    id: int
    attempt: int


class ResultReport(msgspec.Struct, frozen=True, tag=True):
    """A child reports the end of its attempt and waits for the Ack."""

    id: int
    attempt: int
    end: AttemptResult


class Ack(msgspec.Struct, frozen=True, tag=True):
    """The end of this attempt is committed."""

    id: int
    attempt: int


class Cancel(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """This attempt should end: raise Cancelled at the next chance. SIGTERM may follow."""

    id: int
    attempt: int
    reason: Reason
    why: str
    by: str | None = None


class WaitManagerHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A wait manager's first word."""

    version: int
    ref: ProcessRef


class WaitManagerBeat(msgspec.Struct, frozen=True, tag=True):
    """A wait manager's sign of life."""


class Notify(msgspec.Struct, frozen=True, tag=True):
    """Something has happened to the things that these keys name; their waiters read the rows again."""

    keys: list[str]


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """An attempt waits, and its slot is free for others unless it is kept (committed)."""

    id: int
    attempt: int
    slot_kept: bool = False


class Resumed(msgspec.Struct, frozen=True, tag=True):
    """An attempt goes on, in a slot that it took itself (committed)."""

    id: int
    attempt: int
    slot: int


class WantSlot(msgspec.Struct, frozen=True, tag=True):
    """An attempt would go on after its wait *number*, and waits for a slot."""

    id: int
    attempt: int
    number: int


class SlotGranted(msgspec.Struct, frozen=True, tag=True):
    """The attempt has a slot again (committed), after the wait of this number; an older supervisor names none."""

    id: int
    attempt: int
    number: int | None = None


class CallerHello(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first word of a command, such as `bgsupervisor reload`."""

    version: int
    ref: ProcessRef


class Reload(msgspec.Struct, frozen=True, tag=True):
    """Load the configuration and the code anew; with *force* even if less loads than before."""

    force: bool


class Reloaded(msgspec.Struct, frozen=True, tag=True):
    """The outcome of a reload; *done* is false when the old code stays in force."""

    done: bool
    detail: str
    failures: list[LoadFailure] = []


class Leave(msgspec.Struct, frozen=True, tag=True):
    """An idle child, or a fork server without children, is no longer needed."""


Message = (
    ChildHello
    | ForkServerHello
    | Exited
    | ExitsSeen
    | Spawn
    | Spawned
    | SpawnFailed
    | Retire
    | Kill
    | Run
    | Progress
    | Beat
    | ResultReport
    | Ack
    | Cancel
    | WaitManagerHello
    | WaitManagerBeat
    | Notify
    | Waiting
    | Resumed
    | WantSlot
    | SlotGranted
    | CallerHello
    | Reload
    | Reloaded
    | Leave
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode
