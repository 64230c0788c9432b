"""Where a task is: the Python stacks of running bodies, and of those whose time was up, from real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from as_user import as_nobody, needs_root
from conftest import App, wait_until
from pace import allowed_s

from bgsupervisor import NoStack, processes, stacks
from bgsupervisor.clock import SystemClock
from bgsupervisor.enforcement import STACK_WAIT_S
from bgsupervisor.processes import ProcessHandle

BODIES = """
import asyncio, ctypes, faulthandler, os, pathlib, signal, threading, time
from bgsupervisor import Task, current, task

def ready():
    pathlib.Path(f"ready-{current().id}").touch()

def gate():
    while not pathlib.Path(f"gate-{current().id}").exists():
        time.sleep(0.01)

def in_a_deep_place():
    ready()
    gate()

def in_another_thread():
    gate()

@task
def waits_at_the_gate() -> str:
    other = threading.Thread(target=in_another_thread)
    other.start()
    in_a_deep_place()
    other.join()
    return "went on"

@task
def holds_the_lock_of_the_interpreter() -> None:
    ready()
    sum(range(10**12))

@task
def is_in_c_code() -> None:
    reading, _ = os.pipe()
    ready()
    ctypes.CDLL(None).read(reading, ctypes.create_string_buffer(1), 1)

@task
async def is_async() -> None:
    ready()
    await asyncio.sleep(600)

@task
def has_its_own_faulthandler() -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    for number in (signal.SIGUSR2, signal.SIGHUP, signal.SIGWINCH, signal.SIGALRM):
        signal.signal(number, lambda *_: None)
    in_a_deep_place()

@task
def talks_all_the_time() -> None:
    def talk():
        while True:
            print("what the body has to say" * 10, flush=True)
    threading.Thread(target=talk, daemon=True).start()
    in_a_deep_place()

@task
def takes_the_signal_for_itself() -> None:
    signal.signal(signal.SIGURG, lambda *_: None)
    ready()
    gate()

@task
def ignores_the_signal() -> None:
    signal.signal(signal.SIGURG, signal.SIG_IGN)
    in_a_deep_place()

@task
def registers_the_signal_for_itself() -> None:
    faulthandler.register(signal.SIGURG, file=open("own", "w"))
    in_a_deep_place()

@task
def takes_the_signal_and_computes() -> None:
    signal.signal(signal.SIGURG, lambda *_: None)
    ready()
    sum(range(10**12))

@task
def becomes_another_program() -> None:
    ready()
    os.execvp("sleep", ["sleep", "600"])

@task
def closes_all_descriptors() -> None:
    os.closerange(3, 1000)
    kept = [open("precious", "a") for _ in range(50)]
    ready()
    gate()

@task
def passes() -> int:
    return 1

class Late(Task):
    timeout_s = 0.5

class LateAndCooperative(Late):
    def run(self) -> None:
        for _ in self.track(range(10**9)):
            self.counts()
    def counts(self) -> None:
        time.sleep(0.2)  # longer than the answer of all threads takes, which is its second one

class LateInABlockingCall(Late):
    def run(self) -> None:
        time.sleep(600)

class LateAndDeaf(Late):
    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sum(range(10**12))

class LateAndStillDone(Late):
    def run(self) -> str:
        while not current().cancel_requested:
            time.sleep(0.01)
        time.sleep(0.3)
        return "all done"

class LateAndStopped(Late):
    def run(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

class Deep(Late):
    def run(self) -> None:
        threads = [threading.Thread(target=self.deep, args=(90,), daemon=True) for _ in range(99)]
        for thread in threads:
            thread.start()
        threads[0].join()
    def deep(self, more: int) -> None:
        if more:
            self.deep(more - 1)
        time.sleep(600)
"""


THREADS = 3
BUSY = f"""
import select, threading
from bgsupervisor import stacks

own = stacks.Answering()
own.get_ready()

def answers():
    poll = select.poll()
    poll.register(own.fileno(), select.POLLIN)
    while True:
        poll.poll()
        own.answer()

def deep(depth=30):
    return deep(depth - 1) if depth else sum(range(50))

def busy():
    while True:
        deep()

for target in (answers, *[busy] * {THREADS}):
    threading.Thread(target=target, daemon=True).start()
print("ready", flush=True)
busy()
"""
ANSWERS = (
    "from bgsupervisor import stacks; own = stacks.Answering(); own.get_ready(); print(own.memory, flush=True); input()"
)


class Stacks(App):
    """An application of these bodies."""

    def __init__(self, folder, **options):
        super().__init__(folder, BODIES, **options)

    def begun(self, body):
        """Start a body and wait until it is where it wants to be; return its record."""
        handle = self.service.request(f"appx:{body}")
        wait_until((self.folder / f"ready-{handle.id}").exists, f"the body of task {handle.id} is ready")
        return self.started(handle)

    def open_gate(self, record):
        (self.folder / f"gate-{record.id}").touch()


@contextlib.contextmanager
def living(folder, **options):
    app = Stacks(folder, **options)
    try:
        yield app
    finally:
        app.end()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with living(tmp_path_factory.mktemp("stacks"), grace_s=0.5) as app:
        app.start()
        yield app


def held(pid):
    """Return a handle of a process, to be closed."""
    found, handle = processes.look(processes.identity_of(pid, "test"))
    assert found is processes.Verdict.ALIVE
    return handle


# ---- of running tasks ----


def test_stack_prints_where_each_thread_is_and_the_task_goes_on(app):
    record = app.begun("waits_at_the_gate")
    told = app.cli("stack", str(record.id))

    assert (told.returncode, told.stderr) == (0, "")
    blocks = [block.splitlines() for block in told.stdout.strip().split("\n\n")]
    assert all("(most recent call first)" in block[0] for block in blocks)
    main = blocks[0]
    assert any("in in_a_deep_place" in line for line in main)
    assert any("appx.py" in line and "in waits_at_the_gate" in line for line in main)
    assert any("in in_another_thread" in line for block in blocks for line in block)
    app.open_gate(record)
    assert app.service.result(app.wait(record.id).id) == "went on"


def test_service_stack_gives_the_same_text_again_and_again(app):
    record = app.begun("waits_at_the_gate")
    for _ in range(3):
        assert app.service.stack(record.id).count("in in_a_deep_place") == 1
    app.open_gate(record)
    app.wait(record.id)


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("holds_the_lock_of_the_interpreter", "in holds_the_lock_of_the_interpreter"),
        ("is_in_c_code", "in is_in_c_code"),
        ("is_async", "in run_until_complete"),
        ("has_its_own_faulthandler", "in in_a_deep_place"),
        ("talks_all_the_time", "in in_a_deep_place"),
    ],
)
def test_a_body_shows_its_stack_whatever_it_is_in_and_stays_killable(app, body, place):
    record = app.begun(body)
    found = app.service.stack(record.id)
    assert place in found
    assert "what the body has to say" not in found
    app.service.cancel(record.id)
    ended = app.wait(record.id)
    assert (ended.status, ended.reason, ended.stack) == ("INTERRUPTED", "CANCELLED", None)


def test_a_process_with_busy_threads_outlives_many_questions():
    """Whoever reads the stack of a thread that moves, without the interpreter's lock, ends the process now and then."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as busy:
        busy.stdout.readline()
        with held(busy.pid) as handle:
            found = [stacks.stack_of(handle, timeout_s=allowed_s(5.0), clock=SystemClock()) for _ in range(25)]
        assert busy.poll() is None
        busy.kill()
    assert all("in busy" in one for one in found)
    assert max(one.count("most recent call first") for one in found) == 1 + THREADS


def test_nothing_of_a_stack_gets_into_the_log_of_the_task(app):
    record = app.begun("has_its_own_faulthandler")
    app.service.stack(record.id)
    log = app.state_dir / "logs" / f"process-{record.pid}-{record.start_ticks}.log"
    assert log.read_text() == ""
    app.open_gate(record)
    app.wait(record.id)


def test_a_task_that_does_not_run_has_no_stack_and_stack_says_so(app):
    done = app.wait(app.service.request("appx:passes"))
    planned = app.service.request("appx:passes", delay_s=3600)
    for id, words in ((done.id, "is not running, it is DONE"), (planned.id, "is not running, it is REQUEST")):
        told = app.cli("stack", str(id))
        assert (told.returncode, told.stdout) == (1, "")
        assert told.stderr == f"bgsupervisor: task {id} {words}\n"
    told = app.cli("stack", "999")
    assert (told.returncode, told.stderr[:36]) == (1, "bgsupervisor: no task has the id 999")


def test_a_body_that_became_another_program_is_not_harmed_by_the_question(app):
    record = app.begun("becomes_another_program")
    wait_until(lambda: "sleep" in processes_name(record.pid), "the body has become sleep")
    told = app.cli("stack", str(record.id))
    assert told.returncode == 1
    assert f"PID {record.pid} shows no stack: it has become another program (exec)" in told.stderr
    os.kill(record.pid, stacks.SIGNAL)  # who asks at the very moment of the exec does no harm either
    assert "sleep" in processes_name(record.pid)
    app.service.cancel(record.id)
    assert app.wait(record.id).reason == "CANCELLED"


def processes_name(pid):
    return Path(f"/proc/{pid}/comm").read_text()


def test_no_stack_is_written_into_a_file_that_took_over_the_descriptor(app):
    record = app.begun("closes_all_descriptors")
    with pytest.raises(NoStack, match="closed all descriptors"):
        app.service.stack(record.id)
    app.open_gate(record)
    assert app.wait(record.id).status == "DONE"
    assert (app.folder / "precious").read_text() == ""


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("takes_the_signal_for_itself", "in gate"),
        ("ignores_the_signal", "in in_a_deep_place"),
        ("registers_the_signal_for_itself", "in in_a_deep_place"),
    ],
)
def test_a_body_that_took_the_signal_for_itself_shows_its_stack_all_the_same(app, body, place):
    record = app.begun(body)
    assert place in app.service.stack(record.id)
    app.open_gate(record)
    assert app.wait(record.id).status == "DONE"


def test_a_body_that_took_the_signal_and_lets_no_other_thread_run_cannot_answer_and_stack_says_so(app):
    record = app.begun("takes_the_signal_and_computes")
    told = app.cli("stack", str(record.id))
    assert told.returncode == 1
    assert f"PID {record.pid} has not answered within 5 s" in told.stderr
    assert "its body has taken SIGURG for itself and lets no other thread run" in told.stderr
    app.service.cancel(record.id)
    assert app.wait(record.id).reason == "CANCELLED"


def test_a_process_that_stands_still_cannot_answer_and_stack_says_so(app):
    record = app.begun("waits_at_the_gate")
    os.kill(record.pid, signal.SIGSTOP)
    wait_until(lambda: processes.is_stopped(record.pid), "it stands still")
    told = app.cli("stack", str(record.id))
    os.kill(record.pid, signal.SIGCONT)
    assert told.returncode == 1
    assert f"PID {record.pid} stands still, stopped by SIGSTOP or a debugger" in told.stderr
    app.open_gate(record)
    assert app.wait(record.id).status == "DONE"


def test_a_reused_child_shows_its_stack_though_the_body_before_took_the_signal(tmp_path):
    with living(tmp_path, reuse=2, spares=0, slots=1) as app:
        app.start()
        first = app.begun("takes_the_signal_for_itself")
        app.open_gate(first)
        app.wait(first.id)
        second = app.begun("waits_at_the_gate")
        assert second.pid == first.pid
        assert "in in_a_deep_place" in app.service.stack(second.id)
        app.open_gate(second)
        app.wait(second.id)


@pytest.mark.parametrize("start_method", ["spawn"])
def test_a_spawned_child_shows_its_stack_without_a_supervisor_too(tmp_path, start_method):
    with living(tmp_path, start_method=start_method, spares=0) as app:
        supervisor = app.start()
        record = app.begun("waits_at_the_gate")
        supervisor.kill()
        assert "in in_a_deep_place" in app.service.stack(record.id)
        app.open_gate(record)
        assert app.wait(record.id).status == "DONE"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"pid_ns": 7}, "runs on another machine or in another container"),
        ({"boot_id": "another boot"}, "its process has ended; a supervisor records how"),
        ({"start_ticks": 1}, "its process has ended; a supervisor records how"),
        ({"pid": None}, "runs in no process of its own"),
    ],
)
def test_a_process_that_this_machine_does_not_have_is_not_asked(tmp_path, columns, words):
    with living(tmp_path, spares=0) as app:
        supervisor = app.start()
        record = app.begun("waits_at_the_gate")
        supervisor.kill()
        [(name, value)] = columns.items()
        app.database.rows(f"UPDATE bgsupervisor_task SET {name} = ?", value)
        told = app.cli("stack", str(record.id))
        app.database.rows(f"UPDATE bgsupervisor_task SET {name} = ?", getattr(record, name))
        app.open_gate(record)
        assert app.wait(record.id).status == "DONE"
    assert (told.returncode, told.stdout) == (1, "")
    assert words in told.stderr


@needs_root
def test_a_process_of_another_user_is_not_asked_and_the_sentence_names_both(app):
    record = app.begun("waits_at_the_gate")
    with held(record.pid) as handle:
        said = as_nobody(lambda: stacks.stack_of(handle, timeout_s=5.0, clock=SystemClock()))
    assert said.startswith(f"NoStack: PID {record.pid} belongs to user root, and this is user nobody")
    app.open_gate(record)
    app.wait(record.id)


def test_a_process_that_has_just_ended_is_told_as_such():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with held(process.pid) as handle:
        process.kill()
        process.wait(10)
        with pytest.raises(NoStack, match=f"PID {process.pid} has ended just now"):
            stacks.stack_of(handle, timeout_s=5.0, clock=SystemClock())
    process.stdin.close()


def test_a_pid_that_is_anothers_by_now_is_not_signalled():
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from bgsupervisor import stacks; stacks.Answering().get_ready(); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    dead = subprocess.Popen(["sleep", "600"])
    with held(dead.pid) as theirs:
        dead.kill()
        dead.wait(10)
        other.stdout.readline()
        wrong = ProcessHandle(processes.identity_of(other.pid, "test"), os.dup(theirs.fileno()))
        with wrong, pytest.raises(NoStack, match="has ended just now"):
            stacks.stack_of(wrong, timeout_s=5.0, clock=SystemClock())
    with held(other.pid) as handle:
        assert "in <module>" in stacks.stack_of(handle, timeout_s=5.0, clock=SystemClock())
    other.communicate(b"\n", timeout=10)


def test_old_answers_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(stacks, "MEMORY_MAX_BYTES", 1000)
    other = subprocess.Popen(
        [sys.executable, "-c", ANSWERS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    descriptor = int(other.stdout.readline())
    with held(other.pid) as handle:
        found = [stacks.stack_of(handle, timeout_s=5.0, clock=SystemClock()) for _ in range(20)]
    assert len(set(found)) == 1
    assert Path(f"/proc/{other.pid}/fd/{descriptor}").stat().st_size <= 1000 + len(found[0])
    other.communicate(b"\n", timeout=10)


# ---- of those whose time was up ----


@pytest.fixture(scope="module")
def late(app):
    """The records of bodies that ran past their timeout_s."""
    bodies = ("LateAndCooperative", "LateInABlockingCall", "LateAndDeaf", "LateAndStillDone", "LateAndStopped", "Deep")
    handles = {body: app.service.request(f"appx:{body}") for body in bodies}
    return {body: app.wait(handle, 40) for body, handle in handles.items()}


@pytest.mark.parametrize(
    ("body", "end", "place"),
    [
        ("LateAndCooperative", "the body ended when it was asked", "in counts"),
        ("LateInABlockingCall", "SIGTERM was sent", "in run"),
        ("LateAndDeaf", "SIGKILL was sent", "in run"),
    ],
)
def test_a_task_that_ran_past_its_limit_keeps_the_stack_of_the_moment_it_was_to_end(app, late, body, end, place):
    record = late[body]
    assert (record.status, record.reason) == ("INTERRUPTED", "TIMED_OUT")
    assert end in record.detail
    assert place in record.stack
    assert "appx.py" in record.stack
    assert "end_descendants" not in record.stack
    [row] = app.service.ledger.interruptions(record.id)
    assert row["stack"] == record.stack


def test_show_has_the_kept_stack_and_stack_points_there(app, late):
    record = late["LateInABlockingCall"]
    told = app.cli("show", str(record.id)).stdout
    assert "stack when its time was up (frames of libraries are folded, --full shows them):\n  " in told
    assert "in run" in told.partition("stack when its time was up")[2]
    assert f"`bgsupervisor show {record.id}` has what was kept" in app.cli("stack", str(record.id)).stderr
    assert "in run" not in app.cli("ps", "--json", "--all").stdout


def test_a_body_that_returns_though_its_time_was_up_is_done_without_a_stack(app, late):
    record = late["LateAndStillDone"]
    assert (record.status, app.service.result(record.id), record.stack) == ("DONE", "all done", None)


def test_a_process_that_cannot_answer_is_ended_for_its_time_all_the_same(late):
    record = late["LateAndStopped"]
    assert (record.status, record.reason, record.stack) == ("INTERRUPTED", "TIMED_OUT", None)
    assert "SIGKILL was sent" in record.detail


def test_a_very_long_stack_is_cut_in_the_row(late):
    stack = late["Deep"].stack
    assert stack.endswith("... the rest is left out\n")
    assert 60_000 < len(stack) < 70_000


def test_a_task_that_is_tried_again_begins_without_the_old_stack(app):
    record = app.wait(app.service.request("appx:LateAndCooperative"))
    assert app.service.retry(record.id).stack is None
    assert "in counts" in app.wait(record.id).stack
    assert [("in counts" in row["stack"]) for row in app.service.ledger.interruptions(record.id)] == [True, True]


def test_the_stack_is_kept_also_without_any_grace(tmp_path):
    with living(tmp_path, grace_s=0, spares=0) as app:
        app.start()
        record = app.wait(app.service.request("appx:LateAndDeaf"))
    assert "in run" in record.stack
    assert "SIGKILL was sent" in record.detail
    assert (record.ended_at - record.started_at).total_seconds() > 0.95 * (0.5 + STACK_WAIT_S)
