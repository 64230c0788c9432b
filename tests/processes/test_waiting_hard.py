"""Waiting where it is hard: several waits of one body, ended bodies, forks, rubbish, and all that can be away."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest
from support.app import wait_until
from support.pace import allowed_s
from test_waiting import Waiting, unique

from bgsupervisor import Handle
from bgsupervisor.addresses import is_postgres

pytestmark = pytest.mark.any_database

BODIES = """
import asyncio, os, threading, time
from pathlib import Path
from bgsupervisor import current, task
from bgsupervisor.errors import BgSupervisorError

def latch(name):
    while not Path(f"latch-{name}").exists():
        current().progress()
        time.sleep(0.01)

@task
def ends_at(gate_name: str, value: object = None, part: str | None = None) -> object:
    latch(gate_name)
    if part:
        current().reach(part, value)
        latch(f"end-{current().id}")
    return value

@task
def waits(on_id: int, part: str | None = None, timeout_s: float | None = None) -> list[object]:
    value = current().wait_for(on_id, part, timeout_s)
    return [value, time.monotonic()]

@task
def goes_on_after_a_wait(on_id: int, gate_name: str) -> None:
    current().wait_for(on_id)
    while not Path(f"latch-{gate_name}").exists():
        time.sleep(0.01)

@task
def holds(name: str, gate_name: str, permits: int = 1) -> None:
    with current().lock(name, permits):
        Path(f"held-{current().id}").touch()
        latch(gate_name)

@task
def takes(name: str, timeout_s: float | None = None) -> str:
    try:
        with current().lock(name, timeout_s=timeout_s):
            return "had"
    except BgSupervisorError as error:
        return type(error).__name__

@task
def leaves_a_thread_that_locks(name: str) -> str:
    context = current()
    def loop():
        while True:
            with context.lock(name):
                time.sleep(0.002)
            context.barrier(f"{name}-alone", 1, scope="thread")
    threading.Thread(target=loop, daemon=True).start()
    time.sleep(0.2)
    return "ended"

@task
async def gathers(ids: list[int], part: str | None = None, timeout_s: float | None = None) -> list[object]:
    async def one(id):
        try:
            return await current().wait_for_async(id, part, timeout_s)
        except BgSupervisorError as error:
            return type(error).__name__
    return await asyncio.gather(*(one(id) for id in ids))

@task
async def waits_and_reaches(on_id: int, pause_s: float) -> object:
    async def reach_later():
        await asyncio.sleep(pause_s)
        current().reach("p", 1)
    later = asyncio.create_task(reach_later())
    value = await current().wait_for_async(on_id)
    await later
    return value

@task
async def locks_beside_waits(ids: list[int], name: str) -> float:
    waits = [asyncio.create_task(current().wait_for_async(id, timeout_s=20)) for id in ids]
    await asyncio.sleep(0.3)
    async with current().lock(name):
        began = time.monotonic()
    took = time.monotonic() - began
    for one in waits:
        one.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    return took

@task
async def gives_up_again_and_again(on_id: int, rounds: int) -> float:
    longest = 0.0
    async def one(limit_s):
        nonlocal longest
        began = time.monotonic()
        try:
            async with asyncio.timeout(limit_s):
                await current().wait_for_async(on_id)
        except TimeoutError:
            longest = max(longest, time.monotonic() - began - limit_s)
    for _ in range(rounds):
        await asyncio.gather(*(one(0.03 + 0.02 * number) for number in range(5)))
    return longest

@task
def reaches_in_a_fork(part: str) -> float:
    pid = os.fork()
    if pid == 0:
        try:
            current().reach(part, time.monotonic())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    latch(f"end-{current().id}")

@task
def asks_for_rubbish() -> dict[str, str]:
    context, told = current(), {}
    calls = {
        "id text": lambda: context.wait_for("12"),
        "id bytes": lambda: context.wait_for(b"12"),
        "id truth": lambda: context.wait_for(True),
        "id float": lambda: context.wait_for([1.7]),
        "too many": lambda: context.wait_for(list(range(1, 20_000))),
        "timeout nan": lambda: context.wait_for(1, timeout_s=float("nan")),
        "timeout text": lambda: context.wait_for(1, timeout_s="1"),
        "lock nan": lambda: context.lock("l", timeout_s=float("nan")).__enter__(),
        "permits": lambda: context.lock("l", permits=2**70),
        "barrier nan": lambda: context.barrier("b", 2, scope="s", timeout_s=float("nan")),
        "parties": lambda: context.barrier("b", 2**70, scope="s"),
        "scope": lambda: context.barrier("b", 2, scope=""),
        "surrogate": lambda: context.reach(chr(0xD800)),
        "long name": lambda: context.reach("x" * 1_000_000),
    }
    for what, call in calls.items():
        try:
            call()
        except Exception as error:
            told[what] = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            told[what] = "taken"
    return told

@task
def asks_siblings(arriving: int, parties: int, dying: int) -> list[int]:
    ids = [current().request("appx:meets", {"parties": parties}).id for _ in range(arriving)]
    ids += [current().request("appx:ends_at", {"gate_name": "never"}).id for _ in range(dying)]
    return ids

@task
def meets(parties: int) -> str:
    try:
        current().barrier("sum", parties)
    except BgSupervisorError as error:
        return str(error)
    return "met"
"""


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**options):
        made.append(Waiting(tmp_path / f"app-{len(made)}", BODIES, **options))
        made[-1].alive = made[-1].start()
        return made[-1]

    yield make
    for app in made:
        app.end()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    app = Waiting(tmp_path_factory.mktemp("hard"), BODIES, slots=8)
    try:
        app.start()
        yield app
        app.nothing_is_left()
    finally:
        app.end()


@pytest.fixture
def app(shared):
    return shared


def held(app, handle):
    wait_until((app.folder / f"held-{handle.id}").exists, f"task {handle.id} holds its lock")


# ---- bodies that have ended ----


def test_what_is_left_of_an_ended_body_can_hold_nothing(app, request):
    name = unique(request)
    for _ in range(3):
        assert app.result_of(app.request("leaves_a_thread_that_locks", name=name)) == "ended"
        assert app.result_of(app.request("takes", name=name, timeout_s=10)) == "had"
    app.nothing_is_left()


# ---- several waits of one body ----


def test_a_body_with_several_waits_has_no_slot_until_the_last_is_over(make):
    app = make(slots=1)
    first = app.request("ends_at", gate_name="first", options={"delay_s": 1.0})
    second = app.request("ends_at", gate_name="second", value=2, options={"delay_s": 1.0})
    waiter = app.request("gathers", ids=[first.id, second.id])
    for name in ("first", "second"):
        app.open_gate(name)
    assert app.result_of(waiter) == [None, 2]
    app.nothing_is_left()


def test_a_body_that_goes_on_beside_its_wait_is_in_no_cycle(app):
    awaited = app.request("waits", on_id=1, options={"delay_s": 3600})
    later = {"delay_s": 1.0}  # the task that it waits for must have been requested by then
    both = app.request("waits_and_reaches", on_id=(waiter_id := awaited.id + 2), pause_s=0.6, options=later)
    waiter = app.request("waits", on_id=both.id, part="p")
    assert waiter.id == waiter_id
    assert app.result_of(waiter)[0] == 1
    assert app.result_of(both)[0] == 1
    app.service.cancel(awaited)


def test_forty_waits_of_one_body_end_at_their_limit_together(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    began = time.monotonic()
    assert app.result_of(app.request("gathers", ids=[other.id] * 40, timeout_s=1)) == ["WaitTimeout"] * 40
    each_dials = is_postgres(app.service.config.database)
    assert time.monotonic() - began < allowed_s(8.0 if each_dials else 4.0)
    app.open_gate(name)
    app.wait(other)


def test_a_lock_is_given_back_at_once_however_many_waits_are_pending(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    assert app.result_of(app.request("locks_beside_waits", ids=[other.id] * 12, name=name)) < allowed_s(1.0)
    app.open_gate(name)
    app.wait(other)


def test_a_wait_that_the_loop_gives_up_ends_at_once_beside_others(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    assert app.result_of(app.request("gives_up_again_and_again", on_id=other.id, rounds=12), 60.0) < allowed_s(5.0)
    app.open_gate(name)
    app.wait(other)


def test_waits_that_are_given_up_leave_no_threads_at_the_wait_manager(make):
    app = make(slots=4)
    other = app.request("ends_at", gate_name="go")
    app.result_of(app.request("gives_up_again_and_again", on_id=other.id, rounds=1))
    wait_manager = psutil.Process(app.wait_manager())
    app.result_of(app.request("gives_up_again_and_again", on_id=other.id, rounds=12), 60.0)
    wait_until(lambda: wait_manager.num_threads() < 12, "the wait manager's threads have ended", 5.0)
    app.open_gate("go")
    app.wait(other)


def test_sigterm_from_elsewhere_ends_an_async_body_that_waits(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    waiter = app.request("gathers", ids=[other.id])
    app.waiting(waiter)
    app.kill(waiter, signal.SIGTERM)
    assert (app.wait(waiter).reason, app.service.get(waiter).signal) == ("SIGNALLED", signal.SIGTERM)
    app.open_gate(name)
    app.wait(other)
    app.nothing_is_left()


# ---- forks ----


def test_a_part_that_a_fork_of_the_body_reaches_wakes_the_waiter(make):
    app = make(slots=4)
    holder = app.request("ends_at", gate_name="go")
    app.waiting(waiter := app.request("waits", on_id=holder.id), slotless=False)
    app.wait_manager()
    reacher = app.request("reaches_in_a_fork", part="p", options={"delay_s": 1.0})
    reached_at, gone_on_at = app.result_of(app.request("waits", on_id=reacher.id, part="p"))
    assert gone_on_at - reached_at < allowed_s(2.0)
    app.result_of_exception(reacher)
    app.open_gate("go")
    app.wait(waiter)


# ---- rubbish ----


def test_rubbish_is_refused_with_a_sentence_before_anything_is_recorded(app):
    told = app.result_of(app.request("asks_for_rubbish"))
    assert {what: text for what, text in told.items() if not text.startswith("ValueError: ")} == {}
    assert told["id text"] == "ValueError: '12' is not a task; give a handle or an id"
    assert told["timeout nan"] == "ValueError: timeout_s is nan; it must be a number of seconds, or None for no limit"
    assert "from 1 to 10000" in told["permits"]


def test_a_lock_that_is_only_tried_keeps_the_slot_and_answers_at_once(make):
    app = make(slots=2)
    holder = app.request("holds", name="l", gate_name="go")
    held(app, holder)
    assert app.result_of(app.request("takes", name="l", timeout_s=0), 5.0) == "WaitTimeout"
    assert app.rows("wait") == []
    app.open_gate("go")
    app.wait(holder)
    assert app.result_of(app.request("takes", name="l", timeout_s=0), 5.0) == "had"


# ---- barriers ----


@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_a_sibling_that_dies_before_it_comes_breaks_the_barrier(app, how):
    ids = app.result_of(app.request("asks_siblings", arriving=2, parties=3, dying=1))
    for id in ids[:2]:
        app.waiting(Handle(id))
    wait_until(lambda: app.service.get(ids[2]).status == "START", "the third runs")
    if how == "killed":
        os.kill(app.service.get(ids[2]).pid, signal.SIGKILL)
    else:
        app.service.cancel(ids[2])
    reason = {"killed": "SIGNALLED", "cancelled": "CANCELLED"}[how]
    for id in ids[:2]:
        told = app.result_of(Handle(id))
        assert f"task {ids[2]} was interrupted ({reason}) before it came, and not enough others can come" in told
    app.wait(Handle(ids[2]))


# ---- the supervisor, the wait manager, the database are away ----


def test_a_stopped_supervisor_costs_a_waiter_a_second_at_most(make):
    app = make(slots=4)
    other = app.request("ends_at", gate_name="go", part="p", value=1)
    waiters = [app.request("waits", on_id=other.id, part="p") for _ in range(2)]
    for one in waiters:
        app.waiting(one)
    app.wait_manager()
    app.stand_still(app.alive)
    try:
        app.open_gate("go")
        began = time.monotonic()
        wait_until(lambda: not app.rows("wait"), "both have woken", 10.0)
        assert time.monotonic() - began < allowed_s(2.0)
    finally:
        os.kill(app.alive.process.pid, signal.SIGCONT)
    for one in waiters:
        assert app.result_of(one)[0] == 1
    app.result_of_exception(other)
    app.wait(other)


def test_the_next_supervisor_has_a_wait_manager_for_those_who_wait_already(make):
    app = make(slots=4)
    other = app.request("ends_at", gate_name="go", value=1)
    waiter = app.request("waits", on_id=other.id)
    app.waiting(waiter)
    wait_manager = psutil.Process(app.wait_manager())
    app.alive.kill()
    wait_manager.kill()
    wait_until(
        lambda: not wait_manager.is_running() or wait_manager.status() == psutil.STATUS_ZOMBIE,
        "the wait manager is dead",
    )
    app.start()
    assert app.wait_manager() != wait_manager.pid
    app.open_gate("go")
    assert app.result_of(waiter)[0] == 1


def test_a_body_that_goes_on_after_a_wait_beats_as_before(make):
    """Who waits beats twelve times slower; `ps` would call a body that goes on so unresponsive."""
    app = make(slots=4, heartbeat_s=0.5)
    other = app.request("ends_at", gate_name="go")
    waiter = app.request("goes_on_after_a_wait", on_id=other.id, gate_name="end")
    app.waiting(waiter)
    app.open_gate("go")
    wait_until(lambda: not app.rows("wait"), "it goes on")
    before = app.service.get(waiter).heartbeat_at
    wait_until(lambda: (app.service.get(waiter).heartbeat_at - before).total_seconds() > 1.0, "it beats", 4.0)
    app.open_gate("end")
    assert app.wait(waiter).status == "DONE"


def test_bodies_wait_for_a_database_that_is_locked(make):
    app = make(slots=4, busy_timeout_s=0.5)
    holder = app.request("holds", name="l", gate_name="go")
    held(app, holder)
    reacher = app.request("ends_at", gate_name="go", part="p", value=1)
    waiter = app.request("takes", name="l")
    app.waiting(waiter)
    wait_until(lambda: app.service.get(reacher).status == "START", "all run")
    with app.database.locked():
        app.open_gate("go")
        app.result_of_exception(reacher)
        threading.Event().wait(3.0)  # three seconds of a locked database, six times what one call waits for
    assert app.wait(holder).status == "DONE"
    assert app.wait(reacher).status == "DONE"
    assert app.result_of(waiter) == "had"


def test_waiters_that_keep_every_slot_are_a_cycle_that_is_named(make):
    app = make(slots=2, max_waiting=0)
    planned = app.request("ends_at", gate_name="go", options={"delay_s": 1.0})
    waiters = [app.request("waits", on_id=planned.id) for _ in range(2)]
    app.open_gate("go")
    ends = [app.wait(one) for one in waiters]
    assert sorted(str(one.reason) for one in ends) == ["DEADLOCKED", "None"]
    told = next(one.detail for one in ends if one.reason)
    assert "waits for a slot, all of which are held by tasks that wait" in told
