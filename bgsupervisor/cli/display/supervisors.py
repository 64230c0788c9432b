"""The supervisors as their rows, the lock file and the process table show them, and the sentences about them."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from bgsupervisor.catalogue import SUPERVISOR_SILENT_S, names_of
from bgsupervisor.cli.display.output import stopped_by
from bgsupervisor.cli.display.text import listed, local
from bgsupervisor.ipc.lock import LOOP_STUCK_S, Lock
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.sanitize import clean
from bgsupervisor.system import processes
from bgsupervisor.system.fingerprint import newer_code
from bgsupervisor.system.processes import ProcessIdentity, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from bgsupervisor.ledger.records import SupervisorRecord, TaskRecord
    from bgsupervisor.service import Service

__all__ = ["Supervisors", "identity_in", "last_line", "stale_code", "verdict_of"]

TOUCHED_S = 5.0
"""Age of the lock file up to which its supervisor surely runs, in seconds; the loop touches it once a second."""
NAMES_SHOWN = 3


class Failure(NamedTuple):
    """What failed to load in a living supervisor: its kind, its name and the last line of the error."""

    kind: str
    name: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} failed to load: {self.line}"

    def concerns(self, task: str) -> bool:
        """Whether a task of this name may be missing because of it."""
        if self.kind != "module":
            return self.kind == "setup" or self.name == task
        module, colon, _ = task.partition(":")
        if not colon:
            return True  # its own name does not show which module defines it
        return f"{module}.".startswith(f"{self.name}.")  # itself, or a package around it


class Stuck(NamedTuple):
    """A supervisor whose loop does not turn, and the sentence about it."""

    pid: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Supervisors:
    """The supervisors at one moment.

    Attributes:
        now: That moment.
        alive: Those that live, as far as can be seen.
        seen_at: When one was last seen; None if there never was one.
        catalogue: The names of all tasks that the living have loaded; None while that is not known.
        failures: What failed to load.
        dangers: Sentences about imports that may cost data.
        secrets: For each task's name the keys of its data that are masked, as the last supervisor knew it.
        stop: The mark of a stop; None if nothing was stopped.
        silent: Those alive whose heartbeat in the database is old.
        stuck: One that lives and whose loop does not turn; it may count as alive no more.
        unheard: The PID of one that holds the lock and has no row yet.
    """

    now: datetime
    alive: Sequence[SupervisorRecord] = ()
    seen_at: datetime | None = None
    catalogue: frozenset[str] | None = None
    failures: Sequence[Failure] = ()
    dangers: Sequence[str] = ()
    secrets: Mapping[str, Collection[str]] = field(default_factory=dict)
    stop: StopMark | None = None
    silent: Sequence[SupervisorRecord] = ()
    stuck: Stuck | None = None
    unheard: int | None = None

    @classmethod
    def read(cls, service: Service, *, now: datetime | None = None) -> Supervisors:
        """Judge the supervisors that were last seen on each host. Costs microseconds and does not import psutil."""
        now = now or service.ledger.clock.now()
        rows = service.ledger.supervisors()
        state_dir = StateDir(service.config.state_dir)
        lock = Lock(state_dir.lock)
        age_s = _age_s(lock)
        alive = [row for row in rows if _lives(row, now=now, turns=age_s <= LOOP_STUCK_S)]
        catalogues = [names_of(row, now=now) for row in alive]
        known = [names for names in catalogues if names is not None]
        failures = [failure for row in alive for failure in _failures(row)]
        return cls(
            now=now,
            alive=alive,
            seen_at=max((row.left_at or row.heartbeat_at for row in rows), default=None),
            catalogue=frozenset().union(*known) if known and len(known) == len(catalogues) else None,
            failures=[one for one in failures if one.name],
            dangers=[one.line for one in failures if not one.name],
            secrets={
                name: options.get("secret", []) for row in rows for name, options in json.loads(row.catalogue).items()
            },
            stop=StopMark.read(state_dir.stop_mark),
            silent=[row for row in alive if _is_silent(row, now=now)],
            stuck=_stuck(rows, lock, age_s, now=now),
            unheard=holder if not alive and age_s <= TOUCHED_S and _is_there(holder := lock.holder()) else None,
        )

    @property
    def slots(self) -> int:
        """How many bodies the living run at once."""
        return sum(row.slots for row in self.alive)

    def written_at(self, host: str | None) -> datetime | None:
        """Return when the living of *host* last wrote, or all where that has none; None where none lives."""
        own = [row for row in self.alive if row.host == host]
        return max((row.heartbeat_at for row in own or self.alive), default=None)

    def lacks(self, name: str) -> bool:
        """Whether the living are known to have no code for a task's name."""
        return self.catalogue is not None and name not in self.catalogue

    def warnings(self) -> list[str]:
        """Return what a reader of a listing should know first."""
        absence = [] if self.alive else [self.absence()]
        failures = [f"{failure}; see `bgsupervisor check`" for failure in self.failures]
        return [*self.silence(), *absence, *self.dangers, *failures]

    def silence(self) -> list[str]:
        """Return a sentence for each that lives and does not write: it cannot, or its loop does not turn."""
        return [
            self.stuck.sentence
            if self.stuck is not None and row.pid == self.stuck.pid
            else f"the supervisor, PID {row.pid}, is alive but has not written to the database since "
            f"{local(row.heartbeat_at, now=self.now)}; see logs/supervisor.log for the cause; bodies continue"
            for row in self.silent
        ]

    def absence(self) -> str:
        """Return the sentence about a supervisor that is not alive."""
        if self.stop is not None:
            return stopped_by(self.stop)
        if self.unheard is not None:
            return (
                f"a supervisor, PID {self.unheard}, has started and written nothing yet: it is loading the application "
                "or cannot reach the database; see logs/supervisor.log"
            )
        if self.stuck is not None:
            return self.stuck.sentence
        since = "yet" if self.seen_at is None else f"since {local(self.seen_at, now=self.now)}"
        return f"no supervisor has been seen {since}; start one with `bgsupervisor run`"


def stale_code(service: Service) -> str | None:
    """Return the sentence about code that the living supervisor has not loaded; None if it has, or nothing is known.

    Reads the state of each code file, which takes about 30 ms at most.
    """
    state_dir = StateDir(service.config.state_dir)
    names = newer_code(state_dir.fingerprint) if _age_s(Lock(state_dir.lock)) <= TOUCHED_S else []
    if not names:
        return None
    which = clean(listed(names, most=NAMES_SHOWN))
    return f"code on disk is newer than what is loaded ({which}): `bgsupervisor reload`"


def identity_in(row: SupervisorRecord | TaskRecord) -> ProcessIdentity | None:
    """Return the process that a row names, None if it names none."""
    known = (row.host, row.boot_id, row.pid_ns, row.pid, row.start_ticks)
    return None if None in known else ProcessIdentity(*known)  # type: ignore[arg-type]


def verdict_of(identity: ProcessIdentity | None) -> Verdict:
    """Judge a process without psutil, whose import would cost a listing more than all else."""
    if identity is None:
        return Verdict.UNKNOWN
    verdict, handle = processes.open_process(identity)
    if handle is not None:
        handle.close()
    return verdict


def _age_s(lock: Lock) -> float:
    """Return how long ago a supervisor's loop was seen to turn; infinite if that is not known."""
    try:
        age_s = lock.age_s()
    except OSError:  # this user may not enter the state directory
        return math.inf
    return math.inf if age_s is None else age_s


def _is_there(pid: int | None) -> bool:
    identity = None
    with contextlib.suppress(OSError):
        identity = None if pid is None else processes.identity_of(pid, "")
    return identity is not None and verdict_of(identity) is not Verdict.DEAD  # a zombie is


def _is_silent(row: SupervisorRecord, *, now: datetime) -> bool:
    return now - row.heartbeat_at > timedelta(seconds=SUPERVISOR_SILENT_S)


def _stuck(rows: Iterable[SupervisorRecord], lock: Lock, age_s: float, *, now: datetime) -> Stuck | None:
    """Return the lock's holder if it lives, does not write, and has not touched its lock file of late."""
    if age_s <= TOUCHED_S or math.isinf(age_s):
        return None
    holder = lock.holder()
    for row in rows:
        if row.pid == holder and _is_silent(row, now=now) and _lives(row, now=now, turns=True):
            since = local(now - timedelta(seconds=age_s), now=now)
            with contextlib.suppress(OSError):
                return Stuck(row.pid, _stuck_sentence(row.pid, since, is_stopped=processes.is_stopped(row.pid)))
    return None


def _stuck_sentence(pid: int, since: str, *, is_stopped: bool) -> str:
    state, cure = "unresponsive", f"if that lasts, `kill -KILL {pid}` lets another one start"
    if is_stopped:
        state, cure = "stopped", f"`kill -CONT {pid}` resumes it"
    return f"the supervisor, PID {pid}, has been {state} since {since}; {cure}; bodies continue"


def _lives(row: SupervisorRecord, *, now: datetime, turns: bool) -> bool:
    if row.left_at is not None or (_is_silent(row, now=now) and not turns):
        return False
    verdict = verdict_of(identity_in(row))
    # A row of another PID namespace cannot be compared with the lock, so its silence counts.
    return verdict is Verdict.ALIVE or (verdict is Verdict.UNKNOWN and not _is_silent(row, now=now))


def _failures(row: SupervisorRecord) -> list[Failure]:
    return [
        Failure(failure.get("kind", "module"), clean(failure["module"]), last_line(failure["error"]))
        for failure in json.loads(row.code_error or "[]")
    ]


def last_line(trace: str) -> str:
    """Return the last line of a traceback that is not blank: the error itself."""
    lines = [line for line in trace.splitlines() if line.strip()]
    return clean(lines[-1]).strip() if lines else "no reason is known"
