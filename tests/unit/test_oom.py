"""Evidence of the OOM killer, with files in the kernel's place and once with the kernel itself."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from bgsupervisor.system import oom
from bgsupervisor.system.oom import OomWatch

PID = 4242
NAMED = "killed by the kernel's OOM killer: the kernel log names PID 4242"
COUNTED = "killed by the kernel's OOM killer: the task's cgroup counted an OOM kill while it ran"
LIKELY = "likely the kernel's OOM killer: the host counted an OOM kill while it ran and the kernel log cannot be read"
KILLED = "3,900,5000,-;Out of memory: Killed process {pid} (python) total-vm:9kB, anon-rss:8kB, UID:0"
KILLED_IN_CGROUP = "3,901,5000,-;Memory cgroup out of memory: Killed process {pid} (python) total-vm:9kB, UID:0"
SUMMARY = "6,899,5000,-;oom-kill:constraint=CONSTRAINT_MEMCG,oom_memcg=/a,task_memcg=/a,task=python,pid={pid},uid=0"


class Machine:
    """The files that a watch reads; a counter of None is a file that cannot be read."""

    def __init__(self, root):
        self.kmsg, self.vmstat, self.proc = root / "kmsg", root / "vmstat", root / "proc"
        self.cgroups = root / "cgroup"
        self.counter = self.cgroups / "memory/tasks/memory.oom_control"
        (self.proc / str(PID)).mkdir(parents=True)
        (self.proc / "self").symlink_to("/proc/self")
        (self.proc / str(PID) / "cgroup").write_text("9:name=systemd:/\n4:memory:/tasks\n0::/\n")
        self.counter.parent.mkdir(parents=True)
        self.log("6,1,0,-;Linux version")
        self.count(cgroup=0, host=0)

    def log(self, *lines):
        with self.kmsg.open("a") as file:
            file.writelines(line.format(pid=PID) + "\n" for line in lines)

    def count(self, *, cgroup, host):
        for file, number, other in (self.counter, cgroup, "under_oom 0"), (self.vmstat, host, "pgfault 12"):
            file.unlink(missing_ok=True)
            if number is not None:
                file.write_text(f"{other}\noom_kill {number}\n")

    def watch(self):
        return OomWatch(self.kmsg, self.vmstat, self.proc, self.cgroups)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(oom, "INITIAL_PID_NAMESPACE", Path("/proc/self/ns/pid").stat().st_ino)
    return Machine(tmp_path)


@pytest.fixture
def blind(machine):
    """A machine whose kernel log cannot be read."""
    machine.kmsg.unlink()
    return machine


@pytest.mark.parametrize("line", [KILLED, KILLED_IN_CGROUP, SUMMARY])
def test_a_log_that_names_the_pid_is_the_strongest_evidence(machine, line):
    watch = machine.watch()
    before = watch.counters_of(PID)
    machine.log(line)
    machine.count(cgroup=1, host=1)
    assert watch.evidence(PID, before) == NAMED
    watch.close()


@pytest.mark.parametrize(
    "line",
    [
        "3,900,5000,-;Out of memory: Killed process 42421 (python)",
        "12,900,5000,-;Out of memory: Killed process {pid} (python)",
        "6,900,5000,-;oom_reaper: reaped process {pid} (python), now anon-rss:0kB",
        "6,899,5000,-;oom-kill:constraint=CONSTRAINT_NONE,task=a,pid={pid},uid=0,pid=7,uid=0",
        " SUBSYSTEM=Killed process {pid} (python)",
        "6,900,5000,-;the body printed: killed process {pid} (python)",
    ],
    ids=["longer pid", "written by a program", "reaper", "in a name", "continuation", "other words"],
)
def test_a_line_that_is_no_kill_of_this_pid_is_no_evidence(machine, line):
    watch = machine.watch()
    before = watch.counters_of(PID)
    machine.log(line)
    assert watch.evidence(PID, before) is None
    watch.close()


def test_a_kill_before_the_watch_or_before_the_process_is_no_evidence(machine):
    machine.log(KILLED)
    watch = machine.watch()
    assert watch.counters_of(PID).log_kills == 0
    assert watch.evidence(PID, watch.counters_of(PID)) is None
    machine.log(SUMMARY, KILLED)  # an earlier process of the same PID
    assert watch.evidence(PID, watch.counters_of(PID)) is None
    watch.close()


def test_a_complete_log_that_names_another_clears_this_one(machine):
    watch = machine.watch()
    before = watch.counters_of(PID)
    machine.log("3,900,5000,-;Memory cgroup out of memory: Killed process 99 (python)")
    machine.count(cgroup=1, host=1)
    assert watch.evidence(PID, before) is None
    watch.close()


def test_a_kill_that_is_counted_but_not_logged_yet_is_evidence(machine):
    watch = machine.watch()
    before = watch.counters_of(PID)
    machine.count(cgroup=1, host=1)
    assert watch.evidence(PID, before) == COUNTED
    watch.close()


def test_without_a_log_the_counter_of_the_cgroup_is_evidence(blind):
    watch = blind.watch()
    before = watch.counters_of(PID)
    (blind.proc / str(PID) / "cgroup").unlink()  # the dead have none
    blind.count(cgroup=1, host=1)
    assert watch.evidence(PID, before) == COUNTED


def test_a_counter_of_the_cgroup_that_did_not_move_clears_the_process(blind):
    watch = blind.watch()
    before = watch.counters_of(PID)
    blind.count(cgroup=0, host=1)
    assert watch.evidence(PID, before) is None


def test_with_nothing_else_to_read_the_counter_of_the_host_makes_it_likely(blind):
    blind.count(cgroup=None, host=3)
    watch = blind.watch()
    before = watch.counters_of(PID)
    assert watch.evidence(PID, before) is None
    blind.count(cgroup=None, host=4)
    assert watch.evidence(PID, before) == LIKELY


def test_a_readable_log_that_is_silent_outweighs_the_host_counter(machine):
    machine.count(cgroup=None, host=None)
    watch = machine.watch()
    before = watch.counters_of(PID)
    machine.count(cgroup=None, host=1)
    assert watch.evidence(PID, before) is None
    watch.close()


def test_nothing_readable_is_no_evidence_and_no_error(blind):
    blind.count(cgroup=None, host=None)
    watch = blind.watch()
    before = watch.counters_of(PID)
    assert (before.cgroup_kills, before.host_kills) == (None, None)
    assert watch.evidence(PID, before) is None
    assert watch.evidence(99, watch.counters_of(99)) is None


@pytest.mark.parametrize("cgroup", [0, None], ids=["cgroup", "host"])
def test_one_kill_explains_one_death(blind, cgroup):
    blind.count(cgroup=cgroup, host=0)
    watch = blind.watch()
    before = watch.counters_of(PID)
    kills = lambda number: {"cgroup": None if cgroup is None else number, "host": number}  # noqa: E731 - three uses
    blind.count(**kills(1))
    assert watch.evidence(PID, before)
    assert watch.evidence(PID + 1, before) is None
    blind.count(**kills(2))
    assert watch.evidence(PID + 2, before)
    assert watch.evidence(PID + 3, before) is None


def test_the_log_of_the_kernel_is_not_used_in_another_pid_namespace(machine, monkeypatch):
    monkeypatch.setattr(oom, "INITIAL_PID_NAMESPACE", 1)
    watch = machine.watch()
    before = watch.counters_of(PID)
    machine.log(KILLED)
    assert watch.evidence(PID, before) is None
    machine.count(cgroup=1, host=1)
    assert watch.evidence(PID, before) == COUNTED


def test_records_that_were_lost_leave_the_counters_as_evidence(machine, monkeypatch):
    watch = machine.watch()
    before = watch.counters_of(PID)
    real, overruns = os.read, [True]

    def read(fd, size):
        if overruns and overruns.pop():
            raise BrokenPipeError
        return real(fd, size)

    monkeypatch.setattr(os, "read", read)
    machine.log("3,900,5000,-;Out of memory: Killed process 99 (python)")
    machine.count(cgroup=1, host=1)
    assert watch.evidence(PID, before) == COUNTED
    watch.close()


def test_the_memory_of_the_watch_is_bounded(machine):
    watch = machine.watch()
    machine.log(*(f"3,900,5000,-;Out of memory: Killed process {pid} (python)" for pid in range(1, 3000)))
    watch.counters_of(PID)
    assert len(watch._named) == oom.KEPT
    watch.close()


def test_the_unified_cgroup_that_accounts_the_memory_is_the_nearest_upwards(machine):
    (machine.proc / str(PID) / "cgroup").write_text("0::/user/session/task\n")
    events = machine.cgroups / "user/memory.events"
    events.parent.mkdir()
    events.write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\noom_group_kill 0\n")
    machine.kmsg.unlink()
    watch = machine.watch()
    before = watch.counters_of(PID)
    assert (before.cgroup_file, before.cgroup_kills) == (events, 2)
    events.write_text("max 9\noom 3\noom_kill 3\n")
    assert watch.evidence(PID, before) == COUNTED


def test_a_watch_closes_twice_and_then_has_no_log(machine):
    watch = machine.watch()
    watch.close()
    watch.close()
    machine.log(KILLED)
    assert watch.evidence(PID, watch.counters_of(PID)) is None


def test_the_files_of_this_machine_can_be_read_without_an_error():
    watch = OomWatch()
    assert watch.evidence(os.getpid(), watch.counters_of(os.getpid())) is None
    watch.close()


@pytest.fixture
def small_cgroup():
    """A real memory cgroup of 32 MiB, where the machine lets us have one."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    folder = (root / "memory" if old else root) / f"bgsupervisor-test-{os.getpid()}"
    limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] if old else ["memory.max", "memory.swap.max"]
    try:
        folder.mkdir()
        (folder / limits[0]).write_text(str(32 << 20))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no memory cgroup to be had: {error}")
    for name in limits[1:]:
        if (folder / name).exists():
            (folder / name).write_text(str(32 << 20) if old else "0")
    yield folder
    folder.rmdir()


@pytest.fixture
def glutton(small_cgroup):
    """A process inside the small cgroup that waits for a byte and then takes all memory."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reading, 1)
        hoard = []
        while True:
            hoard.append(bytearray(b"x") * (4 << 20))
    (small_cgroup / "cgroup.procs").write_text(str(pid))
    pidfd = os.pidfd_open(pid)
    yield SimpleNamespace(pid=pid, pidfd=pidfd, begin=lambda: os.write(writing, b"x"))
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.waitpid(pid, 0)
    for fd in (pidfd, reading, writing):
        os.close(fd)


@pytest.mark.parametrize("kmsg", ["/dev/kmsg", "/missing"])
def test_a_real_oom_kill_in_a_cgroup_is_told(glutton, kmsg):
    watch = OomWatch(kmsg=Path(kmsg))
    before = watch.counters_of(glutton.pid)
    assert before.cgroup_kills == 0
    glutton.begin()
    assert select.select([glutton.pidfd], [], [], 20)[0], "the kernel did not kill who took all memory"
    evidence = watch.evidence(glutton.pid, before)
    watch.close()
    named = NAMED.replace(str(PID), str(glutton.pid))
    assert evidence in ({named, COUNTED} if watch_could_read(kmsg) else {COUNTED})


@pytest.mark.parametrize("kmsg", ["/dev/kmsg", "/missing"])
def test_a_real_plain_kill_in_a_cgroup_is_no_oom_kill(glutton, kmsg):
    watch = OomWatch(kmsg=Path(kmsg))
    before = watch.counters_of(glutton.pid)
    signal.pidfd_send_signal(glutton.pidfd, signal.SIGKILL)
    assert select.select([glutton.pidfd], [], [], 20)[0], "SIGKILL did not end the process"
    assert watch.evidence(glutton.pid, before) is None
    watch.close()


def watch_could_read(kmsg):
    watch = OomWatch(kmsg=Path(kmsg))
    could = watch._fd >= 0
    watch.close()
    return could
