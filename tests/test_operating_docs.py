"""docs/operating.md is run: every command and every query, on a real database beside a real supervisor."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import LIMIT_S

from bgsupervisor import stacks
from bgsupervisor.cli import health
from bgsupervisor.doctor import CHECKS
from bgsupervisor.enforcement import STALL_SLACK_S
from bgsupervisor.housekeeping import LOG_ROTATED_BYTES, PRUNE_ROWS
from bgsupervisor.statuses import Reason, Status

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="supervising needs Linux")

PAGE = Path(__file__).parent.parent / "docs" / "operating.md"
TEXT = PAGE.read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARTS = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)[1:]
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
TASKS = """
    import pathlib, time
    from bgsupervisor import task

    @task
    def quick(name: str = "ran") -> int:
        with open(name, "a") as file:
            file.write("once\\n")
        return 1

    @task
    def fails() -> None:
        raise ValueError("no such invoice")

    @task
    def until(name: str) -> None:
        print("a line", flush=True)
        while not pathlib.Path(name).exists():
            time.sleep(0.01)
"""
STAND_IN = """#!{python}
import sqlite3, sys
source, command = sys.argv[1:]
verb, target = command.split()
assert verb == ".backup"
sqlite3.connect(source).backup(sqlite3.connect(target))
"""


def blocks(section, language):
    return [text for found, text in BLOCK.findall(SECTIONS[section]) if found == language]


def commands(section):
    """Return the commands of a section, each with the output that the page shows for it."""
    told = "".join(blocks(section, "console"))
    return [tuple(part.strip("\n").partition("\n")[::2]) for part in re.split(r"^\$ ", told, flags=re.MULTILINE)[1:]]


def table(section, head):
    """Return the rows of the table of a section that begins with *head*."""
    lines = SECTIONS[section].split(head)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shell(app, command):
    """Run a command of the page in the application's folder; this Python's programs are found first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["sh", "-c", command],
        cwd=app.folder,
        env=app.environment(PATH=path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S * 2,
        check=False,
    )


@pytest.fixture
def sqlite3_program(tmp_path, monkeypatch):
    """Have a `sqlite3` that understands the page's one command where the real program is not installed."""
    if shutil.which("sqlite3") is None:
        program = tmp_path / "bin" / "sqlite3"
        program.parent.mkdir()
        program.write_text(STAND_IN.format(python=sys.executable))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def follow(app, section, *, codes=(0,)):
    """Run all commands of a section in order; each shows what the page shows."""
    for command, output in commands(section):
        done = shell(app, command)
        assert done.returncode in codes, f"{command}: {done.stdout}{done.stderr}"
        assert not output or done.stdout.strip() == output, command


def rows_of(path, statement):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture
def app(make_app):
    return make_app(TASKS, slots=1, grace_s=0.2)


def test_every_code_block_of_the_page_is_run_by_a_test_of_its_section():
    kinds = {title: {language for language, _ in BLOCK.findall(text)} for title, text in SECTIONS.items()}
    assert {title: kind for title, kind in kinds.items() if kind} == {
        "Tasks that hang": {"console"},
        "Backup": {"console"},
        "Restore": {"console"},
        "When the disk is full": {"console"},
        "Logs": {"text"},  # compared by tests/test_error_reporting.py
        "Five questions to the database": {"sql"},
        "Upgrading": {"console"},
        "Monitoring": {"console", "crontab"},
        "What became of a task": {"console"},
        "Which process is which": {"console"},  # run by tests/test_titles.py
        "Doctor": {"console"},
    }
    assert sum(len(BLOCK.findall(text)) for text in SECTIONS.values()) == TEXT.count("```") // 2


# ---- what became of a task ----


def test_the_commands_that_show_a_task_do_what_the_page_says(app):
    app.start()
    app.started(app.service.request("appx:until", {"name": "never"}))
    follow(app, "What became of a task")


# ---- tasks that hang ----


def test_the_commands_for_a_task_that_hangs_do_what_the_page_says(app):
    app.start()
    running = app.started(app.service.request("appx:until", {"name": "never"}))
    assert running.id == 1
    follow(app, "Tasks that hang")
    assert app.wait(running.id).reason is Reason.CANCELLED


def test_what_stack_says_is_what_the_page_says():
    package = Path(stacks.__file__).parent
    said = " ".join((package / name).read_text() for name in ("stacks.py", "service.py"))
    told = [row[0].strip("`") for row in table("Tasks that hang", "| it says | because |")]
    assert len(told) == 8
    assert [words for words in told if words not in said] == []


def test_a_stall_is_told_as_late_as_the_page_says():
    assert f"A stall is told {STALL_SLACK_S:g} s later" in SECTIONS["Tasks that hang"]


# ---- backup and restore ----


def test_both_backups_hold_what_was_committed_last_and_a_plain_copy_does_not(app, sqlite3_program):
    app.start()
    app.started(app.service.request("appx:until", {"name": "never"}))
    last = app.service.request("appx:quick").id
    follow(app, "Backup")
    for name in ("backup.db", "vacuumed.db"):
        assert rows_of(app.folder / name, f"SELECT status FROM bgsupervisor_task WHERE id = {last}") == [("REQUEST",)]
    shutil.copy(app.folder / "bgsupervisor.db", app.folder / "copied.db")
    copied = sqlite3.connect(app.folder / "copied.db")
    with contextlib.closing(copied), contextlib.suppress(sqlite3.DatabaseError):
        assert copied.execute(f"SELECT id FROM bgsupervisor_task WHERE id = {last}").fetchall() == []


def test_after_a_restore_what_waited_runs_again_and_what_ran_is_interrupted(app, sqlite3_program):
    started = app.start()
    running = app.started(app.service.request("appx:until", {"name": "end"}))
    waiting = app.service.request("appx:quick")
    follow(app, "Backup")
    (app.folder / "end").touch()
    assert app.wait(running.id).status is Status.DONE
    assert app.wait(waiting).status is Status.DONE
    later = app.wait(app.service.request("appx:quick", {"name": "later"}))
    app.service.close()  # the web application is stopped

    follow(app, "Restore")
    assert started.process.wait(LIMIT_S) == 0
    app.start()
    assert app.wait(waiting).status is Status.DONE
    assert (app.folder / "ran").read_text() == "once\nonce\n"
    record = app.wait(running.id)
    assert (record.status, record.reason) == (Status.INTERRUPTED, Reason.VANISHED)
    assert app.service.get(later.id) is None
    assert (app.folder / "bgsupervisor.db").stat().st_mode & 0o777 == 0o660


def test_a_supervisor_that_is_not_stopped_leaves_when_the_file_is_replaced(app):
    started = app.start()
    app.service.close()
    for command, _ in [*commands("Backup")[1:2], ("cp vacuumed.db backup.db", ""), *commands("Restore")[1:3]]:
        done = shell(app, command)
        assert done.returncode == 0, done.stderr
    assert started.process.wait(LIMIT_S) == 0
    assert "the database file was replaced" in started.log


# ---- a full disk ----


def test_old_tasks_and_old_lines_give_the_disk_its_room_back(app):
    app.start()
    app.wait(app.service.request("appx:quick"))
    kept = app.wait(app.service.request("appx:quick"))
    old = (datetime.now(UTC) - timedelta(days=4)).isoformat(sep=" ", timespec="microseconds")
    database = app.folder / "bgsupervisor.db"
    with contextlib.closing(sqlite3.connect(database, timeout=10)) as connection, connection:
        connection.execute("UPDATE bgsupervisor_task SET ended_at = ? WHERE id < ?", (old, kept.id))
        connection.executemany(
            "INSERT INTO bgsupervisor_task (name, data, status, ended_at) VALUES ('a:b', ?, 'DONE', ?)",
            [('{"x": "' + "y" * 4000 + '"}', old)] * 500,
        )
    rotated = app.state_dir / "logs" / "supervisor.log.1"
    rotated.write_text("old lines\n")
    follow(app, "When the disk is full")
    assert not rotated.exists()
    assert rows_of(database, "SELECT id FROM bgsupervisor_task") == [(kept.id,)]
    assert rows_of(database, "PRAGMA freelist_count") == [(0,)]
    assert rows_of(database, "PRAGMA page_count")[0][0] * 4096 < 500 * 4000
    assert app.wait(app.service.request("appx:quick")).status is Status.DONE


def test_the_limits_of_the_logs_are_those_of_the_code():
    assert f"when it passes {LOG_ROTATED_BYTES // 1024**2} MiB" in SECTIONS["Logs"]
    assert f"{PRUNE_ROWS} rows in one transaction" in SECTIONS["Logs"]


# ---- the questions ----


@pytest.fixture
def answers(app):
    """Ask all questions of the page; return the rows of each, with names."""
    app.start()
    for name in ("quick", "quick", "fails", "fails"):
        app.wait(app.service.request(f"appx:{name}"))
    app.started(app.service.request("appx:until", {"name": "never"}))
    app.service.request("appx:quick", priority=3)
    app.service.request("appx:quick")
    app.service.request("appx:quick", delay_s=3600)
    with contextlib.closing(sqlite3.connect(app.folder / "bgsupervisor.db")) as connection:
        connection.row_factory = sqlite3.Row
        return [
            [dict(row) for row in connection.execute(text)] for text in blocks("Five questions to the database", "sql")
        ]


def test_the_five_questions_are_answered(answers):
    interrupted, durations, waits, memory, waiting = answers
    assert [(row["name"], row["reason"], row["tasks"]) for row in interrupted] == [("appx:fails", "RAISED", 2)]
    assert "no such invoice" in interrupted[0]["example"]
    assert [(row["name"], row["tasks"]) for row in durations] == [("appx:quick", 2)]
    assert 0 <= durations[0]["mean_s"] <= durations[0]["longest_s"] < 60
    assert sum(row["tasks"] for row in waits) == 4
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d", row["hour"]) for row in waits)
    assert all(0 <= row["mean_wait_s"] <= row["longest_wait_s"] < 60 for row in waits)
    assert memory
    assert all(row["peak_mib"] > 0 for row in memory)
    assert [(row["name"], row["tasks"], row["highest_priority"]) for row in waiting] == [("appx:quick", 2, 3)]


@pytest.mark.parametrize("text", blocks("Five questions to the database", "sql"))
def test_no_question_reads_all_that_ever_ended(app, text):
    app.service.counts()
    plan = " ".join(row[3] for row in rows_of(app.folder / "bgsupervisor.db", f"EXPLAIN QUERY PLAN {text}"))
    assert re.search(r"USING (COVERING )?INDEX bgsupervisor_task_(ended|due|run_at)", plan), plan


# ---- upgrading, monitoring, doctor ----


def test_migrating_says_what_the_page_says(app):
    app.start()
    follow(app, "Upgrading")


def test_the_health_command_of_the_page_is_one_line(app):
    app.start()
    follow(app, "Monitoring")


def test_the_exit_codes_of_the_page_are_those_of_the_code():
    assert [row[0] for row in table("Monitoring", "| exit code | when |")] == [
        f"{state.value} {state.name}" for state in health.State
    ]
    warning, critical = (row[1] for row in table("Monitoring", "| exit code | when |")[1:3])
    assert f"`--max-wait-s` ({health.MAX_WAIT_S:g})" in warning
    assert f"{health.WAL_WARN_BYTES // 1024**2} MiB" in warning
    assert {10: "ten"}[health.CRITICAL_FACTOR] + " times `--max-wait-s`" in critical


def test_the_crontab_line_replaces_the_metrics_in_one_step(app):
    app.start()
    (line,) = "".join(blocks("Monitoring", "crontab")).splitlines()
    assert line.startswith("* * * * * ")
    assert "%" not in line
    folder = app.folder / "collector"
    folder.mkdir()
    command = line.removeprefix("* * * * * ")
    for told, here in (
        ("/srv/myapp/venv/bin", Path(sys.executable).parent),
        ("/srv/myapp/current", app.folder),
        ("/var/lib/node_exporter", folder),
    ):
        assert told in command
        command = command.replace(told, shlex.quote(str(here)))
    done = shell(app, command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in folder.iterdir()] == ["bgsupervisor.prom"]
    printed = (folder / "bgsupervisor.prom").read_text()
    told = {row[0].strip("`") for row in table("Monitoring", "| metric | |")}
    assert told == set(re.findall(r"^# TYPE (\w+) gauge$", printed, re.MULTILINE))
    assert "bgsupervisor_supervisor_up{" in printed


def test_the_checks_of_the_page_are_those_of_the_doctor(app):
    app.start()
    follow(app, "Doctor", codes=(0, 1))
    told = [row[0] for row in table("Doctor", "| check | what it looks at |")]
    assert told == ["configuration", "task modules", "database", *CHECKS]
