"""Bodies that do what bodies should not: the row is true, the next task is not harmed, nothing is left behind."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sqlite3
import time

import psutil
import pytest
from support.app import App, wait_until
from support.pace import allowed_s

pytestmark = pytest.mark.any_database

BODIES = r"""
import asyncio, atexit, concurrent.futures, contextlib, io, json, logging, multiprocessing, os, signal, socket
import sqlite3, subprocess, sys, threading, time
from pathlib import Path
from bgsupervisor import Service, Task, current, task

FOLDER = Path(__file__).parent

def mark(what, text=""):
    path = FOLDER / f"{what}-{current().id}"
    path.with_suffix(".new").write_text(str(text))
    path.with_suffix(".new").rename(path)

def for_ever():
    while True:
        time.sleep(600)

def double(number):
    return 2 * number

def umask():
    mask = os.umask(0o77)
    os.umask(mask)
    return mask

def daemon():
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.write(writing, str(os.getpid()).encode())
            for_ever()
        os._exit(0)
    os.wait()
    return int(os.read(reading, 20))

@task
def returns(value: int = 1) -> int:
    return value

def begin(name):
    connection = sqlite3.connect(FOLDER / name, isolation_level=None, timeout=2)
    connection.execute("CREATE TABLE IF NOT EXISTS own (number)")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO own VALUES (1)")
    return connection

@task
def leaves_a_transaction(how: str, name: str = "bgsupervisor.db") -> int:
    global kept
    connection = begin(name)
    if how == "raises":
        raise ValueError("in the middle of a transaction")
    if how == "keeps":
        kept = connection
    if how == "another thread":  # sqlite3 lets nobody else roll it back
        thread = threading.Thread(target=begin, args=("other.db",))
        connection.rollback()
        thread.start()
        thread.join()
    return os.getpid()

@task
def begins_a_transaction(name: str) -> int:
    begin(name).rollback()
    return os.getpid()

@task
def returns_object():
    return object()

@task
def returns_nan():
    return {"rates": [1.0, float("nan")]}

@task
def returns_too_much():
    return "x" * 300_000

@task
def returns_half_a_surrogate():
    return "\udcff"

@task
def becomes_another_program(code: int):
    print("before", flush=True)
    os.execv("/bin/sh", ["sh", "-c", f"echo after; exit {code}"])

@task
def forks_and_returns_twice():
    os.fork()
    return os.getpid()

@task
def forks_and_raises_twice():
    os.fork()
    raise ValueError(os.getpid())

@task
def leaves_a_thread():
    threading.Thread(target=for_ever).start()
    return "left"

@task
def leaves_a_process():
    process = multiprocessing.Process(target=for_ever)
    process.start()
    return process.pid

@task
def leaves_a_program():
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

@task
def leaves_a_daemon():
    return daemon()

@task
def leaves_a_daemon_and_lingers():
    latch = FOLDER / f"latch-{current().id}"
    def linger():
        while not latch.exists():
            time.sleep(0.01)
    atexit.register(linger)
    return daemon()

@task
def becomes_a_daemon():
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    mark("daemon", os.getpid())
    for_ever()

@task
def uses_a_pool() -> list[int]:
    with multiprocessing.Pool(2) as pool:
        return pool.map(double, range(5))

@task
def uses_an_executor() -> list[int]:
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        return list(executor.map(double, range(5)))

@task
def uses_locks_and_queues() -> int:
    queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=queue.put, args=(7,))
    process.start()
    value = queue.get(timeout=10)
    process.join()
    return value

@task
def ends_its_own_processes() -> list[int]:
    processes = [multiprocessing.Process(target=for_ever) for _ in range(2)]
    for process in processes:
        process.start()
        process.terminate()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]

@task
def uses_a_program() -> str:
    return subprocess.run(["cat"], input="meow", capture_output=True, text=True, check=True).stdout

@task
def closes_descriptors(first: int) -> str:
    os.closerange(first, 1024)
    return "closed"

@task
def prints_without_stdout() -> int:
    '''Prints into whatever has taken over the numbers of stdout and stderr: nothing may have.'''
    os.closerange(0, 1024)
    deadline = time.monotonic() + 2
    taken = 0
    while time.monotonic() < deadline and not taken:
        time.sleep(0.01)
        taken = sum(os.path.exists(f"/proc/self/fd/{number}") for number in range(3, 20))
    for number in (1, 2):
        with contextlib.suppress(OSError):
            os.write(number, b"into the void")
    return taken

@task
def takes_over_descriptors() -> list[int]:
    # Puts sockets and files of its own in the place of all descriptors; returns what was written into each.
    os.closerange(3, 1024)
    pairs = [socket.socketpair() for _ in range(8)]
    files = [open(FOLDER / f"taken-{current().id}-{number}", "wb", buffering=0) for number in range(8)]
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        current().progress(message=str(time.monotonic()))
        time.sleep(0.05)
    written = [file.tell() for file in files]
    for one in (one for pair in pairs for one in pair):
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            written.append(len(one.recv(4096)))
    globals()["kept"] = [pairs, files]  # still open when the end is reported
    return written

@task
def prints_much() -> None:
    line = "x" * 1023
    print("the first line")
    for _ in range(100):
        sys.stdout.write(f"{line}\n" * 1024)
    print("the last line")

@task
def writes_a_large_file() -> int:
    path = FOLDER / f"large-{current().id}"
    path.write_bytes(b"x" * (30 << 20))
    return path.stat().st_size

class OwnError(BaseException):
    pass

class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text for you")
    __repr__ = __str__

RAISED = {
    "own": lambda: OwnError("of the base"), "keyboard": lambda: KeyboardInterrupt(),
    "generator": lambda: GeneratorExit(), "stop": lambda: StopIteration(3), "memory": lambda: MemoryError(),
    "unspeakable": lambda: Unspeakable(), "long": lambda: ValueError("y" * 5_000_000),
    "unstorable": lambda: ValueError("half a pair \ud800, a NUL \0, the end"),
    "group": lambda: ExceptionGroup("many", [ValueError("one of them")]),
}

@task
def raises(what: str):
    raise RAISED[what]()

@task
def fails_far_down():
    def down(left):
        if left == 0:
            raise ValueError("at the bottom")
        down(left - 1)
    down(900)

@task
def prints_what_no_file_stores():
    print("half a pair \udcff, a NUL \0, the end")

@task
def prints_and_is_killed():
    print("the last words")
    os.kill(os.getpid(), signal.SIGKILL)

@task
def falls_through_the_stack():
    sys.setrecursionlimit(10**9)
    def deeper(_=None):
        return sorted([1], key=deeper)
    deeper()

class Falls(Task):
    memory_limit_bytes = 300 << 20
    timeout_s = 20
    def run(self):
        sys.setrecursionlimit(10**9)
        def deeper():
            deeper()
        deeper()

@task
async def runs_in_a_loop(value: int) -> int:
    await asyncio.sleep(0)
    return await asyncio.to_thread(double, value)

@task
async def sleeps_in_a_loop():
    try:
        mark("ready")
        await asyncio.sleep(600)
    finally:
        print("finally")

@task
async def raises_in_a_loop():
    await asyncio.sleep(0)
    raise LookupError("in the loop")

@task
def resets_its_handler():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    mark("ready")
    for_ever()

@task
def has_a_handler_of_its_own():
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    mark("ready")
    while not came:
        time.sleep(0.01)
    return came

@task
def blocks_sigterm():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    mark("ready")
    for_ever()

@task
def asks_its_surroundings():
    # Read before anything else is opened, so that a descriptor that is not ours would show.
    descriptors = {int(name): os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                   if os.path.exists(f"/proc/self/fd/{name}")}
    with contextlib.suppress(PermissionError):
        os.setsid()
        raise AssertionError("not a session leader")
    return {
        "stdin": sys.stdin.read(),
        "descriptors": {str(number): name for number, name in descriptors.items()},
        "default": [name for name in ("SIGINT", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2")
                    if signal.getsignal(getattr(signal, name)) is signal.SIG_DFL],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "leader": os.getsid(0) == os.getpid(),
        "folder": os.getcwd(),
        "umask": umask(),
        "argv": sys.argv,
        "main": multiprocessing.current_process().daemon,
    }

@task
def replaces_stdout():
    print("seen")
    sys.stdout = io.StringIO()
    print("not seen")
    sys.stderr = None
    return 1

@task
def logs():
    logging.getLogger("shop").info("an invoice came")
    logging.getLogger("shop").debug("and much more")

@task
def registers_a_farewell():
    atexit.register(mark, "farewell")
    atexit.register(print, "farewell")

@task
def registers_a_hanging_farewell():
    atexit.register(for_ever)
    return os.getpid()

@task
def registers_a_failing_farewell():
    atexit.register(sys.exit, 3)
    atexit.register(double)
    return 1

@task
def tells_much_progress() -> float:
    began = time.monotonic()
    for count in range(100_000):
        current().progress(count + 1, 100_000, f"step {count + 1}")
    return time.monotonic() - began

@task
def tells_strange_progress():
    current().progress(float("nan"), float("inf"), "half a pair \udcff and a NUL \0" + "z" * 5000)
    return 1

@task
def requests_another() -> list[int]:
    service = Service(config=FOLDER / "bgsupervisor.toml")
    return [service.request(returns, {"value": 5}).id, os.getpid()]

@task
def changes_its_surroundings():
    os.chdir("/")
    os.umask(0)
    os.environ["LEFT_BEHIND"] = "1"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout = io.StringIO()
    return os.getpid()

@task
def tells_its_surroundings():
    print("heard")
    return [os.getpid(), os.getcwd(), umask(), signal.getsignal(signal.SIGTERM) == signal.SIG_IGN]

@task
def sleeps():
    try:
        mark("ready")
        for_ever()
    finally:
        print("finally")

@task
def exits(code: int):
    sys.exit(code)

@task
def leaves_at_once(code: int):
    os._exit(code)

def set_up():
    if (FOLDER / "set-up-exits").exists():
        sys.exit("the set-up gives up")
    if (FOLDER / "set-up-raises").exists():
        raise OwnError("the set-up fails")
    (FOLDER / "set-up-ran").touch()
"""
LOG_MAX_BYTES = 1 << 20


class Bad(App):
    """An application of these bodies, with what the tests ask about it."""

    def __init__(self, folder, **options):
        options = {"log_max_bytes": LOG_MAX_BYTES, "data_max_bytes": 200_000, **options}
        super().__init__(folder, BODIES, **options)

    def request(self, body, **data):
        return self.service.request(f"appx:{body}", data)

    def run(self, body, **data):
        return self.wait(self.request(body, **data))

    def said(self, what, record):
        """Wait for what a body has marked."""
        path = self.folder / f"{what}-{record.id}"
        wait_until(path.exists, f"task {record.id} has marked {what}; its row: {self.service.get(record.id)}")
        return path.read_text()

    def assert_interrupted(self, record, reason, *, exit_code=None, signal=None, detail="", error=None):
        assert (record.status, record.reason) == ("INTERRUPTED", reason), record
        assert (record.exit_code, record.signal) == (exit_code, signal), record
        assert detail in record.detail
        assert (record.error is None) if error is None else (error in record.error)
        assert (record.slot, record.result) == (None, None)
        assert (record.attempt, record.tries) == (1, 1)
        [row] = self.service.ledger.interruptions(record.id)
        for column in ("reason", "detail", "error", "exit_code", "signal", "attempt", "pid", "ended_at"):
            assert row[column] == getattr(record, column), column

    def assert_done(self, record, value):
        assert (record.status, record.reason, record.detail) == ("DONE", None, None), record
        assert (record.slot, record.exit_code, record.signal, record.error) == (None, None, None, None)
        assert (record.attempt, record.tries) == (1, 0)
        assert self.service.result(record.id) == value
        assert self.service.ledger.interruptions(record.id) == []


def own_umask():
    mask = os.umask(0o77)
    os.umask(mask)
    return mask


def is_gone(pid):
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def has_left(record):
    """Whether the process of an ended task has gone, or only its zombie is there."""
    return is_gone(record.pid)


@contextlib.contextmanager
def living(folder, **options):
    app = Bad(folder, **options)
    try:
        app.start()
        yield app
    finally:
        app.end()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with living(tmp_path_factory.mktemp("bad"), spares=4) as app:
        yield app


SHORT = {
    "object": ("returns_object", {}),
    "nan": ("returns_nan", {}),
    "too much": ("returns_too_much", {}),
    "half a surrogate": ("returns_half_a_surrogate", {}),
    "exec 0": ("becomes_another_program", {"code": 0}),
    "exec 5": ("becomes_another_program", {"code": 5}),
    "returns twice": ("forks_and_returns_twice", {}),
    "raises twice": ("forks_and_raises_twice", {}),
    "thread": ("leaves_a_thread", {}),
    "process": ("leaves_a_process", {}),
    "program": ("leaves_a_program", {}),
    "daemon": ("leaves_a_daemon", {}),
    "becomes a daemon": ("becomes_a_daemon", {}),
    "pool": ("uses_a_pool", {}),
    "executor": ("uses_an_executor", {}),
    "terminates": ("ends_its_own_processes", {}),
    "queue": ("uses_locks_and_queues", {}),
    "subprocess": ("uses_a_program", {}),
    "closes 3": ("closes_descriptors", {"first": 3}),
    "closes 0": ("closes_descriptors", {"first": 0}),
    "prints into the void": ("prints_without_stdout", {}),
    "takes over": ("takes_over_descriptors", {}),
    "prints much": ("prints_much", {}),
    "large file": ("writes_a_large_file", {}),
    **{what: ("raises", {"what": what}) for what in ("own", "keyboard", "generator", "stop", "memory")},
    **{what: ("raises", {"what": what}) for what in ("unspeakable", "long", "unstorable", "group")},
    "far down": ("fails_far_down", {}),
    "prints what": ("prints_what_no_file_stores", {}),
    "last words": ("prints_and_is_killed", {}),
    "stack": ("falls_through_the_stack", {}),
    "recursion": ("Falls", {}),
    "loop": ("runs_in_a_loop", {"value": 4}),
    "loop raises": ("raises_in_a_loop", {}),
    "surroundings": ("asks_its_surroundings", {}),
    "stdout": ("replaces_stdout", {}),
    "logs": ("logs", {}),
    "farewell": ("registers_a_farewell", {}),
    "failing farewell": ("registers_a_failing_farewell", {}),
    "hanging farewell": ("registers_a_hanging_farewell", {}),
    "progress": ("tells_much_progress", {}),
    "strange progress": ("tells_strange_progress", {}),
    "requests": ("requests_another", {}),
}


@pytest.fixture(scope="module")
def ends(app):
    """The records of all the short bodies, which ran side by side."""
    handles = {what: app.request(body, **data) for what, (body, data) in SHORT.items()}
    return {what: app.wait(handle, 30) for what, handle in handles.items()}


# ---- results ----


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("object", "the result of appx:returns_object"),
        ("nan", "the result of appx:returns_nan"),
        ("too much", "data_max_bytes"),
        ("half a surrogate", "surrogate"),
    ],
)
def test_a_result_that_cannot_be_stored_is_raised_with_a_sentence(app, ends, what, sentence):
    app.assert_interrupted(ends[what], "RAISED", error="Traceback")
    assert sentence in ends[what].detail or "result" in ends[what].detail
    assert "\n" not in ends[what].detail


# ---- processes ----


@pytest.mark.parametrize("code", [0, 5])
def test_a_body_that_becomes_another_program_is_exited_with_its_code_also_zero(app, ends, code):
    record = ends[f"exec {code}"]
    app.assert_interrupted(record, "EXITED", exit_code=code, detail=f"exited with code {code} before it reported")
    assert app.log_of(record) == "before\nafter\n"


def test_a_body_that_forks_and_returns_on_both_sides_is_done_once_by_the_process_that_began(app, ends):
    record = ends["returns twice"]
    app.assert_done(record, record.pid)
    wait_until(lambda: has_left(record), "its process has left")


def test_a_body_that_forks_and_raises_on_both_sides_is_raised_once(app, ends):
    record = ends["raises twice"]
    app.assert_interrupted(record, "RAISED", detail=f"ValueError: {record.pid}", error="ValueError")


def test_a_thread_that_a_body_left_does_not_keep_its_process(app, ends):
    app.assert_done(ends["thread"], "left")
    wait_until(lambda: has_left(ends["thread"]), "its process has left", 3)


@pytest.mark.parametrize("what", ["process", "program", "daemon"])
def test_a_process_that_a_body_left_is_gone_when_its_task_has_ended(app, ends, what):
    record = ends[what]
    assert record.status == "DONE"
    assert is_gone(app.service.result(record.id))


def test_a_daemon_is_gone_before_its_task_is_done_not_only_when_the_child_has_left(tmp_path):
    with living(tmp_path / "lingering", spares=1, grace_s=20.0) as app:
        record = app.run("leaves_a_daemon_and_lingers")
        assert record.status == "DONE"
        assert is_gone(app.service.result(record.id))
        assert not has_left(record)
        (app.folder / f"latch-{record.id}").touch()


def test_a_left_process_that_obeys_sigterm_costs_no_grace(app, ends):
    for what in ("process", "program"):
        assert (ends[what].ended_at - ends[what].started_at).total_seconds() < allowed_s(1.5), what


def test_a_body_that_turns_itself_into_a_daemon_is_exited_and_the_daemon_is_gone(app, ends):
    record = ends["becomes a daemon"]
    app.assert_interrupted(record, "EXITED", exit_code=0, detail="code 0")
    path = app.folder / f"daemon-{record.id}"
    if path.exists():  # else it was gone before it could write
        wait_until(lambda: is_gone(path.read_text()), "the daemon is gone")


@pytest.mark.parametrize("what", ["pool", "executor"])
def test_a_body_may_use_pools_of_processes(app, ends, what):
    app.assert_done(ends[what], [0, 2, 4, 6, 8])


def test_a_body_may_use_the_queues_of_multiprocessing(app, ends):
    app.assert_done(ends["queue"], 7)


def test_a_body_may_end_its_own_processes_with_sigterm(app, ends):
    app.assert_done(ends["terminates"], [-signal.SIGTERM, -signal.SIGTERM])


def test_a_body_may_use_other_programs(app, ends):
    app.assert_done(ends["subprocess"], "meow")


# ---- descriptors and files ----


@pytest.mark.parametrize("first", [3, 0])
def test_a_body_that_closes_all_descriptors_is_done_at_once_all_the_same(app, ends, first):
    record = ends[f"closes {first}"]
    app.assert_done(record, "closed")
    assert (record.ended_at - record.started_at).total_seconds() < allowed_s(4.0)


def test_what_a_body_prints_after_it_closed_its_stdout_never_reaches_the_supervisor(app, ends):
    record = ends["prints into the void"]
    assert record.status == "DONE", record
    assert app.service.result(record.id) >= 1, "the child has dialled anew"
    assert "is closed: " not in (app.state_dir / "logs" / "supervisor.log").read_text()


def test_nothing_of_ours_is_written_into_files_that_took_over_our_descriptors(app, ends):
    record = ends["takes over"]
    app.assert_done(record, [0] * 8)
    assert [path.stat().st_size for path in app.folder.glob(f"taken-{record.id}-*")] == [0] * 8
    assert record.message.replace(".", "").isdigit()


def test_a_body_that_prints_100_mb_is_done_and_its_log_keeps_head_and_tail_within_the_limit(app, ends):
    record = ends["prints much"]
    app.assert_done(record, None)
    path = app.state_dir / "logs" / f"task-{record.id}-1.log"
    wait_until(path.exists, "the log has its name")
    wait_until(lambda: has_left(record), "its process has left")
    assert path.stat().st_blocks * 512 <= LOG_MAX_BYTES + 8192
    with path.open("rb") as file:
        assert file.readline() == b"the first line\n"
        file.seek(-14, os.SEEK_END)
        assert file.read() == b"the last line\n"


def test_the_limit_of_the_log_does_not_limit_files_of_the_body(app, ends):
    app.assert_done(ends["large file"], 30 << 20)


@pytest.mark.parametrize("what", ["closes 0", "prints much"])
def test_a_log_has_the_rights_of_owner_and_group_alone(app, ends, what):
    path = app.state_dir / "logs" / f"task-{ends['prints much'].id}-1.log"
    wait_until(path.exists, "the log has its name")
    assert path.stat().st_mode & 0o777 == 0o640


# ---- exceptions ----


@pytest.mark.parametrize(
    ("what", "detail"),
    [
        ("own", "appx.OwnError: of the base"),
        ("keyboard", "KeyboardInterrupt"),
        ("generator", "GeneratorExit"),
        ("stop", "StopIteration: 3"),
        ("memory", "MemoryError"),
        ("unspeakable", "appx.Unspeakable: <exception str() failed>"),
        ("unstorable", "ValueError: half a pair \\ud800, a NUL \\x00, the end"),
        ("group", "many"),
        ("loop raises", "LookupError: in the loop"),
        ("far down", "ValueError: at the bottom"),
    ],
)
def test_whatever_a_body_raises_is_raised_with_what_it_says(app, ends, what, detail):
    app.assert_interrupted(ends[what], "RAISED", detail=detail, error="appx.py")
    assert detail in ends[what].error


def test_a_huge_error_keeps_its_beginning_and_its_end_and_fits_into_a_row(app, ends):
    record = ends["long"]
    app.assert_interrupted(record, "RAISED", detail="ValueError: yyy", error="characters left out")
    assert record.error.startswith("Traceback")
    assert record.error.rstrip().endswith("yyy")
    assert len(record.error) < 70_000
    assert len(record.detail) <= 1000


def test_what_is_printed_is_in_the_log_when_the_body_is_killed_the_next_moment(app, ends):
    record = ends["last words"]
    app.assert_interrupted(record, "SIGNALLED", signal=signal.SIGKILL)
    assert app.log_of(record) == "the last words\n"


def test_what_no_file_stores_is_printed_as_escapes(app, ends):
    app.assert_done(ends["prints what"], None)
    assert app.log_of(ends["prints what"]) == "half a pair \\udcff, a NUL \0, the end\n"


def test_a_fall_through_the_stack_is_told_as_what_it_came_to(app, ends):
    record = ends["stack"]
    if record.reason == "RAISED":
        app.assert_interrupted(record, "RAISED", detail="RecursionError", error="RecursionError")
    else:
        app.assert_interrupted(record, "SIGNALLED", signal=signal.SIGSEGV, detail="SIGSEGV (11)")


def test_an_endless_recursion_is_ended_by_its_limits(app, ends):
    record = ends["recursion"]
    if record.reason == "RAISED":
        app.assert_interrupted(record, "RAISED", detail="RecursionError", error="RecursionError")
    elif record.reason == "SIGNALLED":
        app.assert_interrupted(record, "SIGNALLED", signal=signal.SIGSEGV, detail="SIGSEGV (11)")
    else:
        app.assert_interrupted(record, "OUT_OF_MEMORY", signal=signal.SIGKILL, detail="memory_limit_bytes")


# ---- loops, signals, surroundings ----


def test_an_async_body_runs_in_a_loop_of_its_own(app, ends):
    app.assert_done(ends["loop"], 8)


STAGED = {
    "loop": "sleeps_in_a_loop",
    "reset": "resets_its_handler",
    "own": "has_a_handler_of_its_own",
    "blocked": "blocks_sigterm",
}


@pytest.fixture(scope="module")
def cancelled(app):
    """The records of bodies that were cancelled, all at once, after they had bent their signals."""
    handles = {what: app.request(body) for what, body in STAGED.items()}
    for handle in handles.values():
        app.said("ready", handle)
    for handle in handles.values():
        app.service.cancel(handle, by="jana")
    return {what: app.wait(handle) for what, handle in handles.items()}


def test_an_async_body_that_is_cancelled_by_sigterm_runs_its_finally_blocks(app, cancelled):
    record = cancelled["loop"]
    app.assert_interrupted(record, "CANCELLED", detail="cancelled by jana", error="Cancelled")
    assert "SIGTERM was sent" in record.detail
    assert app.log_of(record).splitlines().count("finally") == 1


def test_a_body_that_took_our_handler_away_dies_of_sigterm_and_is_cancelled(app, cancelled):
    app.assert_interrupted(cancelled["reset"], "CANCELLED", signal=signal.SIGTERM, detail="SIGTERM was sent")


def test_a_body_with_a_handler_of_its_own_may_still_return(app, cancelled):
    app.assert_done(cancelled["own"], [signal.SIGTERM])


def test_a_body_that_blocks_all_signals_is_cancelled_by_sigkill(app, cancelled):
    app.assert_interrupted(cancelled["blocked"], "CANCELLED", signal=signal.SIGKILL, detail="SIGKILL was sent")


def test_a_body_begins_in_clean_surroundings(app, ends):
    record = ends["surroundings"]
    assert record.status == "DONE", record
    found = app.service.result(record.id)
    descriptors = {int(number): name for number, name in found.pop("descriptors").items()}
    assert found == {
        "stdin": "",
        "default": ["SIGINT", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2"],
        "blocked": [],
        "leader": True,
        "folder": str(app.folder),
        "umask": own_umask(),
        "argv": found["argv"],
        "main": False,
    }
    assert descriptors[0] == "/dev/null"
    assert descriptors[1] == descriptors[2]
    assert "process-" in descriptors[1] or "task-" in descriptors[1]
    others = [name for number, name in descriptors.items() if number > 2 and not name.startswith("/proc/")]
    assert len([name for name in others if name.startswith("socket:")]) == 1, others  # the link's
    assert not [name for name in others if ".bgsupervisor/" in name or ".db" in name], others


def test_what_a_body_does_with_its_stdout_is_its_own_affair(app, ends):
    app.assert_done(ends["stdout"], 1)
    assert app.log_of(ends["stdout"]) == "seen\n"


def test_logging_reaches_the_log_from_info_upwards_when_the_application_configures_none(app, ends):
    app.assert_done(ends["logs"], None)
    text = app.log_of(ends["logs"])
    assert "INFO shop: an invoice came" in text
    assert "much more" not in text


# ---- after the body ----


def test_what_a_body_registered_at_exit_is_run(app, ends):
    app.assert_done(ends["farewell"], None)
    wait_until((app.folder / "farewell-None").exists, "the callback has run")
    wait_until(lambda: has_left(ends["farewell"]), "its process has left")
    assert app.log_of(ends["farewell"]) == "farewell\n"


def test_a_callback_that_fails_at_exit_harms_nothing(app, ends):
    app.assert_done(ends["failing farewell"], 1)
    wait_until(lambda: has_left(ends["failing farewell"]), "its process has left", 3)


def test_a_callback_that_hangs_at_exit_keeps_the_process_no_longer_than_grace_s(app):
    record = app.run("registers_a_hanging_farewell")
    app.assert_done(record, record.pid)
    began = time.monotonic()
    wait_until(lambda: has_left(record), "its process has left", 3)
    assert time.monotonic() - began < allowed_s(2.0)


# ---- progress ----


def test_much_progress_is_cheap_and_the_last_word_is_in_the_row(app, ends):
    record = ends["progress"]
    assert record.status == "DONE"
    assert (record.progress_done, record.progress_total, record.message) == (100_000, 100_000, "step 100000")
    assert record.cpu_s < allowed_s(3.0)


def test_progress_that_no_row_stores_harms_nothing(app, ends):
    app.assert_done(ends["strange progress"], 1)
    assert ends["strange progress"].message.startswith("half a pair \\udcff and a NUL \\x00zzz")
    assert len(ends["strange progress"].message) == 1000


# ---- requests ----


def test_a_body_can_request_another_task(app, ends):
    record = ends["requests"]
    assert record.status == "DONE", record
    id, _ = app.service.result(record.id)
    app.assert_done(app.wait(id), 5)


def test_a_task_of_an_unknown_name_waits_for_its_code(app):
    handle = app.request("not_yet_written")
    app.assert_done(app.run("returns", value=3), 3)
    record = app.service.get(handle)
    assert (record.status, record.attempt, record.reason, record.slot) == ("REQUEST", 0, None, None)
    app.service.cancel(handle)


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        ("{not json", "JSON"),
        ('{"value": "many"}', "value"),
        ('{"value": 1, "colour": "red"}', "colour"),
        ("[1, 2]", "data"),
        ("null", "data"),
        ("", "JSON"),
    ],
)
def test_data_written_by_hand_that_does_not_fit_is_raised_before_the_body_begins(app, data, detail):
    handle = app.service.request("appx:returns", {"value": 1}, delay_s=3600)
    app.database.rows("UPDATE bgsupervisor_task SET data = ?, run_at = requested_at WHERE id = ?", data, handle.id)
    record = app.wait(handle)
    app.assert_interrupted(record, "RAISED", detail="appx:returns", error="DataInvalid")
    assert detail in record.detail
    assert "appx.py" not in record.error  # not a line of the application ran


# ---- a child set-up that fails ----


def test_a_child_set_up_that_fails_is_the_end_of_the_attempt_and_not_of_the_child(tmp_path):
    with living(tmp_path / "set-up", child_setup="appx:set_up", spares=1) as app:
        app.assert_done(app.run("returns"), 1)
        assert (app.folder / "set-up-ran").exists()
        (app.folder / "set-up-raises").touch()
        app.assert_interrupted(app.run("returns"), "RAISED", detail="OwnError: the set-up fails", error="set_up")
        (app.folder / "set-up-exits").touch()
        record = app.run("returns")
        app.assert_interrupted(record, "EXITED", exit_code=1, detail="sys.exit", error="the set-up gives up")


# ---- a database that a body leaves locked ----


@pytest.mark.of_sqlite
@pytest.mark.parametrize("how", ["returns", "raises", "keeps"])
def test_a_transaction_that_a_body_left_keeps_nobody_from_recording_its_end(tmp_path, how):
    with living(tmp_path) as app:
        record = app.run("leaves_a_transaction", how=how)
        assert (record.ended_at - record.started_at).total_seconds() < allowed_s(4.0)
        assert record.detail == ("ValueError: in the middle of a transaction" if how == "raises" else None)
        app.assert_done(app.run("returns", value=1), 1)
        with contextlib.closing(sqlite3.connect(tmp_path / "bgsupervisor.db")) as database:
            assert database.execute("SELECT * FROM own").fetchall() == [], "it was rolled back"


# ---- a child for several tasks ----


@pytest.fixture(scope="module")
def reusing(tmp_path_factory):
    with living(tmp_path_factory.mktemp("reusing"), reuse=5, spares=1, slots=1) as app:
        yield app


def in_one_process(attempt):
    """Return the records of the first attempt whose tasks one process has run: it may be a spare's turn in between."""
    for _ in range(20):
        records = attempt()
        if len({record.pid for record in records}) == 1:
            return records
    return pytest.fail("not in 20 attempts: one process has run all tasks of an attempt")


def test_a_child_runs_as_many_tasks_as_it_may_and_the_next_one_another(reusing):
    served = collections.Counter()
    for number in range(40):  # two or three children take turns, until the first has had its five
        record = reusing.run("returns", value=number)
        reusing.assert_done(record, number)
        served[record.pid] += 1
    assert max(served.values()) == 5


def test_a_child_that_leaves_after_its_last_task_is_given_no_other(reusing):
    handles = reusing.service.request_many("appx:returns", [{"value": number} for number in range(31)])
    records = [reusing.wait(handle) for handle in handles]
    for number, record in enumerate(records):
        reusing.assert_done(record, number)
    pids = [record.pid for record in records]
    assert max(pids.count(pid) for pid in pids) == 5


def test_each_task_of_a_reused_child_has_a_log_of_its_own(reusing):
    records = in_one_process(lambda: [reusing.run("tells_its_surroundings") for _ in range(2)])
    assert [reusing.log_of(record) for record in records] == ["heard\n", "heard\n"]


def test_what_a_body_changed_around_it_does_not_reach_the_next_one(reusing):
    bodies = ("tells_its_surroundings", "changes_its_surroundings", "tells_its_surroundings")
    before, _, after = in_one_process(lambda: [reusing.run(body) for body in bodies])
    assert reusing.service.result(after.id) == reusing.service.result(before.id)
    assert reusing.service.result(after.id)[3] is False
    assert reusing.log_of(after) == "heard\n"


@pytest.mark.parametrize("how", ["returns", "keeps", "another thread"])
def test_a_transaction_that_a_body_left_does_not_reach_the_next_one(reusing, how):
    def attempt():
        left = reusing.run("leaves_a_transaction", how=how, name="other.db")
        return [left, reusing.run("begins_a_transaction", name="other.db")]

    for record in in_one_process(attempt):
        reusing.assert_done(record, record.pid)


def test_a_child_whose_body_left_a_thread_is_not_used_again(reusing):
    left = reusing.run("leaves_a_thread")
    assert left.pid not in {reusing.run("returns").pid for _ in range(4)}


@pytest.mark.parametrize(("body", "data"), [("raises", {"what": "own"}), ("exits", {"code": 3})])
def test_a_child_whose_body_did_not_return_is_not_used_again(reusing, body, data):
    ended = reusing.run(body, **data)
    assert ended.status == "INTERRUPTED"
    assert ended.pid not in {reusing.run("returns").pid for _ in range(4)}


def test_a_cancel_reaches_only_the_attempt_that_it_was_for(reusing):
    def attempt():
        handle = reusing.request("has_a_handler_of_its_own")
        reusing.said("ready", handle)
        reusing.service.cancel(handle, by="jana")
        return [reusing.wait(handle), reusing.run("tells_strange_progress")]

    cancelled, after = in_one_process(attempt)
    reusing.assert_done(cancelled, [signal.SIGTERM])
    reusing.assert_done(after, 1)


# ---- spawn ----


@pytest.fixture(scope="module")
def spawning(tmp_path_factory):
    with living(tmp_path_factory.mktemp("spawning"), start_method="spawn", spares=0, slots=8) as app:
        yield app


@pytest.fixture(scope="module")
def spawned(spawning):
    """The basic ends, with children that are spawned."""
    bodies = {
        "returns": ("returns", {"value": 4}),
        "raises": ("raises", {"what": "own"}),
        "exits": ("exits", {"code": 3}),
        "leaves": ("leaves_at_once", {"code": 7}),
        "pool": ("uses_a_pool", {}),
        "surroundings": ("asks_its_surroundings", {}),
        "killed": ("sleeps", {}),
        "cancelled": ("sleeps", {}),
    }
    handles = {what: spawning.request(body, **data) for what, (body, data) in bodies.items()}
    for what in ("killed", "cancelled"):
        spawning.said("ready", handles[what])
    os.kill(spawning.started(handles["killed"]).pid, signal.SIGKILL)
    spawning.service.cancel(handles["cancelled"], by="jana")
    return {what: spawning.wait(handle, 30) for what, handle in handles.items()}


def test_a_spawned_child_tells_all_ends_as_a_forked_one_does(spawning, spawned):
    spawning.assert_done(spawned["returns"], 4)
    spawning.assert_interrupted(spawned["raises"], "RAISED", detail="OwnError: of the base", error="appx.py")
    spawning.assert_interrupted(spawned["exits"], "EXITED", exit_code=3, detail="sys.exit", error="SystemExit")
    spawning.assert_interrupted(spawned["leaves"], "EXITED", exit_code=7, detail="code 7")
    spawning.assert_interrupted(spawned["killed"], "SIGNALLED", signal=signal.SIGKILL, detail="SIGKILL (9)")
    spawning.assert_interrupted(spawned["cancelled"], "CANCELLED", detail="SIGTERM was sent", error="Cancelled")
    assert spawning.log_of(spawned["cancelled"]).splitlines().count("finally") == 1


def test_a_spawned_body_may_use_pools_of_processes(spawning, spawned):
    spawning.assert_done(spawned["pool"], [0, 2, 4, 6, 8])


def test_a_spawned_body_begins_in_clean_surroundings(spawning, spawned):
    assert spawned["surroundings"].status == "DONE", spawned["surroundings"]
    found = spawning.service.result(spawned["surroundings"].id)
    assert (found["stdin"], found["blocked"], found["leader"]) == ("", [], True)
    assert found["folder"] == str(spawning.folder)
    assert found["descriptors"]["0"] == "/dev/null"
