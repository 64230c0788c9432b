"""Whether a supervisor is alive, what code it has, and the sentences that listings say about it."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from bgsupervisor.catalogue import SUPERVISOR_SILENT_S, names_of
from bgsupervisor.cli.display.text import local
from bgsupervisor.ipc.lock import STUCK_S, Lock
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.sanitize import clean
from bgsupervisor.system import processes
from bgsupervisor.system.fingerprint import newer_code
from bgsupervisor.system.processes import ProcessIdentity, Verdict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from bgsupervisor.ledger.records import SupervisorRecord
    from bgsupervisor.service import Service

__all__ = ["Watch", "last_line", "stale_code", "watch"]

TOUCHED_S = 5.0
"""A supervisor touches its lock file once a second; after so long it is not sure any more that one is there."""
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
            return True  # its own name does not say which module has it
        return f"{module}.".startswith(f"{self.name}.")  # itself, or a package around it


class Still(NamedTuple):
    """A supervisor that lives and whose loop does not turn: since when, and whether a signal has stopped it."""

    pid: int
    since: datetime
    is_stopped: bool

    def sentence(self, *, now: datetime) -> str:
        """Return what to know and what to do."""
        done = f"it is stopped; `kill -CONT {self.pid}` lets it go on"
        if not self.is_stopped:
            done = f"it hangs, or the machine does; if that lasts, `kill -KILL {self.pid}` makes room for another one"
        since = local(self.since, now=now)
        return f"the supervisor, PID {self.pid}, has stood still since {since}: {done}; bodies go on"


@dataclass(frozen=True, slots=True)
class Watch:
    """What rows and the process table tell about supervisors.

    Attributes:
        alive: Those that live, as far as can be seen.
        seen_at: When one was last seen; None if there never was one.
        catalogue: The names of all tasks that the living have loaded; None while that is not known.
        failures: What failed to load.
        dangers: Sentences about what in an import may cost data.
        secrets: For each task's name the keys of its data that are masked, as the last supervisor knew it.
        stopped: Who wants no supervisor here, and since when.
        mute: Those alive that have not written for long.
        still: The one whose loop has not turned of late, and since when; it may count as alive no more.
        unheard: The PID of one that holds the lock and that no row tells of.
    """

    alive: Sequence[SupervisorRecord] = ()
    seen_at: datetime | None = None
    catalogue: frozenset[str] | None = None
    failures: Sequence[Failure] = field(default=())
    dangers: Sequence[str] = ()
    secrets: Mapping[str, Collection[str]] = field(default_factory=dict)
    stopped: StopMark | None = None
    mute: Sequence[SupervisorRecord] = ()
    still: Still | None = None
    unheard: int | None = None

    def written_at(self, host: str | None) -> datetime | None:
        """Return when the living of *host* have written last, or where that has none, all; None where none lives."""
        own = [one for one in self.alive if one.host == host]
        return max((one.heartbeat_at for one in own or self.alive), default=None)

    def lacks(self, name: str) -> bool:
        """Tell whether living supervisors are known to have no code for a task's name."""
        return self.catalogue is not None and name not in self.catalogue

    def warnings(self, *, now: datetime) -> list[str]:
        """Return what whoever looks at tasks should know first."""
        found = [f"{failure}; see `bgsupervisor check`" for failure in self.failures]
        found[:0] = self.dangers
        if not self.alive:
            found.insert(0, self.absence(now=now))
        return [*self.silence(now=now), *found]

    def silence(self, *, now: datetime) -> list[str]:
        """Return a sentence for each that lives and does not write: it cannot, or its loop does not turn."""
        return [
            self.still.sentence(now=now)
            if self.still is not None and one.pid == self.still.pid
            else f"the supervisor, PID {one.pid}, lives but could not write to the database since "
            f"{local(one.heartbeat_at, now=now)}; logs/supervisor.log says why, and bodies go on"
            for one in self.mute
        ]

    def absence(self, *, now: datetime) -> str:
        """Return the sentence that says that no supervisor is alive."""
        if self.stopped is not None:
            return f"stopped by {self.stopped.by} at {self.stopped.at}; `bgsupervisor start` lifts that"
        if self.unheard is not None:
            loads = "it loads the application, or the database is away: logs/supervisor.log says which"
            return f"a supervisor, PID {self.unheard}, is there and has written nothing yet; {loads}"
        if self.still is not None:
            return self.still.sentence(now=now)
        since = "yet" if self.seen_at is None else f"since {local(self.seen_at, now=now)}"
        return f"no supervisor has been seen {since}; start one with `bgsupervisor run`"


def watch(service: Service, *, now: datetime) -> Watch:
    """Judge the supervisors that were last seen on each host. Costs microseconds and does not import psutil."""
    supervisors = service.ledger.supervisors()
    state_dir = StateDir(service.config.state_dir)
    lock = Lock(state_dir.lock)
    age_s = _age_s(lock)
    alive = [one for one in supervisors if _lives(one, now=now, turns=age_s <= STUCK_S)]
    catalogues = [names_of(one, now=now) for one in alive]
    told = [failure for one in alive for failure in _failures(one)]
    known = [names for names in catalogues if names is not None]
    return Watch(
        alive=alive,
        seen_at=max((one.left_at or one.heartbeat_at for one in supervisors), default=None),
        catalogue=frozenset().union(*known) if known and len(known) == len(catalogues) else None,
        failures=[one for one in told if one.name],
        dangers=[one.line for one in told if not one.name],
        secrets={name: secret for one in supervisors for name, secret in _secrets(one)},
        stopped=StopMark.read(state_dir.stop_mark),
        mute=[one for one in alive if _is_silent(one, now=now)],
        still=_still(supervisors, lock, age_s, now=now),
        unheard=holder if not alive and age_s <= TOUCHED_S and _is_there(holder := lock.holder()) else None,
    )


def stale_code(service: Service) -> str | None:
    """Return the sentence that says that the living supervisor has not loaded the code on disk; None if it has.

    Blocks for a look at each code file, about 30 ms at most; None also where nothing is known.
    """
    state_dir = StateDir(service.config.state_dir)
    if _age_s(Lock(state_dir.lock)) > TOUCHED_S:
        return None
    names = newer_code(state_dir.fingerprint)
    if not names:
        return None
    which = clean(", ".join(names[:NAMES_SHOWN])) + (", ..." if len(names) > NAMES_SHOWN else "")
    return f"code on disk is newer than what is loaded ({which}): `bgsupervisor reload`"


def _age_s(lock: Lock) -> float:
    """Return how long ago the loop of a supervisor was seen to turn, database or not; infinite if nobody can tell."""
    try:
        age_s = lock.age_s()
    except OSError:  # this user may not look into the state directory
        return math.inf
    return math.inf if age_s is None else age_s


def _is_there(pid: int | None) -> bool:
    try:
        identity = None if pid is None else processes.identity_of(pid, "")
    except OSError:
        return False
    if identity is None:
        return False
    found, handle = processes.look(identity)
    if handle is not None:
        handle.close()
    return found is not Verdict.DEAD  # a zombie is


def _is_silent(one: SupervisorRecord, *, now: datetime) -> bool:
    return now - one.heartbeat_at > timedelta(seconds=SUPERVISOR_SILENT_S)


def _still(supervisors: Iterable[SupervisorRecord], lock: Lock, age_s: float, *, now: datetime) -> Still | None:
    """Return the holder of the lock if it lives, does not write, and has not touched its lock file of late."""
    if age_s <= TOUCHED_S or math.isinf(age_s):
        return None
    holder = lock.holder()
    for one in supervisors:
        if one.pid == holder and _is_silent(one, now=now) and _lives(one, now=now, turns=True):
            with contextlib.suppress(OSError):
                return Still(one.pid, now - timedelta(seconds=age_s), processes.is_stopped(one.pid))
    return None


def _lives(one: SupervisorRecord, *, now: datetime, turns: bool) -> bool:
    if one.left_at is not None or (_is_silent(one, now=now) and not turns):
        return False
    found, handle = processes.look(ProcessIdentity(one.host, one.boot_id, one.pid_ns, one.pid, one.start_ticks))
    if handle is not None:
        handle.close()
    # A row of another PID namespace cannot be compared with the lock, so its silence counts.
    return found is Verdict.ALIVE or (found is Verdict.UNKNOWN and not _is_silent(one, now=now))


def _secrets(one: SupervisorRecord) -> list[tuple[str, list[str]]]:
    return [(name, options.get("secret", [])) for name, options in json.loads(one.catalogue).items()]


def _failures(one: SupervisorRecord) -> list[Failure]:
    if one.code_error is None:
        return []
    return [
        Failure(failure.get("kind", "module"), clean(failure["module"]), last_line(failure["error"]))
        for failure in json.loads(one.code_error)
    ]


def last_line(trace: str) -> str:
    """Return the last line of a traceback that says something: the error itself."""
    lines = [line for line in trace.splitlines() if line.strip()]
    return clean(lines[-1]).strip() if lines else "no reason is known"
