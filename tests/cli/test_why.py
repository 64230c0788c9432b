"""Why a task does not run or does not go on, as `why`, `ps`, `ps --tree` and `show` tell it."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from datetime import UTC, datetime, timedelta

import pytest
from support.app import wait_until

from bgsupervisor.cli.display.explain import explain
from bgsupervisor.cli.display.snapshot import Snapshot
from bgsupervisor.ipc.messages import AttemptResult
from bgsupervisor.ipc.statedir import StateDir, StopMark
from bgsupervisor.ledger.attempts import Attempt, Batch, Claim, DueTask, IntendedEnd, Telemetry
from bgsupervisor.ledger.records import SupervisorRecord
from bgsupervisor.ledger.requests import Request
from bgsupervisor.ledger.slots import Waiter, Waiting
from bgsupervisor.statuses import Reason
from bgsupervisor.system import processes

pytestmark = pytest.mark.any_database

TASKS = """
    import time
    from pathlib import Path
    from bgsupervisor import task, current

    def until_there(name: str) -> None:
        while not Path(name).exists():
            current().progress(1, 4)
            time.sleep(0.01)

    @task
    def loads() -> None:
        until_there("go")
        current().reach("loaded", 3)

    @task
    def mails(id: int) -> None:
        current().wait_for(id, part="loaded")

    @task
    def holds() -> None:
        with current().lock("smtp"):
            until_there("go")
"""


@pytest.fixture
def app(make_app):
    return make_app(TASKS)


# why, of a task that has not started


def test_an_ended_task_tells_how(app):
    done, failed, cut = (_running(app) for _ in range(3))
    _end(app, done, AttemptResult(result="1"))
    _end(app, failed, AttemptResult(reason=Reason.RAISED, detail="ValueError: no\x1b such invoice"))
    _end(app, cut, AttemptResult(reason=Reason.VANISHED))

    assert _why(app, done) == [("ended", "it ended N s ago, after N s")]
    assert _why(app, failed) == [
        ("ended", "it ended N s ago, after N s: RAISED, ValueError: no\N{REPLACEMENT CHARACTER} such invoice")
    ]
    assert _why(app, cut) == [("ended", "it ended N s ago, after N s: VANISHED")]


def test_without_a_supervisor_it_tells_since_when_and_who_stopped_it(app):
    task = _requested(app)
    kind, sentence = _why(app, task)[0]
    assert (kind, "no supervisor has been seen yet" in sentence) == ("no_supervisor", True)

    _supervise(app, heartbeat_at=datetime.now(UTC) - timedelta(hours=1))
    assert re.search(r"^no supervisor is alive: .*seen since .*\d\d:\d\d:\d\d; start one", _why(app, task)[0][1])

    _stop(app, "leave")
    found = _because(app, task)[0]
    assert "stopped by jana at 2026-07-01T10:00:00+00:00; `bgsupervisor start` allows it again" in found.sentence
    assert found.facts["stopped_by"] == "jana"


def test_a_supervisor_that_drains_starts_nothing_more(app):
    task = _requested(app)
    _supervise(app)
    _stop(app, "drain")
    told = "the supervisor starts nothing more and will drain: stopped by jana at 2026-07-01T10:00:00+00:00;"

    assert _why(app, task)[0] == ("draining", f"{told} `bgsupervisor start` allows it again")


def test_a_supervisor_that_still_loads_is_waited_for(app):
    task = _requested(app)
    _supervise(app, catalogue="{}")

    assert _why(app, task) == [("loading", "the supervisor is still loading its tasks")]


def test_a_task_that_is_planned_for_later_tells_when(app):
    task = _requested(app, run_at=datetime.now(UTC) + timedelta(minutes=49, seconds=30))
    _supervise(app)
    [(kind, sentence)] = _why(app, task)

    assert kind == "not_due"
    assert re.fullmatch(r"it is due in 49 min, at .*\d\d:\d\d:\d\d", sentence)


def test_missing_code_names_the_module_that_did_not_load_and_the_last_line_of_its_error(app):
    task = _requested(app, name="mail:send")
    _supervise(app)
    assert _why(app, task) == [
        (
            "code_missing",
            (
                "no supervisor has code for mail:send: no configured module has a task of this name; "
                "see `bgsupervisor check`"
            ),
        )
    ]

    failures = [
        {"module": "other", "error": "E: 1"},
        {"module": "mail", "error": "Traceback\n  x\nImportError: smtp\n"},
    ]
    _supervise(app, code_error=json.dumps(failures))
    assert _why(app, task)[0][1] == (
        "no supervisor has code for mail:send: module mail failed to load: ImportError: smtp; see `bgsupervisor check`"
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mail:send", "module mail failed to load: E: 1"),
        ("mail.fast:send", "module mail failed to load: E: 1"),
        ("shop:buy", "task shop:buy failed to load: E: 2"),
        ("shop:sell", "no configured module that loaded has a task of this name (did you mean shop:sells?)"),
        ("mailing:send", "no configured module that loaded has a task of this name"),
        ("send", "module mail failed to load: E: 1; module shop.old failed to load: E: 3"),
    ],
)
def test_why_names_only_the_failures_that_concern_the_task(app, name, told):
    failures = [
        {"module": "mail", "error": "E: 1"},
        {"module": "shop:buy", "error": "E: 2", "kind": "task"},
        {"module": "shop.old", "error": "E: 3", "kind": "module"},
    ]
    _supervise(app, catalogue='{"shop:sells":{}}', code_error=json.dumps(failures))
    [(kind, sentence)] = _why(app, _requested(app, name=name))

    assert kind == "code_missing"
    assert sentence == f"no supervisor has code for {name}: {told}; see `bgsupervisor check`"


def test_why_names_a_setup_that_failed_as_what_it_is(app):
    _supervise(app, code_error=json.dumps([{"module": "shop:setup", "error": "E: 1", "kind": "setup"}]))
    (_, sentence) = _why(app, _requested(app, name="mail:send"))[0]

    assert sentence.startswith("no supervisor has code for mail:send: setup shop:setup failed to load: E: 1; ")


def test_task_whose_signature_fails_is_called_a_task_everywhere(make_app):
    app = make_app("from bgsupervisor import task\n@task\ndef bad(*ids): ...\n")
    app.start()

    sentence = "task appx:bad failed to load: "
    assert sentence in app.cli("ps").stderr
    assert sentence in app.cli("health").stdout
    assert sentence.strip() in app.cli("check").stderr
    assert "task appx:bad does not load: " in app.cli("doctor").stdout


def test_a_task_that_comes_after_another_tells_how_far_that_is(app):
    first, second = _running(app), _requested(app)
    app.service.ledger.apply(Batch(telemetry={first: Telemetry(progress_done=61, progress_total=100)}))
    task = _requested(app, after=(first.id, second.id))
    _supervise(app)
    sentence = f"it comes after task {first.id} and 1 more; task {first.id} is START 61%, running for N s"

    assert _why(app, task) == [("after", sentence)]


def test_full_slots_are_counted_and_the_place_in_the_queue_is_told(app):
    for _ in range(2):
        _running(app)
    _requested(app)
    task = _requested(app)
    _supervise(app, slots=2)

    assert _why(app, task) == [("slots_full", "the slots are full, 2 of 2; it has place 2 in the queue")]


def test_a_task_that_only_comes_after_others_takes_no_place_in_the_queue(app):
    running = _running(app)
    _requested(app, after=(running.id,))
    task = _requested(app)
    _supervise(app, slots=1)

    assert _because(app, task)[0].facts == {"busy": 1, "slots": 1, "position": 1}


def test_a_task_that_nothing_keeps_will_start_at_once(app):
    task = _requested(app)
    _supervise(app)

    assert _why(app, task) == [("nothing", "nothing delays it; it will start at once")]


# why, of a task that runs


def test_a_wait_for_a_part_names_it_and_the_state_of_the_other_task(app):
    other, planned, task = _running(app), _requested(app), _running(app)
    app.service.ledger.apply(Batch(telemetry={other: Telemetry(progress_done=61, progress_total=100)}))
    _wait(app, task, Waiting("part", target_id=other.id, target="loaded"))
    _supervise(app)
    begin = 'it has waited N s for part "loaded" of'
    assert _why(app, task) == [("part", f"{begin} task {other.id}, which is START 61%, running for N s")]

    _wait(app, task, *(Waiting("part", target_id=one.id, target="loaded") for one in (planned, other)))
    assert _why(app, task)[0][1] == f"{begin} tasks {planned.id}, {other.id}; task {planned.id} is REQUEST"

    app.service.ledger.waits.reach(other.id, other.attempt, "loaded", "3", slots=100)
    assert _why(app, task)[0][1] == f"{begin} task {planned.id}, which is REQUEST", "the other has reached it"


def test_a_wait_for_an_end_leaves_out_what_has_ended(app):
    ended, other, task = _running(app), _running(app), _running(app)
    _wait(app, task, *(Waiting("end", target_id=one.id) for one in (ended, other)))
    _end(app, ended, AttemptResult(result="1"))
    _supervise(app)

    assert _why(app, task) == [
        ("end", f"it has waited N s for the end of task {other.id}, which is START, running for N s")
    ]


def test_a_wait_for_a_lock_names_the_holder(app):
    holder, task = _running(app), _running(app)
    for one in (holder, task):
        _acquire(app, one, "smtp")
    _supervise(app)
    found = _because(app, task)[0]

    assert _plain(found.sentence) == (
        f'it has waited N s for lock "smtp", held by task {holder.id}; task {holder.id} is START, running for N s'
    )
    assert found.facts["held_by"] == [holder.id]


def test_a_wait_at_a_barrier_counts_who_is_there(app):
    first, second = _running(app), _running(app)
    for one in (first, second):
        app.service.ledger.waits.barriers.arrive(one.id, one.attempt, "scope s", "phase-1", 3)
        _wait(app, one, Waiting("barrier", target="phase-1"))
    _supervise(app)

    assert _why(app, first) == [("barrier", 'it has waited N s at barrier "phase-1": 2 of 3 parties are there')]


def test_a_wait_for_a_slot_counts_the_slots(app):
    task, other = _running(app), _requested(app)
    _wait(app, task, Waiting("end", target_id=other.id))
    _running(app, slot=0)
    assert app.service.ledger.waits.resume(Waiter(task.id, task.attempt), slots=1) is None
    _supervise(app, slots=1)
    sentence = "it has what it waited for, and has waited N s for a slot: 1 of 1 are taken"

    assert _why(app, task) == [("slot", sentence)]


def test_a_running_task_tells_since_when_how_far_and_when_it_was_heard(app):
    task = _running(app)
    app.service.ledger.apply(Batch(telemetry={task: Telemetry(progress_done=1, progress_total=4)}))
    _supervise(app)
    assert _why(app, task) == [("running", "it has been running for N s, 25% done, last heard N s ago")]

    app.service.ledger.apply(Batch(telemetry={task: Telemetry(heartbeat_at=datetime.now(UTC) - timedelta(minutes=5))}))
    assert _why(app, task) == [("unresponsive", "it has been running for N s, 25% done, unresponsive 5 min")]
    app.service.ledger.store.tables.Supervisor.delete().execute()
    assert [kind for kind, _ in _why(app, task)] == ["unresponsive", "no_supervisor"]


def test_a_task_that_is_being_ended_tells_who_wants_it_or_why(app):
    task = _running(app)
    _supervise(app)
    app.service.cancel(task.id, by="jana")
    assert _why(app, task) == [("ending", "its end was requested by jana N s ago")]

    app.service.ledger.apply(Batch(intended_ends={task: IntendedEnd(Reason.TIMED_OUT, "past 5 s")}))
    assert _why(app, task) == [("ending", "it is being ended: TIMED_OUT")]


def test_the_command_prints_a_line_for_each_reason_and_fails_only_for_an_unknown_id(app):
    first = _running(app)
    task = _requested(app, after=(first.id,))
    lines = app.cli("why", str(task.id)).stdout.splitlines()
    assert lines[0].startswith("task 2 is REQUEST: no supervisor is alive: ")
    assert lines[1].startswith("also: it comes after task 1; task 1 is START")

    done = app.cli("why", str(task.id), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["id"], found["status"]) == (0, 2, "REQUEST")
    assert [one["kind"] for one in found["because"]] == ["no_supervisor", "after"]
    assert found["because"][1]["task_ids"] == [1]

    done = app.cli("why", "77")
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "bgsupervisor: no task has the id 77; it never existed, or was pruned\n",
    )


# With a real supervisor


def test_a_real_wait_for_a_part_is_told(app):
    app.start()
    loads = app.service.request("appx:loads")
    mails = app.service.request("appx:mails", {"id": loads.id})
    _until_why(app, mails, rf'it has waited N s for part "loaded" of task {loads.id}, which is START 25%, running .*')

    listed = {one["id"]: one for one in json.loads(app.cli("ps", "--json").stdout)}
    [cause] = listed[mails.id]["waiting_for"]
    assert cause.pop("since").endswith("+00:00")
    assert cause == {"kind": "part", "task_id": loads.id, "name": "loaded", "held_by": None}
    (app.folder / "go").touch()
    assert app.wait(mails).status == "DONE"


def test_a_real_wait_for_a_lock_is_told(app):
    app.start()
    first = app.service.request("appx:holds")
    wait_until(lambda: json.loads(app.cli("show", str(first.id), "--json").stdout)["holds"], "it holds the lock")
    second = app.service.request("appx:holds")
    _until_why(app, second, rf'it has waited N s for lock "smtp", held by task {first.id}; task {first.id} is START.*')

    assert f'waits for lock "smtp", held by task {first.id}, ' in app.cli("ps").stdout
    (app.folder / "go").touch()
    assert app.wait(second).status == "DONE"


def test_really_full_slots_are_told(make_app):
    app = make_app(TASKS, slots=1)
    app.start()
    app.started(app.service.request("appx:loads"))
    task = app.service.request("appx:loads")

    _until_why(app, task, "the slots are full, 1 of 1; it has place 1 in the queue")
    (app.folder / "go").touch()
    assert app.wait(task).status == "DONE"


# ps


def test_ps_tells_what_each_task_waits_for(app):
    holder, other = _running(app), _running(app)
    part, end, lock, barrier, many = (_running(app) for _ in range(5))
    after, later = _requested(app, after=(holder.id, other.id)), _requested(app, after=(end.id,), run_at=_in_an_hour())
    _wait(app, part, Waiting("part", target_id=other.id, target="loaded"))
    _wait(app, end, Waiting("end", target_id=other.id))
    for one in (holder, lock):
        _acquire(app, one, "smtp")
    _wait(app, barrier, Waiting("barrier", target="phase-1"))
    _wait(app, many, *(Waiting("part", target_id=one.id, target="x") for one in (holder, other, part, end)))
    lines = _plain(app.cli("ps").stdout).splitlines()
    told = {int(line.split()[0]): line for line in lines[1:]}

    assert told[part.id].endswith(f'waits for part "loaded" of task {other.id}, N s')
    assert told[end.id].endswith(f"waits for the end of task {other.id}, N s")
    assert told[lock.id].endswith(f'waits for lock "smtp", held by task {holder.id}, N s')
    assert told[barrier.id].endswith('waits at barrier "phase-1", N s')
    assert told[many.id].endswith('waits for part "x" of 4 tasks, N s')
    assert told[after.id].endswith(f"after task {holder.id} and 1 more")
    assert told[later.id].endswith(f"due in 59 min, after task {end.id}")
    assert "waits" not in told[holder.id]


def test_ps_asks_as_many_questions_for_many_tasks_as_for_few(app):
    from bgsupervisor.cli.display.rows import Ties

    store, counted = app.service.ledger.store, []
    other = _running(app)
    plain = store.database.execute_sql

    def questions(tasks):
        for task in tasks:
            _wait(app, task, Waiting("part", target_id=other.id, target="x"), Waiting("lock", target="y"))
        records = app.service.list(limit=None)
        counted.clear()
        store.database.execute_sql = lambda sql, *rest: counted.append(sql) or plain(sql, *rest)
        Ties(store).causes(records)
        store.database.execute_sql = plain
        return len(counted)

    assert questions([_running(app)]) == questions([_running(app) for _ in range(20)]) <= 5


# ps --tree


def test_the_tree_draws_children_under_parents_and_what_is_waited_for_under_who_waits(app):
    report = _running(app, name="a:Report")
    ids = [_running(app, name="a:Index", parent_id=report.id, key=key) for key in ("json", "email")]
    _wait(app, report, *(Waiting("part", target_id=one.id, target="scanned") for one in ids))
    app.service.ledger.apply(Batch(telemetry={ids[0]: Telemetry(progress_done=61, progress_total=100)}))
    grandchild = _requested(app, name="a:Clean", parent_id=ids[0].id)
    latch = _running(app, name="a:Connection limit")
    late = _requested(app, name="a:Late", after=(latch.id,))
    _supervise(app, slots=3, catalogue='{"a:Report":{},"a:Index":{},"a:Clean":{},"a:Late":{}}')
    done = app.cli("ps", "--tree")

    assert [re.split(" +(?=START|REQUEST)", line)[0] for line in done.stdout.splitlines()[1:]] == [
        f"{report.id} Report",
        f"├─ {ids[0].id} Index json",
        f"│  └─ {grandchild.id} Clean",
        f"└─ {ids[1].id} Index email",
        f"{late.id} Late",
        f"└─ {latch.id} Connection limit",
    ]
    told = [re.sub(" +", " ", _plain(line)) for line in done.stdout.splitlines()[1:]]
    assert told[0].endswith(f'START waits for part "scanned" of tasks {ids[0].id}, {ids[1].id} N s')
    assert told[1].endswith('START part "scanned" not reached N s 61%')
    assert told[2].endswith("REQUEST slots full (3 of 3)")
    assert told[4].endswith(f"REQUEST after task {latch.id}")
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    assert not {"\x1b", "\N{NO-BREAK SPACE}"} & set(done.stdout)


def test_the_tree_draws_a_lock_holder_under_who_waits_for_it_and_each_task_once(app):
    holder = _running(app)
    waiters = [_running(app) for _ in range(2)]
    for one in (holder, *waiters):
        _acquire(app, one, "smtp")

    lines = app.cli("ps", "--tree").stdout.splitlines()[1:]
    assert [re.split(" +", line)[:2] for line in lines] == [["2", "add"], ["└─", "1"], ["3", "add"]]
    assert 'holds lock "smtp"' in lines[1]


def test_a_child_that_waits_for_its_parent_is_no_endless_tree(app):
    parent = _running(app)
    child = _running(app, parent_id=parent.id)
    _wait(app, child, Waiting("part", target_id=parent.id, target="ready"))
    odd, even = _requested(app), _requested(app)
    task = app.service.ledger.store.tables.Task
    for one, other in ((odd, even), (even, odd)):  # by hand: nothing of ours writes such rows
        task.update(parent_id=other.id).where(task.id == one.id).execute()

    lines = app.cli("ps", "--tree").stdout.splitlines()[1:]
    assert sorted(line.split("add")[0].split()[-1] for line in lines) == ["1", "2", "3", "4"]
    assert lines[1].startswith("└─ 2 add")


def test_the_tree_leads_from_named_tasks_to_those_that_keep_them_and_to_ended_parents(app):
    parent, other, unrelated = _running(app, name="a:parent"), _running(app), _running(app)
    task = _running(app, name="a:wanted", parent_id=parent.id)
    _wait(app, task, Waiting("end", target_id=other.id))
    _end(app, parent, AttemptResult(result="1"))
    done = app.cli("ps", "--tree", "--name", "wanted")

    assert re.findall(r"\d+ \w+", done.stdout)[:1] == [f"{parent.id} parent"]
    assert f"└─ {task.id} wanted" in done.stdout
    assert f"   └─ {other.id} add" in done.stdout
    assert f"{unrelated.id} add" not in done.stdout


def test_the_tree_is_for_people(app):
    for option in ("--json", "--all"):
        done = app.cli("ps", "--tree", option)
        assert (done.returncode, done.stdout) == (2, "")
        assert "--tree draws live tasks for people" in done.stderr


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_on_a_terminal_the_tree_is_no_wider_than_it(app, columns):
    from rich.cells import cell_len
    from test_cli_listing import _on_terminal

    above = _running(app, name="a:Report", key="鍵 " * 20)
    for _ in range(12):
        below = _running(app, name="a:Index", parent_id=above.id)
        _wait(app, above, Waiting("part", target_id=below.id, target="a rather long name of a part"))
        above = below
    _supervise(app)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", _on_terminal(app, "ps", "--tree", columns=columns)).splitlines()
    table = shown[next(number for number, line in enumerate(shown) if line.startswith("TASK")) :]

    assert len(table) == 14
    assert max(cell_len(line) for line in table) <= columns


# show


def test_show_lists_parts_holds_waits_dependencies_and_children(app):
    task = _running(app)
    app.service.ledger.waits.reach(task.id, task.attempt, "loaded", '{"rows":3}', slots=100)
    _acquire(app, task, "smtp")
    child = _requested(app, parent_id=task.id)
    _wait(app, task, Waiting("end", target_id=child.id))
    after = _requested(app, after=(task.id,), after_any_end=True)
    text = _plain(app.cli("show", str(task.id)).stdout)

    assert re.search(r'parts reached:\n  loaded = \{"rows":3\}, .*\(N s ago\)\n', text)
    assert re.search(r'holds:\n  lock "smtp", permit 0, .*\(N s ago\)\n', text)
    assert f"waits:\n  waits for the end of task {child.id}, N s\n" in text
    assert f"children:\n  {child.id}  appx:add  REQUEST\n" in text
    text = app.cli("show", str(after.id)).stdout
    assert f"comes after:\n  task {task.id}, however it ends\n" in text
    assert f"starts     after task {task.id}\n" in text

    found = json.loads(app.cli("show", str(task.id), "--json").stdout)
    assert [(one["name"], one["value"]) for one in found["parts"]] == [("loaded", {"rows": 3})]
    assert [(one["name"], one["permit"]) for one in found["holds"]] == [("smtp", 0)]
    assert found["children"] == [{"id": child.id, "name": "appx:add", "status": "REQUEST"}]
    assert [one["kind"] for one in found["waiting_for"]] == ["end"]
    found = json.loads(app.cli("show", str(after.id), "--json").stdout)
    assert found["dependencies"] == [{"on_id": task.id, "any_end": True}]


# Rows, by the ledger


def _requested(app, name="appx:add", **options):
    id, _ = app.service.ledger.request(Request(name=name, data="{}", **options))
    return Attempt(id, 0)


def _running(app, name="appx:add", slot=None, **options):
    """Have a task that runs, as far as rows tell: in a process that cannot be, none other began at the first tick."""
    ledger = app.service.ledger
    requested = _requested(app, name, **options)
    slot = len(ledger.starts()) if slot is None else slot
    identity = dataclasses.replace(processes.own_identity("here"), pid=4711, start_ticks=1)
    claim = Claim(DueTask(requested.id, 0, name, "{}", None), identity, slot, time.monotonic())
    assert ledger.apply(Batch(claims=[claim])).claimed
    return claim.attempt


def _end(app, attempt, end):
    assert app.service.ledger.end(attempt, end)


def _wait(app, attempt, *waiting):
    waits, waiter = app.service.ledger.waits, Waiter(attempt.id, attempt.attempt)
    waits.forget(waiter)
    waits.begin(waiter, waiting, slots=100, max_waiting=100)


def _acquire(app, attempt, name):
    app.service.ledger.waits.acquire(Waiter(attempt.id, attempt.attempt), name, 1, slots=100, max_waiting=100)


def _supervise(app, **columns):
    """Have a row of a supervisor that lives: this process."""
    now = datetime.now(UTC)
    own = processes.own_identity("here")
    row = {
        "host": own.host,
        "boot_id": own.boot_id,
        "pid_ns": own.pid_ns,
        "pid": own.pid,
        "start_ticks": own.start_ticks,
        "started_at": now,
        "heartbeat_at": now,
        "slots": 100,
        "version": "0.1.0",
        "catalogue": '{"appx:add":{}}',
        "code_error": None,
    }
    app.service.ledger.apply(Batch(supervisor=SupervisorRecord(**{**row, **columns})))


def _stop(app, mode):
    app.state_dir.mkdir(exist_ok=True)
    StopMark(mode, "jana", "2026-07-01T10:00:00+00:00").write(StateDir(app.state_dir).stop_mark)


def _in_an_hour():
    return datetime.now(UTC) + timedelta(minutes=59, seconds=50)


def _because(app, task):
    record = app.service.ledger.get(task.id)
    return explain(record, Snapshot.around(record, app.service))


def _why(app, task):
    return [(one.kind, _plain(one.sentence)) for one in _because(app, task)]


def _until_why(app, task, pattern):
    wait_until(lambda: re.fullmatch(pattern, _why(app, task)[0][1]), pattern)


def _plain(text):
    """Return *text* with all seconds made alike."""
    return re.sub(r"\b\d+ s\b", "N s", text)
