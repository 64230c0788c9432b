"""suspend and resume: real bodies that stand still with all that they started, and what is told of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time

import psutil
import pytest
from support.app import App, wait_until

from bgsupervisor import NotSuspendable, UnknownTask
from bgsupervisor.clock import SystemClock

pytestmark = pytest.mark.any_database

BODIES = """
import os, pathlib, signal, subprocess, sys, time
from bgsupervisor import Task, current, task

def ready(what=""):
    path = pathlib.Path(f"ready-{current().id}")
    path.with_suffix(".new").write_text(str(what))
    path.with_suffix(".new").rename(path)

@task
def counts() -> int:
    '''Counts in a file until the latch is open; so does a process that it starts.'''
    code = "import os, sys, time\\nwhile True: os.write(1, b'x'); time.sleep(0.01)"
    with open(f"other-{current().id}", "wb") as file:
        other = subprocess.Popen([sys.executable, "-c", code], stdout=file)
    file = open(f"count-{current().id}", "wb", buffering=0)
    number = 0
    while not pathlib.Path(f"latch-{current().id}").exists():
        number += 1
        file.write(b"x")
        if number == 3:
            ready(other.pid)
        time.sleep(0.01)
    other.kill()
    other.wait()
    return number

@task
def tidies_up() -> None:
    try:
        ready()
        time.sleep(600)
    finally:
        print("finally", flush=True)

@task
def ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    while True:
        time.sleep(600)

@task
def waits(id: int) -> str:
    ready()
    return current().wait_for(id)

@task
def at_the_gate() -> str:
    ready()
    while not pathlib.Path(f"latch-{current().id}").exists():
        time.sleep(0.01)
    return "opened"

class Limited(Task):
    timeout_s = 3.0
    def run(self) -> None:
        ready()
        time.sleep(600)

class Stalls(Task):
    stall_s = 1.0
    def run(self) -> str:
        ready()
        while not pathlib.Path(f"latch-{self.id}").exists():
            self.progress(1)
            busy = time.process_time()
            while time.process_time() < busy + 0.3:  # this clock stops with the process, unlike that of a sleep
                pass
        self.progress(2)  # raises if it was asked to end
        return "got on"
"""


class Suspending(App):
    """An application of these bodies."""

    def __init__(self, folder, **options):
        super().__init__(folder, BODIES, **options)

    def begun(self, body, **data):
        handle = self.service.request(f"appx:{body}", data)
        wait_until((self.folder / f"ready-{handle.id}").exists, f"the body of task {handle.id} is ready")
        return self.started(handle)

    def suspended(self, record, by="jana"):
        """Suspend a task and wait until it is stopped; return its record."""
        self.service.suspend(record.id, by=by)
        wait_until(lambda: self.is_still(record), f"task {record.id} is stopped")
        return self.service.get(record.id)

    def is_still(self, record):
        return psutil.Process(record.pid).status() == psutil.STATUS_STOPPED

    def resumed(self, record):
        self.service.resume(record.id)
        wait_until(lambda: not self.is_still(record), f"task {record.id} goes on")
        return wait_until(
            lambda: (found := self.service.get(record.id)).suspended_at is None and found,
            "its row says that it goes on",
        )

    def open_gate(self, record):
        (self.folder / f"latch-{record.id}").touch()

    def text(self, kind, record):
        return (self.folder / f"{kind}-{record.id}").read_text()


@contextlib.contextmanager
def living(folder, **options):
    app = Suspending(folder, **{"spares": 0, **options})
    try:
        yield app
    finally:
        app.end()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with living(tmp_path_factory.mktemp("suspending"), grace_s=0.5, heartbeat_s=0.2) as app:
        app.start()
        yield app


# ---- suspended tasks ----


def test_a_suspended_task_stands_still_with_all_that_it_started_and_goes_on_where_it_was(app):
    record = app.begun("counts")
    other = int(app.text("ready", record))
    held = app.suspended(record)
    wait_until(lambda: psutil.Process(other).status() == psutil.STATUS_STOPPED, "what it started is stopped too")
    before = app.text("count", record), app.text("other", record)
    fence = app.begun("at_the_gate")
    app.open_gate(fence)
    app.wait(fence.id)

    assert (app.text("count", record), app.text("other", record)) == before
    assert (held.status, held.slot, held.pid) == ("START", record.slot, record.pid)
    assert (held.suspend_requested_by, held.suspended_s) == ("jana", 0.0)
    assert held.suspend_requested_at <= held.suspended_at
    assert held.public()["suspended"]

    after = app.resumed(record)
    assert (after.suspend_requested_at, after.suspended_at, after.suspended_mono) == (None, None, None)
    assert after.suspended_s > 0
    assert not after.public()["suspended"]
    for kind, text in zip(("count", "other"), before, strict=True):
        wait_until(lambda one=kind, was=text: app.text(one, record) != was, f"the {kind} goes on")
    app.open_gate(record)
    ended = app.wait(record.id)
    assert (ended.status, ended.suspended_s) == ("DONE", after.suspended_s)
    assert app.service.result(record.id) > len(before[0]) > 0


def test_the_time_of_several_suspensions_adds_up(app):
    record = app.begun("at_the_gate")
    total_s = 0.0
    for _ in range(3):
        app.suspended(record)
        began = time.monotonic()
        wait_until(lambda since=began: time.monotonic() > since + 0.2, "it has stood still for a while")
        now = app.resumed(record)
        assert now.suspended_s >= total_s + 0.2
        total_s = now.suspended_s
    app.open_gate(record)
    assert app.wait(record.id).suspended_s == total_s


# ---- what is told ----


def test_ps_why_and_show_say_that_a_task_is_suspended_and_by_whom(app):
    record = app.suspended(app.begun("at_the_gate"))
    wait_until(
        lambda: (SystemClock().now() - app.service.get(record.id).heartbeat_at).total_seconds() > 3 * 0.2 + 0.5,
        "it has missed its heartbeats",
    )
    listed = app.cli("ps").stdout
    [row] = [one for one in json.loads(app.cli("ps", "--json").stdout) if one["id"] == record.id]
    shown = json.loads(app.cli("show", str(record.id), "--json").stdout)
    why = app.cli("why", str(record.id))
    [because] = json.loads(app.cli("why", str(record.id), "--json").stdout)["because"]
    health = app.cli("health")

    assert "suspended by jana for " in listed
    assert "unresponsive" not in listed
    assert (row["unresponsive"], row["suspend_requested_by"]) == (False, "jana")
    assert row["suspended_at"] == shown["suspended_at"]
    assert row["suspended_at"].endswith("+00:00")
    assert "suspended by jana for " in app.cli("show", str(record.id)).stdout
    assert why.stdout.startswith(f"task {record.id} is START: it has been suspended by jana for ")
    assert f"`bgsupervisor resume {record.id}` continues it" in why.stdout
    assert (because["kind"], because["by"], because["since"]) == ("suspended", "jana", row["suspended_at"])
    assert (health.returncode, "unresponsive=0;" in health.stdout) == (0, True), health.stdout

    app.resumed(record)
    assert "suspended by" not in app.cli("ps").stdout
    assert "suspended" not in app.cli("why", str(record.id)).stdout
    app.open_gate(record)
    app.wait(record.id)


def test_suspend_and_resume_say_what_they_did_to_each(app):
    running, planned = app.begun("at_the_gate"), app.service.request("appx:at_the_gate", delay_s=3600)
    done = app.begun("at_the_gate")
    app.open_gate(done)
    app.wait(done.id)

    told = app.cli("suspend", str(running.id), str(planned.id), str(done.id), "999", "--by", "jana")
    assert told.returncode == 1
    words = f"which keeps its slot and its locks; `bgsupervisor resume {running.id}` continues it"
    assert told.stdout == f"suspending task {running.id}, {words}\n"
    assert told.stderr.splitlines() == [
        f"bgsupervisor: task {planned.id} cannot be suspended: it is REQUEST, only a running task can be",
        f"bgsupervisor: task {done.id} cannot be suspended: it is DONE, only a running task can be",
        "bgsupervisor: no task has the id 999; it never existed, or was pruned",
    ]
    wait_until(lambda: app.is_still(running), "it is stopped")
    again = app.cli("suspend", str(running.id), "--by", "petr")
    assert (again.returncode, again.stdout) == (0, f"task {running.id} had been suspended already by jana\n")
    assert app.service.get(running.id).suspend_requested_by == "jana"

    told = app.cli("resume", str(running.id), str(planned.id), str(done.id), "999")
    assert told.returncode == 1
    assert told.stdout.splitlines() == [
        f"resuming task {running.id}",
        f"task {planned.id} is not suspended; nothing changed",
        f"task {done.id} had ended DONE; nothing changed",
    ]
    wait_until(lambda: not app.is_still(running), "it goes on")
    wait_until(lambda: app.service.get(running.id).suspended_at is None, "its row says so")
    assert app.cli("resume", str(running.id)).stdout == f"task {running.id} is not suspended; nothing changed\n"
    app.open_gate(running)
    assert app.wait(running.id).status == "DONE"


def test_the_service_raises_for_what_cannot_be_suspended(app):
    done = app.begun("at_the_gate")
    app.open_gate(done)
    app.wait(done.id)
    with pytest.raises(NotSuspendable, match="it is DONE") as raised:
        app.service.suspend(done.id)
    assert (raised.value.id, raised.value.status) == (done.id, "DONE")
    ending = app.begun("ignores_sigterm")
    app.service.cancel(ending.id)
    with pytest.raises(NotSuspendable, match="it is being ended"):
        app.service.suspend(ending.id)
    for ask in (app.service.suspend, app.service.resume):
        with pytest.raises(UnknownTask):
            ask(999)
    assert app.wait(ending.id).reason == "CANCELLED"


def test_stack_of_a_suspended_task_says_how_to_let_it_go_on(app):
    record = app.suspended(app.begun("at_the_gate"))
    told = app.cli("stack", str(record.id))
    assert told.returncode == 1
    assert f"task {record.id} is suspended and cannot answer" in told.stderr
    app.resumed(record)
    assert "in at_the_gate" in app.cli("stack", str(record.id)).stdout
    app.open_gate(record)
    app.wait(record.id)


def test_who_waits_for_a_suspended_task_is_told_that_it_is(app):
    other = app.begun("at_the_gate")
    waiter = app.begun("waits", id=other.id)
    wait_until(lambda: app.service.get(waiter.id).slot is None, "it waits without a slot")
    app.suspended(other)
    why = app.cli("why", str(waiter.id)).stdout
    assert re.search(
        rf"the end of task {other.id}, which is START, running for \d+ s, suspended by jana for \d+ s", why
    )
    assert re.search(rf"{other.id} at_the_gate +START +suspended by jana for \d+ s", app.cli("ps", "--tree").stdout)
    app.resumed(other)
    app.open_gate(other)
    assert app.service.result(app.wait(waiter.id).id) == "opened"


# ---- who is ended meanwhile ----


def test_a_suspended_task_that_is_cancelled_goes_on_first_and_cleans_up(app):
    record = app.suspended(app.begun("tidies_up"))
    app.service.cancel(record.id, by="petr")
    ended = app.wait(record.id)
    assert (ended.status, ended.reason) == ("INTERRUPTED", "CANCELLED")
    assert "cancelled by petr" in ended.detail
    assert "SIGTERM was sent" in ended.detail
    assert ended.signal is None
    assert app.log_of(ended).splitlines().count("finally") == 1
    assert (ended.suspended_at, ended.suspend_requested_at) == (None, None)


def test_a_suspended_task_that_is_killed_is_told_truthfully(app):
    record = app.suspended(app.begun("at_the_gate"))
    os.kill(record.pid, signal.SIGKILL)
    ended = app.wait(record.id)
    assert (ended.status, ended.reason, ended.signal) == ("INTERRUPTED", "SIGNALLED", signal.SIGKILL)
    assert ended.detail == "killed by SIGKILL (9), which bgsupervisor did not send, while it was suspended"


def test_a_suspended_task_that_ignores_sigterm_is_killed(app):
    record = app.suspended(app.begun("ignores_sigterm"))
    app.service.cancel(record.id, by="petr")
    ended = app.wait(record.id)
    assert (ended.reason, ended.signal) == ("CANCELLED", signal.SIGKILL)
    assert "SIGKILL was sent" in ended.detail


def test_the_clock_of_timeout_s_stands_still_with_the_task(app):
    record = app.suspended(app.begun("Limited"))
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 4.0, "more than its whole timeout_s has passed")
    assert app.service.get(record.id).status == "START"
    app.resumed(record)
    ended = app.wait(record.id)
    assert "ran past its timeout_s of 3 s" in ended.detail
    ran_s = (ended.ended_at - ended.started_at).total_seconds()
    assert ran_s >= 3.0 + 4.0
    assert ran_s - ended.suspended_s < 3.0 + 2.0


def test_the_clock_of_stall_s_stands_still_with_the_task(app):
    record = app.suspended(app.begun("Stalls"))
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + 4.0, "more than its stall_s has passed")
    app.resumed(record)
    fence = app.begun("at_the_gate")
    app.open_gate(fence)
    app.wait(fence.id)
    app.open_gate(record)
    assert app.service.result(app.wait(record.id).id) == "got on"


def test_a_waiting_body_can_be_suspended_and_goes_on_with_what_it_waited_for(app):
    other = app.begun("at_the_gate")
    waiter = app.begun("waits", id=other.id)
    wait_until(lambda: app.service.get(waiter.id).slot is None, "it waits without a slot")
    app.suspended(waiter)
    app.open_gate(other)
    app.wait(other.id)
    assert app.service.get(waiter.id).status == "START"
    app.service.resume(waiter.id)
    assert app.service.result(app.wait(waiter.id).id) == "opened"


def test_stop_kill_ends_a_suspended_task_as_stopped(tmp_path):
    with living(tmp_path, grace_s=0.5) as app:
        app.start()
        record = app.suspended(app.begun("tidies_up"))
        assert app.cli("stop", "--kill").returncode == 0
        ended = app.service.get(record.id)
        assert (ended.status, ended.reason) == ("INTERRUPTED", "STOPPED")
        assert app.log_of(ended).splitlines().count("finally") == 1


def test_a_suspension_that_comes_with_the_end_of_a_body_leaves_nobody_standing_still(app):
    records = [app.begun("at_the_gate") for _ in range(10)]
    for record in records:
        app.open_gate(record)
        with contextlib.suppress(NotSuspendable):
            app.service.suspend(record.id)
    for record in records:
        app.service.resume(record.id)
    for record in records:
        ended = app.wait(record.id)
        assert (ended.status, ended.suspended_at, ended.suspend_requested_at) == ("DONE", None, None)
        wait_until(lambda pid=record.pid: not psutil.pid_exists(pid), "its process has left")


# ---- supervisors that come and go ----


def test_without_a_supervisor_the_next_one_suspends_and_the_command_says_so(tmp_path):
    with living(tmp_path) as app:
        app.start().kill()
        app.start()
        record = app.begun("at_the_gate")
        app.supervisors[-1].kill()
        told = app.cli("suspend", str(record.id), "--by", "jana")
        assert told.returncode == 0
        assert "start one with `bgsupervisor run`, which then suspends it" in told.stderr
        assert "suspend requested by jana" in app.cli("ps").stdout
        assert "suspend requested by jana; " in app.cli("why", str(record.id)).stdout
        assert not app.is_still(record)
        app.start(wait=False)
        wait_until(lambda: app.is_still(record), "the next supervisor has stopped it")
        wait_until(lambda: app.service.get(record.id).suspended_at, "its row says so")
        app.supervisors[-1].kill()
        told = app.cli("resume", str(record.id))
        assert "start one with `bgsupervisor run`, which then resumes it" in told.stderr
        assert app.is_still(record)
        app.start(wait=False)
        wait_until(lambda: not app.is_still(record), "the next supervisor lets it go on")
        app.open_gate(record)
        assert app.service.result(app.wait(record.id).id) == "opened"


@pytest.mark.on_both
def test_a_task_stays_suspended_over_the_death_of_its_supervisor_and_no_limit_runs(tmp_path):
    with living(tmp_path, grace_s=0.5) as app:
        supervisor = app.start()
        record = app.suspended(app.begun("Limited"))
        since_mono = record.suspended_mono
        supervisor.kill()
        app.start()
        began = time.monotonic()
        wait_until(lambda: time.monotonic() > began + 3.5, "its timeout_s has passed")
        kept = app.service.get(record.id)
        assert (kept.status, kept.suspended_at, kept.suspended_mono) == ("START", record.suspended_at, since_mono)
        assert app.is_still(record)
        assert app.resumed(record).suspended_s >= 3.5
        ended = app.wait(record.id)
        assert "ran past its timeout_s of 3 s" in ended.detail


def test_what_a_dead_supervisor_had_recorded_and_not_done_the_next_one_does(tmp_path):
    with living(tmp_path) as app:
        supervisor = app.start()
        record = app.begun("at_the_gate")
        supervisor.kill()
        app.database.rows(
            "UPDATE bgsupervisor_task SET suspend_requested_at = run_at, suspended_at = run_at, suspended_mono = ?",
            time.monotonic(),
        )
        app.start(wait=False)
        wait_until(lambda: app.is_still(record), "it is stopped, as its row says")
        assert app.service.get(record.id).suspended_at == record.run_at
        app.resumed(record)
        app.open_gate(record)
        app.wait(record.id)


def test_a_suspended_task_whose_cancel_was_asked_without_a_supervisor_is_ended_by_the_next_one(tmp_path):
    with living(tmp_path, grace_s=0.5) as app:
        supervisor = app.start()
        record = app.suspended(app.begun("tidies_up"))
        supervisor.kill()
        app.service.cancel(record.id, by="petr")
        app.start(wait=False)
        ended = app.wait(record.id)
        assert (ended.reason, ended.signal) == ("CANCELLED", None)
        assert app.log_of(ended).splitlines().count("finally") == 1


def test_a_task_suspended_in_another_pid_namespace_is_not_lost_for_its_silence(tmp_path):
    with living(tmp_path, heartbeat_s=0.2, lease_s=1) as app:
        supervisor = app.start()
        records = [app.suspended(app.begun("at_the_gate")) for _ in range(2)]
        supervisor.kill()
        app.database.rows("UPDATE bgsupervisor_task SET pid_ns = 7")
        for record in records:
            os.kill(record.pid, signal.SIGKILL)
        wait_until(
            lambda: (SystemClock().now() - app.service.get(records[1].id).heartbeat_at).total_seconds() > 2.0,
            "they have been silent past their lease",
        )
        app.start()
        fence = app.begun("at_the_gate")
        app.open_gate(fence)
        app.wait(fence.id)
        assert [app.service.get(record.id).status for record in records] == ["START", "START"]
        app.service.resume(records[0].id)
        app.service.cancel(records[1].id)
        assert [app.wait(record.id).reason for record in records] == ["HOST_LOST", "HOST_LOST"]
