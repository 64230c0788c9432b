"""Whatever goes wrong in a pass, the loop goes on."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import msgspec
import pytest
from conftest import wait_until

from bgsupervisor import Status, processes
from bgsupervisor.clock import SystemClock
from bgsupervisor.nurseries import CHILD_HELLO_S, FORK_S, Home, Nurseries
from bgsupervisor.reception import Peer, Reception
from bgsupervisor.statedir import StateDir
from bgsupervisor.wire import Channel, NurseryHello, Progress, Spawn, Who

SOURCE = """
import os, time
from bgsupervisor import Task, task, current

@task
def hello() -> str:
    print("hello")
    return "hello"

@task
def stubborn(seconds: float = 4):
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.05)
    raise ValueError("of its own")

@task
def dies():
    os.kill(os.getpid(), 9)

@task
def slow(seconds: float = 30):
    time.sleep(seconds)

@task
def speaks():
    current().progress(0, 10)
    current().progress(message="loading")
    time.sleep(30)
"""


@pytest.fixture
def app(make_app):
    return make_app(SOURCE)


def by_hand(app, statement, *values):
    return app.database.rows(statement, *values)


def done(app):
    return app.wait(app.service.request("appx:hello")).status is Status.DONE


@pytest.mark.of_sqlite  # PostgreSQL takes no such text
def test_a_text_that_is_no_utf8_stops_nobody(app):
    supervising = app.start()
    by_hand(app, "INSERT INTO bgsupervisor_task (name, data) VALUES ('appx:hello', CAST(x'7bff7d' AS TEXT))")
    by_hand(app, "INSERT INTO bgsupervisor_task (name, key) VALUES ('appx:hello', CAST(x'ff' AS TEXT))")

    assert done(app)
    assert app.wait(1).status is Status.INTERRUPTED
    assert app.wait(2).status is Status.DONE
    assert supervising.process.poll() is None


@pytest.mark.of_sqlite  # whose columns take any type, if nothing keeps them from it
@pytest.mark.parametrize("columns", ["(name) VALUES (x'ff')", "(name, data) VALUES ('a', x'ff')"])
def test_the_database_refuses_what_is_no_text(app, columns):
    app.start()

    with pytest.raises(sqlite3.IntegrityError):
        by_hand(app, f"INSERT INTO bgsupervisor_task {columns}")


def test_words_of_a_later_version_stop_nobody(app):
    supervising = app.start()
    running = app.service.request("appx:slow")
    app.started(running)
    by_hand(app, "UPDATE bgsupervisor_task SET ending = 'SOMETHING_NEW' WHERE id = ?", running.id)

    assert done(app)
    assert app.service.get(running).ending is None
    assert supervising.process.poll() is None


def test_a_folder_of_logs_that_was_removed_uses_up_no_task(app):
    app.start()
    shutil.rmtree(app.state_dir / "logs")

    assert done(app)
    wait_until((app.state_dir / "logs").is_dir, "the folder is there again")
    handle = app.service.request("appx:hello")
    assert app.log_of(app.wait(handle)) == "hello\n"


def test_draining_without_a_nursery_rests(app):
    supervising = app.start()
    running = app.service.request("appx:slow", {"seconds": 4})
    app.started(running)
    app.cli("stop", "--drain", "--timeout-s", "0")
    (record,) = app.state_dir.glob("nursery-*-*")
    os.kill(int(record.name.split("-")[1]), signal.SIGKILL)
    wait_until(lambda: "the nursery died" in supervising.log, "the nursery's death is seen")
    before = processes.tree_usage([supervising.process.pid])[supervising.process.pid].cpu_s

    app.wait(running)

    assert _cpu_s(supervising) - before < 1.0, "a spin would have used some seconds"


def _cpu_s(supervising):
    found = processes.tree_usage([supervising.process.pid]).get(supervising.process.pid)
    return 0.0 if found is None else found.cpu_s


def test_a_socket_that_cannot_be_bound_again_is_tried_again(app):
    supervising = app.start()
    (app.state_dir / "control.sock").unlink()
    (app.state_dir / f".control.sock.{supervising.process.pid}").mkdir()  # what it would bind first

    wait_until(lambda: "cannot bind it" in supervising.log, "the failure is told")
    assert supervising.process.poll() is None
    (app.state_dir / f".control.sock.{supervising.process.pid}").rmdir()
    wait_until((app.state_dir / "control.sock").exists, "it is bound again")


def test_very_many_priorities_cost_next_to_nothing(store):
    from bgsupervisor.ledger import Ledger, Request

    ledger = Ledger(store, SystemClock())
    later = SystemClock().now().replace(year=2200)
    ledger.request_many([Request(name="a", data="{}", priority=number, run_at=later) for number in range(3000)])
    ledger.request_many([Request(name="a", data="{}", priority=number) for number in (-5, -7)])
    asked = []
    store.database.query_hooks.append(lambda event: asked.append(event.sql))

    due = ledger.due(["a"], limit=5)
    ledger.next_due_at()

    assert [one.id for one in due] == [3001, 3002]
    assert len(asked) < 200


def test_what_was_said_in_between_reaches_the_row_with_a_heartbeat(app):
    app.start()
    handle = app.service.request("appx:speaks")
    app.started(handle)

    wait_until(lambda: app.service.get(handle).message == "loading", "the message is in the row")
    assert app.service.get(handle).progress_total == 10


# ---- children and nurseries that hang ----


class LateClock(SystemClock):
    """A clock that can be put forward."""

    ahead_s = 0.0

    def monotonic(self):
        return super().monotonic() + self.ahead_s


@pytest.fixture
def nurseries(tmp_path, make_app):
    app = make_app(SOURCE)
    state_dir = StateDir(app.state_dir)
    state_dir.create()
    clock = LateClock()
    ears = Reception(state_dir, clock)
    found = Nurseries(app.service.config, state_dir, processes.own_identity("test"), ears, clock)
    ours, theirs = socket.socketpair()
    who = Who(1, 1)
    hello = NurseryHello(version=1, who=who, catalogue={}, failures=[], warnings=[], children=[], exits=[])
    found._homes[who] = Home(hello, Peer(Channel(ours), 1, 0.0))
    found.our_who = who
    found.started = []
    found._start = lambda **options: found.started.append(options)
    yield found, clock, Channel(theirs)
    theirs.close()
    ours.close()
    ears.close()


def test_a_child_that_hangs_before_its_hello_is_killed_and_not_counted_any_more(nurseries):
    found, clock, _ = nurseries
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    who = Who(pid, processes.start_ticks(pid))
    found.ours().expected[who] = clock.monotonic()
    found.give_up_on_the_silent()
    assert found.ours().coming == 1

    clock.ahead_s = CHILD_HELLO_S + 1
    found.give_up_on_the_silent()

    assert found.ours().coming == 0
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_a_nursery_that_does_not_fork_any_more_is_replaced(nurseries):
    found, clock, theirs = nurseries
    found.spawn(3)
    assert theirs.receive() == [Spawn(3)]
    found.give_up_on_the_silent()
    assert found.started == []

    clock.ahead_s = FORK_S + 1
    found.give_up_on_the_silent()
    found.give_up_on_the_silent()

    assert len(found.started) == 1


# ---- what breakers found ----


@pytest.mark.parametrize(
    "values",
    [
        {"pid": 99999999999, "start_ticks": 1},
        {"pid": 0, "start_ticks": 1},
        {"pid": -5, "start_ticks": 1},
        {"pid": 2**62, "start_ticks": 2**62},
    ],
)
def test_a_start_row_with_an_impossible_pid_is_vanished_and_stops_nobody(app, values):
    supervising = app.start()
    own = processes.own_identity("test")
    by_hand(
        app,
        "INSERT INTO bgsupervisor_task (name, status, boot_id, pid_ns, pid, start_ticks) "
        "VALUES ('a', 'START', ?, ?, ?, ?)",
        own.boot_id,
        own.pid_ns,
        values["pid"],
        values["start_ticks"],
    )

    record = app.wait(1)

    assert (record.status, record.reason) == ("INTERRUPTED", "VANISHED")
    assert done(app)
    assert supervising.process.poll() is None


def test_a_frame_that_holds_no_text_closes_that_connection_only(app):
    supervising = app.start()
    body = msgspec.msgpack.encode(Progress(id=1, attempt=1, done=None, total=None, message="abc"))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(app.state_dir / "control.sock"))
        peer.sendall(len(body).to_bytes(4, "big") + body.replace(b"abc", b"\xff\xff\xff"))
        peer.settimeout(10)
        assert peer.recv(1) == b""

    assert done(app)
    assert supervising.process.poll() is None


def test_a_process_that_the_supervisor_found_beside_it_is_none_of_its_business(app):
    """As with `web server & exec bgsupervisor run`."""
    command = f"sleep 60 & echo $! > sibling; exec {sys.executable} -m bgsupervisor --config {app.config} run"
    process = subprocess.Popen(["/bin/sh", "-c", command], cwd=app.folder, env=app.environment())
    try:
        wait_until(lambda: app.supervisor_row(process.pid), "the supervisor has loaded the tasks")
        (record,) = app.state_dir.glob("nursery-*-*")
        os.kill(int(record.name.split("-")[1]), signal.SIGKILL)
        wait_until(lambda: len(list(app.state_dir.glob("nursery-*-*"))) >= 1 and done(app), "another nursery is there")
        app.cli("cancel", "1")  # some passes more
        assert processes.start_ticks(int((app.folder / "sibling").read_text())) is not None
    finally:
        process.terminate()
        process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((app.folder / "sibling").read_text()), signal.SIGKILL)


def test_an_ending_that_an_earlier_supervisor_began_comes_true(make_app):
    app = make_app(SOURCE, grace_s=0.3)
    first = app.start()
    handle = app.service.request("appx:stubborn", {"seconds": 30})
    app.started(handle)
    app.service.cancel(handle, by="jana")
    wait_until(lambda: app.service.get(handle).ending, "the ending is in the row")
    first.kill()

    app.start()
    record = app.wait(handle)

    assert (record.reason, record.signal) == ("CANCELLED", signal.SIGKILL)
    assert "jana" in record.detail


def test_a_burst_whose_last_task_was_killed_leaves_no_nursery(app):
    app.service.request("appx:dies")

    app.start("--burst", wait=False).process.wait(20)

    wait_until(lambda: not list(app.state_dir.glob("nursery-*-*")), "the nursery has left")


def test_a_reused_child_that_is_at_its_next_task_when_its_supervisor_changes_goes_on(make_app):
    app = make_app(SOURCE, reuse=50, slots=1, spares=0)
    first = app.start()
    short = app.service.request("appx:slow", {"seconds": 0.6})
    long = app.service.request("appx:slow", {"seconds": 4})
    app.started(short)
    (app.state_dir / "supervisor.lock").unlink()
    second = app.start(wait=False)

    record = app.wait(long, limit_s=30)

    assert (record.status, record.attempt) == ("DONE", 1)
    assert first.process.wait(10) == 0
    assert second.process.poll() is None


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_request_whose_caller_has_closed_the_streams_succeeds_once(app, closed):
    command = f"{sys.executable} -m bgsupervisor --config {app.config} request appx:hello '{{}}' {closed}"

    assert subprocess.run(["/bin/sh", "-c", command], env=app.environment(), timeout=30, check=False).returncode == 0
    assert len(app.service.list()) == 1


def test_a_full_disk_under_the_output_is_a_sentence(app):
    command = f"{sys.executable} -m bgsupervisor --config {app.config} --help > /dev/full"

    said = subprocess.run(
        ["/bin/sh", "-c", command], env=app.environment(), timeout=30, check=False, capture_output=True
    )

    assert said.returncode == 1
    assert b"Traceback" not in said.stderr


@pytest.mark.parametrize("name", ["nursery-\u00b2-1", "nursery-99999999999999-1", "nursery-x-y"])
def test_rubbish_among_the_records_of_nurseries_stops_nobody(app, name):
    app.state_dir.mkdir(mode=0o750)
    (app.state_dir / name).touch()

    app.start()

    assert done(app)
    (app.state_dir / name).unlink(missing_ok=True)


def test_a_stop_mark_that_is_no_file_is_not_waited_for(app):
    app.state_dir.mkdir(mode=0o750)
    os.mkfifo(app.state_dir / "stopped")

    assert app.cli("run").returncode == 0
