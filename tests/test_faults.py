"""What machines do to processes: clocks that jump, PIDs that come back, process tables that hide, nobody who reaps.

Whatever it is, nobody is called dead who lives, and what nobody could see is called unknown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from datetime import timedelta
from multiprocessing.context import SpawnProcess
from pathlib import Path

import psutil
import pytest
from conftest import LIMIT_S, App, wait_until
from pace import allowed_s
from users import DEPLOY, their_python  # noqa: F401 - a fixture

import bgsupervisor
from bgsupervisor import processes
from bgsupervisor.boards import Boards
from bgsupervisor.clock import AttendedClock, SystemClock
from bgsupervisor.ledger import Attempt
from bgsupervisor.nurseries import FORK_S
from bgsupervisor.processes import Verdict
from bgsupervisor.reception import Reception
from bgsupervisor.recovery import Recovery
from bgsupervisor.statedir import StateDir
from bgsupervisor.statuses import Reason, Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces and mount")

TASKS = """
    import ctypes, itertools, os, pathlib, signal, time
    from bgsupervisor import Task, current, task

    @task
    def quick() -> int:
        return 1

    @task
    def until(name: str) -> str:
        pathlib.Path(f"began-{current().id}").touch()
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
        return "its end"

    @task
    def ignores_sigterm() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    @task
    def holds_the_gil(seconds: int) -> int:
        pathlib.Path("holds").touch()
        return ctypes.PyDLL(None).sleep(seconds)

    class HoldsTheGil(Task):
        timeout_s = 0.5

        def run(self) -> None:
            sum(itertools.repeat(1, 10**15))

    class HasALimit(Task):
        timeout_s = 1.5

        def run(self) -> None:
            time.sleep(600)
"""


def nursery_of(app):
    [path] = app.state_dir.glob("nursery-*-*")
    return psutil.Process(int(path.name.split("-")[1]))


def assert_killed(record, number=signal.SIGKILL):
    assert (record.status, record.reason, record.signal) == (Status.INTERRUPTED, Reason.SIGNALLED, number), record


def running(app, *names):
    """Return the records of bodies that have begun and end when the file of their name is there."""
    handles = [app.service.request("appx:until", {"name": name}) for name in names]
    for handle in handles:
        wait_until((app.folder / f"began-{handle.id}").exists, "its body has begun")
    return [app.service.get(handle) for handle in handles]


# ---- the nursery is stopped ----


def test_a_nursery_that_stands_still_keeps_no_death_from_any_supervisor(make_app):
    app = make_app(TASKS, spares=1)
    first = app.start()
    killed, later, done, lives = running(app, "never", "never", "end", "last")
    wait_until(lambda: len(nursery_of(app).children()) == 5, "the spare child is there")
    nursery = nursery_of(app)
    nursery.suspend()

    began = time.monotonic()
    os.kill(killed.pid, signal.SIGKILL)
    assert_killed(app.wait(killed.id))
    assert time.monotonic() - began < allowed_s(2.0)
    (app.folder / "end").touch()
    assert app.wait(done.id).status is Status.DONE
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE  # by the spare child

    first.kill()
    os.kill(later.pid, signal.SIGKILL)
    wait_until(lambda: psutil.Process(later.pid).status() == psutil.STATUS_ZOMBIE, "nobody reaps it")
    app.start()
    assert_killed(app.wait(later.id))
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE  # by a nursery that moves
    assert app.service.get(lives.id).status is Status.START

    nursery.resume()
    (app.folder / "last").touch()
    assert app.wait(lives.id).status is Status.DONE
    assert_killed(app.service.get(killed.id))
    wait_until(lambda: not nursery.is_running(), "the old nursery has left")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_nursery_that_stands_still_is_replaced_within_a_minute(make_app):
    app = make_app(TASKS, spares=0)
    app.start()
    [lives] = running(app, "end")
    nursery = nursery_of(app)
    nursery.suspend()
    handle = app.service.request("appx:quick")
    assert app.wait(handle, limit_s=FORK_S + 30).status is Status.DONE
    assert app.service.get(lives.id).status is Status.START
    nursery.resume()
    (app.folder / "end").touch()
    assert app.wait(lives.id).status is Status.DONE
    wait_until(lambda: not nursery.is_running(), "the old nursery has left")


# ---- no room for a board ----


def test_a_board_that_cannot_be_started_is_tried_again_and_harms_nobody(tmp_path, monkeypatch, caplog):
    folder = StateDir(tmp_path / "state")
    folder.create()
    clock = SetClock()
    ears = Reception(folder, clock)
    own = processes.own_identity("here")
    boards = Boards(folder, lambda who: dataclasses.replace(own, pid=who.pid, start_ticks=who.start_ticks), ears, clock)
    tries = []

    def start(self):
        tries.append(clock.monotonic())
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(SpawnProcess, "start", start)
    assert boards.due_at() is None
    for _ in range(3):
        boards.want()
        boards.check()
    assert len(tries) == 1
    assert "cannot start the board: [Errno 11] Resource temporarily unavailable" in caplog.text
    assert 0.5 < boards.due_at() - clock.monotonic() <= 1.0
    clock.mono_s = 2.0
    boards.check()
    boards.check()
    assert len(tries) == 2
    ears.close()


def test_boards_that_die_at_once_are_started_ever_more_seldom(tmp_path):
    folder = StateDir(tmp_path / "state")
    folder.create()
    (folder.path / "authkey").mkdir()  # no board can live with it
    clock = SetClock()
    ears = Reception(folder, clock)
    own = processes.own_identity("here")
    boards = Boards(folder, lambda who: dataclasses.replace(own, pid=who.pid, start_ticks=who.start_ticks), ears, clock)
    began, deaths = time.monotonic(), 0
    boards.want()
    while time.monotonic() - began < 2.0:
        for who in ears.hear(ears.rest(0.1)).deaths:
            boards.died(who)
            deaths += 1
        boards.check()
    ears.close()
    assert 1 <= deaths <= 3


# ---- bodies that cannot move ----


@pytest.fixture
def freezer():
    """A cgroup whose processes can be frozen, so that nothing reaches them, as in uninterruptible disk sleep."""
    folder = Path(f"/sys/fs/cgroup/freezer/bgsupervisor-faults-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "freezer.state").write_text("THAWED")
    except OSError as error:
        pytest.skip(f"no freezer that SIGKILL does not pass: {error}")
    yield folder
    (folder / "freezer.state").write_text("THAWED")

    def removed():
        with contextlib.suppress(OSError):
            folder.rmdir()
        return not folder.is_dir()

    wait_until(removed, "the cgroup is empty and can be removed")


def test_a_body_that_not_even_sigkill_reaches_keeps_its_slot_until_it_is_dead(make_app, freezer):
    app = make_app(TASKS, slots=2, grace_s=0.2, heartbeat_s=0.5)
    supervisor = app.start()
    [frozen] = running(app, "never")
    (freezer / "cgroup.procs").write_text(str(frozen.pid))
    (freezer / "freezer.state").write_text("FROZEN")
    wait_until(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_DISK_SLEEP, "it is frozen")
    app.service.cancel(frozen.id, by="jana")
    wait_until(lambda: f"sending SIGKILL to PID {frozen.pid} " in supervisor.log, "the last step is done")
    handles = [app.service.request("appx:quick") for _ in range(5)]
    assert {app.wait(handle).status for handle in handles} == {Status.DONE}
    record = app.service.get(frozen.id)
    assert (record.status, record.slot, record.ending) == (Status.START, frozen.slot, Reason.CANCELLED)
    assert "SIGKILL" in app.cli("show", str(frozen.id)).stdout
    (freezer / "freezer.state").write_text("THAWED")
    record = app.wait(frozen.id)
    assert (record.reason, record.signal) == (Reason.CANCELLED, signal.SIGKILL)
    assert record.detail == "cancelled by jana; SIGKILL was sent"


def test_a_body_that_lets_nobody_else_run_is_unresponsive_and_not_dead(make_app):
    app = make_app(TASKS, heartbeat_s=0.3, grace_s=0.3)
    app.start()
    handle = app.service.request("appx:holds_the_gil", {"seconds": 3})
    limited = app.service.request("appx:HoldsTheGil")
    wait_until((app.folder / "holds").exists, "its body has begun")
    wait_until(lambda: "unresponsive" in app.cli("ps").stdout, "it is called unresponsive")
    assert app.service.status(handle) is Status.START
    record = app.wait(limited)
    assert (record.reason, record.signal) == (Reason.TIMED_OUT, signal.SIGKILL)
    assert app.wait(handle).status is Status.DONE


def test_a_kill_for_which_the_tree_cannot_be_seen_reaches_the_body_all_the_same(make_app):
    app = make_app(TASKS, grace_s=0.2)
    (app.folder / "sitecustomize.py").write_text(
        "from bgsupervisor import processes\n"
        "def signal_tree(handle, number):\n"
        "    raise OSError(24, 'Too many open files')\n"
        "processes.signal_tree = signal_tree\n"
    )
    source = str(Path(bgsupervisor.__file__).parents[1])
    supervisor = app.start(environment={"PYTHONPATH": f"{app.folder}{os.pathsep}{source}"})
    record = app.started(app.service.request("appx:ignores_sigterm"))
    app.service.cancel(record.id, by="jana")
    record = app.wait(record.id)
    assert (record.reason, record.signal) == (Reason.CANCELLED, signal.SIGKILL)
    assert "cannot be seen: [Errno 24] Too many open files; killing it alone" in supervisor.log


# ---- the clock is set; the machine was suspended ----

STEPPED_CLOCK = """
import pathlib, sys
from datetime import timedelta
from bgsupervisor.clock import SystemClock

def stepped(self, now=SystemClock.now):
    try:
        offset_s = float(pathlib.Path({file!r}).read_text())
    except (OSError, ValueError):
        offset_s = 0.0
    return now(self) + timedelta(seconds=offset_s)

SystemClock.now = stepped
"""


DAY_S = 86_400.0


@pytest.fixture
def stepping(tmp_path):
    """An environment in which all processes of ours see a wall clock that a test sets, and how to set it."""
    folder = tmp_path / "clock"
    folder.mkdir()
    file = folder / "offset"
    (folder / "sitecustomize.py").write_text(STEPPED_CLOCK.format(file=str(file)))
    source = str(Path(bgsupervisor.__file__).parents[1])

    def step(offset_s):
        (folder / "offset.part").write_text(str(offset_s))
        (folder / "offset.part").rename(file)

    return {"PYTHONPATH": f"{folder}{os.pathsep}{source}"}, step


@pytest.mark.of_sqlite  # with a server no clock of this machine is in the rows
def test_a_clock_that_is_set_ends_nobody_and_moves_no_limit(make_app, stepping):
    """Forward is also what a machine sees that was suspended: the wall clock has jumped, the monotonic one has not."""
    environment, step = stepping
    app = make_app(TASKS, heartbeat_s=0.5, grace_s=0.3)
    supervisor = app.start(environment=environment)
    [lives] = running(app, "end")
    for offset_s in (DAY_S, -DAY_S):
        began = time.monotonic()
        limited = app.started(app.service.request("appx:HasALimit"))
        step(offset_s)

        def has_new_time(offset_s=offset_s):
            silence = app.service.get(lives.id).heartbeat_at - SystemClock().now()
            return abs(silence.total_seconds() - offset_s) < DAY_S / 2

        wait_until(has_new_time, "heartbeats have the new time")
        assert app.wait(limited.id).reason is Reason.TIMED_OUT
        assert 1.5 <= time.monotonic() - began < allowed_s(6.0)
        assert "unresponsive" not in app.cli("ps", environment=environment).stdout
        step(0.0)
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    step(DAY_S)
    supervisor.kill()
    app.start(environment=environment)
    (app.folder / "end").touch()
    record = app.wait(lives.id)
    assert (record.status, record.pid, record.attempt) == (Status.DONE, lives.pid, 1)


def test_identity_does_not_depend_on_when_the_machine_says_it_was_started(tmp_path, monkeypatch):
    """A clock that is set moves the boot time by which psutil tells when a process was created."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        own = processes.own_identity("here")
        identity = dataclasses.replace(own, pid=process.pid, start_ticks=processes.start_ticks(process.pid))
        created = psutil.Process(process.pid).create_time()
        (tmp_path / "self").symlink_to(str(os.getpid()))
        for name in (str(os.getpid()), str(process.pid), "sys", "uptime"):
            (tmp_path / name).symlink_to(f"/proc/{name}")
        text = Path("/proc/stat").read_text()
        moved = "\n".join(
            f"btime {int(line.split()[1]) + 3600}" if line.startswith("btime ") else line for line in text.splitlines()
        )
        (tmp_path / "stat").write_text(moved + "\n")
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
        monkeypatch.setattr(processes, "PROC", tmp_path)
        psutil._pslinux.BOOT_TIME = None
        assert psutil.Process(process.pid).create_time() == pytest.approx(created + 3600, abs=1)
        assert processes.verdict(identity) is Verdict.ALIVE
        process.kill()
        process.wait()
        assert processes.verdict(identity) is Verdict.DEAD
    finally:
        psutil._pslinux.BOOT_TIME = None
        process.kill()
        process.wait()


class SetClock(SystemClock):
    """Two clocks that a test sets, each by itself."""

    wall_s = mono_s = 0.0

    def now(self):
        return super().now() + timedelta(seconds=self.wall_s)

    def monotonic(self):
        return super().monotonic() + self.mono_s


@pytest.fixture
def lease(make_app):
    """Return what a supervisor says of a task of another container that was claimed 100 s ago and beat just now."""
    clock = SetClock()
    app = make_app(TASKS)
    own = processes.own_identity("here")
    handle = app.service.request("appx:quick")
    record = app.service.get(handle)
    began = clock.now() - timedelta(seconds=100)
    values = {
        "status": Status.START,
        "attempt": 1,
        "boot_id": own.boot_id,
        "pid_ns": own.pid_ns + 1,
        "pid": 17,
        "start_ticks": 1,
        "slot": 3,
        "started_at": began,
        "started_mono": clock.monotonic() - 100,
        "heartbeat_at": clock.now(),
    }

    def judged(**more):
        recovery = Recovery(app.service.config, own, [], None, AttendedClock(clock, longest_s=2.0))
        recovery.compare([dataclasses.replace(record, **{**values, **more})])
        end = recovery.ends.get(Attempt(record.id, 1))
        assert (end is None) == (recovery.foreign_slots == {3})
        return None if end is None else end.reason

    return clock, judged


def test_another_container_is_lost_when_it_has_been_silent_for_its_lease_and_not_before(lease):
    clock, judged = lease
    assert judged() is None
    clock.wall_s = clock.mono_s = 29.0
    assert judged() is None
    clock.wall_s = clock.mono_s = 31.0
    assert judged() is Reason.HOST_LOST
    assert judged(heartbeat_at=None) is Reason.HOST_LOST
    assert judged(heartbeat_at=None, started_at=None) is Reason.HOST_LOST


def test_another_container_is_not_lost_because_the_clock_was_set_or_the_machine_was_suspended(lease):
    clock, judged = lease
    for wall_s in (3600.0, -3600.0, 86_400.0 * 365):
        clock.wall_s = wall_s
        assert judged() is None, wall_s
    clock.wall_s, clock.mono_s = 3600.0, 29.0
    assert judged() is None
    clock.mono_s = 31.0
    assert judged() is Reason.HOST_LOST


def test_a_row_of_another_container_without_a_monotonic_time_is_judged_by_the_wall_clock(lease):
    clock, judged = lease
    assert judged(started_mono=None) is None
    clock.wall_s = 31.0
    assert judged(started_mono=None) is Reason.HOST_LOST


# ---- PID namespaces ----

INIT = """
import json, os, signal, sys
# The first process of a PID namespace: does what it is told, and reaps only then.
started = []
for line in sys.stdin:
    order = json.loads(line)
    if "run" in order:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        answer = os.posix_spawn(order["run"][0], order["run"], order["env"], file_actions=actions)
        os.close(log)
        os.close(null)
    elif "reap" in order:
        answer = 0
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                answer += 1
        except ChildProcessError:
            pass
    elif "kill" in order:
        os.kill(order["kill"], order["signal"])
        answer = None
    elif "state" in order:
        try:
            with open(f"/proc/{order['state']}/stat") as file:
                answer = file.read().rpartition(")")[2].split()[0]
        except OSError:
            answer = None
    elif "last_pid" in order:
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(order["last_pid"]))
        answer = None
    print(json.dumps(answer), flush=True)
"""


class Namespace:
    """A PID namespace as a container has it; what lives in it dies with it."""

    def __init__(self, app):
        self.app = app
        command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", INIT]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=app.folder)

    def tell(self, **order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, *command):
        log = str(self.app.folder / "namespace.log")
        return self.tell(run=command, env=self.app.environment(), log=log)

    def supervise(self, *arguments):
        """Start a supervisor in here; return its PID in here once it has loaded the tasks."""
        command = [sys.executable, "-m", "bgsupervisor", "--config", str(self.app.config), "run", *arguments]
        pid = self.run(*command)
        wait_until(lambda: self.app.supervisor_row(pid), "the supervisor has loaded the tasks")
        return pid

    def state(self, pid):
        return self.tell(state=pid)

    def kill(self, *pids, number=signal.SIGKILL):
        """Send a signal to all. After SIGKILL, return once they are dead, and have released their locks."""
        for pid in pids:
            self.tell(kill=pid, signal=number)
        if number == signal.SIGKILL:
            for pid in pids:
                wait_until(lambda one=pid: self.state(one) in (None, "Z"), f"PID {pid} is dead")

    def nursery(self):
        [path] = self.app.state_dir.glob("nursery-*-*")
        return int(path.name.split("-")[1])

    def kill_all_unseen(self, *pids):
        """Kill processes so that none of them sees how the others die."""
        self.kill(*pids, number=signal.SIGSTOP)
        self.kill(*pids)

    def end(self):
        self.process.kill()
        self.process.communicate(timeout=LIMIT_S)


@pytest.fixture
def namespace(make_app):
    with contextlib.ExitStack() as stack:

        def make(app):
            made = Namespace(app)
            stack.callback(made.end)
            return made

        yield make


@needs_root
def test_a_zombie_whose_init_does_not_reap_is_dead_and_still_tells_how_it_died(make_app, namespace):
    app = make_app(TASKS, spares=0, slots=3)
    space = namespace(app)
    supervisor = space.supervise()
    killed, also, lives = running(app, "never", "never", "end")
    space.kill_all_unseen(supervisor, space.nursery(), killed.pid)
    assert [space.state(pid) for pid in (supervisor, killed.pid)] == ["Z", "Z"]

    space.supervise()
    assert_killed(app.wait(killed.id))
    assert app.service.get(lives.id).status is Status.START
    space.kill(also.pid)  # under the very same init, while a supervisor looks on
    assert_killed(app.wait(also.id))
    (app.folder / "end").touch()
    assert app.wait(lives.id).status is Status.DONE
    handles = [app.service.request("appx:quick") for _ in range(6)]
    assert {app.wait(handle).status for handle in handles} == {Status.DONE}
    assert space.state(killed.pid) == "Z", "it is still there, and no slot is held by it"


@needs_root
def test_whoever_got_the_pid_of_a_dead_child_is_neither_adopted_nor_signalled(make_app, namespace):
    app = make_app(TASKS, spares=0, grace_s=0.2)
    space = namespace(app)
    supervisor = space.supervise()
    [killed] = running(app, "never")
    space.kill_all_unseen(supervisor, space.nursery(), killed.pid)
    wait_until(lambda: space.tell(reap=True) or space.state(killed.pid) is None, "init has reaped it")
    wait_until(lambda: space.state(killed.pid) is None, "its PID is free")
    space.tell(last_pid=killed.pid - 1)
    stranger = space.run("/bin/sleep", "600")
    assert stranger == killed.pid
    app.service.cancel(killed.id, by="jana")

    space.supervise()
    record = app.wait(killed.id)
    assert (record.reason, record.signal, record.exit_code) == (Reason.VANISHED, None, None)
    assert "nobody could see how it ended" in record.detail
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE
    assert space.state(stranger) == "S"


@needs_root
def test_child_that_no_supervisor_accepts_keeps_its_lease_and_records_its_end(make_app, namespace):
    app = make_app(TASKS, spares=0, slots=2, heartbeat_s=0.5, lease_s=3.0)
    space = namespace(app)
    supervisor = space.supervise()
    [theirs] = running(app, "end")
    space.kill(supervisor)
    app.start()  # outside of the namespace: the hello of their child names a PID that is another's here
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 5.0, "more than a lease has passed")
    record = app.service.get(theirs.id)
    assert (record.status, record.reason) == (Status.START, None)
    wait_until(lambda: app.service.get(theirs.id).heartbeat_at > record.heartbeat_at, "it writes its own heartbeat")
    (app.folder / "end").touch()
    assert app.wait(theirs.id).status is Status.DONE


@needs_root
@pytest.mark.slow
def test_a_container_that_beats_is_left_alone_and_one_that_is_gone_is_lost_after_its_lease(make_app, namespace):
    app = make_app(TASKS, spares=0, slots=2, heartbeat_s=0.5, lease_s=2.0)
    space = namespace(app)
    space.supervise()
    [theirs] = running(app, "end")
    app.configure(spares=0, slots=2, heartbeat_s=0.5, lease_s=2.0, state_dir="here")
    app.state_dir = app.folder / "here"
    app.start()
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > 3.5, "more than a lease has passed")
    record = app.service.get(theirs.id)
    assert (record.status, record.slot, record.pid_ns) == (Status.START, theirs.slot, theirs.pid_ns)
    assert record.pid_ns != processes.pid_namespace()
    space.end()
    began = time.monotonic()
    record = app.wait(theirs.id)
    assert (record.reason, record.signal) == (Reason.HOST_LOST, None)
    assert "another PID namespace" in record.detail
    assert time.monotonic() - began > 1.0


# ---- a process table that hides, or is not there ----


def in_a_mount_namespace(script):
    """Return the command that runs a shell script in a mount namespace of its own."""
    return ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", textwrap.dedent(script)]


@needs_root
def test_where_the_process_table_has_no_facts_of_the_machine_supervising_is_refused_with_a_sentence(make_app):
    app = make_app(TASKS)
    app.service.request("appx:quick")
    command = f"{sys.executable} -m bgsupervisor --config {app.config}"
    for mount in ("mount -t proc -o subset=pid proc /proc", "mount -t tmpfs tmpfs /proc"):
        script = f"{mount} && {command} run; echo left with $?; {command} ps; echo left with $?"
        done = subprocess.run(
            in_a_mount_namespace(script),
            cwd=app.folder,
            env=app.environment(),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        said = done.stdout + done.stderr
        assert "supervising needs Linux with a readable /proc" in said, said
        assert "left with 1" in done.stdout
        assert done.stdout.endswith("left with 0\n")  # ps
        assert "Traceback" not in said
    assert app.service.counts()[Status.REQUEST] == 1


@pytest.fixture
def their_app():
    """An application of another user than this one, who is root."""
    folder = Path(tempfile.mkdtemp())
    app = App(folder, TASKS, spares=0)
    shutil.chown(folder, DEPLOY)
    yield app
    app.end()
    shutil.rmtree(folder)


@pytest.mark.of_sqlite  # the Python of the other user has no driver
@needs_root
def test_a_process_table_that_hides_the_processes_of_others_hides_no_child(their_app, their_python):  # noqa: F811
    app = their_app
    python, environment = their_python
    program = f"setpriv --reuid={DEPLOY} --regid={DEPLOY} --clear-groups {python} -m bgsupervisor"
    script = f"mount -t proc -o hidepid=2 proc /proc && exec {program} --config {app.config} run"

    def start():
        process = subprocess.Popen(
            in_a_mount_namespace(script),
            cwd=app.folder,
            env=app.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(app.state_dir.exists, "it has come so far")
        if app.database.is_sqlite:
            wait_until((app.folder / "bgsupervisor.db-wal").exists, "it has its database")
        wait_until(lambda: app.supervisor_row(process.pid), "the supervisor has loaded the tasks")
        return process

    first = start()
    try:
        killed, later, lives = running(app, "never", "never", "end")
        assert psutil.Process(killed.pid).uids().real == DEPLOY
        os.kill(killed.pid, signal.SIGKILL)
        assert_killed(app.wait(killed.id))
    finally:
        first.kill()
        first.wait(LIMIT_S)
    os.kill(later.pid, signal.SIGKILL)
    second = start()
    try:
        assert_killed(app.wait(later.id))
        assert app.service.get(lives.id).status is Status.START
        (app.folder / "end").touch()
        assert app.wait(lives.id).status is Status.DONE
    finally:
        second.kill()
        second.wait(LIMIT_S)


@needs_root
@pytest.mark.slow
def test_a_process_table_that_goes_away_under_a_supervisor_ends_nobody_and_comes_back(make_app):
    app = make_app(TASKS, spares=0)
    with (app.folder / "run.log").open("wb") as output:
        process = subprocess.Popen(
            in_a_mount_namespace(f"exec {sys.executable} -m bgsupervisor --config {app.config} run"),
            cwd=app.folder,
            env=app.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: app.supervisor_row(process.pid), "the supervisor has loaded the tasks")
        killed, done, lives, *_ = running(app, "never", "end", "last")
        inside = ["nsenter", "--mount", "--target", str(process.pid)]
        subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", "/proc"], check=True)
        began = time.monotonic()
        os.kill(killed.pid, signal.SIGKILL)
        (app.folder / "end").touch()
        assert app.wait(done.id).status is Status.DONE
        assert_killed(app.wait(killed.id))  # by the nursery's word
        waits = app.service.request("appx:quick")
        wait_until(lambda: time.monotonic() - began > 5.5, "all rows have been looked at again")
        assert app.service.get(lives.id).status is Status.START
        assert process.poll() is None
        subprocess.run([*inside, "umount", "/proc"], check=True)
        assert app.wait(waits).status is Status.DONE
        (app.folder / "last").touch()
        assert app.wait(lives.id).status is Status.DONE
    finally:
        process.kill()
        process.wait(LIMIT_S)
