"""`bgsupervisor request --wait`: what it says while it waits, and how it gives up."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import wait_until

from bgsupervisor.cli.request import WAIT_S

TASKS = """
    import time
    from bgsupervisor import task

    @task
    def quick() -> int:
        return 42

    @task
    def slow() -> None:
        time.sleep(60)
"""
ABSENT = "no supervisor has been seen yet; start one with `bgsupervisor run`"


@pytest.fixture
def app(make_app):
    return make_app(TASKS)


def waiting(app, *arguments, remind_s=60.0):
    """Start `request --wait` in a process of its own, which reminds as often as said."""
    code = (
        f"from bgsupervisor.cli import request; request.REMIND_S = {remind_s}; "
        "from bgsupervisor.cli.program import main; main()"
    )
    command = [sys.executable, "-c", code, "--config", str(app.config), "request", *arguments, "--wait"]
    return subprocess.Popen(
        command,
        cwd=app.folder,
        env=app.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_wait_without_a_supervisor_says_so_at_once_and_gives_up(app):
    process = waiting(app, "appx:quick", "--timeout-s", "1.5", remind_s=0.5)
    out, said = process.communicate(timeout=30)

    assert (process.returncode, out) == (1, "")
    lines = said.splitlines()
    assert set(lines[:-1]) == {ABSENT}
    assert len(lines[:-1]) >= 3  # at once, then each half second
    assert lines[-1] == (
        "bgsupervisor: task 1 has not ended within 1.5 s and still waits to start; `bgsupervisor show 1` shows it, "
        "`bgsupervisor why 1` what keeps it, and --timeout-s waits longer"
    )
    assert app.service.status(1) == "REQUEST"


def test_wait_for_code_that_is_missing_says_so_again(app):
    app.start()
    wait_until(lambda: "appx:quick" in app.service.ledger.supervisors()[0].catalogue, "the catalogue is in the row")
    process = waiting(app, "appx:quik", "--force", "--timeout-s", "0.9", remind_s=0.5)
    out, said = process.communicate(timeout=30)

    assert (process.returncode, out) == (1, "")
    sentence = "no supervisor has code for appx:quik, so it waits until one has; did you mean appx:quick?"
    assert set(said.splitlines()[:-1]) == {sentence}
    assert len(said.splitlines()[:-1]) >= 2


def test_wait_ends_with_the_result_when_a_supervisor_comes(app):
    process = waiting(app, "appx:quick", remind_s=0.5)
    assert process.stderr.readline().strip() == ABSENT
    app.start()
    out, _ = process.communicate(timeout=30)

    assert (process.returncode, out) == (0, "42\n")


def test_wait_for_a_task_that_runs_is_silent_until_it_gives_up(app):
    app.start()
    process = waiting(app, "appx:slow", "--timeout-s", "2", remind_s=0.3)
    out, said = process.communicate(timeout=30)

    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"bgsupervisor: task 1 has not ended within 2 s and goes on; .*\n", said), said


def test_wait_of_a_wrong_name_is_refused_at_once(app):
    done = app.cli("request", "appx:quik", "--wait")

    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean appx:quick?" in done.stderr


def test_wait_gives_up_after_ten_minutes_by_default(app):
    assert WAIT_S == 600.0
    assert "[default: 600.0" in app.cli("request", "--help").stdout


def test_request_with_json_says_what_was_recorded_alone(app):
    done = app.cli("request", "quick", "--json")

    assert json.loads(done.stdout) == {"id": 1, "created": True}
    assert done.stderr.strip() == ABSENT
