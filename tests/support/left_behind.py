"""What each of these tests must hold, also where it fails: no process and no unclosed object outlives it.

A process is a test's own if it appeared during the test, and either names the test's temporary folder in its working
folder, its command line or its environment, or descends from the test process. A descendant that names a folder
of another fixture's belongs to the module, whose end is held to the same. The folder finds processes whose parents
have died.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

LEAVE_S = 25.0
"""Time that processes get to leave by themselves, in seconds. Without a supervisor a child does so after 10 s, and its
fork server within another 10 s."""
KILL_S = 10.0
"""Time limit for killed processes to disappear, in seconds."""
SHARED = set()
"""PIDs of servers that a session starts within one test and uses in later ones."""


@dataclass(frozen=True)
class Process:
    """A process by PID and start ticks, with its parent when it was read."""

    pid: int
    ticks: int
    parent: int
    is_dead: bool

    def __str__(self):
        words = _read(self.pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        return f"PID {self.pid}: {words or 'its command line is gone'}"


def pids():
    """Return the PIDs of all processes."""
    return {int(name) for name in os.listdir("/proc") if name.isdecimal()}  # noqa: PTH208 - a Path for each, twice a test, is slow


def left(before, folder, everything):
    """Return the living processes that appeared after the PIDs *before*, and belong to a folder or to this process.

    Args:
        before: PIDs.
        folder: Of a test or of a module's tests.
        everything: The folder of all tests; what names another part of it belongs to somebody else.
    """
    shared = SHARED | {resource_tracker._resource_tracker._pid}
    new = [found for pid in pids() - before if (found := process(pid)) and not found.is_dead]
    return [one for one in new if _names(one.pid, folder) or _is_ours(one, before, shared, everything)]


def process(pid):
    """Return a process, None if there is none."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return Process(pid, int(fields[19]), int(fields[1]), fields[0] in (b"Z", b"X")) if fields else None


def kill(one):
    """Kill a process if it is still the one that was found, and see it gone."""
    with contextlib.suppress(ProcessLookupError), open_pidfd(one.pid) as pidfd:
        found = process(one.pid)
        if found is not None and found.ticks == one.ticks:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(KILL_S * 1000), f"{one} is there {KILL_S:g} s after SIGKILL"


@contextlib.contextmanager
def open_pidfd(pid):
    """Open a process's pidfd for a moment."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def end_all(before, folder, everything):
    """Wait until all processes of a test have left; kill those that stay, and return them in words."""
    deadline = time.monotonic() + LEAVE_S
    while (staying := left(before, folder, everything)) and time.monotonic() < deadline:
        time.sleep(0.01)
    told = [str(one) for one in staying]
    deadline = time.monotonic() + KILL_S
    while (still := left(before, folder, everything)) and time.monotonic() < deadline:
        for one in still:
            kill(one)
    return told


def _is_ours(one, before, shared, everything):
    """Whether a process descends from this one, by processes that appeared since and belong to nobody else."""
    own = os.getpid()
    while one is not None and one.pid not in before | shared and not _names(one.pid, everything):
        if one.parent == own:
            return True
        one = process(one.parent)
    return False


def _names(pid, folder):
    """Whether a process names a folder, or a place below it."""
    with contextlib.suppress(OSError):
        if f"{Path(f'/proc/{pid}/cwd').readlink()}/".startswith(folder):
            return True
    name = os.fsencode(folder)
    return name in _read(pid, "cmdline") or name in _read(pid, "environ")


def _read(pid, name):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


@pytest.fixture(scope="session", autouse=True)
def _session_begins_like_in_a_terminal():
    """Start programs with Ctrl-C's default action; spare later collections what is there for good.

    A shell starts its background jobs with SIGINT ignored, and so do they their own. This process goes on ignoring it,
    but by a handler, which no program inherits.
    """
    was_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if was_ignored:
        signal.signal(signal.SIGINT, lambda *_: None)
    gc.collect()
    gc.freeze()
    yield
    if was_ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_nothing_behind(tmp_path_factory):
    """Fail the last test of a module whose fixtures leave a process behind."""
    everything = f"{tmp_path_factory.getbasetemp()}/"
    yield from _nothing_left(lambda: everything, everything, "module")


@pytest.fixture(autouse=True)
def _test_leaves_nothing_behind(request, tmp_path_factory):
    """Fail a test that leaves a process behind."""
    everything = f"{tmp_path_factory.getbasetemp()}/"
    yield from _nothing_left(lambda: f"{request.node.funcargs.get('tmp_path', os.devnull)}/", everything, "test")


def _nothing_left(folder, everything, what):
    """See that no process is left; have garbage warn now that Python would collect in whatever test."""
    if sys.platform != "linux":
        yield
        return
    before = pids()
    yield
    staying = end_all(before, folder(), everything)
    gc.collect()
    if staying:
        pytest.fail(f"the {what} left processes behind, killed now: {'; '.join(staying)}", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown():
    """Let go of what a failed test had, before a failing teardown does, without its protection."""
    _forget_failure()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Let go of what a failed test had, before the next one begins."""
    result = yield
    _forget_failure()
    return result


def _forget_failure():
    """Drop the frames of a failed test, whose unclosed objects would warn in the next one."""
    if getattr(sys, "last_value", None) is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)
        gc.collect()
