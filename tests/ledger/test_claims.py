"""Claims: one statement for all of a pass, which waits for nobody and takes nothing that somebody else has decided."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import psutil
import psycopg
import pytest
from support.app import LIMIT_S, only_postgres, wait_until
from support.pace import allowed_s

from bgsupervisor.database.store import Store
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger import Ledger
from bgsupervisor.ledger.attempts import Attempt, Batch, Claim, DueTask, Telemetry
from bgsupervisor.ledger.requests import Request
from bgsupervisor.ledger.slots import Waiter, Waiting
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.system.processes import ProcessIdentity

LOCK_ROW = "SELECT id FROM bgsupervisor_task WHERE id = %s FOR UPDATE"


@pytest.fixture
def ledger(store):
    return Ledger(store)


@pytest.fixture
def other(store, store_url):
    """The ledger of somebody else, on a connection of its own."""
    with store.connected():
        pass
    second = Store.open(store_url, "bgsupervisor_", busy_timeout_s=LIMIT_S)
    yield Ledger(second)
    second.close()


@pytest.fixture
def hand(store_url):
    """A connection on which SQL is written by hand, in a transaction that stays open."""
    with contextlib.closing(psycopg.connect(store_url)) as connection:
        yield connection


def requested(ledger, count=1):
    return [id for id, _ in ledger.request_many([Request(name="a:b", data="{}")] * count)]


def claim_of(id, slot, *, before=0, host="here"):
    ref = ProcessIdentity(host, f"boot of {slot}", 1000 + slot, 2000 + slot, 3000 + slot)
    return Claim(DueTask(id, before, "a:b", "{}", None), ref, slot, 5.5 + slot)


def claimed(ledger, claims):
    return [claim.due.id for claim in ledger.apply(Batch(claims=claims)).claimed]


@contextlib.contextmanager
def statements_of(store):
    told = []

    def note(event):
        told.append(event.sql)

    store.database.query_hooks.append(note)
    yield told
    store.database.query_hooks.remove(note)


def test_all_claims_of_a_pass_are_one_statement_that_pairs_tasks_children_and_slots(ledger, store):
    ids = requested(ledger, 16)
    claims = [claim_of(id, slot) for slot, id in enumerate(reversed(ids))]
    with statements_of(store) as told:
        outcome = ledger.apply(Batch(claims=claims))
    assert (outcome.claimed, outcome.passed_over) == (claims, [])
    assert len([sql for sql in told if "UPDATE" in sql]) == 1
    for claim in claims:
        record, ref = ledger.get(claim.due.id), claim.identity
        assert (record.status, record.attempt, record.slot) == (Status.START, 1, claim.slot)
        assert ProcessIdentity(record.host, record.boot_id, record.pid_ns, record.pid, record.start_ticks) == ref
        assert record.started_mono == claim.started_mono
        assert record.started_at == record.heartbeat_at >= record.requested_at


def test_on_a_server_claims_alone_are_one_round_trip(ledger, store):
    (id,) = requested(ledger)
    with store.connected(), statements_of(store) as told:
        assert claimed(ledger, [claim_of(id, 0)]) == [id]
    assert len(told) == 1, told


def test_what_was_decided_meanwhile_is_not_claimed_and_is_told_and_the_rest_is(ledger, caplog):
    cancelled, running, done, newer, good = requested(ledger, 5)
    ledger.cancel(cancelled, by=None)
    assert claimed(ledger, [claim_of(running, 1), claim_of(done, 2)]) == [running, done]
    assert ledger.end(Attempt(done, 1), AttemptResult(result="1"))
    assert claimed(ledger, [claim_of(newer, 3)]) == [newer]
    assert ledger.apply(Batch(unclaims={Attempt(newer, 1)})).unclaimed == {Attempt(newer, 1)}
    before = [ledger.get(id) for id in (cancelled, running, done, newer)]
    with caplog.at_level(logging.INFO, "bgsupervisor"):
        ids = (cancelled, running, done, newer, good, 10**6)
        outcome = ledger.apply(Batch(claims=[claim_of(id, 10 + place) for place, id in enumerate(ids)]))
    assert [claim.due.id for claim in outcome.claimed] == [good]
    assert outcome.passed_over == []
    assert [ledger.get(id) for id in (cancelled, running, done, newer)] == before
    late = {f"task {id}, attempt 0: claim came too late, the row says otherwise" for id in ids if id != good}
    assert late == {record.getMessage() for record in caplog.records}


def test_a_claim_clears_what_the_attempt_before_has_left(ledger):
    (id,) = requested(ledger)
    assert claimed(ledger, [claim_of(id, 0)]) == [id]
    note = Telemetry(progress_done=1, progress_total=2, message="half", cpu_s=1.0, rss_bytes=7)
    ledger.apply(Batch(telemetry={Attempt(id, 1): note}))
    ledger.end(Attempt(id, 1), AttemptResult(reason=Reason.RAISED, detail="it raised", error="Traceback", exit_code=1))
    ledger.retry(id)
    assert claimed(ledger, [claim_of(id, 4, before=1)]) == [id]
    record = ledger.get(id)
    left = (record.progress_done, record.message, record.cpu_s, record.rss_bytes, record.error, record.exit_code)
    assert left == (None,) * 6
    assert (record.reason, record.detail, record.ended_at, record.attempt, record.tries) == (None, None, None, 2, 1)


def test_a_slot_that_was_taken_meanwhile_spoils_one_claim_and_not_the_others(ledger, other):
    first, *rest = requested(ledger, 4)
    assert claimed(other, [claim_of(first, 2)]) == [first]
    outcome = ledger.apply(Batch(claims=[claim_of(id, slot) for slot, id in enumerate(rest, 1)]))
    assert [claim.slot for claim in outcome.claimed] == [1, 3]
    assert outcome.passed_over == []
    assert ledger.get(rest[1]).status is Status.REQUEST


@only_postgres
def test_a_plan_that_was_made_while_the_table_was_small_is_not_kept(ledger, store):
    # psycopg prepares what it runs often. The queue is small at first, and a kept plan that reads all of it would go on
    # to when there are thousands of rows: measured, ten times the server's work for each task.
    requested(ledger, 300)
    for first in range(1, 300, 10):
        batch = [claim_of(id, slot) for slot, id in enumerate(range(first, first + 10))]
        assert len(claimed(ledger, batch)) == 10
        assert len(ledger.apply(Batch(ends={claim.attempt: AttemptResult(result="1") for claim in batch})).ended) == 10
    with store.connected():
        kept = "SELECT count(*), sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements WHERE statement ~ %s"
        (count, generic, custom) = store.rows_of(kept, ["UPDATE"])[0]
    assert count >= 2
    assert (generic, custom > 0) == (0, True)


# ---- somebody else is at it ----


@only_postgres
def test_a_row_that_somebody_has_locked_is_passed_over_and_claimed_in_a_later_pass(ledger, hand, caplog):
    ids = requested(ledger, 3)
    hand.execute(LOCK_ROW, (ids[1],))
    claims = [claim_of(id, slot) for slot, id in enumerate(ids)]
    with caplog.at_level(logging.INFO, "bgsupervisor"):
        outcome = ledger.apply(Batch(claims=claims))
    assert outcome.claimed == [claims[0], claims[2]]
    assert outcome.passed_over == [claims[1]]
    assert caplog.records == [], "nobody has decided anything"
    assert [due.id for due in ledger.due(["a:b"], limit=9)] == [ids[1]]
    assert ledger.due(["a:b"], limit=9, unlocked=True) == []
    hand.commit()
    assert claimed(ledger, [claims[1]]) == [ids[1]]


@only_postgres
def test_a_claim_waits_for_no_cancel_under_way_and_what_it_decides_holds(ledger, other, store):
    store.set_busy_timeout(0.01)  # whoever waits here fails
    cancelled, kept, free = requested(ledger, 3)
    claims = [claim_of(id, slot) for slot, id in enumerate((cancelled, kept, free))]
    with contextlib.suppress(LookupError), other.store.writing():
        other.cancel(kept, by=None)
        assert claimed(ledger, [claims[1], claims[2]]) == [free]
        raise LookupError  # and is rolled back
    with other.store.writing():
        other.cancel(cancelled, by="jana")
        assert claimed(ledger, [claims[0], claims[1]]) == [kept]
    assert claimed(ledger, [claims[0]]) == []
    assert [ledger.get(id).status for id in (cancelled, kept, free)] == ["INTERRUPTED", "START", "START"]


class Apart(threading.Thread):
    """Does something beside the test, and hands over what came of it."""

    def __init__(self, act):
        super().__init__(daemon=True)
        self.act, self.found = act, None
        self.start()

    def run(self):
        self.found = self.act()

    def outcome(self):
        self.join(LIMIT_S)
        assert not self.is_alive()
        return self.found


def waits_for_a_lock(store_url):
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with contextlib.closing(psycopg.connect(store_url, autocommit=True)) as connection:
        wait_until(lambda: connection.execute(query).fetchone()[0] == 1, "one waits for the other")


@only_postgres
def test_a_cancel_of_what_is_just_being_claimed_is_not_lost(ledger, other, store_url):
    (id,) = requested(ledger)
    with ledger.store.connected(), ledger.store.database.atomic():
        assert claimed(ledger, [claim_of(id, 0)]) == [id]

        def cancel():
            with contextlib.closing(other.store):
                return other.cancel(id, by="jana")

        cancelling = Apart(cancel)
        waits_for_a_lock(store_url)
    record = cancelling.outcome()
    assert (record.status, record.cancel_requested_by) == (Status.START, "jana")
    assert ledger.control_requests()[0].cancelled


@only_postgres
def test_a_body_that_comes_back_does_not_fail_when_its_slot_is_just_being_claimed(ledger, other, store_url):
    waiting, new = requested(ledger, 2)
    assert claimed(ledger, [claim_of(waiting, 0)]) == [waiting]
    assert ledger.waits.begin(Waiter(waiting, 1), [Waiting("end", target_id=new)], slots=1, max_waiting=9)
    with ledger.store.connected(), ledger.store.database.atomic():
        assert claimed(ledger, [claim_of(new, 0)]) == [new]

        def resume():
            with contextlib.closing(other.store):
                return other.waits.resume(Waiter(waiting, 1), slots=1)

        coming_back = Apart(resume)
        waits_for_a_lock(store_url)
    assert coming_back.outcome() is None
    assert [row["kind"] for row in ledger.waits.rows([waiting])] == ["slot"], "it is next in line"
    assert (ledger.get(waiting).slot, ledger.get(new).slot) == (None, 0)


APP = """
from bgsupervisor import task

@task
def quick() -> int:
    return 7
"""


def test_a_supervisor_starts_others_beside_locked_rows_and_those_once_they_are_free_and_does_not_spin(
    make_app, postgres_url
):
    app = make_app(APP, database=postgres_url, slots=2)
    app.start()
    locked = app.service.request_many("appx:quick", [None] * 500, priority=5, delay_s=2.0)
    with contextlib.closing(psycopg.connect(postgres_url)) as hand:
        ids = [handle.id for handle in locked]
        found = hand.execute("SELECT status FROM bgsupervisor_task WHERE id = ANY(%s) FOR UPDATE", (ids,)).fetchall()
        assert found == [("REQUEST",)] * 500, "they are locked before their time has come"
        wait_until(lambda: len(app.service.ledger.due(["appx:quick"], limit=9)) == 9, "it has")
        for handle in [app.service.request("appx:quick") for _ in range(3)]:
            assert app.wait(handle).status is Status.DONE
        process = psutil.Process(app.supervisors[0].process.pid)
        used_s, began = sum(process.cpu_times()[:2]), time.monotonic()
        wait_until(lambda: time.monotonic() > began + 1, "a second has passed")
        assert sum(process.cpu_times()[:2]) - used_s < allowed_s(0.4)
        assert [app.service.status(handle) for handle in locked] == [Status.REQUEST] * 500
        hand.rollback()
    assert [app.wait(handle).attempt for handle in locked] == [1] * 500


def test_however_many_rows_a_pass_writes_no_statement_is_too_large(ledger):
    [id] = requested(ledger)
    assert claimed(ledger, [claim_of(id, 0)]) == [id]
    many = [Attempt(id, 1), *(Attempt(id + number, 1) for number in range(1, 7000))]
    ledger.apply(Batch(telemetry={attempt: Telemetry(progress_done=1.0) for attempt in many}))
    assert ledger.get(id).progress_done == 1.0
    outcome = ledger.apply(Batch(ends={attempt: AttemptResult(result="1") for attempt in many}))
    assert outcome.ended == {Attempt(id, 1)}
    assert ledger.get(id).status is Status.DONE
