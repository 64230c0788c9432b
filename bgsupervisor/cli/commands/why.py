"""`bgsupervisor why`: why a task does not run, or does not go on."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from bgsupervisor.cli.display import waiting
from bgsupervisor.cli.display.columns import Facts, percent
from bgsupervisor.cli.display.output import print_json, say, to_json
from bgsupervisor.cli.display.rows import Rows, Ties
from bgsupervisor.cli.display.text import age, duration, local
from bgsupervisor.cli.session import Session, pass_session
from bgsupervisor.errors import UnknownTask
from bgsupervisor.sanitize import clean
from bgsupervisor.statuses import Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bgsupervisor.ledger.records import TaskRecord
    from bgsupervisor.service import Service

__all__ = ["Because", "because", "why"]


@dataclass(frozen=True, slots=True)
class Because:
    """One reason: its kind and facts for programs, its sentence for people."""

    kind: str
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)


@click.command()
@click.argument("id", type=int)
@click.option("--json", "as_json", is_flag=True, help="One object; times are in UTC.")
@pass_session
def why(session: Session, *, id: int, as_json: bool) -> None:
    """Say why a task is not running, or not going on."""
    service = session.existing_service()
    if service is None:
        raise UnknownTask(id)
    with service.ledger.store.looking():  # the task, its place and what it waits for, as of one moment
        record = service.ledger.get(id)
        if record is None:
            raise UnknownTask(id)
        found = because(record, service)
    if as_json:
        told = [{"kind": one.kind, "sentence": one.sentence, **one.facts} for one in found]
        print_json({"id": id, "status": record.status, "because": told})
        return
    for number, one in enumerate(found):
        ref = f"task {id} is {record.status}" if number == 0 else "also"
        say(clean(f"{ref}: {one.sentence}"))


def because(record: TaskRecord, service: Service) -> list[Because]:
    """Return all that keeps a task from going on, never nothing; what must change first comes first."""
    clock = service.ledger.clock
    store = service.ledger.store
    rows, ties = Rows(store=store, now=clock.now()), Ties(store)
    causes = ties.causes([record])
    facts = Facts.gather(service, positions=rows.positions(), clock=clock, causes=causes)
    if record.ended:
        return [_ended(record, facts)]
    needs = waiting.gathered(causes.get(record.id, ()))
    ids = {id for need in needs for id in (*need.ids, *need.held_by)}
    sight = _Sight(record, facts, rows.busy(), ties, {one.id: one for one in rows.of(ids)})
    if record.status is Status.REQUEST:
        return list(sight.not_started(needs)) or [Because("nothing", "nothing keeps it; it will start at once")]
    return list(sight.not_going_on(needs)) or [sight.running()]


def _ended(record: TaskRecord, facts: Facts) -> Because:
    when = "" if record.ended_at is None else f" {age(record.ended_at, now=facts.now)}"
    runtime_s = facts.runtime_s(record)
    words = f"it ended{when}"
    if runtime_s is not None:
        words += f", after {duration(runtime_s)}"
    if record.reason is not None:
        words += f": {record.reason}" + (f", {clean(record.detail)}" if record.detail else "")
    reason = None if record.reason is None else str(record.reason)
    return Because("ended", words, {"ended_at": to_json(record.ended_at), "reason": reason, "detail": record.detail})


@dataclass(frozen=True, slots=True)
class _Sight:
    """A live task and what is known around it; *others* are the tasks that it waits for, by id."""

    record: TaskRecord
    facts: Facts
    busy: int
    ties: Ties
    others: Mapping[int, TaskRecord]

    # Not started

    def not_started(self, needs: list[waiting.WaitReason]) -> Iterator[Because]:
        """Yield why it has not started."""
        if self.record.unreadable:
            columns = ", ".join(self.record.unreadable)
            yield Because("unreadable", f"its row cannot be read: {columns}", {"columns": list(self.record.unreadable)})
        yield from self._supervisors()
        yield from self._code()
        record, now = self.record, self.facts.now
        if record.run_at > now:
            told = f"it is due {age(record.run_at, now=now)}, at {local(record.run_at, now=now)}"
            yield Because("not_due", told, {"run_at": to_json(record.run_at)})
        for need in needs:
            told = f"it comes {need.what()}; task {need.ids[0]} is {self._state(need.ids[0])}"
            yield Because("after", told, {"task_ids": list(need.ids), "task_status": self._status(need.ids[0])})
        if record.run_at <= now and not needs:
            yield from self._slots()

    def _supervisors(self) -> Iterator[Because]:
        seen, now = self.facts.watch, self.facts.now
        if not seen.alive:
            stopped = seen.stopped
            known = {"since": to_json(seen.seen_at), "stopped_by": None if stopped is None else stopped.by}
            told = seen.absence(now=now)
            is_there = seen.stopped is None and (seen.unheard is not None or seen.still is not None)
            told = told if is_there else f"no supervisor is alive: {told}"
            yield Because("no_supervisor", told, known)
        elif seen.stopped is not None:
            told = f"the supervisor starts nothing more, it is to {seen.stopped.mode}: {seen.absence(now=now)}"
            yield Because("draining", told, {"mode": seen.stopped.mode, "stopped_by": seen.stopped.by})
        elif seen.catalogue is None:
            yield Because("loading", "the supervisor is still loading its tasks")

    def _code(self) -> Iterator[Because]:
        seen, name = self.facts.watch, self.record.name
        if not seen.lacks(name):
            return
        own = [failure for failure in seen.failures if failure.concerns(name)]
        if own:
            told = "; ".join(map(str, own))
        else:
            near = difflib.get_close_matches(name, seen.catalogue or (), n=1)
            hint = f" (did you mean {clean(near[0])}?)" if near else ""
            which = "no configured module that loaded" if seen.failures else "no configured module"
            told = f"{which} has a task of this name{hint}"
        known = {"failures": [{"kind": one.kind, "module": one.name, "error": one.line} for one in own]}
        yield Because(
            "code_missing", f"no supervisor has code for {clean(name)}: {told}; see `bgsupervisor check`", known
        )

    def _slots(self) -> Iterator[Because]:
        slots = sum(one.slots for one in self.facts.watch.alive)
        if not slots or self.busy < slots:
            return
        place = self.facts.positions.get(self.record.id)
        told = f"it has place {place} in the queue" if place else f"over {len(self.facts.positions)} go before it"
        words = f"the slots are full, {self.busy} of {slots}; {told}"
        yield Because("slots_full", words, {"busy": self.busy, "slots": slots, "position": place})

    # Started, and not going on

    def not_going_on(self, needs: list[waiting.WaitReason]) -> Iterator[Because]:
        """Yield what keeps a running body; nothing if it just runs."""
        record = self.record
        for need in needs:
            yield self._need(need)
        if record.ending is not None:
            yield Because("ending", f"it is being ended: {record.ending}", {"reason": str(record.ending)})
        elif record.cancel_requested_at is not None:
            by = f" by {clean(record.cancel_requested_by)}" if record.cancel_requested_by else ""
            when = age(record.cancel_requested_at, now=self.facts.now)
            told = f"its end was asked for{by} {when}"
            yield Because("ending", told, {"reason": "CANCELLED", "by": record.cancel_requested_by})
        elif self.facts.suspension(record):
            yield self._suspended()
        if self.facts.silence(record):
            yield dataclasses.replace(self.running(), kind="unresponsive")
            if not self.facts.watch.alive:
                yield from self._supervisors()

    def _suspended(self) -> Because:
        record = self.record
        suspended_for_s = self.facts.suspended_for_s(record)
        does = "has been" if suspended_for_s is not None else "is"
        told = f"it {does} {self.facts.suspension(record)}; `bgsupervisor resume {record.id}` lets it go on"
        known = {"since": to_json(record.suspended_at), "by": record.suspend_requested_by}
        return Because("suspended", told, known)

    def running(self) -> Because:
        """Say that it runs: since when, how far it is, and when it was last heard."""
        record, facts = self.record, self.facts
        runtime_s = facts.runtime_s(record)
        words = "it is running"
        if runtime_s is not None:
            words = f"it has been running for {duration(runtime_s)}"
        if record.fraction is not None:
            words += f", {percent(record.fraction)}% done"
        silence = facts.silence(record)
        if silence:
            words += f", {silence}"
        elif record.heartbeat_at is not None:
            words += f", last heard {age(record.heartbeat_at, now=facts.now)}"
        known = {"runtime_s": runtime_s, "fraction": record.fraction, "heartbeat_at": to_json(record.heartbeat_at)}
        return Because("running", words, known)

    def _need(self, need: waiting.WaitReason) -> Because:
        known: dict[str, Any] = {"since": to_json(need.since)}
        age_words = need.age(now=self.facts.now)
        waits = f"it has waited {age_words} {'at' if need.kind == 'barrier' else 'for'} {need.what()}"
        if need.kind in ("part", "end"):
            first = need.ids[0]
            which = (
                f", which is {self._state(first)}" if len(need.ids) == 1 else f"; task {first} is {self._state(first)}"
            )
            known |= {"task_ids": list(need.ids), "task_status": self._status(first)}
            if need.kind == "part":
                known["part"] = need.name
            return Because(need.kind, f"{waits}{which}", known)
        if need.kind == "lock":
            known |= {"lock": need.name, "held_by": list(need.held_by)}
            holder = f"; task {need.held_by[0]} is {self._state(need.held_by[0])}" if need.held_by else ""
            return Because("lock", f"{waits}{holder}", known)
        if need.kind == "barrier":
            return self._barrier(need, known, waits)
        slots = sum(one.slots for one in self.facts.watch.alive)
        taken = f": {self.busy} of {slots} are taken" if slots else ""
        return Because("slot", f"it has what it waited for, and has waited {age_words} for a slot{taken}", known)

    def _barrier(self, need: waiting.WaitReason, known: dict[str, Any], waits: str) -> Because:
        arrived = self.ties.arrived(self.record.id, need.name)
        there = ""
        if arrived is not None:
            there = f": {arrived[0]} of {arrived[1]} parties are there"
            known |= {"arrived": arrived[0], "parties": arrived[1]}
        return Because("barrier", f"{waits}{there}", {**known, "barrier": need.name})

    # Other tasks

    def _status(self, id: int) -> str | None:
        other = self.others.get(id)
        return None if other is None else str(other.status)

    def _state(self, id: int) -> str:
        other = self.others.get(id)
        if other is None:
            return "gone"
        words = str(other.status) + (f" / {other.reason}" if other.reason is not None else "")
        if other.status is not Status.START:
            return words
        runtime_s = self.facts.runtime_s(other)
        words += "" if other.fraction is None else f" {percent(other.fraction)}%"
        words += "" if runtime_s is None else f", running for {duration(runtime_s)}"
        suspension = self.facts.suspension(other)
        return words + (f", {suspension}" if suspension else "")
