"""`bgsupervisor dev`: what it prints, how it loads changed code, and that nothing lives after it."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.app import LIMIT_S, Supervising, wait_until

from bgsupervisor.cli.dev.code_changes import Changes
from bgsupervisor.cli.dev.following import Lines
from bgsupervisor.config import load
from bgsupervisor.ledger import Ledger
from bgsupervisor.ledger.requests import Request
from bgsupervisor.supervisor import portable
from bgsupervisor.testing import FakeClock

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

SOURCE = """
import signal, subprocess, time
from bgsupervisor import Task, task

VERSION = "old"

@task
def greet(name: str) -> str:
    print("hello", name)
    print("a line that never ends", end="")
    return VERSION

@task
def fail() -> None:
    raise ValueError("no such invoice")

class Long(Task):
    def run(self) -> None:
        print("begun", flush=True)
        while True:
            self.progress()
            time.sleep(0.05)

class Starter(Task):
    def run(self) -> None:
        subprocess.Popen(["sleep", "300"])
        print("begun", flush=True)
        while True:
            self.progress()
            time.sleep(0.05)

class Waiter(Task):
    def run(self, id: int) -> None:
        print("waits", flush=True)
        self.wait_for(id, timeout_s=300)

@task
def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("begun", flush=True)
    time.sleep(300)
"""
HIDING = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "watchfiles":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "watchfiles" else find_spec(name, package)
"""


class Dev(Supervising):
    """A running `dev`, its output, and all processes that it was seen to have."""

    def __init__(self, process, output):
        super().__init__(process, output)
        self.family = {}

    @property
    def text(self):
        self.see()
        return self.output.read_text()

    def see(self):
        """Remember the processes that live below it now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in psutil.Process(self.process.pid).children(recursive=True):
                self.family[one.pid] = one

    def says(self, pattern):
        return wait_until(lambda: re.search(pattern, self.text, re.MULTILINE), f"dev says {pattern!r}: {self.text}")

    def interrupt(self):
        self.see()
        self.process.send_signal(signal.SIGINT)

    def end(self):
        self.interrupt()
        return self.process.wait(LIMIT_S)

    def living(self):
        return [one for one in self.family.values() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def develop():
    """Start `dev` for an application, and wait until it has loaded the code."""
    started = []

    def start(app, *, environment=None, wait=True):
        output = app.folder / f"dev-{len(started)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), "dev"],
                cwd=app.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=app.environment(**(environment or {})),
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
        wait_until(lambda one=dev: not one.living(), "what dev had started has ended", limit_s=30)


def test_dev_prints_each_line_with_the_task_and_each_end(make_app, develop):
    app = make_app(SOURCE)
    dev = develop(app)
    app.wait(app.service.request("appx:greet", {"name": "Jana"}))
    dev.says(r"^1 greet DONE in \d+ms$")
    app.service.wait(app.service.request("appx:fail"), timeout_s=LIMIT_S)
    dev.says(r"^2 fail INTERRUPTED after \d+ms: RAISED: ValueError: no such invoice$")
    app.service.cancel(app.service.request("appx:greet", {"name": "later"}, delay_s=3600), by="jana")
    dev.says(r"^3 greet INTERRUPTED: CANCELLED: cancelled by jana before it began$")

    lines = dev.text.splitlines()

    assert lines[0].startswith("developing appx on ")
    assert lines[0].endswith("16 slots; Ctrl-C ends it, with the running tasks")
    assert lines[1:5] == [
        "loaded 6 tasks",
        "1 greet started",
        "1 greet | hello Jana",
        "1 greet | a line that never ends",
    ]
    assert lines[8] == "2 fail | Traceback (most recent call last):"
    assert dev.text.count("Traceback") == 1
    assert "\033" not in dev.text


def test_dev_folds_frames_of_libraries_where_the_log_has_no_traceback(make_app, develop):
    app = make_app(
        """
        import json, logging
        from bgsupervisor import task

        logging.basicConfig(filename="own.log")

        @task
        def fail() -> None:
            json.loads("{")
        """
    )
    dev = develop(app)
    app.wait(app.service.request("appx:fail"))
    dev.says(r"^1 fail \| json.decoder.JSONDecodeError: ")
    assert "1 fail |   ... 1 frame in bgsupervisor ..." in dev.text
    assert re.search(r"^1 fail \|   ... \d frames? in Python's library ...$", dev.text, re.MULTILINE)


def test_dev_at_ctrl_c_ends_all_tasks_and_leaves_no_process(make_app, develop):
    app = make_app(SOURCE)
    dev = develop(app)
    starter = app.service.request("appx:Starter")
    waiter = app.service.request("appx:Waiter", {"id": starter.id})
    dev.says(r"^1 Starter \| begun$")
    dev.says(r"^2 Waiter \| waits$")
    wait_until(lambda: app.service.get(waiter).slot is None, "the second task waits")
    wait_until((app.state_dir / "manager.sock").exists, "the wait manager is there")

    code = dev.end()

    assert code == 0
    assert len(dev.family) >= 6  # supervisor, fork server, wait manager, two children, sleep
    assert dev.living() == []
    assert [app.service.get(one).reason for one in (starter, waiter)] == ["STOPPED", "STOPPED"]
    assert re.search(r"^ending 1 \(appx:Starter\), 2 \(appx:Waiter\); Ctrl-C again kills$", dev.text, re.MULTILINE)
    assert re.search(r"^1 Starter INTERRUPTED after .*: STOPPED: ", dev.text, re.MULTILINE)
    assert re.search(r"^2 Waiter INTERRUPTED after .*: STOPPED: ", dev.text, re.MULTILINE)


def test_dev_at_a_second_ctrl_c_kills_a_task_that_does_not_end(make_app, develop):
    app = make_app(SOURCE, grace_s=300)
    dev = develop(app)
    deaf = app.service.request("appx:deaf")
    dev.says(r"^1 deaf \| begun$")

    dev.interrupt()
    dev.says("^ending 1 ")
    assert dev.process.poll() is None

    assert dev.end() == 0
    assert dev.living() == []
    assert app.service.get(deaf).reason == "STOPPED"
    assert "SIGKILL was sent" in app.service.get(deaf).detail


def test_dev_that_is_killed_takes_its_supervisor_and_tasks_along(make_app, develop):
    app = make_app(SOURCE)
    dev = develop(app)
    task = app.service.request("appx:Long")
    dev.says(r"^1 Long \| begun$")
    dev.see()

    dev.process.kill()
    dev.process.wait(LIMIT_S)

    wait_until(lambda: not dev.living(), "supervisor, fork server and children have ended", limit_s=30)
    assert app.service.get(task).reason == "STOPPED"


def test_dev_whose_supervisor_is_killed_leaves_with_1_and_no_process(make_app, develop):
    app = make_app(SOURCE)
    dev = develop(app)
    app.service.request("appx:Starter")
    dev.says(r"^1 Starter \| begun$")
    [supervisor] = psutil.Process(dev.process.pid).children()
    dev.see()

    supervisor.kill()

    assert dev.process.wait(LIMIT_S) == 1
    assert dev.living() == []
    assert "the supervisor has left, exit code -9" in dev.text


@pytest.mark.parametrize("watched", [True, False])
def test_dev_loads_changed_code_and_keeps_the_old_if_it_fails(make_app, develop, watched):
    app = make_app(SOURCE)
    (app.folder / "hiding").mkdir()
    (app.folder / "hiding" / "sitecustomize.py").write_text(HIDING)
    dev = develop(app, environment=None if watched else {"PYTHONPATH": str(app.folder / "hiding")})

    app.write(SOURCE + "import nothing_of_this_name\n")
    dev.says(r"^appx \| ModuleNotFoundError: No module named 'nothing_of_this_name'$")
    dev.says("^the old code goes on$")
    assert re.search(r"^appx failed to load\nappx \| Traceback ", dev.text, re.MULTILINE)
    old = app.service.request("appx:greet", {"name": "Jana"})
    app.wait(old)

    app.write(SOURCE.replace('"old"', '"mended"'))
    wait_until(lambda: dev.text.count("loaded 6 tasks") == 2, f"the mended code is loaded: {dev.text}")
    new = app.service.request("appx:greet", {"name": "Jana"})
    app.wait(new)

    assert (app.service.result(old), app.service.result(new)) == ("old", "mended")
    assert dev.end() == 0


def test_dev_of_code_that_does_not_load_says_so_and_goes_on_once_mended(make_app, develop):
    app = make_app("import nothing_of_this_name\n")
    dev = develop(app)

    dev.says(r"^appx \| ModuleNotFoundError")
    assert re.search("^loaded 0 tasks$", dev.text, re.MULTILINE)
    app.write(SOURCE)

    dev.says("^loaded 6 tasks$")


def test_dev_beside_a_supervisor_says_so_and_leaves_with_1(make_app, develop):
    app = make_app(SOURCE)
    supervisor = app.start()

    dev = develop(app, wait=False)

    assert dev.process.wait(LIMIT_S) == 1
    assert dev.text.count("\n") == 1
    assert f"cannot supervise: a supervisor is already running, PID {supervisor.process.pid}; " in dev.text
    assert supervisor.process.poll() is None


def test_dev_where_supervising_is_stopped_says_what_allows_it(make_app, develop):
    app = make_app(SOURCE)
    app.cli("stop")

    dev = develop(app, wait=False)

    assert dev.process.wait(LIMIT_S) == 1
    assert "`bgsupervisor start` allows it again" in dev.text


@pytest.mark.of_sqlite
def test_dev_without_a_usable_database_says_why_in_one_sentence(make_app, develop):
    app = make_app(SOURCE, database="sqlite:///missing/tasks.db", state_dir=".bgsupervisor")

    dev = develop(app, wait=False)

    assert dev.process.wait(LIMIT_S) == 1
    assert "Traceback" not in dev.text
    assert dev.text.splitlines()[-1].startswith("bgsupervisor: ")


def test_dev_on_a_terminal_has_colours_unless_no_color_is_set(make_app, develop):
    app = make_app(SOURCE)
    app.service.request("appx:greet", {"name": "Jana"})
    seen = {}
    for name, environment in (("colours", {}), ("none", {"NO_COLOR": "1"})):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "bgsupervisor", "--config", str(app.config), "dev"],
            cwd=app.folder,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=app.environment(TERM="xterm", **environment),
        )
        os.close(theirs)
        text = b""
        while b"loaded" not in text:
            text += os.read(ours, 4096)
        app.service.request("appx:fail")
        while b"no such invoice" not in text:
            text += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(LIMIT_S) == 0
        os.close(ours)
        seen[name] = text

    assert b"\033[" in seen["colours"]
    assert b"\033[" not in seen["none"]


PAGE = Path(__file__).parents[2] / "docs" / "developing.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def pattern_of(shown):
    """Return the pattern of what a page shows: durations and times differ, "..." is any lines."""
    text = re.escape(shown).replace(re.escape("...\n"), "(.*\\n)*?")
    text = re.sub(r"\d{4}\\-\d\d\\-\d\d\\ \d\d:\d\d:\d\d,\d+", r"[0-9-]+ [0-9:,]+", text)
    return re.compile(re.sub(r"(in|after)\\ \d+m?s", r"\1\\ [0-9.]+m?s", text))


def test_dev_prints_what_the_page_on_developing_shows(make_app, develop):
    app = make_app()
    requests, shown = blocks("console")
    (source,), (configuration,) = blocks("python"), blocks("toml")
    app.config.write_text(configuration + "grace_s = 1.0\n")
    app.write(source, "invoices")
    dev = develop(app)
    for line in requests.splitlines()[::2]:
        said = app.cli(*shlex.split(line)[2:])
        assert said.stdout in requests
        number = re.search(r"task (\d)", said.stdout)[1]
        dev.says(rf"^{number} \w+ (DONE|INTERRUPTED|\| watching)")
    app.write(source.replace("while True:", "while True"), "invoices")
    dev.says("^the old code goes on$")
    app.write(source, "invoices")
    wait_until(lambda: dev.text.count("loaded 3 tasks") == 2, f"the mended code is loaded: {dev.text}")

    assert dev.end() == 0

    seen = dev.text.replace(str(app.folder), "/home/jana/shop")
    assert pattern_of(shown.partition("\n")[2]).fullmatch(seen), seen


def test_page_on_developing_names_what_is_not_promised_elsewhere():
    listed = PAGE.read_text().split("does not promise:")[1]

    assert tuple(re.findall(r"^\* (.*)$", listed, re.MULTILINE)) == portable.PROMISES


def test_ended_since_gives_ends_from_that_moment_in_their_order(store):
    clock = FakeClock()
    ledger = Ledger(store, clock)
    ids = [ledger.request(Request(name="appx:greet", data="{}"))[0] for _ in range(3)]
    moments = []
    for id in reversed(ids):
        clock.advance(10)
        moments.append(clock.now())
        ledger.cancel(id, by=None)

    found = ledger.ended_since(moments[1], limit=10)

    assert [record.id for record in found] == [ids[1], ids[0]]
    assert found[0].detail == "cancelled before it began"
    assert [record.id for record in ledger.ended_since(moments[0], limit=2)] == [ids[2], ids[1]]


class StuckClock:
    """No look that is due by the clock ever comes."""

    def monotonic(self):
        return 0.0


def test_changes_by_watchfiles_are_found_before_a_look_is_due(make_app):
    app = make_app(SOURCE)
    config = load(app.config)
    changes = Changes(config, StuckClock())
    try:
        assert not changes.found(config)
        wait_until(lambda: (app.write(SOURCE + "#" * os.getpid()), changes.found(config))[1], "the change is seen")
        (app.folder / "other").write_text(SOURCE)
        (app.folder / "other").replace(app.folder / "appx.py")  # as editors do

        wait_until(lambda: changes.found(config), "the file in its place is seen")
        assert not changes.found(config)
    finally:
        changes.close()


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        (["a\nb", "c\n"], ["a", "bc"]),
        (["10%\r20%\r100%\n"], ["100%"]),
        (["from Windows\r\n"], ["from Windows"]),
        (["never ends"], ["never ends"]),
        (["\n\n"], ["", ""]),
    ],
)
def test_lines_of_pieces_are_whole_and_as_last_written(pieces, lines):
    cut = Lines()

    assert [line for piece in pieces for line in cut.of(piece)] + cut.rest() == lines
