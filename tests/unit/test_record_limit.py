"""How long a child keeps an end that it cannot record, and what a body may do while a heartbeat waits for a server."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace

import pytest

from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import DatabaseError
from bgsupervisor.ipc.messages import AttemptResult, Beat, ProcessRef, Run
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.worker.connection import Connection
from bgsupervisor.worker.recording import Recorder

DAY_S = 86_400.0


def recorder_whose_database(*, inode, keep_days, back_after_days):
    """Return a child without a process, and the days that it has tried so far."""
    time = SimpleNamespace(days=0.0)

    def end(*_):
        if time.days < back_after_days:
            raise DatabaseError("the database is away")

    def wait(_):
        time.days += 0.25
        return False

    store = SimpleNamespace(inode=lambda: inode, close=lambda: None)
    mailbox = SimpleNamespace(acknowledged=SimpleNamespace(wait=wait))
    connection = SimpleNamespace(mailbox=mailbox, notify=lambda _: None)
    clock = SimpleNamespace(monotonic=lambda: time.days * DAY_S)
    recorder = Recorder(SimpleNamespace(keep_days=keep_days), None, connection, clock)
    recorder._ledger = lambda: SimpleNamespace(end=end, store=store)
    return recorder, time


@pytest.mark.parametrize(
    ("inode", "keep_days", "back_after_days", "given_up_after_days"),
    [
        (0, 14.0, 2, 1.0),  # deleted
        (0, 0.0, 2, 1.0),
        (None, 14.0, 3, None),  # a server that is away over a weekend
        (7, 14.0, 13, None),  # a file that is there, and locked
        (None, 14.0, 15, 14.0),
        (None, 0.0, 400, None),
    ],
)
def test_record_of_an_end_is_given_up_only_where_nobody_wants_it(
    inode, keep_days, back_after_days, given_up_after_days
):
    recorder, time = recorder_whose_database(inode=inode, keep_days=keep_days, back_after_days=back_after_days)

    recorder.record(Attempt(1, 1), AttemptResult(result="7"))

    assert recorder.is_unrecorded == (given_up_after_days is not None)
    assert time.days == (given_up_after_days or back_after_days)


@pytest.fixture
def beating(tmp_path):
    """A connection whose heartbeat waits for a server that is away, until the test lets it."""
    ref = ProcessRef(os.getpid(), 1)
    connection = Connection(tmp_path, ref, ref, heartbeat_s=0.0, clock=SystemClock())
    begun, go_on = threading.Event(), threading.Event()

    def beat(_):
        begun.set()
        go_on.wait(10)

    connection.beat_alone = beat
    order = Run(id=1, attempt=1, name="appx:returns", data="{}")
    thread = threading.Thread(target=connection._beat_alone, args=(order,))
    thread.start()
    assert begun.wait(10)
    yield connection, go_on
    go_on.set()
    thread.join(10)


def test_send_does_not_wait_for_a_heartbeat_that_waits_for_a_server(beating):
    connection, _ = beating
    said = threading.Thread(target=connection.send, args=(Beat(1, 1),), daemon=True)
    said.start()
    said.join(5)
    assert not said.is_alive(), "progress of a body never blocks"


def test_fork_waits_for_a_heartbeat_and_takes_no_connection_along(beating):
    connection, go_on = beating
    forked = threading.Event()
    thread = threading.Thread(
        target=lambda: (connection._before_fork(), forked.set(), connection._after_fork()), daemon=True
    )
    thread.start()
    assert not forked.wait(0.2), "the heartbeat has a connection open"
    go_on.set()
    assert forked.wait(10)
    thread.join(10)
