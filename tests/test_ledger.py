"""The rows: every transition from every status, the laws that the database holds, and what claims cost."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import peewee
import psycopg
import psycopg.rows
import pytest
from conftest import only_postgres, only_sqlite
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from postgres_server import empty

from bgsupervisor import ledger as ledger_module
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import AlreadyLive, DatabaseError, NotRetryable, NotSuspendable, UnknownTask
from bgsupervisor.ledger import TRANSITIONS, Attempt, Batch, Claim, Due, Ending, Ledger, Note, Request, Suspension, Wish
from bgsupervisor.models import Store, SupervisorRecord, UtcField
from bgsupervisor.postgres import lock_key
from bgsupervisor.processes import ProcessIdentity
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.wire import End

SOURCE = str(Path(ledger_module.__file__).parents[1])
START_OF_TIME = datetime(2030, 6, 1, 12, 0, 0, 123456, tzinfo=UTC)
HALF_A_PAIR = "\ud800"
"""Text that Python holds and no database stores."""


class HandClock:
    """Time stands still until a test moves it."""

    def __init__(self):
        self.moment = START_OF_TIME

    def now(self):
        return self.moment

    def monotonic(self):
        return (self.moment - START_OF_TIME).total_seconds()

    def sleep(self, seconds):
        self.moment += timedelta(seconds=seconds)


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def ledger(store, clock):
    return Ledger(store, clock)


@pytest.fixture
def raw(store):
    """A connection of somebody else, who writes SQL by hand, with question marks for values."""
    with store.connected():
        pass  # the tables are made
    raw = RawSqlite(store) if store.path else RawPostgres(store)
    yield raw
    raw.connection.close()


class RawSqlite:
    refused = sqlite3.IntegrityError

    def __init__(self, store):
        self.connection = sqlite3.connect(store.path, isolation_level=None, timeout=0)
        self.connection.row_factory = sqlite3.Row

    def execute(self, sql, values=()):
        return self.connection.execute(sql, values).fetchall()

    def execute_many(self, sql, values):
        self.connection.executemany(sql, values)

    def hold_off_others(self):
        self.connection.execute("BEGIN IMMEDIATE")

    def let_others(self):
        self.connection.execute("COMMIT")

    def indexes(self):
        found = self.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL")
        return {name for (name,) in found if "schema_migration" not in name}

    def columns(self, table):
        return [row[1] for row in self.execute(f"PRAGMA table_info({table})")]


class RawPostgres:
    refused = psycopg.Error

    def __init__(self, store):
        self.connection = psycopg.connect(store.database.url, autocommit=True, row_factory=psycopg.rows.dict_row)
        self.lock = lock_key("bgsupervisor_")

    def execute(self, sql, values=()):
        cursor = self.connection.execute(sql.replace("?", "%s"), values)
        return cursor.fetchall() if cursor.description else []

    def hold_off_others(self):
        self.execute(f"SELECT pg_advisory_lock({self.lock})")

    def let_others(self):
        self.execute(f"SELECT pg_advisory_unlock({self.lock})")

    def indexes(self):
        found = self.execute("SELECT indexname FROM pg_indexes WHERE schemaname = current_schema()")
        names = {row["indexname"] for row in found if "schema_migration" not in row["indexname"]}
        return {name for name in names if not name.endswith("_pkey")}

    def columns(self, table):
        ask = "SELECT column_name FROM information_schema.columns WHERE table_name = ? ORDER BY ordinal_position"
        return [row["column_name"] for row in self.execute(ask, [table])]


def identity_of(pid=100):
    return ProcessIdentity("here", "boot", 1, pid, pid * 10)


def claim_of(attempt, *, slot, pid=100):
    due = Due(attempt.id, attempt.attempt, "a:b", "{}", None)
    return Claim(due, identity_of(pid), slot, 5.0)


_slots = itertools.count()


def attempt_of(record):
    return Attempt(record.id, record.attempt)


def request(ledger, name="a:b", **more):
    return ledger.request(Request(name=name, data="{}", **more))[0]


def claim(ledger, id, **more):
    attempt = attempt_of(ledger.get(id))
    more.setdefault("slot", next(_slots))
    (claimed,) = ledger.apply(Batch(claims=[claim_of(attempt, **more)])).claimed
    return claimed.attempt


def started(ledger, **more):
    return claim(ledger, request(ledger, **more))


def task_in(ledger, status, **more):
    """Record a task, bring it into *status* as its users would, and return its attempt."""
    id = request(ledger, **more)
    if status is Status.REQUEST:
        return attempt_of(ledger.get(id))
    attempt = claim(ledger, id)
    if status is Status.DONE:
        assert ledger.end(attempt, End(result="1"))
    elif status is Status.INTERRUPTED:
        assert ledger.end(attempt, End(reason=Reason.RAISED, detail="it raised"))
    assert ledger.get(id).status is status
    return attempt


def rows(raw, table="task"):
    return [dict(row) for row in raw.execute(f"SELECT * FROM bgsupervisor_{table} ORDER BY 1")]


# ---- the transition table, cell by cell ----


def _retry(ledger, attempt):
    try:
        ledger.retry(attempt.id)
    except NotRetryable:
        return False
    return True


def _request(ledger, attempt):
    assert ledger.request(Request(name="a:b", data="{}")) != (attempt.id, True)
    return False  # it makes a row and touches no other


EVENTS = {
    "request": _request,
    "claim": lambda ledger, a: bool(ledger.apply(Batch(claims=[claim_of(a, slot=next(_slots))])).claimed),
    "unclaim": lambda ledger, a: bool(ledger.apply(Batch(unclaims={a})).unclaimed),
    "finish": lambda ledger, a: ledger.end(a, End(result="2")),
    "interrupt": lambda ledger, a: ledger.end(a, End(reason=Reason.SIGNALLED, signal=9, detail="killed")),
    "withdraw": lambda ledger, a: ledger.cancel(a.id, by="jana").reason == Reason.CANCELLED,
    "retry": _retry,
}
HAS_NO_ATTEMPT = {"request", "withdraw", "retry"}
"""People name a task, not an attempt: what they ask for is judged by the row as it is."""


def test_the_table_names_every_event_and_the_tests_know_them_all():
    assert [transition.event for transition in TRANSITIONS] == list(EVENTS)


def test_the_table_of_the_design_is_the_table_of_the_code():
    assert {t.event: (set(t.sources), t.target) for t in TRANSITIONS} == {
        "request": (set(), Status.REQUEST),
        "claim": ({Status.REQUEST}, Status.START),
        "unclaim": ({Status.START}, Status.REQUEST),
        "finish": ({Status.START}, Status.DONE),
        "interrupt": ({Status.START}, Status.INTERRUPTED),
        "withdraw": ({Status.REQUEST}, Status.INTERRUPTED),
        "retry": ({Status.INTERRUPTED}, Status.REQUEST),
    }


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("transition", TRANSITIONS, ids=lambda transition: transition.event)
def test_an_event_moves_a_row_as_the_table_says_or_not_at_all(ledger, raw, transition, status):
    attempt = task_in(ledger, status)
    (before,) = rows(raw)
    moved = EVENTS[transition.event](ledger, attempt)
    after = rows(raw)[0]
    if status in transition.sources:
        assert moved
        assert after["status"] == transition.target
        assert after["attempt"] == before["attempt"] + (transition.event == "claim")
    elif transition.event == "withdraw" and status is Status.START:
        assert not moved  # a running task is only marked, for its supervisor to end
        assert {key for key in before if before[key] != after[key]} == {"cancel_requested_at", "cancel_requested_by"}
    else:
        assert not moved
        assert after == before


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("drift", [-1, 1], ids=["earlier", "later"])
@pytest.mark.parametrize("event", sorted(EVENTS.keys() - HAS_NO_ATTEMPT))
def test_an_event_of_another_attempt_changes_nothing_in_any_status(ledger, raw, event, drift, status):
    attempt = task_in(ledger, status)
    before = rows(raw)
    other = Attempt(attempt.id, attempt.attempt + drift)
    assert not EVENTS[event](ledger, other)
    outcome = ledger.apply(
        Batch(notes={other: Note(progress_done=0.5)}, endings={other: Ending(other, Reason.TIMED_OUT, "too long")})
    )
    assert not outcome.endings
    assert rows(raw) == before


@pytest.mark.parametrize("status", [Status.REQUEST, Status.DONE, Status.INTERRUPTED])
def test_notes_and_endings_reach_running_rows_only(ledger, raw, status):
    attempt = task_in(ledger, status)
    before = rows(raw)
    note, ending = Note(message="late"), Ending(attempt, Reason.TIMED_OUT, "too long")
    assert not ledger.apply(Batch(notes={attempt: note}, endings={attempt: ending})).endings
    assert rows(raw) == before


def test_done_is_final(ledger, raw):
    attempt = task_in(ledger, Status.DONE)
    before = rows(raw)
    for event in EVENTS.keys() - {"request"}:
        assert not EVENTS[event](ledger, attempt), event
    assert rows(raw) == before


def test_the_attempt_grows_with_each_claim_and_never_falls(ledger):
    id = request(ledger)
    seen = [ledger.get(id).attempt]
    for _ in range(3):
        attempt = claim(ledger, id)
        ledger.apply(Batch(unclaims={attempt}))
        seen.append(ledger.get(id).attempt)
        attempt = claim(ledger, id)
        ledger.end(attempt, End(reason=Reason.RAISED))
        ledger.retry(id)
        seen.append(ledger.get(id).attempt)
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    assert ledger.get(id).tries == 3  # interrupted attempts only


def test_the_earlier_attempt_cannot_write_into_the_next(ledger):
    first = started(ledger)
    ledger.apply(Batch(unclaims={first}))
    second = claim(ledger, first.id, pid=200)
    assert not ledger.end(first, End(result="1"))
    assert not ledger.apply(Batch(unclaims={first})).unclaimed
    assert ledger.end(second, End(result="2"))
    assert ledger.get(first.id).result == "2"


# ---- what a transition writes beside the status ----


def test_a_claim_writes_who_runs_it_and_where(ledger, clock):
    id = request(ledger)
    clock.sleep(3)
    claim(ledger, id, slot=7, pid=4711)
    record = ledger.get(id)
    assert (record.host, record.boot_id, record.pid_ns) == ("here", "boot", 1)
    assert (record.pid, record.start_ticks) == (4711, 47110)
    assert (record.slot, record.attempt, record.started_mono) == (7, 1, 5.0)
    assert record.started_at == record.heartbeat_at == clock.now()


def test_an_end_writes_the_result_and_frees_the_slot(ledger, clock):
    attempt = started(ledger)
    ledger.apply(Batch(notes={attempt: Note(cpu_percent=50.0, rss_bytes=10, peak_rss_bytes=500, progress_done=1.0)}))
    clock.sleep(2)
    end = End(result="[1]", cpu_s=0.5, peak_rss_bytes=400, progress_done=3.0, progress_total=4.0, message="ready")
    assert ledger.end(attempt, end)
    record = ledger.get(attempt.id)
    assert (record.result, record.cpu_s, record.progress_done, record.progress_total) == ("[1]", 0.5, 3.0, 4.0)
    assert (record.message, record.slot, record.cpu_percent, record.rss_bytes) == ("ready", None, None, None)
    assert record.peak_rss_bytes == 500  # the larger of what was sampled and what the child knew
    assert record.ended_at == clock.now()
    assert record.reason is record.detail is None
    assert record.tries == 0


def test_an_interruption_is_kept_when_the_task_is_retried(ledger, raw, clock):
    attempt = started(ledger, key="k")
    ledger.apply(Batch(notes={attempt: Note(progress_done=1.0, message="half")}))
    end = End(reason=Reason.SIGNALLED, detail="killed by SIGKILL", signal=9, error="trace", exit_code=None)
    assert ledger.end(attempt, end)
    clock.sleep(60)
    record = ledger.retry(attempt.id)
    assert (record.status, record.key, record.data, record.run_at) == (Status.REQUEST, "k", "{}", clock.now())
    for column in ledger_module._ATTEMPT_COLUMNS:
        assert getattr(record, column) is None, column
    (kept,) = ledger.interruptions(attempt.id)
    assert (kept["attempt"], kept["reason"], kept["detail"]) == (1, "SIGNALLED", "killed by SIGKILL")
    assert (kept["signal"], kept["error"], kept["host"], kept["pid"]) == (9, "trace", "here", 100)
    assert kept["started_at"] == kept["ended_at"] == START_OF_TIME


def test_an_end_leaves_out_what_it_does_not_know(ledger):
    attempt = started(ledger)
    ledger.apply(Batch(notes={attempt: Note(progress_done=0.0, progress_total=9.0, message="begun", cpu_s=1.5)}))
    ledger.end(attempt, End(reason=Reason.VANISHED, detail="gone"))
    record = ledger.get(attempt.id)
    assert (record.progress_done, record.progress_total, record.message, record.cpu_s) == (0.0, 9.0, "begun", 1.5)


def test_a_reason_that_was_recorded_before_the_death_wins_over_what_the_death_looks_like(ledger):
    attempt = started(ledger)
    ending = Ending(attempt, Reason.TIMED_OUT, "ran past its timeout_s")
    assert ledger.apply(Batch(endings={attempt: ending})).endings == {attempt}
    ledger.end(attempt, End(reason=Reason.SIGNALLED, detail="killed by SIGKILL", signal=9))
    record = ledger.get(attempt.id)
    assert (record.reason, record.detail, record.signal) == (Reason.TIMED_OUT, "ran past its timeout_s", 9)
    assert ledger.interruptions(attempt.id)[0]["reason"] == "TIMED_OUT"


def test_a_body_that_returned_anyway_is_done_whatever_was_ordered(ledger):
    attempt = started(ledger)
    ledger.apply(Batch(endings={attempt: Ending(attempt, Reason.CANCELLED, "cancelled by jana")}))
    assert ledger.end(attempt, End(result="1"))
    record = ledger.get(attempt.id)
    assert (record.status, record.reason, record.detail, record.ending) == (Status.DONE, None, None, None)


def test_the_ending_of_one_attempt_does_not_colour_the_next(ledger):
    attempt = started(ledger)
    ledger.apply(Batch(endings={attempt: Ending(attempt, Reason.TIMED_OUT, "too long")}))
    ledger.apply(Batch(unclaims={attempt}))
    again = claim(ledger, attempt.id)
    ledger.end(again, End(reason=Reason.SIGNALLED, detail="killed", signal=9))
    assert ledger.get(attempt.id).reason is Reason.SIGNALLED


def test_what_was_claimed_and_never_began_waits_again_as_it_was_requested(ledger):
    attempt = started(ledger, key="k", priority=3)
    before = ledger.get(attempt.id)
    ledger.apply(Batch(unclaims={attempt}))
    record = ledger.get(attempt.id)
    assert (record.status, record.priority, record.run_at, record.key) == (Status.REQUEST, 3, before.run_at, "k")
    assert record.pid is record.slot is record.started_at is record.host is None


def test_what_was_cancelled_and_never_began_ends_cancelled(ledger):
    attempt = started(ledger)
    ledger.cancel(attempt.id, by="jana")
    assert ledger.apply(Batch(unclaims={attempt})).unclaimed == {attempt}
    record = ledger.get(attempt.id)
    assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.CANCELLED)
    assert record.detail == "cancelled by jana before it began"
    assert record.cancel_requested_by == "jana"
    assert record.slot is None


def test_a_child_gives_back_only_what_was_claimed_for_itself(ledger):
    mine, other = started(ledger), request(ledger)
    claim(ledger, other, pid=200)
    done = claim(ledger, request(ledger))
    ledger.end(done, End(result="1"))
    same_pid_later = dataclasses.replace(identity_of(), start_ticks=1)
    same_pid_after_reboot = dataclasses.replace(identity_of(), boot_id="another")
    assert ledger.unclaim_unbegun(same_pid_later, []) == 0
    assert ledger.unclaim_unbegun(same_pid_after_reboot, []) == 0
    assert ledger.unclaim_unbegun(identity_of(), []) == 1
    assert [ledger.get(id).status for id in (mine.id, other, done.id)] == [Status.REQUEST, Status.START, Status.DONE]


# ---- what people ask for ----


def test_the_first_who_cancels_a_running_task_is_the_one_recorded(ledger, clock):
    attempt = started(ledger)
    first = ledger.cancel(attempt.id, by="jana")
    clock.sleep(5)
    assert ledger.cancel(attempt.id, by="petr") == first
    assert ledger.wishes() == [Wish(attempt, cancelled=True, cancelled_by="jana", suspended=False)]


def test_the_first_who_suspends_a_running_task_is_the_one_recorded(ledger, clock):
    attempt = started(ledger)
    first = ledger.suspend(attempt.id, by="jana")
    clock.sleep(5)
    assert ledger.suspend(attempt.id, by="petr") == first
    assert (first.suspend_requested_at, first.suspend_requested_by) == (START_OF_TIME, "jana")
    assert ledger.wishes() == [Wish(attempt, cancelled=False, cancelled_by=None, suspended=True)]
    assert ledger.resume(attempt.id).suspend_requested_at is None
    assert ledger.wishes() == []


@pytest.mark.parametrize("status", [Status.REQUEST, Status.DONE, Status.INTERRUPTED])
def test_only_a_running_task_is_suspended_and_resume_changes_no_other(ledger, status):
    attempt = task_in(ledger, status)
    before = ledger.get(attempt.id)
    with pytest.raises(NotSuspendable, match=f"it is {status}, only a running task can be"):
        ledger.suspend(attempt.id, by="jana")
    assert ledger.resume(attempt.id) == before
    for ask in (lambda: ledger.suspend(4711, by=None), lambda: ledger.resume(4711)):
        with pytest.raises(UnknownTask):
            ask()


def test_a_task_that_is_being_ended_is_not_suspended(ledger):
    cancelled, ending = started(ledger), started(ledger)
    ledger.cancel(cancelled.id, by=None)
    ledger.apply(Batch(endings={ending: Ending(ending, Reason.TIMED_OUT, "too long")}))
    for attempt in (cancelled, ending):
        with pytest.raises(NotSuspendable, match="it is being ended"):
            ledger.suspend(attempt.id, by="jana")


def test_how_long_a_task_stood_still_is_kept_and_goes_with_its_attempt(ledger, clock):
    attempt = started(ledger)
    ledger.suspend(attempt.id, by="jana")
    clock.sleep(1)
    begun = Suspension(clock.now(), clock.monotonic(), 3.0)
    assert ledger.apply(Batch(suspensions={attempt: begun})).suspensions == {attempt}
    record = ledger.get(attempt.id)
    assert (record.suspended_at, record.suspended_mono, record.suspended_s) == (clock.now(), 1.0, 3.0)
    clock.sleep(4)
    assert ledger.apply(Batch(suspensions={attempt: begun.ended(clock.monotonic())})).suspensions == {attempt}
    record = ledger.get(attempt.id)
    assert (record.suspended_at, record.suspended_mono, record.suspended_s) == (None, None, 7.0)

    ledger.apply(Batch(suspensions={attempt: begun}))
    ledger.end(attempt, End(reason=Reason.SIGNALLED, detail="killed", stack="line 7"))
    record = ledger.get(attempt.id)
    assert (record.suspend_requested_at, record.suspended_at, record.suspended_mono) == (None, None, None)
    assert (record.suspend_requested_by, record.stack) == ("jana", "line 7")
    assert ledger.interruptions(attempt.id)[0]["stack"] == "line 7"
    assert ledger.apply(Batch(suspensions={attempt: begun})).suspensions == set()
    assert ledger.get(attempt.id) == record

    again = ledger.retry(attempt.id)
    assert (again.suspend_requested_by, again.suspended_s, again.stack) == (None, None, None)


def test_a_stack_that_was_noted_stays_when_the_end_brings_none_and_goes_when_the_task_is_done(ledger):
    interrupted, done = started(ledger), started(ledger)
    ledger.apply(Batch(notes={one: Note(stack="line 7") for one in (interrupted, done)}))
    ledger.end(interrupted, End(reason=Reason.TIMED_OUT, detail="too long"))
    ledger.end(done, End(result="1"))
    assert [ledger.get(one.id).stack for one in (interrupted, done)] == ["line 7", None]
    assert [record.stack for record in ledger.starts()] == []


def test_a_cancelled_waiting_task_says_by_whom(ledger):
    assert ledger.cancel(request(ledger), by="jana").detail == "cancelled by jana before it began"
    assert ledger.cancel(request(ledger), by=None).detail == "cancelled before it began"


@pytest.mark.parametrize("id", [4711, 0, -1, 2**63, -(2**80)])
def test_an_unknown_task_is_said_to_be_unknown(ledger, id):
    assert ledger.get(id) is None
    for act in (lambda: ledger.cancel(id, by=None), lambda: ledger.retry(id)):
        with pytest.raises(UnknownTask) as caught:
            act()
        assert caught.value.id == id


def test_a_retry_is_refused_while_a_twin_holds_the_unique_key(ledger):
    first = task_in(ledger, Status.INTERRUPTED, unique_key="k")
    twin = request(ledger, unique_key="k")
    with pytest.raises(AlreadyLive) as caught:
        ledger.retry(first.id)
    assert caught.value.id == twin
    ledger.cancel(twin, by=None)
    assert ledger.retry(first.id).status is Status.REQUEST


def test_a_unique_key_is_per_name_and_held_only_while_the_task_lives(ledger):
    first, created = ledger.request(Request(name="a:b", data="{}", unique_key="k"))
    assert created
    assert ledger.request(Request(name="a:b", data="[]", unique_key="k")) == (first, False)
    assert ledger.request(Request(name="a:c", data="{}", unique_key="k"))[1]
    attempt = claim(ledger, first)
    assert ledger.request(Request(name="a:b", data="{}", unique_key="k")) == (first, False)
    ledger.end(attempt, End(result="1"))
    assert ledger.request(Request(name="a:b", data="{}", unique_key="k"))[1]


def test_requests_of_one_call_are_written_all_or_none(ledger):
    good, bad = Request(name="a:b", data="{}"), Request(name=HALF_A_PAIR, data="{}")
    with pytest.raises(UnicodeEncodeError):
        ledger.request_many([good, bad])
    assert ledger.find() == []
    assert [created for _, created in ledger.request_many([good, good])] == [True, True]


# ---- a batch ----


def test_a_batch_is_applied_in_order_so_that_a_slot_passes_to_the_next_task(ledger):
    first, second = started(ledger), request(ledger)
    slot = ledger.get(first.id).slot
    batch = Batch(ends={first: End(result="1")}, claims=[claim_of(attempt_of(ledger.get(second)), slot=slot)])
    outcome = ledger.apply(batch)
    assert outcome.ended == {first}
    assert len(outcome.claimed) == 1
    assert ledger.get(second).slot == slot


def test_a_batch_of_everything_says_what_it_changed(ledger, clock):
    ending, given_back, noted, waiting = started(ledger), started(ledger), started(ledger), request(ledger)
    late = Attempt(ending.id, 99)
    supervisor = supervisor_record(clock)
    outcome = ledger.apply(
        Batch(
            ends={ending: End(result="1"), late: End(result="2")},
            unclaims={given_back, late},
            endings={noted: Ending(noted, Reason.STOPPED, "stop"), late: Ending(late, Reason.STOPPED, "stop")},
            notes={noted: Note(progress_done=2.0), late: Note(progress_done=3.0)},
            claims=[claim_of(attempt_of(ledger.get(waiting)), slot=900)],
            supervisor=supervisor,
        )
    )
    assert (outcome.ended, outcome.unclaimed, outcome.endings) == ({ending}, {given_back}, {noted})
    assert [one.due.id for one in outcome.claimed] == [waiting]
    assert ledger.get(noted.id).progress_done == 2.0
    assert ledger.supervisors() == [supervisor]


def supervisor_record(clock, **more):
    values = {"host": "here", "boot_id": "boot", "pid_ns": 1, "pid": 1, "start_ticks": 2, "slots": 16, "version": "1"}
    values |= {"started_at": clock.now(), "heartbeat_at": clock.now(), "catalogue": "{}", "code_error": None}
    return SupervisorRecord(**values | more)


def test_a_supervisor_has_one_row_per_host(ledger, clock):
    ledger.apply(Batch(supervisor=supervisor_record(clock)))
    clock.sleep(15)
    ledger.apply(Batch(supervisor=supervisor_record(clock, pid=2)))
    ledger.apply(Batch(supervisor=supervisor_record(clock, host="there")))
    assert {(row.host, row.pid, row.heartbeat_at) for row in ledger.supervisors()} == {
        ("here", 2, clock.now()),
        ("there", 1, clock.now()),
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda taken, first: Batch(claims=[claim_of(first, slot=taken)]),
        lambda _, first: Batch(claims=[claim_of(first, slot=2**70)]),
        lambda _, first: Batch(claims=[claim_of(first, slot=-5)]),
    ],
    ids=["slot taken", "slot too large", "slot negative"],
)
def test_a_claim_that_spoils_its_batch_does_not_spoil_the_others(ledger, spoil):
    taken, first, good, ending = started(ledger), request(ledger), request(ledger), started(ledger)
    batch = spoil(ledger.get(taken.id).slot, Attempt(first, 0))
    batch.claims.append(claim_of(Attempt(good, 0), slot=501))
    batch.ends[ending] = End(result="1")
    outcome = ledger.apply(batch)
    assert [one.due.id for one in outcome.claimed] == [good]
    assert outcome.ended == {ending}
    assert ledger.get(first).status is Status.REQUEST
    assert ledger.get(good).status is Status.START


def test_an_end_that_cannot_be_stored_is_an_interruption_and_the_others_are_kept(ledger):
    spoiled, good = started(ledger), started(ledger)
    outcome = ledger.apply(Batch(ends={spoiled: End(result=HALF_A_PAIR, exit_code=0), good: End(result="1")}, notes={}))
    assert outcome.ended == {spoiled, good}
    record = ledger.get(spoiled.id)
    assert (record.status, record.reason, record.result) == (Status.INTERRUPTED, Reason.RAISED, None)
    assert "could not be written" in record.detail
    assert ledger.interruptions(spoiled.id)[0]["reason"] == "RAISED"
    assert ledger.get(good.id).status is Status.DONE


def test_an_end_of_which_only_a_part_could_be_written_is_not_half_there(ledger, monkeypatch):
    remember, attempt = ledger._remember_interruption, started(ledger)

    def fail_once_per_pass(attempt):
        if ledger.get(attempt.id).signal == 9:
            raise peewee.IntegrityError("the second of two statements")
        remember(attempt)

    monkeypatch.setattr(ledger, "_remember_interruption", fail_once_per_pass)
    end = End(reason=Reason.SIGNALLED, signal=9, cpu_s=5.0)
    monkeypatch.setattr(ledger_module, "_unwritable", lambda _: End(reason=Reason.RAISED, detail="not storable"))
    assert ledger.end(attempt, end)
    record = ledger.get(attempt.id)
    assert (record.reason, record.signal, record.cpu_s, record.tries) == (Reason.RAISED, None, None, 1)
    assert [kept["reason"] for kept in ledger.interruptions(attempt.id)] == ["RAISED"]


def test_an_end_that_came_too_late_is_not_rewritten_when_another_row_spoils_the_batch(ledger):
    done, spoiled = task_in(ledger, Status.DONE), started(ledger)
    before = ledger.get(done.id)
    outcome = ledger.apply(Batch(ends={done: End(reason=Reason.VANISHED), spoiled: End(error=HALF_A_PAIR)}))
    assert done not in outcome.ended
    assert ledger.get(done.id) == before


def test_a_note_or_an_ending_that_cannot_be_stored_spoils_nothing(ledger):
    spoiled, good = started(ledger), started(ledger)
    outcome = ledger.apply(
        Batch(
            notes={spoiled: Note(message=HALF_A_PAIR), good: Note(message="half")},
            endings={
                spoiled: Ending(spoiled, Reason.CANCELLED, f"cancelled by {HALF_A_PAIR}"),
                good: Ending(good, Reason.CANCELLED, "cancelled by jana"),
            },
        )
    )
    assert outcome.endings == {good}
    assert (ledger.get(good.id).message, ledger.get(spoiled.id).message) == ("half", None)
    assert (ledger.get(good.id).ending, ledger.get(spoiled.id).ending) == (Reason.CANCELLED, None)


def test_a_locked_database_is_told_and_nothing_is_written(ledger, store, raw):
    attempt, waiting = started(ledger), request(ledger)
    store.set_busy_timeout(0.01)
    before = rows(raw)
    raw.hold_off_others()
    batch = Batch(ends={attempt: End(result="1")}, claims=[claim_of(Attempt(waiting, 0), slot=77)])
    with pytest.raises(DatabaseError, match="is locked by another writer"):
        ledger.apply(batch)
    with pytest.raises(DatabaseError, match="is locked by another writer"):
        ledger.cancel(waiting, by=None)
    raw.let_others()
    assert rows(raw) == before
    outcome = ledger.apply(batch)  # the same batch, later
    assert outcome.ended == {attempt}
    assert len(outcome.claimed) == 1


@only_sqlite
@pytest.mark.parametrize("rolls_back_itself", [False, True])
def test_a_disk_that_fills_up_while_rows_are_written_one_by_one_loses_and_invents_nothing(
    ledger, store, raw, monkeypatch, rolls_back_itself
):
    ending, waiting = started(ledger), request(ledger)
    before = rows(raw)
    calls = []

    def claim_on_a_full_disk(claims, *_):
        calls.append(claims)
        if len(calls) == 1:
            raise peewee.IntegrityError("the first pass is spoiled")
        if rolls_back_itself:  # as SQLite does when it has no space left
            store.database.connection().execute("ROLLBACK")
        full = sqlite3.OperationalError("database or disk is full")
        full.sqlite_errorcode = 13
        try:
            raise full
        except sqlite3.OperationalError:
            raise peewee.OperationalError(full, str(full))  # noqa: B904 - as Peewee does it

    monkeypatch.setattr(ledger, "_claim", claim_on_a_full_disk)
    batch = Batch(ends={ending: End(result="1")}, claims=[claim_of(Attempt(waiting, 0), slot=900)])
    with pytest.raises(DatabaseError, match="the disk is full"):
        ledger.apply(batch)
    assert len(calls) == 2
    assert rows(raw) == before
    monkeypatch.undo()
    outcome = ledger.apply(batch)
    assert (outcome.ended, len(outcome.claimed)) == ({ending}, 1)


def test_an_empty_note_writes_nothing(ledger, raw):
    attempt = started(ledger)
    before = rows(raw)
    ledger.apply(Batch(notes={attempt: Note()}))
    assert rows(raw) == before


def test_an_empty_batch_has_nothing_to_write():
    assert not Batch()
    assert Batch(unclaims={Attempt(1, 1)})


# ---- laws that the database holds ----


def insert(raw, **values):
    columns = ", ".join(values)
    marks = ", ".join("?" * len(values))
    sql = f"INSERT INTO bgsupervisor_task ({columns}) VALUES ({marks}) RETURNING id"
    return raw.execute(sql, tuple(values.values()))[0]["id"]


def test_a_row_written_by_hand_needs_a_name_and_data_only(ledger, raw):
    ledger.clock = SystemClock()
    id = insert(raw, name="a:b", data='{"n": 1}')
    record = ledger.get(id)
    assert (record.status, record.attempt, record.tries, record.max_attempts) == (Status.REQUEST, 0, 0, 1)
    assert (record.queue, record.priority, record.key) == ("default", 0, None)
    assert abs(record.run_at - datetime.now(UTC)) < timedelta(seconds=10)
    assert record.requested_at == record.run_at
    assert [due.data for due in ledger.due(["a:b"], limit=5)] == ['{"n": 1}']


def test_a_slot_of_a_host_is_taken_once_while_a_task_runs(raw):
    insert(raw, name="a", status="START", host="here", slot=1)
    insert(raw, name="a", status="START", host="there", slot=1)
    insert(raw, name="a", status="START", host="here", slot=None)
    insert(raw, name="a", status="DONE", host="here", slot=1)
    with pytest.raises(raw.refused, match=r"(?i)unique"):
        insert(raw, name="a", status="START", host="here", slot=1)


def test_a_unique_key_is_live_once(raw):
    for status in ("REQUEST", "START"):
        insert(raw, name=status, unique_key="k", status=status)
        insert(raw, name=status, unique_key=None, status=status)
        insert(raw, name=status, unique_key=None, status=status)
        insert(raw, name=status, unique_key="k", status="DONE")
        for twin in ("REQUEST", "START"):
            with pytest.raises(raw.refused, match=r"(?i)unique"):
                insert(raw, name=status, unique_key="k", status=twin)


@pytest.mark.parametrize(
    "values",
    [
        {"status": "RUNNING"},
        {"status": "request"},
        {"status": "INTERRUPTED"},
        {"status": "DONE", "reason": "RAISED"},
        {"run_at": "the day after"},
        {"run_at": 1893456000},
        {"run_at": "2030-02-31 12:00:00"},
        {"run_at": "2030-01-01 12:00:00 in the evening"},
        {"run_at": None},
        {"priority": "high"},
        {"slot": -1},
        {"data": None},
        {"name": None},
    ],
    ids=lambda values: " ".join(f"{key}={value}" for key, value in values.items()),
)
def test_a_row_that_cannot_be_is_refused_by_the_database(raw, values):
    with pytest.raises(raw.refused):
        insert(raw, **{"name": "a"} | values)
    assert rows(raw) == []


@only_sqlite
@pytest.mark.parametrize(
    "values",
    [
        {"run_at": "tomorrow"},
        {"run_at": "2030-01-01"},
        {"run_at": "2030-01-01T12:00:00"},
        {"run_at": "2030-01-01 12:00:00+09:00"},
        {"requested_at": "2030-01-01T12:00:00"},
    ],
    ids=lambda values: " ".join(f"{key}={value}" for key, value in values.items()),
)
def test_a_time_that_would_not_sort_as_text_is_refused(raw, values):
    with pytest.raises(raw.refused):
        insert(raw, **{"name": "a"} | values)


@only_postgres
@pytest.mark.parametrize("moment", ["infinity", "-infinity", "0044-03-15 12:00:00 BC", "19999-01-01 00:00:00"])
@pytest.mark.parametrize("column", ["run_at", "requested_at"])
def test_a_time_that_python_cannot_hold_is_refused(raw, column, moment):
    with pytest.raises(raw.refused, match="check constraint"):
        insert(raw, **{"name": "a", column: moment})


@only_postgres
def test_a_time_written_by_hand_may_have_any_zone(ledger, raw):
    record = ledger.get(insert(raw, name="a", run_at="2030-01-01 12:00:00+09:00"))
    assert record.run_at == datetime(2030, 1, 1, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    "run_at",
    [
        "2030-01-01 12:00:00",
        "2030-01-01 12:00:00.5",
        "2030-01-01 12:00:00.999999+00:00",
        "2030-01-01 12:00:59.999999",
        "2028-02-29 23:59:59+00:00",
    ],
)
def test_a_time_written_by_hand_is_utc_with_or_without_saying_so(ledger, raw, run_at):
    record = ledger.get(insert(raw, name="a", run_at=run_at))
    assert record.run_at == datetime.fromisoformat(run_at[:26]).replace(tzinfo=UTC)


def test_the_indexes_have_their_names(raw):
    assert raw.indexes() == {
        "bgsupervisor_task_slot",
        "bgsupervisor_task_unique",
        "bgsupervisor_task_due",
        "bgsupervisor_task_run_at",
        "bgsupervisor_task_parent",
        "bgsupervisor_task_start",
        "bgsupervisor_task_name",
        "bgsupervisor_task_key",
        "bgsupervisor_task_ended",
        "bgsupervisor_interruption_task",
        "bgsupervisor_part_name",
        "bgsupervisor_hold_permit",
        "bgsupervisor_hold_task",
        "bgsupervisor_wait_task",
        "bgsupervisor_wait_target",
        "bgsupervisor_dependency_pair",
        "bgsupervisor_dependency_on",
        "bgsupervisor_party_once",
        "bgsupervisor_party_task",
    }


def test_every_column_of_the_tables_is_a_field_of_the_classes(store, raw):
    tables = store.tables
    models = (tables.Task, tables.Interruption, tables.Supervisor, tables.Part, tables.Hold, tables.Wait)
    for model in (*models, tables.Dependency, tables.Party):
        table = model._meta.table_name
        assert raw.columns(table) == [field.column_name for field in model._meta.sorted_fields], table


# ---- times ----


@only_sqlite
def test_times_are_stored_as_utc_text_that_sorts(ledger, raw):
    east = timezone(timedelta(hours=9))
    moments = [
        datetime(2030, 1, 1, 8, 59, 59, 999999, tzinfo=east),
        datetime(2030, 1, 1, 0, 0, 0, 0, tzinfo=UTC),
        datetime(2030, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
        datetime(2029, 12, 31, 23, 0, 1, tzinfo=timezone(timedelta(hours=-1))),
    ]
    for moment in moments:
        request(ledger, run_at=moment)
    stored = [row["run_at"] for row in rows(raw)]
    assert stored == [
        "2029-12-31 23:59:59.999999+00:00",
        "2030-01-01 00:00:00.000000+00:00",
        "2030-01-01 00:00:00.000001+00:00",
        "2030-01-01 00:00:01.000000+00:00",
    ]
    assert stored == sorted(stored)
    assert [ledger.get(row["id"]).run_at for row in rows(raw)] == moments
    assert all(ledger.get(row["id"]).run_at.tzinfo is UTC for row in rows(raw))


def test_a_naive_time_of_ours_is_an_error_and_nonsense_of_others_is_nothing():
    with pytest.raises(ValueError, match="no time zone"):
        UtcField().db_value(datetime(2030, 1, 1))  # noqa: DTZ001 - the error
    assert UtcField().python_value("the day after") is None
    assert UtcField().python_value(5) is None
    assert UtcField().db_value(None) is None


# ---- what is due ----


def test_due_tasks_come_by_priority_then_time_then_id(ledger, clock):
    now = clock.now()
    early, late = now - timedelta(hours=1), now - timedelta(minutes=1)
    ids = {
        "low": request(ledger, priority=-1, run_at=early),
        "later": request(ledger, run_at=late),
        "first": request(ledger, run_at=early),
        "second": request(ledger, run_at=early),
        "high": request(ledger, priority=9),
    }
    names = {id: name for name, id in ids.items()}
    order = [names[due.id] for due in ledger.due(["a:b"], limit=99)]
    assert order == ["high", "first", "second", "later", "low"]
    assert [names[due.id] for due in ledger.due(["a:b"], limit=2)] == ["high", "first"]
    for place, name in enumerate(order, start=1):
        assert ledger.position(ledger.get(ids[name])) == place, name


def test_what_is_planned_for_later_is_not_due_and_its_moment_is_known(ledger, clock):
    assert ledger.next_due_at() is None
    now = clock.now()
    soon = request(ledger, run_at=now + timedelta(seconds=10), priority=-3)
    request(ledger, run_at=now + timedelta(seconds=20), priority=5)
    assert ledger.due(["a:b"], limit=9) == []
    assert ledger.next_due_at() == now + timedelta(seconds=10)
    clock.sleep(10)
    assert [due.id for due in ledger.due(["a:b"], limit=9)] == [soon]
    assert ledger.next_due_at() == now + timedelta(seconds=20)


def test_names_that_nobody_can_run_are_passed_over(ledger):
    request(ledger, name="gone:Task", priority=9)
    wanted = request(ledger)
    assert [due.id for due in ledger.due(["a:b", "x:y"], limit=1)] == [wanted]
    assert ledger.due([], limit=9) == []


def test_a_due_task_carries_what_its_order_needs(ledger):
    id = ledger.request(Request(name="a:b", data='{"n": 1}', key="k"))[0]
    assert ledger.due(["a:b"], limit=1) == [Due(id, 0, "a:b", '{"n": 1}', "k")]


# ---- asking ----


def test_tasks_are_found_newest_first_by_all_that_is_given(ledger):
    one, two, three = request(ledger, key="k"), request(ledger, name="x:y", key="k"), request(ledger)
    ledger.cancel(three, by=None)

    def found(**asked):
        return [record.id for record in ledger.find(**asked)]

    assert found() == [three, two, one]
    assert found(key="k") == [two, one]
    assert found(names=["a:b"]) == [three, one]
    assert found(names=["a:b"], key="k") == [one]
    assert found(statuses=[Status.INTERRUPTED]) == [three]
    assert found(limit=1) == [three]
    assert found(names=[]) == []
    assert ledger.newest("a:b", key="k").id == one
    assert ledger.newest("nobody") is None


def test_counts_have_every_status(ledger):
    for status in (Status.DONE, Status.DONE, Status.START):
        task_in(ledger, status)
    request(ledger, name="x:y")
    assert ledger.counts() == {"REQUEST": 1, "START": 1, "DONE": 2, "INTERRUPTED": 0}
    assert ledger.counts("x:y") == {"REQUEST": 1, "START": 0, "DONE": 0, "INTERRUPTED": 0}


def test_live_tasks_and_those_that_ended_lately_are_counted(ledger, clock):
    task_in(ledger, Status.DONE)
    clock.sleep(60)
    since = clock.now()
    for status in (Status.DONE, Status.INTERRUPTED, Status.INTERRUPTED, Status.START, Status.REQUEST):
        task_in(ledger, status)
    assert ledger.live_counts() == {"REQUEST": 1, "START": 1}
    assert ledger.ended_counts(since) == {"DONE": 1, "INTERRUPTED": 2}


def test_who_has_waited_longest_is_known(ledger, clock):
    assert ledger.oldest_due_at() is None
    long_ago = clock.now() - timedelta(hours=3)
    request(ledger, run_at=long_ago, priority=-5)
    request(ledger, priority=5)
    request(ledger, run_at=clock.now() + timedelta(hours=1))
    assert ledger.oldest_due_at() == long_ago


# ---- old rows ----


def test_pruning_takes_the_oldest_ended_tasks_and_what_is_kept_of_their_interruptions(ledger, raw, clock):
    done, interrupted = task_in(ledger, Status.DONE), task_in(ledger, Status.INTERRUPTED)
    live = [task_in(ledger, Status.REQUEST), task_in(ledger, Status.START)]
    other = task_in(ledger, Status.DONE, name="x:y")
    clock.sleep(60)
    before = clock.now()
    young = task_in(ledger, Status.DONE)
    asked = {"before": before, "statuses": list(Status), "names": ["a:b"]}
    assert ledger.count_old(**asked) == 2
    assert ledger.prune(**asked, limit=1) == [done]
    assert ledger.prune(before=before, statuses=[Status.DONE], names=["a:b"], limit=9) == []
    assert ledger.interruptions(interrupted.id) != []
    assert ledger.prune(**asked, limit=9) == [interrupted]
    assert ledger.interruptions(interrupted.id) == []
    assert ledger.prune(before=before, statuses=[Status.DONE], names=None, limit=9) == [other]
    assert [row["id"] for row in rows(raw)] == [*(attempt.id for attempt in live), young.id]


def test_a_number_is_never_given_twice_even_if_the_newest_was_pruned(ledger, clock):
    attempt = task_in(ledger, Status.DONE)
    clock.sleep(1)
    assert ledger.prune(before=clock.now(), statuses=[Status.DONE], names=None, limit=9) == [attempt]
    assert request(ledger) == attempt.id + 1


# ---- what it costs ----


# The plans of SQLite; PostgreSQL's depend on how many rows it thinks there are, and on what its disk costs.


@contextlib.contextmanager
def recorded(database):
    """Collect the statements that are executed."""
    statements = []

    def hook(event):
        statements.append((event.sql, event.params))

    database.query_hooks.append(hook)
    yield statements
    database.query_hooks.remove(hook)


@only_sqlite
@pytest.mark.parametrize(
    ("ask", "index"),
    [
        (lambda ledger: ledger.due(["a:b", "x:y"], limit=17), "bgsupervisor_task_due"),
        (lambda ledger: ledger.next_due_at(), "bgsupervisor_task_run_at"),
        (
            lambda ledger: ledger.position(ledger.find(statuses=[Status.REQUEST], limit=1)[0]),
            "bgsupervisor_task_run_at",
        ),
        (lambda ledger: ledger.starts(), "bgsupervisor_task_start"),
        (lambda ledger: ledger.wishes(), "bgsupervisor_task_start"),
        (lambda ledger: ledger.oldest_due_at(), "bgsupervisor_task_run_at"),
        (lambda ledger: ledger.live_counts(), "bgsupervisor_task_start"),
        (lambda ledger: ledger.ended_counts(START_OF_TIME + timedelta(days=300)), "bgsupervisor_task_ended"),
        (
            lambda ledger: ledger.prune(before=START_OF_TIME, statuses=[Status.DONE], names=None, limit=10),
            "bgsupervisor_task_ended",
        ),
        (lambda ledger: ledger.newest("a:b"), "bgsupervisor_task_name"),
        (lambda ledger: ledger.find(key="k", limit=10), "bgsupervisor_task_key"),
        (lambda ledger: ledger.request(Request(name="a:b", data="{}", unique_key="k")), "bgsupervisor_task_unique"),
        (lambda ledger: ledger.interruptions(1), "bgsupervisor_interruption_task"),
    ],
    ids=(
        *("due", "next", "position", "starts", "cancels", "oldest", "live", "ended", "prune"),
        *("newest", "key", "unique", "interruptions"),
    ),
)
def test_no_question_walks_through_all_rows(ledger, store, raw, ask, index):
    raw.execute_many(
        "INSERT INTO bgsupervisor_task (name, status, ended_at, key) VALUES (?, 'DONE', ?, 'k')",
        [("a:b", f"2030-01-01 00:00:0{n % 10}") for n in range(500)],
    )
    request(ledger, priority=3, unique_key="k")
    started(ledger)
    raw.execute("ANALYZE")
    with recorded(store.database) as statements:
        ask(ledger)
    asked = [(sql, params) for sql, params in statements if sql.startswith(("SELECT", "UPDATE"))]
    assert asked
    plans = [row[3] for sql, params in asked for row in raw.execute(f"EXPLAIN QUERY PLAN {sql}", params or ())]
    assert any(index in plan for plan in plans), plans
    for plan in plans:
        assert "USING" in plan or "TEMP B-TREE" in plan or "bgsupervisor" not in plan, plan


def test_what_becomes_due_between_the_looks_at_what_is_and_at_what_will_be_is_in_one_of_them(ledger, clock):
    looked_at = clock.now()
    soon = request(ledger, run_at=looked_at + timedelta(seconds=1))
    assert ledger.due(["a:b"], limit=9, at=looked_at) == []
    clock.sleep(5)
    assert ledger.next_due_at(after=looked_at) == looked_at + timedelta(seconds=1)
    assert ledger.next_due_at() is None
    assert [due.id for due in ledger.due(["a:b"], limit=9)] == [soon]


# ---- several at once ----

CLAIMER = """
import sys
from bgsupervisor.clock import SystemClock
from bgsupervisor.ledger import Batch, Claim, Ledger
from bgsupervisor.models import Store
from bgsupervisor.processes import ProcessIdentity

url, host = sys.argv[1:]
ledger = Ledger(Store.open(url, "bgsupervisor_", busy_timeout_s=20.0), SystemClock())
identity = ProcessIdentity(host, "boot", 1, 1, 1)
print("ready", flush=True)
input()
slot = 0
while due := ledger.due(["a:b"], limit=5):
    claims = [Claim(one, identity, slot + place, 0.0) for place, one in enumerate(due)]
    slot += len(due)
    for claim in ledger.apply(Batch(claims=claims)).claimed:
        print(claim.due.id, claim.due.attempt, flush=True)
ledger.store.close()
"""


def test_no_task_is_claimed_twice_by_processes_that_race(ledger, store_url):
    ledger.clock = SystemClock()
    ids = [id for id, _ in ledger.request_many([Request(name="a:b", data="{}")] * 150)]
    claimers = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, store_url, f"host{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PYTHONPATH": SOURCE},
            text=True,
        )
        for number in range(4)
    ]
    for claimer in claimers:
        assert claimer.stdout.readline() == "ready\n"
    for claimer in claimers:
        claimer.stdin.write("\n")
        claimer.stdin.flush()
    outputs = [claimer.communicate(timeout=40)[0] for claimer in claimers]
    assert [claimer.returncode for claimer in claimers] == [0] * 4
    claimed = [int(line.split()[0]) for output in outputs for line in output.splitlines()]
    assert sorted(claimed) == ids
    assert all(record.attempt == 1 for record in ledger.starts())
    for number, output in enumerate(outputs):
        said = {int(line.split()[0]) for line in output.splitlines()}
        assert {record.id for record in ledger.starts() if record.host == f"host{number}"} == said


def test_no_task_is_claimed_twice_by_threads_that_race(ledger, store):
    ids = [id for id, _ in ledger.request_many([Request(name="a:b", data="{}")] * 80)]
    claimed, begin = [], threading.Barrier(8)

    def work(number):
        begin.wait(10)
        identity = dataclasses.replace(identity_of(), host=f"host{number}")
        slots = itertools.count()
        while due := ledger.due(["a:b"], limit=3):
            claims = [Claim(one, identity, next(slots), 0.0) for one in due]
            claimed.extend(claim.due.id for claim in ledger.apply(Batch(claims=claims)).claimed)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(claimed) == ids


def test_of_two_supervisors_that_end_one_attempt_only_one_is_believed(ledger, store_url, clock):
    other = Store.open(store_url, "bgsupervisor_", busy_timeout_s=5.0)
    attempt = started(ledger)
    assert ledger.end(attempt, End(result="1"))
    assert not Ledger(other, clock).end(attempt, End(reason=Reason.VANISHED))
    assert ledger.get(attempt.id).status is Status.DONE
    other.close()


# ---- any order of events ----


_databases = itertools.count()


class LedgerMachine(RuleBasedStateMachine):
    """Two connections do what they like; a plain dictionary says what must have become of it."""

    def __init__(self):
        super().__init__()
        url = self.new_database()
        # No power cut is tried here.
        self.stores = [Store.open(url, "bgsupervisor_", busy_timeout_s=5.0, durable=False) for _ in range(2)]
        self.ledgers = [Ledger(store, HandClock()) for store in self.stores]
        self.model = {}
        self.slot = 0

    def teardown(self):
        for store in self.stores:
            store.close()

    def at(self, which):
        return self.ledgers[which]

    @staticmethod
    def new():
        """Return what is known of an attempt that has not begun."""
        return {"cancel": False, "ending": None, "reason": None, "held": False, "still": False}

    def known(self, data):
        return data.draw(st.sampled_from(sorted(self.model)))

    def attempt(self, data, id):
        drift = data.draw(st.sampled_from([0, 0, 0, -1, 1]))
        return Attempt(id, self.model[id]["attempt"] + drift), drift == 0

    @rule(which=st.booleans(), unique=st.sampled_from([None, "k"]))
    def request(self, which, unique):
        live = [id for id, row in self.model.items() if unique and row["unique"] == unique and row["live"]]
        id, created = self.at(which).request(Request(name="a:b", data="{}", unique_key=unique))
        assert created is not bool(live)
        if live:
            assert [id] == live
        else:
            self.model[id] = {"status": "REQUEST", "attempt": 0, "unique": unique, "live": True, **self.new()}

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def claim(self, which, data):
        id = self.known(data)
        attempt, fresh = self.attempt(data, id)
        self.slot += 1
        claimed = self.at(which).apply(Batch(claims=[claim_of(attempt, slot=self.slot)])).claimed
        row = self.model[id]
        assert bool(claimed) is (fresh and row["status"] == "REQUEST")
        if claimed:
            row.update(status="START", attempt=row["attempt"] + 1, **self.new())

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data(), reason=st.sampled_from([None, Reason.SIGNALLED]))
    def end(self, which, data, reason):
        id = self.known(data)
        attempt, fresh = self.attempt(data, id)
        row = self.model[id]
        ended = self.at(which).end(attempt, End(reason=reason))
        assert ended is (fresh and row["status"] == "START")
        if ended:
            row.update(status="DONE" if reason is None else "INTERRUPTED", live=False, held=False, still=False)
            row.update(reason=reason and (row["ending"] or reason), ending=reason and row["ending"])

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def unclaim(self, which, data):
        id = self.known(data)
        attempt, fresh = self.attempt(data, id)
        row = self.model[id]
        given_back = self.at(which).apply(Batch(unclaims={attempt})).unclaimed
        assert bool(given_back) is (fresh and row["status"] == "START")
        if given_back:
            reason = Reason.CANCELLED if row["cancel"] else None
            row.update(self.new(), status="INTERRUPTED" if reason else "REQUEST", live=not reason, reason=reason)

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def cancel(self, which, data):
        row = self.model[id := self.known(data)]
        self.at(which).cancel(id, by="jana")
        if row["status"] == "REQUEST":
            row.update(status="INTERRUPTED", live=False, reason=Reason.CANCELLED)
        elif row["status"] == "START":
            row["cancel"] = True

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def condemn(self, which, data):
        id = self.known(data)
        attempt, fresh = self.attempt(data, id)
        row = self.model[id]
        reason = data.draw(st.sampled_from([Reason.TIMED_OUT, Reason.STOPPED]))
        condemned = self.at(which).apply(Batch(endings={attempt: Ending(attempt, reason, "why")})).endings
        assert bool(condemned) is (fresh and row["status"] == "START")
        if condemned:
            row["ending"] = reason

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def suspend(self, which, data):
        row = self.model[id := self.known(data)]
        if row["status"] != "START" or row["cancel"] or row["ending"]:
            with pytest.raises(NotSuspendable):
                self.at(which).suspend(id, by="jana")
        else:
            self.at(which).suspend(id, by="jana")
            row["held"] = True

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def resume(self, which, data):
        row = self.model[id := self.known(data)]
        self.at(which).resume(id)
        row["held"] = False

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data(), still=st.booleans())
    def stand_still_or_go_on(self, which, data, still):
        id = self.known(data)
        attempt, fresh = self.attempt(data, id)
        row = self.model[id]
        suspension = Suspension(HandClock().now(), 1.0, 2.0) if still else Suspension(total_s=3.0)
        written = self.at(which).apply(Batch(suspensions={attempt: suspension})).suspensions
        assert bool(written) is (fresh and row["status"] == "START")
        if written:
            row["still"] = still

    @precondition(lambda self: self.model)
    @rule(which=st.booleans(), data=st.data())
    def retry(self, which, data):
        row = self.model[id := self.known(data)]
        twin = row["unique"] and any(one["live"] and one["unique"] == row["unique"] for one in self.model.values())
        if row["status"] != "INTERRUPTED":
            with pytest.raises(NotRetryable):
                self.at(which).retry(id)
        elif twin:
            with pytest.raises(AlreadyLive):
                self.at(which).retry(id)
        else:
            self.at(which).retry(id)
            row.update(self.new(), status="REQUEST", live=True)

    @invariant()
    def rows_are_as_the_model_says(self):
        found = {record.id: record for record in self.ledgers[0].find()}
        assert {id: (str(one.status), one.attempt) for id, one in found.items()} == {
            id: (row["status"], row["attempt"]) for id, row in self.model.items()
        }
        for one in found.values():
            row = self.model[one.id]
            assert (one.reason, one.ending) == (row["reason"], row["ending"])
            assert (one.suspend_requested_at is not None, one.suspended_at is not None) == (row["held"], row["still"])
            assert (one.reason is not None) is (one.status is Status.INTERRUPTED)
            assert (one.ended_at is not None) is one.ended
            assert (one.slot is not None) is (one.status is Status.START)


def test_any_order_of_events_on_two_connections_leaves_the_rows_that_the_table_promises(store_url, tmp_path):
    def new_database():
        if store_url.startswith("sqlite"):
            return f"sqlite:///{tmp_path}/{next(_databases)}.db"
        empty(store_url)
        return store_url

    LedgerMachine.new_database = staticmethod(new_database)
    case = LedgerMachine.TestCase
    case.settings = settings(
        max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case().runTest()


def test_the_tables_of_a_second_prefix_are_others(store, store_url, clock):
    other = Store.open(store_url, "staging_", busy_timeout_s=2.0)
    here, there = Ledger(store, clock), Ledger(other, clock)
    request(here, unique_key="k")
    assert there.find() == []
    assert there.request(Request(name="a:b", data="{}", unique_key="k"))[1]
    assert len(here.find()) == len(there.find()) == 1
    assert {"staging_task", "bgsupervisor_task"} <= set(store.database.get_tables())
    found = {index.name for index in store.database.get_indexes("staging_task")}
    assert found >= {"staging_task_slot", "staging_task_unique"}
    with other.writing():
        for table in [name for name in other.database.get_tables() if name.startswith("staging_")]:
            other.database.execute_sql(f"DROP TABLE {table}")
    other.close()


@only_sqlite
def test_a_database_of_ours_is_durable_and_shared(store):
    with store.connected():
        assert store.database.execute_sql("PRAGMA synchronous").fetchone() == (2,)
        assert store.database.execute_sql("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store.path.stat().st_mode & 0o777 == 0o600, "its folder is shared with no group"


def test_the_results_of_the_ledger_are_json_that_others_can_read(ledger):
    attempt = started(ledger)
    ledger.end(attempt, End(result=json.dumps({"n": [1, None, "ž"]})))
    assert json.loads(ledger.get(attempt.id).result) == {"n": [1, None, "ž"]}


def test_an_integrity_error_is_not_taken_for_a_database_that_is_away(store):
    with pytest.raises(peewee.IntegrityError), store.writing():
        store.database.execute_sql("INSERT INTO bgsupervisor_task (name, status) VALUES ('a', 'NONE')")
