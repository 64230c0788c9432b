"""`bgsupervisor dev` on systems that are not Linux: what it keeps there, on a Linux that hides what only it has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.app import LIMIT_S, wait_until
from test_dev import Dev

from bgsupervisor.ledger.records import SupervisorRecord
from bgsupervisor.supervisor import portable

ELSEWHERE = Path(__file__).parents[1] / "support" / "elsewhere"

SOURCE = """
import os, subprocess, sys, time
from bgsupervisor import Task, task

VERSION = "old"

@task
def greet(name: str) -> str:
    print("hello", name)
    return VERSION

@task
def fail() -> None:
    raise ValueError("no such invoice")

@task
def leave(code: int) -> None:
    os._exit(code)

@task(timeout_s=0.5)
def slow() -> None:
    time.sleep(300)

@task(stall_s=0.5)
def stalls() -> None:
    time.sleep(300)

@task(memory_limit_bytes=20_000_000)
def greedy() -> None:
    time.sleep(300)

class Long(Task):
    def run(self) -> None:
        print("begun", flush=True)
        while True:
            self.progress(1, 4, "counting")
            time.sleep(0.05)

@task
def asleep() -> None:
    print("begun", flush=True)
    time.sleep(300)

@task
def family() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    print("begun", flush=True)
    time.sleep(300)

class Load(Task):
    def run(self, wait_s: float) -> str:
        time.sleep(wait_s)
        self.reach("loaded", 7)
        return "end"

class Mail(Task):
    def run(self, id: int, part: str | None = None) -> object:
        return self.wait_for(id, part=part, timeout_s=60)

class Locked(Task):
    def run(self, path: str) -> None:
        with self.lock("only one"):
            with open(path, "a") as file:
                file.write("in ")
            time.sleep(0.3)
            with open(path, "a") as file:
                file.write("out ")

class Meet(Task):
    def run(self) -> None:
        self.barrier("start", 2, scope="here", timeout_s=60)

class Parent(Task):
    def run(self) -> object:
        return self.wait_for(self.request("appx:greet", {"name": "child"}), timeout_s=60)

class Async(Task):
    async def run(self, id: int) -> object:
        return await self.wait_for_async(id, timeout_s=60)

class Cycle(Task):
    def run(self, id: int) -> None:
        self.wait_for(id)
"""


@pytest.fixture(params=["darwin", "win32"])
def elsewhere(request):
    """The environment in which a system looks like another one."""
    return {"PYTHONPATH": str(ELSEWHERE), "ELSEWHERE": request.param, "COVERAGE_PROCESS_START": ""}


where_systems_do_not_differ = pytest.mark.parametrize(
    "elsewhere", ["win32", pytest.param("darwin", marks=pytest.mark.slow)], indirect=True
)
"""For tests of lines that no system takes another way; Windows lacks all that darwin lacks, and more."""


@pytest.fixture
def develop():
    """Start `dev` elsewhere, and wait until it has loaded the code."""
    started = []

    def start(app, environment, *, wait=True):
        output = app.folder / f"dev-{len(started)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), "dev"],
                cwd=app.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=app.environment(**environment),
                start_new_session=True,
            )
        dev = Dev(process, output)
        started.append(dev)
        if wait:
            dev.says("^loaded ")
        return dev

    yield start
    for dev in started:
        dev.see()
        if dev.process.poll() is None:
            dev.process.kill()
            dev.process.wait(LIMIT_S)
        for one in dev.living():
            one.kill()
        wait_until(lambda one=dev: not one.living(), "what dev had started has ended")


def ended(app, *handles):
    return [app.service.wait(one, timeout_s=60) for one in handles]


def see_nothing_left(dev):
    """See that no process is left; multiprocessing's resource tracker leaves when it sees that its parent has."""
    wait_until(lambda: not dev.living(), f"nothing lives after dev: {dev.living()}", limit_s=3)


def test_dev_elsewhere_runs_tasks_and_prints_what_they_do(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    dev = develop(app, elsewhere)
    handles = [
        app.service.request("appx:greet", {"name": "Jana"}),
        app.service.request("appx:fail"),
        app.service.request("appx:leave", {"code": 3}),
    ]

    records = ended(app, *handles)

    assert [(one.status, one.reason) for one in records] == [
        ("DONE", None),
        ("INTERRUPTED", "RAISED"),
        ("INTERRUPTED", "EXITED"),
    ]
    assert records[0].result == '"old"'
    assert 'raise ValueError("no such invoice")' in records[1].error
    assert (records[2].exit_code, records[2].detail) == (3, "the process exited with code 3 before it reported an end")
    dev.says(r"^3 leave INTERRUPTED after .*: EXITED: the process exited with code 3 ")
    text = dev.text
    assert f"this is {elsewhere['ELSEWHERE']}, not Linux; what `bgsupervisor run` promises there" in text
    assert all(f"  - {promise}\n" in text for promise in portable.PROMISES)
    assert text.index("\n1 greet | hello Jana\n") < re.search(r"^1 greet DONE in \S+s$", text, re.MULTILINE).start()
    assert re.search(r"^2 fail \| ValueError: no such invoice$", text, re.MULTILINE)
    assert app.log_of(records[0]) == "hello Jana\n"
    assert "Traceback" in app.log_of(records[1])


@where_systems_do_not_differ
def test_dev_elsewhere_keeps_the_limits_of_tasks(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    develop(app, elsewhere)
    handles = [app.service.request(f"appx:{name}") for name in ("slow", "stalls", "greedy")]

    records = ended(app, *handles)

    assert [one.reason for one in records] == ["TIMED_OUT", "TIMED_OUT", "OUT_OF_MEMORY"]
    assert records[0].detail.startswith("ran past its timeout_s of 0.5 s; ")
    assert records[1].detail.startswith("made no progress for its stall_s of 0.5 s; ")
    assert "over its memory_limit_bytes of 19.1 MiB; " in records[2].detail


def test_dev_elsewhere_cancels_by_asking_then_by_signals(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    dev = develop(app, elsewhere)
    asked, told = app.service.request("appx:Long"), app.service.request("appx:asleep")
    for number, name in ((1, "Long"), (2, "asleep")):
        dev.says(rf"^{number} {name} \| begun$")
    wait_until(lambda: app.service.get(asked).message == "counting", "progress is in the row")

    for one in (asked, told):
        app.service.cancel(one, by="jana")
    records = ended(app, asked, told)

    assert [one.reason for one in records] == ["CANCELLED", "CANCELLED"]
    assert records[0].detail == "cancelled by jana; the body ended when it was asked"
    assert records[1].detail.startswith("cancelled by jana; the body did not end when asked, SIGTERM was sent")
    assert records[0].heartbeat_at is not None


def test_dev_elsewhere_has_tasks_wait_for_parts_ends_locks_and_barriers(make_app, develop, elsewhere, tmp_path):
    app = make_app(SOURCE, slots=4)
    develop(app, elsewhere)
    request = app.service.request
    load = request("appx:Load", {"wait_s": 1.0})
    part = request("appx:Mail", {"id": load.id, "part": "loaded"})
    end = request("appx:Mail", {"id": load.id})
    alongside = request("appx:Async", {"id": load.id})
    after = request("appx:greet", {"name": "after"}, after=[load])
    parent = request("appx:Parent")
    locked = [request("appx:Locked", {"path": str(tmp_path / "marks")}) for _ in range(3)]
    meeting = [request("appx:Meet") for _ in range(2)]

    records = ended(app, load, part, end, alongside, after, parent, *locked, *meeting)

    assert {one.status for one in records} == {"DONE"}
    assert [one.result for one in records[1:4]] == ["7", '"end"', '"end"']
    assert records[5].result == '"old"'
    assert (tmp_path / "marks").read_text() == "in out " * 3
    assert app.service.ledger.waits.rows() == []


@where_systems_do_not_differ
def test_dev_elsewhere_tells_a_cycle(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    develop(app, elsewhere)
    first = app.service.request("appx:Cycle", {"id": 2})
    second = app.service.request("appx:Cycle", {"id": 1})

    records = ended(app, first, second)

    assert "DEADLOCKED" in {one.reason for one in records}


@where_systems_do_not_differ
def test_dev_elsewhere_gives_the_slot_of_a_waiting_task_to_another(make_app, develop, elsewhere):
    app = make_app(SOURCE, slots=1)
    develop(app, elsewhere)
    parent = app.service.request("appx:Parent")  # its child needs the only slot

    assert ended(app, parent)[0].status == "DONE"


def test_dev_elsewhere_at_ctrl_c_ends_all_and_leaves_no_process(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    dev = develop(app, elsewhere)
    load = app.service.request("appx:asleep")
    waiter = app.service.request("appx:Mail", {"id": load.id})
    family = app.service.request("appx:family")
    dev.says(r"^1 asleep \| begun$")
    dev.says(r"^3 family \| begun$")
    wait_until(lambda: app.started(waiter).slot is None, "the second task waits")

    code = dev.end()

    assert code == 0
    wait_until(
        lambda: not dev.living(), "nothing lives after it, multiprocessing's resource tracker neither", limit_s=3
    )
    assert [one.reason for one in ended(app, load, waiter, family)] == ["STOPPED"] * 3
    rows = app.service.ledger.supervisors()
    assert [row.left_at is not None for row in rows] == [True]


def test_dev_elsewhere_at_ctrl_c_in_a_terminal_prints_no_traceback(make_app, develop, elsewhere):
    app = make_app(SOURCE, spares=4)
    dev = develop(app, elsewhere)
    app.service.request("appx:asleep")
    dev.says(r"^1 asleep \| begun$")
    wait_until(lambda: dev.see() or len(dev.family) > 5, "another spare starts")  # a tracker, four, and another

    os.killpg(dev.process.pid, signal.SIGINT)  # a terminal's goes to all

    assert dev.process.wait(LIMIT_S) == 0
    see_nothing_left(dev)
    assert "Traceback" not in dev.text


def test_dev_elsewhere_at_a_second_ctrl_c_kills(make_app, develop, elsewhere):
    app = make_app(SOURCE, grace_s=300)
    dev = develop(app, elsewhere)
    asleep = app.service.request("appx:asleep")
    dev.says(r"^1 asleep \| begun$")

    dev.interrupt()
    dev.says("^ending the running tasks")

    assert dev.end() == 0
    wait_until(
        lambda: not dev.living(), "nothing lives after it, multiprocessing's resource tracker neither", limit_s=3
    )
    assert ended(app, asleep)[0].reason == "STOPPED"


def test_dev_elsewhere_that_is_killed_ends_bodies_and_the_rest_vanishes(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    dev = develop(app, elsewhere)
    polite, asleep = app.service.request("appx:Long"), app.service.request("appx:asleep")
    dev.says(r"^1 Long \| begun$")
    dev.says(r"^2 asleep \| begun$")
    dev.see()

    dev.process.kill()
    dev.process.wait(LIMIT_S)
    wait_until(lambda: not dev.living(), "its children have ended")
    assert app.service.get(polite).reason == "STOPPED"
    assert app.service.get(asleep).status == "START"
    again = develop(app, elsewhere)

    record = ended(app, asleep)[0]
    assert (record.reason, record.detail) == ("VANISHED", "its process is gone and nobody could see how it ended")
    again.says("^2 asleep INTERRUPTED after .*: VANISHED: ")


@where_systems_do_not_differ
def test_dev_elsewhere_tells_a_kill_that_was_not_its_own(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    develop(app, elsewhere)
    record = app.started(app.service.request("appx:asleep"))
    child = psutil.Process(record.pid)
    assert round(child.create_time() * 1000) == record.start_ticks

    child.kill()

    record = ended(app, record.id)[0]
    assert (record.reason, record.signal) == ("SIGNALLED", signal.SIGKILL)
    assert record.detail == "killed by SIGKILL (9), which bgsupervisor did not send"


@where_systems_do_not_differ
def test_dev_elsewhere_loads_changed_code_and_says_what_fails(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    dev = develop(app, elsewhere)

    app.write(SOURCE + "import nothing_of_this_name\n")
    dev.says(r"^appx \| ModuleNotFoundError: No module named 'nothing_of_this_name'$")
    dev.says("^tasks of what failed to load wait until it loads$")
    waits = app.service.request("appx:greet", {"name": "Jana"})
    app.write(SOURCE.replace('"old"', '"mended"'))

    assert ended(app, waits)[0].result == '"mended"'


@where_systems_do_not_differ
def test_dev_elsewhere_whose_code_ends_the_process_says_so(make_app, develop, elsewhere):
    app = make_app("import os; os._exit(4)\n")
    dev = develop(app, elsewhere)

    dev.says(r"^appx \| the process that loads it ended with exit code 4 before it had loaded it$")
    app.write(SOURCE)

    dev.says(r"^loaded \d\d tasks$")


@where_systems_do_not_differ
def test_dev_elsewhere_beside_another_says_so_and_leaves_with_1(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    first = develop(app, elsewhere)

    second = develop(app, elsewhere, wait=False)

    assert second.process.wait(LIMIT_S) == 1
    assert f"another `bgsupervisor dev` runs them, PID {first.process.pid}; end it first" in second.text
    assert first.process.poll() is None


@where_systems_do_not_differ
def test_dev_elsewhere_where_it_is_stopped_says_what_allows_it(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    app.cli("stop")

    dev = develop(app, elsewhere, wait=False)

    assert dev.process.wait(LIMIT_S) == 1
    assert "`bgsupervisor start` allows it again" in dev.text


def test_commands_elsewhere_work_on_the_same_rows(make_app, develop, elsewhere):
    app = make_app(SOURCE)
    dev = develop(app, elsewhere)

    def call(*arguments):
        done = app.cli(*arguments, environment=elsewhere)
        assert (done.returncode, done.stderr.replace(SUMMARY.search(done.stderr + "\n")[0], "")) == (0, ""), done.stderr
        return done.stdout

    assert call("request", "appx:greet", '{"name": "Jana"}') == "requested task 1 (appx:greet)\n"
    dev.says("^1 greet DONE")
    assert call("log", "1") == "hello Jana\n"
    assert "result     old" in call("show", "1")
    call("request", "appx:Long")
    dev.says(r"^2 Long \| begun$")
    running = json.loads(call("ps", "--json"))
    assert [(one["id"], one["status"]) for one in running] == [(2, "START"), (1, "DONE")]
    assert "cancelling task 2" in call("cancel", "2")
    dev.says("^2 Long INTERRUPTED after .*: CANCELLED: ")
    refused = app.cli("run", environment=elsewhere)
    assert refused.returncode == 1
    assert "supervising needs Linux" in refused.stderr
    assert "`bgsupervisor dev` runs tasks here" in refused.stderr


SUMMARY = re.compile(r"^(REQUEST \d+ .*)?\n", re.MULTILINE)


def test_other_runner_is_a_living_one_of_this_kind_only(tmp_path):
    now = None
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        ticks = round(psutil.Process(sleeper.pid).create_time() * 1000)

        def found(**changed):
            facts = {"boot_id": "portable", "pid": sleeper.pid, "start_ticks": ticks, "left_at": None, **changed}
            row = SupervisorRecord(
                host="h", pid_ns=0, started_at=now, heartbeat_at=now, slots=1, version="", catalogue="{}",
                code_error=None, **facts,
            )  # fmt: skip
            return portable.other_runner([row])

        assert found() == sleeper.pid
        assert found(boot_id="of Linux") is None
        assert found(start_ticks=ticks + 10) is None  # the PID was reused
        assert found(left_at="then") is None
        assert found(pid=os.getpid(), start_ticks=round(psutil.Process().create_time() * 1000)) is None
    finally:
        sleeper.kill()
        sleeper.wait()
    assert found() is None
