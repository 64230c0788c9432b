"""Rows choose no process: signals go to children of ours only, whatever a row says."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from support.app import wait_until
from support.as_user import as_nobody, needs_root

from bgsupervisor.clock import AttendedClock, SystemClock
from bgsupervisor.errors import NoStack
from bgsupervisor.ipc.messages import ProcessRef
from bgsupervisor.ledger.attempts import Attempt
from bgsupervisor.supervisor.children import Children
from bgsupervisor.supervisor.termination import Terminations
from bgsupervisor.system import processes, stacks

SOURCE = """
    import time
    from pathlib import Path
    from bgsupervisor import task

    @task
    def returns() -> None: ...

    @task(timeout_s=0.1, memory_limit_bytes=1)
    def is_limited() -> None: ...

    @task
    def waits() -> str:
        for _ in range(3000):
            if Path("latch").exists():
                return "on its own"
            time.sleep(0.01)
"""
ENDS_AT_ANY_SIGNAL = """
import signal, sys
for number in (1, 2, 10, 12, 15, 18):
    signal.signal(number, lambda *_: sys.exit(7))
print(1, flush=True); input()
"""


@pytest.fixture
def stranger():
    """A process of this user that bgsupervisor did not start, and that ends with 7 when it gets a signal."""
    with speaking(ENDS_AT_ANY_SIGNAL) as process:
        yield process


@pytest.fixture
def answering():
    """A process of this user that can show its stack as a child can."""
    code = "from bgsupervisor.system import stacks; stacks.Answering().get_ready(); print(1, flush=True); input()"
    with speaking(code) as process:
        yield process


@contextlib.contextmanager
def speaking(code):
    """Run code that prints a line once it is ready and ends when its input does."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def forge(app, pid, name="returns", **columns):
    """Write a row by hand that says that *pid* runs a task."""
    own = processes.own_identity(processes.host_id(None))
    handle = app.service.request(f"appx:{name}", {}, delay_s=3600)
    columns = {
        "status": "START",
        "attempt": 1,
        "host": own.host,
        "boot_id": own.boot_id,
        "pid_ns": own.pid_ns,
        "pid": pid,
        "start_ticks": processes.start_ticks(pid),
        "started_at": "2026-01-01 00:00:00.000000+00:00",
        "started_mono": 1.0,
        "run_at": "2026-01-01 00:00:00.000000+00:00",
        **columns,
    }
    settings = ", ".join(f"{column} = ?" for column in columns)
    app.database.rows(f"UPDATE bgsupervisor_task SET {settings} WHERE id = ?", *columns.values(), handle.id)
    return handle


@pytest.fixture
def strangers():
    """Processes like `stranger`: of each only one row can be looked after at a time."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(speaking(ENDS_AT_ANY_SIGNAL)) for _ in range(4)]


def test_rows_that_name_strangers_signal_nobody_and_are_interrupted(make_app, strangers):
    app = make_app(SOURCE, grace_s=0.2)
    supervisor = app.start()
    asked = {"cancel_requested_at": "2026-01-01 00:00:00.000000+00:00"}
    pids = [stranger.pid for stranger in strangers]
    handles = [
        forge(app, pids[0], slot=0, **asked),
        forge(app, pids[1], slot=1, suspend_requested_at="2026-01-01 00:00:00.000000+00:00"),
        forge(app, pids[2], "is_limited"),
        forge(app, supervisor.process.pid, slot=2, **asked),
    ]
    ending = forge(app, pids[3], ending="TIMED_OUT")
    for handle in handles:
        record = app.wait(handle, 30)
        assert (record.status, record.reason) == ("INTERRUPTED", "VANISHED")
        assert f"its row names PID {record.pid}, which bgsupervisor did not start" in record.detail
    assert app.wait(ending).reason == "TIMED_OUT", "as its row says; nobody was ended for it"
    for stranger in strangers:
        assert stranger.poll() is None
        assert not processes.is_stopped(stranger.pid)
    assert app.wait(app.service.request("appx:returns", {})).status == "DONE"
    assert supervisor.process.poll() is None
    used = psutil.Process(supervisor.process.pid).cpu_times()
    assert used.user + used.system < 2, "limits of strangers are due in no pass"


def test_a_child_with_a_log_is_signalled_before_it_dials_again(make_app):
    app = make_app(SOURCE, grace_s=0.2)
    first = app.start()
    handle = app.service.request("appx:waits", {})
    record = app.started(handle)
    wait_until(lambda: list((app.state_dir / "logs").glob(f"process-{record.pid}-*")), "the child has its log")
    first.kill()
    os.kill(record.pid, signal.SIGSTOP)
    app.service.cancel(handle, by="jana")
    app.start()
    ended = app.wait(handle)
    assert (ended.reason, ended.signal) == ("CANCELLED", signal.SIGKILL)


class Steady(SystemClock):
    """A clock that a test moves."""

    moment = 100.0

    def monotonic(self):
        return self.moment


def children_of(tmp_path):
    machine = Steady()
    return machine, Children(type("Sources", (), {"watch_process": lambda *_: None})(), tmp_path, machine)


def test_is_stranger_with_any_proof_of_a_child_returns_false(tmp_path, stranger):
    machine, children = children_of(tmp_path)
    identity = processes.identity_of(stranger.pid, "here")
    child = children.meet(identity)
    assert not children.is_stranger(child)
    machine.moment += 11
    assert children.is_stranger(child)
    os.kill(stranger.pid, signal.SIGSTOP)
    wait_until(lambda: processes.is_stopped(stranger.pid), "it is stopped")
    assert not children.is_stranger(child), "a stopped child cannot dial"
    children.log_of(child).touch()
    children.recognise(child)
    assert child.vouched
    named = ProcessRef(stranger.pid, 1)
    children.vouch_for([named])
    assert children.meet(
        processes.ProcessIdentity("here", identity.boot_id, identity.pid_ns, named.pid, named.start_ticks)
    ).vouched
    child.handle.close()


def test_limits_of_a_process_that_only_a_row_names_are_never_due(tmp_path, stranger):
    _, children = children_of(tmp_path)
    child = children.meet(processes.identity_of(stranger.pid, "here"))
    child.attempt = Attempt(1, 1)
    options = SimpleNamespace(timeout_s=0.1, stall_s=None, memory_limit_bytes=1)
    clock = AttendedClock(SystemClock(), longest_s=2.0)
    enforcement = Terminations(None, children, SimpleNamespace(options=lambda _: options), None, clock)
    assert enforcement.next_due_at() is None, "else the supervisor would not rest"
    enforcement.enforce()
    assert child.termination is None
    child.vouched = True
    assert enforcement.next_due_at() is not None
    child.handle.close()


@needs_root
def test_is_stranger_of_a_process_of_another_user_returns_true_though_it_is_stopped(tmp_path, answering):
    os.kill(answering.pid, signal.SIGSTOP)
    wait_until(lambda: processes.is_stopped(answering.pid), "it is stopped")
    identity = processes.identity_of(answering.pid, "here")

    def judged():
        machine, children = children_of(tmp_path)
        child = children.meet(identity)
        machine.moment += 11
        return children.is_stranger(child)

    assert as_nobody(judged) == "True", "its state is hidden, and so it would hold a slot for ever"


def test_is_stranger_of_a_process_that_can_show_its_stack_returns_false(tmp_path, answering):
    machine, children = children_of(tmp_path)
    child = children.meet(processes.identity_of(answering.pid, "here"))
    machine.moment += 11
    assert not children.is_stranger(child)
    child.handle.close()


def test_a_log_that_is_a_link_proves_no_child(tmp_path, stranger):
    _, children = children_of(tmp_path)
    child = children.meet(processes.identity_of(stranger.pid, "here"))
    (tmp_path / "elsewhere").touch()
    children.log_of(child).symlink_to(tmp_path / "elsewhere")
    children.recognise(child)
    assert not child.vouched
    child.handle.close()


@needs_root
def test_root_asks_no_process_for_its_stack_that_only_a_row_names(make_app, answering):
    app = make_app(SOURCE)
    handle = forge(app, answering.pid)
    with pytest.raises(NoStack, match="it has no log in the state directory"):
        app.service.stack(handle)


def test_a_question_writes_into_no_file_that_a_process_claims_as_its_wake_up(tmp_path):
    target = tmp_path / "precious"
    target.write_text("as it was")
    code = f"""
import os, signal
from bgsupervisor.system import stacks
file = os.open({str(target)!r}, os.O_RDONLY)
memory = os.memfd_create(f"{{stacks.MEMORY_NAME}}.{{file}}.{{os.fstat(file).st_ino}}")
print(1, flush=True); input()
"""
    with speaking(code) as process:
        _, handle = processes.open_process(processes.identity_of(process.pid, "here"))
        with handle, pytest.raises(NoStack):
            stacks.stack_of(handle, timeout_s=1.0, clock=SystemClock())
    assert target.read_text() == "as it was"


# ---- time in which the supervisor did not run ----


def test_attended_clock_leaves_out_the_time_of_a_stop():
    machine = Steady()
    clock = AttendedClock(machine, longest_s=2.0)
    machine.moment += 1.5
    assert not clock.attend(counted_s=1.0)
    assert clock.monotonic() == 101.5
    machine.moment += 3600
    assert clock.attend(counted_s=1.0), "it was stopped"
    assert clock.monotonic() == 102.5
    assert clock.machine_monotonic() == machine.moment
    assert clock.attended(machine.moment + 1) == 103.5
    machine.moment += 3600
    assert clock.attend(counted_s=0.0)
    assert clock.monotonic() == 102.5
