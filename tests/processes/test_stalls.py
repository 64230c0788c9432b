"""stall_s: whoever says for so long nothing of getting on is ended; whoever waits, or could not be heard, never is."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time

import pytest
from support.app import App, wait_until
from support.pace import allowed_s

from bgsupervisor.supervisor.termination import STALL_SLACK_S

pytestmark = pytest.mark.any_database

BODIES = """
import asyncio, os, pathlib, threading, time
from bgsupervisor import Task, current, task

LONG_S = 4.5
'''Longer than stall_s and its slack.'''

def ready():
    pathlib.Path(f"ready-{current().id}").touch()

def latch():
    while not pathlib.Path(f"latch-{current().id}").exists():
        time.sleep(0.01)

def until(limit_s):
    ends_at = time.monotonic() + limit_s
    while time.monotonic() < ends_at:
        yield time.monotonic()
        time.sleep(0.3)

class Stalling(Task):
    stall_s = 1.0

class SaysNothing(Stalling):
    def run(self) -> None:
        self.hangs()
    def hangs(self) -> None:
        time.sleep(600)

class BeginsWell(Stalling):
    def run(self) -> None:
        for number in self.track(range(20)):
            time.sleep(0.1)
        SaysNothing.hangs(self)

class HoldsTheLockOfTheInterpreter(Stalling):
    def run(self) -> None:
        sum(range(10**12))

class SaysTheSame(Stalling):
    def run(self) -> str:
        for _ in until(LONG_S):
            self.progress(3, 10, "trying again")
        return "got on"

class Tracks(Stalling):
    def run(self) -> str:
        for _ in self.track(until(LONG_S)):
            pass
        return "got on"

class Reaches(Stalling):
    def run(self) -> str:
        for _ in until(LONG_S):
            self.reach("again")
        return "got on"

class InAThread(Stalling):
    def run(self) -> str:
        def work():
            for _ in until(LONG_S):
                self.progress(message="from a thread")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return "got on"

@task(stall_s=1)
async def is_async() -> str:
    for _ in range(15):
        current().progress(1)
        await asyncio.sleep(0.3)
    return "got on"

@task
def quiet(seconds: float) -> str:
    time.sleep(seconds)
    return "quiet"

@task
def holds(name: str, seconds: float) -> None:
    with current().lock(name):
        ready()
        time.sleep(seconds)

@task
def arrives(name: str, seconds: float) -> None:
    time.sleep(seconds)
    current().barrier(name, 2, scope="s")

class WaitsForAnother(Stalling):
    def run(self, id: int) -> str:
        return self.wait_for(id)

class WaitsForALock(Stalling):
    def run(self, name: str) -> str:
        with self.lock(name):
            return "has it"

class WaitsAtABarrier(Stalling):
    def run(self, name: str) -> str:
        self.barrier(name, 2, scope="s")
        return "passed"

class HangsAfterItHasWaited(Stalling):
    def run(self, id: int) -> None:
        self.wait_for(id)
        ready()
        SaysNothing.hangs(self)

class WaitsAndGoesOn(Task):
    stall_s = 2.0
    def run(self, id: int) -> str:
        self.wait_for(id)
        time.sleep(1.7)
        self.progress(1)
        time.sleep(1.7)
        return "got on"

@task
def reaches_and_goes_on(seconds: float) -> None:
    current().reach("p")
    time.sleep(seconds)

class WaitsForAPart(Stalling):
    def run(self, id: int) -> str:
        self.wait_for(id, part="p")
        time.sleep(0.5)
        self.progress(1)
        return "got on"

class GetsOnUntilTheGate(Stalling):
    def run(self) -> str:
        ready()
        while not pathlib.Path(f"latch-{self.id}").exists():
            self.progress(1)
            time.sleep(0.1)
        self.progress(2)  # raises if it was asked to end
        return "got on"

class ReachesPartsUntilTheGate(Stalling):
    def run(self) -> str:
        ready()
        number = 0
        while not pathlib.Path(f"latch-{self.id}").exists():
            self.reach(f"part {(number := number + 1)}")
            time.sleep(0.1)
        self.progress(2)  # raises if it was asked to end
        return "got on"

class HangsFromTheGate(Stalling):
    def run(self) -> None:
        self.progress(1)
        ready()
        latch()
        time.sleep(600)
"""


class Stalls(App):
    """An application of these bodies."""

    def __init__(self, folder, **options):
        super().__init__(folder, BODIES, **options)

    def request(self, body, **data):
        return self.service.request(f"appx:{body}", data)

    def begun(self, body, **data):
        handle = self.request(body, **data)
        wait_until((self.folder / f"ready-{handle.id}").exists, f"the body of task {handle.id} is ready")
        return self.started(handle)

    def open_gate(self, record):
        (self.folder / f"latch-{record.id}").touch()

    def assert_stalled(self, record):
        assert (record.status, record.reason) == ("INTERRUPTED", "TIMED_OUT"), record
        assert "made no progress for its stall_s of 1 s" in record.detail


@contextlib.contextmanager
def living(folder, **options):
    app = Stalls(folder, **{"grace_s": 0.3, **options})
    try:
        yield app
    finally:
        app.end()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with living(tmp_path_factory.mktemp("stalls")) as app:
        app.start()
        yield app


SILENT = ("SaysNothing", "BeginsWell", "HoldsTheLockOfTheInterpreter")
BUSY = ("SaysTheSame", "Tracks", "Reaches", "InAThread", "is_async")


@pytest.fixture(scope="module")
def records(app):
    """The records of bodies that say nothing for a while, or get on, or wait for others; all run at once."""
    handles = {body: app.request(body) for body in (*SILENT, *BUSY)}
    slow = app.request("quiet", seconds=4.5)
    app.begun("holds", name="l", seconds=4.5)
    handles["arrives"] = app.request("arrives", name="b", seconds=4.5)
    handles["WaitsForAnother"] = app.request("WaitsForAnother", id=slow.id)
    handles["WaitsForALock"] = app.request("WaitsForALock", name="l")
    handles["WaitsAtABarrier"] = app.request("WaitsAtABarrier", name="b")
    handles["HangsAfterItHasWaited"] = app.request("HangsAfterItHasWaited", id=slow.id)
    return {body: app.wait(handle, 40) for body, handle in handles.items()}


@pytest.mark.parametrize("body", SILENT)
def test_a_body_that_says_nothing_for_its_stall_s_is_timed_out(app, records, body):
    app.assert_stalled(records[body])


def test_a_stall_is_told_soon_and_goes_the_way_of_a_time_limit(records):
    record = records["SaysNothing"]
    ran_s = (record.ended_at - record.started_at).total_seconds()
    assert 1.0 + STALL_SLACK_S <= ran_s < allowed_s(12)
    assert "SIGTERM was sent" in record.detail
    assert "in hangs" in record.stack
    assert "SIGKILL was sent" in records["HoldsTheLockOfTheInterpreter"].detail


def test_the_clock_of_a_stall_begins_anew_with_each_progress(records):
    record = records["BeginsWell"]
    assert (record.ended_at - record.started_at).total_seconds() >= 2.0 + 1.0
    assert record.progress_done == 20


@pytest.mark.parametrize("body", BUSY)
def test_a_body_gets_on_with_any_call_of_progress_track_or_reach(app, records, body):
    record = records[body]
    assert (record.status, record.reason) == ("DONE", None), record
    assert (record.ended_at - record.started_at).total_seconds() > 1.0 + STALL_SLACK_S
    assert app.service.result(record.id) == "got on"


@pytest.mark.parametrize("body", ["WaitsForAnother", "WaitsForALock", "WaitsAtABarrier"])
def test_a_body_that_waits_for_others_does_not_stall(records, body):
    record = records[body]
    assert record.status == "DONE", record
    assert (record.ended_at - record.started_at).total_seconds() > 1.0 + STALL_SLACK_S


def test_a_body_that_hangs_after_it_has_waited_stalls_then_and_not_before(app, records):
    record = records["HangsAfterItHasWaited"]
    app.assert_stalled(record)
    assert "in hangs" in record.stack
    assert (app.folder / f"ready-{record.id}").stat().st_mtime + 1.0 <= record.ended_at.timestamp()


def test_a_body_that_keeps_its_slot_while_it_waits_does_not_stall_either(tmp_path):
    with living(tmp_path, max_waiting=1) as app:
        app.start()
        slow = app.request("quiet", seconds=7.2)  # two looks at who is silent lie before its end, one soon after it
        waiters = [app.request("WaitsAndGoesOn", id=slow.id) for _ in range(2)]
        for handle in waiters:
            app.started(handle)
        wait_until(lambda: len(app.service.ledger.waits.rows()) == 2, "both wait")
        with_slot = [one for one in app.service.ledger.starts() if one.slot is not None and one.id != slow.id]
        assert len(with_slot) == 1
        assert [app.service.result(app.wait(handle).id) for handle in waiters] == ["got on", "got on"]


def test_a_body_that_has_waited_long_for_its_slot_to_come_back_does_not_stall(tmp_path):
    with living(tmp_path, slots=1) as app:
        app.start()
        planned = app.service.request("appx:reaches_and_goes_on", {"seconds": 4.5}, delay_s=0.5)
        waiter = app.request("WaitsForAPart", id=planned.id)
        app.started(planned)
        assert app.service.get(waiter).slot is None
        assert app.service.result(app.wait(waiter).id) == "got on"


def test_a_child_that_has_not_dialled_the_new_supervisor_is_not_judged(tmp_path):
    with living(tmp_path) as app:
        app.start().kill()
        app.start()
        record = app.begun("GetsOnUntilTheGate")
        app.supervisors[-1].kill()
        os.kill(record.pid, signal.SIGSTOP)
        app.start()
        fences = [app.wait(app.request("quiet", seconds=1.5)) for _ in range(3)]
        assert [fence.status for fence in fences] == ["DONE"] * 3
        os.kill(record.pid, signal.SIGCONT)
        app.open_gate(record)
        assert app.service.result(app.wait(record.id).id) == "got on"


def test_nobody_stalls_while_no_supervisor_can_hear_it(tmp_path):
    with living(tmp_path) as app:
        app.start()
        busy, hangs = app.begun("GetsOnUntilTheGate"), app.begun("HangsFromTheGate")
        app.supervisors[0].kill()
        time.sleep(1.0 + STALL_SLACK_S + 1.0)  # nobody is there who could do anything about it
        app.start(wait=False)
        began = time.monotonic()
        app.open_gate(hangs)
        record = app.wait(hangs.id, 30)
        app.assert_stalled(record)
        assert time.monotonic() - began >= 1.0
        assert app.service.get(busy.id).status == "START"
        app.open_gate(busy)
        assert app.service.result(app.wait(busy.id).id) == "got on"


@pytest.mark.parametrize("others", [1, 0])
def test_nobody_stalls_while_the_database_cannot_be_written(tmp_path, others):
    with living(tmp_path) as app:
        app.start()
        records = [app.begun("ReachesPartsUntilTheGate"), *[app.begun("GetsOnUntilTheGate") for _ in range(others)]]
        with contextlib.closing(sqlite3.connect(tmp_path / "bgsupervisor.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + 1.0 + STALL_SLACK_S + 2.0, "its stall_s has passed")
        assert app.wait(app.request("quiet", seconds=0.5)).status == "DONE"
        for record in records:
            app.open_gate(record)
            assert app.service.result(app.wait(record.id).id) == "got on"


def test_nothing_stalls_while_all_were_stopped_and_the_supervisor_goes_on_first(tmp_path):
    with living(tmp_path) as app:
        supervisor = app.start()
        bodies = [app.begun("GetsOnUntilTheGate") for _ in range(8)]
        pids = [*(one.pid for one in bodies), *(identity.pid for identity in app._fork_servers())]
        for pid in (supervisor.process.pid, *pids):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(7.0)  # as long as a machine is suspended
        supervisor.process.send_signal(signal.SIGCONT)
        time.sleep(0.05)  # in which the supervisor makes more than one pass
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert app.wait(app.request("quiet", seconds=0.5)).status == "DONE"
        for body in bodies:
            app.open_gate(body)
            assert app.service.result(app.wait(body.id).id) == "got on"


def test_a_supervisor_that_stood_still_hears_first_and_judges_then(tmp_path):
    with living(tmp_path) as app:
        supervisor = app.start()
        busy = app.begun("GetsOnUntilTheGate")
        supervisor.process.send_signal(signal.SIGSTOP)
        time.sleep(1.0 + STALL_SLACK_S + 1.0)
        supervisor.process.send_signal(signal.SIGCONT)
        fence = app.wait(app.request("quiet", seconds=0.5))
        assert fence.status == "DONE"
        assert app.service.get(busy.id).status == "START"
        app.open_gate(busy)
        assert app.service.result(app.wait(busy.id).id) == "got on"
