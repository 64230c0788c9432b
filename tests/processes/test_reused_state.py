"""What a body changes in its process does not reach the next body of the same child."""

from __future__ import annotations

import json

import pytest
from support.app import App

BODIES = r"""
import asyncio, contextvars, decimal, faulthandler, gc, json, locale, os, resource, signal, socket, sys, time, warnings
from bgsupervisor import task

TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
MINE = contextvars.ContextVar("mine", default="unset")
decimal.getcontext()  # the context object of the main thread, which all bodies would share

def state():
    return {
        "pid": os.getpid(),
        "variable": MINE.get(),
        "precision": decimal.getcontext().prec,
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "handlers": [str(signal.getsignal(one)) for one in (signal.SIGALRM, signal.SIGUSR1, signal.SIGINT)],
        "timers": [signal.getitimer(one)[0] for one in TIMERS],
        "environment": [os.environ.get("MINE"), os.environ.get("TZ"), time.tzname[0]],
        "path": "/mine" in sys.path,
        "argv": "mine" in sys.argv,
        "filters": warnings.filters[0][0],
        "socket": socket.getdefaulttimeout(),
        "collects": gc.isenabled(),
        "recursion": sys.getrecursionlimit(),
        "profiler": sys.getprofile() is None,
        "locale": locale.setlocale(locale.LC_ALL),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "nice": os.nice(0),
        "processors": len(os.sched_getaffinity(0)),
    }

CHANGES = {
    "variable": lambda: MINE.set("set"),
    "precision": lambda: setattr(decimal.getcontext(), "prec", 5),
    "new context": lambda: decimal.setcontext(decimal.Context(prec=7)),
    "mask": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1}),
    "handler": lambda: signal.signal(signal.SIGUSR1, lambda *_: None),
    "ignored": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "alarm": lambda: signal.alarm(1),
    "timers": lambda: [signal.setitimer(one, 0.5) for one in TIMERS],
    "stacks": lambda: faulthandler.dump_traceback_later(0.5, exit=True),
    "environment": lambda: (os.environ.update(MINE="1", TZ="Pacific/Chatham"), time.tzset()),
    "path": lambda: sys.path.insert(0, "/mine"),
    "argv": lambda: sys.argv.append("mine"),
    "filters": lambda: warnings.simplefilter("error"),
    "socket": lambda: socket.setdefaulttimeout(0.1),
    "collects": lambda: gc.disable(),
    "recursion": lambda: sys.setrecursionlimit(500),
    "profiler": lambda: sys.setprofile(lambda *_: None),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
    "nice": lambda: os.nice(1),
    "processors": lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]),
    "pending": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, {12}), signal.raise_signal(12)),
}

@task
def changes(what: str) -> int:
    CHANGES[what]()
    return os.getpid()

@task
async def changes_in_a_loop(what: str) -> int:
    CHANGES[what]()
    return os.getpid()

@task
def looks(wait_s: float = 0.0) -> str:
    began = time.monotonic()
    while time.monotonic() - began < wait_s:
        pass
    return json.dumps(state())
"""
RESTORED = (
    "variable",
    "precision",
    "new context",
    "mask",
    "handler",
    "ignored",
    "alarm",
    "timers",
    "stacks",
    "environment",
    "path",
    "argv",
    "filters",
    "socket",
    "collects",
    "recursion",
    "profiler",
    "locale",
)
NOT_USED_AGAIN = ("files", "nice", "processors", "pending")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    app = App(tmp_path_factory.mktemp("reused"), BODIES, reuse=1000, spares=0, slots=1)
    try:
        app.start()
        yield app
    finally:
        app.end()


def result(app, body, **data):
    record = app.wait(app.service.request(f"appx:{body}", data))
    assert record.status == "DONE", record
    return app.service.result(record.id)


def looked(app, **data):
    seen = json.loads(result(app, "looks", **data))
    return seen.pop("pid"), seen


@pytest.mark.parametrize("body", ["changes", "changes_in_a_loop"])
@pytest.mark.parametrize("what", RESTORED)
def test_a_setting_that_a_body_changed_is_restored_for_the_next(app, what, body):
    wait_s = 1.2 if what in {"alarm", "timers", "stacks"} else 0.0
    for _ in range(20):  # a second child may take a turn, when a task is requested before the first one is idle
        before_pid, before = looked(app)
        pid = result(app, body, what=what)
        after_pid, after = looked(app, wait_s=wait_s)
        assert after == before
        if before_pid == pid == after_pid:
            return
    pytest.fail("not in 20 attempts: one process has run all three tasks")


@pytest.mark.parametrize("what", NOT_USED_AGAIN)
def test_a_child_whose_setting_cannot_be_restored_is_not_used_again(app, what):
    _, before = looked(app)
    pid = result(app, "changes", what=what)
    after_pid, after = looked(app)
    assert after == before
    assert after_pid != pid
