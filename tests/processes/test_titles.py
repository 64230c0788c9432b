"""What `ps aux` shows of our processes, with the package setproctitle and without it."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.app import wait_until

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"), pytest.mark.real_starts]

SOURCE = """
    import os, pathlib, subprocess, sys, time
    from bgsupervisor import Task, current, task

    def wait_for_file(name):
        while not pathlib.Path(name).exists():
            time.sleep(0.01)

    class ImportInvoices(Task):
        def run(self, secret: str) -> None:
            wait_for_file("end")

    @task
    def calls_itself() -> None:
        import setproctitle
        setproctitle.setproctitle("mine")
        wait_for_file("end")

    @task
    def environment() -> list[str]:
        other = subprocess.run([sys.executable, "-c", "import os; print(os.environ['MARK'])"], capture_output=True)
        return [os.environ["MARK"], other.stdout.decode().strip()]

    @task
    def waits(id: int) -> int:
        return current().wait_for(id)
"""


def titles(pid):
    """Return the titles of a process and all below it."""
    found = []
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().rstrip(b"\0").decode()
        found.append(words.replace("\0", " "))
    return found


def shown(pid, title):
    return title in titles(pid)


@pytest.fixture(params=["fork", "spawn"])
def app(make_app, request):
    return make_app(SOURCE, start_method=request.param, spares=1, reuse=10, slots=2)


def test_ps_aux_shows_what_each_process_is(app):
    pid = app.start().process.pid
    wait_until(lambda: shown(pid, "bgsupervisor: idle child"), "there is an idle child")
    assert titles(pid)[0] == f"bgsupervisor: supervisor {app.config}"
    assert titles(pid).count("bgsupervisor: fork server") == 1

    handle = app.service.request("appx:ImportInvoices", {"secret": "hush"}, key="customer-7")
    record = app.started(handle)
    wait_until(lambda: titles(record.pid)[0] == f"bgsupervisor: task {handle.id} ImportInvoices", "the task is shown")
    everything = subprocess.run(["ps", "auxww"], capture_output=True, text=True, check=True).stdout
    assert f"bgsupervisor: task {handle.id} ImportInvoices" in everything
    assert "hush" not in everything
    assert "customer-7" not in everything

    waiter = app.service.request("appx:waits", {"id": handle.id})
    wait_until(lambda: shown(pid, "bgsupervisor: wait manager"), "the wait manager is shown")
    (app.folder / "end").touch()
    app.wait(handle)
    app.wait(waiter)
    wait_until(lambda: titles(record.pid)[0] == "bgsupervisor: idle child", "it is idle again")


def test_a_body_may_call_itself_what_it_likes(app):
    app.start()
    handle = app.service.request("appx:calls_itself")
    record = app.started(handle)
    wait_until(lambda: titles(record.pid)[0] == "mine", "its own title is shown")
    (app.folder / "end").touch()

    assert app.wait(handle).status == "DONE"
    wait_until(lambda: titles(record.pid)[0] == "bgsupervisor: idle child", "it is idle again")


def test_a_titled_process_keeps_its_environment(app):
    app.start(environment={"MARK": "kept"})
    handle = app.service.request("appx:environment")
    app.wait(handle)

    assert app.service.result(handle) == ["kept", "kept"]


def test_run_without_the_package_keeps_its_command_line(make_app):
    app = make_app(SOURCE)
    folder = app.folder / "without"
    folder.mkdir()
    (folder / "setproctitle.py").write_text("raise ImportError")
    pid = app.start(environment={"PYTHONPATH": str(folder)}).process.pid
    handle = app.service.request("appx:ImportInvoices", {"secret": ""})
    app.started(handle)

    assert not [one for one in titles(pid) if "bgsupervisor:" in one]
    assert f"--config {app.config} run" in titles(pid)[0]
    (app.folder / "end").touch()
    assert app.wait(handle).status == "DONE"
