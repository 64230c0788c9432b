"""`bgsupervisor health`: one line and an exit code for a monitoring system, metrics for Prometheus."""

from __future__ import annotations

import os
import re
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.app import wait_until

from bgsupervisor.cli.commands import health

pytestmark = [
    pytest.mark.any_database,
    pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux"),
]

OK, WARNING, CRITICAL, UNKNOWN = range(4)
TASKS = """
    import pathlib, time
    from bgsupervisor import task

    @task
    def quick() -> int:
        return 1

    @task
    def fails() -> None:
        raise ValueError("no such invoice | really")

    @task
    def until(name: str) -> None:
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
"""


def ask(app, *arguments):
    """Return exit code, sentence and numbers of `health`."""
    done = app.cli("health", *arguments)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    sentence, _, perfdata = done.stdout.rstrip("\n").partition(" | ")
    return done.returncode, sentence, dict(pair.split("=") for pair in perfdata.split())


def sql(app, statement, *values):
    return app.database.rows(statement, *values)


def ago(seconds):
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(sep=" ", timespec="microseconds")


@pytest.fixture
def app(make_app):
    return make_app(TASKS, slots=2)


def test_a_living_supervisor_with_nothing_late_is_ok(app):
    started = app.start()
    app.wait(app.service.request("appx:quick"))
    code, sentence, numbers = ask(app)
    assert (code, sentence) == (OK, f"OK - supervisor {started.process.pid} is alive, 0 of 2 slots busy, 0 waiting")
    assert numbers["supervisors"] == "1"
    assert numbers["waiting"] == "0;;;0"
    assert numbers["running"] == "0;;;0;2"
    assert numbers["done_24h"] == "1;;;0"
    assert numbers["oldest_wait"] == "0.0s;300;3000;0"
    assert all(re.fullmatch(r"[\d.]+(s|B)?(;[\d.]*){0,4}", one) for one in numbers.values())


def test_no_living_supervisor_is_critical(app):
    app.service.request("appx:quick")
    code, sentence, numbers = ask(app)
    assert (code, sentence) == (
        CRITICAL,
        "CRITICAL - no supervisor has been seen yet; start one with `bgsupervisor run`",
    )
    assert numbers["supervisors"] == "0"
    app.start().kill()
    code, sentence, _ = ask(app)
    assert code == CRITICAL
    assert re.match("CRITICAL - no supervisor has been seen since [0-9:]+;", sentence)


def test_one_that_was_stopped_on_purpose_is_a_warning_that_names_who_and_when(app):
    app.start()
    assert app.cli("stop").returncode == 0
    code, sentence, _ = ask(app)
    assert code == WARNING
    assert re.match(r"WARNING - stopped by \S+ at 2\d{3}-.*; `bgsupervisor start` allows it again", sentence)


def test_without_configuration_or_database_nothing_is_known(app, tmp_path):
    code, sentence, numbers = ask(app)
    store = app.service.ledger.store
    what = (
        f"{store.place} has none of our tables yet"
        if app.own
        else f"there is no database yet, {store.place} is missing"
    )
    assert (code, sentence, numbers) == (UNKNOWN, f"UNKNOWN - {what}", {})
    assert not store.is_there()
    code, sentence, _ = ask(app, "--config", str(tmp_path / "absent.toml"))
    assert code == UNKNOWN
    assert "absent.toml does not exist" in sentence


@pytest.mark.of_sqlite
def test_a_database_that_cannot_be_read_is_critical(app):
    (app.folder / "bgsupervisor.db").write_bytes(b"notes, and no database\n" * 500)
    code, sentence, _ = ask(app)
    assert code == CRITICAL
    assert sentence.startswith("CRITICAL - the database")
    assert "is damaged" in sentence


def test_a_supervisor_that_has_not_been_able_to_write_for_long_is_a_warning(app):
    app.start()
    sql(app, "UPDATE bgsupervisor_supervisor SET heartbeat_at = ?", ago(50))
    code, sentence, _ = ask(app)
    assert code == WARNING
    assert "is alive but has not written to the database since" in sentence


def test_wrong_usage_is_unknown_and_not_critical(app):
    for wrong in (["--max-wait-s", "soon"], ["--max-wait-s", "0"], ["--max-interrupted", "-1"], ["--nonsense"]):
        done = app.cli("health", *wrong)
        assert done.returncode == UNKNOWN
        assert "Usage: bgsupervisor health" in done.stderr


@pytest.mark.on_both
def test_a_due_task_that_waits_too_long_is_a_warning_and_ten_times_as_long_critical(app):
    app.start()
    for name in ("a", "b"):
        app.started(app.service.request("appx:until", {"name": name}))
    late = app.service.request("appx:quick").id
    sql(app, "UPDATE bgsupervisor_task SET run_at = ? WHERE id = ?", ago(400), late)
    code, sentence, numbers = ask(app)
    assert (code, sentence) == (WARNING, "WARNING - a due task has waited 6 min, all 2 slots are busy")
    assert 400 <= float(numbers["oldest_wait"].split("s;")[0]) < 460
    assert ask(app, "--max-wait-s", "3600")[0] == OK
    code, sentence, numbers = ask(app, "--max-wait-s", "30")
    assert (code, sentence[:32]) == (CRITICAL, "CRITICAL - a due task has waited")
    assert numbers["oldest_wait"].endswith("s;30;300;0")


def test_tasks_of_the_future_and_tasks_without_code_are_not_late(app):
    app.start()
    app.service.request("appx:quick", delay_s=3600)
    missing = app.service.request("other:gone").id
    sql(app, "UPDATE bgsupervisor_task SET run_at = ? WHERE id = ?", ago(9999), missing)
    code, _, numbers = ask(app)
    assert code == OK
    assert numbers["oldest_wait"].startswith("0.0s")
    assert numbers["waiting"] == "2;;;0"


def test_interrupted_tasks_count_within_a_day_and_only_if_asked(app):
    app.start()
    ids = [app.wait(app.service.request("appx:fails")).id for _ in range(3)]
    sql(app, "UPDATE bgsupervisor_task SET ended_at = ? WHERE id = ?", ago(90_000), ids[0])
    assert ask(app)[0] == OK
    assert ask(app, "--max-interrupted", "2")[0] == OK
    code, sentence, numbers = ask(app, "--max-interrupted", "1")
    assert (code, sentence) == (WARNING, "WARNING - 2 tasks were interrupted within a day")
    assert numbers["interrupted_24h"] == "2;1;;0"


def test_code_that_does_not_load_is_a_warning_on_one_line_without_a_bar(make_app):
    app = make_app("raise RuntimeError('first | second\\nthird')")
    app.start()
    code, sentence, numbers = ask(app)
    assert code == WARNING
    assert sentence.startswith("WARNING - module appx failed to load: ")
    assert "|" not in sentence
    assert numbers


def test_a_running_task_without_a_heartbeat_is_a_warning(make_app):
    app = make_app(TASKS, heartbeat_s=0.1)
    app.start()
    record = app.started(app.service.request("appx:until", {"name": "never"}))
    os.kill(record.pid, signal.SIGSTOP)
    try:
        code, sentence, numbers = wait_until(
            lambda: (found := ask(app)) and found[0] == WARNING and found, "the silence is noticed"
        )
    finally:
        os.kill(record.pid, signal.SIGCONT)
    assert (code, sentence) == (WARNING, f"WARNING - running but unresponsive: {record.id}")
    assert numbers["unresponsive"] == "1;0;;0"


@pytest.mark.of_sqlite
def test_a_large_wal_file_is_a_warning(app):
    started = app.start()
    with (app.folder / "bgsupervisor.db-wal").open("r+b") as wal:
        size = wal.seek(0, 2)
        os.ftruncate(wal.fileno(), health.WAL_WARN_BYTES + 1)
        try:
            code, sentence, numbers = ask(app)
        finally:
            os.ftruncate(wal.fileno(), size)
    assert code == WARNING
    assert "the -wal file has 100 MiB" in sentence
    assert numbers["wal"] == f"{health.WAL_WARN_BYTES + 1}B;{health.WAL_WARN_BYTES};;0"
    assert started.process.poll() is None


def test_the_worst_comes_first_and_decides(app):
    app.service.request("appx:quick")
    sql(
        app,
        "INSERT INTO bgsupervisor_task (name, status, reason, ended_at) VALUES ('a', 'INTERRUPTED', 'RAISED', ?)",
        ago(1),
    )
    code, sentence, _ = ask(app, "--max-interrupted", "0")
    assert code == CRITICAL
    assert sentence.endswith("`bgsupervisor run`; 1 tasks were interrupted within a day")


# ---- Prometheus ----

SAMPLE = re.compile(r'(bgsupervisor_\w+)\{((?:\w+="(?:[^"\\]|\\.)*",?)*)\} (-?[\d.e+]+)')
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def metrics(app, *arguments):
    """Return samples as {(name, status): value} and the labels of all of them; check the format line by line."""
    done = app.cli("health", "--prometheus", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    helped, typed, samples, labels = [], [], {}, []
    for line in done.stdout.splitlines():
        if line.startswith("# HELP "):
            helped.append(line.split()[2])
        elif line.startswith("# TYPE "):
            assert line.split()[3] == "gauge"
            typed.append(line.split()[2])
        else:
            name, text, value = SAMPLE.fullmatch(line).groups()
            assert name == typed[-1], "a sample follows its own TYPE"
            found = dict(LABEL.findall(text))
            labels.append(found)
            samples[name.removeprefix("bgsupervisor_"), found.get("status")] = float(value)
    assert helped == typed
    assert len(set(typed)) == len(typed)
    return samples, labels


def test_metrics_tell_what_is_there(make_app):
    app = make_app(TASKS, host='web "1"\\\\', slots=3)
    app.start()
    app.wait(app.service.request("appx:quick"))
    app.started(app.service.request("appx:until", {"name": "never"}))
    app.service.request("other:gone")
    samples, labels = metrics(app)
    assert samples.pop(("supervisor_heartbeat_age_seconds", None)) < 30
    assert (samples.pop(("wal_bytes", None)) > 0) is app.database.is_sqlite
    assert samples == {
        ("database_readable", None): 1,
        ("database_writable", None): 1,
        ("supervisor_up", None): 1,
        ("supervisor_stopped", None): 0,
        ("slots", None): 3,
        ("live_tasks", "REQUEST"): 1,
        ("live_tasks", "START"): 1,
        ("ended_tasks_24h", "DONE"): 1,
        ("ended_tasks_24h", "INTERRUPTED"): 0,
        ("oldest_wait_seconds", None): 0,
        ("unresponsive_tasks", None): 0,
        ("code_failures", None): 0,
    }
    assert all(one["prefix"] == "bgsupervisor_" and one["host"] == r"web \"1\"\\" for one in labels)


@pytest.mark.of_sqlite
def test_metrics_are_printed_without_a_supervisor_and_without_a_readable_database(app):
    assert metrics(app)[0] == {("database_readable", None): 0}
    app.service.request("appx:quick")
    samples, _ = metrics(app)
    assert samples["supervisor_up", None] == 0
    assert ("supervisor_heartbeat_age_seconds", None) not in samples
    assert app.cli("stop").returncode == 0
    assert metrics(app)[0]["supervisor_stopped", None] == 1
    app.service.close()
    for path in app.folder.glob("bgsupervisor.db*"):
        path.unlink()
    Path(app.folder / "bgsupervisor.db").write_bytes(b"no database\n" * 900)
    assert metrics(app)[0] == {("database_readable", None): 0}


def test_metrics_without_a_configuration_are_a_failure(app, tmp_path):
    done = app.cli("health", "--prometheus", "--config", str(tmp_path / "absent.toml"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "absent.toml does not exist" in done.stderr
