"""The rows of waiting in a real SQLite file: each step is one transaction, and whoever ends leaves nothing behind."""

from __future__ import annotations

import threading

import pytest

from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import Deadlock, LockHeld
from bgsupervisor.ledger import Attempt, Batch, Claim, Ledger, Request
from bgsupervisor.models import Store
from bgsupervisor.processes import ProcessIdentity
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.waits import DUE, Found, Held, Queued, Waiting, barrier_key, lock_key, task_key
from bgsupervisor.wire import End

SLOTS = 4
DONE = End(result="1")
KILLED = End(reason=Reason.SIGNALLED, signal=9, detail="killed")


class Rows:
    """One connection to the rows, with short words for what the tests do."""

    def __init__(self, store):
        self.store = store
        self.ledger = Ledger(store, SystemClock())
        self.waits = self.ledger.waits

    def planned(self, *after, any_end=False):
        request = Request(name="appx:body", data="{}", after=after, after_any_end=any_end)
        return self.ledger.request(request)[0]

    def running(self):
        """Return a new task that runs in the lowest free slot."""
        id = self.planned()
        taken = {record.slot for record in self.ledger.starts()}
        slot = next(slot for slot in range(1000) if slot not in taken)
        identity = ProcessIdentity("h", "b", 1, 1000 + id, 1)
        [due] = [due for due in self.ledger.due(["appx:body"], limit=100) if due.id == id]
        assert self.ledger.apply(Batch(claims=[Claim(due, identity, slot, 0.0)])).claimed
        return id

    def end(self, id, end=DONE):
        return self.ledger.apply(Batch(ends={Attempt(id, 1): end})).keys

    def acquire(self, id, name="l", permits=1, *, waits_already=False, max_waiting=100):
        return self.waits.acquire(
            id, 1, name, permits, slots=SLOTS, max_waiting=max_waiting, waits_already=waits_already
        )

    def wait(self, id, *waiting, max_waiting=100):
        return self.waits.begin(id, 1, waiting, max_waiting=max_waiting)

    def slot(self, id):
        return self.ledger.get(id).slot

    def left(self):
        """Return all rows that tell of somebody who waits, holds or stands at a barrier."""
        tables = self.store.tables
        with self.store.connected():
            found = [table.select().dicts() for table in (tables.Wait, tables.Party, tables.Dependency)]
            holds = tables.Hold.select().where(tables.Hold.task_id.is_null(False)).dicts()
            return [row for rows in [*found, holds] for row in list(rows)]


@pytest.fixture
def rows(store):
    return Rows(store)


@pytest.fixture
def other(store, tmp_path):
    """A second connection to the same file."""
    second = Store.open(f"sqlite:///{tmp_path}/ledger.db", "bgsupervisor_", busy_timeout_s=5.0)
    yield Rows(second)
    second.close()


# ---- parts ----


def test_a_part_is_found_by_another_connection_once_it_is_reached(rows, other):
    id = rows.running()
    assert other.waits.find([id], "loaded") == [Found(id, Status.START, None, None, None)]
    assert rows.waits.reach(id, 1, "loaded", "7")
    assert rows.waits.reach(id, 1, "loaded", "8")
    assert other.waits.find([id, 99], "loaded") == [Found(id, Status.START, None, None, "8"), None]
    assert other.waits.find([id], "other")[0].value is None
    assert other.waits.find([id], None)[0].value is None
    rows.end(id)
    assert other.waits.find([id], None) == [Found(id, Status.DONE, None, None, "1")]
    assert other.waits.find([id], "loaded")[0].value == "8"


def test_a_superseded_attempt_reaches_nothing(rows):
    id = rows.running()
    assert not rows.waits.reach(id, 2, "loaded", "7")
    rows.end(id)
    assert not rows.waits.reach(id, 1, "loaded", "7")
    assert rows.waits.find([id], "loaded")[0].value is None


def test_a_retry_clears_the_parts(rows):
    id = rows.running()
    rows.waits.reach(id, 1, "loaded", "7")
    rows.end(id, KILLED)
    assert rows.waits.find([id], "loaded")[0].value == "7"
    rows.ledger.retry(id)
    assert rows.waits.find([id], "loaded")[0].value is None


# ---- waiting and slots ----


def test_a_wait_gives_the_slot_and_the_end_of_it_takes_one_again(rows, other):
    id, target = rows.running(), rows.running()
    assert rows.wait(id, Waiting("end", target))
    assert other.slot(id) is None
    [row] = other.waits.rows([id])
    assert (row["kind"], row["target_id"], row["attempt"]) == ("end", target, 1)
    assert rows.waits.resume(id, 1, slots=SLOTS) == SLOTS - 1
    assert other.slot(id) == SLOTS - 1
    assert rows.left() == []


def test_a_slot_is_kept_when_enough_wait_without_one(rows):
    first, second, target = rows.running(), rows.running(), rows.running()
    assert rows.wait(first, Waiting("end", target), max_waiting=1)
    assert not rows.wait(second, Waiting("end", target), max_waiting=1)
    assert rows.slot(second) == 1
    assert rows.acquire(target, "l") == Held(0, None)
    assert rows.acquire(second, "l", max_waiting=1) == Queued(slot_given=False)
    assert rows.waits.resume(second, 1, slots=SLOTS) == 1


def test_a_second_wait_of_a_body_that_has_no_slot_tells_so(rows):
    id, target = rows.running(), rows.running()
    assert rows.wait(id, Waiting("end", target))
    assert rows.wait(id, Waiting("part", target, "loaded"))
    assert rows.wait(id, Waiting("part", target, "loaded"), max_waiting=0)


def test_those_who_come_back_take_slots_in_their_order(rows):
    target = rows.running()
    waiters = []
    for _ in range(3):
        waiters.append(rows.running())
        rows.wait(waiters[-1], Waiting("end", target))
    fillers = [rows.running() for _ in range(3)]
    assert [rows.waits.resume(id, 1, slots=SLOTS) for id in (waiters[2], waiters[0], waiters[1])] == [None] * 3
    assert {row["kind"] for row in rows.waits.rows()} == {"slot"}
    rows.end(fillers[0])
    assert rows.waits.resume(waiters[0], 1, slots=SLOTS) is None
    assert rows.waits.resume(waiters[1], 1, slots=SLOTS) is None
    assert rows.waits.resume(waiters[2], 1, slots=SLOTS) == 1
    rows.end(fillers[1])
    assert rows.waits.resume(waiters[1], 1, slots=SLOTS) is None  # it is the other's, who stands before it
    rows.end(fillers[2])
    assert rows.waits.resume(waiters[1], 1, slots=SLOTS) == 3
    assert rows.waits.resume(waiters[0], 1, slots=SLOTS) == 2


def test_a_grant_gives_a_slot_to_a_waiting_attempt_alone(rows, other):
    id, target = rows.running(), rows.running()
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): 3})).returned == set()
    rows.wait(id, Waiting("end", target))
    assert rows.ledger.apply(Batch(returns={Attempt(id, 2): 3})).returned == set()
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): 3})).returned == {Attempt(id, 1)}
    assert other.slot(id) == 3
    assert rows.waits.rows() == []
    rows.wait(id, Waiting("end", target))
    rows.end(id, KILLED)
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): 3})).returned == set()


def test_a_slot_that_is_taken_is_granted_to_nobody_and_spoils_no_other_row(rows):
    id, target = rows.running(), rows.running()
    rows.wait(id, Waiting("end", target))
    outcome = rows.ledger.apply(Batch(returns={Attempt(id, 1): rows.slot(target)}, ends={Attempt(target, 1): DONE}))
    assert outcome.returned == {Attempt(id, 1)}  # the end comes first in the same batch
    later = rows.running()
    rows.wait(id, Waiting("end", later))
    last = rows.running()
    outcome = rows.ledger.apply(Batch(returns={Attempt(id, 1): rows.slot(last)}, ends={Attempt(later, 1): DONE}))
    assert (outcome.returned, outcome.ended) == (set(), {Attempt(later, 1)})
    assert rows.slot(id) is None


# ---- deadlocks ----


def test_a_wait_that_would_close_a_circle_leaves_all_as_it_was(rows):
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("part", second, "loaded"))
    with pytest.raises(Deadlock) as raised:
        rows.wait(second, Waiting("end", first))
    assert raised.value.circle == [(second, f"the end of task {first}"), (first, f'part "loaded" of task {second}')]
    assert [row["task_id"] for row in rows.waits.rows()] == [first]
    assert rows.slot(second) == 1


def test_a_part_that_is_reached_makes_no_circle_though_its_waiter_has_not_woken(rows):
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("part", second, "loaded"))
    rows.waits.reach(second, 1, "loaded", "1")
    rows.wait(second, Waiting("end", first))


def test_a_lock_that_was_released_makes_no_circle_though_its_waiter_has_not_woken(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(second)
    rows.acquire(first)
    rows.waits.release(second, 1, "l")
    rows.wait(second, Waiting("end", first))


def test_a_permit_that_a_third_may_give_back_makes_no_circle(rows):
    first, second, third = rows.running(), rows.running(), rows.running()
    rows.acquire(first, permits=2)
    rows.acquire(second, permits=2)
    rows.acquire(third, permits=2)
    rows.wait(first, Waiting("end", third))
    with pytest.raises(Deadlock):
        rows.wait(second, Waiting("end", third))


def test_a_lock_that_would_close_a_circle_is_not_queued_for(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first, "a")
    rows.acquire(second, "b")
    assert rows.acquire(first, "b") == Queued(slot_given=True)
    with pytest.raises(Deadlock):
        rows.acquire(second, "a")
    assert [row["task_id"] for row in rows.waits.rows()] == [first]


def test_a_dependent_that_has_not_started_is_part_of_a_circle(rows):
    first = rows.running()
    dependent = rows.planned(first)
    with pytest.raises(Deadlock) as raised:
        rows.wait(first, Waiting("end", dependent))
    assert raised.value.circle == [
        (first, f"the end of task {dependent}"),
        (dependent, f"the end of task {first}"),
    ]


def test_who_waits_for_a_slot_or_at_a_barrier_is_in_no_circle(rows):
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("barrier", target="b"))
    rows.wait(second, Waiting("end", first))
    rows.wait(first, Waiting("slot"))
    rows.wait(second, Waiting("end", first))


# ---- locks ----


def test_permits_are_given_in_the_order_of_asking(rows, other):
    ids = [rows.running() for _ in range(5)]
    assert rows.acquire(ids[0], permits=2) == Held(0, None)
    assert other.acquire(ids[1], permits=2) == Held(1, None)
    for id in ids[2:]:
        assert rows.acquire(id, permits=2) == Queued(slot_given=True)
    assert rows.waits.release(ids[0], 1, "l") == [lock_key("l")]
    assert not rows.waits.may_take(ids[3], "l", 2)
    assert other.acquire(ids[3], permits=2, waits_already=True) == Queued(slot_given=False)
    assert rows.acquire(ids[0], permits=2) == Queued(slot_given=True)  # it asks anew and stands last
    assert rows.waits.may_take(ids[2], "l", 2)
    assert other.acquire(ids[2], permits=2, waits_already=True) == Held(0, None, slot=SLOTS - 1)
    assert [row["task_id"] for row in rows.waits.rows()] == [ids[3], ids[4], ids[0]]


def test_a_lock_is_had_once_by_one_task_and_released_by_its_holder_alone(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first, permits=2)
    with pytest.raises(LockHeld):
        rows.acquire(first, permits=2)
    assert rows.waits.release(second, 1, "l") == []
    assert rows.waits.release(first, 2, "l") == []
    assert rows.waits.release(first, 1, "l") == [lock_key("l")]
    assert rows.left() == []


def test_a_permit_with_no_free_slot_leaves_a_wait_for_one(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first)
    rows.acquire(second)
    fillers = [rows.running() for _ in range(3)]
    rows.waits.release(first, 1, "l")
    assert rows.acquire(second, waits_already=True) == Held(0, None, slot=None)
    assert [row["kind"] for row in rows.waits.rows([second])] == ["slot"]
    rows.end(fillers[0])
    assert rows.waits.resume(second, 1, slots=SLOTS) == 1


def test_connections_that_race_for_permits_never_get_more_than_there_are(rows, tmp_path):
    ids = [rows.running() for _ in range(8)]
    got = []

    def race(id):
        store = Store.open(f"sqlite:///{tmp_path}/ledger.db", "bgsupervisor_", busy_timeout_s=10.0)
        got.append(Rows(store).acquire(id, permits=3))
        store.close()

    threads = [threading.Thread(target=race, args=(id,)) for id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(one.permit for one in got if isinstance(one, Held)) == [0, 1, 2]
    assert len(got) == 8


# ---- ends ----


def test_what_an_attempt_held_is_free_in_the_transaction_of_its_end(rows, other):
    holder, waiter = rows.running(), rows.running()
    rows.acquire(holder)
    rows.acquire(waiter)
    with rows.store.writing():
        rows.end(holder, KILLED)
        assert other.ledger.get(holder).status is Status.START
        assert not other.waits.may_take(waiter, "l", 1)
    assert other.ledger.get(holder).status is Status.INTERRUPTED
    assert other.waits.may_take(waiter, "l", 1)
    assert other.acquire(waiter, waits_already=True).abandoned_by == holder


def test_an_end_that_is_rolled_back_frees_nothing(rows, other):
    holder = rows.running()
    rows.acquire(holder)
    rows.wait(holder, Waiting("end", rows.running()))
    before = other.left()

    def fail():
        with rows.store.writing():
            rows.end(holder, KILLED)
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert other.left() == before


def test_an_end_rings_for_all_that_it_changes(rows):
    id, other = rows.running(), rows.running()
    dependent = rows.planned(id)
    rows.acquire(id, "held")
    rows.acquire(other, "queued")
    rows.acquire(id, "queued")
    rows.waits.arrive(id, 1, "s", "b", 3)
    rows.waits.arrive(other, 1, "s", "b", 3)
    keys = rows.end(id, KILLED)
    wanted = {task_key(id), task_key(dependent), lock_key("held"), lock_key("queued"), barrier_key("s", "b"), DUE}
    assert set(keys) == wanted


def test_an_end_that_came_too_late_frees_nothing(rows):
    id = rows.running()
    rows.acquire(id)
    rows.ledger.apply(Batch(ends={Attempt(id, 7): KILLED}))
    assert len(rows.left()) == 1


def test_a_done_holder_abandons_nothing(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first)
    rows.end(first, DONE)
    assert rows.acquire(second) == Held(0, None)


def test_who_died_with_a_permit_is_told_once(rows):
    first, second, third = rows.running(), rows.running(), rows.running()
    rows.acquire(first)
    rows.end(first, KILLED)
    assert rows.acquire(second) == Held(0, first)
    rows.waits.release(second, 1, "l")
    assert rows.acquire(third) == Held(0, None)


# ---- barriers ----


def test_a_barrier_opens_with_its_last_party_and_counts_anew(rows):
    ids = [rows.running() for _ in range(4)]
    assert rows.waits.arrive(ids[0], 1, "s", "b", 2) == (0, [])
    assert rows.waits.barrier_outcome(ids[0], "s", "b", 0) is None
    assert rows.waits.arrive(ids[1], 1, "s", "b", 2) == (0, [barrier_key("s", "b")])
    assert rows.waits.arrive(ids[2], 1, "s", "b", 2) == (1, [])  # the first have not gone through yet
    assert rows.waits.barrier_outcome(ids[0], "s", "b", 0) == "passed"
    assert rows.waits.barrier_outcome(ids[2], "s", "b", 1) is None
    for id in ids[:2]:
        rows.waits.leave_barrier(id, "s", "b", 0)
    assert rows.waits.arrive(ids[3], 1, "s", "b", 2) == (1, [barrier_key("s", "b")])
    for id in ids[2:]:
        rows.waits.leave_barrier(id, "s", "b", 1)
    assert rows.left() == []


def test_barriers_of_other_scopes_and_names_are_others(rows):
    first, second = rows.running(), rows.running()
    rows.waits.arrive(first, 1, "s", "b", 2)
    assert rows.waits.arrive(second, 1, "t", "b", 2) == (0, [])
    assert rows.waits.arrive(second, 1, "s", "c", 2) == (0, [])


def test_a_party_that_arrives_again_counts_once(rows):
    first, second = rows.running(), rows.running()
    rows.waits.arrive(first, 1, "s", "b", 2)
    assert rows.waits.arrive(first, 2, "s", "b", 2) == (0, [])
    assert rows.waits.arrive(second, 1, "s", "b", 2)[1]


def test_a_party_that_dies_breaks_the_barrier_and_one_that_passed_does_not(rows):
    ids = [rows.running() for _ in range(3)]
    for id in ids[:2]:
        rows.waits.arrive(id, 1, "s", "b", 3)
    rows.end(ids[0], KILLED)
    told = rows.waits.barrier_outcome(ids[1], "s", "b", 0)
    assert told == f"task {ids[0]} was interrupted (SIGNALLED) while it waited there"
    assert rows.waits.arrive(ids[2], 1, "s", "b", 2) == (1, [])
    fourth = rows.running()
    rows.waits.arrive(fourth, 1, "s", "b", 2)
    rows.end(fourth, KILLED)
    assert rows.waits.barrier_outcome(ids[2], "s", "b", 1) == "passed"


# ---- dependencies ----


def names_of_due(rows):
    return [due.id for due in rows.ledger.due(["appx:body"], limit=10)]


def test_a_dependent_is_due_when_all_it_comes_after_are_done(rows):
    first, second = rows.running(), rows.running()
    dependent = rows.planned(first, second, first)
    assert names_of_due(rows) == []
    assert DUE in rows.end(first)
    assert names_of_due(rows) == []
    rows.end(second)
    assert names_of_due(rows) == [dependent]
    assert rows.left() == []


def test_an_interruption_strands_those_after_it_and_those_after_them(rows):
    first, free = rows.running(), rows.running()
    second = rows.planned(first, free)
    third = rows.planned(second)
    any_end = rows.planned(third, any_end=True)
    keys = rows.end(first, KILLED)
    assert {task_key(second), task_key(third)} <= set(keys)
    for id, on in ((second, first), (third, second)):
        record = rows.ledger.get(id)
        assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.DEPENDENCY)
        assert record.detail == f"had to come after task {on}, which was interrupted"
    assert names_of_due(rows) == [any_end]
    assert rows.left() == []


def test_a_thousand_tasks_in_a_row_are_stranded_by_the_first(rows):
    first = last = rows.planned()
    with rows.store.writing():
        for _ in range(1000):
            last = rows.planned(last)
    rows.ledger.cancel(first, by=None)
    assert rows.ledger.get(last).reason is Reason.DEPENDENCY
    assert rows.ledger.live_counts() == {Status.REQUEST: 0, Status.START: 0}
    assert rows.left() == []


def test_a_dependent_of_what_was_interrupted_before_never_waits(rows):
    first = rows.running()
    rows.end(first, KILLED)
    assert rows.ledger.get(rows.planned(first)).reason is Reason.DEPENDENCY
    any_end = rows.planned(first, any_end=True)
    assert names_of_due(rows) == [any_end]
    assert rows.left() == []


def test_a_dependent_that_is_cancelled_comes_after_nobody(rows):
    first = rows.running()
    dependent = rows.planned(first)
    rows.ledger.cancel(dependent, by=None)
    assert rows.left() == []
    rows.end(first)
