"""With PostgreSQL rows go by the server's clock, whatever the clock of the machine says."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from support.app import LIMIT_S, only_postgres, wait_until
from support.pace import allowed_s

import bgsupervisor
from bgsupervisor import clock as clock_module
from bgsupervisor.clock import ServerClock
from bgsupervisor.database.store import Store
from bgsupervisor.errors import DatabaseError
from bgsupervisor.ledger import Ledger
from bgsupervisor.ledger.requests import Request
from bgsupervisor.statuses import Status

SOURCE = str(Path(bgsupervisor.__file__).parents[1])
START_OF_TIME = datetime(2031, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR_S = 3600.0
NEAR_S = 60.0
"""What lies so close together is no hour apart, however busy the machine."""

APP = """
import time
from bgsupervisor import task

@task
def moment() -> float:
    return time.monotonic()

@task
def until(name: str) -> None:
    import pathlib
    while not pathlib.Path(name).exists():
        time.sleep(0.01)
"""

# Every Python that starts with this folder in its path has a wall clock that is wrong by SHIFT_S.
WRONG_CLOCK = """
import datetime, os, time
shift_s, tell, right = float(os.environ["SHIFT_S"]), time.time, datetime.datetime
class All(type):
    def __instancecheck__(cls, one):
        return isinstance(one, right)
class Wrong(right, metaclass=All):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(tell() + shift_s, tz)
datetime.datetime = Wrong
time.time = lambda: tell() + shift_s
"""


@pytest.fixture(params=[HOUR_S, -HOUR_S], ids=["an hour ahead", "an hour behind"])
def wrong(request, tmp_path):
    """The environment of a process whose clock is wrong."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WRONG_CLOCK)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{SOURCE}", "SHIFT_S": str(request.param)}


def seconds(later, earlier):
    return (later - earlier).total_seconds()


def starts_in_time(record, delay_s):
    """See that it started at its time, by which the supervisor goes, and that this is as late as was asked for."""
    assert 0 <= seconds(record.started_at, record.run_at) < allowed_s(5)
    assert delay_s - 1 < seconds(record.run_at, record.requested_at) <= delay_s


def is_near(moment):
    return abs(seconds(datetime.now(UTC), moment)) < NEAR_S


def test_a_supervisor_whose_clock_is_wrong_starts_tasks_in_time_and_not_early(make_app, postgres_url, wrong):
    app = make_app(APP, database=postgres_url)
    app.start(environment=wrong)
    at_once = app.wait(app.service.request("appx:moment"))
    later = app.wait(app.service.request("appx:moment", delay_s=2.0))
    told = "import datetime; print(datetime.datetime.now(datetime.timezone.utc).isoformat())"
    shifted = subprocess.run(
        [sys.executable, "-c", told], env=wrong, capture_output=True, text=True, check=True, timeout=LIMIT_S
    ).stdout
    assert not is_near(datetime.fromisoformat(shifted.strip())), "this test's own clock trick works"
    for record in (at_once, later):
        assert record.status is Status.DONE
        assert all(is_near(moment) for moment in (record.started_at, record.heartbeat_at, record.ended_at))
    starts_in_time(at_once, 0)
    starts_in_time(later, 2)
    assert all(is_near(row.heartbeat_at) and is_near(row.started_at) for row in app.service.ledger.supervisors())


REQUESTER = """
import sys
from bgsupervisor import Service
service = Service(config=sys.argv[1])
print(service.request("appx:moment").id, service.request("appx:moment", delay_s=2.0).id)
"""


def test_what_a_machine_with_a_wrong_clock_requests_starts_in_time_and_not_early(make_app, postgres_url, wrong):
    app = make_app(APP, database=postgres_url)
    app.start()
    command = [sys.executable, "-c", REQUESTER, str(app.config)]
    said = subprocess.run(command, env=wrong, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout
    at_once, later = (app.wait(int(id)) for id in said.split())
    assert is_near(at_once.requested_at)
    assert is_near(later.requested_at)
    starts_in_time(at_once, 0)
    starts_in_time(later, 2)


def test_commands_on_a_machine_with_a_wrong_clock_tell_true_ages(make_app, postgres_url, wrong):
    app = make_app(APP, database=postgres_url)
    app.start()
    running = app.service.request("appx:until", {"name": "go"})
    app.started(running)
    app.service.request("appx:moment", delay_s=1000)
    listed = app.cli("ps", environment=wrong)
    assert listed.returncode == 0, listed.stderr
    assert "no supervisor" not in listed.stderr, "a supervisor that was heard just now is alive"
    assert "in 16 min" in listed.stdout
    assert app.cli("health", environment=wrong).returncode == 0
    told = app.cli("doctor", "--json", environment=wrong).stdout
    (finding,) = [one for one in json.loads(told) if one["check"] == "clock"]
    behind = float(wrong["SHIFT_S"]) < 0
    assert (finding["grade"] != "ok") == behind
    (app.folder / "go").touch()
    app.wait(running)


@only_postgres
def test_the_time_of_a_server_is_asked_at_each_connect_and_seldom_after(store_url):
    store = Store.open(store_url, "bgsupervisor_", busy_timeout_s=2.0)
    with contextlib.closing(store):
        assert is_near(store.clock.now()), "the first question connects"
        asked = asked_by(store)
        with store.connected():
            pass
        assert not asked
        store.close()
        with store.connected():
            pass
        assert asked
        del asked[:]
        store.clock._reading = store.clock._reading._replace(at=store.clock._reading.at - clock_module.ASK_EVERY_S - 1)
        with store.connected():
            pass
        assert asked


def asked_by(store):
    asked, ask = [], store._server_time
    store._server_time = lambda: asked.append(1) or ask()
    return asked


def test_the_time_of_a_server_that_is_away_is_told_and_known_if_it_was_asked_before():
    store = Store.open("postgresql://nobody@127.0.0.1:1/nowhere", "bgsupervisor_", busy_timeout_s=2.0)
    with pytest.raises(DatabaseError):
        store.clock.now()
    store.clock.ask(lambda: START_OF_TIME)
    assert 0 <= seconds(store.clock.now(), START_OF_TIME) < NEAR_S


def test_of_several_answers_the_quickest_counts_and_goes_on_with_the_machine(monkeypatch):
    boot = [100.0]
    monkeypatch.setattr(clock_module, "_since_boot_s", lambda: boot[0])
    answers = iter([(0.5, 10.0), (0.01, 10.51), (0.8, 11.0)])

    def server():
        took_s, said_s = next(answers)
        boot[0] += took_s
        return START_OF_TIME + timedelta(seconds=said_s)

    clock = ServerClock(lambda: None)
    clock.ask(server)
    # The second answer, 0.01 s long, was in the middle at 100.505.
    assert boot[0] == pytest.approx(101.31)
    assert seconds(clock.now(), START_OF_TIME) == pytest.approx(10.51 + 101.31 - 100.505)
    boot[0] += 30
    assert seconds(clock.now(), START_OF_TIME) == pytest.approx(10.51 + 131.31 - 100.505)


def test_a_machine_whose_clock_was_set_asks_the_server_again(monkeypatch):
    clock = ServerClock(lambda: None)
    clock.ask(lambda: START_OF_TIME)
    assert not clock.is_old()
    tell = clock_module.time.time
    monkeypatch.setattr(clock_module.time, "time", lambda: tell() - HOUR_S)
    assert clock.is_old()
    assert seconds(clock.now(), START_OF_TIME) < NEAR_S


@only_postgres
def test_a_request_and_what_is_due_are_told_by_the_clock_of_the_server_alone(store_url, monkeypatch):
    monkeypatch.setattr(clock_module.SystemClock, "now", lambda _: START_OF_TIME)
    store = Store.open(store_url, "bgsupervisor_", busy_timeout_s=2.0)
    with contextlib.closing(store), contextlib.closing(psycopg.connect(store_url, autocommit=True)) as hand:
        ledger = Ledger(store)
        id, _ = ledger.request(Request(name="a:b", data="{}"))
        row = "SELECT extract(epoch FROM clock_timestamp() - requested_at) FROM bgsupervisor_task WHERE id = %s"
        assert 0 <= hand.execute(row, (id,)).fetchone()[0] < NEAR_S
        wait_until(lambda: ledger.due(["a:b"], limit=1), "it is due")
        hand.execute("INSERT INTO bgsupervisor_task (name, run_at) VALUES ('a:c', now() + interval '30 minutes')")
        assert ledger.due(["a:c"], limit=1) == []
        assert 0 < seconds(ledger.next_due_at(), datetime.now(UTC)) < HOUR_S
        assert ledger.oldest_due_at(["a:b"]) is not None
