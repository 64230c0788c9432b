"""No test leaves anything behind: what these tests hold themselves to, shown to work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from support.app import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

HERE = Path(__file__).parents[1]
SLEEPS = "import sys, time; sys.stdout.write('there\\n'); sys.stdout.flush(); time.sleep(300)"


def run(folder, source, *options):
    """Run tests that are held to the same, and return what pytest says, with its exit code."""
    (folder / "test_it.py").write_text(textwrap.dedent(source))
    (folder / "conftest.py").write_text("from support import left_behind\nleft_behind.LEAVE_S = 1.0\n")
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "support.left_behind",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [*command, f"--basetemp={folder / 'temporary'}", "test_it.py", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def outcomes(done):
    return done.stdout.splitlines()[-1].strip("= ").partition(" in ")[0]


def test_failed_test_that_leaves_a_process_is_told_its_command_line_and_the_next_passes(tmp_path):
    source = f"""
        import pathlib, subprocess, sys

        def test_fails():
            process = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], stdout=subprocess.PIPE, text=True)
            pathlib.Path("pid").write_text(str(process.pid))
            assert process.stdout.readline() == "something else"

        def test_next():
            pass
    """
    done = run(tmp_path, source)

    assert outcomes(done) == "1 failed, 1 passed, 1 error", done.stdout
    pid = int((tmp_path / "pid").read_text())
    assert f"left processes behind, killed now: PID {pid}: {sys.executable} -c import sys, time" in done.stdout
    wait_until(lambda: not psutil.pid_exists(pid), "whoever reaps orphans has reaped it")


@pytest.mark.parametrize("where", ["working folder", "command line", "environment"])
def test_stopped_process_whose_parent_is_dead_is_found_by_its_folder_and_killed(tmp_path, where):
    source = f"""
        import os, pathlib, signal, subprocess, sys

        def test_passes(tmp_path):
            named = {where!r}
            sleeps = [sys.executable, "-c", {SLEEPS!r}, *([str(tmp_path / "x")] if named == "command line" else [])]
            options = {{"cwd": str(tmp_path) if named == "working folder" else "/"}}
            options["env"] = {{"CONFIG": str(tmp_path / "x")}} if named == "environment" else {{}}
            starts = "import os, signal, subprocess; p = subprocess.Popen(" + repr(sleeps)
            starts += ", start_new_session=True, stdout=-1, **" + repr(options) + "); p.stdout.readline(); "
            starts += "os.kill(p.pid, signal.SIGSTOP); print(p.pid, flush=True); os._exit(0)"
            done = subprocess.run([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True, env={{}}, cwd="/")
            pathlib.Path("pid").write_text(done.stdout)
    """
    done = run(tmp_path, source)

    assert outcomes(done) == "1 passed, 1 error", done.stdout
    pid = int((tmp_path / "pid").read_text())
    assert f"killed now: PID {pid}: " in done.stdout
    wait_until(lambda: not psutil.pid_exists(pid), "whoever reaps orphans has reaped it")


def test_process_that_leaves_by_itself_soon_is_no_failure(tmp_path):
    done = run(tmp_path, "import os\ndef test_passes():\n    os.posix_spawn('/bin/sleep', ['sleep', '0.3'], {})\n")

    assert outcomes(done) == "1 passed", done.stdout


@pytest.mark.parametrize("ends_it", [True, False])
def test_process_of_a_module_may_outlive_a_test_and_not_the_module(tmp_path, ends_it):
    source = f"""
        import pytest, subprocess, time

        @pytest.fixture(scope="module")
        def shell(tmp_path_factory):
            options = {{"cwd": tmp_path_factory.mktemp("shared"), "stdin": subprocess.PIPE, "text": True}}
            process = subprocess.Popen(["sh"], start_new_session=True, **options)
            yield process
            with process.stdin:
                process.stdin.write("kill -9 0" if {ends_it} else "exec sleep 300")
            if {ends_it}:
                process.wait()

        @pytest.mark.parametrize("number", range(2))
        def test_starts_a_child_of_it(shell, number):
            shell.stdin.write("sleep 300 &\\n")
            shell.stdin.flush()
            time.sleep(0.2)
    """
    done = run(tmp_path, source)

    assert outcomes(done) == ("2 passed" if ends_it else "2 passed, 1 error"), done.stdout
    assert ends_it or "the module left processes behind, killed now: PID " in done.stdout


def test_server_of_the_session_may_outlive_the_test_that_started_it(tmp_path):
    source = """
        import pytest, subprocess
        from support import left_behind

        @pytest.fixture(scope="session")
        def server():
            process = subprocess.Popen(["sleep", "300"])
            left_behind.SHARED.add(process.pid)
            yield
            process.kill()
            process.wait()

        @pytest.mark.parametrize("number", range(2))
        def test_passes(request, number):
            request.getfixturevalue("server")
    """
    done = run(tmp_path, source)

    assert outcomes(done) == "2 passed", done.stdout


def test_teardown_that_fails_after_its_test_brings_down_no_other(tmp_path):
    source = """
        import subprocess, pytest

        @pytest.fixture
        def torn():
            yield
            raise ValueError

        def test_fails(torn):
            process = subprocess.Popen(["sleep", "300"], stdout=subprocess.PIPE)
            assert process is None

        def test_next():
            pass
    """
    done = run(tmp_path, source)

    assert outcomes(done) == "1 failed, 1 passed, 1 error", done.stdout


def test_object_that_was_not_closed_fails_its_own_test_and_not_a_later_one(tmp_path):
    source = """
        import socket

        def test_leaves_a_socket_in_a_cycle():
            class Cycle:
                pass
            cycle = Cycle()
            cycle.itself, cycle.socket = cycle, socket.socket()

        def test_next():
            import gc
            gc.collect()
    """
    done = run(tmp_path, source)

    assert outcomes(done) == "2 passed, 1 error", done.stdout
    assert "test_leaves_a_socket_in_a_cycle" in done.stdout.splitlines()[-2]


def test_programs_start_with_the_default_action_of_ctrl_c_where_it_is_ignored(tmp_path):
    source = """
        import os, signal, subprocess

        def test_passes():
            os.kill(os.getpid(), signal.SIGINT)  # it goes on ignoring
            process = subprocess.Popen(["sleep", "300"])
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == -signal.SIGINT
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = run(tmp_path, source)
    finally:
        signal.signal(signal.SIGINT, before)

    assert outcomes(done) == "1 passed", done.stdout
