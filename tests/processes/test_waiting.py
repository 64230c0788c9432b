"""Tasks that wait for each other, in real processes: nobody waits for ever, nobody goes on too early, slots hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.app import App, wait_until
from support.pace import allowed_s

from bgsupervisor.errors import UnknownTask
from bgsupervisor.task_context import Context, entered

pytestmark = pytest.mark.any_database

BODIES = """
import asyncio, json, os, threading, time
from pathlib import Path
from bgsupervisor import Cancelled, Task, current, task
from bgsupervisor.errors import (
    BarrierBroken, Deadlock, LockHeld, PartNotReached, UnknownTask, WaitTimeout,
)

def say(event, **facts):
    '''One line in a file that no database knows of.'''
    line = json.dumps({"event": event, "id": current().id, "at": time.monotonic(), **facts}) + "\\n"
    descriptor = os.open("events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)

def latch(name):
    while not Path(f"latch-{name}").exists():
        current().progress()
        time.sleep(0.01)

@task
def reaches(latches: list[str] | None = None, value: object = None, part: str = "loaded", raises: bool = False) -> str:
    say("in")
    for name in latches or ():
        latch(name)
    if part:
        current().reach(part, value)
        say("reached")
    latch(f"end-{current().id}")
    if raises:
        raise LookupError("after the part")
    return "the result"

@task
def ends_at(gate_name: str, value: object = None, raises: bool = False) -> object:
    say("in")
    latch(gate_name)
    if raises:
        raise LookupError("no such invoice")
    return value

@task
def waits(ids: list[int], part: str | None = None, timeout_s: float | None = None, back: bool = False,
          single: bool = True) -> object:
    say("in")
    try:
        wanted = ids[0] if single and len(ids) == 1 else ids
        found = current().wait_for(wanted, part, timeout_s, return_interrupted=back)
    except PartNotReached as error:
        say("told")
        return ["PartNotReached", error.id, error.part, str(error.status), error.reason and str(error.reason)]
    except UnknownTask as error:
        return ["UnknownTask", error.id]
    except WaitTimeout as error:
        say("told")
        return ["WaitTimeout", str(error)]
    except Deadlock as error:
        return ["Deadlock", error.circle]
    except Cancelled:
        say("cancelled")
        raise
    finally:
        say("out")
    if back:
        return [["PartNotReached", one.id] if isinstance(one, PartNotReached) else one for one in found]
    return found

@task
def waits_rawly(on_id: int, part: str | None = None) -> object:
    return current().wait_for(on_id, part)

@task
def holds(
    name: str, permits: int = 1, gate_name: str | None = None, pause_s: float = 0.0, raises: bool = False
) -> object:
    say("wants")
    with current().lock(name, permits) as lock:
        say("in", lock=name)
        if gate_name:
            latch(gate_name)
        time.sleep(pause_s)
        say("out", lock=name)
        if raises:
            raise LookupError("inside")
    return lock.abandoned_by

@task
def holds_and_stays(name: str, gate_name: str) -> None:
    with current().lock(name):
        say("in")
        latch(gate_name)
    latch(f"end-{current().id}")

@task
def tries_lock(name: str, timeout_s: float) -> object:
    try:
        with current().lock(name, timeout_s=timeout_s):
            return "held"
    except WaitTimeout as error:
        return ["WaitTimeout", str(error)]

@task
def locks_twice(name: str) -> object:
    with current().lock(name):
        try:
            with current().lock(name):
                return "twice"
        except LockHeld as error:
            return ["LockHeld", error.name]

@task
def crosses(first: str, second: str, other_gate: str, mine: str, caught: bool) -> object:
    with current().lock(first):
        Path(f"latch-{mine}").touch()
        latch(other_gate)
        try:
            with current().lock(second):
                return "both"
        except Deadlock as error:
            if not caught:
                raise
            return error.circle

@task
def meets(name: str, parties: int, rounds: int = 1, scope: str | None = None, timeout_s: float | None = None) -> object:
    for number in range(rounds):
        say("comes", round=number)
        try:
            current().barrier(name, parties, scope=scope, timeout_s=timeout_s)
        except BarrierBroken as error:
            return ["BarrierBroken", str(error)]
        except WaitTimeout:
            return "WaitTimeout"
        except ValueError as error:
            return ["ValueError", str(error)]
        say("goes", round=number)
    return "met"

@task
def asks_siblings(count: int) -> list[int]:
    return [current().request("appx:meets", {"name": "sum", "parties": count}).id for _ in range(count)]

@task
def works_and_waits(on_id: int, part: str | None = None, pause_s: float = 0.05) -> object:
    say("in")
    time.sleep(pause_s)
    say("out")
    value = current().wait_for(on_id, part)
    say("in")
    time.sleep(pause_s)
    say("out")
    return value

@task
def works(pause_s: float = 0.05) -> str:
    say("in")
    time.sleep(pause_s)
    say("out")
    return "worked"

@task
def waits_in_a_cycle(go: str, kind: str, what: object, mine: str | None = None) -> object:
    if mine:
        with current().lock(mine):
            Path(f"latch-{current().id}-has").touch()
            latch(go)
            return current().wait_for(int(what), "never")
    latch(go)
    if kind == "lock":
        with current().lock(str(what)):
            return "got it"
    return current().wait_for(int(what))

@task
def waits_for_itself(caught: bool) -> object:
    try:
        current().wait_for(current().id)
    except Deadlock as error:
        if not caught:
            raise
        return error.circle

@task
def plays_ping_pong(go: str, other: int | None, rounds: int, first: bool) -> int:
    latch(go)
    if other is None:
        other = int(Path(f"other-of-{current().id}").read_text())
    for number in range(rounds):
        if not first:
            current().wait_for(other, f"ball-{number}")
        current().reach(f"ball-{number}", number)
        if first:
            current().wait_for(other, f"ball-{number}")
    return rounds

class WaitsTooLong(Task):
    timeout_s = 0.5
    def run(self, on_id: int) -> None:
        try:
            self.wait_for(on_id)
        finally:
            say("finally")

@task
def waits_often(on_ids: list[int]) -> object:
    def counted():
        return [len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))]
    current().wait_for(on_ids[0])
    time.sleep(0.2)
    before = counted()
    for on_id in on_ids[1:]:
        current().wait_for(on_id)
    deadline = time.monotonic() + 2
    while counted() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # the link closes what it needed for the wait when it wakes
    return [before, counted()]

@task
def ends_after(pause_s: float) -> None:
    time.sleep(pause_s)

@task
async def waits_async(on_id: int, part: str | None, kind: str = "wait", limit_s: float | None = None) -> object:
    ticks, ended = 0, False
    async def ticker():
        nonlocal ticks
        while not ended:
            await asyncio.sleep(0.01)
            ticks += 1
            if ticks == 20:
                say("ticked")
    ticking = asyncio.create_task(ticker())
    say("in")
    try:
        if kind == "wait":
            async with asyncio.timeout(limit_s):
                value = await current().wait_for_async(on_id, part)
        elif kind == "lock":
            async with current().lock("async lock"):
                say("has")
                value = "had"
        else:
            value = await current().barrier_async("async barrier", 2, scope="s")
    except TimeoutError:
        value = "TimeoutError"
    finally:
        say("finally")
    ended = True
    await ticking
    return [value, ticks]

@task
async def gives_up_a_lock(name: str) -> object:
    try:
        async with asyncio.timeout(0.3):
            async with current().lock(name):
                return "held"
    except TimeoutError:
        return "TimeoutError"

@task
async def waits_for_two(first: int, second: int) -> object:
    return await asyncio.gather(current().wait_for_async(first), current().wait_for_async(second))
"""


class Waiting(App):
    """An application of these bodies, with what the tests ask about it."""

    def __init__(self, folder, bodies=BODIES, **options):
        super().__init__(folder, bodies, **{"spares": 4, **options})

    def request(self, body, *, options=None, **data):
        return self.service.request(f"appx:{body}", data, **(options or {}))

    def open_gate(self, name):
        (self.folder / f"latch-{name}").touch()

    def result_of_exception(self, handle):
        self.open_gate(f"end-{handle.id}")

    def events(self, event=None, id=None):
        """Return what bodies have said, in order."""
        path = self.folder / "events"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [one for one in lines if event in (None, one["event"]) and id in (None, one["id"])]

    def said(self, event, handle):
        return wait_until(lambda: self.events(event, handle.id), f"task {handle.id} says {event!r}")[-1]

    def rows(self, table):
        return self.database.dicts(f"SELECT * FROM bgsupervisor_{table} ORDER BY id")

    def waiting(self, handle, *, slotless=True):
        """Return the rows of a task's wait once there are any."""
        rows = wait_until(
            lambda: [row for row in self.rows("wait") if row["task_id"] == handle.id], f"task {handle.id} waits"
        )
        if slotless:
            assert self.service.get(handle).slot is None
        return rows

    def result_of(self, handle, limit_s=15.0):
        record = self.wait(handle, limit_s)
        assert record.status == "DONE", record
        return self.service.result(handle)

    def kill(self, handle, number=signal.SIGKILL):
        os.kill(self.service.get(handle).pid, number)

    def wait_manager(self):
        """Return the wait manager's PID: the child of the supervisor, or of its heir, that serves manager.sock."""

        def look():
            for process in psutil.process_iter(["pid", "cmdline"]):
                with contextlib.suppress(psutil.Error):
                    if "wait manager" in " ".join(process.info["cmdline"] or ()) and any(
                        "manager.sock" in str(one.laddr) and self.is_mine(process.pid) for one in unix_sockets(process)
                    ):
                        return process.pid
            return None

        return wait_until(look, "there is a wait manager")

    def is_mine(self, pid):
        with contextlib.suppress(OSError):
            return any(one.is_dir() and one.readlink() == self.state_dir for one in Path(f"/proc/{pid}/fd").iterdir())
        return False

    def nothing_is_left(self):
        """See that nobody waits, holds or stands at a barrier any more."""

        def left():
            held = [row for row in self.rows("hold") if row["task_id"] is not None]
            return [*self.rows("wait"), *held, *self.rows("participant"), *self.rows("dependency")]

        wait_until(lambda: not left(), "no row of a wait, a hold or a participant is left")


def unix_sockets(process):
    return process.net_connections("unix")


def most_inside(events, *, into=("in",), out=("out",)):
    """Return how many were inside at once at most, told by a file's lines in the order of their moments."""
    inside, most = 0, 0
    for one in sorted(events, key=lambda one: (one["at"], one["event"] in into)):
        inside += (one["event"] in into) - (one["event"] in out)
        most = max(most, inside)
    return most


@contextlib.contextmanager
def living(folder, **options):
    app = Waiting(folder, **options)
    try:
        yield app
    finally:
        app.end()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with living(tmp_path_factory.mktemp("waiting"), slots=12) as app:
        app.start()
        app.result_of(app.request("waits", ids=[app.request("ends_after", pause_s=0.5).id]))
        app.wait_manager()
        yield app
        app.nothing_is_left()


@pytest.fixture
def app(shared):
    """The shared application, in which this test looks only at its own tasks."""
    return shared


@pytest.fixture
def make_waiting(tmp_path):
    made = []

    def make(**options):
        made.append(Waiting(tmp_path / f"app-{len(made)}", **options))
        return made[-1]

    yield make
    for app in made:
        app.end()


def unique(request):
    """Return a name that no other test uses."""
    return f"{request.node.name}-{time.monotonic_ns()}"


# ---- parts ----


def test_a_part_that_was_reached_long_ago_is_had_at_once_also_after_the_others_end(app):
    other = app.request("reaches", value={"rows": [1, 2.5, None, True, "ü"]})
    app.said("reached", other)
    assert app.result_of(app.request("waits", ids=[other.id], part="loaded")) == {"rows": [1, 2.5, None, True, "ü"]}
    app.result_of_exception(other)
    app.wait(other)
    assert app.result_of(app.request("waits", ids=[other.id], part="loaded")) == {"rows": [1, 2.5, None, True, "ü"]}


def test_a_part_that_is_reached_later_wakes_the_waiter_within_half_a_second(app, request):
    name = unique(request)
    other = app.request("reaches", latches=[name], value=7)
    waiter = app.request("waits", ids=[other.id], part="loaded")
    app.waiting(waiter)
    app.open_gate(name)
    assert app.result_of(waiter) == 7
    reached, out = app.said("reached", other)["at"], app.said("out", waiter)["at"]
    app.result_of_exception(other)
    assert out - reached < allowed_s(0.5)


def test_a_part_of_a_task_that_is_only_planned_is_waited_for(app):
    other = app.request("reaches", options={"delay_s": 0.5}, value="late")
    waiter = app.request("waits", ids=[other.id], part="loaded")
    app.waiting(waiter)
    assert app.service.get(other).status == "REQUEST"
    app.result_of_exception(other)
    assert app.result_of(waiter) == "late"


def test_a_part_reached_before_the_other_failed_counts(app):
    other = app.request("reaches", value=1, raises=True)
    app.result_of_exception(other)
    assert app.wait(other).reason == "RAISED"
    assert app.result_of(app.request("waits", ids=[other.id], part="loaded")) == 1


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}, 1.5, "x" * 50_000, [[1, [2, {"a": None}]]]])
def test_the_value_of_a_part_comes_over_as_it_was_given(app, value):
    other = app.request("reaches", value=value)
    app.result_of_exception(other)
    waiter = app.request("waits", ids=[other.id], part="loaded")
    assert app.result_of(waiter) == value
    assert app.result_of(app.request("waits", ids=[waiter.id])) == value


def test_without_a_part_the_result_is_waited_for(app, request):
    name = unique(request)
    other = app.request("ends_at", gate_name=name, value={"sum": 3})
    waiter = app.request("waits", ids=[other.id])
    app.waiting(waiter)
    app.open_gate(name)
    assert app.result_of(waiter) == {"sum": 3}
    assert app.result_of(app.request("waits", ids=[other.id])) == {"sum": 3}


def test_a_waiter_is_told_at_once_that_the_other_was_killed(app, request):
    other = app.request("ends_at", gate_name=unique(request))
    app.said("in", other)
    waiter = app.request("waits", ids=[other.id], part="loaded")
    app.waiting(waiter)
    killed_at = time.monotonic()
    app.kill(other)
    assert app.result_of(waiter) == ["PartNotReached", other.id, "loaded", "INTERRUPTED", "SIGNALLED"]
    assert app.said("told", waiter)["at"] - killed_at < allowed_s(1.0)


def test_a_waiter_is_told_that_the_other_was_done_without_reaching_the_part(app, request):
    name = unique(request)
    other = app.request("ends_at", gate_name=name)
    waiter = app.request("waits", ids=[other.id], part="loaded")
    app.waiting(waiter)
    app.open_gate(name)
    assert app.result_of(waiter) == ["PartNotReached", other.id, "loaded", "DONE", None]
    assert app.result_of(app.request("waits", ids=[other.id], part="loaded"))[0] == "PartNotReached"


def test_a_waiter_is_told_at_once_that_a_planned_task_was_cancelled(app):
    other = app.request("works", options={"delay_s": 3600})
    waiter = app.request("waits", ids=[other.id])
    app.waiting(waiter)
    cancelled_at = time.monotonic()
    app.service.cancel(other, by="jana")
    assert app.result_of(waiter) == ["PartNotReached", other.id, None, "INTERRUPTED", "CANCELLED"]
    assert app.said("told", waiter)["at"] - cancelled_at < allowed_s(1.0)


def test_a_part_not_reached_that_is_not_caught_interrupts_the_waiter(app):
    other = app.request("works", options={"delay_s": 3600})
    app.service.cancel(other)
    record = app.wait(app.request("waits_rawly", on_id=other.id))
    assert (record.status, record.reason) == ("INTERRUPTED", "RAISED")
    assert f"PartNotReached: task {other.id} did not end DONE: INTERRUPTED, CANCELLED" in record.detail


def test_several_are_given_in_their_order_whichever_ends_first(app, request):
    names = [f"{unique(request)}-{number}" for number in range(3)]
    others = [app.request("ends_at", gate_name=name, value=name) for name in names]
    waiter = app.request("waits", ids=[other.id for other in others])
    app.waiting(waiter)
    for name, other in reversed(list(zip(names, others, strict=True))):
        assert app.service.get(waiter).status == "START"
        app.open_gate(name)
        app.wait(other)
    assert app.result_of(waiter) == names
    assert app.result_of(app.request("waits", ids=[others[1].id], single=False)) == [names[1]]
    assert app.result_of(app.request("waits", ids=[])) == []


def test_the_first_interruption_among_several_is_told_while_others_still_run(app, request):
    name = unique(request)
    running = app.request("ends_at", gate_name=name)
    failing = app.request("ends_at", gate_name=f"{name}-2", raises=True)
    waiter = app.request("waits", ids=[running.id, failing.id])
    back = app.request("waits", ids=[running.id, failing.id], back=True)
    app.waiting(waiter)
    app.waiting(back)
    app.open_gate(f"{name}-2")
    assert app.result_of(waiter)[:2] == ["PartNotReached", failing.id]
    assert app.service.get(back).status == "START"
    app.open_gate(name)
    assert app.result_of(back) == [None, ["PartNotReached", failing.id]]


@pytest.mark.parametrize("id", [0, -1, 2**40, 2**63, 10**30])
def test_a_task_that_does_not_exist_is_told_at_once(app, id):
    assert app.result_of(app.request("waits", ids=[id])) == ["UnknownTask", id]


def test_a_wait_ends_at_its_limit_and_the_other_goes_on(app, request):
    name = unique(request)
    other = app.request("ends_at", gate_name=name)
    waiter = app.request("waits", ids=[other.id], part="loaded", timeout_s=0.3)
    kind, words = app.result_of(waiter)
    assert (kind, words) == ("WaitTimeout", f'timed out after 0.3 s waiting for part "loaded" of task {other.id}')
    assert app.said("out", waiter)["at"] - app.said("in", waiter)["at"] < allowed_s(1.0)
    assert app.service.get(other).status == "START"
    app.open_gate(name)
    app.wait(other)


def test_a_retried_task_has_no_parts_and_is_waited_for_anew(app, request):
    name = unique(request)
    other = app.request("reaches", latches=[name], value="first", raises=True)
    app.open_gate(name)
    app.result_of_exception(other)
    assert app.wait(other).reason == "RAISED"
    assert [row for row in app.rows("part") if row["task_id"] == other.id]
    for one in (name, f"end-{other.id}"):  # so that nothing is reached before the waiter waits
        (app.folder / f"latch-{one}").unlink()
    app.service.retry(other)
    assert not [row for row in app.rows("part") if row["task_id"] == other.id]
    waiter = app.request("waits", ids=[other.id])
    app.waiting(waiter)
    app.open_gate(name)
    app.result_of_exception(other)
    assert app.result_of(waiter)[0] == "PartNotReached"
    assert app.service.get(other).attempt >= 1


def test_two_that_throw_a_ball_to_and_fro_are_never_taken_for_a_cycle(app, request):
    name = unique(request)
    first = app.request("plays_ping_pong", go=name, other=None, rounds=25, first=True)
    second = app.request("plays_ping_pong", go=name, other=first.id, rounds=25, first=False)
    (app.folder / f"other-of-{first.id}").write_text(str(second.id))
    app.open_gate(name)
    assert app.result_of(first) == app.result_of(second) == 25


# ---- locks ----


def test_a_lock_is_had_in_the_order_of_asking(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    others = []
    for _ in range(4):
        others.append(app.request("holds", name=name, pause_s=0.01))
        app.waiting(others[-1])
    app.open_gate(name)
    for other in others:
        assert app.result_of(other) is None
    entries = [one for one in app.events("in") if one.get("lock") == name]
    assert [one["id"] for one in entries] == [holder.id, *(other.id for other in others)]
    assert most_inside([one for one in app.events() if one.get("lock") == name]) == 1


def test_no_more_than_the_permits_are_ever_inside_and_as_many_are(app, request):
    name = unique(request)
    handles = [app.request("holds", name=name, permits=2, pause_s=0.03) for _ in range(12)]
    for handle in handles:
        app.result_of(handle)
    assert most_inside([one for one in app.events() if one.get("lock") == name]) == 2


def test_a_killed_holder_frees_the_lock_within_a_second_and_the_next_sees_who_it_was(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    waiter = app.request("holds", name=name)
    app.waiting(waiter)
    killed_at = time.monotonic()
    app.kill(holder)
    assert app.result_of(waiter) == holder.id
    assert app.said("in", waiter)["at"] - killed_at < allowed_s(1.0)
    assert app.result_of(app.request("holds", name=name)) is None


def test_a_killed_waiter_does_not_stand_in_the_way(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    doomed, last = (app.request("holds", name=name) for _ in range(2))
    app.waiting(doomed)
    app.waiting(last)
    if doomed.id > last.id or app.rows("wait")[0]["task_id"] == last.id:
        doomed, last = last, doomed
    app.kill(doomed)
    app.wait(doomed)
    app.open_gate(name)
    released_at = app.said("out", holder)["at"]
    app.result_of(last)
    assert app.said("in", last)["at"] - released_at < allowed_s(1.0)


def test_a_stopped_waiter_whose_turn_it_is_blocks_the_next_only_until_it_is_killed(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    doomed = app.request("holds", name=name)
    app.waiting(doomed)
    last = app.request("holds", name=name)
    app.waiting(last)
    app.kill(doomed, signal.SIGSTOP)
    app.open_gate(name)
    app.wait(holder)
    assert not app.events("in", last.id)
    killed_at = time.monotonic()
    app.kill(doomed)
    app.result_of(last)
    assert app.said("in", last)["at"] - killed_at < allowed_s(1.0)


def test_holder_and_first_waiter_killed_at_once_leave_the_lock_to_the_next(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    doomed = app.request("holds", name=name)
    app.waiting(doomed)
    last = app.request("holds", name=name)
    app.waiting(last)
    killed_at = time.monotonic()
    app.kill(doomed)
    app.kill(holder)
    assert app.result_of(last) in (holder.id, doomed.id)
    assert app.said("in", last)["at"] - killed_at < allowed_s(1.5)


def test_a_lock_is_not_to_be_had_twice_by_one_task(app, request):
    name = unique(request)
    assert app.result_of(app.request("locks_twice", name=name)) == ["LockHeld", name]
    assert app.result_of(app.request("holds", name=name)) is None


def test_a_lock_is_free_after_an_error_inside(app, request):
    name = unique(request)
    assert app.wait(app.request("holds", name=name, raises=True)).reason == "RAISED"
    assert not [row for row in app.rows("hold") if row["name"] == name]
    assert app.result_of(app.request("holds", name=name)) is None


def test_a_lock_that_was_waited_for_in_vain_leaves_no_row_and_the_next_has_its_turn(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    first = app.request("tries_lock", name=name, timeout_s=0.4)
    app.waiting(first)
    second = app.request("holds", name=name)
    app.waiting(second)
    assert app.result_of(first) == ["WaitTimeout", f'timed out after 0.4 s waiting for lock "{name}"']
    assert [row["task_id"] for row in app.rows("wait") if row["target"] == name] == [second.id]
    app.open_gate(name)
    app.result_of(second)


def test_two_locks_taken_crosswise_are_a_cycle_that_is_named(app, request):
    name = unique(request)
    a, b = f"{name}-a", f"{name}-b"
    one = app.request("crosses", first=a, second=b, other_gate=f"{name}-2", mine=f"{name}-1", caught=True)
    two = app.request("crosses", first=b, second=a, other_gate=f"{name}-1", mine=f"{name}-2", caught=True)
    results = {one.id: app.result_of(one), two.id: app.result_of(two)}
    cycle = next(result for result in results.values() if result != "both")
    assert "both" in results.values()
    assert {tuple(step) for step in cycle} == {
        (one.id, f'lock "{b}", held by task {two.id}'),
        (two.id, f'lock "{a}", held by task {one.id}'),
    }


# ---- barriers ----


def test_a_barrier_opens_for_all_when_the_last_has_come_and_again(app, request):
    name = unique(request)
    handles = [app.request("meets", name=name, parties=3, rounds=3, scope="s") for _ in range(3)]
    assert [app.result_of(handle) for handle in handles] == ["met"] * 3
    for number in range(3):
        mine = [one for one in app.events() if one["id"] in {h.id for h in handles} and one.get("round") == number]
        last_came = max(one["at"] for one in mine if one["event"] == "comes")
        assert min(one["at"] for one in mine if one["event"] == "goes") > last_came


@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_a_party_that_dies_breaks_the_barrier_for_the_others(app, request, how):
    name = unique(request)
    doomed = app.request("meets", name=name, parties=3, scope="s")
    other = app.request("meets", name=name, parties=3, scope="s")
    app.waiting(doomed)
    app.waiting(other)
    if how == "killed":
        app.kill(doomed)
    else:
        app.service.cancel(doomed)
    reason = "SIGNALLED" if how == "killed" else "CANCELLED"
    kind, words = app.result_of(other)
    assert kind == "BarrierBroken"
    assert f"task {doomed.id} was interrupted ({reason}) while it waited there" in words
    late = [app.request("meets", name=name, parties=2, scope="s") for _ in range(2)]
    assert [app.result_of(one) for one in late] == ["met"] * 2


def test_a_retried_party_counts_once(app, request):
    name = unique(request)
    doomed = app.request("meets", name=name, parties=2, scope="s")
    app.waiting(doomed)
    app.kill(doomed)
    app.wait(doomed)
    app.service.retry(doomed)
    app.waiting(doomed)
    other = app.request("meets", name=name, parties=2, scope="s")
    assert app.result_of(doomed) == app.result_of(other) == "met"


def test_siblings_have_a_barrier_of_their_own(app):
    parents = [app.request("asks_siblings", count=2) for _ in range(2)]
    for parent in parents:
        ids = app.result_of(parent)
        assert [app.result_of(id) for id in ids] == ["met"] * 2
        assert {app.service.get(id).parent_id for id in ids} == {parent.id}


def test_a_barrier_without_scope_of_a_task_without_parent_is_refused(app):
    kind, words = app.result_of(app.request("meets", name="x", parties=2))
    assert kind == "ValueError"
    assert 'the barrier "x" has no scope' in words


def test_a_barrier_of_nobody_is_refused_and_one_of_a_single_party_opens_at_once(app, request):
    name = unique(request)
    kind, words = app.result_of(app.request("meets", name=name, parties=0, scope="s"))
    assert (kind, words) == ("ValueError", "parties is 0; it must be a whole number from 1 to 1000000")
    assert app.result_of(app.request("meets", name=name, parties=1, scope="s")) == "met"


def test_a_barrier_waited_for_in_vain_is_left(app, request):
    name = unique(request)
    assert app.result_of(app.request("meets", name=name, parties=2, scope="s", timeout_s=0.2)) == "WaitTimeout"
    assert not [row for row in app.rows("participant") if row["name"] == name]


# ---- deadlocks ----


def test_a_task_that_waits_for_itself_is_told(app):
    uncaught, caught = app.request("waits_for_itself", caught=False), app.request("waits_for_itself", caught=True)
    record = app.wait(uncaught)
    assert (record.status, record.reason) == ("INTERRUPTED", "DEADLOCKED")
    assert record.detail == f"deadlock: task {uncaught.id} waits for the end of task {uncaught.id}"
    assert app.result_of(caught) == [[caught.id, f"the end of task {caught.id}"]]


def test_a_cycle_of_part_lock_and_dependency_is_named(app, request):
    name = unique(request)
    lock = f"{name}-lock"
    # 1 holds the lock and waits for a part of 2; 2 waits for the end of 3; 3 comes after 4; 4 waits for the lock.
    fourth = app.request("waits_in_a_cycle", go=f"{name}-4", kind="lock", what=lock)
    third = app.request("works", options={"after": [fourth]})
    second = app.request("waits_in_a_cycle", go=f"{name}-2", kind="end", what=third.id)
    first = app.request("waits_in_a_cycle", go=f"{name}-1", kind="part", what=second.id, mine=lock)
    wait_until((app.folder / f"latch-{first.id}-has").exists, "the first has the lock")
    for number, handle in ((2, second), (1, first)):
        app.open_gate(f"{name}-{number}")
        app.waiting(handle)
    app.open_gate(f"{name}-4")
    record = app.wait(fourth)
    assert (record.status, record.reason) == ("INTERRUPTED", "DEADLOCKED")
    for step in (
        f'task {fourth.id} waits for lock "{lock}", held by task {first.id}',
        f'task {first.id} waits for part "never" of task {second.id}',
        f"task {second.id} waits for the end of task {third.id}",
        f"task {third.id} waits for the end of task {fourth.id}",
    ):
        assert step in record.detail
    assert app.wait(third).reason == "DEPENDENCY"
    assert app.wait(second).reason == app.wait(first).reason == "RAISED"


# ---- after ----


def test_a_dependent_starts_after_its_dependency_is_done_and_not_before(app, request):
    name = unique(request)
    first = app.request("ends_at", gate_name=name)
    second = app.request("works", options={"after": [first]})
    third = app.request("works", options={"after": [second, first.id, first]})
    app.said("in", first)
    app.result_of(app.request("works"))
    assert app.service.get(second).status == app.service.get(third).status == "REQUEST"
    app.open_gate(name)
    app.result_of(third)
    first_ended, second_began = app.service.get(first).ended_at, app.service.get(second).started_at
    assert first_ended <= second_began
    assert app.service.get(second).ended_at <= app.service.get(third).started_at
    assert (second_began - first_ended).total_seconds() < allowed_s(0.5)


def test_dependents_of_an_interrupted_task_are_interrupted_in_turn_but_for_those_that_take_any_end(app, request):
    name = unique(request)
    first = app.request("ends_at", gate_name=name, raises=True)
    second = app.request("works", options={"after": [first]})
    third = app.request("works", options={"after": [second]})
    any_end = app.request("works", options={"after": [first, third], "after_any_end": True})
    app.open_gate(name)
    for handle, on in ((second, first), (third, second)):
        record = app.wait(handle)
        assert (record.status, record.reason, record.attempt) == ("INTERRUPTED", "DEPENDENCY", 0)
        assert record.detail == f"had to come after task {on.id}, which was interrupted"
    assert app.result_of(any_end) == "worked"


def test_after_what_does_not_exist_is_refused_and_nothing_is_recorded(app):
    before = app.service.list(limit=1)[0].id
    with pytest.raises(UnknownTask) as raised:
        app.request("works", options={"after": [10**6]})
    assert raised.value.id == 10**6
    assert app.service.list(limit=1)[0].id == before


def test_after_what_has_ended(app):
    done = app.request("works")
    app.wait(done)
    planned = app.request("works", options={"delay_s": 3600})
    dependent = app.request("works", options={"after": [planned]})
    app.service.cancel(planned)
    assert app.wait(dependent).reason == "DEPENDENCY"
    assert app.result_of(app.request("works", options={"after": [done]})) == "worked"
    assert app.wait(app.request("works", options={"after": [done, planned]})).reason == "DEPENDENCY"
    assert app.result_of(app.request("works", options={"after": [planned], "after_any_end": True})) == "worked"


# ---- cancel, limits, death while waiting ----


def test_a_cancel_wakes_a_waiter_at_once_and_its_finally_blocks_run(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    waiter = app.request("waits", ids=[other.id])
    app.waiting(waiter)
    asked_at = time.monotonic()
    app.service.cancel(waiter, by="jana")
    record = app.wait(waiter)
    assert (record.status, record.reason) == ("INTERRUPTED", "CANCELLED")
    assert app.said("cancelled", waiter)["at"] - asked_at < allowed_s(1.0)
    assert app.said("out", waiter)["at"] - asked_at < allowed_s(1.0)
    assert "was asked" in record.detail
    app.open_gate(name)
    app.wait(other)


def test_the_time_limit_counts_while_a_body_waits(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    waiter = app.request("WaitsTooLong", on_id=other.id)
    record = app.wait(waiter)
    assert (record.status, record.reason) == ("INTERRUPTED", "TIMED_OUT")
    app.said("finally", waiter)
    app.open_gate(name)
    app.wait(other)


def test_a_killed_waiter_leaves_no_row(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    waiter = app.request("waits", ids=[other.id])
    app.waiting(waiter)
    app.kill(waiter)
    assert app.wait(waiter).reason == "SIGNALLED"
    assert not [row for row in app.rows("wait") if row["task_id"] == waiter.id]
    app.open_gate(name)
    app.wait(other)


# ---- async ----


@pytest.mark.parametrize("kind", ["wait", "lock", "barrier"])
def test_an_async_wait_does_not_block_the_loop(app, request, kind):
    name = unique(request)
    other = app.request("ends_at", gate_name=name, value="v")
    holder = app.request("holds", name="async lock", gate_name=name)
    app.said("in", holder)
    waiter = app.request("waits_async", on_id=other.id, part=None, kind=kind)
    app.waiting(waiter)
    app.said("ticked", waiter)
    if kind == "barrier":
        app.request("meets", name="async barrier", parties=2, scope="s")
    app.open_gate(name)
    value, ticks = app.result_of(waiter)
    assert value == {"wait": "v", "lock": "had", "barrier": None}[kind]
    assert ticks >= 20
    app.wait(holder)


def test_an_async_wait_is_cancelled_at_once(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    waiter = app.request("waits_async", on_id=other.id, part=None)
    app.waiting(waiter)
    asked_at = time.monotonic()
    app.service.cancel(waiter)
    assert app.wait(waiter).reason == "CANCELLED"
    assert app.said("finally", waiter)["at"] - asked_at < allowed_s(1.0)
    app.open_gate(name)
    app.wait(other)


def test_an_async_wait_that_the_loop_gives_up_ends(app, request):
    other = app.request("ends_at", gate_name=(name := unique(request)))
    waiter = app.request("waits_async", on_id=other.id, part=None, limit_s=0.3)
    assert app.result_of(waiter, 5.0)[0] == "TimeoutError"
    app.open_gate(name)
    app.wait(other)


def test_a_lock_that_the_loop_gives_up_is_neither_held_nor_queued_for(app, request):
    name = unique(request)
    holder = app.request("holds", name=name, gate_name=name)
    app.said("in", holder)
    assert app.result_of(app.request("gives_up_a_lock", name=name), 5.0) == "TimeoutError"
    assert [row["task_id"] for row in app.rows("hold") if row["name"] == name] == [holder.id]
    assert not [row for row in app.rows("wait") if row["target"] == name]
    app.open_gate(name)
    assert app.result_of(app.request("holds", name=name)) is None


class Late(Context):
    """Gives a lock just when the loop has given it up."""

    def __init__(self):
        self.given_up = threading.Event()
        self.released = []

    def _acquire(self, *_):
        assert self.given_up.wait(10)

    def _rouse(self):
        self.given_up.set()

    def _release(self, name):
        self.released.append(name)


def test_a_lock_that_comes_just_when_the_loop_gives_it_up_is_given_back():
    late = Late()

    async def body():
        async with asyncio.timeout(0.01), late.lock("l"):
            pytest.fail("it was given up")

    with entered(late), pytest.raises(TimeoutError):
        asyncio.run(body())
    assert late.released == ["l"]


def test_two_async_waits_of_one_body_go_on_side_by_side(app, request):
    names = [f"{unique(request)}-{number}" for number in range(2)]
    others = [app.request("ends_at", gate_name=name, value=name) for name in names]
    waiter = app.request("waits_for_two", first=others[0].id, second=others[1].id)
    app.waiting(waiter)
    app.open_gate(names[0])
    app.wait(others[0])
    assert app.service.get(waiter).status == "START"
    app.open_gate(names[1])
    began = time.monotonic()
    assert app.result_of(waiter) == names
    assert time.monotonic() - began < allowed_s(1.5)


# ---- descriptors ----


def test_waiting_often_leaves_neither_descriptors_nor_threads(app):
    others = [app.request("ends_after", options={"delay_s": 0.4 + 0.05 * number}, pause_s=0) for number in range(21)]
    before, after = app.result_of(app.request("waits_often", on_ids=[other.id for other in others]))
    assert after == before


# ---- slots ----


@pytest.mark.on_both
def test_five_wait_for_a_sixth_with_two_slots(make_waiting):
    app = make_waiting(slots=2)
    app.start()
    sixth = app.request("reaches", options={"delay_s": 1.0}, value=6)
    waiters = [app.request("works_and_waits", on_id=sixth.id, part="loaded") for _ in range(5)]
    for waiter in waiters:
        app.waiting(waiter)
    app.result_of_exception(sixth)
    assert [app.result_of(waiter) for waiter in waiters] == [6] * 5
    assert most_inside([one for one in app.events() if one["event"] in ("in", "out") and one["id"] != sixth.id]) <= 2
    app.nothing_is_left()


def test_sixty_wait_with_four_slots_and_come_back_before_new_tasks(make_waiting):
    app = make_waiting(slots=4)
    app.start()
    other = app.request("ends_at", gate_name="go", value="now")
    waiters = [app.request("works_and_waits", on_id=other.id, pause_s=0.02) for _ in range(60)]
    for waiter in waiters:
        app.waiting(waiter)
    for _ in range(3):
        app.request("works", pause_s=0.5)
    wait_until(lambda: len([one for one in app.events("in") if one["id"] > waiters[-1].id]) == 3, "others run")
    later = [app.request("works", pause_s=0.02) for _ in range(10)]
    app.open_gate("go")
    for handle in [*waiters, *later]:
        app.wait(handle, 30.0)
    assert {str(app.service.get(waiter).status) for waiter in waiters} == {"DONE"}
    bodies = [one for one in app.events() if one["event"] in ("in", "out") and one["id"] != other.id]
    assert most_inside(bodies) <= 4
    returned = sorted(app.events("in", waiter.id)[1]["at"] for waiter in waiters)
    new = sorted(app.events("in", handle.id)[0]["at"] for handle in later)
    early = [at for at in new if at < returned[-5]]
    assert len(early) <= 4  # what was free before the first of them had woken
    assert "cannot be written" not in app.supervisors[0].log  # nobody was meant to have another's slot
    app.nothing_is_left()


def test_who_waited_in_vain_and_has_no_slot_yet_stands_in_no_queue(make_waiting):
    app = make_waiting(slots=2)
    app.start()
    holder = app.request("holds_and_stays", name="l", gate_name="free")
    app.said("in", holder)
    first = app.request("tries_lock", name="l", timeout_s=0.5)
    app.waiting(first)
    second = app.request("holds", name="l")
    app.waiting(second)
    filler = app.request("ends_at", gate_name="filler")
    app.said("in", filler)
    wait_until(lambda: [row["kind"] for row in app.waiting(first)] == ["slot"], "the first waits for a slot alone", 3.0)
    app.open_gate("free")
    wait_until(lambda: [row["task_id"] for row in app.rows("hold")] == [second.id], "the second has the lock", 3.0)
    assert app.service.get(first).slot is None
    app.open_gate("filler")
    app.result_of_exception(holder)
    assert app.result_of(first)[0] == "WaitTimeout"
    for handle in (second, holder, filler):
        app.wait(handle)
    app.nothing_is_left()


def test_beyond_max_waiting_a_waiter_keeps_its_slot(make_waiting):
    app = make_waiting(slots=4, max_waiting=1)
    app.start()
    other = app.request("ends_at", gate_name="go")
    holder = app.request("holds", name="l", gate_name="go")
    app.said("in", other)
    app.said("in", holder)
    first = app.request("waits", ids=[other.id])
    app.waiting(first)
    second = app.request("tries_lock", name="l", timeout_s=0.5)
    app.waiting(second, slotless=False)
    assert app.service.get(second).slot is not None
    began = time.monotonic()
    assert app.result_of(second)[0] == "WaitTimeout"
    assert time.monotonic() - began < allowed_s(2.0)
    third = app.request("holds", name="l")
    app.waiting(third, slotless=False)
    assert app.service.get(third).slot is not None
    later = app.request("works")
    app.open_gate("go")
    for handle in (first, third, later):
        app.result_of(handle)
    app.nothing_is_left()
    assert "cannot be written" not in app.supervisors[0].log


# ---- wait manager and supervisor die ----


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_wait_manager_that_dies_or_hangs_costs_a_waiter_about_a_second(make_waiting, number):
    app = make_waiting(slots=6)
    app.start()
    other = app.request("reaches", latches=["go"], value=1)
    waiters = [app.request("waits", ids=[other.id], part="loaded") for _ in range(3)]
    for waiter in waiters:
        app.waiting(waiter)
    wait_manager = app.wait_manager()
    os.kill(wait_manager, number)
    late = app.request("waits", ids=[other.id], part="loaded")
    app.waiting(late)
    app.open_gate("go")
    for waiter in [*waiters, late]:
        assert app.result_of(waiter) == 1
    reached = app.said("reached", other)["at"]
    assert max(app.said("out", waiter)["at"] for waiter in [*waiters, late]) - reached < allowed_s(2.0)
    wait_until(lambda: not psutil.pid_exists(wait_manager), "the old wait manager is gone")
    again = app.request("waits", ids=[other.id])
    app.waiting(again)
    assert app.wait_manager() != wait_manager
    app.result_of_exception(other)
    app.result_of(again)
    app.nothing_is_left()


@pytest.mark.on_both
def test_ten_that_wait_while_no_supervisor_lives_go_on_and_take_their_slots_themselves(make_waiting):
    app = make_waiting(slots=3)
    supervisor = app.start()
    other = app.request("reaches", latches=["go"], value=1)
    waiters = [app.request("works_and_waits", on_id=other.id, part="loaded") for _ in range(10)]
    for waiter in waiters:
        app.waiting(waiter)
    supervisor.kill()
    app.open_gate("go")
    reached = app.said("reached", other)["at"]
    for waiter in waiters:
        assert app.result_of(waiter) == 1
    assert min(app.events("in", waiter.id)[1]["at"] for waiter in waiters) - reached < allowed_s(2.0)
    bodies = [one for one in app.events() if one["event"] in ("in", "out") and one["id"] != other.id]
    assert most_inside(bodies) <= 3
    app.result_of_exception(other)
    app.wait(other)
    app.nothing_is_left()


@pytest.mark.on_both
def test_waits_and_locks_outlive_a_supervisor(make_waiting):
    app = make_waiting(slots=6)
    supervisor = app.start()
    other = app.request("reaches", latches=["go"], value=1)
    holder = app.request("holds", name="l", gate_name="lock")
    app.said("in", holder)
    waiter = app.request("waits", ids=[other.id], part="loaded")
    locker = app.request("holds", name="l")
    app.waiting(waiter)
    app.waiting(locker)
    supervisor.kill()
    app.start()
    app.open_gate("go")
    assert app.result_of(waiter) == 1
    assert app.said("out", waiter)["at"] - app.said("reached", other)["at"] < allowed_s(2.0)
    app.kill(holder)
    assert app.result_of(locker) == holder.id
    app.result_of_exception(other)
    app.wait(other)
    app.nothing_is_left()


# ---- many ----


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_thousand_over_fifty_locks_with_random_kills_never_exceed_the_permits(make_waiting):
    chance = random.Random(20)
    app = make_waiting(slots=16)
    app.start()
    permits = {f"lock-{number}": 1 + number % 3 for number in range(50)}
    names = [chance.choice(list(permits)) for _ in range(1000)]
    handles = [app.request("holds", name=name, permits=permits[name], pause_s=0.1) for name in names]
    killed_at = {}

    def all_ended():
        if app.service.counts()["START"] and len(killed_at) < 150 and chance.random() < 0.5:
            victim = chance.choice(app.service.list(status="START") or [None])
            if victim is not None and victim.id not in killed_at:
                killed_at[victim.id] = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
        counts = app.service.counts()
        return not (counts["REQUEST"] or counts["START"])

    wait_until(all_ended, "all have ended", 240)
    assert len(killed_at) >= 50
    records = [app.service.get(handle) for handle in handles]
    assert {str(record.reason) for record in records if record.status == "INTERRUPTED"} == {"SIGNALLED"}
    assert all(record.status == "DONE" or record.id in killed_at for record in records)
    for name, most in permits.items():
        inside = [one for one in app.events() if one.get("lock") == name]
        out = {one["id"] for one in inside if one["event"] == "out"}
        entered = {one["id"] for one in inside}
        inside += [{"event": "out", "id": id, "at": killed_at[id]} for id in entered - out]
        assert most_inside(inside) <= most, name
    app.nothing_is_left()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_that_wait_for_one_part_all_wake(make_waiting):
    app = make_waiting(slots=8)
    app.start()
    other = app.request("reaches", latches=["go"], value=1)
    waiters = [app.request("works_and_waits", on_id=other.id, part="loaded", pause_s=0.01) for _ in range(200)]
    wait_until(lambda: len(app.rows("wait")) == 200, "all wait", 120)
    app.open_gate("go")
    reached = app.said("reached", other)["at"]
    for waiter in waiters:
        assert app.result_of(waiter, 60.0) == 1
    assert most_inside([one for one in app.events() if one["event"] in ("in", "out") and one["id"] != other.id]) <= 8
    assert max(one["at"] for one in app.events("out")) - reached < allowed_s(20.0)
    app.result_of_exception(other)
    app.wait(other)
    app.nothing_is_left()
