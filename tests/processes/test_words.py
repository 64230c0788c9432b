"""Words about processes that must be true: which one is unresponsive, stopped, or is waited for; and which must end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.app import LIMIT_S, wait_until
from support.pace import allowed_s

from bgsupervisor.catalogue import SUPERVISOR_SILENT_S
from bgsupervisor.cli.dev import linux as development
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import DatabaseError
from bgsupervisor.ipc.messages import ProcessRef, Run
from bgsupervisor.supervisor.children import ChildHandle
from bgsupervisor.supervisor.presence import BEAT_EVERY_S
from bgsupervisor.supervisor.shutdown import Shutdown
from bgsupervisor.system import process_tree, processes
from bgsupervisor.system.processes import Verdict
from bgsupervisor.worker import recording
from bgsupervisor.worker.connection import Connection

SOURCE = """
import atexit, ctypes, pathlib, time
from bgsupervisor import Cancelled, current, task

@task
def until(name: str) -> None:
    while not pathlib.Path(name).exists():
        time.sleep(0.01)

@task
def keeps_the_interpreter_at_its_exit(name: str) -> None:
    atexit.register(ctypes.PyDLL(None).sleep, 600)
    until(name)

@task
def waits_and_ignores_its_cancel(id: int) -> None:
    try:
        current().wait_for(id)
    except Cancelled:
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
"""
HANGS = """
import os, pathlib, time

pathlib.Path(__file__).with_name("loading.new").write_text(str(os.getpid()))
pathlib.Path(__file__).with_name("loading.new").rename(pathlib.Path(__file__).with_name("loading"))
time.sleep(600)
"""
HEARTBEAT_S = 0.3
LOCKED_S = 4.0
"""More than four times what a child may be silent."""


@pytest.fixture
def app(make_app):
    return make_app(SOURCE, slots=2, heartbeat_s=HEARTBEAT_S, busy_timeout_s=0.5)


@contextlib.contextmanager
def standing_still(pid):
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def unresponsive(app):
    """Return the ids that `ps` calls unresponsive."""
    return [row["id"] for row in json.loads(app.cli("ps", "--json").stdout) if row["unresponsive"]]


# ---- which body is silent ----


@pytest.mark.on_both
def test_no_body_is_unresponsive_because_the_database_is_locked(app):
    app.start()
    record = app.started(app.service.request("appx:until", {"name": "never"}))
    with app.database.locked():
        began = time.monotonic()
        wait_until(lambda: time.monotonic() - began > LOCKED_S, "its heartbeats are not written for long")
        told = app.cli("ps")
        assert "unresponsive" not in told.stdout
        assert "is locked" in told.stderr
        assert unresponsive(app) == []
        assert "unresponsive=0;" in app.cli("health").stdout
        assert re.search(r"running for .*, last heard \d+ s ago", app.cli("why", str(record.id)).stdout)
    with standing_still(record.pid):
        wait_until(lambda: unresponsive(app) == [record.id], "the silent one is named once the database is free")


def test_a_silent_body_is_unresponsive_beside_one_that_beats(app):
    app.start()
    beats, silent = (app.started(app.service.request("appx:until", {"name": "never"})) for _ in range(2))
    with standing_still(silent.pid):
        wait_until(lambda: unresponsive(app) == [silent.id], "the silent one is named")
        told = app.cli("ps").stdout
    assert len(re.findall(r"unresponsive", told)) == 1
    wait_until(lambda: unresponsive(app) == [], "it beats again")
    assert beats.id != silent.id


def test_a_silent_body_is_unresponsive_in_time_though_nothing_else_is_written(app):
    app.start()
    record = app.started(app.service.request("appx:until", {"name": "never"}))
    with standing_still(record.pid):
        began = time.monotonic()
        wait_until(lambda: unresponsive(app), "the silent one is named")
        assert time.monotonic() - began < allowed_s(10.0), "the supervisor's own row was renewed too late"


# ---- which supervisor cannot write ----


def stop_and_age(app, supervisor, row_age_s, lock_age_s):
    """Have it look as if a supervisor had been stopped for long: age its row and its lock file."""
    old = time.time() - lock_age_s
    os.utime(app.state_dir / "supervisor.lock", (old, old))
    store = app.service.ledger.store
    heartbeat_at = app.service.ledger.clock.now() - timedelta(seconds=row_age_s)
    with store.writing():
        store.tables.Supervisor.update(heartbeat_at=heartbeat_at).execute()
    assert supervisor.process.poll() is None


@pytest.mark.on_both
@pytest.mark.parametrize(("age_s", "code"), [(SUPERVISOR_SILENT_S + 5, 1), (200.0, 2)])
def test_a_stopped_supervisor_is_not_said_to_be_unable_to_write(app, age_s, code):
    supervisor = app.start()
    pid = supervisor.process.pid
    app.stand_still(supervisor)
    try:
        stop_and_age(app, supervisor, age_s, age_s)
        told = app.cli("health")
        assert told.returncode == code, told.stdout
        sentence = rf"the supervisor, PID {pid}, has been stopped since .*; `kill -CONT {pid}` resumes it"
        assert re.search(sentence, told.stdout)
        assert told.stdout.count("has been stopped") == 1
        assert "has not written" not in told.stdout
        assert "no supervisor has been seen" not in app.cli("ps").stderr
    finally:
        supervisor.process.send_signal(signal.SIGCONT)
    wait_until(lambda: app.cli("health").returncode == 0, "all is well again", BEAT_EVERY_S + LIMIT_S)


def test_a_supervisor_that_cannot_write_is_not_said_to_stand_still(app):
    supervisor = app.start()
    stop_and_age(app, supervisor, SUPERVISOR_SILENT_S + 5, 0)
    with app.database.locked():
        told = app.cli("health").stdout
    assert "is alive but has not written" in told
    assert "has been stopped since" not in told


# ---- what a stop waits for ----


@pytest.mark.on_both
def test_stop_kill_waits_for_the_end_of_a_task_without_a_slot(app):
    supervisor = app.start()
    later = app.service.request("appx:until", {"name": "never"}, delay_s=600)
    waiting = app.service.request("appx:waits_and_ignores_its_cancel", {"id": later.id})
    wait_until(lambda: app.started(waiting).slot is None, "its slot is given to others")

    done = app.cli("stop", "--kill")

    record = app.service.get(waiting)
    assert (record.status, record.reason) == ("INTERRUPTED", "STOPPED"), done.stdout
    assert done.stdout == "supervisor stopped; `bgsupervisor start` allows it again\n"
    assert supervisor.process.poll() == 0


def test_a_task_that_is_found_after_stop_kill_was_heard_is_ended_too():
    begun, running = [], []
    shutdown = Shutdown(
        config=None,
        state_dir=None,
        lock=None,
        children=SimpleNamespace(running=lambda: running),
        terminations=SimpleNamespace(begin=lambda child, reason, _: begun.append((child, reason))),
    )
    shutdown.begin("kill", "stopped by jana")
    found = ChildHandle(processes.own_identity("here"), None)
    running.append(found)
    shutdown.end_running()
    assert begun == [(found, "STOPPED")]


def test_stop_drain_names_what_it_waits_for_and_what_is_suspended(app):
    supervisor = app.start()
    running, still = (app.started(app.service.request("appx:until", {"name": "end"})) for _ in range(2))
    app.service.suspend(still.id, by="jana")
    wait_until(lambda: app.service.get(still.id).suspended_at, "it is stopped")

    told = app.cli("stop", "--drain", "--timeout-s", "1.5")

    assert told.returncode == 1
    names = f"{running.id} (appx:until), {still.id} (appx:until)"
    assert told.stderr.count(f"still running: {names}; `bgsupervisor stop --kill` ends them") == 2, told.stderr
    sentence = f"suspended, so it cannot end: {still.id} (appx:until); `bgsupervisor resume {still.id}` continues it"
    assert told.stderr.count(sentence) == 2
    assert f"waiting for suspended tasks until they are resumed or cancelled: {still.id}" in supervisor.log
    (app.folder / "end").touch()
    app.service.resume(still.id)
    assert app.cli("stop", "--drain").returncode == 0


# ---- who must not live on for nobody ----


def identity(pid):
    return processes.identity_of(pid, "here")


def is_gone(one):
    return processes.verdict(one) is Verdict.DEAD


def kill(one):
    _, handle = processes.open_process(one)
    if handle is not None:
        with handle:
            handle.send_signal(signal.SIGKILL)


@pytest.fixture
def loading(app):
    """Have the application hang at its import; return the process that loads it, once it does."""
    app.write(HANGS)
    found = []

    def wait():
        path = app.folder / "loading"
        found.append(identity(int(wait_until(lambda: path.exists() and path.read_text(), "something loads it"))))
        return found[-1]

    yield wait
    for one in found:
        kill(one)


def test_a_fork_server_that_hangs_at_the_import_dies_with_its_supervisor(app, loading):
    supervisor = app.start(wait=False)
    loads = loading()
    supervisor.kill()
    wait_until(lambda: is_gone(loads), "the fork server has gone")


def test_what_check_loads_dies_with_check(app, loading):
    check = subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), "check"],
        env=app.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        loads = loading()
        assert loads.pid != check.pid
    finally:
        check.kill()
        check.wait(LIMIT_S)
    wait_until(lambda: is_gone(loads), "the process that loads has gone")


@pytest.mark.of_sqlite
def test_what_dev_loads_elsewhere_dies_with_dev(app, loading):
    environment = {"PYTHONPATH": str(Path(__file__).parents[1] / "support" / "elsewhere"), "ELSEWHERE": "darwin"}
    dev = subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), "dev"],
        env=app.environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    started = []
    try:
        loading()
        wait_until(lambda: started.extend(process_tree.children(dev.pid)) or len(started) > 1, "it has started all")
        started = [identity(pid) for pid in started]
    finally:
        dev.kill()
        dev.wait(LIMIT_S)
    try:
        wait_until(lambda: all(map(is_gone, started)), "its children have gone")
    finally:
        for one in started:
            kill(one)


def test_dev_kills_a_supervisor_that_does_not_leave(monkeypatch):
    monkeypatch.setattr(development, "END_S", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        dev = object.__new__(development.Development)
        dev._clock, dev._print_new = SystemClock(), lambda _: None
        dev._config, dev._interrupts = SimpleNamespace(grace_s=0.1), SimpleNamespace(count=1)
        dev._end(process, SimpleNamespace(running=list))
        assert process.returncode == -signal.SIGKILL


def test_a_child_whose_exit_callback_keeps_the_interpreter_leaves(app):
    supervisor = app.start()
    record = app.started(app.service.request("appx:keeps_the_interpreter_at_its_exit", {"name": "end"}))
    child = identity(record.pid)
    supervisor.kill()  # which would end it
    (app.folder / "end").touch()
    try:
        assert app.wait(record.id).status == "DONE"
        wait_until(lambda: is_gone(child), "the child has gone")
    finally:
        kill(child)


def test_a_connection_that_fails_lets_nobody_wait_for_it(tmp_path, monkeypatch):
    ref = ProcessRef(1, 1)
    connection = Connection(tmp_path, ref, ref, heartbeat_s=1.0, clock=SystemClock())
    monkeypatch.setattr(connection, "_serve_once", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        connection.run()
    assert connection.mailbox.disconnected.is_set()
    assert connection.mailbox.assignments.get_nowait() is None


def test_a_heartbeat_that_cannot_be_written_ends_no_connection(monkeypatch):
    def raises(_, **__):
        raise DatabaseError("the folder is gone")

    monkeypatch.setattr(recording.Recorder, "_ledger", raises)
    order = Run(id=1, attempt=1, name="appx:until", data="{}")
    assert object.__new__(recording.Recorder).beat(order) is None


def test_a_wait_manager_whose_thread_fails_ends():
    code = """
import threading, time
from bgsupervisor.worker import wait_manager
from bgsupervisor.clock import SystemClock

caretaker = object.__new__(wait_manager._Caretaker)
caretaker._clock, caretaker._channel, caretaker._used_at = SystemClock(), None, SystemClock().monotonic()
caretaker._dial = lambda: 1 / 0
threading.Thread(target=caretaker.run, daemon=True).start()
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr
