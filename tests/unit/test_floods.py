"""Who may write to the sockets of the state directory can neither end nor occupy what listens there."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from support.app import wait_until

from bgsupervisor.clock import Rate, SystemClock
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.ledger.waits import EVERYBODY
from bgsupervisor.statuses import Status
from bgsupervisor.supervisor.events import WAKE_UPS_AT_ONCE as PASSES_AT_ONCE
from bgsupervisor.supervisor.events import WAKE_UPS_PER_S as PASSES_PER_S
from bgsupervisor.supervisor.events import EventSources
from bgsupervisor.worker import wait_manager
from bgsupervisor.worker.wait_manager import KEY_CHARS, WAKE_UPS_AT_ONCE, WAKE_UPS_PER_S, NotifyCounts


class Steady(SystemClock):
    """A clock that a test moves."""

    moment = 100.0

    def monotonic(self):
        return self.moment


def test_rate_allows_what_was_saved_up_and_then_so_many_a_second():
    rate = Rate(3, 2.0, 0.0)
    assert [rate.allows(0.0) for _ in range(5)] == [True, True, True, False, False]
    assert [rate.allows(1.0) for _ in range(3)] == [True, True, False]
    assert sum(rate.allows(100.0) for _ in range(9)) == 3


def test_wake_ups_of_one_key_beyond_the_rate_are_put_off_and_not_lost():
    clock = Steady()
    counts = NotifyCounts(clock)
    for _ in range(1000):
        counts.notify(["task:5"])
    assert counts.seen(["task:5"]) == [WAKE_UPS_AT_ONCE]
    counts.notify(["task:6"])
    assert counts.seen(["task:6"]) == [1], "another key has its own rate"
    for _ in range(10):
        counts.catch_up()
    assert counts.seen(["task:5"]) == [WAKE_UPS_AT_ONCE + 1]
    counts.notify(["task:5"])
    clock.moment += 1 / WAKE_UPS_PER_S
    counts.catch_up()
    assert counts.seen(["task:5"])[0] >= WAKE_UPS_AT_ONCE + 2
    clock.moment += 10
    counts.notify(["task:5"])
    before = counts.seen(["task:5"])
    counts.catch_up()
    assert counts.seen(["task:5"]) == before


def test_a_flood_wakes_waiters_a_few_times_a_second():
    counts, woken, over = NotifyCounts(), [0] * 20, threading.Event()

    def waits(number):
        seen = counts.seen([EVERYBODY])
        while not over.is_set():
            seen = counts.wait_beyond(f"{number}", [EVERYBODY], seen, 0.2)
            woken[number] += 1

    threads = [threading.Thread(target=waits, args=(number,)) for number in range(len(woken))]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        counts.notify([EVERYBODY])
        counts.catch_up()
        time.sleep(0.001)
    lasted_s = time.monotonic() - began
    over.set()
    for thread in threads:
        thread.join()
    assert max(woken) <= WAKE_UPS_AT_ONCE + 2 * WAKE_UPS_PER_S * lasted_s + 10 * lasted_s


@pytest.fixture
def caretaker(tmp_path, monkeypatch):
    """The thread of a wait manager, with wake-ups of its own, and a way to write to its socket."""
    monkeypatch.setattr(wait_manager, "_notify_counts", NotifyCounts())
    folder = StateDir(tmp_path / "state")
    folder.create()
    made = wait_manager._Caretaker(folder.path)
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def say(datagram):
        sender.sendto(datagram, str(folder.path / "notify.sock"))
        made._take_notifies()

    yield say
    sender.close()
    made._notifies.close()


HOSTILE = [
    b"[" * 100_000,
    b'{"a":' * 10_000,
    b"\xff\xfe",
    b"",
    b"5",
    b"null",
    b'{"task:5": 1}',
    b'[1, null, {"a": 2}, [3]]',
    json.dumps(["x" * (KEY_CHARS + 1)]).encode(),
    json.dumps("y" * 100_000).encode(),
    b'["\\ud800"]',
    b"[" + b"1" * 50_000 + b"]",
]


@pytest.mark.parametrize("datagram", HOSTILE, ids=range(len(HOSTILE)))
def test_a_datagram_that_is_no_wake_up_ends_no_thread_and_wake_ups_nothing(caretaker, datagram):
    caretaker(datagram)
    caretaker(b'["task:5"]')
    assert wait_manager._notify_counts.seen(["task:5"]) == [1]
    assert all(
        len(key) <= KEY_CHARS for key in [*wait_manager._notify_counts._counts, *wait_manager._notify_counts._left]
    )


def test_a_supervisor_is_woken_so_many_times_a_second_by_a_flood(tmp_path):
    folder, clock = StateDir(tmp_path / "state"), Steady()
    folder.create()
    sources = EventSources(folder, clock)
    passes = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        for _ in range(1000):
            sender.sendto(b"*\ntask:5\n*", str(folder.wake))
            heard = sources.hear(sources.rest(0.0))
            passes += heard.woken
            assert len(heard.keys) <= 2
            if not heard.woken:
                break
        assert PASSES_AT_ONCE <= passes <= PASSES_AT_ONCE + 1
        clock.moment += 1 / PASSES_PER_S
        assert sources.hear(sources.rest(0.0)).woken, "what came meanwhile is not lost"
        sources.bind()
        sender.sendto(b"*", str(folder.wake))
        assert sources.hear(sources.rest(0.0)).woken, "a socket that is bound anew is heard"
    sources.close()


SOURCE = """
    from bgsupervisor import current, task

    @task
    def part_of() -> str:
        return "done"

    @task
    def waits(on: int) -> None:
        current().wait_for(on, timeout_s=60)
"""


def test_a_flood_of_both_sockets_leaves_both_at_work(make_app, monkeypatch):
    app = make_app(SOURCE, slots=4)
    supervisor = app.start()
    last = app.service.request("appx:part_of", delay_s=3600)
    waiting = [app.service.request("appx:waits", {"on": last.id}) for _ in range(4)]
    wake_ups = app.state_dir / "notify.sock"
    wait_until(lambda: wake_ups.exists() and app.service.ledger.waiting_count() == 4, "all wait")
    monkeypatch.chdir(app.state_dir)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(0)
        for number in range(2000):
            for name, said in (("notify.sock", HOSTILE[number % len(HOSTILE)]), ("wake.sock", b"*")):
                try:
                    sender.sendto(said, name)
                except BlockingIOError:
                    time.sleep(0.001)
    handle = app.service.request("appx:part_of")
    assert app.wait(handle).status is Status.DONE
    assert supervisor.process.poll() is None
    assert "does not answer" not in supervisor.log
    for one in waiting:
        app.service.cancel(one)
    for one in waiting:
        assert app.wait(one).reason == "CANCELLED"
