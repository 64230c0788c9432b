"""Guards that no other test would miss: each of these fails when its guard is removed (`make torture-mutants`)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support.app import LIMIT_S, wait_until

from bgsupervisor.clock import AttendedClock, SystemClock
from bgsupervisor.ipc.channel import Channel
from bgsupervisor.ipc.messages import (
    Ack,
    AttemptResult,
    Beat,
    Exited,
    ExitsSeen,
    Kill,
    Leave,
    ProcessRef,
    ResultReport,
    Retire,
    Run,
    SlotGranted,
    WantSlot,
)
from bgsupervisor.ipc.sockets import bind
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.statuses import Reason
from bgsupervisor.supervisor import postmortem
from bgsupervisor.supervisor.children import ChildHandle, Children
from bgsupervisor.supervisor.events import EventSources, Peer
from bgsupervisor.supervisor.forkservers import ForkServers
from bgsupervisor.supervisor.inbox import Inbox
from bgsupervisor.supervisor.loop import Supervisor
from bgsupervisor.supervisor.scheduling import Scheduler
from bgsupervisor.supervisor.suspension import Suspensions
from bgsupervisor.supervisor.termination import Stage, Termination, Terminations
from bgsupervisor.system import processes
from bgsupervisor.system.files import open_dir
from bgsupervisor.system.processes import Exit, Verdict
from bgsupervisor.worker.connection import Connection

pytestmark = pytest.mark.any_database

SOURCE = """
import os, signal, time
from pathlib import Path
from bgsupervisor import Service, current, task
from bgsupervisor.worker import child

HERE = Path(__file__).parent

@task
def returns(value: object = None) -> object:
    return value

@task
def ends_at_the_gate(value: int) -> int:
    (HERE / "ready").touch()
    while not (HERE / "latch").exists():
        time.sleep(0.01)
    (HERE / "ending").touch()
    return value

@task
def looks_at_its_row_when_sigterm_comes() -> str:
    seen = []
    def look(number, frame):
        seen.append(Service(config=HERE / "bgsupervisor.toml").get(current().id).ending)
    signal.signal(signal.SIGTERM, look)
    (HERE / "ready").touch()
    while not seen:
        time.sleep(0.01)
    return seen[0]

@task
def ignores_everything() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (HERE / "ready").touch()
    time.sleep(60)

@task
def returns_on_both_sides_of_a_fork() -> str:
    child.ACK_WAIT_S = 0.3  # the copy would record its end by itself so soon
    if os.fork() == 0:
        return "copy"
    _, status = os.wait()
    return f"original, the copy left with {os.waitstatus_to_exitcode(status)}"

@task
def tells_what_a_copy_of_it_has_open() -> list[str]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        found = []
        for number in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                pass  # that of the listing
        os.write(writer, "\\n".join(one for one in found if one.startswith("socket:")).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    return os.read(reader, 10_000).decode().split()
"""


@pytest.fixture
def app(make_app):
    return make_app(SOURCE, grace_s=0.3, spares=1)


def exists(app, name):
    return wait_until((app.folder / name).exists, f"the body says {name}")


def living_child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    return process, processes.identity_of(process.pid, "here")


# ---- how a death is told ----


def test_without_an_exit_nobody_is_called_vanished_before_a_second_look():
    process, identity = living_child()
    try:
        child = ChildHandle(identity, None, dead_since=10.0)
        assert postmortem.exit_of(child, None, now=20.0, wait_s=0.5, inherited=False) is None
        assert child.dead_since == 20.0
    finally:
        process.kill()
        process.wait()
    assert postmortem.exit_of(child, None, now=20.6, wait_s=0.5, inherited=False) == Exit(None, None)


def test_the_fork_servers_word_is_waited_for_before_other_evidence():
    process, identity = living_child()
    process.kill()
    process.wait()
    child = ChildHandle(identity, None, dead_since=10.0)
    assert postmortem.exit_of(child, None, now=10.4, wait_s=0.5, inherited=False) is None
    assert postmortem.exit_of(child, None, now=10.6, wait_s=0.5, inherited=False) == Exit(None, None)


def test_a_fork_server_that_dies_before_its_hello_is_not_waited_for_any_more(make_app):
    app = make_app(SOURCE)
    state_dir = StateDir(app.state_dir)
    state_dir.create()
    process, identity = living_child()
    state_dir.fork_server_path(identity.pid, identity.start_ticks).touch()
    clock = SystemClock()
    sources = EventSources(state_dir, clock)
    try:
        found = ForkServers(app.service.config, state_dir, processes.own_identity("here"), sources, clock)
        assert found.awaited()  # noqa: PGH005 - no mock
    finally:
        process.kill()
        process.wait()
    assert not found.awaited()
    sources.close()


def test_a_child_that_cannot_be_judged_is_not_taken_for_dead(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "open_process", lambda _: (Verdict.UNKNOWN, None))
    children = Children(None, tmp_path, SystemClock())
    assert children.meet(processes.own_identity("here")).dead_since is None


def test_all_that_a_dead_child_has_written_is_read(tmp_path):
    state_dir = StateDir(tmp_path / "state")
    state_dir.create()
    sources = EventSources(state_dir, SystemClock())
    ours, theirs = socket.socketpair()
    child = Channel(theirs)
    said = ResultReport(1, 1, AttemptResult(result='"' + "x" * 50_000 + '"'))
    child.send(said)
    assert not child.unsent_bytes
    child.close()
    assert sources.last_messages(Peer(Channel(ours), os.getpid(), 0.0)) == [said]
    sources.close()


# ---- commits come first ----


@pytest.mark.on_both
def test_an_end_is_not_acknowledged_before_it_is_committed(app):
    supervisor = app.start()
    handle = app.service.request("appx:ends_at_the_gate", {"value": 7})
    exists(app, "ready")
    running = app.started(handle)
    child = processes.identity_of(running.pid, "here")
    with app.database.locked():
        (app.folder / "latch").touch()
        exists(app, "ending")
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert processes.verdict(child) is Verdict.ALIVE, "the child has left, and its end is written nowhere"
            time.sleep(0.02)
        supervisor.kill()
    app.start()
    record = app.wait(handle)
    assert (record.status, record.result, record.attempt) == ("DONE", "7", 1)


@pytest.mark.on_both
def test_no_signal_is_sent_before_its_reason_is_in_the_row(app):
    app.start()
    handle = app.service.request("appx:looks_at_its_row_when_sigterm_comes", {})
    exists(app, "ready")
    app.service.cancel(handle, by="jana")
    record = app.wait(handle)
    assert (record.status, record.result) == ("DONE", '"CANCELLED"')


def test_a_stop_that_an_earlier_supervisor_had_begun_is_carried_to_its_end(app):
    first = app.start()
    handle = app.service.request("appx:ignores_everything", {})
    exists(app, "ready")
    first.process.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again ends them" in first.log, "the first Ctrl-C was heard")
    first.process.send_signal(signal.SIGINT)
    wait_until(lambda: app.service.get(handle).ending, "the ending is in the row")
    first.kill()
    app.start()
    record = app.wait(handle)
    assert (record.status, record.reason, record.signal) == ("INTERRUPTED", "STOPPED", signal.SIGKILL)


# ---- who speaks for whom ----


def test_an_order_that_came_before_the_connection_broke_is_taken(tmp_path):
    ours, theirs = socket.socketpair()
    ref = ProcessRef(1, 1)
    connection = Connection(tmp_path, ref, ref, heartbeat_s=1.0, clock=SystemClock())
    connection._channel = Channel(ours)
    supervisor = Channel(theirs)
    order = Run(id=1, attempt=1, name="appx:returns", data="{}")
    supervisor.send(order)
    supervisor.close()
    connection.send(Beat(1, 1))
    assert (connection.mailbox.disconnected.is_set(), ours.fileno()) == (True, -1)
    assert connection.mailbox.assignments.get_nowait() == order


def test_a_copy_that_a_body_forked_leaves_at_once_and_records_no_end(app):
    app.start()
    record = app.wait(app.service.request("appx:returns_on_both_sides_of_a_fork", {}))
    assert (record.status, record.result, record.attempt) == ("DONE", '"original, the copy left with 0"', 1)


def test_a_process_that_a_body_forked_does_not_keep_its_connection(app):
    app.start()
    record = app.wait(app.service.request("appx:tells_what_a_copy_of_it_has_open", {}))
    assert (record.status, record.result) == ("DONE", "[]")


@pytest.mark.on_both
def test_a_supervisor_whose_lock_file_was_deleted_leaves_and_its_bodies_go_on(app):
    first = app.start()
    handle = app.service.request("appx:ends_at_the_gate", {"value": 7})
    exists(app, "ready")
    (app.state_dir / "supervisor.lock").unlink()
    second = app.start(wait=False)
    wait_until(lambda: first.process.poll() is not None, "the first supervisor has left")
    assert (first.process.returncode, second.process.poll()) == (0, None)
    (app.folder / "latch").touch()
    record = app.wait(handle)
    assert (record.status, record.result, record.attempt) == ("DONE", "7", 1)
    wait_until(lambda: app.supervisor_row(second.process.pid), "the second supervises")
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(15) == 0


@pytest.mark.on_both
def test_a_supervisor_whose_lock_was_replaced_claims_nothing_more(app):
    supervisor = app.start()
    app.wait(app.service.request("appx:returns"))
    app.stand_still(supervisor)
    (app.state_dir / "supervisor.lock").unlink()
    handle = app.service.request("appx:returns")
    supervisor.process.send_signal(signal.SIGCONT)
    assert supervisor.process.wait(LIMIT_S) == 0
    record = app.service.get(handle)
    assert (record.status, record.attempt) == ("REQUEST", 0)


def supervisor_with(**parts):
    """Return a supervisor that has these parts alone."""
    made = object.__new__(Supervisor)
    for name, part in parts.items():
        setattr(made, f"_{name}", part)
    return made


@pytest.mark.parametrize("done_once", [False, True])
def test_nothing_is_admitted_before_all_rows_were_looked_at(done_once):
    fork_server = SimpleNamespace(hello=SimpleNamespace(ref=ProcessRef(1, 1), catalogue={}))
    asked = []
    scheduler = Scheduler(
        SimpleNamespace(slots=1, spares=0),
        ledger=SimpleNamespace(due=lambda *_, **named: asked.append(named["limit"]) or []),
        children=Children(None, None, SystemClock()),
        fork_servers=SimpleNamespace(ours=lambda: fork_server),
        recovery=SimpleNamespace(done_once=done_once, foreign_slots=set()),
        terminations=None,
        shutdown=SimpleNamespace(stays=True),
        backoff=SimpleNamespace(until=0.0),
        sources=None,
        clock=AttendedClock(SystemClock(), longest_s=2.0),
    )
    scheduler.admit()
    assert bool(asked) == done_once, "before, it is not known which slots are taken"


@pytest.mark.parametrize("done_once", [False, True])
def test_no_exit_is_acknowledged_before_all_rows_were_looked_at(done_once):
    exited = Exited(ref=ProcessRef(1, 1), exit_code=3, signal=None, ordered=None)
    told = []
    supervisor = supervisor_with(
        notifier=SimpleNamespace(stopping=lambda _: None),
        shutdown=SimpleNamespace(leaving="it was told to"),
        children=Children(None, None, SystemClock()),
        recovery=SimpleNamespace(done_once=done_once),
        fork_servers=SimpleNamespace(
            exits={exited.ref: exited},
            acknowledge=lambda refs: told.append(ExitsSeen(refs)),
            tell_all=told.append,
        ),
        wait_manager=SimpleNamespace(leave=lambda: None),
        presence=SimpleNamespace(is_worth_a_row=lambda: False),
        store=SimpleNamespace(close=lambda: None),
        sources=SimpleNamespace(close=lambda: None),
    )
    supervisor._leave()
    assert told == [*([ExitsSeen([exited.ref])] if done_once else []), Retire()], "a row may depend on it"


def test_an_end_that_was_superseded_is_acknowledged():
    sent = []
    inbox = Inbox(
        **dict.fromkeys(("children", "fork_servers", "recovery", "terminations", "scheduler", "presence", "clock")),
        wait_manager=SimpleNamespace(take=None),
        sources=SimpleNamespace(send=lambda peer, message: sent.append((peer, message))),
        reload=None,
    )
    peer = SimpleNamespace(ref=None)
    child = ChildHandle(processes.own_identity("test"), None, peer=peer, attempt=Attempt(7, 2))
    inbox.on_result(child, ResultReport(7, 1, AttemptResult(result="1")))
    assert (child.end, sent) == (None, [(peer, Ack(7, 1))])
    inbox.on_result(child, ResultReport(7, 2, AttemptResult(result="2")))
    assert (child.end, len(sent)) == (AttemptResult(result="2"), 1), "that of its own attempt is, once it is recorded"


def test_a_child_that_is_to_leave_dials_no_supervisor(tmp_path):
    folder = StateDir(tmp_path / "state")
    folder.create()
    ref = ProcessRef(1, 1)
    directory = open_dir(folder.path)
    with bind(directory, "control.sock", socket.SOCK_STREAM, 0o600):
        for is_to_leave in (True, False):
            connection = Connection(folder.path, ref, ref, heartbeat_s=1.0, clock=SystemClock())
            if is_to_leave:
                connection._take(Leave())
            connection._dial()
            assert (connection._channel is None) == is_to_leave, "it would say that it is idle, and be given a task"
            connection.drop()
    os.close(directory)


def test_a_slot_that_was_granted_for_an_earlier_wait_is_not_taken(tmp_path):
    ref = ProcessRef(1, 1)
    connection = Connection(tmp_path, ref, ref, heartbeat_s=1.0, clock=SystemClock())
    connection._take(Run(id=1, attempt=1, name="appx:returns", data="{}"))
    connection.mailbox.wanted = WantSlot(1, 1, 2)
    connection._take(SlotGranted(1, 1, 1))
    assert not connection.mailbox.slot_granted.is_set(), "it has taken that one itself, and waits anew"
    connection._take(SlotGranted(1, 1, 2))
    assert connection.mailbox.slot_granted.is_set()
    connection.mailbox.slot_granted.clear()
    connection.mailbox.wanted = WantSlot(1, 1, 3)
    connection.mailbox.wanted = None
    connection._take(SlotGranted(1, 1, 3))
    assert not connection.mailbox.slot_granted.is_set()


def test_who_cannot_be_held_is_signalled_by_its_fork_server_once_in_each_stage():
    sent = []
    fork_server = SimpleNamespace(peer=SimpleNamespace(channel=SimpleNamespace(closed=False)))
    enforcement = Terminations(
        config=None,
        children=[],
        fork_servers=SimpleNamespace(get=lambda _: fork_server),
        sources=SimpleNamespace(send=lambda _, message: sent.append(message)),
        clock=SystemClock(),
    )
    child = ChildHandle(processes.own_identity("test"), None)
    for stage, number in ((Stage.TERM, signal.SIGTERM), (Stage.KILL, signal.SIGKILL)):
        order = Termination(Reason.CANCELLED, "cancelled", None, 0.0, stage=stage, unsent=True)
        enforcement.carry_out(child, order)
        assert not order.unsent, "else it is written again in every pass"
        assert sent.pop() == Kill(child.ref, number, Reason.CANCELLED)


def test_who_cannot_be_held_is_not_said_to_stand_still():
    class Held(list):
        def running(self):
            return []

    clock = AttendedClock(SystemClock(), longest_s=2.0)
    child = ChildHandle(processes.own_identity("test"), None, vouched=True, to_be_suspended=True)
    Suspensions(Held([child]), clock).enforce()
    assert not child.suspension.lasts
    assert not child.suspension_unsaved
    _, child.handle = processes.open_process(child.identity)
    with child.handle:
        Suspensions(Held([child]), clock).enforce()
    assert child.suspension.lasts
    assert child.suspension_unsaved
