"""The rows of waiting in a real SQLite file: each step is one transaction, and whoever ends leaves nothing behind."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest

from bgsupervisor.clock import SystemClock
from bgsupervisor.database.store import Store
from bgsupervisor.errors import Deadlock, LockHeld, NotInTask
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ledger import Ledger
from bgsupervisor.ledger.attempts import Attempt, Batch, Claim, SlotGrant
from bgsupervisor.ledger.barriers import barrier_key
from bgsupervisor.ledger.locks import Held, Queued, turn_key
from bgsupervisor.ledger.parts import Found
from bgsupervisor.ledger.requests import Request
from bgsupervisor.ledger.slots import Waiter, Waiting
from bgsupervisor.ledger.waitgraph import parent_scope
from bgsupervisor.ledger.waits import DUE, task_key
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.system.processes import ProcessIdentity

SLOTS = 4
DONE = AttemptResult(result="1")
KILLED = AttemptResult(reason=Reason.SIGNALLED, signal=9, detail="killed")


class Rows:
    """One connection to the rows, with short words for what the tests do."""

    def __init__(self, store):
        self.store = store
        self.ledger = Ledger(store, SystemClock())
        self.waits = self.ledger.waits

    def planned(self, *after, any_end=False, parent=None):
        request = Request(name="appx:body", data="{}", after=after, after_any_end=any_end, parent_id=parent)
        return self.ledger.request(request)[0]

    def running(self, parent=None):
        """Return a new task that runs in the lowest free slot."""
        id = self.planned(parent=parent)
        taken = {record.slot for record in self.ledger.starts()}
        slot = next(slot for slot in range(1000) if slot not in taken)
        identity = ProcessIdentity("h", "b", 1, 1000 + id, 1)
        [due] = [due for due in self.ledger.due(["appx:body"], limit=100) if due.id == id]
        assert self.ledger.apply(Batch(claims=[Claim(due, identity, slot, 0.0)])).claimed
        return id

    def end(self, id, end=DONE):
        return self.ledger.apply(Batch(ends={Attempt(id, 1): end})).keys

    def acquire(self, id, name="l", permits=1, *, max_waiting=100, **waiter):
        return self.waits.acquire(Waiter(id, 1, **waiter), name, permits, slots=SLOTS, max_waiting=max_waiting)

    def held(self, id, name="l"):
        return self.waits.held(id, 1, name)

    def release(self, id, name="l", attempt=1):
        return self.waits.release(id, attempt, name, slots=SLOTS)

    def wait(self, id, *waiting, max_waiting=100, **waiter):
        return self.waits.begin(Waiter(id, 1, **waiter), waiting, slots=SLOTS, max_waiting=max_waiting)

    def resume(self, id, **waiter):
        return self.waits.resume(Waiter(id, 1, **waiter), slots=SLOTS)

    def reach(self, id, part="loaded", value="1", attempt=1):
        return self.waits.reach(id, attempt, part, value, slots=SLOTS)

    def arrive(self, id, name="b", parties=2, scope="s", attempt=1):
        return self.waits.barriers.arrive(id, attempt, scope, name, parties)

    def outcome(self, id, generation=0):
        return self.waits.barriers.outcome(id, "s", "b", generation)

    def leave(self, id, generation=0):
        return self.waits.barriers.leave(id, "s", "b", generation)

    def slot(self, id):
        return self.ledger.get(id).slot

    def left(self):
        """Return all rows that tell of somebody who waits, holds or stands at a barrier."""
        tables = self.store.tables
        with self.store.connected():
            found = [table.select().dicts() for table in (tables.Wait, tables.Participant, tables.Dependency)]
            holds = tables.Hold.select().where(tables.Hold.task_id.is_null(False)).dicts()
            return [row for rows in [*found, holds] for row in list(rows)]


@pytest.fixture
def rows(store):
    return Rows(store)


@pytest.fixture
def other(store, store_url):
    """A second connection to the same database."""
    second = Store.open(store_url, "bgsupervisor_", busy_timeout_s=5.0)
    yield Rows(second)
    second.close()


# ---- parts ----


def test_a_part_is_found_by_another_connection_once_it_is_reached(rows, other):
    id = rows.running()
    assert other.waits.find([id], "loaded") == [Found(id, Status.START, None, None, None)]
    assert rows.reach(id, value="7")
    assert rows.reach(id, value="8")
    assert other.waits.find([id, 99], "loaded") == [Found(id, Status.START, None, None, "8"), None]
    assert other.waits.find([id], "other")[0].value is None
    assert other.waits.find([id], None)[0].value is None
    rows.end(id)
    assert other.waits.find([id], None) == [Found(id, Status.DONE, None, None, "1")]
    assert other.waits.find([id], "loaded")[0].value == "8"


def test_a_superseded_attempt_reaches_nothing(rows):
    id = rows.running()
    assert not rows.reach(id, attempt=2)
    rows.end(id)
    assert not rows.reach(id, value="7")
    assert rows.waits.find([id], "loaded")[0].value is None


def test_a_retry_clears_the_parts(rows):
    id = rows.running()
    rows.reach(id, value="7")
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
    assert rows.resume(id) == SLOTS - 1
    assert other.slot(id) == SLOTS - 1
    assert rows.left() == []


def test_a_slot_is_kept_when_enough_wait_without_one(rows):
    first, second, target = rows.running(), rows.running(), rows.running()
    assert rows.wait(first, Waiting("end", target), max_waiting=1)
    assert not rows.wait(second, Waiting("end", target), max_waiting=1)
    assert rows.slot(second) == 1
    assert rows.acquire(target, "l") == Held(0, None)
    assert rows.acquire(second, "l", max_waiting=1) == Queued(slot_given=False)
    assert rows.resume(second) == 1


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
    assert [rows.resume(id) for id in (waiters[2], waiters[0], waiters[1])] == [None] * 3
    assert {row["kind"] for row in rows.waits.rows()} == {"slot"}
    rows.end(fillers[0])
    assert rows.resume(waiters[0]) is None
    assert rows.resume(waiters[1]) is None
    assert rows.resume(waiters[2]) == 1
    rows.end(fillers[1])
    assert rows.resume(waiters[1]) is None  # it is the other's, who stands before it
    rows.end(fillers[2])
    assert rows.resume(waiters[1]) == 3
    assert rows.resume(waiters[0]) == 2


def test_a_waiter_that_asks_for_a_slot_again_keeps_its_place(rows):
    target = rows.running()
    first, second = (rows.running() for _ in range(2))
    for waiter in (first, second):
        rows.wait(waiter, Waiting("end", target))
    fillers = [rows.running() for _ in range(3)]
    assert [rows.resume(id) for id in (first, second, first)] == [None] * 3
    assert [row["task_id"] for row in rows.waits.rows()] == [first, second]
    rows.end(fillers[0])
    assert rows.resume(second) is None
    assert rows.resume(first) == 1


def test_a_grant_gives_a_slot_to_a_waiting_attempt_alone(rows, other):
    id, target = rows.running(), rows.running()
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): SlotGrant(0, 3)})).returned == set()
    rows.wait(id, Waiting("end", target))
    assert rows.ledger.apply(Batch(returns={Attempt(id, 2): SlotGrant(0, 3)})).returned == set()
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): SlotGrant(7, 3)})).returned == set()  # after another wait
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): SlotGrant(0, 3)})).returned == {Attempt(id, 1)}
    assert other.slot(id) == 3
    assert rows.waits.rows() == []
    assert not rows.wait(id, Waiting("end", target), max_waiting=0)  # it waits, and keeps its slot
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): SlotGrant(0, 2)})).returned == set()
    assert other.slot(id) == 3
    rows.resume(id)
    rows.wait(id, Waiting("end", target))
    rows.end(id, KILLED)
    assert rows.ledger.apply(Batch(returns={Attempt(id, 1): SlotGrant(0, 3)})).returned == set()


def test_a_slot_that_is_taken_is_granted_to_nobody_and_spoils_no_other_row(rows):
    id, target = rows.running(), rows.running()
    rows.wait(id, Waiting("end", target))
    outcome = rows.ledger.apply(
        Batch(returns={Attempt(id, 1): SlotGrant(0, rows.slot(target))}, ends={Attempt(target, 1): DONE})
    )
    assert outcome.returned == {Attempt(id, 1)}  # the end comes first in the same batch
    later = rows.running()
    rows.wait(id, Waiting("end", later))
    last = rows.running()
    outcome = rows.ledger.apply(
        Batch(returns={Attempt(id, 1): SlotGrant(0, rows.slot(last))}, ends={Attempt(later, 1): DONE})
    )
    assert (outcome.returned, outcome.ended) == (set(), {Attempt(later, 1)})
    assert rows.slot(id) is None


# ---- deadlocks ----


def test_a_wait_that_would_close_a_cycle_leaves_all_as_it_was(rows):
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("part", second, "loaded"))
    with pytest.raises(Deadlock) as raised:
        rows.wait(second, Waiting("end", first))
    assert raised.value.circle == [(second, f"the end of task {first}"), (first, f'part "loaded" of task {second}')]
    assert [row["task_id"] for row in rows.waits.rows()] == [first]
    assert rows.slot(second) == 1


def test_a_part_that_is_reached_makes_no_cycle_though_its_waiter_has_not_woken(rows):
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("part", second, "loaded"))
    rows.reach(second)
    rows.wait(second, Waiting("end", first))


def test_a_lock_that_was_released_makes_no_cycle_though_its_waiter_has_not_woken(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(second)
    rows.acquire(first)
    rows.release(second)
    rows.wait(second, Waiting("end", first))


def test_a_permit_that_a_third_may_give_back_makes_no_cycle(rows):
    first, second, third = rows.running(), rows.running(), rows.running()
    rows.acquire(first, permits=2)
    rows.acquire(second, permits=2)
    rows.acquire(third, permits=2)
    rows.wait(first, Waiting("end", third))
    with pytest.raises(Deadlock):
        rows.wait(second, Waiting("end", third))


def test_a_lock_that_would_close_a_cycle_is_not_queued_for(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first, "a")
    rows.acquire(second, "b")
    assert rows.acquire(first, "b") == Queued(slot_given=True)
    with pytest.raises(Deadlock):
        rows.acquire(second, "a")
    assert [row["task_id"] for row in rows.waits.rows()] == [first]


def test_a_dependent_that_has_not_started_is_part_of_a_cycle(rows):
    first = rows.running()
    dependent = rows.planned(first)
    with pytest.raises(Deadlock) as raised:
        rows.wait(first, Waiting("end", dependent))
    assert raised.value.circle == [
        (first, f"the end of task {dependent}"),
        (dependent, f"the end of task {first}"),
    ]


def test_who_waits_for_a_slot_or_at_a_barrier_is_in_no_cycle(rows):
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("barrier", target="b"))
    rows.wait(second, Waiting("end", first))
    rows.wait(first, Waiting("slot"))
    rows.wait(second, Waiting("end", first))


def test_who_stands_behind_another_in_a_queue_waits_for_it_too(rows):
    """One of two permits is free, but the first in the queue wants to be alone and waits for the last."""
    holder, alone, behind = [rows.running() for _ in range(3)]
    rows.acquire(holder, permits=2)
    rows.acquire(alone, permits=1)
    assert rows.acquire(behind, permits=2) == Queued(slot_given=True)
    with pytest.raises(Deadlock) as raised:
        rows.wait(holder, Waiting("end", behind))
    assert f'lock "l", behind task {alone}' in str(raised.value)


def test_a_body_of_which_more_goes_on_is_in_no_cycle(rows):
    """Another coroutine of it may reach the part."""
    first, second = rows.running(), rows.running()
    rows.wait(first, Waiting("part", second, "loaded"), whole=False, number=1)
    rows.wait(first, Waiting("part", second, "other"), whole=False, number=2)
    rows.wait(second, Waiting("end", first))
    assert [row["target"] for row in rows.waits.rows([first])] == ["loaded", "other"]
    rows.resume(first, number=1, whole=False)
    assert [row["target"] for row in rows.waits.rows([first])] == ["other"]


def test_waiters_that_keep_all_slots_from_what_they_wait_for_are_a_cycle(rows):
    planned = rows.planned()
    waiters = [rows.running() for _ in range(SLOTS)]
    for id in waiters[:-1]:
        assert not rows.wait(id, Waiting("end", planned), max_waiting=0)
    with pytest.raises(Deadlock, match="a slot, all of which are held by tasks that wait"):
        rows.wait(waiters[-1], Waiting("end", planned), max_waiting=0)


def test_a_parent_that_waits_for_children_who_wait_for_one_more_is_told(rows):
    parent = rows.running()
    children = [rows.running(parent) for _ in range(2)]
    for id in children:
        rows.arrive(id, parties=3, scope=parent_scope(parent))
        rows.wait(id, Waiting("barrier", target="b"))
    with pytest.raises(Deadlock) as raised:
        rows.wait(parent, *[Waiting("end", id) for id in children])
    assert 'barrier "b", where 1 more must come' in str(raised.value)
    rows.planned(parent=parent)  # one more is coming
    assert rows.wait(parent, *[Waiting("end", id) for id in children])


# ---- slots that come with what was waited for ----


def test_a_part_brings_a_slot_to_the_few_who_wait_for_it_alone(rows, other):
    source, second = rows.running(), rows.running()
    waiter, of_two = rows.running(), rows.running()
    rows.wait(waiter, Waiting("part", source, "loaded"))
    rows.wait(of_two, Waiting("part", source, "loaded"), Waiting("part", second, "loaded"))
    rows.reach(source)
    assert other.slot(waiter) == SLOTS - 1
    assert other.waits.slot(waiter, 1) == SLOTS - 1
    assert not other.waits.is_waiting(Waiter(waiter, 1))
    assert other.slot(of_two) is None
    assert other.waits.is_waiting(Waiter(of_two, 1))


def test_a_part_that_many_wait_for_leaves_their_slots_to_the_supervisor(rows):
    source = rows.running()
    waiters = [rows.running() for _ in range(3)]
    for id in waiters:
        rows.wait(id, Waiting("part", source, "loaded"))
    rows.reach(source)
    assert [rows.slot(id) for id in waiters] == [None] * 3


def test_a_part_brings_no_slot_where_none_is_free_or_another_stands_before(rows):
    source, waiter, back = [rows.running() for _ in range(3)]
    rows.wait(waiter, Waiting("part", source, "loaded"))
    rows.wait(back, Waiting("end", source))
    fillers = [rows.running() for _ in range(3)]
    assert rows.resume(back) is None
    rows.end(fillers[0])
    rows.reach(source)
    assert rows.slot(waiter) is None
    assert [row["kind"] for row in rows.waits.rows([waiter])] == ["slot"]
    assert rows.resume(back) == 1


# ---- locks ----


def test_permits_are_given_in_the_order_of_asking(rows, other):
    ids = [rows.running() for _ in range(5)]
    assert rows.acquire(ids[0], permits=2) == Held(0, None)
    assert other.acquire(ids[1], permits=2) == Held(1, None)
    for id in ids[2:]:
        assert rows.acquire(id, permits=2) == Queued(slot_given=True)
    assert rows.held(ids[2]) is None
    assert rows.release(ids[0]) == [turn_key(ids[2])]
    assert other.held(ids[2]) == Held(0, None, slot=SLOTS - 1)
    assert other.slot(ids[2]) == SLOTS - 1
    assert other.held(ids[3]) is None
    assert rows.acquire(ids[0], permits=2) == Queued(slot_given=True)  # it asks anew and stands last
    assert [row["task_id"] for row in rows.waits.rows()] == [ids[3], ids[4], ids[0]]
    assert rows.end(ids[1], KILLED) == [task_key(ids[1]), turn_key(ids[3])]
    assert rows.held(ids[3]) == Held(1, ids[1], slot=None)  # who records an end leaves the slots to their takers


def test_permits_of_one_lock_may_differ_and_nobody_overtakes(rows):
    """A lock is free for who asks for one of N while fewer than N are held, in the order of asking."""
    ids = [rows.running() for _ in range(4)]
    assert rows.acquire(ids[0], permits=2) == Held(0, None)
    assert rows.acquire(ids[1], permits=2) == Held(1, None)
    assert rows.acquire(ids[2], permits=1) == Queued(slot_given=True)  # it wants to be alone
    assert rows.release(ids[0]) == []
    assert rows.acquire(ids[3], permits=2) == Queued(slot_given=True)  # one is free, but another stands before it
    assert rows.release(ids[1]) == [turn_key(ids[2]), turn_key(ids[3])]  # one is held, fewer than the two it asked for
    assert {row["permit"] for row in rows.left()} == {0, 1}


def test_the_next_in_a_queue_moves_up_when_a_waiter_dies(rows, other):
    holder, first, second = (rows.running() for _ in range(3))
    assert rows.acquire(holder, permits=1)
    assert rows.acquire(first, permits=1) == Queued(True)
    assert rows.acquire(second, permits=2) == Queued(True)  # one of two is free, but nobody overtakes
    assert turn_key(second) in rows.end(first, KILLED)
    assert other.held(second).permit == 1


def test_who_gives_up_lets_those_behind_go_on_and_hands_on_what_came_just_now(rows):
    first, alone, third, fourth = [rows.running() for _ in range(4)]
    rows.acquire(first, permits=2)
    rows.acquire(alone, permits=1)
    rows.acquire(third, permits=2)
    rows.acquire(fourth, permits=1)
    assert rows.waits.give_up(Waiter(alone, 1), "l", slots=SLOTS) == (3, [turn_key(third)])
    rows.release(first)
    assert rows.waits.give_up(Waiter(fourth, 1), "l", slots=SLOTS)[1] == []
    rows.release(third)
    rows.acquire(first)
    rows.acquire(third)
    rows.release(first)
    assert rows.held(third) is not None
    assert rows.waits.give_up(Waiter(third, 1), "l", slots=SLOTS)[1] == []  # it had come, and is given back
    assert rows.left() == []


def test_a_waiter_for_a_part_stands_in_no_queue_for_a_lock_of_its_name(rows):
    waiter, target, holder = (rows.running() for _ in range(3))
    rows.wait(waiter, Waiting("part", target, "l"))
    assert rows.acquire(holder, "l") == Held(0, None)
    assert rows.release(holder, "l") == []
    assert rows.held(waiter, "l") is None


def test_a_lock_is_not_queued_for_twice_by_one_task(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first)
    assert rows.acquire(second, number=1, whole=False) == Queued(slot_given=True)
    with pytest.raises(LockHeld):
        rows.acquire(second, number=2, whole=False)


def test_a_lock_is_had_once_by_one_task_and_released_by_its_holder_alone(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first, permits=2)
    with pytest.raises(LockHeld):
        rows.acquire(first, permits=2)
    assert rows.release(second) == []
    assert rows.release(first, attempt=2) == []
    assert rows.release(first) == []
    assert rows.left() == []


def test_a_permit_with_no_free_slot_leaves_a_wait_for_one(rows):
    first, second = rows.running(), rows.running()
    rows.acquire(first)
    rows.acquire(second)
    fillers = [rows.running() for _ in range(3)]
    assert rows.release(first) == [turn_key(second)]
    assert rows.held(second) == Held(0, None, slot=None)
    assert [row["kind"] for row in rows.waits.rows([second])] == ["slot"]
    rows.end(fillers[0])
    assert rows.resume(second) == 1


def test_connections_that_race_for_permits_never_get_more_than_there_are(rows, store_url):
    ids = [rows.running() for _ in range(8)]
    got = []

    def race(id):
        store = Store.open(store_url, "bgsupervisor_", busy_timeout_s=10.0)
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
        assert other.held(waiter) is None
    assert other.ledger.get(holder).status is Status.INTERRUPTED
    assert other.held(waiter) == Held(0, holder, slot=None)


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


def test_an_end_wake_ups_for_all_that_it_changes(rows):
    id, other, next_one = rows.running(), rows.running(), rows.running()
    dependent = rows.planned(id)
    rows.acquire(id, "held")
    rows.acquire(next_one, "held")
    rows.acquire(other, "queued")
    rows.acquire(id, "queued")
    rows.arrive(id, parties=3)
    rows.arrive(other, parties=3)
    keys = rows.end(id, KILLED)
    wanted = {task_key(id), task_key(dependent), turn_key(next_one), barrier_key("s", "b"), DUE}
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


def test_an_abandoned_permit_is_given_before_others(rows):
    first, second, third = [rows.running() for _ in range(3)]
    rows.acquire(first, permits=2)
    rows.acquire(second, permits=2)
    rows.end(second, KILLED)
    rows.release(first)
    assert rows.acquire(third, permits=2) == Held(1, second)


def test_who_died_with_a_permit_is_told_once(rows):
    first, second, third = rows.running(), rows.running(), rows.running()
    rows.acquire(first)
    rows.end(first, KILLED)
    assert rows.acquire(second) == Held(0, first)
    rows.release(second)
    assert rows.acquire(third) == Held(0, None)


def test_a_task_that_is_pruned_takes_its_parts_and_abandoned_permits_with_it(rows):
    first, second = rows.running(), rows.running()
    rows.reach(first)
    for id, name in ((first, "l"), (second, "m")):
        rows.acquire(id, name)
    rows.end(first, KILLED)
    before = SystemClock().now() + timedelta(seconds=1)
    rows.ledger.prune(before=before, statuses=[Status.INTERRUPTED], names=None, limit=10)
    tables = rows.store.tables
    with rows.store.connected():
        assert list(tables.Part.select().dicts()) == []
        assert [row["name"] for row in tables.Hold.select().dicts()] == ["m"]


# ---- barriers ----


def test_a_barrier_opens_with_its_last_party_and_counts_anew(rows):
    ids = [rows.running() for _ in range(4)]
    assert rows.arrive(ids[0]) == (0, [])
    assert rows.outcome(ids[0], 0) is None
    assert rows.arrive(ids[1]) == (0, [barrier_key("s", "b")])
    assert rows.arrive(ids[2]) == (1, [])  # the first have not gone through yet
    assert rows.outcome(ids[0], 0) == "passed"
    assert rows.outcome(ids[2], 1) is None
    for id in ids[:2]:
        rows.leave(id, 0)
    assert rows.arrive(ids[3]) == (1, [barrier_key("s", "b")])
    for id in ids[2:]:
        rows.leave(id, 1)
    assert rows.left() == []


def test_barriers_of_other_scopes_and_names_are_others(rows):
    first, second = rows.running(), rows.running()
    rows.arrive(first)
    assert rows.arrive(second, scope="t") == (0, [])
    assert rows.arrive(second, "c") == (0, [])


def test_a_barrier_with_a_scope_of_its_own_is_open_to_tasks_to_come(rows):
    first = rows.running()
    assert rows.arrive(first) == (0, [])
    assert rows.outcome(first) is None, "who else may come is not known, so it is not broken"
    assert rows.arrive(rows.running()) == (0, [barrier_key("s", "b")])


def test_a_party_counts_once_and_all_name_the_same_number(rows):
    first, second = rows.running(), rows.running()
    rows.arrive(first)
    with pytest.raises(ValueError, match='this task waits at the barrier "b" already'):
        rows.arrive(first)
    with pytest.raises(ValueError, match=f'parties of the barrier "b" is 3, but task {first} waits there for 2'):
        rows.arrive(second, parties=3)
    assert rows.arrive(second)[1]


def test_a_party_that_leaves_counts_no_more_and_is_told_what_had_become_of_the_barrier(rows):
    first, second, third = [rows.running() for _ in range(3)]
    rows.arrive(first)
    assert rows.leave(first) is None
    assert rows.outcome(first) == "this attempt has left it"
    assert rows.arrive(second) == (0, [])
    rows.arrive(third)
    assert rows.leave(second) == "passed"


@pytest.mark.parametrize("attempt", [1, 2])
def test_an_attempt_that_does_not_run_leaves_no_rows(rows, attempt):
    """A thread of an ended body may go on for a while: nobody would ever take its rows away."""
    id = rows.running()
    if attempt == 1:
        rows.end(id)
    for call in (
        lambda: rows.waits.acquire(Waiter(id, attempt), "l", 1, slots=SLOTS, max_waiting=9),
        lambda: rows.waits.begin(Waiter(id, attempt), [Waiting("end", id)], slots=SLOTS, max_waiting=9),
        lambda: rows.waits.resume(Waiter(id, attempt), slots=SLOTS),
        lambda: rows.arrive(id, attempt=attempt),
    ):
        with pytest.raises(NotInTask):
            call()
    assert rows.left() == []


def test_a_party_that_dies_breaks_the_barrier_and_one_that_passed_does_not(rows):
    ids = [rows.running() for _ in range(3)]
    for id in ids[:2]:
        rows.arrive(id, parties=3)
    rows.end(ids[0], KILLED)
    told = rows.outcome(ids[1], 0)
    assert told == f"task {ids[0]} was interrupted (SIGNALLED) while it waited there"
    assert rows.arrive(ids[2]) == (1, [])
    fourth = rows.running()
    rows.arrive(fourth)
    rows.end(fourth, KILLED)
    assert rows.outcome(ids[2], 1) == "passed"


@pytest.mark.parametrize("end", [KILLED, DONE], ids=["killed", "done"])
def test_a_barrier_of_siblings_is_broken_when_not_enough_can_come_any_more(rows, end):
    parent = rows.running()
    scope = parent_scope(parent)
    first, second, third, fourth = [rows.running(parent) for _ in range(4)]
    rows.end(parent)
    rows.arrive(first, parties=3, scope=scope)
    assert barrier_key(scope, "b") not in rows.end(fourth, end)  # two more can still come
    assert barrier_key(scope, "b") in rows.end(second, end)
    how = "was interrupted (SIGNALLED) before it came" if end is KILLED else "ended without coming"
    told = f"task {second} {how}, and not enough others can come"
    assert rows.waits.barriers.outcome(first, scope, "b", 0) == told
    rows.waits.barriers.leave(first, scope, "b", 0)
    assert rows.arrive(third, parties=3, scope=scope)[1] == [barrier_key(scope, "b")]
    assert rows.waits.barriers.outcome(third, scope, "b", 0) == "of its 3 parties only 1 can come"


def test_a_barrier_of_siblings_whose_parent_lives_may_still_get_its_parties(rows):
    parent = rows.running()
    scope = parent_scope(parent)
    first, second = [rows.running(parent) for _ in range(2)]
    rows.arrive(first, scope=scope)
    assert barrier_key(scope, "b") not in rows.end(second, KILLED)  # the parent may request another
    keys = rows.end(parent)
    assert barrier_key(scope, "b") in keys
    told = f"task {parent} ended without coming, and not enough others can come"
    assert rows.waits.barriers.outcome(first, scope, "b", 0) == told


def test_a_planned_sibling_that_is_cancelled_is_missed_as_well(rows):
    parent = rows.running()
    scope = parent_scope(parent)
    first, planned = rows.running(parent), rows.planned(parent=parent)
    rows.end(parent)
    rows.arrive(first, scope=scope)
    rows.ledger.cancel(planned, by=None)
    told = f"task {planned} was interrupted (CANCELLED) before it came, and not enough others can come"
    assert rows.waits.barriers.outcome(first, scope, "b", 0) == told


def test_a_death_that_closes_a_cycle_at_a_barrier_breaks_it(rows):
    """The parent waits for all children to end, whatever their end: nobody requests another participant."""
    parent = rows.running()
    scope = parent_scope(parent)
    first, second = [rows.running(parent) for _ in range(2)]
    rows.arrive(first, scope=scope)
    rows.wait(first, Waiting("barrier", target="b"))
    rows.wait(parent, Waiting("end", first), Waiting("end", second))
    assert barrier_key(scope, "b") in rows.end(second, KILLED)


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
