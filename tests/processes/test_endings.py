"""Every reason of an end, told by real processes: how the body ended is what the row says, whoever died meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support.app import App, wait_until
from support.pace import allowed_s

from bgsupervisor.errors import Interrupted
from bgsupervisor.system import processes, syscalls

pytestmark = pytest.mark.any_database

BODIES = """
import contextlib, ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from bgsupervisor import Task, current, task

def ready(what=""):
    path = Path(f"ready-{current().id}")
    path.with_suffix(".new").write_text(str(what))
    path.with_suffix(".new").rename(path)

def latch():
    while not Path(f"latch-{current().id}").exists():
        time.sleep(0.01)

def for_ever():
    while True:
        time.sleep(600)

def daemon():
    '''A double-forked daemon in a session of its own; returns its PID.'''
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

@task
def raises(text: str) -> None:
    raise LookupError(text)

@task
def exits(code: int | str | None = None) -> None:
    sys.exit(code)

@task
def leaves_at_once(code: int) -> None:
    os._exit(code)

@task
def segfaults() -> None:
    ctypes.string_at(0)

@task
def aborts() -> None:
    os.abort()

@task
def sleeps() -> None:
    ready()
    for_ever()

@task
def ends_at_the_gate(value: int = 0, exit_code: int | None = None) -> int:
    ready()
    latch()
    if exit_code is not None:
        os._exit(exit_code)
    return value

@task
def counts() -> None:
    try:
        ready()
        for _ in current().track(range(10**9)):
            time.sleep(0.01)
    finally:
        print("finally", flush=True)

@task
def sleeps_tidily() -> None:
    try:
        ready()
        for_ever()
    finally:
        print("finally", flush=True)

@task
def fails_while_it_cleans_up() -> None:
    try:
        ready()
        for _ in current().track(range(10**9)):
            time.sleep(0.01)
    finally:
        raise OSError("cannot clean up")

@task
def ignores_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    for_ever()

@task
def returns_all_the_same() -> str:
    ready()
    while not current().cancel_requested:
        time.sleep(0.01)
    return "all done"

@task
def swallows_and_returns() -> str:
    ready()
    while True:
        try:
            for _ in current().track(range(10**9)):
                time.sleep(0.01)
        except BaseException:
            return "swallowed"

class CountsTooLong(Task):
    timeout_s = 0.4
    def run(self) -> None:
        for _ in self.track(range(10**9)):
            time.sleep(0.01)

class SleepsTooLong(Task):
    timeout_s = 0.4
    def run(self) -> None:
        try:
            time.sleep(600)
        finally:
            print("finally", flush=True)

class IgnoresItsLimit(Task):
    timeout_s = 0.4
    def run(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for_ever()

class HasALimit(Task):
    timeout_s = 2.0
    def run(self) -> None:
        ready()
        for_ever()

class EatsByAnother(Task):
    memory_limit_bytes = 150 << 20
    def run(self) -> None:
        hoard = "import time; hoard = bytearray(b'x') * (250 << 20); time.sleep(600)"
        eater = subprocess.Popen([sys.executable, "-c", hoard])
        ready(eater.pid)
        eater.wait()

class Eats(Task):
    memory_limit_bytes = 150 << 20
    def run(self) -> None:
        hoard = bytearray(b"x") * (250 << 20)
        for_ever()

@task
def eats_all() -> None:
    ready()
    latch()
    hoard = []
    while True:
        hoard.append(bytearray(b"x") * (4 << 20))

@task
def leaves_a_daemon() -> int:
    return daemon()

@task
def is_killed_and_leaves_a_daemon() -> None:
    ready(daemon())
    for_ever()
"""


class Endings(App):
    """An application of these bodies, with what the tests ask about it."""

    def __init__(self, folder, **options):
        super().__init__(folder, BODIES, **options)

    def request(self, body, **data):
        return self.service.request(f"appx:{body}", data)

    def ready(self, handle):
        """Wait until the body has said that it is there; return the record and what it said."""
        path = self.folder / f"ready-{handle.id}"
        wait_until(path.exists, f"the body of task {handle.id} is ready; its row: {self.service.get(handle)}")
        return self.started(handle), path.read_text()

    def open_gate(self, handle):
        (self.folder / f"latch-{handle.id}").touch()

    def fork_server_pid(self):
        [path] = self.state_dir.glob("forkserver-*-*")
        return int(path.name.split("-")[1])

    def children(self, fork_server_pid):
        return psutil.Process(fork_server_pid).children()

    def row_by_hand(self, handle, **columns):
        """Write a task's row as no program of ours would."""
        settings = ", ".join(f"{column} = ?" for column in columns)
        self.database.rows(f"UPDATE bgsupervisor_task SET {settings} WHERE id = ?", *columns.values(), handle.id)

    def planned(self, body="returns", **data):
        """Return a request that nobody starts yet."""
        return self.service.request(f"appx:{body}", data, delay_s=3600)

    def assert_interrupted(self, record, reason, *, exit_code=None, signal=None, detail=(), error=None):
        """See all facts of an interrupted attempt, in its row and in the row of the interruption."""
        assert (record.status, record.reason) == ("INTERRUPTED", reason), record
        assert (record.exit_code, record.signal) == (exit_code, signal), record
        for words in (detail,) if isinstance(detail, str) else detail:
            assert words in record.detail, record
        if error is None:
            assert record.error is None
        else:
            assert error in record.error
        assert record.slot is None
        assert record.result is None
        assert record.ended_at is not None
        assert (record.attempt, record.tries) == (1, 1)
        [row] = self.service.ledger.interruptions(record.id)
        for column in ("reason", "detail", "error", "exit_code", "signal", "attempt", "host", "pid", "ended_at"):
            assert row[column] == getattr(record, column), column
        with pytest.raises(Interrupted) as raised:
            self.service.result(record.id)
        assert (raised.value.reason, raised.value.detail) == (record.reason, record.detail)

    def assert_done(self, record, value, *, attempt=1):
        assert (record.status, record.reason, record.detail) == ("DONE", None, None), record
        assert (record.slot, record.exit_code, record.signal, record.error) == (None, None, None, None)
        assert (record.attempt, record.tries) == (attempt, 0)
        assert self.service.result(record.id) == value
        assert self.service.ledger.interruptions(record.id) == []


def is_gone(pid):
    """Whether no process has this PID, or only what is left of a dead one."""
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def living(folder, **options):
    app = Endings(folder, **options)
    try:
        yield app
    finally:
        app.end()


@pytest.fixture
def make_endings(tmp_path):
    made = []

    def make(**options):
        made.append(Endings(tmp_path / f"app-{len(made)}", **{"spares": 0, **options}))
        return made[-1]

    yield make
    for app in made:
        app.end()


# ---- what takes seconds is begun before the first test ----


@pytest.fixture(scope="module", autouse=True)
def abandoned(tmp_path_factory):
    """Fork server and idle child without a supervisor, and a row that claims that the child runs a task."""
    with living(tmp_path_factory.mktemp("abandoned"), spares=1) as app:
        supervisor = app.start()
        fork_server = app.fork_server_pid()
        [idle] = wait_until(lambda: app.children(fork_server), "the spare child is there")
        supervisor.kill()
        yield app, fork_server, idle, claimed_for(app, idle)


@pytest.fixture(scope="module", autouse=True)
def claimed_in_vain(tmp_path_factory):
    """A living supervisor, and a row which claims that its idle child runs a task."""
    with living(tmp_path_factory.mktemp("claimed"), spares=1) as app:
        app.start()
        [idle] = wait_until(lambda: app.children(app.fork_server_pid()), "the spare child is there")
        wait_until(lambda: has_dialled(idle), "the spare child has dialled")
        yield app, claimed_for(app, idle)


# ---- one supervisor, all kinds of ends at once ----


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with living(tmp_path_factory.mktemp("endings"), spares=4) as app:
        app.start()
        yield app


OWN_ENDS = {
    "raises": ("raises", {"text": "no such invoice"}),
    "sys.exit()": ("exits", {}),
    "sys.exit(3)": ("exits", {"code": 3}),
    "sys.exit('text')": ("exits", {"code": "out of paper"}),
    "os._exit(0)": ("leaves_at_once", {"code": 0}),
    "os._exit(7)": ("leaves_at_once", {"code": 7}),
    "segfaults": ("segfaults", {}),
    "aborts": ("aborts", {}),
    "eats": ("Eats", {}),
    "eats by another": ("EatsByAnother", {}),
    "counts too long": ("CountsTooLong", {}),
    "sleeps too long": ("SleepsTooLong", {}),
    "ignores its limit": ("IgnoresItsLimit", {}),
    "daemon": ("leaves_a_daemon", {}),
}


@pytest.fixture(scope="module")
def own_ends(app):
    """The records of the bodies that end without anybody's help."""
    handles = {what: app.request(body, **data) for what, (body, data) in OWN_ENDS.items()}
    return {what: app.wait(handle) for what, handle in handles.items()}


def test_a_body_that_raises_is_raised_with_its_traceback(app, own_ends):
    record = own_ends["raises"]
    app.assert_interrupted(
        record, "RAISED", detail="LookupError: no such invoice", error="raise LookupError(text)\nLookupError: no such"
    )
    assert 'appx.py", line' in record.error


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [("sys.exit()", 0, "SystemExit"), ("sys.exit(3)", 3, "SystemExit: 3"), ("sys.exit('text')", 1, "out of paper")],
)
def test_sys_exit_is_exited_with_its_code_also_zero(app, own_ends, call, code, said):
    detail = f"the body called sys.exit with code {code}"
    app.assert_interrupted(own_ends[call], "EXITED", exit_code=code, detail=detail, error=said)


@pytest.mark.parametrize("code", [0, 7])
def test_os_exit_is_exited_with_its_code_also_zero(app, own_ends, code):
    detail = f"the process exited with code {code} before it reported an end"
    app.assert_interrupted(own_ends[f"os._exit({code})"], "EXITED", exit_code=code, detail=detail)


@pytest.mark.parametrize(("body", "number"), [("segfaults", signal.SIGSEGV), ("aborts", signal.SIGABRT)])
def test_a_crash_in_c_code_is_signalled_with_the_name_of_the_signal(app, own_ends, body, number):
    detail = f"killed by {number.name} ({number.value}), which bgsupervisor did not send"
    app.assert_interrupted(own_ends[body], "SIGNALLED", signal=number, detail=detail)


@pytest.mark.parametrize("body", ["eats", "eats by another"])
def test_memory_past_its_limit_is_out_of_memory_also_that_of_another_process(app, own_ends, body):
    record = own_ends[body]
    words = ("over its memory_limit_bytes of 150 MiB", "SIGKILL was sent")
    app.assert_interrupted(record, "OUT_OF_MEMORY", signal=signal.SIGKILL, detail=words)
    assert float(record.detail.split()[1]) > 150
    assert record.peak_rss_bytes > 150 << 20
    if body == "eats by another":
        eater = (app.folder / f"ready-{record.id}").read_text()
        wait_until(lambda: is_gone(eater), "the process that the body had started is gone too")


def test_a_cooperative_body_past_its_limit_is_timed_out_at_the_next_track(app, own_ends):
    record = own_ends["counts too long"]
    words = ("timeout_s", "the body ended when it was asked")
    app.assert_interrupted(record, "TIMED_OUT", detail=words, error="Cancelled")
    assert 0 < record.progress_done < 10**9
    assert 0.3 < (record.ended_at - record.started_at).total_seconds() < allowed_s(1.0)


def test_a_body_in_a_blocking_call_is_timed_out_by_sigterm_and_its_finally_blocks_run(app, own_ends):
    record = own_ends["sleeps too long"]
    app.assert_interrupted(record, "TIMED_OUT", detail=("timeout_s of 0.4", "SIGTERM was sent"), error="Cancelled")
    assert app.log_of(record).splitlines().count("finally") == 1


def test_a_body_that_ignores_sigterm_is_timed_out_by_sigkill_and_the_detail_tells_so(app, own_ends):
    words = ("ran past its timeout_s of 0.4 s", "SIGKILL was sent")
    app.assert_interrupted(own_ends["ignores its limit"], "TIMED_OUT", signal=signal.SIGKILL, detail=words)


def test_a_daemon_that_a_body_left_is_gone_when_its_task_has_ended(app, own_ends):
    record = own_ends["daemon"]
    assert record.status == "DONE"
    assert is_gone(app.service.result(record.id))


CANCELLED = ("counts", "sleeps_tidily", "fails_while_it_cleans_up", "ignores_sigterm")
NOT_CANCELLED = ("returns_all_the_same", "swallows_and_returns")


@pytest.fixture(scope="module")
def cancelled(app):
    """The records of bodies that were cancelled while they ran, by jana."""
    handles = {body: app.request(body) for body in (*CANCELLED, *NOT_CANCELLED)}
    for handle in handles.values():
        app.ready(handle)
    asked = {body: app.service.cancel(handle, by="jana") for body, handle in handles.items()}
    for record in asked.values():
        assert (record.status, record.cancel_requested_by) == ("START", "jana")
        assert record.cancel_requested_at is not None
    return {body: app.wait(handle) for body, handle in handles.items()}


def test_a_cooperative_body_is_cancelled_when_it_is_asked(app, cancelled):
    record = cancelled["counts"]
    words = ("cancelled by jana", "the body ended when it was asked")
    app.assert_interrupted(record, "CANCELLED", detail=words, error="Cancelled")
    assert record.cancel_requested_by == "jana"
    assert (record.ended_at - record.cancel_requested_at).total_seconds() < allowed_s(0.8)
    assert app.log_of(record).splitlines().count("finally") == 1


def test_a_blocked_body_is_cancelled_by_sigterm_and_its_finally_blocks_run(app, cancelled):
    record = cancelled["sleeps_tidily"]
    words = ("cancelled by jana", "SIGTERM was sent")
    app.assert_interrupted(record, "CANCELLED", detail=words, error="Cancelled")
    assert app.log_of(record).splitlines().count("finally") == 1


def test_a_body_that_fails_while_it_cleans_up_is_cancelled_all_the_same(app, cancelled):
    record = cancelled["fails_while_it_cleans_up"]
    app.assert_interrupted(record, "CANCELLED", detail="the body ended when it was asked", error="OSError: cannot")


def test_a_body_that_ignores_sigterm_is_cancelled_by_sigkill_and_the_detail_tells_so(app, cancelled):
    record = cancelled["ignores_sigterm"]
    words = ("cancelled by jana", "SIGKILL was sent")
    app.assert_interrupted(record, "CANCELLED", signal=signal.SIGKILL, detail=words)
    assert (record.ended_at - record.cancel_requested_at).total_seconds() < allowed_s(3.0)


@pytest.mark.parametrize(
    ("body", "value"), [("returns_all_the_same", "all done"), ("swallows_and_returns", "swallowed")]
)
def test_a_body_that_returns_though_it_was_cancelled_is_done(app, cancelled, body, value):
    app.assert_done(cancelled[body], value)
    assert cancelled[body].cancel_requested_by == "jana"


def test_a_cancel_of_an_ended_task_changes_nothing(app, own_ends):
    for what in ("raises", "daemon"):
        before = app.service.get(own_ends[what].id)
        assert app.service.cancel(before.id, by="too late") == before
        assert app.service.get(before.id) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_body_killed_from_outside_is_signalled_within_a_second(app, number):
    handle = app.request("sleeps_tidily")
    record, _ = app.ready(handle)
    killed_at = time.monotonic()
    os.kill(record.pid, number)
    record = app.wait(handle)
    assert time.monotonic() - killed_at < allowed_s(1.0)
    detail = f"killed by {number.name} ({number.value}), which bgsupervisor did not send"
    app.assert_interrupted(record, "SIGNALLED", signal=number, detail=detail)


def test_a_body_killed_from_outside_after_it_was_asked_to_end_is_signalled(make_endings):
    app = make_endings(grace_s=30.0)
    app.start()
    handle = app.request("sleeps")
    record, _ = app.ready(handle)
    app.service.cancel(handle, by="jana")
    log = app.state_dir / "logs" / "supervisor.log"
    wait_until(lambda: "is to end: cancelled by jana" in log.read_text(), "the supervisor has asked the body")
    os.kill(record.pid, signal.SIGKILL)
    app.assert_interrupted(app.wait(handle), "SIGNALLED", signal=signal.SIGKILL, detail="did not send")


def test_a_daemon_of_a_body_that_was_killed_is_gone_too(app):
    handle = app.request("is_killed_and_leaves_a_daemon")
    record, daemon = app.ready(handle)
    assert not is_gone(daemon)
    os.kill(record.pid, signal.SIGKILL)
    app.assert_interrupted(app.wait(handle), "SIGNALLED", signal=signal.SIGKILL)
    wait_until(lambda: is_gone(daemon), "the daemon is gone")


# ---- without a supervisor ----


def test_a_waiting_task_is_cancelled_at_once_without_a_supervisor(make_endings):
    app = make_endings()
    handle = app.request("returns")
    record = app.service.cancel(handle, by="jana")
    assert (record.status, record.reason, record.slot, record.attempt) == ("INTERRUPTED", "CANCELLED", None, 0)
    assert record.detail == "cancelled by jana before it began"
    assert (record.cancel_requested_by, record.exit_code, record.signal) == ("jana", None, None)
    assert record.ended_at == record.cancel_requested_at is not None
    assert app.service.ledger.interruptions(handle.id) == []
    assert not app.state_dir.exists()


# ---- rows of processes that are not there ----


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """START rows of all kinds, as another boot, another container or a hand may leave them, and one supervisor."""
    with (
        living(tmp_path_factory.mktemp("foreign"), spares=0, slots=7) as app,
        subprocess.Popen(["sleep", "600"]) as bystander,
    ):
        try:
            yield app, judged_foreign_rows(app, bystander), bystander
        finally:
            bystander.kill()


def judged_foreign_rows(app, bystander):
    own = processes.own_identity("this-host")
    ticks = processes.start_ticks(bystander.pid)
    now, past = "2999-01-01 00:00:00.000000+00:00", "2001-01-01 00:00:00.000000+00:00"
    common = {"status": "START", "attempt": 1, "host": "this-host", "started_at": past}
    here = {"boot_id": own.boot_id, "pid_ns": own.pid_ns, "pid": bystander.pid}
    rows = {
        "rebooted": {**here, "start_ticks": ticks, "boot_id": "another-boot", "heartbeat_at": past},
        "lost": {**here, "start_ticks": ticks, "pid_ns": own.pid_ns + 1, "heartbeat_at": past},
        "silent": {**here, "start_ticks": ticks, "pid_ns": own.pid_ns + 1, "heartbeat_at": None},
        "beating": {**here, "start_ticks": ticks, "pid_ns": own.pid_ns + 1, "heartbeat_at": now},
        "by hand": {"host": None},
        "reused": {**here, "start_ticks": ticks - 1, "heartbeat_at": past},
        "gone": {**here, "pid": 2**22 - 1, "start_ticks": 1, "heartbeat_at": past},
    }
    handles = {}
    for slot, (what, columns) in enumerate(rows.items()):
        handles[what] = app.planned()
        app.row_by_hand(handles[what], **{**common, "slot": slot, **columns})
    started_at = time.monotonic()
    app.start(wait=False)
    records = {what: app.wait(handle) for what, handle in handles.items() if what != "beating"}
    app.took_s = time.monotonic() - started_at
    app.beating = handles["beating"]
    return records


def test_dead_rows_are_judged_within_two_seconds_of_the_start(foreign):
    app, _, _ = foreign
    assert app.took_s < allowed_s(2.0)


@pytest.mark.parametrize(
    ("what", "reason", "detail"),
    [
        ("rebooted", "HOST_REBOOTED", "boot id differs"),
        ("lost", "HOST_LOST", "silent for over 30 s"),
        ("silent", "HOST_LOST", "another PID namespace"),
        ("by hand", "VANISHED", "the row names no process"),
        ("reused", "VANISHED", "nobody could see how it ended"),
        ("gone", "VANISHED", "nobody could see how it ended"),
    ],
)
def test_a_row_without_its_process_gets_the_reason_that_is_known(foreign, what, reason, detail):
    app, records, _ = foreign
    app.assert_interrupted(records[what], reason, detail=detail)


def test_whoever_has_a_reused_pid_is_not_signalled(foreign):
    app, records, bystander = foreign
    app.service.cancel(records["reused"].id)
    assert bystander.poll() is None


def test_a_row_of_another_container_that_still_beats_is_left_alone_and_keeps_its_slot(foreign):
    app, _, _ = foreign
    handles = [app.request("ends_at_the_gate") for _ in range(7)]
    for handle in handles[:6]:
        app.ready(handle)
    beating = app.service.get(app.beating)
    assert (beating.status, beating.reason, beating.slot) == ("START", None, 3)
    assert {app.service.get(handle).slot for handle in handles[:6]} == {0, 1, 2, 4, 5, 6}
    assert app.service.get(handles[6]).status == "REQUEST"
    for handle in handles:
        app.open_gate(handle)
    for handle in handles:
        app.assert_done(app.wait(handle), 0)


# ---- the supervisor dies ----


@pytest.fixture(scope="module")
def orphaned(tmp_path_factory):
    """Tasks of all kinds whose supervisor is SIGKILLed while they run, and what becomes of them."""
    with living(tmp_path_factory.mktemp("orphaned"), spares=0, grace_s=1.5) as app:
        yield app, *fates_of_orphans(app)


def fates_of_orphans(app):
    first = app.start()
    done = app.wait(app.request("returns", value=5))
    bodies = {
        "returns": ("ends_at_the_gate", {"value": 6}),
        "exits": ("ends_at_the_gate", {"exit_code": 7}),
        "killed": ("sleeps", {}),
        "cancelled meanwhile": ("counts", {}),
        "cancelled later": ("sleeps_tidily", {}),
        "limited": ("HasALimit", {}),
        "stopped": ("ends_at_the_gate", {"value": 8}),
        "outlives": ("ends_at_the_gate", {"value": 9}),
        "killed later": ("sleeps", {}),
        "daemon": ("is_killed_and_leaves_a_daemon", {}),
    }
    handles = {what: app.request(body, **data) for what, (body, data) in bodies.items()}
    running = {what: app.ready(handle)[0] for what, handle in handles.items()}
    app.daemon = app.ready(handles["daemon"])[1]
    first.kill()
    for what in ("returns", "exits"):
        app.open_gate(handles[what])
    for what in ("killed", "daemon"):
        os.kill(running[what].pid, signal.SIGKILL)
    os.kill(running["stopped"].pid, signal.SIGSTOP)
    app.alone = {"returns": app.wait(handles["returns"])}
    for what in ("exits", "killed", "daemon"):
        wait_until(lambda one=running[what].pid: is_gone(one), f"the process of the task that {what} is gone")
        app.alone[what] = app.service.get(handles[what])
    wait_until(lambda: is_gone(app.daemon), "the fork server has killed the daemon that a dead body had left")
    app.asked = app.service.cancel(handles["cancelled meanwhile"], by="jana")
    started_at = time.monotonic()
    app.start(wait=False)
    records = {what: app.wait(handles[what]) for what in ("returns", "exits", "killed", "daemon")}
    app.took_s = time.monotonic() - started_at
    records["cancelled meanwhile"] = app.wait(handles["cancelled meanwhile"])
    app.service.cancel(handles["cancelled later"], by="otto")
    os.kill(running["killed later"].pid, signal.SIGKILL)
    records["killed later"] = app.wait(handles["killed later"])
    records["new"] = app.wait(app.request("returns", value=3))
    app.while_stopped = app.service.get(handles["stopped"])
    os.kill(running["stopped"].pid, signal.SIGCONT)
    for what in ("stopped", "outlives"):
        app.open_gate(handles[what])
    records |= {what: app.wait(handle) for what, handle in handles.items() if what not in records}
    records["done"] = done
    return records, running


def test_what_ended_while_no_supervisor_lived_is_told_within_two_seconds_of_the_next_start(orphaned):
    app, _, _ = orphaned
    assert app.took_s < allowed_s(2.0)


def test_a_task_that_was_done_stays_so_whoever_is_killed_afterwards(orphaned):
    app, records, _ = orphaned
    assert app.service.get(records["done"].id) == records["done"]
    app.assert_done(records["done"], 5)


def test_a_body_that_returns_while_no_supervisor_lives_is_done_recorded_by_its_child(orphaned):
    app, records, _ = orphaned
    app.assert_done(app.alone["returns"], 6)
    assert records["returns"] == app.alone["returns"]


def test_a_task_killed_while_no_supervisor_lives_keeps_its_exact_signal(orphaned):
    app, records, _ = orphaned
    assert app.alone["killed"].status == "START"
    for what in ("killed", "daemon"):
        app.assert_interrupted(records[what], "SIGNALLED", signal=signal.SIGKILL, detail="SIGKILL (9)")


def test_an_exit_that_cannot_be_written_down_is_remembered(make_endings):
    app = make_endings()
    supervisor = app.start()
    handle = app.request("sleeps")
    record, _ = app.ready(handle)
    [path] = app.state_dir.glob("forkserver-*-*")
    path.unlink()
    path.mkdir()  # as on a full disk
    supervisor.kill()
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(record.pid), "the fork server has reaped it")
    app.start()
    app.assert_interrupted(app.wait(handle), "SIGNALLED", signal=signal.SIGKILL, detail="SIGKILL (9)")


def test_a_task_that_exits_while_no_supervisor_lives_keeps_its_exact_code(orphaned):
    app, records, _ = orphaned
    assert app.alone["exits"].status == "START"
    app.assert_interrupted(records["exits"], "EXITED", exit_code=7, detail="code 7")


def test_a_cancel_without_a_supervisor_reaches_the_body_as_soon_as_the_next_one_is_there(orphaned):
    app, records, _ = orphaned
    assert (app.asked.status, app.asked.cancel_requested_by) == ("START", "jana")
    record = records["cancelled meanwhile"]
    words = ("cancelled by jana", "the body ended when it was asked")
    app.assert_interrupted(record, "CANCELLED", detail=words, error="Cancelled")


def test_the_next_supervisor_can_cancel_a_body_that_it_adopted(orphaned):
    app, records, _ = orphaned
    words = ("cancelled by otto", "SIGTERM was sent")
    app.assert_interrupted(records["cancelled later"], "CANCELLED", detail=words, error="Cancelled")
    assert app.log_of(records["cancelled later"]).splitlines().count("finally") == 1


def test_the_next_supervisor_keeps_the_time_limit_of_a_body_that_it_adopted(orphaned):
    app, records, _ = orphaned
    record = records["limited"]
    app.assert_interrupted(record, "TIMED_OUT", detail="ran past its timeout_s of 2 s", error="Cancelled")
    assert 2.0 <= (record.ended_at - record.started_at).total_seconds() < allowed_s(6.0)


def test_the_next_supervisor_learns_the_signal_that_kills_a_body_that_it_adopted(orphaned):
    app, records, _ = orphaned
    app.assert_interrupted(records["killed later"], "SIGNALLED", signal=signal.SIGKILL, detail="did not send")


def test_a_stopped_child_is_not_declared_dead(orphaned):
    app, records, running = orphaned
    assert (app.while_stopped.status, app.while_stopped.slot) == ("START", running["stopped"].slot)
    app.assert_done(records["stopped"], 8)


def test_a_body_outlives_its_supervisor_in_one_attempt_and_one_process(orphaned):
    app, records, running = orphaned
    app.assert_done(records["outlives"], 9)
    assert records["outlives"].pid == running["outlives"].pid


def test_the_next_supervisor_starts_new_tasks_beside_those_that_it_adopted(orphaned):
    app, records, _ = orphaned
    app.assert_done(records["new"], 3)


@pytest.mark.on_both
def test_sigterm_to_the_supervisor_leaves_its_children_alive(make_endings):
    app = make_endings()
    supervisor = app.start()
    handle = app.request("ends_at_the_gate", value=4)
    record, _ = app.ready(handle)
    assert supervisor.stop() == 0
    assert psutil.pid_exists(record.pid)
    assert app.service.get(handle).status == "START"
    app.open_gate(handle)
    app.assert_done(app.wait(handle), 4)


def test_sigint_twice_ends_what_runs_as_stopped_and_the_supervisor_leaves(make_endings):
    app = make_endings()
    supervisor = app.start()
    handles = [app.request(body) for body in ("sleeps_tidily", "ignores_sigterm", "counts")]
    for handle in handles:
        app.ready(handle)
    log = app.state_dir / "logs" / "supervisor.log"
    supervisor.process.send_signal(signal.SIGINT)
    wait_until(lambda: "still running: " in log.read_text(), "the supervisor names what still runs")
    waiting = app.request("returns")
    assert {app.service.get(handle).status for handle in handles} == {"START"}
    supervisor.process.send_signal(signal.SIGINT)
    tidy, stubborn, cooperative = (app.wait(handle) for handle in handles)
    assert supervisor.process.wait(10) == 0
    app.assert_interrupted(tidy, "STOPPED", detail=("told to stop and kill (Ctrl-C)", "SIGTERM"), error="Cancelled")
    app.assert_interrupted(stubborn, "STOPPED", signal=signal.SIGKILL, detail=("Ctrl-C", "SIGKILL was sent"))
    app.assert_interrupted(cooperative, "STOPPED", detail="stop", error="Cancelled")
    assert app.log_of(tidy).splitlines().count("finally") == 1
    assert app.service.get(waiting).status == "REQUEST"


def test_of_two_supervisors_started_at_once_one_stays_and_the_other_leaves_in_silence(make_endings):
    app = make_endings()
    both = [app.start(wait=False) for _ in range(2)]
    other = wait_until(lambda: [one for one in both if one.process.poll() is not None], "one of the two leaves")
    app.assert_done(app.wait(app.request("returns")), 1)
    [one] = [one for one in both if one not in other]
    assert one.process.poll() is None
    assert [left.process.returncode for left in other] == [0]
    assert [left.output.read_text() for left in other] == [""]
    assert (app.state_dir / "logs" / "supervisor.log").read_text().count("supervising ") == 1


# ---- a supervisor that waits does not spin ----


def assert_it_rests(supervisor, for_s=0.6):
    """See that it uses next to no CPU time over a while; a loop that does not rest uses nearly all of it."""
    process = psutil.Process(supervisor.process.pid)
    began, used = time.monotonic(), sum(process.cpu_times()[:2])
    wait_until(lambda: time.monotonic() - began > for_s, "some time passes")
    assert sum(process.cpu_times()[:2]) - used < 0.2 * (time.monotonic() - began)


def test_a_supervisor_rests_while_it_waits_for_its_last_bodies_though_other_tasks_are_due(make_endings):
    app = make_endings()
    supervisor = app.start()
    handle = app.request("ends_at_the_gate")
    app.ready(handle)
    app.service.request("appx:returns", delay_s=0.2)
    log = app.state_dir / "logs" / "supervisor.log"
    supervisor.process.send_signal(signal.SIGINT)
    wait_until(lambda: "still running: " in log.read_text(), "the supervisor names what still runs")
    app.request("returns")
    assert_it_rests(supervisor)
    app.open_gate(handle)
    assert supervisor.process.wait(10) == 0
    app.assert_done(app.service.get(handle), 0)


@pytest.mark.on_both
def test_a_supervisor_rests_while_the_database_is_locked_and_records_the_ends_afterwards(make_endings):
    app = make_endings()
    supervisor = app.start()
    handles = [app.request("ends_at_the_gate", value=2), app.request("sleeps")]
    _, killed = [app.ready(handle)[0] for handle in handles]
    with app.database.locked():
        app.open_gate(handles[0])
        os.kill(killed.pid, signal.SIGKILL)
        wait_until(lambda: is_gone(killed.pid), "the child is gone")
        assert_it_rests(supervisor, 1.2)
        assert {app.service.get(handle).status for handle in handles} == {"START"}
    app.assert_done(app.wait(handles[0]), 2)
    app.assert_interrupted(app.wait(handles[1]), "SIGNALLED", signal=signal.SIGKILL)


# ---- everybody dies ----


def test_when_all_are_killed_at_once_the_next_supervisor_says_vanished_within_two_seconds(make_endings):
    app = make_endings()
    supervisor = app.start()
    done = app.wait(app.request("returns", value=2))
    handle = app.request("sleeps")
    record, _ = app.ready(handle)
    everybody = [supervisor.process.pid, app.fork_server_pid(), record.pid]
    for pid in everybody[:2]:
        os.kill(pid, signal.SIGSTOP)  # nobody is to see what happens next
    for pid in reversed(everybody):
        os.kill(pid, signal.SIGKILL)
    supervisor.process.wait()
    for pid in everybody:
        # A zombie would still tell how it died.
        wait_until(lambda one=pid: not psutil.pid_exists(one), f"PID {pid} is gone, and reaped by the init process")
    assert app.service.get(handle).status == "START"
    started_at = time.monotonic()
    app.start(wait=False)
    app.assert_interrupted(app.wait(handle), "VANISHED", detail="its process is gone and nobody could see how")
    assert time.monotonic() - started_at < allowed_s(2.0)
    assert app.service.get(done.id) == done
    app.assert_done(app.wait(app.request("returns", value=3)), 3)


# ---- the fork server dies ----


def test_running_bodies_outlive_their_fork_server_and_their_deaths_are_still_told_exactly(make_endings):
    app = make_endings()
    app.start()
    bodies = {
        "returns": ("ends_at_the_gate", {"value": 6}),
        "exits": ("ends_at_the_gate", {"exit_code": 7}),
        "killed": ("sleeps", {}),
        "cancelled": ("sleeps_tidily", {}),
        "daemon": ("is_killed_and_leaves_a_daemon", {}),
    }
    handles = {what: app.request(body, **data) for what, (body, data) in bodies.items()}
    running = {what: app.ready(handle)[0] for what, handle in handles.items()}
    daemon = app.ready(handles["daemon"])[1]
    fork_server = app.fork_server_pid()
    os.kill(fork_server, signal.SIGKILL)
    new = app.request("returns", value=3)
    app.assert_done(app.wait(new), 3)
    assert {app.service.get(handle).status for handle in handles.values()} == {"START"}
    assert {app.service.get(handle).pid for handle in handles.values()} == {one.pid for one in running.values()}
    for what in ("returns", "exits"):
        app.open_gate(handles[what])
    for what in ("killed", "daemon"):
        os.kill(running[what].pid, signal.SIGKILL)
    app.service.cancel(handles["cancelled"], by="jana")
    records = {what: app.wait(handle) for what, handle in handles.items()}
    app.assert_done(records["returns"], 6)
    app.assert_interrupted(records["exits"], "EXITED", exit_code=7)
    app.assert_interrupted(records["killed"], "SIGNALLED", signal=signal.SIGKILL)
    app.assert_interrupted(records["daemon"], "SIGNALLED", signal=signal.SIGKILL)
    app.assert_interrupted(records["cancelled"], "CANCELLED", detail="cancelled by jana", error="Cancelled")
    wait_until(lambda: is_gone(daemon), "the daemon is gone though its fork server was dead")


def kernel_tells_exits():
    """Whether this kernel keeps the exit of a reaped process for who holds a pidfd of it (6.15 and later)."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 7"], {})
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    told = syscalls.pidfd_exit(pidfd)
    os.close(pidfd)
    return told is not None


def test_a_body_that_lost_fork_server_and_supervisor_ends_with_what_the_kernel_still_tells(make_endings):
    app = make_endings()
    supervisor = app.start()
    handles = [app.request("sleeps"), app.request("ends_at_the_gate", value=6)]
    killed, _ = [app.ready(handle)[0] for handle in handles]
    fork_server = app.fork_server_pid()
    supervisor.kill()
    os.kill(fork_server, signal.SIGKILL)
    app.start()
    app.open_gate(handles[1])
    app.assert_done(app.wait(handles[1]), 6)
    os.kill(killed.pid, signal.SIGKILL)
    record = app.wait(handles[0])
    if kernel_tells_exits():
        app.assert_interrupted(record, "SIGNALLED", signal=signal.SIGKILL)
    else:
        app.assert_interrupted(record, "VANISHED", detail="nobody could see how")


# ---- claimed and never begun ----


def claimed_for(app, child):
    """Return a task whose row says that it was claimed for a child that has never heard of it."""
    own = processes.own_identity(processes.host_id(None))
    handle = app.planned("returns", value=7)
    app.row_by_hand(
        handle,
        status="START",
        attempt=1,
        slot=0,
        host=own.host,
        boot_id=own.boot_id,
        pid_ns=own.pid_ns,
        pid=child.pid,
        start_ticks=processes.start_ticks(child.pid),
        started_at="2026-01-01 00:00:00.000000+00:00",
        run_at="2026-01-01 00:00:00.000000+00:00",
    )
    return handle


def test_a_task_claimed_for_a_child_that_never_heard_of_it_is_started_by_the_next_supervisor(make_endings):
    app = make_endings(spares=1)
    supervisor = app.start()
    [idle] = wait_until(lambda: app.children(app.fork_server_pid()), "the spare child is there")
    supervisor.kill()
    handle = claimed_for(app, idle)
    app.start(wait=False)
    app.assert_done(app.wait(handle), 7, attempt=2)


@pytest.mark.on_both
def test_an_order_that_had_left_before_the_supervisor_died_is_carried_out_once(make_endings):
    app = make_endings(spares=1, slots=1)
    supervisor = app.start()
    [idle] = wait_until(lambda: app.children(app.fork_server_pid()), "the spare child is there")
    wait_until(lambda: has_dialled(idle), "the spare child has dialled")
    os.kill(idle.pid, signal.SIGSTOP)
    handle = app.request("returns", value=4)
    record = app.started(handle)
    supervisor.kill()
    app.start()
    os.kill(idle.pid, signal.SIGCONT)
    app.assert_done(app.wait(handle), 4)
    assert app.service.get(handle).pid == record.pid == idle.pid


def has_dialled(process):
    """Whether a child's link thread has its connection, and rests: then its hello is written too."""
    with contextlib.suppress(psutil.Error, OSError):
        if process.num_threads() == 2 and any(one.type == 1 for one in process.net_connections("unix")):
            [link] = [one.id for one in process.threads() if one.id != process.pid]
            before = switches(process.pid, link)
            time.sleep(0.05)
            return before == switches(process.pid, link)
    return False


def switches(pid, thread):
    """Return the state of a thread, and how often it has gone to rest and been interrupted."""
    lines = Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
    return [line for line in lines if line.startswith(("State:", "voluntary", "nonvoluntary"))]


def test_a_stopped_child_that_is_killed_with_its_order_unread_leaves_it_to_another(make_endings):
    app = make_endings(spares=1, slots=1)
    app.start()
    [idle] = wait_until(lambda: app.children(app.fork_server_pid()), "the spare child is there")
    wait_until(lambda: has_dialled(idle), "the spare child has dialled")
    os.kill(idle.pid, signal.SIGSTOP)
    handle = app.request("returns")
    record = app.started(handle)
    assert record.pid == idle.pid
    os.kill(idle.pid, signal.SIGKILL)
    app.assert_done(app.wait(handle), 1, attempt=2)


def test_children_and_fork_server_leave_when_no_supervisor_comes_and_give_back_what_they_never_began(abandoned):
    app, fork_server, idle, handle = abandoned
    record = wait_until(
        lambda: (record := app.service.get(handle)).status == "REQUEST" and record,
        "the idle child has given back what it never began",
    )
    assert (record.pid, record.slot, record.started_at, record.attempt, record.tries) == (None, None, None, 1, 0)
    wait_until(lambda: is_gone(idle.pid), "the idle child has left")
    wait_until(lambda: is_gone(fork_server), "the fork server has left")
    assert list(app.state_dir.glob("forkserver-*")) == []


def test_a_task_claimed_for_an_idle_child_that_never_heard_of_it_is_started_anew(claimed_in_vain):
    app, handle = claimed_in_vain
    app.assert_done(app.wait(handle), 7, attempt=2)


# ---- the kernel's OOM killer ----


@pytest.fixture
def small_cgroup():
    """A real memory cgroup of 160 MiB, where the machine lets us have one."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    folder = (root / "memory" if old else root) / f"bgsupervisor-endings-{os.getpid()}"
    limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if old else ["memory.max", "memory.swap.max"]
    try:
        folder.mkdir()
        (folder / limits[0]).write_text(str(160 << 20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no memory cgroup to be had: {error}")
    for name in limits[1:]:
        if (folder / name).exists():
            (folder / name).write_text(str(160 << 20) if old else "0")
    yield folder

    def removed():
        with contextlib.suppress(OSError):
            folder.rmdir()
        return not folder.is_dir()

    wait_until(removed, "the cgroup is empty and can be removed")


def cgroup_of_this_process(small_cgroup):
    """Return the folder of the memory cgroup that this process is in now."""
    old = (small_cgroup / "memory.limit_in_bytes").exists()
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if ("memory" in controllers.split(",")) if old else not controllers:
            return small_cgroup.parent / path.strip("/")
    raise AssertionError("this process is in no memory cgroup")


@pytest.fixture
def crowded(small_cgroup, tmp_path):
    """An application whose supervisor, fork server and children all live in the small cgroup."""
    app = Endings(tmp_path / "crowded", spares=0)
    fork_server = cgroup_of_this_process(small_cgroup)
    (small_cgroup / "cgroup.procs").write_text(str(os.getpid()))
    try:
        app.start(wait=False)
    finally:
        (fork_server / "cgroup.procs").write_text(str(os.getpid()))
    yield app
    app.end()
    for pid in (small_cgroup / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def test_the_kernels_oom_killer_is_told_from_a_plain_sigkill_in_the_same_cgroup(crowded):
    handles = [crowded.request("eats_all"), crowded.request("sleeps"), crowded.request("ends_at_the_gate", value=2)]
    eater, plain, _ = [crowded.ready(handle)[0] for handle in handles]
    crowded.open_gate(handles[0])
    record = crowded.wait(handles[0])
    named = f"killed by the kernel's OOM killer: the kernel log names PID {eater.pid}"
    counted = "killed by the kernel's OOM killer: the task's cgroup counted an OOM kill while it ran"
    crowded.assert_interrupted(record, "OUT_OF_MEMORY", signal=signal.SIGKILL)
    assert record.detail in (named, counted)
    os.kill(plain.pid, signal.SIGKILL)
    record = crowded.wait(handles[1])
    crowded.assert_interrupted(record, "SIGNALLED", signal=signal.SIGKILL, detail="SIGKILL (9), which bgsupervisor")
    crowded.open_gate(handles[2])
    crowded.assert_done(crowded.wait(handles[2]), 2)
