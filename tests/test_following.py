"""`log -f` ends when nobody reads, or nothing more can come, and costs next to nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import wait_until
from pace import allowed_s

SOURCE = """
    import time
    from pathlib import Path
    from bgsupervisor import task

    @task
    def waits() -> None:
        print("first line")
        for _ in range(6000):
            if Path("gate").exists():
                return
            time.sleep(0.01)
"""


@pytest.fixture
def app(make_app):
    return make_app(SOURCE)


@pytest.fixture
def follow(app):
    started = []

    def start(id):
        arguments = [sys.executable, "-m", "bgsupervisor", "log", "-f", str(id)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(arguments, cwd=app.folder, env=app.environment(), text=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)


def test_log_f_whose_reader_has_gone_ends_though_nothing_is_printed(app, follow):
    app.start()
    process = follow(app.service.request("appx:waits", {}).id)
    assert process.stdout.readline() == "first line\n"
    process.stdout.close()
    process.stdout = None
    assert process.wait(5) == 1
    (app.folder / "gate").touch()


def test_log_f_whose_task_and_supervisor_died_ends_and_says_so(app, follow):
    supervisor = app.start()
    handle = app.service.request("appx:waits", {})
    process = follow(handle.id)
    assert process.stdout.readline() == "first line\n"
    record = app.started(handle)
    supervisor.kill()
    for identity in app._nurseries():
        os.kill(identity.pid, signal.SIGKILL)
    os.kill(record.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (
        0,
        f"the process of task {handle.id} has ended, and no supervisor is running to record how\n",
    )


@pytest.mark.of_sqlite
def test_log_f_whose_database_was_deleted_ends_and_makes_no_other(app, follow):
    supervisor = app.start()
    handle = app.service.request("appx:waits", {})
    process = follow(handle.id)
    assert process.stdout.readline() == "first line\n"
    supervisor.kill()
    for path in app.folder.glob("bgsupervisor.db*"):
        path.unlink()
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "the database was deleted or replaced" in err
    assert not (app.folder / "bgsupervisor.db").exists()
    (app.folder / "gate").touch()


def test_log_f_of_a_silent_task_looks_at_its_row_twice_a_second(app, follow):
    app.start()
    process = follow(app.service.request("appx:waits", {}).id)
    assert process.stdout.readline() == "first line\n"
    seen = psutil.Process(process.pid)
    # Each look opens files; a look every tenth of a second reads about five times as much.
    began, before = seen.io_counters().read_count, seen.cpu_times()
    wait_until(lambda: seen.num_ctx_switches().voluntary > 60, "it has looked for some seconds")
    used = seen.cpu_times()
    assert seen.io_counters().read_count - began < 400
    assert used.user + used.system - before.user - before.system < allowed_s(0.5)
    (app.folder / "gate").touch()
