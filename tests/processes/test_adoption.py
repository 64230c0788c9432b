"""What runs when a supervisor is killed is the next one's as if nothing had happened; what nobody needs leaves.

Reasons of ends across a change of supervisors are told in test_endings, waiting across it in test_waiting, and what
happens in between on purpose in test_windows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil
import pytest
from support.app import App, pausing_path, processes_marked, wait_until

pytestmark = pytest.mark.any_database

SOURCE = """
import os, time
from pathlib import Path
from bgsupervisor import current, task

def say(what):
    descriptor = os.open("oracle", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{what} {current().id} {time.monotonic()}\\n".encode())
    os.close(descriptor)

def latch(name):
    while not Path(name).exists():
        time.sleep(0.005)

@task
def steps() -> str:
    current().progress(1, 10, "first")
    print("before")
    latch("first")
    current().progress(7, 10, "second")
    print("after")
    latch("second")
    current().progress(9, 10, "last")
    return "result"

@task
def gated(name: str):
    say("in")
    latch(name)
    say("out")

@task
def exits():
    latch("exits")
    os._exit(7)

@task
def waits(id: int):
    current().wait_for(id)
"""
SLOTS = 4


class Adopting(App):
    """An application that sees its processes by a mark in their environment."""

    def start(self, **shorter):
        mark = {"ADOPTING": str(self.folder), "PYTHONPATH": pausing_path()}
        return super().start(environment={**mark, **shorter})

    def request(self, body, **data):
        return self.service.request(f"appx:{body}", data)

    def processes(self):
        return processes_marked("ADOPTING", self.folder)

    def open(self, latch):
        (self.folder / latch).touch()

    def oracle(self):
        path = self.folder / "oracle"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(what, int(id), float(at)) for what, id, at in lines]

    def end(self):
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        super().end()


@pytest.fixture
def app(tmp_path):
    app = Adopting(tmp_path / "app", SOURCE, slots=SLOTS, heartbeat_s=0.5, grace_s=0.5)
    yield app
    app.end()


def test_progress_log_and_heartbeat_go_on_under_the_next_supervisor(app):
    first = app.start()
    handle = app.request("steps")
    wait_until(lambda: app.service.get(handle).message == "first", "its progress is in the row")
    first.kill()
    assert app.cli("log", str(handle.id)).stdout == "before\n"
    app.start()
    beaten_at = app.service.get(handle).heartbeat_at

    app.open("first")

    record = wait_until(lambda: (one := app.service.get(handle)).message == "second" and one, "progress arrives")
    assert (record.progress_done, record.progress_total) == (7, 10)
    assert app.cli("log", str(handle.id)).stdout == "before\nafter\n"
    wait_until(lambda: app.service.get(handle).heartbeat_at > beaten_at, "heartbeats arrive")
    app.open("second")
    assert app.wait(handle).status == "DONE"


@pytest.mark.on_both
def test_a_body_that_ends_without_a_supervisor_records_result_progress_and_usage(app):
    supervisor = app.start()
    handle = app.request("steps")
    wait_until(lambda: app.service.get(handle).message == "first", "its progress is in the row")
    supervisor.kill()

    app.open("first")
    app.open("second")

    record = app.wait(handle)
    assert (record.status, app.service.result(handle)) == ("DONE", "result")
    assert (record.progress_done, record.progress_total, record.message) == (9, 10, "last")
    assert record.cpu_s > 0
    assert record.peak_rss_bytes > 0
    assert record.slot is None
    app.start()
    assert app.wait(app.request("steps")).status == "DONE"
    assert app.service.get(handle) == record


@pytest.mark.on_both
def test_adopted_bodies_keep_their_slots_and_new_ones_only_get_those_that_are_free(app):
    first = app.start()
    old = [app.request("gated", name=f"old-{number}") for number in range(SLOTS - 1)]
    for handle in old:
        app.started(handle)
    new = [app.request("gated", name="new") for _ in range(3)]
    app.started(new[0])
    slots = {handle.id: app.service.get(handle).slot for handle in [*old, new[0]]}
    first.kill()
    app.start()

    app.open("old-0")
    app.wait(old[0])
    app.started(new[1])

    assert {id: app.service.get(id).slot for id in slots if id != old[0].id} == {
        id: slot for id, slot in slots.items() if id != old[0].id
    }
    assert app.service.get(new[2]).status == "REQUEST"
    for latch in ("old-1", "old-2", "new"):
        app.open(latch)
    for handle in [*old, *new]:
        assert app.wait(handle).status == "DONE"
    moments = sorted((at, 1 if what == "in" else -1) for what, _, at in app.oracle())
    inside = [sum(step for _, step in moments[: number + 1]) for number in range(len(moments))]
    assert max(inside) == SLOTS


def test_an_exit_is_kept_by_a_fork_server_that_waits_alone_longer_than_one_that_knows_nothing(app):
    supervisor = app.start(FORKSERVER_LONELY_S="0.3", CONNECTION_LONELY_S="0.3")
    exiting, killed = app.request("exits"), app.request("gated", name="never")
    pids = [app.started(handle).pid for handle in (exiting, killed)]
    [fork_server] = fork_servers(app)
    supervisor.kill()
    app.open("exits")
    os.kill(pids[1], signal.SIGKILL)
    for pid in pids:
        wait_until(lambda one=pid: not psutil.pid_exists(one), "it is gone")
    left_alone_at = time.monotonic()
    wait_until(lambda: time.monotonic() - left_alone_at > 1.0, "three times as long has passed")
    assert psutil.pid_exists(fork_server)

    app.start()

    told = [(record.reason, record.exit_code, record.signal) for record in map(app.wait, (exiting, killed))]
    assert told == [("EXITED", 7, None), ("SIGNALLED", None, signal.SIGKILL)]
    wait_until(lambda: not psutil.pid_exists(fork_server), "it has told all that it knew, and leaves")


def fork_servers(app):
    return [int(path.name.split("-")[1]) for path in app.state_dir.glob("forkserver-*-*")]


def test_idle_children_fork_server_and_wait_manager_leave_when_no_supervisor_comes_but_not_before_the_last_body(app):
    supervisor = app.start(CONNECTION_LONELY_S="0.5", FORKSERVER_LONELY_S="0.5", WAIT_MANAGER_LONELY_S="0.5")
    body = app.request("gated", name="go")
    waiter = app.request("waits", id=body.id)
    app.started(waiter)
    wait_until((app.state_dir / "manager.sock").exists, "there is a wait manager")
    supervisor.kill()
    # Two bodies, fork server, wait manager, and multiprocessing's resource tracker.
    left = wait_until(lambda: len(found := app.processes()) == 5 and found, "the idle children have left")
    left_alone_at = time.monotonic()
    wait_until(lambda: time.monotonic() - left_alone_at > 1.0, "twice as long has passed")
    assert {process.pid for process in app.processes()} == {process.pid for process in left}
    assert {app.service.get(handle).status for handle in (body, waiter)} == {"START"}

    app.open("go")

    assert [app.wait(handle).status for handle in (body, waiter)] == ["DONE", "DONE"]
    wait_until(lambda: not app.processes(), "children, fork server and wait manager have left")
