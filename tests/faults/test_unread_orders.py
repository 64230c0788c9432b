"""What was sent and surely not read: a task whose child died before it read its order has not begun."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from support.app import wait_until

from bgsupervisor.clock import SystemClock
from bgsupervisor.ipc.channel import Channel
from bgsupervisor.ipc.messages import Beat, Cancel, ChildHello, ProcessRef, Run
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.supervisor.children import ChildHandle
from bgsupervisor.supervisor.events import EventSources
from bgsupervisor.supervisor.forkservers import ForkServers
from bgsupervisor.system import process_tree, processes

SOURCE = """
    import os
    from bgsupervisor import task

    @task
    def says_who() -> int:
        with open("began", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return os.getpid()
"""
ORDER = Run(id=1, attempt=1, name="appx:returns", data="{}")


@pytest.fixture
def connection():
    """Make children as their supervisor sees them, each with the child's end of the connection."""
    ends = []

    def make():
        ours, theirs = socket.socketpair()
        ends.extend((ours, theirs))
        child = ChildHandle(processes.own_identity("here"), None)
        child.peer = type("Peer", (), {"channel": Channel(ours)})()
        child.attempt = Attempt(1, 1)
        child.run_place = child.peer.channel.send(ORDER)
        child.run_end = child.peer.channel.queued_bytes
        return child, theirs

    yield make
    for end in ends:
        end.close()


def test_undelivered_of_an_assignment_not_read_whole_is_true(connection):
    for read_bytes in (0, 3):
        child, theirs = connection()
        theirs.recv(read_bytes)
        theirs.close()
        child.peer.channel.receive_all()
        assert child.undelivered, f"{read_bytes} bytes were read"


def test_undelivered_of_an_assignment_that_was_read_is_false(connection):
    child, theirs = connection()
    theirs.recv(65536)
    theirs.close()
    child.peer.channel.receive_all()
    assert not child.undelivered


def test_undelivered_with_something_else_unread_is_false(connection):
    child, theirs = connection()
    theirs.recv(65536)
    child.peer.channel.send(Cancel(id=1, attempt=1, reason="CANCELLED", why="cancelled", by=None))
    theirs.close()
    child.peer.channel.receive_all()
    assert not child.undelivered


def test_undelivered_is_seen_by_a_later_write_as_well(connection):
    child, theirs = connection()
    theirs.close()
    child.peer.channel.send(Beat(1, 1))  # the kernel reports the reset once, to whichever call comes first
    child.peer.channel.receive_all()
    assert child.peer.channel.reset


def spare_child(app):
    """Return the PID of the one idle child, connected."""
    [path] = app.state_dir.glob("forkserver-*-*")
    parent = int(path.name.split("-")[1])
    return wait_until(lambda: process_tree.children(parent), "the spare child is there")[0]


@pytest.mark.on_both
def test_child_killed_before_it_reads_its_order_leaves_the_task_to_another(make_app):
    app = make_app(SOURCE, spares=1, slots=1)
    app.start()
    idle = spare_child(app)
    app.wait(app.service.request("appx:says_who", {}))
    (app.folder / "began").unlink()
    idle = wait_until(lambda: (found := spare_child(app)) != idle and found, "the next spare child is there")
    wait_until(lambda: has_dialled(idle), "it has dialled")
    os.kill(idle, signal.SIGSTOP)
    handle = app.service.request("appx:says_who", {})
    assert app.started(handle).pid == idle
    os.kill(idle, signal.SIGKILL)
    record = app.wait(handle)
    assert (record.status, record.attempt) == ("DONE", 2)
    assert (app.folder / "began").read_text() == f"{record.pid}\n"


def has_dialled(pid):
    """Whether a child holds the end of an established connection."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    sockets = {f"socket:[{row[6]}]" for row in rows if row[5] == "03"}
    links = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.add(str(path.readlink()))
    return bool(links & sockets)


def test_undelivered_of_a_child_that_connected_again_is_false(connection):
    child, theirs = connection()
    theirs.recv(65536)
    again, _ = connection()
    again.peer.channel.queued_bytes = again.peer.channel.written_bytes = 0  # nothing was sent by it
    child.connect(
        again.peer, ChildHello(version=1, ref=child.ref, fork_server=ProcessRef(1, 1), id=1, attempt=1, end=None)
    )
    child.peer.channel.close()
    assert not child.undelivered


def test_can_report_no_more_is_true_once_every_earlier_fork_server_is_dead(make_app):
    app = make_app(SOURCE)
    state_dir = StateDir(app.state_dir)
    state_dir.create()
    sources = EventSources(state_dir, SystemClock())
    own = processes.own_identity("here")
    found = ForkServers(app.service.config, state_dir, own, sources, SystemClock())
    assert not found.can_report_no_more(None), "nothing is known of any"
    with subprocess.Popen(["sleep", "600"]) as process:
        ref = ProcessRef(process.pid, processes.start_ticks(process.pid))
        state_dir.fork_server_path(ref.pid, ref.start_ticks).touch()
        assert not found.can_report_no_more(None)
        assert not found.can_report_no_more(ref)
        process.kill()
    assert found.can_report_no_more(None)
    assert found.can_report_no_more(ref)
    assert not found.can_report_no_more(ProcessRef(own.pid, own.start_ticks))
    sources.close()
