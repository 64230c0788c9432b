"""Where a supervisor's log goes: to its file always, to stderr where something collects it, to nobody's terminal."""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import LIMIT_S, Supervising, wait_until
from pace import allowed_s

from bgsupervisor import logs
from bgsupervisor.cli import run as running
from bgsupervisor.oom import INITIAL_PID_NAMESPACE
from bgsupervisor.statuses import Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

SOURCE = """
    import sys
    from bgsupervisor import task

    print("printed at the import", flush=True)
    print("complained at the import", file=sys.stderr, flush=True)

    @task
    def word() -> str:
        print("printed by the body")
        return "old"
"""
SUPERVISING = "INFO supervising "


@pytest.fixture(params=["fork", "spawn"])
def app(make_app, request):
    return make_app(SOURCE, start_method=request.param, spares=0)  # none loads while the terminal closes


@pytest.fixture
def plain_app(make_app):
    return make_app(SOURCE)


def log_of(app):
    path = app.state_dir / "logs" / "supervisor.log"
    return path.read_text() if path.exists() else ""


def performs(app):
    handle = app.service.request("appx:word")
    return app.wait(handle).status is Status.DONE and app.service.result(handle)


def test_run_without_a_terminal_logs_to_its_file_alone(plain_app):
    supervising = plain_app.start()

    assert supervising.output.read_text() == ""
    assert log_of(plain_app).count(SUPERVISING) == 1
    assert "printed at the import" in log_of(plain_app)


def test_run_that_logs_to_stderr_has_each_line_in_its_file_too(plain_app):
    supervising = plain_app.start("--log-to-stderr")
    assert performs(plain_app)
    supervising.stop()

    shown, kept = supervising.output.read_text(), log_of(plain_app)
    assert shown.count(SUPERVISING) == kept.count(SUPERVISING) == 1
    assert [line for line in shown.splitlines() if re.match(r"\S+ \S+ [A-Z]+ ", line)] == kept.splitlines()
    assert "leaving: SIGTERM came" in kept
    assert "printed at the import" in shown
    assert (plain_app.state_dir / "logs" / "supervisor.log").stat().st_mode & 0o777 == 0o640


def test_run_under_a_service_manager_logs_to_stderr(plain_app, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify.sock"))
        supervising = plain_app.start(environment={"NOTIFY_SOCKET": str(tmp_path / "notify.sock")})
        supervising.stop()

    assert supervising.output.read_text().count(SUPERVISING) == log_of(plain_app).count(SUPERVISING) == 1


@pytest.mark.parametrize(
    ("pid", "parent", "namespace", "is_first"),
    [
        (1, 0, INITIAL_PID_NAMESPACE + 1, True),
        (7, 1, INITIAL_PID_NAMESPACE + 1, True),  # below tini, or `docker run --init`
        (8, 7, INITIAL_PID_NAMESPACE + 1, False),  # cron in a container
        (4711, 1, INITIAL_PID_NAMESPACE, False),  # an orphan of this machine
    ],
)
def test_run_as_the_first_in_a_container_logs_to_stderr(monkeypatch, pid, parent, namespace, is_first):
    monkeypatch.setattr(running.os, "getpid", lambda: pid)
    monkeypatch.setattr(running.os, "getppid", lambda: parent)
    monkeypatch.setattr(running, "pid_namespace", lambda: namespace)

    assert running._is_first_in_container() is is_first


@pytest.mark.of_sqlite
def test_an_error_that_ends_run_is_on_stderr_once_and_in_the_file(plain_app):
    (plain_app.folder / "bgsupervisor.db").write_bytes(b"this is no database, but a text of some length" * 100)
    done = plain_app.cli("run", "--log-to-stderr")

    assert done.returncode == 1
    assert done.stderr.count("is damaged") == log_of(plain_app).count("is damaged") == 1


OTHER_TERMINAL = "from bgsupervisor.cli import main; main()"
OWN_TERMINAL = f"import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); {OTHER_TERMINAL}"
"""A session's leader that opens a terminal gets it as its own, and SIGHUP when it is closed."""


def test_a_crash_of_run_is_on_stderr_and_in_the_file(plain_app):
    crash = f"from bgsupervisor.supervisor import Supervisor; Supervisor.run = lambda self: 1 / 0; {OTHER_TERMINAL}"
    done = subprocess.run(
        [sys.executable, "-c", crash, "--config", str(plain_app.config), "run", "--log-to-stderr"],
        env=plain_app.environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError: ") == log_of(plain_app).count("ZeroDivisionError: ") == 1


class Terminal:
    """A terminal with a supervisor in it, as a session of its own."""

    def __init__(self, app, *, hears_hup):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL if hears_hup else OTHER_TERMINAL, "--config", str(app.config), "run"],
            cwd=app.folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=app.environment(),
            start_new_session=True,
        )
        os.close(slave)
        app.supervisors.append(Supervising(self.process, app.config))
        self.text = ""
        os.set_blocking(self.master, False)

    def read(self):
        with contextlib.suppress(BlockingIOError):
            self.text += os.read(self.master, 65536).decode()
        return self.text

    def close(self):
        os.close(self.master)


@pytest.mark.parametrize("hears_hup", [True, False])
def test_run_whose_terminal_was_closed_supervises_on_and_logs_to_its_file(app, hears_hup):
    terminal = Terminal(app, hears_hup=hears_hup)
    wait_until(lambda: "loaded 1 task" in terminal.read(), "the application is loaded")
    assert "complained at the import" in terminal.read()
    assert SUPERVISING in log_of(app)
    assert performs(app) == "old"

    terminal.close()
    if hears_hup:
        wait_until(lambda: log_of(app).count("loaded 1 task") == 2, "SIGHUP has it reload")
    for _ in range(4):  # also the children that are forked only now
        assert performs(app) == "old"

    app.write(SOURCE.replace('"old"', '"new"'))
    assert app.cli("reload").returncode == 0
    assert performs(app) == "new"
    assert "printed at the import" in log_of(app)
    assert terminal.process.poll() is None
    log = log_of(app)
    assert "Traceback" not in log
    assert "Logging error" not in log
    assert "Input/output error" not in log
    lines = [line for line in log.splitlines() if " INFO " in line]
    assert len(lines) == len(set(lines)), "no line is there twice"
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(LIMIT_S) == 0
    assert "leaving: SIGTERM came" in log_of(app)


def test_dead_output_is_replaced_and_living_output_is_not(tmp_path):
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from bgsupervisor.logs import leave_dead_output\n"
        "path = Path(sys.argv[1])\n"
        "print(leave_dead_output(path), flush=True)\n"
        "sys.stdin.read()\n"
        "print(leave_dead_output(path), flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"False\n"
    process.stdout.close()
    process.stdin.close()

    assert process.wait(LIMIT_S) == 0
    assert (tmp_path / "log").read_text() == "True\n"


def test_leave_dead_output_is_cheap():
    started = time.perf_counter()
    for _ in range(1000):
        assert not logs.leave_dead_output(None)

    assert time.perf_counter() - started < allowed_s(1)
