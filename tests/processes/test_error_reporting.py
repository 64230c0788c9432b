"""What ends a body reaches logging, excepthook and error trackers, once, before the process leaves; ends in the log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sqlite3
import sys
from pathlib import Path

import psutil
import pytest
from support.app import wait_until
from support.pace import allowed_s
from support.sentry_sink import sentry_sink

from bgsupervisor.statuses import Reason, Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
BODIES = """
import asyncio, json, logging, os, sys, time
from pathlib import Path
from bgsupervisor import Cancelled, Task, current, task

FOLDER = Path(__file__).parent
AT_IMPORT

@task
def raises(text: str = "no such invoice") -> None:
    raise ValueError(text)

@task
async def raises_async() -> None:
    await asyncio.sleep(0)
    raise ValueError("no such invoice")

@task
def calls_another() -> None:
    raises("by another body")

@task
def exits() -> None:
    sys.exit("no more")

@task
def returns() -> int:
    return 1

@task
def returns_what_is_no_json() -> object:
    return object()

@task
def waits() -> None:
    (FOLDER / f"runs-{current().id}").touch()
    for _ in current().track(iter(int, 1)):
        time.sleep(0.01)

@task(timeout_s=0.3)
def waits_too_long() -> None:
    waits()

@task
def waits_for(other: int) -> None:
    current().wait_for(other)

class Pays(Task):
    secret = ("token",)

    def run(self, token: int) -> None:
        raise ValueError("not paid")

class Orders(Task):
    def run(self) -> None:
        self.request(Pays, {"token": "-".join(["hush", "hush"])})
"""
TO_FILE = """
class Json(logging.Handler):
    def emit(self, record):
        names = ("levelname", "name", "task_id", "task_name", "task_attempt", "task_reason")
        said = {name: getattr(record, name, None) for name in names} | {"message": record.getMessage()}
        said["trace"] = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        said["locals"] = []
        waiting = [record.exc_info[1]] if record.exc_info else []
        while waiting:
            error = waiting.pop()
            trace = error.__traceback__
            while trace:
                said["locals"].append(repr(trace.tb_frame.f_locals))
                trace = trace.tb_next
            waiting += [one for one in (error.__cause__, error.__context__) if one]
        with open(FOLDER / "records", "a") as file:
            file.write(json.dumps(said) + "\\n")

logging.basicConfig(level=logging.INFO, handlers=[Json()])
"""
HOOK = """
before = sys.excepthook

def hook(kind, error, trace):
    with open(FOLDER / "hooked", "a") as file:
        file.write(f"{kind.__name__}: {error}, in {trace.tb_frame.f_code.co_name}\\n")
    before(kind, error, trace)

sys.excepthook = hook
"""


def started(make_app, at_import="", **options):
    app = make_app(BODIES.replace("AT_IMPORT", at_import), **options)
    app.start()
    return app


def run(app, name, data=None):
    return app.wait(app.service.request(f"appx:{name}", data or {}))


def records_of(app):
    path = app.folder / "records"
    lines = path.read_text().splitlines() if path.exists() else []
    return [one for one in map(json.loads, lines) if one["name"] == "bgsupervisor.task"]


# ---- logging ----


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        ("raises", Reason.RAISED, "ValueError: no such invoice"),
        ("raises_async", Reason.RAISED, "ValueError: no such invoice"),
        ("exits", Reason.EXITED, "the body called sys.exit with code 1"),
        ("waits_too_long", Reason.TIMED_OUT, "timeout_s"),
        ("returns_what_is_no_json", Reason.RAISED, "object"),
    ],
)
def test_an_end_by_an_exception_is_logged_with_its_task(make_app, name, reason, said):
    app = started(make_app, TO_FILE)
    record = run(app, name)
    assert record.reason is reason
    (logged,) = records_of(app)
    assert logged["levelname"] == "ERROR"
    assert logged["message"].startswith(f"task {record.id} (appx:{name}), attempt 1, ended: {reason}: ")
    assert said in logged["message"]
    facts = (logged["task_id"], logged["task_name"], logged["task_attempt"], logged["task_reason"])
    assert facts == (record.id, f"appx:{name}", 1, reason)
    if name != "returns_what_is_no_json":  # it is no frame of the body that raises
        assert f"in {name}" in logged["trace"]
    assert "bgsupervisor/worker/child.py" not in logged["trace"]


def test_a_deadlock_is_logged_as_an_error(make_app):
    app = started(make_app, TO_FILE)
    first, second = app.service.request_many("appx:waits_for", [{"other": 2}, {"other": 1}])
    assert {app.wait(first).reason, app.wait(second).reason} >= {Reason.DEADLOCKED}
    logged = [one for one in records_of(app) if one["task_reason"] == "DEADLOCKED"]
    assert [(one["levelname"], "in waits_for" in one["trace"]) for one in logged] == [("ERROR", True)]


def test_a_cancel_is_logged_as_information_without_a_traceback(make_app):
    app = started(make_app, TO_FILE + HOOK)
    handle = app.service.request("appx:waits")
    wait_until((app.folder / f"runs-{handle.id}").exists, "the body runs")
    app.service.cancel(handle, by="jana")
    assert app.wait(handle).reason is Reason.CANCELLED
    (logged,) = records_of(app)
    assert (logged["levelname"], logged["task_reason"], logged["trace"]) == ("INFO", "CANCELLED", None)
    assert not (app.folder / "hooked").exists()


def test_a_task_that_is_done_logs_nothing(make_app):
    app = started(make_app, TO_FILE)
    assert run(app, "returns").status is Status.DONE
    assert records_of(app) == []


def test_a_body_called_by_another_keeps_its_frames_in_the_log(make_app):
    app = started(make_app, TO_FILE)
    run(app, "calls_another")
    (logged,) = records_of(app)
    assert re.findall(r"in (\w+)", logged["trace"]) == ["calls_another", "raises"]


def test_the_traceback_stands_once_in_the_log_of_the_task(make_app):
    app = started(make_app)
    text = app.log_of(run(app, "raises"))
    assert text.count("Traceback (most recent call last)") == 1
    assert text.count("    raise ValueError(text)") == 1
    assert "ERROR bgsupervisor.task: task 1 (appx:raises), attempt 1, ended: RAISED: ValueError: no such" in text


def test_loggers_disabled_by_the_application_do_not_silence_it(make_app):
    config = """
import logging.config
logging.config.dictConfig({
    "version": 1,
    "handlers": {"here": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["here"]},
})
"""
    app = started(make_app, config)
    assert "no such invoice" in app.log_of(run(app, "raises"))


@pytest.mark.parametrize("setup", ["breaks", "quits"])
def test_a_child_setup_that_fails_is_logged(make_app, setup):
    source = "def breaks():\n    raise LookupError('no setting')\ndef quits():\n    sys.exit(3)\n"
    app = started(make_app, source, child_setup=f"appx:{setup}")
    text = app.log_of(run(app, "returns"))
    assert "ERROR bgsupervisor.task: task 1" in text
    assert f"in {setup}" in text
    assert text.count("Traceback") == 1


def test_no_frame_that_is_reported_holds_the_data_of_a_refused_task(make_app):
    app = started(make_app, TO_FILE)
    refused = run(app, "Pays", {"token": "hush-hush"})  # by its name: checked when it begins
    assert refused.reason is Reason.RAISED
    assert run(app, "Orders").reason is Reason.RAISED
    first, second = records_of(app)
    assert "token" in first["message"]
    assert first["trace"].startswith("bgsupervisor.errors.DataInvalid")
    assert "in run" in second["trace"]
    assert "hush-hush" not in (app.folder / "records").read_text()


@pytest.mark.of_sqlite
def test_no_frame_of_the_database_layer_is_reported(make_app):
    source = """
import sqlite3

@task
def requests_while_locked() -> None:
    connection = sqlite3.connect(FOLDER / "bgsupervisor.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        current().request(Pays, {"token": int("4711" * 2)})
    finally:
        connection.rollback()
"""
    app = started(make_app, TO_FILE + source, busy_timeout_s=0.2)
    assert "locked" in run(app, "requests_while_locked").detail
    (logged,) = records_of(app)
    assert re.findall(r"line \d+, in (\w+)", logged["trace"]) == ["requests_while_locked"]
    assert "47114711" not in json.dumps(logged)


# ---- excepthook ----


def test_an_excepthook_set_at_import_is_called_once(make_app):
    app = started(make_app, HOOK)
    record = run(app, "raises")
    assert (app.folder / "hooked").read_text() == "ValueError: no such invoice, in raises\n"
    assert app.log_of(record).count("Traceback") == 1


def test_an_excepthook_that_fails_changes_no_end(make_app):
    app = started(make_app, "def hook(*about):\n    sys.exit('a broken hook')\nsys.excepthook = hook")
    record = run(app, "raises")
    assert (record.reason, record.detail) == (Reason.RAISED, "ValueError: no such invoice")
    assert "a broken hook" in app.log_of(record)


def test_a_body_that_calls_the_excepthook_itself_sees_it_print(make_app):
    source = """
@task
def prints() -> None:
    try:
        raise KeyError("its own")
    except KeyError:
        sys.excepthook(*sys.exc_info())
"""
    app = started(make_app, source)
    assert "KeyError: 'its own'" in app.log_of(run(app, "prints"))


# ---- Sentry ----

SENTRY = """
import sentry_sdk.integrations.logging

sentry_sdk.init("{dsn}"{more})

@task
def captures(then: str) -> int:
    sentry_sdk.set_tag("customer", "acme")
    sentry_sdk.capture_message(f"captured by {{current().id}}")
    if then == "raises":
        raise ValueError("no such invoice")
    if then == "exits":
        sys.exit(3)
    if then == "waits":
        waits()
    return os.getpid()
"""


@pytest.fixture
def sink():
    with sentry_sink() as server:
        yield server


def with_sentry(make_app, sink, more="", **options):
    return started(make_app, SENTRY.format(dsn=sink.dsn, more=more), **options)


@pytest.mark.parametrize("reuse", [1, 3])
def test_sentry_gets_every_event_of_bodies_however_they_end(make_app, sink, reuse):
    sink.answers_after_s = 0.3  # what waits for this answer is lost if its process leaves meanwhile
    app = with_sentry(make_app, sink, reuse=reuse)
    expected = []
    for then, kinds in {"returns": [], "raises": ["ValueError"], "exits": ["SystemExit"], "waits": []}.items():
        handle = app.service.request("appx:captures", {"then": then})
        if then == "waits":
            wait_until((app.folder / f"runs-{handle.id}").exists, "the body runs")
            app.service.cancel(handle)
        app.wait(handle)
        expected += [f"captured by {handle.id}", *kinds]
        wait_until(lambda: len(sink.titles()) >= len(expected), f"Sentry has {expected}")  # noqa: B023 - called at once
        assert sink.titles() == sorted(expected)


def test_sentry_gets_the_stack_and_the_task_of_an_exception(make_app, sink):
    app = with_sentry(make_app, sink)
    record = run(app, "captures", {"then": "raises"})
    wait_until(lambda: "ValueError" in sink.titles(), "Sentry has the exception")
    (event,) = [event for event in sink.events if "exception" in event]
    frames = event["exception"]["values"][-1]["stacktrace"]["frames"]
    assert [frame["function"] for frame in frames] == ["captures"]
    assert event["logger"] == "bgsupervisor.task"
    assert event["tags"]["customer"] == "acme"
    extra = event["extra"]
    assert (extra["task_id"], extra["task_name"], extra["task_attempt"]) == (record.id, "appx:captures", 1)
    text = app.log_of(record)
    assert text.count("Traceback") == 1


def test_sentry_without_its_logging_integration_gets_the_exception_once(make_app, sink):
    app = with_sentry(make_app, sink, ", disabled_integrations=[sentry_sdk.integrations.logging.LoggingIntegration]")
    run(app, "captures", {"then": "raises"})
    wait_until(lambda: sink.titles() == ["ValueError", "captured by 1"], "Sentry has both")


def test_a_sentry_that_does_not_answer_delays_no_end_and_no_next_task(make_app, sink):
    sink.hold()
    app = with_sentry(make_app, sink, grace_s=0.5)
    for _ in range(3):
        record = run(app, "captures", {"then": "returns"})
        assert record.status is Status.DONE
        assert (record.ended_at - record.started_at).total_seconds() < allowed_s(2)
        process = psutil.Process(record.pid) if psutil.pid_exists(record.pid) else None
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.wait(5)


def test_no_data_reaches_sentry_by_the_frames_around_a_body(make_app, sink):
    app = with_sentry(make_app, sink, ", add_full_stack=True, attach_stacktrace=True")
    app.wait(app.service.request("appx:Pays", {"token": 4711471147}))
    wait_until(lambda: "ValueError" in sink.titles(), "Sentry has the exception")
    (event,) = [event for event in sink.events if "exception" in event]
    frames = event["exception"]["values"][-1]["stacktrace"]["frames"]
    ours = [frame for frame in frames if frame["module"].startswith("bgsupervisor.")]
    assert ours  # add_full_stack shows from where it was logged
    assert "4711471147" not in json.dumps(ours)


# ---- other trackers ----


def test_opentelemetry_providers_are_flushed_when_a_child_leaves(make_app):
    """Of OpenTelemetry the API alone is there: a provider as the SDK has them, with `force_flush`."""
    source = """
from opentelemetry import trace

class Provider(trace.ProxyTracerProvider):
    held = []

    def force_flush(self, timeout_millis=30000):
        with open(FOLDER / "flushed", "a") as file:
            file.write("".join(self.held))
        self.held.clear()
        return True

provider = Provider()
trace.set_tracer_provider(provider)

@task
def traces() -> None:
    provider.held.append("a span\\n")
"""
    app = started(make_app, source)
    run(app, "traces")
    wait_until((app.folder / "flushed").exists, "the provider was flushed")
    wait_until(lambda: (app.folder / "flushed").read_text() == "a span\n", "its span was written once")


# ---- the supervisor's log ----

LINE = re.compile(
    r"^\S+ \S+ (?P<level>\w+) task ended: id=(?P<id>\d+) name=(?P<name>\S+) attempt=(?P<attempt>\d+) "
    r'status=INTERRUPTED reason=(?P<reason>[A-Z_]+) detail=(?P<detail>".*")$',
    re.MULTILINE,
)


def line_of(app, id):
    def found():
        text = "".join(one.log for one in app.supervisors)
        return next((one for one in LINE.finditer(text) if one["id"] == str(id)), None)

    line = wait_until(found, f"the end of task {id} is in the log")
    return line["level"], line["name"], line["attempt"], line["reason"], json.loads(line["detail"])


def test_the_supervisor_logs_a_kill_as_one_line_of_fields(make_app):
    app = started(make_app)
    handle = app.service.request("appx:waits")
    wait_until((app.folder / f"runs-{handle.id}").exists, "the body runs")
    os.kill(app.service.get(handle).pid, signal.SIGKILL)
    record = app.wait(handle)
    assert line_of(app, handle.id) == ("ERROR", "appx:waits", "1", "SIGNALLED", record.detail)


def test_the_supervisor_logs_other_ends_as_the_same_line(make_app):
    app = started(make_app)
    broken = run(app, "raises", {"text": 'two\nlines, a "quote" and \u00fc'})
    level, name, _, reason, detail = line_of(app, broken.id)
    assert (level, name, reason, detail) == ("ERROR", "appx:raises", "RAISED", broken.detail)
    handle = app.service.request("appx:waits")
    wait_until((app.folder / f"runs-{handle.id}").exists, "the body runs")
    app.service.cancel(handle, by="jana")
    app.wait(handle)
    assert line_of(app, handle.id)[0] == "INFO"


@pytest.mark.of_sqlite
def test_the_supervisor_names_a_task_that_it_learns_of_from_its_row(make_app):
    app = started(make_app)
    handle = app.service.request("appx:waits")
    wait_until((app.folder / f"runs-{handle.id}").exists, "the body runs")
    app.supervisors[0].kill()
    pid = app.service.get(handle).pid
    with contextlib.closing(sqlite3.connect(app.folder / "bgsupervisor.db", timeout=10)) as connection, connection:
        connection.execute("UPDATE bgsupervisor_task SET boot_id = 'another' WHERE id = ?", (handle.id,))
    app.start()
    record = app.wait(handle)
    assert record.reason is Reason.HOST_REBOOTED
    assert line_of(app, handle.id) == ("ERROR", "appx:waits", "1", "HOST_REBOOTED", record.detail)
    psutil.Process(pid).kill()


def test_the_line_in_the_operating_page_is_the_one_that_is_logged():
    (example,) = re.findall(r"^```text\n(.*task ended: .*)\n```$", OPERATING.read_text(), re.MULTILINE)
    assert LINE.fullmatch(example), example
    levels = {"INFO": {Reason.CANCELLED, Reason.STOPPED}}
    assert {reason for reason in Reason if reason.wanted} == levels["INFO"]
    assert logging.getLevelName(logging.INFO) == "INFO"
