"""A fork server in bad company: applications that take its signals and children, shortages, supervisors that refuse."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import time

import psutil
import pytest
from support.app import LIMIT_S, wait_until

from bgsupervisor.ipc import messages
from bgsupervisor.ipc.channel import REDIAL_MAX_S, REDIAL_S, Channel, Redial
from bgsupervisor.ipc.messages import ProcessRef
from bgsupervisor.ipc.sockets import bind
from bgsupervisor.statuses import Reason, Status
from bgsupervisor.system import process_tree
from bgsupervisor.system.files import open_dir
from bgsupervisor.worker import forkserver

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"),
]

TASKS = """
import errno, os, pathlib, resource, signal, threading, time
from bgsupervisor.worker import forkserver as fork_server
from bgsupervisor import task

@task
def quick() -> int:
    return 1

@task
def until(name: str) -> None:
    while not pathlib.Path(name).exists():
        time.sleep(0.01)

@task
def descriptor_limit() -> list[int]:
    return list(resource.getrlimit(resource.RLIMIT_NOFILE))

def once(name):
    '''Whether the test has put this file there, which it then has to do again.'''
    try:
        os.unlink(name)
    except FileNotFoundError:
        return False
    return True

def shortage():
    return OSError(errno.EMFILE, "Too many open files")
"""


def fork_server_pid(app):
    [path] = app.state_dir.glob("forkserver-*-*")
    return int(path.name.split("-")[1])


def log_of(app):
    return (app.state_dir / "logs" / "supervisor.log").read_text()


class Answering:
    """A stand-in for a supervisor: whoever dials is answered by the test."""

    def __init__(self, state_dir):
        folder = open_dir(state_dir)
        self._listener = bind(folder, "control.sock", socket.SOCK_STREAM, 0o600)
        os.close(folder)
        self._listener.settimeout(LIMIT_S)
        self._peers = []

    def accept(self):
        return self._listener.accept()[0]

    def meet_fork_server(self):
        """Return the connection of the fork server, after its hello."""
        while True:
            peer = Channel(self.accept())
            self._peers.append(peer)
            [hello] = wait_until(peer.receive, "whoever dials says hello")
            if isinstance(hello, messages.ForkServerHello):
                return peer

    def close(self):
        for one in (*self._peers, self._listener):
            one.close()


def kill_a_body(app):
    record = app.started(app.service.request("appx:until", {"name": "never"}))
    os.kill(record.pid, signal.SIGKILL)
    return app.wait(record.id)


# ---- what an application does to it ----


def test_a_fork_server_that_fails_says_why_and_leaves_though_bodies_run(make_app):
    app = make_app(
        TASKS
        + """
def fail(self):
    if once("fail"):
        raise LookupError("a bug of ours")

fork_server.ForkServer._sweep_strays = fail
"""
    )
    app.start()
    handle = app.service.request("appx:until", {"name": "end"})
    app.started(handle)
    first = psutil.Process(fork_server_pid(app))
    (app.folder / "fail").touch()
    app.wait(app.service.request("appx:quick"))
    wait_until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE, "the fork server has left")
    wait_until(lambda: "the fork server died with exit code 1" in log_of(app), "its death is told")
    assert "LookupError: a bug of ours" in log_of(app)
    (app.folder / "end").touch()
    assert app.wait(handle).status is Status.DONE


def test_an_application_that_ignores_sigchld_keeps_no_death_from_the_fork_server(make_app):
    app = make_app(TASKS + "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\nsignal.set_wakeup_fd(-1)\n")
    app.start()
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    record = kill_a_body(app)
    assert (record.reason, record.signal) == (Reason.SIGNALLED, signal.SIGKILL)
    assert "importing the application set what SIGCHLD does" in log_of(app)


def test_an_application_that_leaves_sigchld_alone_is_not_warned(make_app):
    app = make_app(TASKS)
    app.start()
    assert "SIGCHLD" not in log_of(app)


def test_a_fork_server_whose_children_another_reaps_lives_on(make_app):
    app = make_app(
        TASKS
        + """
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)

threading.Thread(target=reap, daemon=True).start()
"""
    )
    app.start()
    for _ in range(3):
        assert kill_a_body(app).status is Status.INTERRUPTED
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    assert "the fork server died" not in log_of(app)


# ---- strays ----


@pytest.fixture
def family():
    """A child of this process and a grandchild, as PIDs."""
    child = psutil.Popen(["sh", "-c", "sleep 1000 & wait"])
    [grandchild] = wait_until(child.children, "the shell has started its child")
    yield child.pid, grandchild.pid
    for process in (grandchild, child):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()


def refusing(error):
    def refuse(*_arguments, **_options):
        raise error

    return refuse


def test_strays_are_children_and_never_grandchildren_where_the_kernel_lists_none(family, monkeypatch):
    monkeypatch.setattr(forkserver, "open", refusing(FileNotFoundError()), raising=False)
    monkeypatch.setattr(process_tree, "_kernel_lists_children", lambda: False)
    child, grandchild = family
    strays = forkserver.strays_of_this_process(set())
    assert child in strays
    assert grandchild not in strays


def test_there_are_no_strays_where_nobody_can_know(family, monkeypatch):
    assert family[0] in forkserver.strays_of_this_process(set())
    with monkeypatch.context() as patch:
        patch.setattr(forkserver, "open", refusing(OSError("no descriptor left")), raising=False)
        assert forkserver.strays_of_this_process(set()) == []
    monkeypatch.setattr(forkserver, "open", refusing(FileNotFoundError()), raising=False)
    monkeypatch.setattr(process_tree, "_child_lookup", refusing(OSError("no descriptor left")))
    assert forkserver.strays_of_this_process(set()) == []


# ---- shortages ----


def test_a_child_that_cannot_be_held_is_ended_and_another_is_forked(make_app):
    app = make_app(
        TASKS
        + """
hold = os.pidfd_open

def pidfd_open(pid, flags=0):
    if once("shortage"):
        pathlib.Path("unheld").write_text(str(pid))
        time.sleep(0.5)  # time enough to say hello and to begin the task
        raise shortage()
    return hold(pid, flags)

os.pidfd_open = pidfd_open
""",
        spares=0,
    )
    app.start()
    (app.folder / "shortage").touch()
    record = app.wait(app.service.request("appx:quick"))
    assert (record.status, record.attempt) == (Status.DONE, 1)
    unheld = int((app.folder / "unheld").read_text())
    assert record.pid != unheld
    assert not psutil.pid_exists(unheld)
    assert "cannot fork a child: [Errno 24] Too many open files" in log_of(app)


def test_a_signal_that_cannot_be_sent_for_want_of_a_descriptor_is_told_and_the_next_one_is_sent(make_app):
    app = make_app(
        TASKS
        + """
dup = os.dup

def dup_or_not(descriptor):
    if once("shortage"):
        raise shortage()
    return dup(descriptor)

os.dup = dup_or_not
"""
    )
    supervisor = app.start()
    record = app.started(app.service.request("appx:until", {"name": "never"}))
    supervisor.kill()
    (app.folder / "shortage").touch()
    with contextlib.closing(Answering(app.state_dir)) as answering:
        peer = answering.meet_fork_server()
        for _ in range(2):
            peer.send(messages.Kill(ProcessRef(record.pid, record.start_ticks), signal.SIGKILL, Reason.CANCELLED))
        [exited] = wait_until(peer.receive, "the fork server tells of the exit")
    assert (exited.ref.pid, exited.signal, exited.ordered) == (record.pid, signal.SIGKILL, Reason.CANCELLED)
    assert f"cannot send signal 9 to PID {record.pid}: [Errno 24] Too many open files" in log_of(app)


def test_the_fork_server_may_open_all_files_that_it_can_and_a_body_what_it_could_before(make_app):
    app = make_app(TASKS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        app.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert hard > 512
    assert resource.prlimit(fork_server_pid(app), resource.RLIMIT_NOFILE) == (hard, hard)
    handle = app.service.request("appx:descriptor_limit")
    app.wait(handle)
    assert app.service.result(handle) == [512, hard]


# ---- supervisors that refuse ----


class Moving:
    """A clock that a test moves."""

    at = 100.0

    def monotonic(self):
        return self.at


def test_who_is_refused_waits_ever_longer_until_a_connection_is_of_use():
    clock = Moving()
    redial = Redial(clock)
    pauses = []
    assert redial.wait_s() == 0
    for _ in range(7):
        redial.connected()
        redial.lost()
        pauses.append(redial.wait_s())
        clock.at += redial.wait_s()
    assert pauses == pytest.approx([REDIAL_S, 0.4, 0.8, 1.6, 3.2, REDIAL_MAX_S, REDIAL_MAX_S])
    redial.connected()
    redial.heard()
    redial.lost()
    assert redial.wait_s() == 0
    redial.connected()
    redial.lost()
    assert redial.wait_s() == pytest.approx(REDIAL_S)
    clock.at += redial.wait_s()
    redial.connected()
    clock.at += REDIAL_MAX_S
    redial.lost()
    assert redial.wait_s() == 0


def test_fork_server_and_child_do_not_storm_a_supervisor_that_refuses_them(make_app):
    app = make_app(TASKS, spares=1)
    supervisor = app.start()
    wait_until(lambda: process_tree.children(fork_server_pid(app)), "the spare child is there")
    supervisor.kill()
    times = []
    with contextlib.closing(Answering(app.state_dir)) as answering:
        while len(times) < 8:
            answering.accept().close()
            times.append(time.monotonic())
    assert times[-1] - times[0] > 0.5  # of two that redial after 0.2, 0.4 and 0.8 s
