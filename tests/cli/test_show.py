"""`show` for people: what, when, how it ended and where, for tasks in each status; the rest with --full or --json."""

from __future__ import annotations

import json
import re

import pytest
from support.app import wait_until

SOURCE = """
import sys, time
from pathlib import Path
from bgsupervisor import Task, task

HERE = Path(__file__).parent

@task
def add(a: int, b: int) -> int:
    return a + b

@task
def nothing() -> None:
    pass

@task
def fails(times: int = 1) -> None:
    print("about to fail")
    raise ValueError("no such invoice")

class Import(Task):
    def run(self, total: int) -> None:
        self.request(add, {"a": 1, "b": 2})
        self.reach("loaded", 7)
        for line in range(30):
            print("line", line)
        sys.stdout.flush()
        self.progress(40_000_000, total, "row 5")
        while not (HERE / "latch").exists():
            time.sleep(0.01)
"""
MOMENT = r"(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d \((?:\d+ s|1 min) ago\)"
MACHINE_FACTS = ("boot_id", "pid_ns", "start_ticks", "started_mono", "max_attempts", "heartbeat_at", "queue")


@pytest.fixture
def app(make_app):
    return make_app(SOURCE, slots=2, grace_s=60)


def test_show_of_a_waiting_task_says_when_it_starts(app):
    app.service.request("appx:add", {"a": 0, "b": 0})
    waiting = app.service.request("appx:add", {"a": 1, "b": 2}, key="sum", unique=True, priority=-5)
    later = app.service.request("appx:add", {"a": 1, "b": 2}, delay_s=350)
    after = app.service.request("appx:add", {"a": 1, "b": 2}, after=[waiting])

    assert _facts(app, waiting) == [
        ("task", f"{waiting.id}, appx:add"),
        ("key", "sum (unique)"),
        ("status", "REQUEST"),
        ("starts", "at place 2 in the queue"),
        ("data", '{"a":1,"b":2}'),
        ("requested", "MOMENT, with priority -5"),
    ]
    facts = dict(_facts(app, later))
    assert facts["starts"] == "due in 5 min"
    assert re.fullmatch(r"(\S+ )?\d\d:\d\d:\d\d \(in 5 min\)", facts["due"])
    assert dict(_facts(app, after))["starts"] == f"after task {waiting.id}"


def test_show_of_a_running_task_says_how_far_and_where_it_is(app):
    app.start()
    handle = app.service.request("appx:Import", {"total": 80_000_000})
    record = wait_until(
        lambda: (one := app.service.get(handle)).progress_done and one.rss_bytes and one, "its progress is recorded"
    )
    shown = _shown(app, handle)
    facts = dict(_facts(app, handle))

    assert list(facts) == [
        *("task", "status", "progress", "data", "requested", "started", "running", "where", "used", "log")
    ]
    assert facts["status"] == "START"
    assert facts["progress"] == "50% (40000000 of 80000000) row 5"
    assert facts["where"] == f"PID {record.pid}, slot {record.slot}"
    assert re.match(r"[\d.]+ MiB of memory", facts["used"])
    blocks = re.findall(r"(?<=\n)\n(.*):\n((?:  .*\n)+)", shown)
    assert [title for title, _ in blocks] == ["parts reached", "children", "last 20 lines of the log"]
    assert blocks[0][1].startswith("  loaded = 7, ")
    assert re.fullmatch(r"  \d+  appx:add  \w+\n", blocks[1][1])
    assert blocks[2][1].splitlines() == [f"  line {number}" for number in range(10, 30)]

    app.service.cancel(handle, by="jana")
    assert re.fullmatch(rf"{MOMENT} by jana", dict(_facts(app, handle, plain=False))["cancelled"])
    (app.folder / "latch").touch()


def test_show_of_a_done_task_has_its_result_and_how_long_it_ran(app):
    app.start()
    handle = app.service.request("appx:add", {"a": 1, "b": 2})
    app.wait(handle)
    facts = dict(_facts(app, handle))

    assert (facts["status"], facts["result"]) == ("DONE", "3")
    assert re.fullmatch(r"\d+ (ms|s)", facts["ran"])
    assert facts["started"] == facts["ended"] == "MOMENT"
    assert re.fullmatch(r"PID \d+", facts["where"])
    assert {"log", "progress", "key", "due"} & set(facts) == set()
    assert "\n\n" not in _shown(app, handle), "no block where there is nothing to show"

    nothing = app.service.request("appx:nothing")
    app.wait(nothing)
    assert "result" not in dict(_facts(app, nothing))


def test_show_of_an_interrupted_task_has_error_log_and_earlier_attempts(app):
    app.start()
    handle = app.service.request("appx:fails")
    app.log_of(app.wait(handle))
    first = _shown(app, handle)
    assert dict(_facts(app, handle))["detail"] == "ValueError: no such invoice"
    assert 'raise ValueError("no such invoice")' in first
    assert "\n\nlog:\n  about to fail\n" in first
    assert "earlier attempts" not in first, "the last one has been shown already"

    app.service.retry(handle)
    app.wait(handle)
    earlier = rf"\n\nearlier attempts:\n  1  {MOMENT}  RAISED: ValueError: no such invoice\n"
    assert re.search(earlier, _shown(app, handle))
    assert dict(_facts(app, handle))["started"] == "MOMENT, attempt 2"


def test_machine_facts_are_shown_with_full_alone(app):
    app.start()
    handle = app.service.request("appx:add", {"a": 1, "b": 2})
    app.wait(handle)
    shown, full = _shown(app, handle), _shown(app, handle, "--full")
    record = json.loads(app.cli("show", str(handle.id), "--json").stdout)

    people, _, machine = full.partition("\n\nall columns:\n")
    assert [name for name in MACHINE_FACTS if name in people or name in shown] == []
    for name in MACHINE_FACTS:
        assert name in record
        assert re.search(rf"^  {name} +\S", machine, re.MULTILINE)


def test_show_names_the_host_of_a_task_that_runs_elsewhere(app):
    handle = app.service.request("appx:add", {"a": 1, "b": 2})
    store = app.service.ledger.store
    with store.writing():
        elsewhere = {"status": "START", "attempt": 1, "pid": 4711, "start_ticks": 1, "host": "web2", "slot": 3}
        store.tables.Task.update(**elsewhere).where(store.tables.Task.id == handle.id).execute()

    assert dict(_facts(app, handle))["where"] == "PID 4711, slot 3, host web2"


def _shown(app, handle, *arguments):
    done = app.cli("show", str(handle.id), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _facts(app, handle, *, plain=True):
    """Return label and text of each fact above the blocks, with past moments made alike."""
    head = _shown(app, handle).partition("\n\n")[0].splitlines()
    facts = [re.fullmatch(r"(\S+) +(.*)", line).groups() for line in head]
    return [(label, re.sub(MOMENT, "MOMENT", text) if plain else text) for label, text in facts]
