"""What a body leaves when it ends: copies of its process, open files, output, and what it said on the way out."""

from __future__ import annotations

import gzip
import signal
import time
import zipfile

import pytest
from support.app import App, wait_until

BODIES = r"""
import asyncio, atexit, bz2, gc, gzip, io
import multiprocessing, os, signal, subprocess, sys, tarfile, threading, time, zipfile
from pathlib import Path
from sys import stdout as imported_stdout
from bgsupervisor import Service, Task, current, task

FOLDER = Path(__file__).parent
opened_at_import = open(FOLDER / "imported.txt", "w")
opened_at_import.write("import ")

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def leave(how):
    if how == "raises":
        raise ValueError("only a copy")
    if how == "exits":
        sys.exit(3)
    if how == "speaks":
        sys.exit("a farewell")
    if how == "is modest":
        sys.exit(-1)

@task
def forks(how: str) -> int:
    pid = os.fork()
    if pid:
        return ended(pid)
    print("unfinished", end="")
    globals()["kept"] = open(FOLDER / f"copy-{current().id}.txt", "w")
    kept.write("of the copy")
    leave(how)

@task
def forks_twice() -> int:
    pid = os.fork()
    if pid:
        return ended(pid)
    inner = os.fork()
    if inner:
        sys.exit(ended(inner) + 1)
    sys.exit(4)

@task
async def forks_in_a_loop(how: str) -> int:
    pid = os.fork()
    if not pid:
        leave(how)
        return -1
    code = await asyncio.to_thread(ended, pid)
    await asyncio.to_thread(time.sleep, 0)
    return code

@task
async def forks_below_a_loop(how: str) -> int:
    async def below():
        pid = os.fork()
        if not pid:
            leave(how)
        return pid
    pid = await below()
    if not pid:
        return -1
    return await asyncio.to_thread(ended, pid)

class ForksWithinALock(Task):
    def run(self) -> list[int]:
        codes = []
        with self.lock("copied"):
            for how in ("returns", "raises"):
                pid = os.fork()
                if pid == 0:
                    break
                codes.append(ended(pid))
            if pid:
                (FOLDER / f"within-{self.id}").touch()
                while not (FOLDER / f"go-{self.id}").exists():
                    time.sleep(0.01)
            else:
                leave(how)
        return codes

class NeedsTheLock(Task):
    def run(self):
        with self.lock("copied"):
            return time.time()

@task
def forks_with_workers() -> list[int]:
    pool = multiprocessing.get_context("fork").Pool(2)
    process = multiprocessing.get_context("fork").Process(target=sys.exit, args=(6,))
    process.start()
    pid = os.fork()
    if not pid:
        return
    process.join()
    return [ended(pid), process.exitcode, *pool.map(abs, [-1, -2])]

@task
def forks_with_a_callback() -> int:
    atexit.register(print, "called back")
    pid = os.fork()
    return ended(pid) if pid else 0

def set_up():
    if (FOLDER / "set-up-forks").exists():
        pid = os.fork()
        if pid:
            ended(pid)

@task
def counts_its_runs():
    with open(FOLDER / "runs.txt", "a") as file:
        file.write("x")

def text_kept(path):
    file = open(path, "w")
    file.write("the text")
    return file

def in_a_cycle(path):
    file = text_kept(path)
    cycle = [file]
    cycle.append(cycle)

def zipped(path):
    archive = zipfile.ZipFile(path, "w")
    archive.writestr("member", "the text")
    return archive

def tarred(path):
    archive = tarfile.open(path, "w:gz")
    archive.add(__file__, "member")
    return archive

def compressed_text(path):
    file = gzip.open(path, "wt")
    file.write("the text")
    return file

def compressed(path):
    file = bz2.open(path, "wb")
    file.write(b"the text")
    return file

def read_and_write(path):
    file = open(path, "w+b")
    file.write(b"the text")
    return file

def in_a_closure(path):
    file = text_kept(path)
    return lambda: file

class Book:
    def __init__(self, path):
        self.file = open(path, "w")
        self.itself = self

    def __del__(self):
        self.file.write("the text")
        self.file.close()

def by_a_finalizer(path):
    gc.disable()
    Book(path)

KINDS = {one.__name__: one for one in
         (by_a_finalizer, text_kept, in_a_cycle, zipped, tarred, compressed_text, compressed, read_and_write,
          in_a_closure)}

@task
def leaves_open(kind: str, path: str):
    globals()["kept"] = KINDS[kind](path)

@task
def leaves_open_and_raises(path: str):
    leaves_open("text_kept", path)
    raise ValueError("though it has written")

@task
def leaves_a_pipe_full(limit_s: float | None = None):
    reading, writing = os.pipe()
    globals()["kept"] = [reading, open(writing, "w", buffering=1 << 20)]
    kept[1].write("x" * 500_000)

@task
def writes_at_the_end(path: str):
    file = text_kept(path)
    atexit.register(file.write, " and more")

@task
def leaves_a_variable_to_a_callback():
    import contextvars
    variable = contextvars.ContextVar("left")
    variable.set("as the body left it")
    atexit.register(lambda: print(variable.get("unset")))

@task
def forks_in_a_callback():
    print("begun")
    atexit.register(lambda: os.fork())

@task
def writes_to_what_was_imported(text: str):
    opened_at_import.write(text)

@task
def prints_in_pieces(end: str):
    print(".", end="")
    sys.stdout.buffer.write(b"b")
    imported_stdout.write("i")
    print("e", end="", file=sys.stderr)
    subprocess.run(["printf", "s"], check=True)
    (FOLDER / f"printed-{current().id}").touch()
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while not (FOLDER / f"go-{current().id}").exists():
        time.sleep(0.01)

@task
def redirects() -> str:
    import contextlib
    with contextlib.redirect_stdout(io.StringIO()) as there:
        print("there")
    print("here")
    return there.getvalue()

class Strange:
    def __str__(self):
        raise ValueError("no text")

@task
def exits(what: str):
    sys.exit({"text": "disk quota reached", "empty": "", "none": None, "object": ["a", 1], "300": 300, "-1": -1,
              "true": True, "huge": 1 << 80, "strange": Strange()}[what])

@task
def raises_without_a_word():
    raise ValueError("in silence")

@task
def is_silent():
    pass

@task
def leaves_an_alarm(handled: bool = False):
    def ring(number, frame):
        raise TimeoutError("too late")
    if handled:
        signal.signal(signal.SIGALRM, ring)
    atexit.register(time.sleep, 0.3)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.2)
    signal.setitimer(signal.ITIMER_PROF, 0.2)
    globals()["child"] = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 0.7"])  # ended after the body
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    app = App(tmp_path_factory.mktemp("ends"), BODIES, spares=3, child_setup="appx:set_up")
    try:
        app.start()
        yield app
    finally:
        app.end()


def run(app, body, **data):
    return app.wait(app.service.request(f"appx:{body}", data))


def result(app, body, **data):
    record = run(app, body, **data)
    assert record.status == "DONE", record
    return app.service.result(record.id), record


# ---- copies ----


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("returns", 0, "unfinished"),
        ("raises", 1, "ValueError: only a copy"),
        ("exits", 3, "unfinished"),
        ("speaks", 1, "a farewell"),
        ("is modest", 255, "unfinished"),
    ],
)
def test_a_copy_ends_as_in_plain_python(app, how, code, said):
    value, record = result(app, "forks", how=how)
    assert value == code
    log = app.log_of(record)
    assert log.startswith("unfinished")
    assert said in log
    assert ("Traceback" in log) == (how == "raises")
    assert (app.folder / f"copy-{record.id}.txt").read_text() == "of the copy"


def test_a_copy_of_a_copy_ends_as_in_plain_python(app):
    assert result(app, "forks_twice")[0] == 5


@pytest.mark.parametrize("body", ["forks_in_a_loop", "forks_below_a_loop"])
@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("raises", 1), ("exits", 3)])
def test_a_copy_in_an_async_body_leaves_the_loop_to_the_original(app, body, how, code):
    assert result(app, body, how=how)[0] == code


def test_a_copy_that_leaves_a_lock_does_not_free_it(app):
    holder = app.service.request("appx:ForksWithinALock")
    wait_until((app.folder / f"within-{holder.id}").exists, "both copies have left the lock")
    other = app.service.request("appx:NeedsTheLock")
    app.started(other)
    wait_until(lambda: "waited" in app.cli("why", str(other.id)).stdout, "the other task waits for the lock")
    assert app.service.get(other).status == "START"
    freed_at = time.time()
    (app.folder / f"go-{holder.id}").touch()
    app.wait(other)
    app.wait(holder)
    assert app.service.result(other.id) >= freed_at
    assert app.service.result(holder.id) == [0, 1]


def test_a_copy_does_not_end_the_workers_of_the_original(app):
    assert result(app, "forks_with_workers")[0] == [0, 6, 1, 2]


def test_a_copy_runs_its_exit_callbacks(app):
    value, record = result(app, "forks_with_a_callback")
    assert value == 0
    wait_until(lambda: app.log_of(record) == "called back\n" * 2, "copy and original have called back")


def test_a_copy_of_the_child_set_up_runs_no_body(app):
    (app.folder / "set-up-forks").touch()
    try:
        result(app, "counts_its_runs")
    finally:
        (app.folder / "set-up-forks").unlink()
    assert (app.folder / "runs.txt").read_text() == "x"


# ---- files ----


def content(path, kind):
    if kind == "zipped":
        return zipfile.ZipFile(path).read("member").decode()
    if kind == "compressed_text":
        return gzip.open(path, "rt").read()
    if kind == "compressed":
        import bz2

        return bz2.open(path, "rt").read()
    if kind == "tarred":
        import tarfile

        with tarfile.open(path) as archive:
            assert archive.getnames() == ["member"]
        return "the text"
    return path.read_text()


@pytest.mark.parametrize(
    "kind",
    [
        "by_a_finalizer",
        "text_kept",
        "in_a_cycle",
        "in_a_closure",
        "read_and_write",
        "zipped",
        "tarred",
        "compressed_text",
        "compressed",
    ],
)
def test_an_open_file_is_complete_once_its_task_is_done(app, kind):
    path = app.folder / f"left-{kind}"
    result(app, "leaves_open", kind=kind, path=str(path))
    assert content(path, kind) == "the text"


def test_an_open_file_on_a_full_disk_keeps_the_task_from_done(app):
    record = run(app, "leaves_open", kind="text_kept", path="/dev/full")
    assert (record.status, record.reason) == ("INTERRUPTED", "RAISED"), record
    assert record.detail.startswith("OSError: [Errno 28] No space left on device; the body left this file open")
    assert record.detail.endswith("'/dev/full'")


def test_an_archive_on_a_full_disk_keeps_the_task_from_done(app):
    record = run(app, "leaves_open", kind="compressed", path="/dev/full")
    assert (record.status, record.reason) == ("INTERRUPTED", "RAISED"), record
    assert record.detail.startswith("OSError: [Errno 28] No space left on device; the body left this file open")
    assert record.detail.endswith("'/dev/full'")


def test_an_open_file_of_a_body_that_raises_is_written(app):
    path = app.folder / "left-raised"
    record = run(app, "leaves_open_and_raises", path=str(path))
    assert record.detail == "ValueError: though it has written"
    assert path.read_text() == "the text"


def test_an_exit_callback_may_write_to_an_open_file(app):
    path = app.folder / "left-to-callback"
    result(app, "writes_at_the_end", path=str(path))
    wait_until(lambda: path.read_text() == "the text and more", "the exit callback has written")


def test_an_exit_callback_finds_the_variables_of_the_body(app):
    _, record = result(app, "leaves_a_variable_to_a_callback")
    wait_until(lambda: app.log_of(record) == "as the body left it\n", "the exit callback has printed")


def test_a_copy_that_an_exit_callback_forks_leaves_the_log_alone(app):
    _, record = result(app, "forks_in_a_callback")
    assert app.log_of(record) == "begun\n"


def test_a_body_that_leaves_a_full_pipe_can_be_cancelled(app):
    handle = app.service.request("appx:leaves_a_pipe_full")
    record = app.started(handle)
    stack = lambda: app.cli("stack", str(record.id)).stdout  # noqa: E731
    wait_until(lambda: "leftovers.py" in stack(), "the child writes into the full pipe")
    app.service.cancel(handle, by="jana")
    record = app.wait(handle)
    assert (record.status, record.reason) == ("INTERRUPTED", "CANCELLED"), record
    assert "SIGKILL" not in record.detail


def test_a_file_of_the_import_is_written_once_by_each_process(make_app):
    app = make_app(BODIES, spares=2)
    app.start()
    for number in range(3):
        result(app, "writes_to_what_was_imported", text=f"{number} ")
    assert sorted((app.folder / "imported.txt").read_text().split()) == ["0", "1", "2", "import"]


def test_a_spawned_child_writes_what_its_body_left_open(make_app):
    app = make_app(BODIES, spares=0, start_method="spawn")
    app.start()
    path = app.folder / "left"
    result(app, "leaves_open", kind="text_kept", path=str(path))
    assert path.read_text() == "the text"
    result(app, "writes_to_what_was_imported", text="1 ")
    assert "1 " in (app.folder / "imported.txt").read_text()


# ---- output ----


@pytest.mark.parametrize("end", ["killed", "returns"])
def test_output_without_a_line_end_is_in_the_log_at_once(app, end):
    handle = app.service.request("appx:prints_in_pieces", {"end": end})
    wait_until((app.folder / f"printed-{handle.id}").exists, "the body has printed")
    if end == "returns":
        assert app.cli("log", str(handle.id)).stdout == ".bies"
        (app.folder / f"go-{handle.id}").touch()
    record = app.wait(handle)
    assert record.signal == (signal.SIGKILL if end == "killed" else None)
    assert app.log_of(record) == ".bies"


def test_a_body_may_redirect_its_output(app):
    value, record = result(app, "redirects")
    assert (value, app.log_of(record)) == ("there\n", "here\n")


# ---- exit texts ----


@pytest.mark.parametrize(
    ("what", "code", "detail"),
    [
        ("text", 1, "the body called sys.exit with code 1: disk quota reached"),
        ("empty", 1, "the body called sys.exit with code 1: an empty text"),
        ("none", 0, "the body called sys.exit with code 0"),
        ("object", 1, "the body called sys.exit with code 1: ['a', 1]"),
        ("300", 44, "the body called sys.exit with code 300, of which a process keeps the low 8 bits: 44"),
        ("-1", 255, "the body called sys.exit with code -1, of which a process keeps the low 8 bits: 255"),
        ("true", 1, "the body called sys.exit with code 1"),
        ("strange", 1, "the body called sys.exit with code 1: <Strange that cannot be shown>"),
    ],
)
def test_an_exit_is_told_with_its_text_or_code(app, what, code, detail):
    record = run(app, "exits", what=what)
    assert (record.reason, record.exit_code, record.detail) == ("EXITED", code, detail)


def test_an_exit_with_a_huge_code_is_told_briefly(app):
    record = run(app, "exits", what="huge")
    assert (record.reason, record.exit_code) == ("EXITED", 0)
    assert len(record.detail) < 120


def test_log_of_a_raised_task_without_output_names_its_traceback(app):
    record = run(app, "raises_without_a_word")
    for path in (app.state_dir / "logs").glob(f"task-{record.id}-*"):
        path.unlink()
    shown = app.cli("log", str(record.id))
    assert (shown.returncode, shown.stdout) == (0, "")
    assert shown.stderr == (
        f"task {record.id} has printed nothing; `bgsupervisor show {record.id}` prints its traceback\n"
    )
    assert "ValueError: in silence" in app.cli("show", str(record.id)).stdout


def test_log_of_a_done_task_without_output_names_no_traceback(app):
    record = run(app, "is_silent")
    assert app.cli("log", str(record.id)).stderr == f"task {record.id} has printed nothing\n"


# ---- timers ----


@pytest.mark.parametrize("handled", [False, True])
def test_a_timer_left_behind_does_not_change_the_end(app, handled):
    record = run(app, "leaves_an_alarm", handled=handled)
    assert record.status == "DONE", record
    assert record.signal is None
