"""The torture test finds nothing, and would find whatever is wrong: each invariant is shown to fail."""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.app import wait_until

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from torture import arena, invariants  # noqa: E402 - no part of the package
from torture.arena import Arena, Life, ProcessRef  # noqa: E402
from torture.invariants import Evidence  # noqa: E402
from torture.oracle import Entry  # noqa: E402


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_twenty_seconds_of_torture_break_no_promise(request, kind):
    seed = secrets.token_hex(4)
    command = [sys.executable, "-m", "torture", "--seed", seed, "--seconds", "20", "--rate", "6", "--slack", "5"]
    if kind == "postgres":  # a server is no descendant of the torture, which ends all of those
        command += ["--database", request.getfixturevalue("postgres_url")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_torture_ends_all_that_it_started_also_what_is_stopped(tmp_path, number):
    command = [sys.executable, "-m", "torture", "--seconds", "300", "--rate", "0.1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    torture = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    def supervisor():
        for one in psutil.Process(torture.pid).children():
            with contextlib.suppress(psutil.Error):
                if one.children():
                    return one
        return None

    wait_until(supervisor, "the torture has a supervisor, and that has children").suspend()
    started = psutil.Process(torture.pid).children(recursive=True)
    torture.send_signal(number)
    _, said = torture.communicate(timeout=40)

    assert (torture.returncode, said) == (130, f"{number.name}: ending the run, killing its processes\n")
    assert [one for one in started if one.is_running()] == []
    assert list(tmp_path.iterdir()) == []


def test_chaos_signals_its_own_descendants_alone_and_only_who_is_meant():
    child = subprocess.Popen(["sleep", "60"])
    try:
        ticks = arena.start_ticks(child.pid)
        assert not Arena.send(ProcessRef(child.pid, ticks + 1), signal.SIGKILL)
        assert not Arena.send(ProcessRef(os.getppid(), arena.start_ticks(os.getppid())), 0)
        assert child.poll() is None
        assert Arena.send(ProcessRef(child.pid, ticks), signal.SIGKILL)
        assert child.wait(15) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait(15)
    assert not Arena.send(ProcessRef(child.pid, ticks), 0)


# ---- the invariants ----


def line(what, at, id, attempt=1, **facts):
    return {"what": what, "at": at, "id": id, "attempt": attempt, "pid": 100 + id, **facts}


def start(at, id, attempt=1, **facts):
    return line("start", at, id, attempt, **{"kind": "quick", "ticks": 1, "fork_server": 50, **facts})


def ack(id, **facts):
    return {"what": "ack", "at": 0.5, "task": id, "created": True, "n": id, "kind": "quick", **facts}


def row(id, status="DONE", **facts):
    known = {"id": id, "name": "bodies:quick", "status": status, "attempt": 1, "result": str(id), "reason": None}
    return {**known, "parent_id": None, "unique_key": None, **facts}


def interruption(id, reason, **facts):
    known = {
        "task_id": id,
        "attempt": 1,
        "reason": reason,
        "detail": "",
        "exit_code": None,
        "signal": None,
        "pid": 100 + id,
    }
    return {**known, "started_at": "1970-01-01 00:00:10+00:00", "ended_at": "1970-01-01 00:00:11+00:00", **facts}


@pytest.fixture
def facts():
    """A run in which all was well: 1 was done, 2 was killed, 3 was cancelled before it began, 4 raised, 5 and 6 met."""
    return {
        "lines": [
            *[ack(id) for id in range(1, 7)],
            *[start(10.0, 1), line("wait", 10.1, 1), line("on", 10.2, 1, how="value"), line("end", 10.3, 1)],
            *[start(10.0, 2), line("take", 10.1, 2, name="one")],
            *[start(11.0, 4), line("raise", 11.1, 4, error="BoomError", text="")],
            *[start(12.0, 5), line("arrive", 12.0, 5, scope="s", parties=2), line("wait", 12.0, 5)],
            *[start(12.1, 6), line("arrive", 12.1, 6, scope="s", parties=2), line("wait", 12.1, 6)],
            *[line("on", 12.2, 5, how="value"), line("end", 12.3, 5), line("take", 12.3, 6, name="one")],
            *[line("on", 12.2, 6, how="value"), line("give", 12.4, 6, name="one"), line("end", 12.5, 6)],
        ],
        "entries": [Entry("kill", "child", 10.5, 10.5, 102, 1, 2), Entry("cancel", "task", 5.0, 5.1, task=3)],
        "tasks": {
            **{id: row(id) for id in (1, 5, 6)},
            2: row(2, "INTERRUPTED", reason="SIGNALLED"),
            3: row(3, "INTERRUPTED", reason="CANCELLED", attempt=0),
            4: row(4, "INTERRUPTED", reason="RAISED"),
        },
        "interruptions": [interruption(2, "SIGNALLED", signal=signal.SIGKILL), interruption(4, "RAISED")],
        "done_seen": {(1, 1): 10.4, (5, 1): 12.6},
        "interrupted_seen": {(2, 1): 10.9, (4, 1): 11.3},
        "lives": [Life(ProcessRef(40, 1), 2.0, 60.0, 0)],
        "supervised": {40},
        "slots": 2,
    }


def found(facts):
    return {sentence.partition(":")[0] for sentence in invariants.violations(Evidence(**copy.deepcopy(facts)))}


def test_a_run_in_which_all_was_well_has_no_violation(facts):
    assert found(facts) == set()


def replace(facts, id, **values):
    facts["tasks"][id].update(values)


def first_interruption(**values):
    return lambda facts: facts["interruptions"][0].update(values)


def more(*lines):
    return lambda facts: facts["lines"].extend(lines)


def less(what, id):
    return lambda facts: facts["lines"].remove(
        next(one for one in facts["lines"] if (one["what"], one.get("id")) == (what, id))
    )


def cancelled_at(moment):
    def spoil(facts):
        facts["entries"].append(Entry("cancel", "task", moment, moment, task=2))
        facts["interruptions"][0].update(reason="CANCELLED")

    return spoil


SPOILED = {
    "a request without a row": ("requests", more(ack(9))),
    "a row without a request": ("requests", lambda facts: facts["tasks"].update({9: row(9)})),
    "a task that was created twice": ("requests", more(ack(1))),
    "a body that starts twice": ("starts", more(start(10.05, 1, pid=999))),
    "attempts that overlap": ("starts", more(start(10.2, 1, 2))),
    "an attempt that no row knows": ("known_attempts", more(start(20.0, 1, 2))),
    "a task that has not ended": ("ended", lambda facts: replace(facts, 1, status="START")),
    "a task that is DONE without an end": ("done", less("end", 1)),
    "a task that was DONE before its end": ("done", lambda facts: facts["done_seen"].update({(1, 1): 10.2})),
    "a task with the result of another": ("done", lambda facts: replace(facts, 1, result="2")),
    "a DONE that did not last": ("done_is_final", lambda facts: facts["done_seen"].update({(4, 1): 11.3})),
    "a death without a cause": ("reasons", lambda facts: facts["entries"].pop(0)),
    "a kill that is called an exit": ("reasons", first_interruption(reason="EXITED", exit_code=0)),
    "a wrong signal": ("reasons", first_interruption(signal=15)),
    "VANISHED with a living fork server": ("reasons", first_interruption(reason="VANISHED", signal=None)),
    "a cancel that nobody asked for": ("reasons", lambda facts: facts["entries"].pop(1)),
    "a cancel of another attempt": ("reasons", cancelled_at(9.0)),
    "an error that nobody raised": ("reasons", less("raise", 4)),
    "a truth that was told late": ("promptness", lambda facts: facts["interrupted_seen"].update({(2, 1): 11.6})),
    "too many bodies at once": ("slots", lambda facts: facts.update(slots=1)),
    "a lock held by two": ("permits", more(line("take", 10.2, 1, name="one"))),
    "a barrier passed alone": ("barriers", more(line("arrive", 9.0, 1, scope="t", parties=2))),
    "a unique key that ran twice": ("unique", lambda facts: [replace(facts, id, unique_key="u") for id in (5, 6)]),
    "a wrong value": ("sayings", more(line("wrong", 12.0, 5, value=1, expected=2))),
    "a request that was refused": (
        "sayings",
        more({"what": "refused", "at": 3.0, "error": "DatabaseError", "text": "locked"}),
    ),
    "a supervisor that failed": ("exits", lambda facts: facts["lives"].append(Life(ProcessRef(41, 1), 2.0, 3.0, 1))),
    "a process that is left": ("leftovers", lambda facts: facts.update(leftovers=["PID 7 is still there"])),
}


@pytest.mark.parametrize("what", SPOILED)
def test_the_torture_test_finds(facts, what):
    check, spoil = SPOILED[what]
    spoil(facts)
    assert check in found(facts)


def test_every_invariant_is_shown_to_fail():
    assert {check for check, _ in SPOILED.values()} == {check.__name__ for check in invariants.CHECKS}


def test_a_truth_is_not_late_while_no_supervisor_can_tell_it(facts):
    facts["interrupted_seen"][2, 1] = 14.0
    facts["away"] = [(10.4, 12.5)]  # the database; once it is there again it takes 1.5 s
    assert found(facts) == set()
    facts["lives"] = [Life(ProcessRef(40, 1), 2.0, 10.6, -9), Life(ProcessRef(41, 1), 11.9, 60.0, 0)]
    facts["entries"].append(Entry("kill", "supervisor", 10.6, 10.6, 40, 1))
    facts["supervised"], facts["away"] = {40, 41}, []
    facts["interrupted_seen"][2, 1] = 13.8
    assert found(facts) == set()
    facts["interrupted_seen"][2, 1] = 14.0
    assert found(facts) == {"promptness"}


def test_a_cancel_explains_an_interruption_of_its_attempt(facts):
    cancelled_at(10.4)(facts)
    assert found(facts) == set()


def test_a_spare_may_have_been_killed_before_it_was_claimed(facts):
    facts["lines"] = [one for one in facts["lines"] if one.get("id") != 2]
    facts["entries"].append(Entry("stop", "supervisor", 5.9, 10.0, 40, 1))
    facts["entries"][0] = Entry("kill", "spare", 7.0, 7.0, 102, 1)
    assert found(facts) == set()
    facts["entries"][0] = Entry("kill", "spare", 6.0, 6.0, 102, 1)
    assert found(facts) == {"reasons"}


def test_nobody_need_have_seen_a_death_whose_fork_server_was_dead(facts):
    first_interruption(reason="VANISHED", signal=None)(facts)
    facts["entries"].append(Entry("kill", "fork_server", 10.2, 10.2, 50, 1))
    assert found(facts) == set()
    facts["kernel_tells"] = True  # a supervisor was there throughout
    assert found(facts) == {"reasons"}
    facts["entries"].pop()
    facts["lines"] = [{**one, "fork_server": 7} if one["what"] == "start" else one for one in facts["lines"]]
    facts["kernel_tells"], facts["reaper"] = False, 7
    assert found(facts) == set()
