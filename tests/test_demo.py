"""`make demo` is the first thing that people see: it tells the truth, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest
from conftest import wait_until

from bgsupervisor import Service

DEMO = Path(__file__).parent.parent / "examples/index/demo.py"
LIMIT_S = 50.0
MARK = "DEMO_TEST_MARK"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")


class Demo:
    """The demo on a folder of three small files; all its processes carry a mark in their environment."""

    def __init__(self, folder):
        self.source = folder / "source files"
        self.package = self.source / "parcel"
        self.package.mkdir(parents=True)
        (self.package / "__init__.py").write_text("class Parcel:\n    def weigh(self):\n        return 1\n")
        (self.package / "post.py").write_text("def send(parcel):\n    return parcel.weigh()\n")
        (self.source / "half_done.py").write_text("def broken(:\n")
        self.work = folder / "work"
        self.mark = uuid.uuid4().hex
        self.started = []

    def start(self, *, path=None):
        process = subprocess.Popen(
            [sys.executable, str(DEMO), "--work", str(self.work), str(path or self.source)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, MARK: self.mark, "BGSUPERVISOR_STATE_DIR": "/nowhere/of/the/shell"},
        )
        self.started.append(process)
        return process

    def left(self):
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


@pytest.fixture
def demo(tmp_path):
    demo = Demo(tmp_path)
    yield demo
    for process in demo.left():
        process.kill()
    for process in demo.started:
        process.communicate(timeout=LIMIT_S)


def test_demo_shows_the_three_endings_and_leaves_nothing_running(demo):
    process = demo.start()
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    assert demo.left() == []
    listing = output[output.index("ps --all") :]
    endings = {
        tuple(line.split()[1:5]) for line in listing.splitlines() if line.split()[:1] and line.split()[0].isdigit()
    }
    assert ("IndexPackage", "parcel", "DONE", "-") in endings
    assert ("IndexPackage", "half_done", "DONE", "-") in endings
    assert ("CheckDigests", "parcel", "INTERRUPTED", "SIGNALLED") in endings
    assert ("IndexPackage", "unfinished.py", "INTERRUPTED", "RAISED") in endings
    assert ("Report", "-", "DONE", "-") in endings
    assert "parcel             2          5          2          1" in output, output


def test_demo_reports_what_all_others_found_and_whom_it_lacks(demo):
    process = demo.start()
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    with contextlib.closing(Service(f"sqlite:///{demo.work / 'bgsupervisor.db'}")) as service:
        (report,) = service.list(name="tasks:Report")
        told = service.result(report.id)
    assert set(told["packages"]) == {"parcel", "half_done"}
    assert (told["total"]["files"], told["total"]["functions"], told["total"]["broken"]) == (3, 2, 1)
    assert "INTERRUPTED, SIGNALLED" in told["missing"]["CheckDigests"]
    assert "INTERRUPTED, RAISED" in told["missing"]["unfinished.py"]
    assert told["scanned"] == 3  # the one that raised had scanned its file before
    assert all(f"Not in it: {sentence}." in output for sentence in told["missing"].values())


def test_demo_that_is_interrupted_leaves_nothing_running(demo):
    process = demo.start()
    wait_until(lambda: (demo.work / "bgsupervisor.db").exists() and len(demo.left()) > 2, "the supervisor has children")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, output
    assert demo.left() == []


def test_demo_of_a_folder_without_python_files_says_so_and_fails(demo, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    process = demo.start(path=empty)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "holds no Python file; choose another folder" in output


def test_demo_does_not_clear_a_folder_that_it_did_not_make(demo):
    demo.work.mkdir()
    precious = demo.work / "precious"
    precious.write_text("mine")
    process = demo.start()
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert "is not empty" in output
    assert precious.read_text() == "mine"
