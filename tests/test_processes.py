"""Who a process is, whether it lives, and how a tree of real processes is ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from bgsupervisor import linux, processes
from bgsupervisor.clock import SystemClock
from bgsupervisor.errors import Unkillable, UnsupportedSystem
from bgsupervisor.processes import Exit, Verdict

CLOCK = SystemClock()
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 1000; done"


def until(condition, sentence, limit_s=10):
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, sentence
        time.sleep(0.002)
    return found


def is_gone(pid):
    """Tell whether a process is dead, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def identify(pid):
    identity = processes.identity_of(pid, "here")
    assert identity is not None
    return identity


@pytest.fixture
def start():
    """Start shells (or programs) of which nothing is left after the test."""
    started = []

    def begin(script, *, ready=False):
        command = ["sh", "-c", script] if isinstance(script, str) else script
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        started.append(process)
        if ready:
            assert process.stdout.readline() == b"ready\n"
        return process

    yield begin
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def sleeper(start):
    return start("exec sleep 1000")


def as_subreaper(work):
    """Run *work* in a forked subreaper, as a body's child does; return its answer as JSON carried it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "it raised"
        try:
            linux.set_child_subreaper()
            answer = work()
        finally:
            for orphan in psutil.Process().children(recursive=True):
                orphan.kill()
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    answer = os.read(reading, 65536)
    os.close(reading)
    return json.loads(answer)


# ---- identity and verdict ----


def test_the_own_identity_is_alive():
    own = processes.own_identity("here")
    assert own == processes.ProcessIdentity(
        "here", processes.boot_id(), processes.pid_namespace(), os.getpid(), processes.start_ticks(os.getpid())
    )
    assert processes.verdict(own) is Verdict.ALIVE


def test_the_start_ticks_are_those_of_the_process_table(sleeper):
    created = psutil.Process(sleeper.pid).create_time()
    ticks = processes.start_ticks(sleeper.pid)
    assert created == pytest.approx(psutil.boot_time() + ticks / os.sysconf("SC_CLK_TCK"), abs=1.5)
    assert processes.start_ticks(2**22 + 1) is None


def test_a_name_full_of_parentheses_confuses_nobody(start):
    script = (
        "import time; open('/proc/self/comm', 'w').write('a) Z 1 (b'); print('ready', flush=True); time.sleep(1000)"
    )
    process = start([sys.executable, "-c", script], ready=True)
    identity = identify(process.pid)
    assert identity.start_ticks == processes.start_ticks(process.pid) > 1
    assert processes.verdict(identity) is Verdict.ALIVE


def test_a_reused_pid_is_dead(sleeper):
    earlier = dataclasses.replace(identify(sleeper.pid), start_ticks=1)
    assert processes.look(earlier) == (Verdict.DEAD, None)
    assert processes.verdict(earlier) is Verdict.DEAD


def test_a_process_of_another_boot_is_dead(sleeper):
    assert processes.verdict(dataclasses.replace(identify(sleeper.pid), boot_id="other")) is Verdict.DEAD


def test_another_pid_namespace_cannot_be_judged(sleeper):
    elsewhere = dataclasses.replace(identify(sleeper.pid), pid_ns=1)
    assert processes.look(elsewhere) == (Verdict.UNKNOWN, None)
    assert processes.verdict(dataclasses.replace(elsewhere, pid=2**22 + 1)) is Verdict.UNKNOWN


@pytest.fixture
def other_table(tmp_path, monkeypatch):
    """A process table that shows only what the test puts there."""
    (tmp_path / "self").symlink_to(str(os.getpid()))
    (tmp_path / str(os.getpid())).symlink_to(f"/proc/{os.getpid()}")
    (tmp_path / "sys").symlink_to("/proc/sys")
    monkeypatch.setattr(processes, "PROC", tmp_path)
    return tmp_path


def test_a_table_that_hides_a_living_process_cannot_judge_it(sleeper, request):
    identity = identify(sleeper.pid)
    request.getfixturevalue("other_table")
    assert processes.start_ticks(sleeper.pid) is None
    assert processes.verdict(identity) is Verdict.UNKNOWN
    sleeper.kill()
    until(lambda: processes.look(identity)[0] is Verdict.DEAD, "a hidden process that died is not reported as dead")


def test_an_unreadable_row_cannot_be_judged(sleeper, request):
    identity = identify(sleeper.pid)
    (request.getfixturevalue("other_table") / str(sleeper.pid) / "stat").mkdir(parents=True)
    assert processes.verdict(identity) is Verdict.UNKNOWN


def test_a_table_of_another_namespace_cannot_judge(sleeper, request):
    identity = identify(sleeper.pid)
    table = request.getfixturevalue("other_table")
    (table / str(sleeper.pid)).symlink_to(f"/proc/{sleeper.pid}")
    assert processes.verdict(identity) is Verdict.ALIVE
    (table / "self").unlink()
    (table / "self").symlink_to(f"/proc/{os.getpid()}")
    assert processes.verdict(identity) is Verdict.UNKNOWN


def test_without_a_table_everything_is_unknown_and_supervising_is_refused(sleeper, tmp_path, monkeypatch):
    identity = identify(sleeper.pid)
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.verdict(identity) is Verdict.UNKNOWN
    with pytest.raises(OSError, match="No such file"):
        processes.start_ticks(sleeper.pid)
    with pytest.raises(UnsupportedSystem):
        processes.own_identity("here")


def test_a_system_without_pidfds_cannot_judge(sleeper, monkeypatch):
    identity = identify(sleeper.pid)
    monkeypatch.delattr(os, "pidfd_open")
    assert processes.verdict(identity) is Verdict.UNKNOWN


def test_no_death_is_told_against_the_word_of_psutil(sleeper, monkeypatch):
    def nobody(pid, flags=0):
        raise ProcessLookupError

    identity = identify(sleeper.pid)
    monkeypatch.setattr(os, "pidfd_open", nobody)
    assert processes.look(identity) == (Verdict.DEAD, None)
    assert processes.verdict(identity) is Verdict.UNKNOWN


def test_a_thread_that_has_the_number_now_is_not_the_process():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    identity = dataclasses.replace(processes.own_identity("here"), pid=thread.native_id)
    assert processes.look(identity) == (Verdict.DEAD, None)
    done.set()
    thread.join()


@pytest.mark.parametrize(("script", "how"), [("exit 3", Exit(3, None)), ("kill -9 $$", Exit(None, 9))])
def test_a_zombie_is_dead_and_its_exit_is_readable(start, script, how):
    process = start(script)
    until(lambda: is_gone(process.pid), "the shell did not end")
    identity = identify(process.pid)
    assert processes.verdict(identity) is Verdict.DEAD
    found, handle = processes.look(identity)
    with handle:
        assert (found, handle.is_dead(), handle.exit_status()) == (Verdict.DEAD, True, how)


@pytest.mark.parametrize(("number", "how"), [(signal.SIGKILL, Exit(None, 9)), (signal.SIGTERM, Exit(None, 15))])
def test_a_handle_tells_the_exit_of_a_reaped_process_or_nothing(sleeper, number, how):
    _, handle = processes.look(identify(sleeper.pid))
    with handle:
        assert (handle.is_dead(), handle.exit_status()) == (False, None)
        assert handle.send_signal(number)
        sleeper.wait()
        assert handle.is_dead()
        assert not handle.send_signal(number)
        assert handle.exit_status() in {None, how}
        if tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 15):
            assert handle.exit_status() == how


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_exit_that_the_kernel_hides_from_this_user_is_unknown_and_not_zero(start):
    process = start("exit 3")
    until(lambda: is_gone(process.pid), "the shell did not end")
    identity = identify(process.pid)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        _, handle = processes.look(identity)
        os._exit(0 if handle is not None and handle.exit_status() is None else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_handle_closes_twice():
    _, handle = processes.look(processes.own_identity("here"))
    handle.close()
    handle.close()
    assert handle.fileno() == -1


@pytest.mark.parametrize(
    ("status", "how"), [(0, Exit(0, None)), (3 << 8, Exit(3, None)), (9, Exit(None, 9)), (11 | 0x80, Exit(None, 11))]
)
def test_a_wait_status_is_a_code_or_a_signal(status, how):
    assert Exit.from_wait_status(status) == how


@pytest.mark.parametrize(("code", "how"), [(0, Exit(0, None)), (3, Exit(3, None)), (-9, Exit(None, 9))])
def test_a_multiprocessing_exit_code_is_a_code_or_a_signal(code, how):
    assert Exit.from_multiprocessing(code) == how


def test_a_host_is_named_by_configuration_then_machine_id_then_host_name(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MACHINE_ID", tmp_path / "machine-id")
    assert processes.host_id("web-1") == "web-1"
    assert processes.host_id(None) == socket.gethostname()
    (tmp_path / "machine-id").write_text("uninitialized\n")
    assert processes.host_id(None) == socket.gethostname()
    (tmp_path / "machine-id").write_text("abc\n")
    assert processes.host_id(None) == "abc"


def test_importing_does_not_load_psutil():
    root = Path(processes.__file__).parents[1]
    script = (
        "import sys, bgsupervisor.processes, bgsupervisor.oom, bgsupervisor.logs; sys.exit('psutil' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0


# ---- usage and tree ----


@pytest.fixture(params=["listed", "table"])
def lookup(request, monkeypatch):
    """Both ways to find children: the kernel's lists, and one pass over the table."""
    if request.param == "table":
        monkeypatch.setattr(processes, "_kernel_lists_children", lambda: False)
    elif not processes._kernel_lists_children():
        pytest.skip("this kernel does not list children")


def test_descendants_are_found_across_sessions(start, lookup):
    process = start("setsid sh -c 'sleep 1000 & echo ready; wait' & wait", ready=True)
    found = processes.descendants(process.pid)
    assert sorted(found) == sorted(child.pid for child in psutil.Process(process.pid).children(recursive=True))
    assert len(found) >= 2
    assert processes.descendants(found[-1]) == []
    assert processes.descendants(2**22 + 1) == []


def test_children_of_any_thread_are_found(start, lookup):
    script = (
        "import subprocess, threading\n"
        "def work():\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        "    print('ready', flush=True)\n"
        "    child.wait()\n"
        "threading.Thread(target=work).start()\n"
    )
    process = start([sys.executable, "-c", script], ready=True)
    assert len(processes.descendants(process.pid)) == 1


def test_the_usage_of_a_tree_is_the_sum_of_its_processes(start):
    hog = "import time\nhoard = bytearray(b'x') * (40 << 20)\nwhile time.process_time() < 0.2: pass\n"
    hog += "print('ready', flush=True)\ntime.sleep(1000)"
    process = start(f'{sys.executable} -c "{hog}" & wait', ready=True)
    other = start("exec sleep 1000")
    used = processes.tree_usage([process.pid, other.pid, 2**22 + 1])
    assert set(used) == {process.pid, other.pid}
    assert used[process.pid].rss_bytes > 40 << 20
    assert used[process.pid].cpu_s >= 0.15  # the kernel counts whole ticks
    assert used[other.pid].rss_bytes < 40 << 20


def test_the_cpu_of_descendants_that_ended_still_counts(start):
    hog = "import time\nwhile time.process_time() < 0.2: pass"
    process = start(f'{sys.executable} -c "{hog}"; echo ready; read x < /dev/null; exec sleep 1000', ready=True)
    assert processes.tree_usage([process.pid])[process.pid].cpu_s >= 0.15  # the kernel counts whole ticks


def test_a_zombie_uses_no_memory(start):
    process = start("exit 0")
    until(lambda: is_gone(process.pid), "the shell did not end")
    assert processes.tree_usage([process.pid])[process.pid].rss_bytes == 0


def test_usage_costs_at_most_ten_milliseconds_per_hundred_processes():
    count = max(100, len(psutil.pids()))
    assert best_of(20, lambda: processes.tree_usage([os.getpid()])) < 0.010 * count / 100


def best_of(times, work):
    costs = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        costs.append(time.perf_counter() - begun)
    return min(costs)


# ---- ending ----


def test_a_killed_tree_leaves_nobody(start, lookup):
    process = start("setsid sh -c 'sleep 1000 & echo ready; wait' & wait", ready=True)
    below = processes.descendants(process.pid)
    _, handle = processes.look(identify(process.pid))
    with handle:
        assert processes.signal_tree(handle, signal.SIGKILL) == 1 + len(below)
        process.wait()
        assert processes.signal_tree(handle, signal.SIGKILL) == 0
    for pid in below:
        until(lambda pid=pid: is_gone(pid), f"{pid} outlived its tree")


def test_a_tree_that_grows_while_it_is_killed_leaves_nobody(start, lookup):
    process = start("echo ready; while :; do sleep 1000 & sleep 0.001; done", ready=True)
    until(lambda: len(processes.descendants(process.pid)) > 5, "the shell starts nobody")
    _, handle = processes.look(identify(process.pid))
    with handle:
        killed = processes.signal_tree(handle, signal.SIGKILL)
    assert killed > 5
    until(lambda: process.stdout.read() == b"", "somebody still holds the pipe that all of them inherited")


def test_other_signals_reach_the_whole_tree_once(start):
    process = start("sleep 1000 & echo ready; wait", ready=True)
    _, handle = processes.look(identify(process.pid))
    with handle:
        assert processes.signal_tree(handle, signal.SIGTERM) == 2
    assert process.wait() == -signal.SIGTERM


FORKS = """
import os, time
print("ready", flush=True)
while True:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.001)
"""


def test_a_tree_that_grows_while_it_is_stopped_stands_still_and_goes_on(start):
    # By os.fork: a shell may start its own by vfork, and is no stopped process while it waits for one that is.
    process = start(f"exec {sys.executable} -c '{FORKS}'", ready=True)
    until(lambda: len(processes.descendants(process.pid)) > 5, "it starts nobody")
    _, handle = processes.look(identify(process.pid))
    with handle:
        stopped = processes.signal_tree(handle, signal.SIGSTOP)
        tree = [process.pid, *processes.descendants(process.pid)]
        still = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)  # who had ended, and cannot be reaped now
        for pid in tree:
            until(lambda pid=pid: psutil.Process(pid).status() in still, f"{pid} does not stand still")
        assert processes.is_stopped(process.pid)
        assert stopped > 5
        assert processes.signal_tree(handle, signal.SIGCONT) > 5
        until(lambda: len(processes.descendants(process.pid)) > len(tree), "it does not go on")
        processes.signal_tree(handle, signal.SIGKILL)


def test_that_nobody_was_left_behind_costs_nothing(lookup):
    work = lambda: processes.end_descendants(os.getpid(), grace_s=10, clock=CLOCK)  # noqa: E731 - measured below
    assert as_subreaper(lambda: [work(), best_of(50, work) < 0.0001]) == [0, True]


def test_a_daemon_that_left_session_and_parent_is_ended_under_a_subreaper(lookup):
    def work():
        with subprocess.Popen(
            ["sh", "-c", "setsid sh -c 'setsid sleep 1000 & echo $!' &"], stdout=subprocess.PIPE
        ) as launcher:
            daemon = int(launcher.stdout.readline())
        ended = processes.end_descendants(os.getpid(), grace_s=10, clock=CLOCK)
        return [ended >= 1, Path(f"/proc/{daemon}").exists(), processes._has_children()]

    assert as_subreaper(work) == [True, False, False]


def test_those_who_ignore_sigterm_are_killed_after_the_grace(lookup):
    def work():
        process = subprocess.Popen(["sh", "-c", STUBBORN], stdout=subprocess.PIPE)
        process.stdout.readline()
        begun = time.monotonic()
        ended = processes.end_descendants(os.getpid(), grace_s=0.2, clock=CLOCK)
        return [ended >= 2, 0.2 <= time.monotonic() - begun < 3, processes._has_children()]

    assert as_subreaper(work) == [True, True, False]


def test_those_who_obey_sigterm_do_not_cost_the_grace(lookup):
    def work():
        for _ in range(3):
            subprocess.Popen(["sleep", "1000"])
        begun = time.monotonic()
        ended = processes.end_descendants(os.getpid(), grace_s=30, clock=CLOCK)
        return [ended, time.monotonic() - begun < 5, processes._has_children()]

    assert as_subreaper(work) == [3, True, False]


def test_what_a_dying_descendant_starts_is_ended_as_well():
    def work():
        script = "trap 'sleep 1000 & exit' TERM; echo ready; while :; do sleep 0.01; done"
        process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
        process.stdout.readline()
        processes.end_descendants(os.getpid(), grace_s=5, clock=CLOCK)
        return processes._has_children()

    assert as_subreaper(work) is False


def test_zombies_are_reaped_and_not_counted():
    def work():
        process = subprocess.Popen(["true"])
        until(lambda: is_gone(process.pid), "true did not end")
        return [processes.end_descendants(os.getpid(), grace_s=5, clock=CLOCK), processes._has_children()]

    assert as_subreaper(work) == [0, False]


def test_who_is_no_descendant_is_left_alone(start, sleeper, lookup):
    process = start("sleep 1000 & sleep 1000 & echo ready; wait; exec sleep 1000", ready=True)
    assert processes.end_descendants(process.pid, grace_s=10, clock=CLOCK) == 2
    assert process.poll() is None
    assert sleeper.poll() is None
    assert processes.end_descendants(sleeper.pid, grace_s=10, clock=CLOCK) == 0
    assert processes.end_descendants(2**22 + 1, grace_s=10, clock=CLOCK) == 0


def test_a_pid_that_was_reused_since_the_look_is_not_held(sleeper):
    row = processes._read_row(sleeper.pid)
    with processes._Tree(os.getpid(), os.pidfd_open(os.getpid()), spare_root=True) as tree:
        assert not tree._hold(row._replace(start_ticks=1))
        assert tree.pids == []
        assert tree._hold(row)
        assert tree.pids == [sleeper.pid]


def test_a_process_that_stands_still_is_killed(start):
    process = start("sleep 1000 & echo ready; wait; exec sleep 1000", ready=True)
    [below] = processes.descendants(process.pid)
    os.kill(below, signal.SIGSTOP)
    until(lambda: psutil.Process(below).status() == psutil.STATUS_STOPPED, "SIGSTOP did not stop a sleeper")
    assert processes.end_descendants(process.pid, grace_s=0.05, clock=CLOCK) == 1
    until(lambda: is_gone(below), "who stood still was not killed")


def test_a_child_is_killed_and_reaped(sleeper):
    processes.kill_child(sleeper.pid)
    until(lambda: is_gone(sleeper.pid), "it was not killed")
    processes.kill_child(sleeper.pid)
    assert not psutil.pid_exists(sleeper.pid)
    processes.kill_child(sleeper.pid)


def test_who_is_no_child_of_this_process_is_not_killed_as_one(start):
    process = start("sleep 1000 & echo ready; wait", ready=True)
    [grandchild] = processes.children(process.pid)
    processes.kill_child(grandchild)
    assert processes.verdict(identify(grandchild)) is Verdict.ALIVE


def test_a_child_that_cannot_be_held_or_signalled_lives_on(sleeper, monkeypatch):
    def refuse(*_arguments):
        raise PermissionError

    for owner, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            processes.kill_child(sleeper.pid)
    assert sleeper.poll() is None


@pytest.mark.parametrize("refuse", [True, PermissionError], ids=["no effect", "refused"])
def test_who_survives_sigkill_is_named(start, monkeypatch, refuse):
    def send(pidfd, number):
        if refuse is not True:
            raise refuse
        return True

    process = start("sleep 1000 & echo ready; wait", ready=True)
    [below] = processes.descendants(process.pid)
    monkeypatch.setattr(processes, "_send", send)
    monkeypatch.setattr(processes, "KILL_WAIT_S", 0.05)
    with pytest.raises(Unkillable, match=str(below)) as raised:
        processes.end_descendants(process.pid, grace_s=0, clock=CLOCK)
    assert raised.value.pids == (below,)


def test_ending_gives_all_descriptors_back(start):
    fds = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731 - counted twice
    process = start("sleep 1000 & sleep 1000 & echo ready; wait; wait", ready=True)
    before = fds()
    processes.end_descendants(process.pid, grace_s=10, clock=CLOCK)
    processes.verdict(identify(process.pid))
    processes.kill_child(process.pid)
    assert fds() == before
