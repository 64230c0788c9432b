"""`bgsupervisor dev` at its edges: an application without tasks yet, children that die while they load, copies."""

from __future__ import annotations

import errno
import logging
import re
import sys
from types import SimpleNamespace

import click
import pytest
import test_dev
from support.app import LIMIT_S
from test_portable import ELSEWHERE, develop, elsewhere

from bgsupervisor.cli.dev import elsewhere as command_elsewhere
from bgsupervisor.cli.dev.following import Following
from bgsupervisor.config import load
from bgsupervisor.ipc.lock import Lock
from bgsupervisor.ipc.statedir import StateDir
from bgsupervisor.supervisor import portable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")
__all__ = ["develop", "elsewhere"]

develop_on_linux = pytest.fixture(test_dev.develop.__wrapped__, name="develop_on_linux")

FRAGILE = """
import os
from bgsupervisor import task

if not os.path.exists("died"):
    open("died", "w").close()
    os._exit(4)

@task
def greet() -> str:
    return "hello"
"""
FORKING = """
import os, sys
from bgsupervisor import task

@task
def forks() -> object:
    pid = os.fork()
    if not pid:
        return "the copy"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@task
async def forks_in_a_loop() -> object:
    pid = os.fork()
    if not pid:
        sys.exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def test_dev_of_a_module_without_tasks_loads_them_once_written(make_app, develop_on_linux):
    app = make_app("")
    dev = develop_on_linux(app, wait=False)
    dev.says("the module appx defines no task")

    app.write(test_dev.SOURCE)

    dev.says("^loaded 6 tasks$")
    assert dev.text.count("loaded 6 tasks") == 1
    assert dev.end() == 0


def test_dev_of_an_import_that_opens_the_database_fails_to_load_nothing(make_app, develop_on_linux):
    app = make_app(test_dev.SOURCE + 'import sqlite3\nkept = sqlite3.connect("bgsupervisor.db")\n')
    assert app.cli("migrate").returncode == 0
    dev = develop_on_linux(app)
    dev.says("importing appx left the supervised database")
    assert "failed to load" not in dev.text
    assert dev.end() == 0


def test_dev_beside_a_supervisor_that_has_noted_no_pid_names_none(make_app, develop_on_linux):
    app = make_app(test_dev.SOURCE)
    state_dir = StateDir(app.state_dir)
    state_dir.create()
    lock = Lock(state_dir.lock)
    assert lock.acquire()
    state_dir.lock.write_text("")

    dev = develop_on_linux(app, wait=False)

    assert dev.process.wait(LIMIT_S) == 1
    lock.close()
    assert "a supervisor is already running; end it with Ctrl-C, `systemctl stop` (cron" in dev.text


def test_following_prints_no_end_from_before_it_began(make_app):
    app = make_app(FORKING)
    lines = []
    app.service.cancel(app.service.request("appx:forks"))
    following = Following(app.service, lines.append)
    following.print_new()
    app.service.cancel(app.service.request("appx:forks"))

    following.print_new()

    assert [click.unstyle(line).partition(":")[0] for line in lines] == ["2 forks INTERRUPTED"]


def test_dev_elsewhere_whose_first_child_dies_takes_tasks_of_the_next(make_app, develop, elsewhere):
    app = make_app(FRAGILE, spares=1)
    dev = develop(app, elsewhere, wait=False)
    dev.says(r"^appx \| the process that loads it ended with exit code 4 ")

    dev.says("^loaded 1 task$")

    record = app.service.wait(app.service.request("appx:greet"), timeout_s=LIMIT_S)
    assert record.result == '"hello"'


@pytest.mark.parametrize(("body", "code"), [("forks", 0), ("forks_in_a_loop", 7)])
def test_dev_elsewhere_records_the_end_of_a_body_not_of_its_copy(make_app, develop, body, code):
    app = make_app(FORKING)
    develop(app, {"PYTHONPATH": str(ELSEWHERE), "ELSEWHERE": "darwin", "COVERAGE_PROCESS_START": ""})

    record = app.service.wait(app.service.request(f"appx:{body}"), timeout_s=LIMIT_S)

    assert (record.status, record.result) == ("DONE", str(code))


def test_runner_that_cannot_start_a_process_tries_again(make_app, monkeypatch, caplog):
    app = make_app(FORKING)
    runner = portable.Runner(load(app.config), [].append)
    refused = []

    def refuse(process):
        refused.append(process)
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "bgsupervisor"):
        patched.setattr(portable.multiprocessing.context.SpawnProcess, "start", refuse)
        runner.tick()
        runner.tick()
    runner.close()

    assert len(refused) == 1  # the next try is due later
    assert re.search("cannot start a child: .*; trying again in 1 s", caplog.text)


def test_ctrl_c_that_comes_while_the_first_is_announced_kills(monkeypatch):
    interrupts, ended, looks = SimpleNamespace(count=1), [], iter(range(10))
    monkeypatch.setattr(command_elsewhere, "echo", lambda _: setattr(interrupts, "count", 2))
    runner = SimpleNamespace(
        is_over=lambda: next(looks, None) is None,
        end=lambda *, kill: ended.append(kill),
        tick=lambda: None,
    )
    still = SimpleNamespace(print_new=lambda: None, found=lambda _: False)

    command_elsewhere._run(runner, still, still, interrupts, None)

    assert ended == [False, True]
