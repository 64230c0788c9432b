"""The tasks of the torture test: good and bad bodies, each of which tells what it does in a file beside this module.

The torture copies this module into the application that it tortures. A line is one write to a file opened for
appending, so that a body that is killed the next moment has told it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bgsupervisor import BarrierBroken, Interrupted, PartNotReached, WaitTimeout, current, task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ORACLE = Path(__file__).with_name("oracle.jsonl")
PERMITS = {"one": 1, "other": 1, "two": 2}
WAIT_S = 20.0
"""No body waits longer for another."""
FORGOTTEN: list[contextlib.ExitStack] = []
"""What must not be closed in a copy of a body."""


class BoomError(Exception):
    """Raised on purpose."""


def say(what: str, **facts: object) -> None:
    """Tell the oracle."""
    me = current()
    known = {"what": what, "at": time.monotonic(), "id": me.id, "attempt": me.attempt, "pid": os.getpid()}
    line = json.dumps({**known, **facts}).encode() + b"\n"
    oracle = os.open(ORACLE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(oracle, line)
    finally:
        os.close(oracle)


def start_ticks(pid: int | str = "self") -> int:
    """Return when a process was started, as the process table has it."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


@contextlib.contextmanager
def told(kind: str) -> Iterator[None]:
    """Tell how a body begins and ends."""
    fork_server = os.getppid()
    say("start", kind=kind, ticks=start_ticks(), fork_server=fork_server)
    try:
        yield
    except BaseException as error:
        say("raise", error=type(error).__name__, text=str(error)[:200])
        raise
    say("end")


def nap(seconds: float) -> None:
    """Sleep, and tell progress now and then, so that a cancel is heard."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        current().progress(seconds - left, seconds)
        time.sleep(min(left, 0.1))


@task
def quick(n: int) -> int:
    """Do nothing."""
    with told("quick"):
        return n


@task
def sleeper(n: int, seconds: float) -> int:
    """Sleep."""
    with told("sleeper"):
        nap(seconds)
        return n


@task
def boom(n: int, seconds: float) -> NoReturn:
    """Raise."""
    with told("boom"):
        time.sleep(seconds)
        raise BoomError(n)


@task
def leaver(n: int, how: str) -> int:
    """Leave the process in one of many ways."""
    with told("leaver"):
        if how == "sys.exit":
            sys.exit(3)
        say("leave", code={"zero": 0, "seven": 7, "true": 0, "false": 1}[how])
        if how in ("true", "false"):
            os.execv(f"/bin/{how}", [how])
        os._exit({"zero": 0, "seven": 7}[how])
    return n


@task
def suicide(n: int, number: int) -> int:
    """Die of a signal of its own."""
    with told("suicide"):
        say("suicide", signal=number)
        if number == signal.SIGSEGV:
            ctypes.string_at(0)
        os.kill(os.getpid(), number)
        time.sleep(5)
    return n


@task
def daemon(n: int, seconds: float) -> int:
    """Leave a daemon behind that has left session and parent."""
    with told("daemon"):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                say("daemon", ticks=start_ticks())
                time.sleep(300)
            os._exit(0)
        os.wait()
        nap(seconds)
        return n


@task
def copier(n: int) -> int:
    """Fork, and return on both sides; the copy first."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(told("copier"))
        if os.fork() == 0:
            FORGOTTEN.append(stack.pop_all())  # only the process that began speaks
            return n
        time.sleep(0.15)
        return n


@task
def locker(n: int, names: list[str], seconds: float) -> int:
    """Hold locks."""
    with told("locker"), contextlib.ExitStack() as held:
        for name in names:
            waited("lock", functools.partial(held.enter_context, _holding(name)))
            time.sleep(seconds)
        return n


@contextlib.contextmanager
def _holding(name: str) -> Iterator[None]:
    with current().lock(name, permits=PERMITS[name], timeout_s=WAIT_S):
        say("take", name=name)
        try:
            yield
        finally:
            say("give", name=name)


def waited(what: str, wait: Callable[[], object]) -> object:
    """Wait for others; what ends a wait in order is no error of the body."""
    say("wait", on=what)
    try:
        value = wait()
    except (PartNotReached, BarrierBroken, WaitTimeout, Interrupted) as error:
        say("on", how=type(error).__name__)
        return None
    say("on", how="value")
    return value


@task
def printer(n: int, kilobytes: int) -> int:
    """Print much."""
    with told("printer"):
        for _ in range(kilobytes):
            print("x" * 1023)
        return n


@task
def stubborn(n: int, seconds: float) -> int:
    """Ignore SIGTERM, and hear no cancel."""
    with told("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(seconds)
        return n


@task
def hog(n: int, millions: int) -> int:
    """Keep the interpreter's lock in one long call."""
    with told("hog"):
        sum(range(millions * 1_000_000))
        return n


@task(timeout_s=0.5)
def late(n: int, *, ignoring: bool) -> int:
    """Run past its time limit."""
    with told("late"):
        if ignoring:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    return n


@task
def parts(n: int, seconds: float) -> int:
    """Reach parts that others wait for."""
    with told("parts"):
        nap(seconds)
        say("reach", part="first")
        current().reach("first", n)
        nap(seconds)
        return n


@task
def waiter(n: int, other: int, part: str | None, expected: int) -> int:
    """Wait for a part, or the end, of another."""
    with told("waiter"):
        value = waited("task", lambda: current().wait_for(other, part, timeout_s=WAIT_S))
        if value not in (None, expected):
            say("wrong", value=value, expected=expected)
        return n


@task
def participant(n: int, scope: str, parties: int) -> int:
    """Meet others."""
    with told("participant"):
        say("arrive", scope=scope, parties=parties)
        waited("barrier", lambda: current().barrier("limit", parties, scope=scope, timeout_s=WAIT_S))
        return n


@task
def parent(n: int, count: int) -> int:
    """Request others and wait for their ends."""
    with told("parent"):
        handles = []
        for number in range(count):
            child = current().request(sleeper, {"n": n + number, "seconds": random.uniform(0, 0.2)})
            say("ack", task=child.id, created=True, n=n + number, kind="sleeper")
            handles.append(child)
        waited("ends", lambda: current().wait_for(handles, timeout_s=WAIT_S, return_interrupted=True))
        return n
