"""Why a task does not run, or does not go on: in sentences for `why`, in a few words for the cells of listings."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bgsupervisor.cli.display.output import by, to_json
from bgsupervisor.cli.display.snapshot import percent
from bgsupervisor.cli.display.text import age, duration, local
from bgsupervisor.sanitize import clean
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bgsupervisor.cli.display.snapshot import Snapshot
    from bgsupervisor.cli.display.waiting import WaitReason
    from bgsupervisor.ledger.records import TaskRecord

__all__ = ["Because", "explain", "hindrance", "waits_to_start"]


@dataclass(frozen=True, slots=True)
class Because:
    """One reason: its kind and facts for programs, its sentence for people."""

    kind: str
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)


def explain(record: TaskRecord, snapshot: Snapshot) -> list[Because]:
    """Return all that keeps a task from going on, never nothing; what must change first comes first.

    Args:
        record: The task.
        snapshot: What `Snapshot.around` has read for it.
    """
    if record.ended:
        return [_ended(record, snapshot)]
    if record.status is Status.REQUEST:
        return list(_not_started(record, snapshot)) or [Because("nothing", "nothing delays it; it will start at once")]
    return list(_not_going_on(record, snapshot)) or [_running(record, snapshot)]


def waits_to_start(record: TaskRecord, snapshot: Snapshot) -> str:
    """Return in a few words what a waiting task waits for; "" if only for a slot."""
    if snapshot.supervisors.lacks(record.name):
        return "code missing"
    due = [f"due {age(record.run_at, now=snapshot.now)}"] if record.run_at > snapshot.now else []
    return ", ".join([*due, *(wait.what() for wait in snapshot.waits(record))])


def hindrance(record: TaskRecord, snapshot: Snapshot) -> str:
    """Return in a few words what is unusual about a running task: silence, its coming end, a suspension."""
    words = [snapshot.silence(record)]
    if record.ending is not None:
        words.append(f"ending: {record.ending}")
    elif record.cancel_requested_at is not None:
        words.append("cancel requested")
    else:
        words.append(snapshot.suspension(record))
    return ", ".join(filter(None, words))


def _ended(record: TaskRecord, snapshot: Snapshot) -> Because:
    words = "it ended" if record.ended_at is None else f"it ended {age(record.ended_at, now=snapshot.now)}"
    runtime_s = snapshot.runtime_s(record)
    if runtime_s is not None:
        words += f", after {duration(runtime_s)}"
    if record.reason is not None:
        words += f": {record.reason}" + (f", {clean(record.detail)}" if record.detail else "")
    reason = None if record.reason is None else str(record.reason)
    return Because("ended", words, {"ended_at": to_json(record.ended_at), "reason": reason, "detail": record.detail})


# Not started


def _not_started(record: TaskRecord, snapshot: Snapshot) -> Iterator[Because]:
    if record.unreadable:
        columns = ", ".join(record.unreadable)
        yield Because("unreadable", f"its row cannot be read: {columns}", {"columns": list(record.unreadable)})
    yield from _supervision(snapshot)
    yield from _code(record.name, snapshot)
    now, waits = snapshot.now, snapshot.waits(record)
    if record.run_at > now:
        due = f"it is due {age(record.run_at, now=now)}, at {local(record.run_at, now=now)}"
        yield Because("not_due", due, {"run_at": to_json(record.run_at)})
    for wait in waits:
        first = wait.ids[0]
        sentence = f"it comes {wait.what()}; task {first} is {snapshot.state(first)}"
        yield Because("after", sentence, _others(wait, snapshot))
    if record.run_at <= now and not waits:
        yield from _slots(record, snapshot)


def _supervision(snapshot: Snapshot) -> Iterator[Because]:
    seen = snapshot.supervisors
    stopped_by = None if seen.stop is None else seen.stop.by
    if not seen.alive:
        is_there = seen.stop is None and (seen.unheard is not None or seen.stuck is not None)
        sentence = seen.absence() if is_there else f"no supervisor is alive: {seen.absence()}"
        yield Because("no_supervisor", sentence, {"since": to_json(seen.seen_at), "stopped_by": stopped_by})
    elif seen.stop is not None:
        sentence = f"the supervisor starts nothing more and will {seen.stop.mode}: {seen.absence()}"
        yield Because("draining", sentence, {"mode": seen.stop.mode, "stopped_by": stopped_by})
    elif seen.catalogue is None:
        yield Because("loading", "the supervisor is still loading its tasks")


def _code(name: str, snapshot: Snapshot) -> Iterator[Because]:
    seen = snapshot.supervisors
    if not seen.lacks(name):
        return
    own = [failure for failure in seen.failures if failure.concerns(name)]
    cause = "; ".join(map(str, own))
    if not own:
        near = difflib.get_close_matches(name, seen.catalogue or (), n=1)
        hint = f" (did you mean {clean(near[0])}?)" if near else ""
        which = "no configured module that loaded" if seen.failures else "no configured module"
        cause = f"{which} has a task of this name{hint}"
    facts = {"failures": [{"kind": one.kind, "module": one.name, "error": one.line} for one in own]}
    sentence = f"no supervisor has code for {clean(name)}: {cause}; see `bgsupervisor check`"
    yield Because("code_missing", sentence, facts)


def _slots(record: TaskRecord, snapshot: Snapshot) -> Iterator[Because]:
    busy, slots = snapshot.busy, snapshot.supervisors.slots
    if not slots or busy < slots:
        return
    place = snapshot.positions.get(record.id)
    queued = f"it has place {place} in the queue" if place else f"over {len(snapshot.positions)} go before it"
    sentence = f"the slots are full, {busy} of {slots}; {queued}"
    yield Because("slots_full", sentence, {"busy": busy, "slots": slots, "position": place})


# Started, and not going on


def _not_going_on(record: TaskRecord, snapshot: Snapshot) -> Iterator[Because]:
    for wait in snapshot.waits(record):
        yield _waiting(wait, snapshot)
    if record.ending is not None:
        yield Because("ending", f"it is being ended: {record.ending}", {"reason": str(record.ending)})
    elif record.cancel_requested_at is not None:
        when = age(record.cancel_requested_at, now=snapshot.now)
        sentence = f"its end was requested{by(record.cancel_requested_by)} {when}"
        yield Because("ending", sentence, {"reason": "CANCELLED", "by": record.cancel_requested_by})
    elif suspension := snapshot.suspension(record):
        sentence = f"{'it has been ' if record.suspended_at else ''}{suspension}; "
        sentence += f"`bgsupervisor resume {record.id}` continues it"
        facts = {"since": to_json(record.suspended_at), "by": record.suspend_requested_by}
        yield Because("suspended", sentence, facts)
    if snapshot.silence(record):
        yield replace(_running(record, snapshot), kind="unresponsive")
        if not snapshot.supervisors.alive:
            yield from _supervision(snapshot)


def _running(record: TaskRecord, snapshot: Snapshot) -> Because:
    """Describe a running task: since when, how far it is, and when it was last heard."""
    runtime_s, silence = snapshot.runtime_s(record), snapshot.silence(record)
    words = "it is running" if runtime_s is None else f"it has been running for {duration(runtime_s)}"
    if record.fraction is not None:
        words += f", {percent(record.fraction)}% done"
    if silence:
        words += f", {silence}"
    elif record.heartbeat_at is not None:
        words += f", last heard {age(record.heartbeat_at, now=snapshot.now)}"
    facts = {"runtime_s": runtime_s, "fraction": record.fraction, "heartbeat_at": to_json(record.heartbeat_at)}
    return Because("running", words, facts)


def _waiting(wait: WaitReason, snapshot: Snapshot) -> Because:
    waited = wait.age(now=snapshot.now)
    sentence = f"it has waited {waited} {'at' if wait.kind == 'barrier' else 'for'} {wait.what()}"
    facts: dict[str, Any] = {"since": to_json(wait.since)}
    if wait.kind in ("part", "end"):
        facts |= _others(wait, snapshot) | ({"part": wait.name} if wait.kind == "part" else {})
        first = wait.ids[0]
        sentence += ", which is" if len(wait.ids) == 1 else f"; task {first} is"
        sentence += f" {snapshot.state(first)}"
    elif wait.kind == "lock":
        facts |= {"lock": wait.name, "held_by": list(wait.held_by)}
        if wait.held_by:
            sentence += f"; task {wait.held_by[0]} is {snapshot.state(wait.held_by[0])}"
    elif wait.kind == "barrier":
        arrived = snapshot.arrived.get(wait.name)
        if arrived is not None:
            facts |= {"arrived": arrived[0], "parties": arrived[1]}
            sentence += f": {arrived[0]} of {arrived[1]} parties are there"
        facts["barrier"] = wait.name
    else:
        slots = snapshot.supervisors.slots
        taken = f": {snapshot.busy} of {slots} are taken" if slots else ""
        sentence = f"it has what it waited for, and has waited {waited} for a slot{taken}"
    return Because(wait.kind, sentence, facts)


def _others(wait: WaitReason, snapshot: Snapshot) -> dict[str, Any]:
    other = snapshot.others.get(wait.ids[0])
    return {"task_ids": list(wait.ids), "task_status": None if other is None else str(other.status)}
