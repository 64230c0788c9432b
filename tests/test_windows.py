"""Whoever dies or stops between two durable facts: the row tells the truth in the end, and no body begins twice.

Each case brings the processes to one of the points of `bgsupervisor.pauses`, kills or stops some of them there, starts
the next supervisor where one is missing, and looks at what is left in the end.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import LIMIT_S, App, pausing_path, wait_until

from bgsupervisor import Status, pauses, processes
from bgsupervisor.boards import Boards
from bgsupervisor.clock import SystemClock
from bgsupervisor.reception import Reception
from bgsupervisor.statedir import StateDir

BODIES = """
import atexit, os, sqlite3, time
from pathlib import Path
from bgsupervisor import Task, current, task

def say(what):
    descriptor = os.open("oracle", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {current().id} {current().attempt}\\n".encode())
    os.close(descriptor)

def gate():
    while not Path("gate").exists():
        time.sleep(0.005)

@task
def plain():
    say("in")
    say("out")

@task
def gated():
    say("in")
    gate()
    say("out")

@task
def endless():
    say("in")
    while True:
        time.sleep(600)

@task
def counts():
    say("in")
    for _ in current().track(range(10**9)):
        time.sleep(0.01)

@task
def holds():
    say("in")
    with current().lock("smtp"):
        gate()
    say("out")

@task
def keeps():
    '''Still holds a lock when it ends.'''
    say("in")
    current().lock("smtp").__enter__()
    gate()
    say("out")

@task
def locks_the_database():
    say("in")
    while not Path("lock").exists():
        time.sleep(0.005)
    connection = sqlite3.connect("bgsupervisor.db", isolation_level=None, timeout=30)
    connection.execute("BEGIN IMMEDIATE")
    say("locked")
    while not Path("unlock").exists():
        time.sleep(0.005)
    connection.execute("COMMIT")
    say("unlocked")
    gate()
    say("out")

@task
def reaches():
    current().reach("loaded")

@task
def waits(id: int):
    say("in")
    current().wait_for(id, part="loaded")
    say("out")

@task
def keeps_parts():
    for part in ("first", "other", "second"):
        while not Path(part).exists():
            time.sleep(0.005)
        current().reach(part)
        say(part)
    while not Path("end").exists():
        time.sleep(0.005)

@task
def waits_for_each(id: int, parts: list[str]):
    for part in parts:
        current().wait_for(id, part=part)
        say(part)
    while not Path("end").exists():
        time.sleep(0.005)

@task
def cleans_up():
    say("in")
    try:
        while True:
            time.sleep(600)
    finally:
        Path("cleaned").touch()

@task
def lingers():
    atexit.register(time.sleep, 600)
"""
S, N, C = "supervisor", "nursery", "child"
SETTLE_S = 1.0
"""While one is stopped, the others have so long to come to an end without it."""


class Stage(App):
    """An application whose processes wait at armed points."""

    def __init__(self, folder, **options):
        options = {"slots": 1, "spares": 0, "grace_s": 0.4, "heartbeat_s": 0.5, "busy_timeout_s": 2.0, **options}
        super().__init__(folder, BODIES, **options)
        self.points = folder / "points"
        self.points.mkdir()
        self.marker = {"STAGE": str(folder), "PAUSES": str(self.points)}
        self.more = {"NURSERY_LONELY_S": "1"}

    def start(self, *, wait=True):
        pausing = {"PYTHONPATH": pausing_path(), **self.marker, **self.more}
        return super().start(wait=wait, environment=pausing)

    @property
    def supervisor(self):
        return self.supervisors[-1]

    def request(self, body, **data):
        return self.service.request(f"appx:{body}", data)

    def arm(self, point, kind=None):
        new = self.points / f"{point}.new"
        new.write_text(kind or kind_of(point))
        new.rename(self.points / f"{point}.armed")

    def reached(self, point):
        """Return the PID of the process that waits at the point."""
        path = self.points / f"{point}.reached"
        wait_until(path.exists, f"{point} is reached")
        return int(path.read_text())

    def let_go(self):
        (self.folder / "gate").touch()
        for point in pauses.POINTS:
            (self.points / f"{point}.armed").unlink(missing_ok=True)
            (self.points / f"{point}.go").touch()

    def oracle(self):
        path = self.folder / "oracle"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def said(self, what, handle):
        wait_until(lambda: any(line[:2] == [what, str(handle.id)] for line in self.oracle()), f"it has said {what}")

    def nurseries(self):
        return [int(path.name.split("-")[1]) for path in self.state_dir.glob("nursery-*-*")]

    def processes(self):
        """Return all living processes that descend from this stage's supervisors, zombies left out."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("STAGE") == self.marker["STAGE"]:
                    found.append(process)
        return found

    def rows(self, table, where="1 = 1"):
        return self.database.rows(f"SELECT * FROM bgsupervisor_{table} WHERE {where}")

    def end(self):
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        super().end()


def kind_of(point):
    return point.partition(".")[0]


# ---- how a point is reached ----


def running(app, body="gated"):
    app.start()
    handle = app.request(body)
    app.said("in", handle)
    return handle


def on_its_way(app, point, body="gated"):
    app.start()
    app.arm(point)
    return app.request(body)


def at_the_first_start(app, point):
    app.arm(point)
    app.start(wait=False)
    return app.request("plain")


def before_its_hello(app, point):
    """The forked child waits too: it would dial by itself, and get the task, whatever its nursery has told."""
    app.start()
    app.arm("child.born")
    app.arm(point)
    handle = app.request("gated")
    app.reached("child.born")
    return handle


def at_its_end(app, point):
    return on_its_way(app, point, "plain")


def in_the_transaction_of_its_end(app, point):
    handle = running(app, "keeps")
    app.arm(point, S)
    (app.folder / "gate").touch()
    return handle


def in_its_own_transaction(app, point):
    handle = running(app, "keeps")
    app.supervisor.kill()
    app.arm(point, C)
    (app.folder / "gate").touch()
    return handle


def without_a_supervisor(app, point):
    handle = running(app)
    app.supervisor.kill()
    app.arm(point)
    (app.folder / "gate").touch()
    return handle


def by_the_next_supervisor(app, point):
    handle = running(app)
    app.supervisor.kill()
    app.arm(point)
    app.start(wait=False)
    return handle


def claimed_in_vain(app, point):
    handle = on_its_way(app, "supervisor.claimed")
    app.reached("supervisor.claimed")
    app.supervisor.kill()
    app.arm(point)
    if kind_of(point) == S:
        app.start(wait=False)
    return handle


def lonely(app, point):
    app.more["LINK_LONELY_S"] = "0.5"
    return claimed_in_vain(app, point)


def cancelled(app, point):
    handle = running(app, "endless")
    app.arm(point)
    app.service.cancel(handle, by="jana")
    return handle


def reloaded(app, point):
    handle = running(app)
    app.arm(point)
    app.supervisor.process.send_signal(signal.SIGHUP)
    return handle


def told_to_leave(app, point):
    handle = running(app)
    app.arm(point)
    app.supervisor.process.send_signal(signal.SIGTERM)
    return handle


def killed_before(app, point):
    handle = running(app)
    app.arm(point)
    os.kill(app.service.get(handle).pid, signal.SIGKILL)
    return handle


def waiting_for_another(app, point):
    """The awaited task, of lower priority, finds no slot before the waiter has given its own."""
    app.arm(point)
    handle = app.service.request("appx:waits", {"id": 2}, priority=1)
    assert app.request("reaches").id == 2
    app.start()
    return handle


def giving_a_lock_back(app, point):
    handle = running(app, "holds")
    app.arm(point)
    (app.folder / "gate").touch()
    return handle


def taking_a_lock(app, point):
    return on_its_way(app, point, "holds")


# ---- what is true in the end ----


@dataclasses.dataclass(frozen=True)
class Window:
    """How a point is reached, and what becomes of the task.

    `lives` is how it ends if its child lives; `dies` if its child is killed there, `dies_with` if the supervisor is
    killed there too. "again": it had not begun, and is done by another child. "lost": as its signal says, or unknown if
    nobody could see. `leaves`: the supervisor goes, killed or not.
    """

    reach: object
    lives: str = "DONE"
    dies: str = "lost"
    dies_with: str = ""
    has_child: bool = True
    has_supervisor: bool = True
    leaves: bool = False

    def truth(self, does, victims):
        unseen = S in victims or self.leaves or not self.has_supervisor
        if does == "stop" or C not in victims:
            return self.lives
        truth = self.dies_with or self.dies if unseen else self.dies
        return "unknown" if truth == "lost" and unseen and N in victims else truth


WINDOWS = {
    "supervisor.claiming": Window(on_its_way, dies="again"),
    "supervisor.claimed": Window(on_its_way, dies="again", dies_with="lost"),
    "supervisor.ordered": Window(on_its_way),
    "supervisor.ending": Window(at_its_end, dies="DONE", dies_with="lost"),
    "supervisor.ended": Window(at_its_end, dies="DONE"),
    "supervisor.acknowledged": Window(at_its_end, has_child=False),
    "supervisor.unclaiming": Window(claimed_in_vain, dies="again", dies_with="lost"),
    "supervisor.unclaimed": Window(claimed_in_vain, dies="again"),
    "supervisor.condemning": Window(cancelled, lives="CANCELLED", dies="CANCELLED", dies_with="lost"),
    "supervisor.condemned": Window(cancelled, lives="CANCELLED", dies="CANCELLED"),
    "supervisor.struck": Window(cancelled, lives="CANCELLED", has_child=False),
    "supervisor.granted": Window(waiting_for_another),
    "supervisor.adopting": Window(by_the_next_supervisor),
    "supervisor.adopted": Window(by_the_next_supervisor),
    "supervisor.reloading": Window(reloaded),
    "supervisor.reloaded": Window(reloaded),
    "supervisor.leaving": Window(told_to_leave, leaves=True),
    "nursery.loaded": Window(at_the_first_start, has_child=False),
    "nursery.forked": Window(before_its_hello, dies="again"),
    "nursery.buried": Window(killed_before, lives="lost", has_child=False),
    "nursery.told": Window(killed_before, lives="lost", has_child=False),
    "child.born": Window(on_its_way, dies="again"),
    "child.dialled": Window(on_its_way, dies="again"),
    "child.ordered": Window(on_its_way),
    "child.beginning": Window(on_its_way),
    "child.over": Window(at_its_end),
    "child.reported": Window(at_its_end, dies="DONE"),
    "child.recording": Window(without_a_supervisor, has_supervisor=False),
    "child.recorded": Window(without_a_supervisor, dies="DONE", has_supervisor=False),
    "child.leaving": Window(at_its_end, dies="DONE"),
    "child.unclaiming": Window(lonely, has_supervisor=False),
    "child.slot_given": Window(waiting_for_another),
    "child.locked": Window(taking_a_lock),
    "child.unlocked": Window(giving_a_lock_back),
}
WINDOWS |= {
    ("ledger.ended", S): Window(in_the_transaction_of_its_end, dies="DONE", dies_with="lost"),
    ("ledger.freed", S): Window(in_the_transaction_of_its_end, dies="DONE", dies_with="lost"),
    ("ledger.ended", C): Window(in_its_own_transaction, has_supervisor=False),
    ("ledger.freed", C): Window(in_its_own_transaction, has_supervisor=False),
}


def whoever_is_at(app, window, name, handle):
    """Return the PIDs of supervisor, nursery and child when the point is reached."""
    point, kind = name if isinstance(name, tuple) else (name, kind_of(name))
    there = app.reached(point)
    found = {S: app.supervisor.process.pid} if window.has_supervisor else {}
    if point in ("child.reported", "nursery.told"):
        wait_until(lambda: app.service.get(handle).status.ended, "the end is recorded")
    if kind == C:
        found[C] = there
    elif window.has_child:
        record = app.service.get(handle)
        idle = [one.pid for nursery in app.nurseries() for one in children(nursery)]
        [found[C]] = [record.pid] if record.status == "START" else idle
    [found[N]] = [psutil.Process(found[C]).ppid()] if C in found else app.nurseries()
    assert found.get(kind, there) == there
    return found


def children(pid):
    return [one for one in psutil.Process(pid).children() if "resource_tracker" not in " ".join(one.cmdline())]


def kill(app, pids, victims):
    """Kill all at once: none of them sees the death of another."""
    for victim in victims:
        os.kill(pids[victim], signal.SIGSTOP)
    for victim in victims:
        wait_until(lambda one=pids[victim]: psutil.Process(one).status() == "stopped", "it is stopped")
    for victim in (C, N, S):
        if victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
    if S in victims:
        app.supervisor.process.wait()
    if {N, C} <= set(victims) and app.supervisor.process.poll() is not None:
        wait_until(lambda: not psutil.pid_exists(pids[C]), "init has reaped it: a zombie would still tell how it died")


def stop(app, pids, victims, handle, settle_s):
    """Stop some, have another supervisor do what it can without them, and let them go on."""
    for victim in victims:
        os.kill(pids[victim], signal.SIGSTOP)
    if S in victims:
        (app.state_dir / "supervisor.lock").unlink(missing_ok=True)
    elif S in pids:
        app.supervisor.kill()
    app.start(wait=False)
    (app.folder / "gate").touch()
    deadline = time.monotonic() + settle_s
    while not app.service.get(handle).status.ended and time.monotonic() < deadline:
        time.sleep(0.01)
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):  # a task that is to end is killed though it is stopped
            os.kill(pids[victim], signal.SIGCONT)


def see_the_truth(app, handle, truth):
    record = app.wait(handle)
    oracle = app.oracle()
    told = (record.status, record.reason, record.signal)
    begun = [line for line in oracle if line[:2] == ["in", str(handle.id)]]
    if truth in ("DONE", "again"):
        assert told == ("DONE", None, None)
        assert ["out", str(handle.id), str(record.attempt)] in oracle
        assert len(begun) == 1
        assert record.tries == 0
    elif truth == "lost":
        assert told == ("INTERRUPTED", "SIGNALLED", signal.SIGKILL)
    elif truth == "unknown":
        assert told == ("INTERRUPTED", "VANISHED", None)
    else:
        assert told[:2] == ("INTERRUPTED", truth)
        assert "jana" in record.detail
    assert len(begun) <= 1
    return record


def see_that_nothing_is_left(app, record):
    wait_until(lambda: app.supervisor_row(app.supervisor.process.pid), "the supervisor has loaded the tasks")
    app.wait(following := app.request("plain"))
    assert app.service.get(following).status is Status.DONE
    assert app.service.get(record.id) == record, "an end is final"
    assert app.rows("hold", "task_id IS NOT NULL") == []
    assert app.rows("wait") == app.rows("party") == []
    assert app.rows("task", "status IN ('START', 'REQUEST') OR slot IS NOT NULL") == []
    assert app.supervisor.stop() == 0
    for started in app.supervisors:
        assert started.process.wait(5) in (0, -signal.SIGKILL)
    wait_until(lambda: not app.processes(), "no process is left")
    assert "Traceback" not in app.supervisor.log


def play(app, name, does, victims):
    window = WINDOWS[name]
    handle = window.reach(app, name[0] if isinstance(name, tuple) else name)
    pids = whoever_is_at(app, window, name, handle)
    if does == "kill":
        kill(app, pids, victims)
    else:
        stop(app, pids, victims, handle, SETTLE_S)
    if app.supervisor.process.poll() is not None:
        app.start(wait=False)
    app.let_go()
    if window.leaves and len(app.supervisors) == 1:
        assert app.supervisor.process.wait(LIMIT_S) == 0
        if {N, C} <= set(victims):
            wait_until(lambda: not psutil.pid_exists(pids[C]), "init has reaped it")
        app.start()
    see_that_nothing_is_left(app, see_the_truth(app, handle, window.truth(does, victims)))


@pytest.fixture
def stage(tmp_path):
    app = Stage(tmp_path / "stage")
    yield app
    app.end()


EVERYBODY = (S, N, C)
BRIEF = (
    ("kill", EVERYBODY, "supervisor.claimed", "supervisor.ending", "supervisor.condemned", "supervisor.unclaiming"),
    ("kill", (S, C), "supervisor.unclaiming", ("ledger.freed", S)),
    ("stop", (S,), "supervisor.claiming", "supervisor.ending", "supervisor.unclaiming", "supervisor.condemned"),
    ("stop", (S,), "supervisor.granted", ("ledger.freed", S)),
    ("stop", (N,), "nursery.forked", "nursery.buried"),
    ("stop", (C,), "child.ordered", "child.over", "child.recording", ("ledger.freed", C)),
    ("stop", EVERYBODY, "child.beginning"),
)
"""What is tried in each run of the tests, beside the death of whoever is at a point; the rest is slow by its number."""


def is_brief(name, does, victims):
    alone = (name[1] if isinstance(name, tuple) else kind_of(name),)
    if does == "kill" and victims == alone:
        return True
    return any((does, victims) == what and name in names for what, names in ((row[:2], row[2:]) for row in BRIEF))


def cases():
    for name, window in WINDOWS.items():
        here = [one for one in (S, N, C) if one == N or (window.has_supervisor if one == S else window.has_child)]
        for does in ("kill", "stop"):
            for mask in range(1, 2 ** len(here)):
                victims = tuple(one for bit, one in enumerate(here) if mask >> bit & 1)
                point = "-".join(name) if isinstance(name, tuple) else name
                marks = () if is_brief(name, does, victims) else (pytest.mark.slow,)
                yield pytest.param(name, does, victims, id=f"{point}-{does}-{'+'.join(victims)}", marks=marks)


@pytest.mark.parametrize(("name", "does", "victims"), list(cases()))
def test_the_row_is_true_in_the_end(stage, name, does, victims):
    play(stage, name, does, victims)


# ---- points of their own ----


def test_a_supervisor_that_was_stopped_starts_nothing_when_another_may_supervise(stage):
    stage.start()
    old = stage.supervisor.process
    stage.stand_still(stage.supervisor)
    handle = stage.request("plain")
    (stage.state_dir / "supervisor.lock").unlink()

    os.kill(old.pid, signal.SIGCONT)

    assert old.wait(LIMIT_S) == 0
    assert stage.service.get(handle).status == "REQUEST"
    stage.start()
    assert stage.wait(handle).attempt == 1


def test_the_farewell_of_a_replaced_supervisor_does_not_hide_the_living_one(stage):
    stage.start()
    old = stage.supervisor.process
    stage.stand_still(stage.supervisor)
    (stage.state_dir / "supervisor.lock").unlink()
    stage.start()

    os.kill(old.pid, signal.SIGCONT)

    assert old.wait(LIMIT_S) == 0
    [row] = stage.service.ledger.supervisors()
    assert (row.pid, row.left_at) == (stage.supervisor.process.pid, None)


@pytest.mark.on_both
def test_a_kill_that_is_lost_with_its_nursery_while_the_database_is_locked_is_sent_again(stage):
    stage.start()
    handle = stage.request("endless")
    stage.said("in", handle)
    stage.service.cancel(handle, by="jana")
    with stage.database.locked():
        stage.arm("nursery.striking")
        os.kill(stage.reached("nursery.striking"), signal.SIGKILL)
    stage.let_go()

    record = see_the_truth(stage, handle, "CANCELLED")

    assert record.signal == signal.SIGKILL
    see_that_nothing_is_left(stage, record)


def test_a_kill_through_the_nursery_keeps_its_reason_though_the_supervisor_dies(stage):
    stage.start()
    handle = stage.request("endless")
    stage.said("in", handle)
    stage.service.cancel(handle, by="jana")
    with stage.database.locked():
        stage.arm("nursery.striking")
        stage.reached("nursery.striking")
        stage.supervisor.kill()
        stage.let_go()
        wait_until(lambda: not psutil.pid_exists(stage.service.get(handle).pid), "it is killed")
    stage.start()

    record = stage.wait(handle)

    assert (record.reason, record.signal) == ("CANCELLED", signal.SIGKILL)
    see_that_nothing_is_left(stage, record)


def test_a_stop_that_is_recorded_comes_true_under_the_next_supervisor(stage):
    stage.start()
    handle = stage.request("endless")
    stage.said("in", handle)
    stage.arm("supervisor.condemned")
    for _ in range(2):
        stage.supervisor.process.send_signal(signal.SIGINT)
        wait_until(lambda: "still running" in stage.supervisor.log, "Ctrl-C is heard")
    stage.reached("supervisor.condemned")
    stage.supervisor.kill()
    stage.start()

    record = stage.wait(handle)

    assert (record.status, record.reason) == ("INTERRUPTED", "STOPPED")
    see_that_nothing_is_left(stage, record)


def test_a_nursery_whose_written_word_was_taken_waits_for_nobody(stage):
    stage.start()
    handle = stage.request("endless")
    stage.said("in", handle)
    stage.arm("nursery.buried")
    os.kill(stage.service.get(handle).pid, signal.SIGKILL)
    stage.reached("nursery.buried")
    assert stage.wait(handle).reason == "SIGNALLED"
    stage.supervisor.process.send_signal(signal.SIGTERM)
    assert stage.supervisor.process.wait(LIMIT_S) == 0

    stage.let_go()

    wait_until(lambda: not stage.nurseries(), "the nursery has left")


def is_still(pid):
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def suspending(stage, body):
    """Have the supervisor wait where a body is suspended and not stopped yet; return the task's handle."""
    handle = running(stage, body)
    stage.arm("supervisor.suspending")
    stage.service.suspend(handle, by="jana")
    stage.reached("supervisor.suspending")
    record = stage.service.get(handle)
    assert record.suspended_at is not None
    assert not is_still(record.pid)
    return handle


def see_it_go_on(stage, handle):
    wait_until(lambda: is_still(stage.service.get(handle).pid), "it stands still")
    stage.let_go()
    stage.service.resume(handle)
    see_that_nothing_is_left(stage, see_the_truth(stage, handle, "DONE"))


def test_a_body_that_a_dead_supervisor_did_not_stop_any_more_is_stopped_by_the_next_one(stage):
    handle = suspending(stage, "gated")
    stage.supervisor.kill()
    (stage.points / "supervisor.suspending.armed").unlink(missing_ok=True)
    stage.start()

    see_it_go_on(stage, handle)


@pytest.mark.of_sqlite
def test_a_body_that_is_stopped_with_the_database_locked_goes_on_until_it_is_free(stage):
    handle = suspending(stage, "locks_the_database")
    (stage.folder / "lock").touch()
    stage.said("locked", handle)
    (stage.points / "supervisor.suspending.go").touch()
    wait_until(lambda: is_still(stage.service.get(handle).pid), "it stands still in its transaction")
    (stage.folder / "unlock").touch()

    stage.said("unlocked", handle)

    see_it_go_on(stage, handle)


@pytest.mark.on_both
def test_a_late_end_of_an_earlier_attempt_does_not_end_the_one_that_runs(stage):
    stage.start()
    old = stage.supervisor.process
    handle = stage.request("gated")
    stage.said("in", handle)
    stage.arm("supervisor.ending")
    os.kill(stage.service.get(handle).pid, signal.SIGKILL)
    os.kill(stage.reached("supervisor.ending"), signal.SIGSTOP)
    (stage.state_dir / "supervisor.lock").unlink()
    stage.start()
    assert stage.wait(handle).reason == "SIGNALLED"
    stage.service.retry(handle)
    wait_until(lambda: ["in", str(handle.id), "2"] in stage.oracle(), "the second attempt has begun")
    (stage.points / "supervisor.ending.go").touch()

    os.kill(old.pid, signal.SIGCONT)

    assert old.wait(LIMIT_S) == 0
    assert stage.service.get(handle).status == "START"
    stage.let_go()
    record = stage.wait(handle)
    assert (record.status, record.attempt, record.tries) == ("DONE", 2, 1)
    see_that_nothing_is_left(stage, record)


def test_bodies_and_nursery_change_over_from_a_supervisor_that_is_stopped_for_ever(stage):
    stage.configure(slots=2, spares=0, grace_s=10.0, heartbeat_s=0.5)
    stage.start()
    handles = [stage.request(body) for body in ("counts", "endless")]
    for handle in handles:
        stage.said("in", handle)
    stage.stand_still(stage.supervisor)
    (stage.state_dir / "supervisor.lock").unlink()
    stage.start()

    os.kill(stage.service.get(handles[1]).pid, signal.SIGKILL)
    stage.service.cancel(handles[0], by="jana")

    record = see_the_truth(stage, handles[0], "CANCELLED")
    assert record.detail == "cancelled by jana; the body ended when it was asked"
    see_the_truth(stage, handles[1], "lost")
    os.kill(stage.supervisors[0].process.pid, signal.SIGCONT)
    see_that_nothing_is_left(stage, record)


def test_a_board_that_has_not_said_hello_goes_with_its_supervisor(tmp_path):
    state_dir, clock = StateDir(tmp_path / "state"), SystemClock()
    state_dir.create()
    ears = Reception(state_dir, clock)
    own = processes.own_identity("test")

    def identity_of(who):
        return dataclasses.replace(own, pid=who.pid, start_ticks=who.start_ticks)

    boards = Boards(state_dir, identity_of, ears, clock)
    boards.want()
    boards.check()

    boards.leave()

    [pid] = boards.pids
    assert os.waitpid(pid, 0) == (pid, signal.SIGKILL)
    ears.close()


# ---- the list of points ----


def test_every_point_is_in_the_code_once_and_is_tried():
    code = [ast.parse(path.read_text()) for path in Path(pauses.__file__).parent.rglob("*.py")]
    nodes = [node for tree in code for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [ast.literal_eval(node.args[0]) for node in nodes if ast.unparse(node.func) == "pauses.at"]
    tried = {name[0] if isinstance(name, tuple) else name for name in WINDOWS}
    tried |= {"nursery.striking", "supervisor.suspending"}
    assert sorted(calls) == sorted(pauses.POINTS)
    assert tried == set(pauses.POINTS)


def test_where_no_test_has_armed_it_a_point_does_nothing():
    [function] = [
        node for node in ast.parse(Path(pauses.__file__).read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert function.name == "at"
    assert [type(node) for node in function.body] == [ast.Expr], "only its docstring"
    assert pauses.at("supervisor.claimed") is None


def test_an_application_that_loads_longer_than_a_nursery_bears_to_be_alone_is_served(stage):
    stage.write(f"import time\ntime.sleep(1.5)\n{BODIES}")  # the nurseries of these tests bear a second
    stage.start()

    assert stage.wait(stage.request("plain")).attempt == 1
    assert "died" not in stage.supervisor.log


def test_a_claim_is_given_back_though_the_database_is_locked_when_its_lonely_child_is_to_leave(stage):
    stage.more["LINK_LONELY_S"] = "0.3"
    handle = claimed_in_vain(stage, "child.unclaiming")
    stage.reached("child.unclaiming")
    with stage.database.locked():
        stage.let_go()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 3.0, "its busy_timeout_s of 2 s has passed")
    wait_until(lambda: stage.service.get(handle).status == "REQUEST", "it has given the claim back")
    stage.start()

    record = see_the_truth(stage, handle, "again")

    see_that_nothing_is_left(stage, record)


def test_what_never_began_waits_again_though_its_child_is_killed_before_that_is_written(stage):
    handle = on_its_way(stage, "supervisor.claimed")
    stage.reached("supervisor.claimed")
    stage.supervisor.kill()
    pid = stage.service.get(handle).pid
    stage.arm("supervisor.unclaiming")
    stage.start(wait=False)
    stage.reached("supervisor.unclaiming")
    with stage.database.locked():
        (stage.points / "supervisor.unclaiming.go").touch()
        wait_until(lambda: "is locked" in stage.supervisor.log, "it could not be written")
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 3.0, "its busy_timeout_s of 2 s has passed")
    stage.let_go()

    record = see_the_truth(stage, handle, "again")

    assert record.tries == 0
    see_that_nothing_is_left(stage, record)


def test_a_replaced_supervisor_stops_no_body_that_somebody_has_resumed_since(stage):
    handle = suspending(stage, "gated")
    old, pid = stage.supervisor.process, stage.service.get(handle).pid
    os.kill(old.pid, signal.SIGSTOP)
    (stage.state_dir / "supervisor.lock").unlink()
    stage.start()
    wait_until(lambda: is_still(pid), "the next one stops it")
    stage.service.resume(handle)
    wait_until(lambda: not is_still(pid), "it goes on")
    (stage.points / "supervisor.suspending.go").touch()

    os.kill(old.pid, signal.SIGCONT)

    assert old.wait(LIMIT_S) == 0
    stage.let_go()
    see_that_nothing_is_left(stage, see_the_truth(stage, handle, "DONE"))


def test_a_late_word_that_a_slot_is_given_does_not_count_for_the_next_wait(tmp_path):
    with contextlib.ExitStack() as stack:
        stage = Stage(tmp_path / "stage", slots=2)
        stack.callback(stage.end)
        stage.start()
        keeper = stage.request("keeps_parts")
        twice = stage.request("waits_for_each", id=keeper.id, parts=["first", "second"])
        wait_until(lambda: stage.service.get(twice).slot is None, "it waits")
        other = stage.request("waits_for_each", id=keeper.id, parts=["other"])
        wait_until(lambda: stage.service.get(other).slot is None, "it waits too")
        taker = stage.request("gated")
        stage.said("in", taker)
        stage.arm("supervisor.granted")
        (stage.folder / "first").touch()
        stage.said("first", keeper)
        (stage.folder / "gate").touch()  # only a slot was missing
        stage.reached("supervisor.granted")
        stage.said("first", twice)  # it has taken the slot itself
        wait_until(lambda: stage.service.get(twice).slot is None, "it waits again")
        (stage.folder / "other").touch()
        stage.said("other", other)  # which has the slot now
        (stage.folder / "second").touch()
        stage.said("second", keeper)

        (stage.points / "supervisor.granted.go").touch()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 0.5, "the late word has come")

        assert ["second", str(twice.id), "1"] not in stage.oracle()
        (stage.folder / "end").touch()
        for handle in (keeper, twice, other):
            assert stage.wait(handle).status == "DONE"
        assert ["second", str(twice.id), "1"] in stage.oracle()


def test_a_cancelled_body_gets_to_clean_up_though_the_supervisor_dies_before_it_sends_the_signal(stage):
    stage.start()
    handle = stage.request("cleans_up")
    stage.said("in", handle)
    stage.arm("supervisor.condemned")
    stage.service.cancel(handle, by="jana")
    stage.reached("supervisor.condemned")
    stage.supervisor.kill()
    stage.start()

    record = see_the_truth(stage, handle, "CANCELLED")

    assert (stage.folder / "cleaned").exists()
    see_that_nothing_is_left(stage, record)


def test_a_supervisor_that_is_to_leave_starts_nothing_more(stage):
    stage.configure(slots=1, spares=1)
    on_its_way(stage, "supervisor.acknowledged", "plain")
    stage.reached("supervisor.acknowledged")
    handle = stage.request("plain")
    stage.supervisor.process.send_signal(signal.SIGTERM)

    stage.let_go()  # it hears of both at once

    assert stage.supervisor.process.wait(LIMIT_S) == 0
    assert stage.service.get(handle).status == "REQUEST"
    stage.start()
    assert stage.wait(handle).attempt == 1


def test_a_nursery_that_stood_still_waits_for_nobody_when_a_death_was_recorded_without_its_word(stage):
    stage.start()
    handle = stage.request("endless")
    stage.said("in", handle)
    [nursery] = stage.nurseries()
    os.kill(nursery, signal.SIGSTOP)
    os.kill(stage.service.get(handle).pid, signal.SIGKILL)
    assert stage.wait(handle).ended
    stage.supervisor.process.send_signal(signal.SIGTERM)
    assert stage.supervisor.process.wait(LIMIT_S) == 0

    os.kill(nursery, signal.SIGCONT)

    wait_until(lambda: not stage.nurseries(), "the nursery has left")


def test_the_record_of_an_adopted_nursery_goes_when_it_was_killed(stage):
    handle = running(stage)
    [nursery] = stage.nurseries()
    stage.supervisor.kill()
    stage.start()
    os.kill(nursery, signal.SIGKILL)
    stage.let_go()
    stage.wait(handle)

    wait_until(lambda: nursery not in stage.nurseries(), "its record is gone")


def test_a_child_that_has_recorded_its_end_itself_is_an_idle_one_like_any_other(stage):
    stage.configure(slots=1, spares=0, reuse=3, grace_s=0.4, heartbeat_s=0.5)
    handle = running(stage)
    stage.stand_still(stage.supervisor)
    (stage.folder / "gate").touch()
    record = stage.wait(handle)
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 0.5, "it has said that it is idle")

    stage.supervisor.process.send_signal(signal.SIGCONT)

    wait_until(lambda: not psutil.pid_exists(record.pid), "it is sent away, with none to spare")
    assert "does not leave" not in stage.supervisor.log


def test_a_child_that_cleans_up_after_its_end_gets_no_other_task_when_it_connects_anew(stage):
    stage.configure(slots=1, spares=0, grace_s=3.0, heartbeat_s=0.2)
    stage.start()
    lingers = stage.wait(stage.request("lingers"))
    (stage.state_dir / "control.sock").unlink()
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        record = stage.wait(stage.request("plain"))
        assert (record.status, record.reason) == ("DONE", None)
        assert record.pid != lingers.pid


def test_a_supervisor_that_was_stopped_within_a_pass_goes_on_to_do_what_is_due(stage):
    stage.configure(slots=1, spares=0, reuse=3, grace_s=0.4, heartbeat_s=0.5)
    handle = running(stage)
    stage.arm("supervisor.ended")
    (stage.folder / "gate").touch()
    stage.reached("supervisor.ended")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 4, "it has stood still for longer than a pass takes")
    stage.let_go()
    stage.wait(handle)

    lock = stage.state_dir / "supervisor.lock"
    touched_at = lock.stat().st_mtime
    wait_until(lambda: lock.stat().st_mtime > touched_at + 2, "its loop turns, each second", limit_s=8)
