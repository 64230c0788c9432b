"""What must be true when all is quiet again: rows against oracle. Each check returns sentences about what is not.

Where the oracle cannot know a moment exactly (a body that was killed tells no end), it takes the one that accuses
nobody: so a sentence here is always a defect, of the product or of this page.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import signal
import statistics
from collections import Counter, defaultdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

from torture.bodies import PERMITS
from torture.oracle import Attempted, Entry, Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torture.arena import Life

__all__ = ["CHECKS", "Evidence", "Latency", "violations"]

LIVING_S = 1.0
"""Promised: from a child's death to its row, where a supervisor lives."""
RETURNING_S = 2.0
"""Promised: from the next supervisor's start."""
SETTLED_S = 1.0
"""A supervisor that old has read the rows: deaths that it sees are counted as seen by a living one."""
BUSY_S = 5.0
"""How long a call waits for the locked database before it gives up (busy_timeout_s)."""
LOCKED_SLACK_S = 1.0
"""Whoever waits behind a lock of chaos waits for the others who wait as well."""
ROW_SLACK_S = 0.5
"""A row's times come from another clock, a moment before their commit."""
STILL_S = 3.0
"""Chaos has nobody stand still for longer."""
SETTLING = ("end", "raise", "leave", "suicide")
"""Lines after which a body does nothing more."""

Row = dict[str, Any]
Span = tuple[float, float]
"""From, until; monotonic."""


@dataclasses.dataclass
class Evidence:
    """Everything that is known of a run.

    Attributes:
        lines: Of bodies and producers.
        entries: Of chaos.
        tasks: The rows of tasks, by id.
        interruptions: The rows of interrupted attempts.
        done_seen: When each attempt was first seen to be DONE, monotonic.
        interrupted_seen: When each interruption was first seen, monotonic.
        away: When the database's write lock was not to be had, from, until.
        lives: All `bgsupervisor run`.
        supervised: The PIDs of those that became supervisors.
        leftovers: What was still there at the end: processes, rows of holds and waits, files, complaints.
        wall_minus_mono: What to subtract from a row's time to get a monotonic one.
        slots: How many bodies may run at once.
        slack: What the limits of time are multiplied with, for a machine that is busy.
        kernel_tells: The kernel tells the exit of a reaped process to who holds a pidfd of it.
        reaper: The PID of the torture test, which inherits whom nobody else does.
        adopted: How often a supervisor said that it looks after a task which another one started.
        longest_look_s: How late the observer was at most.
    """

    lines: list[Line]
    entries: list[Entry]
    tasks: dict[int, Row]
    interruptions: list[Row]
    done_seen: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    interrupted_seen: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    away: list[Span] = dataclasses.field(default_factory=list)
    lives: list[Life] = dataclasses.field(default_factory=list)
    supervised: set[int] = dataclasses.field(default_factory=set)
    leftovers: list[str] = dataclasses.field(default_factory=list)
    wall_minus_mono: float = 0.0
    slots: int = 16
    slack: float = 1.0
    kernel_tells: bool = False
    reaper: int = 0
    adopted: int = 0
    longest_look_s: float = 0.0

    def __post_init__(self) -> None:
        self.by_attempt: dict[Attempted, list[Line]] = defaultdict(list)
        self.acks: dict[int, list[Line]] = defaultdict(list)
        for line in sorted(self.lines, key=lambda one: one["at"]):
            if line["what"] == "ack":
                self.acks[line["task"]].append(line)
            elif "attempt" in line:
                self.by_attempt[Attempted(line["id"], line["attempt"])].append(line)
        self.kills: dict[tuple[int, int], Entry] = {}
        for entry in self.entries:
            if entry.what == "kill":
                self.kills.setdefault((entry.pid, entry.ticks), entry)
        self.by_end = {Attempted(row["task_id"], row["attempt"]): row for row in self.interruptions}
        self.cancelled = {entry.task for entry in self.entries if entry.what == "cancel"}

    @functools.cached_property
    def able(self) -> list[Span]:
        """When some supervisor lived that neither stood still nor had its database locked."""
        return able_spans(self)

    def line(self, attempted: Attempted, *whats: str) -> Line | None:
        """Return the first line of that kind of an attempt."""
        return next((line for line in self.by_attempt.get(attempted, ()) if line["what"] in whats), None)

    def mono(self, text: str) -> float:
        """Return a row's time on the monotonic clock."""
        return datetime.fromisoformat(text).timestamp() - self.wall_minus_mono

    def kill_of(self, attempted: Attempted) -> Entry | None:
        """Return the deed that killed whoever ran an attempt."""
        start = self.line(attempted, "start")
        if start is not None:
            return self.kills.get((start["pid"], start["ticks"]))
        row = self.by_end.get(attempted)
        if row is None or row["started_at"] is None:
            return None
        # A spare may be killed while its supervisor is stopped between its choice and its claim.
        since = self.mono(row["started_at"]) - ROW_SLACK_S - STILL_S
        until = self.mono(row["ended_at"]) + ROW_SLACK_S
        return next((one for one in self.kills.values() if one.pid == row["pid"] and since <= one.at <= until), None)

    def over(self, attempted: Attempted) -> float:
        """Return when a body had certainly ended, or the last moment at which it was certainly there."""
        settled = self.line(attempted, *SETTLING)
        kill = self.kill_of(attempted)
        moments = [math.inf if settled is None else settled["at"], math.inf if kill is None else kill.at]
        sooner = min(moments)
        if sooner < math.inf:
            return float(sooner)
        return float(self.by_attempt[attempted][-1]["at"]) if attempted in self.by_attempt else math.inf

    def database_locked(self, at: float, before_s: float = BUSY_S) -> bool:
        """Whether the write lock was not to be had shortly before a moment."""
        return any(
            since - LOCKED_SLACK_S <= at and at - before_s - LOCKED_SLACK_S <= until for since, until in self.away
        )

    def fork_server_was_killed(self, attempted: Attempted) -> bool:
        """Whether the fork server of whoever ran an attempt was killed: then nobody may have seen how it ended."""
        killed = {one.pid for one in self.kills.values() if one.whom == "fork_server"}
        start = self.line(attempted, "start")
        if start is None:
            return bool(killed)
        heirs = {self.reaper, *(life.ref.pid for life in self.lives)}  # it had died before the body began
        return start["fork_server"] in killed | heirs


# 1, 10


def requests(known: Evidence) -> Iterable[str]:
    """Every acknowledged request has its row, and no row came from nowhere."""
    for id, acks in known.acks.items():
        created = sum(ack["created"] for ack in acks)
        if id not in known.tasks:
            yield f"task {id} was acknowledged and has no row"
        elif created > 1:
            yield f"task {id} was acknowledged as created {created} times"
    for id in known.tasks.keys() - known.acks.keys():
        parents = [one for one in known.by_attempt if one.id == known.tasks[id]["parent_id"]]
        if all(known.line(one, "end") is not None for one in parents):  # it was not cut off before it could tell
            yield f"task {id} has a row, and nobody was told of it"


# 2


def starts(known: Evidence) -> Iterable[str]:
    """No body starts twice for one attempt, and attempts of one task follow each other."""
    attempts: dict[int, list[int]] = defaultdict(list)
    for attempted, lines in known.by_attempt.items():
        times = [line for line in lines if line["what"] == "start"]
        if len(times) > 1:
            yield f"{_name(attempted)} started {len(times)} times, by PIDs {[one['pid'] for one in times]}"
        attempts[attempted.id].append(attempted.attempt)
    for id, numbers in attempts.items():
        for sooner, later in itertools.pairwise(sorted(numbers)):
            last = max(one["at"] for one in known.by_attempt[Attempted(id, sooner)] if one["what"] != "daemon")
            first = known.by_attempt[Attempted(id, later)][0]["at"]
            if last > first:
                yield f"task {id}: attempt {sooner} still ran {last - first:.3f} s after attempt {later} had begun"


def known_attempts(known: Evidence) -> Iterable[str]:
    """An attempt that began is in the rows: as the task's last one, or as an interruption."""
    for attempted in known.by_attempt:
        row = known.tasks.get(attempted.id)
        last = row is not None and row["attempt"] == attempted.attempt and row["status"] != "REQUEST"
        if known.line(attempted, "start") is not None and not last and attempted not in known.by_end:
            yield f"{_name(attempted)} began, and no row tells of it"


# 3


def ended(known: Evidence) -> Iterable[str]:
    """Each task has ended."""
    for id, row in known.tasks.items():
        if row["status"] not in ("DONE", "INTERRUPTED"):
            yield f"task {id} ({row['name']}) is still {row['status']}"


# 4


def done(known: Evidence) -> Iterable[str]:
    """DONE implies that the body came to its end before, and has its result."""
    for id, row in known.tasks.items():
        attempted = Attempted(id, row["attempt"])
        if row["status"] != "DONE":
            continue
        end = known.line(attempted, "end")
        seen = known.done_seen.get((id, row["attempt"]), math.inf)
        expected = [str(ack["n"]) for ack in known.acks.get(id, ()) if ack["created"]]
        if end is None:
            yield f"{_name(attempted)} is DONE, and its body never came to its end"
        elif seen < end["at"]:
            yield f"{_name(attempted)} was DONE {end['at'] - seen:.3f} s before its body came to its end"
        elif expected and row["result"] != expected[0]:
            yield f"{_name(attempted)} has the result {row['result']}, not {expected[0]}"


def done_is_final(known: Evidence) -> Iterable[str]:
    """What was once seen as DONE stays DONE."""
    for id, attempt in known.done_seen:
        row = known.tasks.get(id)
        if row is None or (row["status"], row["attempt"]) != ("DONE", attempt):
            yield f"task {id}, attempt {attempt}, was DONE and is not any more: {row and row['status']}"


# 5


def reasons(known: Evidence) -> Iterable[str]:
    """Each interruption has a cause, and its reason names it."""
    for attempted, row in known.by_end.items():
        sentence = _explained(known, attempted, row)
        if sentence is not None:
            told = f"{row['reason']} (exit code {row['exit_code']}, signal {row['signal']}; {row['detail']})"
            yield f"{_name(attempted)}, {told}: {sentence}; its lines: {_brief(known.by_attempt.get(attempted, ()))}"
    for id, row in known.tasks.items():
        attempted = Attempted(id, row["attempt"])
        if row["status"] != "INTERRUPTED" or attempted in known.by_end:
            continue
        after = [one for ack in known.acks.get(id, ()) for one in ack.get("after", ())]
        if row["reason"] == "CANCELLED" and id in known.cancelled:
            continue
        if row["reason"] == "DEPENDENCY" and any(_was_interrupted(known, one) for one in after):
            continue
        yield f"{_name(attempted)}, {row['reason']} before it began: nobody did that"


def _explained(known: Evidence, attempted: Attempted, row: Row) -> str | None:
    """Return why an interruption is not explained; None if it is."""
    raised = known.line(attempted, "raise")
    error = None if raised is None else raised["error"]
    leave, suicide, kill = known.line(attempted, "leave"), known.line(attempted, "suicide"), known.kill_of(attempted)
    facts = (row["exit_code"], row["signal"])
    in_vain = leave is None and suicide is None and kill is None and error != "SystemExit"
    explained: dict[str, Callable[[], bool]] = {
        "RAISED": lambda: raised is not None and _may_raise(known, raised),
        "DEADLOCKED": lambda: error == "Deadlock",
        "CANCELLED": lambda: _was_cancelled(known, row),
        "TIMED_OUT": lambda: known.tasks[attempted.id]["name"] == "bodies:late",
        "EXITED": lambda: facts == (leave["code"] if leave is not None else 3 if error == "SystemExit" else "", None),
        "SIGNALLED": lambda: (
            facts
            in {(None, signal.SIGKILL) if kill is not None else None, (None, suicide["signal"]) if suicide else None}
        ),
        "VANISHED": lambda: (
            not in_vain and known.fork_server_was_killed(attempted) and not _was_watched(known, attempted)
        ),
    }
    if row["reason"] not in explained:
        return "nobody can have done that"
    return None if explained[row["reason"]]() else "nothing that happened explains it"


def _may_raise(known: Evidence, raised: Line) -> bool:
    """Whether a body raised on purpose, or because the database was away for too long."""
    return raised["error"] == "BoomError" or (
        raised["error"] == "DatabaseError" and known.database_locked(raised["at"])
    )


def _was_cancelled(known: Evidence, row: Row) -> bool:
    """Whether somebody cancelled the task while this attempt ran."""
    since, until = known.mono(row["started_at"]) - ROW_SLACK_S, known.mono(row["ended_at"]) + ROW_SLACK_S
    cancels = [one for one in known.entries if one.what == "cancel" and one.task == row["task_id"]]
    return any(since <= one.until and one.at <= until for one in cancels)


def _was_watched(known: Evidence, attempted: Attempted) -> bool:
    """Whether one supervisor was there before the death and still there when it was told: it must have seen how."""
    seen = known.interrupted_seen.get((attempted.id, attempted.attempt))
    if seen is None or not known.kernel_tells:
        return False
    died = known.over(attempted)
    return any(begin + RETURNING_S <= died and seen <= finish for begin, finish in known.able)


def _was_interrupted(known: Evidence, id: int) -> bool:
    row = known.tasks.get(id)
    ever = any(attempted.id == id for attempted in known.by_end)
    return ever or row is None or row["status"] == "INTERRUPTED" or id in known.cancelled


# 6


@dataclasses.dataclass
class Latency:
    """From death to truth, in seconds: with a living supervisor, and from the start of a returning one."""

    living: list[float] = dataclasses.field(default_factory=list)
    returning: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"living supervisor {_figures(self.living)}; returning supervisor {_figures(self.returning)}"


def _figures(times: Sequence[float]) -> str:
    if not times:
        return "none"
    return f"median {statistics.median(times):.3f} s, max {max(times):.3f} s, of {len(times)}"


def able_spans(known: Evidence) -> list[Span]:
    """Return when a supervisor lived that neither stood still nor had its database locked: from, until."""
    found: list[Span] = []
    for life in known.lives:
        if life.ref.pid not in known.supervised:
            continue
        key = (life.ref.pid, life.ref.ticks)
        kill = known.kills.get(key)
        end = min(math.inf if life.ended_at is None else life.ended_at, math.inf if kill is None else kill.at)
        still = [(one.at, one.until) for one in known.entries if one.what == "stop" and (one.pid, one.ticks) == key]
        spans = [(life.started_at, end)]
        for since, until in [*known.away, *still]:
            cut = []
            for begin, finish in spans:
                if finish <= since or until <= begin:
                    cut.append((begin, finish))
                else:
                    cut += [(begin, since), (until, finish)]
            spans = [(begin, finish) for begin, finish in cut if finish > begin]
        found += spans
    return sorted(found)


def deaths(known: Evidence) -> Iterable[tuple[Attempted, float, float]]:
    """Return the attempts whose child chaos has killed: when, and when that was seen in the rows."""
    for attempted, row in known.by_end.items():
        kill = known.kill_of(attempted)
        seen = known.interrupted_seen.get((attempted.id, attempted.attempt))
        if kill is not None and seen is not None and row["reason"] in ("SIGNALLED", "VANISHED"):
            settled = known.line(attempted, "suicide", "leave", "raise")
            if settled is None:
                yield attempted, kill.at, seen


def latency(known: Evidence) -> Latency:
    """Return how long the truth took, where one able supervisor told it in one go."""
    found, spans = Latency(), known.able
    for _, died, seen in deaths(known):
        for begin, finish in spans:
            if begin <= died and seen <= finish and died - begin >= SETTLED_S:
                found.living.append(seen - died)
                break
            if died < begin and begin <= seen <= finish and not any(a <= died <= b for a, b in spans):
                found.returning.append(seen - begin)
                break
    return found


def promptness(known: Evidence) -> Iterable[str]:
    """The truth is told within the promised time by each supervisor that was able to."""
    spans = known.able
    for attempted, died, seen in deaths(known):
        for begin, finish in spans:
            fresh = died < begin + RETURNING_S  # it had just come, or could just go on, when the child died
            limit = (RETURNING_S if fresh else LIVING_S) * known.slack
            since = max(died, begin)
            if since + limit < min(finish, seen):
                yield f"{_name(attempted)} died, and {min(finish, seen) - since:.2f} s later no row said so"
                break


# 7, 9


def running_spans(known: Evidence, attempted: Attempted) -> list[Span]:
    """Return when a body ran and did not wait."""
    over, found, since = known.over(attempted), [], None
    for line in known.by_attempt[attempted]:
        if line["what"] in ("start", "on"):
            since = line["at"]
        elif since is not None and line["what"] in ("wait", *SETTLING):
            found.append((since, min(line["at"], over)))
            since = None
            if line["what"] in SETTLING:
                break
    if since is not None:
        found.append((since, over))
    return [(begin, finish) for begin, finish in found if begin < finish]


def most_at_once(spans: Iterable[Span]) -> int:
    """Return how many of *spans* overlapped at most."""
    steps = sorted((moment, step) for begin, finish in spans for moment, step in ((begin, 1), (finish, -1)))
    return max(itertools.accumulate(step for _, step in steps), default=0)


def slots(known: Evidence) -> Iterable[str]:
    """Never more bodies run than there are slots; those that wait do not count."""
    most = most_at_once(span for attempted in known.by_attempt for span in running_spans(known, attempted))
    if most > known.slots:
        yield f"{most} bodies ran at once in {known.slots} slots"


def permits(known: Evidence) -> Iterable[str]:
    """Never more hold a lock than it has permits."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for attempted, lines in known.by_attempt.items():
        taken: dict[str, float] = {}
        for line in lines:
            if line["what"] == "take":
                taken[line["name"]] = line["at"]
            elif line["what"] == "give":
                spans[line["name"]].append((taken.pop(line["name"]), line["at"]))
        for name, since in taken.items():
            spans[name].append((since, max(since, known.over(attempted))))
    for name, found in spans.items():
        most = most_at_once(found)
        if most > PERMITS[name]:
            yield f"{most} held the lock {name!r}, which has {PERMITS[name]} permits"


def barriers(known: Evidence) -> Iterable[str]:
    """Nobody passes a barrier before all have arrived."""
    arrived: dict[str, list[Line]] = defaultdict(list)
    for line in known.lines:
        if line["what"] == "arrive":
            arrived[line["scope"]].append(line)
    for scope, parties in arrived.items():
        for line in parties:
            attempted = Attempted(line["id"], line["attempt"])
            on = known.line(attempted, "on")
            if on is not None and on["how"] == "value":
                here = {one["id"] for one in parties if one["at"] <= on["at"]}
                if len(here) < line["parties"]:
                    yield f"{_name(attempted)} passed the barrier of {scope!r} with {len(here)} of {line['parties']}"


def unique(known: Evidence) -> Iterable[str]:
    """Tasks with the same unique key never run at once."""
    spans: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for attempted in known.by_attempt:
        row = known.tasks.get(attempted.id)
        start = known.line(attempted, "start")
        if row is not None and row["unique_key"] is not None and start is not None:
            spans[row["name"], row["unique_key"]].append((start["at"], max(start["at"], known.over(attempted))))
    for key, found in spans.items():
        if most_at_once(found) > 1:
            yield f"two tasks with the unique key {key} ran at once"


# What bodies, producers and supervisors say themselves


def sayings(known: Evidence) -> Iterable[str]:
    """Values that were waited for are right, and nothing failed that should not."""
    expected = {"BoomError", "SystemExit", "Cancelled", "Deadlock"}
    for line in known.lines:
        if line["what"] == "wrong":
            yield f"task {line['id']} waited for {line['expected']} and got {line['value']}"
        elif line["what"] in ("raise", "refused") and line["error"] not in expected:
            locked = line["error"] == "DatabaseError" and known.database_locked(line["at"])
            if not locked:
                yield f"{line['what']} in task {line.get('id')}: {line['error']}: {line['text']}"


def exits(known: Evidence) -> Iterable[str]:
    """No supervisor fails by itself."""
    for life in known.lives:
        killed = (life.ref.pid, life.ref.ticks) in known.kills
        failed = life.status not in (0, None) and not (killed and life.status == -signal.SIGKILL)
        if failed and not (life.ended_at is not None and known.database_locked(life.ended_at)):
            yield f"a supervisor, PID {life.ref.pid}, left with {life.status}"


# 8, 11


def leftovers(known: Evidence) -> Iterable[str]:
    """Nothing is left."""
    yield from known.leftovers


CHECKS: tuple[Callable[[Evidence], Iterable[str]], ...] = (
    requests, starts, known_attempts, ended, done, done_is_final, reasons, promptness, slots, permits, barriers, unique,
    sayings, exits, leftovers,
)  # fmt: skip


def violations(known: Evidence) -> list[str]:
    """Return all that is not as it must be."""
    return [f"{check.__name__}: {sentence}" for check in CHECKS for sentence in check(known)]


def counts(known: Evidence) -> dict[str, Counter[str]]:
    """Return what was done, and what became of the tasks."""
    return {
        "deeds": Counter(f"{one.what} {one.whom}" for one in known.entries),
        "tasks": Counter(row["status"] for row in known.tasks.values()),
        "interruptions": Counter(row["reason"] for row in known.interruptions),
    }


def _name(attempted: Attempted) -> str:
    return f"task {attempted.id}, attempt {attempted.attempt}"


def _brief(lines: Iterable[Line]) -> str:
    return ", ".join(f"{line['what']} {line['at']:.3f}" for line in lines) or "none"
