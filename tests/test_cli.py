"""The commands, as users call them: real processes, their output and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import peewee
import pytest
from conftest import wait_until

from bgsupervisor.statuses import Reason, Status

TASKS = """
    import os, sys, time
    from bgsupervisor import Task, task, current

    @task
    def add(a: int, b: int = 0) -> int:
        return a + b

    @task
    def fails() -> None:
        print("about to fail")
        raise ValueError("no such invoice")

    @task
    def sleeps(seconds: float = 60.0) -> None:
        print("first line", flush=True)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            current().progress(1, 4, "sleeping")
            time.sleep(0.02)
        print("last line", flush=True)
"""


def test_a_mistake_is_one_sentence_and_an_exit_code(make_app, tmp_path):
    app = make_app(TASKS)
    cases = [
        (["show", "7"], 1, "bgsupervisor: no task has the id 7"),
        (["log", "7"], 1, "bgsupervisor: no task has the id 7"),
        (["cancel", "7"], 1, "bgsupervisor: no task has the id 7"),
        (["retry", "7"], 1, "bgsupervisor: no task has the id 7"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["show", "seven"], 2, "'seven' is not a valid integer"),
        (["request", "appx:add", '{"a": 1'], 2, "not JSON: Expecting ',' delimiter, line 1, column 8"),
        (["request", "appx:add", "{}", "--at", "soon"], 2, "--at 'soon' is no time"),
        (["request", "appx:add", "--unique", '{"a": 1}'], 2, "--unique took the data"),
        (["request", "appx:add", '{"b": 1}'], 1, "bgsupervisor: data for appx:add is invalid"),
        (["request", "appx:add", "[1]"], 1, "must be a mapping"),
        (["run", "--slots", "0"], 3, "bgsupervisor: slots must be a whole number from 1 to 1000"),
        (["ps", "--config", "absent.toml"], 3, "absent.toml does not exist"),
    ]
    for arguments, code, sentence in cases:
        done = app.cli(*arguments)
        assert (done.returncode, done.stdout) == (code, ""), (arguments, done)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_without_a_configuration_every_command_names_the_folders_searched(tmp_path):
    for command in (["ps"], ["run"], ["check"], ["migrate"], ["request", "x:y"]):
        done = _plain_call(tmp_path, *command)
        assert done.returncode == 3
        assert str(tmp_path) in done.stderr
        assert "bgsupervisor init" in done.stderr


def test_the_version_is_told(tmp_path):
    assert _plain_call(tmp_path, "--version").stdout == "bgsupervisor 0.1.0\n"


def test_init_writes_a_configuration_that_works_and_overwrites_none(tmp_path):
    done = _plain_call(tmp_path, "init")
    written = (tmp_path / "bgsupervisor.toml").read_text()

    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    assert "# slots = 16" in written
    assert _plain_call(tmp_path, "ps").returncode == 0

    (tmp_path / "bgsupervisor.toml").write_text("slots = 3\n")
    again = _plain_call(tmp_path, "init")
    assert again.returncode == 3
    assert "exists already" in again.stderr
    assert (tmp_path / "bgsupervisor.toml").read_text() == "slots = 3\n"


def test_looking_creates_nothing(make_app):
    app = make_app(TASKS)
    before = sorted(path.name for path in app.folder.iterdir())
    for command in (["ps"], ["ps", "--all", "--json"], ["show", "1"], ["log", "1"], ["cancel", "1"], ["retry", "1"]):
        app.cli(*command)

    assert sorted(path.name for path in app.folder.iterdir()) == before


def test_a_listing_imports_neither_the_supervisor_nor_psutil_rich_or_multiprocessing(make_app):
    app = make_app(TASKS)
    app.service.request("appx:add", {"a": 1})
    script = (
        "import sys\n"
        "from bgsupervisor.cli.program import program\n"
        "program.main(['ps'], standalone_mode=False)\n"
        "print([name for name in ('bgsupervisor.supervisor', 'bgsupervisor.nursery', 'psutil', 'rich', "
        "'multiprocessing', 'playhouse') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=app.folder,
        env=app.environment(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early_is_no_error_to_talk_about(make_app):
    app = make_app(TASKS)
    app.service.request_many("appx:add", [{"a": number} for number in range(1000)])
    process = subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "ps", "--all", "--json"],
        cwd=app.folder,
        env=app.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()

    assert b"Error" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(10) == 1


# request


def test_request_tells_the_id_and_records_what_was_asked(make_app):
    app = make_app(TASKS)
    done = app.cli("request", "appx:add", '{"a": 1}', "--key", "k", "--priority", "5", "--unique")
    record = app.service.get(1)

    assert done.stdout == "requested task 1 (appx:add)\n"
    assert "no supervisor has been seen yet; start one with `bgsupervisor run`" in done.stderr
    assert (record.name, record.data, record.key, record.priority) == ("appx:add", '{"a":1}', "k", 5)

    again = app.cli("request", "appx:add", '{"a": 2}', "--key", "k", "--unique", "--json")
    assert json.loads(again.stdout) == {"id": 1, "created": False}


def test_data_may_come_from_stdin(make_app):
    app = make_app(TASKS)
    app.cli("request", "appx:add", "-", input='{"a": 41}')

    assert app.service.get(1).data == '{"a":41}'


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a":' + b"[" * 100_000, "it is nested too deeply"),
        (b'{"a":\n', "Expecting value, line 2, column 1"),
    ],
)
def test_request_with_stdin_that_is_no_json_says_where_and_leaves_with_2(make_app, given, fault):
    app = make_app(TASKS)
    (app.folder / "given").write_bytes(given)
    with (app.folder / "given").open() as stdin:
        done = app.cli("request", "appx:add", "-", stdin=stdin, environment={"PYTHONIOENCODING": "utf-8:strict"})

    assert (done.returncode, f"Error: the data is not JSON: {fault}; it must be an object" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


def test_a_time_without_a_zone_is_local(make_app):
    app = make_app(TASKS)
    for text in ("2031-02-03 04:05", "2031-02-03T04:05:00+00:00", "23:59"):
        assert app.cli("request", "appx:add", '{"a": 1}', "--at", text, environment={"TZ": "Etc/GMT+3"}).returncode == 0

    assert app.service.get(1).run_at == datetime(2031, 2, 3, 7, 5, tzinfo=UTC)
    assert app.service.get(2).run_at == datetime(2031, 2, 3, 4, 5, tzinfo=UTC)
    third = app.service.get(3).run_at
    assert (third.hour, third.minute) == (2, 59)
    assert timedelta(0) < third - datetime.now(UTC) <= timedelta(days=1)


def test_modules_that_cannot_be_imported_here_do_not_keep_a_request_out(make_app):
    app = make_app("print('noise')\nraise SystemExit('only on the server')")
    done = app.cli("request", "appx:add", '{"whatever": 1}')

    assert (done.returncode, done.stdout) == (0, "requested task 1 (appx:add)\n")


def test_waiting_prints_the_result_alone_or_says_why_there_is_none(make_app):
    app = make_app(TASKS)
    app.start()
    added = app.cli("request", "appx:add", '{"a": 20, "b": 22}', "--wait", "--timeout-s", "20")
    failed = app.cli("request", "appx:fails", "--wait", "--timeout-s", "20")
    late = app.cli("request", "appx:sleeps", "--wait", "--timeout-s", "0.2")

    assert (added.returncode, added.stdout) == (0, "42\n")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "task 2 was interrupted: RAISED: ValueError: no such invoice" in failed.stderr
    assert late.returncode == 1
    assert "task 3 has not ended within 0.2 s" in late.stderr


def test_a_name_that_no_supervisor_knows_is_refused(make_app):
    app = make_app(TASKS)
    app.start()
    wait_until(lambda: "appx:add" in app.service.ledger.supervisors()[0].catalogue, "the catalogue is in the row")
    done = app.cli("request", "appx:ad", "{}")

    assert done.returncode == 2
    assert "no supervisor has a task named 'appx:ad'" in done.stderr
    assert "did you mean appx:add?" in done.stderr


# show, log


def test_show_tells_everything_but_secrets(make_app):
    app = make_app(TASKS)
    app.service.request(
        "appx:other",
        {"user": "jana", "Password": "hunter2", "deep": [{"api_key": "k-123", "n": 1}], "SmtpToken": "t-9"},
    )
    text = app.cli("show", "1").stdout
    shown = json.loads(app.cli("show", "1", "--json").stdout)

    for secret in ("hunter2", "k-123", "t-9"):
        assert secret not in text
        assert secret not in json.dumps(shown)
    assert "(masked)" in text
    assert "jana" in text
    assert shown["data"] == {
        "user": "jana",
        "Password": "***",
        "deep": [{"api_key": "***", "n": 1}],
        "SmtpToken": "***",
    }
    assert shown["status"] == "REQUEST"
    columns = app.service.ledger.store.tables.Task._meta.sorted_field_names
    assert set(columns) | {"waiting_for", "unresponsive", "interruptions", "log_tail"} <= set(shown)


def test_show_and_log_tell_what_a_failed_task_left(make_app):
    app = make_app(TASKS)
    app.start()
    handle = app.service.request("appx:fails")
    app.log_of(app.wait(handle))
    text = app.cli("show", str(handle.id)).stdout
    shown = json.loads(app.cli("show", str(handle.id), "--json").stdout)

    assert "INTERRUPTED / RAISED" in text
    assert 'raise ValueError("no such invoice")' in text
    assert "about to fail" in text
    assert shown["log_tail"][0] == "about to fail"
    assert shown["log_tail"][-1] == "ValueError: no such invoice"
    assert text.count("Traceback") == 1, "the error, and not the log's report of it as well"
    assert [one["reason"] for one in shown["interruptions"]] == ["RAISED"]
    assert shown["ended_at"].endswith("+00:00")
    assert app.cli("log", str(handle.id)).stdout.startswith("about to fail\n")


def test_a_task_that_printed_nothing_has_an_empty_log(make_app):
    app = make_app(TASKS)
    app.service.request("appx:add", {"a": 1})
    done = app.cli("log", "1")

    assert (done.returncode, done.stdout) == (0, "")
    assert "task 1 has printed nothing" in done.stderr


def test_log_follows_a_task_from_before_its_start_until_its_end(make_app):
    app = make_app(TASKS)
    handle = app.service.request("appx:sleeps", {"seconds": 0.5})
    process = subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "log", "-f", str(handle.id)],
        cwd=app.folder,
        env=app.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    app.start()
    out, err = process.communicate(timeout=20)

    assert out == "first line\nlast line\n"
    assert "has not begun yet" in err
    assert process.returncode == 0


def test_ctrl_c_leaves_the_log_and_not_the_task(make_app):
    app = make_app(TASKS)
    app.start()
    handle = app.service.request("appx:sleeps")
    process = subprocess.Popen(
        [sys.executable, "-m", "bgsupervisor", "log", "-f", str(handle.id)],
        cwd=app.folder,
        env=app.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "first line\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)

    assert process.returncode == 130
    assert err.strip() == ""
    assert app.service.status(handle) is Status.START


# cancel, retry


def test_cancel_says_what_it_did_to_each(make_app):
    app = make_app(TASKS)
    first = app.start()
    running = app.service.request("appx:sleeps")
    app.started(running)
    done = app.service.request("appx:add", {"a": 1})
    app.wait(done)
    waiting = app.service.request("appx:add", {"a": 1}, delay_s=500)
    first.kill()
    told = app.cli("cancel", str(waiting.id), str(done.id), "99", str(running.id), "--by", "jana")

    assert told.returncode == 1
    assert told.stdout.splitlines() == [
        f"task {waiting.id} was waiting; it is INTERRUPTED now",
        f"task {done.id} had ended DONE; nothing changed",
        f"task {running.id} is asked to end; after 1 s it gets SIGTERM, 1 s later SIGKILL",
    ]
    assert "no task has the id 99" in told.stderr
    assert "start one with `bgsupervisor run`, which then asks for the end" in told.stderr
    assert "already by jana" in app.cli("cancel", str(running.id)).stdout

    app.start()
    record = app.wait(running)
    assert (record.reason, record.cancel_requested_by) == (Reason.CANCELLED, "jana")


def test_retry_plans_an_interrupted_task_again_and_no_other(make_app):
    app = make_app(TASKS)
    one = app.service.request("appx:add", {"a": 1})
    two = app.service.request("appx:add", {"a": 2})
    app.cli("cancel", str(one.id))
    told = app.cli("retry", str(one.id), str(two.id))

    assert told.returncode == 1
    assert told.stdout == f"task {one.id} waits for its attempt 1\n"
    assert "only an INTERRUPTED task can be" in told.stderr
    assert app.service.status(one) is Status.REQUEST


# migrate, check


def test_migrate_creates_the_tables_once(make_app):
    app = make_app(TASKS)

    assert app.cli("migrate").stdout.startswith("applied 0001_initial")
    assert app.cli("migrate").stdout == "nothing to do: the tables are this version's\n"


@pytest.mark.of_sqlite
def test_migrate_works_on_a_database_that_holds_other_tables(make_app):
    app = make_app(TASKS)
    database = peewee.SqliteDatabase(str(app.folder / "bgsupervisor.db"))
    database.execute_sql("CREATE TABLE invoice (id INTEGER)")
    database.close()

    assert app.cli("migrate").stdout.startswith("applied 0001_initial")


def test_check_tells_values_with_their_origin_and_the_tasks(make_app):
    app = make_app(TASKS, env_file=".env")
    (app.folder / ".env").write_text("SMTP_PASSWORD=hunter2\n")
    done = app.cli("check", environment={"BGSUPERVISOR_SLOTS": "4"})
    shown = json.loads(app.cli("check", "--json").stdout)

    assert done.returncode == 0
    assert "slots          = 4  (environment BGSUPERVISOR_SLOTS)" in done.stdout
    assert "3 tasks" in done.stdout
    assert "appx:sleeps" in done.stdout
    assert "hunter2" not in done.stdout + done.stderr + json.dumps(shown)
    assert shown["config"]["slots"] == {"value": 16, "origin": "default"}
    assert set(shown["tasks"]) == {"appx:add", "appx:fails", "appx:sleeps"}
    assert not app.state_dir.exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("print('noise')\nimport no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import os\nos._exit(7)", "ended with exit code 7"),
    ],
)
def test_check_tells_why_a_module_does_not_load(make_app, source, sentence):
    app = make_app(source)
    done = app.cli("check")

    assert done.returncode == 1
    assert "appx failed to load" in done.stderr
    assert sentence in done.stderr
    assert "noise" not in done.stdout


def test_check_warns_of_threads_and_does_not_wait_for_them(make_app):
    app = make_app("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), name='poller').start()")
    done = app.cli("check")

    assert done.returncode == 0
    assert "poller" in done.stderr


def test_no_task_modules_are_a_failure_of_the_check(make_app):
    app = make_app("", tasks=[])
    done = app.cli("check")

    assert done.returncode == 1
    assert "no task modules are configured" in done.stderr


# run


def test_run_without_a_terminal_writes_into_its_own_log(make_app):
    app = make_app(TASKS)
    log = app.state_dir / "logs" / "supervisor.log"
    app.start().stop()
    assert "supervising" in log.read_text()

    with log.open("ab") as file:
        file.truncate(10 * 1024 * 1024 + 1)
    app.start().stop()
    assert log.stat().st_size < 100_000
    rotated = log.with_name("supervisor.log.1").stat().st_size
    assert rotated > 10 * 1024 * 1024, "the first nursery may still write into it"


def test_a_second_run_leaves_at_once_and_in_silence(make_app):
    app = make_app(TASKS)
    app.start()
    done = app.cli("run")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.of_sqlite
def test_a_run_that_cannot_open_its_database_tells_whoever_started_it(make_app):
    app = make_app(TASKS)
    (app.folder / "bgsupervisor.db").write_bytes(b"this is no database, but a text of some length" * 100)
    done = app.cli("run")

    assert done.returncode == 1
    assert "is damaged" in done.stderr
    assert "is damaged" in (app.state_dir / "logs" / "supervisor.log").read_text()


def test_a_crash_is_told_to_whoever_started_it_and_its_traceback_stands_in_the_log(make_app):
    app = make_app(TASKS)
    crash = (
        "from bgsupervisor.supervisor import Supervisor\n"
        "Supervisor.run = lambda self: 1 / 0\n"
        "from bgsupervisor.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", crash, "--config", str(app.config), "run"],
        env=app.environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    log = app.state_dir / "logs" / "supervisor.log"

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"bgsupervisor: it crashed with ZeroDivisionError; see {log}\n"
    assert "ZeroDivisionError: division by zero" in log.read_text()


def test_burst_runs_what_is_due_and_leaves_with_the_slots_that_were_asked_for(make_app):
    app = make_app(TASKS)
    handle = app.service.request("appx:add", {"a": 1, "b": 2})
    done = app.cli("run", "--burst", "--slots", "3")

    assert done.returncode == 0
    assert app.service.result(handle) == 3
    assert "with 3 slots" in (app.state_dir / "logs" / "supervisor.log").read_text()


def _plain_call(folder, *arguments):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "bgsupervisor", *arguments],
        cwd=folder,
        env=kept,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
